"""Pages that arrive layer by layer while rows go on: they land where they are waited for, and nowhere else."""

from __future__ import annotations

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
from driver import config_of
from layouts import LAYOUTS, assert_same, bits, group, ids, with_random_bits
from paxcache import offload, prefix

S, M, B = 4, 4, 4
GROUPS = (group(num_layers=2), group(num_layers=1, v_head_dim=0, dtype=jnp.bfloat16, sliding_window=9))
CONFIG = config_of(*GROUPS, num_pages=14)
NUM_LAYERS = 3


@functools.cache
def compiled(function, **static):
    return jax.jit(functools.partial(function, **static))


def shared_rows(lens=(13, 6, 0, 0), config=CONFIG):
    """Rows 0 and 2 share all pages, the last of them partly filled; row 1 is another's. Random bits everywhere."""
    cache = with_random_bits(paxcache.init(config))
    for start in range(0, max(lens), S):
        step = jnp.array([min(max(n - start, 0), S) for n in lens])
        cache, result = compiled(paxcache.extend, max_query_len=S)(cache, step)
        result.raise_if_failed()
    cache, ok = paxcache.fork(cache, ids(0), ids(2))
    assert ok.all()
    return cache


def leave(cache, rows=(0, 2), capacity=28):
    """The rows go on a ticket by layers; what their pages held is overwritten."""
    host = offload.init(CONFIG, capacity)
    cache, host, ticket = offload.preempt(cache, host, ids(*rows), by_layer=True, max_pages=8)
    assert ticket.ok
    return noisy(cache), host, ticket


def noisy(cache):
    return jax.tree.map(lambda a, b: a if a.ndim < 4 else b, cache, with_random_bits(cache, seed=5))


@jax.jit
def land_all(cache, arrival):
    for layer in range(NUM_LAYERS):
        cache, arrival = offload.land(cache, layer, arrival)
    return cache, arrival


def dense(cache) -> list[np.ndarray]:
    """Per layer and leaf, the bits of [B, M * S, ...]."""
    values = [compiled(paxcache.gather_dense, layer=n, max_len=M * S)(cache) for n in range(NUM_LAYERS)]
    return [bits(x) for x in jax.tree.leaves(values)]


def assert_same_tokens(a, b, lens) -> None:
    """The first tokens of each row, so many of them, are the same in all layers."""
    for x, y in zip(dense(a), dense(b), strict=True):
        for row, n in enumerate(lens):
            np.testing.assert_array_equal(x[row, :n], y[row, :n])


def integers(cache):
    return dataclasses.replace(cache, groups=tuple(dataclasses.replace(g, pages=None) for g in cache.groups))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_rows_that_share_a_partly_filled_page_go_on(jitted):
    """The copy that `extend` makes of the page comes before the page."""
    cache, host, ticket = leave(shared_rows())

    def whole(cache, host, ticket):
        cache, _, ok = offload.resume(cache, host, ticket, ids(3, 0))
        return paxcache.extend(cache, jnp.array([1, 1, 0, 1]), max_query_len=1)[0], ok

    def by_layer(cache, host, ticket):
        cache, _, arrival, ok = offload.begin_resume(cache, host, ticket, ids(3, 0))
        cache, _ = paxcache.extend(cache, jnp.array([1, 1, 0, 1]), max_query_len=1)
        for layer in range(NUM_LAYERS):
            cache, arrival = offload.land(cache, layer, arrival)
        return cache, ok

    (wanted, ok), (found, found_ok) = (
        (jax.jit(f) if jitted else f)(cache, host, ticket) for f in (whole, by_layer)
    )
    assert ok and found_ok
    tails = [g.block_tables[jnp.array([0, 3]), 3] for g in wanted.groups]
    assert all((t >= 0).all() and t[0] != t[1] for t in tails), "the page was copied"
    assert_same(integers(found), integers(wanted))
    assert_same_tokens(found, wanted, (13, 6, 0, 13))


def test_a_released_row_gets_nothing():
    """Its pages are another row's by then, in the same places of the same row."""
    cache, host, ticket = leave(shared_rows())
    cache, _, arrival, ok = offload.begin_resume(cache, host, ticket, ids(0, 2))
    assert ok
    begun = cache
    cache = paxcache.release(cache, jnp.array([True, False, True, False]))
    cache, step = paxcache.extend(cache, jnp.array([13, 0, 0, 0]), max_query_len=16)
    assert step.ok.all()
    assert_same([g.block_tables[0] for g in cache.groups][:1], [g.block_tables[0] for g in begun.groups][:1])
    after, _ = land_all(cache, arrival)
    assert_same(after, cache)
    one_left = paxcache.release(begun, jnp.array([True, False, False, False]))
    after, _ = land_all(one_left, arrival)
    assert_same_tokens(after, land_all(begun, arrival)[0], (0, 6, 13, 0))


def test_a_row_that_was_emptied_by_truncate_gets_nothing():
    cache, host, ticket = leave(shared_rows())
    cache, _, arrival, ok = offload.begin_resume(cache, host, ticket, ids(0, 2))
    assert ok
    cache = paxcache.truncate(cache, jnp.array([0, 2**31 - 1, 0, 2**31 - 1], jnp.int32))
    cache, step = paxcache.extend(cache, jnp.array([13, 0, 0, 0]), max_query_len=16)
    assert step.ok.all()
    assert_same(land_all(cache, arrival)[0], cache)


def test_a_row_that_waits_offers_nothing_to_the_device_index():
    cache, host, ticket = leave(shared_rows())
    cache, _, arrival, ok = offload.begin_resume(cache, host, ticket, ids(0, 2))
    assert ok
    tokens, lens = jnp.arange(13, dtype=jnp.int32)[None], jnp.array([13], jnp.int32)

    def offered(cache):
        cache, index, _ = prefix.device.publish(cache, prefix.device.init(CONFIG), ids(0), tokens, lens)
        return int(sum(held.sum() for held in prefix.device.held(cache, index)))

    assert offered(cache) == 0
    assert offered(land_all(cache, arrival)[0]) > 0


def test_cancelled_pages_land_nowhere():
    cache, host, ticket = leave(shared_rows())
    begun, _, arrival, ok = offload.begin_resume(cache, host, ticket, ids(0, 2))
    assert ok
    begun, ok = paxcache.fork(begun, ids(2), ids(3))
    one, rest = offload.land(begun, 1, arrival)
    for cancel in (offload.cancel, jax.jit(offload.cancel)):
        gone = cancel(one, rest)
        assert_same(integers(gone), integers(cache))
        assert_same(land_all(gone, arrival)[0], gone)
    whole, done = land_all(begun, arrival)
    assert_same(offload.cancel(whole, done), whole)


def test_marks_end_with_the_last_layer():
    """Until then the rows offer nothing and cannot leave again; afterwards they are as before."""
    config = config_of(group(num_layers=3), num_pages=14)
    cache = paxcache.init(config)
    index = prefix.init(config, epoch=5)
    cache, index, _ = prefix.admit(cache, index, 0, list(range(9)))
    cache, _ = paxcache.extend(cache, jnp.array([9, 0, 0, 0]), max_query_len=9)
    idle, host, ticket = offload.preempt(cache, offload.init(config, 9), ids(0), by_layer=True)
    cache, host, arrival, ok = offload.begin_resume(idle, host, ticket, ids(1))
    assert ok and np.asarray(cache.epochs)[1] < 0
    for layer in (2, 0):
        cache, arrival = offload.land(cache, layer, arrival)
        assert prefix.publish(cache, index, 1, list(range(9)))[1].num_entries == 0
        after, _, refused = offload.preempt(cache, host, ids(1))
        assert not refused.ok
        assert_same(after, cache)
    with pytest.raises(ValueError, match="layer: 2 has landed already"):
        offload.land(cache, 2, arrival)
    cache, arrival = offload.land(cache, 1, arrival)
    assert jax.tree.leaves(arrival.blocks) == []
    assert np.asarray(cache.epochs)[1] == np.asarray(ticket.epochs)[0] == 6
    assert prefix.publish(cache, index, 1, list(range(9)))[1].num_entries == 2
    assert offload.preempt(cache, host, ids(1))[2].ok


def test_pages_of_no_row_are_kept_until_they_have_landed():
    """The caller gives them back meanwhile: nobody else gets them, and then everybody may."""
    cache = shared_rows()
    extent = offload.swap_out(cache, (ids(0, 1), ids(0)), by_layer=True)
    begun, arrival, found, ok = offload.begin_swap_in(cache, extent)
    assert ok
    dropped = offload.drop(begun, found)
    held = [np.bincount(f[f >= 0], minlength=14) for f in map(np.asarray, found)]
    paxcache.check(dropped, held=tuple(held))
    paxcache.check(begun, held=tuple(2 * h for h in held))
    assert_same(integers(land_all(dropped, arrival)[0]), integers(cache))
    assert_same(integers(offload.cancel(dropped, arrival)), integers(cache))
    landed, done = land_all(begun, arrival)
    assert_same(landed, offload.swap_in(cache, extent)[0])
    assert_same(offload.cancel(landed, done), landed)
    # A pool that grew has pages where the old one ended, and an entry that holds nothing goes to none of them.
    begun, arrival, _, ok = offload.begin_swap_in(
        cache, offload.swap_out(cache, (ids(-1, 0), ids(-1)), by_layer=True)
    )
    grown = offload.resize(begun, 16)
    after, _ = land_all(grown, arrival)
    for a, b in zip(jax.tree.leaves(after.groups), jax.tree.leaves(grown.groups), strict=True):
        if a.ndim > 3:
            np.testing.assert_array_equal(bits(a)[:, 14:], bits(b)[:, 14:])


class Flight:
    """A cache whose rows came back whole, and one whose rows still wait, under the same calls."""

    def __init__(self, seed: int):
        cache, host, ticket = leave(shared_rows())
        self.rng = np.random.default_rng(seed)
        self.whole, _, ok = compiled(offload.resume)(cache, host, ticket, ids(0, 3))
        assert ok
        self.waiting, _, self.arrival, ok = compiled(offload.begin_resume)(cache, host, ticket, ids(0, 3))
        assert ok
        self.kept = np.array([13, 6, 0, 13])  # tokens of each row that must be right in the end
        self.theirs = np.array([True, False, False, True])  # rows that come of the ticket's

    def both(self, function, *args: Any, **static: Any) -> Any:
        self.whole, *first = self._call(function, self.whole, args, static)
        self.waiting, *second = self._call(function, self.waiting, args, static)
        assert_same(first, second)
        ours, other = (dataclasses.replace(c, epochs=None) for c in (self.whole, self.waiting))
        assert_same(integers(ours), integers(other))
        return first

    @staticmethod
    def _call(function, cache, args, static):
        result = compiled(function, **static)(cache, *args)
        return result if isinstance(result, tuple) else (result,)

    def extend(self) -> None:
        """Tokens that are never written: what they show is anything."""
        lens = self.rng.integers(0, 4, B) * self.theirs
        self.both(lengthened, jnp.asarray(lens))

    def begin(self) -> None:
        """Another request in a row that is idle, with tokens of its own, before anything has landed."""
        lens = np.asarray(self.whole.seq_lens)
        idle = np.flatnonzero((lens == 0) & ~self.theirs)
        if not idle.size:
            return
        (length,) = self.both(begun, idle[0], self.rng.integers(1, 9), self.rng.integers(1, 99))
        self.kept[idle[0]] = int(length)

    def fork(self) -> None:
        parent, child = self.rng.integers(0, B, 2)
        if self.both(paxcache.fork, ids(parent), ids(child))[0].all():
            self.kept[child], self.theirs[child] = self.kept[parent], self.theirs[parent]

    def reorder(self) -> None:
        parents = np.where(self.rng.random(B) < 0.6, np.arange(B), self.rng.integers(-1, B, B))
        self.both(paxcache.reorder, ids(*parents))
        at = np.maximum(parents, 0)
        self.kept, self.theirs = np.where(parents < 0, 0, self.kept[at]), (parents >= 0) & self.theirs[at]

    def truncate(self) -> None:
        """Not to nothing, and not so far that what a window gave back would be seen."""
        lens = np.asarray(self.whole.seq_lens)
        cut = np.maximum(lens - self.rng.integers(0, 4, B), np.minimum(lens, 12))
        self.both(paxcache.truncate, jnp.asarray(cut))
        self.kept = np.minimum(self.kept, cut)

    def release(self) -> None:
        rows = self.rng.random(B) < 0.3
        self.both(paxcache.release, jnp.asarray(rows))
        self.kept[rows], self.theirs[rows] = 0, False

    def grow(self) -> None:
        size = self.whole.groups[0].ref_counts.shape[0]
        if size < 18:
            self.whole, self.waiting = (offload.resize(c, 18) for c in (self.whole, self.waiting))

    def pack(self) -> None:
        """Pages that are waited for stay where they are, so that the two are packed differently."""
        self.waiting = compiled(offload.defragment)(self.waiting)

    def end(self) -> None:
        after, _ = land_all(self.waiting, self.arrival)
        paxcache.check(after)
        assert_same(after.epochs, self.whole.epochs)
        lens = np.minimum(self.kept, np.asarray(self.whole.seq_lens))
        assert_same_tokens(after, self.whole, lens)
        gone = compiled(offload.cancel)(self.waiting, self.arrival)
        paxcache.check(gone)
        assert (np.asarray(gone.seq_lens)[self.theirs] == 0).all()
        assert_same_tokens(gone, self.whole, np.where(self.theirs, 0, lens))


def lengthened(cache, lens):
    return paxcache.extend(cache, lens, max_query_len=4)[0]


def begun(cache, row, length, name):
    lens = jnp.where(jnp.arange(B) == row, length, 0)
    cache, step = paxcache.extend(cache, lens, max_query_len=8)
    for layer, g in enumerate((GROUPS[0], *GROUPS)):
        k = jnp.full((B, 8, g.num_kv_heads, g.head_dim), name, jnp.float32)
        cache = paxcache.append(cache, layer, k, k if g.value_dim else None, step)
    return cache, jnp.where(step.ok[row], length, 0)


NAMES = ("extend", "extend", "begin", "fork", "reorder", "truncate", "release", "grow")


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=8),
    packed=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_happens_on_the_way_all_that_waits_gets_its_pages(names, packed, seed):
    flight = Flight(seed)
    for name in names:
        getattr(flight, name)()
    if packed:
        flight.pack()
    flight.end()


def test_an_arrival_fits_its_cache_or_is_refused():
    cache, host, ticket = leave(shared_rows())
    cache, _, arrival, _ = offload.begin_resume(cache, host, ticket, ids(0, 2))
    other = paxcache.init(config_of(group(num_layers=2), GROUPS[1]))
    arrival = dataclasses.replace(
        arrival,
        blocks=(tuple(jax.tree.map(lambda x: x[..., :2], b) for b in arrival.blocks[0]), arrival.blocks[1]),
    )
    with pytest.raises(ValueError, match=r"arrival: expected float32\[N, 2, 4, 4\] for group 0, got float32"):
        offload.land(other, 0, arrival)
    with pytest.raises(ValueError, match="arrival: expected pages of 1 groups, got 2"):
        offload.cancel(paxcache.init(LAYOUTS["f32"]), arrival)
