"""Stored prefixes on the host: what is copied, what comes back, what is forgotten, and that no memory is lost.

Keys and values tell all tokens up to their own (see `value_of`), so that a wrong page shows as a wrong number, on the
device and on the host.
"""

from __future__ import annotations

import concurrent.futures
import random
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import paxcache
from driver import config_of, copy_of
from paxcache import _types, offload, prefix
from paxcache.offload import _pages, _policies, _tier
from paxcache.prefix import _tree
from test_prefix import (
    PLAIN,
    TWO,
    WITH_WINDOW,
    T,
    World,
    _forward,
    layer_group,
    random_prompts,
    tenants,
    value_of,
)

PAGE_BYTES = 2 * 4 * 4 * 4  # of a page of `tiered`: keys and values, 4 tokens, head dim 4, float32


class Tiered(World):
    """A world with a host tier, which also knows what every key stands for."""

    def __init__(self, config: paxcache.CacheConfig, num_pages: Any = 100, **options: Any):
        super().__init__(config)
        self.cache = jax.device_put(self.cache, jax.devices()[0])  # or what uses it is compiled twice
        self.tier = offload.init_tier(config, num_pages, **options)
        self.texts: dict[bytes, tuple[Any, list[int]]] = {}

    def publish(self, row: int, **options: Any) -> None:
        super().publish(row, **options)
        self.learn(self.tokens[row], self.keys[row])

    def learn(self, tokens, key: Any = None) -> None:
        names = prefix.page_keys(tokens, page_size=self.size, extra_key=key, epoch=self.index.epoch)
        for n, name in enumerate(names):
            self.texts[name] = (self.index.epoch, key), list(tokens[: (n + 1) * self.size])

    def evict(self, num_pages: int, **options: Any) -> int:
        self.cache, self.index, self.tier, freed = offload.evict(
            self.cache, self.index, self.tier, num_pages, **options
        )
        return freed

    def forget(self, num_pages: int) -> int:
        """Evicts from the device alone."""
        self.cache, self.index, freed = prefix.evict(self.cache, self.index, num_pages)
        return freed

    def prefetch(self, tokens, *, key: Any = None, **options: Any) -> int:
        self.cache, self.index, self.tier, fetched = offload.prefetch(
            self.cache, self.index, self.tier, list(tokens), extra_key=key, **options
        )
        return fetched

    def write_through(self, *prompts, **options: Any) -> None:
        self.tier = offload.write_through(
            self.cache, self.index, self.tier, list(map(list, prompts)), **options
        )

    def reusable(self, tokens, **options: Any) -> int:
        return offload.match(self.index, self.tier, list(tokens), **options)

    def check(self) -> None:
        super().check()
        check_tier(self.tier, self.texts, self.size)


def check_tier(tier: offload.HostTier, texts, page_size: int) -> None:
    """Every account of a tier, its bound, and every number it holds."""
    entries, blocks = dict(_tree.items(tier.entries)), dict(_tree.items(tier.blocks))
    assert {key: (e.epoch, e.tick) for key, e in entries.items()} == {
        key: tick for tick, key in _tree.items(tier.order)
    }
    places = [(g, *slot) for e in entries.values() for g, slot in enumerate(e.slots) if slot is not None]
    assert len(set(places)) == len(places)
    for g, bound in enumerate(tier.capacity):
        mine = {n: b for n, b in blocks.items() if b.group == g}
        assert tier.num_pages[g] == sum(group == g for group, *_ in places)
        assert tier.reserved[g] == sum(b.size for b in mine.values()) <= bound
        for number, block in mine.items():
            live = sum((group, at) == (g, number) for group, at, _ in places)
            assert block.num_live == live > 0 and 2 * live >= block.size
            assert block.size * tier.page_bytes[g] <= max(tier.block_bytes, tier.page_bytes[g])
    assert tier.num_bytes == sum(leaf.nbytes for b in blocks.values() for leaf in jax.tree.leaves(b.pages))
    for key, entry in entries.items():
        context, tokens = texts[key]
        for g, slot in enumerate(entry.slots):
            if slot is None:
                continue
            block = blocks[slot[0]]
            assert block.keys[slot[1]] == key and block.group == g
            wanted = [
                value_of(context, tuple(tokens[: len(tokens) - page_size + n + 1])) for n in range(page_size)
            ]
            for leaf in jax.tree.leaves(block.pages):
                assert leaf.sharding.memory_kind == tier.memory_kind
                found = np.asarray(leaf)[slot[1]]
                np.testing.assert_array_equal(
                    found, np.broadcast_to(np.array(wanted, np.float32)[:, None], found.shape)
                )


def tiered(
    *groups: paxcache.LayerGroup, num_host: Any = 100, block_bytes: int = 2**20, **sizes: Any
) -> Tiered:
    sizes = {"page_size": 4, "num_pages": 24, "max_seqs": 4, "max_pages_per_seq": 8} | sizes
    return Tiered(config_of(*(groups or (layer_group(),)), **sizes), num_host, block_bytes=block_bytes)


def nothing_left(w: Tiered) -> None:
    """All pages of the device are free once rows and index let go."""
    w.release(*range(w.config.max_seqs))
    w.cache, w.index = prefix.reset(w.cache, w.index)
    assert not any(np.asarray(g.ref_counts).any() for g in w.cache.groups)


@pytest.fixture
def copies(monkeypatch) -> dict[str, list[int]]:
    """Sizes of the blocks of all transfers, by direction."""
    sizes: dict[str, list[int]] = {"out": [], "in": []}

    def watched(name, direction, at):
        original = getattr(_pages, name)

        def call(*args):
            sizes[direction] += [len(ids) for ids in args[1]]
            return original(*args)

        monkeypatch.setattr(_pages, name, call)

    watched("copy_out", "out", 1)
    watched("copy_in", "in", 1)
    watched("copy_in_place", "in", 1)
    return sizes


# Removing.


def test_removed_pages_are_forgotten_and_the_others_stay():
    w = tiered()
    prompts = [range(18), [*range(6), *range(50, 60)], range(70, 79)]
    for prompt in prompts:
        w.serve(0, prompt)
    w.evict(100)
    assert w.tier.num_pages == (9,)
    before = w.tier
    keys = [k for p in prompts for k in prefix.page_keys(list(p), page_size=4)]
    w.tier, removed = offload.remove(w.tier, [*keys[4:8], bytes(32), keys[4]])
    assert removed == 4 == w.tier.traffic.pages_forgotten  # the first page is that of both prompts
    w.check()
    assert [w.reusable(p) for p in prompts] == [0, 0, 8]
    w.tier, removed = offload.remove(before, keys[1:4])
    assert removed == 3 and [w.reusable(p) for p in prompts] == [4, 15, 8]
    w.check()
    assert w.prefetch(prompts[1]) == 4 and w.admit(0, prompts[1]) == 15
    w.tier, removed = offload.remove(w.tier, keys)
    assert removed == 6 and w.tier.num_pages == w.tier.reserved == (0,) and w.tier.num_bytes == 0
    w.check()
    assert offload.remove(w.tier, [])[1] == 0


def test_a_cleared_tier_is_empty_and_goes_on():
    w = tiered()
    w.serve(0, range(18))
    w.evict(100)
    old, w.tier = w.tier, offload.clear(w.tier)
    assert w.tier.num_pages == w.tier.reserved == (0,) and w.reusable(range(18)) == 0
    assert w.tier.traffic == offload.Traffic(pages_written=4, pages_forgotten=4)
    w.check()
    check_tier(old, w.texts, w.size)
    w.serve(0, range(18))
    w.evict(100)
    assert w.tier.num_pages == (4,) and w.prefetch(range(18)) == 4
    w.check()


# Write policies.


def test_what_is_evicted_comes_back():
    w = tiered()
    w.serve(0, range(18))
    w.serve(0, [*range(6), *range(50, 60)])
    assert w.evict(100) == 7 and w.index.num_entries == 0 and w.free() == 24
    assert w.tier.num_pages == (7,) and w.reusable(range(18)) == 16
    w.check()
    assert w.prefetch(range(18)) == 4 and w.free() == 20
    w.check()
    assert w.admit(0, range(18)) == 16
    w.compute(0)
    assert w.prefetch([*range(6), *range(50, 60)]) == 3  # the first page is shared and there already
    assert w.admit(1, [*range(6), *range(50, 60)]) == 15
    w.check()
    assert w.tier.traffic == offload.Traffic(pages_written=7, pages_read=7)
    nothing_left(w)


def test_evicting_again_costs_no_transfer(copies):
    w = tiered()
    w.serve(0, range(18))
    for _ in range(3):
        assert w.evict(100) == 4 and w.reusable(range(18)) == 16
        assert w.prefetch(range(18)) == 4 and w.match(range(18)) == 16
        w.check()
    assert copies == {"out": [4], "in": [4, 4, 4]}


def test_one_gather_and_one_transfer_for_a_call_however_scattered(copies):
    w = tiered()
    prompts = [[n, *range(16)] for n in range(5)]
    for row in range(4):
        w.admit(row, prompts[row])
    for upto in (5, 9, 13, 17):  # rows take pages in turn
        for row in range(4):
            w.compute(row, upto)
    for row in range(4):
        w.publish(row)
    w.release(*range(4))
    assert w.evict(100) == 16 and copies == {"out": [16], "in": []}
    w.check()
    for n in range(4):
        assert w.prefetch(prompts[n]) == 4
    assert copies["in"] == [4] * 4  # a quarter of a block each: joined on the host, not a block four times
    w.check()
    copies["in"].clear()
    w.forget(100)
    w.evict(100)
    assert w.prefetch([*prompts[0]]) == 4 and copies == {"out": [16], "in": [4]}


def test_staging_is_bounded(copies):
    w = tiered(block_bytes=3 * PAGE_BYTES)
    w.serve(0, range(32))
    assert w.evict(100) == 8 and copies["out"] == [3, 3, 2]
    assert w.prefetch(range(33)) == 8 and sorted(copies["in"]) == [2, 3, 3]
    w.check()


def test_two_blocks_leave_the_device_at_a_time(monkeypatch):
    w, calls = tiered(block_bytes=2 * PAGE_BYTES), []
    w.serve(0, range(32))
    for module, name in ((_pages, "copy_out"), (jax, "block_until_ready")):
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, n=name, f=right, **k: calls.append(n) or f(*a, **k))
    assert w.evict(100) == 8
    assert calls == ["copy_out"] * 2 + ["block_until_ready", "copy_out"] * 2


def test_large_blocks_are_read_where_they_lie(copies, monkeypatch):
    monkeypatch.setattr(_policies, "_DIRECT_BYTES", 3 * PAGE_BYTES)
    w = tiered()
    w.serve(0, range(30))
    for _ in range(3):
        w.evict(2)  # small blocks
    w.evict(1)
    w.serve(0, range(100, 112))
    w.evict(3)
    copies["in"].clear()
    joined = []
    monkeypatch.setattr(_tier, "gathered", lambda *a, f=_tier.gathered: joined.append(a[1]) or f(*a))
    assert w.prefetch(range(29)) == 7 and copies["in"] == [7] and joined == [7]
    assert w.prefetch(range(100, 113)) == 3 and copies["in"] == [7, 3] and joined == [7]
    w.check()


def test_a_transfer_moves_each_leaf_once():
    """The programs themselves, for keys and values: one gather and one transfer each, one transfer and one scatter."""
    w = tiered(layer_group(num_layers=3))
    pools, ids = (w.cache.groups[0].pages,), (np.arange(5, dtype=np.int32),)
    out = jax.make_jaxpr(lambda p, i: _pages.copy_out(p, i, "pinned_host", "xla"))(pools, ids)
    block = _pages.copy_out(pools, ids, "pinned_host", "xla")
    back = jax.make_jaxpr(lambda p, i, b: _pages.copy_in(p, i, b, "xla"))(pools, ids, block)
    for program, move in ((out, " gather["), (back, " scatter[")):
        text = str(program)
        (transfer,) = (line for line in text.splitlines() if "device_put[" in line)
        assert transfer.count("[5,3,1,4,4]") == 2 == text.count(move)
        assert not any(word in text for word in ("while[", "scan[", "cond["))


def test_write_through(copies):
    w = tiered()
    w.serve(0, range(18))
    w.write_through(range(18))
    assert w.tier.num_pages == (4,) and w.match(range(18)) == 16
    w.serve(0, [*range(16), *range(50, 57)])
    w.write_through(range(18), [*range(16), *range(50, 57)])
    assert copies["out"] == [4, 1]  # what is there already stays
    tier = w.tier
    w.write_through(range(18))
    assert w.tier.order == tier.order and copies["out"] == [4, 1]
    w.check()
    assert w.evict(100) == 5 and copies["out"] == [4, 1]
    assert w.prefetch(range(18)) == 4
    assert w.forget(100) == 4 and w.prefetch(range(18)) == 4
    w.check()


def test_write_through_of_many_prompts_is_one_transfer(copies):
    w = tiered()
    prompts = [[*range(8), n, *range(9)] for n in range(5)]
    for p in prompts:
        w.serve(0, p)
    w.write_through(*prompts)
    assert copies["out"] == [2 + 5 * 2]
    w.check()


def test_write_through_selective():
    w = tiered()
    w.serve(0, range(24))
    w.write_through(range(24), min_hits=1)
    assert w.tier.num_pages == (0,)
    w.serve(0, [*range(8), 77])
    w.write_through(range(24), min_hits=2)
    assert w.tier.num_pages == (0,)
    w.write_through(range(24), min_hits=1)
    assert w.tier.num_pages == (2,)
    w.check()
    assert w.forget(100) == 6 and w.reusable(range(24)) == 8  # what was not written through is gone
    w.serve(0, range(24))
    assert w.evict(100) == 6 and w.reusable(range(25)) == 24  # unless it is written back
    w.check()


def test_a_page_is_written_back_before_it_is_used_anew():
    """The copy is read from the version of the pools that was evicted from, donated or not, waited for or not."""
    config = config_of(
        layer_group(num_layers=2, num_kv_heads=2, head_dim=64), page_size=64, num_pages=40, max_seqs=2,
        max_pages_per_seq=32,
    )  # fmt: skip
    tokens = list(range(64 * 20))

    @jax.jit
    def fill(cache, value):
        groups = [
            _types.GroupCache(
                jax.tree.map(lambda x: jnp.full_like(x, value), g.pages), g.block_tables, g.ref_counts
            )
            for g in cache.groups
        ]
        return paxcache.PagedKVCache(cache.seq_lens, tuple(groups))

    fill = jax.jit(fill, donate_argnums=0)
    for round in range(3):
        cache, index = paxcache.init(config), prefix.init(config)
        tier = offload.init_tier(config, 100, block_bytes=2**18)
        cache, _ = paxcache.extend(cache, jnp.array([len(tokens), 0]), num_tokens=len(tokens))
        cache = fill(cache, 7.0 + round)
        cache, index = prefix.publish(cache, index, 0, tokens)
        cache = paxcache.release(cache, jnp.array([True, False]))
        cache, index, tier, freed = offload.evict(cache, index, tier, 20)
        cache = fill(cache, -1.0)
        assert freed == 20
        old = tier
        cache, index, tier, fetched = offload.prefetch(cache, index, tier, [*tokens, 0], donate=True)
        cache, index, tier, _ = offload.evict(cache, index, tier, 20)
        cache = fill(cache, -2.0)
        assert fetched == 20
        for version in (old, tier):
            for _, block in _tree.items(version.blocks):
                for leaf in jax.tree.leaves(block.pages):
                    np.testing.assert_array_equal(np.asarray(leaf), np.float32(7 + round))


# Room on the host.


def test_the_host_forgets_leaves_first_and_least_recently_used_first():
    w = tiered(num_host=6)
    for n in range(2):
        w.serve(0, [n, *range(1, 12)])
        w.evict(100)
    assert w.tier.num_pages == (6,)
    assert w.prefetch([0, *range(1, 13)]) == 3  # used: now the other one is the older
    w.forget(100)
    w.serve(0, range(50, 58))
    w.evict(100)
    assert w.reusable([0, *range(1, 13)]) == 12 and w.reusable([1, *range(1, 13)]) == 4
    assert w.reusable(range(50, 59)) == 8 and w.tier.num_pages == w.tier.reserved == (6,)
    w.check()
    w.serve(0, range(60, 68))
    w.evict(100)
    # One page would do, but its block would stay: under half of it in use, it is given up for a smaller one.
    assert w.reusable([0, *range(1, 13)]) == 4 and w.reusable([1, *range(1, 13)]) == 0
    assert w.tier.num_pages == w.tier.reserved == (5,)
    w.check()


@pytest.mark.parametrize("num_host", [0, 1, 2, 3])
def test_tiny_hosts(num_host, copies):
    w = tiered(num_host=num_host)
    w.serve(0, range(20))
    assert w.evict(100) == 5
    assert w.tier.num_pages == (num_host,) and w.reusable(range(20)) == num_host * 4
    assert copies["out"] == [num_host] * (num_host > 0)
    w.check()
    assert w.prefetch(range(20)) == num_host
    w.serve(0, range(20))
    w.write_through(range(20))
    assert w.tier.num_pages == (num_host,)
    w.evict(2)
    w.serve(0, range(50, 58))
    w.evict(100)
    w.check()
    if num_host == 0:
        assert w.tier.entries is None and w.tier.order is None
    nothing_left(w)


def test_a_group_without_room_leaves_the_others_alone():
    w = tiered(layer_group(), layer_group(num_layers=2), num_host=(10, 0))
    w.serve(0, range(20))
    assert w.evict(100) == 5 and w.tier.num_pages == (0, 0)
    w.check()


def test_memory_never_passes_the_capacity_and_survivors_are_joined():
    """One page of every block stays in use: they are joined, and no more is copied than was forgotten."""
    w = tiered(num_host=32)
    for n in range(4):
        w.serve(0, [n, *range(1, 32)])
        w.evict(100)
    assert w.tier.reserved == (32,)
    for n in range(4):
        assert w.prefetch([n, *range(1, 6)]) == 1  # the first page of each is used again
    w.forget(100)
    for n in range(1, 4):
        w.serve(0, range(100 * n, 100 * n + 32))
        w.evict(100)
        w.check()
        assert w.reusable(range(100 * n, 100 * n + 33)) == 32
    traffic = w.tier.traffic
    assert 0 < traffic.pages_joined <= traffic.pages_forgotten
    left = [w.reusable([n, *range(1, 32)]) for n in range(4)]
    assert min(left) == 4
    for n in range(4):
        assert w.prefetch([n, *range(1, 32)]) == left[n] // 4
        w.check()


def test_a_page_that_was_forgotten_and_stored_again_is_not_joined_from_its_old_block():
    w = tiered(num_host=6)

    def keep(*prompts, use=()):
        for n in prompts:
            w.serve(0, [n] * 4)
        w.evict(100)
        for n in use:
            assert w.prefetch([n] * 5) == 1
        w.forget(100)
        w.check()

    keep(0, 1, 2, 3)
    keep(4)
    keep(5, use=(1, 2, 3))
    keep(6)  # forgets 0, whose block stays, and 4
    keep(0)  # forgets 5
    assert [w.reusable([n] * 5) for n in range(7)] == [4, 4, 4, 4, 0, 0, 4] and w.tier.reserved == (6,)
    keep(7)  # forgets 1 and 2: their block goes
    assert [w.reusable([n] * 5) for n in range(8)] == [4, 0, 0, 4, 0, 0, 4, 4]
    assert w.tier.reserved == (4,) and w.tier.traffic.pages_joined == 1


def test_old_versions_keep_what_they_had():
    w = tiered(num_host=8)
    w.serve(0, range(32))
    w.evict(100)
    old = w.tier
    w.serve(0, range(50, 82))
    w.evict(100)
    assert w.reusable(range(33)) == 0
    check_tier(old, w.texts, 4)
    w.tier = old
    assert w.prefetch(range(33)) == 8
    w.check()


def test_earlier_epochs_are_not_kept_and_go_first():
    w = tiered(num_host=6)
    w.serve(0, range(8))
    w.evict(100)
    w.serve(0, range(12))
    w.index = prefix.new_epoch(w.index)
    assert w.evict(100) == 3 and w.tier.num_pages == (2,) and w.reusable(range(9)) == 0
    w.serve(0, range(20))
    w.evict(100)
    assert w.reusable(range(21)) == 20 and w.tier.num_pages == (5,)
    w.check()


def test_a_reset_index_finds_what_the_host_has():
    w = tiered()
    w.serve(0, range(12), key="a")
    w.write_through(range(12), extra_keys=["a"])
    w.cache, w.index = prefix.reset(w.cache, w.index)
    assert w.reusable(range(13)) == 0 and w.reusable(range(13), extra_key="a") == 12
    assert w.prefetch(range(13), key="a") == 3 and w.prefetch(range(13)) == 0
    w.check()


# Prefetch.


def test_as_many_as_fit():
    w = tiered(num_pages=8)
    w.serve(0, range(24))
    w.evict(100)
    w.admit(0, range(100, 119))
    w.compute(0)
    assert w.free() == 3 and w.prefetch(range(25)) == 3 and w.free() == 0
    assert w.match(range(25)) == 12 and w.reusable(range(25)) == 24
    assert w.prefetch(range(25)) == 0
    w.check()
    assert w.prefetch(range(25), policy="lru") == 0  # all that could go are its own pages
    w.release(0)
    assert w.prefetch(range(25), max_pages=0) == 0
    assert w.prefetch(range(25), max_pages=1) == 1 and w.match(range(25)) == 16
    assert w.prefetch(range(25), max_pages=7) == 2 and w.match(range(25)) == 24
    w.check()


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru", "priority"])
def test_room_is_made_on_the_device(policy):
    """Others go to the host, never the pages before those that come."""
    w = tiered(num_pages=8)
    w.serve(0, range(24))
    w.evict(4)
    assert w.match(range(25)) == 8
    w.serve(0, range(50, 74))
    assert w.free() == 0
    assert w.prefetch(range(25)) == 0
    assert w.prefetch(range(25), policy=policy) == 4
    assert w.match(range(25)) == 24 and w.reusable(range(50, 75)) == 24
    assert w.index.pins is None
    w.check()
    assert w.prefetch(range(50, 75), policy=policy) == 4 and w.match(range(50, 75)) == 24
    assert w.tier.traffic.pages_written == 4 + 4  # what went the second time was there already
    w.check()


def test_room_is_made_while_the_host_is_full():
    """What comes in is read from the version before, even if the host has to forget it for what goes out."""
    w = tiered(num_pages=8, num_host=8)
    w.serve(0, range(32))
    w.evict(100)
    for n in range(1, 4):
        w.serve(0, range(50 * n, 50 * n + 32))
        before = range(50 * n - 50, 50 * n - 18)
        assert w.prefetch([*before, 0], policy="lru") == 8 and w.match(before) == 32
        assert w.reusable(range(50 * n, 50 * n + 33)) == 32 and w.reusable([*before, 0]) == 32
        w.check()
        w.forget(100)
        assert w.reusable([*before, 0]) == 0  # the host had room for one of them


def test_make_room_serves_what_extend_would_refuse():
    w = tiered(num_pages=8)
    w.serve(0, range(24))
    w.admit(0, range(100, 120))
    lens = jnp.array([16, 0, 0, 0])
    w.cache, w.index, w.tier, freed = offload.make_room(w.cache, w.index, w.tier, lens, num_tokens=T)
    assert freed == 2 and w.tier.num_pages == (2,)
    assert w.compute(0, 16) == paxcache.Status.OK
    w.check()
    unchanged = offload.make_room(w.cache, w.index, w.tier, jnp.zeros(4, jnp.int32), max_query_len=4)
    assert unchanged[3] == 0 and unchanged[2] is w.tier


def test_pages_that_rows_use_stay():
    w = tiered()
    w.serve(0, range(16))
    w.admit(0, [*range(8), 50])
    assert w.evict(100) == 2 and w.match(range(16)) == 8
    assert w.prefetch(range(17)) == 2
    assert w.admit(1, range(17)) == 16
    assert w.evict(100) == 0
    w.compute(0)
    w.compute(1)
    w.check()


def test_what_a_row_computed_again_is_stored_again():
    w = tiered()
    w.serve(0, range(16))
    w.evict(100)
    w.serve(0, range(10))  # without a prefetch
    assert w.match(range(16)) == 8 and w.reusable(range(17)) == 16
    assert w.prefetch(range(17)) == 2
    w.check()


def test_empty_requests_change_nothing():
    w = tiered()
    w.serve(0, range(16))
    state = w.cache, w.index.nodes, w.tier
    assert w.evict(0) == 0
    assert w.prefetch([]) == w.prefetch([1]) == w.prefetch(range(16)) == w.prefetch(range(50, 70)) == 0
    w.write_through()
    w.write_through([])
    w.write_through([1, 2], range(50, 70))
    assert w.reusable([]) == w.reusable([0]) == 0 and w.reusable(range(2)) == 1
    assert all(a is b for a, b in zip(state, (w.cache, w.index.nodes, w.tier), strict=True))


def test_what_uses_the_cache_is_not_compiled_anew():
    w = tiered()
    w.serve(0, range(18))
    programs = _forward._cache_size()  # pyright: ignore
    for donate in (False, True):
        w.evict(100)
        assert w.prefetch(range(18), donate=donate) == 4
        w.serve(0, range(18))
    assert _forward._cache_size() == programs  # pyright: ignore


def test_donated_pools_are_written_in_place():
    w = tiered(layer_group(), layer_group(num_layers=2))
    w.serve(0, range(16))
    w.evict(100)
    kept = copy_of(w.cache)
    cache, _, _, fetched = offload.prefetch(kept, w.index, w.tier, range(17))
    assert fetched == 4 and not kept.groups[0].pages.k.is_deleted()
    old = kept.groups[1].pages.k
    at = old.unsafe_buffer_pointer()
    new, _, _, fetched = offload.prefetch(kept, w.index, w.tier, range(17), donate=True)
    assert fetched == 4 and old.is_deleted() and new.groups[1].pages.k.unsafe_buffer_pointer() == at
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_events_and_worth():
    w = tiered()
    w.cache, w.index = paxcache.init(w.config), prefix.init(w.config, events=True)
    w.serve(0, range(8), priority=3, ttl=5.0)
    w.serve(0, range(16))
    w.evict(2)
    w.index, _ = prefix.take_events(w.index)
    assert w.prefetch(range(17)) == 2
    w.index, (event,) = prefix.take_events(w.index)
    assert isinstance(event, prefix.Stored)
    assert event.keys == prefix.page_keys(range(16), page_size=4)[2:] and event.tokens == tuple(range(8, 16))
    path = prefix.match(w.index, range(16))._path
    assert {(n.priority, n.expires) for n, _ in path[-1:]} <= {(n.priority, n.expires) for n, _ in path[:1]}


def test_versions_may_be_used_by_many_threads():
    w = tiered(num_host=6)
    for n in range(3):
        w.serve(0, [n, *range(15)])
    state = w.cache, w.index, w.tier

    def work(n):
        cache, index, tier, _ = offload.evict(*state, n % 4 + 3)
        cache, index, tier, _ = offload.prefetch(cache, index, tier, [n % 3, *range(16)], policy="lru")
        paxcache.check(cache, held=prefix.held(index))
        check_tier(tier, w.texts, 4)
        return tier.num_pages, tier.reserved, index.num_entries

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(24)))
    assert found[:12] == found[12:]
    assert w.tier is state[2] and w.tier.num_pages == (0,)
    w.check()


def test_pools_over_two_devices(cpu_devices):
    """Blocks keep the pools' sharding, those that are joined on the host too."""
    mesh = jax.sharding.Mesh(np.array(cpu_devices), ("heads",))
    config = config_of(layer_group(num_kv_heads=2), num_pages=8, max_seqs=2, max_pages_per_seq=8)
    cache, index, tier = paxcache.init(config), prefix.init(config), offload.init_tier(config, 6)
    cache, _ = paxcache.extend(cache, jnp.array([16, 0]), num_tokens=16)
    rng = np.random.default_rng(0)

    def place(x, *spec):
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))

    cache = jax.tree.map(place, cache)
    (group,) = cache.groups
    pages = jax.tree.map(
        lambda x: place(rng.normal(size=x.shape).astype(np.float32), None, None, "heads"), group.pages
    )
    cache = _pages.with_pages(cache, (pages,))
    wanted = np.asarray(pages.k)[:, np.asarray(group.block_tables)[0, :4]]
    cache, index = prefix.publish(cache, index, 0, range(16))
    cache = paxcache.release(cache, jnp.array([True, False]))
    for count in (1, 3):
        cache, index, tier, _ = offload.evict(cache, index, tier, count)
    cache, index, tier, fetched = offload.prefetch(cache, index, tier, range(17))
    cache, index, reused = prefix.admit(cache, index, 1, range(17))
    assert (fetched, reused) == (4, 16)
    (group,) = cache.groups
    np.testing.assert_array_equal(np.asarray(group.pages.k)[:, np.asarray(group.block_tables)[1, :4]], wanted)
    for x in (group.pages.k, *(block.pages.v for _, block in _tree.items(tier.blocks))):
        assert x is not None and x.sharding.spec[2] == "heads"


# Windows.


def window_world(**options: Any) -> Tiered:
    return tiered(layer_group(), layer_group(num_layers=2, sliding_window=6), **options)


def test_windows_come_back_with_what_the_next_token_sees():
    w = window_world()
    w.admit(0, range(24))
    w.compute(0, 12)
    w.publish(0)
    w.compute(0)
    w.publish(0)
    w.release(0)
    known = w.index
    for n in (13, 17, 25):
        before = prefix.match(known, range(n), partial=False).num_tokens
        w.evict(100)
        assert w.match(range(n)) == 0 and w.reusable(range(n)) == before
        assert w.prefetch(range(n)) > 0
        w.check()
        assert w.admit(1, range(n), partial=False) == before
        w.compute(1)
        w.check()
        w.release(1)
    # Only what was needed came in: a shorter prompt lacks its window on the device, and gets it from the host.
    assert w.evict(100) and w.prefetch(range(25)) == 6
    short = range(13)
    assert w.match(short) < 12 <= w.reusable(short)
    assert w.prefetch(short) > 0 and w.admit(1, short) == 12
    w.compute(1)
    w.check()
    nothing_left(w)


def test_all_groups_have_windows():
    """Pages that no group kept are still a way to those behind them, and take no memory."""
    w = tiered(layer_group(sliding_window=5), num_host=4)
    w.admit(0, range(30))
    w.compute(0)
    w.publish(0)
    w.release(0)
    found = w.match(range(30), partial=False)
    w.evict(100)
    assert w.tier.num_pages[0] < 7
    assert w.reusable(range(30)) == found > 0 and w.prefetch(range(30)) > 0
    assert w.admit(0, range(30), partial=False) == found
    w.compute(0)
    w.check()
    w.release(0)
    for n in range(50, 400, 50):
        w.serve(0, range(n, n + 30))
        w.evict(100)
        w.check()
        oldest = _tree.first(w.tier.order)
        assert oldest is not None and any(_tree.get(w.tier.entries, oldest[1]).slots)
    nothing_left(w)


# Random programs.


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    config=st.sampled_from([PLAIN, TWO]),
    block=st.sampled_from([1, 2**20]),
    calls=st.lists(st.tuples(random_prompts, tenants, st.integers(0, 3)), min_size=5, max_size=16),
)
def test_with_a_large_host_nothing_is_computed_twice(config, block, calls):
    """A device of 11 pages and its host reuse every full page that was ever stored."""
    w, stored = Tiered(config, 1000, block_bytes=block), set()
    for tokens, key, evicted in calls:
        pages = [(key, *tokens[: n + 2]) for n in range(0, len(tokens) - 1, 2)]
        known = 2 * sum(page in stored for page in pages)
        known = min(known, max(len(tokens) - 1, 0))
        assert w.reusable(tokens, extra_key=key) >= known
        w.prefetch(tokens, key=key, policy="lru")
        assert w.admit(0, tokens, key=key, partial=False) == known // 2 * 2
        lens = jnp.zeros(3, jnp.int32).at[0].set(len(tokens) - known // 2 * 2)
        w.cache, w.index, w.tier, _ = offload.make_room(w.cache, w.index, w.tier, lens, num_tokens=T)
        assert w.compute(0) == paxcache.Status.OK
        w.check()
        w.publish(0)
        w.release(0)
        w.evict(evicted)
        stored |= set(pages)
    w.check()
    assert w.tier.traffic.pages_forgotten == 0


rows = st.integers(0, 2)


class Tiers(RuleBasedStateMachine):
    """A cache, an index and a host tier under fire: every number, count and bound after each call."""

    @initialize(
        config=st.sampled_from([PLAIN, TWO, WITH_WINDOW]),
        num_host=st.sampled_from([0, 1, 4, 9, 40]),
        block=st.sampled_from([1, 200, 2**20]),
    )
    def start(self, config, num_host, block):
        self.world = Tiered(config, num_host, block_bytes=block)
        self.versions: list[offload.HostTier] = []

    @rule(row=rows, tokens=random_prompts, key=tenants, way=st.sampled_from("apprrrr"), ahead=st.booleans())
    def serve(self, row, tokens, key, way, ahead):
        w = self.world
        w.release(row)
        if ahead:
            found = w.reusable(tokens, extra_key=key)
            w.prefetch(tokens, key=key, policy="lru")
            assert w.admit(row, tokens, key=key) <= max(found, 0)
        else:
            w.admit(row, tokens, key=key)
        if way in "pr":
            self.go_on(row, 8)
        if way == "r":
            w.release(row)
        w.check()

    @rule(row=rows, count=st.integers(0, 8))
    def go_on(self, row, count):
        w = self.world
        upto = min(w.lens()[row] + count, len(w.tokens[row]))
        lens = jnp.zeros(3, jnp.int32).at[row].set(max(upto - w.lens()[row], 0))
        w.cache, w.index, w.tier, _ = offload.make_room(w.cache, w.index, w.tier, lens, num_tokens=T)
        w.compute(row, upto)
        w.publish(row)
        w.check()

    @rule(
        tokens=random_prompts,
        key=tenants,
        policy=st.sampled_from([None, "lru", "fifo"]),
        most=st.integers(0, 4),
    )
    def prefetch(self, tokens, key, policy, most):
        w = self.world
        before, wanted = w.match(tokens, extra_key=key), w.reusable(tokens, extra_key=key)
        fetched = w.prefetch(tokens, key=key, policy=policy, max_pages=most or None)
        after = w.match(tokens, extra_key=key)
        assert min(before, len(tokens) - 1) <= after and (fetched > 0 or after == before)
        assert w.reusable(tokens, extra_key=key) <= wanted
        w.check()

    @rule(count=st.sampled_from([0, 1, 2, 4, 11]), keep=st.sampled_from([True, True, True, False]))
    def evict(self, count, keep):
        self.world.evict(count) if keep else self.world.forget(count)
        self.world.check()

    @rule(prompts=st.lists(st.tuples(random_prompts, tenants), max_size=3), min_hits=st.integers(0, 2))
    def write_through(self, prompts, min_hits):
        self.world.write_through(
            *[tokens for tokens, _ in prompts], extra_keys=[key for _, key in prompts], min_hits=min_hits
        )
        self.world.check()

    @rule(parent=rows, child=rows)
    def fork(self, parent, child):
        w = self.world
        w.cache, ok = paxcache.fork(w.cache, jnp.array([parent]), jnp.array([child]))
        if bool(ok[0]) and parent != child and w.lens()[parent] > 0:
            w.tokens[child], w.keys[child] = list(w.tokens[parent]), w.keys[parent]
            w.context[child] = w.context[parent]
            if w.context[parent][0] != w.index.epoch:
                w.release(child)
        w.check()

    @rule(row=rows, length=st.integers(0, 8), tail=st.lists(st.integers(0, 1), max_size=8))
    def truncate(self, row, length, tail):
        w = self.world
        if w.config is WITH_WINDOW or w.lens()[row] == 0:
            return
        length = min(length, w.lens()[row])
        lens = np.full(3, 2**31 - 1, np.int32)
        lens[row] = length
        w.cache = paxcache.truncate(w.cache, jnp.asarray(lens))
        w.tokens[row] = [*w.tokens[row][:length], *tail][:8]
        w.check()

    @rule(what=st.sampled_from(["epoch", "reset", "keep", *["nothing"] * 5]))
    def begin_anew(self, what):
        w = self.world
        if what == "epoch":
            w.release(0, 1, 2)
            w.index = prefix.new_epoch(w.index)
        if what == "reset":
            w.cache, w.index = prefix.reset(w.cache, w.index)
        if what == "keep":
            self.versions.append(w.tier)
        w.check()

    def teardown(self):
        if hasattr(self, "world"):
            for version in self.versions:
                check_tier(version, self.world.texts, self.world.size)
            nothing_left(self.world)


TestTiers = Tiers.TestCase
TestTiers.settings = hypothesis.settings(
    max_examples=25, stateful_step_count=25, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)


def test_a_long_run_loses_nothing():
    """Neither pages nor host memory nor arrays: what lives after many requests is what the last versions hold."""
    rng = random.Random(0)
    w = tiered(num_host=12, num_pages=8, block_bytes=4 * PAGE_BYTES)
    prompts = [[n // 3, *range(8), n, *range(n % 7)] for n in range(12)]
    alive = []
    for n in range(160):
        tokens = rng.choice(prompts)
        w.prefetch(tokens, policy="lru")
        reused = w.admit(0, tokens)
        lens = jnp.array([len(tokens) - reused, 0, 0, 0])
        w.cache, w.index, w.tier, _ = offload.make_room(w.cache, w.index, w.tier, lens, num_tokens=T)
        assert w.compute(0) == paxcache.Status.OK
        w.publish(0)
        w.release(0)
        if n % 3 == 0:
            w.write_through(tokens, min_hits=2)
        w.evict(rng.randrange(4))
        if n % 20 == 19:
            w.check()
            for key in dict(_tree.items(w.tier.entries)):  # none without those before it
                (_, extra), tokens = w.texts[key]
                assert w.reusable([*tokens, -1], extra_key=extra) >= len(tokens)
            alive.append(len(jax.live_arrays()) - 2 * len(list(_tree.items(w.tier.blocks))))
    assert alive[-1] <= min(alive)
    assert w.tier.traffic.pages_forgotten > 50 and w.tier.traffic.pages_read > 100
    assert w.tier.traffic.pages_written - w.tier.traffic.pages_forgotten == w.tier.num_pages[0]
    nothing_left(w)


def test_other_dtypes_come_back_bit_for_bit():
    """Blocks that are joined on the host on their way, of a dtype that NumPy does not have."""
    config = config_of(
        layer_group(dtype=jnp.bfloat16, num_layers=2, v_head_dim=2),
        layer_group(dtype=jnp.float16, v_head_dim=0),
        layer_group(quantization="fp8_e4m3"),
    )
    cache, index = paxcache.init(config), prefix.init(config)
    rng = np.random.default_rng(0)

    def fill(pool):
        return jnp.asarray(rng.integers(0, 256, pool.nbytes, np.uint8).view(pool.dtype).reshape(pool.shape))

    cache, _ = paxcache.extend(cache, jnp.array([16, 0, 0, 0]), num_tokens=16)
    cache = _types.PagedKVCache(
        cache.seq_lens,
        tuple(
            _types.GroupCache(jax.tree.map(fill, g.pages), g.block_tables, g.ref_counts) for g in cache.groups
        ),
    )
    table = np.asarray(cache.groups[0].block_tables[0])
    wanted = [np.asarray(x)[:, table].view(np.uint8) for g in cache.groups for x in jax.tree.leaves(g.pages)]
    cache, index = prefix.publish(cache, index, 0, range(16))
    cache, tier = (
        paxcache.release(cache, jnp.array([True, False, False, False])),
        offload.init_tier(config, 8),
    )
    for _ in range(4):
        cache, index, tier, freed = offload.evict(cache, index, tier, 1)
        assert freed == 1
    cache = paxcache.extend(cache, jnp.array([0, 4, 0, 0]), num_tokens=4)[0]  # so that others are taken
    cache, index, tier, fetched = offload.prefetch(cache, index, tier, range(17))
    assert fetched == 4
    cache, index, reused = prefix.admit(cache, index, 0, range(17))
    table = np.asarray(cache.groups[0].block_tables[0])
    found = [np.asarray(x)[:, table].view(np.uint8) for g in cache.groups for x in jax.tree.leaves(g.pages)]
    assert reused == 16
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_arguments_are_named():
    w, other = tiered(), tiered(layer_group(head_dim=8))
    w.serve(0, range(16))
    state = w.cache, w.index, w.tier
    cases: Any = (
        (TypeError, "config: expected", lambda: offload.init_tier(w.cache, 4)),  # pyright: ignore
        (ValueError, "num_pages must be at least 0", lambda: offload.init_tier(w.config, -1)),
        (ValueError, "num_pages: expected one for each of 1", lambda: offload.init_tier(w.config, (1, 2))),
        (ValueError, "memory_kind: expected", lambda: offload.init_tier(w.config, 4, memory_kind="disk")),
        (ValueError, "block_bytes must be at least 1", lambda: offload.init_tier(w.config, 4, block_bytes=0)),
        (TypeError, "tier: expected", lambda: offload.evict(w.cache, w.index, None, 1)),  # pyright: ignore
        (ValueError, "tier: made for another", lambda: offload.evict(w.cache, w.index, other.tier, 1)),
        (ValueError, "num_pages must be at least 0", lambda: offload.evict(*state, -1)),
        (ValueError, "policy: expected", lambda: offload.evict(*state, 1, policy="best")),  # pyright: ignore
        (ValueError, "give exactly one", lambda: offload.make_room(*state, jnp.zeros(4, jnp.int32))),
        (ValueError, "tokens: expected", lambda: offload.prefetch(*state, np.zeros((2, 2), int))),
        (ValueError, "max_pages must be", lambda: offload.prefetch(*state, [1], max_pages=-1)),
        (ValueError, "min_hits must be", lambda: offload.write_through(*state, [], min_hits=-1)),
        (ValueError, "extra_keys: expected", lambda: offload.write_through(*state, [[1]], extra_keys=[])),
        (TypeError, "cache on the host", lambda: jax.jit(lambda c: offload.evict(c, *state[1:], 1))(w.cache)),
    )
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    assert repr(w.tier) == "HostTier(capacity=(100,), num_pages=(0,), num_bytes=0)"
