"""Trains for some minutes, and draws the pictures of docs/training/report.md.

    python docs/pictures/make_report.py [RUN]

With RUN, the folder of a run, that one is shown. The page is seen through Chromium, which must be
on the PATH.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from local_distill.training.report import report
from local_distill.training.report.read_run import read_run

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "cpu" / "glsd.yaml"
WIDTH, HEIGHT = 1180, 1150


def command(*arguments):
    program = [sys.executable, "-m", "local_distill.training.cli"]
    subprocess.run([*program, *map(str, arguments)], check=True)


def train(run):
    command("train", "--config", CONFIG, "--output", run, "--steps", 400, "--save_every", 50,
            "--log_every", 5)  # fmt: skip
    command(
        "eval",
        "--checkpoint",
        run,
        "--scenes.count",
        1000,
        "--train_count",
        1000,
        "--test_count",
        500,
    )


def photograph(page, target):
    """The top of the page, as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("neither chromium nor google-chrome is on the PATH")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--disable-background-networking", "--blink-settings=preferredColorScheme=1",
             f"--user-data-dir={profile}", f"--screenshot={target}",
             f"--window-size={WIDTH},{HEIGHT}", page.resolve().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
    with Image.open(target) as seen:
        seen.convert("RGB").quantize(128).save(target, optimize=True)


def stack(paths, target):
    """Pictures one below the other."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    whole = Image.new("RGB", (pictures[0].width, sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    whole.quantize(256).save(target, optimize=True)


def main(given):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(given[0]) if given else Path(folder) / "glsd"
        if not given:
            train(run)
        photograph(report(str(run), f"{folder}/report.html"), HERE / "report.png")
        tokens = read_run(run).pictures["tokens"]
        stack([tokens[0].path, tokens[-1].path], HERE / "report-tokens.png")


if __name__ == "__main__":
    main(sys.argv[1:])
