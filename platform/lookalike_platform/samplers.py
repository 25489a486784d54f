"""Samplers by name: which diffusers scheduler stands for each, with which options."""

from importlib import import_module
from typing import Any

from lookalike_platform.errors import FieldProblem, InvalidRequest
from lookalike_platform.steps import RUNGE_KUTTA_STEPS, most_steps, runge_kutta

Scheduler = tuple[str | None, dict[str, Any]]
"""Class and options; no class is the base's own."""

BASE = "base"
PROBABILITY_FLOW = "ProbabilityFlowScheduler"  # ours; all others are diffusers'

_MULTISTEP = "DPMSolverMultistepScheduler"

SAMPLERS: dict[str, Scheduler] = {
    BASE: (None, {}),
    "ddim": ("DDIMScheduler", {}),  # Song et al. 2021
    "ddpm": ("DDPMScheduler", {}),  # Ho et al. 2020
    # Lu et al. 2022, multistep, of first, second and third order
    "dpmsolver++1": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 1}),
    "dpmsolver++": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmsolver++3": (_MULTISTEP, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "euler": ("EulerDiscreteScheduler", {}),  # Karras et al. 2022, algorithm 2 without churn
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),  # Crowson, k-diffusion
    "heun": ("HeunDiscreteScheduler", {}),  # Karras et al. 2022, algorithm 1
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # Liu et al. 2022, without Runge-Kutta
    "probability_flow": (PROBABILITY_FLOW, {}),  # Song et al. 2021 (SDEs), equation 13
    "unipc": ("UniPCMultistepScheduler", {}),  # Zhao et al. 2023
}

FLOW_SAMPLERS: dict[str, Scheduler] = {
    **{name: SAMPLERS[name] for name in SAMPLERS if name.startswith(("dpmsolver", BASE, "unipc"))},
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
"""Those that can go along a flow (Lipman et al. 2023) too, and as what."""

NEEDS_SIGNAL = ("heun", "pndm", "probability_flow")
"""Those that cannot begin where no signal is left, at zero terminal SNR (Lin et al. 2024)."""

WITH_ETA = ("ddim",)
"""Those that take `eta`, the share of DDPM's noise that they add (Song et al. 2021, eq. 16)."""


def check_sampler(
    name: str, path: str = "sampler", base_scheduler_config: dict[str, Any] | None = None
) -> None:
    """Raise InvalidRequest, with the field's `path`, unless `name` is a sampler and can sample a
    base of this noise schedule, where it is given."""
    config = base_scheduler_config or {}
    message = None
    if name not in SAMPLERS:
        message = f"no sampler {name!r}; choose one of {', '.join(SAMPLERS)}"
    elif _flows(config) and name not in FLOW_SAMPLERS:
        message = f"{name} cannot sample this flow base; use {_one_of(FLOW_SAMPLERS)}"
    elif config.get("rescale_betas_zero_snr") and name in NEEDS_SIGNAL:
        others = [other for other in SAMPLERS if other not in NEEDS_SIGNAL]
        message = (
            f"{name} cannot begin without any signal, as this base does; use {_one_of(others)}"
        )
    if message:
        raise InvalidRequest(message, [FieldProblem(path, message)])


def scheduler_of(name: str, base_scheduler_config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The class and the configuration of a sampler of this base."""
    class_name, options = _samplers(base_scheduler_config)[name]
    whole = {**base_scheduler_config, **options}
    return class_name or str(base_scheduler_config["_class_name"]), whole


def check_steps(
    name: str, base_scheduler_config: dict[str, Any], steps: int, *, from_noise: bool = True
) -> None:
    """Raise InvalidRequest unless a sampler that can sample this base can walk it in so many steps,
    or from the picture it is to start from."""
    class_name, config = scheduler_of(name, base_scheduler_config)
    most = most_steps(class_name, config)
    least = RUNGE_KUTTA_STEPS + 1 if runge_kutta(class_name, config) else 1
    problems = []
    if not least <= steps <= most:
        message = f"{name} walks this base in {least} to {most} steps, and not in {steps}"
        problems.append(FieldProblem("steps", message))
    if least > 1 and not from_noise:
        message = (
            f"{name}, of this base PNDM with a Runge-Kutta start, begins with noise and not with a "
            "picture: choose another, as pndm"
        )
        problems.append(FieldProblem("sampler", message))
    if problems:
        raise InvalidRequest("The sampler cannot walk so.", problems)


def make_sampler(name: str, base_scheduler_config: dict[str, Any]) -> Any:
    """A fresh diffusers scheduler with the base's noise schedule; one per request, it has state.

    Raises InvalidRequest for an unknown name, or one that cannot sample this base.
    """
    check_sampler(name, base_scheduler_config=base_scheduler_config)
    class_name, _ = scheduler_of(name, base_scheduler_config)
    _, options = _samplers(base_scheduler_config)[name]
    if _flows(base_scheduler_config) and not class_name.startswith("FlowMatch"):
        options = options | {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": base_scheduler_config["shift"],
        }
    ours = class_name == PROBABILITY_FLOW
    home = import_module("lookalike_platform.probability_flow" if ours else "diffusers")
    return getattr(home, class_name).from_config(base_scheduler_config, **options)


def _samplers(config: dict[str, Any]) -> dict[str, Scheduler]:
    return FLOW_SAMPLERS if _flows(config) else SAMPLERS


def _flows(config: dict[str, Any]) -> bool:
    return "shift" in config  # only a flow base's schedule has one


def _one_of(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
