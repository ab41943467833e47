"""Files from others: what SGM refuses, without using much memory or time."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from fuzz_seeds import as_gguf, finished_run
from processes import environment
from rich.console import Console
from systems import needs_posix

from sgm_finetune.base.config import Config
from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.base.errors import UserError
from sgm_finetune.base.untrusted import MAX_JSON, check_inside, parse_json, parse_yaml, read_json, read_torch
from sgm_finetune.commands.cli import main
from sgm_finetune.commands.evaluate import evaluate
from sgm_finetune.model.architecture import check_model
from sgm_finetune.model.weights.stored import stored_matrices, weight_files
from sgm_finetune.results.load import load_trained, read_result
from sgm_finetune.results.pth import load_pth, stored_config


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("[NaN]", "NaN is not a number"),
        ("[Infinity]", "Infinity is not a number"),
        ("[1e999]", "too large a number"),
        (f"[{'9' * 5000}]", "too large a number"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 80 + "]" * 80, "nested too deeply"),
    ],
    ids=lambda value: value[:20],
)
def test_invalid_json_is_refused(text, why):
    with pytest.raises(ValueError, match=why):
        parse_json(text)


def test_infinity_is_a_number_on_request():
    assert parse_json("[Infinity, 2.5]", infinite=True) == [float("inf"), 2.5]


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON + 1)
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        read_json(path)


def test_yaml_of_a_billion_laughs_is_refused_and_plain_aliases_are_read():
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    with pytest.raises(ValueError, match="more than 10,000 values"):
        parse_yaml(laughs)
    with pytest.raises(ValueError, match="holds itself"):
        parse_yaml("&a [*a]")
    assert parse_yaml("x: &s {rank: 4}\ny: *s") == {"x": {"rank": "4"}, "y": {"rank": "4"}}
    with pytest.raises(ValueError, match="could not determine a constructor"):
        parse_yaml("!!python/object/apply:os.system [echo]")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "..", "", "a\0", "a" * 300, 7, None])
def test_a_name_that_leaves_its_folder(name):
    with pytest.raises(ValueError, match="is not the name of a file beside it"):
        check_inside(name)


@pytest.mark.parametrize("shard", ["../../outside.safetensors", "/outside.safetensors"])
def test_an_index_of_shards_stays_in_its_folder(shard, tmp_path, llama_folder):
    (tmp_path / "model").mkdir()
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": shard}}))
    with pytest.raises(UserError, match="is not the name of a file beside it"):
        weight_files(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    with pytest.raises(UserError, match="is not the name of a file beside it"):
        check_model(Config().model, tmp_path / "model")


def repacked(content: bytes, compression: int) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(held, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return held.getvalue()


def test_a_compressed_pth_is_refused(tmp_path):
    held = io.BytesIO()
    torch.save({"a": torch.zeros(2**22)}, held)
    bomb = tmp_path / "bomb.pth"
    bomb.write_bytes(repacked(held.getvalue(), zipfile.ZIP_DEFLATED))
    assert bomb.stat().st_size < 2**17
    with pytest.raises(ValueError, match="its archive is compressed"):
        read_torch(bomb)


class Called:
    """A call that `weights_only` allows, because it only takes memory and time."""

    def __init__(self, function, *given):
        self.function, self.given = function, given

    def __reduce__(self):
        return self.function, self.given


@pytest.mark.parametrize(
    "called", [Called(bytearray, 10**11), Called(torch.FloatStorage, 10**11), Called(print, "ran")]
)
def test_a_pth_calls_nothing(called, tmp_path, capsys):
    held = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, held)
    path = tmp_path / "calls.pth"
    with zipfile.ZipFile(held) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("data.pkl"):
                content = pickle.dumps({"a": called}, protocol=2)
            new.writestr(member.filename, content)
    with pytest.raises(ValueError, match=r"it names (__builtin__|builtins)|not callable"):
        read_torch(path)
    assert capsys.readouterr().out == ""


@needs_posix
@pytest.mark.parametrize(
    "claim", [b"r" + (2**32 - 1).to_bytes(4, "little"), b"\x96" + (2**40).to_bytes(8, "little")], ids=["memo", "bytes"]
)
def test_a_pickle_allocates_nothing_for_its_claims(claim, tmp_path):
    """Neither a memo index nor a length in the file causes an allocation."""
    path = tmp_path / "claims.bin"
    path.write_bytes(b"\x80\x02N" + claim + b".")
    code = (
        "import resource, sys; from pathlib import Path; from sgm_finetune.base.untrusted import Rehearsal\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"try: Rehearsal(Path({str(path)!r}).open('rb'), 100).load()\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout.split()[-1:] == ["True"], done.stderr


def test_a_strangers_pth_brings_no_harness_file(strangers, tmp_path):
    names = strangers(config={"evaluation": {"harness": [str(tmp_path / "evil.yaml")]}})
    with pytest.raises(UserError, match=r"a file that can run code; say evaluation\.harness"):
        evaluate(load_config(None, names), names, Console(quiet=True))


@pytest.mark.parametrize("old_format", [False, True])
def test_what_torch_saves_is_read(old_format, tmp_path):
    content = {
        "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T, "b": [1, 2.5, None, "x", {"c": True}],
        "d": torch.nn.Parameter(torch.ones(2)), "e": torch.zeros(0), "f": torch.Size([2]),
        "g": torch.nn.Linear(2, 1).state_dict(),
    }  # fmt: skip
    path = tmp_path / "saved.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    found = read_torch(path)
    assert torch.equal(found["a"], content["a"])
    assert found["b"] == content["b"]
    assert torch.equal(found["g"]["weight"], content["g"]["weight"])


def test_an_old_file_whose_tensors_claim_more_than_it_has_is_refused(tmp_path):
    path = tmp_path / "old.bin"
    torch.save({"a": torch.zeros(2, dtype=torch.uint8)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    small, large = pickle.dumps(2, 2)[2:-1], pickle.dumps(2**31 - 1, 2)[2:-1]
    at = content.index(b"cpu") + 3
    path.write_bytes(content[:at] + content[at:].replace(small, large, 1))
    with pytest.raises(ValueError, match="claim more bytes than the file has"):
        read_torch(path)


def test_a_repeated_key_in_a_configuration_is_reported(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("adapter: {rank: 4}\ntraining: {}\nadapter: {rank: 8}\n")
    with pytest.raises(UserError, match="the key 'adapter' occurs twice"):
        load_config(path)


def test_a_tensor_that_claims_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "view.pth"
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    assert path.stat().st_size < 5000
    with pytest.raises(ValueError, match="claims more numbers than the file holds"):
        read_torch(path)


def test_a_gguf_file_that_promises_more_than_it_has_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    content = bytearray(as_gguf())
    content[8:24] = b"\xff" * 15 + b"\x0f"  # tensors and entries
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="is damaged or cut short"):
        stored_matrices(path)


@pytest.fixture
def strangers(tmp_path):
    """Writes a changed .pth and returns its settings."""

    def write(**changes) -> list[str]:
        content = torch.load(finished_run() / "out" / "sgm_finetuned.pth", weights_only=True)
        for part, values in changes.items():
            content[part].update(values)
        torch.save(content, tmp_path / "sgm_finetuned.pth")
        return [f"output.dir={tmp_path}"]

    return write


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"auto_mapping": None, "use_dora": True}, "`peft_config.use_dora` is 'True', which `sgm finetune` does not"),
        ({"layer_replication": [[0, 10**9]]}, "`peft_config.layer_replication`"),
        ({"target_modules": "(a+)+$"}, "`target_modules`: input should be a valid list"),
        ({"r": 10**9}, "`r`: input should be less than or equal to 65536"),
        ({"lora_alpha": float("nan")}, "`lora_alpha`: input should be"),
        ({"target_modules": ["q_proj"]}, "only one of its plan and its adapter has `model.layers"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_strangers_pth_gives_peft_no_other_settings(changes, why, strangers):
    names = strangers(peft_config=changes)
    log = StepLog(Console(quiet=True))
    with pytest.raises(UserError, match=why.replace("(", r"\(")):
        load_trained(read_result(load_config(None, names), names, log), log)


def test_a_strangers_pth_switches_on_no_code_and_moves_no_output(strangers, tmp_path):
    names = strangers(config={})
    path = tmp_path / "sgm_finetuned.pth"
    content = load_pth(path)
    content["config"]["model"]["trust_remote_code"] = True
    content["config"]["output"]["dir"] = "/elsewhere"
    here = load_config(None, names)
    found = stored_config(content, path, here, [])
    assert not found.model.trust_remote_code
    assert found.output.dir == str(tmp_path)
    allowed = load_config(None, [*names, "model.trust_remote_code=true"])
    assert stored_config(content, path, allowed, []).model.trust_remote_code


def test_data_on_the_command_line_replaces_the_data_that_the_pth_names(strangers, tmp_path):
    here = load_config(None, strangers(config={}))
    path, lines = tmp_path / "sgm_finetuned.pth", []
    content = load_pth(path)
    trained = content["config"]["data"]["train"]
    content["config"]["data"]["columns"] = {"text": "text"}
    found = stored_config(content, path, here, ["data.name=imdb"], lines.append)
    assert (found.data.name, found.data.train, found.data.columns) == ("imdb", None, {})
    assert lines == [f"data.name=imdb replaces data.train={trained} of {path}, and data.columns with it"]


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path, capfd):
    path = tmp_path / "config.yaml"
    path.write_text('"\\e[31mred\\n": 1\n')
    with pytest.raises(SystemExit) as caught:
        main(["finetune", "--config", str(path)])
    said = capfd.readouterr().err
    assert caught.value.code == 2
    assert "\x1b" not in said
    assert "\\x1b[31mred" in said


def test_a_name_that_is_too_long_is_one_line(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["scan", "x" * 5000])
    said = capfd.readouterr().err
    assert caught.value.code == 2
    assert "File name too long" in said
    assert said.count("\n") == 1
