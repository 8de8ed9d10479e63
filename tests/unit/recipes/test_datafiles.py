"""A file that a trainer cannot read is told by its name, before a job finds out."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.plan.check import find_problems
from hpctrain.plan.load import load_plan

EXAMPLES = Path(__file__).parents[3] / "examples"


def errors(example, *changes):
    return load_plan(str(EXAMPLES / example / "run.yaml"), changes).plan.errors


@pytest.mark.parametrize("example", ["lumi-sft", "lumi-neox-sft"])
def test_rows_given_to_a_trainer_of_tokens_are_refused_with_the_verb_that_makes_them(example):
    for name in ("/scratch/x.jsonl", "/scratch/x.Parquet", "/scratch/it's $(x).txt"):
        (problem,) = [
            p
            for p in errors(example, f'data.train=["{name}"]')
            if "is no indexed dataset" in p.what
        ]
        assert name in problem.what and "hpctrain tokenize" in problem.hint
    assert errors(example) == []


@pytest.mark.parametrize("example", ["hf-sft", "lumi-dpo"])
def test_what_holds_no_rows_is_refused_by_a_trainer_of_rows(example):
    for name, hint in (
        ("/scratch/x.csv", "write it as .jsonl"),
        ("/scratch/x.bin", "tokenized from"),
        ("/scratch/x.jsonl.gz", "write it as .jsonl"),
    ):
        (problem,) = [
            p
            for p in errors(example, f"data.train=[{name}]")
            if "none of the files that are read" in p.what
        ]
        assert hint in problem.hint
    for name in ("/scratch/x.jsonl", "/scratch/x.parquet", "/scratch/a.folder", "/scratch/x.arrow"):
        assert errors(example, f"data.train=[{name}]") == []


def test_a_key_of_the_training_beside_it_is_sent_to_its_table():
    (problem,) = errors("lumi-dpo", "config.beta=0.2")
    assert problem.what == "unknown key `beta`" and problem.hint == "it is `dpo_training.beta`"


def test_a_file_that_is_not_there_is_said_once():
    found = find_problems(load_plan(str(EXAMPLES / "lumi-sft" / "run.yaml")))
    for ending in ("bin", "idx"):
        (problem,) = [
            problem for problem in found if f"sft_text_document.{ending}`" in problem.what
        ]
        assert "hpctrain tokenize" in problem.hint
