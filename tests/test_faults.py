"""Faults that users of such systems have met: one test for each, named after it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxcache
from driver import Driver, config_of, poisoned
from paxcache import ops

S, K, D = 4, 2, 8


def numbered_pool(pages: int = 6, layers: int = 2) -> jax.Array:
    """[L, P, K, S, D] in which every element differs."""
    shape = (layers, pages, K, S, D)
    return jnp.arange(1, 1 + np.prod(shape), dtype=jnp.float32).reshape(shape)


def test_pool_copied_instead_of_updated_in_place():
    """jax#10197, #17845, sglang-jax#65. The programs' text is read in test_in_place; here the buffer itself stays."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, k):
        cache, step = paxcache.extend(cache, jnp.array([1, 0, 2, 0]), num_tokens=4)
        return paxcache.append(cache, 1, k, k, step)

    cache = paxcache.init(config_of())
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.groups[0].pages)]
    for _ in range(3):
        old, cache = cache, step(cache, jnp.ones((4, 1, 4)))
        assert old.groups[0].pages.k.is_deleted()
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.groups[0].pages)] == before


@pytest.mark.parametrize("index", [-1, -6, -24, -(2**31)])
def test_minus_one_wraps_even_with_mode_drop(index):
    """jax#14095. Every way to hand a negative index to an op leaves the pool alone or reads nothing."""
    pool = numbered_pool()
    bad, good = jnp.array([index, 2]), jnp.array([3, 2])
    new = jnp.zeros((2, K, D))
    written, _ = ops.write_pages(pool, None, new, None, jnp.array([index, 5]), layer=0)
    np.testing.assert_array_equal(written, pool.at[0, 1, :, 1].set(0))
    np.testing.assert_array_equal(ops.copy_pages(pool, bad, good + 1), pool.at[:, 3].set(pool[:, 2]))
    np.testing.assert_array_equal(ops.copy_pages(pool, good + 1, bad), pool.at[:, 2].set(pool[:, 3]))
    blocks = ops.gather_pages(pool, bad)
    assert (blocks[0] == 0).all()
    np.testing.assert_array_equal(blocks[1], pool[:, 2])
    scattered = ops.scatter_pages(pool, bad, jnp.zeros((2, 2, K, S, D)))
    np.testing.assert_array_equal(scattered, pool.at[:, 2].set(0))
    poisoned_end = pool.at[:, -1].set(jnp.nan)
    out = ops.paged_attention(
        jnp.ones((2, K, D)),
        poisoned_end,
        poisoned_end,
        jnp.array([[1, index], [index, index]]),
        jnp.array([8, 5]),
        layer=1,
    )
    assert np.isfinite(out).all() and (np.asarray(out)[1] == 0).all()


def test_minus_one_in_the_tables_of_a_cache_names_no_page():
    """A full table row of -1 must not touch the last page when rows are forked, reordered, cut or released."""
    driver = Driver(config_of(num_pages=3))
    driver.extend([4, 4, 4, 0], num_tokens=12)  # every page is taken, the last one too
    last = jax.tree.map(lambda x: np.asarray(x[:, -1]), driver.cache.groups[0].pages)
    driver.release([False, False, False, True])
    driver.fork([3, -1], [3, 3])
    driver.truncate([4, 4, 4, 0])
    driver.reorder([0, 1, 2, -1])
    driver.extend([0, 0, 0, 1], num_tokens=12)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[:, -1], driver.cache.groups[0].pages), last)
    assert driver.cache.groups[0].ref_counts.tolist() == [1, 1, 1]


def test_allocation_of_zero_takes_every_block():
    """A `[-0:]` slice once gave all free blocks away (FastDeploy)."""
    driver = Driver(config_of())
    for lens in ([0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0]):
        driver.extend(lens, num_tokens=12)
    assert int((driver.cache.groups[0].ref_counts > 0).sum()) == 1
    driver.fork([], [])
    assert int((driver.cache.groups[0].ref_counts > 0).sum()) == 1


def test_double_free():
    """OxiCUDA accepts it. Freed twice, a page would be handed to two rows."""
    driver = Driver(config_of())
    driver.extend([5, 0, 0, 0], num_tokens=12)
    driver.release([True, False, False, False])
    driver.release([True, False, False, False])
    assert (np.asarray(driver.cache.groups[0].ref_counts) == 0).all()
    driver.extend([5, 5, 0, 0], num_tokens=12)
    pages = np.asarray(driver.cache.groups[0].block_tables)
    assert len(set(pages[pages >= 0].tolist())) == 4


def test_leak():
    """sglang#7130, sglang-jax PR#982. Hundreds of rounds of every way to end a row leave every page free."""
    config = config_of()

    @jax.jit
    def rounds(cache):
        def body(i, cache):
            cache, _ = paxcache.extend(cache, jnp.array([6, 1, 17, 2]) * (i % 3), num_tokens=20)
            cache, _ = paxcache.fork(cache, jnp.array([0, 0, 1]), jnp.array([2, 3, 2]))
            cache, _ = paxcache.extend(cache, jnp.array([1, 1, 1, 1]), num_tokens=20)
            cache = paxcache.truncate(cache, cache.seq_lens // 2)
            cache = paxcache.reorder(cache, jnp.array([1, 1, -1, 0]))
            return paxcache.release(cache, jnp.arange(4) != i % 5)

        cache = jax.lax.fori_loop(0, 300, body, cache)
        return paxcache.release(cache, jnp.ones(4, bool))

    cache = rounds(paxcache.init(config))
    chex.assert_trees_all_equal(
        dataclasses.replace(cache, groups=()), dataclasses.replace(paxcache.init(config), groups=())
    )
    assert not cache.groups[0].ref_counts.any() and (cache.groups[0].block_tables == -1).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zero_times_nan_from_unwritten_values(dtype, poison):
    """flash-attention#1745. A masked weight of 0 times NaN is NaN: the value must be left out, not multiplied."""
    pool = jnp.full((6, K, S, D), poison, dtype)
    written = jnp.ones((3, K, D), dtype)
    pool, _ = ops.write_pages(pool, None, written, None, jnp.array([8, 9, 10]))
    lens, tables = jnp.array([3, 0]), jnp.array([[2, 4], [5, -1]])
    features: list[dict[str, Any]] = [
        {},
        {"sliding_window": 2},
        {"sinks": jnp.full(4, -1e4)},
        {"causal": False},
    ]
    for options in features:
        out, lse = ops.paged_attention(
            jnp.ones((2, 4, D), dtype), pool, pool, tables, lens, return_lse=True, **options
        )
        np.testing.assert_array_equal(np.asarray(out, np.float32), [np.ones((4, D)), np.zeros((4, D))])
        assert jnp.isneginf(lse[1]).all() and jnp.isfinite(lse[0]).all()


def test_recycled_page_holds_another_rows_nan():
    """A row whose tokens were NaN ends; the row that gets its pages sees none of it, in any later slot."""
    cache = paxcache.init(config_of(num_pages=1))
    k = jnp.full((4, 1, 4), jnp.nan)
    cache, step = paxcache.extend(cache, jnp.array([4, 0, 0, 0]), num_tokens=4)
    for layer in range(2):
        cache = paxcache.append(cache, layer, k, k, step)
    cache = paxcache.release(cache, jnp.array([True, False, False, False]))
    cache, step = paxcache.extend(cache, jnp.array([0, 1, 0, 0]), num_tokens=4)
    assert step.ok.all()
    cache = paxcache.append(cache, 0, jnp.ones((4, 1, 4)), jnp.ones((4, 1, 4)), step)
    out = paxcache.attend(cache, 0, jnp.ones((4, 2, 4)), step)
    np.testing.assert_array_equal(out[0], np.ones((2, 4)))
    assert (out[1:] == 0).all()
    k, v = paxcache.gather_dense(cache, 0, 4)
    assert v is not None and jnp.isfinite(k).all() and jnp.isfinite(v).all()


def test_int32_overflow_of_page_offsets():
    """vllm#1486, flashinfer PR#3136. Shapes are checked in test_in_place; here slots that int32 cannot hold.

    They are outside every pool, so they are dropped; cut to 32 bits they would name slots 0 and 3.
    """
    pool, new = numbered_pool(), jnp.zeros((4, K, D))
    slots: Any = np.array([2**32, 2**32 + 3, -(2**32), 5], np.int64)
    wanted = pool.at[0, 1, :, 1].set(0)
    with jax.enable_x64(True):
        written, _ = jax.jit(functools.partial(ops.write_pages, layer=0))(
            pool, None, new, None, jnp.asarray(slots)
        )
    np.testing.assert_array_equal(written, wanted)
    written, _ = ops.write_pages(pool, None, new, None, slots, layer=0)  # 64 bits on the host alone
    np.testing.assert_array_equal(written, wanted)


def test_int64_slot_mapping_equals_int32():
    pool, new = numbered_pool(), jnp.zeros((4, K, D))
    slots: Any = np.array([7, -1, 23, 24])
    wanted, _ = ops.write_pages(pool, None, new, None, slots.astype(np.int32), layer=1)
    with jax.enable_x64(True):
        written, _ = ops.write_pages(pool, None, new, None, jnp.asarray(slots, jnp.int64), layer=1)
    np.testing.assert_array_equal(written, wanted)
    np.testing.assert_array_equal(ops.write_pages(pool, None, new, None, slots, layer=1)[0], wanted)


def test_recompiles_as_lengths_change():
    """tpu-inference PR#3180. One compilation serves every mix of lengths, eager calls included."""
    cache = poisoned(paxcache.init(config_of()))
    k, q = jnp.ones((12, 1, 4)), jnp.ones((12, 2, 4))

    def serve(cache, lens):
        cache, step = paxcache.extend(cache, jnp.asarray(lens), num_tokens=12)
        cache = paxcache.append(cache, 0, k, k, step)
        paxcache.attend(cache, 0, q, step)
        cache, _ = paxcache.fork(cache, jnp.asarray([lens[0] - 1]), jnp.array([3]))
        return paxcache.release(paxcache.truncate(cache, cache.seq_lens - 1), cache.seq_lens > 9)

    cache = serve(cache, [1, 2, 3, 0])
    with no_compilation():
        for lens in ([3, 0, 0, 0], [1, 1, 1, 1], [12, 0, 0, 0], [0, 0, 0, 0], [5, 5, 5, 5], [-1, 99, 0, 1]):
            cache = serve(cache, lens)


@contextlib.contextmanager
def no_compilation():
    """Fails if anything is compiled inside."""
    compiled = []

    def listen(event: str, duration_secs: float, **_):
        del duration_secs
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled, f"compiled {len(compiled)} times"


def test_the_compilation_counter_counts():
    with pytest.raises(AssertionError, match="compiled"), no_compilation():
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(3))


def test_append_offset_token_major_in_a_head_major_pool():
    """OxiCUDA wrote [token, head] offsets into [head, token] pages: every head's tokens must lie in its own tile."""
    pool = jnp.zeros((1, 3, K, S, D))
    tokens = jnp.arange(1, 1 + 5 * K * D, dtype=jnp.float32).reshape(5, K, D)
    pool, _ = ops.write_pages(pool, None, tokens, None, jnp.array([4, 5, 6, 7, 8]), layer=0)
    np.testing.assert_array_equal(pool[0, 1], np.moveaxis(np.asarray(tokens[:4]), 0, 1))
    np.testing.assert_array_equal(pool[0, 2, :, 0], tokens[4])


def test_swapped_source_and_destination_ids():
    """FastDeploy swapped pages the wrong way round."""
    pool = numbered_pool()
    np.testing.assert_array_equal(
        ops.copy_pages(pool, jnp.array([1]), jnp.array([4])), pool.at[:, 4].set(pool[:, 1])
    )
    driver = Driver(config_of())
    driver.extend([3, 0, 0, 0], num_tokens=12)
    driver.fork([0], [1])
    page = int(driver.cache.groups[0].block_tables[0, 0])
    kept = np.asarray(driver.cache.groups[0].pages.k[:, page, :, :3])
    driver.extend([0, 1, 0, 0], num_tokens=12)  # row 1 leaves; row 0's page is the source
    assert int(driver.cache.groups[0].block_tables[0, 0]) == page
    np.testing.assert_array_equal(driver.cache.groups[0].pages.k[:, page, :, :3], kept)
