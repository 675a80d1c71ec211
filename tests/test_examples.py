"""The examples in examples/ that show one use each: they run, and what they claim is true."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import beam_search
import chat
import custom_model
import llama
import paxcache
import policy_sweep
import resume
import rollouts
import speculative
import tensor_parallel
from paxcache import prefix

FOLDER = Path(__file__).parent.parent / "examples"
SMALL = (
    *("quickstart", "beam_search", "speculative", "chat", "resume", "custom_model"),
    *("tensor_parallel", "rollouts", "policy_sweep"),
)
CONFIG = llama.LlamaConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_len=64,
)


@pytest.fixture(scope="module")
def model() -> llama.Llama:
    """A random model with few words, whose texts soon repeat."""
    return llama.Llama(CONFIG, rngs=nnx.Rngs(1))


def pages(max_seqs: int, num_pages: int = 32) -> paxcache.CacheConfig:
    return llama.cache_config(
        CONFIG, num_pages=num_pages, max_seqs=max_seqs, max_len=64, page_size=4, dtype=jnp.float32
    )


@jax.jit
def likeliest(model: llama.Llama, text: jax.Array, length: int) -> jax.Array:
    return jnp.argmax(model(text[None])[0, length - 1])


def greedy(model: llama.Llama, prompt: list[int], num_tokens: int) -> list[int]:
    """The likeliest tokens one by one, each from the whole text."""
    text = np.zeros(CONFIG.max_len, np.int32)
    text[: len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + num_tokens):
        text[n] = likeliest(model, text, n)
    return text[len(prompt) : len(prompt) + num_tokens].tolist()


def test_quickstart(capsys):
    values = runpy.run_path(str(FOLDER / "quickstart.py"))
    written = capsys.readouterr().out.splitlines()
    assert written[0].startswith("The import statement|")
    assert written[-1].startswith("attended (7, 4, 8); rows hold [5 2] tokens in 3 pages")
    q, k, v, out = (np.asarray(values[name], np.float32) for name in ("q", "k", "v", "out"))
    for row in (slice(0, 5), slice(5, 7)):
        alone = jax.nn.dot_product_attention(q[None, row], k[None, row], v[None, row], is_causal=True)[0]
        np.testing.assert_allclose(out[row], alone, atol=0.02)


def test_beam_search_keeps_the_best_of_all_continuations(model):
    model_fn, params = llama.paged_model(model)
    prompt, B, n = [3, 1, 4, 1, 5], 6, 5
    cache = paxcache.init(pages(B))
    beams, scores, cache, ok = beam_search.beam_search(
        model_fn, params, cache, jnp.array(prompt), num_tokens=n
    )
    assert ok
    paxcache.check(cache)
    assert len({tuple(beam) for beam in beams.tolist()}) == B
    # A beam search without a cache, over whole texts.
    log_probs = jax.jit(lambda texts: jax.nn.log_softmax(model(texts)))
    kept = [(0.0, ())]
    for _ in range(n):
        texts = jnp.array([[*prompt, *beam, *[0] * (n - len(beam))] for _, beam in kept])
        last = np.asarray(log_probs(texts))[:, len(prompt) + len(kept[0][1]) - 1]
        grown = [
            (s + p, (*beam, t)) for (s, beam), row in zip(kept, last, strict=True) for t, p in enumerate(row)
        ]
        kept = sorted(grown, reverse=True)[:B]
    assert beams.tolist() == [list(beam) for _, beam in kept]
    np.testing.assert_allclose(scores, [score for score, _ in kept], rtol=1e-4)


def test_beam_search_says_when_the_pool_is_too_small(model):
    model_fn, params = llama.paged_model(model)
    cache = paxcache.init(pages(4, num_pages=4))
    assert not beam_search.beam_search(model_fn, params, cache, jnp.array([3, 1, 4]), num_tokens=12)[3]


@pytest.mark.parametrize(("seed", "most_steps"), [(1, 24), (4, 12)], ids=["varied", "repetitive"])
def test_speculation_writes_the_tokens_of_plain_decoding_in_fewer_steps(seed, most_steps):
    model = llama.Llama(CONFIG, rngs=nnx.Rngs(seed))
    model_fn, params = llama.paged_model(model)
    prompts, n = [[3, 1, 4, 1], [2, 7], [5, 5, 5, 5, 5, 9]], 24
    lens = jnp.array([len(prompt) for prompt in prompts])
    tokens = jnp.array([prompt + [0] * (30 - len(prompt)) for prompt in prompts])
    limits = jnp.minimum(lens + n, 30)
    tokens, num_steps, ok = speculative.speculate(
        model_fn, params, paxcache.init(pages(3)), tokens, lens, limits, num_drafts=3
    )
    assert ok
    for prompt, row, limit in zip(prompts, tokens.tolist(), limits.tolist(), strict=True):
        assert row[:limit] == prompt + greedy(model, prompt, limit - len(prompt))
    assert num_steps <= most_steps


def test_drafts_follow_the_latest_earlier_place():
    tokens = jnp.array(
        [[1, 2, 3, 4, 1, 2, 5, 1, 2, 0], [1, 2, 3, 4, 5, 6, 0, 0, 0, 0], [7, 7, 7, 0, 0, 0, 0, 0, 0, 0]]
    )
    drafts, count = speculative.look_up(tokens, jnp.array([9, 6, 3]), num_drafts=4)
    assert count.tolist() == [4, 0, 4]
    assert drafts[0].tolist() == [5, 1, 2, 5] and drafts[2].tolist() == [7, 7, 7, 7]


def test_chat_answers_the_same_whatever_is_reused(model):
    model_fn, params = llama.paged_model(model)
    config = pages(1, num_pages=14)
    forward = jax.jit(chex.assert_max_traces(model_fn, n=2))

    def fresh():
        return chat.Server(forward, params, paxcache.init(config), prefix.init(config))

    server, conversation, reused = fresh(), [3, 1, 4, 1, 5], []
    for turn in ([9, 2], [6], [5, 3, 5]):
        conversation += turn
        server, answer, num_reused = chat.reply(server, conversation, 6)
        assert answer == chat.reply(fresh(), conversation, 6)[1] == greedy(model, conversation, 6)
        reused.append(num_reused)
        conversation += answer
        paxcache.check(server.cache, held=prefix.held(server.index)[0])
    assert reused == [0, 12, 16]
    # Other conversations push the pages out, one by one, and all goes on.
    for first in range(6, 12):
        server, answer, _ = chat.reply(server, [first] * 20, 6)
        assert answer == greedy(model, [first] * 20, 6)


def test_a_loaded_state_goes_on_bit_for_bit(model, tmp_path):
    model_fn, params = llama.paged_model(model)
    state = resume.start(model_fn, params, pages(3), [3, 1, 4, 1, 5], jax.random.key(3))
    state, _, ok = resume.advance(model_fn, params, state, num_steps=6)
    resume.persist.save(tmp_path / "state", state)
    loaded = resume.persist.load(tmp_path / "state")
    one, tokens, _ = resume.advance(model_fn, params, state, num_steps=8)
    other, again, _ = resume.advance(model_fn, params, loaded, num_steps=8)
    assert ok and len(set(map(tuple, tokens.tolist()))) == 3, "rows draw differently"
    np.testing.assert_array_equal(tokens, again)
    chex.assert_trees_all_equal(one["cache"], other["cache"])
    paxcache.check(other["cache"])


def test_one_model_in_three_frameworks_writes_one_text():
    nnx_text, linen_text, jax_text = custom_model.main(num_tokens=6)
    assert nnx_text == linen_text == jax_text
    assert len({*nnx_text[0], *nnx_text[1]}) > 2


@pytest.mark.parametrize("name", SMALL)
def test_examples_are_short(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize(
    "module", [beam_search, speculative, chat, resume], ids=lambda module: module.__name__
)
def test_programs_run(module, capsys):
    """As they are, on the built-in model."""
    module.main()
    assert {
        beam_search: "pages in the pool",
        speculative: "64 tokens in",
        chat: "hit rate",
        resume: "bit for bit as if never saved: True",
    }[module] in capsys.readouterr().out


def test_tensor_parallel_tokens_and_pages_are_those_of_one_device(cpu_devices):
    keys = jax.random.split(jax.random.key(1), len(tensor_parallel.SHAPES))
    params = {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, tensor_parallel.SHAPES.items(), strict=True)
    }
    prompts = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    mesh = jax.sharding.Mesh(np.array(cpu_devices), ("heads",))
    tokens, cache = tensor_parallel.generate_on(mesh, params, prompts, 8)
    cache_alone = paxcache.init(tensor_parallel.CONFIG)
    alone = paxcache.generate(tensor_parallel.model_fn, params, cache_alone, prompts, max_new_tokens=8)
    np.testing.assert_array_equal(tokens, alone.tokens)
    assert len(set(tokens.ravel().tolist())) > 4
    pages = cache.groups[0].pages.k
    assert [shard.data.shape[2] for shard in pages.addressable_shards] == [2, 2]
    np.testing.assert_allclose(pages, alone.cache.groups[0].pages.k, atol=0.1)


def test_rollouts_learn_what_is_rewarded_over_shared_pages(model, monkeypatch):
    held = []
    reset = rollouts.device.reset

    def spy(cache, index):
        held.append(int(index.num_entries))
        paxcache.check(cache, held=rollouts.device.held(cache, index)[0])
        cache, index = reset(cache, index)
        assert index.num_entries == 0
        return cache, index

    monkeypatch.setattr(rollouts.device, "reset", spy)
    prompts = [list(range(9)), [5, 6, 7]]
    trained, means = rollouts.train(
        model,
        prompts,
        lambda tokens: tokens.count(7) / 8,
        num_rounds=15,
        num_samples=8,
        num_tokens=8,
        learning_rate=2.0,
    )
    assert all(entries > 0 for entries in held), "the first prompt fills a page, which its samples share"
    assert np.mean(means[-3:]) > np.mean(means[:3]) + 0.2
    before, after = (nnx.state(m, nnx.Param) for m in (model, trained))
    assert any(
        np.abs(a - b).max() > 0 for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def test_every_policy_meets_every_trace_as_if_alone():
    rng = np.random.default_rng(0)
    prompt_lens, answer_lens = (jnp.array(rng.integers(8, 100, (2, 24))) for _ in range(2))
    reserves = jnp.array([0, 6, 48])
    finished, computed = policy_sweep.sweep(prompt_lens, answer_lens, reserves, num_steps=120)
    alone = jax.jit(functools.partial(policy_sweep.simulate, num_steps=120))
    for i, reserve in enumerate(reserves):
        for j, trace in enumerate(zip(prompt_lens, answer_lens, strict=True)):
            assert (finished[i, j], computed[i, j]) == alone(*trace, reserve)
    # With all pages kept free, requests run one by one and nothing is computed twice.
    needed = np.cumsum(np.asarray(answer_lens), axis=1)
    assert finished[-1].tolist() == [(row <= 120).sum() for row in needed]
    for trace in range(2):
        n = int(finished[-1, trace])
        steps_left = 120 - needed[trace, n - 1]
        prompts = prompt_lens[trace, : n + (steps_left > 0)].sum()
        answers = answer_lens[trace, :n].sum() - n + max(steps_left - 1, 0)
        assert computed[-1, trace] == prompts + answers
    assert (finished[0] > finished[-1]).all() and (computed[0] > computed[1]).any()
