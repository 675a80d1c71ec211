"""Checks of what users pass, made at trace time. Imports nothing above `_types`.

Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def describe(value: Any) -> str:
    """Dtype and shape as in ``int32[4]``; the repr of what is no array."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return repr(value)


def array(name: str, value: Any, dims: str, *, dtype: Any = None, **sizes: int) -> jax.Array:
    """`value` as an array, checked.

    Args:
      name: the argument's name.
      value: an array or what `jnp.asarray` takes.
      dims: axis letters in order, separated by spaces; letters given in `sizes` must match them.
      dtype: a dtype or dtype category (`jnp.integer`, `jnp.floating`) that the values must have.
      **sizes: the known sizes of the axes.
    """
    try:
        result = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {value!r}") from error
    names = dims.split()
    expected = f"[{', '.join(f'{n}={sizes[n]}' if n in sizes else n for n in names)}]"
    if result.ndim != len(names) or any(
        n in sizes and result.shape[i] != sizes[n] for i, n in enumerate(names)
    ):
        raise ValueError(f"{name}: expected shape {expected}, got {describe(result)}")
    if dtype is not None and not jnp.issubdtype(result.dtype, dtype):
        wanted = getattr(dtype, "__name__", str(dtype))
        raise TypeError(f"{name}: expected {wanted} values, got {describe(result)}")
    return result


def integers(name: str, value: Any) -> np.ndarray | jax.Array:
    """int32 values of any shape, on the host where they are known there.

    Known values that int32 does not hold are refused and traced ones stop at its ends: none is ever wrapped.
    """
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name}: expected integer values, got {describe(value)}")
        if jnp.iinfo(value.dtype).max <= high:
            return value.astype(jnp.int32)
        if isinstance(value, Tracer):
            return jnp.clip(value, max(low, int(jnp.iinfo(value.dtype).min)), high).astype(jnp.int32)
    try:
        known = np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a list with traced numbers
        return integers(name, jnp.asarray(value))
    except ValueError as error:  # lists of unequal lengths
        raise ValueError(f"{name}: expected an array, got {value!r}") from error
    if known.size == 0 and known.dtype == np.float64:  # an empty list has no type
        known = known.astype(np.int32)
    past_int64 = known.dtype == object and all(isinstance(v, int) for v in known.flat)
    if not (past_int64 or np.issubdtype(known.dtype, np.integer)):
        raise TypeError(f"{name}: expected integer values, got {describe(value)}")
    if known.size and (known.min() < low or known.max() > high):
        raise ValueError(f"{name}: values must fit int32, got {known.min()} to {known.max()}")
    return known.astype(np.int32)


def int_array(name: str, value: Any, dims: str, **sizes: int) -> jax.Array:
    """An int32 array, see `integers`."""
    return array(name, integers(name, value), dims, **sizes)


def slots(name: str, value: Any, dims: str, **sizes: int) -> jax.Array:
    """Slots of any integer type. Those on the host that int32 does not hold lie outside every pool and stay there."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        fits = (value >= 0) & (value <= np.iinfo(np.int32).max)
        value = np.where(fits, value, -1).astype(np.int32)
    return array(name, value, dims, dtype=jnp.integer, **sizes)


def bool_array(name: str, value: Any, dims: str, **sizes: int) -> jax.Array:
    """A bool array."""
    return array(name, value, dims, dtype=jnp.bool_, **sizes)


def instance(name: str, value: Any, *kinds: type, source: str = "") -> None:
    """Refuses what is of none of the classes, such as a tuple that a call returned; `source` says where one is from."""

    def article(kind):
        return f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}"

    if not isinstance(value, kinds):
        wanted = " or ".join(map(article, kinds)) + (f" (from {source})" if source else "")
        raise TypeError(f"{name}: expected {wanted}, got {article(type(value))}")


def static_int(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    """A Python int in a range; a traced value is refused with advice."""
    if isinstance(value, Tracer):
        raise TypeError(f"{name} must be static (a Python int), got a traced value")
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {value}")
    return int(value)


def static_bool(name: str, value: Any) -> bool:
    """True or False; nothing else that Python takes for one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return bool(value)


def is_traced(*trees: Any) -> bool:
    """Whether any leaf is known only while a program runs."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def default_device() -> Any:
    """Where arrays without a place of their own go: `jax.default_device` counts."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, str):
        return jax.devices(chosen)[0]
    return jax.devices()[0] if chosen is None else chosen


def window(name: str, value: Any) -> int | jax.Array:
    """A sliding window: a Python int of at least 1, or an int32 scalar that may be traced."""
    if isinstance(value, (int, np.integer)):
        return static_int(name, value, minimum=1)
    return int_array(name, value, "")


def import_tqdm() -> Any:
    """What shows a progress bar; ImportError with advice where it is missing."""
    try:
        from tqdm import tqdm  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise ImportError(
            "progress=True shows a bar with tqdm, which is missing: pip install tqdm"
        ) from error
    return tqdm
