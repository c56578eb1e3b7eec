"""Low-rank products of two factors, B A, computed with in factored form."""

from dataclasses import dataclass, replace

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from pharmacist.core.errors import CompatibilityError, NoMatchError


@dataclass(frozen=True)
class Factors:
    """An update ``scale * B A`` of a weight.

    Attributes:
        A: Shape [r, in].
        B: Shape [out, r].
        scale: LoRA's alpha / r.
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float = 1.0

    def dense(self) -> torch.Tensor:
        """The product, shape [out, in]."""
        return self.scale * self.B @ self.A

    def double(self) -> "Factors":
        """The factors in float64, so that rounding does not decide about ranks."""
        return replace(self, A=self.A.detach().double(), B=self.B.detach().double())


def inner(a: Factors, b: Factors) -> torch.Tensor:
    """Inner product ``<scale B A, scale' B' A'>`` by traces of r x r' matrices, a scalar.

    It does not depend on the factorisation: (A, B) -> (R A, B R^-1) leaves it as it is.
    """
    return a.scale * b.scale * ((a.B.T @ b.B) * (a.A @ b.A.T)).sum()


def norm(a: Factors) -> torch.Tensor:
    """Frobenius norm of the product, a scalar."""
    return inner(a, a).clamp(min=0).sqrt()


def cosine(a: Factors, b: Factors) -> torch.Tensor:
    """Cosine of two products as vectors, a scalar; NaN where one of them is 0."""
    return inner(a, b) / (norm(a) * norm(b))


def column_basis(a: Factors) -> torch.Tensor:
    """An orthonormal basis of the product's column space, shape [out, rank], without singular values of rounding."""
    q_left, r_left = torch.linalg.qr(a.B)
    r_right = torch.linalg.qr(a.A.T).R
    u, singular, _ = torch.linalg.svd(a.scale * r_left @ r_right.T)
    kept = singular > singular.max() * max(a.B.shape[0], a.A.shape[1]) * torch.finfo(singular.dtype).eps
    basis: torch.Tensor = q_left @ u[:, : len(singular)][:, kept]
    return basis


def factorise(after: torch.Tensor, before: torch.Tensor) -> Factors:
    """The difference of two weights of shape [out, in] as factors, without singular values of rounding."""
    size = float(after.detach().abs().max()) * (after.shape[0] ** 0.5 + after.shape[1] ** 0.5)
    noise = torch.finfo(after.dtype).eps * size
    u, singular, vh = torch.linalg.svd(after.detach().double() - before.detach().double(), full_matrices=False)
    kept = singular > noise
    return Factors(vh[kept], u[:, kept] * singular[kept])


def adapter_factors(model: nn.Module) -> dict[str, Factors]:
    """The factors of a PEFT model's active LoRA adapter, by the name of the module in the model without it.

    A and B are the parameters themselves, distinguished by name, never by shape.

    Raises:
        NoMatchError: There is no LoRA layer.
        CompatibilityError: An adapter that is more than a product (DoRA), or several active ones.
    """
    return {name: Factors(a.weight, b.weight, scale) for name, (a, b, scale) in adapter_layers(model).items()}


def adapter_layers(model: nn.Module) -> dict[str, tuple[nn.Linear, nn.Linear, float]]:
    """The modules of the factors A and B and their scale, as in `adapter_factors`."""
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for at, adapter in enumerate(adapter for adapter in module.active_adapters if adapter in module.lora_A):
            if at or getattr(module, "use_dora", {}).get(adapter):
                raise CompatibilityError(f"{name}: only one plain LoRA adapter at a time can be repaired, no DoRA")
            layer = module.lora_A[adapter], module.lora_B[adapter], float(module.scaling[adapter])
            found[name.removeprefix("base_model.model.")] = layer
    if not found:
        raise NoMatchError(f"{type(model).__name__}: has no LoRA layer")
    return found
