"""Drives the public calls of a cache and the plain-Python model side by side, and compares them after each."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import oracle
import paxcache

TOKENS = 4096  # different tokens; a run never makes so many that a stale one could pass for a new one


def config_of(*groups: paxcache.LayerGroup, **sizes: Any) -> paxcache.CacheConfig:
    """A small config: one float32 group of two layers unless groups are given."""
    if not groups:
        groups = (paxcache.LayerGroup(num_layers=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32),)
    sizes = {"page_size": 4, "num_pages": 10, "max_seqs": 4, "max_pages_per_seq": 4, **sizes}
    return paxcache.CacheConfig(groups=groups, **sizes)


@functools.cache
def token_values(config: paxcache.CacheConfig) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Per layer, the keys [TOKENS, K, D] and values of each token, in the dtype of its group."""
    rng = np.random.default_rng(7)
    values = []
    for group in config.layer_groups:
        for _ in range(group.num_layers):
            k, v = (
                rng.uniform(-1, 1, (TOKENS, group.num_kv_heads, width)).astype(group.dtype)
                for width in (group.head_dim, group.value_dim)
            )
            values.append((k, v if group.value_dim else None))
    return values


def poisoned(cache: paxcache.PagedKVCache) -> paxcache.PagedKVCache:
    """The cache with NaN in every slot: what nobody wrote must never show."""
    groups = [
        dataclasses.replace(g, pages=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), g.pages))
        for g in cache.groups
    ]
    return dataclasses.replace(cache, groups=tuple(groups))


def copy_of(tree):
    """Fresh buffers, so that donating the original leaves the copy alive."""
    return jax.tree.map(jnp.copy, tree)


def _forward(cache, query_lens, k, v, q, num_tokens, max_query_len):
    cache, step = paxcache.extend(cache, query_lens, num_tokens=num_tokens, max_query_len=max_query_len)
    outs = []
    for layer in range(len(k)):
        cache = paxcache.append(cache, layer, k[layer], v[layer], step)
        outs.append(paxcache.attend(cache, layer, q[layer], step))
    return cache, step, outs


def _extend(cache, query_lens, num_tokens, max_query_len):
    return paxcache.extend(cache, query_lens, num_tokens=num_tokens, max_query_len=max_query_len)


@functools.cache
def _compiled(function, donate: bool, static: tuple[int, ...] = ()):
    return jax.jit(function, donate_argnums=(0,) if donate else (), static_argnums=static)


class Driver:
    """A cache, its model, and the same calls made on both. `donate` gives the cache away in each call."""

    num_heads = 2

    def __init__(self, config: paxcache.CacheConfig, *, donate: bool = False):
        self.config, self.donate = config, donate
        self.cache = poisoned(paxcache.init(config))
        groups = [(config.group_num_pages(g), g.sliding_window) for g in config.layer_groups]
        self.model = oracle.Model(
            groups, num_rows=config.max_seqs, max_pages=config.max_pages_per_seq, page_size=config.page_size
        )
        self.next_token = 0
        self.group_of = [g for g, group in enumerate(config.layer_groups) for _ in range(group.num_layers)]

    def _call(self, function, *args, static: tuple[int, ...] = ()):
        return _compiled(function, self.donate, static)(self.cache, *args)

    def extend(
        self, wanted, *, num_tokens: Any = None, max_query_len: Any = None, write: bool = True
    ) -> paxcache.Step:
        """A forward pass: extend, then append and attend in every layer. Without `write`, extend alone."""
        before = [(np.asarray(g.block_tables), np.asarray(g.ref_counts)) for g in self.cache.groups]
        old_lens = list(self.model.lens)
        expected = self.model.extend(wanted, num_tokens=num_tokens, max_query_len=max_query_len)
        lens = jnp.asarray(wanted, jnp.int32)
        shape = (num_tokens,) if num_tokens is not None else (self.config.max_seqs, max_query_len)
        total = int(np.prod(shape))
        if write:
            names = self._name_tokens(expected, old_lens, total)
            k, v, q = self._inputs(names, shape)
            self.cache, step, outs = self._call(
                _forward, lens, k, v, q, num_tokens, max_query_len, static=(5, 6)
            )
        else:
            self.cache, step = self._call(_extend, lens, num_tokens, max_query_len, static=(2, 3))
        self._compare_step(step, expected, old_lens, total)
        for g, (tables, counts) in enumerate(before):
            now = np.asarray(self.cache.groups[g].block_tables)
            fresh = now[(now != tables) & (now >= 0)]
            assert (counts[fresh] == 0).all(), (
                f"group {g}: a page in use, or freed in this call, was handed out"
            )
        if write:
            self._compare_outputs(q, outs, expected, old_lens)
        self.compare()
        return step

    def _name_tokens(self, expected: oracle.StepModel, old_lens, total: int) -> np.ndarray:
        """A name for each token that is stored, -1 for padding and refused rows; the model writes them."""
        names = np.full(total, -1)
        for b, n in enumerate(expected.query_lens):
            for i in range(n):
                names[expected.query_starts[b] + i] = self.next_token
                for g in range(len(self.model.groups)):
                    self.model.write(g, b, old_lens[b] + i, self.next_token)
                self.next_token += 1
        assert self.next_token < TOKENS
        return names

    def _inputs(self, names: np.ndarray, shape):
        """Keys and values of the named tokens, NaN for the others; random queries."""
        rng = np.random.default_rng(self.next_token)
        k, v, q = [], [], []
        for keys, values in token_values(self.config):
            for out, table in ((k, keys), (v, values)):
                if table is None:
                    out.append(None)
                    continue
                rows = np.where((names >= 0)[:, None, None], table[names], np.nan).astype(table.dtype)
                out.append(jnp.asarray(rows.reshape(*shape, *rows.shape[1:])))
            heads = self.num_heads * keys.shape[1]
            q.append(jnp.asarray(rng.standard_normal((*shape, heads, keys.shape[2])).astype(keys.dtype)))
        return k, v, q

    def _compare_step(self, step: paxcache.Step, expected: oracle.StepModel, old_lens, total: int) -> None:
        np.testing.assert_array_equal(step.status, expected.status, "status")
        np.testing.assert_array_equal(step.ok, np.asarray(expected.status) == oracle.OK, "ok")
        np.testing.assert_array_equal(step.pages_short, expected.pages_short, "pages_short")
        np.testing.assert_array_equal(step.query_lens, expected.query_lens, "query_lens")
        np.testing.assert_array_equal(step.seq_lens, expected.seq_lens, "step.seq_lens")
        # Starts past the step's end belong to refused rows; int32 need not hold their sums.
        starts = np.minimum(expected.query_starts, total + 1)
        np.testing.assert_array_equal(np.minimum(step.query_starts, total + 1), starts, "query_starts")
        rows, positions = np.asarray(step.rows).reshape(-1), np.asarray(step.positions).reshape(-1)
        taken = np.zeros(total, bool)
        for b, n in enumerate(expected.query_lens):
            mine = slice(expected.query_starts[b], expected.query_starts[b] + n) if n else slice(0)
            taken[mine] = True
            np.testing.assert_array_equal(rows[mine], b, "rows")
            np.testing.assert_array_equal(positions[mine], old_lens[b] + np.arange(n), "positions")
        assert len(step.slot_mapping) == len(step.block_tables) == len(self.cache.groups)
        size = self.config.page_size
        for g, group in enumerate(self.cache.groups):
            tables, slots = np.asarray(group.block_tables), np.asarray(step.slot_mapping[g]).reshape(-1)
            np.testing.assert_array_equal(step.block_tables[g], tables, "step.block_tables")
            where = tables[rows[taken], positions[taken] // size] * size + positions[taken] % size
            np.testing.assert_array_equal(slots[taken], where, "slot_mapping")
            num_slots = group.ref_counts.shape[0] * size
            idle = slots[~taken]
            assert ((idle < 0) | (idle >= num_slots)).all(), f"padding has slots in the pool: {idle}"

    def _compare_outputs(self, q, outs, expected: oracle.StepModel, old_lens) -> None:
        for layer, (keys, values) in enumerate(token_values(self.config)):
            g = self.group_of[layer]
            out = np.asarray(outs[layer], np.float64).reshape(-1, *outs[layer].shape[-2:])
            queries = np.asarray(q[layer]).reshape(-1, *q[layer].shape[-2:])
            rest = np.ones(len(out), bool)
            for b, n in enumerate(expected.query_lens):
                mine = slice(expected.query_starts[b], expected.query_starts[b] + n) if n else slice(0)
                rest[mine] = False
                held = self.model.tokens(g, b)
                if any(token is None for _, token in held):
                    continue  # reserved and never written: whatever lies there
                names = [token for _, token in held]
                wanted, _ = oracle.attention(
                    queries[mine],
                    keys[names],
                    (keys if values is None else values)[names],
                    old_lens[b] + np.arange(n),
                    [position for position, _ in held],
                    sliding_window=self.model.groups[g].window,
                )
                np.testing.assert_allclose(out[mine], wanted, 1e-5, 1e-5, err_msg=f"layer {layer}, row {b}")
            assert (out[rest] == 0).all(), f"layer {layer}: outputs of padding or refused rows are not zero"

    def fork(self, parents, children) -> None:
        """Forks on both sides."""
        expected = self.model.fork(parents, children)
        self.cache, ok = self._call(
            paxcache.fork, jnp.asarray(parents, jnp.int32), jnp.asarray(children, jnp.int32)
        )
        np.testing.assert_array_equal(ok, expected, "fork: ok")
        self.compare()

    def reorder(self, parents) -> None:
        """Reorders both sides."""
        self.model.reorder(parents)
        self.cache = self._call(paxcache.reorder, jnp.asarray(parents, jnp.int32))
        self.compare()

    def truncate(self, lens) -> None:
        """Truncates both sides."""
        self.model.truncate(lens)
        self.cache = self._call(paxcache.truncate, jnp.asarray(lens, jnp.int32))
        self.compare()

    def release(self, rows) -> None:
        """Releases on both sides."""
        self.model.release(rows)
        self.cache = self._call(paxcache.release, jnp.asarray(rows, bool))
        self.compare()

    def compare(self) -> None:
        """Tables, counts, invariants and every stored token."""
        groups = self.cache.groups
        self.model.assert_matches(
            self.cache.seq_lens, [g.block_tables for g in groups], [g.ref_counts for g in groups]
        )
        held = [np.bincount(list(g.held), minlength=g.num_pages) for g in self.model.groups]
        paxcache.check(self.cache, held=tuple(held))
        self.compare_tokens()

    def compare_tokens(self) -> None:
        """`gather_dense` of every layer gives each row's tokens, and zeros past the end and in holes."""
        max_len = self.config.max_pages_per_seq * self.config.page_size
        for layer, (keys, values) in enumerate(token_values(self.config)):
            dense = _compiled(_gather, False, (1, 2))(self.cache, layer, max_len)
            for found, table, name in zip(dense, (keys, values), "kv", strict=True):
                assert (found is None) == (table is None)
                if found is None or table is None:
                    continue
                wanted = np.zeros((self.config.max_seqs, max_len, *table.shape[1:]), table.dtype)
                for b in range(self.config.max_seqs):
                    for position, token in self.model.tokens(self.group_of[layer], b):
                        wanted[b, position] = found[b, position] if token is None else table[token]
                np.testing.assert_array_equal(found, wanted, f"{name} of layer {layer}")


def _gather(cache, layer: int, max_len: int):
    return paxcache.gather_dense(cache, layer, max_len)
