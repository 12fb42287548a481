"""What an engine may use: memory, queue, prefix cache, drafts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fathom.errors import InputError


@dataclass(frozen=True)
class EngineSettings:
    """Limits of an engine. Sizes in bytes and tokens; InputError names the field that is out of range.

    `window` says at which positions the prefix cache keeps the window state beside the ends of input and output: `full` after every
    block, `periodic` every `interval` tokens, `zero` never (nor at the ends: it is computed again from the entries; report 3.5.2).
    """

    cache_bytes: int = 1 << 30  # blocks in memory, of running requests and of the prefix cache
    running: int = 64  # requests that are computed at the same time
    waiting: int = 256  # requests that wait; more are refused
    prefill_chunk: int = 1024  # tokens of a prompt read at a time
    prefix_cache: bool = True
    window: Literal["full", "periodic", "zero"] = "periodic"
    interval: int = 4096  # tokens
    state_bytes: int = 256 << 20  # window states in memory
    disk: Path | None = None  # folder of the cache on disk; None: none
    disk_bytes: int = 8 << 30
    drafts: int = 0  # tokens that the MTP block proposes at a time
    graphs: bool | None = None  # decode as recorded steps: CUDA graphs, or tapes on a CPU; None: on a CPU where there are no drafts

    def __post_init__(self):
        for name in ("cache_bytes", "running", "waiting", "prefill_chunk", "interval", "disk_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        if self.window not in ("full", "periodic", "zero"):
            raise InputError(f"window is {self.window!r}; allowed: full, periodic, zero")
        if self.state_bytes < 0 or not 0 <= self.drafts <= 8:
            raise InputError(f"state_bytes is {self.state_bytes} and drafts {self.drafts}; allowed: 0 or more, and 0 to 8")
        if self.graphs and self.drafts:
            raise InputError(f"graphs are of one token a step, but drafts is {self.drafts}; use one of the two")
