"""Losses against computations from scratch in float64: values, and gradients by hand or by finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from fathom.align import losses
from fathom.align.losses import Kept, Policy, advantages, policy_loss, token_log_probabilities


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 40)


def case(seed, lengths=(3, 1, 5, 2), vocabulary=7, width=4):
    generator = torch.Generator().manual_seed(seed)
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    N, U = sum(lengths), len(lengths)
    return dict(hidden=normal(N, width), head=normal(vocabulary, width), target=torch.randint(vocabulary, (N,), generator=generator),
                sample=torch.repeat_interleave(torch.arange(U), torch.tensor(lengths)), advantage=normal(U),
                weight=torch.rand(U, generator=generator, dtype=torch.float64), old=normal(N) * 0.4 - 2, ref=normal(N) * 0.3 - 2)


def by_hand(logs, old, ref, advantage, weight, sample, clip, kl, drift):
    """The objective and its gradient with respect to the log-probabilities, one token at a time, in plain Python."""
    value, gradient = 0.0, [0.0] * len(logs)
    for number, (A, w) in enumerate(zip(advantage, weight, strict=True)):
        places = [n for n, which in enumerate(sample) if which == number]
        kept = not (A < 0 and sum(old[n] - logs[n] for n in places) / len(places) > drift)
        for n in places:
            ratio = math.exp(logs[n] - old[n])
            inside = min(max(ratio, 1 - clip), 1 + clip)
            gain, slope = (ratio * A, ratio * A) if ratio * A <= inside * A else (inside * A, 0.0)
            x = ref[n] - logs[n]
            k3 = math.exp(x) - x - 1
            divergence, pull = ratio * k3, ratio * k3 + ratio * (1 - math.exp(x))
            value -= w / len(places) * (gain * kept - kl * divergence)
            gradient[n] = -w / len(places) * (slope * kept - kl * pull)
    return value, gradient


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("clip, kl, drift", [(0.2, 0.0, 9.0), (0.1, 0.5, 0.1), (3.0, 0.01, 0.3)])
def test_the_policy_loss_and_its_gradient_are_those_computed_by_hand(seed, clip, kl, drift):
    c = case(seed)
    logs = (torch.randn(len(c["old"]), generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64) * 0.4 - 2).requires_grad_()
    found = policy_loss(logs, c["old"], c["ref"], c["advantage"], c["weight"], c["sample"], Policy(clip, kl, drift))
    (gradient,) = torch.autograd.grad(found.total, logs)
    value, expected = by_hand(*(c[name].tolist() if name else logs.tolist() for name in (
        "", "old", "ref", "advantage", "weight", "sample")), clip, kl, drift)
    assert float(found.total.detach()) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def test_clipping_and_drift_are_counted():
    logs = torch.tensor([0.0, 0.0, -3.0, -3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = policy_loss(logs, old, None, torch.tensor([1.0, -1.0], dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64),
                        torch.tensor([0, 0, 1, 1]), Policy(clip=0.2, drift=1.0))
    found.total.backward()
    assert found.parts["drifted_share"] == 0.5 and found.parts["clip_share"] == pytest.approx(0.25)
    assert logs.grad.tolist() == [0.0, -0.25, 0.0, 0.0]  # clipped; half of the sample's half; left out twice


def test_the_whole_chain_from_hidden_states_agrees_with_finite_differences():
    c = case(3)

    def loss(hidden, head):
        logs, _ = token_log_probabilities(hidden, head, c["target"], temperature=0.7)
        return policy_loss(logs, logs.detach() - 0.05, c["ref"], c["advantage"], c["weight"], c["sample"], Policy(0.2, 0.1)).total

    old = token_log_probabilities(c["hidden"], c["head"], c["target"], 0.7)[0] - 0.05  # constant, unlike above

    def constant(hidden, head):
        logs, _ = token_log_probabilities(hidden, head, c["target"], temperature=0.7)
        return policy_loss(logs, old, c["ref"], c["advantage"], c["weight"], c["sample"], Policy(0.2, 0.1)).total

    inputs = c["hidden"].requires_grad_(), c["head"].requires_grad_()
    assert gradcheck(constant, inputs)
    for one, other in zip(torch.autograd.grad(loss(*inputs), inputs), torch.autograd.grad(constant(*inputs), inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_the_divergence_is_unbiased_off_policy_in_value_and_gradient():
    generator = torch.Generator().manual_seed(1)
    logits, old_logits, ref_logits = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    logs, old, ref = (x.log_softmax(-1) for x in (logits, old_logits, ref_logits))
    exact = (logs.exp() * (logs - ref)).sum()
    # The expectation over samples of the old policy, taken exactly: each token as a sample of its own, weighted by old.
    found = policy_loss(logs, old, ref, torch.zeros(6, dtype=torch.float64), old.exp(), torch.arange(6), Policy(kl=1.0)).total
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, exact)))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_and_entropies_are_those_of_the_whole_softmax(temperature):
    c = case(0)
    logs, entropy = token_log_probabilities(c["hidden"], c["head"], c["target"], temperature)
    whole = (c["hidden"] @ c["head"].T / temperature).softmax(-1)
    torch.testing.assert_close(logs, whole[torch.arange(len(logs)), c["target"]].log())
    torch.testing.assert_close(entropy, -(whole * whole.log()).sum(-1))


def test_kept_tokens_are_the_only_ones_of_the_distribution():
    c = case(1)
    N, V = len(c["target"]), len(c["head"])
    generator = torch.Generator().manual_seed(2)
    mask = (torch.rand(N, V, generator=generator) < 0.5) | (torch.arange(V) == c["target"][:, None])
    kept = Kept(mask.nonzero()[:, 1].int(), mask.sum(1))
    head = c["head"].requires_grad_()
    logs, entropy = token_log_probabilities(c["hidden"], head, c["target"], 0.8, kept)
    whole = (c["hidden"] @ head.T / 0.8).exp() * mask
    expected = (whole / whole.sum(-1, keepdim=True))[torch.arange(N), c["target"]].log()
    torch.testing.assert_close(logs, expected)
    assert torch.isfinite(entropy).all() and (entropy >= 0).all()
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), head)[0] for x in (logs, expected)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 0.25, 1.0, -0.5]), min_size=4, max_size=4), min_size=1, max_size=5),
       st.sampled_from([0.0, 0.1, 0.5]))
def test_advantages_are_centred_and_equal_rewards_teach_nothing(rewards, floor):
    found = advantages(torch.tensor(rewards, dtype=torch.float64), floor)
    for group, advantage in zip(rewards, found, strict=True):
        mean = sum(group) / 4
        deviation = max(math.sqrt(sum((r - mean) ** 2 for r in group) / 4), floor)
        expected = [0.0] * 4 if len({*group}) == 1 else [(r - mean) / deviation for r in group]
        torch.testing.assert_close(advantage, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
