"""Adapters to sample with, and the pictures plain diffusers makes of them."""

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy
import pytest
from PIL import Image

from lookalike_api.sampling.messages import SampleOrder
from lookalike_platform.errors import of_problem
from lookalike_registry.adapter_file import LoraCard, LoraShape, save_lora

LIBRARY_WARNINGS = [
    # diffusers' multistep samplers pass tensors through numpy in the old way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    # PEFT takes a second adapter in one model for an oversight; here it is what is asked for.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    # It picks another active adapter when one is deleted; which are active is set before each use.
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]

STALLED_SECONDS = 20.0  # nothing that orders of tests wait for takes as long

UNET = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ENCODER = ("q_proj", "k_proj", "v_proj", "out_proj")


def save_adapter(
    path: Path,
    base: Path,
    seed: int = 0,
    *,
    rank: int = 4,
    text_encoder: bool = False,
    dora: bool = False,
    targets: tuple[str, ...] = UNET,
) -> str:
    """Write a LoRA with random weights, large enough to show, and alpha unlike its rank.

    Returns its sha256.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    shapes = {"unet": LoraShape(rank, 2.0 * rank, targets, dora=dora)}
    states = {"unet": _random_lora(unet, shapes["unet"], seed)}
    if text_encoder:
        encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
        shapes["text_encoder"] = LoraShape(rank, 2.0 * rank, TEXT_ENCODER, dora=dora)
        states["text_encoder"] = _random_lora(encoder, shapes["text_encoder"], seed + 100)
    card = LoraCard("a subject", "sd1", 64, "sks", "epsilon", shapes)
    return save_lora(path, states, card)


def reference(
    base: Path,
    prompt: str,
    *,
    seed: int,
    num_images: int,
    sampler: tuple[str | None, dict[str, Any]],
    adapters: Sequence[tuple[Path, float]] = (),
    **options: Any,
) -> list[Any]:
    """What diffusers' own pipeline paints; image i from a generator of seed `seed + i`."""
    import diffusers
    import torch

    pipeline = diffusers.DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    class_name, arguments = sampler
    if class_name:
        scheduler = getattr(diffusers, class_name)
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **arguments)
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (path, _) in zip(names, adapters, strict=True):
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    if adapters:
        pipeline.set_adapters(names, [scale for _, scale in adapters])
    generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
    made = pipeline(prompt, num_images_per_prompt=num_images, generator=generators, **options)
    images: list[Any] = made.images
    return images


def _random_lora(model: Any, shape: LoraShape, seed: int) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(**shape.peft()), model)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.3
        if tensor.dim() > 1
        else torch.rand(tensor.shape, generator=generator)  # DoRA's lengths
        for name, tensor in get_peft_model_state_dict(model).items()
    }


def pixels(vae: Any, latents: Any) -> numpy.ndarray[Any, Any]:
    """A picture as pixels in [0, 1], [n, 3, height, width]."""
    decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
    whole: numpy.ndarray[Any, Any] = (decoded / 2 + 0.5).clamp(0, 1).numpy()
    return whole


class Orders:
    """An engine, and what it said of the orders it was given; numbers count from 0."""

    def __init__(self, base: Path, adapter_bytes: int, batch_pixels: int) -> None:
        from lookalike_api.sampling.engine import Engine
        from lookalike_api.sampling.loading import Adapters
        from lookalike_api.sampling.models import ResidentBases

        self.base = base
        self.folder = Path(mkdtemp(prefix="lookalike-test-"))
        self.told: list[dict[str, Any]] = []
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._woken = threading.Event()
        self.engine = Engine(
            ResidentBases(self.folder),
            Adapters(adapter_bytes, adapter_bytes),
            lambda number, answer: self._said.put({"number": number, **answer}),
            self._woken.set,
            batch_pixels,
        )
        self._number = -1

    def send(self, **wanted: Any) -> int:
        """Send an order, with little of everything unless `wanted` says more; its number."""
        self._number += 1
        folder = self.folder / str(self._number)
        folder.mkdir()
        plain: dict[str, Any] = {
            "base_fingerprint": str(self.base),
            "base_folder": self.base,
            "device": "cpu",
            "adapters": (),
            "prompt": "a dog",
            "negative_prompt": "",
            "guidance_scale": 4.0,
            "steps": 4,
            "sampler": "ddim",
            "seed": 5,
            "width": 64,
            "height": 64,
            "num_images": 1,
            "folder": folder,
        }
        order = plain | wanted
        order["parameters"] = ("{}",) * order["num_images"]
        self.engine.accept(self._number, SampleOrder(**order))
        return self._number

    def until(self, *numbers: int) -> list[dict[str, Any]]:
        """How these orders ended, in this order.

        As in process.py, an engine that had nothing to do has no other turn until it is woken.
        """
        ends: dict[int, dict[str, Any]] = {}
        busy, heard = True, time.monotonic()
        while not set(numbers) <= ends.keys():
            if busy or self._woken.wait(0.05):
                self._woken.clear()
                busy, heard = self.engine.turn(), time.monotonic()
            assert time.monotonic() - heard < STALLED_SECONDS, "nobody wakes the engine"
            self.collect()
            ends = {a["number"]: a for a in self.told if a["type"] not in ("begun", "progress")}
        return [ends[number] for number in numbers]

    def collect(self) -> None:
        """Add to `told` what was said meanwhile."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.told.append(self._said.get_nowait())

    def pictures(self, number: int) -> list[Any]:
        """Raises what an order ended with, if that is a problem."""
        (end,) = self.until(number)
        if end["type"] == "error":
            raise of_problem(end["problem"])
        assert end["type"] == "done", end
        return [numpy.asarray(Image.open(path)) for path in end["images"]]

    def paint(self, **wanted: Any) -> list[Any]:
        """The pictures of an order, as arrays [height, width, 3]."""
        self.told.clear()
        return self.pictures(self.send(**wanted))


def engine_of(base: Path, adapter_bytes: int = 2**30, batch_pixels: int = 2**20) -> Orders:
    return Orders(base, adapter_bytes, batch_pixels)
