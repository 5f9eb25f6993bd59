"""Going on with a run: bit for bit, from checkpoints that are whole, after kills, damage and full disks."""

import ast
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tiny_models import paper_run

import savelib
from savelib.config import ConfigError, make_config
from savelib.paths import digest
from savelib.runs.checkpoint import MANIFEST, _sha256, check, latest_checkpoint
from savelib.runs.folder import RunLog, checkpoints, read_jsonl, read_manifest
from savelib.runs.train import train

# ranks are forked from a server that has imported all: real processes to kill, without the seconds of a start
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["savelib.runs.train", "savelib.cli", "deepspeed"])
SMALL = dict(
    anchor_prompts=4, total_steps=6, batch_size=2, checkpoint_every=2, eval_every=3, tracker="none", policy_lr=1e-3,
    backbone_lr=1e-4, reward_head_lr=1e-3, gradient_checkpointing=False,
)  # fmt: skip


def checked(base: dict) -> dict:
    """Rule save_checked with blocks of 3 steps: a checkpoint of step 4 is in the middle of one."""
    return dict(rule="save_checked", guard_every=3, guard_preferences=base["preferences"], guard_pairs=4)


def outcome(run: Path) -> str:
    """One hash of all that a run gave: both models, the value head, metrics without clock and memory, samples."""
    files = {
        str(f.relative_to(run)): _sha256(f) for d in ("policy", "reward_model") for f in sorted((run / d).iterdir())
    }
    assert {"policy/model.safetensors", "reward_model/model.safetensors", "reward_model/value_head.safetensors"} <= set(
        files
    )
    whole = [line for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    clock = ("seconds", "time/", "memory/")
    metrics = [{k: v for k, v in json.loads(line).items() if not k.startswith(clock)} for line in whole]
    assert [row["step"] for row in metrics] == list(range(len(metrics))), "no line is missing, none is double"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return hashlib.sha256(json.dumps([files, metrics, samples], sort_keys=True).encode()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): _sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def _rank(values: dict, env: dict, output: Path) -> None:
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    if values["num_processes"] > 1:
        train(make_config(**values))
    else:
        from savelib.cli import app

        path = output.with_suffix(".yaml")
        path.write_text(make_config(**values).to_yaml())
        app(["train", "--config", str(path)])


def started(values: dict) -> list[multiprocessing.Process]:
    """A run's processes, one a rank. What they say is in <SAVE_RUNS>/../said<rank>.log."""
    n = values["num_processes"]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for i in range(n):
        many = dict(RANK=i, LOCAL_RANK=i, WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        env = dict(OMP_NUM_THREADS=1, DS_ACCELERATOR="cpu") | (many if n > 1 else {})
        env = {k: str(v) for k, v in env.items()} | {k: os.environ[k] for k in ("SAVE_RUNS", "SAVE_CACHE", "PATH")}
        ranks.append(
            FORK.Process(target=_rank, args=(values, env, Path(os.environ["SAVE_RUNS"]).parent / f"said{i}.log"))
        )
        ranks[-1].start()
    return ranks


def finished(ranks: list[multiprocessing.Process]) -> list[int]:
    for p in ranks:
        p.join(300)
    return [p.exitcode for p in ranks]


def said(rank: int = 0) -> str:
    return (Path(os.environ["SAVE_RUNS"]).parent / f"said{rank}.log").read_text()


def until(seen, ranks: list[multiprocessing.Process]) -> None:
    """Return as soon as seen() holds, all processes being alive."""
    while not seen():
        assert all(p.is_alive() for p in ranks), said()
        time.sleep(0.002)


def killed_after(step: int, values: dict) -> Path:
    """The folder of a run whose processes were all killed when it had written the line of `step`."""
    ranks, run = started(values), Path(os.environ["SAVE_RUNS"]) / values["run_id"]
    until(lambda: len(read_jsonl(run / "metrics.jsonl")) > step, ranks)
    for p in ranks:
        p.kill()
    assert finished(ranks) == [-signal.SIGKILL] * len(ranks)
    assert read_manifest(run)["status"] == "killed"
    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("base"), "qwen3") | SMALL


pytestmark = pytest.mark.usefixtures("folders")


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """(outcome of a run without interruption, folder of the same run killed by SIGKILL after the line of step 5)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAVE_RUNS", str(tmp_path_factory.mktemp("made") / "runs"))
        patch.setenv("SAVE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        straight = train(make_config(**base, run_id="straight"))
        return outcome(straight), killed_after(5, base | dict(run_id="killed"))


@pytest.fixture
def straight(made):
    return made[0]


@pytest.fixture
def killed(made, tmp_path):
    """A copy of the killed run: checkpoints of steps 2 and 4, lines up to step 5."""
    return Path(shutil.copytree(made[1], tmp_path / "runs" / "killed"))


def resumed(base, **more) -> Path:
    return train(make_config(**base | dict(run_id="killed", resume="auto") | more))


# bit for bit


def test_a_killed_run_goes_on_as_if_nothing_had_happened(base, straight, killed):
    before = read_jsonl(killed / "metrics.jsonl")
    assert [f.name for f in checkpoints(killed)] == ["step_000002", "step_000004"]
    with pytest.raises(ConfigError, match="made with other values of seed"):
        resumed(base, seed=1)
    resumed(base)
    assert outcome(killed) == straight
    assert read_manifest(killed)["status"] == "done"
    after = read_jsonl(killed / "metrics.jsonl")
    assert after[:5] == before[:5], "lines before the checkpoint are kept as they are"
    assert after[5]["seconds"] > after[4]["seconds"], "the clock goes on"
    assert read_manifest(killed)["seconds"] >= round(after[-1]["seconds"], 1) > before[4]["seconds"]


@pytest.mark.parametrize("torn", ['{"step": 5, "sec', "", '{"step": 6, "seconds": 1.0}\n{"st'])
def test_a_half_written_last_line_is_written_again(base, straight, killed, torn):
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(killed / name, "a") as file:
            file.write(torn)
    (killed / ".metrics.jsonl.part").write_text("{")
    (killed / "checkpoints/.step_000006.0123abcd.part/policy").mkdir(parents=True)
    resumed(base)
    assert outcome(killed) == straight
    assert not [f for f in killed.rglob("*.part")], "what killed writers left is gone"


def test_lines_that_are_missing_are_not_made_up_for(base, killed):
    rows = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(rows[:2] + rows[3:]))
    with pytest.raises(ConfigError, match="metrics.jsonl has not one line for each step from 0 to 4"):
        resumed(base)
    assert (killed / "metrics.jsonl").read_text() == "".join(rows[:2] + rows[3:])


def test_adapters_and_8_bit_moments_go_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_models, "SIZES", tiny_models.SIZES | dict(hidden_size=64))  # rounded from 4,096 numbers on
    values = paper_run(tmp_path) | SMALL | dict(lora_rank=64, optimizer="adamw_8bit")
    run = killed_after(5, values | dict(run_id="killed"))
    torch.manual_seed(99)  # new adapters depend on the run's seed alone, and not on whether stage 2 was in the cache
    straight = train(make_config(**values, run_id="straight"))
    state = load_file(run / "checkpoints/step_000004/policy_optimizer.rank0.safetensors")
    assert any(key.endswith("state1") and str(v.dtype) == "torch.uint8" for key, v in state.items())
    resumed(values)
    assert outcome(run) == outcome(straight)


@pytest.mark.parametrize(("values", "module"), [
    (dict(rule="r2m"), "policy_feedback"), (dict(rule="frozen", algo="prime"), "process_reward"),
])  # fmt: skip
def test_what_a_rule_or_an_algorithm_trains_besides_goes_on_bit_for_bit(base, values, module):
    run = killed_after(5, base | values | dict(run_id="killed"))
    folder = run / "checkpoints/step_000004"
    assert {f"{module}.safetensors", f"{module}_optimizer.rank0.safetensors"} <= {f.name for f in folder.iterdir()}
    straight = train(make_config(**base | values, run_id="straight"))
    resumed(base | values)
    assert outcome(run) == outcome(straight)
    assert (run / "reward_model/policy_feedback.safetensors").is_file() == (module == "policy_feedback")


@pytest.mark.parametrize("certificate", [0, 2])
def test_a_block_that_was_interrupted_ends_as_if_it_had_not_been(base, certificate):
    values = base | checked(base) | dict(guard_pairs=4 - certificate, certificate_pairs=certificate)
    straight = train(make_config(**values, run_id="straight"))
    last = read_jsonl(straight / "metrics.jsonl")[-1]
    assert last["guard/accepted"] + last["guard/undone"] == 2
    run = killed_after(5, values | dict(run_id="killed"))
    assert (run / "checkpoints/step_000004/guard.rank0.safetensors").is_file()
    train(make_config(**values, run_id="killed", resume="auto"))
    assert outcome(run) == outcome(straight)


@pytest.mark.parametrize("backend", [
    "ddp",
    pytest.param("deepspeed_zero2", marks=pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed: Linux")),
])  # fmt: skip
def test_two_processes_go_on_bit_for_bit(base, backend):
    values = base | checked(base) | dict(num_processes=2, backend=backend)
    ranks = started(values | dict(run_id="straight"))
    assert finished(ranks) == [0, 0], said()
    straight = Path(os.environ["SAVE_RUNS"]) / "straight"
    run = killed_after(5, values | dict(run_id="killed"))
    shards = {f.name for f in (run / "checkpoints/step_000004").glob("policy_optimizer*")}
    assert shards == {f"policy_optimizer.rank{i}.safetensors" for i in range(1 if backend == "ddp" else 2)}
    with pytest.raises(ConfigError, match=r"was made with (backend = 'deepspeed_zero2', )?num_processes = 2; give the"):
        train(make_config(**base | checked(base), run_id="one", resume=str(run / "checkpoints/step_000004")))
    assert finished(started(values | dict(run_id="killed", resume="auto"))) == [0, 0], said()
    assert outcome(run) == outcome(straight)


# a new run from a checkpoint


def test_a_checkpoint_s_path_starts_a_new_run_from_there(base, straight, killed):
    before, checkpoint = digests(killed), killed / "checkpoints/step_000002"
    branch = train(make_config(**base, run_id="branch", resume=str(checkpoint)))
    assert outcome(branch) == straight
    assert read_jsonl(branch / "metrics.jsonl")[:3] == read_jsonl(killed / "metrics.jsonl")[:3]
    assert digests(killed) == before, "the run that it comes from is as it was"
    with pytest.raises(ConfigError, match="already holds a run; choose another run_id"):
        train(make_config(**base, run_id="branch", resume=str(checkpoint)))
    with pytest.raises(ConfigError, match="is at step 2; total_steps = 2 is done"):
        train(make_config(**base | dict(total_steps=2), run_id="short", resume=str(checkpoint)))


@pytest.mark.parametrize(("made_with", "said"), [
    (dict(backend="deepspeed_zero2", num_processes=2), "with backend = 'deepspeed_zero2', num_processes = 2; give"),
    (dict(optimizer="adamw_8bit"), "made with optimizer = 'adamw_8bit'; give"),
    (dict(lora_rank=8), "made with lora_rank = 8; give"),
])  # fmt: skip
def test_a_checkpoint_of_another_kind_is_refused(base, killed, made_with, said):
    folder = killed / "checkpoints/step_000004"
    rewritten(folder, made_with=json.loads((folder / MANIFEST).read_text())["made_with"] | made_with)
    with pytest.raises(ConfigError, match=said):
        check(folder, make_config(**base))
    with pytest.raises(ConfigError, match=said):
        train(make_config(**base, run_id="branch", resume=str(folder)))


# damage


def rewritten(folder: Path, **changes) -> None:
    """Give a checkpoint the manifest of its files as they are now."""
    made = json.loads((folder / MANIFEST).read_text())
    del made["sha256_of_this"]
    made |= dict(sha256={name: _sha256(folder / name) for name in made["sha256"]}) | changes
    (folder / MANIFEST).write_text(json.dumps(made | dict(sha256_of_this=digest(made))))


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def emptied(file: Path) -> None:
    os.truncate(file, 0)


def altered(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_step(file: Path) -> None:
    file.write_text(file.read_text().replace('"step": 4', '"step": 5'))


def lists_nothing(file: Path) -> None:
    file.write_text('{"step": 4, "sha256": {}}')


def unknown_dtype(file: Path) -> None:
    header = b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    rewritten(file.parent)


@pytest.mark.parametrize(("file", "how"), [
    ("policy/model.safetensors", truncated), ("policy/model.safetensors", altered), ("policy/config.json", altered),
    ("reward_model/model.safetensors", emptied), ("reward_model/value_head.safetensors", altered),
    ("reward_model_optimizer.rank0.safetensors", truncated), ("reward_model_optimizer.rank0.safetensors", Path.unlink),
    ("reward_model/model.safetensors", Path.unlink), ("value_head_optimizer.rank0.safetensors", unknown_dtype),
    (MANIFEST, Path.unlink), (MANIFEST, truncated), (MANIFEST, emptied), (MANIFEST, altered), (MANIFEST, other_step),
    (MANIFEST, lists_nothing), (MANIFEST, lambda file: file.write_text("[]")),
    (MANIFEST, lambda file: file.write_bytes(b"\xff")),
])  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(killed, capsys, file, how):
    how(killed / "checkpoints/step_000004" / file)
    assert latest_checkpoint(killed) == (2, killed / "checkpoints/step_000002")
    err = capsys.readouterr().err
    assert f"checkpoint {killed}/checkpoints/step_000004 is damaged ({file}" in err
    assert err.endswith("; the one before is used\n") and err.count("\n") == 1


def test_a_damaged_checkpoint_is_replaced_and_the_end_is_the_same(base, straight, killed, capsys):
    damaged = killed / "checkpoints/step_000004"
    altered(damaged / "policy/model.safetensors")
    with pytest.raises(ConfigError, match=r"step_000004 is damaged \(policy/model.safetensors\)"):
        train(make_config(**base, run_id="branch", resume=str(damaged)))
    assert not (killed.parent / "branch").exists()
    resumed(base)
    assert "step_000004 is damaged (policy/model.safetensors); the one before is used" in capsys.readouterr().err
    assert outcome(killed) == straight
    assert check(damaged) == 4 and not list(killed.rglob("*.part"))


def test_a_damaged_checkpoint_does_not_stay_for_a_good_one(base, straight, killed):
    (killed / "checkpoints/step_000004/policy/model.safetensors").unlink()
    resumed(base, checkpoint_every=3, keep_checkpoints=1)
    assert [f.name for f in checkpoints(killed)] == ["step_000003"]
    assert check(killed / "checkpoints/step_000003") == 3 and outcome(killed) == straight


def test_with_all_checkpoints_damaged_a_run_starts_again(base, straight, killed, capsys):
    altered(killed / "checkpoints/step_000002/policy/model.safetensors")
    (killed / "checkpoints/step_000004" / MANIFEST).unlink()
    resumed(base)
    err = capsys.readouterr().err
    assert "step_000004 is damaged (checkpoint.json" in err and "step_000002 is damaged (policy/model" in err
    assert "no checkpoint is left, the run starts from the beginning" in err
    assert outcome(killed) == straight


def test_as_many_checkpoints_stay_as_were_asked_for(base, straight, killed):
    (killed / "checkpoints/step_000004_mine").mkdir()  # not ours
    resumed(base, checkpoint_every=1, keep_checkpoints=3)
    names = sorted(f.name for f in (killed / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000004", "step_000004_mine", "step_000005"]
    assert outcome(killed) == straight


def test_two_processes_cannot_train_one_run(base, straight, killed):
    with RunLog(make_config(**base, run_id="killed")) as log:
        log.begin(True, step=4)
        assert read_manifest(killed)["status"] == "running"
        with pytest.raises(ConfigError, match="run_id = 'killed': another process is training it at this moment"):
            resumed(base)
    (killed / "manifest.json").unlink()
    resumed(base)
    assert outcome(killed) == straight


def test_loading_executes_no_pickle(base, straight, killed, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    evil = pickle.dumps(Evil())
    for folder in (killed, killed / "checkpoints", *(d for d in killed.rglob("*") if d.is_dir())):
        for name in ("pytorch_model.bin", "model.bin", "adapter_model.bin", "optimizer.bin", "optimizer.pt",
                     "rng_state.pkl", "rng_state.pth", "random_states_0.pkl", "training_args.bin"):  # fmt: skip
            (folder / name).write_bytes(evil)
    resumed(base)
    assert outcome(killed) == straight and not (tmp_path / "executed").exists()
    pickle.loads(evil)
    assert (tmp_path / "executed").exists(), "it would have"


def test_no_code_here_unpickles():
    for file in Path(savelib.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.partition(".")[0] for name in names} & {"pickle", "dill", "joblib", "cloudpickle", "shelve"}
            assert not found, f"{file}: {found}"
            if isinstance(node, ast.Attribute):
                word = ast.unparse(node)
                assert word not in ("torch.load", "np.load", "numpy.load", "torch.jit.load", "pd.read_pickle"), (
                    file,
                    word,
                )


# a full disk


def limited(process: multiprocessing.Process, size: int) -> None:
    """From now on no file of the process grows beyond `size`: its writes fail as on a full disk."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))


def full(run: Path, cause: str, left: str = "step_000002") -> str:
    """Assert that the run ended in one sentence with cause and last good checkpoint, which is; returns the sentence."""
    errors = [line for line in said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in said(), said()
    assert cause in errors[0] and f"The last good checkpoint is {run}/checkpoints/{left}. Make room" in errors[0]
    assert [f.name for f in checkpoints(run)] == [left] and check(checkpoints(run)[0]) == int(left[-6:])
    assert not list((run / "checkpoints").glob(".*")), "no half folder takes the room"
    return errors[0]


needs_prlimit = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="prlimit is for Linux")


@needs_prlimit
@pytest.mark.parametrize(("what", "wanted"), [
    ("checkpoint", "step 4: no checkpoint could be written to"), ("metrics", "metrics.jsonl could not be written"),
    ("final", "the trained policy could not be written to"),
])  # fmt: skip
def test_a_full_disk_stops_the_run_with_the_cause(base, straight, tmp_path, what, wanted):
    values, run = base | dict(run_id="killed"), tmp_path / "runs/killed"
    if what == "final":
        values["checkpoint_every"] = 4
    [process] = started(values)
    at = checkpoint = run / f"checkpoints/step_{4 if what == 'final' else 2:06d}"
    until(at.is_dir, [process])
    os.kill(process.pid, signal.SIGSTOP)
    sizes = {f.name: f.stat().st_size for f in run.glob("*.jsonl")}
    if what == "metrics":  # of both files, the room left in this one is the smaller
        samples = (run / "samples.jsonl").read_text()
        (run / "samples.jsonl").write_text("")
        limited(process, sizes["metrics.jsonl"] + 100)
    else:
        limited(process, 2 * max(sizes.values()))
    os.kill(process.pid, signal.SIGCONT)
    assert finished([process]) == [2]
    assert wanted in full(run, "File too large", checkpoint.name)
    if what == "metrics":
        assert not (run / "metrics.jsonl").read_text().endswith("\n"), "half a line"
        (run / "samples.jsonl").write_text(samples)
    resumed(values)
    assert outcome(run) == straight


@needs_prlimit
def test_a_disk_that_is_full_for_one_rank(base):
    ranks = started(base | dict(run_id="killed", num_processes=2, backend="deepspeed_zero2"))
    run = Path(os.environ["SAVE_RUNS"]) / "killed"
    until((run / "checkpoints/step_000002").is_dir, ranks)
    limited(ranks[1], 20_000)  # room for its words, not for its optimizer
    assert all(finished(ranks))
    assert "CheckpointError: step 4: no checkpoint could be written" in said(1) and "File too large" in said(1)
    assert [check(f) for f in checkpoints(run)] == [2] and not list((run / "checkpoints").glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """(mount point of a tmpfs, function that gives it a size)."""
    point = tmp_path / "disk"
    point.mkdir()

    def mount(size: int, remount: str = ""):
        words = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(point)]
        return subprocess.run(words, capture_output=True, text=True)

    made = mount(64 << 20)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    yield point, lambda size: mount(size, "remount,")
    subprocess.run(["umount", "-l", str(point)], check=True)


def test_a_small_disk_that_is_full(base, straight, small_disk, made, monkeypatch):
    point, resize = small_disk
    size = sum(f.stat().st_size for f in (made[1] / "checkpoints/step_000002").rglob("*"))
    resize(int(1.7 * size))  # one checkpoint fits, and a part of the next
    monkeypatch.setenv("SAVE_RUNS", str(point / "runs"))
    os.truncate(point / "said0.log", 0) if (point / "said0.log").exists() else None
    assert finished(started(base | dict(run_id="killed"))) == [2], said()
    run = point / "runs/killed"
    assert "step 4: no checkpoint" in full(run, "No space left on device")
    resize(64 << 20)
    resumed(base)
    assert outcome(run) == straight
