"""Speculative decoding with drafts from the text itself: the tokens of plain greedy decoding, in fewer steps.

    python examples/speculative.py

Text repeats itself. What followed the last two tokens where they last stood is the draft; one forward pass computes
all of it, the model's own choices say how much was right, and `paxcache.truncate` takes back the rest.
Idea: prompt lookup decoding (Saxena, 2023); speculative decoding (Leviathan et al., 2023).
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
    """Drafts i32[B, num_drafts] that follow the latest earlier place of each row's last two tokens, and their number."""
    starts = jnp.arange(tokens.shape[1])
    last = jnp.take_along_axis(tokens, lens[:, None] + jnp.array([-2, -1]), axis=1)
    after = jnp.roll(tokens, -1, axis=1)
    same = (tokens == last[:, :1]) & (after == last[:, 1:]) & (starts < lens[:, None] - 2)
    begin = jnp.max(jnp.where(same, starts + 2, 0), axis=1)
    drafts = jnp.take_along_axis(tokens, begin[:, None] + jnp.arange(num_drafts), axis=1, mode="clip")
    return drafts, jnp.where(begin > 0, jnp.minimum(lens - begin, num_drafts), 0)


@functools.partial(jax.jit, static_argnums=0, static_argnames="num_drafts")
def speculate(model_fn, params, cache, tokens, lens, limits, *, num_drafts):
    """Fills rows of tokens i32[B, W], of which each has lens i32[B] (at least 2), up to limits i32[B].

    Returns the tokens, the forward passes after the first, and whether the pool had pages for all of it.
    """
    B, W = tokens.shape
    columns = jnp.arange(num_drafts + 1)

    def forward(cache, tokens, query_lens, num_tokens):
        cache, step = paxcache.extend(cache, query_lens, num_tokens=num_tokens)
        packed = tokens[jnp.minimum(step.rows, B - 1), step.positions]
        logits, cache = model_fn(params, packed, cache, step, jnp.arange(num_tokens))
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32), step

    def advance(state):
        cache, tokens, lens, num_steps, ok = state
        drafts, count = look_up(tokens, lens, num_drafts=num_drafts)
        count = jnp.minimum(count, limits - lens - 1)
        at = jnp.where(columns[:-1] < count[:, None], lens[:, None] + columns[:-1], W)
        drafted = tokens.at[jnp.arange(B)[:, None], at].set(drafts, mode="drop")
        query_lens = jnp.where(lens < limits, 1 + count, 0)  # the newest token, and its draft
        cache, chosen, step = forward(cache, drafted, query_lens, B * (num_drafts + 1))
        chosen = chosen.at[step.query_starts[:, None] + columns].get(mode="clip")  # [B, 1 + num_drafts]
        right = (chosen[:, :-1] == drafts) & (columns[:-1] < count[:, None])
        more = jnp.where(
            query_lens > 0, 1 + jnp.cumprod(right, axis=1).sum(axis=1), 0
        )  # one is the model's own
        at = jnp.where(columns < more[:, None], lens[:, None] + columns, W)
        tokens = tokens.at[jnp.arange(B)[:, None], at].set(chosen, mode="drop")
        cache = paxcache.truncate(cache, lens + more - 1)  # without what was drafted wrongly
        return cache, tokens, lens + more, num_steps + 1, ok & step.ok.all()

    # The prompts, but for their last tokens, which the loop computes.
    cache, _, step = forward(cache, tokens, lens - 1, tokens.size)
    state = cache, tokens, lens, 0, step.ok.all()
    _, tokens, _, num_steps, ok = jax.lax.while_loop(lambda s: s[4] & (s[2] < limits).any(), advance, state)
    return tokens, num_steps, ok


def main(num_tokens: int = 64, num_drafts: int = 4) -> None:
    tiny = checkpoint.load(Path(__file__).parent / "tiny", dtype=jnp.float32)
    model_fn, params = llama.paged_model(tiny.model)
    prompts = [tiny.encode(text) for text in ("The import statement", "If the file", "Classes")]
    lens = jnp.array([len(prompt) for prompt in prompts])
    W = int(lens.max()) + num_tokens
    tokens = jnp.array([prompt + [0] * (W - len(prompt)) for prompt in prompts], jnp.int32)
    config = llama.cache_config(tiny.config, num_pages=32, max_seqs=3, max_len=W, dtype=jnp.float32)
    tokens, num_steps, ok = speculate(
        model_fn, params, paxcache.init(config), tokens, lens, lens + num_tokens, num_drafts=num_drafts
    )
    if not ok:
        raise SystemExit("the pool is too small")
    for prompt, row, n in zip(prompts, tokens, lens, strict=True):
        print(f"{tiny.decode(prompt)}|{tiny.decode(row[n : n + num_tokens], prompt=prompt)!r}")
    print(f"{num_tokens} tokens a row in {num_steps} steps")


if __name__ == "__main__":
    main()
