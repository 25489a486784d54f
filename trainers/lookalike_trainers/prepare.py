"""From a run's request to its data: latents, text and prior images, each computed at most once.

Rank 0 fills the caches while the others wait; then all read the same files.
"""

import json
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch

from lookalike_datasets.features.cache import component_digest
from lookalike_datasets.features.latents import Moments, moments
from lookalike_datasets.features.prior import PriorRequest, prior_images
from lookalike_datasets.features.text import text_features
from lookalike_platform.conditioning import ANY_SIZE, Text
from lookalike_platform.files import canonical_digest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.checks import check_masks, check_words
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.data import Bucket, Reference, TrainingData, View
from lookalike_trainers.denoiser import Denoiser
from lookalike_trainers.objective import NoiseSchedule
from lookalike_trainers.prompts import class_caption, class_prompt, validation_prompt
from lookalike_trainers.run_request import RunImage, RunRequest
from lookalike_trainers.subjects import subjects_of
from lookalike_trainers.views import Shown, class_views, side_multiple, views_by_shape

Say = Callable[[dict[str, Any]], None]


def prepare(
    request: RunRequest, config: TrainingConfig, parts: BaseParts, say: Say
) -> tuple[TrainingData, str | None]:
    """The run's data, and the digest of its prior images if it has any.

    Raises InvalidRequest, before anything is drawn or encoded, where nothing could be learned.

    Autoencoder and text encoders are let go afterwards: the steps do not need them.
    """
    say({"type": "stage", "stage": "caching"})
    check_words(request, config, parts)
    check_masks(request, config, say)
    photos = views_by_shape(request, config, side_multiple(parts.folder))
    of_class = _class_images(request, config, parts, say)
    class_images = {
        shape: class_views(of_class, shape, config, request.class_noun) for shape in photos
    }
    validation = validation_prompt(config, request.class_noun)
    words = _Words(
        [*photos.values(), *class_images.values()], validation, config, request.class_noun
    )

    def views(images: list[list[Shown]]) -> list[list[View]]:
        encoded = iter(_moments(list(chain(*images)), request, parts))
        return [[words.view(shown, next(encoded)) for shown in image] for image in images]

    buckets = [Bucket(views(photos[shape]), views(class_images[shape])) for shape in photos]
    if config.reads_ids:
        texts: Text | torch.Tensor = parts.ids(words.prompts)
    else:
        texts = _features(words.prompts, request, parts)
    data = TrainingData(
        buckets=buckets,
        texts=texts,
        schedule=NoiseSchedule.of(parts.scheduler),
        scaling_factor=float(_component(parts, "vae").get("scaling_factor", 0.18215)),
        config=config,
        reference=_reference(words.of_class, request, config, parts),
        validation=words.prompts.index(validation) if validation else None,
    )
    parts.release()
    return data, _digest_of(of_class) if config.prior else None


class _Words:
    """The run's prompts, each once, and their rows.

    prompts: the empty one, for caption dropout; then those about the class alone where the base's
        output is preserved; then all others.
    of_class: the first of them, which the base is asked about: it knows no learned words.
    """

    def __init__(
        self,
        images: list[list[list[Shown]]],
        validation: str | None,
        config: TrainingConfig,
        class_noun: str,
    ) -> None:
        captions = [shown.caption for shown in chain(*chain(*images))]
        self._plain = {c: class_caption(c, config, class_noun) for c in captions}
        asked = self._plain.values() if config.output_preservation else ()
        self.of_class = list(dict.fromkeys(["", *asked]))
        others = [*captions, validation] if validation else captions
        self.prompts = list(dict.fromkeys([*self.of_class, *others]))

    def view(self, shown: Shown, moments: Moments) -> View:
        plain = self._plain[shown.caption]
        return View(
            moments,
            caption=self.prompts.index(shown.caption),
            time_ids=shown.cut.time_ids(*shown.photo.size),
            class_caption=self.of_class.index(plain) if plain in self.of_class else 0,
            subject=shown.subject,
        )


def _moments(shown: list[Shown], request: RunRequest, parts: BaseParts) -> list[Moments]:
    distinct = list(dict.fromkeys((view.photo, view.cut) for view in shown))
    encoded = moments(
        distinct,
        lambda: parts.vae,
        component_digest(parts.folder / "vae"),
        request.cache / "latents",
    )
    of = dict(zip(distinct, encoded, strict=True))
    return [of[view.photo, view.cut] for view in shown]


def _digest_of(images: list[RunImage]) -> str:
    return canonical_digest([image.sha256 for image in images])


def _class_images(
    request: RunRequest, config: TrainingConfig, parts: BaseParts, say: Say
) -> list[RunImage]:
    """The user's own, or else the base's: as many for each class there is among the subjects."""
    if request.class_images or not config.prior:
        return request.class_images
    say({"type": "stage", "stage": "prior"})
    prompts = [class_prompt(config, one.class_noun) for one in subjects_of(request, config)]
    return [
        image
        for prompt in dict.fromkeys(prompts)
        for image in _drawn(prompt, request, config, parts, say)
    ]


def _drawn(
    prompt: str, request: RunRequest, config: TrainingConfig, parts: BaseParts, say: Say
) -> list[RunImage]:
    """Class images as the base draws them."""
    assert config.resolution is not None
    assert config.prior is not None
    with torch.inference_mode():
        drawn = prior_images(
            PriorRequest(
                base_fingerprint=request.base_fingerprint,
                prompt=prompt,
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
    files = zip(drawn.paths, drawn.digests, strict=True)
    return [RunImage(path=path, sha256=digest, caption=prompt) for path, digest in files]


def _features(prompts: list[str], request: RunRequest, parts: BaseParts) -> Text:
    """What the frozen text encoders make of them, and of the empty one what sampling does."""
    digest = canonical_digest(
        [component_digest(folder) for folder in sorted(parts.folder.glob("t*")) if folder.is_dir()]
    )
    texts = text_features(
        prompts, lambda words: parts.encode(words, ANY_SIZE), digest, request.cache / "text"
    )
    if not parts.blank_is_silent:
        return texts
    return texts.silenced(torch.tensor([not prompt for prompt in prompts]))


def _reference(
    prompts: list[str], request: RunRequest, config: TrainingConfig, parts: BaseParts
) -> Reference | None:
    """A base beside the one that the method will change, where its output is preserved."""
    if not config.output_preservation:
        return None
    bf16 = config.mixed_precision == "bf16"
    base = Denoiser(parts.take_frozen_unet(bf16=bf16), [], bf16=bf16)
    return Reference(base, _features(prompts, request, parts))


def _component(parts: BaseParts, name: str) -> dict[str, Any]:
    """A part's configuration, without loading the part."""
    config: dict[str, Any] = json.loads((parts.folder / name / "config.json").read_text())
    return config
