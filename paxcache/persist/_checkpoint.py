"""Checkpoints: the complete state of a run as one value on disk.

A checkpoint holds three things: a description of the tree in JSON (`_tree_json`), the bytes of what lives on the host
(a prefix index, NumPy arrays), and JAX arrays, which Orbax writes and reads shard by shard. Each of the three is
checked: the description and the bytes by CRC-32, an array by a sum over its elements that does not depend on how it is
split over devices.

`path` is a directory of checkpoints ``state-N``. Orbax writes each under another name and renames it when it is whole;
the one before it goes after that. So there is a whole one at any time, and the newest one counts. What is there
besides is left alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax

from paxcache import _checks, _files
from paxcache.persist import _tree_json
from paxcache.persist._tree_json import MalformedError

_HEADER = {"format": "paxcache checkpoint", "version": 2}
_NAME = re.compile(r"state-(0|[1-9][0-9]*)")
_LEFTOVER = re.compile(r"state-(0|[1-9][0-9]*)\.orbax-checkpoint-tmp.*")
_COMMITTED = "commit_success.txt"  # Orbax writes it last
_PARTS = {"tree", "arrays", "host", _COMMITTED, "_CHECKPOINT_METADATA", "descriptor"}
_MOST_DESCRIPTION_BYTES = 2**32
_STORED_RAW_BYTES = 2**20  # larger values lie in the files as they are


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """u32: the sum of each element's bits mixed with its place.

    Integers may be added in any order: every sharding gives the same sum, each device reads what it has, and nothing
    goes to the host. The mix is one to one for each place, so another value of a single element is always found, and
    anything else but once in 2**32.
    """
    x = jax.device_put(x, jax.memory.Space.Device)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_ or jax.dtypes.itemsize_bits(x.dtype) < 8:
        x = x.astype(jnp.int8 if not jnp.issubdtype(x.dtype, jnp.floating) else jnp.bfloat16)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    # 8 bytes become a last axis of two. No float is cut out: XLA may compute with NaNs of its own on the way.
    words = lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    h = words ^ place * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the last steps of MurmurHash3
        h = (h ^ h >> shift) * jnp.uint32(factor)
    return jnp.sum(h ^ h >> 16, dtype=jnp.uint32)


def _text_checksum(described: dict[str, Any]) -> int:
    """Of a description, but for this checksum itself."""
    rest = {name: value for name, value in described.items() if name != "checksum"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _place(memory_kind: str | None) -> jax.sharding.Sharding:
    """The default device, in memory of the kind that an array was saved from, if it has it."""
    default = _checks.default_device()
    kinds = [memory.kind for memory in default.addressable_memories()]
    return jax.sharding.SingleDeviceSharding(
        default, memory_kind=memory_kind if memory_kind in kinds else None
    )


# On disk.


def _root(path: Any) -> epath.Path:
    text = _files.check_path("path", path)
    try:
        return epath.Path(text if "://" in text else os.path.abspath(text))
    except (KeyError, ValueError) as error:
        raise ValueError(f"path: expected a directory, or a URL that Orbax knows, got {text!r}") from error


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_compression=False)  # random-looking bits do not compress


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(tree=ocp.JsonCheckpointHandler(), arrays=_handler(), host=_handler())
    )


def _numbered(root: epath.Path, pattern: re.Pattern) -> dict[int, epath.Path]:
    """What lies in a directory under names of a kind, by number."""
    if not root.is_dir():
        return {}
    return {int(match[1]): entry for entry in root.iterdir() if (match := pattern.fullmatch(entry.name))}


def _is_ours(state: epath.Path) -> bool:
    """Whether a directory is a checkpoint or what is left of one, and nobody else's."""
    if "://" not in os.fspath(state) and os.path.islink(state):
        return False
    return state.is_dir() and all(entry.name in _PARTS for entry in state.iterdir())


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a whole state to disk, in place of the one that was there. A save that dies leaves the old one.

    The tree may hold JAX arrays of any dtype and sharding, typed random keys, caches, tickets, extents, accounts and
    tiers of host memory, prefix indices of both kinds, NumPy arrays, plain Python values, and other pytrees of them.

    Args:
      path: a directory, or a URL that Orbax knows, such as ``gs://bucket/path``; made if needed. It is for this one
        checkpoint and for one process that saves.
      tree: the state. Stays as it is.

    Raises:
      TypeError: path is none; or a leaf is none of these, or traced.
      ValueError: path is none; or the tree has more than 200 levels, a deleted array or an int of over 4000 digits.
      OSError: it could not be written: the disk is full, say. The old checkpoint is still there.

    Example: see `load`.

    Reference: Orbax.
    """
    root, made = _root(path), _tree_json.describe(tree)
    arrays = {str(i): x for i, x in enumerate(made.arrays) if x.size}
    sums = jax.device_get({number: _checksum(x) for number, x in arrays.items()})
    host = np.frombuffer(made.data or b"\0", np.uint8)
    described = {
        **_HEADER,
        "tree": made.tree,
        "shared": made.shared,
        "types": made.types,
        "checksums": {number: int(sum_) for number, sum_ in sums.items()},
        "host_bytes": host.size,
        "host_checksum": zlib.crc32(host),
    }
    described["checksum"] = _text_checksum(described)
    items = {"tree": ocp.args.JsonSave(described), "host": ocp.args.PyTreeSave({"bytes": host})}
    if arrays:
        items["arrays"] = ocp.args.PyTreeSave(arrays)
    try:
        root.mkdir(parents=True, exist_ok=True)
        old, stopped = _numbered(root, _NAME), _numbered(root, _LEFTOVER)
        for leftover in stopped.values():
            leftover.rmtree()
        # A number of its own: threads of a save that failed in this process may still write.
        place = root / f"state-{max((*old, *stopped), default=0) + 1}"
        with _checkpointer() as checkpointer:
            checkpointer.save(place, ocp.args.Composite(**items))
        for state in old.values():
            if _is_ours(state):
                state.rmtree()
    except Exception as error:  # Orbax raises what it met
        _sweep(root)  # the disk may be full
        raise OSError(f"path: could not save to {os.fspath(path)!r}: {error}") from error


def _sweep(root: epath.Path) -> None:
    """Empties what a save that failed has left, as far as it can. Its number stays taken until the next save."""
    with contextlib.suppress(Exception):
        for leftover in _numbered(root, _LEFTOVER).values():
            for entry in leftover.iterdir():
                entry.rmtree() if entry.is_dir() else entry.unlink()


def load(path: str | os.PathLike[str], target: Any = None) -> Any:
    """Reads a state that `save` wrote, bit for bit.

    Without a target everything comes back as it was saved, on the first device, host memory included. A target is a
    tree like the state that says where and as what to put its arrays; a part of it may be

    - None: as it was saved;
    - a sharding, which holds, its kind of memory included, for all arrays inside;
    - an array or a `jax.ShapeDtypeStruct`, whose sharding is used, if it has one.

    Its shapes and dtypes are those that were saved; for a larger or smaller pool call `offload.resize` on the cache.

    A pytree of a type that neither Python nor this library defines needs one, since it is built like its target.
    Reading runs no code that a checkpoint names, and gives the whole state or an error: kinds, types of fields, shapes
    and lengths are checked before anything is built of them. Whether a cache's and an index's numbers agree is what
    `paxcache.check` tells.

    Everything is compared with the checksums that were saved; a difference is an error that names the leaf. Arrays are
    read once more for that, where they lie: on a GPU that takes as long as reading its memory. Arrays in host memory
    visit the device.

    Args:
      path: as in `save`.
      target: what to load into; None: all as it was saved.

    Returns:
      The state.

    Raises:
      FileNotFoundError: there is no whole checkpoint.
      ValueError, TypeError: path is none; or the checkpoint was written in another format or version, is damaged, or
        does not fit the target.
      OSError: it could not be read.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, paxcache
      >>> from paxcache import offload, persist, prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([8, 0]), num_tokens=8)
      >>> cache, index = prefix.publish(cache, prefix.init(config), 0, list(range(8)))
      >>> folder = tempfile.TemporaryDirectory()
      >>> persist.save(folder.name, {"cache": cache, "index": index, "key": jax.random.key(7)})
      >>> state = persist.load(folder.name)
      >>> state["cache"].seq_lens.tolist(), prefix.match(state["index"], list(range(8))).num_tokens
      ([8, 0], 8)
      >>> paxcache.stats(offload.resize(state["cache"], 64)).num_free_pages.item()
      62
      >>> folder.cleanup()

    Reference: Orbax.
    """
    root = _root(path)
    whole = {
        number: state
        for number, state in _numbered(root, _NAME).items()
        if state.is_dir() and (state / _COMMITTED).exists()
    }
    if not whole:
        raise FileNotFoundError(
            f"path: expected a checkpoint that save wrote, got none in {os.fspath(path)!r}"
        )
    place = whole[max(whole)]
    try:
        return _load(place, target)
    except MalformedError as error:
        raise ValueError(f"path: {error}, {os.fspath(path)!r}") from error


def _load(place: epath.Path, target: Any) -> Any:
    """The state of one checkpoint; MalformedError where that is not one."""
    num_bytes = _check_files(place)
    described = _read_description(place / "tree" / "metadata")
    data = _read_host(place, described["host_bytes"], num_bytes)
    _check_sum("values beside the arrays", zlib.crc32(data), described["host_checksum"])
    reader = _tree_json.Reader(described["tree"], described["shared"], described["types"], data, target)
    wanted, sums = reader.plan(), described["checksums"]
    stored = {str(number): w for number, w in wanted.items() if math.prod(w.shape)}
    if sums.keys() != stored.keys():
        raise MalformedError(f"expected checksums of arrays {sorted(stored)}, got those of {sorted(sums)}")
    arrays = _read_arrays(place, stored, num_bytes)
    found = jax.device_get({number: _checksum(x) for number, x in arrays.items()})
    for number, sum_ in found.items():
        _check_sum(stored[number].path, int(sum_), sums[number])
    everything = {
        number: arrays[str(number)] if str(number) in arrays else _empty(w) for number, w in wanted.items()
    }
    return reader.build(everything)


def _empty(wanted: _tree_json.Wanted) -> jax.Array:
    """An array without elements, which Orbax does not store."""
    try:
        array = jnp.zeros(wanted.shape, wanted.dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise MalformedError(f"expected a shape, got {wanted.shape} at {wanted.path}") from error
    return jax.device_put(array, wanted.sharding or _place(wanted.memory_kind))


def _check_files(place: epath.Path) -> int | None:
    """Bytes of all files of a checkpoint on this machine, of which nothing but regular files are read."""
    if "://" in os.fspath(place):
        return None
    num_bytes = 0
    for folder, folders, files in os.walk(place):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            found = os.stat(path)
            if name in files:
                if not stat.S_ISREG(found.st_mode):
                    raise MalformedError(f"expected a file, got {_files.describe(found.st_mode)}, {path!r}")
                num_bytes += found.st_size
            elif os.path.islink(path):
                raise MalformedError(f"expected a directory, got a link to one, {path!r}")
    return num_bytes


def _read_description(path: epath.Path) -> dict[str, Any]:
    """A description that was written by this version, and is what was written."""
    try:
        size = path.stat().length
    except FileNotFoundError:
        raise MalformedError("damaged: expected a description, got none") from None
    if size > _MOST_DESCRIPTION_BYTES:
        raise MalformedError(f"damaged: expected a description, got {size} bytes")
    described = _tree_json.read_json(path.read_bytes())
    for name, value in _HEADER.items():
        found = described.get(name) if isinstance(described, dict) else described
        if type(found) is not type(value) or found != value:
            raise MalformedError(f"expected {name} {value!r}, got {found!r:.80}")
    try:
        found = _text_checksum(described)
    except RecursionError:
        raise MalformedError("expected a description, got too many levels") from None
    _check_sum("the description", found, described.get("checksum"))
    sums = described.get("checksums")
    if not isinstance(sums, dict) or not _are_natural(*sums.values()):
        raise MalformedError(f"expected checksums of arrays, got {sums!r:.80}")
    for name in ("host_bytes", "host_checksum"):
        if not _are_natural(described.get(name)):
            raise MalformedError(f"expected {name}, got {described.get(name)!r:.80}")
    for name in ("tree", "shared", "types"):
        if name not in described:
            raise MalformedError(f"expected {name} in the description, got {sorted(described)}")
    return described


def _are_natural(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _restore(place: epath.Path, restore_args: dict[str, Any]) -> dict[str, Any]:
    try:
        return dict(_handler().restore(place, args=ocp.args.PyTreeRestore(restore_args=restore_args)))
    except OSError:
        raise
    except Exception as error:  # Orbax raises what it met
        raise MalformedError(f"could not read {place.name}: {error}") from error


def _check_stored(
    place: epath.Path, expected: dict[str, tuple[tuple[int, ...], str]], num_bytes: int | None
) -> None:
    """Arrays are there, by name, in these shapes and dtypes, and in that many bytes of files."""
    try:
        stored: Any = _handler().metadata(place)
        found = {name: (tuple(m.shape), str(m.dtype)) for name, m in dict(stored).items()}
    except OSError:
        raise
    except Exception as error:  # Orbax raises what it met
        raise MalformedError(f"could not read {place.name}: {error}") from error
    if found != expected:
        raise MalformedError(f"damaged: expected {expected} in {place.name}, got {found}")
    sizes = [math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in expected.values()]
    raw = sum(size for size in sizes if size > _STORED_RAW_BYTES)
    if num_bytes is not None and raw > num_bytes:
        raise MalformedError(f"damaged: expected {raw} bytes in {place.name}, got files of {num_bytes}")


def _read_host(place: epath.Path, size: int, num_bytes: int | None) -> bytes:
    _check_stored(place / "host", {"bytes": ((size,), "uint8")}, num_bytes)
    as_numpy = {"bytes": ocp.RestoreArgs(restore_type=np.ndarray)}
    return _restore(place / "host", as_numpy)["bytes"].tobytes()


def _read_arrays(
    place: epath.Path, wanted: dict[str, _tree_json.Wanted], num_bytes: int | None
) -> dict[str, jax.Array]:
    if not wanted:
        return {}
    _check_stored(place / "arrays", {name: (w.shape, w.dtype) for name, w in wanted.items()}, num_bytes)
    restore_args = {
        name: ocp.ArrayRestoreArgs(
            sharding=w.sharding or _place(w.memory_kind), global_shape=w.shape, dtype=jnp.dtype(w.dtype)
        )
        for name, w in wanted.items()
    }
    return _restore(place / "arrays", restore_args)


def _check_sum(what: str, found: int, expected: Any) -> None:
    if found != expected:
        raise MalformedError(f"damaged: expected checksum {expected} of {what}, got {found}")
