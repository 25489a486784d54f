"""Which steps of a generation are made and guided. Torch-free: requests are refused by it, too."""

_TWICE = ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def steps_made(steps: int, strength: float) -> int:
    """The last ones of the whole way that a picture to start from leaves to make."""
    return int(steps * strength)


def answers_of(scheduler: str, steps: int) -> int:
    """How often a scheduler of this class asks the denoiser: Heun's twice a step but the last,
    PNDM once more in the first."""
    if scheduler in _TWICE:
        return 2 * steps - 1
    return steps + (scheduler == "PNDMScheduler" and steps > 1)


def guided_answers(interval: tuple[float, float], answers: int) -> range:
    """Of the denoiser's answers of the whole way those that an interval of guidance has."""
    begin, end = interval
    return range(int(begin * answers), int(end * answers))
