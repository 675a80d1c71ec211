"""Pages that come back layer by layer, each before its layer is computed. Imports `_pages` and `_rows`.

An extent by layers has, for each group, a tuple of blocks ``[N, ...]``, one of each layer, so that each travels on its
own. What orders things is what a program reads: `land` puts a layer's block into the pools, and the attention that
reads these cannot start before. No wait is needed for a right result, so none can be forgotten or passed by.

That transfers run beside the layers before has to be said too. XLA schedules what depends on arguments alone first, two
transfers at a time, and waits for all but the last: hence `land` ties a transfer to the input of the layer before its
own. At most two layers' blocks are on the device at once.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

import jax
from jax import lax

from paxcache import _checks
from paxcache._cache import _integers_only, _replace_group
from paxcache._types import PagedKVCache, Pages
from paxcache.offload import _pages, _rows
from paxcache.offload._pages import Extent

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32, PyTree

    from paxcache._cache import Layer
    from paxcache.offload._rows import Host, Ticket
    from paxcache.ops import Implementation

_LONGEST_PAUSE = 1e-3  # seconds between two looks at a transfer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrival:
    """Pages on their way into a cache, which has room for them already. Made by `begin_swap_in` and `begin_resume`."""

    blocks: tuple[tuple[Pages, ...], ...]
    """By group and layer, leaves [N, ...]."""
    targets: tuple[Int32[Array, "N"], ...]
    """Per group, the pages that they go to; P, which is outside the pool, for padding and where refused."""


def begin_swap_in(
    cache: PagedKVCache, extent: Extent
) -> tuple[PagedKVCache, Arrival, tuple[Int32[Array, "N"], ...], Bool[Array, ""]]:
    """Takes the pages of a `swap_in` and copies nothing yet: each layer's part comes with its `land`.

    Args:
      cache: the cache.
      extent: from ``swap_out(..., by_layer=True)``; it stays valid.

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
    new, targets, page_ids, ok = _integers_only(_pages._swap_in, cache, extent.held)
    return new, Arrival(blocks, targets), page_ids, ok


def begin_resume(
    cache: PagedKVCache, host: Host, ticket: Ticket, rows: Int32[Array, "N"]
) -> tuple[PagedKVCache, Host, Arrival, Bool[Array, ""]]:
    """Maps the pages of a `resume` and copies nothing yet: each layer's part comes with its `land`.

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
    new, host, targets, ok = _rows.take_rows(cache, host, ticket, rows)
    return new, host, Arrival(_blocks_by_layer("ticket", cache, ticket.extent), targets), ok


def _blocks_by_layer(name: str, cache: PagedKVCache, extent: Extent) -> tuple[tuple[Pages, ...], ...]:
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

    To be called for every layer, before anything reads it. Under jit, `x` is what orders the program: the next layer's
    transfer begins once it is there, beside what the layer computes, and pages land after whatever it was computed
    from has been read. Without it XLA may let all layers come first, and copy pools to keep what is still to be read.

    Args:
      cache: the cache, from the `begin_swap_in` or `begin_resume` of the arrival, or a later one.
      layer: a Python int, or (group, index) with static numbers: each layer is an array of its own.
      arrival: the pages.
      x: what enters the layer, arrays that come of the layer before. None: nothing was read before.
      implementation: backend of the scatter, see `paxcache.ops`.

    Returns:
      The cache; and the arrival, to go on with.

    Raises:
      ValueError, TypeError: the arrival does not fit the cache, or the layer is traced.

    Example: see `begin_resume`.
    """
    group, index = _find_layer(layer, arrival)
    if len(arrival.blocks) != len(cache.groups):
        raise ValueError(f"arrival: expected pages of {len(cache.groups)} groups, got {len(arrival.blocks)}")
    pool, block = cache.groups[group].pages, arrival.blocks[group][index]
    after = (
        (lambda tree: lax.optimization_barrier((tree, x))[0]) if _checks.is_traced(x) else lambda tree: tree
    )
    pool = _pages.put_layer(after(pool), index, arrival.targets[group], block, implementation)
    blocks = [list(layers) for layers in arrival.blocks]
    places = [(g, i) for g, layers in enumerate(blocks) for i in range(len(layers))]
    for g, i in places[places.index((group, index)) + 1 :][:1]:
        blocks[g][i] = jax.device_put(after(blocks[g][i]), jax.memory.Space.Device)
    arrival = dataclasses.replace(arrival, blocks=tuple(map(tuple, blocks)))
    return _replace_group(cache, group, pages=pool), arrival


def _find_layer(layer: Layer, arrival: Arrival) -> tuple[int, int]:
    _checks.instance("arrival", arrival, Arrival, source="begin_swap_in or begin_resume")
    sizes = [len(blocks) for blocks in arrival.blocks]
    if isinstance(layer, tuple):
        group, index = (_checks.static_int("layer", part, minimum=0) for part in layer)
    else:
        group, index = 0, _checks.static_int("layer", layer, minimum=0)
        while group < len(sizes) and index >= sizes[group]:
            group, index = group + 1, index - sizes[group]
    if group >= len(sizes) or index >= sizes[group]:
        raise ValueError(f"layer: expected one of the arrival's {sum(sizes)}, got {layer}")
    return group, index


def fetch(arrival: Arrival) -> Arrival:
    """Starts all transfers at once, first layer first, for programs that compute each layer by a call of its own.

    Returns at once. The pages take as much room on the device, beside the pools, until the arrival is dropped.

    Args:
      arrival: the pages, on the host.

    Returns:
      The arrival with its blocks on the device, or on their way there: `land` and `wait` take it.

    Raises:
      TypeError: called inside jit, where `land` starts each transfer.

    Example: see `wait`.
    """
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
      TimeoutError: the pages are not there; names the layer.
      ValueError: the arrival was not fetched.

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
    deadline = time.monotonic() + timeout
    for leaf in jax.tree.leaves(arrival.blocks[group][index]):
        if leaf.sharding.memory_kind != leaf.sharding.with_memory_kind("device").memory_kind:
            raise ValueError("arrival: expected one from fetch, got one whose pages are on the host")
        pause = 1e-5
        while not leaf.is_ready():
            if time.monotonic() >= deadline:
                raise TimeoutError(f"layer {layer}: its pages did not arrive within {timeout} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
