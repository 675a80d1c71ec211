"""The legend, the configuration and the states.

Axis letters, used in every docstring of the library:

    L  layers of a group          B  sequence rows
    P  physical pages             M  pages a row can map (max_pages_per_seq)
    S  token slots in a page      T  packed query tokens of a step
    K  KV heads                   Q  query tokens a row may have in a row-aligned step
    H  query heads                N  entries of a list (of pages, rows, prompts)
    D  head dim

A *page* is the unit of KV storage, a *slot* one token's place in it: ``slot = page * S + offset``. A *row* is an
index into the batch of sequences, its *block table* the page ids it maps, in order. Lengths are in tokens.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from paxcache._quantize import FORMATS
from paxcache._state import brief, state

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int32, UInt32

    from paxcache._quantize import Quantization, Scales

NO_PAGE = -1
"""Marks a table entry that maps no page. It stands in stored tables only and is masked before any indexing."""

INT32_MAX = int(np.iinfo(np.int32).max)


def longest_row(page_size: int) -> int:
    """The most tokens that a row may have room for: rounded up to pages, or to a kernel's tiles, they fit int32."""
    return INT32_MAX - max(page_size, 1024)


class Status(enum.IntEnum):
    """What became of one row's request in `extend` (values of ``Step.status``)."""

    OK = 0
    """Served; also a row that asked for nothing."""
    NO_PAGES = 1
    """The pool has too few free pages for this row and those before it."""
    ROW_FULL = 2
    """The new length would pass ``max_pages_per_seq`` pages."""
    STEP_FULL = 3
    """The row's tokens do not fit the step (``num_tokens`` or ``max_query_len``)."""
    INVALID = 4
    """A negative number of tokens was asked for, or the row was rolled back so far beside a window that the page its
    next token belongs into is gone (see `truncate`)."""


class StepError(RuntimeError):
    """Some rows of a step were refused (raised by `Step.raise_if_failed`)."""


class InvariantError(RuntimeError):
    """A cache breaks one of its invariants (raised by `check`)."""


def _set_ints(config: Any, *names: str, minimum: int = 1, optional: bool = False) -> None:
    """Checks sizes, and stores NumPy's integers as Python's; `optional` ones may be None."""
    owner = type(config).__name__
    for name in names:
        value = getattr(config, name)
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
        if not minimum <= value <= INT32_MAX:
            raise ValueError(f"{owner}: {name} must be at least {minimum} and fit int32, got {value}")
        object.__setattr__(config, name, int(value))


def _set_dtype(config: Any) -> None:
    """Stores the dtype in the one form whose equality and hash agree."""
    owner = type(config).__name__
    try:
        dtype = jnp.dtype(config.dtype)
    except TypeError as error:
        raise TypeError(f"{owner}: dtype must be a dtype, got {config.dtype!r}") from error
    object.__setattr__(config, "dtype", dtype)


def _set_v_head_dim(config: Any) -> None:
    """Stores None for values as wide as keys, however that was said."""
    _set_ints(config, "v_head_dim", minimum=0, optional=True)
    if config.v_head_dim == config.head_dim:
        object.__setattr__(config, "v_head_dim", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers of one shape, which share a block table and a pool.

    Args:
      num_layers: layers in the group.
      num_kv_heads: KV heads of a layer.
      head_dim: width of a key.
      v_head_dim: width of a value; None means `head_dim`, 0 that no values are stored and the keys serve as values
        (latent attention in its absorbed form, as in DeepSeek-V2's MLA: slice the latent part from the output).
      dtype: storage dtype (float32, float16 or bfloat16); without effect where pages are quantised.
      quantization: None stores pages exactly; "fp8_e4m3", "fp8_e5m2", "int8" and "int4" with scales, see
        `ops.QuantizedPages`.
      scales: of quantised pages: "per_token_head", computed as tokens are written, or "per_tensor", given to `init` for
        each layer.
      sliding_window: tokens a query sees, itself included (Mistral, Gemma); None sees all. `attend` masks by it, and
        `extend` frees pages that lie left of it.
      num_pages: physical pages of this group; None takes the config's.
      num_heads: query heads of a layer, a multiple of num_kv_heads. Given, `extend` plans the attention of a step once
        for all layers; None: not known, and attention on a GPU plans in every call.

    Raises:
      ValueError, TypeError: an argument is out of its range or of another type.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    dtype: Any = jnp.bfloat16
    quantization: Quantization | None = None
    scales: Scales = "per_token_head"
    sliding_window: int | None = None
    num_pages: int | None = None
    num_heads: int | None = None

    def __post_init__(self):
        """Checks the arguments and brings each to one form, so that equal groups compare and hash equal."""
        _set_ints(self, "num_layers", "num_kv_heads", "head_dim")
        _set_ints(self, "sliding_window", "num_pages", "num_heads", optional=True)
        _set_v_head_dim(self)
        _set_dtype(self)
        if self.num_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"LayerGroup: num_heads must be a multiple of num_kv_heads={self.num_kv_heads}, got {self.num_heads}"
            )
        if self.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
            raise ValueError(f"LayerGroup: dtype must be float32, float16 or bfloat16, got {self.dtype}")
        if self.scales not in ("per_token_head", "per_tensor"):
            raise ValueError(
                f"LayerGroup: scales must be 'per_token_head' or 'per_tensor', got {self.scales!r}"
            )
        if self.quantization is not None:
            if self.quantization not in FORMATS:
                known = ", ".join(FORMATS)
                raise ValueError(
                    f"LayerGroup: quantization must be None or one of {known}, got {self.quantization!r}"
                )
            for name, width in (("head_dim", self.head_dim), ("v_head_dim", self.value_dim)):
                if width % FORMATS[self.quantization].per_element:
                    raise ValueError(f"LayerGroup: {name} must be even for {self.quantization}, got {width}")
        elif self.scales != "per_token_head":
            raise ValueError(f"LayerGroup: scales={self.scales!r} needs a quantization, got None")

    @property
    def query_group(self) -> int | None:
        """Query heads of a KV head; None: not known."""
        return None if self.num_heads is None else self.num_heads // self.num_kv_heads

    @property
    def value_dim(self) -> int:
        """Width of a stored value; 0 where none is stored."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    def page_elements(self, page_size: int) -> int:
        """Elements of one page in all layers, keys and values."""
        return self.num_layers * self.num_kv_heads * page_size * (self.head_dim + self.value_dim)

    def page_bytes(self, page_size: int) -> int:
        """Bytes of one page in all layers, scales included."""
        elements = self.page_elements(page_size)
        if self.quantization is None:
            return elements * jnp.dtype(self.dtype).itemsize
        form = FORMATS[self.quantization]
        scales = self.num_layers * (2 if self.value_dim else 1)
        if self.scales == "per_token_head":
            scales *= self.num_kv_heads * page_size
        return elements // form.per_element * form.dtype.itemsize + 4 * scales


_FLAT = tuple(f.name for f in dataclasses.fields(LayerGroup) if f.name != "num_pages")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Shapes and sizes of a cache: frozen, hashable, static.

    The flat layer arguments describe a model whose layers are alike. For models whose layers differ (local and
    global attention, latent attention, a draft model's layers) give `groups` instead of them.

    Args:
      num_layers, num_kv_heads, head_dim, v_head_dim, dtype, quantization, scales, sliding_window, num_heads: see
        `LayerGroup`.
      page_size: token slots in a page, S.
      num_pages: physical pages, P; one pool a group.
      max_seqs: rows, B.
      max_pages_per_seq: pages a row can map, M.
      groups: layer groups; a plain integer layer counts through them in order.

    Raises:
      ValueError, TypeError: an argument is missing, out of its range or of another type.

    Example:
      >>> import jax.numpy as jnp, paxcache
      >>> config = paxcache.CacheConfig(num_layers=32, num_kv_heads=8, head_dim=128, page_size=16, num_pages=4096,
      ...                               max_seqs=64, max_pages_per_seq=512, dtype=jnp.bfloat16)
      >>> config.page_bytes, config.pool_bytes, config.tokens_capacity
      (2097152, 8589934592, 65536)

    Reference: the page arithmetic of vLLM's PagedAttention (Kwon et al., 2023).
    """

    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    page_size: int = 16
    num_pages: int
    max_seqs: int
    max_pages_per_seq: int
    dtype: Any = jnp.bfloat16
    quantization: Quantization | None = None
    scales: Scales = "per_token_head"
    sliding_window: int | None = None
    v_head_dim: int | None = None
    num_heads: int | None = None
    groups: tuple[LayerGroup, ...] = ()

    def __post_init__(self):
        """Checks the arguments and brings each to one form; the flat ones become the only group."""
        _set_ints(self, "page_size", "num_pages", "max_seqs", "max_pages_per_seq")
        _set_dtype(self)
        _set_v_head_dim(self)
        object.__setattr__(self, "groups", tuple(self.groups))
        defaults = {f.name: f.default for f in dataclasses.fields(CacheConfig)}
        if self.groups:
            for group in self.groups:
                if not isinstance(group, LayerGroup):
                    raise TypeError(f"CacheConfig: groups must hold LayerGroup, got {group!r}")
            both = [name for name in _FLAT if getattr(self, name) != defaults[name]]
            if both:
                raise ValueError(
                    f"CacheConfig: give groups or the flat arguments, not both; got {', '.join(both)}"
                )
        else:
            missing = [n for n in ("num_layers", "num_kv_heads", "head_dim") if getattr(self, n) is None]
            if missing:
                raise ValueError(f"CacheConfig: {', '.join(missing)} missing (or give groups)")
            _set_ints(self, "num_layers", "num_kv_heads", "head_dim")
            _set_ints(self, "sliding_window", "num_heads", optional=True)
        self._check_int32()

    def _check_int32(self) -> None:
        """Refuses sizes whose products int32 does not count: lengths, slots and ranks are int32."""
        B, M, S = self.max_seqs, self.max_pages_per_seq, self.page_size
        if longest_row(S) < M * S:
            raise ValueError(
                f"CacheConfig: max_pages_per_seq * page_size must be at most {longest_row(S)} (lengths are int32, and "
                f"are rounded up to pages), got {M} * {S} = {M * S}"
            )
        if B * M > INT32_MAX:
            raise ValueError(
                "CacheConfig: max_seqs * max_pages_per_seq must fit int32 (pages are counted in int32), "
                f"got {B} * {M} = {B * M}"
            )
        pages = [self.group_num_pages(group) for group in self.layer_groups]
        for P in pages:
            if P * S > INT32_MAX:
                raise ValueError(
                    "CacheConfig: num_pages * page_size must fit int32 (slots are int32), "
                    f"got {P} * {S} = {P * S}"
                )
        if sum(pages) > INT32_MAX:
            raise ValueError(
                "CacheConfig: num_pages of all groups together must fit int32, "
                f"got {' + '.join(map(str, pages))} = {sum(pages)}"
            )

    @functools.cached_property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The groups; for a flat config the one that its arguments describe."""
        return self.groups or (LayerGroup(**{name: getattr(self, name) for name in _FLAT}),)

    def group_num_pages(self, group: LayerGroup) -> int:
        """Physical pages of a group."""
        return self.num_pages if group.num_pages is None else group.num_pages

    @property
    def page_elements(self) -> int:
        """Elements of one page in all layers of all groups, keys and values: what S tokens of a row take."""
        return sum(g.page_elements(self.page_size) for g in self.layer_groups)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers of all groups."""
        return sum(g.page_bytes(self.page_size) for g in self.layer_groups)

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pages of all groups."""
        return sum(self.group_num_pages(g) * g.page_bytes(self.page_size) for g in self.layer_groups)

    @property
    def tokens_capacity(self) -> int:
        """Tokens that the pool holds when nothing is shared and no window frees pages (the smallest group counts)."""
        return self.page_size * min(self.group_num_pages(g) for g in self.layer_groups)

    @classmethod
    def fit(cls, *, memory_bytes: int, **arguments: Any) -> CacheConfig:
        """The config with the most pages whose pool takes at most `memory_bytes`.

        Args:
          memory_bytes: bytes for the pools of all groups.
          **arguments: those of `CacheConfig` except num_pages. Groups with a num_pages of their own keep it; the
            others share what is left.

        Raises:
          ValueError: not even one page fits.

        Example:
          >>> import paxcache
          >>> config = paxcache.CacheConfig.fit(memory_bytes=2**30, num_layers=16, num_kv_heads=8, head_dim=64,
          ...                                   max_seqs=8, max_pages_per_seq=128)
          >>> config.num_pages, config.pool_bytes <= 2**30
          (2048, True)
        """
        if "num_pages" in arguments:
            raise TypeError("CacheConfig.fit: num_pages is what fit computes; leave it out")
        if isinstance(memory_bytes, bool) or not isinstance(memory_bytes, (int, float, np.integer)):
            raise TypeError(f"CacheConfig.fit: memory_bytes must be a number of bytes, got {memory_bytes!r}")
        one = cls(num_pages=1, **arguments)
        sized = [g for g in one.layer_groups if g.num_pages is None]
        if not sized:
            raise ValueError("CacheConfig.fit: every group has num_pages already; nothing to fit")
        per_page = sum(g.page_bytes(one.page_size) for g in sized)
        fixed = one.pool_bytes - per_page
        num_pages = min((memory_bytes - fixed) // per_page, INT32_MAX // one.page_size)
        fixed_pages = sum(g.num_pages for g in one.layer_groups if g.num_pages is not None)
        num_pages = min(num_pages, (INT32_MAX - fixed_pages) // len(sized))
        if num_pages < 1:
            raise ValueError(
                f"CacheConfig.fit: memory_bytes must be at least {fixed + per_page} (one page), got {memory_bytes}"
            )
        return dataclasses.replace(one, num_pages=int(num_pages))


@state
class Pages:
    """The pool of a layer group. Every leaf leads with ``[L, P]``; copies, offload and persistence know no more."""

    k: Any
    """[L, P, K, S, D]: an array, or an `ops.QuantizedPages`, which has the same shape."""
    v: Any
    """[L, P, K, S, Dv] likewise; None where keys serve as values."""


@state
class GroupCache:
    """State of one layer group."""

    pages: Pages
    block_tables: Int32[Array, "B M"]
    """Page ids; NO_PAGE where nothing is mapped. A row owns exactly its entries that are not NO_PAGE."""
    ref_counts: Int32[Array, "P"]
    """References to each page, by tables and from outside (a prefix index). A page is free at 0."""
    sliding_window: int | None = dataclasses.field(default=None, metadata={"static": True})
    query_group: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Query heads of a KV head; None: not known."""


@state
class PagedKVCache:
    """A paged KV cache as a value: a pytree of arrays, never changed in place by any function that takes it.

    Donate it to a jitted function and the result reuses its memory; keep an old one and it stays valid.
    """

    seq_lens: Int32[Array, "B"]
    groups: tuple[GroupCache, ...]
    epochs: Int32[Array, "B"] | None = None
    """By row, 1 plus the epoch of the weights in which `prefix.admit` began it, which its forks inherit; 0: it was not
    admitted; below 0: a mark of its own until pages that it waits for have landed (`offload.begin_resume`). None, in a
    cache put together by hand: none was."""
    holdings: UInt32[Array, "2"] | None = None
    """Opaque: a checksum of the pages that a prefix index holds, by which the two know each other. None, in a cache put
    together by hand: nothing is checked."""

    def __repr__(self) -> str:
        """One line a group."""
        rest = f"seq_lens={brief(self.seq_lens)}, epochs={brief(self.epochs)}"
        return "\n".join([f"PagedKVCache({rest}, groups:", *(f"  {brief(g)}" for g in self.groups)]) + ")"

    @property
    def max_seqs(self) -> int:
        """Rows, B."""
        return self.seq_lens.shape[-1]

    @property
    def page_size(self) -> int:
        """Token slots in a page, S."""
        return self.groups[0].pages.k.shape[-2]

    @property
    def max_pages_per_seq(self) -> int:
        """Pages a row can map, M."""
        return self.groups[0].block_tables.shape[-1]


@state
class Step:
    """What one forward pass needs: made once by `extend`, used by every layer.

    It stays valid until the next change of the tables and shares no buffer with the cache, so the cache may be
    donated. Fields per token are ``[T]`` in a packed step and ``[B, Q]`` in a row-aligned one; padding and the tokens
    of refused rows have row B, position 0 and slots past the pool, all of which a scatter drops.
    """

    positions: Int32[Array, "..."]
    """Each token's position in its sequence."""
    rows: Int32[Array, "..."]
    """Each token's row."""
    query_starts: Int32[Array, "B"]
    """Index of a row's first token among the (flattened) tokens, from the lengths that were asked for."""
    query_lens: Int32[Array, "B"]
    """New tokens of each row; 0 where idle or refused."""
    seq_lens: Int32[Array, "B"]
    """Lengths with the new tokens."""
    status: Int32[Array, "B"]
    """A `Status` for each row."""
    pages_short: Int32[Array, "B"]
    """Pages missing before a row with NO_PAGES could be served, with those before it; 0 elsewhere."""
    slot_mapping: tuple[Int32[Array, "..."], ...]
    """Per group, each token's slot; P * S (dropped) for padding and refused rows."""
    block_tables: tuple[Int32[Array, "B M"], ...]
    """Per group, the tables to read."""
    plans: tuple[Any, ...]
    """Per group, the opaque work plan of the attention kernels (`ops.plan`)."""
    page_size: int = dataclasses.field(metadata={"static": True})
    """Token slots in a page of the cache that it was made for, S."""
    num_pages: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    """Per group, the pages of that cache, P."""
    max_query_len: int = dataclasses.field(metadata={"static": True})
    """Most new tokens that a row can have."""

    @property
    def ok(self) -> Bool[Array, "B"]:
        """Rows that were served, or asked for nothing."""
        return self.status == Status.OK

    def raise_if_failed(self) -> None:
        """Raises on the host if any row was refused, naming rows, reasons and the pages missing.

        Raises:
          StepError: a row's status is not OK.
          TypeError: called under a JAX transformation, where no value can be read; use ``step.ok`` there.
        """
        if isinstance(self.status, Tracer):
            raise TypeError("raise_if_failed reads the status on the host; inside jit use step.ok")
        status, short = np.asarray(self.status), np.asarray(self.pages_short)
        refused = np.argwhere(status != Status.OK)
        if not refused.size:
            return
        lines = []
        for index in map(tuple, refused):
            reason = Status(int(status[index]))
            row = ", ".join(map(str, index))
            more = f", {int(short[index])} pages short" if reason is Status.NO_PAGES else ""
            lines.append(f"row {row}: {reason.name}{more}")
        raise StepError(f"{len(lines)} of {status.size} rows refused: " + "; ".join(lines))
