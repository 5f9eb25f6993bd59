"""Optimizers of the trained models, in one process or many, and how the processes of a run come together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from savelib.config import Config, ConfigError
from savelib.errors import SavelibError
from savelib.models.reward_model import RewardModel
from savelib.paths import project_root
from savelib.processes import MEETING, is_main, summed, wait, world_size
from savelib.training.finite import require_finite

MODELS = ("policy", "reward_model")


def connect(config: Config) -> None:
    """Join the run's processes: gloo on CPU, nccl on CUDA; with DeepSpeed, one plugin for each trained model.

    Raises ConfigError when there are not as many processes as num_processes asks for, or fewer GPUs than processes.
    """
    found = int(os.environ.get("WORLD_SIZE", 1))
    if found != config.num_processes:
        raise ConfigError(
            f"num_processes = {config.num_processes}, but {found} process(es) were started; give torchrun's "
            "--nproc_per_node times --nnodes as num_processes, or let `python -m savelib train` start them"
        )
    if found > 1 and config.device.startswith("cuda:"):
        raise ConfigError(
            f"device = {config.device!r} puts all {found} processes on one GPU; use device=cuda, then each has its own"
        )
    cuda = config.device != "cpu" and torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and here > torch.cuda.device_count():
        raise ConfigError(
            f"num_processes = {config.num_processes} puts {here} on this machine, which has "
            f"{torch.cuda.device_count()} GPU(s): one process a GPU"
        )
    from accelerate import Accelerator  # slow to import
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
    from transformers.integrations import unset_hf_deepspeed_config

    # a wait is long where one process builds what all need; a process that dies is noticed at once all the same
    backend, patience = "nccl" if cuda else "gloo", timedelta(hours=2)
    if MEETING in os.environ:  # else they meet at torchrun's MASTER_ADDR and MASTER_PORT
        dist.init_process_group(backend, os.environ[MEETING], patience, found, int(os.environ["RANK"]))
    group = InitProcessGroupKwargs(backend=backend, timeout=patience)
    if config.backend == "ddp":
        Accelerator(cpu=not cuda, kwargs_handlers=[group] if found > 1 else [])
    else:
        plugins = {m: DeepSpeedPlugin(hf_ds_config=_deepspeed_config(config), zero3_init_flag=False) for m in MODELS}
        Accelerator(deepspeed_plugins=plugins, kwargs_handlers=[group])
        unset_hf_deepspeed_config()  # else from_pretrained would shard what it loads, the reference model too


def disconnect() -> None:
    """Leave together: a process that ends while others still talk to it may be taken for one that failed."""
    if dist.is_initialized():
        wait()
        dist.destroy_process_group()


def _deepspeed_config(config: Config) -> dict[str, Any]:
    """env/deepspeed/<stage>.json with the run's clipping."""
    path = project_root() / "env" / "deepspeed" / f"{config.backend.removeprefix('deepspeed_')}.json"
    return json.loads(Path(path).read_text()) | {"gradient_clipping": config.max_grad_norm}


class FrozenWeightsError(SavelibError):
    """A step that moved no weight, though there was a gradient."""


class Engine:
    """The optimizer of one model. Losses are sums; `step` divides the gradients, summed over all processes."""

    lockstep = False  # whether all processes must run forward and backward equally often

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, max_norm: float):
        self.name, self.optimizer, self.max_norm, self.checked = name, optimizer, max_norm, False
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        low = sorted({str(p.dtype) for p in self.parameters} - {"torch.float32"})
        if low:
            raise FrozenWeightsError(
                f"{name}: trained weights are {', '.join(low)}; an update of lr 1e-7 is lost below float32"
            )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def needed(self, count: int) -> bool:
        """Whether to call backward() for a micro-batch with `count` losses on this process.

        Under ZeRO all processes must call it if one does.
        """
        return count > 0

    @contextmanager
    def moved(self, rate: float) -> Iterator[None]:
        """Inside, the weights are moved by rate times the gradient of all processes, which is cleared; then back."""
        self._sum_gradients()
        before = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p in self.parameters:
                if p.grad is not None:
                    p.add_(p.grad, alpha=rate)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, before)

    def step(self, divisor: float = 1.0) -> float:
        """Divide, clip, step, clear; returns the gradient norm before clipping.

        All processes call it together; one without a gradient takes part with zeros. Raises FrozenWeightsError if the
        first step moves nothing, NonFiniteError if the gradient or a weight is no number.
        """
        before = None if self.checked else self._sample()
        norm = self._step(divisor)
        require_finite(f"the norm of {self.name}'s gradient", norm, self.name)
        after = self._sample()
        if after:
            require_finite(f"a weight of {self.name}, after its update,", torch.cat(after), self.name)
        if before is not None and norm > 1e-4:
            self.checked = True
            if not any((a != b).float().mean() >= 0.5 for a, b in zip(before, after, strict=True)):
                raise FrozenWeightsError(
                    f"{self.name}: a step with gradient norm {norm:.3g} moved no weight; raise its lr"
                )
        return norm

    def _sum_gradients(self) -> None:
        if world_size() > 1:
            for p in self.parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            waiting = [dist.all_reduce(p.grad, async_op=True) for p in self.parameters]
            for handle in waiting:
                handle.wait()

    def _step(self, divisor: float) -> float:
        self._sum_gradients()
        parameters = [p for p in self.parameters if p.grad is not None]
        if divisor != 1:
            torch._foreach_div_([p.grad for p in parameters], divisor)
        norm = nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _sample(self) -> list[Tensor]:
        """Up to 1,000 numbers of each trained tensor, as this process holds them."""
        local = (getattr(p, "ds_tensor", p) for p in self.parameters)
        return [p.detach().flatten()[:: p.numel() // 1000 + 1].clone() for p in local if p.numel()]

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's state dict; whole on the main process, whatever holds the parts."""
        return model.state_dict()

    # the optimizer's state: tensors by name, for a safetensors file

    def _holders(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """The optimizer and the tensors that are the keys of its state."""
        return self.optimizer, self.parameters

    def state(self) -> dict[str, Tensor]:
        optimizer, keys = self._holders()
        states = {f"{i}.{k}": torch.as_tensor(v) for i, p in enumerate(keys) for k, v in optimizer.state[p].items()}
        # a small table may be shared by all of them, which a file of tensors cannot hold
        return {k: v.clone() if v.numel() <= 256 else v for k, v in states.items()}

    # weights and state together, for a way back

    def copy(self) -> dict[str, Tensor]:
        """The trained weights and the optimizer's state as this process holds them, copied to the CPU's memory."""
        weights = {f"weight.{i}": p for i, p in enumerate(self._holders()[1])}
        states = {f"state.{k}": v for k, v in self.state().items()}
        return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in (weights | states).items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `copy` gave."""
        optimizer, keys = self._holders()
        for i, p in enumerate(keys):
            p.data.copy_(tensors[f"weight.{i}"])
            optimizer.state[p].clear()
        states = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        self.load_state({k: v.clone() for k, v in states.items()})

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        optimizer, keys = self._holders()
        for name, value in tensors.items():
            index, _, part = name.partition(".")
            p = keys[int(index)]
            if value.dim() == 0:  # the step: torch's Adam counts in a float32 tensor, the others in an int
                value = value if value.is_floating_point() else int(value)
                if optimizer.param_groups[0].get("fused"):  # counts on the device; the unfused one on the CPU
                    value = torch.as_tensor(value, device=p.device)
            elif hasattr(optimizer, "get_state_buffer") and value.shape == p.shape:
                value = optimizer.get_state_buffer(p, dtype=value.dtype).copy_(value)  # bitsandbytes: paged, if it is
            else:
                value = value.to(p.device)
            optimizer.state[p][part] = value


class ZeroEngine(Engine):
    """The same in a DeepSpeed engine: gradients are reduced and sharded at each backward, so all go in lockstep."""

    lockstep = True

    def __init__(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float):
        from accelerate import Accelerator
        from transformers.integrations import unset_hf_deepspeed_config

        super().__init__(name, optimizer, max_norm)
        accelerator = Accelerator()
        accelerator.state.select_deepspeed_plugin(name)
        self.engine, _ = accelerator.prepare(model, optimizer)
        unset_hf_deepspeed_config()  # as in `connect`
        self.sharded = self.engine.zero_optimization_stage() == 3

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        # what engine.forward does first: ZeRO-3 counts its micro-batches by it. The modules are called directly, since
        # engine.forward switches autocast off
        self.engine.optimizer.clear_backward_seen_flag()

    def needed(self, count: int) -> bool:
        return summed(count)[0] > 0

    def _step(self, divisor: float) -> float:
        zero = self.engine.optimizer
        zero.loss_scale = divisor / world_size()  # DeepSpeed has averaged over processes; it divides by this scale
        self.engine.step()
        zero.loss_scale = 1.0
        return float(self.engine.get_global_grad_norm())

    def full_weights(self, model: nn.Module) -> dict[str, Tensor]:
        if not self.sharded:
            return model.state_dict()

        import deepspeed

        whole = {}
        for name, value in model.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters([value] if hasattr(value, "ds_id") else []):
                if is_main():
                    whole[name] = value.detach().cpu().clone()
        return whole

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        self.engine.optimizer.update_lp_params()  # ZeRO-2: from the partitions to the weights of all processes

    def _holders(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """DeepSpeed's own optimizer, and this process's partitions of the float32 weights."""
        zero = self.engine.optimizer
        return (
            zero.optimizer,
            zero.fp32_partitioned_groups_flat if self.sharded else zero.single_partition_of_fp32_groups,
        )


def new_engine(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> Engine:
    """The engine of a model as the config's backend has it; name: one of MODELS."""
    if config.backend == "ddp":
        return Engine(name, optimizer, config.max_grad_norm)
    return ZeroEngine(name, model, optimizer, config.max_grad_norm)


def whole_engine(name: str, module: nn.Module, lr: float, config: Config) -> Engine:
    """The engine of a small module, which every process holds whole under any backend."""
    return Engine(name, torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0), config.max_grad_norm)


def reward_optimizer(rm: RewardModel, config: Config, backbone_lr: float, head_lr: float) -> torch.optim.Optimizer:
    """Adam over omega and phi with a learning rate each; a backbone at 0 takes no gradient at all."""
    backbone, head = rm.backbone_parameters(), rm.reward_head_parameters()
    for p in backbone:
        p.requires_grad_(backbone_lr > 0)
    groups = [{"params": head, "lr": head_lr}] + [{"params": backbone, "lr": backbone_lr}] * (backbone_lr > 0)
    return adam(groups, config)


def adam(groups: list[dict], config: Config) -> torch.optim.Optimizer:
    """AdamW without weight decay, as the config's optimizer and backend have it."""
    if config.optimizer != "adamw":
        import bitsandbytes

        kind = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}[config.optimizer]
        return getattr(bitsandbytes.optim, kind)(groups, weight_decay=0.0)
    if config.backend == "deepspeed_zero2_offload":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, weight_decay=0.0, adamw_mode=True)
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
