"""Triton kernels, kept in the top-level folder ``kernels/`` and importable only as ``amil_fast.kernels``.

A wheel has the files beside this one. In a checkout and in an editable install they are in ``../../kernels``, a folder
without ``__init__.py``, so that no top-level module of that name arises; this shim adds it to the package's path.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
