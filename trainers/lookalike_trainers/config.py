"""What a training job may ask for, and what a rank is told. Torch-free: the API validates with it.

Defaults are those that learn a subject on the bundled 64-pixel base in about a minute on two CPU
cores; for SD 1.5-sized bases the usual values are in each field's note.
"""

from collections.abc import Collection
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def check_placeholders(prompt: str) -> str:
    """The prompt. Raises ValueError if it has others than {trigger} and {class_noun}."""
    remedy = "write {trigger} and {class_noun} in it, and no other braces"
    try:
        fields = {tuple(field) for _, *field in Formatter().parse(prompt) if field[0] is not None}
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    if fields - {("trigger", "", None), ("class_noun", "", None)}:
        raise ValueError(remedy)
    return prompt


class PriorConfig(Strict):
    """Prior preservation (Ruiz et al. 2023, eq. 2): lambda * MSE on class images.

    The base draws them, or `subject_set` has the user's own; their captions are kept.
    """

    weight: float = Field(default=1.0, gt=0)
    subject_set: str | None = Field(default=None, pattern=r"^set_[0-9a-z]{1,40}$")
    num_images: int = Field(default=32, ge=1, le=2000)
    prompt: str | None = Field(default=None, max_length=500)  # None: "a {class noun}"
    sampler: Literal["ddim", "ddpm", "dpmsolver++", "euler", "unipc"] = "dpmsolver++"
    steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=4.0, ge=0, le=50)
    seed: int = Field(default=0, ge=0, lt=2**32)


class OutputPreservationConfig(Strict):
    """Differential output preservation: what the base says of the class stays, without images.

    lambda * MSE(tuned(x_t, class caption), base(x_t, class caption)) on the photos' own x_t.
    """

    weight: float = Field(default=1.0, gt=0)


class EarlyStoppingConfig(Strict):
    """DVAR (Voronov et al. 2023): stop when the loss of fixed samples has levelled off.

    It is measured every `every` steps; early_stopping.py has the rule.
    """

    window: int = Field(default=10, ge=2, le=10_000)  # measurements
    epsilon: float = Field(default=0.15, gt=0, le=1)
    every: int = Field(default=5, ge=1)


class ValidationConfig(Strict):
    """A picture of the subject as it is learned so far, every so many steps."""

    prompt: str | None = Field(default=None, max_length=500)  # None: "a" and the method's phrase
    every: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("prompt")
    @classmethod
    def _known_placeholders(cls, prompt: str | None) -> str | None:
        return prompt and check_placeholders(prompt)


class TrainingConfig(Strict):
    """Options shared by all methods."""

    steps: int = Field(default=300, ge=1, le=100_000)
    batch_size: int = Field(default=4, ge=1, le=256)  # per process
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=256)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)  # SD 1.5: 1e-4
    text_encoder_learning_rate: float = Field(default=1e-4, gt=0, le=1)  # SD 1.5: 1e-5
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: int = Field(default=0, ge=0)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: float = Field(default=1e-2, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    resolution: int | None = Field(default=None, ge=64, le=2048, multiple_of=8)  # None: the base's
    prompt: str = Field(default="a {trigger} {class_noun}", max_length=500)
    trigger: str = Field(
        default="sks",  # in a job's request null or nothing: a rare word of the base's vocabulary
        min_length=1,
        max_length=40,
        pattern=r"^[\w-]+$",
        json_schema_extra={"default": None, "type": ["string", "null"]},
    )
    token_vectors: int = Field(default=0, ge=0, le=16)  # embedding rows the trigger learns
    initializer: str | None = Field(default=None, max_length=40)  # None: the class noun
    token_learning_rate: float = Field(default=5e-3, gt=0, le=1)  # SD 1.5: 5e-4
    train_text_encoder: bool = False
    caption_dropout: float = Field(default=0.05, ge=0, le=1)
    random_flip: bool = False
    crops: int = Field(default=0, ge=0, le=64)  # of each photo, besides its middle
    sizes: int = Field(default=0, ge=0, le=64)  # of each photo, instead of its middle as it is
    aspect_buckets: bool = False  # photos keep their shape; else squares are cut from them
    masked_loss: bool = False  # a photo's transparent parts are not learned
    noise_offset: float = Field(default=0.0, ge=0, le=1)  # Mix-of-Show: 0.01
    min_snr_gamma: float | None = Field(default=5.0, gt=0)  # Hang et al. 2023; None: plain MSE
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(default=100, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    num_processes: int | None = Field(default=None, ge=1, le=64)  # None: the operator's setting
    zero_stage: int | None = Field(default=None, ge=0, le=3)  # None: the operator's setting
    prior: PriorConfig | None = None
    output_preservation: OutputPreservationConfig | None = None  # instead of `prior`
    ema_decay: float | None = Field(default=None, gt=0, lt=1)  # the adapter is then the average
    early_stopping: EarlyStoppingConfig | None = None
    validation: ValidationConfig | None = None

    @property
    def starts_from_noun(self) -> bool:
        """Whether learned words start from the class noun where no initializer is named."""
        return True

    @property
    def reads_ids(self) -> bool:
        """Whether steps run the text encoders, since something in them trains."""
        return self.train_text_encoder or self.token_vectors > 0

    @property
    def rate(self) -> str:
        """The option that says how fast most of it learns."""
        return "learning_rate"

    @property
    def phrase(self) -> str:
        """How prompts speak of the subject, of {trigger} and {class_noun}."""
        return "{trigger} {class_noun}"

    @field_validator("prompt")
    @classmethod
    def _known_placeholders(cls, prompt: str) -> str:
        return check_placeholders(prompt)

    @model_validator(mode="after")
    def _prompt_has_trigger(self) -> Self:
        if "{trigger}" not in self.prompt and self.trigger not in self.prompt.split():
            raise ValueError("prompt: write {trigger} in it, the word the subject is to answer to")
        return self

    @model_validator(mode="after")
    def _one_way_to_keep_the_class(self) -> Self:
        if self.prior and self.output_preservation:
            raise ValueError("output_preservation: leave it out or leave out prior, not both")
        return self


SetId = Annotated[str, Field(pattern=r"^set_[0-9a-z]{1,40}$")]
UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TARGET_GROUPS = {
    "attention": UNET_ATTENTION,
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    "convolution": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
}
"""Layers of the UNet by what they are for; each name is how a module's own name ends."""
TargetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$", max_length=100)]


class LoraConfig(TrainingConfig):
    """LoRA (Hu et al. 2021): W' = W + (alpha / rank) B A on layers of the UNet.

    With `train_text_encoder` also on the text encoders' attention; with `prior` it is
    DreamBooth-LoRA; with `token_vectors` pivotal tuning.
    """

    rank: int = Field(default=8, ge=1, le=256)
    alpha: float | None = Field(default=None, gt=0)  # None: equal to the rank
    targets: tuple[TargetName, ...] = Field(default=("attention",), min_length=1)
    ranks: dict[TargetName, Annotated[int, Field(ge=1, le=256)]] = Field(default_factory=dict)
    rslora: bool = False  # alpha / sqrt(rank): Kalajdzievski 2023
    dora: bool = False  # Liu et al. 2024

    @property
    def target_modules(self) -> tuple[str, ...]:
        """How the names of the UNet's targeted modules end."""
        return all_in_groups(self.targets)

    @property
    def module_ranks(self) -> dict[str, int]:
        """How a module's name ends → its rank, where it is not `rank`."""
        return {name: rank for target, rank in self.ranks.items() for name in in_group(target)}


def in_group(target: str) -> tuple[str, ...]:
    """The names a target stands for: a group's, or itself."""
    return TARGET_GROUPS.get(target, (target,))


def all_in_groups(targets: Collection[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for target in targets for name in in_group(target)))


def ends_in(module: str, names: Collection[str]) -> bool:
    """Whether a module's name is one of the names or ends in it after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


class TLoraConfig(TrainingConfig):
    """T-LoRA (Soboleva et al. 2025): LoRA whose rank grows from `min_rank` as noise goes."""

    rank: int = Field(default=8, ge=1, le=256)  # SDXL: 64
    min_rank: int | None = Field(default=None, ge=0)  # None: half the rank
    targets: tuple[TargetName, ...] = Field(default=("attention",), min_length=1)
    train_text_encoder: Literal[False] = False

    @property
    def target_modules(self) -> tuple[str, ...]:
        """How the names of the UNet's targeted modules end."""
        return all_in_groups(self.targets)

    @model_validator(mode="after")
    def _min_rank_is_below(self) -> Self:
        if self.min_rank is not None and self.min_rank > self.rank:
            raise ValueError("min_rank: must not be above rank")
        return self


class EdLoraConfig(TrainingConfig):
    """ED-LoRA (Mix-of-Show, Gu et al. 2023): a word of two tokens with rows for each layer."""

    rank: int = Field(default=4, ge=1, le=256)
    prompt: str = Field(default="a {trigger}", max_length=500)
    token_vectors: Literal[2] = 2
    token_learning_rate: float = Field(default=5e-3, gt=0, le=1)  # SD 1.5: 1e-3
    train_text_encoder: Literal[True] = True
    noise_offset: float = Field(default=0.01, ge=0, le=1)

    @property
    def phrase(self) -> str:
        """The word's second token starts as the class noun, and stands for it."""
        return "{trigger}"


class CustomDiffusionConfig(TrainingConfig):
    """Custom Diffusion (Kumari et al. 2023): the cross-attention's K and V, and one new word."""

    learning_rate: float = Field(default=1e-4, gt=0, le=1)  # SD 1.5: 1e-5 x images in a step
    sizes: int = Field(default=8, ge=0, le=64)
    also: tuple[SetId, ...] = Field(default=(), max_length=9)  # more subjects: sks-2, sks-3, …
    token_vectors: int = Field(default=1, ge=0, le=16)
    train_text_encoder: Literal[False] = False

    @property
    def starts_from_noun(self) -> bool:
        """The word starts from a rare one, and stands before the noun."""
        return False

    @model_validator(mode="after")
    def _subjects_are_told_apart(self) -> Self:
        if self.also and not self.token_vectors:
            raise ValueError("also: subjects are told apart by words: token_vectors 1 or more")
        if self.also and not ("{trigger}" in self.prompt and "{class_noun}" in self.prompt):
            raise ValueError("prompt: with `also`, write {trigger} and {class_noun} in it")
        if self.also and self.output_preservation:
            raise ValueError("output_preservation: is of one class; with `also`, take prior")
        return self


class SvdiffConfig(TrainingConfig):
    """SVDiff (Han et al. 2023): shifts of the singular values of the UNet's matrices.

    With `train_text_encoder` of the text encoders' too.
    """

    text_encoder_learning_rate: float = Field(default=1e-3, gt=0, le=1)


class DreamBoothConfig(TrainingConfig):
    """DreamBooth (Ruiz et al. 2023): the whole UNet, optionally the text encoders.

    Give it a `prior`, which is a term of the paper's loss; a style does without.
    """

    learning_rate: float = Field(default=1e-4, gt=0, le=1)  # SD 1.5: 5e-6, 2e-6 with its encoder
    text_encoder_learning_rate: float = Field(default=2e-5, gt=0, le=1)  # SD 1.5: 2e-6
    token_vectors: Literal[0] = 0


class TextualInversionConfig(TrainingConfig):
    """Textual Inversion (Gal et al. 2023): the rows of one new word, and nothing else."""

    steps: int = Field(default=600, ge=1, le=100_000)  # SD 1.5: 3000 to 6000
    token_vectors: int = Field(default=1, ge=1, le=16)
    templates: Literal["object", "style"] | None = "object"  # captions; None: `prompt`
    keep_norm: bool = True  # rows stay as long as the vocabulary's are at the median
    train_text_encoder: Literal[False] = False

    @property
    def rate(self) -> str:
        return "token_learning_rate"

    @property
    def phrase(self) -> str:
        """The new word alone says what the subject is."""
        match self.templates:
            case "object":
                return "{trigger}"
            case "style":
                return "{class_noun} in the style of {trigger}"
            case None:
                return super().phrase


class DiffFitConfig(TrainingConfig):
    """DiffFit (Xie et al. 2023): biases, norms, and a scale of each block's output."""

    text_encoder_learning_rate: float = Field(default=1e-3, gt=0, le=1)


class PerfusionConfig(TrainingConfig):
    """Perfusion (Tewel et al. 2023): a gated rank-one edit of keys and values, and one new word."""

    learning_rate: float = Field(default=3e-2, gt=0, le=1)
    prompt: str = Field(default="a {trigger}", max_length=500)
    token_vectors: Literal[1] = 1
    token_learning_rate: float = Field(default=6e-3, gt=0, le=1)
    train_text_encoder: Literal[False] = False

    @property
    def phrase(self) -> str:
        """The new word stands where the class noun would: its keys are the noun's."""
        return "{trigger}"


class MethodInfo(BaseModel):
    """One personalization method: its public name, its config, and where its code is."""

    name: str
    summary: str
    config: type[TrainingConfig]
    entry: str  # "module:function" that builds it (methods/method.py), imported by ranks only
    wear: str  # "module:function" that lets a saved adapter act, imported where torch runs


METHODS = [
    MethodInfo(
        name="lora",
        summary="Low-rank adapters in the UNet, optionally the text encoders; small files.",
        config=LoraConfig,
        entry="lookalike_trainers.methods.lora:build",
        wear="lookalike_trainers.methods.lora:wear",
    ),
    MethodInfo(
        name="t_lora",
        summary="LoRA with fewer ranks the noisier the picture; for one photo or a few.",
        config=TLoraConfig,
        entry="lookalike_trainers.methods.t_lora:build",
        wear="lookalike_trainers.methods.t_lora:wear",
    ),
    MethodInfo(
        name="ed_lora",
        summary="LoRA with a new word for each layer of the UNet; concepts keep apart in a merge.",
        config=EdLoraConfig,
        entry="lookalike_trainers.methods.ed_lora:build",
        wear="lookalike_trainers.methods.ed_lora:wear",
    ),
    MethodInfo(
        name="custom_diffusion",
        summary="The UNet's cross-attention keys and values, and a new word.",
        config=CustomDiffusionConfig,
        entry="lookalike_trainers.methods.custom_diffusion:build",
        wear="lookalike_trainers.methods.custom_diffusion:wear",
    ),
    MethodInfo(
        name="svdiff",
        summary="Shifts of the singular values of the UNet's matrices; very small files.",
        config=SvdiffConfig,
        entry="lookalike_trainers.methods.svdiff:build",
        wear="lookalike_trainers.methods.svdiff:wear",
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
    ),
]


class RunImage(Strict):
    path: Path
    sha256: str
    caption: str | None = None


class MoreSubject(Strict):
    """Another subject of the same run, with photos of its own."""

    class_noun: str
    images: list[RunImage] = Field(min_length=1)


class RunRequest(Strict):
    """Everything a rank needs; written by the worker as `request.json` in the run folder."""

    job_id: str
    owner: str
    concept: str
    class_noun: str
    method: str
    config: dict[str, object]
    base_name: str
    base_folder: Path
    base_fingerprint: str
    base_family: str
    prediction_type: str
    images: list[RunImage]
    also: list[MoreSubject] = []
    class_images: list[RunImage] = []  # the user's own; else the base draws them
    cache: Path
    clip_encoder: str | None = None
    dino_encoder: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_processes: int = 1
    zero_stage: int = Field(default=0, ge=0, le=3)

    @model_validator(mode="after")
    def _has_images(self) -> "RunRequest":
        if not self.images:
            raise ValueError("a run needs at least one image")
        return self
