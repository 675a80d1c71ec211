"""Paged attention on Hopper (sm_90a): which rows go to which kernel.

Where no row can have more than FEW_QUERIES query tokens, as in decoding, also with speculation, all go to the decode
kernel. In every other step, also in a packed one of any size, rows with a single one do, and those with more to the
prefill kernel: a step may hold any mix, which the host never reads. Both share a launch, `mixed`, where two of decode's
programs fit an SM; pages that are quantised or as wide as 256 get two launches. float32 rows with more tokens are cut
into rows of FEW_QUERIES, all for the decode kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from paxcache._quantize import QuantizedPages
from paxcache.kernels._request import FEW_QUERIES, Pools, Rows, Scores, Shapes, shapes_of
from paxcache.kernels.sm90 import decode, decode_plan, mixed, prefill, prefill_plan
from paxcache.kernels.sm90._mosaic import DeviceLimits, device_limits
from paxcache.kernels.sm90.operands import check_supported, num_parts, query_dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of a step."""

    decode: decode_plan.Plan
    prefill: prefill_plan.Plan | None
    """None: all rows are decode's."""


@dataclasses.dataclass(frozen=True)
class _Launch:
    """What the launches and the plans of a step depend on, lengths apart."""

    shapes: Shapes
    limits: DeviceLimits | None

    @property
    def is_float32(self) -> bool:
        """Whether the prefill kernel takes no rows."""
        return num_parts(self.shapes.dtype) > 1

    @property
    def is_mixed(self) -> bool:
        """Whether both kernels have rows."""
        return self.shapes.is_mixed and not self.is_float32

    @property
    def decode_query_len(self) -> int:
        """Most query tokens of a row that the decode kernel takes."""
        if self.is_float32:
            return min(self.shapes.max_query_len, FEW_QUERIES)
        return self.shapes.decode_query_len

    @property
    def cuts_rows(self) -> bool:
        """Whether rows are cut into rows of `decode_query_len` query tokens."""
        return self.is_float32 and self.shapes.max_query_len > FEW_QUERIES

    @property
    def decode_rows(self) -> int:
        """Rows of the decode kernel: each row, and one more for each FEW_QUERIES tokens after its first."""
        num_rows, num_tokens = self.shapes.num_rows, self.shapes.num_tokens
        return num_rows + num_tokens // FEW_QUERIES if self.cuts_rows else num_rows

    @property
    def padded_tokens(self) -> int:
        """Query tokens, at least a tile of the prefill kernel."""
        if not self.is_mixed:
            return self.shapes.num_tokens
        return max(self.shapes.num_tokens, prefill_plan.tile_tokens(self.shapes.group))

    @functools.cached_property
    def configs(self) -> tuple[decode_plan.Config, prefill_plan.Config]:
        """Of decode and of prefill, together in a launch if they can be."""
        own = dataclasses.replace(self.shapes, max_query_len=self.decode_query_len)
        configs = (
            decode.default_config(own, limits=self.limits),
            prefill.default_config(head_dim=own.head_dim, dtype=own.dtype, limits=self.limits),
        )
        if not self.is_mixed:
            return configs
        limits = self.limits or device_limits()
        return mixed.configs(*configs, group=own.group, head_dim=own.head_dim, limits=limits) or configs

    def decode_shape(self) -> decode_plan.Shape:
        """The form of decode's plan."""
        return decode_plan.plan_shape(
            num_rows=self.decode_rows,
            num_kv_heads=self.shapes.num_kv_heads,
            page_size=self.shapes.page_size,
            max_query_len=self.decode_query_len,
            windowed=self.shapes.windowed,
            config=self.configs[0],
        )

    def prefill_shape(self) -> prefill_plan.Shape:
        """The form of prefill's plan."""
        return prefill_plan.plan_shape(
            num_rows=self.shapes.num_rows,
            num_tokens=self.padded_tokens,
            group=self.shapes.group,
            page_size=self.shapes.page_size,
            min_query_len=2,
            config=self.configs[1],
        )

    def fits(self, plan: Any) -> bool:
        """Whether a plan was made for such launches."""
        if not isinstance(plan, Plan) or plan.decode.made_for != self.decode_shape():
            return False
        if not self.is_mixed:
            return True
        return plan.prefill is not None and plan.prefill.made_for == self.prefill_shape()

    def decode_rows_of(self, rows: Rows, causal: bool) -> Rows:
        """The rows as the decode kernel gets them: a long float32 one as several, which see the same pages."""
        if not self.cuts_rows:
            return rows
        if self.shapes.windowed and not causal:
            raise NotImplementedError(
                "attention_sm90: float32 rows of more than "
                f"{FEW_QUERIES} query tokens with sliding_window must be causal, got causal=False"
            )
        tables, seq_lens, starts, lens = rows
        parts = jnp.maximum(-(-lens // FEW_QUERIES), 1)
        row, number, _ = prefill_plan.items_of_rows(parts, self.decode_rows)
        queries = lens[row]
        begin = jnp.minimum(number * FEW_QUERIES, queries)  # past the last: nothing
        end = jnp.minimum(begin + FEW_QUERIES, queries)
        length = seq_lens[row] - (queries - end if causal else 0)
        length = jnp.where(seq_lens[row] > 0, length, 0)
        return Rows(tables[row], length, starts[row] + begin, end - begin)

    def make_plan(self, rows: Rows, sliding_window: Any, causal: bool) -> Plan:
        """Divides the work of the rows."""
        window = {"sliding_window": sliding_window}
        if self.configs[0].beside_prefill:
            kv_head_bytes = 2 * self.shapes.head_dim * jnp.dtype(self.shapes.dtype).itemsize
            plans = mixed.make_plans(
                rows,
                self.decode_shape(),
                self.prefill_shape(),
                num_kv_heads=self.shapes.num_kv_heads,
                kv_head_bytes=kv_head_bytes,
                causal=causal,
                **window,
            )
            return Plan(*plans)
        of_decode = decode_plan.decode_plan(self.decode_rows_of(rows, causal), self.decode_shape(), **window)
        if not self.is_mixed:
            return Plan(of_decode, None)
        of_prefill = prefill_plan.prefill_plan(rows, self.prefill_shape(), causal=causal, **window)
        return Plan(of_decode, of_prefill)


def make_plan(
    rows: Rows,
    shapes: Shapes,
    *,
    sliding_window: Int32[Array, ""] | int | None = None,
    causal: bool = True,
    limits: DeviceLimits | None = None,
) -> Plan | None:
    """Divides a step's attention, on the device; None where the number of query heads is not known.

    Args:
      rows: the step's.
      shapes: what is static; dtype is that of the pages' values.
      sliding_window: tokens a query sees, itself included.
      causal: whether a query does not see later tokens.
      limits: the device's.

    Raises:
      NotImplementedError: no kernel does this.
    """
    check_supported(
        "attention_sm90",
        head_dim=shapes.head_dim,
        v_head_dim=shapes.head_dim,
        page_size=shapes.page_size,
        q_dtype=query_dtype(shapes.dtype),
        kv_dtype=shapes.dtype,
        limits=limits,
    )
    return (
        None if shapes.num_heads is None else _Launch(shapes, limits).make_plan(rows, sliding_window, causal)
    )


def paged_attention(
    q: Float[Array, "T H D"],
    pools: Pools,
    rows: Rows,
    scores: Scores,
    *,
    max_query_len: int,
    plan: Any = None,
    limits: DeviceLimits | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"] | None]:
    """Attention of each row's queries over its own pages, and the log-sum-exp of each query's scores if asked for.

    Semantics are those of `paxcache.ops.paged_attention`. Rows must lie in the packed tokens in order.

    Raises:
      NotImplementedError: the kernels cannot do this.
    """
    (T, _, D), q_dtype = q.shape, q.dtype
    if isinstance(pools.k, QuantizedPages) and q_dtype == jnp.float32:
        q = q.astype(query_dtype(pools.k.dtype))
    check_supported(
        "attention_sm90",
        head_dim=D,
        v_head_dim=D if pools.v is None else pools.v.shape[-1],
        page_size=pools.k.shape[3],
        q_dtype=q.dtype,
        kv_dtype=pools.k.dtype,
        limits=limits,
    )
    if scores.soft_cap is not None:
        if not isinstance(scores.soft_cap, (int, float)):
            raise NotImplementedError("attention_sm90: soft_cap must be a Python number, not an array")
        scores = scores._replace(soft_cap=float(scores.soft_cap))
    launch = _Launch(shapes_of(q, pools, rows, scores, max_query_len), limits)
    if not launch.fits(plan):
        plan = launch.make_plan(rows, scores.sliding_window, scores.causal)
    if pools.v is None:
        pools = pools._replace(v=pools.k)
    rows = launch.decode_rows_of(rows, scores.causal)
    padding = launch.padded_tokens - T
    if padding:
        q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    if plan.decode.made_for.config.beside_prefill:
        out, lse = mixed.attend(
            q, pools, rows, scores, plans=(plan.decode, plan.prefill), interpret=interpret
        )
    else:
        out, lse = decode.decode(q, pools, rows, scores, plan=plan.decode, interpret=interpret)
        if launch.is_mixed:
            out, lse = prefill.prefill(
                out, lse, q, pools, rows.tables, scores, plan=plan.prefill, interpret=interpret
            )
    if padding:
        out, lse = out[:T], None if lse is None else lse[:T]
    return out.astype(q_dtype), lse
