"""Triton's launcher over a CUDA driver without a device: the host path of a call runs, the kernels do not.

Kernels are compiled for an H200, loaded and launched by Triton as on a GPU, with CPU tensors as arguments; the driver
underneath (``stub_cuda/cuda.c``) only counts the launches, so that outputs stay uninitialized.
"""

import ctypes
import functools
import importlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

COMPILER = os.environ.get("CC") or shutil.which("gcc")
CAPABILITY = (9, 0)


def activate(folder, log=None):
    """Makes Triton launch through the stub driver, built in ``folder``, in this process; returns the launch counter.

    ``log``: a list to which every launch appends ``(kernel, grid, arguments)``, pointers as addresses. Call before
    anything that launches a kernel, without ``TRITON_INTERPRET=1``. ``backend="auto"`` selects the Triton kernels then.
    """
    library = Path(folder) / "libcuda.so.1"
    source = Path(__file__).parent / "stub_cuda" / "cuda.c"
    flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([COMPILER, *flags, source, "-o", library], check=True)
    library.with_name("libcuda.so").symlink_to(library)
    # Triton links against it there, and finds it loaded by its soname.
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_num_launches.restype = ctypes.c_long
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.current_device = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: 0

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    if log is not None:
        driver.launcher_cls = functools.partial(LoggingLauncher, driver.launcher_cls, log)
    triton.runtime.driver.set_active(driver)
    importlib.import_module("amil_fast.ops.adjust_pool").SUPPORTED["auto"] = lambda device: "triton"
    return stub.stub_num_launches


class LoggingLauncher:
    """Triton's launcher of one compiled kernel, and a log of its launches."""

    def __init__(self, launcher, log, source, metadata):
        self.launch, self.log, self.name = launcher(source, metadata), log, metadata.name

    def __call__(self, *arguments):
        grid, kernel_arguments = arguments[:3], arguments[9:]
        values = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in kernel_arguments]
        self.log.append((self.name, grid, values))
        self.launch(*arguments)
