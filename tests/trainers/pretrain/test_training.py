"""The stages on networks of a few thousand parameters: resume, export, the autoencoder, the CLI."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lookalike_trainers.pretrain import autoencoder
from lookalike_trainers.pretrain.autoencoder import AutoencoderConfig, edge_loss
from lookalike_trainers.pretrain.denoiser import DenoiserConfig, train
from lookalike_trainers.pretrain.export import export, write_folder
from lookalike_trainers.pretrain.latents import LatentCache, encode_scenes, open_cache, to_tensor
from lookalike_trainers.pretrain.models import (
    load_denoiser,
    load_tokenizer,
    load_trained_vae,
    load_vae,
)
from lookalike_trainers.pretrain.runs import autocast, load_checkpoint
from lookalike_trainers.pretrain.scenes import Mix, Sprites

CONFIG = DenoiserConfig(steps=6, batch_size=4, warmup=2, checkpoint_every=3)


def cache() -> LatentCache:
    rng = np.random.default_rng(0)
    return LatentCache(rng.normal(size=(16, 4, 16, 16)).astype(np.float16), ["a cat"] * 16)


def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop in the middle, with the same end in sight, changes no bit of weights or average."""
    tokenizer = load_tokenizer(tiny_folder)
    whole = train(load_denoiser(tiny_folder), tokenizer, cache(), tmp_path / "whole", CONFIG)

    class StopAfterThree:
        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            return self.asked > 3

    with monkeypatch.context() as patch:
        patch.setattr("lookalike_trainers.pretrain.denoiser.StopSignal", StopAfterThree)
        half = train(load_denoiser(tiny_folder), tokenizer, cache(), tmp_path / "half", CONFIG)
    assert half["step"] == 3
    resumed = train(load_denoiser(tiny_folder), tokenizer, cache(), tmp_path / "half", CONFIG)
    for part in ("model", "ema"):
        assert all(torch.equal(whole[part][k], resumed[part][k]) for k in whole[part])


def test_the_exported_folder_is_plain_diffusers(tiny_folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    run, folder = tmp_path / "run", tmp_path / "out"
    model, tokenizer = load_denoiser(tiny_folder), load_tokenizer(tiny_folder)
    state = train(model, tokenizer, cache(), run, CONFIG)
    folder.mkdir()
    (folder / "README.md").write_text("kept")
    export(model, load_vae(tiny_folder), tokenizer, run, folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, state["ema"][f"unet.{name}"].half().float())
    assert (folder / "README.md").read_text() == "kept"
    assert "_name_or_path" not in (folder / "unet" / "config.json").read_text()
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a cat", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)


def test_tokenizer_knows_the_words_it_was_taught(tiny_folder: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    ids = tokenizer("a Painting of a cat").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) == 7
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "a painting of a cat"


def test_latents_are_the_scaled_mean_of_the_encoder(
    tiny_folder: Path, tmp_path: Path, sprites: Sprites
) -> None:
    from lookalike_trainers.pretrain.latents import paint_scenes, training_pairs

    vae, nouns = load_vae(tiny_folder), ["cat", "dog", "fox"]
    encode_scenes(tmp_path, 5, nouns, sprites, vae, Mix(), seed=4)
    opened = open_cache(tmp_path)
    scenes = list(paint_scenes(5, training_pairs(nouns), sprites, Mix(), seed=4))
    assert opened.captions == [text for text, _ in scenes]
    with torch.no_grad(), autocast():
        mean = vae.encode(to_tensor([p for _, p in scenes])).latent_dist.mean
    expected = (mean.float() * vae.config.scaling_factor).numpy()
    np.testing.assert_allclose(opened.latents, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("decoder_only", [False, True])
def test_autoencoder_learns_and_may_leave_the_encoder_alone(
    tiny_folder: Path, tmp_path: Path, sprites: Sprites, decoder_only: bool
) -> None:
    vae = load_vae(tiny_folder)
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    config = AutoencoderConfig(steps=2, batch_size=2, decoder_only=decoder_only)
    photos = [np.full((64, 64, 3), 90, np.uint8)]
    autoencoder.train(vae, sorted(sprites), sprites, photos, tmp_path, config)
    state = load_checkpoint(tmp_path / "autoencoder.pt")
    assert state is not None
    moved = {k.split(".")[0] for k, v in state["model"].items() if not torch.equal(v, before[k])}
    assert "decoder" in moved
    assert ("encoder" in moved) is not decoder_only


def test_a_trained_autoencoders_latents_are_scaled_to_unit_variance(
    tiny_folder: Path, tmp_path: Path, sprites: Sprites
) -> None:
    config = AutoencoderConfig(steps=2, batch_size=2)
    photos = [np.full((64, 64, 3), 90, np.uint8)]
    autoencoder.train(load_vae(tiny_folder), sorted(sprites), sprites, photos, tmp_path, config)
    vae = load_trained_vae(tiny_folder, tmp_path)
    encode_scenes(tmp_path, 256, ["cat", "dog", "fox"], sprites, vae, Mix(), seed=1)
    assert open_cache(tmp_path).latents.astype(np.float32).std() == pytest.approx(1, rel=0.03)
    write_folder(load_denoiser(tiny_folder), vae, load_tokenizer(tiny_folder), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "vae" / "config.json").read_text())
    assert written["scaling_factor"] == vae.config.scaling_factor


def test_edge_loss_sees_edges_and_not_brightness() -> None:
    a = torch.zeros(1, 3, 8, 8)
    assert edge_loss(a, a + 0.3) == pytest.approx(0, abs=1e-12)
    b = a.clone()
    b[..., 4:] = 1
    # One of 7 differences at full size, one of 3 at half size.
    assert float(edge_loss(a, b)) == pytest.approx(1 / 7 + 1 / 3)


def test_the_command_line_imports_without_torch() -> None:
    code = "import sys; import lookalike_trainers.pretrain.cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
