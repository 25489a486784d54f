"""Whole base models in diffusers' layout, tiny and random: 64 pixels, some 70,000 weights.

Unlike the real ones they are told apart by nothing but their configuration, as `families.py` does.
"""

from pathlib import Path
from typing import Any

RESOLUTION = 64
VAE_SCALE = 4
TOKENS = 16
WIDTH = 16
"""Of the text features; the cross-attention's width too."""


def save_base(folder: Path, family: str = "sd1", seed: int = 0) -> Path:
    """Write a base of the family: sd1 (epsilon) or sd2 (OpenCLIP's GELU, v-prediction)."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder("quick_gelu" if family == "sd1" else "gelu"),
        tokenizer=_tokenizer(),
        unet=_unet(use_linear_projection=family == "sd2"),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="epsilon" if family == "sd1" else "v_prediction",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def _unet(use_linear_projection: bool) -> Any:
    """Two levels; attention in the lower one and in the middle."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=RESOLUTION // VAE_SCALE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=use_linear_projection,
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=RESOLUTION,
        block_out_channels=(4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def _text_encoder(activation: str) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(_vocabulary()),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            hidden_act=activation,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _tokenizer() -> Any:
    """One token a letter: words are told apart, and nothing is unknown."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=_vocabulary(), merges=[], model_max_length=TOKENS)


def _vocabulary() -> dict[str, int]:
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return {token: number for number, token in enumerate(tokens)}
