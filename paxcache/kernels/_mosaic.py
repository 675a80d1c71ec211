"""Everything unstable that the Mosaic GPU kernels use, in one place. Imports `_checks` and JAX.

Pallas' Mosaic GPU interface is experimental and changes from release to release: the kernels import it from
here and nowhere else, so that a new JAX release is met in one file.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, memref, vector
from jax.interpreters import batching, mlir
from jaxlib.mlir.dialects import llvm, nvvm

from paxcache._checks import default_device

__all__ = [
    "COPY_DTYPES",
    "DeviceLimits",
    "arrive",
    "device_limits",
    "gather",
    "in_place",
    "interpreter",
    "issue_loads",
    "load_transposed",
    "matrix_tiles",
    "off_mesh",
    "pl",
    "plgpu",
    "reduce_columns",
    "row_layout",
    "scatter",
    "store_untransposed",
    "varying_like",
]

COPY_DTYPES = frozenset(
    {"float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32)}
)
"""What the copy engine moves and Mosaic has a type for."""
THREADS = 128  # of a warpgroup
MIN_ROW_LANES = 4  # that share a row: less than a sector of 32 bytes for each would cost bandwidth


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceLimits:
    """What a launch configuration depends on. The defaults are Hopper's (H100 SXM, H200)."""

    num_sms: int = 132
    smem_bytes_per_block: int = 232448
    smem_bytes_per_sm: int = 233472
    registers_per_sm: int = 65536
    compute_capability: tuple[int, int] = (9, 0)


def device_limits(device: Any = None) -> DeviceLimits:
    """The limits of `device` (by default the first one of the default backend).

    A device that does not tell its limits, such as a CPU that interprets kernels or compiles them ahead of
    time, counts as an H200.
    """
    device = default_device() if device is None else device
    if device.platform != "gpu":
        return DeviceLimits()
    major, minor = (int(x) for x in str(getattr(device, "compute_capability", "9.0")).split("."))
    num_sms = int(getattr(device, "core_count", DeviceLimits.num_sms))
    return DeviceLimits(num_sms=num_sms, compute_capability=(major, minor))


def interpreter(*, detect_races: bool = False) -> Any:
    """The value of a kernel's ``interpret=`` that runs it on the CPU, optionally with the race detector."""
    return plgpu.InterpretGPUParams(detect_races=detect_races)


def matrix_tiles(row_bytes: int, dtype: Any) -> tuple[Any, Any]:
    """The transforms of shared memory that the matrix unit reads: 8 rows of the widest swizzle that divides a row."""
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    for swizzle in (128, 64, 32):
        if row_bytes % swizzle == 0:
            return tiling((8, swizzle // dtype.itemsize)), swizzling(swizzle)
    raise NotImplementedError(f"rows of {row_bytes} bytes: the matrix unit needs a multiple of 32")


def load_transposed(ref: Any, dtype: Any, *, interpreted: bool) -> Any:
    """A tile of bytes [tokens, row] as numbers [columns, tokens] in registers, in the layout of the matrix unit.

    A row has a column a byte. Where it has two (uint8), the results are int8 and 16 times too large: all low halves
    come first, then all high ones, each with its sign.

    Columns are padded to 64 with numbers that mean nothing, and *permuted*: of each 16 the even ones stand first, then
    the odd ones. The hardware transposes pairs of bytes; taken apart, a pair gives two rows that lie 8 apart.
    `store_untransposed` undoes it for what is computed row by row. The interpreter permutes nothing.

    Args:
      ref: in shared memory, with the transforms of `matrix_tiles`.
      dtype: of the bytes.
      interpreted: whether the interpreter runs the kernel.
    """
    tokens, row_bytes = ref.shape
    halves = 2 if dtype == jnp.uint8 else 1
    columns = halves * (-(-row_bytes // 64) * 64)
    if interpreted:
        stored = ref[...].T
        if halves > 1:
            stored = jnp.concatenate([stored << 4, stored & 0xF0]).astype(jnp.int8)
        return jnp.pad(stored, ((0, columns - stored.shape[0]), (0, 0)))
    result_dtype = jnp.dtype(jnp.int8 if halves > 1 else dtype)
    layout = fragmented_array.WGMMA_LAYOUT
    swizzle = next(x for x in (128, 64, 32) if row_bytes % x == 0)

    def load(_, ref):
        i8, i16, i32 = (ir.IntegerType.get_signless(n) for n in (8, 16, 32))

        def c(x):
            return arith.constant(i32, x)

        thread = arith.remui(mgpu_utils.thread_idx(), c(THREADS))
        warp, lane = arith.divui(thread, c(32)), arith.remui(thread, c(32))
        base = mgpu_utils.memref_ptr(ref)
        element = ir.VectorType.get((2,), mgpu_utils.dtype_to_ir_type(result_dtype))
        registers = np.empty(layout.registers_shape((columns, tokens)), dtype=object)
        for block in range(columns // halves // 64):
            byte = arith.addi(c(64 * block), arith.muli(warp, c(16)))  # first of the warp's 16 columns
            byte = arith.minui(byte, c(row_bytes - 16))  # past the end: any
            for first in range(0, tokens, 32):
                # Each lane has the address of a token's 16 bytes: rows of 8, as wide as the swizzle, side by side.
                token = arith.addi(c(first), lane)
                tile = arith.addi(
                    arith.muli(arith.divui(token, c(8)), c(row_bytes // swizzle)), arith.divui(byte, c(swizzle))
                )
                row = arith.addi(arith.muli(tile, c(8)), arith.remui(token, c(8)))
                address = arith.addi(arith.muli(row, c(swizzle)), arith.remui(byte, c(swizzle)))
                chunk = arith.andi(arith.shrui(address, c(7)), c(swizzle // 16 - 1))
                address = arith.xori(address, arith.shli(chunk, c(4)))
                loaded = nvvm.ldmatrix(
                    mgpu_utils.getelementptr(base, [address], i8),
                    layout=nvvm.MMALayout.col,
                    num=4,
                    shape=ir.Attribute.parse("#nvvm.ld_st_matrix_shape<m=8, n=8>"),
                    elt_type=nvvm.LdStMatrixEltType.B16,
                )
                for i in range(4):
                    pairs = llvm.extractvalue(i32, loaded, [i])
                    for half in range(halves):
                        if halves > 1:
                            moved = arith.shli(pairs, c(4)) if half == 0 else pairs
                            bits = arith.andi(moved, c(0xF0F0F0F0 - (1 << 32)))
                        else:
                            bits = pairs
                        for odd in range(2):
                            two = mgpu_utils.prmt(bits, bits, c(0x3120 >> (8 * odd) & 0xFF))
                            at = block + half * (columns // halves // 64), first // 8 + i, 0, 0, odd
                            value = mgpu_utils.bitcast(arith.trunci(i16, two), element)
                            registers[(*at, *[0] * (registers.ndim - 5))] = value
        signed = mgpu_utils.is_signed(result_dtype)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)

    shape: Any = plgpu.ShapeDtypeStruct((columns, tokens), result_dtype, layout=plgpu.Layout.WGMMA)
    inlined: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(matrix_tiles(row_bytes, jnp.dtype(dtype))),), return_type=shape
    )
    return inlined(load)(ref)


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
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        pair = ir.VectorType.get((2,), ir.F32Type.get())

        def c(x):
            return arith.constant(i32, x)

        thread = arith.remui(mgpu_utils.thread_idx(), c(THREADS))
        warp = arith.index_cast(index, arith.divui(thread, c(32)))
        first = arith.muli(arith.remui(thread, c(4)), c(2))
        registers = x.registers.reshape(x.registers.shape[1], 2)
        columns = [
            arith.index_cast(index, arith.addi(first, c(8 * eight))) for eight in range(len(registers))
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


def store_untransposed(values: Any, ref: Any) -> None:
    """Puts [columns, n] in the order of `load_transposed` into a plain buffer [n, columns] in the right one.

    Args:
      values: halves, in the layout of the matrix unit.
      ref: in shared memory, without transforms. All threads have read what it held.
    """

    def store(_, values, ref):
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.MemRefType(ref.type).element_type)

        def c(x):
            return arith.constant(i32, x)

        def index(x):
            return arith.index_cast(ir.IndexType.get(), x)

        thread = arith.remui(mgpu_utils.thread_idx(), c(THREADS))
        warp, lane = arith.divui(thread, c(32)), arith.remui(thread, c(32))
        first_row = arith.muli(arith.remui(lane, c(4)), c(2))
        first_column = arith.addi(
            arith.muli(warp, c(16)), arith.muli(arith.divui(lane, c(4)), c(2))
        )
        registers = values.registers.reshape(*values.registers.shape[:2], 2)
        for block, eight in np.ndindex(registers.shape[:2]):
            even, odd = (mgpu_utils.bitcast(x, i32) for x in registers[block, eight])
            column = index(arith.addi(c(64 * block), first_column))
            for j, order in enumerate((0x5410, 0x7632)):
                two = mgpu_utils.bitcast(mgpu_utils.prmt(even, odd, c(order)), pair)
                vector.store(two, ref, [index(arith.addi(c(8 * eight + j), first_row)), column])

    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))(store)
    inlined(values, ref)


def arrive(counter: Any, limit_and_result: Any) -> None:
    """Counts one arrival of the calling warpgroup at `counter`, across thread blocks.

    ``limit_and_result`` is an int32[2] in shared memory: it holds the number of the last arrival (counted from
    0) and receives the number of this one. The last arrival sets the counter back to 0.

    Every write to global memory that the warpgroup made before is visible to the warpgroups that arrive later:
    all its threads meet at a barrier, one of them does the acquire-release increment, all meet again. Pallas'
    own atomics return nothing, and its semaphores are cleared by an operation of their own before each launch.
    """

    def increment(_, counter, limit_and_result):
        zero, one = (mgpu_utils.c(i, ir.IndexType.get()) for i in (0, 1))
        mgpu_utils.warpgroup_barrier()
        with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
            before = mgpu_utils.inline_ptx(
                "atom.acq_rel.gpu.global.inc.u32 $0, [$1], $2;",
                mgpu_utils.memref_ptr(counter),
                memref.load(limit_and_result, [zero]),
                result_types=ir.IntegerType.get_signless(32),
                has_side_effects=True,
            )
            memref.store(before, limit_and_result, [one])
        mgpu_utils.warpgroup_barrier()

    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))(increment)
    inlined(counter, limit_and_result)


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


def gather(ref: Any, index: Any, layout: Any, *, interpreted: bool) -> Any:
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


def _first(register: Any) -> Any:
    """The first number of a register."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


def _as_index(number: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), number)


_invarying_p = Primitive("invarying")
_invarying_p.def_impl(lambda x: x)
_invarying_p.def_abstract_eval(lambda aval: ShapedArray(aval.shape, aval.dtype))
mlir.register_lowering(_invarying_p, lambda ctx, x: [x])
batching.defvectorized(_invarying_p)


def _varying_axes(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def varying_like(x: Any, like: Any) -> Any:
    """`x` with the type of a value that differs over the mesh axes of `like`; for a kernel's result in shard_map.

    Pallas types its results as equal on all devices.
    """
    axes = tuple(_varying_axes(like) - _varying_axes(x))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def off_mesh(run: Callable[[Any], Any], inputs: Any) -> Any:
    """``run(inputs)`` for kernels that take no value which shard_map types as differing over the mesh.

    The types are taken off the inputs, and put on all results.
    """
    axes = frozenset[str]().union(*map(_varying_axes, jax.tree.leaves(inputs)))
    results = run(jax.tree.map(lambda x: _invarying_p.bind(x) if _varying_axes(x) else x, inputs))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes), to="varying"), results) if axes else results


def in_place(run: Callable[..., None], arrays: Sequence[Any]) -> list[Any]:
    """The arrays as ``run(*refs)`` leaves them, without a copy of those that are donated or carried by a loop.

    Pallas takes no reference to a value that shard_map types as differing over the mesh, so the type is taken off
    the references and put back on the results.
    """
    refs = [jax.new_ref(_invarying_p.bind(x) if _varying_axes(x) else x) for x in arrays]
    run(*refs)
    return [varying_like(ref[...], x) for ref, x in zip(refs, arrays, strict=True)]
