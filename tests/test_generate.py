"""Generation against plain loops: a dense model recomputed from scratch, and a model whose answer is arithmetic.

The *sum model* is the workhorse of the scheduler's tests. With zero queries attention is the mean of the values; the
values are the token ids, so mean times length is the sum of every token cached for the row. A token lost, repeated or
taken from another row changes the sum, and what comes next is a table's line for it: exact, and free of near ties.

Programs compile for seconds, so tests share them: six prompts, one cache shape, and a live row that takes pages away.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxcache
from paxcache import _generate, _sampling, offload
from paxcache._generate import Generation, StopReason, generate, stream
from paxcache._sampling import Sampling

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
    sums = jnp.round(mean * (step.positions[logits_at] + 1)).astype(jnp.int32)
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
        logits, rules, seeds=seed, positions=position, tokens=tokens, num_tokens=position
    )[0]


def run(prompts: Any = PROMPTS, *, cache=None, **options) -> Generation:
    options = {"max_new_tokens": MAX_NEW, "chunk_size": 8, **options}
    out = generate(sum_model, TABLE, busy_cache(38) if cache is None else cache, prompts, **options)
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


# A two-layer model with positions, heads and a window, against itself written densely in NumPy.


H, K, D, E = 2, 1, 8, 16
WINDOW = 5


def make_params(seed=0):
    rng = np.random.default_rng(seed)

    def weights(*shape):
        return rng.normal(size=shape).astype(np.float32) / np.sqrt(shape[0])

    layers = [
        {"q": weights(E, H * D), "k": weights(E, K * D), "v": weights(E, K * D), "o": weights(H * D, E)}
        for _ in range(2)
    ]
    return {
        "embed": weights(V, E) * 6,
        "position": weights(64, E) * 6,
        "layers": layers,
        "out": weights(E, V),
    }


def attention_model(params, tokens, cache, step, logits_at, windows=(None, None)):
    x = params["embed"][tokens] + params["position"][step.positions]
    for layer, w in enumerate(params["layers"]):
        q, k, v = (jnp.tanh(x @ w[n]).reshape(x.shape[0], -1, D) for n in "qkv")
        cache = paxcache.append(cache, layer, k, v, step)
        out = paxcache.attend(cache, layer, 3 * q, step, sliding_window=windows[layer])
        x = x + out.reshape(x.shape[0], -1) @ w["o"]
    return x[logits_at] @ params["out"], cache


def window_model(params, tokens, cache, step, logits_at):
    return attention_model(params, tokens, cache, step, logits_at, windows=(None, WINDOW))


def dense_logits(params, tokens, windows=(None, None)):
    """Logits after the last of the tokens, in float64, from scratch."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    n = len(tokens)
    x = params["embed"][tokens] + params["position"][:n]
    distance = np.arange(n)[:, None] - np.arange(n)
    for w, window in zip(params["layers"], windows, strict=True):
        q, k, v = (np.tanh(x @ w[name]).reshape(n, -1, D) for name in "qkv")
        seen = (distance >= 0) & (distance < (window or n))
        out = np.zeros_like(q)
        for head in range(H):
            scores = np.where(seen, 3 * q[:, head] @ k[:, 0].T / np.sqrt(D), -np.inf)
            scores = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = scores / scores.sum(axis=1, keepdims=True) @ v[:, 0]
        x = x + out.reshape(n, -1) @ w["o"]
    return (x @ params["out"])[-1]


def dense_greedy(params, prompt, max_new, windows=(None, None)):
    tokens, logprobs = list(prompt), []
    for _ in range(max_new):
        logits = dense_logits(params, tokens, windows)
        best = np.sort(logits)[-2:]
        assert best[1] - best[0] > 1e-4, "a near tie proves nothing: choose other weights"
        tokens.append(int(np.argmax(logits)))
        logprobs.append(best[1] - np.log(np.exp(logits).sum()))
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize(("max_seqs", "chunk_size"), [(8, 64), (2, 5)])
def test_greedy_tokens_equal_the_dense_model(max_seqs, chunk_size):
    params = make_params()
    out = generate(
        attention_model,
        params,
        make_cache(num_layers=2, max_seqs=max_seqs),
        PROMPTS,
        max_new_tokens=MAX_NEW,
        chunk_size=chunk_size,
        return_logprobs=True,
    )
    expected = [dense_greedy(params, p, MAX_NEW) for p in PROMPTS]
    assert out.to_lists() == [tokens for tokens, _ in expected]
    assert out.logprobs is not None
    np.testing.assert_allclose(out.logprobs, [logprobs for _, logprobs in expected], rtol=1e-5, atol=1e-5)
    assert reasons(out) == ["LENGTH"] * 6
    paxcache.check(out.cache)
    assert_empty(out.cache, live=())
    assert int(out.num_preemptions) == 0


def test_layer_groups_with_a_window_equal_the_dense_model():
    params = make_params(1)
    group = functools.partial(
        paxcache.LayerGroup, num_layers=1, num_kv_heads=K, head_dim=D, dtype=jnp.float32
    )
    config = paxcache.CacheConfig(
        groups=(group(), group(sliding_window=WINDOW, num_pages=11)),
        page_size=4,
        num_pages=13,
        max_seqs=3,
        max_pages_per_seq=8,
    )
    out = generate(window_model, params, paxcache.init(config), PROMPTS, max_new_tokens=MAX_NEW, chunk_size=6)
    assert out.to_lists() == [dense_greedy(params, p, MAX_NEW, (None, WINDOW))[0] for p in PROMPTS]
    paxcache.check(out.cache)
    assert_empty(out.cache, live=())


# The scheduler.


def test_more_prompts_than_rows():
    out = run()
    assert out.to_lists() == [sum_oracle(p) for p in PROMPTS]
    assert out.lengths.tolist() == [MAX_NEW] * 6
    assert_empty(out.cache)


def test_decoding_goes_on_while_a_long_prompt_is_computed():
    # The first prompt samples in each of 10 steps. The second takes what is left of steps of 8 tokens: 7, 7 and 2.
    out = run([[1], list(range(1, 17)), *PROMPTS[2:]], limits=[10, 1, 0, 0, 0, 0])
    assert int(out.num_steps) == 10
    assert out.to_lists()[:2] == [sum_oracle([1], max_new=10), sum_oracle(range(1, 17), max_new=1)]


@pytest.mark.parametrize("free_pages", [6, 7, 9])
def test_too_few_pages_preempt_and_change_no_token(free_pages):
    out = run(cache=busy_cache(free_pages))
    assert int(out.num_preemptions) > 0
    assert out.to_lists() == [sum_oracle(p) for p in PROMPTS]
    assert reasons(out) == ["LENGTH"] * 6
    assert_empty(out.cache)


def test_live_rows_stay_untouched():
    live = paxcache.fork(busy_cache(9), jnp.array([BUSY]), jnp.array([3]))[
        0
    ]  # pages that are shared stay shared
    before = jax.tree.map(np.array, (paxcache.gather_dense(live, 0, 160), live.groups[0].block_tables))
    out = run(cache=live)
    after = jax.tree.map(
        np.array, (paxcache.gather_dense(out.cache, 0, 160), out.cache.groups[0].block_tables)
    )
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert out.cache.seq_lens.tolist() == [0, 124, 0, 124]
    assert out.to_lists() == [sum_oracle(p) for p in PROMPTS]


@functools.cache
def compiled_run():
    """One program for all examples: what varies is values."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache, prompts, prompt_lens, limits, stop_tokens):
        return generate(
            sum_model,
            TABLE,
            cache,
            prompts,
            prompt_lens=prompt_lens,
            limits=limits,
            stop_tokens=stop_tokens,
            max_new_tokens=MAX_NEW,
            chunk_size=7,
        )

    return run


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    prompts=st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=20), min_size=5, max_size=5),
    limits=st.lists(st.integers(0, MAX_NEW), min_size=5, max_size=5),
    stop=st.integers(0, V - 1),
    live=st.integers(0, 9),
)
def test_any_prompts_limits_and_free_pages(prompts, limits, stop, live):
    """16 pages of 2 tokens of which `live` are taken; rows of 10 pages: every reason to stop occurs."""
    cache = make_cache(num_pages=16, max_seqs=4, max_pages_per_seq=10, page_size=2)
    cache, step = paxcache.extend(cache, jnp.array([0, 2 * live, 0, 0]), max_query_len=18)
    assert step.ok.all()
    padded = np.zeros((5, 20), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    lens = np.array([len(p) for p in prompts], np.int32)
    out = compiled_run()(cache, padded, lens, np.array(limits, np.int32), np.array([stop], np.int32))
    paxcache.check(out.cache)
    assert_empty(out.cache, live=[1] if live else [])
    free_pages = 16 - live
    for tokens, reason, prompt, limit in zip(out.to_lists(), reasons(out), prompts, limits, strict=True):
        expected = sum_oracle(prompt, max_new=limit, stop=[stop])
        # A row holds 20 tokens, the free pages hold 2 each; the last token needs no place.
        row_room, pool_room = 20 - len(prompt) + 1, 2 * free_pages - len(prompt) + 1
        assert tokens == expected[: max(min(row_room, pool_room), 0)]
        if len(tokens) < len(expected):
            assert reason == ("ROW_FULL" if row_room <= pool_room else "NO_PAGES")
        else:
            assert reason == ("STOP_TOKEN" if expected and expected[-1] == stop else "LENGTH")


def test_every_reason_to_stop():
    stop = sum_oracle(PROMPTS[0])[3]
    out = run(stop_tokens=[stop], limits=[12, 0, 1, 12, 12, 12])
    expected = [
        sum_oracle(p, max_new=n, stop=[stop]) for p, n in zip(PROMPTS, [12, 0, 1, 12, 12, 12], strict=True)
    ]
    assert out.to_lists() == expected
    assert reasons(out)[:3] == ["STOP_TOKEN", "LENGTH", "LENGTH"]
    assert int(out.lengths[0]) <= 4
    assert out.tokens[0, int(out.lengths[0]) :].tolist() == [0] * (12 - int(out.lengths[0]))

    prompts = [[1, 2, 3], [1] * 14, [4], [1] * 13, [5] * 12, [6] * 11]
    out = run(prompts, cache=busy_cache(3))  # 12 tokens in all
    assert reasons(out) == ["NO_PAGES", "NO_PAGES", "LENGTH", "NO_PAGES", "NO_PAGES", "NO_PAGES"]
    assert out.lengths.tolist() == [10, 0, 12, 0, 1, 2]  # the last token sampled needs no slot
    assert out.to_lists() == [sum_oracle(p)[:n] for p, n in zip(prompts, out.lengths.tolist(), strict=True)]

    prompts = [[1] * 9, [1] * 8, [1] * 6, [2, 3], [4], [1] * 16]
    out = run(prompts, cache=make_cache(max_pages_per_seq=2))  # rows of 8 tokens
    assert reasons(out) == ["ROW_FULL"] * 6
    assert out.lengths.tolist() == [0, 1, 3, 7, 8, 0]
    assert out.to_lists() == [sum_oracle(p)[:n] for p, n in zip(prompts, out.lengths.tolist(), strict=True)]

    full, _ = paxcache.extend(busy_cache(38), jnp.array([1, 0, 1, 1]), num_tokens=160)
    out = run(cache=full)
    assert reasons(out) == ["NO_ROW"] * 6
    assert int(out.num_steps) == 0
    assert out.cache.seq_lens.tolist() == [1, 8, 1, 1]


def test_stop_tokens_for_each_prompt():
    free = [sum_oracle(p) for p in PROMPTS]
    stops = [[tokens[2]] if i % 2 else [tokens[5], tokens[7], V + 7] for i, tokens in enumerate(free)]
    padded = np.full((6, 4), -1, np.int32)
    for row, ids in zip(padded, stops, strict=True):
        row[: len(ids)] = ids
    expected = [sum_oracle(p, stop=ids) for p, ids in zip(PROMPTS, stops, strict=True)]
    assert run(stop_tokens=stops).to_lists() == expected
    assert run(stop_tokens=padded).to_lists() == expected
    assert run(stop_tokens=[[], [], [], [], [], []]).to_lists() == free


# Sampling.

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


@pytest.mark.parametrize(("free_pages", "max_seqs", "chunk_size"), [(38, 4, 8), (7, 4, 8), (38, 2, 3)])
def test_samples_depend_on_nothing_but_the_prompt_and_its_values(free_pages, max_seqs, chunk_size):
    out = run(
        cache=busy_cache(free_pages, max_seqs),
        sampling=MIXED,
        seeds=SEEDS,
        chunk_size=chunk_size,
        return_logprobs=True,
    )
    assert out.to_lists() == mixed_expected()
    assert (int(out.num_preemptions) > 0) == (free_pages == 7)


SWAPS: dict[str, Any] = {"sampling": MIXED, "seeds": SEEDS, "return_logprobs": True, "host_pages": 12}


@pytest.mark.parametrize("host_pages", [12, 3])
def test_swapping_changes_no_sample_and_recomputes_nothing(host_pages):
    num_programs = _generate._advance._cache_size  # pyright: ignore
    before = num_programs()
    out = run(cache=busy_cache(7), **{**SWAPS, "host_pages": host_pages})
    assert num_programs() <= before + 1
    recomputed = run(cache=busy_cache(7), **{**SWAPS, "host_pages": None})
    assert out.to_lists() == recomputed.to_lists() == mixed_expected()
    np.testing.assert_array_equal(out.logprobs, recomputed.logprobs)
    assert int(recomputed.num_swaps) == 0
    if host_pages == 12:
        assert int(out.num_swaps) == int(out.num_preemptions) > 0
        assert out.num_steps < recomputed.num_steps
    else:  # not every prompt finds room
        assert 0 < int(out.num_swaps) < int(out.num_preemptions)
    assert_empty(out.cache)


def test_what_comes_back_is_what_left(monkeypatch):
    """Pages that change on the host change the tokens: they are read again and not computed anew."""

    right = offload.preempt

    def preempt(*args):
        cache, host, ticket = right(*args)
        blocks = jax.tree.map(lambda x: 2 * x, ticket.extent.blocks)
        extent = dataclasses.replace(ticket.extent, blocks=blocks)
        return cache, host, dataclasses.replace(ticket, extent=extent)

    monkeypatch.setattr(offload, "preempt", preempt)
    out = run(cache=busy_cache(7), **SWAPS)
    assert int(out.num_swaps) > 0
    assert out.to_lists() != mixed_expected()


def test_samples_do_not_depend_on_neighbours():
    order = [4, 1, 3, 1, 0, 4]
    prompts = [PROMPTS[i] for i in order]
    prompts[4] = [30] * 16  # a neighbour of no concern
    some = Sampling(**{k: np.asarray(v)[order] for k, v in vars(MIXED).items()})
    out = run(prompts, sampling=some, seeds=[SEEDS[i] for i in order], return_logprobs=True).to_lists()
    expected = [mixed_expected()[i] for i in order]
    assert out[:4] + out[5:] == expected[:4] + expected[5:]


def test_seeds():
    hot = Sampling(temperature=3.0, top_k=V - 1, top_p=0.999, min_p=0.001, repetition_penalty=1.01)
    draw = functools.partial(run, [[1, 2]] * 6, sampling=hot, return_logprobs=True)
    same = draw(seeds=11).to_lists()
    assert same[1:] == same[:-1]
    different = draw().to_lists()
    assert len({tuple(tokens) for tokens in different}) == 6
    assert draw(seeds=[0, 1, 2, 3, 4, 5]).to_lists() == different


# Compilation.


def test_values_compile_nothing_anew():
    traces = []

    def model(params, tokens, cache, step, logits_at):
        traces.append(tokens.shape)
        return sum_model(params, tokens, cache, step, logits_at)

    def once(prompts, **options):
        sampling = Sampling(temperature=options.pop("temperature"), top_k=3)
        return generate(
            model,
            TABLE,
            make_cache(),
            prompts,
            max_new_tokens=MAX_NEW,
            chunk_size=8,
            sampling=sampling,
            **options,
        )

    once(PROMPTS, temperature=1.0, seeds=1, stop_tokens=[3])
    assert set(traces) == {(8,), (3,)}
    first = len(traces)
    once([[1]] * 6, temperature=0.5, seeds=[1, 2, 3, 4, 5, 6], stop_tokens=[9], limits=[0, 1, 2, 3, 4, 12])
    once([[1, 2] * 8] * 6, temperature=[0.5, 0, 1, 2, 3, 4], stop_tokens=[[1]] * 6)
    arguments: Any = dict(
        max_new_tokens=MAX_NEW, chunk_size=8, stop_tokens=[7], sampling=Sampling(temperature=3, top_k=1)
    )
    for interval in (1, 2, 5):
        for _ in stream(model, TABLE, make_cache(), PROMPTS, interval=interval, **arguments):
            pass
    assert len(traces) == first


@functools.cache
def program_inside_jit() -> Any:
    """A user's function with `generate` inside and every value traced, compiled."""

    @functools.partial(jax.jit, donate_argnums=1)
    def inside(table, cache, prompts, prompt_lens, limits, temperature):
        return generate(
            sum_model,
            table,
            cache,
            prompts,
            prompt_lens=prompt_lens,
            limits=limits,
            sampling=Sampling(temperature=temperature, top_k=4, top_p=0.9),
            max_new_tokens=MAX_NEW,
            chunk_size=8,
        )

    lens = jnp.zeros(6, jnp.int32)
    arguments = (
        TABLE,
        make_cache(num_pages=1 << 16),
        jnp.zeros((6, 12), jnp.int32),
        lens,
        lens,
        jnp.zeros(6),
    )
    return inside.lower(*arguments).compile()


def test_inside_jit_with_traced_values():
    padded = np.zeros((6, 12), np.int32)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt

    def inside(prompt_lens, limits):
        values = (np.asarray(prompt_lens, np.int32), np.asarray(limits, np.int32), np.zeros(6, np.float32))
        out = program_inside_jit()(TABLE, make_cache(num_pages=1 << 16), padded, *values)
        paxcache.check(out.cache)
        return out

    out = inside([len(p) for p in PROMPTS], [12, 3, 99, -1, 12, 12])
    wanted = [12, 3, 12, 0, 12, 12]  # out of range and traced: cut, since nothing can raise
    assert out.to_lists() == [sum_oracle(p, max_new=n) for p, n in zip(PROMPTS, wanted, strict=True)]
    out = inside([5, 0, 13, -2, 3, 10], [12] * 6)
    assert reasons(out) == ["LENGTH", "INVALID", "INVALID", "INVALID", "LENGTH", "LENGTH"]
    assert out.lengths.tolist() == [12, 0, 0, 0, 12, 12]
    assert out.to_lists()[4] == sum_oracle(PROMPTS[4][:3])


def test_the_program_copies_no_pool_and_never_calls_the_host():
    compiled = program_inside_jit()
    text = compiled.as_text()
    assert " while(" in text
    pool = "f32[1,65536,1,4,8]"
    assert pool in text
    copies = [line for line in text.splitlines() if re.search(rf"= \S*{re.escape(pool)}\S* copy", line)]
    assert copies == []
    for name in ("callback", "infeed", "outfeed", " send(", " recv(", " sort(", " conditional("):
        assert name not in text
    pool_bytes = 65536 * 4 * 8 * 4
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes


def test_the_cache_is_donated_only_once_the_model_is_traced():
    def broken(params, tokens, cache, step, logits_at):
        return jnp.zeros((2, V)), cache

    cache = busy_cache(38)
    with pytest.raises(ValueError, match=r"model_fn: expected logits \[R=4, V\], got float32\[2,31\]"):
        generate(broken, None, cache, PROMPTS, max_new_tokens=2)
    out = run(cache=cache)
    assert out.to_lists() == [sum_oracle(p) for p in PROMPTS]
    assert cache.groups[0].pages.k.is_deleted()


# Streams.


def streamed(interval=1, cache=None, **options):
    options = {"max_new_tokens": MAX_NEW, "chunk_size": 8, **options}
    cache = busy_cache(38) if cache is None else cache
    return stream(sum_model, TABLE, cache, PROMPTS, interval=interval, **options)


@pytest.mark.parametrize(("interval", "host_pages"), [(1, None), (4, None), (1000, None), (3, 12)])
def test_stream_equals_generate(interval, host_pages):
    options = {**SWAPS, "host_pages": host_pages}
    out, tokens = run(cache=busy_cache(7), **options), streamed(interval, cache=busy_cache(7), **options)
    with pytest.raises(RuntimeError, match="exhaust the stream or close"):
        _ = tokens.result
    collected = [[] for _ in PROMPTS]
    for prompt, new in tokens:
        assert 1 <= len(new) <= interval
        collected[prompt] += new
    assert collected == out.to_lists()
    for a, b in zip(jax.tree.leaves(tokens.result), jax.tree.leaves(out), strict=True):
        np.testing.assert_array_equal(a, b)
    assert list(tokens) == []


def test_tokens_come_one_by_one():
    first = next(iter(streamed()))
    assert first == (0, sum_oracle(PROMPTS[0])[:1])


@pytest.mark.parametrize(("items", "options"), [(0, {}), (1, {}), (5, {}), (25, {}), (25, SWAPS)])
def test_a_stream_closed_early_leaves_nothing_half_done(items, options):
    with streamed(2, cache=busy_cache(9), **options) as tokens:
        for _ in range(items):
            next(tokens)
    assert list(tokens) == []
    tokens.close()
    out = tokens.result
    paxcache.check(out.cache)
    assert out.cache.seq_lens.tolist() == [0, 124, 0, 0]
    assert_empty(out.cache)
    expected = mixed_expected() if options else [sum_oracle(p) for p in PROMPTS]
    for got, whole, reason in zip(out.to_lists(), expected, reasons(out), strict=True):
        assert got == whole[: len(got)]
        assert reason == ("LENGTH" if len(got) == MAX_NEW else "UNFINISHED")
    assert "UNFINISHED" in reasons(out)
    assert run(cache=out.cache, **options).to_lists() == expected


def test_progress_bar(capsys):
    out = run(progress=True, stop_tokens=[sum_oracle(PROMPTS[0])[3]])
    assert out.to_lists() == run(stop_tokens=[sum_oracle(PROMPTS[0])[3]]).to_lists()
    total = int(out.lengths.sum())
    assert f"{total}/{total}" in capsys.readouterr().err


def test_progress_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    cache = make_cache()
    with pytest.raises(ImportError, match="pip install tqdm"):
        run(progress=True, cache=cache)
    assert not cache.groups[0].pages.k.is_deleted()


# What users pass.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(prompts=[]), ValueError, "prompts: expected at least one prompt"),
        (dict(prompts=[[1], []]), ValueError, r"prompts\[1\]: expected at least one token"),
        (dict(prompts="hello"), TypeError, "prompts: expected lists of token ids"),
        (dict(prompts=["hello"]), TypeError, r"prompts\[0\]: expected token ids, got text"),
        (dict(prompts=[[1.5]]), TypeError, r"prompts\[0\]: expected a list of integers"),
        (dict(prompts=[[1, -1]]), ValueError, r"prompts\[0\]: token ids must lie in"),
        (dict(prompts=np.zeros((0, 3), np.int32)), ValueError, "prompts: expected at least one"),
        (dict(prompts=np.zeros(3, np.int32)), ValueError, "prompts: expected shape"),
        (
            dict(prompts=np.zeros((2, 3), np.int32), prompt_lens=[1, 4]),
            ValueError,
            "prompt_lens: expected 1 to 3, got 4",
        ),
        (
            dict(prompts=np.zeros((2, 3), np.int32), prompt_lens=[1, 0]),
            ValueError,
            "prompt_lens: expected 1 to 3, got 0",
        ),
        (dict(prompts=np.zeros((2, 3), np.int32), prompt_lens=[1]), ValueError, "prompt_lens: .*N=2"),
        (dict(prompt_lens=[1]), TypeError, "prompt_lens goes with prompts given as one padded array"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1"),
        (dict(max_new_tokens=jnp.int32(3)), TypeError, "max_new_tokens must be an int"),
        (
            dict(limits=[1, 2, 3, 4, 5, 13]),
            ValueError,
            "limits: expected 0 to max_new_tokens=12, got 1 to 13",
        ),
        (dict(limits=[1, 2]), ValueError, "limits: .*N=6"),
        (dict(seeds=[1, 2]), ValueError, "seeds: .*N=6"),
        (dict(seeds=1.5), TypeError, "seeds: expected integers"),
        (dict(chunk_size=2), ValueError, "chunk_size must be at least 3, got 2"),
        (dict(stop_tokens=[0.5]), TypeError, "stop_tokens: expected integer"),
        (dict(stop_tokens=[[1], [2]]), ValueError, "stop_tokens: .*N=6"),
        (dict(sampling=0.7), TypeError, "sampling: expected a Sampling"),
        (dict(sampling=Sampling(temperature=[1.0, 2.0])), ValueError, r"sampling\.temperature: .*N=6"),
        (dict(model_fn=None), TypeError, "model_fn: expected a function"),
        (dict(cache=3), TypeError, "cache: expected a PagedKVCache"),
        (dict(host_pages=-1), ValueError, "host_pages must be at least 0"),
        (dict(host_pages=(1, 2)), ValueError, "host_pages: expected one for each of 1 groups, got 2"),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value)[:40],
)
def test_errors_name_the_argument(change, error, message):
    arguments: dict[str, Any] = {
        "model_fn": sum_model,
        "params": None,
        "cache": make_cache(),
        "prompts": PROMPTS,
        "max_new_tokens": MAX_NEW,
        **change,
    }
    with pytest.raises(error, match=message):
        generate(**arguments)


def test_streams_live_on_the_host():
    with pytest.raises(TypeError, match="cannot run inside jit"):
        jax.jit(lambda cache: stream(sum_model, None, cache, PROMPTS, max_new_tokens=2).result)(make_cache())
    with pytest.raises(ValueError, match="interval must be at least 1"):
        streamed(0)


def test_the_host_moves_pages_outside_jit():
    with pytest.raises(TypeError, match="host_pages: the host moves pages between runs"):
        jax.jit(lambda cache: run(np.array([[1, 2]]), cache=cache, host_pages=4))(make_cache())


SHARED = [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]  # two full pages and more
FAMILY = [[*SHARED, 4], SHARED, [9], [*SHARED, 4, 5, 9, 0, 4], [2, 7, 1, 8], [*SHARED, 3]]


def make_indexed(num_pages: int = 24) -> dict[str, Any]:
    """A cache and its index; 24 pages are few for six prompts of up to 27 tokens with what they generate."""
    cache = make_cache(num_pages=num_pages)
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "page_size": 4, "dtype": jnp.float32}
    config = paxcache.CacheConfig(num_pages=num_pages, max_seqs=3, max_pages_per_seq=8, **sizes)
    return {"cache": cache, "index": paxcache.prefix.device.init(config), "chunk_size": 4}


def again(out: Generation) -> dict[str, Any]:
    return {"cache": out.cache, "index": out.index, "chunk_size": 4}


def test_an_index_changes_no_token_and_saves_steps():
    without = run(FAMILY, cache=make_cache(num_pages=24), chunk_size=4)
    first = run(FAMILY, **make_indexed())
    assert first.to_lists() == without.to_lists() == [sum_oracle(p) for p in FAMILY]
    assert first.num_steps < without.num_steps
    second = run(FAMILY, **again(first))
    assert second.to_lists() == without.to_lists()
    assert second.num_steps < first.num_steps
    assert second.cache.seq_lens.tolist() == [0] * 3


def test_samples_of_one_prompt_compute_it_once():
    prompts = [[*SHARED, 5, 6, 7]] * 6  # 13 tokens: three full pages and one token to compute in any case
    without = run(prompts, cache=make_cache(num_pages=24), chunk_size=4)
    out = run(prompts, **make_indexed())
    assert out.to_lists() == without.to_lists() == [sum_oracle(prompts[0])] * 6
    assert (
        without.num_steps - out.num_steps >= 12
    )  # five times 12 tokens, four a step, less what ran beside decoding


def test_an_index_makes_way_when_pages_run_out():
    first = run(FAMILY, **make_indexed())
    other = [[n] * (10 + n) for n in range(3, 9)]  # shares nothing with what is stored
    assert sum((10 + n + MAX_NEW - 1) // 4 for n in range(3, 9)) > 24
    second = run(other, **again(first))
    assert second.to_lists() == [sum_oracle(p)[: 32 - len(p)] for p in other]
    assert run(FAMILY, **again(second)).to_lists() == first.to_lists()


@hypothesis.given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=16), min_size=6, max_size=6),
)
@hypothesis.settings(max_examples=15)
def test_any_prompts_with_an_index(prompts):
    state = make_indexed()
    for _ in range(2):
        out = run(prompts, **state)
        assert out.to_lists() == [sum_oracle(p) for p in prompts]
        state = again(out)


def test_swapping_with_an_index():
    """A row that comes back evicts what only the index holds; what it shared with the index, it has for itself."""
    prompts = [[n] * (8 + n) for n in range(3, 9)]
    state: dict[str, Any] = {**make_indexed(num_pages=11), "host_pages": 12}
    for _ in range(2):
        out = run(prompts, **state)
        assert out.to_lists() == [sum_oracle(p) for p in prompts]
        assert int(out.num_swaps) == int(out.num_preemptions) > 0
        state.update(again(out))


@hypothesis.given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=16), min_size=6, max_size=6),
)
@hypothesis.settings(max_examples=8)
def test_any_prompts_with_swaps_and_an_index(prompts):
    out = run(prompts, **make_indexed(num_pages=11), host_pages=12)
    assert out.to_lists() == [sum_oracle(p) for p in prompts]
    assert int(out.num_swaps) <= int(out.num_preemptions)
