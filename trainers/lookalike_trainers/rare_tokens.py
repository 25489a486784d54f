"""Which word a subject is to answer to: a rare token of the base's own vocabulary. Torch-free.

DreamBooth (Ruiz et al. 2023, 3.2) wants an identifier with a weak prior in text encoder and
denoiser: short, one token, and seldom seen. A letter salad like "xxy5syt00" is none, for the
tokenizer cuts it into letters that it knows well. So the vocabulary is searched:

    one token that is a word of its own, of 2 to 4 consonants (or 1, if there is no other): no
        language has words like that
    among the later half of such tokens: byte-pair merges are learned from frequent to rare
    then the shortest embedding row first: one that training hardly ever moved has stayed small

The same base always gives the same words, in the same order.
"""

import json
import re
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from lookalike_platform.errors import InvalidRequest
from lookalike_registry.safetensors_header import Tensor, read_header

_WORD_END = "</w>"
_CONSONANTS = re.compile(r"[bcdfghjklmnpqrstvwxz]{1,4}")
_TABLE = "embeddings.token_embedding.weight"


@lru_cache(maxsize=8)
def rare_words(base_folder: Path) -> tuple[str, ...]:
    """The base's identifiers, the rarest first.

    Raises InvalidRequest if there is none: a trigger must then be given.
    """
    vocabulary, merges = _tokenizer(base_folder)
    words = {
        token.removesuffix(_WORD_END): number
        for token, number in vocabulary.items()
        if token.endswith(_WORD_END) and _CONSONANTS.fullmatch(token.removesuffix(_WORD_END))
    }
    whole = [word for word in words if len(pieces(word, merges)) == 1]
    whole = [word for word in whole if len(word) > 1] or whole
    late = sorted(whole, key=words.__getitem__)[len(whole) // 2 :]
    if not late:
        raise InvalidRequest(
            f"The vocabulary of {base_folder.name} has no rare word for a subject to answer to: "
            "give a trigger."
        )
    lengths = _row_lengths(base_folder)
    return tuple(sorted(late, key=lambda word: (lengths[words[word]], word)))


def pieces(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """A lower-case word's tokens by byte-pair encoding (Sennrich et al. 2016).

    merges: the rank of each pair, the lowest being merged first.
    """
    parts = [*word[:-1], word[-1] + _WORD_END]
    while len(parts) > 1:
        ranked = [
            (merges.get(pair, len(merges)), place) for place, pair in enumerate(pairwise(parts))
        ]
        rank, place = min(ranked)
        if rank == len(merges):
            break
        parts[place : place + 2] = ["".join(parts[place : place + 2])]
    return parts


def _tokenizer(base_folder: Path) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Vocabulary, and merges with their ranks, of `tokenizer.json` or the pair of older files."""
    folder = base_folder / "tokenizer"
    whole = folder / "tokenizer.json"
    if whole.is_file():
        model = json.loads(whole.read_text(encoding="utf-8"))["model"]
        vocabulary, lines = model["vocab"], model["merges"]
    else:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        text = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        lines = [line for line in text if line and not line.startswith("#version")]
    pairs = [tuple(line.split(" ")) if isinstance(line, str) else tuple(line) for line in lines]
    return vocabulary, {(pair[0], pair[1]): rank for rank, pair in enumerate(pairs)}


def _row_lengths(base_folder: Path) -> Any:
    """[vocabulary], of the first text encoder's embedding rows."""
    import numpy

    for file in sorted((base_folder / "text_encoder").glob("*.safetensors")):
        for key, tensor in read_header(file).tensors.items():
            if key.removeprefix("text_model.") == _TABLE:
                return numpy.linalg.norm(_values(file, tensor), axis=1)
    raise InvalidRequest(f"{base_folder.name} has no text encoder with an embedding table.")


def _values(file: Path, tensor: Tensor) -> Any:
    """In float32; numpy does not know bf16, which is float32's upper half."""
    import numpy

    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype]
    with file.open("rb") as handle:
        handle.seek(tensor.begin)
        raw = numpy.frombuffer(handle.read(tensor.end - tensor.begin), dtype=kind)
    if tensor.dtype == "BF16":
        raw = (raw.astype("<u4") << 16).view("<f4")
    return raw.astype("<f4").reshape(tensor.shape)
