"""Compositions: what combines with what, and merging adapters into a new version."""

from fastapi import APIRouter, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from lookalike_api.http import submission
from lookalike_api.http.composing import CompositionWanted, admit
from lookalike_api.http.context import IdempotencyKey, Lookalike, Owner
from lookalike_api.http.jobs import JobView
from lookalike_api.http.problems import documented
from lookalike_api.http.shapes import Json, View
from lookalike_platform.jobs import store
from lookalike_registry.compose import rules

router = APIRouter(prefix="/v1/compositions", tags=["compositions"])


class CombinationView(View):
    """Two kinds of adapters. `together`: how they act in one generation; if they cannot, `refused`
    says why. `merges`: the strategies that make one version of both; if none, `unmerged` says why.
    """

    one: str
    other: str
    together: str | None
    refused: str | None
    merges: list[str]
    unmerged: str | None


class StrategyView(View):
    """A way to merge: what kinds it takes, textual inversions beside them, and its options."""

    name: str
    summary: str
    takes: list[str]
    options: list[str]


class Rules(BaseModel):
    """`kinds`: methods' names, and `dora` (a LoRA that learned lengths) and `composition` (a merged
    version that a LoRA file cannot hold)."""

    kinds: list[str]
    combinations: list[CombinationView]
    strategies: list[StrategyView]


@router.post("", status_code=202, response_model=JobView, responses=documented(413, 422))
def compose(
    context: Lookalike, owner: Owner, wanted: CompositionWanted, key: IdempotencyKey = None
) -> Response:
    """Queue a merge. Its job ends with a new version, whose manifest names its parents."""

    def queue(session: Session) -> Json:
        new = admit(session, owner, context.settings, wanted)
        return JobView.model_validate(store.submit(session, new)).model_dump(mode="json")

    asked = {"composition": wanted.model_dump(mode="json", exclude_unset=True)}
    return submission.respond(submission.submit(context, owner, key, asked, queue), "/v1/jobs")


@router.get("/rules")
def list_rules() -> Rules:
    """What combines with what, how, and why not."""
    return Rules(
        kinds=list(rules.KINDS),
        combinations=[CombinationView.model_validate(pair) for pair in rules.table()],
        strategies=[
            StrategyView(
                name=one.name,
                summary=one.summary,
                takes=[kind for kind in rules.KINDS if kind in one.takes],
                options=sorted(one.options),
            )
            for one in rules.STRATEGIES
        ],
    )
