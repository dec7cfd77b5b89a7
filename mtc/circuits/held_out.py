"""How much of held-out prompts' next tokens the attribution graphs of a set of transcoders explain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mtc.circuits.attribution import attribute_whole
from mtc.circuits.graph import explained
from mtc.circuits.replacement import ReplacementModel
from mtc.results import ScoredPrompt


def score_prompts(
    model: ReplacementModel, prompts: Iterable[Sequence[int]], prefixes: Sequence[int], max_features: int
) -> list[ScoredPrompt]:
    """The scores of each prompt, token ids, with the features of each prefix alone. Raises CircuitError for a prompt
    that `ReplacementModel.window` refuses."""
    found = []
    for ids in prompts:
        whole = attribute_whole(model, [int(i) for i in ids], max_features=max_features)
        found.append(
            ScoredPrompt(
                text="".join(model.strings(whole.token_ids)),
                token_ids=whole.token_ids,
                active=whole.traced.num_features,
                scores=tuple(explained(whole, whole.adjacency.feature < prefix) for prefix in prefixes),
            )
        )
    return found
