"""Starting from a picture, against diffusers' image-to-image and inpainting pipelines."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy
import pytest
import torch
from PIL import Image

from lookalike_api.sampling.fitting import fitted
from lookalike_api.sampling.messages import AdapterFile, SampleOrder
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.samplers import SAMPLERS, make_sampler
from support_images import picture
from support_models import save_base
from support_sampling import LIBRARY_WARNINGS, Orders, engine_of, save_adapter

pytestmark = LIBRARY_WARNINGS

PROMPT, NEGATIVE = "a dog", "blue"
PHOTO = picture(3, (64, 64))
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 24, 48, 64))

# All but PNDM's late start: see `test_pndm_begun_late_takes_its_first_step_twice`.
CASES = [(name, 1.0) for name in SAMPLERS] + [(name, 0.5) for name in SAMPLERS if name != "pndm"]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base that predicts epsilon, and one that predicts v."""
    return save_base(tmp_path_factory.mktemp("base"), request.param)


@pytest.fixture(scope="module")
def base(folder: Path) -> Orders:
    return engine_of(folder)


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterFile:
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    return AdapterFile("rex@1", save_adapter(path, folder, seed=3), path, 0.8)


def ours(
    base: Orders,
    sampler: str,
    strength: float,
    *,
    mask: Image.Image | None = None,
    steps: int = 6,
    **wanted: Any,
) -> Any:
    return numpy.stack(base.paint(**order(base, sampler, strength, mask, steps), **wanted)).astype(
        int
    )


def order(
    base: Orders, sampler: str, strength: float, mask: Image.Image | None, steps: int = 6
) -> dict[str, Any]:
    PHOTO.save(base.folder / "photo.png")
    MASK.save(base.folder / "mask.png")
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "sampler": sampler,
        "steps": steps,
        "strength": strength,
        "init_image": base.folder / "photo.png",
        "mask_image": base.folder / "mask.png" if mask else None,
    }


def theirs(
    folder: Path,
    sampler: str,
    strength: float,
    *,
    mask: Image.Image | None = None,
    steps: int = 6,
    num_images: int = 1,
    adapters: tuple[AdapterFile, ...] = (),
) -> Any:
    pipeline = loaded(folder, "Inpainting" if mask else "Image2Image")
    schedule = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    pipeline.scheduler = make_sampler(sampler, schedule)
    for adapter in adapters:
        pipeline.load_lora_weights(adapter.path.parent, weight_name=adapter.path.name)
        pipeline.set_adapters(["default_0"], [adapter.scale])
    inpainting: dict[str, Any] = {}
    if mask:
        # Given, so that the pipeline does not encode what its UNet of four channels never sees:
        # that would take a draw from the generator.
        nothing = torch.zeros(1, 4, 16, 16)
        inpainting = {
            "mask_image": mask,
            "masked_image_latents": nothing,
            "height": 64,
            "width": 64,
        }
    made = pipeline(
        PROMPT,
        image=PHOTO,
        negative_prompt=NEGATIVE,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=4.0,
        num_images_per_prompt=num_images,
        generator=[torch.Generator().manual_seed(5 + i) for i in range(num_images)],
        **inpainting,
    )
    pipeline.unload_lora_weights()
    return numpy.stack([numpy.asarray(image, dtype=int) for image in made.images])


@cache
def loaded(folder: Path, purpose: str) -> Any:
    pipeline = getattr(diffusers, f"AutoPipelineFor{purpose}").from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_alike(some: Any, others: Any) -> None:
    """To the last of 255 levels: sums in another order may round either way."""
    assert numpy.abs(some - others).max() <= 1


@pytest.mark.parametrize(("sampler", "strength"), CASES)
def test_image_to_image_is_that_of_diffusers(
    base: Orders, folder: Path, sampler: str, strength: float
) -> None:
    found = ours(base, sampler, strength, num_images=2)
    assert_alike(found, theirs(folder, sampler, strength, num_images=2))
    assert numpy.abs(found[0] - found[1]).max() > 1


@pytest.mark.parametrize(("sampler", "strength"), CASES)
def test_inpainting_is_that_of_diffusers(
    base: Orders, folder: Path, sampler: str, strength: float
) -> None:
    assert_alike(
        ours(base, sampler, strength, mask=MASK), theirs(folder, sampler, strength, mask=MASK)
    )


def test_pndm_begun_late_takes_its_first_step_twice(base: Orders, folder: Path) -> None:
    """As from noise. diffusers' list of timesteps, cut off, does that only for the whole way: its
    samples are one step less noisy than the timesteps it tells the denoiser. Where it leads is in
    `test_every_sampler_arrives_where_the_denoiser_points`."""
    assert numpy.abs(ours(base, "pndm", 0.5) - theirs(folder, "pndm", 0.5)).max() > 1


@pytest.mark.parametrize("mask", [None, MASK])
def test_adapters_act_on_pictures_too(
    base: Orders, folder: Path, lora: AdapterFile, mask: Image.Image | None
) -> None:
    worn = ours(base, "ddim", 0.7, mask=mask, adapters=(lora,))
    assert_alike(worn, theirs(folder, "ddim", 0.7, mask=mask, adapters=(lora,)))
    assert numpy.abs(worn - ours(base, "ddim", 0.7, mask=mask)).max() > 1


@pytest.mark.parametrize("mask", [None, MASK])
def test_sdxl_starts_from_pictures_as_in_diffusers(
    tmp_path: Path, mask: Image.Image | None
) -> None:
    folder = save_base(tmp_path, "sdxl")
    base = engine_of(folder)
    assert_alike(ours(base, "euler", 0.5, mask=mask), theirs(folder, "euler", 0.5, mask=mask))


@pytest.mark.parametrize("mask", [None, MASK])
def test_a_picture_does_not_depend_on_its_batch_mates(
    base: Orders, mask: Image.Image | None
) -> None:
    together = ours(base, "ddpm", 0.5, mask=mask, num_images=3)
    alone = ours(base, "ddpm", 0.5, mask=mask, seed=7)
    assert_alike(together[2], alone[0])


def test_less_strength_stays_nearer_to_the_picture(base: Orders) -> None:
    apart = [
        numpy.abs(
            ours(base, "ddim", strength, steps=20) - ours(base, "ddim", 0.05, steps=20)
        ).mean()
        for strength in (0.1, 0.4, 0.9)
    ]
    assert apart == sorted(apart)


def test_requests_from_noise_and_from_pictures_share_batches(base: Orders) -> None:
    """Of other strengths, samplers and guidance: each is what it is alone."""
    asked: list[dict[str, Any]] = [
        order(base, "ddim", 0.5, MASK),
        order(base, "euler", 0.8, None) | {"guidance_rescale": 0.7},
        order(base, "pndm", 0.5, None) | {"guidance_interval": (0.4, 0.8)},
        {"sampler": "ddim", "eta": 0.5, "dynamic_threshold": 0.9, "num_images": 2},
    ]
    numbers = [base.send(**one) for one in asked]
    together = [base.pictures(number) for number in numbers]
    for one, found in zip(asked, together, strict=True):
        alone = base.paint(**one, alone=True)
        assert_alike(numpy.stack(found).astype(int), numpy.stack(alone).astype(int))


def test_an_order_keeps_its_pictures_on_the_way_to_the_process(
    base: Orders, tmp_path: Path
) -> None:
    sent = SampleOrder(
        base_fingerprint="f" * 64,
        base_folder=tmp_path,
        device="cpu",
        adapters=(),
        guidance_scale=4.0,
        seed=5,
        width=64,
        height=64,
        num_images=1,
        folder=tmp_path,
        parameters=("",),
        guidance_interval=(0.2, 0.8),
        **order(base, "ddim", 0.5, MASK),
    )
    assert SampleOrder.from_json(sent.to_json()) == sent
    from_noise = replace(sent, init_image=None, mask_image=None, strength=None)
    assert SampleOrder.from_json(from_noise.to_json()) == from_noise


def test_a_picture_that_is_gone_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="is gone: upload it again"):
        fitted(tmp_path / "0.png", "RGB", (64, 64))


def test_files_are_opened_in_the_size_to_paint(tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "photo.png")
    assert fitted(tmp_path / "photo.png", "RGB", (64, 64)).tobytes() == PHOTO.tobytes()
    wider = fitted(tmp_path / "photo.png", "RGB", (96, 64))
    # The middle of the picture, a third of whose height is cut off.
    middle = PHOTO.crop((0, 11, 64, 53)).resize((96, 64), Image.Resampling.LANCZOS)
    apart = numpy.asarray(wider, dtype=int) - numpy.asarray(middle, dtype=int)
    assert numpy.abs(apart).mean() < 10
