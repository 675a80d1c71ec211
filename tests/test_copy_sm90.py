"""The page-moving kernels for Hopper: interpreted with the race detector, compiled for an H200, run on a GPU."""

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
from paxcache.kernels.sm90 import _mosaic
from paxcache.kernels.sm90 import copy as copy_sm90

L, P = 2, 6
RACES = _mosaic.interpreter(detect_races=True)
# Three programs, so that each makes several moves, and pages of several chunks.
SMALL = copy_sm90.Config(chunk_bytes=512, bytes_per_sm=1536)
ENTRIES = (4, -1, 5, P, 0), (1, 2, 3, -7, P + 3)


@pytest.fixture
def no_races():
    """Fails a test whose (last) kernel had a race."""
    gpu_callbacks.reset_gpu_interpret_mode_state()
    yield
    assert not gpu_callbacks.get_races().races_found


@pytest.fixture
def one_sm(monkeypatch):
    """An imagined device so small that programs have several moves each."""
    monkeypatch.setattr(copy_sm90, "device_limits", lambda: _mosaic.DeviceLimits(num_sms=1))


def draw(shapes, dtype=jnp.float32, lead=(L, P), seed=0):
    """Random leaves, with values that every dtype holds exactly."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.integers(-8, 8, (*lead, *shape)), jnp.float32).astype(dtype)
        for name, shape in shapes.items()
    }


def copied(leaf, src, dst):
    leaf = np.array(leaf)
    num_pages = leaf.shape[1]
    for a, b in zip(np.asarray(src), np.asarray(dst), strict=True):
        if 0 <= a < num_pages and 0 <= b < num_pages:
            leaf[:, b] = leaf[:, a]
    return leaf


def gathered(leaf, ids):
    leaf = np.asarray(leaf)
    zeros = np.zeros_like(leaf[:, 0])
    return np.stack([leaf[:, i] if 0 <= i < leaf.shape[1] else zeros for i in np.asarray(ids)])


def scattered(leaf, ids, block):
    leaf = np.array(leaf)
    for i, page in zip(np.asarray(ids), np.asarray(block), strict=True):
        if 0 <= i < leaf.shape[1]:
            leaf[:, i] = page
    return leaf


def assert_same(actual, expected):
    """Equal bits, leaf by leaf (NumPy has no order for the small floats)."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(e).view(np.uint8))


def i32(values):
    return jnp.array(values, jnp.int32)


def check_all(pages, src, dst, **options):
    """The three functions against NumPy. No page may be a destination twice."""
    src, dst = i32(src), i32(dst)
    copy, gather, scatter = (
        jax.jit(functools.partial(f, **options))
        for f in (copy_sm90.copy_pages, copy_sm90.gather_pages, copy_sm90.scatter_pages)
    )
    assert_same(copy(pages, src, dst), {n: copied(x, src, dst) for n, x in pages.items()})
    blocks = gather(pages, src)
    assert_same(blocks, {n: gathered(x, src) for n, x in pages.items()})
    assert_same(scatter(pages, dst, blocks), {n: scattered(x, dst, blocks[n]) for n, x in pages.items()})


CASES = {
    "one_leaf": ({"k": (2, 8, 16)}, jnp.float32),
    "keys_values_scales": ({"k": (2, 8, 32), "v": (2, 8, 32), "scales": (2, 8)}, jnp.float32),
    "leaves_of_two_widths": ({"k": (1, 8, 48), "v": (1, 8, 32)}, jnp.bfloat16),
    "float8": ({"k": (1, 8, 64)}, jnp.float8_e4m3fn),
    "int8": ({"k": (3, 8, 16)}, jnp.int8),
    "float16": ({"k": (2, 16, 24)}, jnp.float16),
    "page_of_16_bytes": ({"k": (4,)}, jnp.float32),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("function", ["copy", "gather", "scatter"])
def test_matches_numpy_without_races(name, function, one_sm, no_races):
    pages = draw(*CASES[name])
    src, dst = map(i32, ENTRIES)
    options: dict[str, Any] = dict(config=SMALL, interpret=RACES)
    if function == "copy":
        actual = copy_sm90.copy_pages(pages, src, dst, **options)
        expected = {n: copied(x, src, dst) for n, x in pages.items()}
    elif function == "gather":
        actual = copy_sm90.gather_pages(pages, src, **options)
        expected = {n: gathered(x, src) for n, x in pages.items()}
    else:
        ids = dst
        blocks = draw(CASES[name][0], CASES[name][1], (len(ids), L), seed=1)
        actual = copy_sm90.scatter_pages(pages, ids, blocks, **options)
        expected = {n: scattered(x, ids, blocks[n]) for n, x in pages.items()}
    assert_same(actual, expected)


@pytest.mark.parametrize("num_entries", [127, 129, 300])
@pytest.mark.parametrize("live", [(), (5, 126)])
def test_groups_of_entries(num_entries, live, one_sm, no_races):
    pages = draw({"k": (2, 8, 16)})
    src, dst = np.full((2, num_entries), -1, np.int32)
    src[list(live)], dst[list(live)] = (4, 5)[: len(live)], (0, 2)[: len(live)]
    if num_entries > 128 and live:
        src[-1], dst[-1] = 3, 1
    config = copy_sm90.Config(chunk_bytes=1024, bytes_per_sm=3 * 1024)
    actual = copy_sm90.copy_pages(pages, i32(src), i32(dst), config=config, interpret=RACES)
    assert_same(actual, {"k": copied(pages["k"], src, dst)})


def test_empty_lists():
    pages = draw({"k": (2, 8, 16)})
    none = jnp.zeros(0, jnp.int32)
    assert copy_sm90.copy_pages(pages, none, none)["k"] is pages["k"]
    blocks = copy_sm90.gather_pages(pages, none)
    assert blocks["k"].shape == (0, L, 2, 8, 16)
    assert copy_sm90.scatter_pages(pages, none, blocks)["k"] is pages["k"]


def test_x64(one_sm):
    with jax.enable_x64(True):
        check_all(draw({"k": (2, 8, 16)}), *ENTRIES, config=SMALL, interpret=_mosaic.interpreter())
        many = np.full((2, 130), -1)
        many[:, 129] = 1, 2
        pages = draw({"k": (2, 8, 16)})
        actual = copy_sm90.copy_pages(
            pages, i32(many[0]), i32(many[1]), config=SMALL, interpret=_mosaic.interpreter()
        )
        assert_same(actual, {"k": copied(pages["k"], *many)})


def test_vmap_and_while_loop(one_sm):
    cases = [draw({"k": (2, 8, 16)}, seed=s)["k"] for s in (1, 2)]
    src, dst = i32([[4, 5], [0, -1]]), i32([[0, 1], [3, 3]])
    options: dict[str, Any] = dict(config=SMALL, interpret=_mosaic.interpreter())
    copies = jax.vmap(functools.partial(copy_sm90.copy_pages, **options))(jnp.stack(cases), src, dst)
    blocks = jax.vmap(functools.partial(copy_sm90.gather_pages, **options))(jnp.stack(cases), src)
    for b, pages in enumerate(cases):
        assert_same(copies[b], copied(pages, src[b], dst[b]))
        assert_same(blocks[b], gathered(pages, src[b]))

    def shift(carry):
        i, pages = carry
        return i + 1, copy_sm90.copy_pages(pages, i[None], i[None] + 1, **options)

    looped = jax.jit(lambda p: lax.while_loop(lambda c: c[0] < P - 1, shift, (jnp.int32(0), p))[1])(cases[0])
    assert_same(looped, np.broadcast_to(np.asarray(cases[0])[:, :1], cases[0].shape))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_shard_map_over_heads(cpu_devices, num_devices, one_sm):
    mesh = jax.sharding.Mesh(np.array(cpu_devices[:num_devices]), ("heads",))
    pages = draw({"k": (2, 8, 16)})
    spec, whole = {"k": PartitionSpec(None, None, "heads")}, PartitionSpec()
    src, dst = map(i32, ENTRIES)
    ids = dst
    blocks = {"k": jnp.asarray(gathered(pages["k"], src))}
    for function, arguments, specs, expected in (
        (copy_sm90.copy_pages, (src, dst), (whole, whole), copied(pages["k"], src, dst)),
        (copy_sm90.gather_pages, (src,), (whole,), blocks["k"]),
        (copy_sm90.scatter_pages, (ids, blocks), (whole, spec), scattered(pages["k"], ids, blocks["k"])),
    ):
        move = functools.partial(function, config=SMALL, interpret=_mosaic.interpreter())
        sharded = jax.jit(jax.shard_map(move, mesh=mesh, in_specs=(spec, *specs), out_specs=spec))
        # Two devices only traced: the interpreter checks at the end of one device's kernel that none holds a barrier.
        if num_devices == 1:
            assert_same(sharded(pages, *arguments), {"k": expected})
        else:
            assert sharded.lower(pages, *arguments).out_info["k"].shape == expected.shape


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 7), "int8", "pages of 14 int8: the copy engine needs a multiple of 16 bytes"),
        ((2, 8), "float64", "pages of float64"),
        ((2, 8), "bool", "pages of bool"),
    ],
)
def test_unsupported(shape, dtype, reason):
    pages = {"k": jax.ShapeDtypeStruct((L, P, *shape), np.dtype(dtype))}
    with pytest.raises(NotImplementedError, match=reason):
        copy_sm90.check_supported(pages)


def test_chunks_divide_pages():
    page: Any = jax.ShapeDtypeStruct((1, 1, 7, 16, 256), jnp.float32)  # 114,688 bytes
    copy_sm90.check_supported(page)
    with pytest.raises(NotImplementedError, match="no part of them fits 8 bytes"):
        copy_sm90.gather_pages(page, i32([0]), config=copy_sm90.Config(chunk_bytes=8))


def test_other_chips_are_declined():
    blackwell = _mosaic.DeviceLimits(compute_capability=(10, 0))
    with pytest.raises(NotImplementedError, match=r"this one has 10\.0"):
        copy_sm90.check_supported(draw({"k": (2, 8, 16)}), blackwell)


# ---- compiled for an H200 ----

needs_cuda_plugin = pytest.mark.skipif(not aot.available(), reason="JAX's CUDA plug-in is not installed")


def assert_lean(compiled, num_kernels=1):
    """One kernel, no register spilled, and nothing else in the program: no copy of a pool above all."""
    assert compiled.kernels and not any(kernel.spill_bytes for kernel in compiled.kernels)
    assert len(re.findall(r" custom-call\(", compiled.hlo)) == num_kernels
    assert not re.findall(r"= \S+ (?:copy|copy-start|fusion)\(", compiled.hlo)


@needs_cuda_plugin
@pytest.mark.parametrize("dtype", sorted(_mosaic.COPY_DTYPES))
def test_compiles_for_h200(dtype):
    def shape(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    ids = shape(300, dtype="int32")
    pages = {"k": shape(4, 64, 8, 16, 128), "v": shape(4, 64, 8, 16, 64)}
    pages["scales"] = shape(4, 64, 8, 16, dtype="float32")
    blocks = jax.tree.map(lambda x: shape(300, 4, *x.shape[2:], dtype=x.dtype), pages)
    assert_lean(aot.compile_for_h200(copy_sm90.copy_pages, pages, ids, ids, donate=(0,)))
    assert_lean(aot.compile_for_h200(copy_sm90.gather_pages, pages, ids))
    assert_lean(aot.compile_for_h200(copy_sm90.scatter_pages, pages, ids, blocks, donate=(0,)))


# ---- on a GPU ----


GPU_SHAPES = ((8, 16, 128), (1, 8, 16), (3, 32, 256), (1, 1, 16))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, "bfloat16") for shape in GPU_SHAPES] + [((2, 8, 64), d) for d in sorted(_mosaic.COPY_DTYPES)],
)
def test_on_gpu(shape, dtype):
    num_pages, num_entries = 40, 200
    pages = draw({"k": shape, "v": shape, "scales": (*shape[:-1], 16)}, dtype, (3, num_pages), seed=7)
    rng = np.random.default_rng(8)
    order = rng.permutation(num_pages)
    at = rng.permutation(num_entries)[:20]
    src, dst = np.full((2, num_entries), -1)
    src[at], dst[at] = order[:20], order[20:]
    src[at[:3]], dst[at[3:6]] = num_pages, 2**31 - 1
    for _ in range(3):  # the same bits each time
        check_all(pages, src, dst)
