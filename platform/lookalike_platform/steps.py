"""Which steps of a generation are made and guided. Torch-free: requests are refused by it, too."""

from collections.abc import Mapping
from typing import Any

_TWICE = (
    "HeunDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
)
_PNDM = "PNDMScheduler"
RUNGE_KUTTA_STEPS = 3
_DISTILLED = ("LCMScheduler", "TCDScheduler")


def steps_made(steps: int, strength: float) -> int:
    """The last ones of the whole way that a picture to start from leaves to make."""
    return int(steps * strength)


def answers_of(scheduler: str, config: Mapping[str, Any], steps: int) -> int:
    """How often a scheduler of this class and configuration asks the denoiser: those of second
    order twice a step but the last, PNDM once more in the first, or four times in each of its
    first three steps (`runge_kutta`)."""
    if scheduler in _TWICE:
        return 2 * steps - 1
    if runge_kutta(scheduler, config):
        return steps + 3 * RUNGE_KUTTA_STEPS
    return steps + (scheduler == _PNDM and steps > 1)


def runge_kutta(scheduler: str, config: Mapping[str, Any]) -> bool:
    """Whether it is PNDM with its Runge-Kutta start (Liu et al. 2022): a way of more steps than
    these, which begins with noise."""
    return scheduler == _PNDM and not config.get("skip_prk_steps", False)


def most_steps(scheduler: str, config: Mapping[str, Any]) -> int:
    """As many as its noise schedule, or that of the model it was distilled from, has."""
    trained = int(config.get("num_train_timesteps", 1000))
    if scheduler in _DISTILLED:
        return min(trained, int(config.get("original_inference_steps", 50)))
    return trained


def guided_answers(interval: tuple[float, float], answers: int) -> range:
    """Of the denoiser's answers of the whole way those that an interval of guidance has."""
    begin, end = interval
    return range(int(begin * answers), int(end * answers))
