import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import capo
from capo.critique import Critique

# "ab" a word, ".\n\n" the end of a step, eos
TOKEN_BYTES = capo.TokenBytes([b"a", b".\n\n", b"b", b""], eos_ids=3)
WORD, END, OTHER, EOS = range(4)
GOLDEN = [1.75, 1.75, 0.5, 0.5], [-0.75] * 6
RANGES = [[(0, 2), (2, 4)], [(0, 3), (3, 6)]]
FLAGS = [[0, 1], [0, 0]]


def test_the_golden_vector_in_every_layout(device):
    lists = capo.shape([1, 0], FLAGS, groups=2, steps=RANGES, token_ids=[[0] * 4, [0] * 6])
    assert [row.tolist() for row in lists] == list(map(list, GOLDEN))

    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], device=device)
    padded = capo.shape([1, 0], FLAGS, groups=2, steps=RANGES, mask=mask)
    assert padded.tolist() == [GOLDEN[0] + [0, 0], GOLDEN[1]]
    assert padded.dtype == torch.float32 and padded.device == mask.device

    whole = torch.nn.functional.pad(mask, (3, 1))  # prompts of three tokens before, padding after
    shifted = [[(start + 3, end + 3) for start, end in row] for row in RANGES]
    full = capo.shape(torch.tensor([1.0, 0.0]), FLAGS, groups=2, steps=shifted, mask=whole)
    assert torch.equal(full, torch.nn.functional.pad(padded, (3, 1)))

    packed = capo.shape([1, 0], FLAGS, groups=2, steps=RANGES, token_ids=torch.zeros(10, dtype=torch.int64, device=device),
                        cu_seqlens=[0, 4, 10])  # fmt: skip
    assert packed.tolist() == GOLDEN[0] + GOLDEN[1] and packed.device == mask.device


def test_layouts_shifted_by_one_are_a_slice_or_a_roll():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]])
    steps = [[(start + 2, end + 2) for start, end in row] for row in RANGES]
    full = capo.shape([1, 0], FLAGS, groups=2, steps=steps, mask=mask)
    # The loss of position j is that of token j + 1, whose advantage it needs.
    assert torch.equal(full[:, 1:] != 0, mask[:, 1:].bool())
    assert torch.equal(full.roll(-1, 1) != 0, mask.roll(-1, 1).bool())
    assert full[:, 1:][0].tolist() == [0.0, *GOLDEN[0], 0.0, 0.0]


def test_steps_are_found_in_the_ids_and_a_masked_token_ends_one():
    #                       prompt   step 0     step 1
    ids = torch.tensor([[EOS, WORD, WORD, END, OTHER, EOS, EOS], [EOS, EOS, WORD, OTHER, WORD, END, OTHER]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1, 1]])
    flags = [[1, 0], [0, 1, 0]]  # the tool's token in the second row parts two steps that no delimiter parts
    found = capo.shape([1, 0], flags, groups=2, token_ids=ids, mask=mask, token_bytes=TOKEN_BYTES)
    ranges = [[(2, 4), (4, 6)], [(2, 3), (4, 6), (6, 7)]]
    given_ = capo.shape([1, 0], flags, groups=2, steps=ranges, mask=mask)
    assert torch.equal(found, given_) and not found[mask == 0].any() and found[mask == 1].all()


def test_a_packed_steps_object_counts_kept_tokens():
    ids = torch.tensor([[9, WORD, END, OTHER, EOS], [9, 9, WORD, END, OTHER]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    steps = capo.segment(ids[mask.bool()], torch.tensor([0, 4, 7]), TOKEN_BYTES)
    votes = torch.tensor([[1, 1], [0, 1], [0, 0], [-1, -1]], dtype=torch.int8)
    one = capo.shape([1, 0], votes, groups=2, steps=steps, token_ids=ids, mask=mask)
    masked = ids.masked_fill(mask == 0, WORD)
    other = capo.shape([1, 0], votes, groups=2, token_bytes=TOKEN_BYTES, token_ids=masked, mask=mask)
    assert torch.equal(one, other) and one.any()


def test_ranges_with_masked_positions_inside_count_kept_tokens_only():
    mask = torch.tensor([[1, 0, 1, 1, 0, 1]])
    actual = capo.shape([1], [[1, 0]], groups=1, steps=[[(0, 3), (3, 6)]], mask=mask)
    wanted = capo.shape([1], [[1, 0]], groups=1, steps=[[(0, 2), (2, 4)]], token_ids=[[0] * 4])[0]
    assert torch.equal(actual[0, mask[0].bool()], wanted) and actual[0, 1] == actual[0, 4] == 0


@pytest.mark.parametrize(
    "votes",
    [
        [[False, True], [False, False]],
        [[[0, 0, 0], [1, 1, 0]], [[0, 0, 0], [0, 1, 0]]],
        [[Critique(False, (1,))], [Critique(True, ())]],
        [[Critique(False, (1,)), None], [None, Critique(True, ())]],
        [[[0], [1, 1]], None],
        torch.tensor([0, 1, 0, 0]),
        torch.tensor([[False], [True], [False], [False]]),
        torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]], dtype=torch.int8),
        np.array([0, 1, 0, 0]).tolist() and [np.array([0, 1]), np.array([0, 0])],
    ],
    ids=["flags", "votes", "critiques", "failed critiques", "ragged", "1-D", "bool", "table", "numpy"],
)
def test_votes_come_in_many_forms(votes):
    rows = capo.shape([1, 0], votes, groups=2, steps=RANGES, token_ids=[[0] * 4, [0] * 6])
    assert [row.tolist() for row in rows] == list(map(list, GOLDEN))


def test_votes_that_are_missing_abstain():
    """One vote of two on the second step: a clear one in its place would make it a tie, which is no strict majority."""
    rule = capo.CreditRule(vote="strict_majority")
    rows = capo.shape([1, 0], [[[0, 0], [1]], None], groups=2, steps=RANGES, token_ids=[[0] * 4, [0] * 6], rule=rule)
    assert [row.tolist() for row in rows] == list(map(list, GOLDEN))


def test_without_votes_the_outcomes_alone_count():
    rows = capo.shape([1, 0], None, groups=2, steps=RANGES, token_ids=[[0] * 4, [0] * 6])
    silent = capo.shape([1, 0], [[None, None], []], groups=2, steps=RANGES, token_ids=[[0] * 4, [0] * 6])
    assert [row.unique().numel() for row in rows] == [1, 1]
    assert all(torch.equal(one, other) for one, other in zip(rows, silent, strict=True))


@pytest.mark.parametrize("groups", [2, [5, 5, 8, 8], ["x", "x", "y", "y"], np.array(["a", "a", "b", "b"], dtype=object),
                                    torch.tensor([3, 3, 1, 1])])  # fmt: skip
def test_groups_are_a_size_or_ids_of_any_kind(groups):
    mask = torch.ones(4, 3, dtype=torch.bool)
    rows = capo.shape([1, 0, 1, 1], None, groups=groups, steps=[[]] * 4, mask=mask)
    assert rows[:, 0].tolist() == [1.0, -1.0, 0.0, 0.0]


def test_undecided_outcomes_are_none_or_nan():
    mask = torch.ones(3, 2)
    for outcomes in ([1, 0, None], torch.tensor([1.0, 0.0, math.nan])):
        rows = capo.shape(outcomes, None, groups=3, steps=[[]] * 3, mask=mask)
        assert rows[:, 0].tolist() == [1.0, -1.0, 0.0]


def test_a_rule_by_name_or_in_person():
    mask = torch.ones(2, 2, dtype=torch.int64)
    one = capo.shape([1, 0], None, groups=2, steps=[[], []], mask=mask, rule="dr_grpo")
    other = capo.shape([1, 0], None, groups=2, steps=[[], []], mask=mask, rule=capo.CreditRule.preset("dr_grpo"))
    assert torch.equal(one, other) and one[:, 0].tolist() == [0.5, -0.5]


def test_empty_batches_rows_and_masks():
    assert capo.shape([], [], groups=[], steps=[], token_ids=[]) == []
    assert capo.shape([], None, groups=4, steps=[], mask=torch.ones(0, 5)).shape == (0, 5)
    rows = capo.shape([1, 0], None, groups=2, token_ids=[[], [WORD]], token_bytes=TOKEN_BYTES)
    assert [len(row) for row in rows] == [0, 1]
    nothing = capo.shape([1, 0], [[], []], groups=2, token_ids=torch.zeros(2, 3, dtype=torch.int64),
                         mask=torch.zeros(2, 3), token_bytes=TOKEN_BYTES)  # fmt: skip
    assert nothing.tolist() == [[0.0] * 3] * 2


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_all_layouts_agree(data):
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    ids = [data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for n in lengths]
    keep = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    outcomes = data.draw(st.lists(st.sampled_from([0.0, 1.0, None]), min_size=len(ids), max_size=len(ids)))
    left = data.draw(st.integers(0, 2))
    width = max(lengths) + left + 1
    padded, mask = torch.full((len(ids), width), EOS), torch.zeros(len(ids), width, dtype=torch.int64)
    for i, (row, kept) in enumerate(zip(ids, keep, strict=True)):
        padded[i, left : left + len(row)] = torch.tensor(row)
        mask[i, left : left + len(row)] = torch.tensor(kept)
    common = {"groups": [0] * len(ids), "token_bytes": TOKEN_BYTES}
    seen = capo.shaping.Rows.of(padded, mask, None).segment(padded.flatten(), TOKEN_BYTES, "\n\n")
    votes = [
        data.draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=n, max_size=n)) for n in seen.cu_steps.diff().tolist()
    ]

    in_rows = capo.shape(outcomes, votes, token_ids=padded, mask=mask, **common)
    in_lists = capo.shape(outcomes, votes, token_ids=ids, mask=keep, **common)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    flat, flat_mask = (
        torch.tensor([x for row in rows for x in row], dtype=kind)
        for rows, kind in ((ids, torch.int64), (keep, torch.bool))
    )
    packed = capo.shape(outcomes, votes, token_ids=flat, mask=flat_mask, cu_seqlens=cu_seqlens, **common)
    for i, row in enumerate(in_lists):
        assert torch.equal(row, in_rows[i, left : left + len(row)])
    assert torch.equal(torch.cat([*in_lists, torch.zeros(0)]), packed)
    assert not in_rows[mask == 0].any()


TWO = {"outcomes": [1, 0], "votes": FLAGS, "groups": 2, "steps": RANGES, "token_ids": [[0] * 4, [0] * 6]}
PADDED = torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"token_ids": None}, "token_ids or mask is needed"),
        ({"token_ids": "text"}, "token_ids must be padded .* or a list, got str"),
        ({"token_ids": [0, 1]}, "row 0 of token_ids must have one dimension"),
        ({"token_ids": PADDED}, r"mask is needed with padded token_ids \[2, 6\]"),
        ({"token_ids": PADDED[None]}, r"token_ids must be padded .* got \[1, 2, 6\]"),
        ({"token_ids": PADDED, "mask": PADDED[:, :5]}, r"mask must be a tensor \[2, 6\] like token_ids, got \[2, 5\]"),
        ({"token_ids": PADDED, "mask": PADDED + 2}, "mask must hold 0 and 1 only, got 2"),
        ({"token_ids": PADDED, "mask": PADDED, "cu_seqlens": [0, 4, 10]}, "cu_seqlens belongs to packed tokens"),
        ({"token_ids": PADDED[0]}, r"cu_seqlens is needed with packed token_ids \[6\]"),
        ({"token_ids": PADDED[0], "cu_seqlens": [0, 4, 5]}, "must rise from 0 to 6, the length of token_ids; got .*5"),
        ({"token_ids": PADDED[0], "cu_seqlens": [0, 7, 6]}, "must rise from 0 to 6"),
        ({"mask": [[1] * 4, [1] * 5]}, "mask must be a list of rows as long as those of token_ids"),
        ({"outcomes": [1]}, r"outcomes must have one entry for each of 2 rows, got \[1\]"),
        ({"outcomes": [1, math.inf]}, "credit: outcome inf of response 1"),
        ({"groups": 3}, "groups=3 responses per prompt do not divide 2 rows"),
        ({"groups": 0}, "groups=0 responses per prompt do not divide 2 rows"),
        ({"groups": -1}, "groups=-1 responses per prompt do not divide 2 rows"),
        ({"groups": True}, "groups must be a number of responses or one id for each row, got True"),
        ({"groups": 2.0}, "groups must be a number of responses or one id for each row, got 2.0"),
        ({"groups": [1]}, r"groups must have one id for each of 2 rows, got \[1\]"),
        ({"steps": None}, "give either steps or token_bytes"),
        ({"token_bytes": TOKEN_BYTES}, "give either steps or token_bytes"),
        ({"steps": None, "token_ids": None, "mask": PADDED, "token_bytes": TOKEN_BYTES}, "token_bytes needs token_ids"),
        ({"steps": capo.Steps(*[torch.tensor([0, 2])] * 3)}, "steps are of 1 responses, but there are 2 rows"),
        ({"steps": [[(0, 2), (4, 2)], [(0, 3), (3, 6)]]}, r"a step of row 0 is \(4, 2\), but the row has positions"),
        ({"steps": [[(-1, 2), (2, 4)], [(0, 3), (3, 6)]]}, r"a step of row 0 is \(-1, 2\)"),
        ({"steps": [[(0, 2)]]}, "steps has 1 entries, but there are 2 rows"),
        ({"steps": [[0, 2], [3]]}, r"steps must be lists of \(start, end\) positions"),
        ({"steps": [[(0, 2), (2, 5)], [(0, 3), (3, 6)]]}, r"a step of row 0 is \(2, 5\), but the row has positions 0 to 4"),
        ({"steps": [[(0, 3), (2, 4)], [(0, 3), (3, 6)]]}, "steps must be in order, without overlap"),
        ({"votes": [[0, 1]]}, "votes has 1 entries, but there are 2 responses"),
        ({"votes": [[0, 1], [0]]}, "votes of response 1 are for 1 steps, but it has 2"),
        ({"votes": [[0, 1], [0, 2]]}, "votes of response 1 must be -1, 0 or 1, got 2"),
        ({"votes": torch.zeros(3, 1)}, r"votes must be integer \[4\] or \[4, K\]"),
        ({"votes": torch.tensor([0.0, 1.0, 0.0, 0.0])}, r"votes must be integer \[4\] or .* got torch.float32 \[4\]"),
        ({"votes": torch.zeros(1, 2, 2, dtype=torch.int8)}, r"votes must be integer \[4\]"),
        ({"votes": torch.tensor([0, 1, 0, 300])}, "votes must be -1, 0 or 1, got 300"),
        ({"votes": [[Critique(False, (2,))], []]}, "response 0 has 2 steps, but step 2 is flagged"),
        ({"rule": "ppo"}, "CreditRule.preset: name must be one of"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        capo.shape(**{**TWO, **change})


def test_capo_shape_is_a_function_whatever_was_imported_before():
    import importlib

    importlib.import_module("capo.shaping")
    assert callable(capo.shape)
