"""Choosing the next token from logits. Imports JAX and `_checks` alone; knows logits, never caches.

Every filter is a threshold on the logits: top-k, top-p and min-p keep a token only together with all tokens as
likely as it. A threshold is found by bisecting the bit patterns of the floats, 32 passes that compare and add.
There is no sort: sorting a vocabulary costs more, and "how much lies above t" is all that has to be known.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paxcache import _checks

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float32, Int32, Num, UInt32

_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: each value a number for all prompts, or an array [N] with one for each.

    The logits, in float32, go through the repetition penalty, the temperature, top-k, top-p and min-p in this
    order, each seeing what the one before it left; then one token is drawn. A filter keeps all tokens as likely as
    the least likely one that it keeps, and the most likely token always stays.

    A feature that is neutral for every prompt costs nothing: it is not in the compiled program. With the default,
    all greedy, the program holds no work of the vocabulary's size but one argmax.

    Args:
      temperature: divides the logits; 0 takes the most likely token (the lowest id among equals).
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the fewest tokens, most likely first, whose probabilities reach p; 1 keeps all.
      min_p: keeps tokens at least min_p times as likely as the most likely one; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of tokens that stand in the prompt or
        were generated; 1 changes nothing.

    Temperature and repetition penalty are finite. A value that is traced cannot be refused: out of its range, or NaN,
    it counts as the default.

    Raises:
      ValueError: a known value is out of its range, in float32.
      TypeError: a value is no number.

    Example:
      >>> import paxcache
      >>> paxcache.Sampling(temperature=0.7, top_p=0.9)
      Sampling(temperature=0.7, top_k=0, top_p=0.9, min_p=0.0, repetition_penalty=1.0)

    Reference: top-k, Fan et al., 2018; top-p, Holtzman et al., 2020; min-p, Nguyen et al., 2024; the
    repetition penalty, CTRL (Keskar et al., 2019). The order is that of Hugging Face transformers.
    """

    temperature: Any = 0.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0

    def __post_init__(self):
        """Checks the values that are known."""
        for field in dataclasses.fields(self):
            _read(field.name, getattr(self, field.name))


_TINY = np.finfo(np.float32).tiny  # a processor may take a smaller number for 0

_MOST_TEMPERATURE = 2.0**126  # the reciprocal of a larger one may be taken for 0

_RANGES: dict[str, tuple[Any, str]] = {
    "temperature": (lambda x: (x >= 0) & (x < np.inf), "at least 0 and finite"),
    "top_k": (lambda x: x >= 0, "at least 0"),
    "top_p": (lambda x: (x > 0) & (x <= 1), "above 0 and at most 1"),
    "min_p": (lambda x: (x >= 0) & (x <= 1), "between 0 and 1"),
    "repetition_penalty": (lambda x: (x >= _TINY) & (x < np.inf), "above 0 and finite"),
}


class Rules(NamedTuple):
    """`Sampling` as arrays, one value a prompt. None stands for a feature that no prompt uses.

    What is None is part of the pytree's structure, hence static: changing a temperature compiles nothing anew, and
    a feature that nobody uses is not traced at all.
    """

    temperature: Float32[Array, "N"] | None = None
    top_k: Int32[Array, "N"] | None = None
    top_p: Float32[Array, "N"] | None = None
    min_p: Float32[Array, "N"] | None = None
    repetition_penalty: Float32[Array, "N"] | None = None

    def of(self, prompts: Int32[Array, "R"]) -> Rules:
        """The values of some prompts."""
        return jax.tree.map(lambda values: values[prompts], self)


def _read(name: str, value: Any) -> np.ndarray | jax.Array:
    """A field of `Sampling` as int32 or float32, of any shape. Known values are in its range."""
    title = f"sampling.{name}"
    values = _checks.integers(title, value) if name == "top_k" else _floats(title, value)
    valid, expected = _RANGES[name]
    if not isinstance(values, Tracer) and not np.all(valid(np.asarray(values))):
        raise ValueError(f"{title}: expected values {expected}, got {value!r}")
    return values


def _floats(name: str, value: Any) -> np.ndarray | jax.Array:
    """float32 values of any shape, on the host where they are known there."""
    try:
        values = value if isinstance(value, Tracer) else np.asarray(value)
    except jax.errors.TracerArrayConversionError:  # a list with traced numbers
        values = jnp.asarray(value)
    except ValueError as error:  # lists of unequal lengths
        raise ValueError(f"{name}: expected a number or an array [N], got {value!r}") from error
    if not (jnp.issubdtype(values.dtype, jnp.floating) or jnp.issubdtype(values.dtype, jnp.integer)):
        raise TypeError(f"{name}: expected numbers, got {_checks.describe(value)}")
    with np.errstate(over="ignore"):  # to inf, which no range has
        return values.astype(np.float32)


def per_prompt(name: str, values: np.ndarray | jax.Array, num_prompts: int) -> np.ndarray | jax.Array:
    """One value for all prompts, or an array [N], as an array [N]; on the host where it is known there."""
    if values.shape not in ((), (num_prompts,)):
        raise ValueError(
            f"{name}: expected a number or an array [N={num_prompts}], got {_checks.describe(values)}"
        )
    broadcast = jnp.broadcast_to if isinstance(values, jax.Array) else np.broadcast_to
    return broadcast(values, (num_prompts,))


def resolve(sampling: Sampling, num_prompts: int) -> Rules:
    """The rules of `num_prompts` prompts, without the features that are neutral for all of them."""
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(Sampling):
        name, neutral = field.name, field.default
        values = per_prompt(f"sampling.{name}", _read(name, getattr(sampling, name)), num_prompts)
        if isinstance(values, Tracer):
            valid, _ = _RANGES[name]
            arrays[name] = jnp.where(valid(values), values, jnp.asarray(neutral, values.dtype))
        else:
            arrays[name] = None if np.all(np.asarray(values) == neutral) else jnp.asarray(values)
    if arrays["temperature"] is None:  # the most likely token passes every filter
        return Rules(repetition_penalty=arrays["repetition_penalty"])
    return Rules(**arrays)


def penalize_repetition(
    logits: Float32[Array, "R V"],
    penalty: Float32[Array, "R"],
    tokens: Int32[Array, "R W"],
    num_tokens: Int32[Array, "R"],
) -> Float32[Array, "R V"]:
    """Makes the first `num_tokens` of each row's tokens less likely, however often each occurs."""
    vocabulary = logits.shape[1]
    seen = (jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :] < num_tokens[:, None]) & (tokens >= 0)
    columns = jnp.where(seen, tokens, vocabulary)  # past the vocabulary: the scatter drops it
    old = jnp.take_along_axis(logits, jnp.minimum(columns, vocabulary - 1), axis=1)
    new = jnp.where(old > 0, old / penalty[:, None], old * penalty[:, None])
    # A token that occurs twice is written twice with one and the same value.
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, columns].set(new, mode="drop")


def _sortable(x: Float32[Array, "R V"]) -> Int32[Array, "R V"]:
    """Integers in the order of the floats; -0 equals 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, jnp.float32(0), x), jnp.int32)
    return jnp.where(bits < 0, bits ^ _INT32.max, bits)


def _threshold(
    keys: Int32[Array, "R V"], weights: Num[Array, "R V"], limit: Num[Array, "R"]
) -> Int32[Array, "R"]:
    """Per row the least t such that the weight of all keys above t is less than `limit`."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # rounds down and cannot overflow
        above = jnp.sum(jnp.where(keys > middle[:, None], weights, 0), axis=1, dtype=weights.dtype)
        enough = above < limit
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    first = jnp.full(limit.shape, _INT32.min, jnp.int32), jnp.full(limit.shape, _INT32.max, jnp.int32)
    return jax.lax.fori_loop(0, 32, halve, first)[1]


def keep(logits: Float32[Array, "R V"], rules: Rules) -> Bool[Array, "R V"] | None:
    """Which tokens top-k, top-p and min-p leave; None if no row uses them. Takes tempered logits."""
    if rules.top_k is None and rules.top_p is None and rules.min_p is None:
        return None
    keys = _sortable(logits)
    kept = jnp.ones(logits.shape, bool)
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))  # probabilities, not normalised
    if rules.top_k is not None:
        k = jnp.where(rules.top_k > 0, rules.top_k, logits.shape[1])
        kept = keys >= _threshold(keys, jnp.ones(logits.shape, jnp.int32), k)[:, None]
    if rules.top_p is not None:
        left = jnp.where(kept, weights, 0)
        # Not left to rounding: the sum above the least likely token may come out as the whole sum.
        reach = jnp.where(rules.top_p < 1, rules.top_p * left.sum(axis=1), jnp.inf)
        kept &= keys >= _threshold(keys, left, reach)[:, None]
    if rules.min_p is not None:
        kept &= weights >= rules.min_p[:, None]
    return kept | (keys == keys.max(axis=1, keepdims=True))


_GENERATOR = "threefry2x32"  # its numbers do not change under vmap, whatever jax_default_prng_impl says


@jax.jit
def seed_keys(seeds: Int32[Array, "N"]) -> UInt32[Array, "N 2"]:
    """The raw key of each seed."""
    return jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed, impl=_GENERATOR)))(seeds)


@functools.partial(jax.jit, static_argnames="num")
def fold_keys(key: Any, num: int) -> UInt32[Array, "N 2"]:
    """The raw keys ``fold_in(key, n)``. Those of other generators have more than two words; the rest is folded in."""

    def fold(n):
        words = jax.random.key_data(jax.random.fold_in(key, n))
        folded = jax.random.wrap_key_data(words[:2], impl=_GENERATOR)
        for word in words[2:]:
            folded = jax.random.fold_in(folded, word)
        return jax.random.key_data(folded)

    return jax.vmap(fold)(jnp.arange(num, dtype=jnp.int32))


def sample(
    logits: Float[Array, "R V"],
    rules: Rules,
    *,
    keys: UInt32[Array, "R 2"] | None,
    positions: Int32[Array, "R"],
    tokens: Int32[Array, "R W"] | None = None,
    num_tokens: Int32[Array, "R"] | None = None,
) -> Int32[Array, "R"]:
    """One token a row.

    A row's random numbers come from its key and the position of the token to be, and from nothing else: not from
    its neighbours, its place in the batch, or when it runs.

    Args:
      logits: any float dtype.
      rules: those of the rows, arrays [R].
      keys: one a row, from `seed_keys` or `fold_keys`; None will do where no row has a temperature.
      positions: where each new token will stand in its sequence.
      tokens, num_tokens: each row's prompt and generated tokens, for the repetition penalty.
    """
    if rules.repetition_penalty is not None:
        assert tokens is not None
        assert num_tokens is not None
        logits = penalize_repetition(logits.astype(jnp.float32), rules.repetition_penalty, tokens, num_tokens)
    if rules.temperature is None:  # argmax needs no float32: widening changes no order
        return jnp.argmax(logits, axis=1).astype(jnp.int32)

    assert keys is not None

    def noise(key, position):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl=_GENERATOR), position)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    logits = logits.astype(jnp.float32)
    # Masked tokens stay masked: -inf times 0 would be NaN. Where the quotients overflow, a temperature is as good as 0.
    temperature = jnp.minimum(rules.temperature, _MOST_TEMPERATURE)
    most = logits.max(axis=1) / jnp.where(temperature > 0, temperature, 1)
    random = ((temperature > 0) & jnp.isfinite(most))[:, None]
    tempered = logits / jnp.where(random, temperature[:, None], 1)
    kept = keep(tempered, rules)
    scores = jnp.where(random, tempered + jax.vmap(noise)(keys, positions), tempered)
    if kept is not None:
        scores = jnp.where(kept, scores, -jnp.inf)
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


def is_distribution(logits: Float[Array, "R V"], rules: Rules, chosen: Int32[Array, "R"]) -> Bool[Array, "R"]:
    """Whether a row's logits say anything: none is NaN or +inf, and not all are -inf. `chosen` is `sample`'s answer."""
    if rules.temperature is None and rules.repetition_penalty is None:
        # The argmax, which takes NaN before all numbers: one number a row instead of a pass over all.
        most = jnp.take_along_axis(logits, chosen[:, None], axis=1)[:, 0]
    else:
        most = logits.max(axis=1)
    return jnp.isfinite(most)


def log_probability(logits: Float[Array, "R V"], tokens: Int32[Array, "R"]) -> Float32[Array, "R"]:
    """Log-probability of each row's token under the logits as they are."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)
