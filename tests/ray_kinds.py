"""Closed schemas of the ray.io kinds, as KubeRay 1.7 defines them, less what the manifests have no use for.

Pod templates, network policies' like and other core objects are checked by Kubernetes' own published schemas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray.serve.schema import ServeDeploySchema
from yaml import safe_load

KUBERNETES = "1.33"
LOCK = Path(__file__).parent.parent / "constraints.txt"


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Closed):
    name: str
    namespace: str
    labels: dict[str, str] = {}


class Group(Closed):
    rayStartParams: dict[str, str]
    template: dict[str, Any]

    @field_validator("template")
    @classmethod
    def _pods(cls, template: dict[str, Any]) -> dict[str, Any]:
        # A template is not an object of its own in the published schemas; a PodTemplate holds nothing else.
        core({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})
        return template


class WorkerGroup(Group):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> WorkerGroup:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"{self.groupName}: {self.minReplicas} <= {self.replicas} <= {self.maxReplicas} is wanted")
        return self


class AuthOptions(Closed):
    mode: Literal["token", "disabled"]


class AutoscalerOptions(Closed):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int = Field(ge=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    resources: dict[str, dict[str, str]]
    securityContext: dict[str, Any]

    @field_validator("securityContext")
    @classmethod
    def _container(cls, context: dict[str, Any]) -> dict[str, Any]:
        container = {"name": "x", "image": "x", "securityContext": context}
        core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}})
        return context


class KeyRef(Closed):
    name: str
    key: str


class SecretSource(Closed):
    secretKeyRef: KeyRef


class FromSecret(Closed):
    """A password by reference; written out, it would be in whoever's clone of the manifests."""

    valueFrom: SecretSource


class GcsFaultTolerance(Closed):
    redisAddress: str = Field(pattern=r"^rediss?://")
    redisPassword: FromSecret


class Cluster(Closed):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    gcsFaultToleranceOptions: GcsFaultTolerance | None = None
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup]

    @field_validator("rayVersion")
    @classmethod
    def _locked(cls, version: str) -> str:
        if f"ray=={version}" not in LOCK.read_text().splitlines():
            raise ValueError(f"rayVersion {version} is not the one in {LOCK.name}")
        return version


class Condition(Closed):
    jobStatus: Literal["SUCCEEDED", "FAILED"] | None = None
    jobDeploymentStatus: Literal["Failed"] | None = None
    ttlSeconds: int = Field(ge=0)

    @model_validator(mode="after")
    def _one(self) -> Condition:
        if (self.jobStatus is None) is (self.jobDeploymentStatus is None):
            raise ValueError("exactly one of jobStatus and jobDeploymentStatus is wanted")
        return self


class DeletionRule(Closed):
    policy: Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]
    condition: Condition


class DeletionStrategy(Closed):
    deletionRules: list[DeletionRule] = Field(min_length=1)


class JobSpec(Closed):
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    entrypoint: str
    backoffLimit: int = Field(ge=0)
    activeDeadlineSeconds: int = Field(gt=0)
    deletionStrategy: DeletionStrategy
    rayClusterSpec: Cluster

    @model_validator(mode="after")
    def _deletable(self) -> JobSpec:
        policies = {rule.policy for rule in self.deletionStrategy.deletionRules}
        if self.rayClusterSpec.enableInTreeAutoscaling and "DeleteWorkers" in policies:
            raise ValueError("DeleteWorkers is not supported with autoscaling")
        return self


class UpgradeStrategy(Closed):
    type: Literal["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]


class ServiceSpec(Closed):
    upgradeStrategy: UpgradeStrategy
    deploymentUnhealthySecondThreshold: int = Field(gt=0)
    serviceUnhealthySecondThreshold: int = Field(gt=0)
    rayClusterDeletionDelaySeconds: int = Field(ge=0)
    excludeHeadPodFromServeSvc: bool = False
    serveConfigV2: str
    rayClusterConfig: Cluster

    @field_validator("serveConfigV2")
    @classmethod
    def _serve(cls, config: str) -> str:
        ServeDeploySchema.model_validate(safe_load(config))
        return config


class Kind(Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: str
    metadata: Metadata


class RayCluster(Kind):
    spec: Cluster


class RayJob(Kind):
    spec: JobSpec


class RayService(Kind):
    spec: ServiceSpec


class MonitoringKind(Closed):
    """Of the Prometheus operator; what its rules hold is promtool's to check."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: str
    metadata: Metadata


class Relabeling(Closed):
    targetLabel: str
    replacement: str


class Authorization(Closed):
    type: Literal["Bearer"]
    credentials: KeyRef


class Endpoint(Closed):
    port: str
    path: str = "/metrics"
    authorization: Authorization | None = None
    relabelings: list[Relabeling] = []


class Selector(Closed):
    matchLabels: dict[str, str]


class PodMonitorSpec(Closed):
    selector: Selector
    podMetricsEndpoints: list[Endpoint]


class PodMonitor(MonitoringKind):
    spec: PodMonitorSpec


class PrometheusRule(MonitoringKind):
    spec: dict[Literal["groups"], list[dict[str, Any]]]


KINDS: dict[str, type[Closed]] = {
    kind.__name__: kind for kind in (RayCluster, RayJob, RayService, PodMonitor, PrometheusRule)
}


def core(document: dict[str, Any]) -> None:
    """Raises ValueError unless Kubernetes' published schemas accept a document, unknown fields refused."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(error.message) from None


def validate(document: dict[str, Any]) -> None:
    """Raises ValueError (pydantic's is one) for a document that a cluster would refuse or silently misread."""
    if document["kind"] in KINDS:
        KINDS[document["kind"]].model_validate(document)
    else:
        core(document)
