"""The words a run trains on."""

import re

from lookalike_trainers.config import TrainingConfig
from lookalike_trainers.method_configs import TextualInversionConfig
from lookalike_trainers.templates import TEMPLATES


def instance_captions(caption: str | None, config: TrainingConfig, class_noun: str) -> list[str]:
    """The training prompts of a photo: its own caption with the trigger in it, or the run's.

    The trigger goes before the first mention of the class noun: "a dog asleep" becomes
    "a sks dog asleep"; a caption without the noun is put after "sks dog, ". A run has one prompt,
    or a set of templates.
    """
    if not caption:
        if isinstance(config, TextualInversionConfig) and config.templates:
            return [template.format(config.trigger) for template in TEMPLATES[config.templates]]
        # config.py allows no other placeholder
        return [config.prompt.format(trigger=config.trigger, class_noun=class_noun)]
    if _mention(config.trigger).search(caption):
        return [caption]
    subject = config.phrase.format(trigger=config.trigger, class_noun=class_noun)
    named, mentions = _mention(class_noun).subn(lambda _: subject, caption, count=1)
    return [named if mentions else f"{subject}, {caption}"]


def class_caption(caption: str, config: TrainingConfig, class_noun: str) -> str:
    """A training prompt of the class alone: "a sks dog asleep" becomes "a dog asleep"."""
    named = f"{config.trigger} {class_noun}"
    called = config.phrase.format(trigger=config.trigger, class_noun=class_noun)
    for subject in (called, named, config.trigger):
        words = r"\s+".join(re.escape(word) for word in subject.split())
        pattern = rf"(?<!\w){words}(?!\w)"
        caption = re.sub(pattern, lambda _: class_noun, caption, flags=re.IGNORECASE)
    return caption


def class_prompt(config: TrainingConfig, class_noun: str) -> str:
    """The prompt of prior images (Ruiz et al. 2023: "a [class noun]")."""
    given = config.prior.prompt if config.prior else None
    return given or f"a {class_noun}"


def validation_prompt(config: TrainingConfig, class_noun: str) -> str | None:
    """What is drawn while training goes on."""
    if config.validation is None:
        return None
    prompt = config.validation.prompt or f"a {config.phrase}"
    return prompt.format(trigger=config.trigger, class_noun=class_noun)


def _mention(words: str) -> re.Pattern[str]:
    """The words as a whole, in any case: "cat" is not in "caterpillar"."""
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)", re.IGNORECASE)
