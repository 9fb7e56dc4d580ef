"""Benchmark of multiple-instance methods on fixed folds: ``amil mil benchmark``."""

from amil_fast.mil.benchmark.methods import BenchmarkMethod, Predictions
from amil_fast.mil.benchmark.registry import METHODS
from amil_fast.mil.benchmark.runner import load_results, run_benchmark
from amil_fast.mil.benchmark.table import draw, summarize, to_markdown

__all__ = [
    "METHODS",
    "BenchmarkMethod",
    "Predictions",
    "run_benchmark",
    "load_results",
    "summarize",
    "to_markdown",
    "draw",
]
