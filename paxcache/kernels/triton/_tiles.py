"""What the Triton attention kernels share: pages as tiles, stored formats, scores.

A kernel multiplies *columns* of queries (some query tokens with the heads that share a KV head) with tiles of keys.
Widths are padded to powers of two. Quantised values are decoded to the dtype of the products, which is exact, and
their scales multiply scores and weights.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from paxcache._quantize import FORMATS, QuantizedPages
from paxcache.kernels._request import Pools
from paxcache.kernels.triton._triton import Limits, as_bytes, constant, jit, next_power_of_2, tl

LOG2E = constant(1.4426950408889634)  # exp(x) is exp2(LOG2E * x), which the hardware has
LN2 = constant(0.6931471805599453)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What is static about queries and pages."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_size: int
    form: str
    """How pages are stored: "plain", or a name of `_quantize.FORMATS`."""
    per_token: bool
    """Whether each token and head of quantised pages has a scale, or each page."""
    keys_are_values: bool
    q_dtype: Any
    kv_dtype: Any

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def products(self) -> Any:
        """The dtype that the matrix unit multiplies."""
        return self.q_dtype if self.form != "plain" else jnp.promote_types(self.q_dtype, self.kv_dtype)

    @property
    def pad(self) -> int:
        """Columns of a tile of keys."""
        return self._padded(self.head_dim)

    @property
    def v_pad(self) -> int:
        """Columns of a tile of values."""
        return self._padded(self.v_head_dim)

    @property
    def token_bytes(self) -> int:
        """Shared memory that a key and a value take."""
        widths = self.pad + (0 if self.keys_are_values else self.v_pad)
        return widths // self._per_element * jnp.dtype(self.kv_dtype).itemsize

    @property
    def _per_element(self) -> int:
        return 1 if self.form == "plain" else FORMATS[self.form].per_element

    def _padded(self, width: int) -> int:
        return self._per_element * max(16, next_power_of_2(width // self._per_element))

    def constants(self, limits: Limits) -> dict[str, Any]:
        """What every attention kernel is compiled for."""
        products = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
        return {
            "KV_HEADS": self.num_kv_heads,
            "GROUP": self.group,
            "D": self.head_dim,
            "DV": self.v_head_dim,
            "PAD": self.pad,
            "V_PAD": self.v_pad,
            "S": self.page_size,
            "FORM": self.form,
            "PER_TOKEN": self.per_token,
            "KEYS_ARE_VALUES": self.keys_are_values,
            "PRODUCTS": products[jnp.dtype(self.products).name],
            "HARDWARE_FP8": limits.has_fp8,
        }


def shape_of(q: Any, pools: Pools) -> Shape:
    """The shape of a call.

    Raises:
      NotImplementedError: the kernels do not take such dtypes.
    """
    k_pages, v_pages, _ = pools
    K, S, D = k_pages.shape[2:]
    form, per_token = "plain", False
    if isinstance(k_pages, QuantizedPages):
        form, per_token = k_pages.form.name, k_pages.per_token
        if v_pages is not None and v_pages.scales.shape != k_pages.scales.shape:
            raise NotImplementedError("triton: scales of keys and of values must be of one kind")
    for name, dtype in {"queries": q.dtype, "pages": k_pages.dtype if form == "plain" else q.dtype}.items():
        if jnp.dtype(dtype).name not in ("float32", "float16", "bfloat16"):
            raise NotImplementedError(f"triton: {name} must be float32, float16 or bfloat16, got {dtype}")
    return Shape(
        num_heads=q.shape[1],
        num_kv_heads=K,
        head_dim=D,
        v_head_dim=D if v_pages is None else v_pages.shape[-1],
        page_size=S,
        form=form,
        per_token=per_token,
        keys_are_values=v_pages is None,
        q_dtype=jnp.dtype(q.dtype),
        kv_dtype=jnp.dtype(k_pages.dtype),
    )


def pool_inputs(pools: Pools) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The four operands every kernel takes, keys, values and their scales; a missing one is a dummy never read."""
    k_pages, v_pages, _ = pools
    values = k_pages if v_pages is None else v_pages
    if not isinstance(k_pages, QuantizedPages):
        return k_pages, values, k_pages, values
    return as_bytes(k_pages.values), as_bytes(values.values), k_pages.scales, values.scales


@jit
def numbers_of(PAD: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr):
    """Which of a row's numbers each column of a decoded tile holds; WIDTH or more: none."""
    column = tl.arange(0, PAD)
    if FORM == "int4":  # bytes are taken apart where they lie, so that their two numbers are neighbours
        byte = column // 2
        return tl.where(byte < WIDTH // 2, (column % 2) * (WIDTH // 2) + byte, WIDTH)
    else:
        return column


@jit
def load_tile(
    pool,
    slots,
    present,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    FORM: tl.constexpr,
    PRODUCTS: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys or values in slots [N] of the pool as numbers [N, PAD]; zeros where not present, whatever lies there.

    `slots` counts slots of single heads from the beginning of the pool. Without MASKED all are present.
    """
    PER_BYTE: tl.constexpr = tl.constexpr(2 if FORM == "int4" else 1)
    STORED: tl.constexpr = WIDTH // PER_BYTE
    column = tl.arange(0, PAD // PER_BYTE)
    pointers = pool + slots[:, None] * STORED + column[None, :]
    inside = column[None, :] < STORED
    if MASKED:
        raw = tl.load(pointers, mask=present[:, None] & inside, other=0)
    elif STORED * PER_BYTE == PAD:
        raw = tl.load(pointers)
    else:
        raw = tl.load(pointers, mask=inside, other=0)

    if FORM == "fp8_e5m2":  # the upper half of a float16
        return (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(PRODUCTS)
    elif FORM == "fp8_e4m3":
        if HARDWARE_FP8:
            return raw.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(PRODUCTS)
        else:  # a float16 with the exponent's bias of 7 instead of 15
            bits = raw.to(tl.uint16)
            half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
            return tl.where((bits & 0x7F) == 0x7F, float("nan"), half * 256.0).to(PRODUCTS)
    elif FORM == "int4":
        # In the last bits of a power of two, whose last place is 1, stands the number plus 8.
        bits = raw.to(tl.uint16)
        if tl.bfloat16 == PRODUCTS:
            low, high = (bits & 0xF) ^ 0x4308, (bits >> 4) ^ 0x4308
            low, high = low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True)
            return tl.interleave(low - 136.0, high - 136.0)
        else:
            low, high = (bits & 0xF) ^ 0x6408, (bits >> 4) ^ 0x6408
            low, high = low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True)
            return tl.interleave(low - 1032.0, high - 1032.0).to(PRODUCTS)
    else:
        return raw.to(PRODUCTS)


@jit
def product(a, b):
    """A matrix product in float32, of float32 numbers to float32's precision (three products of TF32)."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@jit
def capped(s, cap):
    """``cap * tanh(s / cap)`` for scores in units of log2."""
    cap = cap * LOG2E
    return cap - 2 * cap / (tl.exp2(s * (2 * LOG2E / cap)) + 1)


@jit
def finite(m):
    """A maximum that may be taken off: 0 where nothing is seen, so that no difference is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@jit
def finished(acc, m, l, sink, HAS_SINKS: tl.constexpr):
    """Output [M, N] and log-sum-exp [M] of sums, maxima (in units of log2) and denominators; zeros of nothing."""
    if HAS_SINKS:
        sink = sink * LOG2E
        m_all = finite(tl.maximum(m, sink))
        weight = tl.exp2(m - m_all)
        acc = acc * weight[:, None]
        l = l * weight + tl.exp2(sink - m_all)
        m = m_all
    some = l > 0
    safe = tl.where(some, l, 1.0)
    lse = tl.where(some, (m + tl.log2(safe)) * LN2, float("-inf"))
    return acc / safe[:, None], lse
