"""A tree as a description in JSON, its arrays, and the bytes of all else; and the tree again.

The description names types from a fixed list, which are built from their fields, and nothing that could be called:
reading one runs no code of its writer's. Other pytrees are built like their target. Plain values stand for themselves;
everything else is a list that begins with its kind.

A description is read as if anybody could have written it. Whatever is not as `describe` writes it is a
`MalformedError` that names the place in the tree: another kind, a field of another type, bytes that are not there, a
name or an array given twice, too many levels.
"""

from __future__ import annotations

import enum
import json
import math
import reprlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.core import Tracer

from paxcache import _checks
from paxcache.persist import _classes
from paxcache.prefix import _index

MAX_DEPTH = 200
"""Levels of a tree. Python's stack takes a thousand calls."""


class MalformedError(ValueError):
    """What was read is not what this library writes. The text begins with what was expected."""


def read_json(text: bytes) -> Any:
    """JSON in which every name of an object is there once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len({*names}) != len(names):
            raise MalformedError(f"expected each name once, got {reprlib.repr(names)}")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except MalformedError:
        raise
    except RecursionError:
        raise MalformedError("expected JSON, got too many levels") from None
    except ValueError as error:
        raise MalformedError(f"expected JSON, got {text[:80]!r}: {error}") from error


class Description(NamedTuple):
    """A tree taken apart."""

    tree: Any
    shared: list[Any]
    """What is there once and is referred to by several nodes."""
    types: dict[str, list[str]]
    """The fields of the types that it names, in order."""
    arrays: list[jax.Array]
    data: bytes


def describe(tree: Any) -> Description:
    """Takes a tree apart.

    Raises:
      TypeError: a leaf is of a type that cannot be described, or a field of another type than its class says.
      ValueError: it has too many levels, a deleted array, or an int that JSON does not take.
    """
    writer = _Writer()
    try:
        node = writer.describe(tree, "tree", 0)
    except RecursionError:
        raise ValueError("tree: expected fewer levels: Python's stack is full") from None
    return Description(node, writer.shared, writer.types, writer.arrays, bytes(writer.data))


class _Writer:
    def __init__(self):
        self.arrays: list[jax.Array] = []
        self.data = bytearray()
        self.shared: list[Any] = []
        self.types: dict[str, list[str]] = {}
        self._seen: dict[int, int] = {}

    def describe(self, x: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"tree: expected at most {MAX_DEPTH} levels, got more at {path}")
        cls, depth = type(x), depth + 1
        if cls is int and abs(x) >= 10**4000:
            raise ValueError(f"{path}: expected an int of at most 4000 digits, got more")
        if x is None or cls in (bool, int, float, str):
            return x
        if cls is bytes:
            return ["bytes", self._put(x), len(x)]
        if cls in (tuple, list):
            return [cls.__name__, *[self.describe(v, f"{path}[{i}]", depth) for i, v in enumerate(x)]]
        if cls is dict:
            return [
                "dict",
                *[
                    [self.describe(k, path, depth), self.describe(v, f"{path}[{k!r}]", depth)]
                    for k, v in x.items()
                ],
            ]
        if isinstance(x, Tracer):
            raise TypeError(f"{path}: save writes on the host and cannot run inside jit")
        if isinstance(x, jax.Array):
            return self._describe_array(x, path)
        if isinstance(x, np.dtype):
            return ["dtype", _dtype_name(x, path)]
        if isinstance(x, (np.ndarray, np.generic)):
            name = "numpy" if isinstance(x, np.ndarray) else "numpy scalar"
            return [name, _dtype_name(x.dtype, path), list(x.shape), self._put(x.tobytes())]
        if _classes.TYPES.get(cls.__name__) is cls:
            return self._describe_known(x, path, depth)
        parts = jax.tree_util.default_registry.flatten_one_level(x)
        if parts is None:
            raise TypeError(f"{path}: expected an array, a plain value or a pytree of them, got {x!r}")
        return [
            "pytree",
            _type_name(x),
            *[self.describe(v, f"{path}[{i}]", depth) for i, v in enumerate(parts[0])],
        ]

    def _describe_array(self, x: jax.Array, path: str) -> Any:
        if x.is_deleted():
            raise ValueError(f"{path}: expected an array, got one that was deleted (donated, say)")
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return ["key", str(jax.random.key_impl(x)), self._describe_array(jax.random.key_data(x), path)]
        try:
            ts.dtype(x.dtype.name)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{path}: expected an array of a dtype of tensorstore, got {x.dtype}") from error
        self.arrays.append(x)
        return ["array", len(self.arrays) - 1, str(x.dtype), list(x.shape), x.sharding.memory_kind]

    def _describe_known(self, x: Any, path: str, depth: int) -> Any:
        cls = type(x)
        if isinstance(x, enum.Enum):
            return ["enum", cls.__name__, x.value]
        if cls is not _index.Run:
            return self._parts(x, path, depth)
        if id(x) not in self._seen:  # nodes share it
            self._seen[id(x)] = len(self.shared)
            self.shared.append(self._parts(x, path, depth))
        return ["shared", self._seen[id(x)]]

    def _parts(self, x: Any, path: str, depth: int) -> Any:
        cls = type(x)
        names = self.types[cls.__name__] = _classes.fields(cls)
        values = [getattr(x, name, None) for name in names]
        if wrong := _classes.misfit(cls, values):
            raise TypeError(f"{path}.{wrong.field}: expected {wrong.expected}, got {_shown(wrong.value)}")
        if cls is _index.Index:
            values[names.index("log")] = _flat(x.log)
        parts = [self.describe(v, f"{path}.{name}", depth) for name, v in zip(names, values, strict=True)]
        return ["known", cls.__name__, *parts]

    def _put(self, data: bytes) -> int:
        at = len(self.data)
        self.data += data
        return at


def _flat(log: Any) -> tuple[Any, ...]:
    """An index's events as a flat sequence, newest first: as they are stored, each is nested in the next."""
    events = []
    while log is not None:
        event, log = log
        events.append(event)
    return tuple(events)


def _nested(events: tuple[Any, ...]) -> Any:
    """The reverse of `_flat`."""
    log = None
    for event in reversed(events):
        log = (event, log)
    return log


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _dtype_name(dtype: np.dtype, path: str) -> str:
    """A dtype that its name gives back."""
    if dtype.hasobject or dtype.names is not None or dtype.subdtype is not None:
        raise TypeError(f"{path}: expected an array of numbers, got {dtype}")
    return str(dtype)


def _dtype(name: str, path: str) -> np.dtype:
    try:
        dtype = np.dtype(name)
        if _dtype_name(dtype, path) == name:
            return dtype
    except (TypeError, ValueError, SyntaxError):
        pass
    raise MalformedError(f"expected a dtype, got {reprlib.repr(name)} at {path}")


class Wanted(NamedTuple):
    """An array to read."""

    path: str
    """Where it is in the tree."""
    shape: tuple[int, ...]
    dtype: str
    sharding: jax.sharding.Sharding | None
    """The target's, if it says."""
    memory_kind: str | None
    """Where it was."""


class Reader:
    """Puts a tree together: `plan` says which arrays are needed, `build` takes them.

    Args:
      tree, shared, types, data: as in a `Description`, by anybody.
      target: a tree like it that says where its arrays go and what they are; see `persist.load`.

    Raises:
      MalformedError: the types are not those of this version.
    """

    def __init__(self, tree: Any, shared: Any, types: Any, data: bytes, target: Any):
        if not isinstance(shared, list) or not isinstance(types, dict):
            raise MalformedError(
                f"expected a list of shared values and types by name, got {_short(shared, types)}"
            )
        for name, names in types.items():
            expected = _classes.fields(_classes.TYPES[name]) if name in _classes.TYPES else None
            if expected is None or expected != names:
                raise MalformedError(
                    f"written by another version of paxcache: expected the fields {expected} of {name}, "
                    f"got {_short(names)}"
                )
        self._tree, self._described, self._types, self._data = tree, shared, types, data
        self._target = target
        self._arrays: dict[int, Any] | None = None
        self._wanted: dict[int, Wanted] = {}
        self._shared: dict[int, Any] = {}

    def plan(self) -> dict[int, Wanted]:
        """The arrays to read, by number.

        Raises:
          MalformedError: the description is not one that `describe` writes.
          ValueError: it does not fit the target.
        """
        self._build_tree()
        return self._wanted

    def build(self, arrays: dict[int, jax.Array]) -> Any:
        """The tree, with the arrays that were planned."""
        self._arrays = arrays
        return self._build_tree()

    def _build_tree(self) -> Any:
        self._shared = {}
        try:
            return self._build(self._tree, self._target, "tree", 0)
        except RecursionError:
            raise ValueError("tree: expected fewer levels: Python's stack is full") from None

    def _build(self, node: Any, target: Any, path: str, depth: int) -> Any:
        """The value of a node; while there are no arrays, with their shapes in their places."""
        if depth > MAX_DEPTH:
            raise MalformedError(f"expected at most {MAX_DEPTH} levels, got more at {path:.80}...")
        depth += 1
        match node:
            case None | bool() | int() | float() | str():
                return node
            case ["bytes", at, size] if _natural(at, size) and at + size <= len(self._data):
                return self._data[at : at + size]
            case ["tuple" | "list" as kind, *parts]:
                cls = tuple if kind == "tuple" else list
                targets = _children(target, cls, path, range(len(parts)))
                return cls(
                    [
                        self._build(part, t, f"{path}[{i}]", depth)
                        for i, (part, t) in enumerate(zip(parts, targets, strict=True))
                    ]
                )
            case ["dict", *pairs] if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
                return self._build_dict(pairs, target, path, depth)
            case ["known", str(name), *parts]:
                return self._build_known(name, parts, target, path, depth)
            case ["shared", number] if _natural(number) and number < len(self._described):
                return self._build_shared(number, path, depth)
            case ["dtype", str(name)]:
                return _dtype(name, path)
            case ["enum", str(name), value] if type(value) in (int, str):
                return _member(name, value, path)
            case ["pytree", str(name), *parts]:
                return self._build_pytree(name, parts, target, path, depth)
            case ["numpy" | "numpy scalar" as kind, str(name), list(shape), at] if _natural(*shape, at):
                array = self._build_numpy(_dtype(name, path), tuple(shape), at, target, path)
                if kind == "numpy":
                    return array
                if not shape:
                    return array[()]
            case ["key", str(impl), ["array", _, "uint32", list(shape), _] as data] if _natural(*shape):
                return self._build_key(impl, data, target, path, depth)
            case ["array", number, str(name), list(shape), str() | None as memory_kind] if _natural(
                number, *shape
            ):
                return self._build_array(number, name, tuple(shape), memory_kind, target, path)
            case [str(kind), *rest]:
                raise MalformedError(
                    f"expected a description of a tree, got {kind!r:.80} of {_short(rest)} at {path}"
                )
        raise MalformedError(f"expected a description of a tree, got {_short(node)} at {path}")

    def _build_dict(self, pairs: list[Any], target: Any, path: str, depth: int) -> dict[Any, Any]:
        keys = [self._build(key, None, path, depth) for key, _ in pairs]
        try:
            different = len({*keys}) == len(keys)
        except TypeError:
            different = False
        if not different:
            raise MalformedError(f"expected keys of a dict, each once, got {_short(keys)} at {path}")
        targets = _children(target, dict, path, keys)
        return {
            key: self._build(part, t, f"{path}[{key!r}]", depth)
            for key, (_, part), t in zip(keys, pairs, targets, strict=True)
        }

    def _build_shared(self, number: int, path: str, depth: int) -> Any:
        if number not in self._shared:
            value = self._build(self._described[number], None, path, depth)
            if not isinstance(value, _index.Run):
                raise MalformedError(f"expected a run of pages, got {_short(value)} at {path}")
            self._shared[number] = value
        return self._shared[number]

    def _build_known(self, name: str, parts: list[Any], target: Any, path: str, depth: int) -> Any:
        cls = _known(name)
        names = self._types.get(name)
        if issubclass(cls, enum.Enum) or names is None or len(names) != len(parts):
            raise MalformedError(f"expected the fields {names} of {name}, got {_short(parts)} at {path}")
        targets = _children(target, cls, path, names)
        if cls is _index.Index:  # whose parts have no places
            targets = [None] * len(names)
        values = [
            self._build(part, t, f"{path}.{field}", depth)
            for field, part, t in zip(names, parts, targets, strict=True)
        ]
        if cls is _index.Index:
            log = names.index("log")
            if not isinstance(values[log], tuple):
                raise MalformedError(f"expected a tuple of events, got {_short(values[log])} at {path}.log")
            values[log] = _nested(values[log])
        if wrong := _classes.misfit(cls, values):
            raise MalformedError(
                f"expected {wrong.expected}, got {_short(wrong.value)} at {path}.{wrong.field}"
            )
        if isinstance(target, cls):
            for field, value in zip(names, values, strict=True):
                if _classes.is_static(cls, field) and value != getattr(target, field, None):
                    raise ValueError(
                        f"target: expected {value!r} as {path}.{field}, got {getattr(target, field, None)!r}"
                    )
        try:
            return cls(**dict(zip(names, values, strict=True)))
        except (TypeError, ValueError) as error:  # classes that check their fields
            raise MalformedError(f"expected a {name}, got {_short(values)} at {path}: {error}") from error

    def _build_pytree(self, name: str, parts: list[Any], target: Any, path: str, depth: int) -> Any:
        one_level = jax.tree_util.default_registry.flatten_one_level(target)
        if _type_name(target) != name or one_level is None:
            raise ValueError(
                f"target: expected a {name} at {path}, which only a target says how to build, got {_shown(target)}"
            )
        targets = list(one_level[0])
        if len(targets) != len(parts):
            raise ValueError(f"target: expected {len(parts)} parts of {path}, got {len(targets)}")
        structure = jax.tree.structure(target, is_leaf=lambda x: x is not target)
        return structure.unflatten(
            [
                self._build(part, t, f"{path}[{i}]", depth)
                for i, (part, t) in enumerate(zip(parts, targets, strict=True))
            ]
        )

    def _build_numpy(self, dtype: np.dtype, shape: tuple[int, ...], at: int, target: Any, path: str) -> Any:
        if _has_shape(target):
            _check_like(target, str(dtype), shape, path)
        if at + math.prod(shape) * dtype.itemsize > len(self._data):
            raise MalformedError(f"expected {dtype}{list(shape)} within {len(self._data)} bytes at {path}")
        try:
            return np.ndarray(shape, dtype, self._data, at).copy()
        except (ValueError, TypeError, OverflowError) as error:
            raise MalformedError(
                f"expected an array, got shape {_short(shape)} at {path}: {error}"
            ) from error

    def _build_key(self, impl: str, data: Any, target: Any, path: str, depth: int) -> Any:
        try:
            like = jax.eval_shape(lambda: jax.random.key(0, impl=impl))
            width = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape
        except (ValueError, TypeError) as error:
            raise MalformedError(f"expected a kind of random keys, got {impl!r:.80} at {path}") from error
        keys = tuple(data[3][: len(data[3]) - len(width)])
        if tuple(data[3]) != (*keys, *width):
            raise MalformedError(
                f"expected data of {impl} keys {list(width)}, got {_short(data[3])} at {path}"
            )
        if target is not None and not isinstance(target, jax.sharding.Sharding):
            _check_like(target, str(like.dtype), keys, path)
            target = getattr(target, "sharding", None)
        array = self._build(data, target, path, depth)
        return array if self._arrays is None else jax.random.wrap_key_data(array, impl=impl)

    def _build_array(
        self, number: int, name: str, shape: tuple[int, ...], memory_kind: str | None, target: Any, path: str
    ) -> Any:
        if self._arrays is not None:
            return self._arrays[number]
        dtype, sharding = _dtype(name, path), None
        if jax.dtypes.canonicalize_dtype(dtype) != dtype:
            raise ValueError(f"path: {name}{list(shape)} at {path} needs jax_enable_x64, which is off")
        if isinstance(target, jax.sharding.Sharding):
            sharding = target
        elif target is not None:
            _check_like(target, name, shape, path)
            sharding = getattr(target, "sharding", None)
        if number in self._wanted:
            raise MalformedError(f"expected each array once, got {number} again at {path}")
        self._wanted[number] = Wanted(path, shape, name, sharding, memory_kind)
        return jax.ShapeDtypeStruct(shape, dtype)


def _natural(*values: Any) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _short(*values: Any) -> str:
    return ", ".join(map(reprlib.repr, values))


def _known(name: str) -> type:
    if name not in _classes.TYPES:
        raise MalformedError(f"expected a type of this library, got {name!r:.80}")
    return _classes.TYPES[name]


def _member(name: str, value: Any, path: str) -> Any:
    cls = _known(name)
    if issubclass(cls, enum.Enum) and any(type(m.value) is type(value) and m.value == value for m in cls):
        return cls(value)
    raise MalformedError(f"expected a member of {name}, got {value!r:.80} at {path}")


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
    return [getattr(target, name, None) for name in names]


def _has_shape(target: Any) -> bool:
    return isinstance(getattr(target, "shape", None), tuple) and hasattr(target, "dtype")


def _shown(target: Any) -> str:
    return _checks.describe(target) if _has_shape(target) else f"a {type(target).__name__}"


def _check_like(target: Any, dtype: str, shape: tuple[int, ...], path: str) -> None:
    """A target's dtype and shape are those that were saved."""
    if not _has_shape(target) or str(target.dtype) != dtype or target.shape != shape:
        raise ValueError(f"target: expected {dtype}{list(shape)} at {path}, got {_shown(target)}")
