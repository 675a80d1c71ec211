"""Quantises the K and V of new tokens into their pages, in place and in one launch. For Hopper GPUs (sm_90a).

A program is one warpgroup that holds a few tokens in registers, 16 bytes of a row in a thread. A row lies on some lanes
of one warp, which find its largest magnitude in a few exchanges. Bytes and scales leave for the rows that the slots
name, each thread with its own address. Shared memory, barriers and the copy engine have no part in it: they would
lengthen the way of a token, and no box holds scales, 4 bytes that lie a page's S apart. Programs are small and many, so
that the hardware overlaps one's loads with another's stores.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paxcache._quantize import Format, QuantizedPages
from paxcache.kernels._request import Pools
from paxcache.kernels.sm90._mosaic import (
    THREADS,
    DeviceLimits,
    device_limits,
    in_place,
    pl,
    plgpu,
    require_hopper,
)
from paxcache.kernels.sm90.inline.memory import gather, issue_loads, row_layout, scatter

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

LOAD_BYTES = 16  # of one load of a thread
MAX_THREAD_ELEMENTS = 128  # in a thread's registers
BLOCK_LOADS = 4  # of a thread
GROUP_HEADS = 8  # at most, in a program
PROGRAMS_PER_SM = 4
TOKEN_DTYPES = ("float32", "float16", "bfloat16")
SMALLEST = np.finfo(np.float32).tiny  # of the scales that have a reciprocal
ROUNDER = np.float32(3 << 22)
"""Added to a small number, it leaves the nearest integer (of two the even one) in the low bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The launch configuration of `write_pages`."""

    block_tokens: int
    """Tokens of one program; a power of two wastes no thread."""


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How a program holds its part of K or of V: ``[block_tokens, group_heads, width]``, once or twice."""

    form: Format
    computed: bool
    """Whether each row gets its own scale, or the one of its page."""
    shape: tuple[int, int, int]
    vector_len: int

    @property
    def layout(self) -> Any:
        return row_layout(self.shape, self.vector_len)

    @property
    def thread_elements(self) -> int:
        """Numbers that a thread holds."""
        tile = self.layout.to_mgpu().base_tile_shape
        tiles = math.prod(n // m for n, m in zip(self.shape, tile, strict=True))
        return tiles * self.vector_len * self.form.per_element


def default_config(
    num_tokens: int, num_arrays: int, num_heads: int, head_dim: int, dtype: Any, limits: DeviceLimits
) -> Config:
    """Blocks of four loads a thread, 8 KB: eight programs fill an SM and keep 64 KB in flight.

    Smaller blocks where there are too few tokens for four programs an SM: the time is then the latency of one block.
    """
    elements = BLOCK_LOADS * THREADS * LOAD_BYTES // jnp.dtype(dtype).itemsize
    groups, group_heads = _groups(num_heads)
    spread = pl.cdiv(num_tokens * groups * num_arrays, PROGRAMS_PER_SM * limits.num_sms)
    tokens = max(1, min(elements // (group_heads * head_dim), num_tokens))
    return Config(block_tokens=min(_floor_power(tokens), _floor_power(2 * spread - 1)))


def _floor_power(x: int) -> int:
    """The largest power of two up to x."""
    return 1 << (x.bit_length() - 1)


def _groups(num_heads: int) -> tuple[int, int]:
    """The number of groups of heads, and the heads of each: a power of two, so that no thread is left over."""
    group_heads = math.gcd(num_heads, GROUP_HEADS)
    return num_heads // group_heads, group_heads


def _rows(pages: QuantizedPages, tokens: Any, block_tokens: int) -> _Rows:
    _, _, K, _, D = pages.shape
    width = D // pages.form.per_element
    vector_len = math.gcd(width, LOAD_BYTES // _read_dtype(tokens).itemsize)
    computed = pages.per_token
    return _Rows(pages.form, computed, (block_tokens, _groups(K)[1], width), vector_len)


def check_supported(
    pools: Pools, k: Any, v: Any, config: Config | None = None, limits: DeviceLimits | None = None
) -> None:
    """Raises NotImplementedError, with the reason, where `write_pages` cannot do the case."""
    config = config or Config(block_tokens=1)
    limits = limits or device_limits()
    require_hopper(limits)
    for pages, tokens in zip(pools.arrays, (k, v), strict=False):
        num_rows, D = math.prod(pages.shape[1:4]), pages.shape[4]
        if num_rows > np.iinfo(np.int32).max:
            raise NotImplementedError(f"{num_rows} rows a layer: the kernel counts them in int32")
        held = _rows(pages, tokens, config.block_tokens).thread_elements
        if held > MAX_THREAD_ELEMENTS:
            raise NotImplementedError(
                f"head dim {D}, {config.block_tokens} tokens a program: a thread would hold {held} numbers, more than "
                f"{MAX_THREAD_ELEMENTS}"
            )


def _read_dtype(tokens: Any) -> Any:
    """The dtype in which the kernel reads tokens; others are converted first."""
    return tokens.dtype if tokens.dtype.name in TOKEN_DTYPES else jnp.dtype(jnp.float32)


def _scales_of(parts: list[Any], form: Format) -> Any:
    """`_quantize.scales_of`, of rows in parts."""
    sizes = [jnp.abs(x) for x in parts]
    finite = [jnp.where(x < np.inf, x, 0) for x in sizes]  # NaN is not less
    largest = jnp.max(functools.reduce(jnp.maximum, finite), axis=-1)
    scales = largest * np.float32(1 / form.largest)
    return jnp.where(scales < SMALLEST, 0, scales)


def _encode(parts: list[Any], scales: Any, form: Format, broadcast: Any, *, interpreted: bool) -> Any:
    """`_quantize.encode`, of rows in parts, given a number a row and what spreads it over the row."""
    floating = jnp.issubdtype(form.dtype, jnp.floating)
    # Where there is no reciprocal all is 0 but NaN, which stays NaN or becomes 0 after all.
    usable = scales > 0
    inverse = broadcast(jnp.where(usable, 1 / jnp.where(usable, scales, 1), -1 if floating else 0))

    def scaled(x):
        y = x * inverse
        y = jnp.where((inverse >= 0) | jnp.isnan(x) if floating else ~jnp.isnan(y), y, 0)
        if floating and not interpreted:
            return y  # the hardware's conversion saturates
        return jnp.minimum(jnp.maximum(y, -form.largest), form.largest)

    parts = [scaled(x) for x in parts]
    if floating:
        return parts[0].astype(form.dtype)
    # Numbers become integers by an addition, which is several times as fast as a conversion. The compiler cannot join
    # it with the product, whose rounding must stay, because the limits come between them.
    numbers = [lax.bitcast_convert_type(y + ROUNDER, jnp.int32) for y in parts]
    if form.per_element == 1:
        return numbers[0].astype(jnp.int8)
    low, high = numbers
    return ((low & 0xF) | (high << 4)).astype(jnp.uint8)


def _kernel(
    slots_ref,
    layer_ref,
    *refs,
    rows: tuple[_Rows, ...],
    num_layers: int,
    num_pages: int,
    num_heads: int,
    page_size: int,
    interpreted: bool,
) -> None:
    """One program: some heads of K, or of V, of tokens [first, first + block_tokens).

    The last block is cut at the number of tokens.
    """
    refs = iter(refs)
    token_refs = [next(refs) for _ in rows]
    given_refs = [None if r.computed else next(refs) for r in rows]
    value_refs = [next(refs) for _ in rows]
    scale_refs = [next(refs) if r.computed else None for r in rows]
    num_tokens = slots_ref.shape[0]
    block_tokens, group_heads, _ = rows[0].shape
    # The last program moves back so that its loads stay in bounds, and leaves out the tokens of the one before.
    first = lax.axis_index("block") * block_tokens
    start = jnp.minimum(first, num_tokens - block_tokens)
    first_head = lax.axis_index("group") * group_heads

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def spread(x, shape, layout):
        return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, tuple(range(x.ndim))), layout)

    def write(r, tokens_ref, given_ref, values_ref, scales_ref):
        width, layout, a_row, a_token = r.shape[2], r.layout, r.layout.reduce(2), r.layout.reduce((1, 2))
        heads = pl.ds(first_head, group_heads)
        # Of each row the first half and the second, where they share bytes.
        parts = [
            load(tokens_ref.at[pl.ds(start, block_tokens), heads, pl.ds(i * width, width)], layout)
            for i in range(r.form.per_element)
        ]
        issue_loads(interpreted=interpreted)
        slot = load(slots_ref.at[pl.ds(start, block_tokens)], a_token)
        layer = layer_ref[0]
        issue_loads(interpreted=interpreted)

        token = plgpu.broadcasted_iota(jnp.int32, slot.shape, 0, layout=a_token)
        wanted = (slot >= 0) & (slot < num_pages * page_size) & (token >= first - start)
        wanted &= (layer >= 0) & (layer < num_layers)
        layer = jnp.clip(layer, 0, num_layers - 1)
        slot = jnp.where(wanted, slot, 0).astype(jnp.uint32)
        page = lax.div(slot, np.uint32(page_size)).astype(jnp.int32)
        offset = lax.rem(slot, np.uint32(page_size)).astype(jnp.int32)
        # Of the layer's rows [num_pages, num_heads, page_size].
        row = spread(jnp.where(wanted, page * (num_heads * page_size) + offset, -1), r.shape[:2], a_row)
        head = plgpu.broadcasted_iota(jnp.int32, row.shape, 1, layout=a_row) + first_head
        row = jnp.where(row >= 0, row + head * page_size, -1)

        parts = [x.astype(jnp.float32) for x in parts]
        if r.computed:
            scales = _scales_of(parts, r.form)
            scatter(scales_ref.at[layer], row, scales, a_row, interpreted=interpreted)
        else:
            scales = gather(given_ref.at[layer], page, a_token, interpreted=interpreted)
        over_rows = functools.partial(spread, shape=r.shape, layout=layout)
        values = _encode(parts, scales, r.form, over_rows, interpreted=interpreted)
        scatter(values_ref.at[layer], row, values, layout, interpreted=interpreted)

    for i, arguments in enumerate(zip(rows, token_refs, given_refs, value_refs, scale_refs, strict=True)):
        pl.when(lax.axis_index("array") == i)(functools.partial(write, *arguments))


def write_pages(
    pools: Pools,
    k: Float[Array, "T K D"],
    v: Float[Array, "T K Dv"] | None,
    slot_mapping: Int[Array, "T"],
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[QuantizedPages, QuantizedPages | None]:
    """Puts each token's K and V, quantised, into its slot, in place where the pages are donated or carried by a loop.

    The numbers are those of `_quantize.scales_of` and `_quantize.encode`. Where each page has a given scale, tokens are
    quantised with the one of the page that they go to.

    Args:
      pools: of all layers; nothing is written where the layer is outside [0, L).
      k, v: new tokens.
      slot_mapping: i32[T] or i64[T]; tokens with a slot outside [0, P * S) are dropped. No slot may stand twice.
      config: None: `default_config`.
      interpret: see `_mosaic.interpreter`.

    Returns:
      The pools with the tokens in them.

    Raises:
      NotImplementedError: pools too large, or rows that threads cannot share.
    """
    limits, num_tokens = device_limits(), k.shape[0]
    if num_tokens == 0:
        return pools.k, pools.v
    check_supported(pools, k, v, config, limits)
    if config is None:
        K, width = pools.k.shape[2], max(p.shape[4] for p in pools.arrays)
        config = default_config(num_tokens, len(pools.arrays), K, width, _read_dtype(k), limits)
    tokens = [k] if v is None else [k, v]
    layer = jnp.asarray(pools.layer, jnp.int32)
    if slot_mapping.dtype not in (jnp.int32, jnp.int64):
        slot_mapping = slot_mapping.astype(jnp.int32)
    written = _write(pools.arrays, tokens, slot_mapping, layer, config=config, interpret=interpret)
    return written[0], written[1] if len(written) > 1 else None


# Under jit of its own, so that all layers of a model share one lowered kernel, and one compilation.
@functools.partial(jax.jit, static_argnames=("config", "interpret"), inline=False)
def _write(pools, tokens, slots, layer, *, config, interpret):
    if not 1 <= config.block_tokens <= slots.shape[0]:
        raise ValueError(f"config: block_tokens must be in [1, {slots.shape[0]}], got {config.block_tokens}")
    tokens = [x.astype(_read_dtype(x)) for x in tokens]
    rows = tuple(_rows(*case, config.block_tokens) for case in zip(pools, tokens, strict=True))
    L, P, K, S, _ = pools[0].shape
    launch = plgpu.kernel(
        functools.partial(
            _kernel,
            rows=rows,
            num_layers=L,
            num_pages=P,
            num_heads=K,
            page_size=S,
            interpreted=bool(interpret),
        ),
        out_type=(),
        grid=(_groups(K)[0], len(pools), pl.cdiv(slots.shape[0], config.block_tokens)),
        grid_names=("group", "array", "block"),  # the last one may have more than 65,535
        # Threads share nothing.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
        kernel_name="paxcache_quantize",
        interpret=interpret,
    )
    given = [p.scales.reshape(L, P) for p, r in zip(pools, rows, strict=True) if not r.computed]
    written = [p.values.reshape(L, P * K * S, -1) for p in pools]
    written += [p.scales.reshape(L, P * K * S) for p, r in zip(pools, rows, strict=True) if r.computed]
    written = iter(in_place(functools.partial(launch, slots, layer.reshape(1), *tokens, *given), written))
    values = [next(written).reshape(p.values.shape) for p in pools]
    scales = [
        next(written).reshape(p.scales.shape) if r.computed else p.scales
        for p, r in zip(pools, rows, strict=True)
    ]
    return [QuantizedPages(*leaves) for leaves in zip(values, scales, strict=True)]
