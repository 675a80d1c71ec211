"""Generation with a prefix index: shared pages change no token."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp

import paxcache
from generation import MAX_NEW, make_cache, run, sum_oracle
from paxcache import Generation

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
