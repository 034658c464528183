"""What ``make gpu`` runs, on a machine that has a GPU, torch, triton and nvcc, and perhaps no network.

    python bench/gpu.py --part fused_mlp --shapes snp_deit_tiny --batch 1,256 --out bench/results --wheels wheels

Installs the wheels that were brought along into a temporary folder, builds the extensions in place for this GPU alone
(not with ``--built``, where they were brought along too), and runs one part.
Needs nothing but Python's own library until that is done. ``--dry-run`` prints the commands.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("tests", "ragged_attention", "norm_linear", "fused_mlp", "tune", "model")
NEEDS = (
    "matplotlib", "numpy", "pybind11", "pydantic", "pytest", "pytest_timeout", "rich", "safetensors", "setuptools",
    "timm", "torch", "torchvision", "triton", "typer", "yaml",
)  # fmt: skip
SECONDS = 460  # of one part, its build included: some machines allow ten minutes a command
LEFT = "{left}"  # in a command: the seconds that the part has left when the command begins
GRACE = 10.0  # seconds for last words, once a command is told that the time is over
GPU_TESTS = (
    "tests/kernels/gpu", "tests/kernels/cuda/test_on_gpu.py", "tests/runtime/test_on_gpu.py",
    "tests/nn/test_on_gpu.py", "tests/pruning/test_recover_gpu.py", "tests/pruning/test_prune_gpu.py",
)  # fmt: skip
TIMED_TESTS = ("tests/latency/test_latency_on_gpu.py",)  # the GPU is theirs alone
NONE_CHOSEN = 5  # pytest's status where -k leaves no test
LOADS = [sys.executable, "-c", "from prunevit_kernels import _cpu, _cuda; _cuda.Device.of(0)"]


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One part of what needs a GPU, in under eight minutes.")
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--shapes", default="", help="published shapes, with commas; for tests, pytest's -k")
    parser.add_argument("--batch", default="", help="batch sizes, with commas")
    parser.add_argument("--impls", default="", help="of a benchmark, with commas; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first, without an index")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="after which the part ends by itself")
    parser.add_argument("--built", action="store_true", help="the extensions are here already: do not build them")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    return parser.parse_args(argv)


def wheel_command(folder: Path, site: str) -> list[str]:
    """Install a folder of wheels. Ends with a sentence where there are none."""
    wheels = sorted(map(str, folder.glob("*.whl"))) if folder.is_dir() else []
    if not wheels:
        raise SystemExit(f"expected a folder of wheels in WHEELS, got {folder}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    return [*pip, "--no-cache-dir", "--upgrade", "--target", site, *wheels]


def environment(site: str, architecture: str) -> dict[str, str]:
    """Paths of the checkout itself: nothing is installed but the wheels."""
    paths = [str(ROOT), str(ROOT / "kernels"), site, os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PRUNEVIT_CUDA_ARCHS": architecture}


def architecture() -> str:
    """What nvcc calls this GPU. Ends with a sentence where there is none that the kernels run on."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("expected an NVIDIA GPU that PyTorch sees, got none: this part was not run")
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise SystemExit(f"expected a GPU of sm_80 or newer, got {torch.cuda.get_device_name()}")
    return "90a" if (major, minor) == (9, 0) else f"{major}{minor}"


def part_commands(args: argparse.Namespace, *, built: bool) -> list[list[str]]:
    """The build, unless it is there, and then the part."""
    build = [] if built else [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"], LOADS]
    out = str(args.out.resolve())
    if args.part == "tests":
        parallel = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
        chosen = ["-k", args.shapes] if args.shapes else []
        named = re.sub(r"\W+", "-", f"tests-gpu {args.shapes}").strip("-")
        # -vv: the project's own options have a -q, and the name of a test that hangs is wanted.
        # a signal cannot interrupt a process that waits for a kernel which hangs; ending it from a thread can
        patience = ["--timeout=90", "--timeout-method=thread"]
        pytest = [sys.executable, "-m", "pytest", *patience, *chosen, "-vv", "-m", "gpu", "-p", "no:cacheprovider"]
        together = [*pytest, f"--junitxml={out}/{named}.xml", *parallel, *GPU_TESTS]
        return [*build, together, [*pytest, f"--junitxml={out}/{named}-timed.xml", *TIMED_TESTS]]
    tuning = args.out.resolve() / "tuning.json"
    if args.part == "tune":
        tune = [sys.executable, "-m", "prunevit.runtime.tune", f"--batch={args.batch or '1,64,256'}", f"--out={tuning}"]
        return [*build, *([*tune, shape] for shape in (args.shapes or "snp_deit_small").split(","))]
    options = [f"--{name}={getattr(args, name)}" for name in ("shapes", "batch") if getattr(args, name)]
    options += [f"--tuning={tuning}"] if tuning.is_file() else []  # what PART=tune has written there
    bench = [sys.executable, f"bench/{args.part}.py", "--device=cuda", *options, f"--out={out}"]
    measure = [*bench, f"--limit={LEFT}", *([f"--impls={args.impls}"] if args.impls else [])]
    # the quick one first: peers that autotune may take all the time there is
    return [*build, *([[*bench, "--roofline"]] if args.part == "model" else []), measure]


def missing(site: str) -> list[str]:
    """The packages that neither this Python nor the wheels have."""
    return [name for name in NEEDS if find_spec(name) is None and not (Path(site) / name).exists()]


def run(command: list[str], extra: dict[str, str], until: float) -> int:
    """The command's status; 124 where the time was over first. Nothing that it started lives on."""
    left = until - time.monotonic()
    command = [word.replace(LEFT, f"{left - 2 * GRACE:.0f}") for word in command]
    print("+", shlex.join(command), flush=True)
    # a process group of its own: workers that are stopped, or busy on the GPU, must end with it
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **extra},
        process_group=0,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    try:
        return process.wait(max(left - GRACE, left / 2))
    except subprocess.TimeoutExpired:
        print("stopped: the part's time is over; what was written stays. Narrow it with SHAPES= or BATCH=.", flush=True)
        os.killpg(process.pid, signal.SIGINT)  # pytest then says what has failed so far
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE, left / 2))
        return 124
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: list[str]) -> int:
    args = arguments(argv)
    until = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory(prefix="prunevit-site-") as site:
        install = [wheel_command(args.wheels, site)] if args.wheels else []
        if args.dry_run:
            for command in [*install, *part_commands(args, built=args.built)]:
                print(shlex.join(command))
            return 0
        for command in install:
            if failed := run(command, {}, until):
                return failed
        if absent := missing(site):
            raise SystemExit(f"expected {', '.join(absent)} to be installed, or in WHEELS: docs/performance-gpu.md")
        extra = environment(site, architecture())
        args.out.mkdir(parents=True, exist_ok=True)
        built = args.built and run(LOADS, extra, until) == 0
        if args.built and not built:
            print("the extensions that were brought along do not load here: building them", flush=True)
        statuses = list[int]()
        for command in part_commands(args, built=built):
            statuses.append(run(command, extra, until))
            if statuses[-1] and "pytest" not in command:
                return statuses[-1]
    # tests that failed keep no others from running; none chosen is an error where both commands say so
    failed = next((status for status in statuses if status not in (0, NONE_CHOSEN)), 0)
    return failed or (NONE_CHOSEN if statuses.count(NONE_CHOSEN) == 2 else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
