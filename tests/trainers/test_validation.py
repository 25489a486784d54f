"""Pictures drawn while training goes on are what sampling would draw then."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops

from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.engine import Engine
from lookalike_trainers.method_configs import LoraConfig
from lookalike_trainers.methods.lora import build
from lookalike_trainers.painting import paint
from lookalike_trainers.prepare import prepare
from lookalike_trainers.validation import Validation
from support_images import encoded, picture
from support_models import RESOLUTION, save_base
from support_ranks import run_request

CPU = torch.device("cpu")
PROMPT, SEED = "a sks dog on a green background", 3


# diffusers: numpy.array(tensor) of its schedulers' sigmas
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("text", [False, True], ids=["frozen text", "text encoders train"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_before_anything_is_learned_the_picture_is_the_bases_own(
    family: str, text: bool, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", family)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/0.png").write_bytes(encoded(picture(0, (96, 64)), "PNG"))
    config = LoraConfig(
        resolution=RESOLUTION,
        train_text_encoder=text,
        validation={"prompt": PROMPT, "every": 1, "seed": SEED},
    )
    parts = BaseParts(base, CPU)
    data, _ = prepare(run_request(tmp_path, config), config, parts, lambda message: None)
    module = build(parts, config).module
    # In place of DeepSpeed's engine, which runs the module and nothing else here.
    engine = Engine(module, None, [], 1.0, rank=0, world=1, zero_stage=0, device=CPU)
    said: list[dict[str, Any]] = []
    Validation(engine, data, parts, config, PROMPT, tmp_path / "drawn", said.append)(1)
    assert module.training
    ((expected,),) = paint(BaseParts(base, CPU), [PROMPT], [SEED], RESOLUTION)
    with Image.open(said[0]["file"]) as found:
        apart = ImageChops.difference(found.convert("RGB"), expected).getextrema()
    assert max(high for _, high in apart) <= 1
