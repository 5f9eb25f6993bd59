"""Tables that take minutes to compute: shipped as data/results/<name>_<table>.csv, and computed anew on demand."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from savelib.paths import resolve


@dataclass(frozen=True)
class Tables:
    """The tables of one experiment. make: table -> the function that computes it; takes: how long all of them take."""

    name: str
    make: dict[str, Callable[[], pd.DataFrame]]
    takes: str

    def table(self, table: str, again: bool = False) -> pd.DataFrame:
        """One of the tables as it is shipped; again: computed anew."""
        return self.make[table]() if again else pd.read_csv(resolve(f"data/results/{self.name}_{table}.csv"))

    def write(self, folder: Path) -> None:
        """Compute all tables, and write each when it is done."""
        for table, make in self.make.items():
            file = folder / f"{self.name}_{table}.csv"
            make().to_csv(file, index=False, float_format="%.4g")
            print(f"wrote {file}", flush=True)

    def main(self) -> None:
        """The command `python -m savelib.experiments.<name>_tables`."""
        about = f"Compute the tables {self.name}_*.csv ({self.takes})."
        parser = argparse.ArgumentParser(prog=f"python -m savelib.experiments.{self.name}_tables", description=about)
        parser.add_argument("--out", type=Path, default=Path(resolve("data/results")), help="folder to write to")
        torch.set_num_threads(1)
        self.write(parser.parse_args().out)
