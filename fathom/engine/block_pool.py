"""Which cache blocks are free, shared, or kept for later: numbers only, the tensors lie in paged_cache.

A block is free, held by one or more sequences, or kept: known to the prefix cache and held by nobody. Kept blocks are given up, least
recently released first, when free ones run out.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

_FREE, _TAKEN = 1, 0


class BlockPool:
    """`blocks` blocks, all free at first. `forget` is told of each kept block that is given up."""

    def __init__(self, blocks: int, forget: Callable[[int], None] = lambda block: None):
        self.blocks, self._forget = blocks, forget
        self._map = bytearray([_FREE]) * blocks
        self._free, self._next = blocks, 0  # the next run starts behind the last one's room
        self._holders = [0] * blocks
        self._known: set[int] = set()
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that could be taken now."""
        return self._free + len(self._kept)

    @property
    def kept(self) -> int:
        """Blocks that only the prefix cache needs."""
        return len(self._kept)

    def take(self, count: int, after: int | None = None, room: int = 0) -> list[int]:
        """So many blocks for one holder: behind block `after` if they are free, else in one run with `room` to grow if there is one.

        The caller has seen that they are available.
        """
        while self._free < count:
            block, _ = self._kept.popitem(last=False)
            self._known.discard(block)
            self._forget(block)
            self._set_free(block)
        taken: list[int] = []
        while len(taken) < count:
            wanted = count - len(taken)
            place = taken[-1] + 1 if taken else None if after is None else after + 1
            if place is None or place >= self.blocks or self._map[place] != _FREE:
                runs = (self._map.find(bytes([_FREE]) * size, begin)
                        for size, begin in ((wanted + room, self._next), (wanted + room, 0), (wanted, 0), (1, 0)))
                place = next(begin for begin in runs if begin >= 0)
                self._next = place + wanted + room
            run = 1
            while run < wanted and place + run < self.blocks and self._map[place + run] == _FREE:
                run += 1
            taken += range(place, place + run)
            self._map[place:place + run] = bytes([_TAKEN]) * run
        self._free -= count
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, block: int) -> None:
        """One more holder of a held or kept block."""
        self._holders[block] += 1
        self._kept.pop(block, None)

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less; of blocks released together, the last is given up first."""
        for block in reversed(list(blocks)):
            self._holders[block] -= 1
            if self._holders[block] == 0 and block in self._known:
                self._kept[block] = None
            elif self._holders[block] == 0:
                self._set_free(block)

    def know(self, block: int) -> None:
        """The prefix cache can find this held block: keep it when its holders leave."""
        self._known.add(block)

    def holders(self, block: int) -> int:
        """How many sequences hold it."""
        return self._holders[block]

    def _set_free(self, block: int) -> None:
        self._map[block] = _FREE
        self._free += 1
