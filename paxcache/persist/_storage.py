"""The storage tier: pages in a directory or an object store, by stable key. Imports `offload`, `_cache`, tensorstore.

A page, with all its layers, groups and leaves, is one value of a tensorstore key-value store. Its name is its stable
key and the groups that it has, so a listing tells what is there and how large it is; its value begins with a checksum
over everything that identifies it. A manifest beside the pages names the format and the shapes of a page.

What is relied on: a write of the key-value store is atomic and durable when its future is done. tensorstore's driver
for files writes to a locked file of another name, syncs it and renames it; object stores replace whole objects.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import io
import json
import math
import os
import pathlib
import re
import threading
import time
import zlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from paxcache import _checks, offload
from paxcache._cache import page_shapes
from paxcache._types import CacheConfig
from paxcache.offload import _pages
from paxcache.prefix import _keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from jaxtyping import Bool

_MANIFEST = "paxcache.json"
_HEADER = {"format": "paxcache storage", "version": 1, "keys": "paxcache.prefix/1"}
_NAME = re.compile(r"[0-9a-f]{2}/([0-9a-f]{64})-([0-9a-f]+)")
_MAGIC = b"paxpage1"
_PREFIX_BYTES = len(_MAGIC) + 4
_MAX_IN_FLIGHT = 8  # pages at a time in a directory
_MAX_IN_FLIGHT_ELSEWHERE = 32  # other stores take longer to answer
_IN_FLIGHT_BYTES = 2**27
_STALE_SECONDS = 3600


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


class _Layout:
    """How a page of a cache lies in a value: its groups one after the other, each leaf after leaf."""

    def __init__(self, config: CacheConfig):
        self.pages = page_shapes(config)
        self.leaves = _pages.shapes_of(self.pages)
        self.leaf_bytes = tuple(
            [int(np.prod(shape)) * dtype.itemsize for shape, dtype in leaves] for leaves in self.leaves
        )
        groups = config.layer_groups
        self.required = sum(1 << g for g, group in enumerate(groups) if group.sliding_window is None)
        self.manifest = {
            "page_size": config.page_size,
            "groups": [
                {
                    "sliding_window": group.sliding_window,
                    "leaves": {
                        jax.tree_util.keystr(path): [str(x.dtype), [x.shape[0], *x.shape[2:]]]
                        for path, x in jax.tree_util.tree_leaves_with_path(pages)
                    },
                }
                for group, pages in zip(groups, self.pages, strict=True)
            ],
        }
        self.seed = zlib.crc32(json.dumps(self.manifest, sort_keys=True).encode())

    @property
    def num_groups(self) -> int:
        return len(self.leaves)

    def in_mask(self, mask: int) -> list[int]:
        return [g for g in range(self.num_groups) if mask >> g & 1]

    def is_page(self, mask: int) -> bool:
        """Whether these groups make a page: some of them, and all that see their whole prompt."""
        return 0 < mask < 1 << self.num_groups and mask & self.required == self.required

    def num_bytes(self, mask: int) -> int:
        """Bytes of the value of a page with these groups."""
        return _PREFIX_BYTES + sum(sum(self.leaf_bytes[g]) for g in self.in_mask(mask))

    def checksum(self, key: bytes, mask: int, parts: Iterable[Any]) -> bytes:
        """Over what a page is, and over its bytes."""
        sum_ = zlib.crc32(key + mask.to_bytes(8, "little"), self.seed)
        for part in parts:
            sum_ = zlib.crc32(part, sum_)
        return sum_.to_bytes(4, "little")

    def encode(self, key: bytes, mask: int, parts: list[np.ndarray]) -> bytes:
        """The value of a page."""
        return b"".join((_MAGIC, self.checksum(key, mask, parts), *parts))

    def parts(self, mask: int, blocks: list[list[np.ndarray]], entry: int) -> list[np.ndarray]:
        """Where the bytes of an entry lie in blocks [N, bytes]."""
        return [block[entry] for g in self.in_mask(mask) for block in blocks[g]]

    def decode(self, key: bytes, mask: int, read: Callable[[Any], int], parts: list[np.ndarray]) -> bool:
        """Reads a value into its parts and says whether it is that of this page; if not, the parts are zeros."""
        prefix = bytearray(_PREFIX_BYTES)
        whole = all(read(part) == len(part) for part in (prefix, *parts)) and read(bytearray(1)) == 0
        if whole and bytes(prefix) == _MAGIC + self.checksum(key, mask, parts):
            return True
        for part in parts:
            part[:] = 0
        return False

    def read_extent(self, extent: offload.Extent, num_keys: int) -> tuple[list[list[np.ndarray]], np.ndarray]:
        """Checks an extent. Its leaves as bytes [N, bytes], by group, and the groups of each entry as a mask i64[N]."""
        _checks.instance("extent", extent, offload.Extent, source="offload.swap_out")
        if len(extent.blocks) != self.num_groups:
            raise ValueError(
                f"extent: expected pages of {self.num_groups} groups, got those of {len(extent.blocks)}"
            )
        blocks, masks = [], np.zeros(num_keys, np.int64)
        for g, (pages, held) in enumerate(zip(extent.blocks, extent.held, strict=True)):
            if held.shape != (num_keys,):
                raise ValueError(
                    f"extent: expected a page of group {g} for each of {num_keys} keys, got {held.shape}"
                )
            masks |= np.asarray(held).astype(np.int64) << g
            if jax.tree.structure(pages) != jax.tree.structure(self.pages[g]):
                raise ValueError(
                    f"extent: expected leaves like {jax.tree.structure(self.pages[g])} for group {g}, "
                    f"got {jax.tree.structure(pages)}"
                )
            blocks.append([])
            for x, (shape, dtype) in zip(jax.tree.leaves(pages), self.leaves[g], strict=True):
                if x.shape != (num_keys, *shape) or x.dtype != dtype:
                    raise ValueError(
                        f"extent: expected {dtype}{[num_keys, *shape]} for group {g}, got {_checks.describe(x)}"
                    )
                blocks[g].append(_as_bytes(np.ascontiguousarray(x)))
        return blocks, masks


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

    def __init__(self, kvstore: ts.KvStore, layout: _Layout, max_bytes: int):
        """Use `open`."""
        self.max_bytes = max_bytes
        self._kvstore, self._layout = kvstore, layout
        self._folder = _folder(kvstore)
        self._masks: collections.OrderedDict[bytes, int] = collections.OrderedDict()  # by use, oldest first
        self._num_bytes = 0
        self._counters = Counters()
        self._lock = threading.Lock()  # for all of the above
        self._writing = threading.Lock()  # one batch at a time: the room it makes stays its own

    @classmethod
    def open(cls, path: str | os.PathLike[str] | dict, config: CacheConfig, *, max_bytes: int) -> Storage:
        """Opens a place, and makes it one for pages of this config if it is empty.

        Args:
          path: a directory; a URL of a key-value store of tensorstore, such as ``memory://`` or ``gs://bucket/path``;
            or a specification of one, for those that need more than a URL.
          config: the cache's. Layer groups, their shapes, dtypes and windows, and the page size must be those that the
            place was made with; numbers of pages and rows may differ.
          max_bytes: bytes of pages that this object keeps there at most, those of a page or more. What is there beyond
            goes with the next `put`.

        Returns:
          A `Storage` that knows the pages which are there. In a directory the least recently used are told by the
          files' times; elsewhere that order is lost when the last process ends.

        Raises:
          ValueError: the place has pages of another config or format or holds something else; or max_bytes takes no
            page.
          TypeError: an argument is of another type.
          OSError: the place cannot be read or written.
        """
        _checks.instance("config", config, CacheConfig)
        layout = _Layout(config)
        whole = layout.num_bytes((1 << layout.num_groups) - 1)
        max_bytes = _checks.static_int("max_bytes", max_bytes, minimum=whole)
        kvstore = _open(path, layout)
        storage = cls(kvstore, layout, max_bytes)
        storage._take_over([name.decode() for name in _ask(path, kvstore.list())])
        return storage

    def _take_over(self, names: list[str]) -> None:
        """Notes the pages that are there, oldest first."""
        if self._folder is not None:
            names = _by_age(self._folder, names)
        doubles = []
        for name in names:
            if (match := _NAME.fullmatch(name)) and self._layout.is_page(mask := int(match[2], 16)):
                key = bytes.fromhex(match[1])
                # Two of a key: a writer was stopped after storing a fuller page and before dropping the old.
                old = self._masks.pop(key, 0)
                if self._layout.num_bytes(old) > self._layout.num_bytes(mask):
                    old, mask = mask, old
                if old:
                    doubles.append(self._kvstore.write(_name(key, old), None))
                self._masks[key] = mask
        for double in doubles:
            with contextlib.suppress(ValueError):
                double.result()
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
        _check_keys(keys)
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
          OSError: pages could not be written: the disk is full, say. The others of the batch are stored, the storage
            knows which, and goes on.
          ImportError: progress without tqdm.
        """
        _check_keys(keys)
        bar = _checks.import_tqdm() if progress else None
        blocks, masks = self._layout.read_extent(extent, len(keys))
        entries: dict[bytes, int] = {}
        for entry, key in enumerate(keys):
            if key is not None and self._layout.is_page(int(masks[entry])):
                entries.setdefault(key, entry)
        failures: list[Exception] = []

        def drop(name):
            try:
                self._kvstore.write(name, None).result()
            except Exception as error:
                failures.append(error)

        def write(key):
            mask = int(masks[entries[key]])
            try:
                value = self._layout.encode(key, mask, self._layout.parts(mask, blocks, entries[key]))
                self._kvstore.write(_name(key, mask), value).result()
            except Exception as error:
                failures.append(error)
                return
            old = self._note(key, mask)
            if old not in (0, mask):
                drop(_name(key, old))

        with self._writing:
            new, victims = self._make_room({key: int(masks[entry]) for key, entry in entries.items()})
            self._run(drop, victims)
            self._run(write, new, bar)
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
        _check_keys(keys)
        bar = _checks.import_tqdm() if progress else None
        _pages.space(memory_kind)
        layout, N = self._layout, len(keys)
        arrays = [[_zeros((N, *shape), dtype) for shape, dtype in leaves] for leaves in layout.leaves]
        blocks = [[_as_bytes(x) for x in group] for group in arrays]
        with self._lock:
            known = {i: (key, self._masks[key]) for i, key in enumerate(keys) if key in self._masks}
        found: dict[int, int] = {}
        damaged: list[int] = []

        def read(entry):
            key, mask = known[entry]
            name, parts = _name(key, mask), layout.parts(mask, blocks, entry)
            if self._folder is not None:  # a page is a file: its bytes go where they belong, without a stop
                with contextlib.suppress(OSError), open(self._folder / name, "rb", buffering=0) as file:
                    if layout.decode(key, mask, file.readinto, parts):
                        found[entry] = mask
                        return
            try:
                result = self._kvstore.read(name).result()
            except Exception:
                damaged.append(entry)
                self._forget(key, mask)
                return
            if result.state != "value":
                self._forget(key, mask)
            elif layout.decode(key, mask, io.BytesIO(result.value).readinto, parts):
                found[entry] = mask
            else:
                damaged.append(entry)
                self._forget(key, mask)
                # This version of it alone: another process may be storing it again.
                with contextlib.suppress(Exception):
                    self._kvstore.write(name, None, if_equal=result.stamp.generation).result()

        self._run(read, list(known), bar)
        self._use([known[entry][0] for entry in sorted(found)])
        asked = sum(key is not None for key in keys)
        self._count(
            pages_found=len(found),
            pages_damaged=len(damaged),
            pages_missing=asked - len(found) - len(damaged),
        )
        masks = np.array([found.get(entry, 0) for entry in range(N)], np.int64)
        trees = tuple(
            jax.tree.unflatten(jax.tree.structure(pages), group)
            for pages, group in zip(layout.pages, arrays, strict=True)
        )
        held = tuple(jnp.asarray((masks >> g & 1).astype(bool)) for g in range(layout.num_groups))
        place = jax.sharding.SingleDeviceSharding(_checks.default_device(), memory_kind=memory_kind)
        return offload.Extent(jax.device_put(trees, place), held)

    # Books.

    def _make_room(self, masks: dict[bytes, int]) -> tuple[list[bytes], list[str]]:
        """Which pages of a batch to write, and the names of pages that go for them."""
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
                victims.append(_name(key, mask))
        self._count(pages_evicted=len(victims))
        return new, victims

    def _note(self, key: bytes, mask: int) -> int:
        """Notes a page as stored; returns the groups of the one that was before it, 0 if none was."""
        with self._lock:
            old = self._masks.get(key, 0)
            self._masks[key] = mask
            self._num_bytes += self._layout.num_bytes(mask) - (self._layout.num_bytes(old) if old else 0)
        self._count(pages_written=1)
        return old

    def _forget(self, key: bytes, mask: int) -> None:
        """Notes that a page is gone, if it is the one that is known."""
        with self._lock:
            if self._masks.get(key) == mask:
                del self._masks[key]
                self._num_bytes -= self._layout.num_bytes(mask)

    def _use(self, keys: Sequence[bytes]) -> None:
        """Notes pages as used, the first one last. In a directory, so that the next process knows it too."""
        now, names = time.time_ns(), []
        with self._lock:
            for key in reversed(keys):
                if key in self._masks:
                    self._masks.move_to_end(key)
                    names.append(_name(key, self._masks[key]))
        if self._folder is not None:
            for age, name in enumerate(reversed(names)):
                with contextlib.suppress(OSError):
                    os.utime(self._folder / name, ns=(now, now - age * 1000))

    def _count(self, **amounts: int) -> None:
        with self._lock:
            sums = {name: getattr(self._counters, name) + amount for name, amount in amounts.items()}
            self._counters = dataclasses.replace(self._counters, **sums)

    def _run(self, work: Callable[[Any], None], items: list[Any], bar: Any = None) -> None:
        """Does all items, a bounded number of them at a time: that many values are in memory."""
        whole = self._layout.num_bytes((1 << self._layout.num_groups) - 1)
        most = _MAX_IN_FLIGHT if self._folder is not None else _MAX_IN_FLIGHT_ELSEWHERE
        at_once = max(min(most, _IN_FLIGHT_BYTES // whole, len(items)), 2)
        # Threads, not futures alone: checksums and copies run beside the transfers.
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            done = pool.map(work, items)
            for _ in done if bar is None else bar(done, total=len(items), unit=" pages"):
                pass


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros where JAX takes them on the CPU without a copy: 64 bytes aligned."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """An array [N, ...] as bytes [N, bytes], in place."""
    return array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8)


def _name(key: bytes, mask: int) -> str:
    """The name of a page with these groups."""
    text = key.hex()
    return f"{text[:2]}/{text}-{mask:x}"


def _check_keys(keys: Sequence[bytes | None]) -> None:
    for key in keys:
        if key is None:
            continue
        if not isinstance(key, bytes):
            raise TypeError(f"keys: expected bytes or None, got {key!r}")
        if len(key) != _keys.KEY_BYTES:
            raise ValueError(f"keys: expected {_keys.KEY_BYTES} bytes (from prefix.page_keys), got {key!r}")


# The place.


def _open(path: Any, layout: _Layout) -> ts.KvStore:
    """The key-value store, with a manifest that fits."""
    if isinstance(path, dict):
        spec: Any = path
    else:
        text = os.fspath(path)
        spec = text if "://" in text else {"driver": "file", "path": os.path.abspath(text)}
    try:
        spec = ts.KvStore.Spec(spec)
    except ValueError as error:
        raise ValueError(
            f"path: expected a directory, a URL or a specification, got {path!r}: {error}"
        ) from error
    if spec.path and not spec.path.endswith("/"):
        spec.path += "/"
    kvstore = _ask(
        path, ts.KvStore.open(spec, context=ts.Context({"file_io_concurrency": {"limit": _MAX_IN_FLIGHT}}))
    )
    _check_manifest(path, kvstore, layout)
    return kvstore


def _ask(path: Any, future: ts.Future) -> Any:
    try:
        return future.result()
    except ValueError as error:  # tensorstore's for whatever went wrong
        raise OSError(f"path: no access to {path!r}: {error}") from error


def _check_manifest(path: Any, kvstore: ts.KvStore, layout: _Layout) -> None:
    """Writes a manifest to an empty place; anywhere else the one that is there must say the same."""
    expected = {**_HEADER, **layout.manifest}
    read = _ask(path, kvstore.read(_MANIFEST))
    if read.state != "value":
        if others := _ask(path, kvstore.list()):
            raise ValueError(
                f"path: expected a storage of pages or an empty place, got one with {others[0].decode()!r} "
                f"and without {_MANIFEST!r}, {path!r}"
            )
        text = json.dumps(expected, indent=1)
        if _ask(path, kvstore.write(_MANIFEST, text, if_equal=read.stamp.generation)).generation:
            return
        read = _ask(path, kvstore.read(_MANIFEST))  # another process was first
    try:
        found = json.loads(read.value)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"path: expected the manifest of a storage of pages, got {read.value[:80]!r}, {path!r}"
        )
    for name, value in expected.items():
        if found.get(name) != value:
            whose = "path" if name in _HEADER else "config"
            raise ValueError(
                f"{whose}: expected {name} {json.dumps(value)}, got {json.dumps(found.get(name))}, {path!r}"
                if whose == "path"
                else f"config: expected {name} {json.dumps(found.get(name))}, with which {path!r} was made, "
                f"got {json.dumps(value)}"
            )


def _folder(kvstore: ts.KvStore) -> pathlib.Path | None:
    """The directory of a place on this machine."""
    spec: dict = kvstore.spec().to_json()  # type: ignore[assignment]
    return pathlib.Path(spec["path"]) if spec["driver"] == "file" else None


def _by_age(folder: pathlib.Path, names: list[str]) -> list[str]:
    """Files by time of use, oldest first. What writers that were killed long ago left half-written goes."""
    ages = {}
    for name in names:
        with contextlib.suppress(OSError):  # gone in the meantime
            ages[name] = (folder / name).stat().st_mtime_ns
    for half in folder.glob("??/*.__lock"):
        with contextlib.suppress(OSError):
            if time.time() - half.stat().st_mtime > _STALE_SECONDS:
                half.unlink()
    return sorted(ages, key=ages.__getitem__)
