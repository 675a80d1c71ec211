"""Batched text generation as one compiled program. Imports the cache's modules, `prefix` and `offload`; never Flax.

Terms of this module: N prompts wait for R *lanes*. A lane is a cache row that was idle when generation began; R is
the smaller of N and the rows of the cache, so a step never computes more rows than there are prompts. A prompt *runs*
while it has a lane and *waits* otherwise. ``tokens[n]`` holds a prompt and what was generated from it; the tokens of a
lane still to be computed are those from its row's cached length on. That single rule makes prefill, chunked prefill,
decoding and the recomputation after a preemption the same step: compute the next tokens of every lane, and where a
lane has none left, sample one more.

Why it ends: tokens and pages go to the lanes in the order of their prompts, so the oldest running prompt advances in
every step in which any page is free. In a step that advances nobody the youngest gives its pages back; alone, it stops.

With `host_pages` the youngest's pages go to the host instead, and come back when it gets a lane again. A loop that
carried host memory, or held both ways over it, would leave it to the compiler whether anything travels; so the program
ends when pages are to be moved, the host moves them, and the same program goes on. That is a few times a run.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _checks, offload
from paxcache._allocator import cdiv, idle_rows
from paxcache._cache import extend, release
from paxcache._sampling import (
    Rules,
    Sampling,
    is_distribution,
    log_probability,
    per_prompt,
    resolve,
    sample,
)
from paxcache._types import INT32_MAX, PagedKVCache, Step
from paxcache.offload import _rows
from paxcache.prefix import device

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float32, Int32

type ModelFn = Callable[..., tuple[jax.Array, PagedKVCache]]
"""``model_fn(params, tokens i32[T], cache, step, logits_at i32[R]) -> (logits [R, V], cache)``, see `generate`."""

_GREEDY = Sampling()
_DEFAULT_CHUNK_SIZE = 512
_DEFAULT_INTERVAL = 16


class StopReason(enum.IntEnum):
    """Why generation from a prompt ended (values of ``Generation.stop_reasons``)."""

    UNFINISHED = 0
    """It did not: the stream was closed before."""
    STOP_TOKEN = 1
    """It produced one of its stop tokens, which is the last of its tokens."""
    LENGTH = 2
    """It has as many tokens as were asked for."""
    ROW_FULL = 3
    """Its row can hold no more (``max_pages_per_seq`` pages); a prompt longer than a row gives no tokens."""
    NO_PAGES = 4
    """It ran alone and the pool had no page left for it."""
    NO_ROW = 5
    """The cache had no idle row to run it in."""
    INVALID = 6
    """It was traced, and its length was below 1 or above the width of the prompts, or a token id below 0."""
    BAD_LOGITS = 7
    """The model gave it logits that are no distribution: NaN or inf among them, or all of them -inf. The tokens that it
    had stay."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns."""

    tokens: Int32[Array, "N max_new"]
    """Generated tokens of each prompt, a stop token included; 0 past the length."""
    lengths: Int32[Array, "N"]
    """How many tokens were generated."""
    stop_reasons: Int32[Array, "N"]
    """A `StopReason` for each prompt."""
    logprobs: Float32[Array, "N max_new"] | None
    """Log-probability of each token under the model's raw logits, 0 past the length; None if not asked for."""
    cache: PagedKVCache
    """The cache; every row that generation used is idle again."""
    index: device.DeviceIndex | None
    """The prefix index, which holds the pages of prompts and generated tokens; None if none was given."""
    num_steps: Int32[Array, ""]
    """Forward passes."""
    num_preemptions: Int32[Array, ""]
    """How often a prompt gave its pages back, to be recomputed or brought back later."""
    num_swaps: Int32[Array, ""]
    """How many of these times its pages went to the host; 0 without `host_pages`."""

    def to_lists(self) -> list[list[int]]:
        """The generated tokens as Python lists, without padding; read on the host."""
        return [
            row[:n].tolist() for row, n in zip(np.asarray(self.tokens), np.asarray(self.lengths), strict=True)
        ]


class _Job(NamedTuple):
    """What was asked for. Constant while the program runs."""

    prompt_lens: Int32[Array, "N"]
    limits: Int32[Array, "N"]  # of prompt and generated tokens together
    seeds: Int32[Array, "N"]
    stop_tokens: Int32[Array, "N E"]  # -1 is padding
    rules: Rules
    families: Int32[Array, "N"] | None  # see `_families`; None without an index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What the program's loops carry."""

    cache: PagedKVCache
    index: device.DeviceIndex | None
    tokens: Int32[Array, "N W"]
    num_tokens: Int32[Array, "N"]  # prompt and generated
    reasons: Int32[Array, "N"]
    logprobs: Float32[Array, "N max_new"] | None
    lane_rows: Int32[Array, "R"]  # B where the cache had fewer idle rows than lanes; never changes
    lane_prompts: Int32[Array, "R"]  # N where the lane is idle
    starved: Bool[Array, "R"]  # got fewer tokens than it could have had, for want of pages
    stalled: Bool[Array, ""]  # the last step advanced no lane
    changed: Bool[Array, ""]  # a prompt stopped or nobody advances: lanes are to be handed out anew
    num_steps: Int32[Array, ""]
    num_preemptions: Int32[Array, ""]
    num_swaps: Int32[Array, ""]
    away: Bool[Array, "N"] | None  # prompts whose pages are on the host; None: preemption recomputes
    leaving: Int32[Array, ""] | None  # the lane whose pages the host is to take, R for none

    @property
    def returning(self) -> Bool[Array, "R"]:
        """Lanes whose prompt's pages the host is to bring back."""
        if self.away is None:
            return jnp.zeros(self.lane_rows.shape[0], bool)
        return (self.lane_prompts < self.tokens.shape[0]) & self.away[self.prompts]

    @property
    def waits_for_host(self) -> Bool[Array, ""]:
        """Whether the host is to move pages before anything else happens."""
        if self.leaving is None:
            return jnp.bool_(False)
        return (self.leaving < self.lane_rows.shape[0]) | self.returning.any()

    @property
    def prompts(self) -> Int32[Array, "R"]:
        """Each lane's prompt; any prompt for an idle lane."""
        return jnp.minimum(self.lane_prompts, self.tokens.shape[0] - 1)

    @property
    def running(self) -> Bool[Array, "R"]:
        """Lanes whose prompt is unfinished."""
        return (self.lane_prompts < self.tokens.shape[0]) & (
            self.reasons[self.prompts] == StopReason.UNFINISHED
        )

    @property
    def cached(self) -> Int32[Array, "R"]:
        """Tokens in each lane's row."""
        return self.cache.seq_lens[jnp.minimum(self.lane_rows, self.cache.max_seqs - 1)]

    @property
    def wanted(self) -> Int32[Array, "R"]:
        """Tokens that each lane has yet to compute; at least 1 while it runs, its newest token."""
        return jnp.where(self.running, self.num_tokens[self.prompts] - self.cached, 0)


def _scatter(size: int, fill: Any, where: Any, index: Any, values: Any) -> jax.Array:
    """An array of `fill` with the values that `where` marks put at their indices."""
    empty = jnp.full(size, fill, jnp.asarray(values).dtype)
    return empty.at[jnp.where(where, index, size)].set(values, mode="drop")


def _sum_of_older(prompts: Int32[Array, "R"], values: Int32[Array, "R"]) -> Int32[Array, "R"]:
    """Per lane, the sum over the lanes with lower prompts: a running sum in prompt order without sorting."""
    older = prompts[None, :] < prompts[:, None]
    return jnp.sum(jnp.where(older, values[None, :], 0), axis=1, dtype=jnp.int32)


# The parts of the program, each from a state to a state.


def _families(tokens: Int32[Array, "N L"], lens: Int32[Array, "N"], page_size: int) -> Int32[Array, "N"]:
    """For each prompt the lowest one that begins with the same full page, itself if it has no more than a page."""
    N = tokens.shape[0]
    first = tokens[:, :page_size]
    longer = lens > page_size
    alike = (first[:, None, :] == first[None, :, :]).all(axis=-1) & longer[:, None] & longer[None, :]
    return jnp.argmax(alike | jnp.eye(N, dtype=bool), axis=1).astype(jnp.int32)


def _leaders(job: _Job, state: _State, waiting: Bool[Array, "N"]) -> Bool[Array, "N N"]:
    """For each waiting prompt those that had better compute the first page which they share before it starts."""
    assert state.index is not None
    assert job.families is not None
    N, S = state.tokens.shape[0], state.cache.page_size
    width = min(S + 1, state.tokens.shape[1])
    first = device.match(state.index, state.tokens[:, :width], jnp.minimum(state.num_tokens, width))
    computing = (
        jnp.zeros(N, bool).at[state.lane_prompts].set((state.wanted > 1) & ~state.starved, mode="drop")
    )
    prompts = jnp.arange(N, dtype=jnp.int32)
    before = waiting[None, :] & (prompts[None, :] < prompts[:, None])
    alike = job.families[:, None] == job.families[None, :]
    return alike & (computing[None, :] | before) & (waiting & (first.num_tokens == 0))[:, None]


def _admit(job: _Job, state: _State, *, chunk_size: int) -> tuple[_State, Bool[Array, ""]]:
    """Gives idle lanes to waiting prompts, lowest first, as long as the pages of all running prompts suffice.

    Pages are counted by what each prompt will hold when it has computed its tokens and one more, not by what it maps
    now, so that prompts admitted together do not count the same free pages twice. While nothing runs the first prompt
    is admitted whatever the count: its steps find out whether it can go on. Also says whether prompts wait for pages
    that are being computed, and are to be looked at again when those have been.
    """
    cache, N, R = state.cache, state.tokens.shape[0], state.lane_rows.shape[0]
    seated = jnp.zeros(N, bool).at[state.lane_prompts].set(True, mode="drop")
    waiting = (state.reasons == StopReason.UNFINISHED) & ~seated
    leaders = jnp.zeros((1, 1), bool)
    if state.index is not None:  # what is on the host comes back whole and waits for nobody's pages
        leaders = _leaders(job, state, waiting if state.away is None else waiting & ~state.away)
        waiting &= ~leaders.any(axis=1)
    idle = (state.lane_prompts == N) & (state.lane_rows < cache.max_seqs)
    turn, seat = jnp.cumsum(waiting, dtype=jnp.int32) - 1, jnp.cumsum(idle, dtype=jnp.int32) - 1

    row_capacity = cache.max_pages_per_seq * cache.page_size
    soon = jnp.minimum(jnp.minimum(state.num_tokens + 1, job.limits - 1), row_capacity)
    fits = jnp.bool_(True)
    for g, group in enumerate(cache.groups):
        pages = cdiv(soon, cache.page_size)
        if group.sliding_window is not None:  # pages left of the window come back, one step after the chunk
            most = cdiv(group.sliding_window + 2 * chunk_size, cache.page_size) + 1
            pages = jnp.minimum(pages, most)
        held = jnp.sum(jnp.where(state.running, pages[state.prompts], 0), dtype=jnp.int32)
        mapped = (group.block_tables >= 0).sum(axis=1, dtype=jnp.int32)
        mapped = jnp.sum(mapped.at[state.lane_rows].get(mode="fill", fill_value=0), dtype=jnp.int32)
        free = (group.ref_counts == 0).sum(dtype=jnp.int32)
        if state.index is not None:  # pages that the index alone holds make way
            stored = state.index.depths >= 0
            free += (stored & (group.ref_counts[state.index.pages[g]] == 1)).sum(dtype=jnp.int32)
        new = jnp.cumsum(jnp.where(waiting & (turn < R), pages, 0), dtype=jnp.int32)
        fits &= held + new <= free + mapped
    fits |= (turn == 0) & ~state.running.any()
    admitted = waiting & fits & (turn < idle.sum(dtype=jnp.int32))

    next_prompts = _scatter(R, N, admitted, turn, jnp.arange(N, dtype=jnp.int32))
    lane_prompts = jnp.where(idle, next_prompts[jnp.maximum(seat, 0)], state.lane_prompts)
    index = state.index
    if index is not None:  # what is stored of a prompt is in its row from the start
        prompts = jnp.minimum(lane_prompts, N - 1)
        starts = idle & (lane_prompts < N)
        if state.away is not None:
            starts &= ~state.away[prompts]
        rows = jnp.where(starts, state.lane_rows, -1)
        cache, index, _ = device.admit(cache, index, rows, state.tokens[prompts], state.num_tokens[prompts])
    state = dataclasses.replace(
        state, cache=cache, index=index, lane_prompts=lane_prompts, starved=state.starved & ~idle
    )
    seated = jnp.zeros(N, bool).at[lane_prompts].set(True, mode="drop")
    return state, (leaders & seated).any()


def _ask(state: _State, *, num_tokens: int) -> Int32[Array, "R"]:
    """The tokens of a step that each lane would get if pages were plenty.

    One token goes to every lane that wants but one; the others take what is left, oldest prompt first.
    """
    wanted = jnp.minimum(state.wanted, num_tokens)
    one = wanted == 1
    left = num_tokens - one.sum(dtype=jnp.int32)
    many = jnp.where(one, 0, wanted)
    return jnp.where(one, 1, jnp.clip(left - _sum_of_older(state.lane_prompts, many), 0, many))


def _grant(state: _State, asked: Int32[Array, "R"]) -> Int32[Array, "R"]:
    """What pages allow of the tokens that lanes ask for.

    Pages are dealt in the order of the prompts, and a lane takes only the tokens that its pages hold. `extend` decides
    in the end; dealing here keeps a long prompt in a low row from standing before an older prompt in a higher one.
    """
    cache = state.cache
    in_last_page = (-state.cached) % cache.page_size  # slots of mapped pages that are yet empty
    need = cdiv(jnp.maximum(asked - in_last_page, 0), cache.page_size)
    free = jnp.stack([(g.ref_counts == 0).sum(dtype=jnp.int32) for g in cache.groups]).min()
    pages = jnp.clip(free - _sum_of_older(state.lane_prompts, need), 0, need)
    return jnp.minimum(asked, in_last_page + pages * cache.page_size)


def _step(model_fn: ModelFn, params: Any, job: _Job, state: _State, *, num_tokens: int) -> _State:
    """Computes the lanes' next tokens, `num_tokens` at most, and samples where a lane has computed all it has."""
    B, N = state.cache.max_seqs, state.tokens.shape[0]
    wanted, prompts = state.wanted, state.prompts
    asked = _ask(state, num_tokens=num_tokens)

    def by_row(lens):
        return jnp.zeros(B, jnp.int32).at[state.lane_rows].set(lens, mode="drop")

    if state.index is not None:
        cache, index, _ = device.make_room(state.cache, state.index, by_row(asked), num_tokens=num_tokens)
        state = dataclasses.replace(state, cache=cache, index=index)
    cache, step = extend(state.cache, by_row(_grant(state, asked)), num_tokens=num_tokens)

    rows = jnp.minimum(state.lane_rows, B - 1)
    computed = jnp.where(state.running, step.query_lens[rows], 0)
    prompt_of_row = jnp.zeros(B, jnp.int32).at[state.lane_rows].set(prompts, mode="drop")
    tokens = state.tokens[prompt_of_row[jnp.minimum(step.rows, B - 1)], step.positions]
    tokens = jnp.where(step.rows < B, tokens, 0)
    logits_at = jnp.where(computed > 0, step.query_starts[rows] + computed - 1, 0)
    logits, cache = _called(model_fn, params, tokens, cache, step, logits_at)

    totals = state.num_tokens[prompts]
    done = (computed > 0) & (computed == wanted)
    rules = job.rules.of(prompts)
    history = None if rules.repetition_penalty is None else state.tokens[prompts]
    chosen = sample(
        logits, rules, seeds=job.seeds[prompts], positions=totals, tokens=history, num_tokens=totals
    )
    drawn = done & is_distribution(logits, rules, chosen)
    at = jnp.where(drawn, prompts, N)
    logprobs = state.logprobs
    if logprobs is not None:
        values = log_probability(logits, chosen)
        logprobs = logprobs.at[at, totals - job.prompt_lens[prompts]].set(values, mode="drop")

    row_capacity = cache.max_pages_per_seq * cache.page_size
    reason = jnp.where(totals + 1 > row_capacity, StopReason.ROW_FULL, StopReason.UNFINISHED)
    reason = jnp.where(totals + 1 >= job.limits[prompts], StopReason.LENGTH, reason)
    is_stop = (chosen[:, None] == job.stop_tokens[prompts]).any(axis=1)
    reason = jnp.where(is_stop, StopReason.STOP_TOKEN, reason)
    reason = jnp.where(drawn, reason, StopReason.BAD_LOGITS).astype(jnp.int32)
    stalled = ~(computed > 0).any()
    return dataclasses.replace(
        state,
        cache=cache,
        tokens=state.tokens.at[at, totals].set(chosen, mode="drop"),
        num_tokens=state.num_tokens.at[at].add(1, mode="drop"),
        reasons=state.reasons.at[jnp.where(done, prompts, N)].set(reason, mode="drop"),
        logprobs=logprobs,
        starved=jnp.where(asked > 0, computed < asked, state.starved),
        stalled=stalled,
        changed=stalled | (done & (reason != StopReason.UNFINISHED)).any(),
        num_steps=state.num_steps + 1,
    )


def _called(
    model_fn: ModelFn,
    params: Any,
    tokens: Int32[Array, "T"],
    cache: PagedKVCache,
    step: Step,
    logits_at: Int32[Array, "R"],
) -> tuple[Float[Array, "R V"], PagedKVCache]:
    """What the model gives, checked: errors of the loop that carries the cache would not say whose fault it is."""
    R = logits_at.shape[0]
    result = model_fn(params, tokens, cache, step, logits_at)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"model_fn: expected (logits, cache), got {_checks.describe(result)}")
    logits, new = result
    if not isinstance(logits, jax.Array) or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"model_fn: expected floating logits [R={R}, V], got {_checks.describe(logits)}")
    if logits.ndim != 2 or logits.shape[0] != R or logits.shape[1] == 0:
        raise ValueError(f"model_fn: expected logits [R={R}, V], got {_checks.describe(logits)}")
    if jax.tree.structure(new) != jax.tree.structure(cache):
        raise TypeError(
            f"model_fn: expected the cache that it was given as second result, got {type(new).__name__}"
        )
    for old, leaf in zip(jax.tree.leaves(cache), jax.tree.leaves(new), strict=True):
        if old.shape != leaf.shape or old.dtype != leaf.dtype:
            raise ValueError(
                f"model_fn: expected a cache with the shapes and dtypes of the one that it was given, got "
                f"{_checks.describe(leaf)} for {_checks.describe(old)}"
            )
    return logits, new


def _retire(state: _State) -> _State:
    """Empties the rows of prompts that stopped; if nobody advanced, stops or preempts the youngest prompt.

    To preempt is to empty its row, or to ask the host to.
    """
    B, N, R = state.cache.max_seqs, state.tokens.shape[0], state.lane_rows.shape[0]
    running = state.running
    youngest = jnp.argmax(jnp.where(running, state.lane_prompts, -1)).astype(jnp.int32)
    alone = running.sum(dtype=jnp.int32) == 1
    stops = jnp.where(state.stalled & alone, state.prompts[youngest], N)
    reasons = state.reasons.at[stops].set(StopReason.NO_PAGES, mode="drop")
    preempted = state.stalled & ~alone
    leaves = (state.lane_prompts < N) & (reasons[state.prompts] != StopReason.UNFINISHED)
    leaving = None
    if state.leaving is None:
        leaves |= preempted & (jnp.arange(R, dtype=jnp.int32) == youngest)
    else:
        leaving = jnp.where(preempted, youngest, R)
    rows = jnp.zeros(B, bool).at[state.lane_rows].set(leaves, mode="drop")
    cache, index = state.cache, state.index
    if index is not None:  # also of rows that go on, so that the next prompts find it
        sound = (state.lane_prompts < N) & (reasons[state.prompts] != StopReason.BAD_LOGITS)
        published = jnp.where(sound, state.lane_rows, -1)
        cache, index, _ = device.publish(cache, index, published, state.tokens[state.prompts], state.cached)
    return dataclasses.replace(
        state,
        cache=release(cache, rows),
        index=index,
        reasons=reasons,
        lane_prompts=jnp.where(leaves, N, state.lane_prompts),
        starved=state.starved & ~leaves,
        stalled=jnp.bool_(False),
        changed=jnp.bool_(False),
        num_preemptions=state.num_preemptions + preempted.astype(jnp.int32),
        leaving=leaving,
    )


@functools.partial(jax.jit, static_argnames=("model_fn", "chunk_size"), donate_argnames=("state",))
def _advance(
    model_fn: ModelFn, params: Any, job: _Job, state: _State, until: Int32[Array, ""], *, chunk_size: int
) -> _State:
    """Runs until all prompts are finished, `until` steps have been made in all, or the host is to move pages.

    Lanes are handed out and rows emptied only in the outer loop: an ordinary step pays for neither.
    """
    run = functools.partial(_step, model_fn, params, job)

    def goes_on(state):
        return (state.num_steps < until) & ~state.changed & ~state.waits_for_host

    def has_chunks(state):  # prompts that wait for pages do not keep the others in wide steps
        return ((state.wanted > 1) & ~state.starved).any()

    def cycle(state):
        state, others_wait = _admit(job, state, chunk_size=chunk_size)
        state = jax.lax.while_loop(
            lambda s: goes_on(s) & has_chunks(s), functools.partial(run, num_tokens=chunk_size), state
        )
        state = jax.lax.while_loop(
            lambda s: goes_on(s) & s.running.any() & ~has_chunks(s) & ~others_wait,
            functools.partial(run, num_tokens=state.lane_rows.shape[0]),
            state,
        )
        return _retire(state)

    def unfinished(state):
        unfinished = (state.reasons == StopReason.UNFINISHED).any()
        return (state.num_steps < until) & unfinished & ~state.waits_for_host

    return jax.lax.while_loop(unfinished, cycle, state)


_resume = jax.jit(offload.resume, donate_argnums=(0, 1))


@functools.partial(jax.jit, donate_argnums=0)
def _moved(state: _State, away: Bool[Array, "N"]) -> _State:
    """The state after the host moved pages and these prompts' are with it."""
    N, R = state.tokens.shape[0], state.lane_rows.shape[0]
    assert state.away is not None
    gone = jnp.arange(R, dtype=jnp.int32) == state.leaving
    new = jnp.sum(away & ~state.away, dtype=jnp.int32)
    return dataclasses.replace(
        state,
        lane_prompts=jnp.where(gone, N, state.lane_prompts),
        starved=state.starved & ~gone,
        num_swaps=state.num_swaps + new,
        away=away,
        leaving=jnp.int32(R),
    )


class _Swaps:
    """What is on the host of prompts under way. Changes, unlike the state: a ticket is good for one return."""

    def __init__(self, host: offload.Host):
        self.host = host
        self.tickets: dict[int, offload.Ticket] = {}

    def serve(self, state: _State) -> tuple[_State, bool]:
        """Moves the pages that a state waits for; whether it did wait."""
        lanes, rows, leaving, returning = jax.device_get(
            (state.lane_prompts, state.lane_rows, state.leaving, state.returning)
        )
        if leaving == len(lanes) and not returning.any():
            return state, False
        cache, index = state.cache, state.index
        if leaving < len(lanes):
            row = jnp.asarray(rows[leaving])[None]
            cache, self.host, ticket = offload.preempt(cache, self.host, row)
            if ticket.ok:
                self.tickets[int(lanes[leaving])] = ticket
            else:  # no room on the host: it is recomputed
                cache = release(cache, jnp.zeros(cache.max_seqs, bool).at[row].set(True))
        for lane in np.flatnonzero(returning):
            ticket = self.tickets.pop(int(lanes[lane]))
            if index is not None:
                pairs = zip(ticket.extent.held, cache.groups, strict=True)
                lacking = max(int(held.sum() - (group.ref_counts == 0).sum()) for held, group in pairs)
                cache, index, _ = device.evict(cache, index, max(lacking, 0))
            cache, self.host, ok = _resume(cache, self.host, ticket, jnp.asarray(rows[lane])[None])
            if not ok:  # no room on the device: it is recomputed
                self.host, _ = offload.discard(self.host, ticket)
        away = np.zeros(state.tokens.shape[0], bool)
        away[list(self.tickets)] = True
        return _moved(dataclasses.replace(state, cache=cache, index=index), away), True


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "return_logprobs", "swaps"))
def _start(
    job: _Job,
    prompts: Int32[Array, "N L"],
    cache: PagedKVCache,
    *,
    max_new_tokens: int,
    return_logprobs: bool,
    swaps: bool,
) -> tuple[Any, ...]:
    """The fields of the first state, without the cache: that is donated only once everything has been traced."""
    N, width = prompts.shape
    B = cache.max_seqs
    R = min(N, B)
    idle = idle_rows(cache.seq_lens, [g.block_tables for g in cache.groups])
    seat = jnp.cumsum(idle, dtype=jnp.int32) - 1
    lane_rows = _scatter(R, B, idle & (seat < R), seat, jnp.arange(B, dtype=jnp.int32))

    lens = job.prompt_lens
    reasons = jnp.where(idle.any(), StopReason.UNFINISHED, StopReason.NO_ROW)
    reasons = jnp.where(lens > cache.max_pages_per_seq * cache.page_size, StopReason.ROW_FULL, reasons)
    reasons = jnp.where(job.limits <= lens, StopReason.LENGTH, reasons)
    is_text = jnp.arange(width, dtype=jnp.int32)[None, :] < lens[:, None]
    invalid = (lens < 1) | (lens > width) | (is_text & (prompts < 0)).any(axis=1)
    reasons = jnp.where(invalid, StopReason.INVALID, reasons).astype(jnp.int32)
    return (
        jnp.pad(prompts, ((0, 0), (0, max_new_tokens))),
        jnp.copy(lens),
        reasons,
        jnp.zeros((N, max_new_tokens), jnp.float32) if return_logprobs else None,
        lane_rows,
        jnp.full(R, N, jnp.int32),
        jnp.zeros(R, bool),
        jnp.bool_(False),
        jnp.bool_(False),
        jnp.int32(0),
        jnp.int32(0),
        jnp.int32(0),
        jnp.zeros(N, bool) if swaps else None,
        jnp.int32(R) if swaps else None,
    )


@functools.partial(jax.jit, static_argnames=("max_new_tokens",))
def _generated(
    job: _Job, tokens: Int32[Array, "N W"], num_tokens: Int32[Array, "N"], *, max_new_tokens: int
) -> tuple[Int32[Array, "N max_new"], Int32[Array, "N"]]:
    """The generated tokens and their number."""
    offsets = jnp.arange(max_new_tokens, dtype=jnp.int32)[None, :]
    lengths = num_tokens - job.prompt_lens
    at = jnp.clip(job.prompt_lens[:, None] + offsets, 0, tokens.shape[1] - 1)
    found = jnp.take_along_axis(tokens, at, axis=1)
    return jnp.where(offsets < lengths[:, None], found, 0), lengths


class _Program(NamedTuple):
    """A checked request, ready to run."""

    model_fn: ModelFn
    params: Any
    job: _Job
    state: _State
    chunk_size: int
    max_new_tokens: int
    swaps: _Swaps | None

    def advance(self, state: _State, until: Any) -> _State:
        """Runs on, until so many steps were made in all. The state is donated."""
        waited = True
        while waited:
            state = _advance(
                self.model_fn, self.params, self.job, state, jnp.int32(until), chunk_size=self.chunk_size
            )
            state, waited = (state, False) if self.swaps is None else self.swaps.serve(state)
        return state

    def tokens(self, state: _State) -> tuple[Int32[Array, "N max_new"], Int32[Array, "N"]]:
        """The tokens so far and their number, in buffers of their own."""
        return _generated(self.job, state.tokens, state.num_tokens, max_new_tokens=self.max_new_tokens)

    def result(self, state: _State) -> Generation:
        """What a state has come to."""
        tokens, lengths = self.tokens(state)
        return Generation(
            tokens,
            lengths,
            state.reasons,
            state.logprobs,
            state.cache,
            state.index,
            state.num_steps,
            state.num_preemptions,
            state.num_swaps,
        )


# What users pass.


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


def _prepare(
    model_fn: ModelFn,
    params: Any,
    cache: PagedKVCache,
    prompts: Any,
    *,
    index: device.DeviceIndex | None = None,
    max_new_tokens: int,
    prompt_lens: Any = None,
    limits: Any = None,
    sampling: Sampling = _GREEDY,
    stop_tokens: Any = (),
    seeds: Any = None,
    chunk_size: int | None = None,
    return_logprobs: bool = False,
    host_pages: int | tuple[int, ...] | None = None,
    on_host: str = "",
) -> _Program:
    """Checks a request and makes its first state. Changes and donates nothing."""
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
    _check_alive(cache=cache, index=index)
    return_logprobs = _checks.static_bool("return_logprobs", return_logprobs)
    swaps = None
    if host_pages is not None:
        swaps = _Swaps(_rows.account("host_pages", len(cache.groups), host_pages, "pinned_host"))
    max_new_tokens = _checks.static_int("max_new_tokens", max_new_tokens, minimum=1)
    tokens, lens = _read_prompts(prompts, prompt_lens)
    N, width = tokens.shape
    if width + max_new_tokens > INT32_MAX:
        raise ValueError(f"max_new_tokens: {max_new_tokens} after prompts of {width} pass int32")
    num_lanes = min(N, cache.max_seqs)
    if chunk_size is None:
        chunk_size = max(num_lanes, min(_DEFAULT_CHUNK_SIZE, N * width))
    else:
        # A wide step must hold one token of every lane, so that no prompt waits for another's decoding.
        chunk_size = _checks.static_int("chunk_size", chunk_size, minimum=num_lanes, maximum=INT32_MAX)
    extra = _read_limits(limits, N, max_new_tokens)
    given_seeds = _checks.integers("seeds", np.arange(N, dtype=np.int32) if seeds is None else seeds)
    job = _Job(
        prompt_lens=lens,
        limits=lens + extra,
        seeds=jnp.asarray(per_prompt("seeds", given_seeds, N)),
        stop_tokens=_read_stop_tokens(stop_tokens, N),
        rules=resolve(sampling, N),
        families=None if index is None else _families(tokens, lens, cache.page_size),
    )
    if _checks.is_traced(params, cache, index, job):
        if host_pages is not None:
            raise TypeError(
                "host_pages: the host moves pages between runs of the program, which jit has no place for"
            )
        if on_host:
            raise TypeError(f"{on_host} reads tokens on the host and cannot run inside jit; generate can")
    state = _start(
        job,
        tokens,
        cache,
        max_new_tokens=max_new_tokens,
        return_logprobs=return_logprobs,
        swaps=swaps is not None,
    )
    state = _State(cache, index, *state)
    if swaps is not None:
        state, swaps.host = _committed((state, swaps.host))
    return _Program(model_fn, params, job, state, chunk_size, max_new_tokens, swaps)


def _is_deleted(tree: Any) -> bool:
    """Whether a call took some of the buffers."""
    return any(
        isinstance(leaf, jax.Array) and not _checks.is_traced(leaf) and leaf.is_deleted()
        for leaf in jax.tree.leaves(tree)
    )


def _check_alive(**trees: Any) -> None:
    """Refuses values whose buffers an earlier call took."""
    for name, tree in trees.items():
        if _is_deleted(tree):
            raise ValueError(f"{name}: was donated to an earlier call; go on with the one that came back")


def _committed(tree: Any) -> Any:
    """The same buffers, bound to their device as what comes from the host is, so that programs are compiled once."""
    if len({device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}) > 1:
        return tree  # a sharded cache is bound already, and the rest may follow it
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))


def generate(
    model_fn: ModelFn,
    params: Any,
    cache: PagedKVCache,
    prompts: Any,
    *,
    index: device.DeviceIndex | None = None,
    max_new_tokens: int,
    prompt_lens: Any = None,
    limits: Any = None,
    sampling: Sampling = _GREEDY,
    stop_tokens: Any = (),
    seeds: Any = None,
    chunk_size: int | None = None,
    return_logprobs: bool = False,
    host_pages: int | tuple[int, ...] | None = None,
    progress: bool = False,
) -> Generation:
    """Generates from any number of prompts, batched, in one compiled program.

    Prompts take idle rows of the cache, lowest prompt first, and are computed in chunks while others decode; a row
    that finishes frees its pages at once and the next prompt takes its place. When pages run out, prompts wait; when
    nobody can go on, the youngest gives its pages back, and is recomputed later or, with `host_pages`, brought back
    from the host; its tokens are kept. Rows that are live in the cache are neither used nor changed. Pages are taken as
    they are needed: the pool may be far smaller than the prompts and tokens together.

    What a prompt yields depends on its tokens, sampling values and seed alone: not on its neighbours, the number of
    rows or pages, the chunk size or preemptions. (This holds for the scheduler and the sampler. A model whose matrix
    products round differently in another batch shape can turn a near tie.)

    Works inside jit, with prompts given as an array; nothing is read on the host then. Outside it compiles once for
    each model function and shapes: values such as lengths, limits, temperatures, seeds and stop tokens may change
    freely. Lists of prompts are padded to a power of two for that reason. Give one and the same function object each
    time, not a new lambda.

    Args:
      model_fn: ``model_fn(params, tokens, cache, step, logits_at) -> (logits, cache)``. tokens i32[T] are packed as in
        `extend`, their positions in ``step.positions``; it appends to and attends in every layer, and gives the logits
        [R, V] of the tokens that logits_at i32[R] names. T is chunk_size or R, the smaller of N and the cache's rows.
      params: a pytree of arrays, handed to model_fn.
      cache: where keys and values go; donated, go on with the one that comes back. Outside jit only.
      prompts: lists of token ids, or an array i32[N, L] padded at the end.
      index: from `prefix.device.init` or an earlier call with this cache: prompts begin with the pages that are stored
        of them, and what is computed is stored for later ones, also of this call, until its pages are needed. Donated
        too. None: nothing outlives its row.
      max_new_tokens: most tokens to generate from each prompt (static).
      prompt_lens: i32[N] lengths of prompts given as an array; None: all L.
      limits: a number or i32[N]: tokens for each prompt, at most max_new_tokens; None: max_new_tokens for all.
      sampling: how tokens are chosen; the default is greedy.
      stop_tokens: token ids that end a prompt's text (and are its last token): one list for all prompts, or one list
        or row of an array, padded with -1, for each.
      seeds: a number or i32[N]; prompts with equal seeds draw equal random numbers. None: prompt n has seed n.
      chunk_size: tokens of a step that computes prompts (static), at least R. None: 512, or all prompts if fewer.
      return_logprobs: whether to return log-probabilities: of the chosen tokens under the model's raw logits, before
        penalty, temperature and filters.
      host_pages: pages of pinned host memory, in each group or a tuple of one number a group (static): a prompt that is
        preempted moves its pages there and back instead of being recomputed, as long as there is room. The program
        returns to the host each time, so not inside jit. None: recompute.
      progress: shows a progress bar (tqdm); runs the program in segments as `stream` does.

    Returns:
      A `Generation`: tokens, lengths, why each prompt stopped, and the cache with all used rows idle again.

    Raises:
      ValueError, TypeError: an argument is wrong; names it. Lack of rows or pages is no error but a `StopReason`.
      ImportError: progress without tqdm.

    Example:
      >>> import jax, paxcache
      >>> def count_up(params, tokens, cache, step, logits_at):  # a model that needs no attention
      ...     return jax.nn.one_hot(tokens[logits_at] + 1, 10), cache
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=4)
      >>> out = paxcache.generate(count_up, None, paxcache.init(config), [[1, 2, 3], [5], [0, 6]], max_new_tokens=4,
      ...                         stop_tokens=[7])
      >>> out.to_lists()
      [[4, 5, 6, 7], [6, 7], [7]]
      >>> [paxcache.StopReason(int(r)).name for r in out.stop_reasons]
      ['STOP_TOKEN', 'STOP_TOKEN', 'STOP_TOKEN']

    Reference: iteration-level scheduling, Orca (Yu et al., 2022); preemption by recomputation or swapping, vLLM
    (Kwon et al., 2023); chunked prefill, Sarathi-Serve (Agrawal et al., 2024); reuse of prefixes, SGLang (Zheng et
    al., 2024).
    """
    arguments = {
        "index": index,
        "max_new_tokens": max_new_tokens,
        "prompt_lens": prompt_lens,
        "limits": limits,
        "sampling": sampling,
        "stop_tokens": stop_tokens,
        "seeds": seeds,
        "chunk_size": chunk_size,
        "return_logprobs": return_logprobs,
        "host_pages": host_pages,
    }
    if _checks.static_bool("progress", progress):
        with stream(model_fn, params, cache, prompts, **arguments, progress=True) as tokens:
            for _ in tokens:
                pass
        return tokens.result
    program = _prepare(model_fn, params, cache, prompts, **arguments)
    return program.result(program.advance(program.state, INT32_MAX))


class Stream(Iterator[tuple[int, list[int]]]):
    """Generation under way: iterates over ``(prompt, new tokens)`` as they come. Made by `stream`.

    The program runs when the next item is asked for, a segment at a time. `close`, or leaving a ``with`` block, ends it
    at any point: its rows are emptied and `result` holds what there is.

    An error in the model ends it too. There is no result then: the cache was donated to the program that failed. What
    is asked of the stream later raises with the first error as its cause, and `close` does nothing.
    """

    def __init__(self, program: _Program, *, interval: int, progress: bool):
        """Use `stream`."""
        self._program = program
        self._state: _State | None = program.state
        self._interval = interval
        self._num_steps = 0
        self._limits = np.asarray(program.job.limits) - np.asarray(program.job.prompt_lens)
        self._sent = np.zeros(self._limits.size, np.int32)
        self._items: collections.deque[tuple[int, list[int]]] = collections.deque()
        self._finished = False  # no prompt has more to come
        self._closed = False
        self._error: BaseException | None = None
        self._bar = _checks.import_tqdm()(unit=" tokens") if progress else None

    def __iter__(self) -> Stream:
        """Itself."""
        return self

    def __next__(self) -> tuple[int, list[int]]:
        """The number of a prompt and its tokens since the last time."""
        while not self._items and not self._finished and not self._closed:
            self._run_segment()
        if self._error is not None:
            raise RuntimeError("generation failed; there are no more tokens") from self._error
        if self._closed or not self._items:
            self.close()
            raise StopIteration
        return self._items.popleft()

    def __enter__(self) -> Stream:
        """Itself; `close` is called at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the stream."""
        self.close()

    def _run_segment(self) -> None:
        """Makes some steps and reads what they gave."""
        assert self._state is not None
        self._num_steps = min(self._num_steps + self._interval, INT32_MAX)
        try:
            self._state = self._program.advance(self._state, self._num_steps)
            tokens, lengths = map(np.asarray, self._program.tokens(self._state))
            unfinished = np.asarray(self._state.reasons) == StopReason.UNFINISHED
        except BaseException as error:
            if isinstance(error, Exception) or _is_deleted(self._state):
                self._fail(error)
            raise  # after an interrupt with the state at hand, the stream can go on or be closed
        self._finished = not unfinished.any()
        if self._bar is not None:
            self._bar.total = int(np.where(unfinished, self._limits, lengths).sum())
            self._bar.update(int((lengths - self._sent).sum()))
        for prompt in np.flatnonzero(lengths > self._sent):
            self._items.append((int(prompt), tokens[prompt, self._sent[prompt] : lengths[prompt]].tolist()))
        self._sent = lengths

    def _fail(self, error: BaseException) -> None:
        self._error, self._closed, self._state = error, True, None
        if self._bar is not None:
            self._bar.close()

    def close(self) -> None:
        """Ends generation: empties the rows that it uses and leaves the rest to `result`. Closing twice is fine."""
        if self._closed or self._state is None:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        B = self._state.cache.max_seqs
        rows = jnp.zeros(B, bool).at[self._state.lane_rows].set(True, mode="drop")
        self._state = dataclasses.replace(self._state, cache=release(self._state.cache, rows))

    @property
    def result(self) -> Generation:
        """The `Generation`, once the stream is exhausted or closed.

        Raises:
          RuntimeError: generation is still under way, or failed.
        """
        if self._error is not None:
            raise RuntimeError("generation failed; there is no result") from self._error
        if not self._closed or self._state is None:
            raise RuntimeError("generation is under way: exhaust the stream or close() it, then read result")
        return self._program.result(self._state)


def stream(
    model_fn: ModelFn,
    params: Any,
    cache: PagedKVCache,
    prompts: Any,
    *,
    index: device.DeviceIndex | None = None,
    max_new_tokens: int,
    prompt_lens: Any = None,
    limits: Any = None,
    sampling: Sampling = _GREEDY,
    stop_tokens: Any = (),
    seeds: Any = None,
    chunk_size: int | None = None,
    return_logprobs: bool = False,
    host_pages: int | tuple[int, ...] | None = None,
    interval: int = _DEFAULT_INTERVAL,
    progress: bool = False,
) -> Stream:
    """Generates as `generate` does and hands out the tokens as they come.

    The same compiled program runs in segments of `interval` steps; between two of them the new tokens are read on the
    host. The number of steps is a value, not a shape: no interval compiles anything anew. The tokens are those of
    `generate`, whatever the interval.

    Args:
      model_fn, params, cache, prompts, index, max_new_tokens, prompt_lens, limits, sampling, stop_tokens, seeds,
        chunk_size, return_logprobs, host_pages: as in `generate`.
      interval: steps between two looks. 1 gives each token at once; more cost fewer waits for the host.
      progress: shows a progress bar (tqdm) that counts tokens.

    Returns:
      A `Stream`: an iterator over ``(prompt, new token ids)``, with the `Generation` in ``result`` once it is exhausted
      or closed. The cache is donated as by `generate`: go on with ``result.cache``.

    Raises:
      ValueError, TypeError: an argument is wrong, or traced: a stream lives on the host. Names it.
      ImportError: progress without tqdm.

    Example:
      >>> import jax, paxcache
      >>> def count_up(params, tokens, cache, step, logits_at):
      ...     return jax.nn.one_hot(tokens[logits_at] + 1, 10), cache
      >>> config = paxcache.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, page_size=4, num_pages=4, max_seqs=2,
      ...                               max_pages_per_seq=4)
      >>> tokens = paxcache.stream(count_up, None, paxcache.init(config), [[1], [5]], max_new_tokens=3, interval=2)
      >>> for prompt, new in tokens:
      ...     print(prompt, new)
      0 [2, 3]
      1 [6, 7]
      0 [4]
      1 [8]
      >>> tokens.result.lengths.tolist()
      [3, 3]
    """
    interval = _checks.static_int("interval", interval, minimum=1, maximum=INT32_MAX)
    progress = _checks.static_bool("progress", progress)
    program = _prepare(
        model_fn,
        params,
        cache,
        prompts,
        index=index,
        max_new_tokens=max_new_tokens,
        prompt_lens=prompt_lens,
        limits=limits,
        sampling=sampling,
        stop_tokens=stop_tokens,
        seeds=seeds,
        chunk_size=chunk_size,
        return_logprobs=return_logprobs,
        host_pages=host_pages,
        on_host="stream",
    )
    return Stream(program, interval=interval, progress=progress)
