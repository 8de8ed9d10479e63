"""DeepSpeed checkpoints that exist whole or not at all, and starting from them.

    DIR/partial_global_step20/   while ranks write; never named by `latest`
    DIR/global_step20/           all files on disk: DeepSpeed's, hpctrain.json, config.json and
                                 tokenizer.model
    DIR/latest                   `global_step20`, replaced by rename after that

DeepSpeed itself writes `latest` in place, and only its own rank 0 decides when
(deepspeed/runtime/engine.py, `save_checkpoint`): a crash meanwhile leaves an empty name, or one of
a checkpoint that is not whole.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from hpctrain.base.errors import EnvironmentFault, Problem, Refused, UsageError, need
from hpctrain.base.files import read_json, sync
from hpctrain.config.trust import require_trust, trusted
from hpctrain.runtime.files import write_atomic

META = "hpctrain.json"
TAG = re.compile(r"global_step(\d+)\Z", re.ASCII)


@dataclass(frozen=True)
class Progress:
    """Where a run is, as its checkpoint tells the next link; written to hpctrain.json."""

    # made up by the link that began the run; tells our checkpoints from others in the same
    # directory
    run_id: str
    iteration: int
    consumed_samples: int
    num_ranks: int
    zero_stage: int
    precision: str
    data_fingerprint: str
    config: dict[str, Any]
    data_content: str = ""  # empty in checkpoints of earlier versions
    train_batch_size: int = 0  # 0 in those


class CannotSave(EnvironmentFault):
    """A rank could not write its part; the others may not know why."""

    of_one_rank = True


@dataclass(frozen=True)
class Change:
    """Something that may not change when a run goes on: whether it did, in words, why it may not,
    and what to do."""

    happened: bool
    what: str
    why: str
    hint: str


AnyProgress = TypeVar("AnyProgress")


def save(
    engine: Any,
    directory: str,
    progress: Progress,
    extra_files: dict[str, bytes],
    barrier: Callable[[], None],
    rank: int,
) -> str:
    """Write DeepSpeed's `global_stepN` on all ranks together and name it in `latest`; returns its
    path. See `publish`."""

    def write(partial: str) -> None:
        tag, state = os.path.basename(partial), {"hpctrain": asdict(progress)}
        engine.save_checkpoint(directory, tag=tag, client_state=state, save_latest=False)
        for name in os.listdir(partial):
            if _writer_of(name) == rank:
                sync(os.path.join(partial, name))

    meta = json.dumps(asdict(progress), indent=1).encode()
    return publish(
        directory,
        f"global_step{progress.iteration}",
        write,
        {**extra_files, META: meta},
        barrier,
        rank=rank,
    )


def publish(
    directory: str,
    tag: str,
    write: Callable[[str], None],
    extra_files: dict[str, bytes],
    barrier: Callable[[], None],
    rank: int,
) -> str:
    """Write the checkpoint `tag` on all ranks together and name it in `latest`; returns its path.

    `write` puts this rank's files into the folder it is given and syncs them. A crash at any point
    leaves the checkpoints and `latest` of before. A directory or link that already has the name is
    set aside, never written into. Raises CannotSave on the rank whose disk refuses.
    """
    partial, final = os.path.join(directory, "partial_" + tag), os.path.join(directory, tag)
    try:
        if rank == 0:
            os.makedirs(directory, exist_ok=True)
            remove_own(partial)
        barrier()
        write(partial)
        if rank == 0:
            for name, content in extra_files.items():
                _write_synced(os.path.join(partial, name), content)
        barrier()  # every rank's files are on disk
        if rank == 0:
            sync(partial)
            set_aside(final)
            os.rename(partial, final)
            sync(directory)
            write_latest(directory, tag)
        barrier()
    except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError for a full disk
        if rank == 0:
            with contextlib.suppress(OSError):
                remove_own(partial)  # what nobody will read must not fill the disk
        raise CannotSave(
            f"rank {rank} cannot save `{tag}`: {describe_failure(error)}",
            where=directory,
            why="`latest` names what it named before",
            hint="free space or mend the folder; the next link goes on from there",
        ) from error
    return final


def describe_failure(error: BaseException) -> str:
    """What the system said, where it said something: torch tells of a full disk only how far it
    came."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "inline_container" in first or "PytorchStreamWriter" in first:
        # torch's writer counts what the disk took, and forgets why it did not take the rest.
        return (
            "No space left on device, or a quota is used up: a file came out too short (torch:"
            f" {first})"
        )
    return first


def check_writable(folder: str) -> None:
    """Make `folder` and write in it, now and not after hours of training. Raises EnvironmentFault
    where that fails."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EnvironmentFault(f"cannot write here: {error.strerror}", where=folder) from error


def set_aside(path: str) -> str | None:
    """Rename whatever is at `path` to `set_aside_…` beside it; returns the new path, None when
    nothing was there."""
    if not os.path.lexists(path):
        return None
    directory, name = os.path.split(path)
    aside = _free_name(os.path.join(directory, f"set_aside_{name}"))
    os.rename(path, aside)
    print(f"hpctrain: {path} existed and is now {aside}", flush=True)
    return aside


def write_latest(directory: str, tag: str) -> None:
    """Replace DIR/latest so that every reader sees the old name or the new one, whole."""
    write_atomic(os.path.join(directory, "latest"), tag)


def prune(directory: str, run_id: str, keep: int, pattern: re.Pattern[str] = TAG) -> list[str]:
    """Delete this run's checkpoints but the `keep` newest; returns the paths deleted.

    Only real directories whose hpctrain.json carries `run_id` are looked at, never a link, and
    never what `latest` names.
    """
    mine = []
    for name in os.listdir(directory):
        path = os.path.join(directory, name)
        match = pattern.match(name)
        if match and os.path.isdir(path) and not os.path.islink(path):
            if read_meta(path).get("run_id") == run_id:
                mine.append((int(match.group(1)), path))
    with open(os.path.join(directory, "latest"), encoding="utf-8") as file:
        latest = file.read().strip()
    old = [path for _, path in sorted(mine)[:-keep] if os.path.basename(path) != latest]
    for path in old:
        # First under a name that no reader takes for a checkpoint, so that half a deletion is not
        # half a checkpoint.
        doomed = _free_name(os.path.join(directory, "partial_" + os.path.basename(path)))
        os.rename(path, doomed)
        remove_own(doomed)
    return old


def read_progress(checkpoint: str, kind: type[AnyProgress]) -> AnyProgress | None:
    """What hpctrain.json of a checkpoint says, or None when a trainer with another kind of progress
    made it."""
    values = read_meta(checkpoint)
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    try:
        return kind(**{name: value for name, value in values.items() if name in names})
    except TypeError:
        return None


def read_meta(checkpoint: str) -> dict[str, Any]:
    """The hpctrain.json of a checkpoint, empty when there is none that can be read."""
    return read_json(os.path.join(checkpoint, META)) or {}


def progress_to_resume(checkpoint: str, kind: type[AnyProgress]) -> AnyProgress:
    """The progress of a checkpoint that a run is to go on from. Raises UsageError where it tells
    none."""
    then = read_progress(checkpoint, kind)
    if then is None:
        raise UsageError(
            f"`{checkpoint}` has no readable {META}, so where its run stood is not known",
            hint="start from it in mode finetune; that takes its weights only",
        )
    return then


def refuse_changes(checkpoint: str, changes: Iterable[Change]) -> None:
    """Raises Refused with all of the changes that happened."""
    problems = [
        Problem(f"cannot resume: {change.what}", checkpoint, change.why, change.hint)
        for change in changes
        if change.happened
    ]
    if problems:
        raise Refused(problems)


def check_resume(
    checkpoint: str, now: Progress, model: Mapping[str, Any] | None = None
) -> Progress:
    """The progress of `checkpoint` if this run can go on from it exactly; else Refused, with
    everything that stands against it.

    `model` is the config of the model that is to go on.
    """
    then = progress_to_resume(checkpoint, Progress)
    other = changed_model(checkpoint, model or {})
    other_data = then.data_fingerprint != now.data_fingerprint
    other_tokens = then.data_content and now.data_content not in ("", then.data_content)
    back = "go back to {}, or start from it in mode finetune, which takes the weights only"
    data_back = "put the old data back, or start from it in mode finetune"
    refuse_changes(
        checkpoint,
        [
            Change(
                then.precision != now.precision,
                f"`precision` was {then.precision} and is {now.precision}",
                "the optimizer state has that form",
                back.format(then.precision),
            ),
            Change(
                then.zero_stage != now.zero_stage,
                f"`zero_stage` was {then.zero_stage} and is {now.zero_stage}",
                "the optimizer state is cut that way",
                back.format(then.zero_stage),
            ),
            Change(
                # With stage 0 every rank holds the whole state: any number of ranks can take it.
                bool(now.zero_stage) and then.num_ranks != now.num_ranks,
                f"the number of ranks was {then.num_ranks} and is {now.num_ranks}",
                f"ZeRO stage {now.zero_stage} cuts the optimizer state into one part a rank",
                back.format(then.num_ranks),
            ),
            Change(
                other_data,
                "the data is not what the run was trained on",
                "document lengths, `train_data_paths`, `seq_length`, `pack_impl` or `seed` changed,"
                " so its place in the data means nothing",
                data_back,
            ),
            Change(
                bool(other_tokens) and not other_data,
                "the data has other tokens than the run was trained on",
                "each document is as long as before, and what the .bin files hold is not the same",
                data_back,
            ),
            Change(
                bool(other),
                f"`model` is another one: {', '.join(other)}",
                "its config.json says what was trained",
                "put the old config back, or begin a new run in another checkpoint folder",
            ),
        ],
    )
    return then


def changed_model(checkpoint: str, now: Mapping[str, Any]) -> list[str]:
    """What differs between a model's config and the one that a checkpoint holds, as `key old ->
    new`.

    Keys that only one of them has are of another release of transformers; some tell nothing of what
    is computed.
    """
    then = read_json(os.path.join(checkpoint, "config.json"))
    return [] if then is None else model_differences(then, now)


def model_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configs of models and decides what is computed; see
    `changed_model`."""
    old, new = (json.loads(json.dumps(dict(values), default=str)) for values in (then, now))
    about = re.compile(
        r"_.*|.*_token_id|architectures|dtype|torch_dtype|transformers_version|use_cache"
    )
    return [
        f"{key} {old[key]} -> {new[key]}"
        for key in sorted(new)
        if key in old and old[key] != new[key] and not about.fullmatch(key)
    ]


def changed_keys(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The config keys that changed since a checkpoint, as `key old -> new`."""
    return [
        f"{key} {then[key]} -> {now[key]}"
        for key in now
        if key in then and _plain(then[key]) != _plain(now[key])
    ]


def load_weights(model: Any, checkpoint: str) -> None:
    """Put a checkpoint's weights into a model, whatever the number of ranks was; nothing else of it
    is taken.

    To be called before DeepSpeed makes its fp32 copies. Raises UsageError when the weights do not
    fit.
    """
    model.load_state_dict(fitting(model.state_dict(), read_weights(checkpoint), checkpoint))


def fitting(own: Mapping[str, Any], state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Those tensors of `state` that a model with the tensors `own` has. Raises UsageError where
    some are missing or have another shape."""
    check_shapes(
        where,
        {name: tuple(value.shape) for name, value in own.items()},
        {name: tuple(value.shape) for name, value in state.items()},
    )
    return {name: state[name] for name in own}


def read_weights(checkpoint: str) -> dict[str, Any]:
    """All weights of a DeepSpeed checkpoint of this trainer, on the CPU, by their Hugging Face
    names.

    ZeRO 3 has no whole weights on disk: they are put together from the shards, in fp32. Raises
    UsageError when the checkpoint holds no weights, EnvironmentFault when a file cannot be read.
    """
    # DeepSpeed tells its life to stdout as soon as it is imported, and stdout is for data.
    with contextlib.redirect_stdout(io.StringIO()), plain_types(checkpoint):
        return _read_weights(checkpoint)


@contextlib.contextmanager
def plain_types(checkpoint: str) -> Iterator[None]:
    """Whatever loads `checkpoint` in here makes tensors and plain types only, also where its code
    asks for more (torch.load's documentation has the variable).

    Only what nobody else can have written may name other classes. Raises Refused for the rest.
    """
    if trusted(checkpoint):
        yield
        return
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except pickle.UnpicklingError:
        require_trust(checkpoint, "this checkpoint, which names code to run,")
        raise
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)


def _read_weights(checkpoint: str) -> dict[str, Any]:
    torch = need("torch", "train")
    whole = os.path.join(checkpoint, "mp_rank_00_model_states.pt")
    try:
        if os.path.isfile(whole):
            state = torch.load(whole, map_location="cpu", weights_only=False, mmap=True)
            return dict(state["module"])
        if any("model_states" in name for name in os.listdir(checkpoint)):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            directory, tag = os.path.split(os.path.realpath(checkpoint))
            return dict(get_fp32_state_dict_from_zero_checkpoint(directory, tag))
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise EnvironmentFault(f"cannot read the weights: {error}", where=checkpoint) from error
    raise UsageError(
        "this is no DeepSpeed checkpoint: it has no *model_states.pt", where=checkpoint
    )


def check_shapes(where: str, want: Mapping[str, Any], have: Mapping[str, Any]) -> None:
    """Raises UsageError when weights do not fit a model, naming the first few tensors that are
    missing or have another shape. Both are {name: shape}."""
    missing = sorted(set(want) - set(have))
    shapes = [
        f"{name} {have[name]} instead of {want[name]}"
        for name in sorted(want)
        if name in have and have[name] != want[name]
    ]
    found = []
    if missing:
        found.append(f"{len(missing)} tensors are missing, such as {', '.join(missing[:3])}")
    if shapes:
        found.append(f"{len(shapes)} tensors have another shape, such as {'; '.join(shapes[:3])}")
    if found:
        raise UsageError(
            [Problem(f"the weights do not fit the model: {what}", where=where) for what in found]
        )


def remove_own(path: str) -> None:
    """Delete a directory that this module made; a link of that name is only unlinked."""
    if os.path.islink(path):
        os.unlink(path)
    elif os.path.isdir(path):
        shutil.rmtree(path)


def _writer_of(name: str) -> int:
    """The rank that writes a file of a checkpoint: optimizer shards by their rank, everything else
    by rank 0."""
    match = re.search(r"zero_pp_rank_(\d+)_", name)
    return int(match.group(1)) if match else 0


def _write_synced(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _free_name(wanted: str) -> str:
    name, number = wanted, 1
    while os.path.lexists(name):
        number += 1
        name = f"{wanted}_{number}"
    return name


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
