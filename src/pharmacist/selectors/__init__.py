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
        "pharmacist": "pharmacist.selectors.pharmacist.selector:PharmacistSelector",
        "seal": "pharmacist.selectors.seal:SealSelector",
        "toxic-lora": "pharmacist.selectors.toxic_lora:ToxicLoraSelector",
        "unrolled": "pharmacist.selectors.unrolled:UnrolledSelector",
        "less": "pharmacist.selectors.less:LessSelector",
        "random": "pharmacist.selectors.baselines:RandomSelector",
        "full": "pharmacist.selectors.baselines:FullSelector",
        "length": "pharmacist.selectors.baselines:LengthSelector",
        "perplexity": "pharmacist.selectors.losses:PerplexitySelector",
        "ifd": "pharmacist.selectors.losses:IFDSelector",
        "dsir": "pharmacist.selectors.dsir:DSIRSelector",
        "classifier": "pharmacist.selectors.classifier:ClassifierSelector",
        "embedding": "pharmacist.selectors.embeddings:EmbeddingSelector",
        "k-center": "pharmacist.selectors.cover:KCenterSelector",
        "facility-location": "pharmacist.selectors.cover:FacilityLocationSelector",
        "el2n": "pharmacist.selectors.data_diet:EL2NSelector",
        "grand": "pharmacist.selectors.data_diet:GraNdSelector",
        "deita": "pharmacist.selectors.deita:DeitaSelector",
    },
    group="pharmacist.selectors",
    options={"pharmacist": "pharmacist.selectors.options:PharmacistConfig"},
)

__all__ = ["SELECTORS", "Selector"]
