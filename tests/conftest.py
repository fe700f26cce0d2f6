# ruff: noqa: I001, E402
"""Fixtures on real weights. `pytest --library DIR` runs the parity tests on another library."""

import os
import shutil
import sys
from pathlib import Path

import pytest

# One of several pytest-xdist workers: threads of a BLAS that share a core only wait for each other.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import d2c_mlx  # noqa: F401  first of all, so that the fast BLAS is loaded before mlx.core
import mlx.core as mx
from hypothesis import settings

# Parity is defined in float32, which is what a CPU device computes in; on Metal the base's 16-bit
# dtype would be compared with float32 oracles. `make demo` is what exercises Metal. Commands that
# tests start have it from the environment.
mx.set_default_device(mx.cpu)
os.environ["D2C_MLX_DEVICE"] = "cpu"

ROOT = Path(__file__).parents[1]


# No test cuts the power. Waiting for the disk, file by file, takes a fifth of a tiny run.
os.fsync = lambda file: None

pytest.register_assert_rewrite("helpers")

# A busy machine may take any time for an example.
settings.register_profile("d2c", deadline=None)
settings.load_profile("d2c")


def pytest_configure(config):
    """What a user installs has no torch, only tests do. Commands start in half the time without it.

    The process that starts workers runs no test itself, and workers need torch.
    """
    if WORKER or not config.getoption("numprocesses", None):
        os.environ["PYTHONPATH"] = str(ROOT / "tests" / "helpers" / "without_torch")


def pytest_collection_modifyitems(items):
    """Files with slow tests first, so that no worker is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_addoption(parser):
    parser.addoption("--library", default=str(ROOT / "examples" / "demo"), help="adapters/, tasks/")
    parser.addoption("--rows", type=int, default=2, help="held-out rows per task in parity tests")
    parser.addoption("--inputs", type=int, default=800, help="of every fuzzed parser")
    parser.addoption("--kills", type=int, default=3, help="of each way through the pipeline")
    parser.addoption("--report", type=Path, help="a run whose report a browser opens")
    parser.addoption("--tasks", type=int, default=20, help="of the largest library")


@pytest.fixture(scope="session")
def library(request):
    return Path(request.config.getoption("--library"))


@pytest.fixture(scope="session")
def rows(request):
    return request.config.getoption("--rows")


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory):
    """Converted models and losses of this session only, never the user's; of all its workers."""
    if WORKER:
        path = tmp_path_factory.getbasetemp().parent / "cache"
        path.mkdir(exist_ok=True)
    else:
        path = tmp_path_factory.mktemp("cache")
    os.environ["D2C_MLX_CACHE"] = str(path)
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """`command(*argv)`: what a shell sees of it, exit code, standard output and standard error.

    In this process: an exception that nobody expected is raised here, as D2C_MLX_DEBUG has it.
    Keywords set variables of the environment.
    """
    from d2c_mlx_cli.main import main

    def call(*argv, **environment):
        monkeypatch.setattr(sys, "argv", ["d2c-mlx", *map(str, argv)])
        for name, value in {"D2C_MLX_DEBUG": "1", **environment}.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: $CHROMIUM, one on the PATH, or playwright's own."""
    api = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        path = path or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.skip(
                "needs a Chromium on the PATH, in $CHROMIUM, or playwright install chromium"
            )
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        instance = playwright.chromium.launch(executable_path=path, args=arguments)
        yield instance
        instance.close()


@pytest.fixture
def opened(browser):
    """`opened(address)`: a page; in the end none has said or asked for what it should not.

    `opened.wrong` is what pages said, and addresses that they asked for elsewhere.
    """
    pages, wrong = [], []

    def go(address, width=1400, theme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda asked: asked.url.startswith(address) or wrong.append(asked.url))
        pages.append(page)
        page.goto(address)
        return page

    go.wrong = wrong
    yield go
    for page in pages:
        page.close()
    assert wrong == []


@pytest.fixture(scope="session")
def base():
    """The embedded SmolLM2-135M-Instruct, loaded once."""
    from d2c_mlx.models.model import Model

    return Model()


@pytest.fixture(scope="session")
def float_base(base, tmp_path_factory):
    """The embedded model as a float32 mlx-lm directory, for stock mlx-lm and for torch.

    Stock mlx-lm would run the 4-bit model in float16 here; the same numbers need the same dtype.
    """
    from mlx_lm.utils import dequantize_model, load, save

    directory = tmp_path_factory.mktemp("float") / "base"
    model, tokenizer, config = load(str(base.path), lazy=True, return_config=True)
    model.set_dtype(mx.float32)
    config = {key: value for key, value in config.items() if "quantization" not in key}
    config["torch_dtype"] = "float32"
    save(directory, str(base.path), dequantize_model(model), tokenizer, config)
    return directory
