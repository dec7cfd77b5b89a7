"""Everything that runs on GPUs, on a real `ray start --head` that believes in three of them.

The processes run on the CPU what is written for a GPU (mtc.devices.PRETENDING): the plan, Ray's and Ray Train's rules
for processes with GPUs, streams and uploads, the choice of entries without the host, two trainers. What only CUDA can
tell is in benchmarks/gpu.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mtc.analysis.recompute import evaluate
from mtc.language_model import LanguageModel, load_tokenizer, pack_windows
from mtc.storage import Progress, open_run
from mtc.text import TokenStore, heldout_units
from mtc.transcoder import load_transcoder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TINY = {"--preset": "tiny", "--model.dtype": "float32", "--model.compile": "false"}


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    from jobs import quickstart

    original, before = quickstart.STATE, dict(os.environ)
    quickstart.STATE = tmp_path_factory.mktemp("gpu-head") / "state" / "head.json"
    resources = {"CPU": 4, "GPU": 3}
    os.environ.update(MTC_PRETEND_GPU="1", RAY_OVERRIDE_RESOURCES=json.dumps(resources))
    try:
        head = quickstart.start_head()
        os.environ.pop("RAY_OVERRIDE_RESOURCES")
        yield head
    finally:
        quickstart.stop_head()
        quickstart.STATE = original
        os.environ.clear()
        os.environ.update(before)


def gpus_in_use(head):
    code = "import ray; ray.init(address='auto', log_to_driver=False, logging_level='ERROR'); "
    code += "print(ray.cluster_resources()['GPU'] - ray.available_resources().get('GPU', 0))"
    environment = os.environ | {"RAY_ADDRESS": head["address"]}
    return float(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def run(head, tmp_path_factory):
    """Two trainers and a number of work units that they can't share equally, so that one is dealt a placeholder."""
    from jobs import quickstart

    root = tmp_path_factory.mktemp("gpu-runs")
    options = TINY | {"--cluster.num_trainers": "2", "--output.root": str(root), "--output.run_id": "gpu"}
    quickstart.submit_job(head, "gpu", [word for pair in options.items() for word in pair])
    return open_run(str(root / "latest"))


def test_the_whole_pipeline_runs_on_a_ray_that_believes_in_gpus(run):
    facts = json.loads(run.read("analysis.json"))["facts"]
    assert facts["devices"] == ["cuda"]
    assert facts["num_trainers"] == 2
    kinds = [event["kind"] for event in facts["events"]]
    assert not {"failure", "restart"} & set(kinds), facts["events"]
    assert facts["compute"].startswith("sparse on cpu (auto: no step was measured on cpu")
    assert facts["language_model_compute"] == ["eager (model.compile=false)"]
    progress = Progress(pq.read_table(f"{run.url}/ledger.parquet"))
    units = progress.finished()
    assert not len(progress.wrong_units())
    ranks = np.bincount(units % 2)
    assert ranks[0] != ranks[1], "this run should deal a placeholder"


def test_cpus_find_the_same_figures_of_what_it_learnt(run):
    config, analysis = run.config(), json.loads(run.read("analysis.json"))
    store = TokenStore.open(analysis["facts"]["token_store"])
    units = [
        pack_windows(store.input_ids(unit), store.info.special_ids)
        for unit in heldout_units(store, config, config.analysis.num_tokens)
    ]
    again = evaluate(config, load_transcoder(run), units, [])
    assert analysis["evaluation"]["fvu"] == pytest.approx(list(again.fvu), rel=1e-4)
    assert again.fvu[-1] < 0.7, "nothing was learnt"
    assert again.l0[-1] == pytest.approx(config.transcoder.k, rel=0.1)


def test_the_service_encodes_on_the_gpu_that_it_was_given(head, run):
    command = [sys.executable, "-m", "serve.app", "--run", run.url, "--address", head["address"]]
    command += ["--port", str(head["http_port"]), "--set", "num_gpus=1"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    base, text = f"http://127.0.0.1:{head['http_port']}", "We the people of the United States"
    answer = httpx.post(f"{base}/encode", json={"inputs": text, "top_k": 4}, timeout=60).json()
    assert gpus_in_use(head) == 1
    config, transcoder = run.config(), load_transcoder(run)
    tokenizer = load_tokenizer(config.model)
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    (pair,) = LanguageModel(config.model).capture(pack_windows([np.array(ids, np.int32)], []))
    with torch.no_grad():
        activations = transcoder.encode(pair.source)
    (result,) = answer["results"]
    for features, row in zip(result["features"][1:], activations[1:], strict=True):
        values = [v for v in row.topk(4).values.tolist() if v > 0]
        assert [f["activation_value"] for f in features] == pytest.approx(values, rel=1e-4)
