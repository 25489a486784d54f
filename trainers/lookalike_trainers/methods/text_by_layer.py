"""Text with its own features for each of the UNet's cross-attention layers. Torch.

Text features are [n, L, tokens, width] then (P+, Voynov et al. 2023), and pass through the UNet as
they are: each cross-attention layer takes its own.
"""

from contextlib import ExitStack
from typing import Any

from torch import nn

from lookalike_trainers.methods.method import TakeOff


def cross_attention(unet: nn.Module) -> list[Any]:
    """The UNet's L cross-attention layers, in the order of their names."""
    named = {name: module for name, module in unet.named_modules() if name.endswith(".attn2")}
    return [named[name] for name in sorted(named)]


def take_own_text(unet: nn.Module) -> TakeOff:
    """Let each cross-attention layer take its own of text features by layer, and all of others."""
    with ExitStack() as undo:
        for place, layer in enumerate(cross_attention(unet)):
            handle = layer.register_forward_pre_hook(_takes(place), with_kwargs=True)
            undo.callback(handle.remove)
        return undo.pop_all().close


def _takes(place: int) -> Any:
    def before(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text = kwargs["encoder_hidden_states"]
        if text.dim() == 4:
            kwargs = {**kwargs, "encoder_hidden_states": text[:, place]}
        return args, kwargs

    return before
