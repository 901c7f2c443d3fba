"""Where the model's passes run: in this process, or in several that each hold a part of it (tp_plan)."""

import os
import statistics
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as distributed

import kvpress
from kvpress.evals.answer import Answer, EncodedSample, SharedPass, answer_batch, attempt, record
from kvpress.evals.config import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loader = Callable[..., "tuple[PreTrainedModel, PreTrainedTokenizerBase]"]


def is_distributed() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_main_process() -> bool:
    """Whether this process writes results and prints: any that is alone, and rank 0 of several."""
    return not is_distributed() or os.environ["RANK"] == "0"


class Executor:
    """Runs passes of a model in this process."""

    def load(self, spec: ModelSpec, loader: Loader) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """A model and its tokenizer."""
        loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] = spec.load(loader)
        return loaded

    def record(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        samples: Sequence[EncodedSample],
        share_prompt: bool,
    ) -> SharedPass:
        """See `kvpress.evals.answer.record`."""
        return record(model, tokenizer, samples, share_prompt)

    def answer(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        policies: Sequence[kvpress.Policy],
        samples: Sequence[EncodedSample],
        shared: SharedPass | None,
    ) -> list[Answer]:
        """See `kvpress.evals.answer.answer_batch`."""
        return answer_batch(model, tokenizer, policies, samples, shared)


class DistributedExecutor(Executor):
    """Runs passes of a model that is split over the processes that torchrun started.

    Every pass needs all processes with the same input. Rank 0 calls the methods of `Executor`, each of which broadcasts
    itself; the other ranks are in `serve`.

    If a pass fails on one rank alone (out of memory on one card), the others wait for it until the time is up, and torchrun
    ends them all; started again, the evaluation goes on where it was.
    """

    def __init__(self) -> None:
        self._began = not distributed.is_initialized()
        if self._began:
            on_gpu = torch.cuda.is_available()
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # objects are sent between the hosts' memories, tensors between the cards
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
            distributed.init_process_group(backend, timeout=timedelta(hours=2))

    def load(self, spec: ModelSpec, loader: Loader) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        """This rank's part of a model, and its tokenizer."""
        self._broadcast("load", spec)
        return super().load(spec, loader)

    def record(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        samples: Sequence[EncodedSample],
        share_prompt: bool,
    ) -> SharedPass:
        """See `kvpress.evals.answer.record`."""
        self._broadcast("record", samples, share_prompt)
        return super().record(model, tokenizer, samples, share_prompt)

    def answer(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        policies: Sequence[kvpress.Policy],
        samples: Sequence[EncodedSample],
        shared: SharedPass | None,
    ) -> list[Answer]:
        """See `kvpress.evals.answer.answer_batch`; what the cache held is that of all ranks together.

        Raises:
            RuntimeError: the pass failed on some rank.
        """
        given = None if shared is None else "prompt" if shared.prompt is not None else "continuations"
        self._broadcast("answer", policies, samples, given)
        answers, reason = attempt(partial(super().answer, model, tokenizer, policies, samples, shared))
        if not _combine_ranks(answers):
            raise RuntimeError(reason or "another process of the split model failed; its output says why")
        return list(answers)

    def serve(self, loader: Loader) -> None:
        """On the other ranks: do what rank 0 broadcasts, until it calls `stop`. What fails here fails there, too."""
        model, tokenizer, shared = None, None, None
        while True:
            received: list[Any] = [None]
            distributed.broadcast_object_list(received, src=0, device=torch.device("cpu"))
            if not received[0]:
                return
            call, *arguments = received[0]
            if call == "load":
                model, tokenizer, shared = None, None, None
                (spec,) = arguments
                loaded, _ = attempt(partial(spec.load, loader))
                model, tokenizer = loaded or (None, None)
            elif call == "record":
                shared = None
                shared, _ = attempt(partial(record, model, tokenizer, *arguments))
            elif call == "answer":
                policies, samples, given = arguments
                if given is None or shared is None:
                    shared = None
                elif given == "continuations":
                    shared = shared.without_prompt()
                answers, _ = attempt(partial(answer_batch, model, tokenizer, policies, samples, shared))
                _combine_ranks(answers)

    def stop(self) -> None:
        """On rank 0: end `serve` on the others."""
        self._broadcast()

    def close(self) -> None:
        """End the connection of the processes, if it was made here."""
        if self._began:
            distributed.destroy_process_group()

    def _broadcast(self, *call: Any) -> None:
        distributed.broadcast_object_list([call], src=0, device=torch.device("cpu"))


def _combine_ranks(answers: list[Answer] | None) -> bool:
    """Make what the cache of each rank held of its heads into what all held; whether every rank has answers (not None)."""
    own = (
        None if answers is None else [totals for one in answers for totals in (one.totals, *one.turn_totals, one.spans)]
    )
    every_rank: list[list[dict[str, Any]] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every_rank, own)
    parts = [part for part in every_rank if part is not None]
    if own is None or len(parts) < len(every_rank):
        return False
    for at, totals in enumerate(own):
        for name, value in totals.items():
            values = [part[at][name] for part in parts]
            if name in ("bytes", "full_bytes"):
                totals[name] = sum(values)
            elif name in ("peak_kept", "read_share", "density") or name.startswith("kept"):
                totals[name] = value if len(set(values)) == 1 else statistics.fmean(values)
    return True
