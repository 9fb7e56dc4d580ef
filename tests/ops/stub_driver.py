"""Triton's launcher over a CUDA driver without a device: the host path of a call runs, the kernels do not.

Kernels are compiled for an H200, loaded and launched by Triton as on a GPU, with CPU tensors as arguments; the driver
underneath (``stub_cuda/cuda.c``) only counts the launches, so that outputs stay uninitialized.
"""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

COMPILER = os.environ.get("CC") or shutil.which("gcc")
CAPABILITY = (9, 0)


def activate(folder):
    """Makes Triton launch through the stub driver, built in ``folder``, in this process; returns the launch counter.

    Call before anything that launches a kernel, without ``TRITON_INTERPRET=1``.
    """
    library = Path(folder) / "libcuda.so.1"
    source = Path(__file__).parent / "stub_cuda" / "cuda.c"
    flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([COMPILER, *flags, source, "-o", library], check=True)
    # Triton finds it by its soname, as it is loaded already.
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_num_launches.restype = ctypes.c_long
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.current_device = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: 0

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from amil_fast.ops import backends

    triton.runtime.driver.set_active(CudaDriver())
    backends.triton_interpreted = lambda: True  # CPU tensors reach the kernels
    return stub.stub_num_launches
