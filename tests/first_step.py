"""One `save_step` for each config of a JSON file, alone or under torchrun: metrics and gradients to a folder.

After Adam's first step exp_avg is a tenth of the clipped gradient, whole or in shards, whatever the backend.
"""

import functools
import json
import sys
from pathlib import Path

import cpuinfo
import torch
from safetensors.torch import save_file

from savelib.config import make_config
from savelib.processes import is_main, rank
from savelib.training.algorithm import prepare, save_step
from savelib.training.engine import connect, disconnect

torch.set_num_threads(1)
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)  # seconds, and DeepSpeedCPUAdam asks once an engine
jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
connect(make_config(**next(iter(jobs.values()))))
for name, values in jobs.items():
    t = prepare(make_config(**values))
    metrics, samples = save_step(t, 1)
    gradients = {}
    for kind, model in (
        ("policy", t.policy),
        ("reward_model", t.reward_model.model),
        ("value_head", t.reward_model.value_head),
        *t.extras.items(),
    ):
        engine = t.engines[kind]
        stepped = {"policy": "policy/loss", "reward_model": "rm/loss", "value_head": "value/loss"}
        if stepped.get(kind, "policy/loss") not in metrics:
            continue
        if engine.lockstep and not engine.sharded:
            zero = engine.engine.optimizer
            zero._hp_optimizer_states_linked = False  # it linked them before the first step, when there were none
            zero._lazy_init_hp_params_optimizer_state()
        for key, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if engine.lockstep:
                from deepspeed.utils import safe_get_full_optimizer_state

                gradient = safe_get_full_optimizer_state(p, "exp_avg")
            else:
                gradient = engine.optimizer.state.get(p, {}).get("exp_avg")
            if gradient is not None:
                gradients[f"{kind}.{key}"] = gradient.detach().clone().contiguous()
    out.mkdir(exist_ok=True)
    (out / f"{name}.rank{rank()}.json").write_text(json.dumps([s["response"] for s in samples]))
    if is_main():
        save_file(gradients, out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps(metrics))
disconnect()
