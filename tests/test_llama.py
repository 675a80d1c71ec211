"""The examples' model: golden logits of `transformers`, its caches and the built-in weights."""

from __future__ import annotations

import argparse
import dataclasses
import doctest
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import checkpoint
import llama
import paxcache
import train_tiny

DATA = Path(__file__).parent / "data"
TINY = Path(__file__).parent.parent / "examples" / "tiny"
FAMILIES = ("llama3", "llama_linear", "mistral", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def exact_products():
    """Float32 products in full precision on GPUs too, which would use tf32 by default."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def tiny() -> checkpoint.Checkpoint:
    return checkpoint.load(TINY, dtype=jnp.float32)


def golden(family: str):
    return checkpoint.load(DATA / family, dtype=jnp.float32).model, np.load(DATA / family / "golden.npz")


# --------------------------------------------------------------------------------------------------
# Agreement with transformers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(family):
    model, numbers = golden(family)
    logits = jax.jit(lambda model, tokens: model(tokens))(model, numbers["tokens"])
    assert np.abs(numbers["logits"]).max() > 1  # else the tolerance would say little
    np.testing.assert_allclose(logits, numbers["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rope_frequencies_agree_with_transformers(family):
    model, numbers = golden(family)
    np.testing.assert_allclose(
        llama.rope_frequencies(model.config), numbers["rope_frequencies"], rtol=1e-6, atol=0
    )


def test_llama3_rope_scaling_keeps_fast_pairs_and_stretches_slow_ones():
    model, _ = golden("llama3")
    scaled = llama.rope_frequencies(model.config)
    plain = llama.rope_frequencies(dataclasses.replace(model.config, rope_scaling=None))
    ratio = scaled / plain
    assert ratio[0] == 1
    np.testing.assert_allclose(ratio[-1], 1 / 8, rtol=1e-6)
    assert np.any((ratio > 1 / 8 + 1e-3) & (ratio < 1 - 1e-3)), "no pair lies in the blended band"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_through_the_dense_cache(family):
    model, numbers = golden(family)
    prompts, expected = numbers["tokens"], numbers["greedy_tokens"]
    (B, P), N = prompts.shape, expected.shape[1]
    model_fn, params = llama.dense_model(model)
    step = jax.jit(model_fn, donate_argnums=2)
    cache = llama.init_dense(model.config, max_seqs=B, max_len=P + N, dtype=jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(P), (B, P))
    logits, cache = step(params, prompts, cache, positions, jnp.full(B, P - 1))
    tokens = []
    for i in range(N):
        tokens.append(jnp.argmax(logits, -1))
        logits, cache = step(
            params, tokens[-1][:, None], cache, jnp.full((B, 1), P + i), jnp.zeros(B, jnp.int32)
        )
    np.testing.assert_array_equal(np.stack(tokens, 1), expected)


# --------------------------------------------------------------------------------------------------
# The paged forward pass
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_and_greedy_decoding_through_pages(family):
    model, numbers = golden(family)
    tokens, greedy = numbers["tokens"], numbers["greedy_tokens"]
    P, N, T = tokens.shape[1], greedy.shape[1], 40
    config = llama.cache_config(
        model.config, num_pages=32, max_seqs=3, max_len=P + N, page_size=4, dtype=jnp.float32
    )
    cache = paxcache.init(config)
    model_fn, params = llama.paged_model(model)
    step_fn = jax.jit(model_fn, donate_argnums=2)
    done = np.zeros(3, int)
    # Rows 0 and 2 advance unevenly and row 1 stays idle; every packed buffer ends in padding.
    for lens in ((7, 0, 3), (1, 0, 12), (0, 0, 9), (20, 0, 1), (12, 0, 15)):
        parts = [(r // 2, done[r], done[r] + n) for r, n in enumerate(lens) if n]
        packed = np.zeros(T, np.int32)
        packed[: sum(lens)] = np.concatenate([tokens[r, a:b] for r, a, b in parts])
        cache, step = paxcache.extend(cache, jnp.array(lens), num_tokens=T)
        assert step.ok.all()
        logits, cache = step_fn(params, packed, cache, step, jnp.arange(T))
        expected = np.concatenate([numbers["logits"][r, a:b] for r, a, b in parts])
        np.testing.assert_allclose(logits[: sum(lens)], expected, rtol=0, atol=1e-5)
        done += lens
    assert done.tolist() == [P, 0, P]
    written = [np.argmax(logits[jnp.array([11, 26])], -1)]  # after the last token of either row
    for _ in range(N - 1):
        packed = np.zeros(T, np.int32)
        packed[:2] = written[-1]
        cache, step = paxcache.extend(cache, jnp.array([1, 0, 1]), num_tokens=T)
        assert step.ok.all()
        logits, cache = step_fn(params, packed, cache, step, jnp.arange(T))
        written.append(np.argmax(logits[:2], -1))
    np.testing.assert_array_equal(np.stack(written, 1), greedy)
    paxcache.check(cache)


def test_only_the_asked_logits_are_computed_and_weights_are_an_argument():
    model, numbers = golden("qwen2")
    config = llama.cache_config(model.config, num_pages=8, max_seqs=1, max_len=32, dtype=jnp.float32)
    model_fn, params = llama.paged_model(model)
    cache, step = paxcache.extend(paxcache.init(config), jnp.array([9]), num_tokens=9)
    counted = jax.jit(chex.assert_max_traces(model_fn, n=1))
    tokens = numbers["tokens"][0, :9]
    logits, _ = counted(params, tokens, cache, step, jnp.array([8, 2]))
    assert logits.shape == (2, model.config.vocab_size)
    np.testing.assert_allclose(logits, numbers["logits"][0, [8, 2]], rtol=0, atol=1e-5)
    other = jax.tree.map(lambda x: x * 2, params)
    changed, _ = counted(other, tokens, cache, step, jnp.array([8, 2]))
    assert np.abs(changed - logits).max() > 0.1


def test_no_weight_is_copied_in_a_step():
    """Products read the arrays of the model where they lie: there is no stack to cut layers from."""
    model, _ = golden("qwen3")
    config = llama.cache_config(model.config, num_pages=4, max_seqs=1, max_len=16, dtype=jnp.float32)
    model_fn, params = llama.paged_model(model)
    cache, step = paxcache.extend(paxcache.init(config), jnp.array([1]), num_tokens=1)
    step_fn = jax.jit(model_fn, donate_argnums=2)
    text = (
        step_fn.lower(params, jnp.zeros(1, jnp.int32), cache, step, jnp.array([0])).compile().as_text() or ""
    )
    shapes = {"f32[" + ",".join(map(str, p.shape)) + "]" for p in jax.tree.leaves(params) if p.ndim == 2}
    made = re.compile(r"= (f32\[[\d,]+\])\S* (?:copy|slice|dynamic-slice|fusion|convert)\(")
    assert len(shapes) > 4, "these are told from activations by their shapes"
    assert not shapes & {m.group(1) for m in made.finditer(text)}


def test_cache_config_follows_the_model():
    config = llama.cache_config(
        golden("mistral")[0].config, num_pages=10, max_seqs=2, max_len=33, page_size=8
    )
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (2, 2, 8)
    assert (config.max_pages_per_seq, config.sliding_window, config.dtype) == (5, 12, jnp.bfloat16)


def test_dense_rows_of_different_lengths_do_not_see_padding():
    model, numbers = golden("qwen3")
    model_fn, params = llama.dense_model(model)
    model_fn = jax.jit(model_fn)
    cache = llama.init_dense(model.config, max_seqs=2, max_len=16, dtype=jnp.float32)
    lens = np.array([9, 4])
    tokens = np.where(np.arange(9) < lens[:, None], numbers["tokens"][:, :9], 0)
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    logits, cache = model_fn(params, tokens, cache, positions, lens - 1)
    for row, n in enumerate(lens):
        np.testing.assert_allclose(logits[row], numbers["logits"][row, n - 1], rtol=0, atol=1e-5)
    following = numbers["tokens"][np.arange(2), lens][:, None]
    logits, _ = model_fn(params, following, cache, lens[:, None], jnp.zeros(2, jnp.int32))
    for row, n in enumerate(lens):
        np.testing.assert_allclose(logits[row], numbers["logits"][row, n], rtol=0, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits():
    model = checkpoint.load(DATA / "qwen3", dtype=jnp.bfloat16).model
    numbers = np.load(DATA / "qwen3" / "golden.npz")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    logits = model(numbers["tokens"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, numbers["logits"], rtol=0, atol=0.15)
    assert np.abs(logits - numbers["logits"]).max() > 1e-4  # it did not quietly run in float32


# --------------------------------------------------------------------------------------------------
# The built-in model
# --------------------------------------------------------------------------------------------------


def test_tiny_model_is_small_and_reads_any_text(tiny):
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 4_000_000
    mark = tiny.tokenizer.token_to_id(train_tiny.END_OF_TEXT)
    assert tiny.stop_tokens == (mark,)
    text = "  The “with” statement,\n\tthen 12345 and ☃."
    tokens = tiny.encode(text)
    assert tokens[0] == mark
    assert tiny.decode(tokens) == text


def test_tiny_model_predicts_held_out_text(tiny):
    tokens = train_tiny.encode_text(tiny.tokenizer, train_tiny.held_out_text())[:8193]
    # 4.20 where it was trained (Python 3.12); other versions' texts differ a little. Guessing costs 8.3.
    assert train_tiny.held_out_loss(tiny.model, tokens) < 4.5


def test_tiny_model_writes_words(tiny):
    prompts = ["The exception is", "If the file"]
    model_fn, params = llama.paged_model(tiny.model)
    config = llama.cache_config(tiny.config, num_pages=16, max_seqs=2, max_len=64, dtype=jnp.float32)
    tokens = [tiny.encode(prompt) for prompt in prompts]
    lens = jnp.array([len(row) for row in tokens])
    cache, step = paxcache.extend(paxcache.init(config), lens, num_tokens=16)
    packed = jnp.zeros(16, jnp.int32).at[: lens.sum()].set(np.concatenate(tokens))
    logits, cache = jax.jit(model_fn)(params, packed, cache, step, jnp.cumsum(lens) - 1)

    def body(carry, _):
        logits, cache = carry
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        cache, step = paxcache.extend(cache, jnp.ones(2, jnp.int32), num_tokens=2)
        return model_fn(params, token, cache, step, jnp.arange(2)), token

    _, written = jax.jit(lambda carry: jax.lax.scan(body, carry, None, length=32))((logits, cache))
    documents = [name for name in train_tiny.document_names() if name.startswith("topic/")]
    text = " ".join(train_tiny.read_document(name) for name in documents)
    known = set(re.findall(r"[a-z]+", text.lower()))
    for row in np.asarray(written).T:
        words = re.findall(r"[a-z]+", tiny.decode(row).lower())
        assert len(set(words)) >= 8, words
        assert np.mean([word in known for word in words]) > 0.9, words


def test_held_out_documents_are_kept_from_training():
    names = train_tiny.document_names()
    held_out = [name for name in names if train_tiny.is_held_out(name)]
    assert 0.03 < len(held_out) / len(names) < 0.08
    assert {name.split("/")[0] for name in held_out} == {"topic", "module"}
    text = train_tiny.held_out_text()
    assert text == train_tiny.held_out_text()
    training = train_tiny.training_text()
    assert len(training) > 1_000_000
    paragraphs = {" ".join(p.split()) for p in re.split(r"\n\s*\n", training)}
    shared = [
        p
        for p in re.split(r"\n\s*\n", text.replace(train_tiny.END_OF_TEXT, ""))
        if " ".join(p.split()) in paragraphs
    ]
    assert not shared, shared[:3]


def test_training_lowers_the_loss(monkeypatch):
    config = llama.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=4,
        max_len=128,
        tied_embeddings=True,
    )
    monkeypatch.setattr(train_tiny, "CONFIG", config)
    args = argparse.Namespace(
        seed=0,
        steps=150,
        batch=4,
        seq_len=16,
        learning_rate=1e-2,
        weight_decay=0.1,
        dropout=0.1,
        report_every=150,
    )
    tokens = np.tile(np.arange(config.vocab_size, dtype=np.int32), 100)  # each token names the next
    model = train_tiny.train(args, tokens, tokens)
    assert train_tiny.held_out_loss(model, tokens, seq_len=16) < 0.5 * np.log(config.vocab_size)


def test_documented_examples_run():
    results = doctest.testmod(llama)
    assert results.attempted > 0
    assert results.failed == 0


def test_layers_are_lowered_once_for_all():
    def products(num_layers):
        config = llama.LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=num_layers, num_heads=2, num_kv_heads=1,
            head_dim=4, max_len=32,
        )  # fmt: skip
        model_fn, params = llama.paged_model(llama.Llama(config, rngs=nnx.Rngs(0)))
        pages = llama.cache_config(config, num_pages=8, max_seqs=2, max_len=32, dtype=jnp.float32)
        cache, step = paxcache.extend(paxcache.init(pages), jnp.array([2, 1]), num_tokens=4)
        arguments = params, jnp.zeros(4, jnp.int32), cache, step, jnp.zeros(2, jnp.int32)
        return jax.jit(model_fn).lower(*arguments).as_text().count("dot_general")

    assert products(5) == products(2)
