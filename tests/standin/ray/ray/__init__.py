"""Stands in for Ray where the real one is too large for CI: a head that counts nodes, and processes
that outlive their parent.

Only what templates/base/ray_node.py uses. The real Ray is run by hand, see
docs/recipes/verl-gad.md.
"""

import json
import os
import socket

_address = None


def init(address=None, **_):
    global _address
    text = os.environ["RAY_ADDRESS"] if address in (None, "auto") else address
    host, port = text.rsplit(":", 1)
    _address = (host, int(port))


def nodes():
    with socket.create_connection(_address, 5) as link:
        link.sendall(b'{"ask": "nodes"}\n')
        return json.loads(link.makefile().readline())


def shutdown():
    pass
