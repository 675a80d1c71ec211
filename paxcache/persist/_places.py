"""Where a storage lies: a directory of files, or a key-value store of tensorstore. Bytes by name, nothing else.

Both write a value in one piece or not at all, and it is durable when the call returns. In a directory that is
`_files`'s doing: what a killed writer leaves there lies in the directory itself and goes when the next process opens
it. Object stores replace whole objects. Nothing here waits for ever: only regular files of the right length are read,
and a store that does not answer within a time is an error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from typing import TYPE_CHECKING, Any, Protocol

import tensorstore as ts

from paxcache import _files
from paxcache.persist import _layout
from paxcache.persist._layout import MANIFEST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FOLDER = re.compile(r"[0-9a-f]{2}")
_MOST_MANIFEST_BYTES = 2**24
_OPEN_SECONDS = 30
_TRANSFER_SECONDS = 300
_READ_ONLY = ("http", "zip")

type Decode = Callable[[Callable[[Any], int]], bool]
"""Takes what fills a buffer, and says whether the value is right."""


class Place(Protocol):
    """A storage's values by name."""

    at_once: int
    """Transfers that are worth running at a time."""

    def names(self, prefix: str = "") -> list[str]:
        """The pages' names that begin so, the least recently used first as far as it is known."""
        ...

    def write(self, name: str, parts: list[Any]) -> None:
        """Stores a value. Raises whatever went wrong."""
        ...

    def read(self, name: str, size: int, decode: Decode) -> bool | None:
        """Reads a value and says whether it is right; one that is not goes. None: there is none."""
        ...

    def remove(self, name: str) -> None:
        """Removes a value, if it is there. Raises whatever went wrong."""
        ...

    def use(self, names: Sequence[str], now: int) -> None:
        """Notes values as used at a time in ns, each a little before the one ahead of it."""
        ...

    def tidy(self) -> None:
        """Removes what is no page and of no use any more."""
        ...


class Folder:
    """A directory: a file for each value, in 256 directories by the first byte of the key."""

    at_once = 8

    def __init__(self, path: str):
        self.path = path

    def names(self, prefix: str = "") -> list[str]:
        ages = {}
        for folder in [prefix[:2]] if prefix else self._folders():
            with contextlib.suppress(FileNotFoundError), os.scandir(os.path.join(self.path, folder)) as files:
                for file in files:
                    name = f"{folder}/{file.name}"
                    if name.startswith(prefix) and _layout.parse_name(name):
                        with contextlib.suppress(FileNotFoundError):  # gone in the meantime
                            ages[name] = file.stat(follow_symlinks=False).st_mtime_ns
        return sorted(ages, key=ages.__getitem__)

    def _folders(self) -> list[str]:
        with os.scandir(self.path) as entries:
            return [e.name for e in entries if _FOLDER.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]

    def _at(self, name: str) -> str:
        return os.path.join(self.path, name)

    def write(self, name: str, parts: list[Any]) -> None:
        path = self._at(name)
        beside = os.path.dirname(path)
        for again in (True, False):
            if not os.path.isdir(beside):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(beside)
                _files.sync_folder(self.path)
            try:
                return _files.write_whole(path, parts, folder=self.path)
            except FileNotFoundError:  # another process tidied up
                if not again:
                    raise

    def read(self, name: str, size: int, decode: Decode) -> bool | None:
        path = self._at(name)
        try:
            with _files.open_regular(path) as (file, length):
                # A page is a file: its bytes go where they belong, without a stop.
                if length == size and decode(lambda buffer: _files.read_fully(file, buffer)):
                    return True
                # This version of it alone: another process may be storing it again.
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    os.unlink(path)
        except FileNotFoundError:
            return None
        except OSError:
            pass
        return False

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._at(name))

    def use(self, names: Sequence[str], now: int) -> None:
        for age, name in enumerate(names):
            with contextlib.suppress(OSError):
                os.utime(self._at(name), ns=(now, now - age * 1000), follow_symlinks=False)

    def tidy(self) -> None:
        _files.sweep(self.path)
        for folder in self._folders():
            with contextlib.suppress(OSError):  # of what is not ours it is not empty
                os.rmdir(self._at(folder))


class Objects:
    """A key-value store of tensorstore."""

    at_once = 32  # stores elsewhere take longer to answer

    def __init__(self, kvstore: ts.KvStore):
        self.kvstore = kvstore

    def names(self, prefix: str = "") -> list[str]:
        found = self.kvstore.list(ts.KvStore.KeyRange(prefix, f"{prefix}\x7f")).result(timeout=_OPEN_SECONDS)
        return [name for name in map(os.fsdecode, found) if _layout.parse_name(name)]

    def write(self, name: str, parts: list[Any]) -> None:
        self.kvstore.write(name, b"".join(parts)).result(timeout=_TRANSFER_SECONDS)

    def read(self, name: str, size: int, decode: Decode) -> bool | None:
        try:
            result = self.kvstore.read(name).result(timeout=_TRANSFER_SECONDS)
        except Exception:  # tensorstore raises what it met
            return False
        if result.state != "value":
            return None
        if len(result.value) == size and decode(io.BytesIO(result.value).readinto):
            return True
        with contextlib.suppress(Exception):
            gone = self.kvstore.write(name, None, if_equal=result.stamp.generation)
            gone.result(timeout=_TRANSFER_SECONDS)
        return False

    def remove(self, name: str) -> None:
        self.kvstore.write(name, None).result(timeout=_TRANSFER_SECONDS)

    def use(self, names: Sequence[str], now: int) -> None:
        pass

    def tidy(self) -> None:
        pass


# Opening.


def open_place(path: Any, layout: _layout.Layout) -> Place:
    """The place, with a manifest that fits: an empty one gets it, anywhere else the one there must say the same.

    Raises:
      ValueError, TypeError: path is none, or what is there is something else.
      OSError: the place cannot be read or written, or does not answer.
    """
    spec = _read_spec(path)
    folder = _folder_of(path, spec)
    try:
        return _open_folder(path, folder, layout) if folder else _open_objects(path, spec, layout)
    except TimeoutError as error:
        raise OSError(f"path: no access to {path!r}: no answer within {_OPEN_SECONDS} s") from error
    except OSError as error:
        raise OSError(error.errno, f"path: no access to {path!r}: {error}") from error


def _read_spec(path: Any) -> Any:
    """A specification as tensorstore takes it."""
    if not isinstance(path, dict):
        text = _files.check_path("path", path)
        if "://" not in text:
            return {"driver": "file", "path": os.path.abspath(text)}
        path = text
    try:
        return ts.KvStore.Spec(path).to_json()
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"path: expected a directory, a URL or a specification, got {path!r}: {error}"
        ) from error


def _folder_of(path: Any, spec: dict[str, Any]) -> str | None:
    """The directory that a specification names; None: it is of another kind."""
    inner: Any = spec
    while isinstance(inner, dict):
        driver = inner.get("driver")
        if driver in _READ_ONLY:
            raise ValueError(f"path: expected a store that can be written, got driver {driver!r}, {path!r}")
        if driver == "file":
            folder = inner.get("path", "")
            if not os.path.isabs(folder):
                raise ValueError(f"path: expected an absolute path for driver 'file', got {folder!r}")
            if os.path.realpath(folder).strip("/") == "":
                raise ValueError(f"path: expected a directory of its own, got the root, {path!r}")
            if inner is spec:
                if more := spec.keys() - {"driver", "path"}:
                    raise ValueError(f"path: expected a driver and a path, got {sorted(more)} too, {path!r}")
                return folder
        inner = inner.get("base")
    return None


def _open_folder(path: Any, folder: str, layout: _layout.Layout) -> Folder:
    os.makedirs(folder, exist_ok=True)
    manifest = os.path.join(folder, MANIFEST)
    if not os.path.lexists(manifest):
        with os.scandir(folder) as entries:  # no more than needed: it may be anybody's
            _check_empty(path, next((e.name for e in entries if not _files.is_temporary(e.name)), None))
        with contextlib.suppress(FileExistsError):  # another process was first
            _files.write_whole(manifest, [layout.manifest], replace=False)
    with _files.open_regular(manifest) as (file, size):
        if size > _MOST_MANIFEST_BYTES:
            raise ValueError(f"path: expected the manifest of a storage of pages, got {size} bytes, {path!r}")
        text = bytearray(size)
        _files.read_fully(file, text)
    layout.check_manifest(path, bytes(text))
    _files.sweep(folder)
    return Folder(folder)


def _open_objects(path: Any, spec: dict[str, Any], layout: _layout.Layout) -> Objects:
    def ask(future: ts.Future) -> Any:
        try:
            return future.result(timeout=_OPEN_SECONDS)
        except ValueError as error:  # tensorstore's for whatever went wrong
            raise OSError(errno.EIO, str(error)) from error

    if (inside := spec.get("path")) and not inside.endswith("/"):
        spec = {**spec, "path": f"{inside}/"}
    kvstore = ask(ts.KvStore.open(spec))
    read = ask(kvstore.read(MANIFEST))
    if read.state != "value":
        others = ask(kvstore.list())
        _check_empty(path, os.fsdecode(others[0]) if others else None)
        ask(kvstore.write(MANIFEST, layout.manifest, if_equal=read.stamp.generation))
        read = ask(kvstore.read(MANIFEST))  # ours, or that of another process which was first
    layout.check_manifest(path, read.value)
    return Objects(kvstore)


def _check_empty(path: Any, other: str | None) -> None:
    if other is not None:
        raise ValueError(
            f"path: expected a storage of pages or an empty place, got one with {other!r} and without "
            f"{MANIFEST!r}, {path!r}"
        )
