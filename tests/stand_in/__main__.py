"""Run a command where a stand-in is the GPU.

python -m tests.stand_in python -m pytest -p tests.stand_in.plugin -m gpu tests/runtime/test_on_gpu.py
python -m tests.stand_in --order 7 --sm 80 prunevit run CHECKPOINT photo.jpg
"""

from __future__ import annotations

import argparse
import os

from .build import environment


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a command where a stand-in is the GPU.")
    parser.add_argument("--order", default="late", help="when work on streams is done: late, early, or a seed")
    parser.add_argument("--sm", type=int, choices=(80, 90), default=90, help="what the GPU is")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if not given.command:
        parser.error("expected a command to run")
    os.execvpe(given.command[0], given.command, environment(given.order, given.sm))


if __name__ == "__main__":
    main()
