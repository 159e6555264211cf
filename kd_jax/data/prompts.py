"""From a row's prompt and context to the text that a model is given."""

from collections.abc import Callable

from kd_jax.data import sandbox
from kd_jax.data.tokenizer import Tokenizer
from kd_jax.resolve import nearest

TEMPLATES = ("plain", "alpaca", "chat")
Render = Callable[[str, str], str]  # (prompt, context) -> text


def make_render(name: str, tokenizer: Tokenizer) -> Render:
    """The template of that name as a function of a row's prompt and context.

    Args:
      name: plain, alpaca or chat.
      tokenizer: whose template chat uses; the others do not look at it.
    Returns:
      (prompt, context) -> the text whose continuation is the response.
    Raises:
      ValueError: for an unknown name; for chat, if the tokenizer has no template or one that Jinja cannot read.
    """
    if name == "chat":
        return _make_chat(tokenizer)
    if name == "alpaca":
        return alpaca
    if name == "plain":
        return plain
    raise ValueError(f"unknown prompt template {name!r}{nearest(name, TEMPLATES)}; there are {', '.join(TEMPLATES)}.")


def adds_special_tokens(name: str) -> bool:
    """Whether a rendered prompt is to be encoded with special tokens, such as a bos: a chat template writes its own."""
    return name != "chat"


def plain(prompt: str, context: str) -> str:
    r"""The prompt, a blank line and the context if there is one, and the end of the line, if it is not there yet.

    Example:
      >>> plain("def f(): return 1", "")
      'def f(): return 1\n'
      >>> plain("### Response:\n", "")
      '### Response:\n'
      >>> plain("Sum up.", "It rains.")
      'Sum up.\n\nIt rains.\n'
      >>> plain("", "")
      ''
    """
    text = "\n\n".join(part for part in (prompt, context) if part)
    return f"{text}\n" if text and not text.endswith("\n") else text


def alpaca(prompt: str, context: str) -> str:
    """The template of Stanford Alpaca as MiniLLM, DistiLLM, ABKD and AMiD use it for Dolly.

    References:
      Taori et al., "Stanford Alpaca: an instruction-following LLaMA model", 2023,
      https://github.com/tatsu-lab/stanford_alpaca
      Gu et al., "MiniLLM: knowledge distillation of large language models", 2024, https://arxiv.org/abs/2306.08543
    """
    paired = ", paired with an input that provides further context" if context else ""
    given = f"### Input:\n{context}\n\n" if context else ""
    return (
        f"Below is an instruction that describes a task{paired}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{prompt}\n\n{given}### Response:\n"
    )


def with_template_end(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Returns the tokenizer with the end that the template writes after a response as the end that is trained.

    A chat template often ends a turn with another token than the tokenizer's end token: `<|im_end|>` in place of
    `<|endoftext|>`. The first token after an answer is that end, if it is an added token. The tokenizer's own end token
    still ends a response. The templates plain and alpaca write no end, and the tokenizer stays as it is.

    Args:
      tokenizer: as loaded.
      name: plain, alpaca or chat.
    """
    if name != "chat" or tokenizer.chat_template is None:
        return tokenizer
    answer = "kd_jax"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
    try:
        text = _render_chat(tokenizer, messages, add_generation_prompt=False)
    except ValueError:  # a template without a turn of the assistant
        return tokenizer
    after = text.rpartition(answer)[2].lstrip(" ")
    ids = tokenizer.encode(after) if after and answer in text else []
    return tokenizer.with_ends(ids[0]) if ids and tokenizer.is_added(ids[0]) else tokenizer


def _make_chat(tokenizer: Tokenizer) -> Render:
    """The tokenizer's own template, with one user's message, up to where the answer begins; it runs in `sandbox`."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the template chat needs a chat_template, and {tokenizer.folder} has none, neither in "
            f"tokenizer_config.json nor as chat_template.jinja. Use a chat model's tokenizer, or the template plain or "
            f"alpaca."
        )
    folder = tokenizer.folder
    try:
        sandbox.render(tokenizer.chat_template, None)
    except ValueError as error:
        raise ValueError(f"the chat_template of {folder} {error}.") from error

    def chat(prompt: str, context: str) -> str:
        content = "\n\n".join(part for part in (prompt, context) if part)
        try:
            return _render_chat(tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True)
        except ValueError as error:
            raise ValueError(f"the chat_template of {folder} failed on the prompt {prompt[:60]!r}: {error}.") from error

    return chat


def _render_chat(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    """Returns the messages as the tokenizer's template writes them."""
    variables = {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
    }
    return sandbox.render(tokenizer.chat_template or "", variables)
