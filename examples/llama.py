"""A Llama-family language model in Flax NNX that reads and writes a paxcache.

Covers Llama 3.x, Qwen2.5, Qwen3 and Mistral: RMSNorm, rotary positions (plain, "linear" or "llama3"
scaled), grouped-query attention, SwiGLU, and optionally QK-norm, attention biases, tied embeddings and
a sliding window. Owns the model and its two caches' glue; knows nothing of files (see checkpoint.py).

Layers are modules with arrays of their own, one after the other in the program: a scan over stacked
ones would compile faster and copy each layer's weights out of the stack in every step. Everything but
attention is written once; attention is a function passed in:

- `paged_model(model)`  packed tokens `[T]` over a `paxcache.PagedKVCache`: what serves.
- `dense_model(model)`  padded tokens `[B, Q]` over a `[B, max_len, K, D]` buffer a layer: the baseline.
- `model(tokens)`       padded tokens `[B, Q]` and no cache: training and scoring.

Axes: L layers, B rows, Q tokens of a row, T packed tokens, E hidden size, V vocabulary,
H query heads, K KV heads, D head dim, F feed-forward size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import paxcache

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float, Int32

# attend(cache, layer index, q, k, v) -> (output, cache): stores k and v, then attends. q is [..., H, D].
Attend = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]


# --------------------------------------------------------------------------------------------------
# Configuration
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the model was first trained on."""

    kind: str  # "linear" or "llama3"
    factor: float
    # The rest is for "llama3": wavelengths shorter than original_max_len / high_freq_factor stay as they
    # are, longer than original_max_len / low_freq_factor are stretched by `factor`, between them blended.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192

    def __post_init__(self):
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope scaling kind must be 'linear' or 'llama3', got {self.kind!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a model; hashable, so it may be a static argument of `jax.jit`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_len: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_window: int | None = None  # a token sees itself and the sliding_window - 1 tokens before it

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary pairs), got {self.head_dim}")


def cache_config(
    config: LlamaConfig,
    *,
    num_pages: int,
    max_seqs: int,
    max_len: int,
    page_size: int = 16,
    dtype: DTypeLike = jnp.bfloat16,
) -> paxcache.CacheConfig:
    """The paged cache that fits `config`: `max_seqs` rows of up to `max_len` tokens share `num_pages`."""
    return paxcache.CacheConfig(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        page_size=page_size,
        num_pages=num_pages,
        max_seqs=max_seqs,
        max_pages_per_seq=-(-max_len // page_size),
        dtype=dtype,
        sliding_window=config.sliding_window,
    )


# --------------------------------------------------------------------------------------------------
# Rotary positions
# --------------------------------------------------------------------------------------------------


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angle per token of each rotary pair, f32[D/2], with the config's scaling applied."""
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-pairs
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32)
    # Turns a pair makes over the original context: few turns means a slow pair, which is stretched.
    turns = scaling.original_max_len * frequencies / (2 * np.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0.0, 1.0)
    return ((1 - keep) * stretched + keep * frequencies).astype(np.float32)


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """Turns the pairs (x[i], x[i + D/2]) of x [..., heads, D] by its token's angles, in float32.

    `rope` holds the cosines and sines of the angles, each [..., D/2].
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (values[..., None, :] for values in rope)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


class Layer(nnx.Module):
    """One transformer layer; works on any leading axes, packed [T, E] or padded [B, Q, E]."""

    def __init__(self, config: LlamaConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        c = config
        q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        # Norms compute in float32 whatever the compute dtype; their callers cast back.
        norm = functools.partial(
            nnx.RMSNorm, epsilon=c.norm_eps, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
        )

        def linear(in_size: int, out_size: int, use_bias: bool = False) -> nnx.Linear:
            return nnx.Linear(
                in_size, out_size, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
            )

        self.head_dim = c.head_dim
        self.input_norm = norm(c.hidden_size)
        self.q_proj = linear(c.hidden_size, q_size, c.qkv_bias)
        self.k_proj = linear(c.hidden_size, kv_size, c.qkv_bias)
        self.v_proj = linear(c.hidden_size, kv_size, c.qkv_bias)
        self.o_proj = linear(q_size, c.hidden_size, c.out_bias)
        self.q_norm = norm(c.head_dim) if c.qk_norm else None
        self.k_norm = norm(c.head_dim) if c.qk_norm else None
        self.post_norm = norm(c.hidden_size)
        self.gate_proj = linear(c.hidden_size, c.intermediate_size)
        self.up_proj = linear(c.hidden_size, c.intermediate_size)
        self.down_proj = linear(c.intermediate_size, c.hidden_size)

    def __call__(self, x: Array, rope: tuple[Array, Array], attend: Attend, cache: Any, index: Any):
        """x [..., E] -> x [..., E], and the cache with this layer's keys and values in it."""
        h = self.input_norm(x).astype(x.dtype)
        q, k, v = (self._heads(projection(h)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).astype(x.dtype), self.k_norm(k).astype(x.dtype)
        out, cache = attend(cache, index, rotate(q, rope), rotate(k, rope), v)
        x = x + self.o_proj(out.reshape(*x.shape[:-1], -1))
        h = self.post_norm(x).astype(x.dtype)
        return x + self.down_proj(nnx.silu(self.gate_proj(h)) * self.up_proj(h)), cache

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.head_dim)


class Llama(nnx.Module):
    """A decoder-only transformer of the Llama family.

    Args:
        config: the model's shape.
        dtype: compute dtype of the matrix products; norms, softmax, rotary and logits are float32.
        param_dtype: dtype of the weights; `dtype` unless given (training keeps float32 weights).
        rngs: for the random initial weights.

    Example:
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2,
        ...                      num_heads=2, num_kv_heads=1, head_dim=4, max_len=32)
        >>> model = Llama(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((3, 5), jnp.int32)).shape
        (3, 5, 11)

    Reference: Touvron et al. 2023, "LLaMA"; Grattafiori et al. 2024, "The Llama 3 Herd of Models".
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        param_dtype = dtype if param_dtype is None else param_dtype
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=dtype,
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )

        self.layers = nnx.List(
            Layer(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs) for _ in range(config.num_layers)
        )
        self.norm = nnx.RMSNorm(
            config.hidden_size,
            epsilon=config.norm_eps,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        head_shape = (config.vocab_size, config.hidden_size)
        head_init = nnx.initializers.normal(0.02)
        self.lm_head = (
            None if config.tied_embeddings else nnx.Param(head_init(rngs.params(), head_shape, param_dtype))
        )

    def __call__(self, tokens: Int32[Array, "B Q"]) -> Float[Array, "B Q V"]:
        """Logits f32[B, Q, V] of whole sequences, without a cache: for training and scoring."""
        window = self.config.sliding_window

        def attend(cache, index, q, k, v):
            out = jax.nn.dot_product_attention(
                q, k, v, is_causal=True, local_window_size=None if window is None else (window - 1, 0)
            )
            return out, cache

        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = self.hidden(tokens, positions, attend, None)
        return self.logits(hidden)

    def hidden(
        self, tokens: Array, positions: Array, attend: Attend, cache: Any, *, trace_once: bool = False
    ) -> tuple[Array, Any]:
        """Final hidden states [..., E] of tokens i32[...] at positions i32[...], and the cache.

        `trace_once` traces and lowers one layer for all of them: `attend` gets a traced index then.
        """
        angles = positions[..., None].astype(jnp.float32) * rope_frequencies(self.config)
        rope = (jnp.cos(angles), jnp.sin(angles))

        x = self.embed(tokens)
        layout, _ = nnx.split(self.layers[0])  # that of each layer

        @jax.jit
        def run(weights, x, cache, index):
            return nnx.merge(layout, weights)(x, rope, attend, cache, index)

        for index, layer in enumerate(self.layers):
            if trace_once:
                x, cache = run(nnx.state(layer), x, cache, jnp.int32(index))
            else:
                x, cache = layer(x, rope, attend, cache, index)
        return self.norm(x).astype(x.dtype), cache

    def logits(self, hidden: Float[Array, "... E"]) -> Float[Array, "... V"]:
        """The vocabulary projection, accumulated and returned in float32."""
        head = self.embed.embedding if self.lm_head is None else self.lm_head
        weights = head[...].astype(hidden.dtype)
        return jnp.einsum("...e,ve->...v", hidden, weights, preferred_element_type=jnp.float32)


# --------------------------------------------------------------------------------------------------
# Over a paged cache
# --------------------------------------------------------------------------------------------------


def paged_model(model: Llama) -> tuple[Callable[..., tuple[Array, paxcache.PagedKVCache]], nnx.State]:
    """Splits `model` into (model function over a paged cache, parameters).

    The function is what `paxcache.generate` calls:
    `model_fn(params, tokens i32[T], cache, step, logits_at i32[N]) -> (logits f32[N, V], cache)`,
    where `step` comes from `paxcache.extend(cache, query_lens, num_tokens=T)` and `logits_at` picks the
    packed tokens whose next-token logits are wanted; only those pass through the vocabulary projection.
    Keep the returned function: `jax.jit` compiles once per function object.

    Example:
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2,
        ...                      num_heads=2, num_kv_heads=1, head_dim=4, max_len=32)
        >>> model_fn, params = paged_model(Llama(config, rngs=nnx.Rngs(0)))
        >>> pages = cache_config(config, num_pages=8, max_seqs=2, max_len=32, dtype=jnp.float32)
        >>> cache, step = paxcache.extend(paxcache.init(pages), jnp.array([2, 1]), num_tokens=4)
        >>> tokens, last = jnp.array([5, 7, 3, 0]), jnp.array([1, 2])  # two of row 0, one of row 1, padding
        >>> logits, cache = jax.jit(model_fn)(params, tokens, cache, step, last)
        >>> logits.shape
        (2, 11)
    """
    graphdef, params = nnx.split(model)

    def model_fn(params, tokens, cache, step, logits_at):
        model = nnx.merge(graphdef, params)
        window = model.config.sliding_window

        def attend(cache, index, q, k, v):
            cache = paxcache.append(cache, (0, index), k, v, step)
            return paxcache.attend(cache, (0, index), q, step, sliding_window=window), cache

        hidden, cache = model.hidden(tokens, step.positions, attend, cache, trace_once=True)
        return model.logits(hidden[logits_at]), cache

    return model_fn, params


# --------------------------------------------------------------------------------------------------
# Over a dense cache: the baseline that the paged one is compared with
# --------------------------------------------------------------------------------------------------


class DenseCache(NamedTuple):
    """Keys and values of every row, reserved up to max_len whatever the rows' lengths.

    One buffer a layer: attention would have to copy a layer's keys and values out of a stack [L, ...]
    before it multiplies them, which costs more than attending to them.
    """

    k: tuple[Array, ...]  # L times [B, max_len, K, D]
    v: tuple[Array, ...]  # L times [B, max_len, K, D]


def init_dense(
    config: LlamaConfig, *, max_seqs: int, max_len: int, dtype: DTypeLike = jnp.bfloat16
) -> DenseCache:
    """An empty dense cache for `max_seqs` rows of up to `max_len` tokens."""
    shape = (max_seqs, max_len, config.num_kv_heads, config.head_dim)
    layers = range(config.num_layers)
    return DenseCache(
        k=tuple(jnp.zeros(shape, dtype) for _ in layers), v=tuple(jnp.zeros(shape, dtype) for _ in layers)
    )


def dense_model(
    model: Llama, *, implementation: Literal["xla", "cudnn"] | None = None
) -> tuple[Callable[..., tuple[Array, DenseCache]], nnx.State]:
    """Splits `model` into (model function over a dense cache, parameters).

    `model_fn(params, tokens i32[B, Q], cache, positions i32[B, Q], logits_at i32[B]) ->
    (logits f32[B, V], cache)`: row b's logits are those after its token `logits_at[b]`. A row shorter
    than Q is padded at its end with further positions: real tokens never look ahead, and the next call
    overwrites what the padding stored. `implementation` goes to `jax.nn.dot_product_attention`.
    """
    graphdef, params = nnx.split(model)
    attention = functools.partial(jax.nn.dot_product_attention, implementation=implementation)

    def model_fn(params, tokens, cache, positions, logits_at):
        model = nnx.merge(graphdef, params)
        window = model.config.sliding_window
        rows = jnp.arange(tokens.shape[0])
        key_positions = jnp.arange(cache.k[0].shape[1])
        visible = key_positions <= positions[..., None]  # [B, Q, max_len]
        if window is not None:
            visible &= key_positions > positions[..., None] - window

        def store(buffers, index, new):
            buffer = buffers[index]
            buffer = buffer.at[rows[:, None], positions].set(new.astype(buffer.dtype), mode="drop")
            return (*buffers[:index], buffer, *buffers[index + 1 :])

        def attend(cache, index, q, k, v):
            cache = DenseCache(store(cache.k, index, k), store(cache.v, index, v))
            keys, values = cache.k[index].astype(q.dtype), cache.v[index].astype(q.dtype)
            if tokens.shape[1] == 1 and window is None:
                # One token a row: lengths say the same as the mask, and fused kernels prefer them.
                return attention(q, keys, values, key_value_seq_lengths=positions[:, 0] + 1), cache
            return attention(q, keys, values, mask=visible[:, None]), cache

        hidden, cache = model.hidden(tokens, positions, attend, cache)
        return model.logits(hidden[rows, logits_at]), cache

    return model_fn, params
