"""The Hopper prefill kernel, and the choice between it and the decode kernel: interpreted, compiled, run on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.sharding import PartitionSpec as Spec

import aot
import rows
from paxcache.kernels._request import Pools, Rows, Scores
from paxcache.kernels.sm90 import _mosaic, attention, decode, decode_plan, mixed, prefill, prefill_plan
from paxcache.kernels.sm90.operands import check_supported
from rows import Case, make_inputs, pool_shape, request, rows_of, shapes_of

CASES = {
    "one row on a context": Case(lens=(200,), query_lens=(150,), head_dim=128, kv_heads=1, group=2),
    "prompts, single tokens, idle rows, gaps": Case(
        lens=(390, 300, 140, 77, 3, 128, 0), query_lens=(150, 1, 40, 1, 3, 64, 0), group=2, gaps=True
    ),
    "odd group, pages of 64": Case(lens=(390, 30, 200), query_lens=(150, 20, 140), kv_heads=1, group=3, page_size=64),
    "window, holes, sinks, soft cap": Case(
        lens=(390, 230, 100), query_lens=(100, 20, 70), kv_heads=1, group=2, window=100, sinks=True, soft_cap=2.0,
        holes=((0, 18), (1, 9), (2, 1), (2, 3)),
    ),
    "window whose left is gone": Case(
        lens=(500,), query_lens=(130,), kv_heads=1, group=2, window=100, holes=tuple((0, x) for x in range(16))
    ),
    "window without holes": Case(lens=(500,), query_lens=(200,), kv_heads=1, group=2, window=150),
    "holes, one row all hole": Case(
        lens=(290, 40), query_lens=(80, 20), kv_heads=1, group=2,
        holes=((0, 0), (0, 5), (0, 18), (1, 0), (1, 1), (1, 2)),
    ),
    "head dim 256, pages of 8": Case(
        lens=(190, 30), query_lens=(100, 20), kv_heads=1, group=2, head_dim=256, page_size=8
    ),
    "head dim 96, not causal, float16, pages of 128": Case(
        lens=(190, 130), query_lens=(100, 20), kv_heads=1, group=2, head_dim=96, page_size=128, causal=False,
        dtype=jnp.float16,
    ),
    "head dim 96, odd ends": Case(
        lens=(190, 30, 90), query_lens=(99, 21, 63), kv_heads=1, group=2, head_dim=96, page_size=32
    ),
    "a window of all, not causal": Case(
        lens=(150,), query_lens=(70,), kv_heads=1, group=2, window=2**31 - 1, causal=False
    ),
    "fp8_e4m3, prompts, single tokens, gaps": Case(
        lens=(390, 300, 140, 3), query_lens=(150, 1, 40, 3), head_dim=128, kv_heads=1, group=2, gaps=True,
        quantization="fp8_e4m3",
    ),
    "int8, window, holes, sinks, float16": Case(
        lens=(390, 230), query_lens=(100, 70), kv_heads=1, group=2, window=100, sinks=True, page_size=8,
        holes=((0, 38), (1, 19)), dtype=jnp.float16, quantization="int8",
    ),
    "int4, scales of layers": Case(
        lens=(200, 30), query_lens=(90, 20), head_dim=128, kv_heads=1, group=3, page_size=48, quantization="int4",
        layer_scales=True,
    ),
    "fp8_e5m2, head dim 96": Case(
        lens=(190,), query_lens=(100,), head_dim=96, kv_heads=1, group=2, page_size=128, quantization="fp8_e5m2"
    ),
    "float32, ragged, idle rows, gaps, window": Case(
        lens=(50, 0, 60, 1), query_lens=(20, 0, 33, 1), kv_heads=1, group=3, gaps=True, tail=20, window=25,
        dtype=jnp.float32,
    ),
    "float32, not causal, sinks": Case(
        lens=(40, 30), query_lens=(17, 16), kv_heads=1, group=2, causal=False, sinks=True, dtype=jnp.float32
    ),
    "nothing to decode, idle row, gaps, tail": Case(
        lens=(90, 0, 60), query_lens=(70, 0, 33), kv_heads=1, group=2, gaps=True, tail=40
    ),
    "many rows decode beside prompts": Case(
        lens=(600,) * 30 + (300, 0, 70), query_lens=(1,) * 30 + (250, 0, 70), kv_heads=2, group=4, head_dim=128,
        gaps=True, tail=300,
    ),
    "fewer tokens than a tile": Case(lens=(50, 20), query_lens=(20, 1), kv_heads=2, group=1, sinks=True),
}  # fmt: skip


def assert_right(case: Case, inputs: dict[str, Any], out: jax.Array, lse: jax.Array) -> None:
    # Prefill multiplies quantised numbers as the queries' dtype can hold them.
    rounding = 0.0 if case.quantization is None else 2 * float(jnp.finfo(case.dtype).eps)
    rows.assert_right(case, inputs, out, lse, lse_tolerance=max(1e-4, rounding))


def run(
    case: Case, inputs: dict[str, Any], *, return_lse: bool = True, **options: Any
) -> tuple[jax.Array, jax.Array | None]:
    def attend(inputs):
        arguments = request(case, inputs, return_lse=return_lse)
        return attention.paged_attention(*arguments, max_query_len=inputs["q"].shape[0], **options)

    return jax.jit(attend)(inputs)


@pytest.fixture
def few_programs(monkeypatch):
    """Launches of a size that the interpreter gets through."""
    own_prefill, own_decode = prefill.default_config, decode.default_config

    def small_prefill(**options):
        return dataclasses.replace(own_prefill(**options), num_programs=3, key_stages=2, value_stages=2)

    def small_decode(shapes, **options):
        made = own_decode(shapes, **options)
        return dataclasses.replace(
            made, num_programs=2 * made.lanes, min_programs=2 * made.lanes, num_stages=2
        )

    monkeypatch.setattr(prefill, "default_config", small_prefill)
    monkeypatch.setattr(decode, "default_config", small_decode)


def busy_blocks(plan: decode_plan.Plan) -> int:
    """Thread blocks that decode in a launch of both kinds."""
    config = plan.made_for.config
    return int(plan.lines[config.num_programs // config.lanes, decode_plan.OfRow.BUSY_BLOCKS])


@pytest.mark.parametrize(
    ("lens", "query_lens", "busy"),
    [
        pytest.param((600, 40, 0, 350, 33), (1, 40, 0, 1, 20), 2, id="some blocks decode"),
        pytest.param((30, 200), (1, 130), 4, id="all blocks, then all prefill"),
        pytest.param((0, 40, 33), (0, 40, 20), 0, id="nothing to decode"),
        pytest.param((150, 0, 70), (1, 0, 1), 4, id="nothing to prefill"),
    ],
)
def test_interpreted_in_one_launch(lens, query_lens, busy, monkeypatch):
    """Of blocks that decode and blocks that prefill, as on four SMs of which two read as fast as all."""
    own = mixed.configs

    def few(*arguments, **options):
        made = own(*arguments, **options)
        assert made is not None
        programs = 8 * made[0].lanes
        return dataclasses.replace(made[0], num_programs=programs), dataclasses.replace(
            made[1], num_programs=4
        )

    monkeypatch.setattr(mixed, "configs", few)
    monkeypatch.setattr(mixed, "MOST_READERS", 2)
    case = Case(lens=lens, query_lens=query_lens, kv_heads=1, gaps=True, tail=20, sinks=True, window=1000)
    inputs = make_inputs(case, seed=1)
    plan = make_plan(case, inputs, limits=_mosaic.DeviceLimits())
    assert plan is not None
    assert busy_blocks(plan.decode) == busy
    out, lse = run(case, inputs, plan=plan, interpret=_mosaic.interpreter(detect_races=True))
    assert lse is not None
    assert_right(case, inputs, out, lse)
    assert not interpret_pallas_call.get_races().races_found


def shared_plan(lens: list[int], query_lens: list[int]) -> tuple[Any, Any]:
    """The plans of a step of a model of 32 and 8 heads of 128, for an H200."""
    num_tokens, starts = sum(query_lens), np.cumsum([0, *query_lens[:-1]])
    arrays = (
        jnp.asarray(x, jnp.int32)
        for x in (np.zeros((len(lens), max(lens) // 16 + 1)), lens, starts, query_lens)
    )
    case = Case(lens=(), kv_heads=8, head_dim=128)
    shapes = shapes_of(case, num_rows=len(lens), num_tokens=num_tokens, max_query_len=num_tokens)
    plan = attention.make_plan(Rows(*arrays), shapes, limits=_mosaic.DeviceLimits())
    assert plan is not None
    return plan.decode, plan.prefill


@pytest.mark.parametrize(
    ("lens", "query_lens", "decoding", "prefilling"),
    [
        pytest.param(
            [4096] * 60 + [5120] * 4, [1] * 60 + [1024] * 4, (16, 32), (100, 116), id="as much of both"
        ),
        pytest.param([4096] * 120 + [2048], [1] * 120 + [512], (60, 64), (68, 72), id="much to decode"),
        pytest.param([1024] * 8 + [8192], [1] * 8 + [8192], (132, 132), (132, 132), id="little to decode"),
        pytest.param([600] * 16, [600] * 16, (0, 0), (132, 132), id="nothing to decode"),
        pytest.param([600] * 60, [1] * 60, (132, 132), (132, 132), id="nothing to prefill"),
    ],
)
def test_share_of_the_sms(lens, query_lens, decoding, prefilling):
    of_decode, of_prefill = shared_plan(lens, query_lens)
    config = of_decode.made_for.config
    num_ranges, busy = config.num_programs // config.lanes, busy_blocks(of_decode)
    assert decoding[0] <= busy <= decoding[1]
    assert prefilling[0] <= of_prefill.lines[0, prefill_plan.Head.PROGRAMS] <= prefilling[1]
    # All tiles lie in ranges of blocks that have work.
    tiles = np.asarray(of_decode.lines[:num_ranges, decode_plan.OfRange.TILES])
    assert tiles.sum() == sum(-(-n // 64) for n, q in zip(lens, query_lens, strict=True) if q == 1)
    assert not tiles[busy * config.consumers // config.lanes :].any()


# What they add, other cases show too, and the interpreter takes its time.
ON_GPU_ALONE = {
    "many rows decode beside prompts",
    "one row on a context",
    "window without holes",
    "window whose left is gone",
    "a window of all, not causal",
    "head dim 256, pages of 8",
    "fp8_e5m2, head dim 96",
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ON_GPU_ALONE])
def test_interpreted_without_races(name, few_programs):
    case = CASES[name]
    inputs = make_inputs(case, seed=len(name))
    inputs["q"] = jnp.pad(
        inputs["q"], ((0, max(0, 17 - inputs["q"].shape[0])), (0, 0), (0, 0))
    )  # a mixed step
    out, lse = run(case, inputs, interpret=_mosaic.interpreter(detect_races=True))
    assert lse is not None
    assert_right(case, inputs, out, lse)
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize("sign", [-1.0, 0.0])
def test_scale_that_is_not_positive(few_programs, sign):
    case = Case(lens=(70,), query_lens=(40,), kv_heads=1, group=2)
    inputs = make_inputs(case, seed=0)
    wanted, _ = run(case, inputs | {"q": inputs["q"] * sign}, interpret=_mosaic.interpreter())

    def f(scale):
        arguments = request(case, inputs, return_lse=False, sm_scale=scale)
        return attention.paged_attention(*arguments, max_query_len=40, interpret=_mosaic.interpreter())[0]

    np.testing.assert_array_equal(np.asarray(wanted), np.asarray(f(jnp.float32(sign * case.head_dim**-0.5))))


def test_under_vmap():
    case = Case(lens=(70,), query_lens=(64,), kv_heads=1, group=2)
    inputs = make_inputs(case, seed=0)
    config = prefill.Config(
        num_programs=1, block_kv=128, key_stages=2, value_stages=2, output_over_queries=False
    )
    shape = prefill_plan.plan_shape(num_rows=1, num_tokens=64, group=2, page_size=16, config=config)
    plan = prefill_plan.prefill_plan(rows_of(inputs), shape)

    def f(q):
        _, pools, (tables, *_), scores = request(case, inputs)
        options = {"plan": plan, "interpret": _mosaic.interpreter()}
        return prefill.prefill(jnp.zeros_like(q), None, q, pools, tables, scores, **options)[0]

    qs = jnp.stack([inputs["q"], 2 * inputs["q"]])
    np.testing.assert_array_equal(jax.vmap(f)(qs), jnp.stack([f(q) for q in qs]))


def test_shard_map_over_heads(cpu_devices):
    """Only traced: the interpreter checks at the end of one device's kernel that no device holds a barrier."""
    case = Case(lens=(70, 90), query_lens=(40, 1), kv_heads=2, group=1)
    inputs = make_inputs(case, seed=0) | {"sinks": jnp.ones(2)}
    heads = {"q": Spec(None, "kv"), "k_pages": Spec(None, None, "kv"), "v_pages": Spec(None, None, "kv")}
    specs = {name: Spec() for name in inputs} | heads | {"sinks": Spec("kv")}
    mesh = jax.sharding.Mesh(np.array(cpu_devices), ("kv",))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=Spec(None, "kv"))
    def attend(inputs):
        return run(case, inputs)

    out, lse = jax.eval_shape(jax.jit(attend), inputs)
    assert (out.shape, lse.shape) == (inputs["q"].shape, inputs["q"].shape[:2])


def test_in_shard_map(cpu_devices):
    """On a mesh of one device values have the types of many, and the interpreter can run."""
    case = Case(lens=(30, 9), kv_heads=1)
    inputs = make_inputs(case, seed=0)
    config = decode.default_config(shapes_of(case))
    config = dataclasses.replace(config, num_programs=2, min_programs=2, lanes=1)
    mesh = jax.sharding.Mesh(np.array(cpu_devices[:1]), ("kv",))
    heads = {"q": Spec(None, "kv"), "k_pages": Spec(None, None, "kv"), "v_pages": Spec(None, None, "kv")}

    def attend(inputs):
        arguments = request(case, inputs, return_lse=False)
        return decode.decode(*arguments, config=config, interpret=_mosaic.interpreter())[0]

    specs = {name: heads.get(name, Spec()) for name in inputs}
    sharded = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=Spec(None, "kv")))
    np.testing.assert_array_equal(sharded(inputs), attend(inputs))


def make_plan(
    case: Case, inputs: dict[str, Any], limits: _mosaic.DeviceLimits | None = None, **changes: Any
) -> attention.Plan | None:
    rows, T = rows_of(inputs), inputs["q"].shape[0]
    shapes = shapes_of(case, num_rows=len(rows.tables), num_tokens=T, max_query_len=T, **changes)
    return attention.make_plan(rows, shapes, sliding_window=case.window, causal=case.causal, limits=limits)


def test_plan_without_query_heads_is_none():
    """But what no kernel can do is refused all the same."""
    case = Case(lens=(70, 9), query_lens=(40, 1), kv_heads=2)
    inputs = make_inputs(case, seed=0)
    assert make_plan(case, inputs, num_heads=None) is None
    with pytest.raises(NotImplementedError, match="head_dim must be"):
        make_plan(dataclasses.replace(case, head_dim=80), inputs, num_heads=None)


def test_plan_that_fits_is_used(few_programs, monkeypatch):
    case = Case(lens=(70, 9), query_lens=(40, 1), kv_heads=2, group=3)
    inputs = make_inputs(case, seed=0)
    plan = make_plan(case, inputs)

    def refuse(*_, **__):
        raise AssertionError("made a plan of its own")

    monkeypatch.setattr(attention.decode_plan, "decode_plan", refuse)
    monkeypatch.setattr(attention.prefill_plan, "prefill_plan", refuse)
    out, lse = run(case, inputs, interpret=_mosaic.interpreter(), plan=plan)
    assert lse is not None
    assert_right(case, inputs, out, lse)


def test_plan_of_another_shape_is_not_used(few_programs):
    case = Case(lens=(70, 9), query_lens=(40, 1), kv_heads=2, group=2)
    inputs = make_inputs(case, seed=0)
    other = make_plan(dataclasses.replace(case, kv_heads=1, group=3), inputs)
    out, lse = run(case, inputs, interpret=_mosaic.interpreter(), plan=other)
    assert lse is not None
    assert_right(case, inputs, out, lse)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (90, True), (300, False)])
def test_plan_covers_what_is_seen(seed, window, causal):
    """Every query token stands in one tile, whose blocks hold all that it sees; blocks unmasked are seen in full."""
    p, rng = prefill_plan, np.random.default_rng(seed)
    queries = rng.choice([0, 1, 2, 63, 64, 65, 200, 511], 5)
    lens = queries + rng.choice([0, 1, 100, 640], 5)
    gaps = rng.integers(0, 3, 5)
    starts = np.cumsum(queries + gaps) - queries
    T = max(int(starts[-1] + queries[-1]), 64)
    tables = rng.integers(0, 99, (5, 80))
    holed = rng.integers(0, 5)
    tables[holed, 0] = -1
    config = p.Config(num_programs=4, block_kv=128, key_stages=2, value_stages=2, output_over_queries=False)
    shape = p.plan_shape(num_rows=5, num_tokens=T, group=4, page_size=16, min_query_len=2, config=config)
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in (tables, lens, starts, queries)))
    made = p.prefill_plan(rows, shape, sliding_window=window, causal=causal)
    lines = np.asarray(made.lines)
    count = lines[0, 0]
    assert count <= len(lines) - 1
    seen, multiplied = [], []
    for line in lines[1 : count + 1]:
        row, length = line[p.Tile.ROW], line[p.Tile.LENGTH]
        assert length == lens[row]
        assert 0 <= line[p.Tile.TOKEN] <= T - 64
        assert 1 <= line[p.Tile.FULL_BEGIN] <= line[p.Tile.FULL_END] <= line[p.Tile.BLOCKS]
        assert line[p.Tile.HOLES_END] in (0, line[p.Tile.FULL_BEGIN])
        first_key = line[p.Tile.FIRST_BLOCK] * 128
        end_key = first_key + line[p.Tile.BLOCKS] * 128
        full = end_key - 128 * line[p.Tile.FULL_END], end_key - 128 * line[p.Tile.FULL_BEGIN]
        last_key = (
            line[p.Tile.POSITION] + line[p.Tile.SKIP] + line[p.Tile.COUNT] - 1 if causal else length - 1
        )
        is_half = line[p.Tile.BLOCKS] <= p.FEW_BLOCKS and last_key < end_key - 64
        multiplied.append(128 * line[p.Tile.BLOCKS] - 64 * is_half)
        for i in range(line[p.Tile.SKIP], line[p.Tile.SKIP] + line[p.Tile.COUNT]):
            token, position = line[p.Tile.TOKEN] + i, line[p.Tile.POSITION] + i
            assert position == length - queries[row] + token - starts[row]
            seen.append((row, token - starts[row]))
            low = 0 if window is None else max(0, position - window + 1)
            high = position + 1 if causal else length
            assert first_key <= low
            assert high <= end_key
            if full[0] < full[1]:
                assert low <= full[0]
                assert full[1] <= high
        if row == holed and (
            window is None or line[p.Tile.FULL_BEGIN] == line[p.Tile.FULL_END] == line[p.Tile.BLOCKS]
        ):
            assert line[p.Tile.HOLES_END] == line[p.Tile.BLOCKS]
    assert (np.diff(multiplied) <= 0).all()  # the most expensive first
    assert sorted(seen) == [(b, i) for b in range(5) if queries[b] >= 2 for i in range(queries[b])]


def test_long_float32_rows_with_a_window_must_be_causal():
    case = Case(lens=(40,), query_lens=(17,), kv_heads=1, window=5, causal=False, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=r"more than 16 query tokens .* must be causal"):
        run(case, make_inputs(case, seed=0), interpret=_mosaic.interpreter())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kv_dtype": jnp.int16, "q_dtype": jnp.int16}, "bfloat16, float16, float32 or quantised"),
        ({"kv_dtype": jnp.float32}, "share a dtype"),
        ({"kv_dtype": jnp.int8, "q_dtype": jnp.float32}, "quantised pages must be bfloat16 or float16"),
        ({"kv_dtype": jnp.uint8, "head_dim": 64, "v_head_dim": 64}, "multiple of 128"),
        ({"q_dtype": jnp.float32}, "share a dtype"),
        ({"v_head_dim": 64}, "one width"),
        ({"head_dim": 80, "v_head_dim": 80}, "head_dim must be"),
        ({"page_size": 12}, "multiple of 8"),
        ({"limits": _mosaic.DeviceLimits(compute_capability=(8, 0))}, "Hopper"),
    ],
)
def test_refusals_name_the_reason(change, reason):
    supported = {
        "head_dim": 128, "v_head_dim": 128, "page_size": 16, "q_dtype": jnp.bfloat16, "kv_dtype": jnp.bfloat16,
    }  # fmt: skip
    check_supported("a kernel", **supported)
    with pytest.raises(NotImplementedError, match=f"a kernel: .*{reason}"):
        check_supported("a kernel", **supported | change)


# Every value of every feature; `all_features` is the full product.
FEATURES = [
    Case(lens=(), kv_heads=8, head_dim=128),
    Case(lens=(), kv_heads=2, head_dim=64, group=8, window=100, soft_cap=30.0, sinks=True),
    Case(lens=(), kv_heads=8, head_dim=96, group=5, page_size=64, dtype=jnp.float16, window=100),
    Case(lens=(), kv_heads=1, head_dim=128, group=7, page_size=128, causal=False, sinks=True),
    Case(lens=(), kv_heads=8, head_dim=128, group=4, page_size=8, window=100, sinks=True),
    Case(lens=(), kv_heads=4, head_dim=192, group=4, page_size=8, soft_cap=30.0),
    Case(lens=(), kv_heads=4, head_dim=256, group=2),
    Case(lens=(), kv_heads=8, head_dim=128, quantization="fp8_e4m3"),
    Case(
        lens=(),
        kv_heads=8,
        head_dim=128,
        quantization="int8",
        layer_scales=True,
        dtype=jnp.float16,
        window=100,
    ),
    Case(lens=(), kv_heads=2, head_dim=128, group=5, quantization="int4", page_size=64, soft_cap=30.0),
]


def all_features() -> list[Case]:
    """Too many to compile at every change: ``python tests/test_prefill.py`` does."""
    return [
        Case(
            lens=(), kv_heads=8, head_dim=head_dim, group=group, page_size=page_size, dtype=dtype, window=window,
            soft_cap=soft_cap, sinks=window is not None,
        )
        for head_dim in (64, 96, 128, 192, 256)
        for dtype in (jnp.bfloat16, jnp.float16)
        for group in (1, 4, 5)
        for page_size, window, soft_cap in (
            (16, None, None), (128, 100, None), (8, None, 30.0), (48, 100, 30.0), (16, 100, 30.0),
        )
    ]  # fmt: skip


def compile_case(case: Case) -> aot.Compiled:
    B, M, P, T = 16, 64, 1000, 2048
    H, i32, f32 = case.kv_heads * case.group, jnp.int32, jnp.float32
    row, scalar = jax.ShapeDtypeStruct((B,), i32), jax.ShapeDtypeStruct((), i32)
    q = jax.ShapeDtypeStruct((T, H, case.head_dim), case.dtype)
    pool = pool_shape(case, P)
    limits = _mosaic.DeviceLimits()
    config = prefill.default_config(head_dim=case.head_dim, dtype=case.kv_dtype, limits=limits)

    def f(out, lse, q, k, v, layer, tables, lens, starts, query_lens, scale, window, sinks):
        window = None if case.window is None else window
        shape = prefill_plan.plan_shape(
            num_rows=B, num_tokens=T, group=case.group, page_size=case.page_size, config=config
        )
        rows = Rows(tables, lens, starts, query_lens)
        plan = prefill_plan.prefill_plan(rows, shape, sliding_window=window, causal=case.causal)
        scores = Scores(scale, case.soft_cap, window, sinks if case.sinks else None, case.causal)
        return prefill.prefill(out, lse, q, Pools(k, v, layer), tables, scores, plan=plan)

    lse, sinks, scale = (jax.ShapeDtypeStruct(x, f32) for x in ((T, H), (H,), ()))
    tables = jax.ShapeDtypeStruct((B, M), i32)
    args = q, lse, q, pool, pool, scalar, tables, row, row, row, scale, scalar, sinks
    return aot.compile_for_h200(f, *args, donate=(0, 1))


def assert_fits(case: Case, compiled: aot.Compiled) -> None:
    (kernel,) = compiled.kernels
    assert kernel.spill_bytes == 0
    sizes = ",".join(map(str, jax.tree.leaves(pool_shape(case, 1000))[0].shape))
    assert not re.search(rf"= \S*\[{sizes}\]\S* copy\(", compiled.hlo)


@pytest.mark.skipif(not aot.available(), reason="JAX's CUDA plug-in is not installed")
@pytest.mark.parametrize("number", range(len(FEATURES)))
def test_compiles_without_spills(number):
    assert_fits(FEATURES[number], compile_case(FEATURES[number]))


@pytest.mark.skipif(not aot.available(), reason="JAX's CUDA plug-in is not installed")
@pytest.mark.parametrize(
    "case",
    [
        Case(lens=(), kv_heads=8, head_dim=128),
        Case(
            lens=(),
            kv_heads=8,
            head_dim=128,
            page_size=48,
            window=100,
            soft_cap=30.0,
            sinks=True,
            dtype=jnp.float16,
        ),
        Case(lens=(), kv_heads=2, head_dim=64, group=5, page_size=8, window=100),
        Case(lens=(), kv_heads=4, head_dim=192, group=8, page_size=128, soft_cap=30.0),
    ],
)
def test_both_kinds_of_blocks_compile_without_spills(case):
    B, M, T, i32 = 16, 64, 2048, jnp.int32
    row = jax.ShapeDtypeStruct((B,), i32)
    H = case.kv_heads * case.group
    q, pool = jax.ShapeDtypeStruct((T, H, case.head_dim), case.dtype), pool_shape(case, 1000)

    def f(q, k, v, layer, tables, lens, starts, query_lens, window, sinks):
        scores = Scores(
            0.1, case.soft_cap, None if case.window is None else window, sinks if case.sinks else None, return_lse=True
        )  # fmt: skip
        pools, rows = Pools(k, v, layer), Rows(tables, lens, starts, query_lens)
        return attention.paged_attention(
            q, pools, rows, scores, max_query_len=T, limits=_mosaic.DeviceLimits()
        )

    scalar, tables = jax.ShapeDtypeStruct((), i32), jax.ShapeDtypeStruct((B, M), i32)
    sinks = jax.ShapeDtypeStruct((H,), jnp.float32)
    compiled = aot.compile_for_h200(f, q, pool, pool, scalar, tables, row, row, row, scalar, sinks)
    assert [kernel.name.startswith("paxcache_mixed") for kernel in compiled.kernels] == [True]
    assert_fits(case, compiled)


def lengthened(case: Case) -> Case:
    """Long enough that all of a GPU's programs have work; holes keep their places."""
    queries = case.query_lens or ()
    return dataclasses.replace(
        case, lens=tuple(9 * n for n in case.lens), query_lens=tuple(5 * n for n in queries)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengthen", [False, True])
def test_on_gpu(name, lengthen):
    case = lengthened(CASES[name]) if lengthen else CASES[name]
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)  # which pytest shows where the test fails
    inputs = make_inputs(case, seed=seed)
    runs = []
    for _ in range(4):
        jnp.full((1 << 24,), jnp.nan).block_until_ready()  # what the outputs' memory holds before
        runs.append(run(case, inputs))
    assert_right(case, inputs, *runs[0])
    for other in runs[1:]:
        for x, y in zip(runs[0], other, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


if __name__ == "__main__":
    for feature in all_features():
        assert_fits(feature, compile_case(feature))
        print("ok", feature, flush=True)
