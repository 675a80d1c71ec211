"""What importing the library needs and does."""

from __future__ import annotations

import subprocess
import sys

import pytest

ALONE = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it fails
import paxcache
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was initialised, which takes a GPU's memory"
config = paxcache.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=1, max_pages_per_seq=4)
paxcache.init(config)
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_needs_jax_alone_and_touches_no_device():
    blocked = (
        "flax",
        "optax",
        "chex",
        "tqdm",
        "tokenizers",
        "safetensors",
        "jinja2",
        "jaxtyping",
        "jax_triton",
        "orbax",
        "tensorstore",
    )
    done = run(ALONE.format(blocked=blocked))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "needs", "says"),
    [
        ("nnx", "flax", "flax"),
        ("linen", "flax", "flax"),
        ("persist", "tensorstore", "pip install 'paxcache[persist]'"),
    ],
)
def test_modules_say_what_they_need(module, needs, says):
    done = run(f"import sys; sys.modules['{needs}'] = None; import paxcache.{module}")
    assert done.returncode != 0
    assert says in done.stderr
