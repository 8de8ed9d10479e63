"""The ways in which a run fails: the lines that tell them, and what to do next.

Each pattern is a literal anchor (at least five bytes, for `scan`) and, where the anchor alone says too little, a regex that
the line must match. Patterns come from Slurm's, PyTorch's, NCCL's and the kernel's own messages.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

RETRY, EXCLUDE, STOP, CONTINUE, LOOK = "retry", "exclude node", "stop", "continue", "look"


@dataclass(frozen=True)
class Failure:
    """One class of failure. `symptom`: what other ranks say after something else broke, so a root outranks it.

    `external`: Slurm or a person ended the job; whatever follows in the log is a consequence.
    """

    name: str
    title: str
    action: str
    advice: str
    symptom: bool = False
    external: bool = False


@dataclass(frozen=True)
class Pattern:
    failure: str
    anchor: bytes
    confirm: re.Pattern[bytes] | None = None
    unless: re.Pattern[bytes] | None = None


FAILURES = {
    failure.name: failure
    for failure in (
        Failure("gpu_oom", "GPU out of memory", STOP, "the same job would fail again: lower {micro_batch} or {sequence}, or shard and recompute more"),
        Failure("host_oom", "host out of memory", STOP, "fewer data loader workers or less offload to the CPU, or more `mem`; `sacct -j JOB -o MaxRSS` shows how much was used"),
        Failure("disk", "disk, quota or /dev/shm full", STOP, "free space or inodes (`hpctrain doctor` shows the quota), then resubmit; work since the last complete checkpoint is lost"),
        Failure("gpu_fault", "GPU or driver fault", EXCLUDE, "resubmit without that node: `sbatch: {exclude: NODE}`; report the node to the site"),
        Failure("filesystem", "file system fault", RETRY, "resubmit when the file system answers again; at most twice"),
        Failure("node", "node failure", EXCLUDE, "Slurm requeues it, or the next link goes on; exclude a node that failed twice: `sbatch: {exclude: NODE}`"),
        Failure("environment", "missing package or library", STOP, "`hpctrain doctor` compares this environment with the recipe's pins"),
        Failure("config", "configuration refused by the framework", STOP, "correct run.yaml; `hpctrain check` finds most of these before the queue does"),
        Failure("missing_file", "file not found or not readable", STOP, "correct the path in run.yaml, and check that the container binds its folder"),
        Failure("checkpoint", "checkpoint does not load", STOP, "`hpctrain checkpoint verify` names the complete ones, `checkpoint use` picks one"),
        Failure("nonfinite", "loss or gradient is not finite", STOP, "lower {lr} or lengthen the warmup, look at the data of that step, and go back to a checkpoint from before it"),
        Failure("program", "the program raised an error", STOP, "the same job would fail again: read the line and the traceback above it"),
        Failure("crash", "the program crashed", RETRY, "retry once; if it crashes at the same place again, it is the program or a library, not the node"),
        Failure("time_limit", "time limit", CONTINUE, "the next link goes on from the newest complete checkpoint; save more often than once a link", external=True),
        Failure("preemption", "preempted or requeued", CONTINUE, "Slurm puts it back into the queue; it then resumes", external=True),
        Failure("cancelled", "cancelled by a person", CONTINUE, "resubmit when wanted: the job finds the newest complete checkpoint", external=True),
        Failure("script_killed", "the job script itself was killed", RETRY, "someone or something on its first node killed the job script, not the program: a person, the kernel's out-of-memory killer, or a clean-up of that node; `sacct -j JOB -o State,ExitCode,MaxRSS`; the next link goes on from the newest complete checkpoint", external=True),
        Failure("gave_up", "the chain gave up", STOP, "links ended without a newer checkpoint: find out why before submitting again"),
        Failure("refused", "the job script refused to start", LOOK, "the line says why; nothing was trained and nothing was changed"),
        Failure("cut_off", "ended from outside without a word", RETRY, "its node, Slurm or a `kill -9` ended the job script: `sacct -j JOB -o State,ExitCode,NodeList` may tell which; the next start goes on from the newest complete checkpoint"),
        Failure("hang", "no step line for too long", RETRY, "retry; exclude the node that is named again and again; TORCH_NCCL_DUMP_ON_TIMEOUT=1 tells which collective hangs"),
        Failure("communication", "NCCL/RCCL or rendezvous failure", RETRY, "retry, at most twice, without the node that is named: `sbatch: {exclude: NODE}`", symptom=True),
        Failure("killed", "killed from outside", LOOK, "an exit by SIGKILL without another message is mostly the kernel's out-of-memory killer: `sacct -j JOB -o State,MaxRSS`", symptom=True),
        Failure("wrapper", "a launcher reports a failed task", LOOK, "the reason is in the output of the failed task", symptom=True),
        Failure("unknown", "ended with an error, reason not in the log", LOOK, "`sacct -j JOB` and the framework's own logs may tell; then resubmit once"),
    )
}  # fmt: skip


def _rx(text: bytes) -> re.Pattern[bytes]:
    return re.compile(text)


# A package's own name in front of an exception, or a rank: `torch.OutOfMemoryError: …`, `[rank3]: ValueError: …`.
_RAISED = _rx(
    rb"^[^A-Za-z]{0,40}(?:\[?(?:rank|default)\s?\d+\]?:?\s*|\([^)]*\)\s*|[\w.-]+:\s?(?=\[?rank)|\d+:\s*){0,3}(?:[a-zA-Z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt)(?::|\s*$)"
)
_QUOTED = _rx(rb"^\s*(?:raise |except |#|\"(?!hipError)|'|>>> )|During handling of|\braise \w[\w.]*\(")

_PATTERNS: tuple[tuple[str, bytes, bytes | None], ...] = (
    ("gpu_oom", b"CUDA out of memory", None),
    ("gpu_oom", b"HIP out of memory", None),
    ("gpu_oom", b"OutOfMemoryError", rb"(?<!ray\.exceptions\.)OutOfMemoryError(?:\s*:|\s*$)"),
    ("gpu_oom", b"CUDA_ERROR_OUT_OF_MEMORY", None),
    ("gpu_oom", b"hipErrorOutOfMemory", None),
    ("gpu_oom", b"CUBLAS_STATUS_ALLOC_FAILED", None),
    ("gpu_oom", b"CUDA error: out of memory", None),
    ("gpu_oom", b"HIP error: out of memory", None),
    ("gpu_oom", b"No available memory for the cache blocks", None),
    ("host_oom", b"oom_kill event", None),
    ("host_oom", b"oom-kill event", None),
    ("host_oom", b"oom-kill:", None),
    ("host_oom", b"Out Of Memory", rb"task|srun|error|slurmstepd"),
    ("host_oom", b"Out of memory: Killed process", None),
    ("host_oom", b"Exceeded job memory limit", None),
    ("host_oom", b"exceeded memory limit", None),
    ("host_oom", b"DefaultCPUAllocator: ", rb"not enough memory|can't allocate memory"),
    ("host_oom", b"Cannot allocate memory", None),
    ("host_oom", b"Unable to allocate ", rb"MemoryError|[KMGT]iB for an array"),
    ("host_oom", b"MemoryError", rb"(?<![\w.])(?:numpy\S*)?MemoryError(?::|\s*$)"),
    ("host_oom", b"std::bad_alloc", None),
    ("host_oom", b"memory allocation of ", rb"memory allocation of \d+ bytes failed"),
    ("host_oom", b"DataLoader worker (pid", rb"killed by signal: Killed|exited unexpectedly"),
    ("host_oom", b"killed due to memory pressure", None),
    ("host_oom", b"running low on memory", rb"due to the node running low on memory"),
    ("host_oom", b"killed by the OOM killer", None),
    ("disk", b"DataLoader worker (pid", rb"Bus error"),
    ("disk", b"No space left on device", None),
    ("disk", b"Disk quota exceeded", None),
    ("disk", b"unable to write shared memory", None),
    ("disk", b"unable to open shared memory", None),
    ("disk", b"unable to mmap ", rb"bytes from file"),
    ("disk", b"PytorchStreamWriter failed", None),
    ("disk", b"insufficient shared memory", None),
    ("gpu_fault", b"NVRM: Xid", None),
    ("gpu_fault", b"Xid (PCI", None),
    ("gpu_fault", b"uncorrectable ECC", None),
    ("gpu_fault", b"Uncorrectable ECC", None),
    ("gpu_fault", b"HSA_STATUS_ERROR", None),
    ("gpu_fault", b"Memory access fault by GPU", None),
    ("gpu_fault", b"an illegal memory access", None),
    ("gpu_fault", b"unspecified launch failure", None),
    ("gpu_fault", b"misaligned address", rb"CUDA|HIP|hip"),
    ("gpu_fault", b"CUDA error: unknown error", None),
    ("gpu_fault", b"HIP error: invalid device", rb"invalid device(?! function)"),
    ("gpu_fault", b"fallen off the bus", None),
    ("gpu_fault", b"No CUDA GPUs are available", None),
    ("gpu_fault", b"No HIP GPUs are available", None),
    ("gpu_fault", b"all CUDA-capable devices are busy", None),
    ("gpu_fault", b"is/are busy or unavailable", None),
    ("gpu_fault", b"GPU Hang", rb"HW Exception|GPU Hang"),
    ("gpu_fault", b"system not yet initialized", rb"802|CUDA"),
    # libfabric says `Input/output error` of a message that was lost.
    ("filesystem", b"Input/output error", rb"^(?!.*(?:OFI poll|MPIDI_|PTLTE))"),
    ("filesystem", b"while accessing SQLite database", None),  # MIOpen's cache, where locks do not work
    ("filesystem", b"Stale file handle", None),
    ("filesystem", b"[Errno 5]", None),
    ("filesystem", b"[Errno 116]", None),
    ("filesystem", b"[Errno 108]", None),
    ("filesystem", b"Cannot send after transport endpoint shutdown", None),
    ("filesystem", b"Transport endpoint is not connected", None),
    ("node", b"hpctrain: preflight: ", rb"preflight: \S+ is bad: "),
    ("node", b"DUE TO NODE FAILURE", None),
    ("node", b"Node failure on ", None),
    ("node", b"NODE_FAIL", None),
    ("node", b"Communication connection failure", None),
    ("node", b"Job/step already completing", rb"[Nn]ode fail"),
    ("node", b"Socket timed out on send/recv operation", rb"srun|slurm"),
    ("node", b"Job credential expired", None),  # the node's clock is off
    ("node", b"Invalid job credential", rb"srun|slurm"),
    ("node", b"because its node has died", None),
    ("node", b"is DOWN", rb"[Nn]ode \S+ is DOWN|Nodes? .*required.*DOWN"),
    ("environment", b"ModuleNotFoundError", None),
    ("environment", b"ImportError: ", None),
    ("environment", b"undefined symbol", None),
    ("environment", b"cannot open shared object file", None),
    ("environment", b"command not found", None),
    ("environment", b"is not compiled with ", None),
    ("environment", b"not compiled with CUDA", None),
    ("environment", b"no kernel image is available", None),
    ("environment", b"error: invalid device function", None),  # built for another GPU architecture
    ("environment", b"hipErrorNoBinaryForGpu", None),
    ("environment", b"driver on your system is too old", None),
    ("environment", b"forward compatibility was attempted", None),
    ("environment", b"GLIBC_2.", rb"not found"),
    ("environment", b"GLIBCXX_3", rb"not found"),
    ("environment", b"cannot execute binary file", None),
    ("environment", b"Invalid handle. Cannot load symbol", None),
    ("gave_up", b": gives up (", rb"hpctrain: link \d+: gives up"),
    ("config", b"train_batch_size is not equal to", None),
    ("config", b"has to be greater than 0", rb"AssertionError"),
    ("config", b"got an unexpected keyword argument", None),
    ("config", b"unrecognized arguments", None),
    ("config", b"the following arguments are required", None),
    ("config", b"are not used by the HfArgumentParser", None),
    ("config", b"class input value", rb"AnnealingLR"),
    ("config", b"is not divisible by", rb"(?:Error|assert)"),
    ("config", b"must be divisible by", rb"(?:Error|assert|Exception)"),
    ("config", b"ConfigAttributeError", None),
    ("config", b"Could not override ", None),
    ("config", b"HFValidationError", None),
    ("config", b"OSError: You are trying to access a gated repo", None),
    ("config", b"NeoXArgs.configure_distributed_args", rb"Error"),
    ("config", b"types cannot be validated", None),
    ("config", b"Unable to create step for job", rb"Invalid|not available|[Mm]ore processors|Requested node configuration"),
    ("config", b"duplicate keys ", None),
    ("config", b"and the stage needs branch ", rb"hpctrain: error"),
    ("config", b"hpctrain: error: on ", rb": `import verl` "),
    ("missing_file", b"No such file or directory", rb"FileNotFoundError|: (?:error: )?(?:execve|can't open file|cannot access|cannot open|cannot stat)|^(?:bash|sh|python\S*|\S*slurm\S*|/\S+): |FATAL:"),
    ("missing_file", b"FileNotFoundError", None),
    ("missing_file", b"Permission denied", rb"PermissionError|execve|^\S+: |Errno 13"),
    ("missing_file", b"NotADirectoryError", None),
    ("missing_file", b"couldn't connect to 'https:", rb"OSError|EnvironmentError"),
    ("missing_file", b"LocalEntryNotFoundError", None),
    ("missing_file", b"is not a local folder", rb"OSError|EnvironmentError"),
    ("missing_file", b"could not open image", None),
    ("checkpoint", b"Unable to load checkpoint", None),
    ("checkpoint", b"Error(s) in loading state_dict", None),
    ("checkpoint", b"PytorchStreamReader failed", None),
    ("checkpoint", b"The checkpoint being loaded used a DP world size", None),
    ("checkpoint", b"invalid header or archive is corrupted", None),
    ("checkpoint", b"Error while deserializing header", None),
    ("checkpoint", b"unexpected EOF, expected", None),
    ("checkpoint", b"Can't find a valid checkpoint", None),
    ("checkpoint", b"No valid checkpoint found", None),
    ("checkpoint", b"Ran out of input", rb"EOFError"),
    ("checkpoint", b"size mismatch for ", None),
    ("checkpoint", b"hpctrain: error: the start's models: ", None),
    ("nonfinite", b"no finite gradient for", rb"hpctrain: error"),
    ("nonfinite", b"found NaN in ", rb"loss|grad"),
    ("nonfinite", b"found Inf in ", rb"loss|grad"),
    ("nonfinite", b"NaN or Inf found in", None),
    ("nonfinite", b"Current loss scale already at minimum", None),
    ("nonfinite", b"contains either `inf`, `nan`", None),
    ("nonfinite", b"returned nan values in its", None),
    ("crash", b"Segmentation fault", None),
    ("crash", b"core dumped", rb"[Aa]borted|[Ss]egmentation|[Ii]llegal|Floating"),
    ("crash", b"Fatal Python error", None),
    ("crash", b"terminate called ", None),
    ("crash", b"Illegal instruction", None),
    ("crash", b"Bus error", rb"Bus error(?! occurred)"),
    ("crash", b"double free or corruption", None),
    ("crash", b"malloc(): ", None),
    ("crash", b"free(): invalid", None),
    ("time_limit", b"DUE TO TIME LIMIT", None),
    ("time_limit", b"DUE TO TIMEOUT", None),
    ("time_limit", b"hpctrain: the time limit is near", None),
    ("preemption", b"DUE TO PREEMPTION", None),
    ("preemption", b"DUE TO JOB REQUEUE", None),
    ("preemption", b"DUE to SIGNAL", rb"preempt"),
    # slurmstepd says this of a step that still runs when its job script has ended (slurmctld's SIG_FAILURE).
    ("script_killed", b"(non-zero exit code or other failure mode)", rb"STEP \S+ ON \S+ FAILED"),
    # A cancelled STEP is what --kill-on-bad-exit leaves; only a cancelled JOB was someone's wish.
    ("cancelled", b" CANCELLED AT ", rb"JOB \S+ ON \S+ CANCELLED AT \S+(?! DUE TO)(?:\s*\*|\s*$|\s+by)"),
    ("communication", b"hpctrain: error: ray: ", rb"left (?:while|before)|is gone|does not answer|called within|joined|Ray on \S+(?: first node)? "),
    ("communication", b"Watchdog caught collective operation timeout", None),
    ("communication", b"ran for ", rb"milliseconds before timing out"),
    ("communication", b"NCCL WARN ", rb"NCCL WARN (?!.*(?:DMABUF|deprecated|Missing|NET/OFI|env|ignored|not enabled|NCCL_))"),
    ("communication", b"ncclSystemError", None),
    ("communication", b"ncclInternalError", None),
    ("communication", b"ncclUnhandledCudaError", None),
    ("communication", b"ncclRemoteError", None),
    ("communication", b"NCCL error", rb"NCCL error(?: in)?:? ?"),
    ("communication", b"DistBackendError", None),
    ("communication", b"DistNetworkError", None),
    ("communication", b"DistStoreError", None),
    ("communication", b"RendezvousTimeoutError", None),
    ("communication", b"RendezvousConnectionError", None),
    ("communication", b"RendezvousClosedError", None),
    ("communication", b"Connection reset by peer", None),
    ("communication", b"Connection refused", None),
    ("communication", b"Connection closed by ", rb"peer|remote"),
    ("communication", b"Broken pipe", rb"rror|[Ff]ailed"),
    ("communication", b"Connection timed out", None),
    ("communication", b"EADDRINUSE", None),
    ("communication", b"Address already in use", None),
    ("communication", b"Timed out after ", rb"store|clients|monitored|barrier|wait"),
    ("communication", b"monitoredBarrier", rb"failed|timed out|Timeout|did not"),
    ("communication", b"wait timeout after ", None),
    ("communication", b"client socket has timed out", None),
    ("communication", b"Failed to recv, got 0 bytes", None),
    ("communication", b"heartbeat monitor", rb"got stuck|timed out|did not"),
    ("communication", b"OFI poll failed", None),
    ("communication", b"MPICH ERROR [", None),
    ("communication", b"Socket Timeout", rb"Error: Socket Timeout"),
    ("communication", b"PtlGetEventQueue", None),
    ("communication", b"MPIDI_", rb"[Ff]atal|[Ee]rror"),
    ("communication", b"gloo/transport", rb"rror|[Ff]ailed|[Tt]imed"),
    ("killed", b"Killed", rb"(?:^|[\s:])Killed(?:\s*$|\s+(?!by|process)[\w\"/(])"),
    ("killed", b"exit code 137", None),
    ("killed", b"exitcode  : -9", None),  # torch elastic: `exitcode  : -9 (pid: 9548)  (SIGKILL)`
    ("crash", b"exitcode  : -", rb"exitcode  : -(?:4|6|7|8|11)\b"),
    ("crash", b"(exitcode: -", rb"failed \(exitcode: -(?:4|6|7|8|11)\)"),
    ("killed", b"(exitcode: -9)", None),
    ("cut_off", b"SignalException: ", rb"Process \d+ got signal: 1\s*$"),  # SIGHUP: its terminal was closed
    ("wrapper", b"exitcode  : ", rb"exitcode  : [1-9]"),
    ("killed", b"SIGKILL", rb"[Ss]ignal 9 \(SIGKILL\)|killed by SIGKILL|with signal SIGKILL"),
    ("killed", b"died with <Signals.SIGKILL: 9>", None),
    ("killed", b"actor died unexpectedly", None),
    ("wrapper", b"SignalException: ", rb"Process \d+ got signal: (?!1\s*$)\d+"),  # torchrun was told to end: by whom, others say
    ("wrapper", b"ChildFailedError", None),
    ("wrapper", b"CalledProcessError", None),
    ("wrapper", b"Exited with exit code", rb"srun: error"),
    ("wrapper", b"RayTaskError", None),
    # Behind all that know their failure by its own words.
    ("program", b"Error", None),
    ("program", b"Exception", None),
    ("program", b"KeyboardInterrupt", None),
    ("refused", b"hpctrain: error: ", rb"^hpctrain: error: (?!no finite)"),  # last: any other class says more
)  # fmt: skip

PATTERNS = tuple(
    Pattern(
        failure,
        anchor,
        _RAISED if failure == "program" else _rx(confirm) if confirm else None,
        _QUOTED,
    )
    for failure, anchor, confirm in _PATTERNS
)
# Where one line tells several failures, the one that is listed first: a general exception yields to what it says.
PRECEDENCE = {name: rank for rank, name in enumerate(dict.fromkeys(failure for failure, _, _ in _PATTERNS))}
# `Bypassing SIGTERM` is what accelerate says while others die; a warning of Python names a category, not a failure.
BENIGN = _rx(
    rb"Bypassing SIGTERM|(?:Future|Deprecation|User|Runtime|Resource)Warning|Exception ignored in|warnings\.warn"
    rb"|\[W\w*[ \d:.-]*\s?\w*\.(?:cpp|py|cc):?\d*\] .*(?:retry|Retrying)|will retry|[Rr]etrying"
)

KNOBS = {
    "neox": {"micro_batch": "`train_micro_batch_size_per_gpu`", "sequence": "`seq_length`", "lr": "`optimizer.params.lr`"},
    "sft": {"micro_batch": "`train_micro_batch_size_per_gpu`", "sequence": "`seq_length`", "lr": "`lr`"},
    "open-instruct": {"micro_batch": "`per_device_train_batch_size`", "sequence": "`max_seq_length`", "lr": "`learning_rate`"},
    "hf": {"micro_batch": "`per_device_train_batch_size`", "sequence": "`max_length`", "lr": "`learning_rate`"},
    "verl": {"micro_batch": "`actor_rollout_ref.actor.ppo_max_token_len_per_gpu`", "sequence": "`data.max_response_length`", "lr": "`actor_rollout_ref.actor.optim.lr`"},
    "em-dpo": {"micro_batch": "`batch_size`", "sequence": "`max_length`", "lr": "`lr`"},
    "": {"micro_batch": "the micro batch size", "sequence": "the sequence length", "lr": "the learning rate"},
}  # fmt: skip


def advise(failure: Failure, framework: str | None, node: str | None) -> str:
    """The failure's advice with the names that `framework` uses, and the node to exclude where one is known."""
    text = failure.advice
    for name, setting in knobs(framework).items():
        text = text.replace("{" + name + "}", setting)
    return text.replace("NODE", node) if node else text


def knobs(framework: str | None) -> dict[str, str]:
    """The names of the settings that advice speaks of, as `framework` (or a recipe) spells them."""
    name = (framework or "").lower()
    for start, key in (("neox", "neox"), ("megatron", "neox"), ("sft", "sft"), ("open", "open-instruct"), ("verl", "verl"),
                       ("gad", "verl"), ("hf", "hf"), ("trl", "hf"), ("unsloth", "hf"), ("em", "em-dpo"), ("dpo", "em-dpo")):  # fmt: skip
        if name.startswith(start):
            return KNOBS[key]
    return KNOBS[""]
