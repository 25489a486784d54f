"""Subjects learned for benchmarks of composition, merged, painted, and looked for in pictures."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from orders import Painter
from PIL import Image

from lookalike_api.sampling.messages import AdapterFile
from lookalike_platform.files import sha256_file
from lookalike_registry.compose import rules
from lookalike_registry.manifest import SubjectRecord
from lookalike_registry.tensor_file import nth_word
from lookalike_trainers.composition.merging import merge
from lookalike_trainers.composition.request import CompositionRequest, MergeOptions, ParentFile
from lookalike_trainers.evaluation.bench import Workshop, contender
from lookalike_trainers.evaluation.dreambench import Subject
from lookalike_trainers.evaluation.encoders import ImageEncoder
from lookalike_trainers.evaluation.measures import cosines
from lookalike_trainers.methods.composition import save
from lookalike_trainers.methods.method import Card
from lookalike_trainers.rare_tokens import rare_words

PLACES = 5  # squares that are looked at in a picture
NEAREST = 5  # known squares that a square is compared with
RIDGE = 0.1  # of the features' mean variance
MERGES = ("weighted_sum", "ssr", "fusion", "svd", "ties", "dare_linear")

Order = dict[str, Any]
"""As Painter.send takes it."""


@dataclass(frozen=True)
class Version:
    """An adapter's file, and the subjects it knows in the order of its words."""

    name: str
    method: str
    file: Path
    subjects: tuple[SubjectRecord, ...]

    def worn(self, scale: float = 1.0) -> AdapterFile:
        return AdapterFile(self.name, sha256_file(self.file), self.file, scale, self.word)

    @property
    def word(self) -> str:
        """What its learned words are called in prompts, as the service makes them private."""
        return f"lk{self.name.replace('_', '')}"

    def called(self) -> list[str]:
        """How prompts speak of its subjects."""
        return [
            subject.phrase.format(
                trigger=nth_word(self.word, place) if subject.learned else subject.trigger,
                class_noun=subject.class_noun,
            )
            for place, subject in enumerate(self.subjects, 1)
        ]


@dataclass(frozen=True)
class Bench:
    workshop: Workshop
    painter: Painter
    results: Path

    def key(self, *orders: Order) -> str:
        """Of all that decides what they paint."""
        return hashlib.sha256(repr((self.painter.steps, orders)).encode()).hexdigest()[:16]

    def pictures(self, name: str, orders: Sequence[Order]) -> list[Image.Image]:
        """Painted, or as they were painted before."""
        folder = self.results / "pictures" / name
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{self.key(order)}.png" for order in orders]
        missing = [place for place, file in enumerate(files) if not file.exists()]
        painted = self.painter.paint([orders[place] for place in missing])
        for place, picture in zip(missing, painted, strict=True):
            picture.save(files[place])
        return [Image.open(file).convert("RGB") for file in files]

    def merged(self, strategy: str, parents: Sequence[Version]) -> Version:
        names = "-".join(parent.name for parent in parents)
        folder = self.results / "merged" / f"{strategy}-{parents[0].method}-{len(parents)}-{names}"
        return _merge(self.workshop, strategy, parents, folder)


def learn(workshop: Workshop, method: str, steps: int, number: int, *subjects: Subject) -> Version:
    """An adapter of these subjects; `number` counts the versions, each with a rare word."""
    first, *also = subjects
    word = rare_words(workshop.base.folder)[number]
    asked = contender(first.name, method, {"steps": steps, "trigger": word}, workshop.base)
    file = workshop.train(asked, first, also)
    records = [
        SubjectRecord(
            name=subject.name.replace("_", "-"),
            trigger=word,
            class_noun=subject.about.class_noun,
            phrase="{trigger} {class_noun}",
            learned=bool(asked.config["token_vectors"]),
        )
        for subject in subjects
    ]
    print(f"learned {method} of {', '.join(s.name for s in subjects)}", flush=True)
    return Version("-".join(s.name for s in subjects), method, file, tuple(records))


def _merge(workshop: Workshop, strategy: str, parents: Sequence[Version], folder: Path) -> Version:
    """The parents as one version, kept in a folder of its own."""
    base, settings = workshop.base, workshop.settings
    request = CompositionRequest(
        name=strategy,
        strategy=strategy,
        options=MergeOptions(),
        parents=[
            ParentFile(
                ref=p.name,
                digest=sha256_file(p.file),
                method=p.method,
                file=p.file,
                scale=1.0,
                subjects=list(p.subjects),
            )
            for p in parents
        ],
        base_folder=base.folder,
        family=base.family,
        prediction_type=base.prediction_type,
        resolution=base.resolution,
        cache=settings.cache,
        device="auto",
    )
    subjects = tuple(subject for parent in parents for subject in parent.subjects)
    trigger = subjects[0].trigger
    card = Card(strategy, base.family, base.resolution, trigger, base.prediction_type)
    folder.mkdir(parents=True, exist_ok=True)
    file = save(merge(request, workshop.parts, lambda done, total: None), folder, card)
    method = "lora" if file.name == "pytorch_lora_weights.safetensors" else rules.COMPOSITION
    return Version(strategy, method, file, subjects)


class Detector:
    """Finds a subject in squares of pictures, by the evaluation's encoder.

    Which direction of its features tells the subject is learned by ridge regression, 1 and -1 as
    targets, of squares that have it, as its own adapter paints it, and squares that have not.
    What resembles nothing known is no subject: a square must be as near to some that have it, by
    the mean cosine of the nearest few, as all but one in twenty of these are to the others.
    """

    def __init__(self, yes: torch.Tensor, no: torch.Tensor) -> None:
        """Squares' features [n, width], two of each scene: every other scene's are learned from,
        and the others measure how far this can be trusted (`hits`, `false_alarms`)."""
        (self._known, yes), (others, no) = (_halves(squares.double()) for squares in (yes, no))
        self._middle = (self._known.mean(0) + others.mean(0)) / 2
        sides = [side - self._middle for side in (self._known, others)]
        gram = torch.stack([side.T @ side / len(side) for side in sides]).sum(0)
        ridge = RIDGE * gram.trace() / len(gram) * torch.eye(len(gram), dtype=gram.dtype)
        wanted = sides[0].mean(0) - sides[1].mean(0)
        self._direction = torch.linalg.solve(gram + ridge, wanted)
        among = cosines(self._known, self._known).topk(NEAREST + 1, dim=1).values[:, 1:]
        self._least = float(among.mean(1).quantile(0.05))  # each left out of its own nearest
        self.hits = float(self.seen(yes).double().mean())
        self.false_alarms = float(self.seen(no).double().mean())

    def seen(self, features: torch.Tensor) -> torch.Tensor:
        """Where it is, [...] of features [..., width]."""
        flat = features.flatten(0, -2).double()
        told = (flat - self._middle) @ self._direction > 0
        return (told & (self._nearness(flat) >= self._least)).view(features.shape[:-1])

    def _nearness(self, features: torch.Tensor) -> torch.Tensor:
        nearest: torch.Tensor = cosines(features, self._known).topk(NEAREST, dim=1).values
        return nearest.mean(1)


def _halves(squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    known = torch.arange(len(squares)) // 2 % 2 == 0
    return squares[known], squares[~known]


def squares_of(encoder: ImageEncoder, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Features [n, PLACES, width] of squares of half the side, at half height, left to right."""
    width, height = pictures[0].size
    side, top = width // 2, height // 4
    starts = [place * (width - side) // (PLACES - 1) for place in range(PLACES)]
    cut = [picture.crop((x, top, x + side, top + side)) for picture in pictures for x in starts]
    features = encoder.encode_images(cut)
    return features.view(len(pictures), PLACES, -1)


def both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of where two subjects are seen [n, PLACES] in which pictures [n] they stand apart: by half
    of a square at least."""
    places = torch.arange(PLACES)
    apart = (places[:, None] - places[None]).abs() >= PLACES // 2
    return (first[:, :, None] & second[:, None] & apart).flatten(1).any(1)
