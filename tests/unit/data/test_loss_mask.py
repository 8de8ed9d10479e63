"""The mask rules of the fork (its documented example first), and what per-document counting
protects."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.dataset.loss_mask import (
    MaskRules,
    find_unclosed,
    rules_from_config,
    trained_tokens,
)

CHAT = rules_from_config(loss_mask_pairs=[7, 7], loss_mask_alternating_individual=[8])
DIALOGUE = [7, 20, 21, 7, 8, 30, 31, 8, 7, 22, 7, 8, 32, 8, 2]
TRAINED = [0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]


def masked_labels(data: list[int], rules: MaskRules) -> list[bool]:
    return [not trained for trained in trained_tokens(np.array(data), rules)[1:]]


def test_alternating_masks_the_opening_occurrence_as_in_the_documented_example() -> None:
    masked = masked_labels(
        [1, 2, 3, 1, 4, 5, 6, 1, 1, 1, 1], rules_from_config(loss_mask_alternating_individual=[1])
    )

    assert masked == [False, False, False, False, False, False, True, False, True, False]


def test_user_turns_and_the_opening_assistant_are_untrained_and_replies_with_their_close_are_trained() -> (
    None
):
    assert trained_tokens(np.array(DIALOGUE), CHAT).astype(int).tolist() == TRAINED


def test_a_pair_of_different_ids_includes_both_ends() -> None:
    rules = rules_from_config(loss_mask_pairs=[5, 6])

    assert trained_tokens(np.array([1, 5, 2, 6, 3, 5, 6, 4]), rules).astype(int).tolist() == [
        1,
        0,
        0,
        0,
        1,
        0,
        0,
        1,
    ]


def test_individual_and_eod_rules() -> None:
    rules = rules_from_config(loss_mask_individual=[9], eod_mask_loss=True, eod_id=2)

    assert trained_tokens(np.array([9, 1, 2, 3, 9, 2]), rules).astype(int).tolist() == [
        0,
        1,
        1,
        0,
        0,
        1,
    ]


def test_no_rule_trains_everything() -> None:
    assert trained_tokens(np.arange(5), MaskRules()).all()


def test_one_unclosed_document_flips_the_row_unless_documents_are_given() -> None:
    bad = [7, 20, 8, 30, 8, 2]
    row = np.array(bad + DIALOGUE)

    whole_row = trained_tokens(row, CHAT)[len(bad) :].astype(int).tolist()
    per_document = trained_tokens(row, CHAT, starts=[0, len(bad)])[len(bad) :].astype(int).tolist()

    assert whole_row != TRAINED
    assert per_document == TRAINED
    assert [(found.document, found.rule) for found in find_unclosed(row, CHAT, [0, len(bad)])] == [
        (0, "loss_mask_pairs [7, 7]")
    ]


@pytest.mark.parametrize("pairs", [[7], [7, 7, 8]])
def test_an_odd_list_of_pairs_is_refused(pairs: list[int]) -> None:
    with pytest.raises(ValueError, match="flat list"):
        rules_from_config(loss_mask_pairs=pairs)


def test_eod_mask_without_an_eod_is_refused() -> None:
    with pytest.raises(ValueError, match="end-of-document"):
        rules_from_config(eod_mask_loss=True)


def by_hand(document: list[int]) -> list[int]:
    """The rules of CHAT, told as a story instead of as counts."""
    inside_user, assistant_open, out = False, False, []
    for token in document:
        trained = not inside_user
        if token == 7:
            trained, inside_user = False, not inside_user
        elif token == 8:
            assistant_open = not assistant_open
            trained = trained and not assistant_open
        out.append(int(trained))
    return out


@given(
    st.lists(
        st.lists(st.sampled_from([2, 7, 8, 20, 30]), min_size=1, max_size=12),
        min_size=1,
        max_size=6,
    )
)
def test_counting_per_document_equals_masking_each_document_alone(
    documents: list[list[int]],
) -> None:
    lengths = [len(document) for document in documents]
    starts = np.cumsum([0, *lengths[:-1]])
    row = np.array(sum(documents, []))

    trained = trained_tokens(row, CHAT, starts).astype(int).tolist()

    assert trained == sum(map(by_hand, documents), [])
