"""Installed versions against everything that somebody wishes of them, by PEP 440 and PEP 508.
Pure."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from packaging.markers import Marker
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from hpctrain.sites.doctor.findings import NOT_SEEN, OK, PROBLEM, WARNING, Finding

# BEFORE: by its name a pre-release of a version that would fit, and a build of somebody's own.
FITS, MISSES, BEFORE, UNKNOWN = "fits", "misses", "before", "unknown"


@dataclass(frozen=True)
class Pin:
    """One wish about a package: by whom (`source`), which versions (empty: any), and why.

    `marker` says for which Pythons (PEP 508), `extras` which of the package's own are used. `url`
    is where a source takes it from instead of the index, `folder` the working copy it is installed
    from.
    """

    package: str
    versions: str
    source: str
    why: str = ""
    required: bool = True
    marker: str = ""
    extras: tuple[str, ...] = ()
    url: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Installed:
    """What a Python told of its packages; names are canonical.

    `versions`: None where it is not installed. `requires`: the packages' own wishes
    (Requires-Dist). `places`: the folder that a package is imported from. `urls`: where it was
    installed from, for those that are not of an index (PEP 610). `environment`: the values of
    markers.
    """

    versions: Mapping[str, str | None] = field(default_factory=dict)
    requires: Mapping[str, Sequence[str]] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)
    urls: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Installed:
        """From the probe's answer, whatever of it is there."""
        parts = ("packages", "requires", "places", "urls", "environment")
        return cls(*(facts.get(name) or {} for name in parts))

    def applies(self, marker: str, extras: Sequence[str] = ()) -> bool:
        """Whether a marker holds for that Python, with any of these extras or with none."""
        if not marker:
            return True
        return any(
            Marker(marker).evaluate({**self.environment, "extra": extra}) for extra in ("", *extras)
        )


def fits(wanted: str, installed: str) -> str:
    """Whether an installed version is one that is asked for: FITS, MISSES, BEFORE or UNKNOWN."""
    if not wanted:
        return FITS
    try:
        specifiers = SpecifierSet(wanted)
    except InvalidSpecifier:
        return UNKNOWN
    try:
        version = Version(installed)
    except InvalidVersion:
        same = all(one.operator == "===" and one.version == installed for one in specifiers)
        return FITS if same else UNKNOWN
    if specifiers.contains(version, prereleases=True):
        return FITS
    # A container of NVIDIA's has torch 2.6.0a0+…nv25.01, which is 2.6 with later commits.
    own_build = version.is_prerelease and version.local
    return BEFORE if own_build and specifiers.contains(version.base_version) else MISSES


def contradictions(pins: Sequence[Pin]) -> Iterator[Finding]:
    """Packages about which two sources cannot both be right: what one wants the other excludes."""
    for package, wishes in sorted(_by_package([pin for pin in pins if pin.versions]).items()):
        for index, one in enumerate(wishes):
            for other in wishes[index + 1 :]:
                if _exclude_each_other(one.versions, other.versions):
                    wish = (
                        f"{one.source} wants {one.versions}, {other.source} wants {other.versions}"
                    )
                    hint = "decide on one and change the other"
                    yield Finding("packages", package, PROBLEM, f"{wish}: no version is both", hint)


def judge(installed: Installed, pins: Sequence[Pin]) -> Iterator[Finding]:
    """Every wish against what is installed, and what installed packages forbid of each other."""
    wishes = [pin for pin in pins if installed.applies(pin.marker)]
    for name, mine in _by_package(wishes).items():
        version = installed.versions.get(name)
        if version is None:
            yield from _missing(name, mine)
        else:
            yield from (_compared(name, version, pin, mine) for pin in mine)
            yield from _namesakes(name, version, mine, installed)
    yield from _forbidden(installed, wishes)


def _by_package(pins: Sequence[Pin]) -> dict[str, list[Pin]]:
    found: dict[str, list[Pin]] = {}
    for pin in pins:
        found.setdefault(canonicalize_name(pin.package), []).append(pin)
    return found


def _install(name: str, versions: str, pins: Sequence[Pin]) -> str:
    """The command that installs a package as its sources take it."""
    folder = next((pin.folder for pin in pins if pin.folder), "")
    if folder:
        return f"pip install --no-deps -e {folder}"
    return f"pip install '{next((pin.url for pin in pins if pin.url), '') or name + versions}'"


def _missing(name: str, pins: Sequence[Pin]) -> Iterator[Finding]:
    required = [pin for pin in pins if pin.required]
    for pin in required:
        what = f"not installed; {pin.source} needs it{_why(pin)}"
        yield Finding("packages", name, PROBLEM, what, _install(name, pin.versions, pins))
    if not required:
        what = f"not installed; only needed for {pins[0].why or 'some options'}"
        yield Finding("packages", name, NOT_SEEN, what)


def _compared(name: str, version: str, pin: Pin, pins: Sequence[Pin]) -> Finding:
    answer = fits(pin.versions, version)
    wish = f"{pin.source} needs {pin.versions}{_why(pin)}"
    if answer == MISSES:
        what = f"{version} is installed; {wish}"
        return Finding("packages", name, PROBLEM, what, _install(name, pin.versions, pins))
    if answer == BEFORE:
        what = f"{_before(version)}; {wish}"
        return Finding("packages", name, WARNING, what, "see that this build has what that one has")
    if answer == UNKNOWN:
        what = f"{version} is installed, which cannot be compared; {wish}"
        return Finding("packages", name, WARNING, what)
    within = f", within {pin.versions} of {pin.source}" if pin.versions else ""
    return Finding("packages", name, OK, version + within)


def _before(version: str) -> str:
    base = Version(version).base_version
    return f"{version} is installed, which by its name comes before {base}"


def _why(pin: Pin) -> str:
    return f" ({pin.why})" if pin.why else ""


def _namesakes(
    name: str, version: str, pins: Sequence[Pin], installed: Installed
) -> Iterator[Finding]:
    """The installed package is not the one that is meant, but another of its name."""
    for pin in pins:
        place, url = installed.places.get(name, ""), installed.urls.get(name, "")
        if pin.folder and os.path.realpath(pin.folder) != place:
            what = f"{name} {version} is the package of {place or 'nowhere'}"
            what += f", and {pin.source} trains with {pin.folder}"
            yield Finding("packages", name, PROBLEM, what, _install(name, "", [pin]))
        elif pin.url and _plain_url(pin.url) != _plain_url(url):
            what = f"{name} {version} is of {url or 'a package index'}"
            what += f", and {pin.source} takes it from {pin.url}"
            yield Finding("packages", name, WARNING, what, _install(name, "", [pin]))


def _plain_url(url: str) -> str:
    """A repository or file, without the protocol, the revision and the ending that git accepts."""
    plain = re.sub(r"^(git\+)?\w+://([^/@]*@)?", "", url).partition("#")[0]
    return re.sub(r"(\.git)?(@[^/]*)?/?$", "", plain).lower()


def _forbidden(installed: Installed, pins: Sequence[Pin]) -> Iterator[Finding]:
    """What the packages that are used require of each other and is not met."""
    used = _by_package(pins)
    for name, mine in used.items():
        extras = [extra for pin in mine for extra in pin.extras]
        for text in installed.requires.get(name, ()) if installed.versions.get(name) else ():
            wish = _requirement(text)
            other = canonicalize_name(wish.name) if wish else ""
            version = installed.versions.get(other)
            if wish is None or other not in used or version is None:
                continue
            if not installed.applies(str(wish.marker or ""), extras):
                continue
            answer = fits(str(wish.specifier), version)
            needs = f"{name} {installed.versions[name]} needs {wish.specifier}"
            if answer == MISSES:
                level = PROBLEM if any(pin.required for pin in mine) else WARNING
                what = f"{other} {version} is installed; {needs}"
                hint = f"pip install '{other}{wish.specifier}'"
                yield Finding("packages", name, level, what, hint)


def _requirement(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _exclude_each_other(one: str, other: str) -> bool:
    """Whether no version that either names (or one next to it) satisfies both."""
    try:
        both = SpecifierSet(one) & SpecifierSet(other)
    except InvalidSpecifier:
        return False
    named = []
    for specifier in both:
        try:
            named.append(Version(specifier.version.rstrip(".*")))
        except InvalidVersion:
            return False
    nearby = [near for version in named for near in _near(version)]
    return bool(nearby) and not any(both.contains(near, prereleases=True) for near in nearby)


def _near(version: Version) -> list[Version]:
    """The version itself, a little below and above: enough to fall into any interval it bounds."""
    epoch = f"{version.epoch}!" if version.epoch else ""
    release = [*version.release, 0, 0]
    shapes = [[*release[:-1], release[-1] + 1]]
    for index, number in enumerate(version.release):
        shapes.append([*version.release[:index], number + 1])
        if number:
            shapes.append([*version.release[:index], number - 1, 999])
    return [version, *(Version(epoch + ".".join(map(str, shape))) for shape in shapes)]
