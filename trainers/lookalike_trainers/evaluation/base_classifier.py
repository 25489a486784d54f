"""The base as a zero-shot classifier of what a picture shows (Li et al. 2023). Torch.

"Your Diffusion Model is Secretly a Zero-Shot Classifier", equation 6: the prompt under which the
denoiser predicts best is the likeliest,

    p(c_i | x) = exp(-E_i) / sum_j exp(-E_j),    E_i = mean over (t, e) of |e - e_theta(x_t, c_i)|^2

The expectation is over one fixed set of (t, e), the same for all prompts: what chance adds to the
errors then cancels in their differences (section 3.2 of the paper). For a base that predicts v or a
flow the error is of that.
"""

from collections.abc import Sequence

import torch
from PIL import Image

from lookalike_datasets.features.cache import component_digest
from lookalike_platform.conditioning import Text, predict
from lookalike_platform.files import canonical_digest
from lookalike_trainers.base_parts import BaseParts
from lookalike_trainers.draws import generator
from lookalike_trainers.evaluation.base_features import picture_latents, resolution
from lookalike_trainers.objective import NoiseSchedule

OTHER_SCENES = (
    "a {subject} on a red background",
    "a {subject} in the night sky",
    "a {subject} on the sea",
    "a {subject} on a yellow background",
    "a {subject} on a purple background",
)
"""Fill up the candidates where fewer prompts are asked: in words that the smallest base knows, and
looking unlike each other and the scenes that are asked by default (request.py)."""


class BaseClassifier:
    """As judge of prompts: the probability of a picture's own prompt among `candidates`.

    Args:
        draws: how many (t, e); t are spread evenly over the schedule.
        candidates: how many prompts, its own among them, a picture is held against. The others are
            those that follow it in the call, then OTHER_SCENES of the same class, so they are the
            same for every adapter that is asked for the same prompts.
    """

    name = "base-classifier-2"
    """Counts up when figures mean something else: 1 had only the prompts asked as candidates."""

    def __init__(self, parts: BaseParts, draws: int = 16, candidates: int = 5) -> None:
        self._parts = parts
        self._candidates = candidates
        self._schedule = NoiseSchedule.of(parts.scheduler)
        every = self._schedule.timesteps / draws
        self._timesteps = torch.tensor([int((i + 0.5) * every) for i in range(draws)])
        names = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer")
        folders = [parts.folder / name for name in names if (parts.folder / name).is_dir()]
        components = [component_digest(folder) for folder in folders]
        self.digest = canonical_digest([self.name, components, draws, candidates, OTHER_SCENES])

    def score_prompts(
        self, images: Sequence[Image.Image], prompts: Sequence[str], class_noun: str
    ) -> torch.Tensor:
        """Of each picture [n], the probability of its own prompt; 1 / candidates is chance."""
        distinct = list(dict.fromkeys(prompts))
        scenes = [scene.format(subject=class_noun) for scene in OTHER_SCENES]
        foreign = [scene for scene in scenes if scene not in distinct]
        scores = []
        for image, prompt in zip(images, prompts, strict=True):
            place = distinct.index(prompt)
            among = [*distinct[place:], *distinct[:place], *foreign][: self._candidates]
            scores.append(self.probabilities(image, among)[0])
        return torch.stack(scores)

    def probabilities(self, image: Image.Image, prompts: Sequence[str]) -> torch.Tensor:
        """p(prompt | image) of each prompt [prompts]."""
        return torch.softmax(-self.errors(image, prompts), 0)

    @torch.inference_mode()
    def errors(self, image: Image.Image, prompts: Sequence[str]) -> torch.Tensor:
        """Mean squared length of the denoiser's error under each prompt [prompts]."""
        device, unet, times = self._parts.device, self._parts.unet, self._timesteps
        latent = picture_latents(self._parts, [image]).expand(len(times), -1, -1, -1)
        noise = torch.stack(
            [
                torch.randn(latent.shape[1:], generator=generator("classifier", number))
                for number in range(len(times))
            ]
        )
        told = self._schedule.times[times].to(device)
        noisy = self._schedule.noised(latent, noise, times).to(device)
        target = self._schedule.target(latent, noise, times).to(device)
        told = self._schedule.times[times].to(device)
        errors = []
        for prompt in prompts:
            said = predict(unet, noisy, told, self._text(prompt).expand(len(times)))
            errors.append((said - target).double().square().flatten(1).sum(1).mean().cpu())
        return torch.stack(errors)

    def _text(self, prompt: str) -> Text:
        return self._parts.encode([prompt], resolution(self._parts))
