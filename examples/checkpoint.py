"""Reads and writes Hugging Face checkpoint folders for the model of llama.py.

A folder holds config.json, model.safetensors (or shards with model.safetensors.index.json), and, for
text, tokenizer.json and tokenizer_config.json or chat_template.jinja. Whatever the model cannot
represent is refused with an error that names the field or tensor: nothing is ignored that would change
the numbers.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jinja2
import jinja2.sandbox
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
from flax import nnx

from llama import Llama, LlamaConfig, RopeScaling

if TYPE_CHECKING:
    from jax.typing import DTypeLike

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Path in the model, layers without their number -> name in the checkpoint; "{}" stands for the number.
TENSOR_NAMES = {
    "embed.embedding": "model.embed_tokens.weight",
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
    "lm_head": "lm_head.weight",
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
        return self._tokenizer().encode(text).ids

    def decode(self, tokens: Any) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer().decode([int(token) for token in tokens])

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, [{"role": "user", "content": "..."}, ...], ready for the answer."""
        if self.chat_template is None:
            raise ValueError("this checkpoint has no chat template; use encode(text)")
        text = render_chat(self.chat_template, messages, self.special_tokens)
        # The template writes the special tokens itself.
        return self._tokenizer().encode(text, add_special_tokens=False).ids

    def _tokenizer(self) -> tokenizers.Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json")
        return self.tokenizer


def load(folder: str | Path, *, dtype: DTypeLike | None = None) -> Checkpoint:
    """Loads a Hugging Face checkpoint folder.

    Args:
      folder: holds config.json and safetensors files; tokenizer and chat template are read where present.
      dtype: of weights and computation; None means float32 on the CPU and bfloat16 elsewhere.

    Raises:
      FileNotFoundError: config.json or the weights are missing.
      ValueError: the configuration asks for what the model does not do (the field is named), or a tensor
        is missing, unexpected or of another shape (the tensor is named).
    """
    folder = Path(folder)
    default_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    hf_config = _read_json(folder / "config.json")
    config = parse_config(hf_config)
    tokenizer_file = folder / "tokenizer.json"
    chat_template, special_tokens = _read_chat_template(folder)
    return Checkpoint(
        model=load_model(folder, config, dtype=default_dtype if dtype is None else dtype),
        tokenizer=tokenizers.Tokenizer.from_file(str(tokenizer_file)) if tokenizer_file.exists() else None,
        stop_tokens=_stop_tokens(folder, hf_config),
        chat_template=chat_template,
        special_tokens=special_tokens,
    )


# --------------------------------------------------------------------------------------------------
# config.json
# --------------------------------------------------------------------------------------------------


def parse_config(hf: dict[str, Any]) -> LlamaConfig:
    """Translates the contents of config.json; absent fields mean what they mean in `transformers`."""
    model_type = hf.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"config.json: model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}"
        )
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method")
        raise ValueError(
            f"config.json: quantization_config ({method}): quantised weights are not supported; "
            "use the checkpoint they were made from"
        )
    _require(hf, "hidden_act", "silu")
    _require(hf, "mlp_bias", False)
    _require(hf, "partial_rotary_factor", 1.0)
    num_heads = _field(hf, "num_attention_heads")
    hidden_size = _field(hf, "hidden_size")
    default_head_dim = 128 if model_type == "qwen3" else hidden_size // num_heads
    rope_theta, rope_scaling = _parse_rope(hf)
    attention_bias = hf.get("attention_bias", False)
    return LlamaConfig(
        vocab_size=_field(hf, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_field(hf, "intermediate_size"),
        num_layers=_field(hf, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads") or num_heads,
        head_dim=hf.get("head_dim") or default_head_dim,
        max_len=_field(hf, "max_position_embeddings"),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=model_type == "qwen2" or attention_bias,
        out_bias=model_type != "qwen2" and attention_bias,
        qk_norm=model_type == "qwen3",
        tied_embeddings=hf.get("tie_word_embeddings", False),
        sliding_window=_parse_sliding_window(hf, model_type),
    )


def _field(hf: dict[str, Any], name: str) -> int:
    if not isinstance(hf.get(name), int):
        raise ValueError(f"config.json: {name} must be an integer, got {hf.get(name)!r}")
    return hf[name]


def _require(hf: dict[str, Any], name: str, supported: Any) -> None:
    if hf.get(name, supported) != supported:
        raise ValueError(f"config.json: {name} must be {supported!r}, got {hf[name]!r}")


def _parse_rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    # transformers 5 writes one field, rope_parameters; before that there were rope_theta and rope_scaling.
    field = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = hf.get(field) or {}
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    try:
        if kind == "default":
            return theta, None
        if kind == "linear":
            return theta, RopeScaling(kind=kind, factor=float(rope["factor"]))
        if kind == "llama3":
            return theta, RopeScaling(
                kind=kind,
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_len=int(rope["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise ValueError(f"config.json: {field} of type {kind!r} lacks {error.args[0]}") from error
    raise ValueError(f"config.json: {field}.rope_type must be default, linear or llama3, got {kind!r}")


def _parse_sliding_window(hf: dict[str, Any], model_type: str) -> int | None:
    if model_type == "llama":
        return None
    if model_type == "mistral":
        return hf.get("sliding_window", 4096)
    if not hf.get("use_sliding_window", False):
        return None
    # Qwen windows the layers from max_window_layers on; ours are alike, so it must be all of them or none.
    num_layers = _field(hf, "num_hidden_layers")
    kinds = hf.get("layer_types")
    if kinds is None:
        first = hf.get("max_window_layers", 28)
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    if len(set(kinds)) != 1:
        raise ValueError("config.json: layer_types (or max_window_layers) mixes full and sliding attention")
    return _field(hf, "sliding_window") if kinds[0] == "sliding_attention" else None


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
        extra.discard("lm_head.weight")
    for what, names in (("missing", expected - found), ("unexpected", extra)):
        if names:
            raise ValueError(f"{what} tensors in the checkpoint: {_listed(sorted(names))}")


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class _Tensors:
    """The tensors of a folder by name, over one safetensors file or the shards of an index."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.exists():
            file_of = _read_json(index)["weight_map"]
        elif single.exists():
            with safetensors.safe_open(single, framework="numpy") as file:
                file_of = dict.fromkeys(file.keys(), single.name)
        else:
            raise FileNotFoundError(f"{folder}: neither {single.name} nor {index.name}")
        self.names = set(file_of)
        self._file_of = file_of
        self._files = {}
        for name in set(file_of.values()):
            if not (folder / name).exists():
                raise FileNotFoundError(f"{folder}: {name}, named in {index.name}, is missing")
            self._files[name] = safetensors.safe_open(folder / name, framework="numpy")

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


# --------------------------------------------------------------------------------------------------
# Text: stop tokens and chat template
# --------------------------------------------------------------------------------------------------


def render_chat(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """Renders a Hugging Face chat template, ending where the assistant's answer begins."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise ValueError(f"chat template: {message}")

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)  # jinja2's own would escape for HTML

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, **special_tokens
    )


def _read_chat_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    file = folder / "tokenizer_config.json"
    config = _read_json(file) if file.exists() else {}
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = config.get(name)
        if token is not None:
            special[name] = token["content"] if isinstance(token, dict) else token
    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        return own_file.read_text(encoding="utf-8"), special
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones, as [{"name": ..., "template": ...}]
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template, special


def _stop_tokens(folder: Path, hf: dict[str, Any]) -> tuple[int, ...]:
    # generation_config.json knows the end of a turn as well as the end of a text.
    file = folder / "generation_config.json"
    tokens = (_read_json(file) if file.exists() else {}).get("eos_token_id", hf.get("eos_token_id"))
    if tokens is None:
        return ()
    return tuple(tokens) if isinstance(tokens, list) else (tokens,)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise FileNotFoundError(f"{file.parent}: no {file.name}")
    return json.loads(file.read_text(encoding="utf-8"))
