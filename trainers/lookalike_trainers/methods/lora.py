"""LoRA (Hu et al. 2021): every targeted W of the denoiser learns a product of two thin matrices.

    W' = W + s B A,    s = alpha / rank,    A: [rank, in], B: [out, rank] = 0 at the start

rsLoRA (Kalajdzievski 2023): s = alpha / sqrt(rank), so that large ranks learn as fast as small
ones. DoRA (Liu et al. 2024): each row's length m is learned apart from its direction,

    W' = m (W + s B A) / ||W + s B A||,    m: [out] = ||W|| at the start, norms over the inputs.

Optionally the text encoders' attention too. With a prior term it is DreamBooth-LoRA.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_registry.adapter_file import WEIGHTS_NAME, LoraCard, LoraShape, save_lora
from lookalike_registry.safetensors_header import read_header
from lookalike_trainers.config import TEXT_ATTENTION, LoraConfig, TrainingConfig, ends_in, in_group
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients, trainable
from lookalike_trainers.methods.deltas import part_name, parts_of
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.objective import weighted_mse

_numbers = itertools.count()


class Lora:
    """The method, holding a base's UNet with adapters in it."""

    def __init__(self, parts: Any, config: LoraConfig) -> None:
        assert config.resolution is not None
        self.config = config
        unet = parts.take("unet")
        text_encoders = parts.take("text_encoders") if config.reads_ids else []
        check_names(config, unet, text_encoders)
        self.adapted = {"unet": unet}
        self.shapes = {"unet": shape(config, config.target_modules)}
        if config.train_text_encoder:
            names = [part_name(place) for place in range(len(text_encoders))]
            self.adapted |= dict(zip(names, text_encoders, strict=True))
            self.shapes |= dict.fromkeys(names, shape(config, TEXT_ATTENTION))
        for part, model in self.adapted.items():
            insert(model, self.shapes[part])
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(
            unet,
            text_encoders,
            resolution=config.resolution,
            bf16=config.mixed_precision == "bf16",
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = [{"params": trainable(self.module.unet), "lr": self.config.learning_rate}]
        text = trainable(self.module.text_encoders)
        if text:
            groups.append({"params": text, "lr": self.config.text_encoder_learning_rate})
        return groups

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

    def save(self, folder: Path, card: Card) -> Path:
        path = folder / WEIGHTS_NAME
        states = {part: state(model) for part, model in self.adapted.items()}
        save_lora(path, states, LoraCard(**vars(card), shapes=self.shapes))
        return path


def build(parts: Any, config: TrainingConfig) -> Lora:
    assert isinstance(config, LoraConfig)
    return Lora(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """Let the file's products act beside those of other LoRAs worn already."""
    from safetensors.torch import load_file

    metadata = json.loads(read_header(file).metadata["lora_adapter_metadata"])
    return wear_products(wearer, load_file(file), metadata, scale)


def wear_products(
    wearer: Wearer,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, Any] | None,
    scale: float,
) -> TakeOff:
    """W + scale (W' - W) wherever the tensors, in diffusers' naming, have a W'.

    metadata: the PEFT config of each part; None where all s are 1.
    """
    import peft
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader

    name = f"worn_{next(_numbers)}"
    common: dict[str, Any] = {"network_alphas": None, "adapter_name": name, "metadata": metadata}
    touched = []
    for part, model in parts_of(wearer).items():
        if not any(key.startswith(f"{part}.") for key in tensors):
            continue
        touched.append(model)
        if part == "unet":
            Loader.load_lora_into_unet(tensors, unet=model, **common)
        else:
            Loader.load_lora_into_text_encoder(tensors, text_encoder=model, prefix=part, **common)
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer) and name in layer.lora_A:
                _scale(layer, name, scale)
        _activate_all(model)

    def take_off() -> None:
        for model in touched:
            for layer in model.modules():
                if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                    layer.delete_adapter(name)
            model.peft_config.pop(name, None)
            _activate_all(model)

    return take_off


def shape(config: LoraConfig, targets: tuple[str, ...]) -> LoraShape:
    return LoraShape(
        rank=config.rank,
        alpha=config.alpha if config.alpha is not None else float(config.rank),
        targets=targets,
        ranks=config.module_ranks,
        rslora=config.rslora,
        dora=config.dora,
    )


def insert(model: nn.Module, shape: LoraShape) -> None:
    """Put PEFT's LoRA layers into a frozen model; nothing else of it will train."""
    import peft

    model.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(**shape.peft(), init_lora_weights=True), model)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the layers learned by PEFT's names, on the CPU."""
    import peft

    tensors: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model)
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}


def check_names(config: LoraConfig, unet: nn.Module, text_encoders: list[Any]) -> None:
    """Raises InvalidRequest for targets and ranks the base has no layers for, by their fields."""
    layers = [
        name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    targeted = [name for name in layers if ends_in(name, config.target_modules)]
    if config.train_text_encoder:
        names = [name for encoder in text_encoders for name, _ in encoder.named_modules()]
        targeted += [name for name in names if ends_in(name, TEXT_ATTENTION)]
    problems = [
        FieldProblem(f"config.{field}", f"no layer's name ends in {' or '.join(in_group(name))}")
        for field, names, among in (
            ("targets", config.targets, layers),
            ("ranks", tuple(config.ranks), targeted),
        )
        for name in names
        if not any(ends_in(layer, in_group(name)) for layer in among)
    ]
    if problems:
        raise InvalidRequest("This base has no layers to put LoRA into by these names.", problems)


def _scale(layer: Any, name: str, scale: float) -> None:
    """Give a worn layer the products of W + c (W' - W), c being the scale.

    DoRA's W' = g (W + s B A), with g = m / ||W + s B A|| for each row, stays a DoRA:

        W + c (W' - W) = h (W + s (c g / h) B A),    h = 1 - c + c g
    """
    up = layer.lora_B[name].weight
    with torch.no_grad():
        if name not in layer.lora_magnitude_vector:
            up.mul_(scale)
            return
        if scale == 1:
            return  # as it came: no rounding
        magnitude = layer.lora_magnitude_vector[name].weight
        weight = layer.get_base_layer().weight

        def lengths() -> torch.Tensor:
            product = up.flatten(1) @ layer.lora_A[name].weight.flatten(1)
            return (weight.flatten(1) + layer.scaling[name] * product).norm(dim=1)

        gain = magnitude.flatten() / lengths()
        mixed = 1 - scale + scale * gain
        up.mul_((scale * gain / mixed).view(-1, *(1,) * (up.dim() - 1)))
        magnitude.copy_((mixed * lengths()).view_as(magnitude))


def _activate_all(model: Any) -> None:
    import peft

    for layer in model.modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.set_adapter([name for name in model.peft_config if name in layer.lora_A])
