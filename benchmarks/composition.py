"""Several subjects in one picture: every strategy of docs/composition.md, measured.

    python benchmarks/composition.py SUBJECTS [--pair dog duck_toy] [--steps 200]

pair   two subjects, 50 prompts (25 scenes, either first), pictures twice as wide as the base's: in
       how many both are present, apart from each other, by the evaluation's encoder. What counts as
       present is calibrated on the adapters alone and on the base (concepts.Detector); the base's
       own pictures of both classes say how many would count by luck.
many   2, 4, 8 and 12 subjects merged: the share of solo likeness kept, (merged - base) over
       (solo - base), sums over the subjects. Beyond the folder's subjects, the same with their
       colours turned by half a circle.

SUBJECTS is a folder as `lookalike dreambench` reads it. What was trained or painted before is taken
from RESULTS; there the pictures lie, and `pair.png` shows some of each row.
"""

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orders
import torch
from concepts import Detector, Version, both, learn, merged, squares_of
from orders import Painter
from PIL import Image, ImageDraw

from lookalike_api.sampling.messages import Region
from lookalike_platform import bases
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.evaluation.bench import Workshop
from lookalike_trainers.evaluation.dreambench import Subject, read_subjects
from lookalike_trainers.evaluation.measures import bootstrap, subject_fidelity
from lookalike_trainers.evaluation.request import SCENES as FEW_SCENES
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
MERGES = ("weighted_sum", "ssr", "fusion", "svd", "ties", "dare_linear")
COUNTS = (2, 4, 8, 12)
SEEDS = (0, 1)
SHOWN = 6  # pictures of a row in pair.png

Order = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    workshop: Workshop
    painter: Painter
    results: Path

    def pictures(self, name: str, orders: Sequence[Order]) -> list[Image.Image]:
        """Painted, or as they were painted before."""
        folder = self.results / "pictures" / name
        files = [folder / f"{number}.png" for number in range(len(orders))]
        if not all(file.exists() for file in files):
            folder.mkdir(parents=True, exist_ok=True)
            for file, picture in zip(files, self.painter.paint(orders), strict=True):
                picture.save(file)
        return [Image.open(file).convert("RGB") for file in files]


def pair(bench: Bench, subjects: tuple[Subject, Subject], steps: int) -> None:
    workshop = bench.workshop
    side = workshop.base.resolution
    loras, customs = (
        tuple(learn(workshop, method, steps, n, one) for n, one in enumerate(subjects))
        for method in ("lora", "custom_diffusion")
    )
    joint = learn(workshop, "custom_diffusion", 2 * steps, 2, *subjects)
    nouns = [subject.about.class_noun for subject in subjects]

    rows: dict[str, list[Order]] = {"base": _together(nouns, [])}
    rows["joint training (Custom Diffusion)"] = _version(joint)
    rows["closed_form (Custom Diffusion)"] = _version(_merge(bench, "closed_form", customs))
    for strategy in MERGES:
        rows[f"{strategy} (LoRA)"] = _version(_merge(bench, strategy, loras))
    rows["regions, attention (LoRA)"] = _regions(loras, "attention")
    rows["regions, latents (LoRA)"] = _regions(loras, "latents")

    encoder = workshop.judges().subject[0]

    names = "-".join(subject.name for subject in subjects)

    def look(name: str, asked: Sequence[Order]) -> torch.Tensor:
        return squares_of(encoder, side, bench.pictures(f"{names}/{name}", asked))

    detectors = [Detector(encoder, subject) for subject in subjects]
    for detector, lora, noun in zip(detectors, loras, nouns, strict=True):
        own = look(f"solo {lora.name}", _alone(lora.called()[0], [lora]))
        detector.calibrate(own, look(f"base {noun}", _alone(noun, [])))
        print(
            f"{lora.name}: found in {detector.hits:.2f} of its own pictures, "
            f"in {detector.false_alarms:.2f} of the base's of its class"
        )
    print(f"| strategy | both | {' | '.join(subject.name for subject in subjects)} |")
    print("| --- | --- | --- | --- |")
    for name, asked in rows.items():
        squares = look(name, [{"width": 2 * side, "height": side} | order for order in asked])
        seen = [detector.seen(squares) for detector in detectors]
        shares = [both(*seen), *(one.any(1) for one in seen)]
        print(f"| {name} | {' | '.join(_share(share) for share in shares)} |", flush=True)
    _sheet(bench.results, names, list(rows))


def many(bench: Bench, subjects: Sequence[Subject], steps: int) -> None:
    workshop = bench.workshop
    loras, customs = (
        [learn(workshop, method, steps, n, one) for n, one in enumerate(subjects)]
        for method in ("lora", "custom_diffusion")
    )
    encoder = workshop.judges().subject[0]

    def likeness(name: str, subject: Subject, called: str, worn: Sequence[Version]) -> float:
        """Mean over the pictures of one subject."""
        asked = [
            {"worn": [v.worn() for v in worn], "prompt": s.format(subject=called), "seed": seed}
            for s in FEW_SCENES
            for seed in SEEDS
        ]
        pictures = encoder.encode_images(bench.pictures(f"many/{name}/{subject.name}", asked))
        photos = encoder.encode_images(read_photos(subject.photos))
        return float(subject_fidelity(pictures, photos).mean())

    of_base = [likeness("base", s, s.about.class_noun, []) for s in subjects]
    print(f"likeness of the base's pictures {_mean(of_base)}")
    solo = {
        id(versions): [
            likeness(f"solo {version.method}", subject, version.called()[0], [version])
            for subject, version in zip(subjects, versions, strict=True)
        ]
        for versions in (loras, customs)
    }
    print(f"of each LoRA alone {_mean(solo[id(loras)])}, Custom Diffusion ", end="")
    print(_mean(solo[id(customs)]))
    print(f"| strategy | {' | '.join(f'{n} subjects' for n in COUNTS)} |")
    print(f"| --- {'| --- ' * len(COUNTS)}|")
    for strategy in (*MERGES, "closed_form"):
        parents = customs if strategy == "closed_form" else loras
        shares = []
        for count in COUNTS:
            version = _merge(bench, strategy, parents[:count])
            kept = gained = 0.0
            for place in range(count):
                called = version.called()[place]
                found = likeness(f"{strategy}-{count}", subjects[place], called, [version])
                kept += found - of_base[place]
                gained += solo[id(parents)][place] - of_base[place]
            shares.append(f"{kept / gained:.2f}")
        print(f"| {strategy} | {' | '.join(shares)} |", flush=True)


def _merge(bench: Bench, strategy: str, parents: Sequence[Version]) -> Version:
    names = "-".join(parent.name for parent in parents)
    folder = bench.results / "merged" / f"{strategy}-{parents[0].method}-{len(parents)}-{names}"
    return merged(bench.workshop, strategy, parents, folder)


def _orders(prompts: Sequence[str], worn: Sequence[Version], **other: Any) -> list[Order]:
    files = [version.worn() for version in worn]
    return [
        {"prompt": prompt, "seed": seed, "worn": files, **other}
        for seed, prompt in enumerate(prompts)
    ]


def _alone(called: str, worn: Sequence[Version]) -> list[Order]:
    return _orders([f"a {called} {scene}" for scene in SCENES for _ in range(2)], worn)


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
            Region(f"a {one.called()[0]} {scene}", (one.worn(),), box)
            for one, box in ((left, (0.0, 0.0, 0.5, 1.0)), (right, (0.5, 0.0, 1.0, 1.0)))
        )
        asked.append({"prompt": scene, "seed": seed, "regions": regions, "compose": compose})
    return asked


def _share(found: torch.Tensor) -> str:
    estimate = bootstrap(found.double().tolist())
    return f"{estimate.mean:.2f} ({estimate.low:.2f}–{estimate.high:.2f})"


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f}"


def _sheet(results: Path, names: str, rows: Sequence[str]) -> None:
    """Some pictures of each row, under its name."""
    first = Image.open(results / "pictures" / names / rows[0] / "0.png")
    width, height = first.width + 4, first.height + 16
    sheet = Image.new("RGB", (SHOWN * width, len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(rows):
        draw.text((2, row * height), name, "black")
        for column in range(SHOWN):
            # Every eighth prompt: other scenes, and with either first.
            number = column * 8 + column % 2
            with Image.open(results / "pictures" / names / name / f"{number}.png") as picture:
                sheet.paste(picture, (column * width, row * height + 14))
    sheet.save(results / "pair.png")


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
            turned = [_turned(s, asked.results / "turned") for s in found[: most - len(found)]]
            many(bench, [*found, *turned][:most], asked.steps)


if __name__ == "__main__":
    main()
