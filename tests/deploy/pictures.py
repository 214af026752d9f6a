"""Draws the dashboards into deploy/grafana/pictures, with Grafana's own panels, from jobs that train.

    python -m tests.deploy.pictures --minutes 12

It needs npm, and chromium (Debian's). Servers, jobs and Prometheus are those of the tests; what goes wrong on any day
goes wrong, and a server restarts. With `--prometheus` the pictures are drawn from one that runs already.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from json import loads
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from deploy.grafana.boards import FOLDER, boards
from tests.deploy.prometheus import until
from tests.deploy.scene import scene
from tests.ports import free_port

PANELS = Path(__file__).with_name("panels")
PICTURES = FOLDER.with_name("pictures")
ROW, WIDTH, SCALE = 34, 1516, 0.8
"""Of a picture: height of a row of Grafana's grid and width of the page, pixels; and what is left of both."""
COLOURS = 256
CHOSEN = dict.fromkeys(("learning", "trainers"), "run-ema-sign|run-trajectory|run-boltzmann|run-collapsed|run-strata")
"""Policies that are chosen at the top of a dashboard; else all."""


@contextmanager
def page(prometheus: str) -> Iterator[str]:
    """URL of the page that draws a dashboard."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "panels"
        shutil.copytree(PANELS, folder)
        (folder / "public").mkdir()
        shutil.copytree(FOLDER, folder / "public" / "dashboards")
        subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)
        port = free_port()
        environment = {**os.environ, "PROMETHEUS": prometheus, "PORT": str(port)}
        process = subprocess.Popen([folder / "node_modules/.bin/vite"], cwd=folder, env=environment)
        try:
            until(lambda: _answers(f"http://127.0.0.1:{port}/"), "the page is served")
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.terminate()
            process.wait(10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url) as answer:
            return bool(answer.read())
    except OSError:
        return False


def draw(prometheus: str, *, minutes: float) -> None:
    """Writes a picture of each dashboard, of the last minutes."""
    PICTURES.mkdir(exist_ok=True)
    with page(prometheus) as url, tempfile.TemporaryDirectory() as profile:
        for board in boards():
            places = [panel["gridPos"] for panel in loads(board.json())["panels"]]
            height = max(place["y"] + place["h"] for place in places) * ROW + 20
            file = PICTURES / f"{board.name}.png"
            command = [
                "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--user-data-dir={profile}", f"--force-device-scale-factor={SCALE}",
                f"--window-size={WIDTH},{height + 90}", "--virtual-time-budget=60000",
                "--run-all-compositor-stages-before-draw", f"--screenshot={file}",
                f"{url}?board={board.name}&minutes={minutes}&policy={quote(CHOSEN.get(board.name, ''))}",
            ]  # fmt: skip
            subprocess.run(command, check=True, capture_output=True, timeout=300)
            with Image.open(file) as drawn:
                cut = drawn.convert("RGB").crop((0, 0, drawn.width, min(drawn.height, round(height * SCALE))))
            cut.quantize(COLOURS).save(file, optimize=True)


def main() -> None:
    """Runs the jobs, then draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0, help="how long jobs train, and what pictures show")
    parser.add_argument("--prometheus", metavar="URL", help="draw from this one, at once")
    options = parser.parse_args()
    if options.prometheus:
        draw(options.prometheus, minutes=options.minutes)
        return
    with tempfile.TemporaryDirectory() as place, scene(Path(place), scrape_s=3) as world:
        part = options.minutes * 60 / 4
        time.sleep(part)
        world.misbehave()
        world.forget()
        time.sleep(part)
        world.stumble()
        world.reload()
        time.sleep(part)
        world.servers[0].stop()
        world.servers[0].start()
        world.misbehave()
        time.sleep(part)
        draw(world.prometheus, minutes=options.minutes)


if __name__ == "__main__":
    main()
