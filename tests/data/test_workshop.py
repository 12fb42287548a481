"""Parts made by processes of their own: they die with the parent, and a dead one is an error, not a wait."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fathom.data.workshop import finished, make_parts
from fathom.errors import DataError
from tests.runs import environment

PARENT = """
import sys
from pathlib import Path
from fathom.data.workshop import make_parts
from tests.data.test_workshop import sleep_for_ever
if __name__ == "__main__":
    make_parts([(Path(sys.argv[1]) / name, sleep_for_ever, ()) for name in "ab"], 2, lambda folders: None)
"""


def sleep_for_ever(folder):
    """A job that says who it is and never ends."""
    folder.with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(10**6)


def die(folder):
    """A job that is killed, as by a machine without memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def complain(folder):
    """A job that meets what a user caused."""
    raise DataError(f"{folder.name} is empty")


def write(folder, text):
    """A job that is done at once."""
    folder.mkdir()
    (folder / "part.json").write_text(text)


def alive(pid):
    """Whether a process runs, other than as a zombie that nobody has asked about yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def test_processes_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py", tmp_path], env=environment() | {"PYTHONPATH": str(root)})
    files = [tmp_path / "a.pid", tmp_path / "b.pid"]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(file.read_text()) for file in files]
    assert all(map(alive, pids))
    parent.kill()
    parent.wait(timeout=300)
    wait_for(lambda: not any(map(alive, pids)))


@pytest.mark.parametrize("job, complaint", [(die, "the process that made a .*out of memory"), (complain, "a is empty")])
def test_what_ends_a_process_ends_the_others_and_is_named(tmp_path, job, complaint):
    with pytest.raises(DataError, match=complaint):
        make_parts([(tmp_path / "a", job, ()), (tmp_path / "b", sleep_for_ever, ())], 2, lambda folders: None)
    if (tmp_path / "b.pid").exists():
        wait_for(lambda: not alive(int((tmp_path / "b.pid").read_text())))


def test_a_part_is_finished_when_it_was_made_from_the_same(tmp_path):
    make_parts([(tmp_path / "a", write, ('{"key": "k"}',)), (tmp_path / "b", write, ('{"key"',))], 1, lambda folders: None)
    assert finished(tmp_path / "a", "k") and not finished(tmp_path / "a", "other")
    assert not finished(tmp_path / "b", "k") and not finished(tmp_path / "c", "k")
