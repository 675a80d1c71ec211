"""What the warpgroups of a prefill program on Hopper (sm_90a) share: its items, and the copies that it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from paxcache.kernels.sm90._mosaic import pl, plgpu
from paxcache.kernels.sm90.prefill_case import Case
from paxcache.kernels.sm90.prefill_plan import CONSUMERS, ROWS, Config, Head, Tile


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A program: what it was given, and its place among all."""

    case: Case
    refs: Mapping[str, Any]
    """The kernel's inputs and outputs by name."""
    scratch: Mapping[str, Any]
    """Shared memory and barriers by name. Of queries and output there are several names for one memory: \\*_s as the
    matrix unit has it, \\*_t as the copy engine addresses it row by row, and o_rows as plain rows."""
    number: Any
    """Among the programs."""
    warpgroup: Any
    """Which one runs: a consumer, or behind them the producer."""
    layer: Any

    @classmethod
    def of(cls, refs: Mapping[str, Any], case: Case, number: Any, scratch: Mapping[str, Any]) -> Program:
        """The program with this number."""
        names = dict(scratch)
        if case.interpret is not None:  # the interpreter has no tiles, so one name is enough
            q_s = q_t = names["queries"]
            o_rows, o_s = names["output"]
            o_t = o_s
        elif case.config.output_over_queries:
            q_s, q_t, o_rows, o_s, o_t = names["queries_and_output"]
        else:
            (q_s, q_t), (o_rows, o_s, o_t) = names["queries"], names["output"]
        names |= {"q_s": q_s, "q_t": q_t, "o_rows": o_rows, "o_s": o_s, "o_t": o_t}
        return cls(case, refs, names, number, lax.axis_index("thread"), refs["layer"][0])

    @property
    def on_gpu(self) -> bool:
        """Whether no interpreter runs the kernel."""
        return self.case.interpret is None

    @property
    def config(self) -> Config:
        """The launch configuration."""
        return self.case.config

    @property
    def plan(self) -> Any:
        """The plan's lines."""
        return self.refs["plan"]

    @property
    def chunks(self) -> int:
        """Slices of a query's columns, each a swizzled row wide."""
        return self.case.head_dim // self.case.chunk

    @property
    def copies(self) -> int:
        """Copies of a block of keys, or of values."""
        return self.config.block_kv // self.case.copy_len

    def num_programs(self) -> Any:
        """Programs that share the items."""
        return self.plan[0, Head.PROGRAMS] if self.config.beside_decode else self.config.num_programs

    def place_in_round(self, round_id: Any) -> Any:
        """The list of items is dealt back and forth, so that no program gets all the expensive ones of its rounds."""
        return jnp.where(lax.rem(round_id, 2) == 0, self.number, self.num_programs() - 1 - self.number)

    def count_rounds(self) -> Any:
        """Of the program. Each warp counts for itself: a register that holds the number from here on is dear."""
        num_items = self.plan[0, Head.TILES] * self.case.head_items
        whole_rounds = lax.div(num_items, self.num_programs())
        left = num_items - whole_rounds * self.num_programs()
        rounds = whole_rounds + (self.place_in_round(whole_rounds) < left).astype(jnp.int32)
        if not self.config.beside_decode:
            return rounds
        return jnp.where(self.number < self.num_programs(), rounds, 0)

    def item(self, round_id: Any) -> tuple[Any, Any]:
        """The line of a tile in the plan, and which of its items."""
        index = round_id * self.num_programs() + self.place_in_round(round_id)
        return lax.div(index, self.case.head_items) + 1, lax.rem(index, self.case.head_items)

    def pages_in_sight(self, line: Any) -> tuple[Any, Any]:
        """The first and the last table entry that a tile's queries see."""
        plan, S = self.plan, self.case.page_size
        last = jnp.minimum(lax.div(plan[line, Tile.LENGTH] - 1, S), self.case.max_pages - 1)
        if not self.case.windowed:
            return 0, last
        low = plan[line, Tile.POSITION] + plan[line, Tile.SKIP] - self.refs["window"][0] + 1
        return lax.div(jnp.maximum(low, 0), S), last

    def tokens_and_head(self, head_item: Any, consumer: Any) -> tuple[Any, Any]:
        """A consumer's offset in the tile's tokens, and its query head."""
        if self.case.heads == CONSUMERS:
            return 0, head_item * CONSUMERS + consumer
        return consumer * ROWS, head_item

    def kv_head_of(self, head_item: Any) -> Any:
        """The KV head of an item."""
        _, head = self.tokens_and_head(head_item, 0)
        return lax.div(head, self.case.num_heads // self.case.num_kv_heads)

    def copy_queries(self, line: Any, head_item: Any, is_first: Any) -> None:
        """Starts the copies of an item's queries."""
        chunk = self.case.chunk
        q_t, q_full, q_free = (self.scratch[x] for x in ("q_t", "q_full", "q_free"))
        for x in range(CONSUMERS):
            # Consumer x arrives at `q_free` when its last product with its queries is complete; this warp waits before
            # it overwrites them.
            pl.when(jnp.logical_not(is_first))(lambda x=x: plgpu.barrier_wait(q_free.at[x]))
            offset, head = self.tokens_and_head(head_item, x)
            tokens = pl.ds(self.plan[line, Tile.TOKEN] + offset, ROWS)
            for d in range(self.chunks):
                source = self.refs["q"].at[tokens, head, pl.ds(chunk * d, chunk)]
                # Every copy arrives at `q_full` with its last byte; consumer x waits for all of its.
                plgpu.copy_gmem_to_smem(source, q_t.at[x, d], q_full.at[x])

    def copy_block(
        self,
        name: str,
        kv_head: Any,
        first: Any,
        mine: Iterable[int],
        pages: Sequence[Any],
        target: Any,
        full: Any,
    ) -> None:
        """Starts the copies numbered `mine` of the block that begins with a token."""
        copy_len, S = self.case.copy_len, self.case.page_size
        for i, page in zip(mine, pages, strict=True):
            source = self.refs[name].at[self.layer, jnp.maximum(page, 0), kv_head]
            if copy_len < S:
                offset = lax.rem(lax.div(first, copy_len) + i, S // copy_len) * copy_len
                source = source.at[pl.ds(offset, copy_len)]
            # Every copy arrives at `full` with its last byte; who reads a block waits for all of its.
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(i * copy_len, copy_len)], full)

    def pages_of(self, row: Any, first: Any, in_sight: tuple[Any, Any], mine: Iterable[int]) -> list[Any]:
        """The pages of a block's copies, one in sight where there is none: its tokens are masked later."""
        copy_len, S = self.case.copy_len, self.case.page_size
        copy = lax.div(first, copy_len)
        return [self.refs["tables"][row, jnp.clip(lax.div(copy + i, S // copy_len), *in_sight)] for i in mine]

    def drain(self, name: str, stages: int, count: Any) -> None:
        """Waits for the last completions of a buffer's `free`: who waits must see every one."""
        free = self.scratch[name]

        def wait(i, _):
            plgpu.barrier_wait(free.at[lax.rem(i, stages)])

        lax.fori_loop(jnp.maximum(count - stages, 0), count, wait, None)

    def drain_queries(self, count: Any) -> None:
        """Waits for the consumers to be done with the last item's queries, if there was one."""

        @pl.when(count > 0)
        def _():
            for x in range(CONSUMERS):
                plgpu.barrier_wait(self.scratch["q_free"].at[x])
