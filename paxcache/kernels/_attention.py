"""What the Hopper attention kernels share. Imports `_mosaic` and JAX."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp

from paxcache.kernels._mosaic import DeviceLimits, device_limits

LOG2E = math.log2(math.e)  # exp(x) is exp2(LOG2E * x), which the hardware has


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
      q_dtype, kv_dtype: of the queries and of the pages.
      limits: the device's.
    """
    limits = device_limits() if limits is None else limits
    q_dtype, kv_dtype = jnp.dtype(q_dtype), jnp.dtype(kv_dtype)

    def refuse(reason: str) -> None:
        raise NotImplementedError(f"{kernel}: {reason}")

    if limits.compute_capability[0] != 9:
        major, minor = limits.compute_capability
        refuse(f"needs a Hopper GPU (compute capability 9.0), this one has {major}.{minor}")
    if kv_dtype not in (jnp.bfloat16, jnp.float16):
        refuse(f"pages must be bfloat16 or float16, got {kv_dtype}")
    if q_dtype != kv_dtype:
        refuse(f"queries and pages must share a dtype, got {q_dtype} and {kv_dtype}")
    if head_dim != v_head_dim:
        refuse(f"keys and values must be of one width, got {head_dim} and {v_head_dim}")
    if head_dim not in (64, 96, 128, 192, 256):
        refuse(f"head_dim must be 64, 96, 128, 192 or 256, got {head_dim}")
    if page_size % 8:
        refuse(f"page_size must be a multiple of 8, got {page_size}")


def soft_cap(x: Any, cap: float) -> Any:
    """``cap * tanh(x / cap)`` for x in units of log2, to float32's precision; the hardware's own tanh has 11 bits."""
    cap *= LOG2E
    return cap - (2 * cap) / (jnp.exp2(x * (2 * LOG2E / cap)) + 1)
