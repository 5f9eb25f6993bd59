"""What a step costs: TRL's GRPO, our GRPO (rule frozen) and SAVE on the same models, prompts and token counts.

Each system runs in a process of its own, so that its peak memory is its own. The processes take turns, a step each
(A, B, C, A, B, C, ...), so that a machine that is slow for a while is slow for all; a ratio is taken within a round.

Every response has exactly `new` tokens, by the weights alone: one coordinate of the residual stream holds a constant
that no layer writes to, and it makes the end and pad tokens unlikely beyond any draw. So no response is finished, and
under either length_filter our reward model would learn from none of them. `ours` marks them as finished, the one thing
that it changes. Prompts differ in one word, which the models cannot tell from another, and curriculum=none keeps every
response. So V is near the middle of every group, and nearly all groups have both signs: SAVE at its most expensive.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
)

from savelib.config import Config, ConfigError, make_config
from savelib.data.chat import word_tokenizer
from savelib.data.hub import from_config
from savelib.models.adapters import plain
from savelib.models.compute import peak_memory, reset_peak_memory
from savelib.models.rollout import Rollout
from savelib.paths import project_root, runs_dir, writable_folder, write_atomically
from savelib.runs.hours import STEP_PHASES, Machine, Work, step_seconds
from savelib.runs.memory import GIB, cache_bytes
from savelib.runs.sizes import PAPER_MODELS, Sizes, model_sizes
from savelib.training.algorithm import save_step
from savelib.training.metrics import Clock
from savelib.training.stages import anchor_stage, preference_stage
from savelib.training.trainer import Trainer, load_data

SYSTEMS = {"trl": "TRL GRPOTrainer", "grpo": "our GRPO (frozen)", "save": "our SAVE"}
PHASES = (
    "rollout", "reward scoring", "RM update", "value update", "reference log-probs", "policy forward/backward",
    "optimizer", "other",
)  # fmt: skip
FIRST_WORDS = slice(320, 448)  # of the prompts: 4 for each of up to 32
PAD, END, WORDS = "<pad>", "<end>", ("user", "assistant")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end>{{ '' if loop.last else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)

# sizes

_llama = partial(LlamaConfig, hidden_size=256, intermediate_size=1024, num_attention_heads=4, num_hidden_layers=4,
                 vocab_size=512)  # fmt: skip
SHAPES: dict[str, tuple[Callable[..., PreTrainedConfig], ...]] = {  # policy, reward model
    "quick": (partial(_llama, hidden_size=64, intermediate_size=128, num_hidden_layers=2),) * 2,
    "llama": (_llama,) * 2,
    "smollm2": (
        partial(LlamaConfig, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    ) * 2,
    "paper": (PAPER_MODELS["Qwen/Qwen3-4B-Instruct-2507"], PAPER_MODELS["Skywork/Skywork-Reward-V2-Llama-3.2-3B"]),
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """One measurement: shapes of the models, B, G, prompt and new tokens; `fields` are config fields of our systems."""

    shape: str
    batch: int
    group: int
    prompt: int
    new: int
    fields: dict[str, Any] = field(default_factory=dict)
    systems: tuple[str, ...] = tuple(SYSTEMS)
    device: str = "cpu"

    @property
    def naive_rm_tokens(self) -> int:
        """Padded tokens of three passes of the reward model over all rows; the template ends a response by a token."""
        return 3 * self.batch * self.group * (self.prompt + self.new + 1)


_cpu = dict(gradient_checkpointing=False, micro_batch_groups=1, micro_batch_responses=16, rollout_rows=64)
_gpu = dict(lora_rank=64, micro_batch_groups=1, micro_batch_responses=8, rollout_rows=64)  # as profile single_gpu
_a = Size("llama", 8, 8, 64, 64, _cpu)
SIZES: dict[str, Size] = {
    "quick": Size("quick", 2, 4, 16, 8, _cpu),
    "a": _a,
    "a256": replace(_a, new=256),
    "b": replace(_a, prompt=256),
    "c": Size("smollm2", 2, 8, 128, 32, _cpu),
    "paper512": Size("paper", 4, 16, 512, 512, _gpu, ("grpo", "save"), "cuda"),
    "paper1024": Size("paper", 4, 16, 512, 1024, _gpu, ("grpo", "save"), "cuda"),
}
GROWTH: dict[str, Size] = {  # around size a, SAVE alone
    **{f"G={g}": replace(_a, group=g, fields=_cpu | {"rollout_rows": 8 * g}) for g in (4, 8, 16, 32)},
    **{f"new={n}": replace(_a, new=n) for n in (64, 128, 256, 512, 1024)},
    **{f"B={b}": replace(_a, batch=b) for b in (8, 16, 32)},
}
GROWTH = {name: replace(size, systems=("save",)) for name, size in GROWTH.items()}
DEFAULT_SIZES = ("a", "a256", "b", "c", "growth")
OVERHEAD = "step time, SAVE / our GRPO"
BARS = (  # what, column, system, against, at most, at the sizes; `naive`: tokens of three padded passes
    ("step time, SAVE / TRL's GRPO", "seconds", "save", "trl", 1.0, ("quick", "a", "b", "c")),
    (OVERHEAD, "seconds", "save", "grpo", 1.25, ("quick", "a")),
    (OVERHEAD, "seconds", "save", "grpo", 1.15, ("a256",)),
    ("peak memory, SAVE / TRL's GRPO", "peak_gb", "save", "trl", 1.0, ("quick", "b", "c")),
    ("RM tokens, SAVE / three padded passes", "rm_tokens", "save", "naive", 0.5, ("quick", "b")),
)


# models and prompts


def save_models(shape: str, folder: Path, device: str = "cpu") -> None:
    """Write folder/policy and folder/reward with random weights, each with a tokenizer of one token a word."""
    policy, reward = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        models = {
            "policy": from_config(AutoModelForCausalLM, policy(pad_token_id=0, eos_token_id=1, bos_token_id=None)),
            "reward": from_config(
                AutoModelForSequenceClassification,
                reward(pad_token_id=0, eos_token_id=1, bos_token_id=None, num_labels=1),
            ),
        }
    for model in models.values():
        model.get_input_embeddings().weight.data[FIRST_WORDS] = 0
    never_end(models["policy"])
    for name, model in models.items():
        model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder / name)
        words = [PAD, END, *WORDS, *(f"w{i}" for i in range(4, model.config.vocab_size))]
        word_tokenizer(words, TEMPLATE, pad_token=PAD, eos_token=END).save_pretrained(folder / name)


@torch.no_grad()
def never_end(model: nn.Module) -> None:
    """Make the pad and end tokens (ids 0, 1) impossible.

    Coordinate 0 of the residual stream is 1 for every word, and no layer writes to it. In the output layer it counts
    for the words and against the two.
    """
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):  # one, if they are tied
        weight[:, 0] = 1
        weight[:2, 0] = -1


def prompts_of(size: Size) -> list[str]:
    """Prompts that the chat template makes `size.prompt` tokens long: three are its own. They differ in one word."""
    rest = " ".join(f"w{4 + i % 300}" for i in range(size.prompt - 4))
    return [f"w{i} {rest}" for i in range(FIRST_WORDS.start, FIRST_WORDS.start + 4 * size.batch)]


def bench_config(size: Size, folder: Path, rule: str = "save") -> Config:
    """The configuration of all three systems: table 8's sampling and KL; float32 on the CPU.

    Learning rates cost nothing. These are so small that the rewards stay where V was fitted, and all steps are alike.
    """
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts_of(size)))
    return make_config(
        profile="paper", num_processes=1, backend="ddp", device=size.device, rule=rule, curriculum="none",
        policy_model=str(folder / "policy"), reward_model=str(folder / "reward"), prompts=str(path),
        preferences="", prompt_selection="all", anchor_prompts=8, anchor_responses=4, anchor_epochs=1,
        precision="float32" if size.device == "cpu" else "bfloat16", batch_size=size.batch, group_size=size.group,
        max_new_tokens=size.new, anchor_lr=1e-7, value_head_lr=1e-7, backbone_lr=1e-8, reward_head_lr=1e-8,
        policy_lr=1e-7, **size.fields,
    )  # fmt: skip


# one system in its process


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
    """A trainer whose responses all count as finished: none of them ever ends (see above)."""

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
    """TRL's GRPOTrainer, the frozen reward model given as a folder. A turn lasts from on_step_begin to on_step_end."""
    trl = importlib.import_module("trl")  # a test's dependency: savelib itself does not need it

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
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip

    class Turns(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            timed(clock, optimizer, "step", "optimizer")

        def on_step_begin(self, args, state, control, **kwargs):
            turn.begin()

        def on_step_end(self, args, state, control, **kwargs):
            m = trainer._metrics["train"]
            turn.end(tokens=m["completions/mean_length"][-1], groups=0, used=c.batch_size * c.group_size)  # fmt: skip

    trainer = trl.GRPOTrainer(
        model=c.policy_model, reward_funcs=c.reward_model, args=args, callbacks=[Turns()],
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in rows]),
    )  # fmt: skip
    turn.watch(trainer.reward_funcs[0].base_model)
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


def _worker(system: str, config: dict[str, Any], steps: int) -> None:
    """`python -m savelib.experiments.cost SPEC`: say when ready, then make a step for each line read."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    made = Config(**config)
    device = torch.device(made.device)
    reset_peak_memory(device)
    turn = Turn(channel, device, peak_memory(device))
    trls(made, turn, steps) if system == "trl" else ours(made, turn, steps)


class System:
    """A system in its process. Raises ConfigError with the last line of its log when it stops."""

    def __init__(self, name: str, size: Size, models: Path, steps: int, log: Path):
        self.name, self.log = name, log
        config = bench_config(size, models, "save" if name == "save" else "frozen")
        spec = json.dumps({"system": name, "config": config.model_dump(), "steps": steps})
        env = os.environ | {"SAVE_CACHE": str(models / "cache"), "HF_HUB_OFFLINE": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(project_root()), env.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "savelib.experiments.cost", spec], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log.open("a"), text=True, env=env,
        )  # fmt: skip

    def __enter__(self) -> System:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.terminate()
        self.process.wait()

    def answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            said = self.log.read_text().strip().splitlines() or ["nothing"]
            raise ConfigError(f"bench: {SYSTEMS[self.name]} stopped: {said[-1]} (its log: {self.log})")
        return json.loads(line)

    def turn(self) -> dict[str, float]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


# the measurement


def measure(name: str, size: Size, models: Path, repeats: int, log: Path) -> list[dict[str, Any]]:
    """A row per (system, repeat), after one round of warm-up. On a GPU the systems run one after the other: for memory.

    Raises ConfigError where a system did not sample exactly size.new tokens, or did not learn from all responses.
    """
    systems = [s for s in size.systems if s != "trl" or has_trl()]
    rows = []
    for together in [systems] if size.device == "cpu" else [[s] for s in systems]:
        with ExitStack() as stack:
            started = [stack.enter_context(System(s, size, models, repeats + 1, log)) for s in together]
            threads = {s.answer()["threads"] for s in started}  # each says so when it is ready
            if len(threads) > 1:
                raise ConfigError(f"bench: the systems use {sorted(threads)} threads; set OMP_NUM_THREADS")
            for repeat in range(repeats + 1):
                for s in started:
                    made = s.turn()
                    _check(size, s, made)
                    if repeat:
                        rows.append({"size": name, "system": s.name, "repeat": repeat} | made)
    shape = {"batch_size": size.batch, "group_size": size.group, "prompt": size.prompt, "new": size.new}
    return [row | shape | {"naive_rm_tokens": size.naive_rm_tokens} for row in rows]


def _check(size: Size, system: System, made: dict[str, float]) -> None:
    wanted = {"tokens": size.new, "used": size.batch * size.group}
    wrong = {k: made[k] for k, v in wanted.items() if made[k] != v}
    if wrong:
        raise ConfigError(f"bench: {SYSTEMS[system.name]} has {wrong} where {wanted} is asked for: not comparable")


def has_trl() -> bool:
    return importlib.util.find_spec("trl") is not None


def machine() -> dict[str, Any]:
    """What the figures depend on: cores, threads, memory, versions, and the two rates of the floor."""
    packages = ("torch", "transformers", "trl", "accelerate", "numpy")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": model or platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, "gpu": gpu,
        "load_before": os.getloadavg()[0], "python": platform.python_version(), "versions": versions,
    }  # fmt: skip


def rates(device: str) -> dict[str, float]:
    """Best of several: FLOP/s of a square matmul (float32; bfloat16 on CUDA), bytes/s of a copy, read and written."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1536, torch.float32)
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    source = torch.ones(2**27, device=device)  # 512 MiB, beyond any cache
    target, clock = torch.empty_like(source), Clock(torch.device(device))

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(7):
            start = clock.now()
            work()
            seconds.append(clock.now() - start)
        return min(seconds)

    return {
        "flops_per_second": 2 * n**3 / best(lambda: a @ b),
        "bytes_per_second": 2 * 4 * source.numel() / best(lambda: target.copy_(source)),
    }


def floor(size: Size, policy: Sizes, reward: Sizes, rate: dict[str, float], system: str) -> dict[str, float]:
    """Seconds by phase below which no program on this machine comes: each token once, a prompt once a group.

    FLOPs over the matmul's rate; decoding: that, or weights and keys and values read once a token over the bandwidth.
    """
    work = Work(
        size.batch, size.group, size.prompt, size.new, width=4 if size.device == "cpu" else 2, repeated=False,
        rank=size.fields.get("lora_rank", 0), rm_steps=int(system == "save"),
    )  # fmt: skip
    speed, whole = rate["flops_per_second"], dict.fromkeys(STEP_PHASES, 1.0)
    seconds = step_seconds(work, policy, reward, Machine(speed, speed, rate["bytes_per_second"], efficiency=whole))
    return {phase: seconds.get(phase, 0.0) for phase in PHASES}


def run(sizes: list[str], repeats: int, out: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """Measure the sizes (names of SIZES, or growth) into a folder: results.json, steps.csv, log.txt. Returns it."""
    unknown = [s for s in sizes if s not in (*SIZES, "growth")]
    if unknown:
        raise ConfigError(f"sizes = {','.join(unknown)!r}: valid names are {', '.join((*SIZES, 'growth'))}")
    if repeats < 1:
        raise ConfigError(f"repeats = {repeats}: give at least 1, for a verdict 7")
    plan = {name: (size, repeats) for name, size in SIZES.items() if name in sizes}
    plan |= {name: (size, 1) for name, size in GROWTH.items() if "growth" in sizes}
    if any(size.device == "cuda" for size, _ in plan.values()) and not torch.cuda.is_available():
        raise ConfigError(f"sizes = {','.join(sizes)!r}: the paper's shapes need CUDA, which is not here")
    out = writable_folder("out", out or runs_dir() / f"bench-{time.strftime('%Y%m%d-%H%M%S')}", {})
    out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(), "repeats": repeats, "systems": list(SYSTEMS), "rates": {}, "floors": {}}
    results["sizes"] = {name: asdict(size) for name, (size, _) in plan.items()}
    if not has_trl():
        results["systems"].remove("trl")
        say("trl is not installed: its column is left out")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (size, count) in plan.items():
            models = Path(folder) / size.shape
            if not models.exists():
                save_models(size.shape, models, size.device)
            if size.device not in results["rates"]:
                results["rates"][size.device] = rates(size.device)
            rows += measure(name, size, models, count, out / "log.txt")
            both = [model_sizes(str(models / kind), f"{kind}_model") for kind in ("policy", "reward")]
            rate = results["rates"][size.device]
            results["floors"][name] = {s: floor(size, *both, rate, s) for s in size.systems}
            results.setdefault("rollout_gb", {})[name] = _rollout_gb(size, both[0])
            pd.DataFrame(rows).to_csv(out / "steps.csv", index=False)
            say(f"{name}: " + ", ".join(f"{s} {x:.2f} s" for s, x in medians(pd.DataFrame(rows), name).items()))
    results["bars"] = bars(pd.DataFrame(rows), results["rollout_gb"])
    write_atomically(out / "results.json", json.dumps(results, indent=2))
    return out


def _rollout_gb(size: Size, policy: Sizes) -> float:
    """What sampling has to hold at once: keys and values."""
    at_once = min(size.batch * size.group, size.fields["rollout_rows"])
    return cache_bytes(policy, at_once, size.prompt + size.new, size.device == "cuda") / GIB


# reading the results


def load(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """(results.json, steps.csv with a row per size, system and repeat)."""
    return json.loads((Path(folder) / "results.json").read_text()), pd.read_csv(Path(folder) / "steps.csv")


def medians(steps: pd.DataFrame, size: str, column: str = "seconds") -> pd.Series:
    """The column's median over the repeats, one value a system."""
    return steps[steps["size"] == size].groupby("system", sort=False)[column].median()


def phases(steps: pd.DataFrame, size: str) -> pd.DataFrame:
    """Median seconds of each phase (rows) for each system (columns), and of the step."""
    here = steps[steps["size"] == size].groupby("system", sort=False)
    return here[[*PHASES, "seconds"]].median().T.rename(index={"seconds": "step"})


def paired(steps: pd.DataFrame, size: str, column: str, system: str, against: str) -> np.ndarray:
    """The column's ratio of two systems in each round [repeats]; against `naive`: three padded passes' tokens."""
    here = steps[steps["size"] == size].set_index("repeat")
    first = here[here["system"] == system]
    second = first["naive_rm_tokens"] if against == "naive" else here[here["system"] == against][column]
    return (first[column] / second).dropna().to_numpy()


def bars(steps: pd.DataFrame, rollout_gb: dict[str, float]) -> list[dict[str, Any]]:
    """Each bar that these steps can judge: its ratio (median, lowest and highest round), its limit, whether reached."""
    judged = [
        (what, size, limit, paired(steps, size, column, system, against))
        for what, column, system, against, limit, sizes in BARS
        for size in sizes
    ]
    peak = steps[steps["system"] == "save"].groupby("size")["peak_gb"].median()
    if {"B=8", "B=32"} <= set(peak.index):
        judged.append(("peak memory, B 32 / B 8", "a", 1.05, np.array([peak["B=32"] / peak["B=8"]])))
    if {"G=4", "G=32"} <= set(peak.index):
        growth = (peak["G=32"] - peak["G=4"]) / (rollout_gb["G=32"] - rollout_gb["G=4"])
        judged.append(("growth of peak memory from G 4 to 32 / that of the rollout", "a", 1.0, np.array([growth])))
    return [
        {"bar": what, "size": size, "ratio": float(np.median(r)), "low": float(r.min()), "high": float(r.max()),
         "at most": limit, "reached": bool(np.median(r) <= limit), "rounds": len(r)}
        for what, size, limit, r in judged if len(r)
    ]  # fmt: skip


def report(folder: Path) -> str:
    """The tables as text: seconds by phase beside the floor, memory, tokens, growth, and the bars with their marks."""
    results, steps = load(folder)
    form = {"float_format": "{:.3f}".format, "na_rep": "-"}
    m = results["machine"]
    lines = [f"{m['processor']}, {m['cores']} cores, {m['threads']} threads, load {m['load_before']:.1f} at the start"]
    lines += [f"{d}: {r['flops_per_second'] / 1e9:,.0f} GFLOP/s, {r['bytes_per_second'] / 1e9:,.0f} GB/s"
              for d, r in results["rates"].items()]  # fmt: skip
    for name in [s for s in results["sizes"] if s in SIZES]:
        s = results["sizes"][name]
        lines += [
            "",
            f"size {name}: {s['shape']}, B {s['batch']}, G {s['group']}, prompt {s['prompt']}, {s['new']} new",
        ]
        table = phases(steps, name)
        for system in ("grpo", "save"):
            below = pd.Series(results["floors"][name][system])
            table[f"floor {system}"] = pd.concat([below, pd.Series({"step": below.sum()})])
        for column in ("cpu_seconds", "peak_gb", "base_gb", "rm_tokens", "groups"):
            table.loc[column] = medians(steps, name, column)
        tokens = medians(steps, name, "tokens") * s["batch"] * s["group"]
        table.loc["rollout tokens/s"] = tokens / medians(steps, name, "rollout")
        lines.append(table.rename(columns=SYSTEMS).to_string(**form))
    grown = steps[steps["size"].isin(GROWTH)].set_index("size")
    if len(grown):
        columns = ["seconds", "rollout", "RM update", "reward scoring", "policy forward/backward", "peak_gb"]
        lines += ["", "SAVE around size a", grown[columns].to_string(**form)]
    lines += ["", f"bars: median of the rounds' ratios, lowest and highest ({results['repeats']} rounds)"]
    for b in results["bars"]:
        mark = "reached" if b["reached"] else "NOT reached"
        spread = f"[{b['low']:.3f}, {b['high']:.3f}]"
        if b["bar"] == OVERHEAD:
            floors = [sum(results["floors"][b["size"]][system].values()) for system in ("save", "grpo")]
            mark += f"; the floors' own ratio is {floors[0] / floors[1]:.2f}"
        lines.append(f"  {b['bar']:60}{b['size']:>6}{b['ratio']:8.3f} {spread:16} <= {b['at most']:.2f}  {mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    _worker(**json.loads(sys.argv[1]))
