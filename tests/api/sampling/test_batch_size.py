"""How many pictures a sampler makes at once, by its device and by its settings."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lookalike_api.sampling.batch_size import batch_pixels
from lookalike_platform.settings import Settings
from support_sampling import LIBRARY_WARNINGS, engine_of

pytestmark = LIBRARY_WARNINGS

GIB = 2**30


def test_a_cpu_makes_one_picture_of_1024_at_once() -> None:
    assert batch_pixels("cpu") == 1024 * 1024


@pytest.mark.parametrize(("memory", "pictures"), [(4, 1), (8, 1), (24, 3), (80, 10)])
@pytest.mark.parametrize("kept", [0.0, 0.4, 0.9])
def test_a_gpu_makes_one_picture_of_1024_at_once_for_every_8_gib(
    kept: float, memory: int, pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which its driver keeps some."""
    found = SimpleNamespace(total_memory=int((memory - kept) * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert batch_pixels("cuda") == pictures * 1024 * 1024


def test_the_setting_is_read_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings(home=tmp_path).batch_pixels is None
    monkeypatch.setenv("LOOKALIKE_BATCH_PIXELS", "4194304")
    assert Settings(home=tmp_path).batch_pixels == 2**22


@pytest.mark.parametrize(("pictures", "rows"), [(1, [2, 2]), (2, [4])])
def test_orders_share_a_call_of_the_denoiser_as_far_as_their_pixels_fit(
    base_folder: Path, pictures: int, rows: list[int]
) -> None:
    engine = engine_of(base_folder, batch_pixels=pictures * 64 * 64)
    engine.paint()
    (base,) = engine.engine._bases._bases.values()
    called: list[int] = []
    base.unet.register_forward_pre_hook(lambda _, args: called.append(len(args[0])))
    engine.until(*[engine.send(steps=1, seed=seed) for seed in (1, 2)])
    assert called == rows
