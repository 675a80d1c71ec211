"""Reads and writes Hugging Face checkpoint folders for the model of llama.py.

A folder holds config.json, model.safetensors (or shards with model.safetensors.index.json), and, for
text, tokenizer.json and tokenizer_config.json or chat_template.jinja. Whatever the model cannot
represent is refused with an error that names the field or tensor: nothing is ignored that would change
the numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import nnx

from folder import check_folder, listed, read_json, whole
from llama import Llama, LlamaConfig, RopeScaling
from text import TextStream, read_chat_template, read_tokenizer, render_chat, stop_tokens

if TYPE_CHECKING:
    from jax.typing import DTypeLike

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Path in the model, layers without their number -> name in the checkpoint; "{}" stands for the number.
TENSOR_NAMES = {
    "embed.embedding": EMBEDDING,
    "layers.input_norm.scale": "model.layers.{}.input_layernorm.weight",
    "layers.q_proj.kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers.q_proj.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.k_proj.kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers.k_proj.bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.v_proj.kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers.v_proj.bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.o_proj.kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers.o_proj.bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.q_norm.scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers.k_norm.scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers.post_norm.scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers.gate_proj.kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers.up_proj.kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers.down_proj.kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm.scale": "model.norm.weight",
    "lm_head": HEAD,
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with what is needed to feed it text."""

    model: Llama
    tokenizer: tokenizers.Tokenizer | None
    stop_tokens: tuple[int, ...]  # any of these ends a text
    chat_template: str | None
    special_tokens: dict[str, str]  # bos_token, eos_token, ...: what chat templates refer to

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain text, with the special tokens that the tokenizer puts around it."""
        return self._known(self._tokenizer().encode(text).ids)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, [{"role": "user", "content": "..."}, ...], ready for the answer."""
        if self.chat_template is None:
            raise ValueError("this checkpoint has no (default) chat template; encode plain text instead")
        text = render_chat(self.chat_template, messages, self.special_tokens)
        # The template writes the special tokens itself.
        return self._known(self._tokenizer().encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Any, *, prompt: Sequence[int] = ()) -> str:
        """The text of token ids, special tokens left out; after a prompt, the text that they add to it."""
        return self.text_stream(prompt).push(tokens, last=True)

    def text_stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """Makes text of the tokens that follow a prompt, as they come."""
        return TextStream(self._tokenizer(), prompt)

    def _tokenizer(self) -> tokenizers.Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                "this checkpoint has no tokenizer.json, which text needs; transformers writes it "
                "(AutoTokenizer.from_pretrained, then save_pretrained)"
            )
        return self.tokenizer

    def _known(self, tokens: list[int]) -> list[int]:
        if tokens and max(tokens) >= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer made token {max(tokens)}, but the model knows {self.config.vocab_size} tokens: "
                "they do not belong together"
            )
        return tokens


def load(folder: str | Path, *, dtype: DTypeLike | None = None) -> Checkpoint:
    """Loads a Hugging Face checkpoint folder.

    Args:
      folder: holds config.json and safetensors files; tokenizer and chat template are read where present.
      dtype: of weights and computation; None means float32 on the CPU and bfloat16 elsewhere.

    Raises:
      FileNotFoundError, NotADirectoryError: there is no such folder, or config.json or the weights are missing.
      ValueError: the configuration asks for what the model does not do (the field is named), a tensor is
        missing, unexpected or of another shape (the tensor is named), or a file cannot be read.
    """
    folder = Path(folder)
    check_folder(folder)
    default_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    hf_config = read_json(folder / "config.json")
    config = parse_config(hf_config)
    chat_template, special_tokens = read_chat_template(folder)
    return Checkpoint(
        tokenizer=read_tokenizer(folder),
        stop_tokens=stop_tokens(folder, hf_config),
        chat_template=chat_template,
        special_tokens=special_tokens,
        model=load_model(folder, config, dtype=default_dtype if dtype is None else dtype),
    )


# --------------------------------------------------------------------------------------------------
# config.json
# --------------------------------------------------------------------------------------------------

# What does not change the numbers of the model: names and files, training, text generation.
WITHOUT_EFFECT = """
    _name_or_path name_or_path _commit_hash architectures transformers_version tokenizer_class is_llama_config
    torch_dtype dtype use_bfloat16 torchscript use_cache _attn_implementation attn_implementation
    _attn_implementation_autoset pretraining_tp transformers.js_config unsloth_fixed unsloth_version
    initializer_range attention_dropout hidden_dropout gradient_checkpointing is_decoder
    problem_type finetuning_task task_specific_params id2label label2id num_labels
    output_attentions output_hidden_states return_dict return_dict_in_generate output_scores
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix
    do_sample temperature top_k top_p typical_p repetition_penalty length_penalty diversity_penalty
    encoder_no_repeat_ngram_size no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens
    forced_bos_token_id forced_eos_token_id exponential_decay_length_penalty remove_invalid_values
    max_length min_length max_new_tokens early_stopping num_beams num_beam_groups num_return_sequences
"""
# What has one value that the model can do, which is also what it has where it is absent.
FIXED = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "is_causal": True,
    "use_mrope": False,
    "rope_interleaved": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
}
# Settings of each kind of rotary positions, beside rope_theta.
ROPE_SETTINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
REQUIRED = object()


def parse_config(hf: dict[str, Any]) -> LlamaConfig:
    """Translates the contents of config.json; absent fields mean what they mean in `transformers`.

    Raises:
      ValueError: names a field that is missing, of a wrong type, contradicts another, asks for what the model cannot
        do, or is unknown: it might change the numbers.
    """
    left = dict(hf)  # what is read is taken out
    take = functools.partial(_take, left)
    model_type = left.pop("model_type", None)
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"config.json: model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}"
        )
    if quantization := left.pop("quantization_config", None):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(
            f"config.json: quantization_config ({method}): quantised weights are not "
            "supported; use the checkpoint they were made from"
        )
    for name, supported in FIXED.items():
        if (value := left.pop(name, supported)) != supported:
            raise ValueError(f"config.json: {name} must be {supported!r}, got {value!r}")

    num_layers, num_heads = take("num_hidden_layers", int), take("num_attention_heads", int)
    hidden_size, max_len = take("hidden_size", int), take("max_position_embeddings", int)
    default_head_dim = 128 if model_type == "qwen3" else hidden_size // num_heads
    rope_theta, rope_scaling = _take_rope(left)
    attention_bias = take("attention_bias", bool, False)
    if model_type == "mistral" and attention_bias:
        raise ValueError("config.json: attention_bias must be False for mistral, got True")
    config = LlamaConfig(
        vocab_size=take("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=take("intermediate_size", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=take("num_key_value_heads", int | None, None) or num_heads,
        head_dim=take("head_dim", int | None, None) or default_head_dim,
        max_len=max_len,
        norm_eps=take("rms_norm_eps", float, 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=model_type == "qwen2" or attention_bias,
        out_bias=model_type != "qwen2" and attention_bias,
        qk_norm=model_type == "qwen3",
        tied_embeddings=take("tie_word_embeddings", bool, False),
        sliding_window=_take_sliding_window(left, model_type, num_layers),
    )
    known = WITHOUT_EFFECT.split()
    if unknown := [f"{name}={left[name]!r}" for name in left if name not in known and left[name] is not None]:
        raise ValueError(
            f"config.json: unknown settings {listed(unknown)}: "
            "they may ask for what the model does not do; take out those that do not change its numbers"
        )
    return config


def _take(left: dict[str, Any], name: str, kind: Any, default: Any = REQUIRED, *, minimum: int = 1) -> Any:
    """Takes a field of this type out of what is left; where it is absent, the default if there is one."""
    if name not in left and default is not REQUIRED:
        return default
    value = left.pop(name, None)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = {
            int: "an integer",
            int | None: "an integer or null",
            float: "a number",
            bool: "true or false",
        }
        raise ValueError(f"config.json: {name} must be {kinds.get(kind, kind)}, got {value!r}")
    if isinstance(value, int) and kind is not bool and value < minimum:
        raise ValueError(f"config.json: {name} must be at least {minimum}, got {value}")
    if isinstance(value, float) and not 0 < value < math.inf:
        raise ValueError(f"config.json: {name} must be above 0 and finite, got {value}")
    return value


def _take_rope(left: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes one field, rope_parameters; before that there were rope_theta and rope_scaling. Some files
    # have both, for readers of either age; they must say the same.
    common = {name: left.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in left}
    stated: dict[str, dict[str, Any]] = {}
    for field in ("rope_parameters", "rope_scaling"):
        settings = left.pop(field, None)
        if not isinstance(settings, dict | None):
            raise ValueError(f"config.json: {field} must be an object or null, got {settings!r}")
        if settings:
            stated[field] = {"rope_type": "default", "rope_theta": 10000.0, **common}
            stated[field] |= _rope_settings(field, settings, common)
    old, new = stated.get("rope_scaling"), stated.get("rope_parameters")
    if old and new and old != new:
        names = sorted(name for name in old | new if old.get(name) != new.get(name))
        raise ValueError(f"config.json: rope_parameters and rope_scaling differ in {', '.join(names)}")
    field = "rope_parameters" if new else "rope_scaling"
    settings = new or old or {"rope_theta": 10000.0, **common}

    kind = settings.pop("rope_type", "default")
    if kind not in ROPE_SETTINGS:
        kinds = "default, linear or llama3"
        raise ValueError(f"config.json: {field}.rope_type must be {kinds}, got {kind!r}")
    if (partial := settings.pop("partial_rotary_factor", 1.0)) != 1:
        raise ValueError(f"config.json: partial_rotary_factor must be 1.0, got {partial!r}")
    theta = _take(settings, "rope_theta", float)
    wanted = ROPE_SETTINGS[kind]
    if missing := [name for name in wanted if name not in settings]:
        raise ValueError(f"config.json: {field} of type {kind!r} lacks {', '.join(missing)}")
    if unknown := [name for name in settings if name not in wanted]:
        raise ValueError(f"config.json: {field} of type {kind!r} has no setting {', '.join(unknown)}")
    if kind == "default":
        return theta, None
    original_max_len = "original_max_position_embeddings"
    values = {name: _take(settings, name, int if name == original_max_len else float) for name in wanted}
    if kind == "llama3":
        values["original_max_len"] = values.pop(original_max_len)
        if values["low_freq_factor"] >= values["high_freq_factor"]:
            raise ValueError(f"config.json: {field}.low_freq_factor must be below high_freq_factor")
    return theta, RopeScaling(kind=kind, **values)


def _rope_settings(field: str, settings: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """The settings of one field, which contradict neither each other nor those that stand outside it."""
    if layered := [name for name, value in settings.items() if isinstance(value, dict)]:
        raise ValueError(
            f"config.json: {field} differs by kind of layer ({', '.join(layered)}), which is not supported"
        )
    found = {name: value for name, value in settings.items() if value is not None or name == "rope_theta"}
    kind = found.pop("type", None)  # the older name
    if kind is not None and found.setdefault("rope_type", kind) != kind:
        raise ValueError(f"config.json: {field}.type is {kind!r}, but rope_type is {found['rope_type']!r}")
    for name, value in common.items():
        if found.get(name, value) != value:
            raise ValueError(f"config.json: {field}.{name} is {found[name]!r}, but {name} is {value!r}")
    return found


def _take_sliding_window(left: dict[str, Any], model_type: str, num_layers: int) -> int | None:
    full, sliding = "full_attention", "sliding_attention"
    default = None if model_type == "llama" else 4096
    window = _take(left, "sliding_window", int | None, default)
    use_window = _take(left, "use_sliding_window", bool, None)
    first = left.pop("max_window_layers", 28)
    if model_type == "llama" and window is not None:
        raise ValueError(f"config.json: sliding_window must be null for llama, got {window}")
    if model_type in ("llama", "mistral"):
        kinds = [full if window is None else sliding] * num_layers
        if use_window not in (None, window is not None):
            raise ValueError(
                f"config.json: sliding_window is {window}, but use_sliding_window is {use_window}"
            )
    elif not use_window or window is None:
        kinds, window = [full] * num_layers, None
    else:  # Qwen windows the layers from max_window_layers on
        first = _take({"max_window_layers": first}, "max_window_layers", int, minimum=0)
        kinds = [full if i < first else sliding for i in range(num_layers)]
    stated = left.pop("layer_types", None)
    if model_type in ("qwen2", "qwen3") and window is not None:
        kinds = stated or kinds
    if len(set(kinds)) != 1:
        raise ValueError("config.json: layer_types (or max_window_layers) mixes full and sliding attention")
    if stated is not None and stated != kinds[:1] * num_layers:
        raise ValueError(
            f"config.json: layer_types must be {kinds[0]!r} for each of {num_layers} layers, got {stated!r}"
        )
    return window if kinds[0] == sliding else None


def hf_config(config: LlamaConfig, *, dtype: DTypeLike) -> dict[str, Any]:
    """The config.json of a model: the inverse of `parse_config`."""
    if config.qk_norm:
        model_type, architecture = "qwen3", "Qwen3ForCausalLM"
    elif config.qkv_bias and not config.out_bias:
        model_type, architecture = "qwen2", "Qwen2ForCausalLM"
    elif config.sliding_window is not None:
        model_type, architecture = "mistral", "MistralForCausalLM"
    else:
        model_type, architecture = "llama", "LlamaForCausalLM"
    scaling = config.rope_scaling
    rope_scaling: dict[str, Any] | None = None
    if scaling is not None:
        rope_scaling = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope_scaling |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_len,
            }
    hf = {
        "architectures": [architecture],
        "model_type": model_type,
        "torch_dtype": jnp.dtype(dtype).name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_scaling,
        "attention_bias": config.out_bias,
        "tie_word_embeddings": config.tied_embeddings,
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": 0,
    }
    if parse_config(hf) != config:
        raise ValueError(f"no model_type of {', '.join(MODEL_TYPES)} describes {config}")
    return hf


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, config: LlamaConfig, *, dtype: DTypeLike) -> Llama:
    """A model with the weights of a checkpoint folder, each tensor read once."""
    abstract = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(abstract)
    parameters = nnx.to_flat_state(shapes)
    tensors = _Tensors(Path(folder))
    expected = {_tensor_name(path) for path, _ in parameters}
    _check_names(expected, tensors.names, config)
    loaded = []
    for path, variable in parameters:
        abstract_value = variable.get_value()
        tensor = tensors.read(_tensor_name(path), abstract_value.shape, transposed=path[-1] == "kernel")
        loaded.append((path, variable.replace(jnp.asarray(tensor, abstract_value.dtype))))
    if (
        config.tied_embeddings and HEAD in tensors.names
    ):  # many files hold the embedding again under this name
        shape = (config.vocab_size, config.hidden_size)
        head, embedding = (tensors.read(name, shape, transposed=False) for name in (HEAD, EMBEDDING))
        if not np.array_equal(head, embedding):
            raise ValueError(f"tensor {HEAD} differs from {EMBEDDING}, but tie_word_embeddings is true")
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def save_model(folder: str | Path, model: Llama, *, dtype: DTypeLike) -> None:
    """Writes config.json and model.safetensors in the layout that `load_model` and `transformers` read."""
    config = json.dumps(hf_config(model.config, dtype=dtype), indent=2) + "\n"
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        tensor = np.asarray(variable.get_value().astype(dtype))
        tensors[_tensor_name(path)] = np.ascontiguousarray(tensor.T if path[-1] == "kernel" else tensor)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    # "format" tells transformers how the tensors were laid out; all frameworks write "pt".
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensor_name(path: tuple[Any, ...]) -> str:
    if path[0] != "layers":
        return TENSOR_NAMES[".".join(path)]
    _, layer, *rest = path
    return TENSOR_NAMES[".".join(("layers", *rest))].format(layer)


def _check_names(expected: set[str], found: set[str], config: LlamaConfig) -> None:
    # Derived data that some checkpoints carry: rotary tables, and a head that is the embedding anyway.
    extra = {name for name in found - expected if not name.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        extra.discard(HEAD)  # compared with the embedding in load_model
    for what, names in (("missing", expected - found), ("unexpected", extra)):
        if names:
            raise ValueError(f"{what} tensors in the checkpoint: {listed(sorted(names))}")


def _open(file: Path) -> Any:
    """A safetensors file whose tensors are read one by one."""
    try:
        return safetensors.safe_open(whole(file), framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file that can be read: {error}") from error


class _Tensors:
    """The tensors of a folder by name, over one safetensors file or the shards of an index."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.exists():
            file_of = read_json(index).get("weight_map")
            if not isinstance(file_of, dict):
                raise ValueError(f"{index}: has no weight_map")
            missing = sorted({name for name in file_of.values() if not (folder / name).exists()})
            if missing:
                raise FileNotFoundError(f"{folder}: {listed(missing)}, named in {index.name}, is missing")
            self._files = {name: _open(folder / name) for name in set(file_of.values())}
        else:
            self._files = {single.name: _open(single)}
            file_of = dict.fromkeys(self._files[single.name].keys(), single.name)
        self.names = set(file_of)
        self._file_of = file_of

    def read(self, name: str, shape: tuple[int, ...], *, transposed: bool) -> np.ndarray:
        """One tensor as [*shape]; stored as [out, in] where transposed (nnx kernels are [in, out])."""
        file = self._files[self._file_of[name]]
        if name not in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
            raise ValueError(f"tensor {name} is in the index but not in {self._file_of[name]}")
        stored = shape[::-1] if transposed else shape
        found = tuple(file.get_slice(name).get_shape())
        if found != stored:
            raise ValueError(f"tensor {name} must have shape {stored}, got {found}")
        tensor = file.get_tensor(name)
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"tensor {name} must hold floating-point numbers, got {tensor.dtype}")
        return tensor.T if transposed else tensor
