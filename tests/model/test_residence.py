"""A base that stays on disk: equal to the resident one bit for bit, and never more than a block of it in memory."""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import DECODERS, ENCODER_DECODERS, ENCODERS, assert_equal, save_pico, task_of
from architectures import load_pico as load
from conftest import adapted, llama_config, make_batches
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode
from transformers import Gemma3nTextConfig, JambaConfig, LlamaForCausalLM, PreTrainedConfig, ZambaConfig

from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.errors import UserError
from sgm_finetune.measure.probe import probe
from sgm_finetune.model.architecture import check_model
from sgm_finetune.model.residence import store
from sgm_finetune.model.residence.host import differentiable
from sgm_finetune.model.residence.part_file import map_part, write_part
from sgm_finetune.model.residence.window import are_mapped, slide_over, spans_of
from sgm_finetune.train.adapters.shard import reduce_factors_only
from sgm_finetune.train.fast import head_loss
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.head_loss import cross_entropy_in_parts

PLAIN, CONVERTED, PACKED = ("float32", "none"), ("bfloat16", "none"), ("bfloat16", "nf4")
"""A base whose own files hold what the kernels read; one in another type; one in 4 bits."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SGM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def a_step(model: nn.Module, name: str, checkpointing: bool) -> dict[str, Tensor]:
    """The loss and every gradient of one step, after an evaluation."""
    torch.manual_seed(4)
    model = adapted(model, fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()))
    use_fast_step(model)
    batch = make_batches(task="causal-lm" if task_of(name) != "sequence-classification" else task_of(name))[0]
    model.eval()
    with torch.no_grad():
        tested = model(**batch).loss
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients
    return {"tested": tested, "loss": loss.detach(), **gradients}


def resident_step(name: str, form: tuple[str, str], checkpointing: bool, place: Path) -> tuple[Path, dict[str, Tensor]]:
    """The folder of a saved model, and a step of it with the base in memory. Skips a test that cannot be."""
    folder = save_pico(name, place / name)
    resident = load(folder, name, form, "device")
    if checkpointing and not resident.supports_gradient_checkpointing:
        pytest.skip("no checkpointing")
    return folder, a_step(resident, name, checkpointing)


QUICK = {("llama", PACKED, True), ("bert", CONVERTED, False), ("t5", PLAIN, True), ("mixtral", CONVERTED, False)}


def cases() -> Iterator[Any]:
    for name in (*DECODERS, *ENCODERS, *ENCODER_DECODERS):
        for form in (PLAIN, CONVERTED, PACKED):
            for way in (False, True):
                marks = [] if (name, form, way) in QUICK else [pytest.mark.slow]
                if name != "deberta" or form == PLAIN:  # Transformers' code mixes its types
                    yield pytest.param(name, form, way, id=f"{name}-{'-'.join(form)}-{way}", marks=marks)


_LLAMA_LIKE = {
    "vocab_size": 32, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2, "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
_MAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
UNEVEN: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "jamba": (JambaConfig, {"num_hidden_layers": 4, "num_experts": 2, **_MAMBA}),
    "zamba": (ZambaConfig, {"num_hidden_layers": 6, "n_mamba_heads": 2, **_MAMBA}),
    "gemma3n": (
        Gemma3nTextConfig,
        {
            "num_hidden_layers": 4, "head_dim": 8, "num_kv_shared_layers": 0, "laurel_rank": 4,
            "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 32, "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4, "layer_types": ["full_attention"] * 4,
            "intermediate_size": [64, 64, 128, 128],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("zamba", CONVERTED),
        *(
            pytest.param(name, form, marks=pytest.mark.slow)
            for name, form in [("zamba", PACKED), ("jamba", CONVERTED), ("jamba", PACKED), ("gemma3n", CONVERTED)]
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_blocks_may_differ_share_parameters_and_stand_beside_numbered_layers(name, form, tmp_path, cache, monkeypatch):
    """Blocks of attention and of Mamba, with and without experts; one attention in several blocks; MLPs of two widths
    and a list of linear layers."""
    kind, settings = UNEVEN[name]
    monkeypatch.setitem(DECODERS, name, lambda: kind(**_LLAMA_LIKE | settings))
    folder = save_pico(name, tmp_path / name)
    expected = a_step(load(folder, name, form, "device"), name, False)
    assert_equal(expected, a_step(load(folder, name, form, "disk"), name, False))
    assert_equal(expected, a_step(load(folder, name, form, "disk"), name, False))
    host = load(folder, name, form, "host")
    with differentiable(host):
        assert_equal(expected, a_step(host, name, False))


@pytest.mark.parametrize(("name", "form", "checkpointing"), list(cases()))
def test_loss_and_every_gradient_are_those_of_the_resident_base(name, form, checkpointing, tmp_path, cache):
    """ALBERT has one block, used twice; an encoder-decoder's blocks differ in shape; Mixtral's files are converted."""
    folder, expected = resident_step(name, form, checkpointing, tmp_path)
    assert_equal(expected, a_step(load(folder, name, form, "disk"), name, checkpointing))  # the store is made
    assert_equal(expected, a_step(load(folder, name, form, "disk"), name, checkpointing))  # and used


@pytest.mark.parametrize(("name", "form", "checkpointing"), list(cases()))
def test_a_base_in_the_hosts_memory_gives_the_same(name, form, checkpointing, tmp_path, cache):
    """Without a GPU the buffers are in the same memory; the copies, hooks and places are those of a GPU."""
    folder, expected = resident_step(name, form, checkpointing, tmp_path)
    host = load(folder, name, form, "host")
    with nullcontext() if checkpointing else differentiable(host):
        assert_equal(expected, a_step(host, name, checkpointing))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pico("llama", tmp_path_factory.mktemp("models") / "llama")


def files_of(cache: Path) -> list[Path]:
    return sorted(cache.glob("bases/*/*.safetensors"))


def test_blocks_embeddings_and_output_layer_are_views_of_files(llama, cache):
    said: list[str] = []
    model = load(llama, "llama", CONVERTED, "disk", said)
    parts = [p for n, p in model.named_parameters() if ".layers." in n or "embed" in n or "lm_head" in n]
    assert len(parts) > 10
    assert are_mapped(parts)
    assert [path.stem for path in files_of(cache)] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
    ]
    assert all(p.data_ptr() % 64 == 0 for p in parts)
    assert len(said) == 1
    assert f"to {files_of(cache)[0].parent} (once" in said[0]
    load(llama, "llama", CONVERTED, "disk", said)
    assert len(said) == 1


@pytest.mark.parametrize("place", ["disk", "host"])
@pytest.mark.parametrize("name", ["gemma3", "t5", "bart"])
def test_a_tied_matrix_that_the_files_hold_twice_is_one_matrix(name, place, tmp_path, cache, caplog):
    """Transformers must not compare the two where their numbers are elsewhere."""
    folder = save_pico(name, tmp_path / name)
    expected = load(folder, name, CONVERTED, place)
    tied, weights = expected.all_tied_weights_keys, load_file(folder / "model.safetensors")
    assert tied
    for copy, source in tied.items():
        kept = weights[source if source in weights else copy]
        weights |= {copy: kept.clone(), source: kept.clone()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = load(folder, name, CONVERTED, place)
    assert model.all_tied_weights_keys == tied
    assert all(model.get_parameter(copy) is model.get_parameter(source) for copy, source in tied.items())
    assert "NOT tie" not in caplog.text
    batch = make_batches(task="causal-lm")[0]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected(**batch).logits)


@pytest.mark.parametrize("form", [PLAIN, PACKED], ids="-".join)
def test_blocks_embeddings_and_output_layer_are_in_the_hosts_memory(form, llama):
    """What is left of them in the model has one number each, and the right shape."""
    host, device = load(llama, "llama", form, "host"), load(llama, "llama", form, "device")
    large = {n: p for n, p in host.named_parameters() if ".layers." in n or "embed" in n or "lm_head" in n}
    assert len(large) > 10
    assert {p.untyped_storage().nbytes() // p.element_size() for p in large.values()} == {1}
    assert all(p.shape == device.get_parameter(n).shape for n, p in large.items())
    with torch.no_grad():
        host(**make_batches(task="causal-lm")[0])
    ends = [p for n, p in large.items() if ".layers." not in n]
    assert {p.untyped_storage().nbytes() // p.element_size() for p in ends} == {1}


def test_a_base_whose_files_hold_what_computes_needs_no_store(llama, cache):
    model = load(llama, "llama", PLAIN, "disk")
    assert are_mapped(p for n, p in model.named_parameters() if ".layers." in n)
    assert not files_of(cache)


def test_the_key_is_the_content(llama, tmp_path, cache):
    """A copy elsewhere has the same store; another type, and another model under the same name, have others."""
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    load(llama, "llama", CONVERTED, "disk")
    load(copy, "llama", CONVERTED, "disk")
    assert len(files_of(cache)) == 4
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    load(copy, "llama", CONVERTED, "disk")
    load(copy, "llama", PACKED, "disk")
    assert len({path.parent for path in files_of(cache)}) == 3


def test_a_store_continues_where_it_was_interrupted(llama, cache, monkeypatch):
    load(llama, "llama", CONVERTED, "disk")
    *ends, first, second = files_of(cache)
    first.unlink()
    kept = ends[0].stat().st_mtime_ns, second.stat().st_mtime_ns
    said: list[str] = []
    load(llama, "llama", CONVERTED, "disk", said)
    assert first.is_file()
    assert kept == (ends[0].stat().st_mtime_ns, second.stat().st_mtime_ns)
    assert "0.00 GiB" in said[0]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def claim_more(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def exchange(path: Path) -> None:
    write_part(path, {"model.layers.0.input_layernorm.weight": torch.ones(32)}, "another key")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damage, "is damaged"),
        (cut, "lies outside of it|is damaged"),
        (claim_more, "is no safetensors file"),
        (exchange, "belongs to another model"),
        (lambda path: path.write_bytes(b""), "is no safetensors file"),
    ],
)
def test_a_file_that_is_damaged_or_foreign_is_named(harm, said, llama, cache):
    load(llama, "llama", CONVERTED, "disk")
    harm(files_of(cache)[2])
    with pytest.raises(UserError, match=rf"layers.0.safetensors.*({said}).*delete .*, and SGM writes it again$"):
        load(llama, "llama", CONVERTED, "disk")


def test_a_full_disk_is_said_before_anything_is_written(llama, cache, monkeypatch):
    monkeypatch.setattr(store, "disk_free", lambda folder: 1000)
    with pytest.raises(UserError, match=r"take 0.00 GiB in .*, which has 0.00 GiB free; free some space.*SGM_CACHE"):
        load(llama, "llama", CONVERTED, "disk")
    assert not files_of(cache)


def test_a_disk_that_fills_up_leaves_no_half_file(llama, cache, monkeypatch):
    def fill(scratch: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sgm_finetune.base.files.sync", fill)
    with pytest.raises(
        UserError, match=r"^Cannot write .*: No space left on device; free some space.*residence=device$"
    ):
        load(llama, "llama", CONVERTED, "disk")
    assert not [path for path in cache.glob("bases/**/*") if path.is_file() and path.suffix != ".lock"][1:]


def test_a_file_system_that_cannot_map_is_said(tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("unable to mmap")

    write_part(tmp_path / "part.safetensors", {"w": torch.ones(3)}, "key")
    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    with pytest.raises(UserError, match="cannot map files into memory; choose another place with SGM_CACHE, or model"):
        map_part(tmp_path / "part.safetensors", "key")


@pytest.mark.parametrize(
    ("place", "changes", "gpu", "said"),
    [
        ("disk", {"quantization": "int8"}, False, "none or nf4, not int8"),
        ("host", {"quantization": "int8"}, True, "none or nf4, not int8"),
        ("disk", {}, True, "machines without a GPU"),
        ("host", {}, False, "machines with a GPU"),
    ],
)
def test_what_cannot_be_elsewhere_is_refused_before_it_is_loaded(place, changes, gpu, said, llama, monkeypatch):
    monkeypatch.setattr("sgm_finetune.base.device.has_gpu", lambda: gpu)
    config = ModelConfig(name=str(llama), task="causal-lm", residence=place, **changes)
    with pytest.raises(UserError, match=rf"^model.residence={place} .*{said}.*; set model.residence=device$"):
        check_model(config, llama)


def test_a_quantised_checkpoint_is_refused(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "gptq")
    described = json.loads((llama / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(described))
    config = ModelConfig(name="gptq", task="causal-lm", residence="disk")
    with pytest.raises(UserError, match=r"plain numbers, and those of this model are quantised; set model.residence"):
        check_model(config, tmp_path / "gptq")


def resident_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the mapped pages that hold the tensors and are in this process's memory (Linux)."""
    wanted = {
        span.first // mmap.PAGESIZE + at for span in spans_of(tensors) for at in range(span.length // mmap.PAGESIZE)
    }
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        return sum(mmap.PAGESIZE * (os.pread(pages.fileno(), 8, 8 * page)[7] >> 7) for page in wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_block_at_a_time_is_in_memory_forward_and_backward(checkpointing, tmp_path, cache):
    """Blocks are large enough here to have pages of their own. A hook of every block looks at all of them."""
    model = LlamaForCausalLM(llama_config(hidden_size=256, intermediate_size=512, num_hidden_layers=5))
    model.save_pretrained(tmp_path / "m")
    disk = load(tmp_path / "m", "llama", ("bfloat16", "none"), "disk")
    blocks = [list(block.parameters()) for block in disk.model.layers]  # type: ignore[union-attr]
    seen: list[list[int]] = []

    def look(*_: Any) -> None:
        seen.append([resident_bytes(block) for block in blocks])

    for block in disk.model.layers:  # type: ignore[union-attr]
        block.register_forward_hook(look)
        block.register_full_backward_hook(look)
    if checkpointing:
        disk.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    disk.train()
    disk.requires_grad_(False)
    ids = torch.arange(32)[None]
    inputs = disk.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]
    disk(inputs_embeds=inputs, labels=ids).loss.backward()
    size = sum(p.numel() * p.element_size() for p in blocks[0])
    assert len(seen) >= 10
    assert max(map(sum, seen)) <= 1.05 * size
    assert max(max(one) for one in seen) > 0.9 * size


def a_head_loss(weight: Tensor, seen: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """The loss of a few hidden states and its gradient; `seen` gets the resident bytes of `weight` at each product."""

    class Look(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if seen is not None and function is nn.functional.linear:
                seen.append(resident_bytes([weight]))
            return result

    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, weight.shape[1], generator=draw).to(weight.dtype).requires_grad_()
    with Look():
        loss = cross_entropy_in_parts(hidden, weight, torch.randint(0, len(weight), (9,), generator=draw))
    return loss.detach(), *torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_reads_the_output_layer_slice_by_slice(dtype, tmp_path, monkeypatch):
    """Its loss and gradient are those of the layer in memory. It is read twice here: for six rows, and for three."""
    monkeypatch.setattr(head_loss, "SLICE", {"cpu": 4096})
    monkeypatch.setattr(head_loss, "NUM_LOGITS", {"cpu": 6 * 4096})
    weight = torch.randn(20_000, 256).to(dtype)  # the last of five slices is smaller
    write_part(tmp_path / "part.safetensors", {"w": weight}, "key")
    mapped = map_part(tmp_path / "part.safetensors", "key")["w"]
    window = slide_over(nn.ModuleDict(), {}, [mapped])
    seen: list[int] = []
    for found, wanted in zip(a_head_loss(mapped, seen), a_head_loss(weight), strict=True):
        assert torch.equal(found, wanted)
    size, around = 4096 * 256 * dtype.itemsize, 2 * 2**21  # the system may map 2 MiB around a page that is read
    assert len(seen) == 2 * 5
    assert size / 2 < max(seen) < size + around < resident_bytes([weight])
    assert window.ends


def test_a_loss_reads_no_more_of_the_output_layer_than_its_slices(llama, cache):
    """The model's own logits are computed for no position."""
    model = load(llama, "llama", CONVERTED, "disk").requires_grad_(False)
    batch = make_batches(task="causal-lm")[0]
    in_parts = head_loss.find_head_loss(model, batch)
    assert in_parts is not None
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))  # type: ignore
    in_parts.mean(model, batch)
    assert sizes == [0]


def test_data_parallelism_leaves_a_base_on_disk_where_it_is(llama, cache):
    """Otherwise it copies the base into memory, and the pages that a window gives back are no longer the base's."""
    model = adapted(load(llama, "llama", CONVERTED, "disk"))
    base = [p for n, p in model.named_parameters() if ".layers." in n and "lora" not in n]
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        reduce_factors_only(model)  # type: ignore[arg-type]
        nn.parallel.DistributedDataParallel(model)
    finally:
        distributed.destroy_process_group()
    assert len(base) > 10
    assert are_mapped(base)


def test_a_file_is_mapped_as_long_as_a_window_gives_its_pages_back(tmp_path):
    """Otherwise other memory takes its place, which giving it back would make zero."""
    write_part(tmp_path / "part.safetensors", {"w": torch.ones(2**14)}, "key")
    mapped = map_part(tmp_path / "part.safetensors", "key")["w"]
    model = nn.ModuleDict({"block": nn.Identity()})
    slide_over(model, {"block": [mapped]}, [])
    first, path = mapped.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, str(tmp_path / "part.safetensors")
    del mapped
    assert maps_of(path)[0].startswith(f"{first:x}-")
    del model
    gc.collect()
    assert not maps_of(path)


def maps_of(path: str) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(path)]


def test_nothing_can_write_to_the_base(tmp_path, cache):
    """It would be lost with its page, and later numbers wrong."""
    tensor = torch.ones(2 * mmap.PAGESIZE)
    write_part(tmp_path / "part.safetensors", {"w": tensor}, "key")
    mapped = map_part(tmp_path / "part.safetensors", "key")["w"]
    slide_over(nn.ModuleDict({"block": nn.Identity()}), {"block": [mapped]}, [])
    assert torch.equal(mapped, tensor)
    (span,) = spans_of([mapped])
    ranges = [line.split()[:2] for line in Path("/proc/self/maps").read_text().splitlines()]
    assert "r--p" in [how for where, how in ranges if int(where.partition("-")[0], 16) == span.first]


def test_the_probe_finds_the_same_sketches(llama, cache):
    batches = make_batches(task="causal-lm")
    for form in (CONVERTED, PACKED):
        one, *others = (
            probe(load(llama, "llama", form, place), batches, sketch_size=8) for place in ("device", "disk", "host")
        )
        for other in others:
            assert one.loss == other.loss
            for name, halves in one.halves.items():
                for half, same in zip(halves, other.halves[name], strict=True):
                    assert torch.equal(half.input, same.input)
                    assert torch.equal(half.output, same.output)
