"""How a cache is laid out over devices: pages by KV heads, tables on every device. Imports `_types` alone.

Tensor parallelism splits heads, so each device holds its heads' slice of every page and the same small tables.
All functions of a cache then run inside `jax.shard_map` without a collective: each device keeps its own books, and the
books are equal because they are computed from equal integers.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.sharding import PartitionSpec

from paxcache._types import PagedKVCache


def partition_specs(cache: PagedKVCache, axis: str) -> PagedKVCache:
    """A PartitionSpec for every leaf of a cache: pages split over `axis` by KV heads, the rest replicated.

    Args:
      cache: a cache, or its shapes (`jax.eval_shape`).
      axis: name of the mesh axis that splits the heads; every group's KV heads must be a multiple of its size.

    Returns:
      A pytree like the cache, for in_specs and out_specs of `jax.shard_map`, or under `jax.NamedSharding`. A `Step` is
      replicated: its spec is ``PartitionSpec()``.

    Example:
      >>> import jax, paxcache
      >>> from paxcache import sharding
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=2, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> specs = sharding.partition_specs(jax.eval_shape(lambda: paxcache.init(config)), "heads")
      >>> tuple(specs.groups[0].pages.k)
      (None, None, 'heads')

    Reference: tensor parallelism over heads of Megatron-LM (Shoeybi et al., 2019).
    """
    replicated = jax.tree.map(lambda _: PartitionSpec(), cache)
    groups = tuple(
        dataclasses.replace(
            spec,
            # Scales that a layer's heads have in common, [L, P, 1, 1], go to every device.
            pages=jax.tree.map(
                lambda leaf, K=group.pages.k.shape[2]: (
                    PartitionSpec(None, None, axis) if leaf.shape[2] == K else PartitionSpec()
                ),
                group.pages,
            ),
        )
        for spec, group in zip(replicated.groups, cache.groups, strict=True)
    )
    return dataclasses.replace(replicated, groups=groups)
