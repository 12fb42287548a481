"""Blocks and queues on integers: nothing leaks, nothing is shared by mistake, everyone gets through."""

from collections import Counter

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fathom.engine.block_pool import BlockPool
from fathom.engine.scheduler import Place, Scheduler, Start

BLOCK, BLOCKS, SLOTS = 4, 12, 3


class Life(RuleBasedStateMachine):
    """Sequences come, grow, fork, leave; a toy prefix cache keeps whole blocks of what was computed."""

    def __init__(self):
        super().__init__()
        self.known: dict[int, int] = {}  # block -> its place in a common prefix
        self.pool = BlockPool(BLOCKS, self.forget)
        self.parked = []
        self.scheduler = Scheduler(self.pool, SLOTS, BLOCK, self.parked.append)

    def forget(self, block):
        del self.known[block]  # KeyError if it was never kept

    def find(self, place):
        by_place = {index: block for block, index in self.known.items()}
        blocks = []
        while len(blocks) in by_place and (len(blocks) + 1) * BLOCK < place.length:
            blocks.append(by_place[len(blocks)])
            self.pool.hold(blocks[-1])
        return Start(len(blocks) * BLOCK, len(blocks) * BLOCK, blocks)

    @rule(length=st.integers(1, BLOCKS * BLOCK - 1))
    def add(self, length):
        self.scheduler.add(Place(length))

    @rule()
    def admit(self):
        place = self.scheduler.admit(self.find)
        if place is not None:
            assert place.slot >= 0 and len(place.blocks) * BLOCK > place.length and place.computed < place.length

    @precondition(lambda self: self.scheduler.running)
    @rule(pick=st.integers(0, 99), tokens=st.integers(1, 6), keep=st.booleans())
    def advance(self, pick, tokens, keep):
        place = self.scheduler.running[pick % len(self.scheduler.running)]
        end = min(place.length + tokens, BLOCKS * BLOCK)
        before = len(self.scheduler.running)
        if self.scheduler.grow(place, end):
            assert len(place.blocks) * BLOCK >= end
            place.length = max(place.length, end)
            place.computed = end - 1
            for index, block in enumerate(place.blocks[:place.computed // BLOCK]):
                if keep and index not in self.known.values() and block not in self.known:
                    self.known[block] = index
                    self.pool.know(block)
        else:
            assert place is self.scheduler.waiting[0] and place.computed == 0
        assert len(self.scheduler.running) + len(self.parked) >= before

    @precondition(lambda self: self.scheduler.running)
    @rule(pick=st.integers(0, 99))
    def fork(self, pick):
        place = self.scheduler.running[pick % len(self.scheduler.running)]
        twin = self.scheduler.fork(place)
        if twin is not None:
            whole = place.computed // BLOCK
            assert twin.blocks[:whole] == place.blocks[:whole] and not set(twin.blocks[whole:]) & set(place.blocks)

    @precondition(lambda self: self.scheduler.running or self.scheduler.waiting)
    @rule(pick=st.integers(0, 99))
    def leave(self, pick):
        everyone = [*self.scheduler.running, *self.scheduler.waiting]
        self.scheduler.leave(everyone[pick % len(everyone)])

    @invariant()
    def holders_are_those_who_have_it(self):
        held = Counter(block for place in self.scheduler.running for block in place.blocks)
        assert all(self.pool.holders(block) == held[block] for block in range(BLOCKS))
        assert self.pool.available == BLOCKS - len(held)
        assert all(len(set(place.blocks)) == len(place.blocks) for place in self.scheduler.running)

    @invariant()
    def only_whole_computed_blocks_are_shared(self):
        held = Counter(block for place in self.scheduler.running for block in place.blocks)
        for place in self.scheduler.running:
            unfinished = place.blocks[max(place.computed, place.frozen) // BLOCK:]
            assert all(held[block] == 1 for block in unfinished)

    @invariant()
    def slots_are_exclusive(self):
        slots = [place.slot for place in self.scheduler.running]
        assert len(set(slots)) == len(slots) and len(slots) + self.scheduler.free_slots == SLOTS
        assert all(place.slot == -1 and not place.blocks for place in self.scheduler.waiting)

    def teardown(self):
        """With nobody new, all who wait get their turn."""
        for _ in range(1000):
            while self.scheduler.admit(self.find) is not None:
                pass
            if not self.scheduler.running:
                break
            self.scheduler.leave(self.scheduler.running[0])
        assert not self.scheduler.running and not self.scheduler.waiting and self.pool.available == BLOCKS


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_blocks_of_one_sequence_lie_together_and_room_is_left_to_grow():
    pool = BlockPool(20)
    first, second = pool.take(3, room=4), pool.take(3, room=4)
    assert first == [0, 1, 2] and second == [7, 8, 9]
    assert pool.take(2, after=2) == [3, 4] and pool.take(2, after=9) == [10, 11]
    assert pool.take(8) == [12, 13, 14, 15, 16, 17, 18, 19] and pool.take(2) == [5, 6]


def test_blocks_kept_for_later_are_given_up_last_used_last_and_from_the_end():
    gone = []
    pool = BlockPool(6, gone.append)
    old, new = pool.take(3), pool.take(3)
    for block in old + new:
        pool.know(block)
    pool.release(old)
    pool.release(new)
    assert pool.kept == 6 and pool.available == 6
    pool.take(4)
    assert gone == [*reversed(old), new[-1]]


def test_the_latest_arrival_gives_way():
    pool, parked = BlockPool(6), []
    scheduler = Scheduler(pool, 4, 4, parked.append)
    places = [Place(4), Place(4)]
    for place in places:
        scheduler.add(place)
    while scheduler.admit(lambda place: Start(0, 0, [])) is not None:
        pass
    assert scheduler.grow(places[0], 17) and parked == [places[1]] and scheduler.waiting[0] is places[1]
    assert scheduler.admit(lambda place: Start(0, 0, [])) is None  # it waits until someone leaves
    scheduler.leave(places[0])
    assert scheduler.admit(lambda place: Start(0, 0, [])) is places[1]
