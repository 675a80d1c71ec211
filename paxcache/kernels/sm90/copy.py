"""Moves whole pages, all layers in one launch: within a pool, out of it, into it. For Hopper GPUs (sm_90a).

A page of one layer is contiguous; it is cut into *chunks* that fit shared memory, and a program moves one chunk at a
time through the copy engine: in by one bulk copy, out by another, no thread touching the data. What keeps the memory
busy is that a dozen programs share an SM. The list of moves is numbered entry by entry, an entry's layers and chunks
together, and the programs of a fixed grid take every ``num_programs``-th.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paxcache.kernels.sm90._mosaic import (
    COPY_DTYPES,
    DeviceLimits,
    device_limits,
    in_place,
    pl,
    plgpu,
    require_hopper,
    varying_like,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, PyTree, Shaped

ALIGNMENT = 16  # bytes: addresses and lengths of bulk copies
WARPGROUP = 128  # threads of a program
GROUP = 128  # entries that copy_pages looks at together before it looks at each
SMEM_ALIGNMENT = 1024  # bytes: Mosaic's, for each buffer
SMEM_RESERVED = 1024  # bytes: the system's, for each program
REDUCTION_BYTES = 2048  # of shared memory, for the look at a group


Mode = Literal["copy", "gather", "scatter"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The launch configuration of the three functions."""

    chunk_bytes: int
    """At most this much of a page moves at once."""
    bytes_per_sm: int = 196608
    """Chunks in flight on one SM, in bytes: as many programs as that takes, but at most `max_programs_per_sm`."""
    max_programs_per_sm: int = 10


def default_config(mode: Mode, num_entries: int) -> Config:
    """Chunks of 4 KB: 3 % more bandwidth than 8 KB to 64 KB, which are alike; 2 KB, or fewer programs, lose it.

    Large ones for short lists of `copy_pages`: its programs then look at each chunk of each entry, most often for
    nothing.
    """
    return Config(chunk_bytes=32768 if mode == "copy" and num_entries < GROUP else 4096)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How the kernel sees one array of a pool: ``[L * P, chunks, chunk_len]``."""

    num_layers: int
    num_pages: int
    num_chunks: int
    chunk_len: int
    dtype: np.dtype

    @property
    def moves_per_entry(self) -> int:
        """One for each chunk of each layer."""
        return self.num_layers * self.num_chunks

    @property
    def buffer(self) -> tuple[int, np.dtype]:
        """Length and dtype of the chunk's buffer, which all threads can fill with zeros; leaves alike share it."""
        return pl.cdiv(self.chunk_len, WARPGROUP) * WARPGROUP, self.dtype


def _leaf(array: Any, config: Config) -> Leaf:
    """Cuts a page into the fewest equal chunks."""
    L, P = array.shape[:2]
    dtype = np.dtype(array.dtype)
    if dtype.name not in COPY_DTYPES:
        raise NotImplementedError(f"pages of {dtype.name}: the kernel moves {sorted(COPY_DTYPES)}")
    page_len = math.prod(array.shape[2:])
    if page_len * dtype.itemsize % ALIGNMENT:
        raise NotImplementedError(
            f"pages of {page_len} {dtype.name}: the copy engine needs a multiple of {ALIGNMENT} bytes"
        )
    for num_chunks in range(1, page_len + 1):
        chunk_len, rest = divmod(page_len, num_chunks)
        chunk_bytes = chunk_len * dtype.itemsize
        if not rest and chunk_bytes <= config.chunk_bytes and chunk_bytes % ALIGNMENT == 0:
            return Leaf(L, P, num_chunks, chunk_len, dtype)
    raise NotImplementedError(
        f"pages of {page_len} {dtype.name}: no part of them fits {config.chunk_bytes} bytes"
    )


def check_supported(pages: Any, limits: DeviceLimits | None = None) -> None:
    """Raises NotImplementedError, with the reason, where a leaf of `pages` cannot be moved on such a device."""
    _prepare("copy", jax.tree.leaves(pages), 0, None, limits)


def _buffers(leaves: tuple[Leaf, ...]) -> list[tuple[int, np.dtype]]:
    """The buffers of a program, one for each kind of leaf."""
    return list(dict.fromkeys(leaf.buffer for leaf in leaves))


def _num_programs(leaves: tuple[Leaf, ...], num_entries: int, config: Config, limits: DeviceLimits) -> int:
    sizes = [length * dtype.itemsize for length, dtype in _buffers(leaves)] + [8, REDUCTION_BYTES]
    smem = SMEM_RESERVED + sum(pl.cdiv(size, SMEM_ALIGNMENT) * SMEM_ALIGNMENT for size in sizes)
    largest = max(leaf.chunk_len * leaf.dtype.itemsize for leaf in leaves)
    wanted = min(config.bytes_per_sm // largest, config.max_programs_per_sm)
    per_sm = max(1, min(wanted, limits.smem_bytes_per_sm // smem))
    moves = max(leaf.moves_per_entry for leaf in leaves) * num_entries
    return min(per_sm * limits.num_sms, moves)


def _kernel(*refs, mode: Mode, leaves: tuple[Leaf, ...]) -> None:
    """One program: every num_programs-th move of each leaf.

    References come in the order ids (copy: sources, destinations), sources, destinations, buffers, barrier;
    copy_pages has the pools in the destinations' place only.
    """
    refs = list(refs)
    loaded = refs.pop()
    ids_refs = [refs.pop(0) for _ in range(2 if mode == "copy" else 1)]
    source_refs = refs[: len(leaves)]
    target_refs = source_refs if mode == "copy" else refs[len(leaves) : 2 * len(leaves)]
    buffer_refs = refs[-len(_buffers(leaves)) :]
    buffers = dict(zip(_buffers(leaves), buffer_refs, strict=True))
    num_entries = ids_refs[0].shape[0]
    program, num_programs = lax.axis_index("program"), np.int32(lax.axis_size("program"))

    def in_pool(ids, leaf):
        return (ids[0] >= 0) & (ids[0] < leaf.num_pages) & (ids[-1] >= 0) & (ids[-1] < leaf.num_pages)

    def store(chunk, target):
        plgpu.copy_smem_to_gmem(chunk, target)
        # The copy engine has read the chunk before the next one, or the next program, takes its place.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def move(leaf, source_ref, target_ref, index):
        """Moves the chunk with this number in the list of the leaf's moves."""
        buffer = buffers[leaf.buffer]
        chunk = buffer.at[pl.ds(0, leaf.chunk_len)]
        entry = lax.div(index, np.int32(leaf.moves_per_entry))
        rest = lax.rem(index, np.int32(leaf.moves_per_entry))
        layer, part = lax.div(rest, np.int32(leaf.num_chunks)), lax.rem(rest, np.int32(leaf.num_chunks))
        ids = [ref[entry] for ref in ids_refs]
        in_pages = [layer * leaf.num_pages + i for i in ids]
        in_blocks = entry * leaf.num_layers + layer
        source = source_ref.at[in_blocks if mode == "scatter" else in_pages[0], part]
        target = target_ref.at[in_blocks if mode == "gather" else in_pages[-1], part]
        wanted = in_pool(ids, leaf)

        @pl.when(wanted)
        def _():
            # The copy engine arrives when the chunk is in shared memory, every thread waits for that.
            plgpu.copy_gmem_to_smem(source, chunk, loaded, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
            plgpu.barrier_wait(loaded)
            store(chunk, target)

        if mode == "gather":

            @pl.when(jnp.logical_not(wanted))
            def _():
                buffer[...] = jnp.zeros(buffer.shape, buffer.dtype)
                # All threads' zeros become visible to the copy engine before it reads them.
                plgpu.commit_smem()
                store(chunk, target)

    def move_entries(first, last):
        for leaf, source_ref, target_ref in zip(leaves, source_refs, target_refs, strict=True):
            begin, end = first * leaf.moves_per_entry, last * leaf.moves_per_entry
            # The program's first number from `begin` on: groups of entries follow each other without a seam.
            begin += lax.rem(program + num_programs - lax.rem(begin, num_programs), num_programs)

            def body(i, _, begin=begin, leaf=leaf, source_ref=source_ref, target_ref=target_ref):
                move(leaf, source_ref, target_ref, begin + i * num_programs)

            lax.fori_loop(0, lax.div(end - begin + num_programs - 1, num_programs), body, None)

    if mode != "copy":
        move_entries(jnp.int32(0), jnp.int32(num_entries))
        return

    count = jnp.int32(num_entries)

    def copy_group(g, _):
        first = g * GROUP
        last = jnp.minimum(first + GROUP, count)
        if num_entries < GROUP:
            move_entries(first, last)
            return
        # One look by all threads at a whole group (the last one moved back to stay in bounds): most have nothing,
        # and others little, from the first entry wanted to the last.
        start = jnp.minimum(first, num_entries - GROUP)
        ids = [ref[pl.ds(start, GROUP)] for ref in ids_refs]
        wanted = functools.reduce(jnp.logical_or, [in_pool(ids, leaf) for leaf in leaves]).astype(jnp.int32)
        place = lax.broadcasted_iota(jnp.int32, (GROUP,), 0)
        before = GROUP - jnp.max(wanted * (GROUP - place))
        until = jnp.max(wanted * (place + 1))
        move_entries(jnp.maximum(first, start + before), jnp.minimum(last, start + until))

    lax.fori_loop(0, lax.div(count + np.int32(GROUP - 1), np.int32(GROUP)), copy_group, None)


def _prepare(
    mode: Mode, arrays: list[Any], num_entries: int, config: Config | None, limits: DeviceLimits | None = None
) -> dict[str, Any]:
    """The static arguments of a launch; raises NotImplementedError where the case is not supported."""
    limits = limits or device_limits()
    require_hopper(limits)
    config = config or default_config(mode, num_entries)
    leaves = tuple(_leaf(x, config) for x in arrays)
    return dict(mode=mode, leaves=leaves, num_programs=_num_programs(leaves, num_entries, config, limits))


def copy_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    src: Int32[Array, "N"],
    dst: Int32[Array, "N"],
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> PyTree[Shaped[Array, "L P ..."]]:
    """Copies pages onto others in all layers and leaves, in one launch, in place where `pages` are donated.

    Without a copy to make, the launch reads `src` and `dst` and ends.

    Args:
      pages: arrays that lead with [L, P].
      src, dst: i32[N]; entries with either outside [0, P) are skipped. No page may be a destination twice, nor both a
        destination and a source.
      config: None: `default_config`.
      interpret: see `_mosaic.interpreter`.

    Returns:
      The pages.

    Raises:
      NotImplementedError: a dtype or a page size that the copy engine cannot move.
    """
    arrays, tree = jax.tree.flatten(pages)
    launch = _prepare("copy", arrays, src.shape[0], config)
    if src.shape[0]:
        arrays = _move((src, dst), (), tuple(arrays), **launch, interpret=interpret)
    return jax.tree.unflatten(tree, arrays)


def gather_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    page_ids: Int32[Array, "N"],
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> PyTree[Shaped[Array, "N L ..."]]:
    """Pages with all their layers, page-major, in one launch; zeros for ids outside [0, P).

    Args, Raises: as for `copy_pages`.

    Returns:
      Blocks [N, L, ...].
    """
    arrays, tree = jax.tree.flatten(pages)
    launch = _prepare("gather", arrays, page_ids.shape[0], config)
    shapes = [(page_ids.shape[0], x.shape[0], *x.shape[2:]) for x in arrays]
    if not page_ids.shape[0]:
        return jax.tree.unflatten(tree, [jnp.zeros(s, x.dtype) for s, x in zip(shapes, arrays, strict=True)])
    blocks = _move((page_ids,), tuple(arrays), (), **launch, interpret=interpret)
    return jax.tree.unflatten(tree, [b.reshape(s) for b, s in zip(blocks, shapes, strict=True)])


def scatter_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    page_ids: Int32[Array, "N"],
    blocks: PyTree[Shaped[Array, "N L ..."]],
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> PyTree[Shaped[Array, "L P ..."]]:
    """Puts page-major blocks back, in one launch, in place where `pages` are donated; ids outside [0, P) are dropped.

    No id may stand twice. Args, Raises: as for `copy_pages`.

    Returns:
      The pages.
    """
    arrays, tree = jax.tree.flatten(pages)
    launch = _prepare("scatter", arrays, page_ids.shape[0], config)
    if page_ids.shape[0]:
        sources = tuple(b.astype(x.dtype) for b, x in zip(jax.tree.leaves(blocks), arrays, strict=True))
        arrays = _move((page_ids,), sources, tuple(arrays), **launch, interpret=interpret)
    return jax.tree.unflatten(tree, arrays)


# Under jit of its own, so that equal calls share one lowered kernel, and one compilation.
@functools.partial(jax.jit, static_argnames=("mode", "leaves", "num_programs", "interpret"))
def _move(ids, sources, targets, *, mode, leaves, num_programs, interpret):
    def as_chunks(array, leaf):
        return array.reshape(-1, leaf.num_chunks, leaf.chunk_len)

    sources = [as_chunks(x, leaf) for x, leaf in zip(sources, leaves, strict=False)]
    blocks_shapes = [
        jax.ShapeDtypeStruct((ids[0].shape[0] * leaf.num_layers, leaf.num_chunks, leaf.chunk_len), leaf.dtype)
        for leaf in leaves
    ]
    launch = plgpu.kernel(
        functools.partial(_kernel, mode=mode, leaves=leaves),
        out_type=tuple(blocks_shapes) if mode == "gather" else (),
        grid=(num_programs,),
        grid_names=("program",),
        scratch_types=[plgpu.SMEM((n,), d) for n, d in _buffers(leaves)] + [plgpu.Barrier()],
        # What threads write to shared memory is committed and they read none: Pallas need not order their accesses.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, reduction_scratch_bytes=REDUCTION_BYTES
        ),
        kernel_name=f"paxcache_{mode}",
        interpret=interpret,
    )
    if mode == "gather":
        return [varying_like(x, s) for x, s in zip(launch(*ids, *sources), sources, strict=True)]
    views = [as_chunks(x, leaf) for x, leaf in zip(targets, leaves, strict=True)]
    views = in_place(functools.partial(launch, *ids, *sources), views)
    return [view.reshape(x.shape) for view, x in zip(views, targets, strict=True)]
