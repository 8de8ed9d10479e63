"""One rank that runs many short trainings in a row, so that the tests pay for importing torch only
once.

    python scenarios.py ORDERS.json        RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment

Each order is the HPCTRAIN_* part of an environment. Writes ORDERS.json.RANK with one `[exit code,
[problems], said]` each.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

from hpctrain.base import errors
from hpctrain.config.trainers.dpo import load_config
from hpctrain.train.core import ranks
from hpctrain.train.core.launch import Launch, StopRequest
from hpctrain.train.dpo.__main__ import train


def main() -> None:
    ranks.finish = lambda: None  # the next order needs the other ranks too
    with open(sys.argv[1], encoding="utf-8") as file:
        orders = json.load(file)
    answers = []
    for order in orders:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                launch = Launch.from_environment({**os.environ, **order})
                stop = StopRequest()
                stop.received = "STOP_AT_ONCE" in order
                answers.append(
                    [train(load_config(launch.config), launch, stop), [], said.getvalue()]
                )
        except errors.HpctrainError as error:
            answers.append(
                [error.exit_code, [str(problem) for problem in error.problems], said.getvalue()]
            )
    with open(f"{sys.argv[1]}.{os.environ['RANK']}", "w", encoding="utf-8") as file:
        json.dump(answers, file)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
