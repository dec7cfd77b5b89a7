"""A run's held-out figures computed again, in one process: `python -m mtc.analysis.recompute RUN` compares them.

Without Ray, from the weights, the token store and the configuration in analysis.json; each figure of the report is
printed beside the one that is found. What the figures are stands in mtc.analysis.evaluation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

import numpy as np
import torch

from mtc.analysis.evaluation import evaluation, loss_recovered
from mtc.analysis.held_out import HeldOutPass
from mtc.analysis.loss_sums import LossSums, loss_sums
from mtc.analysis.massive import recognise
from mtc.config import RunConfig
from mtc.errors import MtcError
from mtc.language_model import LanguageModel, PackedWindows, pack_windows
from mtc.results import Evaluation
from mtc.storage import RunError, load_analysis, open_layer_run
from mtc.text import TokenStore, heldout_units
from mtc.transcoder import MatryoshkaTranscoder, load_transcoder


def evaluate(
    config: RunConfig,
    transcoder: MatryoshkaTranscoder,
    units: Iterable[PackedWindows],
    loss_units: Iterable[PackedWindows],
    device: str = "cpu",
) -> Evaluation:
    """Evaluate in this process: metrics on `units`, losses on `loss_units` (possibly none); without intervals."""
    transcoder = transcoder.to(device)
    model = LanguageModel(config.model, device)
    total = HeldOutPass(config, transcoder, np.zeros(model.vocab_size, np.int64))
    for windows in units:
        (pair,) = model.capture(windows, windows.trainable.nonzero().squeeze(1))
        recognise(transcoder, pair.target)
        total.add(np.zeros(len(windows.lengths), np.int64), windows, pair)
    if not total.blocks.tokens.sum():
        raise ValueError("there are no held-out windows to evaluate on")
    losses: LossSums | None = None
    full: LanguageModel | None = None
    for windows in loss_units:
        full = full or LanguageModel(config.model, device, full=True)
        (part,) = loss_sums(full, [transcoder], windows, [torch.from_numpy(total.blocks.mean())])
        losses = part if losses is None else losses + part
    return evaluation(total, loss_recovered(losses) if losses else None)


def main(argv: list[str] | None = None) -> int:
    """Recompute a finished run's held-out metrics from its directory and compare; 0 if they agree, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m mtc.analysis.recompute", description=main.__doc__)
    parser.add_argument("run", help="a run directory or URL, or <root>/latest")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest relative difference (default: 0.001)")
    parser.add_argument("--skip-loss", action="store_true", help="leave out the passes of the whole language model")
    arguments = parser.parse_args(argv)
    try:
        run = open_layer_run(arguments.run)
        analysis = load_analysis(run)
        config = analysis.config
        if not analysis.facts.token_store:
            raise RunError(f"{run.url} was analysed without a token store, so there is nothing to compute from")
        store = TokenStore.open(analysis.facts.token_store)
    except MtcError as error:
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
