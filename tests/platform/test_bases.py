import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lookalike_platform import bases
from lookalike_platform.bases import resolve
from lookalike_platform.errors import UnknownBase
from lookalike_platform.settings import Settings
from support_models import TOKENS, save_base

SD1: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    },
    "unet/config.json": {"sample_size": 64, "in_channels": 4, "cross_attention_dim": 768},
    "vae/config.json": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4},
    "text_encoder/config.json": {"hidden_size": 768, "max_position_embeddings": 77},
    "scheduler/scheduler_config.json": {"beta_schedule": "scaled_linear"},
    "tokenizer/vocab.json": {"a": 0},
}
"""The configuration of Stable Diffusion 1.5, as far as we read it."""

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def write_base(folder: Path, **changes: dict[str, Any]) -> Path:
    """A base with a few bytes for weights. `changes`: by first part of a path, keys to change."""
    for path, content in SD1.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content | changes.get(Path(path).parts[0].split(".")[0], {})))
    for part, name in WEIGHTS.items():
        (folder / part / name).write_bytes(f"weights of {part}".encode())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


def test_sdxl_is_known_by_its_two_encoders_and_sizes(tmp_path: Path, settings: Settings) -> None:
    folder = save_base(tmp_path, "sdxl")
    base = resolve(str(folder), settings)
    assert (base.family, base.prediction_type, base.max_tokens) == ("sdxl", "epsilon", TOKENS)
    before = base.text_digest
    (folder / "tokenizer_2" / "added.json").write_text("{}")
    assert resolve(str(folder), settings).text_digest != before
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(UnknownBase, match="no weights in text_encoder_2/"):
        resolve(str(folder), settings)


def test_the_bundled_base_is_here_by_its_name(settings: Settings) -> None:
    base = resolve("pocket-64", settings)
    assert bases.bundled() == ["pocket-64"]
    # CLIP's text encoder, but v-prediction, by which the families are told apart.
    assert (base.family, base.prediction_type) == ("sd2", "v_prediction")
    assert (base.resolution, base.vae_scale, base.latent_channels) == (64, 4, 4)
    assert base.max_tokens == 32
    assert len(base.fingerprint) == len(base.text_digest) == 64


def test_a_folder_is_read_by_its_configuration(folder: Path, settings: Settings) -> None:
    base = resolve(str(folder), settings)
    assert (base.folder, base.family) == (folder, "sd1")
    assert (base.resolution, base.vae_scale, base.max_tokens) == (512, 8, 77)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_encoder": {"hidden_act": "gelu"}},
        {"scheduler": {"prediction_type": "v_prediction"}},
        {"unet": {"cross_attention_dim": 1024}, "text_encoder": {"hidden_size": 1024}},
    ],
)
def test_sd2_is_known_by_its_encoder_width_or_prediction(
    tmp_path: Path, settings: Settings, changes: dict[str, dict[str, Any]]
) -> None:
    assert resolve(str(write_base(tmp_path / "base", **changes)), settings).family == "sd2"


@pytest.mark.parametrize(
    "changes",
    [
        {"model_index": {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}},
        {"model_index": {"unet": ["diffusers", "UNet3DConditionModel"]}},
        {"model_index": {"unet": [None, None], "transformer": ["diffusers", "SD3Transformer"]}},
        {"unet": {"in_channels": 9}},  # inpainting
        {"unet": {"cross_attention_dim": [768, 768]}},
        {"unet": {"cross_attention_dim": 320}},
        {"scheduler": {"prediction_type": "sample"}},
        {"vae": {"block_out_channels": "many"}},
    ],
)
def test_other_families_are_refused_saying_so(
    tmp_path: Path, settings: Settings, changes: dict[str, dict[str, Any]]
) -> None:
    folder = write_base(tmp_path / "base", **changes)
    with pytest.raises(UnknownBase, match=r"not supported.*Supported are sd1"):
        resolve(str(folder), settings)


def test_the_fingerprint_is_that_of_the_weights_wherever_they_are(
    folder: Path, tmp_path: Path, settings: Settings
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("a card")
    (copy / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    assert resolve(str(copy), settings).fingerprint == resolve(str(folder), settings).fingerprint


@pytest.mark.parametrize("part", sorted(WEIGHTS))
def test_the_fingerprint_changes_with_any_byte_of_the_weights(
    folder: Path, settings: Settings, part: str
) -> None:
    before = resolve(str(folder), settings)
    file = folder / part / WEIGHTS[part]
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    after = resolve(str(folder), settings)
    assert after.fingerprint != before.fingerprint
    assert (after.text_digest != before.text_digest) == (part == "text_encoder")


def test_the_digest_of_the_text_side_changes_with_the_tokenizer(
    folder: Path, settings: Settings
) -> None:
    before = resolve(str(folder), settings)
    (folder / "tokenizer/vocab.json").write_text('{"b": 0}')
    after = resolve(str(folder), settings)
    assert after.text_digest != before.text_digest
    assert after.fingerprint == before.fingerprint


def test_weights_are_read_once_for_their_digest(
    folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(str(folder), settings)

    def read_again(path: Path) -> str:
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(bases, "sha256_file", read_again)
    assert resolve(str(folder), settings) == first


def test_shards_are_weights_too(folder: Path, settings: Settings) -> None:
    whole = folder / "unet/diffusion_pytorch_model.safetensors"
    whole.rename(folder / "unet/diffusion_pytorch_model-00001-of-00002.safetensors")
    first_only = resolve(str(folder), settings).fingerprint
    (folder / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").write_bytes(b"more")
    assert resolve(str(folder), settings).fingerprint != first_only


def test_pickled_weights_are_refused_by_name(folder: Path, settings: Settings) -> None:
    (folder / "unet" / WEIGHTS["unet"]).rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(UnknownBase, match=r"unet/diffusion_pytorch_model\.bin as a pickle"):
        resolve(str(folder), settings)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model_index.json", "no base/model_index.json"),
        ("unet/config.json", "no unet/config.json"),
        ("vae/diffusion_pytorch_model.safetensors", "no weights in vae/"),
        ("tokenizer/vocab.json", "no files in tokenizer/"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_naming_it(
    folder: Path, settings: Settings, path: str, message: str
) -> None:
    (folder / path).unlink()
    with pytest.raises(UnknownBase, match=message):
        resolve(str(folder), settings)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_index_is_refused(folder: Path, settings: Settings, content: str) -> None:
    (folder / "model_index.json").write_text(content)
    with pytest.raises(UnknownBase, match="JSON"):
        resolve(str(folder), settings)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("pocket-65", "pocket-64"),
        ("", "pocket-64"),
        ("/no/such/folder", "is not a folder"),
        ("../no/such/folder", "is not a folder"),
        ("nobody/nothing", "lookalike bases fetch nobody/nothing"),
    ],
)
def test_an_unknown_name_is_refused_with_what_to_do(
    settings: Settings, name: str, remedy: str
) -> None:
    with pytest.raises(UnknownBase, match=remedy):
        resolve(name, settings)


def test_a_hub_id_is_found_in_the_local_hub_cache(
    folder: Path, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, commit = tmp_path / "hub/models--org--model", "c" * 40
    shutil.copytree(folder, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(commit)
    base = resolve("org/model", settings)
    assert base.folder == model / "snapshots" / commit
    assert base.fingerprint == resolve(str(folder), settings).fingerprint


def test_only_hub_ids_can_be_fetched() -> None:
    with pytest.raises(UnknownBase, match="not a hub id"):
        bases.fetch("/some/folder")


def test_nothing_of_the_platform_imports_torch_but_what_samples_and_names_devices() -> None:
    program = (
        "import pkgutil, sys, importlib, lookalike_platform as p\n"
        "skip = tuple('lookalike_platform.' + m for m in ('db.migrations', 'diffusion',\n"
        "    'conditioning', 'device', 'guidance', 'probability_flow', 'walk'))\n"
        "for module in pkgutil.walk_packages(p.__path__, 'lookalike_platform.'):\n"
        "    if not module.name.startswith(skip): importlib.import_module(module.name)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'boto3', 'huggingface_hub'}\n"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
