"""The resident process through its supervisor: real processes, a tiny base."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import numpy
import pytest
from PIL import Image

from lookalike_api.sampling.messages import AdapterFile, SampleOrder
from lookalike_api.sampling.service import SamplerDied, SamplerService
from lookalike_platform.errors import InvalidRequest, LookalikeError
from lookalike_platform.process import spawn_group
from lookalike_platform.samplers import SAMPLERS
from support_models import TOKENS
from support_sampling import reference, save_adapter

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def sampler() -> Iterator[SamplerService]:
    """One for all tests: starting one takes seconds."""
    service = SamplerService()
    yield service
    service.close()


@pytest.fixture
def order(base_folder: Path, tmp_path: Path) -> SampleOrder:
    return SampleOrder(
        base_fingerprint="f" * 64,
        base_folder=base_folder,
        device="cpu",
        adapters=(),
        prompt="a dog",
        negative_prompt="",
        guidance_scale=4.0,
        steps=4,
        sampler="ddim",
        seed=5,
        width=64,
        height=64,
        num_images=2,
        folder=tmp_path,
        parameters=("first", "second"),
    )


def ignore(step: int, total: int) -> None:
    pass


def never() -> bool:
    return False


def test_pictures_are_those_of_diffusers_and_carry_their_parameters(
    sampler: SamplerService, order: SampleOrder, base_folder: Path
) -> None:
    steps: list[tuple[int, int]] = []
    painted = sampler.sample(order, lambda *step: steps.append(step), never)
    assert painted is not None
    assert painted.warnings == []
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    expected = reference(
        base_folder,
        "a dog",
        negative_prompt="",
        guidance_scale=4.0,
        num_inference_steps=4,
        width=64,
        height=64,
        seed=5,
        num_images=2,
        sampler=SAMPLERS["ddim"],
    )
    for path, text, picture in zip(painted.images, order.parameters, expected, strict=True):
        with Image.open(path) as ours:
            assert ours.text["parameters"] == text  # type: ignore[attr-defined]
            # Threads split the work otherwise there than here: at most one of 255 levels.
            assert numpy.abs(numpy.asarray(ours, int) - numpy.asarray(picture, int)).max() <= 1


def test_the_figures_tell_of_an_order_that_is_being_made(
    sampler: SamplerService, order: SampleOrder
) -> None:
    active: list[int] = []
    sampler.sample(order, lambda *_: active.append(sampler.figures["active"]), never)
    assert active[0] == 1
    assert sampler.figures["active"] == 0


def test_a_prompt_longer_than_the_encoder_reads_is_cut_off_with_a_warning(
    sampler: SamplerService, order: SampleOrder
) -> None:
    painted = sampler.sample(replace(order, prompt="dog " * 40), ignore, never)
    assert painted is not None
    [warning] = painted.warnings
    assert f"cut off after {TOKENS}" in warning


def test_a_cancel_is_obeyed_between_two_steps_and_the_process_goes_on(
    sampler: SamplerService, order: SampleOrder
) -> None:
    steps: list[int] = []
    long = replace(order, steps=500)
    painted = sampler.sample(long, lambda step, _: steps.append(step), lambda: len(steps) > 2)
    assert painted is None
    assert len(steps) < 500
    pid = sampler.pid
    assert sampler.sample(order, ignore, never) is not None
    assert sampler.pid == pid


def test_an_order_given_up_in_the_middle_does_not_answer_the_next(
    sampler: SamplerService, order: SampleOrder
) -> None:
    def lose_the_lease(step: int, total: int) -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        sampler.sample(replace(order, steps=500), lose_the_lease, never)
    totals: set[int] = set()
    assert sampler.sample(order, lambda _, total: totals.add(total), never) is not None
    assert totals == {4}


def test_an_adapter_that_does_not_fit_is_an_error_and_the_process_goes_on(
    sampler: SamplerService, order: SampleOrder, base_folder: Path
) -> None:
    path = order.folder / "adapter.safetensors"
    digest = save_adapter(path, base_folder)
    path.write_bytes(path.read_bytes()[:-4])
    broken = replace(order, adapters=(AdapterFile("rex@1", digest, path, 1.0),))
    with pytest.raises(InvalidRequest):
        sampler.sample(broken, ignore, never)
    save_adapter(path, base_folder)
    assert sampler.sample(broken, ignore, never) is not None


def test_a_defect_is_told_and_the_process_goes_on(
    sampler: SamplerService, order: SampleOrder
) -> None:
    nowhere = replace(order, folder=order.folder / "not-there")
    with pytest.raises(LookalikeError, match="FileNotFoundError"):
        sampler.sample(nowhere, ignore, never)
    assert sampler.sample(order, ignore, never) is not None


def test_a_killed_process_is_told_and_started_again(
    sampler: SamplerService, order: SampleOrder
) -> None:
    def kill(step: int, total: int) -> None:
        assert sampler.pid is not None
        os.kill(sampler.pid, signal.SIGKILL)

    with pytest.raises(SamplerDied, match="signal 9"):
        sampler.sample(replace(order, steps=500), kill, never)
    assert sampler.pid is None
    assert sampler.sample(order, ignore, never) is not None
    pid = sampler.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)  # between two orders
    while sampler.pid is not None:
        time.sleep(0.01)
    assert sampler.sample(order, ignore, never) is not None


def test_the_process_dies_with_the_one_that_started_it(tmp_path: Path) -> None:
    program = (
        "import time, sys\n"
        "from lookalike_api.sampling.service import SamplerService\n"
        "service = SamplerService()\n"
        "service._start()\n"
        "open(sys.argv[1], 'w').write(str(service.pid))\n"
        "time.sleep(600)\n"
    )
    note = tmp_path / "pid"
    parent = spawn_group([sys.executable, "-c", program, str(note)])
    while not (note.exists() and note.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    child = int(note.read_text())
    parent.kill()
    parent.wait()
    while _runs(child):
        time.sleep(0.02)


PROCESS = [sys.executable, "-c"]


def test_a_process_that_waits_for_long_work_says_that_it_lives() -> None:
    """What is computed beside may take longer than silence is borne."""
    program = (
        "from lookalike_api.sampling import loading, process\n"
        "loading.Adapters.preparing = True\n"
        "process.BEAT_SECONDS = 0.01\n"
        "process.run()\n"
    )
    waiting = spawn_group([*PROCESS, program], stdin=PIPE, stdout=PIPE)
    assert waiting.stdin is not None
    assert waiting.stdout is not None
    assert [json.loads(waiting.stdout.readline()) for _ in range(3)] == [{"type": "alive"}] * 3
    waiting.stdin.close()
    assert waiting.wait(30) == 0
    waiting.stdout.close()


def test_a_process_that_fails_does_not_wait_for_what_it_computes_beside(tmp_path: Path) -> None:
    program = (
        "import time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from lookalike_api.sampling import process\n"
        "def main():\n"
        "    ThreadPoolExecutor(1).submit(time.sleep, 600)\n"
        "    raise MemoryError('of the device')\n"
        "process.main = main\n"
        "process.run()\n"
    )
    with (tmp_path / "errors").open("wb") as errors:
        assert spawn_group([*PROCESS, program], stderr=errors).wait(60) == 1
    assert "MemoryError: of the device" in (tmp_path / "errors").read_text()


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
