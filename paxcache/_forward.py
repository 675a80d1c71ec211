"""What the adapters for Flax share: the state of a forward pass, and a config made of a model's layers. Knows no Flax.

A model's layers run one after another and each wants the same three things: the cache, the step, and its own layer
index. `Forward` holds the first two as one value. Every layer takes the step once, and after the last one the step is
dropped. So the value has the same structure between any two passes (it can be the carry of a loop), and a pass that
begins without `extend` is an error instead of tokens written over others.

Where one module stands for several layers (shared weights, a loop over layers), `Forward` counts the calls: the n-th
call of a pass is layer n. The count is an array, so a loop can carry it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _cache, _checks, _inspect
from paxcache._types import CacheConfig, LayerGroup, PagedKVCache, Step

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

    from paxcache._cache import Layer


class Served(tuple[tuple[int, int], ...]):
    """(group, index) of the layers that took the step, sorted.

    Loops and branches compare the structure of what goes in and comes out, and print this where a layer inside them
    changed it. So its text says what to do.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """The layers, and what to do about them in a loop."""
        return (
            f"<layers {super().__repr__()} of the paged cache took the step: a layer inside a loop needs "
            "count_calls=True, or PagedCache.attend((group, index), ...) with a traced index, and none can be in one "
            "branch of a cond alone>"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forward:
    """A cache and the step of the forward pass under way."""

    kv: PagedKVCache
    step: Step | None = None
    """None between passes."""
    served: Served | None = dataclasses.field(default=None, metadata={"static": True})
    """Layers that took the step; None between passes. Layers with a traced index are not in it."""
    calls: Int32[Array, ""] | None = None
    """Where layers are counted: how many took the step. None where each knows its index."""

    def without_step(self, kv: PagedKVCache) -> Forward:
        """Another cache, between passes."""
        return Forward(kv, calls=None if self.calls is None else jnp.zeros_like(self.calls))


def counted(kv: PagedKVCache) -> Forward:
    """A state, between passes, that counts the calls, each of which is a layer.

    Raises:
      ValueError: the cache has several layer groups.
    """
    if len(kv.groups) != 1:
        raise ValueError(
            f"count_calls: expected a cache with one layer group, whose index can be counted, got {len(kv.groups)}"
        )
    return Forward(kv, calls=jnp.int32(0))


def under_way(kv: PagedKVCache, step: Step, *, count_calls: bool) -> Forward:
    """A state at the beginning of a pass."""
    state = counted(kv) if count_calls else Forward(kv)
    return dataclasses.replace(state, step=step, served=Served())


def num_layers(kv: PagedKVCache) -> int:
    """Layers of all groups."""
    return sum(group.pages.k.shape[0] for group in kv.groups)


def begin(
    state: Forward, query_lens: Any, *, num_tokens: int | None = None, max_query_len: int | None = None
) -> Forward:
    """`extend` for one forward pass. A step left over from a pass that some layers skipped is replaced."""
    kv, step = _cache.extend(state.kv, query_lens, num_tokens=num_tokens, max_query_len=max_query_len)
    return dataclasses.replace(state.without_step(kv), step=step, served=Served())


def attend(
    state: Forward,
    layer: Layer | None,
    q: Float[Array, "... H D"],
    k: Float[Array, "... K D"],
    v: Float[Array, "... K Dv"] | None,
    **options: Any,
) -> tuple[Forward, Float[Array, "... H Dv"]]:
    """Appends a layer's keys and values and attends over the rows' pages. A layer that is None is the next by count.

    The leading axes are [B, Q] in a row-aligned step. In a packed step any axes whose product is T will do, so that a
    model may see the tokens as T rows of one, [T, 1], or as one row, [1, T].
    """
    step = step_for(state, layer)
    lead = _lead_axes(step, q=q, k=k, v=v)
    calls = state.calls
    if layer is None:
        assert calls is not None  # adapters give no index only where layers are counted
        layer, state = (0, calls), dataclasses.replace(state, calls=calls + 1)
    else:
        calls = None
    kv = _cache.append(state.kv, layer, _as_tokens(step, k), _as_tokens(step, v), step)
    out = _cache.attend(kv, layer, _as_tokens(step, q), step, **options)
    if calls is not None:  # more calls than layers cannot raise under a trace; they must not pass unseen
        out = jnp.where(calls < num_layers(kv), out, jnp.nan)
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


def positions(state: Forward, layer: Layer | None, lead: tuple[int, ...]) -> Int32[Array, "..."]:
    """Each token's position in its row, in the leading axes that a layer's inputs have."""
    step = step_for(state, layer)
    _check_lead(step, "inputs", lead)
    return step.positions.reshape(lead)


def step_for(state: Forward, layer: Layer | None) -> Step:
    """The step, for a layer that has not taken it yet, or for the next by count (None).

    Raises:
      ValueError: no step is under way, or the layer took it already.
    """
    if state.step is None:
        raise ValueError(
            f"layer {'by count' if layer is None else repr(layer)}: no step is under way. Call extend once before each "
            "forward pass; the step ends when every layer of the cache has taken it"
        )
    if layer is not None and _cache.locate(state.kv, layer) in (state.served or ()):
        raise ValueError(
            f"layer {layer!r} took this step already. Call extend once before each forward pass. Where a module runs "
            "several times in one pass (shared weights), put the model on pages with count_calls=True"
        )
    return state.step


def _serve(state: Forward, layer: Layer) -> Forward:
    """Marks the layer as served; the last one ends the step."""
    group, index = _cache.locate(state.kv, layer)
    if not isinstance(index, int):  # one trace stands for all layers of a scan: the structure must not change
        return state
    served = Served(sorted((*(state.served or ()), (group, index))))
    if len(served) == num_layers(state.kv):
        return state.without_step(state.kv)
    return dataclasses.replace(state, served=served)


def _check_lead(step: Step, name: str, lead: tuple[int, ...]) -> None:
    shape = step.positions.shape
    if len(shape) == 2 and lead != shape:
        raise ValueError(
            f"{name}: expected leading axes [B={shape[0]}, Q={shape[1]}] as the step has, got {lead}; a layer sees all "
            "rows at once, so it cannot be mapped over them by vmap"
        )
    if len(shape) == 1 and np.prod(lead, dtype=int) != shape[0]:
        raise ValueError(
            f"{name}: expected T={shape[0]} tokens, as [T, 1] or [1, T], got leading axes {lead}; a layer sees all "
            "tokens at once, so it cannot be mapped over them by vmap"
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


def check_layer(name: str, kv: PagedKVCache, layer: Layer, shape: LayerShape) -> None:
    """An attention layer's KV heads and widths against those of its pools.

    Raises:
      ValueError: they differ.
    """
    group, _ = _cache.locate(kv, layer)
    pages = kv.groups[group].pages
    K, D = pages.k.shape[2], pages.k.shape[4]
    Dv = 0 if pages.v is None else pages.v.shape[4]
    if (shape.num_kv_heads, shape.head_dim, shape.v_head_dim) != (K, D, Dv):
        v = "" if shape.v_head_dim == shape.head_dim else f" and v_head_dim={shape.v_head_dim}"
        raise ValueError(
            f"{name} has num_kv_heads={shape.num_kv_heads} and head_dim={shape.head_dim}{v}; its layer of the cache, "
            f"{layer!r}, has num_kv_heads={K}, head_dim={D} and v_head_dim={Dv}"
        )


class LayerShape(NamedTuple):
    """What a cache has to know of an attention layer."""

    num_heads: int | None
    """Query heads; None where the layer does not tell."""
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    dtype: Any
    sliding_window: int | None = None


_READ_FROM_MODEL = (
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "v_head_dim",
    "sliding_window",
    "groups",
)


def config_for(
    shapes: Sequence[LayerShape], memory_bytes: int | None, arguments: dict[str, Any]
) -> CacheConfig:
    """The config of a cache for layers in order. Neighbours that are alike share a layer group.

    Args:
      shapes: of the layers.
      memory_bytes: for `CacheConfig.fit`; None: arguments has num_pages.
      arguments: the other arguments of `CacheConfig`; a dtype takes the place of the layers' own.

    Raises:
      ValueError, TypeError: an argument is missing, unknown, or read from the model.
    """
    known = {field.name for field in dataclasses.fields(CacheConfig)}
    for name in arguments:
        if name in _READ_FROM_MODEL:
            raise TypeError(
                f"cache_config: {name} is read from the model; leave it out, or write a CacheConfig"
            )
        if name not in known:
            raise TypeError(f"cache_config: {name} is no argument of CacheConfig")
    if (memory_bytes is None) == ("num_pages" not in arguments):
        raise TypeError("cache_config: give exactly one of num_pages and memory_bytes")
    own = {name: arguments.pop(name) for name in ("dtype", "quantization", "scales") if name in arguments}
    tells_heads = any(field.name == "num_heads" for field in dataclasses.fields(LayerGroup))
    groups = []
    for shape, alike in itertools.groupby(shapes):
        fields = {**shape._asdict(), "num_layers": len(list(alike)), **own}
        if not tells_heads:
            del fields["num_heads"]
        groups.append(fields)
    layers = groups[0] if len(groups) == 1 else {"groups": tuple(LayerGroup(**fields) for fields in groups)}
    if memory_bytes is None:
        return CacheConfig(**layers, **arguments)
    return CacheConfig.fit(memory_bytes=memory_bytes, **layers, **arguments)


def logits_of_rows_of_one(model: Any, tokens: Array, step: Step, logits_at: Array) -> Array:
    """A packed step's tokens as rows of one, [T, 1], and the logits of those asked for: how `model_fn` runs a model."""
    del step
    logits = model(tokens[:, None])
    if getattr(logits, "ndim", None) != 3 or logits.shape[:2] != (tokens.shape[0], 1):
        raise ValueError(
            f"model: expected logits [T={tokens.shape[0]}, 1, V] for tokens [T, 1], got {_checks.describe(logits)}; a "
            "model that takes or gives anything else needs call="
        )
    return logits[logits_at, 0]


def refuse_cross_attention(inputs_q: Any, inputs_k: Any) -> None:
    """Keys from other tokens than the queries', which a stock layer takes and pages of one's own row cannot hold.

    Raises:
      ValueError: inputs_k is another array than inputs_q.
    """
    if inputs_k is not inputs_q:
        raise ValueError(
            "inputs_k: expected None or inputs_q itself in decode, where each token's key goes into its own row (so "
            f"both have the same leading axes), got {_checks.describe(inputs_k)} beside inputs_q "
            f"{_checks.describe(inputs_q)}. Leave cross-attention off the pages: only= in NNX, decode=False in Linen. "
            "For self-attention whose keys have other inputs call PagedCache.attend or paxcache.linen.attend in a "
            "module of your own"
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
