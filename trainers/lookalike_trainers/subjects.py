"""The subjects of a run: one, or the several that Custom Diffusion learns at once. Torch-free."""

from typing import NamedTuple

from lookalike_registry.tensor_file import nth_word
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.run_request import RunImage, RunRequest


class Subject(NamedTuple):
    """One subject; config: the run's, with the word this subject answers to as its trigger."""

    config: TrainingConfig
    class_noun: str
    images: list[RunImage]


def subjects_of(request: RunRequest, config: TrainingConfig) -> list[Subject]:
    first = Subject(config, request.class_noun, request.images)
    others = [
        Subject(
            config.model_copy(update={"trigger": nth_word(config.trigger, number)}),
            one.class_noun,
            one.images,
        )
        for number, one in enumerate(request.also, start=2)
    ]
    return [first, *others]
