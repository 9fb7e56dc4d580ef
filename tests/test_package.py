"""The package as a package: who may import whom, what importing costs, where the kernels are, what a wheel holds."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import amil_fast

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up; a module may import from its own layer and those below it.
LAYERS = [
    {"_C", "kernels"},
    {"ops"},
    {"nn", "metrics"},
    {"pose", "data", "evaluation"},
    {"training"},
    {"cli", "demo"},
]
# Where the whole package may be imported from without a layer of its own.
ROOT_MODULES = {"__init__", "environment"}


def imports_of(path):
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer_of(name):
    for level, names in enumerate(LAYERS):
        if name in names:
            return level
    raise AssertionError(f"amil_fast.{name} has no place in LAYERS")


def python_files():
    yield from ((path, path.relative_to(ROOT / "amil_fast")) for path in sorted((ROOT / "amil_fast").rglob("*.py")))
    yield from ((path, Path("kernels") / path.name) for path in sorted((ROOT / "kernels").glob("*.py")))


def test_imports_point_down():
    seen = 0
    for path, place in python_files():
        part = place.parts[0].removesuffix(".py")
        for name in imports_of(path):
            words = name.split(".")
            if words[0] != "amil_fast" or len(words) == 1:
                continue
            seen += 1
            target = words[1]
            if (
                part in ROOT_MODULES
                or target == "environment"
                or not (
                    (ROOT / "amil_fast" / target).is_dir()
                    or (ROOT / "amil_fast" / f"{target}.py").is_file()
                    or target == "_C"
                )
            ):
                continue  # amil_fast's own __init__ and info(), or a public name of the package
            assert layer_of(target) <= layer_of(part), f"{place} imports {name}, which is above it"
    assert seen > 20


def test_the_reference_and_the_kernels_do_not_know_each_other():
    for path, place in python_files():
        names = " ".join(imports_of(path))
        if place.parts[0] == "kernels":
            assert "_reference" not in names, place
        elif "_reference" in place.name:
            assert "kernels" not in names and "_C" not in names and "native" not in names, place
        if place.parts[0] not in ("ops", "kernels"):
            assert "amil_fast.kernels" not in names and "amil_fast._C" not in names, f"{place}: only ops/ chooses"


def test_extension_includes_no_torch_and_one_file_knows_pybind11():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text()
        assert "torch/" not in text and "ATen" not in text, path
        assert ("pybind11" in text) == (path.name == "bindings.cpp"), path


def run_python(code, cwd=None, executable=sys.executable):
    result = subprocess.run([executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_torch_and_numpy_only(tmp_path):
    """Nothing else is loaded by ``import amil_fast``, and what it adds to torch and numpy is a few modules."""
    modules = json.loads(run_python(
        "import sys, json, torch, numpy; before = set(sys.modules); import amil_fast;"
        "print(json.dumps(sorted(set(sys.modules) - before)))", cwd=tmp_path))  # fmt: skip
    others = {name.split(".")[0] for name in modules} - {"amil_fast", "torch", "numpy"} - set(sys.stdlib_module_names)
    assert not others, f"import amil_fast loads {sorted(others)}"
    assert "amil_fast._C" not in modules and not any(name.startswith("amil_fast.kernels") for name in modules)
    assert len([name for name in modules if name.startswith("amil_fast")]) < 20


def test_every_public_name_is_there():
    for name in amil_fast.__all__:
        assert getattr(amil_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        amil_fast.nothing_of_the_kind  # noqa: B018


def test_kernels_are_importable_as_amil_fast_kernels_only(tmp_path):
    """From the checkout too, with a folder of that name in its root; and another package `kernels` keeps its name."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("WHOSE = 'somebody else'")
    code = (
        "import amil_fast.kernels.adjust_pool_config as c, importlib.util as u; import pathlib;"
        "spec = u.find_spec('kernels');"
        "print(pathlib.Path(c.__file__).parent.name, spec.loader if spec is None else spec.origin)"
    )
    assert not (ROOT / "kernels" / "__init__.py").exists()
    place, origin = run_python(code, cwd=tmp_path).split(maxsplit=1)  # the working directory comes first on the path
    assert place == "kernels" and origin.strip() == str(other / "__init__.py")
    place, origin = run_python(code, cwd=ROOT).split(maxsplit=1)
    assert place == "kernels" and origin.strip() == "None"


def test_wheel_from_outside_the_checkout(tmp_path):
    """A wheel holds the kernels inside the package, no top-level module but its own, and works where it is unpacked."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
        env={**os.environ, "AMIL_FAST_CUDA": "0"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(unpacked)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"amil_fast"}
    assert {f"amil_fast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} <= set(names)
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]
    out = run_python(
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
        "import torch, amil_fast, amil_fast.kernels.adjust_pool_config as c\n"
        "print(amil_fast.__file__); print(c.__file__); print(amil_fast.info()['build']['cuda'])\n"
        "print(amil_fast.adjust_pool(torch.ones(1, 2, 3), num_iters=1).tolist())", cwd=tmp_path)  # fmt: skip
    package, kernels, cuda, bag = out.splitlines()
    assert package.startswith(str(unpacked)) and kernels.startswith(str(unpacked / "amil_fast" / "kernels"))
    assert cuda == "left out: AMIL_FAST_CUDA=0"
    assert json.loads(bag)[0] == pytest.approx([3**0.5 / 4] * 3)


def test_info():
    info = amil_fast.info()
    assert json.loads(json.dumps(info)) == info
    assert info["backends"]["reference"] is None and info["backends"]["cpp"] is None
    assert info["build"]["instruction_set"] in info["build"]["instruction_sets_usable"]
    assert info["versions"]["amil_fast"] == amil_fast.__version__
    assert info["backends"]["triton"] is None or "TRITON_INTERPRET" in info["backends"]["triton"]


def test_version_is_the_same_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{amil_fast.__version__}"' in text
