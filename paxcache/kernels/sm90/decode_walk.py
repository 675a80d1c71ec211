"""A decode program's way through its range of the plan, on Hopper (sm_90a)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from paxcache.kernels.sm90.decode_case import Case
from paxcache.kernels.sm90.decode_plan import TILE, OfRange, OfRow, tiles_of_piece


@dataclasses.dataclass(frozen=True)
class Walk:
    """A program's way through its range.

    A *place* is a tuple: row, turn (which of the lane's pairs of the row), tile of the pair; the row's length, first
    visible token (0 without a window), number of query tokens (1 where no row has more), first query token.
    """

    case: Case
    plan: Any
    program: Any

    def range_line(self, column: Any) -> Any:
        """Of the program's range."""
        # A launch may have some programs more than the plan.
        group = jnp.minimum(lax.div(self.program, self.case.config.lanes), self.case.num_ranges - 1)
        return self.plan[group, column]

    def row_line(self, row: Any, column: Any) -> Any:
        """Of a row."""
        return self.plan[self.case.num_ranges + row, column]

    @property
    def lane(self) -> Any:
        """Which of its range's programs this is."""
        lanes = self.case.config.lanes
        return lax.rem(self.program, lanes) if lanes > 1 else 0

    def count(self, column: int) -> Any:
        """Tiles or pieces of the range."""
        return jnp.where(self.program < self.case.config.num_programs, self.range_line(column), 0)

    def first_place(self) -> tuple[Any, ...]:
        """Where the range begins."""
        case = self.case
        return (
            self.range_line(OfRange.ROW),
            self.range_line(OfRange.TURN),
            self.range_line(OfRange.FIRST),
            self.range_line(OfRange.LEN),
            self.range_line(OfRange.LOW) if case.windowed else 0,
            self.range_line(OfRange.QUERIES) if case.max_query_len > 1 else 1,
            self.range_line(OfRange.START),
        )

    def base_of(self, low: Any) -> Any:
        """The token that tile 0 begins with."""
        return low - lax.rem(low, self.case.block_len) if self.case.windowed else 0

    def first_token(self, place: tuple[Any, ...]) -> Any:
        """Of a place's tile."""
        _, _, tile, _, low, *_ = place
        return self.base_of(low) + tile * TILE

    def tiles_of(self, place: tuple[Any, ...]) -> Any:
        """Tiles of a place's pair."""
        _, _, _, length, low, _, _ = place
        return lax.div(length - self.base_of(low) + (TILE - 1), TILE)

    def piece_end(self, place: tuple[Any, ...], tiles_left: Any) -> Any:
        """The tile after the piece that begins at a place."""
        _, _, tile, *_ = place
        tiles, piece_len = self.tiles_of(place), self.case.config.piece_len
        return jnp.minimum(
            tiles, tile + (tiles_left if piece_len is None else tiles_of_piece(piece_len, tiles))
        )

    def move(self, place: tuple[Any, ...], tile: Any) -> tuple[Any, ...]:
        """To a tile of the same pair, or to the next pair if the pair has no such tile."""
        row, turn, _, length, low, queries, start = place
        done = tile >= self.tiles_of(place)
        row_done = jnp.logical_and(done, turn == self.case.turns - 1)
        turn = jnp.where(done, jnp.where(row_done, 0, turn + 1), turn)
        tile = jnp.where(done, 0, tile)
        length = jnp.where(row_done, self.row_line(row, OfRow.NEXT_LEN), length)
        if self.case.windowed:
            low = jnp.where(row_done, self.row_line(row, OfRow.NEXT_LOW), low)
        if self.case.max_query_len > 1:
            queries = jnp.where(row_done, self.row_line(row, OfRow.NEXT_QUERIES), queries)
        start = jnp.where(row_done, self.row_line(row, OfRow.NEXT_START), start)
        row = jnp.where(row_done, self.row_line(row, OfRow.NEXT), row)
        return row, turn, tile, length, low, queries, start

    def pair(self, place: tuple[Any, ...]) -> Any:
        """A place's pair among its row's."""
        _, turn, *_ = place
        return turn * self.case.config.lanes + self.lane
