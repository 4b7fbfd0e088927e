"""The command line. Options only: each command's work is imported when the command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from .lora import lora
from .options import (
    EXIT_CODES,
    Backend,
    Device,
    Json,
    Lenient,
    Memory,
    Quiet,
    Recipe,
    Seed,
    ShardSize,
    Threads,
)

__all__ = ["app"]

app = typer.Typer(
    name="mergekernels",
    help="Merges neural networks: exact, in bounded memory, at the speed of the disk.",
    epilog=EXIT_CODES,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mergekernels {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", hidden=True)] = False,
) -> None:
    if traceback:
        from .guard import show_tracebacks

        show_tracebacks()


@app.command(short_help="Merge checkpoints into a new one.", epilog=EXIT_CODES)
def run(
    recipe: Recipe,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to create; it is absent or complete.")],
    backend: Backend = None,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    seed: Seed = None,
    shard_size: ShardSize = "5GB",
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace OUT (swapped at the end) and drop another merge's unfinished work."),
    ] = False,
    lenient: Lenient = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge checkpoints as RECIPE says into the new checkpoint OUT.

    Stopped at any moment, the same command resumes and ends with the same bytes.
    """
    from .merge import run_command

    run_command(
        recipe,
        out,
        backend=backend,
        device=device,
        threads=threads,
        memory=memory,
        seed=seed,
        shard_size=shard_size,
        overwrite=overwrite,
        lenient=lenient,
        as_json=as_json,
        quiet=quiet,
    )


@app.command(short_help="Say what `run` would do; reads headers only.")
def plan(
    recipe: Recipe,
    out: Annotated[
        str | None, typer.Option("--out", metavar="OUT", help="Also check this output folder, its disk and its state.")
    ] = None,
    backend: Backend = None,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    seed: Seed = None,
    shard_size: ShardSize = "5GB",
    lenient: Lenient = False,
    as_json: Json = False,
) -> None:
    """Say what `run` would do: reads headers only, writes nothing, reports every problem at once."""
    from .merge import plan_command

    plan_command(
        recipe,
        out=out,
        backend=backend,
        device=device,
        threads=threads,
        memory=memory,
        seed=seed,
        shard_size=shard_size,
        lenient=lenient,
        as_json=as_json,
    )


@app.command(short_help="Check every byte of a published folder.")
def verify(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder that `run` published.")],
    recompute: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Also recompute N sampled tensors from the inputs with the reference backend."
        ),
    ] = 0,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Re-read OUT, recompute every digest and compare with its manifest: finds any changed byte."""
    from .check import verify_command

    verify_command(out, recompute=recompute, threads=threads, as_json=as_json, quiet=quiet)


@app.command(short_help="Compare two checkpoints tensor by tensor.")
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint folder or safetensors file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Checkpoint folder or safetensors file.")],
    rtol: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Pass tensors with ||A - B|| <= R ||A||, whatever their dtypes. Default: dtypes and bits must agree.",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two checkpoints tensor by tensor, whoever wrote them; status 1 if they differ beyond the bound."""
    from .check import diff_command

    diff_command(a, b, rtol=rtol, threads=threads, as_json=as_json, quiet=quiet)


@app.command(short_help="Show what checkpoints hold.")
def inspect(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Checkpoint folders or safetensors files.")],
    as_json: Json = False,
) -> None:
    """Show what checkpoints hold, from their headers; for several, whether they can be merged."""
    from .check import inspect_command

    inspect_command(models, as_json=as_json)


masks = typer.Typer(
    name="masks",
    help="Experts as one vector and one bit per weight each (TALL masks, EMR).",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(masks)
app.add_typer(lora)


@masks.command(short_help="Experts to one vector and a mask each.", epilog=EXIT_CODES)
def compress(
    recipe: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE|EXPERT... OUT",
            help="A recipe with merge_method tall_mask or emr, or the experts; then the folder to create.",
        ),
    ],
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="The experts' base, without a recipe.", show_default=False)
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="tall_mask (default) or emr, without a recipe.", show_default=False),
    ] = None,
    backend: Backend = None,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    lenient: Lenient = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write one vector and one packed bit per weight of every expert to the new folder OUT.

    OUT is absent or complete. `mergekernels masks restore` gives any expert back.
    """
    from .masks import compress_command

    compress_command(
        recipe,
        base=base,
        method=method,
        backend=backend,
        device=device,
        threads=threads,
        memory=memory,
        lenient=lenient,
        as_json=as_json,
        quiet=quiet,
    )


@masks.command(short_help="An expert from its mask.", epilog=EXIT_CODES)
def restore(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder that `masks compress` wrote.")],
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="Name, last part of it, or number from 0.")],
    dest: Annotated[str, typer.Argument(metavar="DEST", help="Folder to create; it is absent or complete.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Where the base is now. Default: where it was.", show_default=False),
    ] = None,
    backend: Backend = None,
    device: Device = "cpu",
    threads: Threads = None,
    memory: Memory = None,
    shard_size: ShardSize = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST, swapped at the end.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the expert EXPERT of the masks in OUT as the checkpoint DEST.

    Base, vector and mask are compared with their digests first.
    """
    from .masks import restore_command

    restore_command(
        out,
        expert,
        dest,
        base=base,
        backend=backend,
        device=device,
        threads=threads,
        memory=memory,
        shard_size=shard_size,
        overwrite=overwrite,
        as_json=as_json,
        quiet=quiet,
    )


@app.command(short_help="List the merge methods, or describe one.")
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method, for all about it.")] = None,
    as_json: Json = False,
) -> None:
    """List the merge methods, or describe one: formula, parameters, dialects, deviations, source."""
    from .lists import methods_command

    methods_command(name, as_json=as_json)


@app.command(short_help="List what can run on this machine.")
def backends(as_json: Json = False) -> None:
    """List the backends: what can run on this machine and, for each that cannot, why."""
    from .lists import backends_command

    backends_command(as_json=as_json)
