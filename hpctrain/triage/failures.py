"""The ways in which a run fails, and what to do next. `patterns` has the lines that tell them."""

from __future__ import annotations

import re
from dataclasses import dataclass

RETRY, EXCLUDE, STOP, CONTINUE, LOOK = "retry", "exclude node", "stop", "continue", "look"


@dataclass(frozen=True)
class Failure:
    """One class of failure. `symptom`: what other ranks say after something else broke, so a root
    outranks it.

    `external`: Slurm or a person ended the job; whatever follows in the log is a consequence.
    """

    name: str
    title: str
    action: str
    advice: str
    symptom: bool = False
    external: bool = False


FAILURES = {
    failure.name: failure
    for failure in (
        Failure(
            "gpu_oom",
            "GPU out of memory",
            STOP,
            "the same job would fail again: lower {micro_batch} or {sequence}, or shard and"
            " recompute more",
        ),
        Failure(
            "host_oom",
            "host out of memory",
            STOP,
            "fewer data loader workers or less offload to the CPU, or more `mem`; `sacct -j JOB -o"
            " MaxRSS` shows how much was used",
        ),
        Failure(
            "disk",
            "disk, quota or /dev/shm full",
            STOP,
            "free space or inodes (`hpctrain doctor` shows the quota), then resubmit; work since"
            " the last complete checkpoint is lost",
        ),
        Failure(
            "gpu_fault",
            "GPU or driver fault",
            RETRY,
            "retry once: a kernel that reads or writes where it must not does it again, mostly at"
            " the same line; a GPU does so on one node only",
        ),
        Failure(
            "filesystem",
            "file system fault",
            RETRY,
            "resubmit when the file system answers again; at most twice",
        ),
        Failure(
            "node",
            "node failure",
            EXCLUDE,
            "Slurm requeues it, or the next link goes on; exclude a node that failed"
            " twice{exclude}",
        ),
        Failure(
            "environment",
            "missing package or library",
            STOP,
            "`hpctrain doctor` compares this environment with the recipe's pins",
        ),
        Failure(
            "config",
            "configuration refused by the framework",
            STOP,
            "correct run.yaml; `hpctrain check` finds most of these before the queue does",
        ),
        Failure(
            "missing_file",
            "file not found or not readable",
            STOP,
            "correct the path in run.yaml, and check that the container binds its folder",
        ),
        Failure(
            "checkpoint",
            "checkpoint does not load",
            STOP,
            "`hpctrain checkpoint verify` names the complete ones, `checkpoint use` picks one",
        ),
        Failure(
            "nonfinite",
            "loss or gradient is not finite",
            STOP,
            "lower {lr} or lengthen the warmup, look at the data of that step, and go back to a"
            " checkpoint from before it",
        ),
        Failure(
            "program",
            "the program raised an error",
            STOP,
            "the same job would fail again: read the line and the traceback above it",
        ),
        Failure(
            "crash",
            "the program crashed",
            RETRY,
            "retry once; if it crashes at the same place again, it is the program or a library, not"
            " the node",
        ),
        Failure(
            "time_limit",
            "time limit",
            CONTINUE,
            "the next link goes on from the newest complete checkpoint; save more often than once a"
            " link",
            external=True,
        ),
        Failure(
            "preemption",
            "preempted or requeued",
            CONTINUE,
            "Slurm puts it back into the queue; it then resumes",
            external=True,
        ),
        Failure(
            "cancelled",
            "cancelled by a person",
            CONTINUE,
            "resubmit when wanted: the job finds the newest complete checkpoint",
            external=True,
        ),
        Failure(
            "script_killed",
            "the job script itself was killed",
            RETRY,
            "someone or something on its first node killed the job script, not the program: a"
            " person, the kernel's out-of-memory killer, or a clean-up of that node; `sacct -j JOB"
            " -o State,ExitCode,MaxRSS`; the next link goes on from the newest complete checkpoint",
            external=True,
        ),
        Failure(
            "gave_up",
            "the chain gave up",
            STOP,
            "links ended without a newer checkpoint: find out why before submitting again",
        ),
        Failure(
            "refused",
            "the job script refused to start",
            LOOK,
            "the line says why; nothing was trained and nothing was changed",
        ),
        Failure(
            "cut_off",
            "ended from outside without a word",
            RETRY,
            "its node, Slurm or a `kill -9` ended the job script: `sacct -j JOB -o"
            " State,ExitCode,NodeList` may tell which; the next start goes on from the newest"
            " complete checkpoint",
        ),
        Failure(
            "hang",
            "no step line for too long",
            RETRY,
            "retry; exclude the node that is named again and again; TORCH_NCCL_DUMP_ON_TIMEOUT=1"
            " tells which collective hangs",
        ),
        Failure(
            "communication",
            "NCCL/RCCL or rendezvous failure",
            RETRY,
            "retry, at most twice; a node that others name again and again is to be left"
            " out{exclude}",
            symptom=True,
        ),
        Failure(
            "killed",
            "killed from outside",
            LOOK,
            "an exit by SIGKILL without another message is mostly the kernel's out-of-memory"
            " killer: `sacct -j JOB -o State,MaxRSS`",
            symptom=True,
        ),
        Failure(
            "wrapper",
            "a launcher reports a failed task",
            LOOK,
            "the reason is in the output of the failed task",
            symptom=True,
        ),
        Failure(
            "unknown",
            "ended with an error, reason not in the log",
            LOOK,
            "`sacct -j JOB` and the framework's own logs may tell; then resubmit once",
        ),
    )
}


# Whose fault it most likely is.
PROGRAM, DATA, ENVIRONMENT, NODE_, NETWORK, STORAGE, SITE, SERVICE, NOBODY = (
    "program",
    "data",
    "environment",
    "node",
    "network",
    "file system",
    "site",
    "service of the job",
    "nobody",
)
CERTAIN, LIKELY, UNLIKELY = "certain", "likely", "unlikely"


@dataclass(frozen=True)
class Outlook:
    """What a failure means for the next start: whose it is, whether it will come again there, and
    so what to do. `kind` is finer than the class where its words tell more."""

    kind: str
    whose: str
    recurs: str
    action: str
    advice: str


_WHOSE = {
    "gpu_oom": (PROGRAM, CERTAIN),
    "host_oom": (PROGRAM, LIKELY),
    "disk": (STORAGE, CERTAIN),
    "gpu_fault": (PROGRAM, LIKELY),
    "filesystem": (STORAGE, UNLIKELY),
    "node": (NODE_, LIKELY),
    "environment": (ENVIRONMENT, CERTAIN),
    "config": (PROGRAM, CERTAIN),
    "missing_file": (ENVIRONMENT, CERTAIN),
    "checkpoint": (DATA, CERTAIN),
    "nonfinite": (PROGRAM, LIKELY),
    "program": (PROGRAM, CERTAIN),
    "crash": (PROGRAM, LIKELY),
    "gave_up": (PROGRAM, CERTAIN),
    "refused": (SITE, LIKELY),
    "cut_off": (SITE, UNLIKELY),
    "hang": (NETWORK, LIKELY),
    "communication": (NETWORK, UNLIKELY),
    "killed": (NODE_, LIKELY),
}
# (class, kind, its words, whose, whether it recurs, action, advice)
_KINDS = (
    (
        "gpu_fault",
        "broken GPU",
        r"ECC|NVLink|NVRM|Xid|off the bus|GPU is lost|row.?remap|busy or unavailable|unavailable"
        r"|no (?:CUDA|ROCm)-capable|No (?:CUDA|HIP) GPUs|device handle|999|unknown error"
        r"|initialized|NVIDIA driver|GPU Hang|GPU reset|RAS|poison|hardware|HSA_STATUS"
        r"|Memory access fault|synStatus|EZ9999",
        NODE_,
        LIKELY,
        EXCLUDE,
        "resubmit without that node{exclude}; report it to the site",
    ),
    (
        "nonfinite",
        "suspected silent corruption",
        r"rerun_state_machine|different GPU|transient error",
        NODE_,
        LIKELY,
        RETRY,
        "the framework asks for one more start from its checkpoint on another GPU, to tell a broken"
        " one from the program{exclude}; if it happens there too, it is the program",
    ),
    (
        "node",
        "scheduler does not answer",
        r"Socket timed out|slurm_receive_msg|Unable to contact slurm",
        SITE,
        UNLIKELY,
        RETRY,
        "Slurm was too busy to answer; resubmit",
    ),
    (
        "communication",
        "service is gone",
        r"server|localhost|0\.0\.0\.0|127\.0\.0\.1|url: /|HTTPConnectionPool",
        SERVICE,
        CERTAIN,
        LOOK,
        "a server of the job's own does not answer: was it started, and what does its own log say?",
    ),
    (
        "missing_file",
        "hub refuses",
        r"\b(?:429|5\d\d)\b (?:Client|Server|Too)|Too Many Requests|rate.?limit|[Tt]imed? ?out"
        r"|Max retries|ConnectionError|resol|Couldn't reach|offline",
        SITE,
        LIKELY,
        STOP,
        "compute nodes seldom reach the internet: fill the cache beforehand (`HF_HOME`, then"
        " `HF_HUB_OFFLINE=1`), or try later",
    ),
    (
        "missing_file",
        "hub refuses",
        r"\b40[13]\b|gated|[Uu]nauthorized|[Ff]orbidden|token",
        SITE,
        CERTAIN,
        STOP,
        "a token with access is needed (`HF_TOKEN`), or the files in the cache beforehand",
    ),
    (
        "program",
        "collectives differ",
        r"mismatch between collectives|desync",
        PROGRAM,
        CERTAIN,
        STOP,
        "ranks took different ways through the program: look for a branch on rank or data",
    ),
    (
        "program",
        "data exhausted",
        r"StopIteration|ran out of data|data ?(?:set|loader)? (?:is )?exhausted",
        DATA,
        CERTAIN,
        STOP,
        "the data ended before the training: more of it, or more epochs",
    ),
    (
        "program",
        "limit of processes",
        r"can't start new thread|Resource temporarily unavailable|Too many open files",
        ENVIRONMENT,
        LIKELY,
        STOP,
        "raise `ulimit -u` or `-n`, or start fewer workers",
    ),
    (
        "killed",
        "killed by a monitor",
        r"monitor|heartbeat",
        PROGRAM,
        LIKELY,
        LOOK,
        "a monitor ended it, for it saw no progress: its own lines say which rank was silent",
    ),
)


def outlook(failure: str, text: str, framework: str | None, node: str | None) -> Outlook:
    """Of a cause by its class and line; `node` is the one to blame, where one is known. Nobody is
    told to exclude a node that only reported."""
    whose, recurs = _WHOSE.get(failure, (NOBODY, UNLIKELY))
    known = FAILURES[failure]
    found = Outlook(failure, whose, recurs, known.action, known.advice)
    for name, kind, words, *rest in _KINDS:
        if name == failure and re.search(words, text):
            found = Outlook(kind, *rest)
            break
    advice = found.advice.replace("{exclude}", f": `sbatch: {{exclude: {node}}}`" if node else "")
    for name, setting in knobs(framework).items():
        advice = advice.replace("{" + name + "}", setting)
    return Outlook(found.kind, found.whose, found.recurs, found.action, advice)


KNOBS = {
    "neox": {
        "micro_batch": "`train_micro_batch_size_per_gpu`",
        "sequence": "`seq_length`",
        "lr": "`optimizer.params.lr`",
    },
    "sft": {
        "micro_batch": "`train_micro_batch_size_per_gpu`",
        "sequence": "`seq_length`",
        "lr": "`lr`",
    },
    "open-instruct": {
        "micro_batch": "`per_device_train_batch_size`",
        "sequence": "`max_seq_length`",
        "lr": "`learning_rate`",
    },
    "hf": {
        "micro_batch": "`per_device_train_batch_size`",
        "sequence": "`max_length`",
        "lr": "`learning_rate`",
    },
    "verl": {
        "micro_batch": "`actor_rollout_ref.actor.ppo_max_token_len_per_gpu`",
        "sequence": "`data.max_response_length`",
        "lr": "`actor_rollout_ref.actor.optim.lr`",
    },
    "em-dpo": {"micro_batch": "`batch_size`", "sequence": "`max_length`", "lr": "`lr`"},
    "": {
        "micro_batch": "the micro batch size",
        "sequence": "the sequence length",
        "lr": "the learning rate",
    },
}


def knobs(framework: str | None) -> dict[str, str]:
    """The names of the settings that advice speaks of, as `framework` (or a recipe) spells them."""
    name = (framework or "").lower()
    for start, key in (
        ("neox", "neox"),
        ("megatron", "neox"),
        ("sft", "sft"),
        ("open", "open-instruct"),
        ("verl", "verl"),
        ("gad", "verl"),
        ("hf", "hf"),
        ("trl", "hf"),
        ("unsloth", "hf"),
        ("em", "em-dpo"),
        ("dpo", "em-dpo"),
    ):
        if name.startswith(start):
            return KNOBS[key]
    return KNOBS[""]
