"""The ways in which a run fails, and what to do next. `patterns` has the lines that tell them."""

from __future__ import annotations

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
            EXCLUDE,
            "resubmit without that node: `sbatch: {exclude: NODE}`; report the node to the site",
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
            "Slurm requeues it, or the next link goes on; exclude a node that failed twice:"
            " `sbatch: {exclude: NODE}`",
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
            "retry, at most twice, without the node that is named: `sbatch: {exclude: NODE}`",
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


def advise(failure: Failure, framework: str | None, node: str | None) -> str:
    """The failure's advice with the names that `framework` uses, and the node to exclude where one
    is known."""
    text = failure.advice
    for name, setting in knobs(framework).items():
        text = text.replace("{" + name + "}", setting)
    return text.replace("NODE", node) if node else text


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
