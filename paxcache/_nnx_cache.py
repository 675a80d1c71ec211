"""The cache that the layers of an NNX model share, `PagedCache`, and the dense view of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from paxcache import _cache, _checks, _forward
from paxcache._types import CacheConfig, PagedKVCache, Step

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

    from paxcache._cache import Layer


class CacheState(nnx.Cache):
    """The variable of a `PagedCache`: an `nnx.Cache` whose value holds the cache and the step under way."""


class PagedCache(nnx.Module, pytree=False):
    """A paged KV cache, and the step of the forward pass under way, shared by reference by a model's layers.

    All its state is one variable of type `CacheState`, an `nnx.Cache`. Between two passes that state has always the
    same structure, so it can be the carry of a `lax.while_loop`. A plain `jax.jit` of a model would give each layer a
    copy and lose what is written, so it raises a TypeError that says what to write instead.

    Args:
      cache: a `CacheConfig`, for a new cache, or a `PagedKVCache`.

    Raises:
      TypeError: it is neither.

    Example:
      >>> import jax.numpy as jnp, paxcache, paxcache.nnx
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache = paxcache.nnx.PagedCache(config)
      >>> step = cache.extend(jnp.array([3, 1]), max_query_len=3)
      >>> q = k = v = jnp.ones((2, 3, 1, 8))
      >>> cache.attend(0, q, k, v).shape
      (2, 3, 1, 8)
      >>> cache.kv = paxcache.release(cache.kv, jnp.array([True, False]))
      >>> cache.kv.seq_lens.tolist()
      [0, 1]
    """

    def __init__(self, cache: CacheConfig | PagedKVCache):
        """See the class."""
        _checks.instance("cache", cache, CacheConfig, PagedKVCache)
        kv = _cache.init(cache) if isinstance(cache, CacheConfig) else cache
        self.state = CacheState(_forward.Forward(kv))

    @property
    def kv(self) -> PagedKVCache:
        """The cache as a value. Assign one to change it: ``cache.kv = paxcache.release(cache.kv, rows)``.

        An assignment ends the step under way, since a step is valid until the tables change.
        """
        return self.state.get_value().kv

    @kv.setter
    def kv(self, value: PagedKVCache) -> None:
        _checks.instance("kv", value, PagedKVCache)
        self.state.set_value(self.state.get_value().without_step(value))

    @property
    def step(self) -> Step | None:
        """The step of the forward pass under way; None between passes."""
        return self.state.get_value().step

    def extend(
        self,
        query_lens: Int32[Array, "B"],
        *,
        num_tokens: int | None = None,
        max_query_len: int | None = None,
    ) -> Step:
        """Begins a forward pass: `paxcache.extend` on the cache, once for all layers.

        Args:
          query_lens: i32[B] new tokens of each row; 0 leaves a row alone.
          num_tokens: tokens of a packed step, T: layers see [T, 1, ...] or [1, T, ...].
          max_query_len: tokens a row may have in a row-aligned step, Q: layers see [B, Q, ...], and what they give past
            a row's query_lens is not meaningful. Give exactly one of the two.

        Returns:
          The step, which all layers of this pass use. Each layer takes it once; after the last it is no longer held.

        Raises:
          ValueError, TypeError: as `paxcache.extend`.
        """
        state = _forward.begin(
            self.state.get_value(), query_lens, num_tokens=num_tokens, max_query_len=max_query_len
        )
        self.state.set_value(state)
        assert state.step is not None
        return state.step

    def attend(
        self,
        layer: Layer,
        q: Float[Array, "B Q H D"],
        k: Float[Array, "B Q K D"],
        v: Float[Array, "B Q K Dv"] | None,
        **options: Any,
    ) -> Float[Array, "B Q H Dv"]:
        """Appends one layer's keys and values, then attends: what an attention module of your own calls.

        Args:
          layer: a Python int, or (group, index) with an index that may be traced.
          q, k, v: [B, Q, heads, width] in a row-aligned step; [T, 1, ...], [1, T, ...] or [T, ...] in a packed one.
          **options: those of `paxcache.attend` (sm_scale, soft_cap, sliding_window, sinks, causal, implementation).

        Returns:
          The attention's output, shaped like q with the width of v.

        Raises:
          ValueError, TypeError: no step is under way, the layer took it already, or a shape does not fit.
        """
        state, out = _forward.attend(self.state.get_value(), layer, q, k, v, **options)
        self.state.set_value(state)
        return out

    def finish(self) -> None:
        """Drops the step under way, where not every layer took it: layers under `nnx.scan`, or an early exit.

        Only loops need this, whose carry must keep its structure; the next `extend` replaces the step anyway.
        """
        self.kv = self.kv


def _refuse_to_copy(*_: Any) -> Any:
    raise TypeError(
        "PagedCache: a model's layers share it by reference, which plain JAX transformations (jax.jit, jax.checkpoint, "
        "jax.vmap, jax.tree.map) and NNX's tree mode (graph=False) do not keep: what the layers write would be lost. "
        "Write nnx.jit(..., graph=True), or nnx.split the model before jax.jit and nnx.merge it inside, or use the "
        "pure function of paxcache.nnx.model_fn"
    )


# Its leaves can be read (and traced values found among them), but no copy can be made of them. They are the arrays, not
# the variable, whose repetition NNX's tree mode would report first, in words that do not help.
jax.tree_util.register_pytree_node(
    PagedCache, lambda cache: ((cache.state.get_value(),), None), _refuse_to_copy
)


class DenseCache(nnx.Module):
    """A paged cache behind the interface of a dense one, for models that insist on contiguous keys and values.

    Slow: each call copies all the keys and values of a layer, [B, max_len, K, D], through memory. The pool stays paged
    and shared; only the copies are dense.

    Args:
      cache: the `PagedCache`.
      max_len: tokens of each row to return (static).

    Example:
      >>> import jax.numpy as jnp, paxcache, paxcache.nnx
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache = paxcache.nnx.PagedCache(config)
      >>> dense = paxcache.nnx.DenseCache(cache, max_len=10)
      >>> step = cache.extend(jnp.array([3, 1]), max_query_len=3)
      >>> k = v = jnp.ones((2, 3, 1, 8))
      >>> k, v = dense.update(0, k, v)
      >>> k.shape
      (2, 10, 1, 8)
      >>> mask = jnp.arange(10) <= step.positions[:, None, :, None]  # [B, 1, Q, max_len], as Flax wants it
    """

    def __init__(self, cache: PagedCache, *, max_len: int):
        """See the class."""
        _checks.instance("cache", cache, PagedCache, source="paginate")
        self.cache = cache
        self.max_len = _checks.static_int("max_len", max_len, minimum=1)

    def update(
        self, layer: Layer, k: Float[Array, "B Q K D"], v: Float[Array, "B Q K Dv"]
    ) -> tuple[Float[Array, "B N K D"], Float[Array, "B N K Dv"]]:
        """Appends the step's keys and values to a layer and returns all of each row's.

        Args:
          layer: a Python int, or (group, index) with an index that may be traced.
          k, v: as in `PagedCache.attend`.

        Returns:
          k and v, [B, max_len, K, D], zeros past each row's length.

        Raises:
          ValueError, TypeError: as `PagedCache.attend`.
        """
        variable = self.cache.state
        state, full = _forward.update_dense(variable.get_value(), layer, k, v, self.max_len)
        variable.set_value(state)
        return full
