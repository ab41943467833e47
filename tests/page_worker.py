"""Uses the page of `sgm report --serve` and prints what it found as JSON.

It runs in a process of its own, because Gradio leaves sockets and loops open. Arguments: the folder of a classifier's
run and the folder of a chat model's run.
"""

from __future__ import annotations

import http.client
import io
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import gradio
from processes import free_port
from rich.console import Console

from sgm_finetune.base.config_file import load_config
from sgm_finetune.base.console import StepLog
from sgm_finetune.commands import page as serving
from sgm_finetune.commands.server import guarded, refuse_strangers, run_server
from sgm_finetune.results.load import load_trained, read_result


def page_of(folder: str, report: str | None = None):
    names = [f"output.dir={folder}"]
    log = StepLog(Console(file=io.StringIO()))
    return serving.build(load_trained(read_result(load_config(None, names), names, log), log), report)


def shown(page, *arguments):
    """Returns what the page finally shows after its first event."""
    found = page.fns[0].fn(*arguments)
    return found if isinstance(found, list) else list(found)[-1]


UPLOAD = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
ASKED = {
    "by another name": {"headers": {"Host": "evil.example"}},
    "by localhost": {"headers": {"Host": "localhost:1234"}},
    "by another page": {"headers": {"Origin": "http://evil.example"}},
    "upload": {"path": "/gradio_api/upload", "body": UPLOAD, "headers": {**FORM, "Origin": "http://evil.example"}},
    "upload of its own": {"path": "/gradio_api/upload", "body": UPLOAD, "headers": FORM},
    "too much": {"path": "/gradio_api/queue/join", "body": b"x" * (2**20 + 1)},
}


def asked(port: int, path: str = "/", body: bytes | None = None, headers: dict[str, str] | None = None):
    """Returns the status and the text of the answer. Waits until the server is there."""
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection(serving.HOST, port, timeout=60)
            connection.request("GET" if body is None else "POST", path, body, headers or {})
            answered = connection.getresponse()
            return answered.status, answered.read().decode()
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise TimeoutError("the server did not start")


def main(classifier: str, talker: str) -> None:
    chat = page_of(talker)
    first = shown(chat, "the great story", [], [], 8, 0)
    second = shown(chat, "the fine story", first[0], first[1], 8, 0)
    try:
        refused = str(shown(chat, "story " * 600, [], [], 8, 0))
    except gradio.Error as error:
        refused = str(error)
    try:
        too_long = str(shown(chat, "x" * 100_001, [], [], 8, 0))
    except gradio.Error as error:
        too_long = str(error)
    page = page_of(classifier, "<h1>Of & about</h1>")
    port = free_port()
    application = serving.mount(page, port)
    application = guarded(application, refuse_strangers)
    threading.Thread(target=run_server, args=(application, port), daemon=True).start()
    served = asked(port)[1]
    statuses = {name: asked(port, **given)[0] for name, given in ASKED.items()}
    with ThreadPoolExecutor(4) as asking:
        together = list(asking.map(lambda _: shown(page, "good great fine film", ""), range(12)))
    found = {
        "together": all(answers == together[0] for answers in together),
        "classes": shown(page, "good great fine film", ""),
        "first": first, "second": second, "refused": refused, "page": served,
        "statuses": statuses, "too_long": too_long,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
