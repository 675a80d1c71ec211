"""Both kinds of rows of a mixed step in one launch, on Hopper (sm_90a).

Decode waits for memory and prefill for the matrix unit, each on every SM: one after the other, each leaves idle what
the other lacks. Here some SMs decode and the others prefill at the same time. How many is a share of the work, counted
once per step on the device. Few SMs decode better than many: beside half of them, which read as fast as all, prefill
waits for memory too. And they lie scattered: SMs that lie together get less of the memory's bandwidth.

Reference: POD-Attention (Kamath et al., 2025) for prefill and decode in one kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from paxcache.kernels._request import Pools, Rows, Scores
from paxcache.kernels.sm90 import decode, decode_plan, prefill, prefill_plan
from paxcache.kernels.sm90._mosaic import DeviceLimits, off_mesh, pl, plgpu
from paxcache.kernels.sm90.decode_case import padded_head_dim

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

WARPGROUPS = prefill_plan.CONSUMERS + 1  # of a block, of either kind
STREAM_BYTES = 120 * 1024
"""What decode reads on an SM while prefill multiplies 128 queries with a block of 128 keys of 128, on an H200."""
MOST_READERS = 64
"""SMs that read about as fast as all do, on an H200."""
SHARED = "layer", "scale", "tables", "q", "k", "v", "window"  # inputs of both kinds


def configs(
    of_decode: decode_plan.Config,
    of_prefill: prefill_plan.Config,
    *,
    group: int,
    head_dim: int,
    limits: DeviceLimits,
) -> tuple[decode_plan.Config, prefill_plan.Config] | None:
    """The launch configurations of both kinds in one launch, from those of launches of their own; None: it cannot be.

    What fits twice on an SM fits into one thread block: two of decode's programs, with the same bytes in flight. Both
    kinds write one output, which decode must not pad.
    """
    if of_decode.consumers > 1 or of_decode.num_programs <= limits.num_sms or of_prefill.raw_stages:
        return None
    if padded_head_dim(head_dim) > head_dim:
        return None
    of_decode = dataclasses.replace(of_decode, consumers=2, beside_prefill=group)
    return of_decode, dataclasses.replace(of_prefill, beside_decode=group)


def make_plans(
    rows: Rows,
    decode_shape: decode_plan.Shape,
    prefill_shape: prefill_plan.Shape,
    *,
    num_kv_heads: int,
    kv_head_bytes: int,
    sliding_window: Int32[Array, ""] | int | None,
    causal: bool,
) -> tuple[decode_plan.Plan, prefill_plan.Plan]:
    """The plans of both kinds, with a share of the SMs for each, on the device.

    Args:
      rows: the step's.
      decode_shape, prefill_shape: with the configurations of `configs`.
      num_kv_heads: K.
      kv_head_bytes: of a token's key and value of a KV head.
      sliding_window, causal: see there.
    """
    config, prefill_config = decode_shape.config, prefill_shape.config
    group, window = config.beside_prefill, {"sliding_window": sliding_window}
    of_prefill = prefill_plan.prefill_plan(rows, prefill_shape, causal=causal, **window)

    head_items = num_kv_heads * group // prefill_plan.heads_of_program(group)
    tiles = of_prefill.lines[1:, prefill_plan.Tile.BLOCKS]
    is_tile = jnp.arange(len(tiles)) < of_prefill.lines[0, prefill_plan.Head.TILES]
    blocks = jnp.sum(jnp.where(is_tile, tiles, 0)).astype(jnp.float32) * head_items

    seen = jnp.where(rows.query_lens == 1, rows.seq_lens, 0)
    if sliding_window is not None:
        seen = jnp.minimum(seen, sliding_window)
    block_bytes = STREAM_BYTES * prefill_config.block_kv * kv_head_bytes / (128 * 512)
    reading = jnp.sum(seen.astype(jnp.float32)) * (num_kv_heads * kv_head_bytes / block_bytes)
    ranges = jnp.arange(1, config.num_programs // config.lanes + 1)
    sms = decode_plan.busy_blocks(config, ranges)
    num_ranges, num_programs = _share(reading, blocks, ranges, sms, prefill_config.num_programs)

    lines = of_prefill.lines.at[0, prefill_plan.Head.PROGRAMS].set(num_programs)
    of_decode = decode_plan.decode_plan(rows, decode_shape, num_ranges=num_ranges, **window)
    return of_decode, dataclasses.replace(of_prefill, lines=lines)


def _share(reading: Any, blocks: Any, ranges: Any, sms: Any, num_sms: int) -> tuple[Any, Any]:
    """Ranges that decode and programs that prefill, from the work of both as times of one SM.

    Args:
      reading, blocks: of decode and of prefill, in blocks of prefill.
      ranges, sms: how many ranges could decode, and how many SMs they would take.
      num_sms: of the device.
    """
    decoding = reading / jnp.minimum(sms, MOST_READERS)
    left = num_sms - sms
    together = jnp.where(left > 0, jnp.maximum(decoding, blocks / jnp.maximum(left, 1)), jnp.inf)
    best = jnp.argmin(together)
    is_apart = decoding[-1] + blocks / num_sms <= together[best]
    num_ranges = jnp.where(is_apart, jnp.where(reading > 0, ranges[-1], 0), ranges[best])
    num_programs = jnp.where(is_apart, num_sms, left[best])
    return num_ranges.astype(jnp.int32), num_programs.astype(jnp.int32)


def attend(
    q: Any,
    pools: Pools,
    rows: Rows,
    scores: Scores,
    *,
    plans: tuple[decode_plan.Plan, prefill_plan.Plan],
    interpret: Any,
) -> tuple[Any, Any]:
    """Attention of rows with one query token and of rows with more, as `decode` and `prefill` do it.

    Args:
      q, pools, rows, scores: see there.
      plans: from `make_plans`.
      interpret: see there.
    """
    of_decode, of_prefill = plans
    own, prefill_case = prefill.prepare(q, pools, rows.tables, scores, plan=of_prefill, interpret=interpret)
    scores = scores._replace(sm_scale=own["scale"][0])
    inputs, decode_case = decode.prepare(own["q"], pools, rows, scores, plan=of_decode, interpret=interpret)
    inputs |= {x: own[x] for x in ("window",) if x in own}
    inputs |= {f"prefill_{name}": x for name, x in own.items() if name not in SHARED}
    launch = functools.partial(_launch, cases=(decode_case, prefill_case))
    out, lse, by_tile = off_mesh(sequential_vmap(launch), inputs)
    return out, prefill.scatter_lse(lse, by_tile, of_prefill) if scores.return_lse else None


def _role(block: Any, plan: Any, case: decode.Case, num_sms: int) -> tuple[Any, Any, Any]:
    """Whether a thread block decodes; its number among those that do; and among those that prefill.

    The first blocks, one an SM, go to SMs that lie together, so blocks of both kinds take turns. The others find an SM
    when these end: they prefill where decode had all SMs, or else count as decode's, without work.
    """
    busy = plan[case.num_ranges, decode_plan.OfRow.BUSY_BLOCKS]
    is_first, at = block < num_sms, jnp.minimum(block, num_sms)
    before = lax.div(at * busy, num_sms)
    takes_turn = lax.div((at + 1) * busy, num_sms) > before
    is_decode = jnp.where(is_first, takes_turn, busy < case.num_blocks)
    return is_decode, jnp.where(is_first, before, block - (num_sms - busy)), block - before


@functools.partial(jax.jit, static_argnames="cases")  # unrolled layers lower it once
def _launch(inputs: dict[str, Any], cases: Any) -> tuple[Any, Any, Any]:
    decode_case, prefill_case = cases
    outs = decode.outputs(inputs, decode_case)
    if prefill_case.return_lse:
        outs["prefill_lse"] = prefill.lse_type(inputs["prefill_plan"], prefill_case)
    names, num_sms = (*inputs, *outs), prefill_case.config.num_programs

    def body(*arguments):
        refs = dict(zip(names, arguments, strict=True))
        of_prefill = {x: refs[x] for x in ("out", *SHARED) if x in refs}
        of_prefill |= {x.removeprefix("prefill_"): ref for x, ref in refs.items() if x.startswith("prefill_")}
        is_decode, decode_block, program = _role(lax.axis_index("block"), refs["plan"], decode_case, num_sms)
        # Blocks of both kinds take one memory.
        scoped = functools.partial(pl.run_scoped, collective_axes="thread")

        @pl.when(is_decode)
        def _():
            run = functools.partial(decode.attend_body, refs, decode_case, decode_block)
            scoped(run, **decode.scratch_of(decode_case))

        @pl.when(jnp.logical_not(is_decode))
        def _():
            run = functools.partial(prefill.program_body, of_prefill, prefill_case, program)
            scoped(run, **prefill.scratch_of(prefill_case))

    results = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        grid=(2 * num_sms,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="thread",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="paxcache_mixed",
        interpret=prefill_case.interpret,
    )(*inputs.values())
    results = dict(zip(outs, results, strict=True))
    out, lse = decode.completed(inputs, results, decode_case, prefill_case.interpret)
    return out, lse, results.get("prefill_lse")
