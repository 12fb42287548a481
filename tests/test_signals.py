"""fathom.signals: interrupts at the moment in which a process is started, the one that no sleep in a test hits."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from fathom.signals import child_process, interrupts_held, termination_as_interrupt

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def interrupted_start(monkeypatch):
    """`Popen` that is interrupted when its process has begun, before it returns: by SIGINT, or by the `signals` named. The processes."""
    begun = []

    class Interrupted(subprocess.Popen):
        signals = (signal.SIGINT,)

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            begun.append(self)
            for number in self.signals:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    yield begun
    for process in begun:
        process.kill()
        process.wait()


def test_an_interrupt_while_a_process_starts_ends_it(interrupted_start):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), child_process(SLEEPER):
        pytest.fail("the block ran")
    assert [process.returncode for process in interrupted_start] == [-signal.SIGKILL]
    assert signal.getsignal(signal.SIGINT) is before


def test_termination_too_where_it_interrupts(interrupted_start, monkeypatch):
    monkeypatch.setattr(subprocess.Popen, "signals", (signal.SIGTERM,))
    with termination_as_interrupt():
        with pytest.raises(KeyboardInterrupt), child_process(SLEEPER):
            pytest.fail("the block ran")
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    assert [process.returncode for process in interrupted_start] == [-signal.SIGKILL]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_process_ends_with_its_block(error):
    with pytest.raises(error), child_process(SLEEPER) as process:
        raise error
    assert process.returncode == -signal.SIGKILL
    with child_process([sys.executable, "-c", "raise SystemExit(3)"]) as process:
        process.wait()
    assert process.returncode == 3


def test_a_process_that_cannot_start_leaves_the_handlers():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(FileNotFoundError), child_process(["/nowhere/at/all"]):
        pytest.fail("the block ran")
    assert signal.getsignal(signal.SIGINT) is before


def test_ignored_signals_stay_ignored_and_other_threads_start_processes_too():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_held() as answer:
            os.kill(os.getpid(), signal.SIGINT)
            answer()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    codes = []

    def work():
        with child_process([sys.executable, "-c", "raise SystemExit(4)"]) as process:
            process.wait()
        codes.append(process.returncode)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [4]
