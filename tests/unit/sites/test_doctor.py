"""doctor: the Python that trains is really started and its packages really imported; pins of all
sources held together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hpctrain.sites.doctor import places
from hpctrain.sites.doctor import python as pythons
from hpctrain.sites.doctor.findings import NOT_SEEN, OK, PROBLEM, WARNING, Finding, score
from hpctrain.sites.doctor.versions import Pin


def results(findings):
    return {(finding.area, finding.name): finding.result for finding in findings}


def test_the_score_counts_what_could_be_seen():
    def of(*kinds):
        return score([Finding("a", "b", kind, "") for kind in kinds])

    assert of(OK, OK, PROBLEM, WARNING) == 62
    assert of(OK, NOT_SEEN) == 100
    assert of(NOT_SEEN) is None


@pytest.fixture
def fake_site(tmp_path):
    """A Python whose packages are ours: a broken flash-attn, a torch that says what it was built
    for."""

    def make(**files):
        for name, text in files.items():
            module, version = name.split("__")
            (tmp_path / f"{module}.py").write_text(text)
            info = tmp_path / f"{module}-{version.replace('_', '.').replace('PLUS', '+')}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion:"
                f" {version.replace('_', '.').replace('PLUS', '+')}\n"
            )
        wrapper = tmp_path / "python with spaces"
        wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" -S "$@"\n')
        wrapper.chmod(0o755)
        return [str(wrapper)]

    return make


TORCH = (
    "class version: cuda='12.4'; hip=None\nclass _C: _GLIBCXX_USE_CXX11_ABI=False\nclass cuda:\n "
    " is_available=staticmethod(lambda: False)\nxpu = cuda\nprint('noise on stdout')\n"
)


def test_a_package_that_is_installed_and_does_not_import_is_found(fake_site):
    python = fake_site(
        torch__2_3_1=TORCH, flash_attn__2_5_8="raise ImportError('x.so: undefined symbol: _ZN3c10')"
    )
    pins = [
        Pin("torch", ">=2.3", "recipe r", "trains"),
        Pin("flash-attn", "", "recipe r", "fast", required=False),
        Pin("deepspeed", "", "recipe r", "shards"),
    ]
    facts, said = pythons.probe(python, pins)
    found = list(
        pythons.judge_python(facts, said, [Pin("python", ">=3.9", "recipe r")], pins, "amd")
    )
    got = results(found)
    assert got["python", "version"] == OK
    assert got["packages", "torch"] == OK
    assert got["packages", "deepspeed"] == PROBLEM
    assert got["imports", "flash-attn"] == WARNING
    assert got["imports", "torch build"] == PROBLEM  # CUDA on AMD GPUs
    assert "another torch" in next(
        f.hint for f in found if f.name == "flash-attn" and f.area == "imports"
    )


BUILDS = {
    "CPU only": "cuda=None; hip=None",
    "CUDA": "cuda='12.4'; hip=None",
    "ROCm": "cuda=None; hip='6.2.41133'",
    "XPU": "cuda=None; hip=None; xpu='20250101'",
}
SITE = """\
name: mysite
title: a machine
docs_url: https://example.org
maintainers: [us]
verified: {{date: "2026-01-01", by: us, evidence: none}}
slurm: {{gpu_request: gres}}
node_types: {{n: {{sockets: 1, cores: 8, threads_per_core: 1, memory_gib: 64, {gpus}}}}}
default_node_type: n
"""


@pytest.mark.parametrize(
    ("gpus", "fits", "named"),
    [
        ("gpus: 4, gpu_vendor: nvidia", {"CUDA"}, "NVIDIA"),
        ("gpus: 4, gpu_vendor: amd, gpu_type: instinct", {"ROCm"}, "AMD"),
        ("gpus: 4, gpu_vendor: intel, gpu_type: max1550", {"XPU"}, "INTEL"),
        ("gpus: 4, gpu_vendor: nvidia, gpu_type: mi300", {"CUDA"}, "NVIDIA"),
        # Of an unknown maker: any GPU build may be right, none at all cannot be.
        ("gpus: 4, gpu_type: mi300", {"CUDA", "ROCm", "XPU"}, "GPUs"),
        ("gpus: 0", set(BUILDS), ""),
    ],
)
@pytest.mark.parametrize("build", BUILDS)
def test_the_profile_says_whose_gpus_torch_must_be_built_for(
    gpus, fits, named, build, tmp_path, fake_site, cli
):
    (python,) = fake_site(torch__2_7_0=TORCH.replace("cuda='12.4'; hip=None", BUILDS[build]))
    (tmp_path / "site.yaml").write_text(SITE.format(gpus=gpus))
    (tmp_path / "run.yaml").write_text(
        "name: x\nsite: ./site.yaml\nrecipe: command\ntime: 10m\nrecipe_options: {argv: ['true']}\n"
    )
    code, out, err = cli("doctor", tmp_path / "run.yaml", "--python", python, "--json")
    (found,) = [item for item in json.loads(out)["findings"] if item["name"] == "torch build"]

    assert found["result"] == (OK if build in fits else PROBLEM), found
    assert build in found["what"] and (build in fits or named in found["what"])
    assert build in fits or code == 1


def test_a_shipped_site_without_a_gpu_type_refuses_a_torch_that_sees_no_gpus(
    tmp_path, fake_site, cli
):
    (python,) = fake_site(torch__2_7_0=TORCH.replace("cuda='12.4'; hip=None", BUILDS["CPU only"]))
    assert cli("init", tmp_path, "--site", "generic-cuda", "--recipe", "hf-sft")[0] == 0
    code, out, _ = cli("doctor", tmp_path / "run.yaml", "--python", python)

    assert code == 1 and "torch is built for CPU only, and the site's GPUs are NVIDIA's" in out


def test_flash_attn_for_another_torch_is_named_by_its_wheels_own_version(fake_site):
    python = fake_site(torch__2_8_0=TORCH, flash_attn__2_5_8PLUScu122torch2_3cxx11abiTRUE="")
    facts, said = pythons.probe(python, [])
    found = [
        f
        for f in pythons.judge_python(facts, said, [], [], "nvidia")
        if f.name == "flash-attn" and f.result == PROBLEM
    ]
    assert len(found) == 1
    assert "torch 2.3" in found[0].what and "cxx11abi" in found[0].what


def test_a_python_that_does_not_start_is_a_finding():
    facts, said = pythons.probe(["/nonexistent/python"], [])
    assert facts is None
    assert results(pythons.judge_python(facts, said, [], [], ""))["python", "starts"] == PROBLEM


def test_lustre_quota():
    text = "     /scratch 48318382080 0 53687091200 - 1999000 0 2000000 -\n"
    got = results(places.judge_quota("scratch", text))
    assert got == {("disk", "scratch quota, space"): OK, ("disk", "scratch quota, files"): PROBLEM}
    assert (
        list(
            places.judge_quota(
                "scratch", "     /home  12*      0       0       -      1       0       0       -\n"
            )
        )
        == []
    )
    assert list(places.judge_quota("x", "Permission denied\n")) == []


def test_the_branch_of_the_working_copy(tmp_path):
    copy = tmp_path / "copy"
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for words in (
        ["init", "-q", "-b", "gad", str(copy)],
        [
            "-C",
            str(copy),
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@b",
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "x",
        ],
    ):
        subprocess.run(["git", *words], check=True, env=env)
    assert results(places.working_copy(str(copy), "gad"))["code", "branch"] == OK
    assert results(places.working_copy(str(copy), "warmup"))["code", "branch"] == PROBLEM
    assert (
        results(places.working_copy(str(tmp_path / "no"), "x"))["code", "working copy"] == NOT_SEEN
    )


def test_a_cache_that_cannot_be_written_is_found_and_nothing_is_left_behind(tmp_path):
    free = tmp_path / "free"
    free.mkdir()
    before = list(tmp_path.rglob("*"))
    environ = {
        "HF_HOME": "/proc/x",
        "TORCH_HOME": str(free / "deep" / "er"),
        "PIP_CACHE_DIR": "/nosuch/x",
    }
    got = results(places.caches(environ))
    assert got["caches", "PIP_CACHE_DIR"] == NOT_SEEN  # the site's, seen from a laptop
    assert got["caches", "HF_HOME"] == PROBLEM
    assert got["caches", "TORCH_HOME"] in (OK, WARNING)
    assert list(tmp_path.rglob("*")) == before


def test_the_command_line(hpctrain, tmp_path):
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "name": "x",
                "site": "local",
                "recipe": "command",
                "recipe_options": {"argv": ["true"]},
                "nodes": 1,
                "time": "10",
            }
        )
    )
    (tmp_path / "requirements.txt").write_text("numpy==0.0.1\n")
    good = hpctrain("doctor", "--json", cwd=tmp_path)
    answer = json.loads(good.stdout)
    assert answer["score"] >= 60 and good.returncode in (0, 1)
    bad = hpctrain("doctor", "-r", "requirements.txt", "--python", sys.executable, cwd=tmp_path)
    assert bad.returncode == 1 and "numpy==0.0.1" in bad.stdout
    assert hpctrain("doctor", "none.yaml", cwd=tmp_path).returncode in (2, 3)


def finding(out, area, name, result=None):
    found = [
        one for one in json.loads(out)["findings"] if (one["area"], one["name"]) == (area, name)
    ]
    found = [one for one in found if result in (None, one["result"])]
    assert len(found) == 1, found
    return found[0]


def test_the_caches_are_those_of_the_run(tmp_path, cli, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "run.yaml").write_text(
        "name: x\nsite: local\nrecipe: command\ntime: 10m\nrecipe_options: {argv: ['true']}\n"
        f"env: {{HF_HOME: {tmp_path}/mine, TORCH_HOME: /nosuch/torch}}\n"
    )
    _, out, _ = cli("doctor", tmp_path / "run.yaml", "--python", sys.executable, "--json")
    assert f"{tmp_path}/mine can be written" in finding(out, "caches", "HF_HOME")["what"]
    assert finding(out, "caches", "TORCH_HOME")["result"] == NOT_SEEN


def test_the_working_copys_own_bounds_and_its_package_count(tmp_path, cli, fake_site):
    """verl of the package index is not GAD's fork, and what its requirements say is looked at."""
    copy = tmp_path / "code" / "verl"
    copy.mkdir(parents=True)
    (copy / "requirements.txt").write_text("transformers<5\nunused==1\n")
    (copy / "pyproject.toml").write_text('[project]\nname = "verl"\nrequires-python = "==2.7.*"\n')
    (python,) = fake_site(verl__0_9_1="", transformers__5_24_0="", vllm__0_33_0="")
    assert cli("init", tmp_path / "r", "--site", "generic-cuda", "--recipe", "verl-gad")[0] == 0
    words = ["--set", f"recipe_options.verl={copy}"]
    code, out, err = cli(
        "doctor", tmp_path / "r" / "run.yaml", *words, "--python", python, "--json"
    )
    assert code == 1, err
    verl = finding(out, "packages", "verl", PROBLEM)
    assert (
        f"trains with {copy}" in verl["what"] and verl["hint"] == f"pip install --no-deps -e {copy}"
    )
    assert (
        f"{copy}/requirements.txt:1 needs <5"
        in finding(out, "packages", "transformers", PROBLEM)["what"]
    )
    assert "needs <=0.8.5" in finding(out, "packages", "vllm", PROBLEM)["what"]
    assert (
        f"{copy}/pyproject.toml needs ==2.7.*" in finding(out, "python", "version", PROBLEM)["what"]
    )
    assert "unused" not in out
