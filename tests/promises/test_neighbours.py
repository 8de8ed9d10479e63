"""What the users of a shared disk promise each other through hpctrain: nobody's folder runs code as
whoever reads it, and what waits in the queue is nobody else's to change."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from needed import needed

STRANGER = 61002
RUN = (
    "name: r\nsite: local\nrecipe: command\ntime: 10m\nrecipe_options: {argv: [hostname], workdir:"
    " /}\n"
)
TEMPLATE = """{% extends "!builtin/command/job.sbatch.j2" %}
{% block user_setup %}
echo planted
{% endblock %}
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
needs_others = pytest.mark.parametrize(
    "plant",
    [
        pytest.param(lambda path: os.chown(path, STRANGER, -1), marks=needs_root, id="another's"),
        pytest.param(lambda path: os.chmod(path, 0o777), id="anybody's"),
    ],
)


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("HPCTRAIN_NO_USER_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "run.yaml").write_text(RUN)
    return folder


def template(folder):
    file = folder / ".hpctrain/templates/command/job.sbatch.j2"
    file.parent.mkdir(parents=True)
    file.write_text(TEMPLATE)
    return file


@needs_others
@pytest.mark.parametrize("verb", ["render", "render --dry-run", "chain --dry-run", "check"])
def test_a_template_that_may_be_anothers_is_refused_in_one_line(run_dir, hpctrain, plant, verb):
    plant(template(run_dir))

    done = hpctrain(*verb.split(), cwd=run_dir)

    assert done.returncode == (1 if verb == "check" else 4)
    assert "this template is not used" in done.stdout + done.stderr
    assert "hint: " in done.stdout + done.stderr
    assert not (run_dir / "runs").exists()


@needs_others
def test_what_only_reads_reads_anothers_folder(run_dir, hpctrain, plant):
    assert hpctrain("render", cwd=run_dir).returncode == 0
    plant(template(run_dir))

    for verb in ("plan", "status runs/r", "template list", "site list", "report runs/r"):
        done = hpctrain(*verb.split(), cwd=run_dir)
        assert "not used" not in done.stdout + done.stderr
        assert done.returncode in (0, 1, 3), verb


@needs_others
def test_a_profile_that_may_be_anothers_gives_no_line_of_a_job_and_no_command(
    run_dir, hpctrain, plant
):
    profile = run_dir / ".hpctrain/site_profiles/ours/profile.yaml"
    profile.parent.mkdir(parents=True)
    profile.write_text("name: ours\nextends: local\ntitle: Ours\n")
    (run_dir / "run.yaml").write_text(RUN.replace("site: local", "site: ours"))
    assert hpctrain("render", "--dry-run", cwd=run_dir).returncode == 0

    plant(profile)

    refused = hpctrain("render", cwd=run_dir)
    assert (refused.returncode, "this site profile is not used" in refused.stderr) == (4, True)
    assert hpctrain("plan", cwd=run_dir).returncode == 0


@needs_others
def test_doctor_starts_no_python_that_may_be_anothers(run_dir, hpctrain, plant):
    python = run_dir / "py"
    python.write_text("#!/bin/sh\ntouch " + str(run_dir / "ran") + "\n")
    python.chmod(0o755)
    (run_dir / "run.yaml").unlink()
    assert hpctrain("init", ".", "--recipe", "sft", "--site", "local", cwd=run_dir).returncode == 0
    text = (run_dir / "run.yaml").read_text()
    options = f"recipe_options:\n  python: {python}"
    (run_dir / "run.yaml").write_text(text.replace("recipe_options:", options))
    plant(python)

    done = hpctrain("doctor", "run.yaml", cwd=run_dir)

    assert not (run_dir / "ran").exists()
    assert "this Python is not used" in done.stdout, done.stdout + done.stderr


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_compiled_templates_below_a_folder_of_others_are_not_unpickled(run_dir, hpctrain, tmp_path):
    """The folder itself is mine and shut: the one above it was not looked at."""
    from jinja2.bccache import bc_magic

    cache = tmp_path / "home/.cache"
    cache.mkdir(parents=True)
    assert hpctrain("render", cwd=run_dir).returncode == 0
    for file in cache.rglob("*.cache"):
        raw = file.read_bytes()
        assert raw.startswith(bc_magic)
        file.write_bytes(bc_magic + pickle.dumps(Evil(str(tmp_path / "ran"))))
    cache.chmod(0o777)

    assert hpctrain("render", "--force", cwd=run_dir).returncode == 0
    assert not (tmp_path / "ran").exists()


NODE_DIRS = """name: ours
extends: local
node_dirs:
  TRITON_CACHE_DIR:
    path: "{here}/{{user}}-{{job}}-triton"
    why: compiled kernels
  KEPT_DIR:
    path: "{here}/kept"
    why: kept from job to job
"""
ASKS = (
    "name: r\nsite: ./profile.yaml\nrecipe: command\nnodes: 1\ntime: 10m\n"
    'recipe_options: {argv: [bash, -c, \'ls -A "$TRITON_CACHE_DIR" >seen; cd "$TRITON_CACHE_DIR"; pwd -P >'
    '"$OLDPWD/where"\'], workdir: "HERE"}\n'
)


@pytest.mark.parametrize(
    "plant",
    [
        lambda folder: None,
        lambda folder: folder.symlink_to(folder.parent / "elsewhere"),
        pytest.param(
            lambda folder: (folder.mkdir(mode=0o777), os.chown(folder, STRANGER, -1)),
            marks=needs_root,
        ),
    ],
    ids=["nothing", "a link", "another's folder"],
)
def test_a_folder_that_another_made_on_the_node_is_not_compiled_into(
    run_dir, cli, run_job, monkeypatch, plant
):
    monkeypatch.chdir(run_dir)
    monkeypatch.setenv("USER", "me")
    (run_dir / "elsewhere").mkdir()
    (run_dir / "profile.yaml").write_text(NODE_DIRS.format(here=run_dir))
    (run_dir / "run.yaml").write_text(ASKS.replace("HERE", str(run_dir)))
    code, out, err = cli("render")
    assert code == 0, err
    planted = run_dir / "me-4711-triton"
    plant(planted)
    if planted.is_dir():
        (planted / "kernel.so").write_text("planted")

    done, _ = run_job(out.strip(), env={"USER": "me", "SLURM_JOB_ID": "4711"})

    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernel.so" not in (run_dir / "seen").read_text()
    where = (run_dir / "where").read_text().strip()
    assert (where == str(planted)) == (not os.path.lexists(planted))
    assert not os.path.exists(where), "the last task takes it away"
    assert (run_dir / "kept").is_dir()


def test_the_folder_of_a_tokenization_that_another_made_is_refused(run_dir, hpctrain):
    from tokenize_help import dialogues, model_path, write_jsonl

    data = write_jsonl(run_dir / "data.jsonl", dialogues(3))
    (run_dir / "out.tokenize/logs").mkdir(parents=True)
    (run_dir / "out.tokenize").chmod(0o777)
    words = ["tokenize", data, "--tokenizer", model_path("bpe_nmt_nfkc"), "--local"]

    done = hpctrain(*words, "--output-prefix", run_dir / "out", cwd=run_dir)

    assert (done.returncode, "is not used" in done.stderr) == (4, True), done.stderr
    assert not (run_dir / "out.bin").exists()


def test_what_tasks_unpickle_lies_where_nobody_else_can_enter(run_dir, hpctrain, tmp_path):
    from tokenize_help import dialogues, model_path, write_jsonl

    data = write_jsonl(run_dir / "data.jsonl", dialogues(300))
    words = ["tokenize", data, "--tokenizer", model_path("bpe_nmt_nfkc"), "--tasks", "2"]
    words += ["--local", "--processes", "2", "--keep-shards"]

    assert hpctrain(*words, "--output-prefix", run_dir / "a", cwd=run_dir).returncode == 0
    assert (run_dir / "a.tokenize/logs").stat().st_mode & 0o777 == 0o700

    run_dir.chmod(0o777)  # a project's folder: the shards may lie there, the pickles not
    assert hpctrain(*words, "--output-prefix", run_dir / "b", cwd=run_dir).returncode == 0
    assert not list((run_dir / "b.tokenize").rglob("*.pkl"))
    assert not (run_dir / "b.tokenize/logs").exists()


@needs_others
def test_of_a_checkpoint_that_may_be_anothers_nothing_is_run(tmp_path, cli, plant):
    torch = needed("torch")
    needed("deepspeed")
    folder = tmp_path / "ck/global_step5"
    folder.mkdir(parents=True)
    (folder / "hpctrain.json").write_text(
        '{"run_id": "x", "iteration": 5, "consumed_samples": 1, "num_ranks": 1, "zero_stage": 0,'
        ' "precision": "fp32", "data_fingerprint": "", "config": {}}'
    )
    (folder / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads":'
        ' 1, "num_hidden_layers": 1, "vocab_size": 8, "num_key_value_heads": 1}'
    )
    evil = {"module": {}, "x": Evil(str(tmp_path / "ran"))}
    torch.save(evil, folder / "mp_rank_00_model_states.pt")
    (tmp_path / "ck/latest").write_text("global_step5")
    plant(folder)

    code, _, err = cli("export", tmp_path / "ck", "-o", tmp_path / "model")

    assert not (tmp_path / "ran").exists()
    assert (code, "this checkpoint, which names code to run, is not used" in err) == (4, True), err


def test_an_index_of_shards_that_names_code_runs_nothing(tmp_path):
    dpo = needed("hpctrain.train.dpo.checkpoint")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))

    with pytest.raises(pickle.UnpicklingError, match="which is not read"):
        dpo._Reader(str(tmp_path)).read_metadata()
    assert not (tmp_path / "ran").exists()


def test_no_program_is_started_from_a_cache_that_others_write(run_dir, tmp_path):
    """Whose it is was asked only after the loader that its programs name had been started."""
    from hpctrain.base.errors import Refused
    from hpctrain.sandbox import packages

    planted = tmp_path / "cache/hpctrain/slurm-99-amd64"
    (planted / "usr/bin").mkdir(parents=True)
    (planted / "hpctrain-manifest.json").write_text('{"files": {}, "packages": {}}')
    (tmp_path / "cache").chmod(0o777)

    with pytest.raises(Refused, match="anybody may write"):
        packages.find({"XDG_CACHE_HOME": str(tmp_path / "cache")}, source="unpacked")


@pytest.fixture
def rendered(run_dir, cli, monkeypatch):
    """Render run.yaml with more lines in it; the job script's path."""
    monkeypatch.chdir(run_dir)

    def render(more="", umask=0o022):
        (run_dir / "run.yaml").write_text(
            RUN.replace("time: 10m\n", f"time: 10m\nnodes: 1\n{more}")
        )
        old = os.umask(umask)
        try:
            code, out, err = cli("render", "--force", "--no-check")
        finally:
            os.umask(old)
        assert code == 0, err
        return out.strip()

    return render


def test_nobody_else_may_write_what_a_job_runs_whatever_the_umask(rendered, run_dir):
    (run_dir / "runs").mkdir()
    (run_dir / "runs").chmod(0o2777)
    rendered(umask=0)
    rendered("account: p\n", umask=0)  # again, over it

    paths = [run_dir / "runs/r", *(run_dir / "runs/r").rglob("*")]
    assert [path for path in paths if path.stat().st_mode & 0o022] == []
    assert all(path.stat().st_mode & 0o2000 for path in paths if path.is_dir())
    assert (run_dir / "runs/r/logs").stat().st_mode & 0o777 == 0o755


def test_a_umask_of_077_is_obeyed_by_every_file(rendered, run_dir):
    rendered(umask=0o077)
    assert [path for path in (run_dir / "runs/r").rglob("*") if path.stat().st_mode & 0o077] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda runtime: (runtime / "link.py").write_text("open('ran', 'w')\n"),
        lambda runtime: (runtime / "argparse.py").write_text("open('ran', 'w')\n"),
        lambda runtime: (runtime / "link.py").unlink(),
        lambda runtime: ((runtime / "link.py").unlink(), os.mkfifo(runtime / "link.py")),
    ],
    ids=["changed", "a module that shadows another", "gone", "a pipe"],
)
def test_a_job_runs_the_code_that_it_was_rendered_with_or_none(rendered, run_dir, run_job, change):
    job = rendered()
    runtime = run_dir / "runs/r/runtime"
    change(runtime)

    done, noted = run_job(job)

    assert not list(run_dir.parent.rglob("ran"))
    if (runtime / "argparse.py").exists():
        assert done.returncode == 0, done.stderr
    else:
        assert (done.returncode, noted) == (93, [])
        assert "is not what it was when this script was rendered" in done.stderr


def test_check_refuses_secrets_where_somebody_else_could_change_the_job(rendered, run_dir, cli):
    (run_dir / "s.env").write_text("TOKEN=1\n")
    (run_dir / "s.env").chmod(0o600)
    rendered("secrets: s.env\n")
    assert "could change" not in "".join(cli("check")[1:])
    run_dir.chmod(0o777)

    code, out, err = cli("check")
    assert (code, "error: " + str(run_dir / "runs/r") in out + err) == (1, True), out + err
    rendered()
    code, out, err = cli("check")
    assert f"warning: {run_dir}/runs/r: somebody else could change" in out + err


VALUES = {
    "A": "half1;half2",
    "B": "ab$NOTHING",
    "C": "a&b",
    "D": "two words  ",
    "E": "`date` $(date)",
    "F": '"it\'s"',
    "G": "a=b#c",
    "H": "\\n\\",
    "I": "",
    "J": "ünïcode\udcff",
}


def test_a_secret_is_read_as_it_stands_and_never_shown(rendered, run_dir, run_job, tmp_path):
    text = "# comment\n\n" + "".join(f"{key}={value}\n" for key, value in VALUES.items())
    (run_dir / "s.env").write_bytes(
        (text + "export LAST=no newline").encode("utf8", "surrogateescape")
    )
    (run_dir / "s.env").chmod(0o600)
    job = rendered("secrets: s.env\n")
    script = Path(job)
    script.write_text(
        script.read_text().replace("  hostname\n", f"  bash -c 'env -0 >{tmp_path}/env'\n")
    )

    done, _ = run_job(job)

    assert done.returncode == 0, done.stderr
    raw = (tmp_path / "env").read_bytes().decode("utf8", "surrogateescape")
    seen = dict(pair.split("=", 1) for pair in raw.split("\0") if pair)
    assert {key: seen.get(key) for key in VALUES} == VALUES
    assert seen["LAST"] == "no newline"
    assert not any(
        value in done.stdout + done.stderr for value in VALUES.values() if len(value) > 3
    )


def test_a_line_that_is_no_secret_stops_the_job_and_is_not_shown(rendered, run_dir, run_job):
    (run_dir / "s.env").write_text("A=1\nPRIVATE half\n")
    (run_dir / "s.env").chmod(0o600)
    done, noted = run_job(rendered("secrets: s.env\n"))
    assert (done.returncode, noted) == (1, [])
    assert "is not KEY=VALUE" in done.stderr and "PRIVATE" not in done.stdout + done.stderr


HEX = "0123456789abcdef0123456789abcdef01234567"
TOKENS = {
    "argv": f"recipe_options: {{argv: [python, t.py, --wandb_api_key, {HEX}]}}",
    "one word": f"recipe_options: {{argv: [python, t.py, --wandb-key={HEX}]}}",
    "hf": "recipe_options: {argv: [t, --hf_token=hf_abcdefghijklmnopqrstuvwxyzABCDEFGH]}",
    "url": 'recipe_options: {argv: [curl, "https://user:pass@host/x"]}',
    "env": "env: {FOO: hf_abcdefghijklmnopqrstuvwxyzABCDEFGH}\nrecipe_options: {argv: [t]}",
    "wandb": f"env: {{WANDB_KEY: {HEX}}}\nrecipe_options: {{argv: [t]}}",
    "pat": "env: {GITHUB_PAT: ghp_abcdefghijklmnopqrstuvwxyz0123456789}\nrecipe_options: {argv: [t]}",
    "pass": "env: {DB_PASS: x}\nrecipe_options: {argv: [t]}",
    "config": "config: {a: {b: [glpat-abcdefghijklmnopqrst]}}\nrecipe_options: {argv: [t]}",
    "sbatch": "sbatch: {comment: sk-abcdefghijklmnopqrstuvwxyz}\nrecipe_options: {argv: [t]}",
}
NO_TOKENS = {
    "commit": f"recipe_options: {{argv: [t, --tokenizer_revision, {HEX}]}}",
    "path": "env: {GOOGLE_APPLICATION_CREDENTIALS: /home/me/key.json}\nrecipe_options: {argv: [t]}",
    "url": 'recipe_options: {argv: [t, "https://host:8080/x@y", "https://u:$P@h", "a:b@c"]}',
    "words": "config: {pad_token: '<pad>', tokens: 3, key: abcdef}\nrecipe_options: {argv: [t, sk-y]}",
}


@pytest.mark.parametrize("more", [*TOKENS, *NO_TOKENS.items()], ids=str)
def test_a_token_anywhere_in_run_yaml_is_refused_and_never_shown(run_dir, cli, monkeypatch, more):
    monkeypatch.chdir(run_dir)
    text = TOKENS[more] if isinstance(more, str) else more[1]
    (run_dir / "run.yaml").write_text(f"name: r\nsite: local\nrecipe: command\ntime: 10m\n{text}\n")

    code, out, err = cli("plan")

    if isinstance(more, str):
        assert code == 2 and "secrets:" in err
        assert "run.yaml:" in err and not any(
            word in out + err for word in ("hf_abc", HEX, "ghp_", "glpat-a", "sk-abc", "user:pass")
        )
    else:
        assert code == 0, err


def test_stop_needs_no_slurm(rendered, run_dir, hpctrain):
    rendered()
    env = {**os.environ, "PATH": "/nowhere"}

    done = hpctrain("stop", "runs/r", cwd=run_dir, env=env)

    assert (run_dir / "runs/r/STOP").exists()
    assert (done.returncode, "STOP` is there" in done.stderr) == (3, True), done.stderr


SUBMITS = """
import sys
from hpctrain.jobs.ledger import only_one
from hpctrain.slurm import commands
with only_one(sys.argv[1]):
    commands.run([sys.argv[2]])
"""


def test_the_submission_lock_is_held_while_an_sbatch_goes_on_without_its_hpctrain(tmp_path):
    """The kernel kills hpctrain alone; its sbatch queues the job all the same, a moment later."""
    from hpctrain.base.errors import Refused
    from hpctrain.jobs.ledger import only_one

    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f"#!/bin/sh\necho $$ >{tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid\nexec sleep 60\n"
    )
    sbatch.chmod(0o755)
    submitter = subprocess.Popen([sys.executable, "-c", SUBMITS, str(tmp_path), str(sbatch)])
    until(lambda: (tmp_path / "pid").exists())
    submitter.kill()
    submitter.wait()

    with pytest.raises(Refused, match="another hpctrain is submitting"), only_one(str(tmp_path)):
        pass

    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    until(lambda: free(tmp_path))


def free(run_dir):
    from hpctrain.base.errors import Refused
    from hpctrain.jobs.ledger import only_one

    try:
        with only_one(str(run_dir)):
            return True
    except Refused:
        return False


def until(happens, time_s=30):
    end = time.monotonic() + time_s
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def half_render(run_dir):
    """As a `render --force` that was killed between two renames leaves it."""
    commit = run_dir / "runs/r/.render-commit"
    commit.mkdir(mode=0o755)
    plan = run_dir / "runs/r/plan.json"
    (commit / "plan.json").write_text(
        plan.read_text().replace('"run": "r"', '"run": "r", "new": 1')
    )
    return commit, plan


def test_a_half_committed_rendering_is_completed_before_a_job_runs(rendered, run_dir, run_job):
    job = rendered()
    commit, plan = half_render(run_dir)

    done, _ = run_job(job)

    assert (done.returncode, '"new": 1' in plan.read_text()) == (0, True), done.stderr
    assert not commit.exists()


@needs_others
def test_a_half_committed_rendering_that_may_be_anothers_stops_the_job(
    rendered, run_dir, run_job, cli, plant
):
    job = rendered()
    commit, plan = half_render(run_dir)
    plant(commit)

    done, noted = run_job(job)

    assert (done.returncode, noted, '"new": 1' in plan.read_text()) == (1, [], False)
    assert "somebody else may have made it" in done.stderr
    assert cli("render", "--force")[0] == 4


def test_ten_thousand_torn_checkpoints_take_the_guard_ten_times_as_long_as_a_thousand(tmp_path):
    """Names alone are counted here: each was compared with all others, 1e8 times."""
    from hpctrain.jobs.checkpoints import settings_of
    from hpctrain.runtime.survey import Survey

    for step in range(300):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}/mp_rank_00_model_states.pt").write_bytes(b"")
    survey = Survey(settings_of(str(tmp_path), "deepspeed"))
    calls = []
    order = type(survey.layout).order
    kind = type(
        "Counting",
        (type(survey.layout),),
        {"order": lambda self, name: calls.append(1) or order(self, name)},
    )
    survey.layout.__class__ = kind

    assert Survey.newest_complete(survey) is None
    assert len(calls) < 300 * 10
    assert survey._one_before("global_step7").endswith("global_step6")
    assert survey._one_before("global_step0") is None


@pytest.mark.parametrize("ends", ["hostname", "false"])
def test_the_copy_of_the_code_serves_to_the_end_of_the_job_and_then_goes(
    rendered, run_dir, run_job, tmp_path, ends
):
    """A variable of its name held the step's exit code once, and no end was recorded."""
    script = Path(rendered())
    script.write_text(script.read_text().replace("  hostname\n", f"  {ends}\n"))
    (tmp_path / "tmp").mkdir()

    done, _ = run_job(script, env={"TMPDIR": str(tmp_path / "tmp")})

    assert done.returncode == int(ends == "false"), done.stderr
    links = (run_dir / "runs/r/links.jsonl").read_text()
    assert f'"exit_code": {done.returncode}' in links and "could not be recorded" not in done.stdout
    assert os.listdir(tmp_path / "tmp") == []
