"""The strategies, layer by layer: from parents' changes to the merged one. Torch.

The mathematics is in registry/compose; here it is told which layers there are, which parents change
them, and what the base hears (observing.py) or reads (words.py).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.compose.closed_form import ConceptWords
from lookalike_registry.compose.dare import dare_linear
from lookalike_registry.compose.fusion import Fusion
from lookalike_registry.compose.low_rank import LowRank, compress, shorten
from lookalike_registry.compose.routing import Router
from lookalike_registry.compose.ties import ties
from lookalike_registry.compose.weighted_sum import weighted_sum
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition import words
from lookalike_trainers.composition.observing import observe
from lookalike_trainers.composition.parents import read
from lookalike_trainers.composition.request import CompositionRequest, ParentFile
from lookalike_trainers.methods.composition import Change
from lookalike_trainers.methods.deltas import parameters_of
from lookalike_trainers.methods.products import layers_of

Item = TypeVar("Item")
OnStep = Callable[[int, int], None]
"""Called with how many of how many steps are done; may raise to stop."""


def merge(request: CompositionRequest, base: BaseParts, on_step: OnStep) -> Change:
    """The merged change, with the words of all parents.

    Raises what `read` raises, and InvalidRequest for a parent whose words are not its record's.
    """
    parents = []
    for parent in request.parents:
        on_step(0, 1)  # how much there is to do is known once they are read
        parents.append(read(parent, base))
        _check_subjects(parent, parents[-1])
    match request.strategy:
        case "weighted_sum":
            merged = _sum(parents)
        case "svd":
            merged = _by_layer(parents, request, base, on_step, _svd)
        case "ties":
            merged = _by_layer(parents, request, base, on_step, _ties(request))
        case "dare_linear":
            merged = _by_layer(parents, request, base, on_step, _dare(request))
        case "ssr":
            merged = _heard(parents, request, base, on_step, Router)
        case "fusion":
            merged = _heard(parents, request, base, on_step, Fusion)
        case "closed_form":
            merged = _bind_words(parents, request, base, on_step)
        case _:
            raise ValueError(f"there is no strategy {request.strategy}")
    return Change(
        {name: _of_full_rank(pair) for name, pair in merged.products.items()},
        merged.deltas,
        [one for parent in parents for one in parent.subjects],
    )


class _Steps:
    """Tells `on_step` of each of so many steps."""

    def __init__(self, on_step: OnStep, total: int) -> None:
        self.on_step, self.total, self.done = on_step, total, 0

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Each item, and a step when it is done with."""
        for item in items:
            yield item
            self.done += 1
            self.on_step(self.done, self.total)


def _check_subjects(parent: ParentFile, change: Change) -> None:
    """Words go by their places. Raises InvalidRequest where the record has others than the file."""
    if len(change.subjects) != len(parent.subjects):
        raise InvalidRequest(
            f"{parent.ref} has words for {len(change.subjects)} subjects, and its record tells of "
            f"{len(parent.subjects)}: merge its own parents again, and take what comes of it."
        )


def _of_full_rank(pair: LowRank) -> LowRank:
    """The same product without more rank than its layer has."""
    most = min(len(pair.up), pair.down[0].numel()) if len(pair.down) else 0
    return shorten(pair, rank=most) if len(pair.down) > most else pair


def _sum(parents: Sequence[Change]) -> Change:
    deltas: dict[str, Tensor] = {}
    for parent in parents:
        for name, delta in parent.deltas.items():
            deltas[name] = deltas[name] + delta if name in deltas else delta
    return Change({n: weighted_sum(p, [1.0] * len(p)) for n, p in _pairs(parents).items()}, deltas)


Layer = Callable[[list[LowRank], list[Tensor], int | None], LowRank | Tensor]
"""Merges a layer's products and deltas to a product of a rank; without one, to a delta."""


def _by_layer(
    parents: Sequence[Change],
    request: CompositionRequest,
    base: BaseParts,
    on_step: OnStep,
    layer: Layer,
) -> Change:
    """In the order of the parents; one without a change in a layer has no say there.

    What is no layer of its own (norms, biases, the tables of words) has no product to be.
    """
    products: dict[str, LowRank] = {}
    deltas: dict[str, Tensor] = {}
    pairs, layers = _pairs(parents), layers_of(base)
    dense: dict[str, list[Tensor]] = defaultdict(list)
    for parent in parents:
        for name, delta in parent.deltas.items():
            dense[name].append(delta)
    names = sorted({*dense, *(f"{module}.weight" for module in pairs)})
    for name in _Steps(on_step, len(names)).over(names):
        module = name.removesuffix(".weight")
        own = pairs.get(module, []) if name.endswith(".weight") else []
        factored = name.endswith(".weight") and module in layers
        made = layer(own, dense[name], _rank(request, own, dense[name]) if factored else None)
        if isinstance(made, LowRank):
            products[module] = made
        else:
            deltas[name] = made
    return Change(products, deltas)


def _rank(request: CompositionRequest, pairs: list[LowRank], dense: list[Tensor]) -> int | None:
    """The one asked for; else the parents', none where the change of one of them has none."""
    ranks = [len(pair.down) for pair in pairs]
    if request.options.rank is not None:
        return request.options.rank
    if request.strategy == "svd":
        return max(ranks, default=None)
    return None if dense else sum(ranks)


def _svd(pairs: list[LowRank], dense: list[Tensor], rank: int | None) -> LowRank | Tensor:
    if not dense:
        return shorten(weighted_sum(pairs, [1.0] * len(pairs)), rank=rank)
    return _of_rank(torch.stack(_whole(pairs, dense)).sum(0), rank)


def _ties(request: CompositionRequest) -> Layer:
    def layer(pairs: list[LowRank], dense: list[Tensor], rank: int | None) -> LowRank | Tensor:
        changes, density = _whole(pairs, dense), request.options.density
        return _of_rank(ties(changes, [1.0] * len(changes), density=density), rank)

    return layer


def _dare(request: CompositionRequest) -> Layer:
    draws = torch.Generator().manual_seed(request.options.seed)

    def layer(pairs: list[LowRank], dense: list[Tensor], rank: int | None) -> LowRank | Tensor:
        changes, density = _whole(pairs, dense), request.options.density
        merged = dare_linear(changes, [1.0] * len(changes), density=density, draws=draws)
        return _of_rank(merged, rank)

    return layer


def _whole(pairs: list[LowRank], dense: list[Tensor]) -> list[Tensor]:
    return [*(pair.dense() for pair in pairs), *dense]


def _of_rank(merged: Tensor, rank: int | None) -> LowRank | Tensor:
    return merged if rank is None else compress(merged, rank=rank)


def _heard(
    parents: Sequence[Change],
    request: CompositionRequest,
    base: BaseParts,
    on_step: OnStep,
    merger: type[Router] | type[Fusion],
) -> Change:
    """By what each layer hears while each parent paints.

    A parent without a product in a layer has one of rank 0: nothing of it is to answer. Words
    alone, or a scale of 0, change no layer: such a parent does not paint, to silence nobody.
    """
    painting = [n for n, own in enumerate(parents) if own.products and request.parents[n].scale]
    if not painting:
        return _sum(parents)
    heard = [parents[place] for place in painting]
    layers = {
        name: merger([parent.products.get(name, _nothing(own[0])) for parent in heard])
        for name, own in _pairs(heard).items()
    }
    steps = _Steps(on_step, len(painting) + len(layers))
    for number, place in enumerate(steps.over(painting)):

        def hear(name: str, inputs: Tensor, number: int = number) -> None:
            layers[name].observe(number, inputs)

        _observe(base, request, parent_place=place, layers=list(layers), hear=hear)
    return Change({name: layers[name].merged() for name in steps.over(layers)})


def _bind_words(
    parents: Sequence[Change], request: CompositionRequest, base: BaseParts, on_step: OnStep
) -> Change:
    """A layer that a parent leaves alone is to answer its words as the base does. Of parents that
    are words alone none is bound: they are read as other captions are. One that is alone in
    changing layers stays as it is."""
    names = sorted({name for parent in parents for name in parent.deltas})
    binding = [place for place, parent in enumerate(parents) if parent.deltas]
    if len(binding) < 2:
        return _sum(parents)
    steps = _Steps(on_step, len(binding) + len(names))
    known = words.statistics(base, request.resolution)
    features = [
        words.features(base, request.parents[place], request.resolution)
        for place in steps.over(binding)
    ]
    bound = ConceptWords.of(known, features)
    weights = parameters_of(base)
    deltas = {}
    for name in steps.over(names):
        weight = weights[name].detach().cpu()
        tuned = [weight + parents[place].deltas.get(name, 0.0) for place in binding]
        deltas[name] = bound.merge_layer(weight, tuned) - weight
    return Change(deltas=deltas)


def _observe(
    base: BaseParts,
    request: CompositionRequest,
    *,
    parent_place: int,
    layers: list[str],
    hear: Callable[[str, Tensor], None],
) -> None:
    parent, options = request.parents[parent_place], request.options
    observe(base, parent, layers, hear, resolution=request.resolution, seed=options.seed)


def _pairs(parents: Sequence[Change]) -> dict[str, list[LowRank]]:
    """By layer, in the order of the parents that have one."""
    pairs: dict[str, list[LowRank]] = defaultdict(list)
    for parent in parents:
        for name, pair in parent.products.items():
            pairs[name].append(pair)
    return dict(sorted(pairs.items()))


def _nothing(like: LowRank) -> LowRank:
    """A product of rank 0."""
    return LowRank(like.up[:, :0], like.down[:0])
