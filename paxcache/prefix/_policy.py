"""Which leaf goes next. Imports `_tree`; knows nodes by their fields alone.

A policy is an order of the leaves, kept as a persistent map whose lowest key is the next victim. While many go, a
`Queue` reads the map from its lowest key on and takes in the parents that become leaves: nothing is changed until all
are known. Only leaves are listed: a node goes after its children, and no entry is ever cut off from its prompt's
beginning. Orders begin with the epoch: entries of earlier weights cannot be matched, and go first under every policy.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Literal

from paxcache.prefix import _tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paxcache.prefix._index import Node
    from paxcache.prefix._tree import Tree

type Policy = Literal["lru", "lfu", "fifo", "slru", "priority"]

PROTECTED_SHARE = 0.8
"""SLRU: share of the pages that may be protected before protected ones are evicted too."""

WINDOWS = "windows"
"""The order of all nodes, not leaves alone, that hold pages beside sliding windows: those with spare ones first."""

ORDERS: dict[str, Callable[[Node], tuple]] = {
    "lru": lambda n: (n.epoch, n.tick, n.id),
    "fifo": lambda n: (n.epoch, n.birth, n.id),
    "lfu": lambda n: (n.epoch, n.hits, n.tick, n.id),
    "slru": lambda n: (n.epoch, n.hits > 0, n.tick, n.id),
    "priority": lambda n: (n.epoch, n.priority, n.tick, n.id),
    "expiry": lambda n: (n.expires, n.tick, n.id),
    WINDOWS: lambda n: (n.epoch, not n.spare, n.priority, n.tick, n.id),
}

POLICIES: dict[str, tuple[str, ...]] = {
    "lru": ("lru",),
    "lfu": ("lfu",),
    "fifo": ("fifo",),
    "slru": ("slru",),
    "priority": ("priority", "expiry"),
}


def by_age(policy: str) -> bool:
    """Whether pages of one leaf go at different times if different calls stored them."""
    return policy == "fifo"


def orders(policy: str) -> tuple[str, ...]:
    """The orders that a policy needs.

    Raises:
      ValueError: there is no such policy.
    """
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    return POLICIES[policy]


class Queue:
    """Leaves in an order, lowest first: those listed, from a key on, and those put in since. Skips those done with."""

    def __init__(self, name: str, order: Tree, done: set[int], start: tuple = ()):
        self._key, self._start, self._done = ORDERS[name], start, done
        self._listed = _tree.items(order, start)
        self._next = next(self._listed, None)
        self._heap = [] if self._next is None else [self._next]  # with one of the listed at a time

    def put(self, leaf: Node) -> None:
        """Puts a leaf in."""
        key = self._key(leaf)
        if key >= self._start:
            heapq.heappush(self._heap, (key, leaf.id))

    def first(self) -> tuple[tuple, int] | None:
        """The lowest key and its leaf's id."""
        while self._heap and self._heap[0][1] in self._done:
            if self._heap[0] is self._next:
                self._next = next(self._listed, None)
                if self._next is not None:
                    heapq.heapreplace(self._heap, self._next)
                    continue
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None


def queues(policy: str, orders: Mapping[str, Tree], *, epoch: int, done: set[int]) -> list[Queue]:
    """What `victim` chooses from: all leaves in the policy's order, then those that may be more urgent in theirs.

    Leaves whose ids are in `done` are skipped, from when they are.
    """
    made = [Queue(name, orders[name], done) for name in POLICIES[policy]]
    if policy == "slru":
        made.append(Queue(policy, orders[policy], done, (epoch, True)))
    return made


def victim(policy: str, queues: Sequence[Queue], *, epoch: int, now: float, crowded: bool) -> int | None:
    """Id of the leaf to evict next; None where there is no leaf. `crowded`: more are protected than may be."""
    lowest = queues[0].first()
    if lowest is None:
        return None
    key, node_id = lowest
    if len(queues) == 1 or key[0] < epoch:
        return node_id
    urgent = queues[1].first()
    if urgent is None:
        return node_id
    is_urgent = urgent[0][0] <= now if policy == "priority" else crowded
    return urgent[1] if is_urgent else node_id
