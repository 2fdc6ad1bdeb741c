"""`qlora-dpo check`: what a recipe would do, whether it fits, and what the machine can do."""

import json
import platform
import re
from pathlib import Path
from typing import Any

import cli_sandbox
import commands_in_process
import pytest
import tiny
import tiny_run
from fork_server import run_forked
from transformers import Qwen2Config

from qlora_dpo.cli import main
from qlora_dpo.model import memory
from qlora_dpo.model.gpu_specs import GPU_SPECS
from qlora_dpo.report import machine as machines
from qlora_dpo.report.machine import collect_machine_info

pytestmark = tiny_run.LIBRARIES_WARN

READING = "reading data and tokenizer; whatever is not cached is downloaded, except weights\n"


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"Is {number} even?", "chosen": f"No, {number}.", "rejected": f"Eh, {number}!"}


@pytest.fixture
def place(empty_folder: Path) -> Path:
    """Data of 60 and 52 clean pairs, and a recipe for a tiny model that has no weights."""
    write("train.jsonl", [pair(number) for number in range(60)])
    write("held.jsonl", [pair(number) for number in range(100, 152)])
    config = Qwen2Config(vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    config.save_pretrained("base")
    tiny.tokenizer().save_pretrained("base")
    Path("r.toml").write_text(
        '[model]\nname = "./base"\ndtype = "fp32"\n[lora]\nr = 4\n[data]\ntrain = "./train.jsonl"\n'
        'eval = "./held.jsonl"\n[train]\nbatch_size = 4\n',
        encoding="utf-8",
    )
    return empty_folder


def checked(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main(["check", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_recipe_is_told_in_one_table_without_any_weights(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "r.toml", "--strict"]) == 0
    told = capsys.readouterr()
    assert told.err == READING
    lines = told.out.splitlines()
    verdicts = {line[:10].strip(): line[10:19].strip() for line in lines[:-1] if not line.startswith(" ")}
    assert verdicts == dict.fromkeys(("recipe", "data", "tokens", "device", "memory", "time"), "ok") | {"pairs": ""}
    assert lines[0] == "recipe    ok       r.toml: sigmoid, 15 steps of 4 pairs, learning rate 5e-06"
    assert "data      ok       train.jsonl: 60 rows read, 60 pairs used; strings (prompt, chosen and rejected)" in lines
    assert lines[-1] == "next: qlora-dpo train r.toml"
    parts = [float(line.split()[0]) for line in lines if re.match(r" +\d+\.\d\d GiB  ", line)]
    total = next(line for line in lines if line.startswith("memory"))
    assert float(re.search(r"fits: ([\d.]+) GiB", total)[1]) == pytest.approx(sum(parts), abs=0.05)  # type: ignore[index]


def test_a_mixture_of_two_formats_is_checked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chats = [
        {
            "prompt": [{"role": "user", "content": each["prompt"]}],
            **{side: [{"role": "assistant", "content": each[side]}] for side in ("chosen", "rejected")},
        }
        for each in map(pair, range(60, 100))
    ]
    write("chats.jsonl", chats)
    recipe = Path("r.toml").read_text(encoding="utf-8").replace('train = "./train.jsonl"\n', "")
    sources = "".join(f'[[data.mix]]\nsource = "./{name}.jsonl"\n' for name in ("train", "chats"))
    Path("mix.toml").write_text(recipe + sources, encoding="utf-8")
    found = checked(capsys, "mix.toml")
    assert found["data"]["train"]["rows"] == 100


def test_the_figures_are_those_of_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(capsys, "r.toml")
    tiny_run.tiny.qwen2().save_pretrained("base")
    assert main(["train", "r.toml", "--set", "samples.prompts=0"]) == 0
    run = json.loads(Path("adapters/r/run.json").read_text(encoding="utf-8"))
    assert found["recipe"]["steps"] == run["steps"]
    assert (found["data"]["train"]["used"], found["data"]["eval"]["used"]) == (60, 52)
    audit = json.loads(Path("adapters/r/audit.json").read_text(encoding="utf-8"))
    assert {part: found["tokens"][part] for part in ("prompt", "chosen", "rejected")} == audit["train"]["tokens"]
    assert found["device"]["compute_dtype"] == run["device"]["compute_dtype"] == "fp32"
    assert found["memory"]["fits"] and found["memory"]["needed_bytes"] == sum(found["memory"]["parts"].values())
    assert found["model"]["parameters"] == sum(each.numel() for each in tiny_run.tiny.qwen2().parameters())
    assert found["warnings"] == []


def test_what_is_odd_is_a_warning_and_strict_makes_it_exit_3(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", [pair(number) for number in (*range(60), 7, 100)])
    write("held.jsonl", [pair(number) for number in range(100, 120)])
    arguments = ["r.toml", "--set", "train.warmup_steps=99"]
    found = checked(capsys, *arguments)
    assert found["warnings"] == [
        "data: 1 row: the same pair again; keep one of them",
        "data: 1 row: held-out prompts that are trained on; set data.eval_share, or other splits",
        "data: 20 held-out pairs: the 95 % interval of an accuracy reaches 22 points to either side; hold out more",
        "steps: train.warmup_steps = 99 is not below the 16 steps of the run, so the learning rate never reaches "
        "its peak; lower it",
    ]
    assert main(["check", *arguments, "--strict"]) == 3
    told = capsys.readouterr()
    assert "data      warning  " in told.out and "recipe    warning  " in told.out
    assert "1 row: the same pair again (row 61); keep one of them" in told.out
    assert told.err == (
        f"{READING}qlora-dpo: r.toml: 4 warnings: data: 1 row: the same pair again; keep one of them; and 3 more\n"
    )


def test_pairs_over_max_length_are_counted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", [pair(n) for n in range(45)] + [pair(n) | {"prompt": "How far? " * 60} for n in range(5)])
    for overlong, used in (("drop", 45), ("cut_prompt", 50)):
        found = checked(capsys, "r.toml", "--set", "data.max_length=96", "--set", f"data.overlong={overlong}")
        assert (found["tokens"]["overlong"], found["tokens"]["overlong_share"]) == (5, 0.1)
        assert found["data"]["train"]["used"] == used
        assert (
            "tokens: 10.0% of the pairs are longer than data.max_length = 96; raise it, or look at the remaining ones "
            "with qlora-dpo data show"
        ) in found["warnings"]


def test_another_card_is_judged_by_its_capability_and_memory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    t4 = checked(capsys, "r.toml", "--gpu", "t4", "--set", "model.dtype=auto")
    assert t4["device"] == {
        "type": "cuda",
        "name": "Tesla T4",
        "compute_dtype": "fp16",
        "dtype_reason": "capability (7, 5) is below (8, 0), where bf16 is only emulated",
        "attention": "batched",
        "triton": False,
    }
    assert t4["memory"]["free_bytes"] == GPU_SPECS["t4"].total_bytes
    l4 = checked(capsys, "r.toml", "--gpu", "l4", "--set", "model.dtype=auto")
    assert (l4["device"]["compute_dtype"], l4["device"]["triton"]) == ("bf16", True)


@pytest.mark.parametrize("name", ["t4", "l4", "a10", "3090", "4090", "a100", "h100", "h200"])
def test_cards_go_by_the_names_that_people_say(name: str) -> None:
    assert GPU_SPECS[name].total_bytes > 14 * 2**30


def test_a_run_that_has_no_room_is_refused_before_its_weights_are_read(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.tiny.qwen2().save_pretrained("base")
    free = 82 * 2**20
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert main(["train", "r.toml", "--set", "train.gradient_checkpointing=false", "--set", "samples.prompts=0"]) == 4
    refused = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"qlora-dpo: r\.toml: needs 0\.1 GiB and CPU, \d+ threads has 0\.1 GiB free; "
        r"(set train\.\w+ = .*|no line of .*)take a smaller model or a larger card",
        refused,
    ), refused
    assert not Path("adapters/r").exists()
    assert main(["train", "r.toml", "--set", "train.engine=trl", "--dry-run"]) == 0


def test_of_trls_engine_no_seconds_are_known(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "r.toml", "--set", "train.engine=trl", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["time"]  # what TRL imports may print before it
    assert (found["seconds"], found["why_not"]) == (None, 'train.engine = "trl" computes differently')


def test_what_does_not_fit_exits_4_and_says_what_to_change(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Qwen2Config(vocab_size=900_000, hidden_size=8192, intermediate_size=29568, num_hidden_layers=2,
                         num_attention_heads=64, num_key_value_heads=8)  # fmt: skip
    config.save_pretrained("base")
    assert main(["check", "r.toml", "--gpu", "rtx4060", "--set", "model.dtype=auto"]) == 4
    told = capsys.readouterr()
    assert "memory    no       does not fit: " in told.out and "next:" not in told.out
    assert re.fullmatch(
        re.escape(READING) + r"qlora-dpo: r\.toml: needs \d+\.\d GiB and GeForce RTX 4060 has 8\.0 GiB free; no line "
        r"of the recipe makes it fit; take a smaller model or a larger card\n",
        told.err,
    )
    found = checked(capsys, "r.toml", "--gpu", "rtx4060", "--set", "model.dtype=auto", code=4)
    assert not found["memory"]["fits"]
    assert found["memory"]["ways_to_fit"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["r.toml", "--gpu", "T4"],
            2,
            "--gpu T4: unknown GPU; did you mean t4? Known GPUs are " + ", ".join(GPU_SPECS),
        ),
        (["r.toml", "--gpu", "?"], 2, "--gpu ?: unknown GPU; known GPUs are " + ", ".join(GPU_SPECS)),
        (["--gpu", "t4"], 2, "--gpu needs a RECIPE; see qlora-dpo check --help"),
        (["--set", "lora.r=8"], 2, "--set needs a RECIPE; see qlora-dpo check --help"),
        (
            ["r.toml", "--set", 'lora.target_modules=["query"]'],
            2,
            f"{READING}lora.target_modules = ['query'] matches no layer; this model has down_proj, gate_proj, k_proj, "
            "o_proj, q_proj, up_proj, v_proj",
        ),
        (
            ["r.toml", "--set", "train.optim=paged_adamw_8bit"],
            2,
            f'{READING}train.optim = "paged_adamw_8bit" needs a CUDA GPU; on this CPU choose "adamw_torch", '
            '"adafactor" or "sgd"',
        ),
        (
            ["r.toml", "--set", "train.engine=trl", "--set", "objective.loss_type=simpo"],
            2,
            f'{READING}[objective] has loss_type = "simpo", which TRL\'s DPOTrainer does not have; leave it out, or '
            'set train.engine = "qlora_dpo"',
        ),
        (
            ["r.toml", "--set", "objective.loss_type=kto"],
            2,
            f'{READING}loss_type = "kto" reads answers with a label, and the rows are pairs; choose another loss',
        ),
    ],
)
def test_what_cannot_be_checked_is_refused_as_the_run_would_refuse_it(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    assert main(["check", *arguments]) == code
    before, _, after = message.rpartition(READING)
    assert capsys.readouterr().err == f"{READING if READING in message else before}qlora-dpo: {after}\n"


def test_labelled_answers_are_checked_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, start in (("train.jsonl", 0), ("held.jsonl", 60)):
        rows = [{"prompt": f"{n}?", "completion": f"No, {n}.", "label": n % 2 == 0} for n in range(start, start + 60)]
        write(name, rows)
    found = checked(capsys, "r.toml", "--set", "objective.loss_type=kto")
    assert (found["data"]["length"], found["warnings"]) == (None, [])


FETCH = (
    "import sys; from qlora_dpo.model.sources import fetch_model; from qlora_dpo.recipe.model import ModelTable;"
    "fetch_model(ModelTable(name=sys.argv[1], revision=sys.argv[2]))"
)


def test_hub_models_are_checked_without_their_weights_which_a_run_still_gets(tmp_path: Path) -> None:
    cli_sandbox.fill(tmp_path / "hub")
    with cli_sandbox.Hub(tmp_path / "hub") as hub:
        place = cli_sandbox.Workplace(tmp_path / "work", hub)
        pinned = hub.commit("models", cli_sandbox.MODEL)
        done = place.run("check", cli_sandbox.HH, "--json", "--set", f"model.revision={pinned}")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["data"]["train"]["used"] == 48
        assert not [request for request in hub.log if ".safetensors" in request], hub.log
        assert not list((tmp_path / "work").rglob("*.safetensors"))
        fetch = ["-c", FETCH, cli_sandbox.MODEL, pinned]
        for environment, code in (({"HF_HUB_OFFLINE": "1"}, 1), ({}, 0)):
            fetched = run_forked(fetch, cwd=tmp_path, env=place.environment(**environment))
            assert fetched.returncode == code, fetched.stderr
            told = f"{cli_sandbox.MODEL}: is not in the cache, and the hub cannot be reached; connect and try again"
            assert (told in fetched.stderr) == bool(code)
        assert [request for request in hub.log if ".safetensors" in request]


def test_the_machine_is_a_block_to_paste(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_FakeFakeFakeFakeFakeFake")
    monkeypatch.setenv("OMP_NUM_THREADS", "hf_FakeFakeFakeFakeFakeFake")
    assert main(["check"]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert (lines[0], lines[-1], told.err) == ("```text", "```", "")
    for word in ("qlora-dpo", "processor", "memory", "gpu", "compute", "native bf16", "4-bit", "triton", "torch"):
        assert any(line.startswith(f"{word} ") for line in lines), word
    assert "4-bit        yes: NF4 reproduces a weight with an error of 9." in told.out
    for secret in (str(Path.home()), str(Path.cwd()), platform.node(), "hf_Fake"):
        assert secret not in told.out
    assert "OMP_NUM_THREADS=***" in lines


def test_the_machine_as_json_has_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    here = collect_machine_info()
    assert found["packages"] == here.packages
    assert [(each["what"], each["yes"]) for each in found["verdicts"]] == [(v.what, v.yes) for v in here.verdicts]


def test_packages_outside_of_what_was_tested_are_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = ["torch<2", "no-such-package>=1", "click>=8", 'other; extra == "dev"']
    monkeypatch.setattr(machines.metadata, "requires", lambda name: needed)
    torch = machines.metadata.version("torch")
    expected = (
        f"torch {torch} was not tested; the tested versions are <2",
        "no-such-package is not installed; qlora_dpo needs >=1",
    )
    assert collect_machine_info().warnings == expected
    assert main(["check", "--strict"]) == 3
    told = capsys.readouterr()
    assert told.err == f"qlora-dpo: this machine: 2 warnings: {expected[0]}; and 1 more\n"
    assert f"warning      {expected[0]}" in told.out.splitlines()


PLAN_AND_RUN = """
import contextlib, sys
from qlora_dpo.cli import main
from qlora_dpo.training import loop

@contextlib.contextmanager
def limit_heap(layers, planned_bytes):
    print(len(list(layers)), planned_bytes, file=sys.stderr)
    yield

loop.limit_heap = limit_heap
codes = main(["check", "tiny.toml", "--json"]), main(["train", "tiny.toml", "--set", "train.max_steps=1"])
assert codes == (0, 0), codes
"""


def test_a_run_keeps_its_heap_to_the_bytes_that_check_planned(place: Path) -> None:
    recipe = (place / "r.toml").read_text(encoding="utf-8").replace("held.jsonl", "eval.jsonl")
    cli_sandbox.furnish(place, recipe)
    done = run_forked(["-c", PLAN_AND_RUN], cwd=place, env=commands_in_process.here())
    parts: dict[str, int] = json.loads(done.stdout.partition("\n")[0])["memory"]["parts"]
    there_before = re.compile("4-bit weights|embeddings|LoRA|linear layers|framework's reserve|reference pass")
    planned = sum(size for part, size in parts.items() if not there_before.match(part))
    assert f"2 {planned}" in done.stderr.splitlines()
