"""Where kernels run: on the current GPU, or interpreted where they are asked for by name."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

from fathom import ops
from fathom.ops.triton.launch import runs


def on_gpu(index, dtype=torch.float32):
    """What `runs` asks of a tensor on a GPU."""
    return SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=index), dtype=dtype)


def test_tensors_on_the_current_gpu_alone_are_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert runs(on_gpu(1), on_gpu(1, torch.bfloat16))
    assert not runs(on_gpu(0)) and not runs(on_gpu(1), on_gpu(0)) and not runs(on_gpu(1, torch.float64)) and not runs(on_gpu(1), torch.zeros(1))


def test_on_cpu_the_interpreter_is_asked_for_by_name():
    assert not runs(torch.zeros(1))
    with ops.using("triton"):
        assert runs(torch.zeros(1)) and not runs(torch.zeros(1, dtype=torch.float64))
    with ops.using("definition"):
        assert not runs(torch.zeros(1))
