"""DiffFit's scales of blocks, folded into the weights before them. Torch.

    gamma (W x + b) = (gamma W) x + gamma b        (Xie et al. 2023, section 3.2)

Adapter files hold gamma, `diff_fit.<part>.<module>`, and gamma b among the deltas of biases.
"""

from collections.abc import Iterable, Mapping

import torch

from lookalike_platform.errors import FieldProblem, InvalidRequest

PREFIX = "diff_fit."


def scaled(keys: Iterable[str]) -> set[str]:
    """The weights into which an adapter file's scales are folded."""
    return {f"{key.removeprefix(PREFIX)}.weight" for key in keys if key.startswith(PREFIX)}


def fold(
    tensors: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The gammas among an adapter's tensors as deltas of the weights before them, float32.

    Args:
        weights: the base's own, by `<part>.<parameter>`.
    """
    folded = {}
    for key, gamma in tensors.items():
        if not key.startswith(PREFIX):
            continue
        name = f"{key.removeprefix(PREFIX)}.weight"
        weight = weights.get(name)
        if weight is None or gamma.shape != weight.shape[:1]:
            raise InvalidRequest(
                "The adapter was trained on another base model.",
                [FieldProblem(key, "scales no layer of this base")],
            )
        rows = gamma.to(weight.device).view(-1, *(1,) * (weight.dim() - 1))
        folded[f"delta.{name}"] = (rows.float() - 1) * weight.float()
    return folded
