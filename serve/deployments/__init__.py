"""The service's processes, as Ray Serve deployments."""

from serve.deployments.control import Control
from serve.deployments.server import Server

__all__ = ["Control", "Server"]
