"""The three networks and the tokenizer: read from a diffusers folder to start from."""

from pathlib import Path
from typing import Any

from lookalike_trainers.pretrain.denoiser import Denoiser


def load_vae(start: Path) -> Any:
    """The autoencoder of a diffusers folder, in float32."""
    import torch
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(start / "vae", dtype=torch.float32)


def load_trained_vae(start: Path, run: Path) -> Any:
    """The run's autoencoder, with its latents' scale, where it trained one; else ``start``'s."""
    from lookalike_trainers.pretrain.runs import load_checkpoint

    vae = load_vae(start)
    trained = load_checkpoint(run / "autoencoder.pt")
    if trained is not None:
        vae.load_state_dict(trained["model"])
        vae.register_to_config(scaling_factor=trained["scaling_factor"])
    return vae


def load_denoiser(start: Path) -> Denoiser:
    """Text encoder and UNet of a diffusers folder, in float32."""
    import torch
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(start / "unet", dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(
        start / "text_encoder", dtype=torch.float32, attn_implementation="eager"
    )
    if not torch.cuda.is_available():
        # On a CPU the fused attention's backward costs a quarter of the step at 64 positions;
        # plain matrix products make the whole step 1.6 times as fast.
        unet.set_attn_processor(AttnProcessor())
    return Denoiser(text, unet)


def load_tokenizer(start: Path) -> Any:
    """The byte-pair tokenizer of a diffusers folder."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(start / "tokenizer")
