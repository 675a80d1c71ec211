"""The ops for Hopper GPUs (sm_90a), in Pallas Mosaic GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paxcache._quantize import QuantizedPages
from paxcache.kernels.sm90 import quantize, write
from paxcache.kernels.sm90.attention import make_plan, paged_attention
from paxcache.kernels.sm90.copy import copy_pages, gather_pages, scatter_pages

if TYPE_CHECKING:
    from jaxtyping import Array, Int

    from paxcache.kernels._request import Pools

__all__ = ["copy_pages", "gather_pages", "make_plan", "paged_attention", "scatter_pages", "write_pages"]


def write_pages(pools: Pools, k: Any, v: Any, slot_mapping: Int[Array, "T"]) -> tuple[Any, Any]:
    """Puts each token's key and value into its slot, quantised where the pages are."""
    kernel = quantize if isinstance(pools.k, QuantizedPages) else write
    return kernel.write_pages(pools, k, v, slot_mapping)
