"""The Kubernetes manifests: rendered, checked against closed schemas, and against the code that they start."""

import copy
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import ray
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ray.serve.schema import ServeDeploySchema

from mtc.command_line import parse_command_line
from serve.settings import ENVIRONMENT

BASE = Path(__file__).parent.parent / "k8s" / "base"
KUBERNETES = "1.33"


# The ray.io kinds, as KubeRay 1.5 to 1.7 define them, less what the manifests have no use for. ------------------------


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
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        core(pod)
        return template


class WorkerGroup(Group):
    groupName: str
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)


class AuthOptions(Closed):
    mode: Literal["token", "disabled"]


class Cluster(Closed):
    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: Group
    workerGroupSpecs: list[WorkerGroup]

    @field_validator("rayVersion")
    @classmethod
    def _installed(cls, version: str) -> str:
        if version != ray.__version__:
            raise ValueError(f"rayVersion {version} is not the installed Ray {ray.__version__}")
        return version


class JobSpec(Closed):
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    entrypoint: str
    backoffLimit: int = Field(ge=0)
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int = Field(ge=0)
    rayClusterSpec: Cluster


class ServiceSpec(Closed):
    serveConfigV2: str
    rayClusterConfig: Cluster


class RayJob(Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class RayService(Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


def core(document: dict[str, Any]) -> None:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        raise ValueError(error.message) from None


def validate(document: dict[str, Any]) -> None:
    kinds: dict[str, type[Closed]] = {"RayJob": RayJob, "RayService": RayService}
    if document["kind"] in kinds:
        kinds[document["kind"]].model_validate(document)
    else:
        core(document)


def render(directory: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` prints, for the fields that this base uses."""
    settings = yaml.safe_load((directory / "kustomization.yaml").read_text())
    assert settings["generatorOptions"] == {"disableNameSuffixHash": True}
    documents = [d for name in settings["resources"] for d in yaml.safe_load_all((directory / name).read_text())]
    for generator in settings["configMapGenerator"]:
        data = {name: (directory / name).read_text() for name in generator["files"]}
        name = {"name": generator["name"]}
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": name, "data": data})
    for document in documents:
        if document["kind"] != "Namespace":
            document["metadata"]["namespace"] = settings["namespace"]
    return documents


def find(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return render(BASE)


@pytest.fixture
def job(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(find(documents, "RayJob", "mtc-train"))


@pytest.fixture
def service(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(find(documents, "RayService", "mtc"))


def clusters(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    service = find(documents, "RayService", "mtc")["spec"]["rayClusterConfig"]
    return [find(documents, "RayJob", "mtc-train")["spec"]["rayClusterSpec"], service]


def test_documents_are_valid(documents: list[dict[str, Any]]) -> None:
    assert {d["kind"] for d in documents} == {"Namespace", "ConfigMap", "PersistentVolumeClaim", "RayJob", "RayService"}
    for document in documents:
        validate(document)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_renders_the_same(documents: list[dict[str, Any]]) -> None:
    printed = subprocess.run(["kubectl", "kustomize", str(BASE)], capture_output=True, text=True, check=True).stdout
    by_name = sorted(yaml.safe_load_all(printed), key=lambda d: json.dumps(d["metadata"], sort_keys=True))
    assert by_name == sorted(documents, key=lambda d: json.dumps(d["metadata"], sort_keys=True))


def test_mistakes_in_ray_kinds_are_found(job: dict[str, Any], service: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    mistakes: list[tuple[dict[str, Any], str, Any]] = [
        (job["spec"], "entryPoint", "python x.py"),
        (job["spec"], "backoffLimit", "2"),
        (job["spec"], "submissionMode", "HttpMode"),
        (cluster, "rayVersion", "2.59.0"),
        (cluster["headGroupSpec"]["rayStartParams"], "num-cpus", 0),
        (cluster["workerGroupSpecs"][0], "replicas", "two"),
        (container, "volumeMount", []),
        (container, "image", 5),
        (container["securityContext"], "runAsNonroot", True),
    ]
    for holder, field, value in mistakes:
        before = dict(holder)
        holder[field] = value
        with pytest.raises(ValidationError):
            validate(job)
        holder.clear()
        holder.update(before)
    validate(job)
    service["spec"]["serveConfig"] = ""
    with pytest.raises(ValidationError):
        validate(service)


def test_mistakes_in_core_kinds_are_found(documents: list[dict[str, Any]]) -> None:
    for field, value in [("accessMode", ["ReadWriteMany"]), ("accessModes", "ReadWriteMany")]:
        claim = copy.deepcopy(find(documents, "PersistentVolumeClaim", "mtc-storage"))
        claim["spec"][field] = value
        with pytest.raises(ValueError, match=r"accessMode|ReadWriteMany"):
            validate(claim)


def test_pods(documents: list[dict[str, Any]]) -> None:
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    for cluster in clusters(documents):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            for volume in pod["volumes"]:
                if "configMap" in volume:
                    assert ("ConfigMap", volume["configMap"]["name"]) in names
                elif "secret" in volume:  # made by whoever deploys, never by these files
                    assert volume["secret"]["secretName"] == "mtc-api-keys"
                    assert ("Secret", "mtc-api-keys") not in names
                else:
                    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
            for container in pod["containers"]:
                assert container["image"] == "mtc:0.1.0"
                memory = [container["resources"][side]["memory"] for side in ("requests", "limits")]
                assert memory[0] == memory[1]  # Ray sizes itself by the limit; the scheduler counts the request
                assert {"name": "RAY_AUTH_MODE", "value": cluster["authOptions"]["mode"]} in container["env"]
                sources = [source["configMapRef"]["name"] for source in container["envFrom"]]
                assert {("ConfigMap", name) for name in sources} <= names
                assert ("mtc-serve-environment" in sources) is (cluster is clusters(documents)[1])
                assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_service_runs_as_elsewhere(documents: list[dict[str, Any]]) -> None:
    assert find(documents, "ConfigMap", "mtc-serve-environment")["data"] == ENVIRONMENT


def test_job_and_service_agree_with_the_code(
    documents: list[dict[str, Any]], job: dict[str, Any], service: dict[str, Any], tmp_path: Path
) -> None:
    storage = find(documents, "ConfigMap", "mtc-storage")["data"]["MTC_STORAGE"]
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"].replace("$MTC_STORAGE", storage))
    assert (python, script) == ("python", "jobs/train.py")
    path = arguments[arguments.index("--config") + 1]
    mount = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"][1]
    assert Path(path).parent == Path(mount["mountPath"])
    local = tmp_path / Path(path).name
    local.write_text(find(documents, "ConfigMap", "mtc-run")["data"][local.name])
    config, _ = parse_command_line([str(local) if a == path else a for a in arguments], "train")
    assert config.output.root == storage
    assert config.output.run_id

    from serve.settings import Settings

    deployed = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = deployed.applications
    assert application.import_path == "serve.app:build"
    settings = Settings.model_validate(application.args)
    assert settings.run == f"{storage}/latest"
    assert settings.api_keys_file is not None  # the service refuses to listen to others without
    cluster = service["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        (keys,) = [mount["mountPath"] for mount in mounts if mount["name"] == "keys"]
        assert Path(settings.api_keys_file).parent == Path(keys)
