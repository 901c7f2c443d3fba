"""Configurations: what a sweep means, what is refused and where, and the shipped ones."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpress.cli import app
from kvpress.evals.config import make_plan, read_plan
from kvpress.evals.locations import ConfigError
from kvpress.models import ModelLoadError
from support.models import shipped_policies
from support.plans import tree, write

CONFIGS = Path(__file__).parents[2] / "configs"

GOOD = """\
out: results
defaults:
  model: smollm2
  policy: h2o
  task:
    name: needle
    depths: [0.1, 0.9]
sweep:
  budget: [0.25, 64]
  length: [400, 500]
"""


def read(tmp_path, text, *settings):
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return read_plan(path, settings)


def test_each_value_meets_each(tmp_path):
    runs = read(tmp_path, GOOD).runs
    assert [(p.policies[0].budget, p.task.lengths) for p in runs] == [
        (0.25, (400,)),
        (0.25, (500,)),
        (64, (400,)),
        (64, (500,)),
    ]
    assert {p.task.depths for p in runs} == {(0.1, 0.9)}
    assert len({p.id for p in runs}) == 4
    assert runs[0].samples_id == runs[2].samples_id != runs[1].samples_id


def test_an_id_names_what_decides_the_answers():
    def only(**fields):
        (run,) = make_plan({"out": "x", "defaults": {"task": "needle", **fields}}).runs
        return run.id

    ids = [
        only(),
        only(policy="h2o"),
        only(policy={"name": "h2o", "budget": 0.3}),
        only(seed=1),
        only(query_aware=False),
        only(length=700),
        only(samples=3),
        only(dtype="float32"),
        only(device="cpu"),
        only(model="other/model"),
        only(task={"name": "needle", "needle": "words"}),
    ]
    assert len(set(ids)) == len(ids)
    # however it is written, the same is the same
    assert only(policy="h2o", budget=0.3) == only(policy={"name": "h2o", "budget": 0.3})
    assert only(length=700) == only(task={"name": "needle", "lengths": [700]})
    assert only(seed=0) == only()


def test_a_policy_without_budget_comes_once(tmp_path):
    runs = read(tmp_path, GOOD, "sweep.policy=[full, h2o]", "length=400").runs
    assert [p.policy for p in runs] == ["full()", "h2o(budget=0.25)", "h2o(budget=64)"]


def test_a_budget_is_recorded_where_it_acts():
    """Not where a policy takes none, or takes entries only."""
    sweep = {"policy": ["full", "h2o", "token_select"], "budget": [0.25]}
    runs = make_plan({"out": "x", "sweep": sweep}).runs
    assert [(run.policy, run.to_dict()["budget"]) for run in runs] == [
        ("full()", None),
        ("h2o(budget=0.25)", 0.25),
        ("token_select()", None),
    ]
    with pytest.raises(ConfigError, match=r"budget=0\.25, but none of the policies takes a share, only entries"):
        make_plan({"out": "x", "sweep": {"policy": ["full", "token_select"], "budget": [0.25]}})


def test_grids_one_after_the_other():
    sweep = [{"policy": ["full"]}, {"policy": ["h2o", "snapkv"], "budget": [0.5]}, {"policy": ["h2o"], "budget": [0.5]}]
    runs = make_plan({"out": "x", "sweep": sweep}).runs
    assert [p.policy for p in runs] == ["full()", "h2o(budget=0.5)", "snapkv(budget=0.5)"]


def test_parts_are_swept_too():
    tree = {"out": "x", "defaults": {"policy": "snapkv", "task": "needle"}}
    tree["sweep"] = {"policy.window": [8, 16], "task.repeats": [1, 2]}
    runs = make_plan(tree).runs
    assert [(p.policies[0].window, p.task.repeats) for p in runs] == [(8, 1), (8, 2), (16, 1), (16, 2)]


def test_policies_of_several_roles():
    (run,) = make_plan({"out": "x", "defaults": {"policy": ["h2o", "full"], "budget": 0.5}}).runs
    assert run.policy == "h2o(budget=0.5) + full()"


def test_settings(tmp_path):
    assert [p.policies[0].budget for p in read(tmp_path, GOOD, "budget=0.1", "length=400").runs] == [0.1]
    assert {p.task.repeats for p in read(tmp_path, GOOD, "task.repeats=3").runs} == {3}
    assert read(tmp_path, GOOD, "out=elsewhere").out == Path("elsewhere")
    assert len(read(tmp_path, GOOD, "sweep.budget=[1, 2, 3]").runs) == 6
    swept = read(tmp_path, GOOD, "sweep.policy=[snapkv, pyramid_kv]", "policy.window=4").runs
    assert {p.policies[0].window for p in swept} == {4}


def test_variables_are_read_when_it_runs_and_do_not_change_the_id(tmp_path, monkeypatch):
    task = {"name": "longbench", "data_dir": "${SOME_DATA}/rows"}
    tree = {"out": "${SOME_DATA}/out", "defaults": {"task": task}}
    ids = set()
    for folder in ("/one", "/two"):
        monkeypatch.setenv("SOME_DATA", folder)
        plan = make_plan(tree)
        ids.add(plan.runs[0].id)
        assert plan.runs[0].task.data_dir == f"{folder}/rows"
        assert plan.out == Path(folder, "out")
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("out: results", "ot: results", 1, "did you mean 'out'"),
        ("out: results", "out: 3", 1, "out=3"),
        ("model: smollm2", "modle: smollm2", 3, "did you mean 'model'"),
        ("model: smollm2", "model: 3", 3, "model=3"),
        ("model: smollm2", "dtype: half", 3, "dtype='half'"),
        ("model: smollm2", "device: 'GPU 1'", 3, "device='GPU 1'"),
        ("model: smollm2", "query_aware: 1", 3, "query_aware=1"),
        ("model: smollm2", "seed: -1", 3, "seed=-1"),
        ("model: smollm2", "samples: 0", 3, "samples=0"),
        ("model: smollm2", "model: smollm2\n  model: other", 4, "second time"),
        ("model: smollm2", "model: ${NO_SUCH_VARIABLE}", 3, "NO_SUCH_VARIABLE is not set"),
        ("model: smollm2", "1: 2", 3, "the key 1"),
        ("policy: h2o", "policy: h20", 4, "did you mean 'h2o'"),
        ("policy: h2o", "policy: {name: h2o, heavyy: 3}", 4, "did you mean 'heavy'"),
        ("policy: h2o", "policy:\n    name: h2o\n    budget: 0.3", 6, "policy.budget=0.3"),
        ("policy: h2o", "policy: [h2o, snapkv]", 9, "budget=0.25 is unclear"),
        ("policy: h2o", "policy: full", 9, "none of the policies takes one"),
        ("name: needle", "name: needel", 6, "did you mean 'needle'"),
        ("depths: [0.1, 0.9]", "depths: [0.1, 1.9]", 7, "1.9 is outside"),
        ("depths: [0.1, 0.9]", "lengths: [100]", 7, "task.lengths=[100]; keep one"),
        ("depths: [0.1, 0.9]", "seed: 3\n  seed: 4", 7, "task.seed=3; keep one"),
        ("name: needle\n    depths: [0.1, 0.9]", "name: perplexity", 6, "query_aware: false"),
        ("[0.25, 64]", "[0.25, 1.5]", 9, "budget=1.5"),
        ("[0.25, 64]", "[0.25, lots]", 9, "budget='lots'"),
        ("model: smollm2", "device_map: auto\n  tp_plan: auto", 4, "each of them places the model"),
        ("model: smollm2", "device_map: auto\n  device: cuda", 3, "device='cuda': each of them places the model"),
        ("model: smollm2", "tp_plan: ring", 3, "tp_plan='ring'"),
        ("out: results", "out: results\nlauncher: slurm", 2, "'local' or 'ray'"),
        ("out: results", "out: results\nray: {num_gpu: 1}", 2, "did you mean 'num_gpus'"),
        ("out: results", "out: results\nbatch_size: 0", 2, "batch_size=0"),
        ("[0.25, 64]", "0.25", 9, "valid list"),
        ("[0.25, 64]", "[]", 9, "empty"),
        ("length: [400, 500]", "lenght: [400]", 10, "did you mean 'length'"),
        ("length: [400, 500]", "model.x: [400]", 10, "no field 'model.x'"),
        ("length: [400, 500]", "policy.window: [400]", 10, "no field 'window'"),
        ("length: [400, 500]", "length: [400, 500", 11, "not valid YAML"),
    ],
)
def test_what_cannot_work_is_named_with_its_line(tmp_path, old, new, line, said):
    assert GOOD.count(old) == 1
    with pytest.raises(ConfigError) as error:
        read(tmp_path, GOOD.replace(old, new))
    assert str(error.value).startswith(f"{tmp_path / 'a.yaml'}, line {line}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("budget", "NAME=VALUE"),
        ("=3", "NAME=VALUE"),
        ("budget=[1", "NAME=VALUE"),
        ("bugdet=1", "did you mean 'budget'"),
        ("budget=2.5", "--set 'budget=2.5': budget=2.5"),
        ("policy.heavvy=3", "did you mean 'heavy'"),
        ("sweep.budget=[3, x]", "--set 'sweep.budget=[3, x]': budget='x'"),
    ],
)
def test_settings_that_cannot_work(tmp_path, setting, said):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, GOOD, setting)
    assert said in str(error.value)


def test_the_last_word_is_blamed(tmp_path):
    """Not the line in the file that a setting has replaced."""
    text = GOOD.replace("policy: h2o", "policy:\n    name: snapkv\n    window: 8")
    setting = "sweep.policy=[{name: snapkv, window: 0}]"
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text, setting)
    assert str(error.value).startswith(f"--set {setting!r}: window=0")


@pytest.mark.parametrize("text", ["", "3", "[1]"])
def test_a_file_without_a_mapping(tmp_path, text):
    with pytest.raises(ConfigError, match="mapping"):
        read(tmp_path, text)


def test_a_missing_out(tmp_path):
    with pytest.raises(ConfigError, match="'out' is missing"):
        read(tmp_path, "defaults: {model: smollm2}")


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_the_shipped_configurations(name, monkeypatch):
    monkeypatch.setenv("KVPRESS_DATA", "/data")
    plan = read_plan(CONFIGS / name)
    assert plan.out == Path("results", name.removesuffix(".yaml"))
    for samples in {run.samples_id for run in plan.runs}:
        members = [run.policy for run in plan.runs if run.samples_id == samples]
        assert members[0] == "full()"  # what the others are compared with
        assert len(members) > 1


@pytest.mark.parametrize("name", sorted(path.name for path in (CONFIGS / "paper").glob("*.yaml")))
def test_the_papers_configurations(name, monkeypatch):
    """Each is checked whole by a dry run, has full attention to compare with, and says whose numbers it repeats."""
    monkeypatch.setattr("kvpress.evals.commands.check_model", no_model)  # nothing is asked of the hub
    path = CONFIGS / "paper" / name
    result = CliRunner().invoke(app, ["ablate", str(path), "--dry-run"], env={"COLUMNS": "300"})
    assert result.exit_code == 2 and "no model of" in result.stderr
    plan = read_plan(path)
    assert plan.out == Path("results/paper", name.removesuffix(".yaml"))
    assert f"{len(plan.runs)} runs" in result.output or len({run.model for run in plan.runs}) > 1
    for samples in {run.samples_id for run in plan.runs}:
        members = [run.policy for run in plan.runs if run.samples_id == samples]
        assert members[0] == "full()" and len(members) > 1
    text = path.read_text(encoding="utf-8")
    assert "# The paper's numbers" in text
    own = {policy.paper.removeprefix("arXiv ") for run in plan.runs for policy in run.policies}
    assert any(f"(arXiv {paper})" in text.splitlines()[0] for paper in own)


def test_every_paper_has_a_configuration():
    papers = {policy.paper for policy in shipped_policies().values()}
    heads = [path.read_text(encoding="utf-8").splitlines()[0] for path in (CONFIGS / "paper").glob("*.yaml")]
    assert {paper for paper in papers if paper and not any(f"({paper})" in head for head in heads)} == set()


def no_model(name):
    raise ModelLoadError(f"no model of {name}")


def test_a_dry_run_fails_on_a_model_that_cannot_be_loaded(folder, tmp_path):
    """A folder without weights, one of another kind of model, and a name of nothing; the grid is shown all the same."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(folder, name).read_bytes())
    config = write(tmp_path / "a.yaml", tree(str(tmp_path), tmp_path / "out"))
    dry_run = ["ablate", str(config), "--dry-run"]
    result = CliRunner().invoke(app, dry_run)
    assert result.exit_code == 2 and "there are no weights in" in result.stderr
    assert "full()" in result.stdout
    result = CliRunner().invoke(app, [*dry_run, "--set", f"model={folder}"])
    assert result.exit_code == 0, result.output
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    assert "no causal LM of" in CliRunner().invoke(app, dry_run).stderr
    result = CliRunner().invoke(app, [*dry_run, "--set", f"model={tmp_path / 'none'}"])
    assert result.exit_code == 2 and "cannot load a model from" in result.stderr


def test_a_budget_in_percent_is_a_share(tmp_path):
    text = GOOD.replace("[0.25, 64]", '[25%, "25 %", 0.25]')
    runs = read(tmp_path, text, "length=400").runs
    assert [run.policy for run in runs] == ["h2o(budget=0.25)"]
    with pytest.raises(ConfigError, match=r"budget='a%' is a str; give a float share"):
        read(tmp_path, GOOD.replace("[0.25, 64]", "[a%]"))


def test_the_needle_configuration_has_every_policy():
    runs = read_plan(CONFIGS / "smollm2_needle.yaml").runs
    shipped = set(shipped_policies())
    assert {policy.name for run in runs for policy in run.policies} == shipped
    assert {run.task.lengths for run in runs} == {(1000,), (2000,)}
    assert {len(run.task.depths) for run in runs} == {3}
    for name in shipped - {"full"}:
        assert sum(run.policies[0].name == name for run in runs) == 3 * 2


def test_a_wrong_file_on_the_command_line_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["ablate", str(tmp_path / "none.yaml")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "none.yaml: No such file" in result.stderr
