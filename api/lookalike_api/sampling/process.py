"""The resident sampling process: `python -m lookalike_api.sampling.process`. Imports torch.

It reads orders from standard input and answers on standard output (see `messages.py`). A thread
reads, so that a cancel is seen between two steps; the main thread paints one order at a time.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from lookalike_api.sampling.messages import SampleOrder
from lookalike_platform.errors import LookalikeError
from lookalike_platform.settings import get_settings


@dataclass
class Desk:
    """What has come in: orders to carry out, and the number up to which they are canceled."""

    orders: "queue.Queue[tuple[int, SampleOrder]]" = field(default_factory=queue.Queue)
    canceled: int = 0

    def listen(self) -> None:
        for line in sys.stdin:
            message = json.loads(line)
            if message["op"] == "cancel":
                self.canceled = message["number"]
            else:
                self.orders.put((message["number"], SampleOrder.from_json(message["order"])))
        # The service is gone: nobody wants the pictures.
        os._exit(0)


def main() -> None:
    answers = _private_standard_output()
    desk = Desk()
    threading.Thread(target=desk.listen, daemon=True).start()

    from lookalike_api.sampling.models import ResidentBases

    bases = ResidentBases(get_settings().cache)
    while True:
        number, order = desk.orders.get()

        def say(answer: dict[str, Any], number: int = number) -> None:
            answers.write(json.dumps({"number": number, **answer}) + "\n")
            answers.flush()

        def on_step(step: int, total: int, number: int = number) -> None:
            if desk.canceled >= number:
                raise Canceled
            say({"type": "progress", "step": step, "total": total})

        say(_answer(bases, order, on_step))


class Canceled(Exception):
    """The service asked, between two steps, to stop."""


def _answer(bases: Any, order: SampleOrder, on_step: Callable[[int, int], None]) -> dict[str, Any]:
    try:
        return _carry_out(bases, order, on_step)
    except Canceled:
        return {"type": "canceled"}
    except LookalikeError as error:
        return {"type": "error", "problem": error.problem()}
    except Exception as error:
        traceback.print_exc()
        return {"type": "crash", "detail": f"{type(error).__name__}: {error}"}


def _carry_out(
    bases: Any, order: SampleOrder, on_step: Callable[[int, int], None]
) -> dict[str, Any]:
    from PIL.PngImagePlugin import PngInfo

    from lookalike_api.sampling.engine import Scene, paint

    base = bases.get(order.base_fingerprint, order.base_folder, order.device)
    base.wear(order.adapters)
    scene = Scene(
        text=base.embed(order.prompt),
        blank=base.embed_negative(order.negative_prompt),
        guidance_scale=order.guidance_scale,
        steps=order.steps,
        sampler=order.sampler,
        seed=order.seed,
        width=order.width,
        height=order.height,
        num_images=order.num_images,
    )
    images = []
    for number, picture in enumerate(paint(base, scene, on_step)):
        text = PngInfo()
        text.add_text("parameters", order.parameters[number])
        path = order.folder / f"{number}.png"
        picture.save(path, pnginfo=text)
        images.append(str(path))
    return {"type": "done", "images": images, "warnings": _truncations(base, order)}


def _truncations(base: Any, order: SampleOrder) -> list[str]:
    """A warning for each text longer than the encoder reads."""
    texts = {"prompt": order.prompt, "negative prompt": order.negative_prompt}
    return [
        f"The {name} is {tokens} tokens long and was cut off after {base.max_tokens}, "
        "which is all this base model reads."
        for name, text in texts.items()
        if (tokens := base.tokens(text)) > base.max_tokens
    ]


def _private_standard_output() -> TextIO:
    """The real standard output; what libraries print goes to standard error from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
