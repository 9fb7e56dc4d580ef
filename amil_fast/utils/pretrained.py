"""Networks as folders: ``config.json`` with the constructor's arguments, ``model.safetensors`` with the weights."""

import json
import os
from pathlib import Path

VERSION = 1


def save(model, folder, kind, *, dtype=None, notes=None):
    """Writes ``config.json`` and ``model.safetensors`` into ``folder``; each appears under its name only when whole.

    Args:
        model: has ``config``, the JSON-able arguments of its constructor.
        kind: what the folder is said to hold, for :func:`load` to compare.
        dtype: of the stored floating-point values; by default as they are.
        notes: JSON-able, stored beside the arguments.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if dtype is not None:
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    config = {"format": kind, "version": VERSION, "arguments": model.config}
    if notes:
        config["notes"] = notes
    partial = folder / ".model.safetensors.partial"
    save_file(state, partial)
    os.replace(partial, folder / "model.safetensors")
    partial = folder / ".config.json.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, folder / "config.json")


def load(build, path, kind):
    """What :func:`save` wrote: ``build(**arguments)`` with the weights, float32, in evaluation mode.

    Args:
        path: the folder, or the file ``model.safetensors`` in it.

    Raises:
        ValueError: files that are missing or damaged, of another kind or a newer version, arguments or weights that
            don't fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    folder = path.parent if path.name == "model.safetensors" else path
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: expected a folder with config.json and model.safetensors, {file} is missing")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        arguments = config["arguments"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: expected the description of a {kind} ({error})") from None
    if config.get("format") != kind:
        raise ValueError(f"{folder / 'config.json'}: expected a {kind}, got {config.get('format')!r}")
    if config.get("version", 0) > VERSION:
        raise ValueError(f"{folder / 'config.json'}: version {config['version']} is newer than this amil_fast")
    try:
        model = build(**arguments)
        state = {
            name: value.float() if value.is_floating_point() else value
            for name, value in load_file(folder / "model.safetensors").items()
        }
        model.load_state_dict(state)
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: the files don't make a {kind}: {error}") from None
    return model.eval()


def check_sizes(**sizes):
    """Each ``name=(value, least)``: ValueError unless ``value`` is an int of at least ``least``."""
    for name, (value, least) in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an int of at least {least}, got {value!r}")
