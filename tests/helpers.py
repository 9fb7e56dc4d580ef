"""Helpers shared by the test modules: error measures, paths, and the exit of distributed workers."""

import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # data sets and reference outputs of other projects, next to the checkout


def relative_error(actual, truth):
    """Returns ``‖actual − truth‖ / ‖truth‖`` in float64 (0 if both are 0); fails on NaN or a shape mismatch."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth = actual.detach().double(), truth.detach().double()
    assert not torch.isnan(actual).any(), "NaN"
    difference = torch.linalg.vector_norm(actual - truth).item()
    size = torch.linalg.vector_norm(truth).item()
    return difference / size if size else difference


def assert_as_accurate(actual, reference, truth, factor=2.0, what=""):
    """Asserts that the error of ``actual`` against the float64 ``truth`` is at most ``factor`` times the reference's.

    ``reference`` is the plain PyTorch result in the dtype of ``actual``. An absolute slack of 8 eps covers results for
    which the reference happens to be exact.
    """
    allowed = factor * relative_error(reference, truth) + 8 * torch.finfo(actual.dtype).eps
    error = relative_error(actual, truth)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


def exit_worker(folder, rank, num_workers=2, timeout=60.0):
    """Terminates a worker of a gloo process group once all workers have reached this call.

    Gloo's threads can abort a process that destroys its static objects while they run ("terminate called without an
    active exception"), which makes the exit code meaningless. ``os._exit`` skips the destructors; the marker files
    keep a worker alive while another one is still communicating.
    """
    folder = Path(folder)
    (folder / f"finished-{rank}").touch()
    deadline = time.monotonic() + timeout
    while any(not (folder / f"finished-{other}").exists() for other in range(num_workers)):
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.01)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
