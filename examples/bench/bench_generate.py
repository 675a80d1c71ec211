"""Whole generation: milliseconds a decoding step, and how long the first call takes.

    python examples/bench/bench_generate.py [--cases 0.6b:8x128:greedy ...] [--peers] [--json FILE] [--tiny]

A case is a model's shape, rows x prompt tokens, and how tokens are drawn: "greedy", or "sampled" with temperature
0.8, top-p 0.95 and top-k 50. Weights are random bfloat16. A step's time is the difference of two runs of one compiled
program that differ in the number of tokens, so prompts and launches cancel; no profiler, which would change what is
measured. "share" is the time to read weights and KV once at 4.5 TB/s over the time of a step.

- paxcache: `paxcache.generate` with the examples' model. Its first call is split into tracing, lowering and compiling.
- cuDNN dense (`--peers`): the same model over a dense cache as long as the longest row, in a `fori_loop`, greedy.
- transformers (`--peers`): `generate` of the same shape on torch, where both are installed, greedy, on its own terms.

`--tiny` runs a small shape anywhere; its numbers say nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import llama
import paxcache
import timing

SHAPES = {
    "0.6b": llama.LlamaConfig(  # Qwen3-0.6B
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28, num_heads=16, num_kv_heads=8,
        head_dim=128, max_len=40960, rope_theta=1e6, qk_norm=True, tied_embeddings=True,
    ),
    "8b": llama.LlamaConfig(  # Llama 3.1 8B
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, max_len=131072, rope_theta=5e5,
    ),
    "tiny": llama.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        max_len=1024, qk_norm=True, tied_embeddings=True,
    ),
}  # fmt: skip
CASES = "0.6b:8x128:greedy", "0.6b:64x128:greedy", "0.6b:64x128:sampled", "8b:64x512:sampled"
SAMPLINGS = {
    "greedy": paxcache.Sampling(),
    "sampled": paxcache.Sampling(temperature=0.8, top_p=0.95, top_k=50),
}
PAGE_SIZE = 16
READ_BYTES_PER_MS = 4.5e9
FEW, MANY = 40, 190  # tokens of the two runs


@dataclasses.dataclass(frozen=True)
class Case:
    """What is generated."""

    shape: str
    rows: int
    prompt_len: int
    sampling: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """From "shape:ROWSxPROMPT:sampling"."""
        shape, sizes, sampling = text.split(":")
        rows, prompt_len = sizes.split("x")
        return cls(shape, int(rows), int(prompt_len), sampling)

    def __str__(self) -> str:
        return f"{self.shape} {self.rows} x {self.prompt_len} {self.sampling}"

    @property
    def config(self) -> llama.LlamaConfig:
        return SHAPES[self.shape]

    @functools.cached_property
    def prompts(self) -> np.ndarray:
        size = self.rows, self.prompt_len
        return np.random.default_rng(0).integers(0, self.config.vocab_size, size, np.int32)

    def roofline_ms(self, weight_bytes: int) -> float:
        """To read the weights, and the keys and values between the two runs, once."""
        c = self.config
        tokens = self.rows * (self.prompt_len + (FEW + MANY) // 2)
        return (weight_bytes + tokens * 4 * c.num_layers * c.num_kv_heads * c.head_dim) / READ_BYTES_PER_MS


def random_model(config: llama.LlamaConfig) -> llama.Llama:
    """A model with random weights, made on the device; norms are ones."""
    layout, shapes = nnx.split(
        nnx.eval_shape(lambda: llama.Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    )
    leaves, tree = jax.tree.flatten(shapes)
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
    made = [
        jnp.ones(x.shape, x.dtype) if x.ndim == 1 else draw(k, x.shape)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(layout, jax.tree.unflatten(tree, made))


def seconds(call: Callable[[], Any]) -> float:
    """Of a call, its results included."""
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def difference_ms(run: Callable[[int], Any], repeats: int) -> float:
    """A step's time: ``run(n)`` makes n tokens a row."""
    run(2)
    times = {n: statistics.median(seconds(lambda n=n: run(n)) for _ in range(repeats)) for n in (FEW, MANY)}
    return (times[MANY] - times[FEW]) / (MANY - FEW) * 1e3


def measure_paged(case: Case, model: llama.Llama, repeats: int) -> dict[str, Any]:
    """`paxcache.generate`, compiled ahead so that the parts of a first call can be told apart."""
    model_fn, params = llama.paged_model(model)
    max_len = case.prompt_len + MANY
    pages = -(-max_len // PAGE_SIZE)
    config = llama.cache_config(
        case.config, num_pages=case.rows * pages, max_seqs=case.rows, max_len=max_len, page_size=PAGE_SIZE
    )
    generate = jax.jit(
        lambda params, cache, limits: paxcache.generate(
            model_fn, params, cache, case.prompts, max_new_tokens=MANY, limits=limits,
            sampling=SAMPLINGS[case.sampling],
        ),
        donate_argnums=1,
    )  # fmt: skip
    cache, marks = paxcache.init(config), [time.perf_counter()]
    traced = generate.trace(params, cache, jnp.int32(MANY))
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    compiled = lowered.compile()
    marks.append(time.perf_counter())

    def run(n: int) -> jax.Array:
        nonlocal cache
        made = compiled(params, cache, jnp.int32(n))
        cache = made.cache
        return made.tokens

    ms = difference_ms(run, repeats)
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    first = dict(zip(("tracing", "lowering", "compiling"), np.diff(marks).round(1).tolist(), strict=True))
    return {
        "ms": ms,
        "share": case.roofline_ms(weight_bytes) / ms,
        "first_token_ms": seconds(lambda: run(1)) * 1e3,
        "first_call_s": first,
    }


def measure_dense(case: Case, model: llama.Llama, repeats: int) -> dict[str, Any]:
    """Greedy decoding over a dense cache, of rows that are as long as after their prompts."""
    implementation: Literal["cudnn"] | None = "cudnn" if timing.on_gpu() else None
    model_fn, params = llama.dense_model(model, implementation=implementation)
    max_len = case.prompt_len + MANY
    cache = llama.init_dense(case.config, max_seqs=case.rows, max_len=max_len)
    at = jnp.zeros(case.rows, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=1)
    def generate(params, cache, tokens, n):
        def step(i, carry):
            cache, tokens = carry
            positions = jnp.full((case.rows, 1), case.prompt_len + i, jnp.int32)
            logits, cache = model_fn(params, tokens[:, None], cache, positions, at)
            return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

        return jax.lax.fori_loop(0, n, step, (cache, tokens))

    def run(n: int) -> jax.Array:
        nonlocal cache
        cache, tokens = generate(params, cache, jnp.asarray(case.prompts[:, -1]), n)
        return tokens

    return {"ms": difference_ms(run, repeats)}


def measure_transformers(case: Case, repeats: int) -> dict[str, Any]:
    """`generate` of transformers on torch, greedy."""
    # Only where they are installed.
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    import transformers  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    c = case.config
    form = transformers.Qwen3Config if c.qk_norm else transformers.LlamaConfig
    config = form(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim, tie_word_embeddings=c.tied_embeddings, eos_token_id=None,
    )  # fmt: skip
    device = "cuda" if timing.on_gpu() else "cpu"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval()
    prompts = torch.as_tensor(case.prompts, dtype=torch.long, device=device)

    def run(n: int) -> Any:
        made = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, do_sample=False
        )
        return np.asarray(made.cpu())

    return {"ms": difference_ms(run, repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    facts = timing.header("bench_generate", repeats=args.repeats)
    cases = [Case("tiny", 2, 20, "sampled")] if args.tiny else [Case.parse(x) for x in args.cases]
    has_torch = all(importlib.util.find_spec(x) for x in ("torch", "transformers"))
    results: list[dict[str, Any]] = []
    for case in cases:
        model = random_model(case.config)
        contestants: dict[str, Callable[[], dict[str, Any]]] = {
            "paxcache": functools.partial(measure_paged, case, model, args.repeats)
        }
        if args.peers and case.sampling == "greedy":
            contestants["cuDNN dense"] = functools.partial(measure_dense, case, model, args.repeats)
            if has_torch:
                contestants["transformers"] = functools.partial(measure_transformers, case, 1)
        for name, measure in contestants.items():
            try:
                found = measure()
            except Exception as error:
                found = {"note": timing.reason(error)}
            results.append({"case": str(case), "contestant": name} | found)
            numbers = ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()
            )
            print(f"{case!s:28} {name:14} {numbers}", flush=True)
            if args.json:
                args.json.write_text(json.dumps({**facts, "results": results}, indent=1))


if __name__ == "__main__":
    main()
