"""The private parts of libraries that SGM touches, the versions that were tried, and the tests that will notice."""

from __future__ import annotations

from dataclasses import dataclass

TRIED_WITH: dict[str, str] = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "gguf": "0.19.0",
    "peft": "0.21.2",
    "python": "3.11",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}
"""Library -> the version that the tests ran with, as requirements/lock.txt has it. pyproject.toml has the bounds."""


@dataclass(frozen=True)
class PrivatePart:
    """A name that a library does not document or promise to keep, and one file that uses it."""

    library: str
    """A key of `TRIED_WITH`."""
    part: str
    """Its owner and its name, which the file contains; `__class__` and `forward` are assigned to."""
    used_in: str
    """A path below `sgm_finetune`."""
    why: str
    """What it is for, and why no public name does it."""
    test: str
    """The test that fails when the part changes. Two are slow and one needs a GPU; all others are default tests."""


def _entries(library: str, parts: tuple[str, ...], used_in: str, why: str, test: str) -> tuple[PrivatePart, ...]:
    """An entry for each of `parts`, which one file uses for one reason."""
    return tuple(PrivatePart(library, part, used_in, why, test) for part in parts)


_COMPAT = "tests/test_compat.py::"
_RESIDENCE = "tests/model/test_residence.py::test_loss_and_every_gradient_are_those_of_the_resident_base"
_FORWARD = "tests/adapters/test_forward.py::"
_FOOTPRINT = "tests/measure/test_footprint.py::"
_LAUNCHER = f"{_COMPAT}test_accelerates_launcher_sets_the_variables_that_are_read"

PRIVATE_PARTS: tuple[PrivatePart, ...] = (
    *_entries(
        "accelerate",
        ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS",
         "FSDP_ACTIVATION_CHECKPOINTING"), "train/launch.py",
        "The launcher passes its settings in environment variables, and the trainer reads them before any object "
        "holds them; ACCELERATE_USE_FSDP is deleted so that the trainer does not shard the factors too.",
        _LAUNCHER,
    ),
    PrivatePart(
        "accelerate", "Module._hf_hook", "train/fast/adapter_forward.py",
        "It shows that accelerate moves a layer's weights, which the fast forward would read before they are there; "
        "accelerate only answers whether they are offloaded.",
        f"{_COMPAT}test_a_layer_whose_base_has_hooks_keeps_pefts_forward",
    ),
    *_entries(
        "bitsandbytes",
        ("QuantState.packing_format_for_cpu", "Params4bit.quant_state", "QuantState.absmax"), "model/four_bit.py",
        "They show which weights an evaluation packed, so that gradients would be wrong, and what the scales are then; "
        "bitsandbytes' own unpacking leaves the scales transposed.",
        "tests/test_quantized.py::test_ready_for_backward_unpacks_what_an_evaluation_packed",
    ),
    PrivatePart(
        "bitsandbytes", "Linear4bit.support_avx512bf16_for_cpu", "model/four_bit.py",
        "Set to False, it keeps an evaluation from packing the weights; bitsandbytes has no setting for it.",
        f"{_COMPAT}test_a_four_bit_layer_is_packed_only_where_its_attribute_allows_it",
    ),
    PrivatePart(
        "bitsandbytes", "Linear4bit.support_avx512bf16_for_cpu", "commands/doctor_machine.py",
        "The tried layer must not pack its weights; bitsandbytes has no setting for it.",
        f"{_COMPAT}test_a_four_bit_layer_is_packed_only_where_its_attribute_allows_it",
    ),
    *_entries(
        "bitsandbytes", ("QuantState.packing_format_for_cpu", "Params4bit.quant_state"),
        "train/fast/adapter_forward.py",
        "The fast forward dequantises a 4-bit weight itself, and only if it is not packed; the public layer has only a "
        "forward.",
        f"{_COMPAT}test_a_four_bit_layer_takes_the_fast_forward_unless_it_is_packed",
    ),
    *_entries(
        "bitsandbytes", ("QuantState.state2", "QuantState.nested", "QuantState.absmax"), "train/fast/nf4_kernel.py",
        "The kernel reads the scales of a weight and the scales of its scales; bitsandbytes dequantises both only in "
        "kernels of its own.",
        "tests/test_gpu.py::test_one_kernel_dequantises_as_bitsandbytes_does",
    ),
    *_entries(
        "bitsandbytes",
        ("Params4bit.quant_state", "Params4bit.compress_statistics", "Params4bit.quant_type"),
        "train/adapters/shard.py",
        "FSDP replaces the parameter of a 4-bit layer by a plain one, to which the attributes that PEFT reads are "
        "copied; bitsandbytes has no sharded parameter.",
        "tests/test_runs.py::test_processes_that_share_the_model_are_one",
    ),
    *_entries(
        "bitsandbytes", ("QuantState.state2", "QuantState.absmax"), "model/weights/bnb.py",
        "The scan dequantises a few rows at a time, so it takes the scales of whole blocks; bitsandbytes dequantises "
        "whole weights.",
        "tests/measure/test_quantized.py::test_a_4_bit_matrix_is_the_modules_own_dequantised_weight",
    ),
    PrivatePart(
        "bitsandbytes", "Params4bit.quant_state", "model/residence/store.py",
        "A block that is on disk must not leave its scales in memory, which its 4-bit layers hold too.",
        _RESIDENCE,
    ),
    PrivatePart(
        "bitsandbytes", "Params4bit.quant_state", "model/residence/sizes.py",
        "A layer that has it will hold 4 bits, and a model without numbers does not say so otherwise.",
        "tests/test_estimation.py::test_of_a_base_on_disk_a_block_and_pages_of_output_layer_or_embeddings_count",
    ),
    *_entries(
        "bitsandbytes",
        ("Params4bit.quant_state", "QuantState.state2", "QuantState.absmax"),
        "model/residence/buffers.py",
        "A 4-bit block that is copied to the GPU brings its scales with it.",
        "tests/model/test_residence.py::test_a_base_in_the_hosts_memory_gives_the_same",
    ),
    PrivatePart(
        "gguf", "GGUFReader._get", "model/weights/gguf.py",
        "Every read of a header goes through it, so the override refuses counts beyond the end of the file; the reader "
        "has no bounds of its own.",
        f"{_COMPAT}test_the_gguf_reader_reads_a_header_through_its_private_method",
    ),
    PrivatePart(
        "gguf", "GGUFReader._get_field_parts", "model/weights/gguf.py",
        "The override steps over lists: the reader makes two arrays for each text of a vocabulary, which nobody needs.",
        f"{_COMPAT}test_the_gguf_reader_reads_a_list_through_its_private_method",
    ),
    PrivatePart(
        "peft", "LoraLayer.__class__", "train/fast/adapter_forward.py",
        "A LoRA layer that PEFT made gets our subclass, whose forward is the fast one; PEFT's registry of "
        "classes is private too.",
        f"{_FORWARD}test_what_readers_share_is_computed_once_and_not_held",
    ),
    *_entries(
        "peft", ("LoraLayer.lora_variant", "LoraLayer.lora_bias"), "train/fast/adapter_forward.py",
        "They show that a layer computes more than plain LoRA; the configuration does not say it for each layer.",
        f"{_FORWARD}test_what_it_cannot_do_keeps_pefts_forward",
    ),
    PrivatePart(
        "peft", "layer.ParamWrapper", "train/adapters/apply.py",
        "PEFT adapts a stack of experts by this undocumented wrapper, which holds the experts' number, the parameter's "
        "name and the factors in its own layout.",
        "tests/test_experts.py::test_the_layout_of_a_stack_is_pefts_own",
    ),
    *_entries(
        "peft", ("PreTrainedModel.is_loaded_in_4bit", "PreTrainedModel.is_loaded_in_8bit"), "model/load.py",
        "PEFT chooses its quantised LoRA layers by these attributes, which only loading sets; a model without numbers "
        "is not loaded.",
        f"{_COMPAT}test_peft_takes_a_stand_in_for_a_quantised_layer",
    ),
    *_entries(
        "python", ("pickle._Unpickler", "_Unpickler.dispatch"), "base/untrusted.py",
        "The unpickler written in Python allocates as it reads and can lose an instruction; the public one, in C, "
        "allocates whatever size a file claims.",
        f"{_COMPAT}test_the_unpickler_written_in_python_has_a_table_of_its_instructions",
    ),
    *_entries(
        "torch",
        ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter"),
        "base/untrusted.py",
        "Files of torch.save name these functions, and only they are allowed; torch does not export its list.",
        f"{_COMPAT}test_a_file_of_torch_names_a_function_that_is_allowed",
    ),
    PrivatePart(
        "torch", "UntypedStorage._cdata", "measure/probe.py",
        "It identifies the storage of an activation; on device meta a storage has no address.",
        "tests/measure/test_probe.py::test_an_equal_copy_is_another_activation_also_without_numbers",
    ),
    PrivatePart(
        "torch", "Tensor._version", "measure/probe.py",
        "Two layers read the same activation only if it did not change in place; no public name counts changes.",
        f"{_COMPAT}test_an_activation_that_changes_in_place_is_another_one",
    ),
    PrivatePart(
        "torch", "Module._ddp_params_and_buffers_to_ignore", "train/adapters/shard.py",
        "Data parallelism must leave out the pieces of the base, and a base on disk; its constructor, which the "
        "trainer calls, has no argument for it.",
        f"{_COMPAT}test_data_parallelism_leaves_out_the_pieces_of_the_base",
    ),
    *_entries(
        "torch", ("torch._foreach_mul_", "torch._foreach_sub_", "torch._foreach_lerp_"), "train/adapters/optimizer.py",
        "They change many small factors in one kernel; torch has no public names for them.",
        "tests/adapters/test_descent.py::test_weight_decay_shrinks_factors_by_its_share_of_the_step",
    ),
    *_entries(
        "torch",
        ("torch.utils._python_dispatch", "torch.utils._pytree", "torch.utils.flop_counter.flop_registry"),
        "train/budget/footprint.py",
        "They see every operation, the tensors in its nested arguments, and the formulas for its cost; torch's public "
        "FlopCounterMode counts operations but no memory.",
        f"{_FOOTPRINT}test_a_linear_layers_step_is_counted_by_hand",
    ),
    PrivatePart(
        "torch", "UntypedStorage._cdata", "train/budget/footprint.py",
        "It identifies a storage; on device meta a storage has no address.",
        f"{_FOOTPRINT}test_freed_tensors_do_not_count_and_known_ones_never_do",
    ),
    PrivatePart(
        "torch", "aten._local_scalar_dense", "train/budget/footprint.py",
        "The operation behind Tensor.item(), which has no result without numbers, so it gets one.",
        f"{_FOOTPRINT}test_masks_select_as_many_rows_as_given",
    ),
    PrivatePart(
        "torch", "aten._grouped_mm", "train/budget/footprint.py",
        "The operation behind the public grouped_mm, which refuses float32 without numbers; its result is made here.",
        f"{_COMPAT}test_a_grouped_product_without_numbers_takes_float32",
    ),
    *_entries(
        "torch", ("Module._forward_hooks", "Module._forward_pre_hooks"), "train/fast/adapter_forward.py",
        "The fast forward does not call the base layer and would skip its hooks; no public name lists them.",
        f"{_COMPAT}test_a_layer_whose_base_has_hooks_keeps_pefts_forward",
    ),
    PrivatePart(
        "torch", "Tensor._version", "train/fast/adapter_forward.py",
        "It shows that an input changed in place since its projection was computed; no public name counts changes.",
        f"{_COMPAT}test_a_projection_is_computed_again_when_its_input_changed_in_place",
    ),
    PrivatePart(
        "torch", "Tensor._version", "train/lending.py",
        "It shows that a tensor of a lent base was written to; no public name counts changes.",
        "tests/test_sweeps.py::test_a_base_that_was_written_to_is_not_taken_for_whole",
    ),
    PrivatePart(
        "torch", "UntypedStorage._cdata", "train/fast/gated_mlp.py",
        "It recognises the product among the tensors that autograd keeps, also on device meta.",
        f"{_COMPAT}test_gated_mlps_hold_neither_their_product_nor_their_activation",
    ),
    PrivatePart(
        "torch", "Module.forward", "train/fast/gated_mlp.py",
        "A gated MLP gets a forward that keeps less; forward hooks run before or after the forward, not instead of it.",
        "tests/test_gated_mlp.py::test_two_tensors_as_wide_as_the_mlp_are_kept_instead_of_four",
    ),
    PrivatePart(
        "torch", "Module.forward", "train/budget/repeats.py",
        "A block that stands for others hands its input on; a hook cannot leave out its computation.",
        "tests/measure/test_repeats.py::test_blocks_of_several_widths_are_followed_twice_each",
    ),
    PrivatePart(
        "torch", "Module.forward", "model/stand_ins.py",
        "Norms and gated MLPs without numbers get forwards that keep what Liger's kernels keep; hooks cannot replace a "
        "forward.",
        f"{_COMPAT}test_the_stand_ins_of_kernels_keep_less",
    ),
    PrivatePart(
        "torch", "Tensor._base", "train/fast/head_loss.py",
        "Without numbers to compare, it shows that the output layer reads the decoder's output; no public name gives "
        "the tensor that a view belongs to.",
        f"{_COMPAT}test_a_model_without_numbers_gets_its_loss_in_parts",
    ),
    PrivatePart(
        "transformers", "PreTrainedConfig._attn_implementation", "model/load.py",
        "It shows which attention the model chose; only the setter, set_attn_implementation, is public.",
        f"{_COMPAT}test_a_model_without_numbers_takes_the_stand_in_for_fused_attention",
    ),
    PrivatePart(
        "transformers", "PreTrainedConfig._attn_implementation", "train/fast/attention.py",
        "It shows which attention to restore if the new one does not fit; only the setter is public.",
        f"{_FORWARD}test_attention_with_more_to_it_is_left_alone",
    ),
    *_entries(
        "transformers",
        ("conversion_mapping.get_model_conversion_mapping", "core_model_loading.rename_source_key"),
        "model/names.py",
        "They give the name in the model of a parameter in its files; Transformers applies them only while it loads.",
        "tests/test_experts.py::test_every_expert_has_its_snr_from_the_files_and_the_start_of_its_stack",
    ),
    PrivatePart(
        "transformers", "modeling_utils.convert_and_load_state_dict_in_model", "model/residence/parts.py",
        "Inside from_pretrained it converts all tensors at once; in its place it is called block by block. The offload "
        "of Transformers copies a block, and refuses 4 bits.",
        _RESIDENCE,
    ),
    PrivatePart(
        "transformers", "core_model_loading.set_param_for_module", "model/residence/store.py",
        "It puts mapped tensors where from_pretrained puts converted ones.",
        _RESIDENCE,
    ),
    PrivatePart(
        "transformers", "modeling_utils.caching_allocator_warmup", "model/residence/host.py",
        "Inside from_pretrained it allocates as much of the GPU as the whole base takes; it is left out where the base "
        "goes to the host's memory, and no argument does that.",
        "tests/test_gpu_host.py::test_only_buffers_are_on_the_gpu",
    ),
    PrivatePart(
        "transformers", "core_model_loading.revert_weight_conversion", "results/export/merge.py",
        "It cuts an update into the pieces that the files hold; save_pretrained needs the whole model in memory.",
        "tests/test_exporting.py::test_a_merged_model_is_that_of_peft",
    ),
    PrivatePart(
        "transformers", "Trainer._clip_grad_norm", "train/trainer.py",
        "It checks the gradients before clipping makes all of them NaN; no callback comes between backward pass and "
        "clipping.",
        "tests/test_safety.py::test_a_gradient_that_is_not_finite_stops_before_the_step_and_is_named",
    ),
    PrivatePart(
        "transformers", "Trainer._get_train_sampler", "train/trainer.py",
        "It orders batches independently of the number of processes; the public get_train_dataloader would have to be "
        "copied for it.",
        "tests/test_runs.py::test_two_processes_are_one",
    ),
    *_entries(
        "transformers", ("Trainer._save", "Trainer._load_best_model"), "train/trainer.py",
        "A checkpoint of whole matrices holds what was trained; save_pretrained writes the whole model.",
        "tests/full/test_runs.py::test_a_resumed_run_is_the_uninterrupted_one",
    ),
    PrivatePart(
        "transformers", "Trainer._wrap_model", "train/trainer.py",
        "Data parallelism must not hold the gradients of whole matrices, which step in the backward pass; the trainer "
        "wraps every model that is not wrapped already.",
        "tests/full/test_runs.py::test_two_processes_are_one",
    ),
    PrivatePart(
        "transformers", "Trainer._load_from_checkpoint", "train/trainer.py",
        "Groups are tied before a checkpoint is loaded into a model that was built from files; callbacks begin after "
        "it.",
        "tests/test_trainers.py::test_sgm_trainer_ties_before_it_loads_a_checkpoint",
    ),
)  # fmt: skip
"""Every touch, by library and file. tests/test_compat.py finds the touches in the code and compares."""
