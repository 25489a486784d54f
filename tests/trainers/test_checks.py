"""What would train nothing without a word, and is refused before anything is drawn or encoded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.method_configs import (
    CustomDiffusionConfig,
    DreamBoothConfig,
    LoraConfig,
    TextualInversionConfig,
)
from lookalike_trainers.prepare import prepare
from lookalike_trainers.run_request import MoreSubject
from lookalike_trainers.subjects import subjects_of
from support_images import encoded, picture
from support_models import RESOLUTION, TOKENS, save_base
from support_ranks import run_request

AROUND = "x" * (TOKENS - 3)  # letters are tokens here: with start, end and "a" no more are read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    save_base(folder / "base")
    (folder / "photos").mkdir()
    for number in range(2):
        file = folder / "photos" / f"{number}.png"
        file.write_bytes(encoded(picture(number, (64, 64)), "PNG"))
    return folder


def prepared(
    folder: Path, config: TrainingConfig, *captions: str | None, also: str | None = None
) -> list[dict[str, Any]]:
    """What the run said while it got ready with its photos called so."""
    request = run_request(folder, config)
    images = [
        image.model_copy(update={"caption": caption, "name": f"rex-{number}.jpg"})
        for number, (image, caption) in enumerate(zip(request.images, captions, strict=False))
    ]
    changed: dict[str, Any] = {"images": images}
    if also:
        other = images[0].model_copy(update={"caption": also, "name": "tom.jpg"})
        changed["also"] = [MoreSubject(class_noun="cat", images=[other])]
    request = request.model_copy(update=changed)
    parts = BaseParts(request.base_folder, torch.device("cpu"))
    if config.token_vectors:
        for subject in subjects_of(request, config):
            parts.learn(subject.config.trigger, config.token_vectors)
    said: list[dict[str, Any]] = []
    prepare(request, config, parts, said.append)
    return said


PRIOR: dict[str, Any] = {"prior": {"num_images": 2, "steps": 1}, "resolution": RESOLUTION}


@pytest.mark.parametrize(
    "config",
    [
        DreamBoothConfig(**PRIOR),
        LoraConfig(**PRIOR, token_vectors=3),
        CustomDiffusionConfig(**PRIOR, sizes=0),
        TextualInversionConfig(resolution=RESOLUTION, token_vectors=7),
    ],
)
def test_a_word_that_the_text_encoder_does_not_read_is_refused_by_its_photo(
    folder: Path, config: TrainingConfig
) -> None:
    with pytest.raises(InvalidRequest, match=r"'sks' in that of rex-1\.jpg: .*shorten the"):
        prepared(folder, config, "a dog", f"{AROUND} a dog")
    assert not (folder / "cache").exists()


def test_a_word_is_read_if_all_of_its_tokens_are(folder: Path) -> None:
    # Start and end, "a", and the word's own.
    for config, own in (
        (DreamBoothConfig(resolution=RESOLUTION), 3),
        (LoraConfig(resolution=RESOLUTION, token_vectors=4), 4),
    ):
        most = "x" * (TOKENS - 3 - own)
        prepared(folder, config, f"{most} a dog, asleep on a sofa")
        with pytest.raises(InvalidRequest, match="rex-0"):
            prepared(folder, config, f"{most}x a dog, asleep on a sofa")


@pytest.mark.parametrize(
    ("config", "caption"),
    [
        (LoraConfig(resolution=RESOLUTION, token_vectors=2), "<sks> on grass"),
        (LoraConfig(resolution=RESOLUTION, token_vectors=1, prompt="two {trigger}s"), None),
    ],
)
def test_a_learned_word_is_to_stand_by_itself(
    folder: Path, config: TrainingConfig, caption: str | None
) -> None:
    with pytest.raises(InvalidRequest, match=r"rex-0\.jpg .* 'sks' is no word of its own"):
        prepared(folder, config, caption)


def test_a_word_that_is_not_learned_may_be_spelled_as_one_likes(folder: Path) -> None:
    said = prepared(folder, DreamBoothConfig(resolution=RESOLUTION, prompt="two {trigger}s"), None)
    assert {"type": "stage", "stage": "caching"} in said


def test_what_views_add_to_a_caption_counts(folder: Path) -> None:
    config = CustomDiffusionConfig(resolution=RESOLUTION)
    caption = "x" * (TOKENS - 4) + " dog"
    prepared(folder, config.model_copy(update={"sizes": 0}), caption)
    with pytest.raises(InvalidRequest, match="rex-0"):
        prepared(folder, config, caption)


def test_the_word_of_each_subject_is_to_be_read(folder: Path) -> None:
    config = CustomDiffusionConfig(resolution=RESOLUTION, also=("set_1",), sizes=0)
    with pytest.raises(InvalidRequest, match=r"'sks-2' in that of tom\.jpg"):
        prepared(folder, config, "a dog", also=f"{AROUND} a cat")


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (DreamBoothConfig(resolution=RESOLUTION, prompt=AROUND + " a {trigger}"), "shorten `pro"),
        (TextualInversionConfig(resolution=RESOLUTION, token_vectors=16), "or templates null"),
    ],
)
def test_a_runs_own_prompt_is_refused_too(
    folder: Path, config: TrainingConfig, remedy: str
) -> None:
    config = config.model_copy(update={"token_vectors": config.token_vectors and TOKENS})
    with pytest.raises(InvalidRequest, match=remedy) as refused:
        prepared(folder, config, None)
    assert [problem.path for problem in refused.value.fields] == ["config.prompt"]


def test_a_masked_loss_without_a_single_mask_is_refused(folder: Path, tmp_path: Path) -> None:
    photos = with_masks(folder, tmp_path, 255, 255)
    with pytest.raises(InvalidRequest, match="none of these has any: upload") as refused:
        prepared(photos, LoraConfig(**PRIOR, masked_loss=True), None, None)
    assert [problem.path for problem in refused.value.fields] == ["config.masked_loss"]
    assert not (tmp_path / "cache").exists()


def test_a_run_says_which_photos_have_no_mask(folder: Path, tmp_path: Path) -> None:
    photos = with_masks(folder, tmp_path, 0, 255)
    config = LoraConfig(resolution=RESOLUTION, masked_loss=True)
    _, said = prepared(photos, config, None, None)
    text = "1 of 2 photos have no mask and are learned whole: rex-1.jpg"
    assert said == {"type": "message", "level": "warning", "text": text}
    (only,) = prepared(photos, config.model_copy(update={"masked_loss": False}), None, None)
    assert only["type"] == "stage"


def with_masks(folder: Path, own: Path, *alphas: int) -> Path:
    """A folder of photos, each with a corner of so much alpha."""
    (own / "base").symlink_to(folder / "base")
    (own / "photos").mkdir()
    for number, alpha in enumerate(alphas):
        photo = picture(number, (64, 64)).convert("RGBA")
        photo.putpixel((0, 0), (0, 0, 0, alpha))
        (own / "photos" / f"{number}.png").write_bytes(encoded(photo, "PNG"))
    return own
