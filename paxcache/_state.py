"""What every state of the library is: a frozen dataclass and a pytree, equal to itself alone, with a short repr.

Two states are never compared by value (arrays have no truth value): ``==`` and ``hash`` go by identity, so that a state
may be a key of a dict. A repr shows dtypes and shapes instead of numbers, and never reads a device.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import Any, dataclass_transform

import jax
from jax import export


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
def state[T](cls: type[T]) -> type[T]:
    """Makes a class such a state, which `jax.export` can serialize too.

    Fields are children of the pytree, but for those with ``metadata={"static": True}``, which must be Python literals
    if the state is to be exported.
    """
    if "__repr__" not in vars(cls):
        setattr(cls, "__repr__", brief)  # noqa: B010 (pyright takes it for a method of another signature)
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
    jax.tree_util.register_dataclass(cls)
    module = cls.__module__.rpartition(".")[2].lstrip("_")
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"paxcache.{module}.{cls.__name__}",
        serialize_auxdata=lambda static: repr(static).encode(),
        deserialize_auxdata=lambda text: ast.literal_eval(text.decode()),
    )
    return cls


def brief(value: Any) -> str:
    """The repr of a value in which arrays stand as ``int32[4]``."""
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        shown = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr)
        return f"{type(value).__name__}({', '.join(f'{name}={brief(x)}' for name, x in shown)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(brief, value))}{',' if len(value) == 1 else ''})"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return repr(value)
