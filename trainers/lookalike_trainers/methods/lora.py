"""LoRA (Hu et al. 2021): every targeted W of the denoiser learns a product of two thin matrices.

    W' = W + s B A,    s = alpha / rank,    A: [rank, in], B: [out, rank] = 0 at the start

rsLoRA (Kalajdzievski 2023): s = alpha / sqrt(rank), so that large ranks learn as fast as small
ones. DoRA (Liu et al. 2024): each row's length m is learned apart from its direction,

    W' = m (W + s B A) / ||W + s B A||,    m: [out] = ||W|| at the start, norms over the inputs.

Optionally the text encoders' attention too. With a prior term it is DreamBooth-LoRA. With learned
rows for the trigger (`token_vectors`) it is pivotal tuning (Roich et al. 2022; for LoRA
github.com/cloneofsimo/lora), trained together.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookalike_registry.adapter_file import WEIGHTS_NAME, LoraCard, LoraShape, save_lora
from lookalike_registry.products import (
    Product,
    from_peft,
    loaded_products,
    read_lora,
    saved_products,
)
from lookalike_registry.safetensors_header import Header, read_header
from lookalike_registry.tensor_file import ADAPTER_NAME, METHOD_KEY, save_tensors
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients, trainable
from lookalike_trainers.method_configs import TEXT_ATTENTION, LoraConfig, check_targets, ends_in
from lookalike_trainers.methods.deltas import part_name
from lookalike_trainers.methods.groups import parameter_groups
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.products import own_layers, wear_products
from lookalike_trainers.methods.row_adapter import RowAdapter, of_text, of_unet
from lookalike_trainers.methods.tokens import (
    TokenRows,
    learn_rows,
    learned_rows,
    saved_rows,
    wear_words,
)
from lookalike_trainers.objective import weighted_mse

NAME = "lora"


class Lora:
    """The method, holding a base's UNet with adapters in it."""

    def __init__(self, parts: Any, config: LoraConfig) -> None:
        self.config = config
        bf16 = config.mixed_precision == "bf16"
        # DoRA measures the rows of W, and does it exactly.
        unet = parts.take_frozen_unet(bf16=bf16 and not config.dora)
        text_encoders = parts.take("text_encoders") if config.reads_ids else []
        texts = targeted(text_encoders[0], TEXT_ATTENTION) if config.train_text_encoder else []
        check_targets(config, own_layers(unet), texts)
        self.adapted = {"unet": unet}
        self.shapes = {"unet": shape(config, unet, config.target_modules)}
        if config.train_text_encoder:
            for place, targets in enumerate(text_targets(text_encoders)):
                encoder = text_encoders[place]
                self.adapted[part_name(place)] = encoder
                self.shapes[part_name(place)] = shape(config, encoder, targets)
        for part, model in self.adapted.items():
            insert(model, self.shapes[part])
        self.rows: list[TokenRows] = []
        if config.token_vectors:
            word = str(config.initializer)
            self.rows = learn_rows(parts, text_encoders, config.trigger, word)
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(unet, text_encoders, bf16=bf16, silent=parts.silent_ids())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return product_groups(self.config, self.adapted, self.rows)

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

    def save(self, folder: Path, card: Card) -> Path:
        """The layout of diffusers, which has no place for learned words: with them, our own."""
        states = {part: state(model) for part, model in self.adapted.items()}
        if not self.rows:
            path = folder / WEIGHTS_NAME
            save_lora(path, states, LoraCard(**vars(card), shapes=self.shapes))
            return path
        path = folder / ADAPTER_NAME
        tensors = saved_products(from_peft(states, self.shapes)) | saved_rows(self.rows)
        save_tensors(path, NAME, tensors, {}, card.modelspec(NAME))
        return path


def build(parts: Any, config: TrainingConfig) -> Lora:
    assert isinstance(config, LoraConfig)
    return Lora(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """W + scale (W' - W) wherever the file has a W'; learned rows know no scale."""
    products, words = _read(file)
    return _put_on(wearer, words, products, scale, word)


def acts_on_rows(header: Header) -> bool:
    """Not a DoRA: its gain is on the whole of W + B A."""
    return not any("magnitude" in name for name in header.tensors)


def rows(wearer: Wearer, file: Path) -> RowAdapter:
    """Of a file that `acts_on_rows`."""
    products, words = _read(file)
    text = saved_products(of_text(products)) | words
    return RowAdapter(text, wear_text, products=of_unet(products))


def wear_text(wearer: Wearer, text: Mapping[str, torch.Tensor], scale: float, word: str) -> TakeOff:
    """Products and learned rows among an adapter's tensors act on the text encoders."""
    return _put_on(wearer, text, loaded_products(text), scale, word)


def _read(file: Path) -> tuple[dict[str, Product], dict[str, torch.Tensor]]:
    """A file's products and its learned rows."""
    from safetensors.torch import load_file

    if METHOD_KEY not in read_header(file).metadata:
        return read_lora(file), {}
    tensors = load_file(file)
    return loaded_products(tensors), learned_rows(tensors)


def _put_on(
    wearer: Wearer,
    words: Mapping[str, torch.Tensor],
    products: Mapping[str, Product],
    scale: float,
    word: str,
) -> TakeOff:
    with ExitStack() as undo:
        undo.callback(wear_words(wearer, words, word))
        undo.callback(wear_products(wearer, products, scale))
        return undo.pop_all().close


def shape(config: LoraConfig, model: nn.Module, targets: tuple[str, ...]) -> LoraShape:
    """What one model gets on the modules whose names end in a target."""
    layers = targeted(model, targets)
    return LoraShape(
        rank=config.rank,
        alpha=config.alpha if config.alpha is not None else float(config.rank),
        targets=targets,
        ranks={
            end: rank
            for end, rank in config.module_ranks.items()
            if any(ends_in(name, (end,)) for name in layers)
        },
        rslora=config.rslora,
        dora=config.dora,
    )


def text_targets(text_encoders: Sequence[Any]) -> list[tuple[str, ...]]:
    """The targets in each encoder: its attention, but for SDXL's first's last layer.

    What that layer says, nobody reads (conditioning.py): it could not learn.
    """
    targets: list[tuple[str, ...]] = [TEXT_ATTENTION for _ in text_encoders]
    if len(text_encoders) > 1:
        layers = range(
            len(getattr(text_encoders[0], "text_model", text_encoders[0]).encoder.layers)
        )
        targets[0] = tuple(
            f"layers.{layer}.self_attn.{name}" for layer in layers[:-1] for name in TEXT_ATTENTION
        )
    return targets


def targeted(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The names of a model's layers that end in a target."""
    return [name for name in own_layers(model) if ends_in(name, targets)]


def insert(model: nn.Module, shape: LoraShape) -> None:
    """Put PEFT's LoRA layers into a frozen model; nothing else of it will train."""
    import peft

    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(**shape.peft(), init_lora_weights=True), model)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()  # PEFT gives them the type of their layer


def product_groups(
    config: TrainingConfig, adapted: dict[str, Any], words: Sequence[TokenRows]
) -> list[dict[str, Any]]:
    """What PEFT put into the models, by part, and learned words, with their learning rates.

    DoRA's magnitudes start as the lengths of the base's rows and do not decay: to nothing would be
    away from the base.
    """

    def found(kinds: tuple[str, ...], *parts: str) -> list[nn.Parameter]:
        named = [pair for part in parts for pair in adapted[part].named_parameters()]
        return [p for name, p in named if any(kind in name for kind in kinds)]

    texts = [part for part in adapted if part != "unet"]
    thin, lengths = ("lora_A", "lora_B"), ("lora_magnitude_vector",)
    return [
        *parameter_groups(config, unet=found(thin, "unet"), text=found(thin, *texts), words=words),
        *parameter_groups(
            config, unet=found(lengths, "unet"), text=found(lengths, *texts), decay=False
        ),
    ]


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the layers learned by PEFT's names, on the CPU."""
    import peft

    tensors: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model)
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
