"""Whatever is written into a run.yaml: never a traceback, never exit 70, and a rendered script
carries it verbatim."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.base.errors import HpctrainError, UsageError
from hpctrain.config.document import walk
from hpctrain.config.recipe import load_recipe
from hpctrain.plan.check import find_problems
from hpctrain.plan.load import load_plan
from hpctrain.plan.run_dir import run_files, write_run_dir

sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile import HOSTILE  # noqa: E402

BASE = {
    "name": "base",
    "site": "lumi",
    "recipe": "command",
    "account": "project_465001281",
    "partition": "standard-g",
    "nodes": 1,
    "time": "1h",
    "container": "/scratch/image.sif",
    "container_binds": ["/extra"],
    "checkpoint": {"start": "/scratch/start/global_step7", "dir": "/scratch/ckpt"},
    "data": {
        "train": ["/scratch/data/train"],
        "valid": ["/scratch/data/valid"],
        "test": ["/scratch/data/test"],
    },
    "chain": {"jobs": 1, "after_each": "/scratch/bench.sh"},
    "config": {"key": "value"},
    "recipe_options": {
        "argv": ["/usr/bin/env", "-0", "--", "true"],
        "workdir": "/",
        "layout": "none",
    },
    "env": {"GREETING": "hello"},
    "sbatch": {"reservation": "res"},
    "secrets": "/scratch/secrets.env",
}
STRING_FIELDS = [
    ("name",),
    ("site",),
    ("recipe",),
    ("account",),
    ("partition",),
    ("time",),
    ("container",),
    ("container_binds", 0),
    ("checkpoint", "start"),
    ("checkpoint", "dir"),
    ("data", "train", 0),
    ("data", "valid", 0),
    ("data", "test", 0),
    ("chain", "after_each"),
    ("config", "key"),
    ("recipe_options", "argv", 0),
    ("recipe_options", "argv", 3),
    ("recipe_options", "workdir"),
    ("recipe_options", "layout"),
    ("env", "GREETING"),
    ("sbatch", "reservation"),
    ("secrets",),
]


def plan_of(tmp_path, data):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(data))
    return load_plan(str(path), (), str(tmp_path / "run dir"))


def with_value(path, value):
    data = copy.deepcopy(BASE)
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return data


@pytest.mark.parametrize("path", STRING_FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_a_hostile_value_is_refused_with_its_place_or_survives_bash(path, tmp_path):
    import subprocess

    carried = refused = 0
    for value in HOSTILE:
        try:
            loaded = plan_of(tmp_path, with_value(path, value))
            if loaded.plan.errors:
                raise UsageError(loaded.plan.errors)
        except HpctrainError as error:
            refused += 1
            assert error.exit_code == 2
            assert all(problem.what.isprintable() for problem in error.problems), error
            continue
        carried += 1
        script = run_files(loaded)["job.sbatch"]
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b""), (value, done.stderr)
        directives = [line for line in script.decode().splitlines() if line.startswith("#SBATCH")]
        assert len(directives) == len(loaded.plan.directives), value

    assert carried + refused == len(HOSTILE)
    assert refused, "NUL at least is never a value"


def carried_by(tmp_path, path):
    """The hostile values that the plan accepts for a field."""
    found = []
    for value in HOSTILE:
        try:
            if not plan_of(tmp_path, with_value(path, value)).plan.errors:
                found.append(value)
        except HpctrainError:
            pass
    return found


def test_hostile_text_reaches_the_program_verbatim_and_runs_nothing(tmp_path, run_job):
    arguments = carried_by(tmp_path, ("recipe_options", "argv", 3))
    variables = {
        f"HOSTILE_{number}": value
        for number, value in enumerate(carried_by(tmp_path, ("env", "GREETING")))
    }
    images = carried_by(tmp_path, ("container",))
    assert min(map(len, (arguments, variables, images))) >= 40
    out = tmp_path / "out"
    program = (
        "import json, os, sys\nseen = [sys.argv[1:], {name: text for name, text in"
        f" os.environ.items() if name.startswith('HOSTILE_')}}]\njson.dump(seen, open({str(out)!r},"
        " 'w'))"
    )
    data = copy.deepcopy(BASE)
    del data["secrets"], data["container_binds"]
    data["env"] = variables
    data["checkpoint"] = {"dir": str(tmp_path / "ckpt")}
    data["recipe_options"] = {
        "argv": ["python3", "-c", program, *arguments],
        "workdir": str(tmp_path),
    }
    for number, image in enumerate(images[::8]):
        data["container"] = image
        plan_of(tmp_path, data)
        run_dir = tmp_path / f"run {number}"
        loaded = load_plan(str(tmp_path / "run.yaml"), (), str(run_dir))
        assert not loaded.plan.errors
        write_run_dir(str(run_dir), run_files(loaded))
        done, notes = run_job(run_dir / "job.sbatch")

        assert done.returncode == 0, (image, done.stdout, done.stderr)
        assert json.loads(out.read_text()) == [arguments, variables]
        assert loaded.plan.spec.container in next(
            note for note in notes if note[0] == "singularity"
        )
        assert not list(tmp_path.rglob("canary"))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        ["lumi", "generic-cuda", "local", "command", "1h", "/x", "standard-g", *HOSTILE[:60]]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.dictionaries(
        st.sampled_from(
            [path[0] for path in STRING_FIELDS] + ["nodes", "tasks_per_node", "estimate", "x"]
        ),
        VALUES,
    )
)
def test_random_specs_never_raise_anything_but_our_errors(tmp_path, changes):
    try:
        loaded = plan_of(tmp_path, {**BASE, **changes})
    except HpctrainError:
        return
    except (yaml.YAMLError, UnicodeEncodeError):
        return  # the test could not write the file
    if not loaded.plan.errors:
        run_files(loaded)


EXAMPLES = sorted(
    path.parent for path in (Path(__file__).parents[2] / "examples").glob("*/run.yaml")
)
ODD = [
    None,
    "",
    0,
    -1,
    1.5,
    10**30,
    10**400,
    float("inf"),
    float("nan"),
    1e308,
    True,
    [],
    {},
    [None],
    [[]],
    {"a": None},
    {"": 1},
    "x" * 10_001,
    "/" + "x" * 5000,
    "$(touch canary)",
    "a\nb",
    "{tmp}",
    "%j",
    "-x",
    "../..",
    "'",
    '"',
    "\\",
    "\u2028",
    "1:30",
    "0x10",
    "none",
    "1e-5",
    ["a", 1],
]


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_random_changes_of_any_example_never_raise_anything_but_our_errors(tmp_path, data):
    example = data.draw(st.sampled_from(EXAMPLES))
    run = yaml.safe_load((example / "run.yaml").read_text())
    options = list(load_recipe(run["recipe"], "", "").values["options"])
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from([path for path, _ in walk(run) if path]))
        node = run
        for key in path[:-1]:
            node = node[key]
        value = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        if data.draw(st.integers(0, 3)):
            node[path[-1]] = value
        elif isinstance(run.setdefault("recipe_options", {}), dict):
            run["recipe_options"][data.draw(st.sampled_from(options))] = value
    folder = tmp_path / example.name
    if not folder.is_dir():
        shutil.copytree(example, folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(run, allow_unicode=True), encoding="utf-8")
    try:
        loaded = load_plan(str(folder / "run.yaml"))
        find_problems(loaded)
        if not loaded.plan.errors:
            run_files(loaded)
    except HpctrainError:
        pass


@pytest.mark.parametrize(
    ("example", "path", "value", "words"),
    [
        ("hf-sft", ("config", "lora"), 3, "`lora: 3` must be a mapping"),
        ("hf-sft", ("config", "disk_gib"), float("nan"), "is no finite number"),
        ("hf-sft", ("config", "num_train_epochs"), float("inf"), "is no finite number"),
        ("lumi-sft", ("data", "train"), ["/" + "x" * 5000], "is longer than 4095 bytes"),
        ("lumi-sft", ("data", "train"), ["\u2028"], "contains the control character"),
        ("lumi-sft", ("nodes",), 10**400, "is too large a number"),
    ],
)
def test_what_cannot_be_carried_or_counted_is_one_error(tmp_path, example, path, value, words):
    run = yaml.safe_load(
        (next(each for each in EXAMPLES if each.name == example) / "run.yaml").read_text()
    )
    node = run
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run, allow_unicode=True), encoding="utf-8")
    try:
        errors = load_plan(str(tmp_path / "run.yaml")).plan.errors
    except UsageError as error:
        errors = error.problems
    assert len(errors) == 1, errors
    (problem,) = errors
    assert words in problem.what and problem.where.startswith(str(tmp_path / "run.yaml:"))


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_our_errors(tmp_path, raw):
    path = tmp_path / "run.yaml"
    path.write_bytes(raw)
    with pytest.raises(HpctrainError):
        load_plan(str(path))


MANY = """\
name: r
site: lummi
site: lumi
recipe: command
nodes: 0
nodess: 2
time: 10 parsecs
chain: {jbos: 3}
recipe_options: {argv: [hostname], argvv: 1}
env: {a b: 3}
"""
OF_MANY = {"3:1": "given twice", "6:1": "`nodess`", "5:8": "`nodes: 0`", "7:7": "`10 parsecs`"}
OF_MANY |= {"8:9": "`chain.jbos`", "9:36": "argvv", "10:7": "`a b`", "2:7": "`lummi`"}


def test_a_key_given_twice_hides_no_other_mistake(tmp_path, cli):
    (tmp_path / "run.yaml").write_text(MANY)
    (tmp_path / "pipeline.yaml").write_text("name: p\nname: q\nstages: {a: {run: run.yaml}}\n")

    _, out, _ = cli("check", tmp_path / "run.yaml", "--json")
    found = {
        problem["where"].removeprefix(f"{tmp_path}/run.yaml:"): problem["what"]
        for problem in json.loads(out)["problems"]
    }

    assert set(found) == set(OF_MANY), found
    assert all(words in found[where] for where, words in OF_MANY.items()), found
    said = json.loads(cli("check", tmp_path / "pipeline.yaml", "--json")[1])["problems"]
    assert len(said) > len(OF_MANY), said
