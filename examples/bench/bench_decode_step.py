"""The whole decode step of a Llama-8B-shaped model with random weights: through pages, and over a dense cache.

    python examples/bench/bench_decode_step.py [--cases 1x8k 16x4k 64x4k 64r8k] [--form auto] [--xla] [--steps 20]
                                         [--json FILE] [--tiny]

32 layers of 4096, 32 query and 8 KV heads of 128, MLP 14336, vocabulary 128256, tied embeddings: 15.0 GB of bfloat16.
A case is rows x length ("64r8k": 64 rows of 2k to 8k). Each contestant is one jitted step with its cache donated, from
a token to the most likely next one, called in a loop:

- paged: `extend`, then `append` and `attend` in each layer; pages of 16 tokens in random order. A scan over stacked
  layers, or the layers unrolled with an array each: `--form auto` takes what was faster in the first case.
- cuDNN dense (and XLA dense with `--xla`): `jax.nn.dot_product_attention` over a cache that is as long as the longest
  row, unrolled, with an array a layer: a slice of a stacked one would be a copy.

All start from the same keys and values. The logits of the first step are compared, and a contestant that disagrees with
the first one is reported as WRONG and not timed. "share" is the time to read weights and KV once at 4.5 TB/s over the
time of a step: from the first kernel's start to the last one's end over the loop, the host's clock beside it. The
kernels' times are split by their names; matrix products of XLA's attention count as products. `--tiny` runs on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import paxcache
import timing

PAGE_SIZE = 16
WARMUPS = 3  # the first of them is checked
TOLERANCE = (
    0.2  # of the logits: rounding grows to 0.05 over 32 layers, any other attention gives more than 0.3
)
READ_BYTES_PER_MS = 4.5e9
KINDS = {
    "attention": r"paxcache_(decode|prefill)|cudnn|fmha|flash|sdpa|attention",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitk|dot",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    num_layers: int = 32
    hidden: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp: int = 14336
    vocab: int = 128256


TINY = Shape(num_layers=2, hidden=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp=96, vocab=128)


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


def init_params(shape: Shape, *, stacked: bool) -> dict[str, Any]:
    """Random weights, made on the device; of the layers one tree, stacked, or a list of trees."""
    E, D = shape.hidden, shape.head_dim
    sizes = {
        "qkv": (E, (shape.num_heads + 2 * shape.num_kv_heads) * D),
        "out": (shape.num_heads * D, E),
        "gate_up": (E, 2 * shape.mlp),
        "down": (shape.mlp, E),
    }

    def weights(key, size):
        return jax.random.normal(key, size, jnp.bfloat16) * jnp.bfloat16(size[0] ** -0.5)

    def layer(key):
        keys = jax.random.split(key, len(sizes))
        made = {name: weights(key, size) for key, (name, size) in zip(keys, sizes.items(), strict=True)}
        return made | {name: jnp.ones(E, jnp.bfloat16) for name in ("norm_1", "norm_2")}

    first, *keys = jax.random.split(jax.random.key(0, impl="rbg"), shape.num_layers + 1)
    one = jax.jit(layer)
    layers = (
        jax.jit(lambda keys: lax.map(layer, keys))(jnp.stack(keys)) if stacked else [one(k) for k in keys]
    )
    embed = jax.jit(lambda key: weights(key, (shape.vocab, E)))(first)
    return {"embed": embed, "norm": jnp.ones(E, jnp.bfloat16), "layers": layers}


def normed(x: jax.Array, weight: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return (x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)).astype(weight.dtype) * weight


def rotated(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of [B, heads, D]."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * 500_000.0 ** (-jnp.arange(half) / half)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def layer_step(
    shape: Shape, w: Any, x: jax.Array, positions: jax.Array, attend: Any
) -> tuple[jax.Array, Any]:
    """One layer for a token of each row; `attend` takes q, k, v [B, heads, D] and returns out and the cache."""
    qkv = (normed(x, w["norm_1"]) @ w["qkv"]).reshape(len(x), -1, shape.head_dim)
    q, k, v = jnp.split(qkv, [shape.num_heads, shape.num_heads + shape.num_kv_heads], axis=1)
    out, cache = attend(rotated(q, positions), rotated(k, positions), v)
    x = x + out.reshape(len(x), -1) @ w["out"]
    gate, up = jnp.split(normed(x, w["norm_2"]) @ w["gate_up"], 2, axis=-1)
    return x + (jax.nn.silu(gate) * up) @ w["down"], cache


def next_token(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = normed(x, params["norm"]) @ params["embed"].T
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits


# --------------------------------------------------------------------------------------------------
# The contestants: functions (params, cache, tokens) -> (cache, tokens, logits), and their caches
# --------------------------------------------------------------------------------------------------


def paged_step(shape: Shape, params: Any, cache: paxcache.PagedKVCache, tokens: jax.Array) -> tuple[Any, ...]:
    """One token of every row through pages; a scan where the layers are stacked."""
    B = len(tokens)
    cache, step = paxcache.extend(cache, jnp.ones(B, jnp.int32), max_query_len=1)

    def one(carry, layer):
        (x, cache), (w, index) = carry, layer

        def attend(q, k, v):
            written = paxcache.append(cache, (0, index), k[:, None], v[:, None], step)
            return paxcache.attend(written, (0, index), q[:, None], step)[:, 0], written

        return layer_step(shape, w, x, step.positions[:, 0], attend), None

    carry = params["embed"][tokens], cache
    if isinstance(params["layers"], list):
        for index, w in enumerate(params["layers"]):
            carry, _ = one(carry, (w, index))
    else:
        carry, _ = lax.scan(one, carry, (params["layers"], jnp.arange(shape.num_layers)))
    x, cache = carry
    return cache, *next_token(params, x)


def dense_step(
    shape: Shape, implementation: Any, params: Any, cache: Any, tokens: jax.Array
) -> tuple[Any, ...]:
    """The same over a dense cache: lengths, and [B, capacity, K, D] of keys and of values for each layer."""
    lens, layers = cache
    rows, x, written = jnp.arange(len(tokens)), params["embed"][tokens], []
    for w, (keys, values) in zip(params["layers"], layers, strict=True):

        def attend(q, k, v, keys=keys, values=values):
            new = keys.at[rows, lens].set(k), values.at[rows, lens].set(v)
            options: dict[str, Any] = dict(key_value_seq_lengths=lens + 1, implementation=implementation)
            return jax.nn.dot_product_attention(q[:, None], *new, **options)[:, 0], new

        x, new = layer_step(shape, w, x, lens, attend)
        written.append(new)
    return (lens + 1, written), *next_token(params, x)


def random_kv(shape: Shape, batch: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values [B, capacity, K, D] of one layer; the layers all begin with the same ones."""
    k_key, v_key = jax.random.split(jax.random.key(1))
    size = batch, capacity, shape.num_kv_heads, shape.head_dim
    # Keys so large that few of them get most of the weight: over even weights any attention gives about zero.
    return 1.6 * jax.random.normal(k_key, size, jnp.bfloat16), jax.random.normal(v_key, size, jnp.bfloat16)


def dense_cache(shape: Shape, lens: np.ndarray, extra: int) -> Any:
    capacity = -(-(int(lens.max()) + extra) // 128) * 128
    kv = random_kv(shape, len(lens), capacity)
    return jnp.asarray(lens), [tuple(map(jnp.copy, kv)) for _ in range(shape.num_layers)]


def paged_cache(shape: Shape, lens: np.ndarray, extra: int) -> paxcache.PagedKVCache:
    """Rows of these lengths with room for `extra` tokens each, their pages in random order."""
    pages_of = -(-(lens + extra) // PAGE_SIZE)
    P, M = int(pages_of.sum()), int(pages_of.max())
    sizes: dict[str, Any] = dict(page_size=PAGE_SIZE, num_pages=P, max_seqs=len(lens), max_pages_per_seq=M)
    # The integers come from a cache with hardly any data in its pages.
    small = paxcache.init(paxcache.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, **sizes))
    small, step = paxcache.extend(small, jnp.asarray(lens), max_query_len=int(lens.max()))
    step.raise_if_failed()
    (group,) = small.groups
    page = jax.random.permutation(jax.random.key(2), P)
    tables = jnp.where(group.block_tables >= 0, page[group.block_tables], paxcache.NO_PAGE)

    @jax.jit
    def pool(dense):
        blocks = jnp.swapaxes(dense.reshape(len(lens), M, PAGE_SIZE, *dense.shape[2:]), 2, 3)
        layer = jnp.zeros((P, *blocks.shape[2:]), dense.dtype)
        layer = layer.at[jnp.where(tables >= 0, tables, P)].set(blocks, mode="drop")
        return jnp.broadcast_to(layer, (shape.num_layers, *layer.shape))

    k, v = (pool(x[:, : M * PAGE_SIZE]) for x in random_kv(shape, len(lens), -(-M * PAGE_SIZE // 128) * 128))
    pages = dataclasses.replace(group.pages, k=k, v=v)
    counts = jnp.zeros(P, jnp.int32).at[page].set(group.ref_counts)
    group = dataclasses.replace(group, pages=pages, block_tables=tables, ref_counts=counts)
    cache = dataclasses.replace(small, groups=(group,))
    paxcache.check(cache)
    return cache


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def split_by_kind(events: list[timing.Event], steps: int) -> dict[str, float]:
    """Milliseconds a step of attention, of matrix products, and of the rest, by the kernels' names."""
    split = dict.fromkeys((*KINDS, "rest"), 0.0)
    for name, (_, us) in timing.totals(events).items():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, name, re.IGNORECASE)), "rest")
        split[kind] += us / 1000 / steps
    return split


def measure(
    step: Any, params: Any, cache: Any, tokens: jax.Array, steps: int, expected: Any
) -> dict[str, Any]:
    """Compiles, checks and times a step; `expected` are the logits of the first one, or None."""
    begin = time.perf_counter()
    run: Callable[..., Any] = jax.jit(step, donate_argnums=1).lower(params, cache, tokens).compile()
    result: dict[str, Any] = {"compile_s": time.perf_counter() - begin}
    cache, tokens, logits = run(params, cache, tokens)
    result["logits"] = logits
    if expected is None:
        result["error"] = None if jnp.isfinite(logits).all() else math.nan
    else:
        result["error"] = timing.relative_error(logits, expected)
    if result["error"] is not None and not result["error"] < TOLERANCE:
        return result
    for _ in range(WARMUPS - 1):
        cache, tokens, _ = run(params, cache, tokens)
    jax.block_until_ready(tokens)
    begin = time.perf_counter()
    for _ in range(steps):
        cache, tokens, _ = run(params, cache, tokens)
    jax.block_until_ready(tokens)
    result["wall_ms"] = (time.perf_counter() - begin) * 1000 / steps
    with timing.traced() as events:
        for _ in range(steps):
            cache, tokens, _ = run(params, cache, tokens)
        jax.block_until_ready(tokens)
    if events:
        result["device_ms"] = timing.span_us(events) / 1000 / steps
        result |= {f"{kind}_ms": ms for kind, ms in split_by_kind(events, steps).items()}
        by_time = sorted(timing.totals(events).items(), key=lambda item: -item[1][1])
        result["kernels"] = {name: (n / steps, us / steps) for name, (n, us) in by_time[:30]}
    return result


def line(result: dict[str, Any]) -> str:
    """A result as a line of the table."""
    start = f"{result['case']:8} {result['contestant']:16}"
    if "note" in result:
        return f"{start} {result['note']}"
    numbers = (
        f"{result['ms']:8.2f} {result['share']:6.2f} {result['wall_ms']:8.2f} {result['compile_s']:8.0f}"
    )
    kinds = "".join(f" {result.get(f'{kind}_ms', math.nan):9.2f}" for kind in (*KINDS, "rest"))
    checked = "" if result["error"] is not None else "   unchecked, the first"
    return f"{start} {numbers}{kinds}{checked}"


def row_lens(case: str, tiny: bool) -> np.ndarray:
    """Lengths of a case's rows: "16x4k" are 16 of 4096, "64r8k" are 64 of 2048 to 8192."""
    match = re.fullmatch(r"(\d+)([xr])(\d+)k", case)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected rows x length like 16x4k or 64r8k, got {case!r}")
    rows, longest = int(match[1]), int(match[3]) * 1024
    if tiny:
        rows, longest = min(rows, 4), longest // 64
    if match[2] == "x":
        return np.full(rows, longest, np.int32)
    return np.random.default_rng(2).integers(longest // 4, longest + 1, rows).astype(np.int32)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["1x8k", "16x4k", "64x4k", "64r8k"])
    parser.add_argument("--form", choices=("auto", "scan", "unrolled"), default="auto")
    parser.add_argument("--xla", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    shape, extra = TINY if args.tiny else Shape(), WARMUPS + 2 * args.steps
    facts, results = timing.header("bench_decode_step", shape=dataclasses.asdict(shape), steps=args.steps), []
    forms = ["scan", "unrolled"] if args.form == "auto" else [args.form]
    print("case     contestant         ms/step  share     wall  compile attention  products      rest")

    for case in args.cases:
        lens = row_lens(case, args.tiny)
        tokens = jax.random.randint(jax.random.key(3), lens.shape, 0, shape.vocab)
        contestants = {"cuDNN dense": (dense_cache, functools.partial(dense_step, shape, "cudnn"), False)}
        if args.xla:
            contestants["XLA dense"] = dense_cache, functools.partial(dense_step, shape, "xla"), False
        for form in forms:
            step = functools.partial(paged_step, shape)
            contestants[f"paged {form}"] = paged_cache, step, form == "scan"
        expected, times = None, {}
        for name, (make_cache, step, stacked) in contestants.items():
            result: dict[str, Any] = {"case": case, "contestant": name}
            params = cache = None
            try:
                params, cache = init_params(shape, stacked=stacked), make_cache(shape, lens, extra)
                kv_bytes = 4 * int(lens.sum()) * shape.num_layers * shape.num_kv_heads * shape.head_dim
                num_bytes = sum(x.nbytes for x in jax.tree.leaves(params)) + kv_bytes
                result |= measure(step, params, cache, tokens, args.steps, expected)
                logits = result.pop("logits")
                if "wall_ms" in result:
                    expected = logits if expected is None else expected
                    result["ms"] = times[name] = result.get("device_ms", result["wall_ms"])
                    result["share"] = num_bytes / READ_BYTES_PER_MS / result["ms"]
                else:
                    result["note"] = f"WRONG: relative error {result['error']:.2g} of the logits"
            except Exception as error:  # the other contestants' numbers are worth having
                result["note"] = timing.reason(error)
            del params, cache  # before the next ones are made: together they may not fit
            results.append(result)
            print(line(result), flush=True)
            if args.json:
                args.json.write_text(json.dumps({**facts, "results": results}, indent=1))
        paged = {form: times[f"paged {form}"] for form in forms if f"paged {form}" in times}
        if "cuDNN dense" in times and paged:
            ratio = min(paged.values()) / times["cuDNN dense"]
            print(f"{case:8} paged takes {ratio:.2f} of the time of cuDNN dense", flush=True)
        if paged:
            forms = [min(paged, key=lambda form: paged[form])]
    return results


if __name__ == "__main__":
    main()
