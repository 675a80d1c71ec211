"""A persistent ordered map: a B-tree of plain tuples. Imports nothing of the library.

A tree is None or ``(height, keys, items)``. At height 0 the items are the keys' values; above, they are trees one
lower, each with its lowest key. No function changes one: `put` and `remove` copy the nodes from the root to the key, a
few tuples of at most `WIDTH` entries, and share everything else with the tree they were given, which stays valid. Keys
are compared, never hashed, so nothing here depends on a process's hash seed and no two keys can be confused.

Reference: Bayer and McCreight (1972); wide nodes because copying a tuple costs less than a step of Python.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

type Tree = tuple[int, tuple[Any, ...], tuple[Any, ...]] | None

WIDTH = 32
"""Most entries of a node. All but the root have at least a quarter."""


def get(tree: Tree, key: Any) -> Any:
    """The key's value; None where there is none."""
    while tree is not None:
        height, keys, items = tree
        at = bisect_right(keys, key) - 1
        if at < 0:
            return None
        if height == 0:
            return items[at] if keys[at] == key else None
        tree = items[at]
    return None


def put(tree: Tree, key: Any, value: Any) -> Tree:
    """The tree with the key's value set."""
    if tree is None:
        return (0, (key,), (value,))
    parts = _put(tree, key, value)
    return parts[0] if len(parts) == 1 else (tree[0] + 1, tuple(p[1][0] for p in parts), parts)


def _put(tree: Any, key: Any, value: Any) -> tuple[Any, ...]:
    """As `put`, as one node or as two where one would be too wide."""
    height, keys, items = tree
    at = bisect_right(keys, key) - 1
    if height:
        at = max(at, 0)
        return _replaced(tree, at, at + 1, _put(items[at], key, value))
    if at >= 0 and keys[at] == key:
        return ((0, keys, (*items[:at], value, *items[at + 1 :])),)
    at += 1
    return _nodes(0, (*keys[:at], key, *keys[at:]), (*items[:at], value, *items[at:]))


def _replaced(tree: Any, begin: int, end: int, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """A node with other children in place of some, as one node or as two."""
    height, keys, items = tree
    lowest = [part[1][0] for part in parts]
    if end - begin == len(parts) == 1 and keys[begin] is lowest[0]:  # mostly: the keys are shared too
        return ((height, keys, (*items[:begin], *parts, *items[end:])),)
    return _nodes(height, (*keys[:begin], *lowest, *keys[end:]), (*items[:begin], *parts, *items[end:]))


def _nodes(height: int, keys: tuple[Any, ...], items: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(keys) <= WIDTH:
        return ((height, keys, items),)
    half = len(keys) // 2
    return ((height, keys[:half], items[:half]), (height, keys[half:], items[half:]))


def remove(tree: Tree, key: Any) -> Tree:
    """The tree without the key.

    Raises:
      KeyError: it is not there.
    """
    if tree is None:
        raise KeyError(key)
    height, keys, items = _remove(tree, key)
    if height and len(keys) == 1:
        return items[0]
    return (height, keys, items) if keys else None


def _remove(tree: Any, key: Any) -> Any:
    height, keys, items = tree
    at = bisect_right(keys, key) - 1
    if at < 0 or (height == 0 and keys[at] != key):
        raise KeyError(key)
    if height == 0:
        return (0, keys[:at] + keys[at + 1 :], items[:at] + items[at + 1 :])
    child = _remove(items[at], key)
    if len(child[1]) >= WIDTH // 4:
        return _replaced(tree, at, at + 1, (child,))[0]
    # Too thin: joined with a neighbour, which every node but the root has.
    a, b = (items[at - 1], child) if at else (child, items[1])
    at = max(at, 1)
    return _replaced(tree, at - 1, at + 1, _nodes(height - 1, a[1] + b[1], a[2] + b[2]))[0]


def first(tree: Tree) -> tuple[Any, Any] | None:
    """The lowest key and its value."""
    if tree is None:
        return None
    height, keys, items = tree
    while height:
        height, keys, items = items[0]
    return keys[0], items[0]


def neighbours(tree: Tree, key: Any) -> tuple[tuple[Any, Any] | None, tuple[Any, Any] | None]:
    """The highest item at or below the key, and the lowest at or above it."""
    above = None
    while tree is not None:
        height, keys, items = tree
        at = bisect_right(keys, key) - 1
        if at + 1 < len(keys):
            above = first((height, keys[at + 1 :], items[at + 1 :]))
        if height == 0:
            if at < 0:
                return None, above
            here = keys[at], items[at]
            return here, here if keys[at] == key else above
        tree = items[max(at, 0)]
    return None, None


def items(tree: Tree) -> Iterator[tuple[Any, Any]]:
    """All items by key."""
    waiting = [] if tree is None else [tree]
    while waiting:
        height, keys, items = waiting.pop()
        if height:
            waiting.extend(reversed(items))
        else:
            yield from zip(keys, items, strict=True)
