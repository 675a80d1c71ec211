"""Allocation as pure functions of small integer arrays: knows tables and counts, never pages.

Nothing here loops over tokens or pages: cumulative sums give ranks, scatters move ids. Counts are never clamped.
Functions take one group's tables; what concerns all groups (admission) takes a list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from paxcache._types import NO_PAGE, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Array, Bool, Int32


class Request(NamedTuple):
    """What the rows of a step ask for, before pages are counted."""

    query_starts: Int32[Array, "B"]
    query_lens: Int32[Array, "B"]  # 0 for rows that can never fit
    status: Int32[Array, "B"]


class Touched(NamedTuple):
    """The table entries that a step's new tokens fall into: E of them a row, from the row's first new slot on."""

    columns: Int32[Array, "B E"]
    pages: Int32[Array, "B E"]  # what they map now
    shared: Bool[Array, "B E"]  # mapped by others too
    needs: Bool[Array, "B E"]  # must get a fresh page
    ranks: Int32[Array, "B E"]  # running number of the needed pages, in row order, from 1


class Copies(NamedTuple):
    """Pages to copy before anything is written, one at most a row; P marks rows that copy nothing."""

    src: Int32[Array, "B"]
    dst: Int32[Array, "B"]


def cdiv(a, b):
    """Ceiling division of non-negative integers."""
    return (a + (b - 1)) // b


def running_sum(x: Int32[Array, "... N"]) -> Int32[Array, "... N"]:
    """Inclusive prefix sums along the last axis; where that is little work, one masked reduction: one GPU kernel."""
    x, size = x.astype(jnp.int32), x.shape[-1]
    if x.size * size > 1 << 20:
        return jnp.cumsum(x, axis=-1, dtype=jnp.int32)
    index = jnp.arange(size, dtype=jnp.int32)
    before = (index[None] <= index[:, None]).reshape(*(1,) * (x.ndim - 1), size, size)
    return jnp.sum(jnp.where(before, x[..., None, :], 0), axis=-1, dtype=jnp.int32)


def count_at_most(
    sorted_values: Int32[Array, "N"], x: Int32[Array, "*X"], *, largest: int = 1 << 20
) -> Int32[Array, "*X"]:
    """How many of N ascending values are at most x: one masked reduction where that is little work, else a search."""
    if sorted_values.size * x.size > largest:
        return jnp.searchsorted(sorted_values, x, side="right", method="scan_unrolled").astype(jnp.int32)
    values = sorted_values.reshape(*(1,) * x.ndim, -1)
    return jnp.sum(values <= x[..., None], axis=-1, dtype=jnp.int32)


def add_references(
    ref_counts: Int32[Array, "P"], pages: Int32[Array, "..."], amount: int
) -> Int32[Array, "P"]:
    """Counts with `amount` added for each time a page stands in `pages`; negative entries count for none."""
    return ref_counts.at[jnp.where(pages >= 0, pages, ref_counts.shape[0])].add(amount, mode="drop")


def listed(where: Bool[Array, "P"], size: int) -> Int32[Array, "size"]:
    """The first `size` indices at which `where` holds, in order; P behind them."""
    num = where.shape[0]
    rank = jnp.cumsum(where, dtype=jnp.int32)
    at = jnp.where(where & (rank <= size), rank - 1, size)
    return jnp.full(size, num, jnp.int32).at[at].set(jnp.arange(num, dtype=jnp.int32), mode="drop")


def named_once(rows: Int32[Array, "N"], num_rows: int) -> Bool[Array, "N"]:
    """Entries that name a row which no other entry names."""
    inside = (rows >= 0) & (rows < num_rows)
    times = jnp.zeros(num_rows, jnp.int32).at[jnp.where(inside, rows, num_rows)].add(1, mode="drop")
    return inside & (times[jnp.clip(rows, 0, num_rows - 1)] == 1)


def idle_rows(seq_lens: Int32[Array, "B"], tables: list[Int32[Array, "B M"]]) -> Bool[Array, "B"]:
    """Rows of length 0 that map no page in any group."""
    idle = seq_lens == 0
    for table in tables:
        idle &= (table == NO_PAGE).all(axis=1)
    return idle


def request(
    seq_lens: Int32[Array, "B"],
    query_lens: Int32[Array, "B"],
    *,
    num_tokens: int | None,
    max_query_len: int | None,
    row_capacity: int,
    broken: Bool[Array, "B"],
) -> Request:
    """Places the rows' tokens in the step and refuses the rows that can never fit, and those that are broken."""
    wanted = jnp.maximum(query_lens, 0)
    if num_tokens is None:
        assert max_query_len is not None
        starts = jnp.arange(seq_lens.shape[0], dtype=jnp.int32) * max_query_len
        too_many = wanted > max_query_len
    else:
        # One row can pass the step's end by any amount: cut it there, so that the running sum fits int32.
        bounded = jnp.minimum(wanted, num_tokens + 1)
        ends = running_sum(bounded)
        starts = ends - bounded
        too_many = (ends > num_tokens) & (wanted > 0)
        if max_query_len is not None:
            too_many |= wanted > max_query_len
    status = jnp.where(too_many, Status.STEP_FULL, Status.OK)
    status = jnp.where(wanted > row_capacity - seq_lens, Status.ROW_FULL, status)
    invalid = (query_lens < 0) | (broken & (wanted > 0))
    status = jnp.where(invalid, Status.INVALID, status).astype(jnp.int32)
    return Request(starts, jnp.where(status == Status.OK, wanted, 0), status)


def lacks_last_page(
    block_tables: Int32[Array, "B M"], seq_lens: Int32[Array, "B"], *, page_size: int
) -> Bool[Array, "B"]:
    """Rows whose partly filled last page is gone: a fresh one in its place would show its last owner's tokens."""
    column = jnp.minimum(seq_lens // page_size, block_tables.shape[1] - 1)
    page = jnp.take_along_axis(block_tables, column[:, None], axis=1)[:, 0]
    return (page < 0) & (seq_lens % page_size > 0)


def touch(
    block_tables: Int32[Array, "B M"],
    ref_counts: Int32[Array, "P"],
    seq_lens: Int32[Array, "B"],
    query_lens: Int32[Array, "B"],
    *,
    page_size: int,
    max_query_len: int,
) -> Touched:
    """The entries that at most `max_query_len` new tokens a row fall into."""
    max_pages = block_tables.shape[1]
    num_columns = min(max_pages, (max_query_len + page_size - 2) // page_size + 1)
    columns = (seq_lens // page_size)[:, None] + jnp.arange(num_columns, dtype=jnp.int32)[None]
    end = cdiv(seq_lens + query_lens, page_size)
    active = (columns < end[:, None]) & (query_lens > 0)[:, None]
    pages = jnp.take_along_axis(block_tables, jnp.minimum(columns, max_pages - 1), axis=1)
    shared = active & (pages >= 0) & (ref_counts[jnp.maximum(pages, 0)] > 1)
    needs = active & ((pages < 0) | shared)
    in_row = running_sum(needs)
    before = running_sum(in_row[:, -1]) - in_row[:, -1]
    return Touched(columns, pages, shared, needs, before[:, None] + in_row)


def ask(
    seq_lens: Int32[Array, "B"],
    query_lens: Int32[Array, "B"],
    tables: Sequence[Int32[Array, "B M"]],
    ref_counts: Sequence[Int32[Array, "P"]],
    *,
    windowed: Sequence[bool],
    num_tokens: int | None,
    max_query_len: int | None,
    page_size: int,
) -> tuple[Request, list[Touched]]:
    """What a step's rows ask for, and what that touches in each group, before anything is served."""
    most = num_tokens if max_query_len is None else max_query_len
    assert most is not None
    broken = jnp.zeros(seq_lens.shape[0], bool)
    for table, has_window in zip(tables, windowed, strict=True):
        if has_window:  # nothing else takes pages below a row's length
            broken |= lacks_last_page(table, seq_lens, page_size=page_size)
    asked = request(
        seq_lens,
        query_lens,
        num_tokens=num_tokens,
        max_query_len=max_query_len,
        row_capacity=tables[0].shape[1] * page_size,
        broken=broken,
    )
    touched = [
        touch(table, counts, seq_lens, asked.query_lens, page_size=page_size, max_query_len=most)
        for table, counts in zip(tables, ref_counts, strict=True)
    ]
    return asked, touched


def admit(
    touched: list[Touched], ref_counts: list[Int32[Array, "P"]]
) -> tuple[Bool[Array, "B"], Int32[Array, "B"]]:
    """Which rows get their pages, in row order without overtaking, and how many pages each refused one is short of."""
    ok, short = jnp.bool_(True), jnp.int32(0)
    for entries, counts in zip(touched, ref_counts, strict=True):
        free = jnp.cumsum(counts == 0, dtype=jnp.int32)[-1]  # `allocate` wants the same sums: computed once
        missing = jnp.where(entries.needs.any(axis=1), entries.ranks[:, -1] - free, 0)
        ok &= missing <= 0
        short = jnp.maximum(short, missing)
    return ok, short


def allocate(
    block_tables: Int32[Array, "B M"],
    ref_counts: Int32[Array, "P"],
    touched: Touched,
    ok: Bool[Array, "B"],
    seq_lens: Int32[Array, "B"],
    *,
    page_size: int,
) -> tuple[Int32[Array, "B M"], Int32[Array, "P"], Copies]:
    """Maps a fresh page wherever a served row needs one, and names the shared pages whose tokens must be copied."""
    num_pages, max_pages = ref_counts.shape[0], block_tables.shape[1]
    take = touched.needs & ok[:, None]
    most = min(num_pages, take.size)
    fresh = listed(ref_counts == 0, most)
    # A served row's pages are all among the free ones. Rows refused for another group's sake leave gaps in the ranks.
    pages = jnp.where(take, fresh[jnp.clip(touched.ranks - 1, 0, most - 1)], touched.pages)

    row_ids = jnp.arange(take.shape[0], dtype=jnp.int32)[:, None]
    tables = block_tables.at[row_ids, jnp.where(take, touched.columns, max_pages)].set(pages, mode="drop")
    left = take & touched.shared
    changed = jnp.stack([jnp.where(take, pages, num_pages), jnp.where(left, touched.pages, num_pages)])
    counts = ref_counts.at[changed].add(jnp.array([1, -1], jnp.int32)[:, None, None], mode="drop")

    # Only the page of the first new slot holds tokens that the row keeps; it does so unless that slot is its first.
    copy = left[:, 0] & (seq_lens % page_size > 0)
    return tables, counts, Copies(*(jnp.where(copy, p[:, 0], num_pages) for p in (touched.pages, pages)))


def unmap(
    block_tables: Int32[Array, "B M"], ref_counts: Int32[Array, "P"], where: Bool[Array, "B M"]
) -> tuple[Int32[Array, "B M"], Int32[Array, "P"]]:
    """Gives back the mapped entries that `where` marks."""
    counts = add_references(ref_counts, jnp.where(where, block_tables, NO_PAGE), -1)
    return jnp.where(where, NO_PAGE, block_tables), counts


def left_of_window(
    block_tables: Int32[Array, "B M"], first_query: Int32[Array, "B"], window: int, *, page_size: int
) -> Bool[Array, "B M"]:
    """Entries whose last slot lies left of what a query at position `first_query` and any later one sees."""
    ends = (jnp.arange(block_tables.shape[1], dtype=jnp.int32) + 1) * page_size
    return ends[None, :] <= (first_query - window + 1)[:, None]


def past_length(
    block_tables: Int32[Array, "B M"], seq_lens: Int32[Array, "B"], *, page_size: int
) -> Bool[Array, "B M"]:
    """Entries that hold no token of a row of this length."""
    starts = jnp.arange(block_tables.shape[1], dtype=jnp.int32) * page_size
    return starts[None, :] >= seq_lens[:, None]


def remap(
    block_tables: Int32[Array, "B M"], ref_counts: Int32[Array, "P"], new_tables: Int32[Array, "B M"]
) -> Int32[Array, "P"]:
    """Counts after the rows' tables become `new_tables`; references from outside stay counted."""
    return add_references(add_references(ref_counts, new_tables, 1), block_tables, -1)


def check_forks(
    parents: Int32[Array, "N"], children: Int32[Array, "N"], idle: Bool[Array, "B"]
) -> tuple[Bool[Array, "N"], Int32[Array, "B"]]:
    """Whether each entry is fine (padding is), and each row's parent, B where it gets none."""
    num_rows = idle.shape[0]
    padding = (parents == -1) | (children == -1)
    once = named_once(jnp.where(padding, -1, children), num_rows)
    fork = (parents >= 0) & (parents < num_rows) & once & idle[jnp.clip(children, 0, num_rows - 1)]
    parent_of = jnp.full(num_rows, num_rows, jnp.int32)
    parent_of = parent_of.at[jnp.where(fork, children, num_rows)].set(parents, mode="drop")
    return fork | padding, parent_of


def place_tokens(
    query_starts: Int32[Array, "B"],
    query_lens: Int32[Array, "B"],
    first_positions: Int32[Array, "B"],
    *,
    num_tokens: int,
    max_query_len: int | None,
) -> tuple[Int32[Array, "T"], Int32[Array, "T"]]:
    """Row and position of each of the step's flattened tokens; row B and position 0 where a token belongs to none.

    `max_query_len` is given for a row-aligned step, whose rows have so many places each.
    """
    num_rows = query_starts.shape[0]
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    if max_query_len is None:  # the last row that starts at or before a token: starts never fall
        row = count_at_most(query_starts, tokens) - 1
    else:
        row = tokens // max_query_len
    at = jnp.maximum(row, 0)
    offset = tokens - query_starts[at]
    inside = (row >= 0) & (offset < query_lens[at])
    return jnp.where(inside, row, num_rows), jnp.where(inside, first_positions[at] + offset, 0)


def slots(
    block_tables: Int32[Array, "B M"],
    rows: Int32[Array, "T"],
    positions: Int32[Array, "T"],
    *,
    page_size: int,
    num_pages: int,
) -> Int32[Array, "T"]:
    """Each token's slot; P * S, which every write drops, where it has none."""
    num_rows, max_pages = block_tables.shape
    column = jnp.minimum(positions // page_size, max_pages - 1)
    page = block_tables[jnp.minimum(rows, num_rows - 1), column]
    return jnp.where(
        (rows < num_rows) & (page >= 0), page * page_size + positions % page_size, num_pages * page_size
    )
