"""Paged attention for Flax NNX models.

    config = paxcache.nnx.cache_config(model, num_pages=4096, max_seqs=64, max_pages_per_seq=512)
    model, cache = paxcache.nnx.paginate(model, config)     # stock attention layers become paged, parameters are shared
    step = cache.extend(query_lens, max_query_len=Q)        # once before each forward pass
    logits = model(tokens)                                  # [B, Q, ...], rows of different lengths

One `PagedCache` is shared by reference by all layers: one pool, one block table, one `extend` a pass. So a model runs
under NNX's transformations in graph mode, where references are kept (`nnx.jit`, `nnx.remat`, `nnx.scan` with the cache
as carry), under plain `jax.jit` between `nnx.split` and `nnx.merge`, and as the pure function that `model_fn` makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.module import first_from
from flax.nnx.nn import dtypes

from paxcache import _cache, _checks, _forward
from paxcache._nnx_cache import CacheState, DenseCache, PagedCache
from paxcache._types import CacheConfig, PagedKVCache, Step

__all__ = [
    "CacheState",
    "DenseCache",
    "LayerIndex",
    "MultiHeadAttention",
    "PagedCache",
    "cache_config",
    "get_cache",
    "model_fn",
    "paginate",
]

if TYPE_CHECKING:
    from flax.nnx.filterlib import Filter
    from jaxtyping import Array, Float, Int32

    from paxcache._cache import Layer


class LayerIndex(nnx.Variable):
    """Indices of layers that are stacked for a scan, i32[L]; `nnx.scan` slices it like the parameters."""


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`nnx.MultiHeadAttention` whose decode cache is a `PagedCache`. Made by `paginate`, not by its constructor.

    With decode on, inputs are [B, Q, features] with any Q (the stock layer takes one token at a time), or
    [T, 1, features] in a packed step, and each token sees the tokens of its own row up to itself. With decode off it
    is the stock layer. Parameters are those of the stock layer. Rotary embeddings given as
    ``attention_fn=functools.partial(nnx.dot_product_attention_with_rope, rope=rope)`` turn by the tokens' positions
    in their rows.
    """

    paged_cache: PagedCache
    layer: int | LayerIndex | None
    layer_group: int
    masks_are_causal: bool

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
        input_positions: Array | None = None,
    ) -> Array:
        """Attention over the paged cache with decode on, the stock layer's with decode off.

        Args:
          inputs_q, inputs_k, inputs_v: [B, Q, features]; see the stock layer for what None means. With decode on,
            inputs_k must be None or inputs_q itself.
          mask: must be None with decode on, unless the model was paginated with masks_are_causal.
          deterministic: must be true with decode on where dropout_rate is above 0.
          rngs: not used with decode on.
          sow_weights: must be false with decode on: the weights are never materialised.
          decode: whether to use the cache; None takes the attribute.
          is_causal: not used with decode on, which is always causal.
          out_sharding, qkv_sharding: as in the stock layer.
          input_positions: positions for rotary embeddings; None takes the step's.

        Returns:
          [B, Q, out_features].

        Raises:
          ValueError: an argument cannot be honoured, no step is under way, or a shape does not fit.
        """
        decode = first_from(
            decode, self.decode, error_msg="decode: give it in the call, the constructor or the view."
        )
        if not decode:
            return super().__call__(
                inputs_q,
                inputs_k,
                inputs_v,
                mask=mask,
                deterministic=deterministic,
                rngs=rngs,
                sow_weights=sow_weights,
                decode=False,
                is_causal=is_causal,
                out_sharding=out_sharding,
                qkv_sharding=qkv_sharding,
                input_positions=input_positions,
            )
        if self.dropout_rate > 0:
            deterministic = first_from(
                deterministic,
                self.deterministic,
                error_msg="deterministic: give it in the call or the constructor where dropout_rate is above 0.",
            )
        _forward.refuse_unsupported(
            mask=None if self.masks_are_causal else mask,
            dropout=self.dropout_rate > 0 and not deterministic,
            sow_weights=sow_weights,
        )
        if inputs_k is None:
            if inputs_v is not None:
                raise ValueError("inputs_k: must be given where inputs_v is")
            inputs_k = inputs_q
        if inputs_v is None:
            inputs_v = inputs_k
        _forward.refuse_cross_attention(inputs_q, inputs_k)
        query = self.query(inputs_q, out_sharding=qkv_sharding)
        key = self.key(inputs_k, out_sharding=qkv_sharding)
        value = self.value(inputs_v, out_sharding=qkv_sharding)
        if self.query_ln is not None and self.key_ln is not None:
            query, key = self.query_ln(query), self.key_ln(key)
        layer = self._layer()
        rope = _rope_of(self.attention_fn)
        if rope is not None:
            at = input_positions
            if at is None:
                at = _forward.positions(self.paged_cache.state.get_value(), layer, query.shape[:-2])
            query, key = _rotate(rope, query, at), _rotate(rope, key, at)
        elif input_positions is not None:
            raise ValueError("input_positions: the layer has no rotary embedding to use them")
        query, key, value = dtypes.promote_dtype((query, key, value), dtype=self.dtype)
        variable = self.paged_cache.state
        state, out = _forward.attend(variable.get_value(), layer, query, key, value)
        variable.set_value(state)
        return self.out(out, out_sharding=out_sharding)

    def init_cache(self, input_shape: Any, dtype: Any = None) -> None:
        """Refuses: the layer has no dense cache. ``cache.kv = paxcache.release(cache.kv, rows)`` empties rows.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            "init_cache: the layer is paged and has no dense cache; release the rows of its PagedCache"
        )

    def _layer(self) -> Layer | None:
        return (self.layer_group, self.layer[...]) if isinstance(self.layer, LayerIndex) else self.layer


def _rope_of(attention_fn: Any) -> nnx.RoPE | None:
    """The rotary embedding of a stock attention function; None where it has none.

    Raises:
      ValueError: another attention function, which paged attention cannot stand for.
    """
    if attention_fn is nnx.dot_product_attention:
        return None
    if (
        isinstance(attention_fn, functools.partial)
        and attention_fn.func is nnx.dot_product_attention_with_rope
        and not attention_fn.args
        and set(attention_fn.keywords) == {"rope"}
    ):
        return attention_fn.keywords["rope"]
    raise ValueError(
        "attention_fn: expected nnx.dot_product_attention, or functools.partial(nnx.dot_product_attention_with_rope, "
        f"rope=...), which paged attention can stand for, got {attention_fn!r}"
    )


def _rotate(rope: nnx.RoPE, x: Float[Array, "... H D"], at: Int32[Array, "..."]) -> Float[Array, "... H D"]:
    """Rotary embedding of each token at its own position; RoPE wants the tokens of one axis before the last."""
    heads_first = x.reshape(-1, *x.shape[-2:]).swapaxes(0, 1)
    return rope(heads_first, at.reshape(-1)).swapaxes(0, 1).reshape(x.shape)


def paginate[M: nnx.Module](
    model: M,
    cache: CacheConfig | PagedKVCache,
    *,
    only: Filter = ...,
    masks_are_causal: bool = False,
    count_calls: bool = False,
) -> tuple[M, PagedCache]:
    """A copy of a model whose attention layers keep their keys and values in one paged cache.

    The copy shares all variables with the model, which stays as it is. Every `nnx.MultiHeadAttention` becomes a
    `MultiHeadAttention` of this module with decode on; layers are numbered in the natural order of their paths (layer_2
    before layer_10). Layers that were stacked with `nnx.vmap` for an `nnx.scan` take one index each; their scan must
    carry the cache, ``nnx.StateAxes({nnx.Cache: nnx.Carry, ...: 0})``.

    Args:
      model: a model with stock attention layers.
      cache: a `CacheConfig` for a new cache (see `cache_config`), or a `PagedKVCache`; its layers must be as many as
        the model's.
      only: an NNX filter that picks the layers to page, such as self-attention without cross-attention.
      masks_are_causal: declares that masks which the model passes in decode are causal or padding masks, which paged
        attention applies by itself, so that they may be dropped. Otherwise a mask is an error.
      count_calls: layers are counted as they are called: the n-th call of a pass is layer n of the cache. For layers
        that share weights (ALBERT) and for a layer inside `nnx.fori_loop`, `nnx.while_loop` or an `nnx.scan` without
        stacked weights. Every pass must make the same calls in the same order. More calls than the cache has layers
        give NaN. The step does not end by itself: a loop of one's own must call `finish` after each pass.

    Returns:
      The copy, and the cache that its layers share.

    Raises:
      ValueError: no layer was found, a layer cannot be paged, or layers and cache do not fit.
      TypeError: an argument is of another type.

    Example:
      >>> import jax.numpy as jnp, paxcache, paxcache.nnx
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1)))
      >>> config = paxcache.nnx.cache_config(model, num_pages=16, max_seqs=2, max_pages_per_seq=8)
      >>> model, cache = paxcache.nnx.paginate(model, config)
      >>> @nnx.jit
      ... def forward(model, cache, x, query_lens):
      ...     step = cache.extend(query_lens, max_query_len=x.shape[1])
      ...     return model(x), step
      >>> y, step = forward(model, cache, jnp.ones((2, 5, 8)), jnp.array([5, 3]))  # prompts of 5 and 3 tokens
      >>> y, step = forward(model, cache, jnp.ones((2, 1, 8)), jnp.array([1, 1]))  # one token each
      >>> y.shape, step.seq_lens.tolist()
      ((2, 1, 8), [6, 4])

    Reference: PagedAttention (Kwon et al., 2023).
    """
    _checks.instance("model", model, nnx.Module)
    holder = PagedCache(cache)
    kv = holder.kv
    if count_calls:
        holder.state.set_value(_forward.counted(kv))
    copy = nnx.clone(model, variables=False, graph=True)
    layers = _attention_layers(copy, only)
    depths = [_stack_depth(name, layer) for name, layer in layers]
    found, expected = sum(depth or 1 for depth in depths), _forward.num_layers(kv)
    if found != expected and not (count_calls and found):
        raise ValueError(
            f"model: {found} attention layers found, but the cache has {expected}{_advice(model, found)}"
        )
    first = 0
    for (name, layer), depth in zip(layers, depths, strict=True):
        index = 0 if count_calls else first
        _forward.check_layer(name, kv, index, _shape(layer))
        group, index = _cache.locate(kv, index)
        if depth is not None and count_calls:
            raise ValueError(
                f"count_calls: {name} is stacked for a scan, where its {depth} layers have indices"
            )
        if depth is not None and index + depth > kv.groups[group].pages.k.shape[0]:
            raise ValueError(f"{name}: the {depth} stacked layers must lie in one layer group of the cache")
        paged: Any = layer
        paged.__class__ = MultiHeadAttention  # the copy's own object, wherever it is referenced
        paged.paged_cache = holder
        paged.layer = (
            LayerIndex(index + jnp.arange(depth)) if depth is not None else None if count_calls else first
        )
        paged.layer_group = group
        paged.masks_are_causal = masks_are_causal
        paged.decode = True
        first += depth or 1
    return copy, holder


def cache_config(
    model: nnx.Module,
    *,
    only: Filter = ...,
    num_layers: int | None = None,
    memory_bytes: int | None = None,
    **arguments: Any,
) -> CacheConfig:
    """The `CacheConfig` of a model with stock attention layers, its layers read from the model.

    Args:
      model: a model as `paginate` takes it.
      only: as in `paginate`.
      num_layers: calls of attention layers in one forward pass, for a model to be put on pages with count_calls. None:
        each layer is called once.
      memory_bytes: bytes for the pools, in place of num_pages; see `CacheConfig.fit`.
      **arguments: page_size, num_pages, max_seqs, max_pages_per_seq of `CacheConfig`; dtype, quantization and scales of
        all layers. The dtype is otherwise that which the layer computes in.

    Returns:
      A config with one layer group, or several where neighbouring layers differ.

    Raises:
      ValueError, TypeError: no layer was found, one cannot be paged, or an argument is wrong.

    Example:
      >>> import paxcache.nnx
      >>> from flax import nnx
      >>> model = nnx.MultiHeadAttention(4, 32, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> config = paxcache.nnx.cache_config(model, num_pages=16, max_seqs=2, max_pages_per_seq=8)
      >>> config.num_layers, config.num_kv_heads, config.head_dim, config.dtype.name
      (1, 2, 8, 'float32')
    """
    _checks.instance("model", model, nnx.Module)
    shapes = [
        _shape(layer)
        for name, layer in _attention_layers(model, only)
        for _ in range(_stack_depth(name, layer) or 1)
    ]
    if not shapes:
        raise ValueError(f"model: 0 attention layers found{_advice(model, 0)}")
    if num_layers is not None:
        num_layers = _checks.static_int("num_layers", num_layers, minimum=1)
        if len(set(shapes)) > 1:
            raise ValueError("num_layers: expected layers of one shape, which calls can count")
        shapes = shapes[:1] * num_layers
    return _forward.config_for(shapes, memory_bytes, arguments)


def _attention_layers(model: nnx.Module, only: Filter) -> list[tuple[str, nnx.MultiHeadAttention]]:
    """The attention layers that a filter picks, in natural order, with their names."""
    picked = nnx.filterlib.to_predicate(only)
    found = [
        (path, module)
        for path, module in nnx.iter_modules(model, graph=True)
        if isinstance(module, nnx.MultiHeadAttention) and picked(path, module)
    ]
    found.sort(key=lambda item: _forward.natural_order(item[0]))
    return [("/".join(map(str, path)) or "the model", layer) for path, layer in found]


def _shape(layer: nnx.MultiHeadAttention) -> _forward.LayerShape:
    heads, kv_heads, width = layer.num_heads, layer.num_kv_heads, layer.head_dim
    return _forward.LayerShape(heads, kv_heads, width, width, jnp.dtype(layer.dtype or layer.param_dtype))


def _advice(model: nnx.Module, found: int) -> str:
    """What to do about layers that were not found."""
    if any(isinstance(module, nnx.bridge.ToNNX) for _, module in nnx.iter_modules(model, graph=True)):
        return ". It wraps a Linen module (nnx.bridge.ToNNX): put that on pages with paxcache.linen.model_fn"
    if found:
        return ". Layers that run several times in one pass (shared weights) need count_calls=True"
    return ". Attention modules of your own call PagedCache.attend"


def _stack_depth(name: str, layer: nnx.MultiHeadAttention) -> int | None:
    """How many layers a module stands for if its parameters are stacked; None if they are not.

    Raises:
      ValueError: the layer is of a kind that cannot be paged.
    """
    if type(layer) is not nnx.MultiHeadAttention:
        kind = type(layer).__name__
        raise ValueError(
            f"{name}: a {kind} is not the stock layer; leave it out with only=, or call PagedCache.attend in it"
        )
    _rope_of(layer.attention_fn)
    kernel = layer.query.kernel.shape
    single = (layer.in_features, layer.num_heads, layer.head_dim)
    if kernel == single:
        return None
    if kernel[1:] == single:
        return kernel[0]
    raise ValueError(f"{name}: expected a query kernel of shape {single}, or stacked [L, ...], got {kernel}")


def model_fn(
    model: nnx.Module,
    config: CacheConfig | None = None,
    *,
    call: Callable[[Any, Array, Step, Array], Array] = _forward.logits_of_rows_of_one,
    **options: Any,
) -> tuple[Callable[..., tuple[Array, PagedKVCache]], nnx.State]:
    """A model as the pure function that `paxcache.generate` runs. `paxcache.check_model` tells whether it is right.

    Args:
      model: a model made by `paginate` or with a `PagedCache` of its own; with `config`, one with stock layers.
      config: the cache that the function will be given; the model is paginated for it without allocating a pool.
      call: (model, tokens i32[T], step, logits_at i32[N]) -> logits [N, V]: how to run the model on a packed step. The
        default calls ``model(tokens[:, None])`` and picks from its [T, 1, V]. Write your own for a model that takes
        positions (``step.positions[:, None]``; one that makes them by ``arange(tokens.shape[1])`` would get zeros), or
        to compute the logits of `logits_at` only.
      **options: those of `paginate`, with config.

    Returns:
      ``fn(params, tokens, cache, step, logits_at) -> (logits, cache)`` and params, all variables of the model but the
      cache.

    Raises:
      ValueError, TypeError: the model has no `PagedCache` or several; an argument is wrong; or as `paginate`.

    Example:
      >>> import jax.numpy as jnp, paxcache, paxcache.nnx
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Embed(10, 8, rngs=rngs), nnx.MultiHeadAttention(2, 8, rngs=rngs),
      ...                        nnx.Linear(8, 10, rngs=rngs))
      >>> config = paxcache.nnx.cache_config(model, num_pages=16, max_seqs=2, max_pages_per_seq=8)
      >>> fn, params = paxcache.nnx.model_fn(model, config)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([3, 1]), num_tokens=4)
      >>> logits, cache = fn(params, jnp.array([1, 2, 3, 4]), cache, step, jnp.array([2, 3]))
      >>> logits.shape
      (2, 10)
    """
    _checks.instance("model", model, nnx.Module)
    if not callable(call):
        raise TypeError(f"call: expected a function (model, tokens, step, logits_at), got {call!r}")
    if config is not None:
        _checks.instance("config", config, CacheConfig)
        model, _ = paginate(model, jax.eval_shape(lambda: _cache.init(config)), **options)
    elif options:
        raise ValueError(f"model_fn: {', '.join(options)} can be given only with config")
    is_counted = get_cache(model).state.get_value().calls is not None
    graphdef, state, params = nnx.split(model, CacheState, ..., graph=True)
    place = _with_value(state, None)  # keeps no arrays

    def fn(params, tokens, cache, step, logits_at):
        forward = _forward.under_way(cache, step, count_calls=is_counted)
        # Variables of their own: NNX's transformations in the model change them, and must find them in this trace.
        merged = nnx.merge(graphdef, _with_value(place, forward), params, copy=True)
        try:
            logits = call(merged, tokens, step, logits_at)
        except ValueError as error:
            if "leading axis" in str(
                error
            ):  # of a scan's arguments, which name neither the cache nor the remedy
                raise ValueError(
                    "model: an nnx.scan slices the paged cache like the parameters; it must carry it: "
                    "in_axes=nnx.StateAxes({nnx.Cache: nnx.Carry, ...: 0})"
                ) from error
            raise
        return logits, get_cache(merged).kv

    return fn, params


def _with_value(state: nnx.State, value: Any) -> nnx.State:
    """The state of a `PagedCache` with another value, in a new variable."""
    is_cache = lambda v: isinstance(v, CacheState)  # noqa: E731
    return jax.tree.map(lambda variable: variable.replace(value), state, is_leaf=is_cache)


def get_cache(model: nnx.Module) -> PagedCache:
    """The `PagedCache` of a model, for a program that has split and merged it.

    Args:
      model: a model made by `paginate` or with a `PagedCache` of its own.

    Returns:
      The cache that its layers share.

    Raises:
      ValueError: it has none, or several.
    """
    _checks.instance("model", model, nnx.Module)
    caches = [module for _, module in nnx.iter_modules(model, graph=True) if isinstance(module, PagedCache)]
    if len(caches) != 1:
        raise ValueError(
            f"model: expected one PagedCache in it, found {len(caches)}; see paginate, or give config"
        )
    return caches[0]
