"""Reading a cache: dense copies, statistics, the check of its invariants."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _checks, _quantize
from paxcache._cache import Layer, locate
from paxcache._state import state
from paxcache._types import NO_PAGE, InvariantError, PagedKVCache

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32


def gather_dense(
    cache: PagedKVCache, layer: Layer, max_len: int
) -> tuple[Float[Array, "B N K D"], Float[Array, "B N K Dv"] | None]:
    """Keys and values of one layer as dense arrays, for inspection and for code that insists on them.

    Quantised pages come back as float32.

    Args:
      cache: the cache.
      layer: as in `append`.
      max_len: tokens of each row to give (static).

    Returns:
      k [B, max_len, K, D] and v [B, max_len, K, Dv] (None where the group stores no values): zeros past a row's length
      and where no page is mapped.

    Raises:
      ValueError, TypeError: an argument's type or range is wrong.

    Example:
      >>> import paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> k, v = paxcache.gather_dense(paxcache.init(config), 0, 10)
      >>> k.shape
      (2, 10, 1, 8)
    """
    _checks.instance("cache", cache, PagedKVCache)
    group, index = locate(cache, layer)
    return _gather_dense(cache, group, index, _checks.static_int("max_len", max_len, minimum=1))


@functools.partial(jax.jit, static_argnums=(1, 3))
def _gather_dense(cache, group, index, max_len):
    state, S, M = cache.groups[group], cache.page_size, cache.max_pages_per_seq
    num_columns = min(M, -(-max_len // S))
    tables = state.block_tables[:, :num_columns]
    positions = jnp.arange(num_columns * S, dtype=jnp.int32).reshape(num_columns, S)
    stored = (tables >= 0)[:, :, None] & (positions[None] < cache.seq_lens[:, None, None])

    def dense(pool):
        if pool is None:
            return None
        tiles, scales = _quantize.load(pool, index, jnp.maximum(tables, 0), jnp.float32)  # [B, N, K, S, D]
        if scales is not None:
            tiles = tiles * scales[..., None]
        tiles = jnp.where(stored[:, :, None, :, None], tiles, 0)
        tokens = jnp.moveaxis(tiles, 2, 3).reshape(
            tables.shape[0], num_columns * S, *pool.shape[2:3], pool.shape[-1]
        )
        tokens = tokens[:, :max_len]
        return jnp.pad(tokens, ((0, 0), (0, max_len - tokens.shape[1]), (0, 0), (0, 0)))

    return dense(state.pages.k), dense(state.pages.v)


@state
class Stats:
    """How full a cache is: all groups together unless said otherwise. Made by `stats`, also under jit."""

    seq_lens: Int32[Array, "B"]
    """Length of each row."""
    num_free_pages: Int32[Array, ""]
    num_used_pages: Int32[Array, ""]
    """Pages with a reference, from rows or from outside."""
    num_shared_pages: Int32[Array, ""]
    """Pages with more than one reference."""
    used_by_group: tuple[Int32[Array, ""], ...]
    """Used pages of each group."""
    waste: Float[Array, ""]
    """Share of the slots in the pages mapped by rows that hold no token, from 0 to 1; shared pages count once."""
    page_bytes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Bytes of a page with all its layers, in each group."""
    pool_bytes: int = dataclasses.field(metadata={"static": True})
    """Bytes of all pages, free ones too: what the cache reserves."""

    @property
    def num_tokens(self) -> int:
        """Sum of the rows' lengths, which int32 need not hold; read on the host."""
        return int(np.asarray(self.seq_lens).sum(dtype=np.int64))

    @property
    def used_bytes(self) -> int:
        """Bytes of the used pages; read on the host."""
        return sum(int(n) * size for n, size in zip(self.used_by_group, self.page_bytes, strict=True))


def stats(cache: PagedKVCache) -> Stats:
    """Pages free, used and shared, tokens, bytes and waste.

    Args:
      cache: the cache.

    Returns:
      A `Stats`.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> stats = paxcache.stats(cache)
      >>> stats.num_used_pages.item(), stats.num_free_pages.item(), stats.waste.item()
      (2, 14, 0.375)
    """
    _checks.instance("cache", cache, PagedKVCache)
    page_bytes = tuple(
        sum(leaf.nbytes // leaf.shape[1] for leaf in jax.tree.leaves(g.pages)) for g in cache.groups
    )
    pool_bytes = sum(leaf.nbytes for g in cache.groups for leaf in jax.tree.leaves(g.pages))
    return Stats(**_stats(cache), page_bytes=page_bytes, pool_bytes=pool_bytes)


@jax.jit
def _stats(cache):
    S = cache.page_size
    starts = jnp.arange(cache.max_pages_per_seq, dtype=jnp.int32) * S
    held = jnp.clip(cache.seq_lens[:, None] - starts[None], 0, S)  # tokens in each entry
    used, shared, free, mapped_slots, empty_slots = [], 0, 0, 0, 0
    for group in cache.groups:
        P = group.ref_counts.shape[0]
        pages = jnp.where(group.block_tables >= 0, group.block_tables, P)
        fill = (
            jnp.full(P, -1, jnp.int32).at[pages].max(held, mode="drop")
        )  # of rows that share, the longest counts
        used.append((group.ref_counts > 0).sum(dtype=jnp.int32))
        free += P - used[-1]
        shared += (group.ref_counts > 1).sum(dtype=jnp.int32)
        mapped_slots += (S * (fill >= 0).sum(dtype=jnp.int32)).astype(jnp.float32)
        empty_slots += jnp.where(fill >= 0, S - fill, 0).sum(dtype=jnp.int32).astype(jnp.float32)
    return {
        "seq_lens": jnp.copy(cache.seq_lens),  # shares no buffer with a cache that is donated
        "num_free_pages": free,
        "num_used_pages": sum(used),
        "num_shared_pages": shared,
        "used_by_group": tuple(used),
        "waste": empty_slots / jnp.maximum(mapped_slots, 1),
    }


def check(cache: PagedKVCache, *, held: Any = None) -> None:
    """Verifies every invariant on the host, for tests and debugging. Reads the tables, never the pages.

    Lengths lie in what a row can hold; table entries name pages, none twice in a row; every token has a page; each
    page's count equals the references by tables plus those of `held`. In a group with a window, pages may be missing
    from the left: those that the next query does not see, and, since `truncate` may roll a row back to where the window
    has freed pages, more.

    Args:
      cache: the cache, not traced.
      held: i32[P] references from outside, such as a prefix index, or a tuple of one such array a group; None: none.

    Raises:
      InvariantError: names every broken invariant with row, page and values.
      TypeError, ValueError: the cache is traced, or held has another shape.

    Example:
      >>> import paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> paxcache.check(paxcache.init(config))
    """
    _checks.instance("cache", cache, PagedKVCache)
    if _checks.is_traced(cache):
        raise TypeError("check reads the cache on the host and cannot run inside jit")
    if held is None or isinstance(held, tuple):
        held_by_group = held or (None,) * len(cache.groups)
    else:
        held_by_group = (held,)
    if len(held_by_group) != len(cache.groups):
        raise ValueError(
            f"held: expected one array for each of {len(cache.groups)} groups, got {len(held_by_group)}"
        )
    S, M = cache.page_size, cache.max_pages_per_seq
    lens = np.asarray(cache.seq_lens)
    problems = [
        f"row {b}: length {lens[b]} outside [0, {M * S}]" for b in np.flatnonzero((lens < 0) | (lens > M * S))
    ]
    for index, (group, held_here) in enumerate(zip(cache.groups, held_by_group, strict=True)):
        tables, counts = np.asarray(group.block_tables), np.asarray(group.ref_counts)
        P = counts.shape[0]
        outside = np.zeros(P, np.int64) if held_here is None else np.asarray(held_here)
        if outside.shape != (P,) or not np.issubdtype(outside.dtype, np.integer):
            raise ValueError(
                f"held: expected integers of shape [{P}] for group {index}, got {_checks.describe(outside)}"
            )
        where = f"group {index}, "
        for b, m in np.argwhere((tables < NO_PAGE) | (tables >= P)):
            problems.append(f"{where}row {b}: entry {m} is {tables[b, m]}, outside [-1, {P})")
        mapped = np.where((tables >= 0) & (tables < P), tables, P)
        for b, row in enumerate(mapped):
            pages, times = np.unique(row[row < P], return_counts=True)
            problems += [f"{where}row {b}: page {p} is mapped twice" for p in pages[times > 1]]
            first_seen = 0 if group.sliding_window is None else max(lens[b] - group.sliding_window + 1, 0)
            columns = np.arange(first_seen // S, min(-(-lens[b] // S), M))
            missing = columns[row[columns] == P]
            if group.sliding_window is not None:  # a rollback deeper than the window leaves none on the left
                missing = missing[missing > np.min(columns[row[columns] < P], initial=M)]
            problems += [f"{where}row {b}: entry {m} holds visible tokens but maps no page" for m in missing]
        references = np.bincount(mapped.reshape(-1), minlength=P + 1)[:P] + outside
        for p in np.flatnonzero(references != counts):
            problems.append(f"{where}page {p}: count is {counts[p]}, but {references[p]} references exist")
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InvariantError("; ".join(problems[:20]) + more)
