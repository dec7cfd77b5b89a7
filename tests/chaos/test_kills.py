"""Twenty kills of mixed kinds over one run that trains each token three times: nothing lost, nothing too often, and the
same transcoder in the end."""

import json
import os
import random
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.faults import TITLES, Job, ray_head
from mtc.storage import open_run
from mtc.text import TokenStore, work_units
from tests.chaos.runs import OPTIONS, none_too_often

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("MTC_CHAOS_SEED", "0"))
KILLS = int(os.environ.get("MTC_CHAOS_KILLS", "20"))
HARMLESS = ("model actor", "metrics log")  # trainers go on
REPLAYS = 3
OPTIONS = [*OPTIONS, "--data.unit_tokens", "1024", "--cluster.max_failures", "3", "--data.replays", str(REPLAYS)]
TOKENS = int(os.environ.get("MTC_CHAOS_TOKENS", "1000000"))  # that are captured


def check_ledger(run, store):
    """Every window of the training units trained, each token as often as asked, by the counts that went through the
    kills."""
    work = work_units(store, run.config())
    progress = none_too_often(run.url)
    assert progress.finished().tolist() == list(range(len(work.training)))
    tokens = {number: REPLAYS * int(store.trainable_tokens(unit).sum()) for number, unit in enumerate(work.training)}
    table = progress.table.to_pydict()
    assert dict(zip(table["unit"], table["trained"], strict=True)) == tokens


@pytest.fixture(scope="module")
def head():
    with ray_head() as head:
        yield head


@pytest.fixture(scope="module")
def undisturbed(head, tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    job = Job(head, root, "whole", [*OPTIONS, "--data.num_tokens", str(TOKENS)])
    job.finish(1200)
    return open_run(str(root / "whole"))


def test_twenty_kills_over_one_run(head, undisturbed, tmp_path):
    dice = random.Random(SEED)
    job = Job(head, tmp_path, "killed", [*OPTIONS, "--data.num_tokens", str(TOKENS)])
    kinds = [*TITLES, "driver"]
    plan = [kinds[i % len(kinds)] for i in range(KILLS)]
    dice.shuffle(plan)
    newest, recoveries = 0, []
    for number, kind in enumerate(plan):
        newest = job.wait_for_checkpoint(newest)
        time.sleep(dice.uniform(0, 3))
        before, start = job.newest(), job.trainers_start()
        moment = time.monotonic()
        if kind == "driver":
            job.kill()
            job.start()
        else:
            head.kill(kind, dice.randrange(8))
        newest = job.wait_for_checkpoint(before) if kind in HARMLESS else job.wait_for_restart(start)
        recoveries.append((kind, round(time.monotonic() - moment, 1)))
        print(number, recoveries[-1], "step", newest, flush=True)
    job.finish(1200)
    run = open_run(str(tmp_path / "killed"))
    store = TokenStore.open(json.loads(run.read("analysis.json"))["facts"]["token_store"])
    check_ledger(run, store)
    assert f" {REPLAYS} times\n" in job.output()
    kinds_seen = Counter(event["kind"] for event in job.events())
    print(kinds_seen)
    assert kinds_seen["resume"] >= plan.count("trainer") + plan.count("driver") + plan.count("train controller")
    whole = json.loads(undisturbed.read("analysis.json"))["evaluation"]["fvu"]
    fvu = json.loads(run.read("analysis.json"))["evaluation"]["fvu"]
    print("fvu", whole, fvu)
    assert fvu == pytest.approx(whole, rel=0.02)
    mine, its = (load_file(f"{r.url}/transcoder.safetensors") for r in (run, undisturbed))
    for name, value in its.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
