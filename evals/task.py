"""What a task is: parameters, samples that follow from them, prompts in two parts, and a score for an answer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

from jinja2.exceptions import TemplateError

from kvpress.errors import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands in chat messages where the question begins and for the model's answers. A private-use character: no text of a task
# has it.
_MARK = "\ue0ff"


class TaskError(ValueError):
    """A task, a parameter or a data row that cannot work; the message names the value, the limit and the remedy."""


@dataclass(frozen=True)
class Turn:
    """A further question about the same context; the attributes are those of `Sample`."""

    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""
    golden: str = ""


@dataclass(frozen=True)
class Sample:
    """One question about one context, or several: as a conversation, or each by itself.

    Attributes:
        index: its place among the task's samples.
        context: the long text, with the instructions in front of it; what a policy compresses.
        question: what follows the context. `context + question + answer_prefix` is the whole prompt without a chat template.
        answers: what is right; see the task's metric.
        max_new_tokens: how many tokens an answer may have.
        answer_prefix: the answer's first words, given to the model; in a chat they stand in its turn.
        meta: what the sample was made from (length, depth, ...), for tables. `meta["stop"]`, if there, is a text at whose
            first appearance an answer may be ended. `meta["groups"]` names the groups that the sample belongs to, as
            {"difficulty": "hard"}: reports have a table of scores for each such name. Where there are two groups, and
            `meta["pairs"]` gives the samples of both the same text under that name, the table has their difference too.
        turns: further questions.
        golden: a right answer, with the space before it, as it stands in the conversation when the next turn is asked,
            whatever the model wrote; empty: what the model wrote stands there.
        spans: parts of the context by name, (start, end) of its characters; rows say how much of each the cache held when the
            first answer began.
        requests: whether each question is asked about the context alone, whose cache they share; else they are one
            conversation, and the cache goes on.
    """

    index: int
    context: str
    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()
    golden: str = ""
    requests: bool = False
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def each_turn(self) -> list["Sample"]:
        """A sample for each question, in order, with the same context: what an answer is scored by."""
        later = [
            replace(
                self,
                question=turn.question,
                answers=turn.answers,
                max_new_tokens=turn.max_new_tokens,
                answer_prefix=turn.answer_prefix,
                golden=turn.golden,
                turns=(),
            )
            for turn in self.turns
        ]
        return [replace(self, turns=()), *later]

    def with_answers_of(self, tokens: int) -> "Sample":
        """The same with as many tokens for each answer."""
        turns = tuple(replace(turn, max_new_tokens=tokens) for turn in self.turns)
        return replace(self, max_new_tokens=tokens, turns=turns)


@dataclass(frozen=True)
class Prompt:
    """Token ids of a sample's prompt: the model reads `context`, then `question`, and after each answer one of `turns`.

    Of a conversation with golden answers, one of `turns` begins with the golden answer to the question before it. Of requests,
    each of `turns` is read after `context`. `spans` are the sample's, as (start, end) of tokens of `context`.
    """

    context: list[int]
    question: list[int]
    turns: list[list[int]] = field(default_factory=list)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def ids(self) -> list[int]:
        """Up to the first answer."""
        return self.context + self.question

    @property
    def length(self) -> int:
        return len(self.context) + len(self.question)


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Samples, prompts and scores. The fields are the parameters; equal ones give equal samples.

    Args:
        seed: of all that is drawn; only the task's own generators are used.
        chat: whether prompts go through the tokenizer's chat template; None (the default) where the tokenizer has one and
            `wants_chat` says so.

    Raises:
        TaskError: a parameter out of range.
    """

    name: ClassVar[str]

    seed: int = 0
    chat: bool | None = None

    def __post_init__(self) -> None:
        check_count(self.seed, "seed", 0)
        if self.chat is not None and not isinstance(self.chat, bool):
            raise TaskError(f"chat={self.chat!r} is not known; give true, false, or nothing for the task's own choice")

    @property
    @abstractmethod
    def metric(self) -> str:
        """The name of the function in `kvpress.evals.metrics` that scores."""

    @property
    def label(self) -> str:
        """The task's name in a table, with the data set if it has several."""
        return self.name

    @property
    def wants_chat(self) -> bool:
        """Whether an instruction-tuned model should see the prompts as a user's message."""
        return True

    def check(self, scored: bool = True) -> None:
        """Refuse what cannot work before a model is loaded, as far as a task knows it then.

        Args:
            scored: whether answers will be scored; else only the texts are used.

        Raises:
            TaskError: broken data, or no way to score.
        """
        if scored and not self.metric:
            raise TaskError(f"{self.label} has no metric, so that answers cannot be scored; give metric")

    @property
    def context_role(self) -> str:
        """Whose message the context is in a chat: the "user"'s, with the question; or the "system"'s, before the question."""
        return "user"

    @property
    def thinks(self) -> bool:
        """Whether the chat template is asked to let the model think before it answers, where it can be."""
        return False

    @property
    def unseen_because(self) -> str:
        """Why the compressed prompt cannot hold the question; empty where it can."""
        return ""

    @abstractmethod
    def samples(self, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Sample]:
        """The samples, in a fixed order.

        Raises:
            TaskError: a length that is too short, or data that is missing or broken.
        """

    @abstractmethod
    def score(self, sample: Sample, answer: str) -> float:
        """How right an answer is, 0 to 1. `answer` is what the model wrote after `sample.answer_prefix`."""

    def details(self, sample: Sample, answer: str) -> dict[str, float]:
        """Further figures of an answer, each 0 to 1; a report has a column for the mean of each."""
        return {}

    def name_of(self, sample: Sample) -> str:
        """What an error calls a sample."""
        return f"sample {sample.index}"

    def prompt(self, sample: Sample, tokenizer: "PreTrainedTokenizerBase") -> Prompt:
        """The sample's token ids, context and question apart, with special tokens or the chat template around them.

        Raises:
            TaskError: `chat=True` with a tokenizer that has no chat template, or turns that the template does not show.
        """
        questions = sample.each_turn
        context, texts, special = sample.context, [one.question for one in questions], True
        if self._uses_chat(tokenizer):
            conversations = [[one] for one in questions] if sample.requests else [questions]
            rendered = [self._render(sample, conversation, tokenizer) for conversation in conversations]
            context, texts, special = rendered[0][0], [text for one in rendered for text in one[1:]], False
        golden = ["", *("" if sample.requests else self._golden(one, tokenizer) for one in questions[:-1])]
        pieces = [
            encode(tokenizer, before + text + one.answer_prefix, special=False)
            for before, text, one in zip(golden, texts, questions, strict=True)
        ]
        spans = self._token_spans(sample, context, tokenizer, special) if sample.spans else {}
        return Prompt(encode(tokenizer, context, special=special), pieces[0], pieces[1:], spans)

    def _token_spans(
        self, sample: Sample, context: str, tokenizer: "PreTrainedTokenizerBase", special: bool
    ) -> dict[str, tuple[int, int]]:
        """The sample's spans in tokens: those that begin within them.

        Raises:
            TaskError: the tokenizer does not say where its tokens stand, or the chat template changes the context.
        """
        first = context.rfind(sample.context)
        if first < 0:
            raise TaskError(f"the chat template of {tokenizer.name_or_path!r} changes the context; set chat=False")
        if not tokenizer.is_fast:
            raise TaskError(
                f"the tokenizer of {tokenizer.name_or_path!r} does not say where its tokens stand in a text, which "
                f"{self.label} needs; use a model with a fast tokenizer"
            )
        places = tokenizer(context, add_special_tokens=special, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        found = {}
        for name, (start, end) in sample.spans.items():
            within = [at for at, (a, b) in enumerate(places) if b > a and first + start <= a < first + end]
            found[name] = (within[0], within[-1] + 1) if within else (0, 0)
        return found

    def _golden(self, question: Sample, tokenizer: "PreTrainedTokenizerBase") -> str:
        """A golden answer; in a chat it begins the model's turn, without a space."""
        begins = self._uses_chat(tokenizer) and not question.answer_prefix
        return question.golden.lstrip() if begins else question.golden

    def _render(self, sample: Sample, questions: Sequence[Sample], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """The parts of a conversation in the chat template: up to the first question, then up to each answer."""
        first, *later = questions
        if self.context_role == "system":
            messages = [
                {"role": "system", "content": sample.context + _MARK},
                {"role": "user", "content": first.question},
            ]
        else:
            messages = [{"role": "user", "content": sample.context + _MARK + first.question}]
        for one in later:
            messages.append({"role": "assistant", "content": _MARK})
            messages.append({"role": "user", "content": one.question.strip()})
        # enable_thinking is for models that reason before they answer; the others' templates ignore it
        try:
            rendered = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, enable_thinking=self.thinks
            )
        except TemplateError as error:  # some templates refuse a system message
            where = f"the chat template of {tokenizer.name_or_path!r}"
            raise TaskError(f"{where} does not take the messages of {self.label} ({error}); set chat=False") from error
        parts: list[str] = rendered.split(_MARK)
        if len(parts) != len(questions) + 1:
            raise TaskError(
                f"sample {sample.index} has {len(questions)} turns, and the chat template of {tokenizer.name_or_path!r} does "
                "not show all of them; set chat=False"
            )
        return parts

    def _uses_chat(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
        has_template = bool(tokenizer.chat_template)
        if self.chat and not has_template:
            raise TaskError(
                f"chat=True, but the tokenizer of {tokenizer.name_or_path!r} has no chat template; set chat=False"
            )
        return has_template and (self.wants_chat if self.chat is None else self.chat)

    def rng(self, *what: object) -> Random:
        """A generator of its own for `what`, the same in every process."""
        return Random(" ".join(map(str, (self.label, self.seed, *what))))

    def to_dict(self) -> dict[str, Any]:
        """What `make_task` builds the same task from."""
        return {"name": self.name, **asdict(self)}


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, *, special: bool) -> list[int]:
    """Token ids, with the special tokens that this tokenizer puts at a text's start if `special`."""
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]  # the text goes on
    return ids


def check_count(value: object, name: str, least: int) -> None:
    """Raise a TaskError unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TaskError(f"{name}={value!r} is no count; give an int of at least {least}")


def check_flag(value: object, name: str) -> None:
    """Raise a TaskError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise TaskError(f"{name}={value!r} is not known; give true or false")


def check_counts(values: object, name: str, least: int) -> None:
    """Raise a TaskError unless `values` are one or more ints of at least `least`."""
    if not isinstance(values, tuple) or not values:
        raise TaskError(f"{name}={values!r} is no list; give one or more ints")
    for value in values:
        check_count(value, name, least)


def check_depths(values: object, name: str = "depths") -> None:
    """Raise a TaskError unless `values` are one or more numbers in [0, 1]."""
    if not isinstance(values, tuple) or not values:
        raise TaskError(f"{name}={values!r} is no list; give one or more numbers from 0 (the start) to 1 (the end)")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise TaskError(f"{name}={values!r}: {value!r} is outside [0, 1]; 0 is the context's start, 1 its end")


def check_choice(value: object, name: str, choices: Sequence[str]) -> None:
    """Raise a TaskError unless `value` is one of `choices`."""
    if value not in choices:
        raise TaskError(f"{name}={value!r} is not known{nearest(str(value), choices)}")
