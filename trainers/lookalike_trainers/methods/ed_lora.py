"""ED-LoRA (Mix-of-Show, Gu et al. 2023): the words carry the concept, LoRA what words cannot.

    V = V_rand V_class        two tokens for one concept
    V_k in {v_k^1 .. v_k^L}   each with a row for each of the UNet's L cross-attention layers, which
                              read the prompt with their own rows in it (P+, Voynov et al. 2023)
    W' = W + B A              on all attention of the UNet and of the text encoders

V_rand begins at N(0, 0.013^2), V_class at the class noun; they call the subject together, without
the noun. Concepts that live in their words get less in each other's way when they are merged.
There are no class images; the noise has an offset (`noise_offset`).

The paper's loss counts the photo within a mask: that is `masked_loss`, for photos with a
transparent background. Its other use of masks, 0.01 times the attention that the two tokens pay to
the outside of it, is not here.
"""

from collections.abc import Sequence
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
from lookalike_trainers.methods.deltas import part_name
from lookalike_trainers.methods.lora import insert, state, text_targets
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.products import wear_products
from lookalike_trainers.methods.tokens import (
    TokenRows,
    add_rows,
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
        assert config.resolution is not None
        self.config = config
        unet, text_encoders = parts.take("unet"), parts.take("text_encoders")
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
        read_by_layer(unet, text_encoders)
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(
            unet,
            text_encoders,
            resolution=config.resolution,
            bf16=config.mixed_precision == "bf16",
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        rate, text_rate = self.config.learning_rate, self.config.text_encoder_learning_rate
        groups: list[dict[str, Any]] = [
            {
                "params": [p for name, p in model.named_parameters() if ".lora_" in name],
                "lr": rate if part == "unet" else text_rate,
            }
            for part, model in self.adapted.items()
        ]
        rows = [layer.rows for layer in self.rows]
        groups.append({"params": rows, "lr": self.config.token_learning_rate, "weight_decay": 0.0})
        return groups

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

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
    from safetensors.torch import load_file

    tensors = load_file(file)
    layers = int(adapter_info(read_header(file), file.name).config["layers"])
    found = len(cross_attention(wearer.unet))
    if layers != found:
        raise InvalidRequest(
            f"{file.name} has words for {layers} cross-attention layers, the base {found}: it was "
            "trained on another one."
        )
    without_word = wear_words(wearer, tensors, word, layers)
    without_layers = read_by_layer(wearer.unet, wearer.text_encoders)
    without_products = wear_products(wearer, loaded_products(tensors), scale)

    def take_off() -> None:
        without_products()
        without_layers()
        without_word()

    return take_off


def cross_attention(unet: nn.Module) -> list[Any]:
    """The UNet's L cross-attention layers, in the order of their names."""
    named = {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}
    return [named[name] for name in sorted(named)]


def read_by_layer(unet: nn.Module, encoders: Sequence[Any]) -> TakeOff:
    """Let encoders read each prompt once for each cross-attention layer, which takes its own.

    Text features are [n, L, tokens, width] then, and pass through the UNet as they are.
    """
    layers = cross_attention(unet)
    handles = [
        layer.register_forward_pre_hook(_takes(place), with_kwargs=True)
        for place, layer in enumerate(layers)
    ]
    for encoder in encoders:
        _repeat(encoder, len(layers))

    def take_off() -> None:
        for handle in handles:
            handle.remove()
        for encoder in encoders:
            _repeat_no_more(encoder)

    return take_off


_repeating: WeakKeyDictionary[nn.Module, tuple[int, list[Any]]] = WeakKeyDictionary()
"""Encoders that read by layer: for how many adapters, and the hooks, which serve all of them."""


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

    count, hooks = _repeating.get(encoder, (0, []))
    if not hooks:
        hooks = [encoder.register_forward_pre_hook(before), encoder.register_forward_hook(after)]
    _repeating[encoder] = (count + 1, hooks)


def _repeat_no_more(encoder: nn.Module) -> None:
    count, hooks = _repeating.pop(encoder)
    if count > 1:
        _repeating[encoder] = (count - 1, hooks)
        return
    for hook in hooks:
        hook.remove()


def _takes(place: int) -> Any:
    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text = kwargs["encoder_hidden_states"]
        if text.dim() == 4:
            kwargs = {**kwargs, "encoder_hidden_states": text[:, place]}
        return args, kwargs

    return before


def _learn(encoder: Any, tokenizer: Any, config: EdLoraConfig, layers: int) -> TokenRows:
    """V_rand and V_class, the same row in all layers at first."""
    meant = word_rows(encoder, tokenizer, str(config.initializer), 1)
    drawn = torch.randn_like(meant) * RANDOM
    rows = torch.cat([drawn, meant]).repeat_interleave(layers, dim=0)
    first = tokenizer.convert_tokens_to_ids(token_names(config.trigger, 2)[0])
    return add_rows(encoder, rows, first, layers=layers)
