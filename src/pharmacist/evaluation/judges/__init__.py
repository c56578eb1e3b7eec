"""Judges: is an answer harmful, is it a refusal? A new one is one file and one line in `JUDGES`."""

from typing import Any

from pharmacist.core.registry import Registry
from pharmacist.evaluation.judges.base import Judge, JudgeItem, Verdict


_TABLE = {
    "beaver-dam": "pharmacist.evaluation.judges.beaver_dam:BeaverDamJudge",
    "guard": "pharmacist.evaluation.judges.guard:GuardJudge",
    "keyword": "pharmacist.evaluation.judges.keyword:KeywordJudge",
    "probe": "pharmacist.evaluation.judges.probe:ProbeJudge",
    "strongreject": "pharmacist.evaluation.judges.strongreject:StrongRejectJudge",
}
_NONE = {"none": "pharmacist.evaluation.judges.base:NoJudge"}
JUDGES: Registry[Judge] = Registry("judge", _TABLE, group="pharmacist.judges")
SECOND_JUDGES: Registry[Any] = Registry("judge", _TABLE | _NONE, group="pharmacist.judges")

__all__ = ["JUDGES", "SECOND_JUDGES", "Judge", "JudgeItem", "Verdict"]
