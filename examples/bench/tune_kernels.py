"""Looks for launch configurations that are better than the kernels' own heuristics, and prints them. Needs a GPU.

    python examples/bench/tune_kernels.py [--kernel decode_sm90 ...] [--case "16 x 4k" ...] [--repeats 10] [--gain 0.01]
                                    [--seed 0] [--quick]

For each kernel and case: from the configuration that `default_config` of the kernel's module makes, one field after
another is changed to what is next to it; the best of these is gone on from, as long as it gains more than `--gain`.
Results are checked before they are timed, as in bench_kernels.py. What is better in the cases that you care about goes
into the heuristic (or, for a kernel called by itself, into its argument `config`): nothing is stored.

`--quick` shrinks every case, for a look at whether the program runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import jax

import bench_kernels as bench
import timing
from timing import Variant, close_to

type Search = tuple[Any, dict[Any, float]]


def changed(config: Any, **choices: Iterable[Any]) -> Iterator[Any]:
    """The configuration with one field changed, to each of the choices for it."""
    for name, values in choices.items():
        for value in values:
            if value != getattr(config, name):
                yield dataclasses.replace(config, **{name: value})


def near(value: int, *, least: int = 1, most: int = 16) -> list[int]:
    """One less, one more."""
    return [x for x in (value - 1, value + 1) if least <= x <= most]


def times(value: int, *, least: int = 1, most: int = 2**20) -> list[int]:
    """Half as much, and twice."""
    return [x for x in (value // 2, value * 2) if least <= x <= most]


def decode_sm90(config: Any, num_sms: int) -> Iterator[Any]:
    def programs(per_sm: float) -> int:
        return int(per_sm * num_sms) // config.lanes * config.lanes

    several = config.consumers > 1  # a block's programs are its consumers
    yield from changed(
        config,
        num_programs=[programs(config.consumers if several else n) for n in (1, 2, 3)],
        min_programs=[n for n in map(programs, (0.5, 1, 1.5, 2)) if n <= config.num_programs],
        num_stages=near(config.num_stages),
        join_chunk=times(config.join_chunk, most=8),
    )


def prefill_sm90(config: Any, num_sms: int) -> Iterator[Any]:
    yield from changed(
        config,
        block_kv=[64, 128],
        key_stages=near(config.key_stages),
        value_stages=near(config.value_stages),
        output_over_queries=[not config.output_over_queries],
    )
    yield dataclasses.replace(config, key_stages=config.key_stages + 1, value_stages=config.value_stages - 1)


def decode_triton(config: Any, num_sms: int) -> Iterator[Any]:
    yield from changed(
        config,
        tile=times(config.tile, least=16, most=256),
        num_warps=times(config.num_warps, least=2, most=8),
        num_stages=near(config.num_stages, least=2),
        num_ranges=[n * num_sms // config.lanes for n in (1, 2, 3, 4)],
        min_ranges=times(config.min_ranges, most=config.num_ranges),
    )


def prefill_triton(config: Any, num_sms: int) -> Iterator[Any]:
    yield from changed(
        config,
        columns=times(config.columns, least=16, most=128),
        block=times(config.block, least=16, most=128),
        num_warps=times(config.num_warps, least=4, most=8),
        num_stages=near(config.num_stages),
    )


def write_sm90(config: Any, num_sms: int) -> Iterator[Any]:
    yield from changed(config, block_tokens=times(config.block_tokens, most=64))


def write_triton(config: Any, num_sms: int) -> Iterator[Any]:
    yield from changed(config, rows=times(config.rows, most=64), num_warps=times(config.num_warps, most=8))


def copy_sm90(config: Any, num_sms: int) -> Iterator[Any]:
    yield from changed(
        config,
        chunk_bytes=times(config.chunk_bytes, least=1024, most=2**16),
        max_programs_per_sm=[config.max_programs_per_sm + n for n in (-2, 2)],
    )


ATTENTION = {
    "decode": ("1 x 8k", "16 x 4k", "64 x 4k", "64k + 127 x 512"),
    "prefill": ("1 x 8k", "16 ragged 64-1024"),
}
KERNELS: dict[str, tuple[Callable[[Any, int], Iterator[Any]], str, str]] = {
    "decode_sm90": (decode_sm90, "decode", "mosaic_gpu"),
    "decode_sm90 fp8_e4m3": (decode_sm90, "decode", "mosaic_gpu"),
    "decode_sm90 int8": (decode_sm90, "decode", "mosaic_gpu"),
    "prefill_sm90": (prefill_sm90, "prefill", "mosaic_gpu"),
    "write_sm90": (write_sm90, "append", "mosaic_gpu"),
    "copy_sm90": (copy_sm90, "move", "mosaic_gpu"),
    "decode_triton": (decode_triton, "decode", "triton"),
    "prefill_triton": (prefill_triton, "prefill", "triton"),
    "write_triton": (write_triton, "append", "triton"),
}
"""The kernel, with the format of quantised pages where it has one: neighbours of a configuration, cases, backend."""


def search(
    first: Any, neighbours: Callable[[Any], Iterable[Any]], cost: Callable[[Any], float], gain: float
) -> Search:
    """The best configuration that is reached by steps which each gain more than `gain`, and all that were tried."""
    costs, best = {first: cost(first)}, first
    while True:
        for config in neighbours(best):
            if config not in costs:
                costs[config] = cost(config)
        least = min(costs, key=lambda config: costs[config])
        if not costs[least] < costs[best] * (1 - gain):
            return best, costs
        best = least


def described(config: Any, default: Any) -> str:
    """The fields that differ from the default's."""
    both = {f.name: (getattr(config, f.name), getattr(default, f.name)) for f in dataclasses.fields(config)}
    return ", ".join(f"{name}={new}" for name, (new, old) in both.items() if new != old) or "as it is"


def tune(
    module: Any,
    neighbours: Callable[[Any, int], Iterator[Any]],
    build: Callable[[], list[Variant]],
    wrong: Callable[[Any], str],
    *,
    repeats: int,
    gain: float,
) -> Search:
    """Searches from the configuration that a module's `default_config` makes in a case."""
    own = module.default_config
    made: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(own(*args, **kwargs))
        return made[-1]

    def cost(config: Any) -> float:
        try:
            with mock.patch.object(module, "default_config", lambda *_, **__: config):
                (variant,) = build()
                mistake = wrong(variant.view(variant.call()))
            taken = math.inf if mistake else timing.measure(variant.call, repeats=repeats).us
            note = f"WRONG: {mistake}" if mistake else f"{taken:9.1f} µs"
        except Exception as error:  # a configuration that does not fit the device
            taken, note = math.inf, timing.reason(error)
        print(f"    {note}  {described(config, made[0])}", flush=True)
        return taken

    with mock.patch.object(module, "default_config", noted):
        for variant in build():
            variant.call()
    num_sms = getattr(jax.devices()[0], "core_count", 1)
    return search(made[0], lambda config: neighbours(config, num_sms), cost, gain)


def cases(kernel: str, section: str, backend: Any, quick: bool, seed: int) -> Iterator[tuple[str, Any, Any]]:
    """Names, builders and checks."""
    if section in ATTENTION:
        _, _, form = kernel.partition(" ")
        for name in ATTENTION[section]:
            batch = bench.make_batch(seed, bench.attention_cases(section, quick)[name], 16)
            exact = batch
            if form:
                batch, exact = bench.quantized(batch, form, "per_token_head")
            wrong = close_to(bench.reference(exact))
            yield name, functools.partial(bench.paged, batch, backend), wrong
        return
    tasks = bench.append_tasks if section == "append" else bench.move_tasks
    for task in tasks(quick, seed):
        yield task.name, functools.partial(task.build, backend), task.wrong


def main(arguments: list[str] | None = None) -> dict[tuple[str, str], Search]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--case", nargs="+", help="names of cases; all others are left out")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--gain", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    timing.header("tune_kernels", seed=args.seed)
    found: dict[tuple[str, str], Search] = {}
    for kernel in args.kernel:
        neighbours, section, backend = KERNELS[kernel]
        operation, _, package = kernel.partition(" ")[0].rpartition("_")
        module = importlib.import_module(f"paxcache.kernels.{package}.{operation}")
        for name, build, wrong in cases(kernel, section, backend, args.quick, args.seed):
            if args.case and name not in args.case:
                continue
            print(f"\n{kernel}, {name}", flush=True)
            try:
                options = {"repeats": args.repeats, "gain": args.gain}
                found[kernel, name] = tune(module, neighbours, build, wrong, **options)
            except NotImplementedError as error:
                print(f"    {timing.reason(error)}", flush=True)
    print("\nthe best of each case")
    for (kernel, name), (best, costs) in found.items():
        default = next(iter(costs))
        ratio = costs[best] / costs[default]
        print(f"{kernel:22} {name:28} {costs[best]:9.1f} µs  {ratio:.3f}  {described(best, default)}")
    return found


if __name__ == "__main__":
    main()
