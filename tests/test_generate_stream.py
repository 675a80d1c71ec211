"""Streams: the tokens of `generate` as they come, and streams that end before their time."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import jax
import numpy as np
import pytest

import paxcache
from generation import (
    MAX_NEW,
    PROMPTS,
    SWAPS,
    TABLE,
    assert_empty,
    busy_cache,
    make_cache,
    mixed_expected,
    reasons,
    run,
    streamed,
    sum_model,
    sum_oracle,
)
from paxcache import stream
from paxcache._generate import _api


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


def test_streams_live_on_the_host():
    with pytest.raises(TypeError, match="cannot run inside jit"):
        jax.jit(lambda cache: stream(sum_model, None, cache, PROMPTS, max_new_tokens=2).result)(make_cache())
    with pytest.raises(ValueError, match="interval must be at least 1"):
        streamed(0)


class BrokenError(Exception):
    pass


def model_that_fails(at: int):
    """The sum model, whose computation fails on the host when a row reaches a position."""

    def check(positions):
        if (positions >= at).any():
            raise BrokenError("a token too many")
        return np.zeros((), np.float32)

    def model(params, tokens, cache, step, logits_at):
        logits, cache = sum_model(params, tokens, cache, step, logits_at)
        zero = jax.pure_callback(check, jax.ShapeDtypeStruct((), np.float32), step.positions[logits_at])
        return logits + zero, cache

    return model


def test_a_failure_while_it_runs_is_the_error_that_comes_out(capsys):
    def some_tokens():
        arguments: Any = dict(max_new_tokens=MAX_NEW, chunk_size=8, interval=2, progress=True)
        with stream(model_that_fails(12), TABLE, busy_cache(38), PROMPTS, **arguments) as tokens:
            streams.append(tokens)
            yield from tokens

    streams: list[Any] = []
    with pytest.raises(Exception, match="a token too many"):
        list(some_tokens())
    (tokens,) = streams
    tokens.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="generation failed; there are no more tokens") as caught:
            next(tokens)
        assert "a token too many" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="generation failed; there is no result") as caught:
        _ = tokens.result
    assert "a token too many" in str(caught.value.__cause__)


def test_a_failure_while_it_is_traced_leaves_the_cache_alone():
    def model(*_):
        raise BrokenError("no model at all")

    cache = busy_cache(38)
    tokens = stream(model, TABLE, cache, PROMPTS, max_new_tokens=MAX_NEW)
    with pytest.raises(BrokenError), tokens:
        next(tokens)
    with pytest.raises(RuntimeError, match="generation failed") as caught:
        next(tokens)
    assert isinstance(caught.value.__cause__, BrokenError)
    assert run(cache=cache).to_lists() == [sum_oracle(p) for p in PROMPTS]


def test_an_interrupt_loses_nothing(monkeypatch):
    """Ctrl-C while the host waits for a segment: the stream can go on, or be closed with what there is."""
    program = _api.Program
    right, calls = program.tokens, []

    def interrupted(self, state):
        calls.append(state)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return right(self, state)

    monkeypatch.setattr(program, "tokens", interrupted)
    tokens = streamed(2)
    collected = [next(tokens)]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            for item in tokens:
                collected.append(item)
    tokens.close()
    out = tokens.result.to_lists()
    paxcache.check(tokens.result.cache)
    expected = [sum_oracle(p) for p in PROMPTS]
    assert [row[: len(new)] for row, new in zip(expected, out, strict=True)] == out
    for prompt in range(6):
        sent = [token for n, new in collected for token in new if n == prompt]
        assert sent == out[prompt][: len(sent)]
    assert sum(map(len, out)) > sum(len(new) for _, new in collected) > 0


def test_a_stream_that_is_dropped_frees_its_cache_at_once():
    tokens = streamed(2)
    next(tokens)
    pool = weakref.ref(tokens._state.cache.groups[0].pages.k)  # pyright: ignore
    gc.disable()
    try:
        del tokens
        assert pool() is None
    finally:
        gc.enable()
