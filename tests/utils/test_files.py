"""Atomic writes, publication of several files, and JSON errors."""

import math

import pytest

from amil_fast.utils.files import DataError, atomic_path, publish, read_json, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": [1, 2]})
    assert path.read_text() == '{\n  "x": [\n    1,\n    2\n  ]\n}\n'

    def fail(partial):
        partial.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), atomic_path(path) as partial:
        assert partial.suffix == ".json" and partial.parent == tmp_path
        fail(partial)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, math.nan)
    assert read_json(path) == {"x": [1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_long_file_names(tmp_path):
    path = tmp_path / ("n" * 250 + ".txt")
    write_text(path, "é")
    assert path.read_bytes() == "é".encode()


def test_publish_replaces_all_files_or_none(tmp_path):
    def write(folder, text):
        for name in ("a", "b"):
            (folder / name).write_text(text)

    publish(tmp_path / "out", lambda folder: write(folder, "old"))
    (tmp_path / "out" / "other").write_text("kept")

    def interrupted(folder):
        write(folder, "new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "out", interrupted)
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {"a": "old", "b": "old", "other": "kept"}
    publish(tmp_path / "out", lambda folder: write(folder, "new"))
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {"a": "new", "b": "new", "other": "kept"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "expected a JSON file"),
        (b"\xff\xfe\x00", "expected a JSON file"),
        (b"[" * 100_000, "expected a JSON file"),
    ],
)
def test_read_json_names_the_file(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json: {message}"):
        read_json(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_json(tmp_path)
