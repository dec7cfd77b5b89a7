"""What the report of a run of several layers says: each layer's key figures, and the layers' MLPs replaced at once."""

from __future__ import annotations

from mtc.record import Record
from mtc.results.analysis import Summary
from mtc.results.circuits import Explained
from mtc.results.intervals import Intervals


class ReplacedLayers(Record):
    """The language model with the MLPs of all of the run's layers replaced by their transcoders in one pass, on the
    held-out tokens of `analysis.loss_tokens`.

    A layer's single figures are measured where all other layers are the model's own. Here each transcoder reads what
    the replaced layers below it made. Positions of BOS and other special tokens keep their MLP's own output, as in the
    single figures; massive tokens are replaced like all others. The same prefix is used in all layers.
    """

    layers: tuple[int, ...]
    """Layers whose MLP is replaced, ascending."""
    prefixes: tuple[int, ...]
    """Features of each layer that are used, ascending: the nested dictionaries' sizes."""
    tokens: int
    """Tokens whose prediction was measured."""
    documents: int
    """Documents of the predicted tokens; more than 1,024 are resampled in as many blocks of whole documents."""
    ce_clean: float
    """Mean cross-entropy of the language model as it is, nats per token."""
    ce_zero: float
    """Mean cross-entropy with mlp_out of all the layers replaced by zero, nats per token."""
    ce_mean: float
    """Mean cross-entropy with mlp_out of all the layers replaced by its mean over held-out tokens, nats per token."""
    ce_replaced: tuple[float, ...]
    """Mean cross-entropy with mlp_out of all the layers replaced by reconstructions, nats per token, per prefix."""
    ce_interval: Intervals | None = None
    """95 % interval of `ce_replaced`, from resampled documents; None with too few of them."""
    kl: tuple[float, ...]
    """Mean KL divergence of the replaced model's next-token distribution from the clean one's, KL(clean || replaced),
    nats per token, per prefix."""
    kl_interval: Intervals | None = None
    """95 % interval of `kl`; None with too few documents."""
    agreement: tuple[float, ...]
    """Share of the tokens, from 0 to 1, whose most likely next token is the clean model's, per prefix."""
    agreement_interval: Intervals | None = None
    """95 % interval of `agreement`; None with too few documents."""


class ScoredPrompt(Record):
    """What the attribution graph of one held-out prompt explains; its most probable next tokens are the targets."""

    text: str
    """The prompt's tokens as text."""
    token_ids: tuple[int, ...]
    """The prompt's token ids."""
    active: int
    """Active features of the prompt, of which at most `max_features` have edges of their own."""
    scores: tuple[Explained, ...]
    """With the features of each prefix alone, in the order of the prefixes."""


class GraphScores(Record):
    """Scores of the attribution graphs (mtc.circuits) of held-out prompts."""

    prefixes: tuple[int, ...]
    """Features of each layer that are used, ascending: the nested dictionaries' sizes."""
    max_features: int
    """Most features of a graph with edges of their own, the strongest by influence; the others are error."""
    prompts: tuple[ScoredPrompt, ...]
    """The beginnings of held-out windows."""


class LayerFigures(Record):
    """One layer of the run."""

    layer: int
    """Index of the layer, from 0."""
    directory: str
    """Directory of the layer's own files inside the run."""
    summary: Summary
    """Key figures of the layer's transcoder."""


class LayersReport(Record):
    """report/layers_report.json of a run of several layers."""

    layers: tuple[LayerFigures, ...]
    """The layers, ascending."""
    replaced: ReplacedLayers | None
    """The language model with all of these layers' MLPs replaced at once; None if it was not measured
    (`analysis.loss_tokens` is 0, or an older version analysed the run)."""
    graphs: GraphScores | None = None
    """Attribution graphs of held-out prompts; None if they were not made (`analysis.loss_tokens` or
    `analysis.graph_prompts` is 0, there was no room, or an older version analysed the run)."""
