"""Chat templates are rendered as transformers renders them, and whatever one does is an answer or one line."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import Any

import pytest

from ara.data import chat_renderer
from ara.data.chat import Limits, chat_text, message
from ara.errors import ModelError
from tests.tiny import tiny_tokenizer

LLAMA3 = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%B %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""
CHATML = """\
{% for message in messages %}
    {% if loop.first and message.role != 'system' %}
<|im_start|>system
You help.<|im_end|>
    {% endif %}
<|im_start|>{{ message.role }}
{% generation %}{{ message.content }}{% endgeneration %}<|im_end|>
    {% if loop.index > 99 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
MISTRAL = """\
{{ bos_token }}{% set ns = namespace(users=0) %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{% set ns.users = ns.users + 1 %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
"""
GEMMA = """\
{{ bos_token }}{% for message in messages %}{% set role = 'model' if message.role == 'assistant' else message.role %}
{{ '<start_of_turn>' + role }}
{% if message.content is string %}{{ message.content | trim }}{% else %}{{ message.content | tojson }}{% endif %}
<end_of_turn>
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}{{ message | tojson if message }}
"""
REFUSES = "{{ raise_exception('tools\nare required') }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FILLS = "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a * 9 %}{% endfor %}"
PROMPT = ' Zoë says: "5 € <b>\n'


def with_template(template: Any) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [LLAMA3, CHATML, MISTRAL, GEMMA, {"default": MISTRAL, "tool_use": REFUSES}])
def test_the_text_is_that_of_transformers(here: None, template: Any) -> None:
    tokenizer = with_template(template)
    messages = [message("user", PROMPT)]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, messages) == expected and len(expected) > len(PROMPT)


@pytest.mark.parametrize("template", [LLAMA3, CHATML, GEMMA])
def test_a_conversation_with_a_system_prompt_is_that_of_transformers(here: None, template: str) -> None:
    answer = message("assistant", "Seven.")
    messages = [message("system", " Answer in verse.\n"), message("user", "How many?"), answer, message("user", PROMPT)]
    tokenizer = with_template(template)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, messages) == expected and "Answer in verse." in expected


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (MISTRAL, "the chat template refuses the prompt: Roles must alternate"),
        ("{{ messages[-1].content }}", "the chat template leaves the system prompt out"),
    ],
)
def test_a_template_that_knows_no_system_prompt_is_one_line(here: None, template: str, words: str) -> None:
    messages = [message("system", "Answer in verse."), message("user", PROMPT)]
    with pytest.raises(ModelError, match=words) as caught:
        chat_text(with_template(template), messages)
    assert caught.value.hint is not None and "--system" in caught.value.hint
    chat_text(with_template(template), messages[1:])


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (REFUSES, r"the chat template refuses the prompt: tools are required$"),
        ("{{ messages[0].parts.text }}", r"fails with UndefinedError: 'dict object' has no attribute 'parts'"),
        ("{% if %}", r"fails with TemplateSyntaxError: Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", r"fails with SecurityError"),
        ("{{ 1 // 0 }}", r"fails with ZeroDivisionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"fails with RecursionError"),
        ("{{ '\\ud800' }}", r"fails with UnicodeEncodeError"),
        ("{{ 'x' * 1001 }}", r"makes a text of more than 1,000 characters"),
        ({"tool_use": "x", "rag": "y"}, r"the model has the chat templates rag, tool_use, and no default"),
        ({"default": ["x"]}, r"the chat template is a list, expected a text"),
        (7, r"the chat template is a int, expected a text"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(here: None, template: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        chat_text(with_template(template), [message("user", PROMPT)], Limits(characters=1000))
    assert "\n" not in str(caught.value) and caught.value.hint is not None and "--no-chat" in caught.value.hint


def test_it_is_rendered_in_a_process_of_its_own() -> None:
    messages = [{"role": "user", "content": PROMPT}]
    tokenizer = with_template(GEMMA)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, [message("user", PROMPT)]) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="other systems limit less")
@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOPS, "was stopped after 1 s of computing"),
        (FILLS, "takes more than 0.125 GiB of memory"),
        ("{{ ''.join(['a'] * 10**8) }}", "takes more than 0.125 GiB of memory"),
    ],
)
def test_a_template_without_end_is_stopped(template: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        chat_text(with_template(template), [message("user", PROMPT)], Limits(seconds=1, bytes=2**27))


def test_a_text_that_would_fill_the_memory_is_never_tokenised(here: None) -> None:
    with pytest.raises(ModelError, match="makes a text of more than 1,048,576 characters"):
        chat_text(with_template("{{ 'x' * 10**7 }}"), [message("user", PROMPT)])
    prompt = "a" * 2**20
    assert (
        len(
            chat_text(
                with_template("{{ messages[0].content }}, {{ messages[0].content[:9] }}"), [message("user", prompt)]
            )
        )
        > 2**20
    )


def test_a_renderer_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_renderer, "__file__", "/nowhere/renderer.py")
    with pytest.raises(ModelError, match=r"was not rendered: .*nowhere"):
        chat_text(with_template(GEMMA), [message("user", PROMPT)])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems limit less")
@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGALRM, "was stopped after 8 s"), (signal.SIGKILL, "was stopped after 5 s of computing, or because of")],
)
def test_a_renderer_that_was_ended_is_told(monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    ended = subprocess.CompletedProcess([], -number, b"", b"")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_named: ended)
    with pytest.raises(ModelError, match=f"the chat template {words}"):
        chat_text(with_template(GEMMA), [message("user", PROMPT)])
