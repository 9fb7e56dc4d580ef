"""Structure of MATLAB files: the variables that SciPy reads, and damages that make it crash."""

import io
import struct

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from amil_fast.pose.data import DataError
from amil_fast.pose.data.files import read_mat
from amil_fast.pose.data.mat_check import check_mat

CONTENT = {
    "numbers": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "complex": np.array([1 + 2j, 3]),
    "text": "some text, ä",
    "flags": np.array([True, False]),
    "structure": {"a": 1.5, "b": {"c": np.array([[1, 2]]), "d": "x"}, "empty": np.empty((0, 0))},
    "cells": np.array([[1.0, "two", np.arange(3)]], dtype=object),
}


def mat(compressed=False, version="5", content=CONTENT):
    file = io.BytesIO()
    savemat(file, content, do_compression=compressed, format=version)
    return file.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_good_files(tmp_path, compressed):
    data = mat(compressed)
    assert check_mat(data, CONTENT) == list(CONTENT)
    (tmp_path / "a.mat").write_bytes(data)
    found, expected = read_mat(tmp_path / "a.mat", "numbers", "cells"), loadmat(io.BytesIO(data))
    assert (found["numbers"] == expected["numbers"]).all() and "text" not in found
    assert [str(cell) for cell in found["cells"][0]] == [str(cell) for cell in expected["cells"][0]]


def test_version_4(tmp_path):
    content = {"a": np.arange(6.0).reshape(2, 3), "b": "text"}
    data = mat(version="4", content=content)
    assert check_mat(data, content) == ["a", "b"]
    (tmp_path / "a.mat").write_bytes(data)
    assert (read_mat(tmp_path / "a.mat", "a")["a"] == content["a"]).all()
    rows = struct.pack("<i", -2)  # a negative size moves SciPy's position backwards
    (tmp_path / "a.mat").write_bytes(data[:4] + rows + data[8:])
    with pytest.raises(DataError, match=r"a\.mat: expected a MATLAB file: a header with invalid sizes"):
        read_mat(tmp_path / "a.mat", "a")


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (128, 99, "type 99 of a variable"),
        (132, 1 << 30, "an element of 1073741824 bytes"),
        (136, 7, "type 7 of 8 bytes for sizes"),
        (160, 1 << 30, "bytes for"),  # an axis
        (192, 200, "type 200 of values"),  # beyond SciPy's table of types: a segmentation fault
        (192, 8, "type 8 of values"),
        (196, 90, "90 bytes for 24 values"),
    ],
)
def test_damaged_elements(tmp_path, position, value, message):
    data = bytearray(mat(content={"numbers": CONTENT["numbers"]}))
    data[position : position + 4] = struct.pack("<I", value)
    (tmp_path / "a.mat").write_bytes(data)
    with pytest.raises(DataError, match=f"a.mat: expected a MATLAB file: .*{message}"):
        read_mat(tmp_path / "a.mat", "numbers")


def test_nesting_and_compression_are_bounded(tmp_path, monkeypatch):
    nested = np.zeros(1)
    for _ in range(40):
        cell = np.empty((1, 1), object)
        cell[0, 0] = nested
        nested = cell
    (tmp_path / "a.mat").write_bytes(mat(content={"x": nested}))
    with pytest.raises(DataError, match="nested deeper than 32"):
        read_mat(tmp_path / "a.mat", "x")
    monkeypatch.setattr("amil_fast.pose.data.mat_check.MAX_BYTES", 1 << 20)
    (tmp_path / "a.mat").write_bytes(mat(compressed=True, content={"x": np.zeros(1 << 20)}))
    with pytest.raises(DataError, match="too large compressed variable"):
        read_mat(tmp_path / "a.mat", "x")


def test_other_classes_are_refused_only_if_wanted(tmp_path):
    from scipy.sparse import eye

    (tmp_path / "a.mat").write_bytes(mat(content={"s": eye(3, format="csc"), "x": np.ones(3)}))
    assert read_mat(tmp_path / "a.mat", "x")["x"].sum() == 3
    with pytest.raises(DataError, match="got a sparse matrix, an object or a function"):
        read_mat(tmp_path / "a.mat", "s")
