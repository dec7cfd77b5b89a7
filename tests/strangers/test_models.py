"""Models as strangers bring them: saved by transformers, then broken as copies, clones and other tools break them.

`check_model` says what is wrong in one line, from headers and sizes alone.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import psutil
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from mtc.config import ConfigError, ModelConfig
from mtc.errors import MtcError
from mtc.language_model import LanguageModel, ModelError, check_model, describe_model, load_tokenizer, pack_windows
from mtc.language_model.weights import loading

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 134664\n"
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300,
    "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip


def save_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<bos>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>").save_pretrained(directory)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model of an architecture by the class `kind`, in one file or in shards, as `save_pretrained` writes it."""
    made: dict[str, Path] = {}

    def save(architecture: str = "llama", kind: Any = AutoModelForCausalLM, shards: bool = False, **shape: Any) -> Path:
        key = f"{architecture}-{kind.__name__}-{shards}-{len(shape)}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("saved") / "model"
            torch.manual_seed(0)
            wide = {} if architecture == "gpt2" else {"intermediate_size": 64}
            model = kind.from_config(AutoConfig.for_model(architecture, **SHAPE | wide | shape))
            model.save_pretrained(made[key], max_shard_size="40KB" if shards else "1GB")
            save_tokenizer(made[key])
        return made[key]

    return save


@pytest.fixture
def copy(saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(*arguments: Any, **options: Any) -> Path:
        return Path(shutil.copytree(saved(*arguments, **options), tmp_path / "model"))

    return make


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory: Path, error: type[MtcError] = ModelError, **more: Any) -> str:
    """The one line in which a model is refused."""
    with pytest.raises(error) as caught:
        check_model(ModelConfig(name=str(directory), layer=1), **more)
    assert caught.value.permanent
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("shards", [False, True])
def test_what_transformers_saves_passes(saved: Callable[..., Path], architecture: str, shards: bool) -> None:
    directory = saved(architecture, shards=shards)
    assert len(list(directory.glob("*.safetensors"))) > 1 or not shards
    assert check_model(ModelConfig(name=str(directory), layer=1))[:5] == (architecture, 3, 32, 64, 300)
    LanguageModel(ModelConfig(name=str(directory), layer=1))


def test_what_is_tied_renamed_or_left_over_from_older_versions_passes(copy: Callable[..., Path]) -> None:
    directory = copy("gpt2")

    def as_published(weights: dict[str, torch.Tensor]) -> None:
        """The names of the file on the hub, which holds constants too, and no head: that is the embedding."""
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        for i in range(3):
            weights[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
            weights[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)

    change_weights(directory, as_published)
    check_model(ModelConfig(name=str(directory), layer=1))
    LanguageModel(ModelConfig(name=str(directory), layer=1), full=True)


def test_special_tokens_that_no_text_becomes_need_no_row(copy: Callable[..., Path]) -> None:
    """GPT-2 with the [PAD] that many add for their batches, the embedding as it was."""
    directory = copy()
    config = ModelConfig(name=str(directory), layer=1)
    tokenizer = load_tokenizer(config)
    tokenizer.add_tokens([f"<row {i}>" for i in range(300 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(directory)
    assert tokenizer.pad_token_id == 300
    check_model(config)
    tokenizer.add_special_tokens({"bos_token": "[BOS]"})
    tokenizer.save_pretrained(directory)
    assert "'[BOS]' (id 301) has none" in refused(directory)


def cut(directory: Path, name: str = "model.safetensors", bytes_: int = -1000) -> None:
    path = directory / name
    os.truncate(path, path.stat().st_size + bytes_ if bytes_ < 0 else bytes_)


def point(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(POINTER)


def forget(*names: str) -> Callable[[Path], object]:
    return lambda directory: [(directory / name).unlink() for name in names]


def configure(**values: Any) -> Callable[[Path], object]:
    return lambda directory: change_json(directory / "config.json", **values)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda directory: change_weights(directory, change)


def only_pickle(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def only_adapter(directory: Path) -> None:
    (directory / "config.json").rename(directory / "adapter_config.json")


def only_in_python(directory: Path) -> None:
    (directory / "tokenizer.json").rename(directory / "vocab.txt")
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')


def add_tokens(directory: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(name=str(directory), layer=1))
    tokenizer.add_tokens([f"<extra {i}>" for i in range(60)])
    tokenizer.save_pretrained(directory)


MLP = "model.layers.1.mlp.up_proj.weight"
GPTQ = {"bits": 4, "group_size": 128, "quant_method": "gptq", "desc_act": False, "sym": True}
BNB = {"_load_in_4bit": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (cut, r"model\.safetensors is cut short or damaged, \d+,\d{3} bytes of \d+,\d{3}"),
    (lambda d: cut(d, bytes_=5), r"model\.safetensors is cut short or damaged, 5 bytes"),
    (lambda d: cut(d, bytes_=0), r"model\.safetensors is cut short or damaged, 0 bytes"),
    (lambda d: (d / "model.safetensors").write_bytes(b"<!doctype html>" * 99), "is cut short or damaged, 1,485 bytes"),
    (forget("model.safetensors"), r"holds no weights: there is neither model\.safetensors nor model\.safetensors\.ind"),
    (only_pickle, r"pytorch_model\.bin, a pickle, which is not read: .* save_pretrained writes safetensors"),
    (only_adapter, r"is a PEFT adapter \(adapter_config\.json\), .* merge_and_unload"),
    (point("model.safetensors"), r"model\.safetensors is a Git LFS pointer, .* `git lfs pull`"),
    (point("config.json"), r"config\.json is a Git LFS pointer"),
    (point("tokenizer.json"), r"tokenizer\.json is a Git LFS pointer"),
    (configure(hidden_size=48), r"shape \[300, 32\], by config\.json it would be \[300, 48\] \(hidden_size=48\)"),
    (configure(num_hidden_layers=2), r"num_hidden_layers=2\) has no place for: model\.layers\.2\.\S+, .* and 6 more"),
    (configure(num_hidden_layers=4), r"has no weights for model\.layers\.3\.\S+, .* and 6 more"),
    (configure(model_type="gpt2"), "hidden_act='silu', which nothing reads in a model of type gpt2; "),
    (configure(vocab_size=400), r"has the shape \[300, 32\], by config\.json it would be \[400, 32\]"),
    (configure(model_type=None), "model_type=None"),
    (configure(hidden_size="32"), r"config\.json can't be used: .*'hidden_size' expected int, got str \(value: '32'\)"),
    (configure(num_attention_heads=0), r"config\.json can't be used: ZeroDivisionError"),
    (configure(num_attention_heads=5), "is not a multiple of the number of attention heads"),
    (configure(num_key_value_heads=3), "describes no model|weights and config.json differ"),
    (configure(hidden_act="nosuch"), "describes no model: .*nosuch"),
    (lambda d: (d / "config.json").write_text('{"model_type": "llama"'), r"config\.json is no JSON: .* line 1 column"),
    (lambda d: (d / "config.json").write_text('["llama"]'), r"config\.json is no JSON object but list"),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe{\x00}"), r"config\.json is no JSON"),
    (configure(quantization_config=GPTQ), r"quantization_config \(gptq\): quantised weights are not read"),
    (configure(quantization_config=BNB), r"quantization_config \(bitsandbytes\)"),
    (configure(quantization_config={"load_in_8bit": True}), r"quantization_config \(no quant_method\)"),
    (weights(lambda w: w.pop(MLP)), rf"has no weights for {MLP}$"),
    (weights(lambda w: w.update({MLP: w[MLP].to(torch.float8_e4m3fn)})), rf"{MLP} has the dtype F8_E4M3"),
    (weights(lambda w: w.update({MLP: w[MLP].to(torch.int8)})), rf"{MLP} has the dtype I8"),
    (weights(lambda w: w.update({MLP: w[MLP][:32].clone()})), rf"{MLP} has the shape \[32, 32\], .* \[64, 32\]"),
    (weights(lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
     r"has no place for: model\.layers\.0\.self_attn\.q_norm\.weight"),
    (forget("tokenizer.json", "tokenizer_config.json"), r"holds no tokenizer: there is no tokenizer\.json"),
    (forget("tokenizer.json"), r"holds no tokenizer"),
    (lambda d: cut(d, "tokenizer.json", 500), "the tokenizer can't be read: JSONDecodeError"),
    (lambda d: (d / "tokenizer.json").write_text("{}"), "the tokenizer can't be read"),
    (only_in_python, r"has a tokenizer in Python only \(ByT5Tokenizer\)"),
    (add_tokens, r"the tokenizer has 317 tokens, the embedding 300 rows \(vocab_size\): '<extra 43>' \(id 300\)"),
]  # fmt: skip


@pytest.mark.parametrize(("breaks", "words"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_model_is_refused_in_one_line(
    copy: Callable[..., Path], breaks: Callable[[Path], object], words: str
) -> None:
    directory = copy()
    breaks(directory)
    message = refused(directory)
    assert str(directory) in message
    assert re.search(words, message), message


def test_shards(copy: Callable[..., Path]) -> None:
    directory = copy(shards=True)
    first, *others = sorted(path.name for path in directory.glob("*.safetensors"))
    kept = (directory / first).read_bytes()
    cut(directory, first)
    assert f"{first} is cut short" in refused(directory)
    (directory / first).write_text(POINTER)
    assert f"{first} is a Git LFS pointer" in refused(directory)
    (directory / first).unlink()
    assert f"names {len(others) + 1} files, of which 1 are missing: {first}" in refused(directory)
    (directory / first).write_bytes(kept)
    shutil.copy(directory / others[0], directory / first)  # what a mistaken download leaves
    assert "has no weights for " in refused(directory)
    (directory / "model.safetensors.index.json").write_text('{"weight_map": []}')
    assert "names no files: weight_map=[]" in refused(directory)


def test_other_kinds_of_models(saved: Callable[..., Path]) -> None:
    message = refused(saved(kind=AutoModelForSequenceClassification, pad_token_id=0))
    assert message.endswith(
        "has no weights for lm_head.weight; it is no causal language model (config.json says "
        "LlamaForSequenceClassification)"
    )
    assert "(config.json says LlamaModel)" in refused(saved(kind=AutoModel))
    check_model(ModelConfig(name=str(saved("gpt2", kind=AutoModel)), layer=1))  # its head is its embedding


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_context_longer_than_the_positions(saved: Callable[..., Path], architecture: str) -> None:
    directory = saved(architecture)
    check_model(ModelConfig(name=str(directory), layer=1), context_length=64)
    message = refused(directory, ConfigError, context_length=65)
    assert message == (f"data.context_length=65 is too long: {directory} knows 64 positions (max_position_embeddings)")


def test_twenty_gigabytes_are_not_read(tmp_path: Path) -> None:
    """The file's header is that of a model of its size; its data is a hole, which would be read as zeros."""
    config = AutoConfig.for_model(
        "llama", vocab_size=32_000, hidden_size=5120, intermediate_size=13_824, num_hidden_layers=32,
        num_attention_heads=40, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with torch.device("meta"):
        shapes = {n: list(t.shape) for n, t in AutoModelForCausalLM.from_config(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(file, whole := 8 + len(head) + end)
    assert whole > 20e9
    before = psutil.Process().memory_info().rss
    assert check_model(ModelConfig(name=str(tmp_path), layer=1)).num_layers == 32
    assert psutil.Process().memory_info().rss - before < 0.5e9, "of pages that are read, too"
    os.truncate(file, whole - 1)
    assert f"{whole - 1:,} bytes of {whole:,}" in refused(tmp_path)


# GGUF ---------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, tokens: int = 3, rows: int = 3, width: int = 32, layers: int = 2, kind: Any = None) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(32)
    writer.add_context_length(64)
    if tokens:
        writer.add_token_list([f"{i}".encode() for i in range(tokens)])
    for name in ("token_embd.weight", "blk.0.attn_norm.weight", "blk.1.attn_norm.weight"):
        writer.add_tensor(name, np.zeros((rows, width), np.int8 if kind else np.float32), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    config = ModelConfig(name=str(tmp_path), gguf_file="m.gguf", layer=1)

    def refused(**options: Any) -> str:
        write_gguf(file, **options)
        with pytest.raises(ModelError) as caught:
            check_model(config)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    write_gguf(file)
    assert check_model(config)[:5] == ("llama", 2, 32, 64, 3)
    with pytest.raises(ConfigError, match=r"data\.context_length=65 is too long: .* 64 positions"):
        check_model(config, context_length=65)
    assert "its tokenizer has 4 tokens, the embedding 3 rows" in refused(tokens=4)
    assert "its tokenizer has 0 tokens" in refused(tokens=0)
    assert "has no weights for blk.2, token_embd.weight" in refused(layers=3)
    assert "token_embd.weight is 16 wide, llama.embedding_length=32" in refused(width=16)
    assert "has tensors of the type I8, which the gguf package does not read" in refused(
        kind=gguf.GGMLQuantizationType.I8
    )
    write_gguf(file)
    whole = file.stat().st_size
    os.truncate(file, whole - 40)  # the last tensor is padded to 32 bytes
    with pytest.raises(ModelError, match=rf"m\.gguf is cut short: {whole - 40:,} bytes of [\d,]+$"):
        check_model(config)
    file.write_text(POINTER)
    with pytest.raises(ModelError, match=r"m\.gguf is a Git LFS pointer"):
        check_model(config)


# What the headers do not tell, where the model is loaded --------------------------------------------------------------


def test_weights_that_are_not_finite(copy: Callable[..., Path]) -> None:
    directory = copy()
    change_weights(directory, lambda w: w[MLP].view(-1)[7:8].fill_(torch.nan))
    check_model(config := ModelConfig(name=str(directory), layer=1))
    with pytest.raises(
        ModelError, match=rf"{MLP.removeprefix('model.')} has values that are not finite in torch\.float32"
    ):
        LanguageModel(config.model_copy(update={"dtype": "float32"}))


def test_a_model_that_is_removed_after_the_check(copy: Callable[..., Path]) -> None:
    directory = copy()
    check_model(config := ModelConfig(name=str(directory), layer=1))
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        LanguageModel(config)
    shutil.rmtree(directory)
    for load in (LanguageModel, load_tokenizer):
        with pytest.raises(ModelError, match=str(directory)) as caught:
            load(config)
        assert caught.value.permanent and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        (OSError(5, "Input/output error"), False),
        (OSError(116, "Stale file handle"), False),
        (ConnectionResetError("reset by peer"), False),
        (hub_errors.LocalEntryNotFoundError("offline"), False),
        (FileNotFoundError(2, "No such file"), True),
        (PermissionError(13, "Permission denied"), True),
        (OSError("no file named model.safetensors"), True),
    ],
)
def test_only_what_may_pass_is_tried_again(error: OSError, permanent: bool) -> None:
    with pytest.raises(ModelError) as caught, loading(ModelConfig(name="m", layer=0)):
        raise error
    assert caught.value.permanent == permanent


def test_a_gguf_file_is_read_to_the_end(tmp_path: Path) -> None:
    """From the file to activations: what is converted passes the checks of every model that is loaded."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<bos>"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000)
    writer.add_context_length(64)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    shapes = {"token_embd": (len(letters), 32), "output": (len(letters), 32), "output_norm": (32,)}
    for layer in ("blk.0", "blk.1"):
        shapes |= {f"{layer}.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
        shapes |= {f"{layer}.ffn_gate": (64, 32), f"{layer}.ffn_up": (64, 32), f"{layer}.ffn_down": (32, 64)}
        shapes |= {f"{layer}.attn_norm": (32,), f"{layer}.ffn_norm": (32,)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    config = ModelConfig(name=str(tmp_path), gguf_file="m.gguf", layer=1, dtype="float32")
    info = check_model(config)
    assert info == describe_model(config) and info[:5] == ("llama", 2, 32, 64, 258)
    window = load_tokenizer(config)("bac")["input_ids"]
    found = LanguageModel(config, full=True).logits(pack_windows([window], ()))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(weight.bfloat16())  # as it is kept
        wanted = theirs(torch.tensor([window])).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
