"""What every function of inline code needs: a plain form for the interpreter, and short names for MLIR's values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paxcache.kernels.sm90._mosaic import THREADS, arith, fragmented_array, ir, mgpu_utils, plgpu, vector


def inline(plain: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of inline code with its plain form, since the interpreter knows no inline code.

    Calls get one more keyword, ``interpreted``: whether the interpreter runs the kernel, and so the plain form.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, interpreted: bool, **options: Any) -> Any:
            return (plain if interpreted else function)(*args, **options)

        return call

    return decorate


def run_inline(body: Callable[..., Any], types: Sequence[Any], *operands: Any, result: Any = None) -> Any:
    """Runs a body of MLIR on operands of these layouts and references; `result`: what it returns."""
    inlined: Any = plgpu.inline_mgpu(arg_types=types, return_type=result)
    return inlined(body)(*operands)


def result_type(shape: tuple[int, ...], dtype: Any, layout: Any) -> Any:
    """The type of an array that a body returns."""
    return plgpu.ShapeDtypeStruct(shape, dtype, layout=layout)


def in_layout(registers: np.ndarray, layout: Any) -> Any:
    """Registers of floating-point numbers as an array."""
    return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def like(x: Any, registers: np.ndarray) -> Any:
    """Registers of floating-point numbers as an array in the layout of another."""
    return in_layout(registers, x.layout)


def const(x: int) -> Any:
    return arith.constant(ir.IntegerType.get_signless(32), x)


def hidden(number: Any) -> Any:
    """The same i32, unknown to the compilers: what is computed from it is not kept in registers from elsewhere."""
    return mgpu_utils.inline_ptx(
        "mov.b32 $0, $1;", number, result_types=ir.IntegerType.get_signless(32), has_side_effects=True
    )


def own_thread() -> Any:
    """The calling thread's number in its warpgroup."""
    return arith.remui(mgpu_utils.thread_idx(), const(THREADS))


def own_warp_and_lane() -> tuple[Any, Any]:
    """The calling thread's warp in its warpgroup, and its lane."""
    thread = own_thread()
    return arith.divui(thread, const(32)), arith.remui(thread, const(32))


def first_of(register: Any) -> Any:
    """The first number of a register."""
    return vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))


def as_index(number: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), number)
