"""DreamBench: the subjects and prompts that personalization is measured on. Torch-free.

Thirty subjects, nine of them live, and 25 prompts for each kind (Ruiz et al. 2023, section 4.1; the
list is in the data set, github.com/google/dreambooth, CC BY 4.0).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_platform.files import canonical_digest, sha256_file

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})

_PLACES = (
    "a {subject} in the jungle",
    "a {subject} in the snow",
    "a {subject} on the beach",
    "a {subject} on a cobblestone street",
    "a {subject} on top of pink fabric",
    "a {subject} on top of a wooden floor",
    "a {subject} with a city in the background",
    "a {subject} with a mountain in the background",
    "a {subject} with a blue house in the background",
    "a {subject} on top of a purple rug in a forest",
)
_PROPERTIES = (
    "a red {subject}",
    "a purple {subject}",
    "a shiny {subject}",
    "a wet {subject}",
    "a cube shaped {subject}",
)
OBJECT_PROMPTS = (
    *_PLACES,
    "a {subject} with a wheat field in the background",
    "a {subject} with a tree and autumn leaves in the background",
    "a {subject} with the Eiffel Tower in the background",
    "a {subject} floating on top of water",
    "a {subject} floating in an ocean of milk",
    "a {subject} on top of green grass with sunflowers around it",
    "a {subject} on top of a mirror",
    "a {subject} on top of the sidewalk in a crowded street",
    "a {subject} on top of a dirt road",
    "a {subject} on top of a white rug",
    *_PROPERTIES,
)
LIVE_PROMPTS = (
    *_PLACES,
    "a {subject} wearing a red hat",
    "a {subject} wearing a santa hat",
    "a {subject} wearing a rainbow scarf",
    "a {subject} wearing a black top hat and a monocle",
    "a {subject} in a chef outfit",
    "a {subject} in a firefighter outfit",
    "a {subject} in a police outfit",
    "a {subject} wearing pink glasses",
    "a {subject} wearing a yellow shirt",
    "a {subject} in a purple wizard outfit",
    *_PROPERTIES,
)

_LIVE = {"cat": ("cat", "cat2"), "dog": ("dog", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8")}
_OBJECTS = {
    "backpack": ("backpack", "backpack_dog"),
    "stuffed animal": ("bear_plushie", "grey_sloth_plushie", "wolf_plushie"),
    "bowl": ("berry_bowl",),
    "can": ("can",),
    "candle": ("candle",),
    "clock": ("clock",),
    "sneaker": ("colorful_sneaker", "shiny_sneaker"),
    "toy": ("duck_toy", "monster_toy", "poop_emoji", "rc_car", "robot_toy"),
    "boot": ("fancy_boot",),
    "glasses": ("pink_sunglasses",),
    "cartoon": ("red_cartoon",),
    "teapot": ("teapot",),
    "vase": ("vase",),
}


class About(BaseModel):
    """`subject.json` beside the photos, for subjects that are not DreamBench's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_noun: str = Field(min_length=1, max_length=100)
    live: bool = False


KNOWN = {
    name: About(class_noun=noun, live=kind is _LIVE)
    for kind in (_LIVE, _OBJECTS)
    for noun, names in kind.items()
    for name in names
}


@dataclass(frozen=True)
class Subject:
    name: str
    about: About
    photos: tuple[Path, ...]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The 25 prompts of its kind, with `{subject}` for what it is called."""
        return LIVE_PROMPTS if self.about.live else OBJECT_PROMPTS

    @property
    def digest(self) -> str:
        """Of all that decides what is learned: photos, their order, and the class noun."""
        photos = [sha256_file(photo) for photo in self.photos]
        return canonical_digest([photos, self.about.model_dump()])


def read_subjects(folder: Path) -> list[Subject]:
    """The subjects of a folder, one a subfolder, by name.

    Raises InvalidRequest, naming each subfolder that cannot be used, or a folder without any.
    """
    if not folder.is_dir():
        raise InvalidRequest(f"There is no folder {folder}.")
    subjects, problems = [], []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        photos = sorted(p for p in place.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES)
        try:
            if not photos:
                raise InvalidRequest("has no photos (.jpg, .png, .webp)")
            subjects.append(Subject(place.name, _about(place), tuple(photos)))
        except InvalidRequest as error:
            problems.append(FieldProblem(place.name, error.detail))
    if problems:
        raise InvalidRequest(f"Not every folder in {folder} is a subject.", problems)
    if not subjects:
        raise InvalidRequest(f"{folder} has no folders of photos in it, one a subject.")
    return subjects


def _about(place: Path) -> About:
    file = place / "subject.json"
    try:
        return About.model_validate(json.loads(file.read_bytes()))
    except FileNotFoundError:
        if place.name in KNOWN:
            return KNOWN[place.name]
        raise InvalidRequest(
            'is no subject of DreamBench: say what it is in a subject.json, {"class_noun": "dog", '
            '"live": true}'
        ) from None
    except (ValueError, ValidationError) as error:
        raise InvalidRequest(f"its subject.json cannot be used: {error}") from error
