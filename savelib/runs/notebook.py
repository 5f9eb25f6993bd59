"""A notebook run by papermill into a run's folder, with an HTML copy."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
import papermill
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillException

from savelib.config import Config, ConfigError
from savelib.errors import sentence
from savelib.paths import refuse_unwritable_folders, runs_dir, writable_file
from savelib.runs.folder import read_manifest, refuse_existing
from savelib.runs.launch import SENTENCES, RunFailed
from savelib.show.page import export

QUIET = ["--log-level=CRITICAL"]  # of the kernel, whose log has tracebacks of its own when it is interrupted


def run_notebook(path: str | Path, config: Config, given: Iterable[str]) -> Path:
    """Execute a notebook in the folder of the config's run_id, with the fields `given` as parameters; its copy there.

    Raises ConfigError before any work for a file that is no notebook and for a run that exists, RunFailed with the
    notebook's own error, KeyboardInterrupt when it was interrupted.
    """
    source, folder = Path(path), runs_dir() / config.run_id
    _refuse_other_files(source)
    refuse_unwritable_folders()
    out = writable_file("notebook", folder / source.name, {"its source": source}, _executed)
    if config.resume == "never":
        refuse_existing(config.run_id)
    folder.mkdir(parents=True, exist_ok=True)
    values = config.only(*dict.fromkeys([*given, "run_id"]))
    try:
        papermill.execute_notebook(
            source, out, values, progress_bar=False, log_output=True, stdout_file=sys.stdout, extra_arguments=QUIET
        )
    except papermill.PapermillExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        said, mark, trace = error.evalue.partition("\nTraceback")
        kind = "" if error.ename in SENTENCES else f"{error.ename}: "
        raise RunFailed(f"{kind}{said}; the executed notebook is {out}{mark}{trace}") from None
    except DeadKernelError:
        if (folder / "config.yaml").is_file() and read_manifest(folder)["status"] == "stopped":
            raise KeyboardInterrupt from None
        raise RunFailed(f"the notebook's kernel died, often for want of memory; what it did is in {out}") from None
    except (PapermillException, NoSuchKernel, ValueError) as error:  # ValueError: it names no language
        raise ConfigError(f"notebook {str(path)!r} cannot be run: {sentence(error) or error}") from None
    finally:
        if out.exists():
            export(out)
    return out


def _refuse_other_files(source: Path) -> None:
    """Raise ConfigError for what is no notebook with a cell of parameters."""
    try:
        cells = nbformat.read(source, 4).cells
    except OSError as error:
        raise ConfigError(f"notebook {str(source)!r} cannot be read: {sentence(error)}") from None
    except Exception as error:  # of json and nbformat
        raise ConfigError(f"notebook {str(source)!r} is no notebook: {str(error).splitlines()[0]}") from None
    if not any("parameters" in cell.metadata.get("tags", []) for cell in cells):
        raise ConfigError(
            f"notebook {str(source)!r} has no cell tagged `parameters`; give notebooks/03_save_train.ipynb"
        )


def _executed(path: Path) -> bool:
    """Whether a file is a notebook that papermill wrote."""
    try:
        return "papermill" in nbformat.read(path, 4).metadata
    except Exception:  # no notebook at all
        return False
