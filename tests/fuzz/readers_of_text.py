"""The readers of a tokenizer's files and of a chat template, for `readers`."""

import json

import tokenizers
from hypothesis import strategies as st

from kd_jax.data import Tokenizer, chat_template, make_render
from tests.fuzz.mutations import TEXTS, below, changed_bytes, documents, pick

PATIENCE = 0.5  # seconds for a template; a run allows 10
LONG = "u" * 2**23


class TokenizerFiles:
    """Damages tokenizer.json, the files that name special tokens, or config.json. Encodes and decodes texts."""

    share = 0.2
    texts = (
        "",
        "a b c",
        "Hello, wörld! 123\n\t  ",
        "<s>a</s>",
        "日本語🙂\u0301\x00",
        "ab" * 200,
        "ab " * 100,
        "ab " * 1000,
    )
    kinds = (
        "Replace", "Prepend", "Precompiled", "ByteLevel", "Metaspace", "Sequence", "Split", "TemplateProcessing", "BertProcessing",
        "RobertaProcessing", "NFKC", "Strip", "BPE", "Unigram", "WordPiece", "WordLevel", "ByteFallback", "Fuse", "CTC", "Truncate",
        "FixedLength", "Punctuation", "Digits", "UnicodeScripts", "Isolated", "Removed", "Contiguous", "Fixed", "BatchLongest", "LongestFirst",
    )  # fmt: skip
    values = (
        *kinds, {"type": "Replace", "pattern": {"String": "a"}, "content": "bb" * 200}, {"type": "ByteLevel", "add_prefix_space": True},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}, {"type": "Prepend", "prepend": "▁"}, {"Regex": "("},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Removed", "invert": False}, {"type": "Metaspace", "replacement": "▁"},
        {"type": "Strip", "content": " ", "start": 10**6, "stop": 10**6}, {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}, {"Fixed": 10**12}, ["a", 10**6], ["", -1.0], ["a", "b"],
        {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABhAGIA"}, {"type": "FixedLength", "length": 0}, "a b", "ab c",
    )  # fmt: skip

    # Fields of tokenizer.json and of the model in it that take very long without a limit.
    slow = (
        ("bpe", {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 1000}}, {}),
        ("bpe", {"pre_tokenizer": None}, {"continuing_subword_prefix": LONG, "merges": []}),
        ("bpe", {}, {"end_of_word_suffix": LONG, "merges": []}),
        ("bpe", {}, {"vocab": {"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4, LONG: 5}, "merges": [], "unk_token": LONG}),
        ("unigram", {"pre_tokenizer": None}, {"vocab": [["<s>", 0.0], ["</s>", 0.0], *([("ab▁" * 330)[:i], -1.0] for i in range(1, 990))]}),
    )  # fmt: skip

    def base(self, folder):
        for name, tokenizer in _tokenizers().items():
            (folder / name).mkdir(parents=True)
            tokenizer.save(str(folder / name / "tokenizer.json"))
            named = {
                "eos_token": "</s>",
                "bos_token": {"content": "<s>"},
                "pad_token": None,
                "chat_template": "{{ messages }}",
            }
            (folder / name / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
            ids = {"eos_token_id": [1, 0], "bos_token_id": 0, "pad_token_id": 2}
            (folder / name / "config.json").write_text(json.dumps(ids), encoding="utf-8")

    def inputs(self, folder):
        keys = (
            "type",
            "ids",
            "id",
            "content",
            "pattern",
            "unk_id",
            "vocab",
            "merges",
            "padding",
            "truncation",
            "dropout",
        )
        keys += ("continuing_subword_prefix", "end_of_word_suffix")
        choices = []
        for name in sorted(file.name for file in folder.iterdir()):
            for file in ("tokenizer.json",) * 3 + ("tokenizer_config.json", "config.json"):
                base = json.loads((folder / name / file).read_text(encoding="utf-8"))
                # tokenizer_config.json names no tokens where the ids come from config.json.
                more = {} if file != "config.json" else {f"{name}/tokenizer_config.json": b"{}"}
                choices.append(
                    documents(base, (*base, *keys), self.values).map(
                        lambda content, path=f"{name}/{file}", more=more: {path: content} | more
                    )
                )
            named = {"eos_token": "</s>", "pad_token": token("<pad>"), "additional_special_tokens": ["<x>"]}
            decoder = {"eos_token": "</s>", "added_tokens_decoder": {"1": token("</s>"), "9": token("<x>")}}
            for file, base in {
                "special_tokens_map.json": named, "added_tokens.json": {"<x>": 9, "<y>": 10}, "tokenizer_config.json": decoder,
            }.items():  # fmt: skip
                changed = documents(base, (*base, *keys), self.values)
                choices.append(changed.map(lambda content, path=f"{name}/{file}": {path: content}))
        choices *= 3
        for name, fields, model in self.slow:
            base = json.loads((folder / name / "tokenizer.json").read_text(encoding="utf-8")) | fields
            base["model"] |= model
            changed = documents(base, (*base, *keys), self.values)
            choices.append(changed.map(lambda content, path=f"{name}/tokenizer.json": {path: content}))
        return st.one_of(choices)

    def read(self, folder, files):
        tokenizer = Tokenizer.load(folder / next(iter(files)).partition("/")[0])
        special = (tokenizer.eos_id, tokenizer.pad_id, *([] if tokenizer.bos_id is None else [tokenizer.bos_id]))
        for special_tokens in (False, True):
            rows = tokenizer.encode_batch(self.texts, add_special_tokens=special_tokens)
            for ids in (*rows, special):
                assert all(type(token) is int and 0 <= token < tokenizer.vocab_size for token in ids)
                assert len(ids) < 1_000_000
                tokenizer.decode(ids, skip_special_tokens=special_tokens)


def token(content):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}  # fmt: skip


def _tokenizers():
    """Returns a tokenizer of each model type, with as many of the other parts as fit."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    letters = ["<s>", "</s>", "<pad>", "<unk>", *"abcdefHlo wr", "▁", "##b", "Ġ", "ab", "▁a"]
    ids = {letter: number for number, letter in enumerate(letters)}
    split = pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\s"), "isolated")
    made = {
        "bpe": tokenizers.Tokenizer(models.BPE(ids, [("a", "b")], unk_token="<unk>", byte_fallback=True)),
        "unigram": tokenizers.Tokenizer(models.Unigram([(letter, -float(i)) for letter, i in ids.items()], 3, False)),
        "wordpiece": tokenizers.Tokenizer(models.WordPiece(ids, unk_token="<unk>")),
        "wordlevel": tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>")),
    }
    made["bpe"].pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), split, pre_tokenizers.ByteLevel()]
    )
    made["bpe"].decoder = decoders.ByteLevel()
    made["unigram"].normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    made["unigram"].pre_tokenizer = pre_tokenizers.Metaspace()
    made["unigram"].decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made["wordpiece"].normalizer = normalizers.BertNormalizer()
    made["wordpiece"].pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made["wordpiece"].decoder = decoders.WordPiece()
    made["wordlevel"].pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made["wordlevel"].enable_padding(length=8)
    made["wordlevel"].enable_truncation(4)
    for tokenizer in made.values():
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
        tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return made


class Template:
    """Damages chat_template.jinja and renders a prompt."""

    share = 0.1
    chatml = (
        "{{ bos_token }}{% for message in messages %}\n<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    atoms = (
        "messages", "messages[0].content", "bos_token", "x", "'a'", "10**9", "2**99", "0", "-1", "range(99999)", "namespace(a=1)", "loop", "self", "cycler",
        "joiner", "dict(a=1)", "lipsum", "none", "true", "[1, 2]", "{'a': x}", "''.__class__", "raise_exception", "messages.append", "x.y.z",
    )  # fmt: skip
    operators = ("+", "*", "**", "~", "//", "%", "<", "in", "and", "is", "|", ".", "[", ",")
    filters = (
        "length", "tojson", "tojson(indent=4)", "join", "list", "center(10**9)", "upper", "format(1)", "indent(10**8)", "wordwrap(1)", "batch(2)", "sort",
        "attr('__class__')", "replace('a', 'aaaaaaaaaa')", "map('length')", "sum", "groupby('a')", "pprint", "xmlattr", "truncate(1)", "e", "trim", "int",
    )  # fmt: skip
    blocks = (
        "{%% for x in %s %%}%s{%% endfor %%}", "{%% if %s %%}%s{%% endif %%}", "{%% set x = %s %%}%s", "{%% set ns = namespace(s=%s) %%}%s",
        "{%% macro f(x=%s) %%}%s{{ f() }}{%% endmacro %%}{{ f() }}", "{%% filter upper %%}{{ %s }}%s{%% endfilter %%}", "{%% call f(%s) %%}%s{%% endcall %%}",
        "{%% include %s %%}%s", "{%% for x in %s recursive %%}%s{{ loop(messages) }}{%% endfor %%}", "{%% raw %%}{{ %s }}{%% endraw %%}%s",
        "{%% for x in range(99999) %%}{%% for y in range(99999) %%}{%% set x = %s %%}%s{%% endfor %%}{%% endfor %%}", "{%% import %s as x %%}%s",
        "{%% set x %%}{{ %s }}%s{%% endset %%}{{ x * 99999 }}", "{%% for x in %s %%}{%% break %%}%s{%% endfor %%}",
    )  # fmt: skip

    def base(self, folder):
        TokenizerFiles().base(folder)

    def inputs(self, folder):
        return self._template(self).map(lambda content: {"bpe/chat_template.jinja": content})

    @staticmethod
    @st.composite
    def _template(draw, self):
        def expression(depth=2):
            made = pick(draw, self.atoms)
            for _ in range(below(draw, 3) if depth else 0):
                if below(draw, 2):
                    made = f"{made} | {pick(draw, self.filters)}"
                else:
                    made = f"({made} {pick(draw, self.operators)} {expression(depth - 1)})"
            return made

        def block(depth):
            if depth and below(draw, 2):
                return pick(draw, self.blocks) % (expression(), block(depth - 1))
            return f"{{{{ {expression()} }}}}" if below(draw, 4) else pick(draw, TEXTS)

        made = self.chatml if not below(draw, 4) else "".join(block(3) for _ in range(1 + below(draw, 2)))
        content = made.encode("utf-8", "surrogatepass")
        return changed_bytes(draw, content) if not below(draw, 3) else content

    def read(self, folder, files):
        chat_template.SECONDS = PATIENCE
        render = make_render("chat", Tokenizer.load(folder / "bpe"))
        for prompt, context in (("Hi", ""), ("{{ x }}\n<é>", "There")):
            assert isinstance(render(prompt, context), str)
