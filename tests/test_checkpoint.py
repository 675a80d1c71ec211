"""Reading Hugging Face folders: what is there, config.json, weights, tokens and text, chat templates."""

from __future__ import annotations

import dataclasses
import json
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


def test_models_that_no_checkpoint_describes_are_not_saved(tmp_path):
    config = checkpoint.parse_config({**BASE, "model_type": "qwen3", "head_dim": 4})
    odd = dataclasses.replace(config, qkv_bias=True)
    model = nnx.eval_shape(lambda: llama.Llama(odd, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no model_type"):
        checkpoint.save_model(tmp_path, model, dtype=jnp.float32)


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------

TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}
<{{ message.role }}>{{ message.content | trim }}</>
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
MESSAGES = [{"role": "user", "content": " What is <b>? "}]
RENDERED = "<s><user>What is <b>?</><assistant>"


def text_folder(folder: Path, **files) -> Path:
    """A checkpoint folder with a tokenizer and more files: strings as they are, the rest as JSON."""
    shutil.copytree(TINY, folder)
    (folder / "tokenizer_config.json").unlink()
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": TEMPLATE, "tokenizer_config__json": {"bos_token": "<s>"}},
        {"tokenizer_config__json": {"bos_token": {"content": "<s>"}, "chat_template": TEMPLATE}},
        {
            "tokenizer_config__json": {
                "bos_token": "<s>",
                "chat_template": [
                    {"name": "tools", "template": "no"},
                    {"name": "default", "template": TEMPLATE},
                ],
            }
        },
    ],
    ids=["own file", "string", "named"],
)
def test_chat_templates(files, tmp_path):
    loaded = checkpoint.load(text_folder(tmp_path / "chat", **files))
    assert loaded.decode(loaded.encode_chat(MESSAGES)) == RENDERED
    assert loaded.chat_template is not None
    with pytest.raises(ValueError, match="unknown role"):
        loaded.encode_chat([{"role": "oracle", "content": ""}])


def test_text_without_tokenizer_or_template_is_refused():
    with pytest.raises(ValueError, match="chat template"):
        checkpoint.load(TINY).encode_chat(MESSAGES)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        checkpoint.load(DATA / "qwen2").encode("text")


def test_stop_tokens_come_from_generation_config_first(tmp_path):
    assert checkpoint.load(DATA / "qwen2").stop_tokens == (2,)
    folder = text_folder(tmp_path / "a", generation_config__json={"eos_token_id": [5, 7]})
    assert checkpoint.load(folder).stop_tokens == (5, 7)
    (folder / "generation_config.json").unlink()
    assert checkpoint.load(folder).stop_tokens == ()
