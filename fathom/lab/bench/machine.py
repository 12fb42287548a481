"""Which machine, and which state of the source, a measurement belongs to."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2]


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, system; the ceilings' process adds torch and its threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    names = os.sysconf_names if hasattr(os, "sysconf") else {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None
    return {"processor": processor(), "cores": cores, "memory_bytes": memory, "system": platform.platform(),
            "python": platform.python_version()}


def processor() -> str:
    """The processor's name as Linux knows it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit that the package is at, with "-dirty" where files differ from it; None without git."""
    if _git("ls-files", "--", "__init__.py"):
        return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return None


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
