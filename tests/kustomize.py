"""The manifests of k8s/ as `kubectl apply -k` would send them to a cluster."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from ray_kinds import validate

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
OVERLAYS = {"base": K8S / "base"} | {name: K8S / "overlays" / name / "all" for name in ("local", "gpu", "prod")}
PARTS = {"check": "Job", "train": "RayJob", "serve": "RayService", "cluster": "RayCluster"}
"""What is applied of an overlay, one at a time, and the one kind that each leaves of these."""
CLUSTERS = {"RayCluster": [], "RayJob": ["rayClusterSpec"], "RayService": ["rayClusterConfig"]}
KUBECTL = Path(sys.executable).parent / "kubectl"
Document = dict[str, Any]


def kustomize(directory: Path) -> list[Document]:
    done = subprocess.run([KUBECTL, "kustomize", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@cache
def rendered(overlay: str) -> list[Document]:
    """Of a name in OVERLAYS, or of a directory under k8s/."""
    return kustomize(OVERLAYS.get(overlay, K8S / overlay))


def find(overlay: str, kind: str, name: str | None = None) -> Document:
    (found,) = [d for d in rendered(overlay) if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    return found


def cluster_of(document: Document) -> Document:
    spec: Document = document["spec"]
    for step in CLUSTERS[document["kind"]]:
        spec = spec[step]
    return spec


class Pods(NamedTuple):
    """One group of a cluster's pods."""

    kind: str
    """That of the document that asks for them."""
    cluster: Document
    group: Document
    spec: Document
    container: Document
    """The one that runs Ray."""
    is_head: bool
    labels: dict[str, str]
    """Of the template, and those that the operator adds."""


def pods(overlay: str, kind: str | None = None) -> Iterator[Pods]:
    for document in rendered(overlay):
        if document["kind"] in CLUSTERS and kind in (None, document["kind"]):
            cluster = cluster_of(document)
            for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
                is_head = group is cluster["headGroupSpec"]
                spec = group["template"]["spec"]
                labels = {"ray.io/node-type": "head" if is_head else "worker"} | group["template"]["metadata"]["labels"]
                yield Pods(document["kind"], cluster, group, spec, spec["containers"][0], is_head, labels)


@cache
def with_components(overlay: str, *names: str) -> list[Document]:
    """An overlay of somebody's own, beside ours."""
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(K8S, Path(directory) / "k8s")
        own = Path(directory) / "k8s" / "overlays" / "own"
        own.mkdir()
        parts = {"resources": [f"../{overlay}"], "components": [f"../../components/{name}" for name in names]}
        (own / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "mtc"} | parts))
        found = kustomize(own)
    for document in found:
        validate(document)
    return found


def amount(quantity: str | int) -> float:
    """A quantity of Kubernetes, of the units that are used here."""
    units = {"m": 1e-3, "Mi": 1024.0**2, "Gi": 1024.0**3}
    unit = next((unit for unit in units if str(quantity).endswith(unit)), "")
    return float(str(quantity).removesuffix(unit)) * units.get(unit, 1)


def requested(container: Document, resource: str) -> float:
    return amount(container["resources"]["requests"].get(resource, 0))


def matches(selector: Document, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def check_labels() -> dict[str, str]:
    labels: dict[str, str] = find("prod", "Job")["spec"]["template"]["metadata"]["labels"]
    return labels
