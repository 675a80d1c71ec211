"""Moves whole pages, all layers: within a pool, out of it, into it; in Triton (Ampere and later).

A page of one layer is contiguous and moves as words, whatever it holds, in *chunks*. Each array of a pool takes a
launch. The programs that copy within a pool first look at the list of copies, many at a time, because most often it
holds none.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from paxcache.kernels.triton._triton import (
    Limits,
    as_bytes,
    call,
    constant,
    device_limits,
    from_bytes,
    jit,
    next_power_of_2,
    tl,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, PyTree, Shaped

LOOKED_AT = constant(256)  # entries of a list of copies at once
MOVED = frozenset(
    {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The launch configuration of the three functions."""

    chunk_bytes: int = 16384
    """At most this much of a page moves at once."""
    num_warps: int = 4
    programs_per_sm: int = 8
    """Of `copy_pages`, whose programs walk the list of copies."""


@jit
def _words(array, WORD: tl.constexpr):
    """A pointer to the same bytes as words."""
    return array.to(tl.pointer_type(WORD), bitcast=True)  # pyright: ignore[reportArgumentType]


@jit
def _move(source, target, begin_in, begin_out, there, chunk, WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk from the word `begin_in` of the source to `begin_out` of the target; zeros where not `there`."""
    word = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = word < WORDS
    x = tl.load(source + begin_in + word, mask=inside & there, other=0)
    tl.store(target + begin_out + word, x, mask=inside)


@jit
def _copy_kernel(
    src, dst, pool_in, num_entries, num_layers, num_pages, pool,
    WORD: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th move of the entries that are copies."""
    words = _words(pool, WORD)
    moves_per_entry = num_layers * CHUNKS
    for group in range(0, num_entries, LOOKED_AT):
        entry = group + tl.arange(0, LOOKED_AT)
        sources = tl.load(src + entry, mask=entry < num_entries, other=-1)
        targets = tl.load(dst + entry, mask=entry < num_entries, other=-1)
        wanted = (sources >= 0) & (sources < num_pages) & (targets >= 0) & (targets < num_pages)
        # From the first copy to the last one of them: most often there is none.
        first = tl.min(tl.where(wanted, entry, num_entries), 0)
        last = tl.max(tl.where(wanted, entry, -1), 0)
        moves = (last - first + 1) * moves_per_entry
        for move in range(tl.program_id(0), moves, tl.num_programs(0)):
            at = first + move // moves_per_entry
            layer, chunk = move % moves_per_entry // CHUNKS, move % CHUNKS
            source, target = tl.load(src + at), tl.load(dst + at)
            if (source >= 0) & (source < num_pages) & (target >= 0) & (target < num_pages):
                page = layer.to(tl.int64) * num_pages
                _move(
                    words, words, (page + source) * WORDS, (page + target) * WORDS, True, chunk, WORDS, CHUNK
                )


@jit
def _gather_kernel(
    ids, pool, num_layers, num_pages, blocks,
    WORD: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: one chunk, or zeros in its place."""
    source = _words(pool, WORD)
    target = _words(blocks, WORD)
    chunk, block = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    page = tl.load(ids + block // num_layers)
    there = (page >= 0) & (page < num_pages)
    in_pool = (block % num_layers).to(tl.int64) * num_pages + page
    _move(source, target, in_pool * WORDS, block.to(tl.int64) * WORDS, there, chunk, WORDS, CHUNK)


@jit
def _scatter_kernel(
    ids, blocks, pool_in, num_layers, num_pages, pool,
    WORD: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One program: one chunk."""
    source = _words(blocks, WORD)
    target = _words(pool, WORD)
    chunk, block = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS
    page = tl.load(ids + block // num_layers)
    if (page >= 0) & (page < num_pages):
        in_pool = (block % num_layers).to(tl.int64) * num_pages + page
        _move(source, target, block.to(tl.int64) * WORDS, in_pool * WORDS, True, chunk, WORDS, CHUNK)


def _chunks(pool: Any, config: Config) -> dict[str, Any]:
    """How a page of one layer is cut: the widest words that divide it, in the fewest chunks."""
    if pool.dtype.name not in MOVED:
        raise NotImplementedError(f"triton: pages of {pool.dtype.name}: the kernel moves {sorted(MOVED)}")
    page_bytes = math.prod(pool.shape[2:]) * pool.dtype.itemsize
    size, word = next((n, w) for n, w in ((4, tl.int32), (2, tl.int16), (1, tl.int8)) if page_bytes % n == 0)
    words = page_bytes // size
    chunk = min(config.chunk_bytes // size, next_power_of_2(words))
    return {"WORD": word, "WORDS": words, "CHUNK": chunk, "CHUNKS": -(-words // chunk)}


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def copy_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    src: Int32[Array, "N"],
    dst: Int32[Array, "N"],
    *,
    config: Config | None = None,
    limits: Limits | None = None,
) -> PyTree[Shaped[Array, "L P ..."]]:
    """Copies pages onto others in all layers and leaves, in place where `pages` are donated.

    Without a copy to make, a launch reads `src` and `dst` and ends.

    Args:
      pages: arrays that lead with [L, P].
      src, dst: i32[N]; entries with either outside [0, P) are skipped. No page may be a destination twice, nor both a
        destination and a source.
      config: the launch configuration.
      limits: the device's.

    Returns:
      The pages.

    Raises:
      NotImplementedError: a dtype that the kernel does not move, or a device that it does not run on.
    """
    limits, config = device_limits() if limits is None else limits, config or Config()
    N = src.shape[0]

    def copy(pool):
        if not pool.size or not N:
            return pool
        (L, P), chunks, x = pool.shape[:2], _chunks(pool, config), as_bytes(pool)
        programs = min(N * L * chunks["CHUNKS"], config.programs_per_sm * limits.num_sms)
        (x,) = call(
            _copy_kernel,
            src,
            dst,
            x,
            N,
            L,
            P,
            outputs=[_shape(x)],
            grid=programs,
            limits=limits,
            num_warps=config.num_warps,
            in_place={2: 0},
            **chunks,
        )
        return from_bytes(x, pool.dtype)

    return jax.tree.map(copy, pages)


def gather_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    page_ids: Int32[Array, "N"],
    *,
    config: Config | None = None,
    limits: Limits | None = None,
) -> PyTree[Shaped[Array, "N L ..."]]:
    """Pages with all their layers, page-major; zeros for ids outside [0, P).

    Args, Raises: as for `copy_pages`.

    Returns:
      Blocks [N, L, ...].
    """
    limits, config = device_limits() if limits is None else limits, config or Config()
    N = page_ids.shape[0]

    def gather(pool):
        L, P = pool.shape[:2]
        if not pool.size or not N:
            return jnp.zeros((N, L, *pool.shape[2:]), pool.dtype)
        chunks, x = _chunks(pool, config), as_bytes(pool)
        (blocks,) = call(
            _gather_kernel,
            page_ids,
            x,
            L,
            P,
            outputs=[jax.ShapeDtypeStruct((N, L, *pool.shape[2:]), x.dtype)],
            grid=N * L * chunks["CHUNKS"],
            limits=limits,
            num_warps=config.num_warps,
            **chunks,
        )
        return from_bytes(blocks, pool.dtype)

    return jax.tree.map(gather, pages)


def scatter_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    page_ids: Int32[Array, "N"],
    blocks: PyTree[Shaped[Array, "N L ..."]],
    *,
    config: Config | None = None,
    limits: Limits | None = None,
) -> PyTree[Shaped[Array, "L P ..."]]:
    """Puts page-major blocks back, in place where `pages` are donated; ids outside [0, P) are dropped.

    No id may stand twice. Args, Raises: as for `copy_pages`.

    Returns:
      The pages.
    """
    limits, config = device_limits() if limits is None else limits, config or Config()
    N = page_ids.shape[0]

    def scatter(pool, new):
        if not pool.size or not N:
            return pool
        (L, P), chunks, x = pool.shape[:2], _chunks(pool, config), as_bytes(pool)
        (x,) = call(
            _scatter_kernel,
            page_ids,
            as_bytes(new.astype(pool.dtype)),
            x,
            L,
            P,
            outputs=[_shape(x)],
            grid=N * L * chunks["CHUNKS"],
            limits=limits,
            num_warps=config.num_warps,
            in_place={2: 0},
            **chunks,
        )
        return from_bytes(x, pool.dtype)

    return jax.tree.map(scatter, pages, blocks)
