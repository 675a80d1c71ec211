"""Tensor parallelism: heads split over devices, each with its slice of every page, and the same tables on all.

    python examples/tensor_parallel.py     # on two devices that the CPU pretends to be

Nothing of the cache travels. Each device keeps its own books, and they are equal, being computed from equal integers;
the one collective is the sum over heads behind each attention. The whole generation runs inside `jax.shard_map`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

import paxcache
from paxcache import sharding

V, L, E, H, K, D = 64, 2, 32, 8, 4, 8  # vocabulary, layers, features, query heads, KV heads, head dim
CONFIG = paxcache.CacheConfig(
    num_layers=L, num_kv_heads=K, head_dim=D, page_size=8, num_pages=16, max_seqs=2, max_pages_per_seq=4
)
SHAPES = {"embed": (V, E), "q": (L, E, H, D), "k": (L, E, K, D), "v": (L, E, K, D), "o": (L, H, D, E)}
SHAPES |= {"head": (E, V)}
BY_HEAD = Spec(None, None, "heads")
SPECS = dict.fromkeys(SHAPES, Spec()) | dict.fromkeys("qkv", BY_HEAD) | {"o": Spec(None, "heads")}


def model_fn(params, tokens, cache, step, logits_at, *, axis=None):
    """Layers of attention alone: what one device does, with its share of the heads."""
    x = params["embed"][tokens]
    for layer in range(L):
        q, k, v = (jnp.einsum("te,ehd->thd", x, params[name][layer]) for name in "qkv")
        cache = paxcache.append(cache, layer, k, v, step)
        out = paxcache.attend(cache, layer, q, step)
        change = jnp.einsum("thd,hde->te", out, params["o"][layer])
        x = x + (change if axis is None else jax.lax.psum(change, axis))
    return x[logits_at] @ params["head"], cache


def generate_on(mesh, params, prompts, num_tokens):
    """Greedy tokens i32[N, num_tokens] after prompts i32[N, T], and the cache, its pages split over the mesh."""
    cache = paxcache.init(CONFIG)
    specs = sharding.partition_specs(cache, "heads")
    placed = jax.tree.map(functools.partial(NamedSharding, mesh), (SPECS, specs))
    params, cache = jax.device_put((params, cache), placed)
    split_model = functools.partial(model_fn, axis="heads")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(SPECS, specs, Spec()), out_specs=(Spec(), specs))
    def run(params, cache, prompts):
        out = paxcache.generate(split_model, params, cache, prompts, max_new_tokens=num_tokens)
        return out.tokens, out.cache

    return run(params, cache, prompts)


def main(num_tokens: int = 12) -> None:
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    params = {
        name: 0.3 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    prompts = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    mesh = Mesh(np.array(jax.devices()[:2]), ("heads",))
    tokens, cache = generate_on(mesh, params, prompts, num_tokens)
    print(f"{len(jax.devices())} devices, pages split as {cache.groups[0].pages.k.sharding.spec}")
    alone = paxcache.generate(model_fn, params, paxcache.init(CONFIG), prompts, max_new_tokens=num_tokens)
    print(tokens, "the same as on one device:", np.array_equal(tokens, alone.tokens))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    main()
