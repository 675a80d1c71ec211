"""Trains the small language model in examples/tiny on text that every Python installation carries.

The text is the language reference behind `help()` (pydoc_data.topics) and the longer docstrings and
block comments of the standard library: 1.7 MB of English. One document in twenty is held out. The
result is an ordinary Hugging Face checkpoint folder, which checkpoint.py reads like any other.

    python examples/train_tiny.py --out examples/tiny     # two minutes on a GPU; hours on a CPU
    python examples/train_tiny.py --steps 20 --batch 2 --seq-len 128 --out /tmp/tiny    # a dry run

The weights in examples/tiny are of the first command (Python 3.12.3, an H200): held out 4.335
nats/token, 1.785 bits/byte.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
import sysconfig
import time
import zlib
from pathlib import Path
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import checkpoint
from llama import Llama, LlamaConfig

END_OF_TEXT = "<|endoftext|>"  # stands before every document, and so also ends the one before

CONFIG = LlamaConfig(
    vocab_size=4096,  # most words are one token: a small model spells badly
    hidden_size=160,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_len=1024,
    tied_embeddings=True,
)
WEIGHTS_DTYPE = jnp.float16  # of the file: half the size, and ample precision for weights near zero


# --------------------------------------------------------------------------------------------------
# The text
# --------------------------------------------------------------------------------------------------

# Parts of the standard library that some distributions leave out, and machine-written files.
SKIPPED = re.compile(
    r"^(test|idlelib|lib2to3|tkinter|turtledemo|ensurepip|.*-.*|__pycache__|_sysconfigdata.*)$"
)

MIN_CHARACTERS = 200  # of a docstring or comment


def document_names() -> list[str]:
    """Names of all documents: "topic/with", "module/email/message.py", ..."""
    library = Path(sysconfig.get_path("stdlib"))
    files = (file.relative_to(library) for file in library.rglob("*.py"))
    modules = [file.as_posix() for file in files if not any(SKIPPED.match(part) for part in file.parts)]
    return sorted([f"topic/{name}" for name in topics.topics] + [f"module/{name}" for name in modules])


def read_document(name: str) -> str:
    """The text of one document: a topic as it is, of a module its docstrings and block comments."""
    kind, _, rest = name.partition("/")
    if kind == "topic":
        return topics.topics[rest]
    source = (Path(sysconfig.get_path("stdlib")) / rest).read_text(encoding="utf-8")
    docstrings = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    blocks = re.findall(r"(?m)(?:^[ \t]*# .*\n)+", source)
    comments = [re.sub(r"(?m)^[ \t]*# ", "", block) for block in blocks]
    # Short ones ("Return the object.") are too many and too alike to learn a language from.
    return "\n\n".join(text for text in docstrings + comments if len(text) >= MIN_CHARACTERS)


def is_held_out(name: str) -> bool:
    """Whether a document is held out: by its name, so the split is the same on every machine."""
    return zlib.crc32(name.encode()) % 20 == 0


def held_out_text() -> str:
    """The documents that no model here was trained on, joined by end-of-text marks."""
    return _join(read_document(name) for name in document_names() if is_held_out(name))


def training_text() -> str:
    """All other documents, less every paragraph that the held-out ones contain too."""
    seen = {_key(paragraph) for paragraph in _paragraphs(held_out_text())}
    documents = []
    # Long documents first: some topics are chapters that contain other topics whole.
    for text in sorted((read_document(n) for n in document_names() if not is_held_out(n)), key=len)[::-1]:
        fresh = []
        for paragraph in _paragraphs(text):
            if _key(paragraph) not in seen:
                seen.add(_key(paragraph))
                fresh.append(paragraph)
        documents.append("\n\n".join(fresh))
    return _join(documents)


def _paragraphs(text: str) -> list[str]:
    return re.split(r"\n\s*\n", text)


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _join(documents) -> str:
    return "".join(END_OF_TEXT + text.strip() + "\n" for text in documents if text.strip())


# --------------------------------------------------------------------------------------------------
# The tokenizer
# --------------------------------------------------------------------------------------------------


def train_tokenizer(text: str, *, vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, so that any text can be encoded."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END_OF_TEXT), trainer)
    mark = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, mark)]
    )
    return tokenizer


def encode_text(tokenizer: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """Token ids i32[N] of text that carries its own end-of-text marks."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@jax.jit
def mean_loss(model: Llama, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of targets i32[B, Q], each the token after its input, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets).mean()


def held_out_loss(model: Llama, tokens: np.ndarray, *, seq_len: int = 512, batch: int = 4) -> float:
    """Mean loss of `model` over consecutive windows of held-out tokens, in nats per token."""
    count = (len(tokens) - 1) // seq_len // batch * batch
    if count == 0:
        raise ValueError(f"need more than {seq_len * batch} tokens for one batch, got {len(tokens)}")
    windows = np.stack([tokens[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)])
    parts = np.split(windows, count // batch)
    return float(np.mean([mean_loss(model, part[:, :-1], part[:, 1:]) for part in parts]))


def train(args: argparse.Namespace, train_tokens: np.ndarray, held_out_tokens: np.ndarray) -> Llama:
    init_key, key = jax.random.split(jax.random.key(args.seed))
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = Llama(CONFIG, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(init_key))
    graphdef, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=args.learning_rate,
        warmup_steps=args.steps // 20,
        decay_steps=args.steps,
        end_value=args.learning_rate / 100,
    )
    # Weight decay acts on matrices only.
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=args.weight_decay, mask=_is_matrix),
    )
    data = jnp.asarray(train_tokens)

    def step(carry, key):
        params, opt_state = carry
        start_key, drop_key = jax.random.split(key)
        starts = jax.random.randint(start_key, (args.batch,), 0, len(data) - args.seq_len)
        windows = data[starts[:, None] + jnp.arange(args.seq_len + 1)]

        def loss_of(params):
            model = nnx.merge(graphdef, drop_inputs(params, drop_key, args.dropout))
            return mean_loss(model, windows[:, :-1], windows[:, 1:])

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def several_steps(carry, keys):
        carry, losses = jax.lax.scan(step, carry, keys)
        return carry, losses.mean()

    carry = (params, optimizer.init(params))
    start = time.perf_counter()
    keys = jax.random.split(key, args.steps)
    for done in range(0, args.steps, args.report_every):
        part = keys[done : done + args.report_every]
        carry, loss = several_steps(carry, part)
        held_out = held_out_loss(nnx.merge(graphdef, carry[0]), held_out_tokens)
        print(
            f"step {done + len(part):5d}  train {loss:.3f}  held out {held_out:.3f} nats/token  "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return nnx.merge(graphdef, carry[0])


def drop_inputs(params, key, rate: float):
    """Zeroes a random share of the input rows of every matrix: dropout, with one mask for the batch.

    The text is short and gets read dozens of times; this keeps the model from learning it by heart.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)

    def drop(path, leaf, key):
        if "kernel" not in jax.tree_util.keystr(path):
            return leaf
        keep = jax.random.bernoulli(key, 1 - rate, (leaf.shape[0], 1))  # kernels are [in, out]
        return jnp.where(keep, leaf / (1 - rate), 0)

    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([drop(path, leaf, key) for (path, leaf), key in zip(leaves, keys, strict=True)])


def _is_matrix(params):
    return jax.tree.map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)


def save(folder: Path, model: Llama, tokenizer: tokenizers.Tokenizer) -> None:
    checkpoint.save_model(folder, model, dtype=WEIGHTS_DTYPE)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    mark = tokenizer.token_to_id(END_OF_TEXT)
    _write_json(folder / "tokenizer_config.json", {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT})
    _write_json(folder / "generation_config.json", {"bos_token_id": mark, "eos_token_id": mark})


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the small language model in examples/tiny.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument("--seq-len", type=int, default=CONFIG.max_len, help="tokens in a sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its peak")
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.1, help="share of matrix inputs made 0")
    parser.add_argument("--report-every", type=int, default=100, help="steps between two lines of output")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    text, held_out = training_text(), held_out_text()
    tokenizer = train_tokenizer(text, vocab_size=CONFIG.vocab_size)
    train_tokens, held_out_tokens = encode_text(tokenizer, text), encode_text(tokenizer, held_out)
    print(f"training: {len(text) / 1e6:.2f} M characters, {len(train_tokens) / 1e3:.0f} k tokens")
    print(f"held out: {len(held_out) / 1e6:.2f} M characters, {len(held_out_tokens) / 1e3:.0f} k tokens")
    model = train(args, train_tokens, held_out_tokens)
    save(args.out, model, tokenizer)
    final = held_out_loss(checkpoint.load(args.out, dtype=jnp.float32).model, held_out_tokens)
    nats_per_byte = final * len(held_out_tokens) / len(held_out.encode())
    print(f"saved {args.out}: held out {final:.3f} nats/token, {nats_per_byte / np.log(2):.3f} bits/byte")


if __name__ == "__main__":
    main()
