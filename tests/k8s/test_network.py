"""The network policies of `prod`: who reaches whom, and what pods reach outside, by our own reading of them."""

from typing import Any

import pytest
from kustomize import OVERLAYS, Document, check_labels, matches, rendered, with_components

COMPONENTS = ("cluster", "train", "serve")
SAME = {"kubernetes.io/metadata.name": "mtc"}


def label(component: str, node: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "mtc", "app.kubernetes.io/component": component, "ray.io/node-type": node}


def allowed(
    side: str,
    pod: dict[str, str],
    other: tuple[dict[str, str], dict[str, str]],
    port: int,
    tcp: str,
    documents: list[Document] | None = None,
) -> bool:
    """Whether a policy lets a pod's traffic pass: `side` is ingress or egress, `other` labels of namespace and pod."""
    policies = [d["spec"] for d in documents or rendered("prod") if d["kind"] == "NetworkPolicy"]
    policies = [p for p in policies if side.capitalize() in p["policyTypes"] and matches(p["podSelector"], pod)]
    assert policies, "without any policy everything passes"
    for rule in (rule for policy in policies for rule in policy[side]):
        peers = rule.get("from" if side == "ingress" else "to")
        if (not peers or any(_is(peer, *other) for peer in peers)) and (
            "ports" not in rule or {"protocol": tcp, "port": port} in rule["ports"]
        ):
            return True
    return False


def _is(peer: Document, namespace: dict[str, str], labels: dict[str, str]) -> bool:
    if "ipBlock" in peer:
        return peer["ipBlock"] == {"cidr": f"{labels.get('address')}/32"}
    inside = matches(peer["namespaceSelector"], namespace) if "namespaceSelector" in peer else namespace == SAME
    return inside and ("podSelector" not in peer or matches(peer["podSelector"], labels))


def space(name: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name}


OPERATOR = (space("kuberay-system"), {"app.kubernetes.io/name": "kuberay-operator"})
DNS = (space("kube-system"), {"k8s-app": "kube-dns"})
ANY = (space("elsewhere"), {})


def at(address: str) -> tuple[dict[str, str], dict[str, str]]:
    """Something that is no pod."""
    return {}, {"address": address}


@pytest.mark.parametrize(
    ("side", "pod", "other", "port", "passes"),
    [
        ("ingress", label("train", "head"), (SAME, label("train", "worker")), 6379, True),
        ("ingress", label("train", "worker"), (SAME, label("train", "worker")), 33333, True),
        ("ingress", label("train", "head"), (SAME, label("serve", "worker")), 6379, False),
        ("ingress", label("train", "head"), (SAME, {}), 8265, False),
        ("ingress", label("train", "head"), (space("other"), label("train", "worker")), 8265, False),
        ("ingress", label("train", "head"), OPERATOR, 8265, True),
        ("ingress", label("serve", "head"), OPERATOR, 8000, True),
        ("ingress", label("train", "head"), OPERATOR, 6379, False),
        ("ingress", label("train", "head"), (space("kuberay-system"), {}), 8265, False),
        ("ingress", label("train", "head"), (space("monitoring"), {}), 9464, True),
        ("ingress", label("serve", "worker"), (space("monitoring"), {}), 8080, True),
        ("ingress", label("serve", "worker"), (space("monitoring"), {}), 8000, True),
        ("ingress", label("train", "head"), (space("monitoring"), {}), 8265, False),
        ("ingress", label("serve", "worker"), (space("ingress-nginx"), {}), 8000, True),
        ("ingress", label("serve", "worker"), (space("ingress-nginx"), {}), 8404, False),
        ("ingress", label("serve", "head"), (space("ingress-nginx"), {}), 8265, False),
        ("ingress", label("cluster", "head"), (space("ingress-nginx"), {}), 8000, False),
        ("ingress", label("serve", "worker"), ANY, 8000, False),
        ("egress", label("train", "worker"), (SAME, label("train", "head")), 6379, True),
        ("egress", label("train", "worker"), (SAME, label("serve", "worker")), 9101, False),
        ("egress", label("train", "worker"), ANY, 443, True),
        ("egress", label("train", "worker"), ANY, 80, False),
        ("egress", label("serve", "worker"), ANY, 6443, False),
        ("egress", label("serve", "head"), ANY, 6443, True),
        ("egress", label("serve", "head"), (space("redis"), {}), 6379, True),
        ("egress", label("serve", "redis-cleanup"), (space("redis"), {}), 6379, True),
        ("egress", label("serve", "worker"), (space("redis"), {}), 6379, False),
    ],
)
def test_network(side: str, pod: dict[str, str], other: Any, port: int, passes: bool) -> None:
    assert allowed(side, pod, other, port, "TCP") is passes


def test_names_are_looked_up_over_udp_and_tcp() -> None:
    for component in COMPONENTS:
        for protocol in ("UDP", "TCP"):
            for place in (DNS, at("169.254.20.10"), at("169.254.25.10")):
                assert allowed("egress", label(component, "worker"), place, 53, protocol)
            assert not allowed("egress", label(component, "worker"), ANY, 53, protocol)


@pytest.mark.parametrize(
    ("component", "other", "port"),
    [
        ("cloud-metadata", at("169.254.169.254"), 80),
        ("cloud-metadata", at("169.254.169.252"), 988),
        ("cloud-metadata", at("169.254.170.23"), 80),
        ("minio", (space("minio"), {}), 9000),
        ("mlflow", (space("mlflow"), {}), 5000),
    ],
)
def test_what_else_may_be_reached_is_a_choice(component: str, other: Any, port: int) -> None:
    found = with_components("prod/all", f"egress/{component}")
    named = {line.strip(" #-") for line in (OVERLAYS["prod"] / "kustomization.yaml").read_text().splitlines()}
    assert f"../../../components/egress/{component}" in named
    for pod in (label("train", "worker"), label("train", "head"), label("serve", "worker"), check_labels()):
        assert not allowed("egress", pod, other, port, "TCP")
        assert allowed("egress", pod, other, port, "TCP", found)
        assert not allowed("egress", pod, other, port + 1, "TCP", found)


def test_a_check_reaches_the_bucket_and_nobody_reaches_it() -> None:
    assert allowed("egress", check_labels(), ANY, 443, "TCP") and allowed("egress", check_labels(), DNS, 53, "UDP")
    assert not allowed("egress", check_labels(), ANY, 6443, "TCP")
    assert not allowed("ingress", check_labels(), (SAME, label("train", "head")), 80, "TCP")
