"""`python -m ray.scripts.scripts start …`: a head or a node that registers there, each with a
process in a session of its own."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["start"])
    for flag in ("--head", "--block", "--disable-usage-stats"):
        parser.add_argument(flag, action="store_true")
    for option in (
        "--address",
        "--node-ip-address",
        "--port",
        "--temp-dir",
        "--num-cpus",
        "--num-gpus",
        "--include-dashboard",
        "--min-worker-port",
        "--max-worker-port",
        "--dashboard-agent-listen-port",
        "--ray-client-server-port",
    ):
        parser.add_argument(option)
    args = parser.parse_args()
    # As Ray's raylet and workers: a session of its own, left behind by its parent; where asked,
    # deaf to the polite signal.
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if os.environ.get("STRAY_DEAF") else ""
    daemon = f"import signal, time; {deaf}time.sleep(300)"
    words = [sys.executable, "-c", daemon, "stray-" + os.environ["STRAY_MARK"]]
    leave = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
    subprocess.Popen([sys.executable, "-c", leave, *words]).wait()
    with open(os.environ["RAY_STANDIN_LOG"], "a") as stream:
        stream.write(
            json.dumps({"pid": os.getpid(), "rank": os.environ.get("RANK"), **vars(args)}) + "\n"
        )
    me = {"Alive": True, "Resources": {"CPU": float(args.num_cpus), "GPU": float(args.num_gpus)}}
    node, times = (os.environ.get("RAY_STANDIN_FAIL", "") + ":").split(":")[:2]
    if node == os.environ.get("SLURM_NODEID"):
        with open(os.environ["RAY_STANDIN_LOG"] + ".fails", "a") as stream:
            stream.write("x")
            failed = stream.tell()
        if failed <= int(times or 99):
            sys.exit(5)
    if not args.head:
        host, port = args.address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 10) as link:
            link.sendall(json.dumps({"join": me}).encode() + b"\n")
        time.sleep(300)
    os.makedirs(os.path.join(args.temp_dir, "session_latest", "logs"), exist_ok=True)
    with open(os.path.join(args.temp_dir, "session_latest", "logs", "raylet.err"), "w") as stream:
        stream.write("why it failed\n")
    known = [me]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with socket.create_server((args.node_ip_address, int(args.port))) as server:
        while True:
            link = server.accept()[0]
            line = link.makefile().readline()
            said = json.loads(line) if line else {}
            if "join" in said:
                known.append(said["join"])
            if "ask" in said:
                link.sendall(json.dumps(known).encode() + b"\n")
            link.close()


if __name__ == "__main__":
    main()
