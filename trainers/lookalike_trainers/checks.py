"""What would let a run learn nothing of its photos without a word, refused before the work."""

from collections.abc import Callable, Sequence
from typing import Any

from lookalike_datasets.features.views import Photo
from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.prompts import instance_captions
from lookalike_trainers.run_request import RunImage, RunRequest
from lookalike_trainers.subjects import Subject, subjects_of
from lookalike_trainers.views import photo_views

_NAMED = 5
"""Photos that an error names; of more it tells the number."""


def check_words(request: RunRequest, config: TrainingConfig, parts: BaseParts) -> None:
    """Raises InvalidRequest where a learned word is not in a caption as one, and where a subject's
    word stands behind what the text encoders read.

    Steps would go by, and the word be in none of them.
    """
    length = min(tokenizer.model_max_length for tokenizer in parts.tokenizers)
    for subject in subjects_of(request, config):
        word = subject.config.trigger
        if config.token_vectors:
            _check_said(subject, parts)
        unread = [
            image
            for image in subject.images
            if not all(parts.reads(caption, word) for caption in _captions(image, subject))
        ]
        never = f"The base reads {length} tokens of a caption, and so not the whole of {word!r}"
        if captioned := [image for image in unread if image.caption]:
            raise InvalidRequest(
                f"{never} in that of {_names(captioned)}: put the subject nearer to the "
                "beginning, or shorten the caption."
            )
        if unread:
            remedy = "shorten `prompt`, or take fewer token_vectors or a shorter trigger"
            if getattr(config, "templates", None):
                remedy = "take fewer token_vectors, or templates null and a short `prompt`"
            raise InvalidRequest(
                f"{never} in what photos without a caption are called: {remedy}.",
                [FieldProblem("config.prompt", f"{word} comes too late in it")],
            )


def check_masks(
    request: RunRequest, config: TrainingConfig, say: Callable[[dict[str, Any]], None]
) -> None:
    """Raises InvalidRequest where a masked loss has not one mask; says where it has too few."""
    if not config.masked_loss:
        return
    images = [image for subject in subjects_of(request, config) for image in subject.images]
    bare = [image for image in images if not Photo(image.path, image.sha256).masked]
    if len(bare) == len(images):
        raise InvalidRequest(
            "With masked_loss the transparent parts of photos are not learned, and none of these "
            "has any: upload cut-outs, or masks beside the photos (rex.mask.png for rex.jpg), or "
            "leave masked_loss out.",
            [FieldProblem("config.masked_loss", "no photo has a mask")],
        )
    if bare:
        text = f"{len(bare)} of {len(images)} photos have no mask and are learned whole: "
        say({"type": "message", "level": "warning", "text": text + _names(bare)})


def _check_said(subject: Subject, parts: BaseParts) -> None:
    word = subject.config.trigger
    for image in subject.images:
        for caption in _captions(image, subject):
            if not parts.says(caption, word):
                raise InvalidRequest(
                    f"{image.called} would be learned as {caption!r}, where {word!r} is no word of "
                    "its own: write it in caption or `prompt` with no brackets or letters around."
                )


def _captions(image: RunImage, subject: Subject) -> set[str]:
    """All that a photo is learned under; its views say more than its caption (`sizes`)."""
    photo = Photo(image.path, image.sha256)
    return {
        view.caption
        for caption in instance_captions(image.caption, subject.config, subject.class_noun)
        for view in photo_views(photo, caption, (1, 1), subject.config)
    }


def _names(images: Sequence[RunImage]) -> str:
    more = f" and {len(images) - _NAMED} more" if len(images) > _NAMED else ""
    return ", ".join(image.called for image in images[:_NAMED]) + more
