"""A synthetic language model whose features are known: the analysis finds what was planted, and nothing else."""

import numpy as np
import pytest
import torch

from mtc.analysis import Findings, HeldOutPass, analyse_nesting, count_tokens, find_copies, read_feature
from mtc.analysis.analyse import analyse
from mtc.analysis.compare import match_features
from mtc.analysis.contexts import SCHEMA
from mtc.analysis.evaluation import evaluation
from mtc.analysis.nesting import chance_cosine
from mtc.config import load_preset
from mtc.language_model import SitePair, pack_windows
from mtc.results import Feature, RunFacts
from mtc.text import TokenTexts
from mtc.training import Trainer
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape
from tests.strangers.tokenizers_as_they_come import named

D = 64
GROUPS = (4, 6)
DEAD, DENSE = 8, 9
# Token id -> the features that it activates. 0 has the children 4 and 5, which share its tokens out; 3 has the child 7.
ACTIVE = {10: (0, 4), 11: (0, 5), 12: (0,), 13: (1,), 14: (6,), 15: (2,), 16: (3, 7), 17: (3,)}
COUNT = {10: 90, 11: 90, 12: 20, 13: 100, 14: 60, 15: 50, 16: 80, 17: 40, 18: 70}
BOS = 1


def directions() -> torch.Tensor:
    """[features, d] unit decoder rows: children are near their parent; 6 is so near to 1 that it can stand for it."""
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    rows = basis[:10].clone()
    for child, parent, cosine in ((4, 0, 0.6), (5, 0, 0.7), (6, 1, 0.9), (7, 3, 0.65)):
        rows[child] = cosine * rows[parent] + (1 - cosine**2) ** 0.5 * rows[child]
    return rows


@pytest.fixture(scope="module")
def planted():
    """The transcoder, windows of one token sequence and its activations: the encoder reads features off exactly."""
    rng = np.random.default_rng(0)
    tokens = rng.permutation(np.repeat(list(COUNT), list(COUNT.values())))
    strength = np.zeros((len(tokens), 10), np.float32)
    for i, token in enumerate(tokens):
        strength[i, [*ACTIVE.get(int(token), ()), DENSE]] = rng.uniform(2, 3)
    decoder = directions()
    noise = 0.1 * torch.randn(len(tokens), D, generator=torch.Generator().manual_seed(1))
    clean = torch.from_numpy(strength) @ decoder
    source = torch.zeros(len(tokens), D)
    source[:, :10] = torch.from_numpy(strength)  # feature j is read in dimension j
    transcoder = MatryoshkaTranscoder(TranscoderShape(D, D, GROUPS, 3, "none"))
    with torch.no_grad():
        transcoder.W_enc.copy_(torch.eye(D)[:10])
        transcoder.W_dec.copy_(decoder)
        transcoder.threshold.fill_(0.5)
        transcoder.tokens_since_fired[DEAD] = 10**6
    windows = [np.r_[BOS, part].astype(np.int32) for part in np.array_split(tokens, 40)]
    return transcoder, windows, SitePair(source, clean + noise), strength, noise


@pytest.fixture(scope="module")
def found(planted):
    transcoder, windows, pair, _, _ = planted
    settings = {"max_per_feature": 10, "samples_per_feature": 5, "context_tokens": 4, "num_top_features": 3}
    config = load_preset(
        "tiny",
        {"transcoder": {"group_sizes": list(GROUPS), "k": 3, "dead_after_tokens": 1000}, "analysis": settings},
    )
    held = HeldOutPass(config, transcoder, count_tokens(windows, [BOS], 20), 8)
    ids = np.arange(len(windows))
    held.add(ids, pack_windows(windows, [BOS]), pair, ids % 8, sampled=True)
    nesting = analyse_nesting(transcoder, held.sample, held.candidates)
    examples = held.examples.examples(
        lambda i: [windows[w] for w in i],
        [BOS],
        lambda i: [f"document {w % 8}" for w in i],
        TokenTexts(named(lambda t: f"t{t}", 20)),
    )
    findings = Findings(
        evaluation(held, None), held.examples.statistics, examples, held.token_errors, held.blocks.mean_deviation(),
        held.massive, find_copies(transcoder, held.sample), nesting, None, SCHEMA.empty_table(),
    )  # fmt: skip
    facts = RunFacts(
        run_id="planted", steps=0, trained_tokens=5000, data_name="planted", language_model_dtype="float32",
        devices=("cpu",), num_trainers=1, num_model_actors=1,
    )  # fmt: skip
    analysis, features = analyse(config, transcoder, findings, [], facts)
    return analysis, features, nesting


def test_features_are_counted_and_named(planted, found):
    _, _, _, strength, _ = planted
    analysis, table, _ = found
    features = [read_feature(table, j) for j in range(10)]
    assert all(isinstance(f, Feature) for f in features)
    total = sum(COUNT.values())
    for j, feature in enumerate(features):
        tokens = [t for t, active in ACTIVE.items() if j in active] or ([*COUNT] if j == DENSE else [])
        assert feature.count == sum(COUNT[t] for t in tokens) == int((strength[:, j] > 0).sum())
        assert feature.density == feature.count / total
        assert {t.token for t in feature.top_tokens} <= {f"t{t}" for t in tokens}
        assert sum(feature.histogram) == feature.count
        assert feature.group == (j >= 4)
        assert feature.max_activation == pytest.approx(strength[:, j].max())
    assert [f.top_tokens[0].token for f in features[4:8]] == ["t10", "t11", "t14", "t16"]
    assert analysis.summary.silent_features == analysis.summary.dead_features == 1
    assert analysis.summary.dense_features == sum(f.density > 0.1 for f in features)
    assert features[DEAD].top_tokens == ()
    assert [f.label for f in features[4:8]] == ["'t10' (100 %)", "'t11' (100 %)", "'t14' (100 %)", "'t16' (100 %)"]
    assert features[DEAD].label is None
    assert sum(map(sum, analysis.density.counts)) == 9
    places = [(f.map_x, f.map_y) for f in features]
    assert places[DEAD] == (None, None)
    assert all(0 <= x <= 1 and 0 <= y <= 1 for x, y in places[:DEAD] + places[DEAD + 1 :])
    assert len(set(places)) == 10


def test_reconstruction_leaves_exactly_the_planted_noise(planted, found):
    _, windows, pair, strength, noise = planted
    analysis, *_ = found
    y = pair.target.double()
    deviation = (y - y.mean(0)).square().sum()
    assert analysis.evaluation.fvu[1] == pytest.approx((noise.double().square().sum() / deviation).item(), rel=1e-4)
    assert analysis.evaluation.l0_counts == np.bincount((strength > 0).sum(1)).tolist()
    # The second group takes its own features' part out of the error.
    later = torch.from_numpy(strength[:, 4:]).double() @ directions()[4:].double()
    before = (later + noise).square().sum(1) * len(y) / deviation
    after = noise.double().square().sum(1) * len(y) / deviation
    tokens = torch.from_numpy(np.concatenate([w[1:] for w in windows]))
    expected = {f"t{t}": tuple(v[tokens == t].mean().item() for v in (before, after)) for t in COUNT}
    gains = analysis.prefix_steps[1].tokens
    order = sorted(expected, key=lambda t: expected[t][1] - expected[t][0])
    assert [g.token for g in gains] == order
    for gain in gains:
        assert (gain.before, gain.after) == pytest.approx(expected[gain.token], rel=1e-3)
        assert gain.count == COUNT[int(gain.token[1:])]


def test_parents_splits_and_absorption_are_the_planted_ones(found):
    analysis, table, nesting = found
    assert nesting.parents.parent.tolist() == [-1, -1, -1, -1, 0, 0, -1, 3, -1, -1]
    child = read_feature(table, 5)
    assert (child.parent.feature, child.parent.coactivation) == (0, 1.0)
    assert child.parent.cosine == pytest.approx(0.7, abs=1e-6)
    assert child.parent.base_rate == (COUNT[10] + COUNT[11] + COUNT[12]) / sum(COUNT.values())
    assert read_feature(table, 0).children == (4, 5)
    (split,) = analysis.tree.splits
    assert (split.feature, split.children, split.overlap) == (0, (4, 5), 0.0)
    assert split.coverage == (COUNT[10] + COUNT[11]) / (COUNT[10] + COUNT[11] + COUNT[12])
    (absorbed,) = analysis.tree.absorptions
    assert (absorbed.parent, absorbed.child, absorbed.parent_label) == (1, 6, "'t13' (100 %)")
    assert absorbed.cosine == pytest.approx(0.9, abs=1e-6)
    assert absorbed.absorbed == absorbed.expected <= COUNT[14]


def test_chance_cosine_is_what_random_directions_reach():
    generator = torch.Generator().manual_seed(0)
    for count, width in ((500, 64), (2000, 256)):
        rows = torch.nn.functional.normalize(torch.randn(count + 200, width, generator=generator), dim=1)
        largest = (rows[:200] @ rows[200:].T).amax(1)
        assert largest.median().item() == pytest.approx(chance_cosine(count, width), rel=0.02)


def test_training_on_planted_features_recovers_them():
    """Sparse sums of known directions; the learned decoder rows are those directions, matched one to one."""
    config = load_preset(
        "tiny",
        {
            "transcoder": {"group_sizes": [8, 8], "k": 2, "input_norm": "none", "dead_after_tokens": 100_000},
            "optimizer": {"lr": 0.01, "batch_tokens": 256, "warmup_steps": 20, "precision": "float32"},
            "data": {"num_tokens": 256 * 600},
        },
    )
    generator = torch.Generator().manual_seed(3)
    truth = torch.linalg.qr(torch.randn(D, D, generator=generator))[0][:16]
    reads = torch.linalg.qr(torch.randn(D, D, generator=generator))[0][:16]

    def batch(n: int) -> SitePair:
        chosen = torch.rand(n, 16, generator=generator).topk(2, dim=1).indices
        strength = torch.zeros(n, 16).scatter(1, chosen, 1 + torch.rand(n, 2, generator=generator))
        return SitePair(strength @ reads, strength @ truth)

    trainer = Trainer(config, D, D)
    trainer.initialise(*batch(4096))
    for _ in range(config.total_steps):
        trainer.step(*batch(256))
    pairs = match_features(trainer.transcoder.W_dec.detach(), truth, [None] * 16, [None] * 16)
    assert sorted(pairs["feature_b"].to_pylist()) == list(range(16))
    assert sum(c > 0.9 for c in pairs["cosine"].to_pylist()) >= 14
