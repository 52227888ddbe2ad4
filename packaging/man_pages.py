"""Write a command's manual page from its own help, and that of its configuration from the commented default file.

man_pages.py agent VERSION petals-agent.toml DIR                writes DIR/petals-agent.1 and DIR/petals-agent.toml.5
man_pages.py monitor VERSION petals-agent-monitor.toml DIR      the same for petals-agent-monitor
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SEE_ALSO = (
    "petals-agent(1)",
    "petals-agent.toml(5)",
    "petals-agent.service(8)",
    "systemctl(1)",
    "journalctl(1)",
)
MONITOR_SEE_ALSO = ("petals-agent-monitor(1)", "petals-agent-monitor.toml(5)", *SEE_ALSO[3:])
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


def see_also(name: str, others: Sequence[str]) -> str:
    """The other pages."""
    pages = ",\n".join(
        f".BR {roff(page).replace('(', ' (')}" for page in others if not page.startswith(f"{name}(")
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
    return "".join(parts) + exit_status(EXIT_STATUS) + see_also("petals-agent", SEE_ALSO)


def exit_status(codes: Sequence[tuple[str, str]]) -> str:
    """What the command ends with."""
    return ".SH EXIT STATUS\n" + "".join(f".TP\n.B {code}\n{roff(what)}\n" for code, what in codes)


# --- petals-agent-monitor(1)


def monitor_page(app: Any, version: str) -> str:
    """petals-agent-monitor(1): what it does without a command, what with one, and its service."""
    name = "petals-agent-monitor"
    parts = [
        head(name, 1, version, "web page and API with the state of a Petals swarm"),
        f".SH SYNOPSIS\n{usage(name, app)}\n",
        *(f".br\n{usage(path, command)}\n" for path, command in commands(app, name)),
        f".SH DESCRIPTION\n{roff(app.help.strip())}\n.PP\nWithout \\fB\\-\\-config\\fP the configuration is that of\n"
        ".IR $PETALS_AGENT_CONFIG ,\nelse the service's if it is there.\n.SH OPTIONS\n",
        *(option(one) for one in app.params if one.name != "help"),
        ".SH COMMANDS\n",
    ]
    for path, command in commands(app, name):
        parts.append(f".SS {usage(path, command)}\n{roff((command.help or '').strip())}\n")
        parts += [option(one) for one in command.params if one.name != "help"]
    codes = [(code, what) for code, what in EXIT_STATUS if "model" not in what]
    return "".join(parts) + MONITOR_SERVICE + exit_status(codes) + see_also(name, MONITOR_SEE_ALSO)


MONITOR_SERVICE = r""".SH SERVICE
.B petals\-agent\-monitor.service
runs it as a user of its own, and is active with the first reading of the swarm;
.B systemctl status
then shows models, servers and the age of that reading. The watchdog is fed while what is shown is fresh.
Whatever ends the service, it is started again, but for a wrong configuration (exit status 78).
Change the unit with
.BR "systemctl edit petals\-agent\-monitor" .
.SH FILES
.TP
.I /etc/petals\-agent\-monitor/petals\-agent\-monitor.toml
The configuration; further ones in
.IR petals\-agent\-monitor.toml.d .
.TP
.I /var/lib/petals\-agent\-monitor/monitor.sqlite
The history.
"""


# --- petals-agent.toml(5), petals-agent-monitor.toml(5)


def file_page(text: str, version: str, name: str = "petals-agent") -> str:
    """petals-agent.toml(5): each comment of the default file belongs to the key after it."""
    path = roff(f"/etc/{name}/{name}.toml")
    intro, *sections = re.split(r"^\[(\w+)\]\n", text, flags=re.MULTILINE)
    parts = [
        head(f"{name}.toml", 5, version, f"configuration of {name}"),
        f".SH SYNOPSIS\n.I {path}\n.br\n.I {path}.d/*.toml\n",
        f".SH DESCRIPTION\n{roff(comments(intro.split(chr(10), 2)[2]))}\n",
    ]
    for section, body in zip(sections[::2], sections[1::2], strict=True):
        parts.append(f".SH [{section}]\n")
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
    others = SEE_ALSO if name == "petals-agent" else MONITOR_SEE_ALSO
    return "".join(parts) + see_also(f"{name}.toml", others)


def comments(text: str) -> str:
    """The sentences of comment lines."""
    lines = (line.lstrip("# ").rstrip() for line in text.splitlines() if line.startswith("#"))
    return "\n".join(line for line in lines if line)


def main() -> None:
    """Command line; runs on the Python of the packaged environment."""
    import typer.main

    what, version, default_file, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    if what == "agent":
        from petals_agent.cli.main import app

        name, page = "petals-agent", command_page
    else:
        from petals_agent.cli.monitor_main import app

        name, page = "petals-agent-monitor", monitor_page
    (folder / f"{name}.1").write_text(page(typer.main.get_command(app), version))
    (folder / f"{name}.toml.5").write_text(file_page(default_file.read_text(), version, name))


if __name__ == "__main__":
    main()
