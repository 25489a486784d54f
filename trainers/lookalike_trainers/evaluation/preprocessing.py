"""Pictures as pretrained encoders want them, after their preprocessor_config.json. Torch.

Done with Pillow: the processors of transformers that are its default need torchvision.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lookalike_platform.errors import InvalidRequest

_Three = tuple[float, float, float]


class _Config(BaseModel):
    """The keys that decide something, with the defaults of transformers where files omit them."""

    model_config = ConfigDict(extra="ignore")

    do_resize: bool = True
    size: int | dict[str, int] = 224
    resample: int = Field(default=int(Image.Resampling.BICUBIC), ge=0, le=5)
    do_center_crop: bool = False
    crop_size: int | dict[str, int] = 224
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: _Three
    image_std: _Three


@dataclass(frozen=True)
class Preprocessing:
    """Resize, cut out the middle, scale to [0, 1], subtract the mean, divide by the deviation."""

    config: _Config

    @classmethod
    def read(cls, folder: Path) -> "Preprocessing":
        """Raises InvalidRequest if the folder has no such file, or an unusable one."""
        file = folder / "preprocessor_config.json"
        try:
            return cls(_Config.model_validate(json.loads(file.read_bytes())))
        except FileNotFoundError:
            raise InvalidRequest(
                f"The encoder in {folder} has no preprocessor_config.json, which says how it wants "
                "its pictures: copy it from where the encoder comes from."
            ) from None
        except (ValueError, ValidationError) as error:
            raise InvalidRequest(f"{file} cannot be used: {error}") from error

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """[3, height, width] of a picture."""
        config = self.config
        picture = image.convert("RGB")
        if config.do_resize:
            picture = picture.resize(self._resized(picture), Image.Resampling(config.resample))
        if config.do_center_crop:
            picture = _middle(picture, *_sides(config.crop_size))
        values = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1).float()
        if config.do_rescale:
            values = values * config.rescale_factor
        if config.do_normalize:
            mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
            values = (values - mean[:, None, None]) / std[:, None, None]
        return values

    def _resized(self, picture: Image.Image) -> tuple[int, int]:
        """Width and height to resize to. A single number is the shortest edge where the middle is
        cut out afterwards (CLIP), and both sides where it is not (ViT)."""
        size = self.config.size
        shortest = size.get("shortest_edge") if isinstance(size, dict) else None
        if isinstance(size, int) and self.config.do_center_crop:
            shortest = size
        if shortest is None:
            height, width = _sides(size)
            return width, height
        short, long = sorted(picture.size)
        longer = int(shortest * long / short)
        return (shortest, longer) if picture.width <= picture.height else (longer, shortest)


def _sides(size: int | dict[str, int]) -> tuple[int, int]:
    """Height and width."""
    if isinstance(size, int):
        return size, size
    try:
        return size["height"], size["width"]
    except KeyError as missing:
        raise InvalidRequest(f"preprocessor_config.json gives a size without {missing}.") from None


def _middle(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The middle; where the picture is too small, black around it."""
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
