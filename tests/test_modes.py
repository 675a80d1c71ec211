"""Modes of JAX in which its users look for faults: every call works in each, and gives what it gives without."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import paxcache
from driver import config_of
from paxcache import ops

T = 8
GROUPS = (
    paxcache.LayerGroup(num_layers=2, num_kv_heads=2, head_dim=4, dtype=jnp.float32),
    paxcache.LayerGroup(
        num_layers=1, num_kv_heads=1, head_dim=4, dtype=jnp.float32, quantization="int8", sliding_window=5
    ),
)


def serve(cache, query_lens, tensors):
    """Every call of the contract, and an op of each kind."""
    seen = []
    for row_aligned in (False, True):
        size: dict[str, Any] = {"max_query_len": 2} if row_aligned else {"num_tokens": T}
        shape = (4, 2) if row_aligned else (T,)
        cache, step = paxcache.extend(cache, query_lens[int(row_aligned)], implementation="xla", **size)
        for layer, heads in enumerate((2, 2, 1)):
            k, v, q = (
                x[..., :n, :].reshape(*shape, n, 4) for x, n in zip(tensors, (heads, heads, 2), strict=True)
            )
            cache = paxcache.append(cache, layer, k, v, step, implementation="xla")
            seen.append(paxcache.attend(cache, layer, q, step, implementation="xla"))
        seen.append((step.status, step.rows, step.positions, step.slot_mapping))
    cache, ok = paxcache.fork(cache, jnp.array([0, -1], jnp.int32), jnp.array([3, 1], jnp.int32))
    cache = paxcache.reorder(cache, jnp.array([0, 0, -1, 3], jnp.int32))
    cache = paxcache.truncate(cache, jnp.array([2, 2**31 - 1, 0, 4], jnp.int32))
    cache = paxcache.release(cache, jnp.array([False, False, False, True]))
    pool, ids = jnp.ones((2, 3, 1, 2, 4)), jnp.array([0, -1, 2], jnp.int32)
    pool = ops.write_pages(pool, None, jnp.zeros((3, 1, 4)), None, ids, layer=1, implementation="xla")[0]
    blocks = ops.gather_pages(pool, ids, implementation="xla")
    pool = ops.copy_pages(pool, ids[:2], ids[1:], implementation="xla")
    pool = ops.scatter_pages(pool, ids, blocks, implementation="xla")
    outs, lses = (
        jnp.ones((2, 3, 1, 4)),
        jnp.array([[[1.0], [-jnp.inf], [0.0]], [[0.5], [jnp.inf], [jnp.inf]]]),
    )
    stats = paxcache.stats(cache)
    dense = [paxcache.gather_dense(cache, layer, 9) for layer in range(3)]
    return cache, seen, ok, pool, blocks, ops.merge_attention(outs, lses)[0], stats.waste, dense


def arguments():
    rng = np.random.default_rng(0)
    tensors = tuple(jnp.asarray(rng.standard_normal((T, n, 4)), jnp.float32) for n in (2, 2, 2))
    lens = jnp.array([[5, 1, 0, 0], [2, 1, 0, 0]], jnp.int32)
    return paxcache.init(config_of(*GROUPS)), lens, tensors


@functools.cache
def plain():
    return jax.tree.map(np.asarray, serve(*arguments()))


MODES = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "nans": lambda: jax.debug_nans(True),
    "infs": lambda: jax.debug_infs(True),
    "leaks": jax.checking_leaks,
    "no jit": jax.disable_jit,
}
if not hasattr(jax, "debug_infs"):
    MODES.pop("infs")


@contextlib.contextmanager
def mode(name: str):
    jax.clear_caches()  # a program compiled before would not be looked at
    with MODES[name]():
        yield
    jax.clear_caches()


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", MODES)
def test_calls_in_a_mode_equal_those_without(name, jit):
    wanted = plain()
    with mode(name):
        found = (jax.jit(serve) if jit else serve)(*arguments())
        paxcache.check(found[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), found, wanted)


@pytest.mark.parametrize("errors", ["nan_checks", "div_checks"])
def test_checkify_finds_no_fault(errors):
    checked = jax.jit(checkify.checkify(serve, errors=getattr(checkify, errors)))
    error, found = checked(*arguments())
    error.throw()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), found, plain())
