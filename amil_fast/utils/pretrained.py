"""Model folders: ``config.json`` with the constructor's arguments, ``model.safetensors`` with the weights."""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from amil_fast.utils.files import publish, read_json, write_json
from amil_fast.utils.optional import require

VERSION = 1

_Module = TypeVar("_Module", bound=torch.nn.Module)


def save(
    model: torch.nn.Module,
    folder: str | os.PathLike,
    kind: str,
    *,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``config.json`` and ``model.safetensors`` to ``folder``, each atomically.

    Args:
        model: has an attribute ``config``, the JSON-serializable arguments of its constructor.
        folder: created if necessary.
        kind: identifier of the model class; :func:`load` compares it.
        dtype: dtype of the stored floating-point tensors; None keeps each tensor's own.
        notes: JSON-serializable, stored beside the arguments.
    """
    from safetensors.torch import save_file

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    config = {"format": kind, "version": VERSION, "arguments": model.config}
    if notes:
        config["notes"] = notes

    def write(partial: Path) -> None:
        write_json(partial / "config.json", config)
        save_file(state, partial / "model.safetensors")

    publish(folder, write)


def load(build: Callable[..., _Module], path: str | os.PathLike, kind: str) -> _Module:
    """Rebuilds a model that :func:`save` wrote.

    Args:
        build: constructor, called as ``build(**arguments)`` with the stored arguments.
        path: the folder, or the file ``model.safetensors`` in it.
        kind: expected identifier.

    Returns:
        The model with the stored weights, float32, in evaluation mode.

    Raises:
        ValueError: missing or damaged files, another kind or a newer version, or arguments and weights that do not
            match.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    folder = path.parent if path.name == "model.safetensors" else path
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: expected a folder with config.json and model.safetensors, {file} is missing")
    source = folder / "config.json"
    config = read_json(source)
    if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
        raise ValueError(f"{source}: expected a JSON object with 'format', 'version' and 'arguments'")
    if config.get("format") != kind:
        raise ValueError(f"{source}: format: expected {kind!r}, got {config.get('format')!r}")
    if config.get("version", 0) > VERSION:
        raise ValueError(f"{source}: version: expected at most {VERSION}, got {config['version']}; update amil_fast")
    try:
        model = build(**config["arguments"])
        state = {
            name: value.float() if value.is_floating_point() else value
            for name, value in load_file(folder / "model.safetensors").items()
        }
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: expected the files of a model of format {kind!r}: {error}") from None
    return model.eval()


def local_folder(path: str | os.PathLike) -> Path:
    """Returns ``path``, or the folder with the download of a Hugging Face repository ``"owner/name"``."""
    if isinstance(path, str) and not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        hub = require("huggingface_hub", "models on the Hugging Face hub")
        try:
            return Path(hub.snapshot_download(path, allow_patterns=["config.json", "model.safetensors"]))
        except Exception as error:  # of the hub, its network library, or the disk
            raise ValueError(f"{path}: no such folder, and no such model on the Hugging Face hub: {error}") from error
    return Path(path)


def push(save_to: Callable[[Path], object], repository: str, **options: Any) -> str:
    """Uploads the files that ``save_to(folder)`` writes to a Hugging Face repository; returns its address."""
    hub = require("huggingface_hub", "models on the Hugging Face hub")
    api = hub.HfApi()
    address = api.create_repo(repository, exist_ok=True, **options)
    with tempfile.TemporaryDirectory() as folder:
        save_to(Path(folder))
        api.upload_folder(repo_id=repository, folder_path=folder)
    return str(address)
