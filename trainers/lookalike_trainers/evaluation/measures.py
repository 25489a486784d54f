"""The figures an adapter is judged by, on features of pictures. Torch.

Subject fidelity, prompt fidelity, PRES and DIV are those of DreamBooth (Ruiz et al. 2023, section
4.1 and table 3). Each is a mean; the functions give the values it is the mean of, so that a
confidence interval can be drawn from them. Features are [n, width], of any length: a cosine does
not see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lookalike_platform.errors import InvalidRequest


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine similarity [n, m] of each of a [n, width] to each of b [m, width]."""
    return F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).T


def subject_fidelity(generated: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Of each generated picture [n], the mean cosine to the subject's real photos.

    Their mean is the paper's DINO or CLIP-I: "the average pairwise cosine similarity between
    embeddings of generated and real images". Higher is better.
    """
    return cosines(generated, real).mean(1)


def prompt_fidelity(images: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
    """Of each picture [n], the cosine to its own prompt, [n, width] in the pictures' space.

    Their mean is the paper's CLIP-T. Higher is better.
    """
    return F.cosine_similarity(images.double(), prompts.double(), dim=-1)


def prior_drift(of_class: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Of each picture of the class [n], the mean cosine to the subject's real photos.

    The paper's PRES: pictures that the tuned model makes of "a dog" should not look like the one
    dog it was shown. Lower is better.
    """
    return cosines(of_class, real).mean(1)


def diversity(images: torch.Tensor) -> float:
    """1 - mean cosine of the pairs among pictures of one prompt. Higher is more diverse.

    The paper's DIV is the mean LPIPS distance of such pairs, which needs a network of its own; this
    is the same mean with the distance of our encoder, so the numbers are not the paper's.

    Raises InvalidRequest for fewer than two pictures.
    """
    return 1 - float(resemblance(images).mean())


def resemblance(images: torch.Tensor) -> torch.Tensor:
    """Of each picture [n], the mean cosine to the others: for real photos, what subject fidelity
    can be at best (the paper's row "real images").

    Raises InvalidRequest for fewer than two pictures.
    """
    n = len(images)
    if n < 2:
        raise InvalidRequest("Pictures can be compared with each other only if there are two.")
    pairs = cosines(images, images)
    return (pairs.sum(1) - pairs.diagonal()) / (n - 1)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` values and its confidence interval; a single value has none."""

    mean: float
    low: float | None
    high: float | None
    count: int


def bootstrap(
    values: Sequence[float], *, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The mean, with the percentile interval of the bootstrap (Efron & Tibshirani 1993, ch. 13).

    The values must be independent: means of subjects rather than all pictures of all of them.

    Raises InvalidRequest for no values.
    """
    if not values:
        raise InvalidRequest("There is nothing to take the mean of.")
    known = torch.tensor(values, dtype=torch.float64)
    mean, count = float(known.mean()), len(values)
    if count == 1:
        return Estimate(mean, None, None, count)
    luck = torch.Generator().manual_seed(seed)
    means = known[torch.randint(count, (resamples, count), generator=luck)].mean(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(mean, low, high, count)
