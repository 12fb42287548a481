"""The process in which reasoning-gym and math-verify run: a request a line on stdin, an answer a line on stdout, in JSON.

Both libraries parse answers with sympy, which may take for ever or evaluate what it reads. So they run here, where a filter of
system calls allows no network and no other program, no file can be written, and the caller can end it. Started by library.py.
"""

import ctypes
import json
import os
import resource
import struct
import sys

try:
    import reasoning_gym
except ImportError:
    reasoning_gym = None
try:
    import math_verify
except ImportError:
    math_verify = None

MEMORY = 4 << 30
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, FILTER_MODE = 22, 38, 2


def confine(filter_code: bytes) -> None:
    """Limits and the filter, for good."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(filter_code, len(filter_code))
    program = struct.pack("@HP", len(filter_code) // 8, ctypes.addressof(code))
    if filter_code and (libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, FILTER_MODE, program, 0, 0)):
        raise OSError(ctypes.get_errno(), "seccomp")


def answer(request: dict) -> object:
    """What a request asks for: a task of a dataset, the score of an answer to it, or whether two answers are equal."""
    if request["do"] == "equal":
        gold, said = (math_verify.parse(f"${request[key]}$") for key in ("gold", "answer"))
        return bool(gold and said and math_verify.verify(gold, said))
    dataset = reasoning_gym.create_dataset(request["dataset"], size=1, seed=request["seed"], **request["settings"])
    entry = dataset[0]
    if request["do"] == "task":
        return {"question": entry["question"], "answer": entry["answer"]}
    return float(dataset.score_answer(request["answer"], entry))


def main() -> None:
    """Answers until stdin ends; an answer that raises is null."""
    confine(bytes.fromhex(sys.argv[1]))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        try:
            result = answer(json.loads(line))
        except Exception:
            result = None
        print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
