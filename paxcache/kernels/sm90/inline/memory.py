"""Global memory: each thread its own addresses, arrivals across thread blocks, and the order of loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from paxcache.kernels.sm90._mosaic import THREADS, arith, ir, memref, mgpu_utils, pl, plgpu, vector
from paxcache.kernels.sm90.inline._base import as_index, first_of, hidden, inline, result_type, run_inline

MIN_ROW_LANES = 4  # that share a row: less than a sector of 32 bytes for each would cost bandwidth


def _stored_arrays(refs, arrays, layouts):
    del layouts
    for ref, array in zip(refs, arrays, strict=True):
        ref[...] = array


@inline(_stored_arrays)
def store_arrays(refs: Sequence[Any], arrays: Sequence[Any], layouts: Sequence[Any]) -> None:
    """Stores arrays in global memory, each thread its registers, without the barriers around every store."""

    def store(_, *operands):
        for array, ref in zip(operands[: len(refs)], operands[len(refs) :], strict=True):
            array.store_untiled(ref, optimized=False)

    run_inline(store, (*layouts, *(plgpu.RefType() for _ in refs)), *arrays, *refs)


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
    run_inline(increment, types, counter, limit, result)


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


@inline(lambda: None)
def issue_loads() -> None:
    """Makes the loads before it and the loads behind it be issued in this order, without a wait.

    The compilers move loads: to where values are used, or, if two branches begin with the same one, out of both. Then
    one latency comes after the other. The interpreter needs nothing of the kind.
    """
    run_inline(lambda _: mgpu_utils.warp_barrier(), ())


@inline(lambda x: x)
def recomputed(x: Any) -> Any:
    """The same i32, unknown to the compilers: what is computed from it once more need not be kept in registers."""

    def move(_, x):
        moved = hidden(x.registers.item())
        return type(x)(_registers=np.full_like(x.registers, moved), _layout=x.layout, _is_signed=x.is_signed)

    scalar: Any = plgpu.Layout.WG_SPLAT(())
    return run_inline(move, (scalar,), x, result=result_type((), jnp.int32, layout=scalar))


def _gathered(ref, index, layout):
    del layout
    return jnp.stack([ref[index[at]] for at in np.ndindex(index.shape)]).reshape(index.shape)


@inline(_gathered)
def gather(ref: Any, index: Any, layout: Any) -> Any:
    """The numbers ``ref[index]`` of an array in global memory, each thread its own.

    Args:
      ref: ``[R]``.
      index: i32, any shape; in ``[0, R)``.
      layout: that of `index`.

    Returns:
      The numbers, in the same layout.
    """

    def load(_, ref, index):
        kind = ir.VectorType.get((1,), ir.MemRefType(ref.type).element_type)
        registers = np.empty_like(index.registers)
        for at in np.ndindex(registers.shape):
            registers[at] = vector.load(kind, ref, [as_index(first_of(index.registers[at]))])
        return type(index)(_registers=registers, _layout=index.layout, _is_signed=mgpu_utils.is_signed(dtype))

    dtype = ref.dtype
    result = result_type(index.shape, dtype, layout)
    return run_inline(load, (plgpu.RefType(), layout), ref, index, result=result)


def _scattered(ref, index, values, layout):
    del layout
    for at in np.ndindex(index.shape):

        @pl.when(index[at] >= 0)
        def _(at=at):
            ref[index[at]] = values[at]


@inline(_scattered)
def scatter(ref: Any, index: Any, values: Any, layout: Any) -> None:
    """Stores ``ref[index] = values`` in global memory, each thread what it holds; a negative index drops its value.

    Args:
      ref: ``[R]``, or ``[R, W]`` for values that are rows.
      index: i32, any shape; below R.
      values: of the shape of `index`, or with W behind it.
      layout: that of `values`; `index` has the same, without W.
    """
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
            row = first_of(index.registers[at])
            place = [row]
            if are_rows:
                further = sum(i * step for i, step in zip(at, steps, strict=True))
                place.append(arith.addi(first_column, mgpu_utils.c(further, i32)))
            with mgpu_utils.when(arith.cmpi(arith.CmpIPredicate.sge, row, mgpu_utils.c(0, i32))):
                place = [as_index(i) for i in place]
                vector.store(values.registers[at], ref, place, alignment=layout.vector_length * itemsize)

    itemsize = values.dtype.itemsize
    index_layout = layout.reduce(values.ndim - 1) if are_rows else layout
    run_inline(store, (plgpu.RefType(), index_layout, layout), ref, index, values)
