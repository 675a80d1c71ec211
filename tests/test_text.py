"""Text of the examples: tokens and back, in one piece or streamed, chat templates, stop tokens; and generate.py."""

from __future__ import annotations

import ast
import doctest
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import checkpoint
import generate
import text

DATA = Path(__file__).parent / "data"
TINY = Path(__file__).parent.parent / "examples" / "tiny"

# --------------------------------------------------------------------------------------------------
# Streams
# --------------------------------------------------------------------------------------------------

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level() -> tokenizers.Tokenizer:
    """Pieces are bytes and runs of them, as in GPT-2, Llama 3 and Qwen."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the dog and the 日本 the dog"] * 3, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """Pieces are words, and bytes where there is none, as in Llama 2 and Mistral."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS, "▁t", "▁th"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("▁t", "h")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    """Pieces begin with the space before them, which the first of a text loses, as in T5."""
    scores = [(piece, 0.0) for piece in SPECIAL] + [("▁", -3.0), ("▁the", -2.0)]
    scores += [(letter, -4.0) for letter in LETTERS + "日本é,.?'"]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """Pieces inside a word are marked, as in BERT; decoding puts spaces and takes them from before points."""
    pieces = [*SPECIAL, "the", "dog", *",.?'", *LETTERS, *"日本", *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZERS = [byte_level, byte_fallback, unigram, word_piece]
TEXTS = ["日本語 á", "a 😀é👩‍👩‍👧", "  the  dog ", "don't, the dog?", "</s> the <s>x", "�", ""]


def streamed(tokenizer: tokenizers.Tokenizer, prompt: list[int], tokens: list[int], size: int) -> list[str]:
    stream = text.TextStream(tokenizer, prompt)
    pieces = [stream.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
    return [*pieces, stream.push([], last=True)]


def expected(tokenizer: tokenizers.Tokenizer, prompt: list[int], tokens: list[int]) -> str:
    before = tokenizer.decode(prompt)
    together = tokenizer.decode(prompt + tokens)
    assert together.startswith(before)
    return together[len(before) :]


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["the dog", ""])
def test_pieces_join_to_the_text(make, prompt):
    tokenizer = make()
    before = tokenizer.encode(prompt).ids
    for written in TEXTS:
        tokens = tokenizer.encode(written).ids
        for size in (1, 2, 3, 100):
            pieces = streamed(tokenizer, before, tokens, size)
            assert "".join(pieces) == expected(tokenizer, before, tokens), (written, pieces)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_pieces_of_any_tokens_join_to_the_text(make):
    """Of bytes that are no characters and special tokens anywhere, too."""
    tokenizer, rng = make(), np.random.default_rng(0)
    before = tokenizer.encode("the dog").ids
    for _ in range(300):
        most = rng.choice([6, 262, tokenizer.get_vocab_size()])
        tokens = rng.integers(0, min(most, tokenizer.get_vocab_size()), rng.integers(0, 12)).tolist()
        tokens[len(tokens) // 2 : len(tokens) // 2] = tokenizer.encode(rng.choice(TEXTS)).ids
        pieces = streamed(tokenizer, before, tokens, int(rng.integers(1, 5)))
        assert "".join(pieces) == expected(tokenizer, before, tokens), (tokens, pieces)


def test_pieces_come_as_soon_as_characters_are_whole():
    tokenizer = byte_level()
    tokens = tokenizer.encode("語é the").ids
    assert streamed(tokenizer, [], tokens, 1) == ["", "", "語", "", "é", " the", ""]
    assert streamed(tokenizer, [], tokens[:-2], 4) == ["語", "\N{REPLACEMENT CHARACTER}"]


def test_the_space_after_a_prompt_is_kept(tmp_path):
    """Also of a text that comes in one piece."""
    loaded = checkpoint.load(text_folder(tmp_path / "model", tokenizer__json=unigram().to_str()))
    prompt = loaded.encode("the dog")
    tokens = loaded.encode("barks")
    assert loaded.decode(tokens) == "barks"
    assert loaded.decode(tokens, prompt=prompt) == " barks"
    assert loaded.text_stream(prompt).push(tokens[:2]) == " b"


def test_documented_examples_run():
    assert doctest.testmod(text).attempted > 0
    assert doctest.testmod(text).failed == 0


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


CONTEXT = {"messages": [{"role": "user", "content": "é"}], "special": {"bos_token": "<s>"}}


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{% generation %}\n{{ messages[0].content }}\n{% endgeneration %}\n.", "é\n."),
        ("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}", "user"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ tools is none }} {{ tools is defined }} {{ documents is none }}", "True True True"),
        ("{{ add_generation_prompt }} {{ bos_token }} [{{ eos_token }}]", "True <s> []"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "é"}]'),
        ("{{ messages | tojson(ensure_ascii=True) }}", '[{"role": "user", "content": "\\u00e9"}]'),
        ("{{ messages[0] | tojson(indent=2) }}", '{\n  "role": "user",\n  "content": "é"\n}'),
        (
            "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=True) }}",
            '{"content":"é","role":"user"}',
        ),
        ("{{ '<b>&' | tojson }}", '"<b>&"'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }} {{ dict(a=1)['a'] }}", "2 1"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
    ],
)
def test_templates_find_what_transformers_gives_them(template, rendered):
    """The results are those of `apply_chat_template` of transformers 5.24."""
    assert text.render_chat(template, CONTEXT["messages"], CONTEXT["special"]) == rendered


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only users') }}", "^chat template: only users$"),
        ("{% unheard %}", "^chat template: Encountered unknown tag 'unheard'"),
        ("{{ messages[0].content.missing.more }}", "^chat template: .*no attribute 'missing'"),
        ("{{ messages.append(1) }}", "^chat template: "),  # templates change nothing
        ("{{ 1 + 'a' }}", "^chat template: unsupported operand"),
    ],
)
def test_what_is_wrong_with_a_template_is_said_in_a_line(template, message):
    with pytest.raises(ValueError, match=message) as caught:
        text.render_chat(template, CONTEXT["messages"], CONTEXT["special"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "in_map", "found"),
    [
        ({}, {"bos_token": "<s>"}, {"bos_token": "<s>"}),
        ({}, {"bos_token": {"content": "<s>", "lstrip": False}}, {"bos_token": "<s>"}),
        ({"added_tokens_decoder": {}}, {"bos_token": "<s>"}, {"bos_token": "<s>"}),
        ({"bos_token": "<a>"}, {"bos_token": "<b>"}, {"bos_token": "<b>"}),
        ({"bos_token": "<a>", "added_tokens_decoder": {}}, {"bos_token": "<b>"}, {"bos_token": "<a>"}),
        ({"bos_token": None, "added_tokens_decoder": {}}, {"bos_token": "<b>"}, {}),
        ({"add_bos_token": True, "image_token": "<i>"}, {}, {"image_token": "<i>"}),
        ({"extra_special_tokens": {"tool_token": "<t>"}}, {}, {"tool_token": "<t>"}),
    ],
)
def test_special_tokens_come_from_either_file(config, in_map, found, tmp_path):
    """Which file leads is as in transformers: the map, unless tokenizer_config.json lists the added tokens."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(in_map))
    assert text.read_chat_template(tmp_path) == (None, found)


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


@pytest.mark.parametrize("eos", ["</s>", [1, "2"]])
def test_stop_tokens_are_ids(eos, tmp_path):
    folder = text_folder(tmp_path / "a", generation_config__json={"eos_token_id": eos})
    with pytest.raises(ValueError, match="eos_token_id must hold token ids"):
        checkpoint.load(folder)


def test_saved_truncation_and_padding_are_off(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    long = "The import statement " * 30
    plain = [tokenizer.encode(prompt).ids for prompt in (long, "Classes")]
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=64)
    assert [len(tokenizer.encode(prompt)) for prompt in (long, "Classes")] == [64, 64]
    loaded = checkpoint.load(text_folder(tmp_path / "a", tokenizer__json=tokenizer.to_str()))
    assert [loaded.encode(prompt) for prompt in (long, "Classes")] == plain
    assert len(plain[0]) > 64


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_tokens(["<new>"])
    loaded = checkpoint.load(text_folder(tmp_path / "a", tokenizer__json=tokenizer.to_str()))
    with pytest.raises(ValueError, match="token 4096, but the model knows 4096 tokens"):
        loaded.encode("a <new> one")


# --------------------------------------------------------------------------------------------------
# generate.py
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-new-tokens 0", "--max-new-tokens: must be at least 1, got 0"),
        ("--rows 0", "--rows: must be at least 1, got 0"),
        ("--page-size -4", "--page-size: must be at least 1, got -4"),
        ("--num-pages x", "--num-pages: invalid int value: 'x'"),
        ("--temperature nan", "--temperature: must be at least 0, got nan"),
        ("--top-p 0", "--top-p: must be above 0 and at most 1, got 0"),
        ("--min-p 2", "--min-p: must be at least 0 and at most 1, got 2"),
        ("--repetition-penalty 0", "--repetition-penalty: must be above 0, got 0"),
        ("--check --temperature 1", "--check compares greedy tokens"),
        ("--max-len 10", r"prompt of \d+ tokens \+ --max-new-tokens 96 pass --max-len 10"),
        ("--chat", "no .*chat template"),
        ("--model some/model", "no such folder; .* hf download some/model"),
        (f"--model {DATA / 'qwen2'}", r"no tokenizer\.json"),
    ],
)
def test_wrong_arguments_end_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        generate.main(arguments.split())
    line = (
        caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    )
    assert re.search(message, line) and "\n" not in line


def test_a_prompt_without_tokens_is_refused(tmp_path):
    folder = text_folder(tmp_path / "a", tokenizer__json=byte_level().to_str())
    with pytest.raises(SystemExit, match="prompt '' has no tokens"):
        generate.main(["--model", str(folder), "--prompt", "", "--no-check"])


def test_streamed_output_is_the_whole_output(capsys):
    arguments = ["--prompt", "日本語 á", "--prompt", "If the", "--max-new-tokens", "24", "--page-size", "8"]
    generate.main(arguments)
    whole = capsys.readouterr().out
    generate.main([*arguments, "--stream", "--no-check"])
    lines = re.findall(r"^\[(\d): .*?\] ('.*'|\".*\")$", capsys.readouterr().out, re.MULTILINE)
    assert len(lines) > 2
    for prompt, written in enumerate(arguments[1:4:2]):
        pieces = [ast.literal_eval(piece) for number, piece in lines if int(number) == prompt]
        assert f"\n> {written}|{''.join(pieces)}\n" in whole
    assert "check  greedy tokens of all 2 prompts equal" in whole
