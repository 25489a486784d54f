"""The strategies, layer by layer: from parents' changes to the merged one. Torch.

The mathematics is in registry/compose; here it is told which layers there are, which parents change
them, and what the base hears (observing.py) or reads (words.py).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lookalike_registry.compose.closed_form import ConceptWords
from lookalike_registry.compose.dare import dare_linear
from lookalike_registry.compose.fusion import fuse, gram
from lookalike_registry.compose.low_rank import LowRank, compress, shorten
from lookalike_registry.compose.routing import Router
from lookalike_registry.compose.ties import ties
from lookalike_registry.compose.weighted_sum import weighted_sum
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition import words
from lookalike_trainers.composition.observing import observe
from lookalike_trainers.composition.parents import read, weights_of
from lookalike_trainers.composition.request import CompositionRequest
from lookalike_trainers.methods.composition import Change

OnStep = Callable[[int, int], None]
"""Called with how many of how many steps are done; may raise to stop."""


def merge(request: CompositionRequest, base: BaseParts, on_step: OnStep) -> Change:
    """The merged change, with the words of all parents.

    Raises what `read` raises.
    """
    parents = [read(parent, base) for parent in request.parents]
    match request.strategy:
        case "weighted_sum":
            merged = _sum(parents)
        case "svd":
            merged = _by_layer(parents, request, _svd)
        case "ties":
            merged = _by_layer(parents, request, _ties)
        case "dare_linear":
            draws = torch.Generator().manual_seed(request.options.seed)
            merged = _by_layer(parents, request, _dare(draws))
        case "ssr":
            merged = _route(parents, request, base, on_step)
        case "fusion":
            merged = _fuse(parents, request, base, on_step)
        case "closed_form":
            merged = _bind_words(parents, request, base, on_step)
        case _:
            raise ValueError(f"there is no strategy {request.strategy}")
    on_step(len(parents), len(parents))
    return replace(merged, subjects=[one for parent in parents for one in parent.subjects])


def _sum(parents: Sequence[Change]) -> Change:
    deltas: dict[str, Tensor] = {}
    for parent in parents:
        for name, delta in parent.deltas.items():
            deltas[name] = deltas[name] + delta if name in deltas else delta
    return Change({n: weighted_sum(p, [1.0] * len(p)) for n, p in _pairs(parents).items()}, deltas)


Layer = Callable[[list[LowRank], list[Tensor], CompositionRequest], LowRank | Tensor]
"""Merges a layer's products and deltas."""


def _by_layer(parents: Sequence[Change], request: CompositionRequest, layer: Layer) -> Change:
    """In the order of the parents; one without a change in a layer has no say there."""
    products: dict[str, LowRank] = {}
    deltas: dict[str, Tensor] = {}
    pairs = _pairs(parents)
    dense: dict[str, list[Tensor]] = defaultdict(list)
    for parent in parents:
        for name, delta in parent.deltas.items():
            dense[name].append(delta)
    for name in sorted({*dense, *(f"{module}.weight" for module in pairs)}):
        module = name.removesuffix(".weight")
        own = pairs.get(module, []) if name.endswith(".weight") else []
        made = layer(own, dense[name], request)
        if isinstance(made, LowRank):
            products[module] = made
        else:
            deltas[name] = made
    return Change(products, deltas)


def _svd(
    pairs: list[LowRank], dense: list[Tensor], request: CompositionRequest
) -> LowRank | Tensor:
    rank = request.options.rank or max((len(pair.down) for pair in pairs), default=0)
    if not dense:
        return shorten(weighted_sum(pairs, [1.0] * len(pairs)), rank=rank)
    total = torch.stack([*(pair.dense() for pair in pairs), *dense]).sum(0)
    return total if total.dim() < 2 else compress(total, rank=rank)


def _ties(
    pairs: list[LowRank], dense: list[Tensor], request: CompositionRequest
) -> LowRank | Tensor:
    changes = [*(pair.dense() for pair in pairs), *dense]
    merged = ties(changes, [1.0] * len(changes), density=request.options.density)
    return _of_rank(merged, pairs, dense, request)


def _dare(draws: torch.Generator) -> Layer:
    def layer(
        pairs: list[LowRank], dense: list[Tensor], request: CompositionRequest
    ) -> LowRank | Tensor:
        changes = [*(pair.dense() for pair in pairs), *dense]
        density = request.options.density
        merged = dare_linear(changes, [1.0] * len(changes), density=density, draws=draws)
        return _of_rank(merged, pairs, dense, request)

    return layer


def _of_rank(
    merged: Tensor, pairs: list[LowRank], dense: list[Tensor], request: CompositionRequest
) -> LowRank | Tensor:
    """As it is where a parent's change had no rank, unless one is asked for."""
    rank = request.options.rank
    if merged.dim() < 2 or (dense and rank is None):
        return merged
    return compress(merged, rank=rank or sum(len(pair.down) for pair in pairs))


def _route(
    parents: Sequence[Change], request: CompositionRequest, base: BaseParts, on_step: OnStep
) -> Change:
    """A parent without a product in a layer has one of rank 0: nothing of it is to answer."""
    routers = {
        name: Router([parent.products.get(name, _nothing(own[0])) for parent in parents])
        for name, own in _pairs(parents).items()
    }
    for place in range(len(parents)):
        on_step(place, len(parents))

        def hear(name: str, inputs: Tensor, place: int = place) -> None:
            routers[name].observe(place, inputs)

        _observe(base, request, parent_place=place, layers=list(routers), hear=hear)
    return Change({name: router.merged() for name, router in routers.items()})


def _fuse(
    parents: Sequence[Change], request: CompositionRequest, base: BaseParts, on_step: OnStep
) -> Change:
    """What is fused spans the columns of the parents' B: the sum of their ranks holds all of it."""
    pairs = _pairs(parents)
    grams: list[dict[str, Tensor]] = [{} for _ in parents]
    for place, seen in enumerate(grams):
        on_step(place, len(parents))

        def hear(name: str, inputs: Tensor, seen: dict[str, Tensor] = seen) -> None:
            one = gram(inputs)
            seen[name] = seen[name] + one if name in seen else one

        _observe(base, request, parent_place=place, layers=list(pairs), hear=hear)
    weights = weights_of(base)
    products = {}
    for name, own in pairs.items():
        weight = weights[f"{name}.weight"].detach().cpu().flatten(1)
        changes = [parent.products.get(name, _nothing(own[0])) for parent in parents]
        tuned = [weight + pair.dense().flatten(1) for pair in changes]
        fused = fuse(weight, tuned, [seen[name] for seen in grams]) - weight
        shape = own[0].down.shape[1:]
        rank = sum(len(pair.down) for pair in own)
        products[name] = compress(fused.unflatten(1, shape), rank=rank)
    return Change(products)


def _bind_words(
    parents: Sequence[Change], request: CompositionRequest, base: BaseParts, on_step: OnStep
) -> Change:
    """A layer that a parent leaves alone is to answer its words as the base does."""
    known = words.statistics(base, request.resolution)
    features = []
    for place, parent in enumerate(request.parents):
        on_step(place, len(parents))
        features.append(words.features(base, parent, request.resolution))
    bound = ConceptWords.of(known, features)
    weights = weights_of(base)
    deltas = {}
    for name in sorted({name for parent in parents for name in parent.deltas}):
        weight = weights[name].detach().cpu()
        tuned = [weight + parent.deltas.get(name, 0.0) for parent in parents]
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
