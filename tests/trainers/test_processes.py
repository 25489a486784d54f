"""Training through torchrun and DeepSpeed, for real: one process, two processes, ZeRO 0, 2 and 3.

All runs of a number of processes share one launch (support_ranks.py).
"""

from pathlib import Path

import pytest

from support_images import photo
from support_models import TOKENS, save_base
from support_ranks import Outcome, Scenario, launch

pytestmark = pytest.mark.processes

STEPS, SAVED = 5, 2
WHOLE = {
    "steps": STEPS,
    "batch_size": 4,
    "checkpoint_every": SAVED,
    "keep_checkpoints": STEPS,
    "rank": 2,
    "caption_dropout": 0.3,
}
HALF = WHOLE | {"batch_size": 2}
EVERYTHING = HALF | {
    "steps": 2,
    "train_text_encoder": True,
    "gradient_checkpointing": True,
    "prior": {"num_images": 3, "steps": 2},
}

ALONE = [
    Scenario("plain", WHOLE),
    Scenario("again", WHOLE),
    Scenario("other seed", WHOLE | {"seed": 1}),
    Scenario("accumulated", HALF | {"gradient_accumulation_steps": 2}),
    Scenario("resumed", WHOLE, resume=("plain", SAVED)),
    Scenario("everything", EVERYTHING | {"batch_size": 4}),
    Scenario("bf16", WHOLE | {"mixed_precision": "bf16"}),
]
TOGETHER = [
    *(Scenario(f"zero {stage}", HALF, stage) for stage in (0, 2, 3)),
    *(Scenario(f"zero {stage} resumed", HALF, stage, (f"zero {stage}", SAVED)) for stage in (2, 3)),
    *(Scenario(f"zero {stage} everything", EVERYTHING, stage) for stage in (0, 2, 3)),
    Scenario("zero 0, resumed at 2", HALF, 2, resume=("zero 0", SAVED)),
    Scenario("bad loss", HALF, 0, breaks=(SAVED, 1, "loss")),
    Scenario("bad loss, zero 3", HALF, 3, breaks=(SAVED, 1, "loss")),
    Scenario("bad gradient", HALF, 0, breaks=(SAVED, 1, "gradient")),
    Scenario("bad gradient, zero 2", HALF, 2, breaks=(SAVED, 1, "gradient")),
]


def prepared(folder: Path) -> Path:
    save_base(folder / "base")
    (folder / "photos").mkdir()
    for number in range(3):
        (folder / "photos" / f"{number}.jpg").write_bytes(photo(number))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Outcome]:
    return launch(folder, ALONE, world=1)[0]


@pytest.fixture(scope="module")
def together(folder: Path) -> list[dict[str, Outcome]]:
    return launch(folder, TOGETHER, world=2)


def losses_of_a_textbook_loop(folder: Path) -> list[float]:
    """LoRA as PEFT's and diffusers' own examples train it, on the same luck."""
    import numpy
    import peft
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image, ImageOps
    from torch.nn import functional as F
    from transformers import CLIPTextModel, CLIPTokenizer

    from lookalike_trainers.draws import draw

    base = folder / "base"
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")

    torch.manual_seed(0)
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=1e-2)

    def encode_text(prompt: str) -> torch.Tensor:
        whole = {"padding": "max_length", "max_length": TOKENS}
        ids = tokenizer(prompt, **whole, return_tensors="pt").input_ids
        with torch.no_grad():
            features: torch.Tensor = encoder(ids)[0][0]
        return features

    photos = []
    for path in sorted((folder / "photos").iterdir()):
        square = ImageOps.fit(Image.open(path), (64, 64), Image.Resampling.LANCZOS)
        photos.append(torch.from_numpy(numpy.array(square)).permute(2, 0, 1) / 127.5 - 1)

    losses = []
    for step in range(STEPS):
        luck = [
            draw(
                *(0, step, place),
                position=4 * step + place,
                photos=3,
                timesteps=1000,
                caption_dropout=0.3,
                noise_offset=0.0,
                shape=(4, 16, 16),
                of="instance",
            )
            for place in range(4)
        ]
        with torch.no_grad():
            posterior = vae.encode(torch.stack([photos[d.photo] for d in luck])).latent_dist
        latents = posterior.mean + posterior.std * torch.stack([d.posterior for d in luck])
        latents = latents * vae.config.scaling_factor
        noise = torch.stack([d.noise for d in luck])
        timesteps = torch.tensor([d.timestep for d in luck])
        text = torch.stack([encode_text("" if d.drop_caption else "a sks dog") for d in luck])
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, text).sample
        signal = scheduler.alphas_cumprod[timesteps]
        snr = signal / (1 - signal)
        errors = F.mse_loss(prediction, noise, reduction="none").mean(dim=(1, 2, 3))
        loss = (errors * snr.clamp(max=5) / snr).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_the_losses_are_those_of_a_textbook_loop(alone: dict[str, Outcome], folder: Path) -> None:
    assert alone["plain"].losses == pytest.approx(losses_of_a_textbook_loop(folder), abs=1e-5)


def test_the_same_seed_gives_the_same_adapter_file_and_another_seed_another(
    alone: dict[str, Outcome],
) -> None:
    assert alone["again"].adapter == alone["plain"].adapter
    assert alone["again"].weights == alone["plain"].weights
    assert alone["other seed"].adapter != alone["plain"].adapter


def test_accumulated_micro_batches_train_like_one_batch(alone: dict[str, Outcome]) -> None:
    assert alone["accumulated"].losses == pytest.approx(alone["plain"].losses, abs=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    alone: dict[str, Outcome],
) -> None:
    resumed, plain = alone["resumed"], alone["plain"]
    assert resumed.losses == plain.losses
    assert resumed.weights == plain.weights[SAVED:]
    assert resumed.adapter == plain.adapter


def test_bf16_follows_float32_closely_but_is_not_it(alone: dict[str, Outcome]) -> None:
    bf16, plain = alone["bf16"], alone["plain"]
    assert bf16.losses != plain.losses
    assert bf16.losses == pytest.approx(plain.losses, rel=0.02)
    assert bf16.frozen_kept


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_train_like_one_with_the_same_global_batch(
    alone: dict[str, Outcome], together: list[dict[str, Outcome]], stage: int
) -> None:
    for rank in together:
        assert rank[f"zero {stage}"].losses == pytest.approx(alone["plain"].losses, abs=1e-5)
    everything = together[0][f"zero {stage} everything"].losses
    assert everything == pytest.approx(alone["everything"].losses, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_processes_hold_the_same_weights_after_every_step(
    together: list[dict[str, Outcome]], stage: int
) -> None:
    first, second = (rank[f"zero {stage}"] for rank in together)
    assert len(first.weights) == STEPS
    assert len(set(first.weights)) == STEPS
    assert first.weights == second.weights


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_resume_bit_for_bit_from_shares_of_the_state(
    together: list[dict[str, Outcome]], stage: int
) -> None:
    resumed, plain = together[0][f"zero {stage} resumed"], together[0][f"zero {stage}"]
    assert resumed.losses == plain.losses
    assert resumed.weights == plain.weights[SAVED:]


def test_a_checkpoint_serves_another_zero_stage(together: list[dict[str, Outcome]]) -> None:
    resumed, plain = together[0]["zero 0, resumed at 2"], together[0]["zero 0"]
    assert resumed.losses == pytest.approx(plain.losses, abs=1e-6)


def test_every_declared_parameter_moves_and_no_other(
    alone: dict[str, Outcome], together: list[dict[str, Outcome]]
) -> None:
    """The text encoder's too, under gradient checkpointing."""
    runs = [alone["plain"], alone["everything"]]
    runs += [together[0][f"zero {stage} everything"] for stage in (0, 2, 3)]
    for run in runs:
        assert all(run.moved.values()), [name for name, moved in run.moved.items() if not moved]
        assert run.frozen_kept
    assert all(name.startswith("unet.") for name in runs[0].moved)
    parts = {name.partition(".")[0] for name in runs[1].moved}
    assert parts == {"unet", "text_encoders"}
    assert all(".lora_" in name for name in runs[1].moved)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("bad loss", "loss"),
        ("bad loss, zero 3", "loss"),
        ("bad gradient", "gradient"),
        ("bad gradient, zero 2", "gradient"),
    ],
)
def test_a_nan_in_one_process_stops_all_and_keeps_the_last_good_checkpoint(
    together: list[dict[str, Outcome]], folder: Path, name: str, what: str
) -> None:
    for rank in together:
        error = rank[name].error
        assert error is not None
        assert (error["step"], error["what"], error["checkpoint"]) == (SAVED + 1, what, SAVED)
        assert "learning rate of 0.001" in error["detail"]
        assert "try learning_rate 0.0001" in error["detail"]
    kept = sorted(p.name for p in (folder / "checkpoints2" / name).iterdir())
    assert kept == [f"step-{SAVED:06d}"]
