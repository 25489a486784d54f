"""On the bundled base: what is trained on the photos looks more like them than the base does."""

from io import BytesIO
from pathlib import Path
from statistics import mean

import pytest
from PIL import Image

from lookalike_api.cli import demo
from lookalike_api.client import Client
from lookalike_api.stack import free_port
from lookalike_platform.settings import Settings
from support_descriptors import likeness
from support_stack import running

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

PROMPTS = [
    "a 3d render of a {} on a green background",
    "a 3d render of a {} on a red background",
    "a 3d render of a {} on the beach",
]


def paint(client: Client, prompt: str, adapters: list[str]) -> list[Image.Image]:
    made = client.generate(
        prompt, adapters=adapters, seed=3, guidance_scale=4, steps=20, num_images=3
    )
    client.wait(made["id"])
    return [Image.open(BytesIO(client.image(made["id"], number))) for number in range(3)]


def test_pictures_of_the_trained_subject_are_closer_to_its_photos_than_the_bases_own(
    tmp_path: Path,
) -> None:
    settings = Settings(home=tmp_path, api_port=free_port("127.0.0.1"), device="cpu")
    with running(settings) as client:
        subject = client.add_subject_set(demo.photos(), class_noun="robot", name="bibo")
        photos = [
            Image.open(BytesIO(client.subject_image(subject["id"], image["position"])))
            for image in subject["images"]
        ]
        jobs = [
            client.train(
                subject["id"], concept=f"bibo-{seed}", config={"steps": 200, "seed": seed}
            )["id"]
            for seed in range(3)
        ]
        base = {
            prompt: mean(
                likeness(picture, photos)
                for picture in paint(client, prompt.format("sks robot"), [])
            )
            for prompt in PROMPTS
        }
        for seed, job_id in enumerate(jobs):
            client.wait(job_id)
            name = f"bibo-{seed}"
            ours = {
                prompt: mean(
                    likeness(picture, photos)
                    for picture in paint(client, prompt.format(f"<{name}>"), [name])
                )
                for prompt in PROMPTS
            }
            assert mean(ours.values()) > mean(base.values()), (seed, ours, base)
