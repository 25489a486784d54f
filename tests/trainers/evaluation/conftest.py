"""Encoders in transformers' layout, tiny and random, and the bundled base's parts."""

import json
from pathlib import Path

import pytest
import torch

from lookalike_platform import bases
from lookalike_platform.settings import Settings
from lookalike_trainers.base_parts import BaseParts
from support_models import save_base

SIDE = 32
_MEAN, _STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokens = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    tokens += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    widths = {"hidden_size": 16, "intermediate_size": 32}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **layers,
                **widths,
                "vocab_size": len(tokens),
                "max_position_embeddings": 24,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "pad_token_id": 1,
            },
            vision_config={**layers, **widths, "image_size": SIDE, "patch_size": 8},
            projection_dim=12,
        )
    )
    model.save_pretrained(folder)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24).save_pretrained(folder)
    preprocessing = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_center_crop": True,
        "image_mean": _MEAN,
        "image_std": _STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="session", params=["vit", "dinov2"])
def dino_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp(request.param)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = (
        ViTModel(
            ViTConfig(**shape, intermediate_size=32, image_size=SIDE, patch_size=8),
            add_pooling_layer=False,
        )
        if request.param == "vit"
        else Dinov2Model(Dinov2Config(**shape, mlp_ratio=2, image_size=SIDE, patch_size=8))
    )
    model.save_pretrained(folder)
    preprocessing = {"size": SIDE, "resample": 2, "image_mean": _MEAN, "image_std": _STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="session")
def bundled_parts(tmp_path_factory: pytest.TempPathFactory) -> BaseParts:
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    return BaseParts(bases.resolve("pocket-64", settings).folder, torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> BaseParts:
    return BaseParts(save_base(tmp_path_factory.mktemp("base")), torch.device("cpu"))
