"""What goes into a run: `tasks`, `tools`, `models`, and `doctor` for the machine."""

from __future__ import annotations

from pathlib import Path

import click

from probe.cli import console
from probe.errors import (
    ProbeError,
    UsageError,
)

_tool_files = click.option(
    "--tool-file",
    "files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Python file whose public, typed functions are tools; it is run. May be repeated.",
)


@console.main.group()
def tasks() -> None:
    """Task files."""


@tasks.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--tools", type=click.Path(path_type=Path), help="Tool catalogue.")
@_tool_files
@console.json_option
def lint(file: Path, tools: Path | None, files: tuple[Path, ...], as_json: bool) -> None:
    """Check a task file: mistakes (exit code 3), then what may be meant differently."""
    from probe.harness.plan import Options, read_inputs
    from probe.tasks import lint as check

    chosen = Options(tools=str(tools) if tools else None, tool_files=tuple(map(str, files)))
    read = read_inputs(file, chosen).file
    warnings = check(read)
    if as_json:
        console.dump({"tasks": len(read.tasks), "warnings": warnings})
        return
    for warning in warnings:
        console.echo(console.printable(warning))
    console.say(f"{len(read.tasks)} tasks, {len(warnings)} warnings")


@tasks.command("import")
@click.argument("format")
@click.argument("paths", metavar="PATH...", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Task file to write.")
@click.option(
    "--as",
    "kind",
    help="tool_selection or replay: a task for each decision, or one for each conversation [default: tool_selection; vllm: replay].",
)
@click.option("--tools", type=click.Path(path_type=Path), help="Catalogue for logs that define no tools.")
@click.option("--category", help="bfcl alone: simple_python, multiple, live_multiple, irrelevance, …")
@console.json_option
def import_log(
    format: str,
    paths: tuple[Path, ...],
    output: Path,
    kind: str | None,
    tools: Path | None,
    category: str | None,
    as_json: bool,
) -> None:
    """Write logs and data sets as tasks: FORMAT is openai, anthropic, inspect, scout, tau2, mcp, hf, vllm or bfcl.

    PATH is a file or a folder of files. Each decision of a log, a turn of the assistant that could call a tool, is a
    task whose target is what was called, or no tool. What cannot be taken is listed by place with the reason. Exit code 3
    where nothing can be taken.
    """
    from probe.api import import_file

    account = import_file(format, paths, output, kind=kind, category=category, tools=tools)
    if as_json:
        console.dump({"file": str(output)} | account.document())
        return
    for item in account.skipped:
        turn = "" if item.turn is None else f" turn {item.turn}"
        console.say(f"left out {item.place}{turn}: {item.reason}")
    for line in account.table():
        console.say(line)
    console.echo(str(output))


@console.main.group("tools")
def tool_commands() -> None:
    """Tools: catalogues of definitions, and the tools that can be run."""


@tool_commands.command("list")
@click.option(
    "--tools", type=click.Path(path_type=Path), help="Tool catalogue [default: ./tools where there is one]."
)
@_tool_files
@console.json_option
def list_tools(tools: Path | None, files: tuple[Path, ...], as_json: bool) -> None:
    """List the tools of a catalogue and those that can be run."""
    from probe.tools.definitions import catalogue_files, read_catalogue
    from probe.tools.execution.registry import executables, listing

    path = tools or (Path("tools") if catalogue_files(Path("tools")) else None)
    rows = listing(read_catalogue(path) if path else {}, str(path), executables(files))
    if as_json:
        console.dump(rows)
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        mark = "runs" if row["runs"] else "-"
        description = " ".join(row["description"].split())
        console.echo(console.printable(f"{row['name']:{width}}  {mark:4}  {description}"))
    for row in rows:
        if row["problem"]:
            console.say(f"{row['name']}: {row['problem']}")


@tool_commands.command("call")
@click.argument("name")
@click.argument("arguments", metavar="ARGS-JSON")
@_tool_files
@click.option(
    "--root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="The only directory that tools read from [default: a small archive of probe's own].",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, dir_okay=False),
    help="SQLite file of kept facts [default: none, nothing outlives the call].",
)
@console.json_option
def call_tool(
    name: str, arguments: str, files: tuple[Path, ...], root: Path | None, state: Path | None, as_json: bool
) -> None:
    """Run a tool on a JSON object of arguments and print what a model would read.

    Exit code 1 where the call went wrong: what is printed then is the error, {"error": kind, "message": …}.
    """
    from probe.tools.execution import Workspace, call, executables

    result = call(name, arguments, tools=executables(files), workspace=Workspace(root=root, state=state))
    console.dump(result.as_dict()) if as_json else console.echo(console.printable(result.content))
    if result.error == "unknown_tool":
        raise UsageError(f"{result.message}; `probe tools list` has all")
    if result.error:
        raise ProbeError(f"{name}: {result.error}: {result.message}")


@console.main.command()
@console.json_option
def models(as_json: bool) -> None:
    """List the model names probe knows; any hub id or directory works as well."""
    from probe.model.names import DEFAULT, SHAPES, aliases

    if as_json:
        console.dump({"default": DEFAULT, "random": sorted(SHAPES), "aliases": aliases()})
        return
    console.echo(f"{DEFAULT}  (default) SmolLM2-135M-Instruct, dequantised from Q4_1")
    console.echo("random:NAME  random weights, no download; NAME is one of " + ", ".join(SHAPES))
    console.echo("DIRECTORY or FILE.gguf  local weights")
    console.echo("org/name[@revision]  any causal language model on the hub that needs no remote code")
    console.echo(
        f"{len(aliases())} TransformerLens aliases, among them gemma-2b, gpt2-small, pythia-70m (--json lists all)"
    )


@console.main.command()
@console.json_option
def doctor(as_json: bool) -> None:
    """Say what probe finds here: versions, device, memory, cached default model, disk."""
    from probe.cli.doctor import examine

    facts = examine()
    if as_json:
        console.dump(facts)
        return
    for name, value in facts.items():
        console.echo(f"{name}: {value}")


@console.main.command()
@click.argument("name", required=False)
@console.pager_option
@console.json_option
def measures(name: str | None, no_pager: bool, as_json: bool) -> None:
    """List what is measured, or define one measure: unit, formula, source, interval, columns, needs."""
    from difflib import get_close_matches

    from probe.api import definitions

    known = definitions()
    chosen = [defined.document() for defined in known if name in (None, defined.name)]
    if not chosen:
        near = get_close_matches(str(name), [defined.name for defined in known], n=1)
        hint = f"did you mean {near[0]}?" if near else "`probe measures` lists all"
        raise UsageError(f"no measure {name!r}: {hint}")
    if as_json:
        console.dump(chosen)
    elif name is None:
        width = max(len(row["name"] or "") for row in chosen)
        console.echo_lines(
            (f"{row['analyzer']:12}  {row['name']:{width}}  {row['of']:8}  {row['unit']}" for row in chosen),
            no_pager,
        )
    else:
        lines = [[f"{key:9} {value}" for key, value in row.items() if value] for row in chosen]
        console.echo("\n\n".join("\n".join(block) for block in lines))
