"""Perfusion against its formula in float64, inside diffusers' UNet and transformers' encoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel

from lookalike_platform.conditioning import encode, predict
from lookalike_platform.errors import InvalidRequest
from lookalike_registry.safetensors_header import read_header
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.covariance import CAPTIONS, RIDGE, caption_covariance, precision
from lookalike_trainers.methods.perfusion import wear
from support_methods import (
    CARD,
    CPU,
    SIDE,
    batch,
    check_every_declared_parameter_moves_and_no_other,
    check_its_file_is_the_method,
    loss_of,
    made,
    one_row,
    trained,
)
from support_models import RESOLUTION, TOKENS, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "base")


class Edited(nn.Module):
    """h = W e - (s / E) W i + sigmoid((s / E - beta) / tau) o, as the paper has it."""

    def __init__(self, layer: Any, concepts: list[tuple[Any, ...]], beta: float, tau: float):
        super().__init__()
        self.layer, self.concepts, self.beta, self.tau = layer, concepts, beta, tau

    def forward(self, e: torch.Tensor) -> torch.Tensor:
        h = self.layer(e)
        for i, inverse, o in self.concepts:
            energy = torch.einsum("d,de,e->", i, inverse, i)
            s = torch.einsum("ntd,de,e->nt", e, inverse, i)[..., None]
            gate = 1 / (1 + torch.exp(-(s / energy - self.beta) / self.tau))
            h = h - s / energy * (self.layer.weight @ i) + gate * o
        return h


def cross_attentions(unet: Any) -> dict[str, Any]:
    return {name: m for name, m in unet.named_modules() if name.endswith("attn2")}


def naive_encoder(base: Path, row: torch.Tensor) -> CLIPTextModel:
    encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    vocabulary = encoder.get_input_embeddings().num_embeddings
    encoder.resize_token_embeddings(vocabulary + 1, mean_resizing=False)
    encoder.get_input_embeddings().weight.data[vocabulary] = row.detach()
    return encoder.double().requires_grad_(False)


def test_loss_and_gradient_are_the_papers_formulas(base: Path) -> None:
    method, parts = made(base, "perfusion")
    method.module.double()
    answers = {name: layer.answer for name, layer in method.layers.items()}
    for number, answer in enumerate(answers.values()):
        generator = torch.Generator().manual_seed(number)
        answer.data += torch.randn(answer.shape, generator=generator, dtype=torch.float64)
    method.rows[0].rows.data *= 1.1
    one = batch(method, parts, torch.float64)
    loss = loss_of(method, one)
    loss.backward()

    concept = method.module.concept
    i, inverse = concept.encoding.clone(), concept.metric.clone()
    unet = BaseParts(base, CPU).unet.double()
    own = {name: answer.detach().clone() for name, answer in answers.items()}
    for name, attention in cross_attentions(unet).items():
        own[f"{name}.to_v"].requires_grad_(True)
        for side in ("to_k", "to_v"):
            concepts = [(i, inverse, own[f"{name}.{side}"])]
            setattr(attention, side, Edited(getattr(attention, side), concepts, 0.75, 0.1))
    encoder = naive_encoder(base, method.rows[0].rows[0])
    table = encoder.get_input_embeddings().weight.requires_grad_(True)
    assert isinstance(one.text, torch.Tensor)
    predicted = unet(one.noisy, one.timesteps, encoder(one.text[:, 0])[0])[0]
    expected = (one.weight * (predicted - one.target).square().flatten(1).mean(1)).sum()
    expected.backward()

    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    slopes = {name: o.grad for name, o in own.items() if o.requires_grad}
    assert len(slopes) == len(own) / 2 > 0
    for name, slope in slopes.items():
        scale = float(slope.abs().max())
        torch.testing.assert_close(answers[name].grad, slope, rtol=1e-7, atol=1e-7 * scale)
    slope = table.grad[-1]
    assert float(slope.abs().max()) > 0
    found = method.rows[0].rows.grad[0]
    torch.testing.assert_close(found, slope, rtol=1e-7, atol=1e-7 * float(slope.abs().max()))


def test_it_starts_from_the_superclass(base: Path) -> None:
    """i is the class noun's encoding in the word's place, and the answers are W i."""
    torch.manual_seed(0)
    parts = BaseParts(base, CPU)
    letters = parts.tokenizers[0]("dog", add_special_tokens=False).input_ids
    row = one_row(parts.text_encoders[0].get_input_embeddings().weight[letters])
    method, _ = made(base, "perfusion")
    ids = method.module.concept.ids[:, 0]
    with torch.no_grad():
        expected = naive_encoder(base, row)(ids)[0][0, 2].float()  # <start> a <sks>
    encoding = method.module.concept.encoding
    torch.testing.assert_close(encoding, expected, rtol=1e-4, atol=1e-5)
    for layer in method.layers.values():
        torch.testing.assert_close(layer.answer, layer.weight @ encoding)


def test_the_encoding_follows_the_row_once_an_optimiser_step(base: Path) -> None:
    """By i <- .99 i + .01 e(row), however many batches a step has."""
    method, parts = made(base, "perfusion", token_learning_rate=0.1)
    concept = method.module.concept
    optimizer = torch.optim.AdamW(method.parameter_groups())
    one = batch(method, parts)
    expected = concept.encoding.clone()
    for step in range(4):
        for _ in range(2):
            (loss_of(method, one) / 2).backward()
        if step:
            with torch.no_grad():
                features = naive_encoder(base, method.rows[0].rows[0])(concept.ids[:, 0])[0]
            expected = 0.99 * expected + 0.01 * features[0, 2].float()
        torch.testing.assert_close(concept.encoding, expected, rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # early stopping asks so, in training mode
        loss_of(method, one)
    method.module.eval()
    loss_of(method, one)
    torch.testing.assert_close(concept.encoding, expected, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_knows_what_the_encoding_followed_last(base: Path) -> None:
    """Else a resumed run, which sees the row of the checkpoint first, would move once more."""
    method, _ = made(base, "perfusion")
    kept = method.module.state_dict()
    assert torch.equal(kept["concept.seen"], method.module.concept.seen)
    assert torch.equal(kept["concept.encoding"], method.module.concept.encoding)


def test_the_metric_is_the_inverse_of_the_damped_covariance_of_captions(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = BaseParts(base, CPU, tmp_path)
    tokenizer, encoder = parts.tokenizers[0], parts.text_encoders[0]
    spoken = []
    for caption in CAPTIONS[::40]:
        ids = tokenizer(caption, truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
        spoken.append(encoder(ids)[0][0].detach().double())
    e = torch.cat(spoken).numpy()
    monkeypatch.setattr("lookalike_trainers.methods.covariance.CAPTIONS", CAPTIONS[::40])
    covariance = caption_covariance(parts, RESOLUTION)
    expected = torch.from_numpy(e.T @ e / len(e))
    torch.testing.assert_close(covariance, expected, rtol=1e-4, atol=1e-5)
    damped = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    identity = torch.eye(len(covariance), dtype=torch.float64)
    torch.testing.assert_close(precision(parts, RESOLUTION) @ damped, identity)

    monkeypatch.setattr("lookalike_trainers.methods.covariance.encode", None)
    assert torch.equal(caption_covariance(parts, RESOLUTION), covariance)  # from the cache


def test_every_answer_and_the_row_move_and_nothing_else(base: Path) -> None:
    check_every_declared_parameter_moves_and_no_other(base, "perfusion")


def test_its_file_is_the_method_and_comes_off_without_a_trace(base: Path, tmp_path: Path) -> None:
    check_its_file_is_the_method(base, tmp_path, "perfusion")


def test_the_terms_of_several_worn_concepts_add_up_and_come_off_in_any_order(
    base: Path, tmp_path: Path
) -> None:
    files = []
    for number, steps in enumerate((2, 4)):
        (tmp_path / str(number)).mkdir()
        files.append(trained(base, "perfusion", steps)[0].save(tmp_path / str(number), CARD))
    wearer, unet = BaseParts(base, CPU), BaseParts(base, CPU).unet
    offs = [wear(wearer, file, 1.0, word) for file, word in zip(files, ("one", "two"), strict=True)]
    text = encode(wearer.text_encoders, wearer.ids(["one meets two"]), RESOLUTION)
    noisy = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    for name, attention in cross_attentions(unet).items():
        for side in ("to_k", "to_v"):
            concepts = []
            for file in files:
                saved = load_file(file)
                i, u = saved["perfusion.encoding"], saved["perfusion.direction"]
                # Any matrix with M i = u serves as C^-1 here.
                inverse = torch.outer(u, u) / (i @ u)
                concepts.append((i, inverse, saved[f"perfusion.unet.{name}.{side}"]))
            setattr(attention, side, Edited(getattr(attention, side), concepts, 0.7, 0.15))
    with torch.inference_mode():
        together = predict(wearer.unet, noisy, torch.tensor([300]), text)
        expected = unet(noisy, torch.tensor([300]), text.features)[0]
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)
    offs[0]()
    offs[1]()
    assert not any(module._forward_hooks for module in wearer.unet.modules())


def test_a_token_with_nothing_of_the_concept_meets_a_closed_gate(
    base: Path, tmp_path: Path
) -> None:
    file = trained(base, "perfusion")[0].save(tmp_path, CARD)
    saved = load_file(file)
    i, u = saved["perfusion.encoding"], saved["perfusion.direction"]
    free = torch.randn(1, 3, len(i), generator=torch.Generator().manual_seed(0))
    free = free - (free @ u)[..., None] / (i @ u) * i
    wearer = BaseParts(base, CPU)
    layer = next(iter(cross_attentions(wearer.unet).values())).to_v
    before = layer(free)
    wear(wearer, file, 1.0, "sks")
    closed = torch.sigmoid(torch.tensor(-0.70 / 0.15))
    answer = saved[f"perfusion.unet.{next(iter(cross_attentions(wearer.unet)))}.to_v"]
    torch.testing.assert_close(layer(free), before + closed * answer, rtol=1e-4, atol=1e-5)


def test_a_word_the_encoder_never_reads_is_refused(base: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        made(base, "perfusion", prompt="x" * TOKENS + " {trigger}")
    assert [field.path for field in refused.value.fields] == ["config.prompt"]


def test_a_file_of_another_base_is_refused_by_its_tensors(base: Path, tmp_path: Path) -> None:
    file = made(base, "perfusion")[0].save(tmp_path, CARD)
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("to_k"))
    save_file(tensors | {key: torch.ones(3)}, file, read_header(file).metadata)
    with pytest.raises(InvalidRequest) as refused:
        wear(BaseParts(base, CPU), file, 1.0, "sks")
    assert [field.path for field in refused.value.fields] == [key]
