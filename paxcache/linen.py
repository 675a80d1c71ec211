"""Paged attention for Flax Linen models. Imports Flax; nothing else of the library but `nnx` may.

    variables = model.init(key, tokens)                                    # layers of this module, with decode=True
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
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.linen.module import merge_param

from paxcache import _cache, _checks, _forward
from paxcache._types import CacheConfig, PagedKVCache, Step

if TYPE_CHECKING:
    from flax.core import Scope
    from jaxtyping import Array, Float, Int32

    from paxcache._cache import Layer

type Path = tuple[str, ...]
type Variables = Mapping[str, Any]

_STATE = "paxcache"  # name of the variable that holds the state
_LAYER = (
    "paged_layer"  # what a layer leaves in model.init: an empty array [0, K, D], with its index if it has one
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """The one variable of a paged model."""

    forward: _forward.Forward
    calls: Int32[Array, ""] | None
    """Where layers are scanned: how many of them took the step. None elsewhere."""
    layers: tuple[tuple[Path, Layer], ...] = dataclasses.field(metadata={"static": True})
    """Paths of the layers that found their index in `init_cache`."""
    masks_are_causal: bool = dataclasses.field(metadata={"static": True})


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
    v: Float[Array, "B Q K Dv"],
    **options: Any,
) -> Float[Array, "B Q H Dv"]:
    """Appends one layer's keys and values, then attends: what an attention module of your own calls.

    In `model.init` it makes the layer known to `init_cache` and gives zeros.

    Args:
      module: the calling module, ``self``. It stands for one layer of the cache.
      q, k, v: [B, Q, heads, width] in a row-aligned step; [T, 1, ...] or [1, T, ...] in a packed one.
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
    scope = _scope(module)
    found = _find(scope)
    if found is None:
        _announce(module, scope, _LAYER, k)
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
    state: _State = found.get_variable("cache", _STATE)
    layer, state = _take_layer(state, scope.path)
    forward, out = _forward.attend(state.forward, layer, q, k, v, **options)
    found.put_variable("cache", _STATE, dataclasses.replace(state, forward=forward))
    if (
        state.calls is not None
    ):  # more calls than layers cannot raise under a trace; they must not pass unseen
        out = jnp.where(state.calls <= _forward.num_layers(forward.kv), out, jnp.nan)
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
        found = _find(scope)
        if found is None:
            _announce(self, scope, f"{_LAYER}_{layer}", k)
            rows = k.shape[:-3]
            return (
                jnp.zeros((*rows, max_len, *k.shape[-2:]), k.dtype),
                jnp.zeros((*rows, max_len, *v.shape[-2:]), v.dtype),
            )
        state: _State = found.get_variable("cache", _STATE)
        forward, full = _forward.update_dense(state.forward, layer, k, v, max_len)
        found.put_variable("cache", _STATE, dataclasses.replace(state, forward=forward))
        return full


# What a program calls, on a model's variables.


def init_cache(
    variables: Variables,
    config: CacheConfig | PagedKVCache,
    *,
    scanned_in: Path | None = None,
    masks_are_causal: bool = False,
) -> dict[str, Any]:
    """Puts a paged cache into the variables of a model.

    Layers are known from `model.init`, which with decode=True leaves an empty array for each in the "cache" collection.
    They are numbered in the natural order of their paths (layer_2 before layer_10). For a checkpoint without a cache,
    ``{**jax.eval_shape(model.init, key, tokens), "params": params}`` has all that is needed.

    Args:
      variables: what `model.init` gave. Entries of "cache" that belong to other layers are kept.
      config: a `CacheConfig` for a new cache, or a `PagedKVCache`; its layers must be as many as the model's.
      scanned_in: path of the module whose layers run under ``nn.scan(..., variable_carry="cache")``; the scan then
        counts through the layers. All paged layers must lie in it.
      masks_are_causal: declares that masks which the model passes in decode are causal or padding masks, which paged
        attention applies by itself, so that they may be dropped. Otherwise a mask is an error.

    Returns:
      The variables with the cache.

    Raises:
      ValueError: no layer was found, or layers and cache do not fit.
      TypeError: config is of another type.

    Example: see `MultiHeadDotProductAttention`.
    """
    _checks.instance("config", config, CacheConfig, PagedKVCache)
    kv = _cache.init(config) if isinstance(config, CacheConfig) else config
    announced: dict[tuple[Path, int | None], Any] = {}
    others = _without_layers(variables.get("cache", {}), (), announced)
    if scanned_in is not None:
        if announced or len(kv.groups) != 1:
            raise ValueError(
                "scanned_in: expected all paged layers under the scan and one layer group, got "
                f"{len(announced)} layers elsewhere and {len(kv.groups)} groups"
            )
        path, layers, calls = tuple(scanned_in), (), jnp.int32(0)
    else:
        layers = _number_layers(announced, kv)
        path, calls = _common_path([path for path, _ in announced]), None
    state = _State(_forward.Forward(kv), calls, layers, masks_are_causal)
    return {**variables, "cache": _put(others, path, state)}


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
    path, state = _locate(variables)
    forward = _forward.begin(state.forward, query_lens, num_tokens=num_tokens, max_query_len=max_query_len)
    assert forward.step is not None
    return _replace(variables, path, state, forward), forward.step


def get_cache(variables: Variables) -> PagedKVCache:
    """The cache of a model.

    Args:
      variables: with a cache, see `init_cache`.

    Returns:
      The cache as a value.

    Raises:
      ValueError: the variables hold none.
    """
    return _locate(variables)[1].forward.kv


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
    path, state = _locate(variables)
    return _replace(variables, path, state, _forward.Forward(cache))


def _call(model: Any, tokens: Array, step: Step, logits_at: Array) -> Array:
    """A step's tokens as rows of one token, and the logits of those asked for."""
    del step
    return model(tokens[:, None])[logits_at, 0]


def model_fn(
    model: nn.Module,
    variables: Variables,
    config: CacheConfig | None = None,
    *,
    call: Callable[[Any, Array, Step, Array], Array] = _call,
    **options: Any,
) -> tuple[Callable[..., tuple[Array, PagedKVCache]], dict[str, Any]]:
    """A model as the pure function that `paxcache.generate` runs.

    Args:
      model: a model with paged layers.
      variables: from `init_cache`; with `config`, from `model.init`.
      config: the cache that the function will be given; no pool is allocated for it here.
      call: (model, tokens i32[T], step, logits_at i32[N]) -> logits [N, V]: how to run the model on a packed step. The
        default calls ``model(tokens[:, None])`` and picks from its [T, 1, V]. Write your own for a model that takes
        positions (``step.positions[:, None]``), or to compute the logits of `logits_at` only.
      **options: those of `init_cache`, with config.

    Returns:
      ``fn(params, tokens, cache, step, logits_at) -> (logits, cache)`` and params, all variables but the cache.

    Raises:
      ValueError: the variables hold no cache; or as `init_cache`.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, paxcache, paxcache.linen
      >>> attention = paxcache.linen.MultiHeadDotProductAttention(num_heads=2, decode=True)
      >>> model = nn.Sequential([nn.Embed(10, 8), attention, nn.Dense(10)])
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=2, head_dim=4, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8, dtype=jnp.float32)
      >>> variables = model.init(jax.random.key(0), jnp.array([[0]]))
      >>> fn, params = paxcache.linen.model_fn(model, variables, config)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([3, 1]), num_tokens=4)
      >>> logits, cache = fn(params, jnp.array([1, 2, 3, 4]), cache, step, jnp.array([2, 3]))
      >>> logits.shape
      (2, 10)
    """
    if config is not None:
        variables = init_cache(variables, jax.eval_shape(lambda: _cache.init(config)), **options)
    elif options:
        raise ValueError(f"model_fn: {', '.join(options)} can be given only with config")
    path, state = _locate(variables)
    layers, masks_are_causal, scanned = state.layers, state.masks_are_causal, state.calls is not None
    others = _put(variables["cache"], path, None)
    apply = nn.apply(call, model, mutable=["cache"])

    def fn(params, tokens, cache, step, logits_at):
        calls = jnp.int32(0) if scanned else None
        state = _State(_forward.Forward(cache, step), calls, layers, masks_are_causal)
        given = {**params, "cache": _put(others, path, state)}
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
        found = _find(_scope(module))
        masks_are_causal = found is not None and found.get_variable("cache", _STATE).masks_are_causal
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


def _find(scope: Scope) -> Scope | None:
    """The scope that holds the state: this one or an ancestor."""
    at: Scope | None = scope
    while at is not None:
        if at.has_variable("cache", _STATE):
            return at
        at = at.parent
    return None


def _announce(module: nn.Module, scope: Scope, name: str, k: Array) -> None:
    """Leaves the layer's shape for `init_cache`.

    Raises:
      ValueError: the model is not being initialised, so that a cache should have been found.
    """
    if not module.is_initializing():
        raise ValueError(
            f"{'/'.join(scope.path) or 'the model'}: no paged cache found from here upwards. Call "
            "paxcache.linen.init_cache on the variables first. Inside nn.scan the cache must be carried "
            '(variable_carry="cache", and init_cache with scanned_in); nn.remat, nn.jit and nn.vmap around '
            "single layers hide it"
        )
    root = scope
    while root.parent is not None:
        root = root.parent
    # Under a lifted transformation nothing may be left behind: the carry of a scan must keep its structure.
    if not root.path and scope.is_mutable_collection("cache"):
        scope.put_variable("cache", name, jnp.zeros((0, *k.shape[-2:]), k.dtype))


def _take_layer(state: _State, path: Path) -> tuple[Layer, _State]:
    """The index of the layer at a path."""
    if state.calls is not None:
        return (0, state.calls), dataclasses.replace(state, calls=state.calls + 1)
    layer = dict(state.layers).get(path)
    if layer is None:
        raise ValueError(
            f"{'/'.join(path) or 'the model'}: unknown to the cache, which was made for "
            f"{', '.join('/'.join(known) for known, _ in state.layers) or 'no layer'}"
        )
    return layer, state


# On variables.


def _without_layers(tree: Any, path: Path, announced: dict[tuple[Path, int | None], Any]) -> dict[str, Any]:
    """A copy of a cache collection without what layers left in it, which goes to `announced`."""
    kept = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if inner := _without_layers(value, (*path, name), announced):
                kept[name] = inner
        elif name == _LAYER:
            announced[path, None] = value
        elif name.startswith(f"{_LAYER}_"):
            announced[path, int(name.removeprefix(f"{_LAYER}_"))] = value
        elif name != _STATE:
            kept[name] = value
    return kept


def _number_layers(
    announced: dict[tuple[Path, int | None], Any], kv: PagedKVCache
) -> tuple[tuple[Path, Layer], ...]:
    """The layers without an index of their own, with the indices that are left."""
    given = [index for _, index in announced if index is not None]
    expected = _forward.num_layers(kv)
    if len(announced) != expected or len(set(given)) != len(given) or not set(given) <= set(range(expected)):
        raise ValueError(
            f"variables: the cache has {expected} layers, but {len(announced)} paged layers were found"
            + (f", with the indices {sorted(given)}" if given else "")
            + '; those under nn.scan need variable_carry="cache" and scanned_in, those under nn.remat, nn.jit or '
            "nn.vmap cannot reach a cache that they share with others"
        )
    rest = iter(sorted(set(range(expected)) - set(given)))
    layers = []
    for (path, index), shape in sorted(
        announced.items(), key=lambda item: _forward.natural_order(item[0][0])
    ):
        layer = next(rest) if index is None else index
        _, K, D = shape.shape
        _forward.check_layer("/".join(path) or "the model", kv, layer, num_kv_heads=K, head_dim=D)
        if index is None:
            layers.append((path, layer))
    return tuple(layers)


def _common_path(paths: list[Path]) -> Path:
    """The deepest path that all share."""
    depth = 0
    while all(len(path) > depth and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    return paths[0][:depth]


def _locate(variables: Variables) -> tuple[Path, _State]:
    """Where the state stands in the cache collection."""

    def search(tree, path):
        for name, value in tree.items():
            if name == _STATE and isinstance(value, _State):
                return path, value
            if isinstance(value, Mapping) and (found := search(value, (*path, name))):
                return found
        return None

    found = search(variables.get("cache", {}), ())
    if found is None:
        raise ValueError("variables: expected a paged cache in the collection 'cache'; see init_cache")
    return found


def _put(tree: Any, path: Path, state: _State | None) -> dict[str, Any]:
    """A copy of a cache collection with another state (none at all for None)."""
    copy = dict(tree)
    if path:
        copy[path[0]] = _put(copy.get(path[0], {}), path[1:], state)
    elif state is None:
        copy.pop(_STATE, None)
    else:
        copy[_STATE] = state
    return copy


def _replace(variables: Variables, path: Path, state: _State, forward: _forward.Forward) -> dict[str, Any]:
    """The variables with a new pass or a new cache."""
    calls = None if state.calls is None else jnp.zeros_like(state.calls)
    changed = dataclasses.replace(state, forward=forward, calls=calls)
    return {**variables, "cache": _put(variables["cache"], path, changed)}
