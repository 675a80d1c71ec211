"""What the tests compare with: paged attention in NumPy, and a cache of plain Python objects.

Both are written from the contract and share no code with the library. Imports NumPy alone.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from typing import Any

import numpy as np

OK, NO_PAGES, ROW_FULL, STEP_FULL, INVALID = range(5)


def attention(
    q,
    k,
    v,
    query_positions,
    key_positions,
    *,
    sm_scale=None,
    soft_cap=None,
    sliding_window=None,
    sinks=None,
    causal=True,
    dtype=np.float64,
):
    """One row, dense: q [n, H, D], k [N, K, D], v [N, K, Dv] -> out [n, H, Dv], natural-log lse [n, H]."""
    q, k, v = (np.asarray(x).astype(dtype) for x in (q, k, v))
    query_positions, key_positions = np.asarray(query_positions)[:, None], np.asarray(key_positions)[None, :]
    group = q.shape[1] // k.shape[1]
    logits = np.einsum("nhd,shd->hns", q, np.repeat(k, group, axis=1))
    logits *= 1 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    visible = np.ones((q.shape[0], k.shape[0]), bool)
    if causal:
        visible &= key_positions <= query_positions
    if sliding_window is not None:
        visible &= key_positions > query_positions - sliding_window
    logits = np.where(visible, logits, -np.inf)
    if sinks is None:
        sinks = np.full(q.shape[1], -np.inf)
    extra = np.asarray(sinks).astype(dtype)[:, None]
    top = np.maximum(logits.max(axis=-1, initial=-np.inf), extra)
    top = np.where(np.isfinite(top), top, 0)
    weights = np.exp(logits - top[..., None])
    total = weights.sum(axis=-1) + np.exp(extra - top)
    out = np.einsum("hns,shd->nhd", weights, np.repeat(v, group, axis=1))
    out = out / np.where(total > 0, total, 1).T[..., None]
    lse = np.where(total > 0, np.log(np.where(total > 0, total, 1)) + top, -np.inf)
    return out, lse.T


def paged_attention(
    q, k_pages, v_pages, block_tables, seq_lens, *, query_starts=None, query_lens=None, sinks=None, **options
):
    """q [T, H, D] over pools [P, K, S, D]; with no query lengths one token a row that has a length. -> (out, lse).

    Tokens of no row get zeros and -inf. Unmapped entries are skipped. Without v_pages keys serve as values.
    """
    k_pages = np.asarray(k_pages).astype(np.float64)
    v_pages = k_pages if v_pages is None else np.asarray(v_pages).astype(np.float64)
    block_tables, num_rows, page_size = np.asarray(block_tables), len(seq_lens), k_pages.shape[2]
    if query_lens is None:
        query_starts, query_lens = range(num_rows), [int(n > 0) for n in seq_lens]
    assert query_starts is not None
    out = np.zeros((*q.shape[:2], v_pages.shape[-1]))
    lse = np.full(q.shape[:2], -np.inf)
    for row in range(num_rows):
        start, num_new, length = int(query_starts[row]), int(query_lens[row]), int(seq_lens[row])
        if num_new == 0:
            continue
        held = [p for p in range(length) if block_tables[row, p // page_size] >= 0]
        pages, offsets = [block_tables[row, p // page_size] for p in held], [p % page_size for p in held]
        out[start : start + num_new], lse[start : start + num_new] = attention(
            q[start : start + num_new],
            k_pages[pages, :, offsets].reshape(len(held), k_pages.shape[1], k_pages.shape[3]),
            v_pages[pages, :, offsets].reshape(len(held), v_pages.shape[1], v_pages.shape[3]),
            length - num_new + np.arange(num_new),
            held,
            sinks=sinks,
            **options,
        )
    return out, lse


class Page:
    """One physical page: a token's name in each slot, None where nothing was written. Sharing is identity."""

    def __init__(self, page_size: int, tokens=()):
        self.slots = list(tokens) + [None] * (page_size - len(tokens))


@dataclasses.dataclass
class Group:
    """Tables of one layer group; entries are Page or None. `held`: by page id, references from outside."""

    num_pages: int
    window: int | None
    tables: list[list[Page | None]]
    held: dict[int, Page] = dataclasses.field(default_factory=dict)

    def counts(self) -> collections.Counter[Page]:
        """References to each page in use."""
        mapped = itertools.chain(*self.tables, self.held.values())
        return collections.Counter(page for page in mapped if page is not None)

    def free(self) -> int:
        """Pages that nobody references."""
        return self.num_pages - len(self.counts())


@dataclasses.dataclass
class StepModel:
    """What `extend` answers."""

    status: list[int]
    pages_short: list[int]
    query_starts: list[int]
    query_lens: list[int]
    seq_lens: list[int]


class Model:
    """A cache of Python lists: groups are (num_pages, window) pairs."""

    def __init__(self, groups, *, num_rows: int, max_pages: int, page_size: int):
        self.num_rows, self.max_pages, self.page_size = num_rows, max_pages, page_size
        self.lens = [0] * num_rows
        self.groups = [Group(p, w, [[None] * max_pages for _ in range(num_rows)]) for p, w in groups]

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-num_tokens // self.page_size)

    def extend(self, wanted, *, num_tokens: Any = None, max_query_len: Any = None) -> StepModel:
        """Refuses what can never fit, then serves rows in order while pages last; decides before it changes."""
        asked = [max(n, 0) for n in wanted]
        starts = [b * max_query_len if num_tokens is None else sum(asked[:b]) for b in range(self.num_rows)]
        status = [OK] * self.num_rows
        for b, n in enumerate(asked):
            fits = n <= max_query_len if num_tokens is None else starts[b] + n <= num_tokens
            if wanted[b] < 0 or (n > 0 and self._lacks_last_page(b)):
                status[b] = INVALID
            elif self.lens[b] + n > self.max_pages * self.page_size:
                status[b] = ROW_FULL
            elif n > 0 and not fits:
                status[b] = STEP_FULL
        new = [n if s == OK else 0 for n, s in zip(asked, status, strict=True)]

        needs = [[self._needs(group, b, n) for b, n in enumerate(new)] for group in self.groups]
        short = [0] * self.num_rows
        for group, need in zip(self.groups, needs, strict=True):
            total = 0
            for b in range(self.num_rows):
                total += len(need[b])
                if need[b] and total > group.free():
                    status[b], short[b] = NO_PAGES, max(short[b], total - group.free())
        new = [n if s == OK else 0 for n, s in zip(new, status, strict=True)]

        for group, need in zip(self.groups, needs, strict=True):
            for b, n in enumerate(new):
                if n > 0:
                    self._map(group, b, n, need[b])
        self.lens = [old + n for old, n in zip(self.lens, new, strict=True)]
        return StepModel(status, short, starts, new, list(self.lens))

    def _lacks_last_page(self, b: int) -> bool:
        last, kept = divmod(self.lens[b], self.page_size)
        return kept > 0 and any(group.tables[b][last] is None for group in self.groups)

    def _needs(self, group: Group, b: int, n: int) -> list[int]:
        entries = range(self.lens[b] // self.page_size, self.pages_for(self.lens[b] + n)) if n > 0 else ()
        counts = group.counts()
        return [m for m in entries if (page := group.tables[b][m]) is None or counts[page] > 1]

    def _map(self, group: Group, b: int, n: int, need: list[int]) -> None:
        old, table = self.lens[b], group.tables[b]
        kept = old % self.page_size
        for m in need:
            page = table[m]
            keep = page.slots[:kept] if page is not None and m == old // self.page_size else ()
            table[m] = Page(self.page_size, keep)
        for position in range(old, old + n):
            self._page(group, b, position).slots[position % self.page_size] = None
        for m in range(self.max_pages):
            if group.window is not None and (m + 1) * self.page_size <= old - group.window + 1:
                table[m] = None

    def _page(self, group: Group, b: int, position: int) -> Page:
        page = group.tables[b][position // self.page_size]
        assert page is not None
        return page

    def write(self, g: int, b: int, position: int, token: int) -> None:
        """Puts a token into its slot; the model itself never lets this reach another row."""
        page = self._page(self.groups[g], b, position)
        assert self.groups[g].counts()[page] == 1, "the model wrote to a shared page"
        page.slots[position % self.page_size] = token

    def fork(self, parents, children) -> list[bool]:
        """All entries are judged, and parents read, before any child changes."""
        real = [(p, c) for p, c in zip(parents, children, strict=True) if -1 not in (p, c)]
        named = collections.Counter(c for _, c in real)
        before_lens, before = list(self.lens), [[list(t) for t in g.tables] for g in self.groups]
        idle = [n == 0 and not any(any(g.tables[b]) for g in self.groups) for b, n in enumerate(self.lens)]
        ok = []
        for p, c in zip(parents, children, strict=True):
            if -1 in (p, c):
                ok.append(True)
                continue
            valid = 0 <= p < self.num_rows and 0 <= c < self.num_rows and idle[c] and named[c] == 1
            ok.append(valid)
            if valid:
                self.lens[c] = before_lens[p]
                for group, tables in zip(self.groups, before, strict=True):
                    group.tables[c] = list(tables[p])
        return ok

    def reorder(self, parents) -> None:
        """-1 empties a row; other parents out of range leave it as it is."""
        sources = [p if -1 <= p < self.num_rows else b for b, p in enumerate(parents)]
        self.lens = [0 if p < 0 else self.lens[p] for p in sources]
        for group in self.groups:
            group.tables = [[None] * self.max_pages if p < 0 else list(group.tables[p]) for p in sources]

    def truncate(self, lens) -> None:
        """Shortens; negative and longer lengths leave a row alone, pages past its length included."""
        for b, n in enumerate(lens):
            if 0 <= n < self.lens[b]:
                self.lens[b] = n
                for group in self.groups:
                    kept = self.pages_for(n)
                    group.tables[b] = group.tables[b][:kept] + [None] * (self.max_pages - kept)

    def release(self, rows) -> None:
        """Empties rows."""
        for b, gone in enumerate(rows):
            if gone:
                self.lens[b] = 0
                for group in self.groups:
                    group.tables[b] = [None] * self.max_pages

    def tokens(self, g: int, b: int) -> list[tuple[int, Any]]:
        """(position, token) of a row's mapped positions; token None where nothing defined lies."""
        table, size = self.groups[g].tables[b], self.page_size
        mapped = ((p, table[p // size]) for p in range(self.lens[b]))
        return [(p, page.slots[p % size]) for p, page in mapped if page is not None]

    def assert_matches(self, seq_lens, block_tables, ref_counts) -> None:
        """Same lengths and holes, pages equal up to their names, and counts equal to references."""
        np.testing.assert_array_equal(seq_lens, self.lens, "seq_lens")
        for g, group in enumerate(self.groups):
            real, counts = np.asarray(block_tables[g]), np.zeros(group.num_pages, np.int64)
            page_of = dict(group.held)
            id_of = {page: page_id for page_id, page in page_of.items()}
            for b in range(self.num_rows):
                for m in range(self.max_pages):
                    page, page_id = group.tables[b][m], int(real[b, m])
                    where = f"group {g}, row {b}, entry {m}: page {page_id}"
                    if page is None:
                        assert page_id == -1, f"{where}, expected none"
                        continue
                    assert 0 <= page_id < group.num_pages, where
                    assert id_of.setdefault(page, page_id) == page_id, f"{where}, sharing was lost"
                    assert page_of.setdefault(page_id, page) is page, f"{where}, two pages became one"
            for page, count in group.counts().items():
                counts[id_of[page]] = count
            np.testing.assert_array_equal(ref_counts[g], counts, f"ref_counts of group {g}")
