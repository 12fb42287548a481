"""Losses: definitions against formulas and their gradients, and the chunked cross-entropy against its definition."""

import math

import pytest
import torch

from fathom import ops
from fathom.ops import IGNORE
from fathom.ops.cpu import losses as cpu_losses


def problem(N, V, W=8, ignored=(), seed=0, size=1.0):
    """hidden [N, W], head [V, W], target [N] with `ignored` positions left out."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(N, W, generator=generator), torch.randn(V, W, generator=generator) * size
    target = torch.randint(0, V, (N,), generator=generator)
    target[list(ignored)] = IGNORE
    return hidden, head, target


def loss_and_gradients(hidden, head, target, implementation, weight=1.0):
    leaves = [x.detach().requires_grad_() for x in (hidden, head)]
    with ops.using(implementation):
        assert ops.cross_entropy.choose(*leaves, target)[0] == implementation
        loss = ops.cross_entropy(*leaves, target)
    return [loss, *torch.autograd.grad(loss * weight, leaves)]


def assert_as_defined(hidden, head, target, weight=1.0, implementation="cpu"):
    """An implementation in float32 against the definition in float64."""
    exact = loss_and_gradients(hidden.double(), head.double(), target, "definition", weight)
    fast = loss_and_gradients(hidden, head, target, implementation, weight)
    for expected, actual in zip(exact, fast, strict=True):
        assert actual.shape == expected.shape and actual.dtype == torch.float32
        assert (actual - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max())


@pytest.mark.parametrize(("N", "V", "ignored"), [
    (1, 1, []), (1, 7, []), (5, 11, [0, 4]), (9, 300, range(8)), (40, 33, range(0, 40, 2))],
    ids=["one class", "one token", "edges ignored", "one target", "every other"])
def test_cross_entropy_on_cpu_is_the_definition(N, V, ignored):
    assert_as_defined(*problem(N, V, ignored=ignored))


@pytest.mark.parametrize("N", [63, 64, 65, 128, 200])
def test_cross_entropy_on_cpu_is_the_definition_at_the_edges_of_chunks(N, monkeypatch):
    monkeypatch.setattr(cpu_losses, "_CHUNK_LOGITS", 50)  # chunks of _MIN_TOKENS = 64
    assert_as_defined(*problem(N, 50, ignored=[0, 2]))
    assert_as_defined(*problem(N, 50), weight=-0.3)


def test_cross_entropy_in_several_chunks_never_holds_all_logits(monkeypatch):
    widest = 0
    softmax = torch.Tensor.softmax

    def recording(x, dim):
        nonlocal widest
        widest = max(widest, x.numel())
        return softmax(x, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", recording)
    hidden, head, target = problem(2100, 2048)
    assert_as_defined(hidden, head, target)
    assert widest == cpu_losses._CHUNK_LOGITS


def test_confident_and_wrong_predictions_keep_their_precision():
    hidden, head, target = problem(20, 30, size=40.0)
    exact = loss_and_gradients(hidden, head, target, "cpu")
    assert exact[0] > 1000 and all(x.isfinite().all() for x in exact)
    assert_as_defined(hidden, head, target)
    assert_as_defined(hidden, head, (hidden @ head.T).argmax(-1))


@pytest.mark.parametrize("implementation", ["definition", "cpu"])
def test_all_targets_ignored_is_zero_with_zero_gradients(implementation):
    for x in loss_and_gradients(*problem(6, 10, ignored=range(6)), implementation):
        assert x.count_nonzero() == 0


def test_layout_of_hidden_and_head_does_not_matter():
    hidden, head, target = problem(12, 10)
    assert_as_defined(hidden.T.contiguous().T, head.repeat_interleave(2, 0)[::2], target)
    assert_as_defined(hidden[:1].expand(12, -1), head, target)


def test_only_the_gradients_asked_for_are_made():
    hidden, head, target = problem(12, 10)
    _, hidden_grad, head_grad = loss_and_gradients(hidden, head, target, "cpu")
    for only, expected in ((0, hidden_grad), (1, head_grad)):
        leaves = [hidden.clone(), head.clone()]
        leaves[only].requires_grad_()
        loss = ops.cross_entropy(*leaves, target)
        assert [x is None for x in loss.grad_fn.saved_tensors] == [only != 0, only != 1]
        assert torch.equal(torch.autograd.grad(loss, leaves[only])[0], expected)


def test_loss_without_gradients_is_the_same_number():
    hidden, head, target = problem(300, 50)
    expected = loss_and_gradients(hidden, head, target, "cpu")[0]
    assert torch.equal(ops.cross_entropy(hidden, head, target), expected)
    with torch.no_grad():
        loss = ops.cross_entropy(hidden.requires_grad_(), head.requires_grad_(), target)
    assert torch.equal(loss, expected) and not loss.requires_grad


def test_two_runs_give_the_same_bits():
    first, second = (loss_and_gradients(*problem(700, 2048, W=32), "cpu") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_float64_uses_the_definition():
    hidden, head, target = problem(3, 4)
    assert ops.cross_entropy.choose(hidden.double(), head.double(), target)[0] == "definition"


def test_bfloat16_is_widened_first():
    hidden, head, target = problem(300, 50)
    narrow = loss_and_gradients(hidden.bfloat16(), head.bfloat16(), target, "cpu")
    wide = loss_and_gradients(hidden.bfloat16().float(), head.bfloat16().float(), target, "cpu")
    assert torch.equal(narrow[0], wide[0]) and all(x.dtype == torch.bfloat16 and torch.equal(x, y.bfloat16()) for x, y in zip(narrow[1:], wide[1:], strict=True))


def test_cross_entropy_is_the_sum_of_surprises_of_kept_targets():
    hidden, head, target = problem(5, 7, ignored=[1, 3])
    log_share = (hidden @ head.T).softmax(-1).log()
    expected = -sum(log_share[n, target[n]] for n in (0, 2, 4))
    for implementation in ("definition", "cpu"):
        with ops.using(implementation):
            torch.testing.assert_close(ops.cross_entropy(hidden, head, target), expected)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_definitions_have_the_gradients_of_their_values():
    check = torch.autograd.gradcheck
    target = torch.tensor([2, IGNORE, 0, 4])
    assert check(lambda h, w: ops.cross_entropy.definition(h, w, target),
                 (random(4, 3).requires_grad_(), random(5, 3, seed=1).requires_grad_()))
    score = (random(2, 3, 4).abs() + 0.1).requires_grad_()
    counted = torch.tensor([[True, True, False], [True, True, True]])
    chosen = score.detach().topk(2).indices
    assert check(lambda s: ops.sequence_balance.definition(s, chosen, counted), (score,))
    attended = torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]]], dtype=torch.bool)
    mass = random(1, 3, 4, seed=2).abs()
    assert check(lambda s: ops.index_divergence.definition(s, mass, attended),
                 (random(1, 3, 4, seed=3).requires_grad_(),))


def test_sequence_balance_is_one_for_balanced_routing_and_grows_to_experts_over_chosen():
    S, E, K = 12, 4, 2
    counted = torch.ones(2, S, dtype=torch.bool)
    balanced = (torch.arange(S)[:, None] * K + torch.arange(K)) % E
    even = torch.ones(2, S, E)
    torch.testing.assert_close(ops.sequence_balance(even, balanced.expand(2, S, K), counted), torch.tensor(1.0))
    collapsed = torch.tensor([0, 1]).expand(2, S, K)
    torch.testing.assert_close(ops.sequence_balance(even, collapsed, counted), torch.tensor(1.0))
    certain = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(2, S, E)
    torch.testing.assert_close(ops.sequence_balance(certain, collapsed, counted), torch.tensor(E / K))
    leaning = torch.tensor([1.0, 1.0, 0.5, 0.5]).expand(2, S, E)
    assert 1 < ops.sequence_balance(leaning, collapsed, counted) < E / K


def test_sequence_balance_does_not_count_padding():
    score, counted = random(2, 6, 4).abs() + 0.1, torch.ones(2, 6, dtype=torch.bool)
    chosen = score.topk(2).indices
    expected = ops.sequence_balance(score[:, :4], chosen[:, :4], counted[:, :4])
    counted[:, 4:] = False
    torch.testing.assert_close(ops.sequence_balance(score, chosen, counted), expected)


def test_index_divergence_is_zero_where_the_scores_are_the_masses_shares():
    mass = random(2, 5, 7).abs() + 0.1
    attended = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.7
    matching = (3 * mass).log() + 5  # softmax does not see the constants
    torch.testing.assert_close(ops.index_divergence(matching, mass, attended), torch.zeros((), dtype=torch.float64))
    assert ops.index_divergence(-matching, mass, attended) > 0.1


def test_index_divergence_is_the_mean_over_queries_that_read():
    score, mass = random(1, 3, 2, seed=1), torch.tensor([[[3.0, 1.0], [5.0, 5.0], [0.0, 0.0]]], dtype=torch.float64)
    attended = torch.tensor([[[True, True], [False, False], [True, True]]])
    share = score[0, 0].softmax(0)
    expected = 0.75 * math.log(0.75 / share[0]) + 0.25 * math.log(0.25 / share[1])
    assert math.isclose(ops.index_divergence(score, mass, attended), expected, rel_tol=1e-12)
    score.requires_grad_()
    gradient, = torch.autograd.grad(ops.index_divergence(score, mass, attended), score)
    assert gradient[0, 0].count_nonzero() == 2 and gradient[0, 1:].count_nonzero() == 0
    nobody = torch.zeros_like(attended)
    assert ops.index_divergence(score, mass, nobody) == 0
