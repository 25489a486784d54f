"""Finished runs to register: small adapter files and the manifests that go with them."""

from pathlib import Path
from typing import Any

from lookalike_platform.files import sha256_file
from lookalike_registry.adapter_file import WEIGHTS_NAME, LoraCard, LoraShape, save_lora
from lookalike_registry.manifest import (
    BaseRecord,
    Evaluation,
    Identity,
    Lineage,
    Manifest,
    Prompting,
    version_id,
    weights_record,
)
from lookalike_registry.register import GRID_NAME

METRICS = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3} for step in range(1, 4)]


def finished_run(folder: Path, seed: int = 0) -> dict[str, Path]:
    """An adapter of one layer and a picture; other seeds, other bytes."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"{module}.lora_A.weight": torch.randn(2, 8, generator=generator),
        f"{module}.lora_B.weight": torch.randn(8, 2, generator=generator),
    }
    card = LoraCard("teapot", "sd1", 64, "sks", "epsilon", {"unet": LoraShape(2, 4.0, ("to_q",))})
    save_lora(folder / WEIGHTS_NAME, {"unet": state}, card)
    (folder / GRID_NAME).write_bytes(b"a picture %d" % seed)
    return {name: folder / name for name in (WEIGHTS_NAME, GRID_NAME)}


def manifest_of(
    files: dict[str, Path],
    job_id: str,
    *,
    concept: str = "teapot",
    owner: str = "local",
    world_size: int = 1,
) -> Manifest:
    config: dict[str, Any] = {"steps": 3, "prior": None, "targets": ["to_q"]}
    return Manifest(
        identity=Identity(
            id=version_id(job_id), job_id=job_id, owner=owner, concept=concept, method="lora"
        ),
        weights=weights_record(files[WEIGHTS_NAME]),
        base=BaseRecord(
            name="tiny",
            family="sd1",
            fingerprint="f" * 64,
            text_digest="e" * 64,
            resolution=64,
            prediction_type="epsilon",
        ),
        prompting=Prompting(class_noun="teapot", trigger="sks"),
        lineage=Lineage(
            subject_set="set_1",
            subject_set_digest="d" * 64,
            images=["a" * 64, "b" * 64],
            config=config,
            seed=0,
            libraries={"torch": "2"},
            world_size=world_size,
            zero_stage=0,
            attempts=1,
        ),
        evaluation=Evaluation(sample_grid=sha256_file(files[GRID_NAME])),
    )
