"""Selectors: rank an alignment pool. A new one is one file and one line in `SELECTORS`."""

from pharmacist.core.registry import Registry
from pharmacist.selectors.base import Selector


SELECTORS: Registry[Selector] = Registry(
    "selector",
    {
        "pharmacist": "pharmacist.selectors.pharmacist:Pharmacist",
        "seal": "pharmacist.selectors.seal:Seal",
        "unrolled": "pharmacist.selectors.unrolled:Unrolled",
        "less": "pharmacist.selectors.less:Less",
        "random": "pharmacist.selectors.random:Random",
        "full": "pharmacist.selectors.full:Full",
        "length": "pharmacist.selectors.length:Length",
        "loss-low": "pharmacist.selectors.loss:LossLow",
        "loss-high": "pharmacist.selectors.loss:LossHigh",
        "perplexity": "pharmacist.selectors.perplexity:Perplexity",
        "ifd": "pharmacist.selectors.ifd:IFD",
        "dsir": "pharmacist.selectors.dsir:DSIR",
        "classifier": "pharmacist.selectors.classifier:Classifier",
        "embedding": "pharmacist.selectors.embedding:Embedding",
        "k-center": "pharmacist.selectors.k_center:KCenter",
        "facility-location": "pharmacist.selectors.facility_location:FacilityLocation",
    },
    group="pharmacist.selectors",
)

__all__ = ["SELECTORS", "Selector"]
