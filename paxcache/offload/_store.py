"""A store of arrays in ordinary CPU memory, which can be written to a file and read again."""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from paxcache import _checks, _files

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAGIC = b"paxcache page store 1\n"
_DIGEST_BYTES = 32
_MOST_TABLE_BYTES = 2**30
_PIECE_BYTES = 2**20


class PageStore:
    """Arrays by key in ordinary CPU memory, least recently used first out. Safe to use from many threads.

    For pages that outlive a cache: keys are bytes (`prefix.page_keys`, with the leaf's name added), values NumPy arrays
    of any dtype, bfloat16 too. Unlike all else here it is an object that changes. Readers wait for nobody: neither for
    each other nor for a writer.

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
      >>> store.remove([b"a", b"c"]), len(store)
      (1, 1)

    Reference: the CPU tier with batched put and get, and save and load, of tile-based KV caches.
    """

    def __init__(self, max_bytes: int):
        """An empty store."""
        self.max_bytes = _checks.static_int("max_bytes", max_bytes, minimum=1)
        self._arrays: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()  # by use
        self._num_bytes = 0
        self._lock = threading.Lock()  # for changes of the above
        self._used: collections.deque[bytes] = collections.deque()  # uses that the order does not know yet

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
        _check_keys(keys)
        try:
            arrays = list(arrays)
        except TypeError as error:
            raise TypeError(
                f"arrays: expected a sequence of arrays, got {_checks.describe(arrays)}"
            ) from error
        if len(keys) != len(arrays):
            raise ValueError(f"arrays: expected one for each of {len(keys)} keys, got {len(arrays)}")
        copies = [_copy(array) for array in arrays]
        stored = 0
        with self._lock:
            self._note_uses()
            for key, copy in zip(keys, copies, strict=True):
                self._drop(key)
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
        found = [self._arrays.get(key) for key in keys]  # one look-up is atomic
        self._used.extend(key for key, array in zip(keys, found, strict=True) if array is not None)
        if self._lock.acquire(blocking=False):  # else whoever has it, or comes next, notes the uses
            try:
                self._note_uses()
            finally:
                self._lock.release()
        return found

    def remove(self, keys: Sequence[bytes]) -> int:
        """Drops the arrays of keys.

        Args:
          keys: what to drop; those that it does not hold are no error.

        Returns:
          How many it held.

        Raises:
          TypeError: a key is not bytes.
        """
        _check_keys(keys)
        with self._lock:
            return sum(self._drop(key) for key in keys)

    def clear(self) -> int:
        """Drops all arrays; returns how many it held. Files that `save` wrote stay."""
        with self._lock:
            count = len(self._arrays)
            self._arrays.clear()
            self._used.clear()
            self._num_bytes = 0
        return count

    def _drop(self, key: bytes) -> bool:
        """Drops one array and says whether there was one; under the lock."""
        old = self._arrays.pop(key, None)
        self._num_bytes -= 0 if old is None else old.nbytes
        return old is not None

    def _note_uses(self) -> None:
        """Brings the order up to date; under the lock."""
        while self._used:
            key = self._used.popleft()
            if key in self._arrays:
                self._arrays.move_to_end(key)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to a file, in one piece or not at all: a file that was there stays until the end.

        A save that was killed leaves a file beside it, which the next `save` or `load` in that folder removes.

        Args:
          path: the file. A link to a file stays one.

        Raises:
          ValueError, TypeError: path is none, or there are too many arrays for a file's table.
          OSError: it could not be written: the disk is full, say; or path is no regular file.
        """
        path = os.path.realpath(_files.check_path("path", path))
        with self._lock:
            self._note_uses()
            items = list(self._arrays.items())
        table = json.dumps([[key.hex(), str(array.dtype), array.shape] for key, array in items]).encode()
        if len(table) > _MOST_TABLE_BYTES:
            raise ValueError(f"path: a file takes a table of {_MOST_TABLE_BYTES} bytes, got {len(table)}")
        _files.sweep(os.path.dirname(path))
        try:
            if os.path.exists(path):
                _files.check_regular(path, os.stat(path).st_mode)
            _files.write_whole(path, _encode(table, [array for _, array in items]))
        except OSError as error:
            raise OSError(
                error.errno, f"path: could not write {path!r}: {error.strerror or error}"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], max_bytes: int) -> PageStore:
        """A store with what `save` wrote, in the same order of use; the most recently used of it if not all fits.

        Takes no more memory than the store, however large the file is.

        Args:
          path: the file.
          max_bytes: as in the constructor.

        Raises:
          ValueError, TypeError: an argument is wrong; or the file is not one that `save` wrote, or not all of it, or
            changed since.
          OSError: path is no regular file, or cannot be read.
        """
        store = cls(max_bytes)
        path = _files.check_path("path", path)
        _files.sweep(os.path.dirname(os.path.realpath(path)))
        with _files.open_regular(path) as (file, size):
            for key, array in _decode(path, file, size, store.max_bytes):
                array.flags.writeable = False
                store._arrays[key] = array
                store._num_bytes += array.nbytes
        return store


def _check_keys(keys: Any) -> None:
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Sequence):
        raise TypeError(f"keys: expected a sequence of bytes, got {_checks.describe(keys)}")
    for key in keys:
        if not isinstance(key, bytes):
            raise TypeError(f"keys: expected bytes, got {key!r}")


def _is_number(dtype: np.dtype) -> bool:
    """Whether an array of it can be written as its bytes."""
    return jnp.issubdtype(dtype, jnp.number) or dtype == np.bool_


def _copy(array: Any) -> np.ndarray:
    """A copy of our own, which readers get as it is."""
    try:
        copy = np.array(array, order="C")
    except Exception as error:  # anything may be in the way: ragged lists, traced values, random keys
        raise TypeError(f"arrays: expected numbers, got {_checks.describe(array)}: {error}") from error
    if not _is_number(copy.dtype):
        raise TypeError(f"arrays: expected numbers, got {copy.dtype}")
    copy.flags.writeable = False
    return copy


# Files: magic, length of the table, table, arrays, and a digest of all that.


class _Entry(NamedTuple):
    key: bytes
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _encode(table: bytes, arrays: list[np.ndarray]) -> Iterator[Any]:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    head = (_MAGIC, len(table).to_bytes(8, "little"), table)
    for part in (*head, *(array.reshape(-1).view(np.uint8) for array in arrays)):
        digest.update(part)
        yield part
    yield digest.digest()


def _decode(path: str, file: Any, size: int, max_bytes: int) -> list[tuple[bytes, np.ndarray]]:
    """The arrays of a file that fit, the least recently used first. All lengths are checked before it is read."""

    def damaged(why: str) -> ValueError:
        return ValueError(f"path: expected a whole page store, got a damaged one: {why}, {path!r}")

    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)

    def fill(buffer: Any) -> Any:
        if _files.read_fully(file, buffer) < len(buffer):
            raise damaged("it ends early")
        digest.update(buffer)
        return buffer

    magic = bytearray(min(len(_MAGIC), size))
    if bytes(fill(magic)) != _MAGIC:
        raise ValueError(f"path: expected a saved page store, got another file, {path!r}")
    rest = size - len(_MAGIC) - 8 - _DIGEST_BYTES
    if rest < 0:
        raise damaged("it ends early")
    table_bytes = int.from_bytes(fill(bytearray(8)), "little")
    if table_bytes > min(rest, _MOST_TABLE_BYTES):
        raise damaged(f"a table of {table_bytes} bytes in a file of {size}")
    try:
        entries = _read_table(bytes(fill(bytearray(table_bytes))))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(f"its table: {error}") from error
    expected = table_bytes + sum(entry.num_bytes for entry in entries)
    if expected != rest:
        raise damaged(f"expected {expected} bytes of table and arrays, got {rest}")
    room, kept = max_bytes, set()
    for number in reversed(range(len(entries))):
        if entries[number].num_bytes > max_bytes:
            continue
        room -= entries[number].num_bytes
        if room < 0:
            break
        kept.add(number)
    found, piece = [], bytearray(_PIECE_BYTES)
    for number, entry in enumerate(entries):
        if number in kept:
            array = np.empty(entry.shape, entry.dtype)
            fill(array.reshape(-1).view(np.uint8))
            found.append((entry.key, array))
        else:
            for begin in range(0, entry.num_bytes, _PIECE_BYTES):
                fill(memoryview(piece)[: entry.num_bytes - begin])
    sum_ = bytearray(_DIGEST_BYTES)
    if _files.read_fully(file, sum_) < len(sum_) or bytes(sum_) != digest.digest():
        raise damaged("its digest is another")
    return found


def _read_table(text: bytes) -> list[_Entry]:
    """The table of a file; ValueError or TypeError says what is wrong with it."""
    rows, entries = json.loads(text), {}
    if not isinstance(rows, list):
        raise ValueError(f"expected a list, got {rows!r:.80}")
    for row in rows:
        match row:
            case [str(key), str(name), list(shape)] if all(type(n) is int and n >= 0 for n in shape):
                entry = _Entry(bytes.fromhex(key), jnp.dtype(name), tuple(shape))
            case _:
                raise ValueError(f"expected [key, dtype, shape], got {row!r:.80}")
        if not _is_number(entry.dtype) or str(entry.dtype) != name:
            raise ValueError(f"expected a dtype of numbers, got {name!r:.80}")
        try:
            np.broadcast_to(np.empty((), entry.dtype), shape)  # takes no memory
        except ValueError as error:
            raise ValueError(f"expected a shape, got {shape!r:.80}") from error
        if entry.key in entries:
            raise ValueError(f"expected each key once, got {key!r:.80} again")
        entries[entry.key] = entry
    return list(entries.values())
