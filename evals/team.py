"""Runs of a model that is split over processes (tp_plan): the first process decides and writes, the others compute along."""

import os
import statistics
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as distributed

from kvpress.evals.answer import Answer, answer_batch, attempt, record


def started_together() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def leads() -> bool:
    """Whether this process writes and speaks: any that is alone, and the first of a team."""
    return not started_together() or os.environ["RANK"] == "0"


class Team:
    """The processes of one run. Every pass of the model needs all of them, with the same input.

    If one fails where the others do not (out of memory on one card), they wait for it until their time is up, and torchrun
    ends them all; started again, the run goes on.
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

    def tell(self, *command: Any) -> None:
        """Have the others do something; nothing at all ends their work."""
        distributed.broadcast_object_list([command], src=0, device=torch.device("cpu"))

    def close(self) -> None:
        """End the processes' connection, if this team began it."""
        if self._began:
            distributed.destroy_process_group()

    def join(self, found: list[Answer] | None) -> bool:
        """Make what each process held of its heads (None from one that failed) into what the model held; whether all could."""
        own = None if found is None else [one.held for one in found]
        everyone: list[list[dict[str, Any]] | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, own)
        parts = [part for part in everyone if part is not None]
        if found is None or len(parts) < len(everyone):
            return False
        for at, one in enumerate(found):
            for name, value in one.held.items():
                values = [part[at][name] for part in parts]
                if name in ("bytes", "full_bytes"):
                    one.held[name] = sum(values)
                elif name in ("kept", "read_share"):
                    one.held[name] = value if len(set(values)) == 1 else statistics.fmean(values)
        return True

    def follow(self, loader: Any) -> None:
        """In the other processes: do what the first one tells, until it is done. What fails here fails there, too."""
        model, tokenizer, shared = None, None, None
        while True:
            heard: list[Any] = [None]
            distributed.broadcast_object_list(heard, src=0, device=torch.device("cpu"))
            if not heard[0]:
                return
            work, *given = heard[0]
            if work == "load":
                model, tokenizer, shared = None, None, None
                (spec,) = given
                loaded, _ = attempt(partial(spec.load, loader))
                model, tokenizer = loaded or (None, None)
            elif work == "record":
                shared = None
                shared, _ = attempt(partial(record, model, *given))
            elif work == "answer":
                policies, questions, shares = given
                shared = shared if shares else None
                found, _ = attempt(partial(answer_batch, model, tokenizer, policies, questions, shared))
                self.join(found)
