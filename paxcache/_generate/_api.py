"""`generate`, `stream` and what they return."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from paxcache import _checks
from paxcache._cache import release
from paxcache._generate import _loop
from paxcache._generate._loop import State, StopReason
from paxcache._generate._request import Checked, ModelFn, Options, is_deleted, read
from paxcache._generate._swaps import Swaps, committed
from paxcache._types import INT32_MAX, PagedKVCache
from paxcache.prefix import device

if TYPE_CHECKING:
    from jaxtyping import Array, Float32, Int32

_DEFAULT_INTERVAL = 16


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


class Program(NamedTuple):
    """A checked request, ready to run."""

    checked: Checked
    start: State
    swaps: Swaps | None

    def advance(self, state: State, until: int) -> State:
        """Runs on, until so many steps were made in all. The state is donated."""
        model_fn, params, request = self.checked.model_fn, self.checked.params, self.checked.request
        waited = True
        while waited:
            state = _loop.advance(
                model_fn, params, request, state, jnp.int32(until), chunk_size=self.checked.chunk_size
            )
            state, waited = (state, False) if self.swaps is None else self.swaps.serve(state)
        return state

    def tokens(self, state: State) -> tuple[Int32[Array, "N max_new"], Int32[Array, "N"]]:
        """The tokens so far and their number, in buffers of their own."""
        return _loop.generated(
            self.checked.request, state.tokens, state.num_tokens, max_new_tokens=self.checked.max_new_tokens
        )

    def result(self, state: State) -> Generation:
        """What a state has come to."""
        tokens, lengths = self.tokens(state)
        return Generation(
            tokens=tokens,
            lengths=lengths,
            stop_reasons=state.reasons,
            logprobs=state.logprobs,
            cache=state.cache,
            index=state.index,
            num_steps=state.num_steps,
            num_preemptions=state.num_preemptions,
            num_swaps=state.num_swaps,
        )


def _prepare(checked: Checked, *, reads_tokens: bool = False) -> Program:
    """The program and its first state. Donates nothing."""
    host_pages = checked.host_pages
    if _checks.is_traced(checked.params, checked.cache, checked.index, checked.request):
        if host_pages is not None:
            raise TypeError(
                "host_pages: the host moves pages between runs of the program, which jit has no place for"
            )
        if reads_tokens:
            raise TypeError("stream reads tokens on the host and cannot run inside jit; generate can")
    swaps = None if host_pages is None else Swaps(len(checked.cache.groups), host_pages)
    state = _loop.start(
        checked.request,
        checked.prompts,
        checked.cache,
        checked.index,
        max_new_tokens=checked.max_new_tokens,
        return_logprobs=checked.return_logprobs,
        swaps=swaps is not None,
    )
    if swaps is not None:
        state, swaps.host = committed((state, swaps.host))
    return Program(checked, state, swaps)


def _read(model_fn: ModelFn, params: Any, cache: PagedKVCache, prompts: Any, options: Options) -> Checked:
    unknown = set(options) - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"{min(unknown)}: is no argument of generate and stream")
    if "max_new_tokens" not in options:
        raise TypeError("max_new_tokens: is needed, the most tokens to generate from each prompt")
    return read(model_fn, params, cache, prompts, **options)


def generate(
    model_fn: ModelFn,
    params: Any,
    cache: PagedKVCache,
    prompts: Any,
    *,
    progress: bool = False,
    **options: Unpack[Options],
) -> Generation:
    """Generates from any number of prompts, batched, in one compiled program.

    Two calls without `key` and `seeds` draw the same random numbers: prompt n has seed n then. Give another `key` each
    time for samples that differ from call to call.

    Prompts take idle rows of the cache, lowest prompt first, and are computed in chunks while others decode; a row
    that finishes frees its pages at once and the next prompt takes its place. When pages run out, prompts wait; when
    nobody can go on, the youngest gives its pages back, and is recomputed later or, with `host_pages`, brought back
    from the host; its tokens are kept. Rows that are live in the cache are neither used nor changed. Pages are taken as
    they are needed: the pool may be far smaller than the prompts and tokens together.

    What a prompt yields depends on its tokens, sampling values and key alone: not on its neighbours, the number of
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
      key: a JAX key, typed or raw, as from ``jax.random.key(0)``: prompt n draws from ``fold_in(key, n)``.
      seeds: instead of a key, a number or i32[N]: prompts with equal seeds draw equal random numbers. With neither,
        prompt n has seed n.
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
    checked = _read(model_fn, params, cache, prompts, options)
    if _checks.static_bool("progress", progress):
        with Stream(
            _prepare(checked, reads_tokens=True), interval=_DEFAULT_INTERVAL, progress=True
        ) as tokens:
            collections.deque(tokens, maxlen=0)
        return tokens.result
    program = _prepare(checked)
    return program.result(program.advance(program.start, INT32_MAX))


class Stream(Iterator[tuple[int, list[int]]]):
    """Generation under way: iterates over ``(prompt, new tokens)`` as they come. Made by `stream`.

    The program runs when more tokens are asked for, a segment at a time. `close`, or leaving a ``with`` block, ends it
    at any point: its rows are emptied and `result` holds what there is.

    An error in the model ends it too. There is no result then: the cache was donated to the program that failed. What
    is asked of the stream later raises with the first error as its cause, and `close` does nothing.
    """

    def __init__(self, program: Program, *, interval: int, progress: bool):
        """Use `stream`."""
        self._program = program
        self._state: State | None = program.start
        self._interval = interval
        self._num_steps = 0
        self._limits = np.asarray(program.checked.request.limits)
        self._sent = np.zeros(self._limits.size, np.int32)
        self._pending: collections.deque[tuple[int, list[int]]] = collections.deque()
        self._finished = False  # no prompt has more to come
        self._closed = False
        self._error: BaseException | None = None
        self._bar = _checks.import_tqdm()(unit=" tokens") if progress else None

    def __iter__(self) -> Stream:
        """Itself."""
        return self

    def __next__(self) -> tuple[int, list[int]]:
        """The number of a prompt and its tokens since the last time."""
        while not self._pending and not self._finished and not self._closed:
            self._run_segment()
        if self._error is not None:
            raise RuntimeError("generation failed; there are no more tokens") from self._error
        if self._closed or not self._pending:
            self.close()
            raise StopIteration
        return self._pending.popleft()

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
            if isinstance(error, Exception) or is_deleted(self._state):
                self._fail(error)
            raise  # after an interrupt with the state at hand, the stream can go on or be closed
        self._finished = not unfinished.any()
        if self._bar is not None:
            self._bar.total = int(np.where(unfinished, self._limits, lengths).sum())
            self._bar.update(int((lengths - self._sent).sum()))
        for prompt in np.flatnonzero(lengths > self._sent):
            self._pending.append((int(prompt), tokens[prompt, self._sent[prompt] : lengths[prompt]].tolist()))
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
        rows = jnp.zeros(B, bool).at[self._state.seat_rows].set(True, mode="drop")
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
    interval: int = _DEFAULT_INTERVAL,
    progress: bool = False,
    **options: Unpack[Options],
) -> Stream:
    """Generates as `generate` does and hands out the tokens as they come.

    As there, two calls without `key` and `seeds` draw the same random numbers.

    The same compiled program runs in segments of `interval` steps; between two of them the new tokens are read on the
    host. The number of steps is a value, not a shape: no interval compiles anything anew. The tokens are those of
    `generate`, whatever the interval.

    Args:
      model_fn, params, cache, prompts, index, max_new_tokens, prompt_lens, limits, sampling, stop_tokens, key,
        seeds, chunk_size, return_logprobs, host_pages: as in `generate`.
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
    program = _prepare(_read(model_fn, params, cache, prompts, options), reads_tokens=True)
    return Stream(program, interval=interval, progress=progress)
