"""The host tier: pages copied to pinned host memory and back, preemption of rows, pools packed and resized, a store.

Imports `_types`, `_checks`, `_allocator`, `ops` and `_cache`.

What lies on the host is a value too: an `Extent` holds page-major blocks ``[N, L, ...]``, one leaf for each leaf of a
group's pages, in memory of its own. It is written once, by one gather and one large transfer a leaf, and never again,
so a transfer under way cannot meet a later write: a pool of host pages would be copied on each swap, or be written
while it is read. The memory returns when the last reference to the extent is dropped.

    extent = offload.swap_out(cache, page_ids)                  # copies; references stay as they are
    cache, page_ids, ok = offload.swap_in(cache, extent)        # into free pages, all or none

    host = offload.init(config, num_pages)                      # how many pages tickets may hold together
    cache, host, ticket = offload.preempt(cache, host, rows)    # ticket.ok; the rows are idle, their pages free
    cache, host, ok = offload.resume(cache, host, ticket, rows)

    cache = offload.defragment(cache)                           # used pages to the front of their pools
    cache = offload.resize(cache, num_pages)

`PageStore` holds arrays by key in ordinary CPU memory, for many threads, and is the one object here that changes.

Of the others all but `resize` run under jit, and pools change in place where a caller's jit donates them. Keep the two
directions in programs of their own: within one, XLA may drop the way over the host. Nothing raises because of what
values are: a refused call changes nothing and says so.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
import threading
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paxcache import _allocator, _checks, ops
from paxcache._cache import _integers_only
from paxcache._types import INT32_MAX, NO_PAGE, CacheConfig, PagedKVCache, Pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, Bool, Int32

    from paxcache.ops import Implementation

_SPACES = {"pinned_host": jax.memory.Space.Host, "device": jax.memory.Space.Device}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extent:
    """Copies of pages, by group. A value: nothing ever writes to it."""

    blocks: tuple[Pages, ...]
    """Per group, the pages' leaves as [N, L, ...], in host memory."""
    held: tuple[Bool[Array, "N"], ...]
    """Per group, which entries hold a page; the others are padding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Host:
    """The account of host memory: how many pages the tickets may hold and do. The pages lie in the tickets."""

    capacity: Int32[Array, "G"]
    """Per group, the pages that all tickets together may hold."""
    used: Int32[Array, "G"]
    """Per group, the pages that they hold."""
    serials: Int32[Array, "C"]
    """Serial numbers of the tickets that are out; NO_PAGE where an entry is free. A used ticket is not taken twice."""
    next_serial: Int32[Array, ""]
    memory_kind: str = dataclasses.field(default="pinned_host", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ticket:
    """Preempted rows: their lengths, tables and pages. Made by `preempt`, good for one `resume` or `discard`."""

    ok: Bool[Array, ""]
    """Whether the rows were preempted; if not, the ticket is empty and nothing has changed."""
    seq_lens: Int32[Array, "N"]
    block_tables: tuple[Int32[Array, "N M"], ...]
    """Per group, the tables with entries of the extent for pages; holes stay NO_PAGE."""
    extent: Extent
    """Each page once, however many of the rows share it."""
    entry: Int32[Array, ""]
    """Where the host's account has the ticket; NO_PAGE if it holds no page and needs no account."""
    serial: Int32[Array, ""]


def _space(memory_kind: str) -> Any:
    """JAX's name for a memory kind, which the device must have."""
    if memory_kind not in _SPACES:
        raise ValueError(f"memory_kind: expected one of {tuple(_SPACES)}, got {memory_kind!r}")
    if memory_kind == "pinned_host":
        device = jax.devices()[0]
        if memory_kind not in (memory.kind for memory in device.addressable_memories()):
            raise NotImplementedError(f"memory_kind: {device.device_kind!r} has no {memory_kind!r} memory")
    return _SPACES[memory_kind]


def _by_group(name: str, value: Any, num_groups: int, *, minimum: int) -> tuple[int, ...]:
    """A static number of pages for each group: one for all, or a tuple of one each."""
    values = value if isinstance(value, tuple) else (value,) * num_groups
    if len(values) != num_groups:
        raise ValueError(f"{name}: expected one for each of {num_groups} groups, got {len(values)}")
    return tuple(_checks.static_int(name, v, minimum=minimum) for v in values)


def _is_traced(*trees: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _copy_out(pages, page_ids, space, implementation):
    """Blocks of the named pages in another memory. Pools go in and do not come out, so an eager call copies none."""
    blocks = []
    for pool, ids in zip(pages, page_ids, strict=True):
        if ids.shape[0]:
            block = ops.gather_pages(pool, ids, implementation=implementation)
        else:
            block = jax.tree.map(lambda x: jnp.zeros((0, x.shape[0], *x.shape[2:]), x.dtype), pool)
        blocks.append(jax.device_put(block, space))
    return tuple(blocks)


@functools.partial(jax.jit, static_argnums=3)
def _copy_in(pages, page_ids, blocks, implementation):
    """The pools with the blocks in the named pages; ids outside a pool are dropped."""
    pools = []
    for pool, ids, block in zip(pages, page_ids, blocks, strict=True):
        here = jax.device_put(block, jax.memory.Space.Device)
        pools.append(
            ops.scatter_pages(pool, ids, here, implementation=implementation) if ids.shape[0] else pool
        )
    return tuple(pools)


def _with_pages(cache: PagedKVCache, pages: tuple[Pages, ...]) -> PagedKVCache:
    groups = tuple(dataclasses.replace(g, pages=p) for g, p in zip(cache.groups, pages, strict=True))
    return dataclasses.replace(cache, groups=groups)


def _pages_of(cache: PagedKVCache) -> tuple[Pages, ...]:
    return tuple(g.pages for g in cache.groups)


def _check_extent(name: str, cache: PagedKVCache, extent: Extent) -> None:
    """Blocks that fit the cache's pages in structure, shape and dtype."""
    if len(extent.blocks) != len(cache.groups):
        raise ValueError(
            f"{name}: expected pages of {len(cache.groups)} groups, got those of {len(extent.blocks)}"
        )
    for g, (group, blocks) in enumerate(zip(cache.groups, extent.blocks, strict=True)):
        if jax.tree.structure(group.pages) != jax.tree.structure(blocks):
            raise ValueError(
                f"{name}: expected leaves like group {g}'s pages, {jax.tree.structure(group.pages)}, "
                f"got {jax.tree.structure(blocks)}"
            )
        N = extent.held[g].shape[0]
        for pool, block in zip(jax.tree.leaves(group.pages), jax.tree.leaves(blocks), strict=True):
            expected = (N, pool.shape[0], *pool.shape[2:])
            if block.shape != expected or block.dtype != pool.dtype:
                raise ValueError(
                    f"{name}: expected {pool.dtype}{list(expected)} for group {g}, got {_checks.describe(block)}"
                )


def _check_page_ids(cache: PagedKVCache, page_ids: Any) -> tuple[Int32[Array, "N"], ...]:
    """One array of pages a group; a single array is that of a single group."""
    ids = page_ids if isinstance(page_ids, tuple) else (page_ids,)
    if len(ids) != len(cache.groups):
        raise ValueError(
            f"page_ids: expected one array for each of {len(cache.groups)} groups, got {len(ids)}"
        )
    return tuple(_checks.int_array("page_ids", x, "N") for x in ids)


# Pages.


def swap_out(
    cache: PagedKVCache,
    page_ids: Int32[Array, "N"] | tuple[Int32[Array, "N"], ...],
    *,
    memory_kind: str = "pinned_host",
    implementation: Implementation = None,
) -> Extent:
    """Copies pages, with all their layers, to host memory. The cache and its references stay as they are.

    Programs are compiled for each N: pad lists to a few sizes.

    Args:
      cache: the cache.
      page_ids: i32[N] pages in any order, or a tuple of one such array a group. Ids outside [0, P) are padding; a
        page that nobody references is nobody's to copy and counts as padding too.
      memory_kind: where the copies go: "pinned_host", or "device" for those who only want a copy.
      implementation: backend of the gather, see `paxcache.ops`.

    Returns:
      An `Extent`; ``extent.held`` tells which entries hold a page.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.
      NotImplementedError: the device has no such memory.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> extent = offload.swap_out(cache, jnp.array([1, 0, -1, 7]))
      >>> extent.blocks[0].k.shape, extent.held[0].tolist()
      ((4, 2, 1, 16, 8), [True, True, False, False])

    Reference: the swap kernels of FastDeploy's cache manager; the host tier of SGLang's HiCache.
    """
    ids = _check_page_ids(cache, page_ids)
    ids, held = _find_pages(tuple(g.ref_counts for g in cache.groups), ids)
    return Extent(_copy_out(_pages_of(cache), ids, _space(memory_kind), implementation), held)


@jax.jit
def _find_pages(ref_counts, page_ids):
    found, held = [], []
    for counts, ids in zip(ref_counts, page_ids, strict=True):
        P = counts.shape[0]
        exists = (ids >= 0) & (ids < P) & (counts[jnp.clip(ids, 0, P - 1)] > 0)
        found.append(jnp.where(exists, ids, P))
        held.append(exists)
    return tuple(found), tuple(held)


def swap_in(
    cache: PagedKVCache, extent: Extent, *, implementation: Implementation = None
) -> tuple[PagedKVCache, tuple[Int32[Array, "N"], ...], Bool[Array, ""]]:
    """Copies an extent's pages into free pages, all of them in all groups or none.

    Each of the pages comes with one reference, which is the caller's: hand the pages on (`prefix.move` takes references
    of its own), then give them back with `drop`.

    Args:
      cache: the cache.
      extent: from `swap_out`; it stays valid.
      implementation: backend of the scatter, see `paxcache.ops`.

    Returns:
      The cache; per group the pages that the extent's entries lie in now, NO_PAGE for padding and where refused; and
      ok bool[]: False if some group has too few free pages.

    Raises:
      ValueError, TypeError: the extent does not fit the cache.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> extent = offload.swap_out(cache, jnp.array([1, -1, 0]))
      >>> cache, page_ids, ok = offload.swap_in(cache, extent)
      >>> page_ids[0].tolist(), ok.item()
      ([2, -1, 3], True)
    """
    _check_extent("extent", cache, extent)
    new, targets, page_ids, ok = _integers_only(_swap_in, cache, extent.held)
    pages = _copy_in(_pages_of(new), targets, extent.blocks, implementation)
    return _with_pages(new, pages), page_ids, ok


def _take(
    ref_counts: tuple[Int32[Array, "P"], ...], held: tuple[Bool[Array, "N"], ...], ok: Bool[Array, ""]
) -> tuple[tuple[Int32[Array, "N"], ...], Bool[Array, ""]]:
    """A free page for each held entry, P for the others; none at all unless `ok` and every group has enough."""
    for counts, wanted in zip(ref_counts, held, strict=True):
        ok &= wanted.sum(dtype=jnp.int32) <= (counts == 0).sum(dtype=jnp.int32)
    taken = []
    for counts, wanted in zip(ref_counts, held, strict=True):
        P, N = counts.shape[0], wanted.shape[0]
        if not N:
            taken.append(jnp.zeros(0, jnp.int32))
            continue
        free = _allocator.listed(counts == 0, N)
        rank = _allocator.running_sum(wanted)
        taken.append(jnp.where(wanted & ok, free[jnp.maximum(rank - 1, 0)], P))
    return tuple(taken), ok


@jax.jit
def _swap_in(cache, held):
    counts = tuple(g.ref_counts for g in cache.groups)
    targets, ok = _take(counts, held, jnp.bool_(True))
    groups, page_ids = [], []
    for group, pages in zip(cache.groups, targets, strict=True):
        page_ids.append(jnp.where(pages < group.ref_counts.shape[0], pages, NO_PAGE))
        new = _allocator.add_references(group.ref_counts, page_ids[-1], 1)
        groups.append(dataclasses.replace(group, ref_counts=new))
    return dataclasses.replace(cache, groups=tuple(groups)), targets, tuple(page_ids), ok


def drop(cache: PagedKVCache, page_ids: Int32[Array, "N"] | tuple[Int32[Array, "N"], ...]) -> PagedKVCache:
    """Gives back one reference to each page: those that `swap_in` handed out. A page without any left is free.

    Args:
      cache: the cache.
      page_ids: i32[N] pages, or a tuple of one such array a group; negative ids are padding. As with every count in
        the cache nothing is clamped: what is given back twice shows in `check`.

    Returns:
      The cache.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> cache, page_ids, _ = offload.swap_in(cache, offload.swap_out(cache, jnp.array([0])))
      >>> paxcache.stats(offload.drop(cache, page_ids)).num_used_pages.item()
      2
    """
    return _integers_only(_drop, cache, _check_page_ids(cache, page_ids))


@jax.jit
def _drop(cache, page_ids):
    groups = tuple(
        dataclasses.replace(g, ref_counts=_allocator.add_references(g.ref_counts, ids, -1))
        for g, ids in zip(cache.groups, page_ids, strict=True)
    )
    return (dataclasses.replace(cache, groups=groups),)


# Rows.


def init(config: CacheConfig, num_pages: int | tuple[int, ...], *, memory_kind: str = "pinned_host") -> Host:
    """An account of host memory, for `preempt`. Reserves nothing: each ticket brings its own memory.

    Args:
      config: the cache's configuration.
      num_pages: pages that the tickets together may hold, in each group; or a tuple of one number a group.
      memory_kind: where tickets keep their pages: "pinned_host", or "device".

    Returns:
      A `Host` with no ticket out.

    Raises:
      ValueError, TypeError: an argument's type or range is wrong.
      NotImplementedError: the device has no such memory.

    Example:
      >>> import paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> host = offload.init(config, 64)
      >>> host.capacity.tolist(), host.used.tolist()
      ([64], [0])
    """
    if not isinstance(config, CacheConfig):
        raise TypeError(f"config: expected a CacheConfig, got {config!r}")
    capacity = _by_group("num_pages", num_pages, len(config.layer_groups), minimum=0)
    if sum(capacity) > INT32_MAX:
        raise ValueError(f"num_pages: together they must fit int32, got {sum(capacity)}")
    _space(memory_kind)
    serials = jnp.full(
        max(sum(capacity), 1), NO_PAGE, jnp.int32
    )  # a ticket that is out holds a page at least
    used = jnp.zeros(len(capacity), jnp.int32)
    return Host(jnp.array(capacity, jnp.int32), used, serials, jnp.int32(0), memory_kind)


def _check_host(cache: PagedKVCache, host: Host) -> None:
    if not isinstance(host, Host):
        raise TypeError(f"host: expected a Host (from offload.init), got {host!r}")
    if host.capacity.shape != (len(cache.groups),):
        raise ValueError(
            f"host: expected one of {len(cache.groups)} groups, got one of {host.capacity.shape[0]}"
        )


def preempt(
    cache: PagedKVCache,
    host: Host,
    rows: Int32[Array, "N"],
    *,
    max_pages: int | tuple[int, ...] | None = None,
    implementation: Implementation = None,
) -> tuple[PagedKVCache, Host, Ticket]:
    """Moves whole rows to the host and frees their pages; all of the named rows or none.

    Pages that other rows or a prefix index share are copied out like the others, and those keep theirs. Pages that
    the preempted rows share with each other go once, and are shared again after `resume`.

    A ticket's memory is `max_pages` pages, whether it needs them or not; the account counts those that it needs.

    Args:
      cache: the cache.
      host: the account of host memory.
      rows: i32[N] rows; -1 is padding. A row that is idle already takes part with nothing.
      max_pages: pages that the ticket can hold (static), in each group or a tuple of one number a group. None: called
        outside jit, it is read from the cache and rounded up by an eighth at most, so that few programs are compiled;
        inside jit, it is the most that N rows can map.
      implementation: backend of the gather, see `paxcache.ops`.

    Returns:
      The cache with the rows idle, the account, and a `Ticket`. ``ticket.ok`` is False, and nothing has changed, if a
      row is out of range or named twice, or if the pages pass `max_pages` or what is left of the host's capacity.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=4)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 30]), num_tokens=50)
      >>> host = offload.init(config, 64)
      >>> cache, host, ticket = offload.preempt(cache, host, jnp.array([0]))
      >>> ticket.ok.item(), cache.seq_lens.tolist(), host.used.tolist()
      (True, [0, 30], [2])
      >>> cache, host, ok = offload.resume(cache, host, ticket, jnp.array([0]))
      >>> ok.item(), cache.seq_lens.tolist(), host.used.tolist()
      (True, [20, 30], [0])

    Reference: preemption by swapping of PagedAttention (Kwon et al., 2023), section 4.5.
    """
    _check_host(cache, host)
    rows = _checks.int_array("rows", rows, "N")
    if max_pages is not None:
        bounds = _by_group("max_pages", max_pages, len(cache.groups), minimum=0)
    elif _is_traced(cache, host, rows):
        most = rows.shape[0] * cache.max_pages_per_seq
        bounds = tuple(min(g.ref_counts.shape[0], most) for g in cache.groups)
    else:
        bounds = _read_bounds(cache, host, rows)
    new, host, ticket, ids = _integers_only(_preempt, cache, host, rows, bounds)
    blocks = _copy_out(_pages_of(cache), ids, _space(host.memory_kind), implementation)
    extent = dataclasses.replace(ticket.extent, blocks=blocks)
    return new, host, dataclasses.replace(ticket, extent=extent)


def _read_bounds(cache: PagedKVCache, host: Host, rows: Int32[Array, "N"]) -> tuple[int, ...]:
    """Size classes of what the rows map now; nothing where the host will refuse them."""
    tables, counts = tuple(g.block_tables for g in cache.groups), tuple(g.ref_counts for g in cache.groups)
    needed, left = jax.device_get((_count_pages(tables, counts, rows), host.capacity - host.used))
    return tuple(_size_class(int(n)) if (needed <= left).all() else 0 for n in needed)


def _size_class(num_pages: int) -> int:
    """The next number of pages that has at most four binary digits before its zeros."""
    step = 1 << max(num_pages.bit_length() - 4, 0)
    return -(-num_pages // step) * step


def _mapped(
    block_tables: Int32[Array, "B M"], ref_counts: Int32[Array, "P"], rows: Int32[Array, "N"]
) -> tuple[Int32[Array, "N M"], Bool[Array, "P"]]:
    """The tables of the rows, and which pages stand in them; rows out of range map nothing."""
    B, P = block_tables.shape[0], ref_counts.shape[0]
    exists = (rows >= 0) & (rows < B)
    tables = jnp.where(exists[:, None], block_tables[jnp.clip(rows, 0, B - 1)], NO_PAGE)
    pages = jnp.where(tables >= 0, tables, P)
    return tables, jnp.zeros(P, bool).at[pages].set(True, mode="drop")


@jax.jit
def _count_pages(block_tables, ref_counts, rows):
    mapped = [_mapped(t, c, rows)[1] for t, c in zip(block_tables, ref_counts, strict=True)]
    return jnp.stack([pages.sum(dtype=jnp.int32) for pages in mapped])


@functools.partial(jax.jit, static_argnums=3)
def _preempt(cache, host, rows, bounds):
    B = cache.seq_lens.shape[0]
    mapped = [_mapped(g.block_tables, g.ref_counts, rows) for g in cache.groups]
    counts = jnp.stack([pages.sum(dtype=jnp.int32) for _, pages in mapped])
    ok = (_allocator.named_once(rows, B) | (rows == -1)).all()
    ok &= (counts <= jnp.array(bounds, jnp.int32)).all() & (counts <= host.capacity - host.used).all()
    counts = jnp.where(ok, counts, 0)

    gone = jnp.zeros(B, bool).at[jnp.where(ok & (rows >= 0), rows, B)].set(True, mode="drop")
    groups, tables, ids, held = [], [], [], []
    for group, (old, pages), bound, count in zip(cache.groups, mapped, bounds, counts, strict=True):
        rank = jnp.cumsum(pages, dtype=jnp.int32) - 1
        tables.append(jnp.where(ok & (old >= 0), rank[jnp.maximum(old, 0)], NO_PAGE))
        ids.append(_allocator.listed(pages & ok, bound))
        held.append(jnp.arange(bound, dtype=jnp.int32) < count)
        left, references = _allocator.unmap(group.block_tables, group.ref_counts, gone[:, None])
        groups.append(dataclasses.replace(group, block_tables=left, ref_counts=references))

    at = jnp.clip(rows, 0, B - 1)
    lens = jnp.where(ok & (rows >= 0), cache.seq_lens[at], 0)
    holds = (counts > 0).any()
    C = host.serials.shape[0]
    free = _allocator.listed(host.serials == NO_PAGE, 1)[0]  # there is one wherever there is capacity
    entry = jnp.where(holds, free, NO_PAGE)
    serial = jnp.where(holds, host.next_serial, NO_PAGE)
    account = dataclasses.replace(
        host,
        used=host.used + counts,
        serials=host.serials.at[jnp.where(holds, free, C)].set(serial, mode="drop"),
        next_serial=host.next_serial + holds.astype(jnp.int32),
    )
    ticket = Ticket(ok, lens, tuple(tables), Extent((), tuple(held)), entry, serial)
    return PagedKVCache(jnp.where(gone, 0, cache.seq_lens), tuple(groups)), account, ticket, tuple(ids)


def _give_up(host: Host, ticket: Ticket, ok: Bool[Array, ""]) -> tuple[Host, Bool[Array, ""]]:
    """The account without the ticket, where `ok` and the ticket is out."""
    C = host.serials.shape[0]
    known = host.serials.at[jnp.maximum(ticket.entry, 0)].get(mode="fill", fill_value=NO_PAGE)
    accounted = ticket.entry >= 0
    ok &= ticket.ok & (~accounted | (known == ticket.serial))
    counts = jnp.stack([held.sum(dtype=jnp.int32) for held in ticket.extent.held])
    entry = jnp.where(ok & accounted, ticket.entry, C)
    serials = host.serials.at[entry].set(NO_PAGE, mode="drop")
    return dataclasses.replace(host, used=host.used - jnp.where(ok, counts, 0), serials=serials), ok


def resume(
    cache: PagedKVCache,
    host: Host,
    ticket: Ticket,
    rows: Int32[Array, "N"],
    *,
    implementation: Implementation = None,
) -> tuple[PagedKVCache, Host, Bool[Array, ""]]:
    """Brings preempted rows back into idle rows, bit for bit; all of them or none.

    Args:
      cache: the cache.
      host: the account, that of the `preempt` or a later one.
      ticket: from `preempt`; used up if `ok`.
      rows: i32[N] a row for each of the ticket's. Entries whose preempted row held nothing (padding among them) are
        ignored.
      implementation: backend of the scatter, see `paxcache.ops`.

    Returns:
      The cache, the account, and ok bool[]: False, with nothing changed, if the ticket was refused or used before, if a
      row is out of range, named twice or live, or if some group has too few free pages.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong, or the ticket does not fit the cache.

    Example: see `preempt`.
    """
    _check_host(cache, host)
    if not isinstance(ticket, Ticket):
        raise TypeError(f"ticket: expected a Ticket (from preempt), got {ticket!r}")
    _check_extent("ticket", cache, ticket.extent)
    N, M = ticket.seq_lens.shape[0], cache.max_pages_per_seq
    for table in ticket.block_tables:
        _checks.int_array("ticket's block_tables", table, "N M", N=N, M=M)
    rows = _checks.int_array("rows", rows, "N", N=N)
    bare = dataclasses.replace(ticket, extent=Extent((), ticket.extent.held))
    new, host, targets, ok = _integers_only(_resume, cache, host, bare, rows)
    pages = _copy_in(_pages_of(new), targets, ticket.extent.blocks, implementation)
    return _with_pages(new, pages), host, ok


@jax.jit
def _resume(cache, host, ticket, rows):
    B = cache.seq_lens.shape[0]
    live = ticket.seq_lens > 0
    for table in ticket.block_tables:
        live |= (table >= 0).any(axis=1)
    idle = _allocator.idle_rows(cache.seq_lens, [g.block_tables for g in cache.groups])
    once = _allocator.named_once(jnp.where(live, rows, -1), B)
    ok = ((once & idle[jnp.clip(rows, 0, B - 1)]) | ~live).all()
    _, ok = _give_up(host, ticket, ok)
    targets, ok = _take(tuple(g.ref_counts for g in cache.groups), ticket.extent.held, ok)
    host, _ = _give_up(host, ticket, ok)

    to = jnp.where(ok & live, rows, B)
    groups = []
    for group, table, pages in zip(cache.groups, ticket.block_tables, targets, strict=True):
        if pages.shape[0]:
            new = jnp.where(ok & (table >= 0), pages[jnp.maximum(table, 0)], NO_PAGE)
        else:
            new = jnp.full_like(table, NO_PAGE)
        groups.append(
            dataclasses.replace(
                group,
                block_tables=group.block_tables.at[to].set(new, mode="drop"),
                ref_counts=_allocator.add_references(group.ref_counts, new, 1),
            )
        )
    lens = cache.seq_lens.at[to].set(ticket.seq_lens, mode="drop")
    return PagedKVCache(lens, tuple(groups)), host, targets, ok


def discard(host: Host, ticket: Ticket) -> tuple[Host, Bool[Array, ""]]:
    """Takes a ticket off the account without bringing its rows back: their request was cancelled.

    Args:
      host: the account.
      ticket: from `preempt`; used up if `ok`.

    Returns:
      The account, and ok bool[]: False, with nothing changed, if the ticket was refused or used before.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=4)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 30]), num_tokens=50)
      >>> cache, host, ticket = offload.preempt(cache, offload.init(config, 64), jnp.array([0]))
      >>> host, ok = offload.discard(host, ticket)
      >>> host.used.tolist(), offload.discard(host, ticket)[1].item()
      ([0], False)
    """
    bare = dataclasses.replace(ticket, extent=Extent((), ticket.extent.held))
    return _discard(host, bare)


@jax.jit
def _discard(host, ticket):
    return _give_up(host, ticket, jnp.bool_(True))


# Pools.


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
    return _with_pages(new, _move(_pages_of(new), moves, implementation))


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
    if _is_traced(cache):
        raise TypeError("resize changes shapes by what the counts are and cannot run inside jit")
    sizes = _by_group("num_pages", num_pages, len(cache.groups), minimum=1)
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
    return _with_pages(resized, _reload(_pages_of(cache), tuple(sources)))


@jax.jit
def _reload(pages, sources):
    """Pools whose page i is page ``sources[i]`` of the old one; zeros where there is none."""
    return tuple(
        jax.tree.map(lambda pool: pool.at[:, source].get(mode="fill", fill_value=0), old)  # noqa: B023
        for old, source in zip(pages, sources, strict=True)
    )


# The CPU store.

_MAGIC = b"paxcache page store 1\n"
_DIGEST_BYTES = 32


class PageStore:
    """Arrays by key in ordinary CPU memory, least recently used first out. Safe to use from many threads.

    For pages that outlive a cache: keys are bytes (`prefix.page_keys`, with the leaf's name added), values NumPy arrays
    of any dtype, bfloat16 too. Unlike all else here it is an object that changes.

    Args:
      max_bytes: bytes of array data that it holds at most; keys and bookkeeping come on top.

    Raises:
      ValueError, TypeError: max_bytes is not a positive int.

    Example:
      >>> import numpy as np
      >>> from paxcache import offload
      >>> store = offload.PageStore(max_bytes=64)
      >>> store.put([b"a", b"b"], [np.arange(8), np.zeros(0)])
      2
      >>> store.put([b"c", b"d"], [np.ones(1), np.ones(9)])
      1
      >>> [None if x is None else x.shape for x in store.get([b"a", b"b", b"c", b"d"])]
      [None, (0,), (1,), None]

    Reference: the CPU tier with batched put and get, and save and load, of tile-based KV caches.
    """

    def __init__(self, max_bytes: int):
        """An empty store."""
        self.max_bytes = _checks.static_int("max_bytes", max_bytes, minimum=1)
        self._arrays: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays that it holds."""
        return self._num_bytes

    def __len__(self) -> int:
        """Arrays that it holds."""
        return len(self._arrays)

    def put(self, keys: Sequence[bytes], arrays: Sequence[np.ndarray]) -> int:
        """Stores copies of arrays, over what their keys held, and drops the least recently used for them.

        Args:
          keys: a key for each array.
          arrays: what to store; JAX arrays are brought to the host.

        Returns:
          How many were stored. One larger than the whole store is not, and its key then holds nothing.

        Raises:
          ValueError, TypeError: an argument's type or length is wrong; then nothing was stored.
        """
        if len(keys) != len(arrays):
            raise ValueError(f"arrays: expected one for each of {len(keys)} keys, got {len(arrays)}")
        _check_keys(keys)
        copies = []
        for array in arrays:
            copy = np.array(array, order="C")
            if copy.dtype.hasobject or copy.dtype.names is not None:
                raise TypeError(f"arrays: expected numbers, got {copy.dtype}")
            copy.flags.writeable = False  # readers get it as it is
            copies.append(copy)
        stored = 0
        with self._lock:
            for key, copy in zip(keys, copies, strict=True):
                old = self._arrays.pop(key, None)
                self._num_bytes -= 0 if old is None else old.nbytes
                if copy.nbytes > self.max_bytes:
                    continue
                while self._num_bytes + copy.nbytes > self.max_bytes:
                    self._num_bytes -= self._arrays.popitem(last=False)[1].nbytes
                self._arrays[key] = copy
                self._num_bytes += copy.nbytes
                stored += 1
        return stored

    def get(self, keys: Sequence[bytes]) -> list[np.ndarray | None]:
        """The arrays of keys, None where there is none. They are read-only and stay valid whatever happens here.

        Args:
          keys: what to look up; all are used by this, the last one most recently.

        Raises:
          TypeError: a key is not bytes.
        """
        _check_keys(keys)
        found = []
        with self._lock:
            for key in keys:
                found.append(self._arrays.get(key))
                if found[-1] is not None:
                    self._arrays.move_to_end(key)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to a file, in one piece or not at all: a file that was there stays until the end.

        Args:
          path: the file.
        """
        with self._lock:
            items = list(self._arrays.items())
        table = [[key.hex(), str(array.dtype), array.shape] for key, array in items]
        header = json.dumps(table).encode()
        path = os.fspath(path)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".", prefix=os.path.basename(path))
        try:
            with os.fdopen(handle, "wb") as file:
                digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
                for part in (
                    _MAGIC,
                    len(header).to_bytes(8, "little"),
                    header,
                    *(a.reshape(-1).view(np.uint8) for _, a in items),
                ):
                    digest.update(part)
                    file.write(part)
                file.write(digest.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], max_bytes: int) -> PageStore:
        """A store with what `save` wrote, in the same order of use; the most recently used of it if not all fits.

        Args:
          path: the file.
          max_bytes: as in the constructor.

        Raises:
          ValueError: the file is not one that `save` wrote, or not all of it, or changed since.
        """
        store = cls(max_bytes)
        with open(path, "rb") as file:
            data = file.read()
        body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if not data.startswith(_MAGIC):
            raise ValueError(f"path: expected a saved page store, got another file, {os.fspath(path)!r}")
        if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
            raise ValueError(f"path: expected a whole page store, got a damaged one, {os.fspath(path)!r}")
        at = len(_MAGIC) + 8
        end = at + int.from_bytes(body[at - 8 : at], "little")
        table = json.loads(body[at:end])
        for key, name, shape in table:
            dtype, count = jnp.dtype(name), math.prod(shape)
            array = np.frombuffer(body, dtype, count, end) if count else np.zeros(0, dtype)
            end += array.nbytes
            store.put([bytes.fromhex(key)], [array.reshape(shape)])
        return store


def _check_keys(keys: Sequence[bytes]) -> None:
    for key in keys:
        if not isinstance(key, bytes):
            raise TypeError(f"keys: expected bytes, got {key!r}")
