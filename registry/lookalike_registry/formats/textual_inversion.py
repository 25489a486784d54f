"""Learned words as files of their own. Torch.

{"<token>": [n, d]}                    diffusers' learned_embeds.safetensors, SD 1 and 2; the token
                                       may have no brackets
{"emb_params": [n, d]}                 kohya, A1111, ComfyUI; the token is the file's name
{"clip_l": [n, d], "clip_g": [n, d']}  all of them for SDXL's two encoders
"""

from collections.abc import Mapping

import torch

from lookalike_platform.errors import FieldProblem, InvalidRequest

PARAMS = "emb_params"
CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def to_embeddings(rows: Mapping[str, torch.Tensor], token: str | None) -> dict[str, torch.Tensor]:
    """Rows [count, width] by part, as one file; `token`: diffusers' key, None for kohya's."""
    if len(rows) == 2:
        return {CLIP[part]: tensor for part, tensor in rows.items()}
    return {token or PARAMS: rows["text_encoder"]}


def is_embeddings(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the keys alone say so; see `is_token` for those that do not."""
    if tensors.keys() == set(CLIP.values()):
        return True
    return len(tensors) == 1 and all(
        key == PARAMS or (key.startswith("<") and key.endswith(">")) for key in tensors
    )


def is_token(tensors: Mapping[str, torch.Tensor], widths: Mapping[str, int]) -> bool:
    """Whether a file of no other format is diffusers' with a token of any name: {"sks": [n, d]}."""
    width = widths.get("text_encoder")
    return len(tensors) == 1 and all(_are_rows(tensor, width) for tensor in tensors.values())


def from_embeddings(
    tensors: Mapping[str, torch.Tensor], widths: Mapping[str, int], filename: str
) -> dict[str, torch.Tensor]:
    """Rows [count, width] by part.

    Args:
        widths: of each text encoder of the base, by its part.

    Raises InvalidRequest for rows of another width or number of encoders, by their keys.
    """
    parts = {key: part for part, key in CLIP.items()}
    found = {parts.get(key, "text_encoder"): (key, tensor) for key, tensor in tensors.items()}
    problems = [
        FieldProblem(key, f"is {list(tensor.shape)}; this base's rows are {widths.get(part)} wide")
        for part, (key, tensor) in found.items()
        if not _are_rows(tensor, widths.get(part))
    ]
    problems += [
        FieldProblem(CLIP[part], "is missing: this base has two text encoders")
        for part in widths
        if part not in found
    ]
    if problems:
        raise InvalidRequest(f"{filename} does not fit the base model.", problems)
    rows = {part: tensor.reshape(-1, tensor.shape[-1]) for part, (_, tensor) in found.items()}
    if len({len(tensor) for tensor in rows.values()}) > 1:
        problem = FieldProblem("clip_l", "and clip_g have different numbers of rows")
        raise InvalidRequest(f"{filename} does not fit the base model.", [problem])
    return rows


def _are_rows(tensor: torch.Tensor, width: int | None) -> bool:
    """One row [width], or rows [count, width]."""
    return tensor.dim() in (1, 2) and tensor.numel() > 0 and tensor.shape[-1] == width
