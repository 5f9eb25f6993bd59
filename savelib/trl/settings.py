"""Settings of SAVE inside TRL: whose field is whose, table 8 as TRL's arguments, and what cannot be exact."""

from __future__ import annotations

import os
from typing import Any

import torch

from savelib.config import Config, ConfigError, make_config
from savelib.method import RULES

OF_TRL = {  # fields of a Config that TRL's arguments say in its place
    "policy_model": "model", "prompts": "train_dataset", "algo": "the trainer and its importance_sampling_level",
    "seed": "seed", "device": "use_cpu", "num_processes": "the processes that are started",
    "backend": "deepspeed or accelerate's config", "batch_size": "generation_batch_size / num_generations",
    "group_size": "num_generations", "total_steps": "max_steps", "policy_lr": "learning_rate", "beta": "beta",
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_new_tokens": "max_completion_length",
    "micro_batch_responses": "per_device_train_batch_size", "checkpoint_every": "save_steps",
    "keep_checkpoints": "save_total_limit", "resume": "train(resume_from_checkpoint=...)", "run_id": "run_name",
    "tracker": "report_to", "eval_every": "eval_steps", "eval_prompts": "eval_dataset",
    "eval_prompts_source": "eval_dataset", "kl": "the trainer", "policy_layers": "model", "freeze_policy": "model",
    "advantages_over": "the trainer, over kept responses",
}  # fmt: skip
OURS_ALONE = {"reward_shaping": "none", "ensemble": 1}  # field -> the value that TRL's trainers can have
MEAN_OVER_ROWS = ("grpo", "sapo", "dr_grpo", "luspo")  # losses that divide by all rows, so they are scaled
SUM_OVER_TOKENS = ("dapo", "cispo", "vespo")  # losses that divide by num_items_in_batch


def save_config(reward_model: str, **fields: Any) -> Config:
    """The reward model's side of a run for `SaveGRPOTrainer` and `SaveRLOOTrainer`: table 8, without preference pairs.

    fields: any of a Config that TRL's arguments do not say. With `profile` its values in place of table 8's.
    """
    for name in fields:
        if name in OF_TRL:
            raise ConfigError(f"{name} = {fields[name]!r}: in TRL this is {OF_TRL[name]}; leave it out of save_config")
    base = {} if "profile" in fields else {"profile": "paper", "preferences": ""}
    config = make_config(**base | {"backend": "ddp", "num_processes": 1} | fields | {"reward_model": reward_model})
    if RULES[config.rule].extra:
        raise ConfigError(
            f"rule = {config.rule!r} reads the policy's hidden states, which TRL does not hand on; use our own loop"
        )
    for name, value in OURS_ALONE.items():
        if getattr(config, name) != value:
            raise ConfigError(f"{name} = {getattr(config, name)!r}: our own loop alone has it; in TRL it is {value!r}")
    return config


def grpo_args(algo: str = "grpo", profile: str = "paper") -> dict[str, Any]:
    """Table 8 as arguments of trl.GRPOConfig, for GRPO or GSPO and as many processes as were started."""
    own = {"loss_type": "grpo", "scale_rewards": "group", "use_bias_correction_kl": False}
    if algo == "gspo":
        own |= {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
    elif algo != "grpo":
        raise ConfigError(f"algo = {algo!r}: TRL has grpo and gspo here, and rloo_args() for RLOO; use our own loop")
    return _policy_args(profile) | own


def rloo_args(profile: str = "paper") -> dict[str, Any]:
    """Table 8 as arguments of trl.RLOOConfig, for as many processes as were started."""
    return _policy_args(profile) | {"normalize_advantages": False}


def _policy_args(profile: str) -> dict[str, Any]:
    c = make_config(profile=profile)
    rows = c.batch_size * c.group_size // int(os.environ.get("WORLD_SIZE", 1))  # of a step, in this process
    at_once = min(c.micro_batch_responses, rows)
    return dict(
        max_steps=c.total_steps, num_generations=c.group_size, per_device_train_batch_size=at_once,
        gradient_accumulation_steps=rows // at_once, per_device_eval_batch_size=c.group_size, beta=c.beta,
        temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, max_completion_length=c.max_new_tokens,
        learning_rate=c.policy_lr, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=c.max_grad_norm,
        disable_dropout=True, bf16=torch.cuda.is_available(),
    )  # fmt: skip


def whole_config(save: Config, model: Any, args: Any, algo: str) -> Config:
    """The settings of both sides as one Config."""
    source = model if isinstance(model, str) else model.config._name_or_path
    device = "cpu" if args.device.type == "cpu" else str(args.device)  # of several processes it is cpu:0
    of_trl = dict(
        policy_model=source, algo=algo, seed=args.seed, device=device, num_processes=args.world_size,
        batch_size=args.generation_batch_size // args.num_generations, group_size=args.num_generations,
        total_steps=args.max_steps, beta=args.beta, policy_lr=args.learning_rate, temperature=args.temperature,
        top_p=args.top_p, top_k=args.top_k or 0, max_new_tokens=args.max_completion_length,
    )  # fmt: skip
    return make_config(**save.model_dump() | of_trl)


def refuse_inexact(args: Any, others: dict[str, Any]) -> None:
    """ConfigError for what cannot be exact, or would not be what it says."""

    def no(name: str, why: str, value: Any = None) -> None:
        raise ConfigError(f"{name} = {getattr(args, name, value)!r}: {why}")

    processes, rows = args.world_size, args.per_device_train_batch_size * args.steps_per_generation
    for name in ("reward_funcs", "tools", "environment_factory"):
        if others.get(name):
            no(name, "the reward is the reward model's, of the policy's own words; leave it out", others[name])
    if args.max_steps <= 0:
        no("max_steps", "the curriculum (eq. 14) needs the number of steps; give it")
    if args.num_iterations > 1:
        no("num_iterations", "a batch is for one step of both models; use num_iterations=1")
    if args.steps_per_generation != args.gradient_accumulation_steps:
        no("steps_per_generation", "a batch is for one step; leave it out, gradient_accumulation_steps is enough")
    if rows % args.num_generations:
        no(
            "num_generations",
            f"each of {processes} process(es) takes {rows} rows of a batch (per_device_train_batch_size * "
            "gradient_accumulation_steps), which are no whole groups; make them a multiple",
        )
    loss = getattr(args, "loss_type", "grpo")
    if loss not in MEAN_OVER_ROWS + SUM_OVER_TOKENS:
        known = ", ".join(MEAN_OVER_ROWS + SUM_OVER_TOKENS)
        no("loss_type", f"rows cannot be left out of its divisor exactly; use one of {known}")
    for name in ("entropy_coef", "use_adaptive_entropy"):
        if getattr(args, name, None):
            no(name, "the entropy bonus counts rows that are left out; leave it out")
    if args.mask_truncated_completions:
        no(
            "mask_truncated_completions",
            "length_filter='both' in save_config does it, in the right place; leave it out",
        )
    if args.use_liger_kernel:
        no("use_liger_kernel", "older versions of TRL compute the loss in it; leave it out")
