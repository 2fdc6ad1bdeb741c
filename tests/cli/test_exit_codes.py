"""Real failures through the real command line: each is one sentence, the right exit code, and nothing half-written."""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import commands_in_process
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_sandbox import DATA, HH, MODEL, Workplace, closed_port, fill, rows
from commands_in_process import Said
from hub import Hub


def said(place: Workplace, *commands: list[str], within: tuple[str, ...] = (), **environment: str) -> list[Said]:
    """Run commands in the workplace; what fails prints nothing on stdout."""
    found = commands_in_process.said(commands, place.folder, place.environment(**environment), within)
    assert [each for each in found if each.code and each.out] == []
    return found


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    fill(root)
    silent = root / "models" / "acme" / "no-template"
    shutil.copytree(root / "models" / MODEL, silent)
    (silent / "chat_template.jinja").unlink()
    pickled = root / "models" / "acme" / "pickled"
    shutil.copytree(root / "models" / MODEL, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with Hub(root) as serving:
        yield serving


@pytest.fixture
def place(hub: Hub, tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "work", hub)


def written(place: Workplace) -> list[str]:
    """What commands left in the folder, beside the caches and what the test itself put there."""
    files = (each.relative_to(place.folder) for each in place.folder.rglob("*") if not each.is_dir())
    return sorted(str(each) for each in files if each.parts[0] not in ("hf", "cache", "given"))


def train(*changes: str, output: str = "adapters/x") -> list[str]:
    """The arguments of a short training run with some keys changed."""
    sets = [word for change in changes for word in ("--set", change)]
    return ["train", HH, "-o", output, "--max-steps", "1", *sets]


def test_what_does_not_exist_is_a_sentence_and_nothing_is_left(place: Workplace) -> None:
    (place.folder / "given").write_text("a file")
    commands = {
        (
            2,
            "acme/none: the hub has no such model, or it is private; check model.name, or log in with `hf auth login`",
        ): (train("model.name=acme/none")),
        (2, f'{MODEL}: has no revision "v9"; check model.revision'): train("model.revision=v9"),
        (1, "acme/pickled: is not a model folder: it needs config.json and *.safetensors"): (
            train("model.name=acme/pickled")
        ),
        (
            1,
            "the model's tokenizer has no chat template, as base models have none; give it one with "
            'model.chat_template = "plain" (or "chatml", or a .jinja file), or name an instruct model in model.name',
        ): train("model.name=acme/no-template"),
        (
            2,
            "acme/none: there is no such data set on the hub, or it is private; correct the name, log in with "
            "`hf auth login`, or write ./ before a local path",
        ): train("data.train=acme/none"),
        (2, f'{DATA}: has no split "dev"; it has train, test; set data.train_split or data.eval_split'): (
            train("data.eval_split=dev")
        ),
        (2, '--set lora.rr=8: [lora] has no key "rr"; did you mean "r"?'): train("lora.rr=8"),
        (
            2,
            "lora.target_modules = ['nope'] matches no layer; this model has down_proj, gate_proj, k_proj, "
            "o_proj, q_proj, up_proj, v_proj",
        ): train('lora.target_modules=["nope"]'),
        (1, "given: is a file; name a new folder with -o DIR"): train(output="given"),
        (1, "hf: is not empty; name another folder with -o DIR, remove it, or go on with --resume"): train(output="hf"),
        (1, "adapters/x: holds no checkpoints to resume from; train without --resume"): [*train(), "--resume"],
        (2, "--allow trian.seed: a recipe has no such key; did you mean train.seed?"): [
            *train(),
            *("--resume", "--allow", "trian.seed"),
        ],
        (
            2,
            "--allow says what may have changed since a checkpoint; it needs --resume; see qlora-dpo train --help",
        ): [*train(), "--allow", "train.seed"],
        (
            2,
            "adapters/my run: the name of a run has letters, digits, dots, - and _ only, and at most 64 of them; name "
            "another folder with -o DIR",
        ): train(output="adapters/my run"),
        (2, "adapters/none: there is no such folder; name the folder of a run or of a merged model"): [
            "verify",
            "adapters/none",
        ],
        (1, "adapters: holds no adapter; train one first: qlora-dpo train recipes/quickstart.toml"): ["merge"],
        (2, "adapters/none: there is no such folder; name the adapter folder of a finished run"): [
            "merge",
            "adapters/none",
        ],
        (2, 'stdin is empty; pipe a question in, as in: echo "How are you?" | qlora-dpo chat'): ["chat"],
    }
    found = said(place, *commands.values())
    assert [each.last for each in found] == [(code, f"qlora-dpo: {sentence}") for code, sentence in commands]
    assert written(place) == []


def test_a_damaged_model_folder_is_named(place: Workplace) -> None:
    given, whole = place.folder / "given", place.hub.root / "models" / MODEL
    for name in ("cut", "empty", "words", "config"):
        shutil.copytree(whole, given / name)
    weights = (whole / "model.safetensors").read_bytes()
    (given / "cut" / "model.safetensors").write_bytes(weights[:-1000])
    (given / "empty" / "model.safetensors").unlink()
    (given / "words" / "tokenizer.json").write_text("{")
    (given / "config" / "config.json").write_text("{")
    expected = {
        "cut": "cannot be loaded as a causal language model: Error while deserializing header: incomplete metadata, "
        "file not fully covered",
        "empty": "is not a model folder: it needs config.json and *.safetensors",
        "words": "its tokenizer cannot be loaded: Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1)",
        "config": "its config.json or its index is damaged (JSONDecodeError)",
    }
    found = said(place, *(train(f"model.name=./given/{name}") for name in expected), train("model.name=./given/none"))
    assert [each.last for each in found] == [
        *((1, f"qlora-dpo: {given / name}: {sentence}") for name, sentence in expected.items()),
        (
            2,
            f"qlora-dpo: {given}/none: there is no such folder; model.name is a hub name, a model folder or "
            "pypi:NAME==V",
        ),
    ]
    assert written(place) == []


def test_without_a_network_it_says_so_at_once(place: Workplace) -> None:
    model = place.hub.root / "models" / MODEL
    found = said(place, train(), train(f"model.name={model}"), ["chat"], HF_ENDPOINT=closed_port())
    assert [each.last for each in found[:2]] == [
        (1, f"qlora-dpo: {MODEL}: is not in the cache, and the hub cannot be reached; connect and try again"),
        (
            1,
            f"qlora-dpo: {DATA}: the hub cannot be reached, and it is not in the cache; connect this machine to the "
            "network once, or name a local file in the recipe",
        ),
    ]
    assert max(each.seconds for each in found) < 15
    assert written(place) == []


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up(place: Workplace) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        (found,) = said(place, train(), HF_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert found.last == (
        1,
        f"qlora-dpo: {MODEL}: is not in the cache, and the hub cannot be reached; connect and try again",
    )
    assert found.seconds < 25


MOUNT = """
for disk in hub:64k sets:8k refs:4k out:4k; do mount -t tmpfs -o size=${disk#*:} none given/${disk%:*}; done
mount -t tmpfs -o ro none given/locked
head -c 4096 /dev/zero >given/refs/filled
exec "$@"
"""
SMALL_DISKS = ("unshare", "--map-root-user", "--mount", "sh", "-ec", MOUNT, "sh")


def test_data_with_too_many_bad_rows_is_refused_until_the_recipe_allows_them(place: Workplace) -> None:
    (place.folder / "given").mkdir()
    some = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows(24)]
    some[6]["rejected"] = some[6]["chosen"]
    for name, part in (("bad", some[:20]), ("good", some[20:])):
        (place.folder / "given" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = ("data.train=./given/bad.jsonl", "data.eval=./given/good.jsonl")
    refused, allowed = said(
        place,
        [*train(*data), "--dropped-rows"],
        train(*data, "data.max_bad_share=0.05", "train.batch_size=2", "samples.prompts=1"),
    )[:2]
    assert refused.last == (
        1,
        "qlora-dpo: given/bad.jsonl: 1 of 20 rows (5.0%) are no usable pairs: equal answers (1, first "
        "given/bad.jsonl:7); "
        "data.max_bad_share = 0.01 allows 1.0%; list them with --dropped-rows and mend them, or raise it",
    )
    assert "  rows, dropped: equal answers: 7" in refused.err.splitlines()
    assert allowed.code == 0, allowed.err


def test_a_full_or_locked_disk_is_named_with_what_would_help(place: Workplace) -> None:
    given = {name: place.folder / "given" / name for name in ("hub", "sets", "refs", "out", "locked", "pairs")}
    for each in given.values():
        each.mkdir(parents=True)
    if subprocess.run([*SMALL_DISKS, "true"], cwd=place.folder, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    shutil.copytree(place.hub.root / "models" / MODEL, place.folder / "given" / "model")
    for split, count in (("train", 4), ("test", 2)):
        pq.write_table(pa.Table.from_pylist(rows(count)), given["pairs"] / f"{split}.parquet")
    own = ("model.name=./given/model", "data.train=./given/pairs")
    found = said(
        place,
        train(own[0]),
        train(),
        train(*own),
        train(*own, output="given/out/x"),
        train(*own, output="given/out/x"),
        train(*own, output="given/locked/x"),
        within=SMALL_DISKS,
        HF_HUB_CACHE=str(given["hub"]),
        HF_DATASETS_CACHE=str(given["sets"]),
        QLORA_DPO_CACHE=str(given["refs"]),
    )
    assert [each.code for each in found] == [1] * 6
    sentences = [
        re.sub(r"[0-9a-f]{20,}(\.\.\.)?", "HASH", each.last[1]).replace(f"{place.folder}/", "") for each in found
    ]
    full = "the disk is full; free some space, or set QLORA_DPO_CACHE to another disk"
    assert sentences == [
        f"qlora-dpo: {DATA}: the disk is full; free space in given/sets, or set HF_HOME to a folder on a larger disk",
        f"qlora-dpo: {MODEL}: the disk is full; free space in given/hub, or set HF_HOME to a folder on a larger disk",
        f"qlora-dpo: given/refs/reference/HASH: {full}",
        "qlora-dpo: given/out/x/recipe.toml: the disk is full; free some space",
        "qlora-dpo: given/out/x/recipe.toml: the disk is full; free some space",
        "qlora-dpo: given/locked/x: cannot be written (Read-only file system); choose a folder that you may write to",
    ]
    assert written(place) == []
