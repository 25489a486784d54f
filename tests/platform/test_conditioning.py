"""What denoisers are told, against diffusers' own pipelines."""

from pathlib import Path

import diffusers
import pytest
import torch

from lookalike_platform.conditioning import Text, encode, predict
from lookalike_trainers.base_parts import BaseParts
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
