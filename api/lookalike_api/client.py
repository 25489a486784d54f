"""Python client of the HTTP API.

    with Client("http://127.0.0.1:8760") as look:
        photos = look.add_subject_set("photos/", class_noun="dog")
        job = look.train(photos["id"], concept="rex")
        look.wait(job["id"], on_progress=print)
        picture = look.generate("<rex> on the moon", adapters=["rex"], wait=60)
        look.save_images(picture, "out/")

Answers are the API's JSON objects as dictionaries. Every error the API reports is raised as the
LookalikeError it was on the server, with its field paths.
"""

import json
import mimetypes
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Self

import httpx

from lookalike_platform import errors
from lookalike_platform.errors import FieldProblem, InvalidRequest, LookalikeError

Json = dict[str, Any]

FINAL_STATES = frozenset({"succeeded", "failed", "canceled"})
PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})


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
        # Lookalike's API is asked directly: no proxy of the environment stands in between.
        self._http = httpx.Client(base_url=self.url, timeout=timeout, trust_env=False)

    def close(self) -> None:
        self._http.close()

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
        files, found = _photos(photos)
        fields = {
            "name": name or _name_of(photos),
            "class_noun": class_noun,
            "captions": json.dumps({**found, **(captions or {})}),
        }
        with ExitStack() as opened:
            parts = [
                (
                    "archive" if file.suffix.lower() == ".zip" else "images",
                    (file.name, opened.enter_context(file.open("rb")), _media_type(file)),
                )
                for file in files
            ]
            return self._json("POST", "/v1/subject-sets", data=fields, files=parts)

    def subject_sets(self) -> Iterator[Json]:
        return self._pages("/v1/subject-sets")

    def subject_set(self, set_id: str) -> Json:
        return self._json("GET", f"/v1/subject-sets/{set_id}")

    def subject_image(self, set_id: str, position: int) -> bytes:
        """One accepted photo as the trainer sees it: PNG bytes."""
        return self._send("GET", f"/v1/subject-sets/{set_id}/images/{position}").content

    def delete_subject_set(self, set_id: str) -> None:
        self._send("DELETE", f"/v1/subject-sets/{set_id}")

    # Images

    def add_image(self, file: str | Path) -> Json:
        """Upload a picture to start from, or a mask (white where to paint)."""
        file = Path(file)
        with file.open("rb") as opened:
            parts = {"image": (file.name, opened, _media_type(file))}
            return self._json("POST", "/v1/images", files=parts)

    def images(self) -> Iterator[Json]:
        return self._pages("/v1/images")

    def image_file(self, image_id: str) -> bytes:
        """The image as it is kept: PNG bytes."""
        return self._send("GET", f"/v1/images/{image_id}/file").content

    def delete_image(self, image_id: str) -> None:
        self._send("DELETE", f"/v1/images/{image_id}")

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
        return self._json(
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
        return self._pages("/v1/jobs", **_given(state=state, kind=kind, method=method))

    def job(self, job_id: str) -> Json:
        return self._json("GET", f"/v1/jobs/{job_id}")

    def attempts(self, job_id: str) -> list[Json]:
        return self._list(f"/v1/jobs/{job_id}/attempts")

    def cancel(self, job_id: str) -> Json:
        """Ask a job to stop: {"outcome": "canceled" | "requested" | "finished", "job": …}."""
        return self._json("POST", f"/v1/jobs/{job_id}/cancel")

    def events(self, job_id: str, *, after: int = 0) -> Iterator[Json]:
        """Follow a job's events to its end, reconnecting where the stream broke off.

        Yields {"type": "state" | "message" | "metrics" | "image", "seq", "level", "payload",
        "created_at"} once each and in order, and between them {"type": "progress", "payload":
        {"state", "step", "total", …}} snapshots, which are not kept by the server.
        """
        last, lost_since = after, None
        while True:
            try:
                for event in self._stream(f"/v1/jobs/{job_id}/events", last):
                    lost_since = None
                    last = event.get("seq", last)
                    yield event
                    if event["type"] == "state" and event["payload"]["state"] in FINAL_STATES:
                        return
                # An orderly end: the job is finished, or the server is going away.
                if self._ask("GET", f"/v1/jobs/{job_id}").json()["state"] in FINAL_STATES:
                    return
            except httpx.TransportError as error:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > self.patience:
                    raise self._unreachable(error) from error
            time.sleep(0.5)

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
            raise _error_from(job["error"])
        return job

    # Adapters

    def adapters(self) -> list[Json]:
        """Every adapter with its number of versions, newest and default version, and aliases."""
        return list(self._pages("/v1/adapters"))

    def adapter_versions(self, name: str) -> list[Json]:
        return self._list(f"/v1/adapters/{name}/versions")

    def adapter_version(self, ref: str) -> Json:
        """The version that `name`, `name@alias` or `name@3` means now."""
        name, at, label = ref.partition("@")
        if not at:
            label = self._json("GET", f"/v1/adapters/{name}")["default_version"]
            if label is None:
                raise InvalidRequest(
                    f"{name} has neither a production nor a candidate version: say {name}@3."
                )
        return self._json("GET", f"/v1/adapters/{name}/versions/{label}")

    def set_alias(self, name: str, alias: str, version: int) -> Json:
        return self._json("PUT", f"/v1/adapters/{name}/aliases/{alias}", json={"version": version})

    def delete_version(self, name: str, version: int) -> None:
        self._send("DELETE", f"/v1/adapters/{name}/versions/{version}")

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
                self._fetch(f"{at}/{name}", file)
            saved.append(path)
        return saved

    def export(
        self, ref: str, form: str, folder: str | Path, rank: int | None = None
    ) -> tuple[list[Path], float]:
        """Save an adapter version as other programs load it: diffusers, lora, kohya or model.

        rank: of a LoRA made of a dense change, DreamBooth's or Custom Diffusion's.

        Returns:
            the files, and which part of the change (0 to 1) a LoRA could not hold.
        """
        version = self.adapter_version(ref)
        at = f"/v1/adapters/{version['name']}/versions/{version['version']}/export"
        wanted = {"format": form} | ({"rank": rank} if rank else {})
        target = Path(folder)
        with tempfile.TemporaryFile() as file:
            headers = self._fetch(at, file, params=wanted, timeout=300.0)
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
            return self._json("POST", "/v1/imports", data=fields, files=parts, timeout=300.0)

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
        return self._json(
            "POST",
            "/v1/generations",
            params={"wait": wait} if wait else None,
            headers=_given(**{"Idempotency-Key": idempotency_key}),
            json=body,
            timeout=self._http.timeout.read + wait if self._http.timeout.read else None,
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
        return self._json("GET", f"/v1/generations/{generation_id}")

    def image(self, generation_id: str, index: int = 0) -> bytes:
        """One picture: PNG bytes with their parameters in a text chunk."""
        return self._send("GET", f"/v1/generations/{generation_id}/images/{index}").content

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
        return self._json("POST", "/v1/evaluations", headers=headers, json=body)

    def evaluation(self, evaluation_id: str) -> Json:
        return self._json("GET", f"/v1/evaluations/{evaluation_id}")

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
        return self._json("POST", "/v1/compositions", headers=headers, json=body)

    def composition_rules(self) -> Json:
        """What combines with what, how, and why not."""
        return self._json("GET", "/v1/compositions/rules")

    # What is there

    def base_models(self) -> list[Json]:
        return self._list("/v1/base-models")

    def methods(self) -> list[Json]:
        """Training methods with the JSON schema of their config."""
        return self._list("/v1/methods")

    def samplers(self) -> list[Json]:
        return self._list("/v1/samplers")

    def ready(self) -> Json:
        """What the API knows about its database, broker and workers.

        Raises:
            LookalikeError: the API does not answer, or is not ready and says why.
        """
        return self._json("GET", "/readyz")

    # Talking HTTP

    def _list(self, path: str) -> list[Json]:
        items: list[Json] = self._json("GET", path)["items"]
        return items

    def _pages(self, path: str, **filters: str) -> Iterator[Json]:
        params = dict(filters)
        while True:
            page = self._json("GET", path, params=params)
            yield from page["items"]
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    def _json(self, method: str, path: str, **kwargs: Any) -> Json:
        answer: Json = self._send(method, path, **kwargs).json()
        return answer

    def _send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            return self._ask(method, path, **kwargs)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _fetch(self, path: str, file: IO[bytes], **kwargs: Any) -> httpx.Headers:
        """Write an answer into the file as it comes: weights may be larger than memory."""
        try:
            with self._http.stream("GET", path, **kwargs) as response:
                if response.is_error:
                    response.read()
                    raise _error_of(response)
                for piece in response.iter_bytes():
                    file.write(piece)
                return response.headers
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        response = self._http.request(method, path, **kwargs)
        if response.is_error:
            raise _error_of(response)
        return response

    def _stream(self, path: str, after: int) -> Iterator[Json]:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        # The server sends a heartbeat every 15 s: a silence of 45 s is a dead connection.
        with self._http.stream("GET", path, headers=headers, timeout=45.0) as response:
            if response.is_error:
                response.read()
                raise _error_of(response)
            for line in response.iter_lines():
                # Every event's JSON fits in one data line; ids and types are inside it too.
                if line.startswith("data:"):
                    yield json.loads(line.removeprefix("data:"))

    def _unreachable(self, error: Exception) -> LookalikeError:
        return LookalikeError(
            f"The Lookalike API at {self.url} does not answer ({error}). "
            "Start it with `lookalike up`, or give the URL where it runs."
        )


def _uses(adapters: Sequence[str | Mapping[str, Any]]) -> list[Json]:
    return [{"ref": one} if isinstance(one, str) else dict(one) for one in adapters]


def _given(**values: Any) -> Json:
    return {key: value for key, value in values.items() if value is not None}


def _error_of(response: httpx.Response) -> LookalikeError:
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        return _error_from(response.json())
    return LookalikeError(
        f"{response.url} answered {response.status_code} without saying why: "
        "is this the URL of a Lookalike API?"
    )


def _error_from(problem: Mapping[str, Any]) -> LookalikeError:
    """The LookalikeError that `problem` (RFC 9457) was made from."""
    slug = str(problem.get("type", "")).removeprefix("urn:lookalike:problem:")
    known = {
        kind.slug: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, LookalikeError)
    }
    fields = [FieldProblem(f["path"], f["message"]) for f in problem.get("errors", [])]
    detail = problem.get("detail") or problem.get("title") or "The API gave no reason."
    return known.get(slug, LookalikeError)(detail, fields)


def _photos(photos: str | Path | Iterable[str | Path]) -> tuple[list[Path], dict[str, str]]:
    """The files to upload and the captions lying beside them."""
    if not isinstance(photos, (str, Path)):
        return [Path(photo) for photo in photos], {}
    path = Path(photos)
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        raise InvalidRequest(f"{path} is not here: give a folder of photos, or a zip file.")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in PHOTO_SUFFIXES)
    if not files:
        raise InvalidRequest(
            f"No photos in {path}: it needs {', '.join(sorted(PHOTO_SUFFIXES))} files."
        )
    captions = {
        file.name: text.read_text(encoding="utf-8").strip()
        for file in files
        if (text := file.with_suffix(".txt")).is_file()
    }
    return files, captions


def _name_of(photos: str | Path | Iterable[str | Path]) -> str:
    """A set's name from its folder or zip: "My Dog" is `my-dog`."""
    named = Path(photos).absolute().stem if isinstance(photos, (str, Path)) else ""
    return re.sub(r"[^a-z0-9]+", "-", named.lower()).strip("-")[:63] or "subject"


def _media_type(file: Path) -> str:
    return mimetypes.guess_type(file.name)[0] or "application/octet-stream"
