"""Which steps of a generation are made. Torch-free: requests are refused by it, too."""


def steps_made(steps: int, strength: float) -> int:
    """The last ones of the whole way that a picture to start from leaves to make."""
    return int(steps * strength)
