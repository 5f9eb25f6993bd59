"""`python -m savelib`: training (train, runs, plan, config, glossary, notebook) and evaluation (the others).

Each command imports what it needs, so that help comes at once.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from savelib.errors import sentence

if TYPE_CHECKING:
    from savelib.config import Config

LONGEST = 2000  # characters of an error


class Door(TyperGroup):
    """Where every error of a command ends: one sentence and exit code 2, or a traceback where savelib is to blame."""

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **more)
        except Exception as error:
            code = self.explain(error)
        sys.exit(code)

    def explain(self, error: Exception) -> int:
        """Say it on stderr; the exit code."""
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error)
            return 0
        if hasattr(error, "format_message"):  # the command line's own
            context = getattr(error, "ctx", None)
            path = context.command_path if context else "python -m savelib"
            return fail(f"{error.format_message().rstrip('.')}; see `{path} --help`")
        said = sentence(error)
        if said is None:
            traceback.print_exception(error)
            print("this is a bug in savelib: please report it with the lines above", file=sys.stderr, flush=True)
            return 1
        return fail(said)


app = typer.Typer(
    cls=Door, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help=__doc__.partition("\n")[0],
)  # fmt: skip
Profile = Annotated[str | None, typer.Option(help="tiny, smol, single_gpu or paper")]
File = Annotated[Path | None, typer.Option("--config", help="YAML file of config fields")]
Pairs = Annotated[list[str], typer.Option("--set", help="name=value of any config field; repeatable")]


def fail(said: str) -> int:
    """One sentence on stderr, and the traceback of a process that failed; the exit code."""
    said, _, trace = said.partition("\nTraceback")
    said = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(said.split()))
    print(f"error: {said if len(said) <= LONGEST else said[:LONGEST] + ' ...'}", file=sys.stderr, flush=True)
    if trace:
        print("Traceback" + trace, file=sys.stderr, flush=True)
    return 2


@contextmanager
def interruptible(how: str) -> Iterator[None]:
    """An interrupt is answered by how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped; {how}", file=sys.stderr, flush=True)
        raise


CALL_AGAIN = "call it again to resume: what is done is kept"


def _made(profile: str | None, file: Path | None, pairs: list[str]) -> Config:
    from savelib.config import from_texts, make_config

    return make_config(file=file, **({"profile": profile} if profile else {}) | from_texts(pairs))


@app.command()
def train(
    profile: Profile = None,
    config: File = None,
    set_: Pairs = [],  # noqa: B006
) -> None:
    """Run SAVE; the result is a folder under runs/. Several processes are started here, unless torchrun did."""
    made = _made(profile, config, set_)

    from savelib.processes import is_main, launched_by_torchrun
    from savelib.runs.folder import new_run_id
    from savelib.runs.launch import launch, needs_torchrun, worker

    if launched_by_torchrun():
        folder = worker(made)
    else:
        made = made.model_copy(update={"run_id": new_run_id(made)})
        with interruptible(f"resume with the same command and --set run_id={made.run_id} --set resume=auto"):
            folder = launch(made) if needs_torchrun(made) else worker(made)
    if is_main():
        print(folder)


@app.command("config")
def show_config(
    profile: Profile = None,
    config: File = None,
    set_: Pairs = [],  # noqa: B006
) -> None:
    """Print every field of a configuration: value, place in the paper, meaning."""
    from savelib.config import Config

    made = _made(profile, config, set_)
    for name, field in Config.model_fields.items():
        print(f"{name}: {getattr(made, name)!r}  # {field.json_schema_extra['paper']}: {field.description}")


@app.command()
def plan(
    profile: Profile = None,
    config: File = None,
    set_: Pairs = [],  # noqa: B006
    gpus: Annotated[int | None, typer.Option(help="GPUs; default: num_processes")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="GiB of each; default: this machine's GPU, else 80")] = None,
    gpu: Annotated[str, typer.Option(help="whose time is told: a100, h100 or h200")] = "a100",
) -> None:
    """Print the memory that each setting needs on each GPU, which fit, and how long the run takes."""
    made = _made(profile, config, set_)

    from savelib.runs.plan import describe_plan

    print(describe_plan(made, gpus, memory_gb, gpu))


@app.command()
def preflight(
    profile: Profile = None,
    config: File = None,
    set_: Pairs = [],  # noqa: B006
    prompts: Annotated[int, typer.Option(min=2, help="prompts of the sample")] = 64,
    responses: Annotated[int, typer.Option(min=2, help="responses per prompt")] = 8,
) -> None:
    """Print what one step of SAVE would do to your reward model, with your policy and prompts; saves nothing."""
    made = _made(profile, config, set_)

    from savelib.experiments.preflight import ADVICE
    from savelib.experiments.preflight import preflight as run

    table = run(made, prompts, responses)
    print(f"{table.to_string(float_format='{:.3f}'.format, na_rep='-')}\n\n{ADVICE}")


@app.command()
def runs() -> None:
    """List the runs, the newest last: state, steps, what came out."""
    from savelib.analysis import runs_table
    from savelib.paths import runs_dir

    table = runs_table()
    print(table.to_string(float_format="{:.3f}".format, na_rep="-") if len(table) else f"no runs in {runs_dir()} yet")


@app.command()
def glossary() -> None:
    """Print every metric of metrics.jsonl: its name, what it is, which way is better."""
    from savelib.analysis import METRICS

    for name, (meaning, better) in METRICS.items():
        print(f"{name:28}{meaning}{f' ({better} is better)' if better else ''}")


@app.command()
def notebook(
    path: Annotated[Path, typer.Argument(help="a notebook, for example notebooks/03_save_train.ipynb")],
    parameters: Annotated[list[str], typer.Option("-p", help="name=value, as papermill's -p; repeatable")] = [],  # noqa: B006
) -> None:
    """Run notebook 03 by papermill into a new run folder, with an HTML copy, and print what came out."""
    from savelib.config import from_texts, make_config
    from savelib.runs.folder import new_run_id
    from savelib.runs.notebook import run_notebook

    values = from_texts(parameters)
    config = make_config(**values)
    config = config.model_copy(update={"run_id": new_run_id(config)})
    with interruptible(f"resume with the same command and -p run_id={config.run_id} -p resume=auto"):
        out = run_notebook(path, config, list(values))
    print(summary(out.parent))
    print(f"\nlook at   {out.with_suffix('.html')}\nfiles in  {out.parent}")


@app.command()
def study(
    files: Annotated[list[Path], typer.Argument(help="study files, for example data/studies/table1.yaml")],
    seeds: Annotated[str, typer.Option(help="numbers and ranges, such as 0-9")] = "0-4",
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    profile: Profile = None,
    set_: Pairs = [],  # noqa: B006
    benchmarks: Annotated[str, typer.Option(help="score each reward model on these, comma-separated")] = "",
    data_dir: Annotated[str, typer.Option(help="folder of the benchmarks' files; default: the hub")] = "",
    plain: Annotated[bool, typer.Option("--plain", help="train without notebook 03: no notebook is kept")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="one seed, three steps: whether everything runs")] = False,
) -> None:
    """Run the cells of tables that are missing, by notebooks 03 and 05, and write their tables."""
    from savelib.config import from_texts
    from savelib.experiments.cells import jobs_of, read_seeds, read_studies
    from savelib.experiments.study import check_before_work, run_study
    from savelib.experiments.summary import as_text, read_tables

    values = ({"profile": profile} if profile else {}) | from_texts(set_)
    numbers, failed = read_seeds(seeds), {}
    studies = read_studies(files)  # a bad one should cost no time
    for name, study in studies.items():
        jobs_of(study, numbers[:1], **values)
        check_before_work(name, study, benchmarks, data_dir)
    with interruptible(CALL_AGAIN):
        for name, study in studies.items():
            folder, errors = run_study(name, study, numbers, jobs, benchmarks, data_dir, plain, quick, **values)
            failed |= errors
            if (folder / "summary.csv").stat().st_size > 1:  # else no run was done
                print(f"\n{as_text(read_tables(folder)[1])}")
            print(f"\ntables in {folder}\n")
    for run, error in failed.items():
        print(f"failed: {run}: {error}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="reward model: folder or hub id with one label")],
    benchmarks: Annotated[str, typer.Option(help="names, comma-separated")],
    out: Annotated[Path, typer.Option(help="folder for scores and figures")],
    data_dir: Annotated[Path | None, typer.Option(help="folder of the benchmarks' files; default: the hub")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens; default: the model's context")] = None,
    truncation: Annotated[str, typer.Option(help="of longer rows: left, right or refuse")] = "left",
    set_: Pairs = [],  # noqa: B006
) -> None:
    """Score reward-model benchmarks; an interrupted call resumes where it stopped."""
    config = _made(None, None, set_)

    from savelib.benchmarks.evaluate import evaluate as run

    with interruptible(CALL_AGAIN):
        run(model, benchmarks.split(","), data_dir, out, config=config, max_length=max_length, truncation=truncation)


@app.command()
def score(
    benchmark: Annotated[str, typer.Option(help="rewardbench, rewardbench2, rmbench, ppe_preference, ...")],
    data: Annotated[str, typer.Option(help="the benchmark's file, folder or hub id")],
    scores: Annotated[str, typer.Option(help="JSONL of scores made elsewhere")],
) -> None:
    """Print a benchmark's figures of given scores as JSON."""
    from savelib.benchmarks.scores import score_file

    _print_json(score_file(benchmark, data, scores))


@app.command()
def respond(
    policy: Annotated[str, typer.Option(help="folder, hub id, smollm2 or embedded")],
    benchmark: Annotated[str, typer.Option(help="alpaca or arena")],
    prompts: Annotated[Path, typer.Option(help="the benchmark's instructions or questions")],
    out: Annotated[Path, typer.Option(help="the policy's responses, .json or .jsonl")],
    name: Annotated[str | None, typer.Option(help="of the policy, in the file; default: the folder's")] = None,
    set_: Pairs = [],  # noqa: B006
) -> None:
    """Sample a policy's responses to AlpacaEval's or Arena-Hard's prompts, as in table 8."""
    from savelib.benchmarks.judged.responses import TABLE8, generate
    from savelib.config import from_texts, make_config

    config = make_config(**TABLE8 | from_texts(set_))
    with interruptible(CALL_AGAIN):
        _print_json(generate(policy, benchmark, prompts, out, config, name))


@app.command()
def judge(
    benchmark: Annotated[str, typer.Option(help="alpaca or arena")],
    outputs: Annotated[Path, typer.Option(help="the policy's responses")],
    baseline: Annotated[Path, typer.Option(help="the baseline's responses")],
    out: Annotated[Path, typer.Option(help="annotations or judgments to write")],
    base_url: Annotated[str, typer.Option(help="an OpenAI-compatible endpoint")],
    model: Annotated[str, typer.Option(help="the judge's name there")],
    key_env: Annotated[str, typer.Option(help="environment variable with the key")] = "OPENAI_API_KEY",
    questions: Annotated[Path | None, typer.Option(help="Arena-Hard's questions")] = None,
    category: Annotated[str, typer.Option(help="Arena-Hard's category")] = "hard_prompt",
    template: Annotated[Path | None, typer.Option(help="the official judge prompt")] = None,
    seed: Annotated[int, typer.Option(help="of AlpacaEval's orders; published annotations have 0")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds that the server may be silent")] = 300.0,
    retries: Annotated[int, typer.Option(min=0, help="of a request that fails")] = 6,
    concurrency: Annotated[int, typer.Option(min=1, help="requests under way")] = 8,
    price_in: Annotated[float | None, typer.Option(help="per million tokens")] = None,
    price_out: Annotated[float | None, typer.Option(help="per million tokens")] = None,
    allow_missing: Annotated[bool, typer.Option(help="write the file though games have no verdict")] = False,
) -> None:
    """Have a judge compare a policy's responses with a baseline's; an interrupted call resumes where it stopped."""
    from savelib.benchmarks.judged.judge import Endpoint
    from savelib.benchmarks.judged.judge import judge as run

    endpoint = Endpoint(base_url, model, key_env, timeout, retries, concurrency, price_in, price_out)
    with interruptible(CALL_AGAIN):
        _print_json(
            run(benchmark, outputs, baseline, out, endpoint, questions=questions, category=category,
                template=template, seed=seed, allow_missing=allow_missing)
        )  # fmt: skip


@app.command()
def alpaca(
    annotations: Annotated[Path | None, typer.Option(help="alpaca_eval's annotations of one model")] = None,
    difficulty: Annotated[Path | None, typer.Option(help="CSV of the instructions' difficulty")] = None,
    gamed: Annotated[Path | None, typer.Option(help="CSV of the regulariser's rows")] = None,
    weights: Annotated[Path | None, typer.Option(help="CSV of published weights")] = None,
    model: Annotated[str | None, typer.Option(help="whose weights")] = None,
    instructions: Annotated[int, typer.Option(help="how many there must be")] = 805,
) -> None:
    """Print AlpacaEval 2's win rate, standard error and length-controlled win rate as JSON."""
    from savelib.benchmarks.judged.alpaca import alpaca_json

    _print_json(*alpaca_json(annotations, difficulty, gamed, weights, model, instructions))


@app.command()
def arena(
    judgments: Annotated[list[Path], typer.Option(help="arena-hard-auto's judgments; repeatable")],
    questions: Annotated[Path | None, typer.Option(help="the questions, for the categories")] = None,
    answers: Annotated[list[Path], typer.Option(help="answers with style metadata; repeatable")] = [],  # noqa: B006
    category: Annotated[str, typer.Option(help="the category of the score")] = "hard_prompt",
) -> None:
    """Print Arena-Hard's score, interval, style-controlled score and counts as JSON."""
    from savelib.benchmarks.judged.arena import arena_json

    _print_json(*arena_json(judgments, questions, answers or None, category))


@app.command()
def bench(
    sizes: Annotated[str, typer.Option(help="default a,a256,b,c,growth; with CUDA also paper512,paper1024")] = "",
    repeats: Annotated[int, typer.Option(help="rounds after the warm-up")] = 7,
    out: Annotated[Path | None, typer.Option(help="folder for the results; default: a new one under runs/")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="size quick, 2 repeats")] = False,
) -> None:
    """Time a step of TRL's GRPO, TRL with SAVE, our GRPO and SAVE in turn, and hold the ratios against their bars."""
    from savelib.experiments.cost import run
    from savelib.experiments.cost_report import report
    from savelib.experiments.cost_sizes import DEFAULT_SIZES

    wanted = ["quick"] if quick else sizes.split(",") if sizes else list(DEFAULT_SIZES)
    folder = run(wanted, 2 if quick else repeats, out)
    print(f"\n{report(folder)}\n\nfiles in  {folder}")


@app.command("gpu-check")
def gpu_check() -> None:
    """Check this machine's GPU: steps against the CPU's, memory and seconds against the plan; one table."""
    from savelib.experiments.gpu_check import as_table, check

    lines = check()
    print(as_table(lines))
    if any(line.ok is False for line in lines):
        raise typer.Exit(1)


def _print_json(figures: dict, notes: list[str] = []) -> None:  # noqa: B006
    """Figures on stdout, notes on stderr."""
    from savelib.paths import strict_json

    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(strict_json(figures, indent=2, ensure_ascii=False))


def summary(folder: Path) -> str:
    """The figures of a run that matter, before and after, as lines of text."""
    from savelib.analysis import before_after, warnings
    from savelib.runs.folder import read_manifest, read_metrics

    metrics, manifest = read_metrics(folder), read_manifest(folder)
    lines = [
        f"run {folder.name}: {manifest['status']} in {manifest.get('seconds', 0):.0f} s",
        f"{'':44}{'before':>8}{'after':>8}",
    ]
    lines += [f"{name:44}{row['before']:8.3f}{row['after']:8.3f}" for name, row in before_after(folder).iterrows()]
    if "filter/kept" in metrics:
        lines.append(f"{'responses kept by the filter (mean)':44}{metrics['filter/kept'].mean():16.3f}")
    return "\n".join(lines + [f"note: {said}" for said in warnings(metrics)])
