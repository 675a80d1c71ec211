"""The cache's side of sharing: tables and reference counts, as jitted integer functions.

Imports `_allocator`, `_checks` and `_cache`.

Pages stay outside each jit. The host reads and writes a few rows in one transfer each; lists are padded to powers of
two, so that few programs are compiled whatever their lengths.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _allocator, _checks
from paxcache._cache import _integers_only, row_epochs
from paxcache._types import NO_PAGE, PagedKVCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, Int32, UInt32


def read_rows(
    cache: PagedKVCache, rows: Sequence[int]
) -> tuple[Int32[np.ndarray, "N"], Int32[np.ndarray, "N"], Int32[np.ndarray, "N G M"]]:
    """Lengths, epochs and tables of some rows: one transfer to the host."""
    tables = [g.block_tables for g in cache.groups]
    data = np.asarray(_read_rows(cache.seq_lens, row_epochs(cache), tables, _padded(rows, 0)))[: len(rows)]
    return data[:, 0], data[:, 1], data[:, 2:].reshape(len(rows), len(tables), -1)


@jax.jit
def _read_rows(seq_lens, epochs, tables, rows):
    return jnp.concatenate(
        [jnp.stack([seq_lens[rows], epochs[rows]], axis=1), *(t[rows] for t in tables)], axis=1
    )


def read_counts(cache: PagedKVCache) -> list[Int32[np.ndarray, "P"]]:
    """Reference counts of all groups: one transfer to the host."""
    return jax.device_get([g.ref_counts for g in cache.groups])


def write_rows(
    cache: PagedKVCache,
    rows: Sequence[int],
    seq_lens: Int32[np.ndarray, "N"],
    epochs: Int32[np.ndarray, "N"],
    tables: Int32[np.ndarray, "N G M"],
    taken: Sequence[Sequence[int]],
    holdings: int,
) -> PagedKVCache:
    """Gives rows new lengths, epochs and tables, and adds a reference to each of the pages `taken` in each group.

    `holdings` is the index's checksum after that.
    """
    ids = _padded(rows, cache.max_seqs)  # which stands for no row: what it is given is dropped
    lens, epochs, tables = (_padded(x, 0) for x in (seq_lens, epochs, tables))
    cache = dataclasses.replace(cache, epochs=row_epochs(cache))
    words = _words(cache, holdings)
    return _integers_only(_write_rows, cache, ids, lens, epochs, tables, _padded_lists(taken), words)


@jax.jit
def _write_rows(cache, rows, seq_lens, epochs, tables, taken, holdings):
    groups = []
    for g, (group, pages) in enumerate(zip(cache.groups, taken, strict=True)):
        new_tables, counts = set_rows(group.block_tables, group.ref_counts, rows, tables[:, g])
        counts = _allocator.add_references(counts, pages, 1)
        groups.append(dataclasses.replace(group, block_tables=new_tables, ref_counts=counts))
    seq_lens = cache.seq_lens.at[rows].set(seq_lens, mode="drop")
    epochs = cache.epochs.at[rows].set(epochs, mode="drop")
    changes = {"seq_lens": seq_lens, "groups": tuple(groups), "epochs": epochs, "holdings": holdings}
    return (dataclasses.replace(cache, **changes),)


def write_epochs(cache: PagedKVCache, rows: Sequence[int], epoch: int) -> PagedKVCache:
    """`write_rows` for idle rows that get nothing but an epoch."""
    epochs = _write_epochs(row_epochs(cache), _padded(rows, cache.max_seqs), np.int32(epoch))
    return dataclasses.replace(cache, epochs=epochs)


@jax.jit
def _write_epochs(epochs, rows, epoch):
    return epochs.at[rows].set(epoch, mode="drop")


def set_rows(
    block_tables: Int32[Array, "B M"],
    ref_counts: Int32[Array, "P"],
    rows: Int32[Array, "N"],
    new: Int32[Array, "N M"],
) -> tuple[Int32[Array, "B M"], Int32[Array, "P"]]:
    """Tables with some rows replaced, and the counts after that; row B stands for none."""
    old = block_tables.at[rows].get(mode="fill", fill_value=NO_PAGE)
    new = jnp.where((rows < block_tables.shape[0])[:, None], new, NO_PAGE)
    return block_tables.at[rows].set(new, mode="drop"), _allocator.remap(old, ref_counts, new)


def read_holdings(cache: PagedKVCache) -> int | None:
    """The checksum of what an index holds of the cache; None where the cache was put together without."""
    if cache.holdings is None:
        return None
    high, low = np.asarray(cache.holdings).tolist()
    return high << 32 | low


def _words(cache: PagedKVCache, holdings: int) -> UInt32[np.ndarray, "2"] | None:
    return None if cache.holdings is None else np.array([holdings >> 32, holdings & 0xFFFFFFFF], np.uint32)


def add_references(
    cache: PagedKVCache, pages: Sequence[Sequence[int]], amount: int, holdings: int
) -> PagedKVCache:
    """Adds `amount` to the count of each of the pages in each group; `holdings` is the index's checksum after that."""
    if not any(len(p) for p in pages):
        return cache
    words = _words(cache, holdings)
    return _integers_only(_add_references, cache, _padded_lists(pages), np.int32(amount), words)


@jax.jit
def _add_references(cache, pages, amount, holdings=None):
    groups = tuple(
        dataclasses.replace(g, ref_counts=_allocator.add_references(g.ref_counts, p, amount))
        for g, p in zip(cache.groups, pages, strict=True)
    )
    return (
        dataclasses.replace(cache, groups=groups, holdings=cache.holdings if holdings is None else holdings),
    )


def _padded(values: Any, fill: int, least: int = 0) -> Int32[np.ndarray, "N ..."]:
    """Values followed by others, a power of two of them in all that is not below `least`."""
    values = np.asarray(values, np.int32)  # and no np.pad, which takes longer than the program does
    size = 1 << max(len(values) - 1, least - 1, 0).bit_length()
    padded = np.full((size, *values.shape[1:]), fill, np.int32)
    padded[: len(values)] = values
    return padded


def _padded_lists(lists: Sequence[Sequence[int]]) -> tuple[Int32[np.ndarray, "N"], ...]:
    """Lists of pages of one power of two of entries, padded with NO_PAGE."""
    most = max(map(len, lists))
    return tuple(_padded(x, NO_PAGE, most) for x in lists)


def shortfall(
    cache: PagedKVCache,
    query_lens: Int32[Array, "B"],
    *,
    num_tokens: int | None,
    max_query_len: int | None,
) -> Int32[Array, "G"]:
    """In each group, the pages that `extend` with these arguments would lack. Rows that can never fit need none."""
    query_lens = _checks.int_array("query_lens", query_lens, "B", B=cache.max_seqs)
    num_tokens, max_query_len = _checks.step_size(num_tokens, max_query_len, cache.max_seqs)
    tables = [g.block_tables for g in cache.groups]
    counts = [g.ref_counts for g in cache.groups]
    windowed = tuple(g.sliding_window is not None for g in cache.groups)
    size = cache.page_size
    return _shortfall(cache.seq_lens, tables, counts, query_lens, num_tokens, max_query_len, size, windowed)


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _shortfall(seq_lens, tables, ref_counts, query_lens, num_tokens, max_query_len, page_size, windowed):
    _, touched = _allocator.ask(
        seq_lens,
        query_lens,
        tables,
        ref_counts,
        windowed=windowed,
        num_tokens=num_tokens,
        max_query_len=max_query_len,
        page_size=page_size,
    )
    missing = [
        entries.needs.sum(dtype=jnp.int32) - (counts == 0).sum(dtype=jnp.int32)
        for entries, counts in zip(touched, ref_counts, strict=True)
    ]
    return jnp.maximum(jnp.stack(missing), 0)
