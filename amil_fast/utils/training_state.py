"""State of a training run in one safetensors file, and the tensors of optimizers by name.

``state.safetensors`` contains tensors and (as JSON in its metadata) numbers, so that they are always consistent. It is
to be written through :mod:`amil_fast.utils.files`, so that it appears only when it is complete.
"""

import json
from pathlib import Path
from typing import Any

import torch

from amil_fast.utils.files import DataError, brief, check_version, parse_json
from amil_fast.utils.tensor_files import read_tensors, write_tensors

STATE = "state.safetensors"
VERSION = 1


def save_state(folder: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Writes ``state.safetensors``: tensors by name, and ``facts`` that JSON can represent."""
    write_tensors(Path(folder) / STATE, tensors, metadata={"amil": json.dumps({"version": VERSION, **facts})})


def load_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns ``(tensors, facts)`` of :func:`save_state`; raises DataError if missing, damaged or newer."""
    path, what = Path(folder) / STATE, "a training state"
    tensors, metadata = read_tensors(path, what)
    facts = parse_json(metadata.get("amil", "null"), path, dict, what)
    check_version(facts.get("version"), VERSION, path)
    return tensors, facts


def load_config(folder: Path) -> dict[str, Any]:
    """Returns the configuration, as a dict, of the run whose state is in ``folder``; raises DataError."""
    config = load_state(folder)[1].get("config")
    if not isinstance(config, dict):
        raise DataError(f"{Path(folder) / STATE}: config: expected an object, got {brief(config)}")
    return config


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames ``name`` to ``prefix.name``."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def part(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Selects the names that begin with ``prefix.`` and removes it, the inverse of :func:`prefixed`."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def optimizer_tensors(optimizer: Any) -> dict[str, torch.Tensor]:
    """Returns the state of an optimizer by name: ``"3.exp_avg"`` belongs to its parameter 3."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, values in state.items() for key, value in values.items()}


def load_optimizer(optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Restores :func:`optimizer_tensors`; learning rates and other settings of the optimizer are kept."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        i, _, key = name.partition(".")
        parameter = parameters[int(i)]
        if value.shape == parameter.shape:
            # In the parameter's memory format (channels-last): another one rounds differently.
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        state.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_weights(model: torch.nn.Module, path: str | Path) -> tuple[int, list[str], list[str]]:
    """Initializes a model from a file: parameters and buffers of equal name and shape are loaded.

    Args:
        path: a folder written by ``save_pretrained``, or a ``.safetensors`` file.

    Returns:
        ``(taken, missing, unused)``: number of loaded tensors; names in the model that are missing in the file or have
        another shape there; names in the file that were not loaded.

    Raises:
        ValueError: not a safetensors file, or no tensor fits.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file() or file.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a folder with model.safetensors, or a .safetensors file")
    tensors, _ = read_tensors(file)
    own = model.state_dict()
    taken = {name: value for name, value in tensors.items() if name in own and own[name].shape == value.shape}
    if not taken:
        raise ValueError(f"{file}: no tensor has the name and shape of one of the model's")
    model.load_state_dict(taken, strict=False)
    return len(taken), [name for name in own if name not in taken], [name for name in tensors if name not in taken]
