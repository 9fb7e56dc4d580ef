"""Safetensors files, with errors that name the file; nothing is unpickled."""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from amil_fast.utils.files import DataError, open_regular


def read_tensors(
    path: str | os.PathLike, what: str = "a safetensors file"
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns ``(tensors, metadata)`` of a safetensors file; raises DataError."""
    from safetensors import SafetensorError, safe_open

    with open_regular(path):  # a named pipe would block
        pass
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path}: expected {what}: {error}") from None


def tensor_shapes(path: str | os.PathLike, what: str = "a safetensors file") -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by name, from its header; raises DataError."""
    from safetensors import SafetensorError, safe_open

    with open_regular(path):
        pass
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{path}: expected {what}: {error}") from None


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors to a safetensors file; raises OSError if that fails, for example because the disk is full."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous: dict[str, Any] = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(contiguous, path, metadata=metadata)
    except SafetensorError as error:  # the number of the system's error is part of the text
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise OSError(f"{path}: cannot be written: {error}") from None
