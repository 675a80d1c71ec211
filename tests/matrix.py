"""Every shape that the Hopper kernels take, on a GPU, against float64: ``python tests/matrix.py``.

A combination is a head dim, a page size, a dtype of pages, a group (query heads of a KV head) and a kind of step.
Several processes work at once, one combination after the other: where one crashes, that combination has failed, and a
new process goes on. What also fails: a wrong result, a refusal that is not expected, a program that calls no kernel.

``--sample N --seed S`` takes N combinations at random; all of them belong to any change of a kernel. Windows, soft
caps, sinks, and float16 queries of quantised pages are drawn by the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import queue
import random
import subprocess
import sys
import threading
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _quantize, ops
from rows import TOLERANCE

HEAD_DIMS = 64, 96, 128, 192, 256
PAGE_SIZES = 8, 16, 32, 64, 128
DTYPES = "bfloat16", "float16", "float32", "fp8_e4m3", "fp8_e5m2", "int8", "int4"
GROUPS = 1, 4, 7, 8

KV_HEADS = 2
ROWS = {  # of each kind of step, batches of as many rows: tokens, and new ones of them
    "decode": [([1, 17, 0, 130, 333, 1500], [1, 1, 0, 1, 1, 1])],
    "short": [([3, 45, 0, 130, 333, 1500], [3, 5, 0, 1, 2, 4])],
    "long": [
        ([190, 0, 333, 77, 700, 0], [99, 0, 333, 63, 201, 0]),  # prompts alone
        ([1, 900, 333, 190, 65, 40], [1, 1, 150, 99, 1, 7]),  # and single tokens beside them
    ],
}
STEPS = tuple(ROWS)
FEW = {"decode": 1, "short": 5}
"""Most new tokens of a row, where a step says so."""


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """What combinations share that differ in their page size alone: inputs and what to expect."""

    head_dim: int
    dtype: str
    group: int
    step: str

    def __str__(self) -> str:
        return f"head_dim={self.head_dim} dtype={self.dtype} group={self.group} {self.step}"


def combinations() -> list[tuple[Cell, int]]:
    """All cells, each with all page sizes."""
    return [(Cell(*x), S) for x in itertools.product(HEAD_DIMS, DTYPES, GROUPS, STEPS) for S in PAGE_SIZES]


def is_refused(cell: Cell) -> bool:
    """Whether no Hopper kernel takes it: two values a byte need rows of 128."""
    return cell.dtype == "int4" and cell.head_dim % 128 != 0


def features_of(cell: Cell, seed: int) -> dict[str, Any]:
    """What else the step has, the same for each page size."""
    rng = random.Random(zlib.crc32(f"{seed} {cell}".encode()))
    few_bits = cell.dtype not in DTYPES[:3]
    return {
        "window": rng.choice([None, None, None, 100]),
        "soft_cap": rng.choice([None, None, None, 30.0]),
        "sinks": rng.choice([False, False, False, True]),
        "q_dtype": rng.choice(["bfloat16", "float16"]) if few_bits else cell.dtype,
        "values": rng.choice([1.0, 1.0, 1e-3]),  # their size
        "seed": rng.randrange(1 << 30),
    }


class Problem:
    """A cell's tokens and what they should give; `inputs` lays them out in pages."""

    def __init__(self, cell: Cell, seed: int):
        self.cell, self.features = cell, features_of(cell, seed)
        self.rng = np.random.default_rng(self.features["seed"])
        self.batches = [tuple(np.array(x, np.int32) for x in batch) for batch in ROWS[cell.step]]
        self.num_tokens = max(int(query_lens.sum()) for _, query_lens in self.batches)
        longest = max(int(lens.max()) for lens, _ in self.batches)
        self.space = -(-longest // max(PAGE_SIZES)) * max(PAGE_SIZES)
        num_rows, H = len(self.batches[0][0]), KV_HEADS * cell.group
        shape = num_rows, KV_HEADS, self.space, cell.head_dim
        k, v = (self.rng.standard_normal(shape, np.float32) for _ in "kv")
        self.k, self.v = self._stored(k), self._stored(v * self.features["values"])
        q = self.rng.standard_normal((self.num_tokens, H, cell.head_dim), np.float32)
        self.q = jnp.asarray(q).astype(self.features["q_dtype"])
        self.sinks = jnp.asarray(self.rng.standard_normal(H), jnp.float32) if self.features["sinks"] else None

    def _stored(self, x: np.ndarray) -> Any:
        """Tokens as pages hold them: an array, or quantised values and their scales."""
        if self.cell.dtype not in ops.FORMATS:
            return np.asarray(jnp.asarray(x).astype(self.cell.dtype))
        form = ops.FORMATS[self.cell.dtype]
        scales = _quantize.scales_of(jnp.asarray(x), form)
        return np.asarray(_quantize.encode(jnp.asarray(x), scales, form)), np.asarray(scales)

    def _numbers(self, stored: Any) -> np.ndarray:
        """What stored tokens stand for, float64 [B, K, space, D]."""
        if not isinstance(stored, tuple):
            return np.asarray(stored, np.float64)
        values = _quantize.decode(jnp.asarray(stored[0]), ops.FORMATS[self.cell.dtype], jnp.float32)
        return np.asarray(values, np.float64) * stored[1][..., None]

    @functools.cached_property
    def expected(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Output and log-sum-exp of each batch, in float64."""
        k, v, q = self._numbers(self.k), self._numbers(self.v), np.asarray(self.q, np.float64)
        window, soft_cap = self.features["window"] or 1 << 30, self.features["soft_cap"]
        results = []
        for lens, query_lens in self.batches:
            out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf)
            starts = np.cumsum(query_lens) - query_lens
            for row, head in itertools.product(np.flatnonzero(query_lens), range(q.shape[1])):
                mine = slice(starts[row], starts[row] + query_lens[row])
                kv_head, key = head // self.cell.group, np.arange(lens[row])
                position = lens[row] - query_lens[row] + np.arange(query_lens[row])[:, None]
                scores = q[mine, head] @ k[row, kv_head, : lens[row]].T * self.cell.head_dim**-0.5
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                scores = np.where((key <= position) & (key > position - window), scores, -np.inf)
                all_scores = scores
                if self.sinks is not None:
                    all_scores = np.pad(scores, ((0, 0), (0, 1)), constant_values=float(self.sinks[head]))
                total = np.logaddexp.reduce(all_scores, axis=1)
                lse[mine, head] = total
                out[mine, head] = np.exp(scores - total[:, None]) @ v[row, kv_head, : lens[row]]
            results.append((out, lse))
        return results

    def inputs(self, page_size: int, batch: int) -> dict[str, Any]:
        """Shuffled pages of the second of two layers. All that no row owns is NaN, where the format has one."""
        lens, query_lens = self.batches[batch]
        B, M = len(lens), self.space // page_size
        used = -(-lens // page_size)
        num_pages = 3 + max(int((-(-lens // page_size)).sum()) for lens, _ in self.batches)
        free = self.rng.permutation(num_pages)
        tables = np.full((B, M), -1, np.int32)
        for row, count in enumerate(used):
            tables[row, :count], free = free[:count], free[count:]
        owned = np.arange(self.space) < lens[:, None]

        def laid_out(x: np.ndarray, blank: Any) -> Any:  # [B, K, space, ...] as [2, P, K, S, ...]
            x = np.where(owned.reshape(B, 1, -1, *(1,) * (x.ndim - 3)), x, np.asarray(blank, x.dtype))
            x = np.moveaxis(x.reshape(B, KV_HEADS, M, page_size, *x.shape[3:]), 1, 2)
            pool = np.full((2, num_pages, *x.shape[2:]), blank, x.dtype)
            pool[1, tables[tables >= 0]] = x[tables >= 0]
            return jnp.asarray(pool)

        def pool(x: Any) -> Any:
            if not isinstance(x, tuple):
                return laid_out(x, np.nan)
            is_float = jnp.issubdtype(x[0].dtype, jnp.floating)
            return ops.QuantizedPages(laid_out(x[0], np.nan if is_float else 0), laid_out(x[1], np.nan))

        starts = (np.cumsum(query_lens) - query_lens).astype(np.int32)
        rows = [jnp.asarray(x) for x in (tables, lens, starts, query_lens)]
        return {"pools": (pool(self.k), pool(self.v)), "rows": rows}

    def attend(self, page_size: int, implementation: Any) -> tuple[list[Any], str]:
        """Output and log-sum-exp of each batch, and the compiled program, one for all."""

        def run(q, pools: tuple[Any, Any], rows: list[Any], sinks):
            tables, seq_lens, query_starts, query_lens = rows
            return ops.paged_attention(
                q, pools[0], pools[1], tables, seq_lens, query_starts=query_starts, query_lens=query_lens, layer=1,
                max_query_len=FEW.get(self.cell.step), soft_cap=self.features["soft_cap"],
                sliding_window=self.features["window"], sinks=sinks, return_lse=True, implementation=implementation,
            )  # fmt: skip

        made = [self.inputs(page_size, batch) for batch in range(len(self.batches))]
        arguments = [(self.q, x["pools"], x["rows"], self.sinks) for x in made]
        compiled = jax.jit(run).lower(*arguments[0]).compile()
        return [compiled(*x) for x in arguments], compiled.as_text() or ""

    def fault(self, results: list[Any]) -> str:
        """What is wrong with results, "" where nothing is."""
        # Prefill multiplies quantised numbers as the queries' dtype can hold them.
        eps = {"bfloat16": 2**-7, "float16": 2**-10}.get(self.features["q_dtype"], 0.0)
        bound = max(1e-4, 2 * eps) if isinstance(self.k, tuple) else 1e-4
        for batch, ((out, lse), (expected, expected_lse)) in enumerate(
            zip(results, self.expected, strict=True)
        ):
            error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
            if not error < TOLERANCE[self.features["q_dtype"]]:  # NaN fails too
                return f"batch {batch}: error {error:.2e} of the result's norm"
            if not np.allclose(np.asarray(lse), expected_lse, atol=bound, rtol=bound):
                return f"batch {batch}: log-sum-exp off by {np.nanmax(np.abs(np.asarray(lse) - expected_lse)):.2e}"
        return ""

    def verdict(self, page_size: int) -> str:
        """What the kernels make of a page size: "ok", or what is wrong."""
        results, program = self.attend(page_size, None)
        if ("mosaic_gpu" in program) == is_refused(self.cell):
            return "a kernel was refused" if "mosaic_gpu" not in program else "a kernel took what it refuses"
        return self.fault(results) or "ok"


def work(seed: int) -> None:
    """A worker: reads combinations, one a line, and says what it begins and what came of it."""
    jax.config.update("jax_default_matmul_precision", "highest")
    problem = None
    for line in sys.stdin:
        head_dim, dtype, group, step, page_size = line.split()
        cell = Cell(int(head_dim), dtype, int(group), step)
        if problem is None or problem.cell != cell:
            problem = Problem(cell, seed)
        print(f"matrix: {problem.verdict(int(page_size))}", flush=True)


class Worker:
    """A process that is started again when it ends before its work does."""

    def __init__(self, seed: int):
        self.seed, self.process = seed, None

    def start(self) -> subprocess.Popen[str]:
        """The process, new if there is none."""
        if self.process is None:
            command = [sys.executable, __file__, "--work", "--seed", str(self.seed)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            pipes: dict[str, Any] = {
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.STDOUT,
            }
            self.process = subprocess.Popen(command, **pipes, text=True, env=environment)
        return self.process

    def verdict(self, cell: Cell, page_size: int) -> str:
        """What the process says of a combination, or how it ended."""
        process, last = self.start(), ""
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it printed tells
            print(cell.head_dim, cell.dtype, cell.group, cell.step, page_size, file=process.stdin, flush=True)
        for line in process.stdout:
            if line.startswith("matrix: "):
                return line.removeprefix("matrix: ").strip()
            if "error" in line.lower():
                last = line.strip()
        return f"ended with {self.close()}: {last[:300]}"

    def close(self) -> int | None:
        """Ends the process."""
        if self.process is None:
            return None
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()
        code, self.process = self.process.returncode, None
        return code


def run(chosen: list[tuple[Cell, int]], *, seed: int, jobs: int) -> dict[tuple[Cell, int], str]:
    """The verdict on each combination; `jobs` processes share the GPU."""
    by_cell: queue.SimpleQueue[list[tuple[Cell, int]]] = queue.SimpleQueue()
    for _, group in itertools.groupby(sorted(chosen), key=lambda x: x[0]):
        by_cell.put(list(group))
    verdicts: dict[tuple[Cell, int], str] = {}

    def loop() -> None:
        worker = Worker(seed)
        while True:
            try:
                todo = by_cell.get_nowait()
            except queue.Empty:
                break
            for cell, page_size in todo:
                verdict = verdicts[cell, page_size] = worker.verdict(cell, page_size)
                if verdict != "ok":
                    print(
                        f"FAILED {cell} page_size={page_size} {features_of(cell, seed)}: {verdict}",
                        flush=True,
                    )
                if len(verdicts) % 100 == 0:
                    print(f"{len(verdicts)} of {len(chosen)}", flush=True)
        worker.close()

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    threads = [threading.Thread(target=loop) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return verdicts


def main() -> int:
    """Runs what the arguments choose, and prints what failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="so many combinations at random; all by default")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--head-dim", type=int, nargs="*", default=HEAD_DIMS)
    parser.add_argument("--step", nargs="*", default=STEPS)
    parser.add_argument("--dtype", nargs="*", default=DTYPES)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.seed)
        return 0
    chosen = [
        (cell, S)
        for cell, S in combinations()
        if cell.head_dim in options.head_dim and cell.step in options.step and cell.dtype in options.dtype
    ]
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    print(f"{len(chosen)} combinations, seed {options.seed}, {options.jobs} processes", flush=True)
    verdicts = run(chosen, seed=options.seed, jobs=options.jobs)
    good = sum(verdict == "ok" for verdict in verdicts.values())
    print(f"{good} ok, {len(chosen) - good} failed")
    return 0 if good == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
