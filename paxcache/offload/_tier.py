"""Pages on the host by stable key, as a value: what a tier holds, takes in and forgets.

Host memory comes in blocks, one for each transfer. A block's memory returns when none of its pages can be found any
more. Blocks under half used are joined when pages are forgotten, so that the tier never holds more memory than its
capacity, padding included, and at least half of what it holds, padding aside, are pages that can be found.

Pages are forgotten least recently used first. A page leaves the device after those that follow it, and every use of a
page on the host uses those before it, so a page is younger than those that follow it and is forgotten after them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from paxcache import _cache, _checks
from paxcache._types import NO_PAGE, CacheConfig, PagedKVCache, Pages
from paxcache.offload import _pages
from paxcache.prefix import _tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jaxtyping import Int32

    from paxcache.ops import Implementation
    from paxcache.prefix._tree import Tree

_BLOCK_BYTES = 2**26
_MOST_UNDER_WAY = 2  # blocks that take room on the device while they leave it

type Item = tuple[bytes, Int32[np.ndarray, "G"]]
"""A page to store: its key, and where it lies on the device in each group."""


type Slots = tuple[tuple[int, int] | None, ...]
"""Where copies of a page are, by group: the block's number and the place in it; None where there is none."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a tier has done since `init_tier`, in pages of single groups."""

    pages_written: int = 0
    """Copied to the host."""
    pages_read: int = 0
    """Copied back to the device."""
    pages_forgotten: int = 0
    pages_joined: int = 0
    """Copied within the host, out of blocks that were mostly forgotten."""


class _Block(NamedTuple):
    """The host memory of one transfer."""

    group: int
    pages: Pages
    """Leaves [N, L, ...]."""
    keys: tuple[bytes, ...]
    """Whose pages they are, or were; N or fewer."""
    num_live: int
    """How many of them can still be found."""

    @property
    def size(self) -> int:
        return jax.tree.leaves(self.pages)[0].shape[0]

    @property
    def is_sparse(self) -> bool:
        return 2 * self.num_live < self.size


class _Entry(NamedTuple):
    """A page that can be found. It is in the order of forgetting under (epoch, tick)."""

    epoch: int
    tick: int
    slots: Slots
    """None where a sliding window had given the page back."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class HostTier:
    """Pages on the host as a value, made by `init_tier`. No function changes it; old versions keep their memory."""

    capacity: tuple[int, ...]
    """By group, the most pages that it has memory for."""
    num_pages: tuple[int, ...]
    """By group, the pages that can be found. Nothing pins a page on the host: all of them can make way for others."""
    reserved: tuple[int, ...]
    """By group, the pages that it has memory for now, padding and forgotten ones included."""
    page_bytes: tuple[int, ...]
    """By group, the bytes of a page."""
    traffic: Traffic
    memory_kind: str
    block_bytes: int
    shapes: tuple[tuple[Any, ...], ...]
    """By group, shape and dtype of a page's leaves."""
    tick: int
    next_block: int
    entries: Tree
    """By key."""
    order: Tree
    """By (epoch, tick), the key."""
    blocks: Tree
    """By number."""

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory that this version holds."""
        return sum(n * size for n, size in zip(self.reserved, self.page_bytes, strict=True))

    def __repr__(self) -> str:
        """Sizes alone."""
        return f"HostTier(capacity={self.capacity}, num_pages={self.num_pages}, num_bytes={self.num_bytes})"


def init_tier(
    config: CacheConfig,
    num_pages: int | tuple[int, ...],
    *,
    memory_kind: str = "pinned_host",
    block_bytes: int = _BLOCK_BYTES,
) -> HostTier:
    """An empty host tier for caches of a config. Reserves nothing: memory comes with the pages.

    Which calls are made is the write policy. Write-back: `offload.evict` and `offload.make_room` in place of those of
    `prefix`. Write-through: `write_through` after each `prefix.publish`; selective, with its `min_hits`. Either way
    `prefetch` before `prefix.admit` brings back what a prompt needs.

    Args:
      config: the cache's.
      num_pages: pages that it has memory for at most, in each group; or a tuple of one number a group.
      memory_kind: where they lie: "pinned_host", or "device".
      block_bytes: bytes that one transfer moves at most, and that it takes on the device meanwhile. Two are under way
        at a time: a call that copies more to the host waits for the first ones.

    Returns:
      A `HostTier`.

    Raises:
      ValueError, TypeError: an argument's type or range is wrong.
      NotImplementedError: the device has no such memory.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload, prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, index, tier = paxcache.init(config), prefix.init(config), offload.init_tier(config, 100)
      >>> cache, step = paxcache.extend(cache, jnp.array([8, 0]), num_tokens=8)   # append, attend
      >>> cache, index = prefix.publish(cache, index, 0, range(8))
      >>> cache = paxcache.release(cache, jnp.array([True, False]))
      >>> cache, index, tier, num_freed = offload.evict(cache, index, tier, 2)
      >>> num_freed, tier.num_pages, prefix.match(index, range(8)).num_tokens
      (2, (2,), 0)
      >>> cache, index, tier, num_fetched = offload.prefetch(cache, index, tier, range(9))
      >>> num_fetched, prefix.admit(cache, index, 0, range(9))[2]
      (2, 8)

    Reference: SGLang's HiCache; FastDeploy's cache manager; Mooncake (Qin et al., 2025).
    """
    _checks.instance("config", config, CacheConfig)
    capacity = _pages.by_group("num_pages", num_pages, len(config.layer_groups), minimum=0)
    _pages.space(memory_kind)
    shapes = _pages.shapes_of(_cache.page_shapes(config))
    none = (0,) * len(capacity)
    return HostTier(
        capacity=capacity,
        num_pages=none,
        reserved=none,
        page_bytes=tuple(sum(math.prod(s) * d.itemsize for s, d in group) for group in shapes),
        traffic=Traffic(),
        memory_kind=memory_kind,
        block_bytes=_checks.static_int("block_bytes", block_bytes, minimum=1),
        shapes=shapes,
        tick=0,
        next_block=0,
        entries=None,
        order=None,
        blocks=None,
    )


def remove(tier: HostTier, keys: Iterable[bytes]) -> tuple[HostTier, int]:
    """Forgets pages, whatever their age: those of a user who left, say. Keys that the tier does not know are ignored.

    A page is of use with all that come before it in its prompt alone: remove a prompt's last pages, or all of them.

    Args:
      tier: the tier.
      keys: stable keys of pages, see `prefix.page_keys`.

    Returns:
      The tier, and how many keys it knew.

    Raises:
      TypeError: tier is of another type, or a key is not bytes.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload, prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([8, 0]), num_tokens=8)
      >>> cache, index = prefix.publish(cache, prefix.init(config), 0, range(8))
      >>> tier = offload.write_through(cache, index, offload.init_tier(config, 100), [range(8)])
      >>> tier, num_removed = offload.remove(tier, prefix.page_keys(range(8), page_size=4)[1:])
      >>> num_removed, tier.num_pages
      (1, (1,))
    """
    _checks.instance("tier", tier, HostTier, source="offload.init_tier")
    if isinstance(keys, (bytes, str)) or not hasattr(keys, "__iter__"):
        raise TypeError(f"keys: expected a list of keys, got {_checks.describe(keys)}")
    draft, num_removed = Draft(tier), 0
    for key in dict.fromkeys(_check_key(key) for key in keys):
        if _tree.get(draft.entries, key) is not None:
            draft.forget(key)
            num_removed += 1
    draft.join()
    return draft.done(), num_removed


def _check_key(key: Any) -> bytes:
    if not isinstance(key, bytes):
        raise TypeError(f"keys: expected bytes, got {_checks.describe(key)}")
    return key


def clear(tier: HostTier) -> HostTier:
    """Forgets all pages. The capacity stays, and `traffic` goes on.

    Args:
      tier: the tier.

    Returns:
      The tier, empty. Its memory returns once no older version is held.

    Raises:
      TypeError: tier is of another type.
    """
    _checks.instance("tier", tier, HostTier, source="offload.init_tier")
    traffic = dataclasses.replace(
        tier.traffic, pages_forgotten=tier.traffic.pages_forgotten + sum(tier.num_pages)
    )
    none = (0,) * len(tier.capacity)
    return dataclasses.replace(
        tier, num_pages=none, reserved=none, traffic=traffic, entries=None, order=None, blocks=None
    )


# Versions of a tier.


class Draft:
    """A version of a tier in the making: its fields to assign to, thrown away after `done`."""

    capacity: tuple[int, ...]
    page_bytes: tuple[int, ...]
    traffic: Traffic
    memory_kind: str
    block_bytes: int
    tick: int
    next_block: int
    entries: Tree
    order: Tree
    blocks: Tree

    def __init__(self, tier: HostTier):
        vars(self).update(vars(tier))
        self.num_pages, self.reserved = list(tier.num_pages), list(tier.reserved)
        self.moved = dataclasses.asdict(tier.traffic)
        # What `join` would do: by group, the blocks under half used, their sizes' sum and that of their pages.
        self._sparse: list[dict[int, None]] = [{} for _ in self.capacity]
        self._sparse_size, self._sparse_live = [0] * len(self.capacity), [0] * len(self.capacity)

    def done(self) -> HostTier:
        """The new version."""
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(HostTier)}
        fields["num_pages"], fields["reserved"] = tuple(self.num_pages), tuple(self.reserved)
        fields["traffic"] = Traffic(**self.moved)
        return HostTier(**fields)

    def slots(self, key: bytes) -> Slots:
        """Where a key's pages are, by group."""
        entry = _tree.get(self.entries, key)
        return (None,) * len(self.capacity) if entry is None else entry.slots

    def use(self, key: bytes, epoch: int) -> None:
        """Makes a key the last to be forgotten, a new one too."""
        entry = _tree.get(self.entries, key)
        if entry is not None:
            self.order = _tree.remove(self.order, (entry.epoch, entry.tick))
        self.tick += 1
        slots = (None,) * len(self.capacity) if entry is None else entry.slots
        self.entries = _tree.put(self.entries, key, _Entry(epoch, self.tick, slots))
        self.order = _tree.put(self.order, (epoch, self.tick), key)

    def forget(self, key: bytes) -> None:
        """Forgets a key's pages."""
        entry = _tree.get(self.entries, key)
        self.entries = _tree.remove(self.entries, key)
        self.order = _tree.remove(self.order, (entry.epoch, entry.tick))
        for slot in filter(None, entry.slots):
            self._leave(slot[0])

    def _leave(self, number: int) -> None:
        """Notes that one page less of a block can be found."""
        block = _tree.get(self.blocks, number)
        g = block.group
        self.num_pages[g] -= 1
        self.moved["pages_forgotten"] += 1
        if block.is_sparse:
            self._sparse_size[g] -= block.size
            self._sparse_live[g] -= block.num_live
        block = block._replace(num_live=block.num_live - 1)
        if block.num_live == 0:
            self._sparse[g].pop(number, None)
            self._drop_block(number, block)
            return
        if block.is_sparse:
            self._sparse[g][number] = None
            self._sparse_size[g] += block.size
            self._sparse_live[g] += block.num_live
        self.blocks = _tree.put(self.blocks, number, block)

    def _drop_block(self, number: int, block: _Block) -> None:
        self.blocks = _tree.remove(self.blocks, number)
        self.reserved[block.group] -= block.size

    def sizes(self, g: int, num_pages: int) -> list[int]:
        """Sizes of the blocks that so many pages of a group take."""
        return _pages.pieces(num_pages, self.page_bytes[g], self.block_bytes)

    def fits(self, needs: Sequence[int]) -> bool:
        """Whether there is room for so many more pages of each group once sparse blocks are joined."""
        return all(
            self.reserved[g]
            - self._sparse_size[g]
            + sum(self.sizes(g, self._sparse_live[g]))
            + sum(self.sizes(g, need))
            <= self.capacity[g]
            for g, need in enumerate(needs)
        )

    def fits_alone(self, needs: Sequence[int]) -> bool:
        """Whether there would be room in an empty tier."""
        return all(sum(self.sizes(g, need)) <= self.capacity[g] for g, need in enumerate(needs))

    def add_block(self, g: int, pages: Pages, keys: Sequence[bytes]) -> None:
        """Takes in a block; its keys are known already."""
        number, self.next_block = self.next_block, self.next_block + 1
        block = _Block(g, pages, tuple(keys), len(keys))
        self.blocks = _tree.put(self.blocks, number, block)
        self.reserved[g] += block.size
        for place, key in enumerate(keys):
            entry = _tree.get(self.entries, key)
            slots = (*entry.slots[:g], (number, place), *entry.slots[g + 1 :])
            self.entries = _tree.put(self.entries, key, entry._replace(slots=slots))

    def join(self) -> None:
        """Copies what can be found out of blocks under half used, and drops those."""
        for g, numbers in enumerate(self._sparse):
            keys, pieces = [], []
            for number in numbers:
                block = _tree.get(self.blocks, number)
                for place, key in enumerate(block.keys):
                    if self.slots(key)[g] == (number, place):
                        keys.append(key)
                        pieces.append((block.pages, place))
                self._drop_block(number, block)
            at = 0
            for size in self.sizes(g, len(keys)):
                some = slice(at, at + size)
                places = jax.tree.map(lambda leaf: leaf.sharding, pieces[at][0])
                joined = gathered(pieces[some], size)
                with _pages.allocating(self.memory_kind, _pages.num_bytes_of(joined)):
                    pages = jax.device_put(joined, places)
                self.add_block(g, pages, keys[some])
                at += size
            self.moved["pages_joined"] += len(keys)
            numbers.clear()
        self._sparse_size, self._sparse_live = [0] * len(self.capacity), [0] * len(self.capacity)


def gathered(pieces: Sequence[tuple[Pages, int]], size: int) -> Pages:
    """Pages of many blocks as one, NumPy arrays [size, L, ...]. Waits for copies that are still under way."""
    leaves, structure = jax.tree.flatten(pieces[0][0])
    out = [np.zeros((size, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
    at = 0
    for _, run in itertools.groupby(pieces, key=lambda piece: id(piece[0])):
        (pages, *_), places = zip(*run, strict=True)
        for array, leaf in zip(out, jax.tree.leaves(pages), strict=True):
            np.take(np.asarray(leaf), places, axis=0, out=array[at : at + len(places)], mode="clip")
        at += len(places)
    return jax.tree.unflatten(structure, out)


def store(
    cache: PagedKVCache, tier: HostTier, items: Iterable[Item], epoch: int, implementation: Implementation
) -> HostTier:
    """Copies pages to the host that are not there yet, the last of them to be forgotten last.

    Makes room by forgetting others; where not all fit an empty tier, the first of them stay out.
    """
    wanted: dict[bytes, Int32[np.ndarray, "G"]] = {}
    for key, ids in items:
        wanted.pop(key, None)
        wanted[key] = ids
    if not wanted:
        return tier
    draft = Draft(tier)
    needs = [0] * len(tier.capacity)
    missing: dict[bytes, list[int]] = {}
    for key, ids in wanted.items():
        missing[key] = missing_groups(ids, draft.slots(key))

    def count(key: bytes, amount: int) -> None:
        for g in missing[key]:
            needs[g] += amount

    for key in missing:
        count(key, 1)
    for key in list(wanted):
        if draft.fits_alone(needs):
            break
        count(key, -1)
        del wanted[key], missing[key]
    for key in wanted:
        draft.use(key, epoch)
    while draft.order is not None:
        _, key = _tree.first(draft.order)  # type: ignore[misc]
        holds = any(draft.slots(key)) or missing.get(key)
        if holds and draft.fits(needs):  # what holds nothing goes with the pages that follow it
            break
        if key in missing:
            count(key, -1)
            del missing[key]
        draft.forget(key)
    draft.join()
    under_way: deque[Pages] = deque()
    for g, group in enumerate(cache.groups):
        keys = [key for key, groups in missing.items() if g in groups]
        at = 0
        for size in draft.sizes(g, len(keys)):
            some = keys[at : at + size]
            ids = np.full(size, group.ref_counts.shape[0], np.int32)
            ids[: len(some)] = [wanted[key][g] for key in some]
            if len(under_way) == _MOST_UNDER_WAY:
                jax.block_until_ready(under_way.popleft())
            (block,) = _pages.copy_out((group.pages,), (ids,), tier.memory_kind, implementation)
            under_way.append(block)
            draft.add_block(g, block, some)
            draft.num_pages[g] += len(some)
            draft.moved["pages_written"] += len(some)
            at += size
    return draft.done()


def missing_groups(ids: Int32[np.ndarray, "G"], slots: Sequence[Any]) -> list[int]:
    """The groups in which a page is on the device and not on the host."""
    return [g for g, page in enumerate(ids.tolist()) if page != NO_PAGE and slots[g] is None]
