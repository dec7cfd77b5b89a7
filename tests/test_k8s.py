"""The Kubernetes manifests: every overlay rendered, checked against closed schemas, and against the code they start."""

import copy
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kustomize import Document, render
from pydantic import ValidationError
from ray_kinds import validate

from cluster.resources import Node, make_plan
from mtc.command_line import parse_command_line
from mtc.config import RunConfig, load_preset
from mtc.runs import open_run
from serve.settings import ENVIRONMENT, Settings

ROOT = Path(__file__).parent.parent
K8S = ROOT / "k8s"
OVERLAYS = {"base": K8S / "base"} | {name: K8S / "overlays" / name for name in ("local", "gpu", "prod")}
RENDERED = {name: render(directory) for name, directory in OVERLAYS.items()}
SPECS = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
GIBI = 1024**3


@pytest.fixture(params=RENDERED)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return copy.deepcopy(RENDERED[request.param])


def find(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def cluster_of(document: Document) -> Document:
    spec: Document = document["spec"]
    for part in SPECS[document["kind"]]:
        spec = spec[part]
    return spec


def clusters(documents: list[Document]) -> Iterator[tuple[Document, Document]]:
    yield from ((d, cluster_of(d)) for d in documents if d["kind"] in SPECS)


def groups(cluster: Document) -> list[Document]:
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def number(quantity: Any) -> float:
    """Kubernetes' quantities, of those that are used here."""
    units = {"m": 1e-3, "Mi": 1024**2, "Gi": GIBI}
    text = str(quantity)
    unit = next((unit for unit in units if text.endswith(unit)), "")
    return float(text.removesuffix(unit)) * units.get(unit, 1)


def test_documents_are_valid(documents: list[Document]) -> None:
    assert {"Namespace", "ServiceAccount", "RayCluster", "RayJob", "RayService"} <= {d["kind"] for d in documents}
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))
    for document in documents:
        validate(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "mtc"


@pytest.mark.skipif(not (shutil.which("kustomize") or shutil.which("kubectl")), reason="no kustomize, no kubectl")
@pytest.mark.parametrize("name", OVERLAYS)
def test_kustomize_renders_the_same(name: str) -> None:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    printed = subprocess.run([*command, str(OVERLAYS[name])], capture_output=True, text=True, check=True).stdout

    def in_order(documents: list[Document]) -> list[Document]:
        return sorted(documents, key=lambda d: json.dumps([d["kind"], d["metadata"]["name"]]))

    for theirs, ours in zip(in_order(list(yaml.safe_load_all(printed))), in_order(RENDERED[name]), strict=True):
        theirs["metadata"].pop("annotations", None)  # kustomize's own, of a replaced ConfigMap
        assert theirs == ours


MISTAKES: list[tuple[str, str, Any, str]] = [
    ("RayJob", "spec.entryPoint", "python x.py", "entryPoint"),
    ("RayJob", "spec.backoffLimit", "2", "valid integer"),
    ("RayJob", "spec.submissionMode", "HttpMode", "HTTPMode"),
    ("RayJob", "spec.shutdownAfterJobFinishes", True, "Extra inputs"),  # KubeRay refuses it beside deletionRules
    ("RayJob", "spec.deletionStrategy.deletionRules.0.condition.jobDeploymentStatus", "Failed", "exactly one"),
    ("RayJob", "spec.rayClusterSpec.rayVersion", "2.59.0", "rayVersion 2.59.0 is not the one"),
    ("RayJob", "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "valid string"),
    ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.replicas", "two", "valid integer"),
    ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0.minReplicas", 9, "is wanted"),
    ("RayCluster", "spec.enableInTreeAutoscaling", "true", "valid boolean"),
    ("RayCluster", "spec.authOptions.mode", "tokens", "token"),
    ("RayCluster", "spec.headGroupSpec.template.spec.containers.0.volumeMount", [], "volumeMount"),
    ("RayCluster", "spec.headGroupSpec.template.spec.containers.0.image", 5, "5 is not of type"),
    ("RayCluster", "spec.headGroupSpec.template.spec.containers.0.securityContext.runAsNonroot", True, "runAsNonroot"),
    ("RayCluster", "spec.headGroupSpec.template.spec.automountServiceAccountToken", "false", "'false' is not of type"),
    ("RayService", "spec.serveConfig", "", "serveConfig"),
    ("RayService", "spec.serveConfigV2", "applications: [{name: mtc, import_pth: x}]", "import_path"),
    ("RayService", "spec.upgradeStrategy.type", "Rolling", "NewCluster"),
    ("PersistentVolumeClaim", "spec.accessMode", ["ReadWriteMany"], "accessMode"),
    ("PersistentVolumeClaim", "spec.accessModes", "ReadWriteMany", "ReadWriteMany"),
    ("PodDisruptionBudget", "spec.maxUnavailable", True, "True is not"),
    ("ServiceAccount", "automountServiceAccountToken", "no", "'no' is not of type"),
]


@pytest.mark.parametrize(("kind", "path", "value", "why"), MISTAKES, ids=[m[1] for m in MISTAKES])
def test_mistakes_are_found(kind: str, path: str, value: Any, why: str) -> None:
    document = copy.deepcopy(next(d for d in RENDERED["gpu"] if d["kind"] == kind))
    validate(document)
    *way, last = path.split(".")
    holder: Any = document
    for part in way:
        holder = holder[int(part)] if isinstance(holder, list) else holder[part]
    holder[last] = value
    with pytest.raises(ValueError, match=why):
        validate(document)


def test_a_password_that_is_written_out_is_refused() -> None:
    cluster = copy.deepcopy(find(RENDERED["prod"], "RayCluster", "mtc"))
    cluster["spec"]["gcsFaultToleranceOptions"]["redisPassword"] = {"value": "secret"}
    with pytest.raises(ValidationError, match="redisPassword"):
        validate(cluster)


def test_pods(documents: list[Document]) -> None:
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    for owner, cluster in clusters(documents):
        component = owner["metadata"]["labels"]["app.kubernetes.io/component"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in groups(cluster):
            template = group["template"]
            labels, pod = template["metadata"]["labels"], template["spec"]
            assert (labels["app.kubernetes.io/name"], labels["app.kubernetes.io/component"]) == ("mtc", component)
            context = pod["securityContext"]
            assert context["runAsNonRoot"] is True and context["runAsUser"] == 1000
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert ("ServiceAccount", pod["serviceAccountName"]) in names
            autoscaled = cluster.get("enableInTreeAutoscaling") and group is cluster["headGroupSpec"]
            assert pod["automountServiceAccountToken"] is bool(autoscaled), "only Ray's autoscaler asks Kubernetes"
            for volume in pod["volumes"]:
                if "configMap" in volume:
                    assert ("ConfigMap", volume["configMap"]["name"]) in names
                elif "secret" in volume:
                    assert volume["secret"]["secretName"] == "mtc-api-keys"
                elif "persistentVolumeClaim" in volume:
                    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
                else:
                    assert volume.keys() == {"name", "emptyDir"}
            (container,) = pod["containers"]
            assert container["image"] == "mtc:0.1.0"
            resources = container["resources"]
            # Ray sizes itself by the limit; the scheduler counts the request.
            assert resources["requests"]["memory"] == resources["limits"]["memory"]
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"name": "RAY_AUTH_MODE", "value": cluster["authOptions"]["mode"]} in container["env"]
            sources = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
            assert {("ConfigMap", name) for name in sources} <= names
            assert ("mtc-serve-environment" in sources) is (component == "serve")
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
            assert {"/tmp", "/dev/shm", "/home/ray"} <= set(mounts.values()), "what a read-only root leaves to write to"


def test_shared_memory_holds_the_object_store_and_fits_into_the_pod(documents: list[Document]) -> None:
    for _, cluster in clusters(documents):
        for group in groups(cluster):
            pod = group["template"]["spec"]
            (shm,) = [v["emptyDir"] for v in pod["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
            store = int(group["rayStartParams"]["object-store-memory"])
            memory = number(pod["containers"][0]["resources"]["limits"]["memory"])
            assert store <= number(shm["sizeLimit"]) <= memory / 2


def test_pods_go_on_longer_than_serve_drains(documents: list[Document]) -> None:
    from ray.serve._private.constants import DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S

    drain = max(
        float(ENVIRONMENT["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"]),
        DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S,
    )
    for group in groups(cluster_of(find(documents, "RayService", "mtc"))):
        pod = group["template"]["spec"]
        shell = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        first, stop = shell.split("; ")
        assert stop == "ray stop"
        assert float(first.removeprefix("sleep ")) + drain < pod["terminationGracePeriodSeconds"]


def test_gpus_are_tolerated_where_they_are_asked_for(documents: list[Document]) -> None:
    for _, cluster in clusters(documents):
        for group in groups(cluster):
            pod = group["template"]["spec"]
            resources = pod["containers"][0]["resources"]
            wants = "nvidia.com/gpu" in resources["limits"]
            assert wants is any(t["key"] == "nvidia.com/gpu" for t in pod.get("tolerations", []))
            assert resources["limits"].get("nvidia.com/gpu") == resources["requests"].get("nvidia.com/gpu")


def test_selectors_find_pods(documents: list[Document]) -> None:
    pods = [g["template"] for _, cluster in clusters(documents) for g in groups(cluster)]
    labels = [pod["metadata"]["labels"] for pod in pods]
    chosen = [c for pod in pods for c in pod["spec"].get("topologySpreadConstraints", [])]
    chosen = [c["labelSelector"] for c in chosen]
    chosen += [d["spec"]["selector"] for d in documents if d["kind"] in ("PodDisruptionBudget", "PodMonitor")]
    chosen += [d["spec"]["podSelector"] for d in documents if d["kind"] == "NetworkPolicy"]
    assert len(chosen) >= 5
    for selector in chosen:
        wanted = selector.get("matchLabels", {}).items()
        assert any(wanted <= each.items() for each in labels), selector


def test_what_prometheus_scrapes_is_a_port_of_a_pod_and_let_in() -> None:
    documents = RENDERED["prod"]
    ports: dict[str, set[int]] = {}
    for _, cluster in clusters(documents):
        for group in groups(cluster):
            for port in group["template"]["spec"]["containers"][0]["ports"]:
                ports.setdefault(port["name"], set()).add(port["containerPort"])
    policy = find(documents, "NetworkPolicy", "mtc-ray")
    (monitoring,) = [rule for rule in policy["spec"]["ingress"] if "monitoring" in json.dumps(rule)]
    open_to_it = {port["port"] for port in monitoring["ports"]}
    endpoints = [e for d in documents if d["kind"] == "PodMonitor" for e in d["spec"]["podMetricsEndpoints"]]
    assert {endpoint["port"] for endpoint in endpoints} == {"metrics", "mtc-metrics", "serve"}
    for endpoint in endpoints:
        assert ports[endpoint["port"]] <= open_to_it
    for name in ("base", "gpu"):
        run = yaml.safe_load(find(RENDERED[name], "ConfigMap", "mtc-run")["data"]["run.yaml"])
        assert ports["mtc-metrics"] == {run["cluster"]["metrics_port"]}


def test_secrets_are_referred_to_and_never_here(documents: list[Document]) -> None:
    assert not [d for d in documents if d["kind"] == "Secret"]
    text = json.dumps(documents)
    for word in ("password", "token", "key"):
        assert f'"{word}": "ey' not in text
    environment = [
        e for _, c in clusters(documents) for g in groups(c) for e in g["template"]["spec"]["containers"][0]["env"]
    ]
    assert {e["name"] for e in environment if "value" in e} == {"RAY_AUTH_MODE"}


def test_service_runs_as_elsewhere(documents: list[Document]) -> None:
    assert find(documents, "ConfigMap", "mtc-serve-environment")["data"] == ENVIRONMENT


def test_the_gpu_run_is_the_reference_preset() -> None:
    run = RunConfig.model_validate(yaml.safe_load(find(RENDERED["gpu"], "ConfigMap", "mtc-run")["data"]["run.yaml"]))
    preset = load_preset("gemma-2-2b-layer17")
    assert run.fingerprint() == preset.fingerprint()
    assert run.output.run_id


def test_runs_fit_the_pods_that_are_there_when_they_start(documents: list[Document]) -> None:
    cluster = cluster_of(find(documents, "RayJob", "mtc-train"))
    config = RunConfig.model_validate(yaml.safe_load(find(documents, "ConfigMap", "mtc-run")["data"]["run.yaml"]))
    nodes = [Node(0, 0, is_head=True, node_id="head")]
    for group in cluster["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        cpus, gpus = number(resources["requests"]["cpu"]), number(resources["limits"].get("nvidia.com/gpu", 0))
        nodes += [Node(cpus, gpus, node_id=f"{group['groupName']}{i}") for i in range(group["minReplicas"])]
    plan = make_plan(config, nodes, 2304)
    assert plan.device == ("cuda" if any(node.gpus for node in nodes) else "cpu")
    assert plan.num_trainers >= 1 and plan.num_model_actors >= 1


def parsed_entrypoint(documents: list[Document], tmp_path: Path) -> tuple[list[str], RunConfig]:
    """The job's arguments, with the mounted configuration at a place of the test's."""
    job = find(documents, "RayJob", "mtc-train")
    storage = find(documents, "ConfigMap", "mtc-storage")["data"]["MTC_STORAGE"]
    python, script, *arguments = shlex.split(job["spec"]["entrypoint"].replace("$MTC_STORAGE", storage))
    assert (python, script) == ("python", "jobs/train.py")
    path = arguments[arguments.index("--config") + 1]
    container = cluster_of(job)["headGroupSpec"]["template"]["spec"]["containers"][0]
    (mount,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "run"]
    assert Path(path).parent == Path(mount)
    local = tmp_path / Path(path).name
    local.write_text(find(documents, "ConfigMap", "mtc-run")["data"][local.name])
    arguments = [str(local) if a == path else a for a in arguments]
    return arguments, parse_command_line(arguments, "train")[0]


def test_job_and_service_agree_with_the_code(documents: list[Document], tmp_path: Path) -> None:
    storage = find(documents, "ConfigMap", "mtc-storage")["data"]["MTC_STORAGE"]
    _, config = parsed_entrypoint(documents, tmp_path)
    assert config.output.root == storage
    assert config.output.run_id
    service = find(documents, "RayService", "mtc")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "serve.app:build"
    settings = Settings.model_validate(application["args"])
    assert settings.run == f"{storage}/latest"
    assert settings.api_keys_file is not None  # the service refuses to listen to others without
    cluster = cluster_of(service)
    for group in groups(cluster):
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        (keys,) = [mount["mountPath"] for mount in mounts if mount["name"] == "keys"]
        assert Path(settings.api_keys_file).parent == Path(keys)
    cpus = sum(
        group["minReplicas"] * number(group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
        for group in cluster["workerGroupSpecs"]
    )
    wanted = settings.num_replicas * settings.num_cpus_encoder
    assert wanted + settings.num_ingress_replicas * settings.num_cpus_ingress <= cpus


def test_the_entrypoint_runs(tmp_path: Path) -> None:
    """As the operator starts it, by a shell with the pod's environment, with a small configuration in the mounted
    file's place and a Ray of its own."""
    documents = RENDERED["local"]
    job = find(documents, "RayJob", "mtc-train")
    environment = dict(find(documents, "ConfigMap", "mtc-storage")["data"])
    for name in ("MTC_CACHE", "HF_HOME", "HOME"):
        environment.pop(name)
    environment |= {
        "MTC_STORAGE": str(tmp_path / "storage" / "runs"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    config = load_preset("tiny", {"output": {"run_id": "from-kubernetes"}, "analysis": {"loss_tokens": 0}})
    mounted = tmp_path / "run.yaml"
    mounted.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    command = job["spec"]["entrypoint"].replace("/etc/mtc/run.yaml", str(mounted))
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "finished"
    assert {event["run_id"] for event in events} == {"from-kubernetes"}
    assert done.stderr == "", "Ray's noise is turned down"
    assert open_run(str(tmp_path / "storage" / "runs" / "latest")).run_id == "from-kubernetes"
