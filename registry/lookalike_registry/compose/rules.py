"""What combines with what: worn together in one generation, or merged into a new version.

Torch-free. The API refuses by this table, publishes it, and docs/composition.md shows it.

A kind is a method's name, or one of two that no method has: `dora`, a LoRA that learned the lengths
of rows, and `composition`, a merged version that a LoRA file cannot hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

from lookalike_registry.manifest import Manifest

COMPOSITION = "composition"
"""The method of merged versions with words, or with more than products of thin matrices."""

PRODUCTS = frozenset({"lora", "ed_lora"})  # W' = W + B A at every timestep
WEIGHTS = frozenset({"custom_diffusion", "dreambooth", "svdiff", "diff_fit"})  # W' = W + delta
WORDS = frozenset({"textual_inversion"})  # they touch nothing that others change
MATRICES = PRODUCTS | WEIGHTS | {"dora"}  # all whose change of the base is one fixed sum
KINDS = (
    "lora", "dora", "t_lora", "ed_lora", "custom_diffusion", "dreambooth", "svdiff", "diff_fit",
    "textual_inversion", "perfusion", COMPOSITION,
)  # fmt: skip

_TIMED = (
    "T-LoRA's ranks come and go with the timestep, which no fixed weights can hold: list both "
    "adapters in one generation"
)
_LENGTHS = (
    "DoRA gives the base's own rows new lengths, and the other changes those rows: what came out "
    "would depend on which was put on first. Merge them (POST /v1/compositions), which takes "
    "both from the base itself"
)
_GATED = (
    "Perfusion's gate takes away what the base's own rows say of its word, and what DoRA's new "
    "lengths make of that would stay. Merge them (POST /v1/compositions): there the gate takes "
    "away what the changed rows say"
)


@dataclass(frozen=True)
class Strategy:
    """A way to merge.

    takes: kinds of parents; words go along with those of every strategy
    options: those it has, of `MergeOptions`
    """

    name: str
    takes: frozenset[str]
    options: frozenset[str]
    summary: str


STRATEGIES = (
    Strategy(
        "ssr",
        PRODUCTS,
        frozenset({"seed"}),
        "each LoRA answers its own subject's signal alone (SSR-Merge); keeps many apart",
    ),
    Strategy(
        "closed_form",
        frozenset({"custom_diffusion"}),
        frozenset(),
        "each concept's words get its own keys and values, other captions the base's",
    ),
    Strategy(
        "weighted_sum",
        frozenset(KINDS) - {"t_lora"},
        frozenset(),
        "the sum of all changes of the base, as one generation with all of them has it",
    ),
    Strategy("svd", MATRICES, frozenset({"rank"}), "the sum of all changes, cut to `rank`"),
    Strategy(
        "ties",
        MATRICES,
        frozenset({"density", "rank"}),
        "of each change the largest entries; signs are elected, those that agree averaged",
    ),
    Strategy(
        "dare_linear",
        MATRICES,
        frozenset({"density", "rank", "seed"}),
        "entries of each change dropped at random, the rest made larger, and added up",
    ),
    Strategy(
        "fusion",
        PRODUCTS,
        frozenset({"seed"}),
        "ridge least squares: to each concept's own inputs nearly as it alone, else as the sum",
    ),
)
"""In the order in which a default is looked for."""


@dataclass(frozen=True)
class Combination:
    """What is possible with two kinds.

    together: how they act in one generation; None, and `refused` says why not.
    merges: the strategies that take both; if there are none, `unmerged` says why.
    """

    one: str
    other: str
    together: str | None
    refused: str | None
    merges: tuple[str, ...]
    unmerged: str | None


def combination(one: str, other: str) -> Combination:
    """The rule for two kinds, in either order. Raises KeyError for one there is not."""
    if unknown := {one, other} - set(KINDS):
        raise KeyError(*unknown)
    pair = {one, other}
    refused = None
    if "dora" in pair and pair & (WEIGHTS | {COMPOSITION}):
        refused = _LENGTHS
    elif pair == {"dora", "perfusion"}:
        refused = _GATED
    return Combination(
        one,
        other,
        together=None if refused else _how(pair),
        refused=refused,
        merges=strategies_for([one, other]),
        unmerged=_TIMED if "t_lora" in pair else None,
    )


def table() -> list[Combination]:
    """Every pair of kinds, a kind with itself too."""
    return [combination(one, other) for one, other in combinations_with_replacement(KINDS, 2)]


def strategies_for(kinds: Sequence[str]) -> tuple[str, ...]:
    """The names of the strategies that take parents of all these kinds; the first is the default.

    None at all if a kind cannot be merged.
    """
    changing = frozenset(kinds) - WORDS or WORDS
    return tuple(one.name for one in STRATEGIES if one.takes >= changing)


def strategy(name: str) -> Strategy:
    """Raises KeyError if there is none of this name."""
    return {one.name: one for one in STRATEGIES}[name]


def refusals(kinds: Sequence[str]) -> list[tuple[int, int, str]]:
    """Of adapters worn together, each pair (by place) that cannot be, and why."""
    return [
        (one, other, rule.refused)
        for one, other in combinations(range(len(kinds)), 2)
        if (rule := combination(kinds[one], kinds[other])).refused
    ]


def kind_of(manifest: Manifest) -> str:
    """A version's kind."""
    return "dora" if manifest.weights.dora else manifest.identity.method


def _how(pair: set[str]) -> str:
    if "textual_inversion" in pair:
        return "a word beside: it touches nothing the other changes"
    if COMPOSITION in pair:
        return (
            "changed weights W' = W + s1 dW1 + s2 dW2, products and gated edits of both add up in "
            "a layer's answer: h = W' e + sum of s B A e + sum of s (gate o - similarity W' i)"
        )
    if pair == {"perfusion"}:
        return "the gated terms add up: h = W e + sum of s (gate o - similarity W i)"
    if "perfusion" in pair and pair & WEIGHTS:
        return "the gated edit is of what the changed weights say"
    if "perfusion" in pair:
        return (
            "products and the gated edit add up in a layer's answer: "
            "h = W e + s1 B A e + s2 (gate o - similarity W i)"
        )
    return "the changes add up: W' = W + s1 dW1 + s2 dW2"
