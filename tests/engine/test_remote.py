"""An engine in another process: the same answers, the same refusals; each end bears the other's death."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fathom.checkpoint.released import save_model
from fathom.engine.engine import Engine
from fathom.engine.remote import EngineLost, Plan, RemoteEngine
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.errors import CheckpointError, InputError, QueueFull
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, small_config

SETTINGS = EngineSettings(cache_bytes=4 << 20, running=2, waiting=3, prefill_chunk=64)
ENDLESS = Sampling(max_tokens=3000, ignore_eos=True)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    tokenizer, folder = Tokenizer.train(("the quick brown fox", "0123456789"), 340), tmp_path_factory.mktemp("model")
    save_model(random_model(small_config([4, 128], vocab_size=tokenizer.vocab_size)), folder)
    tokenizer.save(folder)
    return Plan(folder, torch.float32, "cpu", False, SETTINGS, threads=1)


@pytest.fixture(scope="module")
def remote(plan):
    engine = RemoteEngine(plan)
    yield engine
    engine.close()


def finish(engine):
    """Text by request and choice, of all that is to be done."""
    texts = {}
    while engine.has_work:
        for output in engine.step():
            key = output.request, output.choice
            texts[key] = texts.get(key, "") + output.text
    return texts


def test_it_writes_what_an_engine_in_this_process_writes(plan, remote):
    def answers(engine):
        number = engine.grammars.regex("[0-9]{3}(,[0-9]{3}){2}", False)
        requests = [Request((40, 41, seed), Sampling(seed=seed, max_tokens=20 + seed), choices=1 + seed % 3, constraint=number if seed % 2 else None)
                    for seed in range(3)]
        numbers = [engine.add(request) for request in requests]
        return {(numbers.index(request), choice): text for (request, choice), text in finish(engine).items()}
    local = Engine.load(plan.path, settings=SETTINGS)
    expected = answers(local)
    assert answers(remote) == expected and len(expected) == 6
    assert remote.stats().generated_tokens == local.stats().generated_tokens > 0
    assert (remote.max_tokens, remote.block_tokens, remote.slots, remote.config) == (local.max_tokens, local.block_tokens, local.slots, local.config)
    assert remote.step() == []  # and does not wait


@pytest.mark.parametrize(("request_", "words"), [
    (Request(()), "the prompt is empty"), (Request((1,) * 5000), "the model holds"), (Request((400,)), "outside the vocabulary"),
    (Request((1,), Sampling(logit_bias={345: 1.0})), "logit_bias")])
def test_what_the_model_cannot_take_is_refused_at_once(remote, request_, words):
    with pytest.raises(InputError, match=words):
        remote.add(request_)
    with pytest.raises(InputError, match="regex: unclosed group"):
        remote.grammars.regex("(", False)
    assert not remote.has_work


def test_a_full_queue_counts_those_that_the_child_has_not_seen_yet(remote):
    requests = []
    with pytest.raises(QueueFull):  # the child starts two of them, at its first step or later
        for _ in range(10):
            requests.append(remote.add(Request((40, 41), ENDLESS)))
    assert 3 <= len(requests) <= 5
    while remote.stats().running < 2:
        remote.step()
    for request in requests:
        remote.cancel(request)
        remote.cancel(request)
    outputs = []
    while remote.has_work:
        outputs += remote.step()
    assert outputs == []
    assert (remote.stats().running, remote.stats().waiting, remote.stats().blocks_used) == (0, 0, 0)
    remote.add(Request((40, 41), Sampling(max_tokens=2, ignore_eos=True)))
    assert len(finish(remote)) == 1


def test_nobody_waits_for_ever_when_both_sides_have_much_to_say(plan):
    """Far more than a pipe holds, both ways, and nobody reads until all is sent."""
    engine = RemoteEngine(replace(plan, settings=EngineSettings(cache_bytes=64 << 20, running=8, waiting=1000)))
    for seed in range(200):
        engine.add(Request((40 + seed % 9,) * 900, Sampling(seed=seed, max_tokens=8, ignore_eos=True)))
    assert len(finish(engine)) == 200
    engine.close()


def test_what_cannot_be_loaded_is_said_in_the_same_words(tmp_path, plan):
    with pytest.raises(CheckpointError) as here:
        Engine.load(tmp_path)
    with pytest.raises(CheckpointError) as there:
        RemoteEngine(replace(plan, path=tmp_path))
    assert str(here.value) == str(there.value)


def test_a_child_that_dies_while_it_loads_is_one_line(plan):
    with pytest.raises(CheckpointError, match="model.*exit code 1.* while it was loading; is there enough memory?") as caught:
        RemoteEngine(replace(plan, threads=-1))  # torch refuses it, over there
    assert "\n" not in str(caught.value)


def test_a_child_that_dies_is_noticed_even_when_idle(plan):
    engine = RemoteEngine(plan)
    assert not engine.has_work
    os.kill(engine._process.pid, signal.SIGKILL)
    while not engine.has_work:
        time.sleep(0.01)
    with pytest.raises(EngineLost, match="exit code -9"):
        engine.step()
    with pytest.raises(EngineLost):
        engine.grammars.regex("a", False)
    with pytest.raises(EngineLost):
        engine.add(Request((40,)))
    engine.close()


PARENT = """
import sys, torch
from pathlib import Path
from fathom.engine.remote import Plan, RemoteEngine
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings

if __name__ == "__main__":
    engine = RemoteEngine(Plan(Path(sys.argv[1]), torch.float32, "cpu", False, EngineSettings(cache_bytes=4 << 20), 1))
    if sys.argv[2] == "busy":
        engine.add(Request((40, 41), Sampling(max_tokens=3000, ignore_eos=True)))
    print(engine._process.pid, flush=True)
    if sys.argv[3] == "killed":
        sys.stdin.read()
"""


@pytest.mark.parametrize("work", ["busy", "idle"])
@pytest.mark.parametrize("end", ["killed", "forgotten"])
def test_a_parent_that_is_gone_leaves_no_child_behind(tmp_path, plan, work, end):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script), str(plan.path), work, end], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        if end == "killed":
            process.kill()
        assert process.wait(120) == (-signal.SIGKILL if end == "killed" else 0)
    limit = time.monotonic() + 60
    while time.monotonic() < limit and alive(child):
        time.sleep(0.05)
    assert not alive(child)


def alive(pid):
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # no /proc here
        return True
