"""RULER's formats, lengths and answers."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from kvpress.evals import TaskError
from kvpress.evals.config import read_plan
from kvpress.evals.tasks import Ruler
from kvpress.evals.tasks.ruler import NEW_TOKENS, some_words

GENERATED = [name for name in NEW_TOKENS if not name.startswith("qa")]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
UUID = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NUMBER, WORD = "[0-9]{7}", "[a-z]+-[a-z]+"
# What a needle's key and value look like, how many needles there are in the haystack (None: all lines), keys asked for.
NIAH = {
    "niah_single_1": (WORD, NUMBER, 1, 1),
    "niah_single_2": (WORD, NUMBER, 1, 1),
    "niah_single_3": (WORD, UUID, 1, 1),
    "niah_multikey_1": (WORD, NUMBER, 4, 1),
    "niah_multikey_2": (WORD, NUMBER, None, 1),
    "niah_multikey_3": (UUID, UUID, None, 1),
    "niah_multivalue": (WORD, NUMBER, 4, 1),
    "niah_multiquery": (WORD, NUMBER, 4, 4),
}


def text_of(sample):
    return sample.context + sample.question + sample.answer_prefix


def samples(tokenizer, **fields):
    return list(Ruler(repeats=3, **fields).samples(tokenizer))


def test_there_are_thirteen():
    assert len(NEW_TOKENS) == 13
    expected = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert expected == NEW_TOKENS


@pytest.mark.parametrize("length", [2000, 4096])
@pytest.mark.parametrize("name", GENERATED)
def test_prompt_and_answer_fill_the_length(name, length, real):
    task = Ruler(task=name, length=length, repeats=2)
    slack = (
        80 if name == "niah_multikey_3" else 60 if name in ("cwe", "fwe") else 35 if name in NIAH or name == "vt" else 0
    )
    for sample in task.samples(real):
        used = task.prompt(sample, real).length + sample.max_new_tokens
        assert sample.max_new_tokens == NEW_TOKENS[name]
        assert length - slack <= used <= length
        assert sample.context.startswith(("Some special", "A special", "Memorize", "Below is", "Read the"))


@pytest.mark.parametrize("name", list(NIAH))
def test_needles(name, byte):
    key, value, count, queries = NIAH[name]
    kind = "uuids" if value == UUID else "numbers"
    for sample in samples(byte, task=name, length=4096):
        needles = re.findall(f"One of the special magic {kind} for ({key}) is: ({value})\\.", sample.context)
        lines = sample.context.split("\n")[1:]
        assert len(needles) == (count or len(lines))
        if name == "niah_single_1":
            assert set(lines) - {NOISE} == {
                f"One of the special magic numbers for {needles[0][0]} is: {needles[0][1]}."
            }
        asked = re.search(" for (.*) mentioned in the provided text\\?$", sample.question)[1]
        keys = re.findall(key, asked)
        assert len(keys) == queries
        assert asked == (keys[0] if queries == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1])
        assert Counter(sample.answers) == Counter(found for name, found in needles if name in keys)
        assert len(sample.answers) == (4 if name in ("niah_multivalue", "niah_multiquery") else 1)
        one = kind[:-1]
        if len(sample.answers) == 1:
            expected = (
                f"A special magic {one} is hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the {one} afterwards.\n",
                f"\nWhat is the special magic {one} for {asked} mentioned in the provided text?",
                f" The special magic {one} for {asked} mentioned in the provided text is",
            )
        else:
            expected = (
                f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
                f"I will quiz you about the {kind} afterwards.\n",
                f"\nWhat are all the special magic {kind} for {asked} mentioned in the provided text?",
                f" The special magic {kind} for {asked} mentioned in the provided text are",
            )
        assert sample.context.startswith(expected[0])
        assert (sample.question, sample.answer_prefix) == expected[1:]


def test_needles_in_text_leave_it_as_it_is(byte):
    for sample in samples(byte, task="niah_multikey_1", length=8000):
        body = sample.context.split("\n", 1)[1]
        rest = re.sub(r"(^| )One of the special magic numbers for \S+ is: \d+\.", "", body).strip()
        assert rest.startswith("Chapter 1 It is a truth universally acknowledged, that a single man")
        assert "Mr. Bennet" in rest and "  " not in rest
        for place in re.finditer("One of the special", body):
            assert place.start() == 0 or body[place.start() - 2] in ".!?”’" or body.endswith(body[place.start() :])


def test_needles_spread_over_the_text(byte):
    places = []
    for sample in Ruler(task="niah_single_2", length=8000, repeats=30).samples(byte):
        places.append(sample.context.index("One of the special") / len(sample.context))
    assert min(places) < 0.2 and max(places) > 0.8 and len({round(place, 1) for place in places}) > 6


def test_ready_rows_have_the_same_form(data, byte):
    """Every line of a row made by RULER itself becomes equal to ours when keys and values are masked."""
    rows = [json.loads(line) for line in (data / "ruler" / "kvcache_factory_4096_niah_multikey_3.jsonl").open()]

    def form(text):
        lines = re.sub(UUID, "U", text).split("\n")
        return lines[0], frozenset(lines[1:-1]), lines[-1]

    for sample in samples(byte, task="niah_multikey_3", length=4096):
        assert {form(text_of(sample))} == {form(row["input"]) for row in rows}
        assert len(sample.answers) == len(rows[0]["outputs"])
        assert re.fullmatch(UUID, sample.answers[0]) and re.fullmatch(UUID, rows[0]["outputs"][0])


def test_definitions_are_rulers(data):
    import yaml

    from kvpress.evals.tasks import ruler

    defined = yaml.safe_load((data / "ruler" / "synthetic.yaml").read_text())
    assert list(defined) == list(NEW_TOKENS)
    for name, kind in ruler.NIAH.items():
        args = defined[name]["args"]
        assert (kind.haystack.replace("text", "essay"), kind.key_kind, kind.value_kind) == (
            args["type_haystack"],
            args["type_needle_k"],
            args["type_needle_v"],
        )
        keys = max(args["num_needle_k"], args["num_needle_q"])
        assert (kind.keys, kind.values, kind.queries) == (keys, args["num_needle_v"], args["num_needle_q"])
    assert defined["vt"]["args"] == {"type_haystack": "noise", "num_chains": 1, "num_hops": ruler.VT_HOPS}
    assert defined["cwe"]["args"] == {"freq_cw": 30, "freq_ucw": 3, "num_cw": ruler.CWE_COMMON}
    assert defined["fwe"]["args"] == {"alpha": 2.0}


def test_variables_are_tracked(byte):
    for sample in samples(byte, task="vt", length=4096):
        example, body = sample.context.split("\n\nMemorize")
        value = re.search("assigned the value ([0-9]{5}) in the text above", sample.question)[1]
        for text, asked, answers, letters in (
            (body, value, sample.answers, 5),
            (example, re.search("assigned the value ([0-9]{5}) in", example)[1], None, 3),
        ):
            assigned = re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+) ?$", text, flags=re.MULTILINE)
            names = [name for name, _ in assigned]
            assert len(names) == 5 and all(len(name) == letters for name in names)
            assert [source for _, source in assigned] == [asked, *names[:-1]]
            if answers is None:
                assert example.endswith(f"assigned the value {asked}, they are:  {' '.join(names)}")
            else:
                assert answers == tuple(names)
        assert sample.answer_prefix == (
            " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the value "
            f"{value}, they are: "
        )
        assert set(re.sub("VAR .*", "", body).split("\n")[2:]) == {NOISE, ""}
        assert len(byte(example)["input_ids"]) <= 500


@pytest.mark.parametrize(("length", "often", "rarely", "shown"), [(4000, 6, 1, (3, 1, 10)), (9000, 30, 3, (10, 3, 30))])
def test_common_words_are_counted(byte, length, often, rarely, shown):
    for sample in samples(byte, task="cwe", length=length):
        first, second = sample.context.split("\nBelow is a numbered list")
        listed = re.findall(r"(\d+)\. (\w+)", second)
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, times in counts.items() if times == often} == set(sample.answers)
        assert len(sample.answers) == 10 and set(counts.values()) <= {often, rarely}
        body, answer = first.split(" Answer: The top 10 words that appear most often in the list are: ")
        counts = Counter(re.findall(r"\d+\. (\w+)", body))
        assert {word for word, times in counts.items() if times == shown[0]} == set(re.findall(r"\d+\. (\w+)", answer))
        assert Counter(counts.values()) == {shown[0]: 10, shown[1]: shown[2]}
        assert [word for _, word in listed] != sorted(word for _, word in listed)


def test_there_are_words_enough():
    import random

    words = some_words(random.Random(0), 9000)
    assert len(set(words)) == len(words) == 9000
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
    assert some_words(random.Random(0), 100) == words[:100]


def test_coded_words_are_counted(byte):
    for sample in samples(byte, task="fwe", length=8000):
        words = sample.context.split("coded words. ")[1].split()
        ranked = Counter(words).most_common()
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == sample.answers
        counts = [times for _, times in ranked]
        assert counts[3] > counts[4]
        assert counts[0] / counts[1] == pytest.approx(4, rel=0.05) and counts[0] / counts[2] == pytest.approx(
            9, rel=0.1
        )
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])


def squad(folder, articles=6):
    """A small data set in the form of SQuAD 2.0."""
    data = []
    for a in range(articles):
        paragraphs = []
        for p in range(5):
            asked = [
                {"question": f"What is fact {a}-{p}?", "answers": [{"text": f"Fact{a}{p}"}, {"text": f"fact-{a}-{p}"}]},
                {"question": "What is not said?", "answers": [], "is_impossible": True},
            ]
            paragraphs.append({"context": f"In article {a}, paragraph {p}: Fact{a}{p}, fact-{a}-{p}.", "qas": asked})
        data.append({"title": f"Article {a}", "paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"data": data}))


def test_squad(byte, tmp_path):
    squad(tmp_path)
    rule = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    task = Ruler(task="qa_1", length=1200, repeats=30, data_dir=str(tmp_path))
    for sample in task.samples(byte):
        a, p = re.search(r"fact (\d)-(\d)", sample.question).groups()
        assert sample.answers == (f"Fact{a}{p}", f"fact-{a}-{p}")
        assert (
            sample.question == f"\n\n{rule}\n\nQuestion: What is fact {a}-{p}?" and sample.answer_prefix == " Answer:"
        )
        assert sample.context.startswith(f"{rule}\n\nThe following are given documents.\n\nDocument 1:\n")
        documents = re.findall(r"Document (\d+):\nIn article (\d), paragraph (\d)", sample.context)
        assert [int(number) for number, _, _ in documents] == list(range(1, len(documents) + 1))
        assert (a, p) in {(article, paragraph) for _, article, paragraph in documents}
        articles = Counter(article for _, article, _ in documents)
        assert articles[a] == 5 and len(articles) > 1  # the same article's paragraphs come first
        assert len({found[1:] for found in documents}) == len(documents)
        assert 1200 - 70 < len(text_of(sample).encode()) + 32 <= 1200
    assert task.score(sample, f"It is fact{a}{p}.") == 1
    assert task.score(sample, "It is a fact.") == 0


def test_all_documents_when_they_fit(byte, tmp_path):
    squad(tmp_path, articles=2)
    (sample,) = Ruler(task="qa_1", length=9000, repeats=1, data_dir=str(tmp_path)).samples(byte)
    assert sample.context.count("Document ") == 10


def test_hotpotqa(byte, tmp_path):
    rows = [
        {
            "question": f"Who is {n}?",
            "answer": f"Nobody{n}",
            "context": [[f"T{n}.{i}", ["One. ", f"Two {n}{i}."]] for i in range(3)],
        }
        for n in range(4)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(rows))
    for n, sample in enumerate(Ruler(task="qa_2", length=700, repeats=4, data_dir=str(tmp_path)).samples(byte)):
        assert sample.answers == (f"Nobody{n}",)
        for i in range(3):
            assert f":\nT{n}.{i}\nOne. Two {n}{i}." in sample.context


def test_questions_on_the_hub_are_read_alike(byte, tmp_path, monkeypatch):
    import datasets

    squad(tmp_path)
    hub = []
    for article in json.loads((tmp_path / "squad.json").read_text())["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = {"text": [answer["text"] for answer in qa["answers"]], "answer_start": []}
                hub.append(
                    {
                        "title": article["title"],
                        "context": paragraph["context"],
                        "question": qa["question"],
                        "answers": answers,
                    }
                )
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or hub)
    fields = {"task": "qa_1", "length": 900, "repeats": 5}
    assert list(Ruler(**fields).samples(byte)) == list(Ruler(**fields, data_dir=str(tmp_path)).samples(byte))
    ((args, options),) = asked
    assert args == ("rajpurkar/squad_v2",) and len(options["revision"]) == 40


def test_broken_questions_are_named(byte, tmp_path):
    squad(tmp_path)
    with pytest.raises(TaskError, match="repeats=31, but ruler/qa_1 has 30 questions"):
        list(Ruler(task="qa_1", repeats=31, data_dir=str(tmp_path)).samples(byte))
    (tmp_path / "hotpotqa.json").write_text(
        '[{"question": "a", "answer": "b", "context": [["c", ["d"]]]}, {"question": "a"}]'
    )
    with pytest.raises(TaskError, match=r"hotpotqa.json, question 2: no field 'answer'"):
        list(Ruler(task="qa_2", data_dir=str(tmp_path)).samples(byte))
    (tmp_path / "hotpotqa.json").write_text("[")
    with pytest.raises(TaskError, match="not valid JSON"):
        list(Ruler(task="qa_2", data_dir=str(tmp_path)).samples(byte))


def test_scores_are_shares(byte):
    task = Ruler(task="niah_multivalue", length=2000, repeats=1)
    (sample,) = task.samples(byte)
    assert task.score(sample, " and ".join(sample.answers[:3])) == 0.75


READY = {
    "context": "One of the special magic numbers for oslo is: 12345. ",
    "question": "What is the special magic number for oslo? ",
    "answer_prefix": "The number is",
    "answer": ["12345", "678"],
    "task": "niah_single_1",
    "max_new_tokens": 99,
}


def test_ready_rows_of_the_leaderboard(byte, real, tmp_path):
    """Context alone is compressed; what follows it and scores are the protocol's, worked out by hand."""
    rows = [READY, {**READY, "task": "vt"}, {**READY, "context": "Other. "}, READY]
    (tmp_path / "4096.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = {"task": "niah_single_1", "rows": "leaderboard", "data_dir": str(tmp_path)}
    task = Ruler(**spec, limit=2)
    first, second = task.samples(byte)
    assert (first.index, second.index, second.context, first.max_new_tokens) == (0, 1, "Other. ", 99)
    assert len(list(Ruler(**spec).samples(byte))) == 3
    prompt = task.prompt(first, real)
    message = [{"role": "user", "content": READY["context"] + READY["question"]}]
    whole = real.apply_chat_template(message, add_generation_prompt=True, tokenize=False) + READY["answer_prefix"]
    assert real.decode(prompt.context + prompt.question) == whole
    assert real.decode(prompt.context).endswith(READY["context"]) and "What" not in real.decode(prompt.context)
    assert task.score(first, "12345 only") == 0.5
    assert task.score(first, "123\n45 and 6\t78") == 1  # control characters are taken out
    assert Ruler(task="niah_single_1").score(first, "123\n45") == 0
    with pytest.raises(TaskError, match=r"no rows of fwe among the ready ones of 4096 tokens; save the rows"):
        list(Ruler(**{**spec, "task": "fwe"}).samples(byte))


def test_ready_rows_come_from_the_hub(monkeypatch, byte):
    import datasets

    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return [READY, {**READY, "answer": []}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(TaskError, match="RULER's ready rows, row 2: answer is"):
        list(Ruler(task="niah_single_1", rows="leaderboard", length=8192).samples(byte))
    assert asked == [(("simonjegou/ruler", "8192"), {"split": "test"})]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rows": "ready"}, "rows='ready' is not known"),
        (
            {"rows": "leaderboard", "length": 1000},
            "the leaderboard has rows of 4096, 8192, 16384 tokens; give one of these",
        ),
        ({"rows": "leaderboard", "limit": 0}, "limit=0"),
    ],
)
def test_wrong_rows_are_named(fields, said):
    with pytest.raises(TaskError, match=said):
        Ruler(**fields)


def test_the_leaderboard_configuration_is_its_protocol():
    runs = read_plan(Path(__file__).parents[2] / "configs" / "ruler_leaderboard.yaml").runs
    assert {run.task.task for run in runs} == set(NEW_TOKENS) and len(NEW_TOKENS) == 13
    assert {run.fields.query_aware for run in runs} == {False} and {run.task.rows for run in runs} == {"leaderboard"}
    assert {run.fields.budget for run in runs if run.policies[0].name == "snapkv"} == {0.75, 0.5, 0.25, 0.125}
