"""Our loop against diffusers' own pipeline: the same pictures, pixel by pixel."""

import gc
import time
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest

from lookalike_api.sampling.messages import AdapterFile
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.samplers import SAMPLERS
from support_models import save_base
from support_sampling import LIBRARY_WARNINGS, Orders, engine_of, reference, save_adapter

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
def base(base_folder: Path) -> Orders:
    return engine_of(base_folder)


@pytest.mark.parametrize("negative", ["blue", None])
def test_sdxl_is_painted_as_diffusers_paints_it(tmp_path: Path, negative: str | None) -> None:
    folder = save_base(tmp_path, "sdxl")
    path = tmp_path / "lora.safetensors"
    digest = save_adapter(path, folder, seed=3)
    adapters = [AdapterFile("rex@1", digest, path, 0.7)]
    ours = paint(engine_of(folder), adapters, negative_prompt=negative or "")
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
    assert_within_a_level(ours, [numpy.asarray(image) for image in theirs])


def paint(engine: Orders, adapters: Sequence[AdapterFile] = (), **changes: Any) -> list[Any]:
    asked = {"prompt": PROMPT, "negative_prompt": "blue", "num_images": 2} | changes
    return engine.paint(adapters=tuple(adapters), **asked)


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


def assert_within_a_level(ours: list[Any], theirs: list[Any]) -> None:
    """Sums in another order than PEFT's: 8-bit colours may round either way."""
    apart = numpy.asarray(ours, dtype=int) - numpy.asarray(theirs, dtype=int)
    assert abs(apart).max() <= 1


def test_sdxl_is_told_of_the_size_that_is_asked_for(tmp_path: Path) -> None:
    folder = save_base(tmp_path, "sdxl")
    size = {"width": 96, "height": 64}
    ours = engine_of(folder).paint(prompt=PROMPT, num_images=1, **size)
    theirs = reference(
        folder,
        PROMPT,
        seed=5,
        num_images=1,
        sampler=SAMPLERS["ddim"],
        num_inference_steps=4,
        guidance_scale=4.0,
        **size,
    )
    assert_within_a_level(ours, [numpy.asarray(image) for image in theirs])


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "probability_flow"])
def test_every_sampler_paints_what_diffusers_paints_with_an_adapter(
    base: Orders,
    base_folder: Path,
    adapters: list[AdapterFile],
    sampler: str,
    guidance_scale: float,
) -> None:
    asked: dict[str, Any] = {"sampler": sampler, "guidance_scale": guidance_scale}
    ours = paint(base, adapters[1:], **asked)
    numpy.testing.assert_array_equal(ours, plain(base_folder, adapters[1:], **asked))
    assert (ours != numpy.asarray(paint(base, **asked))).any()


def test_two_adapters_add_up_at_their_scales(
    base: Orders, base_folder: Path, adapters: list[AdapterFile]
) -> None:
    both = paint(base, adapters)
    assert_within_a_level(both, plain(base_folder, adapters))
    assert (both != numpy.asarray(paint(base, adapters[:1]))).any()


def test_a_dora_is_painted_as_diffusers_paints_it_and_at_scale_0_is_the_base(
    base: Orders, base_folder: Path, adapters: list[AdapterFile], tmp_path: Path
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
        assert_within_a_level(paint(base, worn), plain(base_folder, meant))


def test_adapters_worn_before_leave_no_trace(
    base: Orders, base_folder: Path, adapters: list[AdapterFile]
) -> None:
    before = paint(base)
    for worn in (adapters, adapters[:1]):
        assert_within_a_level(paint(base, worn), plain(base_folder, worn))
    numpy.testing.assert_array_equal(paint(base), before)
    numpy.testing.assert_array_equal(before, plain(base_folder))


def test_sizes_need_not_be_square(base: Orders, base_folder: Path) -> None:
    size = {"width": 32, "height": 48}
    numpy.testing.assert_array_equal(paint(base, **size), plain(base_folder, **size))


def test_v_prediction_is_sampled_as_such(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "sd2", "sd2")
    numpy.testing.assert_array_equal(paint(engine_of(folder)), plain(folder))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch_mates(base: Orders, sampler: str) -> None:
    together = paint(base, sampler=sampler, num_images=3)
    alone = paint(base, sampler=sampler, num_images=1, seed=7)
    # Kernels may round differently by batch size: at most one of 255 levels.
    assert numpy.abs(together[2].astype(int) - alone[0].astype(int)).max() <= 1


def test_many_images_are_painted_in_batches_and_all_steps_are_counted(
    base: Orders, base_folder: Path
) -> None:
    whole = paint(base, num_images=3, steps=2)
    small = engine_of(base_folder, batch_pixels=2 * 64 * 64)
    split = paint(small, num_images=3, steps=2)
    counted = [(told["step"], told["total"]) for told in small.told if told["type"] == "progress"]
    assert counted == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert numpy.abs(numpy.subtract(whole, split, dtype=int)).max() <= 1


@pytest.mark.parametrize("steps", [1, 2, 500])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_fewest_and_most_steps_work_with_every_sampler(sampler: str, steps: int) -> None:
    import torch

    from lookalike_platform.samplers import make_sampler

    config = {"steps_offset": 1, "timestep_spacing": "leading", "_class_name": "DDIMScheduler"}
    made = make_sampler(sampler, config)
    made.set_timesteps(steps)
    latents = torch.zeros(1, 4, 4, 4)
    for timestep in made.timesteps:
        latents = made.step(latents, timestep, latents, return_dict=False)[0]
    assert latents.isfinite().all()


def test_an_adapter_of_another_base_is_refused(base: Orders, tmp_path: Path) -> None:
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
        paint(base, [AdapterFile("other@1", digest, path, 1.0)])


def test_adapters_beyond_the_budget_leave_memory(
    base_folder: Path, adapters: list[AdapterFile]
) -> None:
    roomy = engine_of(base_folder)
    paint(roomy, adapters[1:])  # the larger of the two
    engine = engine_of(base_folder, adapter_bytes=roomy.engine.adapters.host.held)
    first = paint(engine, adapters[:1])
    paint(engine, adapters[1:])
    numpy.testing.assert_array_equal(paint(engine, adapters[:1]), first)
    assert engine.engine.adapters.host.counts.evictions == 2
    with pytest.raises(InvalidRequest, match="room for"):
        paint(engine_of(base_folder, adapter_bytes=100), adapters[:1])


def test_text_features_are_computed_once_per_text_and_text_encoder_adapters(
    base_folder: Path, adapters: list[AdapterFile]
) -> None:
    from lookalike_api.sampling.models import Dressed, ResidentBase
    from lookalike_trainers.methods.lora import rows

    base = ResidentBase(base_folder, "cpu", "base")
    unets, texts = (
        [Dressed(row, file)] for file in adapters if (row := rows(base, file.path)) is not None
    )
    without = base.read(PROMPT, []).text
    assert base.read(PROMPT, unets).text is without
    with_texts = base.read(PROMPT, texts).text
    assert (with_texts.features != without.features).any()
    assert base.read(PROMPT, texts).text is with_texts
    assert base.read(PROMPT, []).text is without


def test_a_base_that_made_room_leaves_memory_though_its_adapters_are_kept(
    base: Orders, adapters: list[AdapterFile]
) -> None:
    paint(base, adapters)
    bases = base.engine._bases._bases
    (gone,) = map(weakref.ref, bases.values())
    bases.clear()
    gc.collect()
    assert gone() is None
    assert base.engine.adapters.host.held > 0


def test_what_an_order_wore_leaves_memory_with_its_place_in_the_cache(
    base_folder: Path, adapters: list[AdapterFile]
) -> None:
    roomy = engine_of(base_folder)
    paint(roomy, adapters[1:])
    engine = engine_of(base_folder, adapter_bytes=roomy.engine.adapters.host.held)
    gc.collect()
    gc.disable()
    try:
        paint(engine, adapters[1:])
        (kept,) = engine.engine.adapters.host._kept.values()
        gone = weakref.ref(kept.value.result())
        del kept
        paint(engine, adapters[:1])
        assert gone() is None
    finally:
        gc.enable()


def test_adapters_too_large_together_are_refused_and_hold_nobody_up(
    base_folder: Path, adapters: list[AdapterFile]
) -> None:
    roomy = engine_of(base_folder)
    paint(roomy, adapters)
    engine = engine_of(base_folder, adapter_bytes=roomy.engine.adapters.host.held - 1)
    both, one = (engine.send(adapters=tuple(worn)) for worn in (adapters, adapters[:1]))
    refused, done = engine.until(both, one)
    assert "raise the budget" in refused["problem"]["detail"]
    assert done["type"] == "done"
    assert engine.engine.adapters.host.pinned == []


def test_pictures_that_cannot_be_decoded_end_their_own_order_alone(
    base: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookalike_api.sampling import engine

    def too_much(vae: Any, latents: Any) -> list[Any]:
        if len(latents) > 1:
            raise RuntimeError("out of memory")
        return decode(vae, latents)

    decode = engine.decode
    monkeypatch.setattr(engine, "decode", too_much)
    ends = base.until(base.send(num_images=2), base.send(), base.send(seed=6))
    assert [end["type"] for end in ends] == ["crash", "done", "done"]


def test_the_deadline_does_not_end_what_has_begun(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookalike_api.sampling import messages

    engine = engine_of(base_folder, batch_pixels=64 * 64)
    number = engine.send(num_images=2, deadline=time.time() + 3600)
    while not any(answer["type"] == "begun" for answer in engine.told):
        engine.engine.turn()
        engine.collect()
    # The engine's own clock: servers in other threads go by the real one.
    monkeypatch.setattr(messages, "time", SimpleNamespace(time=lambda: float("inf")))
    assert len(engine.pictures(number)) == 2


def test_only_the_bases_used_last_stay(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookalike_api.sampling import models

    monkeypatch.setattr(models, "ResidentBase", lambda folder, device, fingerprint, cache: object())
    bases: Any = models.ResidentBases(tmp_path)
    first = bases.get("1", base_folder, "cpu")
    second = bases.get("2", base_folder, "cpu")
    assert bases.get("1", base_folder, "cpu") is first
    bases.get("3", base_folder, "cpu")
    assert bases.get("1", base_folder, "cpu") is first
    assert bases.get("2", base_folder, "cpu") is not second
    both = [bases.get(name, base_folder, "cpu") for name in "12"]
    assert bases.get("3", base_folder, "cpu", in_use=both) is None
