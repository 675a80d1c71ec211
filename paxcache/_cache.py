"""The public contract: functions from a cache (and arrays) to a new cache.

But for the scales that `init` is given, nothing here reads a value on the host, and nothing raises because of what
values are.

Every function is jitted on its own, so that an eager call is one compiled program; inside a caller's jit it is part of
that one. Pools change in place where the caller's jit donates them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paxcache import _allocator, _checks, _quantize, ops
from paxcache._types import (
    INT32_MAX,
    NO_PAGE,
    CacheConfig,
    GroupCache,
    LayerGroup,
    PagedKVCache,
    Pages,
    Status,
    Step,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int32

    from paxcache._quantize import QuantizedPages
    from paxcache.ops import Implementation

type Layer = int | tuple[int, int | jax.Array]
"""A layer: a Python int counting through the groups, or (group, index) whose index may be traced."""


def init(
    config: CacheConfig,
    *,
    k_scales: Float[Array, "L"] | None = None,
    v_scales: Float[Array, "L"] | None = None,
) -> PagedKVCache:
    """An empty cache.

    Args:
      config: shapes and sizes.
      k_scales, v_scales: f32[L] scales of quantised keys and values, one for each layer of all groups in order; only
        for groups with ``scales="per_tensor"``, the others' entries are ignored. v_scales may be left out where no such
        group stores values.

    Returns:
      A cache in which every row is idle and every page is free.

    Raises:
      TypeError: config is no `CacheConfig`.
      ValueError: scales are missing, given where no group takes any, of another shape, or (outside jit) not above 0.

    Example:
      >>> import paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=4,
      ...                               max_pages_per_seq=8)
      >>> cache = paxcache.init(config)
      >>> cache.groups[0].pages.k.shape
      (2, 16, 1, 16, 8)

    Reference: PagedAttention (Kwon et al., 2023).
    """
    _checks.instance("config", config, CacheConfig)
    B, M = config.max_seqs, config.max_pages_per_seq
    given = [g for g in config.layer_groups if g.scales == "per_tensor"]
    k_scales = _check_scales("k_scales", k_scales, config, needed=bool(given))
    v_scales = _check_scales("v_scales", v_scales, config, needed=any(g.value_dim for g in given))
    groups, first = [], 0
    for group in config.layer_groups:
        num_pages, layers = config.group_num_pages(group), slice(first, first + group.num_layers)
        k = _empty_pool(config, group, group.head_dim, k_scales, layers)
        v = _empty_pool(config, group, group.value_dim, v_scales, layers) if group.value_dim else None
        tables = jnp.full((B, M), NO_PAGE, jnp.int32)
        counts = jnp.zeros(num_pages, jnp.int32)
        groups.append(GroupCache(Pages(k, v), tables, counts, group.sliding_window, group.query_group))
        first += group.num_layers
    return PagedKVCache(
        jnp.zeros(B, jnp.int32), tuple(groups), jnp.zeros(B, jnp.int32), jnp.zeros(2, jnp.uint32)
    )


def page_shapes(config: CacheConfig) -> tuple[Pages, ...]:
    """The pools of a config's groups as shapes."""
    num_layers = sum(group.num_layers for group in config.layer_groups)
    scales = jax.ShapeDtypeStruct((num_layers,), jnp.float32)
    given = [group for group in config.layer_groups if group.scales == "per_tensor"]
    cache = jax.eval_shape(
        lambda k_scales, v_scales: init(config, k_scales=k_scales, v_scales=v_scales),
        scales if given else None,
        scales if any(group.value_dim for group in given) else None,
    )
    return tuple(group.pages for group in cache.groups)


def _check_scales(name: str, scales: Any, config: CacheConfig, *, needed: bool) -> jax.Array | None:
    """Scales for all layers, if some group takes them."""
    if not needed:
        if scales is not None:
            raise ValueError(
                f"{name}: expected None, no group has scales='per_tensor'; got {_checks.describe(scales)}"
            )
        return None
    num_layers = sum(g.num_layers for g in config.layer_groups)
    if scales is None:
        raise ValueError(f"{name}: expected f32[{num_layers}] for groups with scales='per_tensor', got None")
    if not isinstance(scales, Tracer):
        scales = np.asarray(scales)
        if scales.dtype.kind == "f" and not (scales > 0).all():
            raise ValueError(f"{name}: expected scales above 0, got {scales.tolist()}")
    return _checks.array(name, scales, "L", dtype=jnp.floating, L=num_layers).astype(jnp.float32)


def _empty_pool(
    config: CacheConfig, group: LayerGroup, width: int, scales: jax.Array | None, layers: slice
) -> jax.Array | QuantizedPages:
    shape = (group.num_layers, config.group_num_pages(group), group.num_kv_heads, config.page_size, width)
    if group.quantization is None:
        return jnp.zeros(shape, group.dtype)
    own = scales[layers] if group.scales == "per_tensor" and scales is not None else None
    return _quantize.empty(group.quantization, shape, own)


def extend(
    cache: PagedKVCache,
    query_lens: Int32[Array, "B"],
    *,
    num_tokens: int | None = None,
    max_query_len: int | None = None,
    implementation: Implementation = None,
) -> tuple[PagedKVCache, Step]:
    """Makes room for new tokens: maps pages, advances lengths, and describes the forward pass that fills them.

    The only function that needs pages, and the only one that makes them private: where a row's new slots lie in a page
    that others share, the row takes a fresh page, with the old one's tokens copied in all layers (copy-on-write).
    Atomic for each row: a refused row changes nothing. Rows that can never fit are refused first; the others are
    served in row order, none overtaking another. In a group with a sliding window, pages wholly left of what the first
    new token sees are freed; pages freed here are not handed out here. (So a rollback by `truncate` to the length
    before the last `extend` or later is always exact.)

    Args:
      cache: the cache.
      query_lens: i32[B] new tokens of each row; 0 leaves a row alone.
      num_tokens: tokens that a packed step holds, T (static): tokens follow each other in row order, what is left at
        the end is padding.
      max_query_len: tokens that a row can have, Q (static). Alone it makes a row-aligned step: tokens are [B, Q]. With
        num_tokens the step is packed, and rows that ask for more are refused: kernels for short rows take it. A decode
        loop should give it.
      implementation: backend of the copy and of the plan, see `paxcache.ops`.

    Returns:
      The cache with its new lengths, and the `Step`; ``step.ok`` tells which rows were served.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong. Never for what the values are: see ``step.status``.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([3, 1]), num_tokens=6)
      >>> step.rows.tolist(), step.positions.tolist()
      ([0, 0, 0, 1, 2, 2], [0, 1, 2, 0, 0, 0])
      >>> cache.seq_lens.tolist(), step.ok.tolist()
      ([3, 1], [True, True])

    Reference: block tables and copy-on-write of PagedAttention (Kwon et al., 2023); the packed layout of
    FlashAttention's variable-length interface.
    """
    _checks.instance("cache", cache, PagedKVCache)
    query_lens = _checks.int_array("query_lens", query_lens, "B", B=cache.max_seqs)
    num_tokens, max_query_len = _checks.step_size(num_tokens, max_query_len, cache.max_seqs)
    return _extend(cache, query_lens, num_tokens, max_query_len, implementation)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _extend(
    cache: PagedKVCache,
    query_lens: Int32[Array, "B"],
    num_tokens: int | None,
    max_query_len: int | None,
    implementation: Implementation,
) -> tuple[PagedKVCache, Step]:
    B, S = cache.max_seqs, cache.page_size
    old_lens = cache.seq_lens
    most = num_tokens if max_query_len is None else max_query_len
    assert most is not None
    request, touched = _allocator.ask(
        old_lens,
        query_lens,
        [g.block_tables for g in cache.groups],
        [g.ref_counts for g in cache.groups],
        windowed=[g.sliding_window is not None for g in cache.groups],
        num_tokens=num_tokens,
        max_query_len=max_query_len,
        page_size=S,
    )
    served, short = _allocator.admit(touched, [g.ref_counts for g in cache.groups])
    status = jnp.where(served, request.status, Status.NO_PAGES)
    ok = status == Status.OK
    lens = jnp.where(ok, request.query_lens, 0)
    seq_lens = old_lens + lens
    total = num_tokens if num_tokens is not None else B * most
    packed = num_tokens is not None
    rows, positions = _allocator.place_tokens(
        request.query_starts, lens, old_lens, num_tokens=total, max_query_len=None if packed else most
    )
    token_shape = (total,) if packed else (B, most)

    groups, slot_mapping, plans = [], [], []
    for group, entries in zip(cache.groups, touched, strict=True):
        P = group.ref_counts.shape[0]
        tables, counts, copies = _allocator.allocate(
            group.block_tables, group.ref_counts, entries, ok, old_lens, page_size=S
        )
        pages = ops.copy_pages(group.pages, copies.src, copies.dst, implementation=implementation)
        if group.sliding_window is not None:
            gone = _allocator.left_of_window(tables, old_lens, group.sliding_window, page_size=S)
            tables, counts = _allocator.unmap(tables, counts, gone & (lens > 0)[:, None])
        groups.append(dataclasses.replace(group, pages=pages, block_tables=tables, ref_counts=counts))
        slots = _allocator.slots(tables, rows, positions, page_size=S, num_pages=P)
        slot_mapping.append(slots.reshape(token_shape))
        plans.append(
            ops.plan(
                tables,
                seq_lens,
                num_heads=None if group.query_group is None else group.query_group * group.pages.k.shape[2],
                num_kv_heads=group.pages.k.shape[2],
                head_dim=group.pages.k.shape[-1],
                page_size=S,
                dtype=group.pages.k.dtype,
                query_starts=request.query_starts,
                query_lens=lens,
                num_tokens=total,
                max_query_len=most,
                sliding_window=group.sliding_window,
                implementation=implementation,
            )
        )
    step = Step(
        positions=positions.reshape(token_shape),
        rows=rows.reshape(token_shape),
        query_starts=request.query_starts,
        query_lens=lens,
        seq_lens=jnp.copy(seq_lens),  # a step shares no buffer with the cache
        status=status,
        pages_short=jnp.where(status == Status.NO_PAGES, short, 0),
        slot_mapping=tuple(slot_mapping),
        block_tables=tuple(jnp.copy(g.block_tables) for g in groups),
        plans=tuple(plans),
        page_size=S,
        num_pages=tuple(g.ref_counts.shape[-1] for g in groups),
        max_query_len=most,
    )
    return dataclasses.replace(cache, seq_lens=seq_lens, groups=tuple(groups)), step


def locate(cache: PagedKVCache, layer: Layer) -> tuple[int, int | jax.Array]:
    """The group of a layer and its index there."""
    if isinstance(layer, tuple):
        if len(layer) != 2:
            raise ValueError(f"layer: expected an int or (group, index), got {layer!r}")
        group, index = layer
        group = _checks.static_int("layer's group", group, minimum=0)
        if group >= len(cache.groups):
            raise ValueError(f"layer: group must be below {len(cache.groups)}, got {group}")
        if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
            num_layers = cache.groups[group].pages.k.shape[0]
            if not 0 <= index < num_layers:
                raise ValueError(f"layer: index must be in [0, {num_layers}) in group {group}, got {index}")
        else:
            index = _checks.int_array("layer's index", index, "")
        return group, index
    if not isinstance(layer, (int, np.integer)) or isinstance(layer, bool):
        raise TypeError(
            f"layer: expected a Python int, or (group, index) for a traced index, got {_checks.describe(layer)}"
        )
    index = int(layer)
    for group, state in enumerate(cache.groups):
        num_layers = state.pages.k.shape[0]
        if 0 <= index < num_layers:
            return group, index
        index -= num_layers
    total = sum(g.pages.k.shape[0] for g in cache.groups)
    raise ValueError(f"layer: must be in [0, {total}), got {layer}")


def check_step(cache: PagedKVCache, step: Step) -> None:
    """Refuses a step that was made for a cache of another shape: its slots are those of other rows here."""
    _checks.instance("step", step, Step)
    made_for = step.seq_lens.shape[-1], step.block_tables[0].shape[-1], step.page_size, step.num_pages
    num_pages = tuple(g.ref_counts.shape[-1] for g in cache.groups)
    given = cache.max_seqs, cache.max_pages_per_seq, cache.page_size, num_pages
    if made_for != given:
        names = "max_seqs", "max_pages_per_seq", "page_size", "num_pages of each group"
        wanted, got = (
            ", ".join(f"{name}={value}" for name, value in zip(names, sizes, strict=True))
            for sizes in (given, made_for)
        )
        raise ValueError(f"step: expected the step of a cache with {wanted}, got one made for {got}")


def _flatten_tokens(name: str, x: Any, step: Step, dims: str, **sizes: int) -> jax.Array:
    """[T, ...] or [B, Q, ...] as the step has it, flattened to [T, ...]."""
    lead = "T" if step.rows.ndim == 1 else "B Q"
    known = dict(zip(lead.split(), step.rows.shape, strict=True))
    x = _checks.array(name, x, f"{lead} {dims}", dtype=jnp.floating, **known, **sizes)
    return x.reshape(step.rows.size, *x.shape[step.rows.ndim :])


def append(
    cache: PagedKVCache,
    layer: Layer,
    k: Float[Array, "T K D"],
    v: Float[Array, "T K Dv"] | None,
    step: Step,
    *,
    implementation: Implementation = None,
) -> PagedKVCache:
    """Writes the new tokens' keys and values of one layer. Padding and the tokens of refused rows are dropped.

    Args:
      cache: the cache, after `extend`.
      layer: a Python int that counts through the groups, or (group, index) with an index that may be traced. A traced
        index outside the group's layers names none: nothing is written, and `attend` gives zeros.
      k, v: [T, K, D] and [T, K, Dv] in a packed step, [B, Q, K, D] and [B, Q, K, Dv] in a row-aligned one; cast to the
        pages' dtype, or quantised. v is None where the group stores no values.
      step: from the `extend` before.
      implementation: see `paxcache.ops`.

    Returns:
      The cache with the tokens written.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([3, 1]), num_tokens=4)
      >>> k = v = jnp.ones((4, 1, 8))
      >>> cache = paxcache.append(cache, 0, k, v, step)
      >>> paxcache.gather_dense(cache, 0, 4)[0][:, :, 0, 0].tolist()
      [[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    """
    _checks.instance("cache", cache, PagedKVCache)
    check_step(cache, step)
    group, index = locate(cache, layer)
    pages = cache.groups[group].pages
    _, _, K, _, D = pages.k.shape
    k = _flatten_tokens("k", k, step, "K D", K=K, D=D)
    if (v is None) != (pages.v is None):
        raise ValueError(
            f"v: expected {'None (the group stores no values)' if pages.v is None else 'an array'}, got "
            f"{_checks.describe(v)}"
        )
    if pages.v is not None:
        v = _flatten_tokens("v", v, step, "K Dv", K=K, Dv=pages.v.shape[-1])
    return _append(cache, group, index, k, v, step.slot_mapping[group].reshape(-1), implementation)


@functools.partial(jax.jit, static_argnums=(1, 6))
def _append(cache, group, index, k, v, slot_mapping, implementation):
    pages = cache.groups[group].pages
    written = ops.write_pages(
        pages.k, pages.v, k, v, slot_mapping, layer=index, implementation=implementation
    )
    return _replace_group(cache, group, pages=Pages(*written))


def _replace_group(cache: PagedKVCache, group: int, **changes: Any) -> PagedKVCache:
    groups = list(cache.groups)
    groups[group] = dataclasses.replace(groups[group], **changes)
    return dataclasses.replace(cache, groups=tuple(groups))


def attend(
    cache: PagedKVCache,
    layer: Layer,
    q: Float[Array, "T H D"],
    step: Step,
    *,
    sm_scale: Float[Array, ""] | float | None = None,
    soft_cap: float | None = None,
    sliding_window: Int32[Array, ""] | int | None = None,
    sinks: Float[Array, "H"] | None = None,
    causal: bool = True,
    implementation: Implementation = None,
) -> Float[Array, "T H Dv"]:
    """Attention of the new tokens, each over its own row. Padding and the tokens of refused rows give zeros.

    Args:
      cache: the cache, after `append` to this layer.
      layer: as in `append`.
      q: [T, H, D] in a packed step, [B, Q, H, D] in a row-aligned one; H is a multiple of K.
      step: from the `extend` before.
      sm_scale, soft_cap, sinks, causal: see `ops.paged_attention`.
      sliding_window: tokens a query sees, itself included; None takes the group's. A wider one than the group's is
        refused, since pages left of the group's window are gone; in a JAX array, which may be traced, it is cut to the
        group's, and one below 1 sees nothing.
      implementation: see `paxcache.ops`.

    Returns:
      [T, H, Dv] or [B, Q, H, Dv], of q's dtype.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, step = paxcache.extend(paxcache.init(config), jnp.array([3, 1]), num_tokens=4)
      >>> k = v = jnp.ones((4, 1, 8))
      >>> cache = paxcache.append(cache, 0, k, v, step)
      >>> paxcache.attend(cache, 0, jnp.ones((4, 2, 8)), step).shape
      (4, 2, 8)

    Reference: PagedAttention (Kwon et al., 2023).
    """
    _checks.instance("cache", cache, PagedKVCache)
    check_step(cache, step)
    group, index = locate(cache, layer)
    state = cache.groups[group]
    flat = _flatten_tokens("q", q, step, "H D", D=state.pages.k.shape[-1])
    plan = step.plans[group] if causal else None
    window = state.sliding_window
    if sliding_window is not None:
        own = _checks.window("sliding_window", sliding_window)
        if not isinstance(own, int):
            own, plan = jnp.clip(own, 0, INT32_MAX if window is None else window), None
        elif window is not None and own > window:
            raise ValueError(f"sliding_window: the group keeps {window} tokens, got {own}")
        elif own != window:
            plan = None
        window = own
    out = ops.paged_attention(
        flat,
        state.pages.k,
        state.pages.v,
        step.block_tables[group],
        step.seq_lens,
        query_starts=step.query_starts,
        query_lens=step.query_lens,
        max_query_len=step.max_query_len,
        layer=index,
        sm_scale=sm_scale,
        soft_cap=soft_cap,
        sliding_window=window,
        sinks=sinks,
        causal=causal,
        plan=plan,
        implementation=implementation,
    )
    assert isinstance(out, jax.Array)  # no log-sum-exp was asked for
    return out.reshape(*step.rows.shape, *out.shape[1:])


def fork(
    cache: PagedKVCache, parents: Int32[Array, "N"], children: Int32[Array, "N"]
) -> tuple[PagedKVCache, Bool[Array, "N"]]:
    """Makes idle rows shares of other rows: same length, same pages, nothing copied until one of them writes.

    All entries are read against the cache as it came. A parent may have many children.

    Args:
      cache: the cache.
      parents: i32[N] rows to share; -1 is padding.
      children: i32[N] idle rows to fill; -1 is padding.

    Returns:
      The cache, and ok bool[N]: False where the parent or child is out of range, the child is live, or the child is
      named twice (each time it is); those entries change nothing.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=3,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([3, 0, 0]), num_tokens=4)
      >>> cache, ok = paxcache.fork(cache, jnp.array([0, 0]), jnp.array([1, 2]))
      >>> ok.tolist(), cache.seq_lens.tolist(), cache.groups[0].ref_counts[0].item()
      ([True, True], [3, 3, 3], 3)

    Reference: parallel sampling of PagedAttention (Kwon et al., 2023).
    """
    _checks.instance("cache", cache, PagedKVCache)
    parents = _checks.int_array("parents", parents, "N")
    children = _checks.int_array("children", children, "N", N=parents.shape[0])
    return _integers_only(_fork, cache, parents, children)


def _integers_only(function: Any, cache: PagedKVCache, *args: Any) -> Any:
    """Calls a function that changes integers alone with the pages left out: an eager call would copy them."""
    groups = tuple(dataclasses.replace(g, pages=None) for g in cache.groups)
    bare = dataclasses.replace(cache, groups=groups, epochs=row_epochs(cache))
    changed, *rest = function(bare, *args)
    groups = tuple(
        dataclasses.replace(new, pages=old.pages)
        for new, old in zip(changed.groups, cache.groups, strict=True)
    )
    # A cache put together without epochs stays so: the carry of a loop must keep its structure.
    epochs = None if cache.epochs is None else changed.epochs
    changed = dataclasses.replace(changed, groups=groups, epochs=epochs)
    return (changed, *rest) if rest else changed


def row_epochs(cache: PagedKVCache) -> Int32[Array, "B"]:
    """A cache's `epochs`, also where it was put together without."""
    return jnp.zeros_like(cache.seq_lens) if cache.epochs is None else cache.epochs


@jax.jit
def _fork(cache, parents, children):
    idle = _allocator.idle_rows(cache.seq_lens, [g.block_tables for g in cache.groups])
    ok, parent_of = _allocator.check_forks(parents, children, idle)
    own = jnp.arange(cache.max_seqs, dtype=jnp.int32)
    return _share(cache, jnp.where(parent_of < cache.max_seqs, parent_of, own)), ok


def reorder(cache: PagedKVCache, parents: Int32[Array, "B"]) -> PagedKVCache:
    """Row b becomes a share of row ``parents[b]``, for all rows at once: a step of beam search.

    Args:
      cache: the cache.
      parents: i32[B]; -1 empties a row, and a row that names itself stays. Numbers of no row (below -1, or B and more)
        are refused where they lie on the host; in a JAX array, whose values may be traced, they leave the row as it is.

    Returns:
      The cache; pages of rows that nobody names are freed.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong, or parents on the host name no row.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=3,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([3, 2, 1]), num_tokens=6)
      >>> paxcache.reorder(cache, jnp.array([1, 1, -1])).seq_lens.tolist()
      [2, 2, 0]

    Reference: beam search of PagedAttention (Kwon et al., 2023).
    """
    _checks.instance("cache", cache, PagedKVCache)
    checked = _checks.int_array("parents", parents, "B", B=cache.max_seqs)
    if not isinstance(parents, jax.Array):
        wrong = [p for p in np.asarray(parents).tolist() if not -1 <= p < cache.max_seqs]
        if wrong:
            raise ValueError(f"parents: expected rows in [0, {cache.max_seqs}) or -1, got {wrong[0]}")
    return _integers_only(_reorder, cache, checked)


@jax.jit
def _reorder(cache, parents):
    own = jnp.arange(cache.max_seqs, dtype=jnp.int32)
    return (_share(cache, jnp.where((parents >= -1) & (parents < cache.max_seqs), parents, own)),)


def _share(cache: PagedKVCache, parents: Int32[Array, "B"]) -> PagedKVCache:
    """Every row takes the length, the epoch and the tables of its parent; -1 takes none."""
    empty, at = parents < 0, jnp.maximum(parents, 0)
    groups = []
    for group in cache.groups:
        tables = jnp.where(empty[:, None], NO_PAGE, group.block_tables[at])
        counts = _allocator.remap(group.block_tables, group.ref_counts, tables)
        groups.append(dataclasses.replace(group, block_tables=tables, ref_counts=counts))
    seq_lens, epochs = (jnp.where(empty, 0, x[at]) for x in (cache.seq_lens, row_epochs(cache)))
    return dataclasses.replace(cache, seq_lens=seq_lens, groups=tuple(groups), epochs=epochs)


def truncate(cache: PagedKVCache, seq_lens: Int32[Array, "B"]) -> PagedKVCache:
    """Rolls rows back to shorter lengths and frees the pages they no longer need (rejected draft tokens, retries).

    In a group with a sliding window a row should not be rolled back to less than its length before the last `extend`
    that gave it tokens: pages left of that window may be gone. Attention skips what is gone; where the row's partly
    filled last page is, `extend` refuses the row with ``Status.INVALID``.

    Args:
      cache: the cache.
      seq_lens: i32[B] lengths to keep. A row is never lengthened: one that is as long already or shorter stays as it
        is, and so does a row with a negative length. INT32_MAX leaves a row alone.

    Returns:
      The cache.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 2]), num_tokens=22)
      >>> cache = paxcache.truncate(cache, jnp.array([16, 5]))
      >>> cache.seq_lens.tolist(), paxcache.stats(cache).num_used_pages.item()
      ([16, 2], 2)
    """
    _checks.instance("cache", cache, PagedKVCache)
    seq_lens = _checks.int_array("seq_lens", seq_lens, "B", B=cache.max_seqs)
    return _integers_only(_truncate, cache, seq_lens, cache.page_size)


@functools.partial(jax.jit, static_argnums=2)
def _truncate(cache, seq_lens, page_size):
    shrinks = (seq_lens >= 0) & (seq_lens < cache.seq_lens)
    kept = jnp.where(shrinks, seq_lens, cache.seq_lens)

    def past_length(group):
        return shrinks[:, None] & _allocator.past_length(group.block_tables, kept, page_size=page_size)

    # An emptied row waits for no pages (`offload.begin_resume`): what it holds next is its own.
    epochs = row_epochs(cache)
    epochs = jnp.where(shrinks & (kept == 0) & (epochs < 0), 0, epochs)
    return (dataclasses.replace(_unmap(cache, kept, past_length), epochs=epochs),)


def release(cache: PagedKVCache, rows: Bool[Array, "B"]) -> PagedKVCache:
    """Empties whole rows; pages that nobody else references become free. An idle row stays idle.

    Args:
      cache: the cache.
      rows: bool[B] rows to empty.

    Returns:
      The cache.

    Raises:
      ValueError, TypeError: an argument's shape or type is wrong.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> cache, _ = paxcache.extend(paxcache.init(config), jnp.array([20, 2]), num_tokens=22)
      >>> paxcache.release(cache, jnp.array([True, False])).seq_lens.tolist()
      [0, 2]
    """
    _checks.instance("cache", cache, PagedKVCache)
    return _integers_only(_release, cache, _checks.bool_array("rows", rows, "B", B=cache.max_seqs))


@jax.jit
def _release(cache, rows):
    seq_lens, epochs = (jnp.where(rows, 0, x) for x in (cache.seq_lens, cache.epochs))
    return (dataclasses.replace(_unmap(cache, seq_lens, lambda g: rows[:, None]), epochs=epochs),)


def _unmap(cache: PagedKVCache, seq_lens: Int32[Array, "B"], where: Any) -> PagedKVCache:
    """New lengths, and in each group the entries that `where(group)` marks given back."""
    groups = []
    for group in cache.groups:
        tables, counts = _allocator.unmap(group.block_tables, group.ref_counts, where(group))
        groups.append(dataclasses.replace(group, block_tables=tables, ref_counts=counts))
    return dataclasses.replace(cache, seq_lens=seq_lens, groups=tuple(groups))
