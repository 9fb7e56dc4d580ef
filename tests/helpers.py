"""What several test files share: the measure of error, and bags to test on."""

import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # real data and peers' outputs beside the checkout


def relative_error(actual, truth):
    """``‖actual − truth‖ / ‖truth‖`` in float64, 0 where both are 0; NaN or a different shape fails at once."""
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, truth = actual.detach().double(), truth.detach().double()
    assert not torch.isnan(actual).any(), "NaN"
    difference = torch.linalg.vector_norm(actual - truth).item()
    size = torch.linalg.vector_norm(truth).item()
    return difference / size if size else difference


def assert_as_accurate(actual, reference, truth, factor=2.0, what=""):
    """Asserts that ``actual`` is at most ``factor`` times as far from the float64 ``truth`` as ``reference`` is.

    ``reference`` is the plain PyTorch result in the same dtype as ``actual``. A few units of rounding are granted on
    top, for results where the reference happens to be exact.
    """
    allowed = factor * relative_error(reference, truth) + 8 * torch.finfo(actual.dtype).eps
    error = relative_error(actual, truth)
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


def exit_worker(folder, rank, num_workers=2, timeout=60.0):
    """Ends a process of a gloo process group, after all of them have come this far.

    Gloo's threads can abort a process that destroys its static objects while they run ("terminate called without an
    active exception"), so that the exit code says nothing about the test. ``os._exit`` skips the destructors; the files
    keep a process from leaving while another one still communicates.
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
