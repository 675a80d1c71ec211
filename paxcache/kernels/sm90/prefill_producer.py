"""The producing warpgroup of a prefill program on Hopper (sm_90a): it copies blocks of keys and values, and quantised
ones it turns into halves.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from paxcache.kernels.sm90._mosaic import THREADS, pl, plgpu
from paxcache.kernels.sm90.inline.memory import gather
from paxcache.kernels.sm90.inline.tiles import dequantize
from paxcache.kernels.sm90.prefill_case import SCALES
from paxcache.kernels.sm90.prefill_plan import Tile
from paxcache.kernels.sm90.prefill_program import Program

EACH_THREAD = plgpu.Layout.WG_STRIDED((THREADS,), 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Producer:
    """Four warps, each with a part of the copies of all blocks."""

    program: Program

    def run(self) -> None:
        """Two warps copy keys and two values; the last one copies queries too."""
        copies = self.program.copies
        parts = min(2, copies)
        by_part = [range(x * copies // parts, (x + 1) * copies // parts) for x in range(parts)]
        streams = [functools.partial(self.stream, "k", mine, False) for mine in by_part]
        streams += [functools.partial(self.stream, "v", mine, mine is by_part[-1]) for mine in by_part]

        def warp(index):
            def run(x):  # nested, so that the index takes no register while a stream runs
                if x < len(streams):
                    lax.cond(index == x, streams[x], lambda: run(x + 1))

            run(0)

        plgpu.warp_map(warp)

    def stream(self, name: str, mine: range, with_queries: bool) -> None:
        """Copies the blocks of all items; of each block the copies numbered `mine`."""
        program, plan, block = self.program, self.program.plan, self.program.config.block_kv
        buffer, full, free = (program.scratch[f"{name}_{x}"] for x in ("s", "full", "free"))
        stages = buffer.shape[0]

        def one_item(round_id, base):
            line, head_item = program.item(round_id)
            row, blocks = plan[line, Tile.ROW], plan[line, Tile.BLOCKS]
            last_start = (plan[line, Tile.FIRST_BLOCK] + blocks - 1) * block
            if with_queries:
                program.copy_queries(line, head_item, round_id == 0)
            in_sight, kv_head = program.pages_in_sight(line), program.kv_head_of(head_item)

            def step(t, _):
                slot = lax.rem(base + t, stages)
                first = last_start - t * block
                # Read before the wait, so that the latency hides behind it.
                pages = program.pages_of(row, first, in_sight, mine)
                # Both consumers arrive at `free` when they have read the slot's last block, and each warp waits
                # before it overwrites its part.
                pl.when(base + t >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                program.copy_block(name, kv_head, first, mine, pages, buffer.at[slot], full.at[slot])

            lax.fori_loop(0, blocks, step, None)
            return base + blocks

        total = lax.fori_loop(0, program.count_rounds(), one_item, jnp.int32(0))
        program.drain(f"{name}_free", stages, total)
        if with_queries:
            program.drain_queries(total)


@dataclasses.dataclass(frozen=True, eq=False)
class ConvertingProducer:
    """All warps: they copy a quantised block as it is stored, while they convert the one before."""

    program: Program

    def run(self) -> None:
        """All items, in order."""
        program, config, plan = self.program, self.program.config, self.program.plan
        num_rounds = program.count_rounds()
        fetch_ahead = program.case.token_scales and program.on_gpu

        def one_item(round_id, carry):
            line, head_item = program.item(round_id)
            blocks = plan[line, Tile.BLOCKS]
            # Not sooner: the consumers may still wait for this warpgroup with the item before.
            program.copy_queries(line, head_item, round_id == 0)

            def step(t, carry):
                number, fetched = carry
                is_last = t + 1 == blocks
                following = jnp.where(is_last, round_id + 1, round_id), jnp.where(is_last, 0, t + 1)
                if config.raw_stages == 1:
                    self.copy_raw(round_id, t, number)
                else:
                    pl.when(following[0] < num_rounds)(lambda: self.copy_raw(*following, number + 1))
                if program.case.token_scales:
                    self.put_scales(round_id, t, fetched)
                    scales = [program.scratch[name] for name in SCALES]
                else:
                    scales = [program.refs[name][program.layer, 0, 0, 0] for name in SCALES]
                if fetch_ahead:  # after the last block: of some block again
                    next_round = jnp.minimum(following[0], num_rounds - 1)
                    next_block = jnp.where(following[0] < num_rounds, following[1], 0)
                    fetched = self.fetch_scales(next_round, next_block)
                for name, numbers in zip("kv", scales, strict=True):
                    self.convert(name, number, numbers)
                return number + 1, fetched

            return lax.fori_loop(0, blocks, step, carry)

        zero = jnp.int32(0)
        if config.raw_stages > 1:
            pl.when(num_rounds > 0)(lambda: self.copy_raw(zero, zero, zero))
        fetched = self.fetch_scales(zero, zero) if fetch_ahead else ()
        total, _ = lax.fori_loop(0, num_rounds, one_item, (zero, fetched))
        program.drain("k_free", config.key_stages, total)
        program.drain("v_free", config.value_stages, total)
        program.drain_queries(total)

    def block_start(self, line: Any, t: Any) -> Any:
        """The first token of block t of a tile."""
        plan = self.program.plan
        return (plan[line, Tile.FIRST_BLOCK] + plan[line, Tile.BLOCKS] - 1 - t) * self.program.config.block_kv

    def copy_raw(self, round_id: Any, t: Any, i: Any) -> None:
        """Starts the copies of block t of an item, the program's number i. What the slot held is converted."""
        program, copies = self.program, range(self.program.copies)
        line, head_item = program.item(round_id)
        first, slot = self.block_start(line, t), lax.rem(i, program.config.raw_stages)

        def copy(name):
            pages = program.pages_of(
                program.plan[line, Tile.ROW], first, program.pages_in_sight(line), copies
            )
            raw, full = (program.scratch[f"raw_{name}_{x}"].at[slot] for x in ("s", "full"))
            program.copy_block(name, program.kv_head_of(head_item), first, copies, pages, raw, full)

        @plgpu.warp_map
        def _(warp):
            for x, name in enumerate("kv"):
                pl.when(warp == x)(functools.partial(copy, name))

    def scale_index(self, head_item: Any, page: Any, token: Any) -> Any:
        """Where a token's scale lies among all of a layer's."""
        case, S = self.program.case, self.program.case.page_size
        head = (jnp.maximum(page, 0) + self.program.layer * case.num_pages) * case.num_kv_heads
        return (head + self.program.kv_head_of(head_item)) * S + lax.rem(token, jnp.full_like(token, S))

    def fetch_scales(self, round_id: Any, t: Any) -> tuple[Any, ...]:
        """Those of block t's keys and values, of a token for each thread; the next step waits for memory."""
        program, refs = self.program, self.program.refs
        line, head_item = program.item(round_id)
        line = jnp.minimum(line, program.plan.shape[0] - 1)  # a program without items fetches all the same
        token = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=EACH_THREAD)
        token = jnp.minimum(token, program.config.block_kv - 1) + self.block_start(line, t)
        entry = lax.div(token, jnp.full_like(token, program.case.page_size))
        entry = jnp.clip(entry, *program.pages_in_sight(line))
        entry = entry + program.plan[line, Tile.ROW] * program.case.max_pages
        page = gather(refs["flat_tables"], entry, EACH_THREAD, interpreted=False)
        index = self.scale_index(head_item, page, token)
        return tuple(gather(refs[name], index, EACH_THREAD, interpreted=False) for name in SCALES)

    def put_scales(self, round_id: Any, t: Any, fetched: tuple[Any, ...]) -> None:
        """Puts the scales of block t into shared memory."""
        program, copy_len = self.program, self.program.case.copy_len
        if program.on_gpu:
            for name, numbers in zip(SCALES, fetched, strict=True):
                program.scratch[name][...] = numbers
        else:  # which gathers one by one
            line, head_item = program.item(round_id)
            first, in_sight = self.block_start(line, t), program.pages_in_sight(line)
            pages = program.pages_of(program.plan[line, Tile.ROW], first, in_sight, range(program.copies))
            for i, page in enumerate(pages):
                begin = self.scale_index(head_item, page, first + i * copy_len)
                for name in SCALES:
                    scales = program.refs[name][pl.ds(begin, copy_len)]
                    program.scratch[name][pl.ds(i * copy_len, copy_len)] = scales
        plgpu.commit_smem()  # all threads' scales, before others read them

    def convert(self, name: str, i: Any, scales: Any) -> None:
        """Converts the program's block number i into halves."""
        program, scratch = self.program, self.program.scratch
        raw, target = scratch[f"raw_{name}_s"], scratch[f"{name}_s"]
        slot, to = lax.rem(i, raw.shape[0]), lax.rem(i, target.shape[0])
        # The copies arrive at `raw_full`; here all threads wait for the block as it is stored.
        plgpu.barrier_wait(scratch[f"raw_{name}_full"].at[slot])
        # Both consumers arrive at `free` when they have read what the slot held.
        pl.when(i >= target.shape[0])(lambda: plgpu.barrier_wait(scratch[f"{name}_free"].at[to]))
        interpreted = not program.on_gpu
        dequantize(raw.at[slot], target.at[to], scales, program.case.kv_dtype, interpreted=interpreted)
        plgpu.commit_smem()  # all threads' numbers, before the matrix unit reads them
        plgpu.barrier_arrive(scratch[f"{name}_full"].at[to])  # where both consumers wait for the block
