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
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def output_padding(self) -> int:
        """Rows that a consumer's output by rows has beyond its own, so that it can begin one row down."""
        return 0 if self.head_dim * self.dtype.itemsize % BOX_ALIGNMENT == 0 else 2

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


def scratch_of(case: Case) -> dict[str, Any]:
    """The shared memory of a program."""
    D, chunk, config, dtype, form = case.head_dim, case.chunk, case.config, case.dtype, case.form
    copies = config.block_kv // case.copy_len
    tiles = matrix_tiles(D * dtype.itemsize, dtype)
    by_columns = (CONSUMERS, D // chunk, ROWS, chunk)
    tiled = plgpu.SMEM(by_columns, dtype, transforms=tiles)
    untiled = plgpu.SMEM(by_columns, dtype, transforms=tiles[1:])
    by_rows = plgpu.SMEM((CONSUMERS, ROWS + case.output_padding, D), dtype)
    if case.interpret is not None:
        shared: dict[str, Any] = {"queries": tiled, "output": (by_rows, tiled)}
    elif config.output_over_queries:
        shared = {"queries_and_output": plgpu.RefUnion(tiled, untiled, by_rows, tiled, untiled)}
    else:
        shared = {
            "queries": plgpu.RefUnion(tiled, untiled),
            "output": plgpu.RefUnion(by_rows, tiled, untiled),
        }
    arrivals = copies
    if form is not None:
        arrivals, stages = 1, config.raw_stages
        row = D // form.per_element
        transforms = matrix_tiles(row * case.kv_dtype.itemsize, case.kv_dtype)
        for name in "kv":
            shared[f"raw_{name}_s"] = plgpu.SMEM(
                (stages, config.block_kv, row), case.kv_dtype, transforms=transforms
            )
            if case.token_scales:
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


def default_config(*, head_dim: int, dtype: Any, limits: DeviceLimits | None = None) -> Config:
    """Blocks as long as the registers allow, and as many stages as fit, output apart from queries if it can be."""
    limits, dtype = device_limits() if limits is None else limits, jnp.dtype(dtype)
    form, itemsize = _quantize.BY_DTYPE.get(dtype), 2  # halves are what is multiplied
    # Converting takes registers from the consumers.
    block_kv = 128 if head_dim <= 128 and form is None else 64
    rows = CONSUMERS * ROWS * head_dim * itemsize
    stage = block_kv * head_dim * itemsize
    slack = 2048 if form is None else 4096  # what is not counted takes less
    room = limits.smem_bytes_per_block - slack - rows
    raw_stages = 0
    if form is not None:
        raw = 2 * block_kv * (head_dim // form.per_element)
        raw_stages = 2 if room - 2 * raw >= 4 * stage else 1
        room -= raw_stages * raw
    apart = room - rows >= 4 * stage
    stages = min(8, (room - rows if apart else room) // stage)
    return Config(
        num_programs=limits.num_sms,
        block_kv=block_kv,
        key_stages=stages // 2,
        value_stages=stages // 2,  # one more gains nothing
        output_over_queries=not apart,
        raw_stages=raw_stages,
    )
