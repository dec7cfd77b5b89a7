"""The service's processes, as Ray Serve deployments, and how new ones take the place of old ones."""

from serve.deployments.circuits import Circuits
from serve.deployments.control import Control
from serve.deployments.rollout import APP, DeployError, check_room, listen, roll_out
from serve.deployments.server import Server

__all__ = ["APP", "Circuits", "Control", "DeployError", "Server", "check_room", "listen", "roll_out"]
