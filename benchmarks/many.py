"""How strategies of composition hold up with more subjects; a part of composition.py.

The share kept of what each subject's adapter alone makes of the base's picture:

    (cos(together, solo) - cos(base, solo)) / (1 - cos(base, solo))

cosines of features of pictures from the same prompt and noise, sums over the subjects. 1 is the
solo picture, 0 as far from it as the base's own.

Merged and learned jointly, one version knows all subjects, and prompts name one of them. The solo
adapter is of the same method, and was learned alone for as many steps a subject.

With regions all subjects are in one picture, each in a box of its own, and what is looked at is its
box. Alone it has the same box, and the rest of the picture is the base's. One picture a scene.
"""

from collections.abc import Sequence
from itertools import cycle

import torch
from concepts import MERGES, Bench, Order, Version, learn
from PIL import Image
from torch.nn.functional import cosine_similarity

from lookalike_api.sampling.messages import Region
from lookalike_trainers.evaluation.dreambench import Subject
from lookalike_trainers.evaluation.encoders import ImageEncoder
from lookalike_trainers.evaluation.request import SCENES

COUNTS = (2, 4, 8, 12)
SEEDS = (0, 1)
GRIDS = {2: (2, 1), 4: (2, 2), 8: (4, 2), 12: (4, 3)}  # boxes across and down
LARGER = 2  # sides of pictures with regions, in those the base was made for
PLACES = ("on a green background", "on the beach", "in the snow", "on a red background")

Features = Sequence[torch.Tensor]
"""Of each subject those of its pictures, [pictures, width]."""


def many(bench: Bench, subjects: Sequence[Subject], steps: int) -> None:
    workshop = bench.workshop
    print(f"| strategy | {' | '.join(f'{n} subjects' for n in COUNTS)} |")
    print(f"| --- {'| --- ' * len(COUNTS)}|")

    loras = [learn(workshop, "lora", steps, n, one) for n, one in enumerate(subjects)]
    for compose in ("attention", "latents"):
        shares = [Regions(bench, compose, n, loras[:n]).share() for n in COUNTS]
        _row(f"regions, {compose} (LoRA)", shares)

    customs = [learn(workshop, "custom_diffusion", steps, n, one) for n, one in enumerate(subjects)]
    by_name = Named(bench, subjects)
    shares = []
    for n in COUNTS:
        joint = learn(workshop, "custom_diffusion", n * steps, len(subjects), *subjects[:n])
        shares.append(by_name.share(f"joint-{n}", joint, customs[:n]))
    _row("joint training (Custom Diffusion)", shares)

    for strategy in (*MERGES, "closed_form"):
        parents = customs if strategy == "closed_form" else loras
        shares = [
            by_name.share(f"{strategy}-{n}", bench.merged(strategy, parents[:n]), parents[:n])
            for n in COUNTS
        ]
        _row(f"{strategy} ({'Custom Diffusion' if parents is customs else 'LoRA'})", shares)


class Named:
    """Pictures of one subject each."""

    def __init__(self, bench: Bench, subjects: Sequence[Subject]) -> None:
        self._bench, self._subjects = bench, subjects
        self._encoder = bench.workshop.judges().subject[0]

    def share(self, name: str, version: Version, alone: Sequence[Version]) -> float:
        """Kept by a version that knows all of them."""
        together = [self._features(name, n, version.called()[n], [version]) for n in _of(alone)]
        plain = [
            self._features("base", n, self._subjects[n].about.class_noun, []) for n in _of(alone)
        ]
        solo = [
            self._features(f"solo {one.method}", n, one.called()[0], [one])
            for n, one in enumerate(alone)
        ]
        return share(together, plain, solo)

    def _features(
        self, name: str, place: int, called: str, worn: Sequence[Version]
    ) -> torch.Tensor:
        asked = [
            {"worn": [v.worn() for v in worn], "prompt": s.format(subject=called), "seed": seed}
            for s in SCENES
            for seed in SEEDS
        ]
        pictures = self._bench.pictures(f"many/{name}/{self._subjects[place].name}", asked)
        return self._encoder.encode_images(pictures)


class Regions:
    """Pictures of all subjects, each in its box."""

    def __init__(self, bench: Bench, compose: str, count: int, versions: Sequence[Version]) -> None:
        self._bench, self._compose, self._versions = bench, compose, versions
        self._encoder: ImageEncoder = bench.workshop.judges().subject[0]
        across, down = GRIDS[count]
        self._boxes = [
            (x / across, y / down, (x + 1) / across, (y + 1) / down)
            for y in range(down)
            for x in range(across)
        ]

    def share(self) -> float:
        everyone = self._pictures("all", range(len(self._versions)), wearing=True)
        together = [self._seen(everyone, n) for n in _of(self._versions)]
        plain, solo = (
            [self._seen(self._pictures(name, [n], wearing), n) for n in _of(self._versions)]
            for name, wearing in (("base", False), ("solo", True))
        )
        return share(together, plain, solo)

    def _pictures(self, name: str, places: Sequence[int], wearing: bool) -> list[Image.Image]:
        side = LARGER * self._bench.painter.base.resolution
        asked: list[Order] = [
            {
                "prompt": f"a photo {scene}",
                "seed": seed,
                "regions": tuple(self._region(n, scene, wearing) for n in places),
                "compose": self._compose,
                "width": side,
                "height": side,
            }
            for scene, seed in zip(PLACES, cycle(SEEDS), strict=False)
        ]
        among = f"{self._compose}-{len(self._boxes)}"
        whose = self._versions[places[0]].name if len(places) == 1 else "everyone"
        return self._bench.pictures(f"many/{among}/{name}/{whose}", asked)

    def _region(self, place: int, scene: str, wearing: bool) -> Region:
        version = self._versions[place]
        called = version.called()[0] if wearing else version.subjects[0].class_noun
        worn = (version.worn(),) if wearing else ()
        return Region(f"a {called} {scene}", worn, self._boxes[place])

    def _seen(self, pictures: Sequence[Image.Image], place: int) -> torch.Tensor:
        width, height = pictures[0].size
        left, top, right, bottom = self._boxes[place]
        box = (left * width, top * height, right * width, bottom * height)
        return self._encoder.encode_images([picture.crop(box) for picture in pictures])


def share(together: Features, plain: Features, solo: Features) -> float:
    kept = gained = 0.0
    for found, start, alone in zip(together, plain, solo, strict=True):
        least = float(cosine_similarity(start, alone).mean())
        kept += float(cosine_similarity(found, alone).mean()) - least
        gained += 1 - least
    return kept / gained


def _of(versions: Sequence[Version]) -> range:
    return range(len(versions))


def _row(name: str, shares: Sequence[float]) -> None:
    print(f"| {name} | {' | '.join(f'{kept:.2f}' for kept in shares)} |", flush=True)
