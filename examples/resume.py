"""Generation that outlives its process: saved in the middle, loaded, and gone on with bit for bit.

    pip install ".[examples,persist]" && python examples/resume.py

The state is a value, cache and random key included, so a checkpoint of it is all that there is to save.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import checkpoint
import llama
import paxcache
from paxcache import persist


def start(model_fn, params, config, prompt, key):
    """A state whose rows have all read a prompt, but for its last token; the first row reads, the others share it."""
    T, B = len(prompt) - 1, config.max_seqs
    cache, step = paxcache.extend(paxcache.init(config), jnp.zeros(B, jnp.int32).at[0].set(T), num_tokens=T)
    step.raise_if_failed()
    _, cache = jax.jit(model_fn)(params, jnp.array(prompt[:-1]), cache, step, jnp.array([T - 1]))
    cache, _ = paxcache.fork(cache, jnp.zeros(B - 1, jnp.int32), jnp.arange(1, B))
    return {"cache": cache, "newest": jnp.full(B, prompt[-1], jnp.int32), "key": key}


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_steps")
def advance(model_fn, params, state, *, num_steps):
    """Samples num_steps tokens in every row: the next state, tokens i32[B, num_steps], and whether pages sufficed."""
    B = state["cache"].max_seqs

    def body(state, _):
        cache, step = paxcache.extend(state["cache"], jnp.ones(B, jnp.int32), num_tokens=B)
        logits, cache = model_fn(params, state["newest"], cache, step, jnp.arange(B))
        key, now = jax.random.split(state["key"])
        newest = jax.random.categorical(now, logits).astype(jnp.int32)
        return {"cache": cache, "newest": newest, "key": key}, (newest, step.ok.all())

    state, (tokens, ok) = jax.lax.scan(body, state, length=num_steps)
    return state, tokens.T, ok.all()


def main(prompt: str = "The import statement", num_rows: int = 3, num_steps: int = 16) -> None:
    tiny = checkpoint.load(Path(__file__).parent / "tiny", dtype=jnp.float32)
    model_fn, params = llama.paged_model(tiny.model)
    read = tiny.encode(prompt)
    config = llama.cache_config(
        tiny.config, num_pages=32, max_seqs=num_rows, max_len=len(read) + 2 * num_steps, dtype=jnp.float32
    )
    state = start(model_fn, params, config, read, jax.random.key(0))
    state, first, first_ok = advance(model_fn, params, state, num_steps=num_steps)

    with tempfile.TemporaryDirectory() as folder:
        persist.save(folder, state)
        loaded = persist.load(folder)  # in another process, on another day
    _, second, second_ok = advance(model_fn, params, loaded, num_steps=num_steps)
    if not (first_ok and second_ok):
        raise SystemExit("the pool is too small")
    for a, b in zip(first, second, strict=True):
        written = tiny.text_stream(read)
        print(f"{prompt}|{written.push(a)!r} (saved, loaded) {written.push(b, last=True)!r}")

    _, uninterrupted, _ = advance(model_fn, params, state, num_steps=num_steps)
    print("bit for bit as if never saved:", np.array_equal(second, uninterrupted))


if __name__ == "__main__":
    main()
