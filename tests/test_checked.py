"""The checked form of the contract finds each misuse that compiled programs cannot see, and changes no result."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxcache as plain
from driver import config_of
from paxcache import checked as paxcache

CONFIG = config_of()
KV, Q = jnp.ones((8, 1, 4)), jnp.ones((8, 2, 4))


def served(lens=(5, 3, 0, 0)):
    cache, step = paxcache.extend(paxcache.init(CONFIG), jnp.array(lens), num_tokens=8)
    for layer in range(2):
        cache = paxcache.append(cache, layer, KV, KV, step)
    return cache, step


@pytest.mark.parametrize("quantization", [None, "int8", "fp8_e4m3"])
def test_results_equal_the_plain_ones(quantization):
    group = plain.LayerGroup(
        num_layers=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32, quantization=quantization
    )
    seen = []
    for library in (plain, paxcache):
        lib: Any = library
        cache, outs = lib.init(config_of(group)), []
        for lens in ([5, 3, 0, 0], [1, 0, 2, 1]):
            cache, step = lib.extend(cache, jnp.array(lens), num_tokens=8)
            cache = lib.append(cache, 1, KV, KV, step)
            outs.append(lib.attend(cache, 1, Q, step))
            cache, ok = lib.fork(cache, jnp.array([0]), jnp.array([3]))
            cache = lib.reorder(cache, jnp.array([0, 1, 2, 0]))
            cache = lib.truncate(cache, cache.seq_lens - 1)
            cache = lib.release(cache, jnp.array([False, True, False, False]))
            outs += [ok, lib.gather_dense(cache, 1, 8), cache.seq_lens, cache.groups[0].block_tables]
        seen.append(outs)
    jax.tree.map(np.testing.assert_array_equal, *seen)


def test_a_stale_step_is_refused():
    cache, step = served()
    for changed in (
        paxcache.truncate(cache, jnp.array([4, 3, 0, 0])),
        paxcache.release(cache, jnp.array([True, False, False, False])),
        paxcache.fork(cache, jnp.array([0]), jnp.array([2]))[0],
    ):
        with pytest.raises(plain.StepError, match=r"append: step is stale: row \d"):
            paxcache.append(changed, 0, KV, KV, step)
        with pytest.raises(plain.StepError, match="attend: step is stale"):
            paxcache.attend(changed, 0, Q, step)


def test_a_write_to_a_foreign_or_shared_page_is_refused():
    cache, step = served()
    slots = step.slot_mapping[0]
    foreign = dataclasses.replace(step, slot_mapping=(slots.at[0].set(slots[5]),))
    with pytest.raises(plain.StepError, match="row 0 would write to foreign slot"):
        paxcache.append(cache, 0, KV, KV, foreign)
    group = cache.groups[0]
    held = dataclasses.replace(group, ref_counts=group.ref_counts.at[group.block_tables[1, 0]].add(1))
    with pytest.raises(plain.StepError, match="row 1 would write to shared page"):
        paxcache.append(dataclasses.replace(cache, groups=(held,)), 0, KV, KV, step)


def test_a_broken_cache_is_refused_before_a_call():
    cache, _ = served()
    group = dataclasses.replace(cache.groups[0], ref_counts=cache.groups[0].ref_counts * 0)
    with pytest.raises(plain.InvariantError, match="before release: group 0, page"):
        paxcache.release(dataclasses.replace(cache, groups=(group,)), jnp.ones(4, bool))


def test_a_function_that_loses_a_page_is_found():
    def leak(cache):
        group = cache.groups[0]
        tables = group.block_tables.at[0].set(plain.NO_PAGE)
        group = dataclasses.replace(group, block_tables=tables)
        return dataclasses.replace(cache, seq_lens=cache.seq_lens.at[0].set(0), groups=(group,))

    cache, _ = served()
    with pytest.raises(
        plain.InvariantError, match="leak: group 0, page 0: 0 references from outside before, 1"
    ):
        paxcache.check_call(leak, keeps_references=True)(cache)


def test_reads_of_slots_that_nobody_wrote_show():
    cache, step = paxcache.extend(paxcache.init(CONFIG), jnp.array([5, 3, 0, 0]), num_tokens=8)
    with pytest.raises(plain.InvariantError, match=r"attend: NaN in the outputs of rows \[0, 1\]"):
        paxcache.attend(cache, 0, Q, step)
    freed = paxcache.release(served()[0], jnp.array([True, False, False, False]))
    pages = np.asarray(freed.groups[0].pages.k)
    free = np.asarray(freed.groups[0].ref_counts) == 0
    assert np.isnan(pages[:, free]).all() and not np.isnan(pages[:, ~free][..., :3, :]).any()


def test_reorder_by_numbers_of_no_row_is_refused():
    with pytest.raises(ValueError, match=r"parents: expected rows in \[0, 4\) or -1, got -5"):
        paxcache.reorder(served()[0], jnp.array([1, -5, 0, -1]))


def test_scales_of_layers_are_left_alone():
    config = dataclasses.replace(CONFIG, groups=(
        plain.LayerGroup(num_layers=1, num_kv_heads=1, head_dim=4, quantization="int8", scales="per_tensor"),
    ))  # fmt: skip
    cache: Any = paxcache.init(config, k_scales=jnp.ones(1), v_scales=jnp.ones(1))
    assert (cache.groups[0].pages.k.scales == 1).all()


def test_traced_calls_are_refused_by_name():
    cache, _ = served()
    with pytest.raises(TypeError, match=r"checked\.release .*inside jit use paxcache\.release"):
        jax.jit(paxcache.release)(cache, jnp.ones(4, bool))


def test_all_else_is_the_library():
    assert paxcache.CacheConfig is plain.CacheConfig and paxcache.ops is plain.ops
    assert paxcache.prefix.match is plain.prefix.match and paxcache.prefix.admit is not plain.prefix.admit
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        paxcache.nothing_of_that_name  # noqa: B018
