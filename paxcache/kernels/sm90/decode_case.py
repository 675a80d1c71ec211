"""A launch of decode on Hopper (sm_90a): shapes, shared memory, configuration. Knows sizes, no arrays."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from paxcache import _quantize
from paxcache.kernels._request import Shapes
from paxcache.kernels.sm90._mosaic import DeviceLimits, device_limits, matrix_tiles, pl, plgpu
from paxcache.kernels.sm90.decode_plan import MAX_PIECES, TILE, Config
from paxcache.kernels.sm90.operands import num_parts, operand_dtype, query_dtype

WARPS = 4  # of a warpgroup
SHARED_ACCUMULATOR = 16 * 128  # columns times head dim that let two programs share an SM,
SHARED_COLUMNS = 16  # with at most so many columns, half of them where the head dim is padded
# Quantised pages are more work a byte. Three programs that share one warpgroup of copies fit an SM's registers, where
# only two with copies of their own do,
QUANTIZED_CONSUMERS = 3
QUANTIZED_ACCUMULATOR = 8 * 128  # with so small an accumulator
QUANTIZED_COLUMNS = 8  # and so few columns.
# Columns times head dim that fit a warpgroup's registers beside the scores; fewer beside parts of float32.
MAX_ACCUMULATOR = 32 * 128
MAX_FLOAT_ACCUMULATOR = 16 * 128
FLOAT_COLUMNS = 32  # of a block of float32, whose parts are in registers at once
MAX_LANES = 8
STREAM_BYTES_SHARED = 128 * 1024  # of keys and values in flight in an SM, with two thread blocks
STREAM_BYTES_ALONE = 96 * 1024  # and with one; more of either and the memory answers more slowly

# Int32 in shared memory: the number of an arrival; then for each stage a bit a copy of a hole.
NOTES = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is static in a call."""

    head_groups: int  # groups of query heads that share a KV head and are handled at once
    groups_per_kv_head: int
    group: int  # query heads of such a group
    head_dim: int
    page_size: int
    max_query_len: int
    max_pages: int
    dtype: Any  # of the pages' values
    q_dtype: Any  # and of the output
    token_scales: bool  # quantised pages: whether each token has scales, or each layer
    causal: bool
    windowed: bool
    soft_cap: float | None
    has_sinks: bool
    return_lse: bool
    config: Config
    interpreted: bool

    @property
    def quantized(self) -> bool:
        """Whether pages hold numbers with scales."""
        return self.dtype in _quantize.BY_DTYPE

    @property
    def num_parts(self) -> int:
        """Numbers of the matrix unit that a key, a value, a query or a weight becomes."""
        return num_parts(self.dtype)

    @property
    def by_registers(self) -> bool:
        """Whether tiles go to the matrix unit through registers, in another type."""
        return self.quantized or self.num_parts > 1

    @property
    def may_be_nan(self) -> bool:
        """Whether what lies in slots past a row's end can be NaN or infinite."""
        return jnp.issubdtype(self.dtype, jnp.floating)

    @property
    def tile_bytes(self) -> int:
        """Of the matrix unit's operands the rows that are tiled alike."""
        return _operand_bytes(self.head_dim, self.dtype)

    @property
    def stored_bytes(self) -> int:
        """Of tiles of keys and values, as pages hold them, the rows that are tiled alike."""
        return _stored_bytes(self.head_dim, self.dtype)

    @property
    def blocks(self) -> int:
        """Passes over a head group's keys: blocks of query tokens."""
        return -(-self.max_query_len // self.config.block_tokens)

    @property
    def pairs(self) -> int:
        """Pairs of a row."""
        return self.head_groups * self.blocks

    @property
    def num_blocks(self) -> int:
        """Thread blocks of a launch. Neighbouring programs lie in neighbouring ones."""
        return -(-self.config.num_programs // self.config.consumers)

    @property
    def num_ranges(self) -> int:
        """Lines of the plan before the rows' ones."""
        return self.config.num_programs // self.config.lanes

    @property
    def turns(self) -> int:
        """Pairs of a row that one lane takes, one after another."""
        return self.pairs // self.config.lanes

    @property
    def columns(self) -> int:
        """Of a product: queries of a pair, padded."""
        return -(-self.group * self.config.block_tokens // 8) * 8

    @property
    def padded_dim(self) -> int:
        """The head dim in whole row blocks of the matrix unit, which writes O^T."""
        return padded_head_dim(self.head_dim)

    @property
    def block_len(self) -> int:
        """The largest number of tokens that divides pages and tiles."""
        return math.gcd(self.page_size, TILE)

    @property
    def copy_len(self) -> int:
        """Tokens of one copy."""
        return _copy_len(self.page_size, self.head_dim, self.dtype)

    @property
    def max_pieces(self) -> int:
        """Most pieces of a pair where their length is fixed."""
        assert self.config.piece_len is not None
        return min(MAX_PIECES, pl.cdiv(self.max_pages * self.page_size, self.config.piece_len))


def default_config(
    shapes: Shapes, *, limits: DeviceLimits | None = None, piece_len: int | None = None
) -> Config:
    """Several programs an SM where shared memory and registers allow it, with enough but not too much in flight."""
    limits, dtype = device_limits() if limits is None else limits, jnp.dtype(shapes.dtype)
    head_dim, page_size, max_query_len = shapes.head_dim, shapes.page_size, shapes.max_query_len
    padded_dim, heads = padded_head_dim(head_dim), shapes.group
    most = MAX_ACCUMULATOR // padded_dim
    if num_parts(dtype) > 1:
        most = MAX_FLOAT_ACCUMULATOR // padded_dim // 8 * 8  # what columns are padded to must fit too
    group = max(n for n in range(1, min(heads, most) + 1) if heads % n == 0)
    block_tokens = max(1, min(max_query_len, most // group))
    columns = -(-group * block_tokens // 8) * 8
    one_stage = _scratch(
        columns=columns,
        head_dim=head_dim,
        page_size=page_size,
        block_tokens=block_tokens,
        num_stages=1,
        dtype=dtype,
        q_dtype=query_dtype(dtype),
    )
    stage = _stage_bytes(head_dim, dtype)
    rest = _smem_bytes(one_stage) - stage
    half = limits.smem_bytes_per_sm // 2 - 1024  # the system keeps 1 KB of each block's
    accumulator = columns * padded_dim
    consumers = 1
    if dtype in _quantize.BY_DTYPE:
        share = columns <= QUANTIZED_COLUMNS and accumulator <= QUANTIZED_ACCUMULATOR
        consumers = QUANTIZED_CONSUMERS if share else 1
        sharing, room = consumers, limits.smem_bytes_per_block // consumers
    else:
        shared_columns = SHARED_COLUMNS if padded_dim == head_dim else SHARED_COLUMNS // 2
        share = columns <= shared_columns and accumulator <= SHARED_ACCUMULATOR and rest + 2 * stage <= half
        share = share and num_parts(dtype) == 1  # whose registers would not let them
        sharing, room = (2, half) if share else (1, limits.smem_bytes_per_block)
    programs = sharing * limits.num_sms
    stream_bytes = STREAM_BYTES_SHARED if share and consumers == 1 else STREAM_BYTES_ALONE
    wanted = max(2, round(stream_bytes / sharing / stage))
    pairs = shapes.num_kv_heads * heads // group * -(-max_query_len // block_tokens)

    def divides(lanes):
        """No more than one program in 32 is lost to the last group of lanes, and no thread block."""
        whole = consumers == 1 or programs % lanes == 0
        return pairs % lanes == 0 and whole and all(32 * (n % lanes) <= n for n in (programs, limits.num_sms))

    lanes = max(filter(divides, range(1, MAX_LANES + 1)))
    join_chunk = max(1, MAX_ACCUMULATOR // accumulator)
    if share and (columns > 8 or join_chunk < 4):
        join_chunk = 1
    if share and consumers > 1:
        join_chunk = min(2, join_chunk)
    return Config(
        num_programs=programs // lanes * lanes,
        min_programs=limits.num_sms // lanes * lanes,
        group_parts=heads // group,
        lanes=lanes,
        num_stages=max(1, min(wanted, (room - rest) // stage)),
        block_tokens=block_tokens,
        join_chunk=min(4, join_chunk),
        consumers=consumers,
        piece_len=piece_len,
    )


def padded_head_dim(head_dim: int) -> int:
    """In whole row blocks of the matrix unit, which writes O^T."""
    return -(-head_dim // 64) * 64


def _copy_len(page_size: int, head_dim: int, dtype: Any) -> int:
    """Tokens of one copy: what divides pages and tiles, or 8, contiguous when tiled, where copied values are padded."""
    padded = padded_head_dim(head_dim) > head_dim and dtype not in _quantize.BY_DTYPE
    return 8 if padded else math.gcd(page_size, TILE)


def _operand_bytes(head_dim: int, dtype: Any) -> int:
    """Of a row of the matrix unit's operands; of parts of float32 those that meet a block of keys or values."""
    return (head_dim if num_parts(dtype) == 1 else FLOAT_COLUMNS) * operand_dtype(dtype).itemsize


def _stored_bytes(head_dim: int, dtype: Any) -> int:
    """Of a key or a value, as pages hold it."""
    form = _quantize.BY_DTYPE.get(dtype)
    return (head_dim if form is None else head_dim // form.per_element) * dtype.itemsize


def _stage_bytes(head_dim: int, dtype: Any) -> int:
    """Shared memory of a stage: a tile of keys and one of values, with their scales."""
    form = _quantize.BY_DTYPE.get(dtype)
    if form is None:
        return TILE * (head_dim + padded_head_dim(head_dim)) * dtype.itemsize
    return 2 * TILE * (head_dim // form.per_element + 4)


def _scratch(
    *,
    columns: int,
    head_dim: int,
    page_size: int,
    block_tokens: int,
    num_stages: int,
    dtype: Any,
    q_dtype: Any = jnp.bfloat16,
    token_scales: bool = False,
    consumers: int = 1,
) -> dict[str, Any]:
    """The shared memory of a thread block; each of its programs has an equal part of every buffer."""
    N, D, DP, C, stages = columns, head_dim, padded_head_dim(head_dim), consumers, consumers * num_stages
    copies = TILE // _copy_len(page_size, head_dim, dtype)
    operand, quantized = operand_dtype(dtype), dtype in _quantize.BY_DTYPE
    tiles = matrix_tiles(_operand_bytes(D, dtype), operand)  # one swizzle for all operands
    stored = matrix_tiles(_stored_bytes(D, dtype), dtype)
    width = _stored_bytes(D, dtype) // dtype.itemsize

    def parts(columns: int) -> Any:
        return plgpu.SMEM((C, num_parts(dtype), N, columns), operand, transforms=tiles)

    def pages(columns: int) -> Any:
        return plgpu.SMEM((stages, TILE, columns), dtype, transforms=stored)

    streamed = {"k_s": pages(width), "v_s": pages(width if quantized else DP)}
    if quantized:
        scales = plgpu.SMEM((stages, TILE), jnp.float32)
        streamed |= {"k_scales": scales, "v_scales": scales}
    return streamed | {
        "q_raw": plgpu.SMEM((C, N, DP), q_dtype),
        "q_s": parts(DP),
        "p_s": parts(TILE),
        "o_s": plgpu.SMEM((C, N, DP), q_dtype),
        "maxima": plgpu.SMEM((C, 2, WARPS, N), jnp.float32),
        "notes": plgpu.SMEM((C, NOTES + num_stages), jnp.int32),
        "q_full": plgpu.Barrier(num_arrivals=block_tokens, num_barriers=C),
        "k_full": plgpu.Barrier(num_arrivals=copies * (3 if token_scales else 1), num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "k_free": plgpu.Barrier(num_barriers=stages),
        "v_free": plgpu.Barrier(num_barriers=stages),
    }


def _smem_bytes(scratch: dict[str, Any]) -> int:
    """An upper estimate: every buffer rounded up to 1 KB, the alignment of swizzled ones; barriers together 1 KB."""
    buffers = [x for x in scratch.values() if hasattr(x, "dtype")]
    sizes = (math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers)
    return sum(pl.cdiv(size, 1024) * 1024 for size in sizes) + 1024


def scratch_of(case: Case) -> dict[str, Any]:
    """The shared memory of a thread block."""
    return _scratch(
        columns=case.columns,
        head_dim=case.head_dim,
        page_size=case.page_size,
        block_tokens=case.config.block_tokens,
        num_stages=case.config.num_stages,
        dtype=case.dtype,
        q_dtype=case.q_dtype,
        token_scales=case.token_scales,
        consumers=case.config.consumers,
    )
