"""Selects Triton's interpreter on machines without a CUDA device; must run before the first import of Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
