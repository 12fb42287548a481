"""Prompts that begin alike are computed once (report 3.5.2).

Two stores. The chain: every complete block by the hash of all tokens up to its end. Checkpoints: the fixed state (window rings and
compressor tails) after some position, with the unfinished block there. A request starts after the longest checkpoint whose chain
is complete, or reads again the `replay` tokens that rebuild the window, writing no entries; whichever is further. Hashes start from
the tenant, so tenants never share. Both stores may have a second, slower half on disk.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fathom.engine.block_pool import BlockPool
from fathom.engine.disk_cache import DiskCache
from fathom.engine.paged_cache import PagedCache
from fathom.engine.scheduler import Start

HASH_BYTES = 16
_ATTEMPTS = 4  # at finding a start, where what the disk lists cannot be read


class Mark(NamedTuple):
    """Names a position: the hash of its complete blocks, the tokens behind them, and those tokens' hash."""

    chain: bytes
    tail: int
    digest: bytes

    @property
    def name(self) -> str:
        """The checkpoint's name on disk."""
        return (self.chain + self.tail.to_bytes(4, "big") + self.digest).hex()

    @classmethod
    def named(cls, name: str) -> "Mark":
        """The inverse of `name`."""
        raw = bytes.fromhex(name)
        return cls(raw[:HASH_BYTES], int.from_bytes(raw[HASH_BYTES:HASH_BYTES + 4], "big"), raw[HASH_BYTES + 4:])


class Found(NamedTuple):
    """Where a request can start, with what state (None: the empty one), and after how many tokens its prompt left a known one."""

    start: Start
    state: dict[str, Tensor] | None
    junction: int


class PrefixCache:
    """Finds and keeps blocks of `pool` and states of `cache`; at most `state_bytes` of the latter in memory."""

    def __init__(self, cache: PagedCache, pool: BlockPool, replay: int, state_bytes: int, disk: DiskCache | None = None):
        self.cache, self.pool, self.replay, self.state_bytes, self.disk = cache, pool, replay, state_bytes, disk
        self.block_tokens = cache.block_tokens
        self.held_bytes = 0
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._states: OrderedDict[Mark, dict[str, Tensor]] = OrderedDict()
        self._marks: dict[bytes, set[Mark]] = {}  # by chain; in memory or on disk
        for name in disk.keys("state") if disk is not None else ():
            self._note(Mark.named(name))

    @staticmethod
    def root(tenant: str) -> bytes:
        """Where the hashes of a tenant's prompts start."""
        return hashlib.blake2b(tenant.encode(), digest_size=HASH_BYTES, person=b"fathom tenant").digest()

    def extend(self, hashes: list[bytes], tokens: Sequence[int]) -> None:
        """Continue the hashes, root first, over all complete blocks of the tokens."""
        for end in range(len(hashes) * self.block_tokens, len(tokens) + 1, self.block_tokens):
            block = array("q", tokens[end - self.block_tokens:end]).tobytes()
            hashes.append(hashlib.blake2b(hashes[-1] + block, digest_size=HASH_BYTES).digest())

    def find(self, hashes: list[bytes], tokens: Sequence[int]) -> Found:
        """The best start for these tokens, the last of which is always computed; its blocks are held for the caller."""
        limit = len(tokens) - 1
        for _ in range(_ATTEMPTS):
            known = 0
            while known < min(limit // self.block_tokens, len(hashes) - 1) and self._knows(hashes[known + 1]):
                known += 1
            frozen = known * self.block_tokens
            mark, position = self._best_mark(hashes, tokens, known, limit)
            replayed = frozen - self.replay
            if max(position, replayed) <= 0:
                return Found(Start(0, 0, []), None, frozen)
            state = self._state(mark) if position >= replayed else None
            if state is None and position >= replayed:
                continue  # it was damaged, or evicted on disk
            blocks = self._hold(hashes[1:known + 1])
            if len(blocks) == known:
                return Found(Start(max(position, replayed), frozen, blocks), state, frozen)
            self.pool.release(blocks)
        return Found(Start(0, 0, []), None, 0)

    def restore(self, found: Found, slot: int, blocks: Sequence[int]) -> None:
        """Put the state that was found into a slot, and the unfinished block that belongs to it into the sequence's own."""
        if found.state is None:
            self.cache.clear_state(slot)
            return
        self.cache.write_state(slot, {name[6:]: part for name, part in found.state.items() if name.startswith("state.")})
        page = {name[5:]: part for name, part in found.state.items() if name.startswith("page.")}
        if page and found.start.computed >= found.start.frozen:
            self.cache.write_block(blocks[found.start.computed // self.block_tokens], page)

    def keep_blocks(self, hashes: list[bytes], blocks: Sequence[int], begin: int, end: int) -> None:
        """Complete blocks number `begin` up to `end` of a sequence can be found from now on."""
        for index in range(begin, end):
            name, block = hashes[index + 1], blocks[index]
            if name not in self._block_of:
                self._block_of[name], self._hash_of[block] = block, name
                self.pool.know(block)
            if self.disk is not None and not self.disk.contains("block", name.hex()):
                self.disk.put("block", name.hex(), self.cache.read_block(block))

    def keep_state(self, hashes: list[bytes], tokens: Sequence[int], computed: int, slot: int, blocks: Sequence[int]) -> None:
        """A checkpoint of a sequence as it stands, after `computed` tokens."""
        mark = self._mark(hashes, tokens, computed)
        if mark in self._states:
            self._states.move_to_end(mark)
            return
        state = {f"state.{name}": part for name, part in self.cache.read_state(slot).items()}
        if mark.tail:
            state |= {f"page.{name}": part for name, part in self.cache.read_block(blocks[computed // self.block_tokens]).items()}
        self._remember(mark, state)
        if self.disk is not None and not self.disk.contains("state", mark.name):
            self.disk.put("state", mark.name, state)

    def has_state(self, hashes: list[bytes], tokens: Sequence[int], position: int) -> bool:
        """Whether there is a checkpoint after so many of these tokens."""
        mark = self._mark(hashes, tokens, position)
        return mark in self._marks.get(mark.chain, ())

    def forget(self, block: int) -> None:
        """The pool gave a block up."""
        del self._block_of[self._hash_of.pop(block)]

    def _mark(self, hashes: list[bytes], tokens: Sequence[int], position: int) -> Mark:
        whole = position // self.block_tokens
        tail = tokens[whole * self.block_tokens:position]
        return Mark(hashes[whole], len(tail), hashlib.blake2b(array("q", tail).tobytes(), digest_size=HASH_BYTES - 4).digest())

    def _best_mark(self, hashes: list[bytes], tokens: Sequence[int], known: int, limit: int) -> tuple[Mark | None, int]:
        for whole in range(known, -1, -1):
            for mark in sorted(self._marks.get(hashes[whole], ()), key=lambda mark: -mark.tail):
                position = whole * self.block_tokens + mark.tail
                if position <= limit and self._mark(hashes, tokens, position) == mark:
                    return mark, position
        return None, 0

    def _knows(self, name: bytes) -> bool:
        return name in self._block_of or self.disk is not None and self.disk.contains("block", name.hex())

    def _hold(self, names: Sequence[bytes]) -> list[int]:
        """Hold the blocks of a chain, reading from disk what is not in memory; fewer where one cannot be had."""
        in_memory = {name for name in names if name in self._block_of}
        for name in in_memory:
            self.pool.hold(self._block_of[name])
        blocks, missing = [], len(names)
        for index, name in enumerate(names):
            if name not in self._block_of and not self._load(name):
                missing = index
                break
            blocks.append(self._block_of[name])
        self.pool.release([self._block_of[name] for name in names[missing:] if name in in_memory])
        return blocks

    def _load(self, name: bytes) -> bool:
        record = self.disk.get("block", name.hex()) if self.pool.available and self.disk is not None else None
        if record is None:
            return False
        block, = self.pool.take(1, room=4)
        self.cache.write_block(block, record[0])
        self._block_of[name], self._hash_of[block] = block, name
        self.pool.know(block)
        return True

    def _state(self, mark: Mark) -> dict[str, Tensor] | None:
        if mark in self._states:
            self._states.move_to_end(mark)
            return self._states[mark]
        record = self.disk.get("state", mark.name) if self.disk is not None else None
        if record is None:
            self._drop(mark)
            return None
        self._remember(mark, record[0])
        return record[0]

    def _remember(self, mark: Mark, state: dict[str, Tensor]) -> None:
        self._states[mark] = state
        self._note(mark)
        self.held_bytes += _nbytes(state)
        while self.held_bytes > self.state_bytes and self._states:
            oldest, gone = self._states.popitem(last=False)
            self.held_bytes -= _nbytes(gone)
            if self.disk is None or not self.disk.contains("state", oldest.name):
                self._drop(oldest)

    def _note(self, mark: Mark) -> None:
        self._marks.setdefault(mark.chain, set()).add(mark)

    def _drop(self, mark: Mark) -> None:
        marks = self._marks.get(mark.chain, set())
        marks.discard(mark)
        if not marks:
            self._marks.pop(mark.chain, None)


def _nbytes(state: dict[str, Tensor]) -> int:
    return sum(part.nbytes for part in state.values())
