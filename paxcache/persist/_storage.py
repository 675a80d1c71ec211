"""The storage tier: pages in a directory or an object store, by stable key, with a budget in bytes."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _checks, offload
from paxcache._types import CacheConfig
from paxcache.offload import _pages
from paxcache.persist import _layout, _places

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from jaxtyping import Bool

    from paxcache.persist._places import Place

_IN_FLIGHT_BYTES = 2**27


@dataclasses.dataclass(frozen=True)
class Counters:
    """What a `Storage` has done since it was opened."""

    pages_written: int = 0
    pages_found: int = 0
    """Pages that `get` read."""
    pages_missing: int = 0
    """Pages that `get` was asked for and that were not there."""
    pages_damaged: int = 0
    """Pages that `get` could not read, or that were not what was written. To the caller they were missing."""
    pages_evicted: int = 0


class Storage:
    """Pages on disk or in an object store, by stable key, least recently used first out. Open it with `open`.

    An object, because it stands for something outside. Safe to use from many threads. Many processes may open one
    place at once: each knows the pages that were there when it opened it and those that it stored itself, counts only
    these against its budget, and finds a page missing that another one evicted.

    Keys (`prefix.page_keys`) stand for tokens, extra key and epoch, and for nothing else of the model: use one place
    for each model, or its name in the extra key.

    A page needs every group that sees its whole prompt. Groups with a sliding window may be missing, as they are for
    pages left of it: the page is stored without them, takes fewer bytes, and comes back with ``held`` False there.

    Example:
      >>> import tempfile, jax.numpy as jnp, paxcache
      >>> from paxcache import offload, persist, prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([8, 0]), num_tokens=8)
      >>> keys = prefix.page_keys(range(8), page_size=4)
      >>> folder = tempfile.TemporaryDirectory()
      >>> storage = persist.Storage.open(folder.name, config, max_bytes=2**20)
      >>> storage.put(keys, offload.swap_out(cache, jnp.array([0, 1])))
      2
      >>> other = persist.Storage.open(folder.name, config, max_bytes=2**20)   # as in another process
      >>> other.contains([keys[0], bytes(32)]).tolist(), len(other)
      ([True, False], 2)
      >>> cache, page_ids, ok = offload.swap_in(cache, other.get([*keys, bytes(32)]))
      >>> page_ids[0].tolist(), ok.item()
      ([2, 3, -1], True)
      >>> folder.cleanup()

    Reference: the storage tiers of LMCache, of SGLang's HiCache and of FastDeploy's cache manager.
    """

    def __init__(self, place: Place, layout: _layout.Layout, max_bytes: int):
        """Use `open`."""
        self.max_bytes = max_bytes
        self._place, self._layout = place, layout
        self._masks: collections.OrderedDict[bytes, int] = collections.OrderedDict()  # by use, oldest first
        self._num_bytes = 0
        self._counters = Counters()
        self._lock = threading.Lock()  # for all of the above
        self._writing = threading.Lock()  # one batch at a time: the room it makes stays its own

    @classmethod
    def open(cls, path: str | os.PathLike[str] | dict, config: CacheConfig, *, max_bytes: int) -> Storage:
        """Opens a place, and makes it one for pages of this config if it is empty.

        Args:
          path: a directory, made if needed; a URL of a key-value store of tensorstore, such as ``memory://`` or
            ``gs://bucket/path``; or a specification of one, for those that need more than a URL.
          config: the cache's. Layer groups, their shapes, dtypes and windows, and the page size must be those that the
            place was made with; numbers of pages and rows may differ.
          max_bytes: bytes of pages that this object keeps there at most, those of a page or more. What is there beyond
            goes with the next `put`.

        Returns:
          A `Storage` that knows the pages which are there. In a directory the least recently used are told by the
          files' times; elsewhere that order is lost when the last process ends. What killed writers left half-written
          in a directory is gone; what a living process still writes stays.

        Raises:
          ValueError: the place has pages of another config or format or holds something else, is the root of the file
            system or cannot be written by its kind; or max_bytes takes no page.
          TypeError: an argument is of another type.
          OSError: the place cannot be read or written, or does not answer.
        """
        _checks.instance("config", config, CacheConfig)
        layout = _layout.Layout(config)
        max_bytes = _checks.static_int("max_bytes", max_bytes, minimum=layout.page_bytes)
        storage = cls(_places.open_place(path, layout), layout, max_bytes)
        try:
            storage._take_over(storage._place.names())
        except Exception as error:  # tensorstore raises what it met
            raise OSError(f"path: no access to {path!r}: {error}") from error
        return storage

    def _take_over(self, names: list[str]) -> None:
        """Notes the pages that are there, oldest first."""
        for name in names:
            key, mask = _layout.parse_name(name) or (b"", 0)
            if self._layout.is_page(mask):
                # Two of a key: a writer was stopped after storing a fuller page and before dropping the old.
                old = self._masks.pop(key, 0)
                if self._layout.num_bytes(old) > self._layout.num_bytes(mask):
                    old, mask = mask, old
                if old:
                    with contextlib.suppress(Exception):
                        self._place.remove(_layout.name_of(key, old))
                self._masks[key] = mask
        self._num_bytes = sum(map(self._layout.num_bytes, self._masks.values()))

    @property
    def num_bytes(self) -> int:
        """Bytes of the pages that it knows."""
        return self._num_bytes

    @property
    def counters(self) -> Counters:
        """What it has done."""
        return self._counters

    def __len__(self) -> int:
        """Pages that it knows."""
        return len(self._masks)

    def contains(self, keys: Sequence[bytes | None]) -> Bool[np.ndarray, "N"]:
        """Whether it knows the pages of keys. Reads nothing and is no use of them.

        Args:
          keys: stable keys; None is padding.

        Raises:
          ValueError, TypeError: a key is not 32 bytes.
        """
        _layout.check_keys(keys)
        with self._lock:
            return np.array([key in self._masks for key in keys], bool)

    def put(self, keys: Sequence[bytes | None], extent: offload.Extent, *, progress: bool = False) -> int:
        """Stores pages and makes room for them. Those that are there already are not written again.

        The first keys count as used last, since pages of a prompt are of no use without those before them. A batch
        larger than the whole storage is stored up to the page that no longer fits.

        Args:
          keys: a stable key for each entry of the extent; None is padding.
          extent: from `offload.swap_out`. Entries that it does not hold, in a group without a window or in all groups,
            are not stored.
          progress: shows a progress bar (tqdm).

        Returns:
          How many of the keys are stored, by this call or before it. They are durable, as far as the place can be. A
          page that another process evicted meanwhile counts until a `get` misses it.

        Raises:
          ValueError, TypeError: an argument's type, shape or length is wrong; then nothing was stored.
          OSError: pages could not be written: the disk is full, say; or those that were to make room not be removed.
            The others of the batch are stored, the storage knows which, and goes on. No page is half-written.
          ImportError: progress without tqdm.
        """
        _layout.check_keys(keys)
        bar = _checks.import_tqdm() if progress else None
        blocks, masks = self._layout.read_extent(extent, len(keys))
        entries: dict[bytes, int] = {}
        for entry, key in enumerate(keys):
            if key is not None and self._layout.is_page(int(masks[entry])):
                entries.setdefault(key, entry)
        failures: list[Exception] = []

        def drop(key, mask):
            try:
                self._place.remove(_layout.name_of(key, mask))
            except Exception as error:
                failures.append(error)
                return False
            return True

        def evict(victim):
            if not drop(*victim):
                self._note(*victim, oldest=True)

        def write(key):
            mask = int(masks[entries[key]])
            parts = self._layout.parts(mask, blocks, entries[key])
            try:
                self._place.write(_layout.name_of(key, mask), self._layout.encode(key, mask, parts))
            except Exception as error:
                failures.append(error)
                return
            old = self._note(key, mask)
            self._count(pages_written=1)
            if old not in (0, mask):
                drop(key, old)

        with self._writing:
            new, victims = self._make_room({key: int(masks[entry]) for key, entry in entries.items()})
            self._run(evict, victims)
            self._count(pages_evicted=len(victims) - len(failures))
            self._run(write, [] if failures else new, bar)
            stored = [key for key in entries if key in self._masks]
            self._use(stored)
        if failures:
            raise OSError(
                f"put: {len(failures)} writes failed, {len(stored)} of {len(entries)} pages are stored: {failures[0]}"
            ) from failures[0]
        return len(stored)

    def get(
        self, keys: Sequence[bytes | None], *, memory_kind: str = "pinned_host", progress: bool = False
    ) -> offload.Extent:
        """Reads pages into an extent that `offload.swap_in` takes.

        A page that is not there, is damaged or cannot be read is not held, and the storage forgets it; a damaged one is
        removed. None of them costs the others.

        Args:
          keys: stable keys; None is padding. Programs of `swap_in` are compiled for each N: pad to a few sizes.
          memory_kind: where the pages go, as in `offload.swap_out`.
          progress: shows a progress bar (tqdm).

        Returns:
          An `Extent` of N = len(keys) entries in memory of the default device, zeros where it holds none.

        Raises:
          ValueError, TypeError: a key is not 32 bytes, or memory_kind is unknown.
          NotImplementedError: the device has no such memory.
          ImportError: progress without tqdm.
        """
        _layout.check_keys(keys)
        bar = _checks.import_tqdm() if progress else None
        _checks.instance("memory_kind", memory_kind, str)
        _pages.space(memory_kind)
        layout, N = self._layout, len(keys)
        blocks, trees = layout.empty(N)
        with self._lock:
            known = {i: (key, self._masks[key]) for i, key in enumerate(keys) if key in self._masks}
        found: dict[int, int] = {}
        damaged: list[int] = []

        def read(entry):
            key, mask = known[entry]
            parts = layout.parts(mask, blocks, entry)
            right = self._place.read(
                _layout.name_of(key, mask),
                layout.num_bytes(mask),
                lambda fill: layout.decode(key, mask, fill, parts),
            )
            if right:
                found[entry] = mask
                return
            self._forget(key, mask)
            if right is False:
                damaged.append(entry)

        self._run(read, list(known), bar)
        self._use([known[entry][0] for entry in sorted(found)])
        asked = sum(key is not None for key in keys)
        self._count(
            pages_found=len(found),
            pages_damaged=len(damaged),
            pages_missing=asked - len(found) - len(damaged),
        )
        masks = np.array([found.get(entry, 0) for entry in range(N)], np.int64)
        held = tuple(jnp.asarray((masks >> g & 1).astype(bool)) for g in range(layout.num_groups))
        place = jax.sharding.SingleDeviceSharding(_checks.default_device(), memory_kind=memory_kind)
        return offload.Extent(jax.device_put(trees, place), held)

    def remove(self, keys: Sequence[bytes | None]) -> int:
        """Removes pages, those that other processes stored there too.

        Args:
          keys: stable keys; None is padding. Those that are not there are no error.

        Returns:
          How many pages there were.

        Raises:
          ValueError, TypeError: a key is not 32 bytes.
          OSError: pages could not be removed. The others are, and the storage knows which.
        """
        _layout.check_keys(keys)
        with self._writing:
            wanted = [key for key in dict.fromkeys(keys) if key is not None]
            names: list[str] = []
            failures = self._all(lambda key: names.extend(self._place.names(_layout.prefix_of(key))), wanted)
            return self._remove(names, failures)

    def clear(self) -> int:
        """Removes all pages, those that other processes stored there too, and what killed writers left.

        What is not the storage's stays, and so does the manifest: the storage is empty and goes on.

        Returns:
          How many pages there were.

        Raises:
          OSError: pages could not be removed. The others are, and the storage knows which.
        """
        with self._writing:
            names: list[str] = []
            failures = self._all(lambda place: names.extend(place.names()), [self._place])
            count = self._remove(names, failures)
            self._place.tidy()
            return count

    def _remove(self, names: list[str], failures: list[Exception]) -> int:
        """Removes values by name and forgets them; returns of how many pages they were."""
        gone: set[bytes] = set()

        def remove(name):
            self._place.remove(name)
            key, mask = _layout.parse_name(name) or (b"", 0)
            self._forget(key, mask)
            gone.add(key)

        failures = [*failures, *self._all(remove, names)]
        if failures:
            raise OSError(
                f"remove: {len(failures)} removals failed, {len(gone)} pages are gone: {failures[0]}"
            ) from failures[0]
        return len(gone)

    # Books.

    def _make_room(self, masks: dict[bytes, int]) -> tuple[list[bytes], list[tuple[bytes, int]]]:
        """Which pages of a batch to write, and the pages that go for them."""
        size = self._layout.num_bytes
        with self._lock:
            kept = 0
            for key in reversed(masks):
                if key in self._masks:
                    self._masks.move_to_end(key)
                    kept += size(self._masks[key])
            new, wanted = [], 0
            for key, mask in masks.items():
                if mask & ~self._masks.get(key, 0):
                    if kept + wanted + size(mask) > self.max_bytes:
                        break
                    new.append(key)
                    wanted += size(mask)
            victims = []
            while self._num_bytes + wanted > self.max_bytes:  # pages of the batch are last
                key, mask = self._masks.popitem(last=False)
                self._num_bytes -= size(mask)
                victims.append((key, mask))
        return new, victims

    def _note(self, key: bytes, mask: int, *, oldest: bool = False) -> int:
        """Notes a page as stored; returns the groups of the one that was before it, 0 if none was."""
        with self._lock:
            old = self._masks.get(key, 0)
            self._masks[key] = mask
            self._masks.move_to_end(key, last=not oldest)
            self._num_bytes += self._layout.num_bytes(mask) - (self._layout.num_bytes(old) if old else 0)
        return old

    def _forget(self, key: bytes, mask: int) -> None:
        """Notes that a page is gone, if it is the one that is known."""
        with self._lock:
            if self._masks.get(key) == mask:
                del self._masks[key]
                self._num_bytes -= self._layout.num_bytes(mask)

    def _use(self, keys: Sequence[bytes]) -> None:
        """Notes pages as used, the first one last, and in the place, so that the next process knows it too."""
        now, names = time.time_ns(), []
        with self._lock:
            for key in reversed(keys):
                if key in self._masks:
                    self._masks.move_to_end(key)
                    names.append(_layout.name_of(key, self._masks[key]))
        self._place.use(names[::-1], now)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            sums = {name: getattr(self._counters, name) + amount for name, amount in amounts.items()}
            self._counters = dataclasses.replace(self._counters, **sums)

    def _run(self, work: Callable[[Any], None], items: list[Any], bar: Any = None) -> None:
        """Does all items, a bounded number of them at a time: that many values are in memory."""
        most = min(self._place.at_once, _IN_FLIGHT_BYTES // self._layout.page_bytes, len(items))
        # Threads, not futures alone: checksums and copies run beside the transfers.
        with concurrent.futures.ThreadPoolExecutor(max(most, 2)) as pool:
            done = pool.map(work, items)
            for _ in done if bar is None else bar(done, total=len(items), unit=" pages"):
                pass

    def _all(self, work: Callable[[Any], None], items: list[Any]) -> list[Exception]:
        """Does all items; returns what went wrong."""
        failures: list[Exception] = []

        def attempt(item):
            try:
                work(item)
            except Exception as error:  # tensorstore raises what it met
                failures.append(error)

        self._run(attempt, items)
        return failures
