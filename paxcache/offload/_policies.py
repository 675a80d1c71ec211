"""A prefix index with a host tier below it: write-back, write-through, prefetch.

A tier does not know the index and the index does not know it: a page may lie on the device, on the host, or on both,
calls of `prefix` stay as they are, and whatever becomes of an index, no host memory is lost. There is no page in
flight: a copy out is read from a version of the pools that nobody changes, a page that comes in is stored in the index
together with the pools that it was written to, and a block on the host is written once. Data dependencies order the
transfers; there are no flags.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paxcache import _checks
from paxcache._types import NO_PAGE, PagedKVCache, Pages
from paxcache.offload import _pages, _tier
from paxcache.offload._tier import HostTier
from paxcache.prefix import _host, _index, _integers, _keys, _policy, _tree
from paxcache.prefix._index import Index, Node

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jaxtyping import Array, Bool, Int, Int32

    from paxcache.offload._tier import Item, Slots
    from paxcache.ops import Implementation
    from paxcache.prefix._keys import ExtraKey, Prompt, Salt
    from paxcache.prefix._policy import Policy
    from paxcache.prefix._tree import Tree

_DIRECT_BYTES = 2**21
"""A block of fewer bytes goes to the device together with others: it is not worth a transfer of its own."""


def _check(cache: PagedKVCache, index: Index, tier: HostTier) -> None:
    _host._check_cache(cache, index)
    _check_stores(index, tier)
    if _pages.shapes_of(_pages.pages_of(cache)) != tier.shapes:
        raise ValueError("tier: made for another config: its pages have other shapes than the cache's")


def _check_stores(index: Index, tier: HostTier) -> None:
    _checks.instance("index", index, Index, source="prefix.init")
    _checks.instance("tier", tier, HostTier, source="offload.init_tier")
    if len(index.windows) != len(tier.capacity):
        raise ValueError(
            f"tier: expected one of {len(index.windows)} groups like index, got one of {len(tier.capacity)}"
        )


def _check_eviction(index: Index, policy: Policy, now: float | None) -> None:
    if not isinstance(policy, str):
        raise TypeError(f"policy: expected a name, got {_checks.describe(policy)}")
    _policy.orders(policy)
    _check_time(index, now)


def _check_time(index: Index, now: float | None) -> None:
    """A time that is not before the index's, whether it is needed or not."""
    if now is None:
        return
    if isinstance(now, bool) or not isinstance(now, (int, float, np.number)):
        raise TypeError(f"now: expected a time, got {_checks.describe(now)}")
    if not index.now <= now < math.inf:
        raise ValueError(f"now: expected a finite time, {index.now} or later, got {now}")


def _check_list(name: str, values: Any) -> Sequence[Any]:
    """A list of whatever it is to hold."""
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: expected a list, got {_checks.describe(values)}")
    return values


def _pages_of(node: Node, pages: Iterable[int]) -> Iterable[Item]:
    """A run's pages, given by their places in it."""
    run, table, size = node.run, node.run.table, _keys.KEY_BYTES
    for page in pages:
        yield run.keys[page * size : (page + 1) * size], table[page]


# Write policies.


def evict(
    cache: PagedKVCache,
    index: Index,
    tier: HostTier,
    num_pages: int,
    *,
    policy: Policy = "lru",
    now: float | None = None,
    implementation: Implementation = None,
) -> tuple[PagedKVCache, Index, HostTier, int]:
    """As `prefix.evict`, and what goes from the device is kept on the host: write-back.

    Pages that are there already are not copied again. The others are copied by one gather and one transfer a leaf (of
    at most ``block_bytes``) for the whole call, so one call that frees many pages is quicker than many that free one.
    For room, the host forgets what was used least recently. Pages of earlier epochs are not kept.

    Args:
      cache: the cache.
      index: the index.
      tier: the host tier.
      num_pages, policy, now: as in `prefix.evict`.
      implementation: backend of the gather, see `paxcache.ops`.

    Returns:
      The cache, the index, the tier, and the pages freed on the device.

    Raises:
      ValueError, TypeError: an argument's type or range is wrong, or index or tier belong to another config.

    Example: see `init_tier`.

    Reference: the write-back policy of SGLang's HiCache and of FastDeploy's cache manager.
    """
    _check(cache, index, tier)
    _check_eviction(index, policy, now)
    num_pages = _checks.static_int("num_pages", num_pages, minimum=0)
    needs = [num_pages] * len(cache.groups)
    cache, index, tier, freed = _evict(cache, index, tier, needs, policy, now, implementation)
    return cache, index, tier, min(freed)


def make_room(
    cache: PagedKVCache,
    index: Index,
    tier: HostTier,
    query_lens: Int32[Array, "B"],
    *,
    num_tokens: int | None = None,
    max_query_len: int | None = None,
    policy: Policy = "lru",
    now: float | None = None,
    implementation: Implementation = None,
) -> tuple[PagedKVCache, Index, HostTier, int]:
    """As `prefix.make_room`, and what goes from the device is kept on the host, as by `evict`.

    Args:
      cache: the cache.
      index: the index.
      tier: the host tier.
      query_lens, num_tokens, max_query_len: those of the `extend` to come.
      policy, now, implementation: as in `evict`.

    Returns:
      The cache, the index, the tier, and the pages freed on the device, 0 where nothing lacked.

    Raises:
      ValueError, TypeError: as in `evict`.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload, prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=3,
      ...                               max_seqs=1, max_pages_per_seq=3)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([8]), num_tokens=8)
      >>> cache, index = prefix.publish(cache, prefix.init(config), 0, range(8))
      >>> cache, tier = paxcache.release(cache, jnp.array([True])), offload.init_tier(config, 100)
      >>> cache, index, tier, num_freed = offload.make_room(cache, index, tier, jnp.array([8]), num_tokens=8)
      >>> num_freed, tier.num_pages, offload.match(index, tier, range(12))
      (1, (1,), 8)
    """
    _check(cache, index, tier)
    _check_eviction(index, policy, now)
    missing = _integers.shortfall(cache, query_lens, num_tokens=num_tokens, max_query_len=max_query_len)
    needs = np.asarray(missing).tolist()
    cache, index, tier, freed = _evict(cache, index, tier, needs, policy, now, implementation)
    return cache, index, tier, max(freed)


def _evict(cache, index, tier, needs, policy, now, implementation):
    left, index, freed, gone = _host._evict(cache, index, needs, policy, now)
    items = (
        item
        for some in gone
        if some.node.epoch == index.epoch
        for item in zip(reversed(_keys.split_keys(some.keys)), reversed(some.ids), strict=True)
    )
    return left, index, _tier.store(cache, tier, items, index.epoch, implementation), freed


def write_through(
    cache: PagedKVCache,
    index: Index,
    tier: HostTier,
    prompts: Sequence[Int[np.ndarray, "N"] | Sequence[int]],
    *,
    extra_keys: Sequence[ExtraKey | Salt] | None = None,
    min_hits: int = 0,
    implementation: Implementation = None,
) -> HostTier:
    """Copies the stored pages of prompts to the host, where they are not there yet. They stay on the device too.

    To be called after `prefix.publish`. Evicting them then costs no transfer, by `offload.evict`, which also notes that
    they were used, or by `prefix.evict`, which keeps nothing that was not written through.

    Args:
      cache: the cache.
      index: the index.
      tier: the host tier.
      prompts: the tokens of each prompt, as in `prefix.publish_rows`.
      extra_keys: an extra key for each; None: none.
      min_hits: copies only pages that `prefix.admit` has handed out so many times.
      implementation: as in `evict`.

    Returns:
      The tier. All that fits it is there: the first pages of each prompt before later ones.

    Raises:
      ValueError, TypeError: an argument's type, shape or range is wrong, or index or tier belong to another config.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload, prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([8, 0]), num_tokens=8)
      >>> cache, index = prefix.publish(cache, prefix.init(config), 0, range(8))
      >>> tier = offload.init_tier(config, 100)
      >>> offload.write_through(cache, index, tier, [range(8)]).num_pages
      (2,)
      >>> offload.write_through(cache, index, tier, [range(8)], min_hits=1).num_pages   # nobody reused them yet
      (0,)

    Reference: write-through and write-through-selective of SGLang's HiCache and of FastDeploy's cache manager.
    """
    _check(cache, index, tier)
    min_hits = _checks.static_int("min_hits", min_hits, minimum=0)
    prompts = _check_list("prompts", prompts)
    extra_keys = [None] * len(prompts) if extra_keys is None else _check_list("extra_keys", extra_keys)
    if len(extra_keys) != len(prompts):
        raise ValueError(
            f"extra_keys: expected one for each of {len(prompts)} prompts, got {len(extra_keys)}"
        )
    items: list[Item] = []
    draft = _tier.Draft(tier)
    for tokens, extra_key in zip(prompts, extra_keys, strict=True):
        path = _index.walk(index, _host._prompt(index, tokens, extra_key)).path
        mine = [
            item
            for node, count in reversed(path)
            if node.hits >= min_hits
            for item in _pages_of(node, reversed(range(node.start, node.start + count)))
        ]
        # Where nothing is missing, nothing is younger than it should be.
        if any(_tier.missing_groups(ids, draft.slots(key)) for key, ids in mine):
            items += mine
    return _tier.store(cache, tier, items, index.epoch, implementation)


# The way back.


class _Found(NamedTuple):
    """The pages of a prompt that are on the device, followed by those that are on the host."""

    num_device: int
    """Pages that the index has."""
    device_len: int
    """Tokens that `admit` would reuse, full pages alone."""
    keys: list[bytes]
    """Stable keys of all pages."""
    ids: Int32[np.ndarray, "N G"]
    """On the device; NO_PAGE where it is not there."""
    slots: list[Slots]
    """On the host; None where it is not there, or not needed."""

    @property
    def on_host(self) -> Bool[np.ndarray, "N G"]:
        """Which pages are on the host."""
        return np.array([[slot is not None for slot in slots] for slots in self.slots], bool).reshape(
            self.ids.shape
        )


def _find(index: Index, tier: HostTier, prompt: Prompt) -> _Found:
    S, G, draft = index.page_size, len(index.windows), _tier.Draft(tier)
    none: Slots = (None,) * G
    path = _index.walk(index, prompt).path
    most = min(prompt.num_pages, index.max_pages)
    ids = _host._ids(index, path)[:most]
    num_device = len(ids)
    size = _keys.KEY_BYTES
    keys = b"".join(
        node.run.keys[node.start * size : (node.start + count) * size]
        for node, count in _index.cut_path(path, num_device)
    )
    keys = list(_keys.split_keys(keys))
    device_len = _host._within_windows(index, ids, min(num_device * S, max(prompt.num_tokens - 1, 0)))

    # What a window gave back on the device may be on the host, and a longer prefix needs nothing that is left of it.
    slots: list[Slots] = [none] * num_device
    windows = [window for window in index.windows if window is not None]
    first = min((max(device_len - window + 1, 0) // S for window in windows), default=num_device)
    for page in range(first, num_device):
        if (ids[page] == NO_PAGE).any():
            slots[page] = draft.slots(keys[page])

    for page in range(num_device, most):
        parent = keys[-1] if keys else _keys.root_key(prompt)
        key = _keys.chain(prompt._replace(num_tokens=(page + 1) * S), page, parent)
        entry = _tree.get(tier.entries, key)
        if entry is None or any(
            s is None and w is None for s, w in zip(entry.slots, index.windows, strict=True)
        ):
            break
        keys.append(key)
        slots.append(entry.slots)
    on_host = np.full((len(keys) - num_device, G), NO_PAGE, np.int32)
    return _Found(num_device, device_len, keys, np.concatenate([ids, on_host]), slots)


def _needed(
    index: Index, prompt: Prompt, found: _Found, most: int | float
) -> tuple[int, Bool[np.ndarray, "N G"]]:
    """Tokens that `admit` reuses once at most so many more pages are stored, and which pages must come in for that."""
    S, pages = index.page_size, int(min(len(found.keys), found.num_device + most))
    on_host = found.on_host
    need = on_host & (found.ids == NO_PAGE)
    have = np.where(on_host, 0, found.ids)[:pages]
    length = _host._within_windows(index, have, min(pages * S, max(prompt.num_tokens - 1, 0)))
    need[-(-length // S) :] = False
    for g, window in enumerate(index.windows):
        if window is not None:
            need[: max(length - window + 1, 0) // S, g] = False
    if length <= found.device_len:
        return found.device_len, np.zeros_like(need)
    return length, need


def match(
    index: Index,
    tier: HostTier,
    tokens: Int[np.ndarray, "N"] | Sequence[int],
    *,
    extra_key: ExtraKey | Salt = None,
) -> int:
    """Tokens of a prompt that `prefix.admit` can reuse once `prefetch` has brought in what is on the host.

    Reads index and tier alone. `prefix.match` tells how much of it is on the device now. On the host full pages count,
    by their stable keys.

    Args:
      index: the index.
      tier: the host tier.
      tokens, extra_key: as in `prefix.match`.

    Returns:
      The number of tokens. At least one is left to compute.

    Raises:
      ValueError, TypeError: an argument's type or shape is wrong.

    Example: see `make_room`.
    """
    _check_stores(index, tier)
    prompt = _host._prompt(index, tokens, extra_key)
    here = _host._match(index, prompt, limit=max(prompt.num_tokens - 1, 0), partial=True)
    return max(here.num_tokens, _needed(index, prompt, _find(index, tier, prompt), math.inf)[0])


def prefetch(
    cache: PagedKVCache,
    index: Index,
    tier: HostTier,
    tokens: Int[np.ndarray, "N"] | Sequence[int],
    *,
    extra_key: ExtraKey | Salt = None,
    max_pages: int | None = None,
    policy: Policy | None = None,
    now: float | None = None,
    donate: bool = False,
    implementation: Implementation = None,
) -> tuple[PagedKVCache, Index, HostTier, int]:
    """Brings the pages of a prompt from the host to the device and stores them in the index, for `admit` to find.

    Pages go into free ones, as many as there are, first to last: each is of use without those that follow. Where a
    group with a sliding window has too few for all that it lacks, none come. The host keeps its copies, so that
    evicting the pages again costs no transfer. Pages inherit priority and time-to-live of the page before them.

    What uses the cache next waits for the transfers: split long ones by `max_pages`. Pools that pages come into are
    committed to their device from then on, and programs compiled for others are compiled anew, once; a cache that was
    put there by ``jax.device_put(cache, device)`` at the start is spared that.

    Args:
      cache: the cache.
      index: the index.
      tier: the host tier.
      tokens, extra_key: the prompt, as in `prefix.admit`.
      max_pages: pages of the prompt to bring in at most; None: all. Call again for more.
      policy: evicts by this policy, as `offload.evict` does, what lacks in free pages; the prompt's own pages stay.
        None: evicts nothing.
      now: as in `prefix.evict`.
      donate: writes into the pools in place. The cache that was given is gone then, as with an argument that `jax.jit`
        donates. If not, pools that take pages are copied.
      implementation: backend of gather and scatter, see `paxcache.ops`.

    Returns:
      The cache, the index, the tier, and the pages of the prompt that came in, 0 where there was nothing to bring.

    Raises:
      ValueError, TypeError: an argument's type, shape or range is wrong, or index or tier belong to another config.

    Example: see `init_tier`.

    Reference: loading back of SGLang's HiCache; FastDeploy's prefetch before scheduling.
    """
    _check(cache, index, tier)
    if policy is None:
        _check_time(index, now)
    else:
        _check_eviction(index, policy, now)
    donate = _pages.flag("donate", donate)
    most = math.inf if max_pages is None else _checks.static_int("max_pages", max_pages, minimum=0)
    prompt = _host._prompt(index, tokens, extra_key)
    found, blocks = _find(index, tier, prompt), tier.blocks  # they stay, whatever the host forgets below
    _, need = _needed(index, prompt, found, most)
    if most == 0 or not need.any():
        return cache, index, tier, 0
    tier = _used(tier, found, index.epoch)
    free = _free_pages(cache)
    lacking = [max(int(n) - len(f), 0) for n, f in zip(need.sum(axis=0), free, strict=True)]
    if any(lacking) and policy is not None:
        pinned, mark = _host.pin(index, tokens, extra_key=extra_key)
        cache, index, tier, _ = _evict(cache, pinned, tier, lacking, policy, now, implementation)
        index, free = _host.unpin(index, mark), _free_pages(cache)
    for window, pages in zip(index.windows, free, strict=True):
        most = min(most, len(pages)) if window is None else most
    length, need = _needed(index, prompt, found, most)
    if not need.any() or any(n > len(f) for n, f in zip(need.sum(axis=0), free, strict=True)):
        return cache, index, tier, 0

    tier_draft = _tier.Draft(tier)
    table = np.full((-(-length // index.page_size), len(free)), NO_PAGE, np.int32)
    pools = []
    for g, group in enumerate(cache.groups):
        pages = np.flatnonzero(need[:, g])
        table[pages, g] = free[g][: len(pages)]
        moves = [(found.slots[page][g], int(table[page, g])) for page in pages]
        owned, pool = donate, group.pages
        for ids, block in _transfers(tier_draft, g, blocks, moves, group.ref_counts.shape[0]):
            copy = _pages.copy_in_place if owned else _pages.copy_in
            (pool,), owned = copy((pool,), (ids,), (block,), implementation), True
        tier_draft.moved["pages_read"] += len(pages)
        pools.append(pool)

    draft = _index.Draft(index)
    _host._set_time(draft, now)
    worth = {"priority": 0, "expires": math.inf}
    if found.num_device:
        path = _index.cut_path(_index.walk(index, prompt).path, found.num_device)
        worth = {name: getattr(path[-1][0], name) for name in worth}
    taken: list[list[int]] = [[] for _ in cache.groups]
    stored = prompt._replace(num_tokens=len(table) * index.page_size)
    _host._publish(draft, stored, table, taken, worth, extra_key)
    cache = _integers.add_references(_pages.with_pages(cache, tuple(pools)), taken, 1, draft.holdings)
    return cache, draft.done(), tier_draft.done(), int(need.any(axis=1).sum())


def _free_pages(cache: PagedKVCache) -> list[Int[np.ndarray, "N"]]:
    """By group, the free pages: one transfer to the host."""
    return [np.flatnonzero(counts == 0) for counts in _integers.read_counts(cache)]


def _used(tier: HostTier, found: _Found, epoch: int) -> HostTier:
    """The tier with what the device lacks of a prompt used last, its first page most of all."""
    draft = _tier.Draft(tier)
    for page, key in reversed(list(enumerate(found.keys))):
        if page >= found.num_device or any(found.slots[page]):
            draft.use(key, epoch)
    return draft.done()


def _transfers(
    draft: _tier.Draft, g: int, blocks: Tree, moves: list[tuple[Any, int]], num_pages: int
) -> Iterable[tuple[Int32[np.ndarray, "N"], Pages]]:
    """Where the pages of blocks go, num_pages for none, for (slot, page) of one group.

    A large block that is mostly wanted is read where it lies; what is wanted of the others is joined first.
    """
    by_block: dict[int, list[tuple[int, int]]] = {}
    for (number, place), page in moves:
        by_block.setdefault(number, []).append((place, page))
    rest: list[tuple[Pages, int, int]] = []
    for number, wanted in by_block.items():
        block = _tree.get(blocks, number)
        large = len(by_block) == 1 or block.size * draft.page_bytes[g] >= _DIRECT_BYTES
        if large and 2 * len(wanted) >= block.size:
            ids = np.full(block.size, num_pages, np.int32)
            ids[[place for place, _ in wanted]] = [page for _, page in wanted]
            yield ids, block.pages
        else:
            rest += [(block.pages, place, page) for place, page in wanted]
    at = 0
    for size in draft.sizes(g, len(rest)):
        some = rest[at : at + size]
        ids = np.full(size, num_pages, np.int32)
        ids[: len(some)] = [page for _, _, page in some]
        yield ids, _tier.gathered([(pages, place) for pages, place, _ in some], size)
        at += size
