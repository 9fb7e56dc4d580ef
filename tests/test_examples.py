"""The examples and the code blocks of README and documentation run and print what they promise."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch

import amil_fast
from tests.helpers import ROOT

# Script -> pattern of a printed figure and the least value that shows that it works.
EXAMPLES = {
    "pool_in_your_network.py": (r"accuracy on 500 new bags: ([\d.]+)", 0.95),
    "own_features.py": (r"AUC on 30 test slides: ([\d.]+)", 0.9),
    "train_bag_classifier.py": (r"key instance in (\d+) of 200 positive bags", 160),
}


def run(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_learns(name):
    pattern, least = EXAMPLES[name]
    assert float(re.search(pattern, run(f"examples/{name}"))[1]) >= least


def test_example_decodes():
    lines = re.findall(r"refine='(\w+)': mean error ([\d.]+) image pixels", run("examples/decode_any_heatmaps.py"))
    errors = {refine: float(error) for refine, error in lines}
    assert errors["dark"] < 0.2 < errors["quarter"] < errors["none"]


def test_every_example_is_tested():
    assert {p.name for p in (ROOT / "examples").glob("*.py")} == {*EXAMPLES, "decode_any_heatmaps.py"}


@pytest.mark.parametrize(("page", "printed"), [("README.md", 2), ("docs/quickstart.md", 3)])
def test_code_blocks_run(page, printed):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    runnable = [block for block in blocks if block.startswith("import ")]
    lines = [line for block in runnable for line in run("-c", block).splitlines()]
    assert len(runnable) == 2 and len(lines) == printed
    assert "False" not in "".join(lines) and "Error" not in "".join(lines)


def test_equivalents_in_readme_are_equivalent():
    """The plain PyTorch code shown for each of the two functions gives the same results."""
    text = (ROOT / "README.md").read_text()
    generator = torch.Generator().manual_seed(0)

    B, N = 3, 7
    mask = torch.arange(N) < torch.tensor([[7], [4], [1]])
    names = {"torch": torch, "B": B, "N": N, "num_iters": 3, "mask": mask}
    names["instances"] = torch.randn(B, N, 5, generator=generator)
    exec(re.search(r"```python\n(b = .*?)```", text, re.DOTALL)[1], names)
    torch.testing.assert_close(names["bag"], amil_fast.adjust_pool(names["instances"], mask))

    names = {"torch": torch, "W": 6, "heatmaps": torch.rand(2, 4, 5, 6, generator=generator)}
    exec(re.search(r"`(scores, index = .*?)`", text)[1], names)
    coords, scores = amil_fast.decode_heatmaps(names["heatmaps"])
    assert torch.equal(names["coords"].float(), coords) and torch.equal(names["scores"], scores)


def test_signatures_in_readme_have_the_real_defaults():
    text = (ROOT / "README.md").read_text()
    for function in (amil_fast.adjust_pool, amil_fast.decode_heatmaps):
        shown = re.search(rf"= amil_fast\.{function.__name__}\((\w+, [^)]*backend=[^)]*)\)\n", text)[1]
        parameters = [part.strip() for part in shown.replace("\n", " ").split(",") if part.strip() != "*"]
        real = [
            name if p.default is p.empty else f"{name}={p.default!r}".replace("'", '"')
            for name, p in inspect.signature(function).parameters.items()
        ]
        assert parameters == real
