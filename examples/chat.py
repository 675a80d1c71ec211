"""Chat: a turn computes what is new in it; all that was said before is in the cache.

    python examples/chat.py

A prefix index on the host keeps the pages of finished turns, by their tokens. The next turn, or another conversation
that begins alike, starts from them; when pages run short, the least recently used make way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import checkpoint
import llama
import paxcache
from paxcache import prefix

CHUNK = 32  # tokens of a step that reads


class Server(NamedTuple):
    """What stays between turns; a turn makes a new one."""

    forward: Callable  # (params, tokens i32[T], cache, step, logits_at) -> (logits, cache), compiled
    params: object
    cache: paxcache.PagedKVCache  # of one row
    index: prefix.Index


def reply(server: Server, tokens: Sequence[int], max_new_tokens: int) -> tuple[Server, list[int], int]:
    """Greedy answer to a conversation, and how many of its tokens did not have to be computed."""
    forward, params, cache, index = server
    cache, index, num_reused = prefix.admit(cache, index, 0, tokens)
    known, answer, done = list(tokens), [], num_reused
    while len(answer) < max_new_tokens:
        new = known[done : done + CHUNK]
        width = CHUNK if len(new) > 1 else 1  # two programs: one reads, one writes
        query_lens = jnp.array([len(new)])
        cache, index, _ = prefix.make_room(cache, index, query_lens, num_tokens=width)
        cache, step = paxcache.extend(cache, query_lens, num_tokens=width)
        step.raise_if_failed()
        padded = jnp.array(new + [0] * (width - len(new)))
        logits, cache = forward(params, padded, cache, step, jnp.array([len(new) - 1]))
        done += len(new)
        if done == len(known):
            answer.append(int(np.argmax(logits[0])))
            known.append(answer[-1])
    cache, index = prefix.publish(cache, index, 0, known)
    cache = paxcache.release(cache, jnp.array([True]))
    return Server(forward, params, cache, index), answer, num_reused


def main(turns: Sequence[str] = ("What is a module?", "And a package?", "Thanks."), length: int = 24) -> None:
    tiny = checkpoint.load(
        Path(__file__).parent / "tiny", dtype=jnp.float32
    )  # writes prose, and knows no chat
    model_fn, params = llama.paged_model(tiny.model)
    config = llama.cache_config(tiny.config, num_pages=64, max_seqs=1, max_len=512, page_size=8)
    server = Server(jax.jit(model_fn), params, paxcache.init(config), prefix.init(config))
    conversation = tiny.encode("Questions about Python, and their answers.")
    for turn in turns:
        conversation += tiny.encode(f"\n\nQuestion: {turn}\nAnswer:")[
            1:
        ]  # without the mark that begins a text
        server, answer, num_reused = reply(server, conversation, length)
        print(f"> {turn} ({num_reused} of {len(conversation)} tokens reused)")
        print(tiny.decode(answer, prompt=conversation))
        conversation += answer
    print(f"hit rate {server.index.counters.hit_rate:.0%}")


if __name__ == "__main__":
    main()
