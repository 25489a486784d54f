"""What a prompt says about its adapters: `<name>` stands for the subject that `name` learned.

"<rex> on the moon"  with rex@3 (trigger "sks", class noun "dog")  →  "sks dog on the moon"

An adapter that learned tokens answers to a word that is its own alone: two owners may call their
subjects the same. Its trigger in a prompt is written as that word, so both of these mean the same:

"<rex> on the moon", "a sks dog on the moon"  →  "adv_… dog on the moon", "a adv_… dog on the moon"

A merged version answers to the names of all its subjects, and to its own as all of them:

"<rex> meets <fido>"  →  "adv_… dog meets adv_…-2 dog",    "<duo>"  →  "adv_… dog and adv_…-2 dog"
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lookalike_platform.errors import FieldProblem, InvalidRequest

NAME = re.compile(r"<(?P<name>[\w.-]+)>")


@dataclass(frozen=True)
class Subject:
    """An adapter as prompts know it.

    word: stands for the tokens it learned, if it learned any; else empty
    phrase: how its subject is spoken of, of {trigger} and {class_noun}
    """

    name: str
    trigger: str
    class_noun: str
    word: str = ""
    phrase: str = "{trigger} {class_noun}"

    def spoken(self) -> str:
        return self.phrase.format(trigger=self.word or self.trigger, class_noun=self.class_noun)


def bind(
    prompt: str,
    subjects: Sequence[Subject],
    groups: Mapping[str, Sequence[Subject]] | None = None,
    path: str = "prompt",
) -> tuple[str, list[str]]:
    """The prompt for the text encoder, and warnings about adapters it does not speak to.

    Args:
        groups: names that stand for several of the subjects at once.
        path: of the request's field that has the prompt.

    Raises:
        InvalidRequest: `<name>` of an adapter that is not in the request, or a trigger that
            more than one of them answers to.
    """
    known = {subject.name: [subject] for subject in subjects} | dict(groups or {})
    said = set(NAME.findall(prompt))
    if unknown := sorted(said - known.keys()):
        listed = ", ".join(f"<{name}>" for name in known) or "none"
        raise InvalidRequest(
            "The prompt names a subject the request brings no adapter for.",
            [
                FieldProblem(
                    path,
                    f"<{name}> is unknown (adapters of this request: {listed}). Add it to "
                    "`adapters`, or write the word without angle brackets.",
                )
                for name in unknown
            ],
        )
    bound = _written(prompt, known, subjects, path)
    named = {subject.name for name in said for subject in known[name]}
    return bound, _unheard(bound, named, subjects) + _alike(subjects)


def _written(
    prompt: str,
    known: Mapping[str, Sequence[Subject]],
    subjects: Sequence[Subject],
    path: str,
) -> str:
    """All in one pass: a trigger may be part of another's name, and of another trigger."""
    # At one place the longest counts.
    ranked = sorted(subjects, key=lambda subject: len(subject.trigger), reverse=True)

    def write(match: re.Match[str]) -> str:
        if match["name"]:
            return " and ".join(subject.spoken() for subject in known[match["name"]])
        said = zip(ranked, match.groups()[1:], strict=True)
        meant = next(subject for subject, trigger in said if trigger)
        _refuse_ambiguous(meant.trigger, subjects, path)
        return meant.word or match[0]

    triggers = [f"({_mention(subject.trigger).pattern})" for subject in ranked]
    return re.sub("|".join([NAME.pattern, *triggers]), write, prompt, flags=re.IGNORECASE)


def _refuse_ambiguous(trigger: str, subjects: Sequence[Subject], path: str) -> None:
    """A bare trigger that a learned word shares with another subject could mean either."""
    alike = [subject for subject in subjects if subject.trigger.lower() == trigger.lower()]
    if len(alike) > 1 and any(subject.word for subject in alike):
        listed = " or ".join(f"<{subject.name}>" for subject in alike)
        raise InvalidRequest(
            "The prompt does not say which subject is meant.",
            [FieldProblem(path, f"{trigger} may mean {listed}: write that")],
        )


def _unheard(bound: str, named: set[str], subjects: Sequence[Subject]) -> list[str]:
    return [
        f"The prompt does not mention {subject.name}, which learned its subject as "
        f"“{subject.phrase.format(trigger=subject.trigger, class_noun=subject.class_noun)}”: "
        f"write <{subject.name}> where it should appear."
        for subject in subjects
        if subject.name not in named and not _says(bound, subject.word or subject.trigger)
    ]


def _alike(subjects: Sequence[Subject]) -> list[str]:
    """Subjects of one trigger word are one word to the text encoder, but for learned words."""
    by_trigger: dict[str, list[str]] = {}
    for subject in (s for s in subjects if not s.word):
        by_trigger.setdefault(subject.trigger.lower(), []).append(subject.name)
    return [
        f"{' and '.join(names)} share the trigger word “{trigger}”, so their subjects may mix: "
        "train them with different triggers to keep them apart."
        for trigger, names in by_trigger.items()
        if len(names) > 1
    ]


def _says(prompt: str, word: str) -> bool:
    return _mention(word).search(prompt) is not None


def _mention(word: str) -> re.Pattern[str]:
    """The word as a whole, in any case."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
