"""How much each method trains, keeps and holds, from the shapes of a base's files. Torch-free."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lookalike_platform.errors import CapabilityMissing
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.method_configs import (
    LAST_LAYERS,
    TEXT_ATTENTION,
    UNET_ATTENTION,
    CustomDiffusionConfig,
    DiffFitConfig,
    DreamBoothConfig,
    EdLoraConfig,
    LoraConfig,
    PerfusionConfig,
    SvdiffConfig,
    TextualInversionConfig,
    TLoraConfig,
    check_rank,
    check_targets,
    ends_in,
)

Shapes = Mapping[str, tuple[int, ...]]
"""Of parameters by `<part>.<name>`, as tensor_file.parameter_shapes gives them."""


class Count(NamedTuple):
    trained: int
    kept: int


def count(shapes: Shapes, config: TrainingConfig) -> Count:
    """Numbers that train, and numbers in the adapter file, all float32.

    Raises InvalidRequest if the base has no layers of the targets named, or too narrow ones.
    """
    tokens = config.token_vectors * sum(
        shape[1] for name, shape in shapes.items() if name.endswith("token_embedding.weight")
    )
    if isinstance(config, EdLoraConfig):  # a row for each cross-attention layer
        tokens *= sum(name.endswith("attn2.to_k.weight") for name in shapes)
    if isinstance(config, CustomDiffusionConfig):  # a word for each subject
        tokens *= 1 + len(config.also)
    own = _own(shapes, config)
    return Count(own.trained + tokens, own.kept + tokens)


def held_bytes(shapes: Shapes, config: TrainingConfig) -> int:
    """What steps hold beside the base and what trains: SVDiff's U, S, V^T and W' of each matrix.

    With gradient checkpointing W' comes and goes.
    """
    if not isinstance(config, SvdiffConfig):
        return 0
    size = 2 if config.mixed_precision == "bf16" else 4
    total = 0
    for out, width in _matrices(_thawed(shapes, config)):
        rank = min(out, width)
        product = 0 if config.gradient_checkpointing else out * width
        total += size * (rank * (out + width) + product) + 4 * rank  # S is float32 in any case
    return total


def _own(shapes: Shapes, config: TrainingConfig) -> Count:
    """Without learned words."""
    match config:
        case LoraConfig():
            return _alike(_lora(shapes, config))
        case TLoraConfig():
            matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
            layers = _targeted(matrices, config.target_modules, ())
            check_targets(config, _unet_layers(matrices))
            check_rank(config.rank, layers.values())
            pairs = sum(config.rank * (out + width) for out, width in layers.values())
            # The file has the products' start too, each half of twice the rank.
            return Count(pairs + config.rank * len(layers), 2 * pairs)
        case EdLoraConfig():
            layers = _targeted(shapes, UNET_ATTENTION, TEXT_ATTENTION)
            return _alike(sum(config.rank * (out + width) for out, width in layers.values()))
        case DreamBoothConfig():
            thawed = _thawed(shapes, config)
            return _alike(sum(math.prod(shape) for shape in thawed.values()))
        case TextualInversionConfig():
            return _alike(0)
        case CustomDiffusionConfig():
            layers = _targeted(shapes, ("attn2.to_k", "attn2.to_v"), ())
            return _alike(sum(out * width for out, width in layers.values()))
        case SvdiffConfig():
            return _alike(sum(min(matrix) for matrix in _matrices(_thawed(shapes, config))))
        case DiffFitConfig():
            return _alike(_diff_fit(_thawed(shapes, config)))
        case PerfusionConfig():
            values = _targeted(shapes, ("attn2.to_v",), ())
            answers = sum(out for out, _ in values.values())
            width = max(width for _, width in values.values())
            # Keys' answers are as long, and the file has i and C^-1 i.
            return Count(answers, 2 * answers + 2 * width)
    raise CapabilityMissing(f"a preview of what a {type(config).__name__} trains")


def _alike(numbers: int) -> Count:
    return Count(numbers, numbers)


def _lora(shapes: Shapes, config: LoraConfig) -> int:
    """A: [rank, in * kernel], B: [out, rank] a targeted layer; DoRA's m: [out]."""
    texts = TEXT_ATTENTION if config.train_text_encoder else ()
    layers = _targeted(shapes, config.target_modules, texts)
    check_targets(config, _unet_layers(shapes), [n for n in layers if not n.startswith("unet.")])
    total = 0
    for name, (out, width) in layers.items():
        own = (rank for end, rank in config.module_ranks.items() if ends_in(name, (end,)))
        total += next(own, config.rank) * (out + width) + (out if config.dora else 0)
    return total


def _unet_layers(shapes: Shapes) -> list[str]:
    """Names of the UNet's linear and convolutional layers among the parameters."""
    return [
        name.removeprefix("unet.").removesuffix(".weight")
        for name, shape in shapes.items()
        if name.startswith("unet.") and name.endswith(".weight") and len(shape) in (2, 4)
    ]


def _targeted(
    shapes: Shapes, of_unet: tuple[str, ...], of_texts: tuple[str, ...]
) -> dict[str, tuple[int, int]]:
    """(out, in * kernel) of the layers that end so and are read, by `<part>.<module>`."""
    unread = _unread(shapes)
    return {
        name.removesuffix(".weight"): (shape[0], math.prod(shape[1:]))
        for name, shape in shapes.items()
        if len(shape) in (2, 4)
        and not name.startswith(unread)
        and ends_in(name.removesuffix(".weight"), of_unet if name.startswith("unet.") else of_texts)
    }


def _unread(shapes: Shapes) -> tuple[str, ...]:
    """What SDXL's first encoder says in its last layer, nobody reads (methods/dreambooth.py)."""
    if not any(name.startswith("text_encoder_2.") for name in shapes):
        return ()
    layers = {name.split(".")[3] for name in shapes if name.startswith("text_encoder.encoder.")}
    last = max(map(int, layers))
    return (f"text_encoder.encoder.layers.{last}.", "text_encoder.final_layer_norm.")


def _thawed(shapes: Shapes, config: TrainingConfig) -> dict[str, tuple[int, ...]]:
    """The UNet's parameters, and those of text encoders where they train."""
    texts = ("text_encoder", "text_encoder_2") if config.train_text_encoder else ()
    unread = _unread(shapes)
    return {
        name: shape
        for name, shape in shapes.items()
        if name.partition(".")[0] in ("unet", *texts)
        and not name.startswith(unread)
        and not name.endswith("position_ids")  # a buffer that older files have
    }


def _matrices(shapes: Shapes) -> list[tuple[int, int]]:
    """(out, in * kernel) of linear and convolution layers; embeddings are neither."""
    return [
        (shape[0], math.prod(shape[1:]))
        for name, shape in shapes.items()
        if len(shape) > 1 and ".embeddings." not in name
    ]


def _diff_fit(shapes: Shapes) -> int:
    """Biases and norms, and a scale for each channel of a block's last layer."""
    vectors = {name: shape[0] for name, shape in shapes.items() if len(shape) == 1}
    scales = [
        length
        for name, length in vectors.items()
        if name.endswith(".bias") and ends_in(name.removesuffix(".bias"), LAST_LAYERS)
    ]
    return sum(vectors.values()) + sum(scales)
