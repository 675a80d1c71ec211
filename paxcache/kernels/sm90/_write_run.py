"""What the Hopper kernels that write tokens share. Imports JAX alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

if TYPE_CHECKING:
    from jaxtyping import Array, Int, Int32

type Pairs = list[tuple[Any, Any]]


def pairs(k_pages: Any, v_pages: Any, k: Any, v: Any) -> Pairs:
    """Each pool and the tokens that go there."""
    return [(k_pages, k)] if v_pages is None else [(k_pages, k), (v_pages, v)]


def run(
    write: Callable[..., Any],
    written: Pairs,
    slot_mapping: Int[Array, "T"],
    layer: Int32[Array, ""] | int,
    *,
    heads: tuple[int, ...],
    config: Any,
    interpret: Any,
) -> tuple[Any, Any]:
    """The pools of K and of V with the tokens in them, as `write` leaves them.

    Args:
      write: takes pools and tokens, slots and layer as arrays, and the options.
      written: from `pairs`, at least one token.
      slot_mapping, layer: of any integer type.
      heads: the first head to write of K and of V; that of V counts only where there is one.
      config: with the tokens of a program, ``block_tokens``.
      interpret: see `_mosaic.interpreter`.

    Raises:
      ValueError: a program would have more tokens than there are, or the tokens have too few heads.
    """
    num_tokens = written[0][1].shape[0]
    if not 1 <= config.block_tokens <= num_tokens:
        raise ValueError(f"config: block_tokens must be in [1, {num_tokens}], got {config.block_tokens}")
    heads = heads[: len(written)]
    for name, head, (pages, tokens) in zip("kv", heads, written, strict=False):
        if not 0 <= head <= tokens.shape[1] - pages.shape[2]:
            raise ValueError(
                f"{name}_head: expected {pages.shape[2]} heads from it on in {name} {tokens.shape}, got {head}"
            )
    if slot_mapping.dtype not in (jnp.int32, jnp.int64):
        slot_mapping = slot_mapping.astype(jnp.int32)
    pools, tokens = zip(*written, strict=True)
    layer = jnp.asarray(layer, jnp.int32)
    pools = write(pools, tokens, slot_mapping, layer, heads=heads, config=config, interpret=interpret)
    return pools[0], pools[1] if len(pools) > 1 else None
