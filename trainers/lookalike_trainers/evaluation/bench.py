"""DreamBench on this machine: methods trained in run folders of their own, the base in memory.

Torch. No database, broker or registry takes part: thousands of adapters that nobody will use are
not worth registering.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import JsonValue, ValidationError

from lookalike_datasets.intake import examine
from lookalike_platform.bases import Base
from lookalike_platform.device import device_of
from lookalike_platform.errors import FieldProblem, InvalidRequest, TrainingFailed
from lookalike_platform.files import atomic_write, canonical_digest, sha256_file
from lookalike_platform.settings import Settings
from lookalike_trainers.assignment import complete
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.defaults import defaults_on
from lookalike_trainers.evaluation.dreambench import Subject
from lookalike_trainers.evaluation.encoders import Judges, open_judges
from lookalike_trainers.evaluation.protocol import Contender
from lookalike_trainers.launcher import Launch, launch
from lookalike_trainers.methods.find import wear_of
from lookalike_trainers.painting import STYLE, Style, paint
from lookalike_trainers.rare_tokens import rare_words
from lookalike_trainers.run_request import MoreSubject, RunImage, RunRequest

OnMessage = Callable[[dict[str, Any]], object]
"""Called with what a training says (docs/architecture.md, run folder)."""


def contender(name: str, method: str, options: dict[str, JsonValue], base: Base) -> Contender:
    """A row of the table, with every option of its method filled in.

    Without a trigger it is the rarest word of the base's vocabulary, as in a training job.

    Raises InvalidRequest for a method that does not exist, and for wrong options, with their paths.
    """
    info = next((m for m in METHODS if m.name == method), None)
    if info is None:
        known = ", ".join(m.name for m in METHODS)
        raise InvalidRequest(f"There is no method {method!r}; choose among {known}.")
    given = defaults_on(base, info.config) | options
    if given.get("trigger") is None:
        given["trigger"] = rare_words(base.folder)[0]
    try:
        config = info.config.model_validate(given)
    except ValidationError as error:
        problems = [
            FieldProblem(".".join([name, *map(str, problem["loc"])]), problem["msg"])
            for problem in error.errors()
        ]
        raise InvalidRequest(f"{name} cannot be trained as asked.", problems) from error
    if getattr(config, "also", ()) or (config.prior and config.prior.subject_set):
        raise InvalidRequest(f"{name} names subject sets; here subjects are folders, one a run.")
    calls = config.phrase.replace("{trigger}", config.trigger)
    return Contender(name, method, config.model_dump(mode="json"), calls)


@dataclass(frozen=True)
class Workshop:
    """What trains and paints for a protocol.

    runs: the folder of run folders; a training that is there and complete is used again.
    """

    base: Base
    parts: BaseParts
    settings: Settings
    runs: Path
    on_message: OnMessage = lambda message: None
    style: Style = STYLE

    def judges(self) -> Judges:
        return open_judges(self.parts, self.settings.clip_encoder, self.settings.dino_encoder)

    def decides(self) -> dict[str, JsonValue]:
        """What of this workshop decides a cell.

        The number of processes does, since each brings a batch of its own to a step.
        """
        return {
            "base": self.base.fingerprint,
            "style": asdict(self.style),
            "num_processes": self.settings.num_processes,
            "zero_stage": self.settings.zero_stage,
        }

    def train(self, contender: Contender, subject: Subject, also: Sequence[Subject] = ()) -> Path:
        """The adapter's file.

        Args:
            also: more subjects that the run learns beside the first (Custom Diffusion).

        Raises TrainingFailed; InvalidRequest for photos that cannot be used. Interrupted, it goes
        on from its last checkpoint the next time.
        """
        decides: list[JsonValue] = [
            contender.method,
            contender.config,
            subject.digest,
            self.base.fingerprint,
            self._processes(_config(contender)),
            *(other.digest for other in also),
        ]
        key = canonical_digest(decides)
        folder = self.runs / key[:16]
        result = folder / "result"
        if not (result / "result.json").exists():
            running = launch(self._request(contender, subject, also, folder, key), folder)
            try:
                self._listen(running)
            finally:
                running.kill(grace=5)
        name: str = json.loads((result / "result.json").read_text())["weights"]
        return result / name

    def paint(
        self,
        contender: Contender,
        adapter: Path,
        prompts: Sequence[str],
        seeds: Sequence[int],
    ) -> list[list[Image.Image]]:
        word = str(contender.config["trigger"])
        take_off = wear_of(contender.method)(self.parts, adapter, 1.0, word)
        pictures = paint(self.parts, prompts, seeds, self._resolution(contender), self.style)
        take_off()  # the base judges bare
        return pictures

    def _resolution(self, contender: Contender) -> int:
        asked = contender.config["resolution"]
        return asked if isinstance(asked, int) else self.base.resolution

    def _listen(self, running: Launch) -> None:
        last: dict[str, Any] = {}
        for message in running.messages():
            if message["type"] in ("done", "error", "crash"):
                last = message
            self.on_message(message)
        match last:
            case {"outcome": "complete"}:
                return
            case {"problem": {"detail": detail}}:
                raise TrainingFailed(detail)
            case {"detail": detail}:
                raise TrainingFailed(f"The trainer stopped ({detail}); its log has the story.")
        raise TrainingFailed(f"The trainer stopped. Its log ends:\n{running.log_tail(12)}")

    def _request(
        self,
        contender: Contender,
        subject: Subject,
        also: Sequence[Subject],
        folder: Path,
        key: str,
    ) -> RunRequest:
        base, settings, noun = self.base, self.settings, subject.about.class_noun
        config = _config(contender)
        return RunRequest(
            job_id=f"bench_{key[:16]}",
            owner="bench",
            concept=subject.name,
            class_noun=noun,
            method=contender.method,
            config=complete(config, base, noun).model_dump(mode="json"),
            base_name=base.name,
            base_folder=base.folder,
            base_fingerprint=base.fingerprint,
            base_family=base.family,
            prediction_type=base.prediction_type,
            images=_photos(subject, folder / "photos", settings),
            also=[
                MoreSubject(
                    class_noun=other.about.class_noun,
                    images=_photos(other, folder / f"photos-{number}", settings),
                )
                for number, other in enumerate(also, start=2)
            ],
            cache=settings.cache,
            clip_encoder=settings.clip_encoder,
            dino_encoder=settings.dino_encoder,
            device=settings.device,
            **self._processes(config),
        )

    def _processes(self, config: TrainingConfig) -> dict[str, Any]:
        """Over how many processes a run goes, and how: its own choice, or the operator's."""
        own, settings = config, self.settings
        return {
            "num_processes": own.num_processes or settings.num_processes,
            "zero_stage": settings.zero_stage if own.zero_stage is None else own.zero_stage,
        }


def open_workshop(base: Base, settings: Settings, runs: Path, on_message: OnMessage) -> Workshop:
    """The workshop on the settings' device, quiet on standard error."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    parts = BaseParts(base.folder, device_of(settings.device), settings.cache)
    return Workshop(base, parts, settings, runs, on_message)


def _config(contender: Contender) -> TrainingConfig:
    info = next(m for m in METHODS if m.name == contender.method)
    return info.config.model_validate(contender.config)


def _photos(subject: Subject, folder: Path, settings: Settings) -> list[RunImage]:
    """The photos as an upload would leave them: upright, pixels alone."""
    images, problems = [], []
    for number, photo in enumerate(subject.photos):
        with photo.open("rb") as file:
            verdict = examine(photo.name, file, settings)
        if not verdict.accepted:
            problems.append(FieldProblem(f"{subject.name}/{photo.name}", str(verdict.reason)))
            continue
        path = folder / f"{number:02d}.png"
        atomic_write(path, verdict.png)
        images.append(RunImage(path=path, sha256=sha256_file(path)))
    if problems:
        raise InvalidRequest("Not every photo can be learned from.", problems)
    return images
