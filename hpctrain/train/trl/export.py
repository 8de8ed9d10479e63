"""A checkpoint as one plain model: the update merged into its full-precision base, and the result
proved before it appears.

base + update (fp32) -> merged -> written, read back -> logits and size compared -> renamed into
place
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hpctrain.base.errors import EnvironmentFault, HpctrainError, Refused, UsageError, need
from hpctrain.base.units import format_size
from hpctrain.config.trainers.dpo import find_source
from hpctrain.config.trainers.trl import quantised_name
from hpctrain.train.core.checkpoint import read_meta
from hpctrain.train.core.export import DTYPES, publish_model, tokenizer_files, write_about
from hpctrain.train.core.source import Checkpoint
from hpctrain.train.trl import base as bases
from hpctrain.train.trl.prepare import load_rows

_STORED = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp32"}
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# Largest share of the logits' own size by which they may differ: what rounding the weights once to
# the format does, with room (measured on Llama shapes: 3e-7 for fp32, 4e-4 for fp16, 4e-3 for
# bf16).
TOLERANCE = {"bf16": 0.03, "fp16": 0.005, "fp32": 1e-4}
ROWS, TOKENS = 4, 64


@dataclass(frozen=True)
class Proof:
    """How the written model compares with base + update, over the same tokens.

    `difference` and `update_effect` are shares of the logits' own size (root mean squares): between
    what was written and base + update, and between base + update and the base alone (None for a run
    that trained all weights).
    """

    parameters: int
    num_bytes: int
    file_bytes: int
    difference: float
    max_difference: float
    same_top_token: float
    update_effect: float | None
    tokens_compared: int
    tolerance: float


def export_checkpoint(
    checkpoint: Checkpoint,
    directory: str,
    precision: str = "auto",
    base: str | None = None,
    say: Callable[[str], None] = print,
) -> tuple[list[str], Proof]:
    """Write a new Hugging Face directory with the merged model; returns its file names and the
    proof of it.

    `precision` auto is what the base is stored in; `base` tells where the base lies now. All of it
    or nothing appears. Raises Refused when `directory` exists; UsageError for a quantised base or
    an update of another one; EnvironmentFault for missing space; HpctrainError when what was
    written is not base + update.
    """
    target = os.path.abspath(directory)
    if os.path.lexists(target):
        raise Refused(f"`{directory}` exists", hint="name a directory that does not")
    return _publish(checkpoint, target, precision, base, say)


def _publish(
    checkpoint: Checkpoint,
    target: str,
    precision: str,
    base: str | None,
    say: Callable[[str], None],
    device: str = "",
    run_id: str = "",
) -> tuple[list[str], Proof]:
    adapter = bases.read_json(os.path.join(checkpoint.path, "adapter_config.json"))
    folder = _base_folder(checkpoint, adapter, base)
    weights = bases.check_base(folder)
    if adapter:
        bases.check_adapter(checkpoint.path, folder)
    stored = {_STORED[dtype] for dtype in weights.dtypes} if weights else {"bf16"}
    own = stored.pop() if len(stored) == 1 else "fp32"
    chosen = own if precision == "auto" else precision
    proofs: list[Proof] = []

    def fill(staged: str) -> None:
        _check_space(
            os.path.dirname(target), (weights.parameters if weights else 0) * _BYTES[chosen]
        )
        # Whatever the libraries have to say, stdout is for data.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            proof = _write(checkpoint, adapter, folder, staged, chosen, say, device)
        about = {
            "from": f"checkpoint-{checkpoint.iteration}",
            "iteration": checkpoint.iteration,
            "precision": chosen,
            "chat": {},
            "base": folder,
            "run_id": run_id,
            "proof": asdict(proof),
        }
        write_about(staged, about)
        proofs.append(proof)

    return publish_model(target, fill, run_id), proofs[0]


def export_finished(
    model: Any,
    tokenizer: Any,
    folder: str,
    target: str,
    step: int,
    checkpoint_dir: str,
    say: Callable[[str], None],
) -> None:
    """Leave the trained model of a run at `target` as a plain one, proved as `export_checkpoint`
    proves it.

    On the CPU: a GPU that trains has no room for a second base. What this run left there before is
    replaced, anything else set aside. Raises as `export_checkpoint`, but for an existing `target`.
    """
    os.makedirs(checkpoint_dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=checkpoint_dir) as given:
        model.save_pretrained(given, safe_serialization=True)
        tokenizer.save_pretrained(given)
        found = Checkpoint(given, step)
        proof = _publish(
            found, target, "auto", folder, say, device="cpu", run_id=run_id(checkpoint_dir)
        )[1]
    for line in describe(proof):
        say(line)
    say(f"wrote {target}")


def is_finished(target: str, step: int, checkpoint_dir: str) -> bool:
    """Whether `export_finished` left the model of this step of this run there."""
    about = read_meta(target)
    return (about.get("run_id"), about.get("iteration")) == (run_id(checkpoint_dir), step)


def run_id(checkpoint_dir: str) -> str:
    """What tells a run's models from others': its checkpoint folder, since the Trainer gives it no
    name."""
    return hashlib.sha256(
        os.path.realpath(checkpoint_dir).encode("utf-8", "surrogateescape")
    ).hexdigest()[:32]


def describe(proof: Proof) -> list[str]:
    """The proof in words, and a warning where rounding swallows what was trained."""
    lines = [
        (
            f"{proof.parameters:,} parameters in {proof.num_bytes:,} bytes of weights, as the model"
            " has them"
        ),
        (
            f"logits of what was written and of base + update differ by {proof.difference:.2g} of"
            f" their size (at most {proof.tolerance:g}; largest {proof.max_difference:.3g}), over"
            f" {proof.tokens_compared} tokens; the likeliest token is the same for"
            f" {100 * proof.same_top_token:.1f} %"
        ),
    ]
    if proof.update_effect is not None:
        lines.append(
            f"the update changes the base's logits by {proof.update_effect:.2g} of their size"
        )
        if proof.update_effect < 2 * proof.difference:
            lines.append(
                "warning: rounding changes about as much as the update does; export with"
                " --precision fp32, or train longer"
            )
    return lines


def _base_folder(checkpoint: Checkpoint, adapter: dict[str, Any], given: str | None) -> str:
    """Where the base lies: as given, else as the update says; a checkpoint of all weights is its
    own base."""
    if not adapter:
        return checkpoint.path
    name = given or str(adapter.get("base_model_name_or_path") or "")
    folder = find_source(name, os.getcwd(), "models") if name else None
    if folder is None:
        if quantised_name(name):
            bases.check_adapter(checkpoint.path, name)
        raise UsageError(
            f"the base `{name}` is not here",
            where=checkpoint.path,
            hint="say where it is with --base",
        )
    return os.path.abspath(folder)


def _check_space(folder: str, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need * 1.02:
        raise EnvironmentFault(
            f"the model takes {format_size(need)}, and {format_size(free)} are free", where=folder
        )


def _write(
    checkpoint: Checkpoint,
    adapter: dict[str, Any],
    folder: str,
    staged: str,
    precision: str,
    say: Callable[[str], None],
    place: str,
) -> Proof:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    torch, transformers = need("torch", "hf"), need("transformers", "hf")
    peft: Any = need("peft", "hf") if adapter else None
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(place or ("cuda" if torch.cuda.is_available() else "cpu"))
    say(f"base {folder}")
    model = bases.load_base(folder, torch.float32).to(device).eval()
    tokens = _tokens(checkpoint, model.config.vocab_size)
    plain = None
    if adapter:
        plain = _logits(model, tokens)
        model = peft.PeftModel.from_pretrained(model, checkpoint.path).to(device).eval()
    expected = _logits(model, tokens)
    if adapter:
        say(f"merging the update of checkpoint-{checkpoint.iteration} in fp32")
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:  # safe_merge: NaN in the result
            raise HpctrainError(
                f"the update cannot be merged: {error}", where=checkpoint.path
            ) from error
    model.config.use_cache = True
    model = model.to(getattr(torch, DTYPES[precision]))
    model.save_pretrained(staged, safe_serialization=True)
    parameters = _count(model)
    del model
    tokenizer_from = checkpoint.path if tokenizer_files(checkpoint.path) else folder
    for name in tokenizer_files(tokenizer_from):
        shutil.copyfile(os.path.join(tokenizer_from, name), os.path.join(staged, name))
    # What is compared is what was written: read back from the disk, its rounded weights computed
    # with in fp32.
    found = _logits(bases.load_base(staged, torch.float32).to(device).eval(), tokens)
    return prove(staged, parameters, precision, found, expected, plain)


def prove(
    staged: str, parameters: int, precision: str, found: Any, expected: Any, plain: Any
) -> Proof:
    """The proof of a written model. Raises HpctrainError with everything that is wrong with it.

    `found`, `expected`, `plain`: logits of what was written, of base + update, and of the base
    alone or None.
    """
    weights = bases.read_weights(staged)
    if weights is None:
        raise HpctrainError("nothing was written", where=staged)
    size = _rms(expected - expected.mean(-1, keepdim=True))
    proof = Proof(
        parameters=weights.parameters,
        num_bytes=weights.num_bytes,
        file_bytes=weights.file_bytes,
        difference=_rms(found - expected) / size,
        max_difference=float((found - expected).abs().max()),
        same_top_token=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
        update_effect=None if plain is None else _rms(expected - plain) / size,
        tokens_compared=int(expected.shape[0] * expected.shape[1]),
        tolerance=TOLERANCE[precision],
    )
    wrong = []
    if not proof.difference <= proof.tolerance:  # also NaN
        wrong.append(
            f"its logits differ from those of base + update by {proof.difference:.2g} of their"
            f" size, {proof.tolerance:g} is allowed"
        )
    if weights.parameters != parameters:
        wrong.append(
            f"it holds {weights.parameters:,} parameters, and the model has {parameters:,}"
        )
    if weights.num_bytes != parameters * _BYTES[precision]:
        wrong.append(
            f"it has {weights.num_bytes:,} bytes of weights, and {parameters:,} parameters in"
            f" {precision} are {parameters * _BYTES[precision]:,}"
        )
    if wrong:
        raise HpctrainError(
            "the merged model is not base + update, and was not kept",
            why="; ".join(wrong),
            hint="merge again; if it stays so, compare the packages with `hpctrain doctor`",
        )
    return proof


def _rms(values: Any) -> float:
    return float(values.double().pow(2).mean().sqrt())


def _logits(model: Any, tokens: Any) -> Any:
    with need("torch", "hf").no_grad():
        return model(input_ids=tokens.to(next(model.parameters()).device)).logits.float().cpu()


def _count(model: Any) -> int:
    """Values that a file of the model holds: shared ones once."""
    return sum({value.data_ptr(): value.numel() for value in model.state_dict().values()}.values())


def _tokens(checkpoint: Checkpoint, vocabulary: int) -> Any:
    """What is compared over: the beginnings of the run's own rows where they lie beside the
    checkpoint, filled up with arbitrary tokens, always the same."""
    torch = need("torch", "hf")
    tokens = torch.randint(
        0, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0)
    )
    for path in sorted(
        glob.glob(
            os.path.join(glob.escape(os.path.dirname(checkpoint.path)), "prepared-*", "data.arrow")
        )
    )[:1]:
        with contextlib.suppress(OSError, ValueError, KeyError, EnvironmentFault):
            rows = load_rows(path)
            for number in range(min(ROWS // 2, len(rows))):
                ids = rows[number]["input_ids"][:TOKENS]
                if max(ids) < vocabulary:
                    tokens[number, : len(ids)] = torch.tensor(ids)
    return tokens
