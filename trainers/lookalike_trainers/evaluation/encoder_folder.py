"""Where the encoders that judge lie, and whether they are what they are named as. Torch-free."""

import json
import re
from pathlib import Path

from lookalike_platform.errors import CapabilityMissing, InvalidRequest

CLIP, DINO = {"clip"}, {"vit", "dinov2"}
"""Values of `model_type` in config.json."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_encoders(clip_encoder: str | None, dino_encoder: str | None) -> None:
    """Raises InvalidRequest or CapabilityMissing for an encoder that is named and not here, as
    far as that can be said without loading it."""
    for name, what, kinds in ((clip_encoder, "CLIP", CLIP), (dino_encoder, "DINO", DINO)):
        if name:
            expect(encoder_folder(name), what, kinds)


def encoder_folder(name: str) -> Path:
    """Where an encoder lies: a folder, or a hub id in the hub's local cache; no network.

    Raises InvalidRequest if it is not here; CapabilityMissing for a hub id without huggingface_hub.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _HUB_ID.fullmatch(name):
        raise InvalidRequest(
            f"There is no encoder folder {name}: name a folder in transformers' layout, or a hub "
            "id (organisation/model)."
        )
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError:
        raise CapabilityMissing(
            "hub ids need huggingface_hub: pip install 'lookalike[torch]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except huggingface_hub.errors.LocalEntryNotFoundError:
        raise InvalidRequest(
            f"The encoder {name} is not in the hub's local cache: get it there with "
            f"`hf download {name}`, or name a folder."
        ) from None


def expect(folder: Path, what: str, kinds: set[str]) -> str:
    """The model_type of the folder's config.json, if it is one of `kinds`.

    Raises InvalidRequest if it is not.
    """
    try:
        kind = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidRequest(f"{folder} is no {what}: its config.json: {error}") from error
    if kind not in kinds:
        raise InvalidRequest(
            f"{folder} is no {what}: its config.json says model_type {kind!r}, and we know "
            f"{' and '.join(sorted(kinds))}."
        )
    return str(kind)
