"""The prefix index inside compiled programs: it does what the host index does, without the host."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import paxcache
from bench_prefix import rollout
from driver import config_of, copy_of
from paxcache import offload, prefix
from paxcache.prefix import device
from test_in_place import _HOST, assert_in_place, cache_shapes, shape, temporaries, text_of
from test_in_place import config as big_config
from test_prefix import World, layer_group, random_prompts

S, M, B, L, T = 2, 4, 3, 8, 24
CONFIGS = (
    config_of(layer_group(), page_size=S, num_pages=10, max_seqs=B, max_pages_per_seq=M),
    config_of(
        layer_group(),
        layer_group(num_pages=11),
        page_size=S,
        num_pages=10,
        max_seqs=B,
        max_pages_per_seq=M,
    ),
)


def padded(prompts, width=L):
    """tokens i32[N, width] and lens i32[N]; what lies past a length is noise that nobody may read."""
    tokens = np.full((len(prompts), width), 7, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.array([len(p) for p in prompts], jnp.int32)


def assert_same_cache(a: paxcache.PagedKVCache, b: paxcache.PagedKVCache) -> None:
    np.testing.assert_array_equal(a.seq_lens, b.seq_lens)
    for x, y in zip(a.groups, b.groups, strict=True):
        np.testing.assert_array_equal(x.block_tables, y.block_tables)
        np.testing.assert_array_equal(x.ref_counts, y.ref_counts)


class Pair:
    """The same calls on a host index and a device index, each with a cache of its own, compared integer by integer."""

    def __init__(self, config: paxcache.CacheConfig):
        self.host_cache = self.cache = paxcache.init(config)
        self.host, self.index = prefix.init(config), device.init(config)
        self.tokens: list[list[int]] = [[] for _ in range(B)]
        self.keys = [0] * B

    def check(self):
        assert_same_cache(self.cache, self.host_cache)
        held = device.held(self.cache, self.index)
        for mine, its in zip(held, prefix.held(self.host), strict=True):
            np.testing.assert_array_equal(mine, its)
        paxcache.check(self.cache, held=tuple(map(np.asarray, held)))
        assert int(self.index.num_entries) == self.host.num_entries
        used = np.flatnonzero(np.asarray(self.index.depths) >= 0)
        parents = np.asarray(self.index.parents)[used]
        assert set(parents[parents >= 0].tolist()) <= set(used.tolist()), "an entry lost its parent"

    @staticmethod
    def padded(rows, prompts, keys):
        """Arguments for two rows in the shapes that `published` has, so that few programs are compiled."""
        return (jnp.array([*rows, -1]), *padded([*prompts, []])), jnp.array([*keys, 0])

    def admit(self, rows, prompts, keys):
        lens = np.asarray(self.cache.seq_lens)
        self.host_cache, self.host, wanted = prefix.admit_rows(
            self.host_cache, self.host, rows, prompts, extra_keys=keys, partial=False
        )
        args, padded_keys = self.padded(rows, prompts, keys)
        self.cache, self.index, reused = device.admit(self.cache, self.index, *args, extra_keys=padded_keys)
        assert reused.tolist() == [*wanted.tolist(), -1]
        for row, prompt, key in zip(rows, prompts, keys, strict=True):
            if lens[row] == 0:
                self.tokens[row], self.keys[row] = list(prompt), key
        self.check()

    def compute(self, row, extra):
        count = min(extra, len(self.tokens[row]) - int(self.cache.seq_lens[row]))
        lens = jnp.zeros(B, jnp.int32).at[row].set(max(count, 0))
        self.make_room(lens)
        self.host_cache, _ = paxcache.extend(self.host_cache, lens, num_tokens=T)
        self.cache, step = paxcache.extend(self.cache, lens, num_tokens=T)
        self.check()
        return step

    def make_room(self, lens):
        self.host_cache, self.host, wanted = prefix.make_room(self.host_cache, self.host, lens, num_tokens=T)
        self.cache, self.index, freed = device.make_room(self.cache, self.index, lens, num_tokens=T)
        assert int(freed) == wanted
        self.check()

    def publish(self, rows):
        keys = [self.keys[row] for row in rows]
        prompts = [self.tokens[row] for row in rows]
        self.host_cache, self.host = prefix.publish_rows(
            self.host_cache, self.host, rows, prompts, extra_keys=keys
        )
        args, padded_keys = self.padded(rows, prompts, keys)
        self.cache, self.index, lost = device.publish(self.cache, self.index, *args, extra_keys=padded_keys)
        assert int(lost) == 0
        self.check()

    def release(self, rows):
        gone = jnp.asarray([row in rows for row in range(B)])
        self.host_cache, self.cache = (
            paxcache.release(self.host_cache, gone),
            paxcache.release(self.cache, gone),
        )
        for row in rows:
            self.tokens[row] = []

    def evict(self, count):
        self.host_cache, self.host, wanted = prefix.evict(self.host_cache, self.host, count)
        self.cache, self.index, freed = device.evict(self.cache, self.index, count)
        assert int(freed) == wanted
        self.check()

    def match(self, prompts, keys):
        (_, *args), padded_keys = self.padded((0, 0), prompts, keys)
        found = device.match(self.index, *args, extra_keys=padded_keys)
        for n, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
            wanted = prefix.match(self.host, prompt, extra_key=key, partial=False)
            assert int(found.num_tokens[n]) == wanted.num_tokens
            entries = np.asarray(found.entries)[n]
            for g, pages in enumerate(self.index.pages):
                np.testing.assert_array_equal(np.asarray(pages)[entries[entries >= 0]], wanted.ids[:, g])

    def fork(self, parent, child):
        pair = jnp.array([parent]), jnp.array([child])
        self.host_cache, _ = paxcache.fork(self.host_cache, *pair)
        was = int(self.cache.seq_lens[child])
        self.cache, ok = paxcache.fork(self.cache, *pair)
        if bool(ok[0]) and was == 0 and int(self.cache.seq_lens[child]):
            self.tokens[child], self.keys[child] = list(self.tokens[parent]), self.keys[parent]


some_rows = st.lists(st.integers(0, B - 1), min_size=2, max_size=2, unique=True)
serve = st.tuples(
    st.just("serve"),
    some_rows,
    st.tuples(random_prompts, random_prompts),
    st.tuples(st.sampled_from([0, 0, 0, 1]), st.sampled_from([0, 0, 0, -5])),
    st.sampled_from(["admit", "compute", "publish", "publish", "release", "release"]),
)
programs = st.lists(
    st.one_of(
        serve,
        serve,
        st.tuples(st.just("evict"), st.integers(0, 4)),
        st.tuples(st.just("go on"), some_rows, st.integers(1, 5)),
        st.tuples(st.just("release"), some_rows),
        st.tuples(st.just("match"), st.tuples(random_prompts, random_prompts), st.just((0, 1))),
        st.tuples(st.just("fork"), st.integers(0, B - 1), st.integers(0, B - 1)),
        st.tuples(st.just("make room"), st.lists(st.integers(0, 8), min_size=B, max_size=B)),
    ),
    min_size=5,
    max_size=25,
)


@hypothesis.settings(max_examples=20)
@hypothesis.given(config=st.sampled_from(CONFIGS), program=programs)
def test_the_device_index_does_what_the_host_index_does(config, program):
    """Same tokens reused, same pages mapped, shared, folded and evicted: the caches agree in every integer."""
    pair = Pair(config)
    for name, *args in program:
        if name == "serve":
            rows, both, keys, way = args
            pair.release(rows)
            pair.admit(rows, both, keys)
            if way != "admit":
                for row in rows:
                    pair.compute(row, L)
            if way in ("publish", "release"):
                pair.publish(rows)
            if way == "release":
                pair.release(rows)
        elif name == "go on":
            rows, extra = args
            for row in rows:
                pair.compute(row, extra)
            pair.publish(rows)
        else:
            getattr(pair, name.replace(" ", "_"))(
                *(jnp.array(a) for a in args) if name == "make room" else args
            )
    pair.release(range(B))
    pair.evict(100)
    assert int(pair.index.num_entries) == 0


def published(config, prompts, *, width=L, capacity=None, index=None, cache=None):
    """A cache whose rows computed the prompts (none where they are too few), and an index that holds them."""
    cache = paxcache.init(config) if cache is None else cache
    index = device.init(config, capacity=capacity) if index is None else index
    tokens, lens = padded([*prompts, *[[]] * (cache.max_seqs - len(prompts))], width)
    rows = jnp.arange(cache.max_seqs)
    cache, index, _ = device.admit(cache, index, rows, tokens, lens)
    cache, step = paxcache.extend(cache, lens - cache.seq_lens, num_tokens=cache.max_seqs * width)
    step.raise_if_failed()
    return *device.publish(cache, index, rows, tokens, lens), tokens, lens


def test_a_full_index_drops_the_oldest_and_says_so():
    config = config_of(layer_group(), page_size=2, num_pages=32, max_seqs=4, max_pages_per_seq=8)
    cache, index, lost, *_ = published(config, [[1] * 4, [2] * 4], width=14, capacity=5)
    assert int(lost) == 0 and int(index.num_entries) == 4
    cache = paxcache.release(cache, jnp.ones(4, bool))
    cache, index, lost, *_ = published(config, [[1] * 2, [3] * 6], width=14, cache=cache, index=index)
    assert int(lost) == 2  # one was free; the first prompt's last page went, then the second one's
    paxcache.check(cache, held=tuple(map(np.asarray, device.held(cache, index))))
    found = device.match(index, *padded([[1] * 4, [2] * 4, [3] * 6, [4]], 14))
    assert found.num_tokens.tolist() == [2, 2, 6, 0]
    # A prompt longer than the index: the entries used before go, and of its own the first ones stay.
    cache = paxcache.release(cache, jnp.ones(4, bool))
    cache, index, lost, *_ = published(config, [[4] * 14], width=14, cache=cache, index=index)
    assert int(lost) == 5 + 2 and int(index.num_entries) == 5
    assert device.match(index, *padded([[4] * 14] * 4, 14)).num_tokens.tolist() == [10] * 4
    paxcache.check(cache, held=tuple(map(np.asarray, device.held(cache, index))))


def test_statuses_of_admit():
    config = CONFIGS[0]
    cache, index, _, tokens, lens = published(config, [[1, 2, 3, 4, 5]])
    rows = jnp.array([0, 1, 2, 2, -1, B, -9])
    before = copy_of(cache)
    cache, index, reused = device.admit(
        cache, index, rows, jnp.broadcast_to(tokens[0], (7, L)), jnp.full(7, lens[0])
    )
    assert reused.tolist() == [-1, 4, -1, -1, -1, -1, -1]
    assert cache.seq_lens.tolist() == [5, 4, 0]
    np.testing.assert_array_equal(cache.groups[0].block_tables[0], before.groups[0].block_tables[0])
    paxcache.check(cache, held=tuple(map(np.asarray, device.held(cache, index))))


@pytest.mark.parametrize("lens", [[0, 0], [1, -3], [99, 2]])
def test_lengths_out_of_range_are_harmless(lens):
    cache, index, _, tokens, _ = published(CONFIGS[0], [[1, 2, 3, 4], [1, 2]])
    rows, lens = jnp.arange(B), jnp.array([*lens, 0])
    cache = paxcache.release(cache, jnp.ones(B, bool))
    wanted = [min(max(n - 1, 0) // S * S, stored) for n, stored in zip(lens.tolist(), (4, 2, 0), strict=True)]
    cache, index, reused = device.admit(cache, index, rows, tokens, lens)
    assert reused.tolist() == wanted
    cache, index, _ = device.publish(cache, index, rows, tokens, lens)
    paxcache.check(cache, held=tuple(map(np.asarray, device.held(cache, index))))


def test_a_row_that_is_admitted_here_has_no_epoch():
    """Of what weights the pages are that it was given, nobody knows."""
    config, (tokens, lens) = CONFIGS[0], padded([[1, 2, 3]])
    cache, _, _ = prefix.admit(paxcache.init(config), prefix.init(config), 0, [])
    assert np.asarray(cache.epochs).tolist() == [1, 0, 0]
    cache, _, reused = device.admit(cache, device.init(config), jnp.array([0]), tokens, lens)
    assert reused.tolist() == [0] and np.asarray(cache.epochs).tolist() == [0, 0, 0]


def test_prompts_shorter_than_a_page():
    _, index, lost, tokens, lens = published(CONFIGS[0], [[1], [2]])
    assert int(index.num_entries) == 0 and int(lost) == 0
    assert device.match(index, tokens, lens).num_tokens.tolist() == [0, 0, 0]


def test_hash_collisions_never_serve_another_text(monkeypatch):
    """GHSA-rm76-4mrf-v9r8. With every hash equal one prompt's pages are found at most, and only for its own text."""
    monkeypatch.setattr(
        device, "_hash", lambda pages, extra_keys: jnp.full((2, *pages.shape[:2]), 5, jnp.uint32)
    )
    # No other test has these shapes: the programs traced here are not used again.
    config = config_of(layer_group(), page_size=3, num_pages=13, max_seqs=4, max_pages_per_seq=5)
    mine, others = [1, 2, 3, 4, 5, 6], [[1, 2, 9, 4, 5, 6], [9, 9, 9, 4, 5, 6], [4, 5, 6]]
    cache, index, _, tokens, lens = published(config, [mine, *others], width=6)
    assert len(set(np.asarray(index.hashes[0]).tolist())) == 2  # that of every text, and that of free entries
    for _ in range(2):
        found = device.match(index, tokens, lens)
        ids = np.asarray(index.pages[0])
        for n, entries in enumerate(np.asarray(found.entries)):
            for w, entry in enumerate(entries):
                if entry >= 0:
                    np.testing.assert_array_equal(index.tokens[entry], tokens[n, 3 * w : 3 * w + 3])
                    assert ids[entry] == cache.groups[0].block_tables[n, w]
        elsewhere = device.match(index, tokens, lens, extra_keys=jnp.full(4, 8))
        assert not elsewhere.num_tokens.any()
        num_entries = int(index.num_entries)
        cache, index, _ = device.publish(cache, index, jnp.arange(4), tokens, lens)
        assert int(index.num_entries) <= num_entries  # what collides is not stored again and again
        paxcache.check(cache, held=tuple(map(np.asarray, device.held(cache, index))))
    cache = paxcache.release(cache, jnp.ones(4, bool))
    cache, index, _ = device.evict(cache, index, 100)
    assert int(index.num_entries) == 0 and not cache.groups[0].ref_counts.any()


def test_hashes_differ_where_texts_do():
    """Single tokens changed, moved and swapped, and extra keys: all of these prefixes have hashes of their own."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 50_000, 16)
    texts = [base, base[::-1], np.zeros(16), np.ones(16), np.arange(16), -np.ones(16)]
    for i in range(16):
        for change in (1, -1, 2**16, 2**31 - 1 - int(base[i])):
            texts.append(np.where(np.arange(16) == i, base + change, base))
        texts.append(np.roll(base, i + 1) if i < 15 else base[::-1] + 1)
    pages = jnp.asarray(np.stack(texts).astype(np.int32)).reshape(-1, 4, 4)
    hashes = [np.asarray(device._hash(pages, jnp.full(len(texts), key))) for key in (0, 1, -1)]
    names, words = {}, set()
    for key, lanes in zip((0, 1, -1), hashes, strict=True):
        for n, text in enumerate(texts):
            for w in range(4):
                word = tuple(lanes[:, n, w].tolist())
                name = (key, tuple(text[: 4 * w + 4].tolist()))
                assert names.setdefault(name, word) == word
                words.add(word)
    assert len(words) == len(names) > 500


def test_a_page_that_an_entry_with_another_key_holds_is_not_stored_twice():
    cache, index, _, tokens, lens = published(CONFIGS[0], [[1, 2, 3, 4]])
    cache, index, _ = device.publish(cache, index, jnp.arange(B), tokens, lens, extra_keys=jnp.full(B, 3))
    assert int(index.num_entries) == 2
    cache = paxcache.release(cache, jnp.ones(B, bool))
    cache, index, freed = device.evict(cache, index, 2)
    assert int(freed) == 2 and not cache.groups[0].ref_counts.any()


def test_what_hangs_below_is_kept_with_all_before_it():
    """A page that somebody else references, here its last, keeps the pages before it: no entry loses its parent."""
    cache, index, _, tokens, lens = published(CONFIGS[0], [[1, 2, 3, 4, 5, 6, 7, 8]])
    last = cache.groups[0].block_tables[0, 3]
    cache = paxcache.release(cache, jnp.ones(B, bool))
    counts = cache.groups[0].ref_counts
    group = dataclasses.replace(cache.groups[0], ref_counts=counts.at[last].add(1))
    busy, index, freed = device.evict(dataclasses.replace(cache, groups=(group,)), index, 100)
    assert int(freed) == 0 and device.match(index, tokens, lens).num_tokens.tolist() == [8, 0, 0]
    group = dataclasses.replace(busy.groups[0], ref_counts=counts)
    _, index, freed = device.evict(dataclasses.replace(busy, groups=(group,)), index, 100)
    assert int(freed) == 4 and int(index.num_entries) == 0


def test_reset():
    cache, index, _, tokens, lens = published(CONFIGS[0], [[1, 2, 3, 4], [1, 2, 5, 6]])
    cache, index = device.reset(cache, index)
    assert not device.match(index, tokens, lens).num_tokens.any()
    paxcache.check(cache)
    cache, index, _ = device.publish(cache, index, jnp.arange(B), tokens, lens)
    assert device.match(index, tokens, lens).num_tokens.tolist() == [4, 4, 0]


# Windows.


class Entry:
    """One page of text in the plain model."""

    def __init__(self, depth, num_groups):
        self.depth, self.tick, self.pages = depth, 0, [-1] * num_groups


class Model:
    """What the device index holds, in plain Python: by (extra key, text up to the page's end), an `Entry`."""

    def __init__(self, config):
        self.size, self.windows = config.page_size, [g.sliding_window for g in config.layer_groups]
        self.entries: dict[tuple[int, tuple[int, ...]], Entry] = {}
        self.tick = 0

    def chain(self, tokens, key):
        for page in range(len(tokens) // self.size):
            text = (key, tuple(tokens[: (page + 1) * self.size]))
            if text not in self.entries:
                return
            yield self.entries[text]

    def first_seen(self, num_pages, window):
        return 0 if window is None else max(num_pages * self.size - window + 1, 0) // self.size

    def match(self, tokens, key):
        """The entries that can be reused, and per group the pages that are needed of them."""
        found = list(self.chain(tokens, key))
        while found:
            needed = [range(self.first_seen(len(found), w), len(found)) for w in self.windows]
            if all(found[page].pages[g] >= 0 for g, pages in enumerate(needed) for page in pages):
                break
            found.pop()
        tables = [[e.pages[g] for e in found] for g in range(len(self.windows))]
        for g, window in enumerate(self.windows):
            first = self.first_seen(len(found), window)
            tables[g][:first] = [-1] * first
        return found, tables

    def publish(self, tokens, key, tables, tick):
        """One row's pages, tables [G][M], changed as they fold."""
        for page in range(len(tokens) // self.size):
            text = (key, tuple(tokens[: (page + 1) * self.size]))
            own = [table[page] for table in tables]
            if any(p < 0 and w is None for p, w in zip(own, self.windows, strict=True)):
                return
            entry = self.entries.setdefault(text, Entry(page, len(own)))
            entry.tick = tick
            for g in range(len(own)):
                if own[g] >= 0 > entry.pages[g]:
                    entry.pages[g] = own[g]
                elif own[g] >= 0:
                    tables[g][page] = entry.pages[g]

    def below(self, text):
        key, tokens = text
        return [t for t in self.entries if t[0] == key and t[1][: len(tokens)] == tokens and t != text]

    def evict(self, needs, counts):
        """Frees pages as `needs` says by group, counts [G][P]; returns how many went in each."""

        def in_use(text):
            return any(p >= 0 and counts[g][p] > 1 for g, p in enumerate(self.entries[text].pages))

        before = [sum(e.pages[g] >= 0 for e in self.entries.values()) for g in range(len(needs))]
        most = max([n for n, w in zip(needs, self.windows, strict=True) if w is None], default=0)
        free = [t for t in self.entries if not in_use(t) and not any(map(in_use, self.below(t)))]
        for text in sorted(free, key=lambda t: (self.entries[t].tick, -self.entries[t].depth))[:most]:
            del self.entries[text]
        for g, window in enumerate(self.windows):
            if window is None:
                continue
            held = [t for t in self.entries if self.entries[t].pages[g] >= 0]
            lacking = needs[g] - (before[g] - len(held))
            held = [t for t in held if counts[g][self.entries[t].pages[g]] == 1]
            order = sorted(
                held, key=lambda t: (not self.spare(t, window), self.entries[t].tick, self.entries[t].depth)
            )
            for text in order[: max(lacking, 0)]:
                self.entries[text].pages[g] = -1
        if None not in self.windows:
            empty = [
                t for t in self.entries if all(max(self.entries[u].pages) < 0 for u in [t, *self.below(t)])
            ]
            for text in empty:
                del self.entries[text]
        return [n - sum(e.pages[g] >= 0 for e in self.entries.values()) for g, n in enumerate(before)]

    def spare(self, text, window):
        """Whether so many pages follow in one line, last used together, that the window from its end misses this."""
        reach = -(-(window - 1) // self.size) + 1
        for _ in range(reach):
            children = [t for t in self.below(text) if len(t[1]) == len(text[1]) + self.size]
            if len(children) != 1 or self.entries[children[0]].tick != self.entries[text].tick:
                return False
            text = children[0]
        return True


class WindowWorld(World):
    """A cache with a device index and its model; every token's value says what text it stands for."""

    index: Any

    def __init__(self, config):
        super().__init__(config)
        self.index, self.model = device.init(config, capacity=100), Model(config)

    def counts(self):
        return [np.asarray(g.ref_counts) for g in self.cache.groups]

    def admit(self, row, tokens, *, key=0, **_):
        if self.lens()[row]:
            return -1
        found, tables = self.model.match(tokens[: max(len(tokens) - 1, 0)], key)
        self.cache, self.index, reused = device.admit(
            self.cache, self.index, jnp.array([row]), *padded([tokens], 16), extra_keys=jnp.array([key])
        )
        assert reused.tolist() == [len(found) * self.size]
        for g, pages in enumerate(tables):
            assert self.tables(g)[row, : len(found)].tolist() == pages
        self.model.tick += 1
        for entry in found:
            entry.tick = self.model.tick
        self.tokens[row], self.keys[row], self.context[row] = list(tokens), key, (0, key)
        return int(reused[0])

    def compute(self, row, upto=None):
        begin, end = self.lens()[row], len(self.tokens[row]) if upto is None else upto
        count = max(end - begin, 0)
        lens = np.zeros(self.config.max_seqs, np.int32)
        lens[row] = count
        free = [(c == 0).sum() for c in self.counts()]
        first = begin // self.size
        new = [max(-(-(begin + count) // self.size) - first - (begin % self.size > 0), 0)] * len(free)
        needs = [max(n - f, 0) if count else 0 for n, f in zip(new, free, strict=True)]
        freed = self.model.evict(needs, self.counts())
        self.cache, self.index, got = device.make_room(
            self.cache, self.index, jnp.asarray(lens), num_tokens=16
        )
        assert int(got) == max(freed)
        return super().compute(row, begin + count)

    def publish(self, row, **_):
        tokens = self.tokens[row][: self.lens()[row]]
        tables = [self.tables(g)[row].tolist() for g in range(len(self.cache.groups))]
        self.model.tick += 1
        self.model.publish(tokens, self.keys[row] or 0, tables, self.model.tick)
        self.cache, self.index, lost = device.publish(
            self.cache,
            self.index,
            jnp.array([row]),
            *padded([tokens], 16),
            extra_keys=jnp.array([self.keys[row] or 0]),
        )
        assert int(lost) == 0
        for g, table in enumerate(tables):
            assert self.tables(g)[row].tolist() == table

    def evict(self, num_pages, **_):
        counts = self.counts()
        could = np.asarray(device.evictable(self.cache, self.index))
        model = copy.deepcopy(self.model)
        assert could.tolist() == model.evict([100] * len(counts), counts)
        freed = self.model.evict([num_pages] * len(counts), counts)
        self.cache, self.index, got = device.evict(self.cache, self.index, num_pages)
        assert int(got) == min(freed)
        return int(got)

    def check(self):
        index = self.index
        held = tuple(map(np.asarray, device.held(self.cache, index)))
        # `World.check` asks the host index: it is told what this one holds.
        host, self.index = self.index, dataclasses.replace(prefix.init(self.config), held=held)
        super().check()
        self.index = host
        parents, tokens = np.asarray(index.parents), np.asarray(index.tokens)
        found = {}
        for entry in np.flatnonzero(np.asarray(index.depths) >= 0):
            text, at = [], entry
            while at >= 0:
                text, at = [*tokens[at].tolist(), *text], parents[at]
            name = (int(index.extra_keys[entry]), tuple(text))
            found[name] = [int(p[entry]) for p in index.pages]
        assert found == {text: entry.pages for text, entry in self.model.entries.items()}
        assert bool(device.belongs(self.cache, index))


BESIDE = dict(page_size=2, max_seqs=3, max_pages_per_seq=8)
WINDOWED = (
    config_of(layer_group(), layer_group(sliding_window=4, num_pages=11), num_pages=24, **BESIDE),
    config_of(layer_group(sliding_window=3), num_pages=12, **BESIDE),
    config_of(layer_group(sliding_window=2), layer_group(sliding_window=7), num_pages=20, **BESIDE),
)
texts = st.tuples(
    st.sampled_from([(1,) * 6, (1,) * 9, (1, 1, 2, 2, 2, 2, 2)]), st.lists(st.integers(1, 2), max_size=6)
).map(lambda parts: [*parts[0], *parts[1]])


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    config=st.sampled_from(WINDOWED),
    program=st.lists(
        st.tuples(
            st.integers(0, 2),
            texts,
            st.sampled_from([0, 0, 1]),
            st.sampled_from([2, 4, 9, 16]),
            st.integers(0, 3),
        ),
        min_size=3,
        max_size=8,
    ),
)
def test_pages_beside_windows_do_what_a_plain_model_does(config, program):
    """Prompts in chunks, published after each or at the end; what is reused, held and evicted, page by page."""
    w = WindowWorld(config)
    for row, tokens, key, chunk, evicted in program:
        w.release(row)
        w.admit(row, tokens, key=key)
        while w.lens()[row] < len(tokens):
            if w.compute(row, min(w.lens()[row] + chunk, len(tokens))) != paxcache.Status.OK:
                w.release(row)  # rows map too much: nothing more can go
                break
            if evicted != 1:
                w.publish(row)
            w.check()
        w.publish(row)
        w.evict(evicted)
        w.check()
    w.release(0, 1, 2)
    w.evict(100)
    w.check()
    assert int(w.index.num_entries) == 0 and not any(c.any() for c in w.counts())


def test_a_small_pool_beside_a_window_does_not_limit_the_rest():
    """Eight prompts' pages stay in the group that sees all, though the other has room for a few of their windows."""
    config = config_of(
        layer_group(), layer_group(sliding_window=4, num_pages=16), num_pages=64, page_size=2, max_seqs=3,
        max_pages_per_seq=8,
    )  # fmt: skip
    w = WindowWorld(config)
    prompts = [[n] * 13 for n in range(3, 11)]
    for tokens in prompts:
        w.admit(0, tokens)
        for upto in (5, 9, 13):
            w.compute(0, upto)
            w.publish(0)
        w.release(0)
    w.check()
    assert int(w.index.num_entries) == 8 * 6 and len(w.model.entries) == 48
    again = [w.admit(0, tokens) for tokens in prompts if w.release(0) is None]
    assert (
        again == [0] * 4 + [12] * 4
    )  # where the window is whole; entries that could not be cut would be two prompts'
    assert (w.tables(1)[0, :6] >= 0).tolist() == [False] * 4 + [True] * 2


def test_generation_beside_windows_reuses_and_changes_no_token():
    rng = np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(97, 8)), jnp.float32)

    def model(params, tokens, cache, step, logits_at):
        """Each layer's keys and values follow from all that the tokens before it see."""
        x = params[tokens % 97]
        for layer in range(len(cache.groups)):
            k = x[:, None, :4]
            cache = paxcache.append(cache, layer, k, k + 1, step)
            out = paxcache.attend(cache, layer, x[:, None, 4:], step)[:, 0]
            x = jnp.concatenate([jnp.sin(3 * out + x[:, :4]), x[:, 4:] + out], axis=1)
        return x[logits_at] @ params.T, cache

    shared = rng.integers(0, 97, 24).tolist()
    prompts = [shared + rng.integers(0, 97, n).tolist() for n in (3, 20, 9, 1)]
    for groups in ([5], [6, None, 4]):
        config = config_of(
            *(layer_group(sliding_window=w, num_pages=60 if w is None else 24) for w in groups),
            page_size=4, num_pages=60, max_seqs=2, max_pages_per_seq=16,
        )  # fmt: skip
        options: Any = {"max_new_tokens": 9, "chunk_size": 8}
        alone = paxcache.generate(model, table, paxcache.init(config), prompts, **options)
        state: Any = {"cache": paxcache.init(config), "index": device.init(config)}
        steps = []
        for _ in range(2):
            out: Any = paxcache.generate(
                model, table, state["cache"], prompts, index=state["index"], **options
            )
            assert out.to_lists() == alone.to_lists()
            paxcache.check(out.cache, held=tuple(map(np.asarray, device.held(out.cache, out.index))))
            state = {"cache": out.cache, "index": out.index}
            steps.append(int(out.num_steps))
        assert steps[1] < steps[0] < int(alone.num_steps), (groups, steps)
        other = [
            *shared,
            96,
            95,
        ]  # of the second prompt 20 tokens and 9 more came after what it shares with this
        assert int(device.match(out.index, *padded([other], 32)).num_tokens[0]) == 24


# Whose pages they are.


def moved_on(config, cache, index):
    """What else may happen to a pair between two calls: to tables, lengths and rows, in jit with donation, on disk."""
    cache, step = paxcache.extend(cache, jnp.array([1, 0, 0]), num_tokens=T)
    step.raise_if_failed()
    cache, _ = paxcache.fork(cache, jnp.array([0]), jnp.array([2]))
    cache = paxcache.reorder(cache, jnp.array([2, 1, 0]))
    cache = paxcache.truncate(cache, jnp.array([5, 5, 0]))
    host = offload.init(config, 8)
    cache, host, ticket = offload.preempt(cache, host, jnp.array([0]))
    cache, host, ok = offload.resume(cache, host, ticket, jnp.array([0]))
    assert bool(ok)
    cache = offload.resize(offload.defragment(cache), 12)
    return jax.jit(lambda *pair: pair, donate_argnums=(0, 1))(cache, index)


def test_an_index_of_another_cache_is_refused():
    config = CONFIGS[0]
    cache, index, _, tokens, lens = published(config, [[1, 2, 3, 4, 5], [1, 2, 9, 9]])
    other, its_index, *_ = published(config, [[4, 2, 3, 4, 5], [4, 2, 9, 9]])
    younger, young_index, _ = device.evict(paxcache.release(cache, jnp.ones(B, bool)), index, 1)
    for each, wrong in ((cache, its_index), (other, index), (younger, index), (cache, young_index),
                        (paxcache.init(config), index)):  # fmt: skip
        assert not bool(device.belongs(each, wrong))
        mine = paxcache.release(each, jnp.ones(B, bool))
        for call, answer in (
            (lambda c, i: device.admit(c, i, jnp.arange(B), tokens, lens), [-2] * B),
            (lambda c, i: device.publish(c, i, jnp.arange(B), tokens, lens), -1),
            (lambda c, i: device.evict(c, i, 3), -1),
            (lambda c, i: device.make_room(c, i, jnp.full(B, 8), num_tokens=T), -1),
            (lambda c, i: (c, i, device.evictable(c, i)), [-1]),
            (lambda c, i: (*device.reset(c, i), None), None),
        ):
            after, index_after, status = call(mine, wrong)
            assert (None if status is None else status.tolist()) == answer
            assert_same_cache(after, mine)
            assert int(index_after.num_entries) == (0 if answer is None else int(wrong.num_entries))
        with pytest.raises(ValueError, match="index: the pages it holds are not this cache's"):
            paxcache.generate(next_tokens, None, mine, [[1, 2, 3]], index=wrong, max_new_tokens=1)


def test_a_pair_is_one_whatever_else_happens_to_it():
    config = CONFIGS[0]
    cache, index, _, tokens, lens = published(config, [[1, 2, 3, 4, 5], [1, 2, 9, 9]])
    old = copy_of((cache, index))
    cache, index = moved_on(config, cache, index)
    assert bool(device.belongs(cache, index))
    cache = paxcache.release(cache, jnp.ones(B, bool))
    cache, index, reused = device.admit(cache, index, jnp.arange(B), tokens, lens)
    assert reused.tolist() == [4, 2, 0]
    cache, index, _ = device.evict(paxcache.release(cache, jnp.ones(B, bool)), index, 1)
    assert bool(device.belongs(cache, index))
    assert bool(device.belongs(*old)) and not bool(device.belongs(old[0], index))  # going back is fine
    assert bool(device.belongs(cache, device.init(config)))  # as is an index that holds nothing
    assert bool(device.belongs(dataclasses.replace(cache, holdings=None), old[1]))  # put together by hand
    cache, index = device.reset(cache, index)
    assert np.asarray(cache.holdings).tolist() == [0, 0]


def test_ages_go_on_beyond_a_word():
    """From short of the end of the clock's low word on: what is evicted first stays what was used first."""
    cache, index, _, tokens, lens = published(CONFIGS[0], [[1, 2], [3, 4], [5, 6]])
    low = 2**32 - 4 - int(index.tick[1])
    index = dataclasses.replace(
        index,
        tick=index.tick.at[1].add(jnp.uint32(low)),
        ticks=index.ticks.at[1].add(jnp.uint32(low)),
    )
    for used in (0, 2, 0):
        cache = paxcache.release(cache, jnp.ones(B, bool))
        rows = jnp.full(B, -1).at[used].set(used)
        cache, index, reused = device.admit(cache, index, rows, jnp.pad(tokens, ((0, 0), (0, 1))), lens + 1)
        assert int(reused[used]) == 2
    assert int(index.tick[0]) == 1
    cache = paxcache.release(cache, jnp.ones(B, bool))
    for gone in (1, 2, 0):
        before = device.match(index, tokens, lens).num_tokens
        cache, index, _ = device.evict(cache, index, 1)
        after = device.match(index, tokens, lens).num_tokens
        assert np.flatnonzero(before - after).tolist() == [gone]


# Compiled programs.


def sampled(config, prompts, lens, **options):
    """The example's compiled loop, cache and index given away."""
    run = jax.jit(lambda cache, index: rollout(cache, index, prompts, lens, **options), donate_argnums=(0, 1))
    cache, index, computed, most, fine = run(paxcache.init(config), device.init(config))
    assert bool(fine)
    paxcache.check(cache, held=tuple(map(np.asarray, device.held(cache, index))))
    assert not cache.seq_lens.any()
    return cache, index, int(computed), int(most)


def test_a_rollout_computes_and_stores_its_prompt_once():
    """16 samples of one prompt of 21 tokens, 4 at a time: one computes it, the others its last token."""
    lanes = 4
    config = config_of(layer_group(), page_size=4, num_pages=64, max_seqs=lanes, max_pages_per_seq=8)
    prompts, lens = jnp.arange(21)[None], jnp.array([21])
    cache, index, computed, most = sampled(config, prompts, lens, num_samples=16, num_lanes=lanes, num_new=3)
    assert computed == 21 + 15 * 1 + 16 * 3
    assert most == 5 + lanes  # the prompt's pages once, and one of its own for each sample
    assert int(index.num_entries) == int((cache.groups[0].ref_counts > 0).sum()) == 5


def test_a_rollout_of_many_prompts_shares_their_common_start_and_evicts_on_need():
    config = config_of(layer_group(), page_size=4, num_pages=12, max_seqs=2, max_pages_per_seq=6)
    own = np.random.default_rng(0).integers(9, 99, (6, 9))
    prompts = jnp.asarray(np.concatenate([np.tile(np.arange(8), (6, 1)), own], axis=1))
    _, index, computed, most = sampled(
        config, prompts, jnp.full(6, 17), num_samples=2, num_lanes=2, num_new=2
    )
    assert most <= 12
    assert computed == 8 + 6 * 9 + 6 * 1 + 12 * 2  # the common start once, each prompt once
    assert int(device.match(index, prompts[:1], jnp.array([8])).num_tokens[0]) == 8


def test_programs_are_in_place_without_loops_and_host():
    """No pass over a pool, no `while`, no host transfer, whatever is done to the index between two steps."""
    config = big_config()
    cache = cache_shapes(config)
    index = jax.eval_shape(lambda: device.init(config, capacity=512))
    rows, tokens, lens = shape(3, dtype="int32"), shape(3, 32, dtype="int32"), shape(3, dtype="int32")

    def program(cache, index, rows, tokens, lens, query_lens):
        cache, index, reused = device.admit(cache, index, rows, tokens, lens)
        cache, index, lost = device.publish(cache, index, rows, tokens, lens)
        cache, index, freed = device.make_room(cache, index, query_lens, num_tokens=8)
        cache, index, more = device.evict(cache, index, reused.sum())
        return cache, index, lost + freed + more

    compiled = (
        jax.jit(program, donate_argnums=(0, 1))
        .lower(cache, index, rows, tokens, lens, shape(config.max_seqs, dtype="int32"))
        .compile()
    )
    assert_in_place(compiled, cache)
    text = text_of(compiled)
    assert " while(" not in text and not _HOST.search(text)


def test_vmap():
    """Two caches and two indices side by side are two of each."""
    config = CONFIGS[0]
    prompts = [[[1, 2, 3, 4, 5], [1, 2, 9, 9]], [[5, 5, 5, 5, 5], [5, 5, 1, 1]]]
    made = [published(config, p) for p in prompts]
    caches, indices, _, tokens, lens = jax.tree.map(lambda *x: jnp.stack(x), *made)

    def again(cache, index, tokens, lens, count):
        cache = paxcache.release(cache, jnp.ones(B, bool))
        cache, index, freed = device.evict(cache, index, count)
        cache, index, reused = device.admit(cache, index, jnp.array([1, 0, 2]), tokens, lens)
        cache, index, lost = device.publish(cache, index, jnp.arange(B), tokens, lens)
        return cache, index, freed, reused, lost

    both = jax.vmap(again)(caches, indices, tokens, lens, jnp.array([1, 2]))
    for n, (cache, index, _, its_tokens, its_lens) in enumerate(made):
        alone = again(cache, index, its_tokens, its_lens, jnp.int32(n + 1))
        for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(x[n], y)


def test_one_program_serves_all_lengths():
    from test_faults import no_compilation

    cache, index, _, tokens, lens = published(CONFIGS[0], [[1, 2, 3, 4, 5], [1, 2, 9, 9]])
    call = functools.partial(device.publish, cache, index, jnp.arange(B), tokens)
    call(lens)
    device.evict(cache, index, 1)
    with no_compilation():
        for n in range(5):
            call(jnp.array([n, 4 - n, 0]))
            device.evict(cache, index, n)


def test_arguments_are_named():
    cache, index, _, tokens, lens = published(CONFIGS[0], [[1, 2, 3, 4]])
    windowed = config_of(layer_group(sliding_window=3), page_size=S)
    for other, what in ((windowed, r"\(2, \(3,\)\)"), (CONFIGS[1], r"\(2, \(None, None\)\)")):
        message = rf"index: made for another config: .* are \(2, \(None,\)\), the cache's {what}"
        for call in (device.evictable, device.reset, device.held, device.belongs):
            with pytest.raises(ValueError, match=message):
                call(paxcache.init(other), index)
    wrong: Any = (cache, None)
    for call in (device.evictable, device.reset, device.held, device.belongs):
        with pytest.raises(TypeError, match="index: expected a DeviceIndex"):
            call(*wrong)
    with pytest.raises(TypeError, match="index: expected a DeviceIndex"):
        device.match(wrong[1], tokens, lens)
    with pytest.raises(TypeError, match="index: expected a DeviceIndex"):
        device.make_room(cache, wrong[1], lens, num_tokens=4)
    with pytest.raises(ValueError, match=r"rows: expected shape \[N=1\], got int32\[2\]"):
        device.admit(cache, index, jnp.array([0, 1]), tokens[:1], lens[:1])
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        device.init(CONFIGS[0], capacity=0)
    bad: Any = [1.0] * B
    with pytest.raises(TypeError, match="lens: expected integer values"):
        device.match(index, tokens, bad)


# Growth.


def array_shapes(program, *args) -> set[tuple[int, ...]]:
    """Shapes of all arrays that a program makes, in its inner programs too."""
    found = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            found.update(getattr(v.aval, "shape", ()) for v in equation.outvars)
            for part in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(program)(*args).jaxpr)
    return found


def next_tokens(params, tokens, cache, step, logits_at):
    return jax.nn.one_hot(tokens[logits_at] + 1, 8), cache


@pytest.mark.parametrize("window", [None, 5])
def test_generation_with_an_index_makes_no_array_of_pairs_of_prompts(window):
    """Beside what it makes without an index, nothing is larger than the prompts, the tables and the index."""
    N, rows, width, C = 1009, 211, 19, 307
    sizes = dict(page_size=4, num_pages=509, max_seqs=rows, max_pages_per_seq=8)
    config = config_of(layer_group(), layer_group(sliding_window=window), **sizes)
    cache = cache_shapes(config)
    index = jax.eval_shape(lambda: device.init(config, capacity=C))

    def program(cache, index, prompts, lens):
        out = paxcache.generate(
            next_tokens, None, cache, prompts, index=index, max_new_tokens=2, prompt_lens=lens, chunk_size=256
        )
        return out.tokens, out.index

    prompts = shape(N, width, dtype="int32"), shape(N, dtype="int32")
    without = array_shapes(lambda cache, *prompts: program(cache, None, *prompts), cache, *prompts)
    shapes = array_shapes(program, cache, index, *prompts) - without
    largest = max(shapes, key=np.prod)
    assert np.prod(largest) <= 2 * N * (width + 2), largest
    assert any(C in s for s in shapes) and any(N in s for s in shapes)  # it did look at both


def test_memory_of_publish_grows_with_its_rows():
    """Four times the rows take four times the room, and none of it for pairs of rows."""

    def room(rows):
        config = config_of(layer_group(), page_size=4, num_pages=64, max_seqs=rows, max_pages_per_seq=16)
        args = shape(rows, dtype="int32"), shape(rows, 64, dtype="int32"), shape(rows, dtype="int32")
        index = jax.eval_shape(lambda: device.init(config))
        return jax.jit(device.publish).lower(cache_shapes(config), index, *args).compile()

    small, large = (temporaries(room(rows)) for rows in (64, 256))
    assert large <= 5 * small, (small, large)
    assert large < 256**2 * 16 * 4  # a flag for each token of each pair


def test_rows_that_offer_the_same_text_keep_the_pages_of_the_first():
    """Among many rows at once: equal beginnings of any length fold, and equal pages behind unequal ones do not."""
    rng = np.random.default_rng(0)
    config = config_of(layer_group(), page_size=2, num_pages=200, max_seqs=24, max_pages_per_seq=4)
    prompts = [rng.integers(0, 2, rng.integers(0, 9)).tolist() for _ in range(24)]
    keys = rng.integers(0, 2, 24).tolist()
    cache, index = paxcache.init(config), device.init(config)
    rows, (tokens, lens) = jnp.arange(24), padded(prompts)
    cache, _, _ = device.admit(cache, index, rows, tokens, lens)
    cache, step = paxcache.extend(cache, lens, num_tokens=200)
    step.raise_if_failed()
    before = np.asarray(cache.groups[0].block_tables)
    cache, index, lost = device.publish(cache, index, rows, tokens, lens, extra_keys=jnp.array(keys))
    tables = np.asarray(cache.groups[0].block_tables)
    first = {}
    for row, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        for page in range(len(prompt) // 2):
            text = (key, tuple(prompt[: 2 * page + 2]))
            assert tables[row, page] == first.setdefault(text, before[row, page]), (row, page)
    assert int(lost) == 0 and int(index.num_entries) == len(first) < sum(len(p) // 2 for p in prompts)
    paxcache.check(cache, held=tuple(map(np.asarray, device.held(cache, index))))


def test_a_page_that_two_texts_of_one_call_claim_is_stored_for_one():
    """Forks that say different things of the page they share: the first is believed."""
    config, lens = CONFIGS[0], jnp.array([4, 4, 0])
    cache, index = paxcache.init(config), device.init(config)
    cache, _ = paxcache.extend(cache, jnp.array([4, 0, 0]), num_tokens=T)
    cache, _ = paxcache.fork(cache, jnp.array([0]), jnp.array([1]))
    tokens, _ = padded([[1, 2, 3, 4], [1, 9, 3, 4], []])
    cache, index, _ = device.publish(cache, index, jnp.arange(B), tokens, lens)
    assert device.match(index, tokens, lens).num_tokens.tolist() == [4, 0, 0]
    paxcache.check(cache, held=tuple(map(np.asarray, device.held(cache, index))))
