"""What the denoiser is told of an order's pictures, once or region by region. Imports torch.

Without regions, and with them in the attention, it is asked once: what a picture is told is then
its regions' prompts side by side, and where each holds (methods/layout.py). In the latents it is
asked once for each region, about whole pictures (MultiDiffusion, Bar-Tal et al. 2023).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lookalike_api.sampling.messages import AdapterFile, Region, SampleOrder
from lookalike_api.sampling.models import Dressed, ResidentBase
from lookalike_api.sampling.regions import Cells, box_cells, mask_cells, numbered
from lookalike_platform.conditioning import Text
from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.methods.layout import Layout, check_placed
from lookalike_trainers.methods.row_adapter import Outfit, RowAdapter
from lookalike_trainers.methods.row_edits import Answers

ATTENTION = "attention"


@dataclass(frozen=True, eq=False)
class Part:
    """One question about a batch's pictures.

    worn: what the whole base wears for it
    text: for each picture the negative prompt, then for each the prompt
    answers: what K and V say of each of these
    place: the latents whose answer is taken, ones in [height, width]; None is all
    """

    worn: tuple[AdapterFile, ...]
    outfit: Outfit
    text: Text
    answers: Answers
    layout: Layout | None = None
    place: torch.Tensor | None = None
    warnings: list[str] = field(default_factory=list)


def parts_of(
    order: SampleOrder, base: ResidentBase, by_row: Mapping[AdapterFile, RowAdapter], count: int
) -> list[Part]:
    """For `count` pictures. Adapters that are not in `by_row` are worn by the base, which is
    changed for it.

    Raises InvalidRequest for what base and adapters cannot do, and for a region without place.
    """
    rest = Region(order.prompt, order.adapters, negative_prompt=order.negative_prompt)
    parts = []
    for number, region in enumerate((rest, *order.regions)):
        base.wear([file for file in region.adapters if file not in by_row])
        dressed = [Dressed(by_row[file], file) for file in region.adapters if file in by_row]
        name = f"prompt of regions[{number - 1}]" if number else "prompt"
        parts.append(_read(order, base, name, region, dressed, count))
    if not order.regions:
        return parts
    cells = torch.tensor([list(row) for row in _cells(order, base)], device=base.device)
    if order.compose == ATTENTION:
        return [_side_by_side(parts, cells)]
    placed = [replace(part, place=(cells == n).to(base.dtype)) for n, part in enumerate(parts)]
    return [part for part in placed if part.place is not None and part.place.any()]


def check_regional(order: SampleOrder, by_row: Mapping[AdapterFile, RowAdapter]) -> None:
    """Raises InvalidRequest, by name, for adapters that regions in the attention cannot wear."""
    if not order.regions or order.compose != ATTENTION:
        return
    for file in order.files:
        if file not in by_row:
            raise InvalidRequest(
                f"{file.ref} changes the base as a whole, and cannot be kept to a region of the "
                'attention: ask for "compose": "latents".'
            )
        try:
            check_placed(by_row[file])
        except InvalidRequest as error:
            raise InvalidRequest(f"{file.ref}: {error.detail}", error.fields) from error


def same_depth(texts: Sequence[Text]) -> list[Text]:
    """Where some have features by layer, the others repeat theirs."""
    layers = max((text.features.shape[1] for text in texts if text.features.dim() == 4), default=0)
    return [
        replace(text, features=text.features.unsqueeze(1).expand(-1, layers, -1, -1))
        if layers and text.features.dim() == 3
        else text
        for text in texts
    ]


def _read(
    order: SampleOrder,
    base: ResidentBase,
    name: str,
    region: Region,
    dressed: Sequence[Dressed],
    count: int,
) -> Part:
    """The prompt and the negative prompt, both as these adapters have them."""
    read = base.read(region.prompt, dressed)
    negative = base.read(region.negative_prompt, dressed)
    most = base.max_tokens
    warnings = [
        f"The {name} is {said.tokens} tokens long and was cut off after {most}, "
        "which is all this base model reads."
        for name, said in ((name, read), ("negative prompt", negative))
        if said.tokens > most
    ]
    blank = base.read_negative(region.negative_prompt, dressed)
    both = same_depth([blank.text, read.text])
    text = Text.cat([one.expand(count) for one in both]).of_size(order.height, order.width)
    outfit = tuple((one.adapter, one.file.scale) for one in dressed)
    once = base.edits.answers(outfit, Text.cat(both).features)
    answers = {name: said.repeat_interleave(count, dim=0) for name, said in once.items()}
    return Part(base.worn, outfit, text, answers, warnings=warnings)


def _side_by_side(parts: Sequence[Part], cells: torch.Tensor) -> Part:
    """All regions in one question. SDXL's summary, which is of no place, is the first's."""
    texts = same_depth([part.text for part in parts])
    tokens = texts[0].features.shape[-2]
    answers = {
        name: torch.cat([part.answers[name] for part in parts], dim=1) for name in parts[0].answers
    }
    layout = Layout(
        cells,
        torch.arange(len(parts), device=cells.device).repeat_interleave(tokens),
        tuple(n for n, part in enumerate(parts) for _ in part.outfit),
    )
    return Part(
        worn=(),
        outfit=tuple(one for part in parts for one in part.outfit),
        text=replace(texts[0], features=torch.cat([text.features for text in texts], dim=-2)),
        answers=answers,
        layout=layout,
        warnings=[warning for part in parts for warning in part.warnings],
    )


def _cells(order: SampleOrder, base: ResidentBase) -> Cells:
    sides = order.height // base.vae_scale, order.width // base.vae_scale
    size = (order.width, order.height)

    def inside(region: Region) -> Cells:
        if region.box:
            return box_cells(region.box, *sides)
        assert region.mask_image is not None, "a region has a box or a mask"
        return mask_cells(region.mask_image, size, *sides)

    return numbered([inside(region) for region in order.regions])
