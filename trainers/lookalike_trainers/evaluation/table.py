"""The table of a DreamBench protocol: a row for each method, means with 95% intervals. Torch."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from lookalike_trainers.evaluation.measures import Estimate, bootstrap
from lookalike_trainers.evaluation.protocol import Cell

COLUMNS = {
    "subject_fidelity": "subject fidelity ↑",
    "prompt_fidelity": "prompt fidelity ↑",
    "prior_drift": "prior drift (PRES) ↓",
    "subject_diversity": "diversity (DIV) ↑",
    "class_diversity": "class diversity ↑",
}
REAL = "real photos"


def summary(cells: Sequence[Cell]) -> dict[str, dict[str, Estimate]]:
    """By method and by "measure (judge)" the mean over subjects and its interval.

    Subjects are the independent units: the values of the interval are the subjects' means. Of a
    single subject they are its pictures', and the interval says nothing about other subjects. The
    last row is what the real photos reach among themselves.
    """
    rows: dict[str, dict[str, Estimate]] = {}
    for contender in dict.fromkeys(cell.contender for cell in cells):
        own = [cell.scores for cell in cells if cell.contender == contender]
        rows[contender] = {
            f"{title} ({judge})": estimate
            for measure, title in COLUMNS.items()
            for judge, estimate in _estimates([getattr(s, measure) for s in own]).items()
        }
    photos = {cell.subject: cell.scores.real_resemblance for cell in cells}
    rows[REAL] = {
        f"{COLUMNS['subject_fidelity']} ({judge})": estimate
        for judge, estimate in _estimates(list(photos.values())).items()
    }
    return rows


def markdown(cells: Sequence[Cell]) -> str:
    rows = summary(cells)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(
            f"| {name} | " + " | ".join(_written(row.get(column)) for column in columns) + " |"
            for name, row in rows.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def as_json(cells: Sequence[Cell]) -> dict[str, Any]:
    """The table's numbers, and the cells they come from."""
    return {
        "rows": {
            name: {column: asdict(estimate) for column, estimate in row.items()}
            for name, row in summary(cells).items()
        },
        "cells": [cell.model_dump(mode="json") for cell in cells],
    }


def _estimates(per_subject: Sequence[dict[str, list[float]]]) -> dict[str, Estimate]:
    """By judge, of the values each subject has from it."""
    judges = dict.fromkeys(judge for values in per_subject for judge in values)
    estimates = {}
    for judge in judges:
        groups = [values[judge] for values in per_subject if values.get(judge)]
        if groups:
            means = [fmean(group) for group in groups]
            estimates[judge] = bootstrap(groups[0] if len(groups) == 1 else means)
    return estimates


def _written(estimate: Estimate | None) -> str:
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:.3f}"
    return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
