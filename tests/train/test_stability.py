"""Spikes are seen, rolled back and passed; a run over a rollback resumes bit for bit; a number that is none is traced to its layer."""

import copy
import json
import signal
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console

from fathom.checkpoint.training import list_checkpoints, load_checkpoint
from fathom.data.packing import Batch
from fathom.errors import RecipeError
from fathom.optim.muon import AdamW, Muon, Optimizer
from fathom.text.tokenizer import Tokenizer
from fathom.train import loop
from fathom.train.loop import Diverged, Loop, Stage, run_stage
from fathom.train.objective import LossWeights, objective
from fathom.train.stability import Guard, Stability, chosen_experts, learned_routers
from fathom.train.tracking import Tracking, read_lines, read_metrics
from tests.models import random_model, random_tokens, small_config

CONFIG = small_config([4, 0], hidden_size=32, sliding_window=16, index_n_heads=2, index_topk=4, hc_mult=2, hc_sinkhorn_iters=5,
                      vocab_size=320)
STEPS = 24
LOOP = Loop(checkpoint_every=4, keep_checkpoints=2, validate_every=100)
WATCHFUL = Stability(window=6, deviations=0, least_rise=0.5, back_steps=3, anticipate_steps=6, lag=2)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the sea was calm and the captain walked along the deck"] * 4, 320)


class Killed(Exception):
    """The process ends here."""


class Training:
    """A run on random rows that repeat, with a bad batch at some steps, each as often as `bad` says."""

    def __init__(self, run, tokenizer, bad=None, stability=WATCHFUL, kill_at=None, stop_at=None):
        self.run, self.tokenizer, self.stability = run, tokenizer, stability
        self.bad, self.kill_at, self.stop_at, self.signals = dict(bad or {}), kill_at, stop_at, []

    def batch(self, step):
        if step == self.kill_at:
            raise Killed
        if step == self.stop_at:
            self.signals.append(signal.SIGTERM)
        row = random_tokens(CONFIG, 2, 33, seed=step % 3)
        if self.bad.get(step, 0) > 0:
            self.bad[step] -= 1
            row = random_tokens(CONFIG, 2, 33, seed=1000 + step)
        return Batch(row[:, :-1], row[:, 1:].clone(), torch.arange(32).expand(2, -1))

    def go(self, resume=False):
        guard = Guard(self.stability)
        if resume:
            model, state = load_checkpoint(list_checkpoints(self.run)[-1])
            guard.load_state_tensors(state.guard)
        else:
            model, state = random_model(CONFIG), None
        optimizer = Optimizer(model.named_parameters(), CONFIG, Muon(), AdamW())
        if state:
            optimizer.load_state_tensors(state.optimizer)
        stage = Stage(batch=self.batch, loss=lambda batch, step: objective(model, batch, LossWeights(), 0.3, "sparse"),
                      rate=lambda step: 0.02, bias_speed=lambda step: 0.001, validate=None, quantised=lambda step: False)
        run_stage(self.run, model, self.tokenizer, optimizer, stage, STEPS, state.step if state else 0, LOOP,
                  Console(quiet=True), guard, Tracking(layers_every=0))
        return model


def curve(run):
    return [(line["step"], line["loss"], line["anticipates"]) for line in read_metrics(run) if "loss" in line]


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_calm_run_is_left_alone(tmp_path, tokenizer):
    Training(tmp_path, tokenizer).go()
    assert not (tmp_path / "events.jsonl").exists() and {anticipates for *_, anticipates in curve(tmp_path)} == {0}


def test_a_spike_that_does_not_come_again_leaves_no_trace_in_the_weights(tmp_path, tokenizer):
    stability = Stability(window=6, deviations=0, least_rise=0.5, back_steps=3, anticipate_steps=0)
    clean = Training(tmp_path / "clean", tokenizer, stability=stability).go()
    spiked = Training(tmp_path / "spiked", tokenizer, {14: 1}, stability).go()
    assert read_lines(tmp_path / "spiked" / "events.jsonl")[0] | {"losses": 0} == {
        "event": "spike", "step": 15, "back_to": 8, "losses": 0}
    assert curve(tmp_path / "clean") == curve(tmp_path / "spiked")
    assert same_weights(clean, spiked)


def test_a_spike_that_comes_again_is_passed_with_anticipatory_routing(tmp_path, tokenizer):
    Training(tmp_path, tokenizer, {14: 99}).go()
    events = read_lines(tmp_path / "events.jsonl")
    assert [(event["step"], event["back_to"]) for event in events] == [(15, 8)]
    assert [step for step, _ in events[0]["losses"]] == list(range(9, 16))
    assert [step for step, _, anticipates in curve(tmp_path) if anticipates] == list(range(9, 21))
    assert [step for step, *_ in curve(tmp_path)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("kill_at", [11, 13, 19, 22])
def test_a_run_killed_before_in_or_after_a_rollback_resumes_bit_for_bit(tmp_path, tokenizer, kill_at):
    bad = {14: 99}
    unbroken = Training(tmp_path / "unbroken", tokenizer, bad).go()
    with pytest.raises(Killed):
        Training(tmp_path / "killed", tokenizer, bad, kill_at=kill_at).go()
    resumed = Training(tmp_path / "killed", tokenizer, bad).go(resume=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "unbroken")
    assert (tmp_path / "killed" / "events.jsonl").read_text() == (tmp_path / "unbroken" / "events.jsonl").read_text()
    assert same_weights(unbroken, resumed)


def test_an_interruption_does_not_change_where_a_run_rolls_back_to(tmp_path, tokenizer, monkeypatch):
    bad = {14: 99}
    unbroken = Training(tmp_path / "unbroken", tokenizer, bad).go()
    for number, stop_at in enumerate((9, 10, 13)):  # three signals, each with a checkpoint of its own
        training = Training(tmp_path / "stopped", tokenizer, bad, stop_at=stop_at)
        monkeypatch.setattr(loop, "_interrupts", lambda training=training: nullcontext(training.signals))
        with pytest.raises(loop.Stopped):
            training.go(resume=number > 0)
    monkeypatch.undo()
    resumed = Training(tmp_path / "stopped", tokenizer, bad).go(resume=True)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "unbroken") and same_weights(unbroken, resumed)


def test_without_an_old_enough_checkpoint_the_run_goes_on(tmp_path, tokenizer):
    stability = Stability(window=6, deviations=0, least_rise=0.5, back_steps=20, anticipate_steps=6)
    Training(tmp_path, tokenizer, {14: 99}, stability).go()
    assert [event["back_to"] for event in read_lines(tmp_path / "events.jsonl")] == [None]
    assert [step for step, *_ in curve(tmp_path)] == list(range(1, STEPS + 1))


def test_routing_takes_the_experts_of_earlier_weights_and_the_affinities_of_the_current_ones():
    model, batches = random_model(CONFIG), [random_tokens(CONFIG, 2, 32, seed=seed) for seed in range(8)]
    guard = Guard(Stability(anticipate_steps=8, lag=2))
    guard._anticipate_until = 8
    by_step, weights = {}, {}
    for step in range(5):
        by_step[step] = {ahead: chosen_experts(model, lambda: model(batches[ahead])) for ahead in range(step, step + 3)}
        weights[step] = copy.deepcopy(learned_routers(model)[0].weight)
        seen = {}
        hook = learned_routers(model)[0].register_forward_hook(lambda m, inputs, output: seen.update(x=inputs[0], out=output))
        with guard.routing(model, step, lambda ahead: model(batches[ahead])), torch.no_grad():
            model(batches[step])
        hook.remove()
        made_at = max(0, step - 2)
        assert torch.equal(seen["out"][1], by_step[made_at][step][0])
        affinity_BSE = torch.nn.functional.softplus(seen["x"] @ weights[step].T).sqrt()
        torch.testing.assert_close(seen["out"][0], affinity_BSE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)) * 0.05)
    assert not torch.equal(by_step[0][2][0], by_step[2][2][0])  # the weights moved far enough to choose others
    assert all(router.foreseen is None for router in learned_routers(model))


def test_the_detector_follows_its_rule():
    guard = Guard(Stability(window=5, deviations=3, least_rise=0.1, norm_factor=4))
    losses = [2.0, 2.2, 1.9, 2.1, 2.0]  # median 2.0, MAD 0.1: a spike from 2.0 + 3 x 0.14826
    assert [guard.sees_spike(step, loss, 1.0, (8, 0)) for step, loss in enumerate([9.0, *losses[1:]])] == [False] * 5
    guard._history = [(loss, 1.0) for loss in losses]
    assert guard._stands_out(2.45, 1.0) and not guard._stands_out(2.44, 1.0)
    assert guard._stands_out(2.0, 4.1) and not guard._stands_out(2.0, 3.9)
    assert not guard.sees_spike(6, 9.0, 1.0, (16, 0))  # another length: nothing to compare with


@pytest.mark.parametrize("change", [dict(window=3), dict(lag=0), dict(deviations=-1.0)])
def test_impossible_settings_are_refused_by_name(change):
    with pytest.raises(RecipeError, match=f"^{next(iter(change))} is .*; allowed: "):
        Stability(**change)


# ---- numbers that are none

def poisoned(run, tokenizer, monkeypatch, spoil):
    """Train until `spoil` acts on the model at step 5; the error's text and the weights at that moment and after."""
    training, kept = Training(run, tokenizer), {}

    def go(model, optimizer, *arguments):
        if arguments[1] == 5:
            kept["model"] = model
            spoil(model)
            kept["before"] = copy.deepcopy(model.state_dict())
        return step_of_the_loop(model, optimizer, *arguments)

    step_of_the_loop = loop.take_step
    monkeypatch.setattr(loop, "take_step", go)
    with pytest.raises(Diverged) as error:
        training.go()
    for name, tensor in kept["model"].state_dict().items():
        torch.testing.assert_close(tensor, kept["before"][name], equal_nan=True, rtol=0, atol=0)
    return str(error.value)


def test_a_nan_in_a_weight_is_named(tmp_path, tokenizer, monkeypatch):
    def spoil(model):
        model.blocks[1].moe.experts.down.data[2, 3, 4] = float("nan")
    text = poisoned(tmp_path, tokenizer, monkeypatch, spoil)
    assert "step 6 gave loss nan" in text and "the parameter blocks.1.moe.experts.down;" in text and "nothing was updated" in text


def test_a_nan_in_a_layers_output_is_named(tmp_path, tokenizer, monkeypatch):
    def spoil(model):
        model.blocks[1].attention.query_up.register_forward_hook(lambda module, inputs, output: output * float("inf"))
    assert "the output of blocks.1.attention.query_up;" in poisoned(tmp_path, tokenizer, monkeypatch, spoil)


def test_a_nan_in_a_gradient_is_named_where_it_began(tmp_path, tokenizer, monkeypatch):
    def spoil(model):
        def bad_backward(module, inputs, output):
            if torch.is_grad_enabled():
                output[0].register_hook(lambda gradient: gradient * float("nan"))
        model.blocks[0].attention.register_forward_hook(bad_backward)
    assert "the gradient of blocks.0." in poisoned(tmp_path, tokenizer, monkeypatch, spoil)


def test_figures_of_the_layers_are_recorded_and_change_nothing(tmp_path, tokenizer):
    def watched(name, every):
        training = Training(tmp_path / name, tokenizer)
        model = random_model(CONFIG)
        optimizer = Optimizer(model.named_parameters(), CONFIG, Muon(), AdamW())
        stage = Stage(batch=training.batch, loss=lambda batch, step: objective(model, batch, LossWeights(), 0.3, "sparse"),
                      rate=lambda step: 0.02, bias_speed=lambda step: 0.001, validate=None, quantised=lambda step: False)
        run_stage(tmp_path / name, model, tokenizer, optimizer, stage, 6, 0, LOOP, Console(quiet=True), tracking=Tracking(every))
        return model, [line for line in read_metrics(tmp_path / name) if "loss" in line]

    (plain, without), (looked_at, lines) = watched("plain", 0), watched("watched", 3)
    assert same_weights(plain, looked_at)
    assert [line["step"] for line in lines if "layers" in line] == [3, 6] and not any("layers" in line for line in without)
    figures, blocks = lines[2]["layers"], len(CONFIG.compress_ratios)
    assert {name: len(values) for name, values in figures.items()} == dict.fromkeys(
        ("stream_rms", "stream_max", "stream_gain", "router_entropy", "gradient_norm", "expert_load"), blocks)
    assert all(sum(load) == pytest.approx(CONFIG.n_routed_experts, rel=1e-2) for load in figures["expert_load"])
    assert all(0 < entropy <= 1 for entropy in figures["router_entropy"])
    assert lines[2]["update_rms"] == pytest.approx(0.18, rel=0.15)  # Muon's, and the decay beside it
    assert json.dumps(lines) and lines[2]["residual_amplification"] > 0
