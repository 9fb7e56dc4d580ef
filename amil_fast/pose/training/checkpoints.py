"""Checkpoints that survive a kill at any moment, without a pickle in them.

A run's folder holds ``last/`` and ``best/``. In both, ``config.json`` and ``model.safetensors`` are the generator as
``save_pretrained`` writes it, and ``train.json`` the configuration. ``last/state.safetensors`` is everything a run goes
on from, tensors and (as JSON in its metadata) numbers: one file, so that it can't disagree with itself. Each file is
written whole beside its place, flushed to the disk and then renamed.
"""

import json
from pathlib import Path

import torch

STATE = "state.safetensors"
VERSION = 1


def save_state(folder, tensors, facts):
    """Writes ``state.safetensors``: name -> tensor, and JSON-able ``facts``."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, Path(folder) / STATE, metadata={"amil": json.dumps({"version": VERSION, **facts})})


def load_state(folder):
    """``(tensors, facts)`` of :func:`save_state`; ValueError where there is none, or it is damaged or newer."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / STATE
    if not path.is_file():
        raise ValueError(f"{path}: there is no such training state")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["amil"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path}: expected a training state written by amil train ({error})") from None
    if facts["version"] > VERSION:
        raise ValueError(f"{path}: version {facts['version']} is newer than this amil_fast")
    return tensors, facts


def prefixed(prefix, tensors):
    """``name`` -> ``prefix.name``."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def part(prefix, tensors):
    """The inverse of :func:`prefixed`: what begins with the prefix, without it."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def optimizer_tensors(optimizer):
    """The state of an optimizer as name -> tensor: ``"3.exp_avg"`` is that of its parameter 3."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, values in state.items() for key, value in values.items()}


def load_optimizer(optimizer, tensors):
    """Puts back :func:`optimizer_tensors`; learning rates and other settings stay the optimizer's own."""
    state = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        i, _, key = name.partition(".")
        parameter = parameters[int(i)]
        if value.shape == parameter.shape:
            # In the parameter's own order of axes (channels-last): another order gives other rounding.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_weights(model, path):
    """Starts a generator from another: parameters and buffers of equal name and shape are taken.

    Args:
        path: a folder written by ``save_pretrained``, or a ``.safetensors`` file.

    Returns:
        ``(taken, missing, left)``: numbers of tensors taken, names of the model's that weren't there (or had another
        shape), names in the file that the model has no place for.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a folder with model.safetensors, or a .safetensors file")
    try:
        there = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: expected a safetensors file ({error})") from None
    own = model.state_dict()
    taken = {name: value for name, value in there.items() if name in own and own[name].shape == value.shape}
    if not taken:
        raise ValueError(f"{file}: none of its tensors has the name and shape of one of the generator's")
    model.load_state_dict(taken, strict=False)
    return len(taken), [name for name in own if name not in taken], [name for name in there if name not in taken]
