"""A conversation with a patched model in the terminal, its cache kept from turn to turn."""

from typing import Any

import torch
from rich.console import Console
from transformers import TextStreamer

from kvpress.compat import CACHE
from kvpress.patching import Handle

HELP = "/report shows what the cache holds, /reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer"


class Chat:
    """The turns so far, and the cache that has seen them.

    Args:
        model: a patched causal LM.
        tokenizer: its tokenizer, with a chat template.
        max_new_tokens: of an answer.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self.reset()

    def reset(self) -> None:
        """Forget all turns, and free the cache."""
        self.turns: list[dict[str, str]] = []
        self.ids: list[int] = []
        self.cache: Any = None

    def answer(self, text: str, streamer: Any = None) -> str:
        """The model's answer to one more turn, of which only what is new is fed to it.

        Where the template writes earlier turns in another way than they went (some leave thoughts out), the whole
        conversation goes through a new cache.

        Args:
            text: what the user says.
            streamer: is given the tokens as they come, as in `generate`.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        known, self.cache = self.cache, None  # stays so if this is interrupted
        going_on = known is not None and ids[: len(self.ids)] == self.ids
        prompt = torch.tensor([ids], device=self.model.device)
        pad = self.tokenizer.pad_token_id
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
            streamer=streamer,
            return_dict_in_generate=True,
            **({CACHE: known} if going_on else {}),
        )
        self.ids, self.cache = output.sequences[0].tolist(), output[CACHE]
        said = self.tokenizer.decode(self.ids[len(ids) :], skip_special_tokens=True)
        self.turns = [*turns, {"role": "assistant", "content": said}]
        return str(said)


def converse(chat: Chat, handle: Handle, console: Console) -> None:
    """Read lines and stream answers until the input ends."""
    trained = getattr(chat.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    console.print(f"{handle.describe()}; {HELP}", style="dim", highlight=False)
    while True:
        try:
            line = console.input("[bold]> [/]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
            console.print("forgotten", style="dim")
        elif line == "/report":
            console.print(handle.report(chat.cache) if chat.cache is not None else "no turn yet", highlight=False)
        elif line.startswith("/"):
            console.print(f"there is no {line}: {HELP}", style="red", highlight=False, markup=False)
        elif line:
            try:
                chat.answer(line, TextStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True))
            except KeyboardInterrupt:
                console.print("\nstopped, and this turn is forgotten", style="dim")
            if trained is not None and len(chat.ids) > trained:
                console.print(
                    f"{len(chat.ids)} tokens so far, and the model was trained for {trained}: /reset, or a policy that reaches "
                    "further",
                    style="yellow",
                    highlight=False,
                )
