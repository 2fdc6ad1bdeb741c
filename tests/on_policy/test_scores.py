"""Scores by a judge, a pattern and lengths."""

from qlora_dpo.on_policy.answers import SampledAnswer
from qlora_dpo.on_policy.prompts import AskedPrompt
from qlora_dpo.on_policy.scores import judge_scorer, length_scorer, pattern_scorer

ASKED = AskedPrompt(({"role": "user", "content": "Why?"},))
ANSWERS = [SampledAnswer(text, len(text), True) for text in ("good", "better", "best")]


def preferring(*order: str) -> "object":
    """A judge that prefers what stands later in `order`, and says nothing clear about what does not."""

    def judge(request: str) -> str:
        first, second = (request.split(f"[answer {name}]\n")[1].split("\n")[0] for name in "AB")
        if first not in order or second not in order:
            return "Hard to say."
        return "So [[A]]" if order.index(first) > order.index(second) else "So [[B]]"

    return judge


def test_a_judges_score_is_the_share_of_the_others_that_an_answer_beats() -> None:
    scorer = judge_scorer(preferring("good", "better", "best"), "http://judge", "m")  # type: ignore[arg-type]
    assert scorer.score(ASKED, ANSWERS) == [0.0, 0.5, 1.0]
    assert scorer.score(ASKED, ANSWERS[:1]) == [0.5]
    unclear = judge_scorer(preferring("good", "best"), "http://judge", "m")  # type: ignore[arg-type]
    assert unclear.score(ASKED, ANSWERS) == [0.25, 0.5, 0.75]


def test_a_judge_that_takes_the_first_answer_each_time_tells_nothing_apart() -> None:
    assert judge_scorer(lambda request: "[[A]]", "cmd", None).score(ASKED, ANSWERS) == [0.5, 0.5, 0.5]


def test_a_key_in_the_judges_address_is_not_kept() -> None:
    assert judge_scorer(lambda request: "", "http://me:secret@judge/v1", "m").settings["judge"] == "judge/v1"


def test_patterns_and_lengths() -> None:
    assert pattern_scorer("(?i)B.*t").score(ASKED, ANSWERS) == [0.0, 1.0, 1.0]
    assert length_scorer(longer=True).score(ASKED, ANSWERS) == [4.0, 6.0, 4.0]
    assert length_scorer(longer=False).score(ASKED, ANSWERS) == [-4.0, -6.0, -4.0]
