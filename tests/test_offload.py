"""Pages and rows that go to the host come back bit for bit; refused calls change nothing; pools stay in place."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import paxcache
from driver import config_of, copy_of
from layouts import LAYOUTS, assert_same, bits, group, ids, with_random_bits
from paxcache import offload, prefix
from paxcache._types import Pages
from paxcache.offload import _pages
from test_in_place import _HOST, assert_in_place, cache_shapes, shape, text_of
from test_in_place import config as big_config

S, M, B = 4, 4, 4


QUANTIZED = config_of(group(quantization="int8"), group(quantization="int4", v_head_dim=0))
each_layout = pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS)


def filled(config: paxcache.CacheConfig, lens, seed: int = 0) -> paxcache.PagedKVCache:
    """Rows of these lengths over pages of random bits. They take pages in turn, so that each has scattered ones."""
    cache = with_random_bits(paxcache.init(config), seed)
    for start in range(0, max(lens), S):
        step = jnp.array([min(max(n - start, 0), S) for n in lens])
        cache, result = paxcache.extend(cache, step, max_query_len=S)
        result.raise_if_failed()
    return cache


def row_content(cache: paxcache.PagedKVCache, row: int):
    """What a row holds, by column: its length, its holes, and the bits of its pages in every group and leaf."""
    content = [int(cache.seq_lens[row])]
    for g in cache.groups:
        table = np.asarray(g.block_tables[row])
        content.append((table >= 0).tolist())
        for pool in jax.tree.leaves(g.pages):
            content.append(bits(pool)[:, table[table >= 0]].tolist())
    return content


def used(cache) -> list[int]:
    return [int((g.ref_counts > 0).sum()) for g in cache.groups]


# Pages.


@each_layout
def test_pages_come_back_bit_for_bit(config):
    cache = filled(config, (13, 6, 0, 0))
    names = tuple(jnp.asarray(np.r_[np.flatnonzero(g.ref_counts)[::-1], -1]) for g in cache.groups)
    extent = offload.swap_out(cache, names)
    for leaf in jax.tree.leaves(extent.blocks):
        assert leaf.sharding.memory_kind == "pinned_host"
    target = with_random_bits(paxcache.init(config), seed=1)
    before = copy_of(target)
    target, found, ok = offload.swap_in(target, extent)
    assert ok
    for old, blank, new, source, place in zip(
        cache.groups, before.groups, target.groups, *jax.device_get((names, found)), strict=True
    ):
        assert place[-1] == -1
        assert sorted(place[:-1]) == list(range(len(place) - 1))
        untouched = np.setdiff1d(np.arange(new.ref_counts.shape[0]), place)
        for a, b, c in zip(*(jax.tree.leaves(x.pages) for x in (old, blank, new)), strict=True):
            np.testing.assert_array_equal(bits(a)[:, source[:-1]], bits(c)[:, place[:-1]])
            np.testing.assert_array_equal(bits(b)[:, untouched], bits(c)[:, untouched])
    paxcache.check(target, held=tuple(np.bincount(p[p >= 0], minlength=g.ref_counts.shape[0])
                                      for p, g in zip(map(np.asarray, found), target.groups, strict=True)))  # fmt: skip
    target = offload.drop(target, found)
    paxcache.check(target)
    assert used(target) == [0] * len(config.layer_groups)


def test_source_and_destination_are_not_swapped():
    """Page 1 goes out and lands in page 5, the only free one: neither id may stand for the other."""
    config = config_of(num_pages=6)
    cache = filled(config, (16, 4, 0, 0))
    marked = jnp.broadcast_to(jnp.arange(6.0)[None, :, None, None, None], cache.groups[0].pages.k.shape)
    pages = Pages(marked, -marked)
    cache = dataclasses.replace(cache, groups=(dataclasses.replace(cache.groups[0], pages=pages),))
    extent = offload.swap_out(cache, ids(1))
    assert np.unique(extent.blocks[0].k).tolist() == [1]
    cache, found, ok = offload.swap_in(cache, extent)
    assert ok and found[0].tolist() == [5]
    assert cache.groups[0].pages.k[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 1]
    assert cache.groups[0].pages.v is not None
    assert cache.groups[0].pages.v[0, :, 0, 0, 0].tolist() == [0, -1, -2, -3, -4, -1]


def test_swap_in_is_atomic_over_groups():
    """Enough pages in one group and too few in the other: neither gives any."""
    config = config_of(group(num_pages=12), group(num_pages=5))
    cache = filled(config, (12, 0, 0, 0))
    extent = offload.swap_out(cache, (ids(0, 1, 2), ids(0, 1, 2)))
    after, found, ok = offload.swap_in(cache, extent)
    assert not ok
    assert all((np.asarray(f) == -1).all() for f in found)
    assert_same(after, cache)
    after, found, ok = offload.swap_in(cache, offload.swap_out(cache, (ids(0, 1, 2), ids(-1, 2))))
    assert ok and found[1].tolist() == [-1, 3]


def test_empty_requests_do_nothing():
    """An empty list is not all pages."""
    config = LAYOUTS["groups"]
    cache = filled(config, (13, 6, 0, 0))
    for nothing in (ids(), ids(-1, -1), ids(10, 2**30, -(2**31))):
        extent = offload.swap_out(cache, (nothing, nothing))
        assert not any(h.any() for h in extent.held)
        after, found, ok = offload.swap_in(cache, extent)
        assert ok and all((np.asarray(f) == -1).all() for f in found)
        assert_same(after, cache)
    host = offload.init(config, 8)
    for nothing in (ids(), ids(-1), ids(2), ids(3, -1, -1)):
        after, account, ticket = offload.preempt(cache, host, nothing)
        assert ticket.ok
        assert_same((after, account), (cache, host))
        after, account, ok = offload.resume(cache, host, ticket, jnp.full(nothing.shape, -1, jnp.int32))
        assert ok
        assert_same((after, account), (cache, host))


def test_pages_of_nobody_are_not_copied():
    cache = filled(config_of(), (4, 0, 0, 0))
    assert offload.swap_out(cache, ids(0, 1)).held[0].tolist() == [True, False]


def test_extent_outlives_what_happens_to_its_pages():
    """The pools are given away and overwritten at once, whether the pages have left or not."""
    (group_,) = with_random_bits(paxcache.init(config_of(num_pages=2000))).groups
    group_ = dataclasses.replace(group_, ref_counts=jnp.ones(2000, jnp.int32))
    cache = paxcache.PagedKVCache(jnp.zeros(B, jnp.int32), (group_,))
    names = jnp.arange(1700)[::-1]
    kept = jax.tree.map(lambda x: bits(x)[:, names].swapaxes(0, 1), group_.pages)
    overwrite = jax.jit(lambda c: with_pages_of(c, lambda x: x * 0 + 1), donate_argnums=0)
    for by_layer in (False, True):
        given = copy_of(cache)
        extent = offload.swap_out(given, names, by_layer=by_layer)
        overwrite(given)
        (blocks,) = extent.blocks
        blocks = jax.tree.map(lambda *x: np.stack(x, axis=1), *blocks) if by_layer else blocks
        for block, wanted in zip(jax.tree.leaves(blocks), jax.tree.leaves(kept), strict=True):
            np.testing.assert_array_equal(bits(block), wanted)


def test_outside_jit_no_program_holds_a_large_transfer(monkeypatch):
    """It would hold up what is launched after it until the pages have left. Inside a caller's jit it has to."""
    cache, host = filled(config_of(), (9, 4, 0, 0)), offload.init(config_of(), 9)
    gathered, right = [], _pages._gather
    monkeypatch.setattr(_pages, "_gather", lambda *args: gathered.append(right(*args)) or gathered[-1])
    for by_layer, most in itertools.product((False, True), (_pages.ONE_PROGRAM_BYTES, 0)):
        gathered.clear()
        monkeypatch.setattr(_pages, "ONE_PROGRAM_BYTES", most)
        extent = offload.swap_out(cache, ids(0, 1), by_layer=by_layer)
        ticket = offload.preempt(cache, host, ids(0), by_layer=by_layer)[2]
        for (before, _), after in zip(gathered, (extent.blocks, ticket.extent.blocks), strict=True):
            for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True):
                assert a.sharding.memory_kind == ("pinned_host" if most else "device")
                assert b.sharding.memory_kind == "pinned_host"
    inside = jax.jit(functools.partial(offload.swap_out, by_layer=True))(cache, ids(0, 1))
    assert_same(inside, extent)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(inside.blocks)} == {"pinned_host"}


def test_chosen_layers_leave_and_come_back():
    """Two layers of three, in two groups; what came to the others meanwhile stays."""
    config = LAYOUTS["groups"]
    cache = filled(config, (13, 6, 0, 0))
    held = [np.flatnonzero(g.ref_counts) for g in cache.groups]
    (whole, other) = names = (jnp.asarray([*held[0][1::-1], -1]), jnp.asarray(held[1][:2]))
    extent = offload.swap_out(cache, names, layers=[1, (1, 0)])
    by_layer = offload.swap_out(cache, names, by_layer=True)
    assert extent.blocks[0][0] is None
    assert_same((extent.blocks[0][1], extent.blocks[1]), (by_layer.blocks[0][1], by_layer.blocks[1]))
    later = with_random_bits(cache, seed=4)
    for swap_in in (offload.swap_in, jax.jit(offload.swap_in)):
        after, found, ok = swap_in(later, extent, page_ids=names)
        assert ok
        assert_same(found, names)
        for old, new, source, page_ids, chosen in zip(
            later.groups, after.groups, cache.groups, (whole[:2], other), ([1], [0]), strict=True
        ):
            assert_same(new.ref_counts, old.ref_counts)
            for a, b, c in zip(*(jax.tree.leaves(g.pages) for g in (old, new, source)), strict=True):
                wanted = bits(a).copy()
                for layer in chosen:
                    wanted[layer, page_ids] = bits(c)[layer, page_ids]
                np.testing.assert_array_equal(bits(b), wanted)
    begun, arrival, found, ok = offload.begin_swap_in(cache, extent)
    assert ok
    with pytest.raises(ValueError, match="layer: 0 has landed already, or is none of those"):
        offload.land(begun, 0, arrival)
    after, _ = offload.land(*offload.land(begun, 1, arrival)[:1], 2, offload.land(begun, 1, arrival)[1])
    assert_same(after, offload.swap_in(cache, extent)[0])


def test_given_pages_are_somebodys_and_named_once():
    cache = filled(config_of(), (9, 0, 0, 0))
    extent = offload.swap_out(cache, ids(0, -1, 1))
    for given, fits in (
        (ids(2, 7, 1), True),
        (ids(2, 2, 1), True),
        (ids(1, -1, 1), False),
        (ids(0, -1, 3), False),
        (ids(0, -1, -1), False),
        (ids(0, -1, 10), False),
    ):
        after, found, ok = offload.swap_in(cache, extent, page_ids=given)
        assert ok == fits
        if fits:
            assert found[0].tolist() == [2, -1, 1]
        else:
            assert_same((after, found[0]), (cache, ids(-1, -1, -1)))


EXHAUSTED = "RESOURCE_EXHAUSTED: Out of host memory while trying to allocate 512 bytes."


def exhausted(*_, **__):
    raise jax.errors.JaxRuntimeError(EXHAUSTED)


@pytest.mark.parametrize("within", [True, False], ids=["in the program", "outside"])
def test_pinned_memory_that_is_not_there_is_named(within, monkeypatch):
    """With the bytes that were wanted and the variable that bounds them; other errors stay what they are."""
    config = config_of()
    cache, host = filled(config, (8, 0, 0, 0)), offload.init(config, 4)
    tier, index = offload.init_tier(config, 4), prefix.init(config)
    cache, index = prefix.publish(cache, index, 0, range(8))
    calls = {
        "swap_out": lambda **kind: offload.swap_out(cache, ids(0, 1), **kind),
        "preempt": lambda: offload.preempt(cache, host, ids(0)),
        "write_through": lambda: offload.write_through(cache, index, tier, [range(8)]),
        "sleep": lambda **kind: offload.sleep(cache, **kind),
    }
    num_bytes = 2 * 2 * 2 * 4 * 4 * 4  # two pages of two layers, keys and values, float32
    if within:
        monkeypatch.setattr(_pages, "_gather", exhausted)
    else:
        monkeypatch.setattr(_pages, "ONE_PROGRAM_BYTES", 0)
        right = jax.device_put

        def device_put(tree, place=None, **options):
            named = any(getattr(x, "memory_kind", None) in offered for x in jax.tree.leaves(place))
            return exhausted() if named else right(tree, place, **options)

        offered = [memory.kind for memory in jax.devices()[0].addressable_memories()]
        monkeypatch.setattr(jax, "device_put", device_put)
    for call in calls.values():
        with pytest.raises(MemoryError, match=f"no room for {num_bytes} bytes of pinned host memory") as info:
            call()
        assert "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB" in str(info.value) and EXHAUSTED in str(info.value)
        assert isinstance(info.value.__cause__, jax.errors.JaxRuntimeError)
    for name in ("swap_out", "sleep") if within else ():
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            calls[name](memory_kind="device")


def with_pages_of(cache, change):
    groups = [dataclasses.replace(g, pages=jax.tree.map(change, g.pages)) for g in cache.groups]
    return dataclasses.replace(cache, groups=tuple(groups))


# Rows.


@pytest.mark.parametrize(("layout", "jitted"), [*((name, False) for name in LAYOUTS), ("groups", True)])
def test_rows_come_back_bit_for_bit(layout, jitted):
    """Into other rows, over recycled pages, while the other rows keep theirs."""
    config = LAYOUTS[layout]
    preempt = jax.jit(offload.preempt) if jitted else offload.preempt
    resume = jax.jit(offload.resume) if jitted else offload.resume
    cache = filled(config, (13, 6, 5, 0))
    old = [row_content(cache, b) for b in range(B)]
    before = used(cache)
    host = offload.init(config, 20)
    cache, host, ticket = preempt(cache, host, ids(2, -1, 0))
    assert ticket.ok
    paxcache.check(cache)
    assert cache.seq_lens.tolist() == [0, 6, 0, 0]
    assert row_content(cache, 1) == old[1]
    assert [a + b for a, b in zip(used(cache), host.used.tolist(), strict=True)] == before
    cache, step = paxcache.extend(cache, jnp.array([0, 0, 7, 0]), num_tokens=7)
    step.raise_if_failed()
    noise = with_random_bits(
        cache, seed=2
    )  # whatever the freed pages hold now; the ticket has its own copies
    cache = dataclasses.replace(noise, seq_lens=cache.seq_lens)
    cache = paxcache.release(cache, jnp.array([False, False, True, False]))
    cache, host, ok = resume(cache, host, ticket, ids(0, -1, 3))
    assert ok
    paxcache.check(cache)
    assert host.used.tolist() == [0] * len(config.layer_groups)
    assert row_content(cache, 0) == old[2]
    assert row_content(cache, 3) == old[0]


def test_shared_pages_are_copied_and_kept():
    """Rows 0 and 1 share all pages; 0 goes, 1 stays; then both go on one ticket and are shared again."""
    config = config_of()
    cache = filled(config, (13, 0, 0, 0))
    cache, ok = paxcache.fork(cache, ids(0), ids(1))
    old = row_content(cache, 0)
    host = offload.init(config, 4)
    alone, account, ticket = offload.preempt(cache, host, ids(0))
    paxcache.check(alone)
    assert account.used.tolist() == [4] and used(alone) == [4]
    assert row_content(alone, 1) == old
    alone, account, ok = offload.resume(alone, account, ticket, ids(2))
    assert ok and used(alone) == [8] and row_content(alone, 2) == old
    paxcache.check(alone)

    both, account, ticket = offload.preempt(cache, host, ids(1, 0))
    assert ticket.ok and account.used.tolist() == [4] and used(both) == [0]
    both, account, ok = offload.resume(both, account, ticket, ids(3, 2))
    assert ok and used(both) == [4]
    assert row_content(both, 2) == row_content(both, 3) == old
    paxcache.check(both)


def test_pages_with_references_from_outside_stay():
    config = config_of()
    cache = filled(config, (8, 0, 0, 0))
    extent = offload.swap_out(cache, ids(0))
    cache, found, _ = offload.swap_in(cache, extent)
    host = offload.init(config, 4)
    cache, host, _ = offload.preempt(cache, host, ids(0))
    paxcache.check(cache, held=np.bincount(found[0], minlength=10))
    assert used(cache) == [1]


def test_holes_stay_holes():
    """A window gave pages back, and a row was cut and extended: tables keep their columns."""
    config = config_of(group(sliding_window=5))
    cache = filled(config, (16, 0, 0, 0))
    assert (np.asarray(cache.groups[0].block_tables[0]) >= 0).tolist() == [False, False, True, True]
    old = row_content(cache, 0)
    cache, host, ticket = offload.preempt(cache, offload.init(config, 2), ids(0))
    assert ticket.ok and host.used.tolist() == [2]
    cache, host, ok = offload.resume(cache, host, ticket, ids(1))
    assert ok and row_content(cache, 1) == old
    paxcache.check(cache)


def refused_preemptions():
    return {
        "host full": (3, ids(0), None),
        "host full for two": (5, ids(0, 1), None),
        "no host": (0, ids(0), None),
        "ticket too small": (20, ids(0), 3),
        "row out of range": (20, ids(0, B), None),
        "row below -1": (20, ids(0, -2), None),
        "row twice": (20, ids(0, 1, 0), None),
    }


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("case", refused_preemptions())
def test_refused_preemption_changes_nothing(case, jitted):
    capacity, rows, bound = refused_preemptions()[case]
    config = LAYOUTS["groups"]
    preempt = functools.partial(offload.preempt, max_pages=bound)
    preempt = jax.jit(preempt) if jitted else preempt
    cache, host = filled(config, (16, 5, 0, 0)), offload.init(config, capacity)
    after, account, ticket = preempt(cache, host, rows)
    assert not ticket.ok
    assert_same((after, account), (cache, host))
    after, account, ok = offload.resume(cache, host, ticket, jnp.full(rows.shape, 3, jnp.int32))
    assert not ok
    assert_same((after, account), (cache, host))
    assert not offload.discard(host, ticket)[1]


def test_host_capacity_is_by_group():
    """Row 0 maps 4 pages in the first group and 2, behind its window, in the second."""
    config = LAYOUTS["groups"]
    cache = filled(config, (16, 5, 0, 0))
    for capacity, fits in (((4, 2), True), ((3, 2), False), ((4, 1), False)):
        assert offload.preempt(cache, offload.init(config, capacity), ids(0))[2].ok == fits


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_refused_resumption_changes_nothing(jitted):
    resume = jax.jit(offload.resume) if jitted else offload.resume
    config = config_of(group(), group(num_pages=7))
    cache = filled(config, (13, 6, 0, 0))
    cache, host, ticket = offload.preempt(cache, offload.init(config, 6), ids(0, 1))
    cache, step = paxcache.extend(
        cache, jnp.array([0, 0, 2, 5]), num_tokens=8
    )  # 4 pages are left in one group
    step.raise_if_failed()
    for rows in (ids(0, 1), ids(0, 2), ids(0, 0), ids(0, -1), ids(0, B), ids(-7, 0)):
        after, account, ok = resume(cache, host, ticket, rows)
        assert not ok
        assert_same((after, account), (cache, host))
    cache = paxcache.release(cache, jnp.array([False, False, False, True]))
    for rows, fits in ((ids(0, 2), False), (ids(3, 3), False), (ids(3, B), False), (ids(3, 0), True)):
        after, account, ok = resume(cache, host, ticket, rows)
        assert ok == fits
        if not ok:
            assert_same((after, account), (cache, host))
    paxcache.check(after)
    _, account_again, ok = resume(paxcache.release(after, jnp.ones(B, bool)), account, ticket, ids(0, 1))
    assert not ok, "a ticket is good for one resumption"
    assert_same(account_again, account)
    assert not offload.discard(account, ticket)[1]


def test_places_of_tickets_are_reused_but_old_tickets_are_not():
    config = config_of()
    cache, host = filled(config, (4, 4, 0, 0)), offload.init(config, 1)
    one, host, old = offload.preempt(cache, host, ids(0))
    host, ok = offload.discard(host, old)
    assert ok and host.used.tolist() == [0]
    one, host, new = offload.preempt(one, host, ids(1))
    assert new.ok and int(new.entry) == int(old.entry)
    assert not offload.resume(one, host, old, ids(0))[2]
    assert offload.resume(one, host, new, ids(0))[2]


def test_a_ticket_of_another_account_is_refused():
    """The two have given out the same serial numbers: only their identities tell them apart."""
    config = config_of()
    cache = filled(config, (9, 5, 0, 0))
    ours, theirs = offload.init(config, 9), offload.init(config, 9)
    idle, ours, mine = offload.preempt(cache, ours, ids(0))
    _, theirs, foreign = offload.preempt(cache, theirs, ids(1))
    assert mine.ok and foreign.ok
    assert (int(mine.serial), int(mine.entry)) == (int(foreign.serial), int(foreign.entry))
    for call in (
        lambda: offload.resume(idle, ours, foreign, ids(0)),
        lambda: offload.begin_resume(idle, ours, foreign, ids(0)),
        lambda: offload.discard(ours, foreign),
    ):
        with pytest.raises(ValueError, match="ticket: made by another account than host"):
            call()
    after, account, ok = jax.jit(offload.resume)(idle, ours, foreign, ids(0))
    assert not ok
    assert_same((after, account), (idle, ours))
    account, ok = jax.jit(offload.discard)(ours, foreign)
    assert not ok
    assert_same(account, ours)
    assert offload.resume(idle, ours, mine, ids(0))[2]
    assert jax.jit(offload.resume)(idle, ours, mine, ids(0))[2]
    two = config_of(group(), group())
    with pytest.raises(ValueError, match="ticket: expected one of 2 groups like host, got one of 1"):
        offload.discard(offload.init(two, 9), foreign)


def test_an_account_may_be_donated_and_tickets_stay():
    """They share no buffer, the identity neither."""
    config = config_of()
    cache, host = filled(config, (4, 4, 0, 0)), offload.init(config, 4)
    cache, host, first = offload.preempt(cache, host, ids(0))
    cache, host, second = offload.preempt(cache, host, ids(1))
    resume = jax.jit(offload.resume, donate_argnums=(0, 1))
    for ticket, row in ((first, 2), (second, 3)):
        cache, host, ok = resume(cache, host, ticket, ids(row))
        assert ok
    assert host.used.tolist() == [0] and not offload.discard(host, first)[1]


def test_serial_numbers_start_again_where_int32_ends():
    config = config_of()
    cache, host = filled(config, (4, 4, 0, 0)), offload.init(config, 4)
    host = dataclasses.replace(host, next_serial=jnp.int32(2**31 - 1))
    one, host, old = offload.preempt(cache, host, ids(0))
    one, host, new = offload.preempt(one, host, ids(1))
    assert [int(t.serial) for t in (old, new)] == [2**31 - 1, 0]
    for ticket, row in ((new, 3), (old, 2)):
        one, host, ok = offload.resume(one, host, ticket, ids(row))
        assert ok
    assert host.used.tolist() == [0]


def test_programs_are_compiled_once_per_size_class():
    classes = [_pages.size_class(n) for n in range(1, 4097)]
    assert all(n <= c < n * 1.125 + 1 for n, c in enumerate(classes, 1))
    assert len(set(classes)) <= 8 * 12
    assert _pages.size_class(0) == 0


def test_inside_jit_the_bound_is_what_the_rows_can_map():
    config = config_of(num_pages=7)
    cache, host = filled(config, (4, 4, 0, 0)), offload.init(config, 7)
    for rows, most in ((ids(0), 4), (ids(0, 1), 7)):
        ticket = jax.eval_shape(offload.preempt, cache, host, rows)[2]
        assert ticket.extent.held[0].shape == (most,)


# By layer.


def num_layers(cache) -> int:
    return sum(g.pages.k.shape[0] for g in cache.groups)


@functools.partial(jax.jit, static_argnums=2)
def landed(cache, arrival, layers=None):
    for layer in range(num_layers(cache)) if layers is None else layers:
        cache, arrival = offload.land(cache, layer, arrival)
    return cache


@pytest.mark.parametrize(
    ("config", "jitted"),
    [(LAYOUTS["groups"], False), (LAYOUTS["groups"], True), (QUANTIZED, True)],
    ids=["eager", "jit", "quantized"],
)
def test_pages_that_come_by_layer_are_the_same(config, jitted):
    """Rows that share pages, holes, padding: what whole pages give, in any order of the layers."""
    cache = filled(config, (13, 6, 0, 0))
    cache, ok = paxcache.fork(cache, ids(0), ids(2))
    assert ok.all()
    rows, host = ids(0, -1, 2), offload.init(config, 20)
    blank, host_whole, whole = offload.preempt(cache, host, rows)
    _, host, ticket = offload.preempt(cache, host, rows, by_layer=True)
    assert_same(host, host_whole)
    for blocks, pages in zip(ticket.extent.blocks, whole.extent.blocks, strict=True):
        assert len(blocks) == jax.tree.leaves(pages)[0].shape[1]
        for layer, block in enumerate(blocks):
            assert_same(block, jax.tree.map(lambda x, layer=layer: x[:, layer], pages))
            assert {x.sharding.memory_kind for x in jax.tree.leaves(block)} == {"pinned_host"}

    blank = with_random_bits(blank, seed=3)
    expected = offload.resume(blank, host, whole, ids(3, -1, 0))
    assert expected[2]
    assert_same(offload.resume(blank, host, ticket, ids(3, -1, 0)), expected)

    def back(cache, host, ticket, rows):
        cache, host, arrival, ok = offload.begin_resume(cache, host, ticket, rows)
        for layer in reversed(range(num_layers(cache))):
            cache, arrival = offload.land(cache, layer, arrival)
        return cache, host, ok

    assert_same((jax.jit(back) if jitted else back)(blank, host, ticket, ids(3, -1, 0)), expected)

    names = tuple(jnp.asarray(np.r_[np.flatnonzero(g.ref_counts)[::-1], -1]) for g in cache.groups)
    expected = offload.swap_in(blank, offload.swap_out(cache, names))
    extent = offload.swap_out(cache, names, by_layer=True)
    assert_same(offload.swap_in(blank, extent), expected)
    new, arrival, found, ok = offload.begin_swap_in(blank, extent)
    assert_same((landed(new, arrival), found, ok), expected)
    assert ok


def test_layers_of_a_refused_arrival_change_nothing():
    config = LAYOUTS["groups"]
    cache = filled(config, (13, 6, 0, 0))
    free = int((cache.groups[0].ref_counts == 0).sum())
    many = jnp.asarray(np.flatnonzero(cache.groups[0].ref_counts)[: free + 1])
    extent = offload.swap_out(cache, (many, many), by_layer=True)
    new, arrival, found, ok = offload.begin_swap_in(cache, extent)
    assert not ok and all((np.asarray(f) == -1).all() for f in found)
    assert_same(landed(new, arrival), cache)
    idle, host, ticket = offload.preempt(cache, offload.init(config, 20), ids(0), by_layer=True)
    new, account, arrival, ok = offload.begin_resume(idle, host, ticket, ids(1))
    assert not ok, "row 1 is live"
    assert_same((landed(new, arrival), account), (idle, host))
    nothing = offload.swap_out(cache, (ids(), ids(-1)), by_layer=True)
    new, arrival, _, ok = offload.begin_swap_in(cache, nothing)
    assert ok
    assert_same(landed(new, arrival), cache)


def test_a_layer_lands_in_its_own_pages_alone():
    config = LAYOUTS["groups"]
    cache = filled(config, (13, 6, 0, 0))
    cache, host, ticket = offload.preempt(cache, offload.init(config, 20), ids(0), by_layer=True)
    cache = with_random_bits(cache, seed=3)
    new, _, arrival, ok = offload.begin_resume(cache, host, ticket, ids(0))
    assert ok
    for layer, (g, index) in enumerate([(0, 0), (0, 1), (1, 0)]):
        one, _ = offload.land(new, layer, arrival)
        assert_same(offload.land(new, (g, index), arrival)[0], one)
        for number, (old, group_) in enumerate(zip(new.groups, one.groups, strict=True)):
            for a, b in zip(*(jax.tree.leaves(x.pages) for x in (old, group_)), strict=True):
                differs = (bits(a) != bits(b)).any(axis=(-1, -2, -3, -4))
                assert differs.any() == (number == g)
                assert not np.delete(differs, index if number == g else [], axis=0).any()


def decode(cache, x, arrival: Any = None, layers: Any = ()):
    """A token of every row through all layers, with a name for each layer's attention; the layers named land."""
    cache, step = paxcache.extend(cache, jnp.ones(cache.max_seqs, jnp.int32), max_query_len=1)
    for layer in range(num_layers(cache)):
        if layer in layers:
            cache, arrival = offload.land(cache, layer, arrival, x)
        cache = paxcache.append(cache, layer, x, -x, step)

        def attention(cache, x, layer=layer):
            return x + paxcache.attend(cache, layer, x, step)

        x = jax.jit(attention)(cache, x)
    return cache, x


def decode_on_arrival(cache, host, ticket, x, layers: Any = None):
    """Resumes rows 0 and 1 and decodes, in one program."""
    cache, host, arrival, _ = offload.begin_resume(cache, host, ticket, ids(0, 1))
    layers = range(num_layers(cache)) if layers is None else layers
    return *decode(cache, x, arrival, layers), host


def test_attention_waits_for_the_pages_of_its_layer():
    """One program that resumes and decodes gives what two steps give; a layer that never lands is seen."""
    config, rng = config_of(group(num_layers=2)), np.random.default_rng(0)
    cache, step = paxcache.extend(paxcache.init(config), jnp.array([9, 5, 0, 0]), max_query_len=9)
    for layer in range(2):
        kv = jnp.asarray(rng.random((B, 9, 2, 4), np.float32))
        cache = paxcache.append(cache, layer, kv, kv, step)
    x = jnp.asarray(rng.random((B, 1, 2, 4), np.float32))
    idle, host, ticket = offload.preempt(cache, offload.init(config, 20), ids(0, 1), by_layer=True)
    pages = jax.tree.map(lambda x: x * jnp.nan, idle.groups[0].pages)
    idle = dataclasses.replace(idle, groups=(dataclasses.replace(idle.groups[0], pages=pages),))
    resumed, account, ok = offload.resume(idle, host, ticket, ids(0, 1))
    assert ok
    after, out = jax.jit(decode)(resumed, x)
    assert jnp.isfinite(out).all()
    jitted = jax.jit(decode_on_arrival, static_argnums=4)
    assert_same(jitted(idle, host, ticket, x), (after, out, account))
    assert jnp.isnan(jitted(idle, host, ticket, x, (0,))[1]).any()


def waits(jaxpr) -> list[list[int]]:
    """Of each transfer in a program, the layers whose attention comes before it."""
    before: dict[Any, set[int]] = {}
    found, there, layers = [], set(), 0
    for eqn in jaxpr.eqns:
        needs = set().union(*(before.get(v, set()) for v in eqn.invars if not hasattr(v, "val")))
        if eqn.primitive.name == "device_put":
            if there.isdisjoint(eqn.invars):  # what is on the device already is not sent again
                found.append(sorted(needs))
            there.update(eqn.outvars)
        if eqn.params.get("name") == "attention":
            needs, layers = needs | {layers}, layers + 1
        before.update(dict.fromkeys(eqn.outvars, needs))
    return found


def test_the_next_layers_pages_travel_beside_a_layer():
    """A transfer waits for all layers before the last one before its own: neither for more, nor for none."""
    config = config_of(group(num_layers=4))
    cache = filled(config, (9, 5, 0, 0))
    idle, host, ticket = offload.preempt(cache, offload.init(config, 20), ids(0, 1), by_layer=True)
    jaxpr = jax.make_jaxpr(decode_on_arrival)(idle, host, ticket, jnp.ones((B, 1, 2, 4)))
    assert waits(jaxpr.jaxpr) == [[], [], [0], [0, 1]]


def test_fetched_layers_are_waited_for():
    config = LAYOUTS["groups"]
    cache = filled(config, (13, 6, 0, 0))
    idle, host, ticket = offload.preempt(cache, offload.init(config, 20), ids(0, 1), by_layer=True)
    expected = offload.resume(idle, host, ticket, ids(0, 1))
    new, account, arrival, ok = offload.begin_resume(idle, host, ticket, ids(0, 1))
    with pytest.raises(
        ValueError, match="arrival: expected one from fetch, got one whose pages are on the host"
    ):
        offload.wait(0, arrival, timeout=0)
    fetched = offload.fetch(arrival)
    for layer in range(3):
        offload.wait(layer, fetched, timeout=60)
        new, fetched = offload.land(new, layer, fetched)
    assert_same((new, account, ok), expected)


def test_layers_are_timed_one_by_one():
    config = LAYOUTS["groups"]
    cache = filled(config, (13, 6, 0, 0))
    extent = offload.swap_out(cache, (ids(0, 1), ids(0)), layers=[0, 2])
    cache, arrival, _, _ = offload.begin_swap_in(cache, extent)
    (first, absent), (last,) = offload.time_layers(arrival)
    assert absent is None and first is not None and last is not None and min(first, last) >= 0
    with pytest.raises(ValueError, match="arrival: expected pages on the host, got some that fetch or land"):
        offload.time_layers(offload.fetch(arrival))
    with pytest.raises(TypeError, match="arrival: time_layers measures transfers from the host"):
        jax.jit(offload.time_layers)(arrival)


class Stuck:
    """A transfer that is never done."""

    def __init__(self, array):
        self.sharding, self.looks = array.sharding, 0

    def is_ready(self):
        self.looks += 1
        return False


def test_a_time_out_names_the_layer():
    config = LAYOUTS["groups"]
    cache = filled(config, (13, 6, 0, 0))
    extent = offload.swap_out(cache, (ids(0, 1), ids(0)), by_layer=True)
    cache, arrival, _, _ = offload.begin_swap_in(cache, extent)
    arrival = offload.fetch(arrival)
    (first, second), last = arrival.blocks
    assert second is not None
    stuck = Stuck(second.v)
    arrival = dataclasses.replace(arrival, blocks=((first, dataclasses.replace(second, v=stuck)), last))
    for timeout in (0, 0.01):
        offload.wait(0, arrival, timeout=timeout + 60)
        for layer in (1, (0, 1)):
            with pytest.raises(
                TimeoutError, match=re.escape(f"layer {layer}: its pages did not arrive within {timeout} s")
            ):
                offload.wait(layer, arrival, timeout=timeout)
        offload.wait(2, arrival, timeout=60)
    assert 2 + 2 * 2 <= stuck.looks < 1000  # neither once alone nor without a pause


def test_arguments_of_layers_are_named():
    config = LAYOUTS["groups"]
    cache = filled(config, (13, 6, 0, 0))
    host = offload.init(config, 20)
    with pytest.raises(ValueError, match="extent: expected one made with by_layer=True, got whole pages"):
        offload.begin_swap_in(cache, offload.swap_out(cache, (ids(0), ids(0))))
    with pytest.raises(ValueError, match="ticket: expected one made with by_layer=True, got whole pages"):
        offload.begin_resume(cache, host, offload.preempt(cache, host, ids(0))[2], ids(2))
    extent = offload.swap_out(cache, (ids(0), ids(0)), by_layer=True)
    other = filled(LAYOUTS["f32"], (13, 6, 0, 0))
    with pytest.raises(ValueError, match="extent: expected pages of 1 groups, got those of 2"):
        offload.begin_swap_in(other, extent)
    one_less = dataclasses.replace(extent, blocks=(extent.blocks[0][:1], extent.blocks[1]))
    with pytest.raises(ValueError, match="extent: expected leaves like group 0's pages"):
        offload.begin_swap_in(cache, one_less)
    cache, arrival, _, _ = offload.begin_swap_in(cache, extent)
    with pytest.raises(ValueError, match="arrival: expected pages of 1 groups, got 2"):
        offload.land(other, 0, arrival)
    for layer, error in ((3, ValueError), ((1, 1), ValueError), ((2, 0), ValueError), (-1, ValueError)):
        with pytest.raises(error, match="layer"):
            offload.land(cache, layer, arrival)
    with pytest.raises(TypeError, match="layer"):
        jax.jit(lambda i: offload.land(cache, (0, i), arrival))(0)
    with pytest.raises(TypeError, match="arrival: expected an Arrival"):
        offload.land(cache, 0, extent)  # pyright: ignore
    with pytest.raises(TypeError, match="arrival: fetch starts transfers from the host"):
        jax.jit(offload.fetch)(arrival)


# Against a twin that never offloads.

Q, TICKET_PAGES, SLOTS, PER_TICKET = 5, 7, 3, 2
TWIN_ROWS = B + SLOTS * PER_TICKET
GROUPS = (group(num_layers=1), group(num_layers=1, v_head_dim=0, dtype=jnp.bfloat16, sliding_window=5))


@functools.cache
def compiled(function, **static):
    return jax.jit(functools.partial(function, **static), donate_argnums=0)


def forward(cache, lens, names):
    """A step whose tokens store their names, as two digits: a bfloat16 holds no large integer."""
    cache, step = paxcache.extend(cache, lens, max_query_len=Q)
    for layer, g in enumerate(cache.groups):
        _, _, K, _, D = g.pages.k.shape
        digits = jnp.stack([names // 128, names % 128] * (D // 2), axis=-1).astype(jnp.float32)
        k = jnp.broadcast_to(digits[:, :, None], (*names.shape, K, D))
        cache = paxcache.append(cache, layer, k, None if g.pages.v is None else -k, step)
    return cache, step.ok


def dense(cache):
    return [paxcache.gather_dense(cache, layer, M * S) for layer in range(len(GROUPS))]


class Twins:
    """Two caches under the same calls, of which one preempts and resumes.

    The twin has the same rows, room for everything, and more rows to park in: what goes on a ticket here moves there.
    """

    def __init__(self, capacity):
        config = config_of(*GROUPS, num_pages=9)
        self.cache = with_random_bits(paxcache.init(config))
        twin = config_of(*GROUPS, num_pages=TWIN_ROWS * M, max_seqs=TWIN_ROWS)
        self.twin = with_random_bits(paxcache.init(twin), seed=1)
        self.host = offload.init(config, capacity)
        self.tickets: dict[int, offload.Ticket] = {}
        self.floors = np.zeros(
            TWIN_ROWS, np.int32
        )  # lengths before the last extend: windows keep what these see
        self.next_name = 1

    def padded(self, values, fill):
        """An array for the twin: the rows that both have, then the parked ones."""
        return jnp.pad(jnp.asarray(values), (0, TWIN_ROWS - B), constant_values=fill)

    def reorder_twin(self, parents):
        self.twin = compiled(paxcache.reorder)(self.twin, ids(*parents))
        inside = (parents >= -1) & (parents < TWIN_ROWS)
        source = np.where(inside, parents, np.arange(TWIN_ROWS))
        self.floors = np.where(source >= 0, self.floors[source], 0)

    def move_in_twin(self, moves):
        parents = np.arange(TWIN_ROWS)
        parents[[a for a, _ in moves]] = -1
        parents[[b for _, b in moves]] = [a for a, _ in moves]
        self.reorder_twin(parents)

    def extend(self, lens):
        names = self.next_name + np.arange(B * Q, dtype=np.int32).reshape(B, Q)
        self.next_name += B * Q
        self.cache, ok = compiled(forward)(self.cache, jnp.array(lens, jnp.int32), jnp.asarray(names))
        served = self.padded(jnp.array(lens, jnp.int32) * ok, 0)
        self.floors = np.where(served > 0, self.twin.seq_lens, self.floors)
        self.twin, ok = compiled(forward)(self.twin, served, jnp.pad(names, ((0, TWIN_ROWS - B), (0, 0))))
        assert ok.all()

    def fork(self, parent, child):
        self.cache, ok = compiled(paxcache.fork)(self.cache, ids(parent), ids(child))
        self.twin, twin_ok = compiled(paxcache.fork)(self.twin, ids(parent), ids(child))
        assert ok.all() == twin_ok.all()
        if ok.all():
            self.floors[child] = self.floors[parent]

    def reorder(self, parents):
        self.cache = compiled(paxcache.reorder)(self.cache, ids(*parents))
        self.reorder_twin(np.array([*parents, *range(B, TWIN_ROWS)]))

    def truncate(self, lens):
        """No further than the last extend: beside a window, pages left of what that saw are gone."""
        lens = np.maximum(lens, self.floors[:B])
        self.cache = compiled(paxcache.truncate)(self.cache, ids(*lens))
        self.twin = compiled(paxcache.truncate)(self.twin, self.padded(ids(*lens), M * S))

    def release(self, rows):
        self.cache = compiled(paxcache.release)(self.cache, jnp.array(rows))
        self.twin = compiled(paxcache.release)(self.twin, self.padded(jnp.array(rows), False))
        self.floors[:B][np.array(rows)] = 0

    def preempt(self, rows):
        slot = next((s for s in range(SLOTS) if s not in self.tickets), None)
        if slot is None:
            return
        old = jax.device_get((self.cache.seq_lens, self.host))
        preempt = compiled(offload.preempt, max_pages=TICKET_PAGES)
        self.cache, self.host, ticket = preempt(self.cache, self.host, ids(*rows))
        if not ticket.ok:
            assert_same((self.cache.seq_lens, self.host), old)
            return
        self.tickets[slot] = ticket
        self.move_in_twin([(row, B + slot * PER_TICKET + i) for i, row in enumerate(rows) if row >= 0])

    def resume(self, rows, which):
        if not self.tickets:
            return
        slot = sorted(self.tickets)[which % len(self.tickets)]
        old = jax.device_get((self.cache.seq_lens, self.host))
        ticket = self.tickets[slot]
        self.cache, self.host, ok = compiled(offload.resume)(self.cache, self.host, ticket, ids(*rows))
        if not ok:
            assert_same((self.cache.seq_lens, self.host), old)
            return
        del self.tickets[slot]
        lens = np.asarray(ticket.seq_lens)
        self.move_in_twin([(B + slot * PER_TICKET + i, r) for i, r in enumerate(rows) if lens[i]])

    def resume_somewhere(self):
        """The common case: into rows that are idle."""
        idle = np.flatnonzero(np.asarray(self.cache.seq_lens) == 0)
        self.resume([*idle, -1, -1][:PER_TICKET], 0)

    def defragment(self):
        self.cache = compiled(offload.defragment)(self.cache)

    def rows_agree(self):
        paxcache.check(self.cache)
        np.testing.assert_array_equal(self.cache.seq_lens, self.twin.seq_lens[:B])
        for found, wanted in zip(
            jax.tree.leaves(jax.jit(dense)(self.cache)),
            jax.tree.leaves(jax.jit(dense)(self.twin)),
            strict=True,
        ):
            np.testing.assert_array_equal(bits(found), bits(wanted)[:B])
        held = [sum(int(t.extent.held[g].sum()) for t in self.tickets.values()) for g in range(len(GROUPS))]
        assert self.host.used.tolist() == held
        out = sum(any(h.any() for h in t.extent.held) for t in self.tickets.values())
        assert int((self.host.serials >= 0).sum()) == out
        assert (self.host.used <= self.host.capacity).all()


ARGUMENTS = {
    "extend": lambda rng: [rng.integers(0, Q + 1, B).tolist()],
    "fork": lambda rng: rng.integers(0, B, 2).tolist(),
    "reorder": lambda rng: [np.where(rng.random(B) < 0.7, np.arange(B), rng.integers(-1, B, B)).tolist()],
    "truncate": lambda rng: [np.where(rng.random(B) < 0.7, M * S, rng.integers(0, M * S, B)).tolist()],
    "release": lambda rng: [(rng.random(B) < 0.3).tolist()],
    "preempt": lambda rng: [rng.permutation([*range(B), -1])[:PER_TICKET].tolist()],
    "resume": lambda rng: [rng.integers(-1, B, PER_TICKET).tolist(), int(rng.integers(SLOTS))],
    "resume_somewhere": lambda rng: [],
    "defragment": lambda rng: [],
}
NAMES = [*ARGUMENTS, "extend", "extend", "extend", "preempt", *["resume_somewhere"] * 3]


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    capacity=st.sampled_from([3, 9, 30, 30]),
    names=st.lists(st.sampled_from(NAMES), min_size=20, max_size=30),
    seed=st.integers(0, 2**32 - 1),
)
def test_preempted_rows_go_on_like_a_twin_that_never_left(capacity, names, seed):
    """Arguments are drawn evenly from a seed: Hypothesis likes zeros, and rows would hardly ever grow."""
    twins, rng = Twins(capacity), np.random.default_rng(seed)
    for name in names:
        getattr(twins, name)(*ARGUMENTS[name](rng))
        twins.rows_agree()


# In place.


def test_donated_swap_in_and_resume_are_in_place():
    config = big_config("bfloat16")
    cache = cache_shapes(config)
    host = jax.eval_shape(lambda: offload.init(config, 64))
    rows = shape(2, dtype="int32")
    preempt = functools.partial(offload.preempt, max_pages=16)
    ticket = jax.eval_shape(preempt, cache, host, rows)[2]
    extent = jax.eval_shape(offload.swap_out, cache, shape(16, dtype="int32"))
    programs = (
        (preempt, (host, rows)),
        (offload.resume, (host, ticket, rows)),
        (offload.swap_in, (extent,)),
        (offload.drop, (rows,)),
    )

    def by_layer(cache, host, ticket, rows):
        cache, host, arrival, _ = offload.begin_resume(cache, host, ticket, rows)
        return landed(cache, arrival)

    out = functools.partial(preempt, by_layer=True)
    ticket = jax.eval_shape(out, cache, host, rows)[2]
    programs += ((out, (host, rows)), (by_layer, (host, ticket, rows)))
    for function, arguments in programs:
        compiled = jax.jit(function, donate_argnums=0).lower(cache, *arguments).compile()
        assert_in_place(compiled, cache)
        assert " while(" not in text_of(compiled)
    x = shape(B, 1, *cache.groups[0].pages.k.shape[2::2], dtype="bfloat16")
    compiled = jax.jit(decode_on_arrival, donate_argnums=0).lower(cache, host, ticket, x).compile()
    assert_in_place(compiled, cache)
    compiled = jax.jit(offload.defragment, donate_argnums=0).lower(cache).compile()
    assert_in_place(compiled, cache)
    assert not _HOST.search(text_of(compiled))


def test_eager_preemption_returns_the_same_pool():
    config = config_of()
    cache = filled(config, (4, 0, 0, 0))
    after, _, _ = offload.preempt(cache, offload.init(config, 4), ids(0))
    for old, new in zip(*(jax.tree.leaves(c.groups[0].pages) for c in (cache, after)), strict=True):
        assert old.unsafe_buffer_pointer() == new.unsafe_buffer_pointer()


# Pools.


@each_layout
def test_defragmented_pools_are_packed(config):
    cache = filled(config, (9, 12, 5, 0))
    cache, _ = paxcache.fork(cache, ids(1), ids(3))
    cache = paxcache.release(cache, jnp.array([True, False, False, False]))
    old = [row_content(cache, b) for b in range(B)]
    before = cache
    cache = offload.defragment(cache)
    paxcache.check(cache)
    assert [row_content(cache, b) for b in range(B)] == old
    moved = 0
    for a, b in zip(before.groups, cache.groups, strict=True):
        counts = np.asarray(b.ref_counts)
        total = int((counts > 0).sum())
        assert (counts[:total] > 0).all() and not counts[total:].any()
        stays = np.flatnonzero(np.asarray(a.ref_counts)[:total] > 0)
        np.testing.assert_array_equal(np.asarray(a.ref_counts)[stays], counts[stays])
        moved += total - len(stays)
    assert moved, "nothing had to move: the test has lost its subject"
    assert_same(offload.defragment(cache), cache)


def test_defragmentation_leaves_pages_that_others_know_by_id():
    config = config_of()
    cache = filled(config, (16, 16, 0, 0))
    cache, found, ok = offload.swap_in(cache, offload.swap_out(cache, ids(0, 3)))
    assert ok and found[0].tolist() == [8, 9]
    cache = paxcache.release(cache, jnp.array([True, False, False, False]))
    held = np.bincount(found[0], minlength=10)
    old, known = row_content(cache, 1), bits(cache.groups[0].pages.k)[:, 8:]
    cache = offload.defragment(cache)
    paxcache.check(cache, held=held)
    assert row_content(cache, 1) == old
    np.testing.assert_array_equal(bits(cache.groups[0].pages.k)[:, 8:], known)
    assert np.flatnonzero(cache.groups[0].ref_counts).tolist() == [0, 1, 2, 3, 8, 9] or used(cache) == [6]
    with pytest.raises(ValueError, match=r"num_pages: .*page 9.* expected at least 10, got 7"):
        offload.resize(cache, 7)
    assert offload.resize(cache, 11).groups[0].ref_counts[8:].tolist() == [1, 1, 0]


@pytest.mark.parametrize("config", [LAYOUTS["bf16"], LAYOUTS["groups"]], ids=["bf16", "groups"])
@pytest.mark.parametrize("num_pages", [6, 15])
def test_resized_pools_keep_rows(config, num_pages):
    cache = filled(config, (9, 12, 5, 0))
    cache, _ = paxcache.fork(cache, ids(1), ids(3))
    cache = paxcache.release(cache, jnp.array([True, False, False, False]))
    old = [row_content(cache, b) for b in range(B)]
    before = copy_of(cache)
    new = offload.resize(cache, num_pages)
    paxcache.check(new)
    assert_same(cache, before)
    assert [row_content(new, b) for b in range(B)] == old
    for g in new.groups:
        assert g.ref_counts.shape == (num_pages,)
        assert all(leaf.shape[1] == num_pages for leaf in jax.tree.leaves(g.pages))
    new, step = paxcache.extend(new, jnp.array([(num_pages - 5) * S, 0, 0, 0]), num_tokens=40)
    assert step.ok.all() == ((num_pages - 5) <= M)


def test_resize_by_group():
    cache = offload.resize(filled(LAYOUTS["groups"], (9, 4, 0, 0)), (4, 12))
    assert [g.ref_counts.shape[0] for g in cache.groups] == [4, 12]
    paxcache.check(cache)


# Arguments.


def test_arguments_are_named():
    config = LAYOUTS["groups"]
    cache, host = filled(config, (9, 4, 0, 0)), offload.init(config, 4)
    other = filled(config_of(), (9, 0, 0, 0))
    ticket = offload.preempt(other, offload.init(config_of(), 4), ids(0))[2]
    cases = (
        (ValueError, "page_ids: expected one array for each of 2", lambda: offload.swap_out(cache, ids(0))),
        (ValueError, "page_ids: expected one array for each of 2", lambda: offload.drop(cache, ids(0))),
        (ValueError, "extent: expected", lambda: offload.swap_in(cache, ticket.extent)),
        (ValueError, "ticket: expected", lambda: offload.resume(cache, host, ticket, ids(0))),
        (TypeError, "ticket: expected", lambda: offload.resume(cache, host, 3, ids(0))),  # pyright: ignore
        (ValueError, "rows: expected", lambda: offload.preempt(cache, host, jnp.zeros((2, 2), jnp.int32))),
        (TypeError, "rows: expected", lambda: offload.preempt(cache, host, jnp.zeros(B, bool))),
        (ValueError, "host: expected", lambda: offload.preempt(other, host, ids(0))),
        (TypeError, "host: expected", lambda: offload.preempt(cache, None, ids(0))),  # pyright: ignore
        (ValueError, "max_pages: expected", lambda: offload.preempt(cache, host, ids(0), max_pages=(1,))),
        (ValueError, "max_pages must be", lambda: offload.preempt(cache, host, ids(0), max_pages=-1)),
        (TypeError, "config: expected", lambda: offload.init(cache, 4)),  # pyright: ignore
        (ValueError, "num_pages must be at least 0", lambda: offload.init(config, -1)),
        (ValueError, "num_pages: together", lambda: offload.init(config, 2**30)),
        (ValueError, "memory_kind: expected", lambda: offload.init(config, 4, memory_kind="disk")),
        (ValueError, "num_pages: group 0 has 4 pages in use.*got 3", lambda: offload.resize(cache, 3)),
        (ValueError, "num_pages must be at least 1", lambda: offload.resize(cache, 0)),
        (TypeError, "num_pages must be an int", lambda: offload.resize(cache, 1.5)),  # pyright: ignore
        (TypeError, "resize", lambda: jax.jit(lambda c: offload.resize(c, 20))(cache)),
    )
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_extent_of_another_dtype_is_refused():
    extent = offload.swap_out(filled(LAYOUTS["f16"], (9, 0, 0, 0)), ids(0))
    with pytest.raises(
        ValueError, match=r"extent: expected bfloat16\[1, 2, 2, 4, 4\] for group 0, got float16"
    ):
        offload.swap_in(filled(LAYOUTS["bf16"], (9, 0, 0, 0)), extent)
