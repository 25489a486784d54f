"""`lookalike sample`: pictures from a prompt, with or without adapters."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lookalike_api.cli.connection import Url, connect_or_start
from lookalike_api.cli.output import AsJson, note, show, table
from lookalike_api.cli.progress import follow
from lookalike_api.client import Json
from lookalike_platform.errors import InvalidRequest


def sample(
    prompt: Annotated[str, typer.Argument(help="`<rex>` stands for what adapter rex learned.")],
    adapters: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", metavar="NAME[@VERSION][:SCALE]", help="rex@2:0.8"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Left out: the adapters'.")] = None,
    negative: Annotated[str | None, typer.Option(help="What not to paint.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None,
    rescale: Annotated[float | None, typer.Option(help="Guidance rescale, 0 to 1.")] = None,
    interval: Annotated[
        tuple[float, float] | None, typer.Option(help="Guide from and until: 0.2 0.8")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Dynamic thresholding's percentile: 0.995")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Sampler steps.")] = None,
    sampler: Annotated[str | None, typer.Option(help="GET /v1/samplers lists them.")] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's share of noise, 0 to 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Left out: drawn, and printed.")] = None,
    width: Annotated[int | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option()] = None,
    number: Annotated[int | None, typer.Option("--number", "-n", help="How many.")] = None,
    init_image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A picture to start from.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How far to go from it, 0 to 1; left out: 0.8.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="White where to paint in it."),
    ] = None,
    regions: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            metavar="PLACE|ADAPTERS|PROMPT",
            help='A place with a prompt and adapters of its own: "0,0,0.5,1 | rex:0.8 | a <rex>". '
            "PLACE: left,top,right,bottom in shares of the picture, or a mask's file. "
            "ADAPTERS: as --adapter, several with commas, or nothing.",
        ),
    ] = None,
    compose: Annotated[
        str | None, typer.Option(help="How regions come together: attention or latents.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="In a batch of its own: the same pixels always.")
    ] = False,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which it is not begun any more.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path(),
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Paint pictures and save them as PNG files, which carry their parameters.

    With no API named and none running, an embedded stack runs for as long as this takes.
    """
    uses = [adapter_use(text) for text in adapters or []]
    places = [region(text) for text in regions or []]
    with connect_or_start(url) as look:
        made = look.generate(
            prompt,
            adapters=uses,
            base=base,
            negative_prompt=negative,
            guidance_scale=guidance,
            guidance_rescale=rescale,
            guidance_interval=interval,
            dynamic_threshold=threshold,
            steps=steps,
            sampler=sampler,
            eta=eta,
            seed=seed,
            width=width,
            height=height,
            num_images=number,
            init_image=init_image,
            strength=strength,
            mask_image=mask,
            regions=places,
            compose=compose,
            deterministic=deterministic or None,
            deadline_seconds=deadline,
        )
        follow(look, made["id"], quiet=as_json)
        made = look.generation(made["id"])
        files = [str(path) for path in look.save_images(made, out)]
    for warning in made["warnings"]:
        note(warning)
    show({**made, "files": files}, as_json, lambda: _listing(made, files))


def adapter_use(text: str) -> dict[str, Any]:
    """ "rex@2:0.8" → {"ref": "rex@2", "scale": 0.8}."""
    ref, colon, scale = text.partition(":")
    if not colon:
        return {"ref": ref}
    try:
        return {"ref": ref, "scale": float(scale)}
    except ValueError:
        raise InvalidRequest(f"The scale of {text} is not a number: rex:0.8") from None


def region(text: str) -> dict[str, Any]:
    """ "0,0,0.5,1 | rex:0.8 | a <rex>" → {"box", "adapters", "prompt"}; of a file "mask_image"."""
    parts = [part.strip() for part in text.split("|", 2)]
    if len(parts) != 3 or not parts[0] or not parts[2]:
        raise InvalidRequest(
            f"A region is PLACE|ADAPTERS|PROMPT, and {text!r} is not: "
            '"0,0,0.5,1 | rex | a <rex> on grass", or with no adapter "0,0,0.5,1 | | grass".'
        )
    place, adapters, prompt = parts
    uses = [adapter_use(one.strip()) for one in adapters.split(",") if one.strip()]
    return {"prompt": prompt, "adapters": uses, **_place(place)}


def _place(text: str) -> dict[str, Any]:
    try:
        return {"box": [float(share) for share in text.split(",")]}
    except ValueError:
        if (mask := Path(text)).is_file():
            return {"mask_image": mask}
    raise InvalidRequest(
        f"{text!r} is no place: give left,top,right,bottom as shares of the picture, "
        "0,0,0.5,1 for its left half, or the file of a mask."
    )


def _listing(made: Json, files: list[str]) -> Any:
    everywhere = [made, *made["regions"]]
    used = [f"{a['ref']} x {a['scale']:g}" for place in everywhere for a in place["versions"]]
    adapters = ", ".join(dict.fromkeys(used)) or "none"
    rows = (
        (file, image["seed"], adapters) for file, image in zip(files, made["images"], strict=True)
    )
    return table(("picture", "seed", "adapters"), rows, "No pictures.")
