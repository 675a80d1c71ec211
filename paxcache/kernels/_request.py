"""What the kernels of every backend are asked for: pools, rows, scores, and what is static in a step.

One form for all of them, so that a new argument of attention is added in one place.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

FEW_QUERIES = 16
"""Beyond it a decode kernel would read a row's keys too often (on Hopper once for every 8 query tokens at 4 heads a KV
head), and multiply too little at once."""


class Pools(NamedTuple):
    """Where keys and values lie."""

    k: Any
    """[L, P, K, S, D], an array or `QuantizedPages`."""
    v: Any
    """[L, P, K, S, Dv] likewise; None: keys serve as values."""
    layer: Int32[Array, ""] | int
    """Index into L, which may be traced."""

    @property
    def arrays(self) -> list[Any]:
        """The pools that there are."""
        return [self.k] if self.v is None else [self.k, self.v]


class Rows(NamedTuple):
    """The rows of a step. Their query tokens are packed in row order."""

    tables: Int32[Array, "B M"]
    """Page ids; a negative entry maps nothing."""
    seq_lens: Int32[Array, "B"]
    """Lengths, with the new tokens."""
    query_starts: Int32[Array, "B"]
    """Index of each row's first query token."""
    query_lens: Int32[Array, "B"]
    """Number of each row's query tokens."""


class Scores(NamedTuple):
    """How scores are made of queries and keys, and what is returned of them."""

    sm_scale: Float[Array, ""] | float
    """Multiplies the scores."""
    soft_cap: float | None = None
    """Scores become ``soft_cap * tanh(scores / soft_cap)``."""
    sliding_window: Int32[Array, ""] | int | None = None
    """Tokens a query sees, itself included; None: all."""
    sinks: Float[Array, "H"] | None = None
    """Logits that join each softmax without a value."""
    causal: bool = True
    """Whether a query does not see later tokens of its own row."""
    return_lse: bool = False
    """Whether the log-sum-exp of each query's scores is returned too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """What is static in the attention of a step, and the form of its plans depends on."""

    num_rows: int
    """B."""
    num_tokens: int
    """Query tokens, T."""
    max_query_len: int
    """Most query tokens of a row."""
    num_heads: int | None
    """Query heads, H; None: not known."""
    num_kv_heads: int
    """K."""
    head_dim: int
    """D, of keys."""
    page_size: int
    """S."""
    dtype: Any
    """Of the pages' values."""
    windowed: bool
    """Whether there is a sliding window."""

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        assert self.num_heads is not None
        return self.num_heads // self.num_kv_heads

    @property
    def is_mixed(self) -> bool:
        """Whether both kernels have rows. A packed step of few tokens is one of single tokens more likely than not."""
        packed = self.num_rows > 1 and self.max_query_len == self.num_tokens > 1
        return packed or self.max_query_len > FEW_QUERIES

    @property
    def decode_query_len(self) -> int:
        """Most query tokens of a row that the decode kernel takes."""
        return 1 if self.is_mixed else self.max_query_len


def shapes_of(q: Any, pools: Pools, rows: Rows, scores: Scores, max_query_len: int) -> Shapes:
    """The shapes of a call of attention."""
    num_tokens, num_heads, head_dim = q.shape
    return Shapes(
        num_rows=rows.tables.shape[0],
        num_tokens=num_tokens,
        max_query_len=max_query_len,
        num_heads=num_heads,
        num_kv_heads=pools.k.shape[2],
        head_dim=head_dim,
        page_size=pools.k.shape[3],
        dtype=pools.k.dtype,
        windowed=scores.sliding_window is not None,
    )
