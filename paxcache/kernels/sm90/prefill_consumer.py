"""A consuming warpgroup of a prefill program on Hopper (sm_90a): scores, softmax, weighted values, output.

It issues the scores of block t and the weighted values of block t - 1 together, and computes the softmax of t
while the second product is in flight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from paxcache.kernels.sm90._mosaic import pl, plgpu
from paxcache.kernels.sm90.inline.matrices import fill_parts, keep_columns, scaled_halves, widen
from paxcache.kernels.sm90.inline.memory import recomputed
from paxcache.kernels.sm90.inline.tiles import store_slices, zero_rows
from paxcache.kernels.sm90.operands import LOG2E, soft_cap
from paxcache.kernels.sm90.prefill_plan import MIN_BLOCK, ROWS, Tile
from paxcache.kernels.sm90.prefill_program import Program

NOTHING_SEEN = -1e30  # a row's maximum then; finite, so that a block without a score leaves no NaN behind
MIN_SCALE = 1e-30  # as good as 0, which would make NaN of masked scores

MATRIX = plgpu.Layout.WGMMA
EACH_ROW = plgpu.Layout.WGMMA.reduce(1)


def _down(rows: Any, like: Any) -> Any:
    """One value a row, repeated for each column of a matrix."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


@dataclasses.dataclass(frozen=True, eq=False)
class Consumer:
    """A warpgroup with 64 query rows of each item."""

    program: Program
    scale: Any
    """Of the scores, in units of log2."""
    window: Any

    @classmethod
    def of(cls, program: Program) -> Consumer:
        """The consumer that runs."""
        scale = jnp.maximum(program.refs["scale"][0] * LOG2E, MIN_SCALE)
        return cls(program, scale, program.refs["window"][0] if program.case.windowed else None)

    def run(self) -> None:
        """All items, in order."""
        program, wg = self.program, self.program.warpgroup
        pl.when(wg == 1)(self.end_turn)  # consumer 0 begins
        lax.fori_loop(0, program.count_rounds(), self.one_item, jnp.int32(0))
        if not program.on_gpu:  # the interpreter alone asks that every completion is seen
            pl.when(wg == 0)(self.begin_turn)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # shared memory must outlive the last copies

    def begin_turn(self) -> None:
        """Waits until the other consumer, which arrives in `end_turn`, has issued its products."""
        plgpu.barrier_wait(self.program.scratch["turn"].at[self.program.warpgroup])

    def end_turn(self) -> None:
        """Lets the other consumer, which waits in `begin_turn`, issue its products."""
        plgpu.barrier_arrive(self.program.scratch["turn"].at[1 - self.program.warpgroup])

    def one_item(self, round_id: Any, base: Any) -> Any:
        """An item; `base` blocks came before, and the result is how many come before the next one."""
        program, plan, scratch = self.program, self.program.plan, self.program.scratch
        wg, case, config = program.warpgroup, program.case, program.config
        line, head_item = program.item(round_id)
        # All at once, so that the memory's latency is paid once.
        columns = Tile.BLOCKS, Tile.FIRST_BLOCK, Tile.LENGTH, Tile.POSITION
        blocks, first_block, length, position = (plan[line, x] for x in columns)
        columns = Tile.HOLES_END, Tile.FULL_BEGIN, Tile.FULL_END
        holes_end, full_begin, full_end = (plan[line, x] for x in columns)
        offset, head = program.tokens_and_head(head_item, wg)
        last_start = (first_block + blocks - 1) * config.block_kv
        ahead = position + offset - last_start
        walk = _Blocks(self, round_id, base, length, last_start, ahead)

        carry = walk.first(holes_end)
        holed_step = functools.partial(walk.step, masked=True, may_have_holes=True)
        masked_step = functools.partial(walk.step, masked=True)
        carry = lax.fori_loop(1, holes_end, holed_step, carry)
        carry = lax.fori_loop(jnp.maximum(holes_end, 1), full_begin, masked_step, carry)
        carry = lax.fori_loop(full_begin, full_end, functools.partial(walk.step, masked=False), carry)
        if case.windowed:
            carry = lax.fori_loop(full_end, blocks, masked_step, carry)
        acc, m, l, p = carry
        if not config.output_over_queries:
            # Where the producer waits before it overwrites the queries.
            plgpu.barrier_arrive(scratch["q_free"].at[wg])
        line, head_item = program.item(recomputed(round_id, interpreted=not program.on_gpu))
        offset, head = program.tokens_and_head(head_item, wg)
        # Read before the last product, which hides their latency.
        token, skip, count = (plan[line, x] for x in (Tile.TOKEN, Tile.SKIP, Tile.COUNT))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # earlier copies have left the output's memory
        slot = walk.value_slot(blocks - 1)
        acc = walk.add_values(acc, p, slot)
        plgpu.barrier_arrive(
            scratch["v_free"].at[slot]
        )  # where the producer waits before it overwrites the values
        lse, out = self.normalise(acc, m, l, head)
        if case.return_lse:
            program.refs["lse"][line - 1, head_item, wg] = lse
        start = jnp.clip(skip - offset, 0, ROWS)
        self.store(out, token + offset, start, jnp.clip(skip + count - offset, 0, ROWS) - start, head)
        if config.output_over_queries:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the output has left the queries' memory
            plgpu.barrier_arrive(
                scratch["q_free"].at[wg]
            )  # where the producer waits before it overwrites them
        return base + blocks

    def normalise(self, acc: Any, m: Any, l: Any, head: Any) -> tuple[Any, Any]:
        """The log-sum-exp of the rows' scores, and their results."""
        case = self.program.case
        some = m > NOTHING_SEEN / 2  # nothing was seen, as where all is hole: zeros
        seen = some
        if case.has_sinks:
            sink = self.program.refs["sinks"][head] * LOG2E
            m_all = jnp.maximum(m, sink)
            weight = jnp.exp2(m - m_all)
            acc, l, m = acc * _down(weight, acc), l * weight + jnp.exp2(sink - m_all), m_all
            some = l > 0
        factor = jnp.where(seen, 1.0 / l, jnp.zeros_like(l))
        out = scaled_halves(acc, factor, case.dtype, interpreted=not self.program.on_gpu)
        lse = (m + jnp.log2(l)) * (1 / LOG2E)
        return jnp.where(some, lse, jnp.full_like(l, -jnp.inf)), out

    def store(self, out: Any, token: Any, start: Any, count: Any, head: Any) -> None:
        """Writes the rows that are the tile's; `token` is that of row 0."""
        program, case, wg = self.program, self.program.case, self.program.warpgroup
        o_s, o_t, o_rows = (program.scratch[x] for x in ("o_s", "o_t", "o_rows"))

        @pl.when(count == ROWS)
        def _():
            own = o_s.at[wg] if o_s.shape[1] == program.chunks else o_s.at[wg, pl.ds(0, program.chunks)]
            store_slices(out, own, interpreted=not program.on_gpu)
            plgpu.commit_smem()  # all threads' results, before the copy engine reads them
            for d in range(program.chunks):
                target = program.refs["out"].at[pl.ds(token, ROWS), head, pl.ds(case.chunk * d, case.chunk)]
                plgpu.copy_smem_to_gmem(o_t.at[wg, d], target)

        @pl.when(count < ROWS)
        def _():
            # The copy engine reads from multiples of 128 bytes: where a row is none, boxes begin with an even row.
            down = lax.rem(start, 2) if o_rows.shape[1] > ROWS else 0
            o_rows[wg, pl.ds(down, ROWS)] = out
            plgpu.commit_smem()  # all threads' results, before the copy engine reads them
            at = start
            size = ROWS // 2
            while size:  # copies have static sizes: a ladder of powers of two

                @pl.when(lax.bitwise_and(count, size) != 0)
                def _(at=at, size=size):
                    target = program.refs["out"].at[pl.ds(token + at, size), head]
                    plgpu.copy_smem_to_gmem(o_rows.at[wg, pl.ds(at + down, size)], target)

                at = at + lax.bitwise_and(count, size)
                size //= 2


@dataclasses.dataclass(frozen=True, eq=False)
class _Blocks:
    """A consumer's way through the blocks of an item, from the last one down.

    What is carried from block to block is the sum of values, each row's maximum and denominator, and the weights of the
    block whose values are added next.
    """

    consumer: Consumer
    round_id: Any
    base: Any
    """Blocks of the program before this item's."""
    length: Any
    """Of the row."""
    last_start: Any
    """The first key of block 0, the last one."""
    ahead: Any
    """The position of the consumer's first query, counted from there."""

    @property
    def program(self) -> Program:
        return self.consumer.program

    @property
    def block(self) -> int:
        """Keys of a block."""
        return self.program.config.block_kv

    def key_slot(self, t: Any) -> Any:
        return lax.rem(self.base + t, self.program.config.key_stages)

    def value_slot(self, t: Any) -> Any:
        return lax.rem(self.base + t, self.program.config.value_stages)

    def block_start(self, t: Any) -> Any:
        return self.last_start - t * self.block

    def scores(self, acc: Any, slot: Any, width: int | None = None) -> None:
        """Issues the product of queries with the first keys of a block."""
        program, chunk, width = self.program, self.program.case.chunk, width or self.block
        for d in range(program.chunks):
            keys = program.scratch["k_s"].at[slot, pl.ds(0, width), pl.ds(chunk * d, chunk)]
            plgpu.wgmma(acc, program.scratch["q_s"].at[program.warpgroup, d], keys.T)

    def holes_of(self, t: Any) -> Any:
        """A bit for each copy of a block that would have come from a hole."""
        program, case = self.program, self.program.case
        line, _ = program.item(recomputed(self.round_id, interpreted=not program.on_gpu))
        (first, last), row = program.pages_in_sight(line), program.plan[line, Tile.ROW]
        holes = jnp.int32(0)
        for i in range(program.copies):
            entry = jnp.clip(lax.div(self.block_start(t) + i * case.copy_len, case.page_size), first, last)
            holes = lax.bitwise_or(holes, jnp.where(program.refs["tables"][row, entry] < 0, 1 << i, 0))
        return holes

    def mask(self, s: Any, t: Any) -> Any:
        """Scores of what a row's query does not see become -inf."""
        case, window = self.program.case, self.consumer.window
        own = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=EACH_ROW) + (self.ahead + t * self.block)
        last = own
        if not case.causal:
            end = self.length - self.block_start(t) - 1
            last = plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.int32) + end, EACH_ROW)
        after = own - window if case.windowed else None
        return keep_columns(s, -math.inf, after=after, last=last, interpreted=not self.program.on_gpu)

    def softmax(
        self, s: Any, m: Any, l: Any, t: Any, masked: bool, holes: Any = None
    ) -> tuple[Any, Any, Any, Any]:
        """New maximum and denominator, the factor of what was summed up, and the weights."""
        scale, case, interpreted = self.consumer.scale, self.program.case, not self.program.on_gpu
        factor = scale
        if case.soft_cap is not None:
            s, factor = soft_cap(s * scale, case.soft_cap, interpreted=interpreted), 1.0
        if masked:
            s = self.mask(s, t)
            if holes is not None:  # most blocks have none
                options = {"bits": holes, "part_len": case.copy_len, "interpreted": interpreted}
                fill = functools.partial(fill_parts, fill=-math.inf, **options)
                s = lax.cond(holes != 0, fill, lambda s: s, s)
        new = jnp.maximum(m, s.max(axis=1) * factor)
        shrink = jnp.exp2(m - new)
        p = jnp.exp2(s * factor - _down(new, s))  # a fused multiply-add each: the scale is positive
        return new, l * shrink + p.sum(axis=1), shrink, p

    def clean_values(self, t: Any, holes: Any) -> None:
        """Zeros where values are not the row's, since 0 * NaN is NaN."""
        program, case, wg = self.program, self.program.case, self.program.warpgroup
        v_s, cleaned = program.scratch["v_s"], program.scratch["cleaned"]
        slot, owned = self.value_slot(t), self.length - self.block_start(t)
        foreign = jnp.logical_or(owned < self.block, holes != 0)

        # Consumer 0, whose turn comes first: the other one hardly ever waits.
        @pl.when(jnp.logical_and(foreign, wg == 0))
        def _():
            tile_bytes, interpreted = case.head_dim * case.dtype.itemsize, not program.on_gpu
            zero_rows(
                v_s.at[slot], 0, owned, holes, case.copy_len, tile_bytes=tile_bytes, interpreted=interpreted
            )
            plgpu.commit_smem()  # all threads' zeros, before the matrix unit reads them
            plgpu.barrier_arrive(cleaned.at[slot])  # where consumer 1 waits before it reads them

        # Consumer 0 has arrived when the slot is clean. Each slot has a barrier: it may be a block ahead.
        pl.when(jnp.logical_and(foreign, wg == 1))(lambda: plgpu.barrier_wait(cleaned.at[slot]))

    def add_values(self, acc: Any, p: Any, slot: Any) -> Any:
        """The sum with the weighted values of a block."""
        v_s = self.program.scratch["v_s"]
        if self.program.on_gpu:
            return pl.run_state(lambda a: plgpu.wgmma(a, p, v_s.at[slot]))(
                plgpu.WGMMAAccumulatorRef.init(acc)
            )
        acc = acc + lax.dot(p.astype(jnp.float32), v_s[slot].astype(jnp.float32))
        plgpu.commit_smem()  # what threads have read, before the copy engine writes there
        return acc

    def only_scores(self, slot: Any, width: int | None = None) -> Any:
        """The product of queries with the first keys of a block."""

        def product(acc):
            self.scores(acc, slot, width)
            self.consumer.end_turn()
            return acc[...]

        shape = ROWS, width or self.block
        return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def first(self, holes_end: Any) -> tuple[Any, Any, Any, Any]:
        """What is carried after block 0, of which scores alone are needed."""
        program, case, block = self.program, self.program.case, self.block
        holes = lax.cond(holes_end > 0, lambda: self.holes_of(0), lambda: jnp.int32(0))
        slot = self.key_slot(0)
        # The copies arrive at these two with their last bytes: the item's queries, and the block's keys.
        plgpu.barrier_wait(program.scratch["q_full"].at[program.warpgroup])
        plgpu.barrier_wait(program.scratch["k_full"].at[slot])
        self.consumer.begin_turn()

        def first_weights(width):
            """Of block 0's first keys, which are all that are seen."""
            s = self.only_scores(slot, width)
            # Where the producer waits before it overwrites the keys.
            plgpu.barrier_arrive(program.scratch["k_free"].at[slot])
            nothing = plgpu.layout_cast(jnp.full((ROWS,), NOTHING_SEEN, jnp.float32), EACH_ROW)
            zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), EACH_ROW)
            m, l, _, p = self.softmax(s, nothing, zero, 0, True, holes)
            p = p.astype(case.dtype)
            return m, l, p if width == block else widen(p, block, interpreted=not program.on_gpu)

        if block > MIN_BLOCK:
            seen = self.length - self.last_start
            if case.causal:
                seen = jnp.minimum(seen, self.ahead + ROWS)
            widths = (functools.partial(first_weights, x) for x in (MIN_BLOCK, block))
            m, l, p = lax.cond(seen <= MIN_BLOCK, *widths)
        else:
            m, l, p = first_weights(block)
        # The copies, or the producer that converts, arrive here when the block's values are there.
        plgpu.barrier_wait(program.scratch["v_full"].at[self.value_slot(0)])
        self.clean_values(0, holes)  # only here can a row end
        acc = plgpu.layout_cast(jnp.zeros((ROWS, case.head_dim), jnp.float32), MATRIX)
        return acc, m, l, p

    def step(
        self, t: Any, carry: tuple[Any, ...], masked: bool, may_have_holes: bool = False
    ) -> tuple[Any, ...]:
        """Scores of block t, and the weighted values of the block before."""
        program, block = self.program, self.block
        k_full, k_free, v_full, v_free, v_s = (
            program.scratch[x] for x in ("k_full", "k_free", "v_full", "v_free", "v_s")
        )
        acc, m, l, p = carry
        slot, before = self.key_slot(t), self.value_slot(t - 1)
        plgpu.barrier_wait(
            k_full.at[slot]
        )  # where copies, or the producer that converts, arrive: the block's keys
        self.consumer.begin_turn()
        if program.on_gpu and not may_have_holes:

            def both(state):
                acc, m, l, shrink, weights = state

                def issue(s_acc):
                    self.scores(s_acc, slot)
                    plgpu.wgmma(acc, p, v_s.at[before])
                    self.consumer.end_turn()
                    # The values' product stays in flight.
                    return plgpu.wgmma_accumulator_load(s_acc, wait_n=1)

                s = pl.run_scoped(issue, plgpu.WGMMAAccumulatorRef((ROWS, block), jnp.float32))
                plgpu.barrier_arrive(
                    k_free.at[slot]
                )  # where the producer waits before it overwrites the keys
                m[...], l[...], shrink[...], weights[...] = self.softmax(s, m[...], l[...], t, masked)

            blank = plgpu.layout_cast(jnp.zeros((ROWS, block), jnp.float32), MATRIX)
            state = plgpu.WGMMAAccumulatorRef.init(acc), m, l, m, blank
            acc, m, l, shrink, weights = pl.run_state(both)(state)  # ends when the product has
        else:  # holes are rare: one product after the other spares registers; the interpreter knows no overlap
            acc = self.add_values(acc, p, before)
            s = self.only_scores(slot)
            holes = self.holes_of(t) if may_have_holes else None
            plgpu.barrier_arrive(k_free.at[slot])  # where the producer waits before it overwrites the keys
            m, l, shrink, weights = self.softmax(s, m, l, t, masked, holes)
        plgpu.barrier_arrive(v_free.at[before])  # where the producer waits before it overwrites the values
        plgpu.barrier_wait(
            v_full.at[self.value_slot(t)]
        )  # where copies, or the producer, arrive: the block's values
        if may_have_holes:
            self.clean_values(t, holes)
        return acc * _down(shrink, acc), m, l, weights.astype(program.case.dtype)
