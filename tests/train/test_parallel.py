"""Training on several processes: the same losses, gradients and updates as on one, and runs that survive what happens to processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fathom.errors import RecipeError
from fathom.train.context import PartLayout
from fathom.train.rank_optimizer import assign
from fathom.train.ranks import Parallel, join
from tests.models import small_config
from tests.runs import command, environment, fathom, losses, micro_recipe
from tests.train.kills import newest

STEPS, SECONDS = 30, 300
KILLS = int(os.environ.get("FATHOM_KILLS", "3"))  # 50 before a release
ROOT = Path(__file__).parents[2]


def torchrun(ranks, *arguments, launcher=()):
    """The argv of torchrun on a free port."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *launcher, "-m",
            *map(str, arguments)]


# ---- every mode equals one process


@pytest.fixture(scope="module", params=[2, 4])
def findings(request, tmp_path_factory):
    """What each rank found out about each mode (tests/train/parallel_worker.py)."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    result = subprocess.run(torchrun(request.param, "tests.train.parallel_worker", folder), env=environment(), capture_output=True,
                            text=True, timeout=3 * SECONDS, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def modes(findings):
    return [(rank, name, found) for rank, all_found in enumerate(findings) for name, found in all_found.items() if name != "diverged"]


def test_losses_loads_and_gradients_are_those_of_one_process(findings):
    for rank, name, found in modes(findings):
        limit = 1e-9 if "float64" in name else 1e-5
        for what in ("losses", "norm", "gradients"):
            assert found[what] < limit, f"rank {rank}, {name}: {what} off by {found[what]}"
        assert all(found["parts"] + found["loads"] + found["tokens"]), (rank, name, found)
        if "float64" in name:
            assert found["each_gradient"][0] < 1e-9, (rank, name, found["each_gradient"])


def test_updates_and_optimiser_state_are_those_of_one_process(findings):
    exact = [(name, found) for rank, name, found in modes(findings) if rank == 0 and "float64" in name]
    for name, found in exact:
        assert found["weights"] < 1e-6 and found["state"][0] < 1e-9, (name, found)
    assert exact and all(found["state_names"] and found["state_survives"] and found["weights_survive"] for rank, _, found in modes(findings) if rank == 0)


def test_no_number_on_one_rank_stops_all_with_the_same_message(findings):
    messages = [found["diverged"][0] for found in findings]
    assert len(set(messages)) == 1 and messages[0].startswith("step 7 gave loss")
    assert [found["diverged"][1] for found in findings] == [False] + [True] * (len(findings) - 1)  # the first one says it
    assert all(found["diverged"][2] for found in findings)


def test_every_matrix_has_one_owner_and_the_work_is_balanced():
    shapes = {f"blocks.{layer}.moe.experts.{name}": (16, 64, 96) for layer in range(4) for name in ("gate", "up", "down")}
    shapes |= {f"blocks.{layer}.attention.output_up.weight": (96, 64 + 32 * layer) for layer in range(4)}
    plan = assign(shapes, set(), [[0, 1, 2, 3]])
    cost = dict.fromkeys(range(4), 0)
    for name, shape in shapes.items():
        pieces = sorted((piece.begin, piece.end) for piece in plan if piece.name == name)
        assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])] and pieces[-1][1] == shape[0]
    for piece in plan:
        n, m = shapes[piece.name][-2:]
        cost[piece.owner] += (piece.end - piece.begin if len(shapes[piece.name]) == 3 else 1) * min(n, m) ** 2 * max(n, m)
    assert max(cost.values()) < 1.05 * sum(cost.values()) / 4


def test_pieces_of_sharded_experts_stay_with_their_holders():
    plan = assign({"experts": (4, 8, 8), "dense": (8, 8)}, {"experts"}, [[0, 2], [1, 3]])
    assert {(piece.part, piece.owner % 2) for piece in plan if piece.name == "experts"} == {(0, 0), (1, 1)}
    assert len([piece for piece in plan if piece.name == "dense"]) == 1


# ---- runs on the command line


def recipe_in(folder):
    path = micro_recipe(folder, steps=STEPS)
    path.write_text(path.read_text() + '\n[muon]\nprecision = "float32"\n')  # in bfloat16, how many matrices are multiplied together shows
    return path


def arguments(recipe, *more, parallel="data=2", timeout=120):
    return ["fathom.cli", "train", recipe, "--set", f"parallel.{parallel}", "--set", f"parallel.timeout={timeout}", *more]


def finish(recipe, *more, parallel="data=2"):
    """Run to the end on two ranks."""
    result = subprocess.run(torchrun(2, *arguments(recipe, *more, parallel=parallel)), env=environment(), capture_output=True, text=True,
                            timeout=SECONDS)
    assert result.returncode == 0, result.stderr[-4000:]


class Running:
    """A run on two ranks that something is going to happen to."""

    def __init__(self, recipe, *more, timeout=120, launcher=()):
        self.run, self.errors = recipe.parent / "run", recipe.parent / "errors"
        self.earlier = inode(self.run)
        with open(self.errors, "w") as errors, open(recipe.parent / "output", "w") as output:
            self.process = subprocess.Popen(torchrun(2, *arguments(recipe, *more, timeout=timeout), launcher=launcher), env=environment(),
                                            stdout=output, stderr=errors)
        self.output = recipe.parent / "output"

    def wait_for_step(self, step):
        self.wait(lambda: inode(self.run) != self.earlier and reached(self.run) >= step, f"step {step}")

    def wait(self, condition, what):
        for _ in range(SECONDS * 100):
            if condition():
                return
            assert self.process.poll() is None, f"ended before {what}: {self.errors.read_text()[-4000:]}"
            time.sleep(0.01)
        raise AssertionError(f"never came to {what}: {self.errors.read_text()[-4000:]}")

    def workers(self):
        """Process ids by rank."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == self.process.pid:
                    settings = dict(item.split("=", 1) for item in (folder / "environ").read_text().split("\0") if "=" in item)
                    found[int(settings["RANK"])] = int(folder.name)
            except (OSError, KeyError):
                pass
        return found

    def end(self):
        """Wait for the end; what was said on stderr."""
        self.process.wait(SECONDS)
        return self.errors.read_text()


def inode(run):
    """Of the metrics, which a run that goes on writes anew first; None where there are none."""
    try:
        return (run / "metrics.jsonl").stat().st_ino
    except FileNotFoundError:
        return None


def reached(run):
    """The last recorded step."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max([json.loads(line)["step"] for line in lines if line.endswith("}")], default=0)
    except FileNotFoundError:
        return 0


def weights(run, step=STEPS):
    return (run / "checkpoints" / f"step-{step:06d}" / "model.safetensors").read_bytes()


def alive(pid):
    """Whether a process runs; one that nobody waits for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def our_lines(text):
    return [line for line in text.splitlines() if "fathom: " in line]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run on two ranks without a stop."""
    recipe = recipe_in(tmp_path_factory.mktemp("unbroken2"))
    finish(recipe)
    return recipe.parent / "run"


def test_a_run_survives_a_silent_rank_a_killed_one_a_signal_and_a_killed_launcher_bit_for_bit(tmp_path, unbroken):
    recipe, rng = recipe_in(tmp_path), random.Random(os.environ.get("FATHOM_SEED", "1"))
    running = Running(recipe, timeout=5, launcher=("--shutdown-timeout", "1"))
    running.wait_for_step(6)
    os.kill(running.workers()[1], signal.SIGSTOP)
    said = our_lines(running.end())
    assert running.process.returncode != 0
    assert len(said) == 1 and "rank 0 of 2 lost another process" in said[0] and "did not answer for 5 s" in said[0]

    running = Running(recipe, "--resume")
    running.wait_for_step(7 + rng.randrange(5))
    os.kill(running.workers()[1], signal.SIGKILL)
    said = our_lines(running.end())
    assert running.process.returncode != 0 and len(said) == 1 and "rank 0 of 2 lost another process" in said[0] and "--resume" in said[0]

    running = Running(recipe, "--resume")
    running.wait_for_step(13)
    running.process.send_signal(signal.SIGTERM)
    running.end()
    assert running.process.returncode != 0 and "everything is saved, --resume continues" in running.output.read_text()
    stopped = reached(running.run)
    assert (running.run / "checkpoints" / f"step-{stopped:06d}").is_dir()

    running = Running(recipe, "--resume")
    running.wait_for_step(newest(running.run) + 1)
    workers = running.workers()
    running.process.kill()  # torchrun alone; its children notice
    running.process.wait(SECONDS)
    for _ in range(SECONDS * 10):
        if not any(alive(pid) for pid in workers.values()):
            break
        time.sleep(0.1)
    assert "everything is saved" in running.output.read_text(), running.errors.read_text()[-4000:]

    finish(recipe, "--resume")
    assert losses(running.run) == losses(unbroken) and weights(running.run) == weights(unbroken)


def test_killed_at_random_moments_it_resumes_from_whole_checkpoints(tmp_path, unbroken):
    recipe = recipe_in(tmp_path)
    result = subprocess.run([sys.executable, "-m", "tests.train.kills", str(tmp_path), str(KILLS), os.environ.get("FATHOM_SEED", "1")],
                            env=environment(), capture_output=True, text=True, timeout=SECONDS + 120 * KILLS, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    assert losses(recipe.parent / "run") == losses(unbroken) and weights(recipe.parent / "run") == weights(unbroken)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, unbroken):
    recipe = recipe_in(tmp_path)
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / "recipe.toml").write_text((unbroken / "recipe.toml").read_text().replace(str(unbroken), str(tmp_path / "run")))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:06d}")
    assert newest(tmp_path / "run") < STEPS
    result = fathom("train", recipe, "--resume", "--set", "parallel.accumulate=2")
    assert result.returncode == 0, result.stderr
    assert [step for step, _ in losses(tmp_path / "run")] == [step for step, _ in losses(unbroken)]
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx([loss for _, loss in losses(unbroken)], rel=1e-5)


@pytest.mark.parametrize("count, sizes, says", [
    (2, {"data": 3}, "data 3 x shard 1 x expert 1 x context 1 = 3, but this run has 2 processes"),
    (1, {"expert": 2}, "has 1 process; start it with torchrun --nproc-per-node 2"),
])
def test_sizes_that_do_not_multiply_to_the_processes_are_refused(monkeypatch, count, sizes, says):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    with pytest.raises(RecipeError, match=says), join(Parallel(**sizes)):
        pass


def test_of_many_processes_the_first_one_says_what_is_wrong_with_a_recipe(tmp_path):
    result = subprocess.run(command("train", recipe_in(tmp_path), "--set", "parallel.data=3"), capture_output=True, text=True,
                            env=environment() | {"WORLD_SIZE": "2", "RANK": "1"}, timeout=SECONDS)
    assert result.returncode == 2 and result.stderr == ""


def test_parts_of_rows_that_are_too_short_are_refused():
    config, ranks = small_config([0, 4, 32], sliding_window=16), SimpleNamespace(context_index=0, context_ranks=4)
    PartLayout(config, torch.arange(128).expand(1, -1), torch.tensor([128]), ranks)
    for length in (124, 126):
        with pytest.raises(RecipeError, match=f"sequences of {length} tokens do not part among 4 context ranks"):
            PartLayout(config, torch.arange(length).expand(1, -1), torch.tensor([length]), ranks)
