"""The guard's command line, for the job script and for a person on a compute node.

python3 runtime/__main__.py begin --run-dir DIR [--link N]        prints NAME='value' lines for the job script to eval
python3 runtime/__main__.py end --run-dir DIR --exit-code N       records the end of the link and releases its lock
python3 runtime/__main__.py preflight --run-dir DIR --out DIR --exit-code N   judges what preflight.py measured; 94: do not train
python3 runtime/__main__.py made --run-dir DIR --link N           prints the checkpoint that link N made; 1 if it made none
python3 runtime/__main__.py watch --run-dir DIR                   waits for STOP and then for the next complete checkpoint
python3 runtime/__main__.py list --run-dir DIR                    the checkpoints, complete or not, and what comes next
python3 runtime/__main__.py verify --layout L CHECKPOINT...       whether checkpoints are complete; 1 if one is not
"""

import argparse
import importlib
import importlib.util
import os
import sys
import traceback
from typing import Any, List, Optional


def _package() -> Any:
    """This folder as a package, under a name that nothing on the batch host can shadow."""
    if __package__:
        return importlib.import_module(__package__)
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    spec = importlib.util.spec_from_file_location(
        "hpctrain_runtime", os.path.join(here, "__init__.py"), submodule_search_locations=[here]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["hpctrain_runtime"] = module
    spec.loader.exec_module(module)
    return module


def _write(stream: Any, text: str) -> None:
    """The bytes of `text` whatever the locale: file names come from the file system as they are."""
    stream.flush()
    stream.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")
    stream.flush()


def say(text: str) -> None:
    for line in text.splitlines() or [""]:
        _write(sys.stderr, "hpctrain: " + line)


def quoted(value: str) -> str:
    """A value as one word of shell."""
    return "'" + value.replace("'", "'\"'\"'") + "'"


def main(argv: Optional[List[str]] = None) -> int:
    name = _package().__name__
    link = importlib.import_module(name + ".link")
    parser = argparse.ArgumentParser(prog="runtime", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    for verb in ("begin", "end", "preflight", "made", "watch", "list"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--run-dir", required=True)
        if verb == "preflight":
            sub.add_argument("--out", required=True)
        if verb in ("end", "preflight"):
            sub.add_argument("--exit-code", type=int, required=True)
        if verb == "watch":
            sub.add_argument("--every", type=float, default=20.0, metavar="SECONDS")
        if verb in ("begin", "made"):
            sub.add_argument("--link", type=int, required=verb == "made")
    sub = verbs.add_parser("verify")
    sub.add_argument("--layout", required=True)
    sub.add_argument("checkpoints", nargs="+")
    args = parser.parse_args(argv)
    if not args.verb:
        parser.print_usage(sys.stderr)
        return 2
    try:
        if args.verb == "begin":
            for key, value in sorted(link.begin(os.path.abspath(args.run_dir), args.link, os.environ, say).items()):
                _write(sys.stdout, "{}={}".format(key, quoted(value)))
            return 0
        if args.verb == "end":
            link.end(os.path.abspath(args.run_dir), args.exit_code, os.environ, say)
            return 0
        if args.verb == "preflight":
            nodecheck = importlib.import_module(name + ".nodecheck")
            return int(nodecheck.look(os.path.abspath(args.run_dir), args.out, args.exit_code, os.environ, say))
        if args.verb == "made":
            found = link.made(os.path.abspath(args.run_dir), args.link)
            if found:
                _write(sys.stdout, found)
            return 0 if found else 1
        if args.verb == "watch":
            return 0 if link.watch(os.path.abspath(args.run_dir), args.every) else 1
        if args.verb == "list":
            return _list(name, os.path.abspath(args.run_dir))
        return _verify(name, args.layout, args.checkpoints)
    except link.GuardError as error:
        say("error: {}".format(error))
    except OSError as error:
        say("error: {}: {}".format(error.filename or "file system", error.strerror or error))
    except Exception:
        say("error: the guard failed, so the job does not start:\n" + traceback.format_exc())
    return 1


def _list(name: str, run_dir: str) -> int:
    settings = importlib.import_module(name + ".settings").read_settings(run_dir)
    module = importlib.import_module(name + ".survey")
    survey = module.Survey(settings)
    for found in survey.candidates:
        faults = survey.verdict(found.name).faults
        kind = "start" if found.is_start else "link" if found.is_link else "made"
        _write(
            sys.stdout, "\t".join([found.name, kind, "complete" if not faults else "incomplete: " + "; ".join(faults)])
        )
    choice = module.choose(survey)
    say("a link would start now from {}".format(choice.name or settings.start or "nothing"))
    return 0


def _verify(name: str, layout: str, checkpoints: List[str]) -> int:
    layouts = importlib.import_module(name + ".layouts").LAYOUTS
    if layout not in layouts:
        say("error: `{}` is not one of {}".format(layout, ", ".join(sorted(layouts))))
        return 2
    listing, expected = (
        importlib.import_module(name + ".files").Listing,
        importlib.import_module(name + ".layout").Expected,
    )
    bad = 0
    for path in checkpoints:
        verdict = layouts[layout].verdict(os.path.abspath(path), listing(), expected())
        bad += bool(verdict.faults)
        words = "incomplete: " + "; ".join(verdict.faults) if verdict.faults else "complete"
        _write(
            sys.stdout,
            "\t".join([path, words, "{} files".format(verdict.num_files), "{} bytes".format(verdict.num_bytes)]),
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
