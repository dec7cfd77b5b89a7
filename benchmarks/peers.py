"""Three peer libraries put to the work of this one: reading x [tokens, d_source], reconstruct y [tokens, d_target].

Runs in a virtual environment of its own (`make peers`), since each library brings its own pins; so it imports neither
`mtc` nor ray. Each adapter takes the library's own training code as far as that goes and changes only what a transcoder
needs; its docstring says what. What is made equal: Adam at `Work.lr`, a linear warm-up, a constant rate and a linear
decay to zero over the last fifth of the steps, and the number of silent tokens after which a feature is dead. A name
may end in variants that the library offers itself: "eai-sparsify, skip, sign" (VARIANTS).

`python -m benchmarks.peers worker` obeys the JSON lines of `benchmarks.peer_worker.run_worker`.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from benchmarks.peer_worker import Peer, Work, run_worker

NAMES = ("sae-lens", "dictionary-learning", "eai-sparsify")
VARIANTS = {"sae-lens": (), "dictionary-learning": (), "eai-sparsify": ("skip", "sign")}
"""What may follow a name. SAELens has skip transcoders too, but to load and run: none of its trainers makes one."""


def make(name: str, work: Work, x: Tensor, y: Tensor) -> Peer:
    """The named peer, initialised. x [rows, d_source], y [rows, d_target]: a sample, for what is set from data."""
    if work.d_source != work.d_target:
        raise ValueError(f"the peers' dictionaries have one width: d_source {work.d_source}, d_target {work.d_target}")
    library, *variants = name.split(", ")
    if not set(variants) <= set(VARIANTS.get(library, ())):
        raise ValueError(f"no peer {name!r}; there are, with their variants, {VARIANTS}")
    torch.manual_seed(work.seed)
    if library == "sae-lens":
        return SaeLens(work)
    if library == "dictionary-learning":
        return DictionaryLearning(work)
    if library == "eai-sparsify":
        return Sparsify(work, x, y, skip="skip" in variants, sign="sign" in variants)
    raise ValueError(f"no peer {name!r}; there are {NAMES}")


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in (*NAMES, "torch")}


class SaeLens:
    """SAELens: `MatryoshkaBatchTopKTrainingSAE` under its own `SAETrainer.step`.

    Patched: the squared error of every prefix and the AuxK residual are against y, which a subclass holds for the
    length of one step; `apply_b_dec_to_input=False` is the library's own switch for the pre-bias.
    Its defaults: b_dec starts at zero, not from data; W_enc = W_dec.T with rows of norm 0.1; selection over the batch
    by activation times decoder norm, and so no projection or renormalisation; the sum (not the mean) of the
    prefixes' errors; gradient norm clipped at 1; Adam(0.9, 0.999); threshold rate 0.01; float32 without autocast.
    AuxK: the min(d_target / 2, dead) strongest dead pre-activations (not rectified) of the whole dictionary fit the
    residual, weight 1 * min(dead / (d_target / 2), 1), not normalised (`use_matryoshka_aux_loss=False`). Dead: not
    selected in more than `dead_feature_window` steps, here dead_after_tokens / batch.
    """

    nested = True

    def __init__(self, work: Work) -> None:
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.sae import TrainStepInput, mse_loss

        class Transcoder(sae_lens.MatryoshkaBatchTopKTrainingSAE):
            target: Tensor

            def calculate_aux_loss(self, step_input: TrainStepInput, **rest: Tensor) -> dict[str, Tensor]:
                return super().calculate_aux_loss(replace(step_input, sae_in=self.target), **rest)

        sizes = {"d_in": work.d_source, "d_sae": work.features, "matryoshka_widths": [*accumulate(work.group_sizes)]}
        config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(**sizes, k=work.k, apply_b_dec_to_input=False)
        self._sae = Transcoder(config)
        self._sae.mse_loss_fn = lambda reconstruction, _: mse_loss(reconstruction, self._sae.target)
        schedule = SAETrainerConfig(
            total_training_samples=work.steps * work.batch,
            train_batch_size_samples=work.batch,
            lr=work.lr,
            lr_end=work.lr,  # not read by the constant schedule, but wanted
            lr_warm_up_steps=work.warmup_steps,
            lr_decay_steps=work.decay_steps,
            dead_feature_window=work.dead_after_tokens // work.batch,
        )
        self._trainer = sae_lens.SAETrainer(cfg=schedule, sae=self._sae, data_provider=iter(()))
        self._forced = slice(work.features, None)

    def step(self, x: Tensor, y: Tensor) -> None:
        self._trainer.n_forward_passes_since_fired[self._forced] = torch.inf
        self._sae.target = y
        self._trainer.maybe_reset_sparsity()  # as its `fit` does around each step
        self._trainer.step(x)
        self._trainer.n_training_steps += 1

    def force_dead(self, features: int) -> None:
        self._forced = slice(self._sae.cfg.d_sae - features, None)

    def export(self) -> dict[str, Tensor]:
        sae = self._sae
        return _exported(sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec, sae.W_dec.norm(dim=-1))


class DictionaryLearning:
    """dictionary_learning: `MatryoshkaBatchTopKTrainer.update` with y as its batch.

    Patched: `encode` reads x (held by a subclass for the length of one step) and does not subtract b_dec, which is
    initialised by the library's geometric median of its first batch, hence of y; `dead_feature_threshold`, fixed at
    10,000,000 tokens in the library, is Work's; `nnsight`, which only its activation buffer needs, is a stand-in.
    Its defaults: W_enc = W_dec.T with unit rows; selection over the batch; group weights 1/n, then averaged over the n
    groups again, so that the error weighs 1/n of the mean over prefixes; the decoder's gradient is projected, the
    gradient norm clipped at 1, the decoder renormalised; Adam(0.9, 0.999); threshold decay 0.999 from step 1000.
    AuxK: the min(d_target / 2, dead) strongest rectified activations of dead features fit the residual, normalised by
    its variance, weight 1/32. Dead: not selected for dead_after_tokens tokens, the present batch included.
    """

    nested = True

    def __init__(self, work: Work) -> None:
        stand_in = types.ModuleType("nnsight")
        stand_in.LanguageModel = object
        sys.modules.setdefault("nnsight", stand_in)
        from dictionary_learning.trainers import matryoshka_batch_top_k as library

        class Transcoder(library.MatryoshkaBatchTopKSAE):
            source: Tensor

            def encode(self, y: Tensor, return_active: bool, use_threshold: bool) -> tuple[Tensor, Tensor, Tensor]:
                """The library's, less `- b_dec` and the branches that its training does not take."""
                assert return_active and not use_threshold
                rectified = nn.functional.relu(self.source @ self.W_enc + self.b_enc)  # [batch, features]
                top = rectified.flatten().topk(self.k * len(y), sorted=False, dim=-1)
                acts = torch.zeros_like(rectified.flatten()).scatter_(-1, top.indices, top.values)
                acts = acts.reshape(rectified.shape)
                acts[:, self.group_indices[self.active_groups] :] = 0
                return acts, acts.sum(0) > 0, rectified

        class Trainer(library.MatryoshkaBatchTopKTrainer):
            forced = slice(work.features, None)

            def get_auxiliary_loss(self, residual: Tensor, rectified: Tensor) -> Tensor:
                """The library's; here and not before the step, because it counts this batch's firings first."""
                self.num_tokens_since_fired[self.forced] = self.dead_feature_threshold
                return super().get_auxiliary_loss(residual, rectified)

        fractions = [Fraction(size, work.features) for size in work.group_sizes]  # exact: the library truncates
        sizes = {"activation_dim": work.d_target, "dict_size": work.features, "group_fractions": fractions}
        rate = {"lr": work.lr, "warmup_steps": work.warmup_steps, "decay_start": work.steps - work.decay_steps}
        about = {"seed": work.seed, "layer": 0, "lm_name": "none", "device": "cpu", "dict_class": Transcoder}
        self._trainer = Trainer(steps=work.steps, k=work.k, **sizes, **rate, **about)
        self._trainer.dead_feature_threshold = work.dead_after_tokens
        self._steps = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        self._trainer.ae.source = x
        self._trainer.update(self._steps, y)
        self._steps += 1

    def force_dead(self, features: int) -> None:
        self._trainer.forced = slice(self._trainer.ae.dict_size - features, None)

    def export(self) -> dict[str, Tensor]:
        ae = self._trainer.ae
        return _exported(ae.W_enc.T, ae.b_enc, ae.W_dec, ae.b_dec, torch.ones(ae.dict_size))


class Sparsify:
    """sparsify: `SparseCoder(transcode=True).forward` in a transcription of the step in `Trainer.fit`.

    Its trainer only runs around a language model, hence the transcription. The coder is not patched, it transcodes of
    itself: TopK per token, no pre-bias, W_dec = 0 at first, the encoder's bias minus the pre-activation of the mean x,
    b_dec the mean y (here of the sample, in the library of the first batch). For a transcoder it neither normalises the
    decoder nor projects its gradient; it never clips.
    Chosen: Adam (the library's option) so that the rates compare, Work's schedule instead of a linear decay from the
    warm-up on, `auxk_alpha=1/32` (its default is 0, which is no AuxK). The variant "sign" is its default optimizer as
    it sets it up, SignSGD made schedule-free with momentum 0.95, which has no schedule; what it averaged is exported.
    The variant "skip" is `skip_connection=True`, an affine map of x that starts at zero.
    Left out: `float32_matmul_precision("high")`, so that all contenders compute alike. The decoder is its Triton kernel
    on a GPU, its eager one (`embedding_bag`) on a CPU.
    Loss: squared error over the variance of y in the batch. AuxK: the min(d_target / 2, dead) strongest rectified
    activations of dead features fit the residual, over the same variance, times min(dead / (d_target / 2), 1). The
    fused encoder drops that branch's gradient, so AuxK trains the decoder rows of dead features, never their encoder.
    Dead: not selected for more than dead_after_tokens tokens, as of the step before.
    """

    nested = False

    def __init__(self, work: Work, x: Tensor, y: Tensor, skip: bool, sign: bool) -> None:
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD

        config = SparseCoderConfig(num_latents=work.features, k=work.k, transcode=True, skip_connection=skip)
        self._coder = SparseCoder(work.d_source, config, dtype=torch.float32)
        self._coder.encoder.bias.data = -x.mean(0) @ self._coder.encoder.weight.data.T
        self._coder.b_dec.data = y.mean(0)
        self._scheduler = None
        if sign:
            self._optimizer = ScheduleFreeWrapper(SignSGD(self._coder.parameters(), lr=work.lr), momentum=0.95)
            self._optimizer.train()
        else:
            self._optimizer = torch.optim.Adam(self._coder.parameters(), lr=work.lr)
            self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, partial(_rate, work))
        self._silent_tokens = torch.zeros(work.features, dtype=torch.long)
        self._dead_after = work.dead_after_tokens
        self._auxk_alpha = 1 / 32
        self._forced = slice(work.features, None)

    def step(self, x: Tensor, y: Tensor) -> None:
        self._silent_tokens[self._forced] = self._dead_after + 1
        variance = (y - y.mean(0)).pow(2).sum()
        out = self._coder(x=x, y=y, dead_mask=self._silent_tokens > self._dead_after, total_variance=variance)
        fired = torch.zeros_like(self._silent_tokens, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + self._auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._scheduler is not None:
            self._scheduler.step()
        self._silent_tokens += len(x)
        self._silent_tokens[fired] = 0

    def force_dead(self, features: int) -> None:
        self._forced = slice(self._coder.num_latents - features, None)

    def export(self) -> dict[str, Tensor]:
        coder, encoder = self._coder, self._coder.encoder
        if self._scheduler is None:
            self._optimizer.eval()  # from the weights that gradients are taken at to their average
        exported = _exported(encoder.weight, encoder.bias, coder.W_dec, coder.b_dec, torch.ones(coder.num_latents))
        if coder.W_skip is not None:
            exported["W_skip"] = coder.W_skip.detach().clone()
        if self._scheduler is None:
            self._optimizer.train()
        return exported


def _rate(work: Work, step: int) -> float:
    """Factor on the learning rate before the step of this index."""
    return min((step + 1) / max(work.warmup_steps, 1), 1.0, (work.steps - step) / max(work.decay_steps, 1))


def _exported(w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, rank_scale: Tensor) -> dict[str, Tensor]:
    named = {"W_enc": w_enc, "b_enc": b_enc, "W_dec": w_dec, "b_dec": b_dec, "rank_scale": rank_scale}
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in named.items()}


if __name__ == "__main__":
    if sys.argv[1:] != ["worker"]:
        raise SystemExit("usage: python -m benchmarks.peers worker")
    run_worker(make)
