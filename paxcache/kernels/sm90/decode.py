"""Paged attention for rows with few query tokens, on Hopper (sm_90a).

Decode reads every visible key and value once and computes little: what counts is that every SM streams pages from
the first microsecond to the last, whatever the mix of lengths. Four ideas:

- Work is split by tokens. `decode_plan` cuts a flat list of tiles of 64 tokens, in order of (row, KV head, token),
  into contiguous *ranges* of equal length, once per step. A range may begin and end inside a *pair* (row, KV head);
  what a range does of one pair is a *piece*. A pair inside one range is finished there. A pair that is cut leaves
  partial results (un-normalised sum, maximum, denominator), and the piece that is done last joins them: no program
  ever waits for another.
- Neighbouring programs, the *lanes* of a range, take the same tokens of different KV heads in step, because a page
  holds its heads side by side and memory answers faster to neighbours. The flat list is then a lane's.
- The operands are swapped: tokens are the rows of the matrix unit, S^T = K Q^T and O^T = V^T P^T, and the *columns*
  are a KV head's queries: its G heads times the row's query tokens, padded to 8. A group of 4 heads wastes half of
  an 8-wide column block instead of 60 of 64 rows. What exceeds a warpgroup's registers, many heads a KV head or many
  query tokens, becomes further pairs, which read the same keys again.
- Programs are persistent, two or three an SM. Warps of their own stream keys and values across the borders of pieces,
  so that the pipeline never drains.

Quantised pages are streamed as they are stored, and become half precision in registers, exactly: shared memory, which
the matrix unit reads too, would be the bottleneck. Three programs share a thread block and its warps of copies. A score
is multiplied by its key's scale. A value's scale joins its weight's exponent, ``exp(score) * scale = exp2(score *
log2(e) + log2(scale))``, so that the largest weight of a column is 1 whatever the scales are: float16 has no room for
others. The denominator takes it off again.

float32 pages are streamed as they are too. The matrix unit knows no float32: a number becomes three of bfloat16 in
registers, whose sum it is, and a product six, the small ones first. What is left out is below float32's last bit.

Reference: flash decoding (Dao et al., 2023) for the split; FlashInfer (Ye et al., 2025) for balanced work lists.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from paxcache._quantize import QuantizedPages
from paxcache.kernels._request import Pools, Rows, Scores, shapes_of
from paxcache.kernels.sm90._mosaic import off_mesh, plgpu
from paxcache.kernels.sm90.decode_case import Case, default_config, scratch_of
from paxcache.kernels.sm90.decode_merge import join_body
from paxcache.kernels.sm90.decode_plan import Config, OfRow, Plan, decode_plan, plan_shape
from paxcache.kernels.sm90.decode_program import attend_body
from paxcache.kernels.sm90.operands import check_supported

if TYPE_CHECKING:
    from jaxtyping import Array, Float

__all__ = [
    "Case",
    "Config",
    "attend_body",
    "completed",
    "decode",
    "default_config",
    "outputs",
    "prepare",
    "scratch_of",
]


def decode(
    q: Float[Array, "T H D"],
    pools: Pools,
    rows: Rows,
    scores: Scores,
    *,
    max_query_len: int = 1,
    plan: Plan | None = None,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"] | None]:
    """Attention of each row's few query tokens over the row's pages.

    Semantics are those of `paxcache.ops.paged_attention`. Rows must lie in the packed tokens in order
    (`query_starts` never decreases). The tokens of rows with more than `max_query_len` of them are left unwritten, for
    another kernel to fill.

    Args:
      q: [T, H, D] packed queries. Those of fp8 pages count in float16: what is larger saturates.
      pools, rows, scores: what is asked for; there are values.
      max_query_len: most query tokens of a row that is served, where there is no plan.
      plan: from `decode_plan`, for these rows and this window; None makes one.
      config: the launch configuration, where there is no plan; None takes the default one.
      interpret: `_mosaic.interpreter()` runs the kernel on the CPU.

    Returns:
      out [T, H, D] with zeros for tokens that no row owns; lse f32[T, H] with -inf there, or None.

    Raises:
      NotImplementedError: the case is not supported.
    """
    if plan is None:
        shapes = shapes_of(q, pools, rows, scores, max_query_len)
        shape = plan_shape(
            num_rows=shapes.num_rows,
            num_kv_heads=shapes.num_kv_heads,
            page_size=shapes.page_size,
            max_query_len=max_query_len,
            windowed=shapes.windowed,
            config=default_config(shapes) if config is None else config,
        )
        plan = decode_plan(rows, shape, sliding_window=scores.sliding_window)
    inputs, case = prepare(q, pools, rows, scores, plan=plan, interpret=interpret)
    # A batched grid would share the counters of arrivals: under vmap the launches run one after another.
    return off_mesh(sequential_vmap(functools.partial(_launch, case=case, interpret=interpret)), inputs)


def prepare(
    q: Any, pools: Pools, rows: Rows, scores: Scores, *, plan: Plan, interpret: Any
) -> tuple[dict[str, Any], Case]:
    """The kernel's inputs by name, and what is static; the arguments are those of `decode`."""
    k_pages, v_pages, layer = pools
    (_, H, D), (_, _, K, S, _) = q.shape, k_pages.shape
    check_supported(
        "decode_sm90",
        head_dim=D,
        v_head_dim=v_pages.shape[-1],
        page_size=S,
        q_dtype=q.dtype,
        kv_dtype=k_pages.dtype,
    )
    config = plan.made_for.config
    if interpret is not None:
        config = dataclasses.replace(config, fused_join=False)
    case = Case(
        head_groups=K * config.group_parts,
        groups_per_kv_head=config.group_parts,
        group=H // K // config.group_parts,
        head_dim=D,
        page_size=S,
        max_query_len=plan.made_for.max_query_len,
        max_pages=rows.tables.shape[1],
        dtype=jnp.dtype(k_pages.dtype),
        q_dtype=jnp.dtype(q.dtype),
        token_scales=isinstance(k_pages, QuantizedPages) and k_pages.per_token,
        causal=scores.causal,
        windowed=scores.sliding_window is not None,
        soft_cap=scores.soft_cap,
        has_sinks=scores.sinks is not None,
        return_lse=scores.return_lse,
        config=config,
        interpreted=interpret is not None,
    )
    inputs = {
        "layer": jnp.asarray(layer, jnp.int32).reshape(1),
        "scale": jnp.asarray(scores.sm_scale, jnp.float32).reshape(1),
        "plan": plan.lines,
        "tables": rows.tables,
        "q": jnp.pad(q, ((0, 0), (0, 0), (0, case.padded_dim - D))) if case.padded_dim > D else q,
        "k": k_pages,
        "v": v_pages,
    }
    if isinstance(k_pages, QuantizedPages) and isinstance(v_pages, QuantizedPages):
        inputs |= {"k": k_pages.values, "v": v_pages.values}
        inputs |= {"k_scales": k_pages.scales, "v_scales": v_pages.scales}
    if scores.sliding_window is not None:
        inputs["window"] = jnp.asarray(scores.sliding_window, jnp.int32).reshape(1)
    if scores.sinks is not None:
        by_head = scores.sinks.astype(jnp.float32).reshape(case.head_groups, case.group)
        by_head = jnp.tile(by_head, (1, case.config.block_tokens))
        inputs["sinks"] = jnp.pad(by_head, ((0, 0), (0, case.columns - by_head.shape[1])))
    return inputs, case


def outputs(inputs: dict[str, Any], case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """What the kernel writes, by name: the results, and partial results of pieces."""
    (T, H, DP), B, N = inputs["q"].shape, inputs["tables"].shape[0], case.columns
    programs, f32 = case.config.num_programs, jnp.float32
    num_partials = 2 * programs if case.config.piece_len is None else B * case.pairs * case.max_pieces
    outs = {
        "out": (case.q_dtype, T, H, DP),
        "partials": (f32, num_partials, DP, N),
        "stats": (f32, num_partials, 2, N),
    }
    if case.return_lse:
        outs["lse"] = (f32, B, case.pairs, N)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, *shape) in outs.items()}


@functools.partial(jax.jit, static_argnames=("case", "interpret"))  # unrolled layers lower it once
def _launch(inputs: dict[str, Any], case: Case, interpret: Any) -> tuple[Any, Any]:
    outs = outputs(inputs, case)
    names = (*inputs, *outs)

    def body(*refs, **scratch):
        attend_body(dict(zip(names, refs, strict=True)), case, lax.axis_index("block"), **scratch)

    results = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        grid=(case.num_blocks,),
        grid_names=("block",),
        num_threads=case.config.consumers + 1,
        thread_name="thread",
        scratch_types=scratch_of(case),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paxcache_decode",
        interpret=interpret,
    )(*inputs.values())
    return completed(inputs, dict(zip(outs, results, strict=True)), case, interpret)


def completed(inputs: dict[str, Any], results: dict[str, Any], case: Case, interpret: Any) -> tuple[Any, Any]:
    """out and lse of what the kernel has written; joins what it has not joined itself."""
    if not case.config.fused_join:
        given = {x: inputs[x] for x in ("plan", "sinks") if x in inputs}
        given |= {x: results[x] for x in ("partials", "stats")}
        written = {x: jax.new_ref(results[x]) for x in ("out", "lse") if x in results}
        names = (*given, *written)

        def body(*refs, **scratch):
            join_body(dict(zip(names, refs, strict=True)), case, **scratch)

        plgpu.kernel(
            body,
            out_type=(),
            grid=(
                case.config.num_programs
                if case.config.piece_len is None
                else len(inputs["tables"]) * case.pairs,
            ),
            grid_names=("block",),
            num_threads=1,
            thread_name="thread",
            scratch_types={"o_s": scratch_of(case)["o_s"]},
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name="paxcache_decode_join",
            interpret=interpret,
        )(*given.values(), *written.values())
        results |= {x: ref[...] for x, ref in written.items()}
    out = results["out"]
    lse = _packed_lse(results["lse"], inputs, case, out.shape[0]) if case.return_lse else None
    return out[..., : case.head_dim], lse


def _packed_lse(lse: Any, inputs: dict[str, Any], case: Case, num_tokens: int) -> Any:
    """From [B, pairs, columns] to [T, H]; -inf for tokens that no row owns."""
    B, G, Q, groups = lse.shape[0], case.group, case.max_query_len, case.head_groups
    lse = lse[:, :, : case.config.block_tokens * G].reshape(B, groups, -1, G)[:, :, :Q]
    lse = jnp.moveaxis(lse, 1, 2).reshape(B, Q, groups * G)
    query = jnp.arange(Q, dtype=jnp.int32)
    rows = inputs["plan"][case.num_ranges : case.num_ranges + B]
    token = rows[:, OfRow.START, None] + query
    served = (query < rows[:, OfRow.QUERIES, None]) & (rows[:, OfRow.LEN, None] > 0)
    token = jnp.where(served, token, num_tokens)
    return jnp.full((num_tokens, groups * G), -jnp.inf, jnp.float32).at[token].set(lse, mode="drop")
