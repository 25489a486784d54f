"""The finished model as a plain diffusers folder, fp16 safetensors."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from lookalike_trainers.pretrain.denoiser import Denoiser
from lookalike_trainers.pretrain.runs import load_checkpoint


def export(model: Denoiser, vae: Any, tokenizer: Any, run: Path, folder: Path) -> None:
    """Write ``folder`` from the run's denoiser, if it trained one, and the other parts as given.

    The denoiser's averaged weights are exported, not the last step's.  Each part is written
    beside and moved into place; other files of ``folder`` (the card) stay.
    """
    trained = load_checkpoint(run / "denoiser.pt")
    if trained is not None:
        model.load_state_dict(trained["ema"], strict=False)
        (run / "losses.json").write_text(json.dumps(trained["losses"]))
    write_folder(model, vae, tokenizer, folder)


def write_folder(model: Denoiser, vae: Any, tokenizer: Any, folder: Path) -> None:
    """Write the five parts of a ``StableDiffusionPipeline`` into ``folder``.

    Parts are ones that no code of ours is needed to load; ``from_pretrained`` reads them.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=model.text_encoder.half(),
        tokenizer=tokenizer,
        unet=model.unet.half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        new = Path(name)
        pipe.save_pretrained(new)
        for config in new.rglob("*.json"):
            _forget_paths(config)
        _load_text_encoder_in_float32(new / "text_encoder" / "config.json")
        for part in new.iterdir():
            old = folder / part.name
            if old.is_dir():
                shutil.rmtree(old)
            part.replace(old)
    for network in (vae, model):
        network.to(torch.float32)


def _forget_paths(config: Path) -> None:
    """Drop the folder that a part was loaded from: it names this machine, not the model."""
    content = json.loads(config.read_text())
    if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
        config.write_text(json.dumps(content, indent=2) + "\n")


def _load_text_encoder_in_float32(config: Path) -> None:
    """Say float32 in the text encoder's config.

    transformers loads in the type that its config names and diffusers in float32: a pipeline
    loaded without a ``dtype`` would mix the two and fail at the first step.  A ``dtype`` given
    still rules.
    """
    content = json.loads(config.read_text())
    content["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2) + "\n")
