"""Versions, devices, build and usable backends: :func:`info`."""

import importlib.metadata
import importlib.util
import json
import platform

import torch

from amil_fast.ops import backends


def info() -> dict:
    """Returns versions, devices, build, and the usable backends, as a dict for ``json.dumps``.

    A backend is None if it is usable on this machine, otherwise the reason why not::

        {"versions": {...}, "devices": {...}, "build": {...} or None, "backends": {"cpp": None, "triton": "…", ...}}
    """
    native_reason = backends.why_not_native()
    build = None
    if native_reason is None:
        native = backends.native()
        build = json.loads(native.build_info)
        build["instruction_sets_usable"] = native.usable_instruction_sets()
        build["instruction_set"] = native.instruction_set()
    has_gpu = torch.cuda.is_available()
    triton_reason = backends.why_not_triton("cuda" if has_gpu else "cpu")
    return {
        "versions": {
            "amil_fast": _version("amil_fast"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "opencv": _version("opencv-python") or _version("opencv-python-headless"),
        },
        "devices": {
            "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "cuda": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if has_gpu else [],
        },
        "build": build,
        "backends": {
            "reference": None,
            "cpp": native_reason,
            "triton": triton_reason if has_gpu or triton_reason is None else f"no CUDA device; {triton_reason}",
            "cuda": native_reason or _why_not_cuda(build, has_gpu),
        },
    }


def _why_not_cuda(build, has_gpu):
    if not build["cuda_archs"]:
        return f"the extension was built without CUDA: {build['cuda']}"
    return None if has_gpu else "no CUDA device, or a torch built without CUDA"


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def format_info(values: dict) -> str:
    """Formats :func:`info` as lines of text."""
    lines = []
    for section, content in values.items():
        lines.append(section)
        if content is None:
            lines.append("  none")
            continue
        for key, value in content.items():
            if section == "backends":
                value = "usable" if value is None else f"not usable: {value}"
            elif isinstance(value, list):
                value = ", ".join(value) or "none"
            lines.append(f"  {key:<24}{value if value is not None else 'not installed'}")
    return "\n".join(lines)
