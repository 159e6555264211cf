"""The exact texts of the prompt templates, and the sandbox that renders the template of a tokenizer."""

import sys
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from kd_jax.data import Template, chat_template, make_render
from kd_jax.data.prompts import adds_special_tokens

# The template of chat models that use <|im_start|>, with a block tag on a line of its own.
CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "  {% if true %}\n"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "  {% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template=None, **tokens):
    tokens = tokens or {"bos_token": "<s>", "eos_token": "</s>"}
    return SimpleNamespace(chat_template=template, folder="models/tiny", special_tokens=tokens)


def test_plain():
    render = make_render("plain", tokenizer())
    assert render("def f(): ...", "") == "def f(): ...\n"
    assert render("Sum up.", "It rains.") == "Sum up.\n\nIt rains.\n"
    assert render("", "") == ""
    assert render("### Response:\n", "") == "### Response:\n"


def test_alpaca_is_the_papers_template():
    render = make_render("alpaca", tokenizer())
    assert render("Sing.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSing.\n\n### Response:\n"
    )
    assert render("Sum up.", "It rains.") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSum up.\n\n### Input:\nIt rains.\n\n### Response:\n"
    )


def test_chat_renders_as_transformers_does():
    render = make_render("chat", tokenizer(CHATML))
    assert render("Hi", "There") == "<s><|im_start|>user\nHi\n\nThere<|im_end|>\n<|im_start|>assistant\n"


def test_only_chat_writes_its_own_special_tokens():
    assert [adds_special_tokens(name) for name in ("plain", "alpaca", "chat")] == [True, True, False]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception('no such role') }}",
    ],
)
def test_the_sandbox_refuses(template):
    render = make_render("chat", tokenizer(template))
    with pytest.raises(ValueError, match="the chat_template of models/tiny failed on the prompt 'Hi'"):
        render("Hi", "")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}", "took longer than 0.3 s"),
        ("{{ lipsum(n=10**9) }}", "took longer than 0.3 s"),
        ("{{ 'a' * 10**10 }}", "makes a value of the size 1e\\+10; at most 16777216 is accepted"),
        ("{{ (2**99) ** (10**9) }}", "makes a value of the size"),
        ("{{ 'a' | center(10000000000) }}", "makes a value of the size"),
        ("{{ 3.5 | round(10**9) }}", "makes a value of the size"),
        ("{{ 'a'.ljust(10**10) }}", "makes a value of the size"),
        ("{% set n = namespace(s='a') %}{% for x in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "makes a value"),
        ("{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}", "makes a value of the size"),
        ("{% for x in range(99) %}{{ 'a' * 10**6 }}{% endfor %}", "writes more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)  # fmt: skip
def test_a_template_that_works_for_ever_or_fills_the_memory_is_stopped(template, message, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    trace = sys.gettrace()
    with pytest.raises(ValueError, match=f"the chat_template of models/tiny .*{message}"):
        make_render("chat", tokenizer(template))("Hi", "")
    assert sys.gettrace() is trace


def test_to_json_does_not_escape_html():
    assert make_render("chat", tokenizer("{{ messages[0].content | tojson }}"))("<é>", "") == '"<é>"'


def test_errors():
    with pytest.raises(ValueError, match=r"'alpacca' \(did you mean 'alpaca'\?\); there are plain, alpaca, chat"):
        make_render("alpacca", tokenizer())
    with pytest.raises(ValueError, match="the template chat needs a chat_template, and models/tiny has none"):
        make_render("chat", tokenizer())
    with pytest.raises(ValueError, match="models/tiny is not valid Jinja: line 2"):
        make_render("chat", tokenizer("\n{% if %}"))


# transformers 5.24 rendered the expected texts for the message "Hi" of a user.
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\n{%- if add_generation_prompt %}\n<assistant>\n"
            "{%- generation %} now{% set seen = 1 %} {%- endgeneration %}{{ seen }}\n{% endif %}",
            "<user>Hi\n<assistant> now\n",
        ),
        (
            "{% if true %}\n  {% generation %}\n  x {{ messages[0].content }}\n  {% endgeneration %}\n{% endif %}\nend\n",
            "  x Hi\nend",
        ),
        (
            "{{ tools is none }} {{ tools is defined }} {{ documents is none }} {{ unk_token is defined }} {{ pad_token }} "
            "{{ image_token }} {{ sep_token is defined }}",
            "True True True False <pad> <img> False",
        ),
        (
            "{{ {'b': 'é<', 'a': [1, 2]} | tojson(ensure_ascii=true, separators=(',', ':'), sort_keys=true) }}",
            '{"a":[1,2],"b":"\\u00e9<"}',
        ),
        ("{{ {'b': 1, 'a': 'é'} | tojson(indent='\t') }}|{{ 'é' | tojson(true) }}", '{\n\t"b": 1,\n\t"a": "é"\n}|"\\u00e9"'),
        (
            "{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "02",
        ),
        (
            "{% set ns = namespace(self=1, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
            "{{ ns.n }}{{ ns.self }}{{ dict(a=1).a }}{{ dict.fromkeys(['k']) }}",
            "111{'k': None}",
        ),
    ],
)  # fmt: skip
def test_the_sandbox_renders_as_transformers_does(template, expected):
    assert make_render("chat", tokenizer(template, pad_token="<pad>", image_token="<img>"))("Hi", "") == expected


@pytest.mark.parametrize("template", ["{{ namespace(_n=0) }}", "{% set ns = namespace() %}{% set ns._n = 1 %}"])
def test_a_namespace_has_no_hidden_attributes(template):
    with pytest.raises(ValueError, match="a namespace cannot have the attribute '_n'"):
        make_render("chat", tokenizer(template))("Hi", "")


DATED = (
    '{% if not day is defined %}{% set day = strftime_now("%d %b %Y") %}{% endif %}{{ day }} {{ messages[0].content }}'
)


def test_the_date_of_a_template_is_fixed():
    assert chat_template.names(DATED) == ["date", "day", "messages"]
    assert make_render("chat", tokenizer(DATED))("Hi", "") == "01 Jan 2026 Hi"
    dated = Template("chat", {"date": "2024-07-26"})
    assert make_render(dated, tokenizer(DATED))("Hi", "") == "26 Jul 2024 Hi"
    assert make_render(Template("chat", {"day": "today"}), tokenizer(DATED))("Hi", "") == "today Hi"


def test_a_template_reads_its_options_and_a_system_message():
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
        "{% if tools %}{{ tools[0].name }}{% endif %}"
    )
    options = ConfigDict({"enable_thinking": False, "tools": ({"name": "f"},), "bos_token": "<b>"})
    given = Template.of(ConfigDict({"template": "chat", "template_options": options, "system": "Be brief."}))
    assert given == Template("chat", options.to_dict() | {"tools": [{"name": "f"}]}, "Be brief.")
    text = "<b>system: Be brief.\nuser: Hi\n<think></think>f"
    assert make_render(given, tokenizer(template))("Hi", "") == text
    assert Template.of(ConfigDict({"template": "chat"})) == Template("chat"), "a run from before the two keys"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", {"enable_thinkin": 1}), r"never reads 'enable_thinkin' \(did you mean 'enable_thinking'\?\); .* enable_thinking"),
        (("chat", {"date": "2026-01-01"}), "data.template_options.date: the chat_template of models/tiny never reads 'date'"),
        (("chat", {"date": "May"}), "data.template_options.date='May' must be a date such as '2026-01-01'"),
        (("chat", {"messages": []}), "data.template_options.messages: each row's prompt decides this variable"),
        (("chat", {"x": float("nan")}), "data.template_options={'x': nan}: .* a finite number"),
        (("chat", {"x": {1, 2}}), "is not a JSON value"),
        (("chat", [1]), "must be an object of JSON"),
        (("chat", {}, "Be brief."), "models/tiny does not write a system message"),
        (("plain", {}, "Be brief."), "data.system='Be brief.' .* the template plain does not read this key"),
        (("alpaca", {"x": 1}), "data.template_options={'x': 1} .* the template alpaca does not read this key"),
    ],
)  # fmt: skip
def test_bad_options_are_refused(arguments, message):
    reads = "{% if enable_thinking %}{% endif %}{{ messages[-1].content }}{{ tools }}"
    with pytest.raises(ValueError, match=message):
        make_render(Template(*arguments), tokenizer(reads))


def test_a_template_that_refuses_a_system_message_is_named():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    with pytest.raises(ValueError, match="the chat_template of models/tiny failed .*: no system role"):
        make_render(Template("chat", system="Be brief."), tokenizer(refuses))
