"""An adapter that cannot be put on whole is not put on at all, wherever its putting on breaks."""

from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lookalike_registry.compose import rules
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods import deltas, perfusion, tokens
from lookalike_trainers.methods.composition import Change, Subject, save
from lookalike_trainers.methods.deltas import parts_of
from lookalike_trainers.methods.find import wear_of
from support_methods import CARD, CPU
from support_models import save_base
from support_pairs import Adapter, trained_adapter, wearing

KINDS = [*(kind for kind in rules.KINDS if kind != rules.COMPOSITION), "pivotal"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapter]:
    folder = tmp_path_factory.mktemp("adapters")

    @cache
    def made(kind: str) -> Adapter:
        if kind == rules.COMPOSITION:
            return (kind, everything(base, folder), 1.0, "sks")
        return trained_adapter(base, folder, kind, 0)

    return made


def everything(base: Path, folder: Path) -> Path:
    """A composition with all it can hold: products, deltas, words by layer and a gate."""
    from safetensors.torch import load_file

    adapter = partial(trained_adapter, base, folder)
    gated, layered = (load_file(adapter(kind, 1)[1]) for kind in ("perfusion", "ed_lora"))
    dense = load_file(adapter("custom_diffusion", 1)[1])
    part = "text_encoder"
    gate = {key: t for key, t in gated.items() if key.startswith(perfusion.PREFIX)}
    rows = layered[f"tokens.{part}"]
    change = Change(
        deltas={k.removeprefix("delta."): t for k, t in dense.items() if k.startswith("delta.")},
        subjects=[
            Subject({part: gated[f"tokens.{part}"]}, gate=gate),
            Subject({part: rows}, layers=len(rows) // 2),
        ],
    )
    return save(change, folder, CARD)


class Broken(Exception):
    """The step that was to fail."""


def breaking(monkeypatch: pytest.MonkeyPatch, place: int | None) -> Counter[str]:
    """Let the step at a place, from 1, of all that wearing does to a base fail; counts them."""
    seen: Counter[str] = Counter()
    steps = count(1)
    whole: list[tuple[Any, str]] = [
        (nn.Module, "register_forward_hook"),
        (nn.Module, "register_forward_pre_hook"),
        (deltas._Worn, "apply"),
        (tokens, "add_rows"),
    ]

    def failing(step: Callable[..., Any], name: str) -> Callable[..., Any]:
        def instead(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            if next(steps) == place:
                raise Broken
            return step(*args, **kwargs)

        return instead

    for owner, name in whole:
        monkeypatch.setattr(owner, name, failing(getattr(owner, name), name))
    return seen


def state(parts: BaseParts) -> dict[str, Any]:
    """Every parameter, and what hooks each module has."""
    found: dict[str, Any] = {"words": dict(parts.learned)}
    for part, model in parts_of(parts).items():
        for name, module in model.named_modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks)
            found[f"{part}.{name}"] = (type(module), *(list(kept) for kept in hooks))
        for name, parameter in model.named_parameters():
            found[f"{part}.{name} values"] = parameter.detach().clone()
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("kind", [*KINDS, rules.COMPOSITION])
def test_a_failing_wear_leaves_every_parameter_and_hook_as_it_was(
    base: Path, adapter: Callable[[str], Adapter], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, file, scale, word = adapter(kind)
    parts = BaseParts(base, CPU)
    with monkeypatch.context() as patch, wearing(parts, (*adapter("pivotal")[:3], "other")):
        before = state(parts)
        seen = breaking(patch, None)
        take_off = wear_of(method)(parts, file, scale, word)
        steps = sum(seen.values())
        take_off()
        assert same(state(parts), before)
        assert steps
        for place in {1, 1 + steps // 2, steps}:
            with monkeypatch.context() as inner:
                breaking(inner, place)
                with pytest.raises(Broken):
                    wear_of(method)(parts, file, scale, word)
            assert same(state(parts), before), place
