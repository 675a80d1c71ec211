"""Paged attention in Triton: which rows go to which kernel.

Where no row can have more than FEW_QUERIES query tokens, all go to the decode kernel. In every other step rows with a
single one do, and those with more to the prefill kernel, in a launch of its own: a step may hold any mix, which the
host never reads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from paxcache._quantize import BY_DTYPE
from paxcache.kernels._request import Pools, Rows, Scores, Shapes, shapes_of
from paxcache.kernels.triton import decode, prefill
from paxcache.kernels.triton._tiles import Shape, shape_of
from paxcache.kernels.triton._triton import Limits, device_limits

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of a step."""

    decode: decode.Plan
    prefill: prefill.Plan | None
    """None: all rows are decode's."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the launches and the plans of a step depend on, lengths apart."""

    shapes: Shapes
    shape: Shape
    limits: Limits

    @functools.cached_property
    def decode_config(self) -> decode.Config:
        """Decode's launch configuration."""
        return decode.default_config(self.shape, self.shapes.decode_query_len, self.limits)

    @functools.cached_property
    def prefill_config(self) -> prefill.Config:
        """Prefill's launch configuration."""
        return prefill.default_config(self.shape, self.limits)

    def decode_shape(self) -> decode.PlanShape:
        """The form of decode's plan."""
        return decode.plan_shape(
            self.shape,
            num_rows=self.shapes.num_rows,
            max_query_len=self.shapes.decode_query_len,
            windowed=self.shapes.windowed,
            config=self.decode_config,
        )

    def prefill_shape(self) -> prefill.PlanShape:
        """The form of prefill's plan."""
        return prefill.plan_shape(
            self.shape,
            num_rows=self.shapes.num_rows,
            num_tokens=self.shapes.num_tokens,
            min_query_len=2,
            config=self.prefill_config,
        )

    def fits(self, plan: Any) -> bool:
        """Whether a plan was made for such launches."""
        if not isinstance(plan, Plan) or plan.decode.made_for != self.decode_shape():
            return False
        if not self.shapes.is_mixed:
            return True
        return plan.prefill is not None and plan.prefill.made_for == self.prefill_shape()

    def make_plan(self, rows: Rows, sliding_window: Any) -> Plan:
        """Divides the work of the rows."""
        of_decode = decode.decode_plan(rows, self.decode_shape(), sliding_window=sliding_window)
        if not self.shapes.is_mixed:
            return Plan(of_decode, None)
        return Plan(
            of_decode, prefill.prefill_plan(rows, self.prefill_shape(), sliding_window=sliding_window)
        )


def make_plan(
    rows: Rows,
    shapes: Shapes,
    *,
    sliding_window: Int32[Array, ""] | int | None = None,
    causal: bool = True,
    limits: Limits | None = None,
) -> Plan | None:
    """Divides a step's attention, on the device; None where the number of query heads is not known.

    Args:
      rows: the step's.
      shapes: what is static; dtype is that of the pages, or of their quantised values. Queries are taken to be of the
        same, or in half precision, and values to be as wide as keys.
      sliding_window: tokens a query sees, itself included.
      causal: whether a query does not see later tokens; the same plan for both.
      limits: the device's.

    Raises:
      NotImplementedError: the device is none that the kernels run on.
    """
    del causal
    limits = device_limits() if limits is None else limits
    if shapes.num_heads is None:
        return None
    stored = BY_DTYPE.get(jnp.dtype(shapes.dtype))
    shape = Shape(
        num_heads=shapes.num_heads,
        num_kv_heads=shapes.num_kv_heads,
        head_dim=shapes.head_dim,
        v_head_dim=shapes.head_dim,
        page_size=shapes.page_size,
        form="plain" if stored is None else stored.name,
        per_token=False,
        keys_are_values=False,
        q_dtype=jnp.dtype(shapes.dtype if stored is None else jnp.bfloat16),
        kv_dtype=jnp.dtype(shapes.dtype),
    )
    return Launch(shapes, shape, limits).make_plan(rows, sliding_window)


def paged_attention(
    q: Float[Array, "T H D"],
    pools: Pools,
    rows: Rows,
    scores: Scores,
    *,
    max_query_len: int,
    plan: Any = None,
    limits: Limits | None = None,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "T H"] | None]:
    """Attention of each row's queries over its own pages, and the log-sum-exp of each query's scores if asked for.

    Semantics are those of `paxcache.ops.paged_attention`.

    Raises:
      NotImplementedError: the kernels cannot do this.
    """
    limits = device_limits() if limits is None else limits
    shapes = shapes_of(q, pools, rows, scores, max_query_len)
    launch = Launch(shapes, shape_of(q, pools), limits)
    if not launch.fits(plan):
        plan = launch.make_plan(rows, scores.sliding_window)
    out, lse = decode.decode(
        q, pools, rows, scores, plan=plan.decode, config=launch.decode_config, limits=limits
    )
    if not shapes.is_mixed:
        return out, lse
    return prefill.prefill(
        out, lse, q, pools, rows, scores, plan=plan.prefill, config=launch.prefill_config, limits=limits
    )
