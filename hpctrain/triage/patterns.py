"""The lines by which failures are told: a literal anchor each (at least five bytes, for `scan`) and
what the line must match.

Patterns come from Slurm's, PyTorch's, NCCL's and the kernel's own messages; families (`CUDA error:
…`, exit codes, signals, errno's texts) are taken whole, so that a member that nobody here has seen
is still told apart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from hpctrain.triage.exceptions import OF_FILE, PRIVATE, RAISED
from hpctrain.triage.normal import without_prefix


@dataclass(frozen=True)
class Pattern:
    """`weak`: what a helper program or a shell says in passing; any exception outranks it."""

    failure: str
    anchor: bytes
    confirm: re.Pattern[bytes] | None = None
    unless: re.Pattern[bytes] | None = None
    weak: bool = False

    @property
    def from_start(self) -> bool:
        """Whether it asks how the line begins, so that a launcher's prefix matters."""
        return self.confirm is not None and b"^" in self.confirm.pattern

    def matches(self, line: bytes) -> bool:
        """Whether the line says it, with or without what launchers put before it."""
        if self.confirm is None or self.confirm.search(line):
            return not (BENIGN.search(line) or (self.unless and self.unless.search(line)))
        if not self.from_start:
            return False
        bare = without_prefix(line)
        handled = b"WARN" in line[: len(line) - len(bare)]
        return (
            bare is not line
            and not handled
            and self.confirm.search(bare) is not None
            and (not BENIGN.search(line))
        )


def _rx(text: bytes) -> re.Pattern[bytes]:
    return re.compile(text)


_QUOTED = _rx(
    rb"^\s*(?:raise |except |#|\"(?!hipError)|'|>>> )|During handling of|\braise \w[\w.]*\("
)

# `exits with return code = -9`, `exitcode: 139`, `returned non-zero exit status 1`: signal N is -N
# to Python, 128 + N to a shell.
_CODE = (
    rb"^(?!hpctrain: )[^\n]*(?:return(?:ed)?[ -]?(?:code|status)|exit(?:ed)?(?: with)?["
    rb" -]?(?:code|status))\s*[:=]?\s*"
)
# CUDA's and HIP's own errors: a fault of the device or its driver only where the member says so;
# the others are of the program (NVIDIA's guide to Xid: 13 and 31 are its own first, too).
_DEVICE = rb"(?:(?:CUDA|HIP) error(?: \d+)?: |Cuda failure (?:\d+ )?')"
_OF_DEVICE = (
    rb"[^\n']{0,60}?(?:illegal (?:memory access|address|instruction)|misaligned address|launch fail"
    rb"|launch timed|unspecified|uncorrectable|NVLink|ECC|hardware stack|unknown error|busy"
    rb"|unavailable|yet initialized|initialization error|no (?:CUDA|ROCm)-capable|program counter"
    rb"|\blost\b|\bhang\b|present state|driver shutting down|internal error)"
)
_SEVERE = (
    rb"^(?![^\n]*[Ii]gnoring)(?:[^\n]{0,120}?[\s\[(|:-])?(?:(?:ERROR|FATAL|CRITICAL)\b|(?:fatal"
    rb" )?error: |fatal: )"
)

_UNSUPPORTED = (
    rb"(?i)error[^\n]*(?:only supports?|only supported on|not supported (?:on|by)"
    rb" (?:this|your|the current)|requires?)"
    rb" [^\n]*\b(?:GPUs?|device|hardware|architecture|compute capability|sm_?\d\d|gfx\d)"
)

# (failure, anchor, what the line must match, whether it is weak)
_PATTERNS: tuple[tuple[Any, ...], ...] = (
    ("gpu_oom", b"CUDA out of memory", None),
    ("gpu_oom", b"HIP out of memory", None),
    ("gpu_oom", b"OutOfMemoryError", rb"(?<!ray\.exceptions\.)OutOfMemoryError(?:\s*:|\s*$)"),
    ("gpu_oom", b"CUDA_ERROR_OUT_OF_MEMORY", None),
    ("gpu_oom", b"hipErrorOutOfMemory", None),
    ("gpu_oom", b"CUBLAS_STATUS_ALLOC_FAILED", None),
    ("gpu_oom", b"CUDA error: out of memory", None),
    ("gpu_oom", b"HIP error: out of memory", None),
    ("gpu_oom", b"No available memory for the cache blocks", None),
    (
        "gpu_oom",
        b"ut of memory",
        (
            rb"(?:CUDA|HIP|[GNHTX]PU|MPS|HBM|[Cc]uda|\bhip|[Dd]evice|VRAM)[^\n]{0,60}"
            rb"ut of memory|ut of"
            rb" memory[^\n]{0,40}(?:GPU|device|CUDA|HIP)"
        ),
    ),
    ("gpu_oom", b"_ALLOC_FAILED", None),
    ("gpu_oom", b"cudaErrorMemoryAllocation", None),
    ("gpu_oom", b"GPU memory utilization", rb"less than desired"),
    (
        "gpu_oom",
        b"KV cache",
        rb"larger than (?:the )?(?:available|maximum)|[Nn]ot enough|insufficient",
    ),
    (
        "gpu_oom",
        b"RESOURCE_EXHAUSTED",
        rb"(?i)out of memory|allocat|\bHBM\b|exceeds?(?:ed)? [^\n]*memory",
    ),
    ("gpu_oom", b"OUT_OF_DEVICE_MEMORY", None),
    ("gpu_oom", b"mem-fraction-static", rb"(?i)not enough|increase|out of memory"),
    ("gpu_oom", b"nough memory", rb"GPU|CUDA|HIP"),
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
    ("host_oom", b"DataLoader worker (pid", rb"killed by signal: Killed"),
    ("host_oom", b"killed due to memory pressure", None),
    ("host_oom", b"running low on memory", rb"due to the node running low on memory"),
    ("host_oom", b"killed by the OOM killer", None),
    ("host_oom", b"ut of memory", rb"[Kk]ill(?:ed)? process|cgroup|\bfork|\b[Hh]ost\b|\bRAM\b"),
    ("host_oom", b"OOMKilled", None),
    ("host_oom", b"OUT_OF_MEMORY", rb"[Ss]tate|JobState|sacct|slurm"),
    ("host_oom", b"memory usage threshold", None),
    ("host_oom", b"memory limit", rb"(?i)exceed"),
    ("disk", b"DataLoader worker (pid", rb"Bus error"),
    ("disk", b"o space left", rb"[Nn]o space left"),
    ("disk", b"uota exceeded", None),
    ("disk", b"StorageFull", None),
    ("disk", b"File too large", None),
    ("disk", b"unable to write shared memory", None),
    ("disk", b"unable to open shared memory", None),
    ("disk", b"unable to mmap ", rb"bytes from file"),
    ("disk", b"PytorchStreamWriter failed", None),
    (
        "disk",
        b"shared memory",
        (
            rb"(?i)insufficient|out of shared|unable to \w+ shared|failed to \w+ shared|raise your"
            rb" shared"
        ),
    ),
    ("gpu_fault", b"NVRM: Xid", None),
    ("gpu_fault", b"Xid (PCI", None),
    ("gpu_fault", b"uncorrectable ECC", None),
    ("gpu_fault", b"Uncorrectable ECC", None),
    ("gpu_fault", b"HSA_STATUS_ERROR", None),
    ("gpu_fault", b"Memory access fault by GPU", None),
    ("gpu_fault", b"an illegal memory access", None),
    ("gpu_fault", b"unspecified launch failure", None),
    ("gpu_fault", b"CUDA error", _DEVICE + _OF_DEVICE),
    ("gpu_fault", b"HIP error", _DEVICE + _OF_DEVICE),
    ("gpu_fault", b"Cuda failure", _DEVICE + _OF_DEVICE),
    (
        "gpu_fault",
        b"CUDA_ERROR_",
        rb"CUDA_ERROR_(?!OUT_OF_MEMORY|NO_BINARY|INVALID_VALUE|INVALID_PTX|UNSUPPORTED"
        rb"|SYSTEM_DRIVER|INVALID_DEVICE)",
    ),
    (
        "gpu_fault",
        b"_STATUS_",
        rb"\b(?:CUBLAS|CUDNN|CUSPARSE|CUSOLVER|HIPBLAS)_STATUS_(?:NOT_INITIALIZED"
        rb"|EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)",
    ),
    ("gpu_fault", b"rocblas_status_internal_error", None),
    ("gpu_fault", b"hipErrorIllegal", None),
    ("gpu_fault", b"cudaErrorIllegal", None),
    ("gpu_fault", b"GPU is lost", None),
    ("gpu_fault", b"GPU reset", rb"required|amdgpu|failed"),
    ("gpu_fault", b"Unable to determine the device handle", None),
    ("gpu_fault", b"no CUDA-capable device", None),
    ("gpu_fault", b"Found no NVIDIA driver", None),
    ("gpu_fault", b"amdgpu: ", rb"page fault|ring \S+ timeout|ras |RAS|poison"),
    ("gpu_fault", b"fallen off the bus", None),
    ("gpu_fault", b"No CUDA GPUs are available", None),
    ("gpu_fault", b"No HIP GPUs are available", None),
    ("gpu_fault", b"all CUDA-capable devices are busy", None),
    ("gpu_fault", b"is/are busy or unavailable", None),
    ("gpu_fault", b"GPU Hang", None),
    ("gpu_fault", b"system not yet initialized", rb"802|CUDA"),
    ("gpu_fault", b"uncorrectable NVLink", None),
    ("gpu_fault", b"communicate with the NVIDIA driver", None),
    ("gpu_fault", b"synStatus", rb"synStatus=?\s*\d*\s*\[?(?:Device not|Failed)"),  # Habana
    ("gpu_fault", b"EZ9999", rb"(?i)aicore|ecc|hbm|device"),  # CANN: the chip itself
    # libfabric says `Input/output error` of a message that was lost.
    ("filesystem", b"Input/output error", rb"^(?!.*(?:OFI poll|MPIDI_|PTLTE))"),
    (
        "filesystem",
        b"while accessing SQLite database",
        None,
    ),  # MIOpen's cache, where locks do not work
    ("filesystem", b"Stale ", rb"Stale (?:NFS )?file handle"),
    ("filesystem", b"ead-only file system", None),
    ("filesystem", b"Remote I/O error", None),
    ("filesystem", b"Structure needs cleaning", None),
    ("filesystem", b"No locks available", None),
    ("filesystem", b"LustreError", None),
    ("filesystem", b"disk I/O error", None),
    ("filesystem", b"database is locked", None),
    ("filesystem", b"[Errno 5]", None),
    ("filesystem", b"[Errno 116]", None),
    ("filesystem", b"[Errno 108]", None),
    ("filesystem", b"Cannot send after transport endpoint shutdown", None),
    ("filesystem", b"Transport endpoint is not connected", OF_FILE.pattern),
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
    ("node", b"marked dead", rb"[Nn]ode"),
    ("node", b"node has ", rb"node has (?:crashed|died|failed)"),
    ("node", b"was running on", rb"[Nn]ode [^\n]{0,80}died"),
    (
        "node",
        b"Task launch for ",
        rb"failed on node"
        rb" (?![^\n]*(?:layout|Invalid|[Cc]onfiguration|not available|not permitted))",
    ),
    ("node", b"Error configuring interconnect", None),
    ("node", b"not responding", rb"[Nn]ode|slurmd"),
    ("node", b"unexpectedly rebooted", None),
    ("node", b"is DOWN", rb"[Nn]ode \S+ is DOWN|Nodes? .*required.*DOWN"),
    ("node", b"rolog fail", rb"error[^\n]* on node "),  # what a site checks before a job may start
    ("node", b"rolog fail", rb"error", True),  # the lines below it tell on which
    ("environment", b"ModuleNotFoundError", None),
    ("environment", b"ImportError: ", None),
    ("environment", b"undefined symbol", None),
    ("environment", b"cannot open shared object file", None),
    ("environment", b"command not found", None, True),
    ("environment", b"CUDA error", rb"kernel image|PTX|toolchain|insufficient|driver version"),
    (
        "environment",
        b"CUDA_ERROR_",
        rb"CUDA_ERROR_(?:NO_BINARY|INVALID_PTX|UNSUPPORTED|SYSTEM_DRIVER)",
    ),
    ("environment", b"_STATUS_", rb"_STATUS_(?:ARCH_MISMATCH|VERSION_MISMATCH)"),
    ("environment", b"symbol lookup error", None),
    *(
        ("environment", anchor, _UNSUPPORTED)
        for anchor in (b"only support", b"supported on ", b"supported by th", b"supported by yo")
    ),
    ("environment", b"xec format error", None),
    ("environment", b"No module named ", None),
    ("environment", b"binary incompatibility", None),
    (
        "environment",
        b" building extension ",
        rb"Error building extension",
    ),  # PyTorch's compiler at the first use
    ("environment", b"compiled using NumPy 1.x", None),
    (
        "environment",
        b"FATAL: ",
        (
            rb"(?i)^(?!.*(?:doesn't exist|does not exist|not found|no such file|could not"
            rb" open)).*(?:container|image|singularity|apptainer)"
        ),
    ),
    ("environment", b"pyxis: ", rb"(?i)fail|error", True),
    ("environment", b"Lmod has detected", rb"error"),
    ("environment", b"Unable to locate a modulefile", None),
    ("environment", b"Error response from daemon", None),
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
    ("environment", b"kernel image", rb"(?:kernel image|Triton Error[^\n]*) is (?:invalid|not )"),
    ("environment", b"ptxas", rb"ptxas (?:fatal|error|info *: *error)|codegen error"),
    ("environment", b"PTX codegen error", None),
    ("environment", b"CompileError", rb"CompileError\b:"),
    ("environment", b"fatal error: ", rb"\.h(?:pp)?: No such file"),
    ("environment", b"does not recognize", rb"does not recognize this (?:architecture|model)"),
    ("environment", b"pip install ", rb"(?:Error|Exception)\b[^\n]*pip install"),
    ("environment", b"o operator found for", None),
    ("environment", b"No kernel found", None),
    ("environment", b"Could not run ", rb"with arguments from the '\w+' backend"),
    ("gave_up", b": gives up (", rb"hpctrain: link \d+: gives up"),
    ("config", b"train_batch_size is not equal to", None),
    ("config", b"has to be greater than 0", rb"AssertionError"),
    ("config", b"got an unexpected keyword argument", None),
    ("config", b"unrecognized arguments", None),
    ("config", b"the following arguments are required", None),
    ("config", b"are not used by the HfArgumentParser", None),
    ("config", b"class input value", rb"AnnealingLR"),
    ("config", b"divisible by", rb"(?:Error|assert|Exception)"),
    ("config", b": error: ", rb": error: (?:argument |ambiguous option|invalid )|invalid choice"),
    ("config", b"d option", rb"(?:unrecogni[sz]ed|invalid) option"),
    ("config", b"n option", rb"unknown option"),
    ("config", b"such option", None),
    ("config", b"validation error", rb"\d validation errors? for "),
    ("config", b"andatory value", None),
    ("config", b"is not in struct", None),
    ("config", b"Unable to allocate resources", rb"srun|salloc|sbatch"),
    ("config", b"invalid device ordinal", None),
    ("config", b"Duplicate GPU detected", None),
    ("config", b"ConfigAttributeError", None),
    ("config", b"Could not override ", None),
    ("config", b"HFValidationError", None),
    ("config", b"OSError: You are trying to access a gated repo", None),
    ("config", b"NeoXArgs.configure_distributed_args", rb"Error"),
    ("config", b"types cannot be validated", None),
    (
        "config",
        b"Unable to create step for job",
        rb"Invalid|not available|[Mm]ore processors|Requested node configuration",
    ),
    ("config", b"Task launch for ", rb"failed on node"),
    ("config", b"less than total desired", None),
    ("config", b"duplicate keys ", None),
    ("config", b"and the stage needs branch ", rb"hpctrain: error"),
    ("config", b"hpctrain: error: on ", rb": `import verl` "),
    (
        "missing_file",
        b"No such file or directory",
        (
            rb"FileNotFoundError|: (?:error: )?(?:execve|can't open"
            rb" file)|^(?:python\S*|\S*slurm\S*|srun): |FATAL:"
        ),
    ),
    (
        "missing_file",
        b"No such file or directory",
        rb"^(?:\S+: ){1,3}|cannot (?:access|open|stat)",
        True,
    ),
    (
        "missing_file",
        b"FATAL: ",
        rb"doesn't exist|does not exist|not found|no such file|could not open",
    ),
    (
        "missing_file",
        b"Max retries exceeded with url",
        rb"^(?![^\n]*(?:" + PRIVATE.pattern + rb"))",
    ),
    ("missing_file", b"Could not resolve host", None),
    ("missing_file", b"Couldn't reach ", rb"Error|Hub"),
    ("missing_file", b"FileNotFoundError", None),
    ("missing_file", b"Permission denied", rb"PermissionError|execve|Errno 13|FATAL:"),
    ("missing_file", b"Permission denied", rb"^\S+: ", True),
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
    ("checkpoint", b"ng key", rb"(?:Missing|missing) keys?\b[^\n]{0,40}(?:state_dict|checkpoint)"),
    ("checkpoint", b"nexpected key", rb"nexpected keys?\b[^\n]{0,40}(?:state_dict|checkpoint)"),
    ("checkpoint", b"invalid load key", None),
    ("checkpoint", b"central directory", rb"Error|fail"),
    ("checkpoint", b"Weights only load failed", None),
    (
        "checkpoint",
        b"heckpoint",
        (
            rb"(?i)(?:error|exception)\b[^\n]{0,160}(?:(?:load|restor|resum"
            rb"|read)\w*[^\n]{0,60}checkpoint|checkpoint[^\n]{0,80}(?:corrupt|mismatch|does"
            rb" not match|incompatible|incomplete|not contain))"
        ),
    ),
    ("checkpoint", b"hpctrain: error: the start's models: ", None),
    ("nonfinite", b"no finite gradient for", rb"hpctrain: error"),
    ("nonfinite", b"found NaN in ", rb"loss|grad"),
    ("nonfinite", b"found Inf in ", rb"loss|grad"),
    ("nonfinite", b"NaN or Inf found in", None),
    (
        "nonfinite",
        b"detected",
        rb"(?i)\b(?:nan|inf)s? (?:\w+ )?detected|detected (?:a )?(?:nan|inf)\b",
    ),
    (
        "nonfinite",
        b"not finite",
        (
            rb"(?i)(?:loss|grad\w*(?: norm)?) (?:is|are|became) (?:not |non-?)finite|non-?finite"
            rb" (?:loss|grad)"
        ),
    ),
    (
        "nonfinite",
        b"non-finite",
        (
            rb"(?i)(?:loss|grad\w*(?: norm)?) (?:is|are|became) (?:not |non-?)finite|non-?finite"
            rb" (?:loss|grad)"
        ),
    ),
    (
        "nonfinite",
        b"onfinite",
        (
            rb"(?i)(?:loss|grad\w*(?: norm)?) (?:is|are|became) (?:not |non-?)finite|non-?finite"
            rb" (?:loss|grad)"
        ),
    ),
    ("nonfinite", b" is nan", rb"(?i)\b(?:loss|grad)"),
    ("nonfinite", b" is NaN", rb"(?i)\b(?:loss|grad)"),
    ("nonfinite", b" is inf", rb"(?i)\b(?:loss|grad)\w*(?: norm)? is inf(?:inite)?\b"),
    ("nonfinite", b"Minimum loss scale reached", None),
    ("nonfinite", b"Current loss scale already at minimum", None),
    ("nonfinite", b"contains either `inf`, `nan`", None),
    ("nonfinite", b"returned nan values in its", None),
    ("hang", b"Did not get subsequent heartbeat", None),  # nvidia-resiliency-ext's rank monitor
    ("hang", b"Did not get initial heartbeat", None),
    ("hang", b"hang detected", rb"(?i)(?<!no )hang detected"),
    ("hang", b"hung rank", None),
    ("crash", b"egmentation fault", None),
    ("crash", b"core dumped", None),
    (
        "crash",
        b"ignal",
        (
            rb"[Ss]ignals?\b[^\n]{0,12}?(?:(?<![\d.])(?:4|6|7|8|11)\b|SIG(?:SEGV|BUS|ABRT"
            rb"|FPE|ILL)\b|Bus"
            rb" error|Abort|Illegal|Floating)"
        ),
    ),
    ("crash", b" code", _CODE + rb"(?:-(?:4|6|7|8|11)|13[4569]|132)\b"),
    ("crash", b" status", _CODE + rb"(?:-(?:4|6|7|8|11)|13[4569]|132)\b"),
    ("crash", b"Fatal Python error", None),
    ("crash", b"terminate called ", None),
    ("crash", b"Illegal instruction", None),
    ("crash", b"Bus error", rb"Bus error(?! occurred)"),
    ("crash", b"double free", None),
    ("crash", b"malloc(): ", None),
    ("crash", b"malloc: ", rb"corrupt|invalid"),
    ("crash", b"free(): ", None),
    ("crash", b"corrupted size", None),
    ("crash", b"munmap_chunk(): ", None),
    ("crash", b"stack smashing", None),
    ("crash", b"pure virtual method", None),
    ("time_limit", b"DUE TO TIME LIMIT", None),
    ("time_limit", b"DUE TO TIMEOUT", None),
    ("time_limit", b"hpctrain: the time limit is near", None),
    ("preemption", b"DUE TO PREEMPTION", None),
    ("preemption", b"DUE TO JOB REQUEUE", None),
    ("preemption", b"DUE to SIGNAL", rb"preempt"),
    # slurmstepd says this of a step that still runs when its job script has ended (slurmctld's
    # SIG_FAILURE).
    ("script_killed", b"(non-zero exit code or other failure mode)", rb"STEP \S+ ON \S+ FAILED"),
    # A cancelled STEP is what --kill-on-bad-exit leaves; only a cancelled JOB was someone's wish.
    (
        "cancelled",
        b" CANCELLED AT ",
        rb"JOB \S+ ON \S+ CANCELLED AT \S+(?! DUE TO)(?:\s*\*|\s*$|\s+by)",
    ),
    (
        "communication",
        b"hpctrain: error: ray: ",
        (
            rb"left (?:while|before)|is gone|does not answer|called within|joined|Ray on \S+(?:"
            rb" first node)? "
        ),
    ),
    ("communication", b"Watchdog caught collective operation timeout", None),
    ("communication", b"ran for ", rb"milliseconds before timing out"),
    (
        "communication",
        b"NCCL WARN ",
        (
            rb"NCCL WARN (?!.*(?:DMABUF|deprecated|Missing|env\b|environment|ignored|not"
            rb" enabled|NCCL_|NET/OFI (?:Only|Using|Could not find|[Uu]nable to find|Failed to"
            rb" initialize sendrecv)))"
        ),
    ),
    (
        "communication",
        b"atchdog",
        rb"got stuck|terminated with exception|[Tt]imed? ?out|watchdog hang",
    ),
    ("communication", b"No route to host", None),
    ("communication", b"Network is unreachable", None),
    ("communication", b"Host is down", None),
    ("communication", b"ame or service not known", None),
    ("communication", b"failure in name resolution", None),
    ("communication", b"onnection abort", None),
    ("communication", b"UCX  ERROR", None),
    ("communication", b"completion with error", None),
    ("communication", b"libfabric:", rb"<(?:error|critical)>"),
    ("communication", b"Libfabric", rb"(?i)fail"),
    (
        "communication",
        b" ibv_",
        rb"(?i)\bibv_\w+[^\n]{0,80}(?:fail|error)|(?:fail|error)[^\n]{0,80}\bibv_",
    ),
    ("communication", b"PMI_Init", rb"(?i)fail|error|returned"),
    ("communication", b"PMI mmap", rb"(?i)fail"),
    ("communication", b"MPI_ABORT was invoked", None),
    ("communication", b"MPI_Init", rb"(?i)fail|error"),
    ("communication", b"to connect to GCS", None),
    ("communication", b"GCS server", rb"(?i)fail|died|unreachable|timed"),
    ("communication", b"ncclSystemError", None),
    ("communication", b"ncclInternalError", None),
    ("communication", b"ncclUnhandledCudaError", None),
    ("communication", b"ncclRemoteError", None),
    ("communication", b"NCCL error", None),
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
    ("communication", b"eartbeat monitor", rb"got stuck|timed out|did not"),
    ("communication", b"OFI poll failed", None),
    ("communication", b"MPICH ERROR [", None),
    ("communication", b"Socket Timeout", rb"Error: Socket Timeout"),
    ("communication", b"PtlGetEventQueue", None),
    ("communication", b"Transport endpoint is not connected", None),
    ("communication", b"Max retries exceeded with url", None),
    ("communication", b"server can't be reached", None),
    ("communication", b"Cannot connect to host ", PRIVATE.pattern),
    (
        "communication",
        b"erver at ",
        rb"(?i)(?:not reachable|unreachable|did not (?:start|respond))",
    ),
    (
        "communication",
        b"oordination service",
        rb"(?i)heartbeat|has been set to ERROR|polled an error|unavailable|deadline",
    ),
    ("communication", b"JAX distributed service", rb"fatal errors|UNAVAILABLE|DEADLINE"),
    ("communication", b"arrier timed out", None),
    ("communication", b"NCCL operation ", rb"fail"),
    ("communication", b"HCCL ", rb"(?i)error|fail|time ?out"),
    ("communication", b"HcclAllreduce", rb"(?i)error|fail|time ?out"),
    ("communication", b"oneCCL", rb"(?i)error|fail|time ?out"),
    ("communication", b"EI0006", None),  # CANN: a link could not be set up in time
    ("communication", b"EI0002", None),  # CANN: a collective was not entered by all in time
    ("communication", b"EJ0001", None),
    ("communication", b"MPIDI_", rb"[Ff]atal|[Ee]rror"),
    ("communication", b"gloo/transport", rb"rror|[Ff]ailed|[Tt]imed"),
    ("killed", b"DataLoader worker (pid", rb"exited unexpectedly"),
    ("killed", b"Killed", rb"(?:^|[\s:])Killed(?:\s*$|\s+(?!by|process)[\w\"/(])"),
    ("killed", b" code", _CODE + rb"(?:-9|137)\b"),
    ("killed", b" status", _CODE + rb"(?:-9|137)\b"),
    ("killed", b"ignal", rb"(?:on|by|with|[Rr]eceived|[Cc]aught) signal:? ?(?:9\b|SIGKILL|Killed)"),
    ("killed", b"exitcode  : -9", None),  # torch elastic: `exitcode  : -9 (pid: 9548)  (SIGKILL)`
    ("crash", b"exitcode  : -", rb"exitcode  : -(?:4|6|7|8|11)\b"),
    ("crash", b"(exitcode: -", rb"failed \(exitcode: -(?:4|6|7|8|11)\)"),
    ("killed", b"(exitcode: -9)", None),
    (
        "cut_off",
        b"SignalException: ",
        rb"Process \d+ got signal: 1\s*$",
    ),  # SIGHUP: its terminal was closed
    ("wrapper", b"exitcode  : ", rb"exitcode  : [1-9]"),
    ("killed", b"SIGKILL", rb"[Ss]ignal 9 \(SIGKILL\)|killed by SIGKILL|with signal SIGKILL"),
    ("killed", b"died with <Signals.SIGKILL: 9>", None),
    ("killed", b"actor died unexpectedly", None),
    (
        "wrapper",
        b"SignalException: ",
        rb"Process \d+ got signal: (?!1\s*$)\d+",
    ),  # torchrun was told to end: by whom, others say
    ("wrapper", b"ChildFailedError", None),
    ("wrapper", b"CalledProcessError", None),
    ("wrapper", b"Exited with exit code", rb"srun: error"),
    (
        "wrapper",
        b" code",
        rb"^(?=[^\n]*(?:srun|launch\.py|exits |api\.py|mpirun|prterun))" + _CODE + rb"-?[1-9]",
    ),
    ("wrapper", b"root cause above", None),
    ("wrapper", b"launch failed", rb"srun|slurm"),
    ("wrapper", b" code", rb"^(?=[^\n]*exited)" + _CODE + rb"-?[1-9]", True),
    ("wrapper", b"RayTaskError", None),
    # Behind all that know their failure by its own words.
    ("program", b"ssertion ", rb"Assertion [`'\"(][^\n]*failed|Assertion failed"),
    ("program", b"CUDA error", _DEVICE + rb"(?![^\n']{0,20}ut of memory)"),
    ("program", b"HIP error", _DEVICE + rb"(?![^\n']{0,20}ut of memory)"),
    ("program", b"Error", None),
    ("program", b"Exception", None),
    ("program", b"KeyboardInterrupt", None),
    (
        "program",
        b"ncaught ",
        rb"(?i)uncaught (?:\w+ )?(?:exception|\w*(?:Error|Exception|Fault))\b",
    ),
    # A severity is all that some say. Nothing but the silence of a run that never trained makes
    # that a cause.
    ("program", b"ERROR", _SEVERE, True),
    ("program", b"FATAL", _SEVERE, True),
    ("program", b"CRITICAL", _SEVERE, True),
    ("program", b"error: ", _SEVERE, True),
    ("program", b"fatal: ", _SEVERE, True),
    (
        "refused",
        b"hpctrain: error: ",
        rb"^hpctrain: error: (?!no finite)",
    ),  # last: any other class says more
)

_UNCONFIRMED = {"program": RAISED}
PATTERNS = tuple(
    Pattern(
        failure, anchor, _rx(confirm) if confirm else _UNCONFIRMED.get(failure), _QUOTED, bool(weak)
    )
    for failure, anchor, confirm, *weak in _PATTERNS
)
# Where one line tells several failures, the one that is listed first: a general exception yields to
# what it says.
PRECEDENCE = {
    name: rank for rank, name in enumerate(dict.fromkeys(failure for failure, *_ in _PATTERNS))
}
# `Bypassing SIGTERM` is what accelerate says while others die; a warning of Python names a
# category, not a failure.
BENIGN = _rx(
    rb"Bypassing SIGTERM|NCCL INFO|libfabric:\S*<(?:warn|info)>|thrown while"
    rb" requesting|(?:Future|Deprecation|User|Runtime|Resource)Warning|Exception ignored"
    rb" in|warnings\.warn"
    rb"|\[W\w*[ \d:.-]*\s?\w*\.(?:cpp|py|cc):?\d*\] .*(?:retry|Retrying)|will retry|[Rr]etrying"
)
