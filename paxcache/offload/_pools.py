"""Whole pools: packed and resized. Imports `_pages`."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from paxcache import _allocator, _checks, ops
from paxcache._cache import _integers_only
from paxcache._types import INT32_MAX, NO_PAGE, PagedKVCache
from paxcache.offload import _pages

if TYPE_CHECKING:
    from paxcache.ops import Implementation


def defragment(cache: PagedKVCache, *, implementation: Implementation = None) -> PagedKVCache:
    """Packs the used pages of each group to the front of its pool; as few pages as that takes are copied.

    Pages with references from outside (a prefix index, `swap_in`) are known there by their ids and stay where they are.
    Seen by the rows nothing changes; steps made before are no longer valid.

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
        inside = _allocator.add_references(jnp.zeros_like(counts), tables, 1)
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
    `defragment` does; one that grows keeps its page ids.

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
                    f"num_pages: group {g} has references from outside to page {last}, which therefore cannot move; "
                    f"expected at least {last + 1}, got {size}"
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
        if pool.ndim == 4 and pool.shape[2:] == (1, 1):  # given scales: a new page has its layer's
            return pool.at[:, source].get(mode="clip")
        return pool.at[:, source].get(mode="fill", fill_value=0)

    return tuple(
        jax.tree.map(functools.partial(reload, source=source), old)
        for old, source in zip(pages, sources, strict=True)
    )
