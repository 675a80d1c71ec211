"""The sampler against a NumPy oracle that sorts, in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paxcache import _sampling
from paxcache._sampling import Rules, Sampling

V = 97
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")


def oracle_keep(logits, *, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0):
    """The tokens kept of one row, by sorting; equals of the last one kept stay too."""
    logits = np.asarray(logits, np.float64)
    kept = np.ones(logits.size, bool)
    if top_k > 0:
        kept &= logits >= np.sort(logits)[::-1][min(top_k, logits.size) - 1]
    weights = np.exp(logits - logits.max())
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        probabilities = np.where(kept, weights, 0)[order]
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities) - probabilities
        last = order[np.nonzero(before < top_p)[0][-1]]
        kept &= logits >= logits[last]
    return kept & (weights >= min_p)


def rules(n, **values):
    return _sampling.resolve(Sampling(**values), n)


def draw_from_seeds(logits, some, *, seeds, **arguments):
    return _sampling.sample(logits, some, keys=_sampling.seed_keys(seeds), **arguments)


def make_logits(seed, n=6, scale=3.0):
    return np.random.default_rng(seed).normal(size=(n, V)).astype(np.float32) * scale


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        dict(top_k=1),
        dict(top_k=7),
        dict(top_k=V),
        dict(top_k=10**9),
        dict(top_p=0.01),
        dict(top_p=0.5),
        dict(top_p=0.97),
        dict(min_p=0.2),
        dict(min_p=1.0),
        dict(top_k=9, top_p=0.8),
        dict(top_p=0.9, min_p=0.1),
        dict(top_k=20, top_p=0.7, min_p=0.05),
    ],
    ids=str,
)
def test_kept_tokens_equal_the_sorting_oracle(values, jit):
    logits = make_logits(0)
    keep = jax.jit(_sampling.keep) if jit else _sampling.keep
    kept = keep(jnp.asarray(logits), rules(6, temperature=1.0, **values))
    np.testing.assert_array_equal(kept, [oracle_keep(row, **values) for row in logits])


def test_each_row_has_its_own_values():
    logits = make_logits(1, n=5)
    values = dict(top_k=[0, 3, 12, 1, 40], top_p=[1.0, 0.6, 0.9, 0.5, 0.2], min_p=[0.0, 0.1, 0.0, 0.3, 0.02])
    arrays = {name: np.asarray(v) for name, v in values.items()}
    kept = _sampling.keep(jnp.asarray(logits), rules(5, temperature=1.0, **arrays))
    expected = [
        oracle_keep(row, **{name: v[i] for name, v in values.items()}) for i, row in enumerate(logits)
    ]
    np.testing.assert_array_equal(kept, expected)
    assert np.asarray(kept)[0].all()


def test_equals_of_the_last_kept_token_stay_and_zeros_are_one_value():
    logits = jnp.asarray([[0.0, -0.0, 2.0, -1.0, 0.0, -3.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], jnp.float32)
    kept = _sampling.keep(logits, rules(2, temperature=1.0, top_k=2))
    np.testing.assert_array_equal(kept, [[1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]])
    kept = _sampling.keep(logits, rules(2, temperature=1.0, top_p=0.3))
    np.testing.assert_array_equal(kept, [[0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


def test_forbidden_tokens_stay_forbidden():
    logits = jnp.tile(jnp.where(jnp.arange(V) < 4, 0.0, -jnp.inf), (60, 1))
    some = rules(60, temperature=1.0, top_k=50, top_p=0.999, min_p=0.001)
    drawn = draw_from_seeds(logits, some, seeds=jnp.arange(60), positions=jnp.full(60, 3))
    assert set(drawn.tolist()) == {0, 1, 2, 3}


def test_thresholds_are_exact_over_the_whole_range_of_float32():
    tiny = np.finfo(np.float32).tiny
    values = np.array(
        [0.0, tiny, -tiny, 1.0, np.nextafter(np.float32(1), np.float32(2)), -3e38, 3e38, -1.0, -np.inf],
        np.float32,
    )
    for k in range(1, values.size + 1):
        kept = _sampling.keep(jnp.asarray(values)[None, :], rules(1, temperature=1.0, top_k=k))
        assert kept is not None
        np.testing.assert_array_equal(kept[0], values >= np.sort(values)[::-1][k - 1])


def test_repetition_penalty_equals_the_oracle():
    logits = make_logits(2, n=3)
    tokens = np.random.default_rng(3).integers(0, V, size=(3, 12)).astype(np.int32)
    tokens[0, :4] = tokens[0, 0]  # occurs often, counts once
    tokens[1, 5] = -1
    counts, penalty = np.array([6, 0, 12]), np.array([1.5, 2.0, 0.5], np.float32)
    expected = logits.copy()
    for row in range(3):
        for token in {int(t) for t in tokens[row, : counts[row]]} - {-1}:
            old = logits[row, token]
            expected[row, token] = old / penalty[row] if old > 0 else old * penalty[row]
    result = _sampling.penalize_repetition(
        jnp.asarray(logits), jnp.asarray(penalty), jnp.asarray(tokens), jnp.asarray(counts, jnp.int32)
    )
    np.testing.assert_allclose(result, expected, rtol=1.2e-7)  # one rounding: a compiled division
    np.testing.assert_array_equal(np.asarray(result) != logits, expected != logits)
    assert (expected[1] == logits[1]).all()


def test_greedy_takes_the_first_of_the_most_likely_tokens():
    logits = jnp.asarray([[0.0, 5.0, 5.0, 1.0]], jnp.bfloat16)
    chosen = draw_from_seeds(logits, Rules(), seeds=jnp.array([0]), positions=jnp.array([0]))
    assert chosen.dtype == jnp.int32
    assert chosen.tolist() == [1]


def test_temperature_zero_is_greedy_beside_sampled_rows():
    logits = jnp.asarray(make_logits(4, n=4))
    mixed = rules(4, temperature=np.array([0.0, 5.0, 0.0, 5.0]), top_k=np.array([5, 0, 0, 3]))
    draw = jax.jit(
        lambda seed: draw_from_seeds(logits, mixed, seeds=jnp.full(4, seed), positions=jnp.arange(4))
    )
    drawn = np.stack([draw(seed) for seed in range(30)])
    np.testing.assert_array_equal(
        drawn[:, [0, 2]], np.tile(np.asarray(logits).argmax(axis=1)[[0, 2]], (30, 1))
    )
    assert len(set(drawn[:, 1])) > 3
    top3 = set(np.argsort(-np.asarray(logits)[3])[:3])
    assert set(drawn[:, 3]) == top3


def test_a_row_depends_on_its_seed_and_position_alone():
    logits = jnp.asarray(make_logits(5, n=4))
    some = rules(4, temperature=1.3, top_p=0.95)
    seeds, positions = jnp.array([3, 4, 3, 9]), jnp.array([10, 10, 11, 7])

    def sample(rows):
        at = jnp.asarray(rows)
        draw = jax.jit(
            lambda at: draw_from_seeds(logits[at], some.of(at), seeds=seeds[at], positions=positions[at])
        )
        return draw(at).tolist()

    together = sample([0, 1, 2, 3])
    assert sample([3, 1, 0, 2]) == [together[i] for i in (3, 1, 0, 2)]
    assert [sample([i])[0] for i in range(4)] == together
    # Another seed or another position is another draw, for the same logits.
    flat = jnp.zeros((64, V))
    one = rules(64, temperature=1.0)
    by_seed = draw_from_seeds(flat, one, seeds=jnp.arange(64), positions=jnp.zeros(64, jnp.int32))
    by_position = draw_from_seeds(flat, one, seeds=jnp.zeros(64, jnp.int32), positions=jnp.arange(64))
    assert len(set(by_seed.tolist())) > 20
    assert len(set(by_position.tolist())) > 20


def test_the_default_generator_does_not_matter():
    logits = jnp.asarray(make_logits(6, n=3))
    some = rules(3, temperature=1.0)
    arguments = dict(seeds=jnp.arange(3), positions=jnp.arange(3))
    expected = draw_from_seeds(logits, some, **arguments).tolist()
    with jax.default_prng_impl("rbg"):
        assert draw_from_seeds(logits, some, **arguments).tolist() == expected


def test_frequencies_follow_the_probabilities():
    n = 4000
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    some = rules(n, temperature=0.5, top_p=0.9)
    drawn = draw_from_seeds(
        jnp.asarray(np.tile(logits, (n, 1))), some, seeds=jnp.arange(n), positions=jnp.full(n, 5)
    )
    expected = np.array([0.4, 0.3, 0.2, 0.0]) ** 2  # temperature 0.5 squares them; top-p cuts the last
    expected /= expected.sum()
    counts = np.bincount(np.asarray(drawn), minlength=4)
    assert counts[3] == 0
    # Five standard deviations of a binomial count: fixed seeds, and no chance failure for a right sampler.
    assert (np.abs(counts / n - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_log_probability_is_that_of_the_raw_logits():
    logits = make_logits(7, n=3)
    chosen = np.array([4, 50, 96])
    expected = logits[np.arange(3), chosen] - np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    result = _sampling.log_probability(jnp.asarray(logits), jnp.asarray(chosen))
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_neutral_features_are_not_in_the_program():
    greedy = rules(2, temperature=0.0, top_k=5, top_p=0.5, min_p=0.5)
    assert greedy == Rules()
    arguments = (jnp.zeros((2, V), jnp.bfloat16), greedy)

    def draw(logits, some):
        return _sampling.sample(logits, some, keys=None, positions=jnp.arange(2))

    text = str(jax.make_jaxpr(draw)(*arguments))
    assert "argmax" in text
    for absent in ("sort", "exp", "random", "while", "scan", "f32"):
        assert absent not in text
    assert rules(2, temperature=1.0)._replace(temperature=None) == Rules()
    assert rules(2, temperature=np.array([0.0, 1.0])).temperature is not None


def test_traced_values_count_as_used():
    @jax.jit
    def draw(temperature, top_k, logits):
        some = rules(2, temperature=temperature, top_k=top_k)
        return draw_from_seeds(logits, some, seeds=jnp.arange(2), positions=jnp.arange(2))

    logits = jnp.asarray(make_logits(8, n=2))
    assert draw(0.0, 0, logits).tolist() == jnp.argmax(logits, axis=1).tolist()
    assert draw(9.0, 1, logits).tolist() == jnp.argmax(logits, axis=1).tolist()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", "hot", TypeError),
        ("top_k", -1, ValueError),
        ("top_k", 1.5, TypeError),
        ("top_p", 0.0, ValueError),
        ("top_p", 1.1, ValueError),
        ("min_p", 1.5, ValueError),
        ("min_p", np.array([0.1, -0.2]), ValueError),
        ("repetition_penalty", 0.0, ValueError),
        ("repetition_penalty", 1e-46, ValueError),  # 0 in float32
        *(
            (name, value, ValueError)
            for name in FLOATS
            for value in (np.inf, -np.inf, np.nan, 1e39, [0.5, np.nan])
        ),
        *(
            (name, value, TypeError)
            for name in FLOATS
            for value in (None, 1j, True, b"1", {1}, [None], object())
        ),
        *((name, [1.0, [0.5]], ValueError) for name in FLOATS),
        *(("top_k", value, TypeError) for value in (None, 1.0, True, "1", {1}, [None], np.ones(2))),
        *(
            ("top_k", value, ValueError)
            for value in ([1, [2]], 2**31, np.int64(2**40), 2**70, np.uint64(2**63))
        ),
    ],
)
def test_values_out_of_range_are_named(name, value, error):
    with pytest.raises(error, match=name):
        Sampling(**{name: value})


def test_arrays_of_the_wrong_length_are_named():
    with pytest.raises(ValueError, match=r"sampling\.top_p.*N=3"):
        rules(3, temperature=1.0, top_p=np.array([0.5, 0.5]))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, jnp.bfloat16, np.int64, np.uint8])
def test_numbers_of_any_type_will_do(dtype):
    some = rules(3, temperature=np.ones(3, dtype), repetition_penalty=jnp.full(3, 2, jnp.bfloat16))
    assert some.temperature is not None and some.temperature.dtype == jnp.float32
    np.testing.assert_array_equal(some.temperature, np.ones(3))
    one = rules(3, temperature=1.0, top_k=np.uint64(5)).top_k
    assert one is not None and one.tolist() == [5] * 3


@jax.jit
def draw_traced(values, logits):
    n = logits.shape[0]
    tokens, ids = jnp.tile(jnp.arange(8), (n, 1)), jnp.arange(n)
    counts = jnp.full(n, 8)
    return draw_from_seeds(
        logits, rules(n, **values), seeds=ids, positions=ids, tokens=tokens, num_tokens=counts
    )


@pytest.mark.parametrize("name", [*FLOATS, "top_k"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -3.0])
def test_traced_values_out_of_range_count_as_the_default(name, value):
    values = dict(temperature=1.5, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
    wrong = {**values, name: -7 if name == "top_k" else value}
    right = {**values, name: dataclasses.asdict(Sampling())[name]}
    logits = jnp.where(jnp.arange(V) % 3 == 0, -jnp.inf, jnp.asarray(make_logits(3, n=30)))
    drawn = draw_traced(wrong, logits).tolist()
    assert drawn == draw_traced(right, logits).tolist()
    assert all(token % 3 for token in drawn)


@pytest.mark.parametrize("penalty", [1.0, 1.2, 3e38, 2e-38])
@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1.2e-38, 1e-30, 1.0, 3e38])
def test_masked_tokens_are_never_chosen(temperature, penalty):
    logits = jnp.where(jnp.arange(V) % 3 == 0, -jnp.inf, 100 * jnp.asarray(make_logits(9, n=30)))
    for top_p in (1.0, 0.9):
        values = dict(temperature=temperature, top_k=0, top_p=top_p, min_p=0.0, repetition_penalty=penalty)
        rules(30, **values)  # known values are not refused
        drawn = draw_traced(values, logits).tolist()
        assert all(token % 3 for token in drawn)
        if temperature < 1e-29 and penalty == 1.0:
            assert drawn == jnp.argmax(logits, axis=1).tolist()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_rows_fold_their_number_into_one_key(impl):
    """Of whatever generator: the numbers of a row are the same beside any others, and differ from row to row."""
    key = jax.random.key(7, impl=impl)
    keys = _sampling.fold_keys(key, 5)
    assert keys.shape == (5, 2) and keys.dtype == jnp.uint32
    np.testing.assert_array_equal(_sampling.fold_keys(key, 3), keys[:3])
    assert len({tuple(k) for k in keys.tolist()}) == 5
    assert keys.tolist() != _sampling.fold_keys(jax.random.key(8, impl=impl), 5).tolist()
    if impl == "threefry2x32":
        np.testing.assert_array_equal(keys[3], jax.random.key_data(jax.random.fold_in(key, 3)))


def test_a_seed_is_the_key_made_of_it():
    expected = [jax.random.key_data(jax.random.key(seed, impl="threefry2x32")) for seed in (0, 5, -3)]
    np.testing.assert_array_equal(_sampling.seed_keys(jnp.array([0, 5, -3])), expected)
