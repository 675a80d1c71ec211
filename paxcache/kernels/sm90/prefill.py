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

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from paxcache._quantize import QuantizedPages
from paxcache.kernels._request import Pools, Scores
from paxcache.kernels.sm90._mosaic import in_place, off_mesh, pl, plgpu
from paxcache.kernels.sm90.operands import check_supported, num_parts
from paxcache.kernels.sm90.prefill_case import SCALES, Case, default_config, scratch_of
from paxcache.kernels.sm90.prefill_consumer import Consumer
from paxcache.kernels.sm90.prefill_plan import CONSUMERS, ROWS, Config, Head, Plan, Tile
from paxcache.kernels.sm90.prefill_producer import ConvertingProducer, Producer
from paxcache.kernels.sm90.prefill_program import Program

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

__all__ = [
    "Case",
    "Config",
    "default_config",
    "lse_type",
    "prefill",
    "prepare",
    "program_body",
    "scatter_lse",
    "scratch_of",
]


def program_body(refs: dict[str, Any], case: Case, number: Any, **scratch: Any) -> None:
    """One program: a warpgroup produces, two consume."""
    program = Program.of(refs, case, number, scratch)

    @pl.when(program.warpgroup == CONSUMERS)
    def _producer():
        if program.on_gpu:
            plgpu.set_max_registers(case.registers[1], action="decrease")
        (Producer if case.form is None else ConvertingProducer)(program).run()

    @pl.when(program.warpgroup < CONSUMERS)
    def _consumer():
        if program.on_gpu:
            plgpu.set_max_registers(case.registers[0], action="increase")
        Consumer.of(program).run()


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
