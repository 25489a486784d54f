"""The word a subject answers to, from the vocabulary of its base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from lookalike_platform.bases import resolve
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.settings import Settings
from lookalike_trainers.rare_tokens import pieces, rare_words
from support_models import save_base


@pytest.fixture(scope="module")
def pocket() -> Path:
    return resolve("pocket-64", Settings()).folder


def test_each_is_one_token_of_the_base_s_own_tokenizer(pocket: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(pocket / "tokenizer")
    words = rare_words(pocket)
    assert words
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words)
    assert all(2 <= len(word) <= 4 and word.isalpha() and word.islower() for word in words)


def test_words_are_cut_as_the_tokenizer_cuts_them(pocket: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(pocket / "tokenizer")
    merges = json.loads((pocket / "tokenizer" / "tokenizer.json").read_text())["model"]["merges"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    for word in ("background", "robot", "sks", "lt", "teapots", "zzz", "a"):
        assert pieces(word, ranks) == tokenizer.tokenize(word)


def test_the_rarest_have_rows_that_training_hardly_moved(pocket: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(pocket / "tokenizer")
    (file,) = (pocket / "text_encoder").glob("*.safetensors")
    table = next(t for key, t in load_file(file).items() if key.endswith("token_embedding.weight"))
    lengths = [
        float(table[i].norm())
        for i in tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in rare_words(pocket)])
    ]
    assert lengths == sorted(lengths)
    assert lengths[0] < float(table.norm(dim=1).median())


def test_older_files_and_half_precision_give_the_same_words(pocket: Path, tmp_path: Path) -> None:
    model = json.loads((pocket / "tokenizer" / "tokenizer.json").read_text())["model"]
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        folder = tmp_path / str(number)
        shutil.copytree(pocket / "text_encoder", folder / "text_encoder")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
        (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n")
        (file,) = (folder / "text_encoder").glob("*.safetensors")
        save_file({key: t.to(dtype) for key, t in load_file(file).items()}, file)
        words = rare_words(folder)
        assert set(words) == set(rare_words(pocket))
        if dtype == torch.float32:
            assert words == rare_words(pocket)


def test_a_vocabulary_of_letters_has_a_letter_and_one_without_asks_for_a_trigger(
    tmp_path: Path,
) -> None:
    base = save_base(tmp_path / "base")
    assert len(rare_words(base)[0]) == 1
    none = tmp_path / "none"
    shutil.copytree(base / "text_encoder", none / "text_encoder")
    (none / "tokenizer").mkdir()
    (none / "tokenizer" / "vocab.json").write_text('{"dog</w>": 0}')
    (none / "tokenizer" / "merges.txt").write_text("")
    with pytest.raises(InvalidRequest, match="give a trigger"):
        rare_words(none)
