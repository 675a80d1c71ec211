"""The host index and a cache together: match, admit, publish, evict, pin. Imports `_index`, `_policy`, `_integers`.

Each call reads the few integers that it needs in one transfer and changes tables and counts in one small program that
leaves pages where they are. Nothing here writes, copies or moves a page: a row that goes on inside a shared page gets
its own copy from `extend`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.core import Tracer

from paxcache import _checks
from paxcache._types import INT32_MAX, NO_PAGE, CacheConfig, PagedKVCache
from paxcache.prefix import _index, _integers, _keys, _policy, _tree
from paxcache.prefix._index import Draft, Event, Gone, Index, Node, Path, Run

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int, Int32

    from paxcache.prefix._keys import ExtraKey, Prompt, Salt
    from paxcache.prefix._policy import Policy


def init(config: CacheConfig, *, epoch: int = 0, events: bool = False) -> Index:
    """An empty index for caches of a config.

    Args:
      config: the cache's.
      epoch: the weights' version, at least 0 and below 2**31 - 1, see `new_epoch`.
      events: keep a log for `take_events`. It grows until it is taken.

    Returns:
      An `Index`.

    Raises:
      ValueError, TypeError: an argument is out of its range or of another type.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, index, prompt = paxcache.init(config), prefix.init(config), list(range(10))
      >>> cache, index, num_reused = prefix.admit(cache, index, 0, prompt)
      >>> cache, step = paxcache.extend(cache, jnp.array([10 - num_reused, 0]), num_tokens=10)   # append, attend
      >>> cache, index = prefix.publish(cache, index, 0, prompt)
      >>> prefix.admit(cache, index, 1, prompt)[2]   # another row: two full pages need not be computed
      8

    Reference: RadixAttention of SGLang (Zheng et al., 2024).
    """
    _checks.instance("config", config, CacheConfig)
    groups = config.layer_groups
    epoch = _check_epoch(epoch, minimum=0)
    return Index(
        page_size=config.page_size,
        max_pages=config.max_pages_per_seq,
        num_pages=tuple(config.group_num_pages(g) for g in groups),
        windows=tuple(g.sliding_window for g in groups),
        first_epoch=epoch,
        epoch=epoch,
        now=0.0,
        tick=0,
        next_id=1,
        counters=_index.Counters(),
        num_entries=0,
        num_protected=0,
        nodes=None,
        edges=None,
        orders=(),
        pins=None,
        held=tuple(np.zeros(config.group_num_pages(g), bool) for g in groups),
        holdings=0,
        recording=bool(events),
        log=None,
    )


def _check_epoch(epoch: int, *, minimum: int) -> int:
    epoch = _checks.static_int("epoch", epoch, minimum=minimum)
    if epoch >= INT32_MAX:
        raise ValueError(f"epoch: must be below {INT32_MAX} (caches keep 1 more as int32), got {epoch}")
    return epoch


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """The longest reusable prefix of a prompt."""

    num_tokens: int
    """Tokens that need not be computed. Past the last full page, they are the first ones of one more page."""
    ids: Int32[np.ndarray, "N G"]
    """Of the pages that hold them, the number in each group; NO_PAGE where it is not needed, left of a window."""
    _full_pages: int = dataclasses.field(repr=False)
    _path: Path = dataclasses.field(repr=False)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Stable keys of the full pages."""
        size = _keys.KEY_BYTES
        return tuple(
            n.run.keys[page * size : (page + 1) * size]
            for n, count in self._path
            for page in range(n.start, n.start + count)
        )[: self._full_pages]


def match(
    index: Index,
    tokens: Int[np.ndarray, "N"] | Sequence[int],
    *,
    extra_key: ExtraKey | Salt = None,
    partial: bool = True,
) -> Match:
    """The longest prefix of a prompt whose keys and values are stored. Reads the index alone and changes nothing.

    Tokens are compared, each of them. A match may be all of the prompt; `admit` leaves at least one token to compute.

    Args:
      index: the index.
      tokens: the prompt, integers [N]; an int32 array is the quickest.
      extra_key: keeps prompts apart whose tokens agree, see `ExtraKey`.
      partial: whether the match may end inside a page, at the cost of one page copied by the next `extend`.

    Returns:
      A `Match`.

    Raises:
      ValueError, TypeError: an argument's type or shape is wrong.

    Example:
      >>> import paxcache
      >>> from paxcache import prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> prefix.match(prefix.init(config), [1, 2, 3]).num_tokens
      0

    Reference: RadixAttention of SGLang (Zheng et al., 2024); copy-on-write of its last page, as TensorRT-LLM's
    partial reuse.
    """
    _check_index(index)
    prompt = _prompt(index, tokens, extra_key)
    return _match(index, prompt, limit=prompt.num_tokens, partial=partial)


def _prompt(index: Index | Draft, tokens: Any, extra_key: Any) -> Prompt:
    return _keys.prompt(tokens, page_size=index.page_size, extra_key=extra_key, epoch=index.epoch)


def _match(index: Index | Draft, prompt: Prompt, *, limit: int, partial: bool) -> Match:
    """As `match`, of at most `limit` tokens."""
    S = index.page_size
    found = _index.walk(index, prompt, partial=partial)
    ids = _ids(index, found.path)
    num_tokens = min(found.num_tokens, limit, index.max_pages * S)
    if not partial:
        num_tokens -= num_tokens % S
    num_tokens = _within_windows(index, ids, num_tokens)
    pages = -(-num_tokens // S)
    ids, path = ids[:pages], _index.cut_path(found.path, pages)
    for g, window in enumerate(index.windows):
        if window is not None:
            ids = ids.copy()
            ids[: max(num_tokens - window + 1, 0) // S, g] = NO_PAGE
    return Match(num_tokens, ids, num_tokens // S, path)


def _ids(index: Index | Draft, path: Path) -> Int32[np.ndarray, "N G"]:
    """Numbers of a path's pages."""
    G = len(index.windows)
    size = G * _index.ID.itemsize
    ids = b"".join([n.run.ids[n.start * size : (n.start + count) * size] for n, count in path])
    return np.frombuffer(ids, _index.ID).reshape(-1, G)


def _within_windows(index: Index | Draft, ids: np.ndarray, num_tokens: int) -> int:
    """The longest length up to `num_tokens` whose next query sees only pages that are there."""
    S, pages = index.page_size, -(-num_tokens // index.page_size)
    missing = ids[:pages] < 0
    if not missing.any():
        return num_tokens
    columns = np.arange(pages)
    lengths = np.minimum((columns + 1) * S, num_tokens)  # the best length that ends in each page
    fine = np.ones(pages, bool)
    for g, window in enumerate(index.windows):
        last_missing = np.maximum.accumulate(np.where(missing[:, g], columns, -1))
        first_seen = 0 if window is None else np.maximum(lengths - window + 1, 0) // S
        fine &= last_missing < first_seen
    return int(lengths[np.flatnonzero(fine)[-1]]) if fine.any() else 0


def admit(
    cache: PagedKVCache,
    index: Index,
    row: int,
    tokens: Int[np.ndarray, "N"] | Sequence[int],
    *,
    extra_key: ExtraKey | Salt = None,
    partial: bool = True,
    now: float | None = None,
) -> tuple[PagedKVCache, Index, int]:
    """Starts a prompt in an idle row: the row maps the pages of the longest stored prefix and has its length.

    At least one token is left to compute. Where the prefix ends inside a page, the page is shared as it is, and the
    next `extend` gives the row a copy. Until it is released the row carries the index's epoch, see `new_epoch`.

    Args:
      cache: the cache.
      index: the index.
      row: an idle row.
      tokens, extra_key, partial: as in `match`.
      now: the time, for ages; never read from a clock. None: the latest time given.

    Returns:
      The cache, the index, and the tokens reused: compute ``tokens[num_reused:]``. -1: the row is live,
      and nothing changed.

    Raises:
      ValueError, TypeError: an argument's type, shape or range is wrong, or the index belongs to another config.

    Example: see `init`.

    Reference: RadixAttention of SGLang (Zheng et al., 2024).
    """
    cache, index, reused = admit_rows(
        cache, index, [row], [tokens], extra_keys=[extra_key], partial=partial, now=now
    )
    return cache, index, int(reused[0])


def admit_rows(
    cache: PagedKVCache,
    index: Index,
    rows: Sequence[int],
    prompts: Sequence[Any],
    *,
    extra_keys: Sequence[Any] | None = None,
    partial: bool = True,
    now: float | None = None,
) -> tuple[PagedKVCache, Index, Int[np.ndarray, "N"]]:
    """`admit` for many rows with one transfer each way.

    Args:
      cache: the cache.
      index: the index.
      rows: N different rows.
      prompts: a prompt for each.
      extra_keys: an extra key for each; None: none.
      partial, now: as in `admit`.

    Returns:
      The cache, the index, and the tokens reused by each row, -1 where the row is live.

    Raises:
      ValueError, TypeError: as in `admit`; also a row named twice, and lists of different lengths.
    """
    rows, extra_keys = _check_rows(cache, index, rows, prompts, extra_keys)
    draft = Draft(index)
    _set_time(draft, now)
    made = [_prompt(draft, p, key) for p, key in zip(prompts, extra_keys, strict=True)]
    reused = np.full(len(rows), -1)
    if not rows:
        return cache, index, reused
    lens, _, tables = _integers.read_rows(cache, rows)
    idle = (lens == 0) & (tables == NO_PAGE).all(axis=(1, 2))
    new_tables = np.full_like(tables, NO_PAGE)
    for n in np.flatnonzero(idle):
        found = _match(draft, made[n], limit=max(made[n].num_tokens - 1, 0), partial=partial)
        draft.tick += 1
        draft.touch(found._path, reused=True)
        draft.count(tokens_asked=made[n].num_tokens, tokens_reused=found.num_tokens)
        new_tables[n, :, : len(found.ids)] = found.ids.T
        reused[n] = found.num_tokens
    begun, epoch = np.flatnonzero(idle), draft.epoch + 1
    ids = [rows[n] for n in begun]
    if (reused > 0).any():
        epochs, nothing = np.full(len(ids), epoch), [()] * len(cache.groups)
        cache = _integers.write_rows(
            cache, ids, reused[begun], epochs, new_tables[begun], nothing, draft.holdings
        )
    elif ids:
        cache = _integers.write_epochs(cache, ids, epoch)
    return cache, draft.done(), reused


def publish(
    cache: PagedKVCache,
    index: Index,
    row: int,
    tokens: Int[np.ndarray, "N"] | Sequence[int],
    *,
    extra_key: ExtraKey | Salt = None,
    priority: int = 0,
    ttl: float | None = None,
    now: float | None = None,
) -> tuple[PagedKVCache, Index]:
    """Offers a row's full pages to others. Call it after all layers of a step were appended; the row goes on as it is.

    Each stored page holds a reference of its own, so it outlives the row. Pages that are stored already fold: the row
    maps the stored ones and gives its own back (a `Step` made before is no longer valid). A row whose tokens were
    begun under earlier weights (see `new_epoch`) offers nothing.

    Beside a sliding window, publish what a prompt has computed before each `extend` that goes on with it: `extend`
    gives back the row's pages left of the window, and those of them that no index holds are lost. A prompt that is
    published only at its end is reused from near its end alone, or where another one computes the missing pages.

    A call that stores nothing costs little less than one that does: publish where a prompt or an answer ends, or a page
    is full, not after every token.

    Args:
      cache: the cache.
      index: the index.
      row: the row. An idle one offers nothing.
      tokens: the tokens whose keys and values the row holds, integers [N], from its first. Only pages that both they
        and the row's length fill are offered.
      extra_key: the one it was admitted with.
      priority: at least 0, for ``evict(policy="priority")``; pages that are stored already keep the higher.
      ttl: time after which that policy evicts the pages first, from `now`; None: never. The longer life counts.
      now: as in `admit`.

    Returns:
      The cache and the index.

    Raises:
      ValueError, TypeError: an argument's type, shape or range is wrong, or the index belongs to another config.

    Example: see `init`.

    Reference: RadixAttention of SGLang (Zheng et al., 2024); retention priorities of TensorRT-LLM.
    """
    return publish_rows(
        cache, index, [row], [tokens], extra_keys=[extra_key], priority=priority, ttl=ttl, now=now
    )


def publish_rows(
    cache: PagedKVCache,
    index: Index,
    rows: Sequence[int],
    prompts: Sequence[Any],
    *,
    extra_keys: Sequence[Any] | None = None,
    priority: int = 0,
    ttl: float | None = None,
    now: float | None = None,
) -> tuple[PagedKVCache, Index]:
    """`publish` for many rows with one transfer each way. Rows that computed the same pages keep those of the first.

    Args:
      cache: the cache.
      index: the index.
      rows: N different rows.
      prompts: the tokens of each.
      extra_keys: an extra key for each; None: none.
      priority, ttl, now: as in `publish`.

    Returns:
      The cache and the index.

    Raises:
      ValueError, TypeError: as in `publish`; also a row named twice, and lists of different lengths.
    """
    rows, extra_keys = _check_rows(cache, index, rows, prompts, extra_keys)
    priority = _checks.static_int("priority", priority, minimum=0)
    draft = Draft(index)
    _set_time(draft, now)
    if ttl is not None:
        _check_number("ttl", ttl)
        if not ttl >= 0:
            raise ValueError(f"ttl: expected at least 0, got {ttl}")
    worth = {"priority": priority, "expires": math.inf if ttl is None else draft.now + ttl}
    made = [_prompt(draft, p, key) for p, key in zip(prompts, extra_keys, strict=True)]
    if not rows:
        return cache, index
    lens, epochs, tables = _integers.read_rows(cache, rows)
    new_tables = tables.copy()
    taken: list[list[int]] = [[] for _ in cache.groups]
    for n in range(len(rows)):
        if (epochs[n] - 1 if epochs[n] else draft.first_epoch) == draft.epoch:
            usable = min(made[n].num_tokens, int(lens[n])) // draft.page_size * draft.page_size
            short = made[n]._replace(num_tokens=usable)
            _publish(draft, short, new_tables[n].T, taken, worth, extra_keys[n])
    changed = np.flatnonzero((new_tables != tables).any(axis=(1, 2)))
    if changed.size:
        ids = [rows[n] for n in changed]
        cache = _integers.write_rows(
            cache, ids, lens[changed], epochs[changed], new_tables[changed], taken, draft.holdings
        )
    else:
        cache = _integers.add_references(cache, taken, 1, draft.holdings)
    return cache, draft.done()


def _publish(
    draft: Draft,
    prompt: Prompt,
    table: np.ndarray,
    taken: list[list[int]],
    worth: dict[str, Any],
    extra_key: Any,
) -> None:
    """Stores one row's pages, table [M, G], and folds those that are stored; adds new references to `taken`."""
    if prompt.num_pages == 0:
        return
    draft.tick += 1
    found = _index.walk(draft, prompt)
    stored = _ids(draft, found.path)
    own = table[: len(stored)]
    # A page held by another entry was computed for that one's text and weights: nothing from there on is offered.
    foreign = np.flatnonzero((_held_pages(draft, own) & (own != stored)).any(axis=1))
    if foreign.size:
        prompt = prompt._replace(num_tokens=int(foreign[0]) * prompt.page_size)
        found = _index.walk(draft, prompt)
    at, above = 0, None
    for node in draft.touch(found.path, **worth):
        above = _fold(draft, node, table[at : at + node.size], taken)
        at += node.size
    new = table[at : prompt.num_pages]
    bad = _held_pages(draft, new).any(axis=1)
    for g, window in enumerate(draft.windows):
        if window is None:
            bad |= new[:, g] == NO_PAGE
    new = new[: int(bad.argmax()) if bad.any() else len(new)]
    some = np.flatnonzero(
        (new != NO_PAGE).any(axis=1)
    )  # in models of windows alone, an entry may have no page
    new = new[: some[-1] + 1 if some.size else 0]
    if not len(new):
        return
    width, parent_key = prompt.page_size * _keys.TOKEN.itemsize, _keys.root_key(prompt)
    if above is not None:
        parent_key = above.run.keys[(above.end - 1) * _keys.KEY_BYTES : above.end * _keys.KEY_BYTES]
    prompt = prompt._replace(num_tokens=(at + len(new)) * prompt.page_size)
    keys = _keys.chain(prompt, at, parent_key)
    data = prompt.tokens[at * width : (at + len(new)) * width]
    extras = {page - at: e for page, e in prompt.extras.items() if at <= page < prompt.num_pages}
    extras = extras or _index.NO_EXTRAS
    run = Run(data, keys, extras, new.astype(_index.ID).tobytes())
    if above is None or not draft.extend(above, run, **worth):
        draft.add(prompt, at, 0 if above is None else above.id, run, **worth)
    draft.hold(keys, new, taken)
    if draft.recording:
        names = tuple(np.frombuffer(data, _keys.TOKEN).tolist())
        draft.record(_index.Stored(_keys.split_keys(keys), parent_key, names, extra_key))


def _held_pages(draft: Draft, pages: np.ndarray) -> np.ndarray:
    """Which of some rows' pages [N, G] an entry holds."""
    held = [group[pages[:, g]] for g, group in enumerate(draft.held)]
    return np.stack(held, axis=1) & (pages != NO_PAGE)


def _fold(draft: Draft, node: Node, table: np.ndarray, taken: list[list[int]]) -> Node:
    """Puts a node's pages in place of a row's own, table [N, G]; takes those that a window had kept from the node."""
    ids = _ids(draft, [(node, node.size)])
    differ = (ids >= 0) & (table >= 0) & (ids != table)
    draft.count(pages_folded=int(differ.any(axis=1).sum()))
    lacks = (ids < 0) & (table >= 0)
    table[differ] = ids[differ]
    if not lacks.any():
        return node
    filled = np.where(lacks, table, NO_PAGE)
    draft.hold(node.run.keys[node.start * _keys.KEY_BYTES : node.end * _keys.KEY_BYTES], filled, taken)
    return draft.fill(node, np.maximum(ids, filled))


def evict(
    cache: PagedKVCache,
    index: Index,
    num_pages: int,
    *,
    policy: Policy = "lru",
    now: float | None = None,
) -> tuple[PagedKVCache, Index, int]:
    """Forgets entries until so many pages are free that were not: no more than that, and none that a row uses.

    Leaves go first, so that what is left can always be found. Pinned prefixes stay. One page costs O(log n) of n
    entries, and each row at most one leaf passed over because it is in use; the first call with a policy sorts the
    entries once.

    In groups with a sliding window, what then still lacks is taken from entries that stay: first, from those used least
    recently on, pages that no prompt needs which goes on from where an earlier one ended or left it; then the others,
    of the lowest priority first. A prefix is reused up to where all is there that the next token's windows reach.

    Args:
      cache: the cache.
      index: the index.
      num_pages: pages to free, in each group; 0 frees none.
      policy: "lru" (least recently used first), "lfu" (least often reused), "fifo" (oldest), "slru" (least recently
        used among those never reused, as long as the reused ones are at most 80 % of all), or "priority" (past their
        time-to-live, then of the lowest priority, then least recently used).
      now: as in `admit`; decides what is past its time-to-live.

    Returns:
      The cache, the index, and the pages freed; fewer than asked for where no more could go. Among groups the fewest.

    Raises:
      ValueError, TypeError: an argument's type or range is wrong, or the index belongs to another config.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([8, 0]), num_tokens=8)
      >>> cache, index = prefix.publish(cache, prefix.init(config), 0, list(range(8)))
      >>> prefix.evict(cache, index, 1)[2]                          # the row uses both pages
      0
      >>> cache = paxcache.release(cache, jnp.array([True, False]))
      >>> cache, index, num_freed = prefix.evict(cache, index, 1)
      >>> num_freed, prefix.match(index, list(range(8))).num_tokens
      (1, 4)

    Reference: leaf-first LRU of SGLang's RadixAttention (Zheng et al., 2024); SLRU of Karedla et al. (1994).
    """
    _check_cache(cache, index)
    num_pages = _checks.static_int("num_pages", num_pages, minimum=0)
    cache, index, freed, _ = _evict(cache, index, [num_pages] * len(cache.groups), policy, now)
    return cache, index, min(freed)


def evictable(cache: PagedKVCache, index: Index) -> tuple[int, ...]:
    """The pages that `evict` could free now, in each group. Changes nothing; looks at all entries.

    Args:
      cache: the cache.
      index: the index.

    Returns:
      A number for each group.

    Raises:
      ValueError, TypeError: the index is not this cache's, or the cache is traced.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([8, 0]), num_tokens=8)
      >>> cache, index = prefix.publish(cache, prefix.init(config), 0, list(range(8)))
      >>> prefix.evictable(cache, index), prefix.evictable(paxcache.release(cache, jnp.array([True, False])), index)
      ((0,), (2,))
    """
    _check_cache(cache, index)
    dropped, _ = _take(Draft(index), _integers.read_counts(cache), list(index.num_pages), "lru")
    return tuple(map(len, dropped))


def make_room(
    cache: PagedKVCache,
    index: Index,
    query_lens: Int32[Array, "B"],
    *,
    num_tokens: int | None = None,
    max_query_len: int | None = None,
    policy: Policy = "lru",
    now: float | None = None,
) -> tuple[PagedKVCache, Index, int]:
    """Evicts exactly the pages that `extend` with the same arguments would lack.

    Args:
      cache: the cache.
      index: the index.
      query_lens, num_tokens, max_query_len: those of the `extend` to come.
      policy, now: as in `evict`.

    Returns:
      The cache, the index, and the pages freed in the group that gave most, 0 where nothing lacked.

    Raises:
      ValueError, TypeError: an argument's type, shape or range is wrong, or the index belongs to another config.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=3,
      ...                               max_seqs=1, max_pages_per_seq=3)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([8]), num_tokens=8)
      >>> cache, index = prefix.publish(cache, prefix.init(config), 0, list(range(8)))
      >>> cache = paxcache.release(cache, jnp.array([True]))
      >>> cache, index, num_freed = prefix.make_room(cache, index, jnp.array([8]), num_tokens=8)   # one page is free
      >>> num_freed
      1
    """
    _check_cache(cache, index)
    missing = _integers.shortfall(cache, query_lens, num_tokens=num_tokens, max_query_len=max_query_len)
    cache, index, freed, _ = _evict(cache, index, np.asarray(missing).tolist(), policy, now)
    return cache, index, max(freed)


def _evict(
    cache: PagedKVCache, index: Index, needs: list[int], policy: Policy, now: float | None
) -> tuple[PagedKVCache, Index, list[int], list[Gone]]:
    """As `evict`, with a number of pages for each group; also tells which pages of which nodes went, in order."""
    draft = Draft(index)
    _set_time(draft, now)
    for order in _policy.orders(policy):
        draft.add_order(order)
    if not any(needs):
        return cache, draft.done(), [0] * len(needs), []
    dropped, gone = _take(draft, _integers.read_counts(cache), needs, policy)
    cache = _integers.add_references(cache, dropped, -1, draft.holdings)
    return cache, draft.done(), list(map(len, dropped)), gone


def _take(
    draft: Draft, counts: list[Int32[np.ndarray, "P"]], needs: list[int], policy: Policy
) -> tuple[list[list[int]], list[Gone]]:
    """Takes pages from the index's entries until each group has what it needs; by group, which they are."""
    for order in _policy.orders(policy):
        draft.add_order(order)
    windowed = [window is not None for window in draft.windows]
    in_use = [c > 1 for c in counts]
    gone: list[Gone] = []
    freed = [0] * len(needs)
    if all(windowed):  # what is spare goes before whole entries
        lacking = list(needs)
        gone += draft.thin(lacking, in_use, tails=False)
        freed = [need - left for need, left in zip(needs, lacking, strict=True)]
    goals = [need if all(windowed) or not w else 0 for need, w in zip(needs, windowed, strict=True)]
    gone += _cut_leaves(draft, in_use, goals, freed, policy)
    lacking = [max(need - n, 0) for need, n in zip(needs, freed, strict=True)]
    if any(windowed) and not all(windowed) and any(lacking):
        gone += draft.thin(lacking, in_use, tails=True)
    dropped: list[list[int]] = [[] for _ in needs]
    if gone:
        draft.let_go(b"".join([g.keys for g in gone]), np.concatenate([g.ids for g in gone]), dropped)
    return dropped, gone


def _cut_leaves(
    draft: Draft, in_use: list[Bool[np.ndarray, "P"]], goals: list[int], freed: list[int], policy: Policy
) -> list[Gone]:
    """Cuts leaves until so many pages of each group are free; adds to `freed`."""
    # As bytes, which answer quickly; the last one is for NO_PAGE.
    used = [mine.tobytes() + b"\0" for mine in in_use]
    row = struct.Struct(f"<{len(goals)}i")  # of `Run.ids`
    gone: list[tuple[Node, int]] = []
    victims = draft.victims(policy)
    leaf = next(victims) if any(goals) else None
    while leaf and (lacking := max(map(operator.sub, goals, freed))) > 0:
        most = min(lacking, leaf.end - leaf.youngest) if _policy.by_age(policy) else lacking
        pages = _drop_tail(leaf, row, used, most, freed)
        if pages:
            gone.append((leaf, pages))
        leaf = victims.send(pages)
    draft.cut(gone)
    draft.count_evicted(gone)
    return [
        Gone(leaf, tuple(range(leaf.end - pages, leaf.end)), leaf.run.table[leaf.end - pages : leaf.end])
        for leaf, pages in gone
    ]


def _drop_tail(leaf: Node, row: struct.Struct, in_use: list[bytes], most: int, freed: list[int]) -> int:
    """How many of a leaf's last pages nobody uses, of at most so many; adds them to `freed` by group."""
    begin = max(leaf.end - most, leaf.start)
    for page in range(leaf.end - 1, begin - 1, -1):
        own = row.unpack_from(leaf.run.ids, page * row.size)
        for g, number in enumerate(own):
            if in_use[g][number]:
                return leaf.end - 1 - page
        for g, number in enumerate(own):
            freed[g] += number != NO_PAGE
    return leaf.end - begin


def reset(cache: PagedKVCache, index: Index) -> tuple[PagedKVCache, Index]:
    """Forgets everything, pinned prefixes too. Pages that rows use stay with the rows.

    Args:
      cache: the cache.
      index: the index.

    Returns:
      The cache, and an index without entries and pins; counters, epoch and the log of events go on.

    Raises:
      ValueError, TypeError: the index belongs to another config, or the cache is traced.
    """
    _check_cache(cache, index)
    draft = Draft(index)
    pages = [np.flatnonzero(h).tolist() for h in held(index)]
    draft.clear()
    if draft.recording:
        draft.record(_index.Cleared())
    return _integers.add_references(cache, pages, -1, 0), draft.done()


def held(index: Index) -> tuple[Int32[np.ndarray, "P"], ...]:
    """The references that the index holds, for ``paxcache.check(cache, held=prefix.held(index))``.

    Args:
      index: the index.

    Returns:
      For each group, i32[P]: 1 for a page that an entry holds, else 0.

    Raises:
      TypeError: index is no `Index`.
    """
    _check_index(index)
    return tuple(held.astype(np.int32) for held in index.held)


def new_epoch(index: Index, epoch: int | None = None) -> Index:
    """Tells the index that the model's weights changed: no page stored before is ever matched again.

    They are evicted before all others, under every policy, and pins on them are gone. Rows that were admitted before
    offer nothing any more, and neither do those that `fork` and `reorder` make from them: a cache keeps, with each row,
    the epoch in which it was begun. After the first change, rows that were never admitted offer nothing either.
    Stable keys contain the epoch: processes that share storage must agree on it.

    Args:
      index: the index.
      epoch: the new version, higher than the one before and below 2**31 - 1, such as the training step; None: the next.

    Returns:
      The index.

    Raises:
      ValueError, TypeError: the epoch is not higher, too high, or no int.

    Example:
      >>> import paxcache
      >>> from paxcache import prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> prefix.new_epoch(prefix.init(config), 100).epoch
      100
    """
    _check_index(index)
    draft = Draft(index)
    low = index.epoch + 1
    draft.epoch = _check_epoch(low if epoch is None else epoch, minimum=low)
    for node_id, _ in _tree.items(index.pins):
        draft.set_pin(node_id, 0)
    return draft.done()


@dataclasses.dataclass(frozen=True)
class Pin:
    """A prefix that stays, made by `pin`."""

    num_tokens: int
    """How many tokens were stored when it was made: those are pinned."""
    node: int
    """Opaque."""


def pin(
    index: Index, tokens: Int[np.ndarray, "N"] | Sequence[int], *, extra_key: ExtraKey | Salt = None
) -> tuple[Index, Pin]:
    """Keeps the stored full pages of a prefix from being evicted, until `unpin`, `reset` or `new_epoch`.

    Args:
      index: the index.
      tokens, extra_key: as in `match`.

    Returns:
      The index, and a `Pin`. A prefix may be pinned many times; each pin counts.

    Raises:
      ValueError, TypeError: an argument's type or shape is wrong.
    """
    _check_index(index)
    draft = Draft(index)
    path = _index.walk(draft, _prompt(draft, tokens, extra_key)).path
    if not path:
        return index, Pin(0, 0)
    node, pages = path[-1]
    kept = draft.split(node, pages) if pages < node.size else node
    draft.set_pin(kept.id, (_tree.get(draft.pins, kept.id) or 0) + 1)
    return draft.done(), Pin(sum(count for _, count in path) * index.page_size, kept.id)


def unpin(index: Index, pin: Pin) -> Index:
    """Undoes one `pin`. A pin that `reset` or `new_epoch` undid already is left alone.

    Args:
      index: the index.
      pin: from `pin`, to be undone once.

    Returns:
      The index.

    Raises:
      TypeError: index is no `Index`, or pin no `Pin`.
    """
    _check_index(index)
    _checks.instance("pin", pin, Pin, source="prefix.pin")
    times = _tree.get(index.pins, pin.node)
    if times is None:
        return index
    draft = Draft(index)
    draft.set_pin(pin.node, times - 1)
    return draft.done()


def take_events(index: Index) -> tuple[Index, tuple[Event, ...]]:
    """The events since they were last taken, in order: `Stored`, `Removed` and `Cleared`.

    Args:
      index: the index, made with ``init(events=True)``; another logs none.

    Returns:
      The index without them, and the events.

    Raises:
      TypeError: index is no `Index`.

    Reference: KV cache events of vLLM.
    """
    _check_index(index)
    events, log = [], index.log
    while log is not None:
        event, log = log
        events.append(event)
    return dataclasses.replace(index, log=None), tuple(reversed(events))


def _check_index(index: Index) -> None:
    _checks.instance("index", index, Index, source="prefix.init")


def _check_cache(cache: PagedKVCache, index: Index) -> None:
    _checks.instance("cache", cache, PagedKVCache)
    _check_index(index)
    if isinstance(cache.seq_lens, Tracer):
        raise TypeError("the host index reads the cache on the host; inside jit use paxcache.prefix.device")
    sizes = (cache.page_size, cache.max_pages_per_seq, tuple(g.ref_counts.shape[0] for g in cache.groups))
    expected = (index.page_size, index.max_pages, index.num_pages)
    windows = tuple(g.sliding_window for g in cache.groups)
    if sizes != expected or windows != index.windows:
        raise ValueError(
            "index: made for another config: (page_size, max_pages_per_seq, num_pages) is "
            f"{expected} with windows {index.windows}, the cache's {sizes} with {windows}"
        )
    if index.holdings and _integers.read_holdings(cache) not in (None, index.holdings):
        raise ValueError(
            "index: the pages it holds are not this cache's: either is of another run, or older than the other. Go on "
            "with the cache and the index that the last call returned"
        )


def _check_rows(
    cache: PagedKVCache, index: Index, rows: Any, prompts: Any, extra_keys: Any
) -> tuple[list[int], list[Any]]:
    _check_cache(cache, index)
    for name, values in (("rows", rows), ("prompts", prompts)):
        _check_list(name, values)
    rows = [_checks.static_int("row", row, minimum=0) for row in rows]
    if rows and max(rows) >= cache.max_seqs:
        raise ValueError(f"row: must be below {cache.max_seqs}, got {max(rows)}")
    if len(set(rows)) < len(rows):
        raise ValueError(f"rows: expected different rows, got {rows}")
    extra_keys = [None] * len(rows) if extra_keys is None else _check_list("extra_keys", extra_keys)
    for name, values in (("prompts", prompts), ("extra_keys", extra_keys)):
        if len(values) != len(rows):
            raise ValueError(f"{name}: expected one for each of {len(rows)} rows, got {len(values)}")
    return rows, extra_keys


def _check_list(name: str, values: Any) -> Any:
    """A list or what serves as one."""
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    if not is_list and getattr(values, "ndim", 0) < 1:
        raise TypeError(f"{name}: expected a sequence, got {_checks.describe(values)}")
    return values


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number or None, got {_checks.describe(value)}")


def _set_time(draft: Draft, now: float | None) -> None:
    if now is not None:
        _check_number("now", now)
        if not now >= draft.now or now == math.inf:
            raise ValueError(f"now: expected a finite time, {draft.now} or later, got {now}")
        draft.now = float(now)
