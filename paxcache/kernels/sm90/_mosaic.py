"""Everything unstable that the Mosaic GPU kernels use, in one place. Imports `_checks` and JAX.

Pallas' Mosaic GPU interface is experimental and changes from release to release: the kernels, and `_inline_sm90` with
the code that they inline, import it from here and nowhere else, so that a new JAX release is met in one file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
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
    "BOX_ALIGNMENT",
    "COPY_DTYPES",
    "THREADS",
    "DeviceLimits",
    "arith",
    "device_limits",
    "fragmented_array",
    "in_place",
    "interpreter",
    "ir",
    "llvm",
    "matrix_tiles",
    "memref",
    "mgpu_utils",
    "nvvm",
    "off_mesh",
    "pl",
    "plgpu",
    "require_hopper",
    "swizzle_bytes",
    "varying_like",
    "vector",
]

COPY_DTYPES = frozenset(
    {"float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32)}
)
"""What the copy engine moves and Mosaic has a type for."""
THREADS = 128  # of a warpgroup
BOX_ALIGNMENT = 128  # bytes: where a box of the copy engine may start in shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceLimits:
    """What a launch configuration depends on. The defaults are Hopper's (H100 SXM, H200)."""

    num_sms: int = 132
    smem_bytes_per_block: int = 232448
    smem_bytes_per_sm: int = 233472
    compute_capability: tuple[int, int] = (9, 0)


def device_limits(device: Any = None) -> DeviceLimits:
    """The limits of `device` (None: the default one).

    A device that does not tell its limits, such as a CPU that interprets kernels or compiles them ahead of
    time, counts as an H200.
    """
    device = default_device() if device is None else device
    if device.platform != "gpu":
        return DeviceLimits()
    major, minor = (int(x) for x in str(getattr(device, "compute_capability", "9.0")).split("."))
    num_sms = int(getattr(device, "core_count", DeviceLimits.num_sms))
    return DeviceLimits(num_sms=num_sms, compute_capability=(major, minor))


def require_hopper(limits: DeviceLimits, prefix: str = "") -> None:
    """Raises NotImplementedError, with `prefix` first, for another architecture: these kernels run on no other."""
    if limits.compute_capability[0] != 9:
        major, minor = limits.compute_capability
        raise NotImplementedError(
            f"{prefix}needs a Hopper GPU (compute capability 9.0), this one has {major}.{minor}"
        )


def interpreter(*, detect_races: bool = False) -> Any:
    """The value of a kernel's ``interpret=`` that runs it on the CPU, optionally with the race detector.

    Each warpgroup takes a thread of XLA's, which has as many as there are cores unless the environment's NPROC says
    otherwise. With less than one for each warpgroup of a block it may hang.
    """
    return plgpu.InterpretGPUParams(detect_races=detect_races)


def matrix_tiles(row_bytes: int, dtype: Any) -> tuple[Any, Any]:
    """The transforms of shared memory that the matrix unit reads: 8 rows of the widest swizzle that divides a row."""
    tiling: Any = plgpu.TilingTransform
    swizzling: Any = plgpu.SwizzleTransform
    swizzle = swizzle_bytes(row_bytes)
    return tiling((8, swizzle // dtype.itemsize)), swizzling(swizzle)


def swizzle_bytes(row_bytes: int) -> int:
    """The bytes of a tile's row in `matrix_tiles`."""
    for swizzle in (128, 64, 32):
        if row_bytes % swizzle == 0:
            return swizzle
    raise NotImplementedError(f"rows of {row_bytes} bytes: the matrix unit needs a multiple of 32")


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
