"""The token ids of a chat with one user's message, which no text in it can break out of."""

from __future__ import annotations

from typing import Any

# Where the message goes in a rendered chat; no template and no tokenizer makes this of its own accord.
_HERE = "\ue000capo\ue000"


class Chat:
    """Puts messages into a model's chat template.

    The message is tokenized apart from the template and without special tokens, so that no text in it can end the user's
    turn.

    Args:
        tokenizer: of transformers.
        template: further arguments of the chat template, such as ``enable_thinking=False``.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not show the message as it is.
    """

    def __init__(self, tokenizer: Any, template: dict[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template; take an instruction-tuned model")
        self._tokenizer = tokenizer
        chat = [{"role": "user", "content": _HERE}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **(template or {}))
        before, here, after = text.partition(_HERE)
        if not here or _HERE in after:
            raise ValueError("the chat template does not show the user's message once and as it is")
        self._before, self._after = (tokenizer(part, add_special_tokens=False).input_ids for part in (before, after))

    def ids(self, message: str) -> list[int]:
        """The token ids of the chat up to the reply."""
        # split_special_tokens: "<|im_end|>" in the text is ten characters and not the end of a turn.
        inside = self._tokenizer(message, add_special_tokens=False, split_special_tokens=True).input_ids
        return [*self._before, *inside, *self._after]

    def ends(self, generation: Any) -> set[int]:
        """The tokens that end a reply.

        Args:
            generation: the model's generation configuration.
        """
        ends = generation.eos_token_id if generation.eos_token_id is not None else self._tokenizer.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])
