"""Which next tokens a feature argues for: its decoder row through the final norm and the unembedding.

The direct path only: what later layers make of the feature is not in it. With d_j = W_dec[j] / target_scale, what one
unit of activation adds to the residual stream, and s the mean of 1 / rms that the final norm multiplies by on held-out
tokens,

    effect_j = s * W_U (gain * d_j),  less its mean over the vocabulary, which no probability depends on

(nostalgebraist 2020, "interpreting GPT: the logit lens"). The s is the model's, so effects are in logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mtc.analysis.loss_sums import max_logits
from mtc.transcoder import MatryoshkaTranscoder

if TYPE_CHECKING:
    from mtc.language_model import LanguageModel

Array = NDArray[Any]
TOP_LOGITS, LOGIT_BINS = 10, 24


class LogitEffects(NamedTuple):
    """The most raised and the most lowered tokens of each feature, strongest first, and all of them by effect."""

    positive_ids: Array
    """[features, TOP_LOGITS] int64, ids of the tokens whose logits the feature raises most."""
    positive: Array
    """[features, TOP_LOGITS] float32, changes of the raised tokens' logits per unit of activation."""
    negative_ids: Array
    """[features, TOP_LOGITS] int64, ids of the tokens whose logits the feature lowers most."""
    negative: Array
    """[features, TOP_LOGITS] float32, changes of the lowered tokens' logits per unit of activation."""
    counts: Array
    """[features, LOGIT_BINS] int32, tokens of the vocabulary by effect, in bins of equal width from -m to m, where m is
    the largest effect of either sign; its scale does not matter."""

    def scaled(self, factor: float) -> LogitEffects:
        """The effects times `factor`, the mean factor of the final norm."""
        f = np.float32(factor)
        return self._replace(positive=self.positive * f, negative=self.negative * f)


@torch.no_grad()
def logit_effects(model: LanguageModel, transcoder: MatryoshkaTranscoder, first: int, end: int) -> LogitEffects:
    """Effects of the features first..end-1, with a final norm that scales by 1; see `LogitEffects.scaled`.

    `model` is loaded with `full=True`; raises ValueError if not.
    """
    step = max(1, max_logits(model.device) // model.vocab_size)
    k = min(TOP_LOGITS, model.vocab_size)
    parts = []
    for a in range(first, end, step):
        rows = transcoder.W_dec[a : min(a + step, end)] / transcoder.target_scale
        effect = model.direct_effect(rows)
        effect -= effect.mean(1, keepdim=True)
        up, down = effect.topk(k, dim=1), effect.topk(k, dim=1, largest=False)
        counts = torch.stack([_counts(row) for row in effect])
        parts.append([t.cpu().numpy() for t in (up.indices, up.values, down.indices, down.values, counts)])
    return LogitEffects(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _counts(effect: torch.Tensor) -> torch.Tensor:
    """[LOGIT_BINS] int32 of [vocabulary]."""
    most = float(effect.abs().max())
    if most == 0:  # no bins: all is in the middle
        return torch.nn.functional.pad(effect.new_full((1,), len(effect)), (LOGIT_BINS // 2, LOGIT_BINS // 2 - 1)).int()
    return torch.histc(effect.float(), LOGIT_BINS, -most, most).int()
