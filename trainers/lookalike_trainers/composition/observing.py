"""What the base's layers hear while one parent paints: the inputs X_k of SSR and of fusion. Torch.

The parent is worn alone, at its scale, and a few scenes of its subjects are sampled from noise; a
hook on each layer in question hands its inputs on as they pass, and nothing is kept.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lookalike_platform.diffusion import denoise, noise
from lookalike_platform.samplers import make_sampler
from lookalike_registry.manifest import SubjectRecord
from lookalike_registry.tensor_file import nth_word
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition.request import ParentFile
from lookalike_trainers.methods.deltas import parts_of
from lookalike_trainers.methods.find import wear_of
from lookalike_trainers.methods.products import own_layers

SCENES = ("a photo of {}", "{} on the beach")
STEPS = 4  # of each scene: inputs at as many timesteps

WORD = "subject"
Hear = Callable[[str, Tensor], None]


def observe(
    parts: BaseParts,
    parent: ParentFile,
    layers: Collection[str],
    hear: Hear,
    *,
    resolution: int,
    seed: int,
) -> None:
    """Call `hear` with each layer's `<part>.<module>` and inputs [..., in] on the CPU.

    Of a convolution the patches under its kernel, [..., in * k * k].
    """
    found = {
        f"{part}.{name}": layer
        for part, model in parts_of(parts).items()
        for name, layer in own_layers(model).items()
    }
    take_off = wear_of(parent.method)(parts, parent.file, parent.scale, WORD)
    hooks = [
        found[name].register_forward_pre_hook(_handing(name, found[name], hear)) for name in layers
    ]
    try:
        for spoken in called(parent.subjects):
            for scene in SCENES:
                _sample(parts, scene.format(spoken), resolution, seed)
    finally:
        for hook in hooks:
            hook.remove()
        take_off()


def called(subjects: Sequence[SubjectRecord]) -> list[str]:
    """How prompts speak of a parent's subjects while it is worn for `observe`."""
    return [
        subject.phrase.format(
            trigger=nth_word(WORD, place) if subject.learned else subject.trigger,
            class_noun=subject.class_noun,
        )
        for place, subject in enumerate(subjects, 1)
    ]


@torch.no_grad()
def _sample(parts: BaseParts, prompt: str, resolution: int, seed: int) -> None:
    unet = parts.unet
    side = resolution // 2 ** (len(parts.vae.config.block_out_channels) - 1)
    latents, generators = noise([seed], unet.config.in_channels, side, side)
    text = parts.encode([prompt], resolution)
    denoise(
        unet,
        make_sampler("ddim", dict(parts.scheduler.config)),
        latents.to(parts.device),
        generators,
        text,
        text,  # unguided: nothing reads a negative prompt, and no layer is to hear one
        steps=STEPS,
        guidance_scale=1.0,
    )


def _handing(name: str, layer: Any, hear: Hear) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        if isinstance(layer, nn.Conv2d):
            shape = {key: getattr(layer, key) for key in ("dilation", "padding", "stride")}
            x = F.unfold(x, layer.kernel_size, **shape).transpose(1, 2)
        hear(name, x.detach().cpu())

    return hook
