"""The README says what is true: its tour runs, and its table names every setting."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lookalike_api.stack import free_port, run_stack
from lookalike_platform.settings import Settings

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
TESTED = re.findall(r"<!-- tested -->\n```(bash|python)\n(.*?)```", README, re.DOTALL)


def test_every_setting_is_in_the_table() -> None:
    told = set(re.findall(r"`LOOKALIKE_([A-Z_]+)`", README))
    assert told - {"URL"} == {name.upper() for name in Settings.model_fields}


def test_every_link_and_picture_is_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


@pytest.mark.processes
@pytest.mark.timeout(900)
def test_the_tour_runs(tmp_path: Path, tiny_base: Path) -> None:
    """On a tiny base, so that training takes seconds; where `pocket-64` is named, on that."""
    settings = Settings(
        home=tmp_path / "home",
        default_base=str(tiny_base),
        api_port=free_port("127.0.0.1"),
        device="cpu",
    )
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "LOOKALIKE_HOME": str(settings.home),
    }
    (tmp_path / "api").symlink_to(REPOSITORY / "api")
    assert [language for language, _ in TESTED] == ["bash", "bash", "python", "python"]
    with run_stack(settings) as stack:
        for language, text in TESTED:
            text = text.replace("http://127.0.0.1:8760", stack.url)
            text = text.replace('resolve("pocket-64"', f'resolve("{tiny_base}"')
            run = ["bash", "-euc"] if language == "bash" else [sys.executable, "-c"]
            ran = subprocess.run(
                [*run, text],
                cwd=tmp_path,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == 0, f"{text}\n{ran.stdout}\n{ran.stderr}"
    for picture in (tmp_path / "bibo.png", *(tmp_path / "pictures").iterdir()):
        with Image.open(picture) as opened:
            assert opened.size == (64, 64)
    assert len(list((tmp_path / "pictures").iterdir())) == 5
    assert {path.name for path in (tmp_path / "bibo-adapter").iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "samples.png",
        "manifest.json",
    }


def test_every_test_the_documents_name_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (REPOSITORY / "docs/methods.md").read_text()))
    written = {
        name
        for file in (REPOSITORY / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    assert named
    assert named <= written
