"""A budget given beside policies: which of them takes it, and what it then is."""

import pytest

import kvpress
from kvpress.policies import H2O, Full, SnapKV, TidalDecode, TokenSelect
from kvpress.registry import make_policies


@pytest.mark.parametrize("name", sorted(kvpress.available()))
def test_what_a_policy_accepts_is_what_it_can_be_built_with(name):
    cls = kvpress.available()[name]
    for budget in (64, 0.5):
        if cls.accepts_budget(budget):
            assert make_policies(name, budget) == [cls.at_budget(budget)]
        else:
            with pytest.raises(kvpress.PolicyError):
                cls.at_budget(budget)
            assert make_policies(name, budget) == [cls()]


def test_a_list_gives_it_to_the_one_that_takes_it():
    assert make_policies(["full", {"name": "h2o", "heavy": 0.1}], 0.3) == [Full(), H2O(heavy=0.1, budget=0.3)]
    assert make_policies([SnapKV(budget=64), "full"]) == [SnapKV(budget=64), Full()]


def test_a_share_of_a_known_prompt_in_entries():
    """A policy that takes only entries gets as many as any other has of that prompt; 0.29 of 100 are 29."""
    assert make_policies("token_select", 0.29, tokens=100) == [TokenSelect.at_budget(29)]
    assert make_policies("h2o", 0.29, tokens=100) == [H2O(budget=0.29)]
    assert make_policies("token_select", 64, tokens=100) == [TokenSelect.at_budget(64)]


@pytest.mark.parametrize(
    ("spec", "budget", "said"),
    [
        ("full", 1.5, "budget=1.5 is above 1"),
        ("h2o", "lots", "budget='lots' is a str"),
        (["h2o", "tidal_decode"], 64, "budget=64 is unclear, for h2o and tidal_decode take one each"),
        ({"name": "h2o", "budget": 0.3}, 0.25, r"budget=0.25 and policy.budget=0.3; keep one of them"),
        ({"name": "tidal_decode", "budget": 32}, 64, r"budget=64 and policy.budget=32; keep one of them"),
        ({"name": "ada_kv", "inner": {"name": "snapkv", "budget": 9}}, 64, r"budget=64 and policy.inner.budget=9"),
        ({"name": "tidal_decode", "k": 32}, 64, r"budget=64 does not go with {'k': 32} for tidal_decode"),
        (H2O(), 64, "is a finished policy; build it with budget=64"),
        ({"name": "h20"}, 64, "did you mean 'h2o'"),
    ],
)
def test_a_budget_that_cannot_work(spec, budget, said):
    with pytest.raises(kvpress.PolicyError, match=said):
        make_policies(spec, budget)


def test_a_field_that_the_budget_sets():
    assert kvpress.make_policy("tidal_decode", budget=64) == TidalDecode(k=64)
    with pytest.raises(kvpress.PolicyError, match=r"budget=64 does not go with \{'k': 32\} for tidal_decode"):
        kvpress.make_policy("tidal_decode", budget=64, k=32)


def test_a_file_with_a_policy(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("name: snapkv\nwindow: 8\n")
    assert make_policies(str(path), 64) == [SnapKV(window=8, budget=64)]
    path.write_text("name: snapkv\nbudget: 9\n")
    with pytest.raises(kvpress.PolicyError, match=r"policy\.yaml\.budget=9; keep one"):
        make_policies(path, 64)
