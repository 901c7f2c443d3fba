"""Scores against hand-computed ones."""

import pytest

from kvpress.evals import TaskError, metrics


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("The cat sat.", "a cat sat", 1),  # articles, case and punctuation do not count
        ("black cat", "the black dog", 0.5),  # precision 1/2, recall 1/2
        ("cat cat cat", "cat dog", 0.4),  # one word in common: precision 1/3, recall 1/2
        ("bird", "cat", 0),
        ("", "cat", 0),
        ("the", "a", 0),  # nothing is left
    ],
)
def test_qa_f1(answer, truth, expected):
    assert metrics.qa_f1(answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("北京。", "北京", 1),
        ("上海", "北京", 0),
        ("北京大学。", "北京大学，", 1),
        ("我爱北京", "北京", 0.5),  # 我 | 爱 | 北京: precision 1/3, recall 1
        ("，。", "北京", 0),
    ],
)
def test_qa_f1_zh(answer, truth, expected):
    assert metrics.qa_f1_zh(answer, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("the cat sat on the mat", "the cat sat on the mat", 1),
        ("the cat sat", "the cat sat down", 6 / 7),  # 3 in order: precision 1, recall 3/4
        ("sat cat the", "the cat sat", 1 / 3),  # only one word is in order
        ("The cat", "the cat", 0.5),  # case counts
        ("a b. c d", "c d. a b", 1),  # sentences may come in another order
        ("a b\nc", "a b c", 1),  # lines are no sentences
        ("x", "a b", 0),
        ("", "a b", 0),
    ],
)
def test_rouge(answer, truth, expected):
    assert metrics.rouge(answer, truth) == pytest.approx(expected)


def test_rouge_zh():
    assert metrics.rouge_zh("我爱北京", "我爱北京") == pytest.approx(1)
    assert metrics.rouge_zh("我爱北京", "我去北京") == pytest.approx(2 / 3)  # 我 | 爱 | 北京 and 我 | 去 | 北京
    assert metrics.rouge_zh("上海", "北京") == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Other location", 1),  # "location" is part of the truth's name
        ("Other location or Food", 0.5),
        ("Food", 0),
        ("location", 0),
        ("", 0),
    ],
)
def test_classification(answer, expected):
    assert metrics.classification(answer, "Other location", ["Food", "Other location", "location", "Date"]) == expected


def test_retrieval_and_count():
    assert metrics.retrieval("Paragraph 7", "Paragraph 7") == 1
    assert metrics.retrieval("7 or 8, I say 7", "Paragraph 7") == pytest.approx(2 / 3)
    assert metrics.retrieval("段落17", "段落7") == 0
    assert metrics.retrieval("none", "Paragraph 7") == 0
    with pytest.raises(TaskError, match="has no paragraph number"):
        metrics.retrieval("7", "Paragraph")
    assert metrics.count("There are 12.", "12") == 1
    assert metrics.count("12 of 15", "12") == 0.5
    assert metrics.count("112", "12") == 0
    assert metrics.count("twelve", "12") == 0


@pytest.mark.parametrize(
    ("answer", "truth", "expected"),
    [
        ("return x", "return x", 1),
        ("\n\nreturn x\nreturn y", "return x", 1),  # the first line, after empty ones
        ("```python\n# comment\n// too\nabcd", "abxd", 0.75),  # 3 of 4 characters stand in blocks in common: 2 * 3 / 8
        ("abc", "xyz", 0),
        ("# nothing else", "x = 1", 0),
        ("aab", "ab", 0.8),  # 2 * 2 / 5
        ("aaab", "ab", 0.67),  # 2 * 2 / 6, in whole percents
    ],
)
def test_code_sim(answer, truth, expected):
    assert metrics.code_sim(answer, truth) == expected


def test_string_matches():
    assert metrics.string_match_all("One and TWO", ["one", "two", "three", "ne"]) == 0.75
    assert metrics.string_match_any("One and TWO", ["three", "two"]) == 1
    assert metrics.string_match_any("One and TWO", ["three"]) == 0


def test_words_stand_by_themselves():
    assert metrics.words_found("it is 1234, yes", ["1234"]) == 1
    assert metrics.words_found("it is 12345", ["1234"]) == metrics.words_found("it is 01234", ["1234"]) == 0
    assert metrics.words_found("Quiet-Harbor!", ["quiet-harbor", "loud-harbor"]) == 0.5
    assert metrics.words_found("quiet-harbors", ["quiet-harbor"]) == 0


def test_infinitebench_scores():
    assert metrics.first_number(" 71432. Or 5", "71432") == 1
    assert metrics.first_number("5, 71432", "71432") == metrics.first_number("none", "71432") == 0
    assert metrics.first_number("714321", "71432") == 0
    assert metrics.word_in_answer('is: "ab-c".\n', "ab-c") == 1
    assert metrics.word_in_answer("xab-c", "ab-c") == 0


@pytest.mark.parametrize(
    ("score", "library"), [(metrics.rouge, "rouge_score.rouge_scorer"), (metrics.qa_f1_zh, "jieba")]
)
def test_a_missing_library_names_the_extra(without, score, library):
    without(library)
    with pytest.raises(TaskError, match=r"needs .*pip install 'kvpress-toolkit\[eval\]'"):
        score("a", "b")
