"""ED-LoRA (Mix-of-Show, Gu et al. 2023): the words carry the concept, LoRA what words cannot.

    V = V_rand V_class        two tokens for one concept
    V_k in {v_k^1 .. v_k^L}   each with a row for each of the UNet's L cross-attention layers, which
                              read the prompt with their own rows in it (P+, Voynov et al. 2023)
    W' = W + B A              on all attention of the UNet and of the text encoders

V_rand begins at N(0, 0.013^2), V_class at the class noun; they call the subject together, without
the noun. Concepts that live in their words get less in each other's way when they are merged.
There are no class images; the noise has an offset (`noise_offset`).

Of photos whose background is transparent (`masked_loss`) only the subject counts, and the two
tokens are kept from looking elsewhere,

    loss + 0.01 sum over sizes and tokens of mean(A / max A outside the mask)

A being a token's cross-attention (`attention_maps.py`).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.adapter_file import LoraShape
from lookalike_registry.products import from_peft, loaded_products, saved_products
from lookalike_registry.safetensors_header import read_header
from lookalike_registry.tensor_file import ADAPTER_NAME, adapter_info, save_tensors
from lookalike_trainers.base_parts import token_names
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients
from lookalike_trainers.method_configs import UNET_ATTENTION, EdLoraConfig
from lookalike_trainers.methods.attention_maps import AttentionMaps, attention_outside
from lookalike_trainers.methods.deltas import part_name
from lookalike_trainers.methods.lora import insert, product_groups, state, text_targets
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.products import wear_products
from lookalike_trainers.methods.row_adapter import RowAdapter, of_text, of_unet
from lookalike_trainers.methods.text_by_layer import cross_attention, take_own_text
from lookalike_trainers.methods.tokens import (
    TokenRows,
    add_rows,
    learned_rows,
    saved_rows,
    wear_words,
    word_rows,
)
from lookalike_trainers.objective import weighted_mse

NAME = "ed_lora"
RANDOM = 0.013  # standard deviation of V_rand's rows at the start


class EdLora:
    """The method, holding a base with adapters in it and a word for each of its layers."""

    def __init__(self, parts: Any, config: EdLoraConfig) -> None:
        self.config = config
        bf16 = config.mixed_precision == "bf16"
        unet, text_encoders = parts.take_frozen_unet(bf16=bf16), parts.take("text_encoders")
        names = [part_name(place) for place in range(len(text_encoders))]
        self.adapted = {"unet": unet, **dict(zip(names, text_encoders, strict=True))}
        targets = [UNET_ATTENTION, *text_targets(text_encoders)]
        self.shapes = {
            part: LoraShape(rank=config.rank, alpha=float(config.rank), targets=own)
            for part, own in zip(self.adapted, targets, strict=True)
        }
        for part, model in self.adapted.items():
            insert(model, self.shapes[part])
        self.layers = len(cross_attention(unet))
        self.rows = [
            _learn(encoder, tokenizer, config, self.layers)
            for encoder, tokenizer in zip(text_encoders, parts.tokenizers, strict=True)
        ]
        take_own_text(unet)
        read_by_layer(text_encoders, self.layers)
        self.maps: AttentionMaps | None = None
        if config.masked_loss and config.attention_regularization:
            self.maps = AttentionMaps(unet, cross_attention(unet))
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(unet, text_encoders, bf16=bf16, silent=parts.silent_ids())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return product_groups(self.config, self.adapted, self.rows)

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        loss = weighted_mse(prediction, batch.target, batch.weight, batch.mask)
        if self.maps is None or batch.mask is None:
            return loss
        assert isinstance(batch.text, torch.Tensor)
        words = self.rows[0]
        tokens = range(words.first, words.first + words.count)
        outside = attention_outside(self.maps.take(), batch.text[:, 0], tokens, batch.mask)
        return loss + self.config.attention_regularization * outside

    def save(self, folder: Path, card: Card) -> Path:
        """The rows are [2 L, width]: V_rand's of each layer, then V_class's."""
        path = folder / ADAPTER_NAME
        states = {part: state(model) for part, model in self.adapted.items()}
        tensors = saved_products(from_peft(states, self.shapes)) | saved_rows(self.rows)
        save_tensors(path, NAME, tensors, {"layers": self.layers}, card.modelspec(NAME))
        return path


def build(parts: Any, config: TrainingConfig) -> EdLora:
    assert isinstance(config, EdLoraConfig)
    return EdLora(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """W + scale (W' - W); the word's rows know no scale.

    Raises InvalidRequest if the base has another number of cross-attention layers.
    """
    adapter = rows(wearer, file)
    products = {f"unet.{name}": product for name, product in adapter.products.items()}
    with ExitStack() as undo:
        undo.callback(adapter.wear_text(wearer, adapter.text, scale, word))
        undo.callback(take_own_text(wearer.unet))
        undo.callback(wear_products(wearer, products, scale))
        return undo.pop_all().close


def rows(wearer: Wearer, file: Path) -> RowAdapter:
    """Raises InvalidRequest if the base has another number of cross-attention layers."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    layers = int(adapter_info(read_header(file), file.name).config["layers"])
    found = len(cross_attention(wearer.unet))
    if layers != found:
        raise InvalidRequest(
            f"{file.name} has words for {layers} cross-attention layers, the base {found}: it was "
            "trained on another one."
        )
    products = loaded_products(tensors)
    return RowAdapter(
        saved_products(of_text(products)) | learned_rows(tensors),
        partial(_wear_text, layers=layers),
        products=of_unet(products),
    )


def _wear_text(
    wearer: Wearer, text: Mapping[str, torch.Tensor], scale: float, word: str, layers: int
) -> TakeOff:
    with ExitStack() as undo:
        undo.callback(wear_words(wearer, text, word, layers))
        undo.callback(read_by_layer(wearer.text_encoders, layers))
        undo.callback(wear_products(wearer, loaded_products(text), scale))
        return undo.pop_all().close


def read_by_layer(encoders: Sequence[Any], layers: int) -> TakeOff:
    """Let encoders read each prompt once for each of the UNet's cross-attention layers."""
    with ExitStack() as undo:
        for encoder in encoders:
            _repeat(encoder, layers)
            undo.callback(_repeat_no_more, encoder)
        return undo.pop_all().close


_repeating: WeakKeyDictionary[nn.Module, tuple[int, TakeOff]] = WeakKeyDictionary()
"""Encoders that read by layer: for how many adapters, and what ends it, as one serves them all."""


def _repeat(encoder: nn.Module, layers: int) -> None:
    def before(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """ids [n, tokens] → [n * L, tokens]."""
        return (args[0].repeat_interleave(layers, dim=0), *args[1:])

    def after(_: nn.Module, __: Any, answer: Any) -> Any:
        return type(answer)(**{name: apart(value) for name, value in answer.items()})

    def apart(value: Any) -> Any:
        """[n * L, tokens, width] → [n, L, tokens, width]; of summaries [n * L, width] the mean."""
        if isinstance(value, tuple):
            return tuple(apart(one) for one in value)
        each = value.unflatten(0, (-1, layers))
        return each if value.dim() == 3 else each.mean(1)

    if encoder in _repeating:
        count, end = _repeating[encoder]
        _repeating[encoder] = (count + 1, end)
        return
    with ExitStack() as undo:
        undo.callback(encoder.register_forward_pre_hook(before).remove)
        undo.callback(encoder.register_forward_hook(after).remove)
        _repeating[encoder] = (1, undo.pop_all().close)


def _repeat_no_more(encoder: nn.Module) -> None:
    count, end = _repeating.pop(encoder)
    if count > 1:
        _repeating[encoder] = (count - 1, end)
    else:
        end()


def _learn(encoder: Any, tokenizer: Any, config: EdLoraConfig, layers: int) -> TokenRows:
    """V_rand and V_class, the same row in all layers at first."""
    meant = word_rows(encoder, tokenizer, str(config.initializer), 1)
    drawn = torch.randn_like(meant) * RANDOM
    rows = torch.cat([drawn, meant]).repeat_interleave(layers, dim=0)
    first = tokenizer.convert_tokens_to_ids(token_names(config.trigger, 2)[0])
    return add_rows(encoder, rows, first, layers=layers)
