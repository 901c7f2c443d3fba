"""Keyformer: noise, temperature schedule, budgets and what they keep."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import kvpress
from kvpress.compat import CACHE
from kvpress.kernels.attention_mass import Perturbation
from kvpress.policies import H2O, Keyformer
from kvpress.policy import Mass, Noise, Quota
from oracles import keyformer as oracle
from support.layers import kept as held
from support.layers import prompt as prompt_pass
from support.layers import row
from support.matrix import Case, check, conversation, expect, prompt, run, sharp_llama
from support.refusals import refused
from support.spies import replace_decode_attention


@pytest.fixture(scope="module")
def model():
    return sharp_llama()


@pytest.fixture
def temperatures(monkeypatch):
    """The temperature of each pass, as the statistics of the first layer were made with, in prompts and decode steps."""
    from kvpress import observe
    from kvpress.kernels.decode_attention import decode_attention

    seen: list[float] = []
    of_prompts, of_steps = observe.attention_mass, decode_attention

    def note(perturbation: Perturbation) -> None:
        if perturbation.layer == 0:
            seen.append(perturbation.temperature)

    def prompt_spy(*args: Any, **options: Any) -> Any:
        note(options["perturbation"])
        return of_prompts(*args, **options)

    def step_spy(*args: Any, **options: Any) -> Any:
        note(options["perturbed"][0])
        return of_steps(*args, **options)

    monkeypatch.setattr(observe, "attention_mass", prompt_spy)
    replace_decode_attention(monkeypatch, step_spy)
    return seen


def test_defaults():
    """The authors' configuration."""
    policy = Keyformer()
    assert (policy.budget, policy.recent_ratio, policy.tau_init, policy.tau_end) == (0.6, 0.3, 1.0, 2.0)
    assert (policy.noise, policy.seed, policy.evict_every, policy.new_tokens) == ("fresh", 0, 1, None)
    assert kvpress.make_policy("keyformer") == policy and policy.describe() == "keyformer()"


# ---------------------------------------------------------------------------------------------------- K1 to K6


@dataclass(frozen=True, kw_only=True)
class NoNoise(Keyformer):
    """Zero noise and temperature 1, but through the perturbed statistics."""

    name = ""

    @property
    def observes(self):
        return Mass(noise=Noise())


@pytest.mark.parametrize("kind", [Keyformer, NoNoise], ids=["by-its-parameters", "by-the-perturbed-path"])
@pytest.mark.parametrize("budget", [5, 10, 17])
@pytest.mark.parametrize("recent", [0.0, 0.3, 1.0])
def test_k1_without_noise_it_is_h2o(model, kind, budget, recent):
    """K1: no noise and temperature 1 throughout is H2O with heavy = k - w and recent = w."""
    window = int(budget * recent + 1e-9)
    plain = kind(budget=budget, recent_ratio=recent, tau_init=1.0, tau_end=1.0, noise="none")
    logits, sets = run(model, plain, conversation(6))
    expected, expected_sets = run(model, H2O(heavy=budget - window, recent=window), conversation(6))
    assert sets == expected_sets
    for got, want in zip(logits, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def perturbed(policy, step, new_tokens, layer=1):
    """Noise and temperature of what the policy observes in a pass."""
    return policy.observes.perturbation(layer, step, new_tokens)


def test_k2_is_the_kernels():
    """K2 (the numbers: `tests/kernels/test_perturbed_mass.py`): the policy hands noise and temperature to the kernel."""
    fresh = perturbed(Keyformer(tau_init=2.0, tau_end=2.0, seed=5), 3, 8, layer=4)
    assert fresh == Perturbation(2.0, 5, 4, fresh=True)
    assert perturbed(Keyformer(noise="per_token"), 0, 8) == Perturbation(1.0, 0, 1, fresh=False)
    assert perturbed(Keyformer(noise="none"), 0, 8) == Perturbation(1.0, None, 1, fresh=False)
    assert perturbed(Keyformer(noise="none", tau_init=1.0, tau_end=1.0), 3, 8) is None


SCHEDULE = [1.0, 1.25, 1.5, 1.75, 2.0]


def test_k3_temperatures_of_passes(model, temperatures):
    """K3: T = 4: 1.00 in the prompt, then 1.25, 1.50, 1.75, 2.00, and 2.00 from then on; a later prompt starts again."""
    run(model, Keyformer(new_tokens=4), conversation(6))
    assert temperatures == [*SCHEDULE, 2.0, 2.0, *SCHEDULE[:4]]


def test_k3_waiting_for_the_first_step_changes_nothing(model, temperatures):
    run(model, Keyformer(new_tokens=4, evict="after_prompt"), [prompt(11), prompt(13, 1), [5], [6]])
    assert temperatures == [1.0, 1.0, 1.25, 1.5]


def test_k3_generate_says_how_many_tokens(model, temperatures):
    """Without `new_tokens` the schedule is as long as `generate` was asked for; the last token is not fed back."""
    with kvpress.patch(model, Keyformer()):
        model.generate(torch.tensor([prompt(20)]), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert temperatures == SCHEDULE[:4]
        temperatures.clear()
        model.generate(torch.tensor([prompt(20)]), max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert temperatures == [1.0, 1.5]


def test_k3_an_own_length_wins_over_generates(model, temperatures):
    with kvpress.patch(model, Keyformer(new_tokens=4)):
        model.generate(torch.tensor([prompt(20)]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert temperatures == SCHEDULE[:3]


def test_k3_nobody_says_how_many_tokens(model, temperatures):
    """128 steps, then the end's temperature."""
    run(model, Keyformer(), [prompt(8), [5], [6]])
    assert temperatures == pytest.approx([1.0, 1 + 1 / 128, 1 + 2 / 128])
    policy = Keyformer()
    assert perturbed(policy, 128, None).temperature == perturbed(policy, 1000, None).temperature == 2.0


def test_k3_falling_temperature():
    falling = Keyformer(tau_init=2.0, tau_end=0.5, new_tokens=3)
    assert [perturbed(falling, step, None).temperature for step in range(5)] == [2.0, 1.5, 1.0, 0.5, 0.5]


def test_generated_text_with_the_length_of_generate(model):
    """Against the oracle, with `new_tokens` left to `generate`."""
    policy = Keyformer(budget=8)
    with kvpress.patch(model, policy):
        output = model.generate(
            torch.tensor([prompt(23)]),
            max_new_tokens=7,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    passes = [prompt(23), *([token] for token in output.sequences[0, 23:-1].tolist())]
    case = Case(policy, oracle.Keyformer(budget=8, new_tokens=7), policy)
    check(expect(model, case, passes), [logits[0] for logits in output.logits], output[CACHE])


@pytest.mark.parametrize("noise", ["fresh", "per_token", "none"])
def test_k4_a_hot_softmax_keeps_the_oldest(model, noise):
    """K4: at an infinite temperature every row gives all the same, so the older an entry the better it is."""
    policy = Keyformer(budget=9, recent_ratio=0.3, tau_init=1e6, tau_end=1e6, noise=noise)
    passes = [prompt(24), *([token] for token in prompt(5, 1))]
    seen = 0
    for ids, layers in zip(passes, run(model, policy, passes)[1], strict=True):
        seen += len(ids)
        assert all(head == [*range(7), seen - 2, seen - 1] for layer in layers for head in layer)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_k5_room_for_everything_is_full_attention(model, seed):
    """K5: noise never reaches the output; with room for everything it is full attention, whatever the seed."""
    passes = conversation(6)
    logits, sets = run(model, Keyformer(budget=100, seed=seed), passes)
    expected, _ = run(model, "full", passes)
    for got, want in zip(logits, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert sets[-1] == [[list(range(40))] * 2] * 2


def test_k5_seeds(model):
    """K5: the same seed gives the same sets, another seed others; the state of the global generator does not matter."""
    first = run(model, Keyformer(budget=8, seed=1), conversation(6))[1]
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert run(model, Keyformer(budget=8, seed=1), conversation(6))[1] == first
    assert run(model, Keyformer(budget=8, seed=2), conversation(6))[1] != first


def test_noise_matters(model):
    """The three kinds of noise keep different sets."""
    kinds = [
        run(model, Keyformer(budget=8, noise=noise), conversation(6))[1] for noise in ("fresh", "per_token", "none")
    ]
    assert kinds[0] != kinds[1] != kinds[2] != kinds[0]


def test_k6():
    """K6: 100 tokens, 60 % of them, 30 % of those recent: 60, 18 recent, 42 key tokens."""
    assert Keyformer(budget=0.6, recent_ratio=0.3).quota(100, 0, 1) == Quota(60, 18)


@pytest.mark.parametrize(
    ("fields", "tokens", "total", "recent"),
    [
        pytest.param({}, 99, 59, 17, id="both-round-down"),
        pytest.param({"budget": 64}, 100, 64, 19, id="int"),
        pytest.param({"budget": 0.29, "recent_ratio": 1.0}, 100, 29, 29, id="all-recent"),
        pytest.param({"budget": 10, "recent_ratio": 0.0}, 100, 10, 0, id="none-recent"),
        pytest.param({"budget": 10, "recent_ratio": 0}, 100, 10, 0, id="none-recent-as-int"),
        pytest.param({"budget": 100, "recent_ratio": 0.29}, 100, 100, 29, id="share-0.29-is-29"),
        pytest.param({"budget": 0.2}, 3, 1, 0, id="share-of-a-short-prompt"),
        pytest.param({"budget": 1.0}, 7, 7, 2, id="everything"),
    ],
)
def test_quota(fields, tokens, total, recent):
    assert Keyformer(**fields).quota(tokens, 0, 1) == Keyformer(**fields).quota(tokens, 3, 4) == Quota(total, recent)


# ---------------------------------------------------------------------------------------------------- the rest


def test_scores_are_the_mass_and_ties_go_to_the_earlier():
    policy = Keyformer(budget=4, recent_ratio=0.25, noise="none")
    assert held(prompt_pass(policy, 6, row(0.5, 0.9, 0.1, 0.3, 0.2, 0.0))) == [0, 1, 3, 5]
    assert held(prompt_pass(policy, 6, row(0.5, 0.5, 0.5, 0.5, 0.5, 0.5))) == [0, 1, 2, 5]


@pytest.mark.parametrize("every", [1, 3, 8])
def test_evict_every(model, every):
    """Until there are `evict_every` entries too many none leaves."""
    sets = run(model, Keyformer(budget=8, evict_every=every), [prompt(20), *([token] for token in prompt(20, 1))])[1]
    assert [len(step[1][0]) for step in sets] == [8 + step % every for step in range(21)]


def test_only_what_is_kept_is_held(model):
    """The report's bytes: a budget of a quarter holds about a quarter; and reads no more."""
    with kvpress.patch(model, Keyformer(budget=0.25)) as handle:
        model.generate(torch.tensor([prompt(400)]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        total = handle.report().total
    assert total.kept == 100
    assert 0.25 * total.full_bytes < total.bytes < 0.35 * total.full_bytes
    assert total.read_share == pytest.approx(101 / 402.5, rel=0.01)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"budget": 0}, ("budget=0",), id="budget-0"),
        pytest.param({"budget": 1.5}, ("budget=1.5", "above 1"), id="budget-1.5"),
        pytest.param({"recent_ratio": 18}, ("recent_ratio=18", "share of the budget"), id="recent-int"),
        pytest.param({"recent_ratio": 1}, ("recent_ratio=1", "share of the budget"), id="recent-1"),
        pytest.param({"recent_ratio": 1.1}, ("recent_ratio=1.1", "0 to 1"), id="recent-above-1"),
        pytest.param({"recent_ratio": -0.1}, ("recent_ratio=-0.1", "0 to 1"), id="recent-negative"),
        pytest.param({"recent_ratio": float("nan")}, ("recent_ratio=nan",), id="recent-nan"),
        pytest.param({"recent_ratio": True}, ("recent_ratio=True",), id="recent-bool"),
        pytest.param({"recent_ratio": "0.3"}, ("recent_ratio='0.3'",), id="recent-text"),
        pytest.param({"tau_init": 0}, ("tau_init=0", "above 0"), id="tau-0"),
        pytest.param({"tau_end": -1.0}, ("tau_end=-1.0", "above 0"), id="tau-negative"),
        pytest.param({"tau_end": float("inf")}, ("tau_end=inf", "finite"), id="tau-inf"),
        pytest.param({"tau_init": float("nan")}, ("tau_init=nan",), id="tau-nan"),
        pytest.param({"tau_init": "1"}, ("tau_init='1'",), id="tau-text"),
        pytest.param({"new_tokens": 0}, ("new_tokens=0", "at least 1"), id="new-tokens-0"),
        pytest.param({"new_tokens": 2.5}, ("new_tokens=2.5",), id="new-tokens-float"),
        pytest.param({"noise": "gaussian"}, ("noise='gaussian'", "'fresh'", "'per_token'", "'none'"), id="noise"),
        pytest.param({"seed": -1}, ("seed=-1", "at least 0"), id="seed-negative"),
        pytest.param({"seed": 2**63}, ("below 2**63",), id="seed-too-large"),
        pytest.param({"seed": None}, ("seed=None",), id="seed-none"),
        pytest.param({"evict_every": 0}, ("evict_every=0", "at least 1"), id="evict-every-0"),
        pytest.param({"evict": "never"}, ("evict='never'",), id="evict"),
    ],
)
def test_bad_values(fields, words):
    with refused(*words):
        Keyformer(**fields)
