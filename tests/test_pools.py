"""Pools that are resized below a prefix index, and pools that leave the device while a server sleeps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxcache
from driver import config_of, copy_of
from layouts import LAYOUTS, assert_same, bits, group, ids, with_random_bits
from paxcache import offload, prefix
from paxcache.offload import _pools

S, B = 4, 4


def served(config, tokens=range(10)):
    """Row 0 was served and released; an index holds its full pages. Row 1 is live."""
    tokens = list(tokens)
    cache = with_random_bits(paxcache.init(config))
    index = prefix.init(config)
    cache, step = paxcache.extend(cache, jnp.array([len(tokens), 7, 0, 0]), max_query_len=len(tokens))
    step.raise_if_failed()
    cache, index = prefix.publish(cache, index, 0, tokens)
    return paxcache.release(cache, jnp.array([True, False, False, False])), index


# A prefix index goes on.


def content(cache, row):
    """The bits of a row's pages, by group and leaf."""
    return [
        bits(leaf)[:, np.asarray(g.block_tables[row])[np.asarray(g.block_tables[row]) >= 0]]
        for g in cache.groups
        for leaf in jax.tree.leaves(g.pages)
    ]


@pytest.mark.parametrize("config", [LAYOUTS["bf16"], config_of(group(), group(sliding_window=5))])
def test_index_and_cache_go_on_after_growing_and_shrinking(config):
    cache, index = served(config)
    expected, _, reused = prefix.admit(cache, index, 0, range(10))
    assert reused == 8
    for size in (15, 6, 9):
        cache = offload.resize(cache, size)
        with pytest.raises(ValueError, match="index"):
            prefix.admit(cache, index, 0, range(10))
        index = offload.resize_index(cache, index)
        assert index.num_pages == (size,) * len(cache.groups)
        paxcache.check(cache, held=prefix.held(index))
        after, _, reused = prefix.admit(cache, index, 0, range(10))
        assert reused == 8
        assert_same(content(after, 0), content(expected, 0))
    # It takes in pages that the old pool did not have, and lets all of them go.
    cache, index = (large := offload.resize(cache, 15)), offload.resize_index(large, index)
    cache, step = paxcache.extend(cache, jnp.array([0, 0, 16, 16]), max_query_len=16)
    step.raise_if_failed()
    cache, index = prefix.publish_rows(cache, index, [2, 3], [range(30, 46), range(50, 66)])
    assert max(np.flatnonzero(h).max() for h in prefix.held(index)) >= 10
    paxcache.check(cache, held=prefix.held(index))
    cache = paxcache.release(cache, jnp.ones(B, bool))
    cache, index, freed = prefix.evict(cache, index, 100)
    assert freed and paxcache.stats(cache).num_used_pages == 0


def test_a_tier_goes_on_with_a_resized_cache():
    config = config_of(num_pages=10)
    cache, index = served(config)
    tier = offload.init_tier(config, 20)
    cache, index, tier, freed = offload.evict(cache, index, tier, 10)
    assert freed == 2
    cache = offload.resize(cache, 7)
    index = offload.resize_index(cache, index)
    cache, index, tier, fetched = offload.prefetch(cache, index, tier, range(10))
    assert fetched == 2 and prefix.admit(cache, index, 0, range(10))[2] == 8


def test_an_index_of_another_cache_is_refused():
    cache, index = served(config_of())
    small = paxcache.init(config_of(num_pages=2))
    with pytest.raises(ValueError, match="index: belongs to another cache: it holds page 0 of group 0"):
        offload.resize_index(paxcache.init(config_of(num_pages=20)), index)
    with pytest.raises(ValueError, match="index: belongs to another cache"):
        offload.resize_index(dataclasses.replace(small, groups=small.groups), index)
    for config in (
        config_of(page_size=8),
        config_of(max_pages_per_seq=3),
        config_of(group(sliding_window=5)),
        config_of(group(), group()),
    ):
        with pytest.raises(ValueError, match="index: made for another config"):
            offload.resize_index(paxcache.init(config), index)
    with pytest.raises(TypeError, match="resize_index reads the cache"):
        jax.jit(lambda c: offload.resize_index(c, index))(cache)


# Sleep.

PER_TENSOR = config_of(group(quantization="int8", scales="per_tensor"), group(quantization="fp8_e4m3"))


def cache_of(name):
    if name != "given scales":
        return with_random_bits(paxcache.init(LAYOUTS[name]))
    scales = jnp.arange(1.0, 5.0)
    cache = paxcache.init(PER_TENSOR, k_scales=scales, v_scales=2 * scales)
    values = with_random_bits(cache)
    return jax.tree.map(lambda a, b: b if a.ndim > 4 else a, cache, values)


@pytest.mark.parametrize("name", ["bf16", "groups", "given scales"])
@pytest.mark.parametrize("piece", [2**26, 1], ids=["one piece", "pieces"])
def test_pages_come_back_under_their_ids_when_a_server_wakes(name, piece, monkeypatch):
    monkeypatch.setattr(_pools, "_PIECE_BYTES", piece)
    cache = cache_of(name)
    cache, _ = paxcache.extend(cache, jnp.array([9, 5, 0, 0]), max_query_len=9)
    cache, _ = paxcache.fork(cache, ids(0), ids(3))
    cache = paxcache.release(cache, jnp.array([True, False, False, False]))
    asleep = offload.sleep(cache)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(asleep.blocks)} == {"pinned_host"}
    assert all(g.pages is None for g in asleep.cache.groups)
    woken = offload.wake(asleep)
    for old, new in zip(cache.groups, woken.groups, strict=True):
        used = np.asarray(old.ref_counts) > 0
        assert used.any() and not used.all()
        for a, b in zip(jax.tree.leaves(old.pages), jax.tree.leaves(new.pages), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_array_equal(bits(a)[:, used], bits(b)[:, used])
            if a.ndim > 4:
                assert not bits(b)[:, ~used].any()
            elif a.shape[2:] == (1, 1):
                np.testing.assert_array_equal(a, b)
    for x, y in zip(jax.tree.leaves(cache), jax.tree.leaves(woken), strict=True):
        if x.ndim < 4:
            assert_same(x, y)
    again = offload.wake(asleep)  # what wakes may be given away
    jax.jit(lambda c: jax.tree.map(jnp.zeros_like, c), donate_argnums=0)(copy_of(again))
    assert_same(offload.wake(asleep), woken)


def test_a_placed_pool_wakes_where_it_was(cpu_devices):
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    cache = cache_of("bf16")
    cache, _ = paxcache.extend(cache, jnp.array([9, 5, 0, 0]), max_query_len=9)
    spec = jax.sharding.PartitionSpec(None, None, "heads")
    place = jax.sharding.NamedSharding(mesh, spec)
    (old,) = cache.groups
    old = dataclasses.replace(old, pages=jax.device_put(old.pages, place))
    cache = dataclasses.replace(cache, groups=(old,))
    (new,) = offload.wake(offload.sleep(cache)).groups
    assert new.pages.k.sharding == place
    used = np.asarray(old.ref_counts) > 0
    np.testing.assert_array_equal(bits(new.pages.k)[:, used], bits(old.pages.k)[:, used])


def test_dropped_pages_end_rows_and_wait_for_others():
    config = config_of(num_pages=10)
    cache, index = served(config)
    with pytest.raises(ValueError, match="keep_pages: group 0 has references from outside to 2 pages"):
        offload.sleep(cache, keep_pages=False)
    cache, index = prefix.reset(cache, index)
    asleep = offload.sleep(cache, keep_pages=False)
    assert not jax.tree.leaves(asleep.blocks)
    woken = offload.wake(asleep)
    assert_same(woken, paxcache.init(config))
    cache, index, reused = prefix.admit(woken, index, 0, range(10))
    assert reused == 0
    given = offload.wake(offload.sleep(cache_of("given scales"), keep_pages=False))
    for old, new in zip(cache_of("given scales").groups, given.groups, strict=True):
        for a, b in zip(jax.tree.leaves(old.pages), jax.tree.leaves(new.pages), strict=True):
            if a.shape[2:] == (1, 1):
                np.testing.assert_array_equal(a, b)


def test_rows_and_index_go_on_after_a_sleep():
    cache, index = served(config_of())
    expected = prefix.admit(cache, index, 0, range(10))
    found = prefix.admit(offload.wake(offload.sleep(cache)), index, 0, range(10))
    assert found[2] == expected[2] == 8
    for row in (0, 1):
        assert_same(content(found[0], row), content(expected[0], row))


def test_sleeping_is_no_part_of_a_program():
    cache, _ = served(config_of())
    with pytest.raises(TypeError, match="sleep reads counts on the host"):
        jax.jit(offload.sleep)(cache)
    asleep = offload.sleep(cache)
    with pytest.raises(TypeError, match="asleep: wake makes the pools from the host"):
        jax.jit(offload.wake)(asleep)
