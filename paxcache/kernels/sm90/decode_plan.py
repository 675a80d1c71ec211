"""How decode's work is cut into equal ranges, once per step and on the device. Knows integers only.

A flat list of tiles of 64 tokens, in order of (row, pair, token), is cut into contiguous *ranges* of equal length. A
pair, a row's KV head with some of its queries, may be cut; what a range does of one pair is a *piece*. The list is a
*lane's*: neighbouring programs take the same ranges of different pairs. `decode` says how a plan is used.

Reference: FlashInfer (Ye et al., 2025) for balanced work lists.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

    from paxcache.kernels._request import Rows

TILE = 64  # tokens a tile: the rows of one matrix instruction
COUNTER_SETS = 8  # that layers use in turn
MAX_PIECES = 32  # of a pair where their length is fixed: longer rows get longer pieces
MIN_TILES = 6  # shorter ranges pay more for joins than a second program an SM gains

SECTOR = 8  # int32 in a memory sector, to which lines are padded


class OfRange(enum.IntEnum):
    """Columns of a plan's lines for ranges."""

    ROW = 0
    """The row that the range begins in."""
    TURN = 1
    """Which of the lane's pairs of that row it begins in."""
    FIRST = 2
    """The tile of that pair that it begins with."""
    TILES = 3
    """Its tiles."""
    PIECES = 4
    """Its pieces."""
    PARTS = 5
    """How many later ranges continue the pair that this one is the first to continue."""
    JOIN = 6
    """The first range that continues the pair that this one begins in."""
    JOIN_PARTS = 7
    """How many ranges continue that pair."""
    NEXT_PARTS = 8
    """How many ranges continue the pair that this one ends in."""
    LEN = 9
    """The length of its first row."""
    LOW = 10
    """The first visible token of that row."""
    QUERIES = 11
    """The number of query tokens of that row."""
    START = 12
    """The first query token of that row."""
    PAGES = 13
    """The pages of its first tile: this column and the ones behind it."""


class OfRow(enum.IntEnum):
    """Columns of a plan's lines for rows; the next row is the next one that has work."""

    LEN = 0
    """The row's length; 0 where it has no work."""
    LOW = 1
    """Its first visible token."""
    QUERIES = 2
    """Its number of query tokens."""
    START = 3
    """Its first query token."""
    NEXT = 4
    """The next row."""
    NEXT_LEN = 5
    """The next row's length."""
    NEXT_LOW = 6
    """The next row's first visible token."""
    NEXT_QUERIES = 7
    """The next row's number of query tokens."""
    NEXT_START = 8
    """The next row's first query token."""
    BUSY_BLOCKS = 9
    """Beside prefill: how many thread blocks decode, the same in every line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A launch configuration; `decode.default_config` makes one."""

    num_programs: int
    """What the device holds at once, a multiple of `lanes`."""
    min_programs: int
    """Programs that get work where there is little: one an SM, a multiple of `lanes`."""
    group_parts: int
    """Parts that the query heads of a KV head are taken in: not all may fit the registers at once."""
    lanes: int
    """Neighbouring programs that do the same ranges for different pairs of a row, in step."""
    num_stages: int
    """Tiles of keys, and as many of values, in flight in a program."""
    block_tokens: int
    """Query tokens that a program handles at once; a row with more takes several passes over its keys."""
    join_chunk: int
    """Partial results that a join loads at once; with more the registers no longer let two programs share an SM."""
    consumers: int = 1
    """Programs of a thread block, which share the warps that start copies."""
    beside_prefill: int = 0
    """Query heads a KV head where other blocks of the launch prefill, and the plan says how many ranges have work; 0:
    the launch is decode's alone."""
    piece_len: int | None = None
    """Tokens of a piece, a multiple of 64: pairs are cut by their own length alone, so that a row's result does not
    depend on its batch, bit for bit. None: pairs are cut where the balance wants it."""
    fused_join: bool = True
    """Joins are made by the kernel itself, or else by a second one: the interpreter has no atomics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the form of a plan depends on; `plan_shape` makes one."""

    num_rows: int
    pairs: int
    page_size: int
    max_query_len: int
    windowed: bool
    config: Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The balanced list of work of a step: a line a range, then a line a row, then counters of arrivals.

    The counters are zeros before and after every launch and change while one runs, although XLA takes the plan for
    a plain input. Layers use different ones in turn. Two launches may share them because XLA runs the kernels of a
    device one after another.
    """

    lines: Int32[Array, "lines columns"]
    made_for: Shape = dataclasses.field(metadata={"static": True})


def decode_plan(
    rows: Rows,
    shape: Shape,
    *,
    sliding_window: Int32[Array, ""] | int | None = None,
    num_ranges: Int32[Array, ""] | None = None,
) -> Plan:
    """Cuts the visible tokens of a step into balanced ranges, on the device; lengths are dynamic, shapes are not.

    Args:
      rows: the step's. Those with more query tokens than the shape allows are left alone.
      shape: from `plan_shape`.
      sliding_window: tokens a query sees, itself included; pages left of it are not read.
      num_ranges: ranges that get work, 0 where there is none; None: all, or fewer where there is little.

    Returns:
      The plan, for every layer with these rows, window and KV heads.
    """
    i32 = jnp.int32
    block_tables, seq_lens, query_starts, query_lens = rows
    B, M = block_tables.shape
    config, page_size, max_query_len = shape.config, shape.page_size, shape.max_query_len
    turns = shape.pairs // config.lanes
    block_len = math.gcd(page_size, TILE)
    queries = jnp.where((seq_lens > 0) & (query_lens > 0), query_lens, 0).astype(i32)
    lens = jnp.where((queries > 0) & (queries <= max_query_len), seq_lens, 0).astype(i32)
    low = jnp.zeros_like(lens)
    if sliding_window is not None:
        before = jnp.maximum(lens - queries, 0)  # of rows left alone too, so that no difference passes int32
        low = jnp.maximum(before - sliding_window + 1, 0)
    base = low - low % block_len
    tiles = (lens - base + (TILE - 1)) // TILE
    pieces = jnp.sign(tiles) if config.piece_len is None else count_pieces(config.piece_len, tiles)

    # Inclusive running sums, as reductions of one small matrix. The barriers keep the compiler from counting again for
    # each number that is read from them.
    row_ids = jnp.arange(B, dtype=i32)
    up_to = row_ids[None, :] <= row_ids[:, None]
    tile_end = jnp.sum(jnp.where(up_to, tiles, 0), axis=1, dtype=i32) * turns
    piece_end = jnp.sum(jnp.where(up_to, pieces, 0), axis=1, dtype=i32) * turns
    tile_end, piece_end = lax.optimization_barrier((tile_end, piece_end))

    # The flat list of a lane has `total` tiles; range g begins with tile start[g].
    total = tile_end[-1]
    most, fewest = config.num_programs // config.lanes, config.min_programs // config.lanes
    if num_ranges is None:
        num_ranges = jnp.where(total < MIN_TILES * most, fewest, most)
    busy, num_ranges = busy_blocks(config, num_ranges), jnp.maximum(num_ranges, 1)
    each, more = total // num_ranges, total % num_ranges

    def ranges_before(tile):
        """How many ranges begin before a tile of the flat list."""
        longer = more * (each + 1)
        shorter_before = -(-(tile - longer) // jnp.maximum(each, 1))
        return jnp.where(tile <= longer, -(-tile // (each + 1)), more + shorter_before)

    range_ids = jnp.arange(most + 1, dtype=i32)
    start = jnp.minimum(range_ids * each + jnp.minimum(range_ids, more), total)
    # The row that a tile lies in; of the tile after a row's last one, the next row with work.
    at = jnp.concatenate([start, tile_end])
    found = lax.optimization_barrier(jnp.sum(tile_end[None, :] <= at[:, None], axis=1, dtype=i32))
    found = jnp.minimum(found, B - 1)
    row, following = found[: most + 1], found[most + 1 :]
    row_tiles = jnp.maximum(tiles[row], 1)
    within = start - (tile_end[row] - tiles[row] * turns)
    turn, tile = within // row_tiles, within % row_tiles
    past_end = start >= total
    # Pieces before the pair that the range begins in.
    before = jnp.where(past_end, piece_end[-1], piece_end[row] - (turns - turn) * pieces[row])
    if config.piece_len is None:
        num_pieces = before[1:] + jnp.sign(tile[1:]) - before[:-1]
    else:  # the range begins where the piece does that the tile lies in
        piece_tiles = tiles_of_piece(config.piece_len, row_tiles)
        before += tile // piece_tiles
        num_pieces = before[1:] - before[:-1]
        start -= tile % piece_tiles
        tile -= tile % piece_tiles
    num_tiles = start[1:] - start[:-1]

    pair_start = start - tile
    join, pair_stop = ranges_before(pair_start + 1), ranges_before(pair_start + row_tiles)
    is_join = (tile > 0) & (join == range_ids) & ~past_end
    parts = jnp.where(is_join, pair_stop - join, 0)
    columns = jnp.arange(TILE // block_len, dtype=i32) * block_len
    columns = (base[row] + tile * TILE)[:, None] + columns
    last = jnp.maximum(lens[row] - 1, 0)[:, None]
    pages = block_tables[row[:, None], jnp.clip(jnp.minimum(columns, last) // page_size, 0, M - 1)]

    def lines(count, *columns):
        columns = [x[:count, None] if x.ndim == 1 else x[:count] for x in columns]
        width = sum(x.shape[1] for x in columns)
        return jnp.pad(jnp.concatenate(columns, axis=1), ((0, 0), (0, line_len - width)))

    line_len = -(-(OfRange.PAGES + TILE // block_len) // SECTOR) * SECTOR
    about_rows = lens, low, queries, query_starts.astype(i32)
    by_range = row, turn, tile, num_tiles, num_pieces, parts, join, pair_stop - join, parts[1:]
    by_range = lines(most, *by_range, *(x[row] for x in about_rows), pages)
    by_row = (*about_rows, following, *(x[following] for x in about_rows))
    if config.beside_prefill:
        by_row = (*by_row, jnp.broadcast_to(busy, (B,)))
    by_row = lines(B, *by_row)
    num_joins = count_joins(config, B, turns * config.lanes)
    # Zeros that the compiler cannot know to be zeros: constants may be shared, or made again for every layer.
    counters = jnp.broadcast_to(jnp.minimum(total, 0), (-(-(COUNTER_SETS * num_joins) // line_len), line_len))
    return Plan(jnp.concatenate([by_range, by_row, counters]), shape)


def plan_shape(
    *,
    num_rows: int,
    num_kv_heads: int,
    page_size: int,
    max_query_len: int,
    windowed: bool,
    config: Config,
) -> Shape:
    """The form of the plan that `decode_plan` makes; a plan of another form is of no use to `decode`."""
    blocks = -(-max_query_len // config.block_tokens)
    return Shape(
        num_rows=num_rows,
        pairs=num_kv_heads * config.group_parts * blocks,
        page_size=page_size,
        max_query_len=max_query_len,
        windowed=windowed,
        config=config,
    )


def busy_blocks(config: Config, num_ranges: Any) -> Any:
    """Thread blocks that the programs of so many ranges fill."""
    return -(-num_ranges * config.lanes // config.consumers)


def count_joins(config: Config, num_rows: int, pairs: int) -> int:
    """Counters that a launch needs: one for each program that may be the first to continue a pair, or each pair."""
    return config.num_programs + config.lanes if config.piece_len is None else num_rows * pairs


def tiles_of_piece(piece_len: int, tiles: Any) -> Any:
    """Tiles of a fixed piece of a pair of `tiles` tiles."""
    return jnp.maximum(piece_len // TILE, lax.div(tiles + (MAX_PIECES - 1), MAX_PIECES))


def count_pieces(piece_len: int, tiles: Any) -> Any:
    """Fixed pieces of a pair of `tiles` tiles."""
    size = tiles_of_piece(piece_len, tiles)
    return lax.div(tiles + size - 1, size)
