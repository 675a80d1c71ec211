"""Makes the golden numbers that tests compare the model with; needs `transformers` and `torch`.

For each family it builds a tiny random model, saves it as a Hugging Face checkpoint folder and writes
beside it what `transformers` computes in float32: logits, rotary frequencies and greedy continuations.

    pip install torch transformers
    python examples/make_golden.py --out tests/data

The tests themselves need neither package.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

SHAPE = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough that attention is far from uniform, so that a wrong mask or position shows.
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,  # short, so that all three frequency bands are met
}

FAMILIES = {
    # Shards and an index, rope scaling, a separate LM head.
    "llama3": transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
    # Linear rope scaling, biases on all four projections.
    "llama_linear": transformers.LlamaConfig(
        **SHAPE,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        attention_bias=True,
        tie_word_embeddings=True,
    ),
    # Biases on q, k and v alone, tied embeddings.
    "qwen2": transformers.Qwen2Config(
        **SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, tie_word_embeddings=True
    ),
    # QK-norm, and heads wider than hidden_size / num_attention_heads.
    "qwen3": transformers.Qwen3Config(
        **SHAPE,
        head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        tie_word_embeddings=True,
    ),
    # A sliding window shorter than the prompts.
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=12),
}
STORED_DTYPE = {"qwen2": torch.bfloat16, "llama_linear": torch.float16}  # the others are stored in float32
NUM_SHARDS = {"llama3": 3}

PROMPTS, PROMPT_LEN, NEW_TOKENS = 2, 40, 24


def randomise(model: torch.nn.Module) -> None:
    """Gives biases and norm weights values other than the 0 and 1 that would hide their omission."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)


def golden_numbers(model: torch.nn.Module, config: transformers.PreTrainedConfig) -> dict[str, np.ndarray]:
    tokens = torch.randint(3, config.vocab_size, (PROMPTS, PROMPT_LEN))
    with torch.no_grad():
        logits = model(tokens).logits
        extended = tokens
        for _ in range(NEW_TOKENS):  # without a cache, so that no cache can be wrong
            best = model(extended).logits[:, -1].argmax(-1, keepdim=True)
            extended = torch.cat([extended, best], dim=1)
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": logits.numpy().astype(np.float32),
        "rope_frequencies": model.model.rotary_emb.inv_freq.numpy(),
        "greedy_tokens": extended[:, PROMPT_LEN:].numpy().astype(np.int32),
    }


def make(family: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = FAMILIES[family]
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model)
    model = model.to(STORED_DTYPE.get(family, torch.float32))
    shutil.rmtree(folder, ignore_errors=True)
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    shard_bytes = num_bytes // NUM_SHARDS[family] + 1 if family in NUM_SHARDS else num_bytes + 1
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    # Read back, so that the numbers are of the stored (rounded) weights, and in float32 throughout.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    numbers = golden_numbers(model.eval(), config)
    np.savez_compressed(folder / "golden.npz", allow_pickle=False, **numbers)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()) / 1000:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the golden numbers of tests/data.")
    parser.add_argument("--out", type=Path, default=Path("tests/data"))
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)}")
    args = parser.parse_args()
    for family in args.families:
        make(family, args.out / family)


if __name__ == "__main__":
    main()
