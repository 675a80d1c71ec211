"""A cache that `sharding` placed, on meshes with explicit and auto axes, under plain jit and eagerly."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as Spec

import paxcache
from driver import config_of
from paxcache import ops, sharding

L, K, D, H, T = 2, 2, 4, 4, 8
HEADS = Spec(None, None, "heads")


def config_for(quantization: Any) -> paxcache.CacheConfig:
    group = paxcache.LayerGroup(
        num_layers=L, num_kv_heads=K, head_dim=D, dtype=jnp.float32, quantization=quantization
    )
    return config_of(group, num_pages=11)


@pytest.fixture(params=[AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
def mesh(request, cpu_devices):
    return jax.make_mesh((2,), ("heads",), axis_types=(request.param,), devices=cpu_devices)


def placed(tree, mesh, specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def forward(cache, query_lens, k, v, q):
    cache, step = paxcache.extend(cache, query_lens, num_tokens=T)
    for layer in range(L):
        cache = paxcache.append(cache, layer, k + layer, v, step)
        q = paxcache.attend(cache, layer, q, step)
    return cache, q


def churn(cache):
    cache = paxcache.reorder(cache, jnp.array([0, 0, 2, -1]))
    cache, ok = paxcache.fork(cache, jnp.array([0, -1]), jnp.array([3, 1]))
    cache = paxcache.truncate(cache, cache.seq_lens - 1)
    return paxcache.release(cache, jnp.array([False, False, True, False])), ok


def serve(cache, wrap) -> list[Any]:
    """Outputs of two steps, with integer calls between, and what the cache holds in the end."""
    rng, seen = np.random.default_rng(0), []
    for lens in ([3, 0, 4, 1], [1, 1, 2, 1]):
        k, v, q = (jnp.asarray(rng.standard_normal((T, n, D)), jnp.float32) for n in (K, K, H))
        cache, out = wrap(forward)(cache, jnp.asarray(lens), k, v, q)
        cache, ok = wrap(churn)(cache)
        seen += [np.asarray(out), np.asarray(ok)]
    paxcache.check(cache)
    seen.append(wrap(functools.partial(paxcache.gather_dense, layer=1, max_len=9))(cache))
    seen.append((paxcache.stats(cache).num_tokens, cache))
    return seen


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("entered", [False, True], ids=["no_mesh", "set_mesh"])
def test_calls_on_a_mesh_equal_one_device(mesh, entered, jit, quantization):
    wrap: Any = jax.jit if jit else lambda f: f
    cache = paxcache.init(config_for(quantization))
    wanted = serve(cache, wrap)
    on_mesh = placed(cache, mesh, sharding.partition_specs(cache, "heads"))
    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        found = serve(on_mesh, wrap)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, wanted)
    for leaf in jax.tree.leaves(found[-1][1].groups[0].pages):
        assert tuple(leaf.sharding.spec)[:3] == tuple(HEADS), "the pages have moved"


POOL = (L, 5, K, 4, 8)
IDS: Any = np.array([1, 2, -1], np.int32)
TABLES: Any = np.array([[0, 1], [2, 3], [4, -1]], np.int32)
LENS: Any = np.array([5, 8, 2], np.int32)
OPS = {
    "write_pages": lambda pool, k, q, blocks: ops.write_pages(pool, None, k, None, IDS, layer=1)[0],
    "copy_pages": lambda pool, k, q, blocks: ops.copy_pages(pool, IDS, IDS + 2),
    "gather_pages": lambda pool, k, q, blocks: ops.gather_pages(pool, IDS),
    "scatter_pages": lambda pool, k, q, blocks: ops.scatter_pages(pool, IDS, blocks),
    "paged_attention": lambda pool, k, q, blocks: ops.paged_attention(
        q, pool, pool, TABLES, LENS, layer=1, return_lse=True, sinks=q.sum((0, 2)), sm_scale=q.max()
    ),
    "merge_attention": lambda pool, k, q, blocks: ops.merge_attention(jnp.stack([q, q]), q[None, :, :, 0].repeat(2, 0)),
}  # fmt: skip


@pytest.mark.parametrize("sharded", ["pool alone", "all"])
@pytest.mark.parametrize("name", OPS)
def test_ops_on_a_mesh_equal_one_device(mesh, name, sharded):
    shapes = POOL, (3, K, 8), (3, H, 8), (3, L, *POOL[2:])
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.uniform(0.1, 1, s), jnp.float32) for s in shapes]
    specs = HEADS, Spec(None, "heads"), Spec(None, "heads"), HEADS
    on_mesh = [
        placed(x, mesh, spec) if sharded == "all" or i == 0 else x
        for i, (x, spec) in enumerate(zip(args, specs, strict=True))
    ]
    wanted = OPS[name](*args)
    for function in (OPS[name], jax.jit(OPS[name])):
        found = function(*on_mesh)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-5), found, wanted)


def gathered(text: str | None) -> int:
    """Elements of the largest array that devices exchange in an HLO module."""
    exchanges = re.findall(
        r"= \(?\w+\[([\d,]*)\].* (?:all-gather|all-to-all|all-reduce|collective-permute)", text or ""
    )
    return max((math.prod(map(int, dims.split(","))) if dims else 1 for dims in exchanges), default=0)


@pytest.mark.parametrize("entered", [False, True], ids=["no_mesh", "set_mesh"])
def test_no_pool_is_gathered(mesh, entered):
    """Devices exchange queries at most, whose 128 numbers are fewer than a page's layer of all heads."""
    config = config_of(
        paxcache.LayerGroup(num_layers=L, num_kv_heads=K, head_dim=D, dtype=jnp.float32),
        page_size=64,
        num_pages=64,
    )
    cache = paxcache.init(config)
    cache = placed(cache, mesh, sharding.partition_specs(cache, "heads"))
    tokens = [jnp.zeros((T, n, D)) for n in (K, K, H)]
    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        compiled = jax.jit(forward, donate_argnums=0).lower(cache, jnp.zeros(4, jnp.int32), *tokens).compile()
    assert gathered(compiled.as_text()) <= T * H * D
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= config.pool_bytes / 2  # of one device


def test_detector_sees_a_pool_that_is_gathered(cpu_devices):
    mesh = jax.make_mesh((2,), ("heads",), devices=cpu_devices)
    pool = placed(jnp.zeros(POOL), mesh, HEADS)
    whole = NamedSharding(mesh, Spec())
    text = jax.jit(lambda p: jax.sharding.reshard(p, whole)).lower(pool).compile().as_text()
    assert gathered(text) == math.prod(POOL)
