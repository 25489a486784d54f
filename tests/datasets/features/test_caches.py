"""Latents, text features and prior images: computed once, and anew when their causes change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image, ImageOps

from lookalike_datasets.features import cache
from lookalike_datasets.features import latents as latents_of
from lookalike_datasets.features.latents import Moments, encode, square, to_pixels
from lookalike_datasets.features.prior import PriorImages, PriorRequest, prior_images
from lookalike_datasets.features.text import text_features, tokenize
from lookalike_datasets.features.views import Cut, Photo
from lookalike_platform.conditioning import Text
from lookalike_platform.files import sha256_file
from lookalike_trainers.base_parts import BaseParts
from support_images import photo, picture
from support_models import RESOLUTION, TOKENS, VAE_SCALE, WIDTH, save_base

SIDE = RESOLUTION // VAE_SCALE


class Counted:
    """Loads a part of the base, and counts how often it was asked to."""

    def __init__(self, load: Any) -> None:
        self.load, self.times = load, 0

    def __call__(self) -> Any:
        self.times += 1
        return self.load()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def parts(base: Path) -> BaseParts:
    return BaseParts(base, torch.device("cpu"))


@pytest.fixture
def vae(parts: BaseParts) -> Counted:
    return Counted(lambda: parts.vae)


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.jpg" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(photo(number))
    return paths


def moments(
    photos: list[Path],
    vae: Counted,
    folder: Path,
    vae_digest: str = "vae",
    resolution: int = RESOLUTION,
    **cut: Any,
) -> Moments:
    """Of all photos, one after the other."""
    views = [
        (Photo(path, sha256_file(path)), Cut(resolution, resolution, **cut)) for path in photos
    ]
    found = latents_of.moments(views, vae, vae_digest, folder / "latents")
    return Moments(torch.stack([m.mean for m in found]), torch.stack([m.std for m in found]))


def test_moments_are_the_autoencoders_own(
    photos: list[Path], vae: Counted, parts: BaseParts, tmp_path: Path
) -> None:
    found = moments(photos, vae, tmp_path)
    assert found.mean.shape == (2, 4, SIDE, SIDE)
    pixels = to_pixels(square(Image.open(photos[1]), RESOLUTION))[None]
    posterior = parts.vae.encode(pixels).latent_dist
    torch.testing.assert_close(found.mean[1], posterior.mean[0].detach())
    torch.testing.assert_close(found.std[1], posterior.std[0].detach())


def test_a_second_run_does_not_load_the_autoencoder(
    photos: list[Path], vae: Counted, tmp_path: Path
) -> None:
    first = moments(photos, vae, tmp_path)
    second = moments(photos, vae, tmp_path)
    assert vae.times == 1
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.std, second.std)


def test_only_the_changed_photo_is_encoded_again(
    photos: list[Path], vae: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = moments(photos, vae, tmp_path)
    sizes = []

    def counting(vae: Any, pixels: torch.Tensor) -> Any:
        sizes.append(len(pixels))
        return encode(vae, pixels)

    monkeypatch.setattr("lookalike_datasets.features.latents.encode", counting)
    photos[1].write_bytes(photo(7))
    after = moments(photos, vae, tmp_path)
    assert sizes == [1]
    assert torch.equal(before.mean[0], after.mean[0])
    assert not torch.equal(before.mean[1], after.mean[1])


@pytest.mark.parametrize(
    "change",
    [{"resolution": 2 * RESOLUTION}, {"vae_digest": "another"}, {"zoom": 1.2}, {"mirrored": True}],
    ids=["size", "encoder", "crop", "mirror"],
)
def test_another_size_or_autoencoder_misses_the_cache(
    photos: list[Path], vae: Counted, tmp_path: Path, change: dict[str, Any]
) -> None:
    moments(photos, vae, tmp_path)
    moments(photos, vae, tmp_path, **change)
    assert vae.times == 2


def test_mirrored_photos_are_encoded_not_their_latents_mirrored(
    photos: list[Path], vae: Counted, parts: BaseParts, tmp_path: Path
) -> None:
    found = moments(photos, vae, tmp_path, mirrored=True)
    mirrored = ImageOps.mirror(square(Image.open(photos[0]), RESOLUTION))
    expected, _ = encode(parts.vae, to_pixels(mirrored)[None])
    torch.testing.assert_close(found.mean[0], expected[0])


def test_a_cache_file_that_was_cut_short_is_computed_again(
    photos: list[Path], vae: Counted, tmp_path: Path
) -> None:
    first = moments(photos, vae, tmp_path)
    for path in (tmp_path / "latents").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert torch.equal(moments(photos, vae, tmp_path).mean, first.mean)
    assert vae.times == 2


def test_the_middle_of_a_photo_is_cut_out_square() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    cut = square(wide, 64)
    assert cut.size == (64, 64)
    assert cut.getpixel((32, 32)) == (0, 0, 255)
    assert cut.getchannel("B").getextrema()[0] > 240  # the edge takes a little of its neighbours


def test_pixels_span_minus_one_to_one() -> None:
    pixels = to_pixels(Image.new("RGB", (2, 1), (0, 255, 51)))
    assert pixels.shape == (3, 1, 2)
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


def test_text_features_are_the_encoders_and_computed_once(parts: BaseParts, tmp_path: Path) -> None:
    encoded: list[str] = []

    def encode(prompts: Sequence[str]) -> Text:
        encoded.extend(prompts)
        return parts.encode(prompts, 64)

    def features(prompts: list[str], digest: str = "text") -> torch.Tensor:
        return text_features(prompts, encode, digest, tmp_path).features

    found = features(["", "a sks dog"])
    assert found.shape == (2, TOKENS, WIDTH)
    ids = tokenize(parts.tokenizers[0], ["a sks dog"])
    direct = parts.text_encoders[0](ids)[0][0].detach()
    torch.testing.assert_close(found[1], direct)
    assert torch.equal(features(["a sks dog", ""]), found.flip(0))
    assert encoded == ["", "a sks dog"]
    features(["a sks dog"], digest="another encoder")
    features(["a dog"])
    assert encoded[2:] == ["a sks dog", "a dog"]


def test_a_parts_digest_covers_its_weights_and_its_configuration(
    base: Path, tmp_path: Path
) -> None:
    one = cache.component_digest(base / "vae")
    assert cache.component_digest(base / "vae") == one
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        changed = tmp_path / name
        changed.mkdir()
        for path in (base / "vae").iterdir():
            data = path.read_bytes()
            (changed / path.name).write_bytes(data + b" " if path.name == name else data)
        assert cache.component_digest(changed) != one


# Prior images


def prior(
    parts: BaseParts, folder: Path, count: int = 3, **changes: Any
) -> tuple[PriorImages, int]:
    """The images, and how many were drawn for them."""
    options: dict[str, Any] = {
        "base_fingerprint": "base",
        "prompt": "a dog",
        "sampler": "ddim",
        "steps": 2,
        "guidance_scale": 3.0,
        "seed": 0,
        "resolution": RESOLUTION,
    }
    before = set(folder.rglob("*.png"))
    with torch.inference_mode():
        images = prior_images(PriorRequest(count=count, **options | changes), lambda: parts, folder)
    return images, len(set(images.paths) - before)


def test_prior_images_are_drawn_once_and_more_of_them_keep_the_first(
    parts: BaseParts, tmp_path: Path
) -> None:
    three, drawn = prior(parts, tmp_path)
    assert drawn == 3
    assert len(set(three.digests)) == 3
    five, drawn = prior(parts, tmp_path, count=5)
    assert drawn == 2
    assert five.digests[:3] == three.digests


def test_an_image_depends_on_its_own_seed_alone(parts: BaseParts, tmp_path: Path) -> None:
    together, _ = prior(parts, tmp_path / "one", count=3)
    shifted, _ = prior(parts, tmp_path / "two", count=1, seed=2)
    alone = numpy.asarray(Image.open(shifted.paths[0]), dtype=int)
    first, _, last = (numpy.asarray(Image.open(path), dtype=int) for path in together.paths)
    # Batches of other sizes are summed in another order: colours may round either way.
    assert abs(alone - last).max() <= 1
    assert abs(alone - first).max() > 1


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a cat"},
        {"base_fingerprint": "another"},
        {"sampler": "ddpm"},
        {"steps": 3},
        {"guidance_scale": 2.0},
        {"seed": 100},
        {"resolution": 2 * RESOLUTION},
    ],
    ids=lambda change: next(iter(change)),
)
def test_nothing_is_reused_under_another_prompt_base_sampler_or_seed(
    parts: BaseParts, tmp_path: Path, change: dict[str, Any]
) -> None:
    prior(parts, tmp_path, count=1)
    _, drawn = prior(parts, tmp_path, count=1, **change)
    assert drawn == 1


def test_files_of_other_origin_are_not_taken_for_prior_images(
    parts: BaseParts, tmp_path: Path
) -> None:
    """Other trainers count the files of a folder."""
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    images, drawn = prior(parts, tmp_path)
    assert drawn == 3
    assert all(path.parent != tmp_path for path in images.paths)
