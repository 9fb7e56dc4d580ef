"""A quicker interpreter of Triton, for the tests of the kernels."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def calls_of_device_functions():
    """Replaces Triton's language for device functions once, not in every call: 40 % of the time (Triton 3.7)."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            language = pytest.importorskip("triton.language")
            from triton.runtime import interpreter

            interpreter._patch_lang(language.sum.fn)  # the language in the module of the standard functions
            patch.setattr(interpreter.InterpretedFunction, "__call__", lambda self, *a, **k: self.rewrite()(*a, **k))
        yield
