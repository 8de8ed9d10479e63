"""`notify:` tells what a link did, never a secret, and never hurts the job."""

from __future__ import annotations

import http.server
import json
import threading
import time

import pytest


@pytest.fixture
def endpoint():
    """A real HTTP server of this machine; the bodies it got."""
    got = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", got
    server.shutdown()
    server.server_close()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def test_a_url_gets_each_event_as_json(run, endpoint):
    url, got = endpoint
    run.write_plan(notify="$HOOK", give_up_after=1)
    run.call("begin", "--link", "1", job="101", HOOK=url, HF_TOKEN="hf_abcdef")
    until(lambda: len(got) == 1)
    run.call("end", "--exit-code", "3", job="101", HOOK=url)
    run.call("begin", "--link", "2", job="102", HOOK=url)
    until(lambda: len(got) == 3)

    assert [one["event"] for one in got] == ["start", "failed", "gave_up"]
    assert (got[1]["exit_code"], got[1]["link"], got[1]["job_id"]) == (3, 1, "101")
    assert "link 2 gave up: 1 links in a row" in got[2]["text"]


def test_a_secret_in_a_reason_is_left_out():
    from hpctrain.runtime import notify

    record = {"event": "begin", "mode": "gave_up", "link": 2, "reason": "KeyError: hf_abcdef at 9"}
    told = notify.message("ft", record, {"HF_TOKEN": "hf_abcdef", "HOME": "9"})
    assert "hf_abcdef" not in json.dumps(told) and told["reason"] == "KeyError: *** at 9"


def test_a_command_gets_it_on_stdin(run, tmp_path):
    run.write_plan(notify=f"tee '{tmp_path}/told me'")
    assert run.call("begin", "--link", "1", job="101").returncode == 0
    until((tmp_path / "told me").exists)
    until(lambda: (tmp_path / "told me").read_text())
    assert json.loads((tmp_path / "told me").read_text())["event"] == "start"


@pytest.mark.parametrize(
    "to",
    ["http://127.0.0.1:1/x", "/no/such/program", "false", "$NOT_SET", "'unbalanced", "http://["],
)
def test_a_dead_endpoint_hurts_nothing(run, to):
    run.write_plan(notify=to)
    begun = time.monotonic()
    done = run.call("begin", "--link", "1", job="101")
    assert done.returncode == 0 and "HPCTRAIN_DECISION='run'" in done.stdout
    assert run.call("end", "--exit-code", "0", job="101").returncode == 0
    assert time.monotonic() - begun < 30
    assert [one["event"] for one in run.records()] == ["begin", "end"]


def test_an_endpoint_that_never_answers_holds_up_no_start(run, endpoint):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        run.write_plan(notify=f"http://127.0.0.1:{silent.getsockname()[1]}/")
        begun = time.monotonic()
        assert run.call("begin", "--link", "1", job="101").returncode == 0
        assert time.monotonic() - begun < 9
