"""DiffFit (Xie et al. 2023): the denoiser's knobs train, its matrices do not.

Biases, norms, and a scale of each block's output before it joins the residual stream,

    x + gamma * block(x),    gamma: [channels] = 1 at the start        (section 3.2)

A block is a self- or cross-attention, a feed-forward, or a residual block; gamma acts behind its
last layer, W and b, and so folds into it: gamma * (W x + b) = (gamma W) x + gamma b. Under a
thousandth of the weights; the file holds gamma and not gamma W, about a megabyte for SD 1.5.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookalike_registry.block_scales import PREFIX, fold
from lookalike_registry.tensor_file import ADAPTER_NAME, save_tensors
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients, trainable
from lookalike_trainers.method_configs import LAST_LAYERS, DiffFitConfig, ends_in
from lookalike_trainers.methods.deltas import (
    base_values,
    differences,
    named,
    part_name,
    wear_deltas,
)
from lookalike_trainers.methods.dreambooth import thaw
from lookalike_trainers.methods.groups import parameter_groups
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.tokens import TokenRows, learn_rows, saved_rows, wear_words
from lookalike_trainers.objective import weighted_mse

NAME = "diff_fit"


class DiffFit:
    """The method, holding a base with its knobs thawed."""

    def __init__(self, parts: Any, config: DiffFitConfig) -> None:
        self.config = config
        unet = parts.take("unet").requires_grad_(True)
        text_encoders = parts.take("text_encoders") if config.reads_ids else []
        if config.train_text_encoder:
            thaw(text_encoders)
        models = {"unet": unet}
        models |= {part_name(place): encoder for place, encoder in enumerate(text_encoders)}
        self.blocks = {
            f"{part}.{name}": layer
            for part, model in models.items()
            for name, layer in freeze_matrices(model).items()
            if ends_in(name, LAST_LAYERS) and layer.bias.requires_grad
        }
        self.knobs = {
            f"{part}.{name}": parameter
            for part, model in models.items()
            for name, parameter in named(model).items()
            if parameter.requires_grad
        }
        self.base = {name: knob.detach().clone() for name, knob in self.knobs.items()}
        for layer in self.blocks.values():
            layer.gamma = nn.Parameter(torch.ones_like(layer.bias))
            layer.register_forward_hook(_scale_output)
        self.rows: list[TokenRows] = []
        if config.token_vectors:
            word = str(config.initializer)
            self.rows = learn_rows(parts, text_encoders, config.trigger, word)
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(
            unet, text_encoders, bf16=config.mixed_precision == "bf16", silent=parts.silent_ids()
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Without weight decay: it would pull norms and gamma to zero, not to the base."""
        rows = {id(word.rows) for word in self.rows}
        text = [p for p in trainable(self.module.text_encoders) if id(p) not in rows]
        return parameter_groups(
            self.config,
            unet=trainable(self.module.unet),
            text=text,
            words=self.rows,
            decay=False,
        )

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

    def save(self, folder: Path, card: Card) -> Path:
        path = folder / ADAPTER_NAME
        folded = {f"{name}.bias": layer.gamma * layer.bias for name, layer in self.blocks.items()}
        gammas = {f"{PREFIX}{name}": layer.gamma for name, layer in self.blocks.items()}
        tensors = differences({**self.knobs, **folded}, self.base) | gammas
        save_tensors(path, NAME, tensors | saved_rows(self.rows), {}, card.modelspec(NAME))
        return path


def build(parts: Any, config: TrainingConfig) -> DiffFit:
    assert isinstance(config, DiffFitConfig)
    return DiffFit(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """Deltas of knobs, and (gamma - 1) W of blocks' last layers, scaled; rows know no scale.

    Raises InvalidRequest if a gamma does not belong to a layer of this base.
    """
    from safetensors.torch import load_file

    tensors = load_file(file)
    folded = fold(tensors, base_values(wearer))
    with ExitStack() as undo:
        undo.callback(wear_words(wearer, tensors, word))
        undo.callback(wear_deltas(wearer, tensors | folded, scale))
        return undo.pop_all().close


def freeze_matrices(model: nn.Module) -> dict[str, Any]:
    """Hold layers' weights still, and embedding tables; biases and norms stay as they are.

    Returns:
        the layers by the names they have in the base's files.
    """
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
            layer.weight.requires_grad_(False)
            layers[name.removeprefix("text_model.")] = layer
    return layers


def _scale_output(layer: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
    """gamma times [n, tokens, channels] of a linear layer, or [n, channels, h, w]."""
    gamma = layer.gamma.to(output.dtype)
    scaled: torch.Tensor = output * (
        gamma.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else gamma
    )
    return scaled
