"""``lookalike pretrain``: the recipe of the bundled base model, stage by stage.

Heavy imports wait inside the commands: importing this module must not import torch.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import TypeAdapter, ValidationError

from lookalike_platform.errors import InvalidRequest, NotFound, UnknownBase

app = typer.Typer(help="Make the bundled base model: data, training, evaluation, model card.")

Data = Annotated[Path, typer.Option(help="Prepared data; made by `data`.")]
Run = Annotated[Path, typer.Option(help="Checkpoints of this run; given again, it resumes.")]
Start = Annotated[Path, typer.Option(help="Diffusers folder to start from.")]

DEFAULT_DATA = Path(typer.get_app_dir("lookalike")) / "pretrain" / "data"
DEFAULT_RUN = Path(typer.get_app_dir("lookalike")) / "pretrain" / "run"


def _made(path: Path, how: str) -> Path:
    """``path``; raises ``NotFound`` that says how it is made where an earlier stage has not run."""
    if not path.exists():
        raise NotFound(f"there is no {path}: {how}")
    return path


def _folder(start: Path) -> Path:
    advice = "name a diffusers folder, such as `lookalike pretrain text` makes"
    _made(start / "model_index.json", advice)
    files = [
        "tokenizer/*",
        *(f"{part}/config.json" for part in ("text_encoder", "unet", "vae")),
        *(f"{part}/*.safetensors" for part in ("text_encoder", "unet", "vae")),
    ]
    missing = [pattern for pattern in files if not any(start.glob(pattern))]
    if missing:
        raise UnknownBase(f"{start} has no {', '.join(missing)}: {advice}")
    return start


def _nouns(data: Path, part: Literal["training", "held_out"] = "training") -> list[str]:
    path = _made(data / "nouns.json", "run `lookalike pretrain data` first")
    try:
        nouns = TypeAdapter(dict[str, list[str]]).validate_json(path.read_bytes())[part]
    except (ValidationError, KeyError):
        raise InvalidRequest(f"{path} is damaged: run `lookalike pretrain data` again") from None
    return nouns


@app.command()
def data(data: Data = DEFAULT_DATA) -> None:
    """Fetch the art's packages with npm and apt-get, and prepare sprites and photographs."""
    from lookalike_trainers.pretrain.sources import fetch, prepare

    fetch(data)
    prepare(data)


@app.command()
def text(
    folder: Annotated[Path, typer.Argument(help="Diffusers folder to make.")],
    data: Data = DEFAULT_DATA,
) -> None:
    """Learn the tokenizer and write untrained networks: the start of a run from nothing."""
    from lookalike_trainers.pretrain.latents import paint_scenes, training_pairs
    from lookalike_trainers.pretrain.scenes import Mix, load_sprites
    from lookalike_trainers.pretrain.text import Sizes, new_folder

    nouns = _nouns(data)
    scenes = paint_scenes(10_000, training_pairs(nouns), load_sprites(data, nouns), Mix(), 0)
    new_folder(folder, [caption for caption, _ in scenes], Sizes())


@app.command()
def autoencoder(
    start: Start,
    data: Data = DEFAULT_DATA,
    run: Run = DEFAULT_RUN,
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    decoder_only: Annotated[bool, typer.Option(help="Keep the latent space as it is.")] = False,
) -> None:
    """Train the autoencoder on composites and photographs."""
    from lookalike_trainers.pretrain.autoencoder import AutoencoderConfig, train
    from lookalike_trainers.pretrain.latents import training_pairs
    from lookalike_trainers.pretrain.models import load_vae
    from lookalike_trainers.pretrain.photos import load_crops, split_crops
    from lookalike_trainers.pretrain.scenes import load_sprites

    nouns = _nouns(data)
    photos, _ = split_crops(load_crops(data / "photos"))
    config = AutoencoderConfig(steps=steps, decoder_only=decoder_only)
    sprites = load_sprites(data, nouns)
    train(load_vae(_folder(start)), training_pairs(nouns), sprites, photos, run, config)


@app.command()
def latents(
    start: Start,
    data: Data = DEFAULT_DATA,
    run: Run = DEFAULT_RUN,
    scenes: Annotated[int, typer.Option(min=64)] = 16384,
) -> None:
    """Paint the training scenes and cache their latents."""
    from lookalike_trainers.pretrain.latents import encode_scenes
    from lookalike_trainers.pretrain.models import load_trained_vae
    from lookalike_trainers.pretrain.scenes import Mix, load_sprites

    nouns, vae = _nouns(data), load_trained_vae(_folder(start), run)
    encode_scenes(run / "latents", scenes, nouns, load_sprites(data, nouns), vae, Mix())


@app.command()
def denoiser(
    start: Start,
    run: Run = DEFAULT_RUN,
    steps: Annotated[int, typer.Option(min=1)] = 6000,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(min=0)] = 8e-4,
) -> None:
    """Train text encoder and UNet on the cached latents."""
    from lookalike_trainers.pretrain.denoiser import DenoiserConfig, train
    from lookalike_trainers.pretrain.latents import open_cache
    from lookalike_trainers.pretrain.models import load_denoiser, load_tokenizer

    config = DenoiserConfig(steps=steps, batch_size=batch_size, peak_lr=lr)
    _made(run / "latents" / "captions.json", "run `lookalike pretrain latents` first")
    cache = open_cache(run / "latents")
    train(load_denoiser(_folder(start)), load_tokenizer(start), cache, run, config)


@app.command()
def export(
    start: Start,
    folder: Annotated[Path, typer.Argument(help="Diffusers folder to write.")],
    run: Run = DEFAULT_RUN,
) -> None:
    """Write the run's weights as a plain diffusers folder, and its losses beside the run."""
    from lookalike_trainers.pretrain.export import export as write
    from lookalike_trainers.pretrain.models import load_denoiser, load_tokenizer, load_trained_vae

    vae = load_trained_vae(_folder(start), run)
    write(load_denoiser(start), vae, load_tokenizer(start), run, folder)


@app.command()
def judge(
    data: Data = DEFAULT_DATA,
    run: Run = DEFAULT_RUN,
    steps: Annotated[int, typer.Option(min=1)] = 2500,
) -> None:
    """Train the judge of `evaluate` on composites of real sprites."""
    from lookalike_trainers.pretrain.judge import train_judge
    from lookalike_trainers.pretrain.scenes import load_sprites

    nouns = _nouns(data)
    train_judge(nouns, load_sprites(data, nouns), run, steps=steps)


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Diffusers folder to measure.")],
    data: Data = DEFAULT_DATA,
    run: Run = DEFAULT_RUN,
    prompts: Annotated[int, typer.Option(min=5)] = 500,
    judge_steps: Annotated[int, typer.Option(min=1)] = 2500,
    photos: Annotated[
        Path | None, typer.Option(help="Photographs never seen, in a folder and those below it.")
    ] = None,
    autoencoder_only: Annotated[
        bool, typer.Option(help="Measure no painting: no judge is trained, nothing is written.")
    ] = False,
) -> None:
    """Measure the quality bars, print them and keep them for `card`."""
    from rich.console import Console
    from rich.table import Table

    from lookalike_trainers.pretrain.evaluate import autoencoder_bars, painting_bars
    from lookalike_trainers.pretrain.judge import train_judge
    from lookalike_trainers.pretrain.photos import crops_below, load_crops, split_crops
    from lookalike_trainers.pretrain.scenes import load_sprites

    _folder(folder)
    nouns = _nouns(data)
    sprites = load_sprites(data, nouns)
    _, held = split_crops(load_crops(data / "photos"))
    unseen = crops_below(photos) if photos else []
    bars = autoencoder_bars(folder, nouns, sprites, held, unseen, prompts=prompts)
    if not autoencoder_only:
        judge = train_judge(nouns, sprites, run, steps=judge_steps)
        bars += painting_bars(folder, judge, nouns, sprites, prompts=prompts)

    table = Table("figure", "measured", "demanded", "met", "real sprites", "autoencoded")
    for bar in bars:
        demanded = "" if bar.demanded is None else f"{bar.demanded:g}"
        met = "" if bar.demanded is None else ("yes" if bar.met else "no")
        limits = ["" if limit is None else f"{limit:.3f}" for limit in (bar.judge, bar.ceiling)]
        table.add_row(bar.name, f"{bar.measured:.3f}", demanded, met, *limits)
    Console().print(table)
    if not autoencoder_only:
        content = {"prompts": prompts, "bars": [bar.as_dict() for bar in bars]}
        (run / "evaluation.json").write_text(json.dumps(content, indent=1))


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Diffusers folder to describe.")],
    notes: Annotated[Path, typer.Option(help="JSON with `history` and `caveat`.")],
    data: Data = DEFAULT_DATA,
    run: Run = DEFAULT_RUN,
) -> None:
    """Paint the sample grid and write the model card; needs `evaluate` and `export` before."""
    from lookalike_trainers.pretrain.card import (
        read_notes,
        sample_scenes,
        write_card,
        write_samples,
    )
    from lookalike_trainers.pretrain.sampling import load_pipeline, sample
    from lookalike_trainers.pretrain.scenes import caption

    nouns = _nouns(data)
    said = read_notes(_made(notes, "write the `history` and the `caveat` of the model there"))
    _made(run / "evaluation.json", "run `lookalike pretrain evaluate` first")
    _made(run / "losses.json", "run `lookalike pretrain export` first")
    scenes = sample_scenes(nouns)
    prompts = [caption(scene) for scene in scenes]
    pictures = sample(load_pipeline(_folder(folder)), prompts, guidance=4, steps=30)
    write_samples(folder, scenes, pictures)
    write_card(folder, nouns, _nouns(data, "held_out"), run, said)
