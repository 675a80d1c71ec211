"""`paxcache.linen` against Flax's own layers: same numbers, same parameters, one table, no copy of a pool."""

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

import paxcache
import paxcache.linen
from paxcache import _forward

F, H, D, S, V = 8, 2, 4, 2, 11  # features, heads, head dim, page size, vocabulary
LENGTHS = (3, 2)
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
Paged = paxcache.linen.MultiHeadDotProductAttention
Stock = nn.MultiHeadDotProductAttention


class Block(nn.Module):
    attention: Any = Paged
    settings: Any = None

    @nn.compact
    def __call__(self, x, **options):
        attention = self.attention(num_heads=H, **{"decode": True, **(self.settings or {})})
        return x + attention(nn.LayerNorm()(x), **options)


class Model(nn.Module):
    attention: Any = Paged
    settings: Any = None
    num_layers: int = 2

    @nn.compact
    def __call__(self, tokens, **options):
        x = nn.Embed(V, F)(tokens)
        for _ in range(self.num_layers):
            x = Block(self.attention, self.settings)(x, **options)
        return nn.Dense(V)(x)


def make_config(**changes: Any) -> paxcache.CacheConfig:
    settings = dict(num_layers=2, num_kv_heads=H, head_dim=D, page_size=S, num_pages=16, max_seqs=2)
    return paxcache.CacheConfig(**{**settings, "max_pages_per_seq": 4, "dtype": jnp.float32, **changes})


def make_tokens(length: int = 5) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (2, length), 0, V)


def init(model: nn.Module, *, length: int = 1) -> Any:
    return model.init(jax.random.key(0), make_tokens(length))


def causal(settings: Any, params: Any, tokens: jax.Array, *, num_layers: int = 2) -> Any:
    """The stock model on whole sequences."""
    model = Model(Stock, {**(settings or {}), "decode": False}, num_layers)
    return model.apply({"params": rename(params)}, tokens, mask=nn.make_causal_mask(tokens))


def rename(params: Any) -> Any:
    """Parameters of any of the attention classes under the name that Linen gives to those of `Stock`."""
    names = ("MultiHeadAttention_0", "SelfAttention_0")
    if not isinstance(params, dict):
        return params
    return {"MultiHeadDotProductAttention_0" if k in names else k: rename(v) for k, v in params.items()}


def forward(model: Any, variables: Any, tokens: jax.Array, lens: Any, **options: Any) -> tuple[Any, Any]:
    """One row-aligned pass."""
    variables, step = paxcache.linen.extend(variables, jnp.array(lens), max_query_len=tokens.shape[1])
    step.raise_if_failed()
    out, cache = model.apply(variables, tokens, mutable=["cache"], **options)
    return out, {**variables, **cache}


def run(model: Any, variables: Any, tokens: jax.Array, chunks: tuple[int, ...]) -> tuple[Any, Any]:
    """The paged model over the tokens in chunks, all rows alike."""
    outs, at = [], 0
    for size in chunks:
        out, variables = forward(model, variables, tokens[:, at : at + size], [size] * 2)
        outs.append(out)
        at += size
    return jnp.concatenate(outs, axis=1), variables


def stock_decode(settings: Any, params: Any, tokens: jax.Array) -> Any:
    """The stock model token by token, over its dense cache."""
    model = Model(Stock, settings, num_layers=1)
    cache = init(model, length=tokens.shape[1])["cache"]
    outs = []
    for t in range(tokens.shape[1]):
        out, after = model.apply({"params": params, "cache": cache}, tokens[:, t : t + 1], mutable=["cache"])
        cache = after["cache"]
        outs.append(out)
    return jnp.concatenate(outs, axis=1)


VARIANTS = {
    "plain": dict(),
    "qk norm, no bias": dict(normalize_qk=True, use_bias=False),
    "wide heads, dropout switched off": dict(qkv_features=16, dropout_rate=0.5, deterministic=True),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_same_numbers_as_the_stock_layers(variant):
    model, tokens = Model(settings=variant, num_layers=1), make_tokens()
    variables = init(model)
    config = make_config(num_layers=1, head_dim=variant.get("qkv_features", F) // H)
    variables = paxcache.linen.init_cache(variables, config)
    by_token, after = run(model, variables, tokens, (1,) * 5)
    close(by_token, stock_decode(variant, variables["params"], tokens))
    chex.assert_trees_all_equal_structs(after, variables)
    out, _ = run(model, variables, tokens, (3, 1, 1))  # a stock layer cannot decode by chunks
    close(out, causal(variant, variables["params"], tokens, num_layers=1))


def test_ragged_rows_see_only_themselves():
    model, tokens = Model(), make_tokens()
    variables = paxcache.linen.init_cache(init(model), make_config())
    expected = causal(None, variables["params"], tokens)
    out, variables = forward(model, variables, tokens[:, :3], LENGTHS)
    for row, length in enumerate(LENGTHS):
        close(out[row, :length], expected[row, :length])
    for t in range(2):
        chunk = jnp.stack([tokens[row, length + t] for row, length in enumerate(LENGTHS)])[:, None]
        out, variables = forward(model, variables, chunk, [1, 1])
        for row, length in enumerate(LENGTHS):
            close(out[row, 0], expected[row, length + t])
    kv = paxcache.linen.get_cache(variables)
    assert kv.seq_lens.tolist() == [5, 4]
    paxcache.check(kv)
    variables = paxcache.linen.replace_cache(variables, paxcache.release(kv, jnp.array([True, False])))
    assert paxcache.linen.get_cache(variables).seq_lens.tolist() == [0, 4]


def test_ragged_chunks_equal_the_dense_cache():
    model, tokens = Model(num_layers=1), make_tokens()
    variables = init(model)
    expected = stock_decode(None, variables["params"], tokens)
    variables = paxcache.linen.init_cache(variables, make_config(num_layers=1))
    done = np.zeros(2, int)
    for lens in ([3, 2], [0, 2], [2, 1]):
        chunk = jnp.stack([jnp.roll(tokens[row], -done[row])[:3] for row in range(2)])
        out, variables = forward(model, variables, chunk, lens)
        for row, length in enumerate(lens):
            close(out[row, :length], expected[row, done[row] : done[row] + length])
        done += lens
    assert done.tolist() == [5, 5]


@pytest.mark.parametrize("axis", [0, 1], ids=["one row", "rows of one token"])
def test_packed_step_equals_the_row_aligned_one(axis):
    model, tokens = Model(), make_tokens()
    variables = paxcache.linen.init_cache(init(model), make_config())
    expected = causal(None, variables["params"], tokens)
    packed = jnp.concatenate([tokens[row, :length] for row, length in enumerate(LENGTHS)])
    variables, _ = paxcache.linen.extend(variables, jnp.array(LENGTHS), num_tokens=5)
    out, _ = model.apply(variables, jnp.expand_dims(packed, axis), mutable=["cache"])
    wanted = jnp.concatenate([expected[row, :length] for row, length in enumerate(LENGTHS)])
    close(out.reshape(5, -1), wanted)


@pytest.mark.parametrize("normalize_qk", [False, True])
def test_parameters_are_those_of_the_stock_model(normalize_qk):
    settings = dict(normalize_qk=normalize_qk)
    paged, stock = init(Model(settings=settings)), init(Model(Stock, settings))
    chex.assert_trees_all_equal(paged["params"], stock["params"])


def test_a_checkpoint_needs_shapes_only():
    model, tokens = Model(), make_tokens()
    params = init(Model(Stock, dict(decode=False)))["params"]
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    variables = paxcache.linen.init_cache({**shapes, "params": params}, make_config())
    out, _ = run(model, variables, tokens[:, :3], (3,))
    close(out, causal(None, params, tokens)[:, :3])


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["MultiHeadAttention", "SelfAttention"])
def test_the_other_names_of_the_layer(kind):
    model, tokens = Model(getattr(paxcache.linen, kind)), make_tokens(3)
    variables = init(model)
    chex.assert_trees_all_equal(variables["params"], init(Model(getattr(nn, kind)))["params"])
    variables = paxcache.linen.init_cache(variables, make_config())
    close(run(model, variables, tokens, (3,))[0], causal(None, variables["params"], tokens))


@pytest.mark.filterwarnings("ignore:SelfAttention will be deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", [Stock, nn.SelfAttention, Paged])
def test_interceptor_pages_a_model_as_it_is(kind):
    model, tokens = Model(kind), make_tokens(3)
    with nn.intercept_methods(paxcache.linen.interceptor):
        variables = paxcache.linen.init_cache(init(model), make_config())
        out, variables = run(model, variables, tokens, (3,))
    close(out, causal(None, variables["params"], tokens))
    assert list(variables["cache"]) == ["paxcache"]


def test_interceptor_leaves_other_layers_alone():
    model, tokens = Model(Stock, dict(decode=False)), make_tokens(3)
    params = init(model)
    expected = model.apply(params, tokens)
    with nn.intercept_methods(paxcache.linen.interceptor):
        np.testing.assert_array_equal(model.apply(params, tokens), expected)


def test_decode_off_is_the_stock_layer():
    model, tokens = Model(settings=dict(decode=False)), make_tokens()
    variables = init(model)
    assert list(variables) == ["params"]
    out = model.apply(variables, tokens, mask=nn.make_causal_mask(tokens))
    np.testing.assert_array_equal(out, causal(None, variables["params"], tokens))


def test_one_table_and_one_extend_however_many_layers(monkeypatch):
    calls = []
    extend = _forward._cache.extend
    monkeypatch.setattr(_forward._cache, "extend", lambda *a, **k: calls.append(1) or extend(*a, **k))
    model, tokens = Model(), make_tokens(4)
    variables = paxcache.linen.init_cache(init(model), make_config())
    out, variables = run(model, variables, tokens, (3, 1))
    close(out, causal(None, variables["params"], tokens))
    assert len(calls) == 2
    assert list(variables["cache"]) == ["paxcache"]
    assert len(paxcache.linen.get_cache(variables).groups) == 1


# Transformations.


def pool_copies(compiled: Any, kv: paxcache.PagedKVCache) -> list[str]:
    """Copies of a whole pool, or of all of a layer's pages, in compiled HLO."""
    L, *page = kv.groups[0].pages.k.shape
    shapes = "|".join(re.escape(",".join(map(str, shape))) for shape in ((L, *page), (1, *page), tuple(page)))
    return re.findall(rf"= \w+\[(?:{shapes})\]\S* copy(?:-start)?\(.*", compiled.as_text())


def memory(compiled: Any) -> Any:
    return compiled.memory_analysis()


def test_donated_step_updates_the_pool_in_place():
    model, config = Model(), make_config(num_pages=1 << 16)
    variables = paxcache.linen.init_cache(init(model), config)

    def run_step(params, cache, tokens, query_lens):
        return forward_in_jit(model, {"params": params, "cache": cache}, tokens, query_lens)

    step = jax.jit(run_step, donate_argnums=1)
    for length in (3, 1):
        lowered = step.lower(
            variables["params"], variables["cache"], make_tokens(length), jnp.array([length, 1])
        )
        compiled = lowered.compile()
        assert not pool_copies(compiled, paxcache.linen.get_cache(variables))
        assert memory(compiled).temp_size_in_bytes < config.pool_bytes / 2
        assert memory(compiled).alias_size_in_bytes >= config.pool_bytes
    undonated = jax.jit(run_step).lower(
        variables["params"], variables["cache"], make_tokens(1), jnp.array([1, 1])
    )
    assert pool_copies(
        undonated.compile(), paxcache.linen.get_cache(variables)
    )  # the search finds what it looks for


def forward_in_jit(model: Any, variables: Any, tokens: Any, query_lens: Any) -> tuple[Any, Any]:
    variables, _ = paxcache.linen.extend(variables, query_lens, max_query_len=tokens.shape[1])
    logits, cache = model.apply(variables, tokens, mutable=["cache"])
    return cache["cache"], logits


def test_jit_traces_once_for_any_lengths():
    model, tokens = Model(), make_tokens()
    variables = paxcache.linen.init_cache(init(model), make_config())
    params, cache = variables["params"], variables["cache"]
    expected = causal(None, params, tokens)

    @jax.jit
    @chex.assert_max_traces(n=1)  # pyright: ignore
    def step(variables, tokens, query_lens):
        return forward_in_jit(model, variables, tokens, query_lens)

    starts = np.zeros(2, int)
    for lens in ([3, 1], [0, 3], [1, 1]):
        chunk = jnp.stack([jnp.roll(tokens[row], -starts[row])[:3] for row in range(2)])
        cache, out = step({"params": params, "cache": cache}, chunk, jnp.array(lens))
        for row, length in enumerate(lens):
            close(out[row, :length], expected[row, starts[row] : starts[row] + length])
        starts += lens


def test_greedy_while_loop_equals_full_recomputation():
    model, prompts = Model(), make_tokens(3)
    variables = paxcache.linen.init_cache(init(model), make_config())
    params = variables["params"]
    logits, variables = forward(model, variables, prompts, LENGTHS)
    first = jnp.argmax(logits[jnp.arange(2), jnp.array(LENGTHS) - 1], -1)

    def body(carry):
        t, tokens, cache = carry
        variables = {"params": params, "cache": cache}
        cache, logits = forward_in_jit(model, variables, tokens[:, t][:, None], jnp.ones(2, jnp.int32))
        return t + 1, tokens.at[:, t + 1].set(jnp.argmax(logits[:, 0], -1)), cache

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(tokens, cache):
        return jax.lax.while_loop(lambda carry: carry[0] < 3, body, (jnp.int32(0), tokens, cache))

    start, cache = jnp.zeros((2, 4), first.dtype).at[:, 0].set(first), variables["cache"]
    compiled = loop.lower(start, cache).compile()
    assert not pool_copies(compiled, paxcache.linen.get_cache(variables))
    _, tokens, cache = compiled(start, cache)
    for row, length in enumerate(LENGTHS):
        # Greedy choices repeat themselves where the model sees the whole sequence at once.
        sequence = jnp.concatenate([prompts[row, :length], tokens[row]])
        choices = jnp.argmax(causal(None, params, sequence[None])[0], -1)
        assert tokens[row].tolist() == choices[length - 1 : -1].tolist()
    assert paxcache.linen.get_cache({"cache": cache}).seq_lens.tolist() == [6, 5]


class ScannedBlock(nn.Module):
    settings: Any = None

    @nn.compact
    def __call__(self, x, mask):
        return Block(settings=self.settings, name="block")(x, mask=mask), None


class ScannedModel(nn.Module):
    carried: bool = True
    settings: Any = None
    num_layers: int = 3

    @nn.compact
    def __call__(self, tokens, mask=None):
        axes: dict[str, Any] = dict(variable_axes={"params": 0}, variable_carry="cache")
        if not self.carried:
            axes = dict(variable_axes={"params": 0, "cache": 0})
        axes["in_axes"] = nn.broadcast
        blocks = nn.scan(ScannedBlock, split_rngs={"params": True}, length=self.num_layers, **axes)
        x, _ = blocks(self.settings, name="blocks")(nn.Embed(V, F)(tokens), mask)
        return x


def test_scan_over_layers_carries_the_cache():
    model, tokens = ScannedModel(), make_tokens()
    variables = init(model)
    stock = ScannedModel(settings=dict(decode=False))
    expected: Any = stock.apply({"params": variables["params"]}, tokens, mask=nn.make_causal_mask(tokens))
    variables = paxcache.linen.init_cache(
        variables, make_config(num_layers=3, num_pages=1024), scanned_in=("blocks",)
    )
    out, after = run(model, variables, tokens[:, :4], (3, 1))
    close(out, expected[:, :4])
    variables = paxcache.linen.replace_cache(after, paxcache.linen.get_cache(after))  # ends the step

    @functools.partial(jax.jit, donate_argnums=1)
    def step(params, cache, tokens):
        variables = {"params": params, "cache": cache}
        cache, out = forward_in_jit(model, variables, tokens, jnp.ones(2, jnp.int32))
        variables = paxcache.linen.replace_cache({"cache": cache}, paxcache.linen.get_cache({"cache": cache}))
        return variables["cache"], out

    compiled = step.lower(variables["params"], variables["cache"], tokens[:, 4:]).compile()
    assert not pool_copies(compiled, paxcache.linen.get_cache(variables))
    after, out = compiled(variables["params"], variables["cache"], tokens[:, 4:])
    close(out, expected[:, 4:])
    assert jax.tree.structure(after) == jax.tree.structure(variables["cache"])


def test_more_scanned_layers_than_the_cache_has_give_nan():
    model = ScannedModel(num_layers=3)
    variables = paxcache.linen.init_cache(init(model), make_config(), scanned_in=("blocks",))
    out, _ = forward(model, variables, make_tokens(1), [1, 1])
    assert np.isnan(out).all()


def test_scan_with_an_axis_for_the_cache_fails():
    variables = init(ScannedModel(carried=False))
    with pytest.raises(ValueError, match='variable_carry="cache"'):
        paxcache.linen.init_cache(variables, make_config(num_layers=3))
    variables = paxcache.linen.init_cache(variables, make_config(num_layers=3), scanned_in=())
    with pytest.raises(ValueError, match='variable_carry="cache"'):
        forward(ScannedModel(carried=False), variables, make_tokens(1), [1, 1])


class Lifted(nn.Module):
    """Blocks of a lifted class."""

    lift: Any
    num_layers: int = 2
    settings: Any = None

    @nn.compact
    def __call__(self, tokens, mask=None):
        x = nn.Embed(V, F)(tokens)
        for layer in range(self.num_layers):
            x = self.lift(Block)(settings=self.settings, name=f"block_{layer}")(x, mask=mask)
        return nn.Dense(V)(x)


class Shared(nn.Module):
    """One block that runs twice, by Python or by `nn.while_loop`."""

    settings: Any = None
    looped: bool = False

    @nn.compact
    def __call__(self, tokens, mask=None):
        x, block = nn.Embed(V, F)(tokens), Block(settings=self.settings, name="block")
        if self.is_initializing():
            return nn.Dense(V)(block(x, mask=mask))

        def body(model, carry):
            del model
            return carry[0] + 1, block(carry[1], mask=mask)

        if self.looped:
            _, x = nn.while_loop(lambda _, c: c[0] < 2, body, self, (0, x), carry_variables="cache")
        else:
            x = block(block(x, mask=mask), mask=mask)
        return nn.Dense(V)(x)


class Rescanned(nn.Module):
    """Layers under an `nn.scan` of rematerialised blocks, as large models have them."""

    settings: Any = None

    @nn.compact
    def __call__(self, tokens, mask=None):
        axes: dict[str, Any] = dict(variable_axes={"params": 0}, variable_carry="cache", in_axes=nn.broadcast)
        blocks = nn.scan(nn.remat(ScannedBlock), split_rngs={"params": True}, length=2, **axes)
        x, _ = blocks(self.settings, name="blocks")(nn.Embed(V, F)(tokens), mask)
        return nn.Dense(V)(x)


def no_lift(block):
    return block


def vmapped(axis: int | None) -> Any:
    def lift(block):
        axes: dict[Any, Any] = {"params": None, "cache": axis}
        return nn.vmap(block, variable_axes=axes, split_rngs={"params": False}, in_axes=0)

    return lift


def greedy(model: nn.Module, variables: Any, prompt: list[int], length: int) -> list[int]:
    """Tokens by full recomputation."""
    tokens = list(prompt)
    for _ in range(length):
        given = jnp.array([tokens])
        logits: Any = model.apply(
            {"params": variables["params"]}, given, mask=nn.make_causal_mask(given), mutable=["cache"]
        )[0]
        tokens.append(int(jnp.argmax(logits[0, -1])))
    return tokens[len(prompt) :]


OFF = dict(decode=False)
BY_COUNT = dict(count_calls=True)
RUN = {  # model, its stock form, layers of the cache, options
    "nn.remat around all layers": (Lifted(nn.remat, 1), Lifted(no_lift, 1, OFF), 1, {}),
    "nn.jit around all layers": (Lifted(nn.jit, 1), Lifted(no_lift, 1, OFF), 1, {}),
    "nn.scan of nn.remat": (Rescanned(), Rescanned(OFF), 2, dict(scanned_in=("blocks",))),
    "shared weights": (Shared(), Shared(OFF), 2, BY_COUNT),
}


@pytest.mark.parametrize("case", RUN)
def test_models_that_generate_runs(case):
    model, stock, num_layers, options = RUN[case]
    variables, config = init(model), make_config(num_layers=num_layers)
    fn, params = paxcache.linen.model_fn(model, variables, config, **options)
    prompts = [[1, 2, 3], [4]]
    result = paxcache.generate(fn, params, paxcache.init(config), prompts, max_new_tokens=3)
    assert result.to_lists() == [greedy(stock, variables, prompt, 3) for prompt in prompts]


class Cross(nn.Module):
    """Attends to itself, then to something else of as many tokens, which nothing else would catch."""

    @nn.compact
    def __call__(self, tokens):
        x = Block(name="block")(nn.Embed(V, F)(tokens))
        return Paged(num_heads=H, decode=True, name="cross")(x, jnp.ones_like(x))


UNSCANNED = "If layers run under nn.scan: nn.scan must carry the cache.*scanned_in"
REFUSED = {
    "nn.remat": (Lifted(nn.remat), {}, "nn.remat hides a cache.*built without nn.remat"),
    "nn.jit": (Lifted(nn.jit), {}, "nn.jit hides a cache.*jit model.apply"),
    "nn.vmap, cache broadcast": (Lifted(vmapped(None)), {}, "nn.vmap maps over the layer.*with all rows"),
    "nn.vmap, cache mapped": (Lifted(vmapped(0)), {}, "nn.vmap maps over the layer.*with all rows"),
    "nn.scan, cache sliced": (ScannedModel(carried=False, num_layers=2), {}, UNSCANNED),
    "nn.scan, cache sliced, scanned_in": (
        ScannedModel(carried=False, num_layers=2),
        dict(scanned_in=("blocks",)),
        'variable_axes: the paged cache has no axis.*variable_carry="cache"',
    ),
    "nn.scan without scanned_in": (ScannedModel(num_layers=2), {}, UNSCANNED),
    "nn.scan elsewhere": (
        ScannedModel(num_layers=2),
        dict(scanned_in=("other",)),
        "scanned_in: other has no parameters; known there: Embed_0, blocks",
    ),
    "shared weights": (Shared(), {}, "2 layers, but 1 paged layers were found.*count_calls=True"),
    "nn.while_loop": (
        Shared(looped=True),
        BY_COUNT,
        r"nn.while_loop loses.*Python loop, with init_cache\(count_calls=True",
    ),
    "cross-attention": (Cross(), {}, "inputs_k: expected None or inputs_q itself.*decode=False in Linen"),
}


@pytest.mark.filterwarnings("ignore:kwargs are not supported in vmap:RuntimeWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_refused_say_what_to_write(case):
    model, options, match = REFUSED[case]
    config = make_config()
    cache, step = paxcache.extend(paxcache.init(config), jnp.array([2, 0]), num_tokens=2)
    with pytest.raises(ValueError, match=f"(?s){match}"):
        fn, params = paxcache.linen.model_fn(model, init(model), config, **options)
        jax.eval_shape(fn, params, jnp.array([1, 2]), cache, step, jnp.array([1]))


def test_counted_calls():
    model, tokens = Shared(), make_tokens(1)
    variables = init(model)
    few = paxcache.linen.init_cache(variables, make_config(num_layers=1), count_calls=True)
    out, _ = forward(model, few, tokens, [1, 1])
    assert np.isnan(out).all()
    groups = (paxcache.LayerGroup(num_layers=1, num_kv_heads=H, head_dim=D),) * 2
    config = paxcache.CacheConfig(groups=groups, num_pages=16, max_seqs=2, max_pages_per_seq=4)
    with pytest.raises(ValueError, match="one layer group"):
        paxcache.linen.init_cache(variables, config, count_calls=True)
    with pytest.raises(ValueError, match="head_dim=4"):
        paxcache.linen.init_cache(variables, make_config(head_dim=8), count_calls=True)


# Configs read from models.


class Windowed(nn.Module):
    """Three layers of its own: other widths for values, and a window in the second and third."""

    @nn.compact
    def __call__(self, x):
        q, k = nn.DenseGeneral((4, 8), name="q")(x), nn.DenseGeneral((2, 8), name="k")(x)
        v = nn.DenseGeneral((2, 6), name="v")(x)
        for layer in range(3):
            window = dict(sliding_window=3) if layer else {}
            x = Attend(name=f"layer_{layer}")(q, k, v, window)
        return x


class Attend(nn.Module):
    @nn.compact
    def __call__(self, q, k, v, window):
        return paxcache.linen.attend(self, q, k, v, **window)


def test_a_config_is_read_from_the_variables():
    sizes: dict[str, Any] = dict(page_size=S, num_pages=16, max_seqs=2, max_pages_per_seq=4)
    expected = make_config()
    config = paxcache.linen.cache_config(jax.eval_shape(lambda: init(Model())), **sizes)
    for name in ("num_layers", "num_kv_heads", "head_dim", "dtype", "page_bytes", "pool_bytes"):
        assert getattr(config, name) == getattr(expected, name), name
    x = jnp.ones((2, 1, F))
    variables = Windowed().init(jax.random.key(0), x)
    config = paxcache.linen.cache_config(variables, **sizes)
    groups = config.layer_groups
    assert [(g.num_layers, g.num_kv_heads, g.head_dim, g.v_head_dim, g.sliding_window) for g in groups] == [
        (1, 2, 8, 6, None),
        (2, 2, 8, 6, 3),
    ]
    variables = paxcache.linen.init_cache(variables, config)
    out, _ = forward(Windowed(), variables, x, [1, 1])
    assert out.shape == (2, 1, 4, 6)
    scanned = init(ScannedModel(num_layers=3))
    config = paxcache.linen.cache_config(scanned, scanned_in=("blocks",), **sizes)
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (3, H, D)
    paxcache.linen.init_cache(scanned, config, scanned_in=("blocks",))
    assert paxcache.linen.cache_config(init(Shared()), num_layers=4, **sizes).num_layers == 4
    given = CustomModel(dense=True).init(jax.random.key(0), jnp.ones((2, 3, F)), jnp.zeros((2, 3), jnp.int32))
    assert paxcache.linen.cache_config(given, **sizes).num_layers == 2


@pytest.mark.parametrize(
    ("variables", "arguments", "error", "match"),
    [
        (lambda: 3, {}, TypeError, "variables: expected a mapping"),
        (lambda: {"params": {}}, {}, ValueError, "no paged layer found"),
        (lambda: init(ScannedModel()), dict(scanned_in="blocks"), TypeError, "scanned_in: expected a tuple"),
        (lambda: init(Model()), dict(head_dim=4), TypeError, "head_dim is read from the model"),
        (lambda: init(Model()), dict(pages=4), TypeError, "pages is no argument of CacheConfig"),
    ],
)
def test_configs_that_cannot_be_read(variables, arguments, error, match):
    sizes = {"num_pages": 16, "max_seqs": 2, "max_pages_per_seq": 4, **arguments}
    with pytest.raises(error, match=match):
        paxcache.linen.cache_config(variables(), **sizes)


def test_lifted_layers_that_share_a_cache_fail():
    class Remat(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(V, F)(tokens)
            for _ in range(2):
                x = nn.remat(Block)()(x)
            return x

    with pytest.raises(ValueError, match=r"nn\.remat"):
        paxcache.linen.init_cache(init(Remat()), make_config())


# Modules of one's own.


class Custom(nn.Module):
    """Grouped heads and a scale of its own; `dense` goes through the dense interface."""

    layer: int
    dense: bool = False

    @nn.compact
    def __call__(self, x, positions):
        q = nn.DenseGeneral((4, D), name="q")(x)
        k, v = (nn.DenseGeneral((H, D), name=name)(x) for name in "kv")
        if self.dense:
            k, v = paxcache.linen.DenseCache(max_len=6).update(self.layer, k, v)
            k, v = (jnp.repeat(t, 2, axis=2) for t in (k, v))
            out = nn.dot_product_attention(q * 0.5, k, v, mask=jnp.arange(6) <= positions[:, None, :, None])
        else:
            out = paxcache.linen.attend(self, q, k, v, sm_scale=0.5 * D**-0.5)
        return nn.DenseGeneral(F, axis=(-2, -1), name="out")(out)


class CustomModel(nn.Module):
    dense: bool = False

    def setup(self):
        self.layers = [Custom(layer, self.dense) for layer in range(2)]

    def __call__(self, x, positions):
        for layer in self.layers:
            x = x + layer(x, positions)
        return x


def test_dense_adapter_equals_attention_over_pages():
    x = jax.random.normal(jax.random.key(2), (2, 3, F))
    outs = []
    for dense in (False, True):
        model = CustomModel(dense)
        variables = model.init(jax.random.key(0), x, jnp.zeros((2, 3), jnp.int32))
        variables = paxcache.linen.init_cache(variables, make_config())
        variables, step = paxcache.linen.extend(variables, jnp.array(LENGTHS), max_query_len=3)
        out, after = model.apply(variables, x, step.positions, mutable=["cache"])
        kv = paxcache.linen.get_cache(after)
        assert jax.tree.structure(after["cache"]) != jax.tree.structure(variables["cache"])  # the step ended
        outs.append((out, kv))
    for row, length in enumerate(LENGTHS):
        close(outs[0][0][row, :length], outs[1][0][row, :length])
    chex.assert_trees_all_close(outs[0][1], outs[1][1], rtol=2e-5, atol=2e-6)


def test_other_entries_of_the_cache_collection_are_kept():
    class Counter(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            count = self.variable("cache", "count", lambda: jnp.int32(0))
            if not self.is_initializing():
                count.value += 1
            return Model(name="model")(tokens)

    model = Counter()
    variables = paxcache.linen.init_cache(init(model), make_config())
    assert variables["cache"]["count"] == 0 and list(variables["cache"]["model"]) == ["paxcache"]
    _, variables = forward(model, variables, make_tokens(1), [1, 1])
    assert variables["cache"]["count"] == 1


def test_model_fn_runs_packed_steps():
    model, tokens, config = Model(), make_tokens(), make_config()
    variables = init(model)
    expected = causal(None, variables["params"], tokens)
    packed = jnp.concatenate([tokens[0, :3], tokens[1, :2]])
    with_cache = paxcache.linen.init_cache(variables, config)
    for given, new in ((variables, config), (with_cache, None)):
        fn, params = paxcache.linen.model_fn(model, given, new)
        assert list(params) == ["params"]
        cache, step = paxcache.extend(paxcache.init(config), jnp.array(LENGTHS), num_tokens=5)
        logits, cache = jax.jit(fn)(params, packed, cache, step, jnp.array([2, 4]))
        close(logits, jnp.stack([expected[0, 2], expected[1, 1]]))
        cache, step = paxcache.extend(cache, jnp.array([0, 1]), num_tokens=5)
        padded = jnp.array([tokens[1, 2], 0, 0, 0, 0])
        logits, cache = jax.jit(fn)(params, padded, cache, step, jnp.array([0, 0]))
        close(logits[0], expected[1, 2])
    with pytest.raises(ValueError, match="only with config"):
        paxcache.linen.model_fn(model, with_cache, masks_are_causal=True)


def test_generate_runs_the_model():
    model, config = Model(), make_config()
    prompts = [[1, 2, 3], [4], [5, 6]]
    fn, params = paxcache.linen.model_fn(model, init(model), config)
    result = paxcache.generate(fn, params, paxcache.init(config), prompts, max_new_tokens=3)
    for prompt, tokens in zip(prompts, result.to_lists(), strict=True):
        choices = jnp.argmax(causal(None, params["params"], jnp.array([prompt + tokens]))[0], -1)
        assert tokens == choices[len(prompt) - 1 : -1].tolist()


# Errors.


def test_a_pass_needs_a_step_of_its_own():
    model, tokens = Model(), make_tokens(1)
    variables = init(model)
    with pytest.raises(ValueError, match="no paged cache found"):
        model.apply(variables, tokens, mutable=["cache"])
    variables = paxcache.linen.init_cache(variables, make_config())
    with pytest.raises(ValueError, match="extend once before each forward pass"):
        model.apply(variables, tokens, mutable=["cache"])
    _, variables = forward(model, variables, tokens, [1, 1])
    with pytest.raises(ValueError, match="extend once before each forward pass"):
        model.apply(variables, tokens, mutable=["cache"])


def test_a_module_that_runs_twice():
    class Twice(nn.Module):
        def setup(self):
            self.block, self.other = Block(), Block()

        def __call__(self, x):
            return self.other(self.block(self.block(x)))

    x = jnp.ones((2, 1, F))
    variables = paxcache.linen.init_cache(Twice().init(jax.random.key(0), x), make_config())
    with pytest.raises(ValueError, match="took this step already"):
        forward(Twice(), variables, x, [1, 1])


@pytest.mark.parametrize(
    ("settings", "arguments", "match"),
    [
        ({}, dict(mask=jnp.ones((2, 1, 1, 1), bool)), "mask: expected None in decode"),
        ({}, dict(sow_weights=True), "sow_weights"),
        (dict(dropout_rate=0.1), dict(deterministic=False), "deterministic"),
        ({}, dict(inputs_v=jnp.ones((2, 1, F))), "inputs_k"),
        ({}, dict(inputs_k=jnp.ones((2, 2, F))), "leading axes"),
    ],
)
def test_arguments_that_cannot_be_honoured(settings, arguments, match):
    layer, x = Paged(num_heads=H, decode=True, **settings), jnp.ones((2, 1, F))
    variables = layer.init(jax.random.key(0), x, deterministic=True)
    variables = paxcache.linen.init_cache(variables, make_config(num_layers=1))
    with pytest.raises(ValueError, match=match):
        forward(layer, variables, x, [1, 1], **arguments)


@pytest.mark.parametrize(
    "settings",
    [dict(attention_fn=lambda q, k, v: v), dict(qk_attn_weights_einsum_cls=lambda: jnp.einsum)],
    ids=["attention_fn", "einsum"],
)
def test_settings_that_cannot_be_honoured(settings):
    layer = Paged(num_heads=H, decode=True, **settings)
    with pytest.raises(ValueError, match=next(iter(settings))):
        layer.init(jax.random.key(0), jnp.ones((2, 1, F)))


def test_declared_causal_masks_are_dropped():
    model, tokens = Model(), make_tokens(3)
    variables = paxcache.linen.init_cache(init(model), make_config(), masks_are_causal=True)
    out, _ = forward(model, variables, tokens, [3, 3], mask=nn.make_causal_mask(tokens))
    close(out, causal(None, variables["params"], tokens))


def test_the_cache_must_be_mutable():
    model = Model()
    variables = paxcache.linen.init_cache(init(model), make_config())
    variables, _ = paxcache.linen.extend(variables, jnp.array([1, 1]), max_query_len=1)
    with pytest.raises(Exception, match='collection "cache" is immutable'):
        model.apply(variables, make_tokens(1))


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        (dict(num_layers=3), {}, "the cache has 3 layers, but 2 paged layers were found"),
        (dict(num_kv_heads=1), {}, "MultiHeadDotProductAttention_0 has num_kv_heads=2"),
        (dict(head_dim=8), {}, "head_dim=4"),
        (dict(v_head_dim=2), {}, "v_head_dim=2"),
        ({}, dict(scanned_in=()), "2 layers elsewhere"),
    ],
)
def test_caches_that_do_not_fit(config, options, match):
    with pytest.raises(ValueError, match=match):
        paxcache.linen.init_cache(init(Model()), make_config(**config), **options)


def test_wrong_types():
    variables = init(Model())
    with pytest.raises(TypeError, match="CacheConfig or a PagedKVCache"):
        paxcache.linen.init_cache(variables, 7)  # pyright: ignore[reportArgumentType]
    wrong: Any = 7
    with pytest.raises(TypeError, match="variables: expected a mapping"):
        paxcache.linen.init_cache(wrong, make_config())
    with pytest.raises(TypeError, match="variables: expected a mapping"):
        paxcache.linen.get_cache(wrong)
    with pytest.raises(TypeError, match="model: expected a Module"):
        paxcache.linen.model_fn(wrong, variables, make_config())
    with pytest.raises(TypeError, match="config: expected a CacheConfig"):
        paxcache.linen.model_fn(Model(), variables, wrong)
    with pytest.raises(TypeError, match="call: expected a function"):
        paxcache.linen.model_fn(Model(), variables, make_config(), call=wrong)
    with pytest.raises(TypeError, match="cache: expected a PagedKVCache"):
        paxcache.linen.replace_cache(paxcache.linen.init_cache(variables, make_config()), wrong)
    with pytest.raises(TypeError, match="module: expected a Module"):
        paxcache.linen.attend(wrong, *jnp.ones((3, 2, 1, H, D)))
    for call in (paxcache.linen.get_cache, lambda v: paxcache.linen.extend(v, jnp.ones(2), max_query_len=1)):
        with pytest.raises(ValueError, match="expected a paged cache"):
            call(variables)
