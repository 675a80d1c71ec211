"""What quantised pages cost and save: calibration of scales, the text, and the likelihood of text never seen.

    python examples/quantize.py [--model DIR] [--windows 8] [--prompt "..."]

For each format a model reads held-out text and writes some of its own, its keys and values in quantised pages. Scales
are computed for each token and head while writing, or measured before on a few prompts: the largest magnitude in each
layer, as calibrated checkpoints carry them. The last lines leave the first and the last layer exact, by layer groups.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checkpoint
import llama
import paxcache
import train_tiny
from paxcache.ops import FORMATS

WINDOW, CHUNK = 512, 64  # tokens of a piece of text, and of a step through it
CALIBRATION = (
    "The import statement",
    "A generator function is",
    "The following sections describe",
    "Classes can be",
)
HEADROOM = 1.1  # scales leave room for values somewhat larger than any that calibration saw


def read_all(model_fn: Callable, params: Any, cache: paxcache.PagedKVCache, windows: jax.Array):
    """Runs windows i32[B, N] through a cache in chunks: the mean negative log-likelihood in nats, and the cache.

    Each chunk attends to the pages of all before it and to its own, so every score meets quantised keys.
    """
    B, N = windows.shape
    inputs, targets = windows[:, :-1], windows[:, 1:]

    def step(carry, at):
        cache, total = carry
        lens = jnp.minimum(N - 1 - at, CHUNK) * jnp.ones(B, jnp.int32)
        cache, step = paxcache.extend(cache, lens, num_tokens=B * CHUNK)
        rows, here = jnp.minimum(step.rows, B - 1), step.rows < B
        logits, cache = model_fn(params, inputs[rows, step.positions], cache, step, jnp.arange(B * CHUNK))
        likelihood = jax.nn.log_softmax(logits)[jnp.arange(B * CHUNK), targets[rows, step.positions]]
        return (cache, total - jnp.sum(jnp.where(here, likelihood, 0))), step.ok.all()

    (cache, total), ok = jax.lax.scan(step, (cache, jnp.float32(0)), jnp.arange(0, N - 1, CHUNK))
    return total / (B * (N - 1)), cache, ok.all()


def calibrate(
    model_fn: Callable, params: Any, config: paxcache.CacheConfig, prompts: list[list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """The largest magnitudes of keys and of values in each layer, f32[L], over some prompts."""
    longest = max(map(len, prompts))
    config = dataclasses.replace(
        config, max_seqs=len(prompts), num_pages=len(prompts) * -(-longest // config.page_size)
    )
    cache, step = paxcache.extend(
        paxcache.init(config), jnp.array([len(p) for p in prompts]), num_tokens=sum(map(len, prompts))
    )
    step.raise_if_failed()
    tokens = jnp.array([token for prompt in prompts for token in prompt])
    _, cache = jax.jit(model_fn)(params, tokens, cache, step, jnp.array([0]))
    layers = range(sum(group.num_layers for group in config.layer_groups))
    largest = [
        [float(jnp.abs(jnp.asarray(x)).max()) for x in paxcache.gather_dense(cache, layer, longest)]
        for layer in layers
    ]
    keys, values = np.array(largest, np.float32).T
    return keys, values


def with_exact_ends(config: paxcache.CacheConfig) -> paxcache.CacheConfig:
    """The first and the last layer exact, the others as they are."""
    (middle,) = config.layer_groups
    end = dataclasses.replace(middle, num_layers=1, quantization=None, scales="per_token_head")
    middle = dataclasses.replace(middle, num_layers=middle.num_layers - 2)
    sizes = {n: getattr(config, n) for n in ("page_size", "num_pages", "max_seqs", "max_pages_per_seq")}
    return paxcache.CacheConfig(groups=(end, middle, end), **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument(
        "--windows", type=int, default=8, help=f"pieces of held-out text, {WINDOW} tokens each"
    )
    parser.add_argument("--prompt", default="The import statement")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()
    if min(args.windows, args.max_new_tokens) < 1:
        parser.error("--windows and --max-new-tokens must be at least 1")

    try:
        loaded = checkpoint.load(args.model, dtype=jnp.float32)
    except (OSError, ValueError) as error:  # what is wrong with the folder, in one line
        parser.exit(1, f"{error}\n")
    model_fn, params = llama.paged_model(loaded.model)
    text = loaded.encode(train_tiny.held_out_text())
    every = len(text) // args.windows  # evenly over the text
    if every < WINDOW + 1:
        parser.error(f"--windows: at most {len(text) // (WINDOW + 1)} fit the text, got {args.windows}")
    windows = jnp.array([text[n * every : n * every + WINDOW + 1] for n in range(args.windows)])
    exact = llama.cache_config(
        loaded.model.config,
        num_pages=args.windows * WINDOW // 16,
        max_seqs=args.windows,
        max_len=WINDOW,
        dtype=jnp.float32,
    )
    keys, values = calibrate(model_fn, params, exact, [loaded.encode(prompt) for prompt in CALIBRATION])
    print("largest magnitudes by layer: keys", np.round(keys, 2), "values", np.round(values, 2))

    prompt = loaded.encode(args.prompt)
    reference: tuple[float, list[int]] | None = None
    print("pages        scales            bytes a token   nats a token   lost      same greedy tokens")
    configs = [(exact, "exact", {})]
    for form in FORMATS:
        quantized = dataclasses.replace(exact, quantization=form)
        configs.append((quantized, form, {}))
        scales = {
            name: HEADROOM * largest / FORMATS[form].largest
            for name, largest in (("k_scales", keys), ("v_scales", values))
        }
        configs.append((dataclasses.replace(quantized, scales="per_tensor"), form, scales))
    configs.append((with_exact_ends(dataclasses.replace(exact, quantization="int4")), "int4, exact ends", {}))
    run = jax.jit(read_all, static_argnums=0, donate_argnums=2)
    for config, name, scales in configs:
        loss, _, ok = run(model_fn, params, paxcache.init(config, **scales), windows)
        assert ok, "the pool is too small"
        written = paxcache.generate(
            model_fn,
            params,
            paxcache.init(config, **scales),
            [prompt],
            max_new_tokens=args.max_new_tokens,
            stop_tokens=loaded.stop_tokens,
        ).to_lists()[0]
        reference = reference or (float(loss), written)
        same = next((n for n, (a, b) in enumerate(zip(written, reference[1])) if a != b), len(written))  # noqa: B905
        kind = "" if name == "exact" else "per tensor" if scales else "per token, head"
        print(
            f"{name:17}{kind:18}{config.page_bytes / config.page_size:8.0f} {loss:16.4f} "
            f"{float(loss) / reference[0] - 1:9.2%} {same:9d} of {len(reference[1])}",
            flush=True,
        )
        if same < len(written):
            print(f"    {args.prompt}{loaded.decode(written, prompt=prompt)!r}")
    print(f"exact text: {args.prompt}{loaded.decode(reference[1], prompt=prompt)!r}" if reference else "")


if __name__ == "__main__":
    main()
