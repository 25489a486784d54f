"""LoRA training on the bundled base: our step, the textbook loop's, and the bare step.

ours      the loop's own step: data from the caches, DeepSpeed engine (ZeRO 0, one process)
textbook  what diffusers' example scripts do in every step: open the photos, cut them, run the
          autoencoder and the text encoder, then the same forward, backward and AdamW step;
          with photos of 2048 x 2048 pixels, a third of what a phone takes
small     the same with the demo's own photos, which are small already
bare      forward, backward and AdamW step on one batch of cached inputs, and nothing else

They take turns in one process, with equal batches and threads; medians are compared.
Bars: ours at least 2.0 times the textbook's rate, and at least 0.95 of the bare step's.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}

import torch
from PIL import Image

from lookalike_datasets.features.latents import square, to_pixels
from lookalike_datasets.features.text import tokenize
from lookalike_platform import bases
from lookalike_platform.files import sha256_file
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import LoraConfig, RunImage, RunRequest
from lookalike_trainers.data import TrainingData
from lookalike_trainers.engine import make_engine
from lookalike_trainers.loop import optimizer_step
from lookalike_trainers.methods.lora import Lora
from lookalike_trainers.prepare import prepare

TAKEN = 2048
DEMO = "api/lookalike_api/demo/bibo"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--photos", type=Path, default=Path(__file__).parents[1] / DEMO)
    options.add_argument("--rounds", type=int, default=40)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as home:
        steps = _steps(Settings(home=Path(home)), given.photos, Path(home))
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(given.rounds + 3):
            for name, step in steps.items():
                started = time.perf_counter()
                step(number)
                if number >= 3:  # the first rounds warm up
                    times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:9} {median * 1000:8.1f} ms a step (median of {given.rounds})")
    ours = medians["ours"]
    print(f"ours / textbook rate  {medians['textbook'] / ours:.2f}   bar 2.00")
    print(f"        small photos  {medians['small'] / ours:.2f}")
    print(f"ours / bare rate      {medians['bare'] / ours:.3f}  bar 0.950")


def _steps(settings: Settings, photos: Path, folder: Path) -> dict[str, Callable[[int], None]]:
    base = bases.resolve("pocket-64", settings)
    config = LoraConfig(resolution=base.resolution)
    paths = sorted(p for p in photos.iterdir() if p.suffix in {".png", ".jpg", ".webp"})
    request = RunRequest(
        job_id="benchmark",
        owner="benchmark",
        concept="benchmark",
        class_noun="robot",
        method="lora",
        config=config.model_dump(mode="json"),
        base_name=base.name,
        base_folder=base.folder,
        base_fingerprint=base.fingerprint,
        base_family=base.family,
        prediction_type=base.prediction_type,
        images=[RunImage(path=p, sha256=sha256_file(p)) for p in paths],
        cache=settings.cache,
        device="cpu",
    )
    device = torch.device("cpu")
    parts = BaseParts(base.folder, device)
    data, _ = prepare(request, config, parts, False, lambda message: None)
    return {
        "ours": _ours(Lora(parts, config), data, config, device),
        "textbook": _textbook(parts, [_as_taken(path, folder) for path in paths], data),
        "small": _textbook(parts, paths, data),
        "bare": _bare(Lora(BaseParts(base.folder, device), config), data),
    }


def _ours(
    method: Any, data: TrainingData, config: LoraConfig, device: torch.device
) -> Callable[[int], None]:
    engine = make_engine(
        method.module, method.parameter_groups(), config, device=device, world=1, zero_stage=0
    )

    def step(number: int) -> None:
        optimizer_step(method, data, engine, config, number, False, 0)

    return step


def _as_taken(path: Path, folder: Path) -> Path:
    """The picture as a JPEG of `TAKEN` x `TAKEN` pixels."""
    taken = folder / f"{path.stem}.jpg"
    Image.open(path).convert("RGB").resize((TAKEN, TAKEN), Image.Resampling.LANCZOS).save(taken)
    return taken


def _textbook(parts: BaseParts, paths: list[Path], data: TrainingData) -> Callable[[int], None]:
    config, schedule = data.config, data.schedule
    assert isinstance(config, LoraConfig)
    method = Lora(BaseParts(parts.folder, parts.device), config)
    optimizer = torch.optim.AdamW(method.parameter_groups(), weight_decay=config.weight_decay)
    vae, text_encoder, tokenizer = parts.vae, parts.text_encoder, parts.tokenizer
    assert config.resolution is not None

    def step(number: int) -> None:
        chosen = [paths[(number * config.batch_size + i) % len(paths)] for i in range(4)]
        pixels = torch.stack([to_pixels(square(Image.open(p), config.resolution)) for p in chosen])
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * data.scaling_factor
            features = text_encoder(tokenize(tokenizer, ["a sks robot"] * 4))[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(schedule.timesteps, (len(latents),))
        predicted = method.module(schedule.noised(latents, noise, timesteps), timesteps, features)
        weight = schedule.weight(timesteps, config.min_snr_gamma) / len(latents)
        loss = method.loss(predicted, schedule.target(latents, noise, timesteps), weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(_parameters(method), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # the progress bar's

    return step


def _bare(method: Any, data: TrainingData) -> Callable[[int], None]:
    optimizer = torch.optim.AdamW(
        method.parameter_groups(), weight_decay=data.config.weight_decay, fused=True
    )
    batch = data.batch(0, 0, 0, 1)

    def step(number: int) -> None:
        predicted = method.module(batch.noisy, batch.timesteps, batch.text)
        method.loss(predicted, batch.target, batch.weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _parameters(method: Any) -> list[torch.nn.Parameter]:
    return [p for group in method.parameter_groups() for p in group["params"]]


if __name__ == "__main__":
    main()
