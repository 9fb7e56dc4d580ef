"""The fuzzer of the file readers: a short run, and that it sees each kind of failure."""

import os
import random
import subprocess
import sys
from pathlib import Path

from tests.fuzz.files import mutate
from tests.helpers import ROOT


def fuzz(code, mutations):
    """Runs the fuzzer, a process of its own without threads, after ``code``."""
    code = (
        f"import sys; from tests.fuzz import files; {code}; sys.argv[1:] = ['--mutations', '{mutations}']; files.main()"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_readers_of_all_formats():
    run = fuzz("pass", 136)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "136 mutations of 17 formats: 0 failures" in run.stdout


def test_failures_are_seen():
    """Readers that fail for every mutated file, each in its own way."""
    plants = {
        "{}['x']": "KeyError: 'x'",
        "int('x')": "ValueError: invalid literal",  # an expected type, but without the name of the file
        "files.os.kill(files.os.getpid(), 11)": "ended by SIGSEGV",
        "bytearray(3 << 30)": "MemoryError",
        "files.signal.alarm(1) and all(iter(lambda: True, 0))": "no end in 20 s",
    }
    write = "lambda root: (root / 'a.json').write_bytes(b'good')"
    formats = ", ".join(
        f"{str(number)!r}: ({write}, lambda path: path.read_bytes() == b'good' or {reader})"
        for number, reader in enumerate(plants)
    )
    plant = f"files.FORMATS.clear(); files.FORMATS.update({{{formats}}}); files.mutate = lambda *_: b'bad'"
    run = fuzz(plant, len(plants))
    assert run.returncode == 1 and f"{len(plants)} failures" in run.stdout, run.stdout + run.stderr
    for number, message in enumerate(plants.values()):
        assert f"{number}, a.json: " in run.stdout and message in run.stdout


def test_equal_seeds_give_equal_mutations():
    data = Path(__file__).read_bytes()
    first, second = ([mutate(data, ".npz", random.Random(seed)) for _ in range(3)] for seed in (5, 5))
    assert first == second and mutate(data, ".npz", random.Random(6)) != first[0]
