"""Array-level ops for those who keep their own tables: checks, choice of a backend, plans.

Knows arrays, never caches. Every op takes
``implementation``: None takes the best backend that supports the case, ``"mosaic_gpu"``, ``"triton"`` or ``"xla"``
names one, and a named one that cannot do it raises NotImplementedError with the reason.

Pools are ``[P, K, S, D]``, or ``[L, P, K, S, D]`` together with ``layer``; each is an array or a `QuantizedPages`.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _checks, _quantize
from paxcache._allocator import running_sum
from paxcache._quantize import QuantizedPages
from paxcache._state import state
from paxcache.kernels import xla

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Int32, PyTree, Shaped

Implementation = Literal["mosaic_gpu", "triton", "xla"] | None
_BACKENDS = ("mosaic_gpu", "triton", "xla")

FORMATS = _quantize.FORMATS
"""The forms of quantised pages by name: dtype of the stored values, and the largest of them."""


def _require_hopper() -> None:
    """Declines where the default device is no Hopper GPU."""
    device = _checks.default_device()
    if device.platform != "gpu":
        raise NotImplementedError(
            f"mosaic_gpu needs a Hopper GPU, the default device is {device.device_kind!r}"
        )
    if str(getattr(device, "compute_capability", "")) != "9.0":
        raise NotImplementedError(
            f"mosaic_gpu needs a Hopper GPU (compute capability 9.0), {device.device_kind!r} has "
            f"{getattr(device, 'compute_capability', 'none')}"
        )


def _require_gpu() -> None:
    """Declines where the default device is no GPU. The kernels look for themselves whether it and the packages fit."""
    device = _checks.default_device()
    if device.platform != "gpu":
        raise NotImplementedError(f"triton needs an NVIDIA GPU, the default device is {device.device_kind!r}")


def _kernel(
    require: Callable[[], None], module: str, function: str, *args: Any, **options: Any
) -> Callable[[], Any]:
    """A call of a kernel, whose module is imported only where `require` does not decline."""

    def run():
        require()
        return getattr(importlib.import_module(f"paxcache.kernels.{module}"), function)(*args, **options)

    return run


_mosaic = functools.partial(_kernel, _require_hopper)
_triton = functools.partial(_kernel, _require_gpu)  # without a GPU Triton is not even imported


def _dispatch(op: str, implementation: Implementation, **backends: Callable[[], Any]) -> Any:
    """Runs the named backend, or the first in order of preference that does not decline."""
    if implementation is not None:
        if implementation not in _BACKENDS:
            raise ValueError(f"implementation: expected None or one of {_BACKENDS}, got {implementation!r}")
        if implementation not in backends:
            raise NotImplementedError(f"{op}: there is no {implementation!r} implementation")
        try:
            return backends[implementation]()
        except NotImplementedError as reason:
            raise NotImplementedError(f"{op}: {reason}") from reason
    for name in _BACKENDS[:-1]:
        if name in backends:
            try:
                return backends[name]()
            except NotImplementedError:
                continue
    return backends["xla"]()


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
    """How the attention kernels of a step divide their work. Opaque: made by `plan`, read by `paged_attention`.

    Holds what one backend needs; another one makes its own.
    """

    xla: xla.Plan | None = None
    mosaic_gpu: Any = None
    triton: Any = None


def plan(
    block_tables: Int32[Array, "B M"],
    seq_lens: Int32[Array, "B"],
    *,
    num_heads: int | None = None,
    num_kv_heads: int,
    head_dim: int = 128,
    page_size: int,
    dtype: Any = jnp.bfloat16,
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
      num_heads: query heads, H; None: not known.
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
    num_kv_heads = _checks.static_int("num_kv_heads", num_kv_heads, minimum=1)
    head_dim = _checks.static_int("head_dim", head_dim, minimum=1)
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
    rows = seq_lens, query_starts, query_lens
    shapes = {
        "num_tokens": num_tokens,
        "max_query_len": _checks.static_int("max_query_len", max_query_len, minimum=1),
        "page_size": page_size,
        "sliding_window": sliding_window,
        "causal": causal,
    }
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "dtype": dtype}
    return _dispatch(
        "plan",
        implementation,
        mosaic_gpu=lambda: Plan(
            mosaic_gpu=_mosaic("attention_sm90", "make_plan", tables, *rows, **shapes, **heads)()
        ),
        triton=lambda: Plan(
            triton=_triton("attention_triton", "make_plan", tables, *rows, **shapes, **heads)()
        ),
        xla=lambda: Plan(xla=xla.make_plan(seq_lens, query_lens, max_pages=M, **shapes)),
    )


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
    _, _, K, S, D = k_pages.shape
    q = _checks.array("q", q, "T H D", dtype=jnp.floating, D=D)
    T, H, _ = q.shape
    if H % K:
        raise ValueError(f"q: query heads must be a multiple of the {K} KV heads, got {_checks.describe(q)}")
    tables = _checks.int_array("block_tables", block_tables, "B M")
    B, M = tables.shape
    _checks.row_room(M, S)
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
    sm_scale = 1 / math.sqrt(D) if sm_scale is None else sm_scale
    q, k_pages, v_pages, sinks, sm_scale, soft_cap = _no_derivative(
        "paged_attention", (q, k_pages, v_pages, sinks, sm_scale, soft_cap)
    )

    arrays = q, k_pages, v_pages, tables, seq_lens, starts, lens, layer
    options = {
        "sm_scale": sm_scale,
        "soft_cap": soft_cap,
        "sliding_window": sliding_window,
        "sinks": sinks,
        "causal": causal,
    }

    def run_xla():
        made = None if plan is None else plan.xla
        if made is None:
            made = xla.make_plan(
                seq_lens,
                lens,
                num_tokens=T,
                max_query_len=max_query_len,
                page_size=S,
                max_pages=M,
                sliding_window=sliding_window,
                causal=causal,
            )
        return xla.paged_attention(*arrays, plan=made, **options)

    more = {"max_query_len": max_query_len, "return_lse": return_lse} | options
    work = Plan() if plan is None else plan
    out, lse = _dispatch(
        "paged_attention",
        implementation,
        mosaic_gpu=_mosaic("attention_sm90", "paged_attention", *arrays, **more, plan=work.mosaic_gpu),
        triton=_triton("attention_triton", "paged_attention", *arrays, **more, plan=work.triton),
        xla=run_xla,
    )
    return (out, lse) if return_lse else out


def write_pages(
    k_pages: Float[Array, "L P K S D"] | QuantizedPages,
    v_pages: Float[Array, "L P K S Dv"] | QuantizedPages | None,
    k: Float[Array, "T K D"],
    v: Float[Array, "T K Dv"] | None,
    slot_mapping: Int[Array, "T"],
    *,
    k_head: int | None = None,
    v_head: int | None = None,
    layer: Int32[Array, ""] | int | None = None,
    implementation: Implementation = None,
) -> tuple[Any, Any]:
    """Writes each token's key and value to its slot, in place where the pools are donated.

    Args:
      k_pages, v_pages: the pools; v_pages None where keys serve as values.
      k, v: [T, K, D] and [T, K, Dv], cast to the pools' dtype, or quantised: with a scale for each token and head, or
        with the scale that their page has. v is None exactly where v_pages is.
      slot_mapping: integer[T], ``page * S + offset``; slots outside [0, P * S) are dropped. No slot may stand twice.
      k_head, v_head: first head of ``k`` and of ``v`` to write, where they have more than K. Both may be a fused
        projection of H + 2 K heads, with ``k_head=H, v_head=H + K``: kernels then read it where it lies, while a slice
        of it would be copied first.
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
    k = _checks.array("k", k, "T K D", dtype=jnp.floating, D=D)
    k_start, v_start = _first_head("k", k, k_head, K), 0
    if (v is None) != (v_pages is None):
        raise ValueError("v: expected None exactly where v_pages is None (keys serve as values)")
    if v_pages is not None:
        v = _checks.array("v", v, "T K Dv", dtype=jnp.floating, T=k.shape[0], Dv=v_pages.shape[-1])
        v_start = _first_head("v", v, v_head, K)
    slots = _checks.slots("slot_mapping", slot_mapping, "T", T=k.shape[0])
    k_pages, v_pages, k, v = _no_derivative("write_pages", (k_pages, v_pages, k, v))
    arrays, heads = (k_pages, v_pages, k, v, slots, layer), {"k_head": k_start, "v_head": v_start}
    hopper = "quantize_sm90" if isinstance(k_pages, QuantizedPages) else "write_sm90"
    k_pages, v_pages = _dispatch(
        "write_pages",
        implementation,
        mosaic_gpu=_mosaic(hopper, "write_pages", *arrays, **heads),
        triton=_triton("write_triton", "write_pages", *arrays, **heads),
        xla=lambda: xla.write_pages(
            k_pages,
            v_pages,
            k[:, k_start : k_start + K],
            None if v is None else v[:, v_start : v_start + K],
            slots,
            layer,
        ),
    )
    if not stacked:
        k_pages, v_pages = jax.tree.map(lambda leaf: leaf[0], (k_pages, v_pages))
    return k_pages, v_pages


def _first_head(name: str, x: jax.Array, first: int | None, num_heads: int) -> int:
    """The first head to write; there must be K from it on, and no others if it was not given."""
    start = 0 if first is None else _checks.static_int(f"{name}_head", first, minimum=0)
    if x.shape[1] < start + num_heads or (first is None and x.shape[1] != num_heads):
        here = "" if first is None else f" from {name}_head={first} on"
        raise ValueError(f"{name}: expected K={num_heads} heads{here}, got {_checks.describe(x)}")
    return start


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
    return _dispatch(
        "copy_pages",
        implementation,
        mosaic_gpu=_mosaic("copy_sm90", "copy_pages", pages, src, dst),
        triton=_triton("copy_triton", "copy_pages", pages, src, dst),
        xla=lambda: xla.copy_pages(pages, src, dst),
    )


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
    return _dispatch(
        "gather_pages",
        implementation,
        mosaic_gpu=_mosaic("copy_sm90", "gather_pages", pages, ids),
        triton=_triton("copy_triton", "gather_pages", pages, ids),
        xla=lambda: jax.tree.map(lambda p: xla.gather_pages(p, ids), pages),
    )


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
    return _dispatch(
        "scatter_pages",
        implementation,
        mosaic_gpu=_mosaic("copy_sm90", "scatter_pages", pages, ids, blocks),
        triton=_triton("copy_triton", "scatter_pages", pages, ids, blocks),
        xla=lambda: jax.tree.map(lambda p, b: xla.scatter_pages(p, ids, b), pages, blocks),
    )


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
