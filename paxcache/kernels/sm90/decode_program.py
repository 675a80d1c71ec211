"""A thread block of decode on Hopper (sm_90a): programs that consume, and a warpgroup that feeds them all."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from paxcache.kernels.sm90._mosaic import pl, plgpu
from paxcache.kernels.sm90.decode_case import FLOAT_COLUMNS, NOTES, WARPS, Case
from paxcache.kernels.sm90.decode_merge import (
    COLUMN,
    MATRIX,
    MATRIX_T,
    finish,
    head_and_first_query,
    join,
    nothing,
    parts_of_pair,
    per_column,
    zero_unowned,
)
from paxcache.kernels.sm90.decode_plan import (
    COUNTER_SETS,
    TILE,
    Config,
    OfRange,
    OfRow,
    count_joins,
    count_pieces,
    tiles_of_piece,
)
from paxcache.kernels.sm90.decode_walk import Walk
from paxcache.kernels.sm90.inline.matrices import reduce_columns
from paxcache.kernels.sm90.inline.memory import arrive, store_arrays
from paxcache.kernels.sm90.inline.tiles import (
    load_bytes,
    load_floats,
    store_queries,
    store_transposed,
    zero_rows,
)
from paxcache.kernels.sm90.operands import LOG2E, parts_of, soft_cap

HOLE = 1 << 28  # added to the index of a token in a hole, past any length

ROW_OF_MATRIX = plgpu.Layout.WGMMA.reduce(1)


def per_row(rows: Any, num_columns: int) -> Any:
    """One value a row, repeated for each column of a matrix."""
    return lax.broadcast_in_dim(rows, (rows.shape[0], num_columns), [0])


def limits_of_columns(case: Case, length: Any, num_queries: Any, first_query: Any, window: Any) -> Any:
    """The first token that each column sees, or None, and the one after the last; scalars where all see the same.

    Args:
      case: the call.
      length: tokens of the row; this and the results are counted from any one token.
      num_queries: query tokens of the row.
      first_query: the query token that column 0 stands for.
      window: tokens a query sees, or None.
    """
    if case.max_query_len == 1 or (window is None and not case.causal):
        return None if window is None else length - window, length
    # Column j * group + i is head i of query token j. Padding columns count as later tokens: they see too much, and
    # are not written.
    column = plgpu.broadcasted_iota(jnp.int32, (case.columns,), 0, layout=COLUMN)
    position = lax.div(column, jnp.full_like(column, case.group)) + (length - num_queries + first_query)
    low = None if window is None else position - (window - 1)
    high = jnp.minimum(position + 1, length) if case.causal else length
    return low, high


def is_visible(tokens: Any, low: Any, high: Any, holes: Any, tile_start: Any, copy_len: int) -> Any:
    """Which tokens of a tile are seen: `tokens` counts them from the tile's first, `holes` has a bit a copy."""
    copy = lax.shift_right_logical(tokens, jnp.full_like(tokens, copy_len.bit_length() - 1))
    hole = lax.shift_right_logical(jnp.full_like(tokens, 0) + holes, copy)
    token = tokens + lax.bitwise_and(hole, jnp.full_like(tokens, 1)) * HOLE

    def limit(x):
        x = x - tile_start
        return per_column(x, tokens.shape[0]) if jnp.ndim(x) else x

    seen = token < limit(high)
    return seen if low is None else jnp.logical_and(seen, token >= limit(low))


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A thread block: what it was given, and its place among all."""

    case: Case
    refs: Mapping[str, Any]
    """The kernel's inputs and outputs by name."""
    scratch: Mapping[str, Any]
    """Shared memory and barriers by name."""
    number: Any
    layer: Any
    busy_blocks: Any
    """Thread blocks that have work."""

    @property
    def config(self) -> Config:
        """The launch configuration."""
        return self.case.config

    def walk_of(self, consumer: Any) -> Walk:
        """The way of a consumer's program; neighbours lie in neighbouring blocks."""
        program = consumer * self.busy_blocks + self.number
        if self.config.beside_prefill:
            program = jnp.where(self.number < self.busy_blocks, program, self.config.num_programs)
        return Walk(self.case, self.refs["plan"], program)


def attend_body(refs: dict[str, Any], case: Case, number: Any, **scratch: Any) -> None:
    """One thread block: the pieces of its programs' ranges, in order."""
    thread, layer, config = lax.axis_index("thread"), refs["layer"][0], case.config
    busy = refs["plan"][case.num_ranges, OfRow.BUSY_BLOCKS] if config.beside_prefill else case.num_blocks
    block = Block(case, refs, scratch, number, layer, busy)
    pl.when(thread == config.consumers)(lambda: produce(block))

    @pl.when(thread < config.consumers)
    def _():
        Consumer.of(block, thread if config.consumers > 1 else 0).run()


def produce(block: Block) -> None:
    """The producer: warps that each copy a program's keys, its values, or both in turn."""
    consumers = range(block.config.consumers)
    streams = [(consumer, name) for consumer in consumers for name in "kv"]
    if len(streams) > WARPS:
        streams = [(consumer, "kv") for consumer in consumers]

    def warp(index):
        for x, (consumer, names) in enumerate(streams):
            pl.when(index == x)(functools.partial(_stream, block, consumer, names))

    plgpu.warp_map(warp)


def _stream(block: Block, consumer: int, names: str) -> None:
    """A warp's copies, from the first tile of a program to its last."""
    case, S, copy_len, stages = block.case, block.case.page_size, block.case.copy_len, block.config.num_stages
    walk = block.walk_of(consumer)
    num_tiles = walk.count(OfRange.TILES)

    def step(i, place):
        row, _, _, length, *_ = place
        first_token = walk.first_token(place)
        # Past the end a valid page is read once more; its tokens are masked later. Read before the wait, so that the
        # latency hides behind it.
        last = jnp.minimum(lax.div(length - 1, S), case.max_pages - 1)
        columns = [lax.div(first_token + j, S) for j in range(0, TILE, copy_len)]
        pages = [block.refs["tables"][row, jnp.minimum(x, last)] for x in columns]
        return _copy_tile(block, consumer, names, walk, i, place, pages)

    def drain(free):
        """Waits for the last completions: a producer must see every one."""

        def wait(i, _):
            plgpu.barrier_wait(free.at[consumer * stages + lax.rem(i, stages)])

        lax.fori_loop(jnp.maximum(num_tiles - stages, 0), num_tiles, wait, None)

    @pl.when(num_tiles > 0)
    def _():
        # The first tile's pages stand in the plan: one memory latency less before the stream begins.
        pages = [walk.range_line(OfRange.PAGES + j // case.block_len) for j in range(0, TILE, copy_len)]
        place = _copy_tile(block, consumer, names, walk, 0, walk.first_place(), pages)
        lax.fori_loop(1, num_tiles, step, place)
        for name in names:
            drain(block.scratch[f"{name}_free"])


def _copy_tile(
    block: Block, consumer: int, names: str, walk: Walk, i: Any, place: Any, pages: Sequence[Any]
) -> Any:
    """Starts the copies of tile number i; returns the place of the next one."""
    case, S, copy_len, stages = block.case, block.case.page_size, block.case.copy_len, block.config.num_stages
    scratch, notes = block.scratch, block.scratch["notes"]
    slot = consumer * stages + lax.rem(i, stages)
    head, _ = head_and_first_query(case, walk.pair(place))
    if case.groups_per_kv_head > 1:
        head = lax.div(head, case.groups_per_kv_head)
    first_block = lax.div(walk.first_token(place), copy_len)
    for name in names:
        buffer, full, free = (scratch[f"{name}_{x}"] for x in ("s", "full", "free"))

        # The consumer arrives at `free` when it has read the slot's last tile, and this warp waits before it
        # overwrites the tile and the note.
        @pl.when(i >= stages)
        def _(free=free):
            plgpu.barrier_wait(free.at[slot])

        if name == "k":
            # Noted before the copies are issued: their arrival at `full` shows it too.
            bits = [jnp.where(page < 0, 1 << j, 0) for j, page in enumerate(pages)]
            notes[consumer, NOTES + lax.rem(i, stages)] = functools.reduce(lax.bitwise_or, bits)
        for j, page in enumerate(pages):
            tokens = pl.ds(lax.rem(first_block + j, S // copy_len) * copy_len, copy_len)

            def part(pool, page=page, tokens=tokens):
                whole = pool.at[block.layer, jnp.maximum(page, 0), head]
                return whole.at[tokens] if copy_len < S else whole

            target = buffer.at[slot, pl.ds(j * copy_len, copy_len)]
            if buffer.shape[-1] > case.head_dim:
                target = target.at[:, pl.ds(0, case.head_dim)]
            # Every copy arrives at `full` with its last byte; the consumer waits for all of a tile's.
            plgpu.copy_gmem_to_smem(part(block.refs[name]), target, full.at[slot])
            if name == "k" and case.token_scales:
                # Those of values too, which are needed before the values.
                for scales in ("k_scales", "v_scales"):
                    target = scratch[scales].at[slot, pl.ds(j * copy_len, copy_len)]
                    # A plain bulk copy: boxes may not begin between multiples of 128 bytes.
                    in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
                    plgpu.copy_gmem_to_smem(
                        part(block.refs[scales]), target, full.at[slot], oob_mode=in_bounds
                    )
    return walk.move(place, place[2] + 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """A program: a warpgroup that attends to the pieces of its range."""

    block: Block
    number: Any
    """Among the consumers of the block."""
    walk: Walk
    lane: Any
    num_tiles: Any
    own: Mapping[str, Any]
    """Its part of shared memory by name."""

    @classmethod
    def of(cls, block: Block, number: Any) -> Consumer:
        """The consumer with this number."""
        walk = block.walk_of(number)
        lane, num_tiles = walk.lane, walk.count(OfRange.TILES)
        own = {x: block.scratch[x].at[number] for x in ("q_raw", "q_s", "p_s", "o_s", "maxima", "notes")}
        return cls(block, number, walk, lane, num_tiles, own)

    @property
    def case(self) -> Case:
        """What is static."""
        return self.block.case

    @property
    def interpreted(self) -> dict[str, bool]:
        """The option of inline code."""
        return {"interpreted": self.case.interpreted}

    def run(self) -> None:
        """Zeros for tokens of no row, then all pieces, in order."""
        block, case, config, walk = self.block, self.case, self.case.config, self.walk
        refs, num_rows = block.refs, block.refs["tables"].shape[0]
        sharing, programs = walk.program, config.num_programs
        if config.beside_prefill:
            blocks = jnp.where(block.busy_blocks > 0, block.busy_blocks, case.num_blocks)
            programs = blocks * config.consumers
            sharing = jnp.where(block.number < blocks, self.number * blocks + block.number, programs)
        zero_unowned(sharing, programs, walk.row_line, num_rows, refs["out"], self.own["o_s"], case)
        scale = refs["scale"][0] * LOG2E
        window = refs["window"][0] if case.windowed else None
        start = nothing(case.padded_dim, case.columns, (TILE, case.columns))
        num_pieces, first_place = walk.count(OfRange.PIECES), walk.first_place()

        def piece(number, carry):
            one = Piece.of(self, *carry, scale=scale, window=window)
            return one.run(number, num_pieces, start)

        pl.when(num_pieces > 0)(lambda: self.fetch_queries(first_place))
        lax.fori_loop(0, num_pieces, piece, (0, first_place))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # shared memory must outlive the last copies

    def fetch_queries(self, place: Any) -> None:
        """Starts the copies of a piece's queries to q_raw, which all threads have read."""
        case, q, G = self.case, self.block.refs["q"], self.case.group
        head, first_query = head_and_first_query(case, self.walk.pair(place))
        start, last = place[-1] + first_query, q.shape[0] - 1
        for j in range(case.config.block_tokens):
            # Past the row's last token: another row's, whose results are not written.
            source = q.at[jnp.minimum(start + j, last), pl.ds(head * G, G)]
            # One arrival a token at `q_full`, where this warpgroup waits for all.
            full = self.block.scratch["q_full"].at[self.number]
            plgpu.copy_gmem_to_smem(source, self.own["q_raw"].at[pl.ds(j * G, G)], full)

    def product(self, rows: Any, columns: Any, num_rows: int) -> Any:
        """Keys or values, in registers where they are quantised, times queries or weights in shared memory."""
        if self.case.quantized and self.case.interpreted:  # which knows no products of registers
            return lax.dot(rows.astype(jnp.float32), columns[...].astype(jnp.float32))

        def multiply(acc):
            plgpu.wgmma(acc, rows, columns)
            return acc[...]

        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((num_rows, self.case.columns), jnp.float32))

    def product_of_parts(self, tile: Any, columns: Any, num_rows: int, *, transposed: bool) -> Any:
        """float32 keys, or values transposed, times the parts of queries or weights, the small ones first."""
        case, interpreted = self.case, self.interpreted
        which = [(i, last - i) for last in reversed(range(case.num_parts)) for i in range(last + 1)]
        starts = range(0, num_rows, 64), range(0, columns.shape[-1], FLOAT_COLUMNS)
        blocks = list(itertools.product(*starts))

        def factors(row, column):
            """The pairs of parts of a block of 64 rows."""
            first, shape = (row, column), (64, FLOAT_COLUMNS)
            if transposed:
                first, shape = (column, row), (FLOAT_COLUMNS, 64)
            numbers = load_floats(tile, first, shape, transposed=transposed, **interpreted)
            parts = parts_of(numbers, case.dtype)
            return [(parts[i], columns.at[j, :, pl.ds(column, FLOAT_COLUMNS)].T) for i, j in which]

        def multiply(acc):
            for row, column in blocks:
                for a, b in factors(row, column):
                    plgpu.wgmma(acc.at[pl.ds(row, 64)] if num_rows > 64 else acc, a, b)
                plgpu.wgmma_wait(0)  # the registers are free for the next block
            return acc[...]

        if case.interpreted:  # which knows no products of registers
            by_row = {}
            for row, column in blocks:
                products = [
                    lax.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
                    for a, b in factors(row, column)
                ]
                by_row[row] = by_row.get(row, 0.0) + sum(products)
            return jnp.concatenate(list(by_row.values()))
        return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((num_rows, case.columns), jnp.float32))

    def scores(self, slot: Any) -> Any:
        """[tokens, columns], before scales."""
        case, q_s = self.case, self.own["q_s"]
        keys = self.block.scratch["k_s"].at[slot]
        queries = q_s.at[:, :, pl.ds(0, case.head_dim)] if case.padded_dim > case.head_dim else q_s
        if case.num_parts > 1:
            return self.product_of_parts(keys, queries, TILE, transposed=False)
        if case.quantized:
            keys = load_bytes(keys, case.dtype, transposed=False, **self.interpreted)
        return self.product(keys, queries.at[0].T, TILE)

    def values_of(self, slot: Any) -> Any:
        """[head dim, tokens]."""
        v_s = self.block.scratch["v_s"]
        if not self.case.quantized:
            return v_s.at[slot].T
        return load_bytes(v_s.at[slot], self.case.dtype, transposed=True, **self.interpreted)

    def scales_of(self, slot: Any, scale: Any) -> tuple[Any, Any, Any]:
        """Of a tile of quantised pages the keys' scales, and the logarithms and reciprocals of the values'."""
        block, N = self.block, self.case.columns
        if self.case.token_scales:
            of_keys, of_values = (
                plgpu.load(block.scratch[x].at[slot], layout=ROW_OF_MATRIX, optimized=False)
                for x in ("k_scales", "v_scales")
            )
            # A scale of 0 has only zeros, and any scale is right. NaN is no token's of the row.
            of_values = jnp.where(of_values > 0, of_values, jnp.ones_like(of_values))
            inverse = per_row(1.0 / of_values, N)
            return per_row(of_keys * scale, N), per_row(jnp.log2(of_values), N), inverse
        of_keys, of_values = (block.refs[x][block.layer, 0, 0, 0] for x in ("k_scales", "v_scales"))
        of_values = jnp.where(of_values > 0, of_values, 1.0)
        return of_keys * scale, jnp.log2(of_values), 1.0 / of_values

    def clean_values(self, slot: Any, low: Any, high: Any, holes: Any) -> None:
        """Zeros for tokens that are not the row's: 0 * NaN would be NaN."""
        case, values = self.case, self.block.scratch["v_s"].at[slot]
        zero_rows(values, low, high, holes, case.copy_len, tile_bytes=case.stored_bytes, **self.interpreted)
        if case.by_registers:
            plgpu.commit_smem()  # all threads' zeros, before others load them


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A piece: what a program does of one pair."""

    consumer: Consumer
    tiles_done: Any
    """By the program before."""
    place: Any
    pair: Any
    base: Any
    """The token that tile 0 begins with; the others are counted from it."""
    tiles: Any
    """Of the pair."""
    end: Any
    next_place: Any
    low: Any
    """The first visible token of each column, or None."""
    high: Any
    """The one after the last."""
    low_any: Any
    """The first token that some query sees, or None."""
    scale: Any

    @classmethod
    def of(cls, consumer: Consumer, tiles_done: Any, place: Any, *, scale: Any, window: Any) -> Piece:
        """The piece that begins at a place."""
        walk, case = consumer.walk, consumer.case
        _, _, _, length, low, num_queries, _ = place
        pair = walk.pair(place)
        base, tiles = walk.base_of(low), walk.tiles_of(place)
        end = walk.piece_end(place, consumer.num_tiles - tiles_done)
        next_place = walk.move(place, end)
        _, first_query = head_and_first_query(case, pair)
        low_columns, high_columns = limits_of_columns(case, length - base, num_queries, first_query, window)
        return cls(
            consumer=consumer,
            tiles_done=tiles_done,
            place=place,
            pair=pair,
            base=base,
            tiles=tiles,
            end=end,
            next_place=next_place,
            low=low_columns,
            high=high_columns,
            low_any=low - base if case.windowed else None,
            scale=scale,
        )

    def run(self, number: Any, num_pieces: Any, start: Any) -> tuple[Any, Any]:
        """All of it, which is one of the program's pieces; returns the tiles done and the next place."""
        consumer, case, config = self.consumer, self.consumer.case, self.consumer.case.config
        block, walk, own, interpreted = consumer.block, consumer.walk, consumer.own, consumer.interpreted
        row, _, begin, _, _, num_queries, first_token = self.place
        whole = jnp.logical_and(begin == 0, self.end == self.tiles)
        own_join: Any = None
        own_others: Any = None
        if config.piece_len is None:  # of a cut pair; read here, so that the tiles hide the latency
            own_join = walk.range_line(OfRange.JOIN)
            own_others = walk.range_line(jnp.where(begin == 0, OfRange.NEXT_PARTS, OfRange.JOIN_PARTS))

        # Where the copies of `fetch_queries` arrive: this piece's queries are in q_raw.
        plgpu.barrier_wait(block.scratch["q_full"].at[consumer.number])
        if case.quantized:
            store_queries(own["q_raw"], own["q_s"].at[0], tile_bytes=case.tile_bytes, **interpreted)
        else:
            queries = plgpu.load(own["q_raw"].T, layout=MATRIX_T, optimized=False)
            for j, part in enumerate(parts_of(queries, case.dtype)):
                own["q_s"].at[j].T[...] = part
        plgpu.commit_smem()  # all threads' queries, before the matrix unit reads them; q_raw may be overwritten
        pl.when(number + 1 < num_pieces)(lambda: consumer.fetch_queries(self.next_place))

        acc, m, l = lax.fori_loop(begin, self.end, self.tile, start)
        l = reduce_columns(l, jnp.sum, own["maxima"].at[lax.rem(self.end, 2)], **interpreted)
        where, refs = (row, self.pair, num_queries, first_token), block.refs
        write = functools.partial(
            finish, case, where=where, sinks=refs.get("sinks"), outs=refs, o_s=own["o_s"]
        )
        pl.when(whole)(lambda: write(acc, m, l))
        pl.when(jnp.logical_not(whole))(lambda: self.hand_over(acc, m, l, own_join, own_others, write))
        return self.tiles_done + (self.end - begin), self.next_place

    def tile(self, t: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """Tile t of the pair: the sum of values, each column's maximum, and its denominator by token."""
        consumer, case, config = self.consumer, self.consumer.case, self.consumer.case.config
        scratch, own, interpreted = consumer.block.scratch, consumer.own, consumer.interpreted
        k_full, v_full, k_free, v_free = (scratch[x] for x in ("k_full", "v_full", "k_free", "v_free"))
        _, _, begin, length, *_ = self.place
        low_any = self.low_any
        acc, m, l = carry
        stage = lax.rem(self.tiles_done + (t - begin), config.num_stages)
        slot = consumer.number * config.num_stages + stage
        # Where the copies arrive of this tile's keys and scales, after the note about its holes.
        plgpu.barrier_wait(k_full.at[slot])
        holes = own["notes"][NOTES + stage]
        of_keys, log_of_values, inverse_of_values = self.scale, 0.0, 1.0
        if case.quantized:
            of_keys, log_of_values, inverse_of_values = consumer.scales_of(slot, self.scale)
        s = consumer.scores(slot) * of_keys
        if not case.by_registers:
            plgpu.barrier_arrive(k_free.at[slot])  # where the producer waits before it overwrites the keys
        if case.soft_cap is not None:
            s = soft_cap(s, case.soft_cap, **interpreted)
        if case.quantized:
            s = s + log_of_values
        tokens = plgpu.broadcasted_iota(jnp.int32, (TILE, case.columns), 0, layout=MATRIX)
        visible = is_visible(tokens, self.low, self.high, holes, t * TILE, case.copy_len)
        # A select: keys that are not the row's may be NaN.
        s = jnp.where(visible, s, jnp.full_like(s, -jnp.inf))

        # Buffers in turn: while one is read, none can be two tiles ahead.
        maxima = own["maxima"].at[lax.rem(t, 2)]
        m_new = jnp.maximum(m, reduce_columns(s, jnp.max, maxima, **interpreted))
        rescale = jnp.exp2(m - m_new)
        p = jnp.exp2(s - per_column(m_new, TILE))
        weight = p * inverse_of_values if case.quantized else p
        l = l * per_column(rescale, TILE) + weight  # added up over the tokens once a piece
        acc = acc * per_column(rescale, case.padded_dim)
        for j, part in enumerate(parts_of(p, case.dtype)):
            store_transposed(part, own["p_s"].at[j], tile_bytes=case.tile_bytes, **interpreted)

        plgpu.barrier_wait(v_full.at[slot])  # where the copies of this tile's values arrive
        foreign = jnp.logical_or(length - self.base < (t + 1) * TILE, holes != 0)
        if case.windowed:
            foreign = jnp.logical_or(foreign, low_any > t * TILE)
        if case.may_be_nan:
            low = 0 if low_any is None else low_any - t * TILE
            pl.when(foreign)(lambda: consumer.clean_values(slot, low, length - self.base - t * TILE, holes))
        values = consumer.values_of(slot)
        # All threads' p_s and values, before the matrix unit reads them; and what threads have read themselves, as they
        # do quantised tiles, before the copy engine writes there.
        plgpu.commit_smem()
        # The producer waits at `free` before it overwrites.
        if case.by_registers:
            plgpu.barrier_arrive(k_free.at[slot])  # the keys and scales
        if case.quantized:
            plgpu.barrier_arrive(v_free.at[slot])  # and the values, which are in registers
        if case.num_parts > 1:
            acc = acc + consumer.product_of_parts(
                scratch["v_s"].at[slot], own["p_s"], case.padded_dim, transposed=True
            )
            plgpu.commit_smem()  # what threads have read, before the copy engine writes there
        else:
            acc = acc + consumer.product(values, own["p_s"].at[0].T, case.padded_dim)
        if not case.quantized:
            plgpu.barrier_arrive(v_free.at[slot])  # the values, which are multiplied
        return acc, m_new, l

    def hand_over(self, acc: Any, m: Any, l: Any, own_join: Any, own_others: Any, write: Any) -> None:
        """Leaves the result of a cut pair's part, and joins all parts where it is the last one."""
        consumer, case, config = self.consumer, self.consumer.case, self.consumer.case.config
        block, walk, notes = consumer.block, consumer.walk, consumer.own["notes"]
        plan, refs, num_rows = block.refs["plan"], block.refs, block.refs["tables"].shape[0]
        row, begin = self.place[0], self.place[2]
        if config.piece_len is None:
            at = jnp.where(begin == 0, config.num_programs + walk.program, walk.program)
            after = lax.div(walk.program, config.lanes) + 1
            number = jnp.where(begin == 0, after, own_join) * config.lanes + consumer.lane
            others = own_others
        else:
            number = row * case.pairs + self.pair
            at = number * case.max_pieces + lax.div(begin, tiles_of_piece(config.piece_len, self.tiles))
            others = count_pieces(config.piece_len, self.tiles) - 1
        # In the accumulator's own order: coalesced without shared memory.
        mine = refs["partials"].at[at], refs["stats"].at[at, 0], refs["stats"].at[at, 1]
        store_arrays(mine, (acc, m, l), (MATRIX, COLUMN, COLUMN), **consumer.interpreted)
        if config.fused_join:
            num_joins = count_joins(config, num_rows, case.pairs)
            counter = lax.rem(block.layer, COUNTER_SETS) * num_joins + number
            line = case.num_ranges + num_rows + lax.div(counter, plan.shape[1])
            counter = plan.at[line, lax.rem(counter, plan.shape[1])]
            # Its threads meet here: all of the warpgroup's partial results are written before it counts as arrived.
            arrive(counter, others, notes.at[pl.ds(0, NOTES)])

            @pl.when(notes[0] == others)
            def _():
                parts = parts_of_pair(case, number)
                write(*join(case, refs["partials"], refs["stats"], *parts, others))
