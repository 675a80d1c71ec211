"""Which kernel takes a row, for every architecture with one for few query tokens and one for many. Imports nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

FEW_QUERIES = 16
"""Beyond it a decode kernel would read a row's keys too often (on Hopper once for every 8 query tokens at 4 heads a KV
head), and multiply too little at once."""
LIKELY_GROUPS = (4, 1)
"""Query heads a KV head, even and odd, for which a plan is made where they are not known. On Hopper
groups up to 8 share the plan of single query tokens; in a mixed step of another group attention makes its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What of a step its plans depend on, on every architecture."""

    num_rows: int
    num_tokens: int
    max_query_len: int
    windowed: bool

    @property
    def is_mixed(self) -> bool:
        """Whether both kernels have rows. A packed step of few tokens is one of single tokens more likely than not."""
        packed = self.num_rows > 1 and self.max_query_len == self.num_tokens > 1
        return packed or self.max_query_len > FEW_QUERIES

    @property
    def decode_query_len(self) -> int:
        """Most query tokens of a row that the decode kernel takes."""
        return 1 if self.is_mixed else self.max_query_len


def groups(num_heads: int | None, num_kv_heads: int) -> tuple[int, ...]:
    """Query heads a KV head to make plans for."""
    return LIKELY_GROUPS if num_heads is None else (num_heads // num_kv_heads,)


def fitting(plans: Any, made_for: Any) -> Any:
    """The plan of this form, or None."""
    return next((plan for plan in plans or () if plan.made_for == made_for), None)
