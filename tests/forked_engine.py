"""A papermill engine that runs a notebook in a fork of this process, where torch and the other libraries are imported.

It spares each notebook the start of a kernel and ten seconds of imports. Cells run in IPython, as in a kernel: the same
displays, the same `In`, figures inline. On a machine with a GPU the real kernel is used (CUDA does not survive a fork).
"""

import contextlib
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import nbformat
import papermill
from nbformat.v4 import new_output
from papermill.engines import Engine, papermill_engines

SECONDS = 1800


class Forked(Engine):
    @classmethod
    def execute_notebook(cls, nb, kernel_name, output_path=None, **kwargs):
        result = Path(output_path).with_suffix(".executed.json")
        child = multiprocessing.get_context("fork").Process(target=_run, args=(nb, result))
        child.start()
        child.join(SECONDS)
        child.kill()
        if not result.exists():
            raise RuntimeError(f"the fork that ran {output_path} ended with {child.exitcode}")
        executed = nbformat.from_dict(json.loads(result.read_text()))
        result.unlink()
        return executed


papermill_engines.register("forked", Forked)


def execute(notebook: Path, copy: Path, parameters: dict, cwd: Path, env: dict) -> str:
    """Run a notebook by papermill in `cwd` with these environment variables; returns the error's text or ""."""
    saved, here = {name: os.environ.get(name) for name in env}, Path.cwd()
    os.environ |= env
    os.chdir(cwd)
    try:
        papermill.execute_notebook(
            os.path.relpath(notebook, cwd), str(copy), parameters, engine_name="forked", progress_bar=False
        )
    except papermill.PapermillExecutionError as error:
        return str(error)
    finally:
        os.chdir(here)
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return ""


def _run(nb: nbformat.NotebookNode, result: Path) -> None:
    from IPython.core.displayhook import DisplayHook
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets import Type
    from traitlets.config import Config

    class Displayed(DisplayHook):
        """A cell's last value is displayed as in a kernel, and not printed."""

        def write_output_prompt(self):
            pass

        def write_format_data(self, format_dict, md_dict=None):
            self.shell.display_pub.publish(data=format_dict, metadata=md_dict or {})

        def finish_displayhook(self):
            self._is_active = False

    class Shell(InteractiveShell):
        displayhook_class = Type(Displayed)

        def enable_gui(self, gui=None):  # no windows here
            pass

    os.setsid()  # an interrupt of the tests is not one of the notebook's processes
    config = Config()
    config.HistoryManager.enabled = False
    InteractiveShell.clear_instance()
    shell = Shell.instance(config=config)
    shell.enable_matplotlib("inline")
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.execution_count, cell.outputs, error = count, *_cell(shell, cell.source, count)
        if error:
            break
    part = result.with_suffix(".part")
    part.write_text(json.dumps(nb))
    part.rename(result)
    os._exit(0)


def _cell(shell, source: str, count: int) -> tuple[list, bool]:
    """The outputs of a cell, and whether it failed."""
    from IPython.utils.capture import capture_output

    with capture_output() as captured, contextlib.suppress(SystemExit):
        done = shell.run_cell(source, store_history=True)
    failed = done.error_before_exec or done.error_in_exec
    outputs = []
    if captured.stdout and not failed:
        outputs.append(new_output("stream", name="stdout", text=captured.stdout))
    if captured.stderr:
        outputs.append(new_output("stream", name="stderr", text=captured.stderr))
    for shown in captured.outputs:
        outputs.append(new_output("display_data", _text(shown.data), metadata=shown.metadata or {}))
    if failed:
        frames = traceback.format_exception(failed)
        outputs.append(new_output("error", ename=type(failed).__name__, evalue=str(failed), traceback=frames))
    sys.stdout.flush()
    return outputs, bool(failed)


def _text(data: dict) -> dict:
    """A display's data as a notebook stores it: pictures in base64."""
    import base64

    return {kind: base64.b64encode(v).decode() if isinstance(v, bytes) else v for kind, v in data.items()}
