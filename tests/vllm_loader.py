"""Reads an adapter folder with vLLM's own loader code, taken from its wheel, without vLLM's dependencies or a GPU.

Arguments: the wheel and the adapter's folder. Prints the name, scale and shapes of each layer's factors, as JSON. What
the loader's files import beside each other is replaced by stand-ins.
"""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from types import ModuleType
from unittest.mock import MagicMock

READ = ("vllm.lora.peft_helper", "vllm.lora.lora_weights", "vllm.lora.utils", "vllm.lora.lora_model")
"""The files of vLLM that run."""


class _StandIns:
    """Finds every other module of vLLM: an empty package, or a stand-in for a leaf."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith("vllm"):
            return None
        return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec):
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []
        if module.__name__ in READ:
            text = self.wheel.read(module.__name__.replace(".", "/") + ".py")
            exec(compile(text, module.__name__, "exec"), module.__dict__)
        elif module.__name__ not in ("vllm", "vllm.lora"):
            module.__getattr__ = lambda name: False if name == "PIN_MEMORY" else MagicMock()  # type: ignore[attr-defined]

    def __init__(self, wheel: str):
        self.wheel = zipfile.ZipFile(wheel)


def main(wheel: str, folder: str, max_rank: int, modules: list[str]) -> None:
    sys.meta_path.insert(0, _StandIns(wheel))  # type: ignore[arg-type]
    from vllm.lora.lora_model import LoRAModel  # type: ignore[import-not-found]
    from vllm.lora.peft_helper import PEFTHelper  # type: ignore[import-not-found]

    helper = PEFTHelper.from_local_dir(folder, max_position_embeddings=None)
    helper.validate_legal(MagicMock(max_lora_rank=max_rank))
    read = LoRAModel.from_local_checkpoint(folder, set(modules), helper, lora_model_id=1, device="cpu")
    print(
        json.dumps(
            {
                name: {
                    "scale": layer.scaling,
                    "A": [list(layer.lora_a.shape), float(layer.lora_a.double().sum())],
                    "B": [list(layer.lora_b.shape), float(layer.lora_b.double().sum())],
                }
                for name, layer in read.loras.items()
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
