"""The benchmark programs at tiny sizes on the CPU: that they run, check before they time, and read traces right."""

from __future__ import annotations

import contextlib
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aot
import bench_decode_step
import bench_kernels
import bench_offload
import oracle
import paxcache
import timing
import tune_kernels
from paxcache.kernels._request import Shapes
from paxcache.kernels.sm90 import _mosaic
from paxcache.kernels.sm90 import decode as decode_sm90
from timing import Contestant, Event, Report, Variant

# Times in picoseconds. The second stream's kernel overlaps the first's last one; the line "XLA Ops" tells the same
# kernels again, and the host's plane has lines named like streams.
TRACE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "attend" } }
  event_metadata { key: 2 value { id: 2 name: "flush" } }
  lines {
    name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 9000000 duration_ps: 3000000 }
    events { metadata_id: 2 offset_ps: 1000000 duration_ps: 8000000 }
  }
  lines {
    name: "Stream #14(MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 11000000 duration_ps: 2500000 }
  }
  lines { name: "XLA Ops" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 0 duration_ps: 1000000 } }
}
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "attend" } }
  lines { name: "Stream #1" timestamp_ns: 1000 events { metadata_id: 1 offset_ps: 0 duration_ps: 1000000 } }
}
"""


@pytest.fixture
def trace_folder(tmp_path):
    folder = tmp_path / "plugins" / "profile" / "run"
    folder.mkdir(parents=True)
    serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace(TRACE)
    (folder / "host.xplane.pb").write_bytes(serialized)
    return tmp_path


# --------------------------------------------------------------------------------------------------
# Traces
# --------------------------------------------------------------------------------------------------


def test_events_of_the_streams_in_order(trace_folder):
    assert timing.read_events(trace_folder) == [
        Event("flush", 2000, 8000),
        Event("attend", 10000, 3000),
        Event("attend", 12000, 2500),
    ]


def test_totals_by_name(trace_folder):
    assert timing.device_events(trace_folder) == {"flush": (1, 8.0), "attend": (2, 5.5)}


def test_span_counts_overlap_once_and_gaps(trace_folder):
    flush, *kernels = timing.read_events(trace_folder)
    assert timing.span_us(kernels) == 4.5
    assert timing.span_us([flush, kernels[1]]) == 12.5


def repetitions(*groups):
    """A trace of a flush of two kernels before each group of (name, µs after the last event's end, µs)."""
    events, now = [], 0.0
    for group in groups:
        for name, wait, us in [("flush", 0, 100), ("flush", 0, 1), *group]:
            events.append(Event(name, now + wait * 1000, us * 1000))
            now = max(now, events[-1].end_ns)
    return events


def test_measure_takes_medians_over_repetitions(monkeypatch):
    events = repetitions(*([("a", 5, 10), ("b", gap, 20)] for gap in (2, 3, -4)))  # the last two overlap

    @contextlib.contextmanager
    def traced():
        yield events

    monkeypatch.setattr(timing, "traced", traced)
    monkeypatch.setattr(timing, "_flush", lambda: (lambda: None, frozenset({"flush"})))
    calls = []
    taken = timing.measure(lambda: calls.append(1), repeats=3, warmups=1)
    assert len(calls) == 4
    assert taken == timing.Timing(32, 26, 33, 30, {"a": 1, "b": 1}, "device")


@pytest.mark.parametrize(
    "events",
    [
        pytest.param(repetitions([("a", 0, 1)], []), id="a repetition is lost"),
        pytest.param(repetitions([("a", 0, 1)], [("a", 0, 1), ("b", 0, 1)]), id="a kernel is lost"),
        pytest.param(repetitions([("a", 0, 1)], [("a", 0, 1)], [("a", 0, 1)]), id="too many"),
        pytest.param(repetitions([("a", 0, 1), ("flush", 0, 1), ("a", 0, 1)], [("a", 0, 1)]), id="same name"),
    ],
)
def test_a_broken_trace_gives_no_time(events):
    with pytest.raises(RuntimeError, match="expected 2 groups"):
        timing.split_repetitions(events, frozenset({"flush"}), 2)


def test_steps_are_split_by_kernel_names():
    names = {
        "paxcache_decode_mosaic_gpu_kernel": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16": "attention",
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNN": "products",
        "gemm_fusion_dot_12": "products",
        "paxcache_write_mosaic_gpu_kernel": "rest",
        "loop_add_fusion": "rest",
    }
    for name, kind in names.items():
        split = bench_decode_step.split_by_kind([Event(name, 0, 3e6)] * 2, steps=2)
        assert split == {"attention": 0, "products": 0, "rest": 0, kind: 3}


# --------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------

EXPECTED = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


@pytest.mark.parametrize(
    "out",
    [
        pytest.param(EXPECTED * 1.02, id="scaled"),
        pytest.param(np.where(np.arange(4)[:, None] == 2, 0, EXPECTED), id="a row missing"),
        pytest.param(np.where(EXPECTED[1, 1] == EXPECTED, np.nan, EXPECTED), id="NaN"),
        pytest.param(EXPECTED[:3], id="shape"),
    ],
)
def test_a_wrong_result_is_reported_and_not_timed(monkeypatch, out):
    monkeypatch.setattr(timing, "measure", lambda *args, **options: pytest.fail("timed"))
    contestants = [Contestant("it", lambda: [Variant(lambda: jnp.asarray(out))])]
    wrong = timing.close_to(jnp.asarray(EXPECTED))
    results = timing.compare(Report({}, 1), "decode", "case", contestants, wrong=wrong)
    assert results["it"].us is None
    assert results["it"].note.startswith("WRONG")


def test_one_failure_loses_no_other_number(tmp_path):
    """Refusals, failures and wrong variants are lines of the report; the file has all that came before."""
    path = tmp_path / "results.json"
    report, saved = Report({"device": "x"}, 2, path), []

    def refuse():
        raise NotImplementedError("no pages")

    def fail():
        saved.append(len(json.loads(path.read_text())["results"]))
        raise AttributeError("gone")

    negate, minus = jax.jit(jnp.negative), -jnp.asarray(EXPECTED)
    right, off = (lambda: negate(minus)), (lambda: jnp.zeros(1))
    contestants = [
        Contestant("refuses", refuse, is_peer=True),
        Contestant("fails", fail, is_peer=True),
        Contestant("fails late", lambda: [Variant(fail), Variant(right)], is_peer=True),
        Contestant("ours", lambda: [Variant(off), Variant(right, note="good")]),
    ]
    wrong = timing.close_to(jnp.asarray(EXPECTED))
    with report.guarded("decode", "another"):
        refuse()
    timing.compare(
        report, "decode", "case", contestants, wrong=wrong, work=8e6, limit_us=math.inf, peer_us=5.0
    )
    assert saved == [2, 3]
    results = {r["contestant"]: r for r in json.loads(path.read_text())["results"]}
    assert results[""]["note"] == results["refuses"]["note"] == "refused: no pages"
    assert results["fails"]["note"].startswith("failed: AttributeError: gone")
    ours, late = results["ours"], results["fails late"]
    assert ours["note"] == "good" and ours["of_limit"] is None
    assert late["us"] > 0 and late["note"] == ""
    assert ours["rate"] == pytest.approx(8 / ours["us"])
    assert ours["vs_peer"] == pytest.approx(min(5.0, late["us"]) / ours["us"])


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [5, 1, 300]])
def test_reference_is_the_oracles(query_lens):
    """Over shuffled pages with NaN past the lengths, the blocks of a long row included."""
    case = bench_kernels.Case(np.array([37, 1, 301], np.int32), np.array(query_lens, np.int32), 4, 2)
    batch = bench_kernels.make_batch(3, case, 16)
    assert bool(jnp.isnan(batch.k_pages).any()) and bool(jnp.isnan(batch.v_pages).any())
    out, _ = oracle.paged_attention(
        *batch.arrays, query_starts=batch.query_starts, query_lens=batch.query_lens
    )
    np.testing.assert_allclose(bench_kernels.reference(batch), out, atol=1e-5)
    some, _ = oracle.paged_attention(
        *batch.rows(1, 3).arrays, query_starts=[0, query_lens[1]], query_lens=query_lens[1:]
    )
    np.testing.assert_allclose(some, out[query_lens[0] :], atol=1e-9)
    visible = sum(
        int(n - new + i + 1) for n, new in zip([37, 1, 301], query_lens, strict=True) for i in range(new)
    )
    assert batch.flops == 4 * 4 * 128 * visible


def test_pages_past_the_lengths_are_clean_for_peers():
    case = bench_kernels.Case(np.array([37, 1], np.int32), np.ones(2, np.int32), 4, 2)
    batch = bench_kernels.make_batch(3, case, 16)
    clean = batch.clean()
    assert bool(jnp.isfinite(clean.k_pages).all()) and bool((clean.block_tables >= 0).all())
    np.testing.assert_array_equal(bench_kernels.reference(clean), bench_kernels.reference(batch))


def test_moves_are_checked_bit_by_bit():
    pool = jnp.arange(8.0).reshape(2, 4)
    wrong = bench_kernels.exactly(lambda x: (x, x), pool)
    assert wrong((pool, pool)) == ""
    assert wrong((pool, pool.at[1, 2].add(1e-3))) == "1 elements differ"
    assert wrong((pool, pool.at[:, 1].set(jnp.nan))) == "2 elements differ"


@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_stream_reader_reads_every_programs_last_chunk(count):
    """In the interpreter; with more programs than chunks too."""
    data = jax.random.bits(jax.random.key(0), (8, timing.CHUNK), jnp.uint32).view(jnp.int32)
    read = timing.stream_reader(3, interpret=_mosaic.interpreter(detect_races=True))
    out = read(jnp.array([count], jnp.int32), data)
    last = timing.last_chunks(3, count)
    assert max(last) == count - 1 and (last < 0).sum() == max(3 - count, 0)
    np.testing.assert_array_equal(out[: min(count, 3)], data[last[last >= 0], :128])


@pytest.mark.skipif(not aot.available(), reason="JAX's CUDA plug-in is not installed")
def test_stream_reader_compiles_for_an_h200():
    shapes = jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((2**18, timing.CHUNK), jnp.int32)
    compiled = aot.compile_for_h200(timing.stream_reader(8 * 132), *shapes)
    assert [kernel.spill_bytes for kernel in compiled.kernels] == [0]


# --------------------------------------------------------------------------------------------------
# The programs
# --------------------------------------------------------------------------------------------------


def test_bench_kernels_runs(monkeypatch, tmp_path):
    """Every section: "xla" right everywhere, what needs another GPU refused, and each case against a limit."""
    clock = "device" if timing.on_gpu() else "wall"
    all_cases = bench_kernels.attention_cases

    def fewer(section, quick):
        cases = all_cases(section, quick)
        names = ("64 ragged 2k-8k",) if section == "decode" else ("mixed",)
        return {name: cases[name] for name in names}

    monkeypatch.setattr(bench_kernels, "attention_cases", fewer)
    report = bench_kernels.main(["--quick", "--repeats", "1", "--json", str(tmp_path / "out.json")])
    assert {r.section for r in report.results} == set(bench_kernels.SECTIONS)
    assert not [str(r) for r in report.results if "WRONG" in r.note]
    for result in report.results:
        if result.contestant == "ops.plan" or result.contestant.upper().startswith("XLA"):
            assert result.us is not None, str(result)
        if result.us is None:
            assert result.note.startswith(("refused", "failed"))
        else:
            assert result.timing is not None and result.timing.clock == clock
        if result.contestant == "xla" and "nothing" not in result.case:
            assert result.of_limit is not None
    mixed = [r for r in report.results if r.case == "mixed, page 16" and r.contestant == "xla"]
    assert "of the sum of its parts" in mixed[0].note
    saved = json.loads((tmp_path / "out.json").read_text())
    assert len(saved["results"]) == len(report.results) and saved["jax"] == jax.__version__


def test_bench_kernels_finds_wrong_attention(monkeypatch):
    """A result that forgets the last token of each row."""
    right = bench_kernels.ops.paged_attention

    def forgetful(q, k, v, tables, lens, **options):
        options["plan"] = None
        return right(q, k, v, tables, jnp.maximum(lens - 1, 1), **options)

    monkeypatch.setattr(bench_kernels.ops, "paged_attention", forgetful)
    case = bench_kernels.Case(np.array([37, 20], np.int32), np.ones(2, np.int32), 4, 2)
    monkeypatch.setattr(bench_kernels, "attention_cases", lambda section, quick: {"case": case})
    report = bench_kernels.main(["--quick", "--repeats", "1", "--only", "decode"])
    (xla,) = [r for r in report.results if r.contestant == "xla"]
    assert xla.us is None and xla.note.startswith("WRONG: relative error")


def test_bench_decode_step_runs(tmp_path):
    path = tmp_path / "out.json"
    arguments = ["--tiny", "--xla", "--steps", "2", "--cases", "2x4k", "3r8k", "--json", str(path)]
    results = bench_decode_step.main(arguments)
    names = [(r["case"], r["contestant"]) for r in results]
    first = ["cuDNN dense", "XLA dense", "paged scan", "paged unrolled"]
    assert names[:4] == [("2x4k", name) for name in first]
    assert names[4:6] == [("3r8k", name) for name in first[:2]]
    assert names[6:] in ([("3r8k", name)] for name in first[2:])  # the faster form goes on
    for result in results:
        if "note" in result:  # cuDNN needs a GPU, and takes not every shape
            assert result["contestant"] == "cuDNN dense" and result["note"].startswith(("failed", "refused"))
        else:
            assert result["ms"] > 0
    assert all(r["error"] < 0.05 for r in results if r["contestant"].startswith("paged"))
    assert json.loads(path.read_text())["results"] == results


def test_bench_decode_step_finds_wrong_attention(monkeypatch):
    right = paxcache.attend
    monkeypatch.setattr(paxcache, "attend", lambda *args: right(*args, sliding_window=50))
    arguments = ["--tiny", "--xla", "--steps", "1", "--cases", "2x4k", "--form", "scan"]
    paged = bench_decode_step.main(arguments)[-1]
    assert paged["contestant"] == "paged scan"
    assert paged["note"].startswith("WRONG") and "ms" not in paged


@pytest.mark.parametrize("case, lens", [("1x8k", [8192]), ("3x4k", [4096] * 3), ("2r8k", None)], ids=str)
def test_cases_are_rows_and_lengths(case, lens):
    found = bench_decode_step.row_lens(case, tiny=False)
    if lens is None:
        assert found.shape == (2,) and (found >= 2048).all() and (found <= 8192).all()
    else:
        assert found.tolist() == lens


@pytest.fixture
def quick_programs():
    """Programs that nobody times are compiled without most optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_programs")
def test_bench_offload_runs(tmp_path):
    """Every section; whatever brought other bits back would be WRONG, and nothing but torch's own copies is refused."""
    path = tmp_path / "out.json"
    report = bench_offload.main(["--tiny", "--json", str(path)])
    assert {r.section for r in report.results} == {*bench_offload.SECTIONS, "summary"}
    notes = [f"{r.case}: {r.note}" for r in report.results]
    assert not [n for n in notes if "WRONG" in n]
    if not timing.on_gpu():
        assert not [n for n in notes if re.search("refused|failed", n) and ", torch" not in n]
    swapped = [r for r in report.results if r.section == "swap" and r.of_limit is not None]
    assert {r.contestant for r in swapped} >= {
        "offload.swap_out",
        "in one program",
        "offload.swap_in",
        "fresh",
    }
    assert len(json.loads(path.read_text())["results"]) == len(report.results)


@pytest.mark.usefixtures("quick_programs")
def test_bench_offload_finds_other_bits(monkeypatch):
    right = bench_offload._pages._copy_out

    def zeros(pages, page_ids, ref_counts, *options):
        nothing = tuple(jnp.full_like(ids, -1) for ids in page_ids)
        blocks, _ = right(pages, nothing, None, *options)
        return blocks, right(pages, page_ids, ref_counts, *options)[1]

    monkeypatch.setattr(bench_offload._pages, "_copy_out", zeros)
    report = bench_offload.main(["--tiny", "--only", "swap"])
    wrong = [r.case for r in report.results if "WRONG" in r.note]
    for form in ("offload.swap_out", "offload.swap_in", "put, then scatter"):
        assert [case for case in wrong if form in case]


# --------------------------------------------------------------------------------------------------
# Tuning
# --------------------------------------------------------------------------------------------------


def test_a_search_ends_where_no_step_gains_enough():
    """A bowl with its bottom at 6, a little dip beyond a step that gains too little, and a place that does not fit."""
    costs = {3: 40.0, 4: 30.0, 5: 20.0, 6: 10.0, 7: 9.95, 8: 1.0, 2: math.inf}
    asked = []

    def cost(x):
        asked.append(x)
        return costs[x]

    best, tried = tune_kernels.search(3, lambda x: (x - 1, x + 1), cost, gain=0.01)
    assert best == 6
    assert asked == [3, 2, 4, 5, 6, 7]  # each once
    assert tried == {x: costs[x] for x in asked}
    assert tune_kernels.search(2, lambda x: (x + 1,), cost, gain=0.01)[0] == 6  # from one that does not fit


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_neighbours_differ_in_a_field_and_keep_what_must_hold(dtype):
    limits = _mosaic.DeviceLimits()
    shapes = Shapes(
        num_rows=1, num_tokens=1, max_query_len=1, num_heads=32, num_kv_heads=8, head_dim=128, page_size=16,
        dtype=jnp.dtype(dtype), windowed=False,
    )  # fmt: skip
    config = decode_sm90.default_config(shapes, limits=limits)
    found = list(tune_kernels.decode_sm90(config, limits.num_sms))
    assert len(set(found)) == len(found) > 4
    assert config not in found
    for other in found:
        assert "," not in tune_kernels.described(other, config)
        assert other.num_programs % other.lanes == 0 == other.min_programs % other.lanes
        assert other.min_programs <= config.num_programs
    assert tune_kernels.described(config, config) == "as it is"


def test_tuning_says_where_a_kernel_cannot_run(capsys):
    assert tune_kernels.main(["--quick", "--kernel", "write_sm90", "decode_sm90", "--case", "1 x 8k"]) == {}
    assert "refused: plan: mosaic_gpu needs a Hopper GPU" in capsys.readouterr().out
