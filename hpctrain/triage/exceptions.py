"""What an exception tells by its class, its errno and the functions it came through, where its
words name no failure.

A program that nobody here has seen still raises exceptions with names from a handful of libraries,
system calls that fail with errno(3), and tracebacks that tell whether it was reading its
configuration or loading a checkpoint.
"""

from __future__ import annotations

import re

from hpctrain.triage.normal import without_prefix

MOST = 64 * 1024  # bytes of a traceback that are waited for
HEADER = b"Traceback (most recent call last)"

# A rank, a logger, Ray or a service in front of an exception: all end in one of `] ) : > |` or ` -
# `. A warning is handled.
_NAME = (
    rb"(?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*(?:Error|Exit|Interrupt|Invalid|Fault)"
    rb"|(?:[A-Z]\w*)?Exception)(?:_\w+)?(?:\([\w.]+\))?"
)
RAISED = re.compile(
    rb"^(?![^\n]{0,60}\bWARN)(?:[^\n]{0,160}?(?:[\])>|]|: | - ))?\s*(" + _NAME + rb")(?::|\s*$)"
)
# What may end a traceback: any class, by its module or with a capital first letter, alone or before
# a colon.
_LAST = re.compile(
    rb"((?:[A-Za-z_]\w*\.)+[A-Za-z_]\w*"
    rb"|[A-Z][A-Z_]*[a-z]\w*)(?:\([\w.]+\))?(?::(?:\s|$)|\s*$)"
)
_NO_CLASS = re.compile(
    rb"(?:Killed|Aborted|Terminated|Traceback|Epoch|Step|Loss|Warning|Error)\b(?!\w)"
)
# Python itself says that what follows was not raised, or that the program was over.
_IGNORED = re.compile(
    rb"Exception ignored |--- Logging error ---|Error in atexit|Error in"
    rb" sys\.excepthook|_run_finalizers"
)
_DIGITS = bytes.maketrans(b"0123456789", b"0" * 10)

# errno(3), by its number: `[Errno 28]`, `(os error 28)`, `Os { code: 28`, `errno: 98`.
_ERRNO = re.compile(rb"\[Errno (\d+)\]|\(os error (\d+)\)|\bOs \{ code: (\d+)|\berrno[:=]? ?(\d+)")
_ERRNOS = {
    1: "missing_file",
    2: "missing_file",
    13: "missing_file",
    20: "missing_file",
    21: "missing_file",
    36: "missing_file",
    40: "missing_file",
    12: "host_oom",
    27: "disk",
    28: "disk",
    122: "disk",
    5: "filesystem",
    6: "filesystem",
    16: "filesystem",
    19: "filesystem",
    26: "filesystem",
    30: "filesystem",
    37: "filesystem",
    71: "filesystem",
    95: "filesystem",
    107: "filesystem",
    108: "filesystem",
    116: "filesystem",
    117: "filesystem",
    121: "filesystem",
    8: "environment",
    32: "communication",
    98: "communication",
    99: "communication",
    100: "communication",
    101: "communication",
    103: "communication",
    104: "communication",
    110: "communication",
    111: "communication",
    112: "communication",
    113: "communication",
}
# A server on the internet, told by an address or a library that only speaks to such.
_INTERNET = re.compile(
    rb"https?://|HTTPS?Connection|huggingface|on the Hub|github\.com|wandb|modelscope|\bcurl:"
    rb" |getaddrinfo|proxy",
    re.IGNORECASE,
)
# The job's own servers are not the internet: they are on its nodes.
PRIVATE = re.compile(
    rb"\blocalhost\b|\b0\.0\.0\.0\b|\b127\.\d+\.\d+\.\d+|\b10\.\d+\.\d+\.\d+|\b192\.168\.\d+\.\d+"
    rb"|\b172\.(?:1[6-9]|2\d|3[01])\.\d+\.\d+|\[::1?\]"
)
# A path, or what is done to a file: where errno's text is a file system's, not a socket's.
OF_FILE = re.compile(
    rb"['\": ]/\S|cannot |\b(?:flock|open|stat|read|write|mmap|mount|fsync|rename|unlink|mkdir)"
    rb"(?:\(\))?:"
)
_OFFLINE = re.compile(
    rb"^(?:MaxRetry|NewConnection|NameResolution|ConnectTimeout|ReadTimeout|Proxy|SSL"
    rb"|SSLCertVerification|URL|HTTP|HfHubHTTP|Offline\w*|LocalEntryNotFound"
    rb"|RepositoryNotFound|RevisionNotFound|EntryNotFound|GatedRepo|DatasetNotFound"
    rb"|DataFilesNotFound)(?:Error)?$|^OfflineModeIsEnabled$|^gaierror$"
)
_CANNOT = re.compile(
    rb"onnect|ommunicat|no such host|to resolve|unreachable|\b(?:429|50[0-4]) (?:Client|Server|Bad)"
)
# How a check of settings words what it refuses.
_SETTINGS = re.compile(
    rb"must be (?:divisible|a multiple|one of|set|specified|provided|positive|greater|less|at least"
    rb"|smaller|equal)|mutually exclusive|cannot be (?:used|set|combined|specified)|(?:is|are) not"
    rb" (?:a )?(?:supported|valid|allowed) (?:for|with|when|value|choice|option)|is less than total"
    rb"|should be (?:set|divisible|greater|less)|[Uu]nknown (?:optimizer|scheduler|recipe)"
)
_TIMED_OUT = re.compile(rb"[Tt]imed[ -]?out|[Tt]ime-?out (?:of|after|expired|reached|exceeded)")
_NOT_THERE = re.compile(
    rb"(?i)(?:can't|cannot|could not|unable to) (?:load|find|open)|not found|no file|have a"
    rb" file|not a (?:local|valid)"
)
_FRAME = re.compile(rb'File "([^"\n]+)", line \d+, in (\S+)')
_CLASSES = tuple(
    (failure, re.compile(pattern))
    for failure, pattern in (
        (
            "wrapper",
            rb"^(?:ChildFailed|CalledProcess|SubprocessFailure|ProcessRaised|ProcessExited"
            rb"|Launch|RayTask)(?:Error|Exception)$|^(?:SystemExit|SignalException)$",
        ),
        ("gpu_oom", rb"^(?:OutOfMemory|ResourceExhausted)Error$"),
        ("host_oom", rb"^_?(?:Array)?MemoryError$"),
        (
            "environment",
            rb"^(?:ModuleNotFound|Import|PackageNotFound|DistributionNotFound"
            rb"|VersionConflict|PackageVersion|Compilation|Ninja)(?:Error)?$"
            rb"|^(?:DistributionNotFound|VersionConflict)$",
        ),
        (
            "missing_file",
            rb"^(?:FileNotFound|NotADirectory|IsADirectory|Permission|RepositoryNotFound"
            rb"|EntryNotFound|RevisionNotFound|LocalEntryNotFound|GatedRepo"
            rb"|DatasetNotFound|DataFilesNotFound)Error$|^OfflineModeIsEnabled$",
        ),
        (
            "communication",
            rb"^(?:Client(?:Connect\w*|OS)|ServerDisconnected|RemoteProtocol|Connect|Dist\w*"
            rb"|Rendezvous\w*|Nccl|NCCL|Connection(?:Refused|Reset|Aborted"
            rb"|Closed)?|BrokenPipe|Timeout|GetTimeout|Socket|Rpc|RPC|Ray(?:System"
            rb"|Channel\w*)|ObjectLost|OwnerDied|Gloo|IncompleteRead"
            rb"|RemoteDisconnected)(?:Error|Exception)?$|^(?:timeout|EOFError_\w*)$",
        ),
        (
            "killed",
            rb"^(?:ActorDied|RayActor|WorkerCrashed|ActorUnavailable|BrokenProcessPool"
            rb"|TerminatedWorker)(?:Error)?$",
        ),
        ("node", rb"^NodeDiedError$"),
        (
            "checkpoint",
            rb"^(?:Checkpoint\w*|Unpickling|CorruptCheckpoint|BadZipFile|ZeRORuntime"
            rb"|Deserialization)(?:Error|Exception)?$",
        ),
        (
            "config",
            rb"^(?:Config\w*|MissingMandatory\w*|OverrideParse|MissingConfig"
            rb"|Interpolation\w*|Validation|Argument|ArgumentType|Scanner|Parser"
            rb"|Constructor|Composer|Duplicate\w*Key\w*|YAML|TOMLDecode|Usage|BadParameter"
            rb"|HFValidation|InvalidArgument|DeepSpeedConfig|OmegaConfBase)(?:Error"
            rb"|Exception)?$|^MissingMandatoryValue$",
        ),
        ("gpu_fault", rb"^NVMLError\w*$"),
        ("nonfinite", rb"^(?:FloatingPoint|NaN\w*|NonFinite\w*|Diverged\w*)(?:Error|Exception)$"),
    )
)
# Functions whose exceptions are about what they work on, whatever class they have. The innermost
# that says something counts.
_PLACES = (
    (
        "checkpoint",
        re.compile(
            rb"\bin \w*(?:load|restore|resume)\w*(?:checkpoint|ckpt|state_dict|optimizer)\w*|\bin"
            rb" \w*(?:checkpoint|ckpt)\w*_?(?:load|restore|resume)\w*|torch/serialization\.py\","
            rb" line \d+, in _?load\b|in create_default_local_load_plan|/dist_checkpointing/\S+\","
            rb" line \d+, in load|checkpoint/state_dict_loader"
        ),
    ),
    (
        "config",
        re.compile(
            rb"\bin"
            rb" \w*(?:validate|check|parse|sanity)_?\w*(?:args|config|arguments|options)\w*|\bin"
            rb" __post_init__|\bin"
            rb" (?:_do_sanity_check|_batch_assertion|_configure_train_batch_size|from_ymls"
            rb"|parse_args_into_dataclasses|_parse_known_args)|argparse\.py\"|/omegaconf/"
            rb"|/hydra/_internal/config|/pydantic/"
        ),
    ),
)


def classify(line: bytes, frames: bytes = b"") -> tuple[str, bool]:
    """(failure class, whether the line itself tells it) of an exception's line; `program` when
    nothing is more special.

    `frames`: the traceback above it. A class that only the frames tell yields to any that the
    line's words tell.
    """
    line = without_prefix(line)
    found = RAISED.match(line)
    name = found[1] if found else b""
    if not name:
        last = _LAST.match(line)
        name = last[1] if last else b""
    short = name.partition(b"(")[0].rpartition(b".")[2]
    told = _by_errno(line)
    if _OFFLINE.match(short) or (_CANNOT.search(line) and _INTERNET.search(line)):
        told = "communication" if PRIVATE.search(line) else "missing_file"
    elif short == b"OutOfMemoryError" and b"ray." in name:
        told = "host_oom"
    told = told or next((failure for failure, known in _CLASSES if known.match(short)), None)
    if told:
        return told, True
    if _TIMED_OUT.search(line):
        return "communication", False
    if short in (b"OSError", b"EnvironmentError") and _NOT_THERE.search(line):
        return "missing_file", True
    frames = frames[-MOST:]
    if _importing(frames):
        return "environment", False
    last_place = max(
        ((_last_start(pattern, frames), failure) for failure, pattern in _PLACES), default=(-1, "")
    )
    if last_place[0] >= 0:
        return last_place[1], False
    checked = short in (b"ValueError", b"AssertionError", b"NotImplementedError")
    return "config" if checked and _SETTINGS.search(line) else "program", False


def _by_errno(line: bytes) -> str | None:
    """What the number of a system call's error tells, by what it was about: a path, a socket, or a
    server on the internet."""
    errno = _ERRNO.search(line)
    failure = _ERRNOS.get(int(next(filter(None, errno.groups())))) if errno else None
    if errno and b"107" in errno[0] and not OF_FILE.search(line):
        failure = "communication"
    if failure == "communication" and _INTERNET.search(line) and not PRIVATE.search(line):
        return "missing_file"
    return failure


def _importing(frames: bytes) -> bool:
    """Whether a package's own top level was running: it raised while it was imported."""
    found = _FRAME.findall(frames)
    if not found:
        return False
    of_packages = [b"-packages/" in path for path, _ in found]
    last_at_top = of_packages[-1] and found[-1][1] == b"<module>"
    within = any(package and name == b"<module>" for package, (_, name) in zip(of_packages, found))
    return last_at_top or (within and b"runpy" not in frames)


def _last_start(pattern: re.Pattern[bytes], text: bytes) -> int:
    start = -1
    for found in pattern.finditer(text):
        start = found.start()
    return start


def is_open(text: bytes) -> int:
    """Where an unfinished traceback at the end of `text` (whole lines) begins, -1 when there is
    none. With several ranks writing at once the first that is unfinished counts."""
    ends = LastLines(text)
    begin = -1
    position = text.find(HEADER, max(len(text) - MOST, 0))
    while position >= 0:
        if ends.of(position) is not None:
            begin = -1
        elif begin < 0:
            begin = text.rfind(b"\n", 0, position) + 1
        position = text.find(HEADER, position + 1)
    return begin


class LastLines:
    """The ends of the tracebacks in one text, in time that its bytes bound, however many there
    are."""

    def __init__(self, text: bytes):
        self.text = text
        self._flat = text.translate(_DIGITS)
        # by how the lines of a traceback begin: (from where on was looked, what was found)
        self._known: dict[bytes, tuple[int, tuple[int, int] | None]] = {}

    def of(self, position: int) -> tuple[int, int] | None:
        """(start, end) of the line that names the exception of the traceback whose header is at
        `position`; None: not there yet. Ask in the order of the text.

        Lines of other ranks in between are passed over: those do not begin as the header's line
        does, but for its digits.
        """
        start = self.text.rfind(b"\n", max(position - 400, 0), position) + 1
        start = max(start, self.text.rfind(b"\r", start, position) + 1)
        like = b"\n" + self._flat[start:position]
        limit = min(len(self.text), position + MOST) - 1
        at = self.text.find(b"\n", position, limit)
        if at < 0:
            return None
        looked, found = self._known.get(like, (0, None))
        if found is None or found[0] <= at:
            looked, found = self._next(like, max(at, looked), limit)
            self._known[like] = looked, found
        return found if found and found[0] <= limit else None

    def _next(self, like: bytes, at: int, limit: int) -> tuple[int, tuple[int, int] | None]:
        while 0 <= (at := self._flat.find(like, at, limit + len(like))) < limit:
            end = self.text.find(b"\n", at + 1)  # once for each line at most
            if end < 0:
                return at, None
            body = self.text[at + len(like) : min(end, at + len(like) + 400)]
            if _LAST.match(body) and not _NO_CLASS.match(body):
                return at, (at + 1, end)
            at = end
        return max(limit, 0), None


def is_ignored(text: bytes, position: int) -> bool:
    """Whether Python says, on the line above the header, that this exception ended nothing."""
    start = text.rfind(b"\n", max(position - 400, 0), position)
    above = text.rfind(b"\n", max(start - 400, 0), max(start, 0))
    return bool(_IGNORED.search(text, max(above, 0), position))
