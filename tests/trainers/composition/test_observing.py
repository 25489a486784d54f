"""What layers hear while one parent paints."""

from pathlib import Path

import torch
from torch import nn

from lookalike_registry.manifest import SubjectRecord
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition.observing import SCENES, STEPS, called, observe
from lookalike_trainers.composition.request import ParentFile
from lookalike_trainers.methods.deltas import parts_of
from lookalike_trainers.methods.products import own_layers
from support_methods import CPU
from support_models import RESOLUTION, save_base
from support_pairs import trained_adapter

REX = SubjectRecord(
    name="rex", trigger="sks", class_noun="dog", phrase="{trigger} {class_noun}", learned=True
)


def test_learned_words_are_spoken_as_the_words_worn_and_others_as_triggers() -> None:
    plain = REX.model_copy(update={"learned": False})
    assert called([REX, REX, plain]) == ["subject dog", "subject-2 dog", "sks dog"]


def test_the_inputs_heard_are_those_a_layers_answer_comes_from(tmp_path: Path) -> None:
    """Linear layers and convolutions alike: y = W x + b, of rows or of patches."""
    parts = BaseParts(save_base(tmp_path / "base"), CPU)
    method, file, _, _ = trained_adapter(parts.folder, tmp_path, "pivotal", 0)
    parent = ParentFile(method=method, file=file, scale=0.0, subjects=[REX])
    layers = {
        f"{part}.{name}": layer
        for part, model in parts_of(parts).items()
        for name, layer in own_layers(model).items()
        if name.endswith(("attn2.to_k", "conv1", "self_attn.q_proj"))
    }
    said: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    heard: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(lambda _, __, y, name=name: said[name].append(y))
        for name, layer in layers.items()
    ]
    observe(
        parts, parent, layers, lambda name, x: heard[name].append(x), resolution=RESOLUTION, seed=3
    )
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        assert len(heard[name]) == (1 if name.startswith("text") else STEPS) * len(SCENES)
        for x, y in zip(heard[name], said[name], strict=True):
            answer = x @ layer.weight.flatten(1).T
            answer = answer if layer.bias is None else answer + layer.bias
            if isinstance(layer, nn.Conv2d):
                y = y.flatten(2).transpose(1, 2)
            torch.testing.assert_close(answer, y, rtol=1e-4, atol=1e-4)
    assert not parts.learned
