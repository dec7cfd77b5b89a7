"""One pass over held-out text, for one transcoder: sums of reconstruction errors, examples and co-activations, as one
mergeable object.

Activations never leave the process that computed them: what travels is sums, candidate examples and, of a part of the
tokens, the sparse features that fired together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mtc.analysis.coactivation import CoactivationSample, parent_candidates, to_bfloat16
from mtc.analysis.contexts import ContextCollector
from mtc.analysis.examples import ExampleCollector
from mtc.analysis.intervals import MAX_BLOCKS
from mtc.analysis.massive import MassiveSums
from mtc.analysis.straight_line import LineSums
from mtc.analysis.token_sums import MAX_ENTRIES, Array, SparseActivations, TokenErrors, TokenSums
from mtc.config import RunConfig
from mtc.devices import choose_bfloat16
from mtc.transcoder import Codes, MatryoshkaTranscoder, entry_dots

if TYPE_CHECKING:
    from mtc.language_model import PackedWindows, SitePair

POSITION_BINS = 18  # 0, 1, 2-3, 4-7, ...: as many as the longest context has bits, and one
FREQUENCY_BINS = 10  # 1-9, 10-99, ...


class HeldOutPass:
    """Sums of the windows that were added; two passes merge into the pass over both.

    `occurrences` [vocabulary] int64 tells how often each token id occurs in all of the text, and `num_documents` how
    many documents that is; `candidates` is `parent_candidates(transcoder)`, computed here if it is not given. Of each
    of the windows `context_windows`, ascending, a random context is kept, by default of none.
    Everything but float64 sums is the same whatever the order of windows and merges; those are, to the last bit, if the
    order is.
    """

    def __init__(
        self,
        config: RunConfig,
        transcoder: MatryoshkaTranscoder,
        occurrences: Array,
        num_documents: int = 1,
        candidates: Array | None = None,
        context_windows: Array | None = None,
    ):
        settings, shape = config.analysis, transcoder.shape
        self.transcoder = transcoder
        self.norm_in_weights = not bool(transcoder.massive_norm.isnan())
        """Whether the weights say which tokens are massive, before anything here does."""
        self.prefixes = transcoder.prefixes
        self.coactivation_tokens = settings.coactivation_tokens
        device = transcoder.W_dec.device
        # A GPU's product is too short to gain from it.
        self._bfloat16_search = device.type == "cpu" and choose_bfloat16("auto", device)
        decades = np.floor(np.log10(np.maximum(occurrences, 1))).astype(np.int64)
        self._decade = torch.from_numpy(np.minimum(decades, FREQUENCY_BINS - 1)).to(device)
        self._num_blocks = min(num_documents, MAX_BLOCKS)

        def zeros(labels: int) -> TokenSums:
            n = len(self.prefixes)
            return TokenSums(
                *(np.zeros((2 * labels, *more)) for more in ((), (n,), (shape.d_target,), (), (n,), (n,)))
            )  # fmt: skip

        # Of all three the first half is of tokens that are not massive, the second half of massive ones.
        self.blocks = zeros(self._num_blocks)
        """Sums of the tokens by document, or by block of documents."""
        self.positions = zeros(POSITION_BINS)
        """Sums of the tokens by the number of bits of their position in the window."""
        self.frequencies = zeros(FREQUENCY_BINS)
        """Sums of the tokens by the decimal digits of their id's `occurrences`, less one."""
        self.l0_counts = np.zeros(transcoder.num_features + 1, np.int64)
        """[features + 1] int64, tokens that are not massive by their number of active features."""
        self.token_errors = np.zeros((len(occurrences), 1 + len(self.prefixes)))
        """[vocabulary, 1 + prefixes]: tokens with each id that are not massive, and the sum of their squared errors per
        prefix."""
        self.massive = MassiveSums.empty(len(occurrences), transcoder.num_features)
        """Which tokens are massive, and what fires on them."""
        self.line = LineSums()
        """Sums for the least-squares affine map."""
        self.examples = ExampleCollector(
            transcoder.num_features,
            settings.max_per_feature,
            settings.samples_per_feature,
            settings.context_tokens,
            settings.min_activation,
        )
        chosen = np.empty(0, np.int64) if context_windows is None else context_windows
        self.contexts = ContextCollector(chosen, settings.context_tokens + 1)
        """Random contexts with all that fires in them."""
        self.candidates = parent_candidates(transcoder) if candidates is None else candidates
        """[features, PARENT_CANDIDATES] int64: earlier features for which absorption is looked for; -1 where there are
        fewer."""
        self._samples = [CoactivationSample.empty(self.candidates.shape[1])]

    @torch.inference_mode()
    def add(
        self,
        window_ids: Array,
        windows: PackedWindows,
        pair: SitePair,
        documents: Array | None = None,
        sampled: bool = False,
        fold: int | None = None,
    ) -> None:
        """Take in packed windows and the raw activations of their trainable tokens.

        Args: window_ids [windows] int64; documents [windows] int64, the number of each window's, by default 0;
        `sampled` windows also go into `sample`; `fold` is the part of the text that they are of for the affine map,
        which leaves them out by default. Tokens of which a number is not finite activate no feature and are in no sum
        but the examples' count of tokens.
        """
        device = self.transcoder.W_dec.device
        source, target = pair.source.to(device), pair.target.to(device)
        chosen = windows.trainable.nonzero().squeeze(1)
        largest = torch.stack([source.abs().amax(1), target.abs().amax(1)])  # not a number if one is not
        finite = largest.isfinite().all(0).nonzero().squeeze(1)
        if len(finite) < len(source):
            source, target, chosen = source[finite], target[finite], chosen[finite.cpu()]
        window = np.repeat(np.arange(len(windows.lengths)), windows.lengths)[chosen.numpy()]
        block = torch.from_numpy(np.zeros(len(window), np.int64) if documents is None else documents[window])
        position = _bits(windows.position_ids[chosen])
        token = windows.input_ids[chosen]
        if fold is not None:
            self.line.add(self.transcoder.normalise(source), target, self.transcoder.massive(target), fold)
        parts = []
        step = max(1, MAX_ENTRIES // self.transcoder.num_features)
        for start in range(0, len(source), step):
            some = slice(start, start + step)
            labels = [part[some].to(device) for part in (block % self._num_blocks, position, token)]
            codes = self._add_part(source[some], target[some], *labels)
            parts.append(_by_feature(codes, start, finite))
            if sampled:
                keys = window_ids[window[some]] * (1 << 20) + windows.position_ids[chosen[some]].numpy()
                self._samples.append(self._sample(source[some], target[some], codes, keys))
        sparse = _in_order(parts)
        self.examples.add(window_ids, windows, sparse)
        self.contexts.add(window_ids, windows, sparse)

    def _add_part(self, source: Tensor, target: Tensor, block: Tensor, position: Tensor, token: Tensor) -> Codes:
        """Sums of a few tokens; returns their feature activations."""
        codes = self.transcoder.encode_sparse(source, self._bfloat16_search)
        ends = [codes.feature < prefix for prefix in self.prefixes]
        active = torch.stack([torch.bincount(codes.token[inside], minlength=codes.tokens) for inside in ends], 1)
        found = TokenErrors.of(self.transcoder.decode_codes(codes, source), target, active)
        massive = self.transcoder.massive(target)
        for name, labels, count in (
            ("blocks", block, self._num_blocks),
            ("positions", position, POSITION_BINS),
            ("frequencies", self._decade[token], FREQUENCY_BINS),
        ):
            setattr(self, name, getattr(self, name) + found.sums(labels + count * massive, 2 * count))
        self.massive = self.massive.add(massive, token, codes)
        self.l0_counts += torch.bincount(active[~massive, -1], minlength=len(self.l0_counts)).cpu().numpy()
        errors = torch.cat([torch.ones_like(found.errors[:, :1]), found.errors], 1)[~massive].cpu().numpy()
        ids, which = np.unique(token[~massive].cpu().numpy(), return_inverse=True)
        for column in range(errors.shape[1]):
            self.token_errors[ids, column] += np.bincount(which, weights=errors[:, column])
        return codes

    def _sample(self, source: Tensor, target: Tensor, codes: Codes, keys: Array) -> CoactivationSample:
        transcoder = self.transcoder
        residual = target.float() * transcoder.target_scale - transcoder.base(source)
        unit = transcoder.W_dec / transcoder.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
        candidates = torch.from_numpy(self.candidates).to(residual.device)[codes.feature].clamp(min=0)

        def reach(feature: Tensor) -> Array:
            return to_bfloat16(entry_dots(residual, codes.token, unit, feature))

        fires = torch.zeros(codes.tokens, transcoder.num_features, dtype=torch.bool, device=residual.device)
        fires[codes.token, codes.feature] = True
        return CoactivationSample(
            tokens=codes.tokens,
            token=keys[codes.token.cpu().numpy()],
            feature=codes.feature.int().cpu().numpy(),
            activation=to_bfloat16(codes.value),
            projection=reach(codes.feature),
            candidate_projection=np.stack([reach(column.contiguous()) for column in candidates.T], 1),
            candidate_fired=fires[codes.token[:, None], candidates].cpu().numpy(),
        )

    @property
    def sample(self) -> CoactivationSample:
        """Which features fired together on some of the tokens."""
        if len(self._samples) > 1:  # put together once: it is the largest thing here
            self._samples = [CoactivationSample.join(self._samples)]
        return self._samples[0]

    def arrays(self) -> dict[str, Array]:
        """Everything that the pass found, to travel between processes."""
        ids = np.flatnonzero(self.token_errors[:, 0])  # few, in a part of the text
        found = {"l0_counts": self.l0_counts, "token_ids": ids, "token_errors": self.token_errors[ids]}
        found["massive_norm"] = self.transcoder.massive_norm.cpu().numpy()
        for name in ("blocks", "positions", "frequencies"):
            sums = getattr(self, name)
            found[f"{name}.labels"] = labels = np.flatnonzero(sums.tokens)
            found |= {f"{name}.{n}": column[labels] for n, column in sums._asdict().items()}
        for name in ("massive", "sample"):
            found |= {f"{name}.{n}": np.asarray(v) for n, v in getattr(self, name)._asdict().items()}
        found |= {f"line.{n}": v for n, v in self.line.arrays().items()}
        found |= {f"contexts.{n}": v for n, v in self.contexts.arrays().items()}
        return found | {f"examples.{n}": v for n, v in self.examples.arrays().items()}

    def merge(self, arrays: dict[str, Any]) -> None:
        """Take in what another pass with the same settings found, as its `arrays`."""
        self.transcoder.massive_norm.fill_(float(arrays["massive_norm"]))
        self.l0_counts += arrays["l0_counts"]
        self.token_errors[arrays["token_ids"]] += arrays["token_errors"]
        for name in ("blocks", "positions", "frequencies"):
            self.merge_sums(name, arrays)
        self.massive += MassiveSums(*(arrays[f"massive.{n}"] for n in MassiveSums._fields))
        self.line.merge_arrays(_under("line.", arrays))
        self._samples.append(CoactivationSample(**{n: arrays[f"sample.{n}"] for n in CoactivationSample._fields}))
        self.contexts.merge_arrays(_under("contexts.", arrays))
        self.examples.merge_arrays(_under("examples.", arrays))

    def merge_sums(self, name: str, arrays: dict[str, Any]) -> None:
        """Take in no more than `blocks`, `positions` or `frequencies` of another pass' `arrays`."""
        for n, column in getattr(self, name)._asdict().items():
            column[arrays[f"{name}.labels"]] += arrays[f"{name}.{n}"]


def count_tokens(windows: Sequence[Array], special: Sequence[int], vocabulary: int) -> Array:
    """[vocabulary] int64: how often each id occurs; `special` ids are not counted."""
    flat = np.fromiter(chain.from_iterable(windows), np.int64)
    counts = np.bincount(flat, minlength=vocabulary)
    counts[list(special)] = 0
    return counts


def number_documents(document_ids: Sequence[str]) -> tuple[Array, int]:
    """A number for each window's document, in the order of first appearance; and how many there are."""
    numbers: dict[str, int] = {}
    found = np.array([numbers.setdefault(name, len(numbers)) for name in document_ids], np.int64)
    return found, len(numbers)


def _under(prefix: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _bits(positions: Tensor) -> Tensor:
    """Binary digits of each number: 0 of 0, 1 of 1, 2 of 2 and 3, ..."""
    return torch.frexp(positions.double()).exponent.long().clamp(min=0, max=POSITION_BINS - 1)


def _by_feature(codes: Codes, start: int, finite: Tensor) -> SparseActivations:
    """Codes of the tokens from `start` on among those that are `finite`, ordered by feature."""
    feature, token = codes.feature.cpu().numpy(), finite[codes.token + start].cpu().numpy()
    order = np.argsort(feature, kind="stable")
    return SparseActivations(feature[order], token[order], codes.value.cpu().numpy()[order])


def _in_order(parts: list[SparseActivations]) -> SparseActivations:
    """Activations of several parts of the tokens as one SparseActivations."""
    if len(parts) == 1:
        return parts[0]
    empty = SparseActivations(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    feature, token, value = (np.concatenate(columns) for columns in zip(empty, *parts, strict=True))
    order = np.argsort(feature, kind="stable")
    return SparseActivations(feature[order], token[order], value[order])
