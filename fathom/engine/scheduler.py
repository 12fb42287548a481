"""Who is computed next, and with which memory: integers only.

Sequences wait in order of arrival, run once a slot and blocks for all their known tokens are there, and when blocks run out the
latest arrival goes back to the head of the queue.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from fathom.engine.block_pool import BlockPool


@dataclass(eq=False)
class Place:
    """Where one sequence stands: tokens known and computed, how many of them have entries already, and its memory."""

    length: int
    arrival: int = 0
    computed: int = 0
    frozen: int = 0
    slot: int = -1
    blocks: list[int] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Known tokens that are not computed."""
        return self.length - self.computed


class Start(NamedTuple):
    """Where a sequence can begin: after `computed` tokens, with `blocks` held for it, whose entries are there up to `frozen` tokens."""

    computed: int
    frozen: int
    blocks: list[int]


class Scheduler:
    """Queues and memory of all sequences. `park` is told of a sequence before it loses its memory to others."""

    def __init__(self, pool: BlockPool, slots: int, block_tokens: int, park: Callable[[Place], None] = lambda place: None):
        self.pool, self.block_tokens, self._park = pool, block_tokens, park
        self.waiting: deque[Place] = deque()
        self.running: list[Place] = []
        self.preemptions = 0
        self._slots = sorted(range(slots), reverse=True)
        self._arrivals = 0
        self._stuck = False

    @property
    def free_slots(self) -> int:
        """Sequences that could be started if there are blocks."""
        return len(self._slots)

    def add(self, place: Place) -> None:
        """Put a sequence at the end of the queue."""
        self._arrivals += 1
        place.arrival = self._arrivals
        self.waiting.append(place)

    def admit(self, find: Callable[[Place], Start]) -> Place | None:
        """Start the sequence at the head of the queue where `find` says, if its memory is there; None if not."""
        if not self.waiting or not self._slots or self._stuck:
            return None
        place = self.waiting[0]
        start = find(place)
        needed = self._blocks_for(place.length + 1) - len(start.blocks)
        spare = len(self.running)  # a block to grow for each that runs
        if self.pool.available < needed + spare:
            self.pool.release(start.blocks)
            self._stuck = bool(self.running)
            return None
        self.waiting.popleft()
        place.computed, place.frozen = start.computed, start.frozen
        place.blocks = [*start.blocks, *self.pool.take(max(needed, 0), start.blocks[-1] if start.blocks else None, room=4)]
        self._run(place)
        return place

    def restart(self, place: Place, start: Start) -> None:
        """A running sequence of which nothing was computed since it was admitted begins where `start` says instead, further on."""
        self.pool.release(place.blocks)
        own = self._blocks_for(place.length + 1) - len(start.blocks)
        place.blocks = [*start.blocks, *self.pool.take(own, start.blocks[-1] if start.blocks else None, room=4)]
        place.computed, place.frozen = start.computed, start.frozen

    def fork(self, place: Place) -> Place | None:
        """A second sequence that goes on from where `place` stands, sharing its whole blocks; None if the memory is not there.

        The last, unfinished block is the caller's to copy.
        """
        whole = place.computed // self.block_tokens
        needed = self._blocks_for(place.length + 1) - whole
        if not self._slots or self.pool.available < needed + len(self.running):
            return None
        for block in place.blocks[:whole]:
            self.pool.hold(block)
        self._arrivals += 1
        twin = Place(place.length, self._arrivals, place.computed, place.frozen,
                     blocks=[*place.blocks[:whole], *self.pool.take(needed, room=4)])
        self._run(twin)
        return twin

    def grow(self, place: Place, tokens: int) -> bool:
        """Make room for so many computed tokens; False if the sequence itself had to give way."""
        needed = self._blocks_for(tokens) - len(place.blocks)
        while place.slot >= 0 and self.pool.available < needed:
            self._preempt(max(self.running, key=lambda other: other.arrival))
        if place.slot >= 0 and needed > 0:
            place.blocks += self.pool.take(needed, place.blocks[-1] if place.blocks else None)
        return place.slot >= 0

    def leave(self, place: Place) -> None:
        """Forget a sequence, waiting or running, and free its memory."""
        if place.slot >= 0:
            self._stop(place)
            self._stuck = False
        elif place in self.waiting:
            self._stuck = self._stuck and place is not self.waiting[0]
            self.waiting.remove(place)

    def _run(self, place: Place) -> None:
        place.slot = self._slots.pop()
        self.running.append(place)

    def _preempt(self, place: Place) -> None:
        self._park(place)
        self._stop(place)
        place.computed = place.frozen = 0
        self.waiting.appendleft(place)
        self.preemptions += 1
        self._stuck = True  # until someone leaves, or it would come and go

    def _stop(self, place: Place) -> None:
        self.running.remove(place)
        self._slots.append(place.slot)
        self._slots.sort(reverse=True)  # low slots first: slots that lie together are read without copying
        self.pool.release(place.blocks)
        place.slot, place.blocks = -1, []
        if not self.running:
            self._stuck = False

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)
