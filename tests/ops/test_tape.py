"""Tapes: a step runs again on what its inputs hold now, operators and kernels alike, and one that would have looked at a number is refused."""

import subprocess
import sys
import threading

import pytest
import torch

from fathom import ops
from fathom.ops.native.library import library
from fathom.ops.tape import Tape, Unrecordable


def scattered(x, y):
    kept = torch.zeros(5, 3)
    kept.scatter_(0, torch.arange(3)[None].flip(1), x[:1])
    kept[:, 1] += y[0, :5]
    return kept


STEPS = {
    "results written in place": lambda x, y: (x + y[:, :3]) * 2 - x.sin(),
    "another dtype and a copy": lambda x, y: x.bfloat16().float().t().contiguous() + x.clone().t(),
    "views of what is made": lambda x, y: (x * 2)[1:].unflatten(1, (1, 3)).transpose(0, 1).reshape(-1),
    "several results": lambda x, y: (lambda values, places: values + places)(*y.topk(2)),
    "zeros that are filled": lambda x, y: scattered(x * 1, y),
    "without a form that writes": lambda x, y: torch.nn.functional.pad(x, (1, 1)).expand(2, -1, -1).flatten() + len(y),
    "an index": lambda x, y: y[(y[:, 0] * 0).long(), torch.arange(4)] + torch.ones_like(y[0, :4]),
    "nothing": lambda x, y: x[:0] + 1,
    "complex turns": lambda x, y: torch.view_as_real(torch.complex(x.cos(), x.sin())),
}


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, generator=generator), torch.randn(4, 6, generator=generator)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_runs_again_on_what_its_inputs_hold(name):
    with torch.inference_mode():
        given = inputs(0)
        with Tape() as tape:
            out = STEPS[name](*given)
        for seed in (1, 2):
            for place, new in zip(given, inputs(seed), strict=True):
                place.copy_(new)
            tape.replay()
            assert torch.equal(out, STEPS[name](*inputs(seed)))


@pytest.mark.parametrize("asks", [lambda x: x[x > 0], lambda x: float(x.sum()), lambda x: x.nonzero(), lambda x: x.repeat_interleave((x[:, 0] > 0).long(), 0),
                                  lambda x: x.index_put((x > 0,), torch.tensor(1.0)), lambda x: bool((x > 0).all()), lambda x: (x > 0).long().flatten().bincount()])
def test_a_step_that_asks_for_a_number_is_refused(asks):
    with torch.inference_mode(), pytest.raises(Unrecordable, match="asks for a number"), Tape():
        asks(inputs(0)[0])


def test_a_tape_keeps_no_more_than_it_may():
    with torch.inference_mode():
        with Tape(400):
            torch.ones(50) + 1
        with pytest.raises(Unrecordable, match="too large"), Tape(399):
            torch.ones(50) + 1


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
def test_kernels_of_this_thread_are_recorded_and_no_others():
    x, matrix = torch.randn(2, 64), torch.randn(96, 64)
    plain = library().fathom_linear
    with torch.inference_mode():
        with Tape() as tape:
            assert library().fathom_linear is not plain
            other = threading.Thread(target=torch.inference_mode()(lambda: ops.linear(x, matrix)))
            other.start()
            other.join()
            out = ops.linear(x, matrix)
        assert library().fathom_linear is plain
        assert [call[0] for call in tape._calls] == [plain]
        x.copy_(torch.randn(2, 64))
        tape.replay()
        assert torch.equal(out, ops.linear(x, matrix))
        with pytest.raises(ZeroDivisionError), Tape():
            1 / 0
        assert library().fathom_linear is plain


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
def test_a_kernel_that_refuses_at_a_replay_is_heard():
    expert_NK, matrices = torch.zeros(1, 2, dtype=torch.int64), [torch.randn(4, 16, 16) for _ in range(3)]
    with torch.inference_mode():
        with Tape() as tape:
            ops.routed_experts(torch.randn(1, 16), expert_NK, torch.ones(1, 2), *matrices, 2.0)
        tape.replay()
        expert_NK[0, 1] = 4
        with pytest.raises(Unrecordable, match="experts_in answers otherwise"):
            tape.replay()


def test_torchs_compiler_stays_out_of_it():
    """It takes a second and 150 MB to load, which the first token of a server would wait for."""
    program = """
import sys, torch
from fathom.ops.tape import Tape
x = torch.ones(3)
with torch.inference_mode():
    with Tape() as tape:
        y = x + 1
    x.fill_(2)
    tape.replay()
print(y.sum().item(), "torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split() == ["9.0", "False"]
