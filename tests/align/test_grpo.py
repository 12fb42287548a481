"""GRPO: samples packed as they were played, the sampling policy seen again exactly, learning, and kills that change nothing."""

import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fathom import recipe as recipes
from fathom.align.curriculum import choose_tasks
from fathom.align.grpo import Grpo, Learner, Pace, reinforce, samples_of
from fathom.align.losses import Policy, token_log_probabilities
from fathom.align.rollout import Draw, new_engine, new_rollouts, play
from fathom.align.rollout_log import RolloutLog
from fathom.align.round import find_round, hidden_of_targets, kept_in, load_batch, observe_policy, save_round
from fathom.align.routing import recorded_routing, replayed_routing
from fathom.align.sample import Mode, Sample, pack_samples
from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.errors import CheckpointError, DataError, RecipeError
from fathom.ops import IGNORE, products_in
from fathom.optim.lora import Lora, lora_names
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Loop
from fathom.train.objective import LossWeights
from fathom.train.tracking import read_metrics
from tests.align.toy import TOYS, Letters, micro_folder, run
from tests.runs import environment, losses


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return micro_folder(tmp_path_factory.mktemp("base") / "model")


def grpo(base, run, **changes):
    settings = dict(run=str(run), base=str(base), environments=("letters",), pace=Pace(4, 2, 0.01), modes=(Mode("chat", 12),), prompts=4,
                    group=4, row_tokens=64, invalid=0.0, policy=Policy(0.2, 0.01), loop=Loop(checkpoint_every=3, keep_checkpoints=2))
    return Grpo(**settings | changes)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=9), st.integers(1, 12))
def test_packed_samples_have_every_learned_token_as_a_target_of_their_own(lengths, row):
    samples, token = [], 1
    for number, length in enumerate(lengths):
        ids = [*range(token, token + length)]
        samples.append(Sample(ids, [False, *((token + place) % 3 > 0 for place in range(1, length - 1)), True], float(number)))
        token += length
    batch = pack_samples(samples, row, pad_id=0)
    found = batch.targets_BS[batch.targets_BS != IGNORE].tolist()
    expected = [(id, number) for number, sample in enumerate(samples)
                for id, learned in zip(sample.tokens, sample.learned, strict=True) if learned]
    assert sorted(zip(found, batch.sample_N.tolist(), strict=True)) == expected
    own = batch.tokens_BS != 0
    after = batch.positions_BS[:, 1:][own[:, 1:]] > 0  # inside a sample, each token follows the one before it
    assert bool((batch.tokens_BS[:, 1:][own[:, 1:]][after] == batch.tokens_BS[:, :-1][own[:, 1:]][after] + 1).all())
    assert batch.numbers["advantage_U"].tolist() == [*map(float, range(len(samples)))]
    with pytest.raises(DataError, match="sample 0 has 2 tokens"):
        pack_samples([Sample([1, 2], [True, False])], 8, 0)


@pytest.fixture(scope="module")
def played(base):
    """A model, its tokenizer and rollouts of it."""
    model, tokenizer = load_model(base), Tokenizer.load(base)
    rollouts = new_rollouts(choose_tasks(TOYS | {}, (1,), (Mode("chat", 20), Mode("high", 30)), 4, 0, 0), 4, tokenizer)
    play(new_engine(model, tokenizer, Draw(cache_mib=32), 64), rollouts, TOYS, Draw(), 1)
    return model, tokenizer, rollouts


def test_training_sees_the_probabilities_that_the_engine_sampled_with(played):
    model, tokenizer, rollouts = played
    batch = pack_samples([Sample(rollout.tokens, rollout.written) for rollout in rollouts], 96, tokenizer.pad_id)
    numbers = observe_policy(model, batch, Draw(), tokenizer.vocab_size)
    for number, rollout in enumerate(rollouts):
        torch.testing.assert_close(numbers["old_logs_N"][batch.sample_N == number], torch.tensor(rollout.logprobs), atol=1e-4, rtol=0)


def test_kept_routing_is_replayed_and_only_then_survives_other_weights(played):
    model, tokenizer, rollouts = played
    batch = pack_samples([Sample(rollout.tokens, rollout.written) for rollout in rollouts[:4]], 96, tokenizer.pad_id)
    experts = [*observe_policy(model, batch, Draw(), 300)["routing"]]
    with torch.no_grad():
        plain = hidden_of_targets(model, batch)
        with replayed_routing(model, experts):
            torch.testing.assert_close(hidden_of_targets(model, batch), plain, rtol=0, atol=1e-6)
        other = load_model_copy(model)
        for context, same in ((replayed_routing(other, experts), True), (nullcontext(), False)):
            with context, recorded_routing(other) as chosen:  # the recording hook sees what the replaying one left
                hidden_of_targets(other, batch)
            assert all(torch.equal(one, kept.long()) for one, kept in zip(chosen, experts, strict=True)) == same


def load_model_copy(model):
    import copy
    other = copy.deepcopy(model)
    for block in other.blocks:
        block.moe.router.weight += 0.5 * torch.randn(block.moe.router.weight.shape, generator=torch.Generator().manual_seed(0))
    return other


@pytest.mark.parametrize("draw", [Draw(top_k=5, cache_mib=32), Draw(temperature=0.7, top_p=0.6, cache_mib=32)])
def test_the_sampling_mask_is_kept(base, draw):
    model, tokenizer = load_model(base), Tokenizer.load(base)
    rollouts = new_rollouts(choose_tasks({"letters": TOYS["letters"]}, (1,), (Mode("chat", 16),), 2, 0, 0), 3, tokenizer)
    play(new_engine(model, tokenizer, draw, 64), rollouts, TOYS, draw, 1)
    batch = pack_samples([Sample(rollout.tokens, rollout.written) for rollout in rollouts], 96, tokenizer.pad_id)
    numbers = observe_policy(model, batch, draw, tokenizer.vocab_size)
    batch = replace(batch, numbers=batch.numbers | numbers)
    kept, target_N = kept_in(batch), batch.targets_BS[batch.learned_BS]
    masks = kept.mask(0, len(target_N), tokenizer.vocab_size)
    assert bool(masks[torch.arange(len(target_N)), target_N].all())
    if draw.top_k:
        assert kept.count_N.tolist() == [5] * len(target_N)
    with torch.no_grad():
        share_NV = (hidden_of_targets(model, batch) @ model.head.weight[:tokenizer.vocab_size].T / draw.temperature).softmax(-1) * masks
    expected_N = share_NV[torch.arange(len(target_N)), target_N] / share_NV.sum(-1)
    torch.testing.assert_close(numbers["old_logs_N"].exp(), expected_N)
    assert float((share_NV.sum(-1) - draw.top_p).min()) > -1e-3 or draw.top_k


def test_rewards_become_advantages_and_equal_groups_are_skipped(base, tmp_path, played):
    _, tokenizer, rollouts = played
    recipe = grpo(base, tmp_path / "run", deviation_floor=0.0)
    four = [replace(rollout, group=number // 4) for number, rollout in enumerate(rollouts)]
    for number, rollout in enumerate(four):
        rollout.logprobs, rollout.tokens, rollout.written = rollouts[number].logprobs, rollouts[number].tokens, rollouts[number].written
        rollout.score = replace(rollouts[number].score, reward=float(number in (5, 6)), valid=True, calls=0, valid_calls=0)
    parts, skipped = samples_of(four, recipe)
    assert skipped == 3 and [sample.advantage for sample in parts[0]] == [-1, 1, 1, -1]
    assert [sample.weight for sample in parts[0]] == [0.25] * 4 and [sample.weight for sample in parts[1]] == [0.0]
    assert [sample.tokens for sample in parts[0]] == [rollout.tokens for rollout in four[4:8]]


def test_a_first_update_is_on_policy_and_learns(base, tmp_path):
    folder = reinforce(grpo(base, tmp_path / "run", pace=Pace(8, 2, 0.02), prompts=5, group=8), TOYS, False, Console(quiet=True))
    lines = [line for line in read_metrics(folder) if "reward" in line]
    assert [line["step"] for line in lines] == [*range(1, 17)]
    for line in lines[::2]:
        assert line["clip_share"] == 0 and line["drifted_share"] == 0
    assert {"kl", "entropy", "tokens_per_rollout", "invalid_share", "skipped_groups", "cut_share", "sync_seconds", "score_letters_chat",
            "gradient_norm"} <= set(lines[0])
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6) and max(line["kl"] for line in lines) > 1e-4
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.2


def test_low_rank_additions_alone_learn(base, tmp_path):
    recipe = grpo(base, tmp_path / "run", tune="lora", lora=Lora(2, 8.0), pace=Pace(8, 2, 0.02), prompts=5, group=8)
    folder = reinforce(recipe, TOYS, False, Console(quiet=True))
    lines = [line for line in read_metrics(folder) if "reward" in line]
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.1
    before, after = (dict(load_model(find_model(path)).named_parameters()) for path in (base, folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= set(lora_names(before.items()))
    for name in changed:
        assert int(torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3).max()) <= 2


def test_rounds_without_any_difference_of_rewards_change_no_weight(base, tmp_path):
    never = {"never": Letters("never", "☃")}
    folder = reinforce(grpo(base, tmp_path / "run", environments=("never",), pace=Pace(2, 2, 0.05), prompts=2), never, False, Console(quiet=True))
    before, after = load_model(base).state_dict(), load_model(find_model(folder)).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lines = [line for line in read_metrics(folder) if "reward" in line]
    assert [line["used_share"] for line in lines] == [0, 0, 0, 0] and lines[0]["skipped_groups"] == 1


def test_sampling_with_released_numbers_trains_on_them(base, tmp_path):
    recipe = grpo(base, tmp_path / "run", quantise=True, pace=Pace(1, 1, 0.01))
    model, tokenizer = load_model(base), Tokenizer.load(base)
    before = [parameter.clone() for parameter in model.parameters()]
    learner = Learner(recipe, model, tokenizer, {"letters": TOYS["letters"]}, None)
    (batch,) = learner.make_round(0, RolloutLog(tmp_path / "log", {}))
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    plain = observe_policy(model, batch, recipe.draw, learner.known)["old_logs_N"]
    assert float((plain - batch.numbers["old_logs_N"]).abs().max()) > 1e-3


def test_in_mixed_precision_the_policy_that_sampled_is_looked_at_as_its_updates_compute(base, tmp_path):
    recipe, model = grpo(base, tmp_path / "run", pace=Pace(1, 1, 0.01), loop=Loop(precision="bfloat16")), load_model(base)
    learner = Learner(recipe, model, Tokenizer.load(base), {"letters": TOYS["letters"]}, None)
    (batch,) = learner.make_round(0, RolloutLog(tmp_path / "log", {}))
    head_VW = model.head.weight[:learner.known]

    def logs_in(dtype):
        with torch.no_grad(), products_in(dtype):
            return token_log_probabilities(hidden_of_targets(model, batch), head_VW, batch.targets_BS[batch.learned_BS])[0]

    assert torch.equal(logs_in(torch.bfloat16), batch.numbers["old_logs_N"])  # the first update's ratios are 1
    assert float((logs_in(None) - batch.numbers["old_logs_N"]).abs().max()) > 1e-4
    hidden_NW = hidden_of_targets(model, batch).detach()
    exact = token_log_probabilities(hidden_NW, head_VW, batch.targets_BS[batch.learned_BS])[0]
    with products_in(torch.bfloat16):
        narrow = token_log_probabilities(hidden_NW, head_VW, batch.targets_BS[batch.learned_BS])[0]
    assert torch.equal(narrow, exact)  # logits are not rounded


def test_blocks_that_are_computed_anew_take_the_kept_routing_too(base, tmp_path):
    recipe, tokenizer = grpo(base, tmp_path / "run", pace=Pace(1, 1, 0.01), losses=LossWeights(balance=0.0)), Tokenizer.load(base)
    (batch,) = Learner(recipe, load_model(base), tokenizer, {"letters": TOYS["letters"]}, None).make_round(0, RolloutLog(tmp_path / "log", {}))
    gradients = []
    for recompute_above in (1 << 30, 0):
        with torch.no_grad():
            moved = load_model_copy(load_model(base))
        moved.recompute_above = recompute_above
        learner = Learner(recipe, moved, tokenizer, {"letters": TOYS["letters"]}, None)
        learner.loss(batch, 0).total.backward()
        gradients.append({name: parameter.grad for name, parameter in moved.named_parameters()})
        with torch.no_grad(), recorded_routing(moved) as replayed:
            hidden_of_targets(moved, batch)
        learner.kept.close()
        with torch.no_grad(), recorded_routing(moved) as free:
            hidden_of_targets(moved, batch)
        assert not all(map(torch.equal, replayed, free))
    whole, anew = gradients
    assert any(bool(gradient.any()) for name, gradient in whole.items() if ".experts." in name)
    for name, gradient in whole.items():
        torch.testing.assert_close(anew[name], gradient, rtol=1e-5, atol=1e-9)


def test_a_stored_round_comes_back_whole_and_damage_is_named(base, tmp_path, played):
    _, tokenizer, rollouts = played
    batch = pack_samples([Sample(rollout.tokens, rollout.written, 0.5) for rollout in rollouts], 96, tokenizer.pad_id)
    save_round(tmp_path, 3, {"round": 3}, [replace(batch, metrics={"reward": 0.25})])
    (metrics,) = find_round(tmp_path, 3, {"round": 3})
    found = load_batch(tmp_path, 3, 0, metrics)
    assert torch.equal(found.tokens_BS, batch.tokens_BS) and found.metrics == {"reward": 0.25}
    assert all(torch.equal(found.numbers[name], batch.numbers[name]) for name in batch.numbers)
    assert find_round(tmp_path, 3, {"round": 4}) is None and find_round(tmp_path, 4, None) is None
    file = tmp_path / "rounds" / "round-000003" / "batches.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="round-000003 is damaged"):
        find_round(tmp_path, 3, None)


@pytest.mark.parametrize("changes, complaint", [
    (dict(environments=("nowhere",)), "environment 'nowhere' does not exist"), (dict(levels=(7,)), "letters has 1 to 2"),
])
def test_what_cannot_be_asked_is_one_line(base, tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        reinforce(grpo(base, tmp_path / "run", **changes), TOYS, False, Console(quiet=True))


@pytest.mark.parametrize("changes", [dict(group=1), dict(draw=Draw(temperature=0.0)), dict(environments=())])
def test_a_recipe_that_cannot_learn_is_refused(base, tmp_path, changes):
    with pytest.raises(RecipeError):
        grpo(base, tmp_path / "run", **changes)


# ---- kills

def written(recipe, folder):
    path = folder / "recipe.toml"
    path.write_text(recipes.dump(recipe))
    return path


def start(kind, recipe):
    """A run in a process of its own, to be killed."""
    return subprocess.Popen([sys.executable, "-m", "tests.align.toy", kind, str(recipe)], env=environment(), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def wait_for(holds):
    for _ in range(30000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for never came")


def weights(run, step):
    return (run / "checkpoints" / f"step-{step:06d}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run("grpo", written(grpo(base, folder / "run"), folder))
    return folder / "run"


def lines_of(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("where", ["sampling", "training"])
def test_killed_and_resumed_equals_unbroken_bit_for_bit(base, tmp_path, unbroken, where):
    folder, recipe = tmp_path / "run", written(grpo(base, tmp_path / "run"), tmp_path)
    process = start("grpo", recipe)
    if where == "sampling":
        wait_for(lambda: lines_of(folder / "rounds" / "round-000002.log") > 4)
    else:
        wait_for(lambda: (folder / "rounds" / "round-000002" / "manifest.json").exists())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "checkpoints" / "step-000003").exists()
    run("grpo", recipe, resume=True)
    assert losses(folder) == losses(unbroken) and weights(folder, 8) == weights(unbroken, 8)
