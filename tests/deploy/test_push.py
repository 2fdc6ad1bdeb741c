"""`qlora-dpo push` lists, cleans and sends; what it sent is read back by plain PEFT and by `chat`."""

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_sandbox import Workplace, closed_port
from fork_server import run_forked
from hub import Hub
from saved_adapters import save_adapter, save_base

from qlora_dpo.cli import main
from qlora_dpo.manifest import find_damage, write_manifest
from qlora_dpo.recipe import recipe

BASE = "acme/small"
ONLINE = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_" + "x" * 34}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that lies on a hub, and an adapter of it with all that a run and a user leave in its folder."""
    home = tmp_path_factory.mktemp("made")
    base = save_base(home / "hub" / "models" / BASE)
    adapter = save_adapter(home / "hh", base)
    run = json.loads((adapter / "run.json").read_text())
    run |= {"command": f"qlora-dpo train {home}/hh.toml"}
    run["base"] |= {"name": str(base), "hub_id": None, "revision": None, "quantization": "nf4", "double_quant": True}
    (adapter / "run.json").write_text(json.dumps(run))
    (adapter / "recipe.toml").write_text(f'[data]\ntrain = "{home}/train.jsonl"\n')
    (adapter / "README.md").write_text("# hh\n\nqlora-dpo chat adapters/hh\nqlora-dpo merge adapters/hh\n")
    (adapter / "samples.jsonl").write_text("{}\n")
    (adapter / "notes.txt").write_text("mine")
    (adapter / "checkpoints" / "step-000200").mkdir(parents=True)
    (adapter / "checkpoints" / "step-000200" / "state.safetensors").write_bytes(b"0" * 100)
    return home


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Iterator[Workplace]:
    shutil.copytree(made / "hub", tmp_path / "hub")
    with Hub(tmp_path / "hub") as hub:
        yield Workplace(tmp_path / "work", hub)


SENT = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "manifest.json",
    "recipe.toml",
    "resolved.toml",
    "run.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def pushed(place: Workplace, repository: str) -> Path:
    return place.hub.root / "models" / repository


def test_an_adapter_is_sent_and_read_back_by_peft_and_by_chat(made: Path, place: Workplace) -> None:
    done = place.run("push", str(made / "hh"), "me/hh", "--base", BASE, **ONLINE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"me/hh: {len(SENT)} files, {place.hub.url}/me/hh/commit/")
    assert done.stdout.endswith("qlora-dpo chat me/hh   # talk to it\n")
    there = pushed(place, "me/hh")
    assert {each.name for each in there.iterdir()} == SENT
    assert place.hub.private == {"me/hh"}
    for file in there.iterdir():
        if file.suffix != ".safetensors":
            assert str(made) not in file.read_text(), file.name
    assert find_damage(there, required="adapter_model.safetensors") == ""
    assert (there / "README.md").read_text() == "# hh\n\nqlora-dpo chat me/hh\n"
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE
    resolved = tomllib.loads((there / "resolved.toml").read_text())
    assert resolved["model"]["name"] == BASE
    assert resolved["data"]["train"] == "./train.jsonl"
    recipe.Recipe.model_validate(resolved)

    again = place.run("push", str(made / "hh"), "me/hh", "--base", BASE, **ONLINE)
    assert again.returncode == 0, again.stderr
    assert len([line for line in place.hub.log if line.startswith("PUT ")]) == 1, "no weights are sent twice"
    told = place.run("chat", "me/hh", "--temperature", "0", "--max-new-tokens", "5", stdin="The cat?")
    assert told.returncode == 0, told.stderr
    here = place.run("chat", str(made / "hh"), "--temperature", "0", "--max-new-tokens", "5", stdin="The cat?")
    assert told.stdout == here.stdout != "", "what was pushed answers as what was trained, in 4-bit"
    program = (
        "import torch, peft, transformers\n"
        "model = peft.AutoPeftModelForCausalLM.from_pretrained('me/hh')\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained('me/hh')\n"
        "print(model(**tokenizer('The cat', return_tensors='pt')).logits.shape[0], type(model).__name__)\n"
    )
    theirs = run_forked(["-c", program], cwd=place.folder, env=place.environment())
    assert theirs.stdout == "1 PeftModelForCausalLM\n", theirs.stderr


def test_a_merged_model_is_sent_public_and_talked_to(made: Path, place: Workplace) -> None:
    assert place.run("merge", str(made / "hh"), "-o", "merged/hh").returncode == 0
    done = place.run("push", "merged/hh", "me/merged", "--public", **ONLINE)
    assert done.returncode == 0, done.stderr
    assert place.hub.private == set()
    assert "merge.json" in {each.name for each in pushed(place, "me/merged").iterdir()}
    assert 'from_pretrained("me/merged")' in (pushed(place, "me/merged") / "README.md").read_text()
    told = place.run("chat", "me/merged", "--temperature", "0", "--max-new-tokens", "5", stdin="The cat?")
    assert told.returncode == 0, told.stderr


def test_a_push_that_was_cut_off_goes_on(made: Path, place: Workplace) -> None:
    command = ("push", str(made / "hh"), "me/hh", "--base", BASE)
    place.hub.uploads_left = 0
    cut = place.run(*command, HUB_RETRIES_AT_ONCE="1", **ONLINE)
    assert cut.returncode == 1
    assert cut.stderr.splitlines()[-1] == (
        "qlora-dpo: me/hh: the hub cannot be reached or the connection ended; run the same command again: files that "
        "have arrived are not sent twice"
    )
    assert list(pushed(place, "me/hh").iterdir()) == [], "nothing appears before all is there"
    place.hub.uploads_left = 10
    place.hub.log.clear()
    assert place.run(*command, **ONLINE).returncode == 0
    assert len([line for line in place.hub.log if line.startswith("PUT ")]) == 1
    assert {each.name for each in pushed(place, "me/hh").iterdir()} == SENT


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    assert main(["push", str(made / "hh"), "me/hh", "--base", BASE, "--dry-run"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {name for _, name in rows[:-1]} == SENT
    sizes = [int(size.replace(",", "")) for size, _ in rows]
    assert sum(sizes[:-1]) == sizes[-1]
    weights = (made / "hh" / "adapter_model.safetensors").stat().st_size
    assert [name for size, name in rows if size == f"{weights:,}"] == ["adapter_model.safetensors"]


def test_parts_are_chosen(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(made / "hh"), "me/hh", "--base", BASE, "--dry-run", "--what", "samples"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["3", "samples.jsonl"]


def test_a_base_from_pypi_is_named_with_what_others_need(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora_dpo.deploy.hub_files import adapter_base_name, collect_hub_files

    folder = tmp_path / "hh"
    shutil.copytree(made / "hh", folder)
    run = json.loads((folder / "run.json").read_text())
    run["base"]["name"] = "pypi:small==1.0"
    (folder / "run.json").write_text(json.dumps(run))
    assert main(["push", str(folder), "me/hh", "--dry-run"]) == 0
    assert capsys.readouterr().err == (
        "its base is pypi:small==1.0: qlora-dpo fetches that, other programs need --base OWNER/NAME\n"
    )
    assert adapter_base_name(collect_hub_files(folder, "me/hh", ["model"], None, str)) == "pypi:small==1.0"


# --- refusals


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["push", *map(str, arguments), "--dry-run"])
    return code, capsys.readouterr().err.splitlines()[-1]


def test_a_base_that_only_this_machine_has_must_be_named(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = made / "hub" / "models" / BASE
    folder = made / "hh"
    assert refusal(capsys, folder, "me/hh") == (
        2,
        f"qlora-dpo: {folder}: its base is the folder {base}, which nobody else can load; name its repository with "
        "--base OWNER/NAME, or push the merged model",
    )


def test_names_and_folders_that_are_none_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("hh", "a/b/c", "https://x/y"):
        assert refusal(capsys, made / "hh", name) == (
            2,
            f"qlora-dpo: {name}: is no name of a repository; write OWNER/NAME, such as me/hh-adapter",
        )
    assert refusal(capsys, tmp_path, "me/hh") == (
        2,
        f"qlora-dpo: {tmp_path}: is no adapter, no merged model and no export; name the folder of one",
    )
    assert refusal(capsys, tmp_path / "no", "me/hh") == (
        2,
        f"qlora-dpo: {tmp_path / 'no'}: there is no such folder; name an adapter, a merged model or an export",
    )


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "hh", tmp_path / "a" / "hh")
    return tmp_path / "a" / "hh"


def test_a_damaged_adapter_is_not_sent(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "tokenizer.json").write_text("{}")
    code, sentence = refusal(capsys, copied, "me/hh", "--base", BASE)
    assert (code, sentence) == (
        1,
        f"qlora-dpo: {copied}: is damaged: tokenizer.json has not its size; take it from a backup, or make it again",
    )


def test_secrets_and_paths_are_taken_out_of_what_we_wrote(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_dpo.deploy.hub_files import collect_hub_files
    from qlora_dpo.report.card import strip_local_paths

    monkeypatch.setenv("MY_API_KEY", "a-secret-of-mine")
    (copied / "README.md").write_text("made with a-secret-of-mine and hf_" + "a" * 34 + " in `/srv/private/x.toml`\n")
    pieces = {
        piece.name: piece.content
        for piece in collect_hub_files(copied, "me/hh", ["model", "card"], BASE, strip_local_paths)
    }
    assert pieces["README.md"] == b"made with *** and *** in `x.toml`\n"


@pytest.mark.parametrize("kind", ["token", "path"])
def test_secrets_and_paths_in_any_other_text_end_the_push(
    kind: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = copied / "chat_template.jinja"
    hidden = "hf_" + "a" * 34 if kind == "token" else f"{copied.parent}/x"
    template.write_text(f"{{# one #}}\n{{# {hidden} #}}\n")
    manifest: dict[str, Any] = json.loads((copied / "manifest.json").read_text())
    write_manifest(copied, [copied / name for name in manifest])
    words = "what looks like a token or a password" if kind == "token" else "a path of this machine"
    assert refusal(capsys, copied, "me/hh", "--base", BASE) == (
        1,
        f"qlora-dpo: {template}: there is {words} in line 2; take it out, and push again. Nothing was sent",
    )


def test_offline_nothing_is_sent(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(made / "hh"), "me/hh", "--base", BASE]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "qlora-dpo: me/hh: HF_HUB_OFFLINE is set, so nothing is sent; unset it"


def test_what_a_hub_answers_is_said(made: Path, place: Workplace) -> None:
    command = ("push", str(made / "hh"), "me/hh", "--base", BASE)
    last = [place.run(*command, HF_HUB_DISABLE_XET="1")]
    (pushed(place, "me/hh")).mkdir(parents=True, exist_ok=True)
    last.append(place.run(*command, **ONLINE))
    assert [done.returncode for done in last] == [1, 2]
    assert [done.stderr.splitlines()[-1] for done in last] == [
        "qlora-dpo: me/hh: the hub answered with an error (401); log in with `hf auth login`, with a token that may "
        "write there",
        "qlora-dpo: me/hh: is there already and everybody can read it; say --public if that is meant",
    ]
