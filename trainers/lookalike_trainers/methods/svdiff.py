"""SVDiff (Han et al. 2023): how strongly each matrix does what it does, not what it does.

    W = U diag(S) V^T,    W' = U diag(relu(S + delta)) V^T        (eq. 3)

for each convolution and linear layer, a kernel [out, in, k, k] being read as [out, in * k * k].
Only the spectral shifts delta: [min(out, in)] = 0 train: a megabyte or two on SD 1.5.

A step multiplies W' out again, since delta has changed: 2 out in r operations for each matrix of
rank r, and as many backward, whatever the batch. On SD 1.5 at 512 pixels that is about what one
sample's forward and backward take. U, V^T and W' are kept beside W: some 8 GB more there in
float32, 4 in bf16; with gradient checkpointing W' goes again at once.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lookalike_registry.base_weights import stored_weights
from lookalike_registry.safetensors_header import read_header
from lookalike_registry.spectra import PREFIX, changed, decompose, recompose, shifted
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

NAME = "svdiff"


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
    names = shifted(tensors)
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
    for _, weight in stored_weights(base_folder, shifted(read_header(file).tensors)):
        decompose(weight, kept)


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
