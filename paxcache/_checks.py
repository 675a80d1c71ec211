"""Checks of what users pass, made at trace time.

Every message names the argument, what was expected and what came.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paxcache._types import INT32_MAX, longest_row


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
    except (TypeError, ValueError, OverflowError) as error:
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

    Those on the host that int32 does not hold are refused. Those of wider JAX arrays, whose values may not be known,
    stop at int32's ends: what was out of every range stays so, while a wrapped one might not.
    """
    low, high = -INT32_MAX - 1, INT32_MAX
    if isinstance(value, jax.Array):
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{name}: expected integer values, got {describe(value)}")
        if jnp.iinfo(value.dtype).max <= high:
            return value.astype(jnp.int32)
        least = max(low, int(jnp.iinfo(value.dtype).min))
        return jnp.clip(value, value.dtype.type(least), value.dtype.type(high)).astype(jnp.int32)
    try:
        known = _on_host(name, value)
    except jax.errors.TracerArrayConversionError:  # a list with traced numbers
        return integers(name, jnp.asarray(value))
    if not np.issubdtype(known.dtype, np.integer):
        raise TypeError(f"{name}: expected integer values, got {describe(value)}")
    if known.size and (known.min() < low or known.max() > high):
        raise ValueError(f"{name}: values must fit int32, got {known.min()} to {known.max()}")
    return known.astype(np.int32)


def _on_host(name: str, value: Any) -> np.ndarray:
    """Numbers that are no JAX array, as NumPy has them: of any width, Python's own among them."""
    try:
        value = np.asarray(value)
    except ValueError as error:  # lists of unequal lengths
        raise ValueError(f"{name}: expected an array, got {value!r}") from error
    if value.size == 0 and value.dtype == np.float64:  # an empty list has no type
        value = value.astype(np.int32)
    if value.dtype == object and all(type(x) is int for x in value.flat):  # past 64 bits
        raise ValueError(f"{name}: values must fit int32, got {min(value.flat)} to {max(value.flat)}")
    return value


def int_array(name: str, value: Any, dims: str, **sizes: int) -> jax.Array:
    """An int32 array, see `integers`."""
    return array(name, integers(name, value), dims, **sizes)


def slots(name: str, value: Any, dims: str, **sizes: int) -> jax.Array:
    """Slots: int32, or int64 where a JAX array is. What int32 does not hold of others is -1: outside every pool."""
    if not isinstance(value, jax.Array):
        value = _on_host(name, value)
        if value.dtype.kind in "iu":
            outside = (value < 0) | (value > INT32_MAX)
            value = np.where(outside, 0, value).astype(np.int32)
            value[outside] = -1
    result = array(name, value, dims, dtype=jnp.integer, **sizes)
    if result.dtype in (jnp.uint32, jnp.uint64):
        return jnp.where(result > result.dtype.type(INT32_MAX), -1, result.astype(jnp.int32))
    return result if result.dtype == jnp.int64 else result.astype(jnp.int32)


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
    """A Python int of at least `minimum` and at most `maximum`; a traced value is refused with advice."""
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


def step_size(
    num_tokens: int | None, max_query_len: int | None, max_seqs: int
) -> tuple[int | None, int | None]:
    """The size of a step, packed (with or without a bound for rows) or row-aligned, whose tokens int32 counts."""
    if num_tokens is None and max_query_len is None:
        raise ValueError("give num_tokens (packed), max_query_len (row-aligned) or both (packed, short rows)")
    if num_tokens is not None:
        num_tokens = static_int("num_tokens", num_tokens, minimum=1)
        if (num_tokens + 1) * max_seqs > INT32_MAX:
            raise ValueError(f"num_tokens: {num_tokens} tokens × {max_seqs} rows overflow int32")
    if max_query_len is not None:
        max_query_len = static_int("max_query_len", max_query_len, minimum=1)
        if num_tokens is None and max_query_len * max_seqs > INT32_MAX:
            raise ValueError(f"max_query_len: {max_query_len} tokens × {max_seqs} rows overflow int32")
    return num_tokens, max_query_len


def row_room(max_pages: int, page_size: int) -> None:
    """Refuses block tables whose rows have room for more tokens than int32 counts."""
    if max_pages * page_size > longest_row(page_size):
        raise ValueError(
            f"block_tables: rows must have room for at most {longest_row(page_size)} tokens (positions are int32), got "
            f"M={max_pages} pages of {page_size}"
        )


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
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, (int, np.integer)):
        return static_int(name, value, minimum=1, maximum=INT32_MAX)
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
