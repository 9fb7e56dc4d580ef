"""Triton kernels. The sources are in the top-level folder ``kernels/`` and importable only as ``amil_fast.kernels``.

A wheel contains the sources beside this file. In a checkout or an editable install they are in ``../../kernels``, a
folder without ``__init__.py`` so that no top-level module ``kernels`` arises; it is added to the package's path here.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "setup.py").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
