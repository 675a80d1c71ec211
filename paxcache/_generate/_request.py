"""What the user asks for, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Required, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _checks
from paxcache._sampling import Rules, Sampling, fold_keys, per_prompt, resolve, seed_keys
from paxcache._types import INT32_MAX, PagedKVCache
from paxcache.prefix import device

if TYPE_CHECKING:
    from jaxtyping import Array, Int32, UInt32

type ModelFn = Callable[..., tuple[jax.Array, PagedKVCache]]
"""``model_fn(params, tokens i32[T], cache, step, logits_at i32[R]) -> (logits [R, V], cache)``, see `generate`."""

_GREEDY = Sampling()
_DEFAULT_CHUNK_SIZE = 512


class Options(TypedDict, total=False):
    """What `generate` and `stream` take by name, see `generate`. `read` has the defaults."""

    index: device.DeviceIndex | None
    max_new_tokens: Required[int]
    prompt_lens: Any
    limits: Any
    sampling: Sampling
    stop_tokens: Any
    seeds: Any
    key: Any
    chunk_size: int | None
    return_logprobs: bool
    host_pages: int | tuple[int, ...] | None


class Request(NamedTuple):
    """The values that are asked for, one of each a prompt. Constant while the program runs."""

    prompt_lens: Int32[Array, "N"]
    limits: Int32[Array, "N"]  # most new tokens
    keys: UInt32[Array, "N 2"] | None  # see `seed_keys`; None where nothing is drawn
    stop_tokens: Int32[Array, "N E"]  # -1 is padding
    rules: Rules
    families: Int32[Array, "N"] | None  # see `_families`; None without an index

    @property
    def most_tokens(self) -> Int32[Array, "N"]:
        """Prompt and generated tokens together."""
        return self.prompt_lens + self.limits


class Checked(NamedTuple):
    """A request with all that is static about it."""

    model_fn: ModelFn
    params: Any
    cache: PagedKVCache
    index: device.DeviceIndex | None
    prompts: Int32[Array, "N L"]
    request: Request
    max_new_tokens: int
    chunk_size: int
    return_logprobs: bool
    host_pages: int | tuple[int, ...] | None


def read(
    model_fn: ModelFn,
    params: Any,
    cache: PagedKVCache,
    prompts: Any,
    *,
    max_new_tokens: int,
    index: device.DeviceIndex | None = None,
    prompt_lens: Any = None,
    limits: Any = None,
    sampling: Sampling = _GREEDY,
    stop_tokens: Any = (),
    seeds: Any = None,
    key: Any = None,
    chunk_size: int | None = None,
    return_logprobs: bool = False,
    host_pages: int | tuple[int, ...] | None = None,
) -> Checked:
    """Checks what `generate` is given. Donates nothing."""
    if not callable(model_fn):
        raise TypeError(f"model_fn: expected a function, got {model_fn!r}")
    try:
        hash(model_fn)
    except TypeError as error:
        raise TypeError(
            f"model_fn: expected a function with a hash, by which its programs are found, got {model_fn!r}"
        ) from error
    _checks.instance("cache", cache, PagedKVCache)
    _checks.instance("sampling", sampling, Sampling)
    if index is not None:
        _checks.instance("index", index, device.DeviceIndex, source="prefix.device.init")
        if not _checks.is_traced(cache, index) and not device.belongs(cache, index):
            raise ValueError(
                "index: the pages it holds are not this cache's: go on with the pair that the last call returned"
            )
    for name, tree in (("cache", cache), ("index", index)):
        if is_deleted(tree):
            raise ValueError(f"{name}: was donated to an earlier call; go on with the one that came back")
    return_logprobs = _checks.static_bool("return_logprobs", return_logprobs)
    max_new_tokens = _checks.static_int("max_new_tokens", max_new_tokens, minimum=1)
    tokens, lens = _read_prompts(prompts, prompt_lens)
    N, width = tokens.shape
    if width + max_new_tokens > INT32_MAX:
        raise ValueError(f"max_new_tokens: {max_new_tokens} after prompts of {width} pass int32")
    num_seats = min(N, cache.max_seqs)
    if chunk_size is None:
        chunk_size = max(num_seats, min(_DEFAULT_CHUNK_SIZE, N * width))
    else:
        # A wide step must hold one token of every seat, so that no prompt waits for another's decoding.
        chunk_size = _checks.static_int("chunk_size", chunk_size, minimum=num_seats, maximum=INT32_MAX)
    rules = resolve(sampling, N)
    request = Request(
        prompt_lens=lens,
        limits=_read_limits(limits, N, max_new_tokens),
        keys=_read_keys(seeds, key, N, drawn=rules.temperature is not None),
        stop_tokens=_read_stop_tokens(stop_tokens, N),
        rules=rules,
        families=None if index is None else _families(tokens, lens, cache.page_size),
    )
    return Checked(
        model_fn=model_fn,
        params=params,
        cache=cache,
        index=index,
        prompts=tokens,
        request=request,
        max_new_tokens=max_new_tokens,
        chunk_size=chunk_size,
        return_logprobs=return_logprobs,
        host_pages=host_pages,
    )


def is_deleted(tree: Any) -> bool:
    """Whether a call took some of the buffers."""
    return any(
        isinstance(leaf, jax.Array) and not _checks.is_traced(leaf) and leaf.is_deleted()
        for leaf in jax.tree.leaves(tree)
    )


def _padded_size(size: int, *, minimum: int) -> int:
    """The next power of two: lists come in few different sizes then, and few programs are compiled."""
    return max(minimum, 1 << max(size - 1, 0).bit_length())


def _read_prompts(prompts: Any, prompt_lens: Any) -> tuple[Int32[Array, "N L"], Int32[Array, "N"]]:
    """Prompts as a padded array and lengths."""
    if isinstance(prompts, (jax.Array, np.ndarray)):
        return _read_padded(prompts, prompt_lens)
    if prompt_lens is not None:
        raise TypeError(
            "prompt_lens goes with prompts given as one padded array; lists have lengths of their own"
        )
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts: expected lists of token ids, or an array [N, L], got {type(prompts).__name__}"
        )
    if not prompts:
        raise ValueError("prompts: expected at least one prompt, got none")
    lists = [_read_prompt(i, prompt) for i, prompt in enumerate(prompts)]
    padded = np.zeros((len(lists), _padded_size(max(map(len, lists)), minimum=16)), np.int32)
    for row, prompt in zip(padded, lists, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(padded), jnp.asarray([len(p) for p in lists], jnp.int32)


def _read_padded(prompts: Any, prompt_lens: Any) -> tuple[Int32[Array, "N L"], Int32[Array, "N"]]:
    tokens = _checks.integers("prompts", prompts)
    if tokens.ndim != 2:
        raise ValueError(f"prompts: expected shape [N, L], got {_checks.describe(tokens)}")
    N, width = tokens.shape
    if N == 0 or width == 0:
        raise ValueError(f"prompts: expected at least one prompt and token, got {_checks.describe(tokens)}")
    lens = per_prompt(
        "prompt_lens", _checks.integers("prompt_lens", width if prompt_lens is None else prompt_lens), N
    )
    if not _checks.is_traced(lens):
        known = np.asarray(lens)
        for n in np.flatnonzero((known < 1) | (known > width))[:1]:
            raise ValueError(f"prompt_lens: expected 1 to {width}, got {known[n]} for prompt {n}")
    if not _checks.is_traced(tokens, lens):
        is_text = np.arange(width) < np.asarray(lens)[:, None]
        lowest = np.where(is_text, np.asarray(tokens), 0).min(axis=1)
        for n in np.flatnonzero(lowest < 0)[:1]:
            raise ValueError(f"prompts[{n}]: token ids must lie in [0, 2**31), got {lowest[n]}")
    return jnp.asarray(tokens), jnp.asarray(lens)


def _read_prompt(index: int, prompt: Any) -> np.ndarray:
    name = f"prompts[{index}]"
    if isinstance(prompt, (str, bytes)):
        raise TypeError(f"{name}: expected token ids, got text; encode it with a tokenizer first")
    if _checks.is_traced(prompt):
        raise TypeError(f"{name}: is traced; inside jit prompts are one array [N, L], with prompt_lens")
    try:
        ids = np.asarray(prompt)
    except ValueError as error:  # lists of unequal lengths
        raise TypeError(f"{name}: expected a list of integers, got {prompt!r}") from error
    if ids.size == 0:
        raise ValueError(f"{name}: expected at least one token, got none")
    past_int64 = ids.dtype == object and all(isinstance(i, int) for i in ids.flat)
    if ids.ndim != 1 or not (past_int64 or np.issubdtype(ids.dtype, np.integer)):
        raise TypeError(f"{name}: expected a list of integers, got {_checks.describe(prompt)}")
    if ids.min() < 0 or ids.max() > INT32_MAX:
        raise ValueError(f"{name}: token ids must lie in [0, 2**31), got {ids.min()} to {ids.max()}")
    return ids


def _read_limits(limits: Any, num_prompts: int, max_new_tokens: int) -> Int32[Array, "N"]:
    """Most new tokens of each prompt. Traced ones are cut to the range, since nothing can raise."""
    given = _checks.integers("limits", max_new_tokens if limits is None else limits)
    if not _checks.is_traced(given) and given.size:
        low, high = int(np.min(given)), int(np.max(given))
        if low < 0 or high > max_new_tokens:
            raise ValueError(f"limits: expected 0 to max_new_tokens={max_new_tokens}, got {low} to {high}")
    return jnp.clip(jnp.asarray(per_prompt("limits", given, num_prompts)), 0, max_new_tokens)


def _read_stop_tokens(stop_tokens: Any, num_prompts: int) -> Int32[Array, "N E"]:
    """Stop tokens as one row a prompt."""

    def is_row(ids):
        return getattr(ids, "ndim", 0) > 0 or isinstance(ids, (list, tuple))

    expected = f"stop_tokens: expected token ids, or a row of them for each of N={num_prompts} prompts"
    if isinstance(stop_tokens, (list, tuple)):
        if any(map(is_row, stop_tokens)):
            if not all(map(is_row, stop_tokens)):
                raise TypeError(f"{expected}, got {stop_tokens!r}")
            rows = [_read_stop_row(f"stop_tokens[{n}]", ids, 1) for n, ids in enumerate(stop_tokens)]
        else:
            rows = [_read_stop_row("stop_tokens", stop_tokens, 1)]
        width = _padded_size(max(row.size for row in rows), minimum=4)
        ids = jnp.stack([jnp.pad(row, (0, width - row.size), constant_values=-1) for row in rows])
        shared = not any(map(is_row, stop_tokens))
    else:
        ids = jnp.asarray(_read_stop_row("stop_tokens", stop_tokens, 2))
        shared = ids.ndim < 2
    if shared:
        return jnp.broadcast_to(ids.reshape(-1), (num_prompts, ids.size))
    if ids.shape[0] != num_prompts:
        raise ValueError(f"{expected}, got {len(ids)} rows")
    return ids


def _read_stop_row(name: str, ids: Any, most_axes: int) -> np.ndarray | jax.Array:
    """Token ids, -1 for padding."""
    ids = _checks.integers(name, ids)
    if ids.ndim > most_axes:
        raise ValueError(
            f"{name}: expected token ids with {most_axes} axes at most, got {_checks.describe(ids)}"
        )
    if not _checks.is_traced(ids) and ids.size and np.min(ids) < -1:
        raise ValueError(f"{name}: expected token ids, or -1 for padding, got {np.min(ids)}")
    return ids


def _read_keys(seeds: Any, key: Any, num_prompts: int, *, drawn: bool) -> UInt32[Array, "N 2"] | None:
    """Each prompt's key: of its seed, or of one key and the prompt's number; None where nothing is drawn."""
    if key is None:
        given = _checks.integers("seeds", np.arange(num_prompts, dtype=np.int32) if seeds is None else seeds)
        each = per_prompt("seeds", given, num_prompts)
        return seed_keys(jnp.asarray(each)) if drawn else None
    if seeds is not None:
        raise TypeError("key and seeds: both say which numbers are drawn; give one of them")
    if isinstance(key, (jax.Array, np.ndarray)):
        if key.dtype == np.uint32:  # a raw key of the default generator
            try:
                key = jax.random.wrap_key_data(jnp.asarray(key))
            except (TypeError, ValueError) as error:
                raise ValueError(f"key: expected one JAX key, got {_checks.describe(key)}") from error
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            if key.shape:
                raise ValueError(f"key: expected one JAX key, got {_checks.describe(key)}")
            return fold_keys(key, num_prompts) if drawn else None
    raise TypeError(
        f"key: expected a JAX key such as jax.random.key(0), got {_checks.describe(key)}; integers are seeds"
    )


def _families(tokens: Int32[Array, "N L"], lens: Int32[Array, "N"], page_size: int) -> Int32[Array, "N"]:
    """For each prompt the lowest one that begins with the same full page, itself if it has no more than a page.

    Sorted by a hash, such prompts are neighbours; where a hash stands for two pages, they may be more families than
    need be, whose members do not know of each other.
    """
    N = tokens.shape[0]
    prompts = jnp.arange(N, dtype=jnp.int32)
    first, longer = tokens[:, :page_size], lens > page_size
    weights = jnp.cumprod(jnp.full(first.shape[1], 0x01000193, jnp.uint32), dtype=jnp.uint32)
    mixed = first.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    hashes = ((mixed ^ mixed >> 15) * weights).sum(axis=1, dtype=jnp.uint32)
    _, order = jax.lax.sort((hashes, prompts), num_keys=1)
    alike = (first[order[1:]] == first[order[:-1]]).all(axis=1) & longer[order[1:]] & longer[order[:-1]]
    begins = jax.lax.cummax(jnp.where(jnp.pad(alike, (1, 0)), 0, prompts))
    return jnp.zeros(N, jnp.int32).at[order].set(order[begins])
