"""Machine information in the JSON files of pytest-benchmark."""

import os
import platform

import torch


def pytest_benchmark_update_machine_info(config, machine_info):
    """Keeps hardware and versions only; no host names."""
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        cpu=cpu.get("brand_raw", platform.processor()),
        cores=os.cpu_count(),
        torch=torch.__version__,
        torch_threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        python=platform.python_version(),
        system=platform.system(),
    )
