"""Two runs side by side on the samples that both have."""

import pytest
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.evals.pairs import compare_runs
from kvpress.evals.statistics import difference
from kvpress.evals.store import StoreError, pack
from support.saved import row, save

NEEDLE = {"task": "needle", "length": 1000}


def fields(policy="h2o", **others):
    return {**NEEDLE, "policy": policy, **({} if policy == "full" else {"budget": 0.25}), **others}


def run(*arguments):
    return CliRunner().invoke(app, [str(one) for one in arguments], env={"COLUMNS": "200"})


def test_the_same_policy_before_and_after(tmp_path):
    """On the samples that both have, though one run has more of them; another model's runs count as well."""
    before, after = [0.0, 0.0, 0.0, 1.0] * 4, [1.0, 0.0, 1.0, 1.0] * 3
    save(tmp_path / "a", fields(), [row(i, score) for i, score in enumerate(before)])
    save(
        tmp_path / "b",
        fields(model="other/model", samples=12),
        [row(i, score, share=0.5) for i, score in enumerate(after)],
    )
    save(tmp_path / "b", fields("full"), [row(0, 1.0)])
    (pair,) = (pair for pair in compare_runs(tmp_path / "a", tmp_path / "b") if pair.second.policy.startswith("h2o"))
    expected = difference([dict(enumerate(after))], [dict(enumerate(before[:12]))])
    assert pair.difference == expected and expected.n == 12 and expected.significant
    assert (pair.first_score.mean, pair.second_score.mean) == (0.25, 0.75)
    result = run("compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0, result.output
    assert "25.0 → 75.0" in result.output and "+50.0" in result.output and "x 0.50" in result.output
    assert "fewer than 6 samples differ" in result.output


def test_one_run_beside_each_of_a_packed_folder(tmp_path):
    scores = [0.5] * 7
    id_of = {
        policy: save(tmp_path, fields(policy), [row(i, s) for i, s in enumerate(scores)])
        for policy in ("full", "h2o", "tova")
    }
    pack(tmp_path)
    pairs = compare_runs(tmp_path / id_of["full"], tmp_path)
    assert [pair.second.names for pair in pairs] == [["full"], ["h2o"], ["tova"]]
    assert {pair.difference.significant for pair in pairs} == {False}
    with pytest.raises(StoreError, match="has no run 'abc'; kvpress ls"):
        compare_runs(tmp_path / "abc", tmp_path)


def test_nothing_in_common(tmp_path):
    save(tmp_path / "a", fields(), [row(0, 1.0)])
    save(tmp_path / "b", fields("tova"), [row(0, 1.0)])
    save(tmp_path / "b", fields("full"), [row(0, 1.0)])
    save(tmp_path / "c", {**fields(), "task": "passkey"}, [row(0, 1.0)])
    save(tmp_path / "c", {**fields("tova"), "task": "passkey"}, [row(0, 1.0)])
    result = run("compare", tmp_path / "a", tmp_path / "c")
    assert result.exit_code == 2
    assert "no policy of both, or no sample of both" in result.stderr
    with pytest.raises(StoreError, match="there is no folder"):
        compare_runs(tmp_path / "a", tmp_path / "none")


def test_version():
    import kvpress

    result = run("--version")
    assert (result.exit_code, result.output.strip()) == (0, f"kvpress {kvpress.__version__}")
