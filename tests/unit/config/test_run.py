"""run.yaml with its layers: what each key becomes, which layer wins, and what is refused."""

from __future__ import annotations

import os

import pytest

from hpctrain.base.errors import EnvironmentFault, UsageError
from hpctrain.config.document import merge
from hpctrain.config.run import Handed, absolute, read_layers, spec_from_layers, user_layers

RUN = "name: r\nsite: lumi\nrecipe: command\ntime: 2h\n"


@pytest.fixture
def spec_of(tmp_path):
    """(RunSpec, problems) of RUN with more lines, with `--set` words and what a stage hands
    over."""

    def read(more="", *words, handed=None):
        path = tmp_path / "run.yaml"
        path.write_text(RUN + more)
        return spec_from_layers(read_layers(str(path), words), str(path), handed)

    return read


@pytest.fixture
def user_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    path = tmp_path / "home" / "hpctrain" / "config.yaml"
    path.parent.mkdir(parents=True)
    return path


def test_a_short_run_has_the_defaults_of_everything_else(spec_of, tmp_path):
    spec, problems = spec_of()
    assert problems == []
    assert (spec.name, spec.site, spec.recipe, spec.time_s) == ("r", "lumi", "command", 7200)
    assert (spec.num_nodes, spec.num_links, spec.give_up_after) == (1, 1, 3)
    unset = (
        spec.account,
        spec.partition,
        spec.gpus_per_node,
        spec.tasks_per_node,
        spec.container,
        spec.secrets,
    )
    assert (
        unset == (None,) * 6
        and spec.checkpoint_dir is spec.checkpoint_start is spec.after_each is None
    )
    assert (
        spec.data == {"train": (), "valid": (), "test": ()} and spec.env == {} and spec.sbatch == {}
    )
    assert (spec.preflight, spec.step_time_s, spec.handed, spec.has_start) == (
        None,
        None,
        None,
        False,
    )
    assert spec.base_dir == str(tmp_path) and spec.where("time").startswith(
        str(tmp_path / "run.yaml:4:")
    )


def test_paths_are_relative_to_run_yaml_and_of_the_user(spec_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    more = (
        "checkpoint: {start: ../base/s1, dir: ~/ck}\ncontainer: /c//x.sif\ndata: {train: [d/a,"
        " /d/b], test: [t]}\n"
    )
    spec, problems = spec_of(
        more + "chain: {jobs: 4, give_up_after: 2, after_each: bench.sh}\nsecrets: ~/s.env\n"
    )
    assert problems == []
    assert spec.checkpoint_start == str(tmp_path.parent / "base" / "s1") and spec.has_start
    assert (spec.checkpoint_dir, spec.container) == ("/home/me/ck", "/c/x.sif")
    assert spec.data == {
        "train": (f"{tmp_path}/d/a", "/d/b"),
        "valid": (),
        "test": (f"{tmp_path}/t",),
    }
    assert (spec.num_links, spec.give_up_after, spec.after_each) == (4, 2, f"{tmp_path}/bench.sh")
    assert spec.secrets == "~/s.env"  # of whoever the job runs as
    assert absolute("a/../b", "/x") == "/x/b" and absolute("/a", "/x") == "/a"


@pytest.mark.parametrize(
    ("value", "text"),
    [("5", "5"), ("1.5", "1.5"), ("true", "true"), ("false", "false"), ("'a b'", "a b")],
)
def test_variables_are_text_as_a_shell_would_have_them(spec_of, value, text):
    assert spec_of(f"env: {{X: {value}}}\n")[0].env == {"X": text}


@pytest.mark.parametrize(
    "name", ["RANK", "MASTER_PORT", "SLURM_JOB_ID", "HPCTRAIN_X", "PMIX_A", "IFS", "ENV"]
)
def test_what_hpctrain_and_slurm_set_cannot_be_set(spec_of, name):
    (problem,) = spec_of(f"env: {{{name}: x}}\n")[1]
    assert (
        problem.what == f"`env.{name}` is set by hpctrain or Slurm in every job"
        and problem.hint == "delete it"
    )


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("APIKEY", True),
        ("my_password_2", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("TOKENIZER_X", False),
        ("HF_TOKEN_PATH", False),
        ("AWS_SECRET_FILE", False),
        ("MAX_TOKENS", False),
        ("LOSS_TOKENS_PER_STEP", False),
        ("RANKS", False),
        ("KEY", False),
    ],
)
def test_secrets_do_not_belong_into_run_yaml(spec_of, name, secret):
    problems = spec_of(f"env: {{{name}: x}}\n")[1]
    assert ["looks like a secret" in problem.what for problem in problems] == [True] * secret
    assert not secret or f"{name}=…" in problems[0].hint


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nodes: 0", "is less than 1"),
        ("nodes: 100001", "is more than 100000"),
        ("gpus_per_node: 65", "is more than 64"),
        ("tasks_per_node: 0", "is less than 1"),
        ("chain: {jobs: 1001}", "is more than 1000"),
        ("chain: {give_up_after: 0}", "is less than 1"),
        ("estimate: {step_time_s: 0}", "is less than 0.001"),
        ("account: 'a b'", "is not a Slurm account"),
        ("partition: -x", "is not a partition"),
        ("container_binds: ['/a,/b']", "is not one path"),
        ("preflight: {policy: no}", "must be text"),
        ("preflight: {limit_s: 9}", "is less than 10"),
        ("sbatch: {time: 5}", "`sbatch.time` cannot be set here"),
        ("sbatch: {Nice: 5}", "is not a valid name"),
        ("env: {1A: x}", "is not a valid name"),
        ("name: 'a/b'", "is not a name"),
    ],
)
def test_what_no_run_can_have_is_one_problem_at_its_place(spec_of, line, words):
    text = line + "\n"
    if line.startswith("name"):
        _, problems = spec_of("", "name=a/b")
    else:
        _, problems = spec_of(text)
    assert len(problems) == 1 and words in problems[0].what, problems


def test_a_spec_with_problems_is_still_good_for_finding_more(spec_of):
    spec, problems = spec_of("nodes: x\n", "time=soon", "name=")
    assert len(problems) == 3 and (spec.num_nodes, spec.time_s, spec.name) == (1, 3600, "unnamed")


def test_set_wins_over_run_yaml_over_the_site_of_the_user_over_the_user(spec_of, user_config):
    user_config.write_text(
        "account: everywhere\nnodes: 9\ntime: 9h\nsites:\n  lumi: {account: here, nodes: 8}\n"
    )
    spec, problems = spec_of("nodes: 7\n")
    assert problems == [] and (spec.account, spec.num_nodes, spec.time_s) == ("here", 7, 7200)
    assert spec.where("account") == f"{user_config}:5:19"
    assert spec_of("nodes: 7\n", "nodes=6")[0].num_nodes == 6
    other, _ = spec_of("", "site=local")
    assert (other.account, other.num_nodes) == ("everywhere", 9)


def test_the_users_config_may_be_off_empty_or_wrong(user_config, monkeypatch):
    assert user_layers("lumi") == []
    user_config.write_text("")
    assert user_layers("lumi") == []
    user_config.write_text("account: a\n")
    assert (
        [layer.data for layer in user_layers("lumi")]
        == [{"account": "a"}]
        == [layer.data for layer in user_layers(None)]
    )
    user_config.write_text("- a\n")
    with pytest.raises(UsageError, match="is a mapping of run.yaml keys"):
        user_layers("lumi")
    monkeypatch.setenv("HPCTRAIN_NO_USER_CONFIG", "1")
    assert user_layers("lumi") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("- a\n", "is a mapping of keys to values"),
        ("stages: {a: {}}\n", "is a pipeline"),
    ],
)
def test_a_file_that_is_no_run_is_told(tmp_path, text, words):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_layers(str(path))


def test_a_file_that_is_not_there_names_what_makes_one(tmp_path):
    with pytest.raises(EnvironmentFault, match="there is no") as caught:
        read_layers(str(tmp_path / "run.yaml"))
    assert "hpctrain init" in caught.value.problems[0].hint
    assert os.path.isdir(tmp_path)
    with pytest.raises(EnvironmentFault) as caught:
        read_layers(str(tmp_path))
    assert "there is no" not in caught.value.problems[0].what


def handed(**changes):
    fields = {
        "stage": "warm",
        "run_dir": "/r/warm",
        "hand_over": "checkpoint",
        "way": "symlink",
        "checkpoint": "/ck/warm/step10",
        "checkpoint_dir": "/ck/warm",
        "model": None,
    }
    return Handed(**{**fields, **changes})


def test_a_stage_starts_from_what_the_one_before_hands_over(spec_of):
    spec, problems = spec_of("checkpoint: {dir: /ck/r}\n", handed=handed())
    assert problems == [] and spec.checkpoint_start == "/ck/warm/step10" and spec.has_start
    later, _ = spec_of("checkpoint: {dir: /ck/r}\n", handed=handed(checkpoint=None))
    assert later.checkpoint_start is None and later.has_start
    model, _ = spec_of("checkpoint: {start: /own, dir: /ck/r}\n", handed=handed(hand_over="model"))
    assert model.checkpoint_start == "/own"
    assert not spec_of("", handed=handed(hand_over="model"))[0].has_start


@pytest.mark.parametrize(
    ("start", "good"),
    [("/ck/warm/step9", True), ("/ck/warm", True), ("/ck/warmer/step9", False), ("/other", False)],
)
def test_a_start_of_ones_own_must_be_the_earlier_stages(spec_of, start, good):
    spec, problems = spec_of(f"checkpoint: {{start: {start}, dir: /ck/r}}\n", handed=handed())
    assert [problem.what for problem in problems] == (
        [] if good else ["`checkpoint.start` is given, and stage `warm` hands over a checkpoint"]
    )
    assert spec.checkpoint_start == "/ck/warm/step10"


def test_layers_stay_apart_until_they_are_merged(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    layers = read_layers(str(path), ["env.A=1", "env.B=x y"])
    assert merge(layers).get("env") == {"A": 1, "B": "x y"} and layers[0].get("env") is None
