"""The options all methods share. Torch-free: the API validates jobs with it.

Defaults are those that learn a subject on the bundled 64-pixel base in about a minute on two CPU
cores; see defaults.py for larger bases.
"""

from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from lookalike_trainers.defaults import by_base


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
    seed: int = Field(default=0, ge=0, lt=2**31)  # above, evaluation draws the class


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
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    text_encoder_learning_rate: float = by_base(1e-4, large=1e-5, gt=0, le=1)
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
    initializer: Annotated[
        str | None, StringConstraints(strip_whitespace=True, min_length=1, max_length=40)
    ] = None  # the class noun
    token_learning_rate: float = by_base(5e-3, large=5e-4, gt=0, le=1)
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

    @model_validator(mode="after")
    def _moments_of_8_bits_are_whole(self) -> Self:
        if self.optimizer == "adamw8bit" and self.zero_stage:
            raise ValueError(
                "zero_stage: cuts the moments into shares, which adamw8bit's cannot be; set it "
                "to 0, or optimizer to adamw"
            )
        return self
