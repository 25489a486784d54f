"""`lookalike demo`: the whole path on this machine, from the photos in this package to pictures."""

import io
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lookalike_api.cli.connection import connect_or_start
from lookalike_api.cli.output import AsJson, console, note, show
from lookalike_api.cli.progress import JobBar
from lookalike_api.cli.settings import read_settings
from lookalike_api.client import Client, Json

if TYPE_CHECKING:
    from PIL.Image import Image

NAME, NOUN, TRIGGER = "bibo", "robot", "sks"
PROMPTS = [
    "a 3d render of a {} on a green background",
    "a 3d render of a {} on a red background",
    "a 3d render of a {} on the beach",
    "a painting of a {} on a purple background",
]
GUIDANCE = (2.0, 5.0)
SEED, PICTURES = 11, 2


@dataclass(frozen=True)
class Painting:
    """One cell of the sheet: what was asked, and the generation that answers it."""

    prompt: str
    guidance: float
    personalized: bool


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="The contact sheet. Left out: demo.png under LOOKALIKE_HOME."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Learn a toy robot from six pictures, paint it, and lay everything out on one sheet.

    Takes a few minutes on two CPU cores. Run again, it makes a new version of the same adapter.
    """
    begun = time.monotonic()
    target = (out or read_settings().home / "demo.png").absolute()
    with connect_or_start(None) as look:
        subject = _upload(look)
        ref = _train(look, subject)
        paintings = _paint(look, ref)
        shown = [_png(look.subject_image(subject["id"], i["position"])) for i in subject["images"]]
        note("Stopping")
    _lay_out(shown, paintings, ref, target)
    seconds = round(time.monotonic() - begun)
    show(
        {"sheet": str(target), "adapter": ref, "seconds": seconds},
        as_json,
        lambda: f"{ref} is learned, in {seconds} s. The contact sheet is {target}",
    )


def photos() -> Path:
    """The folder of the six pictures; the package is always installed as files."""
    return Path(str(files("lookalike_api") / "demo" / NAME))


def _upload(look: Client) -> Json:
    made = look.add_subject_set(photos(), class_noun=NOUN, name=NAME)
    note(f"Uploaded {len(made['images'])} pictures of {NAME}, a {NOUN}: {made['id']}")
    return made


def _train(look: Client, subject: Json) -> str:
    job = look.train(subject["id"], concept=NAME, config={"trigger": TRIGGER})
    note(f"Training a LoRA: {job['id']}")
    with JobBar() as bar:
        done = look.wait(job["id"], on_progress=bar.progress, on_event=bar.event)
    return f"{done['result']['concept']}@{done['result']['version']}"


def _paint(look: Client, ref: str) -> dict[Painting, list["Image"]]:
    """Every prompt from the base and from the adapter, with the same seeds."""
    from rich.progress import track

    wanted = [
        Painting(prompt, guidance, personalized)
        for prompt in PROMPTS
        for guidance, personalized in [(GUIDANCE[-1], False), *((g, True) for g in GUIDANCE)]
    ]
    orders = {
        painting: look.generate(
            painting.prompt.format(f"<{NAME}>" if painting.personalized else f"{TRIGGER} {NOUN}"),
            adapters=[ref] if painting.personalized else [],
            guidance_scale=painting.guidance,
            seed=SEED,
            num_images=PICTURES,
        )["id"]
        for painting in wanted
    }
    made = {}
    for painting, order in track(orders.items(), f"{'painting':<22}", console=console(stderr=True)):
        look.wait(order)
        made[painting] = [_png(look.image(order, number)) for number in range(PICTURES)]
    return made


def _lay_out(
    shown: list["Image"], made: dict[Painting, list["Image"]], ref: str, target: Path
) -> None:
    from lookalike_api.cli.contact_sheet import Row, contact_sheet, save

    low, high = GUIDANCE
    rows = [
        Row(
            prompt.format(f"<{NAME}>"),
            [
                [shown[number % len(shown)]],
                made[Painting(prompt, high, False)],
                made[Painting(prompt, low, True)],
                made[Painting(prompt, high, True)],
            ],
        )
        for number, prompt in enumerate(PROMPTS)
    ]
    heads = [
        f"photos ({len(rows)} of {len(shown)})",
        f"base model, guidance {high:g}",
        f"{ref}, guidance {low:g}",
        f"{ref}, guidance {high:g}",
    ]
    notes = f"The same prompts and seeds in every column; the base reads “{TRIGGER} {NOUN}”."
    save(contact_sheet(f"{NAME}, a {NOUN}", notes, heads, rows), target)


def _png(data: bytes) -> "Image":
    from PIL import Image

    return Image.open(io.BytesIO(data))
