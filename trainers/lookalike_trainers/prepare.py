"""From a run's request to its data: latents, text and prior images, each computed at most once.

Rank 0 fills the caches while the others wait; then all read the same files.
"""

import json
from collections.abc import Callable
from typing import Any

import torch

from lookalike_datasets.features.cache import component_digest
from lookalike_datasets.features.latents import Moments, photo_moments
from lookalike_datasets.features.prior import PriorImages, PriorRequest, prior_images
from lookalike_datasets.features.text import text_features
from lookalike_platform.conditioning import Text
from lookalike_platform.files import canonical_digest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import RunRequest, TrainingConfig
from lookalike_trainers.data import Images, TrainingData
from lookalike_trainers.objective import NoiseSchedule
from lookalike_trainers.prompts import class_prompt, instance_caption

Say = Callable[[dict[str, Any]], None]


def prepare(
    request: RunRequest, config: TrainingConfig, parts: BaseParts, say: Say
) -> tuple[TrainingData, str | None]:
    """The run's data, and the digest of its prior images if it has any.

    Autoencoder and text encoders are let go afterwards: the steps do not need them.
    """
    assert config.resolution is not None
    say({"type": "stage", "stage": "caching"})
    # Row 0 is the empty prompt, for caption dropout.
    captions = [instance_caption(i.caption, config, request.class_noun) for i in request.images]
    prompts = list(dict.fromkeys(["", *captions, class_prompt(config, request.class_noun)]))
    row = {prompt: number for number, prompt in enumerate(prompts)}

    instance = Images(
        _moments(
            request,
            config,
            parts,
            [i.path for i in request.images],
            [i.sha256 for i in request.images],
        ),
        [row[caption] for caption in captions],
    )
    prior, prior_digest = None, None
    if config.prior:
        drawn = _prior_images(request, config, parts, say)
        moments = _moments(request, config, parts, drawn.paths, drawn.digests)
        prior = Images(moments, [row[class_prompt(config, request.class_noun)]] * len(drawn.paths))
        prior_digest = canonical_digest(drawn.digests)

    data = TrainingData(
        instance=instance,
        prior=prior,
        texts=_texts(request, config, parts, prompts),
        schedule=NoiseSchedule.of(parts.scheduler),
        scaling_factor=float(_vae_config(parts)["scaling_factor"]),
        config=config,
    )
    parts.release()
    return data, prior_digest


def _moments(
    request: RunRequest,
    config: TrainingConfig,
    parts: BaseParts,
    paths: list[Any],
    digests: list[str],
) -> Moments:
    assert config.resolution is not None
    return photo_moments(
        paths,
        digests,
        lambda: parts.vae,
        component_digest(parts.folder / "vae"),
        config.resolution,
        config.random_flip,
        request.cache / "latents",
    )


def _prior_images(
    request: RunRequest, config: TrainingConfig, parts: BaseParts, say: Say
) -> PriorImages:
    assert config.prior is not None
    assert config.resolution is not None
    say({"type": "stage", "stage": "prior"})
    with torch.inference_mode():
        return prior_images(
            PriorRequest(
                base_fingerprint=request.base_fingerprint,
                prompt=class_prompt(config, request.class_noun),
                sampler=config.prior.sampler,
                steps=config.prior.steps,
                guidance_scale=config.prior.guidance_scale,
                seed=config.prior.seed,
                resolution=config.resolution,
                count=config.prior.num_images,
            ),
            lambda: parts,
            request.cache / "prior",
            lambda done, total: say({"type": "prior", "done": done, "total": total}),
        )


def _texts(
    request: RunRequest, config: TrainingConfig, parts: BaseParts, prompts: list[str]
) -> Text | torch.Tensor:
    if config.reads_ids:
        return parts.ids(prompts)
    assert config.resolution is not None
    resolution = config.resolution
    digest = canonical_digest(
        [component_digest(folder) for folder in sorted(parts.folder.glob("t*")) if folder.is_dir()]
    )
    # Of the size SDXL's denoiser is told; the others' features do not depend on it.
    key = canonical_digest([digest, resolution if len(parts.tokenizers) > 1 else None])
    return text_features(
        prompts, lambda words: parts.encode(words, resolution), key, request.cache / "text"
    )


def _vae_config(parts: BaseParts) -> dict[str, Any]:
    """The autoencoder's configuration, without loading it; diffusers' default where it is old."""
    config: dict[str, Any] = json.loads((parts.folder / "vae" / "config.json").read_text())
    return {"scaling_factor": 0.18215, **config}
