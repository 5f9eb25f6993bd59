"""`python -m savelib` and the command `savelib`: what signals and crashes do, then the command line."""

import faulthandler
import os
import signal
import sys

from savelib.signals import die_with_parent

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ


def main() -> None:
    # before the slow imports: signals may come at any time
    if TORCHRUN:
        die_with_parent()  # its processes are in sessions of their own; they die with it all the same
    if int(os.environ.get("RANK", 0)) == 0:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like ctrl-C: a run writes its manifest
    faulthandler.enable()  # a crash says where it was
    run = commands
    if TORCHRUN:
        from torch.distributed.elastic.multiprocessing.errors import record

        run = record(commands)  # an error on the way in is noted down for `launch` too
    try:
        run()
    except SystemExit as end:
        if end.code == 130:  # stopped: everything is written, and leaving by the long way takes seconds
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        raise


def commands() -> None:
    from savelib.cli import app

    app()


if __name__ == "__main__":
    main()
