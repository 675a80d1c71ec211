"""Models and requests for the tests of `generate`.

The *sum model* is the workhorse of the scheduler's tests. With zero queries attention is the mean of the values; the
values are the token ids, so mean times length is the sum of every token cached for the row. A token lost, repeated or
taken from another row changes the sum, and what comes next is a table's line for it: exact, and free of near ties.

Programs compile for seconds, so tests share them: six prompts, one cache shape, and a live row that takes pages away.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paxcache
from paxcache import Generation, Sampling, StopReason, _sampling, generate, stream

V = 31

MAX_NEW = 12

TABLE = np.random.default_rng(0).normal(size=(V, V)).astype(np.float32) * 2

PROMPTS = [
    [3, 1, 4, 1, 5],
    [9],
    [2, 6, 5, 3, 5, 8, 9, 7, 9],
    [3, 2, 3, 8, 4, 6],
    [2, 6, 4],
    [3, 3, 8, 3, 2, 7, 9, 5, 0, 2],
]


def make_cache(*, num_pages=40, max_seqs=3, max_pages_per_seq=8, **options) -> paxcache.PagedKVCache:
    options = {
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "page_size": 4,
        "dtype": jnp.float32,
        **options,
    }
    return paxcache.init(
        paxcache.CacheConfig(
            num_pages=num_pages, max_seqs=max_seqs, max_pages_per_seq=max_pages_per_seq, **options
        )
    )


BUSY = 1


def busy_cache(free_pages: int, max_seqs=4) -> paxcache.PagedKVCache:
    """Row 1 is live and holds all but some of 40 pages."""
    cache = make_cache(max_seqs=max_seqs, max_pages_per_seq=40)
    query_lens = jnp.where(jnp.arange(max_seqs) == BUSY, 4 * (40 - free_pages), 0)
    cache, step = paxcache.extend(cache, query_lens, num_tokens=160)
    v = jax.random.normal(jax.random.key(0), (160, 1, 8))
    return paxcache.append(cache, 0, v, 2 * v, step)


def sum_model(table, tokens, cache, step, logits_at):
    v = jnp.broadcast_to(tokens.astype(jnp.float32)[:, None, None], (*tokens.shape, 1, 8))
    cache = paxcache.append(cache, 0, jnp.zeros_like(v), v, step)
    mean = paxcache.attend(cache, 0, jnp.zeros_like(v), step)[logits_at, 0, 0]
    counts = (step.positions[logits_at] + 1).astype(jnp.float32)
    sums = jnp.round(mean * counts).astype(jnp.int32)
    return table[(7 * sums + 5 * step.positions[logits_at]) % V], cache


def sum_oracle(prompt, *, max_new=MAX_NEW, stop=(), seed=0, rules=None):
    """Tokens of one prompt by the same arithmetic in Python."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new:
        logits = TABLE[(7 * sum(tokens) + 5 * (len(tokens) - 1)) % V]
        if rules is None:
            tokens.append(int(np.argmax(logits)))
        else:
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(tokens)] = tokens
            arguments = (
                jnp.asarray(logits)[None],
                jnp.array([seed]),
                jnp.array([len(tokens)]),
                jnp.asarray(padded),
            )
            tokens.append(int(draw_one(rules, *arguments)))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


@jax.jit
def draw_one(rules, logits, seed, position, tokens):
    return _sampling.sample(
        logits, rules, keys=_sampling.seed_keys(seed), positions=position, tokens=tokens, num_tokens=position
    )[0]


def run(prompts: Any = PROMPTS, *, cache=None, model=sum_model, params: Any = TABLE, **options) -> Generation:
    options = {"max_new_tokens": MAX_NEW, "chunk_size": 8, **options}
    out = generate(model, params, busy_cache(38) if cache is None else cache, prompts, **options)
    held = None if out.index is None else paxcache.prefix.device.held(out.cache, out.index)
    paxcache.check(out.cache, held=held)
    return out


def reasons(out: Generation) -> list[str]:
    return [StopReason(int(r)).name for r in out.stop_reasons]


def assert_empty(cache, live=(BUSY,)):
    idle = np.setdiff1d(np.arange(cache.max_seqs), live)
    assert not np.asarray(cache.seq_lens)[idle].any()
    for group in cache.groups:
        assert (np.asarray(group.block_tables)[idle] == paxcache.NO_PAGE).all()


MIXED = Sampling(
    temperature=np.array([0.0, 1.0, 0.8, 1.5, 1.0, 2.0]),
    top_k=np.array([0, 5, 0, 0, 12, 20]),
    top_p=np.array([1.0, 1.0, 0.9, 1.0, 0.7, 0.95]),
    min_p=np.array([0.0, 0.0, 0.0, 0.2, 0.0, 0.05]),
    repetition_penalty=np.array([1.3, 1.0, 1.0, 1.0, 2.0, 1.2]),
)

SEEDS = [5, 5, 7, 2**31 - 1, -3, 0]


@functools.cache
def mixed_expected():
    rules = _sampling.resolve(MIXED, 6)
    return [sum_oracle(p, seed=SEEDS[i], rules=rules.of(jnp.array([i]))) for i, p in enumerate(PROMPTS)]


SWAPS: dict[str, Any] = {"sampling": MIXED, "seeds": SEEDS, "return_logprobs": True, "host_pages": 12}


def streamed(interval=1, cache=None, **options):
    options = {"max_new_tokens": MAX_NEW, "chunk_size": 8, **options}
    cache = busy_cache(38) if cache is None else cache
    return stream(sum_model, TABLE, cache, PROMPTS, interval=interval, **options)
