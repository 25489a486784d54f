"""Learned words: rows of their own after the frozen table of a text encoder. Torch.

Textual Inversion (Gal et al. 2023), and whatever else learns a word. The rows are a small Parameter
apart from the table: no optimiser state for 49,000 rows, nothing to put back after each step, and
ZeRO may cut them into shares.
"""

from typing import Any

import torch
from torch import nn


class TokenRows(nn.Module):
    """An embedding table [vocabulary, width] with learned rows [count, width] after it.

    It takes the place of a text encoder's `token_embedding`: ids from `first` on are learned rows.
    """

    def __init__(self, table: nn.Embedding, rows: torch.Tensor, first: int) -> None:
        super().__init__()
        self.table = table
        self.rows = nn.Parameter(rows.detach().float().clone())
        self.first = first

    @property
    def weight(self) -> torch.Tensor:
        """The frozen table's; transformers asks it for device and dtype."""
        weight: torch.Tensor = self.table.weight
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        learned = ids >= self.first
        known = self.table(ids.masked_fill(learned, 0))
        rows = self.rows.to(known.dtype)[(ids - self.first).clamp(min=0)]
        return torch.where(learned.unsqueeze(-1), rows, known)


def add_rows(encoder: Any, rows: torch.Tensor, first: int) -> TokenRows:
    """Give an encoder learned rows [count, width] for the ids from `first` on."""
    owner = embeddings(encoder)
    owner.token_embedding = TokenRows(owner.token_embedding, rows, first)
    return owner.token_embedding


def embeddings(encoder: Any) -> Any:
    """The module that holds `token_embedding`; transformers 5 dropped one level of the path."""
    return getattr(encoder, "text_model", encoder).embeddings


def word_rows(encoder: Any, tokenizer: Any, word: str, count: int) -> torch.Tensor:
    """[count, width] to start from: the mean of the word's own tokens (Gal et al. 2023, 4)."""
    table = embeddings(encoder).token_embedding.weight
    ids = tokenizer(word, add_special_tokens=False).input_ids
    return table[ids].mean(0, keepdim=True).expand(count, -1).detach().clone()
