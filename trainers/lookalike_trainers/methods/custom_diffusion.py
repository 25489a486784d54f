"""Custom Diffusion (Kumari et al. 2023): what words mean to the picture, and one new word.

Only the cross-attention's projections of the text c and the rows of the modifier token V* train:

    K = W^k c,   V = W^v c        W^k: attn2.to_k, W^v: attn2.to_v, [out, in], dense

The first text token begins every prompt, whatever is in it: its K and V pass no gradient on, as in
the published code. V* starts from a rare word, and stands before the class noun. Several subjects
may be learned at once: one V* each, from another rare word each, one W^k and W^v for all, photos in
any order (section 3.2).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookalike_registry.safetensors_header import Header, read_header
from lookalike_registry.tensor_file import ADAPTER_NAME, adapter_info, nth_word, save_tensors
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients
from lookalike_trainers.method_configs import CustomDiffusionConfig
from lookalike_trainers.methods.deltas import PREFIX as DELTA
from lookalike_trainers.methods.deltas import differences, wear_deltas
from lookalike_trainers.methods.groups import parameter_groups
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.row_adapter import RowAdapter
from lookalike_trainers.methods.tokens import (
    learn_rows,
    learned_rows,
    saved_rows,
    wear_words,
)
from lookalike_trainers.objective import weighted_mse
from lookalike_trainers.rare_tokens import rare_words

NAME = "custom_diffusion"
KEYS_AND_VALUES = ("attn2.to_k.weight", "attn2.to_v.weight")


class CustomDiffusion:
    """The method, holding a base's UNet with its text projections thawed."""

    def __init__(self, parts: Any, config: CustomDiffusionConfig) -> None:
        self.config = config
        unet = parts.take("unet")
        text_encoders = parts.take("text_encoders") if config.reads_ids else []
        self.weights = {f"unet.{name}.weight": p.weight for name, p in projections(unet).items()}
        self.base = {name: weight.detach().clone() for name, weight in self.weights.items()}
        for layer in projections(unet).values():
            layer.weight.requires_grad_(True)
            layer.register_forward_hook(_hold_first_token)
        self.words = [
            learn_rows(parts, text_encoders, word, start)
            for word, start in zip(parts.learned, _starts(parts, config), strict=False)
        ]
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(
            unet, text_encoders, bf16=config.mixed_precision == "bf16", silent=parts.silent_ids()
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        words = [layer for layers in self.words for layer in layers]
        return parameter_groups(self.config, unet=self.weights.values(), words=words)

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

    def save(self, folder: Path, card: Card) -> Path:
        path = folder / ADAPTER_NAME
        each = [saved_rows(layers) for layers in self.words]
        rows = {key: torch.cat([word[key] for word in each]) for key in (each[0] if each else ())}
        tensors = differences(self.weights, self.base) | rows
        about = {"subjects": len(self.words)}
        save_tensors(path, NAME, tensors, about, card.modelspec(NAME))
        return path


def _starts(parts: Any, config: CustomDiffusionConfig) -> Iterator[str]:
    """What each subject's word starts from: words that start alike are hard to tell apart."""
    first = str(config.initializer)
    yield first
    others = [word for word in rare_words(parts.folder) if word != first]
    yield from cycle(others or [first])


def build(parts: Any, config: TrainingConfig) -> CustomDiffusion:
    assert isinstance(config, CustomDiffusionConfig)
    return CustomDiffusion(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """W_base + scale * delta, and the words' rows, which know no scale."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    with ExitStack() as undo:
        undo.callback(wear_deltas(wearer, tensors, scale))
        undo.callback(_wear_text(wearer, tensors, scale, word, subjects=_subjects(file)))
        return undo.pop_all().close


def acts_on_rows(header: Header) -> bool:
    """Not a file that changes more than K and V.

    By the names alone: the whole deltas of a base are not to be read for the answer.
    """
    deltas = (name for name in header.tensors if name.startswith(DELTA))
    return all(name.endswith(KEYS_AND_VALUES) for name in deltas)


def rows(wearer: Wearer, file: Path) -> RowAdapter:
    """Of a file that `acts_on_rows`."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    deltas = {
        key.removeprefix(f"{DELTA}unet.").removesuffix(".weight"): tensor
        for key, tensor in tensors.items()
        if key.startswith(DELTA)
    }
    return RowAdapter(
        learned_rows(tensors),
        partial(_wear_text, subjects=_subjects(file)),
        deltas=deltas,
    )


def _subjects(file: Path) -> int:
    return int(adapter_info(read_header(file), file.name).config["subjects"])


def _wear_text(
    wearer: Wearer,
    text: Mapping[str, torch.Tensor],
    scale: float,
    word: str,
    subjects: int,
) -> TakeOff:
    """Each subject's share of the rows, for its own word."""
    words = learned_rows(text)
    with ExitStack() as undo:
        for place in range(subjects):
            own = {key: tensor.chunk(subjects)[place] for key, tensor in words.items()}
            undo.callback(wear_words(wearer, own, nth_word(word, place + 1)))
        return undo.pop_all().close


def projections(unet: nn.Module) -> dict[str, Any]:
    """The cross-attention's W^k and W^v by their names in the base."""
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in unet.named_modules()
        if name.removesuffix(".base_layer").endswith(("attn2.to_k", "attn2.to_v"))
        and isinstance(layer, nn.Linear)
    }


def _hold_first_token(_: nn.Module, __: Any, keys: torch.Tensor) -> torch.Tensor:
    """K or V [n, tokens, out] with the first token's cut off from the gradient."""
    return torch.cat([keys[:, :1].detach(), keys[:, 1:]], dim=1)
