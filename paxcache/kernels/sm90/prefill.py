"""Paged attention for rows with many query tokens, on Hopper (sm_90a).

Prompts and chunks of prompts, each causal from its row's own offset, in one launch. The matrix unit is the limit:

- A program owns 128 query rows and has three warpgroups. Two consumers take 64 rows each: 64 tokens of two query heads
  of one KV head, or 128 tokens of one head where the group is odd. The third feeds them: two of its warps copy pages
  of keys, two those of values, and the last one queries too.
- A consumer issues the scores of block t and the weighted values of block t - 1 together, and computes the softmax of
  t while the second product is in flight. The consumers take turns, so that one's softmax meets the other's products.
- Programs are persistent, one an SM. `prefill_plan` lists the *tiles* of 64 or 128 tokens once per step on the device,
  the most expensive first; a tile's heads are neighbours in the list, which is dealt back and forth over the programs.
- Blocks of keys run from the last one down. Only those that some query sees in part are masked; the loops are apart.
  Where a tile sees no more than half of its last block, half of its scores are computed.
- Queries start at any token, but the copy engine writes tiled shared memory 8 rows at a time. A 64-column slice of a
  tiled buffer is byte for byte an untiled, swizzled one: queries and whole output tiles go through such an alias.
- Blocks of quantised pages come in as they are stored. The third warpgroup turns them into halves with their scales,
  as the queries have them, while the next one is on its way and the consumers multiply the ones before.

References: FlashAttention-3 (Shah et al., 2024) for the overlap inside and between warpgroups; FlashInfer (Ye et al.,
2025) for ragged batches in one launch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from paxcache import _quantize
from paxcache._quantize import QuantizedPages
from paxcache.kernels._request import Pools, Scores
from paxcache.kernels.sm90._mosaic import (
    BOX_ALIGNMENT,
    THREADS,
    DeviceLimits,
    device_limits,
    in_place,
    matrix_tiles,
    off_mesh,
    pl,
    plgpu,
)
from paxcache.kernels.sm90.inline.matrices import fill_parts, keep_columns, scaled_halves, widen
from paxcache.kernels.sm90.inline.memory import gather, recomputed
from paxcache.kernels.sm90.inline.tiles import dequantize, store_slices, zero_rows
from paxcache.kernels.sm90.operands import LOG2E, check_supported, num_parts, soft_cap
from paxcache.kernels.sm90.prefill_plan import (
    CONSUMERS,
    MIN_BLOCK,
    ROWS,
    Config,
    Head,
    Plan,
    Tile,
    heads_of_program,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

NOTHING_SEEN = -1e30  # a row's maximum then; finite, so that a block without a score leaves no NaN behind
MIN_SCALE = 1e-30  # as good as 0, which would make NaN of masked scores

MATRIX = plgpu.Layout.WGMMA
EACH_ROW = plgpu.Layout.WGMMA.reduce(1)
EACH_THREAD = plgpu.Layout.WG_STRIDED((THREADS,), 1)
SCALES = ("k_scales", "v_scales")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is static in a call."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_pages: int
    num_pages: int
    dtype: Any
    kv_dtype: Any  # of the pages' values
    token_scales: bool  # quantised pages: whether each token has scales, or each layer
    causal: bool
    windowed: bool
    soft_cap: float | None
    has_sinks: bool
    return_lse: bool
    config: Config
    interpret: Any

    @property
    def form(self) -> _quantize.Format | None:
        """Of quantised pages."""
        return _quantize.BY_DTYPE.get(self.kv_dtype)

    @property
    def heads(self) -> int:
        """Query heads of a program."""
        return heads_of_program(self.num_heads // self.num_kv_heads)

    @property
    def head_items(self) -> int:
        """Items of a tile."""
        return self.num_heads // self.heads

    @property
    def chunk(self) -> int:
        """Columns of a swizzled row."""
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def registers(self) -> tuple[int, int]:
        """Of a consumer's thread and of a producer's, which holds the page of each of its copies, or converts."""
        if self.form is not None:
            return 208, 88
        few_copies = self.config.block_kv // self.copy_len <= 8
        return (240, 24) if few_copies and self.head_dim > 192 else (232, 40)

    @property
    def copy_len(self) -> int:
        """Tokens of one copy."""
        return math.gcd(self.page_size, self.config.block_kv)


def blocks_of_output(head_dim: int) -> int:
    """Blocks of `ROWS` that a consumer has room for: one more where its rows may have to stand one row down.

    The copy engine reads shared memory from multiples of 128 bytes, and a row of head dim 96 has 192.
    """
    return 1 if 2 * head_dim % BOX_ALIGNMENT == 0 else 2


def default_config(*, head_dim: int, dtype: Any, limits: DeviceLimits | None = None) -> Config:
    """Blocks as long as the registers allow, and as many stages as fit, output apart from queries if it can be."""
    limits, dtype = device_limits() if limits is None else limits, jnp.dtype(dtype)
    form, itemsize = _quantize.BY_DTYPE.get(dtype), 2  # halves are what is multiplied
    # Converting takes registers from the consumers.
    block_kv = 128 if head_dim <= 128 and form is None else 64
    rows = CONSUMERS * ROWS * head_dim * itemsize
    stage = block_kv * head_dim * itemsize
    slack = 2048 if form is None else 4096  # what is not counted takes less
    room = limits.smem_bytes_per_block - slack - rows
    raw_stages = 0
    if form is not None:
        raw = 2 * block_kv * (head_dim // form.per_element)
        raw_stages = 2 if room - 2 * raw >= 4 * stage else 1
        room -= raw_stages * raw
    output = rows * blocks_of_output(head_dim)
    apart = room - output >= 4 * stage
    stages = min(8, (room - output if apart else room) // stage)
    return Config(
        num_programs=limits.num_sms,
        block_kv=block_kv,
        key_stages=stages // 2,
        value_stages=stages // 2,  # one more gains nothing
        output_over_queries=not apart,
        raw_stages=raw_stages,
    )


def _down(rows: Any, like: Any) -> Any:
    """One value a row, repeated for each column of a matrix."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


def program_body(refs: dict[str, Any], case: Case, program: Any, **scratch: Any) -> None:
    """One program: its items, in order."""
    config, on_gpu = case.config, case.interpret is None
    plan, tables = refs["plan"], refs["tables"]
    k_s, v_s = scratch["k_s"], scratch["v_s"]
    k_full, v_full, q_full = (scratch[x] for x in ("k_full", "v_full", "q_full"))
    k_free, v_free, q_free = (scratch[x] for x in ("k_free", "v_free", "q_free"))
    turn, cleaned = scratch["turn"], scratch["cleaned"]
    # Several names of one memory: *_s as the matrix unit has it, *_t as the copy engine addresses it row by row.
    if on_gpu and config.output_over_queries:
        q_s, q_t, o_rows, o_s, o_t = scratch["queries_and_output"]
    elif on_gpu:
        (q_s, q_t), (o_rows, o_s, o_t) = scratch["queries"], scratch["output"]
    else:  # the interpreter has no tiles, so one name is enough
        q_s = q_t = scratch["queries"]
        o_rows, o_s = scratch["output"]
        o_t = o_s
    D, S, block, chunk = case.head_dim, case.page_size, config.block_kv, case.chunk
    chunks, copy_len = D // chunk, case.copy_len
    copies = block // copy_len
    wg = lax.axis_index("thread")
    layer = refs["layer"][0]

    def num_programs():
        return plan[0, Head.PROGRAMS] if config.beside_decode else config.num_programs

    def place_in_round(round_id):
        """The list of items is dealt back and forth, so that no program gets all the expensive ones of its rounds."""
        return jnp.where(lax.rem(round_id, 2) == 0, program, num_programs() - 1 - program)

    def count_rounds():
        """Of the program. Each warp counts for itself: a register that holds the number from here on is dear."""
        num_items = plan[0, Head.TILES] * case.head_items
        whole_rounds = lax.div(num_items, num_programs())
        left = num_items - whole_rounds * num_programs()
        rounds = whole_rounds + (place_in_round(whole_rounds) < left).astype(jnp.int32)
        return jnp.where(program < num_programs(), rounds, 0) if config.beside_decode else rounds

    def item(round_id):
        """The line of a tile in the plan, and which of its items."""
        index = round_id * num_programs() + place_in_round(round_id)
        return lax.div(index, case.head_items) + 1, lax.rem(index, case.head_items)

    def pages_in_sight(line):
        """The first and the last table entry that a tile's queries see."""
        last = jnp.minimum(lax.div(plan[line, Tile.LENGTH] - 1, S), case.max_pages - 1)
        if not case.windowed:
            return 0, last
        low = plan[line, Tile.POSITION] + plan[line, Tile.SKIP] - refs["window"][0] + 1
        return lax.div(jnp.maximum(low, 0), S), last

    def tokens_and_head(line, head_item, consumer):
        """A consumer's offset in the tile's tokens, and its query head."""
        if case.heads == CONSUMERS:
            return 0, head_item * CONSUMERS + consumer
        return consumer * ROWS, head_item

    def copy_queries(line, head_item, is_first):
        for x in range(CONSUMERS):
            # Consumer x arrives at `q_free` when its last product with its queries is complete.
            pl.when(jnp.logical_not(is_first))(lambda x=x: plgpu.barrier_wait(q_free.at[x]))
            offset, head = tokens_and_head(line, head_item, x)
            tokens = pl.ds(plan[line, Tile.TOKEN] + offset, ROWS)
            for d in range(chunks):
                source = refs["q"].at[tokens, head, pl.ds(chunk * d, chunk)]
                plgpu.copy_gmem_to_smem(source, q_t.at[x, d], q_full.at[x])

    def kv_head_of(line, head_item):
        _, head = tokens_and_head(line, head_item, 0)
        return lax.div(head, case.num_heads // case.num_kv_heads)

    def copy_block(name, kv_head, first, mine, pages, target, full):
        """Starts the copies numbered `mine` of the block that begins with a token."""
        for i, page in zip(mine, pages, strict=True):
            source = refs[name].at[layer, jnp.maximum(page, 0), kv_head]
            if copy_len < S:
                offset = lax.rem(lax.div(first, copy_len) + i, S // copy_len) * copy_len
                source = source.at[pl.ds(offset, copy_len)]
            # Every copy arrives at `full` with its last byte; who reads a block waits for all of its.
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(i * copy_len, copy_len)], full)

    def pages_of(row, first, in_sight, mine):
        """The pages of a block's copies, one in sight where there is none: its tokens are masked later."""
        copy = lax.div(first, copy_len)
        return [tables[row, jnp.clip(lax.div(copy + i, S // copy_len), *in_sight)] for i in mine]

    def drain(free, stages, count):
        """Waits for the last completions: who waits must see every one."""

        def wait(i, _):
            plgpu.barrier_wait(free.at[lax.rem(i, stages)])

        lax.fori_loop(jnp.maximum(count - stages, 0), count, wait, None)

    def drain_queries(count):
        """The same of the last item's queries, if there was one."""

        @pl.when(count > 0)
        def _():
            for x in range(CONSUMERS):
                plgpu.barrier_wait(q_free.at[x])

    def producer():
        def stream(name, mine, with_queries):
            """Copies the blocks of all items; of each block the copies numbered `mine`."""
            buffer, full, free = (scratch[f"{name}_{x}"] for x in ("s", "full", "free"))
            stages = buffer.shape[0]

            def one_item(round_id, base):
                line, head_item = item(round_id)
                row, blocks = plan[line, Tile.ROW], plan[line, Tile.BLOCKS]
                last_start = (plan[line, Tile.FIRST_BLOCK] + blocks - 1) * block
                if with_queries:
                    copy_queries(line, head_item, round_id == 0)
                in_sight, kv_head = pages_in_sight(line), kv_head_of(line, head_item)

                def step(t, _):
                    slot = lax.rem(base + t, stages)
                    first = last_start - t * block
                    # Read before the wait, so that the latency hides behind it.
                    pages = pages_of(row, first, in_sight, mine)
                    # Both consumers arrive at `free` when they have read the slot's last block, and each warp waits
                    # before it overwrites its part.
                    pl.when(base + t >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    copy_block(name, kv_head, first, mine, pages, buffer.at[slot], full.at[slot])

                lax.fori_loop(0, blocks, step, None)
                return base + blocks

            total = lax.fori_loop(0, count_rounds(), one_item, jnp.int32(0))
            drain(free, stages, total)
            if with_queries:
                drain_queries(total)

        parts = min(2, copies)
        by_part = [range(x * copies // parts, (x + 1) * copies // parts) for x in range(parts)]
        streams = [functools.partial(stream, "k", mine, False) for mine in by_part]
        streams += [functools.partial(stream, "v", mine, mine is by_part[-1]) for mine in by_part]

        def warp(index):
            def run(x):  # nested, so that the index takes no register while a stream runs
                if x < len(streams):
                    lax.cond(index == x, streams[x], lambda: run(x + 1))

            run(0)

        plgpu.warp_map(warp)

    def converting_producer():
        num_rounds = count_rounds()

        def block_start(line, t):
            return (plan[line, Tile.FIRST_BLOCK] + plan[line, Tile.BLOCKS] - 1 - t) * block

        def copy_raw(round_id, t, i):
            """Starts the copies of block t of an item, the program's number i. What the slot held is converted."""
            line, head_item = item(round_id)
            first, slot = block_start(line, t), lax.rem(i, config.raw_stages)

            def copy(name):
                pages = pages_of(plan[line, Tile.ROW], first, pages_in_sight(line), range(copies))
                raw, full = scratch[f"raw_{name}_s"].at[slot], scratch[f"raw_{name}_full"].at[slot]
                copy_block(name, kv_head_of(line, head_item), first, range(copies), pages, raw, full)

            @plgpu.warp_map
            def _(warp):
                for x, name in enumerate("kv"):
                    pl.when(warp == x)(functools.partial(copy, name))

        def scale_index(line, head_item, page, token):
            head = (jnp.maximum(page, 0) + layer * case.num_pages) * case.num_kv_heads
            return (head + kv_head_of(line, head_item)) * S + lax.rem(token, jnp.full_like(token, S))

        def fetch_scales(round_id, t):
            """Those of block t's keys and values, of a token for each thread; the next step waits for memory."""
            line, head_item = item(round_id)
            line = jnp.minimum(line, plan.shape[0] - 1)  # a program without items fetches all the same
            token = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=EACH_THREAD)
            token = jnp.minimum(token, block - 1) + block_start(line, t)
            entry = jnp.clip(lax.div(token, jnp.full_like(token, S)), *pages_in_sight(line))
            page = gather(
                refs["flat_tables"],
                entry + plan[line, Tile.ROW] * case.max_pages,
                EACH_THREAD,
                interpreted=False,
            )
            index = scale_index(line, head_item, page, token)
            return tuple(gather(refs[name], index, EACH_THREAD, interpreted=False) for name in SCALES)

        def put_scales(round_id, t, fetched):
            """Puts the scales of block t into shared memory."""
            if on_gpu:
                for name, numbers in zip(SCALES, fetched, strict=True):
                    scratch[name][...] = numbers
            else:  # which gathers one by one
                line, head_item = item(round_id)
                first, in_sight = block_start(line, t), pages_in_sight(line)
                for i, page in enumerate(pages_of(plan[line, Tile.ROW], first, in_sight, range(copies))):
                    begin = scale_index(line, head_item, page, first + i * copy_len)
                    for name in SCALES:
                        scratch[name][pl.ds(i * copy_len, copy_len)] = refs[name][pl.ds(begin, copy_len)]
            plgpu.commit_smem()  # all threads' scales, before others read them

        def convert(name, i, scales):
            raw, target = scratch[f"raw_{name}_s"], scratch[f"{name}_s"]
            slot, to = lax.rem(i, raw.shape[0]), lax.rem(i, target.shape[0])
            plgpu.barrier_wait(scratch[f"raw_{name}_full"].at[slot])  # the block as it is stored
            # Both consumers arrive at `free` when they have read what the slot held.
            pl.when(i >= target.shape[0])(lambda: plgpu.barrier_wait(scratch[f"{name}_free"].at[to]))
            dequantize(raw.at[slot], target.at[to], scales, case.kv_dtype, interpreted=not on_gpu)
            plgpu.commit_smem()  # all threads' numbers, before the matrix unit reads them
            plgpu.barrier_arrive(scratch[f"{name}_full"].at[to])  # both consumers may read it

        fetch_ahead = case.token_scales and on_gpu

        def one_item(round_id, carry):
            line, head_item = item(round_id)
            blocks = plan[line, Tile.BLOCKS]
            # Not sooner: the consumers may still wait for this warpgroup with the item before.
            copy_queries(line, head_item, round_id == 0)

            def step(t, carry):
                number, fetched = carry
                is_last = t + 1 == blocks
                following = jnp.where(is_last, round_id + 1, round_id), jnp.where(is_last, 0, t + 1)
                if config.raw_stages == 1:
                    copy_raw(round_id, t, number)
                else:
                    pl.when(following[0] < num_rounds)(lambda: copy_raw(*following, number + 1))
                if case.token_scales:
                    put_scales(round_id, t, fetched)
                    scales = [scratch[name] for name in SCALES]
                else:
                    scales = [refs[name][layer, 0, 0, 0] for name in SCALES]
                if fetch_ahead:  # after the last block: of some block again
                    next_round = jnp.minimum(following[0], num_rounds - 1)
                    fetched = fetch_scales(next_round, jnp.where(following[0] < num_rounds, following[1], 0))
                for name, numbers in zip("kv", scales, strict=True):
                    convert(name, number, numbers)
                return number + 1, fetched

            return lax.fori_loop(0, blocks, step, carry)

        zero = jnp.int32(0)
        if config.raw_stages > 1:
            pl.when(num_rounds > 0)(lambda: copy_raw(zero, zero, zero))
        fetched = fetch_scales(zero, zero) if fetch_ahead else ()
        total, _ = lax.fori_loop(0, num_rounds, one_item, (zero, fetched))
        drain(k_free, config.key_stages, total)
        drain(v_free, config.value_stages, total)
        drain_queries(total)

    @pl.when(wg == CONSUMERS)
    def _producer():
        if on_gpu:
            plgpu.set_max_registers(case.registers[1], action="decrease")
        if case.form is None:
            producer()
        else:
            converting_producer()

    @pl.when(wg < CONSUMERS)
    def _consumer():
        if on_gpu:
            plgpu.set_max_registers(case.registers[0], action="increase")
        scale = jnp.maximum(refs["scale"][0] * LOG2E, MIN_SCALE)
        window = refs["window"][0] if case.windowed else None

        def begin_turn():
            plgpu.barrier_wait(turn.at[wg])  # the other consumer has issued its products

        def end_turn():
            plgpu.barrier_arrive(turn.at[1 - wg])

        pl.when(wg == 1)(end_turn)  # consumer 0 begins

        def one_item(round_id, base):
            line, head_item = item(round_id)
            # All at once, so that the memory's latency is paid once.
            columns = Tile.BLOCKS, Tile.FIRST_BLOCK, Tile.LENGTH, Tile.POSITION
            blocks, first_block, length, position = (plan[line, x] for x in columns)
            columns = Tile.HOLES_END, Tile.FULL_BEGIN, Tile.FULL_END
            holes_end, full_begin, full_end = (plan[line, x] for x in columns)
            offset, head = tokens_and_head(line, head_item, wg)
            last_start = (first_block + blocks - 1) * block
            ahead = position + offset - last_start  # of the first query, of block 0's first key

            def key_slot(t):
                return lax.rem(base + t, config.key_stages)

            def value_slot(t):
                return lax.rem(base + t, config.value_stages)

            def block_start(t):
                return last_start - t * block

            def scores(acc, slot, width=block):
                for d in range(chunks):
                    keys = k_s.at[slot, pl.ds(0, width), pl.ds(chunk * d, chunk)]
                    plgpu.wgmma(acc, q_s.at[wg, d], keys.T)

            def holes_of(t):
                """A bit for each copy of a block that would have come from a hole."""
                line, _ = item(recomputed(round_id, interpreted=not on_gpu))
                (first, last), row = pages_in_sight(line), plan[line, Tile.ROW]
                holes = jnp.int32(0)
                for i in range(copies):
                    entry = jnp.clip(lax.div(block_start(t) + i * copy_len, S), first, last)
                    holes = lax.bitwise_or(holes, jnp.where(tables[row, entry] < 0, 1 << i, 0))
                return holes

            def mask(s, t):
                own = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=EACH_ROW) + (ahead + t * block)
                last = own
                if not case.causal:
                    end = length - block_start(t) - 1
                    last = plgpu.layout_cast(jnp.full((ROWS,), 0, jnp.int32) + end, EACH_ROW)
                after = own - window if case.windowed else None
                return keep_columns(s, -math.inf, after=after, last=last, interpreted=not on_gpu)

            def softmax(s, m, l, t, masked, holes=None):
                """New maximum and denominator, the factor of what was summed up, and the weights."""
                factor = scale
                if case.soft_cap is not None:
                    s, factor = soft_cap(s * scale, case.soft_cap, interpreted=not on_gpu), 1.0
                if masked:
                    s = mask(s, t)
                    if holes is not None:  # most blocks have none
                        fill = functools.partial(
                            fill_parts, fill=-math.inf, bits=holes, part_len=copy_len, interpreted=not on_gpu
                        )
                        s = lax.cond(holes != 0, fill, lambda s: s, s)
                new = jnp.maximum(m, s.max(axis=1) * factor)
                shrink = jnp.exp2(m - new)
                p = jnp.exp2(s * factor - _down(new, s))  # a fused multiply-add each: the scale is positive
                return new, l * shrink + p.sum(axis=1), shrink, p

            def clean_values(t, holes):
                """Zeros where values are not the row's, since 0 * NaN is NaN."""
                slot, owned = value_slot(t), length - block_start(t)
                foreign = jnp.logical_or(owned < block, holes != 0)

                # Consumer 0, whose turn comes first: the other one hardly ever waits.
                @pl.when(jnp.logical_and(foreign, wg == 0))
                def _():
                    zero_rows(
                        v_s.at[slot], 0, owned, holes, copy_len, tile_bytes=D * case.dtype.itemsize,
                        interpreted=not on_gpu,
                    )  # fmt: skip
                    plgpu.commit_smem()  # all threads' zeros, before the matrix unit reads them
                    plgpu.barrier_arrive(cleaned.at[slot])  # consumer 1 may read them too

                # Of each slot by itself: consumer 0 may be a block ahead.
                pl.when(jnp.logical_and(foreign, wg == 1))(lambda: plgpu.barrier_wait(cleaned.at[slot]))

            def add_values(acc, p, slot):
                if on_gpu:
                    return pl.run_state(lambda a: plgpu.wgmma(a, p, v_s.at[slot]))(
                        plgpu.WGMMAAccumulatorRef.init(acc)
                    )
                acc = acc + lax.dot(p.astype(jnp.float32), v_s[slot].astype(jnp.float32))
                plgpu.commit_smem()
                return acc

            def only_scores(slot, width=block):
                def product(acc):
                    scores(acc, slot, width)
                    end_turn()
                    return acc[...]

                return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32))

            # Block 0: scores alone. A consumer waits for its queries once an item.
            holes = lax.cond(holes_end > 0, lambda: holes_of(0), lambda: jnp.int32(0))
            slot = key_slot(0)
            plgpu.barrier_wait(q_full.at[wg])
            plgpu.barrier_wait(k_full.at[slot])  # the block's keys
            begin_turn()

            def first_weights(width):
                """Of block 0's first keys, which are all that are seen."""
                s = only_scores(slot, width)
                plgpu.barrier_arrive(k_free.at[slot])  # the keys may be overwritten
                nothing = plgpu.layout_cast(jnp.full((ROWS,), NOTHING_SEEN, jnp.float32), EACH_ROW)
                zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), EACH_ROW)
                m, l, _, p = softmax(s, nothing, zero, 0, True, holes)
                p = p.astype(case.dtype)
                return m, l, p if width == block else widen(p, block, interpreted=not on_gpu)

            if block > MIN_BLOCK:
                seen = length - last_start
                if case.causal:
                    seen = jnp.minimum(seen, ahead + ROWS)
                widths = (functools.partial(first_weights, x) for x in (MIN_BLOCK, block))
                m, l, p = lax.cond(seen <= MIN_BLOCK, *widths)
            else:
                m, l, p = first_weights(block)
            plgpu.barrier_wait(v_full.at[value_slot(0)])  # the block's values
            clean_values(0, holes)  # only here can a row end
            acc = plgpu.layout_cast(jnp.zeros((ROWS, D), jnp.float32), MATRIX)

            def step(t, carry, masked, may_have_holes=False):
                acc, m, l, p = carry
                slot, before = key_slot(t), value_slot(t - 1)
                plgpu.barrier_wait(k_full.at[slot])
                begin_turn()
                if on_gpu and not may_have_holes:

                    def both(state):
                        acc, m, l, shrink, weights = state

                        def issue(s_acc):
                            scores(s_acc, slot)
                            plgpu.wgmma(acc, p, v_s.at[before])
                            end_turn()
                            # The values' product stays in flight.
                            return plgpu.wgmma_accumulator_load(s_acc, wait_n=1)

                        s = pl.run_scoped(issue, plgpu.WGMMAAccumulatorRef((ROWS, block), jnp.float32))
                        plgpu.barrier_arrive(k_free.at[slot])
                        m[...], l[...], shrink[...], weights[...] = softmax(s, m[...], l[...], t, masked)

                    blank = plgpu.layout_cast(jnp.zeros((ROWS, block), jnp.float32), MATRIX)
                    state = plgpu.WGMMAAccumulatorRef.init(acc), m, l, m, blank
                    acc, m, l, shrink, weights = pl.run_state(both)(state)  # ends when the product has
                else:  # holes are rare: one product after the other spares registers; the interpreter knows no overlap
                    acc = add_values(acc, p, before)
                    s = only_scores(slot)
                    holes = holes_of(t) if may_have_holes else None
                    plgpu.barrier_arrive(k_free.at[slot])
                    m, l, shrink, weights = softmax(s, m, l, t, masked, holes)
                plgpu.barrier_arrive(v_free.at[before])  # the values may be overwritten
                plgpu.barrier_wait(v_full.at[value_slot(t)])  # the block's values
                if may_have_holes:
                    clean_values(t, holes)
                return acc * _down(shrink, acc), m, l, weights.astype(case.dtype)

            masked_step = functools.partial(step, masked=True)
            carry = acc, m, l, p
            carry = lax.fori_loop(1, holes_end, functools.partial(masked_step, may_have_holes=True), carry)
            carry = lax.fori_loop(jnp.maximum(holes_end, 1), full_begin, masked_step, carry)
            carry = lax.fori_loop(full_begin, full_end, functools.partial(step, masked=False), carry)
            if case.windowed:
                carry = lax.fori_loop(full_end, blocks, masked_step, carry)
            acc, m, l, p = carry
            if not config.output_over_queries:
                plgpu.barrier_arrive(q_free.at[wg])  # another item's queries may come
            line, head_item = item(recomputed(round_id, interpreted=not on_gpu))
            offset, head = tokens_and_head(line, head_item, wg)
            # Read before the last product, which hides their latency.
            token, skip, count = (plan[line, x] for x in (Tile.TOKEN, Tile.SKIP, Tile.COUNT))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # earlier copies have left the output's memory
            slot = value_slot(blocks - 1)
            acc = add_values(acc, p, slot)
            plgpu.barrier_arrive(v_free.at[slot])
            lse, out = normalise(acc, m, l, head)
            if case.return_lse:
                refs["lse"][line - 1, head_item, wg] = lse
            start = jnp.clip(skip - offset, 0, ROWS)
            store(out, token + offset, start, jnp.clip(skip + count - offset, 0, ROWS) - start, head)
            if config.output_over_queries:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the output has left the queries' memory
                plgpu.barrier_arrive(q_free.at[wg])
            return base + blocks

        def normalise(acc, m, l, head):
            """The rows' results, and the log-sum-exp of their scores."""
            some = m > NOTHING_SEEN / 2  # nothing was seen, as where all is hole: zeros
            seen = some
            if case.has_sinks:
                sink = refs["sinks"][head] * LOG2E
                m_all = jnp.maximum(m, sink)
                weight = jnp.exp2(m - m_all)
                acc, l, m = acc * _down(weight, acc), l * weight + jnp.exp2(sink - m_all), m_all
                some = l > 0
            factor = jnp.where(seen, 1.0 / l, jnp.zeros_like(l))
            out = scaled_halves(acc, factor, case.dtype, interpreted=not on_gpu)
            lse = (m + jnp.log2(l)) * (1 / LOG2E)
            return jnp.where(some, lse, jnp.full_like(l, -jnp.inf)), out

        def store(out, token, start, count, head):
            """Writes the rows that are the tile's; `token` is that of row 0."""

            @pl.when(count == ROWS)
            def _():
                own = o_s.at[wg] if o_s.shape[1] == chunks else o_s.at[wg, pl.ds(0, chunks)]
                store_slices(out, own, interpreted=not on_gpu)
                plgpu.commit_smem()  # all threads' results, before the copy engine reads them
                for d in range(chunks):
                    target = refs["out"].at[pl.ds(token, ROWS), head, pl.ds(chunk * d, chunk)]
                    plgpu.copy_smem_to_gmem(o_t.at[wg, d], target)

            @pl.when(count < ROWS)
            def _():
                # Boxes begin with an even row where one row is no multiple of 128 bytes: see `blocks_of_output`.
                down = lax.rem(start, 2) if o_rows.shape[1] > ROWS else 0
                o_rows[wg, pl.ds(down, ROWS)] = out
                plgpu.commit_smem()
                at = start
                size = ROWS // 2
                while size:  # copies have static sizes: a ladder of powers of two

                    @pl.when(lax.bitwise_and(count, size) != 0)
                    def _(at=at, size=size):
                        target = refs["out"].at[pl.ds(token + at, size), head]
                        plgpu.copy_smem_to_gmem(o_rows.at[wg, pl.ds(at + down, size)], target)

                    at = at + lax.bitwise_and(count, size)
                    size //= 2

        lax.fori_loop(0, count_rounds(), one_item, jnp.int32(0))
        if not on_gpu:  # the interpreter alone asks that every completion is seen
            pl.when(wg == 0)(begin_turn)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # shared memory must outlive the last copies


def scratch_of(case: Case) -> dict[str, Any]:
    """The shared memory of a program."""
    D, chunk, config, dtype, form = case.head_dim, case.chunk, case.config, case.dtype, case.form
    copies = config.block_kv // case.copy_len
    tiles = matrix_tiles(D * dtype.itemsize, dtype)
    by_columns = (CONSUMERS, D // chunk, ROWS, chunk)
    tiled = plgpu.SMEM(by_columns, dtype, transforms=tiles)
    untiled = plgpu.SMEM(by_columns, dtype, transforms=tiles[1:])
    # A consumer's part is of one size in all of its forms: the two write when they like.
    blocks = blocks_of_output(D)
    by_rows = plgpu.SMEM((CONSUMERS, blocks * ROWS, D), dtype)
    by_columns = (CONSUMERS, blocks * D // chunk, ROWS, chunk)
    out_tiled = plgpu.SMEM(by_columns, dtype, transforms=tiles)
    out_untiled = plgpu.SMEM(by_columns, dtype, transforms=tiles[1:])
    if case.interpret is not None:
        shared: dict[str, Any] = {"queries": tiled, "output": (by_rows, out_tiled)}
    elif config.output_over_queries:
        shared = {"queries_and_output": plgpu.RefUnion(tiled, untiled, by_rows, out_tiled, out_untiled)}
    else:
        shared = {
            "queries": plgpu.RefUnion(tiled, untiled),
            "output": plgpu.RefUnion(by_rows, out_tiled, out_untiled),
        }
    arrivals = copies
    if form is not None:
        arrivals, stages = 1, config.raw_stages
        row = D // form.per_element
        transforms = matrix_tiles(row * case.kv_dtype.itemsize, case.kv_dtype)
        for name in "kv":
            shared[f"raw_{name}_s"] = plgpu.SMEM(
                (stages, config.block_kv, row), case.kv_dtype, transforms=transforms
            )
            if case.token_scales:
                shared[f"{name}_scales"] = plgpu.SMEM((THREADS,), jnp.float32)
            shared[f"raw_{name}_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    return shared | {
        "k_s": plgpu.SMEM((config.key_stages, config.block_kv, D), dtype, transforms=tiles),
        "v_s": plgpu.SMEM((config.value_stages, config.block_kv, D), dtype, transforms=tiles),
        "q_full": plgpu.Barrier(num_arrivals=D // chunk, num_barriers=CONSUMERS),
        "k_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.key_stages),
        "v_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.value_stages),
        "q_free": plgpu.Barrier(num_barriers=CONSUMERS),
        "k_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.key_stages),
        "v_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.value_stages),
        "turn": plgpu.Barrier(num_barriers=CONSUMERS),
        "cleaned": plgpu.Barrier(num_barriers=config.value_stages),
    }


def prefill(
    out: Float[Array, "T H D"],
    lse: Float[Array, "T H"] | None,
    q: Float[Array, "T H D"],
    pools: Pools,
    tables: Int32[Array, "B M"],
    scores: Scores,
    *,
    plan: Plan,
    interpret: Any = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"] | None]:
    """Attention of the query tokens in a plan over their rows' pages, written into `out` in place.

    Args:
      out: [T, H, D]; tokens of rows that are not in the plan keep what they have.
      lse: f32[T, H] log-sum-exp of the scores of other rows, to be filled in; None: it is not asked for.
      q: [T, H, D] packed queries; T is at least `tile_tokens`.
      pools, scores: what is asked for; there are values.
      tables: i32[B, M]; a negative entry is a hole.
      plan: from `prefill_plan`, with the same lengths, window and causality.
      interpret: `_mosaic.interpreter()` runs the kernel on the CPU.

    Returns:
      out and lse.

    Raises:
      NotImplementedError: the case is not supported.
    """
    scores = scores._replace(return_lse=lse is not None)
    inputs, case = prepare(q, pools, tables, scores, plan=plan, interpret=interpret)
    launch = sequential_vmap(functools.partial(_launch, case=case))
    out, by_tile = off_mesh(lambda args: launch(*args), (out, inputs))
    if lse is not None:
        lse = scatter_lse(lse, by_tile, plan)
    return out, lse


def prepare(
    q: Any, pools: Pools, tables: Any, scores: Scores, *, plan: Plan, interpret: Any
) -> tuple[dict[str, Any], Case]:
    """The kernel's inputs by name, and what is static; the arguments are those of `prefill`."""
    k_pages, v_pages, layer = pools
    sm_scale, soft_cap, sliding_window, sinks, causal, return_lse = scores
    (_, H, D), (_, _, K, S, _) = q.shape, k_pages.shape
    check_supported(
        "prefill_sm90",
        head_dim=D,
        v_head_dim=v_pages.shape[-1],
        page_size=S,
        q_dtype=q.dtype,
        kv_dtype=k_pages.dtype,
    )
    if num_parts(k_pages.dtype) > 1:
        raise NotImplementedError(f"prefill_sm90: pages must be of halves or quantised, got {k_pages.dtype}")
    case = Case(
        num_heads=H,
        num_kv_heads=K,
        head_dim=D,
        page_size=S,
        max_pages=tables.shape[1],
        num_pages=k_pages.shape[1],
        dtype=jnp.dtype(q.dtype),
        kv_dtype=jnp.dtype(k_pages.dtype),
        token_scales=isinstance(k_pages, QuantizedPages) and k_pages.per_token,
        causal=causal,
        windowed=sliding_window is not None,
        soft_cap=soft_cap,
        has_sinks=sinks is not None,
        return_lse=return_lse,
        config=plan.made_for.config,
        interpret=interpret,
    )
    # The kernel wants a scale that is not negative, so that the largest score is the largest product.
    if not isinstance(sm_scale, (int, float)):
        q, sm_scale = jnp.where(sm_scale < 0, -q, q), jnp.abs(sm_scale)
    elif sm_scale < 0:
        q, sm_scale = -q, -sm_scale
    inputs = {
        "layer": jnp.asarray(layer, jnp.int32).reshape(1),
        "scale": jnp.asarray(sm_scale, jnp.float32).reshape(1),
        "plan": plan.lines,
        "tables": tables,
        "q": q,
        "k": k_pages,
        "v": v_pages,
    }
    if isinstance(k_pages, QuantizedPages) and isinstance(v_pages, QuantizedPages):
        inputs |= {"k": k_pages.values, "v": v_pages.values}
        scales = k_pages.scales, v_pages.scales
        if case.token_scales:
            if scales[0].size >= 2**31:
                raise NotImplementedError(
                    f"prefill_sm90: {scales[0].size} scales: the kernel counts in int32"
                )
            inputs["flat_tables"], scales = tables.reshape(-1), [x.reshape(-1) for x in scales]
        inputs |= dict(zip(SCALES, scales, strict=True))
    if sliding_window is not None:
        # Positions are counted from a block's start and may be negative: no difference may pass int32.
        inputs["window"] = jnp.minimum(jnp.asarray(sliding_window, jnp.int32), 1 << 30).reshape(1)
    if sinks is not None:
        inputs["sinks"] = sinks.astype(jnp.float32)
    return inputs, case


def lse_type(lines: Any, case: Case) -> jax.ShapeDtypeStruct:
    """The log-sum-exp as the kernel writes it, for the tiles of a plan's lines."""
    return jax.ShapeDtypeStruct((len(lines) - 1, case.head_items, CONSUMERS, ROWS), jnp.float32)


@functools.partial(jax.jit, static_argnames="case")  # unrolled layers lower it once
def _launch(out: Any, inputs: dict[str, Any], case: Case) -> tuple[Any, Any]:
    by_tile = None

    def run(out_ref):
        nonlocal by_tile
        names = (*inputs, "out", *(("lse",) if case.return_lse else ()))

        def body(*refs, **scratch):
            program_body(dict(zip(names, refs, strict=True)), case, lax.axis_index("program"), **scratch)

        results = plgpu.kernel(
            body,
            out_type=(lse_type(inputs["plan"], case),) if case.return_lse else (),
            grid=(case.config.num_programs,),
            grid_names=("program",),
            num_threads=CONSUMERS + 1,
            thread_name="thread",
            scratch_types=scratch_of(case),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            kernel_name="paxcache_prefill",
            interpret=case.interpret,
        )(*inputs.values(), out_ref)
        if results:
            (by_tile,) = results

    (out,) = in_place(run, [out])
    return out, by_tile


def scatter_lse(lse: Any, by_tile: Any, plan: Plan) -> Any:
    """Puts [tiles, items, consumers, rows] into [T, H]."""
    tile, tiles, num_heads = plan.made_for.tile_tokens, by_tile.shape[0], lse.shape[1]
    # The consumers are two heads, or two halves of the tokens.
    by_token = by_tile.reshape(tiles, num_heads, tile)
    offset = jnp.arange(tile, dtype=jnp.int32)
    lines = plan.lines[1:, :, None]
    mine = (offset >= lines[:, Tile.SKIP]) & (offset < lines[:, Tile.SKIP] + lines[:, Tile.COUNT])
    mine &= jnp.arange(tiles)[:, None] < plan.lines[0, Head.TILES]
    token = jnp.where(mine, lines[:, Tile.TOKEN] + offset, lse.shape[0])
    return lse.at[token].set(jnp.moveaxis(by_token, 1, 2), mode="drop")
