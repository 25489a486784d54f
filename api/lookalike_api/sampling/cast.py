"""The adapters of one prompt: looked up once, checked, and pinned. Torch-free."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from lookalike_api.sampling.prompts import Subject, bind
from lookalike_api.sampling.requests import AdapterUse, PinnedAdapter
from lookalike_platform.bases import Base
from lookalike_platform.db.tables import AdapterVersion
from lookalike_platform.errors import FieldProblem, InvalidRequest, fault_of
from lookalike_registry import versions
from lookalike_registry.compose import rules
from lookalike_registry.manifest import Manifest
from lookalike_registry.tensor_file import nth_word
from lookalike_trainers.catalog import METHODS

BY_ROW = frozenset({rules.COMPOSITION, *(info.name for info in METHODS if info.rows)})
"""Kinds of adapters that can act on a part of what the base does. Of merged versions some can: the
file tells, and the sampler refuses the others (parts.check_regional)."""


@dataclass(frozen=True)
class Cast:
    """Who acts in one prompt.

    path: of the request's object that has the prompt, with its dot: "regions[0]."
    """

    path: str
    uses: Sequence[AdapterUse]
    found: list[AdapterVersion]
    manifests: list[Manifest]

    def bind(self, prompt: str) -> tuple[str, list[str]]:
        """The prompt for the text encoder, and warnings. Raises InvalidRequest; see prompts.py."""
        bound, warnings = bind(prompt, self.subjects, self.groups, f"{self.path}prompt")
        where = f"{self.path.removesuffix('.')}: " if self.path else ""
        return bound, [where + warning for warning in warnings]

    def bind_negative(self, prompt: str, others: Sequence["Cast"]) -> str:
        """The request's negative prompt, as it is read where these act.

        It may name subjects of the other prompts, too. Here nobody knows them: they are spoken of
        by their class noun. Raises InvalidRequest.
        """
        groups: dict[str, list[Subject]] = {}
        for cast in others:
            groups |= {name: _unknown(subjects) for name, subjects in cast.groups.items()}
        # That it does not mention an adapter is as it should be: no warnings.
        bound, _ = bind(prompt, self.subjects, groups | self.groups, "negative_prompt")
        return bound

    @property
    def subjects(self) -> list[Subject]:
        return [subject for manifest in self.manifests for subject in subjects_of(manifest)]

    @property
    def groups(self) -> dict[str, list[Subject]]:
        """Whom each name stands for: a subject's own for it, a version's for all of its."""
        alone = {subject.name: [subject] for subject in self.subjects}
        return alone | {m.identity.concept: subjects_of(m) for m in self.manifests}

    def pinned(self) -> list[PinnedAdapter]:
        return [
            PinnedAdapter(
                id=version.id,
                asked=use.ref,
                ref=version.ref,
                name=version.concept,
                version=version.version,
                digest=version.digest,
                scale=use.scale,
                word=version.id if manifest.weights.token_count else "",
            )
            for version, use, manifest in zip(self.found, self.uses, self.manifests, strict=True)
        ]

    def other_bases(self, base: Base) -> list[FieldProblem]:
        """A problem for each adapter of another base."""
        return [
            FieldProblem(
                f"{self.path}adapters[{number}].ref",
                f"{version.ref} was trained on the base model "
                f"{manifest.base.name} ({manifest.base.fingerprint[:12]}), and this request "
                f"samples {base.name} ({base.fingerprint[:12]}): use its own base, or train it on "
                "this one",
            )
            for number, (version, manifest) in enumerate(
                zip(self.found, self.manifests, strict=True)
            )
            if version.base_fingerprint != base.fingerprint
        ]

    def whole(self) -> list[FieldProblem]:
        """A problem for each adapter that the base can only wear as a whole."""
        kinds = [rules.kind_of(manifest) for manifest in self.manifests]
        return [
            FieldProblem(
                f"{self.path}adapters[{number}].ref",
                f"{version.ref} ({kind}) changes the base as a whole, and would act in every "
                'region: ask for "compose": "latents", where each region has the base to itself',
            )
            for number, (version, kind) in enumerate(zip(self.found, kinds, strict=True))
            if kind not in BY_ROW
        ]


def look_up(session: Session, owner: str, uses: Sequence[AdapterUse], path: str = "") -> Cast:
    """Raises InvalidRequest for adapters that are not there, and that cannot act together."""
    found = []
    for number, use in enumerate(uses):
        with fault_of(f"{path}adapters[{number}].ref"):
            found.append(versions.resolve(session, owner, use.ref, lock=True))
    cast = Cast(path, uses, found, [Manifest.model_validate(one.manifest) for one in found])
    _refuse_twice(cast)
    _refuse_together(cast)
    return cast


def subjects_of(manifest: Manifest) -> list[Subject]:
    """Whom a version can paint; of a merged one, each by its own name.

    Learned tokens get a word of the version's own: two owners may use the same trigger.
    """
    return [
        Subject(
            name=subject.name,
            trigger=subject.trigger,
            class_noun=subject.class_noun,
            word=nth_word(manifest.identity.id, place) if subject.learned else "",
            phrase=subject.phrase,
        )
        for place, subject in enumerate(manifest.subjects, 1)
    ]


def _unknown(subjects: Sequence[Subject]) -> list[Subject]:
    return [replace(subject, word="", phrase="{class_noun}") for subject in subjects]


def _refuse_twice(cast: Cast) -> None:
    names = Counter(name for manifest in cast.manifests for name in manifest.names)
    twice = [name for name, times in names.items() if times > 1]
    if twice:
        raise InvalidRequest(
            "An adapter is listed more than once.",
            [
                FieldProblem(f"{cast.path}adapters", f"list {name} once, with one scale")
                for name in twice
            ],
        )


def _refuse_together(cast: Cast) -> None:
    """By the table of registry/compose/rules.py."""
    refs = [version.ref for version in cast.found]
    problems = [
        FieldProblem(
            f"{cast.path}adapters[{other}].ref",
            f"{refs[other]} cannot act with {refs[one]}: {why}",
        )
        for one, other, why in rules.refusals([rules.kind_of(m) for m in cast.manifests])
    ]
    if problems:
        raise InvalidRequest(
            "These adapters cannot act in one prompt. Each in a region of its own they can, with "
            '"compose": "latents".',
            problems,
        )
