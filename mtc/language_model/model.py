"""The language model, cut off after the last layer that is read, and read at two sites of one or several layers.

Sites, named as in TransformerLens: `resid_mid` is the residual stream after attention is added, `mlp_in` the output of
the norm before the MLP, `mlp_out` what the MLP block adds to the residual stream, so resid_mid + mlp_out is the
layer's output. Windows of any lengths run as one row of tokens (attention.py), so nothing is spent on padding, on
layers above, on logits or on a cache.

On a GPU norms, MLPs and attention are compiled. Nothing depends on that: where compilation fails, the same operations
run one by one, and `LanguageModel.compute` says why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from mtc.config import ModelConfig
from mtc.devices import choose_dtype, is_gpu, send
from mtc.language_model import attention, flex
from mtc.language_model.architectures import model_info, modules_of, validate
from mtc.language_model.check import check_finite, check_report, check_weights
from mtc.language_model.compiling import compile_parts, restore, why_eager
from mtc.language_model.continuing import Continuing
from mtc.language_model.frozen import Frozen, ReadOut
from mtc.language_model.honoured import check_fields
from mtc.language_model.lower_layers import LowerLayers
from mtc.language_model.mlps import Mlps, Visit
from mtc.language_model.packing import PackedWindows, pack_windows
from mtc.language_model.sites import Replace, SitePair, Sites
from mtc.language_model.weights import loading, model_config_of, prepare_model, revision

logger = logging.getLogger(__name__)
WARM_WITHOUT_KERNEL = 1024
"""Most tokens of a warm-up pass whose attention takes memory for all pairs of tokens."""


class LanguageModel:
    """A frozen language model that is read at the sites of `config.sites`.

    By default only layers 0..last are loaded and run, last being the highest that is read; `full=True` loads all of
    it, for `logits`. `device`, `dtype` and `d_model` are those of the activations. Raises ModelError and ConfigError
    like `check_model`.
    """

    def __init__(self, config: ModelConfig, device: str | torch.device = "cpu", full: bool = False):
        path = prepare_model(config)
        self.device = torch.device(device)
        self.dtype = choose_dtype(config.dtype, self.device)
        self.full = full
        model_config = model_config_of(config)
        info = validate(config, model_info(model_config))
        self.config = config = config.of_layers(info.num_layers)
        check_fields(config.name, model_config)
        if os.path.isdir(path):  # it may have changed since the job began, or be another one on this node
            check_weights(config, path, model_config)
        self.d_model = info.d_model
        text = model_config.get_text_config()
        self.vocab_size: int = text.vocab_size
        if not full:
            _truncate(model_config, max(sites.layer for sites in config.sites) + 1)
        loader: Any = AutoModelForCausalLM if full else AutoModel
        with loading(config, report=full):  # the upper layers' weights are left unused on purpose
            model, report = loader.from_pretrained(
                path,
                config=model_config,
                dtype=self.dtype,
                attn_implementation=attention.NAME,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # an error of ours, below
                use_safetensors=True,
                **revision(config),
            )
        check_report(config, report, model_config)
        self.model: nn.Module = model.to(self.device).eval().requires_grad_(False)
        self._base: nn.Module = model.base_model
        modules = modules_of(config, info.model_type)
        self._layers: Any = self._base.get_submodule(modules.layers)
        check_finite(config, self._layers)
        self._lower: tuple[PackedWindows, LowerLayers] | None = None
        self._stored_gain = modules.stored_gain
        parallel = bool(getattr(model_config, "use_parallel_residual", False))
        self._mlps = Mlps(self._layers, modules, parallel)
        self._sites = Sites(self._mlps, config.sites)
        self._final_norm = self._base.get_submodule(modules.final_norm) if full else None
        self._eager = why_eager(config.compile, self.device)
        self._forwards = [] if self._eager is not None else compile_parts(self._base)
        self._kernel = flex.Kernel() if self._eager is None and is_gpu(self.device) else None
        inside = self._layers.modules()
        products = [m.weight.numel() for m in inside if isinstance(m, nn.Linear | Conv1D)]
        self._warm_for = 0
        """Largest number of tokens that `warm_up` was called for."""
        own = getattr(model, "generation_config", None)
        ends = own.eos_token_id if own is not None and own.eos_token_id is not None else []
        self.ends = frozenset([ends] if isinstance(ends, int) else ends)
        """Token ids that end what the model writes, as its files say."""
        self.max_tokens = info.max_positions
        """Most tokens of a window that the model knows positions for; None if it does not say."""
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or info.d_model // heads
        self._flops_per_token = 2 * sum(products)
        self._flops_per_pair = 4 * heads * width * text.num_hidden_layers

    @property
    def compiled(self) -> bool:
        """Whether norms, MLPs and, on a GPU, attention are compiled, which the first passes wait for."""
        return self._eager is None

    @property
    def compute(self) -> str:
        """How forward passes run: "compiled", or "eager" with the reason in parentheses, such as "eager
        (model.compile=false)", "eager (no C compiler)" or "eager (InductorError: ...)".

        "compiled, attention eager (...)" if only attention lost its kernel. Known after `warm_up`: before the first
        passes it says what will be tried.
        """
        if self._eager is not None:
            return f"eager ({self._eager})"
        failed = self._kernel and self._kernel.failed
        return f"compiled, attention eager ({failed})" if failed else "compiled"

    def warm_up(self, tokens: int) -> None:
        """Run passes of the kinds that come, with up to `tokens` tokens each, so that none of these compiles later.

        Compilation that fails is noticed here: the model then runs eager. On a CPU that compiles nothing there is
        nothing to do. Raises torch.OutOfMemoryError if passes of that many tokens do not fit.
        """
        if tokens <= self._warm_for or not (self.compiled or is_gpu(self.device)):
            return
        self._warm_for = tokens
        longest = max(1, min(tokens, self.max_tokens or tokens))
        for lengths in _kinds_of_windows(max(1, tokens), longest):
            # Without a kernel attention takes memory for all pairs of a window, maybe a longer one than ever comes.
            if sum(lengths) <= WARM_WITHOUT_KERNEL or (self._kernel is not None and self._kernel.failed is None):
                self.capture(pack_windows([np.zeros(length, np.int32) for length in lengths], []))

    def capture(
        self, windows: PackedWindows, only: Tensor | None = None, at: Sequence[int] | None = None
    ) -> tuple[SitePair, ...]:
        """Activations at the sites of every entry of `config.sites`, or of those with the numbers `at`, in that order;
        of all tokens or of those with the indices `only`.

        `only` is [chosen] int64. Layers above the highest one of `at` do not run. The result is ordinary tensors, on
        the model's device, that can be trained on. Raises ValueError for a window that is longer than the model has
        positions.
        """
        rows = None if only is None else send(only, self.device)
        chosen = range(len(self.config.sites)) if at is None else at
        with torch.inference_mode(), self._sites.watch(only=at) as seen:
            self._run(self._base, windows)
        # Outside inference mode a copy is an ordinary tensor.
        return tuple(
            SitePair(*(site.clone() if rows is None else site.index_select(0, rows) for site in seen[i]))
            for i in chosen
        )

    @torch.no_grad()
    def logits(
        self,
        windows: PackedWindows,
        replace: Replace | Mapping[int, Replace] | None = None,
        only: Tensor | None = None,
        at: int = 0,
    ) -> Tensor:
        """Next-token logits [tokens, vocabulary] in the model's dtype, of all tokens or of those with indices `only`.

        `replace(source, mlp_out)`, both [tokens, d_model], returns what entry `at` of `config.sites` adds to the
        residual stream instead of `mlp_out`; a mapping has such a function for each of several entries, which are
        replaced in the same pass. Raises ValueError if the model was not loaded with `full=True`, and for a
        window that is longer than the model has positions.
        """
        if not self.full:
            raise ValueError("logits need the whole model: LanguageModel(config, full=True)")
        kept = {} if only is None else {"logits_to_keep": send(only, self.device)}
        replaced = {} if replace is None else {at: replace} if callable(replace) else dict(replace)
        with self._from(min((self.config.sites[i].layer for i in replaced), default=None), windows):
            if not replaced:
                return self._run(self.model, windows, **kept).logits[0]
            with self._sites.watch(replaced):
                return self._run(self.model, windows, **kept).logits[0]

    def freeze(self, window: PackedWindows) -> Frozen:
        """The pass of one window, and passes whose attention patterns and norm factors are those of this one.

        Raises ValueError for several windows, for one that is longer than the model has positions, and for a model in
        less than float32, which has too few digits for sums over all layers.
        """
        if len(window.lengths) != 1:
            raise ValueError(f"one window is wanted, not {len(window.lengths)}")
        dtype = next(self.model.parameters()).dtype
        if torch.finfo(dtype).bits < 32:
            raise ValueError(f"the model runs in {str(dtype).removeprefix('torch.')}: load it with dtype='float32'")

        def run(patterns: attention.Patterns) -> Any:
            own = attention.Windows(window.lengths, self.device, patterns=patterns)
            return self._run(self._base, window, windows=own)

        return Frozen(self._base, self._layers[0], self._mlps, self._stored_gain, run)

    def continuing(self, visits: Mapping[int, Visit], leading: int | None = None) -> Continuing:
        """Rows of tokens to go on with, while `visits` by layer may change what MLPs write. With `leading`, half of the
        rows, the others' attention looks where these look. Raises ValueError if the model was not loaded with
        `full=True`."""
        self._require_final_norm()
        return Continuing(self.model, self._mlps, visits, leading)

    def read_out(self) -> ReadOut:
        """How logits are read from what the final norm gives. Raises ValueError if the model was not loaded with
        `full=True`."""
        self._require_final_norm()
        unembedding: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        text = self.model.config.get_text_config()  # type: ignore[union-attr,operator]
        return ReadOut(unembedding.weight, getattr(text, "final_logit_softcapping", None))

    @contextmanager
    def same_windows(self, windows: PackedWindows) -> Iterator[None]:
        """Inside, `logits` are all of these windows: after one without `replace`, those with it start at the layer that
        they replace in. Raises ValueError for other windows."""
        lower = LowerLayers(sites.layer for sites in self.config.sites)
        with lower.installed(self._layers):
            self._lower = windows, lower
            try:
                yield
            finally:
                self._lower = None

    @contextmanager
    def watch_final_norm(self) -> Iterator[list[Tensor]]:
        """Collect, for each forward pass that runs inside, the factor by which the final norm scales each token.

        Each is [tokens] float32: 1 / root mean square of the residual stream, for a LayerNorm around its mean. Raises
        ValueError if the model was not loaded with `full=True`.
        """
        norm = self._require_final_norm()
        scales: list[Tensor] = []

        def before(module: nn.Module, args: Any) -> None:
            x = args[0][0].float()
            scales.append(_centred(norm, x).square().mean(-1).rsqrt())

        hook = norm.register_forward_pre_hook(before)
        try:
            yield scales
        finally:
            hook.remove()

    @torch.no_grad()
    def direct_effect(self, directions: Tensor) -> Tensor:
        """Logits that residual directions add on their direct way out: [n, d_model] -> [n, vocabulary], float32.

        The final norm is taken as linear, its factor as 1 (`watch_final_norm` tells the real one) and its gain as it
        is; a soft cap on the logits is left out. Raises ValueError if the model was not loaded with `full=True`.
        """
        norm = self._require_final_norm()
        x = _centred(norm, directions.to(self.device).float())
        if isinstance(norm, nn.LayerNorm):
            gain = norm.weight.float()
        else:  # gains are stored as they are or less 1; a vector of ones has a root mean square of 1
            gain = norm(torch.ones(1, self.d_model, dtype=self.dtype, device=self.device))[0].float()
        unembedding: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        return (x * gain) @ unembedding.weight.float().T

    def _require_final_norm(self) -> nn.Module:
        if self._final_norm is None:
            raise ValueError("the final norm needs the whole model: LanguageModel(config, full=True)")
        return self._final_norm

    def flops(self, lengths: Sequence[int]) -> float:
        """Floating-point operations of the matrix products in one forward pass over windows of these lengths.

        Two for each weight and token, and four for each head dimension and pair of tokens that attention compares; a
        sliding window is not subtracted.
        """
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        return self._flops_per_token * sum(lengths) + self._flops_per_pair * pairs

    def _run(self, model: nn.Module, windows: PackedWindows, /, **others: Any) -> Any:
        """A forward pass; if a compiler fails in it, from here on without any."""
        if self._eager is None:
            try:
                with flex.compiler_settings():
                    return model(**self._inputs(windows) | others)
            except Exception as error:
                self._eager = flex.compiler_failure(error)
                if self._eager is None:
                    raise
            logger.warning("the language model is not compiled and runs slower: %s", self._eager)
            restore(self._forwards)
            self._forwards, self._kernel = [], None
        return model(**self._inputs(windows) | others)

    def _inputs(self, windows: PackedWindows) -> dict[str, Any]:
        longest = max(windows.lengths, default=0)
        if self.max_tokens is not None and longest > self.max_tokens:
            # There are no embeddings for more, or, with dynamic RoPE, all windows of a pass would change with one.
            raise ValueError(f"a window of {longest} tokens, but {self.config.name} has {self.max_tokens} positions")
        return {
            "input_ids": send(windows.input_ids, self.device).unsqueeze(0),
            "position_ids": send(windows.position_ids, self.device).unsqueeze(0),
            "windows": attention.Windows(windows.lengths, self.device, self._kernel),
            "use_cache": False,
        }

    @contextmanager
    def _from(self, layer: int | None, windows: PackedWindows) -> Iterator[None]:
        """Around a pass that replaces in `layer`, or nowhere."""
        if self._lower is None:
            yield
            return
        same, lower = self._lower
        if windows is not same:
            raise ValueError("a pass over other windows inside same_windows")
        with lower.a_pass(layer):
            yield


def _centred(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm scales: a LayerNorm removes the mean first."""
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def _truncate(model_config: PretrainedConfig, num_layers: int) -> None:
    text = model_config.get_text_config()
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:num_layers]


def _kinds_of_windows(tokens: int, longest: int) -> Iterator[list[int]]:
    """Lengths of windows, one list a pass, that take every path through the model: attention as one row, one token,
    which is a kind of its own for compilers, a short row, one long window and many that are alike."""
    rest = min(tokens, attention.LEAST_FLEX + 115) - 1
    mixed = [1, *[longest] * (rest // longest), rest % longest]
    each = max(1, min(longest, tokens // 8))
    for lengths in (mixed, [1], [3, 2, 6], [longest], [each] * (tokens // each)):
        if sum(lengths) <= tokens and max(lengths) <= longest:
            yield lengths
