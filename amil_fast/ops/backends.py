"""Selection of the implementation of an operator. There is no fallback: an unusable backend raises with the reason."""

import functools
import importlib.util
import operator
import os
import sys

import torch
import torch.autograd.forward_ad


@functools.cache
def native():
    """Returns the compiled extension ``amil_fast._C``; raises RuntimeError with instructions if the import fails."""
    try:
        from amil_fast import _C
    except ImportError as error:
        raise RuntimeError(
            f"the compiled extension amil_fast._C cannot be imported ({error}). Install the package with "
            "`pip install -e .` or `pip install .` (needs a C++17 compiler), or pass backend='reference'"
        ) from error
    return _C


def why_not_native():
    """None if the compiled extension is usable, otherwise the reason."""
    try:
        native()
    except RuntimeError as error:
        return str(error)
    return None


def triton_interpreted():
    """True if Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_triton(device_type):
    """None if Triton kernels run on tensors of this device type, otherwise the reason."""
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed (it has wheels for Linux; this is {sys.platform}): pip install triton"
    if device_type == "cuda" or (device_type == "cpu" and triton_interpreted()):
        return None
    return (
        "expected CUDA tensors, or CPU tensors with the environment variable TRITON_INTERPRET=1 set before Triton is "
        f"imported, got a tensor on {device_type!r}"
    )


def check_name(backend, supported):
    """Raises ValueError unless ``backend`` is a key of ``supported``."""
    if backend not in supported:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, supported))}, got {backend!r}")


def choose(backend, device_type, supported):
    """Resolves ``backend`` for a device type.

    Args:
        backend: name of a backend, or ``"auto"``.
        device_type: device type of the tensors.
        supported: name -> function of the device type that returns None if the backend supports it, otherwise the
            reason; ``"auto"`` -> function that returns a name.

    Raises:
        ValueError: an unknown name, or a named backend that cannot serve the call.
    """
    if backend == "auto":
        return supported["auto"](device_type)
    check_name(backend, supported)
    reason = supported[backend](device_type)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot serve this call: {reason}")
    return backend


# The dispatch keys of tensors that are nothing but dense memory of a CPU or GPU, and all others, as bit masks.
_PLAIN_KEYS = functools.reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)).raw_repr()
        for key in ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
    ),
)
_OTHER_KEYS = ~_PLAIN_KEYS
# Bound once, since attribute lookups take a third of the time of dispatcher_has_work.
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_dispatch_keys = torch._C._dispatch_keys
_forward_ad = torch.autograd.forward_ad
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack


def is_plain(tensor):
    """True if the values of a tensor are those in its memory: strided, on a CPU or CUDA, and not of a subclass.

    False for pending negation and conjugation (``torch._neg_view``, ``z.conj().imag``), zero tensors without memory,
    sparse, quantized and nested tensors, and wrappers of ``torch.func`` transforms.
    """
    kind = type(tensor)
    return (kind is _Tensor or kind is _Parameter) and not _dispatch_keys(tensor).raw_repr() & _OTHER_KEYS


def dispatcher_has_work(*tensors):
    """True if a tensor is not plain memory, or if a compiler, tracer, mode or transform is active, apart from autograd.

    Otherwise the operators call their kernels directly: the dispatcher adds 7 us to a kernel implemented in Python, 30
    us with cold caches (2 cores of a Xeon with AVX-512), more than the kernel takes for a few small bags or maps.
    Arguments that are None are ignored.
    """
    if (
        _is_compiling()
        or _is_tracing()
        or _num_dispatch_modes()
        or _transform() is not None
        or _forward_ad._current_level >= 0
    ):
        return True
    for tensor in tensors:  # noqa: SIM110, any() with a generator takes twice the time
        if tensor is not None and not is_plain(tensor):
            return True
    return False
