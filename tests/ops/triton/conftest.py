"""Kernels run under Triton's interpreter (chosen in tests/conftest.py), which is made to count as a GPU does."""

import numpy as np
import pytest
import torch

try:
    from triton.runtime import interpreter
except ImportError:
    interpreter = None  # optional; the tests here are skipped


@pytest.fixture(autouse=True)
def numbers_in_bfloat16(monkeypatch):
    """The interpreter multiplies bfloat16's bits as integers in `tl.dot`, and cuts numbers off to bfloat16: here it does as a GPU does."""
    if interpreter is None:
        return
    builder, float32, bfloat16 = interpreter.InterpreterBuilder, interpreter.tl.float32, interpreter.tl.bfloat16
    dot, truncate = builder.create_dot, builder.create_fp_trunc

    def widened(x):
        return builder.cast_impl(None, x, float32) if x.dtype.scalar == bfloat16 else x

    def rounded(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) != (float32, bfloat16):
            return truncate(self, x, dtype)
        bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, bfloat16)

    monkeypatch.setattr(builder, "create_dot", lambda self, a, b, *others: dot(self, widened(a), widened(b), *others))
    monkeypatch.setattr(builder, "create_fp_trunc", rounded)
