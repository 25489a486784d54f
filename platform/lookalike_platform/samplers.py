"""Samplers by name: which diffusers scheduler stands for each, with which options."""

from typing import Any

from lookalike_platform.errors import FieldProblem, InvalidRequest

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),  # Song et al. 2021
    "ddpm": ("DDPMScheduler", {}),  # Ho et al. 2020
    "dpmsolver++": (  # Lu et al. 2022, second order, multistep
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "euler": ("EulerDiscreteScheduler", {}),  # Karras et al. 2022, algorithm 2 without churn
    "unipc": ("UniPCMultistepScheduler", {}),  # Zhao et al. 2023
}
FLOW_SAMPLERS = ("dpmsolver++", "unipc")
"""Those that can go along a flow (Lipman et al. 2023) too."""


def check_sampler(name: str, path: str = "sampler") -> None:
    """Raise InvalidRequest, with the field's `path`, unless `name` is a sampler."""
    if name not in SAMPLERS:
        message = f"no sampler {name!r}; choose one of {', '.join(SAMPLERS)}"
        raise InvalidRequest(message, [FieldProblem(path, message)])


def make_sampler(name: str, base_scheduler_config: dict[str, Any]) -> Any:
    """A fresh diffusers scheduler with the base's noise schedule; one per request, it has state.

    Raises InvalidRequest for an unknown name, or one that cannot sample a flow base.
    """
    check_sampler(name)
    import diffusers

    class_name, options = SAMPLERS[name]
    if "shift" in base_scheduler_config:  # only a flow base's schedule has one
        if name not in FLOW_SAMPLERS:
            message = f"{name} cannot sample this flow base; use {' or '.join(FLOW_SAMPLERS)}"
            raise InvalidRequest(message, [FieldProblem("sampler", message)])
        options = options | {
            "use_flow_sigmas": True,
            "prediction_type": "flow_prediction",
            "flow_shift": base_scheduler_config["shift"],
        }
    return getattr(diffusers, class_name).from_config(base_scheduler_config, **options)
