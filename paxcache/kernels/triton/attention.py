"""Paged attention in Triton: which rows go to which kernel. Imports `decode_triton`, `prefill_triton` and what they
share.

Where no row can have more than FEW_QUERIES query tokens, all go to the decode kernel. In every other step rows with a
single one do, and those with more to the prefill kernel, in a launch of its own: a step may hold any mix, which the
host never reads.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from paxcache._quantize import BY_DTYPE
from paxcache.kernels._request import Step, fitting, groups
from paxcache.kernels.triton import decode as decode_triton
from paxcache.kernels.triton import prefill as prefill_triton
from paxcache.kernels.triton._tiles import Shape, shape_of
from paxcache.kernels.triton._triton import Limits, device_limits

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of a step for both kernels; of several plans attention takes the one that fits."""

    decode: tuple[decode_triton.Plan, ...]
    prefill: tuple[prefill_triton.Plan, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step(Step):
    """What launches and plans of a step depend on, lengths apart."""

    shape: Shape
    limits: Limits

    def decode(self) -> tuple[decode_triton.Config, decode_triton.PlanShape]:
        most = self.decode_query_len
        config = decode_triton.default_config(self.shape, most, self.limits)
        made_for = decode_triton.plan_shape(
            self.shape, num_rows=self.num_rows, max_query_len=most, windowed=self.windowed, config=config
        )
        return config, made_for

    def prefill(self) -> tuple[prefill_triton.Config, prefill_triton.PlanShape]:
        config = prefill_triton.default_config(self.shape, self.limits)
        made_for = prefill_triton.plan_shape(
            self.shape, num_rows=self.num_rows, num_tokens=self.num_tokens, min_query_len=2, config=config
        )
        return config, made_for

    def make_plan(self, tables: Any, seq_lens: Any, query_lens: Any, sliding_window: Any) -> Plan:
        _, made_for = self.decode()
        decode = decode_triton.decode_plan(
            seq_lens, query_lens, sliding_window=sliding_window, made_for=made_for
        )
        if not self.is_mixed:
            return Plan((decode,), ())
        _, made_for = self.prefill()
        prefill = prefill_triton.prefill_plan(
            tables,
            seq_lens,
            query_lens,
            page_size=self.shape.page_size,
            sliding_window=sliding_window,
            made_for=made_for,
        )
        return Plan((decode,), (prefill,))


def make_plan(
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, "B"],
    query_starts: Int32[Array, "B"],
    query_lens: Int32[Array, "B"],
    *,
    num_tokens: int,
    num_heads: int | None,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    max_query_len: int,
    dtype: Any,
    sliding_window: Int32[Array, ""] | int | None,
    causal: bool,
    limits: Limits | None = None,
) -> Plan:
    """Divides a step's attention, on the device; without `num_heads`, for groups of several sizes.

    Args:
      block_tables: i32[B, M]; a negative entry is a hole.
      seq_lens: i32[B], with the new tokens.
      query_starts, query_lens: i32[B] a row's first query token and its number of them.
      num_tokens: query tokens, T.
      num_heads, num_kv_heads, head_dim, page_size: H, K, D, S; values are taken to be as wide as keys.
      max_query_len: most query tokens of a row.
      dtype: of the pages, or of their quantised values; queries are taken to be of the same, or in half precision.
      sliding_window: tokens a query sees, itself included.
      causal: whether a query does not see later tokens.
      limits: the device's.

    Raises:
      NotImplementedError: the device is none that the kernels run on.
    """
    del query_starts, causal  # the same plan for all
    limits = device_limits() if limits is None else limits
    stored = BY_DTYPE.get(jnp.dtype(dtype))
    form = "plain" if stored is None else stored.name
    decode: dict[Any, decode_triton.Plan] = {}
    prefill: dict[Any, prefill_triton.Plan] = {}
    for group in groups(num_heads, num_kv_heads):
        shape = Shape(
            num_heads=group * num_kv_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=head_dim,
            page_size=page_size,
            form=form,
            per_token=False,
            keys_are_values=False,
            q_dtype=jnp.dtype(dtype if form == "plain" else jnp.bfloat16),
            kv_dtype=jnp.dtype(dtype),
        )
        step = _Step(
            shape=shape,
            num_rows=block_tables.shape[0],
            num_tokens=num_tokens,
            max_query_len=max_query_len,
            windowed=sliding_window is not None,
            limits=limits,
        )
        made = step.make_plan(block_tables, seq_lens, query_lens, sliding_window)
        decode |= {plan.made_for: plan for plan in made.decode}
        prefill |= {plan.made_for: plan for plan in made.prefill}
    return Plan(tuple(decode.values()), tuple(prefill.values()))


def paged_attention(
    q: Float[Array, "T H D"],
    k_pages: Any,
    v_pages: Any,
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, "B"],
    query_starts: Int32[Array, "B"],
    query_lens: Int32[Array, "B"],
    layer: Int32[Array, ""],
    *,
    max_query_len: int,
    sm_scale: Any,
    soft_cap: Any,
    sliding_window: Any,
    sinks: Float[Array, "H"] | None,
    causal: bool,
    return_lse: bool,
    plan: Plan | None,
    limits: Limits | None = None,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "T H"] | None]:
    """Attention of each row's queries over its own pages, and the log-sum-exp of each query's scores if asked for.

    Semantics are those of `paxcache.ops.paged_attention`; pools are arrays or `QuantizedPages`.

    Raises:
      NotImplementedError: the kernels cannot do this.
    """
    limits = device_limits() if limits is None else limits
    step = _Step(
        shape=shape_of(q, k_pages, v_pages),
        num_rows=block_tables.shape[0],
        num_tokens=q.shape[0],
        max_query_len=max_query_len,
        windowed=sliding_window is not None,
        limits=limits,
    )
    decode_config, decode_shape = step.decode()
    decode_plan, prefill_plan = fitting(plan and plan.decode, decode_shape), None
    prefill_config, prefill_shape = step.prefill()
    if step.is_mixed:
        prefill_plan = fitting(plan and plan.prefill, prefill_shape)
    if decode_plan is None or (step.is_mixed and prefill_plan is None):
        own = step.make_plan(block_tables, seq_lens, query_lens, sliding_window)
        decode_plan, prefill_plan = own.decode[0], own.prefill[0] if step.is_mixed else None
    options = {
        "sm_scale": sm_scale,
        "soft_cap": soft_cap,
        "sliding_window": sliding_window,
        "sinks": sinks,
        "causal": causal,
        "limits": limits,
    }
    inputs = q, k_pages, v_pages, block_tables, seq_lens, query_starts, query_lens, layer
    out, lse = decode_triton.decode(
        *inputs, return_lse=return_lse, plan=decode_plan, config=decode_config, **options
    )
    if prefill_plan is None:
        return out, lse
    return prefill_triton.prefill(out, *inputs, lse=lse, plan=prefill_plan, config=prefill_config, **options)
