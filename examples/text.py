"""From text to tokens and back: tokenizer, chat template and stop tokens of a checkpoint folder."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from folder import read_json, whole

# --------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer of a folder, None if it has no tokenizer.json. It neither cuts nor pads what it encodes."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(whole(file)))
    except (OSError, ValueError):
        raise
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"{file}: not a tokenizer that can be read: {error}") from error
    tokenizer.no_truncation()  # files are often saved with the settings of a training run
    tokenizer.no_padding()
    return tokenizer


def stop_tokens(folder: Path, hf_config: dict[str, Any]) -> tuple[int, ...]:
    """Tokens that end a text: those of generation_config.json, else of config.json."""
    # generation_config.json knows the end of a turn as well as the end of a text.
    file = folder / "generation_config.json"
    tokens = read_json(file).get("eos_token_id") if file.exists() else None
    if tokens is None:
        tokens = hf_config.get("eos_token_id")
    tokens = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    if not all(isinstance(token, int) for token in tokens):
        raise ValueError(f"{folder}: eos_token_id must hold token ids, got {tokens!r}")
    return tuple(tokens)


class TextStream:
    """The text of tokens that follow a prompt, in pieces, as the tokens come.

    A token is not a text. A character may take several tokens, and some decoders drop the space before the first word
    that they see. So new tokens are decoded together with those before them, and what a later token may yet change is
    held back. Joined, the pieces are the text of prompt and tokens less the text of the prompt.

    Args:
      tokenizer: decodes; special tokens are left out.
      prompt: token ids before the first that is pushed.

    Example:
      >>> from pathlib import Path
      >>> tokenizer = read_tokenizer(Path(__file__).parent / "tiny")
      >>> tokens = tokenizer.encode("né").ids[1:]
      >>> stream = TextStream(tokenizer, prompt=[])
      >>> [stream.push([token]) for token in tokens]
      ['n', '', 'é']
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token for token, entry in added.items() if entry.special}
        self._tokens = self._visible(
            prompt
        )  # those that decide how the next are decoded, then those held back
        self._num_given = len(self._tokens)  # of them, those whose text is given out in full
        self._given = tokenizer.decode(self._tokens)  # the part of their text that is given out

    def push(self, tokens: Iterable[int], *, last: bool = False) -> str:
        """The text that these tokens add. The last push gives out what is left, an incomplete character too."""
        self._tokens += self._visible(tokens)
        text = self._tokenizer.decode(self._tokens)
        settled = text if last else self._settled(text)
        piece = settled[len(self._given) :]
        self._given += piece
        if settled == text and self._num_given < len(self._tokens):
            self._tokens = self._tokens[self._num_given :]
            self._num_given = len(self._tokens)
            self._given = self._tokenizer.decode(self._tokens)
        return piece

    def _visible(self, tokens: Iterable[int]) -> list[int]:
        return [int(token) for token in tokens if int(token) not in self._special]

    def _settled(self, text: str) -> str:
        """The part of the tokens' text that no later token changes."""
        if self._tokens and re.fullmatch("<0x..>", self._tokenizer.id_to_token(self._tokens[-1]) or ""):
            return self._given  # a run of single bytes is decoded as a whole
        return text.rstrip("\N{REPLACEMENT CHARACTER}")  # the mark of an incomplete character


# --------------------------------------------------------------------------------------------------
# Chat
# --------------------------------------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what the model wrote, for training; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def render_chat(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """Renders a Hugging Face chat template, ending where the assistant's answer begins.

    Templates find what `apply_chat_template` of `transformers` gives them, with neither tools nor documents.

    Raises:
      ValueError: the template is wrong, or refuses the messages.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja2's own would escape for HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"chat template: {getattr(error, 'message', None) or error}") from error


def read_chat_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """A folder's chat template, None if there is none, and the special tokens that it may name."""
    file, map_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    config = read_json(file) if file.exists() else {}
    tokens = dict(config)
    if map_file.exists():
        in_map = read_json(map_file)
        # The older file counts for what the newer one does not name; before it listed all tokens, the older one led.
        tokens = in_map | tokens if "added_tokens_decoder" in config else tokens | in_map
    if isinstance(own := config.get("extra_special_tokens"), dict):  # names that only this model has
        tokens |= own
    special = {}
    for name, token in tokens.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            special[name] = content

    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        return whole(own_file).read_text(encoding="utf-8"), special
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones, as [{"name": ..., "template": ...}]
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template, special
