"""Conversations as text: the tokenizer's chat template, and which characters the assistant said."""

from __future__ import annotations

from typing import Any

from pyinf.errors import DataError

__all__ = ["Spans", "render_messages"]

Spans = list[tuple[int, int]]


def render_messages(messages: Any, tokenizer: Any, where: str, spans: bool = True) -> tuple[str, Spans | None]:
    """The conversation as the chat template writes it, and the character spans ``[start, end)`` of the assistant.

    A turn is what the template adds after the generation prompt, its end mark included, white space after that not: the
    tokens that the model would have to produce. With ``spans=False`` the spans are None. Raises :class:`DataError` when
    the messages are ill-formed, the tokenizer has no template, or the template rewrites earlier turns.
    """
    _check(messages, where)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where}: messages need a chat template and the tokenizer has none; give a tokenizer that has one "
            f"(--tokenizer), or the fields prompt and response"
        )
    whole = _apply(tokenizer, messages, where)
    if not spans:
        return whole, None
    found: Spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Some templates fail on an empty conversation; nothing comes before a first turn then but what the whole has.
        before = _apply(tokenizer, messages[:turn], where, prompt=True) if turn else ""
        if not whole.startswith(before):
            before = _apply(tokenizer, messages[:turn], where)
        after = whole if turn == len(messages) - 1 else _apply(tokenizer, messages[: turn + 1], where)
        if not whole.startswith(before) or not whole.startswith(after) or len(after) < len(before):
            raise DataError(
                f"{where}: the chat template rewrites earlier turns, so message {turn + 1} is not found in its text; "
                f"split the conversation after each answer, or count every token (--prompt-loss)"
            )
        found.append((len(before), len(after.rstrip())))
    return whole, found


def _check(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a non-empty list of objects with role and content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: message {number} is not an object with a role and content")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}: the content of message {number} is not text")


def _apply(tokenizer: Any, messages: list[dict[str, Any]], where: str, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program and raises what it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{where}: the chat template refuses these messages ({reason[:160]})") from error
