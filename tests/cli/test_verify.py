"""`verify` finds what is not as it was written, part by part, and a damaged adapter is not opened."""

import shutil
from pathlib import Path

import pytest
import saved_adapters
import tiny_run

from qlora_dpo.adapter import open_adapter
from qlora_dpo.cli import main
from qlora_dpo.errors import ModelError

pytestmark = tiny_run.LIBRARIES_WARN


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, `base`, and an adapter of it, `adapter`."""
    home = tmp_path_factory.mktemp("verify")
    saved_adapters.save_adapter(home / "adapter", saved_adapters.save_base(home / "base"), "none")
    return home


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """A copy of the adapter."""
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


def test_what_is_as_it_was_written_is_said_to_be(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(adapter)]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("adapter: as it was written\nbase: as it was written\n", "")


def test_a_flipped_bit_is_found_and_the_adapter_is_not_opened(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert main(["verify", str(adapter)]) == 1
    told = capsys.readouterr()
    assert told.out == "adapter: adapter_model.safetensors has not its SHA-256\nbase: as it was written\n"
    assert told.err == (
        f"qlora-dpo: {adapter}: 1 of 2 parts cannot be trusted; take them from a backup, or make them again\n"
    )
    with pytest.raises(ModelError) as error:
        open_adapter(adapter, "fp32")
    assert str(error.value) == (
        f"{adapter}: is damaged: adapter_model.safetensors has not its SHA-256; take it from a backup, or train again "
        "with --resume"
    )


def test_another_base_than_the_adapter_was_trained_on_is_found(
    adapter: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made / "base"
    kept = made / "kept"
    shutil.copytree(base, kept)
    try:
        shutil.rmtree(base)
        saved_adapters.save_base(base, seed=5)
        assert main(["verify", str(adapter)]) == 1
    finally:
        shutil.rmtree(base)
        kept.rename(base)
    out = capsys.readouterr().out
    assert out == (
        f"adapter: as it was written\nbase: was trained on other weights of {base} than are there now; if you have the "
        "former ones, say where with --base-model PATH\n"
    )


def test_a_base_that_is_gone_is_said_to_be(adapter: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (made / "base").rename(made / "away")
    try:
        assert main(["verify", str(adapter)]) == 1
    finally:
        (made / "away").rename(made / "base")
    assert capsys.readouterr().out.splitlines()[1].startswith("base: ")


def test_an_adapter_from_elsewhere_cannot_be_checked(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("manifest.json", "run.json"):
        (adapter / name).unlink()
    assert main(["verify", str(adapter)]) == 1
    assert capsys.readouterr().out == (
        "adapter: manifest.json is missing\n"
        "base: run.json is missing, which would say on which weights it was trained\n"
    )


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_anything_to_check_is_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / name)]) == 2
    found = "there is no such folder" if name == "nowhere" else "holds no adapter, no checkpoint and no merged model"
    assert capsys.readouterr().err == (
        f"qlora-dpo: {tmp_path / name}: {found}; name the folder of a run or of a merged model\n"
    )
