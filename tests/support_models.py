"""Whole base models in diffusers' layout, tiny and random: 64 pixels, some 70,000 weights.

Unlike the real ones they are told apart by nothing but their configuration, as `families.py` does.
"""

from pathlib import Path
from typing import Any

RESOLUTION = 64
VAE_SCALE = 4
TOKENS = 48
WIDTH = 16
"""Of one text encoder's features."""


def save_base(folder: Path, family: str = "sd1", seed: int = 0) -> Path:
    """Write a base of the family: sd1 (epsilon), sd2 (OpenCLIP's GELU, v-prediction) or sdxl."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "vae": _vae(),
        "text_encoder": _text_encoder("gelu" if family == "sd2" else "quick_gelu"),
        "tokenizer": _tokenizer(),
        "unet": _unet(family),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="v_prediction" if family == "sd2" else "epsilon",
        ),
        "feature_extractor": None,
    }
    if family == "sdxl":
        encoder = _text_encoder("gelu", projected=True)
        parts |= {"text_encoder_2": encoder, "tokenizer_2": _tokenizer()}
        diffusers.StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    else:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
        diffusers.StableDiffusionPipeline(**parts).save_pretrained(folder)
    return folder


def _unet(family: str) -> Any:
    """Two levels; attention in the lower one and in the middle."""
    from diffusers import UNet2DConditionModel

    told: dict[str, Any] = {}
    if family == "sdxl":  # six sizes and the prompt's summary
        told = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        }
    return UNet2DConditionModel(
        sample_size=RESOLUTION // VAE_SCALE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH if family == "sdxl" else WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=family != "sd1",
        **told,
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


def _text_encoder(activation: str, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(
        CLIPTextConfig(
            vocab_size=len(_vocabulary()),
            hidden_size=WIDTH,
            projection_dim=WIDTH,
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
