"""The ops for NVIDIA GPUs from Ampere on, in Triton."""

from paxcache.kernels.triton.attention import make_plan, paged_attention
from paxcache.kernels.triton.copy import copy_pages, gather_pages, scatter_pages
from paxcache.kernels.triton.write import write_pages

__all__ = ["copy_pages", "gather_pages", "make_plan", "paged_attention", "scatter_pages", "write_pages"]
