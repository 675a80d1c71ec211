"""`paxcache.check_model`: right models pass, and each known mistake is named."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import paxcache
import paxcache.linen
import paxcache.nnx

F, H, D, V, LONGEST = 8, 2, 4, 11, 32
TOKENS = jnp.array([3, 7, 1, 4, 3])


def make_config(**changes: Any) -> paxcache.CacheConfig:
    settings = dict(num_layers=2, num_kv_heads=H, head_dim=D, page_size=4, num_pages=64, max_seqs=4)
    return paxcache.CacheConfig(**{**settings, "max_pages_per_seq": 8, "dtype": jnp.float32, **changes})


def make_params() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = dict(embed=(V, F), place=(LONGEST, F), qkv=(2, F, 3, H, D), out=(2, H, D, F))
    return {n: jax.random.normal(k, s) / 2 for (n, s), k in zip(shapes.items(), keys, strict=True)}


PARAMS = make_params()


def attention(params, layer, x, cache, step, *, at=None, early=False, keep=True):
    """One layer; `at` is the layer of the cache, `early` attends before it appends, without `keep` nothing is kept."""
    at = layer if at is None else at
    q, k, v = jnp.moveaxis(jnp.einsum("td,dchk->tchk", x, params["qkv"][layer]), 1, 0)
    after = paxcache.append(cache, at, k, v, step)
    out = paxcache.attend(cache if early else after, at, q, step)
    return x + jnp.einsum("thk,hkd->td", out, params["out"][layer]), after if keep else cache


def run(params, tokens, cache, step, logits_at, *, positions=None, layers=((0, 0), (1, 1)), **options):
    """The right model; the wrong ones differ in one argument."""
    positions = step.positions if positions is None else positions
    x = params["embed"][tokens] + params["place"][positions]
    for layer, at in layers:
        x, cache = attention(params, layer, x, cache, step, at=at, **options)
    return x[logits_at] @ params["embed"].T, cache


def full(tokens: jax.Array) -> jax.Array:
    """The right model without a cache."""
    L = tokens.shape[1]
    x = PARAMS["embed"][tokens[0]] + PARAMS["place"][:L]
    for layer in range(2):
        q, k, v = jnp.moveaxis(jnp.einsum("td,dchk->tchk", x, PARAMS["qkv"][layer]), 1, 0)
        out = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x = x + jnp.einsum("thk,hkd->td", out, PARAMS["out"][layer])
    return (x @ PARAMS["embed"].T)[None]


# Mistakes, each as a change of the right model.


def packed_arange(params, tokens, cache, step, logits_at):
    return run(params, tokens, cache, step, logits_at, positions=jnp.arange(tokens.shape[0]))


def arange_of_one(params, tokens, cache, step, logits_at):
    tokens = tokens[:, None]
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return run(params, tokens[:, 0], cache, step, logits_at, positions=at[:, 0])


def positions_from_zero(params, tokens, cache, step, logits_at):
    """Right in one piece and beside other rows, wrong in a later chunk."""
    started = step.query_starts[jnp.minimum(step.rows, 2)]
    return run(
        params, tokens, cache, step, logits_at, positions=(jnp.arange(tokens.shape[0]) - started) % LONGEST
    )


def old_cache(params, tokens, cache, step, logits_at):
    return run(params, tokens, cache, step, logits_at)[0], cache


def loses_each_append(params, tokens, cache, step, logits_at):
    return run(params, tokens, cache, step, logits_at, keep=False)


def attends_first(params, tokens, cache, step, logits_at):
    return run(params, tokens, cache, step, logits_at, early=True)


def skips_a_layer(params, tokens, cache, step, logits_at):
    return run(params, tokens, cache, step, logits_at, layers=((0, 0),))


def same_layer_twice(params, tokens, cache, step, logits_at):
    return run(params, tokens, cache, step, logits_at, layers=((0, 0), (1, 0)))


def more_layers_than_the_cache(params, tokens, cache, step, logits_at):
    return run(params, tokens, cache, step, logits_at, layers=((0, 0), (1, 1), (0, 0)))


def ignores_logits_at(params, tokens, cache, step, logits_at):
    every = jnp.arange(logits_at.shape[0])
    return run(params, tokens, cache, step, every)


def logits_of_all_tokens(params, tokens, cache, step, logits_at):
    return run(params, tokens, cache, step, jnp.arange(tokens.shape[0]))


def keeps_an_axis(params, tokens, cache, step, logits_at):
    logits, cache = run(params, tokens, cache, step, logits_at)
    return logits[:, None], cache


def padding_leaks(params, tokens, cache, step, logits_at):
    logits, cache = run(params, tokens, cache, step, logits_at)
    return logits + params["embed"][tokens].mean() * jnp.arange(V), cache


def rows_leak(params, tokens, cache, step, logits_at):
    logits, cache = run(params, tokens, cache, step, logits_at)
    rows_before = jnp.where(
        step.rows < 2, params["embed"][tokens].sum(axis=1), 0
    ).sum()  # of the rows above the last
    return logits + rows_before * jnp.arange(V), cache


def nan_logits(params, tokens, cache, step, logits_at):
    return run({**params, "out": params["out"] * jnp.nan}, tokens, cache, step, logits_at)


def extends_itself(params, tokens, cache, step, logits_at):
    cache, step = paxcache.extend(cache, step.query_lens, num_tokens=tokens.shape[0])
    return run(params, tokens, cache, step, logits_at)


def own_tokens_only(params, tokens, cache, step, logits_at):
    """Appends, but attends over the step's tokens of the same row instead of the pages."""
    x = params["embed"][tokens] + params["place"][step.positions]
    sees = (step.rows[:, None] == step.rows[None]) & (step.positions[:, None] >= step.positions[None])
    for layer in range(2):
        q, k, v = jnp.moveaxis(jnp.einsum("td,dchk->tchk", x, params["qkv"][layer]), 1, 0)
        cache = paxcache.append(cache, layer, k, v, step)
        out = jax.nn.dot_product_attention(q[None], k[None], v[None], mask=sees[None, None])[0]
        x = x + jnp.einsum("thk,hkd->td", out, params["out"][layer])
    return x[logits_at] @ params["embed"].T, cache


def attends_to_another_layer(params, tokens, cache, step, logits_at):
    """Consistent with itself: a reference alone can tell."""
    x = params["embed"][tokens] + params["place"][step.positions]
    for layer in range(2):
        q, k, v = jnp.moveaxis(jnp.einsum("td,dchk->tchk", x, params["qkv"][layer]), 1, 0)
        cache = paxcache.append(cache, layer, k, v, step)
        out = paxcache.attend(cache, 0, q, step)
        x = x + jnp.einsum("thk,hkd->td", out, params["out"][layer])
    return x[logits_at] @ params["embed"].T, cache


def narrow_steps_differ(params, tokens, cache, step, logits_at):
    shift = 3 if tokens.shape[0] == logits_at.shape[0] else 0
    return run(params, tokens, cache, step, logits_at, positions=(step.positions + shift) % LONGEST)


def writes_where_an_earlier_call_did(params, tokens, cache, step, logits_at):
    earlier = dataclasses.replace(step, slot_mapping=(jnp.arange(tokens.shape[0]) + 20,))
    return run(params, tokens, cache, earlier, logits_at)


def leaks_a_tracer():
    kept: list[Any] = []

    def leaky(params, tokens, cache, step, logits_at):
        kept.append(step.positions)
        first = jnp.resize(kept[0], tokens.shape)
        return run(params, tokens, cache, step, logits_at, positions=first)

    return leaky


MISTAKES = {
    packed_arange: "arange over the packed tokens",
    arange_of_one: "arange over an axis of length 1",
    positions_from_zero: "later chunk has wrong positions",
    old_cache: "returns the old cache",
    loses_each_append: "returns the old cache",
    attends_first: "attends before it appends",
    skips_a_layer: r"layers \[1\] of 2 were not written: a layer is skipped",
    same_layer_twice: r"layers \[1\] of 2 were not written though append is called 2 times: is a layer index given",
    more_layers_than_the_cache: "append is called 3 times for 2 layers: a layer is written twice",
    ignores_logits_at: "of the wrong rows",
    logits_of_all_tokens: r"expected logits \[R=\d+, V\] .* got float32\[\d+,11\]",
    keeps_an_axis: r"expected logits \[R=\d+, V\]",
    padding_leaks: "padding leaks",
    rows_leak: "tokens of other rows leak",
    nan_logits: "logits hold NaN",
    extends_itself: "calls extend",
    own_tokens_only: "attends to the step's own tokens only",
    narrow_steps_differ: "token by token differ",
}


@pytest.mark.parametrize("wrong", MISTAKES, ids=lambda model: model.__name__)
def test_each_mistake_is_named(wrong):
    with pytest.raises(ValueError, match=MISTAKES[wrong]):
        paxcache.check_model(wrong, PARAMS, make_config(), TOKENS)


def test_the_step_of_another_call():
    with pytest.raises(ValueError, match="step of another call"):
        paxcache.check_model(writes_where_an_earlier_call_did, PARAMS, make_config(), TOKENS)
    with pytest.raises(ValueError, match="arrays of an earlier trace"):
        paxcache.check_model(leaks_a_tracer(), PARAMS, make_config(), TOKENS)


@pytest.mark.parametrize(
    "changes",
    [{}, {"dtype": jnp.bfloat16}, {"quantization": "int8"}, {"sliding_window": 3}],
    ids=["float32", "bfloat16", "int8", "window"],
)
def test_a_right_model_passes(changes):
    config = make_config(**changes)
    paxcache.check_model(run, PARAMS, config, TOKENS)
    paxcache.check_model(run, PARAMS, paxcache.init(config), TOKENS)


def test_the_reference_counts():
    paxcache.check_model(run, PARAMS, make_config(), TOKENS, reference=full)
    with pytest.raises(ValueError, match=r"from the second token on.*positions"):
        paxcache.check_model(arange_of_one, PARAMS, make_config(), TOKENS, reference=full)
    with pytest.raises(ValueError, match="at the first token already"):
        paxcache.check_model(run, {**PARAMS, "out": 2 * PARAMS["out"]}, make_config(), TOKENS, reference=full)
    with pytest.raises(ValueError, match=r"at the first token already.*layers differ"):
        paxcache.check_model(attends_to_another_layer, PARAMS, make_config(), TOKENS, reference=full)
    with pytest.raises(ValueError, match=r"reference: expected logits \[1, L=6, V=11\]"):
        paxcache.check_model(run, PARAMS, make_config(), TOKENS, reference=lambda tokens: full(tokens)[0])


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed, self.place = nnx.Embed(V, F, rngs=rngs), nnx.Embed(LONGEST, F, rngs=rngs)
        self.layers = nnx.List([nnx.MultiHeadAttention(H, F, decode=False, rngs=rngs) for _ in range(2)])

    def __call__(self, tokens, positions=None, mask=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self.embed(tokens) + self.place(positions)
        for layer in self.layers:
            x = x + layer(x, mask=mask)
        return self.embed.attend(x)


class LinenModel(nn.Module):
    decode: bool = True

    @nn.compact
    def __call__(self, tokens, positions=None, mask=None):
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        embed = nn.Embed(V, F)
        x = embed(tokens) + nn.Embed(LONGEST, F)(positions)
        for _ in range(2):
            layer = paxcache.linen.MultiHeadDotProductAttention(num_heads=H, decode=self.decode)
            x = x + layer(x, mask=mask)
        return embed.attend(x)


def with_positions(model, tokens, step, logits_at):
    return model(tokens[:, None], step.positions[:, None])[logits_at, 0]


def nnx_pieces() -> tuple[Any, Any]:
    model = NnxModel()
    make = functools.partial(paxcache.nnx.model_fn, model, make_config())
    return make, lambda tokens: model(tokens, mask=nnx.make_causal_mask(tokens))


def linen_pieces() -> tuple[Any, Any]:
    model = LinenModel()
    variables = model.init(jax.random.key(0), TOKENS[None])
    make = functools.partial(paxcache.linen.model_fn, model, variables, make_config())
    stock, params = LinenModel(decode=False), {"params": variables["params"]}
    return make, lambda tokens: stock.apply(params, tokens, mask=nn.make_causal_mask(tokens))


@pytest.mark.parametrize("pieces", [nnx_pieces, linen_pieces], ids=["nnx", "linen"])
def test_models_of_flax(pieces):
    make, reference = pieces()
    fn, params = make(call=with_positions)
    paxcache.check_model(fn, params, make_config(), TOKENS, reference=reference)
    fn, params = make()
    with pytest.raises(ValueError, match="arange over an axis of length 1"):
        paxcache.check_model(fn, params, make_config(), TOKENS)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (dict(model_fn=3), TypeError, "model_fn: expected a function"),
        (dict(cache=3), TypeError, "cache: expected a CacheConfig or a PagedKVCache"),
        (dict(tokens=jnp.array([1, 2])), ValueError, "tokens: expected at least 4"),
        (dict(tokens=jnp.ones(5, jnp.int32)), ValueError, "not all equal"),
        (dict(tokens=jnp.ones((2, 5), jnp.int32)), ValueError, "tokens: expected shape"),
        (dict(tokens=jnp.ones(5)), TypeError, "tokens: expected integer"),
        (dict(reference=3), TypeError, "reference: expected a function"),
        (dict(tolerance=2), ValueError, "tolerance"),
        (dict(model_fn=lambda *_: None), ValueError, r"expected \(logits, cache\)"),
        (dict(model_fn=lambda *_: (jnp.ones((2, 3)), 3)), ValueError, "got .* for the cache"),
        (dict(model_fn=lambda params, *_: params["none"]), KeyError, "none"),
    ],
)
def test_wrong_arguments(changes, error, match):
    given = dict(model_fn=run, params=PARAMS, cache=make_config(), tokens=TOKENS, **{})
    with pytest.raises(error, match=match):
        paxcache.check_model(**{**given, **changes})  # pyright: ignore[reportArgumentType]


def test_not_under_jit():
    with pytest.raises(TypeError, match="inside jit"):
        jax.jit(lambda tokens: paxcache.check_model(run, PARAMS, make_config(), tokens))(TOKENS)


def test_what_a_model_raises_says_where():
    def fails(params, tokens, cache, step, logits_at):
        raise RuntimeError("own")

    with pytest.raises(RuntimeError, match="own") as caught:
        paxcache.check_model(fails, PARAMS, make_config(), TOKENS)
    assert any("in check_model" in note for note in caught.value.__notes__)
