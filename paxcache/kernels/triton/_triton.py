"""Everything of Triton and jax-triton that the kernels use, in one place.

Neither needs to be installed: kernels are defined all the same, and `call` or `device_limits` raise
NotImplementedError with the way to install them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from paxcache._checks import default_device

try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]
except ImportError:
    triton = tl = None

__all__ = [
    "Limits",
    "as_bytes",
    "call",
    "constant",
    "device_limits",
    "from_bytes",
    "jit",
    "next_power_of_2",
    "scalar",
    "tl",
]

INSTALL = "pip install 'paxcache[triton]'"
SMEM_BYTES = {(8, 0): 163, (8, 7): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
"""KB of shared memory that a block can have, by compute capability; an SM has 1 KB more."""
HARDWARE_FP8 = (8, 9)
"""The first compute capability that converts from and to float8 by itself."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or without Triton the function as it is, which nothing calls."""
    return function if triton is None else triton.jit(function)


def constant(value: Any) -> Any:
    """A number that kernels may read from their module."""
    return value if tl is None else tl.constexpr(value)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: tiles have such sizes."""
    return 1 << max(0, n - 1).bit_length()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a launch configuration depends on."""

    num_sms: int
    compute_capability: tuple[int, int]

    @property
    def smem_bytes_per_block(self) -> int:
        """Shared memory that one program can have."""
        known = SMEM_BYTES.get(self.compute_capability, min(SMEM_BYTES.values()))
        return known * 1024

    @property
    def smem_bytes_per_sm(self) -> int:
        """Shared memory of an SM, of which the system keeps 1 KB a program."""
        return self.smem_bytes_per_block + 1024

    @property
    def has_fp8(self) -> bool:
        """Whether float8 is converted by an instruction."""
        return self.compute_capability >= HARDWARE_FP8

    @property
    def is_hopper(self) -> bool:
        """Whether products take whole warpgroups and operands from shared memory."""
        return self.compute_capability[0] == 9


def device_limits(device: Any = None) -> Limits:
    """The limits of `device` (None: the default one).

    Raises:
      NotImplementedError: it is no NVIDIA GPU that the kernels run on, or what they need is not installed.
    """
    device = default_device() if device is None else device
    if device.platform != "gpu":
        raise NotImplementedError(f"triton needs an NVIDIA GPU, the default device is {device.device_kind!r}")
    capability = str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "").isdigit():
        raise NotImplementedError(f"triton: the kernels are for NVIDIA GPUs, not for {device.device_kind!r}")
    major, minor = (int(x) for x in capability.split("."))
    if major < 8:
        raise NotImplementedError(
            f"triton needs compute capability 8.0 or more, {device.device_kind!r} has {capability}"
        )
    _triton_call()
    return Limits(num_sms=int(device.core_count), compute_capability=(major, minor))


@functools.cache
def _triton_call() -> Callable[..., Any]:
    """`jax_triton.triton_call`, once it has been seen to work with this JAX.

    Raises:
      NotImplementedError: it is not installed, or does not.
    """
    if triton is None:
        raise NotImplementedError(f"triton is not installed: {INSTALL}")
    try:
        jax_triton: Any = importlib.import_module("jax_triton")
    except ImportError as error:
        raise NotImplementedError(f"jax-triton cannot be imported: {INSTALL} ({error})") from error
    if jax_triton.__version_info__ >= (0, 4):
        # It takes arrays that change in place in another way, and fails under jit of JAX 0.12.
        raise NotImplementedError(
            f"triton: the kernels need jax-triton 0.3, found {jax_triton.__version__} (with JAX {jax.__version__}): "
            f"{INSTALL}"
        )
    return jax_triton.triton_call


def call(
    kernel: Any,
    *inputs: Any,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: int,
    limits: Limits,
    num_warps: int,
    num_stages: int = 1,
    in_place: Mapping[int, int] | None = None,
    **constants: Any,
) -> list[jax.Array]:
    """Launches a kernel, whose parameters are the inputs, then the outputs, then the constants by name.

    Args:
      kernel: a function under `jit`.
      *inputs: arrays, or Python integers, which a kernel sees as int32 (and 1 as a constant).
      outputs: shapes of the results.
      grid: programs.
      limits: the device's.
      num_warps: warps of a program.
      num_stages: iterations that loads run ahead of their use, plus one.
      in_place: from the index of an input to that of the output that takes over its memory.
      **constants: compiled into the kernel.

    Returns:
      The outputs. Under vmap one launch a member; in shard_map they are typed as differing over the mesh if any
      input is.
    """
    launch = _triton_call()
    arrays = [x for x in inputs if not isinstance(x, int)]
    # Aliases count arrays alone.
    aliases = {
        sum(not isinstance(x, int) for x in inputs[:i]): output for i, output in (in_place or {}).items()
    }

    @sequential_vmap
    def run(*arrays):
        left = iter(arrays)
        return launch(
            *(x if isinstance(x, int) else next(left) for x in inputs),
            kernel=kernel,
            out_shape=tuple(outputs),
            grid=grid,
            num_warps=num_warps,
            num_stages=num_stages,
            compute_capability=limits.compute_capability[0] * 10 + limits.compute_capability[1],
            input_output_aliases=aliases,
            **constants,
        )

    results = run(*arrays)
    axes = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    return [jax.lax.pcast(x, tuple(axes), to="varying") for x in results] if axes else list(results)


def scalar(value: Any, dtype: Any) -> jax.Array:
    """A number, which may be traced, as the array that a kernel loads it from."""
    return jnp.asarray(value, dtype).reshape(1)


def as_bytes(x: jax.Array) -> jax.Array:
    """Float8 as the integers that it is stored in, which every GPU can load; costs nothing. Others as they are."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if jnp.dtype(x.dtype).name.startswith("float8") else x


def from_bytes(x: jax.Array, dtype: Any) -> jax.Array:
    """What `as_bytes` was given."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)
