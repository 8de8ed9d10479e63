"""Calls a function as from the sandbox's login node: by a Python that sees the site's paths.

    python -m hpctrain.sandbox.rehearse.remote ORDER    a pickled (function, its arguments)

The last line that it prints is the answer as JSON.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from typing import Any

from hpctrain.base.errors import EnvironmentFault
from hpctrain.sandbox.rehearse.stage import Login


def call(login: Login, function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` answers there, plain data. Raises EnvironmentFault where nothing comes
    back."""
    order = login.place.files / "order"
    order.write_bytes(pickle.dumps((function, arguments)))
    try:
        done = login.seeing(sys.executable, "-m", __name__, str(order), timeout_s=3600)
        return json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError) as error:
        words = (done.stderr or done.stdout).strip()[-2000:]
        raise EnvironmentFault("the jobs could not be submitted", why=words) from error
    finally:
        order.unlink(missing_ok=True)


def main(order: str) -> None:
    """Obey an order, and print the answer."""
    with open(order, "rb") as stream:
        function, arguments = pickle.loads(stream.read())  # our own, in a folder of mode 0700
    print(json.dumps(function(*arguments)))


if __name__ == "__main__":
    main(sys.argv[1])
