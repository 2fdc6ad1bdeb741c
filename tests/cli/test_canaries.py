"""Secrets planted wherever a user keeps them are found in no byte that a run writes or prints."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_sandbox import HH, Workplace, fill
from hub import Hub

from qlora_dpo.cli import main

HUB = "hf_" + "CanaryOfTheEnvironmentZq7Xw3Vt"
LOGIN = "hf_" + "CanaryOfTheHubsOwnLoginKp5Rm2"
WANDB = "canary0fcafe" * 3 + "beef"
ENVIRONMENT = {
    "HF_TOKEN": HUB,
    "WANDB_API_KEY": WANDB,
    "OPENAI_API_KEY": "sk-canary-3f9a77b2c4d1",
    "AWS_SECRET_ACCESS_KEY": "canary/AWS+3f9a77b2c4d1",
    "DATABASE_PASSWORD": "canary-database-91",
    "HTTPS_PROXY_PASSWORD": "canary-proxy-92",
    "WANDB_MODE": "offline",
}
CANARIES = [LOGIN, *(value for value in ENVIRONMENT.values() if value != "offline"), "canary-in-an-address"]
SMALL = ("train.batch_size=8", "train.max_steps=3", "train.save_steps=2", "samples.prompts=1", "track.wandb=tests")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    root = tmp_path_factory.mktemp("hub")
    fill(root)
    with Hub(root) as hub:
        place = Workplace(tmp_path_factory.mktemp("work"), hub)
        (place.folder / "hf").mkdir()
        (place.folder / "tmp").mkdir()
        (place.folder / "hf" / "token").write_text(LOGIN)
        (place.folder / "hf" / "stored_tokens").write_text(f"[mine]\nhf_token = {LOGIN}\n")
        yield place


def run(place: Workplace, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return place.run(*arguments, stdin=stdin, TMPDIR=str(place.folder / "tmp"), **(ENVIRONMENT | environment))


def told(text: bytes) -> list[str]:
    return [canary for canary in CANARIES if canary.encode() in text]


def test_no_secret_is_in_any_byte_of_a_whole_run(place: Workplace) -> None:
    sets = [word for change in SMALL for word in ("--set", change)]
    commands: list[tuple[int, list[str], dict[str, str]]] = [
        (0, ["train", HH, "-o", "adapters/x", *sets], {}),
        (0, ["train", HH, "-o", "adapters/y", *sets, "--max-steps", "1"], {"HF_TOKEN": ""}),
        (0, ["verify", "adapters/x"], {}),
        (0, ["merge", "adapters/x"], {}),
        (0, ["chat", "merged/x"], {}),
        (2, ["train", HH, "--set", "model.name=acme/none"], {"QLORA_DPO_TRACEBACK": "1"}),
        (1, ["train", HH, "-o", "adapters/x"], {"QLORA_DPO_TRACEBACK": "1"}),
        (2, ["train", HUB], {}),
        (2, ["train", HH, "--set", f"model.name=acme/{HUB}"], {}),
        (2, ["train", HH, "--set", "model.name=https://me:canary-in-an-address@hub.example/a/b"], {}),
        (2, ["chat", f"acme/{ENVIRONMENT['DATABASE_PASSWORD']}"], {"QLORA_DPO_TRACEBACK": "1"}),
        (
            1,
            ["train", HH, "-o", "adapters/z", "--set", "model.name=acme/other"],
            {"HF_ENDPOINT": "http://me:canary-in-an-address@127.0.0.1:9", "QLORA_DPO_TRACEBACK": "1"},
        ),
    ]
    for code, arguments, environment in commands:
        done = run(place, *arguments, stdin="How are you?", **environment)
        assert done.returncode == code, done.stderr
        assert told((done.stdout + done.stderr).encode()) == [], (arguments, done.stderr)
    planted = {place.folder / "hf" / "token", place.folder / "hf" / "stored_tokens"}
    files = [path for path in place.folder.rglob("*") if path.is_file() and path not in planted]
    assert len(files) > 60
    assert any(path.suffix == ".wandb" for path in files)
    leaks = {str(path.relative_to(place.folder)): told(path.read_bytes()) for path in files}
    assert {name: found for name, found in leaks.items() if found} == {}
    names = " ".join(str(path) for path in place.folder.rglob("*"))
    assert told(names.encode()) == []
    assert sum(path.stat().st_size for path in files) > 100_000


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (f'[model]\nname = "a/b" # {HUB}xxxxxxxx\n[data]\ntrain = "c/d"\n', "bad.toml:2"),
        ('[model]\nname = "a/b"\n[data]\ntrain = "https://me:pass@example.org/d.jsonl"\n', "bad.toml:4"),
    ],
)
def test_a_recipe_that_holds_a_token_is_refused_by_line(
    text: str, where: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.toml").write_text(text)
    assert main(["train", "bad.toml"]) == 2
    assert capsys.readouterr().err == (
        f"qlora-dpo: {where}: holds what looks like a token or a password, and a recipe is copied into every run and "
        "card; take it out, and log in with `hf auth login` or set HF_TOKEN\n"
    )


def test_names_that_look_a_little_like_tokens_are_taken(empty_folder: Path) -> None:
    from qlora_dpo.recipe import load_recipe

    Path("good.toml").write_text('[model]\nname = "sk-learn/hf_model-v2"\n[data]\ntrain = "c/sk-based-pairs-of-2024"\n')
    assert load_recipe("good.toml").recipe.model.name == "sk-learn/hf_model-v2"
