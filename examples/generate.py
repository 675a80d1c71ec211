"""Generates text with a Llama-family model whose keys and values live in a paged cache.

    python examples/generate.py                                    # the small model that comes with the examples
    python examples/generate.py --model DIR --prompt "..." --chat  # a Hugging Face folder

The whole generation, prefill and decoding and the handing out of pages, is one compiled program. With greedy sampling
the tokens are compared with those of a dense cache.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import checkpoint
import llama
import paxcache

TINY = Path(__file__).parent / "tiny"
PROMPTS: tuple[str, ...] = (
    "The import statement",
    "If the expression is",
    "A generator function",
    "When an exception is raised",
    "The following is a list of the methods that",
    "Classes",
    "In the case of a mapping, the keys",
    "The",
)


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], Any]:
    """Reads a command-line number in [low, high], or in (low, high] with `above`."""

    def read(text: str) -> Any:
        value = kind(text)
        if not (low < value <= high if above else low <= value <= high):
            limits = f"{'above' if above else 'at least'} {low}" + (
                f" and at most {high}" if high < math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    read.__name__ = kind.__name__  # for argparse's message about what is no number
    return read


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    count = number(int, 1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=TINY, help="folder in the Hugging Face layout")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--chat", action="store_true", help="wrap each prompt in the model's chat template")
    parser.add_argument("--max-new-tokens", type=count, default=96)
    parser.add_argument(
        "--max-len", type=count, help="longest sequence, for both caches (default: the model's)"
    )
    parser.add_argument("--rows", type=count, help="sequences at a time (default: all prompts)")
    parser.add_argument("--page-size", type=count, default=16)
    parser.add_argument(
        "--num-pages", type=count, help="pages of the pool (default: as many as the prompts can need)"
    )
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=number(int, 0), default=0, help="0 keeps all")
    parser.add_argument("--top-p", type=number(float, 0, 1, above=True), default=1.0)
    parser.add_argument("--min-p", type=number(float, 0, 1), default=0.0)
    parser.add_argument("--repetition-penalty", type=number(float, 0, above=True), default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="print tokens as they come")
    check_help = "compare greedy tokens with a dense cache (default: only for the built-in model)"
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, help=check_help)
    args = parser.parse_args(argv)
    greedy = args.temperature == 0 and args.repetition_penalty == 1
    if args.check and not greedy:
        parser.error("--check compares greedy tokens: leave out --temperature and --repetition-penalty")
    args.check = greedy and args.model == TINY if args.check is None else args.check
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.check:  # rounding must not decide a near tie between the two caches
        jax.config.update("jax_default_matmul_precision", "highest")
    texts = args.prompt or list(PROMPTS)
    try:
        loaded = checkpoint.load(args.model, dtype=jnp.float32 if args.check else None)
        if args.chat:
            prompts = [loaded.encode_chat([{"role": "user", "content": text}]) for text in texts]
        else:
            prompts = [loaded.encode(text) for text in texts]
    except (OSError, ValueError) as error:  # what is wrong with the folder, in one line
        sys.exit(str(error))
    config = loaded.config
    if [] in prompts:
        sys.exit(f"prompt {texts[prompts.index([])]!r} has no tokens; the model needs at least one")
    max_len = args.max_len or config.max_len
    too_long = [len(p) for p in prompts if len(p) + args.max_new_tokens > max_len]
    if too_long:
        sys.exit(
            f"prompt of {too_long[0]} tokens + --max-new-tokens {args.max_new_tokens} pass --max-len {max_len}"
        )

    rows = min(args.rows or len(prompts), len(prompts))
    longest_first = sorted(
        (-(-(len(p) + args.max_new_tokens) // args.page_size) for p in prompts), reverse=True
    )
    pages = llama.cache_config(
        config,
        num_pages=args.num_pages or sum(longest_first[:rows]),
        max_seqs=rows,
        max_len=max_len,
        page_size=args.page_size,
        dtype=loaded.model.embed.embedding.dtype,
    )
    model_fn, params = llama.paged_model(loaded.model)
    run = functools.partial(
        paxcache.generate if not args.stream else paxcache.stream,
        model_fn,
        params,
        prompts=prompts,
        max_new_tokens=args.max_new_tokens,
        sampling=paxcache.Sampling(
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
        ),
        stop_tokens=loaded.stop_tokens,
        seeds=np.arange(len(prompts)) + args.seed,
    )

    begin = time.perf_counter()
    cache = finish(
        run(cache=paxcache.init(pages), limits=1)
    ).cache  # compiles; every length uses the same program
    compiled = time.perf_counter()
    generation = run(cache=cache)
    if isinstance(generation, paxcache.Stream):
        print_stream(generation, texts, prompts, loaded)
    generation = finish(generation)
    jax.block_until_ready(generation.tokens)
    seconds = time.perf_counter() - compiled

    outputs = generation.to_lists()
    if not args.stream:
        for text, prompt, tokens in zip(texts, prompts, outputs, strict=True):
            written = loaded.decode(tokens, prompt=prompt)
            print(f"\n\033[1m{text}\033[0m{written}" if sys.stdout.isatty() else f"\n> {text}|{written}")
    reasons = ", ".join(
        paxcache.StopReason(int(r)).name for r in np.unique(np.asarray(generation.stop_reasons))
    )
    print_summary(pages, prompts, outputs, max_len)
    count = sum(map(len, outputs))
    print(
        f"time   {count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s, {int(generation.num_steps)} steps "
        f"on {jax.devices()[0].device_kind} (compiled before in {compiled - begin:.1f} s); stopped: {reasons}"
    )

    if args.check:
        check_against_dense(loaded.model, prompts, outputs, args.max_new_tokens, pages.dtype)


def finish(generation: paxcache.Generation | paxcache.Stream) -> paxcache.Generation:
    """The result, whether it came at once or as a stream."""
    if isinstance(generation, paxcache.Generation):
        return generation
    for _ in generation:
        pass
    return generation.result


def print_stream(
    stream: paxcache.Stream, texts: list[str], prompts: list[list[int]], loaded: checkpoint.Checkpoint
) -> None:
    """Prints each prompt's new text whenever there is some."""
    written = [loaded.text_stream(prompt) for prompt in prompts]
    pieces = ((prompt, written[prompt].push(new)) for prompt, new in stream)
    rest = ((prompt, text.push([], last=True)) for prompt, text in enumerate(written))
    for prompt, piece in itertools.chain(pieces, rest):
        if piece:
            print(f"[{prompt}: {texts[prompt][:24]}] {piece!r}", flush=True)


def print_summary(
    pages: paxcache.CacheConfig, prompts: list[list[int]], outputs: list[list[int]], max_len: int
) -> None:
    """Memory that the pages took, and what a dense cache reserves for the same rows."""
    S = pages.page_size
    # The last token of a row is not stored.
    stored = [len(p) + max(len(o) - 1, 0) for p, o in zip(prompts, outputs, strict=True)]
    used = sum(sorted((-(-n // S) for n in stored), reverse=True)[: pages.max_seqs])
    dense_bytes = pages.max_seqs * max_len * pages.page_bytes // S
    used = min(used, pages.num_pages)
    used_bytes = used * pages.page_bytes
    print(
        f"\npages  at most {used} of {pages.num_pages} used, {S} tokens each: {used_bytes / 2**20:.2f} MiB; "
        f"a dense cache reserves {pages.max_seqs} rows x {max_len} tokens: {dense_bytes / 2**20:.2f} MiB "
        f"({1 - used_bytes / dense_bytes:.1%} saved)"
    )


def check_against_dense(
    model: llama.Llama,
    prompts: list[list[int]],
    outputs: list[list[int]],
    max_new_tokens: int,
    dtype: jnp.dtype,
) -> None:
    """Greedy tokens of the dense cache must be those of the paged one."""
    expected = generate_dense(model, prompts, max_new_tokens, dtype)
    for n, tokens in enumerate(outputs):
        if tokens != expected[n, : len(tokens)].tolist():
            at = next(i for i, t in enumerate(tokens) if t != expected[n, i])
            sys.exit(f"check  FAILED: prompt {n} differs from the dense cache at token {at}")
    print(f"check  greedy tokens of all {len(outputs)} prompts equal those of the dense cache")


def generate_dense(
    model: llama.Llama, prompts: list[list[int]], max_new_tokens: int, dtype: jnp.dtype
) -> np.ndarray:
    """Greedy tokens [N, max_new_tokens] over a dense cache: one padded prefill, then a loop."""
    model_fn, params = llama.dense_model(model)
    lens = jnp.array([len(p) for p in prompts], jnp.int32)
    width = max(map(len, prompts))
    padded = jnp.array([p + [0] * (width - len(p)) for p in prompts], jnp.int32)
    cache = llama.init_dense(model.config, max_seqs=len(prompts), max_len=width + max_new_tokens, dtype=dtype)

    @jax.jit
    def run(params, cache):
        positions = jnp.broadcast_to(jnp.arange(width), padded.shape)
        logits, cache = model_fn(params, padded, cache, positions, lens - 1)

        def step(carry, i):
            token, cache = carry
            logits, cache = model_fn(params, token[:, None], cache, (lens + i)[:, None], jnp.zeros_like(lens))
            return (jnp.argmax(logits, axis=-1).astype(jnp.int32), cache), token

        first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        _, tokens = jax.lax.scan(step, (first, cache), jnp.arange(max_new_tokens))
        return tokens.T

    return np.asarray(run(params, cache))


if __name__ == "__main__":
    main()
