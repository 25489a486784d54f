"""Learned words in one sampler: owners who chose the same word never see each other's."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lookalike_api.sampling.engine import Scene, paint
from lookalike_api.sampling.messages import AdapterFile
from lookalike_api.sampling.models import ResidentBase
from lookalike_api.sampling.prompts import Subject, bind
from lookalike_platform.files import sha256_file
from lookalike_registry.tensor_file import save_tensors
from support_models import RESOLUTION, WIDTH
from support_sampling import LIBRARY_WARNINGS

pytestmark = LIBRARY_WARNINGS

VECTORS = 2


@pytest.fixture
def base(base_folder: Path) -> ResidentBase:
    return ResidentBase(base_folder, "cpu")


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


def painted(base: ResidentBase, prompt: str) -> Any:
    scene = Scene(
        text=base.embed(prompt),
        blank=base.embed_negative(""),
        guidance_scale=3.0,
        steps=4,
        sampler="ddim",
        seed=7,
        width=RESOLUTION,
        height=RESOLUTION,
        num_images=1,
    )
    (picture,) = paint(base, scene, lambda step, total: None)
    return numpy.asarray(picture, dtype=int)


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
    base: ResidentBase, base_folder: Path, tmp_path: Path
) -> None:
    ann, bob = learned(tmp_path, "ann", 1), learned(tmp_path, "bob", 2)
    base.wear([ann])
    alone = painted(base, said(ann, "a sks"))
    assert abs(alone - diffusers_paints(base_folder, 1)).max() <= 1
    base.wear([bob])
    assert abs(painted(base, said(bob, "a sks")) - diffusers_paints(base_folder, 2)).max() <= 1
    base.wear([bob, ann])  # one request, or a batch, with both
    assert numpy.array_equal(painted(base, said(ann, "a <toy>")), alone)


def test_a_word_that_is_not_worn_means_nothing(base: ResidentBase, tmp_path: Path) -> None:
    plain, unknown = painted(base, "a sks"), painted(base, "a adv_ann")
    base.wear([learned(tmp_path, "ann", 1)])
    assert not numpy.array_equal(painted(base, "a adv_ann"), unknown)
    assert numpy.array_equal(painted(base, "a sks"), plain)
    base.wear([])
    assert numpy.array_equal(painted(base, "a sks"), plain)
    assert numpy.array_equal(painted(base, "a adv_ann"), unknown)


def test_a_long_word_is_counted_as_the_tokens_it_stands_for(
    base: ResidentBase, tmp_path: Path
) -> None:
    before = base.tokens("a")
    base.wear([learned(tmp_path, "ann", 1)])
    assert base.tokens("a adv_ann") == before + VECTORS
