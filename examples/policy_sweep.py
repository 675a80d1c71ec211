"""A sweep over serving policies: one compiled program runs the allocator under every policy on every trace.

    python examples/policy_sweep.py

The bookkeeping of a cache is integer arithmetic on a value, so `jax.vmap` simulates many servers at once. The policy
here says how many pages must stay free when a request starts. With few, more run at a time, and a row that finds no
page gives all of its own back and is computed again; with many, rows wait. No model runs: what counts is pages.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import paxcache

CONFIG = paxcache.CacheConfig(
    num_layers=1, num_kv_heads=1, head_dim=8, page_size=16, num_pages=48, max_seqs=16, max_pages_per_seq=24
)


def simulate(prompt_lens, answer_lens, reserve, *, num_steps):
    """Serves N requests i32[N] in order; answers' lengths are not known ahead. One request starts in a step.

    Returns the requests finished after num_steps, and the tokens computed, those computed again included.
    """
    N, B, S = prompt_lens.shape[0], CONFIG.max_seqs, CONFIG.page_size
    rows = jnp.arange(B)

    def step_once(state, _):
        cache, request, written, arrived, finished, computed = state
        idle = cache.seq_lens == 0
        row = jnp.argmax(idle)  # the first idle one: it was interrupted, or takes the next request
        is_new = request[row] == N
        candidate = jnp.where(is_new, arrived, request[row])
        tokens = prompt_lens[jnp.minimum(candidate, N - 1)] + jnp.where(is_new, 0, written[row])
        left = (cache.groups[0].ref_counts == 0).sum() - -(-tokens // S)
        starts = idle.any() & (candidate < N) & ((left >= reserve) | idle.all())
        begins = starts & (rows == row)
        request = jnp.where(begins, candidate, request)
        written = jnp.where(begins & is_new, 0, written)

        query_lens = jnp.where(begins, tokens, jnp.where(idle, 0, 1))
        cache, step = paxcache.extend(cache, query_lens, num_tokens=CONFIG.max_pages_per_seq * S + B)
        written = written + (step.query_lens > 0)
        ended = (step.query_lens > 0) & (written >= answer_lens[jnp.minimum(request, N - 1)])
        cache = paxcache.release(cache, ended | ~step.ok)
        counts = finished + ended.sum(), computed + step.query_lens.sum()
        return (cache, jnp.where(ended, N, request), written, arrived + (starts & is_new), *counts), None

    state = paxcache.init(CONFIG), jnp.full(B, N), jnp.zeros(B, jnp.int32), 0, 0, 0
    *_, finished, computed = jax.lax.scan(step_once, state, length=num_steps)[0]
    return finished, computed


def sweep(prompt_lens, answer_lens, reserves, *, num_steps):
    """Each policy of reserves i32[R] on each trace i32[C, N]: finished and computed, i32[R, C]."""
    traces = jax.vmap(lambda *args: simulate(*args, num_steps=num_steps), (0, 0, None))
    return jax.jit(jax.vmap(traces, (None, None, 0)))(prompt_lens, answer_lens, reserves)


def main(num_traces: int = 8, num_requests: int = 64, num_steps: int = 400) -> None:
    prompts, answers = jax.random.split(jax.random.key(0))
    prompt_lens = jax.random.randint(prompts, (num_traces, num_requests), 16, 128)
    answer_lens = jax.random.randint(answers, (num_traces, num_requests), 8, 160)
    reserves = jnp.array([0, 1, 2, 4, 8, 16, 32])
    finished, computed = sweep(prompt_lens, answer_lens, reserves, num_steps=num_steps)
    print(
        f"after {num_steps} steps, means of {num_traces} traces\npages kept free   finished   tokens computed for each"
    )
    for reserve, done, tokens in zip(reserves, finished, computed, strict=True):
        print(f"{reserve:15}{done.mean():11.1f}{(tokens.sum() / done.sum()):22.1f}")


if __name__ == "__main__":
    main()
