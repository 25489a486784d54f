"""The DreamBench protocol: every method, every subject, the paper's prompts, one table. Torch.

    method x subject ─→ train ─→ paint 25 prompts x 4 seeds, and the class ─→ score ─→ a cell

A cell is kept as a file named by the digest of everything that decides it, so a protocol that was
stopped goes on where it was, and a changed photo, option, seed or judge is another cell. How to
train and how to paint are the caller's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from lookalike_platform.files import atomic_write, canonical_digest
from lookalike_trainers.evaluation.dreambench import Subject
from lookalike_trainers.evaluation.encoders import Judges
from lookalike_trainers.evaluation.request import CLASS_SEED
from lookalike_trainers.evaluation.scores import Paintings, Scores, score
from lookalike_trainers.evaluation.trial import read_photos

VERSION = 2
"""Counts up when the protocol itself changes what a cell would say."""


@dataclass(frozen=True)
class Contender:
    """A method with its whole config, under the name its row shall have.

    calls: what its adapters answer to, "sks {class_noun}".
    """

    name: str
    method: str
    config: dict[str, JsonValue]
    calls: str = "sks {class_noun}"


Train = Callable[[Contender, Subject], Path]
"""Gives the adapter's file."""
Paint = Callable[[Contender, Path, Sequence[str], Sequence[int]], list[list[Image.Image]]]
"""With the contender's adapter, for prompts and seeds: of each prompt one picture a seed."""


@dataclass(frozen=True)
class Protocol:
    """What is asked of every contender.

    images_per_prompt: 4 in the paper
    class_images: pictures of "a {class noun}", for drift and diversity of the class
    decided_by: whatever else decides the pictures: base, sampler, guidance, …
    """

    decided_by: dict[str, JsonValue]
    images_per_prompt: int = 4
    class_images: int = 8
    seed: int = 0
    prompts: int = 25
    """How many of the paper's prompts; fewer make a quick look, not a DreamBench result."""


class Cell(BaseModel):
    """One method on one subject."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contender: str
    subject: str
    key: str
    scores: Scores


def run(
    protocol: Protocol,
    contenders: Sequence[Contender],
    subjects: Sequence[Subject],
    results: Path,
    judges: Judges,
    train: Train,
    paint: Paint,
    on_cell: Callable[[Cell, bool], None] = lambda cell, computed: None,
) -> list[Cell]:
    """All cells, those that `results` holds read from there.

    Args:
        on_cell: called with each cell, and whether it was computed now.
    """
    cells = []
    for subject in subjects:
        for contender in contenders:
            key = cell_key(protocol, contender, subject, judges)
            file = results / f"{key}.json"
            cell = _read(file)
            computed = cell is None
            if cell is None:
                painted = _paint(protocol, contender, subject, train, paint)
                real = read_photos(subject.photos)
                cell = Cell(
                    contender=contender.name,
                    subject=subject.name,
                    key=key,
                    scores=score(judges, real, painted),
                )
                atomic_write(file, cell.model_dump_json(indent=1))
            # A row's and a column's name do not decide a cell, so the file may have older ones.
            cell = cell.model_copy(update={"contender": contender.name, "subject": subject.name})
            on_cell(cell, computed)
            cells.append(cell)
    return cells


def cell_key(protocol: Protocol, contender: Contender, subject: Subject, judges: Judges) -> str:
    """The digest of everything that decides a cell."""
    parts: dict[str, Any] = {
        "version": VERSION,
        "protocol": vars(protocol),
        "method": contender.method,
        "config": contender.config,
        "calls": contender.calls,
        "subject": subject.digest,
        "judges": judges.digests(),
    }
    return canonical_digest(parts)


def _paint(
    protocol: Protocol, contender: Contender, subject: Subject, train: Train, paint: Paint
) -> Paintings:
    adapter = train(contender, subject)
    noun = subject.about.class_noun
    called = contender.calls.format(class_noun=noun)
    templates = subject.prompts[: protocol.prompts]
    asked = [template.format(subject=called) for template in templates]
    seeds = range(protocol.seed, protocol.seed + protocol.images_per_prompt)
    first = CLASS_SEED + protocol.seed
    of_class_seeds = range(first, first + protocol.class_images)
    return Paintings(
        prompts=[template.format(subject=noun) for template in templates],
        of_subject=paint(contender, adapter, asked, seeds),
        of_class=paint(contender, adapter, [f"a {noun}"], of_class_seeds)[0],
        class_noun=noun,
    )


def _read(file: Path) -> Cell | None:
    try:
        return Cell.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None  # a file of another version is computed anew
