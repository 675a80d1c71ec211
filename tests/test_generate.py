"""Generation against plain loops: a dense model recomputed from scratch, and a model whose answer is arithmetic."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxcache
from generation import (
    BUSY,
    MAX_NEW,
    PROMPTS,
    TABLE,
    V,
    assert_empty,
    busy_cache,
    make_cache,
    reasons,
    run,
    sum_model,
    sum_oracle,
)
from paxcache import Sampling, generate, stream

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


# Logits that are no distribution.

BAD = {
    "one nan": (jnp.nan, 1),
    "all nan": (jnp.nan, V),
    "an inf": (jnp.inf, 1),
    "no token left": (-jnp.inf, V),
}
VALUES: dict[str, Any] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
}


@functools.cache
def model_with_bad_logits():
    """The sum model, whose last logits are replaced where a row's newest token is 3, from its fifth token on."""

    def model(params, tokens, cache, step, logits_at):
        table, value, count = params
        logits, cache = sum_model(table, tokens, cache, step, logits_at)
        bad = (tokens[logits_at] == 3) & (step.positions[logits_at] >= 4)
        words = jnp.arange(V) >= V - count
        return jnp.where(bad[:, None] & words[None, :], value, logits), cache

    return model


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("bad", BAD)
def test_bad_logits_stop_a_row_and_no_other(bad, values):
    """The row keeps its tokens, among them the last one that was drawn from good logits; the others know nothing."""
    value, count = BAD[bad]
    options: dict[str, Any] = dict(
        sampling=Sampling(**VALUES[values]), return_logprobs=True, model=model_with_bad_logits()
    )
    good = run(params=(TABLE, np.float32(0), 0), **options).to_lists()
    out = run(params=(TABLE, np.float32(value), count), **options)
    stopped = []
    for prompt, whole, tokens, reason in zip(PROMPTS, good, out.to_lists(), reasons(out), strict=True):
        text = [*prompt, *whole[:-1]]  # what the model sees
        at = next((i for i in range(max(4, len(prompt) - 1), len(text)) if text[i] == 3), None)
        expected = whole if at is None else whole[: at + 1 - len(prompt)]
        assert tokens == expected
        assert reason == ("LENGTH" if at is None else "BAD_LOGITS")
        stopped.append(at is not None)
    assert any(stopped) and not all(stopped)
    assert np.isfinite(np.asarray(out.logprobs)).all()
    assert_empty(out.cache)


def test_a_stream_says_that_logits_were_bad():
    arguments: Any = dict(max_new_tokens=MAX_NEW, chunk_size=8, interval=3)
    params = TABLE, np.float32(np.nan), 1
    with stream(model_with_bad_logits(), params, busy_cache(38), PROMPTS, **arguments) as tokens:
        collected = [[] for _ in PROMPTS]
        for prompt, new in tokens:
            collected[prompt] += new
    assert collected == tokens.result.to_lists()
    assert "BAD_LOGITS" in reasons(tokens.result) and "LENGTH" in reasons(tokens.result)


def test_pages_behind_bad_logits_are_not_stored():
    config = paxcache.CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, num_pages=24, max_seqs=3, max_pages_per_seq=8
    )
    cache = make_cache(num_pages=24)
    index = paxcache.prefix.device.init(config)
    prompts = [[3] * 9]
    arguments: Any = dict(model=model_with_bad_logits(), chunk_size=16, max_new_tokens=4)
    out = run(prompts, cache=cache, index=index, params=(TABLE, np.float32(np.nan), 1), **arguments)
    assert reasons(out) == ["BAD_LOGITS"] and out.lengths.tolist() == [0]
    assert out.index is not None
    found = paxcache.prefix.device.match(out.index, jnp.array(prompts), jnp.array([9]))
    assert found.num_tokens.tolist() == [0]
