"""One DeepSpeed engine over the run's processes, set up through accelerate. Torch.

accelerate can quietly train without DeepSpeed, or with every process believing it is alone; both
look like success and waste the run. So the first thing done is to make sure of neither.
"""

import contextlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lookalike_platform.errors import CapabilityMissing, TrainingFailed
from lookalike_trainers.average import Average
from lookalike_trainers.config import TrainingConfig

NEVER = 10**9


@dataclass
class Engine:
    """The prepared module and this process's place among the others."""

    model: Any  # DeepSpeedEngine; calling it calls the module's forward
    optimizer: Any
    base_rates: list[float]
    max_grad_norm: float
    rank: int
    world: int
    zero_stage: int
    device: torch.device
    average: Average | None = None
    fused: torch.optim.AdamW | None = None  # without ZeRO: divides gradients in its own pass

    def set_learning_rates(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients; after the last micro-batch they are averaged over processes."""
        self.model.backward(loss)

    def step(self) -> float:
        """Clip the gradients and take the step, once all micro-batches are in.

        Returns:
            the L2 norm of the gradients over all trainables, before clipping; 0 in between. If it
            is not finite, nothing was changed.
        """
        if not self.model.is_gradient_accumulation_boundary():
            self.model.step()
            return 0.0
        if self.zero_stage == 0:
            # DeepSpeed neither tells the norm nor stops at one that is not finite without ZeRO.
            trainables = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = float(
                nn.utils.get_total_norm([p.grad for p in trainables if p.grad is not None])
            )
            self._clip(trainables, norm)
            if math.isfinite(norm):
                self._take_step()
            return norm
        self._take_step()
        return float(self.model.get_global_grad_norm())

    def _clip(self, trainables: list[nn.Parameter], norm: float) -> None:
        """To the norm asked for; below it, all would be multiplied by one."""
        clipped = norm > self.max_grad_norm
        if self.fused:
            over = (norm + 1e-6) / self.max_grad_norm  # as torch.nn.utils clips
            scale = torch.tensor(over, device=self.device) if clipped else None
            setattr(self.fused, "grad_scale", scale)  # noqa: B010 - torch looks it up by name
        elif clipped:
            nn.utils.clip_grads_with_norm_(trainables, self.max_grad_norm, torch.tensor(norm))

    def _take_step(self) -> None:
        self.model.step()
        if self.average:
            self.average.update()

    @contextlib.contextmanager
    def as_delivered(self) -> Iterator[None]:
        """Inside, the weights are those that a run ending now would leave: averages, if any."""
        with self.average.in_place() if self.average else contextlib.nullcontext():
            yield

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.world == 1:
            return values
        together = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(together)
        return [float(v) for v in together]

    def barrier(self) -> None:
        if self.world > 1:
            torch.distributed.barrier()

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Inside, every process holds all of the trainables (ZeRO 3 keeps a share each)."""
        if self.zero_stage < 3:
            yield
            return
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([p for p in module.parameters() if p.requires_grad]):
            yield

    def checksum(self, module: nn.Module) -> torch.Tensor:
        """The sum of each trainable, [trainables] in float64."""
        with self.whole(module):
            mine = [p.detach().double().sum() for p in module.parameters() if p.requires_grad]
            return torch.stack(mine)

    def check_ranks_agree(self, checksum: torch.Tensor) -> None:
        """Raise TrainingFailed unless all processes have the same checksum, bit for bit."""
        if self.world == 1:
            return
        first = checksum.clone()
        torch.distributed.broadcast(first, src=0)
        if self.sum([float(not torch.equal(first, checksum))])[0]:
            raise TrainingFailed(
                "The processes' weights differ after a step: their gradients are not synchronised. "
                "Train with num_processes 1, and report this with the run's log."
            )


def make_engine(
    module: nn.Module,
    groups: list[dict[str, Any]],
    config: TrainingConfig,
    *,
    device: torch.device,
    world: int,
    zero_stage: int,
) -> Engine:
    """Wrap the module for `world` processes at a ZeRO stage (Rajbhandari et al. 2020), 0 to 3.

    Weights and optimiser state are kept in float32; bf16 happens inside the module's forward.

    Raises TrainingFailed if the processes launched are not those that found each other,
    CapabilityMissing for an optimiser that cannot be had here.
    """
    _keep_deepspeed_from_extras()
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # On the CPU the backend must be named; without it every process believes it is alone.
    backend = [InitProcessGroupKwargs(backend="gloo")] if device.type == "cpu" else []
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_deepspeed_config(config, world, zero_stage)),
        kwargs_handlers=backend,
    )
    optimizer = _optimizer(groups, config, zero_stage)
    rates = [float(group["lr"]) for group in groups]
    model, prepared = accelerator.prepare(module, optimizer)
    # accelerate has told transformers to partition every model it loads from now on (ZeRO 3).
    unset_hf_deepspeed_config()
    average = Average(module, config.ema_decay) if config.ema_decay else None
    if zero_stage == 0:
        # By itself DeepSpeed walks over all modules of the frozen base twice in every step: to
        # clear gradients, and to average them, even those of a process that is alone.
        model.zero_grad = optimizer.zero_grad
        model.enable_backward_allreduce = world > 1
    engine = Engine(
        model=model,
        optimizer=prepared,
        base_rates=rates,
        max_grad_norm=config.max_grad_norm,
        rank=accelerator.process_index,
        world=world,
        zero_stage=zero_stage,
        device=device,
        average=average,
        fused=optimizer if not zero_stage and isinstance(optimizer, torch.optim.AdamW) else None,
    )
    kind = accelerator.distributed_type
    if kind != DistributedType.DEEPSPEED or type(model).__name__ != "DeepSpeedEngine":
        raise TrainingFailed(f"accelerate did not use DeepSpeed but {kind}")
    ranks = engine.sum([float(2**engine.rank)])[0]
    if accelerator.num_processes != world or ranks != 2**world - 1:
        raise TrainingFailed(
            f"{world} processes were launched, and {accelerator.num_processes} found each other"
        )
    return engine


def check_optimizer(config: TrainingConfig, zero_stage: int) -> None:
    """Raises CapabilityMissing for an optimiser that cannot be had here."""
    if config.optimizer == "adamw8bit":
        _adamw8bit(zero_stage)


def _optimizer(groups: list[dict[str, Any]], config: TrainingConfig, zero_stage: int) -> Any:
    """AdamW, or the same with moments of 8 bits a value (Dettmers et al. 2022)."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    return _adamw8bit(zero_stage)(groups, weight_decay=config.weight_decay)


def _adamw8bit(zero_stage: int) -> Any:
    if zero_stage:
        raise CapabilityMissing(
            f"optimizer adamw8bit with ZeRO {zero_stage}, which cuts its moments into shares: "
            "set zero_stage to 0, or optimizer to adamw"
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise CapabilityMissing(
            "optimizer adamw8bit needs bitsandbytes where the trainers run: "
            "pip install 'lookalike[eight-bit]', or set optimizer to adamw"
        ) from None
    return AdamW8bit


def _deepspeed_config(config: TrainingConfig, world: int, zero_stage: int) -> dict[str, Any]:
    micro, accumulation = config.batch_size, config.gradient_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world,
        "gradient_clipping": config.max_grad_norm if zero_stage else 0.0,  # 0: `Engine.step` does
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": NEVER,
    }


def _keep_deepspeed_from_extras() -> None:
    """Two things DeepSpeed does unasked, which cost the start of a run seconds.

    It imports MLflow, and pandas with it, for its autotuner. On the CPU it compiles a kernel for
    gradients in shared memory, in the first run on a machine: half a minute, under a lock that a
    killed run leaves behind for ever. gloo does the same work.
    """
    sys.modules.setdefault("mlflow", None)  # type: ignore[arg-type]  # importing it fails
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
