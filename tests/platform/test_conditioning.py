"""What denoisers are told, against diffusers' own pipelines."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from lookalike_platform.conditioning import Text, encode, predict
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.tokens import learn_rows
from support_models import RESOLUTION, TOKENS, WIDTH, save_base


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("xl"), "sdxl")


def test_sdxl_reads_a_prompt_as_diffusers_has_it_read(xl: Path) -> None:
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(xl)
    theirs = pipeline.encode_prompt("a dog", do_classifier_free_guidance=True)
    parts = BaseParts(xl, torch.device("cpu"))
    with torch.no_grad():
        ours, blank = parts.encode(["a dog"], RESOLUTION), parts.blank(RESOLUTION)
    assert ours.features.shape == (1, TOKENS, 2 * WIDTH)
    for mine, other in zip(
        (ours.features, blank.features, ours.pooled, blank.pooled), theirs, strict=True
    ):
        torch.testing.assert_close(mine, other)
    sizes = pipeline._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, WIDTH)
    torch.testing.assert_close(ours.time_ids, sizes)


def test_rows_and_copies_keep_all_a_prompt_says(xl: Path) -> None:
    parts = BaseParts(xl, torch.device("cpu"))
    with torch.no_grad():
        both = parts.encode(["a dog", "a cat"], RESOLUTION)
        apart = Text.cat([parts.encode([p], RESOLUTION) for p in ("a dog", "a cat")])
    for name, tensor in both.tensors().items():
        torch.testing.assert_close(tensor, apart.tensors()[name])
    again = both[[1, 0]][1:].expand(3)
    assert len(again) == 3
    for name, tensor in again.tensors().items():
        torch.testing.assert_close(tensor, both[:1].expand(3).tensors()[name])


def test_sdxls_answer_depends_on_the_summary_and_on_the_sizes(xl: Path) -> None:
    parts = BaseParts(xl, torch.device("cpu"))
    noisy, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.no_grad():
        text = parts.encode(["a dog"], RESOLUTION)
        larger = encode(parts.text_encoders, parts.ids(["a dog"]), 8 * RESOLUTION)
        other = parts.encode(["a cat"], RESOLUTION)
        answer = predict(parts.unet, noisy, t, text)
        assert not torch.equal(answer, predict(parts.unet, noisy, t, larger))
        swapped = Text(text.features, other.pooled, text.time_ids)
        assert not torch.equal(answer, predict(parts.unet, noisy, t, swapped))


def test_a_learned_word_is_not_taken_for_the_end_where_a_configuration_names_a_wrong_one(
    xl: Path, tmp_path: Path
) -> None:
    """As SDXL's published one does: `eos_token_id` 2."""
    shutil.copytree(xl, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "text_encoder_2/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 2}))

    def summary(base: Path) -> torch.Tensor:
        parts = BaseParts(base, torch.device("cpu"))
        parts.learn("sks", 1)
        learn_rows(parts, parts.text_encoders, "sks", "dog")
        with torch.no_grad():
            pooled = parts.encode(["a sks in the snow"], RESOLUTION).pooled
        assert pooled is not None
        return pooled

    torch.testing.assert_close(summary(tmp_path), summary(xl))


def test_sizes_stay_exact_beside_features_of_few_bits() -> None:
    text = Text(torch.zeros(1, 2, 3).bfloat16(), torch.zeros(1, 3).bfloat16(), torch.zeros(1, 6))
    sizes = torch.tensor([[1365, 2047, 0, 171, 1001, 1023]])
    for told in (text, text.to("cpu", torch.bfloat16)):
        found = told.with_time_ids(sizes).time_ids
        assert found is not None
        assert found.tolist() == sizes.tolist()
