"""Choosing tokens: distributions, filters, penalties, seeds; no row of a batch depends on another."""

import math

import pytest
import torch

from fathom.engine.sampler import Sampler, Sampling, choose, log_probabilities
from fathom.errors import InputError


@pytest.mark.parametrize(("settings", "words"), [
    ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"), ({"max_tokens": 0}, "max_tokens"), ({"seed": 2**64}, "seed"), ({"top_k": -1}, "top_k"),
    ({"min_p": 2}, "min_p"), ({"frequency_penalty": 2.5}, "frequency_penalty"), ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": ("",)}, "stop"), ({"stop": ("x",) * 17}, "stop"), ({"stop": ("x" * 1025,)}, "stop"), ({"logit_bias": {1: 101}}, "logit_bias")])
def test_unusable_sampling_settings_are_named(settings, words):
    with pytest.raises(InputError, match=words):
        Sampling(**settings)


def test_samples_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampler = Sampler(Sampling(temperature=2.0, seed=0))
    counts = torch.zeros(4)
    for _ in range(20000):
        counts[sampler.next_token(logits)] += 1
    torch.testing.assert_close(counts / 20000, (logits / 2).softmax(0), atol=0.015, rtol=0)


def drawn(logits, seeds=200, **settings):
    return {Sampler(Sampling(seed=seed, **settings)).next_token(logits) for seed in range(seeds)}


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert {p: drawn(logits, top_p=p) for p in (0.1, 0.5, 0.6, 0.81, 1.0)} == {
        0.1: {0}, 0.5: {0}, 0.6: {0, 1}, 0.81: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


def test_top_k_and_min_p_leave_out_unlikely_tokens():
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert drawn(logits, top_k=2) == {1, 3} and drawn(logits, top_k=100) == {0, 1, 2, 3}
    assert drawn(logits, min_p=0.2) == {0, 1, 3} and drawn(logits, min_p=1.0) == {1}
    assert drawn(logits, top_k=3, top_p=0.5) == {1}  # the nucleus of what top-k leaves


def test_penalties_and_biases_act_on_what_was_written():
    logits = torch.tensor([1.0, 0.9, -1.0])
    greedy = {"temperature": 0}
    assert [Sampler(Sampling(**greedy, presence_penalty=0.5)).next_token(logits)] == [0]
    sampler = Sampler(Sampling(**greedy, presence_penalty=0.5))
    assert [sampler.next_token(logits) for _ in range(4)] == [0, 1, 0, 0]  # both were written: the order is back
    sampler = Sampler(Sampling(**greedy, frequency_penalty=0.5))
    assert [sampler.next_token(logits) for _ in range(4)] == [0, 1, 0, 1]
    assert Sampler(Sampling(**greedy, repetition_penalty=2.0), prompt=[0]).next_token(logits) == 1
    assert Sampler(Sampling(**greedy, logit_bias={2: 50})).next_token(logits) == 2


def test_a_mask_bounds_greedy_and_drawn_tokens():
    logits, allowed = torch.tensor([5.0, 1.0, 0.0, -3.0]), torch.tensor([False, False, True, True])
    assert Sampler(Sampling(temperature=0)).next_token(logits, allowed) == 2
    assert {Sampler(Sampling(seed=seed, temperature=5)).next_token(logits, allowed) for seed in range(50)} == {2, 3}


def test_rows_of_a_batch_are_drawn_as_they_are_alone():
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(40, 500, generator=generator) * 3
    settings = [Sampling(temperature=(0, 0.7, 1.3)[row % 3], top_p=(1, 0.9)[row % 2], top_k=(0, 20)[row % 5 == 0], seed=row,
                         presence_penalty=0.5 * (row % 7 == 0)) for row in range(40)]
    masks = [torch.rand(500, generator=generator) > 0.5 if row % 4 == 0 else None for row in range(40)]
    together = choose([Sampler(each) for each in settings], logits_BV, masks)
    alone = [Sampler(each).next_token(logits_V, mask) for each, logits_V, mask in zip(settings, logits_BV, masks, strict=True)]
    assert together == alone


def test_choices_of_one_seed_differ_and_repeat():
    logits = torch.zeros(1000)
    first, again = ([Sampler(Sampling(seed=7), choice=choice).next_token(logits) for choice in range(20)] for _ in range(2))
    assert first == again and len(set(first)) > 15


def test_log_probabilities_are_of_the_logits_as_they_came():
    logits = torch.tensor([0.5, 0.3, 0.2]).log() + 4
    logprob, top = log_probabilities(logits, 2, 2)
    assert math.isclose(logprob, math.log(0.2), rel_tol=1e-5)
    assert [token for token, _ in top] == [0, 1] and math.isclose(top[0][1], math.log(0.5), rel_tol=1e-5)
