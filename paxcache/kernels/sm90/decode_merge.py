"""How decode on Hopper (sm_90a) puts results together: partial ones of cut pairs, output tiles, zeros of no row."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from paxcache.kernels.sm90._mosaic import pl, plgpu
from paxcache.kernels.sm90.decode_case import Case
from paxcache.kernels.sm90.decode_plan import TILE, OfRange, OfRow, count_pieces
from paxcache.kernels.sm90.inline.tiles import store_transposed, store_untransposed
from paxcache.kernels.sm90.operands import LOG2E

NEG = -1e30  # where a running maximum starts: finite, so that no difference of two maxima is NaN

MATRIX = plgpu.Layout.WGMMA
MATRIX_T = plgpu.Layout.WGMMA_TRANSPOSED
COLUMN = plgpu.Layout.WGMMA.reduce(0)


def per_column(columns: Any, num_rows: int) -> Any:
    """One value a column, repeated for each row of a matrix."""
    return lax.broadcast_in_dim(columns, (num_rows, columns.shape[0]), [1])


def head_and_first_query(case: Case, pair: Any) -> tuple[Any, Any]:
    """The head group and the first query token of the row that a pair stands for."""
    if case.blocks == 1:
        return pair, 0
    return lax.div(pair, case.blocks), lax.rem(pair, case.blocks) * case.config.block_tokens


def nothing(num_rows: int, columns: int, sum_shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Sum, maximum and denominator before the first token; the denominator may be kept a value a token."""
    zeros = jnp.zeros(sum_shape, jnp.float32)
    return (
        plgpu.layout_cast(jnp.zeros((num_rows, columns), jnp.float32), MATRIX),
        plgpu.layout_cast(jnp.full((columns,), NEG, jnp.float32), COLUMN),
        plgpu.layout_cast(zeros, MATRIX if len(sum_shape) == 2 else COLUMN),
    )


def to_output_tile(values: Any, o_s: Any, case: Case) -> None:
    """Puts [head dim, columns] into `o_s` as [columns, head dim], ready for the copy engine."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # earlier copies have left o_s
    values = values.astype(o_s.dtype)
    if case.quantized and not case.interpreted:
        store_untransposed(values, o_s)
    elif case.num_parts > 1:  # float32 fits no matrix of the store
        o_s.T[...] = plgpu.layout_cast(values, MATRIX_T)
    else:
        store_transposed(values, o_s, interpreted=case.interpreted)
    plgpu.commit_smem()  # all threads' values, before the copy engine reads them


def copy_heads(o_s: Any, first_column: int, out: Any, token: Any, head: Any, group: int) -> None:
    """Starts the copy of one query token's heads."""
    source = o_s.at[pl.ds(first_column, group)]
    plgpu.copy_smem_to_gmem(source, out.at[token, pl.ds(head * group, group)])


def zero_unowned(
    program: Any, programs: Any, row_line: Any, num_rows: int, out: Any, o_s: Any, case: Case
) -> None:
    """Writes zeros for the tokens that no row owns: before the first row, between rows and after the last.

    `programs` of them share the work.
    """
    num_tokens = out.shape[0]

    def zero(begin, end, step):
        """Of the tokens from `begin` on every `step`-th."""
        count = lax.div(end - begin + (step - 1), jnp.asarray(step, jnp.int32))

        @pl.when(count > 0)
        def _():
            zeros = jnp.zeros((case.padded_dim, case.columns), jnp.float32)
            to_output_tile(plgpu.layout_cast(zeros, MATRIX), o_s, case)

            def copy(j, _):
                token, head = begin + lax.div(j, case.head_groups) * step, lax.rem(j, case.head_groups)
                copy_heads(o_s, 0, out, token, head, case.group)

            lax.fori_loop(0, count * case.head_groups, copy, None)

    def end_of(row):
        return row_line(row, OfRow.START) + row_line(row, OfRow.QUERIES)

    def gap(i, _):
        after = program + i * programs  # the row after the gap
        begin = jnp.where(after > 0, end_of(jnp.maximum(after - 1, 0)), 0)
        zero(
            begin,
            jnp.where(after < num_rows, row_line(jnp.minimum(after, num_rows - 1), OfRow.START), num_tokens),
            1,
        )

    # After the last row most of a packed step may be empty: where it can be long, all programs share it.
    is_long = num_tokens - num_rows >= case.config.num_programs
    num_gaps = num_rows if is_long else num_rows + 1
    gaps = jnp.where(program < programs, lax.div(num_gaps - 1 + programs - program, programs), 0)
    lax.fori_loop(0, gaps, gap, None)
    if is_long:
        pl.when(program < programs)(lambda: zero(end_of(num_rows - 1) + program, num_tokens, programs))


def parts_of_pair(case: Case, number: Any) -> tuple[Any, Any, int]:
    """Where a cut pair's partial results lie: the first one, the second, and the step from there to the others."""
    if case.config.piece_len is None:
        return case.config.num_programs + number - case.config.lanes, number, case.config.lanes
    return number * case.max_pieces, number * case.max_pieces + 1, 1


def join(
    case: Case, partials: Any, stats: Any, first: Any, second: Any, step_by: int, others: Any
) -> tuple[Any, Any, Any]:
    """The sum, maximum and denominator of a cut pair, always added up in the order of the tokens."""
    chunk, DP = case.config.join_chunk, case.padded_dim

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def part(i):
        return load(partials.at[i], MATRIX), load(stats.at[i, 0], COLUMN), load(stats.at[i, 1], COLUMN)

    def step(i, total):
        acc, m, l = total
        parts = []
        for j in range(chunk):
            at = i * chunk + j
            index = second + (jnp.minimum(at, others) - 1) * step_by
            o_j, m_j, l_j = part(index if j else jnp.where(at == 0, first, index))
            parts.append((o_j, m_j + jnp.where(at <= others, 0.0, 2 * NEG), l_j))  # past the end: weight 0
        m_new = functools.reduce(jnp.maximum, [m_j for _, m_j, _ in parts], m)
        weight = jnp.exp2(m - m_new)
        acc, l = acc * per_column(weight, DP), l * weight
        for o_j, m_j, l_j in parts:
            weight = jnp.exp2(m_j - m_new)
            acc, l = acc + o_j * per_column(weight, DP), l + l_j * weight
        return acc, m_new, l

    return lax.fori_loop(0, lax.div(others + chunk, chunk), step, nothing(DP, case.columns, (case.columns,)))


def finish(case: Case, acc: Any, m: Any, l: Any, where: Any, sinks: Any, outs: Any, o_s: Any) -> None:
    """Normalises a pair's result and writes it."""
    row, pair, num_queries, start = where
    head, first_query = head_and_first_query(case, pair)
    DP, block_tokens = case.padded_dim, case.config.block_tokens
    if case.has_sinks:
        sink = plgpu.load(sinks.at[head], layout=COLUMN, optimized=False) * LOG2E
        m_all = jnp.maximum(m, sink)
        weight = jnp.exp2(m - m_all)
        acc, l, m = acc * per_column(weight, DP), l * weight + jnp.exp2(sink - m_all), m_all
    some = l > 0  # nothing was seen, as where all is hole: zeros
    inverse = jnp.where(some, 1.0 / l, jnp.zeros_like(l))
    to_output_tile(acc * per_column(inverse, DP), o_s, case)
    start = start + first_query
    for j in range(block_tokens):
        # Past the row's last query token: columns whose results nobody asked for.
        @pl.when(first_query + j < num_queries)
        def _(j=j):
            copy_heads(o_s, j * case.group, outs["out"], start + j, head, case.group)

    if case.return_lse:
        lse = (m + jnp.log2(l)) * (1 / LOG2E)
        outs["lse"][row, pair] = jnp.where(some, lse, jnp.full_like(l, -jnp.inf))


def join_body(refs: dict[str, Any], case: Case, o_s: Any) -> None:
    """One program of the second kernel: one join."""
    plan, number, o_s = refs["plan"], lax.axis_index("block"), o_s.at[0]
    if case.config.piece_len is None:
        group, lane = lax.div(number, case.config.lanes), lax.rem(number, case.config.lanes)
        columns = OfRange.ROW, OfRange.TURN, OfRange.QUERIES, OfRange.START
        row, turn, queries, start = (plan[group, x] for x in columns)
        pair, others = turn * case.config.lanes + lane, plan[group, OfRange.PARTS]
    else:
        row, pair = lax.div(number, case.pairs), lax.rem(number, case.pairs)
        length, low, queries, start = (
            plan[case.num_ranges + row, x] for x in (OfRow.LEN, OfRow.LOW, OfRow.QUERIES, OfRow.START)
        )
        tiles = lax.div(length - (low - lax.rem(low, case.block_len)) + (TILE - 1), TILE)
        others = count_pieces(case.config.piece_len, tiles) - 1

    @pl.when(others > 0)
    def _():
        total = join(case, refs["partials"], refs["stats"], *parts_of_pair(case, number), others)
        finish(case, *total, (row, pair, queries, start), refs.get("sinks"), refs, o_s)
        plgpu.wait_smem_to_gmem(0)
