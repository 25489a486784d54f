"""What each method adds to the shared options, or begins with instead. Torch-free."""

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.defaults import by_base

SetId = Annotated[str, Field(pattern=r"^set_[0-9a-z]{1,40}$")]
UNET_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAST_LAYERS = ("to_out.0", "ff.net.2", "conv2", "out_proj", "fc2")
"""How the names of blocks' last layers end: the UNet's, and the text encoders'."""
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

    learning_rate: float = by_base(1e-3, large=1e-4, gt=0, le=1)
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
        """How a module's name ends → its rank, where it is not `rank`.

        The first that fits counts, here as for PEFT: a layer's own name before its group's, and
        the longer name before the shorter.
        """
        ranks: dict[str, int] = {}
        for target, rank in sorted(self.ranks.items(), key=lambda one: one[0] not in TARGET_GROUPS):
            ranks |= dict.fromkeys(in_group(target), rank)
        return dict(sorted(ranks.items(), key=lambda one: -one[0].count(".")))


def in_group(target: str) -> tuple[str, ...]:
    """The names a target stands for: a group's, or itself."""
    return TARGET_GROUPS.get(target, (target,))


def all_in_groups(targets: Collection[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for target in targets for name in in_group(target)))


def ends_in(module: str, names: Collection[str]) -> bool:
    """Whether a module's name is one of the names or ends in it after a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def check_targets(
    config: "LoraConfig | TLoraConfig", unet: Collection[str], texts: Collection[str] = ()
) -> None:
    """Raises InvalidRequest for targets and ranks that no layer has, by their fields.

    Args:
        unet: names of the UNet's layers that the method can adapt.
        texts: of the text encoders' that it does adapt.
    """
    adapted = [name for name in unet if ends_in(name, config.target_modules)]
    ranks = tuple(config.ranks) if isinstance(config, LoraConfig) else ()
    groups = ", ".join(TARGET_GROUPS)
    problems = [
        FieldProblem(
            f"config.{field}",
            f"no layer's name ends in {' or '.join(in_group(name))}; there are the groups {groups}",
        )
        for field, names, layers in (
            ("targets", config.targets, unet),
            ("ranks", ranks, [*adapted, *texts]),
        )
        for name in names
        if not any(ends_in(layer, in_group(name)) for layer in layers)
    ]
    if problems:
        raise InvalidRequest("This base has no layers to adapt by these names.", problems)


def check_rank(rank: int, layers: Iterable[Sequence[int]]) -> None:
    """Raises InvalidRequest if one of the layers' matrices has fewer singular values."""
    narrowest = min(min(shape) for shape in layers)
    if rank > narrowest:
        raise InvalidRequest(
            f"T-LoRA's rank {rank} is larger than a layer of this base.",
            [FieldProblem("config.rank", f"must be at most {narrowest}, the narrowest layer")],
        )


class TLoraConfig(TrainingConfig):
    """T-LoRA (Soboleva et al. 2025): LoRA whose rank grows from `min_rank` as noise goes."""

    learning_rate: float = by_base(1e-3, large=1e-4, gt=0, le=1)
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

    learning_rate: float = by_base(1e-3, large=1e-4, gt=0, le=1)
    rank: int = Field(default=4, ge=1, le=256)
    prompt: str = Field(default="a {trigger}", max_length=500)
    token_vectors: Literal[2] = 2
    token_learning_rate: float = by_base(5e-3, large=1e-3, gt=0, le=1)
    train_text_encoder: Literal[True] = True
    noise_offset: float = Field(default=0.01, ge=0, le=1)
    attention_regularization: float = Field(default=0.01, ge=0, le=10)  # with masked_loss

    @model_validator(mode="after")
    def _attention_is_kept(self) -> Self:
        if self.masked_loss and self.attention_regularization and self.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing: lets go of the attention that is regularised; leave it "
                "out, or set attention_regularization to 0"
            )
        return self

    @property
    def phrase(self) -> str:
        """The word's second token starts as the class noun, and stands for it."""
        return "{trigger}"


class CustomDiffusionConfig(TrainingConfig):
    """Custom Diffusion (Kumari et al. 2023): the cross-attention's K and V, and one new word."""

    # On large bases 1e-5 for each photo of a step; the word learns as fast as K and V.
    learning_rate: float = by_base(1e-4, large=4e-5, gt=0, le=1)
    token_learning_rate: float = by_base(5e-3, large=4e-5, gt=0, le=1)
    steps: int = by_base(300, large=250, ge=1, le=100_000)
    sizes: int = Field(default=8, ge=0, le=64)
    also: tuple[SetId, ...] = Field(default=(), max_length=11)  # more subjects: sks-2, sks-3, …
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

    steps: int = by_base(300, large=800, ge=1, le=100_000)
    batch_size: int = by_base(4, large=1, ge=1, le=256)
    learning_rate: float = by_base(1e-4, large=5e-6, gt=0, le=1)
    text_encoder_learning_rate: float = by_base(2e-5, large=2e-6, gt=0, le=1)
    token_vectors: Literal[0] = 0


class TextualInversionConfig(TrainingConfig):
    """Textual Inversion (Gal et al. 2023): the rows of one new word, and nothing else."""

    steps: int = by_base(600, large=3000, ge=1, le=100_000)
    token_learning_rate: float = by_base(5e-3, large=2e-3, gt=0, le=1)  # 5e-4 for each photo
    token_vectors: int = Field(default=1, ge=1, le=16)
    caption_dropout: float = Field(default=0.0, ge=0, le=1)  # without its word nothing is learned
    templates: Literal["object", "style"] | None = "object"  # captions; None: `prompt`
    keep_norm: bool = True  # rows stay as long as the words of the vocabulary
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

    @model_validator(mode="after")
    def _nothing_to_keep(self) -> Self:
        for name in ("prior", "output_preservation"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}: leave it out; a new word's rows are all that is learned, so that "
                    "the class stays as it is"
                )
        return self


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
