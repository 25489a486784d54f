"""Many adapters in one call of the UNet: each row is as if its own adapters were worn alone."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lookalike_platform.conditioning import Text, encode, predict
from lookalike_registry.adapter_file import LoraShape
from lookalike_registry.products import Product, from_peft
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.methods.find import rows_of, wear_of
from lookalike_trainers.methods.row_adapter import RowAdapter, of_unet
from lookalike_trainers.methods.row_edits import RowEdits, Slot
from support_methods import CARD, CPU, SIDE, trained
from support_models import RESOLUTION, save_base

BY_ROW = [info.name for info in METHODS if info.rows]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"train_text_encoder": True, "targets": ["attention", "convolution", "feed_forward"]}
}
PROMPTS = ["a sks dog", "a red sks"]
SCALE = 0.7


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in BY_ROW:
        method, _ = trained(base, name, **OPTIONS.get(name, {}))
        made[name] = method.save(tmp_path_factory.mktemp(name), CARD)
    return made


def asked(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents, and timesteps unlike each other."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, SIDE, SIDE, generator=g), torch.tensor([910, 480, 30])[:rows]


def encoded(parts: BaseParts, rows: int) -> Text:
    return encode(parts.text_encoders, parts.ids((PROMPTS * 2)[:rows]), RESOLUTION)


@pytest.fixture(scope="module")
def worn(base: Path, files: dict[str, Path]) -> dict[str, Any]:
    """By method, what the UNet says of up to 3 rows with the whole base wearing it."""

    def say(name: str | None, seed: int) -> torch.Tensor:
        parts = BaseParts(base, CPU)
        if name:
            wear_of(name)(parts, files[name], SCALE, "sks")
        latents, timesteps = asked(3, seed)
        with torch.inference_mode():
            return predict(parts.unet, latents, timesteps, encoded(parts, 3))

    return {name or "": say(name, seed) for seed, name in enumerate([None, *BY_ROW])}


def dressed(parts: BaseParts, name: str, file: Path, rows: int) -> tuple[Any, torch.Tensor]:
    """The method's adapter, and the text features it gives rise to."""
    rows_from = rows_of(name)
    assert rows_from is not None
    adapter = rows_from(parts, file)
    assert adapter is not None
    take_off = adapter.wear_text(parts, adapter.text, SCALE, "sks")
    features = encoded(parts, rows).features
    take_off()
    return adapter, features


@pytest.mark.parametrize("counts", [(2, 2, 2, 2, 2, 2, 2), (1, 2, 3, 1, 2, 3, 1)], ids=str)
def test_each_row_of_a_mixed_batch_is_as_with_its_adapter_worn_alone(
    base: Path, files: dict[str, Path], worn: dict[str, Any], counts: Sequence[int]
) -> None:
    parts = BaseParts(base, CPU)
    edits = RowEdits(parts.unet)
    with torch.inference_mode():
        slots, texts, seen = [], [], []
        for seed, (name, rows) in enumerate(zip(["", *BY_ROW], counts, strict=True)):
            outfit: Any = ()
            features = encoded(parts, rows).features
            if name:
                adapter, features = dressed(parts, name, files[name], rows)
                outfit = ((adapter, SCALE),)
            slots.append(Slot(outfit, rows, edits.answers(outfit, features)))
            texts.append(features)
            seen.append([tensor[:rows] for tensor in asked(3, seed)])
        layers = next(text.shape[1] for text in texts if text.dim() == 4)
        wide = [t if t.dim() == 4 else t[:, None].expand(-1, layers, -1, -1) for t in texts]
        edits.put_on(slots)
        latents, timesteps = (torch.cat(tensors) for tensors in zip(*seen, strict=True))
        said = predict(parts.unet, latents, timesteps, Text(torch.cat(wide))).split(list(counts))
        for name, rows, mine in zip(["", *BY_ROW], counts, said, strict=True):
            torch.testing.assert_close(mine, worn[name][:rows], rtol=1e-4, atol=1e-5, msg=name)
            if name:
                assert (mine - worn[""][:rows]).abs().max() > 1e-3
        edits.put_on([])
        latents, timesteps = asked(3, 0)
        plain = predict(parts.unet, latents, timesteps, encoded(parts, 3))
        assert torch.equal(plain, worn[""])


@pytest.mark.parametrize("name", BY_ROW)
def test_a_batch_that_wears_one_thing_is_as_the_base_that_wears_it(
    base: Path, files: dict[str, Path], worn: dict[str, Any], name: str
) -> None:
    parts = BaseParts(base, CPU)
    edits = RowEdits(parts.unet)
    with torch.inference_mode():
        adapter, features = dressed(parts, name, files[name], 3)
        outfit = ((adapter, SCALE),)
        edits.put_on([Slot(outfit, 3, edits.answers(outfit, features))])
        latents, timesteps = asked(3, 1 + BY_ROW.index(name))
        said = predict(parts.unet, latents, timesteps, Text(features))
    torch.testing.assert_close(said, worn[name], rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(8, 8), nn.Linear(6, 8, bias=False)

    def forward(self, x: torch.Tensor, *, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        scores = self.to_q(x) @ self.to_k(encoder_hidden_states).transpose(1, 2)
        return torch.cat([x, scores.mean(-1, keepdim=True)], dim=-1)


class Toy(nn.Module):
    """Every kind of layer that adapters go beside: a strided convolution, linear layers of tokens
    and of vectors, and a reader of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.time = nn.Linear(1, 8)
        self.attn2 = Attention()
        self.out = nn.Linear(9, 5)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        seen = self.conv(x) + self.time(timestep[:, None] / 1000)[..., None, None]
        tokens = seen.flatten(2).transpose(1, 2)
        answer: torch.Tensor = self.out(self.attn2(tokens, encoder_hidden_states=text))
        return answer


LAYERS = ("conv", "time", "attn2.to_q", "attn2.to_k", "out")
loras = st.fixed_dictionaries(
    {
        "layers": st.lists(st.sampled_from(LAYERS), min_size=1, unique=True),
        "rank": st.integers(1, 64),
        "alpha": st.floats(0.1, 64),
        "rslora": st.booleans(),
        "scale": st.sampled_from([-1.5, -0.3, 0.0, 0.4, 1.0, 4.0]),
        "seed": st.integers(0, 99),
    }
)


def injected(toy: Toy, lora: Mapping[str, Any], name: str) -> tuple[LoraShape, dict[str, Any]]:
    """Puts PEFT's layers of random weights into the model; gives shape and state."""
    shape = LoraShape(lora["rank"], lora["alpha"], tuple(lora["layers"]), rslora=lora["rslora"])
    peft.inject_adapter_in_model(peft.LoraConfig(**shape.peft()), toy, name)
    g = torch.Generator().manual_seed(lora["seed"])
    state = {
        key: torch.randn(tensor.shape, generator=g, dtype=torch.float64) / 8
        for key, tensor in peft.get_peft_model_state_dict(toy, adapter_name=name).items()
    }
    peft.set_peft_model_state_dict(toy, state, adapter_name=name)
    return shape, state


def pefts_answer(
    toy: Toy, worn: Sequence[Mapping[str, Any]], rows: Sequence[torch.Tensor]
) -> tuple[Any, torch.Tensor]:
    """The outfit, and what the model says with PEFT's layers of it."""
    toy = deepcopy(toy)
    outfit = []
    for place, lora in enumerate(worn):
        shape, state = injected(toy, lora, f"a{place}")
        products = of_unet(from_peft({"unet": state}, {"unet": shape}))
        adapter = RowAdapter({}, lambda *_: lambda: None, products=products)
        outfit.append((adapter, lora["scale"]))
    for module in toy.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_adapter(list(module.lora_A))
            for place, lora in enumerate(worn):
                module.set_scale(f"a{place}", lora["scale"])
    return tuple(outfit), toy(*rows)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.lists(loras, max_size=3), st.integers(1, 3)), min_size=1, max_size=4))
@torch.no_grad()
def test_any_loras_of_any_rows_add_up_as_in_peft(
    batch: list[tuple[list[dict[str, Any]], int]],
) -> None:
    torch.manual_seed(0)
    toy = Toy().double()  # sums in another order differ by nothing that matters
    edits_on = deepcopy(toy)
    edits = RowEdits(edits_on)
    slots, inputs, expected = [], [], []
    for worn, count in batch:
        shapes = (count, 3, 8, 8), (count,), (count, 7, 6)
        rows = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        outfit, answer = pefts_answer(toy, worn, rows)
        slots.append(Slot(outfit, count, edits.answers(outfit, rows[2])))
        inputs.append(rows)
        expected.append(answer)
    edits.put_on(slots)
    said = edits_on(*(torch.cat(tensors) for tensors in zip(*inputs, strict=True)))
    torch.testing.assert_close(said, torch.cat(expected), rtol=1e-8, atol=1e-8)


def test_slots_already_worn_stay_on_and_others_replace_them() -> None:
    torch.manual_seed(0)
    toy = Toy()
    edits = RowEdits(toy)
    x, t, text = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.randn(2, 7, 6)
    bare = toy(x, t, text)
    product = Product(torch.randn(2, 9), torch.randn(5, 2))
    adapter = RowAdapter({}, lambda *_: lambda: None, products={"out": product})
    slots = [Slot((), 1), Slot(((adapter, 0.5),), 1)]
    edits.put_on(slots)
    worn, hooks = toy(x, t, text), list(toy.out._forward_hooks)
    edits.put_on(list(slots))
    assert list(toy.out._forward_hooks) == hooks
    torch.testing.assert_close(toy(x, t, text), worn, rtol=0, atol=0)
    torch.testing.assert_close(worn[0], bare[0])
    assert not torch.allclose(worn[1], bare[1])
    edits.put_on(slots[::-1])
    swapped = toy(x, t, text)
    torch.testing.assert_close(swapped[1], bare[1])
    assert not torch.allclose(swapped[0], bare[0])
    edits.put_on([])
    torch.testing.assert_close(toy(x, t, text), bare, rtol=0, atol=0)


def test_what_k_and_v_say_of_a_text_is_known_while_it_is_worn_and_goes_with_it(base: Path) -> None:
    parts = BaseParts(base, CPU)
    edits = RowEdits(parts.unet)
    with torch.inference_mode():
        text, other = (parts.encode([prompt] * 2, RESOLUTION) for prompt in ("a dog", "blue"))
        latents, timesteps = asked(2, 0)
        bare, bare_other = (predict(parts.unet, latents, timesteps, one) for one in (text, other))
        assert not torch.allclose(bare, bare_other)
        edits.put_on([Slot((), 2, edits.answers((), text.features))])
        for one in (text, other):  # nobody is asked about the text any more
            torch.testing.assert_close(predict(parts.unet, latents, timesteps, one), bare)
        with pytest.raises(ValueError, match="known"):
            edits.put_on([Slot((), 1, edits.answers((), text.features[:1])), Slot((), 1)])
        edits.put_on([])
        again = predict(parts.unet, latents, timesteps, other)
    torch.testing.assert_close(again, bare_other, rtol=0, atol=0)
