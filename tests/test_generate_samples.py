"""Samples depend on a prompt, its values and its seed alone: not on neighbours, rows, pages or preemptions."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from generation import (
    MAX_NEW,
    MIXED,
    PROMPTS,
    SEEDS,
    SWAPS,
    TABLE,
    V,
    assert_empty,
    busy_cache,
    make_cache,
    mixed_expected,
    run,
    sum_model,
)
from paxcache import Sampling, generate, offload


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


@pytest.mark.parametrize("host_pages", [12, 3])
def test_swapping_changes_no_sample_and_recomputes_nothing(host_pages):
    traces = []

    def model(params, tokens, *args):
        traces.append(tokens.shape)
        return sum_model(params, tokens, *args)

    out = run(cache=busy_cache(7), model=model, **{**SWAPS, "host_pages": host_pages})
    assert sorted(traces) == [(4,), (8,)]  # one program, however often the host moves pages
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


def test_a_key_is_folded_with_the_number_of_a_prompt():
    """Each prompt draws what a loop over ``fold_in(fold_in(key, n), position)`` draws; raw keys are keys too."""
    hot = Sampling(temperature=3.0)
    key = jax.random.key(5)
    draw = functools.partial(run, sampling=hot, return_logprobs=True)
    out = draw(key=key).to_lists()
    for n, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + MAX_NEW:
            logits = TABLE[(7 * sum(tokens) + 5 * (len(tokens) - 1)) % V] / np.float32(3)
            noise = jax.random.gumbel(
                jax.random.fold_in(jax.random.fold_in(key, n), len(tokens)), (V,), np.float32
            )
            tokens.append(int(np.argmax(logits + np.asarray(noise))))
        assert out[n] == tokens[len(prompt) :]
    raw = jax.random.PRNGKey(5)
    assert draw(key=raw).to_lists() == draw(key=np.asarray(raw)).to_lists() == out
    assert draw(key=jax.random.key(6)).to_lists() != out
    assert draw().to_lists() == draw().to_lists()  # as the first lines of the docstring say


def test_greedy_programs_hold_no_keys():
    cache = make_cache()
    arguments: Any = dict(max_new_tokens=2, key=jax.random.key(0))
    text = str(
        jax.make_jaxpr(lambda cache: generate(sum_model, TABLE, cache, np.ones((2, 4), int), **arguments))(
            cache
        )
    )
    assert "while" in text and "threefry" not in text and "random" not in text
