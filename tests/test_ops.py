"""The array-level ops, in every implementation, against the NumPy oracle; and the oracle against plain attention."""

from __future__ import annotations

import dataclasses
import functools
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import catalogue
import oracle
import paxcache
from paxcache import _checks, ops
from paxcache.kernels import xla

WRITES = [pytest.param(case, id=case.name) for case in catalogue.WRITE]
BY_NAME = {case.name: case for case in catalogue.ATTENTION}
WRITE_BY_NAME = {case.name: case for case in catalogue.WRITE}
LOOPED = ("decode_mixed_lengths", "decode_holes", "decode_window_5_of_holes", "keys_serve_as_values", "ragged",
          "ragged_one_row_has_all", "ragged_not_causal_window", "ragged_everything")  # fmt: skip
STATIC = ("layer", "sm_scale", "soft_cap", "causal", "implementation", "return_lse")

# One jit for all cases, so that cases of one shape share a compilation.
_attention = {
    traced: jax.jit(ops.paged_attention, static_argnames=STATIC if traced else (*STATIC, "sliding_window"))
    for traced in (True, False)
}
_write = jax.jit(ops.write_pages, static_argnames=("layer", "implementation"))


def attention(problem: catalogue.Problem, *, jit: bool = True, implementation=None, **options):
    """The op on a problem, skipping where a backend for GPUs says that it cannot."""
    function = _attention["sliding_window" in problem.arrays] if jit else ops.paged_attention
    with_ = {**problem.device_arrays(), **problem.static, **options}
    try:
        return function(**with_, implementation=implementation)
    except NotImplementedError as error:
        if implementation in (None, "xla"):
            raise
        pytest.skip(str(error))


def assert_answer(problem: catalogue.Problem, out, lse, dtype: str) -> None:
    """Output and log-sum-exp within rounding of the oracle's."""
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    tolerance = catalogue.TOLERANCE[dtype]
    np.testing.assert_allclose(np.asarray(out).astype(np.float64), problem.out, tolerance, tolerance)
    np.testing.assert_allclose(lse, problem.lse, catalogue.LSE_TOLERANCE, catalogue.LSE_TOLERANCE)
    nothing = np.isneginf(problem.lse)
    assert (np.asarray(out)[nothing] == 0).all(), "a query that sees nothing must give exact zeros"


# The oracle itself.


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (5, 1)])
def test_oracle_equals_dense_attention(heads, causal, window):
    H, K = heads
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((11, n, 8)).astype(np.float32) for n in (H, K, K))
    out, lse = oracle.attention(q, k, v, range(11), range(11), causal=causal, sliding_window=window)
    side = None if window is None else (window - 1, 0 if causal else 11)
    wanted, wanted_lse = jax.nn.dot_product_attention(
        q[None], k[None], v[None], is_causal=causal, local_window_size=side, return_residual=True
    )
    np.testing.assert_allclose(out, wanted[0], 1e-5, 1e-5)
    np.testing.assert_allclose(lse, wanted_lse[0], 1e-5, 1e-5)


def test_oracle_soft_cap_and_sinks_by_hand():
    q, k, v = np.ones((1, 1, 1)), np.array([[[2.0]], [[-1.0]]]), np.array([[[1.0]], [[5.0]]])
    scores = 3 * np.tanh(np.array([2.0, -1.0]) / 3)
    weights = np.exp([*scores, 0.5])
    out, lse = oracle.attention(q, k, v, [1], [0, 1], sm_scale=1.0, soft_cap=3.0, sinks=np.array([0.5]))
    np.testing.assert_allclose(out[0, 0, 0], (weights[0] + 5 * weights[1]) / weights.sum())
    np.testing.assert_allclose(lse[0, 0], np.log(weights.sum()))


def test_oracle_reads_pages_in_table_order():
    rng = np.random.default_rng(1)
    k_pages, v_pages = rng.standard_normal((2, 6, 2, 4, 8))
    table = np.array([[4, 1, 3]])
    q = rng.standard_normal((2, 4, 8))
    out, _ = oracle.paged_attention(q, k_pages, v_pages, table, [10], query_starts=[0], query_lens=[2])
    k, v = (np.concatenate([p[4], p[1], p[3]], axis=1).swapaxes(0, 1)[:10] for p in (k_pages, v_pages))
    np.testing.assert_array_equal(out, oracle.attention(q, k, v, [8, 9], range(10))[0])


# Attention.


@pytest.mark.parametrize(("case", "dtype", "implementation"), list(catalogue.attention_params()))
def test_attention(case, dtype, implementation):
    problem = catalogue.build(case, dtype)
    out, lse = attention(problem, implementation=implementation, return_lse=True)
    assert_answer(problem, out, lse, dtype)


@pytest.mark.parametrize("name", LOOPED)
def test_attention_in_chunks(name, monkeypatch):
    """The xla backend takes small steps whole; here it must loop, two items of a page at a time, and join them."""
    problem = catalogue.build(BY_NAME[name], "float32")
    _, K, S, D = problem.arrays["k_pages"].shape[-4:]
    monkeypatch.setattr(xla, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(xla, "CHUNK_TOKENS", S)
    monkeypatch.setattr(xla, "KEY_ELEMENTS", 2 * S * K * D)
    traced = jax.jit(ops.paged_attention, static_argnames=tuple(n for n in STATIC if n not in problem.arrays))
    arguments = {**problem.device_arrays(), **problem.static, "return_lse": True, "implementation": "xla"}
    assert " while(" in traced.lower(**arguments).as_text("hlo")
    out, lse = traced(**arguments)
    assert_answer(problem, out, lse, "float32")


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["ragged_everything"])
def test_attention_without_jit(name, implementation):
    problem = catalogue.build(BY_NAME[name], "float32")
    out, lse = attention(problem, jit=False, implementation=implementation, return_lse=True)
    assert_answer(problem, out, lse, "float32")


@pytest.mark.parametrize("name", ["decode_mixed_lengths", "ragged", "keys_serve_as_values"])
def test_attention_by_default_supports_everything(name):
    problem = catalogue.build(BY_NAME[name], "float32")
    out, lse = attention(problem, return_lse=True)
    assert_answer(problem, out, lse, "float32")


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["ragged_everything"])
def test_attention_without_lse_gives_the_same_bits(name, implementation):
    problem = catalogue.build(BY_NAME[name], "float32")
    out, _ = attention(problem, implementation=implementation, return_lse=True)
    np.testing.assert_array_equal(attention(problem, implementation=implementation), out)


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["decode_mixed_lengths", "ragged", "ragged_window_3"])
def test_attention_does_not_depend_on_where_pages_lie(name, implementation):
    """The same tokens in other pages, among other garbage, give the same bits."""
    problem = catalogue.build(BY_NAME[name], "float32")
    arrays = problem.arrays
    P = arrays["k_pages"].shape[0]
    to = np.random.default_rng(3).permutation(P)
    moved = dict(arrays)
    for pool in ("k_pages", "v_pages"):
        moved[pool] = np.empty_like(arrays[pool])
        moved[pool][to] = np.where(np.isnan(arrays[pool]), np.inf, arrays[pool])
    moved["block_tables"] = np.where(arrays["block_tables"] >= 0, to[arrays["block_tables"]], -1).astype(
        np.int32
    )
    other = catalogue.Problem(moved, problem.static, problem.out, problem.lse)
    first = attention(problem, implementation=implementation)
    np.testing.assert_array_equal(attention(other, implementation=implementation), first)


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_attention_layer_may_be_traced(implementation):
    problem = catalogue.build(BY_NAME["ragged_layer_of_a_pool"], "float32")
    options = {name: x for name, x in problem.static.items() if name != "layer"}
    function = functools.partial(
        ops.paged_attention, **options, implementation=implementation, return_lse=True
    )
    try:
        out, lse = jax.jit(function)(**problem.device_arrays(), layer=jnp.int32(0))
    except NotImplementedError as error:
        assert implementation != "xla"
        pytest.skip(str(error))
    assert_answer(problem, out, lse, "float32")


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["decode_mixed_lengths", "ragged_window_3", "ragged_not_causal"])
def test_attention_with_a_plan_gives_the_same_bits(name, implementation):
    problem = catalogue.build(BY_NAME[name], "float32")
    arrays, case = problem.arrays, BY_NAME[name]
    lens = None if case.query_lens is None else jnp.asarray(case.query_lens, jnp.int32)
    plan = ops.plan(
        arrays["block_tables"],
        arrays["seq_lens"],
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=arrays["q"].shape[-1],
        dtype=arrays["k_pages"].dtype,
        page_size=case.page_size,
        query_lens=lens,
        num_tokens=None if lens is None else arrays["q"].shape[0],
        sliding_window=case.sliding_window,
        causal=case.causal,
    )
    out, lse = attention(problem, implementation=implementation, return_lse=True, plan=plan)
    assert_answer(problem, out, lse, "float32")
    np.testing.assert_array_equal(out, attention(problem, implementation=implementation))


@pytest.mark.parametrize("name", ["decode_mixed_lengths", "ragged_tail_of_padding"])
def test_starts_and_lens_equal_cumulative_lens(name):
    """The two ways to say which queries are whose."""
    problem = catalogue.build(BY_NAME[name], "float32")
    arrays = dict(problem.arrays)
    if "cu_query_lens" in arrays:
        ends = arrays.pop("cu_query_lens")
        arrays |= {"query_starts": ends[:-1], "query_lens": np.diff(ends)}
    else:
        lens = (arrays["seq_lens"] > 0).astype(np.int32)
        arrays |= {"query_starts": np.arange(len(lens), dtype=np.int32), "query_lens": lens}
    out, lse = attention(catalogue.Problem(arrays, problem.static, problem.out, problem.lse), return_lse=True)
    assert_answer(problem, out, lse, "float32")


# Joining attention over parts of the keys.


@pytest.mark.parametrize("dtype", catalogue.DTYPES)
@pytest.mark.parametrize(
    "name", ["ragged", "ragged_sinks", "ragged_holes", "ragged_soft_cap", "ragged_window_3"]
)
def test_merged_parts_equal_the_whole(name, dtype):
    """Holes split the pages of every row into three sets; some rows have keys in one set alone."""
    problem = catalogue.build(BY_NAME[name], dtype)
    tables = problem.arrays["block_tables"]
    outs, lses = [], []
    for part in range(3):
        mine = np.where(np.arange(tables.shape[1]) % 3 == part, tables, -1).astype(np.int32)
        arrays = {**problem.arrays, "block_tables": mine}
        if part > 0:
            arrays.pop("sinks", None)  # they belong to one set
        split = catalogue.Problem(arrays, problem.static, problem.out, problem.lse)
        out, lse = attention(split, return_lse=True)
        outs.append(out)
        lses.append(lse)
    out, lse = jax.jit(ops.merge_attention)(jnp.stack(outs), jnp.stack(lses))
    tolerance = 2 * catalogue.TOLERANCE[dtype]  # the parts are rounded too
    np.testing.assert_allclose(np.asarray(out).astype(np.float64), problem.out, tolerance, tolerance)
    np.testing.assert_allclose(lse, problem.lse, catalogue.LSE_TOLERANCE, catalogue.LSE_TOLERANCE)


def test_merge_of_nothing_is_zero():
    out, lse = ops.merge_attention(jnp.zeros((3, 2, 1, 4)), jnp.full((3, 2, 1), -jnp.inf))
    assert (out == 0).all() and jnp.isneginf(lse).all()


@pytest.mark.parametrize("no_key", [-np.inf, np.inf])
@pytest.mark.parametrize("rest", [0.0, np.nan])
def test_merge_takes_both_infinities_as_no_key(no_key, rest):
    """FlashAttention marks rows without keys by +inf; other attention leaves NaN beside its -inf."""
    outs = jnp.array([[[[2.0]], [[rest]]], [[[rest]], [[rest]]]])
    lses = jnp.array([[[0.5], [no_key]], [[no_key], [no_key]]])
    for function in (ops.merge_attention, jax.jit(ops.merge_attention)):
        out, lse = function(outs, lses)
        np.testing.assert_array_equal(out[:, 0, 0], [2, 0])
        np.testing.assert_array_equal(lse[:, 0], [0.5, -np.inf])


def test_merge_of_no_parts_is_refused():
    with pytest.raises(ValueError, match="outs"):
        ops.merge_attention(jnp.zeros((0, 2, 1, 4)), jnp.zeros((0, 2, 1)))


def test_merge_with_one_part_is_that_part():
    rng = np.random.default_rng(0)
    outs = jnp.asarray(rng.standard_normal((2, 5, 3, 4)), jnp.float32)
    lses = jnp.asarray(np.stack([rng.standard_normal((5, 3)), np.full((5, 3), -np.inf)]), jnp.float32)
    out, lse = ops.merge_attention(outs, lses)
    np.testing.assert_allclose(out, outs[0], 1e-6)
    np.testing.assert_allclose(lse, lses[0], 1e-6)


def test_merge_survives_large_scores():
    """Sums of exponentials that float32 does not hold, and parts that vanish beside others."""
    out, lse = ops.merge_attention(
        jnp.array([1.0, 3.0, 100.0]).reshape(3, 1, 1, 1), jnp.array([500.0, 500.0, -500.0]).reshape(3, 1, 1)
    )
    np.testing.assert_allclose(out.item(), 2.0, 1e-6)
    np.testing.assert_allclose(lse.item(), 500 + np.log(2), 1e-6)


# Writes.


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", catalogue.DTYPES)
@pytest.mark.parametrize("case", WRITES)
def test_write_pages(case, dtype, implementation):
    (k_pages, v_pages), (k, v), slots, expected = catalogue.build_write(case, dtype)
    try:
        pools = _write(
            k_pages, v_pages, k, v, slots.astype(np.int32), layer=case.layer, implementation=implementation
        )
    except NotImplementedError as error:
        assert implementation != "xla"
        pytest.skip(str(error))
    for found, wanted in zip(pools, expected, strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(np.asarray(found), wanted)


def test_write_pages_without_jit():
    (k_pages, v_pages), (k, v), slots, expected = catalogue.build_write(
        WRITE_BY_NAME["layer_of_a_pool"], "float32"
    )
    pools = ops.write_pages(k_pages, v_pages, k, v, jnp.asarray(slots, jnp.int32), layer=1)
    jax.tree.map(np.testing.assert_array_equal, tuple(pools), tuple(expected))


def test_write_pages_casts_to_the_pool():
    """float32 keys of a model go into a bfloat16 pool rounded to nearest."""
    k = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 8)), jnp.float32)
    pool, _ = ops.write_pages(jnp.zeros((2, 1, 4, 8), jnp.bfloat16), None, k, None, jnp.array([0, 1, 7]))
    np.testing.assert_array_equal(pool[[0, 0, 1], 0, [0, 1, 3]], k[:, 0].astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_write_pages_takes_slices_of_a_fused_projection(implementation):
    rng = np.random.default_rng(0)
    fused = rng.standard_normal((8, 4, 3, 8)).astype(np.float32)  # [T, K + K, q/k/v, D]

    def write(pool, fused, slots):
        return ops.write_pages(
            pool, pool, fused[:, ::2, 1], fused[:, 1::2, 2], slots, layer=1, implementation=implementation
        )

    slots = np.asarray((5, 3, 40, -1, 47, 8, 48, 30), np.int32)
    try:
        pools = jax.jit(write)(jnp.zeros((2, 12, 2, 4, 8)), fused, slots)
    except NotImplementedError as error:
        assert implementation != "xla"
        pytest.skip(str(error))
    for pool, new in zip(pools, (fused[:, ::2, 1], fused[:, 1::2, 2]), strict=True):
        wanted = np.zeros((2, 12, 2, 4, 8), np.float32)
        for token, slot in enumerate(slots):
            if 0 <= slot < 48:
                wanted[1, slot // 4, :, slot % 4] = new[token]
        np.testing.assert_array_equal(pool, wanted)


# Pages as blocks.


def _page_tree(*, seed: int = 0):
    """A pytree of pools with trailing shapes of their own, integers among them, as scales or codes would be."""
    rng = np.random.default_rng(seed)
    return {
        "k": jnp.asarray(rng.standard_normal((3, 9, 2, 4, 8)), jnp.bfloat16),
        "v": jnp.asarray(rng.standard_normal((3, 9, 2, 4, 5)), jnp.float16),
        "scale": (jnp.asarray(rng.standard_normal((3, 9, 2)), jnp.float32),),
        "codes": jnp.asarray(rng.integers(-128, 127, (3, 9, 4)), jnp.int8),
        "flag": jnp.asarray(rng.integers(0, 99, (3, 9)), jnp.int32),
    }


def _run_pages(function, implementation, *args):
    try:
        return jax.jit(functools.partial(function, implementation=implementation))(*args)
    except NotImplementedError as error:
        assert implementation != "xla"
        pytest.skip(str(error))


_SKIPPED = np.array([-1, 9, -9, -10, 10**9, -(2**31), 2**31 - 1], np.int32)


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_copy_pages(implementation):
    pages = _page_tree()
    src, dst = np.array([3, 3, 0, 8], np.int32), np.array([5, 1, 7, 2], np.int32)
    copied = _run_pages(ops.copy_pages, implementation, pages, src, dst)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, _copied(old, src, dst)), copied, pages)


def _copied(old, src, dst):
    wanted = np.array(old)
    for s, d in zip(src, dst, strict=True):
        if 0 <= s < wanted.shape[1] and 0 <= d < wanted.shape[1]:
            wanted[:, d] = np.asarray(old)[:, s]
    return wanted


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_copy_pages_skips_what_is_out_of_range(implementation):
    """On either side, also in between real copies; -1 must not be the last page."""
    pages = _page_tree()
    ones = np.ones_like(_SKIPPED)
    src = np.concatenate([[0], _SKIPPED, ones, [3]]).astype(np.int32)
    dst = np.concatenate([[2], ones, _SKIPPED, [4]]).astype(np.int32)
    copied = _run_pages(ops.copy_pages, implementation, pages, src, dst)
    jax.tree.map(
        lambda new, old: np.testing.assert_array_equal(new, _copied(old, [0, 3], [2, 4])), copied, pages
    )


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
@pytest.mark.parametrize("ids", [[], [-1, 9]], ids=["empty", "all_skipped"])
def test_copy_pages_of_nothing_changes_nothing(ids, implementation):
    pages = _page_tree()
    ids = np.asarray(ids, np.int32)
    jax.tree.map(
        np.testing.assert_array_equal, _run_pages(ops.copy_pages, implementation, pages, ids, ids), pages
    )


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_gather_pages(implementation):
    """Page-major blocks; ids may repeat; ids out of range give zeros."""
    pages = _page_tree()
    ids = np.concatenate([[8, 0, 3, 3], _SKIPPED, [5]]).astype(np.int32)
    blocks = _run_pages(ops.gather_pages, implementation, pages, ids)

    def compare(block, pool):
        assert block.dtype == pool.dtype
        wanted = np.zeros((len(ids), 3, *pool.shape[2:]), pool.dtype)
        for n, page in enumerate(ids):
            if 0 <= page < 9:
                wanted[n] = np.asarray(pool)[:, page]
        np.testing.assert_array_equal(np.asarray(block), wanted)

    jax.tree.map(compare, blocks, pages)


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_gather_pages_of_skipped_ids_is_zero_beside_nan(implementation):
    pages = {"k": jnp.full((2, 4, 1, 2, 8), jnp.nan)}
    assert (_run_pages(ops.gather_pages, implementation, pages, np.array([-1, 4], np.int32))["k"] == 0).all()


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_scatter_pages(implementation):
    pages, source = _page_tree(), _page_tree(seed=1)
    blocks = ops.gather_pages(source, jnp.array([1, 2, 3, 4, 5]))
    ids = np.array([7, -1, 0, 9, 8], np.int32)
    result = _run_pages(ops.scatter_pages, implementation, pages, ids, blocks)

    def compare(new, old, source):
        wanted = np.array(old)
        wanted[:, [7, 0, 8]] = np.asarray(source)[:, [1, 3, 5]]
        np.testing.assert_array_equal(np.asarray(new), wanted)

    jax.tree.map(compare, result, pages, source)


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_scatter_pages_drops_what_is_out_of_range(implementation):
    pages = _page_tree()
    blocks = jax.tree.map(lambda x: jnp.ones((len(_SKIPPED), 3, *x.shape[2:]), x.dtype), pages)
    result = _run_pages(ops.scatter_pages, implementation, pages, _SKIPPED, blocks)
    jax.tree.map(np.testing.assert_array_equal, result, pages)


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_gather_and_scatter_of_no_pages(implementation):
    pages, none = _page_tree(), np.zeros(0, np.int32)
    blocks = _run_pages(ops.gather_pages, implementation, pages, none)
    for block, pool in zip(jax.tree.leaves(blocks), jax.tree.leaves(pages), strict=True):
        assert block.shape == (0, 3, *pool.shape[2:])
    jax.tree.map(
        np.testing.assert_array_equal,
        _run_pages(ops.scatter_pages, implementation, pages, none, blocks),
        pages,
    )


@pytest.mark.parametrize("implementation", catalogue.IMPLEMENTATIONS)
def test_gather_then_scatter_restores(implementation):
    pages, ids = _page_tree(), np.array([6, 2, 4], np.int32)
    blocks = _run_pages(ops.gather_pages, implementation, pages, ids)
    wiped = jax.tree.map(lambda x: x.at[:, ids].set(0), pages)
    restored = _run_pages(ops.scatter_pages, implementation, wiped, ids, blocks)
    jax.tree.map(np.testing.assert_array_equal, restored, pages)


# Choice of backend, and errors at trace time.


def test_unknown_implementation_is_a_value_error():
    with pytest.raises(ValueError, match="implementation"):
        attention(catalogue.build(BY_NAME["ragged"], "float32"), implementation="cuda")


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_named_backend_that_cannot_says_why(implementation):
    """Float32 pools with a head_dim of 5 are nothing for a GPU kernel; CPU arrays are neither."""
    problem = catalogue.build(BY_NAME["head_dim_5"], "float32")
    with pytest.raises(NotImplementedError, match=r"\w+"):
        _attention[False](**problem.device_arrays(), **problem.static, implementation=implementation)


_GOOD = catalogue.build(BY_NAME["ragged"], "float32").device_arrays()
_SIX = jnp.zeros(6, jnp.int32)
_POOL = _GOOD["k_pages"]

BAD_ATTENTION = {
    "q: rank": ({"q": _GOOD["q"][0]}, "q"),
    "q: width": ({"q": _GOOD["q"][..., :7]}, "q"),
    "q: heads": ({"q": _GOOD["q"][:, :3]}, "q"),
    "q: integers": ({"q": jnp.zeros(_GOOD["q"].shape, jnp.int32)}, "q"),
    "k_pages: rank": ({"k_pages": _POOL[0]}, "k_pages"),
    "k_pages: layers without layer": ({"k_pages": _POOL[None]}, "layer"),
    "k_pages: one layer with layer": ({"layer": 0}, "layer"),
    "v_pages: pages": ({"v_pages": _POOL[1:]}, "v_pages"),
    "v_pages: heads": ({"v_pages": _POOL[:, :1]}, "v_pages"),
    "v_pages: slots": ({"v_pages": _POOL[:, :, :2]}, "v_pages"),
    "v_pages: dtype": ({"v_pages": _POOL.astype(jnp.bfloat16)}, "v_pages"),
    "block_tables: rank": ({"block_tables": _SIX}, "block_tables"),
    "block_tables: floats": ({"block_tables": jnp.zeros((6, 6))}, "block_tables"),
    "seq_lens: rows": ({"seq_lens": jnp.zeros(5, jnp.int32)}, "seq_lens"),
    "seq_lens: floats": ({"seq_lens": jnp.zeros(6)}, "seq_lens"),
    "cu_query_lens: rows": ({"cu_query_lens": _SIX}, "cu_query_lens"),
    "cu_query_lens: with others": ({"query_starts": _SIX, "query_lens": _SIX}, "cu_query_lens"),
    "query_lens: alone": ({"cu_query_lens": None, "query_lens": _SIX}, "query_starts"),
    "query_starts: alone": ({"cu_query_lens": None, "query_starts": _SIX}, "query_lens"),
    "query lengths: none, and T != B": ({"cu_query_lens": None}, "q"),
    "sinks: heads": ({"sinks": jnp.zeros(2)}, "sinks"),
    "sliding_window: zero": ({"sliding_window": 0}, "sliding_window"),
    "sliding_window: negative": ({"sliding_window": -4}, "sliding_window"),
    "sliding_window: float": ({"sliding_window": 3.5}, "sliding_window"),
    "sliding_window: traced float": ({"sliding_window": jnp.float32(3.5)}, "sliding_window"),
    "sliding_window: vector": ({"sliding_window": _SIX}, "sliding_window"),
    "soft_cap: zero": ({"soft_cap": 0.0}, "soft_cap"),
    "soft_cap: negative": ({"soft_cap": -2.0}, "soft_cap"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_ATTENTION)
def test_attention_names_the_bad_argument(what):
    changes, name = BAD_ATTENTION[what]
    arguments = {n: x for n, x in {**_GOOD, **changes}.items() if x is not None}
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        ops.paged_attention(**arguments)


def test_attention_names_a_layer_out_of_range():
    arguments = {**_GOOD, "k_pages": _POOL[None], "v_pages": _POOL[None]}
    for layer in (1, -1):
        with pytest.raises(ValueError, match="layer"):
            ops.paged_attention(**arguments, layer=layer)
    bad: list[Any] = [0.5, "0", jnp.zeros(2, jnp.int32)]
    for layer in bad:
        with pytest.raises((TypeError, ValueError), match="layer"):
            ops.paged_attention(**arguments, layer=layer)


_K = jnp.zeros((3, 2, 8))
_SLOTS = jnp.zeros(3, jnp.int32)
BAD_WRITE = {
    "k: width": ((_POOL, _POOL, _K[..., :4], _K, _SLOTS), "k"),
    "k: heads": ((_POOL, _POOL, _K[:, :1], _K, _SLOTS), "k"),
    "v: tokens": ((_POOL, _POOL, _K, _K[:2], _SLOTS), "v"),
    "v: width": ((_POOL, _POOL, _K, _K[..., :4], _SLOTS), "v"),
    "v: missing": ((_POOL, _POOL, _K, None, _SLOTS), "v"),
    "v: too many": ((_POOL, None, _K, _K, _SLOTS), "v"),
    "slot_mapping: tokens": ((_POOL, _POOL, _K, _K, _SLOTS[:2]), "slot_mapping"),
    "slot_mapping: floats": ((_POOL, _POOL, _K, _K, jnp.zeros(3)), "slot_mapping"),
    "k_pages: layers without layer": ((_POOL[None], _POOL[None], _K, _K, _SLOTS), "layer"),
    "v_pages: pages": ((_POOL, _POOL[1:], _K, _K, _SLOTS), "v_pages"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_WRITE)
def test_write_pages_names_the_bad_argument(what):
    arguments, name = BAD_WRITE[what]
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        ops.write_pages(*arguments)


_PAGES = _page_tree()
_IDS = jnp.zeros(2, jnp.int32)
_BLOCKS = jax.tree.map(lambda x: jnp.zeros((2, 3, *x.shape[2:]), x.dtype), _PAGES)
BAD_PAGES = {
    "dst: length": (ops.copy_pages, (_PAGES, _IDS, _IDS[:1]), "dst"),
    "src: floats": (ops.copy_pages, (_PAGES, jnp.zeros(2), _IDS), "src"),
    "copy: no pages": (ops.copy_pages, ({}, _IDS, _IDS), "pages"),
    "copy: leaves differ": (ops.copy_pages, ({"k": _PAGES["k"], "v": _PAGES["v"][:, 1:]}, _IDS, _IDS), "pages"),
    "gather: no pages": (ops.gather_pages, ((), _IDS), "pages"),
    "gather: rank": (ops.gather_pages, (_PAGES, _IDS[None]), "page_ids"),
    "gather: floats": (ops.gather_pages, (_PAGES, jnp.zeros(2)), "page_ids"),
    "blocks: count": (ops.scatter_pages, (_PAGES, _IDS[:1], _BLOCKS), "blocks"),
    "blocks: structure": (ops.scatter_pages, (_PAGES, _IDS, {"k": _BLOCKS["k"]}), "blocks"),
    "blocks: dtype": (
        ops.scatter_pages,
        (_PAGES, _IDS, {**_BLOCKS, "k": _BLOCKS["k"].astype(jnp.float32)}),
        "blocks",
    ),
    "outs: rank": (ops.merge_attention, (jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 4))), "outs"),
    "lses: heads": (ops.merge_attention, (jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 3, 5))), "lses"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_PAGES)
def test_page_ops_name_the_bad_argument(what):
    function, arguments, name = BAD_PAGES[what]
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        function(*arguments)


@pytest.mark.parametrize("index", [-1, 2, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("form", [None, "int8"])
def test_an_index_past_the_layers_names_none(index, jit, form):
    """As an array it may be traced: nothing is written and attention sees nothing, where JAX would wrap or clip."""
    wrap = jax.jit if jit else lambda f: f
    pool: Any = jnp.ones((2, 4, 1, 2, 8))
    if form:
        pool = ops.QuantizedPages(pool.astype(jnp.int8), jnp.ones((2, 4, 1, 2)))
    new, slots, layer = jnp.full((3, 1, 8), 5.0), jnp.array([0, 3, 7]), jnp.int32(index)
    written = wrap(functools.partial(ops.write_pages, implementation="xla"))(
        pool, pool, new, new, slots, layer=layer
    )
    jax.tree.map(np.testing.assert_array_equal, written, (pool, pool))
    out, lse = wrap(functools.partial(ops.paged_attention, return_lse=True, implementation="xla"))(
        jnp.ones((1, 2, 8)), pool, pool, jnp.array([[3, 1]]), jnp.array([3]), layer=layer
    )
    assert (out == 0).all() and jnp.isneginf(lse).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int64, list])
@pytest.mark.parametrize("on", ["host", "device"])
def test_slot_mappings_of_every_integer_type(dtype, on):
    pool, new = jnp.zeros((4, 1, 2, 8)), jnp.ones((4, 1, 8))
    past = 100 if dtype in (np.uint8, np.uint16, np.int8) else 2**31 + 1 if dtype is np.uint32 else 2**40 + 1
    slots: Any = [1, 7, past, 0]
    if dtype is not list:
        slots = np.array(slots, dtype)
    wanted, _ = ops.write_pages(pool, None, new, None, jnp.array([1, 7, -1, 0]))
    with jax.enable_x64(on == "device"):
        slots = jnp.asarray(np.asarray(slots)) if on == "device" else slots
        found, _ = ops.write_pages(pool, None, new, None, slots, implementation="xla")
    np.testing.assert_array_equal(found, wanted)


def test_integers_past_int32_are_refused_by_name_wherever_they_come_from():
    pool, lens = jnp.zeros((4, 1, 2, 8)), jnp.array([3])
    attend: Any = functools.partial(ops.paged_attention, jnp.ones((1, 1, 8)), pool, pool)
    copy, gather = (functools.partial(op, pool[None]) for op in (ops.copy_pages, ops.gather_pages))
    for past in (np.array([2**31]), np.array([2**32 + 1], np.uint64), [2**31], [2**70]):
        value: Any = past
        table: Any = [value] if isinstance(value, list) else value[None]
        for name, call in {
            "block_tables": lambda table=table: attend(table, lens),
            "seq_lens": lambda value=value: attend(np.array([[0, 1]]), value),
            "src": lambda value=value: copy(value, lens),
            "dst": lambda value=value: copy(lens, value),
            "page_ids": lambda value=value: gather(value),
        }.items():
            with pytest.raises(ValueError, match=rf"{name}.*int32"):
                call()
    with pytest.raises(ValueError, match=r"sliding_window.*2147483647"):
        attend(np.array([[0, 1]]), lens, sliding_window=2**31)


def test_wide_integers_on_the_device_stay_out_of_range():
    """Their values may be traced: cut to int32's ends, where a wrapped one could name a page."""
    pool = jnp.arange(4.0).reshape(1, 4)
    with jax.enable_x64(True):
        for ids in (jnp.array([2**32 + 1, -(2**32) + 1]), jnp.array([2**32 + 1, 2**63], jnp.uint64)):
            for function in (ops.gather_pages, jax.jit(ops.gather_pages)):
                np.testing.assert_array_equal(function(pool, ids), [[0.0], [0.0]])


def test_messages_say_what_was_expected_and_what_came():
    with pytest.raises(ValueError) as error:
        ops.paged_attention(**{**_GOOD, "seq_lens": jnp.zeros(5, jnp.int32)})
    assert re.search(r"6", str(error.value)) and "int32[5]" in str(error.value)


# Which backend.


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU that no kernel runs on, as far as the backends are told."""
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA V100", compute_capability="7.0")
    monkeypatch.setattr(_checks, "default_device", lambda: device)
    monkeypatch.setattr("paxcache.kernels.triton._triton.default_device", lambda: device)
    ops._warn_of_xla.cache_clear()


CONFIG = paxcache.CacheConfig(
    groups=(
        paxcache.LayerGroup(num_layers=2, num_kv_heads=2, head_dim=64, num_heads=8),
        paxcache.LayerGroup(
            num_layers=1, num_kv_heads=1, head_dim=32, v_head_dim=0, quantization="int8", sliding_window=9
        ),
        paxcache.LayerGroup(
            num_layers=1, num_kv_heads=1, head_dim=8, quantization="int8", scales="per_tensor"
        ),
    ),
    num_pages=16,
    max_seqs=3,
    max_pages_per_seq=8,
)


@pytest.mark.parametrize("sizes", [{}, {"num_tokens": 40}, {"num_tokens": 6, "max_query_len": 2}])
def test_explain_names_a_backend_for_every_op(sizes):
    explained = ops.explain(CONFIG, **sizes)
    assert len(explained) == 3
    for choices in explained:
        assert set(choices) == {
            "paged_attention", "write_pages", "copy_pages", "gather_pages", "scatter_pages",
        }  # fmt: skip
        if _checks.default_device().platform == "cpu":
            for backend, reasons in choices.values():
                assert backend == "xla"
                assert list(reasons) == ["mosaic_gpu", "triton"]


def test_explain_tells_the_reasons(old_gpu):
    for choices in ops.explain(CONFIG):
        for backend, reasons in choices.values():
            assert backend == "xla"
            assert re.search(r"compute capability 9\.0.*V100.* has 7\.0", reasons["mosaic_gpu"])
            assert re.search(r"compute capability 8\.0 or more", reasons["triton"])


def test_the_plain_form_on_a_gpu_warns_once_with_the_reason(old_gpu, recwarn):
    pool, ids = jnp.zeros((2, 4)), jnp.array([3, -1])
    with pytest.warns(UserWarning, match=r"ops\.gather_pages .* mosaic_gpu needs .*; triton needs"):
        ops.gather_pages(pool, ids)
    recwarn.clear()
    ops.gather_pages(pool, ids)
    ops.gather_pages(pool, ids, implementation="xla")
    ops.copy_pages(pool, ids, ids, implementation="xla")
    assert not recwarn.list


def test_a_refusal_of_all_backends_shows_all_reasons(monkeypatch):
    def refuse(reason):
        def function(*_):
            raise NotImplementedError(reason)

        return types.SimpleNamespace(gather_pages=function)

    backends = {
        name: functools.partial(refuse, f"reason of {name}") for name in ("mosaic_gpu", "triton", "xla")
    }
    monkeypatch.setattr(ops.kernels, "BACKENDS", backends)
    with pytest.raises(NotImplementedError, match=r"gather_pages: .*mosaic_gpu.*; .*triton.*; .*xla"):
        ops.gather_pages(jnp.zeros((2, 4)), jnp.array([3]))


def test_all_is_what_is_public():
    assert all(hasattr(ops, name) for name in ops.__all__)
    with pytest.raises(TypeError, match="head_dim"):
        ops.plan(jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), num_kv_heads=1, page_size=8)  # type: ignore


# Steps that know their sizes.


def test_extend_hands_known_query_heads_to_the_plan(monkeypatch):
    seen = []
    own = ops.plan

    def plan(*arguments, **options):
        seen.append(options["num_heads"])
        return own(*arguments, **options)

    monkeypatch.setattr(ops, "plan", plan)
    cache = paxcache.init(dataclasses.replace(CONFIG, groups=CONFIG.groups[:2]))
    jax.eval_shape(functools.partial(paxcache.extend, num_tokens=7), cache, jnp.ones(3, jnp.int32))
    assert seen == [8, None]


def test_query_heads_must_be_a_multiple():
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads=2, got 5"):
        paxcache.LayerGroup(num_layers=2, num_kv_heads=2, head_dim=64, num_heads=5)


def test_a_packed_step_of_short_rows():
    """It is the packed step, but for rows that ask for more than they may, which are refused."""
    config = dataclasses.replace(CONFIG, groups=CONFIG.groups[:1])
    cache, lens = paxcache.init(config), jnp.array([2, 3, 1])
    _, step = paxcache.extend(cache, lens, num_tokens=8)
    _, short = paxcache.extend(cache, lens, num_tokens=8, max_query_len=3)
    assert (step.max_query_len, short.max_query_len) == (8, 3)
    for name in ("positions", "rows", "query_starts", "query_lens", "seq_lens", "status", "slot_mapping"):
        jax.tree.map(np.testing.assert_array_equal, getattr(short, name), getattr(step, name))
    grown, step = paxcache.extend(cache, lens, num_tokens=8, max_query_len=2)
    assert step.status.tolist() == [paxcache.Status.OK, paxcache.Status.STEP_FULL, paxcache.Status.OK]
    assert grown.seq_lens.tolist() == [2, 0, 1]
    assert step.query_starts.tolist() == [0, 2, 5]

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((8, n, 64)), jnp.bfloat16) for n in (8, 2, 2))
    outs = []
    both: list[dict[str, Any]] = [{"num_tokens": 8}, {"num_tokens": 8, "max_query_len": 3}]
    for sizes in both:
        grown, step = paxcache.extend(cache, lens, **sizes)
        outs.append(paxcache.attend(paxcache.append(grown, 0, k, v, step), 0, q, step).astype(jnp.float32))
    np.testing.assert_allclose(*outs, rtol=2e-2, atol=2e-2)
