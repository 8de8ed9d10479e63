"""One rank that runs many short trainings in a row, so that the tests pay for importing torch only
once.

    python scenarios.py ORDERS.json        RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment

Each order is the HPCTRAIN_* part of an environment. Prints nothing of its own; writes
ORDERS.json.RANK with one `[exit code, [problems]]` per order.
"""

from __future__ import annotations

import json
import os
import sys

from hpctrain.base import errors
from hpctrain.config.trainers.sft import load_config
from hpctrain.train.core.launch import Launch, StopRequest
from hpctrain.train.sft import __main__ as sft
from hpctrain.train.sft import engine


def main() -> None:
    engine.finish = lambda: None  # the next order needs the other ranks too
    with open(sys.argv[1], encoding="utf-8") as file:
        orders = json.load(file)
    answers = []
    for order in orders:
        try:
            launch = Launch.from_environment({**os.environ, **order})
            answers.append([sft.train(load_config(launch.config), launch, StopRequest()), []])
        except errors.HpctrainError as error:
            answers.append([error.exit_code, [str(problem) for problem in error.problems]])
    with open(f"{sys.argv[1]}.{os.environ['RANK']}", "w", encoding="utf-8") as file:
        json.dump(answers, file)
    os._exit(0)


if __name__ == "__main__":
    main()
