"""Which views a run learns from: crops, mirror images, buckets of one shape."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lookalike_datasets.features.views import Cut
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.files import canonical_digest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import PriorConfig
from lookalike_trainers.data import TrainingData
from lookalike_trainers.method_configs import LoraConfig
from lookalike_trainers.methods.lora import build
from lookalike_trainers.prepare import prepare
from lookalike_trainers.views import bucket_shapes, class_views, views_by_shape
from support_images import encoded, picture
from support_models import RESOLUTION, VAE_SCALE, save_base
from support_ranks import run_request

SIZES = [(96, 80), (120, 60), (60, 120), (300, 100)]
MULTIPLE = VAE_SCALE * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    save_base(folder / "base")
    (folder / "photos").mkdir()
    for number, size in enumerate(SIZES):
        cut_out = picture(number, size).convert("RGBA")
        cut_out.paste((255, 255, 255, 0), (0, 0, size[0] // 2, size[1]))
        (folder / "photos" / f"{number}.png").write_bytes(encoded(cut_out, "PNG"))
    return folder


def cuts(folder: Path, **options: Any) -> dict[tuple[int, int], list[list[Cut]]]:
    config = LoraConfig(resolution=RESOLUTION, **options)
    found = views_by_shape(run_request(folder, config), config, MULTIPLE)
    return {shape: [[view.cut for view in views] for views in of] for shape, of in found.items()}


def prepared(folder: Path, **options: Any) -> TrainingData:
    config = LoraConfig(resolution=RESOLUTION, **options)
    parts = BaseParts(folder / "base", torch.device("cpu"))
    return prepare(run_request(folder, config), config, parts, lambda message: None)[0]


def test_without_options_a_photo_has_one_view_its_middle(folder: Path) -> None:
    assert cuts(folder) == {(64, 64): [[Cut(64, 64)]] * 4}


def test_crops_differ_and_are_the_same_in_every_run_and_mirrored_too(folder: Path) -> None:
    (found,) = cuts(folder, crops=3, random_flip=True).values()
    assert found == next(iter(cuts(folder, crops=3, random_flip=True).values()))
    for views in found:
        assert len(views) == len(set(views)) == 8
        assert [cut.mirrored for cut in views] == [False] * 4 + [True] * 4
        assert all(1 <= cut.zoom <= 1.4 and 0 <= cut.x <= 1 and 0 <= cut.y <= 1 for cut in views)
    (fewer,) = cuts(folder, crops=1).values()
    assert [views[:2] for views in found] == fewer  # those that were cached are used again
    assert len({views[1] for views in found}) == len(SIZES)


def test_buckets_keep_a_photos_shape_at_about_the_same_size(folder: Path) -> None:
    found = cuts(folder, aspect_buckets=True)
    assert sum(len(photos) for photos in found.values()) == len(SIZES)
    for width, height in found:
        assert width % MULTIPLE == height % MULTIPLE == 0
        assert 0.75 * RESOLUTION**2 <= width * height <= RESOLUTION**2
        assert max(width, height) <= 2.5 * min(width, height)
    assert len(found[88, 40]) == len(found[40, 88]) == 1
    assert len(found[96, 40]) == 1  # 3 : 1 is cut to the longest there is


@pytest.mark.parametrize(
    ("resolution", "multiple", "remedy"), [(72, 64, 96), (128, 64, 160), (64, 32, 80)]
)
def test_where_there_is_no_shape_but_the_square_buckets_are_refused(
    resolution: int, multiple: int, remedy: int
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        bucket_shapes(resolution, multiple)
    (problem,) = refused.value.fields
    assert problem.path == "config.aspect_buckets"
    assert f"leave it out, or set resolution to {remedy}" in problem.message
    assert len(bucket_shapes(remedy, multiple)) > 1


def test_batches_of_buckets_masks_and_crops_come_out_of_the_caches(folder: Path) -> None:
    options: dict[str, Any] = {
        "aspect_buckets": True,
        "masked_loss": True,
        "crops": 1,
        "prior": {"num_images": 2, "steps": 1, "sampler": "ddim"},
    }
    data = prepared(folder, **options)
    for step in range(len(SIZES)):
        batch = data.batch(step, 0, 0, 1)
        assert batch.mask is not None
        assert batch.mask.shape == (8, 1, *batch.noisy.shape[2:])
        assert 0.1 < float(batch.mask[:4].mean()) < 0.9
        assert batch.mask[4:].min() == 1  # class images are learned whole
    again = prepared(folder, **options)
    assert torch.equal(again.batch(2, 0, 0, 1).noisy, data.batch(2, 0, 0, 1).noisy)
    assert prepared(folder).batch(0, 0, 0, 1).mask is None


@pytest.mark.parametrize("token_vectors", [0, 1])
def test_sdxls_denoiser_is_told_each_photos_size_and_where_it_was_cut(
    folder: Path, tmp_path: Path, token_vectors: int
) -> None:
    (tmp_path / "photos").symlink_to(folder / "photos")
    save_base(tmp_path / "base", "sdxl")
    config = LoraConfig(
        resolution=RESOLUTION, aspect_buckets=True, token_vectors=token_vectors, initializer="dog"
    )
    parts = BaseParts(tmp_path / "base", torch.device("cpu"))
    if token_vectors:
        parts.learn(config.trigger, token_vectors)
    data, _ = prepare(run_request(tmp_path, config), config, parts, lambda message: None)
    module = build(parts, config).module
    told = []
    module.unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    shapes = set()
    for step in range(len(SIZES)):
        batch = data.batch(step, 0, 0, 1)
        batch.answered_by(module)
        height, width = (side * VAE_SCALE for side in batch.noisy.shape[2:])
        assert {tuple(row[4:]) for row in told[-1].tolist()} == {(height, width)}
        shapes |= {tuple(row) for row in told[-1].tolist()}
    # Photos of 96 x 80, 120 x 60, 60 x 120 and 300 x 100, heights before widths, tops before lefts.
    assert (100, 300, 0, 12, 40, 96) in shapes  # 300 x 100 as 120 x 40, of which 96 in the middle
    assert len(shapes) == len(SIZES)


def test_sdxl_learns_dropped_captions_as_sampling_takes_an_empty_prompt(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").symlink_to(folder / "photos")
    save_base(tmp_path / "base", "sdxl")
    told = []
    for text in (False, True):
        config = LoraConfig(
            resolution=RESOLUTION, caption_dropout=1.0, batch_size=2, train_text_encoder=text
        )
        parts = BaseParts(tmp_path / "base", torch.device("cpu"))
        data, _ = prepare(run_request(tmp_path, config), config, parts, lambda message: None)
        module = build(parts, config).module
        module.unet.register_forward_pre_hook(
            lambda _, args, kwargs: told.append((args, kwargs)), with_kwargs=True
        )
        data.batch(0, 0, 0, 1).answered_by(module)
    for args, kwargs in told:
        assert not args[2].any()
        assert not kwargs["added_cond_kwargs"]["text_embeds"].any()


def test_own_class_images_have_their_captions_or_the_class_prompt_and_none_are_drawn(
    folder: Path, tmp_path: Path
) -> None:
    config = LoraConfig(resolution=RESOLUTION, prior=PriorConfig(subject_set="set_1"))
    told = run_request(folder, config)
    of_class = [
        image.model_copy(update={"caption": words})
        for image, words in zip(told.images, ["two dogs on grass", None], strict=False)
    ]
    shown = class_views(of_class, (64, 64), config, "dog")
    assert [view.caption for (view,) in shown] == ["two dogs on grass", "a dog"]
    parts = BaseParts(folder / "base", torch.device("cpu"))
    whole = told.model_copy(update={"class_images": of_class, "cache": tmp_path})
    said: list[str] = []
    data, digest = prepare(whole, config, parts, lambda message: said.append(message["stage"]))
    assert len(data.buckets[0].class_images) == 2
    assert digest == canonical_digest([image.sha256 for image in of_class])
    assert said == ["caching"]
    assert not (tmp_path / "prior").exists()
