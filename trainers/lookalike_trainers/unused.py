"""Options that a run would not read: whoever gives one is told, and not left to wonder. Torch-free.

A value at its default may be given, as the config of an earlier job gives them all, perhaps one on
another base; and 0, which asks for nothing.
"""

from collections.abc import Iterator

from lookalike_platform.errors import FieldProblem
from lookalike_trainers.config import Strict, TrainingConfig
from lookalike_trainers.defaults import KEY
from lookalike_trainers.method_configs import (
    DiffFitConfig,
    EdLoraConfig,
    PerfusionConfig,
    TextualInversionConfig,
    TLoraConfig,
)

DRAWN = ("num_images", "sampler", "steps", "guidance_scale", "seed")
"""What says how the base draws class images."""


def unused_options(config: TrainingConfig) -> list[FieldProblem]:
    """Those that were given, by their paths, and why they are not read."""
    problems = [
        FieldProblem(f"config.{name}", f"leave it out: {why}")
        for name, why in _unread(config)
        if _given(config, name)
    ]
    if config.prior and config.prior.subject_set:
        why = "the base draws no class images, since subject_set has them"
        problems += [
            FieldProblem(f"config.prior.{name}", f"leave it out: {why}")
            for name in DRAWN
            if _given(config.prior, name)
        ]
    return problems


def _given(config: Strict, name: str) -> bool:
    field = type(config).model_fields[name]
    extra = field.json_schema_extra
    large = extra.get(KEY) if isinstance(extra, dict) else None
    return getattr(config, name) not in (field.default, large, 0)


def _unread(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    """The names of options that this run does not read, and why."""
    if not config.token_vectors:
        yield "token_learning_rate", "no word is learned, since token_vectors is 0"
        yield "initializer", "no word is learned, since token_vectors is 0"
    if not config.train_text_encoder:
        yield "text_encoder_learning_rate", "the text encoders do not train"
    if isinstance(config, TLoraConfig | DiffFitConfig | PerfusionConfig | TextualInversionConfig):
        yield "weight_decay", "nothing that this method trains decays: zero is not the base"
    if isinstance(config, TextualInversionConfig):
        yield "learning_rate", "token_learning_rate says how fast a word is learned"
        if config.templates:
            yield "prompt", "photos are called by `templates`; set templates to null for a prompt"
    if isinstance(config, EdLoraConfig) and not config.masked_loss:
        yield "attention_regularization", "it needs masks, and masked_loss is off"
