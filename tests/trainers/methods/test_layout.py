"""Regions of a picture: each hears its own prompt, and wears its own adapters, alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from lookalike_platform.conditioning import Text, encode, predict
from lookalike_platform.errors import InvalidRequest
from lookalike_registry.products import Product
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.find import rows_of
from lookalike_trainers.methods.layout import Layout, check_placed
from lookalike_trainers.methods.row_adapter import RowAdapter
from lookalike_trainers.methods.row_edits import RowEdits, Slot
from lookalike_trainers.methods.text_by_layer import cross_attention
from support_methods import CARD, CPU, SIDE, trained
from support_models import RESOLUTION, TOKENS, save_base

CELLS = torch.zeros(SIDE, SIDE, dtype=torch.int64)
CELLS[:, : SIDE // 2], CELLS[SIDE // 4 :, SIDE // 2 :] = 1, 2
"""A left half, most of a right half, and what is left above it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def layout(tokens: int, homes: tuple[int, ...], cells: torch.Tensor = CELLS) -> Layout:
    regions = int(cells.max()) + 1
    return Layout(cells, torch.arange(regions).repeat_interleave(tokens), homes)


def product(layer: Any, seed: int) -> Product:
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": layer.weight.dtype}
    if layer.weight.dim() == 4:
        down = torch.randn(3, *layer.weight.shape[1:], **draw)
        return Product(down, torch.randn(len(layer.weight), 3, 1, 1, **draw))
    return Product(
        torch.randn(3, layer.in_features, **draw), torch.randn(layer.out_features, 3, **draw)
    )


def adapter_of(layers: dict[str, Any], seed: int) -> RowAdapter:
    products = {name: product(layer, seed + n) for n, (name, layer) in enumerate(layers.items())}
    return RowAdapter({}, lambda *_: lambda: None, products=products)


def test_a_place_of_a_lower_level_is_of_the_region_most_of_its_latents_are_of() -> None:
    cells = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [2, 2, 0, 0], [2, 2, 1, 1]])
    found = layout(1, (), cells)
    assert found.places(16).tolist() == cells.flatten().tolist()
    assert found.places(4).tolist() == [0, 1, 2, 1]  # of equals the later
    assert found.places(1).tolist() == [1]
    with pytest.raises(ValueError, match="no level"):
        found.places(5)


class Reader(nn.Module):
    """A cross-attention layer of doubles, as a UNet has it."""

    def __init__(self) -> None:
        super().__init__()
        reader = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
        self.block = nn.ModuleDict({"attn2": reader.double()})


def naive(
    reader: Any, x: torch.Tensor, e: torch.Tensor, adapters: list[RowAdapter], where: Layout
) -> torch.Tensor:
    """Place by place: W + B A of the place's region, and the softmax of its region's tokens."""
    owners = where.places(x.shape[0])
    said = []
    for place, region in enumerate(owners.tolist()):
        changes = adapters[region].products

        def weight(name: str, layer: Any, changes: Any = changes) -> torch.Tensor:
            one = changes[f"block.attn2.{name}"]
            return layer.weight + 0.7 * one.up @ one.down

        own = e[where.tokens == region]
        q = weight("to_q", reader.to_q) @ x[place]
        k, v = own @ weight("to_k", reader.to_k).T, own @ weight("to_v", reader.to_v).T
        heads = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            scores = torch.softmax(k[:, part] @ q[part] / 2.0, dim=0)  # 2 = sqrt(4)
            heads.append(scores @ v[:, part])
        out: Any = reader.to_out[0]
        said.append(weight("to_out.0", out) @ torch.cat(heads) + out.bias)
    return torch.stack(said)


@pytest.mark.parametrize("rows", [1, 2], ids=["alone", "beside another layout"])
@torch.no_grad()
def test_regional_cross_attention_is_its_formula_place_by_place(rows: int) -> None:
    torch.manual_seed(0)
    model = Reader()
    edits = RowEdits(model)
    layers: Any = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    slots, seen, texts, expected = [], [], [], []
    for row in range(rows):
        adapters = [adapter_of(layers, 10 * row + 100 * region) for region in range(3)]
        where = layout(5, (0, 1, 2), CELLS.roll(3 * row, dims=1))
        x, e = torch.randn(64, 8).double(), torch.randn(15, 6).double()
        said: list[Any] = [
            edits.answers(((adapter, 0.7),), e[None, where.tokens == region])
            for region, adapter in enumerate(adapters)
        ]
        answers = {name: torch.cat([one[name] for one in said], dim=1) for name in said[0]}
        slots.append(Slot(tuple((adapter, 0.7) for adapter in adapters), 1, answers, where))
        seen.append(x)
        texts.append(e)
        expected.append(naive(model.block["attn2"], x, e, adapters, where))
    edits.put_on(slots)
    said_of_all = model.block["attn2"](torch.stack(seen), encoder_hidden_states=torch.stack(texts))
    torch.testing.assert_close(said_of_all, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "t_lora", "ed_lora", "custom_diffusion", "perfusion"])
def test_nothing_of_a_regions_adapter_reaches_other_places_of_a_cross_attention(
    base: Path, tmp_path: Path, method: str
) -> None:
    """The gradient by its scale is 0 there, to the bit, and not 0 at its own."""
    made, _ = trained(base, method)
    parts = BaseParts(base, CPU)
    edits = RowEdits(parts.unet)
    rows = rows_of(method)
    assert rows is not None
    adapter: Any = rows(parts, made.save(tmp_path, CARD))
    with torch.no_grad():  # what T-LoRA's ranks depend on
        tokens = encode(parts.text_encoders, parts.ids(["a sks dog"]), RESOLUTION).features
        predict(parts.unet, torch.randn(1, 4, SIDE, SIDE), torch.tensor([300]), Text(tokens))
    scale = torch.tensor(0.7, requires_grad=True)
    said = edits.answers(((adapter, scale),), tokens)  # type: ignore[arg-type]
    nothing = {name: torch.zeros_like(one) for name, one in said.items()}
    answers = {
        name: torch.cat([nothing[name], one, nothing[name]], 1) for name, one in said.items()
    }
    where = layout(tokens.shape[1], (1,))
    edits.put_on([Slot(((adapter, scale),), 1, answers, where)])  # type: ignore[arg-type]
    places = SIDE * SIDE // 4
    reader = cross_attention(parts.unet)[0]
    x = torch.randn(1, places, reader.to_q.in_features)
    text = torch.cat([tokens, tokens, tokens], dim=1)
    heard = reader(x, encoder_hidden_states=text)[0].square().sum(-1)
    own = where.places(places) == 1
    (inside,) = torch.autograd.grad(heard[own].sum(), scale, retain_graph=True)
    assert inside != 0
    (outside,) = torch.autograd.grad(heard[~own].sum(), scale)
    assert outside == 0


@torch.no_grad()
def test_every_product_of_a_unet_acts_on_its_own_places_alone(base: Path) -> None:
    """Of convolutions, self-attention and feed-forward layers too, as each layer is asked."""
    parts = BaseParts(base, CPU)
    edits = RowEdits(parts.unet)
    heard = ("attn2.to_k", "attn2.to_v")  # `answers` is what they say more
    names = {
        name: layer
        for name, layer in parts.unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and "time_emb" not in name
        and not name.endswith(heard)
    }
    where = layout(TOKENS, (1,))
    edits.put_on([Slot(((adapter_of(names, 0), 0.5),), 1, {}, where)])
    changed: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        def hook(layer: Any, inputs: Any, y: torch.Tensor) -> None:
            bare: Any = layer.forward(inputs[0])
            change = (y - bare).abs()
            by_place = change.sum(1).flatten(1) if y.dim() == 4 else change.sum(-1)
            changed[name] = by_place[0]

        return hook

    for name, layer in names.items():
        layer.register_forward_hook(note(name))
    tokens = encode(parts.text_encoders, parts.ids(["a sks dog"]), RESOLUTION).features
    text = Text(torch.cat([tokens, tokens, tokens], dim=1))
    predict(parts.unet, torch.randn(1, 4, SIDE, SIDE), torch.tensor([300]), text)
    assert changed.keys() == names.keys()
    for name, change in changed.items():
        own = where.places(len(change)) == 1
        assert (change[~own] == 0).all(), name
        assert (change[own] > 0).any(), name


@torch.no_grad()
def test_rows_of_other_layouts_in_one_batch_are_as_each_alone(base: Path) -> None:
    parts = BaseParts(base, CPU)
    edits = RowEdits(parts.unet)
    layers = {
        name: layer
        for name, layer in parts.unet.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and name.endswith(("to_q", "to_out.0", "conv1", "ff.net.2", "attn1.to_k"))
    }
    tokens = encode(parts.text_encoders, parts.ids(["a", "b", "c"]), RESOLUTION).features
    text = Text(tokens.flatten(0, 1).unsqueeze(0))
    slots = [
        Slot(
            ((adapter_of(layers, seed), 0.05), (adapter_of(layers, seed + 1), -0.05)),
            rows,
            layout=layout(tokens.shape[1], homes, CELLS.roll(seed, dims=1)),
        )
        for seed, rows, homes in ((1, 1, (1, 2)), (5, 2, (0, 1)))
    ]
    seen, timesteps = torch.randn(3, 4, SIDE, SIDE), torch.tensor([900, 400, 400])
    edits.put_on(slots)
    together = predict(parts.unet, seen, timesteps, text.expand(3)).split([1, 2])
    first = 0
    for slot, mine in zip(slots, together, strict=True):
        rows = slice(first, first := first + slot.rows)
        edits.put_on([slot])
        alone = predict(parts.unet, seen[rows], timesteps[rows], text.expand(slot.rows))
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="rows with regions"):
        edits.put_on([slots[0], Slot((), 1)])


def test_changes_of_layers_without_places_are_refused_by_name(base: Path) -> None:
    parts = BaseParts(base, CPU)
    layers = dict(parts.unet.named_modules())
    named = {name: layers[name] for name in ("time_embedding.linear_1", "conv_in")}
    with pytest.raises(InvalidRequest, match="latents") as refusal:
        check_placed(adapter_of(named, 0))
    assert [problem.path for problem in refusal.value.fields] == ["time_embedding.linear_1"]
