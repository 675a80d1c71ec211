"""Pages that come back layer by layer, each before its layer is computed.

An extent by layers has, for each group, a tuple of blocks ``[N, ...]``, one of each layer, so that each travels on its
own. What orders things is what a program reads: `land` puts a layer's block into the pools, and the attention that
reads these cannot start before. No wait is needed for a right result, so none can be forgotten or passed by.

Before a page lands it may change hands: `extend` copies a shared page that is still empty, rows are forked or released,
other rows take their pages. So `land` does not write where pages were to go at first. In each layer it asks the cache
which rows wait for them now (they carry a mark, see `take_rows`) and writes into the pages that those map. Where no row
waits (`begin_swap_in`), the arrival holds a reference of its own, so that the pages stay its own.

That transfers run beside the layers before has to be said too. XLA schedules what depends on arguments alone first, two
transfers at a time, and waits for all but the last: hence `land` ties a transfer to the input of the layer before its
own. At most two layers' blocks are on the device at once.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from paxcache import _cache, _checks
from paxcache._cache import _integers_only, _replace_group
from paxcache._types import NO_PAGE, PagedKVCache, Pages
from paxcache.offload import _pages, _rows
from paxcache.offload._pages import Extent

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32, PyTree

    from paxcache._cache import Layer
    from paxcache.offload._rows import Host, Ticket, Waiting
    from paxcache.ops import Implementation

_LONGEST_PAUSE = 1e-3  # seconds between two looks at a transfer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrival:
    """Pages on their way into a cache, which has room for them already. Made by `begin_swap_in` and `begin_resume`.

    A value: `land` returns one without the layer that landed, and `cancel` gives up on those that have not.
    """

    blocks: tuple[tuple[Pages | None, ...], ...]
    """By group and layer, leaves [N, ...]; None for a layer that has landed or does not come."""
    targets: tuple[Int32[Array, "N"], ...]
    """Per group, the pages that they were given at first; NO_PAGE for padding and where refused."""
    rows: Waiting | None
    """The rows that they come for. None: they come for no row, and the arrival holds a reference to each target."""


def begin_swap_in(
    cache: PagedKVCache, extent: Extent
) -> tuple[PagedKVCache, Arrival, tuple[Int32[Array, "N"], ...], Bool[Array, ""]]:
    """Takes the pages of a `swap_in` and copies nothing yet: each layer's part comes with its `land`.

    Besides the caller's reference each page has one of the arrival's, which ends with its last `land` or with `cancel`:
    pages that the caller gives back meanwhile are nobody else's before that.

    A row may map the pages at once, where it goes on behind them. It must not go on inside one before that has landed:
    `extend` would copy what is not there yet. So while they are on their way, note them as in flight in a prefix index,
    where `admit` does not hand them out, or admit with ``partial=False``.

    Args:
      cache: the cache.
      extent: from `swap_out` with ``by_layer=True`` or `layers`; it stays valid.

    Returns:
      The cache, an `Arrival`, and page ids and ok as of `swap_in`. Where refused, `land` changes nothing.

    Raises:
      ValueError, TypeError: the extent does not fit the cache, or is not by layers.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> extent = offload.swap_out(cache, jnp.array([1, 0]), by_layer=True)
      >>> cache, arrival, page_ids, ok = offload.begin_swap_in(cache, extent)
      >>> for layer in range(2):
      ...     cache, arrival = offload.land(cache, layer, arrival)
      >>> page_ids[0].tolist(), ok.item()
      ([2, 3], True)

    Reference: layer-wise loading of FastDeploy's cache manager and of SGLang's HiCache.
    """
    blocks = _blocks_by_layer("extent", cache, extent)
    new, _, page_ids, ok = _integers_only(_pages._swap_in, cache, extent.held, 2)
    return new, Arrival(blocks, page_ids, None), page_ids, ok


def begin_resume(
    cache: PagedKVCache, host: Host, ticket: Ticket, rows: Int32[Array, "N"]
) -> tuple[PagedKVCache, Host, Arrival, Bool[Array, ""]]:
    """Maps the pages of a `resume` and copies nothing yet: each layer's part comes with its `land`.

    Meanwhile the rows may be extended, forked, reordered, truncated and released, and the pools packed or resized.
    What waits for the pages gets them, and nothing else is written: a released row gets nothing. Until all has
    landed the rows cannot be preempted again and offer nothing to a prefix index.

    Args:
      cache, host, rows: as in `resume`.
      ticket: from ``preempt(..., by_layer=True)``; used up if ok.

    Returns:
      The cache with the rows live, the account, an `Arrival`, and ok as of `resume`. Until a layer has landed, its
      slots of these rows hold whatever was there before.

    Raises:
      ValueError, TypeError: as in `resume`; or the ticket is not by layers.

    Example:
      >>> import jax, jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=4)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 30]), num_tokens=50)
      >>> host, row = offload.init(config, 64), jnp.array([0])
      >>> cache, host, ticket = offload.preempt(cache, host, row, by_layer=True)
      >>> @jax.jit
      ... def decode(cache, host, ticket, x):
      ...     cache, host, arrival, ok = offload.begin_resume(cache, host, ticket, row)
      ...     cache, step = paxcache.extend(cache, jnp.array([1, 1]), max_query_len=1)
      ...     for layer in range(2):
      ...         cache, arrival = offload.land(cache, layer, arrival, x)   # layer + 1 travels from here on
      ...         cache = paxcache.append(cache, layer, x, x, step)
      ...         x += paxcache.attend(cache, layer, x, step)
      ...     return cache, x
      >>> cache, x = decode(cache, host, ticket, jnp.ones((2, 1, 1, 8)))
      >>> cache.seq_lens.tolist()
      [21, 31]
    """
    new, host, taken, waiting, ok = _rows.take_rows(cache, host, ticket, rows, arriving=True)
    # A pool that grows has pages where this one ends.
    targets = tuple(
        jnp.where(pages < g.ref_counts.shape[0], pages, NO_PAGE)
        for pages, g in zip(taken, cache.groups, strict=True)
    )
    return new, host, Arrival(_blocks_by_layer("ticket", cache, ticket.extent), targets, waiting), ok


def _blocks_by_layer(name: str, cache: PagedKVCache, extent: Extent) -> tuple[tuple[Pages | None, ...], ...]:
    _pages.check_extent(name, cache, extent)
    if not all(isinstance(blocks, tuple) for blocks in extent.blocks):
        raise ValueError(f"{name}: expected one made with by_layer=True, got whole pages")
    return extent.blocks  # type: ignore[return-value]


def land(
    cache: PagedKVCache,
    layer: Layer,
    arrival: Arrival,
    x: PyTree[Array] | None = None,
    *,
    implementation: Implementation = None,
) -> tuple[PagedKVCache, Arrival]:
    """Puts one layer's part of the arriving pages in place, and sends for the next layer's.

    To be called for every layer, before anything reads it or appends to it. Under jit, `x` is what orders the program:
    the next layer's transfer begins once it is there, beside what the layer computes, and pages land after whatever it
    was computed from has been read. Without it XLA may let all layers come first, and copy pools to keep what is still
    to be read.

    Args:
      cache: the cache, from the `begin_swap_in` or `begin_resume` of the arrival, or a later one.
      layer: a Python int, or (group, index) with static numbers: each layer is an array of its own.
      arrival: the pages.
      x: what enters the layer, arrays that come of the layer before. None: nothing was read before.
      implementation: backend of the scatter, see `paxcache.ops`.

    Returns:
      The cache; and the arrival, to go on with, without this layer.

    Raises:
      ValueError, TypeError: the arrival does not fit the cache, the layer is traced, or it has landed before.

    Example: see `begin_resume`.
    """
    _checks.instance("cache", cache, PagedKVCache)
    group, index = _find_layer(layer, arrival)
    if len(arrival.blocks) != len(cache.groups):
        raise ValueError(f"arrival: expected pages of {len(cache.groups)} groups, got {len(arrival.blocks)}")
    state, rows, targets = cache.groups[group], arrival.rows, arrival.targets[group]
    _check_block(state.pages, arrival.blocks[group][index], group)
    after = (
        (lambda tree: lax.optimization_barrier((tree, x))[0]) if _checks.is_traced(x) else lambda tree: tree
    )
    block = jax.device_put(arrival.blocks[group][index], jax.memory.Space.Device)
    pool = after(state.pages)
    if rows is None:
        pool = _pages.put_layer(pool, index, targets, block, implementation)
    elif targets.shape[0]:
        table = rows.block_tables[group]
        places = _find_places(state.block_tables, _cache.row_epochs(cache), rows.marks, table, targets)
        ids, copies, entries = places
        pool = _pages.put_layer(pool, index, ids, block, implementation)
        again = jax.tree.map(lambda leaf: leaf[entries], block)
        pool = _pages.put_layer(pool, index, copies, again, implementation)
    cache = _replace_group(cache, group, pages=pool)

    blocks = [list(layers) for layers in arrival.blocks]
    blocks[group][index] = None
    places = [(g, i) for g, layers in enumerate(blocks) for i, part in enumerate(layers) if part is not None]
    for g, i in [place for place in places if place > (group, index)][:1]:
        blocks[g][i] = jax.device_put(after(blocks[g][i]), jax.memory.Space.Device)
    if not places:
        cache = _finish(cache, arrival)
    return cache, dataclasses.replace(arrival, blocks=tuple(map(tuple, blocks)))


@jax.jit
def _find_places(block_tables, epochs, marks, waiting, targets):
    """Where the pages of one group go now: ids i32[N], and to which pages i32[B] entries i32[B] go besides.

    Only `extend` gives a waiting row another page than its target: a copy of its own, of a page that it shares, in the
    column of its first new slot. Later columns hold new tokens alone. So of the columns that map another page only the
    first is waited for. (A fresh page behind a row that was cut is taken for one. It has no token yet in this layer.)
    """
    B, N = block_tables.shape[0], targets.shape[0]
    waits, which = _find_waiting(epochs, marks)
    entries = jnp.where(waits[:, None], waiting[which], NO_PAGE)
    mapped = (entries >= 0) & (block_tables >= 0)
    first = mapped & (block_tables == targets[jnp.maximum(entries, 0)])
    wanted = jnp.zeros(N, bool).at[jnp.where(first, entries, N)].set(True, mode="drop")

    moved = mapped & ~first
    column = jnp.argmax(moved, axis=1)[:, None]
    page, entry = (jnp.take_along_axis(x, column, axis=1)[:, 0] for x in (block_tables, entries))
    page = jnp.where(moved.any(axis=1), page, NO_PAGE)
    # Forks of a row share its copy, which no list may name twice.
    own = jnp.arange(B, dtype=jnp.int32)
    same = (page == page[:, None]) & (own < own[:, None])
    page = jnp.where(same.any(axis=1), NO_PAGE, page)
    return jnp.where(wanted, targets, NO_PAGE), page, jnp.maximum(entry, 0)


def _find_waiting(epochs, marks):
    """Which rows carry a mark, and which one."""
    same = (epochs[:, None] == marks) & (marks < 0)
    return same.any(axis=1), jnp.argmax(same, axis=1)


def _finish(cache: PagedKVCache, arrival: Arrival) -> PagedKVCache:
    """The cache once all has landed: rows without marks, pages without the arrival's reference."""
    if arrival.rows is None:
        return _pages.give_back(cache, arrival.targets)
    epochs = _read_marks(_cache.row_epochs(cache), arrival.rows.marks, arrival.rows.epochs)[1]
    return cache if cache.epochs is None else dataclasses.replace(cache, epochs=epochs)


@jax.jit
def _read_marks(epochs, marks, kept):
    """Which rows wait, and all rows' epochs once they do not."""
    waits, which = _find_waiting(epochs, marks)
    return waits, jnp.where(waits, kept[which], epochs) if marks.shape[0] else epochs


def cancel(cache: PagedKVCache, arrival: Arrival) -> PagedKVCache:
    """Gives up on pages that have not all landed: a time-out, or a request that nobody waits for any more.

    Rows that wait for them are released, forks of theirs too, since a part of what they should hold is missing; from
    `begin_swap_in`, the arrival's references are given back, and the caller's stay (see `drop`). Releasing the rows
    oneself does as well: what lands after that is dropped. Once all has landed this changes nothing.

    Args:
      cache: the cache, from the `begin_swap_in` or `begin_resume` of the arrival, or a later one.
      arrival: what `land` returned last; used up.

    Returns:
      The cache.

    Raises:
      ValueError, TypeError: an argument's type is wrong, or the arrival does not fit the cache.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=4)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 30]), num_tokens=50)
      >>> host, row = offload.init(config, 64), jnp.array([0])
      >>> cache, host, ticket = offload.preempt(cache, host, row, by_layer=True)
      >>> cache, host, arrival, ok = offload.begin_resume(cache, host, ticket, row)
      >>> cache, arrival = offload.land(cache, 0, arrival)
      >>> offload.cancel(cache, arrival).seq_lens.tolist()
      [0, 30]
    """
    _checks.instance("cache", cache, PagedKVCache)
    _checks.instance("arrival", arrival, Arrival, source="begin_swap_in or begin_resume")
    if len(arrival.blocks) != len(cache.groups):
        raise ValueError(f"arrival: expected pages of {len(cache.groups)} groups, got {len(arrival.blocks)}")
    if not any(part is not None for layers in arrival.blocks for part in layers):
        return cache
    if arrival.rows is None:
        return _pages.give_back(cache, arrival.targets)
    waits, _ = _read_marks(_cache.row_epochs(cache), arrival.rows.marks, arrival.rows.epochs)
    return _cache.release(cache, waits)


def _check_block(pool: Pages, block: Pages | None, group: int) -> None:
    """A block [N, ...] of the pool's layers."""
    if jax.tree.structure(pool) != jax.tree.structure(block):
        raise ValueError(
            f"arrival: expected leaves like group {group}'s pages, {jax.tree.structure(pool)}, "
            f"got {jax.tree.structure(block)}"
        )
    for ours, leaf in zip(jax.tree.leaves(pool), jax.tree.leaves(block), strict=True):
        if leaf.shape[1:] != ours.shape[2:] or leaf.dtype != ours.dtype:
            raise ValueError(
                f"arrival: expected {ours.dtype}[N, {', '.join(map(str, ours.shape[2:]))}] for group {group}, "
                f"got {_checks.describe(leaf)}"
            )


def _find_layer(layer: Layer, arrival: Arrival) -> tuple[int, int]:
    _checks.instance("arrival", arrival, Arrival, source="begin_swap_in or begin_resume")
    sizes = [len(blocks) for blocks in arrival.blocks]
    if isinstance(layer, tuple):
        if len(layer) != 2:
            raise ValueError(f"layer: expected an int or (group, index), got {layer!r}")
        group, index = (_checks.static_int("layer", part, minimum=0) for part in layer)
    else:
        group, index = 0, _checks.static_int("layer", layer, minimum=0)
        while group < len(sizes) and index >= sizes[group]:
            group, index = group + 1, index - sizes[group]
    if group >= len(sizes) or index >= sizes[group]:
        raise ValueError(f"layer: expected one of the arrival's {sum(sizes)}, got {layer}")
    if arrival.blocks[group][index] is None:
        raise ValueError(f"layer: {layer} has landed already, or is none of those that were swapped out")
    return group, index


def fetch(arrival: Arrival) -> Arrival:
    """Starts all transfers at once, first layer first, for programs that compute each layer by a call of its own.

    Returns at once. The pages take as much room on the device, beside the pools, until the arrival is dropped.

    Args:
      arrival: the pages, on the host.

    Returns:
      The arrival with its blocks on the device, or on their way there: `land` and `wait` take it.

    Raises:
      TypeError: called inside jit, where `land` starts each transfer, or with another type.

    Example: see `wait`.
    """
    _checks.instance("arrival", arrival, Arrival, source="begin_swap_in or begin_resume")
    if _checks.is_traced(arrival):
        raise TypeError("arrival: fetch starts transfers from the host; inside jit call land alone")
    return dataclasses.replace(arrival, blocks=_pages.put(arrival.blocks, "device"))


def wait(layer: Layer, arrival: Arrival, *, timeout: float) -> None:
    """Waits until a layer's part has arrived, or raises. Results are right without it: it is there to give up in time.

    Args:
      layer: as in `land`.
      arrival: from `fetch`.
      timeout: seconds.

    Raises:
      TimeoutError: the pages are not there; names the layer. `cancel` gives up on them.
      ValueError, TypeError: the arrival was not fetched, or an argument's type or range is wrong.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> extent = offload.swap_out(cache, jnp.array([1, 0]), by_layer=True)
      >>> cache, arrival, page_ids, ok = offload.begin_swap_in(cache, extent)
      >>> arrival = offload.fetch(arrival)
      >>> for layer in range(2):
      ...     offload.wait(layer, arrival, timeout=10.0)
      ...     cache, arrival = offload.land(cache, layer, arrival)    # in a jitted call that computes this layer
    """
    group, index = _find_layer(layer, arrival)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float, np.number)):
        raise TypeError(f"timeout: expected seconds, got {_checks.describe(timeout)}")
    if not timeout >= 0:
        raise ValueError(f"timeout: expected at least 0 seconds, got {timeout}")
    if _checks.is_traced(arrival):
        raise TypeError("arrival: wait looks at transfers from the host; inside jit call land alone")
    deadline = time.monotonic() + timeout
    for leaf in jax.tree.leaves(arrival.blocks[group][index]):
        if not _is_on_device(leaf):
            raise ValueError("arrival: expected one from fetch, got one whose pages are on the host")
        pause = 1e-5
        while not leaf.is_ready():
            if time.monotonic() >= deadline:
                raise TimeoutError(f"layer {layer}: its pages did not arrive within {timeout} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def time_layers(arrival: Arrival) -> tuple[tuple[float | None, ...], ...]:
    """Measures what each layer's transfer to the device takes, one after the other with nothing beside it.

    For tuning and logs: it transfers everything once more, a layer at a time, and drops it. In a program that computes
    meanwhile a transfer may take longer, and as long as it is done before its layer it costs nothing.

    Args:
      arrival: the pages, on the host: from `begin_resume` or `begin_swap_in`. It stays as it is.

    Returns:
      By group and layer, seconds; None for a layer that has landed or does not come. The first holds what a first
      transfer costs the process: measure twice.

    Raises:
      ValueError, TypeError: the arrival was fetched, is traced or of another type.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> from paxcache import offload
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 0]), num_tokens=20)
      >>> extent = offload.swap_out(cache, jnp.array([1, 0]), by_layer=True)
      >>> arrival = offload.begin_swap_in(cache, extent)[1]
      >>> [len(seconds) for seconds in offload.time_layers(arrival)]
      [2]
    """
    _checks.instance("arrival", arrival, Arrival, source="begin_swap_in or begin_resume")
    if _checks.is_traced(arrival):
        raise TypeError("arrival: time_layers measures transfers from the host and cannot run inside jit")
    jax.block_until_ready(arrival)
    seconds = []
    for layers in arrival.blocks:
        seconds.append([])
        for part in layers:
            if any(_is_on_device(leaf) for leaf in jax.tree.leaves(part)):
                raise ValueError("arrival: expected pages on the host, got some that fetch or land sent for")
            start = time.perf_counter()
            jax.block_until_ready(_pages.put(part, "device"))
            seconds[-1].append(None if part is None else time.perf_counter() - start)
    return tuple(map(tuple, seconds))


def _is_on_device(leaf: Array) -> bool:
    return leaf.sharding.memory_kind == leaf.sharding.with_memory_kind("device").memory_kind
