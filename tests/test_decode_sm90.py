"""The Hopper decode kernel: interpreted on the CPU with the race detector, compiled for an H200, run on a GPU."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

import aot
from paxcache.kernels._request import Pools, Rows, Scores
from paxcache.kernels.sm90 import _mosaic, decode, decode_plan
from paxcache.kernels.sm90.decode_plan import OfRange, OfRow
from rows import Case, assert_right, make_inputs, pool_shape, request, rows_of, shapes_of

CASES = {
    "one row": Case(lens=(300,), head_dim=128, kv_heads=1),
    "ragged, idle rows, gaps": Case(lens=(0, 1, 16, 17, 100, 0, 133), gaps=True),
    "a step mostly empty": Case(lens=(70, 0, 3, 0), tail=21),
    "a long step mostly empty": Case(lens=(70, 0, 3, 0), tail=900, kv_heads=1, group=12, head_dim=96),
    "several queries a row": Case(
        lens=(150, 90, 0, 64), query_lens=(3, 2, 0, 1), max_query_len=4, group=3, page_size=8, gaps=True
    ),
    "not causal": Case(lens=(150, 64), query_lens=(3, 4), max_query_len=4, page_size=32, causal=False),
    "window and holes": Case(lens=(300, 190, 5, 64), window=40, holes=((0, 2), (0, 17), (1, 11))),
    "window, query blocks, large pages, sinks": Case(
        lens=(200, 130, 5, 70),
        query_lens=(4, 1, 2, 4),
        max_query_len=4,
        block_tokens=2,
        window=40,
        page_size=128,
        sinks=True,
        group=5,
    ),
    "head dim 96, holes, one row all hole": Case(
        lens=(150, 70, 16), holes=((0, 0), (0, 5), (2, 0)), head_dim=96, group=7
    ),
    "float16, pages of 48": Case(lens=(200, 90), dtype=jnp.float16, page_size=48, group=1),
    "soft cap and sinks": Case(lens=(200, 2), soft_cap=2.0, sinks=True),
    "fixed pieces": Case(lens=(200, 90, 0, 300), piece_len=128),
    "fixed pieces, window, queries": Case(
        lens=(200, 90, 0, 300), query_lens=(1, 2, 0, 2), max_query_len=2, piece_len=64, window=210
    ),
    "lanes that take turns": Case(lens=(200, 90), kv_heads=4, lanes=2),
    "more heads than registers": Case(lens=(70, 3), head_dim=128, kv_heads=1, group=64, sinks=True),
    "float32": Case(lens=(130, 70), head_dim=128, kv_heads=1, dtype=jnp.float32),
    "float32, several queries, holes, sinks, head dim 96": Case(
        lens=(150, 64, 5),
        query_lens=(3, 2, 1),
        max_query_len=4,
        head_dim=96,
        group=3,
        kv_heads=1,
        holes=((0, 2),),
        sinks=True,
        dtype=jnp.float32,
    ),
    "float32, head dim 256, window, soft cap, pages of 48": Case(
        lens=(300,), head_dim=256, kv_heads=1, page_size=48, window=90, soft_cap=2.0, dtype=jnp.float32
    ),
    "fp8_e4m3": Case(lens=(300, 0, 70), head_dim=128, kv_heads=1, quantization="fp8_e4m3"),
    "fp8_e5m2, window, holes, sinks, soft cap": Case(
        lens=(300, 190, 5),
        window=40,
        holes=((0, 2), (0, 17), (1, 11)),
        sinks=True,
        soft_cap=2.0,
        page_size=8,
        quantization="fp8_e5m2",
    ),
    "int8, several queries, pages of 48": Case(
        lens=(150, 90),
        query_lens=(3, 2),
        max_query_len=4,
        group=3,
        page_size=48,
        quantization="int8",
        dtype=jnp.float16,
    ),
    "int4, fixed pieces": Case(lens=(200, 300), head_dim=128, kv_heads=1, piece_len=64, quantization="int4"),
    "int4, scales of layers": Case(lens=(100, 64), head_dim=128, quantization="int4", layer_scales=True),
    "int8, head dim 96, scales of layers": Case(
        lens=(150, 70), head_dim=96, group=7, page_size=128, quantization="int8", layer_scales=True
    ),
    "fp8_e4m3, head dim 256, float16": Case(
        lens=(70,), head_dim=256, kv_heads=1, dtype=jnp.float16, quantization="fp8_e4m3"
    ),
}


def make_config(case: Case, ranges: int | None = None) -> decode.Config:
    """The configuration for an H200, or one of a few ranges that the interpreter gets through."""
    made = decode.default_config(shapes_of(case), limits=_mosaic.DeviceLimits(), piece_len=case.piece_len)
    if case.block_tokens is not None:
        blocks = -(-case.max_query_len // case.block_tokens)
        made = dataclasses.replace(made, block_tokens=case.block_tokens, lanes=case.kv_heads * blocks)
    if case.lanes is not None:
        made = dataclasses.replace(made, lanes=case.lanes)
    if ranges is not None:
        programs = ranges * made.lanes
        made = dataclasses.replace(made, num_programs=programs, min_programs=programs)
    else:
        programs, fewest = (n // made.lanes * made.lanes for n in (made.num_programs, made.min_programs))
        made = dataclasses.replace(made, num_programs=programs, min_programs=fewest)
    return made


def plan_shape(case: Case, num_rows: int, config: decode.Config) -> decode_plan.Shape:
    return decode_plan.plan_shape(
        num_rows=num_rows,
        num_kv_heads=case.kv_heads,
        page_size=case.page_size,
        max_query_len=case.max_query_len,
        windowed=case.window is not None,
        config=config,
    )


def run(case: Case, inputs: dict[str, Any], **options: Any) -> tuple[jax.Array, jax.Array]:
    def f(inputs):
        return decode.decode(*request(case, inputs), max_query_len=case.max_query_len, **options)

    return jax.jit(f)(inputs)


# What they add, other cases show too, and the interpreter takes its time.
ON_GPU_ALONE = {
    "a long step mostly empty",
    "fp8_e4m3, head dim 256, float16",
    "int8, head dim 96, scales of layers",
    "int4, scales of layers",
}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ON_GPU_ALONE])
def test_interpreted_without_races(name):
    case = CASES[name]
    inputs = make_inputs(case, seed=len(name))
    config = dataclasses.replace(make_config(case, ranges=3), num_stages=2)
    out, lse = run(case, inputs, config=config, interpret=_mosaic.interpreter(detect_races=True))
    assert_right(case, inputs, out, lse)
    assert not interpret_pallas_call.get_races().races_found


def test_interpreted_under_vmap():
    case = Case(lens=(70, 3), kv_heads=1)
    inputs = make_inputs(case, seed=0)
    config = make_config(case, ranges=2)

    def f(q, seq_lens):
        changed = request(case, inputs | {"q": q, "seq_lens": seq_lens}, return_lse=False)
        return decode.decode(*changed, config=config, interpret=_mosaic.interpreter())[0]

    qs = jnp.stack([inputs["q"], 2 * inputs["q"]])
    lens = jnp.stack([inputs["seq_lens"], inputs["seq_lens"] - 2])
    expected = [f(q, n) for q, n in zip(qs, lens, strict=True)]
    np.testing.assert_array_equal(jax.vmap(f)(qs, lens), jnp.stack(expected))


def test_fixed_pieces_do_not_depend_on_the_batch():
    case = Case(lens=(130, 300, 5), kv_heads=1, piece_len=64)
    inputs = make_inputs(case, seed=1)
    whole, _ = run(case, inputs, config=make_config(case, ranges=3), interpret=_mosaic.interpreter())
    one = {x: inputs[x][1:2] for x in ("block_tables", "seq_lens", "query_lens")}
    one |= {"query_starts": jnp.zeros(1, jnp.int32), "q": inputs["q"][1:2]}
    alone, _ = run(case, inputs | one, config=make_config(case, ranges=4), interpret=_mosaic.interpreter())
    np.testing.assert_array_equal(np.asarray(whole[1:2]), np.asarray(alone))


def test_traced_window_is_the_static_one():
    case = Case(lens=(100,), kv_heads=1, window=30)
    inputs = make_inputs(case, seed=2)
    options = {"config": make_config(case, ranges=2), "interpret": _mosaic.interpreter()}

    def f(window):
        return decode.decode(*request(case, inputs, sliding_window=window), **options)[0]

    static, traced = f(30), jax.jit(f)(jnp.int32(30))
    np.testing.assert_array_equal(np.asarray(static), np.asarray(traced))


def test_plan_with_the_largest_window_is_the_one_with_a_large_window():
    """Rows with more query tokens than are served are left alone, also where a difference could pass int32."""
    case = Case(lens=(150, 40), query_lens=(70, 1), kv_heads=1, window=1)
    rows = rows_of(make_inputs(case, seed=0))
    make = functools.partial(decode_plan.decode_plan, rows, plan_shape(case, 2, make_config(case, ranges=3)))
    largest, large = (np.asarray(make(sliding_window=w).lines) for w in (2**31 - 1, 1 << 20))
    np.testing.assert_array_equal(largest, large)
    assert large[:3, OfRange.TILES].sum() == 1


def walk(plan: decode_plan.Plan, config: decode.Config, case: Case, turns: int) -> list[list[tuple]]:
    """The (row, turn, tile) that each range visits, following the plan as the kernel does."""
    first, tile_len = (OfRange.ROW, OfRange.TURN, OfRange.FIRST, OfRange.LEN, OfRange.LOW), decode_plan.TILE
    lines = np.asarray(plan.lines)
    ranges, rows = lines[: config.num_programs // config.lanes], lines[config.num_programs // config.lanes :]
    visited = []
    for line in ranges:
        row, turn, tile, length, low = (int(line[x]) for x in first)
        steps = []
        for _ in range(line[OfRange.TILES]):
            steps.append((row, turn, tile))
            base = low // case.page_size * case.page_size
            tile += 1
            if tile * tile_len >= length - base:
                turn, tile = turn + 1, 0
                if turn == turns:
                    turn = 0
                    length, low, row = (
                        int(rows[row][x]) for x in (OfRow.NEXT_LEN, OfRow.NEXT_LOW, OfRow.NEXT)
                    )
        visited.append(steps)
    return visited


@pytest.mark.parametrize("piece_len", [None, 128])
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("seed", range(8))
def test_plan_visits_every_tile_once(piece_len, window, seed):
    tile_len = decode_plan.TILE
    rng = np.random.default_rng(seed)
    lens = tuple(int(x) for x in rng.choice([0, 1, 16, 64, 70, 500, 3000], 6))
    case = Case(lens=lens, kv_heads=4, window=window, piece_len=piece_len)
    turns, ranges = int(rng.integers(1, 3)), int(rng.choice([4, 17, 66]))
    config = dataclasses.replace(
        make_config(case),
        lanes=4 // turns,
        num_programs=4 // turns * ranges,
        min_programs=4 // turns * max(1, ranges // 2),
    )
    tables = jnp.asarray(rng.integers(0, 99, (6, 200)), jnp.int32)
    ones = jnp.ones(6, jnp.int32)
    six = Rows(tables, jnp.asarray(lens, jnp.int32), jnp.arange(6, dtype=jnp.int32), ones)
    plan = decode_plan.decode_plan(six, plan_shape(case, 6, config), sliding_window=window)
    lines = np.asarray(plan.lines)
    visited = walk(plan, config, case, turns)
    firsts = [0 if window is None else max(n - window, 0) // 16 * 16 for n in lens]
    num_tiles = [-(-(n - first) // tile_len) for n, first in zip(lens, firsts, strict=True)]
    everything = [(b, h, t) for b, n in enumerate(num_tiles) for h in range(turns) for t in range(n)]
    assert list(itertools.chain(*visited)) == everything
    sizes = [len(x) for x in visited if x]
    pieces = {}
    for g, steps in enumerate(visited):
        size = [
            max(piece_len // tile_len, -(-n // decode_plan.MAX_PIECES)) if piece_len else 10**9
            for n in num_tiles
        ]
        mine = list(dict.fromkeys((b, h, t // size[b]) for b, h, t in steps))
        assert lines[g, OfRange.PIECES] == len(mine)
        for b, h, t in mine:
            pieces.setdefault((b, h), []).append((g, t))
        if steps:
            b, _, t = steps[0]
            columns = np.minimum(firsts[b] + t * tile_len + np.arange(0, tile_len, 16), lens[b] - 1) // 16
            np.testing.assert_array_equal(
                lines[g, OfRange.PAGES : OfRange.PAGES + 4], np.asarray(tables)[b, columns]
            )
    if piece_len is None:
        assert max(sizes, default=0) - min(sizes, default=0) <= 1
        for parts in pieces.values():
            first, *others = (g for g, _ in parts)
            if others:
                assert lines[first, OfRange.NEXT_PARTS] == lines[others[0], OfRange.PARTS] == len(others)
                assert all(lines[g, OfRange.JOIN] == others[0] for g in others)
                assert all(lines[g, OfRange.JOIN_PARTS] == len(others) for g in others)
    else:  # a piece lies in one range
        assert all(len({t for _, t in parts}) == len(parts) for parts in pieces.values())
    rows = lines[ranges : ranges + 6]
    np.testing.assert_array_equal(rows[:, OfRow.QUERIES], (np.array(lens) > 0).astype(int))
    assert not lines[ranges + 6 :].any()


# Every value of every feature, and most pairs of them; `all_features` is the full product.
FEATURES = [
    Case(lens=(), kv_heads=8, head_dim=128),
    Case(lens=(), kv_heads=2, head_dim=64, group=8, max_query_len=2, window=100, soft_cap=30.0, sinks=True),
    Case(lens=(), kv_heads=8, head_dim=96, group=5, page_size=64, dtype=jnp.float16, window=100, sinks=True),
    Case(lens=(), kv_heads=4, head_dim=256, group=7, page_size=8, max_query_len=4, piece_len=512),
    Case(lens=(), kv_heads=1, head_dim=128, group=16, page_size=128, soft_cap=30.0, sinks=True, window=100),
    Case(lens=(), kv_heads=8, head_dim=128, page_size=32, max_query_len=8, piece_len=512, window=100),
    Case(lens=(), kv_heads=3, head_dim=64, group=1, page_size=48, max_query_len=8, causal=False),
    Case(lens=(), kv_heads=8, head_dim=128, dtype=jnp.float32),
    Case(lens=(), kv_heads=8, head_dim=64, group=1, dtype=jnp.float32, page_size=8, window=100, sinks=True),
    Case(
        lens=(),
        kv_heads=2,
        head_dim=96,
        group=7,
        dtype=jnp.float32,
        max_query_len=16,
        page_size=48,
        window=100,
    ),
    Case(lens=(), kv_heads=2, head_dim=256, dtype=jnp.float32, max_query_len=16, soft_cap=30.0, sinks=True),
    Case(lens=(), kv_heads=8, head_dim=128, quantization="fp8_e4m3"),
    Case(lens=(), kv_heads=8, head_dim=128, group=8, quantization="int8", max_query_len=2, soft_cap=30.0),
    Case(lens=(), kv_heads=8, head_dim=128, quantization="int4", window=100, sinks=True, page_size=64),
    Case(lens=(), kv_heads=4, head_dim=256, quantization="fp8_e5m2", layer_scales=True, dtype=jnp.float16),
    Case(lens=(), kv_heads=4, head_dim=96, quantization="int8", layer_scales=True, page_size=8),
]


def all_features() -> list[Case]:
    """Too many to compile at every change: ``python tests/test_decode.py`` does."""
    return [
        Case(
            lens=(), kv_heads=8, head_dim=head_dim, group=group, page_size=page_size, dtype=dtype,
            max_query_len=queries, window=window, soft_cap=soft_cap, sinks=window is not None, piece_len=piece_len,
        )
        for head_dim in (64, 96, 128, 192, 256)
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
        for group in (1, 4, 5, 7, 8, 16)
        for queries in ((1, 16) if dtype == jnp.float32 else (1, 2, 4, 8))
        for page_size, window, soft_cap, piece_len in (
            (16, None, None, None), (128, 100, None, 512), (8, None, 30.0, None), (48, 100, 30.0, None),
        )
    ]  # fmt: skip


def compile_case(case: Case, return_lse: bool = True) -> aot.Compiled:
    B, M, P = 16, 64, 1000
    config = make_config(case)
    i32, f32 = jnp.int32, jnp.float32
    row = jax.ShapeDtypeStruct((B,), i32)
    H = case.kv_heads * case.group
    q = jax.ShapeDtypeStruct((B * case.max_query_len, H, case.head_dim), case.dtype)
    pool = pool_shape(case, P)
    tables, scalar = jax.ShapeDtypeStruct((B, M), i32), jax.ShapeDtypeStruct((), i32)

    def f(q, k, v, layer, tables, lens, starts, query_lens, scale, window, sinks):
        scores = Scores(
            scale, case.soft_cap, None if case.window is None else window, sinks if case.sinks else None, case.causal,
            return_lse,
        )  # fmt: skip
        rows = Rows(tables, lens, starts, query_lens)
        return decode.decode(
            q, Pools(k, v, layer), rows, scores, max_query_len=case.max_query_len, config=config
        )

    sinks, scale = jax.ShapeDtypeStruct((H,), f32), jax.ShapeDtypeStruct((), f32)
    return aot.compile_for_h200(f, q, pool, pool, scalar, tables, row, row, row, scale, scalar, sinks)


def assert_fits(case: Case, compiled: aot.Compiled) -> None:
    (kernel,) = compiled.kernels
    assert kernel.spill_bytes == 0
    config = make_config(case)
    blocks_per_sm = -(-config.num_programs // config.consumers // 132)
    assert kernel.registers * 128 * (config.consumers + 1) * blocks_per_sm <= 65536, kernel
    sizes = ",".join(map(str, jax.tree.leaves(pool_shape(case, 1000))[0].shape))
    assert not re.search(rf"= \S*\[{sizes}\]\S* copy\(", compiled.hlo)


needs_compiler = pytest.mark.skipif(not aot.available(), reason="JAX's CUDA plug-in is not installed")


@needs_compiler
@pytest.mark.parametrize("number", range(len(FEATURES)))
def test_compiles_without_spills(number):
    assert_fits(FEATURES[number], compile_case(FEATURES[number]))


@needs_compiler
def test_layers_share_one_compilation():
    case = FEATURES[0]
    row = jax.ShapeDtypeStruct((16,), jnp.int32)
    q = jax.ShapeDtypeStruct((16, 32, 128), case.dtype)
    pool = jax.ShapeDtypeStruct((8, 1000, 8, 16, 128), case.dtype)

    def model(q, k, v, tables, lens, starts, query_lens):
        rows = Rows(tables, lens, starts, query_lens)
        plan = decode_plan.decode_plan(rows, plan_shape(case, 16, make_config(case)))

        def attend(q, layer):
            return decode.decode(q, Pools(k, v, layer), rows, Scores(0.1), plan=plan)[0], None

        return jax.lax.scan(attend, q, jnp.arange(8))[0]

    compiled = aot.compile_for_h200(
        model, q, pool, pool, jax.ShapeDtypeStruct((16, 64), jnp.int32), row, row, row
    )
    assert len(compiled.kernels) == 1
    assert not re.search(r"= \S*\[8,1000,8,16,128\]\S* copy\(", compiled.hlo)


def lengthened(case: Case) -> Case:
    """Long enough that all of a GPU's programs have work."""
    return dataclasses.replace(case, lens=tuple(23 * n for n in case.lens))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lengthen", [False, True])
def test_on_gpu(name, lengthen):
    case = lengthened(CASES[name]) if lengthen else CASES[name]
    seed = int(np.random.default_rng().integers(1 << 30))
    print("seed", seed)  # which pytest shows where the test fails
    inputs = make_inputs(case, seed=seed)
    config = make_config(case)
    runs = []
    for _ in range(5):
        jnp.full((1 << 24,), jnp.nan).block_until_ready()  # what the outputs' memory holds before
        runs.append(run(case, inputs, config=config))
    assert_right(case, inputs, *runs[0])
    for other in runs[1:]:
        for x, y in zip(runs[0], other, strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.gpu
def test_fixed_pieces_do_not_depend_on_the_batch_on_gpu():
    case = Case(lens=(3000, 190, 0, 7000), kv_heads=8, head_dim=128, piece_len=512)
    inputs = make_inputs(case, seed=3)
    whole, _ = run(case, inputs, config=make_config(case))
    one = {x: inputs[x][3:4] for x in ("block_tables", "seq_lens", "query_lens")}
    one |= {"query_starts": jnp.zeros(1, jnp.int32), "q": inputs["q"][2:3]}
    alone, _ = run(case, inputs | one, config=make_config(case))
    np.testing.assert_array_equal(np.asarray(whole[2:3]), np.asarray(alone))


if __name__ == "__main__":
    for feature in all_features():
        assert_fits(feature, compile_case(feature))
        print("ok", feature, flush=True)
