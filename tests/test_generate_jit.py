"""What is compiled: one program for all values, inside jit too, that copies no pool."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paxcache
from generation import MAX_NEW, PROMPTS, TABLE, make_cache, reasons, sum_model, sum_oracle
from paxcache import Sampling, generate, stream


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
