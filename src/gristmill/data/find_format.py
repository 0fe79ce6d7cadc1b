"""The chat format of a model folder or of a name."""

from gristmill.core.errors import InputError
from gristmill.data.chat import Message
from gristmill.data.chat_format import FORMATS, ChatFormat, TokenFormat
from gristmill.data.template import ChatTemplate
from gristmill.data.template_format import TemplateFormat, explained
from gristmill.data.tokenizer import Tokenizer

# Turns as plain text, for a Base without tokens of its own for chats.
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% elif message.role == 'user' %}{{ 'User:\n' + message.content + '\n\n' }}"
    "{% elif message.role == 'assistant' %}{{ 'Assistant:\n' + message.content + eos_token + '\n\n' }}"
    "{% else %}{{ raise_exception('There are no turns but of system, user and assistant.') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
# What a template must write as a known format does, to be rendered as that one.
TRIAL_TEXTS = ("And 12.5 stones?", "  two blanks first", "\n\na line break first", "blanks behind  ", "\u00e9\u4e2d line behind\n", "")
TRIAL_TOOL = {
    "type": "function",
    "function": {"name": "mill", "description": "Grinds.", "parameters": {"type": "object"}},
}


def matching_formats(tokenizer: Tokenizer) -> list[TokenFormat]:
    """The formats whose control tokens the tokenizer has."""
    return [f for f in FORMATS.values() if all(tokenizer.has(t) for t in f.special_tokens)]


def guess_format(tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a model folder: its own template, or, if it has none, the format whose control tokens the tokenizer has.

    A template that writes every conversation of a set as one of `FORMATS` does is rendered as that one, which is faster.

    Raises:
        InputError: the template cannot be used, or there is none and not exactly one format fits.
    """
    fits = matching_formats(tokenizer)
    if tokenizer.chat_templates:
        for known in fits:
            if tokenizer.cuts_headers and tokenizer.chat_templates == {"default": known.template}:
                return known
        with explained(tokenizer.place):
            template = ChatTemplate(tokenizer.chat_templates, tokenizer)
        own = TemplateFormat(template, tokenizer)
        return next((known for known in fits if _writes_as(own, known, tokenizer)), own)
    if len(fits) != 1:
        names = ", ".join(f.name for f in fits) or "none"
        raise InputError(
            f"Cannot tell the chat format from the tokenizer ({names} fit), and the model folder brings no chat template: name one of "
            f"{', '.join(FORMATS)}; or `plain`, which needs no tokens of its own; or give the model tokens, by `gristmill init "
            "--add-chat-tokens` or `gristmill add-chat-tokens`."
        )
    return fits[0]


def find_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """A chat format by name, or the model folder's own for `auto`."""
    if name == "auto":
        return guess_format(tokenizer)
    if name == "plain":
        return TemplateFormat(ChatTemplate({"default": PLAIN}, tokenizer.with_chat_template(PLAIN)), tokenizer, name)
    if name not in FORMATS:
        raise InputError(f"Unknown chat format {name!r}: choose auto, plain or one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def with_template_of(chat_format: ChatFormat, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the chat template of the format that a model is trained in: unchanged where that is the folder's own."""
    if isinstance(chat_format, TokenFormat):
        if tokenizer.chat_templates and guess_format(tokenizer) is chat_format:
            return tokenizer
        return tokenizer.with_chat_template(chat_format.template, cut=True)
    return tokenizer.with_chat_template(PLAIN) if chat_format.name == "plain" else tokenizer


def _writes_as(own: TemplateFormat, known: TokenFormat, tokenizer: Tokenizer) -> bool:
    """Whether a template gives the ids of a known format, for every conversation of a set, and has nothing that the format has not."""
    if own.variables - {"messages", "add_generation_prompt", "tools", *tokenizer.token_names}:
        return False
    turns = [Message("user", "A mill"), Message("assistant", "Yes")]
    if "tools" in own.variables:
        try:
            if own.render_turns(turns[:1], tokenizer, tools=[TRIAL_TOOL]) != own.render_turns(turns[:1], tokenizer):
                return False
        except InputError:  # it refuses them, too
            pass
    try:
        for system in (None, "Be kind.", " s\n"):
            for text in TRIAL_TEXTS:
                talk = [*([] if system is None else [Message("system", system)]), *turns, Message("user", text)]
                said = [*talk, Message("assistant", text)]
                if own.render_prompt(talk, tokenizer) != known.render_prompt(talk, tokenizer):
                    return False
                if own.render(said, tokenizer) != known.render(said, tokenizer):
                    return False
    except InputError:
        return False
    return True
