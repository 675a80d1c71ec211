"""Both kinds of rows of a mixed step in one launch, on Hopper (sm_90a). Imports `decode_sm90`, `prefill_sm90`, their
plans and what they share.

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

from paxcache.kernels.sm90 import decode as decode_sm90
from paxcache.kernels.sm90 import decode_plan, prefill_plan
from paxcache.kernels.sm90 import prefill as prefill_sm90
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
    decode: decode_plan.Config,
    prefill: prefill_plan.Config,
    *,
    group: int,
    head_dim: int,
    limits: DeviceLimits,
) -> tuple[decode_plan.Config, prefill_plan.Config] | None:
    """The launch configurations of both kinds in one launch, from those of launches of their own; None: it cannot be.

    What fits twice on an SM fits into one thread block: two of decode's programs, with the same bytes in flight. Both
    kinds write one output, which decode must not pad.
    """
    if decode.consumers > 1 or decode.num_programs <= limits.num_sms or prefill.raw_stages:
        return None
    if padded_head_dim(head_dim) > head_dim:
        return None
    decode = dataclasses.replace(decode, consumers=2, beside_prefill=group)
    return decode, dataclasses.replace(prefill, beside_decode=group)


def make_plans(
    rows: tuple[Any, ...],
    for_decode: dict[str, Any],
    for_prefill: dict[str, Any],
    *,
    kv_head_bytes: int,
    sliding_window: Int32[Array, ""] | int | None,
    causal: bool,
) -> tuple[decode_plan.Plan, prefill_plan.Plan]:
    """The plans of both kinds, with a share of the SMs for each, on the device.

    Args:
      rows: block tables, lengths, first query tokens and numbers of query tokens.
      for_decode, for_prefill: arguments of `decode_plan` and `prefill_plan`, with the configurations of `configs`.
      kv_head_bytes: of a token's key and value of a KV head.
      sliding_window, causal: see there.
    """
    config, prefill_config = for_decode["config"], for_prefill["config"]
    options = {"page_size": for_decode["page_size"], "sliding_window": sliding_window, "causal": causal}
    prefill = prefill_plan.prefill_plan(*rows, **for_prefill, **options)

    heads, kv_heads = for_prefill["num_heads"], for_prefill["num_kv_heads"]
    head_items = heads // prefill_plan.heads_of_program(heads, kv_heads)
    tiles = prefill.lines[1:, prefill_plan.BLOCKS]
    is_tile = jnp.arange(len(tiles)) < prefill.lines[0, 0]
    blocks = jnp.sum(jnp.where(is_tile, tiles, 0)).astype(jnp.float32) * head_items

    _, lens, _, query_lens = rows
    seen = jnp.where(query_lens == 1, lens, 0)
    if sliding_window is not None:
        seen = jnp.minimum(seen, sliding_window)
    block_bytes = STREAM_BYTES * prefill_config.block_kv * kv_head_bytes / (128 * 512)
    reading = jnp.sum(seen.astype(jnp.float32)) * (kv_heads * kv_head_bytes / block_bytes)
    ranges = jnp.arange(1, config.num_programs // config.lanes + 1)
    sms = decode_plan.busy_blocks(config, ranges)
    num_ranges, num_programs = _share(reading, blocks, ranges, sms, prefill_config.num_programs)

    lines = prefill.lines.at[0, prefill_plan.PROGRAMS].set(num_programs)
    decode = decode_plan.decode_plan(
        *rows, **for_decode, sliding_window=sliding_window, num_ranges=num_ranges
    )
    return decode, dataclasses.replace(prefill, lines=lines)


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
    k_pages: Any,
    v_pages: Any,
    layer: Any,
    block_tables: Any,
    seq_lens: Any,
    query_starts: Any,
    query_lens: Any,
    *,
    return_lse: bool,
    decode_plan: decode_plan.Plan,
    prefill_plan: prefill_plan.Plan,
    **options: Any,
) -> tuple[Any, Any]:
    """Attention of rows with one query token and of rows with more; arguments and results are those of `decode`.

    Args:
      q, k_pages, v_pages, layer, block_tables, seq_lens, query_starts, query_lens: see there.
      return_lse: see there.
      decode_plan, prefill_plan: with the configurations that `configs` makes.
      options: what `decode` and `prefill` have in common.
    """
    pools = k_pages, v_pages, layer, block_tables
    own, prefill_case = prefill_sm90.prepare(q, *pools, return_lse=return_lse, plan=prefill_plan, **options)
    inputs, decode_case = decode_sm90.prepare(
        own["q"],
        *pools,
        seq_lens,
        query_starts,
        query_lens,
        max_query_len=1,
        return_lse=return_lse,
        plan=decode_plan,
        config=decode_plan.made_for.config,
        **options | {"sm_scale": own["scale"][0]},
    )
    inputs |= {x: own[x] for x in ("window",) if x in own}
    inputs |= {f"prefill_{name}": x for name, x in own.items() if name not in SHARED}
    launch = functools.partial(_launch, cases=(decode_case, prefill_case))
    out, lse, by_tile = off_mesh(sequential_vmap(launch), inputs)
    return out, prefill_sm90.scatter_lse(lse, by_tile, prefill_plan) if return_lse else None


def _role(block: Any, plan: Any, decode: decode_sm90.Case, num_sms: int) -> tuple[Any, Any, Any]:
    """Whether a thread block decodes; its number among those that do; and among those that prefill.

    The first blocks, one an SM, go to SMs that lie together, so blocks of both kinds take turns. The others find an SM
    when these end: they prefill where decode had all SMs, or else count as decode's, without work.
    """
    busy = plan[decode.num_ranges, decode_plan.BUSY_BLOCKS]
    is_first, at = block < num_sms, jnp.minimum(block, num_sms)
    before = lax.div(at * busy, num_sms)
    takes_turn = lax.div((at + 1) * busy, num_sms) > before
    is_decode = jnp.where(is_first, takes_turn, busy < decode.num_blocks)
    return is_decode, jnp.where(is_first, before, block - (num_sms - busy)), block - before


@functools.partial(jax.jit, static_argnames="cases")  # unrolled layers lower it once
def _launch(inputs: dict[str, Any], cases: Any) -> tuple[Any, Any, Any]:
    decode, prefill = cases
    outs = decode_sm90.outputs(inputs, decode)
    if prefill.return_lse:
        outs["prefill_lse"] = prefill_sm90.lse_type(inputs["prefill_plan"], prefill)
    names, num_sms = (*inputs, *outs), prefill.config.num_programs

    def body(*arguments):
        refs = dict(zip(names, arguments, strict=True))
        of_prefill = {x: refs[x] for x in ("out", *SHARED) if x in refs}
        of_prefill |= {x.removeprefix("prefill_"): ref for x, ref in refs.items() if x.startswith("prefill_")}
        is_decode, decode_block, program = _role(lax.axis_index("block"), refs["plan"], decode, num_sms)
        # Blocks of both kinds take one memory.
        scoped = functools.partial(pl.run_scoped, collective_axes="thread")

        @pl.when(is_decode)
        def _():
            run = functools.partial(decode_sm90.attend_body, refs, decode, decode_block)
            scoped(run, **decode_sm90.scratch_of(decode))

        @pl.when(jnp.logical_not(is_decode))
        def _():
            run = functools.partial(prefill_sm90.program_body, of_prefill, prefill, program)
            scoped(run, **prefill_sm90.scratch_of(prefill))

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
        interpret=prefill.interpret,
    )(*inputs.values())
    results = dict(zip(outs, results, strict=True))
    out, lse = decode_sm90.completed(inputs, results, decode, prefill.interpret)
    return out, lse, results.get("prefill_lse")
