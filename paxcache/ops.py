"""Array-level ops for those who keep their own tables: checks, choice of a backend, plans.

Knows arrays, never caches. Every op takes ``implementation``: None takes the best backend that supports the case,
``"mosaic_gpu"``, ``"triton"`` or ``"xla"`` names one, and a named one that cannot do it raises NotImplementedError with
the reason. `explain` tells which backend None takes, and why not the others.

Pools are ``[P, K, S, D]``, or ``[L, P, K, S, D]`` together with ``layer``; each is an array or a `QuantizedPages`.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _checks, _quantize, kernels
from paxcache._allocator import running_sum
from paxcache._quantize import QuantizedPages
from paxcache._state import state
from paxcache._types import CacheConfig, LayerGroup
from paxcache.kernels import Backend
from paxcache.kernels._request import Pools, Rows, Scores, Shapes

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Int32, PyTree, Shaped

__all__ = [
    "FORMATS",
    "Choice",
    "Implementation",
    "Plan",
    "QuantizedPages",
    "copy_pages",
    "explain",
    "gather_pages",
    "merge_attention",
    "paged_attention",
    "plan",
    "scatter_pages",
    "write_pages",
]

Implementation = Literal["mosaic_gpu", "triton", "xla"] | None

FORMATS = _quantize.FORMATS
"""The forms of quantised pages by name: dtype of the stored values, and the largest of them."""


def _run[T](op: str, implementation: Implementation, call: Callable[[Backend], T]) -> T:
    """The op of the named backend, or of the first in order of preference that does not decline."""
    name, refused, result = _first(op, implementation, call)
    if name == "xla" and refused and op != "plan" and _checks.default_device().platform == "gpu":
        _warn_of_xla(op, "; ".join(refused.values()))
    return result


def _first[T](
    op: str, implementation: Implementation, call: Callable[[Backend], T]
) -> tuple[str, dict[str, str], T]:
    """The name of the backend that does an op, the reasons of those that come before and decline, and the result."""
    if implementation is not None and implementation not in kernels.BACKENDS:
        known = tuple(kernels.BACKENDS)
        raise ValueError(f"implementation: expected None or one of {known}, got {implementation!r}")
    refused: dict[str, str] = {}
    for name, backend in kernels.BACKENDS.items():
        if implementation not in (None, name):
            continue
        try:
            return name, refused, call(backend())
        except NotImplementedError as reason:
            refused[name] = str(reason)
            if implementation is not None:
                raise NotImplementedError(f"{op}: {reason}") from reason
    raise NotImplementedError(f"{op}: no backend can do this: " + "; ".join(refused.values()))


@functools.cache  # once for each reason
def _warn_of_xla(op: str, reasons: str) -> None:
    warnings.warn(
        f"paxcache.ops.{op} takes the plain JAX form, which is much slower than a kernel on a GPU: {reasons}",
        stacklevel=2,
    )


def _no_derivative(op: str, tree: Any) -> Any:
    """The identity; differentiating through it says that the op has no derivative."""

    @jax.custom_jvp
    def identity(x):
        return x

    @identity.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            f"paxcache.ops.{op} has no derivative: a cache serves inference. Train with dense attention, "
            "or wrap the inputs in jax.lax.stop_gradient."
        )

    return jax.tree.map(lambda x: x if isinstance(x, (int, float)) else identity(x), tree)


def _as_stacked(op: str, layer: Any, *pools: Any) -> tuple[jax.Array, list[Any]]:
    """The layer as an int32 scalar and the pools as [L, P, ...]."""
    ndim = pools[0].ndim if isinstance(pools[0], QuantizedPages) else jnp.ndim(pools[0])
    if layer is None:
        if ndim != 4:
            raise ValueError(
                f"{op}: k_pages must be [P, K, S, D] without layer, got {_checks.describe(pools[0])}"
            )
        return jnp.int32(0), [jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], p) for p in pools]
    if ndim != 5:
        raise ValueError(
            f"{op}: k_pages must be [L, P, K, S, D] with layer, got {_checks.describe(pools[0])}"
        )
    num_layers = pools[0].shape[0]
    if isinstance(layer, (int, np.integer)) and not 0 <= layer < num_layers:
        raise ValueError(f"{op}: layer must be in [0, {num_layers}), got {layer}")
    return _checks.int_array("layer", layer, ""), [jax.tree.map(jnp.asarray, p) for p in pools]


def _check_pools(k_pages: Any, v_pages: Any) -> None:
    """Pools of one key and value width each, alike in all else."""
    _check_pool("k_pages", k_pages, "L P K S D")
    if v_pages is None:
        return
    L, P, K, S, _ = k_pages.shape
    if isinstance(v_pages, QuantizedPages) != isinstance(k_pages, QuantizedPages):
        raise TypeError(
            f"v_pages: expected {type(k_pages).__name__} like k_pages, got {type(v_pages).__name__}"
        )
    _check_pool("v_pages", v_pages, "L P K S Dv", L=L, P=P, K=K, S=S)
    if v_pages.dtype != k_pages.dtype:
        raise TypeError(f"v_pages: expected the dtype of k_pages, {k_pages.dtype}, got {v_pages.dtype}")


def _check_pool(name: str, pool: Any, dims: str, **sizes: int) -> None:
    """A pool of plain numbers, or of quantised ones with scales that fit them."""
    if not isinstance(pool, QuantizedPages):
        _checks.array(name, pool, dims, dtype=jnp.floating, **sizes)
        return
    _checks.array(name, pool.values, dims, **sizes)
    if jnp.dtype(pool.dtype) not in _quantize.BY_DTYPE:
        known = ", ".join(map(str, _quantize.BY_DTYPE))
        raise TypeError(f"{name}: expected quantised values of {known}, got {_checks.describe(pool.values)}")
    L, P, K, S, _ = pool.values.shape
    if pool.scales.shape not in ((L, P, K, S), (L, P, 1, 1)) or pool.scales.dtype != jnp.float32:
        raise ValueError(
            f"{name}: expected scales float32[{L},{P},{K},{S}] or float32[{L},{P},1,1] (L=1 without layer), "
            f"got {_checks.describe(pool.scales)}"
        )


@state
class Plan:
    """How the attention kernels of a step divide their work. Opaque: made by `plan`, read by `paged_attention`."""

    work: Any
    """What the backend that made it knows; another one makes its own. None: attention plans for itself."""


def plan(
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, "B"],
    *,
    num_heads: int | None = None,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: Any,
    query_starts: Int32[Array, "B"] | None = None,
    query_lens: Int32[Array, "B"] | None = None,
    num_tokens: int | None = None,
    max_query_len: int | None = None,
    sliding_window: Int32[Array, ""] | int | None = None,
    causal: bool = True,
    implementation: Implementation = None,
) -> Plan:
    """Divides the attention of one step, on the device and without a host read.

    A plan is good for every layer with the same lengths, window, shapes and dtype, until the lengths change. Attention
    that gets a plan for other shapes makes its own: the result is the same, and the time is lost.

    Args:
      block_tables: i32[B, M].
      seq_lens: i32[B], with the new tokens.
      num_heads: query heads, H; None: not known, and attention of the GPU's kernels plans for itself.
      num_kv_heads: KV heads, K (local ones under shard_map).
      head_dim: head dim, D.
      page_size: slots in a page, S.
      dtype: of the pages, or of the stored values of quantised ones.
      query_starts: i32[B] index of a row's first query; None: rows are packed.
      query_lens: i32[B] new tokens of each row; None: one a row.
      num_tokens: query tokens of the step, T; needed with query_lens.
      max_query_len: most new tokens that a row can have; None: num_tokens.
      sliding_window: tokens a query sees, itself included.
      causal: whether a query does not see later tokens of its own row.
      implementation: see the module's text.

    Returns:
      The plan.

    Raises:
      ValueError, TypeError: an argument's shape or dtype does not fit the others'.
      NotImplementedError: the named backend cannot do this.

    Reference: the split of work by tokens instead of sequences follows FlashInfer's scheduler (Ye et al., 2025).
    """
    tables = _checks.int_array("block_tables", block_tables, "B M")
    B, M = tables.shape
    page_size = _checks.static_int("page_size", page_size, minimum=1)
    _checks.row_room(M, page_size)
    seq_lens = _checks.int_array("seq_lens", seq_lens, "B", B=B)
    if query_lens is None:
        if query_starts is not None:
            raise ValueError("query_starts: give query_lens too")
        query_starts, query_lens = jnp.arange(B, dtype=jnp.int32), (seq_lens > 0).astype(jnp.int32)
        num_tokens, max_query_len = B, 1
    else:
        query_lens = _checks.int_array("query_lens", query_lens, "B", B=B)
        if query_starts is None:
            query_starts = running_sum(query_lens) - query_lens
        query_starts = _checks.int_array("query_starts", query_starts, "B", B=B)
        if num_tokens is None:
            raise ValueError("plan: num_tokens is needed with query_lens")
    num_tokens = _checks.static_int("num_tokens", num_tokens, minimum=1)
    if max_query_len is None:
        max_query_len = num_tokens
    if sliding_window is not None:
        sliding_window = _checks.window("sliding_window", sliding_window)
    if num_heads is not None:
        num_heads = _checks.static_int("num_heads", num_heads, minimum=1)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads: expected a multiple of the {num_kv_heads} KV heads, got {num_heads}"
            )
    shapes = Shapes(
        num_rows=B,
        num_tokens=num_tokens,
        max_query_len=_checks.static_int("max_query_len", max_query_len, minimum=1),
        num_heads=num_heads,
        num_kv_heads=_checks.static_int("num_kv_heads", num_kv_heads, minimum=1),
        head_dim=_checks.static_int("head_dim", head_dim, minimum=1),
        page_size=page_size,
        dtype=jnp.dtype(dtype),
        windowed=sliding_window is not None,
    )
    rows = Rows(tables, seq_lens, query_starts, query_lens)
    options: dict[str, Any] = {"sliding_window": sliding_window, "causal": causal}
    return Plan(_run("plan", implementation, lambda backend: backend.make_plan(rows, shapes, **options)))


def paged_attention(
    q: Float[Array, "T H D"],
    k_pages: Float[Array, "L P K S D"] | QuantizedPages,
    v_pages: Float[Array, "L P K S Dv"] | QuantizedPages | None,
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, "B"],
    *,
    cu_query_lens: Int32[Array, "B+1"] | None = None,
    query_starts: Int32[Array, "B"] | None = None,
    query_lens: Int32[Array, "B"] | None = None,
    max_query_len: int | None = None,
    layer: Int32[Array, ""] | int | None = None,
    sm_scale: Float[Array, ""] | float | None = None,
    soft_cap: float | None = None,
    sliding_window: Int32[Array, ""] | int | None = None,
    sinks: Float[Array, "H"] | None = None,
    causal: bool = True,
    return_lse: bool = False,
    plan: Plan | None = None,
    implementation: Implementation = None,
) -> Float[Array, "T H Dv"] | tuple[Float[Array, "T H Dv"], Float[Array, "T H"]]:
    """Attention of each row's queries over the row's own pages.

    Query i of a row stands at position ``seq_lens - query_lens + i``. It sees the keys at positions up to its own
    (``causal``) and greater than its own minus ``sliding_window``; keys in table entries that map no page are skipped.
    A query that sees nothing gives zeros. What stands in slots past a row's length never matters, NaN included.
    Products are accumulated in float32.

    Args:
      q: [T, H, D] packed queries; without query lengths one a row, [B, H, D]. H is a multiple of K.
      k_pages, v_pages: the pools, with ``layer`` if they hold several. v_pages None: keys serve as values. Quantised
        pools are read as they are stored.
      block_tables: i32[B, M] page ids; a negative entry maps nothing.
      seq_lens: i32[B] lengths with the new tokens.
      cu_query_lens: i32[B + 1] running sum of new tokens, or else both of
      query_starts, query_lens: i32[B] index of a row's first query, and its number of queries. Rows stand in order:
        a row's queries come before those of the next.
      max_query_len: most queries that a row can have (static); None: T.
      layer: index into the leading axis, may be traced.
      sm_scale: multiplies the scores; None: D ** -0.5.
      soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)`` (Gemma 2).
      sliding_window: tokens a query sees, itself included; may be traced. None: all.
      sinks: [H] logits that join each softmax without a value (StreamingLLM; gpt-oss).
      causal: False lets a query see later tokens of its row.
      return_lse: also return the log-sum-exp of each query's scores, for `merge_attention`. Natural logarithm;
        includes the sinks; -inf where a query has neither a key nor a sink, and for tokens of no row.
      plan: from `plan`, for the same lengths, window, causality and KV heads; None makes one.
      implementation: see the module's text.

    Returns:
      out [T, H, Dv] of q's dtype; with return_lse also lse f32[T, H].

    Raises:
      ValueError, TypeError: an argument's shape or dtype does not fit the others'.
      NotImplementedError: the named backend cannot do this; or the op is differentiated.

    Example:
      >>> import jax.numpy as jnp
      >>> from paxcache import ops
      >>> k_pages = v_pages = jnp.ones((4, 1, 2, 8))  # 4 pages of 2 slots
      >>> ops.paged_attention(jnp.ones((1, 2, 8)), k_pages, v_pages, jnp.array([[3, 1]]), jnp.array([3])).shape
      (1, 2, 8)

    Reference: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.
    """
    layer, (k_pages, v_pages) = _as_stacked("paged_attention", layer, k_pages, v_pages)
    _check_pools(k_pages, v_pages)
    _, _, K, _, D = k_pages.shape
    q = _checks.array("q", q, "T H D", dtype=jnp.floating, D=D)
    T, H, _ = q.shape
    if H % K:
        raise ValueError(f"q: query heads must be a multiple of the {K} KV heads, got {_checks.describe(q)}")
    tables = _checks.int_array("block_tables", block_tables, "B M")
    B, M = tables.shape
    _checks.row_room(M, k_pages.shape[3])
    seq_lens = _checks.int_array("seq_lens", seq_lens, "B", B=B)
    if cu_query_lens is not None:
        if query_starts is not None or query_lens is not None:
            raise ValueError("cu_query_lens: give it, or query_starts and query_lens, not both")
        ends = _checks.int_array("cu_query_lens", cu_query_lens, "B+1", **{"B+1": B + 1})
        query_starts, query_lens = ends[:-1], ends[1:] - ends[:-1]
    elif (query_starts is None) != (query_lens is None):
        raise ValueError("query_starts and query_lens: give both or neither")
    if query_lens is None:
        if T != B:
            raise ValueError(
                f"q: expected one query a row, [B={B}, H, D], without query lengths, got {_checks.describe(q)}"
            )
        starts, lens, max_query_len = jnp.arange(B, dtype=jnp.int32), (seq_lens > 0).astype(jnp.int32), 1
    else:
        starts = _checks.int_array("query_starts", query_starts, "B", B=B)
        lens = _checks.int_array("query_lens", query_lens, "B", B=B)
        max_query_len = (
            T if max_query_len is None else _checks.static_int("max_query_len", max_query_len, minimum=1)
        )
    if sinks is not None:
        sinks = _checks.array("sinks", sinks, "H", H=H)
    if sliding_window is not None:
        sliding_window = _checks.window("sliding_window", sliding_window)
    if isinstance(soft_cap, (int, float)) and not soft_cap > 0:
        raise ValueError(f"soft_cap must be above 0, got {soft_cap}")
    scale: Any = 1 / math.sqrt(D) if sm_scale is None else sm_scale
    q, k_pages, v_pages, sinks, scale, soft_cap = _no_derivative(
        "paged_attention", (q, k_pages, v_pages, sinks, scale, soft_cap)
    )

    pools, rows = Pools(k_pages, v_pages, layer), Rows(tables, seq_lens, starts, lens)
    scores = Scores(scale, soft_cap, sliding_window, sinks, causal, return_lse)
    options: dict[str, Any] = {"max_query_len": max_query_len, "plan": None if plan is None else plan.work}
    out, lse = _run(
        "paged_attention",
        implementation,
        lambda backend: backend.paged_attention(q, pools, rows, scores, **options),
    )
    if not return_lse:
        return out
    assert lse is not None  # it was asked for
    return out, lse


def write_pages(
    k_pages: Float[Array, "L P K S D"] | QuantizedPages,
    v_pages: Float[Array, "L P K S Dv"] | QuantizedPages | None,
    k: Float[Array, "T K D"],
    v: Float[Array, "T K Dv"] | None,
    slot_mapping: Int[Array, "T"],
    *,
    layer: Int32[Array, ""] | int | None = None,
    implementation: Implementation = None,
) -> tuple[Any, Any]:
    """Writes each token's key and value to its slot, in place where the pools are donated.

    Args:
      k_pages, v_pages: the pools; v_pages None where keys serve as values.
      k, v: [T, K, D] and [T, K, Dv], cast to the pools' dtype, or quantised: with a scale for each token and head, or
        with the scale that their page has. v is None exactly where v_pages is.
      slot_mapping: integer[T], ``page * S + offset``; slots outside [0, P * S) are dropped. No slot may stand twice.
      layer: index into the leading axis of the pools, may be traced.
      implementation: see the module's text.

    Returns:
      The pools with the tokens written.

    Raises:
      ValueError, TypeError: an argument's shape or dtype does not fit the others'.
      NotImplementedError: the named backend cannot do this; or the op is differentiated.

    Example:
      >>> import jax.numpy as jnp
      >>> from paxcache import ops
      >>> pool = jnp.zeros((4, 1, 2, 8))
      >>> pool, _ = ops.write_pages(pool, None, jnp.ones((2, 1, 8)), None, jnp.array([5, -1]))
      >>> pool[:, 0, :, 0].tolist()
      [[0.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]

    Reference: the slot mapping of vLLM's reshape_and_cache.
    """
    stacked = layer is not None
    layer, (k_pages, v_pages) = _as_stacked("write_pages", layer, k_pages, v_pages)
    _check_pools(k_pages, v_pages)
    _, _, K, _, D = k_pages.shape
    k = _checks.array("k", k, "T K D", dtype=jnp.floating, K=K, D=D)
    if (v is None) != (v_pages is None):
        raise ValueError("v: expected None exactly where v_pages is None (keys serve as values)")
    if v_pages is not None:
        v = _checks.array("v", v, "T K Dv", dtype=jnp.floating, T=k.shape[0], K=K, Dv=v_pages.shape[-1])
    slots = _checks.slots("slot_mapping", slot_mapping, "T", T=k.shape[0])
    k_pages, v_pages, k, v = _no_derivative("write_pages", (k_pages, v_pages, k, v))
    pools = Pools(k_pages, v_pages, layer)
    k_pages, v_pages = _run(
        "write_pages", implementation, lambda backend: backend.write_pages(pools, k, v, slots)
    )
    if not stacked:
        k_pages, v_pages = jax.tree.map(lambda leaf: leaf[0], (k_pages, v_pages))
    return k_pages, v_pages


def _check_pages(pages: Any) -> int:
    """The number of pages of a pytree whose leaves lead with [L, P]."""
    leaves = jax.tree.leaves(pages)
    if not leaves:
        raise ValueError("pages: expected at least one array")
    for leaf in leaves:
        if jnp.ndim(leaf) < 2 or leaf.shape[:2] != leaves[0].shape[:2]:
            found = ", ".join(map(_checks.describe, leaves))
            raise ValueError(f"pages: every leaf must lead with the same [L, P], got {found}")
    return leaves[0].shape[1]


def copy_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    src: Int32[Array, "N"],
    dst: Int32[Array, "N"],
    *,
    implementation: Implementation = None,
) -> PyTree[Shaped[Array, "L P ..."]]:
    """Copies pages onto others, in all layers: copy-on-write and compaction. Costs nothing where nothing is copied.

    Args:
      pages: a pytree whose leaves lead with [L, P].
      src, dst: i32[N] page ids; an entry with either outside [0, P) is skipped. No page may be a destination twice,
        nor both a destination and a source.
      implementation: see the module's text.

    Returns:
      The pages, in place where they were donated.

    Raises:
      ValueError, TypeError: a leaf or an argument has another shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from paxcache import ops
      >>> ops.copy_pages(jnp.arange(4.0).reshape(1, 4), jnp.array([0, -1]), jnp.array([2, 3])).tolist()
      [[0.0, 1.0, 0.0, 3.0]]
    """
    _check_pages(pages)
    src = _checks.int_array("src", src, "N")
    dst = _checks.int_array("dst", dst, "N", N=src.shape[0])
    pages = _no_derivative("copy_pages", pages)
    if not src.shape[0]:
        return pages
    return _run("copy_pages", implementation, lambda backend: backend.copy_pages(pages, src, dst))


def gather_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    page_ids: Int32[Array, "N"],
    *,
    implementation: Implementation = None,
) -> PyTree[Shaped[Array, "N L ..."]]:
    """Pages with all their layers, page-major, so that a page is one contiguous block.

    Args:
      pages: a pytree whose leaves lead with [L, P].
      page_ids: i32[N]; ids outside [0, P) give zeros.
      implementation: see the module's text.

    Returns:
      A pytree of blocks [N, L, ...].

    Raises:
      ValueError, TypeError: a leaf or an argument has another shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from paxcache import ops
      >>> ops.gather_pages(jnp.arange(8.0).reshape(2, 4), jnp.array([3, -1])).tolist()
      [[3.0, 7.0], [0.0, 0.0]]
    """
    _check_pages(pages)
    ids = _checks.int_array("page_ids", page_ids, "N")
    pages = _no_derivative("gather_pages", pages)
    return _run("gather_pages", implementation, lambda backend: backend.gather_pages(pages, ids))


def scatter_pages(
    pages: PyTree[Shaped[Array, "L P ..."]],
    page_ids: Int32[Array, "N"],
    blocks: PyTree[Shaped[Array, "N L ..."]],
    *,
    implementation: Implementation = None,
) -> PyTree[Shaped[Array, "L P ..."]]:
    """Puts blocks from `gather_pages` into pages, in place where the pages are donated.

    Args:
      pages: a pytree whose leaves lead with [L, P].
      page_ids: i32[N]; ids outside [0, P) are dropped. No id may stand twice.
      blocks: a pytree like pages with leaves [N, L, ...].
      implementation: see the module's text.

    Returns:
      The pages with the blocks in place.

    Raises:
      ValueError, TypeError: a leaf or an argument has another shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from paxcache import ops
      >>> ops.scatter_pages(jnp.zeros((2, 4)), jnp.array([3]), jnp.array([[3.0, 7.0]])).tolist()
      [[0.0, 0.0, 0.0, 3.0], [0.0, 0.0, 0.0, 7.0]]
    """
    _check_pages(pages)
    ids = _checks.int_array("page_ids", page_ids, "N")
    if jax.tree.structure(pages) != jax.tree.structure(blocks):
        raise ValueError(
            f"blocks: expected the structure of pages, {jax.tree.structure(pages)}, got {jax.tree.structure(blocks)}"
        )
    for page, block in zip(jax.tree.leaves(pages), jax.tree.leaves(blocks), strict=True):
        expected = (ids.shape[0], page.shape[0], *page.shape[2:])
        if jnp.shape(block) != expected or block.dtype != page.dtype:
            raise ValueError(f"blocks: expected {page.dtype}{list(expected)}, got {_checks.describe(block)}")
    pages, blocks = _no_derivative("scatter_pages", (pages, blocks))
    return _run("scatter_pages", implementation, lambda backend: backend.scatter_pages(pages, ids, blocks))


class Choice(NamedTuple):
    """What `explain` tells of an op."""

    backend: str
    """The one that does it."""
    reasons: dict[str, str]
    """Why those that would be preferred do not, by their names."""


def explain(
    config: CacheConfig,
    *,
    num_heads: int | None = None,
    num_tokens: int | None = None,
    max_query_len: int | None = None,
) -> tuple[dict[str, Choice], ...]:
    """Which backend does each op of a cache on the default device, and why not the others. Nothing is computed.

    Args:
      config: the cache's.
      num_heads: query heads; None takes each group's, or else one for each KV head.
      num_tokens: query tokens of a step; None: one a row.
      max_query_len: most query tokens of a row; None: 1 in a step of one a row, or else num_tokens.

    Returns:
      For each layer group, a `Choice` by the name of the op. Queries and new tokens have the group's dtype.

    Raises:
      ValueError, TypeError: an argument is out of its range or of another type.

    Example:
      >>> import paxcache
      >>> from paxcache import ops
      >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=80, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8)
      >>> (choices,) = ops.explain(config)
      >>> sorted(choices)
      ['copy_pages', 'gather_pages', 'paged_attention', 'scatter_pages', 'write_pages']
      >>> choices["paged_attention"].backend in ("mosaic_gpu", "triton", "xla")
      True
    """
    _checks.instance("config", config, CacheConfig)
    if max_query_len is None:
        max_query_len = 1 if num_tokens is None else num_tokens
    num_tokens = config.max_seqs if num_tokens is None else num_tokens
    sizes = {
        "num_tokens": _checks.static_int("num_tokens", num_tokens, minimum=1),
        "max_query_len": _checks.static_int("max_query_len", max_query_len, minimum=1),
    }
    heads = None if num_heads is None else _checks.static_int("num_heads", num_heads, minimum=1)
    return tuple(
        _explain_group(config, group, heads or group.num_heads or group.num_kv_heads, **sizes)
        for group in config.layer_groups
    )


def _explain_group(
    config: CacheConfig, group: LayerGroup, num_heads: int, *, num_tokens: int, max_query_len: int
) -> dict[str, Choice]:
    """The choices for a layer group: each op is traced with shapes, by one backend after the other."""

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def pool(width: int) -> Any:
        num_pages = config.group_num_pages(group)
        shape = group.num_layers, num_pages, group.num_kv_heads, config.page_size, width
        if group.quantization is None:
            return array(*shape, dtype=group.dtype)
        given = array(group.num_layers, dtype=jnp.float32) if group.scales == "per_tensor" else None
        name = group.quantization
        return jax.eval_shape(lambda scales: _quantize.empty(name, shape, scales), given)

    pools = Pools(pool(group.head_dim), pool(group.value_dim) if group.value_dim else None, array())
    ids = row = array(config.max_seqs)
    rows = Rows(array(config.max_seqs, config.max_pages_per_seq), row, row, row)
    scores = Scores(1.0, sliding_window=group.sliding_window)
    q = array(num_tokens, num_heads, group.head_dim, dtype=group.dtype)
    k = array(num_tokens, group.num_kv_heads, group.head_dim, dtype=group.dtype)
    v = array(num_tokens, group.num_kv_heads, group.value_dim, dtype=group.dtype)
    pages = tuple(pools.arrays)
    blocks = jax.tree.map(lambda x: array(ids.shape[0], x.shape[0], *x.shape[2:], dtype=x.dtype), pages)

    def choice(op: str, function: Callable[..., Any], *arguments: Any) -> Choice:
        def trace(backend: Backend) -> Any:
            return jax.eval_shape(functools.partial(function, backend), *arguments)

        name, refused, _ = _first(op, None, trace)
        return Choice(name, refused)

    def attend(backend: Backend, q: Any, pools: Pools, rows: Rows) -> Any:
        return backend.paged_attention(q, pools, rows, scores, max_query_len=max_query_len)

    def write(backend: Backend, pools: Pools, k: Any, v: Any, slots: Any) -> Any:
        return backend.write_pages(pools, k, None if pools.v is None else v, slots)

    return {
        "paged_attention": choice("paged_attention", attend, q, pools, rows),
        "write_pages": choice("write_pages", write, pools, k, v, array(num_tokens)),
        "copy_pages": choice("copy_pages", lambda b, *x: b.copy_pages(*x), pages, ids, ids),
        "gather_pages": choice("gather_pages", lambda b, *x: b.gather_pages(*x), pages, ids),
        "scatter_pages": choice("scatter_pages", lambda b, *x: b.scatter_pages(*x), pages, ids, blocks),
    }


def merge_attention(
    outs: Float[Array, "N T H D"], lses: Float[Array, "N T H"]
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"]]:
    """Joins attention over disjoint sets of keys into attention over their union.

    Args:
      outs: [N, T, H, D], one of each set.
      lses: f32[N, T, H] from ``paged_attention(..., return_lse=True)``, or from another attention: either infinity says
        that there was no key (FlashAttention gives +inf), and whatever stands in outs there is ignored. Sinks belong to
        one set only.

    Returns:
      out [T, H, D] and lse f32[T, H]; zeros and -inf where no set had a key.

    Raises:
      ValueError, TypeError: an argument has another shape or dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from paxcache import ops
      >>> out, lse = ops.merge_attention(jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1), jnp.zeros((2, 1, 1)))
      >>> out.item(), round(lse.item(), 4)
      (2.0, 0.6931)

    Reference: the merge operator of cascade inference (FlashInfer); Milakov & Gimelshein, "Online normalizer", 2018.
    """
    outs = _checks.array("outs", outs, "N T H D", dtype=jnp.floating)
    N, T, H, _ = outs.shape
    lses = _checks.array("lses", lses, "N T H", dtype=jnp.floating, N=N, T=T, H=H).astype(jnp.float32)
    if not N:
        raise ValueError(f"outs: expected at least one set of keys, got {_checks.describe(outs)}")
    no_key = jnp.isinf(lses)
    lses, outs = jnp.where(no_key, -jnp.inf, lses), jnp.where(no_key[..., None], 0, outs)
    m = lses.max(axis=0)
    m = jnp.where(jnp.isneginf(m), 0, m)
    weights = jnp.exp(lses - m[None])
    total = weights.sum(axis=0)
    some = jnp.where(total > 0, total, 1)
    out = jnp.sum(outs.astype(jnp.float32) * weights[..., None], axis=0) / some[..., None]
    return out.astype(outs.dtype), jnp.where(total > 0, m + jnp.log(some), -jnp.inf)
