"""Which leaf goes next. Imports `_tree`; knows nodes by their fields alone.

A policy is an order of the leaves, kept as a persistent map whose lowest key is the next victim, so that choosing,
listing and unlisting one cost O(log n). Only leaves are listed: a node goes after its children, and no entry is ever
cut off from its prompt's beginning. Orders begin with the epoch: entries of earlier weights cannot be matched, and go
first under every policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from paxcache.prefix import _tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from paxcache.prefix._index import Node
    from paxcache.prefix._tree import Tree

type Policy = Literal["lru", "lfu", "fifo", "slru", "priority"]

PROTECTED_SHARE = 0.8
"""SLRU: share of the pages that may be protected before protected ones are evicted too."""

ORDERS: dict[str, Callable[[Node], tuple]] = {
    "lru": lambda n: (n.epoch, n.tick, n.id),
    "fifo": lambda n: (n.epoch, n.birth, n.id),
    "lfu": lambda n: (n.epoch, n.hits, n.tick, n.id),
    "slru": lambda n: (n.epoch, n.hits > 0, n.tick, n.id),
    "priority": lambda n: (n.epoch, n.priority, n.tick, n.id),
    "expiry": lambda n: (n.expires, n.tick, n.id),
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
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    return POLICIES[policy]


def victim(
    policy: str, orders: Mapping[str, Tree], *, epoch: int, now: float, protected_share: float
) -> int | None:
    """Id of the leaf to evict next; None where no leaf is listed."""
    lowest = _tree.first(orders[policy])
    if lowest is None:
        return None
    key, node_id = lowest
    if key[0] < epoch:
        return node_id
    if policy == "priority":
        (expires, *_), soonest = _tree.first(orders["expiry"])  # type: ignore[misc]
        return soonest if expires <= now else node_id
    if policy == "slru" and protected_share > PROTECTED_SHARE:
        _, oldest = _tree.neighbours(orders[policy], (epoch, True))
        return oldest[1] if oldest else node_id
    return node_id
