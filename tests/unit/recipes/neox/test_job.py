"""The job script and neox_args.py, run: what reaches train.py, with stand-ins for srun, the
container and NeoX's classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.base.paths import shipped_dir
from hpctrain.plan.load import Loaded
from hpctrain.plan.render import _sums, runtime_files
from hpctrain.plan.run_dir import run_files

SCRIPT = Path(shipped_dir("templates")) / "neox-sft" / "neox_args.py"
# Stands for NeoX: prints as much as it does, and encodes the configuration in its form.
NEOX_ARGS = """
import base64, os, sys
print("from_ymls", flush=True)

class NeoXArgs:
    @classmethod
    def from_ymls(cls, paths, overwrite_values=None):
        self = cls()
        os.system("echo noise of a child")
        self.text, self.script = open(paths[0], "rb").read(), overwrite_values["user_script"]
        return self

    def get_deepspeed_main_args(self):
        assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "DLTS_HOSTFILE"} & set(os.environ)
        print("configure_distributed_args")
        body = base64.urlsafe_b64encode(self.text).decode() * int(os.environ.get("REPEAT", "1"))
        return ["--master_addr", os.environ["MASTER_ADDR"], self.script, "--deepspeed_config", "e30=", "--megatron_config", body]
"""


@pytest.fixture
def neox_dir(tmp_path):
    folder = tmp_path / "my 'neox' $(touch canary)"
    (folder / "megatron").mkdir(parents=True)
    (folder / "megatron" / "__init__.py").write_text("")
    (folder / "megatron" / "neox_arguments.py").write_text(NEOX_ARGS)
    seen = "import json, os, sys; print(json.dumps([sys.argv, os.getcwd(), dict(os.environ)]))"
    (folder / "train.py").write_text(seen)
    (folder / "deepy.py").write_text(seen)
    return folder


def run_args(neox_dir, config, **env):
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(config), str(neox_dir), str(neox_dir / "train.py")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            "PATH": os.environ["PATH"],
            "RANK": "3",
            "WORLD_SIZE": "16",
            "DLTS_HOSTFILE": "/nowhere",
            **env,
        },
    )


def test_only_the_four_arguments_reach_standard_output(neox_dir, tmp_path):
    config = tmp_path / "c.yml"
    config.write_text("a: 1\n")

    done = run_args(neox_dir, config)

    assert done.returncode == 0, done.stderr
    assert done.stdout == "--deepspeed_config\ne30=\n--megatron_config\nYTogMQo=\n"
    assert "from_ymls" in done.stderr and "noise of a child" in done.stderr


def test_an_argument_linux_would_refuse_is_named(neox_dir, tmp_path):
    config = tmp_path / "c.yml"
    config.write_text("a: 1\n" * 10_000)

    done = run_args(neox_dir, config, REPEAT="3")

    assert done.returncode == 1 and done.stdout == ""
    assert "Linux passes at most 131071" in done.stderr


def test_another_encoding_is_refused(neox_dir, tmp_path):
    module = neox_dir / "megatron" / "neox_arguments.py"
    module.write_text(NEOX_ARGS.replace('"--deepspeed_config", "e30="', '"--conf", "x"'))
    (tmp_path / "c.yml").write_text("a: 1\n")

    done = run_args(neox_dir, tmp_path / "c.yml")

    assert done.returncode == 1 and "encodes its arguments in another way" in done.stderr


@pytest.fixture
def job(neox, neox_dir, tmp_path):
    """Writes the run directory of a run and replaces the guard by one that decides `finetune`."""

    def write(**kwargs):
        kwargs.setdefault("options", {})["dir"] = json.dumps(str(neox_dir))
        kwargs["options"]["python"] = "python3"
        kwargs.setdefault("run", {}).update(
            site="generic-cuda", account=None, partition=None, nodes="1", gpus_per_node="4"
        )
        kwargs["run"].setdefault("container", None)
        planned = neox("model_parallel_size: 1\nnum_layers: 2\nattention_config: null\n", **kwargs)
        assert planned.said() == []
        folder = Path(planned.plan.run_dir)
        for name, raw in run_files(Loaded(planned.plan, planned.inputs)).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
        decision = (
            "HPCTRAIN_DECISION=run HPCTRAIN_MODE=finetune HPCTRAIN_CHECKPOINT= HPCTRAIN_ITERATION=0"
            " HPCTRAIN_LINK=1"
        )
        guard = f"import sys\nif sys.argv[1] == 'begin': print('{decision}')\n"
        (folder / "runtime" / "__main__.py").write_text(guard)
        # The script runs only the runtime it was rendered with.
        files = dict(runtime_files(planned.plan))
        script = folder / "job.sbatch"
        text = script.read_text()
        rendered = _sums(files)
        assert rendered in text
        script.write_text(text.replace(rendered, _sums({**files, "__main__.py": guard.encode()})))
        return script

    return write


def test_every_task_runs_train_py_with_neox_own_arguments(job, run_job, neox_dir, tmp_path):
    script = job()

    done, noted = run_job(script)

    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    assert [env["RANK"] for _, _, env in ranks] == ["0", "1", "2", "3"]
    for argv, cwd, env in ranks:
        assert argv[0] == str(neox_dir / "train.py") and cwd == str(neox_dir)
        assert argv[1:4] == ["--deepspeed_config", "e30=", "--megatron_config"] and len(argv) == 5
        assert env["CURSE_ATTENTION"] == "1" and env["MASTER_ADDR"]
    assert not list(tmp_path.rglob("canary"))


def test_a_configuration_that_neox_refuses_ends_the_link_before_any_rank_starts(
    job, run_job, neox_dir
):
    script = job()
    (neox_dir / "megatron" / "neox_arguments.py").write_text(
        "raise TypeError('unexpected keyword')"
    )

    done, noted = run_job(script)

    assert done.returncode == 1 and "unexpected keyword" in done.stderr
    assert not any(line[0] == "srun" for line in noted)


def test_deepy_gets_a_fresh_hostfile_and_the_config(job, run_job, neox_dir, tmp_path):
    activate = tmp_path / "acti vate.sh"
    activate.write_text("export ACTIVATED=yes\n: $UNSET_BY_NOBODY\nfalse\n")
    script = job(options={"launch": "deepy", "activate": json.dumps(str(activate))})

    for _ in range(2):
        done, _ = run_job(script)

    assert done.returncode == 0, done.stdout + done.stderr
    argv, cwd, env = next(
        json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")
    )
    assert argv == [str(neox_dir / name) for name in ("deepy.py", "train.py")] + [
        str(script.parent / "config.finetune.yml")
    ]
    assert Path(env["DLTS_HOSTFILE"]).read_text() == "nid000001 slots=4\n"
    assert env["ACTIVATED"] == "yes" and cwd == str(neox_dir) and env["SLURM_KILL_BAD_EXIT"] == "1"
    assert "does not prove that it finished" in done.stdout


def test_an_activation_script_that_is_not_there_ends_the_link(job, run_job, tmp_path):
    missing = tmp_path / "no such.sh"
    done, noted = run_job(job(options={"launch": "deepy", "activate": json.dumps(str(missing))}))

    assert done.returncode == 1 and f"cannot read {missing}" in done.stdout + done.stderr
    assert not any(line[0] == "srun" for line in noted)
