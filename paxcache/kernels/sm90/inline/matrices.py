"""Matrices in registers, in the layout of the matrix unit: reductions, masks and conversions."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from paxcache.kernels.sm90._mosaic import THREADS, arith, ir, mgpu_utils, plgpu, vector
from paxcache.kernels.sm90.inline._base import (
    const,
    first_of,
    in_layout,
    inline,
    like,
    own_warp_and_lane,
    result_type,
    run_inline,
)


def _reduced(x, reduction, scratch):
    del scratch
    return reduction(x, axis=0)


@inline(_reduced)
def reduce_columns(x: Any, reduction: Any, scratch: Any) -> Any:
    """The sum or maximum of each column of a matrix, with one barrier of the warpgroup.

    Pallas' own takes four, and memory that all warpgroups of a block share.

    Args:
      x: f32[64, N], in the layout of the matrix unit.
      reduction: `jnp.sum` or `jnp.max`.
      scratch: f32[4, N] in shared memory. Before it is used again, the warpgroup has met once more.

    Returns:
      f32[N] in the layout's reduction.
    """
    combine = {jnp.sum: arith.addf, jnp.max: arith.maximumf}[reduction]
    layout: Any = plgpu.Layout.WGMMA.reduce(0)

    def reduce(_, x, scratch):
        index, pair = ir.IndexType.get(), ir.VectorType.get((2,), ir.F32Type.get())
        warp, lane = own_warp_and_lane()
        warp = arith.index_cast(index, warp)
        first = arith.muli(arith.remui(lane, const(4)), const(2))
        registers = x.registers.reshape(x.registers.shape[1], 2)
        columns = [
            arith.index_cast(index, arith.addi(first, const(8 * eight))) for eight in range(len(registers))
        ]
        for column, (upper, lower) in zip(columns, registers, strict=True):
            both = combine(upper, lower)
            numbers = [vector.extract(both, [], [i]) for i in range(2)]
            for distance in (4, 8, 16):
                numbers = [combine(n, mgpu_utils.shfl_bfly(n, distance)) for n in numbers]
            vector.store(vector.from_elements(pair, numbers), scratch, [warp, column])
        mgpu_utils.warpgroup_barrier()
        warps = [arith.constant(index, w) for w in range(THREADS // 32)]
        parts = [[vector.load(pair, scratch, [w, column]) for w in warps] for column in columns]
        to = np.empty(layout.to_mgpu().registers_shape((x.shape[1],)), dtype=object)
        to.reshape(-1)[:] = [functools.reduce(combine, part) for part in parts]
        return in_layout(to, layout.to_mgpu())

    shape = result_type((x.shape[1],), jnp.float32, layout=layout)
    arguments = plgpu.Layout.WGMMA, plgpu.RefType()
    return run_inline(reduce, arguments, x, scratch, result=shape)


def _filled(x, fill, bits, part_len):
    parts = jnp.arange(x.shape[1])[None] // part_len
    return jnp.where((bits >> parts) & 1 != 0, fill, x)


@inline(_filled)
def fill_parts(x: Any, fill: float, bits: Any, part_len: int) -> Any:
    """A matrix with `fill` in parts of its columns, in the layout of the matrix unit.

    Args:
      x: f32[64, N].
      fill: what stands there.
      bits: i32; bit i is set for columns [i * part_len, (i + 1) * part_len).
      part_len: a multiple of 8.
    """

    def put(_, x, bits):
        f32, zero = ir.F32Type.get(), const(0)
        bits = bits.registers.item()
        pair = ir.VectorType.get((2,), f32)
        other = arith.constant(pair, ir.DenseElementsAttr.get_splat(pair, ir.FloatAttr.get(f32, fill)))
        registers = np.empty_like(x.registers)
        source, target = (r.reshape(-1, 2) for r in (x.registers, registers))
        for eight in range(len(source)):
            bit = arith.andi(bits, const(1 << (8 * eight // part_len)))
            filled = arith.cmpi(arith.CmpIPredicate.ne, bit, zero)
            target[eight] = [arith.select(filled, other, number) for number in source[eight]]
        return like(x, registers)

    shape = result_type(x.shape, jnp.float32, layout=plgpu.Layout.WGMMA)
    arguments = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())
    return run_inline(put, arguments, x, bits, result=shape)


@inline(lambda x: 1 / x)
def reciprocal(x: Any) -> Any:
    """1 / x to float32's last bit, in the layout of the matrix unit; a division takes more of everything."""

    def invert(_, x):
        f32 = ir.F32Type.get()
        registers = np.empty_like(x.registers)
        for at in np.ndindex(registers.shape):
            numbers = [vector.extract(x.registers[at], [], [j]) for j in range(2)]
            inverse = [
                mgpu_utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", n, result_types=f32) for n in numbers
            ]
            registers[at] = vector.from_elements(x.registers[at].type, inverse)
        return like(x, registers)

    layout: Any = plgpu.Layout.WGMMA
    shape = result_type(x.shape, jnp.float32, layout=layout)
    return run_inline(invert, (layout,), x, result=shape)


def _kept(x, fill, *, last, after=None):
    columns = jnp.arange(x.shape[1])[None]
    kept = columns <= last[:, None]
    if after is not None:
        kept &= columns > after[:, None]
    return jnp.where(kept, x, fill)


@inline(_kept)
def keep_columns(x: Any, fill: float, *, last: Any, after: Any = None) -> Any:
    """A matrix with `fill` for the columns of each row that are not kept, in the layout of the matrix unit.

    A thread's columns of a row are bits of a mask, of which one instruction makes seven predicates (as in
    FlashAttention-4). What Pallas makes of an iota keeps a register for each column in a loop.

    Args:
      x: f32[64, N].
      fill: what stands for the rest.
      last: i32[64], in the layout's reduction: the last column of each row that is kept.
      after: i32[64] likewise, the column before the first that is kept; None: none is left out there.
    """
    bits = 32  # of a mask: two neighbouring columns of each eight

    def up_to(bound, first_bit):
        """A mask with a one for each of the thread's columns, from `first_bit` on, that is not past a bound."""
        in_eight = arith.minsi(arith.andi(bound, const(7)), const(1))
        ones = arith.addi(arith.muli(arith.shrsi(bound, const(3)), const(2)), in_eight)
        ones = arith.maxsi(arith.addi(ones, const(1 - first_bit)), const(0))
        return mgpu_utils.inline_ptx("bmsk.clamp.b32 $0, 0, $1;", ones, result_types=ones.type)

    def keep(_, x, *bounds):
        pair, (_, lane) = ir.VectorType.get((2,), ir.F32Type.get()), own_warp_and_lane()
        # A register has two neighbouring columns, of the upper rows or of the lower ones.
        first = arith.muli(arith.remui(lane, const(4)), const(2))
        bounds = [[arith.subi(first_of(r), first) for r in bound.registers.reshape(-1)] for bound in bounds]
        other = arith.constant(pair.element_type, ir.FloatAttr.get(pair.element_type, fill))
        registers = np.empty_like(x.registers)
        source, target = (r.reshape(-1, 2) for r in (x.registers, registers))
        for first_bit, half in itertools.product(range(0, 2 * len(source), bits), range(2)):
            kept, *left_out = (up_to(bound[half], first_bit) for bound in bounds)
            for mask in left_out:
                kept = arith.andi(kept, arith.xori(mask, const(-1)))
            for eight in range(first_bit // 2, min((first_bit + bits) // 2, len(source))):
                numbers = []
                for j in range(2):
                    bit = 1 << (2 * eight + j - first_bit)
                    bit = arith.andi(kept, const(bit if bit < 1 << 31 else -bit))
                    is_kept = arith.cmpi(arith.CmpIPredicate.ne, bit, const(0))
                    number = vector.extract(source[eight, half], [], [j])
                    numbers.append(arith.select(is_kept, number, other))
                target[eight, half] = vector.from_elements(pair, numbers)
        return like(x, registers)

    given = [last] if after is None else [last, after]
    matrix, rows = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    shape = result_type(x.shape, jnp.float32, layout=matrix)
    return run_inline(keep, (matrix, *(rows for _ in given)), x, *given, result=shape)


@inline(lambda x, num_columns: jnp.pad(x, ((0, 0), (0, num_columns - x.shape[1]))))
def widen(x: Any, num_columns: int) -> Any:
    """A matrix with zeros for more columns on its right, in the layout of the matrix unit.

    Args:
      x: [64, N], of two bytes an element.
      num_columns: of the result.
    """

    def pad(_, x):
        pair = x.registers.flat[0].type
        zero = arith.constant(
            pair, ir.DenseElementsAttr.get_splat(pair, ir.FloatAttr.get(pair.element_type, 0.0))
        )
        registers = np.full(x.layout.registers_shape((x.shape[0], num_columns)), zero, object)
        registers.reshape(-1, 2)[: x.registers.size // 2] = x.registers.reshape(-1, 2)
        return like(x, registers)

    matrix = plgpu.Layout.WGMMA
    shape = result_type((x.shape[0], num_columns), x.dtype, layout=matrix)
    return run_inline(pad, (matrix,), x, result=shape)


def _scaled(x, factors, dtype):
    return jnp.where(factors[:, None] != 0, x * factors[:, None], 0).astype(dtype)


@inline(_scaled)
def scaled_halves(x: Any, factors: Any, dtype: Any) -> Any:
    """The rows of a matrix times a factor each, as halves; zeros where the factor is zero, whatever the row holds.

    Args:
      x: f32[64, N], in the layout of the matrix unit.
      factors: f32[64], in the layout's reduction.
      dtype: float16 or bfloat16.
    """

    def scale(_, x, factors):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        halves = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(dtype))
        factors = [first_of(r) for r in factors.registers.reshape(-1)]
        zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        used = [arith.cmpf(arith.CmpFPredicate.UNE, factor, zero) for factor in factors]
        masks = [arith.select(is_used, const(-1), const(0)) for is_used in used]  # two numbers at once
        registers = np.empty_like(x.registers)
        source, target = (r.reshape(-1, 2) for r in (x.registers, registers))
        for eight, half in np.ndindex(source.shape):
            pair = source[eight, half]
            product = arith.mulf(pair, vector.broadcast(pair.type, factors[half]))
            bits = mgpu_utils.bitcast(arith.truncf(halves, product), i32)
            target[eight, half] = mgpu_utils.bitcast(arith.andi(bits, masks[half]), halves)
        return like(x, registers)

    matrix = plgpu.Layout.WGMMA
    shape = result_type(x.shape, dtype, layout=matrix)
    return run_inline(scale, (matrix, matrix.reduce(1)), x, factors, result=shape)
