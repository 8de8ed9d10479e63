"""An sbatch script becomes a run.yaml in the order it had, loses nothing, and its faults are told."""

from __future__ import annotations

import os

import pytest
import yaml
from needed import needed

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.plan.load import load_plan
from hpctrain.plan.render import render

needed("tree_sitter_bash")

from hpctrain.imports.read import read_script  # noqa: E402
from hpctrain.imports.script import import_script  # noqa: E402
from hpctrain.imports.text import run_text  # noqa: E402

HEAD = "#!/bin/bash\n#SBATCH -N 2\n#SBATCH --gres=gpu:4\n#SBATCH -t 1:00:00\n"


def imported(body, head=HEAD):
    return import_script(head + body, "job", "generic-cuda")


def rendered(tmp_path, found):
    (tmp_path / "run.yaml").write_text(run_text(found, "job.sh"))
    loaded = load_plan(str(tmp_path / "run.yaml"), (), None)
    assert not loaded.plan.errors, loaded.plan.errors
    return render(loaded.plan, loaded.inputs)["job.sbatch"]


def test_directives_become_keys_and_what_has_none_is_named():
    head = (
        "#!/bin/bash\n#SBATCH -J my:job -A proj_1 -p gpu,spot\n#SBATCH --nodes 4\n"
        "#SBATCH --ntasks-per-node=8 # eight\n#SBATCH --gpus-per-node=a100:8\n"
        "#SBATCH --cpus-per-task=7\n#SBATCH --mem=0 --exclusive\n#SBATCH --time=2-00:00:00\n"
        "#SBATCH --output=%x.out\n#SBATCH --environment=nemo\n#SBATCH --dependency=singleton\n"
    )
    found = imported("srun python train.py --lr 1e-4\n", head)

    assert found.run == {
        "name": "my-job",
        "site": "generic-cuda",
        "recipe": "command",
        "nodes": 4,
        "account": "proj_1",
        "time": "2-00:00:00",
        "partition": "gpu,spot",
        "gpus_per_node": 8,
        "tasks_per_node": 8,
        "sbatch": {
            "cpus-per-task": 7,
            "mem": 0,
            "exclusive": True,
            "environment": "nemo",
            "dependency": "singleton",
        },
        "recipe_options": {"program": "python train.py --lr 1e-4"},
    }
    assert [line for line, what in found.left if "--output" in what] == [9]


def test_modules_and_literal_exports_are_keys_until_something_may_change_the_environment():
    found = imported(
        "module load gcc cuda/12\nexport A=1 \nexport B='x y'\nsource env.sh\nexport C=3\n"
        "export D=$A:/x\ncd /work/me\nsrun python t.py\n"
    )

    assert found.run["modules"] == ["gcc", "cuda/12"]
    assert found.run["env"] == {"A": "1", "B": "x y"}
    assert found.run["setup"] == "source env.sh\nexport C=3\nexport D=$A:/x\ncd /work/me\n"


def test_a_variable_spoken_of_before_is_not_moved_before_it():
    found = imported("echo $A\nexport A=1\nsrun python t.py\n")

    assert "env" not in found.run and found.run["setup"] == "echo $A\nexport A=1\n"


def test_torchrun_is_launched_and_what_its_line_did_wrong_is_told():
    found = imported(
        "export MASTER_PORT=29500\n"
        "srun torchrun --nnodes $SLURM_NNODES --nproc_per_node=4 --node_rank $SLURM_PROCID"
        ' --rdzv_endpoint "$H:29400" --tee 3 \\\n  train.py --name "$RUN" $ARGS 2>&1 | tee log\n'
    )
    options = found.run["recipe_options"]

    assert options["program"] == 'train.py --name "$RUN" $ARGS' and options["expand"] is True
    assert options["launch"] == "torchrun" and options["processes_per_node"] == 4
    assert options["launch_args"] == ["--tee=3"] and "tasks_per_node" not in found.run
    told = [what for _, what in found.faults]
    assert any("every node" in what for what in told)
    assert any("port 29500" in what for what in told)
    assert any("logs/ holds what the step says" in what for _, what in found.left)


@pytest.mark.parametrize(
    "line, words",
    [
        ("#SBATCH --nodes=$N\n", "Slurm fills in no variables"),
        ("#SBATCH --account=<yours>\n", "a place to fill in: set `account:`"),
        ("#SBATCH --requeue\n", "nothing resumes"),
        ("#SBATCH --cpus-per-task=8\n", "srun does not take --cpus-per-task"),
        ("echo\n#SBATCH --mem=1G\n", "Slurm never reads"),
    ],
)
def test_real_faults_are_found_with_their_lines(line, words):
    found = imported("srun python t.py\n", HEAD + line)

    assert [number for number, what in found.faults if words in what], found.faults


def test_options_of_srun_that_the_job_fills_in_expand(tmp_path):
    found = imported(
        'IMAGE=/x/$USER.sqsh\nARGS="--container-image $IMAGE --mpi=pmix"\n'
        'srun $ARGS -l --container-mounts="$HOME:$HOME" --nodes=2 --ntasks-per-node=1 ./run.sh\n'
    )
    text = rendered(tmp_path, found)

    assert found.run["srun"] == {
        "container-image": "$IMAGE",
        "mpi": "pmix",
        "label": True,
        "container-mounts": "$HOME:$HOME",
    }
    assert '  --container-mounts="$HOME:$HOME" #' in text and '--container-image="$IMAGE"' in text


@pytest.mark.parametrize(
    "body",
    [
        "srun --ntasks=1 head.sh &\nsrun worker.sh\nwait\n",
        "for i in 1 2; do srun python t.py $i; done\n",
        "if [ -d x ]; then srun python t.py; else srun python u.py; fi\n",
        'run() { srun python "$1"; }\nrun t.py\n',
        "pdsh -w $SLURM_JOB_NODELIST python t.py\n",
        'RUN="srun -l"\nRUN="$RUN --mpi=pmix"\n$RUN python t.py\n',
        "torchrun --nproc_per_node 4 t.py\n",
        "srun torchrun --nnodes=1 --nproc_per_node 4 t.py\n",
        'srun $AUTO -l "${ARGS[@]}" python t.py\n',
    ],
)
def test_what_is_not_one_step_stays_whole_in_setup_and_its_failure_is_the_jobs(tmp_path, body):
    found = imported(body)

    assert "t.py" in found.run["setup"] or "worker.sh" in found.run["setup"]
    assert found.run["recipe_options"] == {"program": "true"}
    assert 'exit "$code"' in rendered(tmp_path, found) and "not one step" in found.remarks[0]


def test_an_srun_that_a_variable_holds_is_one_step():
    found = imported('RUN="srun -l"\nPY=python3\n$RUN $PY t.py\n')

    assert found.run["srun"] == {"label": True}
    assert found.run["recipe_options"] == {"program": "$PY t.py", "expand": True}


def test_secrets_and_resubmission_are_left_out_and_never_shown():
    key = "hf_" + "a" * 30
    found = imported(f"export HF_TOKEN={key}\nsbatch $0\nsrun python t.py\n")

    assert key not in run_text(found, "job.sh")
    assert any("secrets:" in what for _, what in found.left)
    assert any("hpctrain chain" in what for _, what in found.left)


def test_no_line_of_a_script_is_lost():
    body = "umask 022\nf() {\n  echo $1\n}\nA=(1 2)\nf x\nsrun python t.py\necho done\n"
    found = imported(body)
    kept = found.run["setup"] + found.run["recipe_options"]["program"]
    kept += "".join(what for _, what in found.left)

    assert all(line.strip() in kept for line in body.replace("srun ", "").splitlines())


def test_the_text_is_a_run_yaml_again_with_lines_as_blocks():
    found = imported("A=1\nB=2\nsrun python t.py $A\n")
    text = run_text(found, "job.sh")

    assert yaml.safe_load(text) == found.run and "setup: |\n  A=1\n  B=2\n" in text


def test_what_is_no_script_is_refused():
    with pytest.raises(UsageError, match="no job script"):
        import_script("name: x\n", "x", "local")


@pytest.mark.parametrize(
    "text", ["#!/bin/bash\n", "#!/bin/bash\nsrun 'a\n", "#!/bin/sh\nif x\n", "#!\n)("]
)
def test_broken_bash_is_carried_and_never_a_traceback(text):
    found = import_script(text, "job", "local")

    assert found.run["recipe"] == "command"


def test_the_verb_writes_beside_the_script_and_never_replaces(tmp_path, cli):
    script = tmp_path / "train.sbatch"
    script.write_text(HEAD + "srun python t.py\n")
    code, _, said = cli("import", str(script), "--site", "generic-cuda")
    assert code == 0 and "train.run.yaml" in said and (tmp_path / "train.run.yaml").exists()

    code, _, said = cli("import", str(script))
    assert code != 0 and "Traceback" not in said


@pytest.mark.parametrize("verb", ["check", "plan", "render", "chain"])
@pytest.mark.parametrize("body", ["srun python t.py\n", "a: b: c\n", ""])
def test_other_verbs_point_a_script_to_import(tmp_path, cli, verb, body):
    script = tmp_path / "my job.sbatch"
    script.write_text(HEAD + body)
    code, out, said = cli(verb, str(script))
    new = cli("init", str(script), "--recipe", "command", "--site", "local")

    assert new[0] == 2 and "hpctrain import" in new[2]
    assert code == 2 and f"hpctrain import '{script}'" in out + said


def test_what_is_no_plain_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.sh")
    for path in (tmp_path / "pipe.sh", tmp_path, tmp_path / "nosuch.sh"):
        with pytest.raises(EnvironmentFault, match="cannot read"):
            read_script(str(path))
    (tmp_path / "job.sh").write_text("#!/bin/bash\n")
    (tmp_path / "link.sh").symlink_to("job.sh")
    assert read_script(str(tmp_path / "link.sh")) == "#!/bin/bash\n"
    with pytest.raises(UsageError, match="not a plain file"):
        load_plan(str(tmp_path / "pipe.sh"))
