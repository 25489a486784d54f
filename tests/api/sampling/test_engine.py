"""Our loop against diffusers' own pipeline: the same pictures, pixel by pixel."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from lookalike_api.sampling.messages import AdapterFile
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.samplers import SAMPLERS
from support_models import save_base
from support_sampling import LIBRARY_WARNINGS, reference, save_adapter

pytestmark = LIBRARY_WARNINGS

PROMPT = "sks dog"


@pytest.fixture(scope="module")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFile]:
    """One for the UNet alone, one for the text encoder too."""
    folder = tmp_path_factory.mktemp("adapters")
    made = []
    for number, text_encoder in enumerate((False, True)):
        path = folder / f"{number}.safetensors"
        digest = save_adapter(path, base_folder, seed=number, text_encoder=text_encoder)
        made.append(AdapterFile(f"a{number}@1", digest, path, (0.8, 0.5)[number]))
    return made


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Any:
    from lookalike_api.sampling.models import ResidentBase

    return ResidentBase(base_folder, "cpu")


@pytest.mark.parametrize("negative", ["blue", None])
def test_sdxl_is_painted_as_diffusers_paints_it(tmp_path: Path, negative: str | None) -> None:
    from lookalike_api.sampling.engine import Scene
    from lookalike_api.sampling.engine import paint as paint_scene
    from lookalike_api.sampling.models import ResidentBase

    folder = save_base(tmp_path, "sdxl")
    path = tmp_path / "lora.safetensors"
    digest = save_adapter(path, folder, seed=3)
    base = ResidentBase(folder, "cpu")
    base.wear([AdapterFile("rex@1", digest, path, 0.7)])
    texts = {"text": base.embed(PROMPT), "blank": base.embed_negative(negative or "")}
    asked = {"steps": 4, "sampler": "ddim", "seed": 5, "num_images": 2, "guidance_scale": 4.0}
    scene = Scene(**texts, **asked, width=64, height=64)  # type: ignore[arg-type]
    ours = paint_scene(base, scene, lambda step, total: None)
    theirs = reference(
        folder,
        PROMPT,
        seed=5,
        num_images=2,
        sampler=SAMPLERS["ddim"],
        adapters=[(path, 0.7)],
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=4.0,
        width=64,
        height=64,
    )
    for mine, other in zip(ours, theirs, strict=True):
        apart = numpy.asarray(mine, dtype=int) - numpy.asarray(other, dtype=int)
        assert abs(apart).max() <= 1


def paint(base: Any, adapters: Sequence[AdapterFile] = (), **changes: Any) -> list[Any]:
    from lookalike_api.sampling.engine import Scene
    from lookalike_api.sampling.engine import paint as paint_scene

    asked = {
        "guidance_scale": 4.0,
        "steps": 4,
        "sampler": "ddim",
        "seed": 5,
        "width": 64,
        "height": 64,
        "num_images": 2,
    } | changes
    base.wear(adapters)
    scene = Scene(text=base.embed(PROMPT), blank=base.embed("blue"), **asked)
    return [numpy.asarray(image) for image in paint_scene(base, scene, lambda step, total: None)]


def plain(folder: Path, adapters: Sequence[AdapterFile] = (), **changes: Any) -> list[Any]:
    options = {"steps": 4, "sampler": "ddim", "seed": 5, "num_images": 2} | changes
    images = reference(
        folder,
        PROMPT,
        negative_prompt="blue",
        num_inference_steps=options.pop("steps"),
        sampler=SAMPLERS[options.pop("sampler")],
        adapters=[(adapter.path, adapter.scale) for adapter in adapters],
        **{"guidance_scale": 4.0, "width": 64, "height": 64} | options,
    )
    return [numpy.asarray(image) for image in images]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_paints_what_diffusers_paints_with_an_adapter(
    base: Any, base_folder: Path, adapters: list[AdapterFile], sampler: str, guidance_scale: float
) -> None:
    asked: dict[str, Any] = {"sampler": sampler, "guidance_scale": guidance_scale}
    ours = paint(base, adapters[1:], **asked)
    numpy.testing.assert_array_equal(ours, plain(base_folder, adapters[1:], **asked))
    assert (ours != numpy.asarray(paint(base, **asked))).any()


def test_two_adapters_add_up_at_their_scales(
    base: Any, base_folder: Path, adapters: list[AdapterFile]
) -> None:
    both = paint(base, adapters)
    numpy.testing.assert_array_equal(both, plain(base_folder, adapters))
    assert (both != numpy.asarray(paint(base, adapters[:1]))).any()


def test_a_dora_is_painted_as_diffusers_paints_it_and_at_scale_0_is_the_base(
    base: Any, base_folder: Path, adapters: list[AdapterFile], tmp_path: Path
) -> None:
    path = tmp_path / "dora.safetensors"
    digest = save_adapter(path, base_folder, seed=5, text_encoder=True, dora=True)
    dora = AdapterFile("dora@1", digest, path, 1.0)
    nothing = replace(dora, scale=0.0)
    for worn, meant in (
        ([dora], [dora]),
        ([nothing], []),
        ([adapters[0], nothing], [adapters[0]]),
    ):
        # Its sums are in another order than PEFT's: 8-bit colours may round either way.
        ours = numpy.asarray(paint(base, worn), dtype=int)
        assert numpy.abs(ours - numpy.asarray(plain(base_folder, meant), dtype=int)).max() <= 1


def test_adapters_worn_before_leave_no_trace(
    base: Any, base_folder: Path, adapters: list[AdapterFile]
) -> None:
    for worn in (adapters, adapters[:1], []):
        numpy.testing.assert_array_equal(paint(base, worn), plain(base_folder, worn))


def test_sizes_need_not_be_square(base: Any, base_folder: Path) -> None:
    size = {"width": 32, "height": 48}
    numpy.testing.assert_array_equal(paint(base, **size), plain(base_folder, **size))


def test_v_prediction_is_sampled_as_such(tmp_path: Path) -> None:
    from lookalike_api.sampling.models import ResidentBase

    folder = save_base(tmp_path / "sd2", "sd2")
    numpy.testing.assert_array_equal(paint(ResidentBase(folder, "cpu")), plain(folder))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch_mates(base: Any, sampler: str) -> None:
    together = paint(base, sampler=sampler, num_images=3)
    alone = paint(base, sampler=sampler, num_images=1, seed=7)
    # Kernels may round differently by batch size: at most one of 255 levels.
    assert numpy.abs(together[2].astype(int) - alone[0].astype(int)).max() <= 1


def test_many_images_are_painted_in_batches_and_all_steps_are_counted(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookalike_api.sampling import engine

    whole = paint(base, num_images=3)
    monkeypatch.setattr(engine, "BATCH_PIXELS", 2 * 64 * 64)
    counted: list[tuple[int, int]] = []
    scene = engine.Scene(base.embed(PROMPT), base.embed("blue"), 4.0, 2, "ddim", 5, 64, 64, 3)
    engine.paint(base, scene, lambda step, total: counted.append((step, total)))
    assert counted == [(1, 4), (2, 4), (3, 4), (4, 4)]
    split = paint(base, num_images=3)
    assert numpy.abs(numpy.subtract(whole, split, dtype=int)).max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 500])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_fewest_and_most_steps_work_with_every_sampler(sampler: str, steps: int) -> None:
    import torch

    from lookalike_platform.samplers import make_sampler

    config = {"num_train_timesteps": 1000, "steps_offset": 1, "timestep_spacing": "leading"}
    made = make_sampler(sampler, config)
    made.set_timesteps(steps)
    latents = torch.zeros(1, 4, 4, 4)
    for timestep in made.timesteps:
        latents = made.step(latents, timestep, latents, return_dict=False)[0]
    assert latents.isfinite().all()


def test_an_adapter_of_another_base_is_refused(base: Any, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    wider = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    wider.save_pretrained(tmp_path / "unet")
    path = tmp_path / "other.safetensors"
    digest = save_adapter(path, tmp_path)
    with pytest.raises(InvalidRequest, match="does not fit"):
        base.wear([AdapterFile("other@1", digest, path, 1.0)])


def test_the_base_is_never_served_alone_when_keys_did_not_load(
    base: Any, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "adapter.safetensors"
    digest = save_adapter(path, base_folder, seed=9, text_encoder=True)
    # As if a later diffusers spelt the text encoder's prefix otherwise, and only logged it.
    monkeypatch.setattr(
        type(base._loras._pipeline), "load_lora_into_text_encoder", lambda *args, **options: None
    )
    with pytest.raises(InvalidRequest, match="tensors of mine@1 could be loaded"):
        base.wear([AdapterFile("mine@1", digest, path, 1.0)])
    monkeypatch.undo()
    base.wear([AdapterFile("mine@1", digest, path, 1.0)])


def test_adapters_beyond_the_budget_leave_memory_except_those_worn(
    base_folder: Path, adapters: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookalike_api.sampling import loras, models

    monkeypatch.setattr(loras, "MAX_ADAPTER_BYTES", 1)
    base = models.ResidentBase(base_folder, "cpu")
    first = paint(base, adapters[:1])
    paint(base, adapters[1:])
    assert list(base.unet.peft_config) == [adapters[1].digest]
    numpy.testing.assert_array_equal(paint(base, adapters[:1]), first)


def test_text_features_are_computed_once_per_text_and_text_encoder_adapters(
    base_folder: Path, adapters: list[AdapterFile]
) -> None:
    from lookalike_api.sampling.models import ResidentBase

    base = ResidentBase(base_folder, "cpu")
    without = base.embed(PROMPT)
    base.wear(adapters[:1])  # the UNet's alone
    assert base.embed(PROMPT) is without
    base.wear(adapters[1:])
    assert (base.embed(PROMPT).features != without.features).any()


def test_only_the_bases_used_last_stay(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookalike_api.sampling import models

    monkeypatch.setattr(models, "ResidentBase", lambda folder, device, cache: object())
    bases = models.ResidentBases(tmp_path)
    first = bases.get("1", base_folder, "cpu")
    second = bases.get("2", base_folder, "cpu")
    assert bases.get("1", base_folder, "cpu") is first
    bases.get("3", base_folder, "cpu")
    assert bases.get("1", base_folder, "cpu") is first
    assert bases.get("2", base_folder, "cpu") is not second
