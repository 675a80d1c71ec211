"""Whole pools: packed, resized, and given up while a server sleeps."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _allocator, _cache, _checks, ops
from paxcache._cache import _integers_only
from paxcache._types import INT32_MAX, NO_PAGE, PagedKVCache
from paxcache.offload import _pages
from paxcache.prefix._index import Index

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

    from paxcache.ops import Implementation

_PIECE_BYTES = 2**26
"""Of a pool that leaves or comes back, so much is on the device twice."""


def defragment(cache: PagedKVCache, *, implementation: Implementation = None) -> PagedKVCache:
    """Packs the used pages of each group to the front of its pool; as few pages as that takes are copied.

    Pages with references from outside (a prefix index, `swap_in`) are known there by their ids and stay where they are;
    so do those that are still arriving (`begin_resume`). Seen by the rows nothing changes; steps made before are no
    longer valid.

    Args:
      cache: the cache.
      implementation: backend of the copy, see `paxcache.ops`.

    Returns:
      The cache. Without references from outside, the free pages of each group now follow the used ones.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=4)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 20]), num_tokens=40)
      >>> cache = paxcache.release(cache, jnp.array([True, False]))
      >>> cache.groups[0].block_tables[1, :2].tolist()
      [2, 3]
      >>> sorted(offload.defragment(cache).groups[0].block_tables[1, :2].tolist())
      [0, 1]
    """
    _checks.instance("cache", cache, PagedKVCache)
    new, moves = _integers_only(_pack, cache)
    return _pages.with_pages(new, _move(_pages.pages_of(new), moves, implementation))


@functools.partial(jax.jit, static_argnums=2)
def _move(pages, moves, implementation):
    return tuple(
        ops.copy_pages(pool, src, dst, implementation=implementation)
        for pool, (src, dst) in zip(pages, moves, strict=True)
    )


@jax.jit
def _pack(cache):
    """Tables and counts of the packed pools, and per group the pages to copy, P where none is.

    The k-th movable page behind the place where the used pages could end goes to the k-th free page before it: no
    page is both copied and written to, so the copies may run in any order.
    """
    groups, moves = [], []
    for group in cache.groups:
        counts, tables = group.ref_counts, group.block_tables
        P = counts.shape[0]
        ids = jnp.arange(P, dtype=jnp.int32)
        used = counts > 0
        behind = ids >= used.sum(dtype=jnp.int32)
        arriving = (cache.epochs < 0)[:, None]
        inside = _allocator.add_references(jnp.zeros_like(counts), jnp.where(arriving, NO_PAGE, tables), 1)
        src = _allocator.listed(used & behind & (counts == inside), P)
        dst = _allocator.listed(~used & ~behind, P)  # as many as there are used pages behind, movable or not
        dst = jnp.where(src < P, dst, P)
        place = ids.at[src].set(dst, mode="drop")
        moved = counts.at[dst].set(counts[jnp.minimum(src, P - 1)], mode="drop").at[src].set(0, mode="drop")
        tables = jnp.where(tables >= 0, place[jnp.maximum(tables, 0)], NO_PAGE)
        groups.append(dataclasses.replace(group, block_tables=tables, ref_counts=moved))
        moves.append((src, dst))
    return dataclasses.replace(cache, groups=tuple(groups)), tuple(moves)


def resize(cache: PagedKVCache, num_pages: int | tuple[int, ...]) -> PagedKVCache:
    """A cache with more or fewer pages and the same rows. Reads counts on the host; not for use inside jit.

    Old and new pools exist side by side until the old cache is dropped. A pool that shrinks is packed first, as
    `defragment` does, and pages with references from outside stay where they are; one that grows keeps its page ids. So
    a prefix index goes on: take it along with `resize_index`.

    Args:
      cache: the cache.
      num_pages: the new number of physical pages, of each group; or a tuple of one number a group.

    Returns:
      The cache. Programs compiled for the old shapes are compiled anew.

    Raises:
      ValueError: the used pages do not fit, or one with references from outside, which cannot move, lies too far back.
      TypeError: the cache is traced, or num_pages of another type.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=4)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> paxcache.stats(offload.resize(cache, 2)).num_free_pages.item()
      0
      >>> offload.resize(cache, 1)
      Traceback (most recent call last):
        ...
      ValueError: num_pages: group 0 has 2 pages in use, expected at least as many, got 1
    """
    _checks.instance("cache", cache, PagedKVCache)
    if _checks.is_traced(cache):
        raise TypeError("resize changes shapes by what the counts are and cannot run inside jit")
    sizes = _pages.by_group("num_pages", num_pages, len(cache.groups), minimum=1)
    packed, moves = _integers_only(_pack, cache)
    groups, sources = [], []
    for g, (old, new, (src, dst), size) in enumerate(
        zip(cache.groups, packed.groups, moves, sizes, strict=True)
    ):
        P = old.ref_counts.shape[0]
        if size * cache.page_size > INT32_MAX:
            raise ValueError(
                f"num_pages: num_pages * page_size must fit int32, got {size} * {cache.page_size}"
            )
        source = jnp.arange(P, dtype=jnp.int32)
        if size < P:
            used = int((old.ref_counts > 0).sum())
            if used > size:
                raise ValueError(
                    f"num_pages: group {g} has {used} pages in use, expected at least as many, got {size}"
                )
            last = int(jnp.max(jnp.where(new.ref_counts > 0, source, NO_PAGE)))
            if last >= size:
                raise ValueError(
                    f"num_pages: group {g} has references from outside to page {last}, or it is still arriving, and "
                    f"cannot move; expected at least {last + 1}, got {size}"
                )
            source = source.at[dst].set(src, mode="drop")
        kept = new if size < P else old
        more = max(size - P, 0)
        counts = jnp.pad(kept.ref_counts[:size], (0, more))
        groups.append(dataclasses.replace(kept, pages=old.pages, ref_counts=counts))
        sources.append(jnp.pad(source[:size], (0, more), constant_values=P))
    resized = dataclasses.replace(cache, groups=tuple(groups))
    return _pages.with_pages(resized, _reload(_pages.pages_of(cache), tuple(sources)))


@jax.jit
def _reload(pages, sources):
    """Pools whose page i is page ``sources[i]`` of the old one; zeros where there is none."""

    def reload(pool, source):
        if _is_scale(pool):  # a new page has its layer's
            return pool.at[:, source].get(mode="clip")
        return pool.at[:, source].get(mode="fill", fill_value=0)

    return tuple(
        jax.tree.map(functools.partial(reload, source=source), old)
        for old, source in zip(pages, sources, strict=True)
    )


def resize_index(cache: PagedKVCache, index: Index) -> Index:
    """The prefix index of a cache that `resize` made a larger or smaller one: it goes on with the new one.

    Args:
      cache: the resized cache.
      index: the index (of `paxcache.prefix`) that belonged to the cache before; it stays valid for that one.

    Returns:
      The index. (One of `prefix.device` fits caches of any size and needs none of this.)

    Raises:
      ValueError: the index cannot be that of this cache: pages or windows differ in size, or it holds pages that the
        cache does not have or that are free there.
      TypeError: an argument is of another type, or the cache is traced.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload, prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=4,
      ...                               max_seqs=2, max_pages_per_seq=4)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([8, 0]), num_tokens=8)
      >>> cache, index = prefix.publish(cache, prefix.init(config), 0, range(8))
      >>> cache = offload.resize(cache, 10)
      >>> index = offload.resize_index(cache, index)
      >>> prefix.admit(cache, index, 1, range(9))[2]
      8
    """
    _checks.instance("cache", cache, PagedKVCache)
    _checks.instance("index", index, Index, source="prefix.init")
    if _checks.is_traced(cache):
        raise TypeError("resize_index reads the cache on the host and cannot run inside jit")
    sizes = (cache.page_size, cache.max_pages_per_seq, tuple(g.sliding_window for g in cache.groups))
    expected = (index.page_size, index.max_pages, index.windows)
    if sizes != expected:
        raise ValueError(
            "index: made for another config: (page_size, max_pages_per_seq, windows) is "
            f"{expected}, the cache's {sizes}"
        )
    held = []
    for g, (old, group) in enumerate(zip(index.held, cache.groups, strict=True)):
        counts = np.asarray(group.ref_counts)
        pages = np.flatnonzero(old)
        lost = pages[(pages >= len(counts)) | (counts[np.minimum(pages, len(counts) - 1)] < 1)]
        if lost.size:
            raise ValueError(
                f"index: belongs to another cache: it holds page {lost[0]} of group {g}, which is free or not there"
            )
        new = np.zeros(len(counts), bool)
        new[pages] = True
        held.append(new)
    return dataclasses.replace(index, num_pages=tuple(map(len, held)), held=tuple(held))


# A server that sleeps.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asleep:
    """A cache without its pools, made by `sleep`. A value: `wake` it as often as you like."""

    cache: PagedKVCache
    """Lengths, tables and counts; its groups have no pages."""
    page_ids: tuple[tuple[Int32[Array, "N"], ...], ...]
    """By group and block, where the block's pages lie in the pool; P for none."""
    blocks: tuple[tuple[Any, ...], ...]
    """By group, leaves [N, L, ...] of the pages that have a reference, in host memory; none where they were dropped."""
    scales: tuple[tuple[Any, ...], ...]
    """By group and leaf, what every page of a layer holds (given scales, [L, 1, ...]); None where nothing is."""
    pools: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    """By group, the structure of the pages, and shape, dtype and sharding of each leaf; no sharding where the leaf was
    not committed to one."""


def sleep(
    cache: PagedKVCache,
    *,
    keep_pages: bool = True,
    memory_kind: str = "pinned_host",
    implementation: Implementation = None,
) -> Asleep:
    """Takes the pools off the device, for a server that waits or whose GPU is lent to others. `wake` brings them back.

    The memory is free once nobody holds the cache that was given: ``asleep = sleep(cache); del cache``. Reads counts on
    the host; not for use inside jit.

    Args:
      cache: the cache.
      keep_pages: True: the pages that somebody references go to the host and come back bit for bit, under the same ids,
        so that rows, prefix indices and tickets go on. False: they are dropped, and all rows end. Whoever else holds
        pages must have let them go before (`prefix.reset`, `drop`, `cancel`).
      memory_kind: where the pages go, as in `swap_out`.
      implementation: backend of the gather, see `paxcache.ops`.

    Returns:
      An `Asleep`.

    Raises:
      ValueError: pages are to be dropped that have references from outside.
      TypeError: an argument is of another type, or the cache is traced.
      NotImplementedError: the device has no such memory.
      MemoryError: JAX's pool of pinned memory is too small, see `paxcache.offload`.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=4)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> asleep = offload.sleep(cache)
      >>> del cache
      >>> offload.wake(asleep).seq_lens.tolist()
      [20, 0]

    Reference: the sleep mode of vLLM.
    """
    _checks.instance("cache", cache, PagedKVCache)
    keep_pages = _pages.flag("keep_pages", keep_pages)
    if _checks.is_traced(cache):
        raise TypeError("sleep reads counts on the host and cannot run inside jit")
    _pages.space(memory_kind)
    if not keep_pages:
        cache = _cache.release(cache, jnp.ones(cache.max_seqs, bool))
    page_ids, blocks, scales, pools = [], [], [], []
    for g, group in enumerate(cache.groups):
        counts = np.asarray(group.ref_counts)
        used, P = np.flatnonzero(counts), len(counts)
        if used.size and not keep_pages:
            raise ValueError(
                f"keep_pages: group {g} has references from outside to {used.size} pages, expected none where pages "
                "are dropped: prefix.reset, offload.drop or offload.cancel give them back"
            )
        leaves, structure = jax.tree.flatten(group.pages)
        page_bytes = sum(leaf.nbytes // P for leaf in leaves)
        ids, copies, at = [], [], 0
        for size in _pages.pieces(used.size, page_bytes, _PIECE_BYTES):
            some = np.full(size, P, np.int32)
            some[: len(used[at : at + size])] = used[at : at + size]
            if len(copies) > 1:
                jax.block_until_ready(copies[-2])  # it has left the device
            copies += _pages.copy_out((group.pages,), (some,), memory_kind, implementation)
            ids.append(jnp.asarray(some))
            at += size
        page_ids.append(tuple(ids))
        blocks.append(tuple(copies))
        scales.append(tuple(leaf[:, :1] if _is_scale(leaf) else None for leaf in leaves))
        pools.append(
            (structure, tuple((x.shape, x.dtype, x.sharding if x.committed else None) for x in leaves))
        )
    bare = dataclasses.replace(cache, groups=tuple(dataclasses.replace(g, pages=None) for g in cache.groups))
    return Asleep(bare, tuple(page_ids), tuple(blocks), tuple(scales), tuple(pools))


def wake(asleep: Asleep, *, implementation: Implementation = None) -> PagedKVCache:
    """The cache of a `sleep`, with pools on the device again. Pages that nobody referenced are zeros.

    Pools that pages come into are committed to their device from then on, see `prefetch`.

    Args:
      asleep: from `sleep`; it stays valid.
      implementation: backend of the scatter, see `paxcache.ops`.

    Returns:
      The cache, its pools placed as they were.

    Raises:
      TypeError: asleep is of another type, or traced.

    Example: see `sleep`.
    """
    _checks.instance("asleep", asleep, Asleep, source="sleep")
    if _checks.is_traced(asleep):
        raise TypeError("asleep: wake makes the pools from the host and cannot run inside jit")
    groups = []
    for group, ids, blocks, scales, (structure, layout) in zip(
        asleep.cache.groups, asleep.page_ids, asleep.blocks, asleep.scales, asleep.pools, strict=True
    ):
        leaves = []
        for (shape, dtype, sharding), scale in zip(layout, scales, strict=True):
            if scale is None:
                leaves.append(jnp.zeros(shape, dtype, device=sharding))
            else:
                leaf = jnp.repeat(scale, shape[1], axis=1)
                leaves.append(leaf if sharding is None else jax.device_put(leaf, sharding))
        pool = jax.tree.unflatten(structure, leaves)
        for pages, block in zip(ids, blocks, strict=True):
            (pool,) = _pages.copy_in_place((pool,), (pages,), (block,), implementation)
        groups.append(dataclasses.replace(group, pages=pool))
    return dataclasses.replace(jax.tree.map(jnp.copy, asleep.cache), groups=tuple(groups))


def _is_scale(pool: Array) -> bool:
    """Given scales: every page has its layer's."""
    return pool.ndim == 4 and pool.shape[2:] == (1, 1)
