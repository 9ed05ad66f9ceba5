"""What users ask for, checked and brought into one shape: prompts, conversations and options become `Ask`s.

Knows the tokenizer and no engine.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypedDict

from lineshaft.errors import InvalidSamplingParams, RequestError
from lineshaft.sampling.params import SamplingParams
from lineshaft.tokenizer import Tokenizer
from lineshaft.tokenizer.messages import check_tools

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids as they are, or {"prompt": text} or {"prompt_token_ids": ids} with a "cache_salt" of its own."""
Conversation = str | Sequence[Mapping[str, Any]]
"""Messages, each with "role" and "content" as in OpenAI's API; a text is one message of the user."""
Params = SamplingParams | Sequence[SamplingParams]
KEYS = ({"prompt"}, {"prompt", "cache_salt"}, {"prompt_token_ids"}, {"prompt_token_ids", "cache_salt"})


class Options(TypedDict, total=False):
    """What may be asked of requests beside their sampling."""

    priority: int | Sequence[int]  # lower ones run first; one, or one for each prompt
    deadline_s: float | None  # seconds from now, after which what is unfinished ends
    cache_salt: str  # prompts share cached pages only under an equal salt: one for each tenant


class ChatOptions(Options, total=False):
    """What may be asked of a chat beside its sampling."""

    tools: Sequence[Mapping[str, Any]] | None  # functions, as in OpenAI's API
    chat_template: str | None  # in the place of the model's own
    add_generation_prompt: bool | None  # None: unless the last message is continued
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any] | None  # what else the template reads


@dataclass(frozen=True)
class Ask:
    """One prompt, ready for the engine."""

    ids: Sequence[int]
    text: str | None  # where the ids came from
    params: SamplingParams
    priority: int = 0
    deadline_s: float | None = None
    salt: bytes = b""
    tools: frozenset[str] | None = None  # names of the functions that the answer may call


def completions(
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    params: Params | None,
    *,
    priority: int | Sequence[int] = 0,
    deadline_s: float | None = None,
    cache_salt: str = "",
) -> list[Ask]:
    """An Ask for each prompt. Raises RequestError."""
    one = isinstance(prompts, (str, Mapping)) or _is_ids(prompts)
    several: Sequence[Any] = [prompts] if one else _several(prompts)
    found = [_encode(tokenizer, prompt, cache_salt) for prompt in several]
    shared = zip(found, _spread(params, len(found)), _priorities(priority, len(found)), strict=True)
    deadline_s = _deadline(deadline_s)
    return [Ask(ids, text, one, rank, deadline_s, salt) for (ids, text, salt), one, rank in shared]


def chats(
    tokenizer: Tokenizer,
    conversations: Conversation | Sequence[Conversation],
    params: Params | None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    priority: int | Sequence[int] = 0,
    deadline_s: float | None = None,
    cache_salt: str = "",
) -> list[Ask]:
    """An Ask for each conversation. Raises RequestError, and ChatError where the template cannot be filled."""
    listed = isinstance(conversations, (list, tuple)) and len(conversations) > 0
    one = isinstance(conversations, str) or (listed and isinstance(conversations[0], Mapping))
    several: Sequence[Any] = [conversations] if one else _several(conversations)
    functions = check_tools(tools)
    more = _variables(chat_template_kwargs) | {
        "template": chat_template, "tools": functions, "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }  # fmt: skip
    names = frozenset(tool["function"]["name"] for tool in functions) if functions else None
    texts = [tokenizer.chat(conversation, **more) for conversation in several]
    salt, deadline_s = _salt(cache_salt), _deadline(deadline_s)
    shared = zip(texts, _spread(params, len(texts)), _priorities(priority, len(texts)), strict=True)
    return [
        Ask(tokenizer.encode(text, add_special=False), text, one, rank, deadline_s, salt, names)
        for text, one, rank in shared
    ]


def _is_ids(prompts: Any) -> bool:
    return isinstance(prompts, (list, tuple)) and len(prompts) > 0 and isinstance(prompts[0], Integral)


def _several(items: Any) -> Sequence[Any]:
    """Raises RequestError for anything but a list or tuple of prompts."""
    if not isinstance(items, (list, tuple)):
        raise RequestError(
            f"prompts given as {type(items).__name__}: give a text, a list of token ids, or a list of those"
        )
    return items


def _encode(tokenizer: Tokenizer, prompt: Any, salt: str) -> tuple[Sequence[int], str | None, bytes]:
    """The token ids of one prompt, its text and its salt."""
    if isinstance(prompt, Mapping):
        if set(prompt) not in KEYS:
            raise RequestError(
                f"a prompt with the keys {', '.join(map(repr, prompt)) or 'none'}: give 'prompt' or 'prompt_token_ids',"
                " and 'cache_salt' if you like"
            )
        salt = prompt.get("cache_salt", salt)
        prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
    if isinstance(prompt, str):
        return tokenizer.encode(prompt), prompt, _salt(salt)
    if not isinstance(prompt, (list, tuple)):
        raise RequestError(f"a prompt given as {type(prompt).__name__}: give a text or a list of token ids")
    return prompt, None, _salt(salt)


def _spread(params: Params | None, count: int) -> list[SamplingParams]:
    """One SamplingParams per prompt. Raises InvalidSamplingParams for another number of them."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)) or not all(isinstance(one, SamplingParams) for one in params):
        raise InvalidSamplingParams(f"sampling params given as {type(params).__name__}: give SamplingParams, or a list")
    if len(params) != count:
        raise InvalidSamplingParams(f"{len(params)} sampling params for {count} prompts: give one, or one for each")
    return list(params)


def _priorities(given: Any, count: int) -> list[int]:
    several = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(several) != count or not all(isinstance(one, Integral) and not isinstance(one, bool) for one in several):
        raise RequestError(f"priority = {given!r}: give a whole number, or a list of them, one for each prompt")
    return [int(one) for one in several]


def _deadline(seconds: Any) -> float | None:
    if seconds is None:
        return None
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool) or not 0 < seconds <= sys.float_info.max:
        raise RequestError(f"deadline_s = {seconds!r:.60}: give a number of seconds above 0, or None")
    return float(seconds)


def _salt(salt: Any) -> bytes:
    if not isinstance(salt, str):
        raise RequestError(f"cache_salt = {salt!r}: give a text")
    return salt.encode("utf-8", "surrogatepass")


def _variables(given: Any) -> dict[str, Any]:
    """What else a template reads. Raises RequestError for what is no mapping, or names what has an option."""
    if given is None:
        return {}
    reserved = {"messages", "template", *ChatOptions.__annotations__}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given) or reserved & set(given):
        allowed = f"a mapping of names other than {', '.join(sorted(reserved))}"
        raise RequestError(f"chat_template_kwargs = {given!r}: give {allowed}")
    return dict(given)
