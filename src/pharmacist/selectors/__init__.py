"""Selectors: rank an alignment pool. A new one is one file and one line in `SELECTORS`."""

from pharmacist.core.registry import Registry
from pharmacist.selectors.base import Selector


class _Selectors(Registry[Selector]):
    """Selectors by name; names joined by ``+`` stand for the mean of their ranks."""

    def get(self, name: str) -> type[Selector]:
        if "+" not in name:
            return super().get(name)
        from pharmacist.selectors.mix import mixture

        return mixture(name, {part: self.get(part) for part in name.split("+")})


SELECTORS: Registry[Selector] = _Selectors(
    "selector",
    {
        "pharmacist": "pharmacist.selectors.pharmacist.selector:Pharmacist",
        "seal": "pharmacist.selectors.seal:Seal",
        "toxic-lora": "pharmacist.selectors.toxic_lora:ToxicLora",
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
        "el2n": "pharmacist.selectors.el2n:EL2N",
        "grand": "pharmacist.selectors.grand:GraNd",
        "deita": "pharmacist.selectors.deita:Deita",
    },
    group="pharmacist.selectors",
    options={"pharmacist": "pharmacist.selectors.options:PharmacistConfig"},
)

__all__ = ["SELECTORS", "Selector"]
