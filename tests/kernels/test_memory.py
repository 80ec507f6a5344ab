"""Pages and prefixes against plain models of them; and how much memory a sequence takes."""

from __future__ import annotations

import gc
import struct
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forerun.core.embeddings import Encoded
from forerun.core.errors import InternalBug, LeaseLost, PositionLost
from forerun.core.protocol import chunk_ends
from forerun.core.vocabulary import Lease
from forerun.kernels.model.memory import Filling, HiddenRows, MemoryParams, ModelMemory, SequencePool, alone
from forerun.kernels.model.pages import PAGE, Arena, KeyValues
from forerun.kernels.model.prefix import Snapshot, keys
from forerun.kernels.model.recurrent import STORES, StoreName
from forerun.kernels.model.sizes import MIB, PUBLISHED, memory_sizes, table
from forerun.kernels.model.weights import ModelWeights
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.checkpoints import LAYOUTS
from tests.sim.fakes import FakeMaker, FakeMemory, FakeTarget, Rows

BOUNDARY = frozenset({7})


class Arenas(RuleBasedStateMachine):
    """An arena against a counter of references."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(8, 1, 1, 1)
        self.held: list[list[int]] = []

    @precondition(lambda self: self.arena.num_free > 0)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        pages, used = self.arena.take(data.draw(st.integers(1, self.arena.num_free)))
        assert not {page for page in pages if self.arena.trunk[:, :, page].any()} - set(used)  # those never lent hold zeros
        self.arena.clear(used)
        held = {page for each in self.held for page in each}
        assert not held & set(pages)
        assert not self.arena.trunk[:, :, pages].any()  # nothing of a former holder
        self.arena.trunk[:, :, pages] = 1
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.held))
        self.arena.share(pages)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self.arena.give_back(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def counts(self) -> None:
        counts = Counter(page for each in self.held for page in each)
        assert self.arena.num_free == 8 - len(counts)
        self.arena.check_integrity(self.held)


class Pools(RuleBasedStateMachine):
    """A pool of leases whose prompts have beginnings in common: what a lease holds is what the prompt's own chunks would have
    made, nothing is lost, and what was refused would not have fitted."""

    prefix_bytes = 200

    def __init__(self) -> None:
        super().__init__()
        self.target = FakeTarget()
        self.pool = SequencePool(FakeMaker(), MemoryParams(4, 10, self.prefix_bytes, "log", is_archived=True))
        self.leases: dict[int, tuple[Lease, tuple[int, ...], str]] = {}
        self.archived: dict[bytes, Snapshot] = {}

    @rule(data=st.data(), salt=st.sampled_from(["", "a"]), num_tokens=st.integers(1, 300), seed=st.integers(0, 2), rows=st.integers(1, 70))
    def lease(self, data: st.DataObject, salt: str, num_tokens: int, seed: int, rows: int) -> None:
        tokens = tuple((i * 5 + (seed if i > 100 else 0)) % 11 for i in range(num_tokens))
        ends = chunk_ends(tokens, BOUNDARY)
        found = self.pool.lease("someone", Encoded(tokens), ends, num_tokens + 5, rows, salt)
        while found is None and self.archive():
            found = self.pool.lease("someone", Encoded(tokens), ends, num_tokens + 5, rows, salt)
        if found is None:
            needed = -(-(num_tokens + 5 + 1) // PAGE)
            held = {page for number in self.leases for page in self.pool[number].table}
            assert len(self.leases) == 4 or needed > 10 - len(held)
            return
        lease, filling = found
        filling.do()
        assert 1 <= lease.max_rows <= rows
        assert lease.num_cached in (0, *ends[:-1])
        memory: Any = self.pool[lease.number]
        in_use = -(-lease.num_cached // PAGE) * PAGE
        assert not memory.trunk.read(len(memory.table) * PAGE)[..., in_use:, :].any()  # nothing of a former holder
        fresh = FakeMemory(arena := Arena(10, 1, 1, 1), arena.take(10)[0], 640, 1)
        start, logits, expected = 0, None, None
        for end in ends:
            expected = self.target.prefill(Rows(fresh, start, tokens[start:end]), True)
            if end > lease.num_cached:
                logits = self.target.prefill(Rows(memory, start, tokens[start:end]), True)
                if end < num_tokens:
                    memory.keep()
            start = end
        assert memory.states == fresh.states
        assert (memory.trunk.read(num_tokens) == fresh.trunk.read(num_tokens)).all()
        assert (logits == expected).all()  # type: ignore[union-attr]
        self.leases[lease.number] = (lease, tokens, salt)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        lease, tokens, salt = data.draw(st.sampled_from(list(self.leases.values())))
        self.pool.publish(lease.number, tokens, chunk_ends(tokens, BOUNDARY), salt)
        while self.archive():
            pass

    def archive(self) -> bool:
        """What the memory manager does with what the index has no room for."""
        entry = self.pool.prefixes.overdue()
        if entry is not None:
            self.archived[entry.key] = self.pool.prefixes.snapshot(entry)
            self.pool.prefixes.forget(entry)
        return entry is not None

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        """Rows after the prompt never reach what others hold."""
        lease, tokens, _ = data.draw(st.sampled_from(list(self.leases.values())))
        others = {number: self.pool[number].trunk.read(len(prompt)) for number, (_, prompt, _) in self.leases.items()}
        self.target.verify([Rows(self.pool[lease.number], len(tokens), (1,))])
        for number, before in others.items():
            assert (self.pool[number].trunk.read(before.shape[3]) == before).all()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(list(self.leases)))
        del self.leases[number]
        self.pool.release(number)
        with pytest.raises(LeaseLost):
            self.pool[number]
        with pytest.raises(InternalBug):
            self.pool.release(number)

    @precondition(lambda self: self.archived)
    @rule(data=st.data())
    def bring_back(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.archived)))
        self.pool.prefixes.adopt(key, self.archived[key])

    @rule()
    def reset(self) -> None:
        former = list(self.leases)
        self.leases.clear()
        self.pool.reset()
        for number in former:
            self.pool.release(number)  # as a sequence does that has not noticed

    @invariant()
    def is_whole(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len(self.leases)


TestArenas = Arenas.TestCase
TestArenas.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPools = Pools.TestCase


class RoomyPools(Pools):
    """Some blocks can move out of their pages."""

    prefix_bytes = 5_000


TestRoomyPools = RoomyPools.TestCase
TestRoomyPools.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPools.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_lease_the_system_has_no_memory_for_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SequencePool(FakeMaker(), MemoryParams(num_slots=4, num_pages=10, prefix_bytes=0, store="log"))

    def fail(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(FakeMaker, "memory", fail)
        with pytest.raises(MemoryError):
            pool.lease("someone", Encoded((1, 2)), (2,), 10, 1)
    pool.check_integrity()
    assert (pool.num_used, pool.num_pages_free) == (0, 10)


def test_keys_and_values_come_back_in_order_of_position_whatever_the_pages() -> None:
    arena = Arena(6, 2, 3, 4)
    memory = KeyValues(arena.trunk, [4, 1, 5])
    rng = np.random.default_rng(0)
    keys, values = (rng.random((PAGE * 3, 3, 4), np.float32) for _ in range(2))
    for start, end in ((0, 1), (1, 64), (64, 130), (130, PAGE * 3)):
        read = memory.write(1, start, keys[start:end], values[start:end])
        for whole, part in zip((keys, values), read, strict=True):
            np.testing.assert_array_equal(part[:, :end], whole[:end].swapaxes(0, 1))
    np.testing.assert_array_equal(memory.read(100)[:, 1], np.stack([keys, values])[:, :100].swapaxes(1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("store", STORES)
def test_sizes_are_what_is_allocated(weights: ModelWeights, store: StoreName) -> None:
    sizes = memory_sizes(weights.config, 9, store)
    memory = alone(ModelMemory(weights.config), 100, 9, store).recurrent
    num_bytes = sum(getattr(value, "nbytes", 0) for value in vars(memory).values())
    assert num_bytes == sizes.state + sizes.rollback
    arena = ModelMemory(weights.config).arena(3)
    assert arena.trunk.nbytes + arena.mtp.nbytes == 3 * sizes.page


def test_a_log_of_64_rows_of_the_27b_stays_small() -> None:
    log, snapshots = (memory_sizes(PUBLISHED["27B"], 64, store) for store in ("log", "snapshots"))
    assert log.rollback < 122 * MIB
    assert snapshots.rollback > 9 * 1024 * MIB


def test_the_readmes_sizes_are_these() -> None:
    assert table() in (Path(__file__).parents[2] / "README.md").read_text(), "run: python -m forerun.kernels.model.sizes"


def test_a_salt_that_spells_tokens_finds_nobodys_prefix() -> None:
    theirs = (*range(17), 64, *range(18, 80))
    salt = struct.pack("<18q", 19, *theirs[:17]).decode()
    mine = (theirs[18], 64, *theirs[19:64], 80, *theirs[64:])
    for is_by_chunks in (True, False):
        found = {key for _, key in keys(theirs, (19, 64, 80), "", is_by_chunks=is_by_chunks)}
        assert not found & {key for _, key in keys(mine, (64,), salt, is_by_chunks=is_by_chunks)}


def test_what_an_ended_life_left_behind_fills_nobody_elses_pages() -> None:
    pool = SequencePool(FakeMaker(), MemoryParams(2, 4, 10_000, "log"))
    tokens = (1,) * 100

    def lease() -> tuple[Lease, Filling]:
        found = pool.lease("x", Encoded(tokens), (64, 100), 120, 1)
        assert found is not None
        return found

    first, filling = lease()
    filling.do()
    FakeTarget().prefill(Rows(pool[first.number], 0, tokens[:64]), False)
    pool[first.number].keep()
    pool.publish(first.number, tokens, (64, 100))
    pool.release(first.number)
    second, left = lease()
    assert second.num_cached == 64
    assert left.num_bytes > 0
    pool.reset()
    third, filling = lease()
    filling.do()
    before = pool[third.number].trunk.arrays.copy()
    left.do()
    assert (pool[third.number].trunk.arrays == before).all()
    pool.check_integrity()


def test_what_is_still_to_be_moved_out_is_read_from_its_page() -> None:
    pool = SequencePool(FakeMaker(), MemoryParams(2, 3, 10_000, "log"))
    tokens = (1,) * 100
    found = pool.lease("x", Encoded(tokens), (64, 100), 120, 1)
    assert found is not None
    FakeTarget().prefill(Rows(pool[found[0].number], 0, tokens[:64]), False)
    pool[found[0].number].keep()
    pool.publish(found[0].number, tokens, (64, 100))
    pool.release(found[0].number)
    (entry,) = pool.prefixes.entries
    wanted = pool.prefixes.snapshot(entry)
    assert pool.lease("y", Encoded((2,) * 150), (64, 128, 150), 180, 1) is not None  # all three pages
    assert pool.prefixes.num_moving == 1
    np.testing.assert_array_equal(pool.prefixes.snapshot(entry).trunk, wanted.trunk)
    assert pool.lease("z", Encoded((3,) * 10), (10,), 20, 1) is None  # and nothing is moved for nothing


def test_a_new_life_does_not_need_room_for_two() -> None:
    class Narrow(FakeMaker):
        def arena(self, num_pages: int) -> Arena:
            gc.collect()
            assert sum(arena.num_pages for arena in alive) + num_pages <= 5, "there is no room"
            arena = super().arena(num_pages)
            alive.add(arena)
            return arena

    alive: weakref.WeakSet[Arena] = weakref.WeakSet()
    pool = SequencePool(Narrow(), MemoryParams(2, 5, 0, "log"))
    assert pool.lease("x", Encoded((1, 2)), (), 100, 1) is not None
    pool.end()
    assert (pool.num_used, pool.num_pages_free) == (0, 5)
    assert pool.lease("x", Encoded((1, 2)), (), 100, 1) is not None
    pool._arena._references = [0] * 5  # pyright: ignore[reportPrivateUsage] - a wrong count is what a new life puts right
    pool.reset()
    assert (pool.num_used, pool.num_pages_free) == (0, 5)


def test_hidden_rows_are_read_by_position_or_refused() -> None:
    hidden = HiddenRows(2, 8)
    hidden.write(0, np.arange(20, dtype=np.float32).reshape(10, 2)[:8])
    hidden.write(8, np.full((3, 2), 9, np.float32))
    np.testing.assert_array_equal(hidden.read(3, 6)[:, 0], [6, 8, 10, 12, 14, 9])
    for position, count in ((0, 1), (2, 2), (10, 2), (20, 1)):
        with pytest.raises(PositionLost):
            hidden.read(position, count)
