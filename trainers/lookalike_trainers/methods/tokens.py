"""Learned words: rows of their own after the frozen table of a text encoder. Torch.

Textual Inversion (Gal et al. 2023), and whatever else learns a word. The rows are a small Parameter
apart from the table: no optimiser state for 49,000 rows, nothing to put back after each step, and
ZeRO may cut them into shares.

Rows may be held at a norm n, v = n r / |r| with r what trains (Salimans & Kingma 2016, its length
fixed): nothing is to be done between steps, so shares and checkpoints stay exact.
"""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lookalike_platform.errors import InvalidRequest
from lookalike_trainers.base_parts import token_names
from lookalike_trainers.methods.deltas import part_name, parts_of
from lookalike_trainers.methods.method import TakeOff, Wearer

PREFIX = "tokens."


class TokenRows(nn.Module):
    """An embedding table [vocabulary, width] with learned rows [count, width] after it.

    It takes the place of a text encoder's `token_embedding`: the `count` ids from `first` on are
    learned rows. Several may lie one over the other, each with ids of its own.

    Args:
        norm: the length every row is held at; None: each has its own.
        layers: rows a token has, one for each layer that reads it (ED-LoRA): the rows [count *
            layers, width] are token by token, and the ids each prompt `layers` times in a row.
    """

    def __init__(
        self,
        table: nn.Embedding,
        rows: torch.Tensor,
        first: int,
        norm: float | None = None,
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.table = table
        self.norm = norm
        self.rows = nn.Parameter(self._held(rows.detach().float()).clone())
        self.first, self.count, self.layers = first, len(rows) // layers, layers

    def vectors(self) -> torch.Tensor:
        """The rows as the encoder reads them, [count, width]."""
        return self._held(self.rows)

    def _held(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.norm is None else self.norm * nn.functional.normalize(rows, dim=-1)

    @property
    def weight(self) -> torch.Tensor:
        """The frozen table's; transformers asks it for device and dtype."""
        weight: torch.Tensor = self.table.weight
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        learned = (ids >= self.first) & (ids < self.first + self.count)
        known = self.table(ids.masked_fill(learned, 0))
        token = (ids - self.first).clamp(0, self.count - 1)
        layer = torch.arange(len(ids), device=ids.device).unsqueeze(1) % self.layers
        rows = self.vectors().to(known.dtype)[token * self.layers + layer]
        return torch.where(learned.unsqueeze(-1), rows, known)


def add_rows(
    encoder: Any, rows: torch.Tensor, first: int, norm: float | None = None, layers: int = 1
) -> TokenRows:
    """Give an encoder learned rows [count * layers, width] for the ids from `first` on."""
    owner = embeddings(encoder)
    owner.token_embedding = TokenRows(owner.token_embedding, rows, first, norm, layers)
    return owner.token_embedding


def embeddings(encoder: Any) -> Any:
    """The module that holds `token_embedding`; transformers 5 dropped one level of the path."""
    return getattr(encoder, "text_model", encoder).embeddings


def word_rows(encoder: Any, tokenizer: Any, word: str, count: int) -> torch.Tensor:
    """[count, width] to start from: the rows of the word's own tokens, in order.

    Each row begins at its share of the tokens, one of `count` equal ones; where the tokens are
    fewer, neighbours begin alike.

    Raises InvalidRequest for a word that the tokenizer makes no tokens of.
    """
    table = embeddings(encoder).token_embedding.weight
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise InvalidRequest(
            f"The base's tokenizer makes no tokens of {word!r}, which a learned word is to start "
            "from: name another word as initializer."
        )
    starts = [row * len(ids) // count for row in range(count)]
    ends = [*starts[1:], len(ids)]
    tokens = table[ids].detach()
    return torch.stack(
        [_mean(tokens[a : max(b, a + 1)]) for a, b in zip(starts, ends, strict=True)]
    )


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """Their mean's direction at the mean of their lengths: rows that point apart have a mean that
    is shorter than any word."""
    mean = rows.mean(0)
    return mean if len(rows) == 1 else mean * rows.norm(dim=-1).mean() / mean.norm()


def word_norm(encoder: Any) -> float:
    """How long a row is that was trained: longer than 95% of the vocabulary's.

    Not the median: most rows of a small base's vocabulary are hardly trained, and a third as long
    as its nouns'. Where all are trained, as CLIP's, they differ little.
    """
    table = embeddings(encoder).token_embedding.weight
    return float(table.float().norm(dim=-1).quantile(0.95))


def learn_rows(
    parts: Any, encoders: Sequence[Any], word: str, initializer: str, *, keep_norm: bool = False
) -> list[TokenRows]:
    """Rows for a word that `parts.learn` made tokens of, one `TokenRows` an encoder.

    keep_norm: hold them at the length of the encoder's own words.
    """
    names = parts.learned[word]
    layers = []
    for encoder, tokenizer in zip(encoders, parts.tokenizers, strict=True):
        start = word_rows(encoder, tokenizer, initializer, len(names))
        norm = word_norm(encoder) if keep_norm else None
        first = tokenizer.convert_tokens_to_ids(names[0])
        layers.append(add_rows(encoder, start, first, norm))
    return layers


def saved_rows(layers: Sequence[TokenRows]) -> dict[str, torch.Tensor]:
    """The rows by their keys in adapter files; `layers`: one an encoder, in order, or none."""
    return {
        f"{PREFIX}{part_name(place)}": layer.vectors().detach()
        for place, layer in enumerate(layers)
    }


def learned_rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The learned words' rows among an adapter file's tensors."""
    return {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}


def _free_names(wearer: Wearer, count: int) -> list[str]:
    """Names of `count` tokens side by side that stand for no word now."""
    used = {name for names in wearer.learned.values() for name in names}
    blocks = (token_names(f"worn-{count}-{place}", count) for place in itertools.count())
    return next(names for names in blocks if names[0] not in used)


def wear_only_words(
    wearer: Wearer, text: Mapping[str, torch.Tensor], scale: float, word: str
) -> TakeOff:
    """What an adapter does to the text encoders whose learned words are all it does to them."""
    return wear_words(wearer, text, word)


def wear_words(
    wearer: Wearer, tensors: Mapping[str, torch.Tensor], word: str, layers: int = 1
) -> TakeOff:
    """Let `word` in prompts stand for the rows `tokens.<part>` of an adapter file, if it has any.

    The tokens' names stay known to the tokenizers when the word is taken off, for these cannot
    forget: they are of a pool, no larger than what was worn at once.
    """
    rows = {name: tensors.get(f"{PREFIX}{name}") for name in parts_of(wearer) if name != "unet"}
    if all(one is None for one in rows.values()):
        return lambda: None
    if word in wearer.learned:
        raise InvalidRequest(f"Two adapters answer to {word!r}: let one of them act at a time.")
    if missing := [name for name, own in rows.items() if own is None]:
        raise InvalidRequest(f"The adapter has learned words, but none for {missing[0]}.")
    own = [tensor for tensor in rows.values() if tensor is not None]
    names = _free_names(wearer, len(own[0]) // layers)
    with ExitStack() as undo:
        wearer.learned[word] = names
        undo.callback(wearer.learned.pop, word)
        for tensor, tokenizer, encoder in zip(
            own, wearer.tokenizers, wearer.text_encoders, strict=True
        ):
            tokenizer.add_tokens(names)
            first = tokenizer.convert_tokens_to_ids(names[0])
            layer = add_rows(encoder, tensor.to(encoder.device), first, layers=layers)
            undo.callback(_remove, encoder, layer.requires_grad_(False))
        return undo.pop_all().close


def _remove(encoder: Any, layer: TokenRows) -> None:
    """Take rows away from an encoder, whatever lies over them."""
    owner: Any = embeddings(encoder)
    if owner.token_embedding is layer:
        owner.token_embedding = layer.table
        return
    above = owner.token_embedding
    while above.table is not layer:
        above = above.table
    above.table = layer.table
