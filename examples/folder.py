"""The files of a checkpoint folder: what must be there, and one clear line about what is there instead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NEEDED = "config.json, model.safetensors (or shards with model.safetensors.index.json) and, for text, tokenizer.json"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.npz")
LFS_POINTER = b"version https://git-lfs"


def check_folder(folder: Path) -> None:
    """Raises if this is no folder with a whole model in a format that is read.

    Raises:
      FileNotFoundError, NotADirectoryError, ValueError: says what is there and what is needed.
    """
    if not folder.exists():
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            hint = f"; a model of the Hugging Face Hub is fetched first: hf download {folder} --local-dir DIR"
        raise FileNotFoundError(f"{folder}: no such folder{hint}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a file; needed is the folder of a model, with {NEEDED}")
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        raise FileNotFoundError(f"{folder}: an empty folder; needed are {NEEDED}")
    if "adapter_config.json" in names:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path", "its base model")
        raise ValueError(
            f"{folder}: adapter_config.json says that this is an adapter (LoRA) of {base}; merge the two "
            "(in PEFT: merge_and_unload, then save_pretrained) and use the folder of the result"
        )
    if "config.json" not in names:
        raise FileNotFoundError(f"{folder}: no config.json, only {listed(names)}; needed are {NEEDED}")
    if not {"model.safetensors", "model.safetensors.index.json"} & set(names):
        others = sorted(file.name for form in OTHER_WEIGHTS for file in folder.glob(form))
        hint = ""
        if others:
            hint = (
                f": the weights are in {listed(others)}, which is not read; save them as safetensors "
                "(in transformers: from_pretrained, then save_pretrained)"
            )
        raise FileNotFoundError(
            f"{folder}: neither model.safetensors nor model.safetensors.index.json"
            + (hint or f", only {listed(names)}")
        )


def whole(file: Path) -> Path:
    """The file itself, if it is there with its contents."""
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent}: no {file.name}")
    with file.open("rb") as opened:
        start = opened.read(len(LFS_POINTER))
    if not start:
        raise ValueError(f"{file}: an empty file")
    if start == LFS_POINTER:
        raise ValueError(f"{file}: a git-lfs pointer in place of the file; run `git lfs pull` in its folder")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        contents = json.loads(whole(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file}: must hold an object, got {type(contents).__name__}")
    return contents


def listed(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
