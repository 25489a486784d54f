"""T-LoRA (Soboleva et al. 2025): the noisier the picture, the fewer ranks learn from it.

    W_t = W - B0 S0 M_t A0 + B S M_t A      M_t: [r, r], ones on the first r(t) of its diagonal
    r(t) = floor((r - r_min) (T - t) / T) + r_min

At late timesteps t only layout is left to learn, and from few photos it is learned by heart. For
a mask to take capacity away, the ranks must not say the same thing: B, S and A begin at B0, S0 and
A0, the last r singular triplets of a random matrix, which are orthogonal and weigh little. They
are subtracted, so that training begins at W.

It is for the very few photos, one even; r_min = r / 2 in the paper.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lookalike_registry.products import Product, loaded_products, saved_products
from lookalike_registry.safetensors_header import read_header
from lookalike_registry.tensor_file import ADAPTER_NAME, adapter_info, save_tensors
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients
from lookalike_trainers.method_configs import TLoraConfig, check_rank, check_targets, ends_in
from lookalike_trainers.methods.groups import parameter_groups
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.products import own_layers, wear_products
from lookalike_trainers.methods.row_adapter import Ranks, RowAdapter, of_unet
from lookalike_trainers.methods.row_masks import ranks_at
from lookalike_trainers.methods.tokens import (
    TokenRows,
    learn_rows,
    learned_rows,
    saved_rows,
    wear_only_words,
    wear_words,
)
from lookalike_trainers.objective import weighted_mse

NAME = "t_lora"


class RankMask:
    """M_t of the timesteps the UNet was last called with; they differ within a batch."""

    def __init__(self, rank: int, min_rank: int, timesteps: int) -> None:
        self.rank, self.min_rank, self.total = rank, min_rank, timesteps
        self.ranks = torch.tensor([rank])

    def see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A UNet's forward pre-hook: note r(t), [n] or, where all share one timestep, [1]."""
        t = torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).reshape(-1)
        self.ranks = ranks_at(t, self.rank, self.min_rank, self.total)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """M_t A x of A x [n, ..., k r], k products side by side."""
        places = torch.arange(self.rank, device=hidden.device)
        kept = places < self.ranks.to(hidden.device).unsqueeze(1)
        kept = kept.repeat(1, hidden.shape[-1] // self.rank)
        return hidden * kept.view(len(kept), *[1] * (hidden.dim() - 2), -1)


class TimedProduct(nn.Module):
    """A linear layer W with B S M_t A - B0 S0 M_t A0 beside it.

    down: A [r, in]; values: S's diagonal [r]; up: B [out, r].
    """

    down_0: torch.Tensor
    values_0: torch.Tensor
    up_0: torch.Tensor

    def __init__(self, base_layer: nn.Linear, mask: RankMask) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.mask = mask
        triplets = last_triplets(base_layer.out_features, base_layer.in_features, mask.rank)
        down, values, up = (start.to(base_layer.weight.device) for start in triplets)
        self.down, self.values, self.up = (nn.Parameter(f.clone()) for f in (down, values, up))
        self.register_buffer("down_0", down, persistent=False)
        self.register_buffer("values_0", values, persistent=False)
        self.register_buffer("up_0", up, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        learned = self.mask(functional.linear(x, self.down)) * self.values
        start = self.mask(functional.linear(x, self.down_0)) * self.values_0
        change = functional.linear(learned, self.up) - functional.linear(start, self.up_0)
        answer: torch.Tensor = self.base_layer(x) + change
        return answer

    def product(self) -> Product:
        """Both terms as one product of rank 2 r: [B S, -B0 S0] [A; A0]."""
        return Product(
            down=torch.cat([self.down, self.down_0]),
            up=torch.cat([self.up * self.values, -self.up_0 * self.values_0], dim=1),
        )


class TLora:
    """The method, holding a base's UNet with timed products in it."""

    def __init__(self, parts: Any, config: TLoraConfig) -> None:
        self.config = config
        bf16 = config.mixed_precision == "bf16"
        unet = parts.take_frozen_unet(bf16=bf16)
        text_encoders = parts.take("text_encoders") if config.reads_ids else []
        min_rank = config.rank // 2 if config.min_rank is None else config.min_rank
        timesteps = parts.scheduler.config.num_train_timesteps
        self.mask = RankMask(config.rank, min_rank, timesteps)
        linear = [name for name, one in own_layers(unet).items() if isinstance(one, nn.Linear)]
        check_targets(config, linear)
        self.layers = insert(unet, config.target_modules, self.mask)
        unet.register_forward_pre_hook(self.mask.see, with_kwargs=True)
        self.rows: list[TokenRows] = []
        if config.token_vectors:
            word = str(config.initializer)
            self.rows = learn_rows(parts, text_encoders, config.trigger, word)
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(unet, text_encoders, bf16=bf16, silent=parts.silent_ids())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Without weight decay: what is taken away of the start would not shrink with it."""
        products = [
            p for layer in self.layers.values() for p in (layer.down, layer.values, layer.up)
        ]
        return parameter_groups(self.config, unet=products, words=self.rows, decay=False)

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

    def save(self, folder: Path, card: Card) -> Path:
        path = folder / ADAPTER_NAME
        products = {f"unet.{name}": layer.product() for name, layer in self.layers.items()}
        about = {
            "rank": self.mask.rank,
            "min_rank": self.mask.min_rank,
            "timesteps": self.mask.total,
        }
        tensors = saved_products(products) | saved_rows(self.rows)
        save_tensors(path, NAME, tensors, about, card.modelspec(NAME))
        return path


def build(parts: Any, config: TrainingConfig) -> TLora:
    assert isinstance(config, TLoraConfig)
    return TLora(parts, config)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """W + scale (W_t - W), t being what the UNet is called with; learned rows know no scale."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    mask = RankMask(**adapter_info(read_header(file), file.name).config)
    with ExitStack() as undo:
        watching = wearer.unet.register_forward_pre_hook(mask.see, with_kwargs=True)
        undo.callback(watching.remove)
        undo.callback(wear_words(wearer, tensors, word))
        undo.callback(wear_products(wearer, loaded_products(tensors), scale, mask))
        return undo.pop_all().close


def rows(wearer: Wearer, file: Path) -> RowAdapter:
    from safetensors.torch import load_file

    tensors = load_file(file)
    return RowAdapter(
        learned_rows(tensors),
        wear_only_words,
        products=of_unet(loaded_products(tensors)),
        ranks=Ranks(**adapter_info(read_header(file), file.name).config),
    )


def insert(unet: nn.Module, targets: tuple[str, ...], mask: RankMask) -> dict[str, TimedProduct]:
    """Put timed products beside a frozen UNet's linear layers, given back by the layers' names.

    Raises InvalidRequest if one is narrower than the rank.
    """
    layers = {
        name: layer
        for name, layer in own_layers(unet).items()
        if ends_in(name, targets) and isinstance(layer, nn.Linear)
    }
    check_rank(mask.rank, [layer.weight.shape for layer in layers.values()])
    timed = {name: TimedProduct(layer, mask) for name, layer in layers.items()}
    for name, layer in timed.items():
        unet.set_submodule(name, layer)
    return timed


def last_triplets(
    rows: int, columns: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A0 [rank, columns], S0 [rank] and B0 [rows, rank] of a matrix drawn from N(0, 1 / rank^2)."""
    u, s, vt = torch.linalg.svd(torch.randn(rows, columns) / rank, full_matrices=False)
    return vt[-rank:].contiguous(), s[-rank:].contiguous(), u[:, -rank:].contiguous()
