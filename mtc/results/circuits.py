"""The shape of an attribution graph: what made a language model's next token, at one resolution of the dictionary."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from mtc.record import Record

GRAPH_VERSION = 3
MOST_VALUE = 1e6
"""Largest activation, or factor, that a feature is set to."""


class GraphNode(Record):
    """Something that is read, that reads, or both."""

    kind: Literal["feature", "error", "embedding", "logit", "others"]
    """`feature`: an active feature of a layer's transcoder; `error`: what a layer's MLP writes that the features, the
    skip connection and the decoder's bias do not; `embedding`: a token; `logit`: a next token, less the mean of all;
    `others`: of a coarse graph, a layer's features at a token that refine none of its prefix."""
    token: int
    """Position in the prompt, from 0."""
    layer: int | None = None
    """Layer of a feature or an error, from 0."""
    feature: int | None = None
    """Index of a feature in its dictionary."""
    token_id: int | None = None
    """Token id of an embedding or a logit."""
    text: str | None = None
    """Text of an embedding's or a logit's token; of a feature its label (mtc.results.Feature)."""
    activation: float | None = None
    """Activation of a feature, in scaled units."""
    value: float | None = None
    """What is read: a feature's pre-activation, or a logit less the mean logit; None for what only is read."""
    bias: float | None = None
    """The part of `value` that comes from biases alone."""
    incoming: float | None = None
    """Sum of the absolute edges into the node in the whole graph, of which pruning may leave a part."""
    influence: float
    """Sum over all paths to the targets of the product of the edges' shares of `incoming`, times the targets'
    weights; of a target its weight."""
    target: bool = False
    """Whether the graph explains this node."""
    probability: float | None = None
    """Probability of a logit's token."""
    group: int | None = None
    """Group of the nested dictionary that a feature is in, from 0."""
    ancestors: tuple[int, ...] = ()
    """Indices of the earlier features that a feature refines: its parent, that one's parent, and so on."""
    folded: int = 0
    """Of a coarse graph, how many other features this node stands for."""


class Explained(Record):
    """What a graph explains if some of its features stay features and what the others write is error."""

    features: int
    """Active features of the prompt that stay, before pruning."""
    replacement: float
    """Share of the targets' influence that ends in embeddings and not in errors, from 0 to 1."""
    completeness: float
    """Share of all nodes' incoming edges, weighed by influence, that does not come from errors, from 0 to 1."""
    special_errors: float
    """Share of the targets' influence that ends in errors at special tokens, such as BOS, on which no transcoder is
    trained, from 0 to 1; it is part of what `replacement` leaves."""


class Folded(Explained):
    """What a coarse graph explains: a prefix's features, and the later ones that refine any of them."""

    nodes: int
    """Nodes that these features are folded into: features of the prefix, each at a layer and a token."""


class PrefixScores(Explained):
    """What a graph explains at one resolution: with the features of a prefix of each dictionary alone, and with later
    ones folded into them."""

    prefix: int
    """Number of features of each layer's nested dictionary."""
    folded: Folded
    """The same with the later features that refine these, of all that the graph has."""


class Faithfulness(Record):
    """How well the graph foretells what happens when single features are taken out of the real model."""

    features: int
    """Features that were taken out, one at a time: the strongest of the graph by influence."""
    spearman: float | None
    """Rank correlation between the change of the target that the graph foretells and the real one; None if there are
    fewer than 3 features or either does not vary."""
    same_sign: float | None
    """Share of these features for which both changes have one sign, from 0 to 1."""
    real: tuple[float, ...]
    """Real change of the target for each feature, in the order of `nodes`: of the logits less their mean, weighed."""
    foretold: tuple[float, ...]
    """Change of the target that the graph foretells for each."""
    nodes: tuple[int, ...]
    """The features' numbers among the graph's nodes."""


class Graph(Record):
    """An attribution graph; edges and scores as mtc.circuits defines them."""

    format_version: int = GRAPH_VERSION
    """Shape of this record."""
    run_id: str | None
    """Run whose transcoders were used."""
    base_model: str
    """The language model."""
    layers: int
    """Layers of the language model."""
    traced: tuple[int, ...]
    """Layers that have a transcoder; of the others all that the MLP writes is error."""
    token_ids: tuple[int, ...]
    """The prompt's token ids."""
    tokens: tuple[str, ...]
    """The prompt's tokens as text."""
    prefix: int
    """Number of features of each layer's dictionary that were used."""
    prefixes: tuple[int, ...]
    """Sizes of the nested dictionaries that all layers have."""
    coarse: int | None = None
    """Prefix that later features were folded into; None if none were."""
    active: int
    """Active features of the prompt, of that prefix."""
    read: int
    """Those of them with edges of their own, by `max_features`; what the others write is part of the errors."""
    node_share: float
    """Share of all influence that the nodes hold which pruning left."""
    edge_share: float
    """Share of the influence among them that the edges hold which pruning left."""
    all_edges: int
    """Edges that are not 0, before pruning."""
    all_influence: float | None = None
    """Sum of the influence of all nodes but targets, before pruning; None if it is not known."""
    scores: tuple[PrefixScores, ...]
    """What the whole graph leaves unexplained, of each prefix up to `prefix`."""
    identity_error: float
    """Largest difference between what a node reads and the sum of its edges and its bias, as a part of the sum of their
    absolute values: 0 but for rounding."""
    nodes: tuple[GraphNode, ...]
    """What is left after pruning: embeddings, then errors and features by layer, then targets."""
    edges: tuple[tuple[int, int, float], ...]
    """Source, target and weight: numbers of nodes, and what the source adds to what the target reads."""
    faithfulness: Faithfulness | None = None
    """None where it was not measured."""


class Intervention(Record):
    """A change of one feature's activation, and through it of what its layer's MLP writes."""

    model_config = ConfigDict(allow_inf_nan=False)

    layer: int = Field(ge=0)
    """Layer whose transcoder has the feature, from 0."""
    feature: int = Field(ge=0)
    """Index of the feature in its dictionary."""
    mode: Literal["set", "scale", "add"] = "set"
    """Whether the activation becomes `value`, is multiplied with it, or `value` is added to it."""
    value: float = Field(ge=-MOST_VALUE, le=MOST_VALUE)
    """In the transcoder's scaled units, as activations are; a factor for `scale`."""
    positions: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(default=None, min_length=1, max_length=4096)
    """Positions where the activation is changed, from 0, the prompt's tokens first, then those that follow; by default
    all of them."""


class NextToken(Record):
    """A candidate for the token behind the prompt."""

    token_id: int
    """Id of the token."""
    text: str
    """Text of the token."""
    plain: float
    """Natural logarithm of its probability without the interventions."""
    steered: float
    """Natural logarithm of its probability with them."""


class Continuation(Record):
    """Tokens that follow a prompt, drawn from one of the two models."""

    token_ids: tuple[int, ...]
    """Ids of the tokens, without one that ends the text."""
    tokens: tuple[str, ...]
    """What each token adds to the text."""
    plain: tuple[float, ...]
    """Natural logarithm of each token's probability without the interventions."""
    steered: tuple[float, ...]
    """Natural logarithm of each token's probability with them."""
    ended: bool
    """Whether the model ended the text there, and not `max_tokens`."""


class Steered(Record):
    """What a language model goes on with, with interventions and without."""

    run_id: str | None
    """Run whose transcoders were used."""
    base_model: str
    """The language model."""
    token_ids: tuple[int, ...]
    """The prompt's token ids."""
    tokens: tuple[str, ...]
    """The prompt's tokens as text."""
    interventions: tuple[Intervention, ...]
    """What was changed."""
    attention: Literal["free", "frozen"]
    """Whether attention reacts to the interventions, or looks where it looks without them."""
    next: tuple[NextToken, ...]
    """The most probable next tokens of both models, those that changed most first."""
    plain: tuple[Continuation, ...]
    """Continuations without the interventions."""
    steered: tuple[Continuation, ...]
    """Continuations with them, of the same random numbers."""


class Ablated(Record):
    """What a language model's predictions lose with some features of one layer taken out of a text; what the layer's
    MLP writes beside these features stays as it is, also what its transcoder misses."""

    run_id: str | None
    """Run whose transcoder was used."""
    base_model: str
    """The language model."""
    token_ids: tuple[int, ...]
    """The text's token ids."""
    tokens: tuple[str, ...]
    """The text's tokens."""
    layer: int
    """Layer of the features, from 0."""
    features: tuple[int, ...]
    """Indices of the features that were taken out, all at once."""
    activations: tuple[tuple[float, ...], ...]
    """Activation of each of the features at each token, in scaled units; 0 at special tokens, which are left alone."""
    first: int | None
    """First token at which one of the features is active; None if none is anywhere, so that nothing changes."""
    kl: tuple[float, ...]
    """At each token the divergence KL(before || after) of the next token's probabilities, in nats; 0 before `first`."""
    loss_before: tuple[float, ...]
    """At each token but the last, minus the natural logarithm of the probability of the token that follows."""
    loss_after: tuple[float, ...]
    """The same without the features."""
    position: int | None
    """Token at which `kl` is greatest; None if nothing changes."""
    up: tuple[NextToken, ...]
    """Next tokens at `position` whose probability rises most without the features, the most first; `steered` is
    without."""
    down: tuple[NextToken, ...]
    """Next tokens at `position` whose probability falls most."""
