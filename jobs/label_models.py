"""What answers the questions of jobs/label.py: an endpoint, or models on the cluster."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import yaml

from mtc.config import ConfigError
from mtc.storage import prepare_environment

if TYPE_CHECKING:
    from mtc.labels import Asked, Journal

    Answering = Callable[[str, Journal], AbstractContextManager[Asked]]
    """Makes what answers as a model, and keeps the answers in a journal."""

OF_ENDPOINTS = ("concurrency", "seconds", "attempts", "key_variable")
OF_ENGINE = ("engines", "engine_gpus", "engine_set")


def check_options(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises ConfigError for options that don't go together, or have no meaning."""
    if options.engine and options.endpoint:
        raise ConfigError("--engine and --endpoint are two ways to ask a model: give one of them")
    for one, other in (("engine" if options.engine else "endpoint", "model"), ("embeddings", "embedding_model")):
        if bool(getattr(options, one)) != bool(getattr(options, other)):
            raise ConfigError(f"--{one} and {option(other)} belong together: give both or neither")
    if not options.model and not options.embeddings:
        raise ConfigError(
            "nothing to do: --endpoint (or --engine) and --model ask for labels, --embeddings for their vectors"
        )
    meaningless: tuple[str, ...] = OF_ENGINE
    if options.engine:
        meaningless = () if options.embeddings else OF_ENDPOINTS
    for name in meaningless:
        if getattr(options, name) != parser.get_default(name):
            raise ConfigError(f"{option(name)} belongs to --{'endpoint' if options.engine else 'engine'}")
    _engine_settings(options.engine_set)


@contextmanager
def answering(options: argparse.Namespace, room_seconds: float) -> Iterator[Answering]:
    """Yields what makes those who answer. Raises what joining a cluster does."""
    if not options.engine:
        yield lambda model, journal: _endpoint(options, model, journal)
        return
    prepare_environment()
    from cluster import label_engine
    from cluster.pipeline import connected

    vllm = _engine_settings(options.engine_set)
    settings = label_engine.Settings(options.engines, options.engine_gpus, options.thinking_tokens, vllm, room_seconds)
    handler = signal.getsignal(signal.SIGTERM)
    with connected(options.verbose), label_engine.Engines(settings) as engines:
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
        yield lambda model, journal: nullcontext(engines.of(model))


def option(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def _endpoint(options: argparse.Namespace, model: str, journal: Journal) -> AbstractContextManager[Asked]:
    from mtc.labels import Endpoint

    return Endpoint(
        options.endpoint, model, os.environ.get(options.key_variable), options.concurrency, options.seconds,
        options.attempts, thinking_tokens=options.thinking_tokens, keep=journal.add,
    )  # fmt: skip


def _engine_settings(given: list[str]) -> dict[str, object]:
    """What vLLM is given, by name. Raises ConfigError for what is not NAME=VALUE."""
    found: dict[str, object] = {}
    for each in given:
        name, equals, value = each.partition("=")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not name.isidentifier():
            raise ConfigError(f"--engine-set {each!r}: NAME=VALUE is wanted, such as max_model_len=8192")
    return found
