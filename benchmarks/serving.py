"""Serving many adapters at once, on the bundled base: its bars, part by part.

batch      16 requests with 16 adapters at once, beside diffusers that loads, paints and unloads
           one after another: cold, so that we too read every file and every text, and warm, as
           they are in memory; and warm beside 16 requests at once without adapters; what is left
           to gain: the time of the denoiser's calls alone
rows       the denoiser with a LoRA of rank 8 on every attention layer, another for each of 8
           rows, beside the denoiser alone
switch     rows wear another adapter that is in memory: the cache, K's and V's answers, layers
load       an adapter of 3 MB from its file (in the page cache): digest, checks, tensors
memory     growth of the process while 1,000 adapters of 0.4 MB act in turn, and the budget
arrivals   Poisson arrivals at a share of capacity, joining between steps, beside batches that run
           to their end, and the latency of a request alone

What is compared takes turns in this process; medians count. Capacity is taken in two ways: the rate
at which requests end one after another, and that at which they end when all are sent at once.
`least`, of the latter, is what no scheduler can beat: at rate r as many as b(r)
requests are in work on average (Little), b(r) being the fewest that the denoiser finishes at this
rate, b / f(b) = r with f(b) the seconds of its steps for b requests at once.
"""

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import orders
import torch
from orders import Painter, turns, write_lora

from lookalike_api.sampling.loading import Adapters
from lookalike_api.sampling.messages import AdapterFile
from lookalike_platform import bases
from lookalike_platform.conditioning import Text, predict
from lookalike_platform.samplers import make_sampler
from lookalike_platform.settings import Settings
from lookalike_trainers.methods.row_adapter import Outfit
from lookalike_trainers.methods.row_edits import Slot

MANY = 16
ROWS = 8
RANK = 8


def batch(painter: Painter, worn: list[AdapterFile], asked: argparse.Namespace) -> None:
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.set_verbosity_error()  # "no LoRA of the text encoder", at each of them

    base = painter.resident
    pipeline = StableDiffusionPipeline.from_pretrained(base.folder, dtype=base.dtype)
    pipeline.to(base.device).set_progress_bar_config(disable=True)
    config = dict(pipeline.scheduler.config)

    def one_after_another() -> None:
        for number, file in enumerate(worn):
            pipeline.load_lora_weights(file.path.parent, weight_name=file.path.name)
            pipeline.scheduler = make_sampler("dpmsolver++", config)
            pipeline(
                orders.prompt(number),
                num_inference_steps=painter.steps,
                guidance_scale=orders.GUIDANCE,
                generator=torch.Generator().manual_seed(number),
                cross_attention_kwargs={"scale": file.scale},
            )
            pipeline.unload_lora_weights()

    def together() -> None:
        painter.together([[file] for file in worn])

    def together_cold() -> None:
        painter.forget()
        together()

    seconds = turns(
        {
            "one after another": one_after_another,
            "cold": together_cold,
            "warm": together,  # with what the cold round has read
            "without": lambda: painter.together([[]] * MANY),
        },
        asked.rounds,
        base.device,
    )
    slow, cold, warm, bare = (statistics.median(taken) for taken in seconds.values())
    print(
        f"batch: diffusers, one after another {slow:.2f} s; together, cold {cold:.2f} s, ", end=""
    )
    print(f"warm {warm:.2f} s, without adapters {bare:.2f} s ({painter.steps} steps)")
    print(f"    cold {slow / cold:.2f} times the throughput (bar 4), warm {slow / warm:.2f}")
    text = _texts(painter, 2 * MANY)  # guided: two rows each
    with torch.inference_mode():
        calls = [_denoise(painter, text) for _ in range(1 + 5 * asked.rounds)][1:]
    least = statistics.median(calls) * painter.steps
    print(f"    all rows in one call of the denoiser, alone: {least:.2f} s, so at most ", end="")
    print(f"{slow / least:.2f} times by batching")
    print(f"    warm {warm / bare:.3f} of the time without adapters (bar 1.25)")


def rows(painter: Painter, worn: list[AdapterFile], asked: argparse.Namespace) -> None:
    base = painter.resident
    text = _texts(painter, ROWS)
    slots = [_slot(painter, file, text[n : n + 1]) for n, file in enumerate(worn[:ROWS])]
    bare = [Slot((), ROWS, base.edits.answers((), text.features))]
    seconds: dict[str, list[float]] = {"alone": [], "worn": []}
    with torch.inference_mode():
        for _ in range(10 * asked.rounds):
            for way, edits in (("alone", bare), ("worn", slots)):
                base.edits.put_on(edits)
                seconds[way].append(_denoise(painter, text))
    base.edits.put_on([])
    alone, dressed = (statistics.median(taken) for taken in seconds.values())
    print(f"rows: denoiser alone {alone * 1e3:.1f} ms, with {ROWS} LoRAs {dressed * 1e3:.1f} ms")
    print(f"    {dressed / alone - 1:+.1%} (bar +25%)")


def switch(painter: Painter, worn: list[AdapterFile], asked: argparse.Namespace) -> None:
    text = _texts(painter, 2)

    def wear(file: AdapterFile) -> None:
        painter.resident.edits.put_on([_slot(painter, file, text)])

    with torch.inference_mode():
        _each(wear, worn, 1, painter)  # now all are in memory
        seconds = _each(wear, worn, asked.rounds, painter)
    painter.resident.edits.put_on([])
    print(f"switch: {statistics.median(seconds) * 1e3:.2f} ms (bar 5 ms)")


def load(painter: Painter, folder: Path, asked: argparse.Namespace) -> None:
    base = painter.resident
    smallest = write_lora(base.unet, folder / "smallest.safetensors", 1, 0)
    rank = round(3e6 / smallest.path.stat().st_size)
    files = [
        write_lora(base.unet, folder / f"large-{n}.safetensors", rank, n)
        for n in range(4 * asked.rounds)
    ]
    seconds = _each(lambda file: _kept(painter, file), files, 1, painter)
    size = files[0].path.stat().st_size / 1e6
    print(f"load: {statistics.median(seconds) * 1e3:.1f} ms for {size:.1f} MB (bar 50 ms)")


def memory(painter: Painter, folder: Path, asked: argparse.Namespace) -> None:
    budget = 64 * 2**20
    files = [
        write_lora(painter.resident.unet, folder / f"many-{n}.safetensors", RANK // 2, n)
        for n in range(1000)
    ]
    whole, painter.adapters = painter.adapters, Adapters(budget, budget)
    gc.collect()
    before = _resident_bytes()
    for file in files:
        _kept(painter, file)
    held = painter.adapters.of(painter.resident).held
    grown = _resident_bytes() - before
    painter.adapters = whole
    on_disk = sum(file.path.stat().st_size for file in files)
    print(f"memory: {grown / 2**20:.0f} MiB more, {held / 2**20:.0f} MiB kept, ", end="")
    print(f"{on_disk / 2**20:.0f} MiB in files (bar {budget / 2**20:.0f} MiB)")


def arrivals(painter: Painter, worn: list[AdapterFile], asked: argparse.Namespace) -> None:
    painter.together([[file] for file in worn])
    alone, all_at_once = [], []
    latencies: dict[tuple[str, str], list[float]] = {}
    for number in range(asked.rounds):
        for file in worn[:3]:
            started = time.perf_counter()
            painter.together([[file]])
            alone.append(time.perf_counter() - started)
        started = time.perf_counter()
        painter.together([[file] for _, file in zip(range(2 * MANY), cycle(worn), strict=False)])
        all_at_once.append(2 * MANY / (time.perf_counter() - started))
        for kind, capacity in (
            ("one after another", 1 / statistics.median(alone)),
            ("all at once", statistics.median(all_at_once)),
        ):
            for way in ("joining", "to the end"):
                taken = _served(painter, worn, asked.load * capacity, asked.requests, number, way)
                latencies.setdefault((kind, way), []).extend(taken)
    unloaded, capacity = statistics.median(alone), statistics.median(all_at_once)
    print(
        f"arrivals: alone {unloaded:.2f} s; capacity one after another {1 / unloaded:.2f} ", end=""
    )
    print(f"a second, all at once {capacity:.2f}")
    for (kind, way), taken in latencies.items():
        p50, p95 = (statistics.quantiles(taken, n=20)[place] for place in (9, 18))
        print(f"    {asked.load:g} of {kind}, {way}: p50 {p50 / unloaded:.2f}, ", end="")
        print(f"p95 {p95 / unloaded:.2f} of alone" + (" (bar p95 2.0)" * (way == "joining")))
    _print_least(painter, asked.load, capacity)


def _served(
    painter: Painter, worn: list[AdapterFile], rate: float, count: int, seed: int, way: str
) -> list[float]:
    """Latencies of Poisson arrivals, from when they were due; `to the end` nobody joins others."""
    drawn = random.Random(seed)
    at, due = time.perf_counter(), []
    for _ in range(count):
        due.append(at := at + drawn.expovariate(rate))
    wearing = cycle(worn)
    sent: dict[int, float] = {}
    latencies: list[float] = []
    while len(latencies) < count:
        if way == "joining" or not sent:
            while due and due[0] <= time.perf_counter():
                if way == "to the end" and len(sent) == MANY:
                    break
                sent[painter.send([next(wearing)])] = due.pop(0)
        ends = painter.turn(0.002)
        latencies += [at - sent.pop(number) for number, at in ends.items()]
    return latencies


def _print_least(painter: Painter, share: float, capacity: float) -> None:
    curve = {}
    for count in (1, 2, 4, 8, 16, 32):
        text = _texts(painter, 2 * count)  # guided: two rows each
        with torch.inference_mode():
            _denoise(painter, text)
            curve[count] = statistics.median(_denoise(painter, text) for _ in range(5))
    each = ", ".join(f"{count}: {s * 1e3:.0f} ms" for count, s in curve.items())
    print(f"    the denoiser for so many requests at once: {each}")
    rate = share * capacity * painter.steps  # steps of requests a second
    fewest = _fewest(curve, rate)
    found = f"{fewest / rate / curve[1]:.2f}" if fewest else "no batch reaches this rate"
    print(f"    least: {found} of alone on average")


def _fewest(curve: Mapping[int, float], rate: float) -> float | None:
    """The fewest requests b at once with b / f(b) >= rate, f as straight between those measured.

    Where one at a time is enough, the share of time that there is one.
    """
    if rate * curve[1] <= 1:
        return rate * curve[1]
    for (few, short), (many, long) in pairwise(curve.items()):
        if many / long >= rate:
            slope = (long - short) / (many - few)
            return rate * (short - slope * few) / (1 - rate * slope)  # b = rate f(b)
    return None


def _texts(painter: Painter, count: int) -> Text:
    read = painter.resident.read
    return Text.cat([read(orders.prompt(number), []).text for number in range(count)])


def _slot(painter: Painter, file: AdapterFile, text: Text) -> Slot:
    outfit: Outfit = ((_kept(painter, file), file.scale),)
    rows_of_text = len(text.features)
    return Slot(outfit, rows_of_text, painter.resident.edits.answers(outfit, text.features))


def _kept(painter: Painter, file: AdapterFile) -> Any:
    """The adapter from the cache, loaded if it is not there."""
    base = painter.resident
    taken = painter.adapters.take(base, [file])
    assert taken is not None
    (kept,) = taken
    adapter = kept.value.result()
    painter.adapters.of(base).give_back(kept)
    return adapter


def _denoise(painter: Painter, text: Text) -> float:
    """Seconds of one call of the denoiser."""
    base, count = painter.resident, len(text.features)
    side = base.resolution // base.vae_scale
    seen = torch.randn(count, base.channels, side, side).to(base.device, base.dtype)
    timesteps = torch.full((count,), 500, device=base.device)

    started = time.perf_counter()
    predict(base.unet, seen, timesteps, text)
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _each(
    work: Callable[[AdapterFile], Any], files: list[AdapterFile], rounds: int, painter: Painter
) -> list[float]:
    """Seconds for each file, every round."""
    seconds = []
    for _ in range(rounds):
        for file in files:
            started = time.perf_counter()
            work(file)
            if painter.resident.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    return seconds


def _resident_bytes() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x]
    return int(line.split()[1]) * 1024


FILES_OF_THEIR_OWN = {"load": load, "memory": memory}
PARTS = {"batch": batch, "rows": rows, "switch": switch, "arrivals": arrivals}


def main() -> None:
    orders.as_workers_do()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [*PARTS, *FILES_OF_THEIR_OWN]
    parser.add_argument("parts", nargs="*", default=names, help=", ".join(names))
    parser.add_argument("--base", default="pocket-64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--load", type=float, default=0.8, help="arrivals: the share of capacity")
    parser.add_argument("--requests", type=int, default=60, help="arrivals: a round")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        base = bases.resolve(asked.base, Settings(home=folder))
        painter = Painter(base, folder, 2**30, asked.steps)
        worn = [
            write_lora(painter.resident.unet, folder / f"worn-{n}.safetensors", RANK, n)
            for n in range(MANY)
        ]
        for name in asked.parts:
            if name in PARTS:
                PARTS[name](painter, worn, asked)
            else:
                FILES_OF_THEIR_OWN[name](painter, folder, asked)


if __name__ == "__main__":
    main()
