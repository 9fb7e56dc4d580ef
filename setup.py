"""Builds the compiled extension ``amil_fast._C``; all declarative metadata is in pyproject.toml.

The extension includes no torch headers, so it builds in pip's isolated environment and needs no rebuild when torch is
upgraded. It consists of three kinds of sources (see CONTRIBUTING.md):

- ``csrc/**/*.cpp``: compiled once, for the baseline instruction set;
- ``csrc/**/simd/*.cpp``: compiled once per instruction set; one copy is selected at run time;
- ``csrc/**/*.cu``: compiled with nvcc if it is found, and linked with the static CUDA runtime.

Environment variables:

- ``AMIL_FAST_CUDA``: ``0`` builds without CUDA, ``1`` makes a missing nvcc an error; by default nvcc is used if found.
- ``AMIL_FAST_CUDA_ARCHS``: GPU architectures to compile for, such as ``"90;100"``; fewer architectures build faster.
- ``AMIL_FAST_SANITIZE``: sanitizers for the C++ code, such as ``address,undefined`` (see ``make sanitize``).
- ``AMIL_FAST_VERBOSE``: any value prints the compiler commands, unless setup.py runs with ``-q``.
- ``CUDA_HOME`` (or ``CUDA_PATH``), ``CXX``, ``MAX_JOBS``: as usual.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
X86_64 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = {"baseline": []}
if X86_64:
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    ]
# Sources in simd/ that are compiled without fused multiply-adds, so that all copies and CUDA return the same bits.
NO_FMA = ("decode_maps",)
# SASS is generated for those of these architectures that nvcc supports, and PTX for the newest of them.
CUDA_ARCHS = ("75", "80", "86", "89", "90", "100")


def find_nvcc():
    """Returns the path of nvcc, None to build without CUDA, and the reason."""
    wanted = os.environ.get("AMIL_FAST_CUDA", "auto")
    if wanted == "0":
        return None, "left out: AMIL_FAST_CUDA=0"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(p) for p in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc") if p]
    for nvcc in candidates:
        if nvcc.is_file():
            return str(nvcc), f"nvcc at {nvcc}"
    if wanted == "1":
        raise SystemExit("AMIL_FAST_CUDA=1: expected nvcc in CUDA_HOME, on PATH or in /usr/local/cuda/bin, found none")
    return None, "left out: no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda/bin"


def cuda_arch_flags(nvcc):
    """Returns nvcc's -gencode flags for the requested architectures that it supports, and the names of the targets."""
    supported = set(re.findall(r"compute_(\d+)", subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)))
    requested = os.environ.get("AMIL_FAST_CUDA_ARCHS", "").replace(",", ";")
    requested = requested.split(";") if requested else CUDA_ARCHS
    archs = [arch for arch in requested if arch in supported]
    if not archs:
        raise SystemExit(
            f"AMIL_FAST_CUDA_ARCHS: expected architectures that {nvcc} supports ({', '.join(sorted(supported))}), "
            f"got {', '.join(requested)}"
        )
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return flags, [f"sm_{a}" for a in archs] + [f"compute_{archs[-1]}"]


def object_name(source, variant=None):
    """Returns the name of a source's object file, which is unique within csrc/."""
    parts = source.relative_to(ROOT / "csrc").with_suffix("").parts
    return ".".join([*parts, *([variant] if variant else []), "o"])


def static_cudart_flags(nvcc):
    """Returns the linker flags for the static CUDA runtime of nvcc's toolkit."""
    toolkit = Path(nvcc).resolve().parent.parent
    folders = [toolkit / "lib64", *toolkit.glob("targets/*/lib"), Path("/usr/local/cuda/lib64")]
    found = [f"-L{folder}" for folder in folders if (folder / "libcudart_static.a").exists()]
    return [*found, "-lcudart_static", "-lrt"]


class BuildExtension(build_ext):
    """Compiles and links all sources with one build.ninja."""

    def build_extension(self, ext):
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)

        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "c++"
        nvcc, nvcc_reason = find_nvcc()
        cuda_sources = sorted((ROOT / "csrc").rglob("*.cu")) if nvcc else []
        includes = [f"-I{ROOT / 'csrc'}", f"-I{build_dir}"]
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-fno-math-errno", "-ffp-contract=off"]
        sanitizers = []
        if os.environ.get("AMIL_FAST_SANITIZE"):
            sanitizers = [f"-fsanitize={os.environ['AMIL_FAST_SANITIZE']}", "-fno-sanitize-recover=all"]
            common += [*sanitizers, "-O1", "-g", "-fno-omit-frame-pointer"]
        python_includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

        info = {
            "compiler": subprocess.check_output([cxx, "--version"], text=True).splitlines()[0],
            "instruction_sets": list(INSTRUCTION_SETS),
            "cuda": nvcc_reason,
            "cuda_version": None,
            "cuda_archs": [],
        }
        if cuda_sources:
            arch_flags, info["cuda_archs"] = cuda_arch_flags(nvcc)
            version = subprocess.check_output([nvcc, "--version"], text=True)
            info["cuda_version"] = re.search(r"release ([\d.]+)", version).group(1)
        self.write_build_info(build_dir / "build_info.h", info, with_cuda=bool(cuda_sources))

        objects = []
        with open(build_dir / "build.ninja", "w") as f:
            w = Writer(f, width=1000)
            w.rule("cxx", f"{cxx} -MMD -MF $out.d {' '.join(common + includes)} $flags -c $in -o $out",
                   depfile="$out.d", deps="gcc", description="CXX $in $flags")  # fmt: skip
            w.rule("link", f"{cxx} -shared $in -o $out $flags", description="LINK $out")

            def compile_cxx(source, name, flags):
                objects.append(name)
                w.build(name, "cxx", str(source), variables={"flags": " ".join(flags)})

            for source in sorted((ROOT / "csrc").rglob("*.cpp")):
                if source.parent.name != "simd":
                    compile_cxx(source, object_name(source), python_includes if source.stem == "bindings" else [])
            for source in sorted((ROOT / "csrc").rglob("simd/*.cpp")):
                contract = "off" if source.stem in NO_FMA else "fast"
                for isa, flags in INSTRUCTION_SETS.items():
                    compile_cxx(source, object_name(source, isa),
                                [f"-DAMIL_ISA={isa}", f"-ffp-contract={contract}", *flags])  # fmt: skip
            libraries = []
            if cuda_sources:
                # -fmad=false: the headers shared with the host produce the same bits on both
                w.rule("nvcc", f"{nvcc} -ccbin {cxx} -MMD -MF $out.d -std=c++17 -O3 -fmad=false -cudart static "
                       f"-Xcompiler -fPIC,-fvisibility=hidden {' '.join(arch_flags + includes)} -c $in -o $out",
                       depfile="$out.d", deps="gcc", description="NVCC $in")  # fmt: skip
                for source in cuda_sources:
                    objects.append(object_name(source, "cu"))
                    w.build(objects[-1], "nvcc", str(source))
                libraries = static_cudart_flags(nvcc)
            # Symbols of the static libcudart must not interfere with torch's own copy.
            libraries += ["-ldl", "-lpthread", "-Wl,--exclude-libs,ALL", *sanitizers]
            w.build(str(target), "link", objects, variables={"flags": " ".join(libraries)})

        jobs = self.parallel or os.environ.get("MAX_JOBS") or os.cpu_count()
        verbose = ["-v"] if self.verbose and os.environ.get("AMIL_FAST_VERBOSE") else []
        subprocess.check_call([Path(ninja.BIN_DIR) / "ninja", f"-j{jobs}", *verbose], cwd=build_dir)

        print(f"amil_fast._C built with {info['compiler']}", file=sys.stderr)
        print(f"  CPU instruction sets: {', '.join(INSTRUCTION_SETS)} (selected at run time)", file=sys.stderr)
        archs = f"{info['cuda_version']}, {', '.join(info['cuda_archs'])}, " if cuda_sources else ""
        print(f"  CUDA: {archs}{nvcc_reason}", file=sys.stderr)

    @staticmethod
    def write_build_info(header, info, with_cuda):
        """Writes the header with the build's description and switches, unless it exists with the same content."""
        text = f'#pragma once\n#define AMIL_BUILD_INFO R"json({json.dumps(info)})json"\n'
        text += f"#define AMIL_WITH_CUDA {int(with_cuda)}\n"
        text += f"#define AMIL_WITH_X86_SIMD {int(X86_64)}\n"
        if not header.exists() or header.read_text() != text:  # an unchanged header causes no recompilation
            header.write_text(text)


class BuildPy(build_py):
    """Copies the sibling folder kernels/ into the package as amil_fast.kernels, its location in a wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            return  # amil_fast/kernels/__init__.py locates the folder
        target = Path(self.build_lib) / "amil_fast" / "kernels"
        for source in sorted([*(ROOT / "kernels").glob("*.py"), ROOT / "kernels" / "budget.json"]):
            self.copy_file(str(source), str(target / source.name))


setup(
    packages=find_packages(include=["amil_fast", "amil_fast.*"]),
    package_data={"amil_fast": ["py.typed"], "amil_fast.pose": ["weights/*"]},
    ext_modules=[Extension("amil_fast._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
)
