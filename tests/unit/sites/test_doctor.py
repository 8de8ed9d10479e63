"""doctor: the Python that trains is really started and its packages really imported; pins of all sources held together."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from hpctrain.sites.doctor import places
from hpctrain.sites.doctor import python as pythons
from hpctrain.sites.doctor.findings import NOT_SEEN, OK, PROBLEM, WARNING, Finding, score
from hpctrain.sites.doctor.python import Pin


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
    """A Python whose packages are ours: a broken flash-attn, a torch that says what it was built for."""

    def make(**files):
        for name, text in files.items():
            module, version = name.split("__")
            (tmp_path / f"{module}.py").write_text(text)
            info = tmp_path / f"{module}-{version.replace('_', '.').replace('PLUS', '+')}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(
                f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: {version.replace('_', '.').replace('PLUS', '+')}\n"
            )
        wrapper = tmp_path / "python with spaces"
        wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" -S "$@"\n')
        wrapper.chmod(0o755)
        return [str(wrapper)]

    return make


TORCH = "class version: cuda='12.4'; hip=None\nclass _C: _GLIBCXX_USE_CXX11_ABI=False\nclass cuda:\n  is_available=staticmethod(lambda: False)\nxpu = cuda\nprint('noise on stdout')\n"


def test_a_package_that_is_installed_and_does_not_import_is_found(fake_site):
    python = fake_site(torch__2_3_1=TORCH, flash_attn__2_5_8="raise ImportError('x.so: undefined symbol: _ZN3c10')")
    pins = [
        Pin("torch", ">=2.3", "recipe r", "trains"),
        Pin("flash-attn", "", "recipe r", "fast", required=False),
        Pin("deepspeed", "", "recipe r", "shards"),
    ]
    facts, said = pythons.probe(python, pins)
    found = list(pythons.judge_python(facts, said, ">=3.9", pins, "amd"))
    got = results(found)
    assert got["python", "version"] == OK
    assert got["packages", "torch"] == OK
    assert got["packages", "deepspeed"] == PROBLEM
    assert got["imports", "flash-attn"] == WARNING
    assert got["imports", "torch build"] == PROBLEM  # CUDA on AMD GPUs
    assert "another torch" in next(f.hint for f in found if f.name == "flash-attn" and f.area == "imports")


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
def test_the_profile_says_whose_gpus_torch_must_be_built_for(gpus, fits, named, build, tmp_path, fake_site, cli):
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


def test_a_shipped_site_without_a_gpu_type_refuses_a_torch_that_sees_no_gpus(tmp_path, fake_site, cli):
    (python,) = fake_site(torch__2_7_0=TORCH.replace("cuda='12.4'; hip=None", BUILDS["CPU only"]))
    assert cli("init", tmp_path, "--site", "generic-cuda", "--recipe", "hf-sft")[0] == 0
    code, out, _ = cli("doctor", tmp_path / "run.yaml", "--python", python)

    assert code == 1 and "torch is built for CPU only, and the site's GPUs are NVIDIA's" in out


def test_flash_attn_for_another_torch_is_named_by_its_wheels_own_version(fake_site):
    python = fake_site(torch__2_8_0=TORCH, flash_attn__2_5_8PLUScu122torch2_3cxx11abiTRUE="")
    facts, said = pythons.probe(python, [])
    found = [
        f for f in pythons.judge_python(facts, said, "", [], "nvidia") if f.name == "flash-attn" and f.result == PROBLEM
    ]
    assert len(found) == 1
    assert "torch 2.3" in found[0].what and "cxx11abi" in found[0].what


@pytest.mark.parametrize(
    ("one", "other", "contradict"),
    [("==2.3.1", "==2.8.0", True), ("==1.26.4", ">=2", True), ("<2", ">=2", True), (">=1.22", "<2", False), ("==2.3.1", ">=2.3", False),
     ("~=2.3.0", "==2.4.0", True), ("~=2.3", "==2.4.0", False), ("!=2.0", ">=1", False), ("", ">=1", False), ("<2", ">=1.26,<1.27", False)],
)  # fmt: skip
def test_pins_that_cannot_both_be_right_are_named(one, other, contradict):
    found = list(pythons.contradictions([Pin("numpy", one, "a"), Pin("NumPy", other, "b")]))
    assert bool(found) == contradict, found


def test_requirements_files_in_every_style(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text(
        "torch==2.3.1  # pinned\n\n-r other.txt\nnumpy<2 ; python_version > '3'\nx @ https://a/b.whl\nfoo ; python_version < '3'\n???\n"
    )
    pins, other = pythons.read_requirements(str(path))
    assert [(pin.package, pin.versions) for pin in pins] == [("torch", "==2.3.1"), ("numpy", "<2"), ("x", "")]
    assert [where.rsplit(":", 1)[1] for where in other] == ["3", "7"]


def test_a_python_that_does_not_start_is_a_finding():
    facts, said = pythons.probe(["/nonexistent/python"], [])
    assert facts is None
    assert results(pythons.judge_python(facts, said, "", [], ""))["python", "starts"] == PROBLEM


def test_lustre_quota():
    text = "     /scratch 48318382080 0 53687091200 - 1999000 0 2000000 -\n"
    got = results(places.judge_quota("scratch", text))
    assert got == {("disk", "scratch quota, space"): OK, ("disk", "scratch quota, files"): PROBLEM}
    assert (
        list(places.judge_quota("scratch", "     /home  12*      0       0       -      1       0       0       -\n"))
        == []
    )
    assert list(places.judge_quota("x", "Permission denied\n")) == []


def test_the_branch_of_the_working_copy(tmp_path):
    copy = tmp_path / "copy"
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for words in (
        ["init", "-q", "-b", "gad", str(copy)],
        ["-C", str(copy), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", *words], check=True, env=env)
    assert results(places.working_copy(str(copy), "gad"))["code", "branch"] == OK
    assert results(places.working_copy(str(copy), "warmup"))["code", "branch"] == PROBLEM
    assert results(places.working_copy(str(tmp_path / "no"), "x"))["code", "working copy"] == NOT_SEEN


def test_a_cache_that_cannot_be_written_is_found_and_nothing_is_left_behind(tmp_path):
    free = tmp_path / "free"
    free.mkdir()
    before = list(tmp_path.rglob("*"))
    got = results(places.caches({"HF_HOME": "/proc/x", "TORCH_HOME": str(free / "deep" / "er")}))
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
