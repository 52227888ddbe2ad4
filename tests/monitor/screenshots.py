"""Pictures of the monitor's page in every state that matters, for people to look at: screenshots.py FOLDER."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from monitor import synthetic
from monitor.browser import DESKTOP, PHONE, Tab, chromium, tab, why_not
from monitor.source import Past, served
from petals_agent.monitor.history import Point
from petals_agent.monitor.state import SwarmState


def past(now: float) -> list[Point]:
    """A day with a bad hour."""
    points = []
    for index in range(720):
        bad = 430 < index < 462
        speed = 0.0 if bad else 420 + 160 * math.sin(index / 50) + 30 * math.sin(index / 3)
        points.append(
            Point(now - 86400 + index * 120, 120.0, speed, speed * 1.6 + 80, 6 if bad else 0, 9, 1, 0, 0)
        )
    return points


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="those whose name holds this text")
    arguments = parser.parse_args()
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 69
    arguments.folder.mkdir(parents=True, exist_ok=True)
    now = time.time()
    states: dict[str, SwarmState] = {
        "healthy": synthetic.healthy(now),
        "mixed": synthetic.small(now),
        "problem": synthetic.small(now).model_copy(update={"problem": "3 of 80 keys did not answer in time"}),
        "large": synthetic.big(now=now),
        "hostile": synthetic.hostile(now),
        "empty": synthetic.swarm([], now),
        "starting": SwarmState(
            taken_at=0, duration_s=0, update_period_s=30, problem="still joining the swarm"
        ),
    }
    server = states["mixed"].models[0].servers[0].peer_id
    views = {  # of the state "mixed": its address, and what is unusual about how it is looked at
        "model": ("models/Llama-4-70B-hf", {}),
        "server": (f"models/Llama-4-70B-hf/servers/{server}", {}),
        "nothing": ("models/none", {}),
        "static": ("", {"java_script_enabled": False}),
        "contrast": ("", {"forced_colors": "active"}),
        "zoomed": ("", {"device_scale_factor": 2, "viewport": {"width": 640, "height": 450}}),
        "print": ("", {}),
    }
    with chromium() as browser:
        for name, (path, options) in views.items():
            for scheme in ("light", "dark"):
                picture = f"{name}-{scheme}"
                if arguments.only in picture and (scheme == "light" or name in ("model", "server")):
                    size = options.get("viewport", DESKTOP)
                    more = {key: value for key, value in options.items() if key != "viewport"}
                    with (
                        served(states["mixed"], Past(past(now))) as site,
                        tab(browser, size, color_scheme=scheme, **more) as one,
                    ):
                        one.page.goto(f"{site.url}/{path}")
                        if name == "print":
                            one.page.emulate_media(media="print")
                        take(one, arguments.folder / f"{picture}.png", whole=True)
        with served(states["mixed"], Past(past(now))) as site, tab(browser) as one:
            site.given.is_fresh = False
            one.page.goto(site.url)
            one.page.wait_for_selector("#stale")
            take(one, arguments.folder / "stale.png")
        for name, state in states.items():
            for size_name, size in (("desktop", DESKTOP), ("phone", PHONE)):
                for scheme in ("light", "dark"):
                    picture = f"{name}-{size_name}-{scheme}"
                    if arguments.only not in picture:
                        continue
                    with (
                        served(state, Past(past(now))) as site,
                        tab(browser, size, color_scheme=scheme, device_scale_factor=1) as one,
                    ):
                        one.page.goto(site.url)
                        one.page.wait_for_selector("html.with-script")
                        if state.models:
                            one.page.wait_for_selector("html.live")
                        peer = one.page.locator("a.peer").first
                        if name == "mixed" and peer.count():
                            peer.click()
                            one.page.wait_for_selector("tr.opened dl")
                        take(one, arguments.folder / f"{picture}.png", name in ("mixed", "healthy"))
    return 0


def take(one: Tab, path: Path, whole: bool = False) -> None:
    """From the top, so that what sticks there is where it belongs."""
    one.page.evaluate("scrollTo(0, 0)")
    one.page.screenshot(path=path, full_page=whole)
    print(path, *one.errors)


if __name__ == "__main__":
    sys.exit(main())
