"""Tiles in shared memory: how they are loaded, stored and cleaned, below what Pallas can say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from paxcache.kernels.sm90._mosaic import (
    THREADS,
    arith,
    fragmented_array,
    ir,
    llvm,
    matrix_tiles,
    memref,
    mgpu_utils,
    nvvm,
    plgpu,
    swizzle_bytes,
    vector,
)
from paxcache.kernels.sm90.inline._base import (
    const,
    hidden,
    in_layout,
    inline,
    own_thread,
    own_warp_and_lane,
    result_type,
    run_inline,
)

LARGEST_HALF = float(jnp.finfo(jnp.float16).max)


def _tile_address(row: Any, byte: Any, row_bytes: int, swizzle: int) -> Any:
    """Where a byte of a matrix lies in shared memory: tiles of 8 rows side by side, their 16-byte parts permuted."""
    tile = arith.addi(
        arith.muli(arith.divui(row, const(8)), const(row_bytes // swizzle)), arith.divui(byte, const(swizzle))
    )
    line = arith.addi(arith.muli(tile, const(8)), arith.remui(row, const(8)))
    address = arith.addi(arith.muli(line, const(swizzle)), arith.remui(byte, const(swizzle)))
    part = arith.andi(arith.shrui(address, const(7)), const(swizzle // 16 - 1))
    return arith.xori(address, arith.shli(part, const(4)))


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
            two = mgpu_utils.prmt(stored, stored, const(first | second << 4))
            instruction = f"cvt.rn.f16x2.{name}x2 $0, $1;"
            return mgpu_utils.inline_ptx(instruction, arith.trunci(i16, two), result_types=i32)

        return [[mgpu_utils.bitcast(convert(*pair), halves) for pair in pairs]]

    if dtype == jnp.int8:
        numbers, offset = [arith.xori(stored, const(0x80808080 - (1 << 32)))], 1024 + 128
    else:
        nibbles, low = arith.xori(stored, const(0x88888888 - (1 << 32))), const(0x0F0F0F0F)
        numbers, offset = [arith.andi(x, low) for x in (nibbles, arith.shrui(nibbles, const(4)))], 1024 + 8
    f16 = ir.FloatAttr.get(ir.F16Type.get(), float(offset))
    offsets = arith.constant(halves, ir.DenseElementsAttr.get_splat(halves, f16))

    def shifted(number, first, second):
        two = mgpu_utils.prmt(number, const(0x64646464), const(0x4040 | first | second << 8))
        return arith.subf(mgpu_utils.bitcast(two, halves), offsets)

    return [[shifted(number, *pair) for pair in pairs] for number in numbers]


def _interpreted_halves(stored: Any) -> Any:
    if stored.dtype == jnp.uint8:
        bits = stored.astype(jnp.int8)
        return jnp.concatenate([(bits << 4) >> 4, bits >> 4], axis=1).astype(jnp.float16)
    return stored.astype(jnp.float16)


def _bytes_as_numbers(ref, dtype, *, transposed):
    numbers = _interpreted_halves(ref[...])
    padding = -numbers.shape[1] % (128 if dtype == jnp.uint8 else 64) if transposed else 0
    return jnp.pad(numbers.T, ((0, padding), (0, 0))) if transposed else numbers


@inline(_bytes_as_numbers)
def load_bytes(ref: Any, dtype: Any, *, transposed: bool) -> Any:
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
    """
    tokens, row_bytes = ref.shape
    lists = 2 if dtype == jnp.uint8 else 1
    padded = -(-row_bytes // 64) * 64 if transposed else row_bytes
    shape = (lists * padded, tokens) if transposed else (tokens, lists * padded)
    layout, swizzle = fragmented_array.WGMMA_LAYOUT, swizzle_bytes(row_bytes)

    def load(_, ref):
        warp, lane = own_warp_and_lane()
        base = mgpu_utils.memref_ptr(ref)
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        flat = registers.reshape(
            *registers.shape[:2], 2
        )  # blocks of 64 rows, of 8 columns; upper and lower rows

        def load_four(row, byte, order):
            return _load_four(base, _tile_address(row, byte, row_bytes, swizzle), order)

        if transposed:  # a register has two tokens of two columns
            for block, first in itertools.product(range(padded // 64), range(0, tokens, 32)):
                byte = arith.addi(const(64 * block), arith.muli(warp, const(16)))
                byte = arith.minui(byte, const(row_bytes - 16))  # past the end: any
                four = load_four(arith.addi(const(first), lane), byte, nvvm.MMALayout.col)
                for i, stored in enumerate(four):
                    for x, numbers in enumerate(_as_halves(stored, dtype, ((0, 2), (1, 3)))):
                        flat[block + x * padded // 64, first // 8 + i] = numbers
        else:  # a register has four columns of a token
            row = arith.addi(arith.muli(warp, const(16)), arith.remui(lane, const(16)))
            for sixteen in range(0, row_bytes // 16, 2):
                byte = arith.muli(arith.addi(const(sixteen), arith.divui(lane, const(16))), const(16))
                four = load_four(row, byte, nvvm.MMALayout.row)
                for i, stored in enumerate(four):
                    for x, numbers in enumerate(_as_halves(stored, dtype, ((0, 1), (2, 3)))):
                        at = (x * row_bytes + 16 * (sixteen + i // 2)) // 8
                        flat[0, at : at + 2, i % 2] = numbers
        return in_layout(registers, layout)

    result = result_type(shape, jnp.float16, layout=plgpu.Layout.WGMMA)
    transforms = plgpu.RefType(matrix_tiles(row_bytes, jnp.dtype(dtype)))
    return run_inline(load, (transforms,), ref, result=result)


def _block_of_floats(ref, first, shape, *, transposed):
    block = ref[...][tuple(slice(a, a + n) for a, n in zip(first, shape, strict=True))]
    return block.T if transposed else block


@inline(_block_of_floats)
def load_floats(ref: Any, first: tuple[int, int], shape: tuple[int, int], *, transposed: bool) -> Any:
    """A block of a tile of float32 in registers, as the matrix unit takes its left operand.

    Four addresses serve a thread: all others are a constant away. What Pallas makes of it keeps one for each register.

    Args:
      ref: f32[tokens, columns] in shared memory, with the transforms of `matrix_tiles`; a multiple of 32 columns.
      first: the block's first token and column, multiples of 8 and of 32.
      shape: its tokens and columns; what becomes its rows is 64.
      transposed: whether that is its columns.
    """
    layout, swizzle, row_bytes = fragmented_array.WGMMA_LAYOUT, 128, 4 * ref.shape[1]
    if transposed:
        shape = shape[1], shape[0]

    def load(_, ref):
        f32, i8 = ir.F32Type.get(), ir.IntegerType.get_signless(8)
        pair, base = ir.VectorType.get((2,), f32), mgpu_utils.memref_ptr(ref)
        warp, lane = own_warp_and_lane()
        line = arith.addi(
            arith.muli(warp, const(16)), arith.divui(lane, const(4))
        )  # the upper of a thread's two rows
        column = arith.muli(arith.remui(lane, const(4)), const(2))  # and the first of its columns
        eight_tokens, eight_columns = 8 * row_bytes, 8 * swizzle  # from a tile to the next
        start = first[0] // 8 * eight_tokens + first[1] // 32 * eight_columns

        def at(token, byte, further):
            address = arith.addi(_tile_address(token, byte, row_bytes, swizzle), const(start + further))
            return mgpu_utils.getelementptr(base, [address], i8)

        registers = np.empty(layout.registers_shape(shape), dtype=object)
        flat = registers.reshape(shape[1] // 8, 2)
        for eight, half in np.ndindex(flat.shape):
            if transposed:
                byte = arith.muli(arith.addi(line, const(8 * half)), const(4))
                tokens = [arith.addi(column, const(j)) for j in range(2)]
                numbers = [llvm.load(f32, at(token, byte, eight * eight_tokens)) for token in tokens]
                flat[eight, half] = vector.from_elements(pair, numbers)
            else:
                byte = arith.addi(arith.muli(column, const(4)), const(eight % 4 * 32))
                further = half * eight_tokens + eight // 4 * eight_columns
                flat[eight, half] = llvm.load(pair, at(line, byte, further))
        return in_layout(registers, layout)

    result = result_type(shape, jnp.float32, layout=plgpu.Layout.WGMMA)
    transforms = plgpu.RefType(matrix_tiles(row_bytes, jnp.dtype(jnp.float32)))
    return run_inline(load, (transforms,), ref, result=result)


def _clipped_queries(raw, ref, *, tile_bytes):
    del tile_bytes
    ref[...] = jnp.clip(raw[...].astype(jnp.float32), -LARGEST_HALF, LARGEST_HALF).astype(jnp.float16)


@inline(_clipped_queries)
def store_queries(raw: Any, ref: Any, *, tile_bytes: int) -> None:
    """Copies queries as float16, with columns in the order of `load_bytes`; what is too large saturates.

    Args:
      raw: halves [columns, D] in shared memory, without transforms.
      ref: float16, of the same shape, with the transforms of `matrix_tiles` for rows of `tile_bytes`.
      tile_bytes: see there.
    """
    N, D = raw.shape
    swizzle = swizzle_bytes(tile_bytes)

    def store(_, raw, ref):
        i32, f16, f32 = ir.IntegerType.get_signless(32), ir.F16Type.get(), ir.F32Type.get()
        halves = ir.VectorType.get((2,), f16)
        pair = ir.VectorType.get((2,), ir.MemRefType(raw.type).element_type)
        base, source = mgpu_utils.memref_ptr(ref), mgpu_utils.memref_ptr(raw)
        thread = own_thread()
        least, most = (arith.constant(f32, ir.FloatAttr.get(f32, x)) for x in (-LARGEST_HALF, LARGEST_HALF))
        for first in range(0, N * D // 2, THREADS):
            unit = arith.addi(const(first), thread)
            row, at = arith.divui(unit, const(D // 2)), arith.remui(unit, const(D // 2))
            sixteen, h = arith.divui(at, const(8)), arith.andi(arith.shrui(at, const(2)), const(1))
            within = arith.addi(arith.muli(arith.andi(at, const(3)), const(4)), arith.muli(h, const(2)))
            column = arith.addi(arith.muli(sixteen, const(16)), within)
            offset = arith.muli(arith.addi(arith.muli(row, const(D)), column), const(2))
            i8 = ir.IntegerType.get_signless(8)
            two = llvm.load(pair, mgpu_utils.getelementptr(source, [offset], i8))
            if pair.element_type != f16:
                numbers = [arith.extf(f32, vector.extract(two, [], [i])) for i in range(2)]
                numbers = [arith.minimumf(arith.maximumf(x, least), most) for x in numbers]
                two = vector.from_elements(halves, [arith.truncf(f16, x) for x in numbers])
            address = _tile_address(row, arith.muli(at, const(4)), 2 * D, swizzle)
            llvm.store(mgpu_utils.bitcast(two, i32), mgpu_utils.getelementptr(base, [address], i8))

    types = plgpu.RefType(), plgpu.RefType(matrix_tiles(tile_bytes, jnp.dtype(jnp.float16)))
    run_inline(store, types, raw, ref)


def _decoded(stored, target, scales, dtype):
    del dtype
    factors = scales[...][: stored.shape[0], None] if jnp.ndim(scales) else scales
    target[...] = (_interpreted_halves(stored[...]).astype(jnp.float32) * factors).astype(target.dtype)


@inline(_decoded)
def dequantize(stored: Any, target: Any, scales: Any, dtype: Any) -> None:
    """A tile of quantised numbers as halves in shared memory, scales included.

    Args:
      stored: [tokens, row of bytes], with the transforms of `matrix_tiles`. Of bytes of two numbers (uint8) the low
        bits are the first half of the columns.
      target: halves [tokens, columns], with the transforms of `matrix_tiles`.
      scales: f32[tokens or more] in shared memory, or a scalar.
      dtype: of the bytes.
    """
    (tokens, row_bytes), columns = stored.shape, target.shape[1]
    by_token = jnp.ndim(scales) > 0
    swizzles = swizzle_bytes(row_bytes), swizzle_bytes(2 * columns)

    def convert(_, stored, target, scales):
        i8, i32, f32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32), ir.F32Type.get()
        half = ir.MemRefType(target.type).element_type
        source, base = mgpu_utils.memref_ptr(stored), mgpu_utils.memref_ptr(target)
        thread = own_thread()
        eights = row_bytes // 8
        for first in range(0, tokens * eights, THREADS):
            unit = arith.addi(const(first), thread)
            row, byte = (
                arith.divui(unit, const(eights)),
                arith.muli(arith.remui(unit, const(eights)), const(8)),
            )
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
                column = arith.addi(byte, const(x * row_bytes))
                address = _tile_address(row, arith.muli(column, const(2)), 2 * columns, swizzles[1])
                packed = mgpu_utils.bitcast(eight, ir.VectorType.get((4,), i32))
                llvm.store(packed, mgpu_utils.getelementptr(base, [address], i8))

    types = (
        plgpu.RefType(matrix_tiles(row_bytes, jnp.dtype(dtype))),
        plgpu.RefType(matrix_tiles(2 * columns, jnp.dtype(target.dtype))),
        plgpu.RefType() if by_token else plgpu.Layout.WG_SPLAT(()),
    )
    run_inline(convert, types, stored, target, scales)


def _stored_slices(values, ref):
    slices, _, columns = ref.shape
    for i in range(slices):
        ref[i] = values[:, columns * i : columns * (i + 1)]


@inline(_stored_slices)
def store_slices(values: Any, ref: Any) -> None:
    """Stores a matrix slice by slice of its columns, without the barriers that Pallas puts around every store.

    Addresses are computed anew: none is kept in a register from one call in a loop to the next.

    Args:
      values: halves [64, N], in the layout of the matrix unit.
      ref: [slices, 64, N / slices] in shared memory, with the transforms of `matrix_tiles`, a tile wide. All threads
        know that what it held is no longer needed.
    """
    slices, rows, columns = ref.shape
    row_bytes = columns * ref.dtype.itemsize
    if row_bytes != swizzle_bytes(row_bytes):
        raise ValueError(f"ref: rows must be as wide as a tile, got {row_bytes} bytes")

    def store(_, values, ref):
        base, registers = mgpu_utils.memref_ptr(ref), values.registers.reshape(slices, columns // 8, 2)
        warp, lane = own_warp_and_lane()
        lane = hidden(lane)
        # Each eight lanes give the addresses of the rows of one 8 x 8 matrix: upper and lower rows by turns.
        row = arith.addi(arith.muli(warp, const(16)), arith.remui(lane, const(16)))
        byte = arith.muli(arith.divui(lane, const(16)), const(16))
        address = _tile_address(row, byte, row_bytes, row_bytes)
        for i, eight in itertools.product(range(slices), range(0, columns // 8, 2)):
            at = arith.addi(arith.xori(address, const(16 * eight)), const(i * rows * row_bytes))
            _store_matrices(base, at, registers[i, eight : eight + 2], nvvm.MMALayout.row)

    types = plgpu.Layout.WGMMA, plgpu.RefType(matrix_tiles(row_bytes, ref.dtype))
    run_inline(store, types, values, ref)


def _stored_transposed(x, ref, *, tile_bytes=None):
    del tile_bytes
    ref[...] = x.T


@inline(_stored_transposed)
def store_transposed(x: Any, ref: Any, *, tile_bytes: int | None = None) -> None:
    """Stores a matrix transposed, without the barriers that Pallas puts around every store.

    Args:
      x: halves [M, N], in the layout of the matrix unit; of one block of rows where `ref` is tiled.
      ref: [N, M] in shared memory. All threads know that what it held is no longer needed.
      tile_bytes: for whose rows it has the transforms of `matrix_tiles`; None: it has none.
    """
    N, M = ref.shape
    row_bytes = 2 * M

    def store(_, x, ref):
        base, registers = mgpu_utils.memref_ptr(ref), x.registers.reshape(M // 64, N // 8, 2)
        warp, lane = own_warp_and_lane()
        # Each eight lanes give the addresses of the rows of one 8 x 8 matrix: upper and lower 8 rows of x by turns.
        row = arith.addi(arith.remui(lane, const(8)), arith.muli(arith.divui(lane, const(16)), const(8)))
        half = arith.remui(arith.divui(lane, const(8)), const(2))
        byte = arith.addi(arith.muli(warp, const(32)), arith.muli(half, const(16)))
        if tile_bytes is None:
            address = arith.addi(arith.muli(row, const(row_bytes)), byte)
        else:
            address = _tile_address(row, byte, row_bytes, swizzle_bytes(tile_bytes))
        for block, eight in itertools.product(range(M // 64), range(0, N // 8, 2)):
            at = arith.addi(address, const(128 * block + 8 * eight * row_bytes))
            _store_matrices(base, at, registers[block, eight : eight + 2], nvvm.MMALayout.col)

    transforms = () if tile_bytes is None else matrix_tiles(tile_bytes, ref.dtype)
    run_inline(store, (plgpu.Layout.WGMMA, plgpu.RefType(transforms)), x, ref)


def store_untransposed(values: Any, ref: Any) -> None:
    """Puts [columns, n] in the order of `load_bytes`, transposed, into a plain buffer [n, columns] in the right one.

    Args:
      values: halves, in the layout of the matrix unit.
      ref: in shared memory, without transforms. All threads have read what it held.
    """

    def store(_, values, ref):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        pair = ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)
        warp, lane = own_warp_and_lane()
        first_row = arith.muli(arith.remui(lane, const(4)), const(2))
        first_column = arith.muli(arith.divui(lane, const(4)), const(2))
        first_column = arith.addi(arith.muli(warp, const(16)), first_column)
        registers = values.registers.reshape(*values.registers.shape[:2], 2)
        for block, eight in np.ndindex(registers.shape[:2]):
            even, odd = (mgpu_utils.bitcast(x, i32) for x in registers[block, eight])
            column = arith.index_cast(index, arith.addi(const(64 * block), first_column))
            for j, order in enumerate((0x5410, 0x7632)):
                two = mgpu_utils.bitcast(mgpu_utils.prmt(even, odd, const(order)), pair)
                row = arith.index_cast(index, arith.addi(const(8 * eight + j), first_row))
                vector.store(two, ref, [row, column])

    run_inline(store, (plgpu.Layout.WGMMA, plgpu.RefType()), values, ref)


def _zeroed(ref, first, stop, bits, part_len, *, tile_bytes):
    del tile_bytes
    row = jnp.arange(ref.shape[0])
    part = row >> (part_len.bit_length() - 1)
    kept = (row >= first) & (row < stop) & ((bits >> part) & 1 == 0)
    ref[...] = jnp.where(kept[:, None], ref[...], jnp.zeros((), ref.dtype))


@inline(_zeroed)
def zero_rows(ref: Any, first: Any, stop: Any, bits: Any, part_len: int, *, tile_bytes: int) -> None:
    """Puts zeros into a tile's rows outside of [first, stop), and into parts of its rows.

    Args:
      ref: [rows, columns] in shared memory, with the transforms of `matrix_tiles` for rows of `tile_bytes`; of a type
        in which zeros are zero bits.
      first, stop: i32.
      bits: i32; bit i is set for rows [i * part_len, (i + 1) * part_len).
      part_len: a power of two.
      tile_bytes: see there.
    """
    rows, row_bytes = ref.shape[0], ref.shape[1] * ref.dtype.itemsize
    shift = part_len.bit_length() - 1
    swizzle = swizzle_bytes(tile_bytes)

    def zero(_, ref, *bounds):
        first, stop, bits = (bound.registers.item() for bound in bounds)
        i8, i32 = ir.IntegerType.get_signless(8), ir.IntegerType.get_signless(32)
        sixteen = ir.VectorType.get((4,), i32)
        zeros = arith.constant(sixteen, ir.DenseElementsAttr.get_splat(sixteen, ir.IntegerAttr.get(i32, 0)))
        base, thread, signed = mgpu_utils.memref_ptr(ref), own_thread(), arith.CmpIPredicate
        parts = row_bytes // 16
        # Without holes nor a first row only what follows the last row. A loop, since the places of all would be kept.
        all_rows = arith.ori(arith.cmpi(signed.ne, bits, const(0)), arith.cmpi(signed.sgt, first, const(0)))
        begin = arith.select(all_rows, const(0), arith.muli(arith.maxsi(stop, const(0)), const(parts)))
        left = arith.maxsi(arith.subi(const(rows * parts + THREADS - 1), begin), const(0))

        @mgpu_utils.fori(arith.divui(left, const(THREADS)), ())
        def _(i, carry):
            unit = arith.addi(arith.addi(arith.muli(i, const(THREADS)), begin), thread)
            row, byte = (
                arith.divui(unit, const(parts)),
                arith.muli(arith.remui(unit, const(parts)), const(16)),
            )
            foreign = arith.ori(arith.cmpi(signed.slt, row, first), arith.cmpi(signed.sge, row, stop))
            bit = arith.andi(arith.shrui(bits, arith.shrui(row, const(shift))), const(1))
            foreign = arith.ori(foreign, arith.cmpi(signed.ne, bit, const(0)))
            foreign = arith.andi(foreign, arith.cmpi(signed.slt, row, const(rows)))
            with mgpu_utils.when(foreign):
                address = _tile_address(row, byte, row_bytes, swizzle)
                llvm.store(zeros, mgpu_utils.getelementptr(base, [address], i8))
            return carry

    numbers = [jnp.asarray(x, jnp.int32) for x in (first, stop, bits)]
    types = plgpu.RefType(matrix_tiles(tile_bytes, ref.dtype)), *(plgpu.Layout.WG_SPLAT(()) for _ in numbers)
    run_inline(zero, types, ref, *numbers)
