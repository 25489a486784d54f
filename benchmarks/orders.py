"""Adapters and orders for benchmarks of the sampler: an engine in this process, fed by hand."""

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lookalike_api.sampling.batch_size import batch_pixels
from lookalike_api.sampling.engine import Engine
from lookalike_api.sampling.loading import Adapters
from lookalike_api.sampling.messages import AdapterFile, SampleOrder
from lookalike_api.sampling.models import ResidentBase, ResidentBases
from lookalike_platform.bases import Base
from lookalike_platform.process import COMPUTE
from lookalike_registry.adapter_file import LoraCard, LoraShape, save_lora

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
GUIDANCE = 4.0


def as_workers_do() -> None:
    """Begin again with the environment that the service gives its process, if need be."""
    if COMPUTE.keys() - os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**COMPUTE, **os.environ})


def write_lora(unet: Any, path: Path, rank: int, seed: int) -> AdapterFile:
    """A LoRA of random weights on every attention layer, small enough that pictures stay sane."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in unet.named_modules():
        if name.endswith(ATTENTION):
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            state[f"{name}.lora_A.weight"] = down / layer.in_features**0.5
            state[f"{name}.lora_B.weight"] = up * 0.05 / rank**0.5
    shape = LoraShape(rank, float(rank), ATTENTION)
    card = LoraCard(path.stem, "sd1", 64, "sks", "epsilon", {"unet": shape})
    return AdapterFile(f"{path.stem}@1", save_lora(path, {"unet": state}, card), path, 0.8)


class Painter:
    """An engine whose turns are taken here, with a base in memory; orders count from 0."""

    def __init__(self, base: Base, folder: Path, adapter_bytes: int, steps: int) -> None:
        self.base, self.steps = base, steps
        self._folder = folder / "pictures"
        self._folder.mkdir()
        self._woken = threading.Event()
        self._ends: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self._bases, self._adapter_bytes = ResidentBases(folder), adapter_bytes
        resident = self._bases.get(base.fingerprint, base.folder, "auto")
        assert resident is not None
        self.resident: ResidentBase = resident
        self._sent = 0
        self.forget()

    def forget(self) -> None:
        """From now on adapters are read from their files again, and texts by the encoders."""
        self.resident._texts.clear()  # nothing but a benchmark wants this of a base
        self.adapters = Adapters(self._adapter_bytes, self._adapter_bytes)
        self.engine = Engine(
            self._bases, self.adapters, self._hear, self._woken.set, batch_pixels("auto")
        )

    def send(self, worn: Sequence[AdapterFile] = (), **other: Any) -> int:
        """An order for one picture, with prompt and seed of its own unless `other` has them."""
        number = self._sent
        self._sent += 1
        folder = self._folder / str(number)
        folder.mkdir()
        order = SampleOrder(
            base_fingerprint=self.base.fingerprint,
            base_folder=self.base.folder,
            device="auto",
            adapters=tuple(worn),
            prompt=prompt(number),
            negative_prompt="",
            guidance_scale=GUIDANCE,
            steps=self.steps,
            sampler="dpmsolver++",
            seed=number,
            width=self.base.resolution,
            height=self.base.resolution,
            num_images=1,
            folder=folder,
            parameters=("{}",),
        )
        self.engine.accept(number, replace(order, **other))
        return number

    def paint(self, orders: Sequence[dict[str, Any]]) -> list[Image.Image]:
        """The pictures of orders, each as `send` takes it."""
        numbers = [self.send(**order) for order in orders]
        waiting = set(numbers)
        while waiting:
            waiting -= self.turn().keys()
        pictures = []
        for number in numbers:
            with Image.open(self._folder / str(number) / "0.png") as picture:
                pictures.append(picture.convert("RGB"))
        return pictures

    def together(self, outfits: Sequence[Sequence[AdapterFile]]) -> None:
        """Orders that wear these, sent at once, to the last picture."""
        waiting = {self.send(worn) for worn in outfits}
        while waiting:
            waiting -= self.turn().keys()

    def turn(self, at_most: float = 0.05) -> dict[int, float]:
        """One turn, or a wait for something to do; when which orders have ended."""
        self._woken.clear()
        if not self.engine.turn():
            self._woken.wait(at_most)
        ends = {}
        while not self._ends.empty():
            number, at = self._ends.get()
            ends[number] = at
        return ends

    def _hear(self, number: int, answer: dict[str, Any]) -> None:
        if answer["type"] in ("begun", "progress"):
            return
        if answer["type"] != "done":
            raise SystemExit(f"order {number} ended with {answer}")
        self._ends.put((number, time.perf_counter()))
        self._woken.set()


def prompt(number: int) -> str:
    scene = ("on a beach", "in the snow", "on the moon", "in a garden")[number % 4]
    return f"a {('red', 'blue', 'green', 'golden')[number // 4 % 4]} dog {scene}"


def turns(ways: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of every way in every round; round 0 warms up and does not count."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, work in ways.items():
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[way].append(time.perf_counter() - started)
    return seconds
