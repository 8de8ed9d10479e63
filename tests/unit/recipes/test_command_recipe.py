"""Recipe `command`: the words of a program as its launcher wants them, and what is refused."""

from __future__ import annotations

import base64
import json
import re

import pytest

from hpctrain.plan.load import load_plan
from hpctrain.plan.render import render
from hpctrain.recipes.launchers import Nodes, launch

NODES = Nodes(2, 4, 4, "/tmp", "/run")


def planned(folder, options, more="", nodes=2):
    (folder / "run.yaml").write_text(
        f"name: r\nsite: local\nrecipe: command\ntime: 1h\nnodes: {nodes}\n{more}\n"
        f"recipe_options: {options}\n"
    )
    return load_plan(str(folder / "run.yaml"), (), None)


def said(loaded):
    return [f"{one.level}: {one.what} {one.hint}" for one in loaded.plan.problems]


def job(loaded):
    assert not loaded.plan.errors, loaded.plan.errors
    return render(loaded.plan, loaded.inputs)["job.sbatch"]


def test_torchrun_learns_its_node_in_the_task_and_restarts_nothing():
    found = launch("torchrun", "python3", ["-m", "a.b", "--x", "1"], NODES, ["--numa-binding=node"])

    assert " ".join(found.argv) == (
        "python3 -u -m torch.distributed.run --nnodes 2 --nproc-per-node 4 --max-restarts 0"
        " --numa-binding=node"
    )
    assert '--node-rank "$SLURM_NODEID"' in found.on_node
    assert found.program == ("-m", "a.b", "--x", "1")


def test_deepspeed_gets_its_world_and_a_module_by_its_own_flag():
    found = launch("deepspeed", "python3", ["-m", "a.b", "c"], NODES)
    world = next(word for word in found.argv if word.startswith("--world_info="))

    assert json.loads(base64.urlsafe_b64decode(world.split("=", 1)[1])) == {
        "node0": [0, 1, 2, 3],
        "node1": [0, 1, 2, 3],
    }
    assert found.program == ("--module", "a.b", "c")


def test_accelerate_never_takes_what_its_user_once_answered():
    own = launch("accelerate", "python3", ["t.py"], NODES)
    given = launch("accelerate", "python3", ["t.py"], NODES, config="/x/fsdp.yaml")

    assert "distributed_type: MULTI_GPU" in own.files["accelerate.yml"]
    assert "/run/accelerate.yml" in own.argv and "/x/fsdp.yaml" in given.argv
    assert given.files == {} and "--deepspeed_multinode_launcher" in given.argv
    alone = launch("accelerate", "python3", ["t.py"], Nodes(1, 1, 1, "/tmp", "/run"))
    assert "distributed_type: NO" in alone.files["accelerate.yml"]


@pytest.mark.parametrize("kind, flag", [("torchrun", "--no-python"), ("accelerate", "--no_python")])
def test_what_is_no_python_is_not_given_to_python(kind, flag):
    assert flag in launch(kind, "python3", ["./bench", "x"], NODES).argv
    assert flag not in launch(kind, "python3", ["bench.py"], NODES).argv


@pytest.mark.parametrize("kind", ["torchrun", "accelerate", "deepspeed"])
def test_a_launcher_is_one_task_a_node_with_all_its_cores(tmp_path, kind):
    text = job(planned(tmp_path, f"{{launch: {kind}, program: train.py --lr 1e-4}}"))

    assert "#SBATCH --ntasks-per-node=1\n" in text and "#SBATCH --cpus-per-task=8\n" in text
    assert re.search(r'^"\$\{launcher\[@\]\}" --\w+[-_]rank "\$SLURM_NODEID"', text, re.M)
    assert text.rstrip().endswith('exit "$rc"')


def test_numbers_need_no_quotes_and_are_passed_as_they_are_written(tmp_path):
    program = "[train.py, --lr, 1.0e-4, --steps, 100, --flag, yes, --x, 1.10]"
    plan = planned(tmp_path, f"{{program: {program}}}").plan

    assert plan.resolved.argv == (
        *("python3", "-u", "train.py", "--lr", "1.0e-4", "--steps", "100", "--flag", "yes"),
        *("--x", "1.10"),
    )


def test_a_variable_is_passed_as_it_stands_with_a_warning_or_filled_in_where_said(tmp_path):
    literal = planned(tmp_path, "{program: train.py --tag $SLURM_JOB_ID}")
    assert "train.py --tag '$SLURM_JOB_ID'" in job(literal)
    assert any("expand: true" in line for line in said(literal))

    words = """train.py --tag $SLURM_JOB_ID "${A[@]}" $(date +%F) 'a b' \\"x#y"""
    filled = planned(tmp_path, "{expand: true, program: " + json.dumps(words) + "}")
    assert words in job(filled) and not said(filled)
    text = job(filled)
    assert text.index(f"cd -- {tmp_path}\nset +u") < text.index(words) < text.rindex("cd -- ")


@pytest.mark.parametrize(
    "words", ["a; b", "a && b", "a > f", "a 'b", 'a "b', "a `b`", "a # b", "a $(b", "(a)", "a\\"]
)
def test_more_than_the_words_of_one_command_is_no_program(tmp_path, words):
    found = planned(tmp_path, "{expand: true, program: " + json.dumps(words) + "}")

    assert [line for line in said(found) if line.startswith("error: `recipe_options.program` is")]


@pytest.mark.parametrize(
    "options, words",
    [
        ("{}", "`recipe_options.program` is empty"),
        ("{argv: []}", "`recipe_options.argv` is empty"),
        ("{program: ''}", "`recipe_options.program` is empty"),
        ("{program: [''], launch: torchrun}", "names an empty program"),
        ("{program: {a: b}}", "must be a text or a list"),
        ("{program: [a, [b]]}", "which is no word"),
        ("{program: a, argv: [b]}", "name the program twice"),
        ("{program: a, launch: torchrum}", "did you mean `torchrun`?"),
        ("{program: a, launch_args: [--x]}", "`launch_args` is an option of torchrun"),
        ("{program: a, launch: torchrun, launch_config: c.yml}", "is an option of accelerate"),
    ],
)
def test_every_mistake_of_a_program_is_told(tmp_path, options, words):
    found = planned(tmp_path, options)

    assert [line for line in said(found) if line.startswith("error") and words in line], said(found)


def test_ray_gets_a_token_of_the_job_and_one_program(tmp_path):
    loaded = planned(tmp_path, "{launch: ray, program: train.py, ray_timeout_s: 60}")
    text = job(loaded)

    assert "HPCTRAIN_RAY_TOKEN=$(od" in text
    assert "/ray_node.py --gpus 0 --timeout 60 --tmp /tmp -- python3 -u train.py" in text
    assert "ray_node.py" in loaded.plan.resolved.files


def test_setup_runs_outside_strict_mode_and_leaves_the_link_its_number(tmp_path):
    lines = 'setup: |\n  set -- x\n  source "$UNSET"\n  A=(1 2)\nmodules: [gcc/12]\n'
    text = job(planned(tmp_path, "{program: hostname}", lines))

    before, after = text.index("asked_link=${1-}\ncd -- "), text.index("set -- ${asked_link")
    assert before < text.index('source "$UNSET"\nA=(1 2)\n') < after < text.index("guard begin")
    assert "module load gcc/12" in text


def test_the_lines_of_each_task_are_carried_as_they_are(tmp_path):
    lines = "task_setup: |\n  ulimit -c 0\n  echo 'TASK'\n  TASK\n"
    text = job(planned(tmp_path, "{program: hostname}", lines))

    assert text.count('eval "$HPCTRAIN_TASK_SETUP"') == 1 and "'\"'\"'TASK'\"'\"'" in text


def test_options_of_srun_replace_the_plans_and_owned_ones_are_refused(tmp_path):
    text = job(planned(tmp_path, "{program: hostname}", "srun: {label: true, wait: 5}"))
    assert "  --label # as the run says\n  --wait=5 # as the run says\n" in text

    found = planned(tmp_path, "{program: hostname}", "srun: {ntasks: 3}")
    assert "error: `srun.ntasks` cannot be set here" in said(found)[0]


def test_a_recipes_own_layout_as_a_default_is_honoured(tmp_path, monkeypatch):
    """A recipe of a project's own, which names its program's checkpoints."""
    monkeypatch.delenv("HPCTRAIN_NO_USER_CONFIG", raising=False)
    recipe = tmp_path / ".hpctrain" / "templates" / "mine"
    recipe.mkdir(parents=True)
    shipped = "name: mine\ntitle: mine\nmodule: command\ntasks: by_launch\noptions:\n"
    from hpctrain.base.paths import shipped_text

    options = (
        shipped_text("command", "recipe.yaml").split("options:\n", 1)[1].split("options:\n")[-1]
    )
    options = options.replace(
        "    default: none\n", "    default: {pattern: 'c_{iteration}', marker: DONE}\n", 1
    )
    (recipe / "recipe.yaml").write_text(shipped + options)
    (tmp_path / "run.yaml").write_text(
        "name: r\nsite: local\nrecipe: mine\ntime: 1h\ncheckpoint: {dir: ck}\n"
        "recipe_options: {program: hostname}\n"
    )
    plan = load_plan(str(tmp_path / "run.yaml"), (), None).plan

    assert not plan.errors and plan.guard()["own_layout"] == {
        "pattern": "c_{iteration}",
        "marker": "DONE",
        "tracker_holds": "name",
    }
