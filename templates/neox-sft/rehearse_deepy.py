"""In a rehearsal, in the place of NeoX's launcher with `launcher: slurm` (DeeperSpeed
launcher/multinode_runner.py, SlurmRunner): the hostfile's slots are summed up, one srun starts that
many tasks, and a hostfile that names a node twice is an error (runner.py). Standard library only.

    rehearse_deepy.py DIR deepy.py TRAIN_SCRIPT CONFIG.yml

DIR/scenario.json says which Python the tasks run.
"""

import base64
import json
import os
import sys


def main(folder, words):
    with open(os.path.join(folder, "scenario.json")) as stream:
        scenario = json.load(stream)
    script, config = [word for word in words if not word.startswith("-")][1:3]
    path = os.environ.get("DLTS_HOSTFILE", "")
    try:
        with open(path) as stream:
            lines = [line.split() for line in stream if line.strip() and not line.startswith("#")]
    except OSError as error:
        sys.exit(f"deepy.py: cannot read the hostfile `{path}`: {error.strerror}")
    hosts = {}
    for line in lines:
        if len(line) != 2 or not line[1].startswith("slots=") or not line[1][6:].isdigit():
            sys.exit(
                "deepy.py: Hostfile contains a bad entry: {}, unable to proceed with "
                "launching".format(" ".join(line))
            )
        if line[0] in hosts:
            sys.exit(
                f"deepy.py: Hostfile contains multiple entries for {line[0]}, unable to proceed"
                " with launching"
            )
        hosts[line[0]] = int(line[1][6:])
    with open(config, "rb") as stream:
        encoded = base64.b64encode(stream.read()).decode()
    argv = ["srun", "-n", str(sum(hosts.values())), "--nodelist", ",".join(hosts), "--export=ALL"]
    argv += [scenario["python"], "-u", script]
    argv += ["--deepspeed_config", encoded, "--megatron_config", encoded]
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
