"""What the sampling service and its resident process say to each other, one JSON object a line.

    service → process   {"op": "sample", "number", "order": SampleOrder}
                        {"op": "cancel", "number"}
    process → service   {"number", "type": "begun"}             some of its rows are in a batch
                        {"number", "type": "progress", "step", "total"}
                        {"number", "type": "done", "images": [paths], "warnings": [texts]}
                        {"number", "type": "canceled"}
                        {"number", "type": "error", "problem"}  a problem the user can act on
                        {"number", "type": "crash", "detail"}   a defect; the process lives on
                        {"number", "type": "metrics", "figures"}
                        {"type": "alive"}                       it waits for what takes very long

Orders are numbered from 1 and carried out together; what is said is of the order of that number.
"metrics" are figures of the process as a whole, by their names in `metrics.py`, and come as orders
begin and end, and once a second meanwhile. The end of standard input means that the service is
gone, and ends the process.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class AdapterFile:
    """One adapter to sample with.

    digest: sha256 of the file at `path`
    word: what prompts call a subject whose adapter learned tokens; else empty
    """

    ref: str
    digest: str
    path: Path
    scale: float
    word: str = ""


@dataclass(frozen=True)
class Region:
    """A place in the pictures with a prompt and adapters of its own: `box` (left, top, right,
    bottom as shares of the picture) or `mask_image`, white where it is. `negative_prompt` is the
    order's, as these adapters know its subjects."""

    prompt: str
    adapters: tuple[AdapterFile, ...]
    box: tuple[float, float, float, float] | None = None
    mask_image: Path | None = None
    negative_prompt: str = ""


PATHS = ("base_folder", "folder", "init_image", "mask_image")


@dataclass(frozen=True)
class SampleOrder:
    """Pictures to make, with nothing left to look up; sizes in pixels.

    Image i has seed `seed + i` and is written to `folder` as `i.png`, carrying `parameters[i]`
    as text.

    alone: in a batch of its own, so that its pictures are the same to the bit each time
    deadline: seconds since the epoch, after which it is not begun; None is never
    init_image, mask_image: PNG files; `strength` goes with the former
    regions: later ones lie over earlier ones; `prompt`, `negative_prompt` and `adapters` are
        of what none covers
    compose: how they come together, "attention" or "latents" (docs/regions.md)
    """

    base_fingerprint: str
    base_folder: Path
    device: str
    adapters: tuple[AdapterFile, ...]
    prompt: str
    negative_prompt: str
    guidance_scale: float
    steps: int
    sampler: str
    seed: int
    width: int
    height: int
    num_images: int
    folder: Path
    parameters: tuple[str, ...]
    alone: bool = False
    deadline: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    dynamic_threshold: float | None = None
    eta: float = 0.0
    init_image: Path | None = None
    strength: float | None = None
    mask_image: Path | None = None
    regions: tuple[Region, ...] = ()
    compose: str = "attention"

    @property
    def late(self) -> bool:
        """Whether it is no longer to be begun."""
        return self.deadline is not None and time.time() > self.deadline

    @property
    def files(self) -> list[AdapterFile]:
        """All adapters, wherever they act, each once."""
        regional = [file for region in self.regions for file in region.adapters]
        return list(dict.fromkeys([*self.adapters, *regional]))

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        for name in PATHS:
            plain[name] = plain[name] and str(plain[name])
        for wearer in (plain, *plain["regions"]):
            for adapter in wearer["adapters"]:
                adapter["path"] = str(adapter["path"])
        for region in plain["regions"]:
            region["mask_image"] = region["mask_image"] and str(region["mask_image"])
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        return cls(
            **{
                **plain,
                "adapters": _adapters(plain),
                "regions": tuple(_region(region) for region in plain["regions"]),
                **{name: plain[name] and Path(plain[name]) for name in PATHS},
                "parameters": tuple(plain["parameters"]),
                "guidance_interval": tuple(plain["guidance_interval"]),
            }
        )


def _region(plain: dict[str, Any]) -> Region:
    return Region(
        plain["prompt"],
        _adapters(plain),
        plain["box"] and tuple(plain["box"]),
        plain["mask_image"] and Path(plain["mask_image"]),
        plain["negative_prompt"],
    )


def _adapters(plain: dict[str, Any]) -> tuple[AdapterFile, ...]:
    return tuple(
        AdapterFile(**{**adapter, "path": Path(adapter["path"])}) for adapter in plain["adapters"]
    )
