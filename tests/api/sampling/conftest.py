from pathlib import Path

import pytest

from support_models import save_base
from support_sampling import pixels


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random base, made once."""
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures come as pixels in [0, 1] before they are rounded to 8 bits."""
    from lookalike_api.sampling import engine

    monkeypatch.setattr(engine, "decode", lambda vae, latents: list(pixels(vae, latents)))
    monkeypatch.setattr(engine, "save", lambda pictures, order: pictures)
