"""`paxcache.nnx` against Flax's own layers: same numbers, same parameters, one table, no copy of a pool."""

from __future__ import annotations

import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import paxcache
import paxcache.nnx
from paxcache import _forward

F, H, D, S = 8, 2, 4, 2  # features, query heads, head dim, page size
LENGTHS = (3, 2)
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **attention: Any):
        self.norm = nnx.LayerNorm(F, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(H, F, rngs=rngs, **{"decode": False, **attention})

    def __call__(self, x, **options):
        return x + self.attention(self.norm(x), **options)


class Model(nnx.Module):
    def __init__(self, num_layers: int = 2, vocabulary: int = 11, **attention: Any):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(vocabulary, F, rngs=rngs)
        self.blocks = nnx.List([Block(rngs, **attention) for _ in range(num_layers)])
        self.head = nnx.Linear(F, vocabulary, rngs=rngs)

    def __call__(self, tokens, **options):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, **options)
        return self.head(x)


def make_config(**changes: Any) -> paxcache.CacheConfig:
    settings = dict(num_layers=2, num_kv_heads=H, head_dim=D, page_size=S, num_pages=16, max_seqs=2)
    return paxcache.CacheConfig(**{**settings, "max_pages_per_seq": 4, "dtype": jnp.float32, **changes})


def make_tokens(length: int = 5) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, length), 0, 11)


def causal(model: Any, x: jax.Array) -> jax.Array:
    """The stock model on whole sequences."""
    return model(x, mask=nnx.make_causal_mask(x), deterministic=True)


def stock_decode(model: Model, tokens: jax.Array) -> jax.Array:
    """The stock model token by token, over its dense cache."""
    model = nnx.view(model, decode=True)
    for block in model.blocks:
        block.attention.init_cache((*tokens.shape, F))
    return jnp.concatenate([model(tokens[:, t : t + 1]) for t in range(tokens.shape[1])], axis=1)


def run(model: Any, cache: paxcache.nnx.PagedCache, tokens: jax.Array, chunks: tuple[int, ...]) -> jax.Array:
    """The paged model over the tokens in chunks, all rows alike."""
    outs, at = [], 0
    for size in chunks:
        step = cache.extend(jnp.full(tokens.shape[0], size), max_query_len=size)
        step.raise_if_failed()
        outs.append(model(tokens[:, at : at + size]))
        at += size
    return jnp.concatenate(outs, axis=1)


VARIANTS = {
    "plain": dict(),
    "grouped heads, qk norm, no bias": dict(num_kv_heads=1, normalize_qk=True, use_bias=False),
    "wide heads, dropout switched off": dict(qkv_features=16, dropout_rate=0.5, deterministic=True),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_same_numbers_as_the_stock_layers(variant):
    model, tokens = Model(num_layers=1, **variant), make_tokens()
    config = make_config(
        num_layers=1,
        num_kv_heads=variant.get("num_kv_heads", H),
        head_dim=variant.get("qkv_features", F) // H,
    )
    paged, cache = paxcache.nnx.paginate(model, config)
    by_token = run(paged, cache, tokens, (1,) * 5)
    close(by_token, stock_decode(model, tokens))
    cache.kv = paxcache.release(cache.kv, jnp.array([True, True]))
    close(
        run(paged, cache, tokens, (3, 1, 1)), causal(model, tokens)
    )  # a stock layer cannot decode by chunks


def test_ragged_rows_see_only_themselves():
    model, tokens = Model(), make_tokens()
    expected = causal(model, tokens)
    paged, cache = paxcache.nnx.paginate(model, make_config())
    cache.extend(jnp.array(LENGTHS), max_query_len=3)
    out = paged(tokens[:, :3])
    for row, length in enumerate(LENGTHS):
        close(out[row, :length], expected[row, :length])
    for t in range(2):
        cache.extend(jnp.array([1, 1]), max_query_len=1)
        out = paged(jnp.stack([tokens[row, length + t] for row, length in enumerate(LENGTHS)])[:, None])
        for row, length in enumerate(LENGTHS):
            close(out[row, 0], expected[row, length + t])
    assert cache.kv.seq_lens.tolist() == [5, 4]
    paxcache.check(cache.kv)


@pytest.mark.parametrize("rotary", [False, True])
def test_ragged_chunks_equal_the_dense_cache(rotary):
    rope = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE(theta=100.0))
    variant: dict[str, Any] = dict(attention_fn=rope) if rotary else {}
    model, tokens = Model(**variant), make_tokens()
    expected = causal(model, tokens) if rotary else stock_decode(model, tokens)  # decoding, it turns nothing
    paged, cache = paxcache.nnx.paginate(model, make_config())
    done = np.zeros(2, int)
    for lens in ([3, 2], [0, 2], [2, 1]):
        chunk = jnp.stack([jnp.roll(tokens[row], -done[row])[:3] for row in range(2)])
        cache.extend(jnp.array(lens), max_query_len=3)
        out = paged(chunk)
        for row, length in enumerate(lens):
            close(out[row, :length], expected[row, done[row] : done[row] + length])
        done += lens
    assert done.tolist() == [5, 5]


@pytest.mark.parametrize("axis", [0, 1], ids=["one row", "rows of one token"])
def test_packed_step_equals_the_row_aligned_one(axis):
    model, tokens = Model(), make_tokens()
    expected = causal(model, tokens)
    paged, cache = paxcache.nnx.paginate(model, make_config())
    packed = jnp.concatenate([tokens[row, :length] for row, length in enumerate(LENGTHS)])
    cache.extend(jnp.array(LENGTHS), num_tokens=5)
    out = paged(jnp.expand_dims(packed, axis)).reshape(5, -1)
    close(out, jnp.concatenate([expected[row, :length] for row, length in enumerate(LENGTHS)]))


def test_refused_row_changes_nothing():
    model, tokens = Model(), make_tokens()
    paged, cache = paxcache.nnx.paginate(model, make_config())
    for _ in range(2):
        cache.extend(jnp.array([0, 3]), max_query_len=3)
    step = cache.extend(jnp.array([3, 3]), max_query_len=3)  # a row holds eight tokens
    out = paged(tokens[:, :3])
    assert step.ok.tolist() == [True, False]
    assert cache.kv.seq_lens.tolist() == [3, 6]
    close(out[0], causal(model, tokens)[0, :3])
    assert np.isfinite(out).all()


def test_half_precision_agrees_with_the_stock_cache():
    model, tokens = Model(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16), make_tokens()
    paged, cache = paxcache.nnx.paginate(model, make_config(dtype=jnp.bfloat16))
    out, expected = run(paged, cache, tokens[:, :3], (3,)), causal(model, tokens[:, :3])
    assert out.dtype == expected.dtype
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.05, atol=0.05)


def test_rotary_embedding_turns_by_the_position_in_the_row():
    rope = nnx.RoPE(theta=100.0)
    attention_fn = functools.partial(nnx.dot_product_attention_with_rope, rope=rope)
    layer = nnx.MultiHeadAttention(H, F, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (2, 5, F))
    expected = layer(x, mask=nnx.make_causal_mask(x[..., 0]))
    paged, cache = paxcache.nnx.paginate(layer, make_config(num_layers=1))
    close(run(paged, cache, x, (3, 1, 1)), expected)


def test_given_positions_are_honoured_or_refused():
    attention_fn = functools.partial(nnx.dot_product_attention_with_rope, rope=nnx.RoPE(theta=100.0))
    layer = nnx.MultiHeadAttention(H, F, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (2, 3, F))
    paged, cache = paxcache.nnx.paginate(layer, make_config(num_layers=1))
    step = cache.extend(jnp.array([3, 3]), max_query_len=3)
    expected = paged(x)
    paged, cache = paxcache.nnx.paginate(layer, make_config(num_layers=1))
    cache.extend(jnp.array([3, 3]), max_query_len=3)
    close(paged(x, input_positions=step.positions + 7), expected)  # rotary scores depend on differences only
    plain, cache = paxcache.nnx.paginate(
        nnx.MultiHeadAttention(H, F, rngs=nnx.Rngs(0)), make_config(num_layers=1)
    )
    cache.extend(jnp.array([3, 3]), max_query_len=3)
    with pytest.raises(ValueError, match="input_positions"):
        plain(x, input_positions=step.positions)


def test_parameters_are_those_of_the_stock_model():
    model = Model(normalize_qk=True)
    paged, _ = paxcache.nnx.paginate(model, make_config())
    chex.assert_trees_all_equal(nnx.state(paged, nnx.Param), nnx.state(model, nnx.Param))
    trained = jax.tree.map(lambda x: x + 1, nnx.state(Model(normalize_qk=True), nnx.Param))
    nnx.update(paged, trained)
    chex.assert_trees_all_equal(nnx.state(paged, nnx.Param), trained)
    chex.assert_trees_all_equal(nnx.state(model, nnx.Param), trained)  # variables are shared


def test_the_given_model_stays_as_it_is():
    model, tokens = Model(), make_tokens()
    before = causal(model, tokens)
    paged, _ = paxcache.nnx.paginate(model, make_config())
    assert type(model.blocks[0].attention) is nnx.MultiHeadAttention
    assert model.blocks[0].attention.decode is False
    assert isinstance(paged.blocks[0].attention, paxcache.nnx.MultiHeadAttention)
    np.testing.assert_array_equal(causal(model, tokens), before)
    np.testing.assert_array_equal(causal(nnx.view(paged, decode=False), tokens), before)


def test_one_table_and_one_extend_however_many_layers(monkeypatch):
    calls = []
    extend = _forward._cache.extend
    monkeypatch.setattr(_forward._cache, "extend", lambda *a, **k: calls.append(1) or extend(*a, **k))
    model, tokens = Model(), make_tokens()
    paged, cache = paxcache.nnx.paginate(model, make_config())
    close(run(paged, cache, tokens[:, :4], (3, 1)), causal(model, tokens[:, :4]))
    assert len(calls) == 2
    states = nnx.state(paged, nnx.Cache)
    assert len(jax.tree.leaves(states, is_leaf=lambda v: isinstance(v, nnx.Variable))) == 1
    assert len(cache.kv.groups) == 1


def memory(compiled: Any) -> Any:
    return compiled.memory_analysis()


def test_no_buffer_grows_with_rows_and_capacity():
    config = make_config(max_pages_per_seq=16384, page_size=64)
    paged, _ = paxcache.nnx.paginate(Model(), config)
    graphdef, state = nnx.split(paged)

    @jax.jit
    def step(state, tokens):
        model = nnx.merge(graphdef, state)
        paxcache.nnx.get_cache(model).extend(jnp.ones(2, jnp.int32), max_query_len=1)
        return model(tokens), nnx.state(model)

    temp = memory(step.lower(state, make_tokens(1)).compile()).temp_size_in_bytes
    dense_keys = 2 * 16384 * 64 * H * D * 4  # of one layer
    assert temp < dense_keys / 4  # the tables themselves grow


# Transformations.


def pool_copies(compiled: Any, kv: paxcache.PagedKVCache) -> list[str]:
    """Copies of a whole pool, or of all of a layer's pages, in compiled HLO."""
    L, *page = kv.groups[0].pages.k.shape
    shapes = "|".join(re.escape(",".join(map(str, shape))) for shape in ((L, *page), (1, *page), tuple(page)))
    return re.findall(rf"= \w+\[(?:{shapes})\]\S* copy(?:-start)?\(.*", compiled.as_text())


def test_donated_step_updates_the_pool_in_place():
    config = make_config(num_pages=1 << 16)
    paged, cache = paxcache.nnx.paginate(Model(), config)
    graphdef, state, rest = nnx.split(paged, nnx.Cache, ...)

    def run_step(state, rest, tokens, query_lens):
        model = nnx.merge(graphdef, state, rest)
        holder = paxcache.nnx.get_cache(model)
        done = holder.extend(query_lens, max_query_len=tokens.shape[1])
        logits = model(tokens)
        return nnx.state(model, nnx.Cache), logits, done.ok

    step = jax.jit(run_step, donate_argnums=0)
    for length in (3, 1):
        compiled = step.lower(state, rest, make_tokens(length), jnp.array([length, 1])).compile()
        assert not pool_copies(compiled, cache.kv)
        assert memory(compiled).temp_size_in_bytes < config.pool_bytes / 2
        assert memory(compiled).alias_size_in_bytes >= config.pool_bytes
    undonated = jax.jit(run_step).lower(state, rest, make_tokens(1), jnp.array([1, 1])).compile()
    assert pool_copies(undonated, cache.kv)  # the search finds what it looks for


def test_nnx_jit_traces_once_for_any_lengths():
    @chex.assert_max_traces(n=1)
    def run_once(model, cache, tokens, query_lens):
        step = cache.extend(query_lens, max_query_len=tokens.shape[1])
        return model(tokens), step.ok

    forward: Any = nnx.jit(run_once)
    model, tokens = Model(), make_tokens(6)
    paged, cache = paxcache.nnx.paginate(model, make_config())
    expected = causal(model, tokens)
    starts = np.zeros(2, int)
    for lens in ([3, 1], [0, 3], [1, 1]):
        chunk = jnp.stack([jnp.roll(tokens[row], -starts[row])[:3] for row in range(2)])
        out, ok = forward(paged, cache, chunk, jnp.array(lens))
        assert ok.all()
        for row, length in enumerate(lens):
            close(out[row, :length], expected[row, starts[row] : starts[row] + length])
        starts += lens
    assert cache.step is None


def test_greedy_while_loop_equals_full_recomputation():
    model, prompts = Model(), make_tokens(3)
    paged, cache = paxcache.nnx.paginate(model, make_config())
    cache.extend(jnp.array([3, 2]), max_query_len=3)
    logits = paged(prompts)
    first = jnp.argmax(logits[jnp.arange(2), jnp.array([2, 1])], -1)
    graphdef, state, params = nnx.split(paged, nnx.Cache, ...)

    def body(carry):
        t, tokens, state = carry
        model = nnx.merge(graphdef, state, params)
        paxcache.nnx.get_cache(model).extend(jnp.ones(2, jnp.int32), max_query_len=1)
        following = jnp.argmax(model(tokens[:, t][:, None])[:, 0], -1)
        return t + 1, tokens.at[:, t + 1].set(following), nnx.state(model, nnx.Cache)

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(tokens, state):
        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (jnp.int32(0), tokens, state))

    start = jnp.zeros((2, 4), first.dtype).at[:, 0].set(first)
    compiled = loop.lower(start, state).compile()
    assert not pool_copies(compiled, cache.kv)
    _, tokens, state = compiled(start, state)
    for row, length in enumerate((3, 2)):
        # Greedy choices repeat themselves where the model sees the whole sequence at once.
        sequence = jnp.concatenate([prompts[row, :length], tokens[row]])
        choices = jnp.argmax(causal(model, sequence[None])[0], -1)
        assert tokens[row].tolist() == choices[length - 1 : -1].tolist()
    nnx.update(paged, state)
    assert paxcache.nnx.get_cache(paged).kv.seq_lens.tolist() == [6, 5]


class ScannedModel(nnx.Module):
    def __init__(self, num_layers: int, *, axes: Any):
        self.axes = nnx.static(axes)
        make = nnx.split_rngs(splits=num_layers)(nnx.vmap(functools.partial(Block, num_kv_heads=1)))
        self.blocks = make(nnx.Rngs(0))

    def __call__(self, x, **options):
        return nnx.scan(
            lambda block, x: block(x, **options), in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry
        )(self.blocks, x)


def test_scan_over_layers_carries_the_cache():
    config = make_config(num_layers=3, num_kv_heads=1, num_pages=1024)
    model = ScannedModel(3, axes=nnx.StateAxes({nnx.Cache: nnx.Carry, ...: 0}))
    x = jax.random.normal(jax.random.key(3), (2, 5, F))
    mask = nnx.make_causal_mask(x[..., 0])
    expected = model(x, mask=mask)
    paged, cache = paxcache.nnx.paginate(model, config)
    close(run(paged, cache, x[:, :4], (3, 1)), expected[:, :4])
    cache.finish()
    graphdef, state, rest = nnx.split(paged, nnx.Cache, ...)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, rest, x):
        model = nnx.merge(graphdef, state, rest)
        holder = paxcache.nnx.get_cache(model)
        holder.extend(jnp.ones(2, jnp.int32), max_query_len=1)
        out = model(x)
        holder.finish()
        return nnx.state(model, nnx.Cache), out

    compiled = step.lower(state, rest, x[:, 4:]).compile()
    assert not pool_copies(compiled, cache.kv)
    after, out = compiled(state, rest, x[:, 4:])
    close(out, expected[:, 4:])
    assert jax.tree.structure(after) == jax.tree.structure(nnx.state(paged, nnx.Cache))


def test_scan_that_does_not_carry_the_cache_fails():
    model = ScannedModel(3, axes=0)
    paged, cache = paxcache.nnx.paginate(model, make_config(num_layers=3, num_kv_heads=1))
    cache.extend(jnp.array([1, 1]), max_query_len=1)
    with pytest.raises(ValueError, match="leading axis"):
        paged(jnp.ones((2, 1, F)))


# Models as they come: each runs in `generate`, or is refused by a message of its own.


def greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    """Tokens by full recomputation."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(
            int(jnp.argmax(model(jnp.array([tokens]), mask=nnx.make_causal_mask(jnp.array([tokens])))[0, -1]))
        )
    return tokens[len(prompt) :]


class Lifted(Model):
    """Blocks called through a transformation; with `shared`, one block instead of two."""

    def __init__(self, lift: Any, *, shared: bool = False):
        super().__init__()
        self.lift = lift
        if shared:
            self.blocks = nnx.List([self.blocks[0], self.blocks[0]])

    def __call__(self, tokens, mask=None):
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.lift(block, x, mask)
        return self.head(x)


class Looped(Model):
    """One block in a loop of NNX, two times."""

    def __init__(self, loop: Any):
        super().__init__(num_layers=1)
        self.loop = loop

    def __call__(self, tokens, mask=None):
        return self.head(self.loop(self.blocks[0], self.embed(tokens), mask))


class Stacked(Model):
    """Two blocks under an `nnx.scan`."""

    def __init__(self, axes: Any):
        super().__init__(num_layers=1)
        self.body = ScannedModel(2, axes=axes)
        del self.blocks

    def __call__(self, tokens, mask=None):
        return self.head(self.body(self.embed(tokens), mask=mask))


class Cross(Model):
    """Attends to itself, then to something else of as many tokens, which nothing else would catch."""

    def __call__(self, tokens, mask=None):
        x = self.blocks[0](self.embed(tokens), mask=mask)
        other = jnp.ones_like(x)
        return self.head(x + self.blocks[1].attention(x, other))


def call(block, x, mask):
    return block(x, mask=mask)


def in_fori_loop(block, x, mask):
    return nnx.fori_loop(0, 2, lambda _, c: (c[0], c[0](c[1], mask=mask)), (block, x))[1]


def in_while_loop(block, x, mask):
    def body(c):
        return c[0], c[0](c[1], mask=mask), c[2] + 1

    return nnx.while_loop(lambda c: c[2] < 2, body, (block, x, 0))[1]


def in_cond(block, x, mask):
    return nnx.cond(True, lambda block, x: block(x, mask=mask), lambda block, x: x, block, x)


def through(transform: Any) -> Any:
    """The block called under a transformation."""
    return lambda block, x, mask: transform(lambda block, x: block(x, mask=mask))(block, x)


CARRIED = nnx.StateAxes({nnx.Cache: nnx.Carry, ...: 0})
BY_COUNT = dict(count_calls=True)
RUN = {
    "nnx.remat": (lambda: Lifted(through(nnx.remat)), {}),
    "nnx.jit": (lambda: Lifted(through(nnx.jit)), {}),
    "nnx.scan with the cache carried": (lambda: Stacked(CARRIED), {}),
    "shared weights": (lambda: Lifted(call, shared=True), BY_COUNT),
    "nnx.fori_loop": (lambda: Looped(in_fori_loop), BY_COUNT),
    "nnx.while_loop": (lambda: Looped(in_while_loop), BY_COUNT),
}


@pytest.mark.parametrize("case", RUN)
def test_models_that_generate_runs(case):
    make, options = RUN[case]
    model, prompt = make(), [1, 2, 3]
    settings = dict(num_kv_heads=1) if isinstance(model, Stacked) else {}
    config = make_config(**settings)
    fn, params = paxcache.nnx.model_fn(model, config, **options)
    result = paxcache.generate(fn, params, paxcache.init(config), [prompt, [4]], max_new_tokens=3)
    assert result.to_lists() == [greedy(model, prompt, 3), greedy(model, [4], 3)]


def test_model_fn_in_tree_mode():
    model, config = Model(), make_config()
    with nnx.set_graph_mode(False):
        fn, params = paxcache.nnx.model_fn(model, config)
        result = paxcache.generate(fn, params, paxcache.init(config), [[1, 2, 3]], max_new_tokens=3)
    assert result.to_lists() == [greedy(model, [1, 2, 3], 3)]


BY_REFERENCE = r"share it by reference.*nnx\.jit\(\.\.\., graph=True\).*model_fn"
REFUSED = {
    "jax.jit": (lambda: Lifted(through(jax.jit)), TypeError, BY_REFERENCE),
    "jax.checkpoint": (lambda: Lifted(through(jax.checkpoint)), TypeError, BY_REFERENCE),
    "tree mode": (
        lambda: Lifted(through(functools.partial(nnx.jit, graph=False))),
        TypeError,
        BY_REFERENCE,
    ),
    "nnx.cond": (lambda: Lifted(in_cond), TypeError, "in one branch of a cond"),
    "nnx.fori_loop": (lambda: Looped(in_fori_loop), TypeError, "inside a loop needs count_calls=True"),
    "nnx.while_loop": (lambda: Looped(in_while_loop), ValueError, "inside a loop needs count_calls=True"),
    "nnx.vmap": (
        lambda: Lifted(
            lambda block, x, mask: nnx.vmap(
                lambda block, x: block(x[None], mask=mask)[0], in_axes=(None, 0), out_axes=0
            )(block, x)
        ),
        ValueError,
        "cannot be mapped over them by vmap",
    ),
    "nnx.scan that slices the cache": (
        lambda: Stacked(0),
        ValueError,
        r"must carry it: in_axes=nnx\.StateAxes",
    ),
    "cross-attention": (Cross, ValueError, "inputs_k: expected None or inputs_q itself.*only= in NNX"),
    "shared weights": (
        lambda: Lifted(call, shared=True),
        ValueError,
        "1 attention layers found, but the cache has 2.*count_calls=True",
    ),
    "ToNNX": (
        lambda: nnx.bridge.ToNNX(nn.MultiHeadDotProductAttention(num_heads=H), rngs=nnx.Rngs(0)),
        ValueError,
        "wraps a Linen module.*paxcache.linen.model_fn",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_refused_say_what_to_write(case):
    make, error, match = REFUSED[case]
    model = make()
    num_layers = 1 if isinstance(model, Looped) else 2
    config = make_config(num_layers=num_layers, num_kv_heads=1 if isinstance(model, Stacked) else H)
    cache, step = paxcache.extend(paxcache.init(config), jnp.array([2, 0]), num_tokens=2)
    with pytest.raises(error, match=f"(?s){match}"):
        fn, params = paxcache.nnx.model_fn(model, config)
        jax.eval_shape(fn, params, jnp.array([1, 2]), cache, step, jnp.array([1]))


def test_a_module_handed_to_plain_jit_or_tree_mode():
    paged, cache = paxcache.nnx.paginate(Model(), make_config())
    cache.extend(jnp.array([1, 1]), max_query_len=1)
    for jit in (jax.jit, functools.partial(nnx.jit, graph=False)):
        with pytest.raises(TypeError, match=BY_REFERENCE):
            jit(lambda model, tokens: model(tokens))(paged, make_tokens(1))
    assert nnx.jit(lambda model, tokens: model(tokens))(paged, make_tokens(1)).shape == (2, 1, 11)


def test_more_calls_than_layers_give_nan():
    model, tokens = Lifted(call, shared=True), make_tokens(1)
    paged, cache = paxcache.nnx.paginate(model, make_config(num_layers=1), count_calls=True)
    cache.extend(jnp.array([1, 1]), max_query_len=1)
    assert np.isnan(paged(tokens)).all()
    with pytest.raises(ValueError, match="one layer group"):
        groups = (paxcache.LayerGroup(num_layers=1, num_kv_heads=H, head_dim=D),) * 2
        config = paxcache.CacheConfig(groups=groups, num_pages=16, max_seqs=2, max_pages_per_seq=4)
        paxcache.nnx.paginate(model, config, count_calls=True)


def test_counted_passes_can_be_the_carry_of_a_loop():
    model, tokens = Lifted(call, shared=True), make_tokens(4)
    expected = model(tokens, mask=nnx.make_causal_mask(tokens))
    paged, _ = paxcache.nnx.paginate(model, make_config(), count_calls=True)
    graphdef, state, params = nnx.split(paged, nnx.Cache, ...)

    def body(state, tokens):
        model = nnx.merge(graphdef, state, params, copy=True)
        cache = paxcache.nnx.get_cache(model)
        cache.extend(jnp.ones(2, jnp.int32), max_query_len=1)
        logits = model(tokens[:, None])[:, 0]
        cache.finish()
        return nnx.state(model, nnx.Cache), logits

    _, logits = jax.lax.scan(body, state, tokens.T)
    close(jnp.moveaxis(logits, 0, 1), expected)


# Configs read from models.


def test_a_config_is_read_from_the_model():
    sizes: dict[str, Any] = dict(page_size=S, num_pages=16, max_seqs=2, max_pages_per_seq=4)
    expected = make_config(**dict(num_kv_heads=1))
    config = paxcache.nnx.cache_config(Model(num_kv_heads=1), **sizes)
    for name in ("num_layers", "num_kv_heads", "head_dim", "dtype", "page_bytes", "pool_bytes"):
        assert getattr(config, name) == getattr(expected, name), name
    model = Model(num_layers=3)
    rngs = nnx.Rngs(0)
    model.blocks[1].attention = nnx.MultiHeadAttention(H, F, num_kv_heads=1, dtype=jnp.bfloat16, rngs=rngs)
    groups = paxcache.nnx.cache_config(model, **sizes).layer_groups
    assert [(g.num_layers, g.num_kv_heads, g.dtype) for g in groups] == [
        (1, 2, jnp.float32),
        (1, 1, jnp.bfloat16),
        (1, 2, jnp.float32),
    ]
    paxcache.nnx.paginate(model, paxcache.nnx.cache_config(model, **sizes))
    stacked = paxcache.nnx.cache_config(Stacked(0), **sizes, dtype=jnp.bfloat16, quantization="int8")
    assert stacked.layer_groups[0].num_layers == 2 and stacked.quantization == "int8"
    shared = paxcache.nnx.cache_config(Lifted(call, shared=True), num_layers=5, **sizes)
    assert shared.num_layers == 5
    fitted = paxcache.nnx.cache_config(Model(), memory_bytes=1 << 16, max_seqs=2, max_pages_per_seq=4)
    assert fitted.pool_bytes <= 1 << 16 < fitted.pool_bytes + fitted.page_bytes
    one = paxcache.nnx.cache_config(Model(), only=lambda path, _: path[1] == 1, **sizes)
    assert one.num_layers == 1


@pytest.mark.parametrize(
    ("model", "arguments", "error", "match"),
    [
        (lambda: 3, {}, TypeError, "model: expected"),
        (lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {}, ValueError, "0 attention layers.*PagedCache.attend"),
        (Model, dict(head_dim=4), TypeError, "head_dim is read from the model"),
        (Model, dict(pages=4), TypeError, "pages is no argument of CacheConfig"),
        (Model, dict(memory_bytes=4), TypeError, "exactly one of num_pages and memory_bytes"),
        (Model, dict(num_layers=0), ValueError, "num_layers must be at least 1"),
    ],
)
def test_configs_that_cannot_be_read(model, arguments, error, match):
    with pytest.raises(error, match=match):
        paxcache.nnx.cache_config(
            model(), **{"num_pages": 16, "max_seqs": 2, "max_pages_per_seq": 4, **arguments}
        )


# Beside the stock layers.


def test_dense_adapter_gives_what_the_pages_hold():
    _, cache = paxcache.nnx.paginate(Model(), make_config())
    dense = paxcache.nnx.DenseCache(cache, max_len=6)
    k, v = jax.random.normal(jax.random.key(4), (2, 2, 3, H, D))
    step = cache.extend(jnp.array(LENGTHS), max_query_len=3)
    k_full, v_full = dense.update(0, k, v)
    q = jax.random.normal(jax.random.key(5), (2, 3, H, D))
    mask = jnp.arange(6) <= step.positions[:, None, :, None]
    expected = nnx.dot_product_attention(q, k_full, v_full, mask=mask)
    out = cache.attend(1, q, k, v)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(k_full[row, :length], k[row, :length])
        np.testing.assert_array_equal(v_full[row, :length], v[row, :length])
        assert not k_full[row, length:].any() and not v_full[row, length:].any()
        close(out[row, :length], expected[row, :length])
    assert cache.step is None  # both layers took it


def test_model_fn_runs_packed_steps():
    model, tokens = Model(), make_tokens()
    expected, config = causal(model, tokens), make_config()
    paged, _ = paxcache.nnx.paginate(model, config)
    packed = jnp.concatenate([tokens[0, :3], tokens[1, :2]])
    for fn, params in (paxcache.nnx.model_fn(model, config), paxcache.nnx.model_fn(paged)):
        cache, step = paxcache.extend(paxcache.init(config), jnp.array(LENGTHS), num_tokens=5)
        logits, cache = jax.jit(fn)(params, packed, cache, step, jnp.array([2, 4]))
        close(logits, jnp.stack([expected[0, 2], expected[1, 1]]))
        cache, step = paxcache.extend(cache, jnp.array([0, 1]), num_tokens=5)
        padded = jnp.array([tokens[1, 2], 0, 0, 0, 0])
        logits, cache = jax.jit(fn)(params, padded, cache, step, jnp.array([0, 0]))
        close(logits[0], expected[1, 2])
        assert not [leaf for leaf in jax.tree.leaves(params) if leaf.shape == cache.groups[0].pages.k.shape]


def test_generate_runs_the_model():
    model, config = Model(), make_config()
    prompts = [[1, 2, 3], [4], [5, 6]]
    fn, params = paxcache.nnx.model_fn(model, config)
    result = paxcache.generate(fn, params, paxcache.init(config), prompts, max_new_tokens=3)
    for prompt, tokens in zip(prompts, result.to_lists(), strict=True):
        choices = jnp.argmax(causal(model, jnp.array([prompt + tokens]))[0], -1)
        assert tokens == choices[len(prompt) - 1 : -1].tolist()


def test_model_fn_with_a_call_of_its_own():
    config = make_config()
    seen = []

    def call(model, tokens, step, logits_at):
        seen.append(step.positions.shape)
        x = model.embed(tokens[:, None])
        for block in model.blocks:
            x = block(x)
        return model.head(x[logits_at, 0])

    model, tokens = Model(), make_tokens()
    fn, params = paxcache.nnx.model_fn(model, config, call=call)
    cache, step = paxcache.extend(paxcache.init(config), jnp.array([5, 0]), num_tokens=5)
    logits, _ = fn(params, tokens[0], cache, step, jnp.array([4]))
    close(logits, causal(model, tokens)[0, 4][None])
    assert seen == [(5,)]


# Errors.


def test_a_pass_needs_a_step_of_its_own():
    paged, cache = paxcache.nnx.paginate(Model(), make_config())
    with pytest.raises(ValueError, match="extend once before each forward pass"):
        paged(make_tokens(1))
    cache.extend(jnp.array([1, 1]), max_query_len=1)
    paged(make_tokens(1))
    with pytest.raises(ValueError, match="extend once before each forward pass"):
        paged(make_tokens(1))
    cache.extend(jnp.array([1, 1]), max_query_len=1)
    paged.blocks[0](jnp.ones((2, 1, F)))
    with pytest.raises(ValueError, match="layer 0 took this step already"):
        paged.blocks[0](jnp.ones((2, 1, F)))
    cache.kv = paxcache.release(cache.kv, jnp.array([True, True]))
    assert cache.step is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (dict(mask=jnp.ones((2, 1, 1, 1), bool)), "mask: expected None in decode"),
        (dict(sow_weights=True), "sow_weights"),
        (dict(deterministic=False), "deterministic"),
        (dict(inputs_v=jnp.ones((2, 1, F))), "inputs_k"),
        (dict(inputs_k=jnp.ones((2, 2, F))), "leading axes"),
    ],
)
def test_arguments_that_cannot_be_honoured(arguments, match):
    layer = nnx.MultiHeadAttention(H, F, dropout_rate=0.1, rngs=nnx.Rngs(0))
    paged, cache = paxcache.nnx.paginate(layer, make_config(num_layers=1))
    cache.extend(jnp.array([1, 1]), max_query_len=1)
    with pytest.raises(ValueError, match=match):
        paged(jnp.ones((2, 1, F)), **{"deterministic": True, **arguments})


def test_dropout_must_be_decided():
    layer = nnx.MultiHeadAttention(H, F, dropout_rate=0.1, rngs=nnx.Rngs(0))
    paged, cache = paxcache.nnx.paginate(layer, make_config(num_layers=1))
    cache.extend(jnp.array([1, 1]), max_query_len=1)
    with pytest.raises(ValueError, match="deterministic"):
        paged(jnp.ones((2, 1, F)))


def test_declared_causal_masks_are_dropped():
    model, tokens = Model(), make_tokens()
    paged, cache = paxcache.nnx.paginate(model, make_config(), masks_are_causal=True)
    cache.extend(jnp.array([3, 3]), max_query_len=3)
    close(causal(paged, tokens[:, :3]), causal(model, tokens[:, :3]))


def test_wrong_shapes():
    paged, cache = paxcache.nnx.paginate(Model(), make_config())
    cache.extend(jnp.array([1, 1]), max_query_len=1)
    with pytest.raises(ValueError, match=r"\[B=2, Q=1\]"):
        paged(make_tokens(2))
    cache.extend(jnp.array([1, 1]), num_tokens=5)
    with pytest.raises(ValueError, match="T=5 tokens"):
        paged(make_tokens(1))
    with pytest.raises(ValueError, match="init_cache"):
        paged.blocks[0].attention.init_cache((2, 1, F))


class Custom(nnx.MultiHeadAttention):
    def __call__(self, x, *args, **kwargs):
        return 2 * super().__call__(x, *args, **kwargs)


@pytest.mark.parametrize(
    ("model", "config", "match"),
    [
        (lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {}, "0 attention layers found, but the cache has 2"),
        (lambda: Model(num_layers=3), {}, "3 attention layers found, but the cache has 2"),
        (lambda: Model(num_kv_heads=1), {}, "blocks/0/attention has num_kv_heads=1"),
        (Model, {"head_dim": 8}, "head_dim=4"),
        (Model, {"v_head_dim": 2}, "v_head_dim=2"),
        (lambda: Model(attention_fn=lambda *a, **k: None), {}, "attention_fn"),
        (lambda: Custom(H, F, rngs=nnx.Rngs(0)), {"num_layers": 1}, "Custom is not the stock layer"),
        (
            lambda: paxcache.nnx.paginate(Model(), make_config())[0],
            {},
            "MultiHeadAttention is not the stock layer",
        ),
    ],
)
def test_models_that_do_not_fit(model, config, match):
    with pytest.raises(ValueError, match=match):
        paxcache.nnx.paginate(model(), make_config(**config))


def test_wrong_types():
    with pytest.raises(TypeError, match="CacheConfig or a PagedKVCache"):
        paxcache.nnx.PagedCache(7)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one PagedCache"):
        paxcache.nnx.model_fn(Model())
    paged, cache = paxcache.nnx.paginate(Model(), make_config())
    with pytest.raises(ValueError, match="only with config"):
        paxcache.nnx.model_fn(paged, only=nnx.Linear)
    wrong: Any = 7
    with pytest.raises(TypeError, match="model: expected a Module"):
        paxcache.nnx.paginate(wrong, make_config())
    with pytest.raises(TypeError, match="model: expected a Module"):
        paxcache.nnx.model_fn(wrong, make_config())
    with pytest.raises(TypeError, match="model: expected a Module"):
        paxcache.nnx.get_cache(wrong)
    with pytest.raises(TypeError, match="config: expected a CacheConfig"):
        paxcache.nnx.model_fn(Model(), wrong)
    with pytest.raises(TypeError, match="call: expected a function"):
        paxcache.nnx.model_fn(Model(), make_config(), call=wrong)
    with pytest.raises(TypeError, match="kv: expected a PagedKVCache"):
        cache.kv = wrong
    with pytest.raises(TypeError, match="cache: expected a PagedCache"):
        paxcache.nnx.DenseCache(wrong, max_len=3)
    with pytest.raises(ValueError, match=r"expected logits \[T=2, 1, V\].*call="):
        fn, params = paxcache.nnx.model_fn(nnx.Sequential(Model(), lambda x: x[:, 0]), make_config())
        cache, step = paxcache.extend(paxcache.init(make_config()), jnp.array([2, 0]), num_tokens=2)
        fn(params, jnp.array([1, 2]), cache, step, jnp.array([1]))


def test_only_picks_layers():
    model = Model(num_layers=3)
    paged, _ = paxcache.nnx.paginate(model, make_config(), only=lambda path, _: path[1] != 1)
    kinds = [type(block.attention) for block in paged.blocks]
    assert kinds == [paxcache.nnx.MultiHeadAttention, nnx.MultiHeadAttention, paxcache.nnx.MultiHeadAttention]
    assert [vars(paged.blocks[i].attention)["layer"] for i in (0, 2)] == [0, 1]


def test_layers_are_numbered_in_natural_order():
    paths = [("layer_10", "a"), ("layer_2", "a"), (1, "a"), ("layer_2", "b"), (0, "a")]
    ordered = sorted(paths, key=_forward.natural_order)
    assert ordered == [(0, "a"), (1, "a"), ("layer_2", "a"), ("layer_2", "b"), ("layer_10", "a")]
