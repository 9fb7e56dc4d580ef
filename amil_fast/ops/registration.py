"""Derivatives of the registered operators and their rules for ``torch.func`` transforms."""

import torch
from torch.autograd import forward_ad


def register_function(library, name, function):
    """Registers an ``autograd.Function`` as the derivatives and ``torch.func`` rules of an operator of ``amil_fast``.

    ``torch.library.register_autograd`` covers reverse mode only: forward mode would give zero tangents without notice,
    and most transforms would fail. ``function`` has ``setup_context``, ``backward``, ``jvp`` and ``vmap``; its
    ``forward`` is :func:`call_below_autograd`, its ``vmap`` calls the operator.
    """
    operator = getattr(getattr(torch.ops, library.ns), name).default
    defaults = [argument.default_value for argument in operator._schema.arguments]

    def apply(arguments):  # the dispatcher drops trailing arguments that equal their defaults
        return function.apply(*arguments, *defaults[len(arguments) :])

    def autograd(keyset, *arguments):
        needs_grad = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
        if needs_grad or forward_ad._current_level >= 0:
            return apply(arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    library.impl(name, autograd, "Autograd", with_keyset=True)
    # The key that intercepts all calls inside of transforms.
    library.impl(name, lambda *arguments: apply(arguments), "FuncTorchDynamicLayerFrontMode")


def call_below_autograd(operator, *arguments):
    """Calls a registered operator from the ``forward`` of its ``autograd.Function``."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def non_differentiable(operator, message, vmap):
    """``autograd.Function`` of a registered operator that raises RuntimeError(message) in both modes of autograd.

    ``vmap`` is its static method of that name.
    """

    def refuse(ctx, *_):
        raise RuntimeError(message)

    methods = {
        "forward": lambda *arguments: call_below_autograd(operator, *arguments),
        "setup_context": lambda ctx, inputs, output: None,
        "backward": refuse,
        "jvp": refuse,
        "vmap": vmap,
    }
    name = f"NonDifferentiable_{operator._opname}"
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})


def batch_first(info, in_dims, tensors):
    """Arguments of a vmap rule with the mapped axis in front: ``(V, ...)``, expanded if not mapped; None stays."""
    return [
        None if t is None else t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]


def fold_batch(tensors):
    """``(V, B, ...)`` -> ``(V B, ...)``; None stays."""
    return [t if t is None else t.flatten(0, 1) for t in tensors]


def in_derivative_transform():
    """True if forward-mode AD or a ``torch.func`` derivative (grad, vjp, jvp) is active."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(
        level.key() != torch._C._functorch.TransformType.Vmap for level in stack
    )
