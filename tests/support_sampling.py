"""Adapters to sample with, and the pictures plain diffusers makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lookalike_registry.adapter_file import LoraCard, LoraShape, save_lora

LIBRARY_WARNINGS = [
    # diffusers' multistep samplers pass tensors through numpy in the old way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    # PEFT takes a second adapter in one model for an oversight; here it is what is asked for.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    # It picks another active adapter when one is deleted; which are active is set before each use.
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]

UNET = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj")


def save_adapter(
    path: Path,
    base: Path,
    seed: int = 0,
    *,
    rank: int = 4,
    text_encoder: bool = False,
    dora: bool = False,
) -> str:
    """Write a LoRA with random weights, large enough to show, and alpha unlike its rank.

    Returns its sha256.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    shapes = {"unet": LoraShape(rank, 2.0 * rank, UNET, dora=dora)}
    states = {"unet": _random_lora(unet, shapes["unet"], seed)}
    if text_encoder:
        encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
        shapes["text_encoder"] = LoraShape(rank, 2.0 * rank, TEXT_ENCODER, dora=dora)
        states["text_encoder"] = _random_lora(encoder, shapes["text_encoder"], seed + 100)
    card = LoraCard("a subject", "sd1", 64, "sks", "epsilon", shapes)
    return save_lora(path, states, card)


def reference(
    base: Path,
    prompt: str,
    *,
    seed: int,
    num_images: int,
    sampler: tuple[str, dict[str, Any]],
    adapters: Sequence[tuple[Path, float]] = (),
    **options: Any,
) -> list[Any]:
    """What diffusers' own pipeline paints; image i from a generator of seed `seed + i`."""
    import diffusers
    import torch

    pipeline = diffusers.DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    class_name, arguments = sampler
    scheduler = getattr(diffusers, class_name)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **arguments)
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (path, _) in zip(names, adapters, strict=True):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    if adapters:
        pipeline.set_adapters(names, [scale for _, scale in adapters])
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
    made = pipeline(prompt, num_images_per_prompt=num_images, generator=generators, **options)
    images: list[Any] = made.images
    return images


def _random_lora(model: Any, shape: LoraShape, seed: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(**shape.peft()), model)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.3
        if tensor.dim() > 1
        else torch.rand(tensor.shape, generator=generator)  # DoRA's lengths
        for name, tensor in get_peft_model_state_dict(model).items()
    }
