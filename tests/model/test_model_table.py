"""The table of families in docs/models.md: each of them is trained, merged, asked and exported here.

`python tests/model/test_model_table.py` writes the table anew.
"""

import sys
import tempfile
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import tiny_run
from model_families import FAMILIES, Family, run_family, save_family, step_errors

pytestmark = tiny_run.LIBRARIES_WARN

MODELS = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
HEADINGS = ("family", "class in transformers", "layout", "4 bits", "GGUF")
REASONS = {
    "does not use transformers' attention interface": "padded: an attention of its own",
    "has no rotary positions": "padded: no rotary positions",
    "it caps attention scores": "padded: capped attention scores",
    "asks attention for s_aux": "padded: attention sinks",
    "gives other log-probabilities": "padded: an attention of its own",
}
"""The reasons that a run gives for padded batches, in the words of the table."""


def layout_in_words(reason: str) -> str:
    """Either "packed", or why rows are padded."""
    return "packed" if reason == "packed" else next(words for part, words in REASONS.items() if part in reason)


def measured_row(family: Family, home: Path) -> tuple[str, ...]:
    """A row of the table; asserts what holds of all of them."""
    reason, loss_error, gradient_error = step_errors(save_family(family, home / "plain"))
    assert loss_error < 1e-5, family.name
    assert gradient_error < 5e-4, family.name
    kept, kl, tokens, gguf = run_family(family, home)
    assert abs(kl) < 1e-6
    assert tokens > 0
    four_bits = "yes; experts stay as they are" if kept else "yes"
    return family.name, family.config().__class__.__name__, layout_in_words(reason), four_bits, gguf


def table_text(rows: list[tuple[str, ...]]) -> str:
    """The table in markdown."""
    return "".join("| " + " | ".join(row) + " |\n" for row in [HEADINGS, ("---",) * len(HEADINGS), *rows])


def shown_rows() -> list[tuple[str, ...]]:
    """The rows of docs/models.md."""
    table = MODELS.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    return [tuple(cell.strip() for cell in line.strip("|\n").split("|")) for line in table.splitlines()[2:]]


def test_the_table_has_all_families_and_thirty_of_them_train() -> None:
    assert [row[0] for row in shown_rows()] == [family.name for family in FAMILIES]
    assert len(FAMILIES) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_is_as_the_table_says(
    family: Family, tmp_path: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "cache"))
    assert measured_row(family, tmp_path) == next(row for row in shown_rows() if row[0] == family.name)


@pytest.mark.parametrize("name", ["Gemma 3", "Qwen3-MoE", "Granite 3"])
def test_two_steps_equal_those_of_plain_transformers(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    reason, loss_error, gradient_error = step_errors(save_family(family, tmp_path))
    assert (reason, loss_error < 1e-5, gradient_error < 5e-4) == ("packed", True, True)


if __name__ == "__main__":
    rows = []
    for each in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured_row(each, Path(folder)))
    before, _, rest = MODELS.read_text(encoding="utf-8").partition(START)
    MODELS.write_text(before + START + table_text(rows) + END + rest.partition(END)[2], encoding="utf-8")
