"""Quantised pages: the formats against NumPy, the ops against the oracle on what is stored, caches as a whole."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import catalogue
import oracle
import paxcache
from paxcache import offload, ops, prefix, sharding

FORMATS = ("fp8_e4m3", "fp8_e5m2", "int8", "int4")
SCALES = ("per_token_head", "per_tensor")
LARGEST = {"fp8_e4m3": 448.0, "fp8_e5m2": 57344.0, "int8": 127.0, "int4": 7.0}
DTYPE = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "int8": np.int8,
    "int4": np.uint8,
}
POISON = {"fp8_e4m3": np.nan, "fp8_e5m2": np.inf, "int8": -128, "int4": 0x88}

each_format = pytest.mark.parametrize("form", FORMATS)
PAIRS = (
    ("fp8_e4m3", "per_tensor"),
    ("fp8_e5m2", "per_tensor"),
    ("int8", "per_token_head"),
    ("int4", "per_token_head"),
)
each_kind = pytest.mark.parametrize("scales", SCALES)


# What is stored, by NumPy.


def stored(x: np.ndarray, scale: Any, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Values as they should lie in the pool, and the numbers that they stand for, without the scale."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        inverse = np.float32(1) / np.where(scale > 0, scale, 1).astype(np.float32)
        ratio = np.where((scale[..., None] > 0) | np.isnan(x), x * inverse[..., None], 0)
    ratio = np.clip(ratio.astype(np.float32), -LARGEST[form], LARGEST[form])
    if form.startswith("fp8"):
        values = ratio.astype(DTYPE[form])
        return values, values.astype(np.float32)
    numbers = np.rint(np.nan_to_num(ratio, nan=0)).astype(np.int32)
    if form == "int8":
        return numbers.astype(np.int8), numbers.astype(np.float32)
    half = numbers.shape[-1] // 2
    packed = (numbers[..., :half] % 16) + 16 * (numbers[..., half:] % 16)
    return packed.astype(np.uint8), numbers.astype(np.float32)


def scale_of(x: np.ndarray, form: str) -> np.ndarray:
    finite = np.where(np.isfinite(x), np.abs(x), 0).astype(np.float32)
    return finite.max(axis=-1) * np.float32(1 / LARGEST[form])


def raw(x: Any) -> np.ndarray:
    """The bytes, so that NaN equals NaN."""
    return np.asarray(x).view(np.uint8)


def empty_pool(form: str, shape: tuple[int, ...], *, per_tensor: float | None = None) -> ops.QuantizedPages:
    *lead, K, S, D = shape
    values = jnp.zeros((*lead, K, S, D // 2 if form == "int4" else D), DTYPE[form])
    if per_tensor is None:
        return ops.QuantizedPages(values, jnp.zeros((*lead, K, S), jnp.float32))
    return ops.QuantizedPages(values, jnp.full((*lead, 1, 1), per_tensor, jnp.float32))


# Formats.


@each_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_written_values_are_those_of_numpy(form, dtype):
    """Every token and head gets its own scale; values are rounded to nearest, ties to even."""
    rng = np.random.default_rng(0)
    k = (rng.standard_normal((24, 2, 16)) * rng.lognormal(0, 2, (24, 2, 1))).astype(jnp.dtype(dtype))
    pool, _ = ops.write_pages(empty_pool(form, (6, 2, 4, 16)), None, jnp.asarray(k), None, jnp.arange(24))
    x = k.astype(np.float32)
    values, _ = stored(x, scale_of(x, form), form)
    by_slot = lambda leaf: np.moveaxis(np.asarray(leaf), 1, 2).reshape(24, 2, *leaf.shape[3:])  # noqa: E731
    np.testing.assert_array_equal(by_slot(pool.scales), scale_of(x, form))
    np.testing.assert_array_equal(raw(by_slot(pool.values)), raw(values))


@each_format
def test_given_scales_are_kept_and_saturate(form):
    pool = empty_pool(form, (2, 1, 4, 8), per_tensor=0.5)
    x = np.array([0.25, -1.0, 1e30, -1e30, np.inf, -np.inf, 3.3, 0.0], np.float32)
    pool, _ = ops.write_pages(pool, None, jnp.asarray(x)[None, None], None, jnp.array([5]))
    values, numbers = stored(x, np.float32(0.5), form)
    np.testing.assert_array_equal(raw(pool.values[1, 0, 1]), raw(values))
    assert numbers[2] == numbers[4] == LARGEST[form] and numbers[3] == numbers[5] == -LARGEST[form]
    np.testing.assert_array_equal(pool.scales, np.full((2, 1, 1), 0.5))


@each_format
def test_nan_infinity_and_zero(form):
    """NaN stays NaN where there is one and is 0 elsewhere; neither it nor infinity decides a scale."""
    rows = np.array(
        [[1, np.nan, -2, np.inf], [0, 0, np.inf, np.nan], [0, 0, 0, 0], [1e-42, 0, 0, 0]], np.float32
    )
    pool, _ = ops.write_pages(
        empty_pool(form, (1, 1, 4, 4)), None, jnp.asarray(rows)[:, None], None, jnp.arange(4)
    )
    scales = np.asarray(pool.scales)[0, 0]
    np.testing.assert_array_equal(scales[:3], [np.float32(2) * np.float32(1 / LARGEST[form]), 0, 0])
    cache = dataclasses.replace(
        paxcache.init(cache_config(form, head_dim=4, v_head_dim=0)), seq_lens=jnp.array([4])
    )
    group = dataclasses.replace(
        cache.groups[0],
        pages=dataclasses.replace(cache.groups[0].pages, k=jax.tree.map(lambda leaf: leaf[None], pool)),
        block_tables=jnp.zeros_like(cache.groups[0].block_tables),
    )
    k, _ = paxcache.gather_dense(dataclasses.replace(cache, groups=(group,)), 0, 4)
    k = np.asarray(k)[0, :, 0]
    nan = np.nan if form.startswith("fp8") else 0.0
    np.testing.assert_allclose(k[0, 1:], [nan, -2, 2], rtol=1e-6)
    np.testing.assert_array_equal(k[1], [0, 0, 0, nan])
    np.testing.assert_array_equal(k[2], 0)
    assert np.isfinite(k[3]).all()


def cache_config(form: Any, *, scales: Any = "per_token_head", **sizes: Any) -> paxcache.CacheConfig:
    sizes = {
        "num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "page_size": 4, "num_pages": 1, "max_seqs": 1,
        "max_pages_per_seq": 1, "dtype": jnp.float32,
    } | sizes  # fmt: skip
    return paxcache.CacheConfig(quantization=form, scales=scales, **sizes)


# Attention, against the oracle on the numbers that are stored. What is not stored is poison, its scale too.

EACH = ("decode_mixed_lengths", "ragged_everything", "keys_serve_as_values")
ONCE = (
    "decode_holes", "decode_soft_cap", "decode_sinks", "ragged", "ragged_window_3_traced", "layer_of_a_pool",
    "values_narrower", "kernel_ragged_everything",
)  # fmt: skip
CASES = [(form, scales, name) for form in FORMATS for scales in SCALES for name in EACH]
CASES += [("fp8_e4m3", "per_tensor", name) for name in ONCE] + [
    ("int4", "per_token_head", name) for name in ONCE
]
BY_NAME = {case.name: case for case in catalogue.ATTENTION}
STATIC = ("layer", "sm_scale", "soft_cap", "causal", "implementation", "return_lse")


def quantized_problem(name: str, form: str, scales: str) -> Any:
    """A case of the catalogue on quantised pools: arguments, and the oracle's answer on what they stand for."""
    case = BY_NAME[name]
    if case.v_head_dim == 5 and form == "int4":
        case = dataclasses.replace(case, v_head_dim=6)
    problem = catalogue.build(dataclasses.replace(case, layer=None), "float32")
    arrays = dict(problem.arrays)
    pools, numbers = {}, {}
    for which in ("k_pages", "v_pages"):
        x = arrays.pop(which)
        if x is None:
            pools[which] = numbers[which] = None
            continue
        written = np.isfinite(x).all(axis=-1)
        scale = scale_of(x, form)
        if scales == "per_tensor":
            scale = np.full(x.shape[:3], scale[written].max(), np.float32)
        values, stands_for = stored(np.where(written[..., None], x, 0), scale, form)
        values = np.where(written[..., None], values, np.array(POISON[form]).astype(values.dtype))
        numbers[which] = np.where(written[..., None], stands_for * scale[..., None], np.nan)
        kept = scale[:, :1, :1] if scales == "per_tensor" else np.where(written, scale, np.nan)
        pools[which] = ops.QuantizedPages(jnp.asarray(values), jnp.asarray(kept))
        if case.layer is not None:
            pools[which] = jax.tree.map(lambda p: jnp.stack([p, p, p]).at[:2].multiply(0), pools[which])
    lens = case.query_lens
    starts = None if lens is None else case.starts or (0, *np.cumsum(lens)[:-1])
    out, lse = oracle.paged_attention(
        arrays["q"], numbers["k_pages"], numbers["v_pages"], arrays["block_tables"], arrays["seq_lens"],
        query_starts=starts, query_lens=lens, sm_scale=case.sm_scale, soft_cap=case.soft_cap,
        sliding_window=case.sliding_window, sinks=arrays.get("sinks"), causal=case.causal,
    )  # fmt: skip
    static = problem.static | {"layer": None if case.layer is None else 2}
    return {name: jnp.asarray(x) for name, x in arrays.items()} | pools, static, out, lse


@pytest.mark.parametrize(("form", "scales", "name"), CASES)
def test_attention_reads_what_is_stored(form, scales, name):
    arrays, static, out, lse = quantized_problem(name, form, scales)
    found, found_lse = _attention(tuple(sorted(static.items())))(**arrays)
    np.testing.assert_allclose(found, out, 1e-5, 1e-5)
    np.testing.assert_allclose(found_lse, lse, 1e-4, 1e-4)


@functools.cache
def _attention(static):
    return jax.jit(
        functools.partial(ops.paged_attention, **dict(static), return_lse=True, implementation="xla")
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@each_format
def test_queries_of_half_precision_read_exact_values(form, dtype):
    """Each stored number is exact in half precision: no error but that of products and weights in this dtype."""
    arrays, static, out, _ = quantized_problem("ragged", form, "per_token_head")
    arrays["q"] = arrays["q"].astype(dtype)
    found, _ = _attention(tuple(sorted(static.items())))(**arrays)
    assert found.dtype == dtype
    tolerance = 4 * catalogue.TOLERANCE[dtype]  # the queries are rounded too, and scores are up to 4
    np.testing.assert_allclose(found.astype(jnp.float32), out, tolerance, tolerance)


# Caches.


def filled(config, *, k_scales: Any = None, v_scales: Any = None) -> Any:
    """Rows of 13, 4, 0 and 9 tokens of normal numbers in every layer, and what was appended."""
    cache = paxcache.init(config, k_scales=k_scales, v_scales=v_scales)
    lens = jnp.array([13, 4, 0, 9])
    cache, step = paxcache.extend(cache, lens, num_tokens=26)
    rng, given, layer = np.random.default_rng(0), [], 0
    for group in config.layer_groups:
        for _ in range(group.num_layers):
            lead = (26, group.num_kv_heads)
            k = jnp.asarray(rng.standard_normal((*lead, group.head_dim)), jnp.float32)
            v = None
            if group.value_dim:
                v = jnp.asarray(rng.standard_normal((*lead, group.value_dim)), jnp.float32)
            cache = paxcache.append(cache, layer, k, v, step)
            given.append((k, v))
            layer += 1
    return cache, step, given


def whole_config(form: Any, scales: Any = "per_token_head", **changes: Any) -> paxcache.CacheConfig:
    sizes = {
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "num_pages": 24,
        "max_seqs": 4,
        "max_pages_per_seq": 6,
    }
    return cache_config(form, scales=scales, **(sizes | changes))


def given_scales(config, form) -> Any:
    """For normal numbers."""
    total = sum(g.num_layers for g in config.layer_groups)
    return {"k_scales": jnp.full(total, 4 / LARGEST[form]), "v_scales": jnp.full(total, 3 / LARGEST[form])}


@each_kind
@each_format
def test_bytes_are_those_of_the_arrays(form, scales):
    config = whole_config(form, scales)
    given = given_scales(config, form) if scales == "per_tensor" else {}
    cache = paxcache.init(config, **given)
    taken = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.groups[0].pages))
    assert config.pool_bytes == taken == config.page_bytes * config.num_pages
    stats = paxcache.stats(cache)
    assert stats.pool_bytes == taken and stats.page_bytes == (config.page_bytes,)
    fitted = paxcache.CacheConfig.fit(
        memory_bytes=taken, quantization=form, scales=scales, num_layers=2, num_kv_heads=2, head_dim=16, page_size=4,
        max_seqs=4, max_pages_per_seq=6,
    )  # fmt: skip
    assert fitted.num_pages == 24


def test_a_quantised_page_takes_about_half():
    layers = functools.partial(paxcache.LayerGroup, num_layers=32, num_kv_heads=8, head_dim=128)
    exact = layers().page_bytes(16)
    shares = {form: layers(quantization=form).page_bytes(16) / exact for form in FORMATS}
    assert shares == {"fp8_e4m3": 33 / 64, "fp8_e5m2": 33 / 64, "int8": 33 / 64, "int4": 17 / 64}


@pytest.mark.parametrize(("form", "scales"), PAIRS)
def test_gather_dense_gives_the_numbers_that_are_stored(form, scales):
    config = whole_config(form, scales)
    given = given_scales(config, form) if scales == "per_tensor" else {}
    cache, step, appended = filled(config, **given)
    for layer, pair in enumerate(appended):
        for which, dense, new in zip("kv", paxcache.gather_dense(cache, layer, 13), pair, strict=True):
            x = np.asarray(new)
            scale = scale_of(x, form) if not given else np.full(x.shape[:2], given[f"{which}_scales"][layer])
            wanted = stored(x, scale, form)[1] * scale[..., None]
            rows, positions = np.asarray(step.rows), np.asarray(step.positions)
            np.testing.assert_allclose(np.asarray(dense)[rows, positions], wanted, 1e-6)
            assert not np.asarray(dense)[1, 4:].any()


@each_format
def test_forks_share_and_part_with_their_scales(form):
    """Copy-on-write copies scales with the values; what a child writes changes nothing for its parent."""
    cache, _, _ = filled(whole_config(form))
    before = paxcache.gather_dense(cache, 1, 16)
    cache, ok = paxcache.fork(cache, jnp.array([0]), jnp.array([2]))
    assert ok.all()
    cache, step = paxcache.extend(cache, jnp.array([0, 0, 2, 0]), num_tokens=2)
    assert step.ok.all()
    for layer in range(2):
        cache = paxcache.append(cache, layer, jnp.full((2, 2, 16), 100.0), jnp.full((2, 2, 16), 50.0), step)
    paxcache.check(cache)
    for old, new, value in zip(before, paxcache.gather_dense(cache, 1, 16), (100.0, 50.0), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[0], np.asarray(old)[0])
        np.testing.assert_array_equal(np.asarray(new)[2, :13], np.asarray(old)[0, :13])
        np.testing.assert_allclose(np.asarray(new)[2, 13:15], value, rtol=1e-6)


MIXED = (
    paxcache.LayerGroup(num_layers=1, num_kv_heads=2, head_dim=16, dtype=jnp.float32),
    paxcache.LayerGroup(num_layers=2, num_kv_heads=2, head_dim=16, quantization="int8"),
    paxcache.LayerGroup(
        num_layers=1, num_kv_heads=1, head_dim=8, v_head_dim=0, quantization="fp8_e4m3", scales="per_tensor"
    ),
)


def test_some_layers_stay_exact():
    """The first layer exact, two in int8, one latent in fp8 with a given scale; each attends to what it stores."""
    config = paxcache.CacheConfig(groups=MIXED, page_size=4, num_pages=24, max_seqs=4, max_pages_per_seq=6)
    cache, step, appended = filled(config, k_scales=jnp.array([9, 9, 9, 0.01]))
    np.testing.assert_array_equal(paxcache.gather_dense(cache, 0, 13)[0][0], appended[0][0][:13])
    rng = np.random.default_rng(1)
    for layer, (heads, width) in enumerate([(4, 16)] * 3 + [(2, 8)]):
        q = jnp.asarray(rng.standard_normal((26, heads, width)), jnp.float32)
        out = paxcache.attend(cache, layer, q, step)
        k, v = paxcache.gather_dense(cache, layer, 24)
        exact = paxcache.CacheConfig(
            num_layers=1, num_kv_heads=k.shape[2], head_dim=width, v_head_dim=None if v is not None else 0, page_size=4,
            num_pages=24, max_seqs=4, max_pages_per_seq=6, dtype=jnp.float32,
        )  # fmt: skip
        plain, plain_step = paxcache.extend(paxcache.init(exact), step.query_lens, num_tokens=26)
        k, v = (None if x is None else x[step.rows, step.positions] for x in (k, v))
        assert k is not None
        plain = paxcache.append(plain, 0, k, v, plain_step)
        np.testing.assert_allclose(out, paxcache.attend(plain, 0, q, plain_step), 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("form", "limit"), [("fp8_e4m3", 0.04), ("fp8_e5m2", 0.08), ("int8", 0.01), ("int4", 0.18)]
)
def test_error_of_the_output_on_normal_numbers(form, limit):
    """‖out − exact‖ / ‖exact‖ of decoding over 500 tokens of normal keys and values, head dim 128."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, h, 128)).astype(np.float32) for n, h in ((8, 8), (4000, 2), (4000, 2)))
    tables = jnp.arange(8 * 32).reshape(8, 32)
    slots = (np.arange(8)[:, None] * 32 * 16 + np.arange(500)).reshape(-1)
    outs: Any = []
    write: Any = ops.write_pages
    attend: Any = ops.paged_attention
    for pools in ((jnp.zeros((256, 2, 16, 128)),) * 2, (empty_pool(form, (256, 2, 16, 128)),) * 2):
        written = write(*pools, jnp.asarray(k), jnp.asarray(v), slots)
        outs.append(attend(jnp.asarray(q), *written, tables, jnp.full(8, 500)))
    error = float(jnp.linalg.norm(outs[1] - outs[0]) / jnp.linalg.norm(outs[0]))
    assert limit / 2 < error < limit


@each_kind
def test_a_step_is_in_place_and_holds_no_dequantised_pool(scales):
    config = whole_config("int8", scales, num_pages=4096, num_kv_heads=8, head_dim=128)
    given = given_scales(config, "int8") if scales == "per_tensor" else {}
    cache = jax.eval_shape(lambda: paxcache.init(config, **given))

    def decode(cache, q, k):
        cache, step = paxcache.extend(cache, jnp.ones(4, jnp.int32), max_query_len=1)
        for layer in range(2):
            cache = paxcache.append(cache, layer, k, k, step)
            q = q + paxcache.attend(cache, layer, q, step)
            k = k + q[:, :, :8]
        return cache, q

    new = [jax.ShapeDtypeStruct((4, 1, heads, 128), jnp.float32) for heads in (16, 8)]
    compiled = jax.jit(decode, donate_argnums=0).lower(cache, *new).compile()
    memory: Any = compiled.memory_analysis()
    leaf = cache.groups[0].pages.k.values
    assert memory.temp_size_in_bytes < leaf.size // 8
    assert memory.alias_size_in_bytes >= 2 * leaf.size


# Pages that move.


@pytest.mark.parametrize(("form", "scales"), PAIRS)
def test_preempted_rows_come_back_with_their_scales(form, scales):
    config = whole_config(form, scales)
    given = given_scales(config, form) if scales == "per_tensor" else {}
    cache, _, _ = filled(config, **given)
    before = [jax.tree.map(np.asarray, paxcache.gather_dense(cache, layer, 13)) for layer in range(2)]
    cache, host, ticket = offload.preempt(cache, offload.init(config, 24), jnp.array([0, 3]))
    assert ticket.ok
    cache, step = paxcache.extend(
        cache, jnp.array([0, 0, 20, 0]), num_tokens=20
    )  # others write over the freed pages
    for layer in range(2):
        cache = paxcache.append(cache, layer, jnp.ones((20, 2, 16)), jnp.ones((20, 2, 16)), step)
    cache, _, ok = offload.resume(cache, host, ticket, jnp.array([3, 0]))
    assert ok
    paxcache.check(cache)
    for layer in range(2):
        for old, new in zip(before[layer], paxcache.gather_dense(cache, layer, 13), strict=True):
            np.testing.assert_array_equal(np.asarray(new)[[3, 0]], old[[0, 3]])


@each_kind
def test_prefixes_come_back_from_the_host_with_their_scales(scales):
    config = whole_config("int8", scales)
    given = given_scales(config, "int8") if scales == "per_tensor" else {}
    cache, _, _ = filled(config, **given)
    before = [np.asarray(x)[0] for x in paxcache.gather_dense(cache, 1, 12)]
    tier = offload.init_tier(config, 24)
    cache, index = prefix.publish(cache, prefix.init(config), 0, range(13))
    cache = paxcache.release(cache, jnp.ones(4, bool))
    cache, index, tier, freed = offload.evict(cache, index, tier, 3)
    assert freed == 3
    cache, step = paxcache.extend(
        cache, jnp.array([0, 20, 20, 20]), num_tokens=60
    )  # others write over the freed pages
    cache = paxcache.append(cache, 1, jnp.ones((60, 2, 16)), jnp.ones((60, 2, 16)), step)
    cache, index, tier, fetched = offload.prefetch(cache, index, tier, range(13))
    cache, index, reused = prefix.admit(cache, index, 0, range(13))
    assert (fetched, reused) == (3, 12)
    for old, new in zip(before, paxcache.gather_dense(cache, 1, 12), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[0], old)


@each_kind
def test_pools_of_another_size_keep_scales(scales):
    """A page that is new in a grown pool has its layer's scale, if that was given."""
    config = whole_config("int8", scales, num_pages=9)
    given = given_scales(config, "int8") if scales == "per_tensor" else {}
    cache, _, _ = filled(config, **given)
    before = [np.asarray(x) for x in paxcache.gather_dense(cache, 1, 13)]
    cache = offload.resize(cache, 24)
    cache, step = paxcache.extend(cache, jnp.array([0, 0, 20, 0]), num_tokens=20)
    assert step.ok.all()
    x = jnp.asarray(np.random.default_rng(5).standard_normal((20, 2, 16)), jnp.float32)
    cache = paxcache.append(cache, 1, x, x, step)
    k, v = paxcache.gather_dense(cache, 1, 20)
    for old, new in zip(before, (k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[[0, 1, 3], :13], old[[0, 1, 3]])
    np.testing.assert_allclose(k[2], x, atol=0.04)


@each_kind
def test_heads_over_two_devices(scales, cpu_devices):
    config = whole_config("int8", scales)
    given = given_scales(config, "int8") if scales == "per_tensor" else {}
    cache = paxcache.init(config, **given)
    mesh = jax.make_mesh((2,), ("heads",), devices=cpu_devices, axis_types=(jax.sharding.AxisType.Auto,))
    specs = sharding.partition_specs(cache, "heads")
    by_heads = jax.sharding.PartitionSpec(None, "heads")
    k, q = (jnp.asarray(np.random.default_rng(n).standard_normal((26, n, 16)), jnp.float32) for n in (2, 4))

    def run(cache, q, k):
        cache, step = paxcache.extend(cache, jnp.array([13, 4, 0, 9]), num_tokens=26)
        cache = paxcache.append(cache, 1, k, k, step)
        return cache, paxcache.attend(cache, 1, q, step)

    split = jax.shard_map(
        run, mesh=mesh, in_specs=(specs, by_heads, by_heads), out_specs=(specs, by_heads), check_vma=False
    )
    (whole, out), (parts, out_parts) = jax.jit(run)(cache, q, k), jax.jit(split)(cache, q, k)
    np.testing.assert_allclose(out_parts, out, 1e-6, 1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(raw(a), raw(b))


# What is wrong is named.

GROUP: dict[str, Any] = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8}
BAD_GROUPS = {
    "quantization must be None or one of fp8_e4m3, fp8_e5m2, int8, int4, got 'fp4'": {"quantization": "fp4"},
    "head_dim must be even for int4, got 5": {"quantization": "int4", "head_dim": 5},
    "v_head_dim must be even for int4, got 3": {"quantization": "int4", "v_head_dim": 3},
    "scales must be 'per_token_head' or 'per_tensor', got 'per_page'": {
        "quantization": "int8",
        "scales": "per_page",
    },
    "scales='per_tensor' needs a quantization, got None": {"scales": "per_tensor"},
}


@pytest.mark.parametrize("message", BAD_GROUPS)
def test_bad_groups_are_named(message):
    with pytest.raises(ValueError, match=message):
        paxcache.LayerGroup(**(GROUP | BAD_GROUPS[message]))


def test_bad_scales_are_named():
    config = whole_config("int8", "per_tensor")
    two = jnp.ones(2)
    with pytest.raises(
        ValueError, match=r"k_scales: expected f32\[2\] for groups with scales='per_tensor', got None"
    ):
        paxcache.init(config)
    with pytest.raises(ValueError, match=r"v_scales: expected f32\[2\] .*, got None"):
        paxcache.init(config, k_scales=two)
    with pytest.raises(ValueError, match=r"k_scales: expected shape \[L=2\], got float32\[3\]"):
        paxcache.init(config, k_scales=jnp.ones(3), v_scales=two)
    with pytest.raises(ValueError, match=r"v_scales: expected scales above 0, got \[1.0, 0.0\]"):
        paxcache.init(config, k_scales=two, v_scales=jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="k_scales: expected None, no group has scales='per_tensor'"):
        paxcache.init(whole_config("int8"), k_scales=two)


def test_bad_pools_are_named():
    good = empty_pool("int8", (4, 2, 4, 8))
    q, tables, lens = jnp.ones((1, 2, 8)), jnp.zeros((1, 2), jnp.int32), jnp.array([3])
    attend = lambda k, v: ops.paged_attention(q, k, v, tables, lens)  # noqa: E731
    with pytest.raises(TypeError, match="v_pages: expected QuantizedPages like k_pages, got"):
        attend(good, jnp.zeros((4, 2, 4, 8)))
    with pytest.raises(
        ValueError, match=r"k_pages: expected scales float32\[1,4,2,4\] or float32\[1,4,1,1\]"
    ):
        attend(dataclasses.replace(good, scales=jnp.ones((4, 2))[..., None]), good)
    with pytest.raises(
        TypeError, match=r"k_pages: expected quantised values of float8_e4m3fn, .*, got int32"
    ):
        attend(dataclasses.replace(good, values=good.values.astype(jnp.int32)), good)
    with pytest.raises(TypeError, match="v_pages: expected the dtype of k_pages, int8, got uint8"):
        attend(good, empty_pool("int4", (4, 2, 4, 8)))
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu needs a Hopper GPU|head_dim must be"):
        ops.paged_attention(q, good, good, tables, lens, implementation="mosaic_gpu")
