"""Reinforcement learning: many samples of each prompt, whose pages they share, and a policy-gradient step.

    python examples/rollouts.py

Every sample of a prompt starts from the pages of the first that computed it: the prefix index finds them inside the
compiled generation. New weights make the stored keys and values stale, so after each step the index forgets them.
Idea: group-relative advantages (GRPO, Shao et al., 2024).
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import checkpoint
import llama
import paxcache
from paxcache.prefix import device


@functools.partial(jax.jit, static_argnums=0)
def improve(graphdef, params, texts, written, advantages, learning_rate):
    """One step uphill: sampled tokens, bool[N, W] in texts i32[N, W], weighted with advantages f32[N]."""

    def gain(params):
        log_probs = jax.nn.log_softmax(nnx.merge(graphdef, params)(texts[:, :-1]))
        chosen = jnp.take_along_axis(log_probs, texts[:, 1:, None], axis=-1)[..., 0]
        return (chosen * written[:, 1:] * advantages[:, None]).sum() / written.sum()

    return jax.tree.map(lambda p, g: p + learning_rate * g, params, jax.grad(gain)(params))


def train(model, prompts, reward, *, num_rounds, num_samples=8, num_tokens=16, learning_rate=0.1):
    """Rounds of samples and steps, with reward(tokens of a sample): the model after them, and each round's rewards."""
    repeated = [list(prompt) for prompt in prompts for _ in range(num_samples)]
    N, W = len(repeated), max(map(len, repeated)) + num_tokens
    config = llama.cache_config(model.config, num_pages=4 * N, max_seqs=N, max_len=W, page_size=8)
    cache, index = paxcache.init(config), device.init(config)
    model_fn, params = llama.paged_model(model)
    graphdef, means = nnx.split(model)[0], []
    for number in range(num_rounds):
        out = paxcache.generate(
            model_fn, params, cache, repeated, index=index, max_new_tokens=num_tokens,
            sampling=paxcache.Sampling(temperature=1.0), seeds=np.arange(N) + number * N,
        )  # fmt: skip
        rewards = np.array([reward(tokens) for tokens in out.to_lists()], np.float32)
        by_prompt = rewards.reshape(-1, num_samples)
        mean, std = (f(by_prompt, axis=1, keepdims=True) for f in (np.mean, np.std))
        advantages = ((by_prompt - mean) / (std + 1e-6)).reshape(-1)
        texts, written = np.zeros((N, W), np.int32), np.zeros((N, W), bool)
        for row, (prompt, tokens) in enumerate(zip(repeated, out.to_lists(), strict=True)):
            texts[row, : len(prompt) + len(tokens)] = [*prompt, *tokens]
            written[row, len(prompt) : len(prompt) + len(tokens)] = True
        params = improve(graphdef, params, texts, written, advantages, learning_rate)
        cache, index = device.reset(out.cache, out.index or index)  # what older weights computed is of no use
        means.append(float(rewards.mean()))
    return nnx.merge(graphdef, params), means


def main(num_rounds: int = 6) -> None:
    tiny = checkpoint.load(Path(__file__).parent / "tiny", dtype=jnp.float32)
    prompts = [tiny.encode(text) for text in ("The import statement", "If the file")]
    _, means = train(
        tiny.model, prompts, lambda tokens: tiny.decode(tokens).count("e"), num_rounds=num_rounds
    )
    print("letters e in a sample, by round:", np.round(means, 1))


if __name__ == "__main__":
    main()
