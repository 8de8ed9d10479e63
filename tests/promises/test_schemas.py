"""The JSON Schemas that ship are those of the declared fields, and agree with hpctrain about real
files.

`pytest --update-golden tests/promises/test_schemas.py` rewrites them.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from hpctrain.config.document import load_yaml, parse_yaml
from hpctrain.config.json_schema import FOLDER, KINDS, schema_text
from hpctrain.config.recipe import list_recipes
from hpctrain.config.site import list_sites, load_site
from hpctrain.jobs.pipeline.stages import load_pipeline

ROOT = Path(__file__).parents[2]
RUNS = sorted([*ROOT.glob("examples/**/run.yaml"), *ROOT.glob("tests/golden/*/run.yaml")])
PROFILES = [path for _, layer, path in list_sites() if layer == "shipped"]


def validator(kind):
    return jsonschema.Draft202012Validator(
        json.loads(Path(FOLDER, f"{kind}.schema.json").read_text())
    )


def faults(kind, data):
    return [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator(kind).iter_errors(data)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_schema_is_the_one_of_the_fields(kind, request, cli):
    path = Path(FOLDER, f"{kind}.schema.json")
    if request.config.getoption("--update-golden"):
        path.write_text(schema_text(kind, shipped_only=True))

    assert path.read_text() == schema_text(kind, shipped_only=True)
    assert cli("schema", kind)[1] == path.read_text()
    jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_every_run_yaml_of_the_project_is_valid(path):
    assert faults("run", load_yaml(path).data) == []


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("examples/**/pipeline.yaml")), ids=lambda path: path.parent.name
)
def test_every_pipeline_of_the_project_is_valid_and_so_are_its_runs(path):
    assert faults("pipeline", load_yaml(path).data) == []
    planned = load_pipeline(str(path))
    assert planned.errors == []
    for stage in planned.stages:
        assert faults("run", load_yaml(stage.stage.run).data) == []


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: Path(path).parent.name)
def test_every_shipped_profile_is_valid(path):
    assert faults("site", load_yaml(path).data) == []


@pytest.mark.parametrize("site", [Path(path).parent.name for path in PROFILES])
@pytest.mark.parametrize(
    "recipe", [name for name, layer, _ in list_recipes() if layer == "shipped"]
)
def test_what_init_writes_is_valid(recipe, site, cli, tmp_path):
    text = cli("init", tmp_path / "r", "--recipe", recipe, "--site", site, "--dry-run")[1]

    assert faults("run", parse_yaml(text, "run.yaml").data) == []


@pytest.mark.parametrize(
    "text",
    [
        "nodez: 3",
        "nodes: three",
        "nodes: 0",
        "time: [1]",
        "chain: {job: 3}",
        "env: {'A B': x}",
        "data: {train: x}",
        "recipe_options: {argw: [x]}",
        "recipe_options: {argv: [x], launch: mpi}",
        "recipe_options: {argv: [x], layout: nosuch}",
        "partition: '$(x)'",
    ],
)
def test_mistakes_in_a_run_yaml_are_found_while_typing(text, cli, tmp_path):
    good = "name: r\nsite: local\nrecipe: command\ntime: 1h\n"
    options = "" if "recipe_options" in text else "recipe_options: {argv: [x]}\n"

    assert faults("run", yaml.safe_load(good + "recipe_options: {argv: [x]}\n")) == []
    assert faults("run", yaml.safe_load(good + options + text + "\n")) != []
    (tmp_path / "run.yaml").write_text(good + options + text + "\n")
    assert cli("check", tmp_path / "run.yaml")[0] == 2


def test_a_profile_that_extends_another_needs_only_what_it_changes(tmp_path):
    text = "name: lumi\nextends: lumi\nnode_types: {lumi-g: {memory_gib: 400}}\n"
    (tmp_path / "p.yaml").write_text(text)

    assert faults("site", yaml.safe_load(text)) == []
    assert faults("site", yaml.safe_load(text.replace("extends: lumi\n", ""))) != []
    assert faults("site", yaml.safe_load(text.replace("memory_gib", "memory_gb"))) != []
    assert load_site(str(tmp_path / "p.yaml")).node_types["lumi-g"].memory_gib == 400
