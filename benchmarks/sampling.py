"""Sampling through the service against the bare diffusers pipeline, on the bundled base.

Three ways to the same pictures take turns, so that a change in the machine's load hits all:

    bare      diffusers' StableDiffusionPipeline, in memory and warm, in a process of its own
    service   our resident process through its supervisor: pipes, PNG files
    HTTP      POST /v1/generations?wait= to a running stack: database, broker, worker, blobs, PNG

All three paint in child processes started in the same way, and are warm when the clock runs.
The bar: the service takes at most 1.10 times what the bare pipeline takes.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lookalike_api.client import Client
from lookalike_api.sampling.messages import SampleOrder
from lookalike_api.sampling.service import SamplerService
from lookalike_api.stack import free_port, run_stack
from lookalike_platform import bases
from lookalike_platform.bases import Base
from lookalike_platform.process import spawn_group
from lookalike_platform.samplers import make_sampler
from lookalike_platform.settings import Settings

PROMPT = "a dog on a beach"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="pocket-64")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--bare", metavar="FOLDER", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.bare:
        _serve_bare(Path(asked.bare), asked)
        return
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        settings = Settings(home=home, default_base=asked.base, api_port=free_port("127.0.0.1"))
        base = bases.resolve(asked.base, settings)
        service = SamplerService()
        with run_stack(settings) as stack, Client(stack.url) as client:
            ways = {
                "bare": _bare(base),
                "service": _service(service, base, settings, asked, home),
                "HTTP": _http(client, asked),
            }
            seconds = _take_turns(ways, asked.rounds)
        service.close()
    print(
        f"{asked.images} images of {base.resolution} px, {asked.steps} steps of dpmsolver++, "
        f"guidance {asked.guidance:g}; median (fastest) of {asked.rounds} rounds"
    )
    bare = statistics.median(seconds["bare"])
    for way, taken in seconds.items():
        middle = statistics.median(taken)
        print(f"{way:8} {middle:7.3f} s ({min(taken):.3f})   {middle / bare:.3f} of bare")


def _take_turns(ways: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round; round 0 warms up and does not count."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, paint in ways.items():
            started = time.perf_counter()
            paint(number)
            if number:
                seconds[way].append(time.perf_counter() - started)
    return seconds


def _bare(base: Base) -> Callable[[int], None]:
    again = [sys.executable, __file__, *sys.argv[1:], "--bare", str(base.folder)]
    child = spawn_group(again, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None
    assert child.stdout is not None
    said, heard = child.stdin, child.stdout

    def paint(seed: int) -> None:
        said.write(f"{seed}\n".encode())
        said.flush()
        if heard.readline() != b"done\n":
            raise SystemExit("the bare pipeline failed")

    return paint


def _serve_bare(folder: Path, asked: argparse.Namespace) -> None:
    """The bare pipeline's process: a seed a line in, "done" out."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    config = dict(pipeline.scheduler.config)
    for line in sys.stdin:
        pipeline.scheduler = make_sampler("dpmsolver++", config)
        seeds = [int(line) + i for i in range(asked.images)]
        pipeline(
            PROMPT,
            num_inference_steps=asked.steps,
            guidance_scale=asked.guidance,
            num_images_per_prompt=asked.images,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        )
        print("done", flush=True)


def _service(
    service: SamplerService, base: Base, settings: Settings, asked: argparse.Namespace, folder: Path
) -> Callable[[int], None]:
    def paint(seed: int) -> None:
        order = SampleOrder(
            base_fingerprint=base.fingerprint,
            base_folder=base.folder,
            device=settings.device,
            adapters=(),
            prompt=PROMPT,
            negative_prompt="",
            guidance_scale=asked.guidance,
            steps=asked.steps,
            sampler="dpmsolver++",
            seed=seed,
            width=base.resolution,
            height=base.resolution,
            num_images=asked.images,
            folder=folder,
            parameters=("{}",) * asked.images,
        )
        service.sample(order, lambda step, total: None, lambda: False)

    return paint


def _http(client: Client, asked: argparse.Namespace) -> Callable[[int], None]:
    def paint(seed: int) -> None:
        made = client.generate(
            PROMPT,
            guidance_scale=asked.guidance,
            steps=asked.steps,
            sampler="dpmsolver++",
            seed=seed,
            num_images=asked.images,
            wait=120,
        )
        if made["state"] != "succeeded":
            raise SystemExit(f"the generation ended as {made['state']}: {made['error']}")

    return paint


if __name__ == "__main__":
    main()
