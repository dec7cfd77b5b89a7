"""What all parts of the service agree on: settings, what is sent and answered, errors and counts."""

from serve.contract.circuit_schemas import GraphJob, GraphRequest, InterventionRequest, SteerRequest, TargetFeature
from serve.contract.errors import ServiceError
from serve.contract.feature_schemas import ExamplesResponse, FeatureResponse, FeaturesQuery, FeaturesResponse
from serve.contract.messages import Encoded, Options, RunKey, State, Tokenised
from serve.contract.metrics import CircuitMetrics, Family, ReplicaMetrics, Snapshot, render_metrics, take_snapshot
from serve.contract.schemas import (
    DecodeRequest,
    DecodeResponse,
    EncodeRequest,
    EncodeResponse,
    ErrorResponse,
    InfoResponse,
    Limits,
    LoadRequest,
    LoadResponse,
    ModelIdentity,
    RunsResponse,
    RunSummary,
    Status,
    TokenizeRequest,
    TokenizeResponse,
)
from serve.contract.settings import ENVIRONMENT, Settings, free_ports, proxy_files

__all__ = [
    "ENVIRONMENT",
    "CircuitMetrics",
    "DecodeRequest",
    "DecodeResponse",
    "EncodeRequest",
    "EncodeResponse",
    "Encoded",
    "ErrorResponse",
    "ExamplesResponse",
    "Family",
    "FeatureResponse",
    "FeaturesQuery",
    "FeaturesResponse",
    "GraphJob",
    "GraphRequest",
    "InfoResponse",
    "InterventionRequest",
    "Limits",
    "LoadRequest",
    "LoadResponse",
    "ModelIdentity",
    "Options",
    "ReplicaMetrics",
    "RunKey",
    "RunSummary",
    "RunsResponse",
    "ServiceError",
    "Settings",
    "Snapshot",
    "State",
    "Status",
    "SteerRequest",
    "TargetFeature",
    "Tokenised",
    "TokenizeRequest",
    "TokenizeResponse",
    "free_ports",
    "proxy_files",
    "render_metrics",
    "take_snapshot",
]  # fmt: skip
