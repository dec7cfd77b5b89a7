"""The nodes of a cluster that is not asked: as a file lists them, or this machine alone.

nodes:
  - {cpus: 8, memory: 32 GB, head: true}
  - {cpus: 96, memory: 1 TB, gpus: 8, gpu_memory: 80 GB, count: 4}
"""

from __future__ import annotations

import shutil
import subprocess

import ray._private.utils
from pydantic import ByteSize, Field, ValidationError

from cluster.resources import Node
from mtc.config import ConfigError, describe_faults, read_settings
from mtc.record import Record

FOR_PROCESSES = 0.7
"""Share of a node's memory that Ray counts for processes, where `ray start` is not told another; the rest is for its
object store."""


class NodeEntry(Record):
    """One or several equal nodes."""

    cpus: float = Field(gt=0)
    """CPUs of the node."""
    gpus: int = Field(0, ge=0)
    """GPUs of the node."""
    memory: ByteSize | None = None
    """Main memory of the node, such as `64 GB`; not held against anything if it is not given."""
    gpu_memory: ByteSize | None = None
    """Memory of each of its GPUs, such as `80 GB`; not held against anything if it is not given."""
    head: bool = False
    """Whether it is the cluster's head, which by default runs nothing where there are others."""
    count: int = Field(1, ge=1, le=10_000)
    """How many such nodes there are."""


class NodeFile(Record):
    """The file of `--nodes`."""

    nodes: list[NodeEntry] = Field(min_length=1)
    """All nodes of the cluster."""


def read_nodes(path: str) -> list[Node]:
    """The nodes of a YAML file. Raises ConfigError for what is no NodeFile."""
    try:
        entries = NodeFile.model_validate(read_settings(path, f"--nodes {path}")).nodes
    except ValidationError as error:
        raise ConfigError(f"--nodes {path}: {describe_faults(error, NodeFile)}") from None
    if (heads := sum(entry.count for entry in entries if entry.head)) > 1:
        raise ConfigError(f"--nodes {path}: a cluster has one head, here {heads} nodes are")
    nodes = [_node(each.cpus, each.gpus, each.head, each.memory or 0, each.gpu_memory or 0)
             for each in entries for _ in range(each.count)]  # fmt: skip
    return [node._replace(node_id=str(number)) for number, node in enumerate(nodes)]


def this_machine() -> list[Node]:
    """The node that a Ray of one's own would be, by what Ray looks at; its GPUs as `nvidia-smi` lists them."""
    gpus = _gpu_bytes()
    memory = ray._private.utils.estimate_available_memory()
    node = _node(ray._private.utils.get_num_cpus(), len(gpus), True, memory, max(gpus, default=0))
    return [node._replace(node_id="here")]


def _node(cpus: float, gpus: int, is_head: bool, memory: float, gpu_memory: float) -> Node:
    processes = FOR_PROCESSES * memory
    return Node(
        cpus, gpus, is_head, memory=processes, gpu_memory=gpu_memory * bool(gpus), object_store=memory - processes
    )


def _gpu_bytes() -> list[int]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    asked = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return [int(line) << 20 for line in done.stdout.split()] if done.returncode == 0 else []
