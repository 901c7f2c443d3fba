"""EleutherAI's lm-evaluation-harness under a policy: its model `kvpress`.

    python -m kvpress.evals.lm_eval run --model kvpress \\
        --model_args pretrained=meta-llama/Llama-3.1-8B-Instruct,policy=h2o,budget=0.2 --tasks gsm8k

The arguments are those of `lm_eval` itself, which looks for no plug-ins: its own command does not know this model. In
Python, `import kvpress.evals.lm_eval` is enough for `lm_eval.simple_evaluate(model="kvpress", ...)`.
"""

import inspect
import logging
import statistics
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

from tqdm import tqdm

import kvpress
from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.models import SMOLLM2, ModelLoadError, load_tokenizer
from kvpress.policy import Policy, check_choice
from kvpress.registry import make_policies, make_policy

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"{error}; run: pip install 'kvpress-toolkit[lm-eval]'") from error

logger = logging.getLogger("lm_eval.models.kvpress")  # a child of the one that lm-eval shows

MODES = ("one_pass", "decode", "sequential")

# (context and continuation as texts, or None where a whole text is scored; their token ids)
Request = tuple[tuple[str, str] | None, list[int], list[int]]


class KVPressLM(HFLM):
    """lm-eval's `hf` model with a policy on it.

    `generate_until` generates under the policy. A log-likelihood from one forward pass says nothing about a policy that
    evicts or selects after a prompt's own attention, so that it is refused unless `scoring` feeds tokens one by one.

    After each kind of request the log says what the cache held; lm-eval's results have it under `config.kvpress`.

    Args:
        pretrained: a hub name, a folder, "smollm2", or in Python a model that is not patched.
        policy: a name, a YAML path, a mapping with `name` and fields, or a list of policies that act together.
        scoring: for `loglikelihood` and multiple choice. "decode" runs the context in one pass and decodes the continuation;
            "sequential" also feeds the context token by token (see `kvpress.score`); "one_pass" is lm-eval's own way, for
            policy full. `loglikelihood_rolling` has no context: with either of the first two it feeds all token by token.
        options: what lm-eval's `hf` takes by name (device, dtype, batch_size, max_length, ...); all others are fields of the
            policy (budget, window, ...). In "decode" and "sequential" `batch_size` counts contexts, each with its choices.

    Raises:
        PolicyError: an unknown policy, field or scoring, or a value out of range; before the model is loaded.
        UnsupportedModelError: the model cannot be patched.
    """

    def __init__(self, pretrained: Any, policy: Any = "full", scoring: str = "one_pass", **options: Any) -> None:
        check_choice(scoring, "scoring", MODES)
        known = set(inspect.signature(HFLM.__init__).parameters) - {"self", "pretrained", "kwargs"}
        policies = _make_policies(policy, {key: value for key, value in options.items() if key not in known})
        options = {key: value for key, value in options.items() if key in known}
        if scoring != "one_pass" and str(options.get("batch_size", 1)).startswith("auto"):
            raise PolicyError(f"batch_size='auto' is measured on one pass, not on scoring={scoring!r}; give a number")
        if pretrained == SMOLLM2:
            pretrained = load_tokenizer(SMOLLM2).name_or_path  # the folder that it is converted into
        super().__init__(pretrained, **options)
        self.scoring = scoring
        self.handle = kvpress.patch(self.model, policies)
        self.held: list[Any] = []  # totals of the report after each batch

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes under the policy; greedy unless the task says otherwise."""
        before = len(self.held)
        texts: list[str] = super().generate_until(requests, disable_tqdm)
        self._log_totals(before)
        return texts

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding gives it.

        Raises:
            PolicyError: the policy would not be seen; says what to set.
        """
        self._check_seen()
        before = len(self.held)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        self._log_totals(before)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text.

        Raises:
            PolicyError: as `loglikelihood`; also for a policy that acts on prompts only, or by a share of the prompt.
        """
        self._check_seen()
        before = len(self.held)
        try:
            answers: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        except PolicyError as error:
            raise PolicyError(f"loglikelihood_rolling has no context and decodes the whole text: {error}") from error
        self._log_totals(before)
        return answers

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results: its own figures, the policy, and what the cache held."""
        found = {"policy": self._described, "scoring": self.scoring, "version": kvpress.__version__, **self._totals()}
        return {**super().get_model_info(), "kvpress": found}

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._model_generate(*args, **kwargs)
        self.held.append(self.handle.report().total)
        return output

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.scoring == "one_pass":
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return found
        # lm-eval's sign for windows of a rolling text. Their context is the token before: a prompt pass of one.
        mode: Any = "sequential" if any(texts is None for texts, _, _ in requests) else self.scoring
        choices: dict[tuple[int, ...], list[int]] = {}
        for at, (_, context, continuation) in enumerate(requests):
            choices.setdefault(tuple(self._fit(context, len(continuation))), []).append(at)
        answers: dict[int, tuple[float, bool]] = {}
        # The longest first: too little memory shows at once, and those side by side need little padding.
        contexts = sorted(choices, key=len, reverse=True)
        size = override_bs or self.batch_size
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc=f"scoring={self.scoring}")
        for first in range(0, len(contexts), size):
            batch = contexts[first : first + size]
            texts = [[requests[at][2] for at in choices[context]] for context in batch]
            scores = kvpress.score(self.model, [list(context) for context in batch], texts, mode=mode)
            self.held.append(self.handle.report().total)
            order = [at for context in batch for at in choices[context]]
            for at, score in zip(order, chain.from_iterable(scores), strict=True):
                answers[at] = score.sum, score.is_greedy
                if requests[at][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[at][0], answers[at])
                bar.update()
        bar.close()
        return [answers[at] for at in range(len(requests))]

    def _fit(self, context: list[int], after: int) -> list[int]:
        """The context's last tokens that fit; as lm-eval counts, the continuation's last token needs no place."""
        room = self.max_length + 1 - after
        if room < 1:
            raise PolicyError(
                f"a continuation of {after} tokens does not fit; the model has max_length={self.max_length}"
            )
        if len(context) > room:
            logger.warning(f"a context of {len(context)} tokens is cut on the left to {room}: it would not fit")
        return context[-room:]

    def _check_seen(self) -> None:
        if self.scoring == "one_pass" and any(policy.name != "full" for policy in self.handle.policies):
            raise PolicyError(
                f"a log-likelihood from one pass is the same under {self._described} as without it; add scoring=decode to "
                "model_args (or scoring=sequential), take a generate_until task, or policy=full"
            )

    @property
    def _described(self) -> str:
        return " + ".join(policy.describe() for policy in self.handle.policies)

    def _totals(self) -> dict[str, float]:
        """Over all batches so far; empty before the first."""
        if not self.held:
            return {}
        held, full = sum(total.bytes for total in self.held), sum(total.full_bytes for total in self.held)
        return {
            "cache_share": held / full if full else 0.0,
            "read_share": statistics.fmean(total.read_share for total in self.held),
        }

    def _log_totals(self, before: int) -> None:
        """Log the totals, if batches came to those that there were before."""
        if len(self.held) > before and (found := self._totals()):
            logger.info(
                f"kvpress: under {self._described} the cache held {found['cache_share']:.1%} of full attention's bytes, and "
                f"steps read {found['read_share']:.1%} of its entries"
            )


def main() -> None:
    """lm-eval's own command line, with this model in it."""
    try:
        cli_evaluate()
    except (ModelLoadError, PolicyError, UnsupportedModelError) as error:
        print(f"\nerror: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _make_policies(spec: Any, fields: dict[str, Any]) -> list[Policy]:
    """The policies, with fields for a single one."""
    alone = isinstance(spec, str) or not isinstance(spec, Sequence)
    if fields and not alone:
        raise PolicyError(
            f"model_args: {', '.join(fields)} belong to no policy of the list; write them into its mappings"
        )
    try:
        return make_policies(make_policy(spec, **fields) if alone else spec)
    except PolicyError as error:  # an unknown name may also be a misspelt one of lm-eval's own
        raise PolicyError(f"model_args: {error}") from error


# `python -m` runs this file as __main__. What counts then is the module that others import: there is one class.
if __name__ == "__main__":
    from kvpress.evals.lm_eval import main as run

    run()
else:
    register_model("kvpress")(KVPressLM)
