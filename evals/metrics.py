"""Scores of one answer, 0 to 1. `answer` is what a model wrote, `truth` one right answer.

LongBench's are named as there, without `_score`; where a number can differ from its `metrics.py`, the docstring says so.
"""

import importlib
import logging
import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from fractions import Fraction
from typing import Any

from kvpress.evals.task import TaskError
from kvpress.haystack import has_word

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、"
    "〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏"
)
LIBRARIES = {
    "rouge": [("rouge_score.rouge_scorer", "rouge-score")],
    "rouge_zh": [("rouge_score.rouge_scorer", "rouge-score"), ("jieba", "jieba")],
    "qa_f1_zh": [("jieba", "jieba")],
    "kept_secret": [("rouge_score.rouge_scorer", "rouge-score")],
}
"""Metric -> the modules that it imports, and their distributions."""
_LATEX = (
    (r"\\(left|right|displaystyle)(?![a-zA-Z])|\\[,!;: ]", ""),
    (r"(?<=\d)\s*\\(text|mathrm)\s*\{[^{}]*\}(\^\{?\d\}?)?$", ""),
    (r"\\(text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\2"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\^\s*(\\circ|\{\s*\\circ\s*\})|\\?%|\\?\$|°", ""),
    (r"\s+", ""),
    (r"^[a-zA-Z]=", ""),
    (r"\.$", ""),
)
"""What has no meaning in an answer, in order: pattern and what stands instead."""
_NO_ENGLISH_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def words_found(answer: str, truths: Sequence[str]) -> float:
    """Share of the truths that stand in the answer by themselves: 123 is not in 1234. Upper and lower case are the same."""
    return sum(has_word(answer.lower(), truth.lower()) for truth in truths) / len(truths)


def string_match_all(answer: str, truths: Sequence[str]) -> float:
    """RULER's: share of the truths that are in the answer, also inside a word. Upper and lower case are the same."""
    return sum(truth.lower() in answer.lower() for truth in truths) / len(truths)


def string_match_any(answer: str, truths: Sequence[str]) -> float:
    """RULER's for question answering: 1 if any of the truths is in the answer."""
    return float(any(truth.lower() in answer.lower() for truth in truths))


def first_number(answer: str, truth: str) -> float:
    """InfiniteBench's: 1 if the first digits in the answer are the truth."""
    digits = re.search(r"[0-9]+", answer)
    return float(digits is not None and digits[0] == truth)


def first_value(answer: str, truth: str) -> float:
    """SCBench's for numbers: 1 if the first number in the answer is the truth; its fraction does not count for a whole one."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    whole = re.fullmatch(r"\d+", truth) is not None
    return float(found is not None and (int(float(found[0])) if whole else float(found[0])) == float(truth))


def word_in_answer(answer: str, truth: str) -> float:
    """InfiniteBench's for key-value pairs: 1 if the truth is one of the words between spaces and punctuation."""
    return float(truth in re.split(r"[\s:\"'.,?!{}]+", answer))


def chosen_letter(answer: str) -> str | None:
    """LongBench v2's: the letter that "The correct answer is (B)", or without brackets, names first; None without one."""
    plain = answer.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", plain) or re.search(r"The correct answer is ([A-D])", plain)
    return found[1] if found else None


def boxed(answer: str, truth: str) -> float:
    """1 if the last \\boxed{...} of the answer, braces balanced, is the truth: as a number, or as simplified LaTeX."""
    inside = last_box(answer)
    return float(inside is not None and same_value(inside, truth))


def boxed_strict(answer: str, truth: str, first: bool) -> float:
    """NVIDIA's kvpress's: 1 if what stands between "boxed{" (the first or the last) and the next "}" is the truth."""
    parts = answer.split("boxed{")
    return float(len(parts) > 1 and parts[1 if first else -1].split("}")[0] == truth)


def last_box(text: str) -> str | None:
    """What stands in the last \\boxed{...} whose braces close; None if there is none."""
    for start in reversed([found.end() for found in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0) * (text[at - 1] != "\\")
            if not depth:
                return text[start:at]
    return None


def same_value(one: str, other: str) -> bool:
    """Whether two answers to a problem are the same number, or the same LaTeX after spaces and forms of no meaning are gone."""
    first, second = (simple_latex(text) for text in (one, other))
    numbers = [as_number(text) for text in (first, second)]
    return first == second or (None not in numbers and numbers[0] == numbers[1])


def simple_latex(text: str) -> str:
    """One form of what means the same: no dollars, spaces, sizes of brackets, units behind numbers or full stop; one fraction."""
    for pattern, plain in _LATEX:
        text = re.sub(pattern, plain, text)
    return text


def as_number(text: str) -> Fraction | None:
    """The value of 12, -0.5, 1,000, 3/4 or \\frac{3}{4}; None for anything else."""
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    found = re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}", text)
    if found:
        text = f"{found[1]}{found[2]}/{found[3]}".replace("--", "")
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def exact_match(answer: str, truth: str) -> float:
    """1 if the words are the same, without articles, punctuation and case."""
    return float(_english_words(answer) == _english_words(truth))


def qa_f1(answer: str, truth: str) -> float:
    """F1 of the words, without articles, punctuation and case."""
    return _f1(_english_words(answer), _english_words(truth))


def qa_f1_zh(answer: str, truth: str) -> float:
    """F1 of the words that jieba cuts, without punctuation and case."""
    return _f1(_chinese_words(answer), _chinese_words(truth))


def rouge(answer: str, truth: str) -> float:
    """ROUGE-L F1 over sentences: the union of the longest common subsequences of each sentence pair.

    Words are what stands between white space, sentences end with a full stop, as in LongBench's. That uses the package
    `rouge`, which counts a repeated word once; here it is the package `rouge-score` (rougeLsum), which counts it as often as
    it comes, as ROUGE does. On texts of a few sentences the two differ by up to a few hundredths in either direction.
    """
    scorer = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeLsum"], tokenizer=_Words())
    truth, answer = (" ".join(text.split()).replace(".", "\n") for text in (truth, answer))  # one sentence a line
    return float(scorer.score(truth, answer)["rougeLsum"].fmeasure)


def rouge_zh(answer: str, truth: str) -> float:
    """`rouge` of the words that jieba cuts."""
    jieba = _library("jieba")
    return rouge(" ".join(jieba.cut(answer)), " ".join(jieba.cut(truth)))


def share_told(answer: str, text: str) -> float:
    """Share of a text's words that the answer has in the text's order: ROUGE-L's recall, without case and punctuation."""
    scorer = _library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(["rougeL"])
    return float(scorer.score(text, answer)["rougeL"].recall)


def classification(answer: str, truth: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the answer names, if the truth is one of them.

    A class whose name is part of the truth's name does not count.
    """
    named = [name for name in classes if name in answer and (name == truth or name not in truth)]
    return 1 / len(named) if truth in named else 0.0


def retrieval(answer: str, truth: str) -> float:
    """Share of the numbers in the answer that are the truth's ("Paragraph 7", "段落7")."""
    number = re.search(r"\d+", truth)
    if number is None:
        raise TaskError(f"the answer {truth!r} has no paragraph number; the data row is broken")
    return count(answer, number[0])


def count(answer: str, truth: str) -> float:
    """Share of the numbers in the answer that are the truth."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def code_sim(answer: str, truth: str) -> float:
    """Similarity of the truth and the answer's first line that has no backtick, # or //, in whole percents.

    By difflib's matching blocks, which is what fuzzywuzzy uses alone. With python-Levenshtein installed beside it,
    fuzzywuzzy aligns the lines at best, and its numbers are equal or larger.
    """
    lines = (line for line in answer.lstrip("\n").split("\n") if not re.search("`|#|//", line))
    return round(100 * SequenceMatcher(None, next(lines, ""), truth).ratio()) / 100


def check_library(metric: str) -> None:
    """Refuse a metric whose library is not installed, before anything is answered.

    Raises:
        TaskError: it is missing; the message names it and the extra.
    """
    for module, distribution in LIBRARIES.get(metric, ()):
        _library(module, distribution)


def _f1(answer: list[str], truth: list[str]) -> float:
    same = (Counter(answer) & Counter(truth)).total()
    return 2 * same / (len(answer) + len(truth)) if same else 0.0


def _english_words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_ENGLISH_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    words = ("".join(word.lower().translate(_NO_PUNCTUATION).split()) for word in _library("jieba").cut(text))
    return [word for word in words if word]


class _Words:
    """rouge-score's tokenizer: nothing is lower-cased, stemmed or left out."""

    def tokenize(self, text: str) -> list[str]:
        return text.split()


def _library(module: str, distribution: str = "") -> Any:
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        wanted = distribution or module
        raise TaskError(f"the metric needs {wanted}; run: pip install 'kvpress-toolkit[eval]'") from error
    if module == "jieba":
        library.setLogLevel(logging.WARNING)  # it reports loading its dictionary
    return library
