"""The prefix index inside a compiled loop: fixed-size arrays, no host round trip. Imports `_allocator`, `_integers`.

The same four verbs as on the host, for full pages and LRU, as pure functions under `jit`, `lax.while_loop` and `vmap`.
An *entry* is one full page of tokens behind its parent entry; a prompt's pages are found all at once. Each page of a
prompt has a 64-bit hash of everything up to its end, entries lie sorted by theirs, and a binary search proposes one
entry a page. A proposal counts only if its tokens and its extra key are the page's, and its parent is the entry of the
page before: so by induction a hit means equal text. A collision can cost a hit and never serve another's page.

Nothing loops over pages, rows or entries: ranks come from sorts and prefix sums, entries move by scatters.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from paxcache import _allocator, _checks
from paxcache._cache import _integers_only
from paxcache._types import INT32_MAX, NO_PAGE, CacheConfig, PagedKVCache
from paxcache.prefix import _integers

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32, UInt32

NO_ENTRY = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceIndex:
    """A prefix index as a pytree of arrays over C entries: make it with `init`. Free entries have depth -1."""

    tokens: Int32[Array, "C S"]
    extra_keys: Int32[Array, "C"]
    parents: Int32[Array, "C"]
    """Entry of the page before; NO_ENTRY where the page begins a prompt."""
    depths: Int32[Array, "C"]
    """Pages before it; -1: the entry is free."""
    ticks: Int32[Array, "C"]
    """Turn in which it was last used. A parent's is never lower than a child's."""
    pages: tuple[Int32[Array, "C"], ...]
    """Per group, the page that it holds a reference to."""
    hashes: UInt32[Array, "2 C"]
    order: Int32[Array, "C"]
    """Entries sorted by hash, free ones last."""
    tick: Int32[Array, ""]

    @property
    def capacity(self) -> int:
        """Entries, C."""
        return self.depths.shape[-1]

    @property
    def num_entries(self) -> Int32[Array, ""]:
        """Pages stored."""
        return (self.depths >= 0).sum(axis=-1, dtype=jnp.int32)


class Found(NamedTuple):
    """What `match` answers."""

    num_tokens: Int32[Array, "N"]
    """Tokens that need not be computed: those of full pages."""
    entries: Int32[Array, "N W"]
    """Entry of each page that agrees, NO_ENTRY past the last."""


def init(config: CacheConfig, *, capacity: int | None = None) -> DeviceIndex:
    """An empty index for caches of a config.

    Args:
      config: the cache's; without sliding windows.
      capacity: entries, C (static). None: one for each page of the smallest group, so that none is ever dropped.

    Returns:
      A `DeviceIndex`.

    Raises:
      ValueError, TypeError: an argument's type or range is wrong.
      NotImplementedError: a group has a sliding window.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache.prefix import device
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, index, tokens = paxcache.init(config), device.init(config), jnp.arange(10)[None]
      >>> cache, index, num_reused = device.admit(cache, index, jnp.array([0]), tokens, jnp.array([10]))
      >>> cache, step = paxcache.extend(cache, jnp.array([10, 0]), num_tokens=10)   # append, attend
      >>> cache, index, num_dropped = device.publish(cache, index, jnp.array([0]), tokens, jnp.array([10]))
      >>> device.admit(cache, index, jnp.array([1]), tokens, jnp.array([10]))[2].tolist()
      [8]

    Reference: RadixAttention of SGLang (Zheng et al., 2024), as arrays.
    """
    _checks.instance("config", config, CacheConfig)
    groups = config.layer_groups
    if any(g.sliding_window is not None for g in groups):
        raise NotImplementedError("prefix.device: groups with a sliding window; use the host index for them")
    smallest = min(config.group_num_pages(g) for g in groups)
    C = smallest if capacity is None else _checks.static_int("capacity", capacity, minimum=1)
    return _empty(C, config.page_size, len(groups), jnp.int32(0))


def _empty(C: int, S: int, num_groups: int, tick: Int32[Array, ""]) -> DeviceIndex:
    def full(value):
        return jnp.full(C, value, jnp.int32)

    return DeviceIndex(
        tokens=jnp.zeros((C, S), jnp.int32),
        extra_keys=full(0),
        parents=full(NO_ENTRY),
        depths=full(-1),
        ticks=full(0),
        pages=tuple(full(NO_PAGE) for _ in range(num_groups)),
        hashes=jnp.full((2, C), 0xFFFFFFFF, jnp.uint32),
        order=jnp.arange(C, dtype=jnp.int32),
        tick=tick,
    )


# Finding pages.


class _Prompts(NamedTuple):
    """Prompts cut into W pages."""

    pages: Int32[Array, "N W S"]
    num_pages: Int32[Array, "N"]  # full ones
    extra_keys: Int32[Array, "N"]
    hashes: UInt32[Array, "2 N W"]


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3: every bit of x changes half the bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _hash(pages: Int32[Array, "N W S"], extra_keys: Int32[Array, "N"]) -> UInt32[Array, "2 N W"]:
    """Two hashes of everything up to the end of each page: running sums of mixed tokens, each mixed with its place."""
    _, W, S = pages.shape
    places = jnp.arange(W * S, dtype=jnp.uint32).reshape(W, S)
    lanes = []
    for seed in (0x9E3779B9, 0x7F4A7C15):
        mixed = _mix(pages.astype(jnp.uint32) + _mix(places * jnp.uint32(2) + jnp.uint32(seed)))
        sums = jnp.cumsum(mixed.sum(axis=-1, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
        lanes.append(_mix(sums + _mix(extra_keys.astype(jnp.uint32) + jnp.uint32(seed))[:, None]))
    return jnp.stack(lanes)


def _prompts(tokens, lens, extra_keys, S: int) -> _Prompts:
    N, W = tokens.shape[0], tokens.shape[1] // S
    pages = tokens[:, : W * S].reshape(N, W, S)
    return _Prompts(pages, jnp.maximum(lens, 0) // S, extra_keys, _hash(pages, extra_keys))


def _find(index: DeviceIndex, prompts: _Prompts) -> tuple[Int32[Array, "N W"], Bool[Array, "N W"]]:
    """The entry of each full page up to the first that is not stored, NO_ENTRY from there on; and pages whose hash
    an entry with another text has.
    """
    N, W, _ = prompts.pages.shape
    C = index.capacity
    high, low = index.hashes[0][index.order], index.hashes[1][index.order]
    first = jnp.zeros((N, W), jnp.int32)  # how many entries sort before the page's hash
    for bit in reversed(range(C.bit_length())):
        probe = first + (1 << bit)
        at = jnp.minimum(probe, C) - 1
        before = (high[at] < prompts.hashes[0]) | (
            (high[at] == prompts.hashes[0]) & (low[at] < prompts.hashes[1])
        )
        first = jnp.where((probe <= C) & before, probe, first)
    entry = index.order[jnp.minimum(first, C - 1)]
    parent = jnp.pad(entry[:, :-1], ((0, 0), (1, 0)), constant_values=NO_ENTRY)
    depth = jnp.arange(W, dtype=jnp.int32)
    same = (index.tokens[entry] == prompts.pages).all(axis=-1)
    same &= (index.extra_keys[entry] == prompts.extra_keys[:, None]) & (index.depths[entry] == depth)
    same &= (index.parents[entry] == parent) & (depth < prompts.num_pages[:, None])
    agrees = _up_to_first(same)
    taken = (index.hashes[:, entry] == prompts.hashes).all(axis=0) & (index.depths[entry] >= 0)
    return jnp.where(agrees, entry, NO_ENTRY), taken & ~same


def _up_to_first(holds: Bool[Array, "N W"]) -> Bool[Array, "N W"]:
    """The places before the first one at which it does not hold."""
    return jnp.cumsum(~holds, axis=1, dtype=jnp.int32) == 0


def match(
    index: DeviceIndex,
    tokens: Int32[Array, "N L"],
    lens: Int32[Array, "N"],
    *,
    extra_keys: Int32[Array, "N"] | None = None,
) -> Found:
    """The longest stored prefixes of prompts, in full pages. Tokens are compared, each of them.

    Args:
      index: the index.
      tokens: i32[N, L] prompts, one a row; what lies past their lengths is ignored.
      lens: i32[N] their lengths.
      extra_keys: i32[N] keeps prompts apart whose tokens agree (tenants, adapters, versions of the weights); None: 0.

    Returns:
      A `Found`.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.
    """
    tokens, lens, extra_keys = _check_prompts(index, tokens, lens, extra_keys)
    entries = _match(index, tokens, lens, extra_keys)
    return Found((entries >= 0).sum(axis=1, dtype=jnp.int32) * index.tokens.shape[-1], entries)


@jax.jit
def _match(index, tokens, lens, extra_keys):
    return _find(index, _prompts(tokens, lens, extra_keys, index.tokens.shape[-1]))[0]


# Rows.


def admit(
    cache: PagedKVCache,
    index: DeviceIndex,
    rows: Int32[Array, "N"],
    tokens: Int32[Array, "N L"],
    lens: Int32[Array, "N"],
    *,
    extra_keys: Int32[Array, "N"] | None = None,
) -> tuple[PagedKVCache, DeviceIndex, Int32[Array, "N"]]:
    """Starts prompts in idle rows: each maps the pages of its longest stored prefix and has its length.

    At least one token of each is left to compute.

    Args:
      cache: the cache.
      index: the index.
      rows: i32[N] idle rows; -1 is padding.
      tokens, lens, extra_keys: as in `match`.

    Returns:
      The cache, the index, and the tokens reused by each: compute those from there on. -1 where nothing was done: the
      row is live, out of range, named twice, or padding.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example: see `init`.
    """
    _check_cache(cache, index)
    tokens, lens, extra_keys = _check_prompts(index, tokens, lens, extra_keys)
    rows = _checks.int_array("rows", rows, "N", N=tokens.shape[0])
    return _integers_only(_admit, cache, index, rows, tokens, lens, extra_keys)


@jax.jit
def _admit(cache, index, rows, tokens, lens, extra_keys):
    B, M, S = cache.max_seqs, cache.groups[0].block_tables.shape[-1], index.tokens.shape[-1]
    N = rows.shape[0]
    prompts = _prompts(tokens, lens, extra_keys, S)
    most = jnp.minimum(jnp.maximum(lens - 1, 0) // S, M)
    entries, _ = _find(index, prompts._replace(num_pages=most))
    idle = _allocator.idle_rows(cache.seq_lens, [g.block_tables for g in cache.groups])
    ok = _allocator.named_once(rows, B) & idle[jnp.clip(rows, 0, B - 1)]
    entries = jnp.where(ok[:, None], entries, NO_ENTRY)[:, :M]
    reused = (entries >= 0).sum(axis=1, dtype=jnp.int32) * S

    where = jnp.where(ok, rows, B)
    groups = []
    for group, pages in zip(cache.groups, index.pages, strict=True):
        new = jnp.where(entries >= 0, pages[entries], NO_PAGE)
        new = jnp.pad(new, ((0, 0), (0, M - new.shape[1])), constant_values=NO_PAGE)
        tables, counts = _integers.set_rows(group.block_tables, group.ref_counts, where, new)
        groups.append(dataclasses.replace(group, block_tables=tables, ref_counts=counts))
    # This index has no epochs: to one that has, the row is one that was not admitted.
    seq_lens, epochs = (
        old.at[where].set(new, mode="drop") for old, new in ((cache.seq_lens, reused), (cache.epochs, 0))
    )
    cache = PagedKVCache(seq_lens, tuple(groups), epochs)
    turns = index.tick + 1 + jnp.arange(N, dtype=jnp.int32)
    index = _touch(index, entries, turns)
    return cache, dataclasses.replace(index, tick=index.tick + N), jnp.where(ok, reused, -1)


def _touch(index: DeviceIndex, entries: Int32[Array, "N W"], turns: Int32[Array, "N"]) -> DeviceIndex:
    where = jnp.where(entries >= 0, entries, index.capacity)
    ticks = index.ticks.at[where].max(jnp.broadcast_to(turns[:, None], entries.shape), mode="drop")
    return dataclasses.replace(index, ticks=ticks)


def publish(
    cache: PagedKVCache,
    index: DeviceIndex,
    rows: Int32[Array, "N"],
    tokens: Int32[Array, "N L"],
    lens: Int32[Array, "N"],
    *,
    extra_keys: Int32[Array, "N"] | None = None,
) -> tuple[PagedKVCache, DeviceIndex, Int32[Array, ""]]:
    """Offers the full pages of rows to others, after all layers of a step were appended.

    Pages that are stored already fold: the row maps the stored ones and gives its own back; of rows that computed the
    same, the first one's are kept. Where the index is full, entries make way that were used least recently, leaves
    first, whether rows use their pages or not; pages for which none can make way are not stored. A call sorts the N × L
    tokens' pages and the entries: offer rows when they end, not all of them in every step.

    Args:
      cache: the cache.
      index: the index.
      rows: i32[N] rows; -1 is padding, and a row that is out of range or named twice offers nothing.
      tokens: i32[N, L] the tokens whose keys and values the rows hold, from their first.
      lens: i32[N] how many. Only pages that both they and the row's length fill are offered.
      extra_keys: the ones they were admitted with.

    Returns:
      The cache, the index, and how many entries were dropped or not stored for want of capacity.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example: see `init`.
    """
    _check_cache(cache, index)
    tokens, lens, extra_keys = _check_prompts(index, tokens, lens, extra_keys)
    rows = _checks.int_array("rows", rows, "N", N=tokens.shape[0])
    return _integers_only(_publish, cache, index, rows, tokens, lens, extra_keys)


@jax.jit
def _publish(cache, index, rows, tokens, lens, extra_keys):
    B, M, S, C = (
        cache.max_seqs,
        cache.groups[0].block_tables.shape[-1],
        index.tokens.shape[-1],
        index.capacity,
    )
    N = rows.shape[0]
    ok = _allocator.named_once(rows, B)
    at = jnp.clip(rows, 0, B - 1)
    lens = jnp.where(ok, jnp.minimum(jnp.minimum(lens, cache.seq_lens[at]), M * S), 0)
    prompts = _prompts(tokens, lens, extra_keys, S)
    W = min(prompts.pages.shape[1], M)
    prompts = prompts._replace(pages=prompts.pages[:, :W], hashes=prompts.hashes[:, :, :W])
    tables = [g.block_tables[at, :W] for g in cache.groups]
    depth = jnp.arange(W, dtype=jnp.int32)
    offered = depth < prompts.num_pages[:, None]
    for table in tables:
        offered &= table >= 0
    stored, collides = _find(index, prompts)
    # Not offered: a page that an entry with another text holds or hides behind its hash, and what follows it.
    foreign = collides & (stored < 0)
    for group, pages, table in zip(cache.groups, index.pages, tables, strict=True):
        is_held = _allocator.add_references(jnp.zeros_like(group.ref_counts), pages, 1) > 0
        foreign |= is_held[jnp.maximum(table, 0)] & ((stored < 0) | (pages[stored] != table))
    offered = _up_to_first(offered & ~foreign)
    stored = jnp.where(offered, stored, NO_ENTRY)
    turns = index.tick + 1 + jnp.arange(N, dtype=jnp.int32)
    index = _touch(index, stored, turns)

    keeper, agrees = _keepers(prompts, stored, offered)
    # Nor a page that two texts of this call claim. What hangs on a keeper goes with it.
    cells = jnp.arange(N * W, dtype=jnp.int32).reshape(N, W)
    claims = agrees & (stored < 0)
    for group, table in zip(cache.groups, tables, strict=True):
        P = group.ref_counts.shape[0]
        page = jnp.where(claims & (table >= 0), table, P)
        owner = jnp.full(P, N * W, jnp.int32).at[page].min(keeper, mode="drop")
        agrees &= ~claims | (table < 0) | (owner[jnp.maximum(table, 0)] == keeper)
    agrees = _up_to_first(agrees)
    offered = _up_to_first(agrees & agrees.reshape(-1)[keeper])
    is_new = offered & (stored < 0) & (keeper == cells)

    # Room: free entries, then those used least recently, but none that this call has just used.
    wanted = is_new.sum(dtype=jnp.int32)
    free = (index.depths < 0).sum(dtype=jnp.int32)
    index, dropped, num_dropped = _drop(index, wanted - free, index.ticks > index.tick)
    rank = jnp.cumsum(is_new.reshape(-1), dtype=jnp.int32).reshape(N, W) - 1
    room = index.depths < 0
    kept = is_new & (rank < room.sum(dtype=jnp.int32))
    slot = jnp.cumsum(room, dtype=jnp.int32) - 1
    free_entries = jnp.zeros(C, jnp.int32).at[jnp.where(room, slot, C)].set(
        jnp.arange(C, dtype=jnp.int32), mode="drop"
    )  # fmt: skip
    fresh = jnp.where(kept, free_entries[jnp.clip(rank, 0, C - 1)], NO_ENTRY)
    entries = jnp.where(stored >= 0, stored, fresh.reshape(-1)[keeper])
    entries = jnp.where(offered, entries, NO_ENTRY)

    where = jnp.where(kept, fresh, C)
    parents = jnp.pad(entries[:, :-1], ((0, 0), (1, 0)), constant_values=NO_ENTRY)

    def put(old, new):
        return old.at[where].set(jnp.broadcast_to(new, (*where.shape, *old.shape[1:])), mode="drop")

    index = dataclasses.replace(
        index,
        tokens=put(index.tokens, prompts.pages),
        extra_keys=put(index.extra_keys, extra_keys[:, None]),
        parents=put(index.parents, parents),
        depths=put(index.depths, depth),
        pages=tuple(put(p, t) for p, t in zip(index.pages, tables, strict=True)),
        hashes=jnp.stack([put(h, n) for h, n in zip(index.hashes, prompts.hashes, strict=True)]),
    )
    index = _sorted(_touch(index, entries, turns))
    index = dataclasses.replace(index, tick=index.tick + N)

    groups = []
    for g, group in enumerate(cache.groups):
        own = group.block_tables[at]
        new = own.at[:, :W].set(jnp.where(entries >= 0, index.pages[g][entries], own[:, :W]))
        counts = _allocator.add_references(group.ref_counts, dropped[g], -1)
        counts = _allocator.add_references(counts, jnp.where(kept, tables[g], NO_PAGE), 1)
        new_tables, counts = _integers.set_rows(group.block_tables, counts, jnp.where(ok, rows, B), new)
        groups.append(dataclasses.replace(group, block_tables=new_tables, ref_counts=counts))
    lost = num_dropped + wanted - kept.sum(dtype=jnp.int32)
    return dataclasses.replace(cache, groups=tuple(groups)), index, lost


def _keepers(
    prompts: _Prompts, stored: Int32[Array, "N W"], offered: Bool[Array, "N W"]
) -> tuple[Int32[Array, "N W"], Bool[Array, "N W"]]:
    """Of rows that offer the same new page, the first: the place, as ``row * W + page``, at which it stands.

    Sorted by hash, equal pages are neighbours: no row is compared with another but the first that has its hash.

    Returns:
      The places (its own for a stored page), and the pages that agree with theirs, from the prompt's first on: the
      page itself in every token, and what is before it by standing at the same place or entry. So equal hashes of
      different texts are found out, and the later of the rows offers nothing from there on.
    """
    N, W = offered.shape
    is_new = offered & (stored < 0)
    cells = jnp.arange(N * W, dtype=jnp.int32)
    old, high, low = (x.reshape(-1) for x in (~is_new, *prompts.hashes))
    old, high, low, order = jax.lax.sort((old.astype(jnp.int32), high, low, cells), num_keys=3)
    begins = jnp.ones(N * W, bool).at[1:].set((old[1:] > 0) | (high[1:] != high[:-1]) | (low[1:] != low[:-1]))
    first = order[jax.lax.cummax(jnp.where(begins, cells, 0))]
    keeper = jnp.zeros(N * W, jnp.int32).at[order].set(first).reshape(N, W)
    row, page = keeper // W, keeper % W
    # What a page hangs below: nothing, an entry, or a page that somebody offers here.
    below = jnp.where(stored >= 0, -1 - stored, keeper)
    below = jnp.pad(below[:, :-1], ((0, 0), (1, 0)), constant_values=N * W)
    same = (prompts.pages[row, page] == prompts.pages).all(axis=-1) & (page == jnp.arange(W, dtype=jnp.int32))
    same &= (prompts.extra_keys[row] == prompts.extra_keys[:, None]) & (below[row, page] == below)
    return keeper, _up_to_first(offered & (same | ~is_new))


# Eviction.


def evict(
    cache: PagedKVCache, index: DeviceIndex, num_pages: Int32[Array, ""] | int
) -> tuple[PagedKVCache, DeviceIndex, Int32[Array, ""]]:
    """Forgets the entries used least recently, leaves first, until so many pages are free that were not.

    Pages that rows use stay, and so does every page before them.

    Args:
      cache: the cache.
      index: the index.
      num_pages: i32[] pages to free, in each group; may be traced.

    Returns:
      The cache, the index, and the pages freed; fewer than asked for where no more could go.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.
    """
    _check_cache(cache, index)
    return _integers_only(_evict, cache, index, _checks.int_array("num_pages", num_pages, ""))


@jax.jit
def _evict(cache, index, num_pages):
    C = index.capacity
    used = jnp.zeros(C, bool)
    for group, pages in zip(cache.groups, index.pages, strict=True):
        counts = jnp.where(index.depths >= 0, group.ref_counts[jnp.maximum(pages, 0)], 0)
        used |= counts > 1
    # A page is kept with everything that hangs below it: what is used is passed up, twice as far each time.
    above = index.parents
    for _ in range(max(cache.groups[0].block_tables.shape[-1] - 1, 0).bit_length()):
        used = used.at[jnp.where(used & (above >= 0), above, C)].set(True, mode="drop")
        above = jnp.where(above >= 0, above[above], NO_ENTRY)
    index, dropped, num_dropped = _drop(index, num_pages, used)
    groups = tuple(
        dataclasses.replace(g, ref_counts=_allocator.add_references(g.ref_counts, pages, -1))
        for g, pages in zip(cache.groups, dropped, strict=True)
    )
    return dataclasses.replace(cache, groups=groups), _sorted(index), num_dropped


def _drop(
    index: DeviceIndex, count: Int32[Array, ""], stays: Bool[Array, "C"]
) -> tuple[DeviceIndex, tuple[Int32[Array, "C"], ...], Int32[Array, ""]]:
    """Frees the `count` entries used least recently of those that may go. `order` is left to `_sorted`.

    No entry is used less recently than one below it, so that the order by (turn, deepest first) is leaves first.

    Returns:
      The index, per group the pages that lost their entry (NO_PAGE elsewhere), and how many entries went.
    """
    C = index.capacity
    may_go = (index.depths >= 0) & ~stays
    ticks = jnp.where(may_go, index.ticks, INT32_MAX)
    everything = jnp.arange(C, dtype=jnp.int32)
    _, _, order = jax.lax.sort((ticks, -index.depths, everything), num_keys=2)
    rank = jnp.zeros(C, jnp.int32).at[order].set(everything)
    gone = may_go & (rank < count)
    pages = tuple(jnp.where(gone, p, NO_PAGE) for p in index.pages)
    index = dataclasses.replace(
        index,
        depths=jnp.where(gone, -1, index.depths),
        parents=jnp.where(gone, NO_ENTRY, index.parents),
        pages=tuple(jnp.where(gone, NO_PAGE, p) for p in index.pages),
    )
    return index, pages, gone.sum(dtype=jnp.int32)


def _sorted(index: DeviceIndex) -> DeviceIndex:
    """The index with its entries' order renewed; free ones have the highest hash."""
    highest = jnp.uint32(0xFFFFFFFF)
    hashes = jnp.where(index.depths >= 0, index.hashes, highest)
    everything = jnp.arange(index.capacity, dtype=jnp.int32)
    _, _, _, order = jax.lax.sort(
        (hashes[0], hashes[1], (index.depths < 0).astype(jnp.int32), everything), num_keys=3
    )
    return dataclasses.replace(index, hashes=hashes, order=order)


def make_room(
    cache: PagedKVCache,
    index: DeviceIndex,
    query_lens: Int32[Array, "B"],
    *,
    num_tokens: int | None = None,
    max_query_len: int | None = None,
) -> tuple[PagedKVCache, DeviceIndex, Int32[Array, ""]]:
    """Evicts exactly the pages that `extend` with the same arguments would lack.

    Args:
      cache: the cache.
      index: the index.
      query_lens, num_tokens, max_query_len: those of the `extend` to come.

    Returns:
      The cache, the index, and the pages freed, 0 where nothing lacked.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.
    """
    missing = _integers.shortfall(cache, query_lens, num_tokens=num_tokens, max_query_len=max_query_len)
    return evict(cache, index, missing.max())


def reset(cache: PagedKVCache, index: DeviceIndex) -> tuple[PagedKVCache, DeviceIndex]:
    """Forgets everything, as after an update of the weights. Pages that rows use stay with the rows.

    A row that was begun under earlier weights must not be published under the same extra key: release it, or give
    prompts the weights' version as their extra key.

    Args:
      cache: the cache.
      index: the index.

    Returns:
      The cache, and an index without entries.

    Raises:
      ValueError, TypeError: the index belongs to another config.
    """
    _check_cache(cache, index)
    return _integers_only(_reset, cache, index)


@jax.jit
def _reset(cache, index):
    groups = tuple(
        dataclasses.replace(g, ref_counts=_allocator.add_references(g.ref_counts, pages, -1))
        for g, pages in zip(cache.groups, index.pages, strict=True)
    )
    empty = _empty(index.capacity, index.tokens.shape[-1], len(groups), index.tick)
    return dataclasses.replace(cache, groups=groups), empty


def held(cache: PagedKVCache, index: DeviceIndex) -> tuple[Int32[Array, "P"], ...]:
    """The references that the index holds, for ``paxcache.check(cache, held=device.held(cache, index))``.

    Args:
      cache: the cache, for the sizes of its pools.
      index: the index.

    Returns:
      For each group, i32[P].
    """
    return tuple(
        _allocator.add_references(jnp.zeros_like(g.ref_counts), pages, 1)
        for g, pages in zip(cache.groups, index.pages, strict=True)
    )


def _check_cache(cache: PagedKVCache, index: DeviceIndex) -> None:
    _checks.instance("cache", cache, PagedKVCache)
    _checks.instance("index", index, DeviceIndex, source="prefix.device.init")
    if cache.page_size != index.tokens.shape[-1] or len(cache.groups) != len(index.pages):
        raise ValueError(
            f"index: made for {len(index.pages)} groups of page_size {index.tokens.shape[-1]}, the cache has "
            f"{len(cache.groups)} of {cache.page_size}"
        )
    if any(g.sliding_window is not None for g in cache.groups):
        raise NotImplementedError("prefix.device: groups with a sliding window; use the host index for them")


def _check_prompts(index: DeviceIndex, tokens: Any, lens: Any, extra_keys: Any):
    tokens = _checks.int_array("tokens", tokens, "N L")
    N, L = tokens.shape
    lens = jnp.minimum(_checks.int_array("lens", lens, "N", N=N), L)
    lacking = index.tokens.shape[-1] - L
    if lacking > 0:  # not one full page: give them a column of pages, which no length fills
        tokens = jnp.pad(tokens, ((0, 0), (0, lacking)))
    extra_keys = jnp.zeros(N, jnp.int32) if extra_keys is None else extra_keys
    return tokens, lens, _checks.int_array("extra_keys", extra_keys, "N", N=N)
