"""``import prunevit`` is light, has every name that it promises, and registers timm's entrypoint all the same."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import prunevit


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOADED = "import time; print('loaded', *sorted({'torch', 'timm', 'numpy'} & set(sys.modules)), time.process_time())"
COMMAND = (
    "from prunevit.cli import app\ntry: app({arguments})\nexcept SystemExit as end: print(end.code, file=sys.stderr)"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["prune", "--help"],
        ["prune", "deit_tiny", "--out", "no", "--macs", "banana"],
        ["prune", "deit_tiny", "--out", "no", "--macs", "50%", "--method", "magic"],
        ["finetune", "./nowhere", "--data", "digits", "--out", "no"],
        ["eval", "nowhere", "--data", "digits"],
    ],
    ids=["help", "help_of_prune", "no_number", "no_method", "no_checkpoint", "nothing_to_evaluate"],
)
def test_help_and_wrong_usage_load_neither_torch_nor_timm(arguments: list[str]) -> None:
    shown = python(f"import sys\n{COMMAND.format(arguments=arguments)}\n{LOADED}")
    loaded, seconds = shown.splitlines()[-1].rsplit(maxsplit=1)
    assert loaded == "loaded"
    assert float(seconds) < 2.5  # of the processor; half a second where it is not shared, torch and timm take six


@pytest.mark.parametrize(
    "order",
    [
        "import timm, prunevit",
        "import prunevit, importlib.util; importlib.util.find_spec('timm'); import timm",
    ],
    ids=["after_timm", "before_timm_which_someone_looks_for"],
)
def test_the_entrypoint_is_there_in_whatever_order(order: str) -> None:
    after = "type(timm.__spec__.loader).__name__, [f for f in sys.meta_path if 'prunevit' in type(f).__module__]"
    assert python(f"{order}; import sys; print(timm.is_model('prunevit'), {after})") == "True SourceFileLoader []"


def test_every_promised_name_is_there() -> None:
    for name in (*prunevit.__all__, *prunevit._PARTS, "__version__"):
        assert getattr(prunevit, name) is not None
        assert name in dir(prunevit)
    assert prunevit.prune is import_module("prunevit.api").prune
    with pytest.raises(AttributeError, match="prunes"):
        _ = prunevit.prunes
