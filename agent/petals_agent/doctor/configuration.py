"""The configuration itself, and the modes of the files that must be private or must not be changed by others."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from petals_agent.doctor.account import Account, owner_name
from petals_agent.doctor.check import Result, Skip, ok, problem, warning, worst
from petals_agent.doctor.host import Host

_GROUP, _OTHERS = stat.S_IRWXG, stat.S_IRWXO
_WRITE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def check_config(host: Host) -> Result:
    """Every key is right, and the file is where the agent looks."""
    if host.mistakes is not None:
        named = f" --config {host.file}" if host.file is not None else ""
        remedy = f"Mend the file until this says OK: petals-agent config check{named}"
        closed = host.file is not None and host.file.exists() and not os.access(host.file, os.R_OK)
        return problem(str(host.mistakes), host.as_root if closed else remedy)
    assert host.loaded is not None
    if host.loaded.notes:
        return warning(
            "; ".join(host.loaded.notes), "See what is in effect: petals-agent config show --origins"
        )
    return ok(", ".join(map(str, host.loaded.files)) or "no file: defaults and the environment")


def check_modes(host: Host) -> Result:
    """Configuration and token are private, plugin folders and the state folder are not writable by others."""
    config, results = (
        host.config,
        [ok("configuration, token, plugins and state are as private as they should be")],
    )
    assert host.loaded is not None
    for file in host.loaded.files:
        results += config_file_mode(file, os.stat(file), host.account)
    if config.model.token_file is not None:
        results.append(_token(config.model.token_file, host.account, host.as_root))
    if config.plugins.enabled:
        for folder in config.plugins.dirs:
            results += plugin_folder_modes(folder, host.account)
    results += state_folder_mode(config.state_dir, host.account)
    return worst(results)


def config_file_mode(file: Path, status: os.stat_result, account: Account) -> list[Result]:
    """0640 or stricter, and readable by the agent."""
    found = []
    if not account.may_read(status):
        found.append(
            problem(
                f"{account.name} cannot read {file}",
                f"Give it to that group: sudo chgrp {account.name} {file} && sudo chmod 0640 {file}",
            )
        )
    if status.st_mode & _WRITE_BY_OTHERS:
        found.append(
            problem(
                f"{file} can be changed by others ({_mode(status)}), and it names code to run",
                f"Close it: chmod 0640 {file}",
            )
        )
    elif status.st_mode & _OTHERS:
        found.append(
            warning(f"{file} can be read by everybody ({_mode(status)})", f"Close it: chmod 0640 {file}")
        )
    return found


def _token(file: Path, account: Account, as_root: str) -> Result:
    try:
        status = file.stat()
    except FileNotFoundError:
        return problem(
            f"model.token_file {file} is not there",
            f"Write the token into it: install -m 0600 /dev/stdin {file}",
        )
    except PermissionError:
        return Skip(f"{file} cannot be looked at", as_root).result
    if not account.may_read(status):
        return problem(
            f"{account.name} cannot read {file}", f"Give it away: sudo chown {account.name} {file}"
        )
    if status.st_mode & (_GROUP | _OTHERS):
        found = f"{file} holds a secret and is open to others ({_mode(status)})"
        remedy = f"Close it: chmod 0600 {file}"
        return problem(found, remedy) if status.st_mode & _OTHERS else warning(found, remedy)
    return ok(f"{file} is private")


def plugin_folder_modes(folder: Path, account: Account) -> list[Result]:
    """Nobody but root and the agent's own user may change a plugin."""
    try:
        paths = [folder, *sorted(folder.glob("*.py"))]
        statuses = [(path, path.stat()) for path in paths]
    except FileNotFoundError:
        return []
    found = []
    for path, status in statuses:
        if status.st_mode & _WRITE_BY_OTHERS:
            found.append(
                problem(
                    f"{path} can be changed by others ({_mode(status)}), and plugins are code",
                    f"Close it: sudo chmod go-w {path}",
                )
            )
        elif status.st_uid not in (0, account.uid):
            found.append(
                problem(
                    f"{path} belongs to {owner_name(status.st_uid)}, and plugins are code",
                    f"Take it: sudo chown root {path}",
                )
            )
    return found


def state_folder_mode(folder: Path, account: Account) -> list[Result]:
    """It belongs to the agent, which can write to it; before the first start it need not be there."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return []
    if not account.may_write(status):
        return [
            problem(
                f"{account.name} cannot write to the state folder {folder} of {owner_name(status.st_uid)}",
                f"Give it away: sudo chown -R {account.name} {folder}",
            )
        ]
    if status.st_mode & stat.S_IWOTH:
        return [
            problem(
                f"{folder} can be changed by everybody ({_mode(status)})", f"Close it: chmod 0750 {folder}"
            )
        ]
    return []


def _mode(status: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(status.st_mode):04o}"
