"""What a run that diverges tells its owner to change."""

import pytest

from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.loop import _diverged
from lookalike_trainers.method_configs import LoraConfig, TextualInversionConfig


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (LoraConfig(learning_rate=0.5), "try learning_rate 0.05."),
        (TextualInversionConfig(token_learning_rate=0.5), "try token_learning_rate 0.05."),
    ],
)
def test_the_remedy_names_the_rate_of_what_trains(config: TrainingConfig, remedy: str) -> None:
    assert remedy in str(_diverged("loss", 3, config, 2).detail)
