"""What every check of an adapter file against a base ends in. Torch-free."""

from collections.abc import Sequence
from pathlib import Path

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_registry.safetensors_header import Header, Tensor


def refuse_misfits(path: Path, base_folder: Path, problems: Sequence[FieldProblem]) -> None:
    """Raise InvalidRequest if there are tensors that do not fit, one field each."""
    if problems:
        raise InvalidRequest(
            f"{path.name} does not fit the base model in {base_folder.name}: it was trained on"
            " another one.",
            list(problems),
        )


def refuse_what_is_not_finite(path: Path, header: Header) -> None:
    """Raise InvalidRequest if a tensor holds infinities or what is no number, one field each."""
    problems = [
        FieldProblem(key, "holds values that are not finite")
        for key, tensor in header.tensors.items()
        if not _finite(path, tensor)
    ]
    if problems:
        raise InvalidRequest(f"{path.name} is damaged: its training diverged.", problems)


def _finite(path: Path, tensor: Tensor) -> bool:
    """No infinity and no NaN: such values have all exponent bits set."""
    import numpy

    kind, exponent = {
        "F32": ("<u4", 0x7F800000),
        "F16": ("<u2", 0x7C00),
        "BF16": ("<u2", 0x7F80),
    }[tensor.dtype]
    with path.open("rb") as file:
        file.seek(tensor.begin)
        bits = numpy.frombuffer(file.read(tensor.end - tensor.begin), dtype=kind)
    return not bool(((bits & exponent) == exponent).any())
