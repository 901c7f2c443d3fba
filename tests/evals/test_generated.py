"""Needles, pass keys, key-value pairs and threads: lengths to the token, depths, and what the answers follow from."""

import json
import re
from itertools import pairwise

import pytest

from kvpress.evals import make_task
from kvpress.evals.fit import largest
from kvpress.evals.tasks import InfiniteBench, KVRetrieval, Needle, NeedleThreads, Passkey, Perplexity
from kvpress.haystack import Haystack, book_text, split_sentences


def whole(task, sample, tokenizer):
    """The prompt's token ids."""
    prompt = task.prompt(sample, tokenizer)
    return prompt.context + prompt.question


@pytest.mark.parametrize("chat", [None, False])
@pytest.mark.parametrize("kind", ["numbers", "words", "uuids", "sandwich"])
@pytest.mark.parametrize("haystack", ["books", "noise"])
def test_needle_lengths_are_exact_with_a_real_tokenizer(real, kind, haystack, chat):
    task = Needle(lengths=(253, 1000, 1777), depths=(0, 0.4, 1), needle=kind, haystack=haystack, chat=chat)
    samples = list(task.samples(real))
    assert [(sample.meta["length"], sample.meta["depth"]) for sample in samples] == [
        (length, depth) for length in (253, 1000, 1777) for depth in (0, 0.4, 1)
    ]
    assert [len(whole(task, sample, real)) for sample in samples] == [sample.meta["length"] for sample in samples]


def test_every_length_can_be_had(real):
    """About one in ten needs another cut than the first."""
    task = Needle(lengths=tuple(range(253, 353)), depths=(0.5,))
    assert [len(whole(task, sample, real)) for sample in task.samples(real)] == list(range(253, 353))


@pytest.mark.parametrize("length", [337, 338, 1001])
def test_needle_lengths_are_exact_in_bytes(byte, length):
    (sample,) = Needle(lengths=(length,), depths=(0.5,)).samples(byte)
    assert len((sample.context + sample.question + sample.answer_prefix).encode()) == length


def test_a_text_longer_than_the_books_goes_round(byte):
    """A byte is a token here: the first books' sentences come again after the last one's."""
    once = " ".join(split_sentences(book_text()))
    text, _ = Haystack(byte).cut(2 * len(once.encode()), 0, 0.5)
    again = byte.decode(text)
    assert again[:2000] == again[len(once) + 1 :][:2000] == f" {once}"[:2000]


@pytest.mark.parametrize("task", [Needle, Passkey])
def test_it_stands_at_its_depth_once_and_at_the_start_of_a_sentence(real, task):
    depths = (0, 0.25, 0.5, 0.75, 1)
    for sample, depth in zip(task(lengths=(4000,), depths=depths, chat=False).samples(real), depths, strict=True):
        hidden = re.search(r"(One of the special magic|The pass key is) .*?\d\.", sample.context)
        text = sample.context[sample.context.index("\n") + 1 :]  # without the introduction
        at = text.index(hidden[0])
        assert at / (len(text) - len(hidden[0])) == pytest.approx(depth, abs=0.02)
        assert at == 0 or depth == 1 or text[at - 2] in ".!?”’"
        assert sample.context.count(sample.answers[0]) == (1 if task is Needle else 2)


def test_a_haystack_of_ones_own(real, tmp_path):
    (tmp_path / "b.txt").write_text("Last words are these. " * 40)
    (tmp_path / "a.txt").write_text("First words are these. " * 40)
    (tmp_path / "c.md").write_text("Not these.")
    task = Needle(lengths=(900,), depths=(0.5,), haystack=str(tmp_path), chat=False)
    (sample,) = task.samples(real)
    assert len(whole(task, sample, real)) == 900
    assert {"First", "Last"} & set(sample.context.split()) and "Not" not in sample.context


def test_sandwich_is_scored_by_its_parts(real):
    task = Needle(lengths=(300,), depths=(0.5,), needle="sandwich")
    (sample,) = task.samples(real)
    assert task.score(sample, " eat a sandwich and sit in Dolores Park on a sunny day.") == 1
    assert task.score(sample, " to sit in Dolores Park") == pytest.approx(1 / 3)


def test_passkey_lengths_are_exact(real):
    task = Passkey(lengths=(300, 1001), depths=(0, 0.5), digits=9, repeats=2)
    samples = list(task.samples(real))
    assert [len(whole(task, sample, real)) for sample in samples] == [300, 300, 1001, 1001] * 2
    assert all(len(sample.answers[0]) == 9 for sample in samples)


def pairs_of(sample):
    """The JSON object in a sample's context, as it stands there."""
    return json.loads(sample.context[sample.context.index("{") :], object_pairs_hook=list)


def test_kv_pairs_and_their_depths(byte):
    depths = (0, 0.5, 1)
    for sample, place in zip(KVRetrieval(pairs=21, depths=depths, repeats=1).samples(byte), (0, 10, 20), strict=True):
        pairs = pairs_of(sample)
        assert len(dict(pairs)) == 21
        key = re.search('Key: "(.*)"', sample.question)[1]
        assert pairs[place] == (key, sample.answers[0])


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "kv_retrieval", "repeats": 1},
        {"name": "infinitebench", "task": "kv_retrieval", "repeats": 1},
        *({"name": "needle_threads", "kind": kind, "repeats": 2} for kind in ("single", "multi_step", "branching")),
    ],
    ids=lambda spec: spec.get("kind", spec["name"]),
)
def test_pairs_fill_a_length(spec, real):
    task = make_task({**spec, "length": 1500})
    lengths = [len(whole(task, sample, real)) for sample in task.samples(real)]
    pair = 80 if spec.get("kind") != "branching" else 125  # a pair of UUIDs has at most so many tokens
    assert all(1500 - pair < length <= 1500 for length in lengths)


def test_kv_rows_of_the_authors(byte, data):
    path = data / "kv_retrieval" / "kv-retrieval-75_keys.jsonl"
    rows = [json.loads(line) for line in path.open()]
    template = (data / "kv_retrieval" / "kv_retrieval.prompt").read_text()
    task = KVRetrieval(data_dir=str(path.parent), depths=(0, 1), repeats=3)
    samples = list(task.samples(byte))
    for sample, row in zip(samples, [row for row in rows[:3] for _ in range(2)], strict=True):
        assert sample.answers == (row["value"],)
        assert sorted(pairs_of(sample)) == sorted(map(tuple, row["ordered_kv_records"]))
        first, last = pairs_of(sample)[0], pairs_of(sample)[-1]
        assert (first if sample.meta["depth"] == 0 else last) == (row["key"], row["value"])
        prompt = sample.context + sample.question
        object_text = sample.context[sample.context.index("{") :]
        assert prompt == template.strip("\n").format(formatted_kv_records=object_text, key=row["key"])


def follow(table, key):
    """The values along a thread of single values."""
    seen = []
    while key in table:
        key = table[key]
        seen.append(key)
    return seen


@pytest.mark.parametrize("direction", ["forward", "backward", "any"])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_lead_to_their_ends(byte, direction, threads):
    task = NeedleThreads(length=5000, steps=5, threads=threads, direction=direction, repeats=4)
    places = []
    for sample in task.samples(byte):
        pairs = pairs_of(sample)
        order, table = [key for key, _ in pairs], dict(pairs)
        assert len(order) == len(set(order)) == sample.meta["pairs"]
        starts = re.findall(r'"([0-9a-f-]{36})"', sample.question)
        assert len(starts) == threads
        walks = [follow(table, start) for start in starts]
        assert [walk[-1] for walk in walks] == list(sample.answers)
        assert {len(walk) for walk in walks} == {5}
        for start, walk in zip(starts, walks, strict=True):
            places.append([order.index(key) for key in (start, *walk[:-1])])
    if direction != "any":
        assert all(walk == sorted(walk, reverse=direction == "backward") for walk in places)
    else:
        assert not all(walk == sorted(walk) for walk in places)


def test_branches_have_one_way_on(byte):
    task = NeedleThreads(kind="branching", length=9000, steps=4, branches=3, repeats=6)
    single = 0
    for sample in task.samples(byte):
        table = dict(pairs_of(sample))
        (key,) = re.findall(r'"([0-9a-f-]{36})"', sample.question)
        steps = 0
        while key in table:
            ways = [value for value in table[key] if value in table]
            steps += 1
            if not ways:
                assert table[key] == list(sample.answers)
                break
            assert len(ways) == 1 and len(table[key]) == 3
            (key,) = ways
        assert steps == 4
        single += sum(len(values) == 1 for values in table.values())
    assert single > 2 * 6  # a single value does not give the end away


def test_one_lookup(byte):
    (sample,) = NeedleThreads(kind="single", length=1500, repeats=1).samples(byte)
    (key,) = re.findall(r'"([0-9a-f-]{36})"', sample.question)
    assert dict(pairs_of(sample))[key] == sample.answers[0]


@pytest.mark.parametrize("kind", ["passkey", "number_string"])
def test_infinitebench_in_noise(byte, kind):
    task = InfiniteBench(task=kind, length=5000, depths=(0, 0.5, 1), repeats=2)
    for sample in task.samples(byte):
        (value,) = sample.answers
        assert len(value) == (5 if kind == "passkey" else 10)
        lines = sample.context.split("\n")[2:]
        place = next(i for i, line in enumerate(lines) if value in line)
        assert place == round(sample.meta["depth"] * (len(lines) - 1))
        assert lines[place].count(value) == 2
        assert 4900 < len((sample.context + sample.question + sample.answer_prefix).encode()) <= 5000
    if kind == "number_string":
        assert sum(a == b for a, b in pairwise(value)) >= 5


def test_infinitebench_rows(byte, tmp_path):
    rows = [
        {"context": "noise 71432 noise", "input": "What is the pass key?", "answer": ["71432"], "id": n}
        for n in range(3)
    ]
    (tmp_path / "passkey.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = InfiniteBench(data_dir=str(tmp_path), limit=2)
    first, second = task.samples(byte)
    assert (first.answers, first.max_new_tokens, second.index) == (("71432",), 6, 1)
    assert (first.context + first.question + first.answer_prefix) == (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about "
        "the important information there.\n\nnoise 71432 noise\n\nWhat is the pass key?\n\nThe pass key is"
    )
    assert task.score(first, " 71432.") == 1


def test_perplexity_reads_on(real, data):
    text = (data / "text" / "wikitext-2" / "test.txt").read_text()
    task = Perplexity(text=str(data / "text" / "wikitext-2" / "test.txt"), length=700, scored=60, stretches=3)
    samples = list(task.samples(real))
    assert "".join(sample.context + sample.question for sample in samples) in text
    for sample in samples:
        prompt = task.prompt(sample, real)
        assert (len(prompt.context), len(prompt.question)) == (700, 60)
        assert (sample.max_new_tokens, sample.answers, sample.meta["mode"]) == (0, (), "decode")
    with pytest.raises(ValueError, match=r"use kvpress.score"):
        task.score(samples[0], "")


@pytest.mark.parametrize("guess", [0, 1, 7, 50, 10**6])
@pytest.mark.parametrize("limit", [3, 4, 30, 31, 32, 1000])
def test_largest(limit, guess):
    tried = []

    def count(n):
        tried.append(n)
        return 3 * n + 4

    expected = (limit - 4) // 3 if limit >= 4 else None
    assert largest(count, limit, guess) == expected
    assert len(tried) < 40
    assert min(tried) >= 0


def test_largest_ends_where_nothing_grows():
    assert largest(lambda n: 5, 10, 3) >= 10
