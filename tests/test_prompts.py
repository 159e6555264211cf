"""The prompt templates, word for word, and the sandbox that a tokenizer's own runs in."""

from types import SimpleNamespace

import pytest

from kd_jax.data import make_render
from kd_jax.data.prompts import adds_special_tokens

# The layout of the chat models that use <|im_start|>, with a block tag on its own line.
CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "  {% if true %}\n"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "  {% endif %}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(template=None):
    return SimpleNamespace(chat_template=template, folder="models/tiny", bos_token="<s>", eos_token="</s>")


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


def test_to_json_does_not_escape_html():
    assert make_render("chat", tokenizer("{{ messages[0].content | tojson }}"))("<é>", "") == '"<é>"'


def test_errors():
    with pytest.raises(ValueError, match=r"'alpacca' \(did you mean 'alpaca'\?\); there are plain, alpaca, chat"):
        make_render("alpacca", tokenizer())
    with pytest.raises(ValueError, match="the template chat needs a chat_template, and models/tiny has none"):
        make_render("chat", tokenizer())
    with pytest.raises(ValueError, match="models/tiny is not valid Jinja: line 2"):
        make_render("chat", tokenizer("\n{% if %}"))
