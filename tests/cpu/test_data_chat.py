"""Which tokens of a chat carry loss, in several styles of template."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from moetrain.data.chat import ChatEncoder
from moetrain.data.sources import BadLine
from tests.data_helpers import make_tokenizer

CHATML = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}"
    "{% set text = '<|start_header|>' + m.role + '<|end_header|>\n\n' + m.content | trim + '<|eot|>' %}"
    "{% if loop.first %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header|>assistant<|end_header|>\n\n' }}{% endif %}"
)
# As Qwen3: reasoning stays in the turns after the last question and goes from the ones before it.
STRIPPING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As gpt-oss: the last answer ends with another token than the earlier ones.
OTHER_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|end|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Mistral: no header before an answer, and only user and assistant in turn.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
# As DeepSeek-R1: the header of an answer opens the reasoning too; the system role goes by unseen.
THINK_PROMPT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<|eot|>' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|eot|><think>\n' }}{% endif %}"
)
UNCLOSED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def encode(template: str, messages: Any, tools: Any = None, **options: Any) -> list[tuple[str, list[str]]]:
    """For each document its text and the stretches of text that carry loss."""
    tokenizer = make_tokenizer(template)
    documents = []
    for ids, loss in ChatEncoder(tokenizer).encode(messages, tools, "chat.jsonl:7", **options):
        runs: list[list[int]] = []
        for i, token in enumerate(ids.tolist()):
            if loss[i]:
                if i == 0 or not loss[i - 1]:
                    runs.append([])
                runs[-1].append(token)
        documents.append((tokenizer.decode(ids.tolist()), [tokenizer.decode(run) for run in runs]))
    return documents


TWO_TURNS = [
    {"role": "system", "content": "be quick"},
    user("the fox?"),
    assistant("jumps"),
    user("the dog?"),
    assistant("lazy"),
]


@pytest.mark.parametrize("template", [CHATML, STRIPPING])
def test_chatml_puts_loss_on_answers_and_the_token_that_ends_them(template: str) -> None:
    ((text, written),) = encode(template, TWO_TURNS)
    assert text == (
        "<|im_start|>system\nbe quick<|im_end|>\n<|im_start|>user\nthe fox?<|im_end|>\n<|im_start|>assistant\njumps"
        "<|im_end|>\n<|im_start|>user\nthe dog?<|im_end|>\n<|im_start|>assistant\nlazy<|im_end|>\n"
    )
    assert written == ["jumps<|im_end|>", "lazy<|im_end|>"]


def test_a_template_that_marks_the_answers_is_followed() -> None:
    ((_, written),) = encode(MARKED, TWO_TURNS)
    assert written == ["jumps<|im_end|>", "lazy<|im_end|>"]
    blank = MARKED.replace("'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n ' }}{% endgeneration %}")
    ((_, written),) = encode(blank, TWO_TURNS)
    assert written == ["jumps<|im_end|>\n ", "lazy<|im_end|>\n "], "a mark that ends in a blank stays in its turn"


def test_llama3_style() -> None:
    ((text, written),) = encode(LLAMA3, TWO_TURNS)
    assert text.startswith("<s><|start_header|>system<|end_header|>\n\nbe quick<|eot|>")
    assert text.count("<s>") == 1
    assert written == ["jumps<|eot|>", "lazy<|eot|>"]


def test_mistral_style_without_header() -> None:
    ((text, written),) = encode(INST, TWO_TURNS[1:])
    assert text == "<s>[INST] the fox? [/INST] jumps</s>[INST] the dog? [/INST] lazy</s>"
    assert written == [" jumps</s>", " lazy</s>"]


def test_reasoning_that_the_template_strips_later_is_learnt_in_a_document_of_its_own() -> None:
    chat = [
        user("one?"),
        assistant("1", reasoning_content="count"),
        user("two?"),
        assistant("", reasoning_content="look"),
        {"role": "tool", "content": "2"},
        assistant("2", reasoning="copy"),
    ]
    first, second = encode(STRIPPING, chat)
    assert first == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n<think>count</think>1<|im_end|>\n",
        ["<think>count</think>1<|im_end|>"],
    )
    assert second == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\n<think>look</think><|im_end|>\n<|im_start|>tool\n2<|im_end|>\n"
        "<|im_start|>assistant\n<think>copy</think>2<|im_end|>\n",
        ["<think>look</think><|im_end|>", "<think>copy</think>2<|im_end|>"],
    )


def test_a_last_answer_with_another_end_is_learnt_with_it() -> None:
    documents = encode(OTHER_END, TWO_TURNS)
    assert [written for _, written in documents] == [["jumps<|end|>"], ["lazy<|end|>"]]
    assert "jumps<|im_end|>" in documents[1][0]


def test_a_header_that_opens_the_reasoning_carries_no_loss() -> None:
    ((_, written),) = encode(THINK_PROMPT, [user("a"), assistant("b", reasoning_content="c")])
    assert written == ["c</think>b<|end|>"]
    ((_, written),) = encode(THINK_PROMPT, [user("a"), assistant("b")])
    assert written == ["b<|end|>"]


def test_an_unclosed_last_turn_is_ended_by_the_tokenizer() -> None:
    ((text, written),) = encode(UNCLOSED, TWO_TURNS[1:])
    assert text.endswith("assistant: lazy\n<|end|>")
    assert written == [" jumps\n", " lazy\n<|end|>"], "a token that reaches into the answer carries loss"


def test_tool_calls_carry_loss_and_tool_results_do_not() -> None:
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "jump", "arguments": '{"how": "h\u00f6her \U0001f98a"}'},
    }
    tools = [{"type": "function", "function": {"name": "jump", "parameters": {}}}]
    chat = [user("go"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "done"}, assistant("ok")]
    expected = ['<call>jump {"how": "h\u00f6her \U0001f98a"}</call><|im_end|>', "ok<|im_end|>"]
    for given in (tools, json.dumps(tools)):
        ((text, written),) = encode(CHATML, chat, given)
        assert written == expected
        assert text.startswith('<|im_start|>tools\n[{"type": "function"')
    concatenating = CHATML.replace("c.function.arguments | tojson", "c.function.arguments")  # as DeepSeek-V3
    ((_, written),) = encode(concatenating, chat, tools)
    assert written == expected


def test_content_in_parts_and_unicode() -> None:
    parts = [{"type": "text", "text": "the \u72d0\u72f8 "}, {"type": "text", "text": "\U0001f98a\u0301 jumps"}]
    ((text, written),) = encode(CHATML, [user(parts), assistant(parts)])
    assert "user\nthe \u72d0\u72f8 \U0001f98a\u0301 jumps<|im_end|>" in text
    assert written == ["the \u72d0\u72f8 \U0001f98a\u0301 jumps<|im_end|>"]


def test_an_answer_that_changes_how_the_turns_before_it_are_shown() -> None:
    """As gpt-oss, which drops the reasoning before a tool call once the final answer is there."""
    template = CHATML.replace(
        "{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.index0 > 1 or loop.last %}"
    )
    template = template.replace("m.reasoning_content + '</think>'", "(m.reasoning_content or '') + '</think>'")
    call = {"function": {"name": "jump", "arguments": {}}}
    chat = [
        user("go"),
        assistant("", reasoning_content="hm", tool_calls=[call]),
        {"role": "tool", "content": "done"},
        assistant("ok <|im_start|>assistant\n", reasoning_content="ah"),
    ]
    first, second = encode(template, chat)
    assert first[1] == ["<think>hm</think><call>jump {}</call><|im_end|>"]
    assert "hm" not in second[0]
    assert second[1] == ["<think>ah</think>ok <|im_start|>assistant\n<|im_end|>"]


def test_a_turn_that_only_the_next_header_ends() -> None:
    """As GLM: the model stops by writing the token that opens the next turn."""
    template = CHATML.replace("{{ '<|im_end|>\n' }}", "").replace("'<|im_start|>' + m.role", "'<|eot|>' + m.role")
    ((_, written),) = encode(template.replace("<|im_start|>assistant", "<|eot|>assistant"), TWO_TURNS)
    assert written == ["jumps<|eot|>", "lazy<|end|>"]


def real_templates() -> list[Path]:
    """Chat templates of published models that TRL ships, without those for images."""
    trl = importlib.util.find_spec("trl")
    folder = Path(trl.origin).parent / "chat_templates" if trl and trl.origin else Path("none")
    names = sorted(path for path in folder.glob("*.jinja") if not re.search("_vl|llava|idefics|smolvlm", path.stem))
    return names or [Path("trl is not installed")]


@pytest.mark.parametrize("path", real_templates(), ids=lambda path: path.stem)
def test_real_templates(path: Path) -> None:
    """Every word of the assistant carries loss exactly once and nobody else's does, or the template is refused."""
    if not path.is_file():
        pytest.skip(str(path))
    template = path.read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template)
    controls = set(
        re.findall(r"<\|[^|<>\s]+\|>|<\uff5c[^<>]+\uff5c>|<(?:start_of_turn|end_of_turn|turn\||\|turn)>", template)
    )
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(controls)})
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "jump", "arguments": '{"how": "FAR"}'}}
    result = {"role": "tool", "tool_call_id": "abcdefghi", "name": "jump", "content": "GOT"}
    parameters = {"type": "object", "properties": {"how": {"type": "string", "description": "d"}}}
    function = {"name": "jump", "description": "d", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    plain = [user("ASK1"), assistant("ANS1"), user("ASK2"), assistant("ANS2")]
    calling = [user("ASK1"), assistant(None, tool_calls=[call]), result, *plain[1:]]
    reasons = iter(("WHY1", "WHY2", "WHY3"))
    thinking = [m | {"reasoning_content": next(reasons)} if m["role"] == "assistant" else m for m in calling]
    encoder = ChatEncoder(tokenizer)
    for messages, words in [(plain, []), (calling, ["FAR"]), (thinking, ["FAR", "WHY1", "WHY2", "WHY3"])]:
        try:
            documents = encoder.encode(messages, tools if "FAR" in words else None, "f")
        except BadLine:
            assert messages is not plain
            continue
        written = "".join(tokenizer.decode(ids[loss].tolist()) for ids, loss in documents)
        for word in ["ANS1", "ANS2", *words]:
            assert written.count(word) == 1, (word, written)
        assert "ASK" not in written and "GOT" not in written, written


def test_all_tokens() -> None:
    ((text, written),) = encode(CHATML, TWO_TURNS, all_tokens=True)
    assert written == [text]


def test_messages_after_the_last_answer_are_left_out() -> None:
    ((text, written),) = encode(CHATML, [*TWO_TURNS, user("and?")])
    assert text.endswith("lazy<|im_end|>\n") and written == ["jumps<|im_end|>", "lazy<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        (INST, [{"role": "system", "content": "x"}, *TWO_TURNS[1:]], ["message 0", "'system'", "alternate"]),
        (INST, [user("a"), user("c"), assistant("d")], ["message 1", "'user'"]),
        (THINK_PROMPT, TWO_TURNS, ["leaves out message 0", "'system'", "data.chat_template"]),
        (LLAMA3, [user("a"), assistant("b", reasoning_content="hm")], ["leaves out the reasoning of message 1"]),
        (LLAMA3, [user("a"), assistant("b", tool_calls=[{"function": {"name": "f"}}])], ["leaves out the tool calls"]),
        (CHATML, [user("a")], ["no message has the role 'assistant'"]),
        (CHATML, [assistant("hello"), user("a"), assistant("b")], ["message 0", "generation"]),
        (CHATML.split("{% if add_gen")[0], TWO_TURNS, ["no header"]),
        (CHATML, [user([{"type": "image_url"}]), assistant("b")], ["message 0", "image_url"]),
        (CHATML, [{"content": "a"}], ["message 0", "'role'"]),
        (CHATML, [user(3)], ["message 0", "'content'"]),
        (CHATML, ["hi"], ["message 0", "'role'"]),
        (CHATML, [], ["empty"]),
        (CHATML, "hi", ["not a list"]),
        (
            CHATML,
            [user("a"), assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
            ["'f'", "JSON"],
        ),
        (CHATML, [user("a"), assistant("", tool_calls=[{"name": "f"}])], ["message 1", "function"]),
    ],
)
def test_what_cannot_be_rendered_is_named(template: str, messages: Any, words: list[str]) -> None:
    with pytest.raises(BadLine) as caught:
        encode(template, messages)
    for word in ["chat.jsonl:7", *words]:
        assert word in str(caught.value)


def test_a_tokenizer_without_template_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.chat_template"):
        ChatEncoder(make_tokenizer())
