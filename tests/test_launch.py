"""Training in processes of their own: what is shown of them, why they failed, and that none of them is left."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from tiny_models import paper_run

from savelib.config import ConfigError, make_config
from savelib.runs.folder import read_config, read_manifest, read_metrics
from savelib.runs.launch import RunFailed, _Lines, _Progress, _Said, _stop, _Watched, launch
from savelib.runs.train import train

# read by a process of the run alone, by its place on PYTHONPATH: what one rank does in its first step
FAULTS = """
import os, signal, sys
words = sys.orig_argv
me = "agent" if "torch.distributed.run" in words else os.environ.get("RANK", "0") if "savelib" in words else None
if me == {rank!r}:
    {code}
"""
IN_STEP = "import savelib.training.algorithm as a; a.improve_value_head = lambda *_: "


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return paper_run(tmp_path_factory.mktemp("base"), "qwen3") | dict(
        anchor_prompts=4, total_steps=3, batch_size=2, checkpoint_every=0, eval_every=0, tracker="none",
        policy_lr=1e-3, backbone_lr=1e-4, reward_head_lr=1e-3, gradient_checkpointing=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def long(base):
    """Two processes, and more steps than any test waits for."""
    return base | dict(total_steps=5000, num_processes=2)


@pytest.fixture(autouse=True)
def runs(tmp_path, tmp_path_factory, monkeypatch):
    """Folders of the test's own; their path is in the command line of every process of its runs."""
    monkeypatch.setenv("SAVE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SAVE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path / "runs"
    for pid in processes(tmp_path):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def fault(tmp_path, monkeypatch):
    """fault(rank, code): the run's process of that rank ("agent": torchrun itself) executes the code as it starts."""

    def write(rank, code):
        (tmp_path / "faults").mkdir(exist_ok=True)
        with open(tmp_path / "faults" / "sitecustomize.py", "a") as file:
            file.write(FAULTS.format(rank=rank, code=code))
        path = os.pathsep.join(filter(None, [str(tmp_path / "faults"), os.environ.get("PYTHONPATH")]))
        monkeypatch.setenv("PYTHONPATH", path)

    return write


def quiet(line):
    pass


def processes(folder, *words):
    """The pids of the living processes that have the folder and all the words in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said, state = path.read_text(), path.with_name("stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, UnicodeDecodeError):
            continue
        if str(folder) in said and all(word in said for word in words) and state != "Z":
            found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def wait_for(what, seconds=120):
    end = time.time() + seconds
    while not what():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def first_step(run):
    """Wait until the run has taken a step."""
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= 2)


def assert_nothing_left(folder, after=None):
    """In 3 seconds no process of the folder's runs lives; then, and after the process `after`, no file grows."""
    end = time.time() + 3
    while processes(folder) and time.time() < end:
        time.sleep(0.05)
    assert not processes(folder)
    if after:
        after.join(10)
    sizes = {f: f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    time.sleep(0.5)
    assert {f: f.stat().st_size for f in folder.rglob("*") if f.is_file()} == sizes


def saved(path, values):
    """A config file of the values."""
    path.write_text(make_config(**values).to_yaml())
    return path


def foreground(*words, **more):
    """A command as a user types it, in a session of its own; its output is text."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, **more,
    )  # fmt: skip


def kernel(values):
    """A process that stands for a notebook's kernel: it launches the run and waits for it."""
    process = multiprocessing.get_context("fork").Process(target=launch, args=(make_config(**values), quiet))
    process.start()
    return process


# what is shown


def row(step, seconds):
    return json.dumps({"step": step, "seconds": seconds, "reward/mean": float(step)}) + "\n"


def test_each_line_is_read_once_and_a_file_that_was_replaced_from_its_start(tmp_path):
    path = tmp_path / "f"
    lines = _Lines(path)
    assert lines() == []
    path.write_text("a\nb\nc")
    assert lines() == ["a", "b"] and lines() == []
    with open(path, "a") as file:
        file.write("d\ne\n")
    assert lines() == ["cd", "e"]
    (tmp_path / "g").write_text("longer than before\nx\n")
    (tmp_path / "g").replace(path)
    assert lines() == ["longer than before", "x"] and lines() == []


def test_the_line_is_of_this_attempt_and_of_savelib(tmp_path, base):
    folder, log = tmp_path, tmp_path / "train.log"
    (folder / "metrics.jsonl").write_text(row(0, 1.0) + row(1, 2.0) + row(2, 3.0))
    log.write_text("stage 2: of the earlier attempt\n")
    watched = _Watched(folder, make_config(**base, run_id="r", resume="auto"))
    assert watched.line() == "starting" and not watched.begun()
    with open(log, "a") as file:
        file.write(
            "Loading weights:  10%\rLoading weights: 100%\nstage 2: value head\nop built successfully\n\x1b[1mwarning\n"
        )
    assert watched.line() == "stage 2: value head"
    part = folder / ".metrics.jsonl.part"
    part.write_text(row(0, 1.0) + row(1, 2.0))
    part.replace(folder / "metrics.jsonl")
    with open(log, "a") as file:
        file.write("resuming after step 1 from there\nanother warning\n")
    assert watched.line() == "resuming after step 1 from there" and watched.begun()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(row(2, 4.0) + row(3, 5.0)[:9])
    assert watched.line() == "step 2/3  reward 2.000"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(row(3, 5.0)[9:])
    assert watched.line() == "step 3/3  reward 3.000  0:00:00 left"


def test_a_tenth_of_the_steps_is_printed_and_the_last(base, capsys):
    show = _Progress(make_config(**base | dict(total_steps=25)))
    for step in range(26):
        show(f"step {step}/25  reward 0.1")
        show(f"step {step}/25  reward 0.1")
    printed = [int(n) for n in re.findall(r"step (\d+)/25", capsys.readouterr().out)]
    assert printed == [*range(0, 25, 2), 25]


# one process


def test_launch_watches_a_subprocess_and_returns_its_folder(base, runs, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    said = []
    folder = launch(make_config(**base, run_id="launched"), said.append)
    assert folder == runs / "launched" and read_manifest(folder)["status"] == "done"
    assert said[0] == "starting" and said[-1].startswith("step 3/3  reward")
    assert not [f for f in folder.rglob("*") if f.is_file() and b"hf_not_to_be_seen" in f.read_bytes()]
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(RunFailed, match="^run_id = 'launched': .* already holds a run; choose another run_id"):
        launch(make_config(**base, run_id="launched"), said.append)
    assert (folder / "manifest.json").read_bytes() == before
    said.clear()
    assert launch(make_config(**base, run_id="launched", resume="auto"), said.append) == folder
    assert not [line for line in said if line.startswith("step ")] and said[-1].endswith("is already done")


def test_launch_raises_the_process_s_own_error(base):
    with pytest.raises(RunFailed, match="^policy_model = '/no/such': no such folder$"):
        launch(make_config(**base | {"policy_model": "/no/such"}), quiet)


@pytest.mark.parametrize(("code", "said"), [
    (IN_STEP + "1 / 0", r"(?s)^training exited with 1; .*train.log\nTraceback .*in save_step.*\nZeroDivisionError: "),
    (IN_STEP + "os.kill(os.getpid(), signal.SIGSEGV)", r"(?s)signal 11 \(SIGSEGV\).*in save_step.*Segmentation"),
    (IN_STEP + "os._exit(0)", "^training ended without an error, but wrote no manifest"),
    ("sys.modules['transformers'] = None", "transformers.*; install it, or run `make env`$"),
])  # fmt: skip
def test_the_reason_of_one_process(base, fault, runs, code, said):
    fault("0", code)
    with pytest.raises(RunFailed, match=said) as error:
        launch(make_config(**base, run_id="r"), quiet)
    if (runs / "r/config.yaml").is_file():
        manifest = read_manifest(runs / "r")
        assert manifest["status"] == "failed" and manifest["error"] == str(error.value)


def test_sigterm_stops_a_run_in_the_foreground(base, runs, tmp_path):
    config = saved(tmp_path / "c.yaml", base | dict(total_steps=5000, run_id="r"))
    process = foreground("-m", "savelib", "train", "--config", config)
    first_step(runs / "r")
    process.terminate()
    assert process.wait(10) != 0
    assert read_manifest(runs / "r")["status"] == "stopped"
    assert_nothing_left(tmp_path)


def test_a_stop_from_elsewhere_is_no_failure(base, runs, tmp_path):
    def stop(line):
        if line.startswith("step "):
            for pid in processes(tmp_path, "savelib"):
                os.kill(pid, signal.SIGTERM)

    with pytest.raises(RunFailed, match="was asked to stop, not by this one; resume=auto resumes"):
        launch(make_config(**base | dict(total_steps=5000), run_id="r"), stop)
    assert read_manifest(runs / "r")["status"] == "stopped"


def test_a_second_interrupt_does_not_keep_a_process_alive():
    process = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    process.stdout.readline()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        _stop(process)
    signal.signal(signal.SIGALRM, before)
    assert process.poll() == -signal.SIGKILL


# several processes


def listening(pid: int) -> list[str]:
    """The addresses, as the kernel writes them, at which a process waits for connections."""
    links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.exists() or fd.is_symlink()]
    tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [line.split() for line in sum(tables, [])]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]


def frame(module):
    return f'  File "/a/{module}.py", line 1, in train\n    run()\n'


def recorded(folder, rank, kind, said, seconds):
    """An error file as torchrun's processes write it."""
    file = folder / "run_x" / "attempt_0" / str(rank) / "error.json"
    file.parent.mkdir(parents=True)
    frames = f"Traceback (most recent call last):\n{frame('cli')}{frame('savelib/runs/train')}{kind}: {said}\n"
    extra = {"py_callstack": frames, "timestamp": str(seconds)}
    file.write_text(json.dumps({"message": {"message": f"{kind}: {said}", "extraInfo": extra}}))
    return file


def test_the_reason_is_the_first_error_that_is_not_a_lost_partner(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("earlier\nerror: of an earlier attempt\n")
    said = lambda: _Said(log, log.stat().st_size, tmp_path)  # noqa: E731
    recorded(tmp_path, 0, "RuntimeError", "[gloo/transport] Connection closed by peer [127.0.0.1]:1", 5)
    assert said().failure() is None
    assert said().last_words(1).startswith(f"rank 0 lost its partner; the whole log is {log}\nTraceback")
    recorded(tmp_path, 2, "ValueError", "later", 9)
    recorded(tmp_path, 1, "KeyError", "first", 8)
    frames = f"Traceback (most recent call last):\n{frame('savelib/runs/train')}KeyError: first"
    assert said().failure() == f"rank 1 failed; the whole log is {log}\n{frames}"
    recorded(tmp_path, 4, "ConfigError", "x = 1: bad: worse", 1)
    recorded(tmp_path, 5, "ConfigError", "x = 1: bad: worse", 1)
    recorded(tmp_path, 3, "ValueError", "", 0).write_text('{"mess')
    assert said().failure() == "x = 1: bad: worse"


def test_two_processes_and_one_s_error_is_the_reason(base, fault, runs, tmp_path):
    fault("1", IN_STEP + "{}['of rank one']")
    said = []
    with pytest.raises(RunFailed) as error:
        launch(make_config(**base | dict(num_processes=2), run_id="r"), said.append)
    first, traceback, *frames, last = str(error.value).splitlines()
    assert first == f"rank 1 failed; the whole log is {runs / 'r/train.log'}"
    assert traceback.startswith("Traceback") and "in train" in frames[0] and last == "KeyError: 'of rank one'"
    assert read_manifest(runs / "r")["error"] == str(error.value)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(("code", "said"), [
    ("os.kill(os.getpid(), signal.SIGKILL)", r"^rank 1 was killed by signal 9 \(SIGKILL, often for want of memory\); "),
    pytest.param(
        "os.kill(os.getpid(), signal.SIGSEGV)",
        r"(?s)^rank 1 was killed by signal 11 \(SIGSEGV\); .*\nTraceback .*in save_step",
        marks=pytest.mark.slow,
    ),
    pytest.param("os._exit(3)", "^rank 1 exited with 3; the whole log is ", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_rank_that_ends_without_a_word_is_named(base, fault, runs, tmp_path, code, said):
    fault("1", IN_STEP + code)
    with pytest.raises(RunFailed, match=said) as error:
        launch(make_config(**base | dict(num_processes=2), run_id="r"), quiet)
    assert "_main__.py" not in str(error.value)
    assert_nothing_left(tmp_path)


def test_a_rank_that_fails_is_named_when_the_main_process_was_stopped_for_it(base, fault, runs, tmp_path):
    fault("0", IN_STEP + "__import__('time').sleep(60)")  # it waits for nobody: torchrun stops it
    fault("1", IN_STEP + "os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(RunFailed, match=r"^rank 1 was killed by signal 11 \(SIGSEGV\); ") as error:
        launch(make_config(**base | dict(num_processes=2), run_id="r"), quiet)
    manifest = read_manifest(runs / "r")
    assert manifest["status"] == "failed" and manifest["error"] == str(error.value)
    assert_nothing_left(tmp_path)


def test_an_error_of_every_rank_is_said_once(base):
    with pytest.raises(RunFailed, match="^policy_model = '/no/such': no such folder$"):
        launch(make_config(**base | dict(policy_model="/no/such", num_processes=2)), quiet)


@pytest.mark.parametrize(("rank", "code", "said"), [
    pytest.param(
        "1", "sys.modules['transformers'] = None", "(?s)^rank 1 failed; .*Error: No module named 'transformers",
        marks=pytest.mark.slow,
    ),
    ("agent", "sys.modules['torch.distributed.launcher.api'] = None", "(?s)^training exited with 1; .*import of tor"),
])  # fmt: skip
def test_a_process_that_cannot_even_start(base, fault, rank, code, said):
    fault(rank, code)
    with pytest.raises(RunFailed, match=said):
        launch(make_config(**base | dict(num_processes=2)), quiet)


def test_an_interrupt_stops_all_and_the_run_is_marked_stopped(long, runs, tmp_path):
    def interrupt(line):
        if line.startswith("step 1/") or line.startswith("step 2/") or "left" in line:
            assert len(processes(tmp_path, "savelib")) == 3  # torchrun and its two
            if sys.platform == "linux":
                places = [place for pid in processes(tmp_path, "savelib") for place in listening(pid)]
                assert places and set(places) == {"0100007F"}, "127.0.0.1 alone: nothing is seen from outside"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(make_config(**long, run_id="r"), interrupt)
    assert_nothing_left(tmp_path)
    assert read_manifest(runs / "r")["status"] == "stopped"


@pytest.mark.parametrize(
    "victim", [pytest.param("kernel terminated", marks=pytest.mark.slow), "kernel killed", "torchrun killed"]
)
def test_no_process_outlives_what_started_it(long, runs, tmp_path, victim):
    parent = kernel(long | dict(run_id="r"))
    try:
        first_step(runs / "r")
        (torchrun,) = processes(tmp_path, "torch.distributed.run")
        pid = torchrun if victim.startswith("torchrun") else parent.pid
        os.kill(pid, signal.SIGTERM if victim.endswith("terminated") else signal.SIGKILL)
        assert_nothing_left(tmp_path, parent)
        assert not parent.is_alive()
        manifest = read_manifest(runs / "r")
        assert manifest["status"] == ("failed" if pid == torchrun else "killed")
        assert pid != torchrun or "killed by signal 9" in manifest["error"]
    finally:
        parent.kill()


# by hand


def torchrun(*words):
    return foreground("-m", "torch.distributed.run", *words)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["savelib", "torchrun"])
def test_sigterm_stops_what_was_started_by_hand(long, runs, tmp_path, by):
    words = ["-m", "savelib", "train", "--config", saved(tmp_path / "c.yaml", long | dict(run_id="r"))]
    process = foreground(*words) if by == "savelib" else torchrun("--standalone", "--nproc_per_node", 2, *words)
    first_step(runs / "r")
    process.terminate()
    assert process.wait(10) != 0
    assert_nothing_left(tmp_path)
    assert read_manifest(runs / "r")["status"] == "stopped"


@pytest.mark.slow
def test_a_main_process_that_waits_for_another_is_stopped_too(long, fault, runs, tmp_path):
    fault("1", IN_STEP + "__import__('time').sleep(99)")

    def interrupt(line):
        if line.startswith("step 0"):
            time.sleep(2)  # until one waits for the other
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(make_config(**long, run_id="r"), interrupt)
    assert_nothing_left(tmp_path)
    assert read_manifest(runs / "r")["status"] == "stopped"


@pytest.mark.slow
def test_two_nodes_by_hand(base, runs, tmp_path):
    config = saved(tmp_path / "c.yaml", base | dict(num_processes=2, run_id="nodes"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        torchrun(
            "--nnodes", 2, "--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port,
            "--nproc-per-node", 1, "-m", "savelib", "train", "--config", config,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert said[0].splitlines()[-1] == str(runs / "nodes") and "step " not in said[1]
    assert read_manifest(runs / "nodes")["num_processes"] == 2 and len(read_metrics(runs / "nodes")) == 4


@pytest.mark.slow
def test_another_number_of_processes_is_refused(base, tmp_path, monkeypatch):
    config = saved(tmp_path / "c.yaml", base | dict(run_id="r"))
    said, _ = torchrun(
        "--standalone", "--nproc_per_node", 2, "-m", "savelib", "train", "--config", config
    ).communicate()
    assert (
        "error: num_processes = 1, but 2 process(es) were started" in said
        and "Traceback" not in said.partition("torch/")[0]
    )
    assert not (tmp_path / "runs" / "r").exists()
    with pytest.raises(ConfigError, match=r"num_processes = 2, but 1 process\(es\) were started; give torchrun's"):
        train(make_config(**base | dict(num_processes=2)))


@pytest.mark.slow
def test_two_launches_at_once_do_not_meet(base, runs):
    values = base | dict(num_processes=2, total_steps=2)
    pair = [kernel(values | dict(run_id=name, seed=seed)) for seed, name in enumerate(("a", "b"))]
    for process in pair:
        process.join(150)
    for seed, name in enumerate(("a", "b")):
        assert read_manifest(runs / name)["status"] == "done" and read_config(runs / name).seed == seed
