"""Model folders: ``config.json`` with the constructor's arguments, ``model.safetensors`` with the weights."""

import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from amil_fast.utils.files import DataError, brief, check_version, publish, read_json, write_json
from amil_fast.utils.optional import require
from amil_fast.utils.tensor_files import read_tensors, tensor_shapes, write_tensors

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
    state = model.state_dict()
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    config = {"format": kind, "version": VERSION, "arguments": model.config}
    if notes:
        config["notes"] = notes

    def write(partial: Path) -> None:
        write_json(partial / "config.json", config)
        write_tensors(partial / "model.safetensors", state)

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
        DataError: missing or damaged files, another kind or a newer version, or arguments and weights that do not
            match.
    """
    path = Path(path)
    folder = path.parent if path.name == "model.safetensors" else path
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise DataError(f"{folder}: expected a folder with config.json and model.safetensors, {file} is missing")
    source, weights = folder / "config.json", folder / "model.safetensors"
    fields = "a JSON object with 'format', 'version' and 'arguments'"
    config = read_json(source, dict, fields)
    if config.get("format") != kind:
        raise DataError(f"{source}: format: expected {kind!r}, got {brief(config.get('format'))}")
    arguments = config.get("arguments")
    if not isinstance(arguments, dict):
        raise DataError(f"{source}: expected {fields}, got arguments {brief(arguments)}")
    check_version(config.get("version"), VERSION, source)
    what = f"the files of a model of format {kind!r}"
    shapes = tensor_shapes(weights, what)
    try:
        # First without memory: damaged arguments may describe a model of any size.
        with torch.device("meta"), _limit_parameters(len(shapes)):
            expected = build(**arguments).state_dict()
    except Exception as error:  # the constructor's own, for arguments of any type and value
        raise DataError(f"{folder}: expected {what}: {_reason(error)}") from None
    for name in expected.keys() | shapes.keys():
        found, wanted = shapes.get(name), tuple(expected[name].shape) if name in expected else None
        if found != wanted:
            texts = ("none" if shape is None else f"shape {shape}" for shape in (wanted, found))
            raise DataError(
                "{}: expected {}: {}: expected {} as in config.json, got {}".format(folder, what, name, *texts)
            )
    model = build(**arguments)
    state = {
        name: value.float() if value.is_floating_point() else value for name, value in read_tensors(weights)[0].items()
    }
    model.load_state_dict(state)
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


@contextmanager
def _limit_parameters(number: int) -> Iterator[None]:
    """Ends the construction of a model in this thread with ValueError once it has more than ``number`` parameters."""
    thread, seen = threading.get_ident(), 0

    def count(module, name, parameter):
        nonlocal seen
        if threading.get_ident() == thread and parameter is not None:
            seen += 1
            if seen > number:
                raise ValueError(f"more than the {number} tensors in model.safetensors")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _reason(error):
    return f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
