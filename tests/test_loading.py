"""Reading Hugging Face folders: what is there, config.json, weights, tokens and text, chat templates."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import checkpoint
import llama

DATA = Path(__file__).parent / "data"
TINY = Path(__file__).parent.parent / "examples" / "tiny"
FAMILIES = ("llama3", "llama_linear", "mistral", "qwen2", "qwen3")

BASE = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def stored(family: str) -> llama.Llama:
    return checkpoint.load(DATA / family, dtype=jnp.float32).model


# --------------------------------------------------------------------------------------------------
# config.json
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, r"model_type.*'gemma2'"),
        ({"model_type": None}, r"model_type.*None"),
        ({"hidden_act": "gelu"}, r"hidden_act must be 'silu', got 'gelu'"),
        ({"mlp_bias": True}, r"mlp_bias"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config \(gptq\)"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_scaling\.rope_type.*'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, r"rope_scaling\.rope_type.*'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters\.rope_type.*'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"'llama3' lacks low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"'linear' lacks factor"),
        ({"hidden_size": None}, r"hidden_size must be an integer, got None"),
        ({"num_key_value_heads": 3}, r"num_heads must be a multiple of num_kv_heads"),
        ({"head_dim": 5}, r"head_dim must be even"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
            r"layer_types \(or max_window_layers\) mixes",
        ),
        # Wrong types, null among them: where absent fields have a default, null is not the same.
        ({"rms_norm_eps": None}, r"rms_norm_eps must be a number, got None"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps must be above 0"),
        ({"num_hidden_layers": True}, r"num_hidden_layers must be an integer, got True"),
        ({"num_attention_heads": 0}, r"num_attention_heads must be at least 1, got 0"),
        ({"num_key_value_heads": 0}, r"num_key_value_heads must be at least 1, got 0"),
        ({"tie_word_embeddings": None}, r"tie_word_embeddings must be true or false, got None"),
        ({"attention_bias": "yes"}, r"attention_bias must be true or false, got 'yes'"),
        ({"rope_theta": None}, r"rope_theta must be a number, got None"),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": None},
            r"max_window_layers must be an integer, got None",
        ),
        # Unknown settings, which might change the numbers.
        ({"logits_soft_cap": 30.0}, r"unknown settings logits_soft_cap=30\.0"),
        (
            {"residual_multiplier": 0.5, "auto_map": {"AutoModel": "x"}},
            r"residual_multiplier=0\.5, auto_map=",
        ),
        ({"is_causal": False}, r"is_causal must be True, got False"),
        ({"rope_interleaved": True}, r"rope_interleaved must be False, got True"),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1]}},
            r"rope_scaling of type 'default' has no setting mrope_section",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "factor": 4.0}},
            r"rope_parameters of type 'default' has no setting factor",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25}},
            r"partial_rotary_factor must be 1\.0, got 0\.25",
        ),
        ({"rope_scaling": 4.0}, r"rope_scaling must be an object or null, got 4\.0"),
        # Settings that contradict each other.
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_parameters and rope_scaling differ in factor, rope_type$",
        ),
        (  # transformers would drop the first field, base frequency and all
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            r"rope_parameters and rope_scaling differ in factor, rope_theta, rope_type$",
        ),
        (
            {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
            r"rope_parameters\.rope_theta is 500000\.0, but rope_theta is 10000\.0",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2}},
            r"'linear', but .*'llama3'",
        ),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e6},
                    "sliding_attention": {"rope_theta": 1e4},
                }
            },
            r"rope_parameters differs by kind of layer \(full_attention, sliding_attention\)",
        ),
        ({"sliding_window": 8}, r"sliding_window must be null for llama, got 8"),
        (
            {"model_type": "mistral", "sliding_window": 8, "use_sliding_window": False},
            r"sliding_window is 8, but use_sliding_window is False",
        ),
        ({"model_type": "mistral", "attention_bias": True}, r"attention_bias must be False for mistral"),
        (
            {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2, "sliding_window": 8},
            r"layer_types must be 'full_attention' for each of 2 layers",
        ),
        ({"layer_types": ["full_attention"]}, r"for each of 2 layers, got \['full_attention'\]"),
    ],
)
def test_unsupported_configurations_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        checkpoint.parse_config({**BASE, **changes})


def test_unknown_rope_kind_is_refused():
    with pytest.raises(ValueError, match=r"rope scaling kind.*'yarn'"):
        llama.RopeScaling(kind="yarn", factor=2.0)


def test_old_and_new_spellings_of_rope_mean_the_same():
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = checkpoint.parse_config({**BASE, "rope_theta": 500000.0, "rope_scaling": scaling})
    new = checkpoint.parse_config({**BASE, "rope_parameters": {"rope_theta": 500000.0, **scaling}})
    assert old == new
    assert old.rope_theta == 500000.0
    assert old.rope_scaling == llama.RopeScaling(kind="llama3", factor=32.0, original_max_len=8192)


def test_rope_fields_may_say_the_same_twice():
    """As files do that readers of either age understand."""
    scaling = {"type": "linear", "factor": 4.0}
    old = {**BASE, "rope_theta": 500000.0, "rope_scaling": scaling}
    both = {**old, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}}
    assert checkpoint.parse_config(both) == checkpoint.parse_config(old)
    assert checkpoint.parse_config(both).rope_scaling == llama.RopeScaling(kind="linear", factor=4.0)


def test_settings_without_effect_are_let_through():
    plain = checkpoint.parse_config(BASE)
    names = dict.fromkeys(checkpoint.WITHOUT_EFFECT.split(), "whatever")
    assert checkpoint.parse_config({**BASE, **names, "some_other_field": None}) == plain
    unused = {
        "model_type": "qwen3",
        "use_sliding_window": False,
        "max_window_layers": None,
        "sliding_window": 9,
    }
    assert checkpoint.parse_config({**BASE, **unused}).sliding_window is None


def test_defaults_are_those_of_transformers():
    config = checkpoint.parse_config(BASE)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (4, 4, 1e-6)
    assert not (config.qkv_bias or config.out_bias or config.qk_norm or config.tied_embeddings)
    assert checkpoint.parse_config({**BASE, "model_type": "mistral"}).sliding_window == 4096
    assert (
        checkpoint.parse_config({**BASE, "model_type": "mistral", "sliding_window": None}).sliding_window
        is None
    )
    assert checkpoint.parse_config({**BASE, "model_type": "qwen3"}).head_dim == 128
    qwen2 = checkpoint.parse_config({**BASE, "model_type": "qwen2", "sliding_window": 8})
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.sliding_window) == (True, False, None)
    windowed = {**BASE, "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}
    assert checkpoint.parse_config({**windowed, "max_window_layers": 0}).sliding_window == 8
    assert checkpoint.parse_config({**windowed, "max_window_layers": 2}).sliding_window is None
    assert (
        checkpoint.parse_config({**windowed, "max_window_layers": 0, "sliding_window": None}).sliding_window
        is None
    )
    del windowed["sliding_window"]
    assert checkpoint.parse_config({**windowed, "max_window_layers": 0}).sliding_window == 4096


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_load_as_they_were(family, tmp_path):
    model = stored(family)
    checkpoint.save_model(tmp_path, model, dtype=jnp.float32)
    loaded = checkpoint.load(tmp_path, dtype=jnp.float32).model
    assert loaded.config == model.config
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))


def edited(folder: Path, edit) -> Path:
    """A copy of the qwen2 checkpoint (in one file) whose dict of tensors `edit` has changed."""
    shutil.copytree(DATA / "qwen2", folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


K_BIAS = "model.layers.1.self_attn.k_proj.bias"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(K_BIAS), rf"missing tensors.*{re.escape(K_BIAS)}"),
        (lambda t: t.update({"model.extra.weight": t[K_BIAS]}), r"unexpected tensors.*model\.extra\.weight"),
        (lambda t: t.update({GATE: t[GATE].T.copy()}), rf"{re.escape(GATE)} must have shape \(48, 32\)"),
        (lambda t: t.update({GATE: t[GATE].astype(np.int8)}), rf"{re.escape(GATE)}.*floating-point.*int8"),
        (lambda t: t.update({checkpoint.HEAD: t[checkpoint.EMBEDDING] * 2}), r"lm_head\.weight differs from"),
    ],
)
def test_wrong_tensors_are_named(edit, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoint.load(edited(tmp_path / "model", edit))


def test_derived_tensors_are_ignored(tmp_path):
    def edit(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()  # tied: the embedding again
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    loaded = checkpoint.load(edited(tmp_path / "model", edit), dtype=jnp.float32).model
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(stored("qwen2")))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        checkpoint.load(tmp_path)
    shutil.copytree(DATA / "llama3", tmp_path / "shards")
    next((tmp_path / "shards").glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-0000\d\.safetensors"):
        checkpoint.load(tmp_path / "shards")
    for file in (tmp_path / "shards").glob("model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        checkpoint.load(tmp_path / "shards")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1000\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"an empty folder; needed are config\.json, model\.safetensors .* tokenizer\.json"),
        ({"params.json": b"{}"}, r"no config\.json, only params\.json; needed are"),
        ({"config.json": b"{}"}, r"neither model\.safetensors nor .*, only config\.json"),
        (
            {"config.json": b"{}", "pytorch_model.bin": b"0"},
            r"the weights are in pytorch_model\.bin, .*safetensors",
        ),
        ({"config.json": b"{}", "model-q4.gguf": b"0"}, r"the weights are in model-q4\.gguf, .*safetensors"),
        (
            {
                "adapter_config.json": b'{"base_model_name_or_path": "some/base"}',
                "adapter_model.safetensors": b"0",
            },
            r"adapter \(LoRA\) of some/base; merge",
        ),
        ({"config.json": LFS, "model.safetensors": LFS}, r"config\.json: a git-lfs pointer .*git lfs pull"),
        ({"config.json": b"{", "model.safetensors": b"0"}, r"config\.json: not valid JSON"),
        ({"config.json": b"[]", "model.safetensors": b"0"}, r"config\.json: must hold an object, got list"),
        ({"config.json": b"", "model.safetensors": b"0"}, r"config\.json: an empty file"),
        ({"model.safetensors": LFS, "config.json": b"*"}, r"model\.safetensors: a git-lfs pointer"),
        (
            {"model.safetensors": b"not tensors", "config.json": b"*"},
            r"model\.safetensors: not a safetensors file",
        ),
        ({"model.safetensors.index.json": b"{}", "config.json": b"*"}, r"index\.json: has no weight_map"),
        (
            {"tokenizer.json": LFS, "config.json": b"*", "model.safetensors": b"0"},
            r"tokenizer\.json: a git-lfs",
        ),
        (
            {"tokenizer.json": b"{}", "config.json": b"*", "model.safetensors": b"0"},
            r"tokenizer\.json: not a tok",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_one_line_says_what_a_folder_lacks(files, message, tmp_path):
    for name, contents in files.items():
        good = (DATA / "qwen3" / "config.json").read_bytes()
        (tmp_path / name).write_bytes(good if contents == b"*" else contents)
    with pytest.raises((OSError, ValueError), match=message) as caught:
        checkpoint.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_told_from_a_name_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; .* hf download some/model --local-dir DIR"):
        checkpoint.load("some/model")
    with pytest.raises(FileNotFoundError, match=r"missing: no such folder$"):
        checkpoint.load(tmp_path / "missing")
    with pytest.raises(NotADirectoryError, match=r"model\.safetensors: a file; needed is the folder"):
        checkpoint.load(TINY / "model.safetensors")


def test_models_that_no_checkpoint_describes_are_not_saved(tmp_path):
    config = checkpoint.parse_config({**BASE, "model_type": "qwen3", "head_dim": 4})
    odd = dataclasses.replace(config, qkv_bias=True)
    model = nnx.eval_shape(lambda: llama.Llama(odd, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no model_type"):
        checkpoint.save_model(tmp_path, model, dtype=jnp.float32)
