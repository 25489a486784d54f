"""Masks uploaded beside photos: `rex.mask.png`, or OneTrainer's `rex-masklabel.png`, for `rex.*`.

White is the subject, black is not to be learned (`masked_loss`). The mask becomes the alpha of its
photo's PNG, whose colours stay: a cut-out and a photo with a mask are one thing from there on.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import BinaryIO

from PIL import Image

from lookalike_datasets.intake import Verdict, examine
from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_platform.settings import Settings

ENDINGS = (".mask.png", "-masklabel.png")
Files = Sequence[tuple[str, BinaryIO]]


def split(files: Files) -> tuple[Files, dict[str, tuple[str, BinaryIO]]]:
    """The photos in order, and the masks' files by the name of the photo they belong to.

    Raises InvalidRequest for a mask that belongs to no photo, to several, or is one of two.
    """
    photos = [(name, file) for name, file in files if _masked(name) is None]
    masks: dict[str, tuple[str, BinaryIO]] = {}
    problems = []
    for position, (name, file) in enumerate(files):
        stem = _masked(name)
        if stem is None:
            continue
        owners = [photo for photo, _ in photos if PurePath(photo).stem == stem]
        if len(owners) != 1 or owners[0] in masks:
            known = "two masks belong to one photo" if owners else "there is no photo"
            what = known if len(owners) < 2 else f"{len(owners)} photos are"
            problems.append(FieldProblem(f"images[{position}]", f"{name}: {what} named {stem}"))
        else:
            masks[owners[0]] = (name, file)
    if problems:
        raise InvalidRequest("A mask is named after the photo it belongs to.", problems)
    return photos, masks


def put_on(verdict: Verdict, name: str, file: BinaryIO, limits: Settings) -> Verdict:
    """The verdict on a photo with its mask in it; refused, if the mask cannot be used."""
    if not verdict.accepted:
        return verdict
    examined = examine(name, file, limits)
    if not examined.accepted:
        return Verdict(verdict.filename, accepted=False, reason=f"its mask {examined.reason}")
    with Image.open(io.BytesIO(verdict.png)) as photo, Image.open(io.BytesIO(examined.png)) as seen:
        if abs(seen.width * photo.height - seen.height * photo.width) > max(photo.size):
            reason = (
                f"its mask is {seen.width} x {seen.height} pixels, and the photo {photo.width} x"
                f" {photo.height}: they must have one shape"
            )
            return Verdict(verdict.filename, accepted=False, reason=reason)
        mask = seen.convert("L").resize(photo.size)
        if mask.getextrema()[1] == 0:
            return Verdict(verdict.filename, accepted=False, reason="its mask is black all over")
        masked = photo.convert("RGB")
        masked.putalpha(mask)
    buffer = io.BytesIO()
    masked.save(buffer, "PNG")
    return replace(verdict, png=buffer.getvalue())


def _masked(name: str) -> str | None:
    """The stem of the photo that a mask of this name belongs to; None if it names no mask."""
    base = PurePath(name).name
    for ending in ENDINGS:
        if base.lower().endswith(ending):
            return base[: -len(ending)]
    return None
