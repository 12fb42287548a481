"""Folders that one process at a time works in: the lock holds between processes and ends with them."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fathom.align.domains import Domains
from fathom.align.pipeline import Pipeline, Size, run_pipeline
from fathom.errors import CheckpointError, FathomError
from fathom.files import alone_in

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "pipeline"
HOLD = "import sys, time; from fathom.files import alone_in\nwith alone_in(sys.argv[1]): print('held', flush=True); time.sleep(600)"


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield folder, process
        process.kill()


def test_a_folder_is_held_until_its_process_ends_however_it_ends(held):
    folder, process = held
    with pytest.raises(FathomError, match="another process works in .*run; wait for it or stop it"), alone_in(folder):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with alone_in(folder):
        pass
    with alone_in(folder):
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write to .*file/run: Not a directory"), alone_in(tmp_path / "file" / "run"):
        pass


def test_a_pipeline_refuses_a_folder_where_another_one_works_and_touches_nothing(held):
    folder, _ = held
    with pytest.raises(FathomError, match="another process works in"):
        run_pipeline(Pipeline(str(folder), (Size("flash", "small-flash.json"),)), RECIPES, Domains(), lambda recipe: folder, Console(quiet=True))
    assert [path.name for path in folder.iterdir()] == [".lock"]
