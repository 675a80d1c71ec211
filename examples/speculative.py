"""Speculative decoding with drafts from the text itself: the tokens of plain greedy decoding, in fewer steps.

    python examples/speculative.py

Text repeats itself. What followed the last two tokens where they last stood is the draft; one forward pass computes
all of it, the model's own choices say how much was right, and `paxcache.truncate` takes back the rest. Ideas: prompt
lookup decoding (Saxena, 2023), speculative decoding (Leviathan et al., 2023).
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

import checkpoint
import llama
import paxcache


def look_up(tokens, lens, *, num_drafts):
    """What followed each row's last two tokens where they last stood: drafts i32[B, num_drafts], and how many."""
    last = jnp.take_along_axis(tokens, lens[:, None] + jnp.array([-2, -1]), axis=1)
    starts, after = jnp.arange(tokens.shape[1]), jnp.roll(tokens, -1, axis=1)
    same = (tokens == last[:, :1]) & (after == last[:, 1:]) & (starts < lens[:, None] - 2)
    begin = jnp.max(jnp.where(same, starts + 2, 0), axis=1)
    period = (lens - begin)[:, None]  # where it ends it is taken to begin again
    drafts = jnp.take_along_axis(tokens, begin[:, None] + jnp.arange(num_drafts) % period, axis=1)
    return drafts, jnp.where(begin > 0, num_drafts, 0)


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_drafts")
def speculate(model_fn, params, cache, tokens, lens, limits, *, num_drafts):
    """Fills rows of tokens i32[B, W], from lens i32[B] (>= 2) up to limits: tokens, steps, whether pages sufficed."""
    B, W = tokens.shape
    offsets = jnp.arange(num_drafts + 1)

    def put(tokens, lens, values, count):  # the first count values of each row, behind what it has
        at = jnp.where(offsets < count[:, None], lens[:, None] + offsets, W)[:, : values.shape[1]]
        return tokens.at[jnp.arange(B)[:, None], at].set(values, mode="drop")

    def forward(cache, tokens, query_lens, num_tokens):
        cache, step = paxcache.extend(cache, query_lens, num_tokens=num_tokens)
        packed = tokens[jnp.minimum(step.rows, B - 1), step.positions]
        logits, cache = model_fn(params, packed, cache, step, jnp.arange(num_tokens))
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), step

    def advance(state):
        cache, tokens, lens, num_steps, ok = state
        drafts, count = look_up(tokens, lens, num_drafts=num_drafts)
        count = jnp.minimum(count, limits - lens - 1)
        query_lens = jnp.where(lens < limits, 1 + count, 0)  # the newest token, and its draft
        cache, chosen, step = forward(cache, put(tokens, lens, drafts, count), query_lens, B * offsets.size)
        chosen = chosen.at[step.query_starts[:, None] + offsets].get(mode="clip")  # [B, 1 + num_drafts]
        right = (chosen[:, :-1] == drafts) & (offsets[:-1] < count[:, None])
        more = 1 + jnp.cumprod(right, axis=1).sum(axis=1)  # the first that differs is the model's own
        more = jnp.where(query_lens > 0, more, 0)
        cache = paxcache.truncate(cache, lens + more - 1)  # without what was drafted wrongly
        return cache, put(tokens, lens, chosen, more), lens + more, num_steps + 1, ok & step.ok.all()

    cache, _, step = forward(cache, tokens, lens - 1, tokens.size)  # the newest token is for the loop
    state = cache, tokens, lens, 0, step.ok.all()
    _, tokens, _, num_steps, ok = jax.lax.while_loop(lambda s: s[4] & (s[2] < limits).any(), advance, state)
    return tokens, num_steps, ok


def main(prompt: str = "The import statement", num_tokens: int = 64, num_drafts: int = 4) -> None:
    tiny = checkpoint.load(Path(__file__).parent / "tiny", dtype=jnp.float32)
    model_fn, params = llama.paged_model(tiny.model)
    tokens = jnp.array([tiny.encode(prompt) + [0] * num_tokens])
    lens, limits = jnp.array([tokens.size - num_tokens]), jnp.array([tokens.size])
    cache = paxcache.init(llama.cache_config(tiny.config, num_pages=16, max_seqs=1, max_len=256))
    tokens, steps, ok = speculate(model_fn, params, cache, tokens, lens, limits, num_drafts=num_drafts)
    print(f"{tiny.decode(tokens[0])!r}\n{num_tokens} tokens in {steps} steps, pages sufficed: {ok}")


if __name__ == "__main__":
    main()
