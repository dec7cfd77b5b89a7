"""Copies of features against a search through all pairs."""

from itertools import combinations

import numpy as np
import torch

from mtc.analysis import copies
from mtc.analysis.coactivation import CoactivationSample
from mtc.transcoder import MatryoshkaTranscoder, TranscoderShape

D, F, TOKENS = 48, 40, 500


def test_copies_read_and_write_the_same_and_fire_together(monkeypatch):
    transcoder = MatryoshkaTranscoder(TranscoderShape(D, D, (10, 30), 4, "none"), seed=3)
    generator = torch.Generator().manual_seed(4)
    rng = np.random.default_rng(5)
    fires = rng.random((TOKENS, F)) < 0.1
    fires[:, 39] = False
    with torch.no_grad():
        transcoder.W_dec.normal_(generator=generator)
        # 7 and 12 are copies of 2, and so is 30, which is nearer to 12; 21 only writes and 22 only reads as 2 does;
        # 25 never fires with it; 33 is a copy of 9; 39 would be one, but does not fire.
        for later, earlier in ((7, 2), (12, 2), (30, 12), (21, 2), (22, 2), (25, 2), (33, 9), (39, 9)):
            for name, weights in (("read", transcoder.W_enc), ("write", transcoder.W_dec)):
                if (name, later) not in (("read", 21), ("write", 22)):
                    noise = torch.randn(D, generator=generator) / D**0.5
                    weights[later] = 2 * weights[earlier] + 0.4 * weights[earlier].norm() * noise
            fires[:, later] = fires[:, earlier] ^ (rng.random(TOKENS) < 0.01)
        fires[:, 25] = ~fires[:, 2] & (rng.random(TOKENS) < 0.1)
        fires[:, 39] = False
    token, feature = np.nonzero(fires)
    entries = len(token)
    sample = CoactivationSample(
        TOKENS, token.astype(np.int64), feature.astype(np.int32), *(np.zeros(entries, np.uint16) for _ in range(2)),
        np.zeros((entries, 4), np.uint16), np.zeros((entries, 4), bool),
    )  # fmt: skip

    read, write = (w.detach().double().numpy() for w in (transcoder.W_enc, transcoder.W_dec))

    def cosine(rows, i, j):
        return rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])

    expected = np.full(F, -1)
    for i, j in combinations(range(F), 2):
        either = (fires[:, i] | fires[:, j]).sum()
        together = either and (fires[:, i] & fires[:, j]).sum() / either >= 0.5
        if expected[j] < 0 and together and min(cosine(read, i, j), cosine(write, i, j)) > 0.95:
            expected[j] = i if expected[i] < 0 else expected[i]
    assert {j: i for j, i in enumerate(expected.tolist()) if i >= 0} == {7: 2, 12: 2, 30: 2, 33: 9}
    for entries_at_a_time in (1 << 22, 3 * F):
        monkeypatch.setattr(copies, "CHUNK", entries_at_a_time)
        found = copies.find_copies(transcoder, sample)
        assert found.tokens == TOKENS
        assert found.copy_of.tolist() == expected.tolist()
    assert copies.find_copies(transcoder, CoactivationSample.empty(4)) is None
