"""The contract with everything verified that only the host can see. Import it in the library's place:

    from paxcache import checked as paxcache

All names of `paxcache` are here. Functions that take a cache verify, before and after they run, what a compiled
program cannot: that the cache keeps its invariants and that no reference is lost or made up, that a step belongs to the
cache as it is now, that tokens go to pages which their row alone maps. Float pages (and scales by token) that nobody
references are filled with NaN, so that whatever reads them shows; `attend` refuses to return NaN for queries without
any. Such calls read tables and pages on the host: for tests and for debugging, outside jit.

Whoever does not import this module pays nothing for it; there is no switch.

Example:
  >>> import jax.numpy as jnp
  >>> from paxcache import checked as paxcache
  >>> config = paxcache.CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_pages=16, max_seqs=2,
  ...                               max_pages_per_seq=8)
  >>> cache = paxcache.init(config)
  >>> later, step = paxcache.extend(cache, jnp.array([3, 1]), num_tokens=4)
  >>> paxcache.append(cache, 0, jnp.ones((4, 1, 8)), jnp.ones((4, 1, 8)), step)
  Traceback (most recent call last):
  ...
  paxcache._types.StepError: append: step is stale: row 0 has length 0 in the cache, 3 in the step; ...
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _cache, _checks, _inspect
from paxcache import offload as _offload
from paxcache import prefix as _prefix
from paxcache._types import InvariantError, PagedKVCache, Step, StepError


def check_call(function: Callable[..., Any], *, keeps_references: bool = False) -> Callable[..., Any]:
    """A function that takes or returns caches, with everything around a call verified.

    Args:
      function: any function of the library, or one of your own over its states.
      keeps_references: whether references from outside (of a prefix index) are the same before and after.

    Returns:
      The function of the same signature. It raises InvariantError or StepError for what it finds, and TypeError inside
      a JAX transformation.
    """
    name = function.__name__

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        if _checks.is_traced(args, options):
            raise TypeError(f"checked.{name} reads values on the host; inside jit use paxcache.{name}")
        caches, steps = _of_type((args, options), PagedKVCache), _of_type((args, options), Step)
        held = [_verified(name, "before", cache) for cache in caches]
        if name == "reorder":  # a JAX array's values too
            parents = options["parents"] if "parents" in options else args[1]
            args, options = (caches[0],), {"parents": np.asarray(parents)}
        for step in steps:
            _check_step(name, caches[0], step, writes=name == "append")
        result = function(*args, **options)
        for after in _of_type(result, PagedKVCache):
            outside = _verified(name, "after", after)
            if keeps_references and held:
                _compare(name, held[0], outside)
        if name == "attend":
            _check_output(args, options, steps[0], result)
        return _map_caches(poisoned, result)

    return checked


def _of_type(tree: Any, kind: type) -> list[Any]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def _map_caches(function: Callable[[PagedKVCache], PagedKVCache], tree: Any) -> Any:
    def is_cache(x: Any) -> bool:
        return isinstance(x, PagedKVCache)

    return jax.tree.map(lambda x: function(x) if is_cache(x) else x, tree, is_leaf=is_cache)


def _verified(name: str, when: str, cache: PagedKVCache) -> list[np.ndarray]:
    """Checks a cache, and returns each group's references from outside: those that no table explains."""
    held = []
    for group in cache.groups:
        tables, counts = np.asarray(group.block_tables), np.asarray(group.ref_counts)
        P = counts.shape[0]
        mapped = tables[(tables >= 0) & (tables < P)]
        held.append(np.maximum(counts - np.bincount(mapped, minlength=P), 0))
    try:
        _inspect.check(cache, held=tuple(held))
    except InvariantError as error:
        raise InvariantError(f"{when} {name}: {error}") from None
    return held


def _compare(name: str, before: list[np.ndarray], after: list[np.ndarray]) -> None:
    """References from outside must be those from before: a lost page would look like one held from outside."""
    for group, (old, new) in enumerate(zip(before, after, strict=True)):
        for page in np.flatnonzero(old != new):
            raise InvariantError(
                f"{name}: group {group}, page {page}: {old[page]} references from outside before, {new[page]} after"
            )


def _check_step(name: str, cache: PagedKVCache, step: Step, *, writes: bool) -> None:
    """A step must describe the cache as it is; what it writes must lie in pages that the row alone maps."""
    _cache.check_step(cache, step)
    lens, expected = np.asarray(cache.seq_lens), np.asarray(step.seq_lens)
    problems = [
        f"row {b} has length {lens[b]} in the cache, {expected[b]} in the step"
        for b in np.flatnonzero(lens != expected)
    ]
    S = cache.page_size
    rows, positions = np.asarray(step.rows).reshape(-1), np.asarray(step.positions).reshape(-1)
    real = rows < cache.max_seqs
    for g, (group, table, slots) in enumerate(
        zip(cache.groups, step.block_tables, step.slot_mapping, strict=True)
    ):
        now, counts = np.asarray(group.block_tables), np.asarray(group.ref_counts)
        changed = np.flatnonzero((now != np.asarray(table)).any(axis=1))
        problems += [f"group {g}: row {b} maps other pages now" for b in changed]
        if problems or not writes:
            continue
        found, at = np.asarray(slots).reshape(-1)[real], now[rows[real], positions[real] // S]
        wrong = np.flatnonzero((at < 0) | (found != at * S + positions[real] % S))
        problems += [f"group {g}: row {rows[real][i]} would write to foreign slot {found[i]}" for i in wrong]
        shared = np.flatnonzero(counts[np.maximum(at, 0)] > 1)
        problems += [f"group {g}: row {rows[real][i]} would write to shared page {at[i]}" for i in shared]
    if problems:
        raise StepError(f"{name}: step is stale: " + "; ".join(problems[:20]))


def _check_output(args: tuple[Any, ...], options: dict[str, Any], step: Step, out: jax.Array) -> None:
    """NaN from queries without NaN was read in a page that is free, or in a slot that was never written."""
    q = options["q"] if "q" in options else args[2]
    bad = np.isnan(np.asarray(out, np.float32)).any(axis=(-2, -1)) & np.isfinite(
        np.asarray(q, np.float32)
    ).all(axis=(-2, -1))
    if bad.any():
        rows = sorted(set(np.asarray(step.rows)[bad].tolist()))
        raise InvariantError(
            f"attend: NaN in the outputs of rows {rows}: slots were read that nobody wrote (was append skipped for "
            "this layer?), or NaN was written"
        )


def poisoned(cache: PagedKVCache) -> PagedKVCache:
    """The cache with NaN in all float pages that nobody references, and in such pages' scales by token."""
    groups = []
    for group in cache.groups:
        free = group.ref_counts == 0

        def fill(leaf: jax.Array, free: jax.Array = free) -> jax.Array:
            if not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.shape[2:] == (1, 1):
                return leaf  # scales of a layer are the same in all pages
            where = free.reshape(1, -1, *(1,) * (leaf.ndim - 2))
            return jnp.where(where, jnp.asarray(jnp.nan, leaf.dtype), leaf)

        groups.append(dataclasses.replace(group, pages=jax.tree.map(fill, group.pages)))
    return dataclasses.replace(cache, groups=tuple(groups))


def _checked_module(module: types.ModuleType) -> types.SimpleNamespace:
    """The public names of a module; its functions that take a cache verify it."""
    names = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        takes_cache = inspect.isfunction(value) and "cache" in inspect.signature(value).parameters
        names[name] = check_call(value) if takes_cache else value
    return types.SimpleNamespace(**names)


init = check_call(_cache.init)
extend = check_call(_cache.extend, keeps_references=True)
append = check_call(_cache.append, keeps_references=True)
attend = check_call(_cache.attend)
fork = check_call(_cache.fork, keeps_references=True)
reorder = check_call(_cache.reorder, keeps_references=True)
truncate = check_call(_cache.truncate, keeps_references=True)
release = check_call(_cache.release, keeps_references=True)
gather_dense = check_call(_inspect.gather_dense)
prefix = _checked_module(_prefix)
offload = _checked_module(_offload)


def __getattr__(name: str) -> Any:
    """All else of the library, as it is."""
    return getattr(importlib.import_module("paxcache"), name)
