"""Uses the page of `sgm report --serve` and prints what it found as JSON.

It runs in a process of its own, because Gradio leaves sockets and loops open. Arguments: the folder of a classifier's
run and the folder of a chat model's run.
"""

from __future__ import annotations

import io
import json
import socket
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import gradio
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.commands import serve as serving
from sgm_finetune.results.load import load_trained, read_result


def page_of(folder: str, report: str | None = None):
    names = [f"output.dir={folder}"]
    log = StepLog(Console(file=io.StringIO()))
    return serving.build(load_trained(read_result(load_config(None, names), names, log), log), report)


def shown(page, *arguments):
    """Returns what the page finally shows after its first event."""
    found = page.fns[0].fn(*arguments)
    return found if isinstance(found, list) else list(found)[-1]


def main(classifier: str, talker: str) -> None:
    chat = page_of(talker)
    first = shown(chat, "the great story", [], [], 8, 0)
    second = shown(chat, "the fine story", first[0], first[1], 8, 0)
    try:
        refused = str(shown(chat, "story " * 600, [], [], 8, 0))
    except gradio.Error as error:
        refused = str(error)
    page = page_of(classifier, "<h1>Of & about</h1>")
    with socket.socket() as free:
        free.bind((serving.HOST, 0))
        port = free.getsockname()[1]
    _, url, shared = serving.launch(gradio, page, port, prevent_thread_lock=True)
    with urllib.request.urlopen(url) as answered:
        served = answered.read().decode()
    with ThreadPoolExecutor(4) as asking:
        together = list(asking.map(lambda _: shown(page, "good great fine film", ""), range(12)))
    found = {
        "together": all(answers == together[0] for answers in together),
        "classes": shown(page, "good great fine film", ""),
        "first": first, "second": second, "refused": refused, "url": url, "shared": shared, "page": served,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
