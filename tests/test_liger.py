"""What Liger changes in Transformers stays with the model that it changed."""

from __future__ import annotations

from types import ModuleType

import torch

from sgm_finetune.train.fast.liger import only_on_gpu


def test_classes_are_restored_and_functions_look_at_their_tensors():
    class Norm: ...

    class Fused: ...

    def rotary(q, cos=None):
        return "Transformers"

    def kernel(q, cos=None):
        return "a kernel"

    module = ModuleType("modeling")
    vars(module).update(Norm=Norm, rotary=rotary, other=rotary)
    for _ in range(3):  # a process may load many models
        before = dict(vars(module))
        vars(module).update(Norm=Fused, rotary=kernel, new=kernel)
        only_on_gpu(module, before)
        assert module.Norm is Norm
        assert module.other is rotary
        assert module.rotary(torch.ones(1)) == module.rotary(torch.ones(1, device="meta")) == "Transformers"
        assert module.rotary(cos=1, q=torch.ones(1)) == "Transformers"
        assert (module.rotary.kernel, module.rotary.original) == (kernel, rotary)

    class OnGpu(torch.Tensor):
        is_cuda = True

    assert module.rotary(torch.ones(1).as_subclass(OnGpu)) == "a kernel"
