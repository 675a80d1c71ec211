"""The host index as a value: a radix tree over tokens, kept in persistent maps. Imports `_tree`, `_keys` and
`_policy`.

Nodes hold runs of full pages. They do not point at each other: one map takes a node's id to the node, another takes
(parent's id, salt, tokens of its first page) to its id. So changing, splitting or cutting a node copies O(log n) of the
maps however deep it lies, and every other version of the index shares the rest. Tokens are keys in full; nothing is
hashed. Knows pages as numbers, never the cache.

Every page that an entry holds on the device is one reference; a page has one entry at most.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paxcache._types import NO_PAGE
from paxcache.prefix import _keys, _policy, _tree

if TYPE_CHECKING:
    from jaxtyping import Bool, Int32, UInt8

    from paxcache.prefix._keys import ExtraKey, Prompt, Salt
    from paxcache.prefix._tree import Tree

NUM_AGES = 32
"""Buckets of an age histogram: below 1, then one for each power of two, the last for all that is left."""


class Tier(enum.IntEnum):
    """Where an entry's page lies."""

    DEVICE = 0
    """In the cache's pools."""
    HOST = 1
    STORAGE = 2


IN_FLIGHT = 0x80
"""Added to an entry's tier."""


class Place(NamedTuple):
    """Where the keys and values of one entry are."""

    tier: Tier
    id: tuple[int, ...]
    """In each group, the page's number within its tier; NO_PAGE where a sliding window gave it back."""
    in_flight: bool
    """On its way from or to another tier: neither handed out nor evicted."""


class Stored(NamedTuple):
    """Event: pages became available."""

    keys: tuple[bytes, ...]
    """Stable keys, in order."""
    parent: bytes
    """Stable key of the page before the first; the root's for a prompt's first page."""
    tokens: tuple[int, ...]
    extra_key: ExtraKey | Salt


class Removed(NamedTuple):
    """Event: pages are gone."""

    keys: tuple[bytes, ...]


class Cleared(NamedTuple):
    """Event: every page is gone."""


type Event = Stored | Removed | Cleared


@dataclasses.dataclass(frozen=True)
class Counters:
    """What an index has done since `init`."""

    tokens_asked: int = 0
    """Tokens of all prompts that were admitted."""
    tokens_reused: int = 0
    """Those of them that had not to be computed."""
    pages_stored: int = 0
    pages_folded: int = 0
    """Pages that a row had computed again and gave up for the stored ones."""
    pages_evicted: int = 0
    lifetimes: tuple[int, ...] = (0,) * NUM_AGES
    """Evicted pages by the time since they were stored: below 1, 1 to 2, 2 to 4, and so on."""
    idle_times: tuple[int, ...] = (0,) * NUM_AGES
    """Evicted pages by the time since they were last used, in the same buckets."""

    @property
    def hit_rate(self) -> float:
        """Share of the tokens asked for that were reused, 0 before the first."""
        return self.tokens_reused / self.tokens_asked if self.tokens_asked else 0.0


MERGED_PAGES = 64
"""A leaf of fewer pages takes those that follow it into its run, which is copied. So publishing after every page does
not make every page a node."""

NO_EXTRAS: dict[int, bytes] = {}
"""What most runs have, so that they share one. Never changed."""


class Run(NamedTuple):
    """What is stored of consecutive pages. Never changed; kept as long as any node shows a part of it."""

    tokens: bytes
    keys: bytes
    extras: dict[int, bytes]
    """By page of the run, its multimodal inputs, encoded."""
    ids: Int32[np.ndarray, "N G"]
    where: UInt8[np.ndarray, "N"]
    """Tier, plus IN_FLIGHT."""


class Node(NamedTuple):
    """Pages [start, end) of a run, used and evicted alike. Children follow its last page."""

    id: int
    parent: int
    """0: the first page begins a prompt."""
    salt: bytes
    """What must agree besides the tokens of the first page."""
    run: Run
    start: int
    end: int
    num_children: int
    epoch: int
    birth: int
    """Turn of the call that stored the last page."""
    tick: int
    """Turn of the last call that used it. A parent's is never lower than a child's."""
    hits: int
    """How often `admit` used it."""
    priority: int
    expires: float
    created_at: float
    """Time of the call that stored the last page."""
    used_at: float
    older: tuple[int, int, float, Any] | None = None
    """What earlier calls stored, the latest first: (end of its pages in the run, birth, created_at, what is older)."""

    @property
    def size(self) -> int:
        """Pages."""
        return self.end - self.start

    @property
    def youngest(self) -> int:
        """The first of the pages that were stored with the last one."""
        return self.start if self.older is None else max(self.start, self.older[0])

    def ending(self, end: int) -> Node:
        """The node without its pages from `end` on."""
        birth, created_at, older = self.birth, self.created_at, self.older
        while older is not None and end <= older[0]:
            _, birth, created_at, older = older
        return self._replace(end=end, birth=birth, created_at=created_at, older=older)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Index:
    """A prefix index as a value. Make it with `init`; read it with `match`, `held`, `places`, `counters`.

    No function changes it: each returns a new one that shares what did not change. Any number of threads may read one
    while others make its successors, and an old one is a snapshot (of what was stored, not of the pages' content).
    """

    page_size: int
    max_pages: int
    num_pages: tuple[int, ...]
    windows: tuple[int | None, ...]
    first_epoch: int
    epoch: int
    """Version of the weights whose pages can be matched, see `new_epoch`."""
    now: float
    """Latest time that was passed in."""
    tick: int
    """Turns taken: one for each row admitted or published."""
    next_id: int
    counters: Counters
    num_entries: int
    """Pages stored."""
    num_protected: int
    """Those of them that were reused, whatever their epoch."""
    nodes: Tree
    edges: Tree
    orders: tuple[tuple[str, Tree], ...]
    """By policy, the leaves that may be evicted; only for policies that were asked for, see `_policy`."""
    pins: Tree
    """By node, how often it is pinned. Its ancestors stay because it does."""
    row_epochs: Tree
    """By row, the epoch in which it was last admitted."""
    held: tuple[Bool[np.ndarray, "P"], ...]
    """By group, whether an entry holds a page. Never changed."""
    recording: bool
    log: Any
    """Events that nobody took yet: (event, the log before it), None at the start."""

    def __repr__(self) -> str:
        """Sizes alone: an index may hold a million tokens."""
        return f"Index(num_entries={self.num_entries}, epoch={self.epoch}, tick={self.tick})"


type Path = list[tuple[Node, int]]
"""Nodes from a prompt's first page on, and how many pages of each belong to it (all of them but for the last)."""


class Found(NamedTuple):
    """The longest stored prefix of a prompt."""

    path: Path
    """With the partly agreeing page, if there is one."""
    num_pages: int
    """Pages that agree wholly."""
    num_tokens: int
    """Tokens that agree: those of the pages, and the first ones of the next page on the path."""


def walk(index: Index | Draft, prompt: Prompt, *, partial: bool = False) -> Found:
    """Follows a prompt down the tree. With `partial`, to a page that agrees in its first tokens alone."""
    path: Path = []
    at, parent, inside = 0, 0, False
    while at < prompt.num_pages and not inside:
        child = _tree.get(index.edges, (parent, prompt.salt(at), prompt.page(at)))
        if child is None:
            break
        node = _tree.get(index.nodes, child)
        count = _common_pages(prompt, at, node)
        path.append((node, count))
        at, parent, inside = at + count, child, count < node.size
    if partial:
        node, count, more = _partial_page(index, prompt, at, path, parent, inside)
        if more:
            if inside:
                path[-1] = node, count
            else:
                path.append((node, count))
            return Found(path, at, at * prompt.page_size + more)
    return Found(path, at, at * prompt.page_size)


def _partial_page(index, prompt, at, path, parent, inside) -> tuple[Any, int, int]:
    """The node whose next page shares most first tokens with the prompt's, pages of it with that one, those tokens.

    A page that holds part of a multimodal input is shared whole or not at all.
    """
    rest = prompt.page(at)[: prompt.plain.get(at, prompt.page_size) * _keys.TOKEN.itemsize]
    if inside:
        node, count = path[-1]
        candidates = [] if node.start + count in node.run.extras else [(node, count)]
    else:
        # Among all pages in the order of their tokens' bytes, those next to ours share the most with it.
        salt = prompt.namespace if at == 0 else b""
        near = _tree.neighbours(index.edges, (parent, salt, rest))
        candidates = [
            (_tree.get(index.nodes, child), 0)
            for edge, child in filter(None, near)
            if edge[:2] == (parent, salt)
        ]
    best = (None, 0, 0)
    for node, page in candidates:
        more = _common_tokens(rest, page_tokens(node, page, prompt.page_size))
        if more > best[2]:
            best = (node, page + 1, more)
    return best


def cut_path(path: Path, pages: int) -> Path:
    """The first pages of a path."""
    more = sum(count for _, count in path) - pages
    while more > 0:
        *path, (node, count) = path
        if count > more:
            path.append((node, count - more))
        more -= count
    return path


def page_tokens(node: Node, page: int, page_size: int) -> bytes:
    """Tokens of a node's page."""
    width = page_size * _keys.TOKEN.itemsize
    return node.run.tokens[(node.start + page) * width : (node.start + page + 1) * width]


def _common_tokens(a: bytes, b: bytes) -> int:
    size = min(len(a), len(b))
    differ = np.frombuffer(a[:size], _keys.TOKEN) != np.frombuffer(b[:size], _keys.TOKEN)
    return int(differ.argmax()) if differ.any() else differ.size


def _common_pages(prompt: Prompt, at: int, node: Node) -> int:
    """How many pages of a node agree with the prompt's from page `at` on; the first does."""
    width = prompt.page_size * _keys.TOKEN.itemsize
    count = min(node.size, prompt.num_pages - at)
    ours = prompt.tokens[at * width : (at + count) * width]
    theirs = node.run.tokens[node.start * width : (node.start + count) * width]
    if ours != theirs:
        count = _common_tokens(ours, theirs) // prompt.page_size
    if prompt.extras or node.run.extras:
        for page in range(1, count):
            if prompt.extras.get(at + page) != node.run.extras.get(node.start + page):
                return page
    return count


class Draft:
    """A version of the index in the making: an index's fields to assign to, thrown away after `done`."""

    page_size: int
    max_pages: int
    num_pages: tuple[int, ...]
    windows: tuple[int | None, ...]
    first_epoch: int
    epoch: int
    now: float
    tick: int
    next_id: int
    counters: Counters
    num_entries: int
    num_protected: int
    nodes: Tree
    edges: Tree
    orders: tuple[tuple[str, Tree], ...]
    pins: Tree
    row_epochs: Tree
    held: tuple[Bool[np.ndarray, "P"], ...]
    recording: bool
    log: Any

    _owns_held = False

    def __init__(self, index: Index):
        vars(self).update(vars(index))

    def done(self) -> Index:
        """The new version."""
        return Index(**{name: value for name, value in vars(self).items() if name != "_owns_held"})

    def node(self, node_id: int) -> Node:
        """A node by its id."""
        return _tree.get(self.nodes, node_id)

    def record(self, event: Event) -> None:
        """Logs an event; for those who asked whether any are wanted."""
        self.log = (event, self.log)

    def count(self, **amounts: int) -> None:
        """Adds to counters."""
        sums = {name: getattr(self.counters, name) + amount for name, amount in amounts.items()}
        self.counters = dataclasses.replace(self.counters, **sums)

    def count_evicted(self, gone: list[tuple[Node, int]]) -> None:
        """Counts pages that were cut from nodes, and their ages."""
        lifetimes, idle_times = list(self.counters.lifetimes), list(self.counters.idle_times)
        for node, pages in gone:
            idle_times[_age(self.now - node.used_at)] += pages
            stays, left = node.end - pages, node
            while left.end > stays:
                begin = max(left.youngest, stays)
                lifetimes[_age(self.now - left.created_at)] += left.end - begin
                left = left.ending(begin)
        self.counters = dataclasses.replace(
            self.counters,
            pages_evicted=self.counters.pages_evicted + sum(pages for _, pages in gone),
            lifetimes=tuple(lifetimes),
            idle_times=tuple(idle_times),
        )

    # Nodes.

    def _listed(self, node: Node) -> bool:
        return node.num_children == 0 and _tree.get(self.pins, node.id) is None

    def list_leaf(self, node: Node) -> None:
        """Puts a leaf into the orders of eviction."""
        self.orders = tuple(
            (name, _tree.put(t, _policy.ORDERS[name](node), node.id)) for name, t in self.orders
        )

    def unlist_leaf(self, node: Node) -> None:
        """Takes a leaf out of the orders of eviction."""
        self.orders = tuple((name, _tree.remove(t, _policy.ORDERS[name](node))) for name, t in self.orders)

    def add_order(self, name: str) -> None:
        """Starts to keep an order: once O(n log n), from then on O(log n) a change."""
        if name not in dict(self.orders):
            order = None
            for _, node in _tree.items(self.nodes):
                if self._listed(node):
                    order = _tree.put(order, _policy.ORDERS[name](node), node.id)
            self.orders = (*self.orders, (name, order))

    def replace(self, old: Node, **changes: Any) -> Node:
        """Stores a node with other fields."""
        return self._store(old, old._replace(**changes))

    def _store(self, old: Node, node: Node) -> Node:
        """Stores a node's new form. The orders change only where one of them would sort it elsewhere."""
        self.nodes = _tree.put(self.nodes, node.id, node)
        self.num_protected += (node.hits > 0) * node.size - (old.hits > 0) * old.size
        was, now = self._listed(old), self._listed(node)
        keys = [_policy.ORDERS[name] for name, _ in self.orders]
        if was != now or any(key(old) != key(node) for key in keys):
            if was:
                self.unlist_leaf(old)
            if now:
                self.list_leaf(node)
        return node

    def edge_of(self, node: Node) -> tuple[int, bytes, bytes]:
        """Where a node hangs."""
        return (node.parent, node.salt, page_tokens(node, 0, self.page_size))

    def split(self, node: Node, pages: int) -> Node:
        """Cuts a node in two; returns the upper part. The lower one keeps the id: children and pins stay with it."""
        assert 0 < pages < node.size
        at = node.start + pages
        upper = node.ending(at)._replace(id=self.next_id, num_children=1)
        lower = node._replace(start=at, parent=upper.id, salt=node.run.extras.get(at, b""))
        self.next_id += 1
        self.nodes = _tree.put(_tree.put(self.nodes, upper.id, upper), lower.id, lower)
        self.edges = _tree.put(self.edges, self.edge_of(upper), upper.id)
        self.edges = _tree.put(self.edges, self.edge_of(lower), lower.id)
        return upper  # no order names a node's size or place: the leaf stays listed as it is

    def touch(
        self, path: Path, *, reused: bool = False, priority: int = 0, expires: float = 0.0
    ) -> list[Node]:
        """Marks the pages of a path as used, splitting its last node behind them. Returns its nodes as they are now."""
        nodes = []
        for found, pages in path:
            node = self.split(found, pages) if pages < found.size else self.node(found.id)
            new = self.replace(
                node,
                tick=self.tick,
                used_at=self.now,
                hits=node.hits + reused,
                priority=max(node.priority, priority),
                expires=max(node.expires, expires),
            )
            nodes.append(new)
        return nodes

    def add(self, prompt: Prompt, first_page: int, parent: int, run: Run, **fields: Any) -> None:
        """Hangs a new run below a node."""
        node = Node(
            id=self.next_id,
            parent=parent,
            salt=prompt.salt(first_page),
            run=run,
            start=0,
            end=len(run.ids),
            num_children=0,
            epoch=self.epoch,
            birth=self.tick,
            tick=self.tick,
            hits=0,
            created_at=self.now,
            used_at=self.now,
            **fields,
        )
        self.next_id += 1
        self.edges = _tree.put(self.edges, self.edge_of(node), node.id)
        if parent:
            above = self.node(parent)
            self.replace(above, num_children=above.num_children + 1)
        self.nodes = _tree.put(self.nodes, node.id, node)
        self.list_leaf(node)
        self._count_stored(node.size)

    def extend(self, node: Node, run: Run, *, priority: int, expires: float) -> bool:
        """Adds a run to the end of a short leaf, if the pages of both count the same; whether it did."""
        alike = node.hits == 0 and node.priority == priority and node.expires == expires
        if node.start or node.size >= MERGED_PAGES or not alike or not self._listed(node):
            return False
        have, end = node.run, node.end
        joined = Run(
            have.tokens[: end * self.page_size * _keys.TOKEN.itemsize] + run.tokens,
            have.keys[: end * _keys.KEY_BYTES] + run.keys,
            {page: e for page, e in have.extras.items() if page < end}
            | {end + page: e for page, e in run.extras.items()}
            or NO_EXTRAS,
            np.concatenate([have.ids[:end], run.ids]),
            np.concatenate([have.where[:end], run.where]),
        )
        self.replace(
            node,
            run=joined,
            end=end + len(run.ids),
            birth=self.tick,
            created_at=self.now,
            older=(end, node.birth, node.created_at, node.older),
        )
        self._count_stored(len(run.ids))
        return True

    def _count_stored(self, pages: int) -> None:
        self.num_entries += pages
        self.count(pages_stored=pages)

    def cut(self, node: Node, pages: int) -> None:
        """Forgets the last pages of a listed leaf; with its last one the leaf itself."""
        end, size = node.end, _keys.KEY_BYTES
        self.num_entries -= pages
        if self.recording:
            self.record(Removed(_keys.split_keys(node.run.keys[(end - pages) * size : end * size])))
        if pages < node.size:
            self._store(node, node.ending(end - pages))
            return
        self.num_protected -= (node.hits > 0) * node.size
        self.unlist_leaf(node)
        self.nodes = _tree.remove(self.nodes, node.id)
        self.edges = _tree.remove(self.edges, self.edge_of(node))
        if node.parent:
            above = self.node(node.parent)
            self.replace(above, num_children=above.num_children - 1)

    def set_pin(self, node_id: int, times: int) -> None:
        """Pins a node so many times; 0 unpins it."""
        node = self.node(node_id)
        was = self._listed(node)
        self.pins = _tree.put(self.pins, node_id, times) if times else _tree.remove(self.pins, node_id)
        now = self._listed(node)
        if was and not now:
            self.unlist_leaf(node)
        elif now and not was:
            self.list_leaf(node)

    def victim(self, policy: str) -> Node | None:
        """The leaf that goes next."""
        share = self.num_protected / max(self.num_entries, 1)
        node_id = _policy.victim(
            policy, dict(self.orders), epoch=self.epoch, now=self.now, protected_share=share
        )
        return None if node_id is None else self.node(node_id)

    def clear(self) -> None:
        """Forgets every entry and pin."""
        self.nodes = self.edges = self.pins = None
        self.orders = tuple((name, None) for name, _ in self.orders)
        self.held = tuple(np.zeros_like(held) for held in self.held)
        self.num_entries = self.num_protected = 0

    # Pages.

    def hold(self, ids: Int32[np.ndarray, "N G"], taken: list[list[int]]) -> None:
        """Notes pages as held, and adds them to the lists of references to take."""
        self._set_held(ids, True, taken)

    def release(self, ids: Int32[np.ndarray, "N G"], dropped: list[list[int]]) -> None:
        """Notes pages as no longer held, and adds them to the lists of references to give back."""
        self._set_held(ids, False, dropped)

    def _set_held(self, ids, value, lists) -> None:
        if not self._owns_held:
            self.held, self._owns_held = tuple(held.copy() for held in self.held), True
        for g, held in enumerate(self.held):
            pages = ids[ids[:, g] != NO_PAGE, g]
            held[pages] = value
            lists[g].extend(pages.tolist())


def _age(age: float) -> int:
    """The bucket of an age."""
    return min(math.frexp(age)[1], NUM_AGES - 1) if age >= 1 else 0
