"""The process inside the sandbox: jails itself once, then forks one limited child for each program it is told to run.

Started by sandbox.py as a script of its own in a bare interpreter, so it imports the standard library only. Its file system is a
read-only copy of the standard library's folder and, for each program, an empty /tmp; its network has no interface. It is handed
file descriptors and never reads a program or its output: what one program could find in this process's memory is no other's.
"""

# Modules that programs often use are loaded here, once for all of them.
import array, base64, bisect, collections, contextlib, copy, csv, datetime, decimal, enum, fractions, functools  # noqa: E401, F401
import hashlib, heapq, io, itertools, math, numbers, operator, random, re, statistics, string, textwrap, traceback  # noqa: E401, F401
import typing, unicodedata  # noqa: E401, F401

import ctypes
import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import sysconfig
import threading
import time
import types

NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
JAIL = NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18, 1 << 19)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER_MODE = 1, 4, 22, 38, 2
CALLS = {"x86_64": (155, 126), "aarch64": (41, 91)}  # pivot_root, capset
CAPABILITIES_VERSION = 0x20080522
NOBODY = 65534
THREADS = 16  # of one program, where the limit of processes is not higher
OUT_OF_MEMORY = 71  # exit status of a program that ended with MemoryError
REQUEST_BYTES = 65536
LIBC = ctypes.CDLL(None, use_errno=True)


def check(value: int, what: str) -> int:
    """The value, or OSError with what was attempted."""
    if value < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return value


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    kind_bytes = kind.encode() if kind else None
    check(LIBC.mount(source.encode(), target.encode(), kind_bytes, flags, options.encode()), f"mount {target}")


def enter_namespaces(flags: int, proc: int, uid: int, gid: int, inside: int) -> None:
    """New namespaces, with this process as user `inside` of them; `proc` is an open /proc."""
    check(LIBC.unshare(flags), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(file, text.encode())
        os.close(file)


def build_root(pivot_call: int) -> None:
    """A root that holds the standard library's folder, read-only, and an empty /tmp; nothing of the host's is left."""
    library, root = sysconfig.get_paths()["stdlib"], "/tmp"
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    source = os.open(library, os.O_PATH)
    mount("root", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.makedirs(root + library)
    os.makedirs(root + "/tmp", exist_ok=True)
    mount(f"/proc/self/fd/{source}", root + library, None, MS_BIND)
    os.close(source)
    mount("none", root + library, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    for packages in ("site-packages", "dist-packages"):  # what was installed is no part of the library
        if os.path.isdir(f"{root}{library}/{packages}"):
            mount("none", f"{root}{library}/{packages}", "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV, "size=4k")
    os.chdir(root)
    check(LIBC.syscall(pivot_call, b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", MNT_DETACH), "umount")
    os.chdir("/")
    mount("none", "/", None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, "size=1m,mode=755")


def enter_jail(pivot_call: int) -> tuple[int, int]:
    """This process, and what it forks from now on, in namespaces of its own; returns /proc and its pid namespace, open.

    Started by root, it first builds the root and then becomes nobody: limits do not bind root.
    """
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    if os.getuid() == 0:
        check(LIBC.unshare(NEWNS), "unshare")
        build_root(pivot_call)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # a change of user hides /proc/self from its owner
        enter_namespaces(JAIL, proc, NOBODY, NOBODY, 0)
        mount("none", "/", None, MS_REC | MS_SLAVE)
    else:
        enter_namespaces(JAIL, proc, os.getuid(), os.getgid(), 0)
        build_root(pivot_call)
    if child := os.fork():  # the namespace of processes begins with a child, and ends with it
        os.waitpid(child, 0)
        os._exit(0)
    return proc, os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc)


def fork(jail: tuple[int, int] | None) -> int:
    """os.fork, the child as first process of a new pid namespace: when it ends, so does all it has started."""
    if jail is None:
        return os.fork()
    check(LIBC.unshare(NEWPID), "unshare")
    try:
        child = os.fork()
    except OSError:
        child = -1
    if child:
        check(LIBC.setns(jail[1], NEWPID), "setns")
    if child < 0:
        raise OSError(errno.EAGAIN, "fork")
    return child


def confine(jail: tuple[int, int] | None, limits: dict, filter_code: bytes, capset_call: int) -> None:
    """The last steps before a program: file descriptors 0, 1 and 2 only, a /tmp of its own, limits, no privileges, the filter."""
    if jail is not None:
        enter_namespaces(NEWUSER | NEWNS | NEWIPC, jail[0], 0, 0, 1000)
        mount("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, f"size={limits['disk_bytes']},nr_inodes=1000,mode=777")
        os.chdir("/tmp")
    os.closerange(3, 4096)
    cpu = max(1, limits["cpu_seconds"])
    bounds = {
        resource.RLIMIT_CPU: cpu, resource.RLIMIT_AS: limits["memory_bytes"], resource.RLIMIT_FSIZE: limits["output_bytes"],
        resource.RLIMIT_NOFILE: 32, resource.RLIMIT_NPROC: max(THREADS, limits["processes"]), resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0, resource.RLIMIT_MSGQUEUE: 0}
    for what, bound in bounds.items():
        resource.setrlimit(what, (bound, bound))
    if jail is not None:
        header = struct.pack("=Ii", CAPABILITIES_VERSION, 0)
        check(LIBC.syscall(capset_call, header, bytes(24)), "capset")
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if filter_code:
        code = ctypes.create_string_buffer(filter_code, len(filter_code))
        program = struct.pack("@HP", len(filter_code) // 8, ctypes.addressof(code))
        check(LIBC.prctl(PR_SET_SECCOMP, FILTER_MODE, program, 0, 0), "seccomp")


def run_program(source: str) -> int:
    """Run a program as the main module and return its exit status."""
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode, encoding="utf-8", errors="replace") for fd, mode in
                                         ((0, "r"), (1, "w"), (2, "w")))
    sys.argv, status = ["program.py"], 0
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    random.seed(0)
    try:
        exec(compile(source, "program.py", "exec"), main.__dict__)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except MemoryError:
        status = OUT_OF_MEMORY
    except BaseException:
        status = 1
        traceback.print_exc(limit=-3)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return status & 255


def child(jail: tuple[int, int] | None, request: dict, files: list[int], filter_code: bytes, capset_call: int) -> None:
    """All that a forked child does; `files` are the program, its input, its output and its errors."""
    status = 1
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # where there is no jail that ends with the server
        os.setsid()  # no signal to its own process group may reach the server
        signal.set_wakeup_fd(-1)
        for number, kind in enumerate((files[1], files[2], files[3])):
            os.dup2(kind, number + 100)
        with open(files[0], encoding="utf-8", closefd=False) as file:
            source = file.read()
        for number in range(3):
            os.dup2(number + 100, number)
        confine(jail, request["limits"], filter_code, capset_call)
        status = run_program(source)
    except MemoryError:
        status = OUT_OF_MEMORY
    finally:
        os._exit(status)


def serve(channel: socket.socket, jail: tuple[int, int] | None, filters: list[bytes], capset_call: int) -> None:
    """Answer requests until the other side is gone. One packet a message; a request carries four open files."""
    wake, wake_write = os.pipe()
    for end in (wake, wake_write):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    running: dict[int, tuple[int, float, float]] = {}  # process -> request, start, deadline
    late: set[int] = set()
    while True:
        now = time.monotonic()
        for process, (_, _, deadline) in running.items():
            if deadline <= now and process not in late:
                late.add(process)
                os.kill(process, signal.SIGKILL)  # in a jail, all that it has started goes with it
        waits = [deadline - now for process, (_, _, deadline) in running.items() if process not in late]
        ready, _, _ = select.select([channel, wake], [], [], max(0.0, min(waits)) if waits else None)
        if channel in ready:
            text, files, _, _ = socket.recv_fds(channel, REQUEST_BYTES, 4)
            if not text:
                return
            request = json.loads(text)
            process = fork(jail)
            if process == 0:
                child(jail, request, files, filters[request["limits"]["processes"] > 1], capset_call)
            for file in files:
                os.close(file)
            running[process] = (request["id"], time.monotonic(), time.monotonic() + request["limits"]["wall_seconds"])
        if wake in ready:
            os.read(wake, 4096)
            for process in list(running):
                done, status, usage = os.wait4(process, os.WNOHANG)
                if done:
                    number, start, _ = running.pop(process)
                    answer = {"id": number, "status": status, "late": process in late, "wall": time.monotonic() - start,
                              "cpu": usage.ru_utime + usage.ru_stime}
                    late.discard(process)
                    channel.send(json.dumps(answer).encode())


def main() -> None:
    """Argument: JSON with the socket's number, whether to jail, the machine's name and the two filters in hex."""
    settings = json.loads(sys.argv[1])
    channel = socket.socket(fileno=settings["socket"])
    pivot_call, capset_call = CALLS.get(settings["machine"], (-1, -1))
    try:
        jail = enter_jail(pivot_call) if settings["jail"] else None
    except OSError as error:
        channel.send(json.dumps({"error": str(error)}).encode())
        return
    gc.freeze()  # what is loaded now stays shared between all children
    channel.send(json.dumps({"ready": True}).encode())
    serve(channel, jail, [bytes.fromhex(text) for text in settings["filters"]], capset_call)


if __name__ == "__main__":
    main()
