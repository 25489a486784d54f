"""Stage two: the tokenizer, learnt from captions, and the three networks before any training.

The text encoder has no stage of its own: it is trained jointly with the denoiser, whose loss alone
tells it which words matter.  At 200 nouns a contrastive stage would learn the same table slower.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lookalike_trainers.pretrain.denoiser import Denoiser
from lookalike_trainers.pretrain.export import write_folder

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Sizes:
    """Widths of the networks; the defaults make 40 MiB in fp16."""

    text_width: int = 192
    text_layers: int = 3
    text_length: int = 32
    unet: tuple[int, ...] = (64, 128, 256)
    heads: tuple[int, ...] = (2, 4, 8)
    vae: tuple[int, ...] = (32, 64, 128)
    sample: int = 16


def learn_tokenizer(captions: Iterable[str], vocabulary: int = 2625, length: int = 32) -> Any:
    """CLIP's byte-pair tokenizer with merges learnt from ``captions``."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=EOS))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, *alphabet, *(f"{letter}</w>" for letter in alphabet)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    return CLIPTokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(merge) for merge in learnt["merges"]],
        bos_token=BOS,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=EOS,
        model_max_length=length,
    )


def new_folder(folder: Path, captions: Iterable[str], sizes: Sizes, seed: int = 0) -> None:
    """Write untrained networks and a learnt tokenizer as a diffusers folder to start from."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = learn_tokenizer(captions, length=sizes.text_length)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=3 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=4,
            max_position_embeddings=sizes.text_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    depth = len(sizes.unet)
    unet = UNet2DConditionModel(
        sample_size=sizes.sample,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=sizes.unet,
        attention_head_dim=sizes.heads,
        norm_num_groups=16,
        cross_attention_dim=sizes.text_width,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (depth - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (depth - 1), "UpBlock2D"),
    )
    levels = len(sizes.vae)
    vae = AutoencoderKL(
        sample_size=sizes.sample * 2 ** (levels - 1),
        block_out_channels=sizes.vae,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        norm_num_groups=8,
        latent_channels=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    write_folder(Denoiser(text, unet), vae, tokenizer, folder)
