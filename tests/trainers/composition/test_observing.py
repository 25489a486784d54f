"""What layers hear while one parent paints."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from lookalike_platform.conditioning import predict
from lookalike_platform.diffusion import noise
from lookalike_platform.samplers import make_sampler
from lookalike_registry.manifest import SubjectRecord
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.composition.observing import SAMPLER, SCENES, STEPS, WORD, called, observe
from lookalike_trainers.methods.products import layers_of
from support_merging import parent_file
from support_methods import CPU, SIDE
from support_models import RESOLUTION, save_base
from support_pairs import trained_adapter, wearing

REX = SubjectRecord(
    name="rex", trigger="sks", class_noun="dog", phrase="{trigger} {class_noun}", learned=True
)


pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept:DeprecationWarning"
)  # diffusers' own
PLAIN = REX.model_copy(update={"learned": False})


def test_learned_words_are_spoken_as_the_words_worn_and_others_as_triggers() -> None:
    assert called([REX, REX, PLAIN]) == ["subject dog", "subject-2 dog", "sks dog"]


def save_flow_base(folder: Path) -> Path:
    """An untrained base that says of itself that it goes along a flow."""
    save_base(folder)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    return folder


def save_zero_signal_base(folder: Path) -> Path:
    """An untrained base with v-prediction and a schedule that ends without any signal."""
    save_base(folder, "sd2")
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("make", [save_flow_base, save_zero_signal_base])
def test_every_kind_of_base_can_be_listened_to(tmp_path: Path, make: Callable[..., Path]) -> None:
    parts = BaseParts(make(tmp_path / "base"), CPU)
    method, file, _, _ = trained_adapter(parts.folder, tmp_path, "lora", 0)
    parent = parent_file(method, file, 1.0, PLAIN)
    layer = next(name for name in layers_of(parts) if name.endswith("attn2.to_q"))
    heard: list[torch.Tensor] = []
    observe(parts, parent, [layer], lambda _, x: heard.append(x), resolution=RESOLUTION, seed=3)
    assert len(heard) == STEPS * len(SCENES)
    assert all(x.isfinite().all() for x in heard)
    assert not torch.equal(heard[0], heard[1])


def test_a_layer_hears_what_the_parents_own_prompt_is_to_it_while_it_is_worn(
    tmp_path: Path,
) -> None:
    """At the parent's scale: the UNet's K get the words as the worn text encoder reads them, and
    the first step is the worn UNet's at the first noise."""
    parts = BaseParts(save_base(tmp_path / "base"), CPU)
    method, file, _, _ = trained_adapter(parts.folder, tmp_path, "ed_lora", 1)
    parent = parent_file(method, file, 0.6, REX)
    names = list(layers_of(parts))
    key = next(name for name in names if name.endswith("attn2.to_k"))
    late = [name for name in names if name.endswith("attn2.to_q")][-1]
    heard: dict[str, list[torch.Tensor]] = {key: [], late: []}
    observe(parts, parent, heard, lambda n, x: heard[n].append(x), resolution=RESOLUTION, seed=3)
    scheduler = make_sampler(SAMPLER, dict(parts.scheduler.config))
    scheduler.set_timesteps(STEPS)
    start, _ = noise([3], parts.unet.config.in_channels, SIDE, SIDE)
    start = scheduler.scale_model_input(start * scheduler.init_noise_sigma, scheduler.timesteps[0])

    def under(scale: float, prompt: str) -> dict[str, torch.Tensor]:
        """What both layers get in the first step."""
        got: dict[str, torch.Tensor] = {}
        with wearing(parts, (method, file, scale, WORD)), torch.no_grad(), ExitStack() as hooks:
            for name in heard:

                def keep(_: nn.Module, inputs: tuple[torch.Tensor], name: str = name) -> None:
                    got[name] = inputs[0]

                layer = layers_of(parts)[name]
                hooks.callback(layer.register_forward_pre_hook(keep).remove)
            text = parts.encode([prompt], RESOLUTION)
            predict(parts.unet, start, scheduler.timesteps[:1], text)
        return got

    spoken = SCENES[0].format("subject dog")
    expected = under(0.6, spoken)
    for name, inputs in heard.items():
        torch.testing.assert_close(inputs[0], expected[name], rtol=1e-4, atol=1e-5)
    for others in (under(1.0, spoken), under(0.6, SCENES[0].format("sks dog"))):
        assert not torch.allclose(heard[late][0], others[late], rtol=1e-4, atol=1e-5)


def test_the_inputs_heard_are_those_a_layers_answer_comes_from(tmp_path: Path) -> None:
    """Linear layers and convolutions alike: y = W x + b, of rows or of patches."""
    parts = BaseParts(save_base(tmp_path / "base"), CPU)
    method, file, _, _ = trained_adapter(parts.folder, tmp_path, "pivotal", 0)
    parent = parent_file(method, file, 0.0, REX)
    layers = {
        name: layer
        for name, layer in layers_of(parts).items()
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
