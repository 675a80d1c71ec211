"""The host index as a value: a radix tree over tokens, kept in persistent maps. Imports `_tree`, `_keys` and
`_policy`.

Nodes hold runs of full pages. They do not point at each other: one map takes a node's id to the node, another takes
(parent's id, salt, tokens of its first page) to its id. So changing, splitting or cutting a node copies O(log n) of the
maps however deep it lies, and every other version of the index shares the rest. Tokens are keys in full; nothing is
hashed. Knows pages as numbers, never the cache.

Every page that an entry holds is one reference; a page has one entry at most. An entry holds a page in each group
without a sliding window; its pages beside a window may go before it does.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from paxcache._types import NO_PAGE
from paxcache.prefix import _keys, _policy, _tree

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from jaxtyping import Bool, Int32

    from paxcache.prefix._keys import ExtraKey, Prompt, Salt
    from paxcache.prefix._tree import Tree

NUM_AGES = 32
"""Buckets of an age histogram: below 1, then one for each power of two, the last for all that is left."""


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


ID = np.dtype("<i4")
"""Page numbers as they are stored."""


class Run(NamedTuple):
    """What is stored of consecutive pages, which is kept as long as any node shows a part of it.

    In bytes, since an array of a single page would take three times the room.
    """

    tokens: bytes
    keys: bytes
    extras: dict[int, bytes]
    """By page of the run, its multimodal inputs, encoded."""
    ids: bytes
    """Of each page, its number in each group, as `ID`; NO_PAGE where a sliding window gave it back."""

    @property
    def num_pages(self) -> int:
        """Pages."""
        return len(self.keys) // _keys.KEY_BYTES

    @property
    def table(self) -> Int32[np.ndarray, "N G"]:
        """The numbers; read-only."""
        return np.frombuffer(self.ids, ID).reshape(self.num_pages, -1)


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
    spare: bool | None = None
    """Whether it holds pages beside a window that no prompt needs which goes on from its end; None: it holds none."""
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
    held: tuple[Bool[np.ndarray, "P"], ...]
    """By group, whether an entry holds a page. Never changed."""
    holdings: int
    """A checksum of which text each of these pages has, see `checksum`: that of the cache which the index goes with."""
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
    tokens, num_pages, width = prompt.tokens, prompt.num_pages, prompt.page_size * _keys.TOKEN.itemsize
    at, parent, inside, salt = 0, 0, False, prompt.salt(0)
    while at < num_pages and not inside:
        child = _tree.get(index.edges, (parent, salt, tokens[at * width : (at + 1) * width]))
        if child is None:
            break
        node = _tree.get(index.nodes, child)
        run, start, end = node.run, node.start, node.end
        count = size = end - start
        # Mostly the whole node agrees, and a prompt may meet hundreds.
        whole = at + size <= num_pages and tokens.startswith(
            run.tokens[start * width : end * width], at * width
        )
        if not whole or run.extras or prompt.extras:
            count = _common_pages(prompt, at, node)
        path.append((node, count))
        at, parent, inside = at + count, child, count < size
        salt = prompt.extras.get(at, b"")
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
    held: tuple[Bool[np.ndarray, "P"], ...]
    holdings: int
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
        created, used = collections.Counter(), collections.Counter()  # pages by time
        for node, pages in gone:
            used[node.used_at] += pages
            left, part = pages, node
            while part.older is not None and left > part.end - part.youngest:
                created[part.created_at] += part.end - part.youngest
                left -= part.end - part.youngest
                part = part.ending(part.youngest)
            created[part.created_at] += left
        counters = self.counters
        self.counters = dataclasses.replace(
            counters,
            pages_evicted=counters.pages_evicted + used.total(),
            lifetimes=self._with_ages(counters.lifetimes, created),
            idle_times=self._with_ages(counters.idle_times, used),
        )

    def _with_ages(self, histogram: tuple[int, ...], pages_by_time: Mapping[float, int]) -> tuple[int, ...]:
        counts = list(histogram)
        for time, pages in pages_by_time.items():
            counts[_age(self.now - time)] += pages
        return tuple(counts)

    # Nodes.

    def _listed(self, node: Node, order: str = "") -> bool:
        if order == _policy.WINDOWS:
            return node.spare is not None
        return node.num_children == 0 and _tree.get(self.pins, node.id) is None

    def reach(self, group: int) -> int:
        """Pages before a node's end that a prompt may need of it which goes on from there, or repeats its last page."""
        window = self.windows[group]
        return self.max_pages if window is None else -(-(window - 1) // self.page_size) + 1

    def _with_spare(self, node: Node) -> Node:
        """The node with `spare` as its pages are."""
        windowed = [g for g, window in enumerate(self.windows) if window is not None]
        if not windowed:
            return node
        has = node.run.table[node.start : node.end] != NO_PAGE
        spare = any(has[: max(node.size - self.reach(g), 0), g].any() for g in windowed)
        return node._replace(spare=spare if has[:, windowed].any() else None)

    def add_order(self, name: str) -> None:
        """Starts to keep an order: once O(n log n), from then on O(log n) a change."""
        if name not in dict(self.orders):
            key = _policy.ORDERS[name]
            leaves = {key(n): n.id for _, n in _tree.items(self.nodes) if self._listed(n, name)}
            self.orders = (*self.orders, (name, _tree.update(None, leaves)))

    def change(
        self,
        replaced: Sequence[tuple[Node, Node]] = (),
        *,
        added: Sequence[Node] = (),
        removed: Sequence[Node] = (),
    ) -> None:
        """Replaces nodes by their new form, adds some and removes some, in one pass a map.

        The orders change only where one of them would sort a leaf elsewhere.
        """
        before = [*removed, *(old for old, _ in replaced)]
        after = [*added, *(new for _, new in replaced)]
        nodes: dict[int, Node | None] = dict.fromkeys(node.id for node in removed)
        nodes.update((node.id, node) for node in after)
        self.nodes = _tree.update(self.nodes, nodes)
        edges: dict[Any, int | None] = dict.fromkeys(map(self.edge_of, removed))
        # Where a node hangs below another one than before, that one has taken its place.
        hung = [*added, *(new for old, new in replaced if old.parent != new.parent)]
        edges.update((self.edge_of(node), node.id) for node in hung)
        self.edges = _tree.update(self.edges, edges)
        self.num_protected += sum(n.size for n in after if n.hits) - sum(n.size for n in before if n.hits)
        orders = []
        for name, order in self.orders:
            key = _policy.ORDERS[name]
            leaves_before, leaves_after = (
                [n for n in some if self._listed(n, name)] for some in (before, after)
            )
            moves: dict[tuple, int | None] = dict.fromkeys(map(key, leaves_before))
            for leaf in leaves_after:
                to = key(leaf)
                if to in moves:  # where it is already
                    del moves[to]
                else:
                    moves[to] = leaf.id
            orders.append((name, _tree.update(order, moves)))
        self.orders = tuple(orders)

    def edge_of(self, node: Node) -> tuple[int, bytes, bytes]:
        """Where a node hangs."""
        return (node.parent, node.salt, page_tokens(node, 0, self.page_size))

    def split(self, node: Node, pages: int) -> Node:
        """Cuts a node in two; returns the upper part. The lower one keeps the id: children and pins stay with it."""
        assert 0 < pages < node.size
        at = node.start + pages
        upper = self._with_spare(node.ending(at)._replace(id=self.next_id, num_children=1))
        lower = node._replace(start=at, parent=upper.id, salt=node.run.extras.get(at, b""))
        lower = self._with_spare(lower)
        self.next_id += 1
        self.change([(node, lower)], added=[upper])
        return upper

    def touch(
        self, path: Path, *, reused: bool = False, priority: int = 0, expires: float = 0.0
    ) -> list[Node]:
        """Marks the pages of a path as used, splitting its last node behind them. Returns its nodes as they are now."""
        nodes = [self.split(node, pages) if pages < node.size else node for node, pages in path]
        touched = [
            node._replace(
                tick=self.tick,
                used_at=self.now,
                hits=node.hits + reused,
                priority=max(node.priority, priority),
                expires=max(node.expires, expires),
            )
            for node in nodes
        ]
        self.change(list(zip(nodes, touched, strict=True)))
        return touched

    def add(self, prompt: Prompt, first_page: int, parent: int, run: Run, **fields: Any) -> None:
        """Hangs a new run below a node."""
        node = Node(
            id=self.next_id,
            parent=parent,
            salt=prompt.salt(first_page),
            run=run,
            start=0,
            end=run.num_pages,
            num_children=0,
            epoch=self.epoch,
            birth=self.tick,
            tick=self.tick,
            hits=0,
            created_at=self.now,
            used_at=self.now,
            **fields,
        )
        node = self._with_spare(node)
        self.next_id += 1
        above = self.node(parent) if parent else None
        more = [] if above is None else [(above, above._replace(num_children=above.num_children + 1))]
        self.change(more, added=[node])
        self._count_stored(node.size)

    def extend(self, node: Node, run: Run, *, priority: int, expires: float) -> bool:
        """Adds a run to the end of a short leaf, if the pages of both count the same; whether it did."""
        alike = node.hits == 0 and node.priority == priority and node.expires == expires
        if node.start or node.size >= MERGED_PAGES or not alike or not self._listed(node):
            return False
        have, end, width = node.run, node.end, len(run.ids) // run.num_pages
        joined = Run(
            have.tokens[: end * self.page_size * _keys.TOKEN.itemsize] + run.tokens,
            have.keys[: end * _keys.KEY_BYTES] + run.keys,
            {page: e for page, e in have.extras.items() if page < end}
            | {end + page: e for page, e in run.extras.items()}
            or NO_EXTRAS,
            have.ids[: end * width] + run.ids,
        )
        new = node._replace(
            run=joined,
            end=end + run.num_pages,
            birth=self.tick,
            created_at=self.now,
            older=(end, node.birth, node.created_at, node.older),
        )
        self.change([(node, self._with_spare(new))])
        self._count_stored(run.num_pages)
        return True

    def fill(self, node: Node, ids: Int32[np.ndarray, "N G"]) -> Node:
        """Stores a node with other page numbers."""
        table = node.run.table.copy()
        table[node.start : node.end] = ids
        new = self._with_spare(node._replace(run=node.run._replace(ids=table.tobytes())))
        self.change([(node, new)])
        return new

    def _count_stored(self, pages: int) -> None:
        self.num_entries += pages
        self.count(pages_stored=pages)

    def victims(self, policy: str) -> Generator[Node | None, int, None]:
        """The leaves in the order in which they go, then None. Changes nothing: `cut` does, for all at once.

        Wants to be told by `send` how many last pages of each go; 0: it is passed over for good.
        """
        done: set[int] = set()
        queues = _policy.queues(policy, dict(self.orders), epoch=self.epoch, done=done)
        size, protected = self.num_entries, self.num_protected
        shorter: dict[int, Node] = {}
        num_children: dict[int, int] = {}

        def choose() -> int | None:
            crowded = protected / max(size, 1) > _policy.PROTECTED_SHARE
            return _policy.victim(policy, queues, epoch=self.epoch, now=self.now, crowded=crowded)

        while (node_id := choose()) is not None:
            leaf = shorter.get(node_id) or self.node(node_id)
            pages = yield leaf
            size -= pages
            protected -= pages if leaf.hits else 0
            new_leaf = None
            if 0 < pages < leaf.size:
                new_leaf = shorter[node_id] = leaf.ending(leaf.end - pages)
            else:
                done.add(node_id)
                if pages and leaf.parent:
                    left = num_children.get(leaf.parent) or self.node(leaf.parent).num_children
                    num_children[leaf.parent] = left - 1
                    if left == 1 and _tree.get(self.pins, leaf.parent) is None:
                        new_leaf = self.node(leaf.parent)
            if new_leaf is not None:
                for queue in queues:
                    queue.put(new_leaf)
        yield None

    def cut(self, gone: Sequence[tuple[Node, int]]) -> None:
        """Forgets last pages of leaves, as `victims` gave them and in that order; with its last page a leaf itself."""
        removed: list[Node] = []
        before: dict[int, Node] = {}
        after: dict[int, Node] = {}
        lost = collections.Counter()  # children
        for node, pages in gone:
            self.num_entries -= pages
            if self.recording:
                end, size = node.end, _keys.KEY_BYTES
                self.record(Removed(_keys.split_keys(node.run.keys[(end - pages) * size : end * size])))
            if pages < node.size:
                before.setdefault(node.id, node)
                after[node.id] = self._with_spare(node.ending(node.end - pages))
            else:
                after.pop(node.id, None)
                removed.append(before.pop(node.id, node))
                lost[node.parent] += 1
        for node_id in (0, *(node.id for node in removed)):
            lost.pop(node_id, None)
        for node_id, count in lost.items():
            old = before.setdefault(node_id, self.node(node_id))
            after[node_id] = after.get(node_id, old)._replace(num_children=old.num_children - count)
        self.change([(old, after[node_id]) for node_id, old in before.items()], removed=removed)

    def set_pin(self, node_id: int, times: int) -> None:
        """Pins a node so many times; 0 unpins it."""
        node = self.node(node_id)
        was = self._listed(node)
        self.pins = _tree.put(self.pins, node_id, times) if times else _tree.remove(self.pins, node_id)
        if was != self._listed(node):
            value = None if was else node_id
            self.orders = tuple(
                (name, order)
                if name == _policy.WINDOWS
                else (name, _tree.update(order, {_policy.ORDERS[name](node): value}))
                for name, order in self.orders
            )

    def clear(self) -> None:
        """Forgets every entry and pin."""
        self.nodes = self.edges = self.pins = None
        self.orders = tuple((name, None) for name, _ in self.orders)
        self.held = tuple(np.zeros_like(held) for held in self.held)
        self.num_entries = self.num_protected = self.holdings = 0

    # Pages.

    def hold(self, keys: bytes, ids: Int32[np.ndarray, "N G"], taken: list[list[int]]) -> None:
        """Notes pages as held for texts with these stable keys, and adds them to the references to take."""
        self._set_held(keys, ids, taken, True)

    def let_go(self, keys: bytes, ids: Int32[np.ndarray, "N G"], dropped: list[list[int]]) -> None:
        """Notes pages as no longer held, and adds them to the references to give back."""
        self._set_held(keys, ids, dropped, False)

    def _set_held(self, keys, ids, lists, value) -> None:
        if not self._owns_held:
            self.held, self._owns_held = tuple(held.copy() for held in self.held), True
        for held, column, mine in zip(self.held, ids.T, lists, strict=True):
            pages = column[column != NO_PAGE]
            held[pages] = value
            mine.extend(pages.tolist())
        change = checksum(keys, ids)
        self.holdings = (self.holdings + (change if value else -change)) % 2**64

    def pinned_pages(self) -> dict[int, int]:
        """By node, from which place in its run on pages beside windows stay, because a pinned prefix needs them."""
        windowed = [g for g, window in enumerate(self.windows) if window is not None]
        most = max(map(self.reach, windowed), default=0)
        stay: dict[int, int] = {}
        for pinned, _ in _tree.items(self.pins):
            at, left = pinned, most
            while at and left > 0:
                node = self.node(at)
                stay[at] = min(max(node.end - left, node.start), stay.get(at, node.end))
                at, left = node.parent, left - node.size
        return stay

    def thin(self, lacking: list[int], in_use: Sequence[Bool[np.ndarray, "P"]], *, tails: bool) -> list[Gone]:
        """Takes pages beside windows from entries that stay, so many in each group; changes `lacking`.

        Goes through the nodes in `_policy.WINDOWS`: first takes what is spare, then, with `tails`, the rest. Within a
        node the first pages go first, since a window is of use as long as its end is there.
        """
        self.add_order(_policy.WINDOWS)
        key, stay = _policy.ORDERS[_policy.WINDOWS], self.pinned_pages()
        listed, again = _tree.items(dict(self.orders)[_policy.WINDOWS]), []  # a heap of those met once
        following = next(listed, None)
        tables: dict[int, Int32[np.ndarray, "N G"]] = {}
        while max(lacking) > 0 and (following or again):
            if again and (following is None or again[0] < following):
                node, is_tail = self.node(heapq.heappop(again)[1]), True
            else:
                assert following is not None
                node = self.node(following[1])
                is_tail, following = not node.spare, next(listed, None)
            if is_tail and not tails:
                continue
            table = tables.get(node.id)
            if table is None:
                table = node.run.table[node.start : node.end].copy()
            limit = stay.get(node.id, node.end) - node.start
            for g, window in enumerate(self.windows):
                if window is not None and lacking[g] > 0:
                    end = node.size if is_tail else max(node.size - self.reach(g), 0)
                    column = table[: min(limit, end), g]
                    places = np.flatnonzero((column != NO_PAGE) & ~in_use[g][column])[: lacking[g]]
                    if places.size:
                        column[places] = NO_PAGE
                        lacking[g] -= places.size
                        tables[node.id] = table
            if not is_tail:
                heapq.heappush(again, (key(node._replace(spare=False)), node.id))
        gone = []
        for node_id, table in tables.items():
            node = self.node(node_id)
            ids = node.run.table[node.start : node.end]
            lost = np.where(table == NO_PAGE, ids, NO_PAGE)
            places = np.flatnonzero((lost != NO_PAGE).any(axis=1))
            gone.append(Gone(node, tuple((places + node.start).tolist()), lost[places]))
            self.fill(node, table)
        return gone


class Gone(NamedTuple):
    """Pages that an entry lost."""

    node: Node
    """As it was before."""
    places: tuple[int, ...]
    """In its run."""
    ids: Int32[np.ndarray, "N G"]
    """The pages; NO_PAGE where none went."""

    @property
    def keys(self) -> bytes:
        """Stable keys of their entries."""
        keys, size = self.node.run.keys, _keys.KEY_BYTES
        return b"".join([keys[place * size : (place + 1) * size] for place in self.places])


def checksum(keys: bytes, ids: Int32[np.ndarray, "N G"]) -> int:
    """Of which text each of some pages has: a sum over the pages, so that their order does not count."""
    names = np.frombuffer(keys, "<u8").reshape(len(ids), -1)[:, :1]
    places = ids.astype(np.uint64) * np.uint64(ids.shape[1]) + np.arange(ids.shape[1], dtype=np.uint64)
    mixed = _mix(names ^ _mix(places))
    return int(np.where(ids != NO_PAGE, mixed, np.uint64(0)).sum(dtype=np.uint64))


def _mix(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele et al., 2014): every bit of x changes half the bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _age(age: float) -> int:
    """The bucket of an age."""
    return min(math.frexp(age)[1], NUM_AGES - 1) if age >= 1 else 0
