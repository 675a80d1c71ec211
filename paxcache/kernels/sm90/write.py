"""Writes the K and V of new tokens into their pages, in place and in one launch. For Hopper GPUs (sm_90a).

A program moves a few consecutive tokens. Their K and V come in as one bulk copy each, while the program reads their
slots; then each token leaves as one copy of all its heads, a box of K rows that lie a page's ``S × D`` tile apart. No
thread touches the data. Programs are small and many, so that the hardware overlaps one's loads with another's stores.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paxcache.kernels._request import Pools
from paxcache.kernels.sm90._mosaic import (
    BOX_ALIGNMENT,
    COPY_DTYPES,
    DeviceLimits,
    device_limits,
    in_place,
    pl,
    plgpu,
    require_hopper,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Shaped

MAX_BOX = 256  # elements along one axis of a strided copy
ALIGNMENT = 16  # bytes: addresses and lengths of bulk copies, rows of strided ones
SMEM_ALIGNMENT = 1024  # bytes: Mosaic's, for each buffer
BLOCK_BYTES = 8192
MAX_BLOCK_TOKENS = 8
PROGRAMS_PER_SM = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The launch configuration of `write_pages`."""

    block_tokens: int
    """Tokens of one program."""


def default_config(num_tokens: int, token_bytes: int, limits: DeviceLimits) -> Config:
    """Blocks of about 8 KB of K and V: 16 programs of one warpgroup fill an SM and keep 128 KB in flight.

    Smaller blocks where there are too few tokens for four programs an SM: the time is then the latency of one block.
    More than 8 tokens a program gain nothing, because one thread issues their stores.
    """
    spread = pl.cdiv(num_tokens, PROGRAMS_PER_SM * limits.num_sms)
    return Config(block_tokens=max(1, min(BLOCK_BYTES // token_bytes, MAX_BLOCK_TOKENS, spread)))


def check_supported(pools: Pools, config: Config | None = None, limits: DeviceLimits | None = None) -> None:
    """Raises NotImplementedError, with the reason, where `write_pages` cannot do the case."""
    config = config or Config(block_tokens=1)
    limits = limits or device_limits()
    require_hopper(limits)
    _, P, K, S, _ = pools.k.shape
    for pages in pools.arrays:
        D = pages.shape[-1]
        if pages.dtype.name not in COPY_DTYPES:
            raise NotImplementedError(f"pages of {pages.dtype.name}: the kernel writes {sorted(COPY_DTYPES)}")
        if D * pages.dtype.itemsize % ALIGNMENT:
            raise NotImplementedError(
                f"rows of {D} {pages.dtype.name}: the copy engine needs a multiple of {ALIGNMENT} bytes"
            )
        if max(K, config.block_tokens) > MAX_BOX:
            raise NotImplementedError(f"{K} KV heads: the copy engine takes at most {MAX_BOX}")
    num_slots = P * S
    if num_slots > np.iinfo(np.int32).max:
        raise NotImplementedError(f"{num_slots} slots: the kernel counts them in int32")
    smem = _smem_bytes(pools.arrays, config.block_tokens)
    if smem > limits.smem_bytes_per_block:
        raise NotImplementedError(
            f"{smem} bytes of shared memory for {config.block_tokens} tokens: an SM has {limits.smem_bytes_per_block}"
        )


def _columns(width: int, dtype: Any) -> tuple[int, int]:
    """Cuts a row into (number, length) of columns that a box can hold."""
    for number in range(1, MAX_BOX + 1):
        length, rest = divmod(width, number)
        if not rest and length <= MAX_BOX and length * dtype.itemsize % ALIGNMENT == 0:
            return number, length
    raise NotImplementedError(f"rows of {width} {dtype.name}: no part of them fits a box of the copy engine")


def _buffers(pools: Sequence[Any], block_tokens: int) -> list[tuple[tuple[int, ...], Any]]:
    """Shape and dtype of the shared-memory buffer of K and of V: a block's tokens as they lie in global memory."""
    buffers = []
    for pages in pools:
        K, D = pages.shape[2], pages.shape[4]
        number, length = _columns(D, pages.dtype)
        row = (D,) if number == 1 else (number, length)
        buffers.append(((block_tokens, K, *row), pages.dtype))
    return buffers


def _smem_bytes(pools: Sequence[Any], block_tokens: int) -> int:
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in _buffers(pools, block_tokens)]
    return sum(pl.cdiv(size, SMEM_ALIGNMENT) * SMEM_ALIGNMENT for size in [*sizes, 8])


def _kernel(slots_ref, layer_ref, *refs, num_layers: int, num_pages: int, page_size: int) -> None:
    """One program: tokens [first, first + block_tokens), the last program's cut at the number of tokens."""
    *refs, loaded = refs
    num_arrays = len(refs) // 3
    token_refs, page_refs, buffers = (refs[i * num_arrays : (i + 1) * num_arrays] for i in range(3))
    num_tokens = slots_ref.shape[0]
    block_tokens, K = buffers[0].shape[:2]
    # The last program moves back so that its loads stay in bounds, and leaves out the tokens of the one before.
    first = lax.axis_index("block") * block_tokens
    start = jnp.minimum(first, num_tokens - block_tokens)

    def load_tokens():
        for tokens, buffer in zip(token_refs, buffers, strict=True):
            source = tokens.at[pl.ds(start, block_tokens)]
            plgpu.copy_gmem_to_smem(source, buffer, loaded, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

    def store_token(i, slot, layer):
        slot = slot.astype(jnp.int32)
        page = layer * num_pages + lax.div(slot, np.int32(page_size))
        offset = lax.rem(slot, np.int32(page_size))
        for pages, buffer in zip(page_refs, buffers, strict=True):
            token_bytes = math.prod(buffer.shape[1:]) * buffer.dtype.itemsize
            if K == 1 or token_bytes % BOX_ALIGNMENT == 0:
                plgpu.copy_smem_to_gmem(buffer.at[i], pages.at[page, :, offset], commit_group=False)
            else:  # tokens that no box may start at: head by head, each a bulk copy
                for h in range(K):
                    plgpu.copy_smem_to_gmem(buffer.at[i, h], pages.at[page, h, offset], commit_group=False)

    load_tokens()
    layer = layer_ref[0]
    slots = [slots_ref[start + i] for i in range(block_tokens)]
    # The copy engine arrives once for each of K and V, every thread waits: below, the buffers hold the tokens.
    plgpu.barrier_wait(loaded)
    for i, slot in enumerate(slots):
        in_pool = (slot >= 0) & (slot < num_pages * page_size) & (layer >= 0) & (layer < num_layers)

        @pl.when(in_pool & (start + i >= first))
        def _(i=i, slot=slot):
            store_token(i, slot, layer)

    plgpu.commit_smem_to_gmem_group()
    # Shared memory goes to the next program when this one ends: the copy engine must have read it. The writes
    # themselves are complete at the end of the launch.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def write_pages(
    pools: Pools,
    k: Shaped[Array, "T K D"],
    v: Shaped[Array, "T K Dv"] | None,
    slot_mapping: Int[Array, "T"],
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Array, Array | None]:
    """Puts each token's K and V into its slot, in place where the pages are donated or carried by a loop.

    Args:
      pools: of all layers; nothing is written where the layer is outside [0, L).
      k, v: new tokens; another dtype is converted first.
      slot_mapping: i32[T] or i64[T]; tokens with a slot outside [0, P * S) are dropped. No slot may stand twice.
      config: None: `default_config`.
      interpret: see `_mosaic.interpreter`.

    Returns:
      The pools with the tokens in them.

    Raises:
      NotImplementedError: a dtype, head dim or size that the copy engine cannot move.
    """
    limits, num_tokens = device_limits(), k.shape[0]
    if num_tokens == 0:
        return pools.k, pools.v
    check_supported(pools, config, limits)
    if config is None:
        token_bytes = sum(p.shape[2] * p.shape[4] * p.dtype.itemsize for p in pools.arrays)
        config = default_config(num_tokens, token_bytes, limits)
    tokens = [k] if v is None else [k, v]
    layer = jnp.asarray(pools.layer, jnp.int32)
    if slot_mapping.dtype not in (jnp.int32, jnp.int64):
        slot_mapping = slot_mapping.astype(jnp.int32)
    written = _write(pools.arrays, tokens, slot_mapping, layer, config=config, interpret=interpret)
    return written[0], written[1] if len(written) > 1 else None


# Under jit of its own, so that all layers of a model share one lowered kernel, and one compilation.
@functools.partial(jax.jit, static_argnames=("config", "interpret"), inline=False)
def _write(pools, tokens, slots, layer, *, config, interpret):
    L, P, _, S, _ = pools[0].shape
    if not 1 <= config.block_tokens <= slots.shape[0]:
        raise ValueError(f"config: block_tokens must be in [1, {slots.shape[0]}], got {config.block_tokens}")
    buffers = _buffers(pools, config.block_tokens)
    rows = [shape[2:] for shape, _ in buffers]
    tokens = [
        t.astype(p.dtype).reshape(*t.shape[:2], *row) for p, t, row in zip(pools, tokens, rows, strict=True)
    ]
    views = [p.reshape(L * P, *p.shape[2:4], *row) for p, row in zip(pools, rows, strict=True)]
    launch = plgpu.kernel(
        functools.partial(_kernel, num_layers=L, num_pages=P, page_size=S),
        out_type=(),
        grid=(pl.cdiv(slots.shape[0], config.block_tokens),),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM(*b) for b in buffers] + [plgpu.Barrier(num_arrivals=len(pools))],
        # No shared memory is both read and written by threads, so Pallas need not order their accesses.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="paxcache_write",
        interpret=interpret,
    )
    views = in_place(functools.partial(launch, slots, layer.reshape(1), *tokens), views)
    return [view.reshape(p.shape) for view, p in zip(views, pools, strict=True)]
