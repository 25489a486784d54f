"""What the sampling service and its resident process say to each other, one JSON object a line.

    service → process   {"op": "sample", "number", "order": SampleOrder}
                        {"op": "cancel", "number"}              this order and all before it
    process → service   {"number", "type": "progress", "step", "total"}
                        {"number", "type": "done", "images": [paths], "warnings": [texts]}
                        {"number", "type": "canceled"}
                        {"number", "type": "error", "problem"}  a problem the user can act on
                        {"number", "type": "crash", "detail"}   a defect; the process lives on

Orders are numbered from 1 and carried out one after the other. The end of standard input means
that the service is gone, and ends the process.
"""

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
class SampleOrder:
    """Pictures to make, with nothing left to look up; sizes in pixels.

    Image i has seed `seed + i` and is written to `folder` as `i.png`, carrying `parameters[i]`
    as text.
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

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        plain["base_folder"], plain["folder"] = str(self.base_folder), str(self.folder)
        for adapter in plain["adapters"]:
            adapter["path"] = str(adapter["path"])
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        adapters = tuple(
            AdapterFile(**{**adapter, "path": Path(adapter["path"])})
            for adapter in plain["adapters"]
        )
        return cls(
            **{
                **plain,
                "adapters": adapters,
                "base_folder": Path(plain["base_folder"]),
                "folder": Path(plain["folder"]),
                "parameters": tuple(plain["parameters"]),
            }
        )
