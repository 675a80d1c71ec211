"""Pages to host memory and back: extents.

What lies on the host is a value: it is written once, by one gather and one large transfer a leaf, and never again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _allocator, _cache, _checks, ops
from paxcache._cache import _integers_only
from paxcache._types import NO_PAGE, PagedKVCache, Pages
from paxcache.prefix import _integers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from jaxtyping import Array, Bool, Int32

    from paxcache._cache import Layer
    from paxcache.ops import Implementation

type Layers = bool | tuple[tuple[int, ...], ...]
"""Which blocks to make: False, whole pages; True, one of each layer; or one of these layers, by group."""

ONE_PROGRAM_BYTES = 16 * 2**20
"""Copies of up to this size leave within the program that gathers them: beginning a transfer outside of it takes the
host half a millisecond, in which the link moves more than this."""

_SPACES = {"pinned_host": jax.memory.Space.Host, "device": jax.memory.Space.Device}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extent:
    """Copies of pages, by group. A value: nothing ever writes to it."""

    blocks: tuple[Any, ...]
    """Per group, the pages' leaves as [N, L, ...], in host memory; or, by layer, a tuple over L of leaves [N, ...],
    None for a layer that was not chosen."""
    held: tuple[Bool[Array, "N"], ...]
    """Per group, which entries hold a page; the others are padding."""


def space(memory_kind: str) -> Any:
    """JAX's name for a memory kind, which the device must have."""
    if not isinstance(memory_kind, str):
        raise TypeError(f"memory_kind: expected one of {tuple(_SPACES)}, got {_checks.describe(memory_kind)}")
    if memory_kind not in _SPACES:
        raise ValueError(f"memory_kind: expected one of {tuple(_SPACES)}, got {memory_kind!r}")
    if memory_kind == "pinned_host":
        device = _checks.default_device()
        if memory_kind not in (memory.kind for memory in device.addressable_memories()):
            raise NotImplementedError(f"memory_kind: {device.device_kind!r} has no {memory_kind!r} memory")
    return _SPACES[memory_kind]


def by_group(name: str, value: Any, num_groups: int, *, minimum: int) -> tuple[int, ...]:
    """A static number of pages for each group: one for all, or a tuple of one each."""
    values = value if isinstance(value, tuple) else (value,) * num_groups
    if len(values) != num_groups:
        raise ValueError(f"{name}: expected one for each of {num_groups} groups, got {len(values)}")
    return tuple(_checks.static_int(name, v, minimum=minimum) for v in values)


def flag(name: str, value: Any) -> bool:
    """A Python bool."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {_checks.describe(value)}")
    return bool(value)


def size_class(num_pages: int) -> int:
    """The next number of pages that has at most four binary digits before its zeros."""
    step = 1 << max(num_pages.bit_length() - 4, 0)
    return -(-num_pages // step) * step


def pieces(num_pages: int, page_bytes: int, most_bytes: int) -> list[int]:
    """Sizes of blocks of at most so many bytes, or of one page, for so many pages."""
    most = max(most_bytes // page_bytes, 1)
    whole, rest = divmod(num_pages, most)
    return [most] * whole + ([min(size_class(rest), most)] if rest else [])


def shapes_of(pools: Iterable[Pages]) -> tuple[tuple[Any, ...], ...]:
    """By group, shape and dtype of a page's leaves."""
    return tuple(
        tuple(((x.shape[0], *x.shape[2:]), np.dtype(x.dtype)) for x in jax.tree.leaves(pool))
        for pool in pools
    )


@contextlib.contextmanager
def allocating(memory_kind: str, num_bytes: int) -> Iterator[None]:
    """Around what takes so many bytes of host memory: says what to do where there are not as many."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if memory_kind != "pinned_host" or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            f"no room for {num_bytes} bytes of pinned host memory. JAX's GPU client takes at most 64 GB of it, or as "
            "many GB as XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB says in the environment when JAX first uses the GPU. Raise "
            "that bound if the machine has more, or drop extents, tickets and tiers that are not needed. "
            f"XLA says: {error}"
        ) from error


def num_bytes_of(tree: Any) -> int:
    """Bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def put(tree: Any, memory_kind: str) -> Any:
    """The arrays in another memory. Inside jit the transfer is part of the program; outside it is only begun."""
    there = space(memory_kind)
    if not _checks.is_traced(tree):
        there = jax.tree.map(lambda x: x.sharding.with_memory_kind(memory_kind), tree)
    with allocating(memory_kind, num_bytes_of(tree)):
        return jax.device_put(tree, there)


def copy_out(
    pages: tuple[Pages, ...],
    page_ids: tuple[Any, ...],
    memory_kind: str,
    implementation: Implementation,
    by_layer: Layers = False,
) -> tuple[Any, ...]:
    """Blocks of the named pages in another memory; zeros for ids outside a pool.

    Outside jit a program gathers and the transfer of many pages is none of its own: one that waits for the link holds
    up whatever is launched after it. The transfer reads an array that nobody else has, so the pools may be donated at
    once.
    """
    return _copy_out(pages, page_ids, None, memory_kind, implementation, by_layer)[0]


def _copy_out(pages, page_ids, ref_counts, memory_kind, implementation, by_layer):
    """As `copy_out`; with counts only of pages that have one, and by group which those are."""
    space(memory_kind)
    num_bytes = sum(
        ids.shape[0] * leaf.nbytes // leaf.shape[1]
        for pool, ids in zip(pages, page_ids, strict=True)
        for leaf in jax.tree.leaves(pool)
    )
    within = memory_kind if num_bytes <= ONE_PROGRAM_BYTES else "device"
    with allocating(within, num_bytes):
        blocks, held = _gather(pages, page_ids, ref_counts, within, implementation, by_layer)
    return blocks if within == memory_kind else put(blocks, memory_kind), held


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _gather(pages, page_ids, ref_counts, memory_kind, implementation, by_layer):
    """The program of `_copy_out`. Pools go in and do not come out, so an eager call copies none."""
    held = None
    if ref_counts is not None:
        page_ids, held = _find_pages(ref_counts, page_ids)
    blocks = []
    for g, (pool, ids) in enumerate(zip(pages, page_ids, strict=True)):
        if by_layer:
            layers = range(jax.tree.leaves(pool)[0].shape[0])
            chosen = layers if by_layer is True else by_layer[g]
            blocks.append(
                tuple(_take_layer(pool, i, ids, implementation) if i in chosen else None for i in layers)
            )
        else:
            blocks.append(_take(pool, ids, implementation))
    return put(tuple(blocks), memory_kind), held


def _find_pages(ref_counts, page_ids):
    """The ids with P for those that nobody references, and by group which are left."""
    found, held = [], []
    for counts, ids in zip(ref_counts, page_ids, strict=True):
        P = counts.shape[0]
        exists = (ids >= 0) & (ids < P) & (counts[jnp.clip(ids, 0, P - 1)] > 0)
        found.append(jnp.where(exists, ids, P))
        held.append(exists)
    return tuple(found), tuple(held)


def _take(pool, ids, implementation):
    if ids.shape[0]:
        return ops.gather_pages(pool, ids, implementation=implementation)
    return jax.tree.map(lambda x: jnp.zeros((0, x.shape[0], *x.shape[2:]), x.dtype), pool)


def _of_layer(pool, layer, ids):
    """The pool as one layer of L * P pages, and where those of a layer are in it."""
    L, P = jax.tree.leaves(pool)[0].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(1, L * P, *x.shape[2:]), pool)
    return flat, jnp.where((ids >= 0) & (ids < P), layer * P + ids, L * P)


def _take_layer(pool, layer, ids, implementation):
    """Leaves [N, ...] of one layer."""
    block = _take(*_of_layer(pool, layer, ids), implementation)
    return jax.tree.map(lambda x: x[:, 0], block)


def put_layer(pool, layer, ids, block, implementation):
    """The pool with a block [N, ...], on the device, in one layer of the named pages."""
    if not ids.shape[0]:
        return pool
    flat, ids = _of_layer(pool, layer, ids)
    block = jax.tree.map(lambda x: x[:, None], block)
    flat = ops.scatter_pages(flat, ids, block, implementation=implementation)
    return jax.tree.map(lambda x, old: x.reshape(old.shape), flat, pool)


def _copy_in(pages, page_ids, blocks, implementation):
    """The pools with the blocks in the named pages; ids outside a pool are dropped."""
    pools = []
    for pool, ids, block in zip(pages, page_ids, blocks, strict=True):
        if isinstance(block, tuple):
            for layer, part in enumerate(block):
                here = jax.device_put(part, jax.memory.Space.Device)
                if part is not None:
                    pool = put_layer(pool, layer, ids, here, implementation)  # noqa: PLW2901
        elif ids.shape[0]:
            here = jax.device_put(block, jax.memory.Space.Device)
            pool = ops.scatter_pages(pool, ids, here, implementation=implementation)  # noqa: PLW2901
        pools.append(pool)
    return tuple(pools)


copy_in = jax.jit(_copy_in, static_argnums=3)
copy_in_place = jax.jit(_copy_in, static_argnums=3, donate_argnums=0)
"""`copy_in` for callers outside jit who give their pools away."""


def with_pages(cache: PagedKVCache, pages: tuple[Pages, ...]) -> PagedKVCache:
    groups = tuple(dataclasses.replace(g, pages=p) for g, p in zip(cache.groups, pages, strict=True))
    return dataclasses.replace(cache, groups=groups)


def pages_of(cache: PagedKVCache) -> tuple[Pages, ...]:
    return tuple(g.pages for g in cache.groups)


def check_extent(name: str, cache: PagedKVCache, extent: Extent) -> None:
    """Blocks that fit the cache's pages in structure, shape and dtype."""
    _checks.instance("cache", cache, PagedKVCache)
    _checks.instance(name, extent, Extent, source="swap_out")
    for part in (extent.blocks, extent.held):
        if not isinstance(part, tuple):
            raise TypeError(f"{name}: expected pages by group, got {_checks.describe(part)}")
        if len(part) != len(cache.groups):
            raise ValueError(
                f"{name}: expected pages of {len(cache.groups)} groups, got those of {len(part)}"
            )
    for g, (group, blocks) in enumerate(zip(cache.groups, extent.blocks, strict=True)):
        N = _checks.bool_array(f"{name}'s held", extent.held[g], "N").shape[0]
        like: Any = group.pages
        if isinstance(blocks, tuple):
            L = jax.tree.leaves(like)[0].shape[0]
            chosen = [block is not None for block in blocks] if len(blocks) == L else [True] * L
            like = tuple(like if here else None for here in chosen)
        if jax.tree.structure(like) != jax.tree.structure(blocks):
            raise ValueError(
                f"{name}: expected leaves like group {g}'s pages, {jax.tree.structure(like)}, "
                f"got {jax.tree.structure(blocks)}"
            )
        for pool, block in zip(jax.tree.leaves(like), jax.tree.leaves(blocks), strict=True):
            expected = (N, *(() if isinstance(blocks, tuple) else pool.shape[:1]), *pool.shape[2:])
            if getattr(block, "shape", None) != expected or block.dtype != pool.dtype:
                raise ValueError(
                    f"{name}: expected {pool.dtype}{list(expected)} for group {g}, got {_checks.describe(block)}"
                )


def _check_page_ids(cache: PagedKVCache, page_ids: Any) -> tuple[Int32[Array, "N"], ...]:
    """One array of pages a group; a single array is that of a single group."""
    ids = page_ids if isinstance(page_ids, tuple) else (page_ids,)
    if len(ids) != len(cache.groups):
        raise ValueError(
            f"page_ids: expected one array for each of {len(cache.groups)} groups, got {len(ids)}"
        )
    return tuple(_checks.int_array("page_ids", x, "N") for x in ids)


def _chosen(cache: PagedKVCache, layers: Sequence[Layer]) -> tuple[tuple[int, ...], ...]:
    """Layers by group."""
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        raise TypeError(f"layers: expected a sequence of layers, got {_checks.describe(layers)}")
    chosen: list[set[int]] = [set() for _ in cache.groups]
    for layer in layers:
        group, index = _cache.locate(cache, layer)
        if not isinstance(index, (int, np.integer)):
            raise TypeError(f"layers: expected static layers, got {_checks.describe(index)} in group {group}")
        chosen[group].add(int(index))
    return tuple(tuple(sorted(indices)) for indices in chosen)


def swap_out(
    cache: PagedKVCache,
    page_ids: Int32[Array, "N"] | tuple[Int32[Array, "N"], ...],
    *,
    memory_kind: str = "pinned_host",
    by_layer: bool = False,
    layers: Sequence[Layer] | None = None,
    implementation: Implementation = None,
) -> Extent:
    """Copies pages, with all their layers or some, to host memory. The cache and its references stay as they are.

    Outside jit the copies are gathered by one program and leave while others run, taking as much room on the device
    until they have left; the cache may be donated at once. Up to 16 MiB leave within that program, which is sooner.
    Inside a jit of the caller's the transfer is part of that program, and what is launched after it waits for the link.

    Pinned memory is taken when it is first needed, which for 1 GiB can take longer than thirty transfers of as much.
    JAX keeps it when an extent is dropped: a program that minds swaps its largest extent out once when it starts.

    Programs are compiled for each N: pad lists to a few sizes.

    Args:
      cache: the cache.
      page_ids: i32[N] pages in any order, or a tuple of one such array a group. Ids outside [0, P) are padding; a
        page that nobody references is nobody's to copy and counts as padding too.
      memory_kind: where the copies go: "pinned_host", or "device" for those who only want a copy.
      by_layer: makes a block of each layer, for `begin_swap_in`: whole pages are fewer, larger transfers.
      layers: copies these layers alone, each in a block of its own; static numbers as in `append`. None: all of them.
      implementation: backend of the gather, see `paxcache.ops`.

    Returns:
      An `Extent`; ``extent.held`` tells which entries hold a page.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.
      NotImplementedError: the device has no such memory.
      MemoryError: JAX's pool of pinned memory is too small (outside jit), see `paxcache.offload`.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> extent = offload.swap_out(cache, jnp.array([1, 0, -1, 7]))
      >>> extent.blocks[0].k.shape, extent.held[0].tolist()
      ((4, 2, 1, 16, 8), [True, True, False, False])

    Reference: the swap kernels of FastDeploy's cache manager; the host tier of SGLang's HiCache.
    """
    _checks.instance("cache", cache, PagedKVCache)
    ids = _check_page_ids(cache, page_ids)
    ref_counts = tuple(g.ref_counts for g in cache.groups)
    by_layer = flag("by_layer", by_layer)
    chosen = by_layer if layers is None else _chosen(cache, layers)
    return Extent(*_copy_out(pages_of(cache), ids, ref_counts, memory_kind, implementation, chosen))


def swap_in(
    cache: PagedKVCache,
    extent: Extent,
    *,
    page_ids: Int32[Array, "N"] | tuple[Int32[Array, "N"], ...] | None = None,
    implementation: Implementation = None,
) -> tuple[PagedKVCache, tuple[Int32[Array, "N"], ...], Bool[Array, ""]]:
    """Copies an extent's pages into free pages, or into given ones; all of them in all groups or none.

    Each page that was free comes with one reference, which is the caller's: hand the pages on, then give them back with
    `drop`. Given pages keep the references that they have, and layers that the extent does not hold stay as they are.

    The transfer is part of the program that writes the pools, which a caller's jit may donate to it; what is launched
    after it waits for the link. `begin_swap_in` spreads that over the layers of a model.

    Args:
      cache: the cache.
      extent: from `swap_out`; it stays valid.
      page_ids: i32[N] the page for each of the extent's entries, or a tuple of one such array a group: pages that have
        a reference, none twice; those of entries that hold nothing are ignored. None: free ones, whose other layers
        hold anything where the extent holds some layers only.
      implementation: backend of the scatter, see `paxcache.ops`.

    Returns:
      The cache; per group the pages that the extent's entries lie in now, NO_PAGE for padding and where refused; and
      ok bool[]: False, with nothing changed, if some group has too few free pages, or if a given page is out of range,
      named twice or free.

    Raises:
      ValueError, TypeError: the extent does not fit the cache, or page_ids the extent.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> extent = offload.swap_out(cache, jnp.array([1, -1, 0]))
      >>> cache, page_ids, ok = offload.swap_in(cache, extent)
      >>> page_ids[0].tolist(), ok.item()
      ([2, -1, 3], True)
      >>> second = offload.swap_out(cache, jnp.array([2, 3]), layers=[1])           # one layer goes ...
      >>> offload.swap_in(cache, second, page_ids=jnp.array([2, 3]))[2].item()      # ... and comes back to its place
      True
    """
    check_extent("extent", cache, extent)
    if page_ids is None:
        new, targets, found, ok = _integers_only(_swap_in, cache, extent.held, 1)
    else:
        given = _check_page_ids(cache, page_ids)
        for ids, held in zip(given, extent.held, strict=True):
            _checks.int_array("page_ids", ids, "N", N=held.shape[0])
        new = cache
        found, ok = _find_given(tuple(g.ref_counts for g in cache.groups), extent.held, given)
        targets = found
    pages = copy_in(pages_of(new), targets, extent.blocks, implementation)
    return with_pages(new, pages), found, ok


@jax.jit
def _find_given(ref_counts, held, page_ids):
    """The pages of held entries, NO_PAGE for the others and everywhere unless each has a reference and one entry."""
    ok, found = jnp.bool_(True), []
    for counts, wanted, given in zip(ref_counts, held, page_ids, strict=True):
        P = counts.shape[0]
        ids = jnp.where(wanted, given, NO_PAGE)
        fine = _allocator.named_once(ids, P) & (counts[jnp.clip(ids, 0, P - 1)] > 0)
        ok &= (fine | ~wanted).all()
        found.append(ids)
    return tuple(jnp.where(ok, ids, NO_PAGE) for ids in found), ok


def take(
    ref_counts: tuple[Int32[Array, "P"], ...], held: tuple[Bool[Array, "N"], ...], ok: Bool[Array, ""]
) -> tuple[tuple[Int32[Array, "N"], ...], Bool[Array, ""]]:
    """A free page for each held entry, P for the others; none at all unless `ok` and every group has enough."""
    for counts, wanted in zip(ref_counts, held, strict=True):
        ok &= wanted.sum(dtype=jnp.int32) <= (counts == 0).sum(dtype=jnp.int32)
    taken = []
    for counts, wanted in zip(ref_counts, held, strict=True):
        P, N = counts.shape[0], wanted.shape[0]
        if not N:
            taken.append(jnp.zeros(0, jnp.int32))
            continue
        free = _allocator.listed(counts == 0, N)
        rank = _allocator.running_sum(wanted)
        taken.append(jnp.where(wanted & ok, free[jnp.maximum(rank - 1, 0)], P))
    return tuple(taken), ok


@functools.partial(jax.jit, static_argnums=2)
def _swap_in(cache, held, references):
    """Takes pages, each with so many references."""
    counts = tuple(g.ref_counts for g in cache.groups)
    targets, ok = take(counts, held, jnp.bool_(True))
    groups, page_ids = [], []
    for group, pages in zip(cache.groups, targets, strict=True):
        page_ids.append(jnp.where(pages < group.ref_counts.shape[0], pages, NO_PAGE))
        new = _allocator.add_references(group.ref_counts, page_ids[-1], references)
        groups.append(dataclasses.replace(group, ref_counts=new))
    return dataclasses.replace(cache, groups=tuple(groups)), targets, tuple(page_ids), ok


def drop(cache: PagedKVCache, page_ids: Int32[Array, "N"] | tuple[Int32[Array, "N"], ...]) -> PagedKVCache:
    """Gives back one reference to each page: those that `swap_in` handed out. A page without any left is free.

    Args:
      cache: the cache.
      page_ids: i32[N] pages, or a tuple of one such array a group; negative ids are padding. As with every count in
        the cache nothing is clamped: what is given back twice shows in `check`.

    Returns:
      The cache.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> cache, page_ids, _ = offload.swap_in(cache, offload.swap_out(cache, jnp.array([0])))
      >>> paxcache.stats(offload.drop(cache, page_ids)).num_used_pages.item()
      2
    """
    _checks.instance("cache", cache, PagedKVCache)
    return give_back(cache, _check_page_ids(cache, page_ids))


def give_back(cache: PagedKVCache, page_ids: tuple[Int32[Array, "N"], ...]) -> PagedKVCache:
    """Takes one reference from each of the pages of each group; negative ids count for none."""
    return _integers_only(_integers._add_references, cache, page_ids, np.int32(-1))
