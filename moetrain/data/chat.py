"""Chats in OpenAI's message form -> token ids and a mask of the tokens that carry loss.

Loss falls on what the assistant wrote: content, reasoning, tool calls and the token that ends the turn; not on the
header that opens the turn, which the template supplies at inference too.

The place of a turn in the text comes from rendering beginnings of the chat. With `text(k)` the template's text of the
first k messages and `prompt(k)` the same with the header of an answer, the answer k is what follows `prompt(k)` in
`text(k + 1)`. A later text may hold earlier turns in another form (Qwen3 and gpt-oss leave out the reasoning before
the last question). Each turn is therefore taken from the longest beginning of the chat whose text still starts with
`text(k + 1)`, the form in which the model wrote it, so one chat can become several documents. Where the template marks
the assistant's part itself (`{% generation %}`), only the marked part of a turn carries loss.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from moetrain.data.messages import REASONING, Message, read_messages, read_tools, with_text_arguments
from moetrain.data.sources import BadLine

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TEMPLATE_FAILURES = (TemplateError, TypeError, ValueError, KeyError, AttributeError)

Encoded = tuple[NDArray[np.int64], NDArray[np.bool_]]
Span = tuple[int, int]


class Rendered(NamedTuple):
    """One document of a chat: its text and the character ranges that carry loss, ascending."""

    text: str
    spans: list[Span]


class ChatEncoder:
    """Encodes chats with one tokenizer's chat template.

    Raises:
        ValueError: the tokenizer has no chat template, or is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the data is chat, but the tokenizer has no chat template; set data.chat_template to a Jinja file"
            )
        if not tokenizer.is_fast:
            raise ValueError(
                "chat data needs a fast tokenizer (tokenizer.json), which tells where tokens lie in a text"
            )
        self.tokenizer = tokenizer
        self.special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)

    def encode(self, messages: Any, tools: Any, origin: str, *, all_tokens: bool = False) -> list[Encoded]:
        """Token ids (int64) and loss flags (bool) of the documents of one chat.

        Args:
            messages: list of messages; `content` is a string or a list of text parts.
            tools: list of tool schemas, the same as JSON text, or None.
            origin: file and line, for errors.
            all_tokens: put loss on every token; the chat is then one document.

        Raises:
            BadLine: a malformed message, or one that the template refuses or leaves out.
        """
        chat = _Chat(self, read_messages(messages, origin), read_tools(tools, origin), origin)
        return [self._encode(document) for document in ([chat.whole()] if all_tokens else chat.documents())]

    def _encode(self, document: Rendered) -> Encoded:
        """A token carries loss when any part of it lies in a span."""
        encoded = self.tokenizer(
            document.text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        loss = np.zeros(len(ids), dtype=bool)
        for start, end in document.spans:
            loss |= (ends > start) & (starts < end)
        return ids, loss


class _Chat:
    """A conversation and the template's text of each of its beginnings."""

    def __init__(self, encoder: ChatEncoder, messages: list[Message], tools: list[Any] | None, origin: str) -> None:
        self.tokenizer = encoder.tokenizer
        self.special = encoder.special
        self.messages = messages
        self.tools = tools
        self.origin = origin
        self.template: str = self.tokenizer.get_chat_template(None, tools)
        self.marks_turns = bool(_GENERATION_TAG.search(self.template))
        self._texts: dict[tuple[int, bool], str] = {}
        self._marks: dict[int, list[Span]] = {}

    def whole(self) -> Rendered:
        """The chat as one text, all of it with loss."""
        text = self.text(len(self.messages))
        self._check_left_out(len(self.messages), text)
        return Rendered(text, [(0, len(text))])

    def documents(self) -> list[Rendered]:
        """Texts in which every assistant turn appears once with loss. Messages after the last turn are left out."""
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if not turns:
            raise BadLine(self.origin, "no message has the role 'assistant', so there is nothing to learn from")
        self._check_left_out(turns[-1] + 1, self.text(turns[-1] + 1))
        documents = []
        while turns:
            count = turns[-1] + 1
            text = self.text(count)
            here = [i for i in turns if text.startswith(self.text(i + 1))]
            spans = [span for i in here for span in self._loss_spans(i, count)]
            documents.append(self._closed(text, spans))
            turns = [i for i in turns if i not in here]
        return documents[::-1]

    def text(self, count: int, *, header: bool = False) -> str:
        """The template's text of the first `count` messages; with `header`, ready for an answer."""
        if count == 0:
            return ""
        if (count, header) not in self._texts:
            self._texts[count, header] = self._render(self.messages[:count], header)
        return self._texts[count, header]

    def _loss_spans(self, turn: int, count: int) -> list[Span]:
        """Character ranges that the assistant wrote in one turn, in the text of the first `count` messages."""
        text, end = self.text(count), len(self.text(turn + 1))
        if self.marks_turns:
            spans = self._marked(count)[len(self._marked(turn)) : len(self._marked(turn + 1))]
        else:
            start = self._after_header(turn, text)
            spans = [(start, self._turn_end(text, start, end))]
        self._check_complete(turn, "".join(text[a:b] for a, b in spans))
        return spans

    def _after_header(self, turn: int, text: str) -> int:
        """Where the assistant's words begin. A header may offer more than was used (`<think>`): what agrees counts."""
        before, prompt = self.text(turn), self.text(turn, header=True)
        start = _common_prefix(prompt, text)
        if start < len(before):
            start = self._after_rewritten(turn, text)
        no_header = start == len(before) and text.startswith(self.special, start)
        if turn == 0 or start < 0 or no_header:
            raise BadLine(
                self.origin,
                f"cannot tell where the assistant's words in message {turn} begin: the chat template gives no header "
                "for an answer there; let the chat start with a system or user message, or mark the assistant's part "
                "in the template with {% generation %}",
            )
        return start

    def _after_rewritten(self, turn: int, text: str) -> int:
        """Where the words begin when the answer changes how the messages before it are shown (gpt-oss): behind the
        header that follows the longest part in common, which must reach over the message before; -1 if there is none.
        """
        before = self.text(turn)
        header = self.text(turn, header=True)[len(before) :]
        places = [match.start() for match in re.finditer(re.escape(header), text)] if header else []
        common = {place: _common_prefix(before[::-1], text[:place][::-1]) for place in places}
        best = max(places, key=common.__getitem__, default=-1)
        content = self.messages[turn - 1]["content"].strip()
        known = best >= 0 and content and content in text[best - common[best] : best]
        return best + len(header) if known else -1

    def _turn_end(self, text: str, start: int, end: int) -> int:
        """Leave out the blanks that a template puts after the token that ends a turn: the model never writes them.
        Where nothing ends a turn but the token that opens the next one (GLM), the model writes that."""
        bare = start + len(text[start:end].rstrip())
        if text.endswith(self.special, start, bare):
            return bare
        return end + max((len(token) for token in self.special if text.startswith(token, end)), default=0)

    def _closed(self, text: str, spans: list[Span]) -> Rendered:
        """Where the template ends the last turn with no special token, end it with the tokenizer's, so that the model
        learns to stop."""
        eos = self.tokenizer.eos_token
        if self.marks_turns or not eos or text.rstrip().endswith(self.special):
            return Rendered(text, spans)
        start, _ = spans[-1]
        return Rendered(text + eos, [*spans[:-1], (start, len(text) + len(eos))])

    def _check_complete(self, turn: int, written: str) -> None:
        """Raise BadLine where the template leaves out the reasoning or the tool calls of an assistant's message."""
        message = self.messages[turn]
        reasoning = next((message[name] for name in REASONING if message.get(name)), "")
        calls = [call["function"]["name"] for call in message.get("tool_calls", [])]
        if any(name not in written for name in calls):
            lost = "tool calls"
        elif reasoning.strip() not in written:
            lost = "reasoning"
        elif not written:
            lost = "words"
        else:
            return
        raise BadLine(
            self.origin,
            f"the chat template leaves out the {lost} of message {turn} (assistant); "
            "set data.chat_template to a template that shows them",
        )

    def _check_left_out(self, count: int, text: str) -> None:
        """Raise BadLine for a message of another role that the template drops without a word."""
        for i, message in enumerate(self.messages[:count]):
            content = message["content"].strip()
            if message["role"] == "assistant" or not content or content in text:
                continue
            if self._attempt(self.messages[:i] + self.messages[i + 1 : count], False) == text:
                raise BadLine(
                    self.origin,
                    f"the chat template leaves out message {i} with the role {message['role']!r}; "
                    "set data.chat_template to a template that has this role",
                )

    def _render(self, messages: list[Message], header: bool) -> str:
        result = self._attempt(messages, header)
        if isinstance(result, str):
            return result
        refused = len(messages) - 1
        while refused and not isinstance(self._attempt(messages[:refused], False), str):
            refused -= 1
        raise BadLine(
            self.origin,
            f"the chat template refuses message {refused} with the role {messages[refused]['role']!r}: {result}; "
            "correct the message, or set data.chat_template to a template that has this role",
        )

    def _attempt(self, messages: list[Message], header: bool) -> str | Exception:
        """Text, or why there is none. Templates differ in whether the arguments of a tool call are an object or JSON
        text; the object goes first."""
        try:
            return self._apply(messages, header)
        except _TEMPLATE_FAILURES as error:
            failure = error
        try:
            return self._apply([with_text_arguments(message) for message in messages], header)
        except _TEMPLATE_FAILURES:
            return failure

    def _apply(self, messages: list[Message], header: bool) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tools=self.tools, tokenize=False, add_generation_prompt=header
        )
        assert isinstance(text, str)
        return text

    def _marked(self, count: int) -> list[Span]:
        """Ranges inside `{% generation %}` in the text of the first `count` messages.

        Transformers' own mask (`return_assistant_tokens_mask`) runs to the end of the chat where such a range ends in
        a blank that belongs to no token, so the ranges are turned into tokens here.
        """
        if count == 0:
            return []
        if count in self._marks:
            return self._marks[count]
        special: dict[str, Any] = self.tokenizer.special_tokens_map
        rendered: Any = render_jinja_template(  # annotated as text, returns texts and ranges
            conversations=[self.messages[:count]],
            tools=self.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **special,
        )
        self._marks[count] = list(rendered[1][0])
        return self._marks[count]


def _common_prefix(a: str, b: str) -> int:
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return len(a) if b.startswith(a) else next(differ, min(len(a), len(b)))
