"""The program: one kind of step, and the loop that makes it until every prompt is answered.

N prompts wait for R *seats*. A seat is a cache row that was idle when generation began; R is the smaller of N and the
rows of the cache, so a step never computes more rows than there are prompts. A prompt is *running* while it has a seat
and *waiting* otherwise. ``tokens[n]`` holds a prompt and what was generated from it; the tokens of a seat still to be
computed are those from its row's cached length on. That single rule makes prefill, chunked prefill, decoding and the
recomputation after a preemption the same step: compute the next tokens of every seat, and where a seat has none left,
sample one more.

Why it ends: tokens and pages go to the seats in the order of their prompts, so the oldest running prompt advances in
every step in which any page is free. In a step that advances nobody the youngest gives its pages back; alone, it stops.

With `host_pages` the youngest's pages go to the host instead, and come back when it gets a seat again. A loop that
carried host memory, or held both ways over it, would leave it to the compiler whether anything travels; so the program
ends when pages are to be moved, the host moves them (`_swaps`), and the same program goes on. That is a few times a
run.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _checks
from paxcache._allocator import cdiv, idle_rows
from paxcache._cache import extend, release
from paxcache._generate._request import ModelFn, Request
from paxcache._sampling import is_distribution, log_probability, sample
from paxcache._types import PagedKVCache, Step
from paxcache.prefix import device

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Float32, Int32


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
class State:
    """What the program's loops carry."""

    cache: PagedKVCache
    index: device.DeviceIndex | None
    tokens: Int32[Array, "N W"]
    num_tokens: Int32[Array, "N"]  # prompt and generated
    reasons: Int32[Array, "N"]
    logprobs: Float32[Array, "N max_new"] | None
    seat_rows: Int32[Array, "R"]  # B where the cache had fewer idle rows than seats; never changes
    seat_prompts: Int32[Array, "R"]  # N where the seat is idle
    starved: Bool[Array, "R"]  # got fewer tokens than it could have had, for want of pages
    stalled: Bool[Array, ""]  # the last step advanced no seat
    changed: Bool[Array, ""]  # a prompt stopped or nobody advances: seats are to be handed out anew
    num_steps: Int32[Array, ""]
    num_preemptions: Int32[Array, ""]
    num_swaps: Int32[Array, ""]
    away: Bool[Array, "N"] | None  # prompts whose pages are on the host; None: preemption recomputes
    leaving: Int32[Array, ""] | None  # the seat whose pages the host is to take, R for none

    @property
    def returning(self) -> Bool[Array, "R"]:
        """Seats whose prompt's pages the host is to bring back."""
        if self.away is None:
            return jnp.zeros(self.seat_rows.shape[0], bool)
        return (self.seat_prompts < self.tokens.shape[0]) & self.away[self.prompts]

    @property
    def waits_for_host(self) -> Bool[Array, ""]:
        """Whether the host is to move pages before anything else happens."""
        if self.leaving is None:
            return jnp.bool_(False)
        return (self.leaving < self.seat_rows.shape[0]) | self.returning.any()

    @property
    def prompts(self) -> Int32[Array, "R"]:
        """Each seat's prompt; any prompt for an idle seat."""
        return jnp.minimum(self.seat_prompts, self.tokens.shape[0] - 1)

    @property
    def running(self) -> Bool[Array, "R"]:
        """Seats whose prompt is unfinished."""
        return (self.seat_prompts < self.tokens.shape[0]) & (
            self.reasons[self.prompts] == StopReason.UNFINISHED
        )

    @property
    def cached(self) -> Int32[Array, "R"]:
        """Tokens in each seat's row."""
        return self.cache.seq_lens[jnp.minimum(self.seat_rows, self.cache.max_seqs - 1)]

    @property
    def wanted(self) -> Int32[Array, "R"]:
        """Tokens that each seat has yet to compute; at least 1 while it runs, its newest token."""
        return jnp.where(self.running, self.num_tokens[self.prompts] - self.cached, 0)


def start(
    request: Request,
    prompts: Int32[Array, "N L"],
    cache: PagedKVCache,
    index: device.DeviceIndex | None,
    *,
    max_new_tokens: int,
    return_logprobs: bool,
    swaps: bool,
) -> State:
    """The state before the first step, with every prompt waiting. Donates nothing."""
    fields = _first_fields(
        request,
        prompts,
        cache.seq_lens,
        [group.block_tables for group in cache.groups],
        max_new_tokens=max_new_tokens,
        return_logprobs=return_logprobs,
        swaps=swaps,
        row_capacity=cache.max_pages_per_seq * cache.page_size,
    )
    return State(cache=cache, index=index, **fields)


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "return_logprobs", "swaps", "row_capacity"))
def _first_fields(
    request: Request,
    prompts: Int32[Array, "N L"],
    seq_lens: Int32[Array, "B"],
    block_tables: list[Int32[Array, "B M"]],
    *,
    max_new_tokens: int,
    return_logprobs: bool,
    swaps: bool,
    row_capacity: int,
) -> dict[str, Any]:
    """The fields of the first `State` but for the cache and the index, which are not to be copied."""
    N, width = prompts.shape
    B = seq_lens.shape[0]
    R = min(N, B)
    idle = idle_rows(seq_lens, block_tables)
    rank = jnp.cumsum(idle, dtype=jnp.int32) - 1

    lens = request.prompt_lens
    is_text = jnp.arange(width, dtype=jnp.int32)[None, :] < lens[:, None]
    invalid = (lens < 1) | (lens > width) | (is_text & (prompts < 0)).any(axis=1)
    reasons = jnp.where(idle.any(), StopReason.UNFINISHED, StopReason.NO_ROW)
    reasons = jnp.where(lens > row_capacity, StopReason.ROW_FULL, reasons)
    reasons = jnp.where(request.limits <= 0, StopReason.LENGTH, reasons)
    reasons = jnp.where(invalid, StopReason.INVALID, reasons).astype(jnp.int32)
    return {
        "tokens": jnp.pad(prompts, ((0, 0), (0, max_new_tokens))),
        "num_tokens": jnp.copy(lens),
        "reasons": reasons,
        "logprobs": jnp.zeros((N, max_new_tokens), jnp.float32) if return_logprobs else None,
        "seat_rows": _scatter(R, B, idle & (rank < R), rank, jnp.arange(B, dtype=jnp.int32)),
        "seat_prompts": jnp.full(R, N, jnp.int32),
        "starved": jnp.zeros(R, bool),
        "stalled": jnp.bool_(False),
        "changed": jnp.bool_(False),
        "num_steps": jnp.int32(0),
        "num_preemptions": jnp.int32(0),
        "num_swaps": jnp.int32(0),
        "away": jnp.zeros(N, bool) if swaps else None,
        "leaving": jnp.int32(R) if swaps else None,
    }


@functools.partial(jax.jit, static_argnames=("max_new_tokens",))
def generated(
    request: Request, tokens: Int32[Array, "N W"], num_tokens: Int32[Array, "N"], *, max_new_tokens: int
) -> tuple[Int32[Array, "N max_new"], Int32[Array, "N"]]:
    """The generated tokens and their number, in buffers of their own."""
    offsets = jnp.arange(max_new_tokens, dtype=jnp.int32)[None, :]
    lengths = num_tokens - request.prompt_lens
    at = jnp.clip(request.prompt_lens[:, None] + offsets, 0, tokens.shape[1] - 1)
    found = jnp.take_along_axis(tokens, at, axis=1)
    return jnp.where(offsets < lengths[:, None], found, 0), lengths


def _scatter(size: int, fill: Any, where: Any, index: Any, values: Any) -> jax.Array:
    """An array of `fill` with the values that `where` marks put at their indices."""
    empty = jnp.full(size, fill, jnp.asarray(values).dtype)
    return empty.at[jnp.where(where, index, size)].set(values, mode="drop")


def _sum_of_older(prompts: Int32[Array, "R"], values: Int32[Array, "R"]) -> Int32[Array, "R"]:
    """Per seat, the sum over the seats with lower prompts: a running sum in prompt order without sorting."""
    older = prompts[None, :] < prompts[:, None]
    return jnp.sum(jnp.where(older, values[None, :], 0), axis=1, dtype=jnp.int32)


# The parts of the program, each from a state to a state.


def _held_back(
    request: Request, state: State, waiting: Bool[Array, "N"], computing: Bool[Array, "R"]
) -> Bool[Array, "N"]:
    """Waiting prompts that had better start when another one has computed the first page which both begin with.

    That is asked of the R lowest families with such prompts. If none of their pages is stored, R others of them run
    already or start now, and there is no seat for more.
    """
    assert state.index is not None
    assert request.families is not None
    N, R = state.tokens.shape[0], state.seat_rows.shape[0]
    family, prompts = request.families, jnp.arange(N, dtype=jnp.int32)

    def lowest(where):  # by family
        return jnp.full(N, N, jnp.int32).at[jnp.where(where, family, N)].min(prompts, mode="drop")

    led = waiting & (_of_seats(request, state, computing) | (lowest(waiting)[family] < prompts))
    asking = led & (lowest(led)[family] == prompts)
    rank = jnp.cumsum(asking, dtype=jnp.int32) - 1
    asked = _scatter(R, N, asking & (rank < R), rank, prompts)
    at = jnp.minimum(asked, N - 1)
    found = device.match(state.index, state.tokens[at], state.num_tokens[at]).num_tokens > 0
    stored = _scatter(N, False, found & (asked < N), family[at], found)
    return led & ~stored[family]


def _of_seats(request: Request, state: State, seats: Bool[Array, "R"]) -> Bool[Array, "N"]:
    """Prompts of the same families as those of some seats."""
    assert request.families is not None
    N = state.tokens.shape[0]
    return _scatter(N, False, seats, request.families[state.prompts], seats)[request.families]


def _admit(request: Request, state: State, *, chunk_size: int) -> tuple[State, Bool[Array, ""]]:
    """Gives idle seats to waiting prompts, lowest first, as long as the pages of all running prompts suffice.

    Pages are counted by what each prompt will hold when it has computed its tokens and one more, not by what it maps
    now, so that prompts admitted together do not count the same free pages twice. While nothing runs the first prompt
    is admitted whatever the count: its steps find out whether it can go on. Also says whether prompts wait for pages
    that are being computed, and are to be looked at again when those have been.
    """
    cache, N, R = state.cache, state.tokens.shape[0], state.seat_rows.shape[0]
    seated = jnp.zeros(N, bool).at[state.seat_prompts].set(True, mode="drop")
    waiting = (state.reasons == StopReason.UNFINISHED) & ~seated
    held_back, computing = jnp.zeros(N, bool), (state.wanted > 1) & ~state.starved
    if state.index is not None:  # what is on the host comes back whole and waits for nobody's pages
        alone = waiting if state.away is None else waiting & ~state.away
        held_back = _held_back(request, state, alone, computing)
        waiting &= ~held_back
    idle = (state.seat_prompts == N) & (state.seat_rows < cache.max_seqs)
    rank, seat_rank = jnp.cumsum(waiting, dtype=jnp.int32) - 1, jnp.cumsum(idle, dtype=jnp.int32) - 1

    row_capacity = cache.max_pages_per_seq * cache.page_size
    soon = jnp.minimum(jnp.minimum(state.num_tokens + 1, request.most_tokens - 1), row_capacity)
    fits = jnp.bool_(True)
    for g, group in enumerate(cache.groups):
        pages = cdiv(soon, cache.page_size)
        if group.sliding_window is not None:  # pages left of the window come back, one step after the chunk
            most = cdiv(group.sliding_window + 2 * chunk_size, cache.page_size) + 1
            pages = jnp.minimum(pages, most)
        held = jnp.sum(jnp.where(state.running, pages[state.prompts], 0), dtype=jnp.int32)
        mapped = (group.block_tables >= 0).sum(axis=1, dtype=jnp.int32)
        mapped = jnp.sum(mapped.at[state.seat_rows].get(mode="fill", fill_value=0), dtype=jnp.int32)
        free = (group.ref_counts == 0).sum(dtype=jnp.int32)
        if state.index is not None:  # pages that the index alone holds make way
            stored = device.held(cache, state.index)[g]
            free += ((stored > 0) & (group.ref_counts == 1)).sum(dtype=jnp.int32)
        new = jnp.cumsum(jnp.where(waiting & (rank < R), pages, 0), dtype=jnp.int32)
        fits &= held + new <= free + mapped
    fits |= (rank == 0) & ~state.running.any()
    admitted = waiting & fits & (rank < idle.sum(dtype=jnp.int32))

    next_prompts = _scatter(R, N, admitted, rank, jnp.arange(N, dtype=jnp.int32))
    seat_prompts = jnp.where(idle, next_prompts[jnp.maximum(seat_rank, 0)], state.seat_prompts)
    index, starts = state.index, idle & (seat_prompts < N)
    if index is not None:  # what is stored of a prompt is in its row from the start
        prompts = jnp.minimum(seat_prompts, N - 1)
        if state.away is not None:
            starts &= ~state.away[prompts]
        rows = jnp.where(starts, state.seat_rows, -1)
        cache, index, _ = device.admit(cache, index, rows, state.tokens[prompts], state.num_tokens[prompts])
    state = dataclasses.replace(
        state, cache=cache, index=index, seat_prompts=seat_prompts, starved=state.starved & ~idle
    )
    if index is None:
        return state, jnp.bool_(False)
    return state, (held_back & _of_seats(request, state, computing | starts)).any()


def _ask(state: State, *, num_tokens: int, max_query_len: int) -> Int32[Array, "R"]:
    """The tokens of a step that each seat would get if pages were plenty.

    One token goes to every seat that wants but one; the others take what is left, oldest prompt first.
    """
    wanted = jnp.minimum(state.wanted, max_query_len)
    one = wanted == 1
    left = num_tokens - one.sum(dtype=jnp.int32)
    many = jnp.where(one, 0, wanted)
    return jnp.where(one, 1, jnp.clip(left - _sum_of_older(state.seat_prompts, many), 0, many))


def _grant(state: State, asked: Int32[Array, "R"]) -> Int32[Array, "R"]:
    """What pages allow of the tokens that seats ask for.

    Pages are dealt in the order of the prompts, and a seat takes only the tokens that its pages hold. `extend` decides
    in the end; dealing here keeps a long prompt in a low row from standing before an older prompt in a higher one.
    """
    cache = state.cache
    in_last_page = (-state.cached) % cache.page_size  # slots of mapped pages that are yet empty
    need = cdiv(jnp.maximum(asked - in_last_page, 0), cache.page_size)
    free = jnp.stack([(g.ref_counts == 0).sum(dtype=jnp.int32) for g in cache.groups]).min()
    pages = jnp.clip(free - _sum_of_older(state.seat_prompts, need), 0, need)
    return jnp.minimum(asked, in_last_page + pages * cache.page_size)


def _step(
    model_fn: ModelFn, params: Any, request: Request, state: State, *, num_tokens: int, max_query_len: int
) -> State:
    """Computes the seats' next tokens, `num_tokens` at most and `max_query_len` of a seat.

    Samples where a seat has computed all it has.
    """
    B, N = state.cache.max_seqs, state.tokens.shape[0]
    wanted, prompts = state.wanted, state.prompts
    size: dict[str, Any] = {"num_tokens": num_tokens, "max_query_len": max_query_len}
    asked = _ask(state, **size)

    def by_row(lens):
        return jnp.zeros(B, jnp.int32).at[state.seat_rows].set(lens, mode="drop")

    if state.index is not None:
        cache, index, _ = device.make_room(state.cache, state.index, by_row(asked), **size)
        state = dataclasses.replace(state, cache=cache, index=index)
    cache, step = extend(state.cache, by_row(_grant(state, asked)), **size)

    rows = jnp.minimum(state.seat_rows, B - 1)
    computed = jnp.where(state.running, step.query_lens[rows], 0)
    prompt_of_row = jnp.zeros(B, jnp.int32).at[state.seat_rows].set(prompts, mode="drop")
    tokens = state.tokens[prompt_of_row[jnp.minimum(step.rows, B - 1)], step.positions]
    tokens = jnp.where(step.rows < B, tokens, 0)
    logits_at = jnp.where(computed > 0, step.query_starts[rows] + computed - 1, 0)
    logits, cache = _called(model_fn, params, tokens, cache, step, logits_at)

    totals = state.num_tokens[prompts]
    done = (computed > 0) & (computed == wanted)
    rules = request.rules.of(prompts)
    history = None if rules.repetition_penalty is None else state.tokens[prompts]
    keys = None if request.keys is None else request.keys[prompts]
    chosen = sample(logits, rules, keys=keys, positions=totals, tokens=history, num_tokens=totals)
    drawn = done & is_distribution(logits, rules, chosen)
    at = jnp.where(drawn, prompts, N)
    logprobs = state.logprobs
    if logprobs is not None:
        values = log_probability(logits, chosen)
        logprobs = logprobs.at[at, totals - request.prompt_lens[prompts]].set(values, mode="drop")

    row_capacity = cache.max_pages_per_seq * cache.page_size
    reason = jnp.where(totals + 1 > row_capacity, StopReason.ROW_FULL, StopReason.UNFINISHED)
    reason = jnp.where(totals + 1 >= request.most_tokens[prompts], StopReason.LENGTH, reason)
    is_stop = (chosen[:, None] == request.stop_tokens[prompts]).any(axis=1)
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
    if not isinstance(logits, (jax.Array, np.ndarray)) or not jnp.issubdtype(logits.dtype, jnp.floating):
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
    return jnp.asarray(logits), new


def _publish(state: State) -> State:
    """Offers what seats have computed to later prompts."""
    if state.index is None:
        return state
    sound = (state.seat_prompts < state.tokens.shape[0]) & (
        state.reasons[state.prompts] != StopReason.BAD_LOGITS
    )
    rows, tokens = jnp.where(sound, state.seat_rows, -1), state.tokens[state.prompts]
    cache, index, _ = device.publish(state.cache, state.index, rows, tokens, state.cached)
    return dataclasses.replace(state, cache=cache, index=index)


def _retire(state: State) -> State:
    """Empties the rows of prompts that stopped; if nobody advanced, stops or preempts the youngest prompt.

    To preempt is to empty its row, or to ask the host to.
    """
    B, N, R = state.cache.max_seqs, state.tokens.shape[0], state.seat_rows.shape[0]
    running = state.running
    youngest = jnp.argmax(jnp.where(running, state.seat_prompts, -1)).astype(jnp.int32)
    alone = running.sum(dtype=jnp.int32) == 1
    stops = jnp.where(state.stalled & alone, state.prompts[youngest], N)
    reasons = state.reasons.at[stops].set(StopReason.NO_PAGES, mode="drop")
    preempted = state.stalled & ~alone
    leaves = (state.seat_prompts < N) & (reasons[state.prompts] != StopReason.UNFINISHED)
    leaving = None
    if state.leaving is None:
        leaves |= preempted & (jnp.arange(R, dtype=jnp.int32) == youngest)
    else:
        leaving = jnp.where(preempted, youngest, R)
    rows = jnp.zeros(B, bool).at[state.seat_rows].set(leaves, mode="drop")
    state = _publish(state)  # also of rows that go on, so that the next prompts find it
    return dataclasses.replace(
        state,
        cache=release(state.cache, rows),
        reasons=reasons,
        seat_prompts=jnp.where(leaves, N, state.seat_prompts),
        starved=state.starved & ~leaves,
        stalled=jnp.bool_(False),
        changed=jnp.bool_(False),
        num_preemptions=state.num_preemptions + preempted.astype(jnp.int32),
        leaving=leaving,
    )


def _advance(
    model_fn: ModelFn,
    params: Any,
    request: Request,
    state: State,
    until: Int32[Array, ""],
    *,
    chunk_size: int,
) -> State:
    """The program, see `advance`.

    Seats are handed out and rows emptied only in the outer loop: an ordinary step pays for neither.
    """
    run = functools.partial(_step, model_fn, params, request)
    # Pages left of a window are gone with the next step: of prompts, what is not offered before it is lost.
    offer = _publish if any(g.sliding_window is not None for g in state.cache.groups) else lambda state: state

    def goes_on(state):
        return (state.num_steps < until) & ~state.changed & ~state.waits_for_host

    def has_chunks(state):  # prompts that wait for pages do not keep the others in wide steps
        return ((state.wanted > 1) & ~state.starved).any()

    def cycle(state):
        state, others_wait = _admit(request, state, chunk_size=chunk_size)
        state = jax.lax.while_loop(
            lambda s: goes_on(s) & has_chunks(s),
            lambda s: offer(run(s, num_tokens=chunk_size, max_query_len=chunk_size)),
            state,
        )
        state = jax.lax.while_loop(
            lambda s: goes_on(s) & s.running.any() & ~has_chunks(s) & ~others_wait,
            functools.partial(run, num_tokens=state.seat_rows.shape[0], max_query_len=1),
            state,
        )
        return _retire(state)

    def unfinished(state):
        unfinished = (state.reasons == StopReason.UNFINISHED).any()
        return (state.num_steps < until) & unfinished & ~state.waits_for_host

    return jax.lax.while_loop(unfinished, cycle, state)


_STATIC = ("model_fn", "chunk_size")
_advance_donated = jax.jit(_advance, static_argnames=_STATIC, donate_argnames=("state",))
_advance_traced = jax.jit(_advance, static_argnames=_STATIC)


def advance(
    model_fn: ModelFn,
    params: Any,
    request: Request,
    state: State,
    until: Int32[Array, ""],
    *,
    chunk_size: int,
) -> State:
    """Runs until all prompts are finished, `until` steps have been made in all, or the host is to move pages.

    The state is donated, but inside jit or vmap, where buffers are the business of the program around it.
    """
    traced = _checks.is_traced(params, request, state, until)
    run = _advance_traced if traced else _advance_donated
    return run(model_fn, params, request, state, until, chunk_size=chunk_size)
