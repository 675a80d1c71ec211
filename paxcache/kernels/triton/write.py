"""Writes the K and V of new tokens into their pages, in place, in Triton (Ampere and later).

A program moves some *rows* of K or of V, each one head of one token: contiguous where they come from and where they go.
It asks for their numbers before it looks where they go: with few tokens the time is that of one chain of loads.
Quantised pages get their values and, where each token and head has one, its scale in the same pass.

Reference: the slot mapping of vLLM's reshape_and_cache.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache._quantize import QuantizedPages
from paxcache.kernels._request import Pools
from paxcache.kernels.triton._triton import (
    Limits,
    as_bytes,
    call,
    constant,
    device_limits,
    from_bytes,
    jit,
    next_power_of_2,
    scalar,
    tl,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Shaped

NUM_WARPS = 4
MIN_NUMBERS = 1024  # of a program: 16 bytes a thread in half precision
MAX_NUMBERS = 4096
PROGRAMS_PER_SM = 16  # that it holds at once, of so many warps
TINY = constant(float(np.finfo(np.float32).tiny))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The launch configuration of `write_pages`."""

    rows: int
    """Rows of a program, a power of two."""
    num_warps: int = NUM_WARPS


def default_config(num_rows: int, width: int, limits: Limits) -> Config:
    """Programs that all run at once where they can, of a thread's widest access at least and four of them at most."""
    spread = next_power_of_2(-(-num_rows // (PROGRAMS_PER_SM * limits.num_sms)))
    return Config(rows=max(1, MIN_NUMBERS // width, min(MAX_NUMBERS // width, spread)))


@jit
def _float8_bits(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Float8 bits of float32 numbers [R, N] in the format's range: nearest, ties to even.

    In integers: not every GPU has an instruction for it, and one by way of float16 would round twice.
    """
    DROPPED: tl.constexpr = 23 - MANTISSA
    HALF: tl.constexpr = tl.constexpr(1) << (DROPPED - 1)  # of the last place that stays
    bits = x.to(tl.int32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    # A half, less one unless the last place is odd, carries as rounding does.
    odd = (magnitude >> DROPPED) & 1
    normal = ((magnitude + (HALF - 1) + odd) >> DROPPED) - ((127 - BIAS) << MANTISSA)
    # Below its normal numbers float8 is fixed point: next to this power of two float32 has the same last place.
    power = tl.full([1, 1], (127 + 24 - MANTISSA - BIAS) << 23, tl.int32)
    near_power = magnitude.to(tl.float32, bitcast=True) + power.to(tl.float32, bitcast=True)
    fixed = near_power.to(tl.int32, bitcast=True) - power
    return sign | tl.where(magnitude < ((128 - BIAS) << 23), fixed, normal)


@jit
def _largest(x):
    """The largest finite magnitude of each row of x [R, N]."""
    magnitude = tl.abs(x)
    return tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), 1)


@jit
def _reciprocal(x):
    """1 / x by the instruction that XLA makes of it, which is approximate: both write the same values."""
    return tl.inline_asm_elementwise(
        "rcp.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@jit
def _stored(x, scale, FORM: tl.constexpr, LARGEST: tl.constexpr):
    """Numbers [R, N] as `_quantize.encode` stores them with scales [R]; int4 ones not yet two to a byte."""
    inverse = _reciprocal(tl.where(scale > 0, scale, 1.0))
    is_nan = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000
    y = tl.where((scale[:, None] > 0) & (is_nan == 0), x * inverse[:, None], 0.0)
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    if FORM == "fp8_e4m3":
        return tl.where(is_nan, 0x7F, _float8_bits(y, 3, 7))
    elif FORM == "fp8_e5m2":
        return tl.where(is_nan, 0x7E, _float8_bits(y, 2, 15))
    else:  # next to this number float32 has no fractions, and rounds ties to even
        return ((y + 12582912.0) - 12582912.0).to(tl.int32)


@jit
def _write_rows(
    tokens,
    row,
    slot,
    at,
    num_tokens,
    num_layers,
    num_pages,
    scales_in,
    pool,
    scales,
    KV_HEADS: tl.constexpr,
    S: tl.constexpr,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    FORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    LARGEST: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):
    """Moves rows [R] of `tokens`, of which `slot` are the slots, into layer `at` of the pool."""
    if FORM == "int4":  # the halves of a row share bytes
        STORED: tl.constexpr = WIDTH // 2
    else:
        STORED: tl.constexpr = WIDTH
    token, head = row // KV_HEADS, row % KV_HEADS
    column = tl.arange(0, PAD)[None, :]
    # Whether a slot is outside is not known yet: numbers must not wait for it.
    inside = (token < num_tokens)[:, None] & (column < STORED)
    source = tokens + (token.to(tl.int64) * KV_HEADS + head)[:, None] * WIDTH + column
    x = tl.load(source, mask=inside, other=0.0)
    if FORM == "int4":
        high = tl.load(source + STORED, mask=inside, other=0.0).to(tl.float32)

    there = (slot >= 0) & (slot // S < num_pages) & (at >= 0) & (at < num_layers)
    slot = tl.where(there, slot, 0)
    page = at.to(tl.int64) * num_pages + slot // S
    slots = (page * KV_HEADS + head) * S + slot % S
    target = pool + slots[:, None] * STORED + column
    inside = there[:, None] & (column < STORED)
    if FORM == "plain":
        tl.store(target, x.to(pool.dtype.element_ty), mask=inside)
    else:
        x = x.to(tl.float32)
        if PER_TOKEN:
            largest = _largest(x)
            if FORM == "int4":
                largest = tl.maximum(largest, _largest(high))
            scale = largest * RECIPROCAL
            scale = tl.where(scale < TINY, 0.0, scale)
            tl.store(scales + slots, scale, mask=there)
        else:
            scale = tl.load(scales_in + page, mask=there, other=0.0)
        stored = _stored(x, scale, FORM, LARGEST)
        if FORM == "int4":
            stored = (stored & 0xF) | ((_stored(high, scale, FORM, LARGEST) & 0xF) << 4)
        tl.store(target, stored.to(pool.dtype.element_ty), mask=inside)


@jit
def _write_kernel(
    k,
    v,
    slot_mapping,
    layer,
    k_scales_in,
    v_scales_in,
    k_in,
    v_in,
    k_scales_old,
    v_scales_old,
    num_tokens,
    num_layers,
    num_pages,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    KV_HEADS: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    FORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    LARGEST: tl.constexpr,
    RECIPROCAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: some heads of some tokens; those of K and of V alternate."""
    ARRAYS: tl.constexpr = tl.constexpr(2 if DV > 0 else 1)
    program = tl.program_id(0)
    row = program // ARRAYS * ROWS + tl.arange(0, ROWS)
    token = row // KV_HEADS
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    at = tl.load(layer)
    if program % ARRAYS == 0:
        _write_rows(
            k, row, slot, at, num_tokens, num_layers, num_pages, k_scales_in, k_pages, k_scales, KV_HEADS, S, D, PAD,
            FORM, PER_TOKEN, LARGEST, RECIPROCAL,
        )  # fmt: skip
    elif DV > 0:
        _write_rows(
            v, row, slot, at, num_tokens, num_layers, num_pages, v_scales_in, v_pages, v_scales, KV_HEADS, S, DV, V_PAD,
            FORM, PER_TOKEN, LARGEST, RECIPROCAL,
        )  # fmt: skip


def write_pages(
    pools: Pools,
    k: Shaped[Array, "T K D"],
    v: Shaped[Array, "T K Dv"] | None,
    slot_mapping: Int[Array, "T"],
    *,
    config: Config | None = None,
    limits: Limits | None = None,
) -> tuple[Any, Any]:
    """Puts each token's K and V into its slot, in place where the pages are donated or carried by a loop.

    Args:
      pools: of all layers; nothing is written where the layer is outside [0, L).
      k, v: new tokens, of any floating dtype.
      slot_mapping: i32[T] or i64[T]; tokens with a slot outside [0, P * S) are dropped. No slot may stand twice.
      config: None: `default_config`.
      limits: the device's.

    Returns:
      The pools with the tokens in them.

    Raises:
      NotImplementedError: the device is none that the kernel runs on.
    """
    limits = device_limits() if limits is None else limits
    k_pages, v_pages, layer = pools
    (L, P, K, S, D), T = k_pages.shape, k.shape[0]
    if T == 0:
        return k_pages, v_pages
    DV = 0 if v_pages is None else v_pages.shape[-1]
    nothing = scalar(0, jnp.float32)
    stored = pools.arrays
    form, per_element, largest, per_token = "plain", 1, 1.0, False
    values, scales = stored, [nothing for _ in stored]
    if isinstance(k_pages, QuantizedPages):
        form, _, largest, per_element = k_pages.form
        per_token = k_pages.per_token
        values, scales = [as_bytes(p.values) for p in stored], [p.scales for p in stored]

    def both(arrays: list[Any]) -> list[Any]:
        return [*arrays, nothing] if v_pages is None else arrays

    def pad(width: int) -> int:
        return next_power_of_2(max(1, width // per_element))

    config = default_config(len(stored) * T * K, max(pad(D), pad(DV)), limits) if config is None else config
    given, made = ([nothing, nothing], both(scales)) if per_token else (both(scales), [nothing, nothing])
    written = [*both(values), *made]
    results = call(
        _write_kernel,
        k,
        k if v is None else v,
        slot_mapping,
        scalar(layer, jnp.int32),
        *given,
        *written,
        T,
        L,
        P,
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written],
        grid=len(stored) * -(-T * K // config.rows),
        limits=limits,
        num_warps=config.num_warps,
        # What stands in for an array that there is not would be copied first.
        in_place={6 + i: i for i, x in enumerate(written) if x is not nothing},
        KV_HEADS=K,
        S=S,
        D=D,
        DV=DV,
        PAD=pad(D),
        V_PAD=pad(DV),
        FORM=form,
        PER_TOKEN=per_token,
        LARGEST=largest,
        RECIPROCAL=float(np.float32(1 / largest)),
        ROWS=config.rows,
    )
    new: list[Any] = []
    for pool, x, new_scales in zip(stored, results, results[2:], strict=False):
        if isinstance(pool, QuantizedPages):
            kept = new_scales if per_token else pool.scales
            new.append(QuantizedPages(from_bytes(x, pool.dtype), kept))
        else:
            new.append(x)
    return new[0], None if v_pages is None else new[1]
