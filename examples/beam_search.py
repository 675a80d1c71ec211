"""Beam search: the most likely continuations of a prompt, kept in rows that share pages.

    python examples/beam_search.py

The prompt is computed once. After each token `paxcache.reorder` makes every beam a share of the one that it grew from:
integers move, and a page is copied only when a beam writes into one that others use.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

import checkpoint
import llama
import paxcache


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_tokens")
def beam_search(model_fn, params, cache, prompt, *, num_tokens):
    """Continues a prompt i32[T] with as many beams as the cache has rows, B, all of them idle.

    Returns tokens i32[B, num_tokens] and their log-probabilities f32[B], best first, the cache, and whether the pool
    had pages for all of it.
    """
    B, T = cache.max_seqs, prompt.shape[0]
    cache, step = paxcache.extend(cache, jnp.zeros(B, jnp.int32).at[0].set(T), num_tokens=T)
    logits, cache = model_fn(params, prompt, cache, step, jnp.array([T - 1]))
    scores, first = jax.lax.top_k(jax.nn.log_softmax(logits[0]), B)
    cache = paxcache.reorder(cache, jnp.zeros(B, jnp.int32))  # every beam is a share of row 0
    beams = jnp.zeros((B, num_tokens), jnp.int32).at[:, 0].set(first)

    def grow(i, state):
        cache, beams, scores, ok = state
        cache, step = paxcache.extend(cache, jnp.ones(B, jnp.int32), num_tokens=B)
        logits, cache = model_fn(params, beams[:, i - 1], cache, step, jnp.arange(B))
        totals = scores[:, None] + jax.nn.log_softmax(logits)  # of every beam with every token, [B, V]
        scores, best = jax.lax.top_k(totals.reshape(-1), B)
        parents, tokens = jnp.divmod(best, logits.shape[1])
        cache = paxcache.reorder(cache, parents)
        return cache, beams[parents].at[:, i].set(tokens), scores, ok & step.ok.all()

    state = cache, beams, scores, step.ok.all()
    cache, beams, scores, ok = jax.lax.fori_loop(1, num_tokens, grow, state)
    return beams, scores, cache, ok


def main(prompt: str = "The import statement", num_beams: int = 4, num_tokens: int = 24) -> None:
    tiny = checkpoint.load(Path(__file__).parent / "tiny", dtype=jnp.float32)
    model_fn, params = llama.paged_model(tiny.model)
    tokens = tiny.encode(prompt)
    config = llama.cache_config(
        tiny.config, num_pages=32, max_seqs=num_beams, max_len=len(tokens) + num_tokens, page_size=8
    )
    beams, scores, cache, ok = beam_search(
        model_fn, params, paxcache.init(config), jnp.array(tokens), num_tokens=num_tokens
    )
    if not ok:
        raise SystemExit("the pool is too small")
    for beam, score in zip(beams, scores, strict=True):
        print(f"{score:7.2f} {prompt}|{tiny.decode(beam, prompt=tokens)!r}")
    stats = paxcache.stats(cache)
    mapped = int((cache.groups[0].block_tables >= 0).sum())
    print(f"{mapped} pages in {num_beams} block tables, {stats.num_used_pages} pages in the pool")


if __name__ == "__main__":
    main()
