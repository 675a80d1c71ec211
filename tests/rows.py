"""Rows of a paged attention problem for the Hopper kernels, as data: inputs built from a case, and what to expect.

The catalogue's cases are of any shape; these have the shapes that the kernels take.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _quantize, ops
from paxcache.kernels._request import Pools, Rows, Scores, Shapes
from paxcache.ops import QuantizedPages

LAYERS, LAYER = 2, 1
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 3e-6}
"""By the dtype of queries and outputs: the largest norm of the error, of that of the result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Rows and a model shape. `holes` are (row, table column) pairs."""

    lens: tuple[int, ...]
    query_lens: tuple[int, ...] | None = None
    max_query_len: int = 1
    kv_heads: int = 2
    group: int = 4
    head_dim: int = 64
    page_size: int = 16
    dtype: Any = jnp.bfloat16
    quantization: str | None = None
    layer_scales: bool = False  # quantised pages: given for each layer, or else each token's own
    holes: tuple[tuple[int, int], ...] = ()
    gaps: bool = False  # tokens that no row owns
    tail: int = 0  # and so many more after the last row
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    causal: bool = True
    block_tokens: int | None = None
    piece_len: int | None = None
    lanes: int | None = None

    @property
    def kv_dtype(self) -> Any:
        """Of the values in pages."""
        return self.dtype if self.quantization is None else ops.FORMATS[self.quantization].dtype


def make_inputs(case: Case, seed: int) -> dict[str, Any]:
    """Shuffled pages; slots that no row owns, other layers and recycled pages hold NaN."""
    rng = np.random.default_rng(seed)
    query_lens = case.query_lens or tuple(int(n > 0) for n in case.lens)
    asked = np.array([n + case.gaps for n in query_lens])
    starts = np.cumsum(asked) - asked + case.gaps
    num_pages = [-(-n // case.page_size) for n in case.lens]
    shuffled = rng.permutation(sum(num_pages) + 3)
    tables = np.full((len(case.lens), max(num_pages) + 1), -1, np.int32)
    owned = np.zeros((len(shuffled), case.page_size), bool)
    for row, (length, count) in enumerate(zip(case.lens, num_pages, strict=True)):
        tables[row, :count], shuffled = shuffled[:count], shuffled[count:]
        slots = np.arange(length)
        owned[tables[row, slots // case.page_size], slots % case.page_size] = True
    for row, column in case.holes:
        owned[tables[row, column]] = False
        tables[row, column] = -1

    def pool():
        x = rng.standard_normal((LAYERS, owned.shape[0], case.kv_heads, case.page_size, case.head_dim))
        x[:, ~owned.any(axis=1)] = np.nan
        x = np.where(owned[None, :, None, :, None], x, np.nan)
        x[:LAYER] = np.nan
        return jnp.asarray(x).astype(case.dtype) if case.quantization is None else quantized(x, case)

    num_heads = case.kv_heads * case.group
    num_tokens = int(starts[-1] + asked[-1] + 2 * case.gaps) + case.tail
    return {
        "q": jnp.asarray(rng.standard_normal((num_tokens, num_heads, case.head_dim))).astype(case.dtype),
        "k_pages": pool(),
        "v_pages": pool(),
        "layer": jnp.int32(LAYER),
        "block_tables": jnp.asarray(tables),
        "seq_lens": jnp.asarray(case.lens, jnp.int32),
        "query_starts": jnp.asarray(starts, jnp.int32),
        "query_lens": jnp.asarray(query_lens, jnp.int32),
        "sinks": jnp.asarray(rng.standard_normal(num_heads), jnp.float32) if case.sinks else None,
    }


def rows_of(inputs: dict[str, Any]) -> Rows:
    return Rows(*(inputs[x] for x in ("block_tables", "seq_lens", "query_starts", "query_lens")))


def request(
    case: Case, inputs: dict[str, Any], *, return_lse: bool = True, **changes: Any
) -> tuple[jax.Array, Pools, Rows, Scores]:
    """The arguments of attention. The changes are of the scores."""
    scores = Scores(
        sm_scale=case.head_dim**-0.5,
        soft_cap=case.soft_cap,
        sliding_window=case.window,
        sinks=inputs["sinks"],
        causal=case.causal,
        return_lse=return_lse,
    )
    pools = Pools(inputs["k_pages"], inputs["v_pages"], inputs["layer"])
    return inputs["q"], pools, rows_of(inputs), scores._replace(**changes)


def shapes_of(case: Case, **changes: Any) -> Shapes:
    """What is static in a case; rows and tokens are one unless the changes say otherwise."""
    known = {
        "num_rows": 1,
        "num_tokens": 1,
        "max_query_len": case.max_query_len,
        "num_heads": case.kv_heads * case.group,
    }
    return Shapes(
        **known | changes,
        num_kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        page_size=case.page_size,
        dtype=case.kv_dtype,
        windowed=case.window is not None,
    )


def quantized(x: np.ndarray, case: Case) -> QuantizedPages:
    """A pool [L, P, K, S, D] as quantised pages; a slot of NaN has NaN wherever the format can hold one."""
    form = ops.FORMATS[case.quantization or ""]
    own = _quantize.scales_of(jnp.asarray(x, jnp.float32), form)
    foreign = np.isnan(x).all(axis=-1)
    if case.layer_scales:
        largest = own.max(axis=(1, 2, 3), keepdims=True)[..., 0]
        scales = jnp.broadcast_to(largest[..., None], (*x.shape[:2], 1, 1))
        values = _quantize.encode(jnp.asarray(x), jnp.broadcast_to(scales, x.shape[:-1]), form)
        return QuantizedPages(values, scales)
    values = _quantize.encode(jnp.asarray(x), own, form)
    return QuantizedPages(values, jnp.where(foreign, jnp.nan, own))


def pool_shape(case: Case, num_pages: int) -> Any:
    """A pool's shapes and dtypes, for compiling."""
    shape = (LAYERS, num_pages, case.kv_heads, case.page_size, case.head_dim)
    if case.quantization is None:
        return jax.ShapeDtypeStruct(shape, case.dtype)
    scales = jax.ShapeDtypeStruct((LAYERS,), jnp.float32) if case.layer_scales else None
    return jax.eval_shape(lambda x: _quantize.empty(case.quantization or "", shape, x), scales)


def numbers(pool: Any) -> np.ndarray:
    """What a pool stands for, in float32."""
    if not isinstance(pool, QuantizedPages):
        return np.asarray(pool, np.float32)
    return np.asarray(
        _quantize.decode(pool.values, pool.form, jnp.float32) * pool.scales[..., None], np.float32
    )


def oracle(case: Case, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Attention one query head at a time, in float32, or float64 for float32 pages."""
    exact = np.float64 if case.dtype == jnp.float32 else np.float32
    q, k, v = (numbers(inputs[x]).astype(exact) for x in ("q", "k_pages", "v_pages"))
    k, v = k[LAYER], v[LAYER]
    tables, starts, query_lens = (
        np.asarray(inputs[x]) for x in ("block_tables", "query_starts", "query_lens")
    )
    out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf, exact)
    for row, length in enumerate(case.lens):
        key = np.arange(length)
        page, offset = tables[row, key // case.page_size], key % case.page_size
        for i, head in itertools.product(range(query_lens[row]), range(q.shape[1])):
            position = length - query_lens[row] + i
            seen = page >= 0
            if case.causal:
                seen = seen & (key <= position)
            if case.window is not None:
                seen = seen & (key > position - case.window)
            at = page[seen], head // case.group, offset[seen]
            scores = k[at] @ q[starts[row] + i, head] * case.head_dim**-0.5
            if case.soft_cap is not None:
                scores = case.soft_cap * np.tanh(scores / case.soft_cap)
            if case.sinks:
                scores = np.append(scores, np.asarray(inputs["sinks"])[head])
            if scores.size:
                total = np.logaddexp.reduce(scores)
                lse[starts[row] + i, head] = total
                out[starts[row] + i, head] = np.exp(scores[: seen.sum()] - total) @ v[at]
    return out, lse


def assert_right(
    case: Case, inputs: dict[str, Any], out: jax.Array, lse: jax.Array, lse_tolerance: float = 1e-4
) -> None:
    expected, expected_lse = oracle(case, inputs)
    error = np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[jnp.dtype(case.dtype).name]  # NaN fails too
    assert not np.asarray(out, np.float32)[expected_lse == -np.inf].any()
    np.testing.assert_allclose(np.asarray(lse), expected_lse, atol=lse_tolerance, rtol=lse_tolerance)
