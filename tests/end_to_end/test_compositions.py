"""Two adapters merged by the API and a real worker, and painted by a real sampler."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from lookalike_api.client import Client
from lookalike_platform.blobs import open_blobs
from lookalike_platform.db.engine import migrate, open_database
from support_api import add_version
from support_pairs import trained_adapter
from support_stack import installation, running

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]

KINDS = {"rex": "pivotal", "tom": "custom_diffusion", "kim": "lora", "ann": "lora"}


@pytest.fixture(scope="module")
def client(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A running stack with adapters of several methods."""
    home = tmp_path_factory.mktemp("home")
    with installation("sqlite", "embedded", tiny_base, home) as settings:
        migrate(settings.database_url)
        db, blobs = open_database(settings.database_url), open_blobs(settings)
        for number, (name, kind) in enumerate(KINDS.items()):
            folder = tmp_path_factory.mktemp(name)
            method, file, _, _ = trained_adapter(tiny_base, folder, kind, number % 2)
            about: dict[str, Any] = {"base": str(tiny_base), "trigger": f"w{number}"}
            add_version(settings, db, blobs, name, method=method, weights=file, **about)
        db.close()
        with running(settings) as found:
            yield found


def merged(client: Client, *parents: Any, **wanted: Any) -> str:
    """The version's reference, once it is there."""
    name = "-".join(p if isinstance(p, str) else p["ref"] for p in parents)
    job = client.wait(client.compose(name, parents, **wanted)["id"])
    assert job["state"] == "succeeded"
    return str(job["result"]["ref"])


def painted(client: Client, prompt: str, *adapters: Any) -> Any:
    made = client.generate(prompt, adapters=adapters, steps=4, seed=5, wait=100)
    assert (made["state"], made["warnings"]) == ("succeeded", [])
    picture = Image.open(io.BytesIO(client.image(made["id"])))
    return numpy.asarray(picture, dtype=int)


def test_a_sum_paints_what_a_generation_with_all_parents_paints(client: Client) -> None:
    """Products and dense weights, learned words of both, and their names in prompts."""
    parents = ["rex", {"ref": "tom", "scale": 0.5}]
    ref = merged(client, *parents)
    paint = partial(painted, client)
    together = paint("<rex>, <tom>", *parents)
    whole = paint("<rex>, <tom>", ref)
    # One sums before it multiplies, the other after: at most one of 255 levels.
    assert abs(whole - together).max() <= 1
    assert abs(paint("<rex>", "rex") - paint("<rex>, <tom>", ref)).max() > 1
    again = paint("<rex-tom>", ref)
    assert abs(again - paint("<rex> and <tom>", ref)).max() == 0


def test_the_default_merge_of_loras_is_one_lora_with_its_lineage(client: Client) -> None:
    ref = merged(client, "kim", "ann")
    version = client.adapter_version(ref)
    assert version["method"] == "lora"
    lineage = version["manifest"]["lineage"]
    assert lineage["config"]["strategy"] == "ssr"
    assert [parent["ref"] for parent in lineage["parents"]] == ["kim@1", "ann@1"]
    alone = painted(client, "<kim>", "kim")
    assert abs(painted(client, "<kim>, <ann>", ref) - alone).max() > 1
