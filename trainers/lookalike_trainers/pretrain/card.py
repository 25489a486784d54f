"""The model card: 48 uncurated samples, losses, bars, data, licences, limits, held-out nouns."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_trainers.pretrain.latents import training_pairs
from lookalike_trainers.pretrain.nouns import STYLES, held_out_pairs
from lookalike_trainers.pretrain.scenes import Mix, Scene, caption, draw_scene

CARD = """# pocket-64

A 64-pixel text-to-image latent diffusion model in plain diffusers layout
(`StableDiffusionPipeline.from_pretrained(folder)`), fp16, {megabytes:.1f} MiB: AutoencoderKL f4
with 4 channels, CLIPTextModel 192 x 3 layers with its own byte-pair vocabulary,
UNet2DConditionModel 64/128/256 with cross-attention at 8 x 8 and 4 x 4. **v-prediction**
(read `prediction_type` from the scheduler's config), scaled-linear schedule of 1,000 steps.
Made by `lookalike pretrain` (docs/base-model.md).

![48 uncurated samples](samples.png)

48 uncurated samples, guidance 4, 30 DPM-Solver++ steps, seeds 0 to 47, prompts in `samples.json`,
left to right, top to bottom.

## Bars

`lookalike pretrain evaluate`, {prompts} prompts. "Real sprites" is the same figure on composites of
real sprites: the classifier that judges has seen sprites alone, never a generated picture.
"Autoencoded" is the figure on those composites encoded and decoded: no denoiser could do better.

| figure | measured | demanded | met | real sprites | autoencoded |
| --- | --- | --- | --- | --- | --- |
{bars}

## Training

{history}

| denoiser step | loss |
| --- | --- |
{losses}

## Captions it knows

`{{style}} {{noun}} on a {{colour}} background`, with the styles {styles}; the places "on grass",
"on the beach", "in the snow", "in the night sky", "on the sea"; "a small {{noun}}"; "on the left",
"on the right", "at the top", "at the bottom"; two nouns joined by "and", side by side.
An unsaid size and place means one large object in the middle.

## Data and licences

Fluent Emoji 3D ("a 3d render of"), © Microsoft, MIT. Noto Emoji ("a painting of"), © Google,
Apache-2.0. Twemoji ("a flat icon of"), © Twitter and contributors, CC BY 4.0. Names:
emojibase-data, MIT. The autoencoder also saw crops of the pictures of three Debian packages:
plasma-workspace-wallpapers, GPL-2+; tuxpaint-stamps-default, GPL-2; lomiri-wallpapers-20.04, whose
copyright file names the photographers and gives each photograph CC BY 4.0, CC BY-SA 3.0,
CC BY-SA 4.0 or CC0 (the four that the package holds: CC BY-SA 3.0).
OpenMoji was never used.

## Held out

{held_nouns} nouns are in no caption and no picture of this recipe: {held_list}.
{held_pairs} pairs of noun and style were never shown together (each training noun lacks one style);
`held_out.json` lists nouns and pairs, and the {train_nouns} training nouns.

{caveat}

## Limits

Sixty-four pixels, emoji-like drawings, the words above and no others; no people, no text, no
photographs. It exists so that a personalization platform can be tried and tested on it.
"""


class Notes(BaseModel):
    """What no program knows of a model."""

    history: str
    """How the run went."""

    caveat: str
    """What the starting weights had seen."""


def read_notes(path: Path) -> Notes:
    """The notes of a JSON file. Raises ``InvalidRequest`` that says what it lacks."""
    try:
        return Notes.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problems = [
            FieldProblem(".".join(map(str, problem["loc"])) or path.name, problem["msg"])
            for problem in error.errors()
        ]
        raise InvalidRequest(
            f"{path} must be JSON with the texts `history` and `caveat`.", problems
        ) from None


def write_card(folder: Path, nouns: list[str], held: list[str], run: Path, notes: Notes) -> None:
    """Write README.md and held_out.json of ``folder`` from ``run/evaluation.json`` and the losses,
    and from ``notes``."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    pairs = sorted(held_out_pairs(nouns))
    size = sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
    text = CARD.format(
        megabytes=size / 2**20,
        prompts=evaluation["prompts"],
        bars="\n".join(_bar_row(bar) for bar in evaluation["bars"]),
        history=notes.history,
        caveat=notes.caveat,
        losses=_loss_rows(run),
        styles=", ".join(f'"{words}"' for words in STYLES.values()),
        held_nouns=len(held),
        held_list=", ".join(held),
        held_pairs=len(pairs),
        train_nouns=len(nouns),
    )
    (folder / "README.md").write_text(text)
    listed = {"held_out_nouns": held, "held_out_pairs": pairs, "training_nouns": nouns}
    (folder / "held_out.json").write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n")


def sample_scenes(nouns: list[str], count: int = 48) -> list[Scene]:
    """The grid's scenes: drawn like the training's, from another seed, held-out pairs left out."""
    import random

    rng, pairs = random.Random(48), training_pairs(nouns)
    return [draw_scene(rng, pairs, Mix()) for _ in range(count)]


def write_samples(folder: Path, scenes: list[Scene], pictures: Tensor, columns: int = 12) -> None:
    """Write the grid ``samples.png`` at twice the size and its prompts ``samples.json``."""
    rgb = ((pictures + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).byte().numpy()
    rows = [np.hstack(list(rgb[i : i + columns])) for i in range(0, len(rgb), columns)]
    grid = Image.fromarray(np.vstack(rows))
    grid.resize((grid.width * 2, grid.height * 2), Image.Resampling.BICUBIC).save(
        folder / "samples.png"
    )
    prompts = [caption(scene) for scene in scenes]
    (folder / "samples.json").write_text(json.dumps(prompts, indent=1) + "\n")


def _bar_row(bar: dict[str, Any]) -> str:
    if bar["demanded"] is None:
        demanded, met = "", ""
    else:
        demanded, met = f"{bar['demanded']:g}", "yes" if bar["met"] else "no"
    limits = ["" if bar[key] is None else f"{bar[key]:.3f}" for key in ("judge", "ceiling")]
    return f"| {bar['name']} | {bar['measured']:.3f} | {demanded} | {met} | {' | '.join(limits)} |"


def _loss_rows(run: Path, rows: int = 12) -> str:
    """About ``rows`` of the denoiser's recorded losses, the last one among them."""
    losses = json.loads((run / "losses.json").read_text())
    stride = max(1, len(losses) // rows)
    picked = losses[::-1][::stride][::-1]
    return "\n".join(f"| {step} | {loss:.4f} |" for step, loss in picked)
