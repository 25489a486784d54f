"""What a merge may ask for, and its admission as a job."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

from pydantic import ConfigDict, Field
from sqlalchemy.orm import Session

from lookalike_api.http.problems import wrong_values
from lookalike_api.sampling.requests import AdapterUse, Strict
from lookalike_platform import bases
from lookalike_platform.bases import Base
from lookalike_platform.db.tables import AdapterVersion
from lookalike_platform.errors import FieldProblem, NotFound, fault_of
from lookalike_platform.jobs.store import NewJob
from lookalike_platform.settings import Settings
from lookalike_registry import versions
from lookalike_registry.compose import rules
from lookalike_registry.manifest import NAME_PATTERN, Manifest
from lookalike_trainers.composition.request import (
    MAX_PARENTS,
    ComposeJob,
    MergeOptions,
    PinnedParent,
)


class CompositionWanted(Strict):
    """Adapters to merge into a version of `name`. `parents`: each with its weight in the merge.

    `strategy`: GET /v1/compositions/rules has them, what they take, and their options. Left out:
    the first that takes all parents. `<name>` of each parent stays a word of prompts.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "pack",
                    "parents": [{"ref": "rex@3"}, {"ref": "fido@1", "scale": 0.9}],
                    "strategy": "ssr",
                }
            ]
        }
    )

    name: str = Field(pattern=NAME_PATTERN)
    parents: list[AdapterUse] = Field(min_length=2, max_length=MAX_PARENTS)
    strategy: str | None = Field(
        default=None, json_schema_extra={"enum": [one.name for one in rules.STRATEGIES]}
    )
    options: MergeOptions = MergeOptions()


def admit(session: Session, owner: str, settings: Settings, wanted: CompositionWanted) -> NewJob:
    """The job for a request, with its parents pinned and its strategy decided.

    Raises InvalidRequest if it cannot be carried out, with the path of each wrong field.
    """
    found = list(_resolved(session, owner, wanted))
    manifests = [Manifest.model_validate(version.manifest) for version in found]
    _raise(_names(wanted, manifests))
    _raise(_phrases(manifests))
    base = _base(manifests[0], settings)
    _raise(_bases(found, manifests, base))
    kinds = [rules.kind_of(manifest) for manifest in manifests]
    _raise(_unmergeable(manifests, kinds))
    strategy = _strategy(wanted, kinds)
    _raise(_options(wanted, strategy, kinds))
    job = ComposeJob(
        name=wanted.name,
        strategy=strategy.name,
        options=wanted.options,
        adapters=[
            PinnedParent(
                id=version.id,
                ref=version.ref,
                digest=version.digest,
                method=version.method,
                scale=use.scale,
                subjects=manifest.subjects,
            )
            for version, use, manifest in zip(found, wanted.parents, manifests, strict=True)
        ],
    )
    return NewJob(
        owner=owner,
        kind="compose",
        concept=wanted.name,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        request=job.model_dump(mode="json"),
    )


def _resolved(session: Session, owner: str, wanted: CompositionWanted) -> Iterator[AdapterVersion]:
    for place, use in enumerate(wanted.parents):
        try:
            yield versions.resolve(session, owner, use.ref, lock=True)
        except NotFound as error:
            raise wrong_values([FieldProblem(f"parents[{place}].ref", error.detail)]) from error


def _names(wanted: CompositionWanted, manifests: Sequence[Manifest]) -> Iterator[FieldProblem]:
    """Each subject once, and none with the name of the whole."""
    seen: Counter[str] = Counter()
    for place, manifest in enumerate(manifests):
        names = {subject.name for subject in manifest.subjects}
        if twice := sorted(name for name in names if seen[name]):
            message = f"brings {' and '.join(twice)} a second time: list each subject once"
            yield FieldProblem(f"parents[{place}].ref", message)
        seen.update(names)
    if seen[wanted.name]:
        message = f"{wanted.name} is one of the subjects: give what is made of all another name"
        yield FieldProblem("name", message)


def _phrases(manifests: Sequence[Manifest]) -> Iterator[FieldProblem]:
    """What prompts say of a subject without learned words is all that tells it from another."""
    known: dict[str, str] = {}
    for place, manifest in enumerate(manifests):
        for subject in manifest.subjects:
            if subject.learned:
                continue
            spoken = subject.phrase.format(trigger=subject.trigger, class_noun=subject.class_noun)
            if other := known.get(spoken.casefold()):
                message = (
                    f"{subject.name} and {other} are both called {spoken!r} in prompts, which "
                    "could not tell them apart: train one of them again with a trigger of its own"
                )
                yield FieldProblem(f"parents[{place}].ref", message)
            known[spoken.casefold()] = subject.name


def _base(manifest: Manifest, settings: Settings) -> Base:
    with fault_of("parents[0].ref"):
        return bases.resolve(manifest.base.name, settings)


def _bases(
    found: Sequence[AdapterVersion], manifests: Sequence[Manifest], base: Base
) -> Iterator[FieldProblem]:
    for place, (version, manifest) in enumerate(zip(found, manifests, strict=True)):
        if version.base_fingerprint != base.fingerprint:
            message = (
                f"was trained on the base model {manifest.base.name} "
                f"({version.base_fingerprint[:12]}), and the merge is on {base.name} "
                f"({base.fingerprint[:12]}), the first parent's: all need the same"
            )
            yield FieldProblem(f"parents[{place}].ref", message)


def _unmergeable(manifests: Sequence[Manifest], kinds: Sequence[str]) -> Iterator[FieldProblem]:
    for place, manifest in enumerate(manifests):
        if manifest.lineage.config.get("also"):
            message = (
                "learned several subjects in one run, and cannot be merged: nothing else names "
                "them. Train them apart, or list it in one generation with the others"
            )
            yield FieldProblem(f"parents[{place}].ref", message)
    for one, other in combinations(range(len(kinds)), 2):
        if why := rules.combination(kinds[one], kinds[other]).unmerged:
            message = f"{kinds[other]} cannot be merged with {kinds[one]}: {why}"
            yield FieldProblem(f"parents[{other}].ref", message)


def _strategy(wanted: CompositionWanted, kinds: Sequence[str]) -> rules.Strategy:
    possible = rules.strategies_for(kinds)
    if wanted.strategy is None:
        return rules.strategy(possible[0])
    if wanted.strategy in possible:
        return rules.strategy(wanted.strategy)
    choices = ", ".join(possible)
    message = f"there is no {wanted.strategy!r}; these parents can be merged by {choices}"
    for one in rules.STRATEGIES:
        if one.name == wanted.strategy:
            beside = [kind for kind in kinds if kind not in one.takes | rules.WORDS] or kinds
            others = ", ".join(dict.fromkeys(beside))
            message = f"{one.name} does not take {others}; what takes all these parents: {choices}"
    raise wrong_values([FieldProblem("strategy", message)])


def _options(
    wanted: CompositionWanted, strategy: rules.Strategy, kinds: Sequence[str]
) -> Iterator[FieldProblem]:
    for name in sorted(wanted.options.model_fields_set - strategy.options):
        has = ", ".join(sorted(strategy.options)) or "none"
        yield FieldProblem(f"options.{name}", f"is no option of {strategy.name}, which has {has}")
    without = [kind for kind in kinds if kind not in rules.PRODUCTS | rules.WORDS]
    if strategy.name == "svd" and wanted.options.rank is None and without:
        message = f"is missing: {without[0]} has no rank of its own that svd could keep to"
        yield FieldProblem("options.rank", message)


def _raise(problems: Iterator[FieldProblem]) -> None:
    if found := list(problems):
        raise wrong_values(found)
