"""One of our adapter files as the files that other programs load. Torch.

    diffusers   what it is, in diffusers' own layout
    lora        a LoRA for diffusers, whatever it is: dense changes by truncated SVD
    kohya       a LoRA, or an embedding, as A1111 and ComfyUI load it
    model       the base with the dense changes in it, a whole diffusers folder

Learned words are a file of their own in all of them. What SVDiff's spectra and DiffFit's scales
make of the base is a dense change too.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lookalike_platform.errors import CapabilityMissing
from lookalike_platform.files import atomic_write
from lookalike_registry import block_scales, spectra
from lookalike_registry.adapter_file import WEIGHTS_NAME, LoraCard
from lookalike_registry.base_weights import stored_weights
from lookalike_registry.compose.low_rank import compress
from lookalike_registry.compose.rules import COMPOSITION
from lookalike_registry.formats import custom_diffusion
from lookalike_registry.formats.diffusers_lora import save_diffusers
from lookalike_registry.formats.kohya import to_kohya
from lookalike_registry.formats.textual_inversion import to_embeddings
from lookalike_registry.formats.whole_model import save_model
from lookalike_registry.products import Product, loaded_products, read_lora
from lookalike_registry.safetensors_header import read_header, with_metadata
from lookalike_registry.tensor_file import METHOD_KEY, adapter_info, nth_word

EMBEDDINGS_NAME = "learned_embeds.safetensors"
SHARE = 0.6
"""Of the sum of a change's singular values, what a LoRA made of it keeps (Kumari et al. 2023)."""


@dataclass(frozen=True)
class Adapter:
    """One of our files, open. tensors: by their keys in adapter files; none for plain LoRA's.

    rank: of the LoRA that dense changes are made into; None: as SHARE needs.
    cache: the folder of caches, for SVDiff's factors of the base.
    """

    path: Path
    method: str
    config: dict[str, Any]
    card: LoraCard
    tensors: Mapping[str, torch.Tensor]
    base_folder: Path
    rank: int | None = None
    cache: Path | None = None

    @property
    def words(self) -> dict[str, dict[str, torch.Tensor]]:
        """Learned words by what they answer to: their rows, by part."""
        rows = {k.removeprefix("tokens."): t for k, t in self._of("tokens").items()}
        count = self.config.get("subjects", 1) if rows else 0
        return {
            nth_word(self.card.trigger, number + 1): {
                part: tensor.chunk(count)[number] for part, tensor in rows.items()
            }
            for number in range(count)
        }

    @property
    def kinds(self) -> set[str]:
        """Of its tensors, beside learned words."""
        return {key.partition(".")[0] for key in self.tensors} - {"tokens"}

    @property
    def dense(self) -> bool:
        """Whether it is dense changes, words aside."""
        return self.of_matrices or self.kinds == {"delta", "diff_fit"}

    @property
    def of_matrices(self) -> bool:
        """Whether it is dense changes that a LoRA can be made of."""
        return self.kinds in ({"delta"}, {"spectrum"})

    @property
    def deltas(self) -> dict[str, torch.Tensor]:
        """The dense changes, made of the base's weights where the file holds less than them."""
        names = spectra.shifted(self.tensors) | block_scales.scaled(self.tensors)
        weights = dict(stored_weights(self.base_folder, names))
        multiplied = spectra.changed(self.tensors, 1.0, weights, self.cache)
        return self._of("delta") | multiplied | block_scales.fold(self.tensors, weights)

    def _of(self, kind: str) -> dict[str, torch.Tensor]:
        return {k: t for k, t in self.tensors.items() if k.startswith(f"{kind}.")}


@dataclass(frozen=True)
class Exported:
    """error: of dense changes made thin, ||dW - B A|| / ||dW||; 0 where nothing was left out."""

    files: list[Path]
    error: float = 0.0


def export(
    path: Path,
    base_folder: Path,
    form: str,
    family: str,
    folder: Path,
    rank: int | None = None,
    cache: Path | None = None,
) -> Exported:
    """Write the files of a format (`FORMATS`) into the folder.

    Args:
        rank: of the LoRA that dense changes are made into; None: what keeps SHARE of them.
        cache: the folder of caches; None: nothing is kept.

    Raises CapabilityMissing for an adapter that the format cannot hold.
    """
    adapter = replace(_open(path, base_folder, family), rank=rank, cache=cache)
    if adapter.method == COMPOSITION and adapter._of("tokens"):  # of several subjects
        raise CapabilityMissing(f"{adapter.method} with words, as {form}: {_why(adapter)}")
    return FORMATS[form](adapter, folder)


def _as_diffusers(adapter: Adapter, folder: Path) -> Exported:
    if adapter.method != custom_diffusion.NAME:
        if adapter.of_matrices:
            raise CapabilityMissing(f"{adapter.method} in diffusers' layout: export it as lora")
        return _as_lora(adapter, folder)
    files = [folder / custom_diffusion.WEIGHTS_NAME]
    _write(files[0], custom_diffusion.to_processors(adapter.deltas, adapter.base_folder), adapter)
    for word, rows in adapter.words.items():
        files.append(folder / f"<{word}>.safetensors")
        _write(files[-1], to_embeddings(rows, f"<{word}>"), adapter)
    return Exported(files)


def _as_lora(adapter: Adapter, folder: Path) -> Exported:
    files, error = [], 0.0
    if not adapter.tensors:
        files.append(Path(shutil.copy(adapter.path, folder / WEIGHTS_NAME)))
    else:
        products, error = _products(adapter)
        if products:
            files.append(folder / WEIGHTS_NAME)
            save_diffusers(files[0], products, adapter.card)
    for word, rows in adapter.words.items():
        name = EMBEDDINGS_NAME if word == adapter.card.trigger else f"<{word}>.safetensors"
        files.append(folder / name)
        _write(files[-1], to_embeddings(rows, f"<{word}>"), adapter)
    return Exported(files, error)


def _as_kohya(adapter: Adapter, folder: Path) -> Exported:
    files = []
    products, error = _products(adapter)
    if products:
        files.append(folder / f"{adapter.card.title}.safetensors")
        _write(files[0], to_kohya(products, adapter.base_folder), adapter)
    for word, rows in adapter.words.items():
        files.append(folder / f"{word}{'-word' if products else ''}.safetensors")
        _write(files[-1], to_embeddings(rows, None), adapter)
    return Exported(files, error)


def _as_model(adapter: Adapter, folder: Path) -> Exported:
    if not adapter.dense:
        raise CapabilityMissing(f"{adapter.method} as a whole model: {_why(adapter)}")
    files = save_model(adapter.deltas, adapter.base_folder, folder)
    for word, rows in adapter.words.items():
        files.append(folder / f"<{word}>.safetensors")
        _write(files[-1], to_embeddings(rows, f"<{word}>"), adapter)
    return Exported(files)


FORMATS: dict[str, Callable[[Adapter, Path], Exported]] = {
    "diffusers": _as_diffusers,
    "lora": _as_lora,
    "kohya": _as_kohya,
    "model": _as_model,
}


def _open(path: Path, base_folder: Path, family: str) -> Adapter:
    from safetensors.torch import load_file

    header = read_header(path)
    spec = {k.removeprefix("modelspec."): v for k, v in header.metadata.items()}
    card = LoraCard(
        title=spec["title"],
        family=family,
        resolution=int(spec["resolution"].partition("x")[0]),
        trigger=spec["trigger_phrase"],
        prediction_type={"v": "v_prediction"}.get(spec["prediction_type"], spec["prediction_type"]),
        shapes={},
    )
    if METHOD_KEY not in header.metadata:
        return Adapter(path, "lora", {}, card, {}, base_folder)
    info = adapter_info(header, path.name)
    return Adapter(path, info.method, info.config, card, load_file(path), base_folder)


def _products(adapter: Adapter) -> tuple[dict[str, Product], float]:
    """The adapter as products, and what that leaves out of it.

    Raises CapabilityMissing where it is neither products nor dense changes of matrices.
    """
    if not adapter.tensors:
        return read_lora(adapter.path), 0.0
    if (adapter.kinds <= {"lora"} and adapter.method == "lora") or not adapter.kinds:
        return loaded_products(adapter.tensors), 0.0
    if adapter.of_matrices:
        return _compressed(adapter.deltas, adapter.rank)
    raise CapabilityMissing(f"{adapter.method} as a LoRA: {_why(adapter)}")


def _why(adapter: Adapter) -> str:
    """What keeps it from being fixed weights in a file for other programs."""
    return {
        "lora": "it is products of thin matrices: export it as lora or kohya",
        "diff_fit": "a LoRA has no biases, norms or scales: export it as model",
        "composition": "of merged versions the export has only those of LoRAs without words",
        "textual_inversion": "it is a word alone: export it as diffusers or kohya",
    }.get(adapter.method, "what it does depends on the prompt, the layer or the step")


def _compressed(
    deltas: Mapping[str, torch.Tensor], rank: int | None
) -> tuple[dict[str, Product], float]:
    """Each matrix's change by its `rank` first directions, or those that reach SHARE.

    Biases, norms and embeddings are left out, as LoRAs have none.
    """
    products, missed, size = {}, 0.0, 0.0
    for key, delta in deltas.items():
        square = float(delta.double().square().sum())
        size += square
        name = key.removeprefix("delta.")
        if delta.dim() not in (2, 4) or not name.endswith(".weight") or ".embeddings." in name:
            missed += square
        elif square:
            thin = compress(delta.float(), rank=rank, share=None if rank else SHARE)
            missed += square * thin.error**2
            up = thin.up if delta.dim() == 2 else thin.up[:, :, None, None]
            products[name.removesuffix(".weight")] = Product(thin.down, up)
    return products, (missed / size) ** 0.5 if size else 0.0


def _write(path: Path, tensors: Mapping[str, torch.Tensor], adapter: Adapter) -> None:
    """With the source's own account of itself, as far as it is meant for other programs."""
    from safetensors.torch import save

    known = read_header(adapter.path).metadata
    metadata = {k: v for k, v in known.items() if k.startswith("modelspec.")} | {"format": "pt"}
    plain = {key: tensor.detach().contiguous() for key, tensor in sorted(tensors.items())}
    alphas = {int(tensor) for key, tensor in plain.items() if key.endswith(".alpha")}
    if alphas:
        metadata["ss_network_module"] = "networks.lora"
        metadata["ss_network_dim"] = metadata["ss_network_alpha"] = str(max(alphas))
    atomic_write(path, with_metadata(save(plain), metadata))
