"""How well a transcoder stands in for its MLP, on held-out tokens. `python -m mtc.evaluation RUN` recomputes a run's.

Accumulators are float64 and mergeable: sums over millions of tokens lose digits in float32, and parts of the text are
evaluated by different processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from mtc.config import RunConfig
from mtc.transcoder import MatryoshkaTranscoder

if TYPE_CHECKING:
    from mtc.language_model import LanguageModel
    from mtc.work import PackedWindows


MAX_LOGITS = 1 << 26  # held at a time, a few copies of them: the vocabulary is what fills the memory


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LossRecovered(_Part):
    """Next-token cross-entropy (nats) of the language model with the transcoder in place of its MLP."""

    tokens: int
    """Predicted tokens."""
    ce_clean: float
    """The model as it is."""
    ce_zero: float
    """mlp_out replaced by zero."""
    ce_mean: float
    """mlp_out replaced by its mean over held-out tokens."""
    ce_spliced: list[float]
    """mlp_out replaced by the transcoder's reconstruction, per prefix."""
    kl: list[float]
    """Mean KL(clean || spliced) per prefix, nats."""
    recovered_zero: list[float]
    """(ce_zero - ce_spliced) / (ce_zero - ce_clean), per prefix."""
    recovered_mean: list[float]
    """(ce_mean - ce_spliced) / (ce_mean - ce_clean), per prefix."""


class Evaluation(_Part):
    """Reconstruction on held-out tokens, at the calibrated threshold."""

    tokens: int
    """Held-out tokens."""
    prefixes: list[int]
    """Sizes of the nested dictionaries."""
    fvu: list[float]
    """Fraction of variance unexplained, per prefix."""
    l0: list[float]
    """Active features per token within each prefix; the last is the whole dictionary's."""
    never_fired: int
    """Features that fired on none of these tokens."""
    loss: LossRecovered | None
    """None if not measured."""

    @property
    def explained_variance(self) -> list[float]:
        return [1 - value for value in self.fvu]


class ReconstructionSums(NamedTuple):
    """Additive sums behind FVU, all float64.

    FVU_m = sum ||y - y_m||^2 / (sum ||y||^2 - ||sum y||^2 / n), the denominator being the squared deviation from the
    per-dimension mean: one scalar variance over all elements would hide the mean and flatter.
    """

    tokens: np.ndarray
    """Scalar, number of tokens."""
    errors: np.ndarray
    """[prefixes], squared error in raw units."""
    target: np.ndarray
    """[d_target], sum of targets."""
    target_square: np.ndarray
    """Scalar, sum of squared targets."""
    fired: np.ndarray
    """[features], activations per feature."""

    def __add__(self, other: object) -> ReconstructionSums:
        assert isinstance(other, ReconstructionSums)
        return ReconstructionSums(*(a + b for a, b in zip(self, other, strict=True)))

    def fvu(self) -> list[float]:
        deviation = self.target_square - np.square(self.target).sum() / self.tokens
        return [float(e / deviation) for e in self.errors]

    def target_mean(self) -> np.ndarray:
        """[d_target], mean of raw targets."""
        return self.target / self.tokens

    def evaluation(self, transcoder: MatryoshkaTranscoder, loss: LossRecovered | None) -> Evaluation:
        return Evaluation(
            tokens=int(self.tokens),
            prefixes=list(transcoder.prefixes),
            fvu=self.fvu(),
            l0=[float(self.fired[:m].sum() / self.tokens) for m in transcoder.prefixes],
            never_fired=int((self.fired == 0).sum()),
            loss=loss,
        )


class LossSums(NamedTuple):
    """Additive sums of cross-entropies and KL over predicted tokens, float64."""

    tokens: np.ndarray
    """Scalar, predicted tokens."""
    ce: np.ndarray
    """[3 + prefixes]: clean, zero-ablated, mean-ablated, spliced per prefix."""
    kl: np.ndarray
    """[prefixes], KL(clean || spliced)."""

    def __add__(self, other: object) -> LossSums:
        assert isinstance(other, LossSums)
        return LossSums(*(a + b for a, b in zip(self, other, strict=True)))

    def loss_recovered(self) -> LossRecovered:
        clean, zero, mean, *spliced = (self.ce / self.tokens).tolist()
        return LossRecovered(
            tokens=int(self.tokens),
            ce_clean=clean,
            ce_zero=zero,
            ce_mean=mean,
            ce_spliced=spliced,
            kl=(self.kl / self.tokens).tolist(),
            recovered_zero=[(zero - s) / (zero - clean) for s in spliced],
            recovered_mean=[(mean - s) / (mean - clean) for s in spliced],
        )


@torch.inference_mode()
def reconstruction_sums(
    transcoder: MatryoshkaTranscoder, source: Tensor, target: Tensor
) -> tuple[ReconstructionSums, Tensor]:
    """Sums of raw activations [tokens, d_source] and [tokens, d_target], and the feature activations they gave.

    Tokens of which a number is not finite are not in the sums and activate no feature.
    """
    finite = source.isfinite().all(1) & target.isfinite().all(1)
    if not bool(finite.all()):
        sums, some = reconstruction_sums(transcoder, source[finite], target[finite])
        activations = torch.zeros(len(source), some.shape[1], dtype=some.dtype, device=some.device)
        activations[finite.to(some.device)] = some
        return sums, activations
    activations = transcoder.encode(source)
    y = target.to(activations.device).double()
    errors = torch.stack(
        [(part.double() - y).square().sum() for part in transcoder.decode_prefixes(activations, source)]
    )
    sums = ReconstructionSums(
        tokens=np.array(float(len(source))),
        errors=errors.cpu().numpy(),
        target=y.sum(0).cpu().numpy(),
        target_square=y.square().sum().cpu().numpy(),
        fired=(activations > 0).sum(0).double().cpu().numpy(),
    )
    return sums, activations


@torch.inference_mode()
def loss_sums(
    model: LanguageModel,
    transcoders: Sequence[MatryoshkaTranscoder],
    windows: PackedWindows,
    target_means: Sequence[Tensor],
) -> list[LossSums]:
    """Cross-entropies of a few windows, for the transcoder of each entry of the model's `config.sites` in turn.

    `model` has its upper layers and head, `target_means` are [d_target]. Only trainable positions are replaced: BOS is
    never trained on, so its MLP output stays the model's own.
    """
    parts = list(_split(windows, max(1, MAX_LOGITS // model.vocab_size)))
    if len(parts) > 1:
        sums = (loss_sums(model, transcoders, part, target_means) for part in parts)
        return [reduce(add, same) for same in zip(*sums, strict=True)]
    trainable = windows.trainable.nonzero().squeeze(1).to(model.device)
    # A token is predicted from the one before it in its window, which position 0 does not have.
    labelled = (windows.trainable & (windows.position_ids > 0)).nonzero().squeeze(1)
    labels = windows.input_ids[labelled].to(model.device)

    def run(replacement: Callable[[Tensor], Tensor] | None, at: int = 0) -> Tensor:
        def replace(source: Tensor, target: Tensor) -> Tensor:
            assert replacement is not None
            changed = target.clone()
            changed[trainable] = replacement(source[trainable]).to(target.dtype)
            return changed

        logits = model.logits(windows, None if replacement is None else replace, labelled - 1, at)
        return logits.float().log_softmax(-1)

    def cross_entropy(log_probabilities: Tensor) -> Tensor:
        return -log_probabilities.gather(1, labels.unsqueeze(1)).double().sum()

    clean = run(None)
    results = []
    for at, (transcoder, mean) in enumerate(zip(transcoders, target_means, strict=True)):
        d_target = transcoder.shape.d_target
        ce = [cross_entropy(clean)]
        ce.append(cross_entropy(run(lambda s, d=d_target: torch.zeros(len(s), d, device=s.device), at)))  # type: ignore[misc]
        ce.append(cross_entropy(run(lambda s, y=mean: y.to(s.device).float().expand(len(s), -1), at)))  # type: ignore[misc]
        kl = []
        for m in transcoder.prefixes:
            spliced = run(lambda s, m=m, t=transcoder: t.reconstruct(s, m), at)  # type: ignore[misc]
            ce.append(cross_entropy(spliced))
            kl.append((clean.exp() * (clean - spliced)).sum(dtype=torch.float64))
            del spliced
        tokens = np.array(float(len(labels)))
        results.append(LossSums(tokens, torch.stack(ce).cpu().numpy(), torch.stack(kl).cpu().numpy()))
    return results


def _split(windows: PackedWindows, tokens: int) -> Iterator[PackedWindows]:
    """Parts of whole windows with at most this many tokens each, or one window."""
    start, end = 0, 0
    first = 0
    for i, length in enumerate(windows.lengths):
        if end > start and end + length - start > tokens:
            yield _part(windows, start, end, first, i)
            start, first = end, i
        end += length
    yield _part(windows, start, end, first, len(windows.lengths))


def _part(windows: PackedWindows, start: int, end: int, first: int, last: int) -> PackedWindows:
    return windows._replace(
        input_ids=windows.input_ids[start:end],
        position_ids=windows.position_ids[start:end],
        trainable=windows.trainable[start:end],
        lengths=windows.lengths[first:last],
    )


def evaluate(
    config: RunConfig,
    transcoder: MatryoshkaTranscoder,
    units: Iterable[PackedWindows],
    loss_units: Iterable[PackedWindows],
    device: str = "cpu",
) -> Evaluation:
    """Evaluate in this process: metrics on `units`, losses on `loss_units` (possibly none)."""
    from mtc.language_model import LanguageModel

    transcoder = transcoder.to(device)
    model = LanguageModel(config.model, device)
    total: ReconstructionSums | None = None
    for windows in units:
        (pair,) = model.capture(windows, windows.trainable.nonzero().squeeze(1))
        sums, _ = reconstruction_sums(transcoder, pair.source, pair.target)
        total = sums if total is None else total + sums
    if total is None:
        raise ValueError("there are no held-out windows to evaluate on")
    losses: LossSums | None = None
    full: LanguageModel | None = None
    for windows in loss_units:
        full = full or LanguageModel(config.model, device, full=True)
        (part,) = loss_sums(full, [transcoder], windows, [torch.from_numpy(total.target_mean())])
        losses = part if losses is None else losses + part
    return total.evaluation(transcoder, losses.loss_recovered() if losses else None)


def main(argv: list[str] | None = None) -> int:
    """Recompute a finished run's held-out metrics from its directory and compare; 0 if they agree, 1 if not."""
    from mtc.analysis import Analysis
    from mtc.runs import RunError, load_transcoder, open_layer_run
    from mtc.tokens import DataError, TokenStore
    from mtc.work import heldout_units, pack_windows

    parser = argparse.ArgumentParser(prog="python -m mtc.evaluation", description=main.__doc__)
    parser.add_argument("run", help="a run directory or URL, or <root>/latest")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference (default: 0.001)")
    parser.add_argument("--skip-loss", action="store_true", help="leave out the passes of the whole language model")
    arguments = parser.parse_args(argv)
    try:
        run = open_layer_run(arguments.run)
        config, analysis = run.config(), Analysis.model_validate_json(run.read("analysis.json"))
        store = TokenStore.open(analysis.facts.token_store)
    except (RunError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def batches(tokens: int) -> Iterable[PackedWindows]:
        for unit in heldout_units(store, config, tokens) if tokens else []:
            yield pack_windows(store.input_ids(unit), store.info.special_ids)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loss_tokens = 0 if arguments.skip_loss else config.analysis.loss_tokens
    fresh = evaluate(config, load_transcoder(run), batches(config.analysis.num_tokens), batches(loss_tokens), device)
    stored = analysis.evaluation
    pairs: list[tuple[str, float, float]] = [("tokens", stored.tokens, fresh.tokens)]
    for i, m in enumerate(fresh.prefixes):
        pairs += [(f"fvu[{m}]", stored.fvu[i], fresh.fvu[i]), (f"l0[{m}]", stored.l0[i], fresh.l0[i])]
    pairs.append(("never_fired", stored.never_fired, fresh.never_fired))
    if fresh.loss and stored.loss:
        pairs += [(name, getattr(stored.loss, name), getattr(fresh.loss, name)) for name in ("ce_clean", "ce_zero")]
        pairs.append(("ce_mean", stored.loss.ce_mean, fresh.loss.ce_mean))
        pairs += [
            (f"recovered_zero[{m}]", stored.loss.recovered_zero[i], fresh.loss.recovered_zero[i])
            for i, m in enumerate(fresh.prefixes)
        ]
    print(f"{run.run_id}: {fresh.tokens:,} held-out tokens\n{'':24}{'report':>14}{'recomputed':>14}{'difference':>12}")
    worst = 0.0
    for name, old, new in pairs:
        difference = abs(new - old) / max(abs(old), 1e-9) if old != new else 0.0
        worst = max(worst, difference)
        print(f"{name:24}{old:14.6g}{new:14.6g}{difference:12.1e}")
    print(f"largest relative difference {worst:.1e}, tolerance {arguments.tolerance:g}")
    return 0 if worst <= arguments.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
