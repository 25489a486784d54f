"""Custom Diffusion's size augmentation: what is drawn, said and learned."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from lookalike_datasets.features.views import Cut, Photo
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.views import Shown, photo_views

SIDE = 60


def sized(count: int, digest: str = "photo", **config: object) -> list[Shown]:
    whole = TrainingConfig.model_validate({"sizes": count, **config})
    return photo_views(Photo(Path("x.png"), digest), "a sks dog", (SIDE, SIDE), whole)


@pytest.fixture(scope="module")
def many() -> list[Shown]:
    return [view for number in range(50) for view in sized(64, f"photo {number}")]


def test_two_of_three_are_reduced_down_to_a_third_and_the_others_are_closer(
    many: list[Shown],
) -> None:
    zooms = torch.tensor([view.cut.zoom for view in many])
    reduced = zooms <= 1
    assert float(reduced.float().mean()) == pytest.approx(2 / 3, abs=0.03)
    for part, low, high in ((zooms[reduced], 1 / 3, 1.0), (zooms[~reduced], 1.2, 1.4)):
        assert low <= float(part.min()) < low + 0.01
        assert high - 0.01 < float(part.max()) <= high
        assert float(part.mean()) == pytest.approx((low + high) / 2, abs=0.02)


def test_the_caption_says_far_or_close_and_nothing_in_between(many: list[Shown]) -> None:
    said = {"far": set(), "as it is": set(), "close": set()}
    for view in many:
        zoom = view.cut.zoom
        how = "far" if zoom < 0.6 else "close" if zoom > 1 else "as it is"
        said[how].add(view.caption.removesuffix("a sks dog"))
    assert said == {
        "far": {"a far away ", "very small "},
        "as it is": {""},
        "close": {"zoomed in ", "close up "},
    }


def test_only_the_pasted_part_of_the_canvas_is_learned() -> None:
    red = Image.new("RGB", (90, 90), "red")
    picture, mask = Cut(SIDE, SIDE, zoom=0.5, x=1.0, y=0.0).show(red)
    assert mask is not None
    for at in ((0, 0), (29, 0), (30, 30), (59, 59), (29, 29)):
        assert (picture.getpixel(at), mask.getpixel(at)) == ((128, 128, 128), 0)
    for at in ((30, 0), (59, 29), (45, 15)):
        assert (picture.getpixel(at), mask.getpixel(at)) == ((255, 0, 0), 255)


def test_a_photo_has_the_same_sizes_in_every_run_and_another_has_others() -> None:
    assert sized(8) == sized(8)
    assert sized(9)[:8] == sized(8)
    assert [v.cut for v in sized(8)] != [v.cut for v in sized(8, "other")]


def test_sizes_take_the_place_of_the_middle_and_leave_crops_and_mirror_images() -> None:
    assert len(sized(8)) == 8
    assert len(sized(8, crops=2)) == 10
    assert len(sized(8, crops=2, random_flip=True)) == 20
