"""The Triton kernels: plans checked by hand, compiled for every architecture, interpreted on the CPU, run on a GPU.

Triton's interpreter must be chosen before kernels are defined, so that it runs in a process of its own: this file as
a program, with the name of a group of checks. It multiplies no bfloat16. As a program without arguments this file
compiles and interprets everything, which takes minutes: pytest does with the telling cases.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aot
import catalogue
import test_quantize
from paxcache import ops
from paxcache._quantize import FORMATS, QuantizedPages
from paxcache.kernels._request import Pools, Rows, Scores, Shapes
from paxcache.kernels.triton import _tiles, _triton
from paxcache.kernels.triton import attention as attention_triton
from paxcache.kernels.triton import copy as copy_triton
from paxcache.kernels.triton import decode as decode_triton
from paxcache.kernels.triton import prefill as prefill_triton
from paxcache.kernels.triton import write as write_triton

KERNELS: tuple[Any, ...] = (copy_triton, decode_triton, prefill_triton, write_triton)
tl: Any = _triton.tl
quantized_pages: Any = QuantizedPages
SMALL = _triton.Limits(num_sms=4, compute_capability=(8, 0))
ARCHITECTURES = {80: 108, 86: 82, 89: 128, 90: 132}  # and the SMs of one such GPU


def _paged_attention(
    q: Any, k_pages: Any, v_pages: Any, tables: Any, lens: Any, starts: Any, queries: Any, layer: Any,
    *, max_query_len: int, limits: _triton.Limits, plan: Any = None, **scores: Any,
) -> tuple[Any, Any]:  # fmt: skip
    pools, rows = Pools(k_pages, v_pages, layer), Rows(tables, lens, starts, queries)
    options: dict[str, Any] = {"max_query_len": max_query_len, "limits": limits, "plan": plan}
    return attention_triton.paged_attention(q, pools, rows, Scores(**scores), **options)


paged_attention: Any = _paged_attention


def _write_pages(
    k_pages: Any, v_pages: Any, k: Any, v: Any, slots: Any, layer: Any, *, limits: _triton.Limits
) -> tuple[Any, Any]:
    return write_triton.write_pages(Pools(k_pages, v_pages, layer), k, v, slots, limits=limits)


write_pages: Any = _write_pages


needs_triton = pytest.mark.skipif(_triton.tl is None, reason="Triton is not installed")


def limits_of(architecture: int) -> _triton.Limits:
    return _triton.Limits(
        num_sms=ARCHITECTURES[architecture], compute_capability=(architecture // 10, architecture % 10)
    )


# What is missing.


def test_without_triton_the_way_to_install_it_is_told(monkeypatch):
    monkeypatch.setattr(_triton, "triton", None)
    _triton._triton_call.cache_clear()
    with pytest.raises(NotImplementedError, match=re.escape("pip install 'paxcache[triton]'")):
        _triton._triton_call()
    _triton._triton_call.cache_clear()


def test_a_release_that_is_not_fit_is_named(monkeypatch):
    found = types.SimpleNamespace(__version__="0.4.1", __version_info__=(0, 4, 1))
    monkeypatch.setitem(sys.modules, "jax_triton", found)
    monkeypatch.setattr(_triton, "triton", object())
    _triton._triton_call.cache_clear()
    with pytest.raises(NotImplementedError, match=r"jax-triton 0\.3, found 0\.4\.1"):
        _triton._triton_call()
    _triton._triton_call.cache_clear()


@pytest.mark.parametrize(
    ("platform", "capability", "message"),
    [
        ("cpu", None, "needs an NVIDIA GPU"),
        ("gpu", "gfx942", "for NVIDIA GPUs"),
        ("gpu", "7.5", "compute capability 8.0"),
    ],
)
def test_devices_that_are_none_are_refused(platform, capability, message):
    device: Any = types.SimpleNamespace(platform=platform, device_kind="X", compute_capability=capability)
    with pytest.raises(NotImplementedError, match=message):
        _triton.device_limits(device)


# Plans.


def shape_of(**changes: Any) -> _tiles.Shape:
    """What is static of a call."""
    shape: dict[str, Any] = {
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "v_head_dim": 128,
        "page_size": 16,
        "form": "plain",
        "per_token": False,
        "keys_are_values": False,
        "q_dtype": jnp.dtype(jnp.bfloat16),
        "kv_dtype": jnp.dtype(jnp.bfloat16),
    }
    return _tiles.Shape(**shape | changes)


def walk(plan: decode_triton.Plan) -> list[list[tuple[int, int, int]]]:
    """The (row, turn, tile) that each range visits, following the plan as the kernel does."""
    made_for = plan.made_for
    row_column, turn_column, tile_column, tiles_column = range(4)
    ranges, rows = np.asarray(plan.ranges), np.asarray(plan.rows)
    visited = []
    for line in ranges:
        row, turn, tile = (int(line[x]) for x in (row_column, turn_column, tile_column))
        steps = []
        for _ in range(line[tiles_column]):
            steps.append((row, turn, tile))
            end, begin, following, _ = rows[row]
            tile += 1
            if tile == -(-(end - begin) // made_for.tile):
                turn, tile = turn + 1, 0
                if turn == made_for.turns:
                    row, turn = following, 0
        visited.append(steps)
    return visited


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("seed", range(8))
def test_ranges_visit_every_tile_once_and_joins_find_their_parts(window, seed):
    rng = np.random.default_rng(seed)
    lens = rng.choice([0, 1, 16, 64, 70, 500, 3000], 6).astype(np.int32)
    limits = _triton.Limits(num_sms=int(rng.choice([2, 16, 132])), compute_capability=(8, 0))
    shape = shape_of(num_kv_heads=int(rng.choice([1, 3, 8])), num_heads=24)
    config = decode_triton.default_config(shape, 1, limits)
    made_for = decode_triton.plan_shape(
        shape, num_rows=6, max_query_len=1, windowed=window is not None, config=config
    )
    queries = jnp.asarray(np.where(rng.random(6) < 0.2, 2, 1), jnp.int32)  # those with two are not served
    rows = Rows(jnp.zeros((6, 1), jnp.int32), jnp.asarray(lens), jnp.arange(6, dtype=jnp.int32), queries)
    plan = decode_triton.decode_plan(rows, made_for, sliding_window=window)
    served = np.where(np.asarray(queries) == 1, lens, 0)
    first = np.zeros_like(served) if window is None else np.maximum(served - window, 0)
    num_tiles = -(-(served - first) // made_for.tile)
    visited = walk(plan)
    everything = [
        (b, turn, tile)
        for b, n in enumerate(num_tiles)
        for turn in range(made_for.turns)
        for tile in range(n)
    ]
    assert list(itertools.chain(*visited)) == everything
    sizes = [len(steps) for steps in visited if steps]
    assert not sizes or max(sizes) - min(sizes) <= 1
    # A pair that is cut is joined once, by the first range that continues it, over all ranges that do.
    holders: dict[tuple[int, int], list[int]] = {}
    for index, steps in enumerate(visited):
        for pair in dict.fromkeys((b, turn) for b, turn, _ in steps):
            holders.setdefault(pair, []).append(index)
    cut = {indices[1]: len(indices) - 1 for indices in holders.values() if len(indices) > 1}
    parts = np.asarray(plan.ranges)[:, 4]
    assert {int(i): int(parts[i]) for i in np.flatnonzero(parts)} == cut


@pytest.mark.parametrize("seed", range(4))
def test_tiles_cover_every_query_token_once(seed):
    rng = np.random.default_rng(seed)
    queries = rng.choice([0, 1, 2, 31, 32, 33, 100], 7).astype(np.int32)
    lens = queries + rng.integers(0, 50, 7).astype(np.int32)
    tables = np.zeros((7, 10), np.int32)
    tables[3, 0] = -1
    shape = shape_of()
    made_for = prefill_triton.plan_shape(
        shape,
        num_rows=7,
        num_tokens=int(queries.sum()) + 5,
        min_query_len=2,
        config=prefill_triton.default_config(shape, SMALL),
    )
    starts = np.cumsum(queries) - queries
    rows = Rows(*(jnp.asarray(x, jnp.int32) for x in (tables, lens, starts, queries)))
    plan = prefill_triton.prefill_plan(rows, made_for)
    tokens = []
    for row, first, holes, _ in np.asarray(plan.tiles):
        if row >= 0:
            assert holes == (row == 3 and lens[3] > 0)
            last = min(first + made_for.block_tokens, queries[row])
            tokens += [(row, token) for token in range(first, last)]
    assert sorted(tokens) == [(b, t) for b, n in enumerate(queries) if n >= 2 for t in range(n)]
    assert len(tokens) == len(set(tokens))


@pytest.mark.parametrize("form", [None, "fp8_e4m3", "int4"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("queries", [1, 8, 300])
def test_a_plan_made_before_the_queries_are_known_fits(queries, group, form):
    """`extend` does not know their dtype, nor whether there are scales for each token."""
    B, K, D, S = 3, 2, 64, 16
    tokens = B * min(queries, 16) if queries <= 16 else queries
    dtype = jnp.bfloat16 if form is None else FORMATS[form].dtype
    lens = jnp.full(B, 20, jnp.int32)
    rows = Rows(jnp.zeros((B, 20), jnp.int32), lens, lens, jnp.ones(B, jnp.int32))
    shapes = Shapes(
        num_rows=B, num_tokens=tokens, max_query_len=queries, num_heads=K * group, num_kv_heads=K, head_dim=D,
        page_size=S, dtype=dtype, windowed=False,
    )  # fmt: skip
    plan = attention_triton.make_plan(rows, shapes, limits=SMALL)
    per_element = 1 if form is None else FORMATS[form].per_element
    pool: Any = jax.ShapeDtypeStruct((1, 5, K, S, D // per_element), dtype)
    if form is not None:
        pool = quantized_pages(pool, jax.ShapeDtypeStruct((1, 5, K, S), jnp.float32))
    q = jax.ShapeDtypeStruct((tokens, K * group, D), jnp.bfloat16)
    shape = _tiles.shape_of(q, Pools(pool, pool, 0))
    assert shapes.is_mixed == (queries > 16)
    assert attention_triton.Launch(shapes, shape, SMALL).fits(plan)
    unknown = dataclasses.replace(shapes, num_heads=None)
    assert attention_triton.make_plan(rows, unknown, limits=SMALL) is None


# Compiled, without a GPU.

Launch = tuple[Any, list[Any], dict[str, Any], int, int]
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def launches(function: Callable[..., Any], *arrays: Any) -> list[Launch]:
    """The kernels that a function launches, with the dtypes of their arguments: it is traced, nothing runs."""
    seen: list[Launch] = []

    def call(kernel, *inputs, outputs, grid, limits, num_warps, num_stages=1, in_place=None, **constants):
        arguments = [x if isinstance(x, int) else x.dtype.name for x in (*inputs, *outputs)]
        seen.append((kernel, arguments, constants, num_warps, num_stages))
        return [jnp.zeros(x.shape, x.dtype) for x in outputs]

    with pytest.MonkeyPatch.context() as patch:
        for module in KERNELS:
            patch.setattr(module, "call", call)
        jax.eval_shape(function, *arrays)
    return seen


@dataclasses.dataclass(frozen=True)
class Compiled:
    name: str
    shared_bytes: int
    registers: int
    spill_bytes: int
    ptx: str = dataclasses.field(repr=False)


def compile_for(architecture: int, launch: Launch) -> Compiled:
    """Compiles a kernel as jax-triton does; the assembler tells about registers."""
    import triton  # pyright: ignore[reportMissingImports]
    from triton import knobs  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    kernel, arguments, constants, num_warps, num_stages = launch
    signature, constexprs, attributes = {}, dict(constants), {}
    for i, (name, argument) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(argument, int):
            signature[name] = "constexpr" if argument == 1 else "i32"
            constexprs |= {name: 1} if argument == 1 else {}
        else:
            short = re.sub(r"^(u?)int", lambda m: "u" if m[1] else "i", argument)
            signature[name] = "*" + TYPES.get(argument, short)
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    made: Any = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = made.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        target = f"sm_{architecture}" + ("a" if architecture >= 90 else "")
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={target}",
            file,
            "-o",
            file.with_suffix(".o"),
        ]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills and registers, log
    return Compiled(
        kernel.__name__,
        made.metadata.shared,
        int(registers[1]),
        int(spills[1]) + int(spills[2]),
        ptx,
    )


def abstract_pool(form: str | None, dtype: Any, width: int, *, K: int = 8, S: int = 16) -> Any:
    if form is None:
        return jax.ShapeDtypeStruct((2, 99, K, S, width), dtype)
    stored = FORMATS[form]
    values = jax.ShapeDtypeStruct((2, 99, K, S, width // stored.per_element), stored.dtype)
    return quantized_pages(values, jax.ShapeDtypeStruct((2, 99, K, S), jnp.float32))


def attention_launches(
    architecture: int, *, D: int, dtype: Any = jnp.bfloat16, form: str | None = None, **options: Any
) -> list[Launch]:
    """The kernels of a step with rows of all kinds."""
    B, H, T = 4, 32, 512
    rows: Any = [jax.ShapeDtypeStruct((B,), jnp.int32)] * 3
    tables = jax.ShapeDtypeStruct((B, 64), jnp.int32)
    pool = abstract_pool(form, dtype, D)

    def attend(q, k_pages, v_pages, tables, *rows):
        unused: dict[str, Any] = {"soft_cap": None, "sliding_window": None, "sinks": None, "plan": None}
        unused |= {"max_query_len": T, "sm_scale": 0.1, "causal": True, "return_lse": False}
        return paged_attention(
            q,
            k_pages,
            v_pages,
            tables,
            *rows,
            jnp.int32(0),
            **unused | options,
            limits=limits_of(architecture),
        )

    q = jax.ShapeDtypeStruct((T, H, D), dtype)
    return launches(attend, q, pool, pool, tables, *rows)


ATTENTION = [
    (80, {"D": 128}, 0),
    (89, {"D": 128, "form": "fp8_e4m3"}, 256),
    (80, {"D": 64, "dtype": jnp.float16, "soft_cap": 5.0, "sliding_window": 99}, 0),
    (80, {"D": 128, "form": "fp8_e4m3"}, 64),
    (80, {"D": 128, "dtype": jnp.float32}, 64),
    (86, {"D": 128}, 0),
    (86, {"D": 256}, 0),
    (86, {"D": 576}, 512),
    (86, {"D": 128, "form": "int4"}, 0),
    (89, {"D": 128}, 0),
    (90, {"D": 128}, 512),  # addresses for the end, outside the loops
    (90, {"D": 96, "return_lse": True}, 768),
    (90, {"D": 128, "form": "int8"}, 64),
]
WRITES = [(80, None), (89, "fp8_e4m3"), (90, None), *itertools.product((80, 90), FORMATS)]
TELLING = 2  # of each; `python tests/test_triton.py` compiles all


@needs_triton
@pytest.mark.parametrize(("architecture", "options", "most_spilled"), ATTENTION[:TELLING])
def test_attention_compiles_and_fits(architecture, options, most_spilled):
    limits = limits_of(architecture)
    made = {x[0].__name__: compile_for(architecture, x) for x in attention_launches(architecture, **options)}
    assert set(made) == {"_decode_kernel", "_join_kernel", "_prefill_kernel"}
    for kernel in made.values():
        assert kernel.shared_bytes <= limits.smem_bytes_per_block, kernel.name
        assert kernel.spill_bytes <= (8 if kernel.name == "_join_kernel" else most_spilled), kernel
    # Pages stream through the copy queue, tiles ahead of their use: loads that wait for each other would not.
    assert made["_decode_kernel"].ptx.count("cp.async.cg.shared.global") >= 8
    products = "wgmma" if architecture == 90 else "mma.sync"
    assert products in made["_prefill_kernel"].ptx
    if options.get("form") == "fp8_e4m3":
        assert ("cvt.rn.f16x2.e4m3x2" in made["_decode_kernel"].ptx) == (architecture >= 89)


@needs_triton
@pytest.mark.parametrize(("architecture", "form"), WRITES[:TELLING])
def test_writes_compile_without_spills(architecture, form):
    pool, tokens = abstract_pool(form, jnp.bfloat16, 128), jax.ShapeDtypeStruct((4096, 8, 128), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((4096,), jnp.int32)

    def write(pool, tokens, slots):
        return write_pages(pool, pool, tokens, tokens, slots, jnp.int32(0), limits=limits_of(architecture))

    (launch,) = launches(write, pool, tokens, slots)
    made = compile_for(architecture, launch)
    assert made.spill_bytes == 0
    assert "ld.global.v4" in made.ptx  # 16 bytes at once
    assert ("rcp.approx.f32" in made.ptx) == (form is not None)


@needs_triton
def test_moves_compile_with_wide_accesses():
    pool, blocks = (
        abstract_pool(None, jnp.bfloat16, 128),
        jax.ShapeDtypeStruct((5, 2, 8, 16, 128), jnp.bfloat16),
    )
    ids, limits = jax.ShapeDtypeStruct((5,), jnp.int32), limits_of(80)

    def move(pool, ids, blocks):
        pool = copy_triton.copy_pages(pool, ids, ids, limits=limits)
        pool = copy_triton.scatter_pages(pool, ids, blocks, limits=limits)
        return copy_triton.gather_pages(pool, ids, limits=limits)

    for launch in launches(move, pool, ids, blocks):
        made = compile_for(80, launch)
        assert "ld.global.v4" in made.ptx and "st.global.v4" in made.ptx, made.name
        assert made.spill_bytes == 0


# Inside a compiled program.

needs_compiler = pytest.mark.skipif(
    not aot.available() or _triton.tl is None or importlib.util.find_spec("jax_triton") is None,
    reason="needs JAX's CUDA plug-in and jax-triton",
)


@needs_compiler
@pytest.mark.parametrize("form", [None, "fp8_e4m3"])
def test_a_step_changes_pools_in_place(form):
    limits, B, T = limits_of(90), 4, 64
    pool = abstract_pool(form, jnp.bfloat16, 128)
    rows: Any = [jax.ShapeDtypeStruct((B,), jnp.int32)] * 3
    tables, slots = jax.ShapeDtypeStruct((B, 64), jnp.int32), jax.ShapeDtypeStruct((T,), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((T, heads, 128), jnp.bfloat16) for heads in (32, 8))

    def step(pools, q, k, slots, tables, *rows):
        for layer in range(2):
            pools = write_pages(*pools, k, k, slots, layer, limits=limits)
            q, _ = paged_attention(
                q,
                *pools,
                tables,
                *rows,
                jnp.int32(layer),
                max_query_len=T,
                sm_scale=0.1,
                soft_cap=None,
                sliding_window=None,
                sinks=None,
                causal=True,
                return_lse=False,
                plan=None,
                limits=limits,
            )
            k = q[:, :8]
        return pools, q

    made = aot.compile_for_h200(step, (pool, pool), q, k, slots, tables, *rows, donate=(0,))
    assert made.hlo.count('custom_call_target="triton_kernel_call"') == 8
    assert not re.findall(r"\[2,99,8,16[,\d]*\]\S* copy", made.hlo)


@needs_compiler
def test_a_scan_carries_pools_in_place():
    pool, k = abstract_pool(None, jnp.bfloat16, 128), jax.ShapeDtypeStruct((64, 8, 128), jnp.bfloat16)

    def scan(pools, k, slots):
        def body(pools, layer):
            return write_pages(*pools, k, k, slots, layer, limits=limits_of(90)), None

        return jax.lax.scan(body, pools, jnp.arange(2))[0]

    slots = jax.ShapeDtypeStruct((64,), jnp.int32)
    made = aot.compile_for_h200(scan, (pool, pool), k, slots, donate=(0,))
    assert "triton_kernel_call" in made.hlo
    assert not re.findall(r"\[2,99,8,16,128\]\S* copy", made.hlo)


# Numbers: groups of named checks, for the interpreter and for GPUs.

Check = tuple[str, Callable[..., None]]  # called with `limits` and `jit`


def attend(
    arrays: dict[str, Any], static: dict[str, Any], limits: Any, *, jit: bool
) -> tuple[jax.Array, jax.Array]:
    """`ops.paged_attention` of the kernels, on the arguments of a problem of the catalogue."""

    def run(arrays):
        k_pages, v_pages = arrays["k_pages"], arrays["v_pages"]
        layer = static["layer"]
        if layer is None:
            k_pages, v_pages = jax.tree.map(lambda leaf: leaf[None], (k_pages, v_pages))
        q, seq_lens = arrays["q"], arrays["seq_lens"]
        if "cu_query_lens" in arrays:
            ends = arrays["cu_query_lens"]
            starts, lens, most = ends[:-1], ends[1:] - ends[:-1], len(q)
        elif "query_lens" in arrays:
            starts, lens, most = arrays["query_starts"], arrays["query_lens"], len(q)
        else:
            starts, lens, most = jnp.arange(len(q)), (seq_lens > 0).astype(jnp.int32), 1
        return paged_attention(
            q,
            k_pages,
            v_pages,
            arrays["block_tables"],
            seq_lens,
            starts,
            lens,
            jnp.int32(layer or 0),
            max_query_len=most,
            sm_scale=static["sm_scale"] or q.shape[-1] ** -0.5,
            soft_cap=static["soft_cap"],
            sliding_window=arrays.get("sliding_window", static.get("sliding_window")),
            sinks=arrays.get("sinks"),
            causal=static["causal"],
            return_lse=True,
            plan=None,
            limits=limits,
        )

    out, lse = (jax.jit(run) if jit else run)(arrays)
    assert lse is not None
    return out, lse


def attention_checks(group: str, dtypes: tuple[str, ...]) -> Iterator[Check]:
    """The catalogue's cases whose names begin like the group."""

    def check(case, dtype, *, limits, jit):
        problem = catalogue.build(case, dtype)
        out, lse = attend(problem.device_arrays(), problem.static, limits, jit=jit)
        tolerance = catalogue.TOLERANCE[dtype]
        assert out.dtype == dtype
        np.testing.assert_allclose(np.asarray(out).astype(np.float64), problem.out, tolerance, tolerance)
        np.testing.assert_allclose(lse, problem.lse, catalogue.LSE_TOLERANCE, catalogue.LSE_TOLERANCE)
        assert not np.asarray(out)[np.isneginf(problem.lse)].any()

    named = ("decode", "ragged", "long", "kernel")
    for case in catalogue.ATTENTION:
        begins = next((name for name in named if case.name.startswith(name)), "other")
        for dtype in dtypes if begins == group else ():
            if dtype == "float32" or case.halves or dtype == "bfloat16":
                yield f"{case.name}-{dtype}", functools.partial(check, case, dtype)


def quantised_checks(dtypes: tuple[str, ...]) -> Iterator[Check]:
    """Attention on quantised pages, against the oracle on the numbers that are stored."""

    def check(form, scales, name, dtype, *, limits, jit):
        arrays, static, out, lse = test_quantize.quantized_problem(name, form, scales)
        arrays["q"] = arrays["q"].astype(dtype)
        found, found_lse = attend(arrays, static, limits, jit=jit)
        exact = dtype == "float32"
        # In half precision the queries are rounded too, and scores are up to 4.
        tolerance = 1e-5 if exact else 4 * catalogue.TOLERANCE[dtype]
        np.testing.assert_allclose(np.asarray(found).astype(np.float64), out, tolerance, tolerance)
        if exact:
            np.testing.assert_allclose(found_lse, lse, 1e-4, 1e-4)

    for form, scales, name in test_quantize.CASES:
        yield f"{name}-{form}-{scales}", functools.partial(check, form, scales, name, "float32")
    for form, dtype in itertools.product(FORMATS, dtypes):
        if dtype != "float32":
            yield f"ragged-{form}-{dtype}", functools.partial(check, form, "per_token_head", "ragged", dtype)


def random_pool(rng: Any, form: str | None, scales: str, dtype: Any, width: int) -> Any:
    L, P, K, S = 2, 9, 3, 4
    if form is None:
        return jnp.asarray(rng.standard_normal((L, P, K, S, width)), dtype)
    stored = FORMATS[form]
    bits = jnp.asarray(rng.integers(0, 60, (L, P, K, S, width // stored.per_element)), jnp.uint8)
    values = jax.lax.bitcast_convert_type(bits, stored.dtype)
    shape = (L, P, K, S) if scales == "per_token_head" else (L, P, 1, 1)
    return QuantizedPages(values, jnp.asarray(rng.uniform(1e-3, 2e-2, shape), jnp.float32))


def assert_same_numbers(found: Any, expected: Any) -> None:
    """Equal bits, but that any NaN equals any other."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))


def write_checks(dtypes: tuple[str, ...]) -> Iterator[Check]:
    """Writes, bit for bit like the plain form's: shuffled slots, some outside; few of many heads; odd widths."""

    def check(form, scales, dtype, D, DV, *, limits, jit):
        rng = np.random.default_rng(len(f"{form}{scales}{dtype}"))
        pools = (
            random_pool(rng, form, scales, dtype, D),
            random_pool(rng, form, scales, dtype, DV) if DV else None,
        )
        T = 29
        k, v = (rng.standard_normal((T, 3, max(w, 1))) for w in (D, DV))
        k, v = (x * np.exp(3 * rng.standard_normal((T, 3, 1))) for x in (k, v))
        if dtype == "float32":
            k[0], k[1, :, 0], k[2, :, 1], k[3], k[4] = 0, np.nan, np.inf, -np.inf, 1e-40
        k, v = jnp.asarray(k, dtype), jnp.asarray(v, dtype) if DV else None
        slots = rng.permutation(9 * 4 + 4)[:T] - 2
        slots[5] = -(2**31)
        slots = jnp.asarray(slots, jnp.int32)
        plain = functools.partial(ops.write_pages, layer=1, implementation="xla")
        expected = (jax.jit(plain) if jit else plain)(*pools, k, v, slots)
        run = functools.partial(write_pages, layer=jnp.int32(1), limits=limits)
        found = (jax.jit(run) if jit else run)(*pools, k, v, slots)
        assert_same_numbers(found, expected)

    for form, scales in [(None, ""), *itertools.product(FORMATS, test_quantize.SCALES)]:
        for dtype, (D, DV) in zip(dtypes, ((6, 10), (96, 0), (128, 64)), strict=False):
            yield f"{form}-{scales}-{dtype}", functools.partial(check, form, scales, dtype, D, DV)


def move_checks() -> Iterator[Check]:
    """Copies, gathers and scatters, bit for bit like the plain form's."""

    def check(dtype, shape, entries, *, limits, jit):
        rng = np.random.default_rng(len(shape))
        bits = jnp.asarray(rng.integers(0, 100, (*shape, jnp.dtype(dtype).itemsize)), jnp.uint8)
        bits = bits[..., 0] if jnp.dtype(dtype).itemsize == 1 else bits
        pool = {"a": jax.lax.bitcast_convert_type(bits, dtype), "b": jnp.zeros((*shape[:2], 3), jnp.float16)}
        src, dst = np.full((2, entries), -1, np.int32)
        src[[0, 1, 2, -1]], dst[[0, 1, 2, -1]] = (3, 99, 5, 1), (8, 2, -1, 0)
        ids = jnp.asarray([4, -1, 0, 12, 7], jnp.int32)
        moves = {
            "copy": (copy_triton.copy_pages, ops.copy_pages, (jnp.asarray(src), jnp.asarray(dst))),
            "gather": (copy_triton.gather_pages, ops.gather_pages, (ids,)),
        }
        blocks = jax.tree.map(lambda x: x[::-1], ops.gather_pages(pool, ids, implementation="xla"))
        moves["scatter"] = copy_triton.scatter_pages, ops.scatter_pages, (ids, blocks)
        for found, expected, arguments in moves.values():
            run = functools.partial(found, limits=limits)
            moved = (jax.jit(run) if jit else run)(pool, *arguments)
            assert_same_numbers(moved, expected(pool, *arguments, implementation="xla"))

    yield "bfloat16", functools.partial(check, jnp.bfloat16, (2, 12, 3, 16, 24), 6)
    yield "float8, odd pages", functools.partial(check, jnp.float8_e5m2, (3, 12, 3, 5), 6)
    yield "a long list, page of one", functools.partial(check, jnp.float32, (1, 12), 300)


GROUPS = ("decode", "ragged", "long", "kernel", "other", "quantised", "writes", "moves")
# The interpreter's share of the suite: one case of each feature. `python tests/test_triton.py` takes all.
SOME = {
    "decode": ("decode_holes", "decode_window_5_traced"),
    "ragged": ("ragged_everything", "ragged_values_wider"),
    "kernel": ("kernel_decode_96",),
    "other": ("gqa_5", "keys_serve", "page_of_three"),
    "quantised": ("ragged_everything",),
    "writes": ("",),
    "moves": ("",),
}


def checks(group: str, dtypes: tuple[str, ...]) -> Iterator[Check]:
    if group == "some":
        for member, names in SOME.items():
            halves = dtypes if member in ("quantised", "writes") else dtypes[:1]
            yield from (x for x in checks(member, halves) if x[0].startswith(names))
    elif group == "quantised":
        yield from quantised_checks(dtypes)
    elif group == "writes":
        yield from write_checks(dtypes)
    elif group == "moves":
        yield from move_checks()
    else:
        yield from attention_checks(group, dtypes)


def _interpret(group: str) -> str:
    """What went wrong in a process of its own, where Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, __file__, group]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return (
        ""
        if ended.returncode == 0
        else ended.stdout[-4000:] + ended.stderr[-4000:] or "it ended without a word"
    )


@needs_triton
def test_interpreted():
    wrong = _interpret("some")
    assert not wrong, wrong


# On a GPU. tests/test_ops.py has the catalogue, with the triton backend among others.


def gpu_limits() -> _triton.Limits:
    try:
        return _triton.device_limits()
    except NotImplementedError as error:
        pytest.skip(str(error))


def _on_gpu() -> Iterator[Any]:
    for group in ("quantised", "writes", "moves"):
        for name, check in checks(group, catalogue.DTYPES):
            yield pytest.param(check, id=f"{group}-{name}")


@pytest.mark.gpu
@pytest.mark.parametrize("check", list(_on_gpu()))
def test_on_gpu(check):
    check(limits=gpu_limits(), jit=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode_mixed_lengths", "ragged_everything"])
def test_vmap_on_gpu(name):
    limits = gpu_limits()
    problem = catalogue.build(test_quantize.BY_NAME[name], "float32")
    arrays = problem.device_arrays()
    q = jnp.stack([arrays["q"], -arrays["q"]])
    out, _ = jax.jit(jax.vmap(lambda q: attend(arrays | {"q": q}, problem.static, limits, jit=False)))(q)
    negative, _ = attend(arrays | {"q": q[1]}, problem.static, limits, jit=True)
    np.testing.assert_allclose(out[0], problem.out, 1e-5, 1e-5)
    np.testing.assert_array_equal(out[1], negative)


def _written(pool, tokens, ids, limits):
    return write_pages(pool, None, tokens[:, 0], None, ids, 1, limits=limits)[0]


def _scanned(pool, tokens, ids, limits):
    def body(pool, layer):
        return write_pages(pool, None, tokens[:, 0], None, ids, layer, limits=limits)[0], None

    return jax.lax.scan(body, pool, jnp.arange(2))[0]


def _copied(pool, tokens, ids, limits):
    return copy_triton.copy_pages(pool, ids[:2], ids[2:4], limits=limits)


def _scattered(pool, tokens, ids, limits):
    blocks = copy_triton.gather_pages(pool, ids[2:4], limits=limits)
    return copy_triton.scatter_pages(pool, ids[:2], blocks, limits=limits)


@pytest.mark.gpu
@pytest.mark.parametrize("change", [_written, _scanned, _copied, _scattered])
@pytest.mark.parametrize("form", [None, "fp8_e4m3"])
def test_donated_pools_change_in_place_on_gpu(change, form):
    limits = gpu_limits()
    pool = random_pool(np.random.default_rng(0), form, "per_token_head", jnp.bfloat16, 16)
    tokens, ids = jnp.ones((5, 2, 3, 16), jnp.bfloat16), jnp.arange(5, dtype=jnp.int32)
    run = jax.jit(functools.partial(change, limits=limits), donate_argnums=0)
    expected = jax.tree.map(np.asarray, jax.jit(functools.partial(change, limits=limits))(pool, tokens, ids))
    where = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(pool)]
    made = run(pool, tokens, ids)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made)] == where
    assert_same_numbers(made, expected)
    if change is _scanned:
        first, second = np.asarray(jax.tree.leaves(made)[0].astype(jnp.float32))[:, 0, :, :4]
        np.testing.assert_array_equal(first, second)


# The interpreter.


class _Memory:
    """What Triton's interpreter asks of a tensor, for a NumPy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = TYPES.get(
            array.dtype.name, re.sub(r"^(u?)int", lambda m: "u" if m[1] else "i", array.dtype.name)
        )

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Memory:
        return self

    cpu = new_empty = set_ = copy_ = size = stride = storage_offset = lambda self, *_, **__: self


def _interpreted(kernel, *inputs, outputs, grid, limits, num_warps, num_stages=1, in_place=None, **constants):
    """`_triton.call`, by Triton's interpreter; results that a kernel does not write are NaN."""
    arrays = [x if isinstance(x, int) else np.array(x) for x in inputs]
    sources = {output: index for index, output in (in_place or {}).items()}
    results = []
    for i, x in enumerate(outputs):
        fill = np.nan if jnp.issubdtype(x.dtype, jnp.floating) else 99
        results.append(arrays[sources[i]].copy() if i in sources else np.full(x.shape, fill, x.dtype))
    kernel[(grid,)](*(x if isinstance(x, int) else _Memory(x) for x in (*arrays, *results)), **constants)
    return [jnp.asarray(x) for x in results]


@_triton.jit
def _reciprocal(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


def _interpreted_failures(group: str) -> list[str]:
    """What goes wrong in a group, by name; there must be something to check."""
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):  # NumPy makes no Python integer of an array of one axis any more
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    builder: Any = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def booleans(mask):  # Triton 3.9 spreads a condition as an integer, which it then refuses
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    builder.create_masked_load = lambda self, at, mask, *rest: load(self, at, booleans(mask), *rest)
    builder.create_masked_store = lambda self, at, x, mask, *rest: store(self, at, x, booleans(mask), *rest)
    np.seterr(all="ignore")
    jax.config.update("jax_default_matmul_precision", "highest")
    for module in KERNELS:
        module.call = _interpreted
    write_triton._reciprocal = _reciprocal  # the interpreter knows no assembler
    dtypes = ("float32", "float16") if group in ("some", "decode", "quantised", "writes") else ("float32",)
    wrong, count = [], 0
    for name, check in checks(group, dtypes):
        count += 1
        try:
            check(limits=SMALL, jit=False)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {str(error)[-600:]}")
    assert count
    return wrong


def _everything() -> None:
    for case in ATTENTION:
        test_attention_compiles_and_fits(*case)
        print("ok", *case, flush=True)
    for case in WRITES:
        test_writes_compile_without_spills(*case)
        print("ok", *case, flush=True)
    test_moves_compile_with_wide_accesses()
    for group in GROUPS:
        print(group, _interpret(group) or "ok", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        _everything()
    else:
        found = _interpreted_failures(sys.argv[1])
        print("\n".join(found))
        sys.exit(len(found) > 0)
