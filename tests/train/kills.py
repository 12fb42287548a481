"""Kills both ranks of a run at random moments, resumes it, again and again: python -m tests.train.kills FOLDER COUNT SEED.

Ranks are forked from one process that has imported everything, which makes a start cheap. They meet at a store of this process.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from fathom.recipe import load
from fathom.train.pretrain import Pretrain, pretrain

RANKS, EVERY = 2, 5


def start(recipe: Path, resume: bool) -> list[int]:
    """Process ids of the ranks of a run."""
    pipes, pids = [os.pipe() for _ in range(RANKS)], []
    for rank, (read, _) in enumerate(pipes):
        pid = os.fork()
        if not pid:
            port = os.read(read, 16).decode()
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost",
                           "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
            code = 1
            try:
                pretrain(load(Pretrain, recipe, [f"parallel.data={RANKS}"]), recipe.parent, resume, Console(quiet=True))
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    start.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # after the forks: it has a thread
    for _, write in pipes:
        os.write(write, str(start.store.port).encode())
    for pipe in pipes:
        for end in pipe:
            os.close(end)
    return pids


def end(pids: list[int]) -> list[int]:
    """The exit codes."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    del start.store
    return codes


def newest(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max([int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*")], default=0)


def partial(run: Path) -> set[Path]:
    """Folders of checkpoints that are not complete."""
    return set((run / "checkpoints").glob(".step-*"))


def steps_done(run: Path) -> int:
    """Lines of training in the metrics."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def wait(pids: list[int], condition) -> bool:
    """Whether the condition came before the end of a rank."""
    while not condition():
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids):
            return False
        time.sleep(0.002)
    return True


def main() -> None:
    """Kill COUNT times, then let the run end."""
    folder, count, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(sys.argv[3])
    recipe, run, kills, writing = folder / "recipe.toml", folder / "run", 0, 0
    steps = load(Pretrain, recipe).schedule.steps
    while kills < count:
        before = newest(run)
        if not 0 < before < steps - EVERY:
            shutil.rmtree(run, ignore_errors=True)
            before = 0
        left, inode = partial(run), (run / "metrics.jsonl").stat().st_ino if (run / "metrics.jsonl").exists() else None
        pids, at = start(recipe, before > 0), min(before + rng.randrange(1, 2 * EVERY), steps - 1)
        while_writing = rng.random() < 0.4
        found = wait(pids, lambda: partial(run) - left if while_writing else (
            (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_ino != inode and steps_done(run) >= at))
        time.sleep(rng.random() * 0.04)
        torn = bool(partial(run) - left)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        codes = end(pids)
        assert found or 0 in codes, f"a rank ended by itself before kill {kills + 1}: {codes}"
        done = steps_done(run)
        kills, writing = kills + 1, writing + torn
        print(f"kill {kills}: from {before}, {done} steps done, newest checkpoint {newest(run)}{', one being written' if torn else ''}", flush=True)
        assert newest(run) >= (done - 1) // EVERY * EVERY, "a checkpoint is lost"
    codes = end(start(recipe, newest(run) > 0)) if newest(run) else None
    if codes is None:
        shutil.rmtree(run, ignore_errors=True)
        codes = end(start(recipe, False))
    assert codes == [0] * RANKS, codes
    assert not partial(run), "what was left unfinished is still there"
    print(f"{kills} kills, {writing} while a checkpoint was written", flush=True)


if __name__ == "__main__":
    main()
