"""Programs without network, files, time or memory to waste (report section 5, "sandboxes").

`Sandbox.run` runs Python programs that nobody trusts. One server process (sandbox_server.py) holds a warm interpreter in Linux
namespaces of its own and forks a limited child for each program, so that a program costs milliseconds. Knows nothing of tasks.
"""

import fcntl
import json
import os
import platform
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fathom.align import sandbox_filter
from fathom.errors import FathomError

SERVER = Path(__file__).with_name("sandbox_server.py")
ISOLATIONS = ("namespaces", "limits")
OUT_OF_MEMORY = 71  # as in the server
ATTEMPTS = 2  # of a program during which the server died
START_SECONDS = 300.0


class SandboxError(FathomError):
    """This machine does not permit the isolation that was asked for."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. `output_bytes` bounds each of its output, its errors and its files; `disk_bytes` all files.

    `processes`: 1 forbids new ones and allows some threads; above it, so many of both, each process with the same memory.
    """

    cpu_seconds: int = 2
    wall_seconds: float = 20.0
    memory_bytes: int = 256 << 20
    output_bytes: int = 1 << 20
    disk_bytes: int = 8 << 20
    processes: int = 1


@dataclass(frozen=True)
class Program:
    """A Python program and the text of its standard input."""

    source: str
    stdin: str = ""
    limits: Limits = Limits()


@dataclass(frozen=True)
class Result:
    """How a program ended. `status`: "ok" (exit 0), "error" (another exit), "time", "memory", "output", or "killed" by a signal.

    `exit_code`: the exit status, or minus the signal. `stdout` and `stderr`: what it wrote, at most `output_bytes` of each.
    """

    status: str
    exit_code: int
    stdout: str
    stderr: str
    cpu_seconds: float
    wall_seconds: float

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit status 0."""
        return self.status == "ok"


class Sandbox:
    """Runs programs, up to `workers` at a time; usable from several threads, and as a context manager.

    `isolation`: "namespaces", or where a machine permits none, "limits": limits and the filter of system calls only, which keeps
    programs from the network and from new processes, but not from reading and writing this user's files. Starts at first use.
    """

    def __init__(self, isolation: str = "namespaces", workers: int | None = None):
        if isolation not in ISOLATIONS:
            raise SandboxError(f"isolation is {isolation!r}; expected one of {', '.join(ISOLATIONS)}")
        self.isolation = isolation
        self.workers = workers or os.cpu_count() or 1
        self._lock = threading.Lock()
        self._server: _Server | None = None

    def run(self, programs: Sequence[Program]) -> list[Result]:
        """Run programs and return their results in the same order; SandboxError where there is no sandbox to be had."""
        with self._lock:
            try:
                return self._run(programs)
            except BaseException:  # what still runs would answer the next call
                self._stop()
                raise

    def close(self) -> None:
        """End the server and all that runs in it; the next run starts a new one."""
        with self._lock:
            self._stop()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, programs: Sequence[Program]) -> list[Result]:
        results: list[Result | None] = [None] * len(programs)
        waiting = [(number, ATTEMPTS) for number in reversed(range(len(programs)))]
        running: dict[int, tuple[int, _Files]] = {}
        while waiting or running:
            server = self._started()
            while waiting and len(running) < self.workers:
                number, attempts = waiting.pop()
                running[number] = (attempts, files := _Files(programs[number]))
                server.send(number, programs[number], files)
            answer = server.receive()
            if answer is None:  # the server died: whoever was running gets one more try
                self._stop()
                for number, (attempts, files) in running.items():
                    files.close()
                    if attempts > 1:
                        waiting.append((number, attempts - 1))
                    else:
                        results[number] = Result("killed", -signal.SIGKILL, "", "the sandbox died with it", 0.0, 0.0)
                running.clear()
            else:
                _, files = running.pop(answer["id"])
                results[answer["id"]] = files.result(answer, programs[answer["id"]].limits)
        return results

    def _started(self) -> "_Server":
        if self._server is None or self._server.owner != os.getpid():
            self._server = _Server(self.isolation)
        return self._server

    def _stop(self) -> None:
        server, self._server = self._server, None
        if server is not None and server.owner == os.getpid():
            server.stop()


class _Server:
    """The server process and the socket to it; belongs to the process that made it."""

    def __init__(self, isolation: str):
        self.owner = os.getpid()
        if platform.system() != "Linux":
            raise SandboxError(f"programs can be sandboxed on Linux only, and this is {platform.system()}")
        jail = isolation == "namespaces"
        filters = [sandbox_filter.build(new, signals=jail).hex() if sandbox_filter.supported() else "" for new in (False, True)]
        if not jail and not filters[0]:
            raise SandboxError(f"there is no filter of system calls for {platform.machine()}; isolation 'limits' would be none")
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {"socket": other.fileno(), "jail": jail, "machine": platform.machine(), "filters": filters}
        command = [getattr(sys, "_base_executable", sys.executable), "-I", "-S", str(SERVER), json.dumps(settings)]
        with other:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={}, cwd="/",
                pass_fds=(other.fileno(),), start_new_session=True)
        answer = self.receive(START_SECONDS)
        if answer is None or "error" in answer:
            self.stop()
            why = answer["error"] if answer else self._process.stderr.read().decode(errors="replace").strip()[-200:]
            raise SandboxError(f"no sandbox on this machine ({why}); allow unprivileged user namespaces, or choose isolation "
                               "'limits' where programs may see this user's files")

    def send(self, number: int, program: Program, files: "_Files") -> None:
        """Have a program started; the files are its source, input, output and errors."""
        try:
            request = json.dumps({"id": number, "limits": asdict(program.limits)}).encode()
            socket.send_fds(self._socket, [request], files.numbers)
        except (BrokenPipeError, ConnectionResetError):
            pass  # `receive` will tell

    def receive(self, timeout: float | None = None) -> dict | None:
        """The next answer; None when the server is gone."""
        ready, _, _ = select.select([self._socket], [], [], timeout)
        try:
            text = self._socket.recv(4096) if ready else b""
        except ConnectionResetError:
            text = b""
        return json.loads(text) if text else None

    def stop(self) -> None:
        """Hang up, which ends the server, and wait for that."""
        self._socket.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class _Files:
    """Four files in memory that a program and this process share: source, input, output, errors."""

    def __init__(self, program: Program):
        self.numbers = [os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
                        for name in ("source", "input", "output", "errors")]
        for number, text in zip(self.numbers, (program.source, program.stdin), strict=False):
            with open(number, "wb", closefd=False) as file:
                file.write(text.encode("utf-8", errors="replace"))
            os.lseek(number, 0, os.SEEK_SET)
            fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)

    def result(self, answer: dict, limits: Limits) -> Result:
        """What the program made of them; closes them."""
        written = [os.fstat(number).st_size for number in self.numbers[2:]]
        texts = [os.pread(number, limits.output_bytes, 0).decode("utf-8", errors="replace") for number in self.numbers[2:]]
        self.close()
        code = os.waitstatus_to_exitcode(answer["status"])
        # The kernel's own count, which ended it, runs ahead of the measured time by up to a few tenths of a second.
        if answer["late"] or code == -signal.SIGXCPU or (code == -signal.SIGKILL and answer["cpu"] >= limits.cpu_seconds * 0.5):
            status = "time"
        elif max(written) >= limits.output_bytes:
            status = "output"
        elif code < 0:
            status = "killed"
        else:
            status = {0: "ok", OUT_OF_MEMORY: "memory"}.get(code, "error")
        return Result(status, code, *texts, answer["cpu"], answer["wall"])

    def close(self) -> None:
        """Give the memory back."""
        for number in self.numbers:
            os.close(number)
