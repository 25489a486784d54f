"""A tiny random Stable Diffusion base and LoRA weights for it, made in the test's folder."""

from pathlib import Path
from typing import Any

from lookalike_registry.adapter_file import WEIGHTS_NAME, LoraCard, LoraShape, save_lora

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


def tiny_unet(width: int = 32) -> Any:
    """A UNet2DConditionModel with random weights and one attention block down and up."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(width, width),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def tiny_text_encoder() -> Any:
    """A CLIPTextModel with random weights, 16 wide."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


def save_tiny_base(folder: Path, width: int = 32) -> Path:
    """The parts of a base model that adapters are checked against."""
    tiny_unet(width).save_pretrained(folder / "unet")
    tiny_text_encoder().save_pretrained(folder / "text_encoder")
    return folder


def card(
    rank: int = 4, alpha: float = 8.0, *, text_encoder: bool = False, **shape: Any
) -> LoraCard:
    """A card of random weights; shape: further fields of the parts' `LoraShape`."""
    shapes = {"unet": LoraShape(rank, alpha, UNET_TARGETS, **shape)}
    if text_encoder:
        shapes["text_encoder"] = LoraShape(rank, alpha, TEXT_TARGETS, **shape)
    return LoraCard(
        title="teapot",
        family="sd1",
        resolution=64,
        trigger="sks",
        prediction_type="epsilon",
        shapes=shapes,
    )


def random_lora(model: Any, shape: LoraShape, seed: int) -> dict[str, Any]:
    """Adds a LoRA with random A and B to the model; its state in PEFT's naming."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(**shape.peft()), model)
    state = get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(seed)
    for tensor in state.values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def write_adapter(folder: Path, seed: int = 0, width: int = 32) -> Path:
    """An adapter file for `save_tiny_base`'s UNet; other seeds, other bytes."""
    made = card()
    path = folder / WEIGHTS_NAME
    save_lora(path, {"unet": random_lora(tiny_unet(width), made.shapes["unet"], seed)}, made)
    return path
