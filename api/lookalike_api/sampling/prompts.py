"""What a prompt says about its adapters: `<name>` stands for the subject that `name` learned.

"<rex> on the moon"  with rex@3 (trigger "sks", class noun "dog")  →  "sks dog on the moon"
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lookalike_platform.errors import FieldProblem, InvalidRequest

NAME = re.compile(r"<([\w.-]+)>")


@dataclass(frozen=True)
class Subject:
    """An adapter as prompts know it."""

    name: str
    trigger: str
    class_noun: str

    @property
    def phrase(self) -> str:
        return f"{self.trigger} {self.class_noun}"


def bind(prompt: str, subjects: Sequence[Subject]) -> tuple[str, list[str]]:
    """The prompt for the text encoder, and warnings about adapters it does not speak to.

    Raises:
        InvalidRequest: `<name>` of an adapter that is not in the request.
    """
    by_name = {subject.name: subject for subject in subjects}
    named = set(NAME.findall(prompt))
    if unknown := sorted(named - by_name.keys()):
        listed = ", ".join(f"<{name}>" for name in by_name) or "none"
        raise InvalidRequest(
            "The prompt names a subject the request brings no adapter for.",
            [
                FieldProblem(
                    "prompt",
                    f"<{name}> is unknown (adapters of this request: {listed}). Add it to "
                    "`adapters`, or write the word without angle brackets.",
                )
                for name in unknown
            ],
        )
    bound = NAME.sub(lambda match: by_name[match[1]].phrase, prompt)
    return bound, _unheard(bound, named, subjects) + _alike(subjects)


def _unheard(bound: str, named: set[str], subjects: Sequence[Subject]) -> list[str]:
    return [
        f"The prompt does not mention {subject.name}, which learned its subject as "
        f"“{subject.phrase}”: write <{subject.name}> where it should appear."
        for subject in subjects
        if subject.name not in named and not _says(bound, subject.trigger)
    ]


def _alike(subjects: Sequence[Subject]) -> list[str]:
    """Subjects of one trigger word are one word to the text encoder."""
    by_trigger: dict[str, list[str]] = {}
    for subject in subjects:
        by_trigger.setdefault(subject.trigger.lower(), []).append(subject.name)
    return [
        f"{' and '.join(names)} share the trigger word “{trigger}”, so their subjects may mix: "
        "train them with different triggers to keep them apart."
        for trigger, names in by_trigger.items()
        if len(names) > 1
    ]


def _says(prompt: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) is not None
