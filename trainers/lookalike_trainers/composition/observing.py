"""What the base's layers hear while one parent paints: the inputs X_k of SSR and of fusion. Torch.

The parent is worn alone, at its scale, and a few scenes of its subjects are sampled from noise; a
hook on each layer in question hands its inputs on as they pass, and nothing is kept.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
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
from lookalike_trainers.methods.find import wear_of
from lookalike_trainers.methods.products import layers_of

SCENES = ("a photo of {}", "{} on the beach")
STEPS = 4  # of each scene: inputs at as many timesteps
SAMPLER = "dpmsolver++1"  # DDIM's own steps, along a flow or without any signal to begin with too

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
    found = layers_of(parts)
    with ExitStack() as undo:
        undo.callback(wear_of(parent.method)(parts, parent.file, parent.scale, WORD))
        for name in layers:
            handing = _handing(name, found[name], hear)
            undo.callback(found[name].register_forward_pre_hook(handing).remove)
        for spoken in called(parent.subjects):
            for scene in SCENES:
                _sample(parts, scene.format(spoken), resolution, seed)


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
    side = resolution // parts.vae_scale
    latents, generators = noise([seed], unet.config.in_channels, side, side)
    text = parts.encode([prompt], resolution)
    denoise(
        unet,
        make_sampler(SAMPLER, dict(parts.scheduler.config)),
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
