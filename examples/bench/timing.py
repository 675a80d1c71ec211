"""How fast a call is, whether it is right, and how fast the device could be; shared by the benchmarks.

What counts is when the device works, not when the host asks for it. An operation is called `repeats` times, each time
after a kernel that replaces all of the L2 cache; its time is the span from the start of its first kernel to the end of
its last one. The flushes, known by name, tell the repetitions apart in the trace. Where there is no GPU, or its trace
is empty, the host's clock is read instead, and the result says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CHUNK = 4096  # int32 that the copy engine reads at once, 16 KB
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache
TOLERANCE = 1e-2  # of ‖out − reference‖ / ‖reference‖, for bfloat16


@dataclasses.dataclass(frozen=True)
class Event:
    """One kernel, copy or fill on the device."""

    name: str
    start_ns: float
    duration_ns: float

    @property
    def end_ns(self) -> float:
        return self.start_ns + self.duration_ns


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of an operation in microseconds."""

    us: float
    """Median span, from the first kernel's start to the last one's end."""
    low_us: float
    high_us: float
    sum_us: float
    """Median sum of the kernels' own times: without gaps between them, and twice where two overlap."""
    kernels: dict[str, int]
    """How often each kernel runs in one repetition."""
    clock: str
    """"device", or "wall" for the host's clock."""


def on_gpu() -> bool:
    return jax.devices()[0].platform == "gpu"


def read_events(folder: str | Path) -> list[Event]:
    """What ran on the GPU's streams while a trace was taken, by starting time."""
    events = []
    for file in Path(folder).rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                if line.name and line.name.startswith("Stream"):
                    events += [Event(e.name, e.start_ns, e.duration_ns) for e in line.events]
    return sorted(events, key=lambda event: event.start_ns)


def device_events(folder: str | Path) -> dict[str, tuple[int, float]]:
    """Per name, how often a kernel or copy ran on the GPU and its microseconds, from a profiler trace."""
    return totals(read_events(folder))


def totals(events: Iterable[Event]) -> dict[str, tuple[int, float]]:
    """Per name, the number of events and their microseconds."""
    counts: Counter[str] = Counter()
    durations: defaultdict[str, float] = defaultdict(float)
    for event in events:
        counts[event.name] += 1
        durations[event.name] += event.duration_ns / 1000
    return {name: (counts[name], durations[name]) for name in counts}


@contextlib.contextmanager
def traced() -> Iterator[list[Event]]:
    """Records what the GPU does in the block; the list is filled when the block ends, and stays empty on a CPU."""
    events: list[Event] = []
    if not on_gpu():
        yield events
        return
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = (
        0,
        1,
    )  # the host's own calls would swamp the trace
    options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            yield events
        events += read_events(folder)


def span_us(events: Iterable[Event]) -> float:
    """Microseconds from the first start to the last end."""
    events = list(events)
    return (max(e.end_ns for e in events) - min(e.start_ns for e in events)) / 1000


def split_repetitions(events: Iterable[Event], markers: frozenset[str], repeats: int) -> list[list[Event]]:
    """The events between marker kernels, in `repeats` groups of equally many.

    Raises:
      RuntimeError: the trace does not look like that; it lost events, or the operation runs kernels named as markers.
    """
    groups: list[list[Event]] = [[]]
    for event in events:
        if event.name not in markers:
            groups[-1].append(event)
        elif groups[-1]:
            groups.append([])
    groups = [group for group in groups if group]
    if len(groups) != repeats or len({len(group) for group in groups}) != 1:
        raise RuntimeError(
            f"trace: expected {repeats} groups of equally many kernels, got {[len(group) for group in groups]}"
        )
    return groups


@functools.cache
def _flush() -> tuple[Callable[[], jax.Array], frozenset[str]]:
    """A call that replaces what the L2 cache holds, and the names of its kernels."""
    # Few programs count bits, so that no kernel measured here is likely to have the same name.
    count_bits = jax.jit(lax.population_count, donate_argnums=0)
    size = FLUSH_BYTES // 4 if on_gpu() else 4
    buffer = count_bits(jax.random.bits(jax.random.key(0), (size,), jnp.uint32))

    def flush() -> jax.Array:
        nonlocal buffer
        buffer = count_bits(buffer)
        return buffer

    jax.block_until_ready(flush())
    with traced() as events:
        jax.block_until_ready(flush())
    return flush, frozenset(event.name for event in events)


def measure(call: Callable[[], Any], *, repeats: int, warmups: int = 3) -> Timing:
    """Time of ``call()``, whose arrays lie on the device and whose result is ready when it has been computed.

    Raises:
      RuntimeError: the trace cannot be split into repetitions.
    """
    flush, markers = _flush()
    for _ in range(warmups):
        out = call()
    jax.block_until_ready(out)
    with traced() as events:
        for _ in range(repeats):
            flush()
            out = call()
        jax.block_until_ready(out)
    if events:
        groups = split_repetitions(events, markers, repeats)
        spans = [span_us(group) for group in groups]
        sums = [sum(event.duration_ns for event in group) / 1000 for group in groups]
        kernels = dict(Counter(event.name for event in groups[-1]))
        clock = "device"
    else:
        spans, kernels, clock = [], {}, "wall"
        for _ in range(repeats):
            jax.block_until_ready(flush())
            begin = time.perf_counter()
            jax.block_until_ready(call())
            spans.append((time.perf_counter() - begin) * 1e6)
        sums = spans
    return Timing(statistics.median(spans), min(spans), max(spans), statistics.median(sums), kernels, clock)


def reason(error: Exception) -> str:
    """Why a contestant gave no result, in one line."""
    first = next(iter(str(error).strip().splitlines()), "")[:200]
    limits = NotImplementedError, ValueError, jax.errors.JaxRuntimeError
    return f"refused: {first}" if isinstance(error, limits) else f"failed: {type(error).__name__}: {first}"


def header(program: str, **more: Any) -> dict[str, Any]:
    """Prints and returns what is measured where."""
    facts = {
        "program": program,
        "device": jax.devices()[0].device_kind,
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        **more,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if not on_gpu():
        print("no GPU: times are of the host's clock and say nothing about one", flush=True)
    return facts


# --------------------------------------------------------------------------------------------------
# Checking and comparing
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run a contestant."""

    call: Callable[[], Any]
    view: Callable[[Any], Any] = lambda out: out
    """Brings the result of the call into the form that is checked."""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What is measured in a case; the fastest of its variants that give the right result counts."""

    name: str
    build: Callable[[], list[Variant]]
    is_peer: bool = False


@dataclasses.dataclass
class Result:
    """A line of the report; without a time where `note` says why."""

    section: str
    case: str
    contestant: str
    is_peer: bool = False
    note: str = ""
    us: float | None = None
    rate: float | None = None
    unit: str = ""
    of_limit: float | None = None
    vs_peer: float | None = None
    timing: Timing | None = None

    def __str__(self) -> str:
        def number(x, form, unit):
            return " " * (len(unit) + 9) if x is None else f"{x:9{form}}{unit}"

        columns = number(self.us, ".1f", " µs"), number(self.rate, ".2f", f" {self.unit:8}")
        columns += number(self.of_limit, ".1%", " of limit"), number(self.vs_peer, ".2f", " vs peer")
        clock = " (wall clock)" if self.timing and self.timing.clock == "wall" else ""
        return f"{self.case:34.34} {self.contestant:20.20}{''.join(columns)}  {self.note}{clock}".rstrip()


@dataclasses.dataclass
class Report:
    """Prints each result as it comes, and keeps the file up to date."""

    facts: dict[str, Any]
    repeats: int
    path: Path | None = None
    results: list[Result] = dataclasses.field(default_factory=list)

    def add(self, result: Result) -> None:
        if not self.results or self.results[-1].section != result.section:
            print(f"\n{result.section}", flush=True)
        print(f"  {result}", flush=True)
        self.results.append(result)
        self.save()

    @contextlib.contextmanager
    def guarded(self, section: str, case: str) -> Iterator[None]:
        """A block whose failure is a line of the report: the other cases' numbers are worth having."""
        try:
            yield
        except Exception as error:
            self.add(Result(section, case, "", note=reason(error)))

    def save(self) -> None:
        if self.path:
            content = {**self.facts, "results": [dataclasses.asdict(r) for r in self.results]}
            fresh = self.path.with_suffix(".tmp")
            fresh.write_text(json.dumps(content, indent=1, ensure_ascii=False))
            fresh.replace(self.path)


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    """‖out − expected‖ / ‖expected‖; NaN where out has one."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm((out - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def close_to(expected: jax.Array) -> Callable[[Any], str]:
    """A check that says what is wrong with a result, or nothing."""

    def wrong(out: jax.Array) -> str:
        if out.shape != expected.shape:
            return f"shape {out.shape} instead of {expected.shape}"
        error = relative_error(out, expected)
        return "" if error < TOLERANCE else f"relative error {error:.2g}"

    return wrong


def compare(
    report: Report,
    section: str,
    case: str,
    contestants: list[Contestant],
    *,
    wrong: Callable[[Any], str],
    work: float | None = None,
    unit: str = "TB/s",
    limit_us: float = math.nan,
    peer_us: float = math.inf,
) -> dict[str, Result]:
    """Checks and times each contestant of a case.

    Args:
      report: takes the results.
      section, case: names.
      contestants: what to measure.
      wrong: says what is wrong with a result; "" is right.
      work: bytes or floating-point operations of the case.
      unit: "TB/s" or "TFLOP/s".
      limit_us: the time that the device needs at least, where it is known.
      peer_us: the best time of peers measured elsewhere.

    Returns:
      The results by contestant.
    """
    results = {}
    for contestant in contestants:
        result = Result(section, case, contestant.name, contestant.is_peer)
        try:
            variants = contestant.build()
        except Exception as error:  # a peer's private interface may fail in any way
            variants, result.note = [], reason(error)
        for variant in variants:
            try:
                if mistake := wrong(variant.view(variant.call())):
                    result.note = result.note if result.us else f"WRONG: {mistake} {variant.note}".strip()
                    continue
                taken = measure(variant.call, repeats=report.repeats)
            except Exception as error:
                result.note = result.note if result.us else reason(error)
                continue
            if result.us is None or taken.us < result.us:
                result.us, result.note, result.timing = taken.us, variant.note, taken
        if result.us is not None:
            if work is not None:
                result.rate, result.unit = work / result.us / 1e6, unit
            result.of_limit = limit_us / result.us if math.isfinite(limit_us) else None
        del variants  # and their arrays, before the next contestant makes its own
        report.add(result)
        results[contestant.name] = result
    peer_us = min([peer_us, *(r.us for r in results.values() if r.is_peer and r.us is not None)])
    for result in results.values():
        if result.us is not None and not result.is_peer and math.isfinite(peer_us):
            result.vs_peer = peer_us / result.us
            print(f"    {result.contestant}: {result.vs_peer:.2f} vs the best peer", flush=True)
    report.save()
    return results


# --------------------------------------------------------------------------------------------------
# The machine's limits
# --------------------------------------------------------------------------------------------------


def stream_reader(num_programs: int, interpret: Any = None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A kernel that reads the first ``count[0]`` chunks through the copy engine and drops them.

    Returns the beginning of the last chunk of each program, so that there is something to check.
    """
    from paxcache.kernels.sm90._mosaic import pl, plgpu  # noqa: PLC0415

    def kernel(count_ref, source_ref, out_ref, buffer, loaded):
        program = lax.axis_index("program")

        def read(i, _):
            # In bounds, so that it is one bulk copy: tensor copies are limited to 256 elements.
            in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            chunk = source_ref.at[program + i * num_programs]
            plgpu.copy_gmem_to_smem(chunk, buffer, loaded, oob_mode=in_bounds)
            plgpu.barrier_wait(loaded)  # the copy engine arrives when the chunk is there

        mine = lax.div(count_ref[0] - program + np.int32(num_programs - 1), np.int32(num_programs))
        lax.fori_loop(0, mine, read, None)
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, 128)], out_ref.at[program])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_programs, 128), jnp.int32),
        grid=(num_programs,),
        grid_names=("program",),
        scratch_types=[plgpu.SMEM((CHUNK,), jnp.int32), plgpu.Barrier()],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="stream_reader",
        interpret=interpret,
    )


def last_chunks(num_programs: int, count: int) -> np.ndarray:
    """The chunk that each program of `stream_reader` reads last; negative for programs without any."""
    programs = np.arange(num_programs)
    return programs + (count - 1 - programs) // num_programs * num_programs


class Limits:
    """What the device needs at least, measured when first asked for."""

    def __init__(self, report: Report, quick: bool):
        self.report, self.quick = report, quick
        self.read_us, self.copy_us = functools.cache(self._read_us), functools.cache(self._copy_us)
        self.flops_per_us, self.source = functools.cache(self._flops_per_us), functools.cache(self._source)
        self.reader = functools.cache(lambda programs: jax.jit(stream_reader(programs)))

    def _source(self) -> jax.Array:
        """4 GiB of random int32 [chunks, CHUNK]: zeros can be faster than real data."""
        chunks = 2**18 // (1024 if self.quick else 1)
        return jax.random.bits(jax.random.key(1), (chunks, CHUNK), jnp.uint32).view(jnp.int32)

    def _best_us(self, case: str, contestants: list[Contestant], wrong: Any, work: float, unit: str) -> float:
        results = compare(self.report, "limits", case, contestants, wrong=wrong, work=work, unit=unit)
        return min((r.us for r in results.values() if r.us is not None), default=math.nan)

    def _read_us(self, num_bytes: float) -> float:
        """To read so many bytes."""
        data = self.source()
        count = min(max(1, round(num_bytes / (4 * CHUNK))), len(data))

        def wrong(out):
            if out.ndim == 0:
                return "" if out == jnp.max(data[:count]) else "another maximum"
            last = last_chunks(len(out), count)
            right = (out == data[np.maximum(last, 0), :128]).all(axis=1) | (last < 0)
            return "" if right.all() else "other data"

        def reduction():
            return [Variant(functools.partial(jax.jit(lambda x: jnp.max(x[:count])), data))]

        def streaming():
            if not on_gpu():
                raise NotImplementedError("the copy engine is a GPU's")
            num_sms, number = int(jax.devices()[0].core_count), jnp.array([count], jnp.int32)
            readers = {n: functools.partial(self.reader(n * num_sms), number, data) for n in (6, 10)}
            return [Variant(call, note=f"{n} programs an SM") for n, call in readers.items()]

        size = count * CHUNK * 4
        contestants = [Contestant("XLA reduction", reduction), Contestant("copy engine", streaming)]
        return (
            self._best_us(f"read {size / 2**20:.1f} MiB", contestants, wrong, size, "TB/s") * num_bytes / size
        )

    def _copy_us(self, num_bytes: float) -> float:
        """To read and write so many bytes together, half of them each."""
        count = min(max(1, round(num_bytes / (8 * CHUNK))), len(self.source()))
        data = self.source()[:count]

        def copies():
            copy, invert = jax.jit(jnp.copy), jax.jit(jnp.invert)
            return [Variant(lambda: copy(data)), Variant(lambda: invert(data), jnp.invert, "by a kernel")]

        def wrong(out):
            return "" if (out == data).all() else "other data"

        size = 2 * data.nbytes
        case = f"copy {data.nbytes / 2**20:.1f} MiB"
        return self._best_us(case, [Contestant("XLA", copies)], wrong, size, "TB/s") * num_bytes / size

    def _flops_per_us(self) -> float:
        """Of a large bfloat16 matrix product."""
        n = 256 if self.quick else 8192
        a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
        expected = jnp.dot(a[:64].astype(jnp.float32), b.astype(jnp.float32), precision="highest")
        product = jax.jit(jnp.dot)
        xla = Contestant("XLA", lambda: [Variant(lambda: product(a, b), lambda out: out[:64])])
        return 2 * n**3 / self._best_us(f"product {n}³", [xla], close_to(expected), 2 * n**3, "TFLOP/s")
