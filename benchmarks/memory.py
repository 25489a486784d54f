"""Peak memory of LoRA training at Stable Diffusion 1.5's size: ours against the textbook loop.

ours      what a rank does: caches filled and their models let go, then steps through DeepSpeed
textbook  what diffusers' example script does: autoencoder, text encoder and UNet in memory, and in
          every step the first two run before the UNet's forward, backward and AdamW step

Both train the same rank-4 LoRA on the UNet's attention, batch 1, gradient checkpointing, in the
same precision, on random weights of the true shapes (860 + 84 + 123 million). Each runs in a fresh
process, which says its own peak of resident memory (getrusage).
Bar: ours at most 0.7 of the textbook's.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RANK = 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--resolution", type=int, default=512)
    options.add_argument("--steps", type=int, default=2)
    options.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    options.add_argument("--keep-activations", action="store_true", help="do not recompute them")
    options.add_argument("--child", choices=("base", "ours", "textbook"), help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        {"base": write_base, "ours": ours, "textbook": textbook}[given.child](given)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    with tempfile.TemporaryDirectory() as folder:
        peaks = {child: _peak(child, folder) for child in ("base", "ours", "textbook")}
    for name in ("ours", "textbook"):
        print(f"{name:9} {peaks[name] / 2**30:6.2f} GiB at the peak")
    print(f"ours / textbook  {peaks['ours'] / peaks['textbook']:.2f}   bar 0.70")


def _peak(child: str, folder: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", child, "--folder", folder]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(said.split()[-1])


def write_base(given: argparse.Namespace) -> None:
    """Random parts of SD 1.5's shapes, and a photo; the tokenizer is the bundled base's."""
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image
    from transformers import CLIPTextConfig, CLIPTextModel

    from lookalike_platform import bases
    from lookalike_platform.settings import Settings

    torch.manual_seed(0)
    folder = given.folder
    bundled = bases.resolve("pocket-64", Settings(home=folder)).folder
    shutil.copytree(bundled / "tokenizer", folder / "tokenizer")
    shutil.copy(bundled / "model_index.json", folder)
    UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
    ).save_pretrained(folder / "vae")
    CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )
    ).save_pretrained(folder / "text_encoder")
    DDPMScheduler(beta_schedule="scaled_linear").save_pretrained(folder / "scheduler")
    Image.effect_noise((768, 768), 64).convert("RGB").save(folder / "photo.jpg")


def ours(given: argparse.Namespace) -> None:
    import steps
    import torch

    from lookalike_platform.files import sha256_file
    from lookalike_trainers.method_configs import LoraConfig
    from lookalike_trainers.run_request import RunImage, RunRequest

    config = LoraConfig(
        resolution=given.resolution,
        batch_size=1,
        rank=RANK,
        mixed_precision=given.precision,
        gradient_checkpointing=not given.keep_activations,
    )
    photo = given.folder / "photo.jpg"
    request = RunRequest(
        job_id="benchmark",
        owner="benchmark",
        concept="benchmark",
        class_noun="dog",
        method="lora",
        config=json.loads(config.model_dump_json()),
        base_name="random",
        base_folder=given.folder,
        base_fingerprint="random",
        base_family="sd1",
        prediction_type="epsilon",
        images=[RunImage(path=photo, sha256=sha256_file(photo))],
        cache=given.folder / "cache",
        device="cpu",
    )
    torch.manual_seed(0)
    step = steps.ours(steps.prepare_run(request, config))
    for number in range(given.steps):
        step(number)


def textbook(given: argparse.Namespace) -> None:
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from PIL import Image
    from torch.nn import functional as F
    from transformers import CLIPTextModel, CLIPTokenizer

    from lookalike_datasets.features.latents import square, to_pixels

    bf16 = given.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    tokenizer = CLIPTokenizer.from_pretrained(given.folder / "tokenizer")
    schedule = DDPMScheduler.from_pretrained(given.folder / "scheduler")
    encoder = CLIPTextModel.from_pretrained(given.folder / "text_encoder")
    vae = AutoencoderKL.from_pretrained(given.folder / "vae")
    unet = UNet2DConditionModel.from_pretrained(given.folder / "unet")
    for model in (encoder, vae, unet):
        model.requires_grad_(False)
        model.to(dtype=dtype)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS)
    unet.add_adapter(lora)
    trained = [p for p in unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    if not given.keep_activations:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for _ in range(given.steps):
        pixels = to_pixels(square(Image.open(given.folder / "photo.jpg"), given.resolution))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            latents = vae.encode(pixels[None].to(dtype)).latent_dist.sample()
            latents = latents * vae.config.scaling_factor
            noise, t = torch.randn_like(latents), torch.randint(1000, (1,))
            ids = tokenizer("a sks dog", padding="max_length", return_tensors="pt").input_ids
            features = encoder(ids, return_dict=False)[0]
            noisy = schedule.add_noise(latents, noise, t)
            predicted = unet(noisy, t, features, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
