"""What a sweep found, in Markdown."""

from typing import Any

from pharmacist.report.sweep import markdown


def test_the_name_of_a_judge_makes_no_markup() -> None:
    judge = "strongreject@2+<img src=x>|*m*[a](b)+0123"
    rate: dict[str, Any] = {"value": 40.0, "n": 10, "ci95": [16.8, 68.7], "judge": judge}
    attack = {"name": "lr-0.1", "settings": {"learning_rate": 0.1}, "steps": 4, "within_margin": True}
    summary = {
        "margin": 2.0,
        "best_accuracy": 40.0,
        "worst": "lr-0.1",
        "worst_ci95_of_all": None,
        "highest_of_all": 40.0,
        "before": {"harmful_score": rate},
        "attacks": [attack | {"harmful_score": rate, "fine_tune_accuracy": rate}],
        "curves": {},
    }
    text = markdown(summary)
    assert "<img" not in text and "*m*" not in text.replace("\\*", "") and "strongreject@2+&lt;img src=x&gt;" in text
    assert "| 4 | 40.0 [16.8, 68.7] | 40.0 [16.8, 68.7] | worst case |" in text
