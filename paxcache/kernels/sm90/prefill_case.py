"""A launch of prefill on Hopper (sm_90a): shapes, shared memory, configuration. Knows sizes, no arrays."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from paxcache import _quantize
from paxcache.kernels.sm90._mosaic import (
    BOX_ALIGNMENT,
    THREADS,
    DeviceLimits,
    device_limits,
    matrix_tiles,
    plgpu,
)
from paxcache.kernels.sm90.prefill_plan import CONSUMERS, ROWS, Config, heads_of_program

SCALES = ("k_scales", "v_scales")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is static in a call."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_pages: int
    num_pages: int
    dtype: Any
    kv_dtype: Any  # of the pages' values
    token_scales: bool  # quantised pages: whether each token has scales, or each layer
    causal: bool
    windowed: bool
    soft_cap: float | None
    has_sinks: bool
    return_lse: bool
    config: Config
    interpret: Any

    @property
    def form(self) -> _quantize.Format | None:
        """Of quantised pages."""
        return _quantize.BY_DTYPE.get(self.kv_dtype)

    @property
    def heads(self) -> int:
        """Query heads of a program."""
        return heads_of_program(self.num_heads // self.num_kv_heads)

    @property
    def head_items(self) -> int:
        """Items of a tile."""
        return self.num_heads // self.heads

    @property
    def chunk(self) -> int:
        """Columns of a swizzled row."""
        return _chunk(self.head_dim)

    @property
    def registers(self) -> tuple[int, int]:
        """Of a consumer's thread and of a producer's, which holds the page of each of its copies, or converts."""
        if self.form is not None:
            return 208, 88
        few_copies = self.config.block_kv // self.copy_len <= 8
        return (240, 24) if few_copies and self.head_dim > 192 else (232, 40)

    @property
    def copy_len(self) -> int:
        """Tokens of one copy."""
        return math.gcd(self.page_size, self.config.block_kv)


def _scratch(
    *,
    head_dim: int,
    dtype: Any,
    kv_dtype: Any,
    copy_len: int,
    token_scales: bool,
    config: Config,
    interpreted: bool = False,
) -> dict[str, Any]:
    """The shared memory of a program."""
    D, form, chunk = head_dim, _quantize.BY_DTYPE.get(kv_dtype), _chunk(head_dim)
    copies = config.block_kv // copy_len
    tiles = matrix_tiles(D * dtype.itemsize, dtype)
    by_columns = (CONSUMERS, D // chunk, ROWS, chunk)
    tiled = plgpu.SMEM(by_columns, dtype, transforms=tiles)
    untiled = plgpu.SMEM(by_columns, dtype, transforms=tiles[1:])
    # A consumer's part is of one size in all of its forms: the two write when they like.
    blocks = _blocks_of_output(D)
    by_rows = plgpu.SMEM((CONSUMERS, blocks * ROWS, D), dtype)
    by_columns = (CONSUMERS, blocks * D // chunk, ROWS, chunk)
    out_tiled = plgpu.SMEM(by_columns, dtype, transforms=tiles)
    out_untiled = plgpu.SMEM(by_columns, dtype, transforms=tiles[1:])
    if interpreted:
        shared: dict[str, Any] = {"queries": tiled, "output": (by_rows, out_tiled)}
    elif config.output_over_queries:
        shared = {"queries_and_output": plgpu.RefUnion(tiled, untiled, by_rows, out_tiled, out_untiled)}
    else:
        shared = {
            "queries": plgpu.RefUnion(tiled, untiled),
            "output": plgpu.RefUnion(by_rows, out_tiled, out_untiled),
        }
    arrivals = copies
    if form is not None:
        arrivals, stages = 1, config.raw_stages
        row = D // form.per_element
        transforms = matrix_tiles(row * kv_dtype.itemsize, kv_dtype)
        for name in "kv":
            shared[f"raw_{name}_s"] = plgpu.SMEM(
                (stages, config.block_kv, row), kv_dtype, transforms=transforms
            )
            if token_scales:
                shared[f"{name}_scales"] = plgpu.SMEM((THREADS,), jnp.float32)
            shared[f"raw_{name}_full"] = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    return shared | {
        "k_s": plgpu.SMEM((config.key_stages, config.block_kv, D), dtype, transforms=tiles),
        "v_s": plgpu.SMEM((config.value_stages, config.block_kv, D), dtype, transforms=tiles),
        "q_full": plgpu.Barrier(num_arrivals=D // chunk, num_barriers=CONSUMERS),
        "k_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.key_stages),
        "v_full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=config.value_stages),
        "q_free": plgpu.Barrier(num_barriers=CONSUMERS),
        "k_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.key_stages),
        "v_free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.value_stages),
        "turn": plgpu.Barrier(num_barriers=CONSUMERS),
        "cleaned": plgpu.Barrier(num_barriers=config.value_stages),
    }


def _smem_bytes(scratch: dict[str, Any]) -> int:
    """An upper estimate: every buffer rounded up to 1 KB, the alignment of swizzled ones; barriers together 2 KB."""

    def size(x):
        if isinstance(x, plgpu.RefUnion):
            return max(map(size, x.refs))
        return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize if hasattr(x, "dtype") else 0

    return sum(-(-size(x) // 1024) * 1024 for x in scratch.values()) + 2048


def scratch_of(case: Case) -> dict[str, Any]:
    """The shared memory of a program."""
    return _scratch(
        head_dim=case.head_dim,
        dtype=case.dtype,
        kv_dtype=case.kv_dtype,
        copy_len=case.copy_len,
        token_scales=case.token_scales,
        config=case.config,
        interpreted=case.interpret is not None,
    )


def default_config(*, head_dim: int, dtype: Any, limits: DeviceLimits | None = None) -> Config:
    """Blocks as long as the registers allow, and as many stages as fit, output apart from queries if it can be."""
    limits, dtype = device_limits() if limits is None else limits, jnp.dtype(dtype)
    is_quantized = dtype in _quantize.BY_DTYPE
    # Converting takes registers from the consumers.
    block_kv = 128 if head_dim <= 128 and not is_quantized else 64

    def config(stages: int, raw_stages: int, output_over_queries: bool) -> Config:
        return Config(
            num_programs=limits.num_sms,
            block_kv=block_kv,
            key_stages=stages,
            value_stages=stages,  # one more gains nothing
            output_over_queries=output_over_queries,
            raw_stages=raw_stages,
        )

    def fits(*sizes: Any) -> bool:
        half = jnp.dtype(jnp.bfloat16)  # what is multiplied, or another of two bytes
        shape = {"head_dim": head_dim, "dtype": half, "kv_dtype": dtype if is_quantized else half}
        made = _scratch(**shape, copy_len=block_kv, token_scales=is_quantized, config=config(*sizes))
        return _smem_bytes(made) <= limits.smem_bytes_per_block

    raw_stages = 0
    if is_quantized:
        raw_stages = 2 if fits(2, 2, True) else 1
    over_queries = not fits(2, raw_stages, False)
    stages = max(n for n in range(1, 5) if n == 1 or fits(n, raw_stages, over_queries))
    return config(stages, raw_stages, over_queries)


def _chunk(head_dim: int) -> int:
    """Columns of a swizzled row."""
    return 64 if head_dim % 64 == 0 else 32


def _blocks_of_output(head_dim: int) -> int:
    """Blocks of `ROWS` that a consumer has room for: one more where its rows may have to stand one row down.

    The copy engine reads shared memory from multiples of 128 bytes, and a row of head dim 96 has 192.
    """
    return 1 if 2 * head_dim % BOX_ALIGNMENT == 0 else 2
