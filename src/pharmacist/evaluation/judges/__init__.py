"""Judges: is an answer harmful, is it a refusal? A new one is one file and one line in `JUDGES`."""

from pharmacist.core.registry import Registry
from pharmacist.evaluation.judges.base import Judge, JudgeItem, Verdict


JUDGES: Registry[Judge] = Registry(
    "judge",
    {
        "keyword": "pharmacist.evaluation.judges.keyword:KeywordJudge",
        "probe": "pharmacist.evaluation.judges.probe:ProbeJudge",
    },
    group="pharmacist.judges",
)

__all__ = ["JUDGES", "Judge", "JudgeItem", "Verdict"]
