"""Stopping when there is nothing more to learn: DVAR (Voronov et al. 2023). Torch.

The training loss says little: most of its variance is the luck of noise, timesteps and photos. So
every so often the loss L of the same samples under the same noise is measured, and training stops
when it has levelled off:

    Var(L_(i-w+1), …, L_i) < epsilon Var(L_1, …, L_i)
"""

from collections.abc import Mapping, Sequence
from statistics import pvariance

import torch

from lookalike_trainers.config import EarlyStoppingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.engine import Engine
from lookalike_trainers.objective import weighted_mse

LOSS = "evaluation_loss"
"""Its name in the metrics: they are in every checkpoint, so a resumed run stops where the
uninterrupted one does."""


def evaluation_loss(engine: Engine, batches: Sequence[Batch]) -> float:
    """The loss of the batches were training to end now; the same number in all processes."""
    with engine.as_delivered(), torch.no_grad():
        losses = [
            weighted_mse(batch.answered_by(engine.model), batch.target, batch.weight, batch.mask)
            for batch in batches
        ]
    mine = float(sum(losses))
    # All must decide alike, even where devices round differently.
    return engine.sum([mine if engine.rank == 0 else 0.0])[0]


def settled(metrics: Sequence[Mapping[str, float]], config: EarlyStoppingConfig | None) -> bool:
    """Whether the losses measured so far have levelled off."""
    losses = [point[LOSS] for point in metrics if LOSS in point]
    if config is None or len(losses) <= config.window:
        return False
    return pvariance(losses[-config.window :]) < config.epsilon * pvariance(losses)
