"""Builds dialogues.jsonl again, byte for byte, from two Debian packages: python3
examples/dialogues/build.py

Needs apt-get (it only downloads) and dpkg-deb. See README.md beside this file for the licence.
"""

from __future__ import annotations

import gettext
import glob
import json
import os
import random
import re
import subprocess
import sys
import tempfile

LANGUAGES = {"lv": "Latvian", "lt": "Lithuanian"}
PACKAGES = {code: f"libreoffice-l10n-{code}" for code in LANGUAGES}
NUM_DIALOGUES = 4000
USER, ASSISTANT = "<<<|user|>>>", "<<<|assistant|>>>"


def main() -> None:
    out = os.path.join(os.path.dirname(os.path.abspath(__file__)), "dialogues.jsonl")
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(
            ["apt-get", "download", "-q", *PACKAGES.values()],
            cwd=work,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        debs = sorted(glob.glob(os.path.join(work, "*.deb")))
        for deb in debs:
            subprocess.run(["dpkg-deb", "-x", deb, os.path.join(work, "x")], check=True)
        pairs = {code: read_pairs(work, code) for code in LANGUAGES}
        names = [os.path.basename(deb) for deb in debs]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in dialogues(pairs)]
    with open(out, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    print(
        f"{len(lines)} dialogues, {os.path.getsize(out)} bytes, from {', '.join(names)}",
        file=sys.stderr,
    )


def read_pairs(work: str, code: str) -> dict[str, str]:
    """English to translation, of short plain messages only."""
    found: dict[str, str] = {}
    for path in sorted(
        glob.glob(os.path.join(work, "x", "**", code, "**", "*.mo"), recursive=True)
    ):
        with open(path, "rb") as file:
            catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        for key, value in sorted(catalogue.items(), key=repr):
            english = plain((key if isinstance(key, str) else key[0]).split("\x04")[-1])
            translated = plain(value)
            if usable(english) and usable(translated) and english != translated:
                found.setdefault(english, translated)
    return found


def plain(text: str) -> str:
    """Without the marks of keyboard shortcuts and the dots of menus."""
    return re.sub(r"[_~]|\(~?_?[A-Z]\)$|\.{3}$|…$", "", text).strip()


def usable(text: str) -> bool:
    return 4 <= len(text) <= 60 and not re.search(r"[%<>$\\\n|{}&#=*\[\]]|\d{2}", text)


def dialogues(pairs: dict[str, dict[str, str]]) -> list[str]:
    """One question in one language, or the same one asked for the other language too."""
    rng = random.Random(7)
    codes = sorted(LANGUAGES)
    both = sorted(set(pairs[codes[0]]) & set(pairs[codes[1]]))
    rng.shuffle(both)
    out = []
    for number, english in enumerate(both[:NUM_DIALOGUES]):
        first, second = codes if rng.random() < 0.5 else reversed(codes)
        turns = [(f"Translate to {LANGUAGES[first]}: {english}", pairs[first][english])]
        if number % 3 == 0:
            turns.append((f"And to {LANGUAGES[second]}?", pairs[second][english]))
        out.append(
            "".join(f"{USER}{user}{USER}{ASSISTANT}{reply}{ASSISTANT}" for user, reply in turns)
        )
    return out


if __name__ == "__main__":
    main()
