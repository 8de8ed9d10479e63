"""One Slurm node's part of a job's Ray: starts it, runs the program on the first node, and ends
every process it started.

    ray_node.py --gpus G --timeout SECONDS --tmp FOLDER -- PROGRAM ARG…

One task a node runs this. The first one (SLURM_NODEID 0) is the head: it listens at
MASTER_ADDR:MASTER_PORT, which is the job's own port; the others connect there, prove with
HPCTRAIN_RAY_TOKEN that they belong to the job, and are told Ray's address. All further ports are
chosen by the system, so that jobs which share a node do not meet. The head waits until every node
and GPU has joined, runs the program with RAY_ADDRESS set, and tells the others how it ended.
Whoever loses the connection ends too: a dead node ends the step at once instead of leaving it in a
collective.

`ray stop` is never used: it ends every Ray of the user on the node, also another job's. Instead
this process adopts what its children leave behind (prctl PR_SET_CHILD_SUBREAPER) and ends all of
it, by number. Standard library.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time

ANSWER_S = 60  # for one line of the other side's
POLL_S = 0.2
# to start Ray on a node: it gives itself 30 s (ray/_private/node.py), which a loaded file system
# can take
TRIES = 3
GRACE_S = 5  # between asking processes to end and ending them
SIGNALLED_GRACE_S = 1.5  # the same after a signal: Slurm kills this process soon after (KillWait)
LOG_BYTES = 200 * 1000  # kept of each of Ray's own logs when a run fails
# Ranks of this task: verl gives its workers ranks of their own, and vLLM would believe these.
RANKS = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

WAIT_FOR_NODES = """
import sys, time
import ray
nodes, gpus, deadline = int(sys.argv[1]), float(sys.argv[2]), time.time() + float(sys.argv[3])
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
while True:
    alive = [node for node in ray.nodes() if node["Alive"]]
    seen = sum(node["Resources"].get("GPU", 0) for node in alive)
    if len(alive) >= nodes and seen >= gpus:
        print("hpctrain: ray: %d nodes, %g GPUs, %g CPUs" % (
            len(alive), seen, sum(node["Resources"].get("CPU", 0) for node in alive)), flush=True)
        ray.shutdown()
        sys.exit(0)
    if time.time() > deadline:
        sys.exit("hpctrain: error: ray: %d of %d nodes and %g of %g GPUs joined in time" % (len(alive), nodes, seen, gpus))
    time.sleep(0.5)
"""


class Ended(Exception):
    """The part of this node is over, with this exit code."""

    def __init__(self, code, why=""):
        Exception.__init__(self, why)
        self.code = code


def main(argv):
    parser = argparse.ArgumentParser(prog="ray_node.py")
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    parser.add_argument("--tmp", required=True)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    args.program = args.program[1:] if args.program[:1] == ["--"] else args.program
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _signalled)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    node = Node(args)
    code = 1
    try:
        code = node.head() if node.index == 0 else node.worker()
    except Ended as ended:
        code = ended.code
        if str(ended):
            say(f"error: ray: {ended}")
    except Exception as error:  # noqa: B902
        say(f"error: ray: {type(error).__name__}: {error}")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        node.end(code)
    return code


class Node:
    """This node's Ray and what is connected to it."""

    def __init__(self, args):
        environ = os.environ
        self.args = args
        self.index = int(environ["SLURM_NODEID"])
        self.num_nodes = int(environ["SLURM_JOB_NUM_NODES"])
        self.name = environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.where = (environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))
        self.token = environ["HPCTRAIN_RAY_TOKEN"]
        self.cpus = int(environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
        job = "{}.{}".format(environ["SLURM_JOB_ID"], environ.get("SLURM_RESTART_COUNT", "0"))
        # Short: Ray puts sockets below it, and their paths may have 107 bytes.
        self.tmp = os.path.join(args.tmp, f"ray-{os.getuid()}-{job}")
        self.kept_logs = os.path.join(
            environ.get("HPCTRAIN_RUN_DIR", "."), "logs", "ray-" + job, self.name
        )
        self.environ = {
            key: value
            for key, value in environ.items()
            if key not in RANKS + ("HPCTRAIN_RAY_TOKEN",)
        }
        self.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Else everybody who reaches the port can run code as this user. Ray before 2.52 knows
        # neither and takes all comers.
        self.environ.setdefault("RAY_AUTH_MODE", "token")
        self.environ.setdefault("RAY_AUTH_TOKEN", self.token)
        if "ROCR_VISIBLE_DEVICES" in self.environ:
            # Ray refuses this name and wants HIP's; Slurm sets it for every step.
            self.environ.setdefault("HIP_VISIBLE_DEVICES", self.environ.pop("ROCR_VISIBLE_DEVICES"))
        self.ray = None
        self.others = {}

    def head(self):
        """Start Ray, wait for all, run the program; its exit code."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((socket.gethostbyname(self.where[0]), self.where[1]))
        except OSError as error:
            raise Ended(
                1, f"port {self.where[1]} of {self.where[0]}: {error}; another job has taken it"
            ) from error
        listener.listen(self.num_nodes + 8)
        address = socket.gethostbyname(self.where[0])
        port = self._start_head(address)
        self.environ["RAY_ADDRESS"] = f"{address}:{port}"
        self._gather(listener, time.time() + self.args.timeout)
        self._wait_for_all()
        for link in self.others.values():
            _send(link, {"whole": True})
        say("ray: starting the program with RAY_ADDRESS={}".format(self.environ["RAY_ADDRESS"]))
        program = self._start(self.args.program)
        while program.poll() is None:
            self._pause()
            for name in self._left():
                stop(program)
                raise Ended(1, f"node {name} left while the program ran")
            if self.ray.poll() is not None:
                time.sleep(2)  # the program may have ended it and be about to return
                if program.poll() is None:
                    stop(program)
                    raise Ended(
                        1,
                        f"Ray on the first node ended (exit code {self.ray.returncode}) while the"
                        " program ran",
                    )
        return _code(program.returncode)

    def worker(self):
        """Join the head's Ray and stay until it is over; how it ended is the head's to tell."""
        link = self._connect(time.time() + self.args.timeout)
        told = _read_line(link, time.time() + self.args.timeout)
        if told is None:
            raise Ended(1, "the first node ended before Ray was up")
        mine = link.getsockname()[0]
        own_folder(self.tmp)
        options = ["--address", told["address"], "--node-ip-address", mine, "--block"]
        self._start_ray(*options)
        whole, tries = False, 1
        while True:
            self._pause()
            if _readable(link, 0):
                said = _read_line(link, time.time() + ANSWER_S)
                if said is None:
                    raise Ended(1, "the first node is gone")
                if "end" in said:
                    return 0  # the first node tells how it ended, and its exit code is the step's
                whole = True
            if self.ray.poll() is not None:
                self._show_ray()
                if whole or tries == TRIES:
                    raise Ended(1, f"Ray on {self.name} ended with exit code {self.ray.returncode}")
                say(
                    f"ray: it did not start on {self.name} (exit code {self.ray.returncode}); once"
                    " more"
                )
                end_descendants(GRACE_S)
                tries += 1
                self._start_ray(*options)

    def end(self, code):
        """Keep the logs of a failure, tell the others, end every process of this node, remove the
        job's own folder."""
        if code not in (0, 143):
            self._keep_logs()
        for link in list(self.others.values()):
            try:
                _send(link, {"end": code})
            except OSError:
                pass
        end_descendants(SIGNALLED_GRACE_S if code > 128 else GRACE_S)
        for link in self.others.values():
            link.close()
        _remove_own(self.tmp)

    # --- Ray
    # ---------------------------------------------------------------------------------------------------------

    def _start_head(self, address):
        """Start the head with a free port; returns it. A port that another process took meanwhile
        is not the end."""
        own_folder(self.tmp)
        for attempt in range(TRIES):
            port = free_port(address)
            options = [
                "--head",
                "--node-ip-address",
                address,
                "--port",
                str(port),
                "--temp-dir",
                self.tmp,
                "--include-dashboard",
                "false",
                "--disable-usage-stats",
                "--block",
            ]
            if importlib.util.find_spec("grpc"):
                # Ray with its client starts a server for it, at 10001 on every head if not told;
                # without it refuses the option.
                options += ["--ray-client-server-port", str(free_port(address))]
            self._start_ray(*options)
            deadline = time.time() + self.args.timeout
            while time.time() < deadline and self.ray.poll() is None:
                try:
                    connect((address, port), 1).close()
                    return port
                except OSError:
                    self._pause()
            if self.ray.poll() is None:
                raise Ended(
                    1, f"Ray did not answer on port {port} within {self.args.timeout:.0f} s"
                )
            self._show_ray()
            end_descendants(GRACE_S)
            more = "; once more" if attempt + 1 < TRIES else ""
            say(f"ray: the head ended with exit code {self.ray.returncode}{more}")
        raise Ended(1, "Ray's head does not start")

    def _start_ray(self, *options):
        """`ray start` with this node's resources; what it says is kept in a file, and shown when it
        fails."""
        self.said = os.path.join(self.tmp, f"start-{self.name}.log")
        with open(self.said, "ab") as stream:
            self.ray = self._start(
                _ray("start", *options) + self._resources(), stdout=stream, stderr=stream
            )

    def _show_ray(self):
        """The last lines that `ray start` said."""
        try:
            with open(self.said, encoding="utf-8", errors="replace") as stream:
                for line in stream.read().splitlines()[-15:]:
                    say("ray: " + line)
        except OSError:
            pass

    def _resources(self):
        # Workers' ports from the system too: Ray's own range, 10002 to 19999, is the same for every
        # job on a node.
        return [
            "--num-cpus",
            str(self.cpus),
            "--num-gpus",
            str(self.args.gpus),
            "--min-worker-port",
            "0",
            "--max-worker-port",
            "0",
            "--dashboard-agent-listen-port",
            "0",
        ]

    def _gather(self, listener, deadline):
        """Answer every other node's call with Ray's address, until all have called and started
        theirs."""
        waiting = {}
        while len(self.others) < self.num_nodes - 1:
            if time.time() > deadline:
                raise Ended(
                    1,
                    "{} of {} nodes called within {:.0f} s; missing: {}".format(
                        len(self.others) + 1,
                        self.num_nodes,
                        self.args.timeout,
                        ", ".join(self._missing()),
                    ),
                )
            if self.ray.poll() is not None:
                raise Ended(1, f"Ray on the first node ended with exit code {self.ray.returncode}")
            ready = select.select([listener] + list(waiting), [], [], POLL_S)[0]
            for source in ready:
                if source is listener:
                    link = listener.accept()[0]
                    waiting[link] = time.time()
                    continue
                del waiting[source]
                hello = _read_line(source, time.time() + 5)
                if (
                    not hello
                    or hello.get("token") != self.token
                    or hello.get("node") in self.others
                ):
                    source.close()  # a stranger, or a port scan
                    continue
                _send(source, {"address": self.environ["RAY_ADDRESS"]})
                self.others[hello["node"]] = source
        listener.close()

    def _missing(self):
        return [str(index) for index in range(1, self.num_nodes) if index not in self.others]

    def _wait_for_all(self):
        gpus = self.args.gpus * self.num_nodes
        check = self._start(
            [
                sys.executable,
                "-c",
                WAIT_FOR_NODES,
                str(self.num_nodes),
                str(gpus),
                str(self.args.timeout),
            ]
        )
        while check.poll() is None:
            self._pause()
            for name in self._left():
                raise Ended(1, f"node {name} left before Ray was whole")
        if check.returncode:
            raise Ended(1, "not every node and GPU joined")

    def _left(self):
        """The nodes whose connection is gone."""
        gone = []
        for index, link in self.others.items():
            try:
                while _readable(link, 0):
                    if not link.recv(4096):
                        gone.append(index)
                        break
            except OSError:
                gone.append(index)
        return gone

    def _connect(self, deadline):
        while True:
            try:
                link = connect(self.where, 10)
                break
            except OSError as error:
                if time.time() > deadline:
                    raise Ended(
                        1, "the first node does not answer at {}:{}".format(*self.where)
                    ) from error
                self._pause()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        _send(link, {"token": self.token, "node": self.index, "name": self.name})
        return link

    # --- processes and files
    # -----------------------------------------------------------------------------------------

    def _start(self, argv, **streams):
        return subprocess.Popen(
            argv, env=self.environ, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent, **streams
        )

    def _pause(self):
        time.sleep(POLL_S)

    def _keep_logs(self):
        """The ends of Ray's own logs, which lie on the node and would be lost with it."""
        kept = 0
        for folder in (self.tmp, os.path.join(self.tmp, "session_latest", "logs")):
            try:
                for name in sorted(os.listdir(folder)):
                    path = os.path.join(folder, name)
                    size = os.path.getsize(path) if os.path.isfile(path) else 0
                    if size:
                        os.makedirs(self.kept_logs, exist_ok=True)
                        with open(path, "rb") as source:
                            source.seek(max(size - LOG_BYTES, 0))
                            with open(os.path.join(self.kept_logs, name), "wb") as target:
                                shutil.copyfileobj(source, target)
                        kept += 1
            except OSError:
                pass  # what is left of the logs is not worth failing for
        if kept:
            say(f"ray: the ends of its logs are in {self.kept_logs}")


def end_descendants(grace_s):
    """End every process that this one started, whatever became of its parents: asked first, made to
    after `grace_s`."""
    deadline = time.time() + grace_s
    asked = set()
    while True:
        reap()
        left = descendants(os.getpid())
        if not left:
            return
        late = time.time() > deadline
        for pid in left:
            if late or pid not in asked:
                asked.add(pid)
                try:
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                except OSError:
                    pass
        if time.time() > deadline + grace_s:
            say(f"warning: ray: processes {sorted(left)} did not end")
            return
        time.sleep(0.1)


def descendants(pid):
    """Every process below `pid`, from /proc."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stream:
                    fields = stream.read().rsplit(b")", 1)[1].split()
            except (OSError, IndexError):
                continue
            if fields[0] != b"Z":
                parents.setdefault(int(fields[1]), []).append(int(name))
    found, queue = set(), [pid]
    while queue:
        for child in parents.get(queue.pop(), ()):
            found.add(child)
            queue.append(child)
    return found


def reap():
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except OSError:
            return


def stop(process, grace_s=GRACE_S):
    """Ask a process to end, make it after `grace_s`."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()


def own_folder(path):
    """Make `path` for this user alone; one that is there already must be this user's own, and no
    link."""
    try:
        os.mkdir(path, 0o700)
    except OSError as error:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise Ended(1, f"{path} is there and not a folder of this user's") from error


def connect(where, timeout_s):
    """A connection to `where`. Linux lets a socket reach itself at a port where nobody listens;
    that is none."""
    link = socket.create_connection(where, timeout_s)
    if link.getsockname() == link.getpeername():
        link.close()
        raise OSError("nobody listens there")
    return link


def free_port(address):
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def say(text):
    sys.stderr.write(f"hpctrain: {text}\n")
    sys.stderr.flush()


def _ray(*words):
    return [sys.executable, "-m", "ray.scripts.scripts"] + list(words)


def _remove_own(path):
    """Remove the job's folder in the node's temporary space; never through a link."""
    try:
        found = os.lstat(path)
    except OSError:
        return
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
        shutil.rmtree(path, ignore_errors=True)


def _code(returncode):
    return 128 - returncode if returncode < 0 else returncode


def _die_with_parent():
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option, value):
    try:
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
    except (OSError, AttributeError):
        pass


def _signalled(number, frame):
    raise Ended(128 + number)


def _send(link, message):
    link.sendall(json.dumps(message).encode() + b"\n")


def _readable(link, timeout_s):
    return bool(select.select([link], [], [], timeout_s)[0])


def _read_line(link, deadline):
    """The next message, None when the other side is gone or says nothing in time. One line is one
    message."""
    data = b""
    while not data.endswith(b"\n"):
        if len(data) > 65536 or not _readable(link, max(deadline - time.time(), 0)):
            return None
        try:
            piece = link.recv(1)
        except OSError:
            return None
        if not piece:
            return None
        data += piece
    try:
        message = json.loads(data.decode())
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
