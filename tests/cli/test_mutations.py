"""A planted mistake that a test finds is told from one that survives."""

import pytest
from mutations import HOME, MUTANTS, Mutant, first_failure, run_mutants


@pytest.mark.slow
def test_a_mistake_that_no_test_finds_is_reported_as_a_survivor() -> None:
    lines = list[str]()
    mutants = [
        Mutant("wilson.py", "def wilson_interval", "def no_interval", "report/test_tables.py"),
        Mutant("wilson.py", '"""', '"""Here, ', "report/test_tables.py"),
        Mutant("wilson.py", "return 0.0, 1.0", "return 0.0, 0.0", "report/test_tables.py"),
    ]
    assert not run_mutants(mutants, 1, lines.append, preload=())
    verdicts = [line.split(": ")[2].partition(", ")[0] for line in lines[:-1]]
    assert verdicts[0].startswith("found by tests/report/test_tables.py")
    assert verdicts[1] == "SURVIVES (0)"
    assert verdicts[2] == "found by tests/report/test_tables.py::test_wilson_mirrors_and_knows_nothing_of_no_pairs"
    assert lines[-1].startswith("2 of 3 planted mistakes were found, ")


def test_the_first_failure_is_named_with_its_parameters() -> None:
    report = "F\nFAILED tests/test_a.py::test_b[x - y, z] - assert 1 == 2\nFAILED tests/test_c.py::test_d\n"
    assert first_failure(report) == "tests/test_a.py::test_b[x - y, z]"
    assert first_failure("1 passed") == ""


def test_every_mistake_can_be_planted() -> None:
    package = HOME / "qlora_dpo"
    missing = [
        (file, mutant[0])
        for file, mutants in MUTANTS.items()
        for mutant in mutants
        if mutant[0] not in (package / file).read_text(encoding="utf-8")
    ]
    assert missing == []


def test_every_mistake_changes_something() -> None:
    assert [mutant for mutants in MUTANTS.values() for mutant in mutants if mutant[0] == mutant[1]] == []
