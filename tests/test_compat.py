"""Every touch of a library's private part is in the list of base/compat.py, and the parts do what SGM needs of them."""

from __future__ import annotations

import ast
import inspect
import io
import pickle
import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import adapted, make_batches, make_model
from fuzz_seeds import as_gguf
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

from sgm_finetune.base.compat import PRIVATE_PARTS, TRIED_WITH, PrivatePart
from sgm_finetune.base.config import ModelConfig
from sgm_finetune.base.untrusted import Rehearsal, read_torch
from sgm_finetune.measure.probe import readers_of_same_activations
from sgm_finetune.model.load import load_model, skeleton
from sgm_finetune.model.stand_ins import FUSED_ATTENTION, stand_in_kernels
from sgm_finetune.train.adapters.apply import lora_layers
from sgm_finetune.train.adapters.shard import reduce_factors_only
from sgm_finetune.train.budget.footprint import Footprint
from sgm_finetune.train.fast.adapter_forward import use_fast_step
from sgm_finetune.train.fast.gated_mlp import recompute_mlps
from sgm_finetune.train.fast.head_loss import find_head_loss

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "sgm_finetune"
TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "base" / "compat.py"
}
"""File -> its code. The list itself touches nothing."""
DOCUMENTED = {"_exit"}
"""Names of the standard library that begin with an underscore and are public."""
ACCESSORS = {"getattr", "setattr", "hasattr", "delattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def own_names(tree: ast.Module) -> set[str]:
    """The functions, classes, attributes and module variables that a file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def touches(file: str, tree: ast.Module) -> Iterator[str]:
    """The names of private parts of libraries that the code of a file uses."""
    own = own_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name):
                if is_private(name) and not (is_self(value) and name in own):
                    yield name
                if name in ("__class__", "forward") and not isinstance(node.ctx, ast.Load):
                    yield name
            case ast.Call(func=ast.Name(id=function), args=[_, ast.Constant(value=str(name)), *_]):
                if function in ACCESSORS and (is_private(name) or name == "__class__"):
                    yield name
                if function in ("setattr", "delattr") and name == "forward":
                    yield name
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] not in ("sgm_finetune", "__future__"):
                yield from (alias.name for alias in node.names if is_private(alias.name))
                if any(is_private(part) for part in module.split(".")):
                    yield module.rpartition(".")[2]
            case ast.Import():
                for alias in node.names:
                    if any(is_private(part) for part in alias.name.split(".")):
                        yield alias.name.rpartition(".")[2]
            case ast.Constant(value=str(text)):
                if re.fullmatch(r"(ACCELERATE_USE|FSDP)_[A-Z]\w*", text):
                    yield text
            case ast.ClassDef():
                yield from overridden(file, node)


def overridden(file: str, definition: ast.ClassDef) -> Iterator[str]:
    """The private names of a library's class that our subclass defines again, on purpose or by accident."""
    members = [node for node in definition.body if isinstance(node, ast.FunctionDef)]
    assigned = [
        node
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value)
    ]
    names = {node.name for node in members} | {node.attr for node in assigned}
    names = {name for name in names if is_private(name)}
    if not names or not definition.bases:
        return
    found = getattr(import_module(f"sgm_finetune.{file.removesuffix('.py').replace('/', '.')}"), definition.name, None)
    if found is None:  # a class within a function; its super() calls are found by name
        return
    foreign = [base for base in found.__mro__ if base.__module__.partition(".")[0] not in ("sgm_finetune", "builtins")]
    for name in names:
        if any(name in vars(base) or re.search(rf"\bself\.{name}\b", source(base)) for base in foreign):
            yield name


def source(class_: type) -> str:
    try:
        return inspect.getsource(class_)
    except (OSError, TypeError):  # written in C
        return ""


def used_names(tree: ast.Module) -> set[str]:
    """The names that the code of a file contains, also as strings, without its docstrings and comments."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name) | ast.FunctionDef(name=name):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                for module in [alias.name for alias in aliases] + [getattr(node, "module", None) or ""]:
                    names.update(module.split("."))
            case ast.Constant(value=str(text)):
                names.add(text)
    return names


def last(part: PrivatePart) -> str:
    return part.part.rpartition(".")[2]


def test_every_touch_is_listed_for_its_file() -> None:
    listed = {(part.used_in, last(part)) for part in PRIVATE_PARTS}
    found = {(file, name) for file, tree in TREES.items() for name in touches(file, tree)}
    assert found - listed == set()
    assert len(found) > 30


def test_a_part_that_one_file_lists_is_listed_by_all_that_use_it() -> None:
    """So the list also covers names without an underscore, such as `quant_state`."""
    unmistakable = {last(part) for part in PRIVATE_PARTS} - {"forward", "__class__", "dispatch", "_get", "quant_type"}
    listed = {(part.used_in, last(part)) for part in PRIVATE_PARTS}
    used = {(file, name) for file, tree in TREES.items() for name in unmistakable & used_names(tree)}
    assert used - listed == set()


def test_every_listed_part_is_still_touched() -> None:
    gone = [part for part in PRIVATE_PARTS if last(part) not in used_names(TREES[part.used_in])]
    assert gone == []
    assert len({(part.used_in, part.part) for part in PRIVATE_PARTS}) == len(PRIVATE_PARTS)


def test_every_named_test_exists() -> None:
    for part in PRIVATE_PARTS:
        file, _, name = part.test.partition("::")
        functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")]
        assert name in functions, part


def test_the_scanner_finds_each_kind_of_touch() -> None:
    code = """
import torch._dynamo
from torch._C import Graph
from torch.nn import _reduction
def f(module, config):
    module.__class__ = dict
    module.forward = f
    config._private, getattr(config, "_by_name")
    setattr(module, "forward", f)
class Own:
    def __init__(self): self._mine = 1
    def read(self): return self._mine, self._theirs, super()._above
"""
    found = set(touches("x.py", ast.parse(code)))
    assert found == {
        "_dynamo", "_C", "_reduction", "__class__", "forward", "_private", "_by_name", "_theirs", "_above",
    }  # fmt: skip
    assert {"_clip_grad_norm", "_get_train_sampler", "_load_from_checkpoint"} <= set(
        overridden("train/trainer.py", class_definition("train/trainer.py", "SGMTrainer"))
    )


def class_definition(file: str, name: str) -> ast.ClassDef:
    return next(node for node in TREES[file].body if isinstance(node, ast.ClassDef) and node.name == name)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_versions_are_those_of_the_requirements() -> None:
    lines = (ROOT / "requirements" / "lock.txt").read_text().splitlines()
    pins = {line.partition("==")[0]: line.partition("==")[2] for line in lines if "==" in line and line[0] != "#"}
    libraries = {part.library for part in PRIVATE_PARTS}
    assert set(TRIED_WITH) == libraries
    assert {name: pins[name] for name in libraries - {"python"}} | {"python": TRIED_WITH["python"]} == TRIED_WITH
    assert project()["requires-python"] == f">={TRIED_WITH['python']}"


def test_every_touched_library_has_an_upper_bound_beyond_the_tried_version() -> None:
    lines = [
        *project()["dependencies"],
        *(line for extra in project()["optional-dependencies"].values() for line in extra),
    ]
    requirements = [Requirement(line) for line in lines]
    for library in set(TRIED_WITH) - {"python"}:
        found = [requirement for requirement in requirements if requirement.name == library]
        assert found, library
        for requirement in found:
            assert requirement.specifier.contains(TRIED_WITH[library]), requirement
            major, minor, *_ = Version(TRIED_WITH[library]).release
            assert not requirement.specifier.contains(f"{major}.{minor + 1}"), requirement


# What the parts must do, where no other test notices that they changed


@pytest.mark.parametrize("hook", ["forward", "before", "accelerate"])
def test_a_layer_whose_base_has_hooks_keeps_pefts_forward(hook: str) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Noting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    model, batch = adapted(make_model()), make_batches(1)[0]
    use_fast_step(model)
    base = lora_layers(model)["model.layers.0.self_attn.q_proj"].base_layer
    calls: list[nn.Module] = []
    if hook == "forward":
        base.register_forward_hook(lambda module, args, output: calls.append(module))
    elif hook == "before":
        base.register_forward_pre_hook(lambda module, args: calls.append(module))
    else:
        add_hook_to_module(base, Noting())
    model(**batch).loss.backward()
    assert calls == [base]


def test_a_projection_is_computed_again_when_its_input_changed_in_place() -> None:
    model = adapted(make_model(), share=True)
    use_fast_step(model)
    layers = [lora_layers(model)[f"model.layers.0.self_attn.{kind}_proj"] for kind in ("q", "k")]
    assert layers[0].projection is layers[1].projection
    x = torch.randn(2, 3, 64)
    layers[0](x)
    x.mul_(2)
    torch.testing.assert_close(layers[1](x), type(layers[1]).__mro__[2].forward(layers[1], x))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_activation_that_changes_in_place_is_another_one(device: str) -> None:
    class Block(nn.Module):
        def __init__(self, changes: bool):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({name: nn.Linear(8, 8) for name in ("left", "right")})])
            self.changes = changes

        def get_input_embeddings(self):
            return None

        def forward(self, x: torch.Tensor) -> None:
            self.layers[0]["left"](x)
            if self.changes:
                x.mul_(2)
            self.layers[0]["right"](x)

    names = ["layers.0.left", "layers.0.right"]
    for changes, expected in ((False, [names]), (True, [names[:1], names[1:]])):
        model, x = Block(changes).to(device), torch.ones(3, 8, device=device)
        with torch.no_grad():
            assert readers_of_same_activations(model, lambda model=model, x=x: model(x)) == expected


def test_a_grouped_product_without_numbers_takes_float32() -> None:
    rows, weights = torch.empty(8, 4, device="meta"), torch.empty(2, 4, 6, device="meta")
    ends = torch.empty(2, dtype=torch.int32, device="meta")
    with Footprint([rows, weights, ends]) as footprint:
        made = torch.nn.functional.grouped_mm(rows, weights, offs=ends)
    assert made.shape == (8, 6)
    assert footprint.now == 8 * 6 * 4


def test_a_model_without_numbers_gets_its_loss_in_parts() -> None:
    hollow = make_model("causal-lm").to("meta")
    assert find_head_loss(hollow, {"input_ids": torch.zeros(2, 7, dtype=torch.long, device="meta")}) is not None


def test_the_stand_ins_of_kernels_keep_less() -> None:
    hollow, plain = make_model("causal-lm").to("meta"), make_model("causal-lm").to("meta")
    stand_in_kernels(hollow)
    kept = []
    for model in (plain, hollow):
        with Footprint([*model.parameters(), *model.buffers()]) as footprint:
            logits = model(input_ids=torch.zeros(2, 7, dtype=torch.long, device="meta")).logits
            kept.append(footprint.now)
            logits.sum().backward()
    assert kept[1] < kept[0]


def test_gated_mlps_hold_neither_their_product_nor_their_activation() -> None:
    batch = {"input_ids": torch.zeros(4, 7, dtype=torch.long, device="meta")}
    held = []
    for recomputed in (False, True):
        base = make_model("causal-lm").to("meta")
        assert not recomputed or recompute_mlps(base, batch)
        model = adapted(base)
        use_fast_step(model)
        with Footprint([*model.parameters(), *model.buffers()]) as footprint:
            logits = model(**batch).logits
            held.append(footprint.now)
        del logits
    layers, tokens, width = 4, 4 * 7, 128
    assert held[0] - held[1] == layers * 2 * tokens * width * 4


def test_a_model_without_numbers_takes_the_stand_in_for_fused_attention(llama_folder, monkeypatch) -> None:
    monkeypatch.setattr("sgm_finetune.model.load.has_gpu", lambda: True)
    hollow = skeleton(ModelConfig(name=str(llama_folder), task="causal-lm"), llama_folder)
    assert hollow.config._attn_implementation == FUSED_ATTENTION


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_peft_takes_a_stand_in_for_a_quantised_layer(llama_folder, quantization: str) -> None:
    import peft.tuners.lora as lora

    config = ModelConfig(name=str(llama_folder), task="causal-lm", quantization=quantization)
    layers = lora_layers(adapted(skeleton(config, llama_folder)))
    expected = lora.Linear4bit if quantization == "nf4" else lora.Linear8bitLt
    assert {type(layer) for layer in layers.values()} == {expected}


def test_a_four_bit_layer_takes_the_fast_forward_unless_it_is_packed(llama_folder, monkeypatch) -> None:
    from bitsandbytes.nn.modules import Linear4bit

    config = ModelConfig(name=str(llama_folder), task="causal-lm", quantization="nf4", dtype="float32")
    model = adapted(load_model(config, llama_folder)[0])
    use_fast_step(model)
    called: list[nn.Module] = []
    forward = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: called.append(self) or forward(self, x))
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 3, 64)
    expected = layer(x)
    assert called == []
    monkeypatch.setattr(Linear4bit, "forward", lambda self, x: called.append(self) or torch.zeros_like(expected))
    layer.base_layer.weight.quant_state.packing_format_for_cpu = True
    layer(x)
    assert called == [layer.base_layer]


def test_a_four_bit_layer_is_packed_only_where_its_attribute_allows_it() -> None:
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn.modules import Linear4bit

    for allowed in (None, False):
        layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu").eval()
        assert layer.support_avx512bf16_for_cpu == has_avx512bf16()
        if allowed is not None:
            layer.support_avx512bf16_for_cpu = allowed
        with torch.no_grad():
            layer(torch.randn(2, 64, dtype=torch.bfloat16))
        packed = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        assert packed == layer.support_avx512bf16_for_cpu


def test_the_unpickler_written_in_python_has_a_table_of_its_instructions() -> None:
    pickled = pickle.dumps(bytearray(b"abc"), protocol=5)
    assert pickle._Unpickler(io.BytesIO(pickled)).load() == bytearray(b"abc")
    with pytest.raises(KeyError):
        Rehearsal(io.BytesIO(pickled), len(pickled)).load()  # whose table lacks the instruction for a bytearray


@pytest.mark.parametrize("function", ["_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter"])
def test_a_file_of_torch_names_a_function_that_is_allowed(function: str, tmp_path) -> None:
    content = {
        "_rebuild_tensor_v2": torch.ones(2),
        "_rebuild_tensor_v3": torch.ones(2, dtype=torch.uint16),  # a type without a storage class
        "_rebuild_parameter": nn.Parameter(torch.ones(2)),
    }[function]
    path = tmp_path / "saved.pth"
    torch.save([content], path, _use_new_zipfile_serialization=False)
    assert function.encode() in path.read_bytes()
    torch.save([content], path)
    assert torch.equal(read_torch(path)[0], content)


def test_the_gguf_reader_reads_a_header_through_its_private_method(tmp_path) -> None:
    from gguf import GGUFReader

    class Counting(GGUFReader):
        num_reads = 0

        def _get(self, *args, **options):
            self.num_reads += 1
            return super()._get(*args, **options)

    path = tmp_path / "model.gguf"
    path.write_bytes(as_gguf())
    reader = Counting(path)
    assert reader.num_reads > 3 + len(reader.tensors)


def test_the_gguf_reader_reads_a_list_through_its_private_method(tmp_path) -> None:
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    lists = []

    class Counting(GGUFReader):
        def _get_field_parts(self, orig_offs, raw_type):
            found = super()._get_field_parts(orig_offs, raw_type)
            if raw_type == GGUFValueType.ARRAY:
                lists.append(found)
            return found

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_array("texts", ["a", "bc"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    Counting(tmp_path / "model.gguf")
    [(size, _, _, types)] = lists
    assert (size, types[0]) == (12 + 8 + 1 + 8 + 2, GGUFValueType.ARRAY)


def test_accelerates_launcher_sets_the_variables_that_are_read() -> None:
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    def arguments(*options: str):
        plain = ("--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
        args = launch_command_parser().parse_args([*options, *plain, "--main_process_port=0", "train.py"])
        args.deepspeed_fields_from_accelerate_config = ""  # as the launcher sets it without a file of its own
        return args

    fsdp = ("--use_fsdp", "--fsdp_version=2", "--fsdp_offload_params=true")
    variables = prepare_multi_gpu_env(arguments(*fsdp))
    assert (variables["ACCELERATE_USE_FSDP"], variables["FSDP_VERSION"]) == ("true", "2")
    assert (variables["FSDP_OFFLOAD_PARAMS"], variables["FSDP_ACTIVATION_CHECKPOINTING"]) == ("true", "false")
    _, variables = prepare_deepspeed_cmd_env(arguments("--use_deepspeed", "--zero_stage=2"))
    assert variables["ACCELERATE_USE_DEEPSPEED"] == "true"


def test_data_parallelism_leaves_out_the_pieces_of_the_base() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        piece = distribute_tensor(torch.ones(2, 2), init_device_mesh("cpu", (1,)))
        model.weight = nn.Parameter(piece, requires_grad=False)
        reduce_factors_only(model)  # type: ignore[arg-type]
        parallel = nn.parallel.DistributedDataParallel(model)
        assert parallel.parameters_to_ignore == {"weight"}
        model.bias.requires_grad_(False)
        model.weight.requires_grad_(True)
        with pytest.raises(RuntimeError, match="doesn't have any parameter that requires a gradient"):
            nn.parallel.DistributedDataParallel(model)
    finally:
        distributed.destroy_process_group()
