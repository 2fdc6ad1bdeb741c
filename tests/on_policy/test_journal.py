"""A journal loses at most the line that was being written when the process ended."""

from pathlib import Path

import pytest

from qlora_dpo.errors import RunError
from qlora_dpo.on_policy.journal import Journal


def test_after_any_cut_the_whole_lines_are_read_and_new_ones_follow_them(tmp_path: Path) -> None:
    whole = Journal(tmp_path / "whole", {"seed": 1})
    whole.append("a", [1])
    whole.append("b", ["\u2028ü"])
    whole.close()
    content = (tmp_path / "whole").read_bytes()
    for length in range(len(content) + 1):
        path = tmp_path / "cut"
        path.write_bytes(content[:length])
        journal = Journal(path, {"seed": 1})
        kept = content[:length].count(b"\n") - 1
        assert list(journal.records) == ["a", "b"][: max(kept, 0)]
        for prompt, record in list(whole.records.items())[max(kept, 0) :]:
            journal.append(prompt, record)
        journal.close()
        assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"{}", b"[]", b'{"settings": {}}', b"\xff", b"null"])
def test_a_line_of_something_else_is_named(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'{"settings": {}}\n' + line + b"\n")
    with pytest.raises(RunError) as error:
        Journal(tmp_path / "file", {})
    assert str(error.value) == f"{tmp_path}/file:2: is damaged; delete this line to have its prompt done again"
