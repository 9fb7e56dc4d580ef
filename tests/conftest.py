"""Environment of all tests; must be set before Triton and Inductor are first imported."""

import os
import tempfile

import torch

# Triton's interpreter on machines without a CUDA device.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Inductor's cache on disk is keyed by the graph, not by the implementation of the operators in it: code compiled by
# another version of the package would be reused.
_inductor_cache = tempfile.TemporaryDirectory(prefix="inductor-", ignore_cleanup_errors=True)
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache.name
