"""Language models on the cluster's own processes, asked for labels: what answers stands in for vLLM, Ray is real."""

import sys
import types
from pathlib import Path

import pytest
from serve_local import make_analysed_run

from cluster import label_engine
from cluster.label_engine import Engines, Settings
from cluster.room import ClusterBusy
from jobs import label as job
from mtc.config import ConfigError
from mtc.labels.endpoint import Answer
from mtc.labels.offline import OfflineModel
from mtc.labels.prompts import Question
from mtc.labels.transport import EndpointDown, EndpointError, Known
from mtc.storage import load_analysis, read_labels
from tests.labels.rules_engine import by_rules


def questions(count, kind="explain"):
    text = 'You name\nBEGIN DATA\n{"active": "a <<money>> b"}\nEND DATA'
    return [Question(kind, feature, text, 20, f"{kind} {feature}") for feature in range(count)]


@pytest.fixture
def small_batches(ray_cluster, monkeypatch) -> None:
    monkeypatch.setattr(label_engine, "BATCH", 4)


def test_all_is_answered_by_all_copies_in_batches(small_batches):
    asked, held = questions(30), []
    known = Known(Question("explain", 99, "", 1, "known"), Answer("old", None, 1, 1))

    def source():
        yield from asked[:3]
        yield known
        for question in asked[3:]:
            while len(held) > 20:  # as a limit of tokens holds questions back
                yield None
            held.append(question)
            yield question

    with Engines(Settings(copies=2, gpus=0), by_rules) as engines:
        found = []
        for question, answer in engines.of("one").answers(source()):
            found.append((question, answer))
            held[:1] = []
        processes = {answer.time for _, answer in found} - {""}
        assert len(processes) == 2
        again = dict(engines.of("one").answers(iter(asked[:8])))
        assert {answer.time for answer in again.values()} <= processes, "the model was loaded once"
        other = dict(engines.of("other").answers(iter(asked[:8])))
        assert not {answer.time for answer in other.values()} & processes, "one model at a time"
    assert sorted(question.feature for question, _ in found) == [*range(30), 99]
    assert {answer.text for _, answer in found} == {"old", '{"label": "the word money"}'}


@pytest.mark.parametrize(
    ("model", "kind", "match"),
    [
        ("unknown", EndpointError, "unknown can't be run: OSError: no model unknown"),
        ("dies", EndpointDown, "dies has ended: .*; the same command goes on where this one ends"),
        ("breaks", EndpointError, "breaks: .*CUDA error"),
        ("refuses", EndpointError, "20 questions without an answer, the last: refused by the engine"),
    ],
)
def test_what_goes_wrong_is_said(small_batches, model, kind, match):
    with (
        pytest.raises(EndpointError, match=match) as raised,
        Engines(Settings(gpus=0), by_rules) as engines,
    ):
        list(engines.of(model).answers(iter(questions(40))))
    assert type(raised.value) is kind


def test_questions_that_stay_without_an_answer_do_not_end_a_job_that_has_others(small_batches):
    """Such as prompts that are too long: when the job goes on they are all that is asked."""
    asked = questions(30)
    known = [Known(question, Answer("old", None, 1, 1)) for question in asked[:1]]
    with Engines(Settings(gpus=0), by_rules) as engines:
        found = list(engines.of("refuses").answers(iter([*known, *asked[1:]])))
    assert len(found) == 30 and sum(answer.failure is not None for _, answer in found) == 29


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        (
            Settings(copies=2),
            ConfigError,
            "--engines 2 with --engine-gpus 1: the cluster's nodes have 0 GPUs, for 0 of them",
        ),
        (
            Settings(copies=3, gpus=0, room_seconds=0.1),
            ClusterBusy,
            "one has no place, .*3 x .*CPU.* are wanted",
        ),
    ],
)
def test_room_that_is_not_there_is_said(ray_cluster, settings, kind, match):
    with pytest.raises(kind, match=match), Engines(settings, by_rules) as engines:
        list(engines.of("one").answers(iter(questions(1))))


def test_the_job_labels_a_run_by_an_engine(small_batches, logs_as_before, tmp_path: Path, monkeypatch, capsys):
    from contextlib import nullcontext

    run = make_analysed_run(tmp_path / "runs" / "one")
    monkeypatch.setattr("cluster.pipeline.connected", lambda verbose: nullcontext())  # the tests' Ray
    monkeypatch.setattr(label_engine.Engines.__init__, "__defaults__", (by_rules,))
    options = ["--run", run.url, "--engine", "--engine-gpus", "0", "--model", "one", "--judge", "two"]
    assert job.main(options) == 0
    assert [row.label is None for row in read_labels(run)] == [False] * 7
    labelling = load_analysis(run).labelling
    assert labelling is not None and labelling.finished and (labelling.model, labelling.judge) == ("one", "two")
    capsys.readouterr()
    assert job.main(options) == 0 and "loading" not in capsys.readouterr().out, "all is known"


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--endpoint", "http://x/v1", "--engines", "2"], "--engines belongs to --engine"),
        (["--engine", "--concurrency", "4"], "--concurrency belongs to --endpoint"),
        (["--engine", "--engines", "0"], "--engines 0: above 0 is wanted"),
        (["--engine", "--engine-gpus", "-1"], "--engine-gpus -1: 0 or more is wanted"),
        (["--engine", "--engine-set", "max_model_len"], "--engine-set 'max_model_len': NAME=VALUE is wanted"),
    ],
)
def test_options_that_do_not_belong_together(logs_as_before, tmp_path: Path, capsys, more, match):
    run = make_analysed_run(tmp_path / "runs" / "one")
    assert job.main(["--run", run.url, "--model", "one", *more]) == 2
    assert match in capsys.readouterr().err


class Params(types.SimpleNamespace):
    """As vllm.SamplingParams, as far as it is used."""


class LLM:
    """As vllm.LLM: what it is given, and outputs of its form."""

    def __init__(self, model, *, tensor_parallel_size=1, max_model_len=None, distributed_executor_backend=None):
        self.given = model, tensor_parallel_size, max_model_len, distributed_executor_backend

    def chat(self, messages, sampling_params, use_tqdm=True, chat_template_kwargs=None):
        texts = [one["content"] for (one,) in messages]
        if any("long" in text for text in texts):
            raise ValueError("longer than the maximum model length")
        return [self._output(text, params) for text, params in zip(texts, sampling_params, strict=True)]

    def _output(self, text, params):
        tokens = {7: types.SimpleNamespace(decoded_token="7", logprob=-0.1, rank=1)}
        tokens |= {8: types.SimpleNamespace(decoded_token=" 8", logprob=-2.0, rank=2)}
        tokens |= {9: types.SimpleNamespace(decoded_token="a", logprob=-3.0, rank=3)}
        said = types.SimpleNamespace(text="7", token_ids=[7], logprobs=[tokens] if params.logprobs else None)
        return types.SimpleNamespace(prompt_token_ids=list(range(len(text))), outputs=[said])


def test_an_offline_model_is_asked_as_vllm_wants_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=Params))
    model = OfflineModel("m", 2, 0, {"max_model_len": 8192})
    assert model._llm.given == ("m", 2, 8192, "mp")
    short, long = Question("detect", 1, "short", 5, "a"), Question("detect", 2, "too long", 5, "b")
    number = Question("simulate", 3, "number", 5, "c", logprobs=True)
    found = model([short, long, number])
    assert [answer[:4] for answer in found] == [
        ("7", None, 5, 1),
        ("", "refused by the engine", 0, 0),
        ("7", None, 6, 1),
    ]
    assert found[0].logprobs is None and found[2].logprobs == [
        {"token": "7", "top_logprobs": [{"token": "7", "logprob": -0.1}, {"token": " 8", "logprob": -2.0}]}
    ]


def test_without_vllm_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EndpointError, match=r"no vLLM where the model is to run .*install mtc\[engine\] there"):
        OfflineModel("m", 1, 0, {})
