"""Package structure: import layers, import cost, kernel location and wheel contents."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import amil_fast

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up; a module may import from its own room and from those in the layers below it, never from a sibling.
LAYERS = [
    {"_C", "kernels", "utils"},
    {"ops"},
    {"nn"},
    {"pose.skeletons"},  # names, flip pairs and normalizers only: the metrics need them
    {"metrics"},
    {"mil", "pose"},
    {"cli"},
]
# Rooms of amil_fast/pose, from the bottom up.
POSE_LAYERS = [
    {"skeletons", "codec"},
    {"models"},
    {"data"},
    {"visualization"},
    {"inference"},
    {"evaluation"},
    {"training"},
    {"demo"},
]
# The package's own __init__ and info() import what they present.
ROOT_MODULES = {"__init__", "environment"}
PUBLIC_MODULES = [
    "amil_fast",
    "amil_fast.ops",
    "amil_fast.nn",
    "amil_fast.metrics",
    "amil_fast.metrics.modules",
    "amil_fast.mil",
    "amil_fast.pose",
    "amil_fast.pose.data",
    "amil_fast.pose.evaluation",
    "amil_fast.pose.inference",
    "amil_fast.pose.training",
    "amil_fast.pose.visualization",
]


def imports_of(path):
    """Dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(words):
    """The name in LAYERS that a dotted path below ``amil_fast`` belongs to, and its level; None for public names."""
    for level, names in enumerate(LAYERS):
        for depth in (2, 1):
            if ".".join(words[:depth]) in names:
                return ".".join(words[:depth]), level
    return None


def python_files():
    yield from ((path, path.relative_to(ROOT / "amil_fast")) for path in sorted((ROOT / "amil_fast").rglob("*.py")))
    yield from ((path, Path("kernels") / path.name) for path in sorted((ROOT / "kernels").glob("*.py")))


def package_imports():
    """``(place, importer, imported)``: dotted paths below ``amil_fast`` of every import of one part by another."""
    for path, place in python_files():
        importer = place.with_suffix("").parts
        if importer[0] in ROOT_MODULES:
            continue
        for name in imports_of(path):
            words = name.split(".")
            if words[0] == "amil_fast" and len(words) > 1:
                yield place, importer, tuple(words[1:])


def test_imports_point_down():
    seen = 0
    for place, importer, imported in package_imports():
        if imported[0] == "environment":
            continue
        target = room_of(imported)
        if target is None:
            assert imported[0] in amil_fast.__all__, f"{place} imports {imported}, which has no place in LAYERS"
            continue
        room, level = room_of(importer)
        seen += 1
        assert target[0] == room or target[1] < level, f"{place} imports {'.'.join(imported)}, which is not below it"
    assert seen > 100


def test_imports_within_pose_point_down():
    levels = {name: level for level, names in enumerate(POSE_LAYERS) for name in names}
    seen = 0
    for place, importer, imported in package_imports():
        if importer[0] != "pose" or imported[0] != "pose" or importer[1] == "__init__" or len(imported) < 2:
            continue
        if imported[1] not in levels:  # what amil_fast.pose itself exports
            assert levels[importer[1]] > levels["models"], f"{place} imports {'.'.join(imported)}"
            continue
        seen += 1
        below = levels[imported[1]] < levels[importer[1]]
        assert importer[1] == imported[1] or below, f"{place} imports {'.'.join(imported)}, which is not below it"
    assert seen > 50


def test_reference_and_kernels_are_independent():
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
    (other / "__init__.py").write_text("OWNER = 'another package'")
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
    kernels = [*(ROOT / "kernels").glob("*.py"), ROOT / "kernels" / "budget.json"]
    assert {f"amil_fast/kernels/{path.name}" for path in kernels} <= set(names)
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


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_public_api_is_annotated(name):
    """Arguments and results of everything in ``__all__``, methods included: ``py.typed`` promises it."""
    module = importlib.import_module(name)
    missing = []
    for public in module.__all__:
        value = getattr(module, public)
        functions = {public: value} if inspect.isfunction(value) else {}
        if inspect.isclass(value) and not issubclass(value, tuple):
            for attribute, member in vars(value).items():
                member = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                member = member.fget if isinstance(member, property) else member
                if inspect.isfunction(member) and (attribute == "__init__" or not attribute.startswith("_")):
                    functions[f"{public}.{attribute}"] = member
        for place, function in functions.items():
            if function.__module__.split(".")[0] != "amil_fast":
                continue  # what a base class or a decorator brought along
            signature = inspect.signature(function)
            arguments = list(signature.parameters.values())
            if "." in place and arguments and arguments[0].name in ("self", "cls"):
                arguments = arguments[1:]
            missing += [f"{place}({a.name})" for a in arguments if a.annotation is a.empty]
            if signature.return_annotation is inspect.Signature.empty and not place.endswith("__init__"):
                missing.append(f"{place} ->")
    assert not missing, f"{name}: without annotation: {', '.join(missing)}"
