"""`kvpress chat`: turns of a conversation, and the commands of its terminal."""

import pytest
import torch
from typer.testing import CliRunner

import kvpress
from kvpress.chat import Chat
from kvpress.cli import app
from kvpress.compat import CACHE
from support.tiny_saved import byte_tokenizer, save_tiny_model, tiny_model

TEMPLATE = (
    "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}{% if turn.role == 'user' %}\n{% else %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
POLICY = {"name": "h2o", "budget": 24}


@pytest.fixture
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def model(tokenizer):
    model = tiny_model(tokenizer)
    # letters alone, so that what is decoded and encoded again is the same
    letters = tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - set(letters))
    return model


def fed(model):
    """The number of tokens of each pass from now on."""
    counts = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: counts.append(args[0].shape[1]))
    return counts


def test_a_second_turn_feeds_what_is_new_to_the_same_cache(model, tokenizer):
    with kvpress.patch(model, POLICY) as handle:
        chat = Chat(model, tokenizer, 5)
        first = chat.answer("Hello there, who are you, and what do you do all day?")
        cache, before = chat.cache, len(chat.ids)
        counts = fed(model)
        second = chat.answer("Why?")
        assert chat.cache is cache
        whole = tokenizer.apply_chat_template(chat.turns[:-1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert counts == [len(whole) - (before - 1), 1, 1, 1, 1]
        assert handle.report(chat.cache).total.seen == len(whole) + 4
        assert handle.report(chat.cache).total.kept == 24

        # the same by hand: the prompt, then the whole text with that cache
        one = model.generate(
            torch.tensor([whole[: before - 5]]), max_new_tokens=5, pad_token_id=1, return_dict_in_generate=True
        )
        two = model.generate(torch.tensor([whole]), **{CACHE: one[CACHE]}, max_new_tokens=5, pad_token_id=1)
    assert tokenizer.decode(one.sequences[0, before - 5 :]) == first
    assert tokenizer.decode(two[0, len(whole) :]) == second


def test_a_template_that_writes_earlier_turns_otherwise_begins_anew(model, tokenizer):
    with kvpress.patch(model, POLICY) as handle:
        chat = Chat(model, tokenizer, 5)
        chat.answer("Hello")
        chat.ids[-1] = -1  # as if it had been
        cache, counts = chat.cache, fed(model)
        chat.answer("Why?")
        assert chat.cache is not cache
        assert handle.report(chat.cache).total.seen == counts[0] + 4


def test_reset_frees_the_cache(model, tokenizer):
    with kvpress.patch(model, POLICY):
        chat = Chat(model, tokenizer, 3)
        said = chat.answer("Hello")
        chat.answer("Why?")
        chat.reset()
        assert (chat.turns, chat.ids, chat.cache) == ([], [], None)
        assert chat.answer("Hello") == said


def test_an_interrupted_turn_is_forgotten(model, tokenizer):
    class Interrupt:
        def put(self, value):
            raise KeyboardInterrupt

    with kvpress.patch(model, POLICY):
        chat = Chat(model, tokenizer, 3)
        chat.answer("Hello")
        turns = chat.turns
        with pytest.raises(KeyboardInterrupt):
            chat.answer("Why?", Interrupt())
        assert chat.turns == turns
        assert chat.answer("And now?")


@pytest.fixture
def folder(tmp_path, tokenizer):
    save_tiny_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def run(*arguments, **options):
    return CliRunner().invoke(app, ("chat", *arguments), env={"COLUMNS": "100", "TERM": "dumb"}, **options)


def test_the_terminal(folder):
    lines = "/report\nHello\n/report\n\nWhy?\n/reset\n/report\n/what\n/quit\nnot read\n"
    result = run(folder, "--policy", "h2o", "--budget", "8", "--max-new-tokens", "3", input=lines)
    assert result.exit_code == 0, result.output
    assert result.output.count("no turn yet") == 2
    assert result.output.count("h2o(budget=8)") == 2  # the first line, and a report's title
    assert "there is no /what: /report shows" in result.output
    assert "forgotten" in result.output
    assert result.output.count("> ") == 9


def test_the_end_of_the_input_ends_it(folder):
    assert run(folder, input="").exit_code == 0


def test_beyond_the_trained_length_it_says_so(folder):
    result = run(folder, "--max-new-tokens", "1", input="x" * 1100 + "\n")
    assert "tokens so far, and the model was trained for 1024: /reset" in " ".join(result.output.split())


def test_a_model_without_a_chat_template(tmp_path):
    result = run(str(save_tiny_model(tmp_path)), input="Hello\n")
    assert result.exit_code == 2
    assert "has no chat template; use kvpress generate" in result.output
