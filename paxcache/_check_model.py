"""Checks a model function before it is used: runs it on a few tokens in several ways and says what looks wrong.

A model function must give the same logits for a token however a pass is cut: in one piece, in chunks, token by token,
beside other rows. The mistakes that break this raise nothing by themselves. So every run starts from pages that hold
NaN where nothing was written, and what a run wrote is compared with what its step asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from paxcache import _cache, _checks
from paxcache._inspect import gather_dense
from paxcache._types import CacheConfig, PagedKVCache, Pages, Step

if TYPE_CHECKING:
    from jaxtyping import Array, Int32

_MOST_TOKENS = 16
_LONG, _IDLE, _SHORT = 2, 1, 0  # rows of the check's own cache; the short row stands first in a packed step
_ROWS = 3


def check_model(
    model_fn: Callable[..., tuple[jax.Array, PagedKVCache]],
    params: Any,
    cache: CacheConfig | PagedKVCache,
    tokens: Int32[Array, "N"],
    *,
    reference: Callable[[jax.Array], jax.Array] | None = None,
    tolerance: float | None = None,
) -> None:
    """Checks a model function as `generate` takes it, and says which known mistake it seems to make.

    Runs it on a small cache of its own: one row in one piece, in two chunks, token by token, with other padding, beside
    another row and an idle one. All must give the same logits, those of `reference` too; every layer must write the
    slots of the step once, and nothing else. Compiles the function for two shapes. Meant for the host, once after a
    model was written or changed.

    Args:
      model_fn: ``model_fn(params, tokens, cache, step, logits_at) -> (logits, cache)``, see `generate`.
      params: handed to model_fn.
      cache: the `CacheConfig` that the model will be used with, or a cache; only its shapes are used (and scales given
        by tensor, so a model of such pages needs the cache).
      tokens: i32[N] at least 4 token ids, not all equal; those past 16 are left out.
      reference: ``reference(tokens i32[1, L]) -> logits [1, L, V]``, the model without a cache. Without it, a model
        whose keys do not depend on positions is refused: nothing else tells missing positions from a model without.
      tolerance: largest difference, as a share of the largest logit. None: 0.005, or 0.05 where pages are of half
        precision or quantised.

    Raises:
      ValueError: the model is wrong: says what it looks like. Or an argument is; names it.
      TypeError: an argument is of another type, or traced.

    Example:
      >>> import jax, jax.numpy as jnp, paxcache
      >>> params = jax.random.normal(jax.random.key(0), (10, 8))
      >>> def model_fn(params, tokens, cache, step, logits_at):
      ...     x = params[tokens] + jnp.sin(step.positions[:, None] * 2.0 ** -jnp.arange(8))
      ...     cache = paxcache.append(cache, 0, x[:, None], x[:, None], step)
      ...     x = x + paxcache.attend(cache, 0, x[:, None], step)[:, 0]
      ...     return x[logits_at] @ params.T, cache
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, num_pages=16, max_seqs=2,
      ...                               max_pages_per_seq=8, dtype=jnp.float32)
      >>> paxcache.check_model(model_fn, params, config, jnp.array([1, 2, 3, 4]))
    """
    if not callable(model_fn):
        raise TypeError(f"model_fn: expected a function, got {model_fn!r}")
    if reference is not None and not callable(reference):
        raise TypeError(f"reference: expected a function of tokens [1, L], got {reference!r}")
    _checks.instance("cache", cache, CacheConfig, PagedKVCache)
    if _checks.is_traced(params, cache, tokens):
        raise TypeError("check_model compares values on the host and cannot run inside jit")
    ids = np.asarray(_checks.int_array("tokens", tokens, "N"))[:_MOST_TOKENS]
    if ids.size < 4 or (ids == ids[0]).all():
        raise ValueError(f"tokens: expected at least 4 token ids, not all equal, got {ids.tolist()}")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"tolerance: expected a share between 0 and 1, got {tolerance}")
    # The first token once more, at another position; and another text, one token shorter, for the row beside.
    text = np.append(ids, ids[0])
    other = np.roll(ids, -1)
    empty = _small_cache(cache, most_tokens=2 * text.size)
    if tolerance is None:
        exact = all(g.pages.k.dtype == jnp.float32 for g in empty.groups)
        tolerance = 0.005 if exact else 0.05
    _Check(jax.jit(model_fn), params, empty, text, other, tolerance).run(reference)


class _Pass(NamedTuple):
    """What one call of the model gave."""

    logits: np.ndarray  # [R, V]
    cache: PagedKVCache
    step: Step


@dataclasses.dataclass(frozen=True)
class _Check:
    """The runs, and what they are compared by."""

    model_fn: Callable[..., Any]
    params: Any
    empty: PagedKVCache
    text: np.ndarray
    other: np.ndarray
    tolerance: float

    @property
    def width(self) -> int:
        """Tokens of a wide step: both texts, and padding."""
        return self.text.size + self.other.size + 2

    def run(self, reference: Callable[[jax.Array], jax.Array] | None) -> None:
        """All of it; the first thing that is wrong raises."""
        L, text = self.text.size, self.text
        clean = _filled(self.empty, 0.5)
        done = self.call(clean, {_LONG: text}, at=range(L))
        if np.isnan(done.logits).any():
            raise ValueError(
                "model_fn: logits hold NaN, though no page held any: are the weights finite? "
                "(A layer counted past the cache's layers gives NaN, too.)"
            )
        self.check_written(clean, done, "in one piece")
        whole = self.call(self.empty, {_LONG: text}, at=range(L))
        if np.isnan(whole.logits).any():
            raise ValueError(
                "model_fn: logits change with what lies in slots before they are written: it looks as if it attends "
                "before it appends (or attends over another cache than the one that append returned)"
            )
        expected = whole.logits
        self.check_rows(expected)
        self.check_padding(expected)
        self.check_neighbours(whole)
        if reference is None:
            self.check_positions(whole)
        self.check_chunks(expected)
        self.check_token_by_token(expected)
        if reference is not None:
            self.check_reference(expected, reference)

    def call(
        self,
        cache: PagedKVCache,
        new: dict[int, np.ndarray],
        *,
        at: Any,
        width: int | None = None,
        padding: int | None = None,
    ) -> _Pass:
        """Runs the model on new tokens of some rows, and checks what it returns by shape."""
        T = self.width if width is None else width
        R = T - 2 if width is None else width  # another number than T, as `generate` may have
        lens = np.zeros(_ROWS, np.int32)
        for row, ids in new.items():
            lens[row] = ids.size
        packed = np.concatenate([new[row] for row in sorted(new)])
        fill = self.text[0] if padding is None else padding
        tokens = np.append(packed, np.full(T - packed.size, fill)).astype(np.int32)
        logits_at = np.zeros(R, np.int32)
        logits_at[: len(at)] = at
        given, step = _cache.extend(cache, jnp.asarray(lens), num_tokens=T)
        assert bool(step.ok.all())  # the cache was made for these tokens
        try:
            result = self.model_fn(self.params, jnp.asarray(tokens), given, step, jnp.asarray(logits_at))
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                "model_fn: it uses arrays of an earlier trace: it looks as if it uses the step or the cache of "
                "another call (kept in a closure or an attribute)"
            ) from error
        except Exception as error:
            error.add_note(f"raised by model_fn in check_model, with tokens [T={T}] and logits_at [R={R}]")
            raise
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"model_fn: expected (logits, cache), got {type(result).__name__}")
        logits, after = result
        if not isinstance(after, PagedKVCache):
            raise ValueError(f"model_fn: expected (logits, cache), got {type(after).__name__} for the cache")
        if getattr(logits, "ndim", None) != 2 or logits.shape[0] != R:
            raise ValueError(
                f"model_fn: expected logits [R={R}, V] of the tokens that logits_at names, got "
                f"{_checks.describe(logits)} for tokens [T={T}]"
            )
        if jax.tree.map(_shape_of, after) != jax.tree.map(_shape_of, given):
            raise ValueError(
                "model_fn: the cache that it returned has another structure or other shapes than the given"
            )
        tables = [g.block_tables for g in after.groups], [g.block_tables for g in given.groups]
        if not _equal(after.seq_lens, given.seq_lens) or not all(map(_equal, *tables)):
            raise ValueError(
                "model_fn: the cache that it returned has other lengths or tables than the given one: it looks as if "
                "it calls extend (or release, fork, ...) itself, which generate does"
            )
        return _Pass(np.asarray(logits, np.float32)[: len(at)], after, step)

    def check_written(self, before: PagedKVCache, done: _Pass, how: str) -> None:
        """Every layer must have written the step's slots, and no others."""
        layers = []
        for index, (old, new) in enumerate(zip(before.groups, done.cache.groups, strict=True)):
            P, S = new.ref_counts.shape[0], done.cache.page_size
            slots = np.asarray(done.step.slot_mapping[index])
            asked = np.zeros(P * S, bool)
            asked[slots[(slots >= 0) & (slots < P * S)]] = True
            written = _written(old.pages, new.pages)  # [L, P * S]
            layers += [((written[n] & asked).any(), (asked & ~written[n]).any(), (written[n] & ~asked).any())
                       for n in range(written.shape[0])]  # fmt: skip
        hits, misses, strays = (np.array(flags) for flags in zip(*layers, strict=True))
        if strays.any():
            raise ValueError(
                f"model_fn: run {how}, layers {np.flatnonzero(strays).tolist()} wrote slots that the step does not "
                "name: it looks as if it uses the step of another call (kept in a closure or an attribute), or "
                "writes pages itself"
            )
        if not hits.any():
            raise ValueError(
                f"model_fn: run {how}, no layer wrote anything: it looks as if it returns the old cache instead of "
                "the one that append (or the layer) returned"
            )
        if misses.any():
            number = _appends(self.model_fn, self.params, done)
            twice = ""
            if number is not None and number > (~misses).sum():
                twice = f" though append is called {number} times: is a layer index given twice?"
            raise ValueError(
                f"model_fn: run {how}, layers {np.flatnonzero(misses).tolist()} of {len(layers)} were not written"
                f"{twice or ': a layer is skipped, its append is lost, or the cache has more layers than the model'}"
            )

    def check_rows(self, expected: np.ndarray) -> None:
        """Logits must follow logits_at."""
        L = self.text.size
        backwards = self.call(self.empty, {_LONG: self.text}, at=range(L)[::-1])
        if not self.close(backwards.logits, expected[::-1]):
            raise ValueError(
                "model_fn: logits do not follow logits_at: they are of the wrong rows. Return those of tokens "
                "logits_at, in that order, as in `logits[logits_at]`"
            )

    def check_padding(self, expected: np.ndarray) -> None:
        """Padding tokens must not matter."""
        another = int(self.text[self.text != self.text[0]][0])
        padded = self.call(self.empty, {_LONG: self.text}, at=range(self.text.size), padding=another)
        if not self.close(padded.logits, expected):
            raise ValueError(
                "model_fn: logits change with the tokens that pad the step: padding leaks, as in a mean or a softmax "
                "over all T tokens (step.rows is B where a token is padding)"
            )

    def check_neighbours(self, whole: _Pass) -> None:
        """Another row in the step must not matter."""
        n = self.other.size
        beside = self.call(
            self.empty, {_SHORT: self.other, _LONG: self.text}, at=range(n, n + self.text.size)
        )
        pairs = zip(_keys(beside, _LONG, 0), _keys(whole, _LONG, 0), strict=True)
        same_keys = [self.close(found, alone) for found, alone in pairs]  # of a token that sees no other
        if self.close(beside.logits, whole.logits) and all(same_keys):
            return
        if not any(same_keys):
            raise ValueError(
                "model_fn: the keys of a row's first token change with the tokens packed before it: it looks as if "
                "positions come from arange over the packed tokens; take step.positions"
            )
        raise ValueError(
            "model_fn: a row's logits change with the other rows of the step: tokens of other rows leak, as in "
            "attention or a reduction of one's own over all T tokens (step.rows tells each token's row)"
        )

    def check_positions(self, whole: _Pass) -> None:
        """Equal tokens must have other keys at other positions, in the first layer too."""
        pairs = zip(_keys(whole, _LONG, 0), _keys(whole, _LONG, self.text.size - 1), strict=True)
        same = [n for n, (first, last) in enumerate(pairs) if self.close(first, last)]
        if same:
            raise ValueError(
                f"model_fn: equal tokens have equal keys at other positions (layers {same}), so positions are "
                "missing: it looks as if they come from arange over an axis of length 1; take step.positions. If the "
                "model has none, or none in its keys (ALiBi), give reference="
            )

    def check_chunks(self, expected: np.ndarray) -> None:
        """Two chunks must give what one piece gives."""
        half = self.text.size // 2
        first = self.call(self.empty, {_LONG: self.text[:half]}, at=range(half))
        second = self.call(first.cache, {_LONG: self.text[half:]}, at=range(self.text.size - half))
        self.check_written(first.cache, second, "on a second chunk")
        if self.close(first.logits, expected[:half]) and self.close(second.logits, expected[half:]):
            return
        number, layers = _appends(self.model_fn, self.params, second), _num_layers(self.empty)
        if number is not None and number > layers:
            raise ValueError(
                f"model_fn: append is called {number} times for {layers} layers: a layer is written twice, so that a "
                "later chunk attends to the keys of the wrong one"
            )
        blind = self.call(
            _forget(first.cache, self.empty), {_LONG: self.text[half:]}, at=range(self.text.size - half)
        )
        if not np.isnan(blind.logits).any():
            raise ValueError(
                "model_fn: a second chunk does not look at the tokens of the first: it attends to the step's own "
                "tokens only; take paxcache.attend, which reads the row's pages"
            )
        raise ValueError(
            "model_fn: logits in two chunks differ from those in one piece, "
            f"{self.difference(np.concatenate([first.logits, second.logits]), expected)}: it looks as if a later "
            "chunk has wrong positions, or attends to another layer than the one it wrote"
        )

    def check_token_by_token(self, expected: np.ndarray) -> None:
        """Two rows token by token, beside an idle one, must give what one piece gives."""
        beside = self.call(self.empty, {_LONG: self.other}, at=range(self.other.size)).logits
        cache, found = self.empty, {_SHORT: [], _LONG: []}
        for t in range(self.text.size):
            new = {_LONG: self.text[t : t + 1]}
            if t < self.other.size:
                new[_SHORT] = self.other[t : t + 1]
            done = self.call(cache, new, at=range(len(new)), width=_ROWS)
            self.check_written(cache, done, "token by token")
            for row, logits in zip(sorted(new), done.logits, strict=True):
                found[row].append(logits)
            cache = done.cache
        for row, wanted in ((_LONG, expected), (_SHORT, beside)):
            if not self.close(np.stack(found[row]), wanted):
                raise ValueError(
                    f"model_fn: logits token by token differ from those in one piece, "
                    f"{self.difference(np.stack(found[row]), wanted)}: it looks as if it treats a step of R tokens "
                    "in another way than a wider one, or mixes up its rows"
                )

    def check_reference(self, expected: np.ndarray, reference: Callable[[jax.Array], jax.Array]) -> None:
        """One piece must give what the model gives without a cache."""
        wanted = reference(jnp.asarray(self.text)[None])
        if getattr(wanted, "shape", None) != (1, *expected.shape):
            raise ValueError(
                f"reference: expected logits [1, L={expected.shape[0]}, V={expected.shape[1]}], got "
                f"{_checks.describe(wanted)}"
            )
        wanted = np.asarray(wanted, np.float32)[0]
        if self.close(expected, wanted):
            return
        by_row = [self.close(ours, theirs) for ours, theirs in zip(expected, wanted, strict=True)]
        if by_row[0]:
            raise ValueError(
                "model_fn: logits differ from the reference from the second token on, "
                f"{self.difference(expected, wanted)}: it looks as if positions are wrong (all 0, as from arange "
                "over an axis of length 1; take step.positions), or masks, windows or scales of attention are"
            )
        raise ValueError(
            "model_fn: logits differ from the reference at the first token already, "
            f"{self.difference(expected, wanted)}: it looks as if weights or layers differ, or positions do not "
            "begin at 0"
        )

    def close(self, found: np.ndarray, wanted: np.ndarray) -> bool:
        """Whether two results agree, NaN never."""
        return bool(np.abs(found - wanted).max() <= self.tolerance * max(float(np.abs(wanted).max()), 1e-6))

    def difference(self, found: np.ndarray, wanted: np.ndarray) -> str:
        """The largest difference in words."""
        return f"by up to {np.abs(found - wanted).max():.3g} of {np.abs(wanted).max():.3g}"


def _shape_of(x: Any) -> tuple[Any, ...]:
    return x.shape, x.dtype


def _equal(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


def _num_layers(cache: PagedKVCache) -> int:
    return sum(group.pages.k.shape[0] for group in cache.groups)


def _is_pool(leaf: Any, pages: Pages) -> bool:
    """Whether a leaf holds something for each slot, unlike scales given by tensor."""
    return leaf.ndim >= 4 and leaf.shape[2:4] == pages.k.shape[2:4]


def _small_cache(cache: CacheConfig | PagedKVCache, *, most_tokens: int) -> PagedKVCache:
    """An empty cache of the same shapes but for a few rows and pages, with NaN in every slot."""
    S = cache.page_size
    M = -(-most_tokens // S)
    P = 2 * _ROWS * M
    if isinstance(cache, CacheConfig):
        groups = tuple(dataclasses.replace(group, num_pages=None) for group in cache.groups)
        small = _cache.init(
            dataclasses.replace(cache, groups=groups, num_pages=P, max_seqs=_ROWS, max_pages_per_seq=M)
        )
    else:
        groups = []
        for group in cache.groups:
            pages = jax.tree.map(lambda x: jnp.take(x, jnp.zeros(P, jnp.int32), axis=1), group.pages)
            tables, counts = jnp.full((_ROWS, M), -1, jnp.int32), jnp.zeros(P, jnp.int32)
            groups.append(dataclasses.replace(group, pages=pages, block_tables=tables, ref_counts=counts))
        epochs = None if cache.epochs is None else jnp.zeros(_ROWS, jnp.int32)
        small = dataclasses.replace(
            cache, seq_lens=jnp.zeros(_ROWS, jnp.int32), groups=tuple(groups), epochs=epochs
        )
    return _filled(small, np.nan)


def _filled(cache: PagedKVCache, value: float) -> PagedKVCache:
    """The cache with every slot filled: numbers by the value, integers by one that quantised tokens do not have."""

    def fill(pages):
        def leaf(x):
            if not _is_pool(x, pages):
                return x
            return jnp.full_like(
                x, value if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
            )

        return jax.tree.map(leaf, pages)

    groups = tuple(dataclasses.replace(group, pages=fill(group.pages)) for group in cache.groups)
    return dataclasses.replace(cache, groups=groups)


def _forget(cache: PagedKVCache, empty: PagedKVCache) -> PagedKVCache:
    """The cache with its lengths and tables, and the pages of an empty one."""
    pairs = zip(cache.groups, empty.groups, strict=True)
    return dataclasses.replace(
        cache, groups=tuple(dataclasses.replace(group, pages=other.pages) for group, other in pairs)
    )


def _written(before: Pages, after: Pages) -> np.ndarray:
    """Which slots of which layers changed, [L, P * S]."""
    changed = None
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if _is_pool(old, before):
            a, b = (np.asarray(x.astype(jnp.float32)) for x in (old, new))
            differs = ~((a == b) | (np.isnan(a) & np.isnan(b)))
            differs = differs.reshape(*differs.shape[:4], -1).any(axis=(2, 4))  # [L, P, S]
            changed = differs if changed is None else changed | differs
    assert changed is not None  # keys are always stored by slot
    return changed.reshape(changed.shape[0], -1)


def _keys(done: _Pass, row: int, position: int) -> list[np.ndarray]:
    """A token's key in every layer."""
    most = done.cache.max_pages_per_seq * done.cache.page_size
    layers = range(_num_layers(done.cache))
    return [np.asarray(gather_dense(done.cache, layer, most)[0])[row, position] for layer in layers]


def _appends(model_fn: Any, params: Any, done: _Pass) -> int | None:
    """How often a model calls `append` in a pass, by the program that it traces to; None where that does not tell."""
    T = done.step.rows.shape[0]
    tokens = jax.ShapeDtypeStruct((T,), jnp.int32)
    at = jax.ShapeDtypeStruct((T - 2,), jnp.int32)
    v = done.cache.groups[0].pages.v
    k = jnp.zeros((T, *done.cache.groups[0].pages.k.shape[2::2]))
    v = None if v is None else jnp.zeros((T, *v.shape[2::2]))
    alone = jax.make_jaxpr(lambda cache: _cache.append(cache, 0, k, v, done.step))(done.cache)
    name = alone.eqns[-1].params.get("name")  # of the jitted function that append calls
    if name is None:
        return None

    def count(jaxpr) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.params.get("name") == name:
                total += 1
                continue
            times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            total += times * sum(count(inner) for inner in jaxprs_in_params(eqn.params))
        return total

    return count(jax.make_jaxpr(model_fn)(params, tokens, done.cache, done.step, at).jaxpr)
