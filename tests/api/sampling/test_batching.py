"""Many orders in one engine: each picture is as if its order had been alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import StableDiffusionPipeline

from lookalike_api.sampling.loading import method_of
from lookalike_api.sampling.messages import AdapterFile
from lookalike_api.sampling.painting import Batch
from lookalike_platform.conditioning import encode
from lookalike_platform.diffusion import denoise, noise
from lookalike_platform.files import sha256_file
from lookalike_platform.samplers import make_sampler
from lookalike_registry.formats.export import export
from lookalike_trainers.base_parts import BaseParts, spell
from lookalike_trainers.catalog import METHODS
from lookalike_trainers.methods.find import wear_of
from support_methods import CARD, CPU, SIDE, trained
from support_models import RESOLUTION
from support_sampling import LIBRARY_WARNINGS, Orders, engine_of, pixels, save_adapter

pytestmark = LIBRARY_WARNINGS

WORDS = [info.name for info in METHODS if info.rows]
WHOLE = ["dreambooth", "svdiff", "diff_fit"]
UNKNOWN_TO_DIFFUSERS = {"perfusion", "t_lora"}


@pytest.fixture(scope="module")
def trained_files(
    base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, AdapterFile]:
    """One adapter of each method; those that learn words answer to one of their own."""
    made = {}
    for name in [*WORDS, *WHOLE]:
        method, _ = trained(base_folder, name)
        path = method.save(tmp_path_factory.mktemp(name), CARD)
        word = f"adv_{name}" if method.module.text_encoders else ""
        made[name] = AdapterFile(f"{name}@1", sha256_file(path), path, 1.0, word)
    return made


@pytest.fixture(scope="module")
def loras(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterFile]:
    folder = tmp_path_factory.mktemp("loras")
    made = []
    for seed in range(32 - 6 - 3):
        path = folder / f"{seed}.safetensors"
        options: dict[str, Any] = {"rank": 1 + seed % 7, "text_encoder": seed % 3 == 0}
        digest = save_adapter(path, base_folder, seed, **options)
        made.append(AdapterFile(f"lora-{seed}@1", digest, path, 0.2 + 0.05 * seed))
    return made


@pytest.fixture
def engine(base_folder: Path) -> Orders:
    return engine_of(base_folder)


def asked(number: int, adapter: AdapterFile) -> dict[str, Any]:
    """Prompts, seeds, guidance, samplers and steps unlike those of the orders beside it."""
    return {
        "prompt": f"{adapter.word or 'sks'} {'abcdefgh'[number % 8]}",
        "negative_prompt": ("", "blue")[number % 2],
        "adapters": (adapter,),
        "seed": 100 + number,
        "guidance_scale": (1.0, 2.5, 4.0)[number % 3],
        "sampler": ("ddim", "dpmsolver++", "euler", "unipc")[number % 4],
        "steps": 3 + number % 3,
    }


def in_the_plain_loop(base_folder: Path, wanted: dict[str, Any]) -> Any:
    """Pixels in [0, 1]; ED-LoRA's text, of which each layer has its own, fits no pipeline."""
    parts = BaseParts(base_folder, CPU)
    (file,) = wanted["adapters"]
    wear_of(method_of(file.path))(parts, file.path, file.scale, file.word)
    with torch.inference_mode():
        ids = [parts.ids([wanted[name]]) for name in ("prompt", "negative_prompt")]
        text, blank = (encode(parts.text_encoders, one, RESOLUTION) for one in ids)
        drawn, generators = noise([wanted["seed"]], 4, SIDE, SIDE)
        sampler = make_sampler(wanted["sampler"], dict(parts.scheduler.config))
        options = {name: wanted[name] for name in ("steps", "guidance_scale")}
        latents = denoise(parts.unet, sampler, drawn, generators, text, blank, **options)
        return pixels(parts.vae, latents)


def in_diffusers(base_folder: Path, wanted: dict[str, Any], folder: Path) -> Any:
    """Pixels in [0, 1] from diffusers' own pipeline with the adapter loaded its way.

    What it knows no way for, the pipeline's models wear (methods/test_*.py have the formulas).
    """
    (file,) = wanted["adapters"]
    method = method_of(file.path)
    if method == "ed_lora":
        return in_the_plain_loop(base_folder, wanted)
    prompt = wanted["prompt"].replace(file.word, "<sks>") if file.word else wanted["prompt"]
    source = base_folder
    if method in WHOLE:
        source = folder / "model"
        export(file.path, base_folder, "model", "sd1", source)
    pipe = StableDiffusionPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_sampler(wanted["sampler"], dict(pipe.scheduler.config))
    if method == "lora":
        pipe.load_lora_weights(file.path.parent, weight_name=file.path.name)
        pipe.set_adapters(pipe.get_active_adapters(), file.scale)
    elif method in UNKNOWN_TO_DIFFUSERS:
        parts = BaseParts(base_folder, CPU)
        wear_of(method)(parts, file.path, file.scale, file.word)
        pipe.unet, pipe.tokenizer = parts.unet, parts.tokenizers[0]
        pipe.text_encoder = parts.text_encoders[0]
        prompt = spell(wanted["prompt"], parts.learned)
    elif method not in WHOLE:
        folder.mkdir(exist_ok=True)
        *weights, word = export(file.path, base_folder, "diffusers", "sd1", folder).files
        for path in weights:
            pipe.unet.load_attn_procs(folder, weight_name=path.name, _pipeline=pipe)
        pipe.load_textual_inversion(word)
    return pipe(
        prompt,
        negative_prompt=wanted["negative_prompt"],
        height=RESOLUTION,
        width=RESOLUTION,
        num_inference_steps=wanted["steps"],
        guidance_scale=wanted["guidance_scale"],
        generator=torch.Generator().manual_seed(wanted["seed"]),
        output_type="pt",
    ).images.numpy()


def ends(engine: Orders, orders: list[dict[str, Any]]) -> list[Any]:
    """The first pictures of orders sent at once."""
    numbers = [engine.send(**wanted) for wanted in orders]
    told = engine.until(*numbers)
    assert {end["type"] for end in told} == {"done"}, told
    return [end["images"][0] for end in told]


def calls_of(engine: Orders) -> list[int]:
    """How many rows each call of the denoiser had, once it is asked."""
    rows: list[int] = []
    (base,) = engine.engine._bases._bases.values()
    base.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


@pytest.mark.usefixtures("exact")
def test_32_orders_with_32_adapters_are_each_as_made_alone(
    engine: Orders,
    base_folder: Path,
    trained_files: dict[str, AdapterFile],
    loras: list[AdapterFile],
    tmp_path: Path,
) -> None:
    files = [*trained_files.values(), *loras]
    assert len({file.digest for file in files}) == 32
    orders = [asked(number, file) for number, file in enumerate(files)]
    for number, (wanted, picture) in enumerate(zip(orders, ends(engine, orders), strict=True)):
        expected = in_diffusers(base_folder, wanted, tmp_path / str(number))[0]
        assert abs(picture - expected).max() <= 1e-3, wanted
        bare = ends(engine, [{**wanted, "adapters": ()}])[0]
        assert abs(picture - bare).max() > 2e-3, wanted
    assert engine.engine.adapters.host.pinned == []


@pytest.mark.usefixtures("exact")
def test_an_order_alone_in_its_batch_is_the_same_to_the_bit_whatever_goes_on_beside(
    engine: Orders, trained_files: dict[str, AdapterFile], loras: list[AdapterFile]
) -> None:
    files = [*trained_files.values(), *loras[:2]]
    orders = [{**asked(n, file), "alone": True} for n, file in enumerate(files)]
    beside = [{**asked(n, file), "steps": 9} for n, file in enumerate(loras[2:8])]
    one_by_one = [ends(engine, [wanted])[0] for wanted in orders]
    together = ends(engine, [*beside, *orders])[len(beside) :]
    for before, after in zip(one_by_one, together, strict=True):
        numpy.testing.assert_array_equal(before, after)


def test_orders_that_differ_in_all_but_size_share_each_call_of_the_denoiser(
    engine: Orders, trained_files: dict[str, AdapterFile], loras: list[AdapterFile]
) -> None:
    files = [*(trained_files[name] for name in WORDS), *loras[:4]]
    orders = [{**asked(n, file), "steps": 3, "sampler": "ddim"} for n, file in enumerate(files)]
    ends(engine, orders)  # now all adapters are in memory
    rows = calls_of(engine)
    ends(engine, orders)
    unguided = sum(wanted["guidance_scale"] == 1 for wanted in orders)
    assert rows == [2 * len(orders) - unguided] * 3


def test_an_order_joins_between_two_steps_of_others_and_leaves_before_them(
    engine: Orders, loras: list[AdapterFile]
) -> None:
    long = engine.send(**asked(1, loras[0]) | {"steps": 20})
    while not engine.told:
        engine.until()
        engine.engine.turn()
        engine.collect()
    short = engine.send(**asked(2, loras[1]) | {"steps": 2})
    engine.until(short)
    assert not [told for told in engine.told if told["number"] == long and told["type"] == "done"]
    engine.until(long)


@pytest.mark.usefixtures("exact")
def test_a_cancel_leaves_the_pictures_of_the_others_as_they_were(
    engine: Orders, loras: list[AdapterFile]
) -> None:
    orders = [asked(number, file) | {"steps": 8} for number, file in enumerate(loras[:4])]
    whole = ends(engine, orders)
    numbers = [engine.send(**wanted) for wanted in orders]
    engine.told.clear()
    while not any(told["type"] == "progress" for told in engine.told):
        engine.engine.turn()
        engine.collect()
    engine.engine.cancel(numbers[1])
    told = engine.until(*numbers)
    assert told.pop(1)["type"] == "canceled"
    for end, before in zip(told, [whole[0], *whole[2:]], strict=True):
        assert abs(end["images"][0] - before).max() <= 1e-3
    assert engine.engine.adapters.host.pinned == []


def test_what_whole_bases_wear_takes_turns_and_nobody_waits_for_all_of_the_others(
    engine: Orders, trained_files: dict[str, AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookalike_api.sampling import engine as module

    monkeypatch.setattr(module, "STRETCH", 3)
    first, second = (trained_files[name] for name in WHOLE[:2])
    long = engine.send(**asked(0, first) | {"steps": 30})
    short = engine.send(**asked(1, second) | {"steps": 2})
    same = engine.send(**asked(2, first) | {"steps": 2})
    engine.until(short, same)
    done = [told["number"] for told in engine.told if told["type"] == "done"]
    assert sorted(done) == [short, same]
    engine.until(long)


def test_what_comes_later_is_not_always_before_a_long_order_of_a_whole_base(
    engine: Orders, trained_files: dict[str, AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lookalike_api.sampling import engine as module

    monkeypatch.setattr(module, "STRETCH", 3)
    first, *others = (trained_files[name] for name in WHOLE)
    long = engine.send(**asked(0, first) | {"steps": 12})
    waiting = [engine.send(**asked(1, others[0]) | {"steps": 2})]
    for number in range(10):  # one of them always waits
        waiting.append(engine.send(**asked(2, others[(number + 1) % 2]) | {"steps": 2}))
        engine.until(waiting.pop(0))
    assert long in [told["number"] for told in engine.told if told["type"] == "done"]


def test_an_order_that_breaks_a_step_ends_alone(
    engine: Orders, loras: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends(engine, [{}])
    (base,) = engine.engine._bases._bases.values()
    put_on = base.edits.put_on

    def fall(slots: list[Any]) -> None:
        if any(scale == poison.scale for slot in slots for _, scale in slot.outfit):
            raise RuntimeError("out of memory")
        put_on(slots)

    poison = replace(loras[0], scale=3.0)
    monkeypatch.setattr(base.edits, "put_on", fall)
    numbers = [
        engine.send(**asked(number, file)) for number, file in enumerate([poison, *loras[1:4]])
    ]
    crash, *others = engine.until(*numbers)
    assert (crash["type"], "out of memory" in crash["detail"]) == ("crash", True)
    assert {end["type"] for end in others} == {"done"}
    assert engine.engine.adapters.host.pinned == []


@pytest.mark.usefixtures("exact")
def test_a_batch_whose_rows_find_no_memory_goes_on_one_by_one_where_it_stood(
    engine: Orders, loras: list[AdapterFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = [asked(number, file) for number, file in enumerate(loras[:4])]
    whole = ends(engine, orders)
    calls = 0

    def short(batch: Batch) -> Any:
        nonlocal calls
        calls += 1
        found = rows_of(batch)
        if calls == 2 * len(orders):  # the last one's second step
            raise RuntimeError("out of memory")
        return found

    rows_of = Batch.asked
    monkeypatch.setattr(Batch, "asked", short)
    for picture, before in zip(ends(engine, orders), whole, strict=True):
        assert abs(picture - before).max() <= 1e-3
    assert calls > 2 * len(orders)
    assert engine.engine.adapters.host.pinned == []


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [truncated, flipped, gone])
def test_a_damaged_file_is_refused_by_name_and_the_others_are_painted(
    engine: Orders,
    base_folder: Path,
    tmp_path: Path,
    loras: list[AdapterFile],
    damage: Callable[[Path], None],
) -> None:
    path = tmp_path / "mine.safetensors"
    digest = save_adapter(path, base_folder, 77)
    damage(path)
    mine = AdapterFile("mine@3", digest, path, 1.0)
    bad, good = engine.until(engine.send(**asked(0, mine)), engine.send(**asked(1, loras[0])))
    assert bad["type"] == "error"
    assert "mine@3" in bad["problem"]["detail"]
    assert good["type"] == "done"
    assert engine.engine.adapters.host.pinned == []


def test_an_order_not_begun_by_its_deadline_is_told_so(engine: Orders) -> None:
    (late,) = engine.until(engine.send(deadline=1.0))
    assert "deadline" in late["problem"]["detail"]
