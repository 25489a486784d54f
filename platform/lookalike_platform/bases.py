"""Base models: a diffusers folder by name, checked and fingerprinted without loading it.

A name is one of the bundled bases (`pocket-64`), a hub id that is in the hub's local cache
(`org/model`), or a folder (absolute, or starting with `.` or `~`).
"""

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lookalike_platform.errors import CapabilityMissing, UnknownBase
from lookalike_platform.families import (
    CLASSES,
    FAMILIES,
    TOKENIZERS,
    Parts,
    SchedulerConfig,
    TextEncoderConfig,
    UNetConfig,
    VaeConfig,
    identify,
    text_encoders,
)
from lookalike_platform.files import atomic_write, canonical_digest, sha256_bytes, sha256_file
from lookalike_platform.settings import Settings

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What the libraries load by default: whole or in shards, and no variant such as `.fp16`.
_WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors")
_HUB_FILES = [
    "model_index.json",
    "scheduler/*.json",
    *(f"{tokenizer}/*" for tokenizer in TOKENIZERS.values()),
    *(f"{part}/config.json" for part in CLASSES),
    *(f"{part}/*.safetensors.index.json" for part in CLASSES),
    *(f"{part}/{stem}.safetensors" for part in CLASSES for stem in ("model", "diffusion_*model")),
    *(f"{part}/*-of-?????.safetensors" for part in CLASSES),
]

_C = TypeVar("_C", bound=BaseModel)


@dataclass(frozen=True)
class Base:
    """A base model that is here and of a family we support.

    name: as asked for
    folder: diffusers layout
    fingerprint: digest of the weight files, whatever the folder is called
    family: sd1 | sd2 | sdxl
    resolution: pixels of a side, as it was trained
    vae_scale: pixels of a side per latent
    latent_channels: channels of a latent
    prediction_type: epsilon | v_prediction | flow_prediction
    text_digest: digest of all that decides text features: text encoder and tokenizer
    max_tokens: length of a tokenized prompt
    """

    name: str
    folder: Path
    fingerprint: str
    family: str
    resolution: int
    vae_scale: int
    latent_channels: int
    prediction_type: str
    text_digest: str
    max_tokens: int


def resolve(name: str, settings: Settings) -> Base:
    """Find, check and fingerprint a base model; no network.

    Raises UnknownBase, with what to do, if it is not here, incomplete, kept as pickles, or of an
    unsupported family; CapabilityMissing for a hub id without huggingface_hub.
    """
    return inspect(name, _locate(name), settings)


def bundled() -> list[str]:
    """Names of the bases that come with this package."""
    return sorted(folder.name for folder in _bundled_folder().iterdir() if folder.is_dir())


def fetch(name: str) -> Path:
    """Download the files of a hub model that we use into the hub's local cache.

    Raises UnknownBase if `name` is no hub id or the hub does not give it out; CapabilityMissing
    without huggingface_hub.
    """
    if not _HUB_ID.fullmatch(name):
        raise UnknownBase(f"{name!r} is not a hub id; write organisation/model")
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, OSError) as error:
        raise UnknownBase(f"the hub did not give out {name!r}: {error}") from error


def inspect(name: str, folder: Path, settings: Settings) -> Base:
    """Check and fingerprint the diffusers folder of the base `name`. Raises UnknownBase."""
    index = _read_json(name, folder / "model_index.json")
    classes = {
        part: entry[1]
        for part, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
    }
    encoders = text_encoders(classes)
    tokenizers = {TOKENIZERS[encoder] for encoder in encoders}
    needed = {"unet", "vae", "text_encoder", "tokenizer", "scheduler", *tokenizers}
    missing = sorted(needed - classes.keys())
    if missing:
        raise _unsupported(name, f"its model_index.json has no {', '.join(missing)}")
    parts = Parts(
        classes=classes,
        unet=_read_config(name, folder / "unet/config.json", UNetConfig),
        vae=_read_config(name, folder / "vae/config.json", VaeConfig),
        text_encoders=tuple(
            _read_config(name, folder / encoder / "config.json", TextEncoderConfig)
            for encoder in encoders
        ),
        scheduler=_read_config(name, folder / "scheduler/scheduler_config.json", SchedulerConfig),
    )
    family = identify(parts)
    if family is None:
        raise _unsupported(name, f"it is a {index.get('_class_name', 'folder of unknown class')}")
    weights = [
        file for part in ("unet", "vae", *encoders) for file in _weight_files(name, folder, part)
    ]
    digests = {str(file.relative_to(folder)): _digest(file, settings) for file in sorted(weights)}
    vae_scale = 2 ** (len(parts.vae.block_out_channels) - 1)
    return Base(
        name=name,
        folder=folder,
        fingerprint=canonical_digest(digests),
        family=family.name,
        resolution=parts.unet.sample_size * vae_scale,
        vae_scale=vae_scale,
        latent_channels=parts.vae.latent_channels,
        prediction_type=parts.scheduler.prediction_type,
        text_digest=_text_digest(name, folder, encoders, digests, settings),
        max_tokens=min(encoder.max_position_embeddings for encoder in parts.text_encoders),
    )


def _locate(name: str) -> Path:
    if name in bundled():
        return _bundled_folder() / name
    if name.startswith((".", "~")) or Path(name).is_absolute():
        folder = Path(name).expanduser().absolute()
        if not folder.is_dir():
            raise UnknownBase(f"{name!r} is not a folder; give one in diffusers layout")
        return folder
    if _HUB_ID.fullmatch(name):
        return _locate_in_hub_cache(name)
    raise UnknownBase(
        f"there is no base model {name!r}; name a bundled one ({', '.join(bundled())}), "
        "a hub id (organisation/model), or a folder by its absolute path"
    )


def _locate_in_hub_cache(name: str) -> Path:
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, local_files_only=True, allow_patterns=_HUB_FILES))
    except (hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError):
        raise UnknownBase(
            f"the base model {name!r} is not in the hub's local cache; "
            f"get it with `lookalike bases fetch {name}`"
        ) from None


def _bundled_folder() -> Path:
    # The package is always installed as files: the trainers read these folders by path.
    return Path(str(files("lookalike_platform") / "base_models"))


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ModuleNotFoundError:
        raise CapabilityMissing(
            "hub ids need huggingface_hub: pip install 'lookalike[torch]'"
        ) from None
    return huggingface_hub


def _unsupported(name: str, reason: str) -> UnknownBase:
    known = "; ".join(f"{family.name} ({family.summary})" for family in FAMILIES)
    return UnknownBase(
        f"the family of the base model {name!r} is not supported: {reason}. Supported are {known}"
    )


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        place = f"{path.parent.name}/{path.name}"
        raise UnknownBase(
            f"the base model {name!r} has no {place}; it must be a whole folder in diffusers layout"
        ) from None
    except ValueError:
        raise UnknownBase(f"{path} of the base model {name!r} is not valid JSON") from None
    if not isinstance(content, dict):
        raise UnknownBase(f"{path} of the base model {name!r} is not a JSON object")
    return content


def _read_config(name: str, path: Path, kind: type[_C]) -> _C:
    content = _read_json(name, path)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        reason = f"{path.parent.name}/{path.name} has unknown values of {wrong}"
        raise _unsupported(name, reason) from None


def _weight_files(name: str, folder: Path, part: str) -> list[Path]:
    found = [file for file in (folder / part).iterdir() if _WEIGHTS.fullmatch(file.name)]
    if found:
        return found
    pickles = sorted((folder / part).glob("*.bin"))
    if pickles:
        raise UnknownBase(
            f"the base model {name!r} keeps {part}/{pickles[0].name} as a pickle, which can run "
            "any code when loaded; save it again with safe_serialization=True"
        )
    raise UnknownBase(
        f"the base model {name!r} has no weights in {part}/ (model.safetensors or "
        "diffusion_pytorch_model.safetensors; variants such as fp16 are not used)"
    )


def _text_digest(
    name: str, folder: Path, encoders: list[str], digests: dict[str, str], settings: Settings
) -> str:
    others = [folder / encoder / "config.json" for encoder in encoders]
    for encoder in encoders:
        tokenizer = TOKENIZERS[encoder]
        files = sorted(file for file in (folder / tokenizer).glob("*") if file.is_file())
        if not files:
            raise UnknownBase(f"the base model {name!r} has no files in {tokenizer}/")
        others += files
    return canonical_digest(
        {path: digest for path, digest in digests.items() if path.startswith("text_encoder")}
        | {str(file.relative_to(folder)): _digest(file, settings) for file in others}
    )


def _digest(file: Path, settings: Settings) -> str:
    """sha256 of a file, remembered under the cache folder by its path, size and time of change."""
    real = file.resolve()
    stat = real.stat()
    key = sha256_bytes(f"{real}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    remembered = settings.cache / "digests" / key
    try:
        return remembered.read_text()
    except FileNotFoundError:
        digest = sha256_file(real)
        atomic_write(remembered, digest)
        return digest
