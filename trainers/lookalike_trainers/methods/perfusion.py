"""Perfusion (Tewel et al. 2023): one gated, rank-one edit of what a word means to the picture.

Each of the cross-attention's K and V has the gate of gate.py, which answers o for what lies along
the concept's encoding i. For K, o is locked to the superclass's answer: attention goes where the
class noun's would. For V, o is learned from there, and so is the word's row, which starts as the
class noun's.

i is a moving average (EMA, .99) of the word's encoding in the training prompt, one move an
optimiser step: a function of the rows and of what is in the checkpoint, hence equal on all
processes. The file holds i, C^-1 i, the answers and the row: 110 KB for SD 1.5. Worn together,
concepts add up their terms.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lookalike_platform.conditioning import ANY_SIZE, encode
from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_registry.tensor_file import ADAPTER_NAME, save_tensors
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Batch
from lookalike_trainers.denoiser import Denoiser, checkpoint_gradients
from lookalike_trainers.method_configs import PerfusionConfig
from lookalike_trainers.methods.covariance import precision
from lookalike_trainers.methods.custom_diffusion import projections
from lookalike_trainers.methods.gate import TRAINING, WORN, Gate, edit, wear_gates
from lookalike_trainers.methods.groups import parameter_groups
from lookalike_trainers.methods.method import Card, TakeOff, Wearer
from lookalike_trainers.methods.row_adapter import RowAdapter
from lookalike_trainers.methods.tokens import (
    learn_rows,
    learned_rows,
    saved_rows,
    wear_only_words,
)
from lookalike_trainers.objective import weighted_mse

NAME = "perfusion"
PREFIX = f"{NAME}."
DECAY = 0.99


class Perfusion:
    """The method, holding a frozen base whose K and V answer the concept anew."""

    def __init__(self, parts: Any, config: PerfusionConfig) -> None:
        assert config.resolution is not None
        self.config = config
        metric = precision(parts, config.resolution)
        unet, text_encoders = parts.take("unet"), parts.take("text_encoders")
        self.rows = learn_rows(parts, text_encoders, config.trigger, str(config.initializer))
        prompt = config.prompt.format(trigger=config.trigger, class_noun=config.initializer)
        ids = parts.ids([prompt]).to(parts.device)
        places = (ids[0, 0] == self.rows[0].first).nonzero()
        if not len(places):
            problem = FieldProblem("config.prompt", f"{config.trigger} comes too late in it")
            raise InvalidRequest("The text encoder never reads the word to be learned.", [problem])
        concept = Concept(ids, int(places[0]), metric.float())
        concept.start(text_encoders)
        self.layers = projections(unet)
        for name, layer in self.layers.items():
            answer = F.linear(concept.encoding, layer.weight)
            if name.endswith("to_v"):
                layer.answer = nn.Parameter(answer)
            else:
                layer.register_buffer("answer", answer, persistent=False)
            layer.register_forward_hook(partial(_answer_anew, concept=concept))
        if config.gradient_checkpointing:
            checkpoint_gradients(unet, text_encoders)
        self.module = Denoiser(
            unet, text_encoders, bf16=config.mixed_precision == "bf16", silent=parts.silent_ids()
        )
        self.module.concept = concept
        # Of the UNet, since ZeRO 3 serves weights only within the module's own forward.
        unet.register_forward_pre_hook(partial(_follow, self.module))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Without weight decay: zero is no answer to go back to."""
        answers = [layer.answer for name, layer in self.layers.items() if name.endswith("to_v")]
        return parameter_groups(self.config, unet=answers, words=self.rows, decay=False)

    def loss(self, prediction: torch.Tensor, batch: Batch) -> torch.Tensor:
        return weighted_mse(prediction, batch.target, batch.weight, batch.mask)

    def save(self, folder: Path, card: Card) -> Path:
        path = folder / ADAPTER_NAME
        concept: Any = self.module.concept
        tensors = {f"{PREFIX}unet.{name}": layer.answer for name, layer in self.layers.items()}
        tensors |= {
            f"{PREFIX}encoding": concept.encoding,
            f"{PREFIX}direction": concept.direction(),
        }
        save_tensors(path, NAME, tensors | saved_rows(self.rows), {}, card.modelspec(NAME))
        return path


def build(parts: Any, config: TrainingConfig) -> Perfusion:
    assert isinstance(config, PerfusionConfig)
    return Perfusion(parts, config)


class Concept(nn.Module):
    """i [d], which follows the encoding of the learned word in a prompt as its row moves.

    encoding: i; seen: what it moved towards last. Both are in checkpoints (engine_state.py).

    Args:
        ids: [1, encoders, tokens] of the prompt; place: the word's, among the tokens.
        metric: C^-1, [d, d].
    """

    encoding: torch.Tensor
    metric: torch.Tensor
    seen: torch.Tensor

    def __init__(self, ids: torch.Tensor, place: int, metric: torch.Tensor) -> None:
        super().__init__()
        self.ids, self.place = ids, place
        self.register_buffer("metric", metric, persistent=False)
        self.register_buffer("encoding", metric.new_zeros(len(metric)))
        self.register_buffer("seen", metric.new_zeros(len(metric)))

    def start(self, text_encoders: Any) -> None:
        self.seen.copy_(self._encode(text_encoders))
        self.encoding.copy_(self.seen)

    def follow(self, text_encoders: Any) -> None:
        """One move of the average, if the row has moved since the last: once an optimiser step."""
        now = self._encode(text_encoders)
        if not torch.equal(now, self.seen):
            self.seen.copy_(now)
            self.encoding.lerp_(now, 1 - DECAY)

    def direction(self) -> torch.Tensor:
        """C^-1 i, [d]. Spelled out, since autocast would round a product of matrices to bf16."""
        return (self.metric * self.encoding).sum(-1)

    @torch.no_grad()
    def _encode(self, text_encoders: Any) -> torch.Tensor:
        features = encode(list(text_encoders), self.ids, ANY_SIZE).features
        return features[0, self.place].to(self.encoding.dtype)


def wear(wearer: Wearer, file: Path, scale: float, word: str) -> TakeOff:
    """Add `scale` times the edit to what K and V say; the word's row knows no scale.

    Raises InvalidRequest if the file's answers do not belong to layers of this base.
    """
    adapter = rows(wearer, file).to(wearer.unet.device, wearer.unet.dtype)
    with ExitStack() as undo:
        undo.callback(adapter.wear_text(wearer, adapter.text, scale, word))
        undo.callback(wear_gates(projections(wearer.unet), adapter.gates, scale))
        return undo.pop_all().close


def rows(wearer: Wearer, file: Path) -> RowAdapter:
    """Raises InvalidRequest if the file's answers do not belong to layers of this base."""
    from safetensors.torch import load_file

    tensors = load_file(file)
    return RowAdapter(learned_rows(tensors), wear_only_words, gates=[gate_of(wearer, tensors)])


def gate_of(wearer: Wearer, tensors: Mapping[str, torch.Tensor], scale: float = 1.0) -> Gate:
    """The edits of a file's tensors.

    Raises InvalidRequest if the answers do not belong to layers of this base.
    """
    layers = projections(wearer.unet)
    _check(tensors, layers)
    answers = {name: tensors[f"{PREFIX}unet.{name}"] for name in layers}
    return Gate(tensors[f"{PREFIX}encoding"], tensors[f"{PREFIX}direction"], answers, scale)


def _follow(denoiser: Any, _: Any, __: Any) -> None:
    # Where nothing is learned, in validation or for early stopping, nothing moves.
    if denoiser.training and torch.is_grad_enabled():
        denoiser.concept.follow(denoiser.text_encoders)


def _answer_anew(layer: Any, args: Any, output: torch.Tensor, concept: Concept) -> torch.Tensor:
    """W e as a layer in training says it, edited."""
    encoding = concept.encoding
    base_answer = F.linear(encoding.to(layer.weight.dtype), layer.weight)
    gate = TRAINING if layer.training else WORN
    change = edit(args[0], layer.answer, base_answer, encoding, concept.direction(), gate)
    return output + change.to(output.dtype)


def _check(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, Any]) -> None:
    """Raises InvalidRequest, one field per tensor that is missing, too many, or does not fit."""
    width = next(iter(layers.values())).in_features
    wanted = {f"{PREFIX}unet.{name}": (layer.out_features,) for name, layer in layers.items()}
    wanted |= {f"{PREFIX}encoding": (width,), f"{PREFIX}direction": (width,)}
    given = {key: tuple(t.shape) for key, t in tensors.items() if key.startswith(PREFIX)}
    problems = [
        FieldProblem(
            key, f"is {given.get(key, 'missing')}, the base needs {wanted.get(key, 'none')}"
        )
        for key in sorted(wanted.keys() | given.keys())
        if given.get(key) != wanted.get(key)
    ]
    if problems:
        raise InvalidRequest("The adapter was trained on another base model.", problems)
