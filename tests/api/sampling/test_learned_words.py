"""Learned words in one sampler: owners who chose the same word never see each other's."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lookalike_api.sampling.messages import AdapterFile
from lookalike_api.sampling.models import Dressed, ResidentBase
from lookalike_api.sampling.prompts import Subject, bind
from lookalike_platform.files import sha256_file
from lookalike_registry.tensor_file import save_tensors
from lookalike_trainers.methods.textual_inversion import rows as row_adapter
from support_models import RESOLUTION, WIDTH
from support_sampling import LIBRARY_WARNINGS, Orders, engine_of

pytestmark = LIBRARY_WARNINGS

VECTORS = 2


@pytest.fixture
def base(base_folder: Path) -> Orders:
    return engine_of(base_folder)


def rows(seed: int) -> torch.Tensor:
    return torch.randn((VECTORS, WIDTH), generator=torch.Generator().manual_seed(seed))


def learned(folder: Path, owner: str, seed: int) -> AdapterFile:
    """What `owner` trained for the trigger "sks", under the private word of its version."""
    path = folder / f"{owner}.safetensors"
    save_tensors(
        path, "textual_inversion", {"tokens.text_encoder": rows(seed)}, {"initializer": "toy"}, {}
    )
    return AdapterFile(f"{owner}@1", sha256_file(path), path, 1.0, f"adv_{owner}")


def said(adapter: AdapterFile, prompt: str) -> str:
    """The prompt as it is admitted with this adapter."""
    bound, _ = bind(prompt, [Subject("toy", "sks", "toy", word=adapter.word, phrase="{trigger}")])
    return bound


def painted(base: Orders, prompt: str, *adapters: AdapterFile) -> Any:
    asked: dict[str, Any] = {"guidance_scale": 3.0, "seed": 7, "adapters": adapters}
    (picture,) = base.paint(prompt=prompt, **asked)
    return picture.astype(int)


def diffusers_paints(base_folder: Path, seed: int) -> Any:
    """ "a sks", with the rows loaded as diffusers' own Textual Inversion."""
    pipeline = StableDiffusionPipeline.from_pretrained(base_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion({"<sks>": rows(seed)}, token="<sks>")
    made = pipeline(
        "a <sks>",
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
    )
    return numpy.asarray(made.images[0], dtype=int)


def test_two_owners_of_one_word_each_get_their_own_picture(
    base: Orders, base_folder: Path, tmp_path: Path
) -> None:
    ann, bob = learned(tmp_path, "ann", 1), learned(tmp_path, "bob", 2)
    alone = painted(base, said(ann, "a sks"), ann)
    assert abs(alone - diffusers_paints(base_folder, 1)).max() <= 1
    assert abs(painted(base, said(bob, "a sks"), bob) - diffusers_paints(base_folder, 2)).max() <= 1
    # One request with both.
    assert numpy.array_equal(painted(base, said(ann, "a <toy>"), bob, ann), alone)


def test_a_word_that_is_not_worn_means_nothing(base: Orders, tmp_path: Path) -> None:
    ann = learned(tmp_path, "ann", 1)
    plain, unknown = painted(base, "a sks"), painted(base, "a adv_ann")
    assert not numpy.array_equal(painted(base, "a adv_ann", ann), unknown)
    assert numpy.array_equal(painted(base, "a sks", ann), plain)
    assert numpy.array_equal(painted(base, "a sks"), plain)
    assert numpy.array_equal(painted(base, "a adv_ann"), unknown)


def test_words_worn_one_after_the_other_take_up_one_place_in_the_vocabulary(
    base_folder: Path, tmp_path: Path
) -> None:
    resident = ResidentBase(base_folder, "cpu", "base")
    (tokenizer,) = resident.tokenizers
    known = len(tokenizer)
    for seed, owner in enumerate(("ann", "bob", "eve")):
        file = learned(tmp_path, owner, seed)
        resident.read(f"a adv_{owner}", [Dressed(row_adapter(resident, file.path), file)])
    assert len(tokenizer) == known + VECTORS


def test_a_long_word_is_counted_as_the_tokens_it_stands_for(
    base_folder: Path, tmp_path: Path
) -> None:
    resident = ResidentBase(base_folder, "cpu", "base")
    ann = learned(tmp_path, "ann", 1)
    dressed = Dressed(row_adapter(resident, ann.path), ann)
    before = resident.read("a", []).tokens
    assert resident.read("a adv_ann", [dressed]).tokens == before + VECTORS
