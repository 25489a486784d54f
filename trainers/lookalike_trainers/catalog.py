"""The methods there are: name, options, and where their code is. Torch-free."""

from pydantic import BaseModel

from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.method_configs import (
    CustomDiffusionConfig,
    DiffFitConfig,
    DreamBoothConfig,
    EdLoraConfig,
    LoraConfig,
    PerfusionConfig,
    SvdiffConfig,
    TextualInversionConfig,
    TLoraConfig,
)


class MethodInfo(BaseModel):
    """One personalization method: its public name, its config, and where its code is."""

    name: str
    summary: str
    config: type[TrainingConfig]
    entry: str  # "module:function" that builds it (methods/method.py), imported by ranks only
    wear: str  # "module:function" that lets a saved adapter act, imported where torch runs
    rows: str | None = None  # the same for single rows of a batch, where that is possible
    prepare: str | None = None  # does ahead, beside other work, what `wear` would take long for
    acts_on_rows: str | None = None  # whether a file can, by its header; None: all of the method do


METHODS = [
    MethodInfo(
        name="lora",
        summary="Low-rank adapters in the UNet, optionally the text encoders; small files.",
        config=LoraConfig,
        entry="lookalike_trainers.methods.lora:build",
        wear="lookalike_trainers.methods.lora:wear",
        rows="lookalike_trainers.methods.lora:rows",
        acts_on_rows="lookalike_trainers.methods.lora:acts_on_rows",
    ),
    MethodInfo(
        name="t_lora",
        summary="LoRA with fewer ranks the noisier the picture; for one photo or a few.",
        config=TLoraConfig,
        entry="lookalike_trainers.methods.t_lora:build",
        wear="lookalike_trainers.methods.t_lora:wear",
        rows="lookalike_trainers.methods.t_lora:rows",
    ),
    MethodInfo(
        name="ed_lora",
        summary="LoRA with a new word for each layer of the UNet; concepts keep apart in a merge.",
        config=EdLoraConfig,
        entry="lookalike_trainers.methods.ed_lora:build",
        wear="lookalike_trainers.methods.ed_lora:wear",
        rows="lookalike_trainers.methods.ed_lora:rows",
    ),
    MethodInfo(
        name="custom_diffusion",
        summary="The UNet's cross-attention keys and values, and a new word.",
        config=CustomDiffusionConfig,
        entry="lookalike_trainers.methods.custom_diffusion:build",
        wear="lookalike_trainers.methods.custom_diffusion:wear",
        rows="lookalike_trainers.methods.custom_diffusion:rows",
        acts_on_rows="lookalike_trainers.methods.custom_diffusion:acts_on_rows",
    ),
    MethodInfo(
        name="svdiff",
        summary="Shifts of the singular values of the UNet's matrices; very small files.",
        config=SvdiffConfig,
        entry="lookalike_trainers.methods.svdiff:build",
        wear="lookalike_trainers.methods.svdiff:wear",
        prepare="lookalike_trainers.methods.svdiff:prepare",
    ),
    MethodInfo(
        name="dreambooth",
        summary="The whole UNet, optionally the text encoders; the closest likeness, large files.",
        config=DreamBoothConfig,
        entry="lookalike_trainers.methods.dreambooth:build",
        wear="lookalike_trainers.methods.dreambooth:wear",
    ),
    MethodInfo(
        name="textual_inversion",
        summary="One new word for what the photos show, the model untouched; a few kilobytes.",
        config=TextualInversionConfig,
        entry="lookalike_trainers.methods.textual_inversion:build",
        wear="lookalike_trainers.methods.textual_inversion:wear",
        rows="lookalike_trainers.methods.textual_inversion:rows",
    ),
    MethodInfo(
        name="diff_fit",
        summary="Biases, norms and scales of the UNet's blocks; very small files.",
        config=DiffFitConfig,
        entry="lookalike_trainers.methods.diff_fit:build",
        wear="lookalike_trainers.methods.diff_fit:wear",
    ),
    MethodInfo(
        name="perfusion",
        summary="A gated rank-one edit of the cross-attention and a new word; files of 100 KB.",
        config=PerfusionConfig,
        entry="lookalike_trainers.methods.perfusion:build",
        wear="lookalike_trainers.methods.perfusion:wear",
        rows="lookalike_trainers.methods.perfusion:rows",
    ),
]

COMPOSITION_WEAR = "lookalike_trainers.methods.composition:wear"
COMPOSITION_ROWS = "lookalike_trainers.methods.composition:rows"
COMPOSITION_ACTS_ON_ROWS = "lookalike_trainers.methods.custom_diffusion:acts_on_rows"
"""Merged versions (registry/compose/rules.py) are worn like any, and trained by nothing."""
