"""Custom Diffusion's closed-form merge of several concepts into one set of K/V weights. Torch.

Kumari et al. 2023 (arXiv 2212.04488), section 3.3, per layer and with Delta = W - W0:

    minimise  ||Delta K^T||²   so that   Delta K*^T = V*^T - W0 K*^T

`K` are the text features of captions at large, which should come out as before; `K*` those of the
concepts' own words, which should come out as concept i's tuned weights W_i have them: V*^T = W_i
K*^T. Neither depends on the layer, so all that is costly is done once, in float64, and a layer is
two small products:

    TextStatistics   C = K^T K + ridge = L L^T, by Cholesky
    ConceptWords     the right inverse P of K*^T that is smallest in the metric of C

Words are told apart by rank, not by equality: directions of K* weaker than its rounding noise are
no constraint. Where concepts disagree about one and the same word, its output is their mean (the
least-squares answer); the published code inverts a singular matrix there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-8  # of C's mean diagonal; keeps C invertible with fewer captions than dimensions
NOISE = 1e-5  # of K*'s largest singular value; float32 features of one word agree to about 1e-6


@dataclass(frozen=True)
class TextStatistics:
    """What captions at large look like to a K/V layer; shared by all layers and all merges."""

    factor: Tensor  # [in, in] float64, lower triangular

    @classmethod
    def of(cls, features: Tensor) -> "TextStatistics":
        """From text features [tokens, in] of about 200 captions.

        The caller leaves out each caption's first token (BOS), which is the same for all and would
        outweigh the rest: `encoded[:, 1:].flatten(0, 1)`.
        """
        keys = features.double()
        gram = keys.T @ keys
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        return cls(torch.linalg.cholesky(gram))


@dataclass(frozen=True)
class ConceptWords:
    """The words of all concepts to merge, ready to be bound to their outputs in any layer."""

    features: tuple[Tensor, ...]  # K*: per concept [tokens_i, in] float64
    right_inverse: Tensor  # P [sum of tokens, in] float64: K*^T P projects, Delta = R P

    @classmethod
    def of(cls, statistics: TextStatistics, features: Sequence[Tensor]) -> "ConceptWords":
        """From each concept's text features [tokens_i, in].

        The paper's words are those of "{token} {noun}" and, from the token on, of "photo of a
        {token} {noun}".
        """
        words = tuple(each.double() for each in features)
        left, strength, right = torch.linalg.svd(torch.cat(words), full_matrices=False)
        known = strength > NOISE * strength[0]
        left, strength, right = left[:, known], strength[known], right[known]
        # Delta is to be smallest in the norm of L: there, the smallest right inverse is the pinv.
        whitened = torch.linalg.solve_triangular(statistics.factor, right.T, upper=False)
        smallest = torch.linalg.solve_triangular(
            statistics.factor, torch.linalg.pinv(whitened), upper=False, left=False
        )
        return cls(words, (left / strength) @ smallest)

    def merge_layer(self, base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        """One K or V layer's weights [out, in] that give every concept its own outputs.

        `base` is W0 [out, in]; `tuned` holds W_i [out, in] in the order of the concepts. The
        answer has the dtype of `base`. Raises ValueError where their number is another.
        """
        before = base.double()
        asked = [
            (weight.double() - before) @ words.T
            for weight, words in zip(tuned, self.features, strict=True)
        ]
        return (before + torch.cat(asked, dim=1) @ self.right_inverse).to(base.dtype)
