"""Caches of every layout with any bits in their pages, and equality bit for bit: for tests of pages that travel."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import paxcache
from driver import config_of


def group(**changes) -> paxcache.LayerGroup:
    return paxcache.LayerGroup(
        **{"num_layers": 2, "num_kv_heads": 2, "head_dim": 4, "dtype": jnp.float32, **changes}
    )


LAYOUTS = {
    "f32": config_of(group()),
    "f16": config_of(group(dtype=jnp.float16)),
    "bf16": config_of(group(dtype=jnp.bfloat16)),
    "narrow values": config_of(group(v_head_dim=2)),
    "no values": config_of(group(v_head_dim=0, dtype=jnp.bfloat16)),
    "groups": config_of(
        group(), group(num_layers=1, v_head_dim=0, dtype=jnp.bfloat16, sliding_window=5, num_pages=9)
    ),
}


def bits(array) -> np.ndarray:
    """An array's bytes, in an axis behind its own: NaN payloads count."""
    array = np.ascontiguousarray(array)
    return array.reshape(*array.shape, 1).view(np.uint8)


def assert_same(a, b) -> None:
    """Trees equal in every leaf, dtype and bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(bits(x), bits(y))


def with_random_bits(cache: paxcache.PagedKVCache, seed: int = 0) -> paxcache.PagedKVCache:
    """Every bit pattern in the pages: infinities, subnormal numbers and NaN with payloads among them."""
    rng = np.random.default_rng(seed)

    def fill(pool):
        return jnp.asarray(rng.integers(0, 256, pool.nbytes, np.uint8).view(pool.dtype).reshape(pool.shape))

    groups = [dataclasses.replace(g, pages=jax.tree.map(fill, g.pages)) for g in cache.groups]
    return dataclasses.replace(cache, groups=tuple(groups))


def ids(*numbers: int) -> jax.Array:
    return jnp.array(numbers, jnp.int32)
