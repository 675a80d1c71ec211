"""Random programs over the public calls, each compared with the plain-Python model (see `driver`)."""

from __future__ import annotations

import copy

import hypothesis
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import paxcache
from driver import Driver, config_of, copy_of

INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)
B, M, S = 4, 4, 4
T, Q = 10, 3
WINDOW = 5

# One group; and two that differ in all they can, with pools so small that something is always refused.
CONFIGS = (
    config_of(num_pages=9),
    config_of(
        paxcache.LayerGroup(num_layers=2, num_kv_heads=1, head_dim=4, v_head_dim=2, dtype=jnp.float32),
        paxcache.LayerGroup(
            num_layers=1,
            num_kv_heads=2,
            head_dim=4,
            v_head_dim=0,
            dtype=jnp.float32,
            sliding_window=WINDOW,
            num_pages=7,
        ),
        num_pages=9,
    ),
)

rows = st.integers(-2, B + 1)
request = st.one_of(st.integers(0, 5), st.sampled_from([0, 1, 1, 1, -1, 16, 17, INT32_MAX, INT32_MIN]))
requests = st.lists(request, min_size=B, max_size=B)


class Cache(RuleBasedStateMachine):
    """A cache under fire. Calls are jitted, and give the cache away whenever `donate` was drawn."""

    @initialize(config=st.sampled_from(CONFIGS), donate=st.booleans())
    def start(self, config, donate):
        self.driver = Driver(config, donate=donate)
        self.saved = None
        self.floors = [0] * B

    def _extended(self, old_lens):
        """A row keeps what its window saw at the last extend: it may be cut back to there exactly."""
        for b, old in enumerate(old_lens):
            if self.driver.model.lens[b] > old:
                self.floors[b] = old

    @rule(lens=requests, write=st.sampled_from([True, True, True, False]))
    def extend_packed(self, lens, write):
        old = list(self.driver.model.lens)
        self.driver.extend(lens, num_tokens=T, write=write)
        self._extended(old)

    @rule(lens=requests)
    def extend_row_aligned(self, lens):
        old = list(self.driver.model.lens)
        self.driver.extend(lens, max_query_len=Q)
        self._extended(old)

    @rule(wanted=st.lists(st.booleans(), min_size=B, max_size=B))
    def decode(self, wanted):
        """The common case, so that rows grow long."""
        self.extend_packed([int(w) for w in wanted], True)

    @rule(entries=st.lists(st.tuples(rows, rows), min_size=3, max_size=3))
    def fork(self, entries):
        parents, children = zip(*entries, strict=True)
        idle = [n == 0 for n in self.driver.model.lens]
        self.driver.fork(parents, children)
        for p, c in entries:
            if 0 <= p < B and 0 <= c < B and idle[c] and self.driver.model.lens[c] > 0:
                self.floors[c] = self.floors[p]

    @rule(parents=st.lists(rows, min_size=B, max_size=B))
    def reorder(self, parents):
        self.driver.reorder(parents)
        self.floors = [self.floors[p] if 0 <= p < B else self.floors[b] for b, p in enumerate(parents)]

    @rule(
        cuts=st.lists(
            st.one_of(st.integers(0, 6), st.sampled_from(["keep", "negative", "longer"])),
            min_size=B,
            max_size=B,
        )
    )
    def truncate(self, cuts):
        """Cuts tokens off the ends; where a window gave pages back, no further than the last extend."""
        windowed = len(self.driver.model.groups) > 1
        lens = []
        for b, cut in enumerate(cuts):
            length = self.driver.model.lens[b]
            special = {"keep": INT32_MAX, "negative": -1 - b, "longer": length + 1}
            lens.append(
                special[cut] if cut in special else max(length - cut, self.floors[b] if windowed else 0)
            )
        self.driver.truncate(lens)

    @rule(gone=st.lists(st.booleans(), min_size=B, max_size=B))
    def release(self, gone):
        self.driver.release(gone)
        self.floors = [0 if g else n for g, n in zip(gone, self.floors, strict=True)]

    @rule()
    def save(self):
        """Keeps the cache as a value; donating callers keep a copy."""
        cache = copy_of(self.driver.cache) if self.driver.donate else self.driver.cache
        self.saved = cache, copy.deepcopy(self.driver.model), list(self.floors)

    @rule()
    def go_back(self):
        """An old value goes on from where it was, whatever was done since."""
        if self.saved is None:
            return
        cache, model, floors = self.saved
        self.driver.cache = copy_of(cache) if self.driver.donate else cache
        self.driver.model, self.floors = copy.deepcopy(model), list(floors)
        self.driver.compare()

    @rule(donate=st.booleans())
    def change_hands(self, donate):
        """Donating and keeping calls alternate on one cache."""
        if donate and not self.driver.donate and self.saved is not None:
            self.saved = copy_of(self.saved[0]), *self.saved[1:]
            self.driver.cache = copy_of(self.driver.cache)
        self.driver.donate = donate

    def teardown(self):
        """Releasing all rows restores the start."""
        if not hasattr(self, "driver"):
            return
        self.driver.release([True] * B)
        for group in self.driver.cache.groups:
            assert not np.asarray(group.ref_counts).any()
            assert (np.asarray(group.block_tables) == -1).all()
        assert not np.asarray(self.driver.cache.seq_lens).any()


TestCache = Cache.TestCase
TestCache.settings = hypothesis.settings(
    max_examples=45, stateful_step_count=30, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
