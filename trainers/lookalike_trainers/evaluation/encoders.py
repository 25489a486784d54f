"""What judges pictures: encoders that turn them into features, and judges of prompts. Torch.

Which ones there are is the operator's choice (LOOKALIKE_CLIP_ENCODER, LOOKALIKE_DINO_ENCODER);
without any the base judges itself. Numbers of different judges cannot be compared, so every number
is kept with its judge's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from pydantic import JsonValue

from lookalike_trainers.base_parts import BaseParts


class ImageEncoder(Protocol):
    """`name` is for people; `digest` names everything that decides the features."""

    name: str
    digest: str

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Features [images, width] of length 1, on the CPU."""
        ...


class PromptJudge(Protocol):
    """As ImageEncoder, of how well pictures show what was asked for."""

    name: str
    digest: str

    def score_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], class_noun: str
    ) -> torch.Tensor:
        """Of each picture [images], how well it shows its own prompt; higher is better.

        Prompts are in words every model knows: "a dog in the snow", without the trigger.

        Args:
            class_noun: what all pictures are of, for judges that compare with other scenes of it.
        """
        ...


@dataclass(frozen=True)
class Judges:
    """`subject`: the encoders of subject fidelity, drift and diversity, the one to go by first."""

    subject: tuple[ImageEncoder, ...]
    prompt: PromptJudge

    def digests(self) -> dict[str, JsonValue]:
        """What decides the scores."""
        subject: JsonValue = [[encoder.name, encoder.digest] for encoder in self.subject]
        return {"subject": subject, "prompt": [self.prompt.name, self.prompt.digest]}


def open_judges(parts: BaseParts, clip_encoder: str | None, dino_encoder: str | None) -> Judges:
    """The judges there are: DINO before CLIP for subjects, CLIP for prompts, else the base.

    DINO comes first because it was trained to tell apart pictures of the same class, which CLIP
    was not (Ruiz et al. 2023, section 4.1).

    Args:
        parts: of the base that paints, or of the one that shall judge for it.
        clip_encoder, dino_encoder: a folder, or a hub id that is in the hub's local cache.

    Raises InvalidRequest or CapabilityMissing, with what to do, for an encoder that is named and
    cannot be used.
    """
    from lookalike_trainers.evaluation.base_classifier import BaseClassifier
    from lookalike_trainers.evaluation.base_features import BaseFeatures
    from lookalike_trainers.evaluation.encoder_folder import encoder_folder
    from lookalike_trainers.evaluation.pretrained import Clip, Dino

    clip = Clip(encoder_folder(clip_encoder), parts.device) if clip_encoder else None
    dino = Dino(encoder_folder(dino_encoder), parts.device) if dino_encoder else None
    named: list[ImageEncoder] = [encoder for encoder in (dino, clip) if encoder is not None]
    return Judges(tuple(named or [BaseFeatures(parts)]), clip or BaseClassifier(parts))
