"""LoRA training on the bundled base: our step, the textbook loop's, and the bare step.

ours      the loop's own step: data from the caches, DeepSpeed engine (ZeRO 0, one process)
textbook  what diffusers' example scripts do in every step: open the photos, cut them, run the
          autoencoder and the text encoder, then the same forward, backward and AdamW step;
          with photos of 2048 x 2048 pixels, a third of what a phone takes
small     the same with the demo's own photos, which are small already
bare      forward, backward, clipping and AdamW step on one batch of cached inputs, nothing else

They take turns in one process, with equal batches and threads; medians are compared.
Bars: ours at least 2.0 times the textbook's rate, and at least 0.95 of the bare step's.
"""

import argparse
import tempfile
from pathlib import Path

import steps
import torch
from PIL import Image

from lookalike_datasets.features.latents import square, to_pixels
from lookalike_platform.conditioning import predict
from lookalike_trainers.objective import weighted_mse

TAKEN = 2048


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--photos", type=Path, default=steps.DEMO)
    options.add_argument("--rounds", type=int, default=40)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as home:
        run = steps.prepared("lora", given.photos, Path(home))
        photos = steps.pictures(given.photos)
        medians = steps.medians(
            {
                "ours": steps.ours(run),
                "textbook": textbook(run, [_as_taken(path, Path(home)) for path in photos]),
                "small": textbook(run, photos),
                "bare": steps.bare(run),
            },
            given.rounds,
        )
    for name, median in medians.items():
        print(f"{name:9} {median * 1000:8.1f} ms a step (median of {given.rounds})")
    mine = medians["ours"]
    print(f"ours / textbook rate  {medians['textbook'] / mine:.2f}   bar 2.00")
    print(f"        small photos  {medians['small'] / mine:.2f}")
    print(f"ours / bare rate      {medians['bare'] / mine:.3f}  bar 0.950")


def textbook(run: steps.Run, photos: list[Path]) -> steps.Step:
    parts, config, schedule = run.parts(), run.config, run.data.schedule
    vae, _ = parts.vae, parts.text_encoders
    method = run.method()
    trained = [p for group in method.parameter_groups() for p in group["params"]]
    optimizer = torch.optim.AdamW(method.parameter_groups(), weight_decay=config.weight_decay)
    side = config.resolution
    assert side is not None

    def step(number: int) -> None:
        size = config.batch_size
        chosen = [photos[(number * size + i) % len(photos)] for i in range(size)]
        pixels = torch.stack([to_pixels(square(Image.open(path), side)) for path in chosen])
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * run.data.scaling_factor
            text = parts.encode([f"a sks {steps.CLASS_NOUN}"] * size, side)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(schedule.timesteps, (size,))
        noisy = schedule.noised(latents, noise, timesteps)
        predicted = predict(method.module.unet, noisy, timesteps, text)
        weight = schedule.weight(timesteps, config.min_snr_gamma) / size
        loss = weighted_mse(predicted, schedule.target(latents, noise, timesteps), weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # the progress bar's

    return step


def _as_taken(path: Path, folder: Path) -> Path:
    """The picture as a JPEG of `TAKEN` x `TAKEN` pixels."""
    taken = folder / f"{path.stem}.jpg"
    Image.open(path).convert("RGB").resize((TAKEN, TAKEN), Image.Resampling.LANCZOS).save(taken)
    return taken


if __name__ == "__main__":
    main()
