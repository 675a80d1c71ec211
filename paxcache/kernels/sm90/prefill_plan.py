"""Which tiles of query tokens a step's prefill has, and what of the keys each sees. Knows integers only.

`prefill_plan` lists the *tiles* of 64 or 128 tokens once per step, on the device, the most expensive first. `prefill`
says how a plan is used.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

    from paxcache.kernels._request import Rows

ROWS = 64  # query rows of a consumer: the rows of one matrix instruction
CONSUMERS = 2
MIN_BLOCK = 64  # keys of a tile's last block that are multiplied where no more are seen
FEW_BLOCKS = 8  # of a tile, up to which half a block counts in the order

SECTOR = 8  # int32 in a memory sector, to which lines are padded


class Head(enum.IntEnum):
    """Columns of a plan's line 0."""

    TILES = 0
    """The number of tiles."""
    PROGRAMS = 1
    """The number of programs that share them."""


class Tile(enum.IntEnum):
    """Columns of a plan's lines for tiles. Blocks are counted from the last one down, as they are walked."""

    ROW = 0
    """The row of the batch."""
    TOKEN = 1
    """The first query token that the program loads."""
    POSITION = 2
    """The position of that token in its sequence."""
    SKIP = 3
    """Loaded tokens before the tile's first."""
    COUNT = 4
    """Tokens of the tile."""
    FIRST_BLOCK = 5
    """The leftmost block of keys that the tile sees."""
    BLOCKS = 6
    """Blocks of keys that it sees."""
    HOLES_END = 7
    """The block after the last that may have holes; 0: there are none."""
    FULL_BEGIN = 8
    """The first block that all its queries see in full."""
    FULL_END = 9
    """The block after the last that they do."""
    LENGTH = 10
    """The length of the row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A launch configuration; `prefill.default_config` makes one."""

    num_programs: int
    """Programs launched: one an SM."""
    block_kv: int
    """Tokens of a block of keys: what the registers hold of scores beside the output."""
    key_stages: int
    """Blocks of keys in shared memory."""
    value_stages: int
    """Blocks of values, which are read a step later."""
    output_over_queries: bool
    """Output tiles take the queries' shared memory: less is needed, and the next queries come later."""
    beside_decode: int = 0
    """Query heads a KV head where other blocks of the launch decode, and the plan says how many programs have work; 0:
    the launch is prefill's alone."""
    raw_stages: int = 0
    """Blocks of keys, and as many of values, as quantised pages hold them: the one that is converted and the next."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the form of a plan depends on; `plan_shape` makes one."""

    num_tokens: int
    tile_tokens: int
    num_tiles: int
    page_size: int
    min_query_len: int
    config: Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of a step, the most expensive first."""

    lines: Int32[Array, "lines columns"]
    made_for: Shape = dataclasses.field(metadata={"static": True})


def heads_of_program(group: int) -> int:
    """Query heads of a program, of `group` a KV head: one for each consumer, or one for both."""
    return CONSUMERS if group % CONSUMERS == 0 else 1


def tile_tokens(group: int) -> int:
    """Tokens of a tile, with `group` query heads a KV head; a call must have as many."""
    return ROWS * CONSUMERS // heads_of_program(group)


def plan_shape(
    *, num_rows: int, num_tokens: int, group: int, page_size: int, min_query_len: int = 1, config: Config
) -> Shape:
    """The form of the plan that `prefill_plan` makes; a plan of another form is of no use to `prefill`.

    Args:
      num_rows, num_tokens, page_size: B, T, S; T is at least `tile_tokens`.
      group: query heads of a KV head.
      min_query_len: rows with fewer query tokens are left alone.
      config: the launch configuration.
    """
    tile = tile_tokens(group)
    most_rows = min(num_rows, num_tokens // max(min_query_len, 1))
    return Shape(
        num_tokens=num_tokens,
        tile_tokens=tile,
        num_tiles=num_tokens // tile + most_rows,
        page_size=page_size,
        min_query_len=min_query_len,
        config=config,
    )


def items_of_rows(
    counts: Int32[Array, "B"], num_items: int
) -> tuple[Int32[Array, "items"], Int32[Array, "items"], Int32[Array, ""]]:
    """Of each item its row and its number in the row, where row b has ``counts[b]`` and rows come in order.

    Items past the last one, of which there may be some, count as further ones of the last row. Also returns how many
    there are in all.
    """
    rows, ids = jnp.arange(counts.shape[0], dtype=jnp.int32), jnp.arange(num_items, dtype=jnp.int32)
    ends = jnp.sum(jnp.where(rows[None, :] <= rows[:, None], counts, 0), axis=1, dtype=jnp.int32)
    row = jnp.sum(ends[None, :] <= ids[:, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, counts.shape[0] - 1)
    return row, ids - (ends[row] - counts[row]), ends[-1]


def prefill_plan(
    rows: Rows,
    shape: Shape,
    *,
    sliding_window: Int32[Array, ""] | int | None = None,
    causal: bool = True,
) -> Plan:
    """Lists the tiles of a step, on the device; lengths are dynamic, shapes are not.

    Args:
      rows: the step's.
      shape: from `plan_shape`.
      sliding_window: tokens a query sees, itself included; blocks left of it are not read.
      causal: whether a query does not see later tokens.

    Returns:
      The plan, for every layer with these rows, window and heads.
    """
    i32 = jnp.int32
    block_tables, seq_lens, query_starts, query_lens = rows
    config, page_size, num_tokens = shape.config, shape.page_size, shape.num_tokens
    M, block, tile = block_tables.shape[1], config.block_kv, shape.tile_tokens
    live = (seq_lens > 0) & (query_lens >= shape.min_query_len)
    queries = jnp.where(live, query_lens, 0).astype(i32)
    tiles = (queries + (tile - 1)) // tile
    window = None if sliding_window is None else jnp.asarray(sliding_window, i32)

    # A row with a hole in sight has all its blocks looked at for holes.
    entries = jnp.arange(M, dtype=i32)
    in_sight = entries < ((seq_lens + (page_size - 1)) // page_size)[:, None]
    if window is not None:
        low = jnp.maximum(seq_lens - queries - window + 1, 0) // page_size
        in_sight &= entries >= low[:, None]
    has_holes = jnp.any(in_sight & (block_tables < 0), axis=1)

    row, number, num_used = items_of_rows(tiles, shape.num_tiles)
    ids = jnp.arange(shape.num_tiles, dtype=i32)
    used = ids < num_used
    begin = number * tile  # the tile's first query token in its row
    count = jnp.minimum(queries[row] - begin, tile)
    token = jnp.clip(query_starts[row] + begin, 0, num_tokens - tile)
    skip = query_starts[row] + begin - token
    length = seq_lens[row].astype(i32)
    first = length - queries[row] + begin  # positions of the tile's first and last query
    last = first + count - 1
    high = last + 1 if causal else length  # tokens below it are seen by some query; by all:
    high_all = first + 1 if causal else length
    low = low_all = jnp.zeros_like(length)
    if window is not None:
        low, low_all = jnp.maximum(first - window + 1, 0), jnp.maximum(last - window + 1, 0)
    first_block, stop_block = low // block, (high + (block - 1)) // block
    blocks = jnp.maximum(stop_block - first_block, 1)
    full_begin = jnp.clip(stop_block - high_all // block, 1, blocks)  # the first one is masked in any case
    full_end = jnp.clip(stop_block - (low_all + (block - 1)) // block, full_begin, blocks)
    holes_end, full_begin, full_end = (
        jnp.where(has_holes[row], blocks, x) for x in (jnp.zeros_like(blocks), full_begin, full_end)
    )

    # Beyond a few blocks tiles that read the same keys stay neighbours instead, so that they find them in the L2 cache.
    keys = (high + (MIN_BLOCK - 1)) // MIN_BLOCK * MIN_BLOCK - first_block * block
    cost = jnp.where(blocks > FEW_BLOCKS, blocks * block, keys)
    cost = jnp.where(used, cost, jnp.iinfo(i32).min)
    before = (cost[None, :] > cost[:, None]) | (
        (cost[None, :] == cost[:, None]) & (ids[None, :] < ids[:, None])
    )
    rank = jnp.sum(before, axis=1, dtype=i32)
    columns = (
        row,
        token,
        first - skip,
        skip,
        count,
        first_block,
        blocks,
        holes_end,
        full_begin,
        full_end,
        length,
    )
    lines = jnp.stack(columns, axis=1)
    lines = jnp.pad(lines, ((0, 0), (0, -lines.shape[1] % SECTOR)))
    header = (
        jnp.zeros((1, lines.shape[1]), i32)
        .at[0, Head.TILES]
        .set(num_used)
        .at[0, Head.PROGRAMS]
        .set(config.num_programs)
    )
    return Plan(jnp.concatenate([header, jnp.zeros_like(lines).at[rank].set(lines)]), shape)
