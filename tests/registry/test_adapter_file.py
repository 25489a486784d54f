import hashlib
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.adapter_file import (
    WEIGHTS_NAME,
    LoraCard,
    check_against_base,
    module_alpha,
    module_rank,
    module_scale,
    peft_configs,
    save_lora,
)
from lookalike_registry.safetensors_header import read_header
from support_adapters import (
    card,
    random_lora,
    save_tiny_base,
    tiny_text_encoder,
    tiny_unet,
    write_adapter,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"))


def states(made: LoraCard, unet: Any, text_encoder: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of the card's shapes in both models."""
    return {
        "unet": random_lora(unet, made.shapes["unet"], seed=1),
        "text_encoder": random_lora(text_encoder, made.shapes["text_encoder"], seed=2),
    }


def rewritten(adapter: Path, folder: Path, change: object) -> Path:
    """A copy of the adapter whose tensors went through `change`."""
    assert callable(change)
    path = folder / WEIGHTS_NAME
    save_file(change(load_file(adapter)), path, metadata=read_header(adapter).metadata)
    return path


def test_a_saved_adapter_computes_the_same_in_plain_diffusers(tmp_path: Path) -> None:
    made = card(rank=4, alpha=10.0, text_encoder=True)
    unet, text_encoder = tiny_unet(), tiny_text_encoder()
    save_lora(tmp_path / WEIGHTS_NAME, states(made, unet, text_encoder), made)

    pipeline = StableDiffusionPipeline(
        vae=None,
        unet=tiny_unet(),
        text_encoder=tiny_text_encoder(),
        tokenizer=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(tmp_path)

    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected_text = text_encoder(tokens).last_hidden_state
        text = pipeline.text_encoder(tokens).last_hidden_state
        latents = torch.randn(1, 4, 8, 8)
        expected = unet(latents, 10, expected_text).sample
        image = pipeline.unet(latents, 10, text).sample
        plain = tiny_unet()(latents, 10, tiny_text_encoder()(tokens).last_hidden_state).sample
    assert torch.equal(text, expected_text)
    assert torch.equal(image, expected)
    assert not torch.allclose(image, plain, atol=1e-3)
    scaling = {m.scaling["default_0"] for m in pipeline.unet.modules() if hasattr(m, "scaling")}
    assert scaling == {10.0 / 4}


def test_saving_the_same_tensors_twice_gives_the_same_file(tmp_path: Path) -> None:
    made = card()
    state = {"unet": random_lora(tiny_unet(), made.shapes["unet"], seed=3)}
    digests = {save_lora(tmp_path / f"{i}.safetensors", state, made) for i in range(5)}
    assert digests == {hashlib.sha256((tmp_path / "0.safetensors").read_bytes()).hexdigest()}


def test_the_file_says_what_it_is(adapter: Path) -> None:
    metadata = read_header(adapter).metadata
    content = adapter.read_bytes()
    tensors = content[8 + struct.unpack("<Q", content[:8])[0] :]
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
    assert peft_configs(read_header(adapter), "x")["unet"]["lora_alpha"] == 8


def test_an_adapter_of_this_base_passes_the_check(adapter: Path, base: Path) -> None:
    assert len(check_against_base(adapter, base).tensors) == 64  # 4 transformers, 8 layers, 2 sides


def test_an_adapter_with_a_text_encoder_passes_the_check(tmp_path: Path, base: Path) -> None:
    made = card(text_encoder=True)
    save_lora(tmp_path / WEIGHTS_NAME, states(made, tiny_unet(), tiny_text_encoder()), made)
    assert any(
        "text_encoder" in name for name in check_against_base(tmp_path / WEIGHTS_NAME, base).tensors
    )


SHAPES: list[dict[str, Any]] = [
    {"ranks": {"attn2.to_k": 7, "q_proj": 2, "to_out.0": 1}},
    {"rslora": True},
    {"dora": True},
    {"ranks": {"to_q": 3, "q_proj": 3}, "rslora": True, "dora": True},
]


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # of the other part
@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_of_modules_rslora_and_dora_pass_the_check_and_mean_the_same_to_peft(
    tmp_path: Path, base: Path, shape: dict[str, Any]
) -> None:
    made = card(text_encoder=True, **shape)
    unet = tiny_unet()
    save_lora(tmp_path / WEIGHTS_NAME, states(made, unet, tiny_text_encoder()), made)
    header = check_against_base(tmp_path / WEIGHTS_NAME, base)
    config = peft_configs(header, "x")["unet"]
    layers = {n: m for n, m in unet.named_modules() if hasattr(m, "base_layer")}
    for name, layer in layers.items():
        assert module_rank(config, name) == layer.r["default"]
        assert module_alpha(config, name) == layer.lora_alpha["default"]
        assert module_scale(config, name) == pytest.approx(layer.scaling["default"])


def test_doras_magnitudes_must_be_there_and_fit(tmp_path: Path, base: Path) -> None:
    made = card(text_encoder=True, dora=True)
    file = tmp_path / "whole.safetensors"
    save_lora(file, states(made, tiny_unet(), tiny_text_encoder()), made)
    for change, problem in (
        (lambda t: {k: v for k, v in t.items() if "magnitude" not in k}, "magnitude is none"),
        (
            lambda t: {k: v[:5] if "magnitude" in k else v for k, v in t.items()},
            "magnitude is [5], the base needs [",
        ),
    ):
        with pytest.raises(InvalidRequest) as refused:
            check_against_base(rewritten(file, tmp_path, change), base)
        assert problem in refused.value.fields[0].message
    plain = {"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.r": 4, "text_encoder.lora_alpha": 8}
    metadata = {"lora_adapter_metadata": json.dumps(plain)}
    save_file(load_file(file), tmp_path / WEIGHTS_NAME, metadata=metadata)
    with pytest.raises(InvalidRequest) as refused:
        check_against_base(tmp_path / WEIGHTS_NAME, base)
    assert "the base needs none" in refused.value.fields[0].message


def test_the_check_imports_no_torch(adapter: Path, base: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from lookalike_registry.adapter_file import check_against_base\n"
        "check_against_base(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert not {'torch', 'safetensors', 'mlflow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(adapter), str(base)], check=True)


def test_an_adapter_of_another_base_is_refused_with_its_shapes(tmp_path: Path, base: Path) -> None:
    other = write_adapter(tmp_path, width=64)
    with pytest.raises(InvalidRequest, match="trained on another one") as refused:
        check_against_base(other, base)
    assert "the base needs [4, 32]" in refused.value.fields[0].message


def test_a_module_the_base_lacks_is_named(adapter: Path, base: Path, tmp_path: Path) -> None:
    path = rewritten(
        adapter,
        tmp_path,
        lambda tensors: {
            k.replace("down_blocks.0", "down_blocks.7"): v for k, v in tensors.items()
        },
    )
    with pytest.raises(InvalidRequest) as refused:
        check_against_base(path, base)
    assert refused.value.fields[0].path.startswith("unet.down_blocks.7.")
    assert refused.value.fields[0].message == "is no layer of the base model"


def test_unknown_keys_are_named(adapter: Path, base: Path, tmp_path: Path) -> None:
    path = rewritten(adapter, tmp_path, lambda tensors: tensors | {"vae.x": torch.zeros(1)})
    with pytest.raises(InvalidRequest) as refused:
        check_against_base(path, base)
    assert [field.path for field in refused.value.fields] == ["vae.x"]


def test_half_a_pair_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    path = rewritten(adapter, tmp_path, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(InvalidRequest) as refused:
        check_against_base(path, base)
    assert refused.value.fields[0].message == "has only one half of its pair"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite_are_refused(
    adapter: Path, base: Path, tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        next(iter(tensors.values()))[0, 0] = value
        return tensors

    path = rewritten(adapter, tmp_path, spoil)
    with pytest.raises(InvalidRequest, match="diverged") as refused:
        check_against_base(path, base)
    assert len(refused.value.fields) == 1


def test_other_dtypes_are_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    path = rewritten(adapter, tmp_path, lambda t: {k: v.to(torch.float64) for k, v in t.items()})
    with pytest.raises(InvalidRequest) as refused:
        check_against_base(path, base)
    assert refused.value.fields[0].message == "is F64; allowed: F32, F16, BF16"


def test_a_file_that_does_not_say_its_alpha_is_refused(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    save_file(load_file(adapter), tmp_path / WEIGHTS_NAME)
    with pytest.raises(InvalidRequest, match="rank and alpha"):
        check_against_base(tmp_path / WEIGHTS_NAME, base)


@pytest.mark.parametrize(
    "config",
    [
        "not json",
        "[]",
        "{}",
        '{"unet.r": 4}',
        '{"unet.r": 0, "unet.lora_alpha": 4}',
        '{"unet.r": 4, "unet.lora_alpha": NaN}',
        '{"text_encoder.r": 4, "text_encoder.lora_alpha": 4}',
        '{"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"to_q": 0}}',
        '{"unet.r": 4, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": -1}}',
        '{"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {"(a+)+$": 4}}',
    ],
)
def test_metadata_that_does_not_settle_rank_and_alpha_is_refused(
    adapter: Path, base: Path, tmp_path: Path, config: str
) -> None:
    metadata = {"lora_adapter_metadata": config}
    save_file(load_file(adapter), tmp_path / WEIGHTS_NAME, metadata=metadata)
    with pytest.raises(InvalidRequest, match="rank and alpha"):
        check_against_base(tmp_path / WEIGHTS_NAME, base)


@pytest.mark.parametrize("name", ["adapter.pt", "adapter.bin", "adapter.ckpt", WEIGHTS_NAME])
def test_a_pickle_is_refused_by_name_and_by_content(tmp_path: Path, base: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"weights": [1.0]}))
    with pytest.raises(InvalidRequest, match="is a pickle"):
        check_against_base(tmp_path / name, base)


def header_bytes(entries: object, data: bytes = b"") -> bytes:
    raw = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(raw)) + raw + data


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 500) + b"{}",
        header_bytes(b"not json"),
        header_bytes([]),
        header_bytes({"a": 3}),
        header_bytes({"a": TENSOR}),
        header_bytes({"a": TENSOR}, bytes(8)),
        header_bytes({"a": TENSOR | {"data_offsets": [4, 8]}}, bytes(8)),
        header_bytes({"a": TENSOR, "b": TENSOR}, bytes(4)),
        header_bytes({"a": TENSOR | {"shape": [-1, -1]}}, bytes(4)),
        header_bytes({"a": TENSOR | {"shape": [10**9, 10**9]}}, bytes(4)),
        header_bytes({"a": TENSOR | {"dtype": "PY"}}, bytes(4)),
        header_bytes({"__metadata__": {"a": 1}}),
        header_bytes(b'{"a": 1, "a": 2}'),
        header_bytes(b"[" * 100_000),
    ],
)
def test_an_unsound_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(InvalidRequest, match=WEIGHTS_NAME):
        read_header(tmp_path / WEIGHTS_NAME)
