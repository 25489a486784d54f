"""The client's calls, by what they are about."""

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from lookalike_api.client.connection import Connection, Json, error_from
from lookalike_api.client.following import follow
from lookalike_api.client.photos import media_type, name_of, photos_of
from lookalike_platform.errors import InvalidRequest


class Client:
    """A connection to one Lookalike API. Close it, or use it in a `with` block.

    Args:
        url: where the API listens, without `/v1`.
        timeout: seconds without an answer after which a request fails.
        patience: seconds that `wait` and `events` go on looking for an API that went away.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8760",
        *,
        timeout: float = 60.0,
        patience: float = 60.0,
    ) -> None:
        self.url = url.rstrip("/")
        self.patience = patience
        self._api = Connection(self.url, timeout)

    def close(self) -> None:
        self._api.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Subject sets

    def add_subject_set(
        self,
        photos: str | Path | Iterable[str | Path],
        *,
        class_noun: str,
        name: str | None = None,
        captions: Mapping[str, str] | None = None,
    ) -> Json:
        """Upload a folder of photos, a zip file, or the files given.

        A folder's `photo.txt` beside `photo.jpg` is its caption, unless `captions` names it.
        """
        files, found = photos_of(photos)
        fields = {
            "name": name or name_of(photos),
            "class_noun": class_noun,
            "captions": json.dumps({**found, **(captions or {})}),
        }
        with ExitStack() as opened:
            parts = [
                (
                    "archive" if file.suffix.lower() == ".zip" else "images",
                    (file.name, opened.enter_context(file.open("rb")), media_type(file)),
                )
                for file in files
            ]
            return self._api.json("POST", "/v1/subject-sets", data=fields, files=parts)

    def subject_sets(self) -> Iterator[Json]:
        return self._api.pages("/v1/subject-sets")

    def subject_set(self, set_id: str) -> Json:
        return self._api.json("GET", f"/v1/subject-sets/{set_id}")

    def subject_image(self, set_id: str, position: int) -> bytes:
        """One accepted photo as the trainer sees it: PNG bytes."""
        return self._api.send("GET", f"/v1/subject-sets/{set_id}/images/{position}").content

    def delete_subject_set(self, set_id: str) -> None:
        self._api.send("DELETE", f"/v1/subject-sets/{set_id}")

    # Images

    def add_image(self, file: str | Path) -> Json:
        """Upload a picture to start from, or a mask (white where to paint)."""
        file = Path(file)
        with file.open("rb") as opened:
            parts = {"image": (file.name, opened, media_type(file))}
            return self._api.json("POST", "/v1/images", files=parts)

    def images(self) -> Iterator[Json]:
        return self._api.pages("/v1/images")

    def image_file(self, image_id: str) -> bytes:
        """The image as it is kept: PNG bytes."""
        return self._api.send("GET", f"/v1/images/{image_id}/file").content

    def delete_image(self, image_id: str) -> None:
        self._api.send("DELETE", f"/v1/images/{image_id}")

    # Jobs

    def train(
        self,
        subject_set: str,
        *,
        method: str = "lora",
        base_model: str | None = None,
        concept: str | None = None,
        config: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        dry_run: bool = False,
    ) -> Json:
        """Submit a training job and return it; with `dry_run` return its cost preview instead."""
        body = _given(
            method=method,
            subject_set=subject_set,
            base_model=base_model,
            concept=concept,
            config=dict(config or {}),
        )
        return self._api.json(
            "POST",
            "/v1/jobs",
            params={"dry_run": "true"} if dry_run else None,
            headers=_given(**{"Idempotency-Key": idempotency_key}),
            json=body,
        )

    def jobs(
        self, *, state: str | None = None, kind: str | None = None, method: str | None = None
    ) -> Iterator[Json]:
        """All jobs, newest first."""
        return self._api.pages("/v1/jobs", **_given(state=state, kind=kind, method=method))

    def job(self, job_id: str) -> Json:
        return self._api.json("GET", f"/v1/jobs/{job_id}")

    def attempts(self, job_id: str) -> list[Json]:
        return self._api.items(f"/v1/jobs/{job_id}/attempts")

    def cancel(self, job_id: str) -> Json:
        """Ask a job to stop: {"outcome": "canceled" | "requested" | "finished", "job": …}."""
        return self._api.json("POST", f"/v1/jobs/{job_id}/cancel")

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Json]:
        """Follow a job's events to its end, reconnecting where the stream broke off.

        Yields {"type": "state" | "message" | "metrics" | "image", "seq", "level", "payload",
        "created_at"} once each and in order, and between them {"type": "progress", "payload":
        {"state", "step", "total", …}} snapshots, which are not kept by the server.
        """
        return follow(self._api, job_id, after, self.patience)

    def wait(
        self,
        job_id: str,
        on_progress: Callable[[Json], object] | None = None,
        on_event: Callable[[Json], object] | None = None,
    ) -> Json:
        """Wait for a job's end and return it; `state` is then `succeeded` or `canceled`.

        Args:
            on_progress: called with {"state", "step", "total", "loss", …} as it changes.
            on_event: called with every kept event (see `events`).

        Raises:
            LookalikeError: the job failed; the error says why and what to do.
        """
        for event in self.events(job_id):
            if event["type"] == "progress":
                if on_progress:
                    on_progress(event["payload"])
            elif on_event:
                on_event(event)
        job = self.job(job_id)
        if job["state"] == "failed":
            raise error_from(job["error"])
        return job

    # Adapters

    def adapters(self) -> list[Json]:
        """Every adapter with its number of versions, newest and default version, and aliases."""
        return list(self._api.pages("/v1/adapters"))

    def adapter_versions(self, name: str) -> list[Json]:
        return self._api.items(f"/v1/adapters/{name}/versions")

    def adapter_version(self, ref: str) -> Json:
        """The version that `name`, `name@alias` or `name@3` means now."""
        name, at, label = ref.partition("@")
        if not at:
            label = self._api.json("GET", f"/v1/adapters/{name}")["default_version"]
            if label is None:
                raise InvalidRequest(
                    f"{name} has neither a production nor a candidate version: say {name}@3."
                )
        return self._api.json("GET", f"/v1/adapters/{name}/versions/{label}")

    def set_alias(self, name: str, alias: str, version: int) -> Json:
        return self._api.json(
            "PUT", f"/v1/adapters/{name}/aliases/{alias}", json={"version": version}
        )

    def delete_version(self, name: str, version: int) -> None:
        self._api.send("DELETE", f"/v1/adapters/{name}/versions/{version}")

    def download(self, ref: str, folder: str | Path) -> list[Path]:
        """Save an adapter version's files (`name`, `name@alias` or `name@3`) into a folder."""
        version = self.adapter_version(ref)
        at = f"/v1/adapters/{version['name']}/versions/{version['version']}/files"
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        saved = []
        for name in version["files"]:
            path = target / Path(name).name
            with path.open("wb") as file:
                self._api.fetch(f"{at}/{name}", file)
            saved.append(path)
        return saved

    def export(
        self, ref: str, form: str, folder: str | Path, rank: int | None = None
    ) -> tuple[list[Path], float]:
        """Save an adapter version as other programs load it: diffusers, lora, kohya or model.

        rank: of a LoRA made of a dense change, DreamBooth's, SVDiff's or Custom Diffusion's.

        Returns:
            the files, and which part of the change (0 to 1) a LoRA could not hold.
        """
        version = self.adapter_version(ref)
        at = f"/v1/adapters/{version['name']}/versions/{version['version']}/export"
        wanted = {"format": form} | ({"rank": rank} if rank else {})
        target = Path(folder)
        with tempfile.TemporaryFile() as file:
            headers = self._api.fetch(at, file, params=wanted, timeout=1860.0)
            with zipfile.ZipFile(file) as archive:
                saved = [Path(archive.extract(name, target)) for name in archive.namelist()]
        return saved, float(headers["Lookalike-Left-Out"])

    def import_adapter(
        self,
        files: Sequence[str | Path],
        *,
        name: str,
        class_noun: str,
        trigger: str,
        base: str | None = None,
    ) -> Json:
        """Make a version of another program's adapter: a file, or weights and a learned word."""
        fields = {"name": name, "class_noun": class_noun, "trigger": trigger}
        if base:
            fields["base_model"] = base
        with ExitStack() as opened:
            parts = [
                ("files", (Path(file).name, opened.enter_context(Path(file).open("rb"))))
                for file in files
            ]
            return self._api.json("POST", "/v1/imports", data=fields, files=parts, timeout=1860.0)

    # Pictures

    def generate(
        self,
        prompt: str,
        *,
        adapters: Sequence[str | Mapping[str, Any]] = (),
        base: str | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        dynamic_threshold: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        seed: int | None = None,
        width: int | None = None,
        height: int | None = None,
        num_images: int | None = None,
        init_image: str | Path | None = None,
        strength: float | None = None,
        mask_image: str | Path | None = None,
        regions: Sequence[Mapping[str, Any]] = (),
        compose: str | None = None,
        deterministic: bool | None = None,
        deadline_seconds: float | None = None,
        wait: float = 0,
        idempotency_key: str | None = None,
    ) -> Json:
        """Ask for pictures; what is left out takes the API's default.

        Args:
            adapters: `"name"`, `"name@alias"`, `"name@3"` or {"ref": …, "scale": 0.8}.
            init_image, mask_image: ids of uploaded images, or paths of files to upload.
            regions: {"prompt": …, "adapters": as above, "box": [left, top, right, bottom] in shares
                of the picture, or "mask_image": as above} each; later ones lie over earlier ones.
            compose: how regions come together, "attention" or "latents".
            wait: seconds to wait for the pictures; the answer's `state` says how far it came.
        """
        body = _given(
            prompt=prompt,
            adapters=_uses(adapters),
            base=base,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=None if guidance_interval is None else list(guidance_interval),
            dynamic_threshold=dynamic_threshold,
            steps=steps,
            sampler=sampler,
            eta=eta,
            seed=seed,
            width=width,
            height=height,
            num_images=num_images,
            init_image=self._image_id(init_image),
            strength=strength,
            mask_image=self._image_id(mask_image),
            regions=[self._region(region) for region in regions] or None,
            compose=compose,
            deterministic=deterministic,
            deadline_seconds=deadline_seconds,
        )
        return self._api.json(
            "POST",
            "/v1/generations",
            params={"wait": wait} if wait else None,
            headers=_given(**{"Idempotency-Key": idempotency_key}),
            json=body,
            timeout=self._api.timeout + wait,
        )

    def _region(self, region: Mapping[str, Any]) -> Json:
        mask = self._image_id(region.get("mask_image"))
        known = {"adapters": _uses(region.get("adapters", ())), **_given(mask_image=mask)}
        return {**region, **known}

    def _image_id(self, image: str | Path | None) -> str | None:
        if image is None or (isinstance(image, str) and image.startswith("img_")):
            return image
        uploaded: str = self.add_image(image)["id"]
        return uploaded

    def generation(self, generation_id: str) -> Json:
        return self._api.json("GET", f"/v1/generations/{generation_id}")

    def image(self, generation_id: str, index: int = 0) -> bytes:
        """One picture: PNG bytes with their parameters in a text chunk."""
        return self._api.send("GET", f"/v1/generations/{generation_id}/images/{index}").content

    def save_images(self, generation: Json, folder: str | Path) -> list[Path]:
        """Write a finished generation's pictures as `<id>-0.png`, `<id>-1.png`, …"""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        saved = []
        for index in range(len(generation["images"])):
            path = target / f"{generation['id']}-{index}.png"
            path.write_bytes(self.image(generation["id"], index))
            saved.append(path)
        return saved

    # Figures

    def evaluate(
        self,
        adapter: str,
        *,
        subject_set: str | None = None,
        prompts: Sequence[str] | None = None,
        images_per_prompt: int | None = None,
        class_images: int | None = None,
        seed: int | None = None,
        idempotency_key: str | None = None,
    ) -> Json:
        """Ask how good an adapter version is; `wait` for its id, then get the `evaluation`.

        Args:
            adapter: `"name"`, `"name@alias"` or `"name@3"`.
            prompts: with `{subject}` in each, "a {subject} in the snow".
        """
        body = _given(
            adapter=adapter,
            subject_set=subject_set,
            prompts=None if prompts is None else list(prompts),
            images_per_prompt=images_per_prompt,
            class_images=class_images,
            seed=seed,
        )
        headers = _given(**{"Idempotency-Key": idempotency_key})
        return self._api.json("POST", "/v1/evaluations", headers=headers, json=body)

    def evaluation(self, evaluation_id: str) -> Json:
        return self._api.json("GET", f"/v1/evaluations/{evaluation_id}")

    # Compositions

    def compose(
        self,
        name: str,
        parents: Sequence[str | Mapping[str, Any]],
        *,
        strategy: str | None = None,
        options: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Json:
        """Merge adapters into a version of `name`: the job, whose `result` names it at the end.

        Args:
            parents: `"rex@3"` or {"ref": "rex@3", "scale": 0.8}, 2 to 12 of them.
            strategy: left out, the first that takes all parents (`composition_rules`).
            options: those the strategy has: rank, density, seed.
        """
        body = _given(
            name=name,
            parents=[{"ref": p} if isinstance(p, str) else dict(p) for p in parents],
            strategy=strategy,
            options=None if options is None else dict(options),
        )
        headers = _given(**{"Idempotency-Key": idempotency_key})
        return self._api.json("POST", "/v1/compositions", headers=headers, json=body)

    def composition_rules(self) -> Json:
        """What combines with what, how, and why not."""
        return self._api.json("GET", "/v1/compositions/rules")

    # What is there

    def base_models(self) -> list[Json]:
        return self._api.items("/v1/base-models")

    def methods(self) -> list[Json]:
        """Training methods with the JSON schema of their config."""
        return self._api.items("/v1/methods")

    def samplers(self) -> list[Json]:
        return self._api.items("/v1/samplers")

    def ready(self) -> Json:
        """What the API knows about its database, broker and workers.

        Raises:
            LookalikeError: the API does not answer, or is not ready and says why.
        """
        return self._api.json("GET", "/readyz")


def _uses(adapters: Sequence[str | Mapping[str, Any]]) -> list[Json]:
    return [{"ref": one} if isinstance(one, str) else dict(one) for one in adapters]


def _given(**values: Any) -> Json:
    return {key: value for key, value in values.items() if value is not None}
