"""The record of one adapter version: what it is, what it was made from and how it was measured.

It is kept in the database, as `manifest.json` beside the weights in MLflow, and as tags.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from lookalike_platform.bases import Base
from lookalike_platform.files import canonical_digest, sha256_file
from lookalike_registry.adapter_file import (
    WEIGHTS_NAME,
    lora_modules,
    module_alpha,
    peft_configs,
)
from lookalike_registry.safetensors_header import Header, read_header
from lookalike_registry.tensor_file import METHOD_KEY

FORMAT_VERSION = 1
NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
"""Concepts are `<name>` in prompts and half of MLflow's model name."""

Sha256 = Field(pattern=r"^[0-9a-f]{64}$")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(Section):
    """`id` is `version_id(job_id)`: a job makes one version, however often it is tried."""

    id: str
    job_id: str
    owner: str
    concept: str = Field(pattern=NAME_PATTERN)
    method: str
    format_version: int = FORMAT_VERSION


class ModuleShape(Section):
    rank: int
    alpha: float


class Weights(Section):
    """The weights file. `modules`: rank and alpha by `unet.<module>`, `text_encoder.<module>`.

    `token_count` and `token_width`: learned embedding rows, for methods that learn any; the width
    is the first text encoder's. `dora`: the lengths of rows were learned too (DoRA).
    """

    file: str = WEIGHTS_NAME
    sha256: str = Sha256
    bytes: int
    dtype: str
    modules: dict[str, ModuleShape]
    token_count: int = 0
    token_width: int | None = None
    dora: bool = False


class BaseRecord(Section):
    name: str
    family: str
    revision: str | None = None
    fingerprint: str
    text_digest: str
    resolution: int
    prediction_type: str


class SubjectRecord(Section):
    """One of the subjects of a merged version, as prompts name it: `<name>`.

    learned: its trigger stands for learned rows. The word for them is the version's own, counted
    by the subject's place among all (`tensor_file.nth_word`).
    """

    name: str = Field(pattern=NAME_PATTERN)
    trigger: str
    class_noun: str
    phrase: str
    learned: bool


class Prompting(Section):
    """How prompts speak of the subject; of a merged version's first one, and `subjects` has all."""

    class_noun: str
    trigger: str
    phrase: str = "{trigger} {class_noun}"
    recommended_scale: float = 1.0
    recommended_guidance: float = 4.0
    subjects: list[SubjectRecord] = []


class Parent(Section):
    """A version that went into a merged one. `ref` and `digest` outlive its deletion."""

    id: str
    ref: str
    digest: str = Sha256
    method: str
    scale: float


class Lineage(Section):
    """Everything that decided the weights. `images`: sha256 of each, in order.

    A merged version has `parents`, and the photos of all of them; its `config` is the strategy and
    its options.
    """

    subject_set: str
    subject_set_digest: str
    images: list[str]
    prior_digest: str | None = None
    config: dict[str, JsonValue]
    seed: int
    libraries: dict[str, str]
    world_size: int
    zero_stage: int
    attempts: int
    parents: list[Parent] = []

    @property
    def config_digest(self) -> str:
        return canonical_digest(self.config)


class Evaluation(Section):
    """What the adapter reached; None where a measure was not taken.

    The judge's names stand beside the figures, since other judges give other numbers. Subject
    fidelity and prior drift are cosines in [-1, 1]; diversities 1 minus a cosine; prompt fidelity
    is a cosine if CLIP judged, and a probability if the base did.
    """

    subject_fidelity: float | None = None
    prompt_fidelity: float | None = None
    prior_drift: float | None = None
    subject_diversity: float | None = None
    class_diversity: float | None = None
    subject_judge: str | None = None
    prompt_judge: str | None = None
    sample_grid: str | None = None  # sha256


class Policy(Section):
    consent: str | None = None
    retention: str | None = None


class Manifest(Section):
    identity: Identity
    weights: Weights
    base: BaseRecord
    prompting: Prompting
    lineage: Lineage
    evaluation: Evaluation = Evaluation()
    policy: Policy = Policy()

    @property
    def subjects(self) -> list[SubjectRecord]:
        """Whom it can paint: one by the name of the concept, or all of a merged version."""
        prompting = self.prompting
        return prompting.subjects or [
            SubjectRecord(
                name=self.identity.concept,
                trigger=prompting.trigger,
                class_noun=prompting.class_noun,
                phrase=prompting.phrase,
                learned=bool(self.weights.token_count),
            )
        ]

    @property
    def names(self) -> set[str]:
        """What prompts may call it: its concept, and of a merged version each subject's."""
        return {self.identity.concept, *(subject.name for subject in self.subjects)}

    def to_tags(self) -> dict[str, str]:
        """The values one searches for, as MLflow's tags; those not known are left out."""
        tags = {
            "id": self.identity.id,
            "job_id": self.identity.job_id,
            "owner": self.identity.owner,
            "concept": self.identity.concept,
            "method": self.identity.method,
            "format_version": self.identity.format_version,
            "weights_sha256": self.weights.sha256,
            "base": self.base.name,
            "base_fingerprint": self.base.fingerprint,
            "class_noun": self.prompting.class_noun,
            "trigger": self.prompting.trigger,
            "subject_set": self.lineage.subject_set,
            "subject_set_digest": self.lineage.subject_set_digest,
            "config_digest": self.lineage.config_digest,
            "seed": self.lineage.seed,
            "parents": ",".join(parent.id for parent in self.lineage.parents) or None,
            "subject_fidelity": self.evaluation.subject_fidelity,
            "prompt_fidelity": self.evaluation.prompt_fidelity,
            "prior_drift": self.evaluation.prior_drift,
            "subject_judge": self.evaluation.subject_judge,
            "prompt_judge": self.evaluation.prompt_judge,
            "consent": self.policy.consent,
            "retention": self.policy.retention,
        }
        return {f"lookalike.{key}": str(value) for key, value in tags.items() if value is not None}


def version_id(job_id: str) -> str:
    """The id of the version a job makes: `adv_…` with the job's own characters."""
    return f"adv_{job_id.removeprefix('job_')}"


def base_record(base: Base) -> BaseRecord:
    return BaseRecord(
        name=base.name,
        family=base.family,
        fingerprint=base.fingerprint,
        text_digest=base.text_digest,
        resolution=base.resolution,
        prediction_type=base.prediction_type,
    )


def weights_record(path: Path) -> Weights:
    """Describes an adapter file. Raises InvalidRequest if it is not one."""
    header = read_header(path)
    tokens = header.tensors.get("tokens.text_encoder")
    modules = _products(header) if METHOD_KEY in header.metadata else _lora(header, path.name)
    return Weights(
        file=path.name,
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        dtype="+".join(sorted({tensor.dtype for tensor in header.tensors.values()})),
        modules=modules,
        token_count=tokens.shape[0] if tokens else 0,
        token_width=tokens.shape[1] if tokens else None,
        dora=any("magnitude" in key for key in header.tensors),
    )


def _lora(header: Header, filename: str) -> dict[str, ModuleShape]:
    """Of a LoRA in diffusers' layout."""
    configs = peft_configs(header, filename)
    return {
        name: ModuleShape(rank=module.rank, alpha=_alpha(configs, name))
        for name, module in lora_modules(header, filename).items()
    }


def _products(header: Header) -> dict[str, ModuleShape]:
    """Of `adapter.safetensors`, whose products carry their scale already: alpha is the rank."""
    downs = {
        key.removeprefix("lora.").removesuffix(".down"): tensor.shape[0]
        for key, tensor in header.tensors.items()
        if key.startswith("lora.") and key.endswith(".down")
    }
    return {name: ModuleShape(rank=rank, alpha=rank) for name, rank in downs.items()}


def _alpha(configs: dict[str, dict[str, Any]], name: str) -> float:
    part, _, module = name.partition(".")
    return module_alpha(configs[part], module)
