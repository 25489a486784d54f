"""Subjects learned for benchmarks of composition, merged, and looked for in pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
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
from lookalike_trainers.evaluation.trial import read_photos
from lookalike_trainers.methods.composition import save
from lookalike_trainers.methods.method import Card
from lookalike_trainers.rare_tokens import rare_words

STEP = 16  # pixels between the squares that are looked at
APART = 32  # subjects are apart if their squares are: half of a square of the bundled base


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


def merged(workshop: Workshop, strategy: str, parents: Sequence[Version], folder: Path) -> Version:
    """The parents as one version, kept in a folder of its own."""
    base, settings = workshop.base, workshop.settings
    request = CompositionRequest(
        name=strategy,
        strategy=strategy,
        options=MergeOptions(),
        parents=[
            ParentFile(method=p.method, file=p.file, scale=1.0, subjects=list(p.subjects))
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
    """Finds a subject in pictures: some square of them is like enough its photos.

    What is enough parts best the pictures that its own adapter paints of it from those that the
    base paints of its class: the threshold of highest balanced accuracy.
    """

    def __init__(self, encoder: ImageEncoder, subject: Subject) -> None:
        self._photos = encoder.encode_images(read_photos(subject.photos))
        self.threshold, self.hits, self.false_alarms = 0.0, 0.0, 0.0

    def likeness(self, squares: torch.Tensor) -> torch.Tensor:
        """Of squares' features [n, squares, width] the mean cosine to the photos [n, squares]."""
        flat = cosines(squares.flatten(0, 1), self._photos).mean(1)
        return flat.view(squares.shape[:2])

    def calibrate(self, own: torch.Tensor, of_class: torch.Tensor) -> None:
        """By its own pictures and those of its class, a square each, [n, 1, width]."""
        yes, no = self.likeness(own)[:, 0], self.likeness(of_class)[:, 0]
        bounds = torch.cat([yes, no])
        right = (yes >= bounds[:, None]).double().mean(1) + (no < bounds[:, None]).double().mean(1)
        self.threshold = float(bounds[right.argmax()])
        self.hits = float((yes >= self.threshold).double().mean())
        self.false_alarms = float((no >= self.threshold).double().mean())

    def seen(self, squares: torch.Tensor) -> torch.Tensor:
        """In which squares it is, [n, squares]."""
        return self.likeness(squares) >= self.threshold


def squares_of(encoder: ImageEncoder, side: int, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Features [n, squares, width] of the squares of wide pictures, from left to right."""
    starts = range(0, pictures[0].width - side + 1, STEP)
    cut = [picture.crop((x, 0, x + side, side)) for picture in pictures for x in starts]
    return encoder.encode_images(cut).unflatten(0, (len(pictures), len(starts)))


def both(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of where two subjects are seen [n, squares] in which pictures [n] they stand apart."""
    places = torch.arange(first.shape[1]) * STEP
    apart = (places[:, None] - places[None]).abs() >= APART
    return (first[:, :, None] & second[:, None] & apart).flatten(1).any(1)
