"""What prefix sharing saves and costs, on one core of the host and in a compiled loop.

    python examples/bench/bench_prefix.py match     # a 100,000-token prompt against an index of 1,000,000 tokens
    python examples/bench/bench_prefix.py publish   # admitting and publishing prompts, a page
    python examples/bench/bench_prefix.py evict     # 10,000 of 100,000 pages in one call, and one page of n
    python examples/bench/bench_prefix.py memory    # bytes an index takes for a page, beside its tokens
    python examples/bench/bench_prefix.py trace     # conversations: reuse against an oracle, policies against Belady
    python examples/bench/bench_prefix.py rollout   # 16 samples of one prompt in one compiled program: counts
    python examples/bench/bench_prefix.py prefill   # the built-in model: time to the first token by the share reused

Numbers to reach are printed beside those measured, which are the median of repetitions. `rollout` is also an example of
`paxcache.prefix.device`. Pages are as small as they can be: nothing here reads them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import paxcache
from paxcache import prefix
from paxcache.prefix import _integers

EXAMPLES = Path(__file__).parent.parent
sys.path.append(str(EXAMPLES))  # their model

import checkpoint  # noqa: E402
import llama  # noqa: E402

PAGE_SIZE = 16
LONG = 100_000  # tokens of the prompts to match and to publish; a whole number of pages
# Pages of prompts that share nothing, and pages that one `publish` stores.
RUNS = ((1, 1), (4, 4), (16, 16), (80, 80), (80, 1))


def small_config(num_pages: int, *, max_seqs: int, max_len: int) -> paxcache.CacheConfig:
    return paxcache.CacheConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        page_size=PAGE_SIZE,
        num_pages=num_pages,
        max_seqs=max_seqs,
        max_pages_per_seq=-(-max_len // PAGE_SIZE),
    )


def store(cache, index, prompts: list[np.ndarray], *, max_len: int, chunk: int | None = None):
    """Serves prompts of at most `max_len` tokens, as many at once as there are rows, and publishes after each chunk."""
    chunk = chunk or max_len
    extend = jax.jit(lambda cache, lens: paxcache.extend(cache, lens, max_query_len=chunk)[0])
    B = cache.max_seqs
    for first in range(0, len(prompts), B):
        some = prompts[first : first + B]
        rows = range(len(some))
        cache, index, reused = prefix.admit_rows(cache, index, rows, some)
        left = np.zeros(B, np.int32)
        left[: len(some)] = [len(p) - n for p, n in zip(some, reused, strict=True)]
        while left.any():
            lens = np.minimum(left, chunk)
            cache, left = extend(cache, lens), left - lens
            cache, index = prefix.publish_rows(cache, index, rows, some)
        cache = paxcache.release(cache, jnp.ones(B, bool))
    return cache, index


def stored_runs(num_pages: int, run: int, step: int, *, seed: int = 0):
    """A cache and an index of prompts of `run` pages that share nothing, `step` pages stored by a call."""
    length = run * PAGE_SIZE
    config = small_config(num_pages, max_seqs=max(400 // step, 1), max_len=length)
    tokens = np.arange(num_pages * PAGE_SIZE, dtype=np.int32).reshape(-1, length)
    tokens = np.random.default_rng(seed).permutation(tokens)
    cache, index = store(
        paxcache.init(config), prefix.init(config), list(tokens), max_len=length, chunk=step * PAGE_SIZE
    )
    assert index.num_entries == num_pages
    return cache, index


def milliseconds(function: Callable[[], Any], repeats: int = 50) -> float:
    """Median time of a call, with what it computes on the device."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def verdict(measured: float, target: float, unit: str) -> str:
    return f"{measured:.3g} {unit} ({'under' if measured < target else 'NOT under'} {target:g})"


def match() -> None:
    """Prompts that part at few or at many places along one long prompt, and others that share nothing with it."""
    rng = np.random.default_rng(0)
    num_pages = 1_000_000 // PAGE_SIZE
    print(f"matching a prompt of {LONG} tokens in an index of {num_pages * PAGE_SIZE} tokens")
    for branches in (1, 64, 256, 512):
        base = rng.integers(0, 50_000, LONG).astype(np.int32)
        prompts = [base]
        for cut in np.linspace(0, LONG, branches, endpoint=False).astype(int) // PAGE_SIZE * PAGE_SIZE:
            prompts.append(np.concatenate([base[:cut], rng.integers(0, 50_000, 64)])[:LONG].astype(np.int32))
        left = num_pages - LONG // PAGE_SIZE - 4 * branches
        while left > 0:
            length = min(int(rng.integers(1, 512)), left)
            prompts.append(rng.integers(0, 50_000, length * PAGE_SIZE).astype(np.int32))
            left -= length
        config = small_config(num_pages + 8192, max_seqs=1, max_len=LONG)
        _, index = store(paxcache.init(config), prefix.init(config), prompts, max_len=LONG)
        asked = np.concatenate([base, [1, 2, 3]]).astype(np.int32)
        assert prefix.match(index, asked).num_tokens == LONG
        nodes = len(prefix.match(index, asked)._path)
        whole = milliseconds(lambda asked=asked, index=index: prefix.match(index, asked))
        miss = milliseconds(lambda asked=asked, index=index: prefix.match(index, asked[1:]))
        as_list = asked.tolist()
        slow = milliseconds(lambda asked=as_list, index=index: prefix.match(index, asked), 20)
        print(
            f"  {nodes:3d} nodes on the way: {verdict(whole, 1, 'ms')}; no match {miss:.3g} ms; "
            f"given as a list of ints {slow:.3g} ms"
        )


def publish() -> None:
    """One prompt alone, in an index of 100k pages: the host's part, and all with the compiled integer updates."""
    num_pages = 100_000
    print(
        f"admit + publish in an index of {num_pages} pages: the host's part, and all with the compiled updates"
    )
    for length in (LONG, 16_000, 1_600):
        pages, max_len = length // PAGE_SIZE, LONG + PAGE_SIZE
        config = small_config(num_pages + 2 * pages, max_seqs=2, max_len=max_len)
        tokens = np.random.default_rng(0).integers(0, 50_000, num_pages * PAGE_SIZE, dtype=np.int32)
        others = np.split(tokens, range(LONG, len(tokens), LONG))
        cache, index = store(paxcache.init(config), prefix.init(config), others, max_len=max_len)
        prompt = np.random.default_rng(1).integers(0, 50_000, length + 1, dtype=np.int32)
        extend = jax.jit(lambda cache, lens: paxcache.extend(cache, lens, max_query_len=LONG + 1)[0])

        def serve(cache, index, row, prompt=prompt, pages=pages, extend=extend):
            """Admits and publishes, and computes what lacks outside of the times: the host's and all of it, in µs."""
            jax.block_until_ready(cache)
            first, (cache, index, reused) = timed(lambda: prefix.admit(cache, index, row, prompt))
            cache = extend(cache, np.where(np.arange(2) == row, len(prompt) - reused, 0))
            jax.block_until_ready(cache)
            second, (cache, index) = timed(lambda: prefix.publish(cache, index, row, prompt))
            return np.add(first, second) * 1e6 / pages, cache, index

        samples = []
        for _ in range(12):
            new, full_cache, full_index = serve(cache, index, 0)
            assert full_index.num_entries == index.num_entries + pages
            known, *_ = serve(full_cache, full_index, 1)
            samples.append((new, known))
        for name, (host, whole) in zip(("all new", "all known"), np.median(samples[2:], axis=0), strict=True):
            print(
                f"  {pages:4d} pages, {name}: host {verdict(host, 10, 'µs a page')}, "
                f"all {verdict(whole, 10, 'µs a page')}"
            )


def timed(function: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Seconds that a call takes without and with what `_integers` does for it, and its result."""
    inside = [0.0]
    names = ("read_rows", "write_rows", "write_epochs", "read_counts", "add_references")
    originals = {name: getattr(_integers, name) for name in names}

    def measured(original):
        def call(*args):
            begin = time.perf_counter()
            result = jax.block_until_ready(original(*args))
            inside[0] += time.perf_counter() - begin
            return result

        return call

    for name, original in originals.items():
        setattr(_integers, name, measured(original))
    try:
        begin = time.perf_counter()
        result = function()
        whole = time.perf_counter() - begin
    finally:
        for name, original in originals.items():
            setattr(_integers, name, original)
    return (whole - inside[0], whole), result


def evict() -> None:
    """Many pages in one call, then one page of n: calls of the ordered maps and new nodes of theirs."""
    num_pages, count = 100_000, 10_000
    print(f"evicting {count} of {num_pages} pages in one call")
    for run, step in RUNS:
        cache, index = stored_runs(num_pages, run, step)
        cells = []
        for policy in ("lru", "priority"):
            options: Any = {"policy": policy}
            cache, index, _ = prefix.evict(cache, index, 0, **options)  # sorts the leaves, once
            freed = prefix.evict(cache, index, count, **options)[2]
            assert freed == count
            took = milliseconds(lambda o=options, c=cache, i=index: prefix.evict(c, i, count, **o)[0], 7)
            cells.append(f"{policy} {verdict(took, 100, 'ms')}")
        print(f"  prompts of {run:2d} pages, {step:2d} stored at once: " + "; ".join(cells))
    print("evicting one page of n: calls into the ordered maps, map nodes not shared with before, time")
    for num_pages in (1_000, 10_000, 100_000):
        cache, index = stored_runs(num_pages, 1, 1)
        cache, index, _ = prefix.evict(cache, index, 0)
        calls, after = count_calls(lambda c=cache, i=index: prefix.evict(c, i, 1)[1])
        took = milliseconds(lambda c=cache, i=index: prefix.evict(c, i, 1)[0], 20)
        print(f"  n = {num_pages:6d}: {calls} calls, {new_nodes(index, after)} nodes, {took:.2f} ms")


def memory() -> None:
    """What Python allocates for an index that is kept, less four bytes a token."""
    num_pages = 20_480
    print(f"memory of an index of {num_pages} pages, with the LRU order, beside the tokens themselves")
    for run, step in RUNS:
        stored_runs(num_pages, run, step)  # compiles
        gc.collect()
        tracemalloc.start()
        cache, index = stored_runs(num_pages, run, step)
        _, index, _ = prefix.evict(cache, index, 0)
        del cache
        gc.collect()
        with_index = tracemalloc.get_traced_memory()[0]
        del index
        gc.collect()
        size = with_index - tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        beyond = size / num_pages - 4 * PAGE_SIZE
        print(
            f"  prompts of {run:2d} pages, {step:2d} stored at once: {verdict(beyond, 300, 'bytes a page')}"
        )


def conversations(num_turns: int, *, seed: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Requests to a chat service as they come: (length of the system prompt, prompt, prompt and answer).

    Every prompt is everything said before in its conversation and a new message. What a conversation begins with is one
    of 8 system prompts of 100 to 1000 tokens, all of which share their first 60; the n-th is chosen with a weight of
    1 / n (Zipf). At each request a new conversation begins with probability 0.2; else one of those begun goes on, where
    the one used k-th last has a weight of 1 / k, and after 8 turns or 3000 tokens it is over. Messages have
    2 + geometric(mean 40) tokens, answers 2 + geometric(mean 80); one message in four is one of 16 stock phrases, so
    that strangers' conversations agree beyond their system prompts. Tokens are uniform over 500.
    """
    rng = np.random.default_rng(seed)

    def text(length):
        return rng.integers(0, 500, length).astype(np.int32)

    common = text(60)
    systems = [np.concatenate([common, text(rng.integers(40, 940))]) for _ in range(8)]
    phrases = [text(2 + rng.geometric(1 / 40)) for _ in range(16)]
    zipf = 1 / np.arange(1, 9)
    live: list[
        tuple[int, int, np.ndarray]
    ] = []  # last used first: length of its system prompt, turns, tokens
    requests = []
    for _ in range(num_turns):
        if not live or rng.random() < 0.2:
            said = systems[rng.choice(8, p=zipf / zipf.sum())]
            start, turns = len(said), 0
        else:
            weights = 1 / np.arange(1, len(live) + 1)
            start, turns, said = live.pop(rng.choice(len(live), p=weights / weights.sum()))
        message = phrases[rng.integers(16)] if rng.random() < 0.25 else text(2 + rng.geometric(1 / 40))
        asked = np.concatenate([said, message])
        whole = np.concatenate([asked, text(2 + rng.geometric(1 / 80))])
        requests.append((start, asked, whole))
        if turns + 1 < 8 and len(whole) < 3000:
            live.insert(0, (start, turns + 1, whole))
    return requests


def longest_reusable(published: list[np.ndarray], prompt: np.ndarray) -> int:
    """The oracle: the longest common prefix with any full page ever published, and one token left to compute.

    Full pages count whole and the page after them by its first tokens, as `match` documents: what was published of a
    text are its full pages, so that the longest common prefix with those is the answer.
    """
    best = 0
    for text in published:
        size = min(len(text) // PAGE_SIZE * PAGE_SIZE, len(prompt))
        differ = np.flatnonzero(text[:size] != prompt[:size])
        best = max(best, int(differ[0]) if differ.size else size)
    return min(best, len(prompt) - 1)


def serve_trace(requests, *, num_pages: int, policy: Any = "lru", partial: bool = False, check: bool = False):
    """Serves a trace one request at a time with so many pages; returns the reuse rate and the pages stored at the end.

    For the policy "priority", system prompts have the higher priority, and what nobody used in 100 requests is past its
    time. With `check`, each request's reuse is compared with the oracle's.
    """
    longest = max(len(whole) for *_, whole in requests)
    cache = paxcache.init(small_config(num_pages, max_seqs=1, max_len=longest))
    index = prefix.init(small_config(num_pages, max_seqs=1, max_len=longest))
    extend = jax.jit(lambda cache, lens: paxcache.extend(cache, lens, max_query_len=longest))
    published: list[np.ndarray] = []
    for turn, (start, asked, whole) in enumerate(requests):
        cache, index, reused = prefix.admit(cache, index, 0, asked, partial=partial, now=turn)
        if check:
            assert reused == longest_reusable(published, asked)
            published.append(whole)
        lens = jnp.array([len(whole) - reused])
        cache, index, _ = prefix.make_room(cache, index, lens, max_query_len=longest, policy=policy)
        cache, step = extend(cache, lens)
        step.raise_if_failed()
        cache, index = prefix.publish(cache, index, 0, whole[:start], priority=1)
        cache, index = prefix.publish(cache, index, 0, whole, ttl=100)
        cache = paxcache.release(cache, jnp.array([True]))
    paxcache.check(cache, held=prefix.held(index))
    return index.counters.hit_rate, index.num_entries


def belady(requests, *, num_pages: int) -> float:
    """The highest reuse rate of full pages that any policy can have: the page goes whose next use is farthest away.

    Pages are prefixes, numbered once for the whole trace. A request uses those of its prompt and leaves those of the
    answer too. A prompt that contains a page contains all before it, so that the page used farthest away is a leaf, or
    as far away as one. The pages of the request in service stay, as in the cache.

    Reference: Belady (1966).
    """
    names: dict[tuple[int, bytes], int] = {}

    def pages_of(tokens):
        made, parent = [], -1
        for page in range(len(tokens) // PAGE_SIZE):
            data = tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE].tobytes()
            parent = names.setdefault((parent, data), len(names))
            made.append(parent)
        return made

    asked = [pages_of(prompt[:-1]) for _, prompt, _ in requests]
    left = [pages_of(whole) for *_, whole in requests]
    next_use = np.full(len(names), len(requests))
    after = []
    for turn in reversed(range(len(requests))):  # for each request, when its pages are used next
        after.append(next_use[left[turn]])
        next_use[asked[turn]] = turn
    stored: dict[int, int] = {}
    reused = 0
    for turn, (ours, pages, following) in enumerate(zip(asked, left, reversed(after), strict=True)):
        for page in ours:
            if page not in stored:
                break
            reused += PAGE_SIZE
        total = -(-len(requests[turn][2]) // PAGE_SIZE)
        stored.update(dict.fromkeys(pages, -1))
        excess = len(stored) + total - len(pages) - num_pages
        in_service = set(pages)
        for page in sorted(stored, key=lambda p: (-stored[p], -p))[: max(excess, 0)]:
            assert page not in in_service
            del stored[page]
        stored.update(zip(pages, following.tolist(), strict=True))
    return reused / sum(len(prompt) for _, prompt, _ in requests)


def trace() -> None:
    """Conversations: with room for everything, and under pressure."""
    requests = conversations(400, seed=0)
    tokens = sum(len(prompt) for _, prompt, _ in requests)
    print(f"a trace of {len(requests)} requests with prompts of {tokens} tokens in all")
    rate, stored = serve_trace(requests, num_pages=16_384, partial=True, check=True)
    print(
        f"  room for everything: {rate:.4f} of the tokens reused, by every request as many as the oracle says"
    )
    rate, stored = serve_trace(requests, num_pages=16_384)
    assert abs(rate - belady(requests, num_pages=16_384)) < 1e-12
    print(f"  in full pages alone: {rate:.4f}; {stored} pages stored at the end")
    policies = ("lru", "slru", "lfu", "fifo", "priority")
    print(
        "  reuse rate under pressure, full pages\n   pages  "
        + "".join(f"{p:>10}" for p in (*policies, "Belady"))
    )
    for num_pages in (stored // 16, stored // 8, stored // 4, stored // 2):
        rates = [serve_trace(requests, num_pages=num_pages, policy=policy)[0] for policy in policies]
        best = belady(requests, num_pages=num_pages)
        assert max(rates) <= best
        print(f"  {num_pages:6d}  " + "".join(f"{rate:10.4f}" for rate in (*rates, best)))


def count_calls(function) -> tuple[int, Any]:
    """Calls of functions of the ordered maps while a function runs, and its result."""
    calls = [0]

    def profile(frame, event, _):
        calls[0] += event == "call" and frame.f_code.co_filename.endswith("_tree.py")

    sys.setprofile(profile)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return calls[0], result


def new_nodes(old: prefix.Index, new: prefix.Index) -> int:
    """Map nodes of a version that the version before does not have."""

    def ids(index, known):
        found, waiting = set(), [index.nodes, index.edges, *(tree for _, tree in index.orders)]
        while waiting:
            node = waiting.pop()
            if node is not None and id(node) not in known and id(node) not in found:
                found.add(id(node))
                waiting += node[2] if node[0] else ()
        return found

    return len(ids(new, ids(old, set())))


def rollout(
    cache: paxcache.PagedKVCache,
    index: prefix.device.DeviceIndex,
    prompts: jax.Array,
    lens: jax.Array,
    *,
    num_samples: int,
    num_lanes: int,
    num_new: int,
):
    """Samples each of N prompts `num_samples` times, `num_lanes` samples at once, in one loop without the host.

    Prompts are i32[N, width], lens their lengths. The model is left out: a token's key and value are its own number,
    and the tokens sampled are zeros. Returns the cache, the index, the tokens computed, the most pages in use at a
    time, and whether every token was served.
    """
    N, width = prompts.shape
    tokens_of = jnp.pad(prompts, ((0, 0), (0, num_new)))
    lanes = jnp.arange(num_lanes)
    _, _, heads, _, dim = cache.groups[0].pages.k.shape

    def forward(state, tokens, query_lens, max_query_len):
        """What every step of a model does, with room made first."""
        cache, index, computed, most, fine = state
        cache, index, _ = prefix.device.make_room(cache, index, query_lens, max_query_len=max_query_len)
        cache, step = paxcache.extend(cache, query_lens, max_query_len=max_query_len)
        own = tokens[jnp.minimum(step.rows, num_lanes - 1), step.positions]
        for layer in range(cache.groups[0].pages.k.shape[0]):
            k = jnp.broadcast_to(own[..., None, None], (*own.shape, heads, dim)).astype(jnp.float32)
            cache = paxcache.append(cache, layer, k, k, step)
        most = jnp.maximum(most, (cache.groups[0].ref_counts > 0).sum(dtype=jnp.int32))
        return cache, index, computed + step.query_lens.sum(dtype=jnp.int32), most, fine & step.ok.all()

    def prefill(state, rows, which):
        """Starts the rows' prompts: reuses what is stored, computes the rest and offers it to others."""
        cache, index, *counts = state
        tokens, own = tokens_of[which], lens[which]
        cache, index, reused = prefix.device.admit(cache, index, rows, tokens, own)
        state = forward((cache, index, *counts), tokens, jnp.where(reused >= 0, own - reused, 0), width)
        cache, index, *counts = state
        cache, index, _ = prefix.device.publish(cache, index, rows, tokens, own)
        return cache, index, *counts

    def batch(i, state):
        which = (i * num_lanes + lanes) // num_samples  # each lane's prompt
        busy = which < N
        # The first lane of each prompt computes it; the others begin when it is stored.
        leads = busy & (which != jnp.pad(which[:-1], (1, 0), constant_values=-1))
        state = prefill(state, jnp.where(leads, lanes, -1), which)
        state = prefill(state, jnp.where(busy & ~leads, lanes, -1), which)
        state = lax.fori_loop(
            0, num_new, lambda _, s: forward(s, tokens_of[which], busy.astype(jnp.int32), 1), state
        )
        return paxcache.release(state[0], busy), *state[1:]

    start = cache, index, jnp.int32(0), jnp.int32(0), jnp.bool_(True)
    return lax.fori_loop(0, -(-N * num_samples // num_lanes), batch, start)


def rollout_counts() -> None:
    """One prompt, 16 samples of it, on 1, 4 and 16 lanes."""
    length, num_new = 1028, 32
    page = PAGE_SIZE
    prompts, lens = jnp.arange(length, dtype=jnp.int32)[None], jnp.array([length])
    print(f"one prompt of {length} tokens, 16 samples of {num_new} new tokens; pages of {page} tokens")
    for num_lanes in (1, 4, 16):
        config = small_config(length // page + 4 * 16, max_seqs=num_lanes, max_len=length + num_new)
        run = jax.jit(
            lambda cache, index, lanes=num_lanes: rollout(
                cache, index, prompts, lens, num_samples=16, num_lanes=lanes, num_new=num_new
            ),
            donate_argnums=(0, 1),
        )
        cache, index, computed, most, fine = run(paxcache.init(config), prefix.device.init(config))
        assert bool(fine)
        paxcache.check(cache, held=tuple(map(np.asarray, prefix.device.held(cache, index))))
        prompt_tokens = int(computed) - 16 * num_new
        print(
            f"  {num_lanes:2d} lanes: {prompt_tokens} prompt tokens computed, {prompt_tokens / length:.3f} prompts "
            f"({16 * length} without reuse); {int(most)} pages at most ({length // page} hold the prompt); "
            f"{int(index.num_entries)} stored at the end"
        )


def prefill() -> None:
    """The built-in model on the text it was trained on: a prompt of which a part was asked before."""
    jax.config.update("jax_default_matmul_precision", "highest")  # rounding must not decide a near tie
    loaded = checkpoint.load(EXAMPLES / "tiny", dtype=jnp.float32)
    model_fn, params = llama.paged_model(loaded.model)
    length, num_new, chunk = 960, 16, 64
    text = loaded.encode(" ".join(topics.topics.values()))
    asked = np.array(text[:length], np.int32)
    other = np.array(text[length : 2 * length], np.int32)
    config = llama.cache_config(
        loaded.model.config, num_pages=256, max_seqs=1, max_len=length + num_new, dtype=jnp.float32
    )

    def run(state, prompt, limit):
        cache, index = state
        return paxcache.generate(
            model_fn,
            params,
            cache,
            prompt[None],
            index=index,
            max_new_tokens=num_new,
            limits=limit,
            chunk_size=chunk,
        )

    def seconds(state, limit=1):
        """Time of a call on copies, which it is given to keep, and its result."""
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        begin = time.perf_counter()
        result = jax.block_until_ready(run(state, asked, limit))
        return time.perf_counter() - begin, result

    empty = paxcache.init(config), prefix.device.init(config)
    plain = paxcache.init(config), None
    expected = run(jax.tree.map(jnp.copy, plain), asked, num_new).to_lists()
    print(f"prompts of {length} tokens, {chunk} computed in a step; time to the first token")
    print("  reused   computed   time, ms   of that without reuse   computed of all")
    for shared in (0, 240, 480, 720, 864, 959):
        before = run(jax.tree.map(jnp.copy, empty), np.concatenate([asked[:shared], other[shared:]]), 1)
        warm = before.cache, before.index
        assert before.index is not None
        found = prefix.device.match(before.index, jnp.asarray(asked[None, :-1]), jnp.array([length - 1]))
        reused = int(found.num_tokens[0])
        computed = length - reused
        _, result = seconds(warm, num_new)
        assert result.to_lists() == expected, "greedy tokens differ from those without reuse"
        pairs = [(seconds(warm)[0], seconds(plain)[0]) for _ in range(9)]
        ratio = statistics.median(a / b for a, b in pairs)
        mine = statistics.median(a for a, _ in pairs) * 1e3
        print(
            f"  {reused:6d} {computed:10d} {mine:10.1f} {ratio:23.2f} {computed / length:17.2f}", flush=True
        )


SECTIONS = {
    "prefill": prefill,
    "match": match,
    "publish": publish,
    "evict": evict,
    "memory": memory,
    "trace": trace,
    "rollout": rollout_counts,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=SECTIONS)
    SECTIONS[parser.parse_args().what]()
