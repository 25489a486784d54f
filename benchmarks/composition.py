"""Several subjects in one picture: every strategy of docs/composition.md, measured.

    python benchmarks/composition.py SUBJECTS [--pair dog duck_toy] [--steps 300]

pair   two subjects, 50 prompts (25 scenes, either first): in how many pictures both are present, in
       places of their own, by the evaluation's encoder. What counts as present is learned from
       pictures of each subject alone by its own adapter, against those of the other and of the base
       (concepts.Detector), in scenes and from seeds that no row has: a region of one subject would
       else be the very picture that was learned from. The base's row says how many count by luck.
many   2, 4, 8 and 12 subjects: what each keeps of what its adapter alone makes (many.py). Beyond
       the folder's subjects, the same with their colours turned by half a circle.

SUBJECTS is a folder as `lookalike dreambench` reads it. What was trained or painted before is taken
from RESULTS; there the pictures lie, and `pair.png` shows some of each row.
"""

import argparse
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orders
import torch
from concepts import MERGES, Bench, Detector, Order, Version, both, learn, squares_of
from many import COUNTS, many
from orders import Painter
from PIL import Image, ImageDraw

from lookalike_api.sampling.messages import Region
from lookalike_platform import bases
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.bench import Workshop
from lookalike_trainers.evaluation.dreambench import Subject, read_subjects
from lookalike_trainers.evaluation.measures import bootstrap
from lookalike_trainers.evaluation.trial import read_photos
from lookalike_trainers.pretrain.scenes import COLOURS, PLACES

SCENES = (
    *(f"on a {colour} background" for colour in COLOURS),
    *(words for words, *_ in PLACES.values()),
    "in a garden",
    "in the forest",
    "on a table",
    "on a wooden floor",
    "on a street",
    "in a room",
    "on a white rug",
    "under a blue sky",
)
SOLO_SCENES = (  # of the same kinds, and none of them above
    *(f"in front of a {colour} wall" for colour in COLOURS),
    "in a park",
    "in a field",
    "in the desert",
    "on the water",
    "on a mountain",
    "in a kitchen",
    "on a bed",
    "on a sofa",
    "on a chair",
    "on a bench",
    "on a stone floor",
    "by a window",
    "under a cloudy sky",
)
SOLO_SEEDS = 10_000
ENDS = ("left", "right")
HALVES = ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
SHOWN = 10  # pictures of a row in pair.png


def pair(bench: Bench, subjects: tuple[Subject, Subject], steps: int) -> None:
    workshop = bench.workshop
    loras, customs = (
        tuple(learn(workshop, method, steps, n, one) for n, one in enumerate(subjects))
        for method in ("lora", "custom_diffusion")
    )
    joint = learn(workshop, "custom_diffusion", 2 * steps, 2, *subjects)
    nouns = [subject.about.class_noun for subject in subjects]

    rows: dict[str, list[Order]] = {"base": _together(nouns, [])}
    rows["joint training (Custom Diffusion)"] = _version(joint)
    rows["closed_form (Custom Diffusion)"] = _version(bench.merged("closed_form", customs))
    for strategy in MERGES:
        rows[f"{strategy} (LoRA)"] = _version(bench.merged(strategy, loras))
    rows["regions, attention (LoRA)"] = _regions(loras, "attention")
    rows["regions, latents (LoRA)"] = _regions(loras, "latents")

    encoder = workshop.judges().subject[0]
    names = "-".join(subject.name for subject in subjects)

    def look(name: str, asked: Sequence[Order]) -> torch.Tensor:
        pictures = bench.pictures(f"{names}/{name}", asked)
        kept = bench.results / "features" / encoder.digest[:16] / f"{bench.key(*asked)}.pt"
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            torch.save(squares_of(encoder, pictures), kept)
        features: torch.Tensor = torch.load(kept, weights_only=True)
        return features

    own = [_ends(look(f"solo {one.name}", _alone(one.called()[0], [one]))) for one in loras]
    of_base = [_ends(look(f"base {noun}", _alone(noun, []))) for noun in nouns]
    detectors = []
    for place, subject in enumerate(subjects):
        detectors.append(Detector(own[place], torch.cat([own[1 - place], *of_base])))
        print(
            f"{subject.name}: found in {detectors[-1].hits:.2f} of pictures of its own adapter, "
            f"in {detectors[-1].false_alarms:.2f} of others that were not learned from"
        )
    print(f"| strategy | both | {' | '.join(subject.name for subject in subjects)} |")
    print("| --- | --- | --- | --- |")
    for name, asked in rows.items():
        squares = look(name, asked)
        seen = [detector.seen(squares) for detector in detectors]
        shares = [both(*seen), *(one.any(1) for one in seen)]
        print(f"| {name} | {' | '.join(_share(share) for share in shares)} |", flush=True)
    shown = {name: bench.pictures(f"{names}/{name}", asked) for name, asked in rows.items()}
    _sheet(shown).save(bench.results / "pair.png")


def _orders(prompts: Sequence[str], worn: Sequence[Version], first: int = 0) -> list[Order]:
    """Seeds count on from the first."""
    files = [version.worn() for version in worn]
    return [
        {"prompt": prompt, "seed": seed, "worn": files}
        for seed, prompt in enumerate(prompts, first)
    ]


def _alone(called: str, worn: Sequence[Version]) -> list[Order]:
    """To the left in one, to the right in the next."""
    prompts = [f"a {called} on the {end} {scene}" for scene in SOLO_SCENES for end in ENDS]
    return _orders(prompts, worn, SOLO_SEEDS)


def _ends(squares: torch.Tensor) -> torch.Tensor:
    """Of the pictures of `_alone` [n, squares, width] the squares that show it, [n, width]."""
    return torch.where(torch.arange(len(squares))[:, None] % 2 == 0, squares[:, 0], squares[:, -1])


def _together(called: Sequence[str], worn: Sequence[Version]) -> list[Order]:
    """50 prompts: each scene, either first."""
    return _orders([f"a {a} and a {b} {s}" for s, a, b in _prompts(called)], worn)


def _version(version: Version) -> list[Order]:
    return _together(version.called(), [version])


def _prompts(called: Sequence[Any]) -> list[tuple[str, Any, Any]]:
    return [(s, a, b) for s in SCENES for a, b in itertools.permutations(called)]


def _regions(versions: Sequence[Version], compose: str) -> list[Order]:
    """The first to the left, the second to the right."""
    asked: list[Order] = []
    for seed, (scene, left, right) in enumerate(_prompts(versions)):
        regions = tuple(
            Region(f"a {one.called()[0]} on the {end} {scene}", (one.worn(),), box)
            for one, end, box in zip((left, right), ENDS, HALVES, strict=True)
        )
        asked.append({"prompt": scene, "seed": seed, "regions": regions, "compose": compose})
    return asked


def _share(found: torch.Tensor) -> str:
    estimate = bootstrap(found.double().tolist())
    return f"{estimate.mean:.2f} ({estimate.low:.2f}–{estimate.high:.2f})"


def _sheet(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Some pictures of each row, under its name: every fifth prompt, so that either is first."""
    (some, *_) = rows.values()
    width, height = some[0].width + 4, some[0].height + 16
    sheet = Image.new("RGB", (SHOWN * width, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (name, pictures) in enumerate(rows.items()):
        draw.text((2, row * height), name, "black")
        for column, picture in enumerate(pictures[:: len(pictures) // SHOWN]):
            sheet.paste(picture, (column * width, row * height + 14))
    return sheet


def _turned(subject: Subject, folder: Path) -> Subject:
    """The same thing in other colours: hues turned by half a circle."""
    place = folder / f"{subject.name}_turned"
    place.mkdir(parents=True, exist_ok=True)
    files = []
    for number, photo in enumerate(read_photos(subject.photos)):
        photo.thumbnail((512, 512))
        hue, saturation, value = photo.convert("HSV").split()
        hue = hue.point(lambda h: (h + 128) % 256)
        files.append(place / f"{number:02d}.png")
        Image.merge("HSV", (hue, saturation, value)).convert("RGB").save(files[-1])
    return Subject(place.name, subject.about, tuple(files))


def main() -> None:
    orders.as_workers_do()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("subjects", type=Path)
    parser.add_argument("parts", nargs="*", default=["pair", "many"], help="pair, many")
    parser.add_argument("--base", default="pocket-64")
    parser.add_argument("--pair", nargs=2, default=None, help="names; else the first two")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--results", type=Path, default=Path("composition"))
    asked = parser.parse_args()
    settings = Settings(home=asked.results)
    base = bases.resolve(asked.base, settings)
    parts = BaseParts(base.folder, torch.device("cpu"), settings.cache)
    found = read_subjects(asked.subjects)
    with tempfile.TemporaryDirectory() as folder:
        painter = Painter(base, Path(folder), 2**30, steps=20)
        bench = Bench(Workshop(base, parts, settings, settings.runs), painter, asked.results)
        if "pair" in asked.parts:
            by_name = {subject.name: subject for subject in found}
            names = asked.pair or [subject.name for subject in found[:2]]
            pair(bench, (by_name[names[0]], by_name[names[1]]), asked.steps)
        if "many" in asked.parts:
            most = max(COUNTS)
            turned = [
                _turned(s, asked.results / "turned") for s in found[: max(0, most - len(found))]
            ]
            many(bench, [*found, *turned][:most], asked.steps)


if __name__ == "__main__":
    main()
