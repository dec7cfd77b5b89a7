"""Held-out metrics against direct computations on whole tensors, through a real random language model."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM

from mtc.analysis import HeldOutPass, count_tokens, loss_recovered
from mtc.analysis.evaluation import evaluation
from mtc.analysis.loss_sums import Clean, loss_sums
from mtc.analysis.recompute import evaluate
from mtc.analysis.replaced_sums import replaced_layers, replaced_sums
from mtc.analysis.straight_line import LineSums, straight_line, who_sums
from mtc.config import load_preset
from mtc.language_model import LanguageModel, PackedWindows, SitePair, pack_windows, prepare_model
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape


@pytest.fixture(scope="module")
def transcoder():
    transcoder = MatryoshkaTranscoder(TranscoderShape(32, 32, (16, 32, 16), 8, "rms"), seed=1)
    with torch.no_grad():
        transcoder.W_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
        transcoder.threshold.fill_(1.2)
        transcoder.target_scale.fill_(0.8)
    return transcoder


LENGTHS = (20, 20, 13, 20, 1, 7)
BOS = 256


@pytest.fixture(scope="module")
def windows() -> PackedWindows:
    rng = np.random.default_rng(0)
    return pack_windows([np.r_[BOS, rng.integers(0, 256, n - 1)].astype(np.int32) for n in LENGTHS], [BOS])


def held_out(transcoder, windows, pair, documents, parts):
    """The passes over parts of the windows, merged; window w is of fold w % 5."""
    config = load_preset("tiny", {"transcoder": {"group_sizes": [16, 32, 16], "k": 8}})
    occurrences = count_tokens([windows.input_ids.numpy()], [BOS], 259)
    starts = np.r_[0, np.cumsum(windows.lengths)]
    before = np.r_[0, np.cumsum(windows.trainable.numpy())]
    first = None
    for part in parts:
        found = HeldOutPass(config, transcoder, occurrences, int(documents.max()) + 1)
        for w in part:
            one = slice(starts[w], starts[w + 1])
            alone = PackedWindows(
                windows.input_ids[one], windows.position_ids[one], windows.trainable[one], windows.lengths[w : w + 1]
            )
            rows = slice(before[one.start], before[one.stop])
            of_one = SitePair(pair.source[rows], pair.target[rows])
            found.add(np.array([w]), alone, of_one, documents[[w]], fold=int(w) % 5)
        if first is None:
            first = found
        else:
            first.merge(found.arrays())
    return first


@pytest.fixture(scope="module")
def many():
    """60 windows of 1 to 20 tokens in 12 documents, with activations that have a large mean."""
    rng = np.random.default_rng(5)
    windows = pack_windows(
        [np.r_[BOS, rng.integers(0, 40, rng.integers(0, 20))].astype(np.int32) for _ in range(60)], [BOS]
    )
    generator = torch.Generator().manual_seed(7)
    n = int(windows.trainable.sum())
    x, y = torch.randn(n, 32, generator=generator), torch.randn(n, 32, generator=generator) + 30
    return windows, SitePair(x, y), rng.integers(0, 12, 60)


def test_metrics_equal_a_direct_computation_in_any_partition(transcoder, many):
    windows, pair, documents = many
    x, y = pair.source, pair.target.double()
    found = evaluation(held_out(transcoder, windows, pair, documents, np.array_split(np.arange(60), 5)), None)
    a = transcoder.encode(x).detach()
    deviation = (y - y.mean(0)).square().sum(1)
    position = windows.position_ids[windows.trainable].numpy()
    token = windows.input_ids[windows.trainable].numpy()
    occurrences = np.bincount(token)[token]
    for i, m in enumerate(transcoder.prefixes):
        y_m = transcoder.decode(a[:, :m]).detach().double()
        error = (y - y_m).square().sum(1)
        assert found.fvu[i] == pytest.approx((error.sum() / deviation.sum()).item(), rel=1e-6)
        assert found.l0[i] == pytest.approx((a[:, :m] > 0).sum(1).float().mean().item())
        cosine = torch.nn.functional.cosine_similarity(y, y_m, dim=1)
        assert found.cosine[i] == pytest.approx(cosine.mean().item(), rel=1e-6)
        for slices, value in ((found.by_position, position), (found.by_frequency, occurrences)):
            assert sum(part.tokens for part in slices) == len(x)
            for part in slices:
                inside = torch.from_numpy((value >= part.low) & (value <= part.high))
                assert part.tokens == int(inside.sum())
                assert part.fvu[i] == pytest.approx((error[inside].sum() / deviation[inside].sum()).item(), rel=1e-6)
                assert part.cosine[i] == pytest.approx(cosine[inside].mean().item(), rel=1e-6)
                assert part.l0 == pytest.approx((a[inside] > 0).sum(1).float().mean().item())
    assert found.l0_counts == np.bincount((a > 0).sum(1).numpy()).tolist()
    assert found.never_fired == int((a > 0).sum(0).eq(0).sum())
    assert found.tokens == len(x)
    assert found.documents == len(set(documents[np.array(windows.lengths) > 1].tolist()))


@pytest.fixture(scope="module")
def with_massive(transcoder, many):
    """Of `many`, with targets that are in part a straight line of the source, and a few far too long ones."""
    windows, pair, documents = many
    generator = torch.Generator().manual_seed(11)
    y = 3 * transcoder.normalise(pair.source) @ torch.randn(32, 32, generator=generator) + pair.target
    planted = torch.arange(3, len(y), 41)
    y[planted] = 60 * y[planted[:1]] + y[planted]
    knowing = copy.deepcopy(transcoder)
    knowing.massive_norm.fill_(5 * y.norm(dim=1).median())
    parts = np.array_split(np.random.default_rng(1).permutation(60), 4)
    return knowing, y.double(), planted, held_out(knowing, windows, SitePair(pair.source, y), documents, parts)


def test_headline_figures_are_without_massive_tokens_and_stand_beside_those_of_all(many, with_massive):
    windows, pair, _ = many
    transcoder, y, planted, found = with_massive
    e = evaluation(found, None, text=lambda i: f"t{i}")
    usual = torch.ones(len(y), dtype=torch.bool)
    usual[planted] = False
    a = transcoder.encode(pair.source).detach()
    active = (a > 0).sum(1)
    deviation = (y - y.mean(0)).square().sum(1)
    for i, m in enumerate(transcoder.prefixes):
        y_m = transcoder.decode(a[:, :m]).detach().double()
        error, cosine = (y - y_m).square().sum(1), torch.nn.functional.cosine_similarity(y, y_m, dim=1)
        for figures, rows in ((e, usual), (e.all_tokens, torch.ones_like(usual))):
            own = (y[rows] - y[rows].mean(0)).square().sum()
            assert figures.fvu[i] == pytest.approx((error[rows].sum() / own).item(), rel=1e-6)
            assert figures.cosine[i] == pytest.approx(cosine[rows].mean().item(), rel=1e-6)
            assert figures.l0[i] == pytest.approx((a[rows, :m] > 0).sum(1).double().mean().item())
    assert e.fvu_interval[-1] != e.all_tokens.fvu_interval[-1]
    assert e.l0_counts == np.bincount(active[usual].numpy()).tolist()
    assert (e.tokens, e.massive.tokens) == (len(y), len(planted))
    assert e.massive.in_weights
    assert e.massive.variance == pytest.approx((deviation[planted].sum() / deviation.sum()).item(), rel=1e-6)
    assert e.massive.error == pytest.approx((error[planted].sum() / error.sum()).item(), rel=1e-6)
    of_massive = error[planted].sum() / deviation[planted].sum()
    assert e.massive.fvu(e.all_tokens.fvu[-1]) == pytest.approx(of_massive.item(), rel=1e-6)
    assert e.massive.l0 == pytest.approx(active[planted].double().mean().item())
    position = windows.position_ids[windows.trainable].numpy()[planted]
    assert e.massive.beyond_first == pytest.approx((position >= 4).mean())
    ids = windows.input_ids[windows.trainable].numpy()[planted]
    assert sum(part.massive for part in e.by_position) == sum(part.massive for part in e.by_frequency) == len(planted)
    assert sum(part.tokens for part in e.by_position) == int(usual.sum())
    assert {t.token: t.count for t in e.massive.top_tokens}.items() <= {
        f"t{i}": n for i, n in zip(*np.unique(ids, return_counts=True), strict=True)
    }.items()
    assert e.massive.different_ids == len(set(ids.tolist()))
    assert found.massive.fired.tolist() == (a[planted] > 0).sum(0).tolist()
    share = (a[planted].double().sum(0) / a.double().sum(0).clamp(min=1e-30)).numpy()
    np.testing.assert_allclose(found.massive.activation_share(found.examples.statistics), share, rtol=1e-6)
    assert e.never_fired == int((a > 0).sum(0).eq(0).sum())
    assert found.token_errors[:, 0].sum() == int(usual.sum())


def test_the_straight_line_is_numpys_least_squares_and_no_token_is_judged_by_a_map_that_saw_it(many, with_massive):
    windows, pair, _ = many
    transcoder, y, planted, found = with_massive
    x = np.c_[transcoder.normalise(pair.source).double().numpy(), np.ones(len(y))]
    fold = np.repeat(np.arange(60), windows.lengths)[windows.trainable.numpy()] % 5
    usual = ~np.isin(np.arange(len(y)), planted)
    e = evaluation(found, None)
    line = e.line
    expected = []
    for rows in (usual, np.ones_like(usual)):
        target, error = y.numpy(), 0.0
        for k in range(5):
            fitted = np.linalg.lstsq(x[rows & (fold != k)], target[rows & (fold != k)], rcond=None)[0]
            error += np.square(target[rows & (fold == k)] - x[rows & (fold == k)] @ fitted).sum()
        expected.append(error / np.square(target[rows] - target[rows].mean(0)).sum())
    assert (line.fvu, line.all_tokens_fvu) == pytest.approx(tuple(expected), rel=1e-4)
    assert line.folds == 5
    assert line.added == pytest.approx(1 - e.fvu[-1] / line.fvu)
    few, none_massive = LineSums(), torch.zeros(200, dtype=torch.bool)
    for part in (0, 1):
        few.add(pair.source[part::2][:200], pair.target[part::2][:200], none_massive, part)
    assert few.fvu(massive=False) is None, "200 tokens are too few for a map from 32 dimensions"


@pytest.mark.parametrize("different", [1, 3, 40, 80])
def test_a_few_tokens_said_over_and_over_have_no_straight_line(different):
    """With more dimensions than different tokens what the map leaves is rounding, or cannot be solved for."""
    generator = torch.Generator().manual_seed(1)
    source, target = torch.randn(2, different, 576, generator=generator)
    source += 20 * torch.randn(576, generator=generator)
    sums, chosen = LineSums(), torch.randint(different, (20_000,), generator=generator)
    for fold, rows in enumerate(chosen.split(4_000)):
        sums.add(source[rows], target[rows], torch.zeros(len(rows), dtype=torch.bool), fold)
    assert sums.fvu(massive=False) is None
    assert straight_line(sums, 0.5, 0.5) is None


def test_the_straight_lines_sums_are_the_same_to_the_bit_on_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4000, 40, generator=generator) for _ in range(2))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(LineSums())
            found[-1].add(x, y, torch.zeros(len(x), dtype=torch.bool), fold=0)
    finally:
        torch.set_num_threads(threads)
    one, *others = (sums.arrays() for sums in found)
    for other in others:
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_one_transcoder_sums_for_all_that_see_the_same_tokens():
    def make(scale, massive, norm="scalar"):
        t = MatryoshkaTranscoder(TranscoderShape(4, 4, (2, 2), 1, norm))
        t.input_scale.fill_(scale)
        t.massive_norm.fill_(massive)
        return t

    kinds = [(0, make(1, 9)), (1, make(1, 9)), (0, make(2, 9)), (0, make(1, 8)), (0, make(1, 9, "none"))]
    unknown = [(0, make(1, math.nan)), (0, make(1, math.nan))]
    again = [(site, make(float(t.input_scale), float(t.massive_norm), t.shape.input_norm)) for site, t in kinds]
    sites, transcoders = zip(*kinds, *again, *unknown, strict=True)
    assert who_sums(transcoders, sites) == [0, 1, 2, 3, 4] * 2 + [10, 11]


def test_merged_passes_are_one_pass_and_tokens_that_are_not_finite_are_left_out(transcoder, many):
    windows, pair, documents = many
    whole = held_out(transcoder, windows, pair, documents, [np.arange(60)])
    parts = held_out(transcoder, windows, pair, documents, np.array_split(np.random.default_rng(0).permutation(60), 7))
    for name, value in whole.arrays().items():
        np.testing.assert_allclose(parts.arrays()[name], value, rtol=1e-12, atol=1e-10, err_msg=name)
    x, y = (rows.clone() for rows in pair)
    x[3, 3], y[-1, 5] = math.inf, math.nan
    without = held_out(transcoder, windows, SitePair(x, y), documents, [np.arange(60)])
    kept = np.r_[0:3, 4 : len(x) - 1]
    a = transcoder.encode(pair.source[kept]).detach()
    y_m = transcoder.decode(a).detach().double()
    rest = pair.target[kept].double()
    expected = (rest - y_m).square().sum() / (rest - rest.mean(0)).square().sum()
    assert evaluation(without, None).fvu[-1] == pytest.approx(expected.item(), rel=1e-6)
    assert evaluation(without, None).tokens == len(x) - 2
    assert without.examples.statistics.count.tolist() == (a > 0).sum(0).tolist()


def test_intervals_equal_scipys_bootstrap_over_documents(transcoder, many):
    windows, pair, documents = many
    found = evaluation(held_out(transcoder, windows, pair, documents, [np.arange(60)]), None)
    document = np.repeat(documents, windows.lengths)[windows.trainable.numpy()]
    a = transcoder.encode(pair.source).detach()
    error = (pair.target.double() - transcoder.decode(a).detach().double()).square().sum(1).numpy()
    y = pair.target.double().numpy()
    rows = [np.flatnonzero(document == d) for d in np.unique(document)]

    def fvu(*drawn):
        chosen = np.concatenate([rows[int(d)] for d in drawn[0]])
        return error[chosen].sum() / np.square(y[chosen] - y[chosen].mean(0)).sum()

    ids = np.arange(len(rows))
    expected = stats.bootstrap(
        (ids,), fvu, vectorized=False, method="percentile", n_resamples=1000, rng=np.random.default_rng(1)
    ).confidence_interval
    low, high = found.fvu_interval[-1]
    width = expected.high - expected.low
    assert low < found.fvu[-1] < high
    assert abs(low - expected.low) < 0.2 * width
    assert abs(high - expected.high) < 0.2 * width
    few = evaluation(held_out(transcoder, windows, pair, documents % 4, [np.arange(60)]), None)
    assert few.documents == 4
    assert few.fvu_interval is None


@pytest.mark.parametrize("at_once", [1 << 26, 259 * 25, 259 * 6])
def test_losses_equal_a_model_whose_mlp_is_replaced_by_hand(transcoder, windows, at_once, monkeypatch):
    """Two layers at once, the second one by plain transformers with hooks; also cut into parts of few logits."""
    monkeypatch.setattr("mtc.analysis.loss_sums.MAX_LOGITS", at_once)
    monkeypatch.setattr("mtc.analysis.loss_sums.CACHED_LOGITS", at_once // 4)
    config = load_preset("tiny", {"model": {"layers": [2, 1], "dtype": "float32"}}).model
    model = LanguageModel(config, full=True)
    mean = torch.randn(32, generator=torch.Generator().manual_seed(1))
    both = loss_sums(model, [transcoder, transcoder], windows, [mean, mean])
    # Also several of one layer, which share its clean and ablated passes.
    narrow = MatryoshkaTranscoder(TranscoderShape(32, 32, (4, 8, 4), 4, "rms"), 3)
    narrow.threshold.fill_(0.1)
    other, middle, found = loss_sums(model, [transcoder, narrow, transcoder], windows, [mean] * 3, sites=[0, 1, 1])
    for one, alone in zip((other, found), both, strict=True):
        assert all(map(np.array_equal, one, alone))
    assert np.array_equal(middle.ce[:, :3], found.ce[:, :3]) and not np.array_equal(middle.ce[:, 3:], found.ce[:, 3:])
    losses = loss_recovered(found)
    hf = AutoModelForCausalLM.from_pretrained(prepare_model(config), dtype=torch.float32).eval()
    layer = hf.model.layers[1]

    def run(change):
        """One window at a time, with a hook on the last module of the MLP block."""
        seen = {}

        def after(module, args, out):
            changed = change(seen["source"], out)
            changed[:, 0] = out[:, 0]  # BOS
            return changed

        hooks = [
            layer.pre_feedforward_layernorm.register_forward_pre_hook(lambda m, a: seen.update(source=a[0])),
            layer.post_feedforward_layernorm.register_forward_hook(after),
        ]
        with torch.no_grad():
            logits = [hf(ids[None]).logits[0, :-1] for ids in windows.input_ids.split(LENGTHS)]
        for hook in hooks:
            hook.remove()
        return torch.log_softmax(torch.cat(logits).float(), -1)

    labels = torch.cat([ids[1:] for ids in windows.input_ids.split(LENGTHS)])

    def ce(log_p):
        return torch.nn.functional.nll_loss(log_p, labels).item()

    clean, zero = run(lambda s, out: out.clone()), run(lambda s, out: torch.zeros_like(out))
    averaged = run(lambda s, out: mean.expand_as(out).clone())
    assert losses.tokens == len(labels)
    assert losses.ce_clean == pytest.approx(ce(clean), rel=1e-5)
    assert losses.ce_zero == pytest.approx(ce(zero), rel=1e-5)
    assert losses.ce_mean == pytest.approx(ce(averaged), rel=1e-5)
    for i, m in enumerate(transcoder.prefixes):
        spliced = run(lambda s, out, m=m: transcoder.reconstruct(s.flatten(0, 1), m).view_as(out))
        kl = torch.nn.functional.kl_div(spliced, clean, log_target=True, reduction="batchmean").item()
        assert losses.ce_spliced[i] == pytest.approx(ce(spliced), rel=1e-5)
        assert losses.kl[i] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        expected = (ce(zero) - ce(spliced)) / (ce(zero) - ce(clean))
        assert losses.recovered_zero[i] == pytest.approx(expected, rel=1e-2, abs=1e-3)
    assert loss_recovered(other).ce_clean == losses.ce_clean
    assert abs(loss_recovered(other).ce_zero - losses.ce_zero) > 1e-3


@pytest.mark.parametrize("noise", [0.03, 1.0])
def test_divergences_are_right_for_logits_far_from_zero(noise):
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(40, 20_001, generator=generator) - 300
    other, ids = z + noise * torch.randn(z.shape, generator=generator), torch.arange(40)
    log_p, log_q = (logits.double().log_softmax(1) for logits in (z, other))
    ce, kl = Clean(z, ids).beside(other)
    assert ce.double().mean() == pytest.approx(-log_q[ids, ids].mean().item(), rel=1e-6)
    expected = (log_p.exp() * (log_p - log_q)).sum(1)
    torch.testing.assert_close(kl.double(), expected, rtol=0.02, atol=0)


def test_evaluate_joins_both_and_refuses_nothing(transcoder, windows):
    config = load_preset("tiny", {"model": {"dtype": "float32"}})
    evaluation = evaluate(config, copy.deepcopy(transcoder), [windows], [windows])
    assert not evaluation.massive.in_weights
    assert evaluation.massive.norm > 0, "told by the held-out tokens"
    (pair,) = LanguageModel(config.model).capture(windows)
    x, y = pair.source[windows.trainable], pair.target[windows.trainable]
    expected = (y - transcoder.reconstruct(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert evaluation.fvu[-1] == pytest.approx(expected.item(), rel=1e-4)
    assert evaluation.tokens == int(windows.trainable.sum())
    assert evaluation.loss is not None
    with pytest.raises(ValueError, match="no held-out windows"):
        evaluate(config, transcoder, [], [])


@pytest.mark.parametrize("at_once", [1 << 26, 259 * 25])
def test_layers_replaced_at_once_match_a_model_whose_every_mlp_is_hooked(windows, at_once, monkeypatch):
    """Each transcoder reads the stream that the replaced layers below it made; the layers stand in no order."""
    monkeypatch.setattr("mtc.analysis.loss_sums.MAX_LOGITS", at_once)
    layers, prefixes = (2, 0, 1), (16, 48, 64)
    config = load_preset("tiny", {"model": {"layers": list(layers), "dtype": "float32"}}).model
    transcoders = []
    for layer in layers:
        one = MatryoshkaTranscoder(TranscoderShape(32, 32, (16, 32, 16), 8, "rms"), seed=layer)
        with torch.no_grad():
            one.W_dec.normal_(std=0.1, generator=torch.Generator().manual_seed(layer))
            one.threshold.fill_(0.5 + 0.3 * layer)
            one.target_scale.fill_(0.05)  # so that tokens change their minds
        transcoders.append(one)
    means = [torch.full((32,), 0.3 * layer) for layer in layers]
    labels = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    sums = replaced_sums(LanguageModel(config, full=True), transcoders, windows, means, labels, len(LENGTHS))
    found = replaced_layers(sums, sorted(layers), prefixes, len(LENGTHS))
    hf = AutoModelForCausalLM.from_pretrained(prepare_model(config), dtype=torch.float32).eval()

    def run(changes):
        """`changes` by layer: from what the MLP's norm reads to what is added instead of the MLP's output."""
        hooks, sources = [], {}
        for number, change in changes.items():
            layer = hf.model.layers[number]

            def before(module, args, number=number):
                sources[number] = args[0]

            def after(module, args, out, number=number, change=change):
                changed = change(sources[number].flatten(0, 1)).view_as(out).clone()
                changed[:, 0] = out[:, 0]  # BOS
                return changed

            hooks.append(layer.pre_feedforward_layernorm.register_forward_pre_hook(before))
            hooks.append(layer.post_feedforward_layernorm.register_forward_hook(after))
        with torch.no_grad():
            logits = [hf(ids[None]).logits[0, :-1] for ids in windows.input_ids.split(LENGTHS)]
        for hook in hooks:
            hook.remove()
        return torch.log_softmax(torch.cat(logits).float(), -1)

    next_ids = torch.cat([ids[1:] for ids in windows.input_ids.split(LENGTHS)])

    def ce(log_p):
        return torch.nn.functional.nll_loss(log_p, next_ids).item()

    clean = run({})
    assert (found.layers, found.tokens, found.ce_clean) == (
        (0, 1, 2),
        len(next_ids),
        pytest.approx(ce(clean), rel=1e-5),
    )
    fixed = {"zero": [torch.zeros(32)] * 3, "mean": means}
    for name, values in fixed.items():
        ablated = run({layer: lambda s, y=y: y.expand(len(s), -1) for layer, y in zip(layers, values, strict=True)})
        assert getattr(found, f"ce_{name}") == pytest.approx(ce(ablated), rel=1e-5)
    for i, m in enumerate(prefixes):
        replaced = run({
            layer: lambda s, t=t, m=m: t.reconstruct(s, m) for layer, t in zip(layers, transcoders, strict=True)
        })  # fmt: skip
        kl = torch.nn.functional.kl_div(replaced, clean, log_target=True, reduction="batchmean").item()
        agrees = (replaced.argmax(1) == clean.argmax(1)).double()
        assert 0.05 < agrees.mean() < 0.95, "the test would tell nothing"
        assert found.ce_replaced[i] == pytest.approx(ce(replaced), rel=1e-5)
        assert found.kl[i] == pytest.approx(kl, rel=1e-4)
        assert found.agreement[i] == agrees.mean().item()
        assert found.kl_interval[i][0] < found.kl[i] < found.kl_interval[i][1]
