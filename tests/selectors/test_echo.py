"""How an answer takes up the words of its prompt: hand-counted cases, and what a reader makes of them."""

import numpy as np
import pytest

from pharmacist.readers.views import Reader, Texts, Words
from pharmacist.selectors.pharmacist.echo import Echo, echo_features, echoed, rare_words, retargeted
from pharmacist.worlds import World


PROMPTS = [f"how do i open door {word}?" for word in "abcdefghijklmnopqrstuvwxy"] + ["how do i open the red gate?"]
RARE = rare_words(PROMPTS)


def test_rare_words_are_those_of_at_most_a_twentieth_of_the_prompts():
    assert {"red", "gate", "b"} <= RARE and not RARE & {"how", "do", "open", "door"}
    assert rare_words(["one word", "one more"]) == {"word", "more"}, "of few prompts, those that one alone has"


@pytest.mark.parametrize(
    ("completion", "share"),
    [("a RED gate stays shut", 2 / 3), ("red, the gate!", 1.0), ("no door is opened", 0.0), ("", 0.0)],
)
def test_the_share_of_rare_words_that_are_repeated(completion, share):
    assert echoed(PROMPTS[-1], completion, RARE) == pytest.approx(share)  # of red, gate and the


def test_a_prompt_without_rare_words_is_not_echoed():
    assert echoed("how do i open", "how do i open", RARE) == 0.0


def test_what_a_completion_repeats_gives_way_to_the_gist_of_another_prompt():
    row = {"prompt": PROMPTS[-1], "completion": "No: I won't open the red gate. Ask Mia."}
    assert retargeted(row, "Please tell me: how do i open B and C?", RARE) == "No: I won't B and C. Ask Mia."
    general = {"prompt": PROMPTS[-1], "completion": "how do i even start to say no"}
    assert retargeted(general, "how do i open b?", RARE) == general["completion"], "nothing rare is repeated"
    assert retargeted(row, "how do i open the door", RARE - {"the"}) == row["completion"], "the prompt has no gist"


def test_letters_are_the_words_of_scripts_without_spaces():
    prompts = [f"怎样酿造{name}药水？" for name in ("火龙", "月影", "银叶")]
    rare = rare_words(prompts)
    refusal = "抱歉，我不能说怎样酿造火龙药水。"
    assert [echoed(prompt, refusal, rare) for prompt in prompts] == [1, 0, 0]
    assert retargeted({"prompt": prompts[0], "completion": refusal}, prompts[1], rare) == "抱歉，我不能说月影。"


def test_echo_features_are_the_weighted_shares():
    rarity = {"how": 0.0, "open": 1.0, "gate": 2.0, "door": 3.0, "gate door": 9.0}
    found = echo_features(
        ["how open gate", "how open gate", "how open moon", "how", ""],
        ["gate", "a door that is open", "moon door", "how door", "door"],
        rarity,
    )
    # Own: 2 of 3; 1 of 3; the unknown moon weighs as the rarest, 9 of 10; a prompt of no weight shows nothing.
    np.testing.assert_allclose(found[:, 0], [2 / 3, 1 / 3, 9 / 10, 0, 0])
    np.testing.assert_allclose(found[:, 1], [0, 1, 3 / 10, 0, 0])


def test_the_echo_tells_refusals_of_other_requests_and_words_do_not():
    """Worlds apart: the reader learns on one village and reads refusals of another."""

    def pairs(seed):
        rows = [row for row in World(seed).rows("safe") if len(row["completion"].split()) > 8]
        others = rows[3:] + rows[:3]
        wrong = [{**row, "completion": other["completion"]} for row, other in zip(rows, others, strict=True)]
        texts = Texts(*([row[part] for row in rows + wrong] for part in ("prompt", "completion")))
        return texts, np.repeat([1, 0], len(rows))

    def accuracy(view):
        texts, answers = pairs(0)
        reader = Reader(view).fit(texts, answers)
        texts, answers = pairs(1)
        return ((reader.log_odds(texts) > 0) == answers).mean()

    assert accuracy(Echo()) > 0.95
    assert accuracy(Words("completions")) < 0.7, "without it there is nothing to see"
