"""Closed schemas of the ray.io kinds, as KubeRay 1.7 defines them, less what the manifests have no use for.

Pod templates and all other core objects are checked by Kubernetes' own published schemas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from ray.serve.schema import ServeDeploySchema
from yaml import safe_load

from serve.contract import Settings

KUBERNETES = "1.33"
LOCK = Path(__file__).parent.parent / "constraints.txt"


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Closed):
    name: str = Field(pattern="^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=47)
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
            raise ValueError(f"group {self.groupName}: {self.replicas} replicas are not between least and most")
        return self


class AuthOptions(Closed):
    mode: Literal["token", "disabled"]


class AutoscalerOptions(Closed):
    """Of the container that the operator adds to the head's pod."""

    version: Literal["v2"]
    idleTimeoutSeconds: int = Field(ge=0)
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    resources: dict[str, Any]
    securityContext: dict[str, Any]
    volumeMounts: list[dict[str, Any]]

    @model_validator(mode="after")
    def _container(self) -> AutoscalerOptions:
        fields = {name: getattr(self, name) for name in ("resources", "securityContext", "volumeMounts")}
        containers = [{"name": "autoscaler", "image": "x", **fields}]
        core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": containers}})
        return self


class SecretKey(Closed):
    name: str
    key: str


class FromSecret(Closed):
    secretKeyRef: SecretKey


class Credential(Closed):
    """By reference: one that is written out would be in every clone of the manifests."""

    valueFrom: FromSecret


class GcsFaultTolerance(Closed):
    redisAddress: str = Field(pattern=r"^(rediss?://)?[a-z0-9.-]+:\d+$")
    redisPassword: Credential


class Cluster(Closed):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: AutoscalerOptions | None = None
    gcsFaultToleranceOptions: GcsFaultTolerance | None = None
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup] = Field(min_length=1)

    @field_validator("rayVersion")
    @classmethod
    def _locked(cls, version: str) -> str:
        if f"ray=={version}" not in LOCK.read_text().splitlines():
            raise ValueError(f"rayVersion {version} is not that of {LOCK.name}")
        return version

    @model_validator(mode="after")
    def _autoscaled(self) -> Cluster:
        if self.enableInTreeAutoscaling is not (self.autoscalerOptions is not None):
            raise ValueError("autoscalerOptions and enableInTreeAutoscaling go together")
        names = [group.groupName for group in self.workerGroupSpecs]
        if len(set(names)) < len(names):
            raise ValueError(f"two groups of one name: {names}")
        return self


class Condition(Closed):
    jobStatus: Literal["SUCCEEDED", "FAILED", "STOPPED"] | None = None
    jobDeploymentStatus: Literal["Failed"] | None = None
    ttlSeconds: int = Field(ge=0)

    @model_validator(mode="after")
    def _one(self) -> Condition:
        if (self.jobStatus is None) is (self.jobDeploymentStatus is None):
            raise ValueError("exactly one of jobStatus and jobDeploymentStatus is wanted")
        return self


class DeletionRule(Closed):
    policy: Literal["DeleteCluster", "DeleteSelf", "DeleteNone"]  # and DeleteWorkers, but not with an autoscaler
    condition: Condition


class DeletionStrategy(Closed):
    deletionRules: list[DeletionRule] = Field(min_length=1)  # which exclude shutdownAfterJobFinishes


class JobSpec(Closed):
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    entrypoint: str
    backoffLimit: int = Field(ge=0)
    activeDeadlineSeconds: int = Field(gt=0)
    preRunningDeadlineSeconds: int = Field(gt=0)
    deletionStrategy: DeletionStrategy | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: int = Field(0, ge=0)
    rayClusterSpec: Cluster

    @model_validator(mode="after")
    def _cluster_goes(self) -> JobSpec:
        """As the operator's validateDeletionConfiguration; and a cluster that nothing deletes would stay for ever."""
        if self.shutdownAfterJobFinishes is (self.deletionStrategy is not None):
            raise ValueError("shutdownAfterJobFinishes and deletionRules exclude each other, and one is wanted")
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        return self


class UpgradeStrategy(Closed):
    type: Literal["NewCluster", "None"]  # and NewClusterWithIncrementalUpgrade, which needs the Gateway API


class ServiceSpec(Closed):
    serveConfigV2: str
    upgradeStrategy: UpgradeStrategy
    rayClusterDeletionDelaySeconds: int = Field(ge=0)
    excludeHeadPodFromServeSvc: bool
    rayClusterConfig: Cluster

    @field_validator("serveConfigV2")
    @classmethod
    def _serve(cls, text: str) -> str:
        """By Ray's own schema, and the arguments by the application's."""
        for application in ServeDeploySchema.model_validate(safe_load(text)).applications:
            Settings.model_validate(application.args)
        return text


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
    """Of the Prometheus operator. What its rules hold is promtool's to check, in test_monitoring.py."""

    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: str
    metadata: Metadata


class Relabeling(Closed):
    targetLabel: str
    replacement: str | None = None
    sourceLabels: list[str] = []


class Authorization(Closed):
    type: Literal["Bearer"]
    credentials: SecretKey


class Endpoint(Closed):
    port: str
    path: str = "/metrics"
    authorization: Authorization | None = None
    relabelings: list[Relabeling] = []


class Selector(Closed):
    matchLabels: dict[str, str]


class PodMonitorSpec(Closed):
    selector: Selector
    podMetricsEndpoints: list[Endpoint] = Field(min_length=1)


class PodMonitor(MonitoringKind):
    spec: PodMonitorSpec


class PrometheusRule(MonitoringKind):
    spec: dict[Literal["groups"], list[dict[str, Any]]]


KINDS: dict[str, type[Closed]] = {
    kind.__name__: kind for kind in (RayCluster, RayJob, RayService, PodMonitor, PrometheusRule)
}


def core(document: dict[str, Any]) -> None:
    """Raises ValueError unless Kubernetes' published schemas accept a document; unknown fields are refused."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(error.message) from None


def validate(document: dict[str, Any]) -> None:
    """Raises ValueError (pydantic's is one) for a document that a cluster would refuse, or misread without a word."""
    if document["kind"] in KINDS:
        KINDS[document["kind"]].model_validate(document)
    else:
        core(document)
