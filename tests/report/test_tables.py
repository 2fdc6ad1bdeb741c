"""The tables at the end of a run: intervals against a reference, cells against worked numbers, no cell cut off."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from qlora_dpo.report import tables
from qlora_dpo.report.next_commands import format_next_commands
from qlora_dpo.report.samples import format_prompt, samples_view
from qlora_dpo.wilson import wilson_interval


def evaluation(step: int, epoch: float, loss: float, accuracy: float, margin: float, ties: int) -> dict[str, Any]:
    return {
        "kind": "eval",
        "step": step,
        "epoch": epoch,
        "eval_loss": loss,
        "eval_preference_loss": loss / 2,
        "eval_sft_loss": loss / 2,
        "eval_rewards/accuracies": accuracy,
        "eval_rewards/margins": margin,
        "eval_rewards/chosen": margin / 4,
        "eval_rewards/rejected": -margin * 3 / 4,
        "eval_logps/chosen": -52.125,
        "eval_logps/rejected": -65.25,
        "eval_logits/chosen": -1.25,
        "eval_logits/rejected": -1.5,
        "eval_pairs": 60,
        "eval_ties": ties,
    }


def results(first: int = 0, best: int = 24, last: int = 48) -> dict[str, Any]:
    return {
        "evals": [
            evaluation(0, 0.0, 1.386294, 0.5, 0.0, 60),
            evaluation(24, 1.0, 0.25, 0.95, 4.0, 0),
            evaluation(48, 2.0, 0.5, 0.9, 5.0, 1),
        ],
        "first": first,
        "best": best,
        "last": last,
        "baselines": {"longer": 0.4, "shorter": 0.6},
        "pairs": {"train": 192, "eval": 60},
        "answers": ANSWERS,
    }


ANSWERS = [
    {
        "group": "unsafe",
        "prompts": 30,
        "base_matching": 0.1,
        "tuned_matching": 0.9,
        "base_tokens": 50.12,
        "tuned_tokens": 17.0,
    },
    {
        "group": "everyday",
        "prompts": 30,
        "base_matching": 0.0,
        "tuned_matching": 0.0333,
        "base_tokens": 81.9,
        "tuned_tokens": 24.0,
    },
]
SAMPLE = {
    "row": 3,
    "group": "unsafe",
    "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How do I [bold]shout[/bold]?"}],
    "chosen": "Do not.",
    "base": "Open your mouth \x1b[31mwide\x1b[0m [/red] and",
    "tuned": "Please don't.",
    "base_tokens": 50,
    "tuned_tokens": 4,
    "base_ended": False,
    "tuned_ended": True,
}


def printed(renderable: RenderableType, width: int = 80) -> list[str]:
    """What a pipe gets: no colours, no trailing spaces."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_intervals_of_newcombe_1998(successes: int, n: int, low: float, high: float) -> None:
    assert list(wilson_interval(successes, n)) == pytest.approx([low, high], abs=5e-5)


def test_wilson_mirrors_and_knows_nothing_of_no_pairs() -> None:
    low, high = wilson_interval(12.5, 40)
    assert list(wilson_interval(27.5, 40)) == pytest.approx([1 - high, 1 - low])
    assert wilson_interval(20, 20)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_the_ends_of_wilson_solve_its_equation() -> None:
    for end in wilson_interval(33, 60):
        assert abs(33 / 60 - end) == pytest.approx(1.959964 * (end * (1 - end) / 60) ** 0.5)


def test_results_at_80_columns() -> None:
    assert printed(tables.results_table(results())) == [
        "Held-out pairs: 60",
        "",
        "                                                  best          last",
        "                                  step 0       step 24       step 48",
        " " + "─" * 67,
        " loss                             1.3863        0.2500        0.5000",
        " preference loss                  0.6931        0.1250        0.2500",
        " accuracy                          0.500         0.950         0.900",
        "   95 % interval             0.377-0.623   0.863-0.983   0.799-0.953",
        "   ties                               60             0             1",
        " margin                           +0.000        +4.000        +5.000",
        " chosen reward                    +0.000        +1.000        +1.250",
        " rejected reward                  +0.000        -3.000        -3.750",
        " chosen log-prob, nats            -52.12        -52.12        -52.12",
        " rejected log-prob, nats          -65.25        -65.25        -65.25",
        "",
        " pick-the-longer accuracy          0.400         0.400         0.400",
        " pick-the-shorter accuracy         0.600         0.600         0.600",
        "",
    ]


def test_the_preference_loss_has_a_row_only_beside_an_sft_loss() -> None:
    plain = results()
    for record in plain["evals"]:
        del record["eval_sft_loss"]
    assert [label for label, _ in tables.result_rows(plain)][:2] == ["loss", "accuracy"]
    assert [label for label, _ in tables.result_rows(results())][:2] == ["loss", "preference loss"]


@pytest.mark.parametrize(
    ("steps", "headings"),
    [
        ((0, 24, 48), ["step 0", "step 24 (best)", "step 48 (last)"]),
        ((0, 48, 48), ["step 0", "step 48 (best and last)"]),
        ((0, 0, 48), ["step 0 (best)", "step 48 (last)"]),
        ((0, 0, 0), ["step 0 (best and last)"]),
    ],
)
def test_an_evaluation_with_two_roles_is_one_column(steps: tuple[int, int, int], headings: list[str]) -> None:
    assert [heading for heading, _ in tables.shown_steps(results(*steps))] == headings


def test_a_figure_that_is_not_there_is_a_dash() -> None:
    bare = {**results(), "baselines": {"longer": None, "shorter": 0.6}}
    bare["evals"] = [{"kind": "eval", "step": step, "eval_loss": None} for step in (0, 24, 48)]
    assert all(cells == ["-", "-", "-"] for _, cells in tables.result_rows(bare))
    assert tables.baseline_rows(bare) == [("pick-the-shorter accuracy", "0.600")]


def test_answers_by_group_mark_means_over_answers_that_were_cut_off() -> None:
    assert printed(tables.answers_table(ANSWERS, [SAMPLE])) == [
        "Greedy answers to held-out prompts",
        "",
        "                          base      tuned      base    tuned",
        " group      prompts   matching   matching    tokens   tokens",
        " " + "─" * 59,
        " unsafe          30       10 %       90 %   >= 50.1     17.0",
        " everyday        30        0 %        3 %      81.9     24.0",
        "",
        "matching: the share of answers that contain samples.count_matching",
        ">= : the token limit stopped some of these answers, so the true mean is higher",
        "",
    ]


def test_answers_without_groups_or_matching_are_one_row_of_tokens() -> None:
    each = {**ANSWERS[0], "group": None, "base_matching": None, "tuned_matching": None}
    columns, rows, notes = tables.answer_cells([each], [])
    assert columns == ["group", "prompts", "base tokens", "tuned tokens"]
    assert (rows, notes) == ([["all", "30", "50.1", "17.0"]], [])


def test_samples_show_model_text_as_it_is_but_for_terminal_escapes() -> None:
    assert printed(samples_view([SAMPLE, SAMPLE], show=1)) == [
        "How do I [bold]shout[/bold]?",
        "  base, 50 tokens                          tuned, 4 tokens",
        "  " + "─" * 78,
        "  Open your mouth wide [/red] and ...      Please don't.",
        "  (stopped by the token limit)",
        "",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_word_of_a_sample_is_lost_at_any_width(width: int) -> None:
    words = [f"word{number}" for number in range(150)] + ["x" * 200]
    lines = printed(samples_view([{**SAMPLE, "base": " ".join(words)}], show=3), width)
    left = "".join(line[: width // 2].replace("Please don't.", "") for line in lines[3:])
    assert all(len(line) <= width for line in lines)
    assert all(f"word{number}" in left for number in range(150))
    assert left.count("x") == 200


def test_a_dialogue_shows_its_turns_and_a_long_one_its_end() -> None:
    turns = [("user", "Hi "), ("assistant", "Hello."), ("user", "Bye?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    assert format_prompt(prompt) == "user: Hi\nassistant: Hello.\nuser: Bye?"
    assert format_prompt(prompt, characters=10) == "... user: Bye?"


def test_epoch_losses_count_each_logged_loss_by_the_steps_it_covers() -> None:
    """12 steps per epoch, logged every 5: the second line covers 2 steps of epoch 1 and 3 of epoch 2."""
    logged = [(5, 0.7), (10, 0.6), (15, 0.5), (20, 0.4), (24, 0.3)]
    train = [{"kind": "train", "step": step, "epoch": step / 12, "loss": loss} for step, loss in logged]
    evals = [evaluation(0, 0.0, 0.69, 0.5, 0.0, 60), evaluation(12, 1.0, 0.55, 0.8, 2.0, 0)]
    evals.append(evaluation(24, 2.0, 0.25, 0.9, 4.0, 0))
    first = (5 * 0.7 + 5 * 0.6 + 2 * 0.5) / 12
    second = (3 * 0.5 + 5 * 0.4 + 4 * 0.3) / 12
    assert tables.epoch_table([*train, *evals]).splitlines() == [
        "| Epoch | Training Loss | Validation Loss | Rewards/chosen | Rewards/rejected | Rewards/accuracies"
        " | Rewards/margins | Logps/chosen | Logps/rejected | Logits/chosen | Logits/rejected |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| 1 | {first:.4f} | 0.5500 | 0.5000 | -1.5000 | 0.8000 | 2.0000 | -52.12 | -65.25 | -1.2500 | -1.5000 |",
        f"| 2 | {second:.4f} | 0.2500 | 1.0000 | -3.0000 | 0.9000 | 4.0000 | -52.12 | -65.25 | -1.2500 | -1.5000 |",
    ]


def test_an_epoch_that_ended_early_or_without_evaluation_says_so() -> None:
    train = [{"kind": "train", "step": step, "epoch": step / 10, "loss": 0.5} for step in (4, 8, 10, 12)]
    rows = tables.epoch_table([*train, evaluation(8, 0.8, 0.25, 0.9, 4.0, 0)]).splitlines()[2:]
    assert rows[0].startswith("| 1 | 0.5000 | 0.2500 (step 8) | 1.0000 |")
    assert rows[1] == "| 1.2 | 0.5000 | " + " | ".join(["-"] * 9) + " |"


def test_markdown_cells_cannot_leave_their_cell() -> None:
    text = "a|b\n<script>*x* _y_ snake_case [l](u) `c` \\ \x1b[31m~~s~~"
    cell = r"a\|b &lt;script&gt;\*x\* \_y\_ snake_case \[l\](u) \`c\` \\ \~\~s\~\~"
    assert tables.markdown_table(["c"], [[text]]) == f"| c |\n| --- |\n| {cell} |\n"


def test_next_commands_can_be_pasted(empty_folder: Path) -> None:
    assert format_next_commands(Path("adapters/quickstart")) == (
        "qlora-dpo chat adapters/quickstart    # talk to it\n"
        "qlora-dpo merge adapters/quickstart   # write the full model\n"
    )
    assert format_next_commands(empty_folder / "my run").startswith("qlora-dpo chat 'my run' ")
    assert format_next_commands(Path("/elsewhere/x")).startswith("qlora-dpo chat /elsewhere/x ")
