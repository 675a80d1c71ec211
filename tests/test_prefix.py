"""Prefix sharing on the host: what is shared, what is counted, what is evicted, and the faults that others have met.

Keys and values are made from all tokens up to their own and from the extra key, so that a page served to the wrong
prompt shows as a wrong number.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import subprocess
import sys
import threading
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import paxcache
from bench_prefix import belady, conversations, serve_trace
from driver import config_of
from paxcache import offload, prefix
from paxcache.prefix import _host, _index, _keys, _policy, _tree

T = 16


@functools.cache
def value_of(context: Any, tokens: tuple[int, ...]) -> float:
    """What the last token stores: its whole past decides."""
    digest = hashlib.sha256(repr((context, tokens)).encode()).digest()
    return int.from_bytes(digest[:3], "little") / 2**23 - 1


@jax.jit
def _forward(cache, query_lens, values):
    """One step in which a token's keys and values are its number in every layer."""
    cache, step = paxcache.extend(cache, query_lens, num_tokens=T)
    for layer in range(sum(g.pages.k.shape[0] for g in cache.groups)):
        k = jnp.broadcast_to(values[:, None, None], (T, 1, 4))
        cache = paxcache.append(cache, layer, k, k, step)
    return cache, step.status


class World:
    """A cache, an index and what its rows hold."""

    def __init__(self, config: paxcache.CacheConfig, **options: Any):
        self.config = config
        self.cache, self.index = paxcache.init(config), prefix.init(config, **options)
        self.tokens: list[list[int]] = [[] for _ in range(config.max_seqs)]
        self.context: list[Any] = [None] * config.max_seqs
        self.keys: list[Any] = [None] * config.max_seqs

    @property
    def size(self) -> int:
        return self.config.page_size

    def lens(self) -> list[int]:
        return np.asarray(self.cache.seq_lens).tolist()

    def tables(self, group: int = 0) -> np.ndarray:
        return np.asarray(self.cache.groups[group].block_tables)

    def free(self, group: int = 0) -> int:
        return int((np.asarray(self.cache.groups[group].ref_counts) == 0).sum())

    def admit(self, row: int, tokens, *, key: Any = None, **options: Any) -> int:
        tokens = [int(t) for t in tokens]
        self.cache, self.index, reused = prefix.admit(
            self.cache, self.index, row, tokens, extra_key=key, **options
        )
        if reused >= 0:
            self.tokens[row], self.keys[row] = tokens, key
            self.context[row] = (self.index.epoch, key)
        return reused

    def compute(self, row: int, upto: int | None = None) -> int:
        """Computes the row's tokens up to a length; returns the step's status."""
        begin = self.lens()[row]
        end = len(self.tokens[row]) if upto is None else upto
        status = paxcache.Status.OK
        while begin < end and status == paxcache.Status.OK:
            count = min(T, end - begin)
            values = np.zeros(T, np.float32)
            values[:count] = [self.value(row, p) for p in range(begin, begin + count)]
            lens = np.zeros(self.config.max_seqs, np.int32)
            lens[row] = count
            self.cache, statuses = _forward(self.cache, lens, values)
            status, begin = int(statuses[row]), begin + count
        return status

    def value(self, row: int, position: int) -> float:
        return value_of(self.context[row], tuple(self.tokens[row][: position + 1]))

    def publish(self, row: int, **options: Any) -> None:
        self.cache, self.index = prefix.publish(
            self.cache, self.index, row, self.tokens[row], extra_key=self.keys[row], **options
        )

    def serve(self, row: int, tokens, *, key: Any = None, **options: Any) -> int:
        """A whole request: admitted, computed, published, released. Returns the tokens reused."""
        reused = self.admit(row, tokens, key=key)
        assert self.compute(row) == paxcache.Status.OK
        self.publish(row, **options)
        self.release(row)
        return reused

    def release(self, *rows: int) -> None:
        gone = jnp.asarray([row in rows for row in range(self.config.max_seqs)])
        self.cache = paxcache.release(self.cache, gone)
        for row in rows:
            self.tokens[row], self.keys[row], self.context[row] = [], None, None

    def reorder(self, parents) -> None:
        self.cache = paxcache.reorder(self.cache, jnp.asarray(parents, jnp.int32))
        before = list(zip(self.tokens, self.keys, self.context, strict=True))
        rows = [before[parent] if parent >= 0 else ([], None, None) for parent in parents]
        self.tokens, self.keys, self.context = map(list, zip(*rows, strict=True))

    def becomes(self, child: int, parent: int) -> None:
        """After a fork."""
        for rows in (self.tokens, self.keys, self.context):
            rows[child] = rows[parent]

    def evict(self, num_pages: int, **options: Any) -> int:
        self.cache, self.index, freed = prefix.evict(self.cache, self.index, num_pages, **options)
        return freed

    def match(self, tokens, **options: Any) -> int:
        return prefix.match(self.index, tokens, **options).num_tokens

    def check(self) -> None:
        """Every invariant of the cache, every reference, and every stored token."""
        paxcache.check(self.cache, held=prefix.held(self.index))
        lens, layer = self.lens(), 0
        for g, group in enumerate(self.config.layer_groups):
            mapped = np.repeat(self.tables(g) >= 0, self.size, axis=1)
            k, v = paxcache.gather_dense(self.cache, layer, mapped.shape[1])
            for row, length in enumerate(lens):
                where = mapped[row, :length]
                wanted = np.array([self.value(row, p) for p in range(length)], np.float32)[where]
                for found in (k, v):
                    assert found is not None
                    np.testing.assert_array_equal(np.asarray(found)[row, :length, 0, 0][where], wanted)
            layer += group.num_layers


def layer_group(**fields: Any) -> paxcache.LayerGroup:
    return paxcache.LayerGroup(
        **{"num_layers": 1, "num_kv_heads": 1, "head_dim": 4, "dtype": jnp.float32} | fields
    )


def world(*groups: paxcache.LayerGroup, events: bool = False, epoch: int = 0, **sizes: Any) -> World:
    sizes = {"page_size": 4, "num_pages": 24, "max_seqs": 4, "max_pages_per_seq": 8} | sizes
    return World(config_of(*(groups or (layer_group(),)), **sizes), events=events, epoch=epoch)


# What a row gets.


def test_a_second_request_maps_the_pages_of_the_first():
    w = world()
    assert w.admit(0, range(18)) == 0
    w.compute(0)
    w.publish(0)
    used = w.free()
    assert w.admit(1, [*range(16), 90, 91, 92]) == 16
    assert w.free() == used and (w.tables()[1, :4] == w.tables()[0, :4]).all()
    w.compute(1)
    assert w.free() == used - 1
    w.check()


def test_a_partly_agreeing_page_is_shared_until_the_row_writes():
    w = world()
    w.serve(0, range(16))
    free = w.free()
    assert w.admit(1, [*range(10), 77, 78]) == 10
    assert w.free() == free
    shared = w.tables()[1, 2]
    w.compute(1)
    assert w.tables()[1, 2] != shared  # its own copy, with the two tokens before
    w.check()
    assert w.match(range(16)) == 16  # and the stored page as it was
    assert w.admit(2, range(16)) == 15
    w.compute(2)
    w.check()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_one_token_is_always_left(length):
    w = world()
    w.serve(0, range(12))
    assert w.match(range(length)) == length
    assert w.admit(0, range(length)) == length - 1
    w.compute(0)
    w.check()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9])
def test_full_pages_alone(length):
    w = world()
    w.serve(0, range(12))
    assert w.match(range(length), partial=False) == length // 4 * 4
    assert w.admit(0, range(length), partial=False) == (length - 1) // 4 * 4


def test_the_page_that_shares_most_is_chosen():
    w = world()
    for last in ([1, 2, 3, 4], [1, 2, 9, 9], [1, 300, 0, 0], [256, 2, 3, 4]):
        w.serve(0, [5, 5, 5, 5, *last])
    for asked, wanted in [
        ([1, 2, 3, 9], 3), ([1, 2, 9], 3), ([1, 2, 8, 8], 2), ([1, 300, 1], 2), ([256, 3], 1), ([7], 0), ([1, 256], 1),
    ]:  # fmt: skip
        assert w.match([5, 5, 5, 5, *asked]) == 4 + wanted, asked


def test_admit_onto_a_live_row_changes_nothing():
    w = world()
    w.serve(0, range(12))
    w.admit(1, range(30, 40))
    w.compute(1)
    cache, index = w.cache, w.index
    assert w.admit(1, range(12)) == -1
    assert w.cache is cache and w.index.tick == index.tick and w.index.counters == index.counters


def test_only_computed_tokens_are_published():
    w = world()
    w.admit(0, range(16))
    w.publish(0)
    assert w.index.num_entries == 0
    w.compute(0, 7)
    w.publish(0)
    assert w.match(range(16)) == 4
    w.compute(0)
    w.publish(0)
    assert w.match(range(16)) == 16
    w.check()


def test_pages_outlive_their_row_and_its_truncation():
    w = world()
    w.admit(0, range(12))
    w.compute(0)
    w.publish(0)
    w.cache = paxcache.truncate(w.cache, jnp.array([5, 0, 0, 0]))
    w.tokens[0] = [*range(5), 60, 61, 62]
    w.compute(0)  # writes into a copy
    w.check()
    assert w.match(range(12)) == 12
    w.publish(0)
    assert w.match([*range(5), 60, 61, 62]) == 8
    w.release(0)
    assert w.admit(1, range(12)) == 11
    w.check()


def test_duplicates_fold():
    w = world()
    for row in range(3):
        assert w.admit(row, range(10)) == 0
        w.compute(row)
    assert w.free() == 24 - 9
    w.cache, w.index = prefix.publish_rows(w.cache, w.index, range(3), w.tokens[:3])
    assert w.free() == 24 - 2 - 3
    assert w.index.num_entries == 2 and w.index.counters.pages_folded == 4
    assert (w.tables()[:3, :2] == w.tables()[0, :2]).all()
    for row in range(3):
        w.compute(row)
    w.check()


def test_rows_at_once_are_rows_one_by_one():
    one, many = world(), world()
    prompts = [list(range(9)), list(range(13)), [*range(6), 50, 51]]
    for w in (one, many):
        w.serve(3, range(8))
    reused = [one.admit(row, p) for row, p in enumerate(prompts)]
    many.cache, many.index, batch = prefix.admit_rows(many.cache, many.index, [0, 1, 2, 3], [*prompts, [1]])
    assert batch.tolist() == [*reused, 0]
    many.tokens[:3], many.context[:3] = prompts, one.context[:3]
    many.tokens[3], many.context[3] = [1], (0, None)
    for row in range(3):
        one.compute(row)
        many.compute(row)
        one.publish(row)
    many.cache, many.index = prefix.publish_rows(many.cache, many.index, range(3), prompts)
    for p in prompts:
        wanted = len(p) // 4 * 4
        assert one.match(p, partial=False) == many.match(p, partial=False) == wanted
    one.check()
    many.check()


def test_forked_rows_publish_what_they_share_once():
    w = world()
    w.admit(0, range(8))
    w.compute(0)
    w.cache, _ = paxcache.fork(w.cache, jnp.array([0]), jnp.array([1]))
    w.tokens[1], w.context[1] = [*range(8), 1, 2, 3, 4], w.context[0]
    w.compute(1)
    w.publish(1)
    w.publish(0)
    assert w.index.num_entries == 3 and w.index.counters.pages_folded == 0
    w.check()


def test_a_prompt_longer_than_a_row():
    w = world(max_pages_per_seq=2)
    w.serve(0, range(8))
    assert w.admit(0, range(40)) == 8
    assert w.admit(1, []) == 0 and w.match([]) == 0


def test_snapshots_stay_what_they_were():
    w = world()
    w.serve(0, range(12))
    old = w.index
    w.serve(0, [*range(6), *range(50, 60)])
    w.evict(100)
    assert w.index.num_entries == 0
    assert prefix.match(old, range(12)).num_tokens == 12
    assert prefix.match(old, [*range(6), 50]).num_tokens == 6
    assert old.num_entries == 3


def test_donated_caches_are_served_too():
    w = world()
    w.serve(0, range(12))
    step = jax.jit(lambda cache, lens: paxcache.extend(cache, lens, num_tokens=4)[0], donate_argnums=0)
    w.admit(1, range(12))
    w.cache = step(w.cache, jnp.array([0, 1, 0, 0]))
    w.publish(1)
    w.evict(1)
    paxcache.check(w.cache, held=prefix.held(w.index))


# Sequences of calls that are easily got wrong.


def test_publish_after_truncate():
    """What a row gave up is not offered, whether the page was its own or stored, and what it computed then is."""
    w = world()
    w.admit(0, range(14))
    w.compute(0)
    w.cache = paxcache.truncate(w.cache, jnp.array([7, 0, 0, 0]))
    w.publish(0)
    assert w.match(range(14)) == 4
    w.tokens[0] = [*range(7), *range(60, 67)]
    w.compute(0)
    w.publish(0)
    assert w.match(range(14)) == 7 and w.match(w.tokens[0]) == 12
    w.cache = paxcache.truncate(w.cache, jnp.array([8, 0, 0, 0]))  # at the end of a stored page
    w.tokens[0] = [*range(7), 60, *range(80, 84)]
    w.compute(0)
    w.publish(0)
    assert w.match([*range(7), *range(60, 67)]) == 12 and w.match(w.tokens[0]) == 12
    assert w.index.num_entries == 4 and w.index.counters.pages_folded == 0
    w.check()


def test_admit_where_the_parent_was_evicted():
    """Of a prompt whose end somebody computed, the beginning went: it is computed and stored again, from the first."""
    w = world()
    prompt = [*range(12), 50, 51, 52, 53]
    w.serve(0, range(12))
    w.admit(0, prompt)
    w.compute(0)  # not published yet: its last page hangs below nothing
    w.cache, w.index = prefix.reset(w.cache, w.index)
    w.serve(1, range(8))
    w.evict(1)
    assert w.admit(1, prompt) == 4
    w.publish(0)  # the evicted parents come back with it, and its first page folds
    assert w.match(prompt) == 16 and w.index.num_entries == 4 and w.index.counters.pages_folded == 1
    w.compute(1)
    w.publish(1)
    assert (w.tables()[0, :4] == w.tables()[1, :4]).all()
    w.check()
    w.release(0, 1)
    assert w.evict(100) == 4 and w.free() == 24


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    size=st.integers(1, 3),
    num_tokens=st.integers(1, 3),
    calls=st.lists(
        st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=6), st.integers(0, 5)),
        min_size=4,
        max_size=20,
    ),
)
def test_tiny_alphabets_and_pages(size, num_tokens, calls):
    """The entries are known by asking for every text: prompts that agree all the time, pages of one token.

    An evicted key never matches, and what is left has all of its beginning.
    """
    w = world(page_size=size, num_pages=30, max_seqs=2, max_pages_per_seq=6, events=True)
    texts, stored = {()}, set()
    for base, tail, evicted in calls:
        before = sorted(texts)[base * len(texts) // 4]
        tokens = [*before, *(t % num_tokens for t in tail)][: 6 * size]
        pages = [tuple(tokens[: n * size]) for n in range(1, len(tokens) // size + 1)]
        known = sum(page in stored for page in pages) * size
        assert prefix.match(w.index, tokens, partial=False).num_tokens == known
        assert w.serve(0, tokens) >= min(known, max(len(tokens) - 1, 0))
        texts.add(tuple(tokens))
        stored |= set(pages)
        w.evict(evicted)
        gone = set()
        w.index, events = prefix.take_events(w.index)
        for event in events:
            assert isinstance(event, (prefix.Stored, prefix.Removed))
            gone = gone | set(event.keys) if isinstance(event, prefix.Removed) else gone - set(event.keys)
        left = set()
        for text in texts:
            found = prefix.match(w.index, text, partial=False)
            assert not gone & set(found.keys)
            left |= {text[: n * size] for n in range(1, found.num_tokens // size + 1)}
        assert len(stored) - len(left) <= evicted and left <= stored
        assert len(left) == w.index.num_entries == 30 - w.free()
        stored = left
        paxcache.check(w.cache, held=prefix.held(w.index))


def test_with_room_for_everything_reuse_is_that_of_the_oracle():
    """The benchmark's conversations, request by request; and no policy beats the optimum."""
    requests = conversations(40, seed=1)
    rate, stored = serve_trace(requests, num_pages=2048, partial=True, check=True)
    assert 0 <= rate - belady(requests, num_pages=2048) < 0.05  # which counts full pages alone
    rate, _ = serve_trace(requests, num_pages=stored // 4)
    assert 0 < rate < belady(requests, num_pages=stored // 4) < belady(requests, num_pages=2048)


# Groups and windows.


def test_all_groups_move_together():
    w = world(layer_group(), layer_group(num_layers=2, num_pages=12))
    w.serve(0, range(12))
    assert w.admit(1, range(11)) == 10
    w.compute(1)
    w.check()
    w.release(1)
    assert w.evict(2) == 2 and (w.free(0), w.free(1)) == (23, 11)
    w.check()


WINDOWED = (layer_group(), layer_group(sliding_window=6, num_pages=16))


def test_a_window_keeps_what_its_next_token_sees():
    """Prefill in one step keeps all pages; a prefix of any length can be used, and only its window is mapped."""
    w = world(*WINDOWED)
    w.admit(0, range(16))
    w.compute(0)
    w.publish(0)
    assert w.admit(1, range(14)) == 13
    assert (w.tables(0)[1, :4] >= 0).all()
    assert (w.tables(1)[1, :4] >= 0).tolist() == [False, False, True, True]
    w.check()
    w.compute(1)
    w.check()


def test_pages_that_a_window_gave_back_cut_the_match():
    """Computed four tokens a step, the window's pages on the left are gone: only lengths near the end can be used."""
    w = world(*WINDOWED)
    w.admit(0, range(24))
    for end in range(4, 25, 4):
        w.compute(0, end)
    w.publish(0)
    assert (w.tables(1)[0] >= 0).sum() == 3
    assert w.index.num_entries == 6
    assert w.match(range(24)) == 24
    assert w.match(range(20)) == 20
    assert w.match(range(16)) == 0  # its window needs the third page, which is gone
    assert w.admit(1, range(24)) == 23
    w.check()
    # Another row that computes the beginning gives the missing pages to the entries.
    assert w.admit(2, range(12)) == 0
    w.compute(2)
    w.publish(2)
    assert w.match(range(12)) == 12 and w.match(range(16)) == 16
    w.check()
    w.release(0, 1, 2)
    w.evict(100)
    assert (w.free(0), w.free(1)) == (24, 16)


# Keys that keep prompts apart.


def test_extra_keys_isolate():
    w = world()
    keys = [None, "a", "b", b"a", 1, ("a", 1), ("a", "1"), ("a",), ()]
    w.serve(0, range(8), key="a")
    for key in keys:
        assert w.match(range(8), extra_key=key) == (8 if key == "a" else 0), key
        assert w.match([0], extra_key=key) == (1 if key == "a" else 0), key
    w.check()


@pytest.mark.parametrize("key", [1.5, True, ["a"], {"a": 1}, ("a", None, 2.0)])
def test_extra_keys_are_stable_values(key):
    with pytest.raises(TypeError, match="extra_key: expected None, str, bytes, int or tuples"):
        prefix.match(world().index, range(8), extra_key=key)


def image(offset, length, content="cat"):
    return prefix.ExtraKey(items=(prefix.Item(content, offset, length),))


def test_an_item_belongs_to_the_pages_with_its_tokens():
    w = world()
    w.serve(0, range(16), key=image(2, 6))  # the first two pages
    assert w.match(range(16), extra_key=image(2, 6)) == 16
    assert w.match(range(16), extra_key=image(2, 6, "dog")) == 0
    assert w.match(range(16)) == 0
    assert w.match(range(4), extra_key=image(2, 6)) == 4
    w.serve(0, range(20, 36), key=image(4, 4))
    assert w.match(range(20, 36), extra_key=image(4, 4, "dog")) == 4  # the first page is plain text
    assert w.match(range(20, 36)) == 4
    assert w.match(range(20, 36), extra_key=image(4, 5)) == 4


def test_an_item_that_ends_at_a_pages_start_does_not_belong_to_it():
    keys = [
        prefix.page_keys(range(12), page_size=4, extra_key=prefix.ExtraKey(items=items))
        for items in ((), (prefix.Item("cat", 4, 4),), (prefix.Item("cat", 4, 5),))
    ]
    assert [a == b for a, b in zip(keys[0], keys[1], strict=True)] == [True, False, False]
    from paxcache.prefix import _keys

    for end, pages in ((7, {1}), (8, {1}), (9, {1, 2})):
        item = prefix.Item("cat", 4, end - 4)
        made = _keys.prompt(list(range(12)), page_size=4, extra_key=prefix.ExtraKey(items=(item,)), epoch=0)
        assert set(made.extras) == pages


def test_items_beside_partial_pages():
    w = world()
    w.serve(0, range(8))
    assert w.match(range(8), extra_key=image(6, 2)) == 6  # plain text up to the image
    w.serve(0, [*range(4), *range(40, 44)], key=image(6, 2))
    assert w.match([*range(4), 40, 41]) == 4  # a page with part of an item is shared whole or not at all
    w.check()


def test_items_in_any_order_are_one_key():
    a, b = prefix.Item("cat", 0, 2), prefix.Item("dog", 4, 2)
    assert prefix.ExtraKey(items=(a, b)) == prefix.ExtraKey(items=(b, a))
    with pytest.raises(ValueError, match="items: length must be at least 1"):
        prefix.ExtraKey(items=(prefix.Item("cat", 0, 0),))
    with pytest.raises(TypeError, match="items: content must be str or bytes"):
        prefix.ExtraKey(items=(prefix.Item(3, 0, 1),))  # type: ignore[arg-type]


# Faults that others have met.


def test_prefix_hash_collisions_serve_another_users_text(monkeypatch):
    """GHSA-rm76-4mrf-v9r8. Even if every SHA-256 were the same, nothing stored for one prompt reaches another."""

    class Collides:
        def digest(self):
            return bytes(32)

    monkeypatch.setattr(hashlib, "sha256", lambda data: Collides())
    keys = prefix.page_keys(range(8), page_size=4)
    assert keys == (bytes(32),) * 2
    monkeypatch.setattr("test_prefix.value_of", lambda context, tokens: float(sum(tokens) % 97) / 97)
    w = world()
    w.serve(0, range(8), key="a")
    assert w.match(range(8), extra_key="b") == 0
    assert w.match([3, *range(7)], extra_key="a") == 0
    assert w.serve(1, [0, 1, 2, 9, 4, 5, 6, 7], key="a") == 3
    assert w.match(range(8), extra_key="a") == 8
    w.check()


def test_per_process_hash_seeds_that_never_hit():
    """LMCache#1139. Keys are the same in a process with another hash seed, and on any machine."""
    key = prefix.ExtraKey(salt=("tenant", 7, b"\x00"), items=(prefix.Item("cat", 3, 2),))
    keys = prefix.page_keys(range(8), page_size=4, extra_key=key, epoch=3)
    program = (
        "from paxcache.prefix import ExtraKey, Item, page_keys\n"
        "key = ExtraKey(salt=('tenant', 7, b'\\0'), items=(Item('cat', 3, 2),))\n"
        "print(*(k.hex() for k in page_keys(range(8), page_size=4, extra_key=key, epoch=3)))"
    )
    for seed in ("1", "2"):
        answer = subprocess.run(
            [sys.executable, "-c", program],
            env={
                "PYTHONHASHSEED": seed,
                "JAX_PLATFORMS": "cpu",
                "PATH": "",
                "PYTHONPATH": ":".join(sys.path),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert answer == [k.hex() for k in keys]
    w = world(epoch=3)
    w.serve(0, range(8), key=key)
    assert prefix.match(w.index, range(8), extra_key=key).keys == keys


def test_keys_name_tokens_parents_extra_keys_and_epochs():
    def last(tokens=(1, 2, 3, 4), **options):
        return prefix.page_keys(tokens, page_size=2, **options)[-1]

    names = [last(), last((1, 2, 3, 5)), last((1, 9, 3, 4)), last(extra_key="a"), last(epoch=1), last((3, 4))]
    assert len(set(names)) == len(names)
    assert last((1, 2, 3, 4, 5)) == last()


def test_stale_hash_after_eviction():
    """vllm PR#4764. What was evicted is found neither whole nor in part, and its pages serve others at once."""
    w = world(num_pages=3)
    w.serve(0, range(12))
    assert w.evict(3) == 3 and w.match(range(12)) == 0 and w.free() == 3
    w.serve(1, range(50, 62))
    assert w.match(range(12)) == 0 and w.match(range(50, 62)) == 12
    w.check()


def test_stale_prefixes_after_a_weight_update():
    """NeMo-RL PR#4018. Neither what was stored nor what is still being computed with old weights is offered."""
    w = world()
    w.serve(0, range(8))
    w.admit(1, range(8))
    w.compute(1)
    w.admit(2, range(20, 32))
    w.compute(2, 8)
    w.index = prefix.new_epoch(w.index)
    assert w.match(range(8)) == 0 and w.match([0]) == 0
    w.publish(1)
    w.compute(2)
    w.publish(2)
    assert w.match(range(8)) == 0 and w.match(range(20, 32)) == 0
    w.release(1, 2)
    assert w.serve(2, range(8)) == 0
    assert w.match(range(8)) == 8
    assert w.evict(2) == 2  # what nobody can reach goes first
    assert w.match(range(8)) == 8
    w.check()


def test_a_fork_of_a_row_begun_under_old_weights_offers_nothing():
    """Its row was admitted under the new weights before, and others computed its prompt again under them."""
    w = world()
    prompt = list(range(8))
    w.admit(0, [*prompt, *range(50, 58)])
    w.compute(0, 9)
    w.publish(0)
    w.index = prefix.new_epoch(w.index)
    assert w.serve(1, prompt) == 0
    w.cache, _ = paxcache.fork(w.cache, jnp.array([0]), jnp.array([1]))
    w.tokens[1], w.context[1] = w.tokens[0], w.context[0]
    w.compute(1)
    tables = w.tables()[1].tolist()
    w.publish(1)
    assert w.tables()[1].tolist() == tables  # its pages are its own: those stored are of other weights
    assert w.match([*prompt, *range(50, 58)]) == 8
    w.check()


@pytest.mark.parametrize("how", ["fork", "reorder", "resume"])
@pytest.mark.parametrize("stale", [False, True])
def test_rows_keep_their_epoch_whatever_row_they_move_to(how, stale):
    """One that the new weights had before, live or released, cannot publish what the old ones computed."""
    w, prompt = world(), list(range(8))
    w.index = prefix.new_epoch(w.index, 5)
    w.admit(0, prompt)
    w.compute(0)
    w.index = prefix.new_epoch(w.index, 6) if stale else w.index
    w.serve(1, range(50, 58))
    if how == "fork":
        w.cache, _ = paxcache.fork(w.cache, jnp.array([0]), jnp.array([1]))
        w.becomes(1, 0)
    elif how == "reorder":
        w.admit(1, range(60, 68))
        w.compute(1)
        w.reorder([-1, 0, 2, 3])
    else:
        w.cache, host, ticket = offload.preempt(w.cache, offload.init(w.config, 8), jnp.array([0]))
        assert np.asarray(w.cache.epochs).tolist() == [0, 0, 0, 0]
        w.admit(1, [])  # in the new epoch, and still idle
        w.cache, _, ok = offload.resume(w.cache, host, ticket, jnp.array([1]))
        assert ok
        w.becomes(1, 0)
    assert np.asarray(w.cache.epochs)[1] == 6
    w.publish(1)
    assert w.match(prompt) == (0 if stale else 8)
    w.check()


def test_a_released_row_has_no_epoch_and_one_rolled_back_keeps_it():
    w = world()
    w.index = prefix.new_epoch(w.index)
    w.admit(0, range(8))
    w.admit(1, range(50, 58))
    w.compute(0)
    w.cache = paxcache.truncate(w.cache, jnp.array([0, 0, 0, 0]))
    w.compute(0)
    w.publish(0)
    assert w.match(range(8)) == 8
    w.cache = paxcache.release(w.cache, jnp.array([False, True, False, False]))
    w.compute(1)
    w.publish(1)
    assert w.match(range(50, 58)) == 0


def test_epochs_fit_int32():
    w = world(epoch=2**31 - 2)
    w.serve(0, range(8))
    assert w.match(range(8)) == 8
    for make in (lambda: prefix.new_epoch(w.index), lambda: prefix.init(w.config, epoch=2**31 - 1)):
        with pytest.raises(ValueError, match=r"epoch: must be below 2147483647 .*, got 2147483647"):
            make()


def test_a_cache_put_together_without_epochs_has_rows_that_were_not_admitted():
    w = world()
    w.cache = paxcache.PagedKVCache(w.cache.seq_lens, w.cache.groups)
    w.tokens[0], w.context[0] = list(range(8)), (0, None)
    w.compute(0)
    assert w.cache.epochs is None
    w.publish(0)
    assert w.admit(1, range(9)) == 8
    assert np.asarray(w.cache.epochs).tolist() == [0, 1, 0, 0]


def test_a_cache_put_together_without_epochs_keeps_its_structure():
    """As the carry of a loop must; only admitting gives it some."""
    whole = paxcache.init(config_of())
    cache = paxcache.PagedKVCache(whole.seq_lens, whole.groups)

    def body(_, cache):
        cache, _ = paxcache.extend(cache, jnp.array([3, 0, 0, 0]), num_tokens=3)
        cache, _ = paxcache.fork(cache, jnp.array([0]), jnp.array([1]))
        cache = paxcache.truncate(paxcache.reorder(cache, jnp.array([0, 1, 1, -1])), jnp.full(4, 2))
        return paxcache.release(cache, jnp.array([False, True, True, True]))

    cache = jax.lax.fori_loop(0, 3, body, cache)
    assert cache.epochs is None and cache.seq_lens.tolist() == [2, 0, 0, 0]
    paxcache.check(cache)


def test_rows_never_admitted_publish_in_the_first_epoch_alone():
    w = world()
    w.tokens[0], w.context[0] = list(range(8)), (0, None)
    w.compute(0)
    w.publish(0)
    assert w.match(range(8)) == 8
    w.index = prefix.new_epoch(w.index, 7)
    w.reorder([0, 0, 2, 3])
    for row in (0, 1):
        w.publish(row)
    assert w.match(range(8)) == 0 and w.index.epoch == 7
    with pytest.raises(ValueError, match="epoch must be at least 8, got 7"):
        prefix.new_epoch(w.index, 7)


def test_allocate_zero_takes_everything():
    """FastDeploy's `[-0:]`. Evicting nothing, and needing nothing, frees nothing."""
    w = world()
    w.serve(0, range(16))
    assert w.evict(0) == 0
    w.cache, w.index, freed = prefix.make_room(w.cache, w.index, jnp.zeros(4, jnp.int32), num_tokens=4)
    assert freed == 0
    w.cache, w.index, reused = prefix.admit_rows(w.cache, w.index, [], [])
    w.cache, w.index = prefix.publish_rows(w.cache, w.index, [], [])
    assert reused.shape == (0,) and w.free() == 20 and w.match(range(16)) == 16
    with pytest.raises(ValueError, match="num_pages must be at least 0, got -1"):
        w.evict(-1)


def test_nodes_lost_to_eviction():
    """FastDeploy lost nodes. While anything hangs below a page it stays, and what is left is always found."""
    w = world()
    w.serve(0, range(16))
    w.serve(0, [*range(8), *range(60, 68)])
    w.admit(1, range(16))  # uses the older branch to its end
    for left in (3, 2, 1, 0):
        w.evict(1)
        assert w.match([*range(8), *range(60, 68)]) == 8 + 4 * max(left - 2, 0)
        assert w.match(range(16)) == 16
        w.check()
    w.release(1)
    assert w.evict(100) == 4 and w.free() == 24
    assert w.index.nodes is None and w.index.edges is None and not any(t for _, t in w.index.orders)


# Eviction.


def test_never_a_page_in_use():
    w = world()
    w.admit(0, range(8))
    w.compute(0)
    w.publish(0)
    w.serve(1, range(50, 58))
    assert w.evict(100) == 2
    assert w.match(range(8)) == 8 and w.match(range(50, 58)) == 0
    w.check()


def test_exactly_as_many_as_asked():
    w = world()
    w.serve(0, range(32))
    w.serve(0, range(50, 70))
    for count in (1, 3, 2, 5):
        before = w.free()
        assert w.evict(count) == count and w.free() == before + count
    w.check()


def test_make_room_frees_exactly_what_extend_lacks():
    w = world(num_pages=8)
    w.serve(0, range(16))
    w.serve(0, range(50, 62))
    assert w.free() == 1
    w.admit(1, [*range(6), 9])  # needs a copy of the shared page besides two pages
    w.tokens[1] = [*range(6), *range(70, 77)]
    lens = jnp.array([5, 7, 99, 0])
    w.cache, w.index, freed = prefix.make_room(w.cache, w.index, lens, num_tokens=12)
    assert freed == 2 + 3 - 1 and w.free() == 2 + 3  # row 2 can never fit: it needs none
    _, step = paxcache.extend(w.cache, lens, num_tokens=12)
    assert step.ok.tolist() == [True, True, False, True]
    paxcache.check(w.cache, held=prefix.held(w.index))


@pytest.mark.parametrize("aligned", [False, True])
def test_extend_serves_all_after_make_room(aligned):
    w = world(*WINDOWED, num_pages=8)
    w.serve(0, range(16))
    w.serve(0, range(50, 66))
    w.admit(1, [*range(6), 9])
    how: Any = {"max_query_len": 9} if aligned else {"num_tokens": 20}
    lens = jnp.array([9, 6, 0, 3])
    w.cache, w.index, freed = prefix.make_room(w.cache, w.index, lens, **how)
    assert freed == 3 + 2 + 1 and w.free() == freed
    assert paxcache.extend(w.cache, lens, **how)[1].ok.all()
    w.cache, w.index, freed = prefix.make_room(w.cache, w.index, lens, **how)
    assert freed == 0
    paxcache.check(w.cache, held=prefix.held(w.index))


PROMPTS = [[n] * 4 for n in range(4)]


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("lru", [1, 3, 0, 2]),
        ("lfu", [1, 3, 2, 0]),
        ("fifo", [0, 1, 2, 3]),
        ("slru", [1, 3, 0, 2]),
        ("priority", [3, 1, 0, 2]),
    ],
)
@pytest.mark.parametrize("built", ["before", "after"])
def test_policies(policy, order, built):
    """Four prompts in order, the last of lower priority; then the first is reused twice and the third once."""
    w = world()
    if built == "before":
        w.evict(0, policy=policy)
    for n, prompt in enumerate(PROMPTS):
        w.serve(0, prompt, priority=1 if n < 3 else 0)
    for n in (0, 0, 2):
        w.admit(1, [*PROMPTS[n], 9])
        w.release(1)
    left, gone = [0, 1, 2, 3], []
    while left:
        assert w.evict(1, policy=policy) == 1
        gone += [n for n in left if w.match(PROMPTS[n]) == 0]
        left = [n for n in left if w.match(PROMPTS[n])]
        w.check()
    assert gone == order
    with pytest.raises(ValueError, match="policy: expected one of lru, lfu, fifo, slru, priority, got 'mru'"):
        w.evict(1, policy="mru")


def test_slru_outlasts_a_scan_and_bounds_what_it_protects():
    w = world()
    w.serve(0, PROMPTS[0])
    w.admit(1, [*PROMPTS[0], 9])
    w.release(1)
    for n in range(10, 14):  # a scan of prompts that nobody asks for again
        w.serve(0, [n] * 4)
    assert w.evict(4, policy="slru") == 4 and w.match(PROMPTS[0]) == 4
    for n in range(1, 4):
        w.serve(0, PROMPTS[n])
        w.admit(1, [*PROMPTS[n], 9])
        w.release(1)
    w.serve(0, [8] * 4)
    w.evict(1, policy="slru")  # 4 of 5 pages are protected: no more than 80 %
    assert w.match([8] * 4) == 0
    w.admit(1, [*PROMPTS[0], 9])
    w.release(1)
    w.evict(1, policy="slru")
    assert w.match(PROMPTS[0]) == 4 and w.match(PROMPTS[1]) == 0


def grow(w, row: int, tokens, **options: Any) -> None:
    """Goes on in a row by some tokens and publishes them."""
    w.tokens[row] += tokens
    w.compute(row)
    w.publish(row, **options)


def num_nodes(w) -> int:
    return sum(1 for _ in _tree.items(w.index.nodes))


def test_publishing_after_every_page_does_not_make_every_page_a_node():
    w = world(page_size=2, num_pages=200, max_pages_per_seq=200, max_seqs=1)
    w.admit(0, [])
    w.context[0] = (0, None)
    for n in range(130):
        grow(w, 0, [n, n])
    assert w.index.num_entries == w.index.counters.pages_stored == 130
    assert num_nodes(w) == 3  # of 64, 64 and 2 pages
    everything = [t for n in range(130) for t in (n, n)]
    assert w.match(everything) == 260
    found = prefix.match(w.index, everything)
    assert found.keys == prefix.page_keys(everything, page_size=2)
    assert found.ids[:, 0].tolist() == w.tables()[0, :130].tolist()
    w.release(0)
    assert w.evict(3) == 3 and w.match(everything) == 254
    w.check()


def test_pages_that_count_differently_stay_apart():
    w = world(num_pages=64, max_pages_per_seq=32)
    w.serve(0, [1] * 4)
    w.admit(0, [1] * 5)  # the first page was reused, what follows was not
    grow(w, 0, [1] * 3)
    assert num_nodes(w) == 2
    grow(w, 0, [1] * 4)
    assert num_nodes(w) == 2
    grow(w, 0, [1] * 4, priority=3)  # the pages before it get it too
    assert num_nodes(w) == 2
    w.index, _ = prefix.pin(w.index, [1] * 16)
    grow(w, 0, [1] * 4)
    assert num_nodes(w) == 3
    w.check()


def test_pages_of_one_run_keep_their_own_ages():
    """First in, first out: a page stored later goes later, whatever run it lies in."""
    w = world()
    w.evict(0, policy="fifo", now=0)
    a, b = [0] * 12, [1] * 4
    w.admit(0, [])
    w.context[0] = (0, None)
    grow(w, 0, a[:8], now=0)
    w.serve(1, b, now=10)
    grow(w, 0, a[8:], now=16)
    assert num_nodes(w) == 2
    w.release(0)
    gone = []
    for _ in range(4):
        before = w.match(a), w.match(b)
        assert w.evict(1, policy="fifo", now=20) == 1
        gone.append("ab"[before[0] == w.match(a)])
        w.check()
    assert gone == ["b", "a", "a", "a"]
    lifetimes = w.index.counters.lifetimes  # 10, 4, and twice 20
    assert (lifetimes[4], lifetimes[3], lifetimes[5], sum(lifetimes)) == (1, 1, 2, 4)


def test_a_run_that_is_cut_in_two_keeps_the_ages_of_both_parts():
    w = world()
    w.evict(0, policy="fifo", now=0)
    w.admit(0, [])
    w.context[0] = (0, None)
    for n in range(4):
        grow(w, 0, [n] * 4, now=n * 8)
    w.release(0)
    w.serve(1, [0, 0, 0, 0, 1, 1, 1, 1, 7, 7, 7, 7], now=32)  # shares two of the four pages
    assert num_nodes(w) == 3
    assert w.evict(5, policy="fifo", now=64) == 5
    lifetimes = w.index.counters.lifetimes  # 64, 56, 48, 40 and 32
    assert (lifetimes[7], lifetimes[6], sum(lifetimes)) == (1, 4, 5)


def test_time_to_live():
    w = world()
    w.serve(0, PROMPTS[0], priority=9, ttl=10, now=100)
    w.serve(0, PROMPTS[1], priority=0)
    w.serve(0, PROMPTS[2], priority=5, ttl=5)
    old = w.cache, w.index
    w.evict(1, policy="priority", now=104)
    assert [w.match(p) for p in PROMPTS[:3]] == [4, 0, 4]
    w.cache, w.index = old
    w.evict(1, policy="priority", now=105)
    assert [w.match(p) for p in PROMPTS[:3]] == [4, 4, 0]
    w.evict(1, policy="priority", now=110)
    assert [w.match(p) for p in PROMPTS[:3]] == [0, 4, 0]
    with pytest.raises(ValueError, match=r"now: expected a finite time, 110.0 or later, got 7"):
        w.evict(1, now=7)
    with pytest.raises(ValueError, match="ttl: expected at least 0, got -1"):
        w.publish(0, ttl=-1)


def test_a_longer_life_and_a_higher_priority_count():
    w = world()
    w.serve(0, PROMPTS[0], priority=3, ttl=50)
    w.serve(0, PROMPTS[0], priority=1, ttl=5)
    w.serve(0, PROMPTS[1], priority=2)
    w.evict(1, policy="priority", now=20)
    assert [w.match(p) for p in PROMPTS[:2]] == [4, 0]


def test_pinned_prefixes_stay():
    w = world()
    w.serve(0, range(16))
    w.serve(0, [*range(8), 50, 51, 52, 53])
    w.index, pin = prefix.pin(w.index, [*range(8), 99])
    assert pin.num_tokens == 8
    w.index, longer = prefix.pin(w.index, [*range(8), 50, 51, 52, 53])
    assert w.evict(100) == 2
    assert w.match(range(16)) == 8 and w.match([*range(8), 50, 51, 52, 53]) == 12
    w.index, again = prefix.pin(w.index, range(8))
    w.index = prefix.unpin(w.index, longer)
    assert w.evict(100) == 1
    w.index = prefix.unpin(w.index, pin)
    assert w.evict(100) == 0
    w.serve(0, range(12))  # the pinned page gets a child and loses it
    assert w.evict(100) == 1
    w.index = prefix.unpin(w.index, again)
    assert w.evict(100) == 2
    w.index, none = prefix.pin(w.index, range(8))
    assert none.num_tokens == 0
    assert prefix.unpin(w.index, none) is w.index and prefix.unpin(w.index, pin) is w.index
    w.check()


def test_pins_end_with_their_epoch():
    w = world()
    w.serve(0, range(8))
    w.index, pin = prefix.pin(w.index, range(8))
    w.index = prefix.new_epoch(w.index)
    assert w.evict(100) == 2
    assert prefix.unpin(w.index, pin) is w.index
    w.check()


def test_a_pinned_node_that_is_cut_in_two_keeps_its_pin():
    w = world()
    w.serve(0, range(16))
    w.index, pin = prefix.pin(w.index, range(16))
    w.serve(0, [*range(8), 50, 51, 52, 53])
    assert w.evict(100) == 1 and w.match(range(16)) == 16
    w.index = prefix.unpin(w.index, pin)
    assert w.evict(100) == 4
    w.check()


@pytest.mark.parametrize("every", [4, 8, 16])
def test_a_small_pool_beside_a_window_does_not_limit_the_rest(every):
    """Five prompts stay whole in the group that sees all. Of the other, which has room for three of their windows and
    what a row computes, the windows of those used last stay.
    """
    w = world(layer_group(), layer_group(sliding_window=6, num_pages=18), num_pages=64)
    prompts = [[n] * 24 for n in range(5)]
    for tokens in prompts:
        w.admit(0, tokens)
        for end in (*range(every, 24, every), 24):
            needs = jnp.array([end - w.lens()[0], 0, 0, 0])
            w.cache, w.index, _ = prefix.make_room(w.cache, w.index, needs, num_tokens=T)
            w.compute(0, end)
            w.publish(0)
        w.release(0)
        w.check()
    assert w.index.num_entries == 30 and w.free(0) == 34
    assert [w.match(tokens) for tokens in prompts[2:]] == [24] * 3
    assert w.admit(1, [*prompts[4], 9, 9]) == 24 and (w.tables(1)[1] >= 0).sum() == 2
    w.compute(1)
    w.check()


def test_pages_of_no_use_go_first_beside_a_window():
    """A prompt of six pages holds all of them until room is short; then what goes on from its end needs three."""
    w = world(layer_group(), layer_group(sliding_window=6, num_pages=16))
    for n in range(2):
        w.admit(0, [n] * 24)
        for end in (8, 16, 24):
            w.compute(0, end)
            w.publish(0)
        w.release(0)
    assert w.free(1) == 4 and w.match([0] * 8) == 8
    missing = w.free(1) + 6
    w.cache, w.index, freed, gone = _host._evict(w.cache, w.index, [0, 6], "lru", None)
    assert freed == [0, 6] and {len(some.places) for some in gone} == {3} and w.free(1) == missing
    assert [w.match([n] * 24) for n in range(2)] == [24, 24] and w.match([0] * 8) == 0
    w.check()
    w.index, pin = prefix.pin(w.index, [0] * 24)
    assert prefix.evictable(w.cache, w.index) == (6, 3)
    w.cache, w.index, freed, _ = _host._evict(w.cache, w.index, [0, 9], "lru", None)
    assert freed == [0, 3] and [w.match([n] * 24) for n in range(2)] == [24, 0]
    w.index = prefix.unpin(w.index, pin)
    assert w.evict(100) == 3 and w.index.num_entries == 0 and w.free(1) == 16
    w.check()


def test_chunks_published_as_they_are_computed_share_what_is_before_them():
    """The 24 tokens that two prompts begin with are reused, however long the first one is beside its window."""
    w = world(layer_group(), layer_group(sliding_window=6, num_pages=16), max_pages_per_seq=16)
    w.admit(0, range(50))
    while (length := w.lens()[0]) < 50:
        w.compute(0, min(length + 8, 50))
        w.publish(0)
    assert w.admit(1, [*range(24), *range(90, 99)]) == 24
    w.compute(1)
    w.check()


@pytest.mark.parametrize("window", [1, 3, 4, 5, 9])
def test_models_of_windows_alone(window):
    """Entries without a page lead to those that have one, and none is left when all pages are gone."""
    w = world(layer_group(sliding_window=window), num_pages=20)
    for n in range(12):
        w.admit(0, tokens := [n % 5] * 21)
        while (length := w.lens()[0]) < 21:
            w.cache, w.index, _ = prefix.make_room(w.cache, w.index, jnp.array([8, 0, 0, 0]), num_tokens=T)
            assert w.compute(0, min(length + 8, 21)) == paxcache.Status.OK
            w.publish(0)
        w.check()
        w.release(0)
        assert w.match(tokens) == 21 // 4 * 4
    assert prefix.evictable(w.cache, w.index) == (20 - w.free(),)
    w.evict(20)
    w.check()
    assert w.index.num_entries == 0 and w.free() == 20


def test_what_could_go():
    w = world(num_pages=24)
    for n in range(3):
        w.serve(0, [n] * 12)
    assert prefix.evictable(w.cache, w.index) == (9,)
    w.index, _ = prefix.pin(w.index, [0] * 8)
    w.admit(1, [*[1] * 8, 5])  # uses two pages
    before = w.index
    assert prefix.evictable(w.cache, w.index) == (1 + 1 + 3,)
    assert w.index is before and w.evict(100) == 5 and prefix.evictable(w.cache, w.index) == (0,)


# Whose pages they are.


def test_an_index_of_another_cache_is_refused():
    """Of another run with the same calls, from before an eviction, or after one: no page changes hands."""
    mine, other = world(), world()
    mine.serve(0, range(12))
    other.serve(0, range(1, 13))
    old = mine.cache, mine.index
    mine.evict(1)
    pairs = [(mine.cache, other.index), (other.cache, mine.index), (mine.cache, old[1]), (old[0], mine.index)]
    pairs += [(paxcache.init(mine.config), mine.index)]
    lens = jnp.ones(4, jnp.int32)
    tier = offload.init_tier(mine.config, 10)
    for cache, index in pairs:
        for call in (
            lambda c, i: prefix.admit(c, i, 0, range(12)),
            lambda c, i: prefix.publish(c, i, 0, range(12)),
            lambda c, i: prefix.evict(c, i, 1),
            prefix.evictable,
            lambda c, i: prefix.make_room(c, i, lens, num_tokens=4),
            prefix.reset,
            lambda c, i: offload.evict(c, i, tier, 1),
            lambda c, i: offload.write_through(c, i, tier, [range(12)]),
        ):
            with pytest.raises(ValueError, match="index: the pages it holds are not this cache's"):
                call(cache, index)


def test_a_pair_is_one_whatever_else_happens_to_it():
    """Other calls, donation, another version of the two, and an index that holds nothing."""
    w = world()
    w.serve(0, range(12))
    old = w.cache, w.index
    w.admit(1, range(16))
    w.compute(1)
    w.cache, _ = paxcache.fork(w.cache, jnp.array([1]), jnp.array([2]))
    w.cache = paxcache.reorder(w.cache, jnp.array([0, 2, 1, -1]))
    host = offload.init(w.config, 10)
    w.cache, host, ticket = offload.preempt(w.cache, host, jnp.array([1]))
    w.cache, host, _ = offload.resume(w.cache, host, ticket, jnp.array([1]))
    w.cache = offload.resize(offload.defragment(jax.tree.map(jnp.copy, w.cache)), 24)
    w.cache = jax.jit(lambda cache: cache, donate_argnums=0)(w.cache)
    w.tokens[1] = w.tokens[2] = list(range(16))
    assert w.admit(3, range(12)) == 11
    w.publish(1)
    w.release(1, 2, 3)
    assert w.evict(1) == 1
    assert prefix.admit(*old, 0, range(12))[2] == 11  # going back
    prefix.admit(w.cache, prefix.init(w.config), 0, range(12))
    cache, index = prefix.reset(w.cache, w.index)
    assert not np.asarray(cache.holdings).any() and index.holdings == 0
    assert prefix.evict(cache, index, 1)[2] == 0


def test_holdings_are_those_of_the_pages_whatever_led_to_them():
    """Evicted and stored anew into the same pages, the pair is as before; in another order, the sum is the same."""
    one, two = world(), world()
    one.serve(0, range(12))
    sums = [one.index.holdings]
    one.evict(1)
    sums.append(one.index.holdings)
    one.serve(0, range(12))
    assert one.index.holdings == sums[0] != sums[1]
    two.serve(0, range(8))
    assert two.index.holdings == sums[1]
    high, low = np.asarray(two.cache.holdings).tolist()
    assert high << 32 | low == two.index.holdings


def test_reset():
    w = world(events=True)
    w.serve(0, range(16))
    w.evict(1)
    w.index, _ = prefix.pin(w.index, range(8))
    w.admit(1, range(8))
    w.cache, w.index = prefix.reset(w.cache, w.index)
    assert w.match(range(16)) == 0 and w.free() == 22
    w.check()
    w.compute(1)
    w.publish(1)
    assert w.match(range(8)) == 8
    w.check()


# Costs.


def allocated(old: Any, new: Any) -> int:
    """Tree nodes of the new version that the old one does not share."""

    def nodes_of(index):
        waiting = [index.nodes, index.edges, index.pins, *(t for _, t in index.orders)]
        while waiting:
            if (node := waiting.pop()) is not None:
                yield id(node)
                waiting += node[2] if node[0] else ()

    return len(set(nodes_of(new)) - set(nodes_of(old)))


def filled(num_pages: int, size: int = 2) -> World:
    """An index of that many one-page prompts, stored through one row of the cache."""
    w = world(page_size=size, num_pages=num_pages, max_pages_per_seq=num_pages, max_seqs=1)
    tokens = [*range(num_pages * size)]
    w.tokens[0], w.context[0] = tokens, (0, None)
    cache = w.cache
    lens = jnp.array([num_pages * size])
    cache, _ = paxcache.extend(cache, lens, num_tokens=num_pages * size)
    ids = np.asarray(cache.groups[0].block_tables)[0]
    draft = _index.Draft(w.index)
    taken: list[list[int]] = [[]]
    for n in range(num_pages):
        draft.tick += 1
        prompt = _keys.prompt(tokens[n * size : (n + 1) * size], page_size=size, extra_key=None, epoch=0)
        page = ids[n : n + 1, None]
        run = _index.Run(prompt.tokens, bytes(32), {}, page.tobytes())
        draft.add(prompt, 0, 0, run, priority=0, expires=math.inf)
        draft.hold(run.keys, page, taken)
    w.cache, w.index = dataclasses.replace(cache, holdings=None), draft.done()
    return w


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru", "priority"])
@pytest.mark.parametrize("num_pages", [100, 1000])
def test_an_eviction_costs_log_n_whatever_the_policy(num_pages, policy):
    w = filled(num_pages)
    counts = dataclasses.replace(w.cache.groups[0], ref_counts=jnp.ones(num_pages, jnp.int32))
    w.cache = dataclasses.replace(w.cache, groups=(counts,))  # as if the row were gone
    w.evict(0, policy=policy)
    old = w.index
    assert w.evict(1, policy=policy) == 1
    depth = math.log(num_pages, _tree.WIDTH // 4) + 1
    trees = 2 + len(w.index.orders)
    assert 0 < allocated(old, w.index) <= 2 * trees * depth


@hypothesis.given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=60))
def test_the_ordered_map_is_a_map(changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tree, "WIDTH", 8)  # more joining and splitting
        check_map(changes)


@hypothesis.given(st.lists(st.dictionaries(st.integers(0, 99), st.booleans(), max_size=60), max_size=6))
def test_many_changes_of_the_ordered_map_at_once(batches):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tree, "WIDTH", 8)
        tree, model, versions = None, {}, []
        for n, batch in enumerate(batches):
            changes = {key: n if adds else None for key, adds in batch.items() if adds or key in model}
            missing = set(batch) - set(changes)
            if missing:
                with pytest.raises(KeyError):
                    _tree.update(tree, {**changes, min(missing): None})
            tree = _tree.update(tree, changes)
            model = {key: value for key, value in (model | changes).items() if value is not None}
            versions.append((tree, model))
        for tree, model in versions:
            assert_well_formed(tree)
            for start in (None, -1, 50, 100):
                wanted = [item for item in sorted(model.items()) if start is None or item[0] >= start]
                assert list(_tree.items(tree, start)) == wanted


def test_the_ordered_map_grows_and_shrinks():
    keys = np.random.default_rng(0).permutation(3000).tolist()
    tree = None
    for key in keys:
        tree = _tree.put(tree, key, -key)
    assert_well_formed(tree)
    assert list(_tree.items(tree)) == [(key, -key) for key in range(3000)]
    for n, key in enumerate(keys[::-1]):
        tree = _tree.remove(tree, key)
        if n % 100 == 0:
            assert_well_formed(tree)
    assert tree is None


def check_map(changes):
    tree, model, versions = None, {}, []
    for n, (adds, key) in enumerate(changes):
        if adds:
            tree, model = _tree.put(tree, key, n), model | {key: n}
        elif key in model:
            tree, model = _tree.remove(tree, key), {k: v for k, v in model.items() if k != key}
        else:
            with pytest.raises(KeyError):
                _tree.remove(tree, key)
        versions.append((tree, model))
    for tree, model in versions:
        assert list(_tree.items(tree)) == sorted(model.items())
        assert _tree.first(tree) == (min(model.items()) if model else None)
        for key in range(-1, 22):
            assert _tree.get(tree, key) == model.get(key)
            below, above = _tree.neighbours(tree, key)
            assert below == max((i for i in model.items() if i[0] <= key), default=None)
            assert above == min((i for i in model.items() if i[0] >= key), default=None)
        assert_well_formed(tree)


def assert_well_formed(tree, is_root: bool = True) -> None:
    """Every node is as wide as it should be, all leaves are equally deep, and each child is known by its lowest key."""
    if tree is None:
        assert is_root
        return
    height, keys, items = tree
    assert (min(height, 1) + 1 if is_root else _tree.WIDTH // 4) <= len(keys) == len(items) <= _tree.WIDTH
    for key, child in zip(keys, items, strict=True) if height else ():
        assert child[0] == height - 1 and child[1][0] == key
        assert_well_formed(child, is_root=False)


def test_few_programs_are_compiled():
    """tpu-inference PR#3180 in this place: lists of pages are padded to powers of two, rows too."""
    from test_faults import no_compilation

    w = world(num_pages=256, max_pages_per_seq=16)

    def serve(num_pages):
        start = 100 * num_pages
        w.serve(num_pages % 4, range(start, start + 4 * num_pages + 1))
        w.serve(0, range(start, start + 4 * num_pages))  # reuses and folds
        w.evict(num_pages)

    for n in (1, 2, 4, 8, 15):
        serve(n)
    with no_compilation():
        for n in (3, 5, 6, 7, 9, 12, 14):
            serve(n)


# Events, counters, the store.


def test_events():
    w = world(events=True)
    w.serve(0, range(12), key="a")
    w.serve(0, [*range(8), 50, 51, 52, 53], key="a")
    w.evict(2)
    w.cache, w.index = prefix.reset(w.cache, w.index)
    keys = prefix.page_keys(range(12), page_size=4, extra_key="a")
    other = prefix.page_keys([*range(8), 50, 51, 52, 53], page_size=4, extra_key="a")
    w.index, (first, second, third, fourth, last) = prefix.take_events(w.index)
    assert isinstance(first, prefix.Stored) and isinstance(second, prefix.Stored)
    assert first.keys == keys and first.tokens == tuple(range(12)) and first.extra_key == "a"
    assert first.parent not in keys
    assert second == prefix.Stored((other[2],), keys[1], (50, 51, 52, 53), "a")
    assert third == prefix.Removed((keys[2],)) and fourth == prefix.Removed((other[2],))
    assert last == prefix.Cleared()
    assert prefix.take_events(w.index)[1] == ()
    assert prefix.take_events(world().index)[1] == ()


def test_counters():
    w = world()
    assert w.index.counters.hit_rate == 0
    w.serve(0, range(12), now=10)
    w.admit(0, range(8), now=13)
    w.release(0)
    assert dataclasses.astuple(w.index.counters)[:3] == (20, 7, 3)
    assert w.index.counters.hit_rate == 7 / 20
    w.evict(2, now=17)
    counters = w.index.counters
    assert counters.pages_evicted == 2 and sum(counters.lifetimes) == sum(counters.idle_times) == 2
    assert counters.lifetimes[3] == 2  # stored 7 ago, in [4, 8)
    assert counters.idle_times[3] == 2  # one used 7 ago, one 4 ago
    w.evict(1, now=1e30)
    assert w.index.counters.lifetimes[-1] == 1


def test_the_store_refuses_a_second_writer():
    w = world()
    store = prefix.Store(w.index)
    w.serve(0, range(8))
    store.replace(store.index, w.index)
    assert store.index is w.index
    with pytest.raises(RuntimeError, match="replaced since it was read"):
        store.replace(prefix.init(w.config), w.index)


def test_readers_see_whole_versions_while_a_writer_writes():
    w = world()
    store = prefix.Store(w.index)
    prompts = [[n, *range(1, 12)] for n in range(4)]
    failures, stop, reads = [], threading.Event(), [0]

    def read():
        while not stop.is_set():
            index = store.index
            found = [prefix.match(index, p).num_tokens for p in prompts]
            total = sum(n // 4 for n in found)
            if total != index.num_entries or any(n % 4 for n in found):
                failures.append((found, index.num_entries))
            reads[0] += 1
            stop.wait(0.001)  # the writer needs the interpreter too

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for n in range(24):
            w.serve(0, prompts[n % 4])
            store.replace(store.index, w.index)
            w.evict(1 + n % 4)
            store.replace(store.index, w.index)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures and reads[0] > 0


# Arguments.


def test_arguments_are_named():
    w = world()
    cache, index = w.cache, w.index
    other = prefix.init(config_of(num_pages=5))
    bad: Any = [1.0], [[1]]
    with pytest.raises(ValueError, match="index: made for another config"):
        prefix.admit(cache, other, 0, [1])
    with pytest.raises(ValueError, match="row: must be below 4, got 4"):
        prefix.admit(cache, index, 4, [1])
    with pytest.raises(ValueError, match="row must be at least 0, got -1"):
        prefix.publish(cache, index, -1, [1])
    with pytest.raises(ValueError, match="rows: expected different rows"):
        prefix.admit_rows(cache, index, [1, 1], [[1], [2]])
    with pytest.raises(ValueError, match="prompts: expected one for each of 2 rows, got 1"):
        prefix.publish_rows(cache, index, [0, 1], [[1]])
    with pytest.raises(TypeError, match="tokens: expected integers, got float64"):
        prefix.match(index, bad[0])
    with pytest.raises(ValueError, match=r"tokens: expected shape \[N\], got int64\[1,1\]"):
        prefix.match(index, bad[1])
    with pytest.raises(ValueError, match="tokens: values must fit int32"):
        prefix.match(index, [2**31])
    with pytest.raises(ValueError, match="priority must be at least 0"):
        prefix.publish(cache, index, 0, [1], priority=-1)
    with pytest.raises(TypeError, match="config: expected a CacheConfig"):
        prefix.init(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="inside jit use paxcache"):
        jax.jit(lambda c: prefix.admit(c, index, 0, [1])[0])(cache)
    with pytest.raises(ValueError, match="give exactly one of num_tokens"):
        prefix.make_room(cache, index, jnp.zeros(4, jnp.int32))


def nested(depth: int) -> Any:
    return functools.reduce(lambda key, _: (key,), range(depth), "x")


ANY: Any = None
calls: Any = prefix  # which takes anything, as Python does
CALLS: dict[str, Any] = {
    "index: expected an Index": [
        lambda c, i: calls.match(ANY, [1]),
        lambda c, i: calls.admit(c, ANY, 0, [1]),
        lambda c, i: calls.admit_rows(c, ANY, [0], [[1]]),
        lambda c, i: calls.publish(c, ANY, 0, [1]),
        lambda c, i: calls.evict(c, ANY, 1),
        lambda c, i: calls.evictable(c, ANY),
        lambda c, i: calls.make_room(c, ANY, jnp.zeros(4, jnp.int32), num_tokens=1),
        lambda c, i: calls.reset(c, ANY),
        lambda c, i: calls.held(ANY),
        lambda c, i: calls.new_epoch(ANY),
        lambda c, i: calls.pin(ANY, [1]),
        lambda c, i: calls.unpin(ANY, calls.Pin(0, 0)),
        lambda c, i: calls.take_events(ANY),
        lambda c, i: calls.Store(ANY),
    ],
    "new: expected an Index": [lambda c, i: calls.Store(i).replace(i, ANY)],
    "pin: expected a Pin .from prefix.pin., got a NoneType": [lambda c, i: calls.unpin(i, ANY)],
    "cache: expected a PagedKVCache": [
        lambda c, i: calls.admit(ANY, i, 0, [1]),
        lambda c, i: calls.evictable(ANY, i),
        lambda c, i: calls.reset(ANY, i),
    ],
    "tokens: expected": [
        lambda c, i: calls.match(i, ANY),
        lambda c, i: calls.match(i, [[1], [2, 3]]),
        lambda c, i: calls.match(i, "text"),
        lambda c, i: calls.pin(i, [2**70]),
        lambda c, i: calls.admit(c, i, 0, {1: 2}),
        lambda c, i: calls.page_keys(ANY, page_size=2),
    ],
    "tokens: the host index reads them": [
        lambda c, i: jax.jit(lambda t: calls.match(i, t).num_tokens)(jnp.arange(3))
    ],
    "extra_key: expected": [
        lambda c, i: calls.match(i, [1], extra_key=nested(100_000)),
        lambda c, i: calls.match(i, [1], extra_key=[1]),
        lambda c, i: calls.page_keys([1], page_size=1, extra_key=(1.5,)),
        lambda c, i: calls.ExtraKey(salt=nested(33)),
    ],
    "items: expected": [
        lambda c, i: calls.ExtraKey(items=ANY),
        lambda c, i: calls.ExtraKey(items=(ANY,)),
        lambda c, i: calls.ExtraKey(items=calls.Item("a", 0, 1)),
        lambda c, i: calls.ExtraKey(items=(("a", 1),)),
    ],
    "items: content must be str": [lambda c, i: calls.ExtraKey(items=(calls.Item(ANY, 0, 1),))],
    "row must be an int": [
        lambda c, i: calls.admit(c, i, ANY, [1]),
        lambda c, i: calls.publish_rows(c, i, [[0]], [[1]]),
    ],
    "rows: expected a sequence": [lambda c, i: calls.admit_rows(c, i, ANY, [[1]])],
    "prompts: expected a sequence": [
        lambda c, i: calls.admit_rows(c, i, [0], ANY),
        lambda c, i: calls.publish_rows(c, i, [0], "x"),
    ],
    "extra_keys: expected": [
        lambda c, i: calls.admit_rows(c, i, [0], [[1]], extra_keys=3),
        lambda c, i: calls.publish_rows(c, i, [0], [[1]], extra_keys=[]),
    ],
    "now: expected a number": [lambda c, i: calls.evict(c, i, 1, now="x")],
    "ttl: expected a number": [lambda c, i: calls.publish(c, i, 0, [1], ttl="x")],
    "policy: expected one of lru": [
        lambda c, i: calls.evict(c, i, 1, policy=["lru"]),
        lambda c, i: calls.make_room(c, i, jnp.zeros(4, jnp.int32), num_tokens=1, policy=ANY),
    ],
    "num_pages must be": [lambda c, i: calls.evict(c, i, ANY), lambda c, i: calls.evict(c, i, -1)],
    "query_lens: expected": [lambda c, i: calls.make_room(c, i, ANY, num_tokens=1)],
    "priority must be an int": [lambda c, i: calls.publish(c, i, 0, [1], priority=ANY)],
    "epoch must be": [
        lambda c, i: calls.init(config_of(), epoch=ANY),
        lambda c, i: calls.new_epoch(i, "x"),
        lambda c, i: calls.page_keys([1], page_size=1, epoch=ANY),
    ],
    "page_size must be": [lambda c, i: calls.page_keys([1], page_size=ANY)],
}


@pytest.mark.parametrize("message", CALLS)
def test_whatever_is_passed_the_error_names_it(message):
    w = world()
    for call in CALLS[message]:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call(w.cache, w.index)


def test_extra_keys_of_any_text():
    """Half of a surrogate pair is text to Python, and no UTF-8."""
    w = world()
    w.serve(0, range(8), key=("a\ud800", 1))
    assert (
        w.match(range(8), extra_key=("a\ud800", 1)) == 8 and w.match(range(8), extra_key=("a\ud801", 1)) == 0
    )


# Random programs against a plain model.


def evicted_one_by_one(index, needs, in_use, policy):
    """What `evict` does, by looking at all nodes before each cut: the cuts (node, end, pages), and the nodes left."""
    nodes = dict(_tree.items(index.nodes))
    stay = {node_id for node_id, _ in _tree.items(index.pins)}
    cuts, freed = [], [0] * len(needs)

    def worth(node):
        live, expired = node.epoch == index.epoch, node.expires <= index.now
        sizes = [(n.size, n.hits > 0) for n in nodes.values()]
        share = sum(size for size, hit in sizes if hit) / sum(size for size, _ in sizes)
        hit = node.hits > 0
        mine: Any = {
            "lru": (node.tick,),
            "fifo": (node.birth,),
            "lfu": (node.hits, node.tick),
            "slru": (not hit if live and share > 0.8 else hit, node.tick),
            "priority": (0, node.expires, node.tick) if live and expired else (1, node.priority, node.tick),
        }
        return node.epoch, *mine[policy], node.id

    while (lacking := max(need - n for need, n in zip(needs, freed, strict=True))) > 0:
        leaves = [n for n in nodes.values() if n.id not in stay | {n.parent for n in nodes.values()}]
        if not leaves:
            break
        leaf = min(leaves, key=worth)
        first = max(leaf.end - lacking, leaf.youngest if policy == "fifo" else leaf.start)
        pages = 0
        for ids in reversed(leaf.run.table[first : leaf.end]):
            if any(p >= 0 and used[p] for p, used in zip(ids, in_use, strict=True)):
                break
            pages += 1
            freed = [n + (p >= 0) for n, p in zip(freed, ids, strict=True)]
        if pages == 0:
            stay.add(leaf.id)
            continue
        cuts.append((leaf.id, leaf.end, pages))
        if pages == leaf.size:
            del nodes[leaf.id]
        else:
            nodes[leaf.id] = leaf.ending(leaf.end - pages)
    return cuts, nodes


def assert_evicts_one_by_one(cache, index, needs, policy) -> None:
    in_use = [np.asarray(group.ref_counts) > 1 for group in cache.groups]
    cuts, nodes = evicted_one_by_one(index, needs, in_use, policy)
    maps = (index.nodes, index.edges, index.pins, *(order for _, order in index.orders))
    before = [list(_tree.items(tree)) for tree in maps]
    _, after, _, gone = _host._evict(cache, index, needs, policy, None)
    assert [(some.node.id, some.places[-1] + 1, len(some.places)) for some in gone] == cuts
    assert [list(_tree.items(tree)) for tree in maps] == before  # a value
    children = [node.parent for node in nodes.values()]
    nodes = {n: node._replace(num_children=children.count(n)) for n, node in nodes.items()}
    assert list(_tree.items(after.nodes)) == sorted(nodes.items())
    edges = {(n.parent, n.salt, _index.page_tokens(n, 0, index.page_size)): n.id for n in nodes.values()}
    assert list(_tree.items(after.edges)) == sorted(edges.items())
    leaves = [n for n in nodes.values() if n.num_children == 0 and _tree.get(index.pins, n.id) is None]
    assert set(dict(after.orders)) >= set(_policy.orders(policy))
    for name, order in after.orders:
        assert list(_tree.items(order)) == sorted((_policy.ORDERS[name](n), n.id) for n in leaves)
    for tree in (after.nodes, after.edges, *(order for _, order in after.orders)):
        assert_well_formed(tree)
    assert (
        after.num_entries
        == sum(n.size for n in nodes.values())
        == index.num_entries - sum(c[2] for c in cuts)
    )
    assert after.num_protected == sum(n.size for n in nodes.values() if n.hits)


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "slru", "priority"])
def test_many_go_as_one_by_one(policy):
    """Chains and bushes of nodes, of which parents become leaves; enough of them for maps of some height."""
    rng = np.random.default_rng(0)
    w = world(page_size=2, num_pages=256, max_pages_per_seq=8)
    prompts = [rng.integers(0, 2, 2 * rng.integers(1, 6)).tolist() for _ in range(40)]
    prompts += [[n, n, *rng.integers(0, 3, 4)] for n in range(2, 40)]
    for n, tokens in enumerate(prompts):
        if n == 20:
            w.index = prefix.new_epoch(w.index)
        ttl = None if n % 3 else float(rng.integers(1, 60))
        for _ in range(1 + n % 2):
            w.serve(n % 3, tokens, priority=int(rng.integers(3)), ttl=ttl, now=float(n))
    w.admit(3, prompts[-1])
    w.index, _ = prefix.pin(w.index, prompts[-2])
    for other in ("lru", "priority"):
        w.evict(0, policy=other)
    for count in (1, 3, w.index.num_entries // 2, 1000):
        assert_evicts_one_by_one(w.cache, w.index, [count], policy)


@dataclasses.dataclass
class Entry:
    """One stored page of the model; its key is (epoch, extra key, all tokens up to its end)."""

    page: int
    birth: int
    tick: int
    hits: int
    priority: int
    expires: float


S = 2


def common(a, b) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Model:
    """Entries in a dict; everything is found by looking at all of them."""

    def __init__(self):
        self.entries: dict[tuple[int, Any, tuple[int, ...]], Entry] = {}
        self.pins: list[Any] = []
        self.tick, self.epoch, self.now = 0, 0, 0.0

    def key(self, key, tokens):
        return (self.epoch, key, tuple(tokens))

    def full(self, key, tokens) -> int:
        pages = 0
        while (pages + 1) * S <= len(tokens) and self.key(key, tokens[: (pages + 1) * S]) in self.entries:
            pages += 1
        return pages

    def longest(self, key, tokens) -> int:
        pages = self.full(key, tokens)
        rest = tokens[pages * S :]
        start = self.key(key, tokens[: pages * S])
        below = [
            e[2][-S:]
            for e in self.entries
            if e[:2] == start[:2] and len(e[2]) == (pages + 1) * S and e[2][: pages * S] == start[2]
        ]
        return pages * S + max((common(b, rest) for b in below), default=0)

    def leaves(self):
        parents = {(e, k, t[:-S]) for e, k, t in self.entries}
        return [e for e in self.entries if e not in parents]

    def evict(self, count: int, policy: str, in_use: set[int]) -> int:
        freed = 0
        while freed < count:
            leaves = [e for e in self.leaves() if e not in self.pins and self.entries[e].page not in in_use]
            if not leaves:
                break
            del self.entries[min(leaves, key=functools.partial(self._worth, policy, leaves))]
            freed += 1
        return freed

    def _worth(self, policy, leaves, e):
        entry = self.entries[e]
        if policy == "lru":
            mine: Any = (entry.tick,)
        elif policy == "lfu":
            mine = (entry.hits, entry.tick)
        elif policy == "fifo":
            mine = (entry.birth,)
        elif policy == "slru":
            protected = sum(x.hits > 0 for x in self.entries.values()) / len(self.entries) > 0.8
            mine = (not entry.hits if protected else entry.hits > 0, entry.tick)
        else:
            expired = entry.expires <= self.now
            mine = (not expired, entry.expires if expired else entry.priority, entry.tick)
        return (e[0] if e[0] < self.epoch else self.epoch, *mine)


rows = st.integers(0, 2)
tokens_of = st.lists(st.integers(0, 1), min_size=0, max_size=8)
BASE = [0, 1, 1, 0, 0, 0, 1, 1]
random_prompts = st.builds(
    lambda shared, tail: [*BASE[:shared], *tail][: len(BASE)], st.integers(0, len(BASE)), tokens_of
)
tenants = st.sampled_from([None, None, None, "a"])
worths = st.tuples(st.integers(0, 2), st.sampled_from([None, 1, 5]), st.integers(0, 2))
policies = st.sampled_from(["lru", "lfu", "fifo", "slru", "priority"])
PLAIN = config_of(layer_group(), page_size=S, num_pages=11, max_seqs=3, max_pages_per_seq=4)
TWO = config_of(
    layer_group(), layer_group(num_pages=12), page_size=S, num_pages=11, max_seqs=3, max_pages_per_seq=4
)
WITH_WINDOW = config_of(
    layer_group(), layer_group(sliding_window=3), page_size=S, num_pages=11, max_seqs=3, max_pages_per_seq=4
)


class Sharing(RuleBasedStateMachine):
    """A cache and an index under fire. With a window the model does not say how much is reused, only what is right."""

    @initialize(config=st.sampled_from([PLAIN, PLAIN, TWO, WITH_WINDOW]))
    def start(self, config):
        self.world, self.model = World(config), Model()
        self.exact = config is not WITH_WINDOW
        self.handles: list[tuple[Any, prefix.Pin]] = []
        self.snapshots: list[tuple[prefix.Index, list[tuple[Any, Any, int]]]] = []

    def in_use(self) -> set[int]:
        return set(self.world.tables()[self.world.tables() >= 0].tolist())

    def compare(self):
        """Every step ends here."""
        self.world.check()
        begun = [0 if context is None else 1 + context[0] for context in self.world.context]
        assert np.asarray(self.world.cache.epochs).tolist() == begun
        if not self.exact:
            return
        held = np.flatnonzero(prefix.held(self.world.index)[0]).tolist()
        assert sorted(e.page for e in self.model.entries.values()) == held
        assert self.world.index.num_entries == len(held)
        assert self.world.index.num_protected == sum(e.hits > 0 for e in self.model.entries.values())

    # Most prompts run a good part of their way in one rule: drawn one by one, calls would seldom meet.

    @rule(row=rows, tokens=random_prompts, key=tenants, way=st.sampled_from("acpprrr"), worth=worths)
    def serve(self, row, tokens, key, way, worth):
        if self.world.lens()[row] > 0:
            self.world.release(row)
        self.admit(row, tokens, key)
        if way in "cpr":
            self.compute(row, 8)
        if way in "pr":
            self.publish(row, worth)
        if way == "r":
            self.world.release(row)
        self.compare()

    @rule(row=rows, extra=st.integers(0, 8), worth=worths)
    def go_on(self, row, extra, worth):
        self.compute(row, extra)
        self.publish(row, worth)

    @rule(row=rows, tokens=random_prompts, key=tenants)
    def admit(self, row, tokens, key):
        if self.world.lens()[row] > 0:
            assert self.world.admit(row, tokens, key=key) == -1
            return
        model = self.model
        wanted = min(model.longest(key, tokens), max(len(tokens) - 1, 0))
        found = self.world.admit(row, tokens, key=key)
        model.tick += 1
        if self.exact:
            assert found == wanted
            for page in self.world.tables()[row][: -(-found // S)]:
                (entry,) = [e for e in model.entries.values() if e.page == page]
                entry.tick, entry.hits = model.tick, entry.hits + 1
        self.compare()

    def compute(self, row, extra):
        length = self.world.lens()[row]
        self.world.compute(row, min(length + extra, len(self.world.tokens[row])))
        self.compare()

    def publish(self, row, worth):
        priority, ttl, wait = worth
        world, model = self.world, self.model
        model.now += wait
        key, pages = world.keys[row], world.lens()[row] // S
        tables = world.tables()[row].tolist()
        world.publish(row, priority=priority, ttl=ttl, now=model.now)
        begun = 0 if world.context[row] is None else world.context[row][0]
        if begun == model.epoch and pages:
            model.tick += 1
            expires = math.inf if ttl is None else model.now + ttl
            known = {e.page for e in model.entries.values()}
            for page in range(pages):
                name = model.key(key, world.tokens[row][: (page + 1) * S])
                entry = model.entries.get(name)
                if entry is not None:
                    entry.tick = model.tick
                    entry.priority, entry.expires = max(entry.priority, priority), max(entry.expires, expires)
                    if self.exact:
                        assert world.tables()[row][page] == entry.page
                    continue
                if tables[page] in known and self.exact:
                    break
                model.entries[name] = Entry(tables[page], model.tick, model.tick, 0, priority, expires)
        self.compare()

    @rule(gone=st.lists(rows, min_size=1, max_size=3))
    def release(self, gone):
        self.world.release(*gone)
        self.compare()

    @rule(row=rows, length=st.integers(0, 8), tail=tokens_of)
    def truncate(self, row, length, tail):
        """Rolls a row back and lets it go on with other tokens; beside a window no further than it may."""
        if not self.exact or self.world.lens()[row] == 0:
            return
        length = min(length, self.world.lens()[row])
        lens = np.full(3, 2**31 - 1, np.int32)
        lens[row] = length
        self.world.cache = paxcache.truncate(self.world.cache, jnp.asarray(lens))
        self.world.tokens[row] = [*self.world.tokens[row][:length], *tail][:8]
        self.compare()

    @rule(parent=rows, child=rows)
    def fork(self, parent, child):
        world = self.world
        world.cache, ok = paxcache.fork(world.cache, jnp.array([parent]), jnp.array([child]))
        if bool(ok[0]):
            world.becomes(child, parent)
        self.compare()

    @rule(parents=st.lists(st.integers(-1, 2), min_size=3, max_size=3))
    def reorder(self, parents):
        self.world.reorder(parents)
        self.compare()

    @rule(count=st.sampled_from([0, 1, 1, 2, 3, 4]), policy=policies, more=st.integers(0, 10))
    def evict(self, count, policy, more):
        needs = [more + g for g in range(len(self.world.config.layer_groups))]
        assert_evicts_one_by_one(self.world.cache, self.world.index, needs, policy)
        times, size = (count, 1) if policy == "slru" else (1, count)
        for _ in range(times):
            wanted = self.model.evict(size, policy, self.in_use())
            freed = self.world.evict(size, policy=policy)
            assert freed == wanted or not self.exact
        self.compare()

    @rule(row=rows, count=st.integers(1, 8))
    def make_room(self, row, count):
        world = self.world
        lens = jnp.zeros(3, jnp.int32).at[row].set(count)
        before = [world.free(g) for g in range(len(world.config.layer_groups))]
        _, step = paxcache.extend(world.cache, lens, num_tokens=T)
        world.cache, world.index, freed = prefix.make_room(world.cache, world.index, lens, num_tokens=T)
        if self.exact:
            assert freed <= int(step.pages_short[row])
            assert self.model.evict(int(step.pages_short[row]), "lru", self.in_use()) == freed
        after = [world.free(g) for g in range(len(before))]
        assert all(a >= b for a, b in zip(after, before, strict=True))
        self.compare()

    @rule(tokens=random_prompts, key=tenants, undo=st.booleans())
    def pin(self, tokens, key, undo):
        if undo and self.handles:
            name, pin = self.handles.pop()
            self.world.index = prefix.unpin(self.world.index, pin)
            self.model.pins.remove(name)
        elif self.exact:
            self.world.index, pin = prefix.pin(self.world.index, tokens, extra_key=key)
            pages = self.model.full(key, tokens)
            assert pin.num_tokens == pages * S
            if pages:
                name = self.model.key(key, tokens[: pages * S])
                self.model.pins.append(name)
                self.handles.append((name, pin))

    @rule(what=st.sampled_from(["epoch", "reset", *["nothing"] * 6]))
    def begin_anew(self, what):
        if what == "epoch":
            self.world.index = prefix.new_epoch(self.world.index)
            self.model.epoch += 1
            self.model.pins.clear()
            self.handles.clear()
        if what == "reset":
            self.world.cache, self.world.index = prefix.reset(self.world.cache, self.world.index)
            self.model.entries.clear()
            self.model.pins.clear()
            self.handles.clear()
            self.compare()

    @rule(asked=st.lists(st.tuples(tokens_of, tenants), min_size=1, max_size=3))
    def ask(self, asked):
        """Matches are what the model says, and an old version will still say so at the end."""
        index, answers = self.world.index, []
        for tokens, key in asked:
            found = prefix.match(index, tokens, extra_key=key)
            if self.exact:
                assert found.num_tokens == self.model.longest(key, tokens)
                assert prefix.match(index, tokens, extra_key=key, partial=False).num_tokens == (
                    self.model.full(key, tokens) * S
                )
                named = prefix.page_keys(tokens, page_size=S, extra_key=key, epoch=index.epoch)
                assert found.keys == named[: found.num_tokens // S]
            answers.append((tokens, key, found.num_tokens))
        self.snapshots.append((index, answers))

    def teardown(self):
        if not hasattr(self, "world"):
            return
        for index, answers in self.snapshots:
            for tokens, key, wanted in answers:
                assert prefix.match(index, tokens, extra_key=key).num_tokens == wanted
        self.world.release(0, 1, 2)
        for _, pin in self.handles:
            self.world.index = prefix.unpin(self.world.index, pin)
        self.world.evict(100)
        assert not any(np.asarray(g.ref_counts).any() for g in self.world.cache.groups)
        index = self.world.index
        assert index.nodes is None and index.edges is None and index.pins is None
        assert index.num_entries == index.num_protected == 0 and not any(h.any() for h in index.held)


TestSharing = Sharing.TestCase
TestSharing.settings = hypothesis.settings(
    max_examples=50, stateful_step_count=30, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
