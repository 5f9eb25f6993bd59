"""One system of the cost benchmark in its process: `python -m savelib.experiments.cost_worker SPEC`.

No response is ever finished (see cost_sizes), and under either length_filter the reward model would learn from none of
them. So all are marked as finished, the one thing that is changed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from savelib.config import Config
from savelib.experiments.cost_sizes import OF_TRL, PHASES
from savelib.models.adapters import plain
from savelib.models.compute import peak_memory, reset_peak_memory
from savelib.models.rollout import Responses, Rollout
from savelib.training import algorithm
from savelib.training.algorithm import save_step
from savelib.training.metrics import Clock
from savelib.training.stages import anchor_stage, preference_stage
from savelib.training.trainer import Trainer, load_data


def timed(clock: Clock, owner: Any, method: str, name: str | Callable[[], str]) -> None:
    """From now on calls of owner.method count as the phase; for TRL, which has no clock of its own."""
    original = getattr(owner, method)

    @wraps(original)
    def counted(*args, **kwargs):
        with clock.phase(name() if callable(name) else name):
            return original(*args, **kwargs)

    setattr(owner, method, counted)


class Turn:
    """One step, when the other process asks for it: its seconds, peak memory and reward-model tokens are sent back."""

    def __init__(self, channel, device: torch.device, base_gb: float):
        self.channel, self.device, self.base_gb = channel, device, base_gb
        self.clock, self.rm_tokens, self.cpu, self.step = Clock(device), 0, 0.0, ExitStack()

    def watch(self, backbone: nn.Module) -> None:
        """Count the tokens of every forward of the reward model's backbone, whatever its rows hold."""

        def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
            ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
            self.rm_tokens += ids.numel() if ids is not None else embeds.shape[:-1].numel()

        backbone.register_forward_pre_hook(count, with_kwargs=True)

    def send(self, **values: Any) -> None:
        print(json.dumps(values), file=self.channel, flush=True)

    def begin(self) -> None:
        if not sys.stdin.readline():  # the other process is gone, or has enough
            os._exit(0)
        reset_peak_memory(self.device)
        self.rm_tokens, self.clock.seconds = 0, dict.fromkeys(PHASES, 0.0)
        self.cpu = time.process_time()
        self.step.enter_context(self.clock.phase("other"))

    def end(self, **more: float) -> None:
        self.step.close()
        seconds = self.clock.seconds
        self.send(seconds=sum(seconds.values()), **seconds, cpu_seconds=time.process_time() - self.cpu,
                  peak_gb=peak_memory(self.device), base_gb=self.base_gb,
                  rm_tokens=self.rm_tokens, **more)  # fmt: skip


class AllFinished(Trainer):
    """A trainer whose responses all count as finished: none of them ever ends (see cost_sizes)."""

    def sample(self, step: int) -> Rollout:
        rollout = super().sample(step)
        return replace(rollout, finished=torch.ones_like(rollout.finished))


def ours(config: Config, turn: Turn, steps: int) -> None:
    """`save_step` under the config's rule, with the turn's clock."""
    data = load_data(config)
    reward_model = preference_stage(config, data.pairs)
    t = AllFinished(config, data, reward_model, anchor_stage(config, reward_model, data.prompts))
    turn.watch(plain(t.reward_model.model).base_model)
    turn.send(threads=torch.get_num_threads())
    for step in range(1, steps + 1):
        turn.begin()
        metrics, _ = save_step(t, step, turn.clock)
        groups, used = metrics.get("rm/groups", 0), metrics["policy/responses"]
        turn.end(tokens=metrics["response/tokens"], groups=groups, used=used)


def trls(config: Config, turn: Turn, steps: int) -> None:
    """TRL's GRPOTrainer, as it is or, under rule save, with SAVE. A turn lasts from on_step_begin to on_step_end."""
    import trl  # an extra
    from datasets import Dataset
    from transformers import TrainerCallback

    c, clock, cpu = config, turn.clock, config.device == "cpu"
    rows = [json.loads(line)["prompt"] for line in Path(c.prompts).read_text().splitlines()]
    args = trl.GRPOConfig(
        output_dir=str(Path(c.prompts).parent / "trl"), use_cpu=cpu, bf16=not cpu, use_vllm=False,
        gradient_checkpointing=c.gradient_checkpointing, per_device_train_batch_size=c.batch_size * c.group_size,
        num_generations=c.group_size, num_iterations=1, loss_type="grpo", beta=c.beta, max_steps=steps,
        max_completion_length=c.max_new_tokens, temperature=c.temperature, top_p=c.top_p, top_k=c.top_k,
        learning_rate=c.policy_lr, lr_scheduler_type="constant", max_grad_norm=c.max_grad_norm, shuffle_dataset=False,
        seed=c.seed, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip

    class Turns(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            timed(clock, optimizer, "step", "optimizer")

        def on_step_begin(self, args, state, control, **kwargs):
            turn.begin()

        def on_step_end(self, args, state, control, **kwargs):
            m = trainer._metrics["train"]
            groups, kept = m.get("rm/groups", [0])[-1], m.get("policy/kept", [1])[-1]
            used = round(kept * c.batch_size * c.group_size)
            turn.end(tokens=m["completions/mean_length"][-1], groups=groups, used=used)

    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in rows])
    common = {"model": c.policy_model, "args": args, "train_dataset": prompts, "callbacks": [Turns()]}
    if c.rule == "frozen":
        trainer = trl.GRPOTrainer(reward_funcs=c.reward_model, **common)
        turn.watch(trainer.reward_funcs[0].base_model)
    else:
        trainer = _all_finished_trl(save=c, **common)
        turn.watch(plain(trainer.reward_side.reward_model.model).base_model)
        timed(clock, algorithm, "improve_reward_model", "RM update")
        timed(clock, algorithm, "improve_value_head", "value update")
    timed(clock, trainer, "_generate", "rollout")
    timed(clock, trainer, "_calculate_rewards", "reward scoring")
    forward = "policy forward/backward"
    logprobs = "_get_per_token_logps_and_entropies"
    timed(clock, trainer, logprobs, lambda: forward if torch.is_grad_enabled() else "reference log-probs")
    timed(clock, trainer, "_generate_and_score_completions", "other")
    timed(clock, trainer, "training_step", forward)
    timed(clock, trainer, "_clip_grad_norm", "optimizer")
    turn.send(threads=torch.get_num_threads())
    trainer.train()


def _all_finished_trl(**arguments: Any) -> Any:
    """TRL's GRPOTrainer with SAVE, like `AllFinished`."""
    from savelib.trl import SaveGRPOTrainer

    class Finished(SaveGRPOTrainer):
        def _responses(self, *rows: Any) -> Responses:
            responses = super()._responses(*rows)
            return replace(responses, finished=torch.ones_like(responses.finished))

    return Finished(**arguments)


def _worker(system: str, config: dict[str, Any], steps: int) -> None:
    """Say when ready, then make a step for each line read."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    made = Config(**config)
    device = torch.device(made.device)
    reset_peak_memory(device)
    turn = Turn(channel, device, peak_memory(device))
    trls(made, turn, steps) if system in OF_TRL else ours(made, turn, steps)


if __name__ == "__main__":
    _worker(**json.loads(sys.argv[1]))
