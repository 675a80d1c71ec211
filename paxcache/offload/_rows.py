"""Preemption: whole rows to host memory and back, by tickets, with an account of what they hold."""

from __future__ import annotations

import dataclasses
import functools
import secrets
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _allocator, _checks
from paxcache._cache import _integers_only, row_epochs
from paxcache._types import INT32_MAX, NO_PAGE, CacheConfig, PagedKVCache
from paxcache.offload import _pages
from paxcache.offload._pages import Extent

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32

    from paxcache.ops import Implementation


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
    """Each row of a ticket takes a number."""
    identity: Int32[Array, ""]
    """Drawn at random by `init`: tickets of another account are not taken."""
    memory_kind: str = dataclasses.field(default="pinned_host", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ticket:
    """Preempted rows and their pages. Made by `preempt`, good for one `resume` or `discard`."""

    ok: Bool[Array, ""]
    """Whether the rows were preempted; if not, the ticket is empty and nothing has changed."""
    seq_lens: Int32[Array, "N"]
    epochs: Int32[Array, "N"]
    """As in the cache: a row goes on as begun under the weights it was begun under."""
    block_tables: tuple[Int32[Array, "N M"], ...]
    """Per group, the tables with entries of the extent for pages; holes stay NO_PAGE."""
    extent: Extent
    """Each page once, however many of the rows share it."""
    entry: Int32[Array, ""]
    """Where the host's account has the ticket; NO_PAGE if it holds no page and needs no account."""
    serial: Int32[Array, ""]
    identity: Int32[Array, ""]
    """The account's."""


class Waiting(NamedTuple):
    """Rows whose pages are on their way, see `take_rows`."""

    marks: Int32[Array, "N"]
    """Stands in the cache's `epochs` of such a row until all has landed; 0 for rows that wait for nothing."""
    epochs: Int32[Array, "N"]
    """What is to stand there then."""
    block_tables: tuple[Int32[Array, "N M"], ...]
    """Per group, as in the ticket."""


def init(config: CacheConfig, num_pages: int | tuple[int, ...], *, memory_kind: str = "pinned_host") -> Host:
    """An account of host memory, for `preempt`. Reserves nothing: each ticket brings its own memory.

    An account has an identity, drawn by this call, and takes its own tickets alone. Call it outside jit: a traced call
    draws once for all runs of its program.

    Memory that is needed for the first time costs more than the transfer, see `swap_out`.

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
    _checks.instance("config", config, CacheConfig)
    return account("num_pages", len(config.layer_groups), num_pages, memory_kind)


def account(name: str, num_groups: int, num_pages: int | tuple[int, ...], memory_kind: str) -> Host:
    """An account of so many pages in each group; `name` is the argument that says how many."""
    capacity = _pages.by_group(name, num_pages, num_groups, minimum=0)
    if sum(capacity) > INT32_MAX:
        raise ValueError(f"{name}: together they must fit int32, got {sum(capacity)}")
    _pages.space(memory_kind)
    # A ticket that is out holds a page at least.
    serials = jnp.full(max(sum(capacity), 1), NO_PAGE, jnp.int32)
    used = jnp.zeros(len(capacity), jnp.int32)
    identity = jnp.int32(secrets.randbelow(INT32_MAX))
    return Host(jnp.array(capacity, jnp.int32), used, serials, jnp.int32(0), identity, memory_kind)


def _check_host(cache: PagedKVCache, host: Host) -> None:
    _checks.instance("cache", cache, PagedKVCache)
    _checks.instance("host", host, Host, source="offload.init")
    if host.capacity.shape != (len(cache.groups),):
        raise ValueError(
            f"host: expected one of {len(cache.groups)} groups, got one of {host.capacity.shape[0]}"
        )


def _check_ticket(host: Host, ticket: Ticket) -> None:
    """A ticket that the account made; inside jit `_give_up` finds one that it did not."""
    _checks.instance("host", host, Host, source="offload.init")
    _checks.instance("ticket", ticket, Ticket, source="preempt")
    if len(ticket.extent.held) != host.capacity.shape[0]:
        raise ValueError(
            f"ticket: expected one of {host.capacity.shape[0]} groups like host, got one of {len(ticket.extent.held)}"
        )
    identities = host.identity, ticket.identity
    if not _checks.is_traced(*identities) and not np.array_equal(*jax.device_get(identities)):
        raise ValueError(
            "ticket: made by another account than host; each belongs to the one that preempt was given"
        )


def preempt(
    cache: PagedKVCache,
    host: Host,
    rows: Int32[Array, "N"],
    *,
    max_pages: int | tuple[int, ...] | None = None,
    by_layer: bool = False,
    implementation: Implementation = None,
) -> tuple[PagedKVCache, Host, Ticket]:
    """Moves whole rows to the host and frees their pages; all of the named rows or none.

    Pages that other rows or a prefix index share are copied out like the others, and those keep theirs. Pages that
    the preempted rows share with each other go once, and are shared again after `resume`.

    Outside jit the rows are idle once the pages are gathered, and these leave while other programs run, as in
    `swap_out`; inside jit the transfer is part of the program.

    A ticket's memory is `max_pages` pages, whether it needs them or not; the account counts those that it needs.

    Args:
      cache: the cache.
      host: the account of host memory.
      rows: i32[N] rows; -1 is padding. A row that is idle already takes part with nothing.
      max_pages: pages that the ticket can hold (static), in each group or a tuple of one number a group. None: called
        outside jit, it is read from the cache and rounded up by an eighth at most, so that few programs are compiled;
        inside jit, it is the most that N rows can map.
      by_layer: makes a block of each layer, for `begin_resume`.
      implementation: backend of the gather, see `paxcache.ops`.

    Returns:
      The cache with the rows idle, the account, and a `Ticket`. ``ticket.ok`` is False, and nothing has changed, if a
      row is out of range or named twice, if not all layers of it have landed after `begin_resume`, or if the pages pass
      `max_pages` or what is left of the host's capacity.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.
      MemoryError: JAX's pool of pinned memory is too small (outside jit), see `paxcache.offload`.

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
    by_layer = _pages.flag("by_layer", by_layer)
    if max_pages is not None:
        bounds = _pages.by_group("max_pages", max_pages, len(cache.groups), minimum=0)
    elif _checks.is_traced(cache, host, rows):
        most = rows.shape[0] * cache.max_pages_per_seq
        bounds = tuple(min(g.ref_counts.shape[0], most) for g in cache.groups)
    else:
        bounds = _read_bounds(cache, host, rows)
    new, host, ticket, ids = _integers_only(_preempt, cache, host, rows, bounds)
    blocks = _pages.copy_out(_pages.pages_of(cache), ids, host.memory_kind, implementation, by_layer)
    extent = dataclasses.replace(ticket.extent, blocks=blocks)
    return new, host, dataclasses.replace(ticket, extent=extent)


def _read_bounds(cache: PagedKVCache, host: Host, rows: Int32[Array, "N"]) -> tuple[int, ...]:
    """Size classes of what the rows map now; nothing where the host will refuse them."""
    tables, counts = tuple(g.block_tables for g in cache.groups), tuple(g.ref_counts for g in cache.groups)
    needed, left = jax.device_get((_count_pages(tables, counts, rows), host.capacity - host.used))
    return tuple(_pages.size_class(int(n)) if (needed <= left).all() else 0 for n in needed)


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
    at = jnp.clip(rows, 0, B - 1)
    ok &= ~((cache.epochs[at] < 0) & (rows >= 0)).any()  # not all of them is there to be copied
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

    lens, epochs = (jnp.where(ok & (rows >= 0), x[at], 0) for x in (cache.seq_lens, cache.epochs))
    holds = (counts > 0).any()
    C = host.serials.shape[0]
    free = _allocator.listed(host.serials == NO_PAGE, 1)[0]  # there is one wherever there is capacity
    entry = jnp.where(holds, free, NO_PAGE)
    serial = jnp.where(holds, host.next_serial, NO_PAGE)
    account = dataclasses.replace(
        host,
        used=host.used + counts,
        serials=host.serials.at[jnp.where(holds, free, C)].set(serial, mode="drop"),
        next_serial=(host.next_serial + jnp.where(holds, rows.shape[0], 0)) & INT32_MAX,
    )
    ticket = Ticket(ok, lens, epochs, tuple(tables), Extent((), tuple(held)), entry, serial, host.identity)
    lens, epochs = (jnp.where(gone, 0, x) for x in (cache.seq_lens, cache.epochs))
    cache = dataclasses.replace(cache, seq_lens=lens, groups=tuple(groups), epochs=epochs)
    return cache, account, ticket, tuple(ids)


def _give_up(host: Host, ticket: Ticket, ok: Bool[Array, ""]) -> tuple[Host, Bool[Array, ""]]:
    """The account without the ticket, where `ok` and the ticket is out."""
    C = host.serials.shape[0]
    known = host.serials.at[jnp.maximum(ticket.entry, 0)].get(mode="fill", fill_value=NO_PAGE)
    accounted = ticket.entry >= 0
    ok &= ticket.ok & (~accounted | (known == ticket.serial)) & (ticket.identity == host.identity)
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

    What is launched after it waits for the transfer, as in `swap_in`; `begin_resume` brings pages layer by layer.

    Args:
      cache: the cache.
      host: the account, that of the `preempt` or a later one.
      ticket: from `preempt`; used up if `ok`.
      rows: i32[N] a row for each of the ticket's. Entries whose preempted row held nothing (padding among them) are
        ignored.
      implementation: backend of the scatter, see `paxcache.ops`.

    Returns:
      The cache, the account, and ok bool[]: False, with nothing changed, if the ticket was refused or used before, if a
      row is out of range, named twice or live, if some group has too few free pages, or, inside jit, if another account
      made the ticket.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong, the ticket does not fit the cache, or (outside jit)
        another account made it.

    Example: see `preempt`.
    """
    new, host, targets, _, ok = take_rows(cache, host, ticket, rows)
    pages = _pages.copy_in(_pages.pages_of(new), targets, ticket.extent.blocks, implementation)
    return _pages.with_pages(new, pages), host, ok


def take_rows(
    cache: PagedKVCache, host: Host, ticket: Ticket, rows: Int32[Array, "N"], *, arriving: bool = False
) -> tuple[PagedKVCache, Host, tuple[Int32[Array, "N"], ...], Waiting, Bool[Array, ""]]:
    """A `resume` without the copy: also says where the ticket's pages go.

    Rows that are `arriving` get a mark in place of their epoch, below 0 and given once. `fork` and `reorder` hand it
    on, `release` takes it away, and a prefix index takes it for another epoch. So whatever happens meanwhile, the rows
    that carry it are those that wait for these pages, and nobody else shares a page of theirs that has not landed.
    """
    _check_host(cache, host)
    _checks.instance("ticket", ticket, Ticket, source="preempt")
    _pages.check_extent("ticket", cache, ticket.extent)
    _check_ticket(host, ticket)
    N, M = ticket.seq_lens.shape[0], cache.max_pages_per_seq
    for table in ticket.block_tables:
        _checks.int_array("ticket's block_tables", table, "N M", N=N, M=M)
    rows = _checks.int_array("rows", rows, "N", N=N)
    bare = dataclasses.replace(ticket, extent=Extent((), ticket.extent.held))
    if arriving:
        cache = dataclasses.replace(cache, epochs=row_epochs(cache))
    new, host, targets, marks, ok = _integers_only(_resume, cache, host, bare, rows, arriving)
    waiting = Waiting(marks, ticket.epochs, ticket.block_tables)
    return new, host, targets, waiting, ok


@functools.partial(jax.jit, static_argnums=4)
def _resume(cache, host, ticket, rows, arriving):
    B, N = cache.seq_lens.shape[0], rows.shape[0]
    live = ticket.seq_lens > 0
    for table in ticket.block_tables:
        live |= (table >= 0).any(axis=1)
    idle = _allocator.idle_rows(cache.seq_lens, [g.block_tables for g in cache.groups])
    once = _allocator.named_once(jnp.where(live, rows, -1), B)
    ok = ((once & idle[jnp.clip(rows, 0, B - 1)]) | ~live).all()
    _, ok = _give_up(host, ticket, ok)
    targets, ok = _pages.take(tuple(g.ref_counts for g in cache.groups), ticket.extent.held, ok)
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
    numbers = (ticket.identity + ticket.serial + jnp.arange(N, dtype=jnp.int32)) & INT32_MAX
    numbers %= INT32_MAX  # so that an index may take 1 from a mark
    marks = jnp.where(arriving & ok & live & (ticket.serial >= 0), -1 - numbers, 0)
    epochs = cache.epochs.at[to].set(jnp.where(marks < 0, marks, ticket.epochs), mode="drop")
    cache = dataclasses.replace(cache, seq_lens=lens, groups=tuple(groups), epochs=epochs)
    return cache, host, targets, marks, ok


def discard(host: Host, ticket: Ticket) -> tuple[Host, Bool[Array, ""]]:
    """Takes a ticket off the account without bringing its rows back: their request was cancelled.

    Args:
      host: the account.
      ticket: from `preempt`; used up if `ok`.

    Returns:
      The account, and ok bool[]: False, with nothing changed, if the ticket was refused or used before, or, inside jit,
      if another account made it.

    Raises:
      ValueError, TypeError: an argument's type is wrong, or (outside jit) another account made the ticket.

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
    _check_ticket(host, ticket)
    bare = dataclasses.replace(ticket, extent=Extent((), ticket.extent.held))
    return _discard(host, bare)


@jax.jit
def _discard(host, ticket):
    return _give_up(host, ticket, jnp.bool_(True))
