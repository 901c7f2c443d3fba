"""Paraphrased needles: no word of the question in the fact, literal controls on the same text, and the gap in reports."""

import re
from itertools import product

import pytest
from nltk.stem.snowball import SnowballStemmer

from kvpress.evals import make_task
from kvpress.evals.report import write_report
from kvpress.evals.task import TaskError
from kvpress.evals.tasks.paraphrased_needle import ANSWER_PREFIX, FRAME, words
from kvpress.haystack import book_text, has_word
from support.saved import row, save

FUNCTION_WORDS = {
    "a", "an", "the", "of", "in", "on", "at", "to", "by", "with", "up", "as", "is", "it", "from", "for", "near", "among", "close",
    "who", "whose", "which", "what", "had", "never", "s",
}  # fmt: skip
IRREGULAR = {"grew": "grow", "grown": "grow", "kept": "keep", "made": "make", "ate": "eat", "eaten": "eat", "spoke": "speak",
             "flies": "fly", "flew": "fly", "caught": "catch", "drew": "draw", "known": "know", "knew": "know", "shot": "shoot",
             "swam": "swim", "stood": "stand", "had": "have", "pulled": "pull", "people": "person", "feet": "foot",
             "teeth": "tooth", "fungi": "fungus", "wives": "wife", "sewn": "sew"}  # fmt: skip
STEM = SnowballStemmer("english").stem
PAIRS = [
    (relation, thing, paraphrase)
    for relation in words()["relations"]
    for thing, paraphrase in relation["things"].items()
]


def lemmas(text):
    found = re.findall(r"[a-z]+", text.lower())
    return {STEM(IRREGULAR.get(word, word)) for word in found if word not in FUNCTION_WORDS}


def shared(question, fact):
    """Content lemmas of both, and those of the question that begin with the same four letters as one of the fact."""
    asked, said = lemmas(question), lemmas(fact)
    alike = {one for one, other in product(asked, said) if len(one) > 3 and one[:4] == other[:4]}
    return (asked & said) | alike


@pytest.mark.parametrize(("relation", "thing", "paraphrase"), PAIRS, ids=[thing for _, thing, _ in PAIRS])
def test_no_lemma_of_the_question_is_in_the_fact(relation, thing, paraphrase):
    fact = relation["fact"].format(name="X", thing=thing)
    question = FRAME.format(question=relation["paraphrased"].format(thing=paraphrase))
    assert not shared(question + ANSWER_PREFIX, fact)
    literal = relation["literal"].format(thing=thing)
    assert lemmas(thing) <= shared(literal, fact)  # the control has them, so that the check can fail


def test_the_lists():
    relations, names = words()["relations"], words()["names"]
    assert len(set(names)) == len(names) >= max(len(relation["things"]) for relation in relations)
    assert not any(has_word(book_text(), name) for name in names)
    for relation in relations:
        assert len(set(relation["things"].values())) == len(relation["things"]) >= 4
        assert [text.count("{thing}") for text in (relation["fact"], relation["literal"], relation["paraphrased"])] == [
            1
        ] * 3


def test_both_wordings_ask_about_the_same_text(real):
    task = make_task({"name": "paraphrased_needle", "lengths": [500, 1000], "depths": [0.3, 1], "chat": False})
    samples = list(task.samples(real))
    assert len(samples) == 2 * 2 * 2 * 2
    assert [sample.index for sample in samples] == list(range(16))
    by_pair = {}
    for sample in samples:
        prompt = task.prompt(sample, real)
        assert len(prompt.context + prompt.question) == sample.meta["length"]
        assert sample.context.count(sample.answers[0]) == 1 and sample.answers[0] not in sample.question
        assert task.score(sample, f" {sample.answers[0]}.") == 1 and task.score(sample, " Nobody") == 0
        by_pair.setdefault(sample.meta["pairs"]["wording"], []).append(sample)
    for literal, paraphrased in by_pair.values():
        assert (literal.meta["groups"]["wording"], paraphrased.meta["groups"]["wording"]) == ("literal", "paraphrased")
        assert literal.answers == paraphrased.answers
        shorter = min(len(literal.context), len(paraphrased.context)) // 4
        assert literal.context[:shorter] == paraphrased.context[:shorter]  # the same hay, of slightly different length


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_the_fact_stands_at_its_depth_among_its_distractors(real, depth):
    spec = {"name": "paraphrased_needle", "lengths": [2000], "depths": [depth], "distractors": [0, 3], "repeats": 4}
    facts = [re.compile(re.escape(r["fact"]).replace(r"\{name\}", "([A-Z]\\w+)").replace(r"\{thing\}", "(.+?)")) for r in
             words()["relations"]]  # fmt: skip
    for sample in make_task({**spec, "wordings": ["literal"]}).samples(real):
        text = sample.context[sample.context.index("\n") + 1 :]
        found = [match for fact in facts for match in fact.finditer(text) if match[1] in words()["names"]]
        assert len(found) == 1 + sample.meta["groups"]["distractors"]
        assert len({match.re for match in found}) == 1
        assert len({match[1] for match in found}) == len({match[2] for match in found}) == len(found)
        (own,) = [match for match in found if match[1] == sample.answers[0]]
        assert own[2] in sample.question
        others = sum(len(match[0]) + 1 for match in found if match is not own and match.start() < own.start())
        all_others = sum(len(match[0]) + 1 for match in found if match is not own)
        place = (own.start() - others) / (len(text) - len(own[0]) - all_others)
        assert place == pytest.approx(depth, abs=0.04)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"wordings": ["other"]}, "wordings='other' is not known"),
        ({"wordings": []}, "is no list; give one or both of literal, paraphrased"),
        ({"distractors": [7]}, "a relation has 6 other things; give at most 6"),
        ({"distractors": [-1]}, "distractors=-1"),
    ],
)
def test_wrong_parameters_are_named(fields, said):
    with pytest.raises(TaskError, match=said):
        make_task({"name": "paraphrased_needle", **fields})


def test_reports_show_the_gap(tmp_path):
    """Eight pairs: the literal one right in all, the other in two, so 75 points apart on the same texts."""
    task = {"name": "paraphrased_needle", "lengths": [1000], "depths": [0.5], "repeats": 8, "distractors": [0]}

    def rows(*right):
        found = []
        for pair, (literal, paraphrased) in enumerate(right):
            for wording, score in (("literal", literal), ("paraphrased", paraphrased)):
                meta = {"length": 1000, "depth": 0.5, "groups": {"wording": wording}, "pairs": {"wording": f"{pair}"}}
                found.append(row(len(found), float(score), meta=meta))
        return found

    save(tmp_path, {"task": task, "query_aware": False}, rows(*[(1, 1)] * 8))
    save(
        tmp_path,
        {"task": task, "query_aware": False, "policy": "h2o", "budget": 0.5},
        rows(*[(1, 0)] * 6, *[(1, 1)] * 2),
    )
    write_report([tmp_path], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| policy | literal | paraphrased | literal − paraphrased |" in text
    assert "| h2o(0.5) | 100.0 | 25.0 | +75.0 |" in text
    assert "| full() | 100.0 | 100.0 | +0.0 n.s. |" in text
    page = (tmp_path / "report.html").read_text()
    assert "Score by wording" in page and "literal − paraphrased" in page and "+75.0" in page
