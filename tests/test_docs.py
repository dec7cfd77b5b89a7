"""The documentation: it builds without a warning, loads nothing from elsewhere, its references are whole, and what it
names exists: commands, options, files, links, figures."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from chromium import NAMES, browser, find

from benchmarks import memory, plans, sizing, targets
from jobs.command_line import parse_command_line
from mtc.command import COMMANDS
from mtc.config import LayerConfig, RunConfig, load_preset, preset_names
from serve.contract import Settings
from serve.http import ROUTES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OUTSIDE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "k8s/README.md")]
PAGES = [*OUTSIDE, *sorted(DOCS.rglob("*.md"))]
RESULTS = DOCS / "benchmarks"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
ids = [str(page.relative_to(ROOT)) for page in PAGES]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


class Tags(HTMLParser):
    """Ids, and what a browser would load."""

    def __init__(self, page: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        if "id" in found:
            self.ids.add(found["id"])
        name = "href" if tag == "link" else "data" if tag == "object" else "src"
        if tag in ("link", "script", "img", "iframe", "object", "source", "video") and name in found:
            self.loaded.add(found[name])


def read(page: Path) -> str:
    return page.read_text()


def code_of(page: Path) -> str:
    """Everything that is code on a page: blocks, and spans between backticks."""
    text = read(page)
    blocks = [match[3] for match in FENCE.finditer(text)]
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return "\n".join([*blocks, *spans]).replace("\\\n", " ")


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


# The site ------------------------------------------------------------------------------------------------------------


def test_every_page_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        outside = [url for url in Tags(page).loaded if re.match(r"(https?:)?//", url)]
        assert outside == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", style.read_text()), style


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(url: str, scheme: str) -> None:
    path = find()
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    with browser(path) as tab:
        for page, width in (("concepts/", 1280), ("configuration/", 390), ("api/training/", 1280)):
            tab.open(url + page, width, 900, scheme)
            requests = [e["request"]["url"] for method, e in tab.events if method == "Network.requestWillBeSent"]
            assert requests and all(each.startswith((url, "data:")) for each in requests)
            assert not [e for e in tab.events if e[0] in ("Runtime.exceptionThrown", "Log.entryAdded")]
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            assert tab.evaluate("document.body.dataset.mdColorScheme") == {"light": "default", "dark": "slate"}[scheme]
            broken = "[...document.images].filter((i) => !i.complete || !i.naturalWidth).map((i) => i.src)"
            assert tab.evaluate(broken) == []


def test_configuration_reference_has_every_field(site: Path) -> None:
    page = site / "configuration" / "index.html"
    found, text = Tags(page).ids, page.read_text()
    fields = {f"{part}.{name}": field for part, model in parts().items() for name, field in model.model_fields.items()}
    assert len(fields) > 70
    fields |= LayerConfig.model_fields | Settings.model_fields | {"sweep": RunConfig.model_fields["sweep"]}
    for name, field in fields.items():
        assert name in found, name
        assert field.description, name
        words = re.findall(r"[A-Za-z]{4,}", field.description)
        assert all(word in text for word in words), name
    for name in preset_names():
        assert name in found


def test_http_reference_has_every_route(site: Path) -> None:
    page = (site / "http" / "index.html").read_text()
    for method, path in ROUTES:
        assert f"<code>{method} {path.replace(':path', '')}</code>" in page
    sys.path.insert(0, str(DOCS / "hooks"))
    try:
        import http_reference
    finally:
        sys.path.pop(0)
    document, anchors = http_reference.openapi(), Tags(site / "http" / "index.html").ids
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert "-".join(re.findall(r"\w+", f"{method} {path}".lower())).replace("_", "-") in anchors
            assert operation["description"].split("\n")[0].split("`")[0] in page
    for name, schema in document["components"]["schemas"].items():
        assert name.lower() in anchors
        for field in schema.get("properties", {}):
            assert f"<code>{field}</code>" in page


def test_python_reference_names_modules_that_exist(site: Path) -> None:
    listed = [name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: ([\w.]+)$", read(page), re.M)]
    assert len(listed) == len(set(listed)) > 30
    anchors = {page.parent.name: Tags(page).ids for page in (site / "api").glob("*/index.html")}
    for name in listed:
        assert find_spec(name), name
        page = next(p for p in (DOCS / "api").glob("*.md") if f"::: {name}\n" in read(p) + "\n")
        assert name in anchors[page.stem]
    built = (site / "api" / "run" / "index.html").read_text()
    assert "mtc.storage.addresses.open_run" in built
    assert "Raises" in built


# What pages name -----------------------------------------------------------------------------------------------------


def parts() -> dict[str, Any]:
    return {name: field.annotation for name, field in RunConfig.model_fields.items() if name != "sweep"}


def modules_named(code: str) -> set[str]:
    return set(re.findall(r"python3? -m ([\w.]+)", code))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_exist(page: Path) -> None:
    code = code_of(page)
    for name in modules_named(code):
        assert find_spec(name.rstrip(".")), f"python -m {name}"
    for name in re.findall(r"\bpython3? ([\w/.-]+\.py)\b", code):
        assert (ROOT / name).is_file(), name
    targets = set(re.findall(r"^([\w.-]+):", read(ROOT / "Makefile"), re.M)) | {".venv/.installed-test"}
    targets |= {".venv/.installed"}
    for name in re.findall(r"(?:^|[;&`] *)make ([\w./-]+)", code, re.M):
        assert name in targets, f"make {name}"
    for name in re.findall(r"^bash ([\w/.-]+)|^sbatch .*?([\w/.-]+\.sbatch)", code, re.M):
        assert (ROOT / "".join(name)).is_file()


PROGRAM = re.compile(r"python3? (?:-m ((?:benchmarks|jobs|serve)\.\w+)|(jobs/\w+)\.py)([^`|>;&#\n]*)")
SHARED = "".join(read(ROOT / name) for name in ("jobs/command_line.py", "mtc/telemetry/logs.py"))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_of_programs_exist(page: Path) -> None:
    for module, script, arguments in PROGRAM.findall(code_of(page)):
        source = read(ROOT / f"{(module or script).replace('.', '/')}.py") + SHARED
        for option in re.findall(r"(?<!\S)--([a-z][\w-]*)(?![\w.-])", arguments):
            known = f'"--{option}"' in source or (script == "jobs/train" and option in RunConfig.model_fields)
            assert known, f"{module or script} --{option}"


BY_NAME = re.compile(r"(?:^(?:\$ )?(?:[A-Z_]+=\S+ )*|-- |\$\()mtc ([a-z]+)((?: [^`|>;&#\n]*)?)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_of_the_command_exist(page: Path) -> None:
    for name, arguments in BY_NAME.findall(code_of(page)):
        assert name in COMMANDS, f"mtc {name}"
        module = COMMANDS[name][0]
        source = read(ROOT / f"{module.replace('.', '/')}.py") + SHARED
        for option in re.findall(r"(?<!\S)--([a-z][\w-]*)(?![\w.-])", arguments):
            known = f'"--{option}"' in source or (name in ("train", "check") and option in RunConfig.model_fields)
            assert known, f"mtc {name} --{option}"


def test_commands_of_mtc_are_found() -> None:
    assert sum(len(BY_NAME.findall(code_of(page))) for page in PAGES) > 15


OTHER_PROGRAMS = ("config", "storage", "web")
"""First words of Prometheus' options."""


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_and_fields_exist(page: Path) -> None:
    code, known = code_of(page), parts()
    options = re.findall(r"--([a-z]+)\.(\w+)", code)
    spans = re.findall(r"(?<![\w./-])([a-z]+)\.(\w+)(?![\w(./])", "\n".join(re.findall(r"`([^`\n]+)`", read(page))))
    files = {"py", "md", "json", "jsonl", "yaml", "yml", "parquet", "html", "safetensors", "txt", "npz", "c", "sbatch"}
    for part, name in options:
        if (part, name) != ("part", "field") and part not in OTHER_PROGRAMS:
            assert part in known and name in known[part].model_fields, f"--{part}.{name}"
    for part, name in spans:
        module = part == "cluster" and (ROOT / "cluster" / f"{name}.py").exists()
        if part in known and name not in files and not module:
            assert name in known[part].model_fields or hasattr(known[part], name), f"{part}.{name}"
    for name in re.findall(r"--set (\w+)=", code):
        assert name == "NAME" or name in Settings.model_fields, name


def commands(page: Path) -> list[list[str]]:
    """Whole commands of jobs/train.py in the page's blocks, as lists of arguments."""
    found = []
    for block in (match[3] for match in FENCE.finditer(read(page))):
        for line in block.replace("\\\n", " ").splitlines():
            if "jobs/train.py" in line and "..." not in line and not line.startswith(("$", "#", " ")):
                rest = re.split(r"[>;]", line.split("jobs/train.py", 1)[1])[0]
                inside = rest.count("'") % 2  # of sh -c '...'
                found.append(shlex.split(rest.rstrip("'") if inside else rest, comments=True))
    return found


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_train_commands_are_valid(page: Path) -> None:
    for words in commands(page):
        if "--preset" in words:
            config, _ = parse_command_line(words, "")
            assert config.total_steps > 0


def test_train_commands_are_found() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20


PATHS = re.compile(r"^(?:mtc|cluster|jobs|serve|k8s|tests|docs|benchmarks|\.github|\.ci)/[\w./-]*$")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_exist(page: Path) -> None:
    text = FENCE.sub("", read(page))
    for path in re.findall(r"`([^`\n ]+)`", text):
        if PATHS.match(path):
            assert (ROOT / path).exists() or (page.parent / path).exists(), path
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in read(test) for test in (ROOT / "tests").rglob("test_*.py")), name


def slug(heading: str) -> str:
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r" ", "-", re.sub(r"[^\w\- ]", "", plain.strip().lower()))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_work_in_the_repository(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "``", FENCE.sub("", read(page)))
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if re.match(r"[a-z]+:", link):
            assert not re.match(r"https?://(127\.0\.0\.1|localhost)", link) or page.parent != ROOT
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        assert path.is_relative_to(ROOT)
        if anchor and "<!-- generated" not in read(path):
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.+)$", read(path), re.M)}, link


def test_supported_architectures_are_listed() -> None:
    from mtc.language_model import MODULES

    rows = re.findall(r"^\| `(\w+)` \|.*\| `([\w.]+)` \| `(\w+)` \| `(\w+)` \|$", read(DOCS / "architectures.md"), re.M)
    assert {row[0]: row[1:] for row in rows} == {
        name: (modules.layers, modules.norm, modules.mlp_out) for name, modules in MODULES.items()
    }


@pytest.mark.parametrize("path", sorted((DOCS / "examples").iterdir()), ids=lambda path: path.name)
def test_examples_are_shown_and_parse(path: Path) -> None:
    assert f"<!-- generated: examples/{path.name} -->" in read(DOCS / "cluster.md")
    text = read(path)
    if path.suffix == ".yml":
        (rules,) = yaml.safe_load(text)["rule_files"]
        assert (path.parent / rules).resolve() == ROOT / "k8s" / "monitoring" / "rules.yaml"
        return
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RAY_AUTH_MODE=token" in text
    for option in re.findall(r"--([a-z]+)\.(\w+)", text):
        assert option[1] in parts()[option[0]].model_fields


# Figures -------------------------------------------------------------------------------------------------------------


def test_train_step_page_has_the_measured_figures() -> None:
    page = read(DOCS / "train_step.md")
    found = results("train_step")
    for row in found["all"]:
        ratio = f"{row['ratio']:.2f} [{row['lower_quartile']:.2f}, {row['upper_quartile']:.2f}]"
        start = f"| {row['contender']} | {row['features']:,} | {row['batch']:,} | {row['dead']} | {ratio} |"
        assert f"{start} {row['milliseconds']:.0f} | {row['peak_extra_ratio']:.2f} |" in page
    readme = flat(ROOT / "README.md")
    assert f"costs {found['ratio_fp32']:.2f} times the one dense product" in readme
    assert f"SAELens needs {found['peers']['sae-lens']['ratio']:.1f}" in readme
    assert f"ours costs {found['ratio_by_dictionary']['65536']:.2f} times" in readme


@pytest.mark.parametrize("name", sorted(file.stem for file in (DOCS / "benchmarks").glob("quality-*.json")))
def test_quality_page_has_the_measured_figures(name: str) -> None:
    page, rows = read(DOCS / "quality.md"), 0
    for task in results(name)["tasks"].values():
        for result in task["results"]:
            means = result["means"]
            fvu = " / ".join(f"{value:.3f}" for value in means["fvu"])
            figures = f"{fvu} | {means['l0']:.2f} | {100 * means['dead']:.1f} % | {means['seconds']:.0f} |"
            assert f"| {result['contender']} | {result['lr']:g} | {figures}" in page
            rows += 1
    assert rows >= 4


def test_quality_page_has_the_ratios_and_verdicts() -> None:
    tasks = ("smollm2", "smollm2-layer9", "smollm2-layer11", "gemma3")
    ratios = {name: results(f"quality-{name}")["tasks"][name]["figures"] for name in tasks}
    page = read(DOCS / "quality.md")
    for figure, about in targets.describe(ratios).items():
        cells = [targets.shown(about["tasks"][name]) for name in tasks]
        assert f"| {' | '.join(cells)} | {targets.shown(about['target'])} | {targets.verdict(about)} |" in page, figure


def flat(page: Path) -> str:
    return " ".join(read(page).split())


def test_other_pages_have_the_measured_figures() -> None:
    stream, page = results("stream"), flat(DOCS / "stream.md")
    speed = stream["capture"]["capture_tokens_per_second"]
    gigabytes = stream["transport"]["transport_gigabytes_per_second"]
    for text in (
        f"| ours | {speed['ours, paragraphs']:.0f} | {speed['ours, full windows']:.0f} |",
        f"{stream['capture']['capture_vs_transformers']:.2f} times plain transformers on texts of different lengths",
        f"{gigabytes['views']:.2f} GB/s handed over as views, {gigabytes['copied']:.2f} GB/s copied into a buffer",
        f"and {stream['overlap']['overlap_seconds']['runs'][1]:.1f} s: {stream['overlap']['overlap']:.2f}",
    ):
        assert text in page
    sweep, page = results("sweep"), flat(DOCS / "sweep.md")
    rounds = {1: "one round"}.get(sweep["rounds"], f"{sweep['rounds']} rounds")
    for text in (
        f"their wall times: {sweep['wall_ratio']:.2f}, from {rounds}, {sweep['sweep_s']:.0f} s against "
        f"{sweep['one_s']:.0f} s",
        f"(training {sweep['sweep_train_s']:.0f} s and {sweep['one_train_s']:.0f} s, held-out passes and reports "
        f"{sweep['sweep_analyse_s']:.0f} s and {sweep['one_analyse_s']:.0f} s;",
        f"adds {(sweep['sweep_s'] - sweep['one_s']) / (sweep['transcoders'] - 1):.0f} s",
    ):
        assert text in page
    recovery, page = results("recovery"), flat(DOCS / "reliability.md")
    for text in (
        f"{recovery['checkpoint_bytes'] / 1e6:.0f} MB | holds training for {recovery['checkpoint_held_s']:.2f} s",
        f"a model actor killed: time without a new step | {recovery['actor_recovery_s']:.1f} s",
        f"a trainer killed: time without a new step | {recovery['trainer_recovery_s']:.0f} s",
    ):
        assert text in page
    analysis, page = results("analysis"), flat(DOCS / "analysis.md")
    assert f"takes {analysis['pass_ratio']:.2f} times the language model's own pass" in page
    assert f"{analysis['driver_peak_tokens']:,} tokens took {analysis['whole_s']:.0f} s" in page
    serve, page = results("serve"), flat(DOCS / "serving.md")
    assert f"| {serve['added_p50_ms']:.1f} ms | 3 ms |" in page and serve["added_p50_ms"] <= 3
    overload, alone = serve["overload_goodput_ratios"], results("serve-one-thread")
    row = f"{serve['overload_goodput_ratio']:.2f} ({min(overload):.2f} to {max(overload):.2f} in five rounds)"
    assert f"over the closed loop | {row} | 0.95, missed |" in page and serve["overload_goodput_ratio"] < 0.95
    overload, each = alone["overload_goodput_ratios"], ("single_tokens_per_s", "overload_tokens_per_s")
    assert f"{alone['overload_goodput_ratio']:.2f} ({min(overload):.2f} to {max(overload):.2f} in three rounds" in page
    rates = ["{:,.0f} and {:,.0f}".format(*(found[name] for name in each)) for found in (alone, serve)]
    assert f"{rates[0]} tokens/s; with two threads {rates[1]}" in page and alone["threads"] == 1 < serve["threads"]
    assert f"`added_p99_ms`, of two 99th percentiles of about 60 ms | {serve['added_p99_ms']:.1f} ms" in page
    assert f"429 then, at most | {serve['refused_max_ms']:.0f} ms" in page
    assert f"`/healthz` then, at most | {serve['healthz_max_ms']:.0f} ms" in page
    assert f"over offline batches | {serve['throughput_ratio']:.2f} " in page
    low, high = min(serve["recoveries"]), max(serve["recoveries"])
    assert f"until the next answer | {serve['recovery_s']:.1f} s ({low:.1f} to {high:.1f})" in page


def test_generated_pages_hold_no_figures_of_their_own() -> None:
    """Whatever is measured comes from the files: on these pages no table is written by hand that has decimals."""
    for name in ("benchmarks.md", "sizing.md"):
        rows = [line for line in read(DOCS / name).splitlines() if line.startswith("|")]
        assert not [row for row in rows if re.search(r"\d\.\d", row)]


# Sizing --------------------------------------------------------------------------------------------------------------


def test_operations_of_the_reference_run_by_hand() -> None:
    shape = sizing.SHAPES["google/gemma-2-2b"]
    attention = 2304 * 2048 + 2 * 2304 * 1024 + 2048 * 2304  # q, k and v, o
    mlp = 3 * 2304 * 9216
    assert sizing.layer_weights(shape) == attention + mlp == 77_856_768
    pairs = sum(4 * 8 * 256 * position for position in range(1, 65)) / 64  # each token and those before it
    assert sizing.forward_operations(shape, 18, 64) == pytest.approx(18 * (2 * (attention + mlp) + pairs))
    work = sizing.work_of(load_preset("gemma-2-2b-layer17"))
    assert work.stream_bytes == 9216
    assert (work.trained, work.actors) == (pytest.approx(1024 / 2.5e-3), 6)
    assert work.forward == pytest.approx(2.852e9, rel=1e-3)
    several = {"model": {"layers": [5, 17]}}
    two = sizing.work_of(load_preset("gemma-2-2b-layer17", several))
    assert (two.forward, two.trained, two.stream_bytes) == (work.forward, work.trained / 2, 2 * work.stream_bytes)


def test_predictions_by_hand() -> None:
    work = sizing.Work(forward=2e9, trained=1e6, actors=3, stream_bytes=1e4)
    one = sizing.predict(work, 1, 1e15, 0.4, stream=1e12)
    assert one.tokens_per_second == pytest.approx(1 / (2e9 / 4e14 + 1e-6))
    assert one.limit == "GPU"
    eight = sizing.predict(work, 8, 1e15, 0.4, stream=1e12)
    assert (eight.limit, eight.tokens_per_second) == ("model actors", pytest.approx(3 * 4e14 / 2e9))
    fast = sizing.predict(work._replace(actors=6), 8, 1e15, 0.4, stream=1e12)
    assert (fast.limit, fast.tokens_per_second) == ("trainer", 1e6)
    two = sizing.predict(work, 2, 1e15, 0.4, stream=1e12)
    assert (two.limit, two.tokens_per_second) == ("model actors", pytest.approx(4e14 / 2e9))
    slow = sizing.predict(work, 8, 1e15, 0.4, stream=1e9)
    assert (slow.limit, slow.tokens_per_second, slow.stream_gigabytes) == ("stream", 1e5, 1.0)
    assert slow.hours(3.6e9) == pytest.approx(10)
    assert slow.gpu_hours(3.6e9) == pytest.approx(80)
    assert slow.cost(3.6e9, 2.5) == pytest.approx(200)
    assert sizing.gpus_for(3.6e9, 1, work, 1e12, 0.5) == 4000
    assert sizing.gpus_for(3.6e9 + 1, 1, work, 1e12, 0.5) == 4001
    assert sizing.token_store_bytes(63, 64) == 256


def test_predictions_against_measurements() -> None:
    """How far off the formulas are, which docs/sizing.md says."""
    found = {check.name: check for check in sizing.checks()}
    limits = {
        "operations of a position, SmolLM2, 10 layers": (0.99, 1.01),
        "forward passes of the quickstart's run": (0.9, 1.1),
        "train steps of the quickstart's run": (2, 5),
        "stream of the quickstart's run": (0.8, 1.0),
        "capture at layer 20, windows of 128": (0.8, 1.3),
        "checkpoint of the reference shape": (0.999, 1.001),
    }
    assert set(found) == set(limits)
    for name, (least, most) in limits.items():
        assert least <= found[name].ratio <= most, found[name]


def test_counted_memory_against_measurements() -> None:
    """Of no process too little by more than a fifth, nor too much by more than a half."""
    found = memory.ratios()
    assert {each.kind for each in found} > {"trainer", "driver", "model actor, training", "node"}
    assert [each for each in found if not 0.8 <= each.ratio <= 1.5] == []


def test_plans_of_machines_say_what_is_refused() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in plans.table().splitlines()[2:]]
    assert len(rows) == len(plans.MACHINES) * len(plans.RUNS)
    verdicts = {run: [row[5] for row in rows if row[1] == run] for run in plans.RUNS}
    assert verdicts["1 x 4,608 (the preset)"] == ["fits"] * len(plans.MACHINES)
    assert all(verdict.startswith("refused: ") for verdict in verdicts["26 x 65,536"])
    for _, _, _, gpu, main, verdict in rows:
        sizes = [re.findall(r"[\d,.]+", cell) for cell in (gpu, main) if cell != "-"]
        assert (verdict == "fits") == all(float(needed) <= float(has) for needed, has in sizes)


def test_sizing_says_what_is_not_measured(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizing.main(["--price", "2", "--gpus", "1", "--tokens", "15000000"])
    printed = capsys.readouterr().out
    assert "not measured" in printed.splitlines()[0]
    cells = [cell.strip() for cell in printed.splitlines()[-1].strip("|").split("|")]
    assert float(cells[-1]) == pytest.approx(2 * float(cells[-2]), abs=0.01)
    page = (site / "sizing" / "index.html").read_text()
    table = page.index("GPU-hours</th>")
    assert page.rindex("Not measured", 0, table) > 0
    for tokens in sizing.TOKENS:
        assert f"<td>{tokens:,}</td>" in page
