"""What users pass to `generate` and `stream`: each error names the argument."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from generation import MAX_NEW, PROMPTS, TABLE, V, busy_cache, make_cache, run, sum_model, sum_oracle
from paxcache import Sampling, generate, stream


def test_the_cache_is_donated_only_once_the_model_is_traced():
    def broken(params, tokens, cache, step, logits_at):
        return jnp.zeros((2, V)), cache

    cache = busy_cache(38)
    with pytest.raises(ValueError, match=r"model_fn: expected logits \[R=4, V\], got float32\[2,31\]"):
        generate(broken, None, cache, PROMPTS, max_new_tokens=2)
    out = run(cache=cache)
    assert out.to_lists() == [sum_oracle(p) for p in PROMPTS]
    assert cache.groups[0].pages.k.is_deleted()


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
        (dict(seeds=1.5), TypeError, "seeds: expected integer values"),
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


def test_the_host_moves_pages_outside_jit():
    with pytest.raises(TypeError, match="host_pages: the host moves pages between runs"):
        jax.jit(lambda cache: run(np.array([[1, 2]]), cache=cache, host_pages=4))(make_cache())


PADDED = np.ones((6, 4), np.int32)
WRONG: list[Any] = ["x", b"x", {1}, object(), 1.0, [1.5] * 6, True, [True] * 6, [1, [2, 3]], np.full(6, 1j)]
TOO_LARGE: list[Any] = [
    2**31,
    -(2**31) - 1,
    2**70,
    np.int64(2**40),
    np.uint32(2**32 - 1),
    np.full(6, 2**33),
    np.full(6, 2**63, np.uint64),
    [2**31] * 6,
    [2**70] * 6,
]


def refused(error, match, **change):
    """That a request is refused, before anything is compiled or donated."""

    def model(*_):
        raise AssertionError("the model was traced")

    arguments: dict[str, Any] = {
        "prompts": PROMPTS,
        "max_new_tokens": MAX_NEW,
        "cache": make_cache(),
        **change,
    }
    arguments = {"model_fn": model, "params": None, **arguments}
    for call in (generate, stream):
        with pytest.raises(error, match=match):
            call(**arguments)
    for leaf in jax.tree.leaves(arguments["cache"]):
        assert not isinstance(leaf, jax.Array) or not leaf.is_deleted()


@pytest.mark.parametrize("name", ["seeds", "limits", "prompt_lens", "stop_tokens"])
@pytest.mark.parametrize("value", [*WRONG, *TOO_LARGE])
def test_integers_of_a_prompt_are_integers_that_int32_holds(name, value):
    prompts = PADDED if name == "prompt_lens" else PROMPTS
    refused((TypeError, ValueError), name, prompts=prompts, **{name: value})


@pytest.mark.parametrize(
    "value", [*TOO_LARGE[-4:], [[[1]]] * 6, np.ones((1, 2, 3), int), [[-2]] * 6, -2], ids=str
)
def test_stop_tokens_are_token_ids(value):
    refused(ValueError, "stop_tokens", stop_tokens=value)


@pytest.mark.parametrize(
    "key", [0, 1.0, "x", np.zeros(2), np.zeros(2, np.int32), np.zeros(3, np.uint32), np.uint32(3)]
)
def test_a_key_is_a_jax_key(key):
    refused((TypeError, ValueError), "key: expected (a|one) JAX key", key=key)


def test_a_key_is_one_key():
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        refused(ValueError, "key: expected one JAX key, got ", key=jax.random.split(key, 6))


def test_one_source_of_random_numbers():
    refused(TypeError, "key and seeds: ", key=jax.random.key(0), seeds=1)


def test_arguments_that_do_not_exist_or_lack():
    refused(TypeError, "temperature: is no argument", temperature=0.5)
    with pytest.raises(TypeError, match="max_new_tokens: is needed"):
        generate(sum_model, TABLE, make_cache(), PROMPTS)  # pyright: ignore


@pytest.mark.parametrize("name", ["chunk_size", "host_pages", "max_new_tokens", "interval"])
@pytest.mark.parametrize("value", [*WRONG, 2**70, -(2**40)])
def test_static_numbers_are_python_integers(name, value):
    if name == "interval":
        with pytest.raises((TypeError, ValueError), match=name):
            stream(sum_model, None, make_cache(), PROMPTS, max_new_tokens=1, interval=value)
    else:
        refused((TypeError, ValueError), name, **{name: value})


@pytest.mark.parametrize("name", ["return_logprobs", "progress"])
@pytest.mark.parametrize("value", [*WRONG[:6], 1, 0, None, np.ones(2, bool)])
def test_flags_are_booleans(name, value):
    refused(TypeError, name, **{name: value})


@pytest.mark.parametrize(
    "name", ["max_new_tokens", "stop_tokens", "sampling", "cache", "model_fn", "prompts"]
)
def test_none_where_something_is_needed(name):
    refused(TypeError, name, **{name: None})


@pytest.mark.parametrize(
    "prompts",
    [
        [[1], [1, [2]]],
        [[1], None],
        [[1], b"ab"],
        [[1], [2**31]],
        [[1], [2**70]],
        [[1], [np.uint64(2**63)]],
        [[1], [True]],
        [[1], 7],
        [[1], [[1]]],
        [[1], [None]],
        np.array([[1, 2], [1, -1]]),
        np.array([[1, 2], [-(2**31), 1]]),
        jnp.array([[1, 2], [-7, 1]]),
    ],
)
def test_prompts_that_are_wrong_are_numbered(prompts):
    refused((TypeError, ValueError), r"prompts\[1\]: ", prompts=prompts)


@pytest.mark.parametrize(
    "prompts",
    [
        {1: [2]},
        {1},
        7,
        b"ab",
        iter([[1]]),
        np.ones((2, 2), np.float32),
        np.ones((2, 2), bool),
        np.full((2, 2), 2**40),
        np.full((2, 2), 2**31, np.uint32),
        np.array([["a"]]),
        jnp.ones((2, 2)),
        np.ones((2, 2, 2), int),
    ],
)
def test_prompts_are_lists_or_one_array(prompts):
    refused((TypeError, ValueError), "prompts: ", prompts=prompts)


def test_negative_numbers_past_a_prompt_are_padding():
    padded = np.full((6, 16), -1)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    out = run(padded.astype(np.int64), prompt_lens=np.array([len(p) for p in PROMPTS], np.uint8))
    assert out.to_lists() == [sum_oracle(p) for p in PROMPTS]


def test_any_integers_that_int32_holds_will_do():
    numbers = dict(limits=[12, 3, 1, 0, 12, 5], seeds=[7, 0, 2**31 - 1, 3, 4, 5])
    stop = [[tokens[4]] for tokens in map(sum_oracle, PROMPTS)]
    some = dict(temperature=1.0, top_k=4)
    out = run(sampling=Sampling(**some), stop_tokens=stop, **numbers).to_lists()
    for dtype in (np.int64, np.uint64, np.uint32):
        arrays = {name: np.array(value, dtype) for name, value in numbers.items()}
        ids = [np.array(row, dtype) for row in stop]
        again = Sampling(temperature=np.float64(1), top_k=np.array(some["top_k"], dtype))
        prompts = [np.array(p, dtype) for p in PROMPTS]
        assert run(prompts, sampling=again, stop_tokens=ids, **arrays).to_lists() == out
        assert run(sampling=again, stop_tokens=np.array(stop, dtype), **arrays).to_lists() == out


def test_x64_arrays_are_not_wrapped():
    with jax.enable_x64(True):
        for name in ("seeds", "limits", "prompt_lens"):
            refused(
                ValueError, f"{name}: values must fit int32", prompts=PADDED, **{name: jnp.full(6, 2**32 + 1)}
            )
        refused(ValueError, "prompts: values must fit int32", prompts=jnp.full((6, 4), 2**32 + 1))
        out = jax.jit(
            lambda limits: generate(
                sum_model, TABLE, make_cache(), PADDED, max_new_tokens=MAX_NEW, limits=limits
            )
        )(jnp.full(6, 2**32 + 1))  # cut, not taken for 1
        assert out.lengths.tolist() == [MAX_NEW] * 6


def test_what_was_donated_is_refused():
    cache = busy_cache(38)
    run(cache=cache)
    with pytest.raises(ValueError, match="cache: was donated to an earlier call"):
        run(cache=cache)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda logits, cache: logits, TypeError, r"expected \(logits, cache\), got float32\[4,31\]"),
        (lambda logits, cache: (logits, cache, 1), TypeError, r"expected \(logits, cache\)"),
        (lambda logits, cache: (cache, logits), TypeError, "expected floating logits"),
        (
            lambda logits, cache: (logits.astype(int), cache),
            TypeError,
            r"expected floating logits .*got int32\[4,31\]",
        ),
        (
            lambda logits, cache: (logits[:, :0], cache),
            ValueError,
            r"expected logits \[R=4, V\], got float32\[4,0\]",
        ),
        (
            lambda logits, cache: (logits[0], cache),
            ValueError,
            r"expected logits \[R=4, V\], got float32\[31\]",
        ),
        (lambda logits, cache: (logits, None), TypeError, "expected the cache that it was given"),
        (
            lambda logits, cache: (logits, jax.tree.map(lambda x: x[..., :1], cache)),
            ValueError,
            "expected a cache with the shapes and dtypes",
        ),
    ],
    ids=["alone", "three", "swapped", "integers", "no words", "one row", "no cache", "another cache"],
)
def test_what_a_model_gives_is_checked(result, error, message):
    def model(params, tokens, cache, step, logits_at):
        return result(params[: logits_at.shape[0]], cache)

    cache = busy_cache(38)
    with pytest.raises(error, match=f"model_fn: {message}"):
        run(cache=cache, model=model)
    assert not cache.groups[0].pages.k.is_deleted()


def test_a_model_without_a_hash_is_named():
    class Model(list):
        def __call__(self, *args):
            return sum_model(*args)

    refused(TypeError, "model_fn: expected a function with a hash", model_fn=Model())
