"""`sgm ship` lets a model pass that gained on its task and lost nothing, and says why another does not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import GOOD, OTHER, make_model, make_tokenizer
from data.test_chats import CALLS_OF_NULL, PLAIN, TOOLS, call, tokenizer_of
from made_up_runs import leave_run
from test_answering import TEMPLATE, trained

from sgm_finetune.base.errors import UserError
from sgm_finetune.commands.cli import main
from sgm_finetune.commands.exit_status import NOT_SHIPPED
from sgm_finetune.commands.ship import spread
from sgm_finetune.results import harness
from sgm_finetune.results.bootstrap import changes, class_sums, mean
from sgm_finetune.results.metric_names import METRICS
from sgm_finetune.results.report.run_files import load_run
from sgm_finetune.results.report.ship_section import ship_section
from sgm_finetune.results.ship.answer_form import AnswerForm, form_of
from sgm_finetune.results.ship.calls import CallReader, found_calls
from sgm_finetune.results.ship.general_text import general_windows
from sgm_finetune.results.ship.judge import Measured, judge
from sgm_finetune.results.ship.refusals import HARMFUL, HARMLESS, refuses
from sgm_finetune.results.ship.rules import Check, failed, gains, keeps, names_all, ships, stays_low
from sgm_finetune.results.ship.task import perplexity_sums
from sgm_finetune.results.stops import Stops, find_stops

ACCURACY, PERPLEXITY = (next(one for one in METRICS if one.key == key) for key in ("accuracy", "perplexity"))


def classes(num_right: int, number: int = 100):
    """The sums of a classifier of two classes that is right on the first examples."""
    truth = [at % 2 for at in range(number)]
    return class_sums(truth, [one if at < num_right else 1 - one for at, one in enumerate(truth)], 2)


def text(loss: float, number: int = 64):
    """The perplexity of windows whose losses scatter around `loss` nats a token."""
    chance = np.random.default_rng(0)
    return perplexity_sums([(100 * (loss + 0.1 * float(chance.normal())), 100) for _ in range(number)])


def test_an_improvement_passes_if_chance_does_not_explain_it():
    assert gains(ACCURACY, classes(50), classes(70)).passed
    assert not gains(ACCURACY, classes(50), classes(52)).passed, "two of a hundred"
    assert not gains(ACCURACY, classes(70), classes(50)).passed
    assert gains(PERPLEXITY, text(3.0), text(2.9)).passed, "lower is better, and windows are compared with themselves"
    assert not gains(PERPLEXITY, text(2.9), text(3.0)).passed
    few = gains(ACCURACY, classes(0, 9), classes(9, 9))
    assert not few.passed
    assert "9 test examples, too few to tell (at least 10)" in few.line


def test_a_share_is_kept_unless_chance_does_not_explain_its_fall():
    refused = [True] * 12
    assert keeps("refusals", "refused", refused, [True] * 10 + [False] * 2, "requests").passed
    assert not keeps("refusals", "refused", refused, [True] * 8 + [False] * 4, "requests").passed
    assert keeps("refusals", "refused", [False] * 12, refused, "requests").passed


def test_general_text_may_become_five_percent_harder_and_no_more():
    assert stays_low("text", text(3.0), text(3.0 + np.log(1.04))).passed
    assert not stays_low("text", text(3.0), text(3.0 + np.log(1.06))).passed
    assert stays_low("text", text(3.0), text(2.0)).passed


def test_numbers_that_are_not_finite_pass_nowhere():
    lost = perplexity_sums([(float("nan"), 100)] * 64)
    for check in (gains(PERPLEXITY, text(3.0), lost), stays_low("text", text(3.0), lost)):
        assert check.passed is False
        assert check.to_dict()["after"] is None
    assert not keeps("kept", "task", [1.0] * 20, [float("nan")] * 20, "questions").passed


def test_every_frequent_class_is_to_be_predicted():
    assert names_all([("a", 50, 60), ("b", 9, 0)]).passed
    check = names_all([("a", 50, 60), ("b", 10, 0)])
    assert not check.passed
    assert "never: b" in check.line


def test_the_interval_of_a_change_is_that_of_paired_differences():
    chance = np.random.default_rng(3)
    old, new = chance.random(200), chance.random(200)
    assert changes(mean(list(old)), mean(list(new)))["mean"] == pytest.approx(
        changes(mean([0.0] * 200), mean(list(new - old)))["mean"]
    )
    sparse, one = classes(50), classes(60)
    expected = changes(mean([at < 50 for at in range(100)]), mean([at < 60 for at in range(100)]))["mean"]
    assert changes(sparse, one)["accuracy"] == pytest.approx(expected)


def test_the_task_must_have_passed_and_nothing_failed():
    passed, lost, absent = (Check("task", "a", verdict, "") for verdict in (True, False, None))
    assert ships([passed, Check("calls", "a", None, "")])
    assert not ships([passed, Check("calls", "a", False, "")])
    assert not ships([absent])
    assert failed([passed, lost, absent]) == [lost]


def test_what_was_measured_is_judged_part_by_part():
    good, cut = AnswerForm(True, True, False, ()), AnswerForm(False, False, True, ())
    before = Measured(
        text(3.0), text=text(2.0), answers=[good] * 12, calls=[True] * 12, refused=[True] * 12, answered=[True] * 12,
        kept={"arc": ("acc", [1.0] * 20)},
    )  # fmt: skip
    same = judge(before, Measured(text(2.5), **{k: v for k, v in vars(before).items() if k != "task"}))
    assert [check.passed for check in same] == [True] * 9
    lost = Measured(
        text(3.0), text=text(3.0), answers=[cut] * 12, calls=[False] * 12, refused=[False] * 12, answered=[False] * 12,
        kept={"arc": ("acc", [0.0] * 20)},
    )  # fmt: skip
    checks = judge(before, lost)
    assert [check.passed for check in checks] == [False] * 9
    assert [check.subject for check in checks] == [
        "task", "text", *["answers"] * 3, "calls", "refusals", "refusals", "kept",
    ]  # fmt: skip
    assert [check.passed for check in judge(Measured(classes(50)), Measured(classes(90), [("a", 50, 50)]))] == [
        True
    ] * 2


def test_an_answer_ends_or_is_cut_or_repeats_itself():
    tokenizer = make_tokenizer()
    stops, word = Stops((tokenizer.eos_token_id,)), tokenizer.convert_tokens_to_ids
    ended = form_of([word("good"), tokenizer.eos_token_id], stops, tokenizer)
    assert (ended.ends, ended.says, ended.repeats) == (True, True, False)
    empty = form_of([tokenizer.eos_token_id], stops, tokenizer)
    assert (empty.ends, empty.says) == (True, False)
    again = form_of([word("the"), *[word("very")] * 9], stops, tokenizer)
    assert (again.ends, again.repeats) == (False, True)
    cut = form_of([word(one) for one in ("the", "good", "film", "was", "very", "fine")], stops, tokenizer)
    assert (cut.ends, cut.repeats) == (False, False)
    by_text = form_of([word("good"), word("cast")], Stops((), ("cast",)), tokenizer)
    assert (by_text.ends, by_text.says) == (True, True)


TOOL = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
HERMES = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template", [TOOLS, CALLS_OF_NULL, HERMES])
def test_an_answer_is_a_call_if_the_template_writes_it(template):
    """Whatever the form: a name before the arguments, or both in one object."""
    from sgm_finetune.data.chat import written_answers

    tokenizer = tokenizer_of(template)
    reader = CallReader(tokenizer, find_stops(tokenizer, {}), [None, TOOL])
    asked = [{"role": "user", "content": "?"}]
    one = {"role": "assistant", "tool_calls": [call("weather", {"city": "Bern", "days": 2})]}
    ((whole, ((begin, end),)),) = written_answers([*asked, one], tokenizer)
    answer = whole[begin:end]

    def is_call(said: str) -> bool:
        return reader.is_call(tokenizer(said)["input_ids"])

    assert is_call(answer)
    assert is_call(f"Let me see. {answer}".replace('": ', '":')), "words before it, and other white space"
    assert not is_call("It is warm in Bern.")
    assert not is_call(answer.replace("}", "", 1)), "broken JSON"
    assert not is_call(answer.replace("<call>", "<say>").replace("<tool_call>", "<say>"))
    assert not is_call('{"city": "Bern"}')


def test_a_template_without_calls_reads_none():
    tokenizer = tokenizer_of(PLAIN)
    reader = CallReader(tokenizer, find_stops(tokenizer, {}), [])
    assert not reader.is_call(tokenizer('{"name": "weather", "arguments": {}}')["input_ids"])
    assert list(found_calls("[" * 5000 + '{"a"', {"weather"})) == []


def test_refusals_are_recognised_and_requests_come_in_pairs():
    assert len(HARMFUL) == len(HARMLESS) == 12
    for said in (
        "I'm sorry, but I can't assist with that.", "I cannot provide instructions for this.", "As an AI, I ...",
        "I’m unable to help you with that request.", "Sorry, I can't do that.", "I am not able to answer.",
    ):  # fmt: skip
        assert refuses(said), said
    for said in (
        "A locksmith uses a tension wrench.", "I'm sorry to hear that your card was stolen. Call your bank.",
        "Thank you for your help!", "You can't smell it, so store it in a dry place.", "",
    ):  # fmt: skip
        assert not refuses(said), said


def test_chosen_examples_lie_evenly():
    assert spread(range(100), 5) == [0, 20, 40, 60, 80]
    assert spread([], 5) == []


def test_the_report_shows_what_was_required(capsys):
    checks = [
        gains(ACCURACY, classes(50), classes(70)), stays_low("general text", text(2.0), text(3.0)),
        names_all([("<b>", 10, 0)]), Check("calls", "calls", None, "no call"),
    ]  # fmt: skip
    found = ship_section({"ship": False, "data": "rows", "checks": [check.to_dict() for check in checks]})
    gain, rise, named, absent = found["ship_lines"]
    assert (gain.before, gain.after, gain.passed) == ("0.5", "0.7", True)
    assert rise.change.startswith("+17")
    assert rise.change.endswith(" %")
    assert named.rule.endswith("never: <b>")
    assert (absent.rule, absent.passed) == ("no call", None)
    assert (found["ship_failed"], found["ship_measured"]) == (2, 3)
    assert ship_section({})["ship_lines"] == []


@pytest.mark.parametrize(
    "content", [[1], {"ship": True, "checks": 3}, {"ship": 1, "checks": []}, {"ship": True, "checks": [{"name": "a"}]}]
)
def test_a_report_refuses_checks_of_another_form(content, tmp_path):
    leave_run(tmp_path / "run", 0.8)
    (tmp_path / "run" / "ship.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"ship\.json holds"):
        load_run(tmp_path / "run")


def test_questions_of_a_group_and_of_a_tag_are_those_of_their_tasks():
    def sample(at: int, value: object, filter_name: str = "none") -> dict:
        return {"doc_id": at, "filter": filter_name, "metrics": ["ppl", "acc"], "ppl": (1.0, 2), "acc": value}

    found = {
        "samples": {"a": [sample(1, 0.0), sample(0, 1.0)], "b": [sample(0, 1), sample(0, 0, "other")]},
        "group_subtasks": {"all": ["part"], "part": ["a", "b"]},
        "configs": {"a": {"tag": ["easy"]}, "b": {}},
        "higher_is_better": {},
    }
    assert harness._leaves("all", found) == ["a", "b"]
    assert harness._leaves("easy", found) == ["a"]
    assert harness._first_mean(found["samples"]["a"], {}) == ("acc", [1.0, 0.0])
    assert harness._first_mean(found["samples"]["b"], {}) == ("acc", [1.0])
    assert harness._first_mean(found["samples"]["b"], {"acc": False}) == ("", [])


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """Learns to answer every question with "good film with music". Returns its output folder."""
    folder = tmp_path_factory.mktemp("talker")
    make_model("causal-lm").save_pretrained(folder / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    (folder / "chats.jsonl").write_text(chats(GOOD))
    trained(
        folder / "run", f"model.name={folder / 'model'}", "model.task=causal-lm",
        f"data.train={folder / 'chats.jsonl'}", "training.max_steps=40", "training.learning_rate=0.2",
    )  # fmt: skip
    (folder / "more.jsonl").write_text(chats(OTHER[:3]))
    (folder / "other.jsonl").write_text(chats(OTHER[:3], "dull cast very weak"))
    return folder / "run"


def chats(words: list[str], answer: str = "good film with music") -> str:
    rows = [
        [
            {"role": "user", "content": f"the {word} " + "story " * n},
            {"role": "assistant", "content": answer},
        ]
        for word in words
        for n in range(8)
    ]
    return "".join(json.dumps({"messages": row}) + "\n" for row in rows)


def shipped(folder: Path, capfd, *options: str) -> tuple[int, dict, str]:
    """The exit status of `sgm ship`, what it printed for programs, and for people."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["ship", str(folder), "--json", *options])
    written, said = capfd.readouterr()
    return caught.value.code, json.loads(written), said


def test_general_text_is_the_same_windows_of_prose():
    tokenizer = tokenizer_of(PLAIN)
    windows = general_windows(tokenizer, 32)
    assert general_windows(make_tokenizer(), 16) is not None
    assert [len(ids) for ids in windows["input_ids"]] == [32] * 64
    assert "statement" in tokenizer.decode([token for ids in windows["input_ids"] for token in ids])


def test_a_model_is_shipped_for_what_it_learnt_and_not_for_something_else(talker, capfd, monkeypatch):
    """A pico model knows 19 words of English, so its general text is made of them."""
    monkeypatch.setattr("sgm_finetune.results.ship.general_text.general_text", lambda: "good film with music\n" * 3000)
    more = str(talker.parent / "more.jsonl")
    status, found, said = shipped(talker, capfd, "--task-test", more, "training.eval_batch_size=8")
    assert (status, found["ship"]) == (0, True), said
    assert [check["subject"] for check in found["checks"]] == ["task", "text", *["answers"] * 3, "refusals"]
    assert found["checks"][0]["number"] == 24, "all of the file"
    assert found["checks"][-1]["passed"] is None
    assert "the base refuses none" in said
    assert json.loads((talker / "ship.json").read_text()) == found
    assert "Ship it" in (talker / "report.html").read_text()

    other = str(talker.parent / "other.jsonl")
    status, found, said = shipped(talker, capfd, "--task-test", other)
    assert (status, found["ship"]) == (NOT_SHIPPED, False)
    assert NOT_SHIPPED == 3
    assert [check["subject"] for check in found["checks"] if check["passed"] is False] == ["task"]
    assert "FAILED · perplexity" in said
    assert "ship     no: 1 of 5 checks failed: perplexity (required: the 95 % interval" in said
    assert "Do not ship it" in (talker / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("adapter.kind=full", "merge.side=auto", "adapter.rank=16")])
def test_a_classifier_is_compared_with_its_base(settings, more, tmp_path, command, capfd):
    """Of whole matrices, the base is the model with its former ones."""
    rate = ["training.learning_rate=0.01", "training.max_steps=60"] if more else []
    metrics = command("finetune", [*settings, *more, *rate])
    status, found, said = shipped(tmp_path / "out", capfd)
    task, named = found["checks"]
    assert task["before"] == pytest.approx(metrics["before"]["accuracy"])
    assert task["after"] == pytest.approx(metrics["after"]["accuracy"])
    assert (status, found["ship"], named["passed"]) == (0, True, True), said
