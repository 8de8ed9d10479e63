"""Data, packing, loss masks and tokenizer: what decides whether the prompts are trained on and
samples stay whole."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from hpctrain.config.run import RunSpec
from hpctrain.recipes.facts import Fact, Indexed, Masks
from hpctrain.recipes.neox.draft import RUN, Draft
from hpctrain.recipes.rules import Rule

SPLITS = ("train", "valid", "test")
PACKING = {"tilde": "k_bin_packed", "upstream": "pack_until_overflow"}
# The control tokens of the fork's preprocess_sft.py: 7 `<|user|>` and 8 `<|assistant|>`, each
# opener and closer.
LOSS_MASKS = {"loss_mask_pairs": [7, 7], "loss_mask_alternating_individual": [8]}
_MASK_KEYS = ("loss_mask_pairs", "loss_mask_individual", "loss_mask_alternating_individual")
_SUFFIX = re.compile(r"\.(bin|idx)\Z")
_NEEDS_VOCAB = ("gpt2bpetokenizer", "spmtokenizer", "hftokenizer", "tiktokentokenizer")

Where = Callable[..., str]


def decide_data(draft: Draft, data: Mapping[str, Sequence[str]], where: Where) -> None:
    """train/valid/test_data_paths, all or none (arguments.py:1339-1353); weights and labels of
    equal length."""
    if data.get("train") and draft.given("data_path"):
        draft.check(
            Rule(
                draft.layer("data_path") == RUN,
                "`data_path` and `data.train` exclude each other",
                "data_path",
                hint="delete `data_path`",
            )
        )
        draft.drop("data_path", f"the run gives `data.train` at {where('data', 'train')}")
    for split in SPLITS:
        key = f"{split}_data_paths"
        if not data.get(split):
            continue
        draft.own(
            key, list(data[split]), f"`data.{split}`", hint=f"set `data: {{{split}: …}}` only"
        )
        if key in draft.decisions:
            draft.decisions[key] = replace(draft.decisions[key], origin=where("data", split))
        weights = draft.values.get(f"{split}_data_weights")
        if (
            weights is not None
            and draft.layer(f"{split}_data_weights") != RUN
            and len(weights) != len(data[split])
        ):
            draft.drop(
                f"{split}_data_weights",
                f"they belong to the base config's {len(weights)} data sets",
            )
        labels = draft.values.get(f"{split}_label_data_paths")
        if labels is not None and draft.layer(f"{split}_label_data_paths") != RUN:
            draft.drop(f"{split}_label_data_paths", "they belong to the base config's data sets")
    if not draft.given("train_data_paths"):
        draft.check(
            Rule(
                draft.missing("train_data_paths") and not draft.given("data_path"),
                "no training data",
                where=where("data"),
                hint="data: {train: [/path/to/sft_text_document]}, a prefix without .bin",
            )
        )
        return
    draft.check(
        Rule(
            draft.given("data_path"),
            "`data_path` and `train_data_paths` exclude each other",
            "data_path",
            hint="delete `data_path`",
        )
    )
    filled = _fill_in(draft, where)
    for split in SPLITS:
        if split not in filled:
            _check_split(draft, split, data, where)
    draft.check(
        Rule(
            draft.given("split") and draft.layer("split") == RUN,
            "`split` has no effect when training, validation and test data are given apart",
            "split",
            hint="delete it",
            level="warning",
        )
    )


def _fill_in(draft: Draft, where: Where) -> list[str]:
    """Validation and test data are needed when training data is given; where they lack, the
    training data stands in."""
    train = draft.values["train_data_paths"]
    filled = [split for split in ("valid", "test") if draft.missing(f"{split}_data_paths")]
    for split in filled:
        draft.put(
            f"{split}_data_paths",
            list(train),
            "NeoX needs all three or none, and the run names no data of its own for it",
        )
        for kind in ("weights", "label"):
            source, target = (
                f"{part}_data_weights" if kind == "weights" else f"{part}_label_data_paths"
                for part in ("train", split)
            )
            if draft.given(source):
                draft.put(target, list(draft.values[source]), "the same as for training")
            else:
                draft.drop(target, "the training data stands in")
    draft.check(
        Rule(
            filled,
            f"no {' and '.join(filled)} data, so the training data stands in: the validation loss"
            " says nothing about unseen text",
            where=where("data"),
            why="NeoX needs training, validation and test data, or none of them",
            hint="data: {valid: [/path/to/held_out_text_document]}",
            level="warning",
        )
    )
    return filled


def _check_split(draft: Draft, split: str, data: Mapping[str, Sequence[str]], where: Where) -> None:
    paths = draft.values.get(f"{split}_data_paths")
    if paths is None:
        return
    given = bool(data.get(split))
    for index, path in enumerate(paths):
        at = where("data", split, index) if given else draft.where(f"{split}_data_paths", index)
        if not isinstance(path, str) or not path:
            draft.error(f"a data prefix must be text, not `{path}`", where=at)
        elif _SUFFIX.search(path):
            draft.error(
                f"`{path}` is a file, and NeoX wants the prefix of a .bin and an .idx",
                where=at,
                why="it appends both suffixes itself",
                hint=f"write {_SUFFIX.sub('', path)}",
            )
    draft.check(Rule(not paths, f"`{split}_data_paths` is empty", f"{split}_data_paths"))
    for other in (f"{split}_data_weights", f"{split}_label_data_paths"):
        values = draft.values.get(other)
        if values is not None and len(values) != len(paths):
            draft.error(
                f"`{other}` has {len(values)} entries for {len(paths)} data sets",
                other,
                hint="one for each data set, in the same order",
            )


def decide_reading(draft: Draft) -> None:
    """How data is read: data_impl, and the keys of other kinds of training."""
    impl = draft.get("data_impl")
    if impl == "infer":
        draft.check(
            Rule(
                draft.layer("data_impl") == RUN,
                "`data_impl: infer` does not work in NeoX, so `mmap` is written",
                "data_impl",
                hint="delete it",
                level="warning",
            )
        )
        draft.put(
            "data_impl",
            "mmap",
            "NeoX's own default `infer` finds no reader and stops (data/indexed_dataset.py:62-76)",
        )
    interval = draft.number("eval_interval")
    draft.check(
        Rule(
            "eval_interval" not in draft.broken and (interval is None or interval < 1),
            "`eval_interval` must be at least 1",
            "eval_interval",
            why="NeoX divides by it when it counts its validation samples (data/data_utils.py)",
            hint="to validate less, set `eval_iters: 1`, or an `eval_interval` above `train_iters`",
        )
    )
    for key, good in (("train_impl", "normal"), ("dataset_impl", "gpt2")):
        value = draft.get(key)
        draft.check(
            Rule(
                value != good,
                f"`{key}: {value}` is not plain supervised training, and this recipe does not"
                " check it",
                key,
                level="warning",
            )
        )


def decide_packing(draft: Draft) -> None:
    """pack_impl: samples must stay whole, or the loss mask of a row goes wrong."""
    flavor, best = draft.flavor, PACKING[draft.flavor]
    if draft.missing("pack_impl"):
        draft.put(
            "pack_impl",
            best,
            "keeps every conversation whole in its row; NeoX's default `packed` cuts and joins"
            " them",
        )
    value = str(draft.get("pack_impl") or "").lower()
    if value == "packed" and "pack_impl" not in draft.broken:
        draft.error(
            "`pack_impl: packed` cuts conversations in two and joins the rest to others",
            "pack_impl",
            why=(
                "fine-tuning needs whole samples: a loss mask that is open at a cut flips for the"
                " rest of the row"
            ),
            hint=f"pack_impl: {best}",
        )
    elif value == "pack_until_overflow" and flavor == "tilde":
        draft.warn(
            "`pack_impl: pack_until_overflow` keeps conversations whole but leaves more padding"
            " than k_bin_packed",
            "pack_impl",
            hint="pack_impl: k_bin_packed",
        )
        if draft.get("allow_chopped"):
            draft.put(
                "allow_chopped",
                False,
                "a conversation longer than a row would lose its closing marker",
            )
    elif value == "unpacked":
        draft.check(
            (
                Rule(
                    flavor == "upstream" and not draft.given("train_label_data_paths"),
                    "`pack_impl: unpacked` needs `train_label_data_paths`",
                    "pack_impl",
                    why="NeoX reads the labels without asking whether there are any"
                    " (data/gpt2_dataset.py:361)",
                    hint=f"pack_impl: {best}",
                ),
                Rule(
                    True,
                    "`pack_impl: unpacked` gives every conversation a row of its own, mostly"
                    " padding",
                    "pack_impl",
                    hint=f"pack_impl: {best}",
                    level="warning",
                ),
            )
        )
    draft.check(
        Rule(
            draft.given("train_epochs") and value != "packed" and "pack_impl" not in draft.broken,
            f"`train_epochs` does not work with `pack_impl: {value}`",
            "train_epochs",
            why="NeoX allows epochs with `packed` only (data/data_utils.py:483-524), which cuts"
            " conversations",
            hint="count the rows with `hpctrain data count` and set `train_iters`",
        )
    )


def decide_loss_mask(draft: Draft) -> None:
    """Prompts must not be trained on: loss_mask_* in the fork, label data upstream."""
    labels = draft.given("train_label_data_paths")
    if draft.flavor == "upstream":
        draft.check(
            Rule(
                not labels,
                "prompts are trained on like replies, since there are no labels",
                "train_label_data_paths",
                why="upstream NeoX masks with a second data set of labels, -100 where nothing is"
                " learnt",
                hint="write one with NeoX's preprocess_data_with_chat_template.py and name it:"
                " config: {train_label_data_paths: […]}",
                level="warning",
            )
        )
        return
    given = [key for key in _MASK_KEYS if key in draft.values or key in draft.broken]
    for key in given:
        value = draft.values.get(key) or []
        draft.check(
            (
                Rule(
                    any(
                        isinstance(item, bool) or not isinstance(item, int) or item < 0
                        for item in value
                    ),
                    f"`{key}: {value}` must be token ids",
                    key,
                    hint="a flat list of numbers: [7, 7]",
                ),
                Rule(
                    key == "loss_mask_pairs" and len(value) % 2,
                    f"`loss_mask_pairs` has {len(value)} ids, and it is a flat list [open, close,"
                    " open,"
                    " close]",
                    key,
                    why="the fork stops with a ValueError in the first step",
                    hint="[7, 7] when one token opens and closes",
                ),
            )
        )
    if labels:
        if any(draft.values.get(key) for key in given):
            draft.warn(
                "`loss_mask_*` together with label data",
                given[0],
                why="the fork's masks look at the tokens and break where labels differ from them",
                hint="use one of the two",
            )
    elif not given:
        reason = (
            "without it the fork trains on the prompts: the old switch SFT_ENABLED is only printed"
            " since its commit ab1c506"
        )
        draft.put(
            "loss_mask_pairs",
            list(LOSS_MASKS["loss_mask_pairs"]),
            f"masks the user's turns, from <|user|> to <|user|>; {reason}",
        )
        draft.put(
            "loss_mask_alternating_individual",
            list(LOSS_MASKS["loss_mask_alternating_individual"]),
            f"masks the opening <|assistant|>, trains the closing one; {reason}",
        )
    elif not any(draft.values.get(key) for key in given) and not draft.broken & set(given):
        draft.warn(
            "the loss masks are empty, so prompts are trained on like replies",
            given[0],
            hint=(
                "loss_mask_pairs: [7, 7] and loss_mask_alternating_individual: [8], or delete both"
                " keys"
            ),
        )
    elif not draft.values.get("loss_mask_pairs"):
        draft.warn(
            "`loss_mask_pairs` is not set, so the user's turns are trained on",
            given[0],
            hint="loss_mask_pairs: [7, 7]",
        )


def check_tokenizer(draft: Draft) -> None:
    """The tokenizer's files are named, as build_tokenizer asserts
    (megatron/tokenizer/tokenizer.py:40-70)."""
    kind = str(draft.get("tokenizer_type") or "")
    if kind.lower() in _NEEDS_VOCAB and draft.missing("vocab_file"):
        default = "" if draft.given("tokenizer_type") else ", NeoX's default,"
        draft.error(
            f"`vocab_file` is missing, and {kind}{default} needs it",
            "tokenizer_type",
            hint="tokenizer_type: SPMTokenizer with vocab_file: /path/to/model.model",
        )
    draft.check(
        Rule(
            kind.lower() == "gpt2bpetokenizer" and draft.missing("merge_file"),
            f"`merge_file` is missing, and {kind} needs it",
            "tokenizer_type",
        )
    )


def facts(draft: Draft, spec: RunSpec, folder: str, data_parallel: int | None) -> tuple[Fact, ...]:
    """What `check` opens: the data of each split, with all that must fit it. Paths that are
    relative are relative to NeoX's `folder`."""
    found = []
    for split in SPLITS:
        key = f"{split}_data_paths"
        paths = draft.values.get(key)
        if not isinstance(paths, list) or (split != "train" and not spec.data.get(split)):
            continue  # the training data stands in
        given = bool(spec.data.get(split))
        prefixes = tuple(
            (
                os.path.join(folder, path),
                spec.where("data", split, index) if given else draft.where(key, index),
            )
            for index, path in enumerate(paths)
            if isinstance(path, str) and path
        )
        vocabulary = draft.values.get("vocab_file")
        found.append(
            Indexed(
                prefixes,
                draft.number("seq_length"),
                draft.where("seq_length"),
                packed=str(draft.get("pack_impl") or "").lower() != "unpacked",
                skips=str(draft.get("pack_impl") or "").lower() == PACKING["tilde"],
                masks=_mask_facts(draft),
                needs_eod=_needs_eod(draft, spec),
                tokenizer=os.path.join(folder, str(vocabulary)) if _sentencepiece(draft) else None,
                where_tokenizer=draft.where("vocab_file"),
                rows=_rows(draft, data_parallel) if split == "train" else None,
                where_rows=draft.where("train_iters"),
            )
        )
    return tuple(found)


def _mask_facts(draft: Draft) -> Masks | None:
    """The masks of the fork, the only ones that go by token ids; labels mask by themselves."""
    if draft.flavor != "tilde" or draft.given("train_label_data_paths"):
        return None
    ids = [tuple(draft.values.get(key) or ()) for key in _MASK_KEYS]
    pairs, individual, alternating = ids
    return Masks(pairs, alternating, individual, *(draft.where(_MASK_KEYS[at]) for at in (0, 2, 1)))


def _needs_eod(draft: Draft, spec: RunSpec) -> str:
    """Why every document must end with its token. The fork cuts attention at it where
    CURSE_ATTENTION is set, as the recipe does by itself."""
    if draft.flavor == "tilde" and str(spec.env.get("CURSE_ATTENTION", "1")) not in ("", "0"):
        return "CURSE_ATTENTION cuts a row at that token: without it documents see each other"
    if draft.get("reset_attention_mask") or draft.get("eod_mask_loss"):
        return "`reset_attention_mask` and `eod_mask_loss` go by that token"
    return ""


def _sentencepiece(draft: Draft) -> bool:
    kind = str(draft.get("tokenizer_type") or "").lower()
    return kind == "spmtokenizer" and isinstance(draft.values.get("vocab_file"), str)


def _rows(draft: Draft, data_parallel: int | None) -> int | None:
    """Rows that the run trains on in all."""
    iterations, batch = draft.number("train_iters"), draft.number("train_batch_size")
    return iterations * batch if iterations and batch and data_parallel else None
