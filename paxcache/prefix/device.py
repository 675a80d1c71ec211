"""The prefix index inside a compiled loop: fixed-size arrays, no host round trip.

The same verbs as on the host, for full pages and LRU, as pure functions under `jit`, `lax.while_loop` and `vmap`. An
*entry* is one full page of tokens behind its parent entry; a prompt's pages are found all at once. Each page of a
prompt has a 64-bit hash of everything up to its end, entries lie sorted by theirs, and a binary search proposes one
entry a page. A proposal counts only if its tokens and its extra key are the page's, and its parent is the entry of the
page before: so by induction a hit means equal text. A collision can cost a hit and never serve another's page.

An entry holds a page in each group without a sliding window. Pages of groups with one come and go on their own: a
prefix is reused up to where every page is there that the next token's windows reach.

Nothing loops over pages, rows or entries: ranks come from sorts and prefix sums, entries move by scatters.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from paxcache import _allocator, _checks
from paxcache._cache import _integers_only, row_epochs
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
    ticks: UInt32[Array, "2 C"]
    """Turn in which it was last used, the high word first. A parent's is never lower than a child's."""
    pages: tuple[Int32[Array, "C"], ...]
    """Per group, the page that it holds a reference to; NO_PAGE where it has none, beside a sliding window."""
    hashes: UInt32[Array, "2 C"]
    order: Int32[Array, "C"]
    """Entries sorted by hash, free ones last."""
    tick: UInt32[Array, "2"]
    """Turns taken, one for each row of a call. One word would be used up by an hour of a million rows a second."""
    windows: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    """Per group, its sliding window."""

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
    """Entry of each of these pages, NO_ENTRY past the last."""


def init(config: CacheConfig, *, capacity: int | None = None) -> DeviceIndex:
    """An empty index for caches of a config.

    Args:
      config: the cache's.
      capacity: entries, C (static). None: one for each page of the smallest group without a sliding window, so that
        none is ever dropped; where all groups have one, of the largest.

    Returns:
      A `DeviceIndex`.

    Raises:
      ValueError, TypeError: an argument's type or range is wrong.

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
    sizes = [(config.group_num_pages(g), g.sliding_window) for g in config.layer_groups]
    least = min((n for n, window in sizes if window is None), default=max(n for n, _ in sizes))
    C = least if capacity is None else _checks.static_int("capacity", capacity, minimum=1)
    return _empty(C, config.page_size, tuple(window for _, window in sizes), jnp.zeros(2, jnp.uint32))


def _empty(C: int, S: int, windows: tuple[int | None, ...], tick: UInt32[Array, "2"]) -> DeviceIndex:
    def full(value):
        return jnp.full(C, value, jnp.int32)

    return DeviceIndex(
        tokens=jnp.zeros((C, S), jnp.int32),
        extra_keys=full(0),
        parents=full(NO_ENTRY),
        depths=full(-1),
        ticks=jnp.zeros((2, C), jnp.uint32),
        pages=tuple(full(NO_PAGE) for _ in windows),
        hashes=jnp.full((2, C), 0xFFFFFFFF, jnp.uint32),
        order=jnp.arange(C, dtype=jnp.int32),
        tick=tick,
        windows=windows,
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
    _checks.instance("index", index, DeviceIndex, source="prefix.device.init")
    tokens, lens, extra_keys = _check_prompts(index, tokens, lens, extra_keys)
    entries = _match(index, tokens, lens, extra_keys)
    return Found((entries >= 0).sum(axis=1, dtype=jnp.int32) * index.tokens.shape[-1], entries)


@jax.jit
def _match(index, tokens, lens, extra_keys):
    entries, _ = _find(index, _prompts(tokens, lens, extra_keys, index.tokens.shape[-1]))
    return jnp.where(_within_windows(index, entries), entries, NO_ENTRY)


def _first_seen(lens: Int32[Array, "..."], window: int | None, S: int) -> Int32[Array, "..."]:
    """The first page that the token after so many sees."""
    return jnp.zeros_like(lens) if window is None else jnp.maximum(lens - window + 1, 0) // S


def _within_windows(index: DeviceIndex, entries: Int32[Array, "N W"]) -> Bool[Array, "N W"]:
    """The first pages of found entries, as many as can be reused: the next token sees none that is not there."""
    W, S = entries.shape[1], index.tokens.shape[-1]
    page = jnp.arange(W, dtype=jnp.int32)
    whole = entries >= 0  # whether a prefix that ends with the page is
    for pages, window in zip(index.pages, index.windows, strict=True):
        if window is not None:
            last_missing = jax.lax.cummax(jnp.where(pages[entries] < 0, page, -1), axis=1)
            whole &= last_missing < _first_seen((page + 1) * S, window, S)
    return page <= jnp.where(whole, page, -1).max(axis=1, keepdims=True)


# Whose pages they are.


def _holdings(index: DeviceIndex) -> UInt32[Array, "2"]:
    """A checksum of which text each held page has: a sum over the pages, so that their order does not count."""
    sums = []
    for lane, seed in zip(index.hashes, (0x9E3779B9, 0x7F4A7C15), strict=True):
        total = jnp.uint32(0)
        for g, pages in enumerate(index.pages):
            place = _mix(pages.astype(jnp.uint32) * jnp.uint32(len(index.pages)) + jnp.uint32(g + seed))
            total += jnp.where(pages >= 0, _mix(lane ^ place), 0).sum(dtype=jnp.uint32)
        sums.append(total)
    return jnp.stack(sums)


def belongs(cache: PagedKVCache, index: DeviceIndex) -> Bool[Array, ""]:
    """Whether the pages that an index holds are this cache's: each call below asks that first.

    A cache remembers, as a checksum, which text each page has that its index holds; `publish`, `evict`, `make_room` and
    `reset` renew it. So an index goes with the cache that came out of the same call, and with what other functions made
    of that; an older index, an older cache or those of another run are told apart. A copy, a checkpoint or an earlier
    pair is as good as ever, and an index without entries goes with any cache. What cannot be seen: caches of models
    with other weights whose calls were the same. A cache goes with one index at a time.

    Args:
      cache: the cache.
      index: the index.

    Returns:
      bool[].

    Raises:
      ValueError, TypeError: the index belongs to another config.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache.prefix import device
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([4, 0]), num_tokens=4)
      >>> prompt, index = (jnp.array([0]), jnp.arange(4)[None], jnp.array([4])), device.init(config)
      >>> published, index, _ = device.publish(cache, index, *prompt)
      >>> device.belongs(published, index).item(), device.belongs(cache, index).item()
      (True, False)
    """
    _check_cache(cache, index)
    return _belongs(cache, index)


@jax.jit
def _belongs(cache, index):
    mine = _holdings(index)
    return jnp.bool_(True) if cache.holdings is None else (mine == cache.holdings).all() | (mine == 0).all()


def _renewed(cache: PagedKVCache, index: DeviceIndex, ok: Bool[Array, ""], **changes: Any) -> PagedKVCache:
    """The cache after a call that changed what the index holds."""
    if cache.holdings is not None:
        changes["holdings"] = jnp.where(ok, _holdings(index), cache.holdings)
    return dataclasses.replace(cache, **changes)


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
      row is live, out of range, named twice, or padding. -2 for all: the index is not this cache's, see `belongs`.

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
    fits = _belongs(cache, index)
    ok = fits & _allocator.named_once(rows, B) & idle[jnp.clip(rows, 0, B - 1)]
    entries = jnp.where(ok[:, None] & _within_windows(index, entries), entries, NO_ENTRY)[:, :M]
    reused = (entries >= 0).sum(axis=1, dtype=jnp.int32) * S

    where = jnp.where(ok, rows, B)
    column = jnp.arange(entries.shape[1], dtype=jnp.int32)
    groups = []
    for group, pages in zip(cache.groups, index.pages, strict=True):
        seen = column >= _first_seen(reused, group.sliding_window, S)[:, None]
        new = jnp.where(seen & (entries >= 0), pages[entries], NO_PAGE)
        new = jnp.pad(new, ((0, 0), (0, M - new.shape[1])), constant_values=NO_PAGE)
        tables, counts = _integers.set_rows(group.block_tables, group.ref_counts, where, new)
        groups.append(dataclasses.replace(group, block_tables=tables, ref_counts=counts))
    # This index has no epochs: to one that has, the row is one that was not admitted.
    seq_lens, epochs = (
        old.at[where].set(new, mode="drop") for old, new in ((cache.seq_lens, reused), (cache.epochs, 0))
    )
    cache = dataclasses.replace(cache, seq_lens=seq_lens, groups=tuple(groups), epochs=epochs)
    index, _ = _touch(index, entries)
    index = dataclasses.replace(index, tick=_later(index.tick, N))
    return cache, index, jnp.where(ok, reused, jnp.where(fits, -1, -2))


def _later(tick: UInt32[Array, "2"], turns: Any) -> UInt32[Array, "2 ..."]:
    """The clock after so many turns."""
    low = tick[1] + jnp.asarray(turns, jnp.uint32)
    return jnp.stack([tick[0] + (low < tick[1]).astype(jnp.uint32), low])


def _touch(index: DeviceIndex, entries: Int32[Array, "N W"]) -> tuple[DeviceIndex, Bool[Array, "C"]]:
    """Entries used by the rows of a call, each of which is a turn; and which entries these are."""
    where = jnp.where(entries >= 0, entries, index.capacity)
    turns = jnp.broadcast_to(jnp.arange(1, entries.shape[0] + 1, dtype=jnp.int32)[:, None], entries.shape)
    last = jnp.zeros(index.capacity, jnp.int32).at[where].max(turns, mode="drop")
    ticks = jnp.where(last > 0, _later(index.tick, last), index.ticks)
    return dataclasses.replace(index, ticks=ticks), last > 0


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
      The cache, the index, and how many entries were dropped or not stored for want of capacity; -1 where nothing was
      done because the index is not this cache's, see `belongs`.

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
    fits = _belongs(cache, index)
    ok = fits & _allocator.named_once(rows, B)
    at = jnp.clip(rows, 0, B - 1)
    ok &= row_epochs(cache)[at] >= 0  # pages that have yet to land are not offered
    lens = jnp.where(ok, jnp.minimum(jnp.minimum(lens, cache.seq_lens[at]), M * S), 0)
    prompts = _prompts(tokens, lens, extra_keys, S)
    W = min(prompts.pages.shape[1], M)
    prompts = prompts._replace(pages=prompts.pages[:, :W], hashes=prompts.hashes[:, :, :W])
    tables = [g.block_tables[at, :W] for g in cache.groups]
    offered = jnp.arange(W, dtype=jnp.int32) < prompts.num_pages[:, None]
    for table, window in zip(tables, index.windows, strict=True):
        offered &= (table >= 0) | (window is not None)
    stored, collides = _find(index, prompts)
    # Not offered: a page that an entry with another text holds or hides behind its hash, and what follows it.
    offered &= ~collides | (stored >= 0)
    for table, pages, is_held in zip(tables, index.pages, _held(cache, index), strict=True):
        mine = (stored >= 0) & (pages[stored] == table)
        offered &= (table < 0) | (is_held[jnp.maximum(table, 0)] == 0) | mine
    offered = _up_to_first(offered)
    keeper, agrees = _keepers(prompts, stored, offered)
    # Nor a page that two texts of this call claim. What hangs on a keeper goes with it.
    text = jnp.where(stored >= 0, -1 - stored, keeper)
    for group, table in zip(cache.groups, tables, strict=True):
        P = group.ref_counts.shape[0]
        page = jnp.where(agrees & (table >= 0), table, P)
        owner = jnp.full(P, INT32_MAX, jnp.int32).at[page].min(text, mode="drop")
        agrees &= (table < 0) | (owner[jnp.maximum(table, 0)] == text)
    agrees = _up_to_first(agrees)
    offered = _up_to_first(agrees & agrees.reshape(-1)[keeper])
    cells = jnp.arange(N * W, dtype=jnp.int32).reshape(N, W)
    is_new = offered & (stored < 0) & (keeper == cells)
    stored = jnp.where(offered, stored, NO_ENTRY)
    index, just_used = _touch(index, stored)

    # Room: free entries, then those used least recently, but none that this call has just used.
    before = index.pages
    wanted = is_new.sum(dtype=jnp.int32)
    free = (index.depths < 0).sum(dtype=jnp.int32)
    index, num_dropped = _drop(index, wanted - free, just_used)
    dropped = _given_back(before, index.pages)
    rank = jnp.cumsum(is_new.reshape(-1), dtype=jnp.int32).reshape(N, W) - 1
    kept = is_new & (rank < (index.depths < 0).sum(dtype=jnp.int32))
    free_entries = _allocator.listed(index.depths < 0, C)
    fresh = jnp.where(kept, free_entries[jnp.clip(rank, 0, C - 1)], NO_ENTRY)
    entries = jnp.where(stored >= 0, stored, fresh.reshape(-1)[keeper])
    entries = jnp.where(offered, entries, NO_ENTRY)

    where = jnp.where(kept, fresh, C)
    parents = jnp.pad(entries[:, :-1], ((0, 0), (1, 0)), constant_values=NO_ENTRY)

    def put(old, new):
        return old.at[where].set(jnp.broadcast_to(new, (*where.shape, *old.shape[1:])), mode="drop")

    # An entry takes the page of the first row that has one, where it holds none; and rows take the entries' pages.
    pages, groups = [], []
    for g, (group, table) in enumerate(zip(cache.groups, tables, strict=True)):
        lacks = (entries >= 0) & (table >= 0) & (index.pages[g][entries] < 0)
        first = jnp.full(C, N * W, jnp.int32).at[jnp.where(lacks, entries, C)].min(cells, mode="drop")
        gives = lacks & (first[entries] == cells)
        pages.append(index.pages[g].at[jnp.where(gives, entries, C)].set(table, mode="drop"))
        own, theirs = group.block_tables[at], jnp.where(entries >= 0, pages[g][entries], NO_PAGE)
        new = own.at[:, :W].set(jnp.where((theirs >= 0) & (table >= 0), theirs, table))
        counts = _allocator.add_references(group.ref_counts, dropped[g], -1)
        counts = _allocator.add_references(counts, jnp.where(gives, table, NO_PAGE), 1)
        new_tables, counts = _integers.set_rows(group.block_tables, counts, jnp.where(ok, rows, B), new)
        groups.append(dataclasses.replace(group, block_tables=new_tables, ref_counts=counts))
    index = dataclasses.replace(
        index,
        tokens=put(index.tokens, prompts.pages),
        extra_keys=put(index.extra_keys, extra_keys[:, None]),
        parents=put(index.parents, parents),
        depths=put(index.depths, jnp.arange(W, dtype=jnp.int32)),
        pages=tuple(pages),
        hashes=jnp.stack([put(h, n) for h, n in zip(index.hashes, prompts.hashes, strict=True)]),
    )
    index = _sorted(_touch(index, entries)[0])
    index = dataclasses.replace(index, tick=_later(index.tick, N))
    lost = num_dropped + wanted - kept.sum(dtype=jnp.int32)
    cache = _renewed(cache, index, fits, groups=tuple(groups))
    return cache, index, jnp.where(fits, lost, -1)


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

    Pages that rows use stay, and so does every page before them. In groups with a sliding window, what then still lacks
    is taken from entries that stay: from the least recently used, but first where the page is of no use to a prompt
    that goes on from where the last one ended, and from the beginning on.

    Args:
      cache: the cache.
      index: the index.
      num_pages: i32[] pages to free, in each group; may be traced.

    Returns:
      The cache, the index, and the pages freed; fewer than asked for where no more could go. Among groups the fewest;
      -1 where the index is not this cache's, see `belongs`.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Reference: leaf-first LRU of SGLang's RadixAttention (Zheng et al., 2024), and its tombstones beside windows.
    """
    _check_cache(cache, index)
    num_pages = _checks.int_array("num_pages", num_pages, "")
    cache, index, freed = _integers_only(_evict, cache, index, jnp.broadcast_to(num_pages, len(cache.groups)))
    return cache, index, freed.min()


def evictable(cache: PagedKVCache, index: DeviceIndex) -> Int32[Array, "G"]:
    """The pages that `evict` could free now, in each group; changes nothing.

    Args:
      cache: the cache.
      index: the index.

    Returns:
      i32[G]; -1 where the index is not this cache's.

    Raises:
      ValueError, TypeError: the index belongs to another config.
    """
    _check_cache(cache, index)
    everything = jnp.full(len(cache.groups), INT32_MAX, jnp.int32)
    return _integers_only(_evict, cache, index, everything)[2]


@jax.jit
def _evict(cache, index, needs):
    """As `evict`, with a number of pages for each group."""
    C, M, before = index.capacity, cache.groups[0].block_tables.shape[-1], index.pages
    fits = _belongs(cache, index)
    needs = jnp.where(fits, needs, 0)
    uses = [
        jnp.where(pages >= 0, group.ref_counts[pages], 0)
        for group, pages in zip(cache.groups, before, strict=True)
    ]
    in_use = functools.reduce(jnp.maximum, uses) > 1
    whole = [g for g, window in enumerate(index.windows) if window is None]
    if whole:
        most = functools.reduce(jnp.maximum, [needs[g] for g in whole])
        index, _ = _drop(index, most, _with_parents(index, in_use, M))
    for g, window in enumerate(index.windows):
        if window is not None:
            pages = index.pages[g]
            lacking = needs[g] - ((before[g] >= 0) & (pages < 0)).sum(dtype=jnp.int32)
            may_go = (pages >= 0) & (uses[g] == 1)
            spare = _chain_below(index, M) > -(-(window - 1) // index.tokens.shape[-1])
            rank = _ranks((~may_go, ~spare, *index.ticks, index.depths))
            pages = jnp.where(may_go & (rank < lacking), NO_PAGE, pages)
            index = dataclasses.replace(index, pages=(*index.pages[:g], pages, *index.pages[g + 1 :]))
    if not whole:  # nothing else tells when an entry is of no use: when none below it has a page
        useful = _with_parents(index, functools.reduce(jnp.maximum, index.pages) >= 0, M)
        index, _ = _drop(index, jnp.where(fits, C, 0), useful)
    dropped = _given_back(before, index.pages)
    groups = tuple(
        dataclasses.replace(g, ref_counts=_allocator.add_references(g.ref_counts, pages, -1))
        for g, pages in zip(cache.groups, dropped, strict=True)
    )
    freed = jnp.stack([(pages >= 0).sum(dtype=jnp.int32) for pages in dropped])
    index = _sorted(index)
    return _renewed(cache, index, fits, groups=groups), index, jnp.where(fits, freed, -1)


def _given_back(before: tuple[Int32[Array, "C"], ...], after: tuple[Int32[Array, "C"], ...]):
    """Per group the pages that lost their entry, NO_PAGE elsewhere."""
    return tuple(jnp.where(new < 0, old, NO_PAGE) for old, new in zip(before, after, strict=True))


def _with_parents(index: DeviceIndex, marked: Bool[Array, "C"], max_pages: int) -> Bool[Array, "C"]:
    """Entries that are marked and all above them: a mark is passed up, twice as far each time."""
    above = index.parents
    for _ in range(max(max_pages - 1, 0).bit_length()):
        marked = marked.at[jnp.where(marked & (above >= 0), above, index.capacity)].set(True, mode="drop")
        above = jnp.where(above >= 0, above[above], NO_ENTRY)
    return marked


def _chain_below(index: DeviceIndex, max_pages: int) -> Int32[Array, "C"]:
    """How many entries hang below each, up to where a prompt ended: at a leaf, a fork, or an older child."""
    C = index.capacity
    parent = jnp.where(index.parents >= 0, index.parents, C)
    entries = jnp.arange(C, dtype=jnp.int32)
    child = jnp.full(C, NO_ENTRY, jnp.int32).at[parent].max(entries, mode="drop")
    only = jnp.zeros(C, jnp.int32).at[parent].add(1, mode="drop") == 1
    goes_on = only & (index.ticks == index.ticks[:, child]).all(axis=0)
    below, length = jnp.where(goes_on, child, entries), goes_on.astype(jnp.int32)
    for _ in range(max(max_pages - 1, 0).bit_length()):
        length += length[below]
        below = below[below]
    return length


def _ranks(keys: tuple[Any, ...]) -> Int32[Array, "C"]:
    """Each entry's place in the order by some keys, the first of them first."""
    keys = tuple(key.astype(jnp.int32) if key.dtype == bool else key for key in keys)
    everything = jnp.arange(keys[0].shape[0], dtype=jnp.int32)
    *_, order = jax.lax.sort((*keys, everything), num_keys=len(keys))
    return jnp.zeros_like(everything).at[order].set(everything)


def _drop(
    index: DeviceIndex, count: Int32[Array, ""], stays: Bool[Array, "C"]
) -> tuple[DeviceIndex, Int32[Array, ""]]:
    """Frees the `count` entries used least recently of those that may go. `order` is left to `_sorted`.

    No entry is used less recently than one below it, so that the order by (turn, deepest first) is leaves first.

    Returns:
      The index, and how many entries went.
    """
    may_go = (index.depths >= 0) & ~stays
    gone = may_go & (_ranks((~may_go, *index.ticks, -index.depths)) < count)
    index = dataclasses.replace(
        index,
        depths=jnp.where(gone, -1, index.depths),
        parents=jnp.where(gone, NO_ENTRY, index.parents),
        pages=tuple(jnp.where(gone, NO_PAGE, p) for p in index.pages),
    )
    return index, gone.sum(dtype=jnp.int32)


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
      The cache, the index, and the pages freed in the group that gave most, 0 where nothing lacked; -1 where the index
      is not this cache's, see `belongs`.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.
    """
    _check_cache(cache, index)
    missing = _integers.shortfall(cache, query_lens, num_tokens=num_tokens, max_query_len=max_query_len)
    cache, index, freed = _integers_only(_evict, cache, index, missing)
    return cache, index, freed.max()


def reset(cache: PagedKVCache, index: DeviceIndex) -> tuple[PagedKVCache, DeviceIndex]:
    """Forgets everything, as after an update of the weights. Pages that rows use stay with the rows.

    A row that was begun under earlier weights must not be published under the same extra key: release it, or give
    prompts the weights' version as their extra key.

    Args:
      cache: the cache.
      index: the index.

    Returns:
      The cache, and an index without entries. A cache that is not the index's, see `belongs`, stays as it is.

    Raises:
      ValueError, TypeError: the index belongs to another config.
    """
    _check_cache(cache, index)
    return _integers_only(_reset, cache, index)


@jax.jit
def _reset(cache, index):
    fits = _belongs(cache, index)
    groups = tuple(
        dataclasses.replace(
            g, ref_counts=_allocator.add_references(g.ref_counts, jnp.where(fits, pages, NO_PAGE), -1)
        )
        for g, pages in zip(cache.groups, index.pages, strict=True)
    )
    empty = _empty(index.capacity, index.tokens.shape[-1], index.windows, index.tick)
    return _renewed(cache, empty, fits, groups=groups), empty


def held(cache: PagedKVCache, index: DeviceIndex) -> tuple[Int32[Array, "P"], ...]:
    """The references that the index holds, for ``paxcache.check(cache, held=device.held(cache, index))``.

    Args:
      cache: the cache, for the sizes of its pools.
      index: the index.

    Returns:
      For each group, i32[P].

    Raises:
      ValueError, TypeError: the index belongs to another config.
    """
    _check_cache(cache, index)
    return _held(cache, index)


def _held(cache: PagedKVCache, index: DeviceIndex) -> tuple[Int32[Array, "P"], ...]:
    return tuple(
        _allocator.add_references(jnp.zeros_like(g.ref_counts), pages, 1)
        for g, pages in zip(cache.groups, index.pages, strict=True)
    )


def _check_cache(cache: PagedKVCache, index: DeviceIndex) -> None:
    _checks.instance("cache", cache, PagedKVCache)
    _checks.instance("index", index, DeviceIndex, source="prefix.device.init")
    own = index.tokens.shape[-1], index.windows
    expected = cache.page_size, tuple(g.sliding_window for g in cache.groups)
    if own != expected:
        raise ValueError(
            f"index: made for another config: (page_size, windows by group) are {own}, the cache's {expected}"
        )


def _check_prompts(index: DeviceIndex, tokens: Any, lens: Any, extra_keys: Any):
    tokens = _checks.int_array("tokens", tokens, "N L")
    N, L = tokens.shape
    lens = jnp.minimum(_checks.int_array("lens", lens, "N", N=N), L)
    lacking = index.tokens.shape[-1] - L
    if lacking > 0:  # not one full page: give them a column of pages, which no length fills
        tokens = jnp.pad(tokens, ((0, 0), (0, lacking)))
    extra_keys = jnp.zeros(N, jnp.int32) if extra_keys is None else extra_keys
    return tokens, lens, _checks.int_array("extra_keys", extra_keys, "N", N=N)
