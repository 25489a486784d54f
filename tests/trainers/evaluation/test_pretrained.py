"""CLIP and DINO against transformers' own way of asking them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.encoder_folder import encoder_folder
from lookalike_trainers.evaluation.encoders import open_judges
from lookalike_trainers.evaluation.preprocessing import Preprocessing
from lookalike_trainers.evaluation.pretrained import Clip, Dino
from support_images import picture

CPU = torch.device("cpu")
PHOTOS = [picture(1, (96, 80)), picture(2, (50, 130)), picture(3, (32, 32))]


def test_pictures_are_preprocessed_for_clip_as_transformers_does_it(clip_folder: Path) -> None:
    peers = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    peer = peers.CLIPImageProcessorPil.from_pretrained(clip_folder)
    for photo in PHOTOS:
        theirs = peer(photo, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(Preprocessing.read(clip_folder)(photo), theirs)


def test_pictures_are_preprocessed_for_dino_as_transformers_does_it(dino_folder: Path) -> None:
    peers = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    peer = peers.ViTImageProcessorPil.from_pretrained(dino_folder)
    for photo in PHOTOS:
        theirs = peer(photo, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(Preprocessing.read(dino_folder)(photo), theirs)


def test_clip_scores_are_the_cosines_that_transformers_clip_answers(clip_folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    prompts = ["a dog", "a cat in snow", "tea"]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        prompts, padding="max_length", max_length=24, return_tensors="pt"
    )
    pixels = torch.stack([Preprocessing.read(clip_folder)(photo) for photo in PHOTOS])
    with torch.inference_mode():
        answer = model(pixel_values=pixels, **tokens)
    clip = Clip(clip_folder, CPU)

    torch.testing.assert_close(clip.encode_images(PHOTOS), answer.image_embeds)
    torch.testing.assert_close(clip.encode_prompts(prompts), answer.text_embeds)
    cosines = (answer.image_embeds * answer.text_embeds).sum(1)
    torch.testing.assert_close(clip.score_prompts(PHOTOS, prompts, "dog").float(), cosines)


def test_dinos_features_are_the_class_token(dino_folder: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(dino_folder).eval()
    pixels = torch.stack([Preprocessing.read(dino_folder)(photo) for photo in PHOTOS])
    with torch.inference_mode():
        tokens = model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(
        Dino(dino_folder, CPU).encode_images(PHOTOS), F.normalize(tokens[:, 0], dim=1)
    )


def test_features_do_not_depend_on_the_batch_a_picture_came_in(clip_folder: Path) -> None:
    clip = Clip(clip_folder, CPU)
    many = clip.encode_images([picture(seed) for seed in range(20)])
    torch.testing.assert_close(many[19:], clip.encode_images([picture(19)]))


def test_dino_judges_subjects_and_clip_prompts_where_the_operator_has_them(
    clip_folder: Path, dino_folder: Path, tiny_parts: BaseParts
) -> None:
    def names(clip: Path | None, dino: Path | None) -> tuple[list[str], str]:
        judges = open_judges(tiny_parts, clip and str(clip), dino and str(dino))
        return [encoder.name for encoder in judges.subject], judges.prompt.name

    assert names(clip_folder, dino_folder) == (["dino", "clip"], "clip")
    assert names(clip_folder, None) == (["clip"], "clip")
    assert names(None, dino_folder) == (["dino"], "base-classifier-2")
    assert names(None, None) == (["base-features"], "base-classifier-2")


def test_an_encoder_that_is_not_here_is_refused_with_what_to_do() -> None:
    with pytest.raises(InvalidRequest, match="folder"):
        encoder_folder("/no/such/folder")
    with pytest.raises(InvalidRequest, match="hf download nobody/no-encoder"):
        encoder_folder("nobody/no-encoder")


def test_a_folder_of_another_model_is_refused(clip_folder: Path, dino_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="model_type 'clip'"):
        Dino(clip_folder, CPU)
    with pytest.raises(InvalidRequest, match="is no CLIP"):
        Clip(dino_folder, CPU)
    with pytest.raises(InvalidRequest, match=r"config\.json"):
        Clip(dino_folder.parent, CPU)


def test_pickled_weights_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InvalidRequest, match="safetensors"):
        Clip(tmp_path, CPU)


def test_a_preprocessing_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"no preprocessor_config\.json"):
        Preprocessing.read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5]}))
    with pytest.raises(InvalidRequest, match="image_std"):
        Preprocessing.read(tmp_path)


def test_a_picture_smaller_than_the_cut_gets_a_black_border(tmp_path: Path) -> None:
    config = {"do_resize": False, "do_center_crop": True, "crop_size": 8, "do_normalize": False}
    config |= {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    pixels = Preprocessing.read(tmp_path)(Image.new("RGB", (4, 6), "white"))
    assert pixels.shape == (3, 8, 8)
    assert pixels.sum() == pytest.approx(3 * 4 * 6)
