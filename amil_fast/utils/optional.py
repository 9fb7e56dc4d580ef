"""Optional dependencies: imported where they are needed, with an error that names the remedy."""

import importlib
from typing import Any


class MissingDependency(ImportError):
    """An optional package that a call needs is not installed; the message names the command that installs it."""


def require(module: str, purpose: str, *, package: str | None = None, extra: str = "mil") -> Any:
    """Imports an optional dependency.

    Args:
        module: dotted name of the module.
        purpose: use of the module, for the message.
        package: name of the package that contains it, if it is another one.
        extra: extra of amil_fast that installs it.

    Raises:
        MissingDependency: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.split(".")[0]
        if (error.name or "").split(".")[0] != root:
            raise  # installed, but broken
        package = package or root
        raise MissingDependency(
            f"{package}: needed for {purpose}; install it with: pip install {package}, "
            f"or: pip install 'amil_fast[{extra}]'"
        ) from None
