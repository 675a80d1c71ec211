"""The scatter-write kernel for Hopper: interpreted with the race detector, compiled for an H200, run on a GPU."""

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
from paxcache.kernels._request import Pools
from paxcache.kernels.sm90 import _mosaic, write

L, P, S = 2, 5, 8
RACES = _mosaic.interpreter(detect_races=True)


def _write_pages(
    k_pages: Any, v_pages: Any, k: Any, v: Any, slots: Any, layer: Any, **options: Any
) -> tuple[Any, Any]:
    return write.write_pages(Pools(k_pages, v_pages, layer), k, v, slots, **options)


write_pages: Any = _write_pages


@pytest.fixture
def no_races():
    """Fails a test whose (last) kernel had a race."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    yield
    assert not gpu_callbacks.get_races().races_found


def draw(rng, shape, dtype):
    """Random values that every dtype holds exactly."""
    return jnp.asarray(rng.integers(-8, 8, shape), jnp.float32).astype(dtype)


def draw_slots(rng, num_tokens, num_pages=P, page_size=S):
    """Unique slots, every fourth token out of the pool: before it, at its end, far past it."""
    slots = rng.permutation(num_pages * page_size)[:num_tokens]
    outside = np.resize([-1, num_pages * page_size, -(2**31), 2**31 - 1], num_tokens)
    return np.where(np.arange(num_tokens) % 4 == 3, outside, slots)


def expect(pages, tokens, slots, layer):
    """What the write does to one pool, in NumPy."""
    pages = np.array(pages)
    for token, slot in zip(np.asarray(tokens), np.asarray(slots), strict=True):
        if 0 <= slot < pages.shape[1] * pages.shape[3]:
            pages[layer, slot // pages.shape[3], :, slot % pages.shape[3]] = token
    return pages


def assert_same(actual, expected):
    """Equal bits (NumPy has no order for the small floats)."""
    np.testing.assert_array_equal(np.asarray(actual).view(np.uint8), np.asarray(expected).view(np.uint8))


def case(seed=0, *, K=2, D=16, Dv=None, dtype=jnp.float32, page_size=S, num_tokens=7, num_pages=P):
    """Pools, tokens and slots."""
    rng = np.random.default_rng(seed)
    Dv = Dv or D
    pools = [draw(rng, (L, num_pages, K, page_size, d), dtype) for d in (D, Dv)]
    tokens = [draw(rng, (num_tokens, K, d), dtype) for d in (D, Dv)]
    return pools, tokens, jnp.asarray(draw_slots(rng, num_tokens, num_pages, page_size), jnp.int32)


def check(pools, tokens, slots, layer=1, **options):
    actual = jax.jit(functools.partial(write_pages, **options))(*pools, *tokens, slots, layer)
    for pool, token, written in zip(pools, tokens, actual, strict=True):
        assert_same(written, expect(pool, token, slots, layer))


CASES = {
    "one_head": dict(K=1, D=64),
    "box_alignment": dict(K=4, D=64),
    "head_by_head": dict(K=3, D=8, dtype=jnp.bfloat16),
    "float8": dict(D=128, dtype=jnp.float8_e4m3fn),
    "int8": dict(dtype=jnp.int8),
    "float16": dict(dtype=jnp.float16),
    "wide": dict(K=2, D=384, Dv=576),
    "values_of_other_width": dict(D=32, Dv=64),
    "page_of_one": dict(page_size=1, num_pages=11),
    "page_of_three": dict(page_size=3),
    "page_of_128": dict(page_size=128, num_pages=2),
    "one_token": dict(num_tokens=1),
    "three_blocks": dict(num_tokens=9, config=write.Config(block_tokens=4)),
    "one_block": dict(num_tokens=6, config=write.Config(block_tokens=6)),
}


@pytest.mark.parametrize("name", CASES)
def test_write_matches_numpy_without_races(name, no_races):
    options = dict(CASES[name])
    config = options.pop("config", None)
    check(*case(**options), config=config, interpret=RACES)


def test_latent_attention_has_no_v(no_races):
    pools, tokens, slots = case(K=1, D=64)
    pages, none = write_pages(pools[0], None, tokens[0], None, slots, 0, interpret=RACES)
    assert none is None
    assert_same(pages, expect(pools[0], tokens[0], slots, 0))


def test_int64_slots(no_races):
    with jax.enable_x64(True):
        pools, tokens, slots = case()
        # Two slots that are in the pool once cut to 32 bits.
        slots = slots.astype(jnp.int64).at[0].set(2**32 + 1).at[1].set(-(2**32) + 2)
        check(pools, tokens, slots, interpret=RACES)


def test_tokens_are_converted():
    pools, tokens, slots = case(dtype=jnp.bfloat16)
    check(pools, [t.astype(jnp.float32) for t in tokens], slots, interpret=_mosaic.interpreter())


@pytest.mark.parametrize("layer", [-1, L])
def test_layer_outside_writes_nothing(layer):
    pools, tokens, slots = case()
    written = write_pages(*pools, *tokens, slots, layer, interpret=_mosaic.interpreter())
    for pool, after in zip(pools, written, strict=True):
        assert_same(after, pool)


def test_no_tokens():
    pools, tokens, slots = case()
    written = write_pages(*pools, *(t[:0] for t in tokens), slots[:0], 0)
    assert written[0] is pools[0] and written[1] is pools[1]


def test_scan_and_while_over_layers():
    pools, tokens, slots = case()
    write = functools.partial(write_pages, interpret=_mosaic.interpreter())

    def scan(k_pages, v_pages):
        return lax.scan(lambda c, i: (write(*c, *tokens, slots, i), None), (k_pages, v_pages), jnp.arange(L))[
            0
        ]

    def loop(k_pages, v_pages):
        def body(carry):
            i, k_pages, v_pages = carry
            return i + 1, *write(k_pages, v_pages, *tokens, slots, i)

        return lax.while_loop(lambda c: c[0] < L, body, (jnp.int32(0), k_pages, v_pages))[1:]

    for function in (scan, loop):
        for pool, token, written in zip(pools, tokens, jax.jit(function)(*pools), strict=True):
            assert_same(written, expect(expect(pool, token, slots, 0), token, slots, 1))


@pytest.mark.parametrize("pools_batched", [True, False])
def test_vmap(pools_batched):
    cases = [case(seed) for seed in (3, 4)]
    pools = jax.tree.map(lambda *x: jnp.stack(x), *(c[0] for c in cases)) if pools_batched else cases[0][0]
    tokens, slots = (jax.tree.map(lambda *x: jnp.stack(x), *(c[i] for c in cases)) for i in (1, 2))
    write = functools.partial(write_pages, interpret=_mosaic.interpreter())
    in_axes = (0 if pools_batched else None,) * 2 + (0, 0, 0, 0)
    written = jax.vmap(write, in_axes)(*pools, *tokens, slots, jnp.array([0, 1]))
    for b, (own_pools, own_tokens, own_slots) in enumerate(cases):
        for i in (0, 1):
            before = own_pools[i] if pools_batched else pools[i]
            assert_same(written[i][b], expect(before, own_tokens[i], own_slots, b))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_shard_map_over_heads(cpu_devices, num_devices):
    pools, tokens, slots = case(K=2)
    mesh = jax.sharding.Mesh(np.array(cpu_devices[:num_devices]), ("heads",))
    pool, token, whole = PartitionSpec(None, None, "heads"), PartitionSpec(None, "heads"), PartitionSpec()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(pool, pool, token, token, whole, whole), out_specs=(pool, pool)
    )
    def write(*arguments):
        return write_pages(*arguments, interpret=_mosaic.interpreter())

    arguments = *pools, *tokens, slots, jnp.int32(1)
    # Two devices only traced: the interpreter checks at the end of one device's kernel that none holds a barrier.
    if num_devices == 2:
        assert jax.jit(write).lower(*arguments).out_info[0].shape == pools[0].shape
        return
    for before, new, written in zip(pools, tokens, jax.jit(write)(*arguments), strict=True):
        assert_same(written, expect(before, new, slots, 1))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(D=12), "rows of 12 bfloat16: the copy engine needs a multiple of 16 bytes"),
        (dict(D=8, dtype=jnp.int8), "rows of 8 int8"),
        (dict(dtype=jnp.float64), "pages of float64"),
        (dict(D=262), "multiple of 16 bytes"),
        (dict(D=8 * 257), "no part of them"),
        (dict(K=257, D=8), "257 KV heads"),
        (dict(K=256, D=256), "bytes of shared memory"),
        (dict(num_pages=2**27), "slots: the kernel counts them in int32"),
    ],
)
def test_unsupported(options, reason):
    options = dict(K=2, D=64, dtype=jnp.bfloat16, num_pages=4) | options
    K, D, dtype = options["K"], options["D"], np.dtype(options["dtype"])
    pages = jax.ShapeDtypeStruct((L, options["num_pages"], K, 16, D), dtype)
    with pytest.raises(NotImplementedError, match=reason):
        write.check_supported(Pools(pages, pages, 0))


def test_other_chips_are_declined():
    pools, _, _ = case()
    blackwell = _mosaic.DeviceLimits(compute_capability=(10, 0))
    with pytest.raises(NotImplementedError, match=r"this one has 10\.0"):
        write.check_supported(Pools(pools[0], pools[1], 0), limits=blackwell)


def test_default_config_fills_the_chip():
    limits = _mosaic.DeviceLimits()
    blocks = {n: write.default_config(n, 4096, limits).block_tokens for n in (1, 64, 256, 65536)}
    assert blocks == {1: 1, 64: 1, 256: 1, 65536: 2}
    assert write.default_config(65536, 512, limits).block_tokens == 8  # one head left of eight
    assert write.default_config(65536, 1 << 17, limits).block_tokens == 1


# ---- compiled for an H200 ----

needs_cuda_plugin = pytest.mark.skipif(not aot.available(), reason="JAX's CUDA plug-in is not installed")
SHAPES = {  # K, D, Dv
    "usual": (8, 128, 128),
    "small": (8, 64, 64),
    "large": (4, 256, 256),
    "one_head": (1, 128, 128),
    "latent": (1, 576, 512),
    "odd": (5, 96, 96),
    "head_by_head": (3, 16, 48),
    "wide": (2, 320, 320),
}


def shapes(K, D, Dv, *, dtype="bfloat16", page_size=16, num_tokens=300, num_pages=64, slots="int32"):
    """The operands of a write, without their data."""

    def shape(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    pools = [shape(L, num_pages, K, page_size, d) for d in (D, Dv)]
    tokens = [shape(num_tokens, K, d) for d in (D, Dv)]
    return (*pools, *tokens, shape(num_tokens, dtype=slots), shape(dtype="int32"))


def assert_lean(compiled):
    """One kernel, no register spilled, and nothing else in the program: no copy of a pool above all."""
    assert compiled.kernels and not any(kernel.spill_bytes for kernel in compiled.kernels)
    assert len(re.findall(r" custom-call\(", compiled.hlo)) == 1
    assert not re.findall(r"= \S+ (?:copy|copy-start|fusion)\(", compiled.hlo)


@needs_cuda_plugin
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fn"])
def test_compiles_for_h200(name, dtype):
    assert_lean(aot.compile_for_h200(write_pages, *shapes(*SHAPES[name], dtype=dtype), donate=(0, 1)))


@needs_cuda_plugin
@pytest.mark.parametrize("page_size", [1, 3, 8, 128])
def test_page_sizes_compile_for_h200(page_size):
    operands = shapes(8, 128, 128, page_size=page_size)
    assert_lean(aot.compile_for_h200(write_pages, *operands, donate=(0, 1)))


@needs_cuda_plugin
def test_int64_slots_compile_for_h200():
    with jax.enable_x64(True):
        operands = shapes(8, 128, 128, slots="int64")
        assert_lean(aot.compile_for_h200(write_pages, *operands, donate=(0, 1)))


@needs_cuda_plugin
def test_loops_over_layers_stay_in_place():
    *pools, k, v, slots, _ = shapes(8, 128, 128)

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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in SHAPES for dtype in ("bfloat16", "float32", "float8_e4m3fn")]
    + [("usual", dtype) for dtype in sorted(_mosaic.COPY_DTYPES)],
)
def test_on_gpu(name, dtype):
    K, D, Dv = SHAPES[name]
    for seed, num_tokens in enumerate((1, 130, 2001)):
        check(*case(seed, K=K, D=D, Dv=Dv, dtype=dtype, page_size=16, num_tokens=num_tokens, num_pages=140))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 3, 8, 64, 128])
def test_page_sizes_on_gpu(page_size):
    for K, D in ((8, 128), (1, 64), (3, 8)):
        num_pages = 3000 // page_size
        check(*case(K=K, D=D, dtype=jnp.bfloat16, page_size=page_size, num_tokens=2001, num_pages=num_pages))


@pytest.mark.gpu
def test_int64_slots_on_gpu():
    with jax.enable_x64(True):
        pools, tokens, slots = case(K=8, D=128, dtype=jnp.bfloat16, num_tokens=150, num_pages=20)
        check(pools, tokens, slots.astype(jnp.int64).at[0].set(2**32 + 1).at[1].set(-(2**32) + 2))
