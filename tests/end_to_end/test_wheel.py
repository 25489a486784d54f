"""What somebody gets who installs the wheel instead of working in the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.processes


def test_a_wheel_has_all_that_is_not_code(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        base = "lookalike_platform/base_models/pocket-64"
        for part in ("unet", "vae"):
            assert f"{base}/{part}/diffusion_pytorch_model.safetensors" in names
        weights = archive.read(f"{base}/text_encoder/model.safetensors")
        assert len(weights) > 2**20
    assert f"{base}/tokenizer/tokenizer.json" in names
    assert "lookalike_api/demo/bibo/bibo-1.png" in names
    assert any(name.startswith("lookalike_platform/db/migrations/versions/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    packages = {name.partition("/")[0] for name in names if "dist-info" not in name}
    assert packages == {
        "lookalike_api",
        "lookalike_trainers",
        "lookalike_registry",
        "lookalike_datasets",
        "lookalike_platform",
    }
