"""`generate` under JAX's modes and transformations: the tokens are the same everywhere, and nothing is warned of."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import paxcache
from generation import TABLE, V, make_cache, sum_model
from paxcache import Sampling, generate

LENS = np.array([5, 2, 3], np.int32)
TOKENS = np.random.default_rng(0).integers(0, V, (3, 5)).astype(np.int32)
SAMPLING: dict[str, Any] = dict(
    temperature=[0.0, 1.5, 0.9], top_k=[0, 9, 0], top_p=[1.0, 0.9, 0.8], min_p=0.01, repetition_penalty=1.2
)


def program(cache, tokens, lens, key, temperature):
    """Prompts that wait for rows and for pages, and are sampled with all filters."""
    return generate(
        sum_model,
        TABLE,
        cache,
        tokens,
        prompt_lens=lens,
        max_new_tokens=6,
        chunk_size=4,
        stop_tokens=[3],
        sampling=Sampling(**{**SAMPLING, "temperature": temperature}),
        key=key,
        return_logprobs=True,
    )


def arguments(key=0):
    cache = make_cache(num_pages=3, max_seqs=2, max_pages_per_seq=4)
    temperature = np.array(SAMPLING["temperature"], np.float32)
    return cache, TOKENS, LENS, jax.random.key(key), temperature


@functools.cache
def expected():
    out = program(*arguments())
    assert int(out.num_preemptions) > 0
    return out.to_lists(), np.asarray(out.logprobs)


MODES: dict[str, Any] = {
    "rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    "dtype_promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "checking_leaks": jax.checking_leaks,
    "rbg": lambda: jax.default_prng_impl("rbg"),
}


def same(out):
    tokens, logprobs = expected()
    assert out.to_lists() == tokens
    np.testing.assert_allclose(out.logprobs, logprobs, 1e-5, 1e-5)
    paxcache.check(out.cache)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_changes_no_token(mode):
    expected()
    key = jax.random.key(0, impl="threefry2x32")
    with MODES[mode]():
        cache, tokens, lens, _, temperature = arguments()
        same(program(cache, tokens, lens, key, temperature))


def test_without_jit():
    expected()
    with jax.disable_jit():
        same(program(*arguments()))


@pytest.mark.parametrize("errors", ["user", "float", "div"])
def test_under_checkify(errors):
    checks = getattr(checkify, f"{errors}_checks")
    error, out = jax.jit(checkify.checkify(program, errors=checks))(*arguments())
    error.throw()
    same(out)


def test_checks_of_a_model_come_out():
    def model(params, tokens, cache, step, logits_at):
        checkify.check((step.positions < 7).all(), "a position too far")
        return sum_model(params, tokens, cache, step, logits_at)

    def run(cache, tokens):
        return generate(model, TABLE, cache, tokens, max_new_tokens=6, chunk_size=4)

    error, _ = jax.jit(checkify.checkify(run))(make_cache(), TOKENS)
    with pytest.raises(checkify.JaxRuntimeError, match="a position too far"):
        error.throw()


@pytest.mark.parametrize("jit", [False, True])
def test_vmap_over_caches(jit):
    """Each member has its own cache, prompts and key; one takes more steps than another."""
    lens = [LENS, np.array([1, 4, 5], np.int32)]
    members = [arguments(key) for key in range(2)]
    members = [(*m[:2], n, *m[3:]) for m, n in zip(members, lens, strict=True)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
    together = jax.vmap(program)
    out = (jax.jit(together) if jit else together)(*stacked)
    for n, member in enumerate(members):
        one = program(*member)
        mine = jax.tree.map(lambda x, n=n: x[n], out)
        assert mine.to_lists() == one.to_lists()
        assert mine.stop_reasons.tolist() == one.stop_reasons.tolist()
        assert int(mine.num_steps) == int(one.num_steps)
        assert mine.logprobs is not None and one.logprobs is not None
        np.testing.assert_allclose(mine.logprobs, one.logprobs, 1e-5, 1e-5)
        paxcache.check(mine.cache)


def test_vmap_over_keys_alone():
    """The cache and the prompts are shared: samples of the same prompts."""
    keys = jax.random.split(jax.random.key(3), 2)
    cache, tokens, lens, _, temperature = arguments()
    out = jax.vmap(lambda key: program(cache, tokens, lens, key, temperature))(keys)
    for n in range(2):
        one = program(*arguments()[:3], keys[n], temperature)
        assert jax.tree.map(lambda x, n=n: x[n], out).to_lists() == one.to_lists()
