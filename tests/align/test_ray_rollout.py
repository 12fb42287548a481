"""Rollouts by Ray actors: the tokens that this process draws, and an actor that is killed goes on from its log."""

import importlib.util
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fathom.align.curriculum import choose_tasks
from fathom.align.grpo import Grpo, Pace, reinforce
from fathom.align.losses import Policy
from fathom.align.rollout import Draw, new_rollouts, play_here
from fathom.align.rollout_log import RolloutLog
from fathom.align.sample import Mode
from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.errors import InputError
from fathom.text.tokenizer import Tokenizer
from fathom.train.qat import released_numbers
from tests.align.toy import TOYS, micro_folder
from tests.runs import losses

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
DRAW = Draw(cache_mib=32)
SECONDS = 120


@pytest.fixture(autouse=True)
def one_thread():
    """As the actors have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def toys():
    """The environments, made in an actor."""
    return TOYS


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return micro_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def ray_play():
    from fathom.align.ray_rollout import RayPlay

    old = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])  # where the actors find `tests`
    player = RayPlay(2, toys)
    yield player
    player.close()
    os.environ.pop("PYTHONPATH") if old is None else os.environ.update(PYTHONPATH=old)


def asked(tokenizer, count=6, tokens=40):
    modes = (Mode("chat", tokens), Mode("high", tokens, thinking_budget=9))
    return new_rollouts(choose_tasks(TOYS, (1,), modes, count, 0, 0), 3, tokenizer)


def play_in_parts(model, tokenizer, rollouts, environments, draw, seed, log):
    """In this process, but dealt out as to two actors: what is computed together shows in the last bits, and so, rarely, in a drawn token."""
    for part in (0, 1):
        metrics = play_here(model, tokenizer, [rollout for rollout in rollouts if rollout.group % 2 == part], environments, draw, seed, None)
    return metrics


def told(rollouts):
    return [(rollout.tokens, rollout.written, rollout.turns, rollout.finish, rollout.score, rollout.group, rollout.member) for rollout in rollouts]


@pytest.mark.parametrize("quantise", [False, True])
def test_actors_draw_the_tokens_that_this_process_draws(base, ray_play, quantise):
    model, tokenizer = load_model(base), Tokenizer.load(base)
    here, there = asked(tokenizer), asked(tokenizer)
    tasks = [rollout.task for rollout in there]
    if quantise:
        with released_numbers(model):
            play_in_parts(model, tokenizer, here, TOYS, DRAW, 5, None)
            metrics = ray_play(model, tokenizer, there, TOYS, DRAW, 5, None)
    else:
        play_in_parts(model, tokenizer, here, TOYS, DRAW, 5, None)
        metrics = ray_play(model, tokenizer, there, TOYS, DRAW, 5, None)
    assert told(here) == told(there) and all(rollout.score for rollout in there)
    assert [rollout.task for rollout in there] == tasks and all(one.task is task for one, task in zip(there, tasks, strict=True))
    assert 0 < metrics["sync_seconds"] < SECONDS and metrics["sampled_tokens_per_second"] > 0


def test_new_weights_reach_the_actors(base, ray_play):
    model, tokenizer = load_model(base), Tokenizer.load(base)
    before, after, here = asked(tokenizer), asked(tokenizer), asked(tokenizer)
    ray_play(model, tokenizer, before, TOYS, DRAW, 5, None)
    with torch.no_grad():
        model.head.weight.mul_(-1)
    ray_play(model, tokenizer, after, TOYS, DRAW, 5, None)
    play_in_parts(model, tokenizer, here, TOYS, DRAW, 5, None)
    assert told(after) == told(here) != told(before)


def test_a_killed_actor_goes_on_from_its_log_and_no_sample_is_lost_or_counted_twice(base, ray_play, tmp_path):
    import ray

    model, tokenizer = load_model(base), Tokenizer.load(base)
    here, there = (asked(tokenizer, 24, 200) for _ in range(2))
    play_in_parts(model, tokenizer, here, TOYS, DRAW, 5, None)
    log, killed = RolloutLog(tmp_path / "round-000000.log", {"round": 0}), []

    ray_play(model, tokenizer, asked(tokenizer, 2, 2), TOYS, DRAW, 1, None)
    pid = ray.get(ray_play.workers[0].__ray_call__.remote(lambda worker: os.getpid()))

    def kill_it():
        path = tmp_path / "round-000000.worker-0.log"
        while not path.exists() or path.stat().st_size < 2000:
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        killed.append(path.stat().st_size)

    thread = threading.Thread(target=kill_it, daemon=True)
    thread.start()
    ray_play(model, tokenizer, there, TOYS, DRAW, 5, log)
    thread.join(SECONDS)
    assert killed and told(there) == told(here)
    found = RolloutLog(tmp_path / "round-000000.worker-0.log", {"round": 0, "worker": "0 of 2"}).found
    written = [(number, token) for kind, *values in found if kind == "written" for number, token, _ in values[0]]
    mine = [rollout for rollout in there if rollout.group % 2 == 0]
    assert sorted(written) == sorted((number, token) for number, rollout in enumerate(mine)
                                     for token, own in zip(rollout.tokens, rollout.written, strict=True) if own)


def test_a_run_with_actors_has_the_weights_of_one_without(base, ray_play, tmp_path):
    recipe = Grpo(str(tmp_path / "here"), str(base), ("letters",), Pace(3, 2, 0.01), modes=(Mode("chat", 12),), prompts=4, group=4, row_tokens=64,
                  policy=Policy(0.2, 0.01))
    runs = [reinforce(recipe, TOYS, False, Console(quiet=True), play_in_parts),
            reinforce(replace(recipe, run=str(tmp_path / "there")), TOYS, False, Console(quiet=True), ray_play)]
    assert losses(runs[0]) == losses(runs[1])
    one, two = (load_model(find_model(run)).state_dict() for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_count_out_of_range_is_refused():
    from fathom.align.ray_rollout import RayPlay
    with pytest.raises(InputError, match="workers is 0; allowed: 1 to 256"):
        RayPlay(0)
