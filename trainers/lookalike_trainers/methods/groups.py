"""What trains and how fast, as torch's optimisers take it. Torch."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.methods.tokens import TokenRows


def parameter_groups(
    config: TrainingConfig,
    *,
    unet: Iterable[nn.Parameter] = (),
    text: Iterable[nn.Parameter] = (),
    words: Iterable[TokenRows] = (),
    decay: bool = True,
) -> list[dict[str, Any]]:
    """Each kind at its own learning rate; kinds without parameters are left out.

    Learned words never decay (zero is no word), the others do unless `decay` is off.
    """
    still: dict[str, Any] = {"weight_decay": 0.0}
    kept: dict[str, Any] = {} if decay else still
    groups: list[dict[str, Any]] = [
        {"params": [*unet], "lr": config.learning_rate} | kept,
        {"params": [*text], "lr": config.text_encoder_learning_rate} | kept,
        {"params": [word.rows for word in words], "lr": config.token_learning_rate} | still,
    ]
    return [group for group in groups if group["params"]]
