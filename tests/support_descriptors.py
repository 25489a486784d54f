"""How alike two pictures are, by descriptors that no training had a part in."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Vector = NDArray[np.float64]

SIDE, CELL, BINS = 64, 8, 9
COLOURS = 6  # levels of each channel in the colour histogram


def likeness(picture: Image.Image, photos: list[Image.Image]) -> float:
    """Mean cosine between a picture and the photos, -1..1: half by shape, half by colour."""
    ours = descriptor(picture)
    return float(np.mean([ours @ descriptor(photo) for photo in photos]))


def descriptor(picture: Image.Image) -> Vector:
    """Shape and colour of a picture as one vector of length 1."""
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(small, np.float64) / 255
    return np.concatenate([shape(pixels), colours(pixels)]) / np.sqrt(2)


def shape(pixels: Vector) -> Vector:
    """Histograms of oriented gradients (Dalal & Triggs 2005), [SIDE, SIDE, 3] → length 1.

    Unsigned orientations in 9 bins over cells of 8 x 8 pixels, each vote split between the two
    nearest bins; blocks of 2 x 2 cells normalized by L2-Hys (clipped at 0.2).
    """
    down, right = np.gradient(pixels, axis=(0, 1))
    strength = np.hypot(down, right)
    strongest = strength.argmax(-1)[..., None]  # the channel with the largest gradient counts
    strength = np.take_along_axis(strength, strongest, -1)[..., 0]
    angle = np.take_along_axis(np.arctan2(down, right), strongest, -1)[..., 0] % np.pi
    place = angle / np.pi * BINS - 0.5
    lower = np.floor(place).astype(int)
    cells = np.zeros((SIDE // CELL, SIDE // CELL, BINS))
    row, column = np.indices((SIDE, SIDE)) // CELL
    for bins, share in ((lower, lower + 1 - place), (lower + 1, place - lower)):
        np.add.at(cells, (row, column, bins % BINS), strength * share)
    blocks = np.concatenate(
        [cells[:-1, :-1], cells[:-1, 1:], cells[1:, :-1], cells[1:, 1:]], axis=-1
    )
    blocks = np.minimum(_unit(blocks), 0.2)
    return _unit(_unit(blocks).ravel())


def colours(pixels: Vector) -> Vector:
    """Square roots of the colour histogram of the middle, where the subject is: length 1."""
    edge = SIDE // 5
    middle = pixels[edge:-edge, edge:-edge].reshape(-1, 3)
    levels = np.minimum((middle * COLOURS).astype(int), COLOURS - 1)
    codes = levels @ np.array([COLOURS**2, COLOURS, 1])
    return np.sqrt(np.bincount(codes, minlength=COLOURS**3) / len(codes))


def _unit(vectors: Vector) -> Vector:
    """Vectors of the last axis at length 1; those of no length stay so."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Vector = vectors / np.maximum(lengths, 1e-8)
    return unit
