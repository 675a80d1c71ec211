"""Every op in plain JAX: runs on any device, and is what other backends are measured against.

Inputs are already checked (by `paxcache.ops`) and in one form: pools ``[L, P, K, S, D]`` with a layer index, queries
``[T, H, D]`` with a start and a length for each row.

Attention cuts the queries into *tiles* (up to `tile_len` tokens of one row) and each tile's visible keys into *chunks*
of a few pages. A loop takes a fixed number of (tile, chunk) *items* at a time, computes their partial softmax and joins
it to the tiles' running sums: work follows the tokens that exist, and memory does not grow with B × M × S.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding, PartitionSpec

from paxcache._allocator import count_at_most, running_sum
from paxcache._quantize import QuantizedPages, encode, load, scales_of
from paxcache._state import state
from paxcache._types import INT32_MAX
from paxcache.kernels._request import Pools, Rows, Scores, Shapes, shapes_of

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Int32, PyTree, Shaped

NEG = -1e30  # stands for -inf in running maxima, so that no difference of two of them is NaN
MAX_TILE_LEN = 64
CHUNK_TOKENS = 256
KEY_ELEMENTS = 1 << 20
"""Elements of K that the attention loop holds at once: 4 MB in float32. Smaller iterations cost more than they save."""
WHOLE_ELEMENTS = 1 << 22
"""A step whose tables hold no more elements of K (or scores) than this goes without a loop: 16 MB in float32."""


@state
class Plan:
    """The tiles of a step and the running number of items; see the module's text."""

    tile_rows: Int32[Array, "N"]
    tile_lens: Int32[Array, "N"]  # queries in the tile; 0 for tiles that stand for none
    tile_offsets: Int32[Array, "N"]  # of the tile's first query among its row's
    first_chunks: Int32[Array, "N"]
    item_ends: Int32[Array, "N"]
    tile_len: int = dataclasses.field(metadata={"static": True})
    chunk_pages: int = dataclasses.field(metadata={"static": True})


def make_plan(
    rows: Rows,
    shapes: Shapes,
    *,
    sliding_window: Int32[Array, ""] | int | None = None,
    causal: bool = True,
) -> Plan:
    """Cuts a step into tiles and chunks. Lengths are dynamic, the number of tiles is not."""
    tables, seq_lens, _, query_lens = rows
    (num_rows, max_pages), page_size = tables.shape, shapes.page_size
    num_tokens, max_query_len = shapes.num_tokens, shapes.max_query_len
    # A row's last tile is padded: this length keeps all padding together below the number of tokens.
    tile_len = max(1, min(MAX_TILE_LEN, max_query_len, num_tokens // num_rows))
    chunk_pages = max(1, min(max_pages, CHUNK_TOKENS // page_size))
    chunk_len = chunk_pages * page_size
    row_tiles = (query_lens + tile_len - 1) // tile_len
    num_tiles = num_rows * -(-max_query_len // tile_len)
    num_tiles = min(num_tiles, (num_tokens + num_rows * (tile_len - 1)) // tile_len)
    if num_tiles * -(-max_pages // chunk_pages) > INT32_MAX:
        raise ValueError(
            f"{num_tokens} tokens × {max_pages} pages a row: int32 does not count the items of work"
        )
    tile_ends = running_sum(row_tiles)
    tiles = jnp.arange(num_tiles, dtype=jnp.int32)
    row = count_at_most(tile_ends, tiles)  # num_rows past the last tile
    at = jnp.minimum(row, num_rows - 1)
    offsets = (tiles - (tile_ends - row_tiles)[at]) * tile_len
    lens = jnp.where(row < num_rows, jnp.minimum(query_lens[at] - offsets, tile_len), 0)
    first_query = seq_lens[at] - query_lens[at] + offsets
    first = jnp.zeros_like(tiles)
    if sliding_window is not None:
        first = jnp.maximum(first_query - sliding_window + 1, 0) // chunk_len
    end = (first_query + lens if causal else seq_lens[at]) + chunk_len - 1
    chunks = jnp.where(lens > 0, end // chunk_len - first, 0)
    return Plan(at, lens, offsets, first, running_sum(chunks), tile_len, chunk_pages)


def paged_attention(
    q: Float[Array, "T H D"],
    pools: Pools,
    rows: Rows,
    scores: Scores,
    *,
    max_query_len: int,
    plan: Any = None,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "T H"] | None]:
    """Attention of each row's queries over its own pages, and the log-sum-exp of each query's scores.

    On a mesh with explicit axes the heads of the results lie where those of the pages lie, and their tokens where those
    of the queries do; between, the compiler places what it computes.
    """
    if not isinstance(plan, Plan):
        shapes = shapes_of(q, pools, rows, scores, max_query_len)
        plan = make_plan(rows, shapes, sliding_window=scores.sliding_window, causal=scores.causal)
    traced = {"sm_scale": scores.sm_scale, "sliding_window": scores.sliding_window, "sinks": scores.sinks}

    def attend(arrays):
        q, pools, rows, traced, plan = arrays
        return _paged_attention(q, pools, rows, scores._replace(**traced), plan)

    sharding = jax.typeof(jax.tree.leaves(pools.k)[0]).sharding
    own = jax.typeof(q).sharding
    mesh = sharding.mesh if sharding.mesh.explicit_axes else own.mesh
    arrays = q, pools, rows, traced, plan
    if not mesh.explicit_axes:
        return attend(arrays)
    heads = sharding.spec[2] if sharding.mesh.explicit_axes else own.spec[1]
    tokens = own.spec[0] if own.mesh.explicit_axes and own.spec[0] != heads else None
    out = NamedSharding(mesh, PartitionSpec(tokens, heads))
    outs = out, out if scores.return_lse else None
    placed: Any = jax.sharding.auto_axes(attend, axes=mesh.explicit_axes, out_sharding=outs)
    return placed(arrays)


def _paged_attention(
    q: Float[Array, "T H D"], pools: Pools, rows: Rows, scores: Scores, plan: Plan
) -> tuple[Float[Array, "T H Dv"], Float[Array, "T H"] | None]:
    k_pages, v_pages, layer = pools
    block_tables, seq_lens, query_starts, query_lens = rows
    sm_scale, soft_cap, sliding_window, sinks, causal, return_lse = scores
    f32 = jnp.float32
    T, H, D = q.shape
    _, _, K, S, _ = k_pages.shape
    G, Q, C = H // K, plan.tile_len, plan.chunk_pages
    num_tiles, max_pages = plan.tile_rows.shape[0], block_tables.shape[1]
    Dv = D if v_pages is None else v_pages.shape[-1]
    products = q.dtype if isinstance(k_pages, QuantizedPages) else k_pages.dtype
    precision = lax.Precision.HIGHEST if products == f32 else None

    in_tile = jnp.arange(Q, dtype=jnp.int32)
    tokens = query_starts[plan.tile_rows][:, None] + plan.tile_offsets[:, None] + in_tile[None]
    q_tiles = q[jnp.minimum(tokens, T - 1)].reshape(num_tiles, Q, K, G, D)
    positions = (seq_lens - query_lens)[plan.tile_rows][:, None] + plan.tile_offsets[:, None] + in_tile[None]

    def by_key(scales):
        """[N, C, K, S] beside scores [N, K, Q, G, C, S]."""
        return jnp.moveaxis(scales, 2, 1)[:, :, None, None]

    def attend(tiles, columns):
        """Softmax of tiles [N] over the pages in table columns [N, C]: unnormalised sum, maximum and denominator."""
        row = plan.tile_rows[tiles]
        pages = block_tables[row[:, None], jnp.minimum(columns, max_pages - 1)]
        k_pos = columns[:, :, None] * S + jnp.arange(S, dtype=jnp.int32)[None, None]
        stored = ((pages >= 0) & (columns < max_pages))[:, :, None] & (k_pos < seq_lens[row][:, None, None])
        stored &= (layer >= 0) & (layer < k_pages.shape[0])
        pages = jnp.maximum(pages, 0)

        k, k_scales = load(k_pages, layer, pages, q.dtype)  # [N, C, K, S, D]
        # Keys are the left operand and stay as they lie: as the right one XLA's CPU backend would transpose them.
        s = jnp.einsum(
            "ncksd,nqkgd->nkcsqg", k, q_tiles[tiles], preferred_element_type=f32, precision=precision
        )
        s = jnp.moveaxis(s, (4, 5), (2, 3))
        s = s * sm_scale
        if k_scales is not None:
            s = s * by_key(k_scales)
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        visible = stored[:, None]
        q_pos = positions[tiles][:, :, None, None]
        if causal:
            visible &= k_pos[:, None] <= q_pos
        if sliding_window is not None:
            visible &= k_pos[:, None] > q_pos - sliding_window
        visible = visible[:, None, :, None]  # [N, 1, Q, 1, C, S]
        s = jnp.where(visible, s, NEG)  # a select: a recycled slot may hold NaN
        m = s.max(axis=(-2, -1))
        p = jnp.where(visible, jnp.exp(s - m[..., None, None]), 0)
        if v_pages is None:
            v, v_scales = k[..., :Dv], k_scales
        else:
            v, v_scales = load(v_pages, layer, pages, q.dtype)
        v = jnp.where(stored[:, :, None, :, None], v, 0)  # 0 × NaN is NaN
        p_v, largest = p, None
        if v_scales is not None:
            # Weights take the values' scales, each as a part of the largest: half precision has no room for small ones.
            v_scales = jnp.where(stored[:, :, None], v_scales, 0)
            largest = jnp.max(v_scales, axis=(1, 3))  # [N, K or 1]
            v_scales = v_scales / jnp.where(largest > 0, largest, 1)[:, None, :, None]
            p_v = p * by_key(v_scales)
        p_v = p_v.astype(v.dtype)
        if (
            Q * G <= S
        ):  # page by page, values as they lie: cheaper than to transpose them, while the results are few
            acc = jnp.einsum(
                "nkqgcs,ncksd->nckqgd", p_v, v, preferred_element_type=f32, precision=precision
            ).sum(1)
        else:
            acc = jnp.einsum("nkqgcs,ncksd->nkqgd", p_v, v, preferred_element_type=f32, precision=precision)
        if largest is not None:
            acc = acc * largest[:, :, None, None, None]
        return acc, m, p.sum(axis=(-2, -1))

    def step(i, carry):
        acc, m, l = carry
        item = i * num_items + jnp.arange(num_items, dtype=jnp.int32)
        tile = count_at_most(plan.item_ends, item)  # num_tiles past the end
        at = jnp.minimum(tile, num_tiles - 1)
        before = jnp.where(at > 0, plan.item_ends[jnp.maximum(at - 1, 0)], 0)
        columns = ((plan.first_chunks[at] + item - before) * C)[:, None] + jnp.arange(C, dtype=jnp.int32)[
            None
        ]
        acc_item, m_item, l_item = attend(at, columns)
        # Several items of one tile may meet here: the maximum first, then each item scaled to it. Items that stand
        # for the same tile write the same rescaled sums, so that the set is well defined, and then add to them.
        m_old = m[at]
        m = m.at[tile].max(m_item, mode="drop")
        rescale, weight = jnp.exp(m_old - m[at]), jnp.exp(m_item - m[at])
        l = l.at[tile].set(l[at] * rescale, mode="drop").at[tile].add(l_item * weight, mode="drop")
        acc = acc.at[tile].set(acc[at] * rescale[..., None], mode="drop")
        acc = acc.at[tile].add(acc_item * weight[..., None], mode="drop")
        return acc, m, l

    if num_tiles * max_pages * S * max(K * D, Q * H) <= WHOLE_ELEMENTS:
        # So small a step is one item a tile, and nothing is left to join.
        columns = jnp.broadcast_to(jnp.arange(max_pages, dtype=jnp.int32), (num_tiles, max_pages))
        acc, m, l = attend(jnp.arange(num_tiles, dtype=jnp.int32), columns)
    else:
        num_items = max(1, min(KEY_ELEMENTS // (C * S * K * D), num_tiles * -(-max_pages // C)))
        num_steps = (plan.item_ends[-1] + num_items - 1) // num_items
        shape = (num_tiles, K, Q, G)
        init = jnp.zeros((*shape, Dv), f32), jnp.full(shape, NEG, f32), jnp.zeros(shape, f32)
        acc, m, l = lax.fori_loop(0, num_steps, step, init)

    if sinks is not None:
        sink = sinks.astype(f32).reshape(K, 1, G)
        m_all = jnp.maximum(m, sink)
        scale = jnp.exp(m - m_all)
        acc, l, m = acc * scale[..., None], l * scale + jnp.exp(sink - m_all), m_all
    out = acc / jnp.where(l > 0, l, 1)[..., None]

    # Back to the packed order. Padding writes nothing, so tokens that belong to no row stay zero.
    to = jnp.where(in_tile[None] < plan.tile_lens[:, None], tokens, T)
    out = jnp.moveaxis(out, 1, 2).reshape(num_tiles, Q, H, Dv)
    out = jnp.zeros((T, H, Dv), q.dtype).at[to].set(out.astype(q.dtype), mode="drop")
    if not return_lse:
        return out, None
    lse = jnp.where(l > 0, m + jnp.log(jnp.where(l > 0, l, 1)), -jnp.inf)
    lse = jnp.moveaxis(lse, 1, 2).reshape(num_tiles, Q, H)
    lse = jnp.full((T, H), -jnp.inf, f32).at[to].set(lse, mode="drop")
    return out, lse


@jax.jit  # eager calls too: on a mesh with explicit axes the tokens go where the pages are
def write_pages(
    pools: Pools,
    k: Float[Array, "T K D"],
    v: Float[Array, "T K Dv"] | None,
    slot_mapping: Int[Array, "T"],
) -> tuple[Array | QuantizedPages, Array | QuantizedPages | None]:
    """Writes each token's key and value to its slot; slots outside the pool are dropped. One scatter a pool."""
    k_pages, v_pages, layer = pools
    num_pages, page_size = k_pages.shape[1], k_pages.shape[3]
    # A negative index wraps even with mode="drop", so that it is moved past the end first.
    there = (slot_mapping >= 0) & (layer >= 0) & (layer < k_pages.shape[0])
    page = jnp.where(there, slot_mapping // page_size, num_pages)
    offset = slot_mapping % page_size

    def write(pool, new):
        if not isinstance(pool, QuantizedPages):
            return pool.at[layer, page, :, offset].set(new.astype(pool.dtype), mode="drop")
        form, stored = pool.form, pool.scales
        if stored.shape[2:] == pool.shape[2:4]:
            scales = scales_of(new, form)
            stored = stored.at[layer, page, :, offset].set(scales, mode="drop")
        else:  # the pages have theirs
            scales = stored[layer, jnp.minimum(page, num_pages - 1), 0]
        values = pool.values.at[layer, page, :, offset].set(encode(new, scales, form), mode="drop")
        return QuantizedPages(values, stored)

    return write(k_pages, k), None if v_pages is None else write(v_pages, v)


@custom_vmap
def _largest(x):
    """The identity, but under vmap the largest of the batch, unbatched: a loop bound that every member shares.

    A loop whose bound is batched would select the whole carry, a pool here, in every iteration.
    """
    return x


@_largest.def_vmap
def _(axis_size, in_batched, x):
    del axis_size
    return (_largest(x.max(axis=0)) if in_batched[0] else x), False


def copy_pages(
    pages: PyTree[Shaped[Array, "L P ..."]], src: Int32[Array, "N"], dst: Int32[Array, "N"]
) -> PyTree[Shaped[Array, "L P ..."]]:
    """Copies pages in all layers; the loop runs once a real copy, so that a call without any costs nothing."""
    num_pages = jax.tree.leaves(pages)[0].shape[1]
    real = (src >= 0) & (src < num_pages) & (dst >= 0) & (dst < num_pages)
    order = jnp.where(real, running_sum(real) - 1, src.shape[0])
    pairs = jnp.stack([jnp.zeros_like(src), jnp.full_like(dst, -1)])
    pairs = pairs.at[:, order].set(jnp.stack([src, dst]), mode="drop")

    def copy(i, pools):
        source, target = pairs[:, i]
        to = jnp.maximum(target, 0)

        def one(pool):
            page = lax.dynamic_slice_in_dim(pool, source, 1, axis=1)
            old = lax.dynamic_slice_in_dim(pool, to, 1, axis=1)  # kept by a vmapped cache with fewer copies
            return lax.dynamic_update_slice_in_dim(pool, jnp.where(target >= 0, page, old), to, axis=1)

        return jax.tree.map(one, pools)

    return lax.fori_loop(0, _largest(real.sum(dtype=jnp.int32)), copy, pages)


def gather_pages(
    pages: PyTree[Shaped[Array, "L P ..."]], page_ids: Int32[Array, "N"]
) -> PyTree[Shaped[Array, "N L ..."]]:
    """Pages with all their layers, page-major; zeros for ids outside the pool."""

    def gather(pool):
        num_pages = pool.shape[1]
        ids = jnp.where((page_ids >= 0) & (page_ids < num_pages), page_ids, num_pages)
        return jnp.moveaxis(pool.at[:, ids].get(mode="fill", fill_value=0), 1, 0)

    return jax.tree.map(gather, pages)


@jax.jit  # as above
def scatter_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    page_ids: Int32[Array, "N"],
    blocks: PyTree[Shaped[Array, "N L ..."]],
) -> PyTree[Shaped[Array, "L P ..."]]:
    """Puts page-major blocks back; ids outside the pool are dropped."""

    def scatter(pool, new):
        ids = jnp.where(page_ids >= 0, page_ids, pool.shape[1])
        return pool.at[:, ids].set(jnp.moveaxis(new, 0, 1).astype(pool.dtype), mode="drop")

    return jax.tree.map(scatter, pages, blocks)
