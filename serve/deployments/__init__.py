"""The service's processes, as Ray Serve deployments."""

from serve.deployments.control import Control
from serve.deployments.encoder import Encoder
from serve.deployments.ingress import Ingress

__all__ = ["Control", "Encoder", "Ingress"]
