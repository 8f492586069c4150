"""What Jinja2 makes of a chat template, and a running chat_template_check to compare with.

Shared by check_templates.py and make_template_fixtures.py. Needs transformers and jinja2.
"""

import datetime
import json
import os
import subprocess
import time

os.environ["TZ"] = "UTC"  # strftime_now() shows local time on both sides
time.tzset()

import jinja2  # noqa: E402
from transformers.utils import chat_template_utils  # noqa: E402

NOW = 1_785_000_000  # 2026-07-25


class FixedDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(NOW, tz)


chat_template_utils.datetime = FixedDatetime


def render_chat(template, case):
    """(text, None) or (None, what went wrong), by transformers."""
    special = {k: case[k] for k in ("bos_token", "eos_token") if case.get(k)}
    try:
        rendered, _ = chat_template_utils.render_jinja_template(
            conversations=[case["messages"]],
            tools=case.get("tools"),
            chat_template=template,
            add_generation_prompt=case.get("add_generation_prompt", False),
            **special,
            **case.get("extra", {}),
        )
        rendered[0].encode()
        return rendered[0], None
    except Exception as error:  # whatever a template can do wrong
        return None, f"{type(error).__name__}: {error}"


def render_plain(template, context):
    """The same for a template that isn't about messages."""
    try:
        text = chat_template_utils._compile_jinja_template(template).render(**context)
        text.encode()
        return text, None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


class Checker:
    """A running chat_template_check. One request at a time."""

    def __init__(self, binary):
        self.process = subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")

    def render(self, template, case):
        request = {
            "template": template,
            "messages": json.dumps(case.get("messages", []), ensure_ascii=False),
            "add_generation_prompt": case.get("add_generation_prompt", False),
            "bos_token": case.get("bos_token", ""),
            "eos_token": case.get("eos_token", ""),
            "now": NOW,
        }
        if case.get("tools") is not None:
            request["tools"] = json.dumps(case["tools"], ensure_ascii=False)
        if case.get("extra"):
            request["extra"] = json.dumps(case["extra"], ensure_ascii=False)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"chat_template_check ended on {request}")
        answer = json.loads(line)
        return answer.get("output"), answer.get("error")
