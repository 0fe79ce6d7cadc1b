"""Block manager: reference counts, prefix-cache lookups, LRU eviction."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gristmill.engine import block_manager as module
from gristmill.engine.block_manager import ROOT, BlockManager


def test_a_block_is_allocated_once_until_released() -> None:
    manager = BlockManager(2)
    one, other = manager.allocate(), manager.allocate()
    assert {one, other} == {0, 1} and manager.allocate() is None and manager.num_used_blocks == 2
    assert one is not None
    manager.release([one])
    assert manager.num_free_blocks == 1 and manager.allocate() == one


def test_a_full_block_is_found_by_its_prefix() -> None:
    manager = BlockManager(4)
    first, second = manager.allocate(), manager.allocate()
    assert first is not None and second is not None
    prefix_id = manager.register(first, ROOT, b"a")
    after = manager.register(second, prefix_id, b"b")
    assert manager.lookup(ROOT, b"a") == (first, prefix_id) and manager.lookup(prefix_id, b"b") == (second, after)
    assert manager.lookup(ROOT, b"b") is None, "the same tokens after others are something else"
    same = manager.allocate()
    assert same is not None and manager.register(same, ROOT, b"a") == prefix_id and manager.lookup(ROOT, b"a") == (first, prefix_id)
    manager.release([first, second, same])
    assert manager.num_free_blocks == 4 and manager.lookup(prefix_id, b"b") == (second, after), "evictable blocks are still registered"
    manager.share(second)
    assert manager.num_free_blocks == 3
    manager.reset_prefix_cache()
    assert manager.lookup(ROOT, b"a") is None and manager.num_free_blocks == 3


def test_the_least_recently_used_block_is_evicted_first() -> None:
    manager = BlockManager(3)
    owned = [block for _ in range(3) if (block := manager.allocate()) is not None]
    for block, text in zip(owned, (b"a", b"b", b"c"), strict=True):
        manager.register(block, ROOT, text)
    for block in (owned[1], owned[0], owned[2]):
        manager.release([block])
    assert [manager.allocate() for _ in range(2)] == [owned[1], owned[0]]
    assert manager.lookup(ROOT, b"b") is None and manager.lookup(ROOT, b"c") is not None


def test_memory_is_used_again_before_more_is_touched() -> None:
    manager = BlockManager(10_000)
    for number in range(1000):
        block = manager.allocate()
        assert block is not None and block <= module.MIN_EVICTABLE + 1
        manager.register(block, ROOT, str(number).encode())
        manager.release([block])


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=120))
def test_no_block_has_two_owners_and_none_is_lost(steps: list[tuple[int, int]]) -> None:
    manager = BlockManager(6)
    held: list[list[int]] = []  # a chain of blocks each
    names: dict[int, bytes] = {}
    for action, number in steps:
        if action <= 1:
            block = manager.allocate()
            assert (block is None) == (sum(len(set(h)) for h in [sum(held, [])]) == 6)
            if block is not None:
                assert all(block not in chain for chain in held)
                names.pop(block, None)
                held.append([block])
        elif action == 2 and held:
            manager.release(held.pop(number % len(held)))
        elif action == 3 and held:
            block = held[number % len(held)][0]
            if block not in names:
                key = bytes([number])
                known = manager.lookup(ROOT, key)
                manager.register(block, ROOT, key)
                if known is None:
                    names[block] = key
        elif action == 4:
            hit = manager.lookup(ROOT, bytes([number]))
            if hit is not None:
                assert names[hit[0]] == bytes([number]), "a cached block holds what was asked for"
                manager.share(hit[0])
                held.append([hit[0]])
        assert manager.num_used_blocks == len(np.unique(sum(held, []) or [0])) - (not held)
    for chain in held:
        manager.release(chain)
    assert manager.num_free_blocks == 6
