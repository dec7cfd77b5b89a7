"""A language model that answers questions in this process, by vLLM (the extra `engine`): for whole batches, without an
endpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from mtc.labels.endpoint import TOP_LOGPROBS, Answer, slim
from mtc.labels.prompts import Question
from mtc.labels.transport import EndpointError

logger = logging.getLogger(__name__)


class OfflineModel:
    """A model with an instruction template.

    Args:
        model: name or directory, as vLLM takes it.
        gpus: GPUs over which the model is spread; 0 with a vLLM for CPUs.
        thinking_tokens: tokens that the model may spend before its answer, beside the answer's own.
        settings: what else `vllm.LLM` is given.

    Raises EndpointError without vLLM.
    """

    def __init__(self, model: str, gpus: int, thinking_tokens: int, settings: Mapping[str, Any]):
        try:
            import vllm
        except ImportError as error:
            raise EndpointError(
                f"--engine: no vLLM where the model is to run ({error}); install mtc[engine] there"
            ) from None
        self._params, self._thinking_tokens = vllm.SamplingParams, thinking_tokens
        # Where a placement group is about it, vLLM would spread itself by Ray, one GPU a bundle; this has all of its.
        spread = {"distributed_executor_backend": "mp"} if gpus > 1 else {}
        self._llm = vllm.LLM(**{"model": model, "tensor_parallel_size": max(1, gpus), **spread, **settings})

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each of the questions."""
        try:
            outputs = self._llm.chat(
                [[{"role": "user", "content": question.text}] for question in questions],
                [self._sampling(question) for question in questions],
                use_tqdm=False,
                # Of templates that know it; others leave it out.
                chat_template_kwargs={"enable_thinking": bool(self._thinking_tokens)},
            )
        except ValueError as error:  # one of them is too long, for which vLLM refuses all
            if len(questions) > 1:
                return [answer for question in questions for answer in self([question])]
            logger.warning("feature %d, %s: %s", questions[0].feature, questions[0].kind, error)
            return [Answer("", "refused by the engine", 0, 0)]
        return [_answer(output) for output in outputs]

    def _sampling(self, question: Question) -> Any:
        most = question.answer_tokens + self._thinking_tokens
        return self._params(temperature=0, max_tokens=most, logprobs=TOP_LOGPROBS if question.logprobs else None)


def _answer(output: Any) -> Answer:
    """Of vLLM's RequestOutput."""
    said = output.outputs[0]
    logprobs = said.logprobs and slim(
        {
            "token": options[chosen].decoded_token,
            "top_logprobs": [{"token": each.decoded_token, "logprob": each.logprob} for each in options.values()],
        }
        for chosen, options in zip(said.token_ids, said.logprobs, strict=True)
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Answer(said.text, None, len(output.prompt_token_ids), len(said.token_ids), logprobs or None, now)
