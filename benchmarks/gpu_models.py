"""Checks of the language model on a GPU, and of what is computed with a finished transcoder."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoConfig

from benchmarks.gpu_checks import FLOAT32, Findings, Setting, host_only, relative_error
from benchmarks.gpu_training import planted, training_config
from mtc.analysis import HeldOutPass, count_tokens
from mtc.analysis.coactivation import parent_candidates
from mtc.config import ModelConfig
from mtc.language_model import Capture, LanguageModel, PackedWindows, Pending, SitePair, attention, flex, pack_windows
from mtc.language_model.capture import Captured
from mtc.language_model.weights import _make_random
from mtc.training import Calibrator, Trainer
from mtc.transcoder import MatryoshkaTranscoder

MODEL_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest ||activations - float32's on the CPU|| / ||those||, after two layers of random weights, which multiply the
rounding of each product: 2^-24 or 2^-9 of it."""
ATTENTION_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Largest relative error of attention alone, of inputs that are given in that dtype: scores and output are rounded."""
MOST_ATTENTION_KERNELS = 12
"""Compilations that all kinds of windows may take together: with a cap and without, both dtypes, and three shapes."""
BOS, LAYER = 256, 1


@contextmanager
def without_code(device: torch.device) -> Iterator[None]:
    """On a CPU a context in which torch.compile traces and runs the graph, without generating code for it."""
    if device.type == "cuda":
        yield
        return
    with mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")):
        flex._compiled_flex.cache_clear()
        yield
    flex._compiled_flex.cache_clear()


def small_model(setting: Setting, architecture: str) -> str:
    """The directory of a random model that has what FlexAttention needs: heads of 32."""
    directory = Path(setting.scratch) / architecture
    if not directory.is_dir():
        shape: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 259}
        shape |= {"max_position_embeddings": 1024, "bos_token_id": BOS, "eos_token_id": 257, "pad_token_id": 258}
        shape |= {"intermediate_size": 192, "num_key_value_heads": 2, "head_dim": 32}
        if architecture == "gemma2":
            shape |= {"query_pre_attn_scalar": 32, "sliding_window": 16}
        directory.mkdir()
        _make_random(AutoConfig.for_model(architecture, **shape), directory)
    return str(directory)


def windows(lengths: Sequence[int], seed: int = 1) -> PackedWindows:
    rng = np.random.default_rng(seed)
    return pack_windows([np.r_[BOS, rng.integers(0, 256, n - 1)].astype(np.int32) for n in lengths], [BOS])


def load(setting: Setting, architecture: str, dtype: str = "float32", compiled: bool = False, **more: Any) -> Any:
    config = ModelConfig(name=small_model(setting, architecture), layer=LAYER, dtype=dtype, compile=compiled)
    return LanguageModel(config, more.get("device", setting.device))


# Capture ------------------------------------------------------------------------------------------------------------


def capture(setting: Setting, findings: Findings) -> None:
    """Units reach the host as the model computed them, one ahead; those with a NaN lose what depends on it, no more."""
    for architecture in ("llama", "gemma2"):
        for compiled in (False, True):
            name = f"{architecture}, {'compiled' if compiled else 'eager'}"
            with without_code(setting.device):
                model = load(setting, architecture, compiled=compiled)
                _check_units(model, findings, name)
                _check_nan(model, findings, name)


def _check_units(model: LanguageModel, findings: Findings, name: str) -> None:
    many = 40 if model.device.type == "cuda" else 3
    lengths = [(20, 20, 17, 3) * many, (), (64,) * many, (300, 1, 9), (), (5,)]
    units = [windows(part, seed) for seed, part in enumerate(lengths)]
    runner, pending, found = Capture(model), deque[Pending](), list[Captured]()
    for unit in units:
        pending.append(runner.start(unit))
        if len(pending) > runner.ahead:
            found.append(runner.finish(pending.popleft()))
    found += [runner.finish(one) for one in pending]
    findings.check(f"one unit ahead, {name}", runner.ahead == 1)
    right = True
    for unit, captured in zip(units, found, strict=True):
        if not unit.lengths:
            right &= captured == Captured({}, 0, [])
            continue
        (pair,) = model.capture(unit, unit.trainable.nonzero().squeeze(1))
        expected = [column.bfloat16().cpu() for column in pair]
        right &= captured.tokens == len(expected[0]) and not captured.dropped
        right &= all(torch.equal(a, b) for a, b in zip(captured.activations.values(), expected, strict=True))
    findings.check(f"units on the host, {name}", right)


def _check_nan(model: LanguageModel, findings: Findings, name: str) -> None:
    """With a NaN in the embedding of one token id. Layer 1 attends to the whole window, so every later token of its
    window depends on it; no token of another window does."""
    unit = windows((40, 40, 33, 40, 7, 130, 40, 64), 9)
    bad = 255
    ids = torch.where(unit.input_ids == bad, 0, unit.input_ids)
    ids[[40 + 20, 113 + 39, 160 + 90]] = bad  # in windows 1, 3 and 5
    unit = unit._replace(input_ids=ids)
    chosen = unit.trainable.nonzero().squeeze(1)
    owner = torch.repeat_interleave(torch.tensor(unit.lengths))
    depends = torch.zeros(len(ids), dtype=torch.bool)
    for place in (ids == bad).nonzero().flatten().tolist():
        depends |= (owner == owner[place]) & (torch.arange(len(ids)) >= place)
    clean = [column.cpu() for column in model.capture(unit, chosen)[0]]
    weight: Any = model.model.get_input_embeddings().weight
    with torch.no_grad():
        kept = weight[bad].clone()
        weight[bad] = torch.nan
    runner = Capture(model)
    (pair,) = model.capture(unit, chosen)
    finite = (pair.source.isfinite().all(1) & pair.target.isfinite().all(1)).cpu()
    captured = runner.finish(runner.start(unit))
    with torch.no_grad():
        weight[bad] = kept
    findings.check(
        f"a NaN, {name}: dropped is what is not finite", captured.dropped == (~finite).nonzero().flatten().tolist()
    )
    findings.check(f"a NaN, {name}: all that depends on it is dropped", not bool(finite[depends[chosen]].any()))
    for found, truth in zip(captured.activations.values(), clean, strict=True):
        findings.compare(f"a NaN, {name}: the others are right", relative_error(found, truth[finite].bfloat16()), 1e-2)
    elsewhere = torch.isin(owner[chosen], torch.tensor([1, 3, 5]), invert=True)
    lost = int((~finite & elsewhere).sum())
    findings.check(f"a NaN, {name}: other windows lose nothing", lost == 0, lost=lost, of=int(elsewhere.sum()))


# Attention ----------------------------------------------------------------------------------------------------------


def compilations() -> int:
    """Graphs that were compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def attention_kernels(setting: Setting, findings: Findings) -> None:
    """`attend` as transformers calls it, on windows of many kinds, against float64 and all pairs of tokens."""
    before = compilations()
    if setting.small:
        kinds = [[40], [64] * 3, [30, 64, 1, 17] * 4]
        heads, width, reach = (4, 2), 16, 24
    else:
        kinds = [[width] * count for width in (64, 256, 300, 1024) for count in (1, 3, 16)]
        kinds += [[1024, 64, 300, 1, 17, 256] * 3, [777, 778]]
        heads, width, reach = (8, 4), 256, 128  # Gemma 2's
    generator = torch.Generator(setting.device).manual_seed(0)
    with without_code(setting.device):
        for dtype in (torch.bfloat16, torch.float32):
            kernel = flex.Kernel()
            for lengths in kinds if dtype == torch.bfloat16 else kinds[-2:]:
                shapes = [(1, count, sum(lengths), width) for count in (heads[0], heads[1], heads[1])]
                parts = [torch.randn(s, generator=generator, device=setting.device).to(dtype) for s in shapes]
                for softcap in (None, 20.0):
                    for sliding in (None, reach):
                        for kind, one in (("one row", kernel), ("rectangles", None)):
                            with flex.compiler_settings(), torch.inference_mode():
                                found, _ = attention.attend(
                                    nn.Identity(), *parts, None, scaling=0.1, softcap=softcap, sliding_window=sliding,
                                    windows=attention.Windows(lengths, setting.device, one),
                                )  # fmt: skip
                            truth = _dense_attention(parts, lengths, 0.1, softcap, sliding)
                            name = f"{kind}, {str(dtype).removeprefix('torch.')}, {_kind(softcap, sliding)}"
                            findings.compare(name, relative_error(found, truth), ATTENTION_LIMITS[dtype])
            findings.check("compiled", kernel.failed is None, failed=kernel.failed)
    made = compilations() - before
    findings.compare("compilations", made, MOST_ATTENTION_KERNELS)
    findings.figures["compilations"] = made


def _kind(softcap: float | None, sliding: int | None) -> str:
    return f"{'capped' if softcap else 'plain'}, {'sliding' if sliding else 'whole windows'}"


def _dense_attention(
    parts: list[Tensor], lengths: list[int], scale: float, softcap: float | None, reach: int | None
) -> Tensor:
    """[1, tokens, heads, head_dim] in float64, window by window, on the same device."""
    query, key, value = (part[0].double() for part in parts)  # [heads, tokens, head_dim]
    times = len(query) // len(key)
    key, value = key.repeat_interleave(times, 0), value.repeat_interleave(times, 0)
    results = []
    for q, k, v in zip(*(part.split(lengths, 1) for part in (query, key, value)), strict=True):
        scores = q @ k.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        hidden = (distance < 0) if reach is None else (distance < 0) | (distance >= reach)
        results.append(scores.masked_fill(hidden.to(scores.device), -torch.inf).softmax(-1) @ v)
    return torch.cat(results, 1).transpose(0, 1).unsqueeze(0)


# The model ----------------------------------------------------------------------------------------------------------


def model(setting: Setting, findings: Findings) -> None:
    """Compiled passes equal eager ones and the CPU's in float32; after `warm_up` nothing is compiled any more."""
    many = 1 if setting.small else 12
    kinds = [(64,) * 8 * many, (20, 20, 17, 3, 20, 1, 9) * many, (300, 41), (1,), (2, 2), (128,) * 2]
    units = [windows(lengths, seed) for seed, lengths in enumerate(kinds)]
    with without_code(setting.device):
        for architecture, dtype in (("gemma2", "float32"), ("llama", "float32"), ("gemma2", "bfloat16")):
            with host_only():
                on_cpu = load(setting, architecture, device="cpu")
                truth = [on_cpu.capture(unit)[0] for unit in units]
            eager = load(setting, architecture, dtype)
            compiled = load(setting, architecture, dtype, compiled=True)
            compiled.warm_up(512 * many)
            before = compilations()
            name, limit = f"{architecture}, {dtype}", MODEL_LIMITS[getattr(torch, dtype)]
            for unit, expected in zip(units, truth, strict=True):
                for kind, runner in (("eager", eager), ("compiled", compiled)):
                    (found,) = runner.capture(unit)
                    for part, wanted in zip(found, expected, strict=True):
                        findings.compare(f"{kind}, {name}", relative_error(part, wanted), limit)
            made = compilations() - before
            findings.check(f"nothing is compiled after warm_up, {name}", made == 0, compilations=made)
            findings.check(f"it is compiled, {name}", compiled.compute == "compiled", compute=compiled.compute)


# With a finished transcoder -----------------------------------------------------------------------------------------


def inference(setting: Setting, findings: Findings) -> None:
    """Calibration, sparse codes, reconstructions and the held-out sums equal formulas in float64 and the CPU's pass."""
    groups, k, d, window = ((96, 128, 96), 4, 384, 16) if setting.small else ((1152, 2304, 1152), 16, 2304, 64)
    lengths = (window,) * 12
    packed = windows(lengths)
    chosen = packed.trainable.nonzero().squeeze(1)
    config = training_config(groups, k, 64)
    trainer = Trainer(config, d, d, setting.device)
    data = planted(trainer, len(chosen), groups[-1] // 2, torch.Generator().manual_seed(3))
    transcoder, source = trainer.transcoder, data.source.to(setting.device)
    weights = {name: value.detach().cpu().double() for name, value in transcoder.state_dict().items()}
    x = data.source.double()
    z = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() @ weights["W_enc"].T + weights["b_enc"]
    ranked = z.flatten().sort(descending=True).values
    calibrator = Calibrator(transcoder)
    for part in source.split(100):
        calibrator.add(part)
    threshold = calibrator.finish()
    findings.compare("threshold", relative_error(threshold, ranked[k * len(x)]), FLOAT32)

    transcoder.threshold.fill_(float(ranked[k * len(x) - 1] + ranked[k * len(x)]) / 2)  # in the gap
    a = z * (z > transcoder.threshold.cpu())
    token, feature = a.nonzero(as_tuple=True)
    for search in (False, True):
        codes = transcoder.encode_sparse(source, search)
        same = torch.equal(codes.token.cpu(), token) and torch.equal(codes.feature.cpu(), feature)
        name = f"codes{', bfloat16 search' if search else ''}"
        findings.check(f"{name}: entries", same and len(token) == k * len(x))
        findings.compare(f"{name}: values", relative_error(codes.value, a[token, feature]), FLOAT32)
    parts = [a[:, start:end] @ weights["W_dec"][start:end] for start, end in transcoder.groups]
    exact = (torch.stack(parts).cumsum(0) + weights["b_dec"]) / weights["target_scale"]
    activations = transcoder.encode(source)
    dense = torch.stack([transcoder.decode(activations[:, :m], source) for m in transcoder.prefixes])
    findings.compare("decoded from codes", relative_error(transcoder.decode_codes(codes, source), exact), FLOAT32)
    findings.compare("decoded from activations", relative_error(dense, exact), FLOAT32)
    _check_heldout(findings, config, transcoder, packed, SitePair(data.source, data.target))


def _check_heldout(findings: Findings, config: Any, transcoder: Any, packed: PackedWindows, pair: SitePair) -> None:
    """The same pass on the device and, with the loops and branches of a CPU, on the host."""
    other = MatryoshkaTranscoder(transcoder.shape)
    other.load_state_dict({name: value.cpu() for name, value in transcoder.state_dict().items()})
    candidates = parent_candidates(other)
    occurrences = count_tokens([packed.input_ids.numpy()], [BOS], 259)
    ids, documents = np.arange(len(packed.lengths)), np.arange(len(packed.lengths)) // 2

    def run(transcoder: MatryoshkaTranscoder) -> dict[str, Any]:
        heldout = HeldOutPass(config, transcoder, occurrences, int(documents[-1]) + 1, candidates)
        heldout.add(ids, packed, pair, documents, sampled=True)
        return heldout.arrays()

    found = run(transcoder)
    with host_only():
        expected = run(other)
    findings.check("held-out pass: the same arrays", found.keys() == expected.keys())
    compared = ("l0_counts", "token_errors", "blocks.", "positions.", "frequencies.", "sample.token", "sample.feature")
    compared += ("examples.statistics.count", "examples.statistics.maximum", "examples.statistics.total")
    for name in (n for n in expected if n.startswith(compared)):
        exact = np.issubdtype(expected[name].dtype, np.integer)
        error = relative_error(found[name], expected[name])
        findings.compare("held-out pass: counts" if exact else "held-out pass: sums", error, 0.0 if exact else FLOAT32)
