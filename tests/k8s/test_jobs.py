"""The job and the check before it: what they run, how a job ends, what is printed of it, and the job in a queue."""

import copy
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from kustomize import OVERLAYS, cluster_of, find, pods, requested, with_components

import cluster.checks
from cluster.node_list import read_nodes
from jobs.check import check_run
from jobs.command_line import parse_command_line
from mtc.language_model import ModelInfo

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)
OPTIONS = ["--config", "/etc/mtc/run.yaml", "--output.root", "$MTC_STORAGE"]
NODES = ["--nodes", "/etc/mtc/nodes.yaml"]
GEMMA = ModelInfo("gemma2", 26, 2304, 8192, 256_000, 9216, 8, 2048, 1024, True)


@every_overlay
def test_job_and_check_read_the_mounted_run(overlay: str) -> None:
    job = shlex.split(find(overlay, "RayJob")["spec"]["entrypoint"])
    assert job[: 2 + len(OPTIONS)] == ["python", "jobs/train.py", *OPTIONS]
    check = find(overlay, "Job")["spec"]["template"]["spec"]
    (container,) = check["containers"]
    assert shlex.split(container["args"][0]) == ["exec", "python", "jobs/check.py", *OPTIONS, *NODES]
    for pod in (next(pods(overlay, "RayJob")).container, container):
        (mount,) = [m for m in pod["volumeMounts"] if m["name"] == "run"]
        assert mount["mountPath"] == "/etc/mtc"
    assert set(find(overlay, "ConfigMap", "mtc-run")["data"]) == {"run.yaml", "nodes.yaml"}


@every_overlay
def test_the_check_finds_no_fault_with_the_run_on_the_pods_of_the_job(
    overlay: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its own pod has 4 GiB and no GPU: it plans for those that are listed, with which the job starts."""
    files = {name: tmp_path / name for name in ("run.yaml", "nodes.yaml")}
    for name, path in files.items():
        path.write_text(find(overlay, "ConfigMap", "mtc-run")["data"][name])
    wanted = []
    for pod in pods(overlay, "RayJob"):
        cpus, memory, gpus = (requested(pod.container, name) for name in ("cpu", "memory", "nvidia.com/gpu"))
        wanted += [(cpus, memory, gpus, pod.is_head)] * (1 if pod.is_head else pod.group["minReplicas"])
    listed = read_nodes(str(files["nodes.yaml"]))
    assert [(node.cpus, node.memory + node.object_store, node.gpus, node.is_head) for node in listed] == wanted
    config = parse_command_line(["--config", str(files["run.yaml"]), "--output.root", str(tmp_path)], "")[0]
    if config.model.name == "google/gemma-2-2b":  # it and its text are on the hub
        monkeypatch.setattr(cluster.checks, "check_model", lambda *_: GEMMA)
        monkeypatch.setattr(cluster.checks, "check_data", lambda *_: None)
    found = check_run(config, str(files["nodes.yaml"]))
    gpus = sum(gpus for *_, gpus, _ in wanted)
    assert found.problems == [] and found.memory and found.plan
    assert f" {gpus:g} GPUs, on {'cuda' if gpus else 'cpu'}" in found.plan.splitlines()[0]


@every_overlay
def test_the_check_is_the_jobs_pod_without_ray(overlay: str) -> None:
    """What it finds on one CPU holds where the job runs: the same environment, places and rights."""
    head = next(pods(overlay, "RayJob"))
    check = copy.deepcopy(find(overlay, "Job")["spec"]["template"]["spec"])
    (container,) = check["containers"]
    assert container["image"] == head.container["image"] and "gpu" not in str(container["resources"])
    assert container["envFrom"] == head.container["envFrom"]
    assert container["env"] == [v for v in head.container["env"] if v["name"] == "HF_TOKEN"]
    assert container["securityContext"] == head.container["securityContext"]
    for field in ("securityContext", "automountServiceAccountToken", "enableServiceLinks"):
        assert check[field] == head.spec[field]
    volumes = {volume["name"]: volume for volume in head.spec["volumes"]}
    assert all(volume == volumes[volume["name"]] for volume in check["volumes"])
    mounts = {mount["name"]: mount for mount in head.container["volumeMounts"]}
    assert container["volumeMounts"] == [mounts[volume["name"]] for volume in check["volumes"]]


@pytest.mark.parametrize(("code", "job"), [(0, 0), (1, 1), (2, 2), (3, 0), (130, 130)])
def test_a_run_that_was_finished_before_is_no_failure(code: int, job: int, tmp_path: Path) -> None:
    """The entrypoint, by the shell that Ray gives it to, with a `python` that ends with a code of jobs/train.py."""
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MTC_STORAGE": "s3://a b/runs"}
    entrypoint = find("prod", "RayJob")["spec"]["entrypoint"]
    done = subprocess.run(["/bin/sh", "-c", entrypoint], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (job, "")
    assert done.stdout == "jobs/train.py --config /etc/mtc/run.yaml --output.root s3://a b/runs\n"


@every_overlay
def test_however_a_job_ends_its_cluster_goes(overlay: str) -> None:
    """Statuses with which KubeRay 1.7 ends a RayJob: rayjob_controller.go and apis/ray/v1/rayjob_types.go."""
    rules = [rule["condition"] for rule in find(overlay, "RayJob")["spec"]["deletionStrategy"]["deletionRules"]]
    ends = [
        ("SUCCEEDED", "Complete"),
        ("STOPPED", "Complete"),  # ray job stop
        ("FAILED", "Failed"),
        ("RUNNING", "Failed"),  # a deadline, or a head that did not answer
        ("", "Failed"),  # no nodes
    ]
    for job, deployment in ends:
        assert [r for r in rules if r.get("jobStatus") == job or r.get("jobDeploymentStatus") == deployment], (job,)


def test_what_drivers_write_is_printed(tmp_path: Path) -> None:
    """The container's script on files such as Ray writes: one job's, another's that comes later, no other file."""
    head = next(pods("gpu", "RayCluster"))
    (logs,) = head.spec["containers"][1:]
    assert {"name": "ray-logs", "mountPath": "/tmp/ray", "readOnly": True} in logs["volumeMounts"]
    assert [m["mountPath"] for m in head.container["volumeMounts"] if m["name"] == "ray-logs"] == ["/tmp/ray"]
    directory = tmp_path / "session_2026-01-02_03-04-05_6_7" / "logs"
    directory.mkdir(parents=True)
    (directory / "raylet.out").write_text("not this\n")
    with (directory / "job-driver-a-1.log").open("w", buffering=1) as first:
        first.write('{"event": "run"}\n')
        script = logs["args"][0].replace("/tmp/ray", str(tmp_path))
        process = subprocess.Popen(
            [*logs["command"], script], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout
        try:
            assert process.stdout.readline() == '{"event": "run"}\n'
            first.write('{"event": "plan"}\n')
            assert process.stdout.readline() == '{"event": "plan"}\n'
            (directory / "job-driver-b-2.log").write_text("another\n")
            assert process.stdout.readline() == "another\n"
        finally:
            process.terminate()
            code = process.wait(timeout=30)
            os.killpg(process.pid, signal.SIGKILL)  # its tails, which a container's end takes along
    assert code == 0, "it ends when its pod is asked to"


def test_a_job_in_kueues_queue() -> None:
    """By KubeRay's validation, which `validate` follows, and Kueue's webhooks for RayJobs and their clusters."""
    (job,) = [d for d in with_components("prod/train", "kueue") if d["kind"] == "RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "mtc"
    assert "suspend" not in job["spec"], "the webhook's: applied again, it would stop a job that runs"
    assert job["spec"]["shutdownAfterJobFinishes"] is True and "clusterSelector" not in job["spec"]
    cluster = cluster_of(job)
    assert cluster["enableInTreeAutoscaling"] is False
    groups = cluster["workerGroupSpecs"]
    assert len(groups) <= 7 and "head" not in {group["groupName"] for group in groups}
    assert all(group["minReplicas"] == group["maxReplicas"] >= 1 for group in groups), "nobody adds nodes"
    head = cluster["headGroupSpec"]["template"]["spec"]
    assert head["serviceAccountName"] == "mtc" and not [v for v in head["volumes"] if "projected" in v]


def test_the_services_pods_come_before_trainings() -> None:
    found = with_components("prod/all", "priority")
    classes = {d["metadata"]["name"]: d for d in found if d["kind"] == "PriorityClass"}
    assert classes["mtc-serving"]["value"] > classes["mtc-training"]["value"] > 0
    assert classes["mtc-training"]["preemptionPolicy"] == "Never"
    for kind, wanted in (("RayJob", "mtc-training"), ("RayService", "mtc-serving")):
        (document,) = [d for d in found if d["kind"] == kind]
        cluster = cluster_of(document)
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            assert group["template"]["spec"]["priorityClassName"] == wanted


def test_every_account_may_pull() -> None:
    accounts = [d for d in with_components("prod/all", "pull-secret") if d["kind"] == "ServiceAccount"]
    used = {pod.spec["serviceAccountName"] for pod in pods("prod")}
    assert {a["metadata"]["name"] for a in accounts} == used
    assert all(account["imagePullSecrets"] == [{"name": "mtc-registry"}] for account in accounts)
