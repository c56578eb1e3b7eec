import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from pharmacist.core.errors import ConfigError, DataError
from pharmacist.defenses.alignment.repnoise import RepNoise, RepNoiseConfig, ascent_loss, differing, row_noise
from pharmacist.defenses.alignment.sft import SFT
from pharmacist.nn.losses import mmd2, target_losses, targets
from tests.support import toy
from tests.support.pairs import HARMFUL, ROWS, SAFE, Pairs
from tests.support.tiny import TinyDecoder, TokenRows


DATA, BAD = toy.batch(SAFE), toy.batch(HARMFUL)


def repnoise(net, alpha=1.0, beta=0.001, seed=0):
    strategy = RepNoise(RepNoiseConfig(alpha=alpha, beta=beta))
    strategy.setup(net, seed)
    return strategy


def gradient(net, pairs=None, data=DATA, rows=ROWS, update=0, **options):
    streams = {"paired": pairs or Pairs()}
    return toy.method_gradient(repnoise(net, **options), net, data, streams=streams, rows=rows, update=update)


def sft(net, data=DATA):
    return toy.method_gradient(SFT(), net, data)


def extra(net, **options):
    return toy.combined((1.0, gradient(net, **options)), (-1.0, sft(net, options.get("data", DATA))))


def depth_losses(net, harmful=BAD, safe=DATA):
    """Cross-entropy at every depth, written plainly: all logits, a loop over rows and tokens."""
    out, hidden = None, []
    first = net.layers[0].register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    handles = [layer.register_forward_hook(lambda module, args, value: hidden.append(value)) for layer in net.layers]
    out = net(harmful["input_ids"], harmful["attention_mask"])
    for handle in (first, *handles):
        handle.remove()
    losses = []
    for state in hidden:
        log_p = net.lm_head(net.norm(state)).log_softmax(-1)
        terms = []
        for row in range(len(HARMFUL)):
            ids, other = HARMFUL.ids[row], SAFE.ids[row]
            for t in range(int(HARMFUL.prompt_lengths[row]), len(ids)):
                if t >= len(other) or ids[t] != other[t]:
                    terms.append(-log_p[row, t - 1, int(ids[t])])
        losses.append(torch.stack(terms).mean())
    assert torch.allclose(net.lm_head(net.norm(hidden[-1])), out.logits)
    return losses


def plain_ascent(net):
    losses = depth_losses(net)
    return -torch.log(1 + (losses[-1] + sum(losses)) / len(losses))


def test_alpha_and_beta_0_are_sft_bit_for_bit_and_each_alone_is_not():
    net = toy.model()
    plain = sft(net)
    assert toy.same(gradient(net, alpha=0.0, beta=0.0), plain)
    assert toy.difference(gradient(net, beta=0.0), plain) > 1e-3
    assert toy.difference(gradient(net, alpha=0.0, beta=1.0), plain) > 1e-6


def test_the_ascent_is_the_log_of_the_loss_read_off_all_depths():
    net = toy.model()
    expected = toy.gradient_of(net, plain_ascent(net))
    assert toy.difference(extra(net, beta=0.0), expected) < 1e-12
    direction = toy.random_direction(net)
    finite = toy.directional(net, lambda: plain_ascent(net), direction)
    assert toy.along(extra(net, beta=0.0), direction) == pytest.approx(finite, rel=1e-6)
    doubled = toy.combined((0.5, extra(net, beta=0.0, alpha=2.0)))
    assert toy.difference(doubled, expected) < 1e-12


def test_the_head_and_the_final_norm_are_trained_too_under_full_tuning():
    net = toy.model().requires_grad_(True)
    assert toy.difference(extra(net, beta=0.0), toy.gradient_of(net, plain_ascent(net))) < 1e-12


def test_logits_over_a_large_vocabulary_are_differentiated_in_parts():
    # 256 positions have 2**22 logits; there are 300.
    net = TinyDecoder(2**14, width=4, layers=1, length=160).train().requires_grad_(True)
    harmful, safe = (toy.batch(TokenRows([([1, 2], [token] * 150)] * 2)) for token in (3, 4))
    sizes = []
    net.lm_head.register_forward_hook(lambda module, args, logits: sizes.append(logits.numel()))
    pairs = SimpleNamespace(batch=lambda rows: ([0, 1], harmful))
    found = gradient(net, pairs, safe, ROWS[:2], beta=0.0)
    assert sizes.count(256 * 2**14) == sizes.count(44 * 2**14) == 2, "of two depths"
    hidden = []
    handle = net.layers[0].register_forward_hook(lambda module, args, value: hidden.extend([args[0], value]))
    net(harmful["input_ids"], harmful["attention_mask"])
    handle.remove()
    keep, tokens = targets(harmful["labels"])
    losses = torch.stack([target_losses(net.lm_head(net.norm(state))[keep], tokens).mean() for state in hidden])
    expected = toy.combined((1.0, toy.gradient_of(net, -ascent_loss(losses))), (1.0, sft(net, safe)))
    assert toy.difference(found, expected) < 1e-12


def test_the_factor_of_the_ascent_damps_itself():
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    value = ascent_loss(losses)
    c = (1 + 2 + 4 + 4) / 3
    assert float(value.detach()) == pytest.approx(math.log(1 + c))
    (grad,) = torch.autograd.grad(value, losses)
    assert torch.allclose(grad, torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64) / 3 / (1 + c))


def test_the_noise_term_is_the_mean_discrepancy_of_masked_features(monkeypatch):
    net, mask, drawn = toy.model(), differing(BAD, DATA), []

    def kept(*args):
        drawn.append(row_noise(*args))
        return drawn[-1]

    monkeypatch.setattr("pharmacist.defenses.alignment.repnoise.row_noise", kept)
    found = extra(net, alpha=0.0, beta=1.0)
    strategy = repnoise(net, alpha=0.0, beta=1.0)
    step = toy.micro_step(strategy, net, DATA, streams={"paired": Pairs()}, rows=ROWS)

    def plain():
        features = []
        handles = [
            layer.feed.register_forward_hook(lambda module, args, out: features.append(out)) for layer in net.layers
        ]
        net(BAD["input_ids"], BAD["attention_mask"])
        for handle in handles:
            handle.remove()
        both = zip(features, drawn[:3], strict=True)
        return torch.stack([mmd2((u * mask[..., None]).flatten(1), n.flatten(1)) for u, n in both]).mean()

    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn[:3], 2)), "noise of its own per layer"
    assert step.metrics["noise_distance"] == pytest.approx(float(plain().detach()), rel=1e-12)
    assert toy.difference(found, toy.gradient_of(net, plain())) < 1e-12


def test_noise_is_standard_where_the_tokens_differ_and_0_elsewhere():
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, 20:] = False
    noise = row_noise(mask, 40, [1, 2], torch.zeros((), dtype=torch.float64))
    assert not noise[~mask].any()
    assert abs(float(noise[mask].mean())) < 0.06 and abs(float(noise[mask].std()) - 1) < 0.06
    wider = row_noise(torch.nn.functional.pad(mask, (0, 9)), 40, [1, 2], torch.zeros((), dtype=torch.float64))
    assert torch.equal(wider[:, :50], noise)
    assert not torch.equal(row_noise(mask, 40, [3, 2], torch.zeros((), dtype=torch.float64))[0], noise[0])


def test_mmd():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    value = float(mmd2(x, y))
    assert value > 0 and float(mmd2(x, x)) == pytest.approx(0, abs=1e-12)
    for other in (mmd2(y, x), mmd2(x[[3, 1, 0, 4, 2]], y), mmd2(x + 5, y + 5), mmd2(9 * x, 9 * y)):
        assert float(other) == pytest.approx(value, rel=1e-10)
    assert abs(float(mmd2(x + 5, y)) - value) > 0.1 and abs(float(mmd2(9 * x, y)) - value) > 0.01
    one = 10 - 2 * sum(math.exp(-4 / 2**i) for i in range(5))
    assert one == pytest.approx(6.18628, abs=1e-5)
    assert float(mmd2(x[:1], y[:1])) == pytest.approx(one) == float(mmd2(x[1:2], 100 * y[2:3]))
    z = torch.cat([x, y])
    d = torch.cdist(z, z).square()
    s = d.sum() / 90 / 4
    k = sum(torch.exp(-d / (s * 2**i)) for i in range(5))
    assert value == pytest.approx(float((k[:5, :5] + k[5:, 5:] - k[:5, 5:] - k[5:, :5]).mean()), rel=1e-10)


def test_where_rows_differ():
    harmful = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 0], [5, 6, 7, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
    }
    safe = {
        "input_ids": torch.tensor([[5, 6, 9, 0], [5, 1, 7, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }
    assert differing(harmful, safe).tolist() == [[False, False, True, True, False], [False, True, False, False, False]]
    # A real token with the padding's id counts like any other.
    harmful["input_ids"][0, 3], harmful["attention_mask"][0, 3] = 0, 1
    assert differing(harmful, safe)[0].tolist() == [False, False, True, True, False]


def test_padding_changes_nothing():
    net = toy.model()
    plain = extra(net, alpha=1.0, beta=1.0)
    assert toy.difference(extra(net, alpha=1.0, beta=1.0, pairs=Pairs(pad=3)), plain) < 1e-12
    assert toy.difference(extra(net, alpha=1.0, beta=1.0, data=toy.batch(SAFE, pad=4)), plain) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_targets_survive_any_dtype_of_the_mask(dtype):
    net = toy.model()
    assert toy.difference(extra(net, pairs=Pairs(dtype=dtype)), extra(net)) < 1e-14
    ids = torch.tensor([[7, 12345, 31999]])
    keep, found = targets(ids.masked_fill(torch.zeros(1, 3).to(dtype).bool(), -100))
    assert found.tolist() == [12345, 31999]
    logits = torch.full((2, 32000), -100.0)
    logits[[0, 1], found] = 100.0
    assert float(target_losses(logits, found).sum()) == 0


def test_identical_partners_add_nothing():
    net = toy.model()
    step = toy.micro_step(repnoise(net, beta=1.0), net, DATA, streams={"paired": Pairs(harmful=SAFE)}, rows=ROWS)
    assert step.metrics["harmful_loss"] == 0 and step.metrics["noise_distance"] == 0 and step.metrics["pairs"] == 3
    assert toy.difference(gradient(net, beta=1.0, pairs=Pairs(harmful=SAFE)), sft(net)) == 0
    one_equal = TokenRows([SAFE.pairs[0], *HARMFUL.pairs[1:]])
    two = Pairs(known=ROWS[1:], harmful=TokenRows(HARMFUL.pairs[1:]))
    both = [extra(net, beta=1.0, pairs=pairs) for pairs in (Pairs(harmful=one_equal), two)]
    assert toy.difference(*both) < 1e-12


def test_rows_without_a_partner_are_plain_alignment_rows():
    net = toy.model()
    assert toy.same(gradient(net, rows=[1, 2, 3]), sft(net))
    some = extra(net, beta=1.0, rows=[10, 2, 12])
    chosen = Pairs(known=[10, 12], harmful=TokenRows([HARMFUL.pairs[0], HARMFUL.pairs[2]]))
    data = toy.batch(TokenRows([SAFE.pairs[0], SAFE.pairs[2]]))
    assert toy.difference(some, extra(net, beta=1.0, rows=[10, 12], pairs=chosen, data=data)) < 1e-12


def test_noise_enters_through_its_own_term_only_and_follows_the_seed():
    net = toy.model()
    assert toy.same(gradient(net, beta=0.0, seed=1), gradient(net, beta=0.0, seed=2))
    assert toy.same(gradient(net, beta=1.0, seed=1), gradient(net, beta=1.0, seed=1))
    assert toy.difference(gradient(net, beta=1.0, seed=1), gradient(net, beta=1.0, seed=2)) > 1e-8
    assert toy.difference(gradient(net, beta=1.0), gradient(net, beta=1.0, update=1)) > 1e-8


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_it_leaves_nothing_behind(broken):
    net, calls = toy.model(dropout=0.3), []

    def fail(module, args):
        calls.append(None)
        if len(calls) == broken:
            raise RuntimeError("out of memory")

    before, random = toy.fingerprint(net), torch.get_rng_state()
    handle = net.norm.register_forward_pre_hook(fail)
    strategy = repnoise(net)
    step = toy.StepContext(model=net, batch=DATA, streams={"paired": Pairs()}, rows=ROWS)
    if broken:
        with pytest.raises(RuntimeError, match="out of memory"):
            strategy.auxiliary(step)
    else:
        strategy.auxiliary(step)
    handle.remove()
    assert toy.hooks(net) == 0 and toy.same(before, toy.fingerprint(net))
    assert torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in net.parameters())


def test_gradient_checkpointing_changes_nothing():
    found = [extra(toy.model(checkpointing=saving), beta=1.0) for saving in (False, True)]
    assert toy.difference(*found) < 1e-13


def test_two_micro_batches_are_the_mean_of_two_steps():
    net = toy.model()
    apart = [toy.batch(SAFE, [0]), toy.batch(SAFE, [1, 2])]
    rows = [ROWS[:1], ROWS[1:]]
    net.zero_grad()
    strategy = repnoise(net, beta=0.0)
    for micro in (0, 1):
        toy.micro_step(
            strategy, net, apart[micro], streams={"paired": Pairs()}, rows=rows[micro], micro=micro, scale=0.5
        )
    together = {name: p.grad for name, p in toy.trainable(net).items()}
    single = [gradient(net, data=apart[n], rows=rows[n], beta=0.0) for n in (0, 1)]
    assert toy.difference(together, toy.combined((0.5, single[0]), (0.5, single[1]))) < 1e-13


def test_numbers_that_are_not_finite_stop_it():
    net = toy.model()
    with torch.no_grad():
        net.norm.weight[0] = torch.nan
    with pytest.raises(DataError, match="auxiliary pass"):
        gradient(net)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_impossible_options_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} must not be negative"):
        RepNoiseConfig(**{name: -1.0})
