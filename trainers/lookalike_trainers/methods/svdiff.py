"""SVDiff (Han et al. 2023): how strongly each matrix does what it does, not what it does.

    W = U diag(S) V^T,    W' = U diag(relu(S + delta)) V^T        (eq. 3)

for each convolution and linear layer, a kernel [out, in, k, k] being read as [out, in * k * k].
Only the spectral shifts delta: [min(out, in)] = 0 train: a megabyte or two on SD 1.5.

A step multiplies W' out again, since delta has changed: 2 out in r operations for each matrix of
rank r, and as many backward, whatever the batch. On SD 1.5 at 512 pixels that is about what one
sample's forward and backward take. U, V^T and W' are kept beside W: some 8 GB more there in
float32, 4 in bf16; with gradient checkpointing W' goes again at once.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lookalike_datasets.features import cache
from lookalike_platform.files import sha256_bytes
from lookalike_registry.safetensors_header import read_header
from lookalike_registry.tensor_file import ADAPTER_NAME, save_tensors
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients
from lookalike_trainers.method_configs import SvdiffConfig
from lookalike_trainers.methods import deltas
from lookalike_trainers.methods.dreambooth import thaw
from lookalike_trainers.methods.groups import parameter_groups
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.tokens import TokenRows, learn_rows, saved_rows, wear_words
from lookalike_trainers.objective import weighted_mse
from lookalike_trainers.streamed import stored_weights

NAME = "svdiff"
PREFIX = "spectrum."
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Svdiff:
    """The method, holding a base whose matrices are made of their factors in every step."""

    def __init__(self, parts: Any, config: SvdiffConfig) -> None:
        self.config = config
        bf16 = config.mixed_precision == "bf16"
        unet = parts.take("unet")
        text_encoders = parts.take("text_encoders") if config.reads_ids else []
        self.unet_shifts = shift_spectra("unet", unet.requires_grad_(True), parts.cache, bf16)
        self.text_shifts: dict[str, nn.Parameter] = {}
        if config.train_text_encoder:
            thaw(text_encoders)
            for place, encoder in enumerate(text_encoders):
                self.text_shifts |= shift_spectra(
                    deltas.part_name(place), encoder, parts.cache, bf16
                )
        self.rows: list[TokenRows] = []
        if config.token_vectors:
            word = str(config.initializer)
            self.rows = learn_rows(parts, text_encoders, config.trigger, word)
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(unet, text_encoders, bf16=bf16, silent=parts.silent_ids())

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(
            self.config,
            unet=self.unet_shifts.values(),
            text=self.text_shifts.values(),
            words=self.rows,
        )

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

    def save(self, folder: Path, card: Card) -> Path:
        path = folder / ADAPTER_NAME
        shifts = self.unet_shifts | self.text_shifts
        tensors = {f"{PREFIX}{name}": shift for name, shift in shifts.items()}
        save_tensors(path, NAME, tensors | saved_rows(self.rows), {}, card.modelspec(NAME))
        return path


def build(parts: Any, config: TrainingConfig) -> Svdiff:
    assert isinstance(config, SvdiffConfig)
    return Svdiff(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """W' with scale * delta, beside what else is worn; the word's rows know no scale."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    names = _shifted(tensors)
    if wearer.unet.dtype == torch.float32:
        weights = deltas.base_values(wearer)
    else:  # the factors of weights rounded to half precision are others
        stored = stored_weights(wearer.folder, names)
        weights = {name: weight.to(wearer.unet.device) for name, weight in stored}
    changes = changed(tensors, scale, weights, wearer.cache)
    with ExitStack() as undo:
        undo.callback(wear_words(wearer, tensors, word))
        undo.callback(deltas.wear_deltas(wearer, changes, 1.0))
        return undo.pop_all().close


def prepare(base_folder: Path, kept: Path | None, file: Path) -> None:
    """Put the factors that `wear` needs into the cache: of a large base takes minutes.

    Safe beside a base that is at work: its files are read, and no model is built.
    """
    for _, weight in stored_weights(base_folder, _shifted(read_header(file).tensors)):
        decompose(weight, kept)


def _shifted(keys: Iterable[str]) -> set[str]:
    """The weights whose spectra an adapter file shifts."""
    return {key.removeprefix(PREFIX) for key in keys if key.startswith(PREFIX)}


def changed(
    tensors: Mapping[str, torch.Tensor],
    scale: float,
    weights: Mapping[str, torch.Tensor],
    cache: Path | None,
) -> dict[str, torch.Tensor]:
    """W' - W of `scale` times each spectrum's shift, as `wear_deltas` takes them.

    Args:
        weights: the base's own, float32, by `<part>.<parameter>`.
    """
    changes = {}
    for key, delta in tensors.items():
        if key.startswith(PREFIX):
            name = key.removeprefix(PREFIX)
            u, s, vt = decompose(weights[name], cache)
            change = recompose(u, s, vt, delta.to(s.device) * scale)
            changes[f"{deltas.PREFIX}{name}"] = change.view_as(weights[name])
    return changes


def shift_spectra(
    part: str, model: nn.Module, kept: Path | None, bf16: bool
) -> dict[str, nn.Parameter]:
    """Let each thawed matrix of a model be made of its factors, and nothing else of it train.

    Returns:
        the delta of each by its name in adapter files.
    """
    matrices = {
        f"{part}.{name.removeprefix('text_model.')}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.requires_grad
    }
    model.requires_grad_(False)
    dtype = torch.bfloat16 if bf16 else torch.float32
    shifts = {}
    for name, layer in matrices.items():
        u, s, vt = decompose(layer.weight, kept)
        spectrum = Spectrum(u.to(dtype), s, vt.to(dtype))
        parametrize.register_parametrization(layer, "weight", spectrum)
        shifts[name] = spectrum.delta
    return shifts


class Spectrum(nn.Module):
    """W of any shape to W', which is W to the bit where delta is zero.

    u: [out, r]; s: [r]; vt: [r, in].
    """

    u: torch.Tensor
    s: torch.Tensor
    vt: torch.Tensor

    def __init__(self, u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros_like(s))
        for name, factor in (("u", u), ("s", s), ("vt", vt)):
            self.register_buffer(name, factor, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + recompose(self.u, self.s, self.vt, self.delta).view_as(weight)


def recompose(
    u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """W' - W = U diag(relu(S + delta) - S) V^T, [out, in], in the factors' precision."""
    scaled = u * (F.relu(s + delta) - s)  # S and delta are float32 where U and V^T are bf16
    return scaled.to(vt.dtype) @ vt


def decompose(weight: torch.Tensor, kept: Path | None) -> Factors:
    """U [out, r], S [r] and V^T [r, in] of a weight [out, in, …], float32.

    In float64, so that a file means the same on every machine: neighbouring singular vectors mix
    by the rounding error over the gap between their values. On SD 1.5 it takes minutes on two
    cores, and once, and then 5 GB in the cache.

    Args:
        kept: the folder of caches, where the weight's factors lie under its content.
    """
    matrix = weight.detach().flatten(1)
    if kept is None:
        return _svd(matrix)
    content = matrix.float().cpu().contiguous().numpy().tobytes()
    key = cache.key_of(svd=sha256_bytes(content), shape=list(matrix.shape), version=1)
    found = cache.read(kept / "svd", key)
    if found is None:
        found = dict(zip(("u", "s", "vt"), _svd(matrix), strict=True))
        cache.write(kept / "svd", key, found)
    u, s, vt = (found[name].to(weight.device) for name in ("u", "s", "vt"))
    return u, s, vt


def _svd(matrix: torch.Tensor) -> Factors:
    """By QR of the longer side first: LAPACK's SVD of the small R is many times faster."""
    wide = matrix.shape[0] < matrix.shape[1]
    q, r = torch.linalg.qr((matrix.T if wide else matrix).double())
    inner, s, right = torch.linalg.svd(r)
    left = q @ inner
    u, vt = (right.T, left.T) if wide else (left, right)
    return u.float().contiguous(), s.float(), vt.float().contiguous()
