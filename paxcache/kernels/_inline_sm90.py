"""What the Hopper kernels do with single threads, registers and bytes of shared memory, below what Pallas can say.

Imports `_mosaic` and JAX. Every function has a plain form for the interpreter, which knows no inline code, or is left
out there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from paxcache.kernels._mosaic import (
    THREADS,
    arith,
    fragmented_array,
    ir,
    llvm,
    matrix_tiles,
    memref,
    mgpu_utils,
    nvvm,
    pl,
    plgpu,
    swizzle_bytes,
    vector,
)

MIN_ROW_LANES = 4  # that share a row: less than a sector of 32 bytes for each would cost bandwidth


def _i32(x: int) -> Any:
    return arith.constant(ir.IntegerType.get_signless(32), x)


def _hidden(number: Any) -> Any:
    """The same i32, unknown to the compilers: what is computed from it is not kept in registers from elsewhere."""
    return mgpu_utils.inline_ptx(
        "mov.b32 $0, $1;", number, result_types=ir.IntegerType.get_signless(32), has_side_effects=True
    )


def _thread() -> Any:
    """The calling thread's number in its warpgroup."""
    return arith.remui(mgpu_utils.thread_idx(), _i32(THREADS))


def _place() -> tuple[Any, Any]:
    """The calling thread's warp in its warpgroup, and its lane."""
    thread = _thread()
    return arith.divui(thread, _i32(32)), arith.remui(thread, _i32(32))


def _tile_address(row: Any, byte: Any, row_bytes: int, swizzle: int) -> Any:
    """Where a byte of a matrix lies in shared memory: tiles of 8 rows side by side, their 16-byte parts permuted."""
    tile = arith.addi(
        arith.muli(arith.divui(row, _i32(8)), _i32(row_bytes // swizzle)), arith.divui(byte, _i32(swizzle))
    )
    line = arith.addi(arith.muli(tile, _i32(8)), arith.remui(row, _i32(8)))
    address = arith.addi(arith.muli(line, _i32(swizzle)), arith.remui(byte, _i32(swizzle)))
    part = arith.andi(arith.shrui(address, _i32(7)), _i32(swizzle // 16 - 1))
    return arith.xori(address, arith.shli(part, _i32(4)))


def _load_four(base: Any, address: Any, layout: Any) -> list[Any]:
    """Four matrices of 8 rows of 16 bytes, of which each lane gives the address of one row."""
    loaded = nvvm.ldmatrix(
        mgpu_utils.getelementptr(base, [address], ir.IntegerType.get_signless(8)),
        layout=layout,
        num=4,
        shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
        elt_type=nvvm.LdStMatrixEltType.B16,
    )
    return [llvm.extractvalue(ir.IntegerType.get_signless(32), loaded, [i]) for i in range(4)]


def _store_matrices(base: Any, address: Any, matrices: Any, layout: Any) -> None:
    """Stores two or four matrices of 8 rows of 16 bytes, of which each lane gives the address of one row."""
    nvvm.stmatrix(
        mgpu_utils.getelementptr(base, [address], ir.IntegerType.get_signless(8)),
        [mgpu_utils.bitcast(two, ir.IntegerType.get_signless(32)) for two in matrices.reshape(-1)],
        layout=layout,
        shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
        elt_type=nvvm.LdStMatrixEltType.B16,
    )


def _as_halves(stored: Any, dtype: Any, pairs: Sequence[tuple[int, int]]) -> list[list[Any]]:
    """Pairs of the four bytes of a register as float16[2]; the numbers of 4 bits in two lists, of the low ones first.

    Integers take the place of the mantissa's last bits of 1024, and lose their offset by one subtraction, exactly.
    """
    i16, i32 = ir.IntegerType.get_signless(16), ir.IntegerType.get_signless(32)
    halves = ir.VectorType.get((2,), ir.F16Type.get())
    if jnp.issubdtype(dtype, jnp.floating):
        name = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}[jnp.dtype(dtype).name]

        def convert(first, second):
            two = mgpu_utils.prmt(stored, stored, _i32(first | second << 4))
            instruction = f"cvt.rn.f16x2.{name}x2 $0, $1;"
            return mgpu_utils.inline_ptx(instruction, arith.trunci(i16, two), result_types=i32)

        return [[mgpu_utils.bitcast(convert(*pair), halves) for pair in pairs]]

    if dtype == jnp.int8:
        numbers, offset = [arith.xori(stored, _i32(0x80808080 - (1 << 32)))], 1024 + 128
    else:
        nibbles, low = arith.xori(stored, _i32(0x88888888 - (1 << 32))), _i32(0x0F0F0F0F)
        numbers, offset = [arith.andi(x, low) for x in (nibbles, arith.shrui(nibbles, _i32(4)))], 1024 + 8
    f16 = ir.FloatAttr.get(ir.F16Type.get(), float(offset))
    offsets = arith.constant(halves, ir.DenseElementsAttr.get_splat(halves, f16))

    def shifted(number, first, second):
        two = mgpu_utils.prmt(number, _i32(0x64646464), _i32(0x4040 | first | second << 8))
        return arith.subf(mgpu_utils.bitcast(two, halves), offsets)

    return [[shifted(number, *pair) for pair in pairs] for number in numbers]


def _interpreted_halves(stored: Any) -> Any:
    if stored.dtype == jnp.uint8:
        bits = stored.astype(jnp.int8)
        return jnp.concatenate([(bits << 4) >> 4, bits >> 4], axis=1).astype(jnp.float16)
    return stored.astype(jnp.float16)


def load_bytes(ref: Any, dtype: Any, *, transposed: bool, interpreted: bool) -> Any:
    """A tile of quantised numbers [tokens, columns] as float16 in registers, as the matrix unit takes its left operand.

    Bytes are loaded four at once and taken apart, which *permutes* the columns; `store_queries` and
    `store_untransposed` do the same to what they meet. The interpreter permutes nothing.

    Args:
      ref: [tokens, row of bytes] in shared memory, with the transforms of `matrix_tiles`. Of bytes of two numbers
        (uint8) the low bits are the first half of the columns.
      dtype: of the bytes.
      transposed: False: [tokens, columns], and of each 16 columns number ``8 h + 2 q + j`` holds column
        ``4 q + 2 h + j``. True: [columns, tokens], of each 16 columns the even ones stand first, then the odd ones, and
        they are padded to 64 with numbers that mean nothing.
      interpreted: whether the interpreter runs the kernel.
    """
    tokens, row_bytes = ref.shape
    lists = 2 if dtype == jnp.uint8 else 1
    padded = -(-row_bytes // 64) * 64 if transposed else row_bytes
    shape = (lists * padded, tokens) if transposed else (tokens, lists * padded)
    if interpreted:
        numbers = _interpreted_halves(ref[...])
        return jnp.pad(numbers.T, ((0, shape[0] - numbers.shape[1]), (0, 0))) if transposed else numbers
    layout, swizzle = fragmented_array.WGMMA_LAYOUT, swizzle_bytes(row_bytes)

    def load(_, ref):
        warp, lane = _place()
        base = mgpu_utils.memref_ptr(ref)
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        flat = registers.reshape(
            *registers.shape[:2], 2
        )  # blocks of 64 rows, of 8 columns; upper and lower rows

        def load_four(row, byte, order):
            return _load_four(base, _tile_address(row, byte, row_bytes, swizzle), order)

        if transposed:  # a register has two tokens of two columns
            for block, first in itertools.product(range(padded // 64), range(0, tokens, 32)):
                byte = arith.addi(_i32(64 * block), arith.muli(warp, _i32(16)))
                byte = arith.minui(byte, _i32(row_bytes - 16))  # past the end: any
                four = load_four(arith.addi(_i32(first), lane), byte, nvvm.MMALayout.col)
                for i, stored in enumerate(four):
                    for x, numbers in enumerate(_as_halves(stored, dtype, ((0, 2), (1, 3)))):
                        flat[block + x * padded // 64, first // 8 + i] = numbers
        else:  # a register has four columns of a token
            row = arith.addi(arith.muli(warp, _i32(16)), arith.remui(lane, _i32(16)))
            for sixteen in range(0, row_bytes // 16, 2):
                byte = arith.muli(arith.addi(_i32(sixteen), arith.divui(lane, _i32(16))), _i32(16))
                four = load_four(row, byte, nvvm.MMALayout.row)
                for i, stored in enumerate(four):
                    for x, numbers in enumerate(_as_halves(stored, dtype, ((0, 1), (2, 3)))):
                        at = (x * row_bytes + 16 * (sixteen + i // 2)) // 8
                        flat[0, at : at + 2, i % 2] = numbers
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    result: Any = plgpu.ShapeDtypeStruct(shape, jnp.float16, layout=plgpu.Layout.WGMMA)
    transforms = plgpu.RefType(matrix_tiles(row_bytes, jnp.dtype(dtype)))
    inlined: Any = plgpu.inline_mgpu(arg_types=(transforms,), return_type=result)
    return inlined(load)(ref)


def load_floats(
    ref: Any, first: tuple[int, int], shape: tuple[int, int], *, transposed: bool, interpreted: bool
) -> Any:
    """A block of a tile of float32 in registers, as the matrix unit takes its left operand.

    Four addresses serve a thread: all others are a constant away. What Pallas makes of it keeps one for each register.

    Args:
      ref: f32[tokens, columns] in shared memory, with the transforms of `matrix_tiles`; a multiple of 32 columns.
      first: the block's first token and column, multiples of 8 and of 32.
      shape: its tokens and columns; what becomes its rows is 64.
      transposed: whether that is its columns.
      interpreted: whether the interpreter runs the kernel.
    """
    if interpreted:
        block = ref[...][tuple(slice(a, a + n) for a, n in zip(first, shape, strict=True))]
        return block.T if transposed else block
    layout, swizzle, row_bytes = fragmented_array.WGMMA_LAYOUT, 128, 4 * ref.shape[1]
    if transposed:
        shape = shape[1], shape[0]

    def load(_, ref):
        f32, i8 = ir.F32Type.get(), ir.IntegerType.get_signless(8)
        pair, base = ir.VectorType.get((2,), f32), mgpu_utils.memref_ptr(ref)
        warp, lane = _place()
        line = arith.addi(
            arith.muli(warp, _i32(16)), arith.divui(lane, _i32(4))
        )  # the upper of a thread's two rows
        column = arith.muli(arith.remui(lane, _i32(4)), _i32(2))  # and the first of its columns
        eight_tokens, eight_columns = 8 * row_bytes, 8 * swizzle  # from a tile to the next
        start = first[0] // 8 * eight_tokens + first[1] // 32 * eight_columns

        def at(token, byte, further):
            address = arith.addi(_tile_address(token, byte, row_bytes, swizzle), _i32(start + further))
            return mgpu_utils.getelementptr(base, [address], i8)

        registers = np.empty(layout.registers_shape(shape), dtype=object)
        flat = registers.reshape(shape[1] // 8, 2)
        for eight, half in np.ndindex(flat.shape):
            if transposed:
                byte = arith.muli(arith.addi(line, _i32(8 * half)), _i32(4))
                tokens = [arith.addi(column, _i32(j)) for j in range(2)]
                numbers = [llvm.load(f32, at(token, byte, eight * eight_tokens)) for token in tokens]
                flat[eight, half] = vector.from_elements(pair, numbers)
            else:
                byte = arith.addi(arith.muli(column, _i32(4)), _i32(eight % 4 * 32))
                further = half * eight_tokens + eight // 4 * eight_columns
                flat[eight, half] = llvm.load(pair, at(line, byte, further))
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    result: Any = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)
    transforms = plgpu.RefType(matrix_tiles(row_bytes, jnp.dtype(jnp.float32)))
    inlined: Any = plgpu.inline_mgpu(arg_types=(transforms,), return_type=result)
    return inlined(load)(ref)


def store_queries(raw: Any, ref: Any, *, tile_bytes: int, interpreted: bool) -> None:
    """Copies queries as float16, with columns in the order of `load_bytes`; what is too large saturates.

    Args:
      raw: halves [columns, D] in shared memory, without transforms.
      ref: float16, of the same shape, with the transforms of `matrix_tiles` for rows of `tile_bytes`.
      tile_bytes: see there.
      interpreted: whether the interpreter runs the kernel.
    """
    N, D = raw.shape
    largest = float(jnp.finfo(jnp.float16).max)
    if interpreted:
        ref[...] = jnp.clip(raw[...].astype(jnp.float32), -largest, largest).astype(jnp.float16)
        return
    swizzle = swizzle_bytes(tile_bytes)

    def store(_, raw, ref):
        i32, f16, f32 = ir.IntegerType.get_signless(32), ir.F16Type.get(), ir.F32Type.get()
        halves = ir.VectorType.get((2,), f16)
        pair = ir.VectorType.get((2,), ir.MemRefType(raw.type).element_type)
        base, source = mgpu_utils.memref_ptr(ref), mgpu_utils.memref_ptr(raw)
        thread = _thread()
        least, most = (arith.constant(f32, ir.FloatAttr.get(f32, x)) for x in (-largest, largest))
        for first in range(0, N * D // 2, THREADS):
            unit = arith.addi(_i32(first), thread)
            row, at = arith.divui(unit, _i32(D // 2)), arith.remui(unit, _i32(D // 2))
            sixteen, h = arith.divui(at, _i32(8)), arith.andi(arith.shrui(at, _i32(2)), _i32(1))
            within = arith.addi(arith.muli(arith.andi(at, _i32(3)), _i32(4)), arith.muli(h, _i32(2)))
            column = arith.addi(arith.muli(sixteen, _i32(16)), within)
            offset = arith.muli(arith.addi(arith.muli(row, _i32(D)), column), _i32(2))
            i8 = ir.IntegerType.get_signless(8)
            two = llvm.load(pair, mgpu_utils.getelementptr(source, [offset], i8))
            if pair.element_type != f16:
                numbers = [arith.extf(f32, vector.extract(two, [], [i])) for i in range(2)]
                numbers = [arith.minimumf(arith.maximumf(x, least), most) for x in numbers]
                two = vector.from_elements(halves, [arith.truncf(f16, x) for x in numbers])
            address = _tile_address(row, arith.muli(at, _i32(4)), 2 * D, swizzle)
            llvm.store(mgpu_utils.bitcast(two, i32), mgpu_utils.getelementptr(base, [address], i8))

    types = plgpu.RefType(), plgpu.RefType(matrix_tiles(tile_bytes, jnp.dtype(jnp.float16)))
    inlined: Any = plgpu.inline_mgpu(arg_types=types)
    inlined(store)(raw, ref)


def dequantize(stored: Any, target: Any, scales: Any, dtype: Any, *, interpreted: bool) -> None:
    """A tile of quantised numbers as halves in shared memory, scales included.

    Args:
      stored: [tokens, row of bytes], with the transforms of `matrix_tiles`. Of bytes of two numbers (uint8) the low
        bits are the first half of the columns.
      target: halves [tokens, columns], with the transforms of `matrix_tiles`.
      scales: f32[tokens or more] in shared memory, or a scalar.
      dtype: of the bytes.
      interpreted: whether the interpreter runs the kernel.
    """
    (tokens, row_bytes), columns = stored.shape, target.shape[1]
    by_token = jnp.ndim(scales) > 0
    if interpreted:
        numbers = _interpreted_halves(stored[...]).astype(jnp.float32)
        factors = scales[...][:tokens, None] if by_token else scales
        target[...] = (numbers * factors).astype(target.dtype)
        return
    swizzles = swizzle_bytes(row_bytes), swizzle_bytes(2 * columns)

    def convert(_, stored, target, scales):
        i8, i32, f32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.F32Type.get()
        half = ir.MemRefType(target.type).element_type
        source, base = mgpu_utils.memref_ptr(stored), mgpu_utils.memref_ptr(target)
        thread = _thread()
        eights = row_bytes // 8
        for first in range(0, tokens * eights, THREADS):
            unit = arith.addi(_i32(first), thread)
            row, byte = arith.divui(unit, _i32(eights)), arith.muli(arith.remui(unit, _i32(eights)), _i32(8))
            address = _tile_address(row, byte, row_bytes, swizzles[0])
            words = llvm.load(ir.VectorType.get((2,), i32), mgpu_utils.getelementptr(source, [address], i8))
            if by_token:
                factor = memref.load(scales, [arith.index_cast(ir.IndexType.get(), row)])
            else:
                factor = scales.registers.item()
            pairs = [_as_halves(vector.extract(words, [], [i]), dtype, ((0, 1), (2, 3))) for i in range(2)]
            for x, parts in enumerate(zip(*pairs, strict=True)):
                halves = [vector.extract(two, [], [i]) for part in parts for two in part for i in range(2)]
                numbers = [arith.mulf(arith.extf(f32, n), factor) for n in halves]
                eight = vector.from_elements(
                    ir.VectorType.get((8,), half), [arith.truncf(half, n) for n in numbers]
                )
                column = arith.addi(byte, _i32(x * row_bytes))
                address = _tile_address(row, arith.muli(column, _i32(2)), 2 * columns, swizzles[1])
                packed = mgpu_utils.bitcast(eight, ir.VectorType.get((4,), i32))
                llvm.store(packed, mgpu_utils.getelementptr(base, [address], i8))

    types = (
        plgpu.RefType(matrix_tiles(row_bytes, jnp.dtype(dtype))),
        plgpu.RefType(matrix_tiles(2 * columns, jnp.dtype(target.dtype))),
        plgpu.RefType() if by_token else plgpu.Layout.WG_SPLAT(()),
    )
    inlined: Any = plgpu.inline_mgpu(arg_types=types)
    inlined(convert)(stored, target, scales)


def reduce_columns(x: Any, reduction: Any, scratch: Any, *, interpreted: bool) -> Any:
    """The sum or maximum of each column of a matrix, with one barrier of the warpgroup.

    Pallas' own takes four, and memory that all warpgroups of a block share.

    Args:
      x: f32[64, N], in the layout of the matrix unit.
      reduction: `jnp.sum` or `jnp.max`.
      scratch: f32[4, N] in shared memory. Before it is used again, the warpgroup has met once more.
      interpreted: whether the interpreter runs the kernel.

    Returns:
      f32[N] in the layout's reduction.
    """
    if interpreted:
        return reduction(x, axis=0)
    combine = {jnp.sum: arith.addf, jnp.max: arith.maximumf}[reduction]
    layout: Any = plgpu.Layout.WGMMA.reduce(0)

    def reduce(_, x, scratch):
        index, pair = ir.IndexType.get(), ir.VectorType.get((2,), ir.F32Type.get())
        warp, lane = _place()
        warp = arith.index_cast(index, warp)
        first = arith.muli(arith.remui(lane, _i32(4)), _i32(2))
        registers = x.registers.reshape(x.registers.shape[1], 2)
        columns = [
            arith.index_cast(index, arith.addi(first, _i32(8 * eight))) for eight in range(len(registers))
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
        return fragmented_array.FragmentedArray(_registers=to, _layout=layout.to_mgpu(), _is_signed=None)

    shape: Any = plgpu.ShapeDtypeStruct((x.shape[1],), jnp.float32, layout=layout)
    arguments = plgpu.Layout.WGMMA, plgpu.RefType()
    inlined: Any = plgpu.inline_mgpu(arg_types=arguments, return_type=shape)
    return inlined(reduce)(x, scratch)


def fill_parts(x: Any, fill: float, bits: Any, part_len: int, *, interpreted: bool) -> Any:
    """A matrix with `fill` in parts of its columns, in the layout of the matrix unit.

    Args:
      x: f32[64, N].
      fill: what stands there.
      bits: i32; bit i is set for columns [i * part_len, (i + 1) * part_len).
      part_len: a multiple of 8.
      interpreted: whether the interpreter runs the kernel.
    """
    if interpreted:
        parts = jnp.arange(x.shape[1])[None] // part_len
        return jnp.where((bits >> parts) & 1 != 0, fill, x)

    def put(_, x, bits):
        f32, zero = ir.F32Type.get(), _i32(0)
        bits = bits.registers.item()
        pair = ir.VectorType.get((2,), f32)
        other = arith.constant(pair, ir.DenseElementsAttr.get_splat(pair, ir.FloatAttr.get(f32, fill)))
        registers = np.empty_like(x.registers)
        source, target = (r.reshape(-1, 2) for r in (x.registers, registers))
        for eight in range(len(source)):
            bit = arith.andi(bits, _i32(1 << (8 * eight // part_len)))
            filled = arith.cmpi(arith.CmpIPredicate.ne, bit, zero)
            target[eight] = [arith.select(filled, other, number) for number in source[eight]]
        return type(x)(_registers=registers, _layout=x.layout, _is_signed=None)

    shape: Any = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=plgpu.Layout.WGMMA)
    arguments = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())
    inlined: Any = plgpu.inline_mgpu(arg_types=arguments, return_type=shape)
    return inlined(put)(x, bits)


def reciprocal(x: Any, *, interpreted: bool) -> Any:
    """1 / x to float32's last bit, in the layout of the matrix unit; a division takes more of everything."""
    if interpreted:
        return 1 / x

    def invert(_, x):
        f32 = ir.F32Type.get()
        registers = np.empty_like(x.registers)
        for at in np.ndindex(registers.shape):
            numbers = [vector.extract(x.registers[at], [], [j]) for j in range(2)]
            inverse = [
                mgpu_utils.inline_ptx("rcp.approx.ftz.f32 $0, $1;", n, result_types=f32) for n in numbers
            ]
            registers[at] = vector.from_elements(x.registers[at].type, inverse)
        return type(x)(_registers=registers, _layout=x.layout, _is_signed=None)

    layout: Any = plgpu.Layout.WGMMA
    shape: Any = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout)
    inlined: Any = plgpu.inline_mgpu(arg_types=(layout,), return_type=shape)
    return inlined(invert)(x)


def keep_columns(x: Any, fill: float, *, last: Any, after: Any = None, interpreted: bool) -> Any:
    """A matrix with `fill` for the columns of each row that are not kept, in the layout of the matrix unit.

    A thread's columns of a row are bits of a mask, of which one instruction makes seven predicates (as in
    FlashAttention-4). What Pallas makes of an iota keeps a register for each column in a loop.

    Args:
      x: f32[64, N].
      fill: what stands for the rest.
      last: i32[64], in the layout's reduction: the last column of each row that is kept.
      after: i32[64] likewise, the column before the first that is kept; None: none is left out there.
      interpreted: whether the interpreter runs the kernel.
    """
    if interpreted:
        columns = jnp.arange(x.shape[1])[None]
        kept = columns <= last[:, None]
        if after is not None:
            kept &= columns > after[:, None]
        return jnp.where(kept, x, fill)
    bits = 32  # of a mask: two neighbouring columns of each eight

    def up_to(bound, first_bit):
        """A mask with a one for each of the thread's columns, from `first_bit` on, that is not past a bound."""
        in_eight = arith.minsi(arith.andi(bound, _i32(7)), _i32(1))
        ones = arith.addi(arith.muli(arith.shrsi(bound, _i32(3)), _i32(2)), in_eight)
        ones = arith.maxsi(arith.addi(ones, _i32(1 - first_bit)), _i32(0))
        return mgpu_utils.inline_ptx("bmsk.clamp.b32 $0, 0, $1;", ones, result_types=ones.type)

    def keep(_, x, *bounds):
        pair, (_, lane) = ir.VectorType.get((2,), ir.F32Type.get()), _place()
        # A register has two neighbouring columns, of the upper rows or of the lower ones.
        first = arith.muli(arith.remui(lane, _i32(4)), _i32(2))
        bounds = [[arith.subi(_first(r), first) for r in bound.registers.reshape(-1)] for bound in bounds]
        other = arith.constant(pair.element_type, ir.FloatAttr.get(pair.element_type, fill))
        registers = np.empty_like(x.registers)
        source, target = (r.reshape(-1, 2) for r in (x.registers, registers))
        for first_bit, half in itertools.product(range(0, 2 * len(source), bits), range(2)):
            kept, *left_out = (up_to(bound[half], first_bit) for bound in bounds)
            for mask in left_out:
                kept = arith.andi(kept, arith.xori(mask, _i32(-1)))
            for eight in range(first_bit // 2, min((first_bit + bits) // 2, len(source))):
                numbers = []
                for j in range(2):
                    bit = 1 << (2 * eight + j - first_bit)
                    bit = arith.andi(kept, _i32(bit if bit < 1 << 31 else -bit))
                    is_kept = arith.cmpi(arith.CmpIPredicate.ne, bit, _i32(0))
                    number = vector.extract(source[eight, half], [], [j])
                    numbers.append(arith.select(is_kept, number, other))
                target[eight, half] = vector.from_elements(pair, numbers)
        return type(x)(_registers=registers, _layout=x.layout, _is_signed=None)

    given = [last] if after is None else [last, after]
    matrix, rows = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    shape: Any = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=matrix)
    inlined: Any = plgpu.inline_mgpu(arg_types=(matrix, *(rows for _ in given)), return_type=shape)
    return inlined(keep)(x, *given)


def widen(x: Any, num_columns: int, *, interpreted: bool) -> Any:
    """A matrix with zeros for more columns on its right, in the layout of the matrix unit.

    Args:
      x: [64, N], of two bytes an element.
      num_columns: of the result.
      interpreted: whether the interpreter runs the kernel.
    """
    if interpreted:
        return jnp.pad(x, ((0, 0), (0, num_columns - x.shape[1])))

    def pad(_, x):
        pair = x.registers.flat[0].type
        zero = arith.constant(
            pair, ir.DenseElementsAttr.get_splat(pair, ir.FloatAttr.get(pair.element_type, 0.0))
        )
        registers = np.full(x.layout.registers_shape((x.shape[0], num_columns)), zero, object)
        registers.reshape(-1, 2)[: x.registers.size // 2] = x.registers.reshape(-1, 2)
        return type(x)(_registers=registers, _layout=x.layout, _is_signed=None)

    matrix = plgpu.Layout.WGMMA
    shape: Any = plgpu.ShapeDtypeStruct((x.shape[0], num_columns), x.dtype, layout=matrix)
    inlined: Any = plgpu.inline_mgpu(arg_types=(matrix,), return_type=shape)
    return inlined(pad)(x)


def scaled_halves(x: Any, factors: Any, dtype: Any, *, interpreted: bool) -> Any:
    """The rows of a matrix times a factor each, as halves; zeros where the factor is zero, whatever the row holds.

    Args:
      x: f32[64, N], in the layout of the matrix unit.
      factors: f32[64], in the layout's reduction.
      dtype: float16 or bfloat16.
      interpreted: whether the interpreter runs the kernel.
    """
    if interpreted:
        return jnp.where(factors[:, None] != 0, x * factors[:, None], 0).astype(dtype)

    def scale(_, x, factors):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        halves = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(dtype))
        factors = [_first(r) for r in factors.registers.reshape(-1)]
        zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        used = [arith.cmpf(arith.CmpFPredicate.UNE, factor, zero) for factor in factors]
        masks = [arith.select(is_used, _i32(-1), _i32(0)) for is_used in used]  # two numbers at once
        registers = np.empty_like(x.registers)
        source, target = (r.reshape(-1, 2) for r in (x.registers, registers))
        for eight, half in np.ndindex(source.shape):
            pair = source[eight, half]
            product = arith.mulf(pair, vector.broadcast(pair.type, factors[half]))
            bits = mgpu_utils.bitcast(arith.truncf(halves, product), i32)
            target[eight, half] = mgpu_utils.bitcast(arith.andi(bits, masks[half]), halves)
        return type(x)(_registers=registers, _layout=x.layout, _is_signed=None)

    matrix = plgpu.Layout.WGMMA
    shape: Any = plgpu.ShapeDtypeStruct(x.shape, dtype, layout=matrix)
    inlined: Any = plgpu.inline_mgpu(arg_types=(matrix, matrix.reduce(1)), return_type=shape)
    return inlined(scale)(x, factors)


def store_slices(values: Any, ref: Any, *, interpreted: bool) -> None:
    """Stores a matrix slice by slice of its columns, without the barriers that Pallas puts around every store.

    Addresses are computed anew: none is kept in a register from one call in a loop to the next.

    Args:
      values: halves [64, N], in the layout of the matrix unit.
      ref: [slices, 64, N / slices] in shared memory, with the transforms of `matrix_tiles`, a tile wide. All threads
        know that what it held is no longer needed.
      interpreted: whether the interpreter runs the kernel.
    """
    slices, rows, columns = ref.shape
    if interpreted:
        for i in range(slices):
            ref[i] = values[:, columns * i : columns * (i + 1)]
        return
    row_bytes = columns * ref.dtype.itemsize
    if row_bytes != swizzle_bytes(row_bytes):
        raise ValueError(f"ref: rows must be as wide as a tile, got {row_bytes} bytes")

    def store(_, values, ref):
        base, registers = mgpu_utils.memref_ptr(ref), values.registers.reshape(slices, columns // 8, 2)
        warp, lane = _place()
        lane = _hidden(lane)
        # Each eight lanes give the addresses of the rows of one 8 x 8 matrix: upper and lower rows by turns.
        row = arith.addi(arith.muli(warp, _i32(16)), arith.remui(lane, _i32(16)))
        byte = arith.muli(arith.divui(lane, _i32(16)), _i32(16))
        address = _tile_address(row, byte, row_bytes, row_bytes)
        for i, eight in itertools.product(range(slices), range(0, columns // 8, 2)):
            at = arith.addi(arith.xori(address, _i32(16 * eight)), _i32(i * rows * row_bytes))
            _store_matrices(base, at, registers[i, eight : eight + 2], nvvm.MMALayout.row)

    types = plgpu.Layout.WGMMA, plgpu.RefType(matrix_tiles(row_bytes, ref.dtype))
    inlined: Any = plgpu.inline_mgpu(arg_types=types)(store)
    inlined(values, ref)


def store_transposed(x: Any, ref: Any, *, tile_bytes: int | None = None, interpreted: bool) -> None:
    """Stores a matrix transposed, without the barriers that Pallas puts around every store.

    Args:
      x: halves [M, N], in the layout of the matrix unit; of one block of rows where `ref` is tiled.
      ref: [N, M] in shared memory. All threads know that what it held is no longer needed.
      tile_bytes: for whose rows it has the transforms of `matrix_tiles`; None: it has none.
      interpreted: whether the interpreter runs the kernel.
    """
    if interpreted:
        ref[...] = x.T
        return
    N, M = ref.shape
    row_bytes = 2 * M

    def store(_, x, ref):
        base, registers = mgpu_utils.memref_ptr(ref), x.registers.reshape(M // 64, N // 8, 2)
        warp, lane = _place()
        # Each eight lanes give the addresses of the rows of one 8 x 8 matrix: upper and lower 8 rows of x by turns.
        row = arith.addi(arith.remui(lane, _i32(8)), arith.muli(arith.divui(lane, _i32(16)), _i32(8)))
        half = arith.remui(arith.divui(lane, _i32(8)), _i32(2))
        byte = arith.addi(arith.muli(warp, _i32(32)), arith.muli(half, _i32(16)))
        if tile_bytes is None:
            address = arith.addi(arith.muli(row, _i32(row_bytes)), byte)
        else:
            address = _tile_address(row, byte, row_bytes, swizzle_bytes(tile_bytes))
        for block, eight in itertools.product(range(M // 64), range(0, N // 8, 2)):
            at = arith.addi(address, _i32(128 * block + 8 * eight * row_bytes))
            _store_matrices(base, at, registers[block, eight : eight + 2], nvvm.MMALayout.col)

    transforms = () if tile_bytes is None else matrix_tiles(tile_bytes, ref.dtype)
    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(transforms)))(store)
    inlined(x, ref)


def store_arrays(
    refs: Sequence[Any], arrays: Sequence[Any], layouts: Sequence[Any], *, interpreted: bool
) -> None:
    """Stores arrays in global memory, each thread its registers, without the barriers around every store."""
    if interpreted:
        for ref, array in zip(refs, arrays, strict=True):
            ref[...] = array
        return

    def store(_, *operands):
        for array, ref in zip(operands[: len(refs)], operands[len(refs) :], strict=True):
            array.store_untiled(ref, optimized=False)

    inlined: Any = plgpu.inline_mgpu(arg_types=(*layouts, *(plgpu.RefType() for _ in refs)))(store)
    inlined(*arrays, *refs)


def store_untransposed(values: Any, ref: Any) -> None:
    """Puts [columns, n] in the order of `load_bytes`, transposed, into a plain buffer [n, columns] in the right one.

    Args:
      values: halves, in the layout of the matrix unit.
      ref: in shared memory, without transforms. All threads have read what it held.
    """

    def store(_, values, ref):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        pair = ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)
        warp, lane = _place()
        first_row = arith.muli(arith.remui(lane, _i32(4)), _i32(2))
        first_column = arith.muli(arith.divui(lane, _i32(4)), _i32(2))
        first_column = arith.addi(arith.muli(warp, _i32(16)), first_column)
        registers = values.registers.reshape(*values.registers.shape[:2], 2)
        for block, eight in np.ndindex(registers.shape[:2]):
            even, odd = (mgpu_utils.bitcast(x, i32) for x in registers[block, eight])
            column = arith.index_cast(index, arith.addi(_i32(64 * block), first_column))
            for j, order in enumerate((0x5410, 0x7632)):
                two = mgpu_utils.bitcast(mgpu_utils.prmt(even, odd, _i32(order)), pair)
                row = arith.index_cast(index, arith.addi(_i32(8 * eight + j), first_row))
                vector.store(two, ref, [row, column])

    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))(store)
    inlined(values, ref)


def arrive(counter: Any, limit: Any, result: Any) -> None:
    """Counts one arrival of the calling warpgroup at `counter`, across thread blocks.

    ``limit`` is the number of the last arrival, counted from 0; ``result``, an int32[1] in shared memory, receives the
    number of this one. The last arrival sets the counter back to 0.

    Every write to global memory that the warpgroup made before is visible to the warpgroups that arrive later:
    all its threads meet at a barrier, one of them does the acquire-release increment, all meet again. Pallas'
    own atomics return nothing, and its semaphores are cleared by an operation of their own before each launch.
    """

    def increment(_, counter, limit, result):
        zero = mgpu_utils.c(0, ir.IndexType.get())
        mgpu_utils.warpgroup_barrier()
        with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
            before = mgpu_utils.inline_ptx(
                "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;",
                mgpu_utils.memref_ptr(counter),
                limit.registers.item(),
                result_types=ir.IntegerType.get_signless(32),
                has_side_effects=True,
            )
            memref.store(before, result, [zero])
        mgpu_utils.warpgroup_barrier()

    types = plgpu.RefType(), plgpu.Layout.WG_SPLAT(()), plgpu.RefType()
    inlined: Any = plgpu.inline_mgpu(arg_types=types)(increment)
    inlined(counter, limit, result)


def row_layout(shape: tuple[int, int, int], vector_len: int) -> Any:
    """How the threads of a warpgroup hold an array ``[N, M, W]`` of rows in registers.

    Each thread has one row, or more where there are many. A row lies on neighbouring lanes of a warp, `vector_len`
    elements in each, again and again up to its end. Rows go to lanes, then to warps, by powers of two: of M, then of N.
    Where they are too few, several threads hold the same. ``.reduce(2)`` is the layout of a number a row,
    ``.reduce((1, 2))`` that of a number for each of N.
    """
    N, M, W = shape
    num_rows = math.gcd(M, THREADS) * math.gcd(N, THREADS)
    lanes = min(math.gcd(W // vector_len, 32), max(THREADS // num_rows, MIN_ROW_LANES))
    rows = 32 // lanes  # of a warp
    m = math.gcd(M, 4 * rows)
    n = math.gcd(N, 4 * rows // m)
    m_in_warp = math.gcd(m, rows)
    n_in_warp = math.gcd(n, rows // m_in_warp)
    same_lanes = rows // (m_in_warp * n_in_warp)
    same_warps = 4 * rows // (m * n * same_lanes)
    columns = lanes * vector_len
    layout: Any = plgpu.Layout.TILED(
        plgpu.Tiling(((n, m, columns), (n_in_warp, m_in_warp, columns), (vector_len,))),
        # Axes of the array so tiled, from -7 on: n and m over warps, 1, n and m in a warp, lanes, elements.
        warp_dims=(plgpu.Replicated(same_warps), -7, -6),
        lane_dims=(plgpu.Replicated(same_lanes), -4, -3, -2),
        vector_dim=-1,
        _check_canonical=False,
    ).to_mgpu()
    layout = layout.canonicalize()
    warp_dims, lane_dims = (
        tuple(d for d in dims if d != plgpu.Replicated(1)) for dims in (layout.warp_dims, layout.lane_dims)
    )
    return plgpu.Layout.TILED(layout.tiling, warp_dims, lane_dims, layout.vector_dim)


def issue_loads(*, interpreted: bool) -> None:
    """Makes the loads before it and the loads behind it be issued in this order, without a wait.

    The compilers move loads: to where values are used, or, if two branches begin with the same one, out of both. Then
    one latency comes after the other. The interpreter needs nothing of the kind.
    """
    if not interpreted:
        inlined: Any = plgpu.inline_mgpu()(lambda _: mgpu_utils.warp_barrier())
        inlined()


def recomputed(x: Any, *, interpreted: bool) -> Any:
    """The same i32, unknown to the compilers: what is computed from it once more need not be kept in registers."""
    if interpreted:
        return x

    def move(_, x):
        moved = _hidden(x.registers.item())
        return type(x)(_registers=np.full_like(x.registers, moved), _layout=x.layout, _is_signed=x.is_signed)

    scalar: Any = plgpu.Layout.WG_SPLAT(())
    result: Any = plgpu.ShapeDtypeStruct((), jnp.int32, layout=scalar)
    inlined: Any = plgpu.inline_mgpu(arg_types=(scalar,), return_type=result)
    return inlined(move)(x)


def gather(ref: Any, index: Any, layout: Any, *, interpreted: bool = False) -> Any:
    """The numbers ``ref[index]`` of an array in global memory, each thread its own.

    Args:
      ref: ``[R]``.
      index: i32, any shape; in ``[0, R)``.
      layout: that of `index`.
      interpreted: whether the interpreter runs the kernel, which knows no inline code.

    Returns:
      The numbers, in the same layout.
    """
    if interpreted:
        return jnp.stack([ref[index[at]] for at in np.ndindex(index.shape)]).reshape(index.shape)

    def load(_, ref, index):
        kind = ir.VectorType.get((1,), ir.MemRefType(ref.type).element_type)
        registers = np.empty_like(index.registers)
        for at in np.ndindex(registers.shape):
            registers[at] = vector.load(kind, ref, [_as_index(_first(index.registers[at]))])
        return type(index)(_registers=registers, _layout=index.layout, _is_signed=mgpu_utils.is_signed(dtype))

    dtype = ref.dtype
    result: Any = plgpu.ShapeDtypeStruct(index.shape, dtype, layout)
    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout), return_type=result)(load)
    return inlined(ref, index)


def scatter(ref: Any, index: Any, values: Any, layout: Any, *, interpreted: bool) -> None:
    """Stores ``ref[index] = values`` in global memory, each thread what it holds; a negative index drops its value.

    Args:
      ref: ``[R]``, or ``[R, W]`` for values that are rows.
      index: i32, any shape; below R.
      values: of the shape of `index`, or with W behind it.
      layout: that of `values`; `index` has the same, without W.
      interpreted: whether the interpreter runs the kernel, which knows no inline code.
    """
    if interpreted:
        for at in np.ndindex(index.shape):

            @pl.when(index[at] >= 0)
            def _(at=at):
                ref[index[at]] = values[at]

        return

    are_rows = index.ndim < values.ndim

    def store(_, ref, index, values):
        layout = values.layout
        if are_rows:  # each of a thread's vectors lies in one row
            index = index.broadcast_in_dim(values.shape, tuple(range(len(index.shape))), layout)
        # How far along a row a step on each axis of the tiled array leads.
        steps = layout.tiling.tile_strides((0,) * (len(values.shape) - 1) + (1,))
        i32 = ir.IntegerType.get_signless(32)
        own_steps = [mgpu_utils.c(step, i32) for step in steps[-layout.tiled_tiling_rank :]]
        own = [mgpu_utils.dyn_dot(axis, own_steps) for axis in (layout.warp_indices(), layout.lane_indices())]
        first_column = arith.addi(*own)
        for at in np.ndindex(values.registers.shape):
            row = _first(index.registers[at])
            place = [row]
            if are_rows:
                further = sum(i * step for i, step in zip(at, steps, strict=True))
                place.append(arith.addi(first_column, mgpu_utils.c(further, i32)))
            with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.sge, row, mgpu_utils.c(0, i32))):
                place = [_as_index(i) for i in place]
                vector.store(values.registers[at], ref, place, alignment=layout.vector_length * itemsize)

    itemsize = values.dtype.itemsize
    index_layout = layout.reduce(values.ndim - 1) if are_rows else layout
    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), index_layout, layout))(store)
    inlined(ref, index, values)


def zero_rows(
    ref: Any, first: Any, stop: Any, bits: Any, part_len: int, *, tile_bytes: int, interpreted: bool
) -> None:
    """Puts zeros into a tile's rows outside of [first, stop), and into parts of its rows.

    Args:
      ref: [rows, columns] in shared memory, with the transforms of `matrix_tiles` for rows of `tile_bytes`; of a type
        in which zeros are zero bits.
      first, stop: i32.
      bits: i32; bit i is set for rows [i * part_len, (i + 1) * part_len).
      part_len: a power of two.
      tile_bytes: see there.
      interpreted: whether the interpreter runs the kernel.
    """
    rows, row_bytes = ref.shape[0], ref.shape[1] * ref.dtype.itemsize
    shift = part_len.bit_length() - 1
    if interpreted:
        row = jnp.arange(rows)
        kept = (row >= first) & (row < stop) & ((bits >> (row >> shift)) & 1 == 0)
        ref[...] = jnp.where(kept[:, None], ref[...], jnp.zeros((), ref.dtype))
        return
    swizzle = swizzle_bytes(tile_bytes)

    def zero(_, ref, *bounds):
        first, stop, bits = (bound.registers.item() for bound in bounds)
        i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
        sixteen = ir.VectorType.get((4,), i32)
        zeros = arith.constant(sixteen, ir.DenseElementsAttr.get_splat(sixteen, ir.IntegerAttr.get(i32, 0)))
        base, thread, signed = mgpu_utils.memref_ptr(ref), _thread(), arith.CmpIPredicate
        parts = row_bytes // 16
        # Without holes nor a first row only what follows the last row. A loop, since the places of all would be kept.
        all_rows = arith.ori(arith.cmpi(signed.ne, bits, _i32(0)), arith.cmpi(signed.sgt, first, _i32(0)))
        begin = arith.select(all_rows, _i32(0), arith.muli(arith.maxsi(stop, _i32(0)), _i32(parts)))
        left = arith.maxsi(arith.subi(_i32(rows * parts + THREADS - 1), begin), _i32(0))

        @mgpu_utils.fori(arith.divui(left, _i32(THREADS)), ())
        def _(i, carry):
            unit = arith.addi(arith.addi(arith.muli(i, _i32(THREADS)), begin), thread)
            row, byte = arith.divui(unit, _i32(parts)), arith.muli(arith.remui(unit, _i32(parts)), _i32(16))
            foreign = arith.ori(arith.cmpi(signed.slt, row, first), arith.cmpi(signed.sge, row, stop))
            bit = arith.andi(arith.shrui(bits, arith.shrui(row, _i32(shift))), _i32(1))
            foreign = arith.ori(foreign, arith.cmpi(signed.ne, bit, _i32(0)))
            foreign = arith.andi(foreign, arith.cmpi(signed.slt, row, _i32(rows)))
            with mgpu_utils.when(foreign):
                address = _tile_address(row, byte, row_bytes, swizzle)
                llvm.store(zeros, mgpu_utils.getelementptr(base, [address], i8))
            return carry

    numbers = [jnp.asarray(x, jnp.int32) for x in (first, stop, bits)]
    types = plgpu.RefType(matrix_tiles(tile_bytes, ref.dtype)), *(plgpu.Layout.WG_SPLAT(()) for _ in numbers)
    inlined: Any = plgpu.inline_mgpu(arg_types=types)
    inlined(zero)(ref, *numbers)


def _first(register: Any) -> Any:
    """The first number of a register."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


def _as_index(number: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), number)
