"""What the Hopper attention kernels share. Imports `_quantize`, `_mosaic` and JAX."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from paxcache import _quantize
from paxcache.kernels.sm90._mosaic import DeviceLimits, device_limits, require_hopper
from paxcache.kernels.sm90.inline.matrices import reciprocal

LOG2E = math.log2(math.e)  # exp(x) is exp2(LOG2E * x), which the hardware has
_HALF = (jnp.bfloat16, jnp.float16)
_PARTS = 3  # bfloat16 numbers that make a float32


def check_supported(
    kernel: str,
    *,
    head_dim: int,
    v_head_dim: int,
    page_size: int,
    q_dtype: Any,
    kv_dtype: Any,
    limits: DeviceLimits | None = None,
) -> None:
    """Raises NotImplementedError, naming the kernel and the reason, for a case that it cannot do.

    Args:
      kernel: its name.
      head_dim, v_head_dim: D of the keys and of the values.
      page_size: S.
      q_dtype, kv_dtype: of the queries and of the pages; that of the stored values where these are quantised.
      limits: the device's.
    """
    limits = device_limits() if limits is None else limits
    q_dtype, kv_dtype = jnp.dtype(q_dtype), jnp.dtype(kv_dtype)

    def refuse(reason: str) -> None:
        raise NotImplementedError(f"{kernel}: {reason}")

    require_hopper(limits, f"{kernel}: ")
    form = _quantize.BY_DTYPE.get(kv_dtype)
    if form is None and kv_dtype not in (*_HALF, jnp.float32):
        refuse(f"pages must be bfloat16, float16, float32 or quantised, got {kv_dtype}")
    if form is None and q_dtype != kv_dtype:
        refuse(f"queries and pages must share a dtype, got {q_dtype} and {kv_dtype}")
    if form is not None and q_dtype not in _HALF:
        refuse(f"queries of quantised pages must be bfloat16 or float16, got {q_dtype}")
    if head_dim != v_head_dim:
        refuse(f"keys and values must be of one width, got {head_dim} and {v_head_dim}")
    if head_dim not in (64, 96, 128, 192, 256):
        refuse(f"head_dim must be 64, 96, 128, 192 or 256, got {head_dim}")
    if form is not None and form.per_element > 1 and head_dim % 128:
        refuse(f"head_dim must be a multiple of 128 for pages of two values a byte, got {head_dim}")
    if page_size % 8:
        refuse(f"page_size must be a multiple of 8, got {page_size}")


def query_dtype(kv_dtype: Any) -> Any:
    """Of the queries of pages of a dtype: theirs, or float16 where these are quantised."""
    kv_dtype = jnp.dtype(kv_dtype)
    return jnp.dtype(jnp.float16) if kv_dtype in _quantize.BY_DTYPE else kv_dtype


def operand_dtype(kv_dtype: Any) -> Any:
    """What the matrix unit gets of pages of a dtype: float16 of quantised ones, exact before their scales; bfloat16 of
    float32, `num_parts` numbers of each."""
    return jnp.dtype(jnp.bfloat16) if num_parts(kv_dtype) > 1 else query_dtype(kv_dtype)


def num_parts(kv_dtype: Any) -> int:
    """Numbers of the matrix unit that one of a dtype becomes."""
    return _PARTS if jnp.dtype(kv_dtype) == jnp.float32 else 1


def parts_of(x: Any, kv_dtype: Any) -> list[Any]:
    """Keys, values, queries or weights as the matrix unit multiplies them for pages of a dtype: `num_parts` arrays,
    each the rounded rest of those before, with the sum `x`."""
    operand, parts = operand_dtype(kv_dtype), []
    for _ in range(num_parts(kv_dtype) - 1):
        parts.append(x.astype(operand))
        x = x - parts[-1].astype(x.dtype)
    return [*parts, x.astype(operand)]


def soft_cap(x: Any, cap: float, *, interpreted: bool) -> Any:
    """``cap * tanh(x / cap)`` for x in units of log2, to float32's precision; the hardware's own tanh has 11 bits."""
    cap *= LOG2E
    return cap - (2 * cap) * reciprocal(jnp.exp2(x * (2 * LOG2E / cap)) + 1, interpreted=interpreted)
