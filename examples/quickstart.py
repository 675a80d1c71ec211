"""Text from a model over a paged cache, and then by hand the three calls that the model makes.

python examples/quickstart.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp

import checkpoint
import llama
import paxcache

# The built-in model answers two prompts in one compiled program.
tiny = checkpoint.load(Path(__file__).parent / "tiny", dtype=jnp.float32)
model_fn, params = llama.paged_model(tiny.model)
config = llama.cache_config(tiny.config, num_pages=16, max_seqs=2, max_len=64, dtype=jnp.float32)
prompts = [tiny.encode(text) for text in ("The import statement", "If the file")]
generation = paxcache.generate(model_fn, params, paxcache.init(config), prompts, max_new_tokens=24)
for prompt, tokens in zip(prompts, generation.to_lists(), strict=True):
    print(f"{tiny.decode(prompt)}|{tiny.decode(tokens, prompt=prompt)}")

# By hand: a cache of one layer, in which row 0 gets five tokens and row 1 two.
config = paxcache.CacheConfig(
    num_layers=1, num_kv_heads=2, head_dim=8, page_size=4, num_pages=8, max_seqs=2, max_pages_per_seq=4
)
cache, step = paxcache.extend(paxcache.init(config), jnp.array([5, 2]), num_tokens=7)  # maps pages
q = jax.random.normal(
    jax.random.key(0), (7, 4, 8), jnp.bfloat16
)  # [T, H, D], the tokens of all rows in order
k, v = jax.random.normal(jax.random.key(1), (2, 7, 2, 8), jnp.bfloat16)  # [T, K, D] each
cache = paxcache.append(cache, 0, k, v, step)  # in each layer: writes into the pages,
out = paxcache.attend(cache, 0, q, step)  # and attends, each row to its own tokens
print(
    f"attended {out.shape}; rows hold {cache.seq_lens} tokens in {paxcache.stats(cache).num_used_pages} pages"
)
