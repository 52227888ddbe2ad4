"""Write petals-agent(1) from the command line's own help and petals-agent.toml(5) from the commented default file.

man_pages.py VERSION petals-agent.toml DIR      writes DIR/petals-agent.1 and DIR/petals-agent.toml.5
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEE_ALSO = (
    "petals-agent(1)",
    "petals-agent.toml(5)",
    "petals-agent.service(8)",
    "systemctl(1)",
    "journalctl(1)",
)
EXIT_STATUS = (
    ("0", "It did what was asked."),
    ("2", "The command line cannot be understood."),
    ("65, 66", "The model cannot be served, or files of it are missing."),
    ("69", "The swarm, or the agent that was asked, does not answer."),
    ("70", "A fault of petals-agent's own."),
    ("78", "The configuration is wrong; systemd does not try again."),
    ("130", "Ctrl-C."),
)


def roff(text: str) -> str:
    """`text` as roff shows it: nothing in it is a request, hyphens stay hyphens, `code` is bold."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    bold = re.sub(r"`([^`]+)`", r"\\fB\1\\fP", escaped)
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in bold.splitlines())


def head(name: str, section: int, version: str, what: str) -> str:
    """Title and NAME."""
    title = f'.TH {name.upper()} {section} "" "petals\\-agent {version}" "petals\\-agent"'
    return f"{title}\n.SH NAME\n{roff(name)} \\- {roff(what)}\n"


def see_also(name: str) -> str:
    pages = ",\n".join(
        f".BR {roff(page).replace('(', ' (')}" for page in SEE_ALSO if not page.startswith(f"{name}(")
    )
    return f".SH SEE ALSO\n{pages}\n"


# --- petals-agent(1)


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with the words that call it."""
    inner = getattr(command, "commands", {})
    if not inner:
        yield path, command
    for name, one in sorted(inner.items()):
        if not one.hidden:
            yield from commands(one, f"{path} {name}")


def usage(path: str, command: Any) -> str:
    """`path [OPTIONS] ARGUMENTS` on one line."""
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    words = [f"\\fI{one.metavar or one.name.upper()}\\fP" for one in arguments]
    return " ".join([f"\\fB{roff(path)}\\fP", "[\\fIOPTIONS\\fP]", *words])


def option(one: Any) -> str:
    """One option or argument as an indented paragraph; '' when its help says nothing."""
    if one.param_type_name == "argument":
        name = f"\\fI{one.metavar or one.name.upper()}\\fP"
    else:
        name = ", ".join(f"\\fB{roff(flag)}\\fP" for flag in (*one.opts, *one.secondary_opts))
        if not one.is_flag:
            name += f" \\fI{one.metavar or 'VALUE'}\\fP"
    return f".TP\n{name}\n{roff(one.help or '') or 'As the name says.'}\n"


def command_page(app: Any, version: str) -> str:
    """petals-agent(1)."""
    parts = [
        head("petals-agent", 1, version, "serve transformer blocks in a Petals swarm"),
        ".SH SYNOPSIS\n.B petals\\-agent\n.I COMMAND\n.RI [ OPTIONS ]\n",
        f".SH DESCRIPTION\n{roff(app.help)}\n.PP\nAs a service it is run by systemd, see\n"
        ".BR petals\\-agent.service (8).\nWithout \\fB\\-\\-config\\fP a command reads the first there is of\n"
        ".IR $PETALS_AGENT_CONFIG ,\n.I $XDG_CONFIG_HOME/petals\\-agent/petals\\-agent.toml\nand\n"
        ".IR /etc/petals\\-agent/petals\\-agent.toml .\n.SH COMMANDS\n",
    ]
    for path, command in commands(app, "petals-agent"):
        parts.append(f".SS {usage(path, command)}\n{roff((command.help or '').strip())}\n")
        parts += [option(one) for one in command.params if one.name != "help"]
    parts.append(
        ".SH EXIT STATUS\n" + "".join(f".TP\n.B {code}\n{roff(what)}\n" for code, what in EXIT_STATUS)
    )
    return "".join(parts) + see_also("petals-agent")


# --- petals-agent.toml(5)


def file_page(text: str, version: str) -> str:
    """petals-agent.toml(5): each comment of the default file belongs to the key after it."""
    intro, *sections = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)
    parts = [
        head("petals-agent.toml", 5, version, "configuration of a petals-agent"),
        ".SH SYNOPSIS\n.I /etc/petals\\-agent/petals\\-agent.toml\n.br\n"
        ".I /etc/petals\\-agent/petals\\-agent.toml.d/*.toml\n",
        f".SH DESCRIPTION\n{roff(comments(intro.split(chr(10), 2)[2]))}\n",
    ]
    for name, body in zip(sections[::2], sections[1::2], strict=True):
        parts.append(f".SH [{name}]\n")
        pending = ""
        for line in body.splitlines():
            if line.startswith("#   "):
                if pending:
                    parts.append(f".PP\n{roff(comments(pending))}\n")
                pending = ""
                parts.append(f".PP\n.nf\n{roff(line[4:])}\n.fi\n")
            elif line.startswith("# "):
                pending += line + "\n"
            elif found := re.match(r"#?(\w+ = .*)", line):
                parts.append(f".TP\n\\fB{roff(found[1])}\\fP\n{roff(comments(pending))}\n")
                pending = ""
        if pending:
            parts.append(f".PP\n{roff(comments(pending))}\n")
    return "".join(parts) + see_also("petals-agent.toml")


def comments(text: str) -> str:
    """The sentences of comment lines."""
    lines = (line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#"))
    return "\n".join(line for line in lines if line)


def main() -> None:
    """Command line; runs on the Python of the packaged environment."""
    import typer.main

    from petals_agent.cli.main import app

    version, default_file, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    page = command_page(typer.main.get_command(app), version)
    (folder / "petals-agent.1").write_text(page)
    (folder / "petals-agent.toml.5").write_text(file_page(default_file.read_text(), version))


if __name__ == "__main__":
    main()
