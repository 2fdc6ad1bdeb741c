"""A run that is stopped anywhere says what is kept, and goes on in another place: other folders, caches, machine."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from accelerate.state import AcceleratorState
from cli_sandbox import furnish, rows

from qlora_dpo.cli import main
from qlora_dpo.data import encode
from qlora_dpo.preference.reference_cache import ReferenceLogpCache
from qlora_dpo.training import loop
from qlora_dpo.training.checkpoint import save

pytestmark = tiny_run.LIBRARIES_WARN

RECIPE = """
[model]
name = "./base"
quantization = "none"
dtype = "fp32"

[lora]
r = 4

[data]
train = "./train.jsonl"
eval = "./eval.jsonl"
max_length = 200

[train]
batch_size = 4
micro_batch_tokens = 200
num_train_epochs = {epochs}
max_steps = 4
save_steps = 100
logging_steps = 1

[samples]
prompts = 1
max_new_tokens = 2
"""


def made(home: Path, epochs: int = 2) -> Path:
    """Recipe, data and base in `home`."""
    return furnish(home, RECIPE.format(epochs=epochs), heldout=4)


def train(home: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """`qlora-dpo train tiny.toml` in `home`, with a cache of its own there."""
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("QLORA_DPO_CACHE", str(home / "cache"))
    monkeypatch.chdir(home)
    return main(["train", "tiny.toml", *options])


def stopped_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, in whose call number `calls` the process gets SIGTERM."""
    left = calls

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        result = function(*arguments, **named)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    return counted


@pytest.mark.parametrize("where", ["reading", "reference"])
def test_stopped_before_its_first_checkpoint_a_run_keeps_what_it_has_found(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = made(tmp_path / "home")
    monkeypatch.setattr(encode, "ENCODE_CHUNK", 8)
    with monkeypatch.context() as patched:
        match where:
            case "reading":
                patched.setattr(encode, "encode_pairs", stopped_after(2, encode.encode_pairs))
            case _:
                patched.setattr(ReferenceLogpCache, "add", stopped_after(1, ReferenceLogpCache.add))
        assert train(home, monkeypatch) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"qlora-dpo: stopped before the first checkpoint; what was read and what the reference answered is kept in "
        f"{home / 'cache'}, and the same command goes on from there"
    )
    assert not (home / "adapters" / "tiny").exists()
    asked, computed = list[int](), list[int]()
    monkeypatch.setattr(encode, "encode_pairs", counting(asked, 0, encode.encode_pairs))
    monkeypatch.setattr(ReferenceLogpCache, "add", counting(computed, 1, ReferenceLogpCache.add))
    assert train(home, monkeypatch) == 0
    match where:
        case "reading":
            assert asked == [8, 4]  # of the training pairs only the chunk in flight; and the held-out ones
        case _:
            assert asked == []
            assert 0 < sum(computed) < 16 + 4


def counting(counts: list[int], place: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with the number of items in its argument at `place` added to `counts`."""

    def counted(*arguments: Any, **named: Any) -> Any:
        counts.append(len(arguments[place]))
        return function(*arguments, **named)

    return counted


def test_on_another_machine_a_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = made(tmp_path / "whole")
    assert train(whole, monkeypatch) == 0
    here = made(tmp_path / "here")
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_take_step", stopped_after(2, loop._take_step))
        assert train(here, monkeypatch) == 130
    there = tmp_path / "another" / "machine"
    there.parent.mkdir()
    shutil.copytree(here, there, ignore=shutil.ignore_patterns("cache"))
    shutil.rmtree(here)
    monkeypatch.setenv("HF_HOME", str(there / "hf"))
    capsys.readouterr()
    assert train(there, monkeypatch, "--resume") == 0
    ends = [home / "adapters" / "tiny" / "adapter_model.safetensors" for home in (there, whole)]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_on_another_machine_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = made(tmp_path / "here", epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_take_step", stopped_after(1, loop._take_step))
        assert train(here, monkeypatch) == 130
    there = here.rename(tmp_path / "there")
    (there / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(4, 20)))
    capsys.readouterr()
    assert train(there, monkeypatch, "--resume") == 1
    newest, _ = save.newest_valid(Path("adapters/tiny"))
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"qlora-dpo: {newest}: belongs to another run; changed since: the held-out pairs; put it back, or go on with "
        "--allow heldout"
    )
    assert train(there, monkeypatch, "--resume", "--allow", "heldout") == 0
