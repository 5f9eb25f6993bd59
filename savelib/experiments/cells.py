"""A study file: cells of a table, what sets each apart, and the paper's row beside it; the runs that it asks for."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from savelib.config import Config, ConfigError, check_names, make_config
from savelib.experiments.audit import rows_of
from savelib.paths import resolve, runs_dir
from savelib.runs.folder import read_manifest
from savelib.runs.launch import key_of

MOST_SEEDS = 10_000


class Cell(BaseModel):
    """One row of a table."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1)
    set: dict[str, Any] = {}  # config fields
    times: dict[str, float] = {}  # factors on the profile's values
    reward_model_of: str = ""  # an earlier cell: the reward model that its run returned is taken as it is
    paper: str = ""  # the row of the paper's table, by its label in `audit.rows_of`


class Study(BaseModel):
    """A study file, data/studies/*.yaml."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    title: str
    table: str = ""  # of the paper: a file of data/paper
    column: str = "Average"  # of that table, set beside ours
    reference: str  # the cell that differences are taken from, seed by seed
    common: dict[str, Any] = {}  # config fields of all cells
    # axes, every cell is run at every combination: a config field with its values, or a name with named sets of fields
    grid: dict[str, list[Any] | dict[str, dict[str, Any]]] = {}
    worlds: str = ""  # backbones, such as 200-204, each with every seed; empty: a seed is its own world
    cells: list[Cell] = Field(min_length=1)


@dataclass(frozen=True)
class Job:
    """One run of one cell. after: the run whose reward model it takes."""

    cell: str
    setting: str  # its values of the grid's fields
    config: Config
    after: str = ""

    @property
    def folder(self) -> Path:
        return runs_dir() / self.config.run_id

    @property
    def done(self) -> bool:
        return (self.folder / "manifest.json").is_file() and read_manifest(self.folder)["status"] == "done"


def read_study(path: str | Path) -> Study:
    """A study file. Raises ConfigError naming the file, the cell and the field."""
    where = f"study {str(path)!r}"
    try:
        study = Study(**yaml.safe_load(Path(resolve(str(path))).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from None
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{where}: {said}") from None
    names = [cell.name for cell in study.cells]
    fields = [name for axis, values in study.grid.items() for name in _fields_of(axis, values)]
    check_names([*study.common, *fields], Config.model_fields)
    empty = [field for field, values in study.grid.items() if not values]
    if empty:
        raise ConfigError(f"{where}: grid.{empty[0]} has no values; give some, or leave it out")
    if study.reference not in names:
        raise ConfigError(f"{where}: reference = {study.reference!r} is no cell; cells: {', '.join(names)}")
    try:
        rows = rows_of(study.table) if study.table else pd.DataFrame()
    except OSError:
        raise ConfigError(f"{where}: table = {study.table!r} is no table of data/paper") from None
    for i, cell in enumerate(study.cells):
        _check_cell(study, cell, rows, names[:i], f"{where}, cell {cell.name!r}")
    return study


def _fields_of(axis: str, values: list[Any] | dict[str, dict[str, Any]]) -> list[str]:
    return [axis] if isinstance(values, list) else [name for fields in values.values() for name in fields]


def _points(study: Study) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every combination of the grid: its name and its config fields."""
    axes = []
    for axis, values in study.grid.items():
        named = values if isinstance(values, dict) else {str(value): {axis: value} for value in values}
        axes.append([(f"{axis}={name}", fields) for name, fields in named.items()])
    for point in itertools.product(*axes):
        yield ", ".join(name for name, _ in point), {k: v for _, fields in point for k, v in fields.items()}


def _check_cell(study: Study, cell: Cell, rows: pd.DataFrame, before: list[str], where: str) -> None:
    """Raise ConfigError for a cell that cannot be. rows: the paper's table. before: the names of the earlier cells."""
    check_names([*cell.set, *cell.times], Config.model_fields)
    if cell.name in before:
        raise ConfigError(f"{where}: the name is there twice")
    if cell.reward_model_of and cell.reward_model_of not in before:
        raise ConfigError(f"{where}: reward_model_of = {cell.reward_model_of!r} must name an earlier cell")
    if cell.paper and (cell.paper not in rows.index or study.column not in rows):
        raise ConfigError(
            f"{where}: paper = {cell.paper!r} and column = {study.column!r} are not in table = {study.table!r}; "
            f"rows: {', '.join(rows.index)}; columns: {', '.join(rows.columns)}"
        )
    odd = [name for name in cell.times if Config.model_fields[name].annotation not in (int, float)]
    if odd:
        raise ConfigError(f"{where}: times.{odd[0]}: a factor is for numbers alone")


def read_studies(paths: Iterable[str | Path]) -> dict[str, Study]:
    """name -> study of several files. Raises ConfigError for two of one name, whose tables would be one folder."""
    studies: dict[str, Study] = {}
    for path in paths:
        name = Path(path).stem
        if name in studies:
            raise ConfigError(f"study {str(path)!r}: there are two of the name {name!r}; rename one file")
        studies[name] = read_study(path)
    return studies


def read_seeds(text: str, field: str = "seeds") -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]. Raises ConfigError for what is no list of at most MOST_SEEDS numbers."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        if not found or (found[2] and int(found[2]) < int(found[1])):
            raise ConfigError(f"{field} = {text[:100]!r}: write numbers and ranges, such as 0-9 or 100,101")
        more = range(int(found[1]), int(found[2] or found[1]) + 1)
        if len(seeds) + len(more) > MOST_SEEDS:
            raise ConfigError(f"{field} = {text[:100]!r} are more than {MOST_SEEDS}; give fewer")
        seeds += more
    return list(dict.fromkeys(seeds))


def jobs_of(study: Study, seeds: list[int], **values: Any) -> list[Job]:
    """All runs of a study, world by world and seed by seed; `values` are config fields over the file's.

    A run's id is made of its whole configuration and of the code: a cell that changed is another run, and one that
    two studies share is one run.
    """
    worlds = read_seeds(study.worlds, "worlds") if study.worlds else []
    jobs = []
    for (world, seed), (setting, at) in itertools.product(
        itertools.product(worlds, seeds) if worlds else zip(seeds, seeds, strict=True), _points(study)
    ):
        ids: dict[str, str] = {}
        for cell in study.cells:
            mine = {"seed": seed, "world_seed": world} | study.common | at | cell.set | values
            after = ids.get(cell.reward_model_of, "")
            if after:
                mine |= {"reward_model": str(runs_dir() / after / "reward_model"), "bt_epochs": 0}
            plain = make_config(**mine)
            mine |= {field: factor * getattr(plain, field) for field, factor in cell.times.items()}
            config = make_config(**mine)
            words = ("study", config.profile, config.rule, config.algo, f"s{seed}", key_of(config)[:8])
            ids[cell.name] = "-".join(words)
            config = config.model_copy(update={"run_id": ids[cell.name], "resume": "auto"})
            jobs.append(Job(cell.name, setting, config, after))
    return jobs
