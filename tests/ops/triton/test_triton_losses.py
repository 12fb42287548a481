"""The kernels of cross-entropy and of distillation's divergence against the definition in float64, under Triton's interpreter."""

from functools import partial

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

import torch

from fathom import ops
from fathom.ops import IGNORE
from fathom.ops.triton import losses as kernels
from tests.ops.test_losses import assert_as_defined as as_defined
from tests.ops.test_losses import loss_and_gradients, problem
from tests.ops.test_reverse_kl import assert_as_defined as divergence_as_defined
from tests.ops.test_reverse_kl import problem as two_models
from tests.ops.test_reverse_kl import values_and_gradients


assert_as_defined = partial(as_defined, implementation="triton")


@pytest.mark.parametrize(("N", "V", "ignored"), [
    (1, 1, []), (1, 7, []), (5, 11, [0, 4]), (9, 300, range(8)), (40, 33, range(0, 40, 2))],
    ids=["one class", "one token", "edges ignored", "one target", "every other"])
def test_cross_entropy_is_the_definition(N, V, ignored):
    assert_as_defined(*problem(N, V, ignored=ignored))


@pytest.mark.parametrize("size", [127, 128, 129])
def test_cross_entropy_is_the_definition_at_the_edges_of_tiles(size):
    assert_as_defined(*problem(size, 20, ignored=[0, 2]), weight=-0.3)
    assert_as_defined(*problem(20, size))
    assert_as_defined(*problem(3, 5, W=size))


@pytest.mark.parametrize("V", [128, 256, 257, 513, 640])
def test_chunks_of_the_vocabulary_are_joined(V, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_V", 256)
    assert_as_defined(*problem(6, V, ignored=[1]), weight=0.7)


def test_no_tensor_is_as_large_as_all_logits(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_V", 128)
    largest = 0

    class Recording(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.is_floating_point():  # the interpreter sees bytes too
                largest = max(largest, out.numel())
            return out

    hidden, head, target = problem(150, 512, W=4)
    with Recording():
        loss_and_gradients(hidden, head, target, "triton")
    assert largest == 150 * 128


def test_confident_and_wrong_predictions_keep_their_precision(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_V", 128)
    hidden, head, target = problem(20, 150, size=40.0)
    found = loss_and_gradients(hidden, head, target, "triton")
    assert found[0] > 1000 and all(x.isfinite().all() for x in found)
    assert_as_defined(hidden, head, target)
    assert_as_defined(hidden, head, (hidden @ head.T).argmax(-1))


def test_all_targets_ignored_is_zero_with_zero_gradients():
    for x in loss_and_gradients(*problem(6, 10, ignored=range(6)), "triton"):
        assert x.count_nonzero() == 0


def test_layout_of_hidden_and_head_does_not_matter():
    hidden, head, target = problem(12, 10)
    assert_as_defined(hidden.T.contiguous().T, head.repeat_interleave(2, 0)[::2], target)
    assert_as_defined(hidden[:1].expand(12, -1), head, target)


def test_only_the_gradients_asked_for_are_made(monkeypatch):
    hidden, head, target = problem(12, 10)
    _, *gradients = loss_and_gradients(hidden, head, target, "triton")
    products, multiply = [], kernels._multiply
    monkeypatch.setattr(kernels, "_multiply", lambda *args, **kwargs: products.append(multiply(*args, **kwargs)))
    for only, expected in enumerate(gradients):
        leaves = [hidden.clone(), head.clone()]
        leaves[only].requires_grad_()
        with ops.using("triton"):
            loss = ops.cross_entropy(*leaves, target)
        assert torch.equal(torch.autograd.grad(loss, leaves[only])[0], expected)
        assert len(products) == only + 1


def test_two_runs_give_the_same_bits_and_so_does_a_token_among_others(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_V", 128)
    hidden, head, target = problem(140, 200, W=40)
    first, second = (loss_and_gradients(hidden, head, target, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
    alone = loss_and_gradients(hidden[-1:], head, target[-1:], "triton")
    kept = target.clone()
    kept[:-1] = IGNORE
    assert torch.equal(alone[0], loss_and_gradients(hidden, head, kept, "triton")[0])
    assert torch.equal(alone[1], first[1][-1:])


def test_bfloat16_is_the_definition_but_for_rounding_the_gradients(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_V", 128)
    hidden, head, target = problem(40, 200, W=70, ignored=[3], size=0.2)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    exact = loss_and_gradients(hidden.double(), head.double(), target, "definition")
    fast = loss_and_gradients(hidden, head, target, "triton")
    assert [x.dtype for x in fast] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert (fast[0] - exact[0]).abs() <= 1e-5 * exact[0].abs()
    for expected, actual in zip(exact[1:], fast[1:], strict=True):
        assert (actual - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_what_kernels_do_not_take_is_left_to_the_definition():
    hidden, head, target = problem(3, 4)
    assert ops.cross_entropy.choose(hidden, head, target)[0] == "cpu"  # nobody asked for the interpreter
    with ops.using("triton"):
        assert ops.cross_entropy.choose(hidden.double(), head.double(), target)[0] == "definition"
        assert ops.cross_entropy.choose(hidden.bfloat16(), head, target)[0] == "definition"


@pytest.mark.parametrize("size", [1, 127, 128, 129])
def test_the_divergence_is_the_definition_at_the_edges_of_tiles(size):
    divergence_as_defined(two_models(size, 20, U=5), "triton")
    divergence_as_defined(two_models(5, size), "triton")
    divergence_as_defined(two_models(3, 5, W=size, U=30), "triton")


@pytest.mark.parametrize("V", [256, 257, 520])
def test_the_divergence_joins_chunks_of_the_vocabulary(V, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_V", 256)
    divergence_as_defined(two_models(6, V, U=5), "triton")
    divergence_as_defined(two_models(6, V, size=20.0, seed=3), "triton", 1e-4)


def test_the_divergence_of_equal_models_is_zero_and_gives_the_same_bits_in_any_batch(monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK_V", 128)
    tensors, weight = two_models(140, 200, W=40, U=12)
    first, second = (values_and_gradients(tensors, weight, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
    hidden, head, teacher_hidden, teacher_head = tensors
    alone = values_and_gradients((hidden[-1:], head, teacher_hidden[-1:], teacher_head), weight[-1:], "triton")
    assert torch.equal(alone[0], first[0][-1:]) and torch.equal(alone[1], first[1][-1:])
    assert all(x.abs().max() < 1e-6 for x in values_and_gradients((hidden, head, hidden, head), weight, "triton"))


def test_the_divergence_in_bfloat16_is_the_definition_but_for_rounding_the_gradients():
    tensors, weight = two_models(40, 150, W=70, U=30, size=0.2, dtype=torch.bfloat16)
    exact = values_and_gradients([x.double() for x in tensors], weight, "definition")
    fast = values_and_gradients(tensors, weight, "triton")
    assert [x.dtype for x in fast] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert (fast[0] - exact[0]).abs().max() <= 1e-5
    for expected, actual in zip(exact[1:], fast[1:], strict=True):
        assert (actual - expected).abs().max() <= 2**-6 * expected.abs().max()
    mixed = [x.float() for x in tensors[:2]] + list(tensors[2:])
    assert (values_and_gradients(mixed, weight, "triton")[0] - exact[0]).abs().max() <= 1e-5


def test_the_divergence_leaves_to_the_definition_what_its_kernel_does_not_take():
    tensors, _ = two_models(3, 4)
    with ops.using("triton"):
        assert ops.reverse_kl.choose(*(x[:0] if x.shape[0] == 3 else x for x in tensors))[0] == "definition"
        assert ops.reverse_kl.choose(tensors[0].bfloat16(), *tensors[1:])[0] == "definition"
        assert ops.reverse_kl.choose(*(x.double() for x in tensors))[0] == "definition"
