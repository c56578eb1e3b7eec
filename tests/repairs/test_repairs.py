"""The mathematics of the repairs, in float64: factored form against dense, gauge tests, exact counts."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from pharmacist.core.errors import CompatibilityError, ConfigError, NoMatchError
from pharmacist.nn.lowrank import Factors, adapter_factors, column_basis, cosine, factorise, inner, norm
from pharmacist.repairs import REPAIRS, base
from pharmacist.repairs.antidote import bad_mask, factor_mask, scores
from pharmacist.repairs.base import Change, ModelWeights, Plan, References, sum_over_inputs
from pharmacist.repairs.nlsr import output_basis, probabilities, safety_region
from pharmacist.repairs.safe_lora import SafeLoraConfig, chosen, project, similarity
from tests.support import toy
from tests.support.architectures import ARCHITECTURES, tiny
from tests.support.tiny import TinyDecoder, random_token_rows, tiny_llama, tiny_tokenizer


R = 2
WIDTH = 8
ROWS = random_token_rows(6, toy.VOCABULARY, seed=4, longest=5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(out=WIDTH, width=6, r=R, seed=0, scale=0.5):
    return Factors(random(r, width, seed=seed), random(out, r, seed=seed + 100), scale)


def regauged(f, seed=7):
    """The same product by other factors."""
    turn = random(f.A.shape[0], f.A.shape[0], seed=seed)
    return Factors(turn @ f.A, f.B @ torch.linalg.inv(turn), f.scale)


def peft_model(r=R, seed=0, zero=False):
    """A float64 decoder, with biases, under a LoRA adapter on attention and feed-forward layers."""
    torch.manual_seed(seed)
    config = LoraConfig(r=r, lora_alpha=3 * r, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.1)
    net = TinyDecoder(toy.VOCABULARY, width=WIDTH, layers=2, seed=1)
    model = get_peft_model(nn.Module.double(_Wrapped(net)), config, autocast_adapter_dtype=False).double().eval()
    if not zero:
        with torch.no_grad():
            for number, own in enumerate(adapter_factors(model).values()):
                own.A.copy_(random(*own.A.shape, seed=seed + number))
                own.B.copy_(random(*own.B.shape, seed=seed + 50 + number) * 0.2)
    return model


class _Wrapped(nn.Module):
    """PEFT asks a model for a configuration that can be read like a dictionary."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.config = {"model_type": "tiny"}

    def forward(self, **batch):
        return self.net(**batch)


def build(name, **options):
    return REPAIRS.build(name, options)


# --- factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [R, WIDTH])
def test_factored_algebra_equals_dense(r):
    a, b = factors(r=r), factors(r=r + 1, seed=3, scale=2.0)
    assert float(inner(a, b)) == pytest.approx(float((a.dense() * b.dense()).sum()))
    assert float(norm(a)) == pytest.approx(float(a.dense().norm()))
    expected = float(nn.functional.cosine_similarity(a.dense().flatten(), b.dense().flatten(), dim=0))
    assert float(cosine(a, b)) == pytest.approx(expected)
    assert float(cosine(a, Factors(a.A, a.B, 9.0))) == pytest.approx(1.0)


def test_factored_algebra_does_not_see_the_factorisation():
    a, b = factors(), factors(seed=3)
    assert float(cosine(regauged(a), b)) == pytest.approx(float(cosine(a, b)), rel=1e-9)
    assert float(norm(regauged(a))) == pytest.approx(float(norm(a)), rel=1e-9)
    assert not torch.allclose(regauged(a).A, a.A)


@pytest.mark.parametrize("out", [WIDTH, R])
def test_column_basis_spans_the_product(out):
    f = factors(out=out)
    basis = column_basis(f)
    assert basis.shape == (out, R)
    assert torch.allclose(basis.T @ basis, torch.eye(R, dtype=torch.float64))
    assert torch.allclose(basis @ (basis.T @ f.dense()), f.dense())
    redundant = Factors(torch.cat([f.A, f.A]), torch.cat([f.B, f.B], 1))
    assert column_basis(redundant).shape == (out, R)
    thin = Factors(torch.stack([f.A[0], 2 * f.A[0]]), f.B)
    assert column_basis(thin).shape == (out, 1), "of the product, not of its left factor"


def test_a_difference_of_rounded_weights_has_the_rank_of_the_update():
    weight, f = random(WIDTH, 6, seed=9), factors()
    after, before = (weight + f.dense()).float(), weight.float()
    found = factorise(after, before)
    assert found.A.shape[0] == R and torch.allclose(found.dense(), f.dense(), atol=1e-6)
    assert torch.linalg.matrix_rank((after - before).double()) > R
    assert factorise(before, before).A.shape[0] == 0


def test_factors_of_a_model_are_told_apart_by_name():
    """r == d_out of the first layer: shapes alone would take B for A."""
    model = peft_model(r=WIDTH)
    found = adapter_factors(model)
    assert len(found) == 6 and all(".lora" not in name and name.startswith("net.layers.") for name in found)
    before = model(input_ids=torch.arange(1, 5)[None]).logits
    for name, own in found.items():
        layer = dict(model.base_model.model.named_modules())[name]
        assert own.A.shape == (WIDTH, layer.base_layer.in_features)
        assert own.scale == 3.0
        layer.base_layer.weight.data += own.dense()
        own.B.data.zero_()
    assert torch.allclose(model(input_ids=torch.arange(1, 5)[None]).logits, before)
    with pytest.raises(NoMatchError):
        adapter_factors(TinyDecoder(5))


# --- frame ---------------------------------------------------------------------------------------------------------


def test_a_repair_that_changes_nothing_is_refused():
    weights = ModelWeights(peft_model(), "adapter")
    name, tensor = next(iter(weights.tensors().items()))
    with pytest.raises(NoMatchError, match="would not change a single weight"):
        base.apply(weights, Plan({name: tensor.detach().clone()}, []))
    with pytest.raises(NoMatchError):
        base.apply(weights, Plan({}, []))
    with pytest.raises(NoMatchError, match="not finite"):
        base.apply(weights, Plan({name: tensor.detach() * torch.nan}, []))
    new = tensor.detach().clone()
    new[0, 0] += 1
    assert base.apply(weights, Plan({name: new}, [])) == [
        Change(name, tensor.numel(), 1, pytest.approx(float((new - 0).norm()), rel=1), float(new.float().norm()))
    ]
    assert torch.equal(weights.tensors()[name], new)


@pytest.mark.parametrize("completion_only", [False, True])
def test_inputs_are_seen_without_padding(completion_only):
    """All rows in one batch, or each by itself: the same sums."""
    weights = ModelWeights(peft_model(), "adapter")
    sums = []
    for size in (1, 6):
        how = {"completion_only": completion_only, "rows_per_batch": size}
        sums.append(sum_over_inputs(weights, ROWS, lambda _, inputs: inputs.square().sum(0), **how))
    assert len(sums[0]) == 12
    assert all(torch.allclose(sums[0][name], sums[1][name], rtol=1e-10) for name in sums[0])
    assert toy.hooks(weights.model) == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inputs_of_every_architecture_are_seen_without_padding(name):
    """OPT's feed-forward layers see the tokens of all rows in one."""
    weights = ModelWeights(tiny(name), "weights")
    alone, together = (
        sum_over_inputs(weights, ROWS, lambda _, inputs: inputs.square().sum(0), rows_per_batch=size)
        for size in (1, 6)
    )
    assert alone.keys() == together.keys() == weights.tensors().keys()
    assert all(torch.allclose(alone[module], together[module], rtol=1e-4) for module in alone)


def test_one_pass_sees_what_two_passes_per_layer_see():
    """As published: every layer runs once to be measured and once more for the inputs of the next. Bit for bit."""
    net = TinyDecoder(toy.VOCABULARY, width=WIDTH, layers=2, seed=1)
    weights, theirs = ModelWeights(net, "weights"), {}

    def squares(_, inputs):
        return inputs.detach().square().sum(0)

    def add(name, inputs):
        theirs[name] = theirs.get(name, 0) + squares(name, inputs)

    ours = sum_over_inputs(weights, ROWS, squares, rows_per_batch=1)
    inside = {name: net.get_submodule(name) for name in ModelWeights(net, "weights").tensors()}
    for ids in ROWS.ids:
        length = len(ids)
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        x = net.embed(torch.tensor(ids)[None]) + net.position.weight[:length]
        for number, layer in enumerate(net.layers):
            hooks = [
                module.register_forward_hook(lambda _, args, out, name=name: add(name, args[0].flatten(0, -2)))
                for name, module in inside.items()
                if name.startswith(f"layers.{number}.")
            ]
            layer(x, mask)
            for hook in hooks:
                hook.remove()
            x = layer(x, mask)
    assert ours.keys() == theirs.keys() and len(ours) > 4
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_adapters_of_any_name_and_layers_with_biases():
    model = peft_model()
    model.add_adapter("user", LoraConfig(r=3, target_modules=["up_proj"]))
    model.set_adapter("user")
    found = adapter_factors(model)
    assert len(found) == 2 and all(own.A.shape[0] == 3 for own in found.values())
    layers = dict(model.base_model.model.named_modules())
    assert all(layers[name].base_layer.bias is not None for name in found)  # which belong to no factor
    with torch.no_grad():
        for number, own in enumerate(found.values()):
            own.A.copy_(random(*own.A.shape, seed=number))
            own.B.copy_(random(*own.B.shape, seed=number + 9))
    update = {n: factors(f.B.shape[0], f.A.shape[1], seed=30 + i) for i, (n, f) in enumerate(found.items())}
    before = {name: own.dense().detach() for name, own in found.items()}
    other = {n: p.detach().clone() for n, p in model.named_parameters() if ".user." not in n}
    base.apply(ModelWeights(model, "adapter"), safe_lora(model, update, threshold=1.0))
    for name, own in adapter_factors(model).items():
        basis = column_basis(update[name])
        assert torch.allclose(own.dense(), (basis @ basis.T).to(own.A.dtype) @ before[name], atol=1e-6)
    assert all(torch.equal(p, other[n]) for n, p in model.named_parameters() if ".user." not in n)


def test_hooks_and_mode_come_back_when_a_pass_fails():
    weights = ModelWeights(peft_model(), "adapter")
    weights.model.train()

    def see(name, inputs):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        sum_over_inputs(weights, ROWS, see)
    assert toy.hooks(weights.model) == 0 and weights.model.training


def test_a_module_that_does_not_run_is_named():
    unused = get_peft_model(_Unused(), LoraConfig(r=1, target_modules=["used", "unused"]))
    with pytest.raises(NoMatchError, match="unused"):
        sum_over_inputs(ModelWeights(unused, "adapter"), ROWS, lambda _, inputs: inputs.sum())


class _Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"model_type": "tiny"}
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, input_ids, attention_mask):
        return self.used(torch.ones(*input_ids.shape, 3))


# --- Antidote ------------------------------------------------------------------------------------------------------


def antidote(alpha, seed=0, model=None, **more):
    weights = ModelWeights(model or peft_model(seed=seed), "adapter")
    return weights, build("antidote", alpha=alpha, **more).plan(weights, References(harmful=ROWS))


@pytest.mark.parametrize(
    ("width", "alpha", "count"), [(10, 0.9, 9), (10, 0.29, 3), (7, 0.5, 4), (8, 0.1, 1), (5, 1, 5)]
)
def test_exactly_k_entries_of_each_row_are_its_largest(width, alpha, count):
    score = random(4, width).abs()
    mask = bad_mask(score, alpha)
    assert mask.sum(1).tolist() == [count] * 4
    for row, pruned in zip(score, mask, strict=True):
        assert count == width or float(row[pruned].min()) > float(row[~pruned].max())


def test_the_published_count_is_one_more_at_times():
    assert bad_mask(random(1, 10).abs(), 0.9, "reference").sum() == 10  # int(10 * 0.0999...) are kept
    assert bad_mask(random(1, 10).abs(), 0.9).sum() == 9


def test_masks_are_nested_in_alpha_and_ties_go_to_the_first():
    score = random(5, 9).abs()
    masks = [bad_mask(score, alpha) for alpha in (0.1, 0.3, 0.5, 1.0)]
    assert all((a <= b).all() for a, b in itertools.pairwise(masks))
    assert bad_mask(torch.zeros(1, 4, dtype=torch.float64), 0.5).tolist() == [[True, True, False, False]]


def test_scores_depend_on_the_column_norms_alone():
    weight, x = random(3, 4), random(20, 4, seed=2)
    squares = x.square().sum(0)
    score = scores(weight, squares)
    assert float(score[1, 2]) == pytest.approx(abs(float(weight[1, 2])) * float(x[:, 2].norm()))
    mask = bad_mask(score, 0.5)
    assert torch.equal(bad_mask(scores(weight, (3 * x).square().sum(0)), 0.5), mask)
    assert torch.equal(bad_mask(scores(weight, x[torch.randperm(20)].square().sum(0)), 0.5), mask)
    louder = x * torch.tensor([1e6, 1, 1, 1], dtype=torch.float64)
    assert bad_mask(scores(weight, louder.square().sum(0)), 0.25)[:, 0].all()


def test_an_output_loses_exactly_the_term_of_its_dominant_entry():
    weight, x = random(3, 8), random(20, 8, seed=2)
    weight[:, 5] *= 1e3
    mask = bad_mask(scores(weight, x.square().sum(0)), 0.125)
    assert mask[:, 5].all() and mask.sum() == 3
    pruned = weight.masked_fill(mask, 0)
    assert torch.allclose(x @ weight.T - x @ pruned.T, x[:, 5:6] * weight[:, 5])


def test_antidote_prunes_factors_and_nothing_else():
    weights, plan = antidote(0.5)
    model = weights.model
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if "lora" not in n}
    before = {name: tensor.detach().clone() for name, tensor in weights.tensors().items()}
    base.apply(weights, plan)
    for name, tensor in weights.tensors().items():
        assert (tensor == 0).sum() == round(0.5 * tensor.numel())
        assert ((tensor == 0) | (tensor == before[name])).all()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if "lora" not in n)
    with pytest.raises(NoMatchError):
        base.apply(weights, plan)  # idempotent: a second time nothing changes


def test_antidote_reads_prompts_and_answers_alike():
    weights, plan = antidote(0.3)
    pruned = {name: value == 0 for name, value in plan.tensors.items()}

    def masks(completion_only):
        squares = sum_over_inputs(weights, ROWS, lambda _, x: x.square().sum(0), completion_only=completion_only)
        return {name: factor_mask(scores(value, squares[name]), 0.3) for name, value in weights.tensors().items()}

    assert all(torch.equal(pruned[name], mask) for name, mask in masks(False).items())
    assert any(not torch.equal(pruned[name], mask) for name, mask in masks(True).items())


def test_a_small_share_of_a_factor_with_few_columns_is_not_nothing():
    weights, plan = antidote(0.05, model=peft_model(r=8))  # round(0.05 * 8) entries of a row are none
    for change in base.apply(weights, plan):
        assert change.changed == int(0.05 * change.entries + 0.5) > 0, change.tensor
    mask = factor_mask(score := random(12, 8).abs(), 0.05)
    assert mask.sum() == 5 and float(score[mask].min()) > float(score[~mask].max())


def test_antidote_with_alpha_1_gives_the_aligned_model():
    weights, plan = antidote(1.0)
    base.apply(weights, plan)
    ids = torch.arange(1, 6)[None]
    with weights.model.disable_adapter():
        expected = weights.model(input_ids=ids).logits
    assert torch.equal(weights.model(input_ids=ids).logits, expected)


def test_antidote_of_a_fresh_adapter_and_of_nothing():
    with pytest.raises(ConfigError, match="alpha must lie in"):
        build("antidote", alpha=0.0)
    weights, plan = antidote(0.5, model=peft_model(r=1, zero=True))
    # B is zero: only A has entries to prune.
    changes = {change.tensor: change.changed for change in base.apply(weights, plan)}
    assert all(bool(count) == name.endswith("A") for name, count in changes.items())


def test_antidote_on_whole_weights():
    net = TinyDecoder(toy.VOCABULARY, width=WIDTH, layers=2, seed=1)
    weights = ModelWeights(net, "weights")
    head, biases = net.lm_head.weight.clone(), [p.clone() for n, p in net.named_parameters() if n.endswith("bias")]
    base.apply(weights, build("antidote", alpha=0.25).plan(weights, References(harmful=ROWS)))
    assert all(
        (w == 0).sum(1).tolist() == [w.shape[1] // 4] * len(w) for w in ModelWeights(net, "weights").tensors().values()
    )
    assert torch.equal(net.lm_head.weight, head)
    assert all(
        torch.equal(a, p)
        for a, (n, p) in zip(biases, ((n, p) for n, p in net.named_parameters() if n.endswith("bias")), strict=True)
    )


def test_antidote_does_depend_on_the_factorisation():
    """The negative control of the gauge tests: entries of factors have no meaning of their own."""
    dense = []
    for turn in (False, True):
        model = peft_model()
        if turn:
            for own in adapter_factors(model).values():
                other = regauged(own)
                own.A.data.copy_(other.A)
                own.B.data.copy_(other.B)
        weights, plan = antidote(0.5, model=model)
        base.apply(weights, plan)
        dense.append([own.dense().detach() for own in adapter_factors(model).values()])
    assert any(not torch.allclose(a, b) for a, b in zip(*dense, strict=True))


# --- Safe LoRA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["orthogonal", "paper", "trace"])
def test_factored_projection_equals_dense(kind):
    v, x = factors(seed=5), random(WIDTH, 3, seed=6)
    dense = v.dense()
    size = float(dense.norm())
    u = torch.linalg.svd(dense).U[:, :R]
    c = {"orthogonal": u @ u.T, "paper": dense @ dense.T / size, "trace": dense @ dense.T / size**2}[kind]
    assert torch.allclose(project(v, x, kind), c @ x)
    assert torch.allclose(project(factorise(dense, torch.zeros_like(dense)), x, kind), c @ x)
    assert torch.allclose(project(Factors(v.A, v.B, -v.scale), x, kind), c @ x)
    assert torch.allclose(project(regauged(v), x, kind), c @ x)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    matrix = project(v, eye, kind)
    assert torch.allclose(matrix, matrix.T) and torch.linalg.matrix_rank(matrix) == R
    assert float(torch.linalg.eigvalsh(matrix)[0]) > -1e-12


def test_only_the_orthogonal_projection_is_one():
    v, x = factors(seed=5), random(WIDTH, 3, seed=6)
    for kind, idempotent in (("orthogonal", True), ("paper", False), ("trace", False)):
        once = project(v, x, kind)
        assert torch.allclose(project(v, once, kind), once) == idempotent
    triple = Factors(v.A, v.B, 3 * v.scale)
    assert torch.allclose(project(triple, x, "paper"), 3 * project(v, x, "paper"))
    assert torch.allclose(project(triple, x, "trace"), project(v, x, "trace"))


def test_similarity_is_the_cosine_of_update_and_projection():
    for seed, kind in itertools.product(range(5), ("orthogonal", "paper", "trace")):
        v, own = factors(seed=seed), factors(seed=seed + 20)
        moved = Factors(own.A, project(v, own.B, kind), own.scale)
        value = similarity(own, moved)
        a, b = own.dense().flatten(), moved.dense().flatten()
        assert value == pytest.approx(float(a @ b / (a.norm() * b.norm()))) and 0 <= value <= 1
        if kind == "orthogonal":
            assert value == pytest.approx(float(norm(moved) / norm(own)))
        again = regauged(own, seed)
        other = similarity(again, Factors(again.A, project(regauged(v, 3), again.B, kind), own.scale))
        assert other == pytest.approx(value, rel=1e-7)


def test_kantorovich_bounds_the_published_cosine():
    v, own = random(WIDTH, WIDTH, seed=2), factors()
    values = torch.linalg.eigvalsh(v @ v.T)
    low, high = float(values[0]), float(values[-1])
    full = factorise(v, torch.zeros_like(v))
    cos = similarity(own, Factors(own.A, project(full, own.B, "paper"), own.scale))
    assert cos >= 2 * math.sqrt(low * high) / (low + high) - 1e-12


def test_an_orthogonal_alignment_update_keeps_everything():
    q = torch.linalg.qr(random(WIDTH, WIDTH, seed=2)).Q
    q, own = factorise(q, torch.zeros_like(q)), factors()
    assert torch.allclose(project(q, own.B, "paper"), own.B / math.sqrt(WIDTH))
    assert similarity(own, Factors(own.A, project(q, own.B), own.scale)) == pytest.approx(1.0)


def test_which_modules_are_projected():
    cosines = [0.3, math.nan, 0.1, 0.3, 0.9]
    pick = lambda **options: chosen(cosines, SafeLoraConfig(**options))  # noqa: E731
    assert pick(threshold=0.3) == [0, 2, 3] and pick(threshold=0.29) == [2] and pick(threshold=1.0) == [0, 2, 3, 4]
    assert [pick(select="number", number=k) for k in (1, 2, 3, 4)] == [[2], [0, 2], [0, 2, 3], [0, 2, 3, 4]]
    with pytest.raises(ConfigError, match="number 5: only 4 modules have an update that can be projected"):
        pick(select="number", number=5)
    with pytest.raises(ConfigError, match="number 5: has no effect with select threshold; change that"):
        pick(number=5)
    with pytest.raises(ConfigError, match=r"threshold 0\.9: has no effect with select number"):
        pick(select="number", number=2, threshold=0.9)
    with pytest.raises(ConfigError, match="must be at least 1"):
        pick(select="number", number=0)


def safe_lora(tuned, update, form="adapter", aligned=None, **options):
    return build("safe-lora", **options).plan(ModelWeights(tuned, form), References(update=update, aligned=aligned))


@pytest.mark.parametrize("r", [R, WIDTH])
def test_safe_lora_moves_updates_into_the_alignment_space(r):
    tuned, update = peft_model(r=r), {}
    for number, (name, own) in enumerate(adapter_factors(tuned).items()):
        update[name] = factors(own.B.shape[0], own.A.shape[1], seed=number + 30)
    before = {name: own.dense().detach() for name, own in adapter_factors(tuned).items()}
    weights = ModelWeights(tuned, "adapter")
    plan = safe_lora(tuned, update, threshold=1.0)
    assert torch.equal(next(iter(adapter_factors(tuned).values())).dense(), next(iter(before.values())))  # only a plan
    base.apply(weights, plan)
    for (name, own), finding in zip(adapter_factors(tuned).items(), plan.findings, strict=True):
        basis = column_basis(update[name])
        assert torch.allclose(own.dense(), basis @ basis.T @ before[name])
        assert finding["cosine"] == pytest.approx(float(own.dense().detach().norm() / before[name].norm()), abs=1e-6)
    with pytest.raises(NoMatchError):  # the projector is one: nothing is left to do but rounding
        safe_lora(tuned, update, threshold=0.5)


def test_safe_lora_on_whole_weights_is_the_same():
    tuned, update = peft_model(), {}
    for number, (name, own) in enumerate(adapter_factors(tuned).items()):
        update[name] = factors(own.B.shape[0], own.A.shape[1], seed=number + 30)
    plain = TinyDecoder(toy.VOCABULARY, width=WIDTH, layers=2, seed=1)
    aligned = ModelWeights(_Wrapped(plain), "weights")
    aligned.model.get_output_embeddings = lambda: plain.lm_head
    base.apply(ModelWeights(peft := peft_model(), "adapter"), safe_lora(peft, update, threshold=0.5))
    expected = peft.merge_and_unload()
    merged = tuned.merge_and_unload()
    merged.get_output_embeddings = lambda: merged.net.lm_head
    base.apply(ModelWeights(merged, "weights"), safe_lora(merged, update, "weights", aligned, threshold=0.5))
    for name, weight in ModelWeights(merged, "weights").tensors().items():
        assert torch.allclose(weight, dict(expected.named_modules())[name].weight), name


def test_safe_lora_leaves_modules_without_an_update_alone():
    tuned = peft_model()
    empty = {n: Factors(torch.zeros_like(f.A), f.B.detach()) for n, f in adapter_factors(tuned).items()}
    with pytest.raises(NoMatchError, match="would project no module"):
        safe_lora(tuned, empty, threshold=1.0)
    with pytest.raises(NoMatchError, match="no module in common"):
        safe_lora(tuned, {"elsewhere": factors()})
    with pytest.raises(CompatibilityError, match="--form weights"):
        build("safe-lora").check("adapter", continued=True)


# --- NLSR ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "width"), [(5, 9), (9, 5), (6, 6)])
def test_the_basis_gives_the_best_low_rank_outputs(out, width):
    weight, x = random(out, width), random(40, width, seed=3)
    basis = output_basis(weight, x.T @ x, 0.6)
    q = int(0.6 * min(out, width) + 1e-9)
    assert basis.shape == (out, q)
    projector = basis @ basis.T
    assert torch.allclose(projector @ projector, projector)
    outputs = x @ weight.T
    tail = torch.linalg.svdvals(outputs)[q:].square().sum().sqrt()
    assert float((outputs - x @ (projector @ weight).T).norm()) == pytest.approx(float(tail))
    whole = output_basis(weight, x.T @ x, 1.0)
    assert torch.allclose(whole @ (whole.T @ weight), weight)
    by_outputs = output_basis(weight, outputs.T @ outputs, 0.6, of_outputs=True)
    assert torch.allclose(by_outputs @ by_outputs.T, projector)


@pytest.mark.parametrize("region", [0.2, 0.29, 0.5, 1.0])
def test_the_region_has_exactly_its_share_of_largest_entries(region):
    weight, x = random(6, 7), random(40, 7, seed=3)
    basis = output_basis(weight, x.T @ x, 0.5)
    mask = safety_region(weight, basis, region)
    size = (basis @ basis.T @ weight).abs()
    assert int(mask.sum()) == round(region * 42)
    assert region == 1 or float(size[mask].min()) > float(size[~mask].max())


def test_the_least_similar_module_is_the_likeliest():
    values = [0.9, 0.1, 0.5, math.nan]
    found = probabilities(values, 0.5, 0.2)
    assert found == pytest.approx([0.3, 0.5 + 0.2 / 3, 0.5 - 0.2 / 3, 0.7])
    assert sum(found) / 4 == pytest.approx(0.5)
    assert probabilities(values[:3], 0.5, 0.2, inverted=True) == pytest.approx([0.7, 0.3, 0.5])
    assert probabilities([0.2], 0.5, 0.2) == [0.5] and max(probabilities(values, 0.9, 0.3)) == 1.0


def nlsr_sides(r=R, drift=0.1):
    """An aligned adapter, and one that was continued from it."""
    aligned, tuned = peft_model(r=r), peft_model(r=r)
    with torch.no_grad():
        for number, own in enumerate(adapter_factors(tuned).values()):
            own.A.add_(drift * random(*own.A.shape, seed=number + 200))
            own.B.add_(drift * random(*own.B.shape, seed=number + 300))
    return ModelWeights(tuned, "adapter"), ModelWeights(aligned, "adapter")


def nlsr(tuned, aligned, seed=0, **options):
    references = References(aligned=aligned, update=adapter_factors(aligned.model), safe=ROWS, seed=seed)
    return build("nlsr", **options).plan(tuned, references)


@pytest.mark.parametrize("r", [R, WIDTH])
def test_nlsr_with_everything_gives_the_reference(r):
    tuned, aligned = nlsr_sides(r)
    before = {name: tensor.detach().clone() for name, tensor in aligned.tensors().items()}
    plan = nlsr(tuned, aligned, prune_rate=1.0, epsilon=0.0, region=1.0, beta=0.9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in aligned.tensors().items())
    base.apply(tuned, plan)
    for name, own in adapter_factors(tuned.model).items():
        assert torch.allclose(own.dense(), 1.9 * adapter_factors(aligned.model)[name].dense())
    with pytest.raises(NoMatchError):
        base.apply(tuned, plan)


def test_nlsr_replaces_the_region_and_nothing_else():
    tuned, aligned = nlsr_sides()
    before = {name: tensor.detach().clone() for name, tensor in tuned.tensors().items()}
    plan = nlsr(tuned, aligned, beta=0.0, region=0.25, prune_rate=0.5)
    replaced = {finding["module"] for finding in plan.findings if finding["replaced"]}
    assert 0 < len(replaced) < 6
    base.apply(tuned, plan)
    reference = aligned.tensors()
    for name, tensor in tuned.tensors().items():
        if name.rpartition(".")[0] in replaced:
            changed = tensor != before[name]
            assert int(changed.sum()) == round(0.25 * tensor.numel())
            assert torch.equal(tensor[changed], reference[name][changed].detach())
        else:
            assert torch.equal(tensor, before[name])


def test_the_region_is_read_from_the_answers_of_the_amplified_reference():
    tuned, aligned = nlsr_sides()
    reference = ModelWeights(peft_model(), "adapter")
    with torch.no_grad():
        for own in adapter_factors(reference.model).values():
            own.B.mul_(1.9)

    def regions(model, completion_only):
        found = {}
        for name, weight in reference.tensors().items():
            inputs = lambda of, x, name=name: x.T @ x if of == name else x.new_zeros(())  # noqa: E731
            gram = sum_over_inputs(model, ROWS, inputs, completion_only=completion_only)[name].detach()
            found[name] = safety_region(weight.detach(), output_basis(weight.detach(), gram, 0.8), 0.3)
        return found

    plan = nlsr(tuned, aligned, beta=0.9, region=0.3, prune_rate=1.0, epsilon=0.0)
    before = tuned.tensors()
    replaced = {name: value != before[name] for name, value in plan.tensors.items()}
    expected = regions(reference, True)
    assert replaced.keys() == expected.keys() and all(torch.equal(replaced[n], expected[n]) for n in expected)
    for model, completion_only in ((reference, False), (aligned, True)):  # prompts too; the reference as it was
        other = regions(model, completion_only)
        assert any(not torch.equal(replaced[name], other[name]) for name in other)


def test_nlsr_repeats_and_other_seeds_draw_otherwise():
    tuned, aligned = nlsr_sides()
    draws = [[f["replaced"] for f in nlsr(tuned, aligned, seed=seed).findings] for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1] and any(draw != draws[0] for draw in draws[2:])


def test_nlsr_similarities_are_those_of_dense_masked_products():
    tuned, aligned = nlsr_sides()
    plan = nlsr(tuned, aligned, region=1.0, beta=0.4)
    for finding in plan.findings:
        a, b = (
            adapter_factors(weights.model)[finding["module"]].dense().detach().flatten()
            for weights in (tuned, aligned)
        )
        assert finding["similarity"] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)


def test_equal_adapters_are_similar_whatever_their_size():
    tuned, aligned = nlsr_sides(drift=0.0)
    for beta in (0.5, 3.0):  # the reference is the same update, larger; a region may be empty
        found = [f["similarity"] for f in nlsr(tuned, aligned, beta=beta, region=0.5).findings]
        known = [value for value in found if value is not None]
        assert len(known) > 3 and known == pytest.approx([1.0] * len(known))


def test_the_published_amplification_is_another():
    tuned, aligned = nlsr_sides()
    more = {"prune_rate": 1.0, "epsilon": 0.0, "region": 1.0, "beta": 0.9}
    base.apply(tuned, nlsr(tuned, aligned, compat="reference", **more))
    for name, own in adapter_factors(tuned.model).items():
        assert torch.allclose(own.dense(), 3.24 * adapter_factors(aligned.model)[name].dense())


def test_nlsr_needs_a_common_basis():
    tuned, _ = nlsr_sides()
    with pytest.raises(CompatibilityError, match="no common basis"):
        nlsr(tuned, ModelWeights(peft_model(seed=900), "adapter"))
    with pytest.raises(CompatibilityError, match="another rank"):
        nlsr(tuned, ModelWeights(peft_model(r=3), "adapter"))
    with pytest.raises(CompatibilityError, match="--adapter continue"):
        build("nlsr").check("adapter", continued=False)


def test_nlsr_on_whole_weights():
    start = TinyDecoder(toy.VOCABULARY, width=WIDTH, layers=2, seed=1)
    nets = [TinyDecoder(toy.VOCABULARY, width=WIDTH, layers=2, seed=1) for _ in range(2)]
    for seed, net in enumerate(nets):
        for number, weight in enumerate(ModelWeights(net, "weights").tensors().values()):
            weight.data += 0.1 * random(*weight.shape, seed=10 * number + seed)
    aligned, tuned = (ModelWeights(net, "weights") for net in nets)
    update = {
        name: factorise(w, ModelWeights(start, "weights").tensors()[name]) for name, w in aligned.tensors().items()
    }
    references = References(aligned=aligned, update=update, safe=ROWS)
    before = {name: tensor.detach().clone() for name, tensor in tuned.tensors().items()}
    plan = build("nlsr", prune_rate=1.0, epsilon=0.0, region=0.25, beta=0.5).plan(tuned, references)
    base.apply(tuned, plan)
    for name, tensor in tuned.tensors().items():
        changed = tensor != before[name]
        assert int(changed.sum()) == round(0.25 * tensor.numel())
        reference = aligned.tensors()[name] + 0.5 * update[name].dense()
        assert torch.allclose(tensor[changed], reference[changed])
    # With everything in the region a module is as similar as the two updates of the base are.
    plan = build("nlsr", region=1.0).plan(tuned, references)
    for finding in plan.findings:
        base_weight = ModelWeights(start, "weights").tensors()[finding["module"]]
        a, b = (weights.tensors()[finding["module"]].detach() - base_weight for weights in (tuned, aligned))
        assert finding["similarity"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-6)


def test_weights_that_no_linear_layer_holds_are_not_left_as_they_are_in_silence():
    shape = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "moe_intermediate_size": 16, "num_experts": 8}
    experts = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape))
    with pytest.raises(CompatibilityError, match="--form weights repairs linear layers, and 9[0-9]% of the weights"):
        ModelWeights(experts, "weights")
    dense = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, mlp_only_layers=[0]))
    assert ModelWeights(dense, "weights").unreached() < 0.1


def test_quantised_weights_are_not_changed_entry_by_entry():
    model = tiny_llama(tiny_tokenizer())
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.ones(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CompatibilityError, match="model.layers.1.mlp.up_proj is quantised; give the model in float32"):
        ModelWeights(model, "weights")
