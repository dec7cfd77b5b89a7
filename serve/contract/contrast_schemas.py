"""What the service takes and answers where texts ask for features: `POST /features/by-text`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from serve.contract.schemas import FIRST, MAX_TOP_K, WHOLE, Layer, ModelIdentity, Prefix, SchemaModel, Text, Usage


class ByTextRequest(SchemaModel):
    """Texts, and what they are compared with."""

    texts: Text | Annotated[list[Text], Field(min_length=1), FIRST]
    """One text or several, whose features are asked for."""
    against: Text | Annotated[list[Text], Field(min_length=1), FIRST] | None = None
    """One text or several to compare with; by default the run's random contexts, places of held-out text in which
    everything that fires is known."""
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K), WHOLE] = 20
    """Most features of the answer."""
    model: str | None = Field(default=None, min_length=1, max_length=200)
    """Id of the run that answers; by default the current one."""
    layer: Layer | None = None
    """Layer of the run that answers; by default the lowest."""
    prefix: Prefix | None = None
    """Number of features compared, the first ones: one of the nested dictionaries. By default all."""
    truncate: bool = False
    """Cut texts that are too long, at the end, instead of refusing them."""

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The texts, and those that they are compared with, none for the background."""
        given = ([text] if isinstance(text, str) else text or [] for text in (self.texts, self.against))
        one, other = given
        return one, other

    def name(self, index: int) -> str:
        """What a text is called in errors, of both sides one after the other."""
        count = len(self.sides[0])
        return f"texts[{index}]" if index < count else f"against[{index - count}]"


class SideFigures(SchemaModel):
    """How a feature fires on the tokens of one side; special ones such as BOS count nowhere."""

    fires: int
    """Number of tokens on which the feature fires."""
    share: float
    """Share of the tokens on which it fires, from 0 to 1."""
    mean_activation: float
    """Mean activation over all tokens, 0 where the feature is silent, in scaled units."""


class ContrastRow(SchemaModel):
    """A feature that tells the texts from what they are compared with."""

    feature: int
    """Index of the feature in the dictionary."""
    label: str | None
    """What the feature responds to, in a few words; null without samples."""
    label_by: str | None
    """Who made the label: `rules`, or the name of a language model; null without one."""
    density: float
    """Share of the analysed held-out tokens on which the feature fired."""
    max_activation: float
    """Strongest activation of the feature on the analysed tokens, in scaled units."""
    massive: bool
    """Whether the feature is of massive tokens: more than half of its summed activation falls on them."""
    copy_of: int | None
    """Index of the earliest feature that this one is a copy of, if it is one."""
    texts: SideFigures
    """How the feature fires on the texts."""
    against: SideFigures
    """How the feature fires on what they are compared with."""
    log_odds_ratio: float
    """Logarithm of the ratio of the odds that the feature fires on a token, above 0 if it does so more often in the
    texts; half a token is added to each of the four counts (Haldane and Anscombe)."""
    z: float
    """`log_odds_ratio` over its standard error: about normal with deviation 1 if both sides are alike and tokens are
    independent, which those of one text are not."""
    difference: float
    """Difference of the mean activations in shares of the feature's largest one, from -1 to 1."""
    score: float
    """What features are ranked by: `z` times `difference`; features with 0, of which the two point in different
    directions or nowhere, are left out."""


class ByTextResponse(SchemaModel):
    """Features that tell two sides of text apart, the one that tells most first."""

    model: ModelIdentity
    """The transcoder that answered."""
    prefix: int
    """Number of features of the nested dictionary that was used."""
    background: Literal["texts", "random_contexts"]
    """What the texts are compared with: those of `against`, or the run's random contexts."""
    tokens: int
    """Number of tokens of the texts, special ones left out."""
    against_tokens: int
    """Number of tokens of what they are compared with, special ones left out."""
    largest_z_by_chance: float
    """What the largest of all features' `z`, without its sign, stays below in about 95 of 100 pairs of sides that are
    alike, if tokens are independent."""
    features: list[ContrastRow]
    """Features that tell the sides apart, by `score`; fewer than `top_k` if no others do."""
    usage: Usage
    """How much was read."""
    request_id: str
    """Id of the request, equal to the X-Request-ID header."""
