"""Paged attention for Flax Linen models.

    variables = model.init(key, tokens)                                    # layers of this module, with decode=True
    config = paxcache.linen.cache_config(variables, num_pages=4096, max_seqs=64, max_pages_per_seq=512)
    variables = paxcache.linen.init_cache(variables, config)
    variables, step = paxcache.linen.extend(variables, query_lens, max_query_len=Q)     # once before each forward pass
    logits, cache = model.apply(variables, tokens, mutable=["cache"])      # [B, Q, ...], rows of different lengths
    variables = {**variables, **cache}

The "cache" collection holds one `PagedKVCache` for the whole model: one pool, one block table, one `extend` a pass. It
stands in the deepest scope that all paged layers share, and each layer looks for it from its own scope upwards.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.linen.module import merge_param

from paxcache import _cache, _checks, _forward, _linen_state
from paxcache._linen_state import STATE, Path, State, Variables
from paxcache._types import CacheConfig, PagedKVCache, Step

if TYPE_CHECKING:
    from flax.core import Scope
    from jaxtyping import Array, Float, Int32

__all__ = [
    "DenseCache",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "SelfAttention",
    "attend",
    "cache_config",
    "extend",
    "get_cache",
    "init_cache",
    "interceptor",
    "model_fn",
    "replace_cache",
]


# What a model is made of.


class MultiHeadDotProductAttention(nn.MultiHeadDotProductAttention):
    """`nn.MultiHeadDotProductAttention` whose decode cache is paged.

    Attributes, parameters and names are those of the stock layer. With decode=True, inputs are [B, Q, features] with
    any Q (the stock layer takes one token at a time), or [T, 1, features] in a packed step, and each token sees the
    tokens of its own row up to itself. With decode=False it is the stock layer.

    Example:
      >>> import jax, jax.numpy as jnp, paxcache, paxcache.linen
      >>> layer = paxcache.linen.MultiHeadDotProductAttention(num_heads=2, decode=True)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 1, 8)))
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=2, head_dim=4, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8, dtype=jnp.float32)
      >>> variables = paxcache.linen.init_cache(variables, config)
      >>> @jax.jit
      ... def forward(variables, x, query_lens):
      ...     variables, step = paxcache.linen.extend(variables, query_lens, max_query_len=x.shape[1])
      ...     y, cache = layer.apply(variables, x, mutable=["cache"])
      ...     return y, {**variables, **cache}
      >>> y, variables = forward(variables, jnp.ones((2, 5, 8)), jnp.array([5, 3]))  # prompts of 5 and 3 tokens
      >>> y, variables = forward(variables, jnp.ones((2, 1, 8)), jnp.array([1, 1]))  # one token each
      >>> y.shape, paxcache.linen.get_cache(variables).seq_lens.tolist()
      ((2, 1, 8), [6, 4])

    Reference: PagedAttention (Kwon et al., 2023).
    """

    @nn.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """The stock layer's arguments; mask, dropout and sow_weights cannot be honoured with decode=True.

        Returns:
          [B, Q, out_features].

        Raises:
          ValueError: an argument cannot be honoured, no step is under way, or a shape does not fit.
        """
        if not self.decode:
            return super().__call__(*args, **kwargs)
        return _decode(self, *args, **kwargs)


class MultiHeadAttention(nn.MultiHeadAttention, MultiHeadDotProductAttention):
    """`nn.MultiHeadAttention` whose decode cache is paged; see `MultiHeadDotProductAttention`."""


class SelfAttention(nn.SelfAttention, MultiHeadDotProductAttention):
    """`nn.SelfAttention` whose decode cache is paged; see `MultiHeadDotProductAttention`."""


def interceptor(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Runs the stock attention layers of a model that cannot be edited as paged ones, where they have decode=True.

    Used as ``with nn.intercept_methods(paxcache.linen.interceptor):`` around `init` and `apply`.

    Args:
      next_fun, args, kwargs, context: what Flax gives to an interceptor.

    Returns:
      What the method returns.

    Raises:
      ValueError: as `MultiHeadDotProductAttention`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, paxcache, paxcache.linen
      >>> model = nn.Sequential([nn.MultiHeadDotProductAttention(num_heads=2, decode=True), nn.Dense(8)])
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=2, head_dim=4, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8, dtype=jnp.float32)
      >>> with nn.intercept_methods(paxcache.linen.interceptor):
      ...     variables = model.init(jax.random.key(0), jnp.ones((2, 1, 8)))
      ...     variables = paxcache.linen.init_cache(variables, config)
      ...     variables, step = paxcache.linen.extend(variables, jnp.array([5, 3]), max_query_len=5)
      ...     y, cache = model.apply(variables, jnp.ones((2, 5, 8)), mutable=["cache"])
      >>> y.shape
      (2, 5, 8)
    """
    module = context.module
    if (
        isinstance(module, nn.MultiHeadDotProductAttention)
        and not isinstance(module, MultiHeadDotProductAttention)
        and context.method_name == "__call__"
        and "inputs_k"
        in inspect.signature(context.orig_method).parameters  # SelfAttention calls its parent's
        and module.decode
    ):
        return _decode(module, *args, **kwargs)
    return next_fun(*args, **kwargs)


def attend(
    module: nn.Module,
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B Q K D"],
    v: Float[Array, "B Q K Dv"] | None,
    **options: Any,
) -> Float[Array, "B Q H Dv"]:
    """Appends one layer's keys and values, then attends: what an attention module of your own calls.

    In `model.init` it makes the layer known to `init_cache` and gives zeros.

    Args:
      module: the calling module, ``self``. It stands for one layer of the cache.
      q, k, v: [B, Q, heads, width] in a row-aligned step; [T, 1, ...] or [1, T, ...] in a packed one. v is None where
        the cache stores no values.
      **options: those of `paxcache.attend` (sm_scale, soft_cap, sliding_window, sinks, causal, implementation).

    Returns:
      The attention's output, shaped like q with the width of v.

    Raises:
      ValueError, TypeError: no step is under way, the layer took it already, or a shape does not fit.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, paxcache, paxcache.linen
      >>> class Attention(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         q = nn.DenseGeneral((4, 8), name="q")(x)
      ...         k, v = nn.DenseGeneral((1, 8), name="k")(x), nn.DenseGeneral((1, 8), name="v")(x)
      ...         return paxcache.linen.attend(self, q, k, v, soft_cap=50.0)
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> model = Attention()
      >>> variables = paxcache.linen.init_cache(model.init(jax.random.key(0), jnp.ones((2, 1, 8))), config)
      >>> variables, step = paxcache.linen.extend(variables, jnp.array([5, 3]), max_query_len=5)
      >>> out, cache = model.apply(variables, jnp.ones((2, 5, 8)), mutable=["cache"])
      >>> out.shape
      (2, 5, 4, 8)
    """
    _checks.instance("module", module, nn.Module)
    scope = _scope(module)
    found = _linen_state.find(scope)
    if found is None:
        _announce(module, _linen_state.LAYER, q, k, v, options.get("sliding_window"))
        return jnp.zeros((*q.shape[:-1], (k if v is None else v).shape[-1]), q.dtype)
    state: State = found.get_variable("cache", STATE)
    layer = state.layer_at(scope.path)
    if "while_loop" in _linen_state.transformations():
        raise ValueError(f"{_linen_state.name_of(scope.path)}: {_linen_state.REMEDIES['while_loop']}")
    forward, out = _forward.attend(state.forward, layer, q, k, v, **options)
    found.put_variable("cache", STATE, dataclasses.replace(state, forward=forward))
    return out


class DenseCache(nn.Module):
    """A paged cache behind the interface of a dense one, for models that insist on contiguous keys and values.

    Slow: each call copies all the keys and values of a layer, [B, max_len, K, D], through memory. The pool stays paged
    and shared; only the copies are dense.

    Attributes:
      max_len: tokens of each row to return.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, paxcache, paxcache.linen
      >>> class Attention(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, positions):
      ...         q, k, v = (nn.DenseGeneral((2, 8), name=name)(x) for name in "qkv")
      ...         k, v = paxcache.linen.DenseCache(max_len=10).update(0, k, v)
      ...         return nn.dot_product_attention(q, k, v, mask=jnp.arange(10) <= positions[:, None, :, None])
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=2, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> model, x = Attention(), jnp.ones((2, 3, 8))
      >>> variables = model.init(jax.random.key(0), x, jnp.zeros((2, 3), jnp.int32))
      >>> variables = paxcache.linen.init_cache(variables, config)
      >>> variables, step = paxcache.linen.extend(variables, jnp.array([3, 1]), max_query_len=3)
      >>> out, cache = model.apply(variables, x, step.positions, mutable=["cache"])
      >>> out.shape
      (2, 3, 2, 8)
    """

    max_len: int

    def update(
        self, layer: int, k: Float[Array, "B Q K D"], v: Float[Array, "B Q K Dv"]
    ) -> tuple[Float[Array, "B N K D"], Float[Array, "B N K Dv"]]:
        """Appends the step's keys and values to a layer and returns all of each row's.

        In `model.init` it makes the layer known to `init_cache` and gives zeros.

        Args:
          layer: the layer of the cache.
          k, v: as in `attend`.

        Returns:
          k and v, [B, max_len, K, D], zeros past each row's length.

        Raises:
          ValueError, TypeError: as `attend`.
        """
        max_len = _checks.static_int("max_len", self.max_len, minimum=1)
        layer = _checks.static_int("layer", layer, minimum=0)
        scope = _scope(self)
        found = _linen_state.find(scope)
        if found is None:
            _announce(self, f"{_linen_state.LAYER}_{layer}", None, k, v, None)
            rows = k.shape[:-3]
            return (
                jnp.zeros((*rows, max_len, *k.shape[-2:]), k.dtype),
                jnp.zeros((*rows, max_len, *v.shape[-2:]), v.dtype),
            )
        state: State = found.get_variable("cache", STATE)
        forward, full = _forward.update_dense(state.forward, layer, k, v, max_len)
        found.put_variable("cache", STATE, dataclasses.replace(state, forward=forward))
        return full


# What a program calls, on a model's variables.


def init_cache(
    variables: Variables,
    config: CacheConfig | PagedKVCache,
    *,
    scanned_in: Path | None = None,
    masks_are_causal: bool = False,
    count_calls: bool = False,
) -> dict[str, Any]:
    """Puts a paged cache into the variables of a model.

    Layers are known from `model.init`, which with decode=True leaves the shape of each in the "cache" collection.
    They are numbered in the natural order of their paths (layer_2 before layer_10). For a checkpoint without a cache,
    ``{**jax.eval_shape(model.init, key, tokens), "params": params}`` has all that is needed.

    Args:
      variables: what `model.init` gave. Entries of "cache" that belong to other layers are kept.
      config: a `CacheConfig` for a new cache (see `cache_config`), or a `PagedKVCache`; its layers must be as many as
        the model's.
      scanned_in: path of the module whose layers run under ``nn.scan(..., variable_carry="cache")``; the scan then
        counts through the layers. All paged layers must lie in it.
      masks_are_causal: declares that masks which the model passes in decode are causal or padding masks, which paged
        attention applies by itself, so that they may be dropped. Otherwise a mask is an error.
      count_calls: layers are counted as they are called: the n-th call of a pass is layer n of the cache. For layers
        that share weights (ALBERT). Every pass must make the same calls in the same order. More calls than the cache
        has layers give NaN. The step does not end by itself, as under a scan: see `replace_cache`.

    Returns:
      The variables with the cache.

    Raises:
      ValueError: no layer was found, layers and cache do not fit, or a transformation around a layer hides the cache.
      TypeError: an argument is of another type.

    Example: see `MultiHeadDotProductAttention`.
    """
    _checks.instance("config", config, CacheConfig, PagedKVCache)
    kv = _cache.init(config) if isinstance(config, CacheConfig) else config
    others, announced = _linen_state.take_announced(variables)
    if scanned_in is not None:
        path, layers = _linen_state.scanned_path(variables, scanned_in), ()
        if announced or len(kv.groups) != 1:
            raise ValueError(
                "scanned_in: expected all paged layers under the scan and one layer group, got "
                f"{len(announced)} layers elsewhere and {len(kv.groups)} groups"
            )
    else:
        layers = () if count_calls and announced else _linen_state.number_layers(announced, kv)
        path = _linen_state.place_for(announced)
    if count_calls or scanned_in is not None:
        forward = _forward.counted(kv)
        for (at, _), layer in announced.items():
            _forward.check_layer(_linen_state.name_of(at), kv, 0, layer.shape)
    else:
        forward = _forward.Forward(kv)
    return {**variables, "cache": _linen_state.put(others, path, State(forward, layers, masks_are_causal))}


def cache_config(
    variables: Variables,
    *,
    scanned_in: Path | None = None,
    num_layers: int | None = None,
    memory_bytes: int | None = None,
    **arguments: Any,
) -> CacheConfig:
    """The `CacheConfig` of a model with paged layers, its layers read from what `model.init` gave.

    Args:
      variables: as `init_cache` takes them.
      scanned_in: as in `init_cache`: the layers are those stock ones whose stacked parameters stand there.
      num_layers: calls of paged layers in one forward pass, for count_calls. None: each layer is called once.
      memory_bytes: bytes for the pools, in place of num_pages; see `CacheConfig.fit`.
      **arguments: page_size, num_pages, max_seqs, max_pages_per_seq of `CacheConfig`; dtype, quantization and scales of
        all layers. The dtype is otherwise that of the layer's keys, under a scan that of its parameters.

    Returns:
      A config with one layer group, or several where neighbouring layers differ.

    Raises:
      ValueError, TypeError: no layer was found, or an argument is wrong.

    Example:
      >>> import jax, jax.numpy as jnp, paxcache.linen
      >>> layer = paxcache.linen.MultiHeadDotProductAttention(num_heads=2, decode=True)
      >>> variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 1, 8)))
      >>> config = paxcache.linen.cache_config(variables, num_pages=16, max_seqs=2, max_pages_per_seq=8)
      >>> config.num_layers, config.num_kv_heads, config.head_dim, config.dtype.name
      (1, 2, 4, 'float32')
    """
    _, announced = _linen_state.take_announced(variables)
    if scanned_in is not None:
        shapes = _linen_state.scanned_shapes(variables, _linen_state.scanned_path(variables, scanned_in))
    else:
        layers = _linen_state.in_order(announced)
        layers.sort(key=lambda item: -1 if item[1] is None else item[1])  # indices of their own count
        shapes = [layer.shape for _, _, layer in layers]
    if not shapes:
        raise ValueError(
            "variables: no paged layer found; they must come from model.init with decode=True, and layers under "
            "nn.scan need scanned_in and the stock layer's parameters"
        )
    if num_layers is not None:
        num_layers = _checks.static_int("num_layers", num_layers, minimum=1)
        if len(set(shapes)) > 1:
            raise ValueError("num_layers: expected layers of one shape, which calls can count")
        shapes = shapes[:1] * num_layers
    return _forward.config_for(shapes, memory_bytes, arguments)


def extend(
    variables: Variables,
    query_lens: Int32[Array, "B"],
    *,
    num_tokens: int | None = None,
    max_query_len: int | None = None,
) -> tuple[dict[str, Any], Step]:
    """Begins a forward pass: `paxcache.extend` on the model's cache, once for all layers.

    Args:
      variables: with a cache, see `init_cache`.
      query_lens: i32[B] new tokens of each row; 0 leaves a row alone.
      num_tokens: tokens of a packed step, T: layers see [T, 1, ...] or [1, T, ...].
      max_query_len: tokens a row may have in a row-aligned step, Q: layers see [B, Q, ...], and what they give past a
        row's query_lens is not meaningful. Give exactly one of the two.

    Returns:
      The variables for `model.apply`, and the step. Each layer takes the step once; after the last one the variables
      hold it no longer, so that they have the same structure between any two passes.

    Raises:
      ValueError, TypeError: as `paxcache.extend`; or the variables hold no cache.

    Example: see `MultiHeadDotProductAttention`.
    """
    path, state = _linen_state.locate(variables)
    forward = _forward.begin(state.forward, query_lens, num_tokens=num_tokens, max_query_len=max_query_len)
    assert forward.step is not None
    return _linen_state.replace(variables, path, state, forward), forward.step


def get_cache(variables: Variables) -> PagedKVCache:
    """The cache of a model.

    Args:
      variables: with a cache, see `init_cache`.

    Returns:
      The cache as a value.

    Raises:
      ValueError: the variables hold none.
    """
    return _linen_state.locate(variables)[1].forward.kv


def replace_cache(variables: Variables, cache: PagedKVCache) -> dict[str, Any]:
    """The variables with another cache, for `release`, `fork`, `truncate` and their like; ends a step under way.

    With the cache that the variables hold, it does just that: ends a step which not every layer took (layers under
    `nn.scan`, or an early exit). Only loops need this, whose carry must keep its structure.

    Args:
      variables: with a cache, see `init_cache`.
      cache: takes its place.

    Returns:
      The variables.

    Raises:
      ValueError: the variables hold no cache.
    """
    _checks.instance("cache", cache, PagedKVCache)
    path, state = _linen_state.locate(variables)
    return _linen_state.replace(variables, path, state, state.forward.without_step(cache))


def model_fn(
    model: nn.Module,
    variables: Variables,
    config: CacheConfig | None = None,
    *,
    call: Callable[[Any, Array, Step, Array], Array] = _forward.logits_of_rows_of_one,
    **options: Any,
) -> tuple[Callable[..., tuple[Array, PagedKVCache]], dict[str, Any]]:
    """A model as the pure function that `paxcache.generate` runs. `paxcache.check_model` tells whether it is right.

    Args:
      model: a model with paged layers.
      variables: from `init_cache`; with `config`, from `model.init`.
      config: the cache that the function will be given; no pool is allocated for it here.
      call: (model, tokens i32[T], step, logits_at i32[N]) -> logits [N, V]: how to run the model on a packed step. The
        default calls ``model(tokens[:, None])`` and picks from its [T, 1, V]. Write your own for a model that takes
        positions (``step.positions[:, None]``; one that makes them by ``arange(tokens.shape[1])`` would get zeros), or
        to compute the logits of `logits_at` only.
      **options: those of `init_cache`, with config.

    Returns:
      ``fn(params, tokens, cache, step, logits_at) -> (logits, cache)`` and params, all variables but the cache.

    Raises:
      ValueError, TypeError: the variables hold no cache; an argument is wrong; or as `init_cache`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, paxcache, paxcache.linen
      >>> attention = paxcache.linen.MultiHeadDotProductAttention(num_heads=2, decode=True)
      >>> model = nn.Sequential([nn.Embed(10, 8), attention, nn.Dense(10)])
      >>> variables = model.init(jax.random.key(0), jnp.array([[0]]))
      >>> config = paxcache.linen.cache_config(variables, num_pages=16, max_seqs=2, max_pages_per_seq=8)
      >>> fn, params = paxcache.linen.model_fn(model, variables, config)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([3, 1]), num_tokens=4)
      >>> logits, cache = fn(params, jnp.array([1, 2, 3, 4]), cache, step, jnp.array([2, 3]))
      >>> logits.shape
      (2, 10)
    """
    _checks.instance("model", model, nn.Module)
    if not callable(call):
        raise TypeError(f"call: expected a function (model, tokens, step, logits_at), got {call!r}")
    if config is not None:
        _checks.instance("config", config, CacheConfig)
        variables = init_cache(variables, jax.eval_shape(lambda: _cache.init(config)), **options)
    elif options:
        raise ValueError(f"model_fn: {', '.join(options)} can be given only with config")
    path, state = _linen_state.locate(variables)
    is_counted, keep = state.forward.calls is not None, (state.layers, state.masks_are_causal)  # no arrays
    others = _linen_state.put(variables["cache"], path, None)
    apply = nn.apply(call, model, mutable=["cache"])

    def fn(params, tokens, cache, step, logits_at):
        forward = _forward.under_way(cache, step, count_calls=is_counted)
        given = {**params, "cache": _linen_state.put(others, path, State(forward, *keep))}
        logits, after = apply(given, tokens, step, logits_at)
        return logits, get_cache(after)

    return fn, {name: value for name, value in variables.items() if name != "cache"}


# Inside a module.


def _decode(
    module: nn.MultiHeadDotProductAttention,
    inputs_q: Array,
    inputs_k: Array | None = None,
    inputs_v: Array | None = None,
    *,
    inputs_kv: Array | None = None,
    mask: Array | None = None,
    deterministic: bool | None = None,
    dropout_rng: Any = None,
    sow_weights: bool = False,
) -> Array:
    """The stock layer with decode=True over the paged cache, with submodules of the same names."""
    del dropout_rng
    if inputs_kv is not None:
        if inputs_k is not None or inputs_v is not None:
            raise ValueError("inputs_kv: give it, or inputs_k and inputs_v, not both")
        inputs_k = inputs_v = inputs_kv
    if inputs_k is None:
        if inputs_v is not None:
            raise ValueError("inputs_k: must be given where inputs_v is")
        inputs_k = inputs_q
    if inputs_v is None:
        inputs_v = inputs_k
    _forward.refuse_cross_attention(inputs_q, inputs_k)
    if module.attention_fn is not nn.dot_product_attention:
        raise ValueError(
            "attention_fn: expected nn.dot_product_attention, which paged attention can stand for, got "
            f"{module.attention_fn!r}; call paxcache.linen.attend in a module of your own"
        )
    for name in ("qk_attn_weights_einsum_cls", "attn_weights_value_einsum_cls"):
        if getattr(module, name) is not None:
            raise ValueError(f"{name}: expected None in decode, where attention runs over pages")
    dropout = module.dropout_rate > 0 and not merge_param(
        "deterministic", module.deterministic, deterministic
    )
    if not module.is_initializing():
        found = _linen_state.find(_scope(module))
        masks_are_causal = found is not None and found.get_variable("cache", STATE).masks_are_causal
        _forward.refuse_unsupported(
            mask=None if masks_are_causal else mask, dropout=dropout, sow_weights=sow_weights
        )
    qkv_features = module.qkv_features or inputs_q.shape[-1]
    if qkv_features % module.num_heads:
        raise ValueError(f"qkv_features: {qkv_features} must be a multiple of num_heads={module.num_heads}")
    settings: dict[str, Any] = dict(
        dtype=module.dtype,
        param_dtype=module.param_dtype,
        use_bias=module.use_bias,
        precision=module.precision,
    )

    def project(x, name):
        dense = nn.DenseGeneral(
            features=(module.num_heads, qkv_features // module.num_heads),
            axis=-1,
            kernel_init=module.kernel_init,
            bias_init=module.bias_init,
            dot_general=module.qkv_dot_general,
            dot_general_cls=module.qkv_dot_general_cls,
            name=name,
            **settings,
        )
        return dense(x)

    query, key, value = project(inputs_q, "query"), project(inputs_k, "key"), project(inputs_v, "value")
    if module.normalize_qk:
        normalize = [
            nn.LayerNorm(use_bias=False, dtype=module.dtype, param_dtype=module.param_dtype, name=name)
            for name in ("query_ln", "key_ln")
        ]
        query, key = normalize[0](query), normalize[1](key)
    query, key, value = promote_dtype(query, key, value, dtype=module.dtype)
    return nn.DenseGeneral(
        features=module.out_features or inputs_q.shape[-1],
        axis=(-2, -1),
        kernel_init=module.out_kernel_init or module.kernel_init,
        bias_init=module.out_bias_init or module.bias_init,
        dot_general=module.out_dot_general,
        dot_general_cls=module.out_dot_general_cls,
        name="out",
        **settings,
    )(attend(module, query, key, value))


def _scope(module: nn.Module) -> Scope:
    if module.scope is None:
        raise ValueError("module: must be bound; call it through model.init or model.apply")
    return module.scope


def _announce(
    module: nn.Module, name: str, q: Array | None, k: Array, v: Array | None, sliding_window: Any
) -> None:
    """Leaves the layer's shape for `init_cache`.

    Raises:
      ValueError: the model is not being initialised, so that a cache should have been found.
    """
    scope = _scope(module)
    if not module.is_initializing():
        raise _linen_state.hidden(scope.path, _linen_state.transformations())
    heads = None if q is None else q.shape[-2]
    window = sliding_window if isinstance(sliding_window, int) else None
    v_width = 0 if v is None else v.shape[-1]
    shape = _forward.LayerShape(heads, k.shape[-2], k.shape[-1], v_width, jnp.dtype(k.dtype), window)
    _linen_state.announce(scope, name, shape)
