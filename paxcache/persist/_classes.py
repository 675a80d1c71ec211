"""The types that a checkpoint may name, and of what types their fields are: the classes' own annotations say it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from paxcache import _quantize, _types, offload
from paxcache.offload import _tier
from paxcache.prefix import _host, _index, _keys, _tree, device

if TYPE_CHECKING:
    from collections.abc import Callable

TYPES: dict[str, type] = {
    cls.__name__: cls
    for cls in (
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
        _index.Removed,
        _index.Run,
        _index.Stored,
        _keys.ExtraKey,
        _keys.Item,
        _host.Pin,
    )
}
"""Classes of values, built from their fields."""

_IN_TREES: dict[tuple[type, str], type] = {
    (_index.Index, "nodes"): _index.Node,
    (_index.Index, "edges"): int,
    (_index.Index, "pins"): int,
    (_tier.HostTier, "entries"): _tier._Entry,
    (_tier.HostTier, "blocks"): _tier._Block,
    (_tier.HostTier, "order"): bytes,
}
"""What the maps of a class hold, which annotations do not say."""


def fields(cls: type) -> list[str]:
    """The names of a class's fields, in order."""
    return list(cls._fields) if issubclass(cls, tuple) else [f.name for f in dataclasses.fields(cls)]  # type: ignore


def is_static(cls: type, field: str) -> bool:
    """Whether a field is the same for a target: it is metadata of a pytree, or the size of an index."""
    if cls is _index.Index:
        return field in ("page_size", "max_pages", "num_pages", "windows")
    return dataclasses.is_dataclass(cls) and any(
        f.name == field and f.metadata.get("static") for f in dataclasses.fields(cls)
    )


class Misfit(NamedTuple):
    """A field whose value is of another type."""

    field: str
    expected: str
    value: Any


def misfit(cls: type, values: list[Any]) -> Misfit | None:
    """The first of a class's fields that is of another type than the class says; None: all are right."""
    for (field, text, fits), value in zip(_checks_of(cls), values, strict=True):
        if not fits(value):
            return Misfit(field, text, value)
    return None


class _ArrayKind:
    """Stands for a type of jaxtyping: ``Int32[Array, "B"]`` is an array of any shape whose dtype is an int32."""

    def __init__(self, category: Any):
        self.category = category

    def __getitem__(self, _: Any) -> Any:
        return Annotated[object, self]


_NAMES = {
    "Array": object,
    "Bool": _ArrayKind(jnp.bool_),
    "Float": _ArrayKind(jnp.floating),
    "Int32": _ArrayKind(jnp.int32),
    "UInt32": _ArrayKind(jnp.uint32),
    "Shaped": _ArrayKind(np.generic),
    "ExtraKey": _keys.ExtraKey,
    "Salt": _keys.Salt,
    "Tree": _tree.Tree,
}
"""Names that are known to type checkers alone where they are used."""


@functools.cache
def _checks_of(cls: type) -> list[tuple[str, str, Callable[[Any], bool]]]:
    """By field: its name, its type as it is written, and what tells whether a value is of it."""
    hints = typing.get_type_hints(cls, localns=_NAMES, include_extras=True)
    checks = []
    for field in fields(cls):
        fits = _fits(hints[field])
        if hints[field] is _tree.Tree:
            fits = functools.partial(_is_tree, _fits(_IN_TREES.get((cls, field), Any)))
        text = cls.__annotations__[field]
        checks.append((field, getattr(text, "__forward_arg__", text), fits))
    return checks


@functools.cache
def _fits(hint: Any) -> Callable[[Any], bool]:
    """What tells whether a value is of a type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, typing.TypeAliasType):
        if hint is _tree.Tree:
            return functools.partial(_is_tree, _fits(Any))
        return lambda value: _fits(hint.__value__)(value)  # noqa: PLW0108 (it may name itself)
    if origin is Annotated:
        return functools.partial(_is_array, hint.__metadata__[0].category)
    if origin in (typing.Union, types.UnionType):
        options = [_fits(arg) for arg in args]
        return lambda value: any(fits(value) for fits in options)
    if origin is tuple and args[1:] == (...,):
        each = _fits(args[0])
        return lambda value: isinstance(value, tuple) and all(map(each, value))
    if origin is tuple:
        parts = [_fits(arg) for arg in args]
        return lambda value: (
            isinstance(value, tuple)
            and len(value) == len(parts)
            and all(fits(part) for fits, part in zip(parts, value, strict=True))
        )
    if origin is dict:
        key, item = map(_fits, args)
        return lambda value: (
            isinstance(value, dict) and all(map(key, value)) and all(map(item, value.values()))
        )
    if hint is Any:
        return lambda _: True
    if hint is float:
        hint = (int, float, np.integer, np.floating)
    elif hint is int:
        hint = (int, np.integer)
    elif hint is bool:
        return lambda value: isinstance(value, (bool, np.bool_))
    return lambda value: isinstance(value, hint) and not isinstance(value, bool)


def _is_array(category: Any, value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and jnp.issubdtype(value.dtype, category)


def _is_tree(fits: Callable[[Any], bool], tree: Any, height: int | None = None) -> bool:
    """Whether a value is a map of `prefix`: keys in order, values that fit, leaves all as deep."""
    match tree:
        case None:
            return height is None
        case (int(found), tuple(keys), tuple(items)) if found == height or (height is None and found >= 0):
            try:
                ordered = all(a < b for a, b in itertools.pairwise(keys))
            except TypeError:
                ordered = False
            below = (lambda item: _is_tree(fits, item, found - 1)) if found else fits
            return ordered and 0 < len(keys) == len(items) and all(map(below, items))
    return False
