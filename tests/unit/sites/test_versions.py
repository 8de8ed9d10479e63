"""Versions by the rules of Python packages (PEP 440, PEP 508), whoever wishes them: recipe, file,
checkout, package.
"""

from __future__ import annotations

import sys

import pytest

from hpctrain.sites.doctor import python as pythons
from hpctrain.sites.doctor.findings import NOT_SEEN, OK, PROBLEM, WARNING
from hpctrain.sites.doctor.versions import BEFORE, FITS, MISSES, UNKNOWN, Pin, contradictions, fits
from hpctrain.sites.doctor.wishes import read_checkout, read_requirements


@pytest.mark.parametrize(
    ("wanted", "installed", "answer"),
    [
        ("", "anything at all", FITS),
        (">=2.3", "2.3.1", FITS),
        (">=2.3", "2.2.9", MISSES),
        # A local version: the build. Unasked for it does not count, asked for it must be that one.
        ("==2.3.1", "2.3.1+cu121", FITS),
        ("==2.3.1+cu121", "2.3.1+cu121", FITS),
        ("==2.3.1+cu121", "2.3.1", MISSES),
        ("==2.3.1+cu121", "2.3.1+cu118", MISSES),
        (">=2.3.1", "2.3.1+cpu", FITS),
        ("!=2.3.1", "2.3.1+cpu", MISSES),
        # Post-releases are later than what they repair, and another version.
        ("==0.0.32.post2", "0.0.32.post2", FITS),
        ("==0.0.32", "0.0.32.post2", MISSES),
        (">=0.0.32", "0.0.32.post2", FITS),
        (">0.0.32", "0.0.32.post2", MISSES),
        ("<=0.0.32", "0.0.32.post2", MISSES),
        # Pre-releases are before their release.
        (">=2.0.0", "2.0.0rc1", MISSES),
        ("<2.0.0", "2.0.0rc1", MISSES),
        (">=2.0.0rc1", "2.0.0rc1", FITS),
        (">=1.9", "2.0.0rc1", FITS),
        (">=2.0", "2.0.dev3", MISSES),
        # What makers of hardware build from a release's last commits calls itself one before it.
        (">=2.6", "2.6.0a0+ecf3bae40a.nv25.01", BEFORE),
        (">=2.6", "2.5.0a0+ecf3bae40a.nv24.10", MISSES),
        (">=2.6,<3", "2.6.0.dev20241122+rocm6.2", BEFORE),
        ("~=5.24", "5.30", FITS),
        ("~=5.24", "6.0", MISSES),
        ("==1.16.*", "1.16.2", FITS),
        ("==1.16.*", "1.17", MISSES),
        ("===1.0-custom", "1.0-custom", FITS),
        (">=1.0", "1.0-custom", UNKNOWN),
        ("not a specifier", "1.0", UNKNOWN),
        (">=1!1.0", "2.0", MISSES),
    ],
)
def test_whether_an_installed_version_is_one_that_is_asked_for(wanted, installed, answer):
    assert fits(wanted, installed) == answer


@pytest.mark.parametrize(
    ("one", "other", "contradict"),
    [
        ("==2.3.1", "==2.8.0", True),
        ("==1.26.4", ">=2", True),
        ("<2", ">=2", True),
        (">=1.22", "<2", False),
        ("==2.3.1", ">=2.3", False),
        ("~=2.3.0", "==2.4.0", True),
        ("~=2.3", "==2.4.0", False),
        ("!=2.0", ">=1", False),
        ("", ">=1", False),
        ("<2", ">=1.26,<1.27", False),
        ("==2.3.1+cu121", "==2.3.1", False),
        ("==2.3.1+cu121", "==2.3.1+cu118", True),
        ("==2.3.1+cu121", "<2.3.1", True),
        ("==0.0.32.post2", "==0.0.32", True),
        ("==0.0.32.post2", ">=0.0.32", False),
        ("==2.0.0rc1", "<2", True),
        ("==2.0.0rc1", ">=1.9", False),
        ("===1.0-custom", ">=1", False),
        ("==1!2.0", ">=1!1", False),
    ],
)
def test_wishes_that_cannot_both_be_met(one, other, contradict):
    found = list(contradictions([Pin("numpy", one, "a"), Pin("NumPy", other, "b")]))
    assert bool(found) == contradict, found


def test_requirements_files_in_every_style(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "base.txt").write_text("deep==1\n-r ../top.txt\n")
    path = tmp_path / "top.txt"
    path.write_text(
        "--index-url https://download.pytorch.org/whl/cu121\n"
        "torch==2.3.1+cu121  # pinned\n"
        "\n"
        "flash-attn==2.5.8 --no-build-isolation\n"
        "safe==1 \\\n"
        "  --hash=sha256:abc --hash=sha256:def\n"
        "-r more/base.txt\n"
        "-cmore/nowhere.txt\n"
        "git+https://github.com/a/b.git@2024.7\n"
        "x @ https://a/b.whl\n"
        "???\n"
    )
    pins, other = read_requirements(str(path))
    assert [(pin.package, pin.versions) for pin in pins] == [
        ("torch", "==2.3.1+cu121"),
        ("flash-attn", "==2.5.8"),
        ("safe", "==1"),
        ("deep", "==1"),
        ("x", ""),
    ]
    assert [pin.source.rsplit("/", 1)[1] for pin in pins] == [
        "top.txt:2",
        "top.txt:4",
        "top.txt:5",
        "base.txt:1",
        "top.txt:10",
    ]
    assert [what.replace(str(tmp_path), "") for what in other] == [
        "/more/nowhere.txt, named at /top.txt:8, is not there",
        "/top.txt:9 names no package",
        "/top.txt:11 is no requirement",
    ]
    assert pins[-1].url == "https://a/b.whl"


def test_a_git_requirement_with_an_egg_names_its_package(tmp_path):
    path = tmp_path / "r.txt"
    path.write_text("git+https://github.com/EleutherAI/DeeperSpeed.git@b9260436#egg=deepspeed\n")
    (pin,), other = read_requirements(str(path))
    assert (pin.package, pin.url, other) == (
        "deepspeed",
        "git+https://github.com/EleutherAI/DeeperSpeed.git@b9260436",
        [],
    )


PYPROJECT = """\
[project]
name = "open-instruct"
requires-python = "==3.12.*"
dependencies = ["transformers>=5.4.0", "torch>=2.10.0; sys_platform == 'linux'", "vllm==0.18", "numpy>=2; python_version < '3'"]
[tool.uv.sources]
flash-attn = { git = "https://example.org/flash-attn" }
"""


def test_a_checkout_tells_its_own_bounds_of_what_the_recipe_uses(tmp_path):
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "requirements.txt").write_text("deepspeed==0.16\nother==1\n")
    names = ["transformers", "torch", "numpy", "deepspeed"]
    files = ["pyproject.toml", "requirements/requirements.txt", "nosuch.txt"]
    checkout = read_checkout(str(tmp_path), files, names)
    assert checkout.python == "==3.12.*"
    assert [(pin.package, pin.versions, pin.required) for pin in checkout.pins] == [
        ("transformers", ">=5.4.0", False),
        ("torch", ">=2.10.0", False),
        ("numpy", ">=2", False),
        ("deepspeed", "==0.16", False),
    ]
    assert checkout.pins[0].source == f"{tmp_path}/pyproject.toml"
    assert checkout.other == []


@pytest.mark.parametrize(
    "text", ["not toml [", "[project]\ndependencies = 5\n", "[project]\n", "project = 3\n"]
)
def test_a_checkout_that_tells_nothing_is_no_error(tmp_path, text):
    (tmp_path / "pyproject.toml").write_text(text)
    checkout = read_checkout(str(tmp_path), ["pyproject.toml"], ["torch"])
    assert checkout.pins == [] and checkout.python == ""
    assert read_checkout(str(tmp_path / "nowhere"), ["pyproject.toml"], ["torch"]).pins == []


@pytest.fixture
def environment(tmp_path):
    """A Python with these packages: name -> version, what it requires, and where its module
    lies."""

    def make(packages, requires=(), modules=None, direct=None):
        site = tmp_path / "site"
        for name, version in packages.items():
            info = site / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir(parents=True)
            lines = [f"Requires-Dist: {wish}" for wish in dict(requires).get(name, [])]
            head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            (info / "METADATA").write_text("\n".join([*head, *lines, ""]))
            if name in (direct or {}):
                (info / "direct_url.json").write_text(direct[name])
            folder = (modules or {}).get(name, site) / name.replace("-", "_")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").write_text("")
        paths = [str(site), *map(str, (modules or {}).values())]
        wrapper = tmp_path / "python"
        wrapper.write_text(
            f'#!/bin/sh\nPYTHONPATH="{":".join(paths)}" exec "{sys.executable}" -S "$@"\n'
        )
        wrapper.chmod(0o755)
        return str(wrapper)

    return make


def examined(python, pins):
    facts, said = pythons.probe([python], pins)
    return list(pythons.judge_python(facts, said, [], pins, None))


def rows(findings, area="packages"):
    return {(one.name, one.result): one.what for one in findings if one.area == area}


def test_what_an_installed_package_forbids_of_another_is_found(environment):
    """Unsloth's ceilings: an environment that satisfies the recipe, and not one of its packages."""
    packages = {"unsloth": "2026.10.9", "trl": "1.16.0", "datasets": "5.2.0", "rich": "1"}
    requires = {
        "unsloth": [
            "trl<=1.15.0,>=0.18",
            "datasets<5.0.0; extra == 'huggingface'",
            "Rich>=2",
            "gone>=1",
        ],
        "trl": ["datasets>=3", "rich<2; python_version < '3'"],
    }
    pins = [
        Pin("unsloth", "", "recipe r", "engine", required=False),
        Pin("trl", ">=0.9", "recipe r", "trains"),
    ]
    found = rows(examined(environment(packages, requires), pins))
    assert (
        "trl 1.16.0 is installed; unsloth 2026.10.9 needs <=1.15.0,>=0.18"
        in found["unsloth", WARNING]
    )
    assert not any(
        "datasets" in what or "rich" in what or "gone" in what for what in found.values()
    )


def test_what_a_required_package_forbids_is_a_problem(environment):
    packages = {"trl": "1.16.0", "transformers": "5.24.0"}
    pins = [Pin("trl", "", "recipe r", "trains"), Pin("transformers", "", "recipe r", "models")]
    python = environment(packages, {"trl": ["transformers<5.20"]})
    (finding,) = [one for one in examined(python, pins) if one.result == PROBLEM]
    assert (
        finding.name == "trl"
        and "transformers 5.24.0 is installed; trl 1.16.0 needs <5.20" in finding.what
    )
    assert finding.hint == "pip install 'transformers<5.20'"


def test_the_wishes_of_an_extra_count_where_the_recipe_uses_it(environment):
    packages = {"verl": "0.4.1", "vllm": "0.33.0"}
    python = environment(packages, {"verl": ["vllm<=0.8.5; extra == 'vllm'"]})
    pins = [
        Pin("verl", "", "recipe r", "trains", extras=("vllm",)),
        Pin("vllm", "", "recipe r", "generates"),
    ]
    found = [one for one in examined(python, pins) if one.result == PROBLEM]
    assert [one.name for one in found] == ["verl"] and "needs <=0.8.5" in found[0].what
    without = [Pin("verl", "", "recipe r", "trains"), pins[1]]
    assert [one for one in examined(python, without) if one.result == PROBLEM] == []


def test_a_build_of_a_hardware_maker_is_told_and_not_refused(environment):
    python = environment(
        {"torch-like": "2.6.0a0+nv25.01", "user": "1"}, {"user": ["torch-like>=2.6"]}
    )
    pins = [
        Pin("torch-like", ">=2.6", "recipe r", "trains"),
        Pin("user", "", "recipe r", "uses it"),
    ]
    found = examined(python, pins)
    assert not [one for one in found if one.result == PROBLEM]
    (finding,) = [one for one in found if one.result == WARNING]
    assert "2.6.0a0+nv25.01 is installed, which by its name comes before 2.6.0" in finding.what


def test_a_wish_for_other_pythons_is_none_for_the_one_that_trains(environment, tmp_path):
    """By the Python that is examined, not by the one that examines."""
    (tmp_path / "r.txt").write_text("a==2 ; python_version < '3'\nb==2 ; python_version > '3'\n")
    pins, _ = read_requirements(str(tmp_path / "r.txt"))
    found = rows(examined(environment({"a": "1", "b": "1"}), pins))
    assert ("b", PROBLEM) in found and not any(name == "a" for name, _ in found)


def test_a_package_of_a_working_copy_is_not_its_namesake(environment, tmp_path):
    copy = tmp_path / "code" / "verl"
    pin = Pin("verl", "", "recipe verl-gad", "trains: the GAD fork", folder=str(copy))
    (missing,) = [one for one in examined(environment({}), [pin]) if one.name == "verl"]
    assert missing.result == PROBLEM and missing.hint == f"pip install --no-deps -e {copy}"
    namesake = environment({"verl": "0.9.1"})
    found = [one for one in examined(namesake, [pin]) if one.name == "verl"]
    (finding,) = [one for one in found if one.result == PROBLEM]
    assert (
        f"verl 0.9.1 is the package of {tmp_path / 'site'}, and recipe verl-gad trains with {copy}"
        in finding.what
    )
    assert finding.hint == f"pip install --no-deps -e {copy}"


def test_a_package_of_a_working_copy_is_good_where_it_is_imported_from_there(environment, tmp_path):
    copy = tmp_path / "code" / "verl"
    python = environment({"verl": "0.4.1"}, modules={"verl": copy})
    pin = Pin("verl", "", "recipe verl-gad", "trains", folder=str(copy))
    assert [one.result for one in examined(python, [pin]) if one.name == "verl"] == [OK]


def test_where_a_checkout_takes_a_fork_its_namesake_is_told(environment):
    url = "git+https://github.com/EleutherAI/DeeperSpeed.git@b926"
    pin = Pin("deepspeed", "", "/neox/requirements.txt:3", url=url, required=False)
    (missing,) = [one for one in examined(environment({}), [pin]) if one.name == "deepspeed"]
    assert missing.result == NOT_SEEN
    required = [Pin("deepspeed", "", "recipe r", "trains"), pin]
    found = [one for one in examined(environment({}), required) if one.result == PROBLEM]
    assert [one.hint for one in found] == [f"pip install '{url}'"]
    index = [
        one
        for one in examined(environment({"deepspeed": "0.19"}), required)
        if one.result == WARNING
    ]
    assert (
        "deepspeed 0.19 is of a package index, and /neox/requirements.txt:3 takes it from"
        in index[0].what
    )


def test_where_a_fork_is_installed_it_is_good(environment):
    url = "git+https://github.com/EleutherAI/DeeperSpeed.git@b926"
    direct = {
        "deepspeed": (
            '{"url": "https://github.com/EleutherAI/DeeperSpeed.git", "vcs_info": {"vcs": "git"}}'
        )
    }
    python = environment({"deepspeed": "0.19"}, direct=direct)
    pin = Pin("deepspeed", "", "/neox/requirements.txt:3", url=url, required=False)
    found = [
        one.result
        for one in examined(python, [pin])
        if (one.area, one.name) == ("packages", "deepspeed")
    ]
    assert found == [OK]


def test_the_pins_of_the_published_guide_are_right_where_they_are_installed(environment, tmp_path):
    pins = {
        "torch": "2.3.1+cu121",
        "xformers": "0.0.32.post2",
        "flash-attn": "2.5.8",
        "trl": "0.9.6",
    }
    (tmp_path / "r.txt").write_text(
        "".join(f"{name}=={version}\n" for name, version in pins.items())
    )
    wishes, other = read_requirements(str(tmp_path / "r.txt"))
    found = examined(environment(pins), wishes)
    assert other == [] and {one.result for one in found if one.area == "packages"} == {OK}
