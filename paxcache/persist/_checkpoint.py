"""Checkpoints: the complete state of a run as one value on disk. Imports `prefix`, `offload`, Orbax and tensorstore.

A checkpoint holds three things: a description of the tree in JSON, the bytes of what lives on the host (a prefix
index, NumPy arrays), and JAX arrays, which Orbax writes and reads shard by shard. The description names types of this
library and of Python that are built from their parts, and nothing that could be called: reading one runs no code of its
writer's. Types that it does not know are taken from the target. Each of the three is checked: the description and the
bytes by CRC-32, an array by a sum over its elements that does not depend on how it is split over devices.

`path` is a directory of checkpoints ``state-N``. Orbax writes each under another name and renames it when it is whole;
the one before it goes after that. So there is a whole one at any time, and the newest one counts.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import os
import re
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax import lax
from jax.core import Tracer

from paxcache import _checks, _quantize, _types, offload
from paxcache.offload import _tier
from paxcache.prefix import _host, _index, _keys, device

if TYPE_CHECKING:
    from collections.abc import Iterator

_HEADER = {"format": "paxcache checkpoint", "version": 2}
_NAME = re.compile(r"state-(\d+)")
_LEFTOVER = re.compile(r"state-(\d+)\.orbax-checkpoint-tmp.*")
_COMMITTED = "commit_success.txt"  # Orbax writes it last

_KNOWN: dict[str, type] = {
    t.__name__: t
    for t in (
        _quantize.QuantizedPages,
        _types.GroupCache,
        _types.PagedKVCache,
        _types.Pages,
        _types.Status,
        offload.Extent,
        offload.Host,
        offload.Ticket,
        _tier.HostTier,
        _tier.Traffic,
        _tier._Block,
        _tier._Entry,
        device.DeviceIndex,
        _index.Cleared,
        _index.Counters,
        _index.Index,
        _index.Node,
        _index.Place,
        _index.Removed,
        _index.Run,
        _index.Stored,
        _index.Tier,
        _keys.ExtraKey,
        _keys.Item,
        _host.Pin,
    )
}
"""What a description may name: classes of values, built from their fields."""

_CHANGED: dict[str, set[str]] = {
    "PagedKVCache": {"epochs"},
    "Ticket": {"epochs"},
    "Index": {"row_epochs"},
    "GroupCache": {"query_group"},
}
"""Fields that are there in one version and not in another: before rows had epochs, the index had them."""


def _known(name: str) -> type:
    if name not in _KNOWN:
        raise ValueError(f"path: expected a type of this library, got {name!r}")
    return _KNOWN[name]


def _fields(cls: type) -> list[str]:
    return list(cls._fields) if issubclass(cls, tuple) else [f.name for f in dataclasses.fields(cls)]  # type: ignore


@functools.partial(jax.jit, static_argnums=1)
def _checksum(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """Of the part [:dims[0], :dims[1], ...]: u32, the sum of each element's bits mixed with its place.

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
    words = lax.bitcast_convert_type(x, bits)[tuple(map(slice, dims))].astype(jnp.uint32)
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


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class _Writer:
    """Takes a tree apart: `describe` gives JSON, `arrays` and `host` gather what it refers to.

    Plain values stand for themselves; everything else is a list that begins with its kind.
    """

    def __init__(self):
        self.arrays: list[jax.Array] = []
        self.host = bytearray()
        self.shared: list[Any] = []
        self._seen: dict[int, int] = {}

    def describe(self, x: Any, path: str) -> Any:
        kind = type(x)
        if x is None or kind in (bool, int, float, str):
            return x
        if kind is bytes:
            return ["bytes", self._put(x), len(x)]
        if kind in (tuple, list):
            return [kind.__name__, *(self.describe(v, f"{path}[{i}]") for i, v in enumerate(x))]
        if kind is dict:
            return [
                "dict",
                *([self.describe(k, path), self.describe(v, f"{path}[{k!r}]")] for k, v in x.items()),
            ]
        if isinstance(x, Tracer):
            raise TypeError(f"{path}: save writes on the host and cannot run inside jit")
        if isinstance(x, jax.Array):
            return self._describe_array(x, path)
        if isinstance(x, np.dtype):
            return ["dtype", str(x)]
        if isinstance(x, (np.ndarray, np.generic)):
            if x.dtype.hasobject or x.dtype.names is not None:
                raise TypeError(f"{path}: expected an array of numbers, got {x.dtype}")
            name = "numpy" if isinstance(x, np.ndarray) else "numpy scalar"
            return [name, str(x.dtype), list(x.shape), self._put(x.tobytes())]
        if _KNOWN.get(kind.__name__) is kind:
            return self._describe_known(x, path)
        parts = jax.tree_util.default_registry.flatten_one_level(x)
        if parts is None:
            raise TypeError(f"{path}: expected an array, a plain value or a pytree of them, got {x!r}")
        return ["pytree", _type_name(x), *(self.describe(v, f"{path}[{i}]") for i, v in enumerate(parts[0]))]

    def _describe_array(self, x: jax.Array, path: str) -> Any:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return ["key", str(jax.random.key_impl(x)), self._describe_array(jax.random.key_data(x), path)]
        try:
            ts.dtype(x.dtype.name)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{path}: expected an array of a dtype of tensorstore, got {x.dtype}") from error
        self.arrays.append(x)
        return ["array", len(self.arrays) - 1, str(x.dtype), list(x.shape), x.sharding.memory_kind]

    def _describe_known(self, x: Any, path: str) -> Any:
        kind = type(x)
        if isinstance(x, enum.Enum):
            return ["enum", kind.__name__, x.value]
        if kind is _index.Run:  # nodes share it
            if id(x) not in self._seen:
                self._seen[id(x)] = len(self.shared)
                self.shared.append(self._parts(x, {}, path))
            return ["shared", self._seen[id(x)]]
        changed = {"log": tuple(_log(x))} if isinstance(x, _index.Index) else {}
        return self._parts(x, changed, path)

    def _parts(self, x: Any, changed: dict[str, Any], path: str) -> Any:
        values = [(f, changed.get(f, getattr(x, f))) for f in _fields(type(x))]
        return ["known", type(x).__name__, *(self.describe(v, f"{path}.{f}") for f, v in values)]

    def _put(self, data: bytes) -> int:
        at = len(self.host)
        self.host += data
        return at


def _log(index: _index.Index) -> Iterator[Any]:
    """An index's events as a flat sequence, newest first: as they are stored, each is nested in the next."""
    log = index.log
    while log is not None:
        event, log = log
        yield event


class _Wanted(NamedTuple):
    """An array to read."""

    path: str
    """Where it is in the tree."""
    saved: tuple[int, ...]
    """The shape that was saved."""
    shape: tuple[int, ...]
    dtype: str
    sharding: jax.sharding.Sharding


class _Reader:
    """Puts a tree together. While there are no `arrays`, it notes in `wanted` how to read them and takes shapes."""

    def __init__(self, described: dict[str, Any], host: bytes):
        self.described, self.host = described, host
        self.wanted: dict[str, _Wanted] = {}
        self.arrays: dict[str, jax.Array] | None = None
        self._shared: dict[int, Any] = {}

    def build(self, node: Any, target: Any, path: str, grow: int | None = None) -> Any:
        """The value of a node. Along the axis `grow` a target's arrays may be longer than those that were saved."""
        if not isinstance(node, list):
            return node
        kind, *rest = node
        match kind:
            case "bytes":
                at, size = rest
                return self.host[at : at + size]
            case "tuple" | "list":
                cls = tuple if kind == "tuple" else list
                targets = _children(target, cls, path, range(len(rest)))
                return cls(
                    self.build(part, t, f"{path}[{i}]", grow)
                    for i, (part, t) in enumerate(zip(rest, targets, strict=True))
                )
            case "dict":
                keys = [self.build(key, None, path) for key, _ in rest]
                targets = _children(target, dict, path, keys)
                return {
                    key: self.build(part, t, f"{path}[{key!r}]", grow)
                    for key, (_, part), t in zip(keys, rest, targets, strict=True)
                }
            case "known":
                return self._build_known(rest[0], rest[1:], target, path, grow)
            case "shared":
                if rest[0] not in self._shared:
                    self._shared[rest[0]] = self.build(self.described["shared"][rest[0]], None, path)
                return self._shared[rest[0]]
            case "dtype":
                return np.dtype(rest[0])
            case "enum":
                return _known(rest[0])(rest[1])
            case "pytree":
                return self._build_pytree(rest[0], rest[1:], target, path)
            case "numpy" | "numpy scalar":
                dtype, shape, at = rest
                if _has_shape(target):
                    _check_like(target, dtype, tuple(shape), path)
                array = np.frombuffer(self.host, np.dtype(dtype), math.prod(shape), at).reshape(shape).copy()
                return array if kind == "numpy" else array[()]
            case "key":
                return self._build_key(rest[0], rest[1], target, path)
            case "array":
                return self._build_array(rest, target, path, grow)
        raise ValueError(f"path: expected a description of a tree, got {kind!r} at {path}")

    def _build_known(self, name: str, parts: list[Any], target: Any, path: str, grow: int | None) -> Any:
        cls = _known(name)
        fields, saved = _fields(cls), self.described["types"][name]
        targets = dict(zip(fields, _children(target, cls, path, fields), strict=True))
        if cls is _index.Index:
            targets = {}
        values = {}
        for field, part in zip(saved, parts, strict=True):
            if field in fields:
                axis = _POOL_AXES.get(field) if cls is _types.GroupCache else grow
                values[field] = self.build(part, targets.get(field), f"{path}.{field}", axis)
        if "epochs" in fields and "epochs" not in saved:  # as if no row had been admitted
            lens = values["seq_lens"]
            values["epochs"] = lens if self.arrays is None else jnp.zeros_like(lens)
        if cls is _index.Run:  # which had arrays
            values |= {f: bytes(values[f]) for f in ("ids", "where")}
        if cls is _index.Index:
            log = None
            for event in reversed(values["log"]):
                log = (event, log)
            index = _index.Index(**{**values, "log": log})
            return _grown(index, target, path) if isinstance(target, _index.Index) else index
        if isinstance(target, cls) and dataclasses.is_dataclass(cls):
            for field in dataclasses.fields(cls):
                if field.metadata.get("static") and values[field.name] != getattr(target, field.name):
                    raise ValueError(
                        f"target: expected {values[field.name]!r} as {path}.{field.name}, "
                        f"got {getattr(target, field.name)!r}"
                    )
        if cls is _quantize.QuantizedPages and grow is not None and self.arrays is not None:
            _, _, _, dims, _ = parts[saved.index("scales")]
            scales = values["scales"]  # where a whole layer has one scale, each of its pages holds it
            values["scales"] = scales.at[:, dims[grow] :].set(scales[:, :1])
        return cls(**values)

    def _build_pytree(self, name: str, parts: list[Any], target: Any, path: str) -> Any:
        if _type_name(target) != name:
            raise ValueError(
                f"target: expected a {name} at {path}, which only a target says how to build, got {_shown(target)}"
            )
        targets = list(jax.tree_util.default_registry.flatten_one_level(target)[0])  # type: ignore[index]
        if len(targets) != len(parts):
            raise ValueError(f"target: expected {len(parts)} parts of {path}, got {len(targets)}")
        structure = jax.tree.structure(target, is_leaf=lambda x: x is not target)
        return structure.unflatten(
            self.build(part, t, f"{path}[{i}]")
            for i, (part, t) in enumerate(zip(parts, targets, strict=True))
        )

    def _build_key(self, impl: str, data: list[Any], target: Any, path: str) -> Any:
        if target is not None and not isinstance(target, jax.sharding.Sharding):
            like = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
            _check_like(target, str(like.dtype), tuple(data[3][:-1]), path)
            target = getattr(target, "sharding", None)
        array = self.build(data, target, path)
        return array if self.arrays is None else jax.random.wrap_key_data(array, impl=impl)

    def _build_array(self, node: list[Any], target: Any, path: str, grow: int | None) -> Any:
        number, dtype, dims, memory_kind = node
        if self.arrays is not None:
            return self.arrays[str(number)]
        shape, sharding = tuple(dims), None
        if isinstance(target, jax.sharding.Sharding):
            sharding = target
        elif target is not None:
            _check_like(target, dtype, shape, path, grow)
            shape, sharding = tuple(target.shape), getattr(target, "sharding", None)
        self.wanted[str(number)] = _Wanted(path, tuple(dims), shape, dtype, sharding or _place(memory_kind))
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


_POOL_AXES = {"pages": 1, "ref_counts": 0}
"""Of a group's fields, the axis over its physical pages."""


def _children(target: Any, cls: type, path: str, names: Any) -> list[Any]:
    """The targets of a node's parts: its own where it is None or holds for all inside."""
    names = list(names)
    if target is None or isinstance(target, jax.sharding.Sharding):
        return [target] * len(names)
    if type(target) is not cls:
        raise ValueError(f"target: expected a {cls.__name__} at {path}, got {_shown(target)}")
    if cls in (tuple, list, dict):
        has = list(target) if cls is dict else list(range(len(target)))
        if set(has) != set(names):
            raise ValueError(f"target: expected {names} in {path}, got {has}")
        return [target[name] for name in names]
    return [getattr(target, name) for name in names]


def _has_shape(target: Any) -> bool:
    return hasattr(target, "shape") and hasattr(target, "dtype")


def _shown(target: Any) -> str:
    return _checks.describe(target) if _has_shape(target) else f"a {type(target).__name__}"


def _check_like(target: Any, dtype: str, shape: tuple[int, ...], path: str, grow: int | None = None) -> None:
    """A target's dtype and shape are those that were saved; along `grow` it may be longer."""
    ok = _has_shape(target) and str(target.dtype) == dtype and len(target.shape) == len(shape)
    ok = ok and all(
        new == old or (axis == grow and new > old)
        for axis, (new, old) in enumerate(zip(target.shape, shape, strict=True))
    )
    if not ok:
        longer = "" if grow is None else f" (or longer along axis {grow})"
        raise ValueError(f"target: expected {dtype}{list(shape)}{longer} at {path}, got {_shown(target)}")


def _grown(index: _index.Index, target: _index.Index, path: str) -> _index.Index:
    """An index for caches with more pages."""
    same = all(getattr(index, f) == getattr(target, f) for f in ("page_size", "max_pages", "windows"))
    if not same or any(new < old for new, old in zip(target.num_pages, index.num_pages, strict=True)):
        raise ValueError(
            f"target: expected an index for the saved config with {index.num_pages} pages or more at {path}, got "
            f"{target.num_pages} pages of {target.page_size} and {target.max_pages} a row, windows {target.windows}"
        )
    held = tuple(np.pad(h, (0, new - len(h))) for h, new in zip(index.held, target.num_pages, strict=True))
    return dataclasses.replace(index, num_pages=target.num_pages, held=held)


def _place(memory_kind: str) -> jax.sharding.Sharding:
    """The default device, in memory of the kind that an array was saved from, if it has it."""
    default = _checks.default_device()
    kinds = [memory.kind for memory in default.addressable_memories()]
    return jax.sharding.SingleDeviceSharding(
        default, memory_kind=memory_kind if memory_kind in kinds else None
    )


# On disk.


def _root(path: str | os.PathLike[str]) -> epath.Path:
    text = os.fspath(path)
    return epath.Path(text if "://" in text else os.path.abspath(text))


def _checkpointer() -> ocp.Checkpointer:
    # Random-looking bits do not compress.
    arrays, host = (ocp.PyTreeCheckpointHandler(use_compression=False) for _ in range(2))
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(tree=ocp.JsonCheckpointHandler(), arrays=arrays, host=host)
    )


def _numbered(root: epath.Path, pattern: re.Pattern) -> dict[int, epath.Path]:
    """What lies in a directory under names of a kind, by number."""
    if not root.is_dir():
        return {}
    return {int(match[1]): entry for entry in root.iterdir() if (match := pattern.fullmatch(entry.name))}


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a whole state to disk, in place of the one that was there. A save that dies leaves the old one.

    The tree may hold JAX arrays of any dtype and sharding, typed random keys, caches, tickets, extents, accounts and
    tiers of host memory, prefix indices of both kinds, NumPy arrays, plain Python values, and other pytrees of them.

    Args:
      path: a directory, or a URL that Orbax knows, such as ``gs://bucket/path``; made if needed. It is for this one
        checkpoint and for one process that saves.
      tree: the state. Stays as it is.

    Raises:
      TypeError: a leaf is none of these, or traced.
      OSError: it could not be written: the disk is full, say. The old checkpoint is still there.

    Example: see `load`.

    Reference: Orbax.
    """
    writer = _Writer()
    described = {
        **_HEADER,
        "tree": writer.describe(tree, "tree"),
        "shared": writer.shared,
        "types": {name: _fields(cls) for name, cls in _KNOWN.items() if not issubclass(cls, enum.Enum)},
    }
    arrays = {str(i): x for i, x in enumerate(writer.arrays) if x.size}
    sums = jax.device_get({number: _checksum(x, x.shape) for number, x in arrays.items()})
    described["checksums"] = {number: int(sum_) for number, sum_ in sums.items()}
    host = np.frombuffer(bytes(writer.host) or b"\0", np.uint8)
    described["host_checksum"] = zlib.crc32(host)
    described["checksum"] = _text_checksum(described)
    items = {"tree": ocp.args.JsonSave(described), "host": ocp.args.PyTreeSave({"bytes": host})}
    if arrays:
        items["arrays"] = ocp.args.PyTreeSave(arrays)
    root = _root(path)
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
            state.rmtree()
    except Exception as error:  # Orbax raises what it met
        raise OSError(f"path: could not save to {os.fspath(path)!r}: {error}") from error


def load(path: str | os.PathLike[str], target: Any = None) -> Any:
    """Reads a state that `save` wrote, bit for bit.

    Without a target everything comes back as it was saved, on the first device, host memory included. A target is a
    tree like the state that says where and as what to put its arrays; a part of it may be

    - None: as it was saved;
    - a sharding, which holds, its kind of memory included, for all arrays inside;
    - an array or a `jax.ShapeDtypeStruct`, whose sharding is used, if it has one;
    - a cache or an index with more pages than the saved one: the additional ones are free. To load into a smaller
      pool, call `offload.resize` on what was loaded.

    A pytree of a type that neither Python nor this library defines needs one, since it is built like its target.
    Reading runs no code that a checkpoint names.

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
      ValueError: it was written in another format or version, is damaged, or does not fit the target.
      OSError: it could not be read.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, paxcache
      >>> from paxcache import persist, prefix
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([8, 0]), num_tokens=8)
      >>> cache, index = prefix.publish(cache, prefix.init(config), 0, list(range(8)))
      >>> folder = tempfile.TemporaryDirectory()
      >>> persist.save(folder.name, {"cache": cache, "index": index, "key": jax.random.key(7)})
      >>> state = persist.load(folder.name)
      >>> state["cache"].seq_lens.tolist(), prefix.match(state["index"], list(range(8))).num_tokens
      ([8, 0], 8)
      >>> larger = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, page_size=4, num_pages=64,
      ...                               max_seqs=2, max_pages_per_seq=8)
      >>> target = {"cache": jax.eval_shape(lambda: paxcache.init(larger)), "index": prefix.init(larger), "key": None}
      >>> paxcache.stats(persist.load(folder.name, target)["cache"]).num_free_pages.item()
      62
      >>> folder.cleanup()

    Reference: Orbax.
    """
    root = _root(path)
    whole = {
        number: state for number, state in _numbered(root, _NAME).items() if (state / _COMMITTED).exists()
    }
    if not whole:
        raise FileNotFoundError(
            f"path: expected a checkpoint that save wrote, got none in {os.fspath(path)!r}"
        )
    place = whole[max(whole)]
    with _checkpointer() as checkpointer:

        def read(**items: Any) -> Any:
            try:
                return checkpointer.restore(place, ocp.args.Composite(**items))
            except OSError:
                raise
            except Exception as error:  # Orbax raises what it met
                raise ValueError(f"path: could not read {os.fspath(path)!r}: {error}") from error

        described = read(tree=ocp.args.JsonRestore()).tree
        _check_described(path, described)
        as_numpy = {"bytes": ocp.RestoreArgs(restore_type=np.ndarray)}
        data = read(host=ocp.args.PyTreeRestore(restore_args=as_numpy)).host["bytes"].tobytes()
        _check_sum(path, "values beside the arrays", zlib.crc32(data), described["host_checksum"])
        reader = _Reader(described, data)
        reader.build(described["tree"], target, "tree")
        restore_args = {
            number: ocp.ArrayRestoreArgs(
                sharding=wanted.sharding,
                global_shape=wanted.shape,
                dtype=jnp.dtype(wanted.dtype),
                strict=False,
            )
            for number, wanted in reader.wanted.items()
            if math.prod(wanted.shape)
        }
        arrays = {}
        if restore_args:
            arrays = dict(read(arrays=ocp.args.PyTreeRestore(restore_args=restore_args)).arrays)
    sums = {number: _checksum(x, reader.wanted[number].saved) for number, x in arrays.items()}
    for number, found in jax.device_get(sums).items():
        _check_sum(path, reader.wanted[number].path, int(found), described["checksums"][number])
    for number, wanted in reader.wanted.items():
        if not math.prod(wanted.shape):  # which Orbax does not store
            arrays[number] = jax.device_put(jnp.zeros(wanted.shape, wanted.dtype), wanted.sharding)
    reader.arrays = arrays
    return reader.build(described["tree"], target, "tree")


def _check_sum(path: str | os.PathLike[str], what: str, found: int, expected: Any) -> None:
    if found != expected:
        raise ValueError(
            f"path: damaged: expected checksum {expected} of {what}, got {found}, {os.fspath(path)!r}"
        )


def _check_described(path: str | os.PathLike[str], described: Any) -> None:
    """A description that was written by this version, and is what was written."""
    for name, value in _HEADER.items():
        if not isinstance(described, dict) or described.get(name) != value:
            found = described.get(name) if isinstance(described, dict) else described
            raise ValueError(f"path: expected {name} {value!r}, got {found!r}, {os.fspath(path)!r}")
    _check_sum(path, "the description", _text_checksum(described), described.get("checksum"))
    for name, fields in described["types"].items():
        expected = _fields(_KNOWN[name]) if name in _KNOWN else None
        if expected is None or not set(expected) ^ set(fields) <= _CHANGED.get(name, set()):
            raise ValueError(
                f"path: written by another version of paxcache: expected the fields {expected} of {name}, got {fields}"
            )
