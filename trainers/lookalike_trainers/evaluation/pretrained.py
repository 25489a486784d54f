"""CLIP (Radford et al. 2021) and DINO (Caron et al. 2021, Oquab et al. 2023) as judges. Torch.

Loaded from a local folder in transformers' layout; no hub is ever asked. The paper's are
openai/clip-vit-base-patch32 and facebook/dino-vits16.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from lookalike_datasets.features.cache import component_digest
from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.evaluation.encoder_folder import CLIP, DINO, expect
from lookalike_trainers.evaluation.measures import prompt_fidelity
from lookalike_trainers.evaluation.preprocessing import Preprocessing

_AT_ONCE = 16


class Clip:
    """CLIP's two encoders: pictures and prompts in one space."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        expect(folder, "CLIP", CLIP)
        from transformers.models.clip.modeling_clip import CLIPModel
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        self.name, self.digest = "clip", component_digest(folder)
        self._device = device
        self._model = _load(CLIPModel, folder).to(device)
        self._preprocess = Preprocessing.read(folder)
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"The CLIP in {folder} has no tokenizer: {error}") from error

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        model = self._model
        return _encoded(
            images,
            lambda pixels: model.visual_projection(
                model.vision_model(pixel_values=pixels.to(self._device)).pooler_output
            ),
            self._preprocess,
        )

    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Features [prompts, width] of length 1, in the space of the pictures."""
        model, features = self._model, []
        for batch in _batches(list(prompts)):
            tokens = self._tokenizer(
                batch,
                padding="max_length",
                max_length=model.config.text_config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                text = model.text_model(
                    input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
                )
                features.append(model.text_projection(text.pooler_output).cpu())
        return F.normalize(torch.cat(features), dim=1)

    def score_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], class_noun: str
    ) -> torch.Tensor:
        """CLIP-T: of each picture [n], its cosine to its prompt."""
        return prompt_fidelity(self.encode_images(images), self.encode_prompts(prompts))


class Dino:
    """DINO's or DINOv2's class token."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        kind = expect(folder, "DINO", DINO)
        self.name, self.digest = "dino", component_digest(folder)
        self._device = device
        self._preprocess = Preprocessing.read(folder)
        if kind == "vit":
            from transformers.models.vit.modeling_vit import ViTModel

            self._model = _load(ViTModel, folder, add_pooling_layer=False).to(device)
        else:
            from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

            self._model = _load(Dinov2Model, folder).to(device)

    def encode_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return _encoded(
            images,
            lambda pixels: self._model(pixel_values=pixels.to(self._device)).last_hidden_state[
                :, 0
            ],
            self._preprocess,
        )


def _load(model: Any, folder: Path, **options: Any) -> Any:
    try:
        loaded = model.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"The encoder in {folder} cannot be loaded: {error} Only safetensors are read, as "
            "pickles can run any code: save it again with save_pretrained if it has none."
        ) from error
    return loaded.requires_grad_(False).eval()


def _encoded(images: Sequence[Image.Image], model: Any, preprocess: Preprocessing) -> torch.Tensor:
    features = []
    for batch in _batches(list(images)):
        with torch.inference_mode():
            features.append(model(torch.stack([preprocess(image) for image in batch])).cpu())
    return F.normalize(torch.cat(features).clone(), dim=1)


def _batches(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _AT_ONCE):
        yield items[start : start + _AT_ONCE]
