"""Regions in the engine: against plain requests, and against MultiDiffusion's loop written out."""

import io
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from lookalike_api.sampling.loading import method_of
from lookalike_api.sampling.messages import AdapterFile, Region, SampleOrder
from lookalike_api.sampling.regions import box_cells, mask_cells, numbered
from lookalike_datasets.intake import examine
from lookalike_platform.conditioning import encode, predict
from lookalike_platform.diffusion import decode, generators_of, noise
from lookalike_platform.errors import InvalidRequest
from lookalike_platform.files import sha256_file
from lookalike_platform.samplers import make_sampler
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.methods.find import wear_of
from support_images import picture
from support_merging import asked, saved
from support_methods import CARD, CPU, SIDE, trained
from support_models import RESOLUTION, save_base
from support_pairs import trained_adapter
from support_sampling import LIBRARY_WARNINGS, Orders, engine_of, save_adapter

pytestmark = LIBRARY_WARNINGS

ALL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
BY_ROW = ["t_lora", "ed_lora", "custom_diffusion", "perfusion", "textual_inversion"]
WHOLE = ["dreambooth", "svdiff"]
MERGED = {"words_and_kv": "textual_inversion", "kv_and_all": "dreambooth"}  # and Custom Diffusion
both_ways = pytest.mark.parametrize("compose", ["attention", "latents"])


@pytest.fixture(scope="module")
def engine(base_folder: Path) -> Orders:
    return engine_of(base_folder)


@pytest.fixture(scope="module")
def adapters(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, AdapterFile]:
    """Two LoRAs, and one adapter of each other method."""
    made = {}
    for seed, name in enumerate(("rex", "tom")):
        path = tmp_path_factory.mktemp(name) / "lora.safetensors"
        digest = save_adapter(path, base_folder, seed, text_encoder=name == "tom")
        made[name] = AdapterFile(f"{name}@1", digest, path, 0.7)
    for name in [*BY_ROW, *WHOLE]:
        method, _ = trained(base_folder, name)
        path = method.save(tmp_path_factory.mktemp(name), CARD)
        word = f"adv_{name}" if method.module.text_encoders else ""
        made[name] = AdapterFile(f"{name}@1", sha256_file(path), path, 1.0, word)
    for name, other in MERGED.items():
        folder = tmp_path_factory.mktemp(name)
        parents = [
            trained_adapter(base_folder, folder, kind, number)
            for number, kind in enumerate(("custom_diffusion", other))
        ]
        _, path, _, word = saved(asked(base_folder, "weighted_sum", parents), folder)
        made[name] = AdapterFile(f"{name}@1", sha256_file(path), path, 1.0, word)
    return made


def painted(engine: Orders, **wanted: Any) -> Any:
    return numpy.stack(engine.paint(**wanted)).astype(int)


def apart(one: Any, other: Any) -> int:
    """The largest difference, in 255ths."""
    return int(abs(one - other).max())


@both_ways
@pytest.mark.parametrize("name", ["rex", "tom", *BY_ROW, "words_and_kv"])
@pytest.mark.parametrize("regions", [(ALL,), (LEFT, RIGHT)], ids=["one region", "two halves"])
def test_regions_that_say_the_same_everywhere_are_the_plain_request(
    engine: Orders,
    adapters: dict[str, AdapterFile],
    compose: str,
    name: str,
    regions: tuple[tuple[float, float, float, float], ...],
) -> None:
    """Where two halves share an attention, places of both hear the same."""
    worn, prompt = (adapters[name],), f"{adapters[name].word or 'sks'} a"
    options = {"negative_prompt": "b", "num_images": 2, "sampler": "dpmsolver++"}
    plain = painted(engine, prompt=prompt, adapters=worn, **options)
    same = tuple(Region(prompt, worn, box, negative_prompt="b") for box in regions)
    ours = painted(engine, prompt="zz", regions=same, compose=compose, **options)
    assert apart(ours, plain) <= 1
    assert apart(plain, painted(engine, prompt=prompt, **options)) > 1


@both_ways
def test_a_region_is_driven_away_from_its_own_negative_prompt(
    engine: Orders, adapters: dict[str, AdapterFile], compose: str
) -> None:
    """Which knows learned words of the region's adapters; the order's is of what none covers."""
    textual = adapters["textual_inversion"]
    worn, options = (textual,), {"num_images": 2, "sampler": "dpmsolver++"}
    away = f"{textual.word} b"
    plain = painted(engine, prompt="a", adapters=worn, negative_prompt=away, **options)
    region = Region("a", worn, ALL, negative_prompt=away)
    ours = painted(engine, regions=(region,), compose=compose, negative_prompt="c", **options)
    assert apart(ours, plain) <= 1
    other = painted(engine, prompt="a", adapters=worn, negative_prompt="c", **options)
    assert apart(other, plain) > 1


@both_ways
def test_sdxl_has_regions_too(tmp_path: Path, compose: str) -> None:
    base = save_base(tmp_path, "sdxl")
    digest = save_adapter(tmp_path / "rex.safetensors", base)
    worn = (AdapterFile("rex@1", digest, tmp_path / "rex.safetensors", 0.7),)
    engine = engine_of(base)
    options = {"negative_prompt": "b", "sampler": "ddim"}
    plain = painted(engine, prompt="sks a", adapters=worn, **options)
    halves = tuple(Region("sks a", worn, box, negative_prompt="b") for box in (LEFT, RIGHT))
    same = painted(engine, prompt="sks a", regions=halves, compose=compose, **options)
    assert apart(same, plain) <= 1
    bare = (halves[0], Region("sks a", (), RIGHT, negative_prompt="b"))
    one = painted(engine, prompt="sks a", regions=bare, compose=compose, **options)
    none = painted(engine, prompt="sks a", **options)
    middle = none.shape[2] // 2
    assert apart(one[:, :, :middle], none[:, :, :middle]) > apart(
        one[:, :, middle:], none[:, :, middle:]
    )


@both_ways
def test_a_picture_to_start_from_goes_with_regions(
    engine: Orders, adapters: dict[str, AdapterFile], compose: str, tmp_path: Path
) -> None:
    picture(3, (64, 64)).save(tmp_path / "photo.png")
    options: dict[str, Any] = {"init_image": tmp_path / "photo.png", "strength": 0.6, "steps": 6}
    worn = (adapters["rex"],)
    plain = painted(engine, prompt="a", adapters=worn, **options)
    everywhere = (Region("a", worn, ALL),)
    ours = painted(engine, prompt="zz", regions=everywhere, compose=compose, **options)
    assert apart(ours, plain) <= 1


@both_ways
def test_a_mask_is_a_region_as_a_box_is_and_later_ones_lie_over_earlier_ones(
    engine: Orders, adapters: dict[str, AdapterFile], compose: str, tmp_path: Path
) -> None:
    left, right = Image.new("L", (64, 64)), Image.new("L", (128, 128))
    left.paste(255, (0, 0, 32, 64))
    right.paste(255, (64, 0, 128, 128))
    left.save(tmp_path / "left.png")
    right.save(tmp_path / "right.png")
    rex, tom = (adapters["rex"],), (adapters["tom"],)
    boxes = (Region("a", rex, LEFT), Region("b", tom, RIGHT))
    masks = (
        Region("a", rex, mask_image=tmp_path / "left.png"),
        Region("b", tom, mask_image=tmp_path / "right.png"),
    )
    over = (Region("a", rex, ALL), Region("b", tom, RIGHT))
    first, *others = (
        painted(engine, prompt="c", regions=regions, compose=compose)
        for regions in (boxes, masks, over, (boxes[1], boxes[0]))
    )
    assert [apart(first, other) <= 1 for other in others] == [True] * 3
    changed = painted(
        engine, prompt="c", regions=(Region("d", tom, LEFT), boxes[1]), compose=compose
    )
    assert apart(first, changed) > 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmsolver++", "euler_ancestral", "unipc"])
@pytest.mark.parametrize("pair", [("rex", "tom"), ("dreambooth", "perfusion")], ids="-".join)
def test_latents_are_those_of_multidiffusions_loop(
    engine: Orders,
    base_folder: Path,
    adapters: dict[str, AdapterFile],
    sampler: str,
    pair: tuple[str, str],
) -> None:
    """Whatever the base must wear as a whole: each region has it to itself."""
    first, second = (adapters[name] for name in pair)
    regions = (
        Region(f"{first.word or 'sks'} a", (first,), (0.0, 0.0, 0.6, 0.7)),
        Region(f"{second.word or 'sks'} b", (second,), (0.4, 0.3, 1.0, 1.0)),
    )
    ours = painted(
        engine, prompt="c", regions=regions, compose="latents", sampler=sampler, seed=9, steps=5
    )
    assert apart(ours, naive(base_folder, sampler, regions)) <= 1


def naive(base_folder: Path, sampler: str, regions: tuple[Region, ...]) -> Any:
    """Equation 5 of Bar-Tal et al.: a step of each region's own, of all latents, then their sum."""
    places = [
        torch.tensor([[*row] for row in box_cells(r.box, SIDE, SIDE)]).bool()
        for r in regions
        if r.box
    ]
    places = [~places[0] & ~places[1], places[0] & ~places[1], places[1]]
    start, _ = noise([9], 4, SIDE, SIDE)
    walks = []
    for prompt, worn in [("c", ()), *((region.prompt, region.adapters) for region in regions)]:
        parts = BaseParts(base_folder, CPU)
        for file in worn:
            wear_of(method_of(file.path))(parts, file.path, file.scale, file.word)
        scheduler = make_sampler(sampler, dict(parts.scheduler.config))
        scheduler.set_timesteps(5)
        generator = generators_of([9])[0]
        torch.randn(start.shape, generator=generator)  # the noise it starts from
        with torch.inference_mode():
            told = encode(parts.text_encoders, parts.ids(["", prompt]), RESOLUTION)
        options = {"generator": generator} if sampler in ("ddpm", "euler_ancestral") else {}
        walks.append((parts, scheduler, told, options))
    latents = start * walks[0][1].init_noise_sigma
    with torch.inference_mode():
        for number in range(5):
            total = torch.zeros_like(latents)
            for place, (parts, scheduler, told, options) in zip(places, walks, strict=True):
                t = scheduler.timesteps[number]
                seen = scheduler.scale_model_input(latents, t)
                blank, said = predict(parts.unet, seen.expand(2, -1, -1, -1), t, told).chunk(2)
                guided = blank + 4.0 * (said - blank)
                stepped = scheduler.step(guided, t, latents, return_dict=False, **options)[0]
                total += place * stepped
            latents = total / torch.stack(places).sum(0)
        return numpy.asarray(decode(walks[0][0].vae, latents)[0]).astype(int)[None]


@pytest.mark.usefixtures("exact")
def test_regional_orders_and_others_are_as_each_alone(
    engine: Orders, adapters: dict[str, AdapterFile]
) -> None:
    rex, tom = (adapters["rex"],), (adapters["tom"],)
    regions = (Region("a", rex, LEFT), Region("b", tom, (0.5, 0.5, 1.0, 1.0)))
    orders: list[dict[str, Any]] = [
        {"regions": regions, "compose": "attention"},
        {"regions": regions, "compose": "latents", "steps": 5},
        {"regions": regions[::-1], "compose": "attention", "seed": 8, "guidance_scale": 1.0},
        {"regions": (Region("b", tom, RIGHT),), "adapters": rex},
        {"adapters": rex},
        {"adapters": (adapters["dreambooth"],)},
        {
            "regions": (regions[0], Region("sks", (adapters["svdiff"],), RIGHT)),
            "compose": "latents",
        },
    ]

    def picture(number: int) -> Any:
        """Within [0, 1]."""
        (end,) = engine.until(number)
        return numpy.stack(end["images"])

    alone = [picture(engine.send(**wanted)) for wanted in orders]
    numbers = [engine.send(**wanted) for wanted in orders]
    stopped = engine.send(regions=regions, steps=50)
    engine.engine.turn()
    engine.engine.cancel(stopped)
    for number, expected in zip(numbers, alone, strict=True):
        assert abs(picture(number) - expected).max() < 1e-3
    assert engine.engine.adapters.host.pinned == []
    assert abs(alone[0] - alone[1]).max() > 1e-2  # the two ways are two


def test_what_changes_the_base_as_a_whole_is_refused_in_the_attention_by_name(
    engine: Orders, base_folder: Path, adapters: dict[str, AdapterFile], tmp_path: Path
) -> None:
    """Also where only its file tells."""
    path = tmp_path / "dora.safetensors"
    digest = save_adapter(path, base_folder, dora=True)
    dora = AdapterFile("dora@2", digest, path, 1.0)
    for file in (dora, adapters["dreambooth"], adapters["kv_and_all"]):
        for wanted in (
            {"regions": (Region("a", (file,), LEFT),)},
            {"adapters": (file,), "regions": (Region("a", (), LEFT),)},
        ):
            with pytest.raises(InvalidRequest, match=f"{file.ref} changes the base.*latents"):
                engine.paint(**wanted)
    engine.paint(regions=(Region("a", (dora,), LEFT),), compose="latents")
    assert engine.engine.adapters.host.pinned == []


def test_an_adapter_of_layers_without_places_is_refused_in_the_attention_by_name(
    engine: Orders, base_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "timed.safetensors"
    digest = save_adapter(path, base_folder, targets=("to_v", "time_embedding.linear_1"))
    timed = Region("a", (AdapterFile("timed@1", digest, path, 1.0),), LEFT)
    with pytest.raises(InvalidRequest, match=r"timed@1.*no places"):
        engine.paint(regions=(timed,))
    engine.paint(regions=(timed,), compose="latents")


def test_a_region_without_a_latent_of_its_own_is_refused(engine: Orders, tmp_path: Path) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    nowhere = Region("a", (), mask_image=tmp_path / "black.png")
    with pytest.raises(InvalidRequest, match=r"regions\[1\] is smaller than a latent"):
        engine.paint(regions=(Region("a", (), LEFT), nowhere))
    with pytest.raises(InvalidRequest, match=r"regions\[0\] is covered by later"):
        engine.paint(regions=(Region("a", (), LEFT), Region("b", (), ALL)))


def test_boxes_and_masks_are_brought_to_latents() -> None:
    assert box_cells((0.0, 0.0, 0.5, 1.0), 2, 4) == [bytes([1, 1, 0, 0])] * 2
    assert box_cells((0.0, 0.0, 0.1, 1.0), 2, 4) == [bytes(4)] * 2
    one, other = box_cells(ALL, 2, 2), box_cells(RIGHT, 2, 2)
    assert numbered([one, None, other]) == [bytes([1, 3])] * 2
    assert numbered([None]) == []


def test_what_a_mask_leaves_transparent_is_not_of_the_region(tmp_path: Path) -> None:
    """As programs to paint with save it, and as an upload of it is kept."""
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    sent = io.BytesIO((tmp_path / "mask.png").read_bytes())
    verdict = examine("mask.png", sent, Settings(home=tmp_path))
    (tmp_path / "kept.png").write_bytes(verdict.png)
    for name in ("mask.png", "kept.png"):
        cells = mask_cells(tmp_path / name, (64, 64), 4, 4)
        assert cells == [bytes([1, 1, 0, 0])] * 4


def test_a_mask_of_other_proportions_loses_its_edges(tmp_path: Path) -> None:
    mask = Image.new("L", (80, 64))
    mask.paste(255, (0, 0, 40, 64))
    mask.save(tmp_path / "mask.png")
    cells = mask_cells(tmp_path / "mask.png", (64, 64), 4, 4)
    assert cells == [bytes([1, 1, 0, 0])] * 4


def test_an_order_with_regions_is_the_same_after_its_way_over_the_pipe(
    adapters: dict[str, AdapterFile], tmp_path: Path
) -> None:
    order = SampleOrder(
        base_fingerprint="x", base_folder=tmp_path, device="cpu", adapters=(adapters["rex"],),
        prompt="a", negative_prompt="", guidance_scale=1.0, steps=1, sampler="ddim", seed=1,
        width=64, height=64, num_images=1, folder=tmp_path, parameters=("{}",), compose="latents",
        regions=(
            Region("b", (adapters["tom"], adapters["rex"]), LEFT),
            Region("c", (), mask_image=tmp_path / "mask.png", negative_prompt="d"),
        ),
    )  # fmt: skip
    assert SampleOrder.from_json(order.to_json()) == order
    assert [file.ref for file in order.files] == ["rex@1", "tom@1"]
