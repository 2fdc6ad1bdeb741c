"""The account of the data adds up, reads as plain text, and names rows when asked."""

import pytest

from qlora_dpo.data.audit import OVERLONG, Audit, check_bad_share, length_baselines, length_quantiles
from qlora_dpo.data.encoded import EncodedPair
from qlora_dpo.errors import DataError

AUDIT = Audit(
    source="pairs.jsonl",
    format="strings (prompt, chosen and rejected)",
    rows=2_006,
    used=2_000,
    dropped={"empty answer": (3, 17), "equal answers": (4,)},
    not_sampled=3,
    repaired={"prompt cut at the front": (9,), "control tokens read as text": (9, 12)},
    tokens={"prompt": (10, 20, 30), "chosen": (5, 6, 7), "rejected": (1, 2, 3)},
    note="A note.",
)

TABLE = """\
pairs.jsonl: strings (prompt, chosen and rejected)
  rows read                                2,006
  pairs used                               2,000
    repaired: prompt cut at the front      1
    repaired: control tokens read as text  2
  not drawn                                3
  dropped: empty answer                    2
  dropped: equal answers                   1
  prompt, tokens (p50 / p95 / max)         10 / 20 / 30
  chosen, tokens (p50 / p95 / max)         5 / 6 / 7
  rejected, tokens (p50 / p95 / max)       1 / 2 / 3
  A note."""

NUMBERS = """
  rows, dropped: empty answer: 3, 17
  rows, dropped: equal answers: 4
  rows, repaired: prompt cut at the front: 9
  rows, repaired: control tokens read as text: 9, 12"""


def test_the_account_is_a_table_of_plain_text() -> None:
    assert "\n".join(AUDIT.lines()) == TABLE


def test_row_numbers_are_named_on_request() -> None:
    assert "\n".join(AUDIT.lines(with_row_numbers=True)) == TABLE + NUMBERS


def test_what_did_not_happen_has_no_line() -> None:
    clean = Audit("pairs.jsonl", "strings", 2, 2, {}, 0, {}, {})
    assert clean.lines(with_row_numbers=True) == ["pairs.jsonl: strings", "  rows read   2", "  pairs used  2"]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([], (0, 0, 0)), ([7], (7, 7, 7)), ([1, 2], (1, 1, 2)), (list(range(101)), (50, 95, 100)), ([9, 1, 5], (5, 5, 9))],
)
def test_quantiles_are_lengths_that_occur(lengths: list[int], expected: tuple[int, int, int]) -> None:
    assert length_quantiles(lengths) == expected


def pair(chosen: int, rejected: int) -> EncodedPair:
    return EncodedPair((1,), (2,) * chosen, (3,) * rejected, 1, b"")


def test_baselines_count_a_tie_as_one_half() -> None:
    found = length_baselines([pair(5, 1), pair(1, 5), pair(1, 5), pair(2, 2)])
    assert found == {"longer": 1.5 / 4, "shorter": 2.5 / 4}


def test_baselines_need_pairs() -> None:
    with pytest.raises(ValueError, match=r"^baselines need at least one pair$"):
        length_baselines([])


def account(used: int, dropped: dict[str, tuple[int, ...]], not_drawn: int = 0) -> Audit:
    """An account of rows that adds up."""
    rows = used + not_drawn + sum(map(len, dropped.values()))
    first = {reason: f"pairs.jsonl:{min(numbers)}" for reason, numbers in dropped.items()}
    return Audit("pairs.jsonl", "prompt, chosen, rejected", rows, used, dropped, not_drawn, {}, {}, first)


def test_more_bad_rows_than_are_allowed_refuse_the_run_with_their_reasons() -> None:
    audit = account(97, {"equal answers": (3, 9), "empty answer": (4,)})
    with pytest.raises(DataError) as error:
        check_bad_share(audit, 0.01)
    assert str(error.value) == (
        "pairs.jsonl: 3 of 100 rows (3.0%) are no usable pairs: equal answers (2, first pairs.jsonl:3), "
        "empty answer (1, first pairs.jsonl:4); "
        "data.max_bad_share = 0.01 allows 1.0%; list them with --dropped-rows and mend them, or raise it"
    )
    check_bad_share(audit, 0.03)


def test_long_pairs_are_not_bad_and_rows_that_were_not_drawn_do_not_count() -> None:
    check_bad_share(account(50, {OVERLONG: tuple(range(1, 51))}), 0)
    with pytest.raises(DataError, match=r"1 of 50 rows \(2\.0%\)"):
        check_bad_share(account(49, {"empty answer": (4,)}, not_drawn=1000), 0.01)


def test_a_table_names_twenty_reasons_and_counts_the_others() -> None:
    audit = account(9, {f"reason {number}": (1,) * (30 - number) for number in range(25)})
    lines = audit.lines()
    assert "  dropped: reason 0         30" in lines
    assert lines[-1] == "  dropped: 5 other reasons  40"
    assert len([line for line in lines if "dropped" in line]) == 21
    with pytest.raises(DataError, match=r"reason 4 \(26, first pairs.jsonl:1\) and 20 other reasons; data"):
        check_bad_share(audit, 0.01)


def test_the_whole_account_is_told_with_every_row() -> None:
    facts = AUDIT.to_dict()
    assert facts["dropped"] == {"empty answer": [3, 17], "equal answers": [4]}
    assert facts["repaired"] == {"prompt cut at the front": [9], "control tokens read as text": [9, 12]}
    assert facts["rows"] == facts["used"] + facts["not_drawn"] + sum(map(len, facts["dropped"].values()))
    assert facts["tokens"]["prompt"] == {"p50": 10, "p95": 20, "max": 30}
