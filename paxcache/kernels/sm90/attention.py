"""Paged attention on Hopper (sm_90a): which rows go to which kernel. Imports `_quantize`, `decode_sm90`,
`prefill_sm90`, `mixed_sm90`, their plans and what they share.

Where no row can have more than FEW_QUERIES query tokens, as in decoding, also with speculation, all go to the decode
kernel. In every other step, also in a packed one of any size, rows with a single one do, and those with more to the
prefill kernel: a step may hold any mix, which the host never reads. Both share a launch, `mixed_sm90`, where two of
decode's programs fit an SM; pages that are quantised or as wide as 256 get two launches. float32 rows with more tokens
are cut into rows of FEW_QUERIES, all for the decode kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from paxcache._quantize import QuantizedPages
from paxcache.kernels._request import FEW_QUERIES, Step, fitting, groups
from paxcache.kernels.sm90 import decode as decode_sm90
from paxcache.kernels.sm90 import decode_plan, prefill_plan
from paxcache.kernels.sm90 import mixed as mixed_sm90
from paxcache.kernels.sm90 import prefill as prefill_sm90
from paxcache.kernels.sm90._mosaic import DeviceLimits, device_limits
from paxcache.kernels.sm90.operands import check_supported, num_parts, query_dtype

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

    Rows = tuple[Int32[Array, "B M"], Int32[Array, "B"], Int32[Array, "B"], Int32[Array, "B"]]
    """Block tables, lengths, first query tokens and numbers of query tokens."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of a step for both kernels; of several plans attention takes the one that fits."""

    decode: tuple[decode_plan.Plan, ...]
    prefill: tuple[prefill_plan.Plan, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shapes(Step):
    """What the plans of a step depend on, lengths apart."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: Any  # of the pages' values
    limits: DeviceLimits | None = None

    @property
    def is_float32(self) -> bool:
        """Whether the prefill kernel takes no rows."""
        return num_parts(self.dtype) > 1

    @property
    def is_mixed(self) -> bool:
        return super().is_mixed and not self.is_float32

    @property
    def decode_query_len(self) -> int:
        return min(self.max_query_len, FEW_QUERIES) if self.is_float32 else super().decode_query_len

    @property
    def cuts_rows(self) -> bool:
        """Whether rows are cut into rows of `decode_query_len` query tokens."""
        return self.is_float32 and self.max_query_len > FEW_QUERIES

    @property
    def decode_rows(self) -> int:
        """Rows of the decode kernel: each row, and one more for each FEW_QUERIES tokens after its first."""
        return self.num_rows + self.num_tokens // FEW_QUERIES if self.cuts_rows else self.num_rows

    @property
    def padded_tokens(self) -> int:
        """Query tokens, at least a tile of the prefill kernel."""
        if not self.is_mixed:
            return self.num_tokens
        return max(self.num_tokens, prefill_plan.tile_tokens(self.num_heads, self.num_kv_heads))

    def _own_shapes(self) -> dict[str, Any]:
        return {
            "num_kv_heads": self.num_kv_heads,
            "page_size": self.page_size,
            "max_query_len": self.decode_query_len,
        }

    @functools.cached_property
    def configs(self) -> tuple[decode_plan.Config, prefill_plan.Config]:
        """Of decode and of prefill, together in a launch if they can be."""
        more = {"head_dim": self.head_dim, "dtype": self.dtype, "limits": self.limits}
        decode = decode_sm90.default_config(**self._own_shapes(), num_heads=self.num_heads, **more)
        prefill = prefill_sm90.default_config(**more)
        if not self.is_mixed:
            return decode, prefill
        group, limits = self.num_heads // self.num_kv_heads, self.limits or device_limits()
        together = mixed_sm90.configs(decode, prefill, group=group, head_dim=self.head_dim, limits=limits)
        return together or (decode, prefill)

    def for_decode(self) -> dict[str, Any]:
        return self._own_shapes() | {"config": self.configs[0]}

    def for_prefill(self) -> dict[str, Any]:
        return {
            "num_tokens": self.padded_tokens,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "min_query_len": 2,
            "config": self.configs[1],
        }

    def decode_shape(self) -> decode_plan.Shape:
        return decode_plan.plan_shape(num_rows=self.decode_rows, windowed=self.windowed, **self.for_decode())

    def prefill_shape(self) -> prefill_plan.Shape:
        return prefill_plan.plan_shape(num_rows=self.num_rows, **self.for_prefill())


def _rows_of_decode(rows: Rows, shapes: _Shapes, causal: bool) -> Rows:
    """The rows as the decode kernel gets them: a long float32 one as several, which see the same pages."""
    if not shapes.cuts_rows:
        return rows
    if shapes.windowed and not causal:
        raise NotImplementedError(
            "attention_sm90: float32 rows of more than "
            f"{FEW_QUERIES} query tokens with sliding_window must be causal, got causal=False"
        )
    tables, seq_lens, starts, lens = rows
    parts = jnp.maximum(-(-lens // FEW_QUERIES), 1)
    row, number, _ = prefill_plan.items_of_rows(parts, shapes.decode_rows)
    queries = lens[row]
    begin = jnp.minimum(number * FEW_QUERIES, queries)  # past the last: nothing
    end = jnp.minimum(begin + FEW_QUERIES, queries)
    length = seq_lens[row] - (queries - end if causal else 0)
    return tables[row], jnp.where(seq_lens[row] > 0, length, 0), starts[row] + begin, end - begin


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
    limits: DeviceLimits | None = None,
) -> Plan:
    """Divides a step's attention, on the device; without `num_heads`, for groups of several sizes.

    Args:
      block_tables: i32[B, M]; a negative entry is a hole.
      seq_lens: i32[B], with the new tokens.
      query_starts, query_lens: i32[B] a row's first query token and its number of them.
      num_tokens: query tokens, T.
      num_heads, num_kv_heads, head_dim, page_size: H, K, D, S.
      max_query_len: most query tokens of a row.
      dtype: of the pages' values.
      sliding_window: tokens a query sees, itself included.
      causal: whether a query does not see later tokens.
      limits: the device's.

    Raises:
      NotImplementedError: no kernel does this.
    """
    check_supported(
        "attention_sm90",
        head_dim=head_dim,
        v_head_dim=head_dim,
        page_size=page_size,
        q_dtype=query_dtype(dtype),
        kv_dtype=dtype,
        limits=limits,
    )
    rows = block_tables, seq_lens, query_starts, query_lens
    decode: dict[Any, decode_plan.Plan] = {}
    prefill: dict[Any, prefill_plan.Plan] = {}
    for group in groups(num_heads, num_kv_heads):
        shapes = _Shapes(
            num_rows=block_tables.shape[0],
            num_tokens=num_tokens,
            num_heads=group * num_kv_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            max_query_len=max_query_len,
            dtype=jnp.dtype(dtype),
            windowed=sliding_window is not None,
            limits=limits,
        )
        for_decode, for_prefill = shapes.for_decode(), shapes.for_prefill() if shapes.is_mixed else {}
        if for_decode["config"].beside_prefill:
            kv_head_bytes = 2 * head_dim * jnp.dtype(dtype).itemsize
            of_decode, of_prefill = mixed_sm90.make_plans(
                rows,
                for_decode,
                for_prefill,
                kv_head_bytes=kv_head_bytes,
                sliding_window=sliding_window,
                causal=causal,
            )
            decode[of_decode.made_for], prefill[of_prefill.made_for] = of_decode, of_prefill
            continue
        if shapes.decode_shape() not in decode:
            plan = decode_plan.decode_plan(
                *_rows_of_decode(rows, shapes, causal), **for_decode, sliding_window=sliding_window
            )
            decode[plan.made_for] = plan
        if shapes.is_mixed and shapes.prefill_shape() not in prefill:
            plan = prefill_plan.prefill_plan(
                *rows, **for_prefill, page_size=page_size, sliding_window=sliding_window, causal=causal
            )
            prefill[plan.made_for] = plan
    return Plan(tuple(decode.values()), tuple(prefill.values()))


def paged_attention(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "L P K S D"] | QuantizedPages,
    v_pages: Float[Array, "L P K S D"] | QuantizedPages | None,
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
    limits: DeviceLimits | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"] | None]:
    """Attention of each row's queries over its own pages, and the log-sum-exp of each query's scores if asked for.

    Semantics are those of `paxcache.ops.paged_attention`. Rows must lie in the packed tokens in order.

    Raises:
      NotImplementedError: the kernels cannot do this.
    """
    (T, H, D), (_, _, K, S, _), q_dtype = q.shape, k_pages.shape, q.dtype
    if isinstance(k_pages, QuantizedPages) and q_dtype == jnp.float32:
        q = q.astype(query_dtype(k_pages.dtype))
    check_supported(
        "attention_sm90",
        head_dim=D,
        v_head_dim=D if v_pages is None else v_pages.shape[-1],
        page_size=S,
        q_dtype=q.dtype,
        kv_dtype=k_pages.dtype,
        limits=limits,
    )
    if not (soft_cap is None or isinstance(soft_cap, (int, float))):
        raise NotImplementedError("attention_sm90: soft_cap must be a Python number, not an array")
    shapes = _Shapes(
        num_rows=block_tables.shape[0],
        num_tokens=T,
        num_heads=H,
        num_kv_heads=K,
        head_dim=D,
        page_size=S,
        max_query_len=max_query_len,
        dtype=jnp.dtype(k_pages.dtype),
        windowed=sliding_window is not None,
        limits=limits,
    )
    decode_plan = fitting(plan and plan.decode, shapes.decode_shape())
    prefill_plan = fitting(plan and plan.prefill, shapes.prefill_shape()) if shapes.is_mixed else None
    if decode_plan is None or (shapes.is_mixed and prefill_plan is None):
        own = make_plan(
            block_tables,
            seq_lens,
            query_starts,
            query_lens,
            num_tokens=T,
            num_heads=H,
            num_kv_heads=K,
            head_dim=D,
            page_size=S,
            max_query_len=max_query_len,
            dtype=k_pages.dtype,
            sliding_window=sliding_window,
            causal=causal,
            limits=limits,
        )
        decode_plan, prefill_plan = own.decode[0], own.prefill[0] if shapes.is_mixed else None
    options = {
        "sm_scale": sm_scale,
        "soft_cap": None if soft_cap is None else float(soft_cap),
        "sliding_window": sliding_window,
        "sinks": sinks,
        "causal": causal,
        "interpret": interpret,
    }
    pools = k_pages, k_pages if v_pages is None else v_pages, layer
    rows = _rows_of_decode((block_tables, seq_lens, query_starts, query_lens), shapes, causal)
    padding = shapes.padded_tokens - T
    if padding:
        q = jnp.pad(q, ((0, padding), (0, 0), (0, 0)))
    if prefill_plan is not None and prefill_plan.made_for.config.beside_decode:
        plans = {"decode_plan": decode_plan, "prefill_plan": prefill_plan}
        out, lse = mixed_sm90.attend(q, *pools, *rows, return_lse=return_lse, **plans, **options)
    else:
        out, lse = decode_sm90.decode(
            q,
            *pools,
            *rows,
            max_query_len=decode_plan.made_for.max_query_len,
            return_lse=return_lse,
            plan=decode_plan,
            config=decode_plan.made_for.config,
            **options,
        )
        if prefill_plan is not None:
            out, lse = prefill_sm90.prefill(
                out, q, *pools, block_tables, lse=lse, plan=prefill_plan, **options
            )
    if padding:
        out, lse = out[:T], None if lse is None else lse[:T]
    return out.astype(q_dtype), lse
