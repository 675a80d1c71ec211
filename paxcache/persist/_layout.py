"""How a page lies in a value of a storage, what the value is called, and what a storage says about itself.

A page, with all its layers, groups and leaves, is one value. Its name is its stable key and the groups that it has, so
a listing tells what is there and how large it is. The value begins with a checksum over everything that identifies it.
A manifest beside the pages names the format and the shapes of a page.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from paxcache import _checks, offload
from paxcache._cache import page_shapes
from paxcache.offload import _pages
from paxcache.persist import _tree_json
from paxcache.prefix import _keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from paxcache._types import CacheConfig

MANIFEST = "paxcache.json"
_HEADER = {"format": "paxcache storage", "version": 1, "keys": "paxcache.prefix/1"}
_NAME = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{62})-(0|[1-9a-f][0-9a-f]*)")
_MAGIC = b"paxpage1"
_PREFIX_BYTES = len(_MAGIC) + 4


def name_of(key: bytes, mask: int) -> str:
    """The name of a page with these groups."""
    return f"{prefix_of(key)}{mask:x}"


def prefix_of(key: bytes) -> str:
    """How the names of a key's pages begin."""
    text = key.hex()
    return f"{text[:2]}/{text}-"


def parse_name(name: str) -> tuple[bytes, int] | None:
    """The key and the groups of a page; None: it is no page's name."""
    match = _NAME.fullmatch(name)
    return (bytes.fromhex(match[2]), int(match[3], 16)) if match else None


def check_keys(keys: Any) -> None:
    """Refuses what is no sequence of stable keys and None."""
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Sequence):
        raise TypeError(f"keys: expected a sequence of bytes and None, got {_checks.describe(keys)}")
    for key in keys:
        if key is None:
            continue
        if not isinstance(key, bytes):
            raise TypeError(f"keys: expected bytes or None, got {key!r}")
        if len(key) != _keys.KEY_BYTES:
            raise ValueError(f"keys: expected {_keys.KEY_BYTES} bytes (from prefix.page_keys), got {key!r}")


class Layout:
    """How a page of a cache lies in a value: its groups one after the other, each leaf after leaf."""

    def __init__(self, config: CacheConfig):
        self.pages = page_shapes(config)
        self.leaves = _pages.shapes_of(self.pages)
        self.leaf_bytes = tuple(
            [math.prod(shape) * dtype.itemsize for shape, dtype in leaves] for leaves in self.leaves
        )
        groups = config.layer_groups
        self.required = sum(1 << g for g, group in enumerate(groups) if group.sliding_window is None)
        self._shapes = {
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
        self._seed = zlib.crc32(json.dumps(self._shapes, sort_keys=True).encode())

    @property
    def num_groups(self) -> int:
        return len(self.leaves)

    @property
    def page_bytes(self) -> int:
        """Bytes of the value of a page with all groups."""
        return self.num_bytes((1 << self.num_groups) - 1)

    @property
    def manifest(self) -> bytes:
        """What a storage says about itself."""
        return json.dumps({**_HEADER, **self._shapes}, indent=1).encode()

    def check_manifest(self, path: Any, text: bytes) -> None:
        """Refuses a manifest that does not say the same."""
        try:
            found = _tree_json.read_json(text)
        except _tree_json.MalformedError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(
                f"path: expected the manifest of a storage of pages, got {text[:80]!r}, {path!r}"
            )
        for name, value in {**_HEADER, **self._shapes}.items():
            expected, got = (json.dumps(x, sort_keys=True) for x in (value, found.get(name)))
            if expected == got:  # as text: 1, 1.0 and true are three things
                continue
            if name in _HEADER:
                raise ValueError(f"path: expected {name} {expected}, got {got}, {path!r}")
            raise ValueError(f"config: expected {name} {got}, with which {path!r} was made, got {expected}")

    def in_mask(self, mask: int) -> list[int]:
        return [g for g in range(self.num_groups) if mask >> g & 1]

    def is_page(self, mask: int) -> bool:
        """Whether these groups make a page: some of them, and all that see their whole prompt."""
        return 0 < mask < 1 << self.num_groups and mask & self.required == self.required

    def num_bytes(self, mask: int) -> int:
        """Bytes of the value of a page with these groups."""
        return _PREFIX_BYTES + sum(sum(self.leaf_bytes[g]) for g in self.in_mask(mask))

    def _checksum(self, key: bytes, mask: int, parts: Iterable[Any]) -> bytes:
        """Over what a page is, and over its bytes."""
        sum_ = zlib.crc32(key + mask.to_bytes(8, "little"), self._seed)
        for part in parts:
            sum_ = zlib.crc32(part, sum_)
        return sum_.to_bytes(4, "little")

    def encode(self, key: bytes, mask: int, parts: list[np.ndarray]) -> list[Any]:
        """The value of a page, in parts."""
        return [_MAGIC, self._checksum(key, mask, parts), *parts]

    def parts(self, mask: int, blocks: list[list[np.ndarray]], entry: int) -> list[np.ndarray]:
        """Where the bytes of an entry lie in blocks [N, bytes]."""
        return [block[entry] for g in self.in_mask(mask) for block in blocks[g]]

    def decode(self, key: bytes, mask: int, read: Callable[[Any], int], parts: list[np.ndarray]) -> bool:
        """Reads a value into its parts and says whether it is that of this page; if not, the parts are zeros.

        `read` fills a buffer and says how many bytes there were.
        """
        prefix = bytearray(_PREFIX_BYTES)
        whole = all(read(part) == len(part) for part in (prefix, *parts)) and read(bytearray(1)) == 0
        if whole and bytes(prefix) == _MAGIC + self._checksum(key, mask, parts):
            return True
        for part in parts:
            part[:] = 0
        return False

    def read_extent(self, extent: offload.Extent, num_keys: int) -> tuple[list[list[np.ndarray]], np.ndarray]:
        """Checks an extent. Its leaves as bytes [N, bytes], by group, and the groups of each entry as a mask i64[N]."""
        _checks.instance("extent", extent, offload.Extent, source="offload.swap_out")
        if _checks.is_traced(extent):
            raise TypeError("extent: put writes on the host and cannot run inside jit, got traced arrays")
        for name, value in (("blocks", extent.blocks), ("held", extent.held)):
            _checks.instance(f"extent.{name}", value, tuple)
            if len(value) != self.num_groups:
                raise ValueError(
                    f"extent: expected pages of {self.num_groups} groups, got those of {len(value)} in {name}"
                )
        blocks, masks = [], np.zeros(num_keys, np.int64)
        for g, (pages, held) in enumerate(zip(extent.blocks, extent.held, strict=True)):
            if not _is_array(held, (num_keys,), np.bool_):
                raise ValueError(
                    f"extent: expected a page of group {g} for each of {num_keys} keys, bool[{num_keys}], "
                    f"got {_checks.describe(held)}"
                )
            masks |= np.asarray(held).astype(np.int64) << g
            if jax.tree.structure(pages) != jax.tree.structure(self.pages[g]):
                raise ValueError(
                    f"extent: expected leaves like {jax.tree.structure(self.pages[g])} for group {g}, "
                    f"got {jax.tree.structure(pages)}"
                )
            blocks.append([])
            for x, (shape, dtype) in zip(jax.tree.leaves(pages), self.leaves[g], strict=True):
                if not _is_array(x, (num_keys, *shape), dtype):
                    raise ValueError(
                        f"extent: expected {dtype}{[num_keys, *shape]} for group {g}, got {_checks.describe(x)}"
                    )
                blocks[g].append(as_bytes(np.ascontiguousarray(x)))
        return blocks, masks

    def empty(self, num_entries: int) -> tuple[list[list[np.ndarray]], Any]:
        """Zeros for entries: by group the leaves as bytes [N, bytes], and the same memory as an extent's blocks."""
        arrays = [[_zeros((num_entries, *shape), dtype) for shape, dtype in leaves] for leaves in self.leaves]
        trees = tuple(
            jax.tree.unflatten(jax.tree.structure(pages), group)
            for pages, group in zip(self.pages, arrays, strict=True)
        )
        return [[as_bytes(x) for x in group] for group in arrays], trees


def _is_array(x: Any, shape: tuple[int, ...], dtype: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray)) and x.shape == shape and x.dtype == dtype


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Zeros where JAX takes them on the CPU without a copy: 64 bytes aligned."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + size].view(dtype).reshape(shape)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """An array [N, ...] as bytes [N, bytes], in place."""
    return array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8)
