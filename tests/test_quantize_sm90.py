"""The quantising write for Hopper: interpreted with the race detector, compiled for an H200, run on a GPU.

What is expected is the xla form's, which `test_quantize` checks against NumPy.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.sharding import PartitionSpec

import aot
from paxcache._quantize import FORMATS, QuantizedPages
from paxcache.kernels import xla
from paxcache.kernels._request import Pools
from paxcache.kernels.sm90 import _mosaic, quantize

L, P, S = 2, 5, 8
RACES = _mosaic.interpreter(detect_races=True)
KINDS = ("per_token_head", "per_tensor")


def _write_pages(
    k_pages: Any, v_pages: Any, k: Any, v: Any, slots: Any, layer: Any, **options: Any
) -> tuple[Any, Any]:
    return quantize.write_pages(Pools(k_pages, v_pages, layer), k, v, slots, **options)


write_pages: Any = _write_pages


@jax.jit
def _expect(k_pages: Any, v_pages: Any, k: Any, v: Any, slots: Any, layer: Any) -> tuple[Any, Any]:
    return xla.write_pages(Pools(k_pages, v_pages, layer), k, v, slots)


expect: Any = _expect


@pytest.fixture
def no_races():
    """Fails a test whose (last) kernel had a race."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    yield
    assert not gpu_callbacks.get_races().races_found


def draw_pool(rng, form, K, D, *, kind, num_pages, page_size):
    """Any bits but NaN; one of the given scales is 0."""
    form = FORMATS[form]
    values = rng.integers(0, 100, (L, num_pages, K, page_size, D // form.per_element), np.uint8)
    shape = (1, 1) if kind == "per_tensor" else (K, page_size)
    scales = rng.lognormal(-3, 2, (L, num_pages, *shape))
    if kind == "per_tensor":
        scales[:, -1] = 0
    return QuantizedPages(jnp.asarray(values).view(form.dtype), jnp.asarray(scales, jnp.float32))


def draw_tokens(rng, shape, dtype):
    """Rows of all sizes. Of every seven, one is 0, one too small for a scale, and one has infinities and NaN."""
    x = rng.standard_normal(shape) * rng.lognormal(0, 3, (*shape[:2], 1))
    x[1::7] = 0
    x[2::7] *= 1e-44
    x[3::7, :, 1::5], x[3::7, :, 2::5], x[3::7, :, 3::5] = np.inf, -np.inf, np.nan
    with np.errstate(over="ignore"):
        return jnp.asarray(x.astype(np.float32)).astype(dtype)


def draw_slots(rng, num_tokens, num_slots):
    """Unique slots, every fourth token out of the pool: before it, at its end, far past it."""
    slots = rng.permutation(num_slots)[:num_tokens]
    outside = np.resize([-1, num_slots, -(2**31), 2**31 - 1], num_tokens)
    return jnp.asarray(np.where(np.arange(num_tokens) % 4 == 3, outside, slots), jnp.int32)


def case(
    seed=0,
    *,
    form="int8",
    kind="per_token_head",
    K=2,
    D=16,
    Dv=None,
    dtype=jnp.bfloat16,
    page_size=S,
    num_tokens=9,
    num_pages=P,
):
    """Pools, tokens and slots."""
    rng = np.random.default_rng(seed)
    sizes: Any = dict(kind=kind, num_pages=num_pages, page_size=page_size)
    pools = [draw_pool(rng, form, K, d, **sizes) for d in (D, Dv or D)]
    tokens = [draw_tokens(rng, (num_tokens, K, d), dtype) for d in (D, Dv or D)]
    return pools, tokens, draw_slots(rng, num_tokens, num_pages * page_size)


def assert_same(actual, expected):
    """Equal bits in every leaf; NaN has several in float8, and the compilers differ in which they make."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        a, b = np.asarray(x), np.asarray(y)
        bits = np.dtype(f"u{a.itemsize}")
        same = a.view(bits) == b.view(bits)
        if a.dtype.name.startswith("float8"):
            same |= np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32))
        assert same.all(), f"{(~same).sum()} of {same.size} {a.dtype} differ"


def check(pools, tokens, slots, layer=1, **options):
    actual = jax.jit(functools.partial(write_pages, **options))(*pools, *tokens, slots, layer)
    assert_same(actual, expect(*pools, *tokens, slots, jnp.int32(layer)))


FORMATS_AND_KINDS = [(form, kind) for form in FORMATS for kind in KINDS]


@pytest.mark.parametrize(
    ("form", "kind", "dtype"),
    [(*case, quantize.TOKEN_DTYPES[i % 3]) for i, case in enumerate(FORMATS_AND_KINDS)],
)
def test_formats_match_xla_without_races(form, kind, dtype, no_races):
    check(*case(form=form, kind=kind, dtype=jnp.dtype(dtype)), interpret=RACES)


CASES = {
    "one_head": dict(K=1, D=128),
    "odd_heads": dict(K=5, D=64),
    "groups_of_heads": dict(K=12, D=64, num_tokens=3),
    "many_heads": dict(K=72, D=8, num_tokens=2),
    "96": dict(K=3, D=96),
    "192_in_bytes_of_two": dict(form="int4", D=192),
    "256": dict(D=256, dtype=jnp.float32),
    "values_of_other_width": dict(D=64, Dv=48, form="fp8_e4m3"),
    "rows_of_no_power_of_two": dict(D=20, Dv=6),
    "page_of_three": dict(page_size=3),
    "page_of_128": dict(page_size=128, num_pages=2),
    "scale_a_page": dict(page_size=1, K=1, num_pages=11),
    "one_token": dict(num_tokens=1),
    "three_blocks": dict(num_tokens=9, config=quantize.Config(block_tokens=4)),
    "block_of_three": dict(num_tokens=7, config=quantize.Config(block_tokens=3)),
    "one_block": dict(num_tokens=6, config=quantize.Config(block_tokens=6)),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes_match_xla_without_races(name, no_races):
    options = dict(CASES[name])
    config = options.pop("config", None)
    check(*case(**options), config=config, interpret=RACES)


def test_latent_attention_has_no_v(no_races):
    pools, tokens, slots = case(K=1, D=64)
    pages, none = write_pages(pools[0], None, tokens[0], None, slots, 0, interpret=RACES)
    assert none is None
    assert_same(pages, expect(pools[0], None, tokens[0], None, slots, jnp.int32(0))[0])


def test_int64_slots(no_races):
    with jax.enable_x64(True):
        pools, tokens, slots = case(kind="per_tensor")
        # Two slots that are in the pool once cut to 32 bits.
        slots = slots.astype(jnp.int64).at[0].set(2**32 + 1).at[1].set(-(2**32) + 2)
        check(pools, tokens, slots, interpret=RACES)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float8_e5m2])
def test_other_tokens_are_converted(dtype):
    with jax.enable_x64(True):
        pools, tokens, slots = case()
        check(pools, [t.astype(dtype) for t in tokens], slots, interpret=_mosaic.interpreter())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [-1, L])
def test_layer_outside_writes_nothing(layer, kind):
    pools, tokens, slots = case(kind=kind)
    written = write_pages(*pools, *tokens, slots, layer, interpret=_mosaic.interpreter())
    assert_same(list(written), pools)


def test_no_tokens():
    pools, tokens, slots = case()
    written = write_pages(*pools, *(t[:0] for t in tokens), slots[:0], 0)
    assert written[0] is pools[0] and written[1] is pools[1]


@pytest.mark.parametrize("kind", KINDS)
def test_scan_and_while_over_layers(kind):
    pools, tokens, slots = case(kind=kind)
    write = functools.partial(write_pages, interpret=_mosaic.interpreter())

    def scan(*pools):
        return lax.scan(lambda c, i: (write(*c, *tokens, slots, i), None), pools, jnp.arange(L))[0]

    def loop(*pools):
        def body(carry):
            i, pools = carry
            return i + 1, write(*pools, *tokens, slots, i)

        return lax.while_loop(lambda c: c[0] < L, body, (jnp.int32(0), pools))[1]

    expected = expect(*expect(*pools, *tokens, slots, jnp.int32(0)), *tokens, slots, jnp.int32(1))
    for function in (scan, loop):
        assert_same(jax.jit(function)(*pools), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind):
    cases = [case(seed, kind=kind) for seed in (3, 4)]
    pools, tokens, slots = (jax.tree.map(lambda *x: jnp.stack(x), *(c[i] for c in cases)) for i in range(3))
    write = functools.partial(write_pages, interpret=_mosaic.interpreter())
    written = jax.vmap(write)(*pools, *tokens, slots, jnp.array([0, 1]))
    for b, (own_pools, own_tokens, own_slots) in enumerate(cases):
        own = jax.tree.map(lambda x, b=b: x[b], written)
        assert_same(own, expect(*own_pools, *own_tokens, own_slots, jnp.int32(b)))


@pytest.mark.parametrize("kind", KINDS)
def test_shard_map_over_heads(cpu_devices, kind):
    pools, tokens, slots = case(K=2, kind=kind)
    mesh = jax.sharding.Mesh(np.array(cpu_devices[:1]), ("heads",))
    scale = PartitionSpec(None, None, *(() if kind == "per_tensor" else ("heads",)))
    pool = QuantizedPages(PartitionSpec(None, None, "heads"), scale)  # pyright: ignore[reportArgumentType]
    token, whole = PartitionSpec(None, "heads"), PartitionSpec()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(pool, pool, token, token, whole, whole), out_specs=(pool, pool)
    )
    def write(*arguments):
        return write_pages(*arguments, interpret=_mosaic.interpreter())

    written = jax.jit(write)(*pools, *tokens, slots, jnp.int32(1))
    assert_same(written, expect(*pools, *tokens, slots, jnp.int32(1)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(D=136), "head dim 136, 1 tokens a program: a thread would hold 136 numbers"),
        (dict(D=264, form="int4"), "a thread would hold 264 numbers"),
        (dict(block_tokens=17), "17 tokens a program: a thread would hold 136"),
        (dict(num_pages=2**23), "rows a layer: the kernel counts them in int32"),
    ],
)
def test_unsupported(options, reason):
    options = dict(K=16, D=128, form="int8", num_pages=4, block_tokens=1) | options
    form = FORMATS[options["form"]]
    lead = (L, options["num_pages"], options["K"], 16)
    pages: Any = QuantizedPages(
        jax.ShapeDtypeStruct((*lead, options["D"] // form.per_element), form.dtype),  # pyright: ignore
        jax.ShapeDtypeStruct(lead, jnp.float32),  # pyright: ignore
    )
    tokens = jax.ShapeDtypeStruct((32, options["K"], options["D"]), jnp.bfloat16)
    config = quantize.Config(block_tokens=options["block_tokens"])
    with pytest.raises(NotImplementedError, match=reason):
        quantize.check_supported(Pools(pages, pages, 0), tokens, tokens, config)


def test_other_chips_are_declined():
    pools, (k, v), _ = case()
    blackwell = _mosaic.DeviceLimits(compute_capability=(10, 0))
    with pytest.raises(NotImplementedError, match=r"this one has 10\.0"):
        quantize.check_supported(Pools(pools[0], pools[1], 0), k, v, limits=blackwell)


def test_default_config_fills_the_chip():
    def blocks(num_tokens, K, D, dtype=jnp.bfloat16, num_arrays=2):
        limits = _mosaic.DeviceLimits()
        return quantize.default_config(num_tokens, num_arrays, K, D, dtype, limits).block_tokens

    assert [blocks(n, 8, 128) for n in (1, 64, 264, 265, 65536)] == [1, 1, 1, 2, 4]
    assert blocks(300, 8, 128, num_arrays=1) == 1
    assert blocks(65536, 8, 128, jnp.float32) == 2
    assert blocks(65536, 5, 128) == 32  # a program has one head
    assert blocks(3, 1, 16) == 1
    assert blocks(65536, 64, 256) == 2


# ---- compiled for an H200 ----

needs_cuda_plugin = pytest.mark.skipif(not aot.available(), reason="JAX's CUDA plug-in is not installed")
SHAPES = {  # K, D, Dv
    "usual": (8, 128, 128),
    "small": (8, 64, 64),
    "large": (4, 256, 256),
    "192": (16, 192, 128),
    "one_head": (1, 128, 128),
    "latent": (1, 576, 512),
    "odd": (5, 96, 96),
    "many": (96, 128, 128),
    "odd_rows": (2, 120, 40),
}


def shapes(
    K,
    D,
    Dv,
    *,
    form="fp8_e4m3",
    kind="per_token_head",
    dtype="bfloat16",
    page_size=16,
    num_tokens=3000,
    num_pages=64,
    slots="int32",
):
    """The operands of a write, without their data."""

    def shape(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def pool(width):
        values = shape(
            L, num_pages, K, page_size, width // FORMATS[form].per_element, dtype=FORMATS[form].dtype
        )
        scales = (1, 1) if kind == "per_tensor" else (K, page_size)
        leaves: Any = values, shape(L, num_pages, *scales, dtype="float32")
        return QuantizedPages(*leaves)

    tokens = [shape(num_tokens, K, d) for d in (D, Dv)]
    return (pool(D), pool(Dv), *tokens, shape(num_tokens, dtype=slots), shape(dtype="int32"))


def assert_lean(compiled):
    """One kernel, no register spilled, and nothing else in the program: no copy of a pool above all."""
    assert compiled.kernels and not any(kernel.spill_bytes for kernel in compiled.kernels)
    assert len(re.findall(r" custom-call\(", compiled.hlo)) == 1
    assert not re.findall(r"= \S+ (?:copy|copy-start|fusion)\(", compiled.hlo)


@needs_cuda_plugin
@pytest.mark.parametrize(
    ("form", "kind", "dtype"),
    [(*both, quantize.TOKEN_DTYPES[i % 3]) for i, both in enumerate(FORMATS_AND_KINDS)],
)
def test_formats_compile_for_h200(form, kind, dtype):
    operands = shapes(*SHAPES["usual"], form=form, kind=kind, dtype=dtype)
    assert_lean(aot.compile_for_h200(write_pages, *operands, donate=(0, 1)))


@needs_cuda_plugin
@pytest.mark.parametrize(
    ("name", "form", "dtype"),
    [
        (name, *[("fp8_e5m2", "bfloat16"), ("int4", "float32")][i % 2])
        for i, name in enumerate(["large", "192", "latent", "odd", "many"])
    ],
)
def test_shapes_compile_for_h200(name, form, dtype):
    operands = shapes(*SHAPES[name], form=form, dtype=dtype)
    assert_lean(aot.compile_for_h200(write_pages, *operands, donate=(0, 1)))


@needs_cuda_plugin
@pytest.mark.parametrize("num_tokens", [1, 7])
def test_few_tokens_compile_for_h200(num_tokens):
    for name in ("usual", "small", "one_head"):
        operands = shapes(*SHAPES[name], num_tokens=num_tokens)
        assert_lean(aot.compile_for_h200(write_pages, *operands, donate=(0, 1)))


@needs_cuda_plugin
@pytest.mark.parametrize("page_size", [1, 128])
def test_page_sizes_compile_for_h200(page_size):
    operands = shapes(*SHAPES["usual"], page_size=page_size)
    assert_lean(aot.compile_for_h200(write_pages, *operands, donate=(0, 1)))


@needs_cuda_plugin
def test_int64_slots_compile_for_h200():
    with jax.enable_x64(True):
        operands = shapes(*SHAPES["usual"], slots="int64")
        assert_lean(aot.compile_for_h200(write_pages, *operands, donate=(0, 1)))


@needs_cuda_plugin
@pytest.mark.parametrize("kind", KINDS)
def test_loops_over_layers_stay_in_place(kind):
    *pools, k, v, slots, _ = shapes(*SHAPES["usual"], kind=kind)

    def scan(k_pages, v_pages, k, v, slots):
        def body(pools, layer):
            return write_pages(*pools, k, v, slots, layer), None

        return lax.scan(body, (k_pages, v_pages), jnp.arange(L))[0]

    def unrolled(k_pages, v_pages, k, v, slots):
        for layer in range(4):
            k_pages, v_pages = write_pages(k_pages, v_pages, k, v, slots, layer)
        return k_pages, v_pages

    for function in (scan, unrolled):
        compiled = aot.compile_for_h200(function, *pools, k, v, slots, donate=(0, 1))
        copied = re.findall(r"= (\w+\[[\d,]*\])\S* copy(?:-start)?\(", compiled.hlo)
        assert all("," not in shape for shape in copied), copied  # at most a loop counter
        assert len(compiled.kernels) == 1  # however many layers


# ---- on a GPU ----

# Bit for bit: both compilers make the same instructions of the same arithmetic, an approximate reciprocal too.


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "kind"), FORMATS_AND_KINDS)
@pytest.mark.parametrize("dtype", quantize.TOKEN_DTYPES)
def test_formats_on_gpu(form, kind, dtype):
    options: Any = dict(form=form, kind=kind, dtype=jnp.dtype(dtype), K=8, D=128, page_size=16, num_pages=140)
    for seed, num_tokens in enumerate((1, 130, 2001)):
        check(*case(seed, num_tokens=num_tokens, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("form", "dtype"), [("fp8_e5m2", "bfloat16"), ("int4", "float32"), ("int8", "float16")]
)
def test_shapes_on_gpu(name, form, dtype):
    K, D, Dv = SHAPES[name]
    options: Any = dict(form=form, dtype=jnp.dtype(dtype), K=K, D=D, Dv=Dv, page_size=16, num_pages=140)
    for seed, num_tokens in enumerate((1, 3, 130, 2001)):
        check(*case(seed, num_tokens=num_tokens, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 64, 128])
def test_page_sizes_on_gpu(page_size):
    for K, D, kind in ((8, 128, "per_tensor"), (1, 64, "per_token_head"), (3, 96, "per_token_head")):
        num_pages = 3000 // page_size
        check(*case(K=K, D=D, kind=kind, page_size=page_size, num_tokens=2001, num_pages=num_pages))


@pytest.mark.gpu
@pytest.mark.parametrize("block_tokens", [1, 2, 3, 4, 8])
def test_blocks_on_gpu(block_tokens):
    config = quantize.Config(block_tokens=block_tokens)
    check(*case(K=8, D=128, num_tokens=150, num_pages=20), config=config)


@pytest.mark.gpu
def test_int64_slots_on_gpu():
    with jax.enable_x64(True):
        pools, tokens, slots = case(K=8, D=128, num_tokens=150, num_pages=20)
        check(pools, tokens, slots.astype(jnp.int64).at[0].set(2**32 + 1).at[1].set(-(2**32) + 2))
