"""NumPy and safetensors files: headers that claim more than the file holds, and damaged entries."""

import io
import os
import resource
import zipfile

import numpy as np
import pytest
import torch

from amil_fast.utils.files import DataError, check_version, open_regular, parse_json
from amil_fast.utils.numpy_files import read_npy, read_npz
from amil_fast.utils.tensor_files import read_tensors, tensor_shapes, write_tensors


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.zeros((0, 3), bool), np.array(7), np.ones((3, 2)).T]
)
def test_arrays_are_read_as_by_numpy(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", x=array, y=array * 2)
    np.savez_compressed(tmp_path / "b.npz", x=array)
    found = [read_npy(tmp_path / "a.npy"), read_npz(tmp_path / "a.npz")["x"], read_npz(tmp_path / "b.npz", ["x"])["x"]]
    for each in found:
        assert each.dtype == array.dtype and each.shape == array.shape and (each == array).all()


def claim(shape):
    """An ``.npy`` file of 64 bytes of values that claims a shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(64)


@pytest.mark.parametrize("shape", [(10**9,), (2**40, 2**40), (-1,), (9,)])
def test_memory_is_not_allocated_for_a_false_header(tmp_path, shape):
    (tmp_path / "a.npy").write_bytes(claim(shape))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", claim(shape))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: read_npy(tmp_path / "a.npy"), lambda: read_npz(tmp_path / "a.npz")):
        with pytest.raises(DataError, match=r"a\.np[yz]: .*(shape .* in 192 bytes|got shape|64 of 72 bytes)"):
            read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


def test_objects_and_text_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match="an array of Python objects"):
        read_npy(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array(["a"]))
    with pytest.raises(DataError, match="dtype <U1"):
        read_npy(tmp_path / "a.npy")


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read in (read_npy, read_npz, read_tensors, tensor_shapes):
        with pytest.raises(DataError, match="pipe: cannot be read: not a regular file"):
            read(tmp_path / "pipe")
    with pytest.raises(DataError, match="no such video"), open_regular(tmp_path / "a", "video"):
        pass


def test_tensors(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.ones(2, 3).T}, {"note": "n"})
    tensors, metadata = read_tensors(tmp_path / "a")
    assert tensors["x"].shape == (3, 2) and metadata == {"note": "n"}
    assert tensor_shapes(tmp_path / "a") == {"x": (3, 2)}
    with pytest.raises(OSError, match="No such file"):
        write_tensors(tmp_path / "no/a", {"x": torch.ones(2)})


@pytest.mark.parametrize("text", ["1" + "0" * 400, "[9223372036854775808]", '{"a": -9223372036854775809}', "[" * 10**5])
def test_json_beyond_the_bounds(text):
    for each in (text, text.encode()):
        with pytest.raises(DataError, match="x: expected a JSON file"):
            parse_json(each, "x")
    assert parse_json("[9223372036854775807, 0.12345678901234567890]", "x")[0] == 2**63 - 1


@pytest.mark.parametrize("version", ["1", None, True, 1.0, -1, [1], 2])
def test_versions(version):
    check_version(1, 1, "x")
    with pytest.raises(DataError, match="x: version: expected"):
        check_version(version, 1, "x")
