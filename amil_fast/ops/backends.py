"""Which implementation serves a call. Nothing here falls back: a backend that can't serve raises and says why."""

import functools
import importlib.util
import os
import sys

import torch


@functools.cache
def native():
    """The compiled extension ``amil_fast._C``; RuntimeError with the remedy where it can't be imported."""
    try:
        from amil_fast import _C
    except ImportError as error:
        raise RuntimeError(
            f"the compiled extension amil_fast._C can't be imported ({error}). Install the package with "
            "`pip install -e .` or `pip install .` (needs a C++17 compiler), or pass backend='reference'"
        ) from error
    return _C


def why_not_native():
    """None where the compiled extension is usable, else the reason."""
    try:
        native()
    except RuntimeError as error:
        return str(error)
    return None


def triton_interpreted():
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(device_type):
    """None where Triton kernels can run on tensors of this device type, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed (it has wheels for Linux; this is {sys.platform}): pip install triton"
    if device_type == "cuda" or (device_type == "cpu" and triton_interpreted()):
        return None
    return (
        "it runs on CUDA tensors, or on CPU tensors where the environment variable TRITON_INTERPRET=1 was set before "
        f"Triton was imported; got a tensor on {device_type!r}"
    )


def choose(backend, device_type, supported):
    """Resolves ``backend`` for a device type.

    ``supported`` maps each backend's name to a function of the device type that returns None where the backend can
    serve it, else the reason; ``"auto"`` maps a device type to one of these names. Raises ValueError for an unknown
    name and for a named backend that can't serve the call.
    """
    if backend == "auto":
        return supported["auto"](device_type)
    if backend not in supported:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, supported))}, got {backend!r}")
    reason = supported[backend](device_type)
    if reason is not None:
        raise ValueError(f"backend {backend!r} can't serve this call: {reason}")
    return backend


def dispatcher_has_work(*tensors):
    """Whether anything but autograd would act on a call: compiler, tracer, mode, transform, tensor subclass.

    Where nothing would, the operators call their kernels directly: the way through the dispatcher to a kernel in Python
    and back costs 7 us, or 30 us just after some megabytes went through the caches (2 cores of a Xeon with AVX-512);
    the kernel for a few small bags or maps takes less.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors)
    )
