"""A stopped run continues as if it had never stopped: kill -9, Ctrl-C, and what must not be resumed."""

import json
import signal
import subprocess
import time

import pytest

from tests.runs import command, environment, fathom, losses, micro_recipe


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of 20 steps without a stop."""
    folder = tmp_path_factory.mktemp("unbroken")
    result = fathom("train", micro_recipe(folder))
    assert result.returncode == 0, result.stderr
    return folder / "run"


def weights(run, step=20):
    return (run / "checkpoints" / f"step-{step:06d}" / "model.safetensors").read_bytes()


def start(recipe, *options):
    return subprocess.Popen(command("train", recipe, *options), env=environment(), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for_step(run, step):
    for _ in range(30_000):
        if (run / "metrics.jsonl").exists() and any(
                json.loads(line)["step"] >= step for line in (run / "metrics.jsonl").read_text().splitlines()
                if line.endswith("}")):
            return
        time.sleep(0.01)
    raise AssertionError(f"{run} never reached step {step}")


def test_the_run_learns_and_leaves_what_it_promises(unbroken):
    curve = losses(unbroken)
    assert [step for step, _ in curve] == list(range(1, 21))
    assert curve[-1][1] < curve[0][1] - 1
    for line in map(json.loads, (unbroken / "metrics.jsonl").read_text().splitlines()):
        assert "mfu" not in line and ("loss" not in line or line["flops_per_second"] > line["tokens_per_second"])
    for name in ("recipe.toml", "environment.json", "loss.png", "tokenizer/tokenizer.json", "data/train/manifest.json"):
        assert (unbroken / name).stat().st_size > 0
    assert sorted(folder.name for folder in (unbroken / "checkpoints").iterdir()) == ["step-000015", "step-000020"]


@pytest.mark.parametrize("at", [11, 13])
def test_killed_and_resumed_equals_unbroken_bit_for_bit(tmp_path, unbroken, at):
    recipe = micro_recipe(tmp_path)
    process = start(recipe)
    wait_for_step(tmp_path / "run", at)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "run" / "checkpoints" / "step-000020").exists()
    result = fathom("train", recipe, "--resume")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == losses(unbroken)
    assert weights(tmp_path / "run") == weights(unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_equals_the_unbroken_one(tmp_path, unbroken, number):
    recipe = micro_recipe(tmp_path)
    process = start(recipe)
    wait_for_step(tmp_path / "run", 6)
    process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == 130 and "--resume continues" in out
    result = fathom("train", recipe, "--resume")
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == losses(unbroken)
    assert weights(tmp_path / "run") == weights(unbroken)


def test_a_second_run_does_not_overwrite_the_first(unbroken):
    result = fathom("train", unbroken.parent / "recipe.toml")
    assert result.returncode == 2 and "already holds a run; --resume" in result.stderr


def test_resuming_with_another_recipe_is_refused(unbroken):
    result = fathom("train", unbroken.parent / "recipe.toml", "--resume", "--set", "schedule.peak_rate=0.5")
    assert result.returncode == 2 and "another recipe (now: peak_rate = 0.5)" in result.stderr


def test_resuming_nothing_is_refused(tmp_path):
    result = fathom("train", micro_recipe(tmp_path), "--resume")
    assert result.returncode == 2 and "holds no run to resume" in result.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumes(tmp_path, unbroken):
    recipe = micro_recipe(tmp_path)
    assert fathom("train", recipe).returncode == 0
    newest = tmp_path / "run" / "checkpoints" / "step-000020"
    damaged = newest / "training" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    result = fathom("train", recipe, "--resume")
    assert result.returncode == 2 and "optimizer.safetensors is damaged" in result.stderr and "before it" in result.stderr
    for file in sorted(newest.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    newest.rmdir()
    assert fathom("train", recipe, "--resume").returncode == 0
    assert weights(tmp_path / "run") == weights(unbroken)
