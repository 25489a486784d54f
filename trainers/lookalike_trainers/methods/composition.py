"""A merged version: the changes of several adapters in one file, and the words of all. Torch.

    lora.*, delta.*                       changes of the base, as in tensor_file.py
    tokens.<part>                         the learned rows of all subjects, one after the other
    composition.<place>.<key>             Perfusion's tensors of the subject at this place, from 1

The config's `subjects` tell, one by one, how many rows each has in a part (`rows`), for how many
layers (`layers`, ED-LoRA), and the scale of its gated term (`gate`, or null). Subject n answers to
the version's word with n after it (`tensor_file.nth_word`).

Nothing trains this: `composition/` merges, and what fits into a LoRA file becomes one (`save`).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.adapter_file import WEIGHTS_NAME, LoraCard
from lookalike_registry.compose.low_rank import LowRank
from lookalike_registry.compose.rules import COMPOSITION
from lookalike_registry.formats.diffusers_lora import save_diffusers
from lookalike_registry.products import Product, loaded_products, saved_products
from lookalike_registry.safetensors_header import read_header
from lookalike_registry.tensor_file import ADAPTER_NAME, adapter_info, nth_word, save_tensors
from lookalike_trainers.methods import deltas, perfusion
from lookalike_trainers.methods.custom_diffusion import projections
from lookalike_trainers.methods.ed_lora import read_by_layer
from lookalike_trainers.methods.gate import Gate, wear_gates
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.products import wear_products
from lookalike_trainers.methods.row_adapter import RowAdapter, of_text, of_unet
from lookalike_trainers.methods.text_by_layer import cross_attention, take_own_text
from lookalike_trainers.methods.tokens import PREFIX as TOKENS
from lookalike_trainers.methods.tokens import wear_words


@dataclass(frozen=True)
class Subject:
    """What one subject's word means.

    rows: by part, [count * layers, width]; none if it learned no word.
    gate: Perfusion's tensors by their keys in its file, and the scale of its term.
    """

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    layers: int = 1
    gate: Mapping[str, Tensor] = field(default_factory=dict)
    gate_scale: float = 1.0


@dataclass(frozen=True)
class Change:
    """What adapters do to a base, with scales multiplied in.

    products: B A by `<part>.<module>`; deltas: what is added to `<part>.<parameter>`.
    """

    products: Mapping[str, LowRank] = field(default_factory=dict)
    deltas: Mapping[str, Tensor] = field(default_factory=dict)
    subjects: Sequence[Subject] = ()


def save(change: Change, folder: Path, card: Card) -> Path:
    """Write the file: a LoRA in the layout of diffusers where that holds all there is."""
    products = {name: _product(pair) for name, pair in change.products.items()}
    if products and not change.deltas and not any(s.rows or s.gate for s in change.subjects):
        path = folder / WEIGHTS_NAME
        save_diffusers(path, products, LoraCard(**vars(card), shapes={}))
        return path
    path = folder / ADAPTER_NAME
    tensors = saved_products(products)
    tensors |= {f"{deltas.PREFIX}{name}": delta for name, delta in change.deltas.items()}
    tensors |= _rows(change.subjects)
    tensors |= {
        f"{COMPOSITION}.{place}.{key}": tensor
        for place, subject in enumerate(change.subjects, 1)
        for key, tensor in subject.gate.items()
    }
    about = [
        {
            "rows": len(next(iter(subject.rows.values()), ())),
            "layers": subject.layers,
            "gate": subject.gate_scale if subject.gate else None,
        }
        for subject in change.subjects
    ]
    save_tensors(path, COMPOSITION, tensors, {"subjects": about}, card.modelspec(COMPOSITION))
    return path


def load(file: Path) -> Change:
    """What `save` wrote as a composition."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    return Change(
        products={
            name: LowRank(product.up.flatten(1), product.down)
            for name, product in loaded_products(tensors).items()
        },
        deltas=under(deltas.PREFIX, tensors),
        subjects=_subjects(tensors, _about(file)),
    )


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """W + scale * change, and scaled gates; rows know no scale.

    Raises InvalidRequest if words or gates were learned on a base with other layers.
    """
    change = load(file)
    _check_layers(wearer, file, change)
    named = {f"{deltas.PREFIX}{name}": delta for name, delta in change.deltas.items()}
    products = {name: _product(pair) for name, pair in change.products.items()}
    with ExitStack() as undo:
        undo.callback(_wear_words(wearer, change.subjects, word))
        gates = [gate.to(wearer.unet.device) for gate in _gates(wearer, change.subjects)]
        undo.callback(wear_gates(projections(wearer.unet), gates, scale))
        if any(subject.layers > 1 for subject in change.subjects):
            undo.callback(take_own_text(wearer.unet))
        undo.callback(deltas.wear_deltas(wearer, named, scale))
        undo.callback(wear_products(wearer, products, scale))
        return undo.pop_all().close


def rows(wearer: Wearer, file: Path) -> RowAdapter:
    """Of a file that changes no other weights than K's and V's (custom_diffusion.acts_on_rows)."""
    change = load(file)
    kv = {f"unet.{name}.weight": name for name in projections(wearer.unet)}
    _check_layers(wearer, file, change)
    products = {name: _product(pair) for name, pair in change.products.items()}
    return RowAdapter(
        saved_products(of_text(products)) | _rows(change.subjects),
        partial(_wear_text, about=_about(file)),
        products=of_unet(products),
        deltas={kv[name]: delta for name, delta in change.deltas.items()},
        gates=_gates(wearer, change.subjects),
    )


def _gates(wearer: Wearer, subjects: Sequence[Subject]) -> list[Gate]:
    return [perfusion.gate_of(wearer, one.gate, one.gate_scale) for one in subjects if one.gate]


def _wear_text(
    wearer: Wearer,
    text: Mapping[str, Tensor],
    scale: float,
    word: str,
    about: Sequence[Mapping[str, Any]],
) -> TakeOff:
    with ExitStack() as undo:
        undo.callback(_wear_words(wearer, _subjects(text, about), word))
        undo.callback(wear_products(wearer, loaded_products(text), scale))
        return undo.pop_all().close


def _wear_words(wearer: Wearer, subjects: Sequence[Subject], word: str) -> TakeOff:
    """Each subject's rows for its own word."""
    with ExitStack() as undo:
        for place, subject in enumerate(subjects, 1):
            own = {f"{TOKENS}{part}": tensor for part, tensor in subject.rows.items()}
            undo.callback(wear_words(wearer, own, nth_word(word, place), subject.layers))
        most = max((subject.layers for subject in subjects), default=1)
        if most > 1:
            undo.callback(read_by_layer(wearer.text_encoders, most))
        return undo.pop_all().close


def _check_layers(wearer: Wearer, file: Path, change: Change) -> None:
    found = len(cross_attention(wearer.unet))
    if any(subject.layers not in (1, found) for subject in change.subjects):
        raise InvalidRequest(
            f"{file.name} has words for another number of cross-attention layers than the {found} "
            "of this base: it was made for another one."
        )


def _about(file: Path) -> list[dict[str, Any]]:
    """What the config says of each subject."""
    subjects: list[dict[str, Any]] = adapter_info(read_header(file), file.name).config["subjects"]
    return subjects


def _subjects(tensors: Mapping[str, Tensor], about: Sequence[Mapping[str, Any]]) -> list[Subject]:
    all_rows = under(TOKENS, tensors)
    subjects, start = [], 0
    for place, one in enumerate(about, 1):
        own = slice(start, start := start + one["rows"])
        subjects.append(
            Subject(
                rows={part: all_rows[part][own] for part in all_rows if one["rows"]},
                layers=one["layers"],
                gate=under(f"{COMPOSITION}.{place}.", tensors),
                gate_scale=1.0 if one["gate"] is None else one["gate"],
            )
        )
    return subjects


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose keys start so, by the rest of their keys; on the CPU, however they were made."""
    return {
        key.removeprefix(prefix): tensor.detach().cpu()
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def _product(pair: LowRank) -> Product:
    """B as the base's layer takes it: of a convolution [out, rank, 1, 1]."""
    ones = (1,) * (pair.down.dim() - 2)
    return Product(pair.down, pair.up.reshape(*pair.up.shape[:2], *ones))


def _rows(subjects: Sequence[Subject]) -> dict[str, Tensor]:
    parts = dict.fromkeys(part for subject in subjects for part in subject.rows)
    return {
        f"{TOKENS}{part}": torch.cat([s.rows[part] for s in subjects if s.rows]) for part in parts
    }
