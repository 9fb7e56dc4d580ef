"""In-process runs of the command, and a small data set."""

import cv2
import numpy as np
from scipy.io import savemat
from typer.testing import CliRunner

from amil_fast.cli.app import app
from tests.pose.color_finder import GROUND, paint, person

COLOR_FINDER = "tests.pose.color_finder:build"


def amil(*arguments):
    """Runs ``amil ARGUMENTS...``; returns ``exit_code``, ``output`` and ``exception``."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def amil_output(*arguments, code=0):
    """Runs the command, checks its exit code and returns its output with whitespace collapsed."""
    result = amil(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


def small_lsp(root):
    """Writes a data set in LSP's layout for :class:`~tests.pose.color_finder.ColorFinder`; returns its joints."""
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    joints = []
    for i in range(6):
        width, height = (200, 160) if i % 2 else (150, 220)
        joints.append(person(rng, width, height))
        image = paint(np.full((height, width, 3), GROUND[::-1], np.uint8), joints[-1], 5)
        cv2.imwrite(str(root / f"images/im{i + 1:04d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    raw = np.stack(joints).transpose(2, 1, 0)
    savemat(root / "joints.mat", {"joints": np.concatenate([raw, np.zeros((1, 14, 6))])})
    return np.array(joints)
