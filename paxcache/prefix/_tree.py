"""A persistent ordered map: a B-tree of plain tuples. Imports nothing of the library.

A tree is None or ``(height, keys, items)``. At height 0 the items are the keys' values, which are not None; above, they
are trees one lower, each with its lowest key. No function changes one: `put` and `remove` copy the nodes from the root
to the key, a few tuples of at most `WIDTH` entries, and share everything else with the tree they were given, which
stays valid; `update` does so for many keys at once. Keys are compared and never found by a hash: nothing depends on a
process's hash seed, and no two keys can be confused.

Reference: Bayer and McCreight (1972); wide nodes because copying a tuple costs less than a step of Python.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

type Tree = tuple[int, tuple[Any, ...], tuple[Any, ...]] | None

WIDTH = 128
"""Most entries of a node. All but the root have at least a quarter."""


def get(tree: Tree, key: Any) -> Any:
    """The key's value; None where there is none."""
    if tree is None:
        return None
    height, keys, items = tree
    while height:
        height, keys, items = items[bisect_right(keys, key) - 1]
    at = bisect_right(keys, key) - 1  # a key below all leads to the last place, where it is not
    return items[at] if keys[at] == key else None


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
    """Entries as nodes of even widths, as few as there can be."""
    if len(keys) <= WIDTH:
        return ((height, keys, items),) if keys else ()
    count = -(-len(keys) // WIDTH)
    ends = [len(keys) * n // count for n in range(count + 1)]
    return tuple((height, keys[a:b], items[a:b]) for a, b in itertools.pairwise(ends))


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


def update(tree: Tree, changes: Mapping[Any, Any]) -> Tree:
    """The tree with the values of many keys set; None removes a key.

    Raises:
      KeyError: a key to remove is not there.
    """
    if not changes:
        return tree
    keys = sorted(changes)
    nodes = _update(tree or (0, (), ()), keys, [changes[key] for key in keys], 0, len(keys))
    while len(nodes) > 1:
        nodes = _nodes(nodes[0][0] + 1, tuple(node[1][0] for node in nodes), nodes)
    tree = nodes[0] if nodes else None
    while tree is not None and tree[0] and len(tree[1]) == 1:
        tree = tree[2][0]
    return tree


def _update(tree: Any, new_keys: list[Any], new_items: list[Any], begin: int, end: int) -> tuple[Any, ...]:
    """As `update` with changes [begin, end), which are sorted, as nodes of the tree's height: none, one, or many.

    None of them is too thin unless it is the only one.
    """
    height, keys, items = tree
    if height:
        lowest, children, thin = list(keys), list(items), False
        while begin < end:  # the last child with changes first: what comes before it stays in its place
            at = max(bisect_right(keys, new_keys[end - 1]) - 1, 0)
            low = bisect_left(new_keys, keys[at], begin, end) if at else begin
            parts = _update(items[at], new_keys, new_items, low, end)
            lowest[at : at + 1], children[at : at + 1] = [part[1][0] for part in parts], parts
            thin = thin or any(len(part[1]) < WIDTH // 4 for part in parts)
            end = low
        return _parents(children) if thin else _nodes(height, tuple(lowest), tuple(children))
    keys, items = list(keys), list(items)
    for n in range(end - 1, begin - 1, -1):  # likewise
        key, item = new_keys[n], new_items[n]
        at = bisect_left(keys, key)
        known = at < len(keys) and keys[at] == key
        if item is not None:
            keys[at : at + known], items[at : at + known] = (key,), (item,)
        elif known:
            del keys[at], items[at]
        else:
            raise KeyError(key)
    return _nodes(0, tuple(keys), tuple(items))


def _parents(children: Sequence[Any]) -> tuple[Any, ...]:
    """Nodes above these, which are of one height; those too thin are joined with a neighbour before."""
    wide: list[Any] = []
    for child in children:
        if wide and min(len(wide[-1][1]), len(child[1])) < WIDTH // 4:
            height, keys, items = wide.pop()
            items += child[2]
            # Where a node has but one child, that one may be too thin as well.
            wide += _parents(items) if height else _nodes(0, keys + child[1], items)
        else:
            wide.append(child)
    if not wide:
        return ()
    return _nodes(wide[0][0] + 1, tuple(node[1][0] for node in wide), tuple(wide))


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


def items(tree: Tree, start: Any = None) -> Iterator[tuple[Any, Any]]:
    """All items by key; or those from `start` on."""
    waiting = [] if tree is None else [tree]
    while waiting:
        height, keys, items = waiting.pop()
        if height:
            at = 0 if start is None else max(bisect_right(keys, start) - 1, 0)
            waiting.extend(reversed(items[at:]))
        else:
            at = 0 if start is None else bisect_left(keys, start)
            yield from zip(keys[at:], items[at:], strict=True)
