"""One model written three times over a paged cache, in Flax NNX, in Flax Linen and in bare JAX; one text.

    python examples/custom_model.py

Stock attention layers become paged as they are (`paxcache.nnx`, `paxcache.linen`); a model of your own calls `append`
and `attend` itself. In the end each is a pure function that `paxcache.generate` runs.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import paxcache
import paxcache.linen
import paxcache.nnx

V, E, H, D = 50, 32, 4, 8  # vocabulary, features, heads, head dim
CONFIG = paxcache.CacheConfig(
    num_layers=1, num_kv_heads=H, head_dim=D, dtype=jnp.float32,
    page_size=8, num_pages=16, max_seqs=2, max_pages_per_seq=4,
)  # fmt: skip


def in_nnx():
    """A stock model: `paxcache.nnx.model_fn` takes it as it is. Returns model function and parameters."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Embed(V, E, rngs=rngs), nnx.MultiHeadAttention(H, E, rngs=rngs), nnx.Linear(E, V, rngs=rngs)
    )
    return paxcache.nnx.model_fn(model, CONFIG)


def in_linen(weights):
    """The attention layer is that of `paxcache.linen`, which has the parameters of the stock one."""
    attention = paxcache.linen.MultiHeadDotProductAttention(num_heads=H, decode=True)
    model = nn.Sequential([nn.Embed(V, E), attention, nn.Dense(V)])
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.array([[0]]))  # which layers there are
    embed, attend, head = weights
    attend = {name: attend[name] for name in ("query", "key", "value", "out")}
    params = {"layers_0": {"embedding": embed["embedding"]}, "layers_1": attend, "layers_2": head}
    return paxcache.linen.model_fn(model, {**variables, "params": params}, CONFIG)


def in_jax(weights):
    """Tokens are packed [T]: positions and rows, where a model wants them, are those of the step."""

    def model_fn(params, tokens, cache, step, logits_at):
        embed, attend, head = params
        x = embed["embedding"][tokens]
        q, k, v = (
            jnp.einsum("te,ehd->thd", x, attend[name]["kernel"]) + attend[name]["bias"]
            for name in ("query", "key", "value")
        )
        cache = paxcache.append(cache, 0, k, v, step)
        out = paxcache.attend(cache, 0, q, step)
        x = jnp.einsum("thd,hde->te", out, attend["out"]["kernel"]) + attend["out"]["bias"]
        return x[logits_at] @ head["kernel"] + head["bias"], cache

    return model_fn, weights


def main(num_tokens: int = 8) -> list[list[list[int]]]:
    nnx_fn, state = in_nnx()
    layers = nnx.to_pure_dict(state)["layers"]
    weights = [layers[i] for i in range(3)]
    texts = []
    for model_fn, params in ((nnx_fn, state), in_linen(weights), in_jax(weights)):
        cache = paxcache.init(CONFIG)
        out = paxcache.generate(model_fn, params, cache, [[1, 2, 3], [4]], max_new_tokens=num_tokens)
        texts.append(out.to_lists())
    print(*texts, sep="\n")
    return texts


if __name__ == "__main__":
    main()
