"""What is exported paints in plain diffusers what it paints here, and comes back the same."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lookalike_platform.errors import CapabilityMissing, InvalidRequest
from lookalike_registry.adapter_file import LoraCard, check_against_base
from lookalike_registry.formats import process
from lookalike_registry.formats.kohya import spellings, to_kohya
from lookalike_registry.formats.load import load, save
from lookalike_registry.products import Product, read_lora
from lookalike_registry.tensor_file import check_tensors, modelspec, save_tensors
from support_formats import diffusers_paints, exported, pipeline, same, saved, we_paint
from support_models import WIDTH, save_base

PROMPT = "a sks dog"
LORA: dict[str, Any] = {
    "rank": 2,
    "alpha": 3.0,
    "targets": ("attention", "feed_forward", "convolution"),
    "ranks": {"to_k": 4},
    "train_text_encoder": True,
}


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with the one text encoder that single-tensor embeddings are of."""
    return save_base(tmp_path_factory.mktemp("bases") / "sd1", "sd1")


def imported(files: list[Path], base: Path, folder: Path) -> tuple[str, Path]:
    """A foreign adapter as one of our files, checked."""
    folder.mkdir(exist_ok=True)
    loaded = load(files, base)
    path = save(loaded, folder, LoraCard("robot", base.name, 64, "sks", "epsilon", {}), "dog")
    (check_against_base if loaded.products else check_tensors)(path, base)
    return loaded.method, path


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_paints_the_same_there_and_comes_back(base: Path, tmp_path: Path, form: str) -> None:
    file = saved(base, tmp_path / "own", "lora", **LORA)
    (made,) = exported(file, base, form, tmp_path / "out").files
    ours = we_paint(base, PROMPT, "lora", file)
    assert not same(ours, we_paint(base, PROMPT))
    pipe = pipeline(base)
    pipe.load_lora_weights(made.parent, weight_name=made.name)
    assert same(diffusers_paints(pipe, PROMPT), ours)
    assert same(we_paint(base, PROMPT, *imported([made], base, tmp_path / "back")), ours)


def lycoris_dora(base: Path, folder: Path) -> tuple[Path, Path]:
    """A DoRA of ours, and the same as LyCORIS writes it."""
    ours = saved(base, folder / "own", "lora", dora=True, **LORA)
    products = read_lora(ours)
    plain = {name: replace(product, magnitude=None) for name, product in products.items()}
    tensors = to_kohya(plain, base)
    names = {
        name: spelled for spelled, name in spellings(base).items() if f"{spelled}.alpha" in tensors
    }
    for name, product in products.items():
        assert product.magnitude is not None
        rows = (-1, *(1,) * (product.down.dim() - 1))
        tensors[f"{names[name]}.dora_scale"] = product.magnitude.reshape(rows)
    made = folder / "lycoris.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, made)
    return ours, made


def test_a_dora_that_lycoris_wrote_is_what_it_trains(base: Path, tmp_path: Path) -> None:
    ours, made = lycoris_dora(base, tmp_path)
    expected = we_paint(base, PROMPT, "lora", ours)
    assert same(we_paint(base, PROMPT, *imported([made], base, tmp_path / "back")), expected)

    # W' = m (W + (alpha / rank) B A) / ||W + (alpha / rank) B A||, row by row, in plain diffusers.
    tensors, known = load_file(made), spellings(base)
    pipe = pipeline(base)
    for key in [key for key in tensors if key.endswith(".dora_scale")]:
        stem = key.removesuffix(".dora_scale")
        part, _, module = known[stem].partition(".")
        model = getattr(pipe, part)
        if part != "unet" and not hasattr(model, "encoder"):
            model = model.text_model
        layer = model.get_submodule(module)
        up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
        product = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
        whole = layer.weight.data + tensors[f"{stem}.alpha"] / len(down) * product
        lengths = whole.flatten(1).norm(dim=1).reshape(tensors[key].shape)
        layer.weight.data = tensors[key] * whole / lengths
    assert same(diffusers_paints(pipe, PROMPT), expected)


def test_lengths_of_columns_and_of_some_layers_only_are_refused_by_name(
    base: Path, tmp_path: Path
) -> None:
    """The former is LyCORIS without wd_on_out: another DoRA than PEFT's."""
    _, made = lycoris_dora(base, tmp_path)
    tensors = load_file(made)
    key = next(key for key in tensors if key.endswith("to_q.dora_scale"))
    layer = spellings(base)[key.split(".")[0]]
    some = {name: tensor for name, tensor in tensors.items() if name != key}
    columns = some | {key: torch.ones(1, len(tensors[key]))}
    for changed, why in ((columns, "wd_on_out"), (some, "has no dora_scale")):
        save_file(changed, made)
        with pytest.raises(InvalidRequest) as refused:
            load([made], base)
        assert [field.path for field in refused.value.fields] == [layer]
        assert why in refused.value.fields[0].message


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_learned_word_paints_the_same_there_and_comes_back(
    base: Path, tmp_path: Path, form: str
) -> None:
    file = saved(base, tmp_path / "own", "textual_inversion", token_vectors=2)
    (made,) = exported(file, base, form, tmp_path / "out").files
    ours = we_paint(base, PROMPT, "textual_inversion", file)
    assert not same(ours, we_paint(base, PROMPT))
    pipe = pipeline(base)
    if base.name == "sdxl":
        tensors = load_file(made)
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            pipe.load_textual_inversion(
                tensors[key],
                token="<sks>",
                text_encoder=getattr(pipe, f"text_encoder{number}"),
                tokenizer=getattr(pipe, f"tokenizer{number}"),
            )
    else:
        pipe.load_textual_inversion(made, token="<sks>" if form == "kohya" else None)
    assert same(diffusers_paints(pipe, "a <sks> dog"), ours)
    assert same(we_paint(base, PROMPT, *imported([made], base, tmp_path / "back")), ours)


def test_custom_diffusion_paints_the_same_in_diffusers_and_comes_back(
    base: Path, tmp_path: Path
) -> None:
    file = saved(base, tmp_path / "own", "custom_diffusion")
    files = exported(file, base, "diffusers", tmp_path / "out").files
    weights, word = files
    assert word.name == "<sks>.safetensors"
    ours = we_paint(base, PROMPT, "custom_diffusion", file)
    if base.name == "sd1":
        pipe = pipeline(base)
        pipe.unet.load_attn_procs(weights.parent, weight_name=weights.name, _pipeline=pipe)
        pipe.load_textual_inversion(word)
        assert same(diffusers_paints(pipe, "a <sks> dog"), ours)
    assert same(we_paint(base, PROMPT, *imported(files, base, tmp_path / "back")), ours)


def test_custom_diffusion_as_a_lora_keeps_what_its_error_says(base: Path, tmp_path: Path) -> None:
    file = saved(base, tmp_path / "own", "custom_diffusion")
    deltas = {k: t for k, t in load_file(file).items() if k.startswith("delta.")}
    made = exported(file, base, "kohya", tmp_path / "out")
    assert [path.name for path in made.files] == ["robot.safetensors", "sks-word.safetensors"]
    products = load([made.files[0]], base).products
    assert {f"delta.{name}.weight" for name in products} == deltas.keys()
    missed = size = 0.0
    for name, product in products.items():
        delta = deltas[f"delta.{name}.weight"]
        values = torch.linalg.svdvals(delta.double())
        kept = len(product.down)
        assert (
            float(values[:kept].sum())
            >= 0.6 * float(values.sum())
            > float(values[: kept - 1].sum())
        )
        missed += float((delta - product.up @ product.down).square().sum())
        size += float(delta.square().sum())
    assert made.error == pytest.approx((missed / size) ** 0.5, rel=1e-3)
    assert 0 < made.error < 0.8

    lora, words = exported(file, base, "lora", tmp_path / "lora").files
    both = we_paint(base, PROMPT, *imported([lora, words], base, tmp_path / "back"))
    again = we_paint(base, PROMPT, *imported(made.files, base, tmp_path / "again"))
    assert same(both, again)


@pytest.mark.parametrize("method", ["dreambooth", "svdiff", "diff_fit"])
def test_changes_of_whole_weights_as_a_model_paint_the_same_in_plain_diffusers(
    base: Path, tmp_path: Path, method: str
) -> None:
    file = saved(base, tmp_path / "own", method, train_text_encoder=True)
    ours = we_paint(base, PROMPT, method, file)
    assert not same(ours, we_paint(base, PROMPT))
    (tmp_path / "model").mkdir()
    whole = tmp_path / "model" / base.name
    assert exported(file, base, "model", whole).error == 0
    assert same(diffusers_paints(pipeline(whole), PROMPT), ours)
    assert same(we_paint(whole, PROMPT), ours)


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_svdiff_as_a_lora_of_full_rank_paints_the_same_in_plain_diffusers(
    base: Path, tmp_path: Path, form: str
) -> None:
    file = saved(base, tmp_path / "own", "svdiff", train_text_encoder=True)
    ours = we_paint(base, PROMPT, "svdiff", file)
    made = exported(file, base, form, tmp_path / "full", 1024)
    assert made.error < 1e-5
    (lora,) = made.files
    pipe = pipeline(base)
    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    assert same(diffusers_paints(pipe, PROMPT), ours)
    assert same(we_paint(base, PROMPT, *imported([lora], base, tmp_path / "back")), ours)
    assert 0 < exported(file, base, form, tmp_path / "thin", 1).error < 1


@pytest.mark.parametrize("method", ["svdiff", "diff_fit"])
def test_a_word_learned_beside_whole_weights_is_a_file_of_the_model(
    sd1: Path, tmp_path: Path, method: str
) -> None:
    file = saved(sd1, tmp_path / "own", method, token_vectors=2)
    ours = we_paint(sd1, PROMPT, method, file)
    *_, word = exported(file, sd1, "model", tmp_path / "sd1").files
    pipe = pipeline(word.parent)
    pipe.load_textual_inversion(word)
    assert same(diffusers_paints(pipe, "a <sks> dog"), ours)


def test_dreambooth_as_a_lora_of_a_rank_has_the_error_it_says(base: Path, tmp_path: Path) -> None:
    file = saved(base, tmp_path / "own", "dreambooth")
    deltas = {k: t.double() for k, t in load_file(file).items()}
    size = sum(float(delta.square().sum()) for delta in deltas.values())
    errors = []
    for rank in (1, 6):
        made = exported(file, base, "lora", tmp_path / str(rank), rank)
        kept = sum(
            float(torch.linalg.svdvals(delta.flatten(1))[:rank].square().sum())
            for delta in deltas.values()
            if delta.dim() > 1
        )
        assert made.error == pytest.approx((1 - kept / size) ** 0.5, rel=1e-4)
        products = load(made.files, base).products
        assert {len(product.down) for product in products.values()} <= set(range(1, rank + 1))
        errors.append(made.error)
    assert errors[1] < errors[0]


def test_pivotal_tuning_is_a_lora_and_a_word(base: Path, tmp_path: Path) -> None:
    file = saved(base, tmp_path / "own", "lora", rank=2, token_vectors=1)
    ours = we_paint(base, PROMPT, "lora", file)
    for form in ("diffusers", "kohya"):
        files = exported(file, base, form, tmp_path / form).files
        assert len(files) == 2
        back = imported(files, base, tmp_path / f"{form} back")
        assert same(we_paint(base, PROMPT, *back), ours)
        if base.name != "sdxl":  # whose word's two halves are loaded one by one: see above
            lora, word = files
            pipe = pipeline(base)
            pipe.load_lora_weights(lora.parent, weight_name=lora.name)
            pipe.load_textual_inversion(word, token="<sks>" if form == "kohya" else None)
            assert same(diffusers_paints(pipe, "a <sks> dog"), ours)


def test_a_file_of_peft_names_or_without_alpha_is_read(base: Path, tmp_path: Path) -> None:
    file = saved(base, tmp_path / "own", "lora", rank=2)
    tensors = load_file(file)
    expected = load([file], base).products
    bare = tmp_path / "bare.safetensors"
    save_file(tensors, bare)
    peft = tmp_path / "peft.safetensors"
    short = {".lora.down.": ".lora_A.", ".lora.up.": ".lora_B."}
    named = {
        key.replace(theirs, ours): tensor
        for key, tensor in tensors.items()
        for theirs, ours in short.items()
        if theirs in key
    }
    save_file(named, peft)
    for path in (bare, peft):
        found = load([path], base).products
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[n].up, expected[n].up) for n in found)


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_sdxl_under_kohyas_own_names_is_what_diffusers_makes_of_them(
    tmp_path: Path, base: Path
) -> None:
    """kohya trains SDXL's UNet as it was first published: input_blocks, middle_block, …"""
    pipe = pipeline(base)
    published = {
        spelled: name
        for spelled, name in spellings(base).items()
        if any(row in spelled for row in ("input_blocks", "middle_block", "output_blocks"))
        and "attentions" in name
    }
    assert published
    modules = dict(pipe.unet.named_modules())
    tensors = {}
    for spelled, name in published.items():
        weight = modules[name.removeprefix("unet.")].weight
        tensors[f"{spelled}.lora_down.weight"] = 0.1 * torch.randn(2, weight.shape[1])
        tensors[f"{spelled}.lora_up.weight"] = torch.randn(weight.shape[0], 2)
        tensors[f"{spelled}.alpha"] = torch.tensor(1.0)
    file = tmp_path / "kohya.safetensors"
    save_file(tensors, file)
    pipe.load_lora_weights(file)
    back = imported([file], base, tmp_path / "back")
    assert same(we_paint(base, PROMPT, *back), diffusers_paints(pipe, PROMPT))


@pytest.mark.parametrize("shape", [(2, WIDTH), (WIDTH,)])
def test_a_token_whose_name_has_no_brackets_paints_what_it_paints_in_diffusers(
    sd1: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    file = tmp_path / "learned_embeds.safetensors"
    save_file({"zot": torch.randn(shape, generator=torch.Generator().manual_seed(0))}, file)
    pipe = pipeline(sd1)
    pipe.load_textual_inversion(file)
    ours = we_paint(sd1, PROMPT, *imported([file], sd1, tmp_path / "back"))
    assert same(diffusers_paints(pipe, "a zot dog"), ours)
    assert not same(ours, we_paint(sd1, PROMPT))


def test_what_a_format_cannot_hold_is_said(base: Path, tmp_path: Path) -> None:
    dora = saved(base, tmp_path / "dora", "lora", rank=2, dora=True)
    with pytest.raises(CapabilityMissing, match="DoRA"):
        exported(dora, base, "kohya", tmp_path / "out")
    with pytest.raises(CapabilityMissing, match="lora"):
        exported(saved(base, tmp_path / "full", "dreambooth"), base, "diffusers", tmp_path / "out")
    with pytest.raises(CapabilityMissing, match="lora as a whole model"):
        exported(saved(base, tmp_path / "lora", "lora"), base, "model", tmp_path / "out")


@pytest.mark.parametrize("form", ["diffusers", "lora", "kohya"])
def test_what_is_no_change_of_matrices_is_no_lora(sd1: Path, tmp_path: Path, form: str) -> None:
    with pytest.raises(CapabilityMissing, match="no biases, norms or scales: export it as model"):
        exported(saved(sd1, tmp_path / "own", "diff_fit"), sd1, form, tmp_path / "out")


@pytest.mark.parametrize("form", ["diffusers", "lora", "kohya", "model"])
def test_a_method_that_no_other_program_has_says_why_it_stays(
    sd1: Path, tmp_path: Path, form: str
) -> None:
    with pytest.raises(CapabilityMissing, match="depends on the prompt"):
        exported(saved(sd1, tmp_path / "own", "perfusion"), sd1, form, tmp_path / "out")


def test_of_several_words_the_weights_come_in_with_one_each(sd1: Path, tmp_path: Path) -> None:
    file = saved(sd1, tmp_path / "own", "custom_diffusion")
    weights, word = exported(file, sd1, "diffusers", tmp_path / "out").files
    other = tmp_path / "<other>.safetensors"
    save_file({"<other>": next(iter(load_file(word).values()))}, other)
    with pytest.raises(InvalidRequest, match=r"second file of words.*one word each"):
        load([weights, word, other], sd1)
    assert load([weights, other], sd1).method == "custom_diffusion"


def test_alphas_of_each_module_survive(base: Path, tmp_path: Path) -> None:
    product = Product(torch.randn(3, 16), torch.randn(16, 3))
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    file = tmp_path / "kohya.safetensors"
    spelled = f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}"
    tensors = {"lora_down.weight": product.down, "lora_up.weight": product.up}
    tensors["alpha"] = torch.tensor(6.0)
    save_file({f"{spelled}.{key}": tensor for key, tensor in tensors.items()}, file)
    found = load([file], base).products[name]
    torch.testing.assert_close(found.up @ found.down, 2 * product.up @ product.down)


def test_each_word_of_several_subjects_is_a_file_of_its_own(base: Path, tmp_path: Path) -> None:
    file = saved(base, tmp_path / "own", "custom_diffusion", token_vectors=2)
    tensors = load_file(file)
    rows = {key: tensor for key, tensor in tensors.items() if key.startswith("tokens.")}
    more = {key: torch.cat([tensor, 2 * tensor]) for key, tensor in rows.items()}
    spec = modelspec(
        "custom_diffusion",
        title="robot",
        family=base.name,
        resolution=64,
        trigger="sks",
        prediction_type="epsilon",
    )
    save_tensors(file, "custom_diffusion", tensors | more, {"subjects": 2}, spec)
    _, first, second = exported(file, base, "diffusers", tmp_path / "out").files
    assert [first.name, second.name] == ["<sks>.safetensors", "<sks-2>.safetensors"]
    for part, key in (("text_encoder", "clip_l"), ("text_encoder_2", "clip_g")):
        if (own := rows.get(f"tokens.{part}")) is None:
            continue
        for path, expected in ((first, own), (second, 2 * own)):
            (found,) = (t for k, t in load_file(path).items() if k in (key, f"<{path.stem[1:-1]}>"))
            assert torch.equal(found, expected)


@pytest.mark.parametrize("base", ["sdxl"], indirect=True)
def test_the_projection_is_known_by_the_name_that_our_exports_once_gave_it(base: Path) -> None:
    names = ("lora_te2_text_projection", "lora_te2_text_model_text_projection")
    assert {spellings(base)[name] for name in names} == {"text_encoder_2.text_projection"}


def test_an_export_that_takes_too_long_is_told_with_what_to_do(
    sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(sd1, tmp_path / "own", "lora", rank=2)
    monkeypatch.setattr(process, "_SECONDS", 0.01)
    with pytest.raises(CapabilityMissing, match=r"given up.* by SVD"):
        process.export_apart(file, sd1, "lora", "sd1", tmp_path, None, tmp_path / "cache")
