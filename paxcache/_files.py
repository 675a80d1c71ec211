"""Files that are there in one piece or not at all. Knows paths and bytes, nothing of caches.

A file is written under a name of its own (`SUFFIX`), synced, and renamed. Its writer holds a lock on it meanwhile,
which the kernel drops when the process ends, however it ends. So `sweep` can tell what a killed writer left from what
a living one is still writing. Only regular files are ever opened: a FIFO would wait for its other end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterable

SUFFIX = ".paxcache-tmp"
_STALE_SECONDS = 3600  # where a file system has no locks


def check_path(name: str, value: Any) -> str:
    """A path as text, not empty."""
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str):
        raise TypeError(f"{name}: expected str or os.PathLike, got {value!r}")
    if not path or "\0" in path:
        raise ValueError(f"{name}: expected a path, got {path!r}")
    return path


def describe(mode: int) -> str:
    """What a file of this mode is."""
    kinds = {
        stat.S_ISDIR: "a directory",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISREG: "a regular file",
    }
    return next((text for test, text in kinds.items() if test(mode)), "a device")


def check_regular(path: str, mode: int) -> None:
    """Refuses what is no regular file."""
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"expected a regular file, got {describe(mode)}", path)


@contextlib.contextmanager
def open_regular(path: str):
    """A regular file to read, unbuffered, and its length. Never waits.

    Raises:
      OSError: it is another kind of file, or cannot be read.
    """
    check_regular(path, os.stat(path).st_mode)  # opening a device may do something
    with open(path, "rb", buffering=0, opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        check_regular(path, found.st_mode)
        yield file, found.st_size


def read_fully(file: BinaryIO, buffer: Any) -> int:
    """Fills a buffer of bytes; how many there were. A single read moves 2 GiB at most."""
    view, done = memoryview(buffer), 0
    while done < len(view) and (count := file.readinto(view[done:])):  # type: ignore[attr-defined]
        done += count
    return done


def write_whole(path: str, parts: Iterable[Any], *, folder: str | None = None, replace: bool = True) -> None:
    """Writes a file in one piece or not at all; it is durable when this returns.

    Args:
      path: the file.
      parts: its bytes.
      folder: where it lies until it is whole, on the same file system; None: beside its place.
      replace: whether it may replace one that is there.

    Raises:
      FileExistsError: one is there, and replace is False.
      OSError: it could not be written: the disk is full, say. What was there before still is.
    """
    beside = os.path.dirname(path) or "."
    file, temporary = _begin(folder or beside)
    try:
        try:
            for part in parts:
                view = memoryview(part)
                while view:
                    view = view[os.write(file, view) :]
            os.fsync(file)
            if replace:
                os.replace(temporary, path)
            else:
                _link(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    finally:
        os.close(file)
    sync_folder(beside)


def _link(temporary: str, path: str) -> None:
    """Gives a file its name if that is free."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def sync_folder(folder: str) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not sync folders
            raise
    finally:
        os.close(handle)


def sweep(folder: str) -> None:
    """Removes from a folder what writers left there that are gone. Those that still write keep theirs."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if is_temporary(entry.name)]:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError), open_regular(path) as (file, _):
                if _is_left(file.fileno()):
                    os.unlink(path)


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one that is being written, or was."""
    return name.startswith(".") and name.endswith(SUFFIX)


def _begin(folder: str) -> tuple[int, str]:
    """A new file, and its path, that is locked as long as it is open."""
    while True:
        path = os.path.join(folder, f".{secrets.token_hex(8)}{SUFFIX}")
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        # A sweeper that came between has it locked, or has removed it.
        if _lock(file) is not False and os.fstat(file).st_nlink:
            return file, path
        os.close(file)


def _lock(file: int) -> bool | None:
    """Locks a file. False: another has it locked; None: there are no locks here."""
    try:
        import fcntl  # noqa: PLC0415 (not on every system)

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _is_left(file: int) -> bool:
    """Whether nobody writes a file any more."""
    locked = _lock(file)
    return time.time() - os.fstat(file).st_mtime > _STALE_SECONDS if locked is None else locked
