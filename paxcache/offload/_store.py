"""A store of arrays in ordinary CPU memory. Imports `_checks`, NumPy and the standard library."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
import tempfile
import threading
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from paxcache import _checks

if TYPE_CHECKING:
    from collections.abc import Sequence

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
