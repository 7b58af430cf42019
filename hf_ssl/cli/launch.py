"""Several CPU processes under ``accelerate launch --cpu --num_processes N``, which starts only one of them by itself.

accelerate (1.15) leaves CPU ranks to MPI: without a hostfile it exports MASTER_ADDR for N > 1 and runs the script
once. Training on one process where N were asked for would be silent, so the processes are started here, by torchrun.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .console import CommandError, say

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def start_missing_processes(argv: Sequence[str]) -> None:
    """Replace this process by torchrun and N of its kind where accelerate meant N; otherwise return at once."""
    environment = os.environ
    on_cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    if not on_cpu or "MASTER_ADDR" not in environment or any(name in environment for name in _RANKS):
        return
    count = _asked_for()
    if count is None:
        raise CommandError(
            "accelerate launch on CPUs started one process where several were asked for; "
            "run torchrun --nproc_per_node N -m hf_ssl.cli ... instead."
        )
    say(f"accelerate launch --cpu starts one process; torchrun starts the {count} that were asked for.")
    command = [sys.executable, "-m", "hf_ssl.cli.launch", "--nproc_per_node", str(count)]
    command += [
        "--master_addr",
        environment.pop("MASTER_ADDR"),
        "--master_port",
        environment.pop("MASTER_PORT", "29500"),
    ]
    environment.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "-m", "hf_ssl.cli", *argv])


def _asked_for() -> int | None:
    """--num_processes on the command line of the ``accelerate launch`` above this process."""
    import psutil  # accelerate depends on it

    tokens = [token.replace("-", "_") for token in psutil.Process().parent().cmdline()]
    for i, token in enumerate(tokens):
        name, _, value = token.partition("=")
        if name == "__num_processes":
            value = value or (tokens[i + 1] if i + 1 < len(tokens) else "")
            return int(value) if value.isdigit() and int(value) > 1 else None
    return None


def launch(argv: Sequence[str]) -> int:
    """torchrun, with a sentence and the exit code of the process that ended first instead of its own traceback."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(list(argv))
    except SignalException as error:  # passed on to every process, which saved
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        print(f"hf-ssl: process {rank} of the run ended first, with exit code {code}.", file=sys.stderr, flush=True)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
