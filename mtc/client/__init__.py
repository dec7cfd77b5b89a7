"""A client of the service in `serve/`, see docs/serving-formats.md. Needs neither PyTorch nor Ray.

    with Client("http://127.0.0.1:8000") as client:
        encoding = client.encode("We the people", top_k=8)
        encoding.inputs[0].top(-1, 3)

Every call may be repeated without harm, so what a busy or restarting service refuses is asked for again; of `graph`,
an answer that was lost may leave a job that nobody fetches, until the service forgets it.
"""

from mtc.client.answers import Decoding, EncodedInput, Encoding, Model, Tokenisation, TokenisedInput, Usage
from mtc.client.asynchronous import AsyncClient
from mtc.client.blocking import Client
from mtc.client.calls import EncodeOptions, GraphOptions, SteerOptions
from mtc.client.failures import Retry, ServiceError
from mtc.client.feature_answers import (
    ByTextOptions,
    Contrast,
    NearMiss,
    SideFigures,
    Surroundings,
    TextFeatures,
    Together,
)

__all__ = [
    "AsyncClient", "ByTextOptions", "Client", "Contrast", "Decoding", "EncodeOptions", "EncodedInput", "Encoding",
    "GraphOptions", "Model", "NearMiss", "Retry", "ServiceError", "SideFigures", "SteerOptions", "Surroundings",
    "TextFeatures", "Together", "Tokenisation", "TokenisedInput", "Usage",
]  # fmt: skip
