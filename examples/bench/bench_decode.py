"""Decoding through pages against decoding over a dense cache: whole steps of the examples' model.

    python examples/bench/bench_decode.py [--batch 8 32] [--length 128 512 2048] [--model DIR]

Both caches run the same model and weights, each as one compiled loop with its cache donated; the dense one uses
`jax.nn.dot_product_attention` and is exactly as long as the longest row. The two are timed in turn, and the ratio is
taken pair by pair, so that a machine whose speed drifts does not decide. "ragged" rows have lengths drawn evenly from
1 to the given length, one row having all of it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import paxcache

EXAMPLES = Path(__file__).parent.parent
sys.path.append(str(EXAMPLES))  # their model

import checkpoint  # noqa: E402
import llama  # noqa: E402

STEPS = 16  # decode steps in one timed loop
PAIRS = 9


def paged_loop(model: llama.Llama, lens: np.ndarray):
    """A function that decodes STEPS tokens from rows of these lengths through pages, and returns the last tokens."""
    B, page_size = len(lens), 16
    config = llama.cache_config(
        model.config,
        num_pages=int(np.sum(-(-(lens + STEPS) // page_size))),
        max_seqs=B,
        max_len=int(lens.max()) + STEPS,
        page_size=page_size,
        dtype=jnp.float32,
    )
    model_fn, params = llama.paged_model(model)

    def step(i, carry):
        tokens, cache = carry
        cache, step = paxcache.extend(cache, jnp.ones(B, jnp.int32), num_tokens=B)
        logits, cache = model_fn(params, tokens, cache, step, jnp.arange(B))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    def run(cache):
        cache = paxcache.truncate(cache, jnp.asarray(lens))
        return jax.lax.fori_loop(0, STEPS, step, (jnp.zeros(B, jnp.int32), cache))

    cache, filled = paxcache.extend(paxcache.init(config), jnp.asarray(lens), max_query_len=int(lens.max()))
    filled.raise_if_failed()
    for layer in range(model.config.num_layers):  # random content: zeros can run faster than real data
        k, v = random_kv(model, layer, (B, int(lens.max())))
        cache = paxcache.append(cache, layer, k, v, filled)
    return jax.jit(run, donate_argnums=0), cache


def dense_loop(model: llama.Llama, lens: np.ndarray):
    """The same over a dense cache."""
    B = len(lens)
    model_fn, params = llama.dense_model(model)
    empty = llama.init_dense(model.config, max_seqs=B, max_len=int(lens.max()) + STEPS, dtype=jnp.float32)
    filled = [random_kv(model, layer, (B, int(lens.max()))) for layer in range(model.config.num_layers)]
    keys, values = (
        tuple(jax.lax.dynamic_update_slice(b, x, (0, 0, 0, 0)) for b, x in zip(buffers, new, strict=True))
        for buffers, new in zip(empty, zip(*filled, strict=True), strict=True)
    )
    cache = llama.DenseCache(keys, values)

    def step(i, carry):
        tokens, cache = carry
        positions = (jnp.asarray(lens) + i)[:, None]
        logits, cache = model_fn(params, tokens[:, None], cache, positions, jnp.zeros(B, jnp.int32))
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    def run(cache):
        return jax.lax.fori_loop(0, STEPS, step, (jnp.zeros(B, jnp.int32), cache))

    return jax.jit(run, donate_argnums=0), cache


def random_kv(model: llama.Llama, layer: int, lead: tuple[int, int]) -> jax.Array:
    shape = (2, *lead, model.config.num_kv_heads, model.config.head_dim)
    return jax.random.normal(jax.random.key(layer), shape)


def compare(model: llama.Llama, lens: np.ndarray) -> tuple[float, float, float]:
    """Median ms a step of paged and dense, and the median of their ratios; checks that the tokens agree."""
    (paged, paged_cache), (dense, dense_cache) = paged_loop(model, lens), dense_loop(model, lens)
    paged_tokens, paged_cache = paged(paged_cache)
    dense_tokens, dense_cache = dense(dense_cache)
    np.testing.assert_array_equal(paged_tokens, dense_tokens)
    times = []
    for _ in range(PAIRS):
        begin = time.perf_counter()
        tokens, paged_cache = paged(paged_cache)
        tokens.block_until_ready()
        middle = time.perf_counter()
        tokens, dense_cache = dense(dense_cache)
        tokens.block_until_ready()
        times.append((middle - begin, time.perf_counter() - middle))
    paged_ms, dense_ms = (statistics.median(t) * 1e3 / STEPS for t in zip(*times, strict=True))
    return paged_ms, dense_ms, statistics.median(p / d for p, d in times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--length", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--model", type=Path, default=EXAMPLES / "tiny")
    args = parser.parse_args()
    try:
        model = checkpoint.load(args.model, dtype=jnp.float32).model
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}; ms a step, medians of {PAIRS} pairs")
    print("batch  length   kind     paged    dense   paged / dense")
    for batch in args.batch:
        for length in args.length:
            rng = np.random.default_rng(length)
            ragged = rng.integers(1, length + 1, batch).astype(np.int32)
            ragged[0] = length
            for kind, lens in (("even", np.full(batch, length, np.int32)), ("ragged", ragged)):
                paged, dense, ratio = compare(model, lens)
                print(
                    f"{batch:5d} {length:7d}   {kind:6} {paged:8.2f} {dense:8.2f}   {ratio:8.2f}", flush=True
                )


if __name__ == "__main__":
    main()
