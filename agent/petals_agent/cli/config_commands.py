"""`petals-agent config check` and `petals-agent config show`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from petals_agent.config import Config, InvalidConfig, Loaded, check_span, parse_overrides, read_config
from petals_agent.config.show import as_json, as_toml
from petals_agent.config.toml_text import key_text
from petals_agent.errors import ModelError
from petals_agent.models.facts import num_blocks

app = typer.Typer(help="Check the configuration, or show what is in effect.", no_args_is_help=True)

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="Default: $PETALS_AGENT_CONFIG, else the user's, else /etc's."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key, as the other commands do."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def check(
    config: ConfigOption = None,
    override: SetOption = None,
    json_output: JsonOption = False,
    without_model: Annotated[
        bool,
        typer.Option(
            "--without-model", help="A host that serves nothing (bootstrap, monitor) needs no model."
        ),
    ] = False,
) -> None:
    """Say OK and what was read, or list every mistake and exit with 78."""
    with _mistakes_reported(json_output):
        loaded = read_config(config, parse_overrides(override or []), require_model=not without_model)
        _check_blocks(loaded.config)
    if json_output:
        typer.echo(json.dumps({"ok": True, **_sources(loaded)}))
        return
    typer.echo("OK")
    sources = _sources(loaded)
    for name in ("files", "environment", "overrides"):
        typer.echo(f"{name}: {', '.join(sources[name]) or 'none'}")
    for note in loaded.notes:
        typer.echo(f"note: {note}")


@app.command()
def show(
    config: ConfigOption = None,
    override: SetOption = None,
    json_output: JsonOption = False,
    origins: Annotated[bool, typer.Option("--origins", help="Say where each value was set.")] = False,
) -> None:
    """Print the configuration in effect as TOML (or JSON); secrets are hidden."""
    with _mistakes_reported(json_output):
        loaded = read_config(config, parse_overrides(override or []), require_model=False)
    if not json_output:
        typer.echo(as_toml(loaded.config, loaded.origins if origins else None), nl=False)
        return
    values = as_json(loaded.config)
    if origins:
        values = {
            "config": values,
            "origins": {key_text(path): str(at) for path, at in loaded.origins.items()},
        }
    typer.echo(json.dumps(values))


def _check_blocks(config: Config) -> None:
    """A model in a folder tells at once how many blocks it has; the rest of its files, and the Hub, wait for `run`."""
    file = Path(config.model.path) / "config.json"
    if not config.model.path or config.serve.blocks == "auto" or not file.is_file():
        return
    try:
        count = num_blocks(json.loads(file.read_bytes()))
    except (OSError, ValueError, AttributeError, ModelError):  # not a mistake of the configuration
        return
    check_span(config.serve.blocks, count, config.origin("serve.blocks"))


def _sources(loaded: Loaded) -> dict[str, list[str]]:
    return {
        "files": [str(file) for file in loaded.files],
        "environment": loaded.environment,
        "overrides": loaded.overrides,
        "notes": loaded.notes,
    }


@contextmanager
def _mistakes_reported(json_output: bool) -> Iterator[None]:
    try:
        yield
    except InvalidConfig as error:
        if json_output:
            typer.echo(json.dumps(error.as_dict()))
        else:
            typer.echo(str(error), err=True)
        raise typer.Exit(error.exit_code) from None
