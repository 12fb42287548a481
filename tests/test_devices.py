"""Devices by name, and a model that computes on a device for which nothing here was written: loss, gradients, prefill, decoding, the engine."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fathom.devices import finish, use_device
from fathom.errors import InputError

STRICT = """
import torch
from tests.elsewhere import DEVICE, Elsewhere, elsewhere
with elsewhere() as device:
    x = torch.arange(4, device=device)
    assert isinstance(x, Elsewhere) and x.device == DEVICE and (x + 1).tolist() == [1, 2, 3, 4] and x[torch.tensor([1])].inner.tolist() == [1]
    assert x.cpu().tolist() == [0, 1, 2, 3] and not isinstance(x.cpu(), Elsewhere)
    x + torch.arange(4)
"""


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("case", ["training", "updates", "policy", "inference", "quantized", "engine"])
def test_another_device_computes_what_the_definitions_do(case):
    done = python("-m", "tests.elsewhere", case)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr[-3000:]


def test_the_device_that_is_not_there_is_strict():
    done = python("-c", STRICT)
    assert done.returncode == 1 and "a tensor of the CPU, (4,), beside one of the device" in done.stderr, done.stderr


def test_devices_by_name(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: chosen.append("waited"))
    assert [str(use_device(name)) for name in ("cpu", "xpu", "auto", "xpu:0", "xpu:1")] == ["cpu", "xpu:1", "xpu:1", "xpu:0", "xpu:1"] and chosen == [0, 1]
    finish()
    assert chosen == [0, 1, "waited"]
    for name in ("cuda", "xpu:2", "", "cpu:0"):
        with pytest.raises(InputError, match=f"^device is '{name}'; here are: cpu, xpu:0, xpu:1$"):
            use_device(name)


def test_without_an_accelerator_there_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert use_device("cpu") == use_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match="^device is 'cuda'; here are: cpu$"):
        use_device("cuda")
