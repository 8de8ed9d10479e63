"""The script that a rehearsed job finds in place of its program. Pure: the text of a POSIX shell
script.

A step of 1,536 tasks starts it 1,536 times, so it uses nothing but shell builtins: it tells what
the task saw and waits for rank 0, which alone becomes Python. It is found by its name on PATH;
called with other words it is the real program.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

FIELD, END = "\x1f", "\x1e"
# What a task tells about itself. A variable that is not set is left out of the record, an empty one
# is in it.
TOLD = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "LOCAL_WORLD_SIZE",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURMD_NODENAME",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_GPUS",
    "SLURM_JOB_GPUS",
    "ROCR_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "SLURM_CPU_BIND_TYPE",
    "SLURM_CPU_BIND_LIST",
    "SLURM_CPUS_PER_TASK",
    "HPCTRAIN_MODE",
    "HPCTRAIN_LINK",
    "HPCTRAIN_ITERATION",
    "PWD",
    "HPCTRAIN_CONFIG",
    "HPCTRAIN_CHECKPOINT",
    "HPCTRAIN_CHECKPOINT_DIR",
    "SINGULARITY_CONTAINER",
)
# A pipe takes up to 4,096 bytes in one piece (pipe(7), PIPE_BUF); longer paths are told by nobody.
MOST_BYTES = 3900


def script(
    folder: str,
    steps: Sequence[Sequence[str]],
    needed: Sequence[str],
    real: Mapping[str, str],
    python: str,
    saves_on: str = "",
    skipped: Sequence[str] = (),
) -> str:
    """The stand-in's text. `steps`: how the words of the step begin, without the program's name;
    any of them.

    `needed`: paths that every task must see. `real`: {name: the program to become when called with
    other words}. `skipped`: names of scripts that are not run. `python`: the interpreter of rank 0.
    `saves_on`: the signal that every task gets before the time limit, and outlives.
    """
    lines = [
        "#!/bin/sh",
        "# hpctrain rehearse: stands in for the program of the step.",
        f"dir={shlex.quote(folder)}",
        'for word in "$@"; do',
        "  case $word in",
        "    */neox_args.py) mode=neox ;;",
        '    */deepy.py) [ "${mode:-}" ] || { [ "$word" = "$1" ] && mode=deepy; } ;;',
        *(
            f'    */{name}) [ "$word" = "$1" ] || [ "$word" = "$2" ] && mode=skip ;;'
            for name in map(shlex.quote, skipped)
        ),
        "  esac",
        "done",
    ]
    for words in steps:
        tests = [
            f'[ "$#" -ge {len(words)} ]',
            *(f'[ "${{{n}}}" = {shlex.quote(word)} ]' for n, word in enumerate(words, 1)),
        ]
        lines.append(f"if {' && '.join(tests)}; then mode=step; fi")
    lines += [
        'case "${mode:-}" in',
        (
            "  neox) # as templates/neox-sft/neox_args.py prints them: its last three words are the"
            " config, NeoX's folder, its script"
        ),
        '    while [ "$#" -gt 3 ]; do shift; done',
        '    cd "$2" || exit 1',
        '    [ -r "$3" ] || { echo "neox_args.py: there is no $3" >&2; exit 1; }',
        '    code=$(base64 -w0 <"$1") || exit 1',
        '    printf \'%s\\n\' --deepspeed_config "$code" --megatron_config "$code"',
        "    exit 0 ;;",
        f'  deepy) exec {shlex.quote(python)} -I -S "$dir/standin.py" deepy "$dir" "$@" ;;',
        "  step) ;;",
        '  skip) echo "rehearse: not run: $*"; exit 0 ;;',
        "  *)",
        '    case "${0##*/}" in',
        *(
            f'      {shlex.quote(name)}) exec {shlex.quote(path)} "$@" ;;'
            for name, path in real.items()
        ),
        "    esac",
        '    echo "${0##*/}: the rehearsal does not know this program: $*" >&2; exit 127 ;;',
        "esac",
        "event=task",
        *(
            f'[ -e {shlex.quote(path)} ] || unseen="${{unseen:-}}:"{shlex.quote(path)}'
            for path in needed
        ),
        (
            '[ -z "${HPCTRAIN_CONFIG:-}" ] || [ -r "$HPCTRAIN_CONFIG" ] ||'
            ' unseen="${unseen:-}:$HPCTRAIN_CONFIG"'
        ),
        (
            '[ -z "${HPCTRAIN_CHECKPOINT_DIR:-}" ] || [ -w "$HPCTRAIN_CHECKPOINT_DIR" ] ||'
            ' unseen="${unseen:-}:$HPCTRAIN_CHECKPOINT_DIR"'
        ),
        f'record="event=task{FIELD}folder=$dir"',
        *(f'record="$record${{{name}+{FIELD}{name}=${name}}}"' for name in TOLD),
        'record="$record${unseen:+' + FIELD + 'unseen=${unseen#:}}"',
        f'[ "${{#record}}" -le {MOST_BYTES} ] || record="${{record%%{FIELD}PWD=*}}"',
        f'printf \'%s{END}\' "$record" >"$dir/records" || exit 97',
        '{ echo >"$dir/slots"; } 2>/dev/null || :',
        (
            '[ -z "${unseen:-}" ] || { echo "rehearse: this task does not see ${unseen#:}" >&2;'
            " exit 2; }"
        ),
        'if [ "${RANK-${SLURM_PROCID-0}}" = 0 ]; then',
        f'  exec {shlex.quote(python)} -I -S "$dir/standin.py" train "$dir"',
        "fi",
        *([f"trap again=1 {saves_on}"] if saves_on else []),
        # A trapped signal ends `read` as rank 0's end does; only the trap tells them apart.
        'while :; do again=; read -r _ <"$dir/hold"; [ "$again" ] || break; done',
        "exit 0",
    ]
    return "\n".join(lines) + "\n"


def wait_for_slot(folder: str) -> str:
    """Lines for the end of the task prolog: a task of a step takes one of the slots, which the
    stand-in gives back.

    Those that are not given back, as by other programs, are given again by `records.Slots`.
    """
    slots = shlex.quote(f"{folder}/slots")
    return (
        f'case "${{SLURM_STEP_ID:-}}" in [0-9]*) [ ! -p {slots} ] || read -r _ <{slots} ;; esac\n'
    )


def dispatch(name: str, folders: Mapping[str, str], real: str) -> str:
    """Of several runs' stand-ins called `name` the one of the job's own run: `folders` are by run
    directory.

    Every job script exports HPCTRAIN_RUN_DIR in its first lines. Where no run fits, it is the
    program `real`.
    """
    cases = [
        f'  {shlex.quote(run_dir)}) exec {shlex.quote(f"{folder}/bin/{name}")} "$@" ;;'
        for run_dir, folder in folders.items()
    ]
    return "\n".join(
        [
            "#!/bin/sh",
            'case "${HPCTRAIN_RUN_DIR:-}" in',
            *cases,
            "esac",
            f'exec {shlex.quote(real)} "$@"',
            "",
        ]
    )


def bash(instead: Mapping[str, str]) -> str:
    """A `bash` that hands the job's tasks another program: the first word that is a key of
    `instead` becomes its value.

    The script that srun gives it, and everything else, is run by the real bash unchanged.
    """
    cases = "\n".join(
        f"      {shlex.quote(word)}) word={shlex.quote(other)} done=1 ;;"
        for word, other in instead.items()
    )
    return f"""#!/bin/sh
if [ "${{1:-}}" = -c ] && [ "${{3:-}}" = task ]; then
  done=
  for word do
    shift
    [ "$done" ] || case $word in
{cases}
    esac
    set -- "$@" "$word"
  done
fi
exec /bin/bash "$@"
"""
