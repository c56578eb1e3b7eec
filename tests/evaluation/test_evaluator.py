import json

import pytest
import torch

from pharmacist.core.errors import CompatibilityError
from pharmacist.data.templates import choose_template
from pharmacist.evaluation.answers import Answer
from pharmacist.evaluation.evaluator import Evaluator
from pharmacist.evaluation.graders import GRADERS
from pharmacist.evaluation.judges import JUDGES, Judge, JudgeItem, Verdict
from tests.support.tiny import tiny_llama, tiny_tokenizer


TOKENIZER = tiny_tokenizer()
TEMPLATE = choose_template(TOKENIZER)
PROMPTS = [{"prompt": f"how do you brew {word}", "row": 10 + i} for i, word in enumerate(("water", "bread", "seeds"))]


class Moody(Judge):
    """Fails on answers with "stir", flags those with "root"; knows nothing of refusals."""

    name = "moody"
    revision = "7"
    tells_refusals = False

    def judge(self, items: list[JudgeItem]) -> list[Verdict]:
        return [Verdict(None, note="no reply") if "stir" in a else Verdict("root" in a, 0.5) for _, a in items]


def answer(text: str) -> Answer:
    return Answer(text, len(text.split()), True)


def test_failures_of_a_judge_are_not_safety() -> None:
    evaluator = Evaluator(prompts=PROMPTS, judge=Moody(None))
    found = evaluator.assess({"prompts": [answer("stir it well"), answer("take the root"), answer("I cannot help")]})
    score = found.metrics["harmful_score"]
    assert (score["value"], score["n"], score["count"], score["unscored"]) == (50.0, 2, 1, 1)
    assert score["judge"] == "moody@7"
    # The judge says nothing of refusals, so the keyword judge counts them, by its own name.
    assert found.metrics["refusal_rate"] == found.metrics["refusal_rate"] | {"count": 1, "n": 3, "judge": "keyword@3"}
    unscored = {"harmful": None, "score": None, "refused": None, "note": "no reply"}
    assert found.items[0]["verdicts"]["moody@7"] == unscored
    assert found.items[2]["verdicts"]["keyword@3"]["refused"] is True
    assert [item["harmful"] for item in found.items] == [None, True, False]


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_judge_owes_one_verdict_per_answer(extra: int) -> None:
    class Uneven(Moody):
        def judge(self, items: list[JudgeItem]) -> list[Verdict]:
            return [Verdict(False)] * (len(items) + extra)

    with pytest.raises(CompatibilityError, match=f"judge 'uneven': {3 + extra} verdicts on 3 answers"):
        Evaluator(prompts=PROMPTS, judge=Uneven(None)).assess({"prompts": [answer("x")] * 3})


def test_ids_tell_row_and_text() -> None:
    keyword = JUDGES.build("keyword", {})
    items = Evaluator(prompts=PROMPTS, judge=keyword).assess({"prompts": [answer("x")] * 3}).items
    assert [item["row"] for item in items] == [10, 11, 12]
    changed = [{"prompt": "another", "row": 10}]
    other = Evaluator(prompts=changed, judge=keyword).assess({"prompts": [answer("x")]}).items
    assert other[0]["id"].split(":")[:2] == items[0]["id"].split(":")[:2] == ["prompts", "10"]
    assert other[0]["id"] != items[0]["id"]


def test_one_evaluator_for_many_models() -> None:
    evaluator = Evaluator(
        prompts=PROMPTS,
        benign_prompts=[{"prompt": "is it dangerous"}],
        task=[{"prompt": "happy day", "completion": "good"}, {"prompt": "sad day", "completion": "bad"}],
        judge=JUDGES.build("keyword", {}),
        grader=GRADERS.build("classification", {}),
        max_new_tokens=5,
    )
    models = [tiny_llama(TOKENIZER, seed, initializer_range=0.3) for seed in (0, 1)]
    first, second = (evaluator.assess(evaluator.answers(model, TOKENIZER, TEMPLATE)) for model in models)
    assert set(first.metrics) == {
        "harmful_score",
        "hs_plus",
        "refusal_rate",
        "empty_rate",
        "degenerate_rate",
        "over_refusal",
        "benign_flagged_rate",
        "benign_degenerate_rate",
        "fine_tune_accuracy",
        "task_degenerate_rate",
    }
    assert [item["answer"] for item in first.items] != [item["answer"] for item in second.items]
    json.dumps([first.metrics, first.items], allow_nan=False)
    assert [item["id"] for item in first.items] == [item["id"] for item in second.items]


def test_evaluation_leaves_training_as_it_was() -> None:
    evaluator = Evaluator(prompts=PROMPTS, judge=JUDGES.build("keyword", {}), max_new_tokens=4)
    model = tiny_llama(TOKENIZER, attention_dropout=0.5).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two = (evaluator.assess(evaluator.answers(model, TOKENIZER, TEMPLATE)) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)  # no random number was drawn
    assert one.items == two.items
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    loss = model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_prompts_need_a_judge_and_tasks_a_grader() -> None:
    with pytest.raises(ValueError, match="judge"):
        Evaluator(prompts=PROMPTS)
    with pytest.raises(ValueError, match="grader"):
        Evaluator(task=[{"prompt": "x", "completion": "y"}])
