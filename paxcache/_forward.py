"""The state of one forward pass, shared by the adapters for Flax. Imports the core up to `_inspect`, and no Flax.

A model's layers run one after another and each wants the same three things: the cache, the step, and its own layer
index. `Forward` holds the first two as one value. Every layer takes the step once, and after the last one the step is
dropped. So the value has the same structure between any two passes (it can be the carry of a loop), and a pass that
begins without `extend` is an error instead of tokens written over others.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _cache, _checks, _inspect
from paxcache._types import PagedKVCache, Step

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

    from paxcache._cache import Layer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """A cache and the step of the forward pass under way."""

    kv: PagedKVCache
    step: Step | None = None
    """None between passes."""
    served: tuple[tuple[int, int], ...] = dataclasses.field(default=(), metadata={"static": True})
    """(group, index) of the layers that took the step, sorted. Layers with a traced index are not in it."""


def num_layers(kv: PagedKVCache) -> int:
    """Layers of all groups."""
    return sum(group.pages.k.shape[0] for group in kv.groups)


def begin(
    state: Forward, query_lens: Any, *, num_tokens: int | None = None, max_query_len: int | None = None
) -> Forward:
    """`extend` for one forward pass. A step left over from a pass that some layers skipped is replaced."""
    return Forward(*_cache.extend(state.kv, query_lens, num_tokens=num_tokens, max_query_len=max_query_len))


def attend(
    state: Forward,
    layer: Layer,
    q: Float[Array, "... H D"],
    k: Float[Array, "... K D"],
    v: Float[Array, "... K Dv"] | None,
    **options: Any,
) -> tuple[Forward, Float[Array, "... H Dv"]]:
    """Appends a layer's keys and values and attends over the rows' pages.

    The leading axes are [B, Q] in a row-aligned step. In a packed step any axes whose product is T will do, so that a
    model may see the tokens as T rows of one, [T, 1], or as one row, [1, T].
    """
    step = step_for(state, layer)
    lead = _lead_axes(step, q=q, k=k, v=v)
    kv = _cache.append(state.kv, layer, _as_tokens(step, k), _as_tokens(step, v), step)
    out = _cache.attend(kv, layer, _as_tokens(step, q), step, **options)
    return _serve(dataclasses.replace(state, kv=kv), layer), out.reshape(*lead, *out.shape[-2:])


def update_dense(
    state: Forward, layer: Layer, k: Float[Array, "... K D"], v: Float[Array, "... K Dv"], max_len: int
) -> tuple[Forward, tuple[Float[Array, "B max_len K D"], Float[Array, "B max_len K Dv"]]]:
    """Appends a layer's keys and values and returns all of each row's, contiguous, zeros past its length."""
    step = step_for(state, layer)
    _lead_axes(step, k=k, v=v)
    kv = _cache.append(state.kv, layer, _as_tokens(step, k), _as_tokens(step, v), step)
    k_full, v_full = _inspect.gather_dense(kv, layer, max_len)
    assert v_full is not None  # append has checked that v and the group agree
    return _serve(dataclasses.replace(state, kv=kv), layer), (k_full, v_full)


def positions(state: Forward, layer: Layer, lead: tuple[int, ...]) -> Int32[Array, "..."]:
    """Each token's position in its row, in the leading axes that a layer's inputs have."""
    step = step_for(state, layer)
    _check_lead(step, "inputs", lead)
    return step.positions.reshape(lead)


def step_for(state: Forward, layer: Layer) -> Step:
    """The step, for a layer that has not taken it yet.

    Raises:
      ValueError: no step is under way, or the layer took it already.
    """
    if state.step is None:
        raise ValueError(
            f"layer {layer!r}: no step is under way. Call extend once before each forward pass; "
            "the step ends when every layer of the cache has taken it"
        )
    if _cache.locate(state.kv, layer) in state.served:
        raise ValueError(
            f"layer {layer!r} took this step already. Call extend once before each forward pass, "
            "and give a module that runs twice in one pass two layers"
        )
    return state.step


def _serve(state: Forward, layer: Layer) -> Forward:
    """Marks the layer as served; the last one ends the step."""
    group, index = _cache.locate(state.kv, layer)
    if not isinstance(index, int):  # one trace stands for all layers of a scan: the structure must not change
        return state
    served = tuple(sorted((*state.served, (group, index))))
    if len(served) == num_layers(state.kv):
        return Forward(state.kv)
    return dataclasses.replace(state, served=served)


def _check_lead(step: Step, name: str, lead: tuple[int, ...]) -> None:
    shape = step.positions.shape
    if len(shape) == 2 and lead != shape:
        raise ValueError(
            f"{name}: expected leading axes [B={shape[0]}, Q={shape[1]}] as the step has, got {lead}"
        )
    if len(shape) == 1 and np.prod(lead, dtype=int) != shape[0]:
        raise ValueError(
            f"{name}: expected T={shape[0]} tokens, as [T, 1] or [1, T], got leading axes {lead}"
        )


def _lead_axes(step: Step, **arrays: Any) -> tuple[int, ...]:
    """The leading axes that a layer's arrays share, checked against the step's."""
    lead: tuple[int, ...] = ()
    for name, x in arrays.items():
        if x is not None:
            if jnp.ndim(x) < 3:
                raise ValueError(f"{name}: expected [..., heads, head_dim], got {_checks.describe(x)}")
            _check_lead(step, name, x.shape[:-2])
            lead = lead or x.shape[:-2]
    return lead


def _as_tokens(step: Step, x: Any) -> Any:
    """[..., heads, width] with the step's own leading axes."""
    return None if x is None else jnp.reshape(x, (*step.positions.shape, *x.shape[-2:]))


def natural_order(path: tuple[Any, ...]) -> tuple[tuple[int, int, str], ...]:
    """Sort key of a layer's path: digits in names count as numbers, so layer_2 stands before layer_10."""
    parts = [part for name in path for part in re.split(r"(\d+)", str(name)) if part]
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts)


def check_layer(name: str, kv: PagedKVCache, layer: Layer, *, num_kv_heads: int, head_dim: int) -> None:
    """An attention layer's KV heads and widths against those of its pools.

    Raises:
      ValueError: they differ.
    """
    group, _ = _cache.locate(kv, layer)
    pages = kv.groups[group].pages
    K, D = pages.k.shape[2], pages.k.shape[4]
    Dv = 0 if pages.v is None else pages.v.shape[4]
    if (num_kv_heads, head_dim, head_dim) != (K, D, Dv):
        raise ValueError(
            f"{name} has num_kv_heads={num_kv_heads} and head_dim={head_dim}; its layer of the cache, {layer!r}, "
            f"has num_kv_heads={K}, head_dim={D} and v_head_dim={Dv}"
        )


def refuse_unsupported(*, mask: Any, dropout: bool, sow_weights: bool) -> None:
    """What the stock layers take and paged attention cannot honour.

    Raises:
      ValueError: one of them was given.
    """
    if mask is not None:
        raise ValueError(
            f"mask: expected None in decode, got {_checks.describe(mask)}. Paged attention lets each token see its own "
            "row up to itself; if the mask says no more than that, declare it with masks_are_causal=True"
        )
    if dropout:
        raise ValueError("deterministic: expected True in decode, where attention has no dropout")
    if sow_weights:
        raise ValueError(
            "sow_weights: expected False in decode, where attention weights are never materialised"
        )
